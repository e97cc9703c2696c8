"""One HTTP exchange over ASGI: read the body with a limit, answer, notice that the client left."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import attrs
import trio

from trioswap.errors import BodyTooLarge, TrioswapError
from trioswap.incoming import ClientLeft, Incoming, Message, Receive, Send
from trioswap.request import Headers, check_length

__all__ = ["ClientLeft", "Exchange", "Message", "Receive", "Send"]


@attrs.define(eq=False)
class Exchange(Incoming):
    """One request and the answer to it."""

    _receive: Receive
    _send: Send

    def pieces(self, limit: int, setting: str = "max_upload") -> AsyncIterator[bytes]:
        """The request body, piece by piece as it comes.

        Raises:
            BodyTooLarge: it passes *limit* bytes, which *setting* says; at once if it says so itself, else
                while iterated.
            ClientLeft: it ended early; while iterated.
        """
        check_length(self.headers, limit, setting)
        return _Pieces(self, self._receive, limit, setting)

    async def body(self, limit: int) -> bytes:
        """The whole request body, which may be of *limit* bytes.

        Raises: as `pieces`; what is too large is found out before it is in memory.
        """
        return b"".join([piece async for piece in self.pieces(limit, "max_request_body")])

    async def wait_left(self) -> None:
        """Return when the client has gone.

        Every handler that waits for anything reads here meanwhile: the server does not cancel
        an application whose client left, and unread body pieces would hide the news.
        """
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.left = True

    async def start(self, status: int, headers: Headers) -> None:
        """Send the head of the response."""
        await self.begin(status, headers)
        await self.write(b"")

    async def begin(self, status: int, headers: Headers) -> None:
        """As `start`, but together with the first piece of the body, which must follow at once; no checkpoint."""
        self.status = status
        self.response_headers = [*headers, *self.ours()]
        await self._send({"type": "http.response.start", "status": status, "headers": self.response_headers})

    async def write(self, data: bytes) -> None:
        """Send a piece of the body."""
        self.sent += len(data)
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def finish(self, data: bytes = b"") -> None:
        """Send the last piece.  A response that is not finished is seen by the client as broken off."""
        self.finished = True
        self.sent += len(data)
        await self._send({"type": "http.response.body", "body": data, "more_body": False})

    async def respond(self, status: int, content_type: str, data: bytes, headers: Headers | None = None) -> None:
        """Send a whole response."""
        fixed = [(b"content-type", content_type.encode("ascii")), (b"content-length", b"%d" % len(data))]
        await self.begin(status, [*fixed, *(headers or [])])
        await self.finish(data)

    async def text(self, status: int, text: str, headers: Headers | None = None) -> None:
        """Send *text* as the whole response."""
        await self.respond(status, "text/plain; charset=utf-8", text.encode(), headers)

    async def json(self, status: int, document: Any, headers: Headers | None = None) -> None:
        """Send *document* as the whole response."""
        await self.respond(status, "application/json", json.dumps(document).encode(), headers)

    async def while_connected(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run *work*; cancel it when the client leaves.

        Raises:
            TrioswapError: what *work* raised; as it was, not in a group.
            ClientLeft: it did, before *work* was done.
        """
        failure: Exception | None = ClientLeft()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._leave, nursery.cancel_scope)
            try:
                await work()
                failure = None
            except TrioswapError as exc:  # expected: carried out as a value
                failure = exc
            nursery.cancel_scope.cancel(reason="response complete")
        if failure is not None:
            raise failure

    async def _leave(self, scope: trio.CancelScope) -> None:
        await self.wait_left()
        scope.cancel(reason="the client left")


@attrs.define(eq=False)
class _Pieces:
    """An iterator with nothing to clean up, unlike an async generator that is left half way."""

    exchange: Exchange
    receive: Receive
    limit: int
    setting: str
    size: int = 0
    more: bool = True

    def __aiter__(self) -> _Pieces:
        return self

    async def __anext__(self) -> bytes:
        if not self.more:
            raise StopAsyncIteration
        message = await self.receive()
        if message["type"] == "http.disconnect":
            self.exchange.left = True
            raise ClientLeft
        data: bytes = message.get("body", b"")
        self.size += len(data)
        if self.size > self.limit:
            raise BodyTooLarge(self.limit, self.setting)
        self.more = message.get("more_body", False)
        return data
