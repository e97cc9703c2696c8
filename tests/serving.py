"""A running server with a small application behind it, and clients that can do each step alone.

Every use of `serving` ends in a shutdown and waits for `run()`: a connection task that is
left behind fails the test.
"""

from __future__ import annotations

import socket
from collections import deque
from contextlib import asynccontextmanager
from functools import partial

import attrs
import h2.config
import h2.connection
import h11
import trio
from hyperframe.frame import SettingsFrame

from trioswap.server import HttpServer

GUARD = 60  # seconds; only a test that hangs meets it
LONG = 1000.0  # seconds; a time that no test lives through
PIECE = bytes(2**16)
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SettingsFrame(0).serialize()


# ---- the application ------------------------------------------------------------------


@attrs.define(eq=False)
class App:
    """A small ASGI application; each path is a way to behave."""

    entered: trio.Event = attrs.field(factory=trio.Event)
    """A call has begun."""
    left: trio.Event = attrs.field(factory=trio.Event)
    """http.disconnect was received while the request was served."""
    release: trio.Event = attrs.field(factory=trio.Event)
    """The test lets `/wait` answer."""
    numbers: trio.MemoryReceiveChannel | None = None
    """What `/stream` sends, one chunk for each."""
    sent: int = 0
    """Pieces that `/flood` has sent."""
    ended: int = 0
    """Calls that have ended, however."""

    async def __call__(self, scope, receive, send):
        self.entered.set()
        behaviour = getattr(self, scope["path"].strip("/").replace("-", "_"))
        try:
            await behaviour(receive, send)
        finally:
            self.ended += 1

    async def hello(self, receive, send):
        await start(send, (b"content-length", b"5"))
        await body(send, b"hello", more=False)

    async def wait(self, receive, send):
        await self.release.wait()
        await self.hello(receive, send)

    async def stream(self, receive, send):
        await start(send)
        await body(send, b"")  # the head waits for this
        async for number in self.numbers:
            await body(send, b"%d\n" % number)
        await body(send, b"", more=False)

    async def listen(self, receive, send):
        while (await receive())["type"] != "http.disconnect":
            pass
        self.left.set()

    async def watched(self, receive, send):
        """Answer, and stop at once when the client has left or needs no more."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.hello, receive, send)
            await self.listen(receive, send)
            nursery.cancel_scope.cancel()

    async def flood(self, receive, send):
        """Send for ever; leave when the client does."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._blind_flood, send)
            await self.listen(receive, send)
            nursery.cancel_scope.cancel()

    async def _blind_flood(self, send):
        await start(send)
        while True:
            await body(send, PIECE)
            self.sent += 1

    async def hurried(self, receive, send):
        """Cancel the sending of something large, and end the answer with something small."""
        await start(send)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(body, send, PIECE * 256)
            await self.release.wait()
            nursery.cancel_scope.cancel()
        await body(send, b"end", more=False)

    async def deaf(self, receive, send):
        """Send much, without a look at what the client does."""
        await start(send)
        for _ in range(400):
            await body(send, PIECE)

    async def early(self, receive, send):
        await start(send, (b"content-length", b"5"), status=413)
        await body(send, b"large", more=False)

    async def head_only(self, receive, send):
        """Begin to answer, and have nothing to say."""
        await start(send)

    async def cut(self, receive, send):
        await start(send)
        await body(send, b"half of the an")

    async def cut_sized(self, receive, send):
        await start(send, (b"content-length", b"100"))
        await body(send, b"half of the an")

    async def broken(self, receive, send):
        raise ValueError("seeded")

    async def ws(self, receive, send):
        await receive()
        await send({"type": "websocket.accept"})
        while (await receive())["type"] != "websocket.disconnect":
            pass


async def start(send, *headers, status=200):
    await send({"type": "http.response.start", "status": status, "headers": list(headers)})


async def body(send, data, *, more=True):
    await send({"type": "http.response.body", "body": data, "more_body": more})


@attrs.define(eq=False)
class Served:
    """A running server."""

    server: HttpServer
    port: int
    running: trio.CancelScope
    """Around `run()` alone."""
    streams: list[trio.SocketStream] = attrs.field(factory=list)
    """The clients' ends."""

    async def connect(self, *, small_buffer=False):
        """A connected stream; with *small_buffer* it soon takes no more if it is not read."""
        sock = trio.socket.socket()
        if small_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.streams.append(trio.SocketStream(sock))
        await sock.connect(("127.0.0.1", self.port))
        return self.streams[-1]

    async def client(self, **options):
        return Client(await self.connect(**options))

    async def client2(self):
        client = Client2(await self.connect())
        await client.flush()
        return client


@asynccontextmanager
async def serving(app, **options):
    """A server for the length of the block; then shut down, and nothing of it may be left."""
    with trio.fail_after(GUARD):
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        served = Served(HttpServer(app, **options), listeners[0].socket.getsockname()[1], trio.CancelScope())
        async with trio.open_nursery() as clients:
            clients.start_soon(close_in_the_end, served.streams)
            async with trio.open_nursery() as nursery:
                await nursery.start(partial(run, served, listeners))
                yield served
                served.server.begin_shutdown()
            clients.cancel_scope.cancel()
        assert served.server.open_connections == 0


async def run(served, listeners, *, task_status):
    with served.running:
        await served.server.run(listeners, task_status=task_status)


async def close_in_the_end(streams):
    """Close what the clients left open, also to end what a defect of the server shields from `GUARD`."""
    try:
        await trio.sleep_forever()
    finally:
        for stream in streams:
            stream.socket.close()


async def until(condition):
    """Return when *condition* holds."""
    while not condition():
        await trio.lowlevel.checkpoint()


# ---- clients ----------------------------------------------------------------------------


async def receive_or_nothing(stream):
    """What came, or nothing if the connection is at its end, however it ended."""
    try:
        return await stream.receive_some(2**16)
    except trio.BrokenResourceError:
        return b""


async def read_to_end(stream):
    received = b""
    while data := await receive_or_nothing(stream):
        received += data
    return received


@attrs.define(eq=False)
class Client:
    """An HTTP/1.1 client that can do each step alone."""

    stream: trio.SocketStream
    parser: h11.Connection = attrs.field(factory=partial(h11.Connection, h11.CLIENT))

    async def send(self, event):
        await self.stream.send_all(self.parser.send(event))

    async def ask(self, path, *headers, method="GET", whole=True):
        await self.send(h11.Request(method=method, target=path, headers=[("host", "x"), *headers]))
        if whole:
            await self.send(h11.EndOfMessage())

    async def next_event(self):
        while (event := self.parser.next_event()) is h11.NEED_DATA:
            self.parser.receive_data(await receive_or_nothing(self.stream))
        return event

    async def response(self):
        """Status and body of the next response."""
        response = await self.next_event()
        received = b""
        while isinstance(event := await self.next_event(), h11.Data):
            received += event.data
        assert isinstance(event, h11.EndOfMessage)
        return response.status_code, received


@attrs.define(eq=False)
class Client2:
    """The same for HTTP/2."""

    stream: trio.SocketStream
    parser: h2.connection.H2Connection = attrs.field()
    _events: deque = attrs.field(factory=deque)

    @parser.default
    def _begin(self):
        parser = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
        parser.initiate_connection()
        return parser

    async def flush(self):
        await self.stream.send_all(self.parser.data_to_send())

    async def ask(self, path, *, method="GET", whole=True):
        stream_id = self.parser.get_next_available_stream_id()
        fields = [(":method", method), (":scheme", "http"), (":path", path), (":authority", "x")]
        self.parser.send_headers(stream_id, fields, end_stream=whole)
        await self.flush()
        return stream_id

    async def expect(self, kind, stream_id=None):
        """The next event of *kind*, on stream *stream_id* if given; what comes before is passed over."""
        while True:
            while not self._events:
                data = await receive_or_nothing(self.stream)
                assert data, f"the connection ended before {kind.__name__}"
                self._events.extend(self.parser.receive_data(data))
                await self.flush()
            event = self._events.popleft()
            if isinstance(event, kind) and (stream_id is None or event.stream_id == stream_id):
                return event
