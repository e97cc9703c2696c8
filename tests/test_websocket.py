"""The client's side of a websocket, against servers of another library, and against bytes no server should say."""

from __future__ import annotations

import math
import socket
import ssl

import attrs
import pytest
import trio
import trustme
from children import PATIENCE, free_port
from clocks import guarded, passes
from websocket_peers import GONE, HUGE, echo, model_server

from trioswap import handshake
from trioswap.config.parts import TimeoutConfig
from trioswap.errors import BadRequest, UpstreamFailed, UpstreamTimedOut
from trioswap.handshake import HandshakeRefused
from trioswap.websocket import Closed, open_websocket


def opened(server, target=b"/", headers=(), subprotocols=(), **options):
    return open_websocket("m", server.url, target, headers, subprotocols, **options)


# ---- messages ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    ["hello", b"hello", "", b"", "grüß 🦙" * 99, b"\0\xff" * 2**19, "ä" * 2**19],
    ids=["text", "binary", "no-text", "no-bytes", "unicode", "1-MiB-binary", "1-MiB-text"],
)
async def test_messages_there_and_back(message):
    """Text stays text and bytes stay bytes, of any size, one after the other."""
    async with model_server(echo) as server, opened(server) as websocket:
        for _ in range(3):
            await websocket.send(message)
            answer = await websocket.receive()
            assert (type(answer), answer) == (type(message), message)


async def test_fragments_are_put_together():
    """A message in fragments, cut within a character and with pings between them, comes whole."""

    async def script(peer):
        data = "grüß dich".encode()
        peer.protocol.send_text(data[:3], fin=False)
        peer.protocol.send_ping(b"between")
        peer.protocol.send_continuation(b"", fin=False)
        peer.protocol.send_continuation(data[3:], fin=True)
        await peer.send(b"next")
        await peer.receive()

    async with model_server(script) as server, opened(server) as websocket:
        assert await websocket.receive() == "grüß dich"
        assert await websocket.receive() == b"next"


async def test_pings_are_answered_while_receiving():
    """The server hears of its ping, in the middle of a message of its own."""
    pongs = []

    async def script(peer):
        peer.protocol.send_text(b"one ", fin=False)
        await peer.ping(b"are you there?")
        pongs.append(await peer.pong())
        peer.protocol.send_continuation(b"two", fin=True)
        await peer.flush()
        await peer.closed()

    async with model_server(script) as server, opened(server) as websocket:
        assert await websocket.receive() == "one two"
    assert pongs == [b"are you there?"]


async def test_a_server_that_sends_before_it_reads():
    """While our message waits for the server to read, a ping and a huge message of its own reach us: no deadlock."""
    reading = trio.Event()
    heard = []

    async def script(peer):
        await peer.ping(b"1")
        await peer.ping(b"2")
        await peer.send(bytes(HUGE))
        await reading.wait()
        heard.append(await peer.receive())
        await peer.close(1000)
        await peer.closed()

    async with (
        model_server(script) as server,
        opened(server) as websocket,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(websocket.send, bytes(HUGE))
        assert await websocket.receive() == bytes(HUGE)
        reading.set()
        assert await websocket.receive() == Closed(1000, "")
    assert heard == [bytes(HUGE)]


async def test_sending_waits_for_the_server():
    """What is sent is not heaped up: a message that the system does not take is waited for."""
    reading = trio.Event()

    async def script(peer):
        await reading.wait()
        await echo(peer)

    async with model_server(script) as server, opened(server) as websocket, trio.open_nursery() as nursery:
        sent = trio.Event()

        async def send():
            await websocket.send(bytes(HUGE))
            sent.set()

        nursery.start_soon(send)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert not sent.is_set()
        reading.set()
        assert await websocket.receive() == bytes(HUGE)
        assert sent.is_set()


async def test_a_cancelled_message_spoils_nothing():
    """A message whose sender is cancelled half way goes out whole, and the next one follows it."""
    reading = trio.Event()

    async def script(peer):
        await reading.wait()
        await echo(peer)

    async with model_server(script) as server, opened(server) as websocket:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(websocket.send, bytes(HUGE))
            await trio.testing.wait_all_tasks_blocked(0.01)
            nursery.cancel_scope.cancel()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(websocket.send, "after")
            reading.set()
            assert await websocket.receive() == bytes(HUGE)
            assert await websocket.receive() == "after"


# ---- the end -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "heard"),
    [
        ((1000,), Closed(1000)),
        ((1001, "off I go"), Closed(1001, "off I go")),
        ((4321, "ä" * 61), Closed(4321, "ä" * 61)),
        ((), Closed(1005)),
    ],
)
async def test_the_server_closes(said, heard):
    """Its code and reason are told, as often as asked, and it has the same back; what came before comes first."""

    answered = []

    async def script(peer):
        await peer.send("last words")
        await peer.close(*said)
        answered.append(await peer.closed())

    async with model_server(script) as server, opened(server) as websocket:
        assert await websocket.receive() == "last words"
        for _ in range(2):
            assert await websocket.receive() == heard
        await websocket.send("nobody hears this")
        await websocket.close(1000)
        await wait_until(lambda: answered)
    assert answered == [attrs.astuple(heard)]


@pytest.mark.parametrize(
    ("said", "heard"),
    [((1000, ""), (1000, "")), ((4001, "enough"), (4001, "enough")), ((None,), (1005, ""))],
)
async def test_we_close(said, heard):
    """The server hears code and reason, and everything sent before; `close` returns when it has agreed."""
    ended = []

    async def script(peer):
        ended.append(await peer.receive())
        ended.append(await peer.closed())

    async with model_server(script) as server, opened(server) as websocket:
        await websocket.send("last words")
        await websocket.close(*said, patience=PATIENCE)
        assert await websocket.receive() == Closed(*heard)
        await websocket.close(1001)
        await wait_until(lambda: len(ended) == 2)
    assert ended == ["last words", heard]


async def wait_until(condition):
    while not condition():
        await trio.lowlevel.checkpoint()


async def test_closing_does_not_wait_for_ever():
    """A server that neither reads nor answers holds nobody up."""

    async def script(peer):
        await peer.send("much to say")
        await trio.sleep_forever()

    async with model_server(script) as server, opened(server) as websocket:
        await websocket.close(1000, patience=0.05)


@pytest.mark.parametrize(
    ("how", "why"),
    [("aclose", "ended the websocket without a close frame"), ("reset", "connection reset by peer")],
)
async def test_a_connection_that_ends_without_a_close_frame(how, why):
    """It is no proper end: what came before is told, and then it is an error."""
    received = trio.Event()

    async def script(peer):
        await peer.send("half of the story")
        await received.wait()
        if how == "reset":
            peer.reset()
        else:
            await peer.stream.aclose()

    async with model_server(script) as server, opened(server) as websocket:
        assert await websocket.receive() == "half of the story"
        received.set()
        with pytest.raises(UpstreamFailed, match=why) as caught:
            await websocket.receive()
        assert not caught.value.before_first_byte
        await websocket.send("a connection that has ended takes anything")
        await websocket.close(1000)


async def test_leaving_the_block_ends_the_connection():
    """Without `close` the server sees no close frame; and an error of the block comes out as it was."""
    ended = []

    async def script(peer):
        ended.append(await peer.closed())

    async with model_server(script) as server:
        with pytest.raises(ValueError, match="seeded"):
            async with opened(server):
                raise ValueError("seeded")
        async with trio.open_nursery() as nursery, opened(server):
            nursery.cancel_scope.cancel()
            await trio.sleep_forever()
        await wait_until(lambda: len(ended) == 2)
    assert ended == [GONE, GONE]


# ---- servers that do what they should not ------------------------------------------------


@pytest.mark.parametrize("fragments", [False, True])
async def test_a_message_that_is_too_large(fragments):
    """It is an error, the server hears 1009, and what it sends on is not kept; one of just the limit passes."""
    ended = []

    async def script(peer):
        await peer.send(bytes(1000))
        if fragments:
            peer.protocol.send_binary(bytes(600), fin=False)
            peer.protocol.send_continuation(bytes(401), fin=False)
        else:
            peer.protocol.send_binary(bytes(HUGE))
        await peer.flush()
        ended.append(await peer.closed())

    async with model_server(script) as server, opened(server, max_message=1000) as websocket:
        assert await websocket.receive() == bytes(1000)
        with pytest.raises(UpstreamFailed, match="more than 1000 bytes"):
            await websocket.receive()
        await wait_until(lambda: ended)
    assert ended[0][0] == 1009


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"\x83\x00", 1002),  # an opcode that does not exist
        (b"\x81\x80\0\0\0\0", 1002),  # masked, by a server
        (b"\xc1\x00", 1002),  # compressed, though that was not agreed
        (b"\x80\x00", 1002),  # a continuation of nothing
        (b"\x81\x01\xff", 1007),  # text that is no UTF-8
        (b"\x88\x02\x03\xee", 1002),  # 1006, which never travels
    ],
)
async def test_what_is_no_websocket_traffic(data, code):
    """It is an error, and the server hears which."""
    ended = []

    async def script(peer):
        await peer.stream.send_all(data)
        ended.append(await peer.closed())

    async with model_server(script) as server, opened(server) as websocket:
        with pytest.raises(UpstreamFailed, match="does not speak websocket as it should"):
            await websocket.receive()
        await wait_until(lambda: ended)
    assert ended[0][0] == code


# ---- the handshake ------------------------------------------------------------------------


async def test_the_request_is_the_clients():
    """Path, query and headers travel on; what belongs to its own connection and handshake does not."""
    headers = [
        (b"host", b"some.where:81"),
        (b"connection", b"Upgrade, x-private"),
        (b"upgrade", b"websocket"),
        (b"x-private", b"1"),
        (b"sec-websocket-key", b"AAAAAAAAAAAAAAAAAAAAAA=="),
        (b"sec-websocket-version", b"13"),
        (b"sec-websocket-extensions", b"permessage-deflate"),
        (b"sec-websocket-protocol", b"other"),
        (b"cookie", b"a=b"),
        (b"origin", b"http://some.where"),
    ]
    async with model_server(echo, subprotocols=["two", "one"]) as server:
        server_url = f"{server.url}/base/?k=1"
        async with open_websocket("m", server_url, b"/a%2Fb?q=%20", headers, ["one", "two"]) as websocket:
            assert websocket.subprotocol == "two"
            assert websocket.headers[-1] == (b"set-cookie", b"seen=yes")
            assert {name for name, _ in websocket.headers} <= {b"date", b"server", b"set-cookie"}
        request = server.peers[0].request
    assert request.path == "/base/a%2Fb?k=1&q=%20"
    assert dict(request.headers.raw_items()) == {
        "Host": "some.where:81",
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Key": request.headers["Sec-WebSocket-Key"],
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Protocol": "one, two",
        "cookie": "a=b",
        "origin": "http://some.where",
    }
    assert request.headers["Sec-WebSocket-Key"] != "AAAAAAAAAAAAAAAAAAAAAA=="


async def test_without_host_and_subprotocol():
    """The server's own authority is its host; where nothing is offered, nothing is agreed."""
    async with model_server(echo) as server, opened(server) as websocket:
        assert websocket.subprotocol is None
        assert server.peers[0].request.headers["Host"] == f"127.0.0.1:{server.port}"
        assert "Sec-WebSocket-Protocol" not in server.peers[0].request.headers


@pytest.mark.parametrize(
    ("target", "headers"),
    [(b"/\xff", []), (b"/", [(b"host", b"\xff")]), (b"/", [(b"host", b"a" * 64)]), (b"/", [(b"x", b"a\nb")])],
)
async def test_what_cannot_be_asked(target, headers):
    """What HTTP/1.1 has no words for is the client's mistake."""
    with pytest.raises(BadRequest):
        async with open_websocket("m", "http://127.0.0.1:9", target, headers):
            pass


def saying(answer):
    """A script for a server that does not accept: *answer*, and then it waits."""

    async def script(peer):
        await peer.stream.send_all(answer)
        await trio.sleep_forever()

    return script


def closing_after(answer):
    async def script(peer):
        await peer.stream.send_all(answer)
        await peer.stream.aclose()

    return script


@pytest.mark.parametrize(
    ("script", "body"),
    [
        (saying(b"Content-Length: 4\r\n\r\nnono"), b"nono"),
        (saying(b"Transfer-Encoding: chunked\r\n\r\n4\r\nnono\r\n0\r\n\r\n"), b"nono"),
        (closing_after(b"Connection: close\r\n\r\nnono"), b"nono"),
        (closing_after(b"Content-Length: 9\r\n\r\nnono"), b""),
        (saying(b"Content-Length: 9\r\n\r\nnono"), b""),
        (saying(b"Content-Length: 99999\r\n\r\n" + bytes(99999)), b""),
        (saying(b"Transfer-Encoding: chunked\r\n\r\nz"), b""),
    ],
    ids=["whole", "chunked", "till the end", "cut", "slow", "long", "broken"],
)
async def test_a_refusal(script, body, monkeypatch):
    """Status, headers and body are told; a body that is long, slow or broken is left out."""
    monkeypatch.setattr(handshake, "REFUSAL_GRACE", 0.2 if body == b"" else PATIENCE)

    async def whole(peer):
        await peer.stream.send_all(b"HTTP/1.1 403 Forbidden\r\nX-Why: because\r\n")
        await script(peer)

    async with model_server(whole, accept=False) as server:
        with pytest.raises(HandshakeRefused, match="refused the websocket with status 403") as caught:
            async with opened(server):
                pass
    assert attrs.astuple(caught.value.answer) == (403, [(b"x-why", b"because")], body)
    assert isinstance(caught.value, UpstreamFailed)


SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"


@pytest.mark.parametrize(
    ("script", "why"),
    [
        (closing_after(b""), "before the head of its answer was complete"),
        (closing_after(b"HTTP/1.1 101"), "before the head of its answer was complete"),
        (saying(b"what?\r\n\r\n"), "does not speak websocket as it should"),
        (saying(SWITCH + b"Sec-WebSocket-Accept: x\r\n\r\n"), "does not speak websocket as it should"),
        (saying(SWITCH + b"Sec-WebSocket-Protocol: \xff\r\n\r\n"), "does not speak websocket as it should"),
        (saying(b"HTTP/1.1 103 Early Hints\r\n\r\n"), "with status 103"),
    ],
)
async def test_an_answer_that_is_none(script, why):
    """The server answers with something else than HTTP should be; the handshake may be tried again."""
    async with model_server(script, accept=False) as server:
        with pytest.raises(UpstreamFailed, match=why) as caught:
            async with opened(server):
                pass
    assert caught.value.before_first_byte


@pytest.mark.parametrize("heard", [b"", b"HTTP/1.1 101"])
async def test_a_server_that_does_not_answer(heard):
    """The handshake has its time (`response_header`)."""
    async with model_server(saying(heard), accept=False) as server:
        with pytest.raises(UpstreamTimedOut, match=r"no answer to the handshake within 0.1 s \(response_header\)"):
            async with opened(server, timeouts=TimeoutConfig(response_header=0.1)):
                pass


async def test_no_limit_is_a_minute(mock_clock):
    """Where the configuration gives no limit there is one all the same."""
    asked = trio.Event()

    async def script(peer):
        asked.set()
        await trio.sleep_forever()

    async def expect():
        with pytest.raises(UpstreamTimedOut, match="within 60 s"):
            async with opened(server):
                pass

    with guarded():
        async with model_server(script, accept=False, patience=math.inf) as server, trio.open_nursery() as nursery:
            nursery.start_soon(expect)
            await asked.wait()
            await passes(mock_clock, 59.9)
            assert nursery.child_tasks
            await passes(mock_clock, 0.2)
            assert not nursery.child_tasks


async def test_nobody_listens():
    """No connection is a failure before anything was said."""
    with trio.fail_after(PATIENCE), pytest.raises(UpstreamFailed, match="connection refused") as caught:
        async with open_websocket("m", f"http://127.0.0.1:{free_port()}", b"/", []):
            pass
    assert caught.value.before_first_byte


# ---- TLS ----------------------------------------------------------------------------------


@pytest.fixture
def tls():
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    return authority, context


async def test_over_tls(tls):
    """https base URLs speak websocket over TLS, with the certificates that the context trusts."""
    authority, context = tls
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    async with (
        model_server(echo, tls=context) as server,
        open_websocket("m", f"https://127.0.0.1:{server.port}", b"/", [], ssl_context=trusting) as websocket,
    ):
        await websocket.send("hidden")
        assert await websocket.receive() == "hidden"
        await websocket.close(1000, patience=PATIENCE)


async def test_a_certificate_that_is_not_trusted(tls):
    """The system's trust is the default, and the error is OpenSSL's."""
    async with model_server(echo, tls=tls[1]) as server:
        with pytest.raises(UpstreamFailed, match=r"verify failed: (self.signed|unable to get local issuer)"):
            async with open_websocket("m", f"https://127.0.0.1:{server.port}", b"/", []):
                pass


async def test_no_tls_in_time():
    """A server that does not speak TLS has its time, too (`tls_handshake`)."""
    timeouts = TimeoutConfig(tls_handshake=0.1)
    with trio.fail_after(PATIENCE), socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"https://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(UpstreamTimedOut, match=r"no TLS within 0.1 s \(tls_handshake\)"):
            async with open_websocket("m", url, b"/", [], timeouts=timeouts):
                pass
