"""What a request asks for: the model its body names, and the headers that travel on."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from typing import Any, Final
from urllib.parse import unquote

import attrs

from trioswap.errors import AmbiguousLength, BadRequest, MissingModel

Headers = list[tuple[bytes, bytes]]


@attrs.frozen
class Call:
    """A request as it goes to a model server."""

    method: str
    target: bytes
    """Raw path and query, escapes untouched."""
    headers: Headers
    body: bytes


def model_in(body: bytes) -> str:
    """The model that a JSON body names, whatever its Content-Type says (plain `curl -d` sends none of use).

    Raises:
        BadRequest: not a JSON object, or `model` is no string.
        MissingModel: no `model`, or an empty one.
    """
    try:
        document: Any = json.loads(body)
    except (ValueError, RecursionError) as exc:
        raise BadRequest(f"the body is not JSON: {exc}") from None
    if not isinstance(document, dict):
        raise BadRequest("the body must be a JSON object")
    model = document.get("model")
    if model is None or model == "":
        raise MissingModel
    if not isinstance(model, str):
        raise BadRequest('"model" must be a string')
    return model


def check_framing(headers: Iterable[tuple[bytes, bytes]]) -> None:
    """Refuse a request whose length is stated twice: two parsers could cut it differently (RFC 9112 6.1).

    Raises:
        AmbiguousLength: Content-Length together with Transfer-Encoding.
    """
    names = {name.lower() for name, _ in headers}
    if b"content-length" in names and b"transfer-encoding" in names:
        raise AmbiguousLength


def forwarded(headers: Iterable[tuple[bytes, bytes]], client: str | None) -> Headers:
    """The client's headers with its address appended to X-Forwarded-For."""
    kept = [(name, value) for name, value in headers if name.lower() != b"x-forwarded-for"]
    chain = [value for name, value in headers if name.lower() == b"x-forwarded-for"]
    if client:
        chain.append(client.encode("ascii"))
    return [*kept, (b"x-forwarded-for", b", ".join(chain))] if chain else kept


# Where a name in a path may end.
_BOUNDARY: Final = re.compile(rb"/|\Z")


def split_upstream(raw_rest: bytes, resolve: Callable[[str], str | None], longest: int) -> tuple[str, bytes] | None:
    """Split `author/model/v1/x` into the model of the longest known name and the raw remainder `/v1/x`.

    *resolve* knows the names, of which the longest has *longest* characters: further nobody looks,
    or a path of many slashes would cost seconds.  The remainder keeps its escapes and is empty when
    nothing, not even a slash, follows the name.  Names with a slash may be written with `/` or `%2F`.
    None: no prefix is a known name.
    """
    found = None
    for boundary in _BOUNDARY.finditer(raw_rest):
        end = boundary.start()
        name = unquote(raw_rest[:end].decode("ascii", "replace"))
        if len(name) > longest:
            break
        model = resolve(name)
        if model is not None:
            found = model, raw_rest[end:]
    return found
