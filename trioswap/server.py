"""Hypercorn, contained: accepts connections and lets Hypercorn's protocols speak HTTP on them.

The only importer of hypercorn.  It keeps Hypercorn's parsers (`hypercorn.protocol`) and
replaces what Hypercorn 0.18 does around them on Trio, because of what one client can do there:

* An exception in one connection's protocol code ends the process.  Here it ends the connection.
* A client that stops reading blocks a write for ever.  Here such a write gives up (`Patience`).
* A parser that waits (for the application to take a body, or to answer before the next request is
  parsed) does not see that the client left.  Here reading goes on ahead of the parser, and
  http.disconnect overtakes what the application has not read, and never waits (`Inbox`).
* On HTTP/2, a response that the application cuts short never ends; a client that opens no window is
  sent nothing, but everything is kept for it; a shutdown may forestall the end of a response.  Here
  such streams are reset, the application waits, the end comes first (`Http2`).

Left to others: sockets, signals and the deadline of a shutdown (daemon), requests (app).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, Final

import attrs
import h2.errors
import h2.events
import h2.exceptions
import h11
import trio
from hypercorn.app_wrappers import ASGIWrapper  # noqa: TID251 - this module is the one that may
from hypercorn.config import Config  # noqa: TID251
from hypercorn.events import Closed, Event, RawData, Updated  # noqa: TID251
from hypercorn.protocol import ProtocolWrapper  # noqa: TID251
from hypercorn.protocol.events import Body, Data, EndBody, EndData, StreamClosed  # noqa: TID251
from hypercorn.protocol.events import Event as StreamEvent  # noqa: TID251
from hypercorn.protocol.h2 import BUFFER_HIGH_WATER, H2Protocol  # noqa: TID251
from hypercorn.protocol.h11 import H2CProtocolRequiredError, H2ProtocolAssumedError, H11Protocol  # noqa: TID251
from hypercorn.protocol.http_stream import HTTPStream  # noqa: TID251
from hypercorn.trio.task_group import TaskGroup  # noqa: TID251
from hypercorn.trio.tcp_server import TCPServer  # noqa: TID251
from hypercorn.trio.worker_context import EventWrapper, WorkerContext  # noqa: TID251
from hypercorn.typing import AppWrapper, ASGIReceiveEvent, ASGISendEvent, ConnectionState, Scope  # noqa: TID251
from hypercorn.utils import parse_socket_addr  # noqa: TID251

from trioswap.bounded import BoundedStream, Inbox, Patience, ReadAhead

logger = logging.getLogger(__name__)

# Bytes read while the parser is busy, and the most taken from the kernel at once (Hypercorn's MAX_RECV).
READ_AHEAD: Final = 2**16
# Of a request head in bytes.  h11's 16 KiB is less than some proxies' cookies and long query strings.
MAX_REQUEST_HEAD: Final = 2**16

# ASGI messages are Any by nature.
Application = Callable[[Any, Any, Any], Awaitable[None]]
Send = Callable[[ASGISendEvent | None], Awaitable[None]]


_HTTP_LEFT: Final[ASGIReceiveEvent] = {"type": "http.disconnect"}
_WS_LEFT: Final[ASGIReceiveEvent] = {"type": "websocket.disconnect", "code": 1006}


class Applications(TaskGroup):
    """The application calls of one connection, each with its own `Inbox`."""

    def __init__(self) -> None:
        super().__init__()
        self._inboxes: dict[Inbox, ASGIReceiveEvent] = {}

    async def spawn_app(
        self, app: AppWrapper, config: Config, scope: Scope, send: Send
    ) -> Callable[[ASGIReceiveEvent], Awaitable[None]]:
        """Call *app* on *scope* in a task of its own; return what gives it messages."""
        assert self._nursery is not None
        inbox = Inbox(config.max_app_queue_size)
        self._nursery.start_soon(self._call, app, scope, inbox, send)
        self._inboxes[inbox] = _WS_LEFT if scope["type"] == "websocket" else _HTTP_LEFT
        return inbox.put

    async def disconnect(self) -> None:
        """Tell all calls that the client has left: Hypercorn does not tell a websocket that it has refused."""
        for inbox, message in list(self._inboxes.items()):
            await inbox.put(message)

    async def _call(self, app: AppWrapper, scope: Scope, inbox: Inbox, send: Send) -> None:
        async def send_and_yield(message: ASGISendEvent | None) -> None:
            # Hypercorn's send does nothing, not even a checkpoint, for some clients that have gone, and our
            # writes are shielded: an application that only sends would stop the process, or not be cancelled.
            await trio.lowlevel.checkpoint()
            await send(message)

        try:
            await app(scope, inbox.get, send_and_yield, trio.to_thread.run_sync, trio.from_thread.run)
        except* Exception:
            logger.exception("the application failed on %s", scope.get("path"))
        del self._inboxes[inbox]
        await send(None)  # Hypercorn's "the application has returned": answers 500, or ends what was cut short


class Context(WorkerContext):
    """What the protocols of all connections share; `terminated` means that shutdown has begun."""

    def __init__(self, patience: Patience) -> None:
        super().__init__(None)
        self.patience = patience

    def terminate_nowait(self) -> None:
        """Begin the shutdown."""
        assert isinstance(self.terminated, EventWrapper)
        self.terminated._event.set()  # Hypercorn's own `set` is async without need


def _make_config() -> Config:
    config = Config()
    config.accesslog, config.errorlog = None, logger
    config.include_server_header = False
    config.h11_max_incomplete_size = MAX_REQUEST_HEAD
    return config


class Http2(H2Protocol):
    """Hypercorn's HTTP/2, where no stream waits for ever, on either side."""

    context: Context

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._stalls: set[trio.CancelScope] = set()
        self._progress = trio.lowlevel.ParkingLot()

    async def handle(self, event: Event) -> None:
        """As Hypercorn's; it also lets go of who waits for a closed connection to take data."""
        await super().handle(event)
        if isinstance(event, Closed):
            for buffer in list(self.stream_buffers.values()):
                await buffer.close()
            self._progress.unpark_all()

    async def stream_send(self, event: StreamEvent) -> None:
        """As Hypercorn's; waits for the client to take it, and resets what was cut short or is not taken."""
        with self.context.patience.wait() as stall:
            self._stalls.add(stall)
            try:
                if isinstance(event, StreamClosed):
                    await self._reset_if_cut_short(event.stream_id)
                await super().stream_send(event)
                while self._is_behind(event):
                    await self._progress.park()
            finally:
                self._stalls.discard(stall)
        if stall.cancelled_caught:
            await self._reset(event.stream_id, h2.errors.ErrorCodes.CANCEL)
            await self._close_stream(event.stream_id)

    def _is_behind(self, event: StreamEvent) -> bool:
        # Hypercorn wakes the writer whenever it looks at a stream, also if the window is shut, and
        # says "drained" before END_STREAM is written, which GOAWAY would then forestall in a shutdown.
        buffer = self.stream_buffers.get(event.stream_id)
        if buffer is None or self.closed:
            return False
        full = isinstance(event, Body | Data) and len(buffer.buffer) >= BUFFER_HIGH_WATER
        return full or isinstance(event, EndBody | EndData)

    async def _send_data(self, stream_id: int) -> None:
        buffer = self.stream_buffers.get(stream_id)
        before = len(buffer.buffer) if buffer is not None else 0
        await super()._send_data(stream_id)
        if buffer is not None and len(buffer.buffer) < before:
            # Of the whole connection: streams take turns, so one may well wait for a slow client's others.
            for stall in self._stalls:
                self.context.patience.renew(stall)
        self._progress.unpark_all()

    async def _handle_events(self, events: list[h2.events.Event]) -> None:
        # One by one, since handling one may end the stream of the next.  Hypercorn fails upon data
        # for a stream whose application has answered early; it is no fault of the client (RFC 9113, 8.1).
        for event in events:
            if isinstance(event, h2.events.DataReceived) and event.stream_id not in self.streams:
                self.connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            else:
                await super()._handle_events([event])
        await self._flush()

    async def _reset_if_cut_short(self, stream_id: int) -> None:
        buffer = self.stream_buffers.get(stream_id)
        if buffer is None or buffer._complete or not isinstance(self.streams.get(stream_id), HTTPStream):
            return
        if buffer.buffer:
            await buffer.drain()
        await self._reset(stream_id, h2.errors.ErrorCodes.INTERNAL_ERROR)

    async def _reset(self, stream_id: int, code: h2.errors.ErrorCodes) -> None:
        with suppress(h2.exceptions.ProtocolError):  # the client was faster
            self.connection.reset_stream(stream_id, code)
        await self._window_updated(stream_id)  # so that the sending task looks at the stream, and forgets it
        await self._flush()


class Protocol(ProtocolWrapper):
    """Hypercorn's switch from HTTP/1.1 to HTTP/2, to ours."""

    async def handle(self, event: Event) -> None:
        """Feed *event* to the protocol spoken."""
        try:
            await self.protocol.handle(event)
        except H2ProtocolAssumedError as switch:
            await self._speak_http2(switch.data)
        except H2CProtocolRequiredError as switch:
            await self._speak_http2(switch.data, switch.headers, switch.settings)
        if isinstance(self.protocol, H11Protocol) and self.protocol.stream is not None and self.protocol.stream.closed:
            await self.send(Closed())  # a websocket was refused, and Hypercorn leaves it at that

    @property
    def client_state(self) -> Any:
        """Where the client is in its request, in h11's words; None when it speaks no HTTP/1.1."""
        return self.protocol.connection.their_state if isinstance(self.protocol, H11Protocol) else None

    async def _speak_http2(self, data: bytes, *upgrade: Any) -> None:
        shared = (self.app, self.config, self.context, self.task_group, self.state)
        self.protocol = Http2(*shared, self.ssl, self.client, self.server, self.send)
        await self.protocol.initiate(*upgrade)
        await self.send(Updated(idle=self.protocol.idle))  # the preface passed for a request until here
        if data:
            await self.protocol.handle(RawData(data))


class Connection(TCPServer):
    """Hypercorn's TCPServer for one client, from the first byte until its last application call has ended."""

    # Two tasks read.  One takes bytes from the socket, the other feeds them to the parser, which
    # may wait as long as the application does.  What the parser waits for is never known from
    # outside, so when the client leaves, its task is simply cancelled, and the protocol is told.
    # Both live in the scope `_reading`, whose deadline is the idle timeout: moved to infinity while
    # a request is served, and to now when the shutdown finds the connection idle.

    protocol: Protocol
    stream: BoundedStream  # type: ignore[assignment]
    state: ConnectionState

    def __init__(
        self, app: AppWrapper, config: Config, context: Context, stream: BoundedStream, keep_alive: float
    ) -> None:
        """Raises OSError if the client is gone already."""
        super().__init__(app, config, context, ConnectionState({}), stream)  # type: ignore[arg-type] # takes any
        self.client = parse_socket_addr(stream.socket.family, stream.socket.getpeername())
        self.idle = True
        self._server = parse_socket_addr(stream.socket.family, stream.socket.getsockname())
        self._keep_alive = keep_alive
        self._applications = Applications()
        self._reading = trio.CancelScope()
        self._ahead = ReadAhead(READ_AHEAD)

    async def run(self) -> None:
        """Serve the client; the caller closes the socket then.

        Raises whatever Hypercorn's protocols raise.
        """
        async with self._applications:
            shared = (self.app, self.config, self.context, self._applications, self.state)
            self.protocol = Protocol(*shared, False, self.client, self._server, self.protocol_send, "http/1.1")
            self.set_idle(True)
            with self._reading:
                await self._read_data()
            await self.protocol.handle(Closed())
            await self._applications.disconnect()
        if self.protocol.client_state is h11.SEND_BODY:
            # Closed while the client still sends, the connection would be reset, and the answer that tells
            # it to stop could be lost with that (RFC 9112, 9.6).
            await self.stream.discard_input()

    def set_idle(self, idle: bool) -> None:
        """Let the idle timeout run, or stop it; it is over at once in a shutdown, or when requests were dropped."""
        self.idle = idle
        keep_alive = 0 if self.context.terminated.is_set() or self._ahead.dropped else self._keep_alive
        self._reading.deadline = trio.current_time() + keep_alive if idle else math.inf

    async def _read_data(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._parse)
            await self._ahead.fill(self.stream, lambda: self.protocol.client_state is h11.DONE)
            nursery.cancel_scope.cancel(reason="the client sends no more")

    async def _parse(self) -> None:
        while True:
            await self.protocol.handle(RawData(await self._ahead.take()))

    async def protocol_send(self, event: Event) -> None:
        """Do what the protocol wants."""
        match event:
            case RawData():
                await self._write(event.data)
            case Updated():
                self.set_idle(event.idle)
            case Closed():
                # Shielded, because the application hears of the end before we do, and may cancel its sending
                # task, which is the one that is here; bounded, because every write that holds the lock is.
                with trio.CancelScope(shield=True):
                    async with self.send_lock:  # behind everything that waits to be written
                        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                            await self.stream.send_eof()
                await self._end("the protocol is done")

    async def _write(self, data: bytes) -> None:
        if not data:
            return
        # Shielded, or half a frame could be followed by another; bounded by the stream's patience.
        # The lock too: an HTTP/2 header block that is dropped here would spoil all that follow.
        with trio.CancelScope(shield=True):
            async with self.send_lock:
                with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    await self.stream.send_all(data)
                    return
        await self._end("the client takes no more")

    async def _end(self, reason: str) -> None:
        self._reading.cancel(reason=reason)
        await self.protocol.handle(Closed())


@attrs.define(eq=False, repr=False)
class HttpServer:
    """Serves one ASGI application on any number of listeners, once."""

    app: Application
    write_stall: float = 30.0
    """Seconds without progress after which a write gives up and the connection is closed."""
    shutdown_write_stall: float = 2.0
    """The same once shutdown has begun, for writes that stall already too."""
    keep_alive: float = 75.0
    """Seconds without a request after which a connection is closed.

    Longer than the idle timeouts of pooled clients, or they send a request into a closed
    connection; Hypercorn's default is 5. nginx has the same 75.
    """
    _connections: set[Connection] = attrs.field(factory=set, init=False)
    _accepting: trio.CancelScope = attrs.field(factory=trio.CancelScope, init=False)
    _config: Config = attrs.field(factory=_make_config, init=False)
    _context: Context = attrs.field(init=False)

    @_context.default
    def _make_context(self) -> Context:
        return Context(Patience(self.write_stall))

    def __repr__(self) -> str:
        stage = "shutting down" if self._context.terminated.is_set() else "serving"
        return f"<HttpServer {stage}, {self.open_connections} open connections>"

    @property
    def open_connections(self) -> int:
        """Connections that have not ended, idle ones included."""
        return len(self._connections)

    async def run(
        self,
        listeners: Sequence[trio.SocketListener],
        *,
        task_status: trio.TaskStatus[list[trio.SocketListener]] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Accept and serve until `begin_shutdown` was called and the last connection has ended.

        Put a deadline around it: requests being served may take any time.  Cancelled, it
        ends within `shutdown_write_stall`, if the application lets itself be cancelled.
        Closes the listeners.
        """
        async with trio.open_nursery() as guard:
            guard.start_soon(self._context.patience.end_when_cancelled, self.shutdown_write_stall)
            async with trio.open_nursery() as connections:
                with self._accepting:
                    await trio.serve_listeners(
                        self._serve, list(listeners), handler_nursery=connections, task_status=task_status
                    )
            guard.cancel_scope.cancel(reason="all connections have ended")

    def begin_shutdown(self) -> None:
        """Stop accepting, close idle connections; the others end with the request they serve."""
        self._context.terminate_nowait()
        self._accepting.cancel(reason="shutdown")
        self._context.patience.shorten(self.shutdown_write_stall)
        for connection in self._connections:
            if connection.idle:
                connection.set_idle(True)

    async def _serve(self, stream: trio.SocketStream) -> None:
        bounded = BoundedStream(stream, self._context.patience)
        try:
            connection = Connection(ASGIWrapper(self.app), self._config, self._context, bounded, self.keep_alive)
        except OSError:
            return
        self._connections.add(connection)
        try:
            await connection.run()
        except* Exception:
            logger.warning(
                "the connection from %s ended with an error in its protocol", connection.client, exc_info=True
            )
        finally:
            self._connections.discard(connection)
            stream.socket.close()
