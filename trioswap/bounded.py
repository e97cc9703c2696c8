"""Waits with a bound: what keeps one client from holding up a task for ever.

`Patience` is how long anybody waits for clients, `BoundedStream` a socket whose writes
obey it, `ReadAhead` stands between a socket and its parser, `Inbox` between the parser and
the application.  Nothing here knows Hypercorn, or of HTTP more than ASGI's last messages.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import attrs
import trio

# ASGI messages are Any by nature.
Message = Mapping[str, Any]


@attrs.define(eq=False)
class Patience:
    """How long the server waits for a client that takes nothing; all connections share one."""

    seconds: float
    """Without progress."""
    _until: float = math.inf
    """Nobody waits past this moment, progress or not (trio.current_time())."""
    _waits: set[trio.CancelScope] = attrs.field(factory=set, repr=False)

    @contextmanager
    def wait(self) -> Iterator[trio.CancelScope]:
        """Cancel the block when the patience ends; `renew` the scope upon progress."""
        with trio.CancelScope() as scope:
            self.renew(scope)
            self._waits.add(scope)
            try:
                yield scope
            finally:
                self._waits.discard(scope)

    def renew(self, scope: trio.CancelScope) -> None:
        """Progress: *scope* has the full time again."""
        scope.deadline = min(trio.current_time() + self.seconds, self._until)

    def shorten(self, seconds: float) -> None:
        """Grant *seconds* at most from now on, also to who waits already."""
        self.seconds = min(self.seconds, seconds)
        self._trim(trio.current_time() + self.seconds)

    async def end_when_cancelled(self, seconds: float) -> None:
        """Once this is cancelled, wait for nobody longer than *seconds*, whatever progress is made.

        For a task beside those who wait under a shield: without it, a client that takes a byte
        now and then could hold a cancelled server for ever.
        """
        try:
            await trio.sleep_forever()
        finally:
            self._until = trio.current_time() + seconds
            self._trim(self._until)

    def _trim(self, deadline: float) -> None:
        for scope in self._waits:
            scope.deadline = min(scope.deadline, deadline)


class BoundedStream(trio.abc.HalfCloseableStream):
    """A `trio.SocketStream` whose writes end in bounded time.

    Hypercorn looks for `socket` on a plain stream; an SSLStream around this one would
    offer it as `transport_stream.socket`, the other place where it looks.
    """

    def __init__(self, stream: trio.SocketStream, patience: Patience) -> None:
        self.socket = stream.socket
        self._stream, self._patience = stream, patience

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send *data*; the patience starts anew whenever the kernel accepts some of it.

        Raises:
            trio.BrokenResourceError: the connection broke, or the patience ended; the socket is closed then.
            trio.ClosedResourceError: the socket had been closed.
        """
        try:
            with self._patience.wait() as stall:
                await self._send(memoryview(data), stall)
        except OSError as exc:
            raise trio.BrokenResourceError(f"the write failed: {exc}") from exc
        if stall.cancelled_caught:
            self.socket.close()
            raise trio.BrokenResourceError("the client stopped reading")

    async def _send(self, data: memoryview, stall: trio.CancelScope) -> None:
        if self.socket.fileno() == -1 or self.socket.did_shutdown_SHUT_WR:
            raise trio.ClosedResourceError("the socket was closed, for sending at least")
        if not data:
            await trio.lowlevel.checkpoint()
        while data:
            data = data[await self.socket.send(data) :]
            self._patience.renew(stall)

    async def wait_send_all_might_not_block(self) -> None:
        """As `trio.SocketStream`."""
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """As `trio.SocketStream`."""
        return await self._stream.receive_some(max_bytes)

    async def discard_input(self) -> None:
        """Return when the client has sent its last byte, the connection broke, or the patience ended."""
        with self._patience.wait(), suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while await self._stream.receive_some():
                pass

    async def send_eof(self) -> None:
        """As `trio.SocketStream`."""
        await self._stream.send_eof()

    async def aclose(self) -> None:
        """As `trio.SocketStream`."""
        await self._stream.aclose()


@attrs.define(eq=False)
class ReadAhead:
    """Bytes that one task reads from a stream while another, the parser, is busy with those before."""

    limit: int
    """Bytes."""
    _data: bytearray = attrs.field(factory=bytearray)
    dropped: bool = False
    """Bytes were lost; what follows would be nonsense, so nobody gets any of it."""
    _busy: bool = False
    """The parser has taken bytes and has not come back for more."""
    _news: trio.lowlevel.ParkingLot = attrs.field(factory=trio.lowlevel.ParkingLot)
    _room: trio.lowlevel.ParkingLot = attrs.field(factory=trio.lowlevel.ParkingLot)

    async def fill(self, stream: trio.abc.ReceiveStream, may_drop: Callable[[], bool]) -> None:
        """Read *stream* to its end, however it ends; the parser has got the last bytes then, unless it was busy.

        What goes past the limit waits in the kernel, and hides that the client has left behind it.
        When *may_drop* says that it can only be further requests, it is dropped instead: a client
        that sends them ahead must send them again when the connection closes (RFC 9112, 9.3.2).
        """
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while data := await stream.receive_some(self.limit - len(self._data)):
                if self.dropped:
                    continue
                self._data += data
                self._news.unpark()
                while len(self._data) >= self.limit:
                    if self._busy and may_drop():
                        self.dropped = True
                        self._data.clear()
                        break
                    await self._room.park()
        while self._data and not self._busy:
            await trio.lowlevel.checkpoint()

    async def take(self) -> bytes:
        """All bytes there are, as soon as there are any."""
        self._busy = False
        while not self._data:
            await self._news.park()
        self._busy = True
        data, self._data = bytes(self._data), bytearray()
        self._room.unpark()
        return data


@attrs.define(eq=False)
class Inbox:
    """What one application call has yet to receive.

    Bounded for what the client sends; the end never waits for room, and is told again
    as often as it is asked for.
    """

    limit: int
    """Messages."""
    _messages: deque[Message] = attrs.field(factory=deque)
    _end: Message | None = None
    """The disconnect message, once the stream is over."""
    _news: trio.lowlevel.ParkingLot = attrs.field(factory=trio.lowlevel.ParkingLot)
    _room: trio.lowlevel.ParkingLot = attrs.field(factory=trio.lowlevel.ParkingLot)

    async def put(self, message: Message) -> None:
        """Add *message*, waiting for room if it is none of the last words.

        No checkpoint while there is room: a request that came whole is parsed, and its
        application called, in one step.  `Connection` relies on that when the client
        leaves right behind its request.
        """
        if message["type"] in {"http.disconnect", "websocket.disconnect"}:
            self._finish(message)
            return
        while len(self._messages) >= self.limit and self._end is None:
            await self._room.park()
        if self._end is None:
            self._messages.append(message)
            self._news.unpark()

    @property
    def has_news(self) -> bool:
        """Whether there is a message."""
        return bool(self._messages) or self._end is not None

    async def wait(self) -> None:
        """Return when there is a message."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self.has_news:
            await self._news.park()

    async def get(self) -> Any:
        """The next message: the application's `receive`.

        No checkpoint while there are messages, which are few.  The end, which is told without end, is always one:
        an application that only receives would stop the process.
        """
        await self.wait()
        if not self._messages:
            await trio.lowlevel.checkpoint()
            return self._end
        self._room.unpark()
        return self._messages.popleft()

    def _finish(self, message: Message) -> None:
        if self._end is None:
            self._end = message
        if message["type"] == "http.disconnect":
            self._messages.clear()  # nobody is left who could be answered; a websocket's messages stay of use
        self._news.unpark_all()
        self._room.unpark_all()
