"""What a peer has that a model server of ours has not: TLS, proxies, a key, limits, and health.

What both have in common is tested in `test_origins`.
"""

from __future__ import annotations

import base64
import select
import socket
import ssl

import pytest
import trio
import trustme
from clocks import guarded, passes
from origins import (
    CHUNKED,
    GUARD,
    HUGE,
    OK,
    Server,
    ask,
    closing_after,
    open_sockets,
    refused_port,
    saying,
    server_context,
)
from serving import until
from trio.testing import wait_all_tasks_blocked

from trioswap.config.parts import PeerConfig, TimeoutConfig
from trioswap.errors import PeerFailed, PeerTimedOut
from trioswap.remote import Peer, PeerState, peer
from trioswap.remote.health import Watch
from trioswap.remote.proxies import proxy_for
from trioswap.remote.wire import PATIENCE, Backend

LIMITS = TimeoutConfig(response_header=60.0)


def peer_at(url, *, key=None, timeouts=LIMITS, environ=()):
    return Peer(PeerConfig("far", url, ("m",), api_key=key, timeouts=timeouts), dict(environ))


@pytest.fixture(scope="module")
def authority():
    """Who signs certificates."""
    return trustme.CA()


@pytest.fixture
def trusted(authority, monkeypatch, tmp_path):
    """This system trusts the authority."""
    authority.cert_pem.write_to_path(tmp_path / "trusted.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "trusted.pem"))


@pytest.fixture
async def serve(nursery):
    """Start a server; gives it and the peer that talks to it."""
    made = []

    async def start(script, context=None, **settings):
        server = await Server(script, context).start(nursery)
        made.append(peer_at(server.url, **settings))
        return server, made[-1]

    yield start
    for each in made:
        await each.aclose()


@pytest.fixture
async def guard():
    """For tests on the real clock."""
    with trio.fail_after(GUARD):
        yield


@pytest.fixture
async def real_guard():
    """For tests on a clock that they move."""
    with guarded():
        yield


async def seen(serve, headers=(), **settings):
    """The header fields that the peer got, by their names in small letters."""
    got = []

    async def script(end):
        got.append(await end.request())
        await end.say(OK)

    _, to = await serve(script, **settings)
    await ask(to, headers=headers)
    lines = got[0].partition(b"\r\n\r\n")[0].split(b"\r\n")[1:]
    return [(name.lower(), value) for name, value in (line.split(b": ", 1) for line in lines)]


# ---- what is sent ----

CLIENT = [(b"Authorization", b"Bearer client"), (b"X-Api-Key", b"client"), (b"X-Title", b"t")]


async def test_the_peer_s_key_replaces_the_client_s(serve):
    """In both spellings that servers know, each once."""
    fields = await seen(serve, CLIENT, key="secret")
    assert fields[1:] == [(b"x-title", b"t"), (b"authorization", b"Bearer secret"), (b"x-api-key", b"secret")]


async def test_without_a_key_nothing_is_taken_away(serve):
    """What is left of the client's credentials is for the caller to decide."""
    assert (await seen(serve, CLIENT))[1:] == [(name.lower(), value) for name, value in CLIENT]


async def test_the_client_s_way_to_us_is_no_affair_of_the_peer(serve):
    """Who the client is and whom it called stays here; the peer is called by its own name."""
    fields = await seen(
        serve,
        [
            (b"Host", b"our.example"),
            (b"X-Forwarded-For", b"10.0.0.1"),
            (b"x-forwarded-proto", b"https"),
            (b"Forwarded", b"for=10.0.0.1"),
            (b"User-Agent", b"curl/8"),
        ],
    )
    assert [name for name, _ in fields] == [b"host", b"user-agent"]
    assert fields[0][1].startswith(b"127.0.0.1:")


# ---- TLS ----


async def test_a_certificate_that_nobody_vouches_for_is_refused(serve, authority, guard):
    """Nothing is sent, the peer is down, and the text says what to do."""
    _, to = await serve(saying(OK), server_context(authority), key="secret")
    with pytest.raises(PeerFailed, match=r"certificate verify failed: .* SSL_CERT_FILE") as caught:
        await ask(to)
    assert caught.value.before_first_byte is True
    assert to.health.state is PeerState.DOWN


@pytest.mark.usefixtures("trusted")
async def test_a_certificate_for_another_name_is_refused(authority, nursery, guard):
    """The certificate must be for the name that is configured."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("other.example").configure_cert(context)
    server = await Server(saying(OK), context).start(nursery)
    with pytest.raises(PeerFailed, match="certificate verify failed: IP address mismatch"):
        await ask(peer_at(server.url))


async def test_a_server_without_tls_is_recognised(serve, guard):
    """https:// where there is only http:// is a mistake that can be told."""

    async def script(end):
        await end.head()
        await end.say(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    server, _ = await serve(script)
    with pytest.raises(PeerFailed, match="is it http:// rather than https://"):
        await ask(peer_at(server.url.replace("http:", "https:")))


async def test_a_system_without_certificates_uses_mozilla_s(monkeypatch):
    """A slim container has no store of its own."""
    nothing = ssl.DefaultVerifyPaths(None, None, "", "", "", "")
    monkeypatch.setattr(ssl, "get_default_verify_paths", lambda: nothing)
    assert peer._trust().cert_store_stats()["x509_ca"] > 50


async def test_a_cancelled_handshake_leaves_nothing(serve, guard):
    """Cancelled while the peer is silent, the connection is closed at once."""
    server, _ = await serve(saying())
    to, before = peer_at(server.url.replace("http:", "https:")), open_sockets()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask, to)
        await wait_all_tasks_blocked()
        while open_sockets() < before + 2:
            await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel(reason="test")
    await wait_all_tasks_blocked()
    assert open_sockets() == before


# ---- limits, on a clock that the tests move ----


@pytest.fixture
def full_port():
    """A port whose queue of connections is full: who connects to it waits."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        waiting = []
        try:
            # The kernel lets one more in than it is told; three are certain to fill it.
            for _ in range(3):
                waiting.append(socket.socket())
                waiting[-1].setblocking(False)
                waiting[-1].connect_ex(listener.getsockname())
            assert select.select([listener], [], [], GUARD)[0]
            yield listener.getsockname()[1]
        finally:
            for each in waiting:
                each.close()


@pytest.fixture
def wires(monkeypatch):
    """Our ends of the connections, in the order in which they are made."""
    made, connect = [], Backend.connect_tcp

    async def connect_and_note(*args, **kwargs):
        made.append(await connect(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(Backend, "connect_tcp", connect_and_note)
    return made


def silent(got):
    """A script: say nothing, and set *got* when there is something of a request."""

    async def script(end):
        await end.head()
        got.set()
        await end.gone()

    return script


async def late(clock, begun, limit, match, to):
    """The request, of which *begun* says when it waits, fails after *limit* seconds and not before."""
    errors = []

    async def fail():
        with pytest.raises(PeerTimedOut, match=match) as caught:
            await ask(to)
        errors.append(caught.value)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fail)
        await until(begun)
        await passes(clock, limit - 0.1)
        assert errors == []
        await passes(clock, 0.2)
        assert [(error.status, error.before_first_byte) for error in errors] == [(504, True)]


async def test_a_connection_is_not_waited_for_for_ever(full_port, mock_clock, real_guard):
    """A peer that accepts nobody is given up, is down, and nothing is left open."""
    to, before = peer_at(f"http://127.0.0.1:{full_port}"), open_sockets()
    why = r"no connection to 127.0.0.1:\d+ within 30.0 s \(timeouts.connect\)"
    await late(mock_clock, lambda: open_sockets() > before, 30, why, to)
    assert to.health.state is PeerState.DOWN
    assert open_sockets() == before


async def test_a_handshake_is_not_waited_for_for_ever(serve, mock_clock, real_guard):
    """A peer that accepts and is silent is given up."""
    got = trio.Event()
    server, _ = await serve(silent(got))
    to = peer_at(server.url.replace("http:", "https:"))
    why = r"no TLS with 127.0.0.1 within 10.0 s \(timeouts.tls_handshake\)"
    await late(mock_clock, got.is_set, 10, why, to)
    assert to.health.state is PeerState.DOWN


async def test_the_head_of_an_answer_is_not_waited_for_for_ever(serve, mock_clock, real_guard):
    """A peer that thinks too long is given up, and told of; it is not down for that."""
    got = trio.Event()
    server, to = await serve(silent(got))
    why = "did not begin its answer within 60 s; .* longer timeouts.response_header"
    await late(mock_clock, got.is_set, 60, why, to)
    assert to.health.state is PeerState.UNKNOWN
    assert server.connections == 1


async def test_a_peer_that_takes_nothing_is_given_up(serve, mock_clock, real_guard):
    """A request that is not read has the same limit."""
    got, errors = trio.Event(), []

    async def script(end):
        await end.head()
        got.set()
        await trio.sleep_forever()

    async def fail():
        with pytest.raises(PeerTimedOut, match="took nothing of the request for 60 s") as caught:
            await ask(to, "POST", body=HUGE)
        errors.append(caught.value)

    _, to = await serve(script)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fail)
        await got.wait()
        await passes(mock_clock, 59.9)
        assert errors == []
        # The kernel may take some more of it at any moment, which counts as progress, but not all.
        while not errors:
            await passes(mock_clock, 60)
    assert [(error.status, error.before_first_byte) for error in errors] == [(504, True)]


async def test_without_a_limit_there_is_none(serve, mock_clock, real_guard):
    """Neither for the head, where none is configured, nor ever between pieces."""
    read = trio.Event()

    async def script(end):
        await end.request()
        await passes(mock_clock, 7200)
        await end.say(CHUNKED + b"1\r\na\r\n")
        await read.wait()
        await passes(mock_clock, 7200)
        await end.say(b"0\r\n\r\n")

    _, to = await serve(script, timeouts=TimeoutConfig(response_header=None))
    async with to.request("GET", b"/", [], b"") as answer:
        chunks = answer.chunks()
        assert await anext(chunks) == b"a"
        read.set()
        assert [chunk async for chunk in chunks] == []


async def test_impatience_with_an_early_answer_ends_with_the_exchange(serve, wires, mock_clock, real_guard):
    """Neither an interim answer nor the one before make a peer lose its time to read a request."""

    async def script(end):
        await end.head()
        await end.say(b"HTTP/1.1 100 Continue\r\n\r\n")
        await until(lambda: wires[0]._early)
        await passes(mock_clock, 30)
        await end.stream.receive_some()
        await end.say(OK)  # while most of the request is still to be sent
        await until(lambda: wires[0]._pipe._patience == PATIENCE)
        while not (await end.stream.receive_some()).endswith(b"!"):
            pass
        await end.head()
        await passes(mock_clock, 30)
        while not (await end.stream.receive_some()).endswith(b"!"):
            pass
        await end.say(OK)

    server, to = await serve(script)
    for _ in range(2):
        assert (await ask(to, "POST", body=HUGE + b"!"))[2] == b"ok"
    assert server.connections == 1


async def test_a_server_that_will_say_no_more_is_sent_no_more(serve, mock_clock, real_guard):
    """The end of what it says is enough to know, in no time; it need not close what it does not read."""

    async def script(end):
        await end.head()
        await end.say(b"HTTP/1.1 401 No\r\nContent-Length: 2\r\n\r\nno")
        await end.stream.send_eof()
        await trio.sleep_forever()

    _, to = await serve(script)
    assert (await ask(to, "POST", body=HUGE))[2] == b"no"


async def test_an_idle_connection_expires(serve, guard):
    """After `idle_conn` a connection is not used again."""
    server, to = await serve(saying(OK, OK), timeouts=TimeoutConfig(idle_conn=0.0))
    for _ in range(2):
        await ask(to)
    assert server.connections == 2


async def test_ten_idle_connections_are_kept(serve, guard):
    """What is more is closed."""
    server, to = await serve(saying(OK, OK))
    count, before, all_open = 0, open_sockets(), trio.Event()

    async def one():
        nonlocal count
        async with to.request("GET", b"/", [], b""):
            count += 1
            if count == 12:
                all_open.set()
            await all_open.wait()

    async with trio.open_nursery() as nursery:
        for _ in range(12):
            nursery.start_soon(one)
    await wait_all_tasks_blocked()
    assert server.connections == 12
    assert open_sockets() - before <= 2 * 10


@pytest.mark.parametrize(("every", "expected"), [(7.0, (1, 7, 7)), (0.2, (1, 1, 1)), (1e9, (1, 32767, 32767))])
async def test_probes_of_silent_connections(serve, guard, every, expected):
    """TCP looks after a connection on which nothing is said."""
    server, _ = await serve(saying())
    wire = await Backend(TimeoutConfig(keepalive=every)).connect_tcp("127.0.0.1", server.port)
    options = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE)]
    options += [(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE), (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL)]
    assert tuple(wire._pipe.socket.getsockopt(*option) for option in options) == expected
    await wire.aclose()


# ---- errors ----


async def test_a_name_that_is_unknown_is_said_to_be(guard):
    """Looked up, and not found."""

    class Resolver(trio.abc.HostnameResolver):
        async def getaddrinfo(self, *_):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

        async def getnameinfo(self, *_):
            raise NotImplementedError

    trio.socket.set_custom_hostname_resolver(Resolver())
    with pytest.raises(PeerFailed, match=r'peer "far" failed: the name gone.example was not found'):
        await ask(peer_at("http://gone.example"))


async def test_all_dead_idle_connections_are_tried(serve, guard):
    """However many connections a restarted peer has left dead, the request is served."""
    all_open, count = trio.Event(), 0

    async def script(end):
        await end.request()
        await end.say(OK)
        if end.number < 5:
            await end.request()
        else:
            await end.gone()

    server, to = await serve(script)

    async def one():
        nonlocal count
        async with to.request("GET", b"/", [], b""):
            count += 1
            if count == 5:
                all_open.set()
            await all_open.wait()

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(one)
    assert (await ask(to))[2] == b"ok"
    assert server.connections == 6


# ---- health ----


async def test_health_follows_what_requests_find(nursery, guard):
    """Unknown, down with the reason and since when, and up again; a peer that is down is asked all the same."""
    port = refused_port()
    to = peer_at(f"http://127.0.0.1:{port}")
    assert (to.health.state, to.health.since) == (PeerState.UNKNOWN, None)
    for _ in range(2):
        with pytest.raises(PeerFailed):
            await ask(to)
    down = to.health
    assert (down.state, down.why) == (PeerState.DOWN, f"connection refused at 127.0.0.1:{port}")
    assert down.since <= trio.current_time()
    assert repr(to) == f"<Peer far at http://127.0.0.1:{port}: down>"

    await Server(closing_after(OK)).start(nursery, port)
    await ask(to)
    assert (to.health.state, to.health.why) == (PeerState.UP, None)
    assert to.health.since > down.since


async def test_a_broken_answer_does_not_make_a_peer_down(serve, guard):
    """It is there, after all."""
    _, to = await serve(closing_after(b""))
    with pytest.raises(PeerFailed):
        await ask(to)
    assert to.health.state is PeerState.UNKNOWN


async def test_a_peer_that_comes_back_is_noticed(nursery, mock_clock, real_guard):
    """Five seconds later it is asked for its health, whatever it says to that, and for no model."""
    port, got = refused_port(), []
    to = peer_at(f"http://127.0.0.1:{port}")
    await nursery.start(to.run)
    with pytest.raises(PeerFailed):
        await ask(to)

    async def script(end):
        got.append(await end.request())
        await end.say(b"HTTP/1.1 404 Not Found\r\nContent-Length: 9\r\n\r\n")

    server = await Server(script).start(nursery, port)
    await passes(mock_clock, 4.9)
    assert (to.health.state, server.connections) == (PeerState.DOWN, 0)
    await passes(mock_clock, 0.2)
    await until(lambda: to.health.state is PeerState.UP)
    assert got[0].startswith(b"HEAD /health HTTP/1.1\r\n")


async def test_looks_become_rarer(nursery, autojump_clock):
    """After 5, 10, 20 and 40 seconds, then every 60; and from 5 again once it was up in between."""
    watch, looks = Watch("far"), []

    async def look():
        looks.append(trio.current_time() - since)
        watch.note_down("still")

    nursery.start_soon(watch.run, look)
    await trio.sleep(1000)
    assert looks == []
    since = trio.current_time()
    watch.note_down("refused")
    await trio.sleep(300)
    assert looks == pytest.approx([5, 15, 35, 75, 135, 195, 255])
    assert watch.health.since == pytest.approx(since)
    assert watch.health.why == "still"

    watch.note_up()
    await trio.sleep(1000)
    assert len(looks) == 7
    since = trio.current_time()
    watch.note_down("refused")
    await trio.sleep(10)
    assert looks[7:] == pytest.approx([5])


# ---- the end ----


async def test_closing_ends_what_is_idle_and_what_would_be_new(serve, guard):
    """After closing, idle connections are gone, new requests fail, and one under way ends as usual but is not kept."""
    gone = []

    async def script(end):
        await saying(OK)(end)
        gone.append(end.number)

    _, to = await serve(script)
    async with to.request("GET", b"/", [], b"") as answer:
        await ask(to)
        await to.aclose()
        await wait_all_tasks_blocked()
        assert gone == [1]
        with pytest.raises(PeerFailed, match="has left the configuration") as caught:
            await ask(to)
        assert caught.value.before_first_byte is True
        assert [chunk async for chunk in answer.chunks()] == [b"ok"]
    await wait_all_tasks_blocked()
    assert gone == [1, 0]


# ---- proxies ----

PROXIES = {"HTTP_PROXY": "proxy:1", "HTTPS_PROXY": "http://proxy:2"}


@pytest.mark.parametrize(
    ("url", "no_proxy", "expected"),
    [
        ("http peer.example 80", "", "http://proxy:1"),
        ("https peer.example 443", "", "http://proxy:2"),
        ("http localhost 80", "", None),
        ("http LOCALHOST. 80", "", None),
        ("http 127.0.0.2 80", "", None),
        ("http ::1 80", "", None),
        ("http 10.0.0.1 80", "", "http://proxy:1"),
        ("http peer.example 80", "*", None),
        ("http peer.example 80", "other.example, peer.example", None),
        ("http peer.example 80", "example", None),
        ("http peer.example 80", "xample", "http://proxy:1"),
        ("http peer.example 80", ".example", None),
        ("http peer.example 80", "*.example", None),
        ("http peer.example 80", ".peer.example", "http://proxy:1"),
        ("http peer.example 80", "peer.example:80", None),
        ("http peer.example 81", "peer.example:80", "http://proxy:1"),
        ("http 10.1.2.3 80", "10.0.0.0/8", None),
        ("http 11.1.2.3 80", "10.0.0.0/8", "http://proxy:1"),
        ("http peer.example 80", "10.0.0.0/8", "http://proxy:1"),
        ("http 10.1.2.3 80", "10.1.2.3", None),
        ("http 10.1.2.3 80", "2.3", "http://proxy:1"),
        ("http fd00::1 80", "fd00::1", None),
        ("http fd00::1 80", "[fd00::1]:80", None),
        ("http fd00::1 81", "[fd00::1]:80", "http://proxy:1"),
        ("http fd00::1 80", "fd00::/8", None),
        ("http peer.example 80", "not/a/range,,", "http://proxy:1"),
    ],
)
def test_which_proxy_is_on_the_way(url, no_proxy, expected):
    """None for this machine and what NO_PROXY lists, in all the spellings that people use."""
    scheme, host, port = url.split()
    assert proxy_for(scheme, host, int(port), {**PROXIES, "NO_PROXY": no_proxy}) == expected


def test_names_in_small_letters_come_first():
    """As in curl, where HTTP_PROXY could come from a web client."""
    assert proxy_for("http", "a.example", 80, {**PROXIES, "http_proxy": "other:1"}) == "http://other:1"
    assert proxy_for("http", "a.example", 80, {"HTTPS_PROXY": "proxy:2"}) is None


async def test_a_plain_peer_is_asked_through_the_proxy(nursery, guard):
    """With the whole address, and with the proxy's own credentials, which the peer's answer does not undo."""
    got = []

    async def script(end):
        got.append(await end.request())
        await end.say(OK)

    proxy = await Server(script).start(nursery)
    to = peer_at("http://peer.example/api", environ={"http_proxy": f"http://me:pw@127.0.0.1:{proxy.port}"})
    assert (await ask(to, target=b"/x?y=%20"))[2] == b"ok"
    lines = got[0].split(b"\r\n")
    assert lines[0] == b"GET http://peer.example/api/x?y=%20 HTTP/1.1"
    assert b"Host: peer.example" in lines
    assert b"Proxy-Authorization: Basic " + base64.b64encode(b"me:pw") in lines
    await to.aclose()


@pytest.mark.usefixtures("trusted")
async def test_a_peer_over_tls_is_asked_through_a_tunnel(authority, nursery, guard):
    """The proxy learns the address, and neither key nor request."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("peer.example").configure_cert(context)
    got = []

    async def script(end):
        got.append(await end.request())
        await end.say(b"HTTP/1.1 200 Connected\r\n\r\n")
        end.stream = trio.SSLStream(end.stream, context, server_side=True, https_compatible=True)
        got.append(await end.request())
        await end.say(OK)
        got.append(await end.request())
        await end.say(OK)

    proxy = await Server(script).start(nursery)
    to = peer_at("https://peer.example", key="secret", environ={"https_proxy": proxy.url})
    for _ in range(2):
        assert (await ask(to))[2] == b"ok"
    assert got[0].startswith(b"CONNECT peer.example:443 HTTP/1.1\r\n")
    assert b"secret" not in got[0]
    assert got[1].startswith(b"GET / HTTP/1.1\r\nHost: peer.example\r\n")
    assert got[1] == got[2]
    await to.aclose()


async def test_a_proxy_that_refuses_is_quoted(nursery, guard):
    """What the proxy says is not the peer's answer."""
    proxy = await Server(saying(b"HTTP/1.1 407 Who are you\r\nContent-Length: 0\r\n\r\n")).start(nursery)
    to = peer_at("https://peer.example", environ={"https_proxy": proxy.url})
    with pytest.raises(PeerFailed, match="the proxy in between answered: 407 Who are you"):
        await ask(to)
    assert to.health.state is PeerState.DOWN


async def test_a_silent_proxy_is_given_up(nursery, mock_clock, real_guard):
    """As long as connecting and its handshake may take together."""
    got = trio.Event()
    proxy = await Server(silent(got)).start(nursery)
    to = peer_at("https://peer.example", environ={"https_proxy": proxy.url})
    why = "no connection within 40 s; what is between us and it does not answer"
    await late(mock_clock, got.is_set, 40, why, to)
    assert to.health.state is PeerState.DOWN


@pytest.mark.parametrize(
    "address", ["socks5://me:pw@127.0.0.1:1", "http://me:pw@127.0.0.1:port", "ftp://me:pw@127.0.0.1"]
)
async def test_a_proxy_that_cannot_be_used_is_not_gone_around(address, guard):
    """The request fails with what to do, and without the password."""
    to = peer_at("http://peer.example", environ={"http_proxy": address})
    with pytest.raises(PeerFailed, match=r"proxy .*HTTP_PROXY, or peer.example in NO_PROXY") as caught:
        await ask(to)
    assert "pw" not in str(caught.value)


async def test_this_machine_is_asked_directly(serve, guard):
    """Whatever the environment says."""
    nobody = f"http://127.0.0.1:{refused_port()}"
    _, to = await serve(saying(OK), environ={"HTTP_PROXY": nobody, "http_proxy": nobody})
    assert (await ask(to))[2] == b"ok"
