"""Which web pages may ask us, and what their browsers are told (the Fetch standard, "CORS protocol").

A browser lets a page send almost anything anywhere, and keeps only the answer from it.  So
beside the headers that hand out answers, this says which requests are refused: those of
foreign pages, whatever they ask for, since a GET may load a model, too.  Clients that are no
browsers say nothing of where they come from and are not asked.

Two ways around that are closed here.  A page can have its own name lead to our address (DNS
rebinding), and then it is of the same origin as we are: where no key keeps it out, only names
that nobody on the internet can own make a page ours.  And browsers show a password that was
typed once (`Authorization: Basic`) by themselves, whoever makes them ask: so that is no proof
that the page knows a key.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from typing import Final, Self
from urllib.parse import urlsplit

import attrs

from trioswap.config import Config
from trioswap.request import Headers

METHODS: Final = b"GET, POST, PUT, PATCH, DELETE, OPTIONS"
# Asked for by nobody, allowed are these (surface reference 4.3).
_USUAL: Final = b"Content-Type, Authorization, Accept, X-Requested-With"
# What pages may read of our answers beside the few fields that they always may.
_EXPOSED: Final = b"x-request-id, retry-after, server-timing"
_A_DAY: Final = b"86400"
# A field name (RFC 9110, 5.6.2).
_TOKEN: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
# Of apps and files, which are no websites; those that Ollama allows, too.
_APPS: Final = frozenset({"app", "file", "tauri", "vscode-file", "vscode-webview"})
# Ends of names that nobody can buy: RFC 6761, 6762 and 8375, ICANN's reservation of 2024, and what home routers use.
_LOCAL: Final = (".localhost", ".local", ".home.arpa", ".internal", ".lan")


@attrs.frozen
class Cors:
    """The rule about web pages."""

    origins: frozenset[bytes] | None
    """In small letters; `*` is every one; None: pages of this machine."""
    private_network: bool = False
    keys_asked: bool = False
    """Clients must show a key, which a page that has taken our name does not have."""

    @classmethod
    def of(cls, config: Config) -> Self:
        """What *config* says.  Where a key must be shown anyway, pages may come from everywhere."""
        keys_asked = bool(config.api_keys or config.keys)
        origins = config.cors.origins
        if origins is None and keys_asked:
            origins = ("*",)
        found = None if origins is None else frozenset(origin.lower().encode() for origin in origins)
        return cls(found, config.cors.private_network, keys_asked)

    def allows(self, origin: bytes, host: bytes) -> bool:
        """Whether pages of *origin* may read what we say; *host* is the Host that the request names."""
        return self._everybody or self._trusts(origin, host)

    def refused(self, method: str, headers: Headers) -> bytes | None:
        """The origin, or a word for it, of a page that may not ask; None: go on."""
        said = _fields(headers)
        origin, host = said.get(b"origin"), said.get(b"host", b"")
        if method == "OPTIONS" or (self._everybody and not _shows_password(said)):
            return None
        # Browsers say this only where the name of the page is proven, and a proxy may have changed Host on the way.
        if said.get(b"sec-fetch-site") == b"same-origin":
            return None
        if origin is not None:
            return None if self._trusts(origin, host) else origin
        # For an image or a form with GET no origin is said, but current browsers say this (Fetch Metadata).
        if said.get(b"sec-fetch-site") == b"cross-site" and not _is_visit(said):
            return b"another site"
        return host if self._may_be_rebound(said, host) else None

    def headers(self, headers: Headers) -> Headers:
        """What a response to a request with *headers* says to the browser."""
        exposed = (b"access-control-expose-headers", _EXPOSED)
        if self._everybody:
            return [(b"access-control-allow-origin", b"*"), exposed]
        # Also without an origin: a cache must not give that response to a page ("CORS protocol and HTTP caches").
        vary = (b"vary", b"Origin")
        said = _fields(headers)
        origin = said.get(b"origin")
        if origin is None or not self.allows(origin, said.get(b"host", b"")):
            return [vary]
        return [(b"access-control-allow-origin", origin), exposed, vary]

    def preflight(self, headers: Headers) -> Headers:
        """What the 204 to an OPTIONS request says."""
        allowed = self.headers(headers)
        if not any(name == b"access-control-allow-origin" for name, _ in allowed):
            return allowed
        said = _fields(headers)
        wanted = [word.strip() for word in said.get(b"access-control-request-headers", b"").split(b",")]
        fields = b", ".join(word for word in wanted if _TOKEN.fullmatch(word)) or _USUAL
        answer = [
            *(field for field in allowed if field[0] != b"access-control-expose-headers"),
            (b"access-control-allow-methods", METHODS),
            (b"access-control-allow-headers", fields),
            (b"access-control-max-age", _A_DAY),
        ]
        if self.private_network and said.get(b"access-control-request-private-network") == b"true":
            answer.append((b"access-control-allow-private-network", b"true"))
        return answer

    @property
    def _everybody(self) -> bool:
        return self.origins is not None and b"*" in self.origins

    def _trusts(self, origin: bytes, host: bytes) -> bool:
        """Whether pages of *origin* are ours, or as good as ours."""
        origin = origin.lower()
        if _is_same(origin, host) and (self.keys_asked or _is_secure(origin) or not _can_be_bought(host)):
            return True
        if self.origins is None or self._everybody:
            return _is_local(origin)
        return origin in self.origins

    def _may_be_rebound(self, said: Mapping[bytes, bytes], host: bytes) -> bool:
        """Whether a page may ask that is of the same origin as we are, because its name leads to us.

        Over plain HTTP to a name, browsers say nothing of the page, and no other client than
        they says which languages it reads, unless it says the rest, too (Node.js).
        """
        if self.keys_asked or b"accept-language" not in said or b"sec-fetch-mode" in said:
            return False
        ours = {origin.partition(b"://")[2] for origin in self.origins or ()}
        return _can_be_bought(host) and host.lower() not in ours


def without_cors(headers: Headers) -> Headers:
    """*headers* of a model server without its own rule: of two sets a browser believes neither."""
    return [(name, value) for name, value in headers if not name.lower().startswith(b"access-control-")]


def _fields(headers: Headers) -> dict[bytes, bytes]:
    return {name.lower(): value for name, value in reversed(headers)}


def _shows_password(said: Mapping[bytes, bytes]) -> bool:
    return said.get(b"authorization", b"").lstrip().lower().startswith(b"basic ")


def _is_visit(said: Mapping[bytes, bytes]) -> bool:
    """Whether somebody follows a link to us; what a foreign page shows in a frame of its own is none."""
    return said.get(b"sec-fetch-mode") == b"navigate" and said.get(b"sec-fetch-dest", b"document") == b"document"


def _is_same(origin: bytes, host: bytes) -> bool:
    return bool(host) and origin.partition(b"://")[2] == host.lower()


def _is_secure(origin: bytes) -> bool:
    """Whether a certificate proves the name: nobody has one for a name that leads to us and is not ours."""
    return origin.startswith(b"https://")


def _is_local(origin: bytes) -> bool:
    """Whether the page comes from this machine: by its host, or because it is no website (an app, an extension)."""
    scheme, _, host = origin.partition(b"://")
    if scheme not in (b"http", b"https"):
        return scheme.decode("latin-1") in _APPS and b"://" in origin
    name = _name_of(host)
    if name is None:
        return False
    address = _address(name)
    return name == "localhost" or name.endswith(".localhost") if address is None else address.is_loopback


def _can_be_bought(host: bytes) -> bool:
    """Whether *host*, as in a Host field, is a name that somebody on the internet can own."""
    name = _name_of(host)
    if name is None:
        return True
    return "." in name and _address(name) is None and not name.endswith(_LOCAL)


def _name_of(host: bytes) -> str | None:
    """The host without its port, in small letters; None: it is not one."""
    try:
        return (urlsplit(f"//{host.decode('ascii')}").hostname or "").removesuffix(".")
    except ValueError:
        return None


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None
