"""TLS on real sockets: both versions of HTTP, ends that can be trusted, and clients that stall or speak something else.

`serving` also sees to it that nothing is left behind.
"""

from __future__ import annotations

import logging
import ssl
from contextlib import asynccontextmanager

import attrs
import h2.events
import h11
import httpx  # noqa: TID251 - a client that people use
import pytest
import trio
import trustme
from hyperframe.frame import SettingsFrame
from serving import LONG, App, Client, Client2, read_to_end, serving, until

from trioswap.config.parts import TlsConfig
from trioswap.tls import make_context

CLIENT_HELLO = b"\x16\x03\x01\x02\x00\x01\x00"  # the first 7 bytes of one, 512 bytes long (RFC 8446, 5.1)


@pytest.fixture(scope="module")
def authority():
    """Who issues the certificates."""
    return trustme.CA()


@pytest.fixture(scope="module")
def server_context(authority, tmp_path_factory):
    """The server's side, as the daemon makes it."""
    cert, key = tmp_path_factory.mktemp("tls") / "cert.pem", tmp_path_factory.mktemp("tls") / "key.pem"
    issued = authority.issue_cert("127.0.0.1")
    cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(key)
    return make_context(TlsConfig(cert, key))


@pytest.fixture
def tls(server_context):
    """What `HttpServer` asks for a context."""
    return lambda: server_context


@attrs.define(eq=False)
class Secured:
    """A running server, and clients that trust it."""

    served: object
    authority: trustme.CA

    def context(self, *protocols, newest=ssl.TLSVersion.TLSv1_3):
        """The client's side, offering *protocols*."""
        context = ssl.create_default_context()
        self.authority.configure_trust(context)
        context.maximum_version = newest
        context.set_alpn_protocols(protocols)
        # Python 3.11 up to 3.11.3 takes a connection that just ends for one that was closed, unless it is told not to.
        context.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF
        return context

    async def connect(self, *protocols, newest=ssl.TLSVersion.TLSv1_3, **options):
        """A stream after the handshake; it takes no end for a whole one that has no close_notify."""
        raw = await self.served.connect(**options)
        stream = trio.SSLStream(raw, self.context(*protocols, newest=newest), server_hostname="127.0.0.1")
        await stream.do_handshake()
        return stream

    async def client(self, **options):
        return Client(await self.connect("http/1.1", **options))

    async def client2(self, **options):
        client = Client2(await self.connect("h2", **options))
        await client.flush()
        return client

    def httpx(self, **options):
        base_url = f"https://127.0.0.1:{self.served.port}"
        return httpx.AsyncClient(base_url=base_url, verify=self.context(), trust_env=False, timeout=None, **options)


@pytest.fixture
def securing(authority, tls):
    """`serving` over TLS."""

    @asynccontextmanager
    async def securing(app, **options):
        async with serving(app, tls=tls, **options) as served:
            yield Secured(served, authority)

    return securing


async def read_to_clean_end(stream, received=None):
    """Read up to the end; raises trio.BrokenResourceError at one that a reset or the lack of a close_notify spoils."""
    while data := await stream.receive_some():
        if received is not None:
            received += data


# ---- whole answers ------------------------------------------------------------------------


@pytest.mark.parametrize("newest", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_http1(newest, securing):
    """Requests on one connection are answered, and what the server sends last is a close_notify."""
    async with securing(App()) as secured:
        client = await secured.client(newest=newest)
        assert client.stream.selected_alpn_protocol() == "http/1.1"
        await client.ask("/hello")
        assert await client.response() == (200, b"hello")
        client.parser.start_next_cycle()
        await client.ask("/hello", ("connection", "close"))
        assert await client.response() == (200, b"hello")
        assert await client.stream.receive_some() == b""


@pytest.mark.parametrize("newest", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_http2(newest, securing):
    """ALPN leads to HTTP/2, without an upgrade and with several streams at a time."""
    app = App()
    async with securing(app) as secured:
        client = await secured.client2(newest=newest)
        assert client.stream.selected_alpn_protocol() == "h2"
        waiting = await client.ask("/wait")
        hello = await client.ask("/hello")
        assert (await client.expect(h2.events.DataReceived, hello)).data == b"hello"
        app.release.set()
        await client.expect(h2.events.StreamEnded, waiting)
        await client.stream.aclose()


@pytest.mark.parametrize("newest", [True, False], ids=["http2", "http1"])
async def test_httpx(newest, securing):
    """A client that people use speaks both, keeps its connection, and closes it without a word."""
    async with securing(App()) as secured:
        async with secured.httpx(http2=newest) as client:
            for _ in range(3):
                answer = await client.get("/hello")
                assert (answer.text, answer.http_version) == ("hello", "HTTP/2" if newest else "HTTP/1.1")
            assert secured.served.server.open_connections == 1
        await until(lambda: secured.served.server.open_connections == 0)


async def test_alpn_decides(securing):
    """Who agreed to HTTP/2 is greeted in it before it says anything, and nothing else is understood from it."""
    async with securing(App()) as secured:
        stream = await secured.connect("h2")
        assert (await stream.receive_some())[3] == SettingsFrame.type
        await stream.send_all(b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n")
        received = bytearray()
        await read_to_clean_end(stream, received)
        assert b"hello" not in received


async def test_a_client_without_alpn_speaks_http1(securing):
    """As many small HTTP libraries do."""
    async with securing(App()) as secured:
        client = Client(await secured.connect())
        assert client.stream.selected_alpn_protocol() is None
        await client.ask("/hello")
        assert await client.response() == (200, b"hello")


async def test_the_application_knows_that_it_is_https(authority, tls):
    """The scope says so: what builds links or sets cookies depends on it."""
    schemes = []

    async def app(scope, receive, send):
        schemes.append(scope["scheme"])
        await App().hello(receive, send)

    async with serving(app, tls=tls) as served:
        secured = Secured(served, authority)
        for client in (secured.httpx(), secured.httpx(http2=True)):
            async with client:
                await client.get("/")

    assert schemes == ["https", "https"]


async def test_much_in_both_directions(securing):
    """Bodies of many TLS records arrive whole."""
    async with securing(App()) as secured:
        client = await secured.client()
        await client.ask("/hurried")
        secured.served.server.app.release.set()
        received = b""
        while not isinstance(event := await client.next_event(), h11.EndOfMessage):
            received += event.data if isinstance(event, h11.Data) else b""
        assert received.endswith(b"end")
        assert received.strip(b"\0") == b"end"


async def test_an_early_answer_reaches_a_client_that_is_still_uploading(securing):
    """The client may send on and reads the whole answer: what it sends is taken until it closes."""
    async with securing(App()) as secured:
        client = await secured.client()
        await client.ask("/early", ("transfer-encoding", "chunked"), method="POST", whole=False)
        for _ in range(64):
            await client.send(h11.Data(data=bytes(2**16)))
        assert await client.response() == (413, b"large")
        await client.stream.aclose()
        await until(lambda: secured.served.server.open_connections == 0)


# ---- answers cut short ----------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/cut", "/cut-sized"])
async def test_a_response_cut_short_has_no_clean_end(path, securing):
    """What was sent arrives; then neither HTTP nor TLS says that it was all."""
    async with securing(App()) as secured:
        client = await secured.client()
        await client.ask(path)
        await client.next_event()
        assert (await client.next_event()).data == b"half of the an"
        with pytest.raises(trio.BrokenResourceError):
            await client.stream.receive_some()


@pytest.mark.parametrize("path", ["/stream", "/cut"])
async def test_where_only_the_end_of_the_connection_ends_the_answer(path, securing):
    """For HTTP/1.0 it is the close_notify that tells a whole answer from half of one."""
    feed, numbers = trio.open_memory_channel(1)
    feed.send_nowait(1)
    feed.close()
    async with securing(App(numbers=numbers)) as secured:
        stream = await secured.connect()
        await stream.send_all(b"GET %s HTTP/1.0\r\n\r\n" % path.encode())
        received = bytearray()
        try:
            await read_to_clean_end(stream, received)
            whole = True
        except trio.BrokenResourceError:
            whole = False

    assert received.partition(b"\r\n\r\n")[2] == (b"1\n" if path == "/stream" else b"half of the an")
    assert whole == (path == "/stream")


async def test_a_cancelled_server_vouches_for_nothing(securing):
    """An answer under way ends without a close_notify when run() is cancelled."""
    app = App()
    async with securing(app) as secured:
        client = await secured.client()
        await client.ask("/flood")
        await client.next_event()
        secured.served.running.cancel()
        with pytest.raises(trio.BrokenResourceError):
            await read_to_clean_end(client.stream)


@pytest.mark.parametrize("path", ["/stream", "/cut"])
async def test_without_tls_a_reset_tells(path):
    """The same over plain HTTP/1.0: half an answer ends with a reset, behind what was sent of it."""
    feed, numbers = trio.open_memory_channel(1)
    feed.send_nowait(1)
    feed.close()
    async with serving(App(numbers=numbers)) as served:
        stream = await served.connect()
        await stream.send_all(b"GET %s HTTP/1.0\r\n\r\n" % path.encode())
        received = bytearray()
        try:
            await read_to_clean_end(stream, received)
            whole = True
        except trio.BrokenResourceError:
            whole = False

    assert received.partition(b"\r\n\r\n")[2] == (b"1\n" if path == "/stream" else b"half of the an")
    assert whole == (path == "/stream")


# ---- clients that leave, stall or stop reading --------------------------------------------------


@pytest.mark.parametrize("how", ["close_notify", "without a word"])
@pytest.mark.parametrize("version", [1, 2])
async def test_the_application_hears_that_the_client_left(how, version, securing, caplog):
    """http.disconnect comes however the client ends, and nobody complains about those that skip close_notify."""
    caplog.set_level(logging.DEBUG, logger="trioswap")
    app = App()
    async with securing(app) as secured:
        client = await (secured.client() if version == 1 else secured.client2())
        await client.ask("/listen")
        await app.entered.wait()
        await (client.stream if how == "close_notify" else client.stream.transport_stream).aclose()
        await app.left.wait()
        await until(lambda: secured.served.server.open_connections == 0)
    assert not [record for record in caplog.records if record.name.startswith("trioswap")]


async def test_a_write_without_progress_gives_up(securing):
    """A client that stops reading loses its connection after write_stall."""
    app = App()
    async with securing(app, write_stall=0.3) as secured:
        stuck = await secured.client(small_buffer=True)
        await stuck.ask("/flood")
        await app.left.wait()
        await until(lambda: secured.served.server.open_connections == 0)


STALLS = {"nothing": b"", "half a hello": CLIENT_HELLO}


@pytest.mark.parametrize("sent", STALLS)
async def test_a_stalled_handshake_is_given_up(sent, securing, caplog):
    """It ends after its time, with one line for who looks for it, and holds up nobody meanwhile."""
    caplog.set_level(logging.DEBUG, logger="trioswap")
    async with securing(App(), handshake=0.5, keep_alive=LONG) as secured:
        stalled = await secured.served.connect()
        await stalled.send_all(STALLS[sent])
        await until(lambda: secured.served.server.open_connections == 1)
        secured.served.server.handshake = LONG
        client = await secured.client()
        await client.ask("/hello")
        assert await client.response() == (200, b"hello")
        assert secured.served.server.open_connections == 2
        await read_to_end(stalled)
        await until(lambda: secured.served.server.open_connections == 1)
    assert len([record for record in caplog.records if "the handshake took too long" in record.message]) == 1


@pytest.mark.parametrize("how", ["shutdown", "cancel"])
async def test_a_handshake_does_not_hold_up_the_end(how, securing):
    """Nobody waits for the time that a handshake may take."""
    async with securing(App(), handshake=LONG) as secured:
        stalled = await secured.served.connect()
        await stalled.send_all(CLIENT_HELLO)
        await until(lambda: secured.served.server.open_connections == 1)
        if how == "shutdown":
            secured.served.server.begin_shutdown()
        else:
            secured.served.running.cancel()
        await read_to_end(stalled)


async def test_half_a_record_is_no_progress(securing):
    """A client that stalls in the middle of a TLS record is idle, and closed as such."""
    async with securing(App(), keep_alive=0.3) as secured:
        client = await secured.client()
        await client.stream.transport_stream.send_all(b"\x17\x03\x03\x40\x00half")
        await read_to_end(client.stream.transport_stream)
        await until(lambda: secured.served.server.open_connections == 0)


async def test_shutdown_lets_requests_finish(securing):
    """Idle connections end at once, and cleanly; a request is answered, and its connection closed."""
    app = App()
    async with securing(app, keep_alive=LONG) as secured:
        idle, busy = await secured.client(), await secured.client()
        await idle.ask("/hello")
        assert await idle.response() == (200, b"hello")
        await busy.ask("/wait")
        await until(lambda: app.ended == 1)
        secured.served.server.begin_shutdown()
        assert await idle.stream.receive_some() == b""
        app.release.set()
        assert await busy.response() == (200, b"hello")
        assert await busy.stream.receive_some() == b""


# ---- clients that speak something else --------------------------------------------------------


async def test_plain_http_is_told_to_use_https(securing, caplog):
    """400 in plain HTTP, one line at level debug, and no traceback."""
    caplog.set_level(logging.DEBUG, logger="trioswap")
    async with securing(App()) as secured:
        client = await secured.served.client()
        await client.ask("/v1/models", ("transfer-encoding", "chunked"), method="POST", whole=False)
        for _ in range(64):  # what it is still sending is taken, or the answer would be lost with it
            await client.send(h11.Data(data=bytes(2**16)))
        status, body = await client.response()
        assert (status, b"https://" in body) == (400, True)
        await client.stream.aclose()
        await until(lambda: secured.served.server.open_connections == 0)
    lines = [record for record in caplog.records if record.name.startswith("trioswap")]
    assert [(record.levelname, record.exc_info) for record in lines] == [("DEBUG", None)]
    assert "HTTP_REQUEST" in lines[0].message


STRANGERS = {"ssh": b"SSH-2.0-OpenSSH_9.2\r\n", "zeros": bytes(64), "http2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"}


@pytest.mark.parametrize("what", STRANGERS)
async def test_other_protocols_are_cut_off(what, securing, caplog):
    """One line at level debug, and the others are served."""
    caplog.set_level(logging.DEBUG, logger="trioswap")
    async with securing(App()) as secured:
        stranger = await secured.served.connect()
        await stranger.send_all(STRANGERS[what])
        await read_to_end(stranger)
        await until(lambda: secured.served.server.open_connections == 0)
        client = await secured.client()
        await client.ask("/hello")
        assert await client.response() == (200, b"hello")
    assert [r.levelname for r in caplog.records if r.name.startswith("trioswap")] == ["DEBUG"]


async def test_a_client_that_does_not_trust_us(securing, caplog):
    """Its alert ends the connection; that is its own affair."""
    caplog.set_level(logging.DEBUG, logger="trioswap")
    async with securing(App()) as secured:
        raw = await secured.served.connect()
        with pytest.raises(trio.BrokenResourceError):
            await trio.SSLStream(raw, ssl.create_default_context(), server_hostname="127.0.0.1").do_handshake()
        await raw.aclose()
        await until(lambda: secured.served.server.open_connections == 0)
    assert not [record for record in caplog.records if record.levelno > logging.DEBUG]


def old_context(version):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = version
    return context


async def test_tls_before_1_2_is_refused(securing, caplog):
    """What RFC 8996 calls not to be used is not spoken."""
    caplog.set_level(logging.DEBUG, logger="trioswap")
    async with securing(App()) as secured:
        raw = await secured.served.connect()
        with pytest.warns(DeprecationWarning, match="TLSv1_1 is deprecated"):
            context = old_context(ssl.TLSVersion.TLSv1_1)
        with pytest.raises(trio.BrokenResourceError):
            await trio.SSLStream(raw, context).do_handshake()
        await until(lambda: secured.served.server.open_connections == 0)
    assert "UNSUPPORTED_PROTOCOL" in caplog.text


# ---- renewed certificates -----------------------------------------------------------------------


async def test_new_connections_get_the_new_certificate(authority, server_context, tmp_path):
    """A connection that is open keeps its own, and is served on."""
    contexts = [server_context]
    async with serving(App(), tls=lambda: contexts[-1]) as served:
        secured = Secured(served, authority)
        old = await secured.client()
        issued = authority.issue_cert("127.0.0.1")
        issued.private_key_and_cert_chain_pem.write_to_path(tmp_path / "both.pem")
        contexts.append(make_context(TlsConfig(tmp_path / "both.pem", tmp_path / "both.pem")))
        new = await secured.client()
        for client in (old, new):
            await client.ask("/hello")
            assert await client.response() == (200, b"hello")

    serials = [client.stream.getpeercert()["serialNumber"] for client in (old, new)]
    assert serials[0] != serials[1]
