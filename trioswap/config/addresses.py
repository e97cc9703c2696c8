"""Where servers listen: reads `listen` and `proxy`, of models and of peers, and tells whether two places are one.

Nothing is looked up: names other than `localhost` are compared as they are written.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Final

import attrs

from trioswap.config.mistakes import found, shown

_HOST: Final = r"(?P<host>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])"
_LISTEN: Final = re.compile(rf"{_HOST}:(?P<port>[0-9]{{1,9}})")
_UNIX: Final = "unix:"
_SOCKET: Final = re.compile(r"/[^/](?:.*[^/])?", re.DOTALL)
# What the address of a socket has room for, without the NUL that ends it (unix(7): 108 with it).
LONGEST_SOCKET: Final = 107
_URL: Final = re.compile(rf"(?P<scheme>https?)://{_HOST}(?::(?P<port>[0-9]{{1,9}}))?(?:/[!-~]*)?")
_NUMBERS: Final = re.compile(r"[0-9.]+")
_QUERY: Final = re.compile(r"[?#]")
_PORTS: Final = {"http": 80, "https": 443}
MAX_PORT: Final = 65_535

_WILDCARDS: Final = frozenset({"0.0.0.0", "[::]"})  # noqa: S104 - compared with, not bound
_LOOPBACK: Final = re.compile(r"127\.[0-9.]+|\[::1\]")


@attrs.frozen
class Address:
    """A host, in lower case and with `localhost` resolved, and a port."""

    host: str
    port: int

    def overlaps(self, other: Address) -> bool:
        """Whether a server on one of the two stands in the way of a server on the other."""
        if self.port != other.port:
            return False
        return self.host == other.host or self._takes_in(other) or other._takes_in(self)

    def _takes_in(self, other: Address) -> bool:
        return self.host in _WILDCARDS and (other.host in _WILDCARDS or _LOOPBACK.fullmatch(other.host) is not None)


@attrs.frozen
class UnixAddress:
    """A socket in the file system."""

    path: str
    """Absolute."""

    def overlaps(self, _: Address) -> bool:
        """No: servers of models and peers are asked at ports."""
        return False


def parse_listen(value: str) -> Address | UnixAddress:
    """The address meant by a `listen` of HOST:PORT or unix:/PATH; port 0 lets the system choose.

    Raises:
        ValueError: it has another form, the port is beyond 65535, or the path is too long for a socket.
    """
    if value.startswith(_UNIX):
        return _socket(value)
    match = _LISTEN.fullmatch(value)
    if match is None:
        allowed = 'HOST:PORT, such as "127.0.0.1:8080", or "0.0.0.0:8080" for every interface, or unix:/PATH'
        raise ValueError(found(value, allowed))
    return _address(match, int(match["port"]), lowest_port=0)


def _socket(value: str) -> UnixAddress:
    path = value.removeprefix(_UNIX)
    if not _SOCKET.fullmatch(path) or not path.isprintable():
        raise ValueError(found(value, 'unix: and an absolute path, such as "unix:/run/trioswap.sock"'))
    length = len(path.encode())
    if length > LONGEST_SOCKET:
        raise ValueError(f"found a path of {length} bytes, allowed are at most {LONGEST_SOCKET} for a socket")
    return UnixAddress(path)


def parse_proxy(value: str) -> Address:
    """The address meant by a base URL of http://HOST[:PORT][/PATH].

    Raises:
        ValueError: it has another form, or the port is not in 1..65535.
    """
    # Local servers are asked by our own client, which speaks no TLS.
    if value.startswith("https:"):
        but = " (not https: local servers are asked without TLS)"
        raise ValueError(found(value, f"http://HOST[:PORT][/PATH]{but}"))
    return _parse_url(value, "http://HOST[:PORT][/PATH]")


def parse_peer(value: str) -> Address:
    """The address meant by a base URL of http[s]://HOST[:PORT][/PATH].

    Raises:
        ValueError: it has another form, or no such address exists, or the port is not in 1..65535.
    """
    address = _parse_url(value, allowed := "http[s]://HOST[:PORT][/PATH]")
    if _NUMBERS.fullmatch(address.host):
        try:
            ipaddress.IPv4Address(address.host)
        except ValueError:
            raise ValueError(f"{found(value, allowed)} with four numbers from 0 to 255, or a name") from None
    return address


def _parse_url(value: str, allowed: str) -> Address:
    match = _URL.fullmatch(value)
    if match is None or _QUERY.search(value):
        raise ValueError(found(value, allowed))
    return _address(match, int(match["port"] or _PORTS[match["scheme"]]), lowest_port=1)


def _address(match: re.Match[str], port: int, *, lowest_port: int) -> Address:
    if not lowest_port <= port <= MAX_PORT:
        raise ValueError(f"found port {port} in {shown(match[0])}, allowed is {lowest_port} to {MAX_PORT}")
    host = match["host"].lower()
    return Address("127.0.0.1" if host == "localhost" else host, port)
