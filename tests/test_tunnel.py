"""Websockets the whole way: a client of another library, the HTTP server, the tunnel, a model server."""

from __future__ import annotations

import json
import socket
from contextlib import asynccontextmanager, suppress

import attrs
import pytest
import trio
from children import PATIENCE
from serving import LONG, read_to_end, serving, until
from websocket_peers import HUGE, connect, echo, model_server

from trioswap import tunnel
from trioswap.asgi import ClientLeft
from trioswap.asgi_websocket import Socket, close_code
from trioswap.errors import LeaseCut, ModelUnloaded, ShuttingDown, TrioswapError, UpstreamFailed
from trioswap.tunnel import relay
from trioswap.websocket import Closed, open_websocket


@attrs.define(eq=False)
class Gate:
    """An application that carries each websocket to the model server at `url`, under a lease of its own."""

    url: str
    dead: trio.Event | None = None
    ready: trio.Event = attrs.field(factory=trio.Event)
    """The lease is given."""
    refusal: TrioswapError | None = None
    """What the lease ends with instead."""
    leases: int = 0
    failed: list[UpstreamFailed] = attrs.field(factory=list)
    """What the leases heard of the failures of the server."""
    scopes: list[trio.CancelScope] = attrs.field(factory=list)
    """Of each lease: cancelled, it is cut."""
    clients: list[Socket] = attrs.field(factory=list)
    ends: list[object] = attrs.field(factory=list)
    """How each call ended: None, or what was raised."""

    async def __call__(self, scope, receive, send):
        client = Socket(scope, "req_1", receive, send)
        self.clients.append(client)

        @asynccontextmanager
        async def upstream():
            async with (
                self.lease(),
                open_websocket("m", self.url, client.target, client.headers, client.subprotocols) as websocket,
            ):
                yield websocket

        end = None
        try:
            await relay(client, upstream, self.dead)
        except ClientLeft as exc:
            end = exc
        except TrioswapError as exc:
            end = exc
            await client.fail(exc)
        self.ends.append(end)

    @asynccontextmanager
    async def lease(self):
        with trio.CancelScope() as scope:
            self.scopes.append(scope)
            self.leases += 1
            try:
                await self.ready.wait()
                if self.refusal is not None:
                    raise self.refusal
                yield
            except UpstreamFailed as exc:
                self.failed.append(exc)
                raise
            finally:
                self.leases -= 1
        if scope.cancelled_caught:
            raise LeaseCut("m", "its turn is over")


@attrs.define(eq=False)
class World:
    """All of it, running."""

    gate: Gate
    server: object
    port: int
    streams: list[trio.SocketStream] = attrs.field(factory=list)

    async def connect(self, path="/", **options):
        stream = await self.stream(options.pop("small_buffer", False))
        return await connect(stream, path, **options)

    async def stream(self, small_buffer=False):
        """A connection; the world closes it in the end."""
        sock = trio.socket.socket()
        if small_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.streams.append(trio.SocketStream(sock))
        await sock.connect(("127.0.0.1", self.port))
        return self.streams[-1]


@asynccontextmanager
async def world(script=echo, *, ready=True, dead=None, accept=True, subprotocols=None, **options):
    """Everything between a client and a model server that does what *script* says; nothing may be left behind."""
    with trio.fail_after(PATIENCE):
        async with model_server(script, accept=accept, subprotocols=subprotocols) as server:
            gate = Gate(server.url, dead)
            if ready:
                gate.ready.set()
            async with serving(gate, **options) as served:
                here = World(gate, server, served.port)
                try:
                    yield here
                finally:
                    for stream in here.streams:
                        stream.socket.close()
            assert gate.leases == 0


# ---- messages ----------------------------------------------------------------------------


@pytest.mark.parametrize("deflate", [False, True])
async def test_messages_there_and_back(deflate):
    """Text and binary messages of any size pass unchanged, also when the client would compress them."""
    async with world() as here:
        client = await here.connect(deflate=deflate)
        for message in ("hello", b"hello", "", b"", "grüß 🦙", bytes(2**20), "ä" * 2**19):
            await client.send(message)
            answer = await client.receive()
            assert (type(answer), answer) == (type(message), message)


async def test_the_handshake_passes():
    """Path, query, headers and subprotocols reach the server; its choice and its headers reach the client."""
    async with world(subprotocols=["b"]) as here:
        client = await here.connect("/a%2Fb?c=d", subprotocols=["a", "b"], headers=[("X-Mine", "1")])
        assert client.response.status_code == 101
        assert client.protocol.subprotocol == "b"
        assert client.response.headers["Set-Cookie"] == "seen=yes"
        assert client.response.headers["X-Request-Id"] == "req_1"
        assert len(client.response.headers.get_all("Date")) == 1
        request = here.server.peers[0].request
        assert (request.path, request.headers["X-Mine"]) == ("/a%2Fb?c=d", "1")
        assert request.headers["Host"] == f"127.0.0.1:{here.port}"
        assert here.gate.clients[0].status == 101


async def test_a_fragmented_message_and_pings():
    """A message in fragments, with a ping between them that is answered meanwhile, passes whole."""
    async with world() as here:
        client = await here.connect()
        client.protocol.send_text(b"one ", fin=False)
        await client.ping(b"still there?")
        assert await client.pong() == b"still there?"
        client.protocol.send_continuation(b"two", fin=True)
        await client.flush()
        assert await client.receive() == "one two"


async def test_a_ping_of_the_server():
    """Is answered although the client says nothing."""
    pongs = []

    async def script(peer):
        await peer.ping(b"?")
        pongs.append(await peer.pong())
        await peer.close(1000)

    async with world(script) as here:
        client = await here.connect()
        assert await client.closed() == (1000, "")
    assert pongs == [b"?"]


# ---- the server ends ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "heard"),
    [((1000,), (1000, "")), ((4321, "ä" * 61), (4321, "ä" * 61)), ((1012, "soon"), (1012, "soon")), ((), (1000, ""))],
)
async def test_the_servers_close_reaches_the_client(said, heard):
    """With code and reason, behind all messages, and in spite of what the client sends at the same time."""

    async def script(peer):
        for number in range(1000):
            await peer.send(str(number))
        await peer.close(*said)
        await peer.closed()

    async with world(script) as here:
        client = await here.connect()
        for _ in range(50):
            await client.send(bytes(1000))
        for number in range(1000):
            assert await client.receive() == str(number)
        assert await client.closed() == heard
        assert await read_to_end(client.stream) == b""
        await until(lambda: here.gate.ends == [None])


@pytest.mark.parametrize("how", ["aclose", "reset"])
async def test_a_server_that_breaks_off(how):
    """The client hears 1011 and why; who holds the lease hears it too, for it was not served."""

    async def script(peer):
        await peer.send("half of the story")
        assert await peer.receive() == "go"
        if how == "reset":
            peer.reset()
        else:
            await peer.stream.aclose()

    async with world(script) as here:
        client = await here.connect()
        assert await client.receive() == "half of the story"
        await client.send("go")
        code, reason = await client.closed()
        assert code == 1011
        assert reason.startswith('model "m" failed')
        assert len(here.gate.failed) == 1


async def test_a_refusal_reaches_the_client():
    """The server's own status, headers and body."""

    async def script(peer):
        await peer.stream.send_all(
            b"HTTP/1.1 403 Forbidden\r\nX-Why: because\r\nContent-Type: text/plain\r\nContent-Length: 4\r\n\r\nnono"
        )

    async with world(script, accept=False) as here:
        client = await here.connect()
        response = client.response
        assert (response.status_code, bytes(response.body)) == (403, b"nono")
        assert (response.headers["X-Why"], response.headers["Content-Type"]) == ("because", "text/plain")
        assert await read_to_end(client.stream) == b""
        await until(lambda: here.gate.ends == [None])


async def test_an_error_before_the_answer_is_a_response():
    """What happens before the server has accepted is the caller's to say, with status and body."""
    async with world() as here:
        here.gate.refusal = ModelUnloaded("m")
        client = await here.connect()
        assert client.response.status_code == 503
        assert client.response.headers["Retry-After"] == "1"
        assert client.response.headers["Content-Type"] == "application/json"
        assert json.loads(bytes(client.response.body))["error"]["code"] == "service_unavailable"
        assert here.gate.clients[0].status == 503
        assert here.gate.ends == [here.gate.refusal]
        assert await read_to_end(client.stream) == b""


# ---- the client ends ----------------------------------------------------------------------


async def test_a_client_that_closes():
    """All it said before reaches the server, then a close frame; the lease is given back."""
    ended = []

    async def script(peer):
        ended.append([await peer.receive() for _ in range(100)])
        ended.append(await peer.closed())

    async with world(script) as here:
        client = await here.connect()
        for number in range(100):
            await client.send(str(number))
        await client.close(4001, "enough")
        assert await client.closed() == (4001, "enough")
        await until(lambda: here.gate.ends == [None])
    assert ended[0] == [str(number) for number in range(100)]
    assert ended[1] == (4001, "enough")


@pytest.mark.parametrize("how", ["aclose", "reset"])
async def test_a_client_that_breaks_off(how):
    """The server hears that it has gone away, and the lease is given back."""
    ended = []

    async def script(peer):
        assert await peer.receive() == "half of a question"
        await peer.send("yes?")
        ended.append(await peer.closed())

    async with world(script) as here:
        client = await here.connect()
        await client.send("half of a question")
        assert await client.receive() == "yes?"
        if how == "reset":
            client.reset()
        else:
            await client.stream.aclose()
        await until(lambda: here.gate.ends == [None])
    assert ended == [(1001, "the client has gone")]


async def test_a_client_that_leaves_while_its_model_loads():
    """It waits no longer, and nothing was opened for it."""
    async with world(ready=False) as here, trio.open_nursery() as nursery:
        stream = await here.stream()
        nursery.start_soon(connect, stream)
        await until(lambda: here.gate.leases == 1)
        nursery.cancel_scope.cancel()
        await stream.aclose()
        await until(lambda: here.gate.ends)
        assert isinstance(here.gate.ends[0], ClientLeft)
        assert not here.server.peers


async def test_a_client_that_leaves_words_nobody_reads(monkeypatch):
    """A server that takes nothing is given up a moment after the client has gone."""
    monkeypatch.setattr(tunnel, "CLOSE_GRACE", 0.05)

    async def script(peer):
        await trio.sleep_forever()

    async with world(script) as here:
        client = await here.connect()
        await client.send(bytes(HUGE // 4))
        await client.send(bytes(HUGE // 4))
        await client.stream.aclose()
        await until(lambda: here.gate.ends == [None])


# ---- slow ones, and those in the way ---------------------------------------------------------


async def flood(peer):
    """A script: send until the connection breaks."""
    with suppress(trio.BrokenResourceError):
        while True:
            await peer.send(bytes(2**16))


async def stall(peer):
    """Return when *peer*, which floods, cannot send any more."""
    before = -1
    while not before == peer.sent > 0:
        before = peer.sent
        await trio.testing.wait_all_tasks_blocked(0.01)


async def test_a_client_that_does_not_read_delays_only_its_own():
    """Its server is held up after a bounded amount; another websocket of the same model goes on."""

    async def script(peer):
        await (flood if peer.request.path == "/flood" else echo)(peer)

    async with world(script, write_stall=LONG, shutdown_write_stall=0.3) as here:
        other = await here.connect("/other")
        client = await here.connect("/flood", small_buffer=True)
        peer = here.server.peers[-1]
        await stall(peer)
        held = peer.sent
        for _ in range(10):
            await other.send("hello")
            assert await other.receive() == "hello"
        assert peer.sent == held
        await client.stream.aclose()
        await until(lambda: here.gate.ends == [None])


async def test_a_lease_is_taken_back_from_a_client_that_does_not_read():
    """At once, though a send to it is under way that cannot be cancelled; it hears 1012 when it reads again."""
    async with world(flood, write_stall=LONG) as here:
        client = await here.connect(small_buffer=True)
        await stall(here.server.peers[0])
        here.gate.scopes[0].cancel()
        await until(lambda: here.gate.leases == 0)
        assert here.gate.ends == []
        assert (await client.closed())[0] == 1012
        await until(lambda: here.gate.ends == [None])


async def test_a_server_that_has_ended_holds_no_lease():
    """Though its last words wait for a client that does not read; it has them when it does."""

    async def script(peer):
        await peer.send(bytes(HUGE))
        await peer.send(bytes(tunnel.BACKLOG))
        await peer.close(4000)
        await peer.closed()

    async with world(script, write_stall=LONG) as here:
        client = await here.connect(small_buffer=True)
        await until(lambda: here.gate.scopes and here.gate.leases == 0)
        assert here.gate.ends == []
        assert await client.receive() == bytes(HUGE)
        assert await client.receive() == bytes(tunnel.BACKLOG)
        assert await client.closed() == (4000, "")


async def test_a_client_that_never_reads_again():
    """The HTTP server's patience ends it, and the lease is given back long before."""
    async with world(flood, write_stall=0.3) as here:
        await here.connect(small_buffer=True)
        await stall(here.server.peers[0])
        await until(lambda: here.gate.ends == [None])


# ---- without a lease ------------------------------------------------------------------------


@pytest.mark.parametrize("breaks", [False, True])
async def test_the_end_of_the_servers_process(breaks):
    """What holds no lease is closed with 1012 when the model is stopped, also if the connection breaks before."""
    dead = trio.Event()

    async def script(peer):
        await peer.receive()
        if breaks:
            await peer.stream.aclose()
        dead.set()
        await trio.sleep_forever()

    async with world(script, dead=dead) as here:
        client = await here.connect()
        await client.send("stop")
        assert await client.closed() == (1012, "the model was stopped")


async def test_a_connection_that_breaks_while_the_process_lives(monkeypatch):
    """Is an error like any other."""
    monkeypatch.setattr(tunnel, "DEATH_NOTICE", 0.05)

    async def script(peer):
        await peer.stream.aclose()

    async with world(script, dead=trio.Event()) as here:
        client = await here.connect()
        assert (await client.closed())[0] == 1011


# ---- the codes, exactly ---------------------------------------------------------------------


class Asgi:
    """The messages of a server that tells how a client closed, and those sent to it."""

    def __init__(self, *received):
        self.received, self.sent = [{"type": "websocket.connect"}, *received], []

    async def receive(self):
        await trio.lowlevel.checkpoint()
        if not self.received:
            await trio.sleep_forever()
        return self.received.pop(0)

    async def send(self, message):
        self.sent.append(message)

    def socket(self, **scope):
        fixed = {
            "path": "/",
            "raw_path": b"/",
            "query_string": b"a=b",
            "headers": [],
            "subprotocols": [],
            "client": None,
        }
        return Socket({**fixed, **scope}, "req_1", self.receive, self.send)


@pytest.mark.parametrize(
    ("disconnect", "heard"),
    [
        ({"code": 1000, "reason": "done"}, (1000, "done")),
        ({"code": 4321}, (4321, "")),
        ({"code": 1005}, (1005, "")),
        ({}, (1005, "")),
        ({"code": 1006}, (1001, "the client has gone")),
    ],
)
async def test_the_clients_close_reaches_the_server(disconnect, heard):
    """With its code and reason, behind its last message; what never travels is said in another way."""
    ended = []

    async def script(peer):
        ended.append(await peer.receive())
        ended.append(await peer.closed())

    with trio.fail_after(PATIENCE):
        async with model_server(script) as server:
            asgi = Asgi({"type": "websocket.receive", "bytes": b"bye"}, {"type": "websocket.disconnect", **disconnect})
            await opened_first(asgi, server)
            await until(lambda: len(ended) == 2)
    assert ended == [b"bye", heard]
    assert [message["type"] for message in asgi.sent] == ["websocket.accept"]


async def opened_first(asgi, server):
    """Relay; the client says nothing before the server has accepted."""
    accepted = trio.Event()
    receive, send = asgi.receive, asgi.send

    async def receive_later():
        if len(asgi.received) < 3:
            await accepted.wait()
        return await receive()

    async def send_and_tell(message):
        await send(message)
        accepted.set()

    asgi.receive, asgi.send = receive_later, send_and_tell
    client = asgi.socket()
    await relay(client, lambda: open_websocket("m", server.url, client.target, client.headers))


async def test_a_refusal_where_the_server_knows_none():
    """Without the extension for it, the websocket is closed, which is a 403."""
    asgi = Asgi()
    await asgi.socket().refuse(404, [], b"")
    assert [message["type"] for message in asgi.sent] == ["websocket.close"]


@pytest.mark.parametrize(("code", "said"), [(1005, 1000), (1006, 1011), (1015, 1011), (4000, 4000)])
async def test_codes_that_never_travel(code, said):
    """Are replaced, reasons are cut to what a frame holds, and nothing is closed twice."""
    asgi = Asgi({"type": "websocket.disconnect", "code": 1000})
    client = asgi.socket()
    await client.accept(None)
    await client.close(code, "ä" * 100)
    assert not asgi.received  # the client was given the time to agree
    await client.close(1000)
    assert asgi.sent[1:] == [{"type": "websocket.close", "code": said, "reason": "ä" * 61}]
    assert client.end == Closed(said, "ä" * 61)


def test_errors_as_codes():
    """The end of the daemon, the end of the model, and failures can be told apart."""
    assert close_code(ShuttingDown()) == 1001
    assert close_code(LeaseCut("m", "drain")) == 1012
    assert close_code(UpstreamFailed("m", "broke")) == 1011
