"""What the head of a request says, and what of it travels on."""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Protocol, TypeVar
from urllib.parse import unquote

import attrs

from trioswap.config.parts import Network
from trioswap.errors import AmbiguousLength, BodyTooLarge

T = TypeVar("T")
Headers = list[tuple[bytes, bytes]]


class Body(Protocol):
    """A request body that may be too large for memory, and can be read any number of times."""

    @property
    def size(self) -> int:
        """Bytes."""
        ...

    async def read(self, offset: int, size: int) -> bytes:
        """Up to *size* bytes from *offset* on; fewer only at the end."""
        ...


@attrs.frozen
class Call:
    """A request as it goes to a model server."""

    method: str
    target: bytes
    """Raw path and query, escapes untouched."""
    headers: Headers
    body: bytes | Body


def header(headers: Headers, name: bytes) -> bytes | None:
    """The first field *name*, which is in small letters."""
    return next((value for field, value in headers if field.lower() == name), None)


# RFC 7240, 4.3: how many seconds the client is willing to wait.
_WAIT: Final = re.compile(rb"(?:^|[,;\s])wait\s*=\s*(\d{1,6})(?=$|[,;\s])", re.IGNORECASE)


def preferred_wait(headers: Headers) -> float:
    """Seconds after which the client would rather be told than wait (`Prefer: wait=N`); inf: it does not say."""
    found = _WAIT.search(header(headers, b"prefer") or b"")
    return math.inf if found is None else float(found[1])


def check_framing(headers: Iterable[tuple[bytes, bytes]]) -> None:
    """Refuse a request whose length is stated twice: two parsers could cut it differently (RFC 9112 6.1).

    Raises:
        AmbiguousLength: Content-Length together with Transfer-Encoding.
    """
    names = {name.lower() for name, _ in headers}
    if b"content-length" in names and b"transfer-encoding" in names:
        raise AmbiguousLength


def check_length(headers: Headers, limit: int, setting: str) -> None:
    """Refuse a body that says itself that it is larger than *limit* bytes, before any of it is read.

    Raises:
        BodyTooLarge: it does; *setting* is the limit's name.
    """
    declared = header(headers, b"content-length") or b""
    if declared.isdigit() and int(declared) > limit:
        raise BodyTooLarge(limit, setting)


def client_of(peer: str | None, headers: Headers, trusted: Sequence[Network]) -> str | None:
    """Where the request comes from: *peer* at the other end of the socket, or whom trusted proxies name.

    Each proxy appends whom it heard, so the last that is no proxy of ours is the one; what stands
    before it is mere talk of the client (RFC 7239, 8.1 says as much of its own header).
    """
    if peer is None or not is_in(peer, trusted):
        return peer
    chain = [
        part.strip() for field, value in headers if field.lower() == b"x-forwarded-for" for part in value.split(b",")
    ]
    address: str | None = peer
    while address is not None and is_in(address, trusted) and chain:
        address = chain.pop().decode("ascii", "replace") or None
    return address if address is None or _is_address(address) else peer


def is_in(address: str, networks: Sequence[Network]) -> bool:
    """Whether *address* is in one of *networks*; what is no address is not."""
    if not networks:  # most often, and each request asks
        return False
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = getattr(found, "ipv4_mapped", None) or found  # ::ffff:127.0.0.1 of a socket for both versions
    return any(mapped in network for network in networks)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


_FORWARDED: Final = frozenset(
    {b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-host", b"forwarded", b"x-real-ip"}
)


def forwarded(headers: Headers, peer: str | None, scheme: str, *, trusted: bool) -> Headers:
    """*headers* as they travel on, with who asked us, and how.

    What the client says of that is kept only if it is a proxy whose word counts.
    """
    said = {name.lower(): value for name, value in reversed(headers) if trusted}
    chain = [value for name, value in headers if trusted and name.lower() == b"x-forwarded-for"]
    if peer:
        chain.append(peer.encode("ascii"))
    host = said.get(b"x-forwarded-host") or header(headers, b"host")
    told = [
        (b"x-forwarded-for", b", ".join(chain)),
        (b"x-forwarded-proto", said.get(b"x-forwarded-proto") or scheme.encode("ascii")),
        (b"x-forwarded-host", host or b""),
    ]
    return [*without_forwarded(headers), *((name, value) for name, value in told if value)]


def without_forwarded(headers: Headers) -> Headers:
    """*headers* without what says where a request comes from."""
    return [(name, value) for name, value in headers if name.lower() not in _FORWARDED]


# Where a name in a path may end.
_BOUNDARY: Final = re.compile(rb"/|\Z")


def split_upstream(raw_rest: bytes, resolve: Callable[[str], T | None], longest: int) -> tuple[T, bytes] | None:
    """Split `author/model/v1/x` into what the longest known name stands for, and the raw remainder `/v1/x`.

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
