"""What comes in over ASGI, be it a request or a websocket: its head, who sent it, and what may be said back."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final
from urllib.parse import parse_qs, unquote

import attrs

from trioswap.access import ANYBODY, Key
from trioswap.request import Headers

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


_ABSOLUTE: Final = re.compile(rb"https?://(?:[^/@]*@)?([^/]*)", re.IGNORECASE)


def in_origin_form(scope: Message) -> Message:
    """*scope* as if a target such as `http://HOST/PATH` had been `/PATH`, and its Host `HOST` (RFC 9112, 3.2.2)."""
    absolute = _ABSOLUTE.match(scope["raw_path"])
    if absolute is None:
        return scope
    path = scope["raw_path"][absolute.end() :] or b"/"
    headers = [(name, absolute[1] if name.lower() == b"host" else value) for name, value in scope["headers"]]
    return {**scope, "raw_path": path, "path": unquote(path.decode("ascii", "replace")), "headers": headers}


class ClientLeft(Exception):
    """The client closed the connection before it had its answer."""


@attrs.define(eq=False)
class Incoming:
    """One of them, and what is found out about it on the way."""

    scope: Message
    request_id: str
    status: int | None = attrs.field(default=None, init=False)
    """Of the answer; None: not begun."""
    sent: int = attrs.field(default=0, init=False)
    """Bytes of the answer handed to the server, or bytes and characters of messages."""
    finished: bool = attrs.field(default=False, init=False)
    left: bool = attrs.field(default=False, init=False)
    """The client has gone."""
    rest: bytes = attrs.field(default=b"", init=False)
    """What the path says in the place of the route's parameter, escapes untouched."""
    key: Key = attrs.field(default=ANYBODY, init=False)
    """What the client has shown."""
    client: str | None = attrs.field(default=None, init=False)
    """Where it comes from: the peer, or whom proxies that are trusted name."""
    behind_proxy: bool = attrs.field(default=False, init=False)
    """The peer is such a proxy."""
    always: Headers = attrs.field(factory=list, init=False)
    """Headers of the answer, whatever it is."""
    response_headers: Headers = attrs.field(factory=list, init=False)
    """Once it has begun."""

    @property
    def name(self) -> str:
        """`rest` as a name."""
        return unquote(self.rest.decode("ascii", "replace"))

    @property
    def method(self) -> str:
        """Upper-case method; a websocket begins with GET."""
        return str(self.scope.get("method", "GET"))

    @property
    def path(self) -> str:
        """Decoded path."""
        return str(self.scope["path"])

    @property
    def raw_path(self) -> bytes:
        """Path as sent, escapes untouched."""
        return bytes(self.scope["raw_path"])

    @property
    def raw_query(self) -> bytes:
        """The query with its question mark, or nothing."""
        query = bytes(self.scope["query_string"])
        return b"?" + query if query else b""

    @property
    def target(self) -> bytes:
        """Raw path and query."""
        return self.raw_path + self.raw_query

    @property
    def query_keys(self) -> set[str]:
        """Names of what the query says, with or without a value."""
        return set(parse_qs(self.raw_query[1:].decode("ascii", "replace"), keep_blank_values=True))

    @property
    def headers(self) -> Headers:
        """Request headers, names in lower case."""
        return list(self.scope["headers"])

    @property
    def peer(self) -> str | None:
        """Address of the other side of the socket; None: it has none."""
        return self.scope["client"][0] if self.scope["client"] else None

    @property
    def scheme(self) -> str:
        """Either http or https."""
        return {"ws": "http", "wss": "https"}.get(self.scope["scheme"], str(self.scope["scheme"]))

    def ours(self) -> Headers:
        """What every answer says beside what it is about."""
        return [*self.always, (b"x-request-id", self.request_id.encode("ascii"))]
