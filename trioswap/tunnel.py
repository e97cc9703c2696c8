"""Carries one websocket between a client and the server of its model.

Three tasks, and a short backlog between each two.  *Listen* reads the client, *serve* holds the
lease and talks with the model server, the *writer* sends to the client.  As in `proxy`, the
lease belongs to none that sends to the client, because that cannot be cancelled: a drain
deadline takes it back at once, whatever the client does (invariant I10).

The client is told that it is accepted when the model server has accepted: until then a failure
is a proper response.  After that either side's close travels to the other with its code and
reason; where a connection ends without one, the other side is closed with a code of ours.

Whether there is a lease at all (invariant I12) is decided by the caller.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Final, Generic, Protocol, TypeVar

import attrs
import trio

from trioswap.asgi import ClientLeft
from trioswap.asgi_websocket import Socket
from trioswap.errors import ShuttingDown, TrioswapError, UpstreamFailed
from trioswap.handshake import HandshakeRefused
from trioswap.request import Headers
from trioswap.runs import DEATH_NOTICE
from trioswap.websocket import CLOSE_GRACE, Closed, Message, WebSocket

logger = logging.getLogger(__name__)

# Bytes or characters on the way in one direction, behind which whoever sends has to wait.
BACKLOG: Final = 1024 * 1024
# What an empty message counts, for there may be many.
OVERHEAD: Final = 64
# Seconds in which a model server may take leave of a client that has gone without a word.
GONE_GRACE: Final = 0.1
# Headers of the handshake's answer that are ours to send.
OUR_HEADERS: Final = frozenset({b"date", b"x-request-id"})

Opener = Callable[[], AbstractAsyncContextManager[WebSocket]]


class Event(Protocol):
    """What happens once, and can be waited for."""

    async def wait(self) -> None:
        """Return when it has happened."""


@attrs.frozen
class Opened:
    """The model server accepted."""

    subprotocol: str | None
    headers: Headers


End = Closed | TrioswapError
T = TypeVar("T")


@attrs.define(eq=False)
class Backlog(Generic[T]):
    """What one task has for another, bounded in bytes; what is no message has always room."""

    _things: deque[T] = attrs.field(factory=deque)
    _size: int = 0
    _news: trio.lowlevel.ParkingLot = attrs.field(factory=trio.lowlevel.ParkingLot)
    _room: trio.lowlevel.ParkingLot = attrs.field(factory=trio.lowlevel.ParkingLot)

    async def put(self, thing: T) -> None:
        """Add a message when there is room.  One is always taken, whatever its size."""
        await trio.lowlevel.checkpoint()
        while self._size >= BACKLOG:
            await self._room.park()
        self.put_nowait(thing)

    def put_nowait(self, thing: T) -> None:
        """Add *thing* at once."""
        self._things.append(thing)
        self._size += _size(thing)
        self._news.unpark()

    async def take(self) -> T:
        """The next, waiting for it."""
        await trio.lowlevel.checkpoint()
        while not self._things:
            await self._news.park()
        thing = self._things.popleft()
        self._size -= _size(thing)
        if self._size < BACKLOG:
            self._room.unpark_all()
        return thing


def _size(thing: object) -> int:
    return OVERHEAD + len(thing) if isinstance(thing, str | bytes) else 0


async def relay(
    client: Socket, open_upstream: Opener, dead: trio.Event | None = None, closing: Event | None = None
) -> None:
    """Connect *client* with what *open_upstream* opens, until either ends, or *dead* or *closing* happens.

    *open_upstream* may wait, for a lease and its model for example, and what it holds is let go as soon
    as the model server's side is over, or the client's.  The others are for what holds no lease, which
    would end it: *dead* is the end of the server's process, upon which the client is closed with 1012,
    *closing* that of the daemon, upon which both sides are closed with 1001.

    Raises:
        TrioswapError: the client was not answered yet, and this is the answer.
        ClientLeft: it has gone before it was answered.
    """
    tunnel = _Tunnel(client, open_upstream, dead, closing)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(tunnel.listen)
        nursery.start_soon(tunnel.serve)
        end = await tunnel.write()
        nursery.cancel_scope.cancel(reason="the websocket is over")
    match end:
        case HandshakeRefused() if not client.accepted:
            await client.refuse(end.answer.status, _passed_on(end.answer.headers), end.answer.body)
        case TrioswapError() if not client.accepted:
            raise end
        case TrioswapError():
            logger.warning("websocket ended request=%s: %s", client.request_id, end)
            await client.fail(end)
        case Closed() if not client.accepted:
            raise ClientLeft
        case Closed():
            await client.close(end.code, end.reason)


@attrs.define(eq=False)
class _Tunnel:
    """One `relay` under way."""

    client: Socket
    open_upstream: Opener
    dead: trio.Event | None
    closing: Event | None
    to_server: Backlog[Message | Closed] = attrs.field(factory=Backlog)
    to_client: Backlog[Opened | Message | End] = attrs.field(factory=Backlog)
    opened: bool = False
    left: trio.Event = attrs.field(factory=trio.Event)
    """The client's end has been received; what it said before may still be on its way."""

    async def listen(self) -> None:
        """All that the client sends.  Begins at once: the server cancels nobody whose client has left."""
        while not isinstance(message := await self.client.receive(), Closed):
            await self.to_server.put(message)
        self.to_server.put_nowait(message)
        self.left.set()
        if not self.opened:
            self.to_client.put_nowait(message)  # it ends here

    async def serve(self) -> None:
        """All that the model server says, and then the end."""
        end: End
        try:
            async with self.open_upstream() as server:
                self.opened = True
                self.to_client.put_nowait(Opened(server.subprotocol, server.headers))
                end = await self._converse(server)
                if isinstance(end, UpstreamFailed):
                    raise end  # through whoever holds the lease, who is to know
        except TrioswapError as exc:
            end = exc
        self.to_client.put_nowait(end)

    async def write(self) -> End:
        """Send the client all that is for it; return the end, which is left to be said."""
        while True:
            match thing := await self.to_client.take():
                case Opened():
                    await self.client.accept(thing.subprotocol, _passed_on(thing.headers))
                case str() | bytes():
                    await self.client.send(thing)
                case _:
                    return thing

    async def _converse(self, server: WebSocket) -> End:
        """Pass on messages in both directions until one side ends; return how."""
        ends: list[End] = []
        async with trio.open_nursery() as nursery:

            async def first(watch: Callable[[WebSocket], Awaitable[End]]) -> None:
                ends.append(await watch(server))
                nursery.cancel_scope.cancel(reason="one side has ended")

            for watch in (self._upward, self._downward, self._watch_left, self._watch_dead, self._watch_closing):
                nursery.start_soon(first, watch)
        if self.left.is_set() or isinstance(ends[0], ShuttingDown):
            await _take_leave(server, ends[0])
        return ends[0]

    async def _upward(self, server: WebSocket) -> End:
        while not isinstance(message := await self.to_server.take(), Closed):
            await server.send(message)
        return message

    async def _downward(self, server: WebSocket) -> End:
        try:
            while not isinstance(message := await server.receive(), Closed):
                await self.to_client.put(message)
        except UpstreamFailed as exc:
            return await self._explained(exc)
        return message

    async def _explained(self, failure: UpstreamFailed) -> End:
        """*failure*, unless it is only how the end of the server's process is seen first."""
        if self.dead is not None:
            with trio.move_on_after(DEATH_NOTICE):
                await self.dead.wait()
                return _STOPPED
        return failure

    async def _watch_left(self, _: WebSocket) -> End:
        """Bounds how long a model server may take to hear the last words of a client that has gone."""
        await self.left.wait()
        await trio.sleep(CLOSE_GRACE)
        assert self.client.end is not None
        return self.client.end

    async def _watch_dead(self, _: WebSocket) -> End:
        await _wait_for(self.dead)
        return _STOPPED

    async def _watch_closing(self, _: WebSocket) -> End:
        await _wait_for(self.closing)
        return ShuttingDown()


_STOPPED: Final = Closed(1012, "the model was stopped")


async def _wait_for(event: Event | None) -> None:
    """For ever, if there is none."""
    if event is None:
        await trio.sleep_forever()
    else:
        await event.wait()


async def _take_leave(server: WebSocket, end: End) -> None:
    """Tell *server* that the client has ended the websocket, or that we do, and how."""
    match end:
        case ShuttingDown():
            await server.close(1001, patience=GONE_GRACE)
        case Closed(1006):  # nobody is left who could wait for an answer
            await server.close(1001, "the client has gone", patience=GONE_GRACE)
        case Closed(1005):
            await server.close(None)
        case Closed(code, reason):
            await server.close(code, reason)


def _passed_on(headers: Headers) -> Headers:
    return [(name, value) for name, value in headers if name.lower() not in OUR_HEADERS]
