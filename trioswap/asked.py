"""What a request to a model route asks for, and the same request under another name.

The model is found in the query of a GET, else in the body: JSON, a multipart form, or a
urlencoded form.  JSON is recognised by its first byte, too: `curl -d` declares a form.
A form may leave the name to the query (surface reference 1.3).
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Final
from urllib.parse import quote_plus, unquote_plus

import attrs

from trioswap import filters, jsontext, multipart
from trioswap.asgi import Exchange
from trioswap.config import Config
from trioswap.config.parts import FilterConfig
from trioswap.errors import BadRequest, MissingModel
from trioswap.request import Body, header
from trioswap.spool import Spliced, Spool

_FORM: Final = b"application/x-www-form-urlencoded"
_WANTED: Final = ("model", "stream")


class Kind(enum.Enum):
    """Where the model is named."""

    QUERY = enum.auto()
    JSON = enum.auto()
    FORM = enum.auto()
    MULTIPART = enum.auto()


@attrs.frozen
class Asked:
    """A request that names its model."""

    kind: Kind
    name: str
    stream: bool
    """It wants a stream of events."""
    query: bytes
    """As it came, with its question mark, or empty."""
    body: bytes | Spool
    places: Sequence[multipart.Field] = ()
    """Of the field `model` in a multipart form."""

    def renamed(self, rename: str | None, rules: FilterConfig, asked: str) -> tuple[bytes, bytes | Body]:
        """Query and body as the server is to see them: with `model` as *rename* says, if it does.

        *rules* apply to JSON only; *asked* is the name by which `set_params_by_id` goes.
        """
        if self.kind is Kind.JSON:
            assert isinstance(self.body, bytes)
            return self.query, filters.apply(self.body, rules, asked=asked, rename=rename)
        if rename is None:
            return self.query, self.body
        query = self.query[:1] + _replaced(self.query[1:], rename)
        if self.kind is Kind.QUERY:
            return query, self.body
        if self.kind is Kind.FORM:
            assert isinstance(self.body, bytes)
            return query, _replaced(self.body, rename)
        assert isinstance(self.body, Spool)
        body: Spool | Spliced = self.body
        for place in reversed(self.places):  # so that the offsets of the others stay true
            body = body.splice(place.start, place.end, rename.encode())
        return query, body


async def read(exchange: Exchange, config: Config, keep: Callable[[Spool], Spool]) -> Asked:
    """What *exchange* asks for; *keep* takes over what must be closed in the end.

    Raises:
        BadRequest: the body is not what it claims to be.
        BodyTooLarge: it passes `max_request_body`, or `max_upload` if it is a multipart form.
        MissingModel: no model is named.
        ClientLeft: it ended early.
    """
    asked = await _read(exchange, config, keep)
    if not asked.name:
        raise MissingModel
    return asked


async def _read(exchange: Exchange, config: Config, keep: Callable[[Spool], Spool]) -> Asked:
    query = exchange.raw_query
    if exchange.method in ("GET", "HEAD"):
        fields = _fields(query[1:])
        return Asked(Kind.QUERY, fields.get("model", ""), fields.get("stream") == "true", query, b"")
    declared = header(exchange.headers, b"content-type") or b""
    if declared.lower().startswith(b"multipart/form-data"):
        return await _multipart(exchange, config, keep(Spool()), declared)
    body = await exchange.body(config.max_request_body)
    is_form = declared.lower().startswith(_FORM) and body.lstrip()[:1] != b"{"
    if is_form or (query and not body and not declared):
        fields = _fields(query[1:]) | _fields(body)
        return Asked(Kind.FORM, fields.get("model", ""), fields.get("stream") == "true", query, body)
    outline = jsontext.outline(body)
    return Asked(Kind.JSON, outline.model or "", outline.stream, query, body)


async def _multipart(exchange: Exchange, config: Config, spool: Spool, declared: bytes) -> Asked:
    scanner = multipart.FormScanner(multipart.boundary_of(declared), _WANTED)
    async for data in exchange.pieces(config.max_upload):
        scanner.feed(data)
        await spool.write(data)
    scanner.close()
    query = exchange.raw_query
    name = _fields(query[1:]).get("model") or scanner.value("model") or ""
    stream = scanner.value("stream") == "true"
    return Asked(Kind.MULTIPART, name, stream, query, spool, scanner.fields.get("model", ()))


def _fields(form: bytes) -> dict[str, str]:
    """The first value of each field of a urlencoded form, as llama-swap reads it."""
    fields: dict[str, str] = {}
    for piece in form.split(b"&"):
        name, _, value = piece.partition(b"=")
        try:
            fields.setdefault(_decoded(name), _decoded(value))
        except UnicodeDecodeError:
            raise BadRequest("the form is not UTF-8") from None
    return fields


def _replaced(form: bytes, name: str) -> bytes:
    """*form* with *name* in every field `model`, and else as it was."""
    return b"&".join(_renamed(piece, name) for piece in form.split(b"&"))


def _renamed(field: bytes, name: str) -> bytes:
    key, _, value = field.partition(b"=")
    return field if _decoded(key) != "model" or _decoded(value) == name else b"model=" + quote_plus(name).encode()


def _decoded(text: bytes) -> str:
    return unquote_plus(text.decode("ascii"), errors="strict")
