"""The client's side of one websocket to a model server.

Frames are wsproto's; here are the socket, the bounds, and the foreign errors become ours.
How it comes to be is `handshake`'s business.  Who may talk, what is passed on, and who holds
a lease is decided by others.

One task of the websocket's own does all the sending.  So a frame goes out whole even when
whoever sent it is cancelled, and the answer to a ping waits for nobody: a server that
pings while it takes nothing would otherwise hold up our reading, and with that itself.
"""

from __future__ import annotations

import io
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Final

import attrs
import trio
from wsproto import events
from wsproto.connection import Connection, ConnectionState
from wsproto.frame_protocol import CloseReason
from wsproto.utilities import LocalProtocolError

from trioswap.config.parts import TimeoutConfig
from trioswap.connection import READ_SIZE, reason
from trioswap.errors import UpstreamFailed
from trioswap.handshake import Handshake
from trioswap.upstream import Header, end_to_end

# Seconds for the last words of a websocket: our close frame, and the server's answer to it.
CLOSE_GRACE: Final = 2.0
# Of one message, in bytes or characters: ASGI knows whole messages only, so they are put together here.
# Image generators send pictures of some 30 MB in one piece.
MAX_MESSAGE: Final = 64 * 1024 * 1024
Message = str | bytes


@attrs.frozen
class Closed:
    """How the other side ended the websocket."""

    code: int
    """RFC 6455, 7.4; 1005: it gave none, 1006: the connection ended without a close frame."""
    reason: str = ""


@attrs.define(eq=False)
class _Incoming:
    """A message that comes in parts.  Buffers, because a list of a million one-byte parts is large."""

    size: int = 0
    """Bytes or characters of the message under way, or of the one just completed."""
    _parts: io.StringIO | io.BytesIO | None = None

    def add(self, event: events.TextMessage | events.BytesMessage) -> Message | None:
        """The message, if *event* completes it."""
        if self._parts is None:
            self.size, self._parts = 0, io.StringIO() if isinstance(event.data, str) else io.BytesIO()
        self.size += self._parts.write(event.data)  # type: ignore[arg-type] # wsproto keeps a message's parts alike
        if not event.message_finished:
            return None
        parts, self._parts = self._parts, None
        return parts.getvalue()


@attrs.define(eq=False)
class WebSocket:
    """An open websocket.  One task may receive, any may send."""

    model: str
    subprotocol: str | None
    """Of those offered, the one that the server chose."""
    headers: list[Header]
    """What else the server said when it accepted."""
    _stream: trio.abc.Stream
    _frames: Connection
    _max_message: int
    _incoming: _Incoming = attrs.field(factory=_Incoming, init=False)
    _unsent: bytearray = attrs.field(factory=bytearray, init=False)
    _pong: events.Pong | None = attrs.field(default=None, init=False)
    """The answer to the last ping: older ones need none (RFC 6455, 5.5.3), so a flood of pings is no queue."""
    _writing: bool = attrs.field(default=False, init=False)
    _deaf: bool = attrs.field(default=False, init=False)
    """The server takes no more; what it has said may still be received."""
    _end: Closed | None = attrs.field(default=None, init=False)
    _news: trio.lowlevel.ParkingLot = attrs.field(factory=trio.lowlevel.ParkingLot, init=False)
    _flushed: trio.lowlevel.ParkingLot = attrs.field(factory=trio.lowlevel.ParkingLot, init=False)

    async def receive(self) -> Message | Closed:
        """The next message, whole; or how the server closed, after which it is always that.

        Pings are answered meanwhile, and only meanwhile.  Cancelled, it loses nothing.

        Raises:
            UpstreamFailed: the connection ended without a close frame, what came is no websocket
                traffic, or a message passed the limit.
        """
        await trio.lowlevel.checkpoint()
        while self._end is None:
            for event in self._frames.events():
                match event:
                    case events.TextMessage() | events.BytesMessage():
                        whole = await self._collect(event)
                        if whole is not None:
                            return whole
                    case events.Ping():
                        self._pong = event.response()
                        self._news.unpark()
                    case events.CloseConnection():
                        self._end = await self._take_leave(event)
                        return self._end
            await self._read()
        return self._end

    async def send(self, message: Message) -> None:
        """Send one message; returns when the system has taken all of it.

        A connection that has ended takes anything: how it ended, `receive` tells.
        """
        data = events.TextMessage(message) if isinstance(message, str) else events.BytesMessage(message)
        self._queue(data)
        await self._flush()

    async def close(self, code: int | None = 1000, reason: str = "", *, patience: float = CLOSE_GRACE) -> None:
        """Say that this is the end, and wait *patience* seconds at most until the server says so too.

        *code* None sends a close frame without one.  No other task may be receiving.
        """
        if code is None:
            self._queue(events.CloseConnection(CloseReason.NO_STATUS_RCVD))
        else:
            self._queue(events.CloseConnection(code, reason))
        with trio.move_on_after(patience), suppress(UpstreamFailed):
            while not isinstance(await self.receive(), Closed):
                pass

    # ---- sending -------------------------------------------------------------------

    async def write(self) -> None:
        """Send what there is to send, until cancelled: the websocket's own task."""
        while True:
            while not self._unsent and self._pong is None:
                await self._news.park()
            if self._pong is not None:
                pong, self._pong = self._pong, None
                self._queue(pong)
            self._writing = True
            data, self._unsent = self._unsent, bytearray()
            try:
                if not self._deaf:
                    await self._stream.send_all(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                self._deaf = True
            self._writing = False
            if not self._unsent:
                self._flushed.unpark_all()

    def _queue(self, event: events.Event) -> None:
        with suppress(LocalProtocolError):  # one of the sides has closed: nothing may follow
            self._unsent += self._frames.send(event)
            self._news.unpark()

    async def _flush(self) -> None:
        await trio.lowlevel.checkpoint()
        while self._unsent or self._writing:
            await self._flushed.park()

    # ---- receiving -----------------------------------------------------------------

    async def _read(self) -> None:
        try:
            data = await self._stream.receive_some(READ_SIZE)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            raise self._failed(reason(exc)) from exc
        if not data:
            raise self._failed("it ended the websocket without a close frame")
        self._frames.receive_data(bytes(data))

    async def _collect(self, event: events.TextMessage | events.BytesMessage) -> Message | None:
        whole = self._incoming.add(event)
        if self._incoming.size <= self._max_message:
            return whole
        await self._give_up(CloseReason.MESSAGE_TOO_BIG, "")
        raise self._failed(f"it sent a message of more than {self._max_message} bytes")

    async def _take_leave(self, event: events.CloseConnection) -> Closed:
        # wsproto reports what it cannot parse as a close, too, but then the server has not closed.
        if self._frames.state not in (ConnectionState.REMOTE_CLOSING, ConnectionState.CLOSED):
            await self._give_up(event.code, event.reason or "")
            raise self._failed(f"it does not speak websocket as it should: {event.reason}")
        self._queue(event.response())
        with trio.move_on_after(CLOSE_GRACE):
            await self._flush()
        return Closed(int(event.code), event.reason or "")

    async def _give_up(self, code: int, reason: str) -> None:
        # What comes meanwhile is thrown away: with bytes unread the connection would be
        # reset, and the close frame could be lost with that.
        self._queue(events.CloseConnection(code, reason))
        with trio.move_on_after(CLOSE_GRACE), suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while await self._stream.receive_some(READ_SIZE):
                pass

    def _failed(self, text: str) -> UpstreamFailed:
        return UpstreamFailed(self.model, text)


_TIMEOUTS: Final = TimeoutConfig()


@asynccontextmanager
async def open_websocket(
    model: str,
    base_url: str,
    target: bytes,
    headers: Sequence[Header],
    subprotocols: Sequence[str] = (),
    *,
    timeouts: TimeoutConfig = _TIMEOUTS,
    ssl_context: ssl.SSLContext | None = None,
    max_message: int = MAX_MESSAGE,
) -> AsyncIterator[WebSocket]:
    """A websocket to the server at *base_url*, open for the length of the block.

    *base_url* is http or https; its path and query come before those of *target*, which is as
    the client wrote it.  *headers* are the client's; of them travel on what does not belong to
    its own connection or handshake.  *ssl_context* is for https, the system's trust by default.
    Leaving the block closes the connection at once; `close` first is more polite.

    Raises:
        HandshakeRefused: the server answered, but not with a websocket.
        UpstreamTimedOut: a step took longer than *timeouts* say, or than 60 s where they say nothing.
        UpstreamFailed: there was no connection, or it broke, or what came is no HTTP.
        BadRequest: the request cannot be expressed in HTTP/1.1.
    """
    handshake = Handshake(model, base_url, target, headers, subprotocols, timeouts)
    tcp = await handshake.connect()
    failure: Exception | None = None
    try:
        stream, head, frames = await handshake.shake(tcp, ssl_context)
        websocket = WebSocket(model, head.subprotocol, end_to_end(head.extra_headers), stream, frames, max_message)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(websocket.write)
            try:
                yield websocket
            except Exception as exc:  # of the block: carried out as a value, or it would be in a group
                failure = exc
            nursery.cancel_scope.cancel(reason="the websocket is over")
    finally:
        tcp.socket.close()
    if failure is not None:
        raise failure
