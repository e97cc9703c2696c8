"""One HTTP exchange over ASGI: read the body with a limit, answer, notice that the client left."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import parse_qs

import attrs
import trio

from trioswap.errors import BodyTooLarge, TrioswapError
from trioswap.request import Headers

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class ClientLeft(Exception):
    """The client closed the connection before it had its answer."""


@attrs.define(eq=False)
class Exchange:
    """One request and the answer to it."""

    scope: Message
    request_id: str
    _receive: Receive
    _send: Send
    status: int | None = None
    """Of the response; None: not begun."""
    sent: int = 0
    """Body bytes handed to the server."""
    finished: bool = False
    left: bool = False
    """The client has gone."""

    @property
    def method(self) -> str:
        """Upper-case method."""
        return str(self.scope["method"])

    @property
    def path(self) -> str:
        """Decoded path."""
        return str(self.scope["path"])

    @property
    def raw_path(self) -> bytes:
        """Path as sent, escapes untouched."""
        return bytes(self.scope["raw_path"])

    @property
    def target(self) -> bytes:
        """Raw path and query."""
        return self.raw_path + self.raw_query

    @property
    def raw_query(self) -> bytes:
        """The query with its question mark, or nothing."""
        query = bytes(self.scope["query_string"])
        return b"?" + query if query else b""

    @property
    def query_keys(self) -> set[str]:
        """Names of what the query says, with or without a value."""
        return set(parse_qs(self.raw_query[1:].decode("ascii", "replace"), keep_blank_values=True))

    @property
    def headers(self) -> Headers:
        """Request headers, names in lower case."""
        return list(self.scope["headers"])

    @property
    def client(self) -> str | None:
        """Address of the other side of the socket."""
        return self.scope["client"][0] if self.scope["client"] else None

    async def body(self, limit: int) -> bytes:
        """The whole request body.

        Raises:
            BodyTooLarge: it passes *limit* bytes; found out before it is in memory.
            ClientLeft: it ended early.
        """
        pieces, size, more = [], 0, True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self.left = True
                raise ClientLeft
            pieces.append(message.get("body", b""))
            size += len(pieces[-1])
            if size > limit:
                raise BodyTooLarge(limit)
            more = message.get("more_body", False)
        return b"".join(pieces)

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
        self.status = status
        everything = [*headers, (b"x-request-id", self.request_id.encode("ascii"))]
        await self._send({"type": "http.response.start", "status": status, "headers": everything})

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
        await self.start(status, [*fixed, *(headers or [])])
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
