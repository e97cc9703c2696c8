"""Who may ask, from what is written to what is meant: keys, TLS, web pages of others, proxies in front of us.

No mistake shows a key, nor what stands where one belongs.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from ipaddress import ip_interface, ip_network
from pathlib import Path as FilePath
from typing import Final

import attrs

from trioswap.config.addresses import MAX_PORT
from trioswap.config.kinds import hidden
from trioswap.config.mistakes import Mistakes, Path, found, quoted, shown
from trioswap.config.parts import CorsConfig, KeyConfig, Network, TlsConfig
from trioswap.config.patterns import ANY, fits
from trioswap.config.raw_access import RawCors, RawKey, RawTls
from trioswap.config.routes import Names
from trioswap.config.schema import Config
from trioswap.config.settings import file_path

_HASH: Final = re.compile(r"sha256:(?P<digits>[0-9A-Fa-f]{64})")
# A path as requests have it (RFC 3986, 3.3): what stands behind a ? or # belongs to it no more.
_ENDPOINT: Final = re.compile(r"/[!\"$->@-~]*")
# What browsers send: no path, and ASCII only (RFC 6454, 6.2); apps and extensions have schemes of their own.
_ORIGIN: Final = re.compile(
    r"(?P<site>(?P<scheme>[a-z][a-z0-9+.-]*)://(?:[a-z0-9._-]+|\[[0-9a-f:.]+\]))(?::(?P<port>[0-9]{1,9}))?",
    re.ASCII | re.IGNORECASE,
)
_AN_ORIGIN: Final = 'SCHEME://HOST[:PORT] without a path, such as "https://chat.example", or "*" alone'
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}
_A_NETWORK: Final = 'an address or a network, such as "10.0.0.5" or "10.0.0.0/8"'
# What is hard to find out is believed: no configuration may hang its reader.
_MOST_COMPARISONS: Final = 200_000
_DEFAULTS: Final = CorsConfig()


# ---- keys ---------------------------------------------------------------------------------


def read_api_keys(written: Iterable[str], mistakes: Mistakes) -> tuple[str, ...]:
    """Each key once."""
    keys: dict[str, None] = {}
    for index, key in enumerate(written):
        _check_key(key, ("api_keys", index), mistakes)
        keys[key] = None
    return tuple(keys)


def read_keys(written: Mapping[str, RawKey], api_keys: Iterable[str], mistakes: Mistakes) -> dict[str, KeyConfig]:
    """The keys meant by *written*, by their names; each differs from all others and from *api_keys*."""
    owners = {_digest(key): "one of api_keys" for key in api_keys}
    keys = {}
    for name, raw in written.items():
        digest = _digest_of(name, raw, mistakes)
        if digest is not None and digest in owners:
            path = ("keys", name, "key" if raw.hash is None else "hash")
            mistakes.add(path, f"found the key that is {owners[digest]} already, allowed is one of its own")
        elif digest is not None:
            owners[digest] = f"that of {quoted(name)}"
        keys[name] = _read_key(name, digest or b"", raw, mistakes)
    return keys


def _read_key(name: str, digest: bytes, raw: RawKey, mistakes: Mistakes) -> KeyConfig:
    path: Path = ("keys", name)
    if raw.admin and raw.read_only:
        mistakes.add((*path, "read_only"), "found read_only beside admin, allowed is one of them")
    for index, endpoint in enumerate(raw.endpoints or ()):
        if not _ENDPOINT.fullmatch(endpoint):
            allowed = 'a path such as "/v1/embeddings" or "/v1/audio/*", without ? and #'
            mistakes.add((*path, "endpoints", index), found(endpoint, allowed))
    return KeyConfig(
        name=name,
        digest=digest,
        models=None if raw.models is None else tuple(raw.models),
        endpoints=None if raw.endpoints is None else tuple(raw.endpoints),
        peers=raw.peers is not False,
        admin=raw.admin or False,
        read_only=raw.read_only or False,
        weight=raw.weight,
        concurrency=raw.concurrency,
    )


def _digest_of(name: str, raw: RawKey, mistakes: Mistakes) -> bytes | None:
    """SHA-256 of the key; None: what it is cannot be known."""
    path: Path = ("keys", name)
    if raw.key_ is not None and raw.hash is not None:
        mistakes.add((*path, "hash"), "found hash beside key, allowed is one of them")
        return None
    if raw.key_ is not None:
        _check_key(raw.key_, (*path, "key"), mistakes)
        return _digest(raw.key_)
    if raw.hash is None:
        if not mistakes.touch((*path, "hash")):
            mistakes.add((*path, "key"), "found neither key nor hash, allowed is one of them")
        return None
    match = _HASH.fullmatch(raw.hash)
    if match is None:
        mistakes.add((*path, "hash"), hidden('"sha256:" and 64 hexadecimal digits, as `trioswap key new` makes it'))
        return None
    return bytes.fromhex(match["digits"])


def _check_key(key: str, path: Path, mistakes: Mistakes) -> None:
    if not key:
        mistakes.add(path, "found an empty key, allowed are keys of at least one character")
    elif any(char.isspace() or not char.isprintable() for char in key):
        mistakes.add(path, "found a key with spaces or control characters, allowed are keys without")


def _digest(key: str) -> bytes:
    # What UTF-8 cannot say has been called a mistake.
    return hashlib.sha256(key.encode(errors="surrogatepass")).digest()


def check_keys(config: Config, mistakes: Mistakes) -> None:
    """Add those patterns of the keys of *config* to *mistakes* that are about no name there is."""
    judge = _Judge(Names.of(config, mistakes), mistakes)
    for key in config.keys.values() if judge.names.certain else ():
        for index, pattern in enumerate(key.models or ()):
            judge.check(("keys", key.name, "models", index), pattern)


@attrs.define(eq=False)
class _Judge:
    """Knows which patterns are about something."""

    names: Names
    mistakes: Mistakes
    compared: int = 0

    def check(self, path: Path, pattern: str) -> None:
        if not self._is_about_something(pattern):
            allowed = "the name of a model, an alias, a selector, a pin or a peer's model, or a pattern of such names"
            self.mistakes.add(path, found(pattern, allowed) + self.mistakes.guess(pattern, self.names.all))

    def _is_about_something(self, pattern: str) -> bool:
        names = self.names.all
        if ANY not in pattern:
            return pattern in names
        self.compared += len(names)
        return pattern == ANY or self.compared > _MOST_COMPARISONS or any(fits(pattern, name) for name in names)


# ---- TLS ----------------------------------------------------------------------------------


def read_tls(raw: RawTls | None, directory: FilePath, mistakes: Mistakes) -> TlsConfig | None:
    """Both files; whether they are there and fit together, the daemon finds out."""
    if raw is None:
        return None
    cert, key = (
        _pem_file(written, directory, ("tls", name), mistakes)
        for name, written in (("cert_file", raw.cert_file), ("key_file", raw.key_file))
    )
    return None if cert is None or key is None else TlsConfig(cert, key)


def _pem_file(written: str | None, directory: FilePath, path: Path, mistakes: Mistakes) -> FilePath | None:
    allowed = "the path of a PEM file"
    if written is None:
        mistakes.add(path, f"found none, allowed is {allowed}")
        return None
    return file_path(written, directory, path, allowed, mistakes)


# ---- web pages ----------------------------------------------------------------------------


def read_cors(raw: RawCors | None, mistakes: Mistakes) -> CorsConfig:
    """Each origin once, as browsers send it."""
    if raw is None:
        return _DEFAULTS
    return CorsConfig(
        origins=None if raw.origins is None else _read_origins(raw.origins, mistakes),
        private_network=raw.private_network or False,
    )


def _read_origins(written: Sequence[str], mistakes: Mistakes) -> tuple[str, ...]:
    origins: dict[str, None] = {}
    for index, origin in enumerate(written):
        try:
            origins[ANY if [origin] == list(written) == [ANY] else _parse_origin(origin)] = None
        except ValueError as exc:
            mistakes.add(("cors", "origins", index), str(exc))
    return tuple(origins)


def _parse_origin(written: str) -> str:
    """The origin in lower case, and without the port that its scheme has anyway.

    Raises:
        ValueError: it has another form, or the port is not in 1..65535.
    """
    if written == ANY:
        raise ValueError(f'found "*" beside other origins, allowed is {_AN_ORIGIN}')
    if written.lower() == "null":  # pages in a sandboxed frame say so, and any page can make one
        raise ValueError(f"found {quoted(written)}, which any page can be, allowed is {_AN_ORIGIN}")
    match = _ORIGIN.match(written)
    if match is None or match.end() < len(written):
        hint = f", did you mean {shown(match[0])}?" if match and written[match.end()] == "/" else ""
        raise ValueError(found(written, _AN_ORIGIN) + hint)
    port, site = int(match["port"] or 0), match["site"].lower()
    if match["port"] is None or port == _DEFAULT_PORTS.get(match["scheme"].lower()):
        return site
    if not 1 <= port <= MAX_PORT:
        raise ValueError(f"found port {port} in {shown(written)}, allowed is 1 to {MAX_PORT}")
    return f"{site}:{port}"


# ---- proxies ------------------------------------------------------------------------------


def read_proxies(written: Iterable[str], mistakes: Mistakes) -> tuple[Network, ...]:
    """The networks, each once."""
    networks: dict[Network, None] = {}
    for index, text in enumerate(written):
        try:
            networks[_parse_network(text)] = None
        except ValueError as exc:
            mistakes.add(("trusted_proxies", index), str(exc))
    return tuple(networks)


def _parse_network(written: str) -> Network:
    """The network, of one address where there is no slash.

    Raises:
        ValueError: it is none, or an address within one.
    """
    try:
        if "%" in written:  # a zone means something on one machine only
            raise ValueError
        meant = ip_interface(written).network
    except ValueError:
        raise ValueError(found(written, _A_NETWORK)) from None
    try:
        return ip_network(written)
    except ValueError:
        text = f"found {quoted(written)}, which is an address within a network, allowed is {_A_NETWORK}"
        raise ValueError(f'{text}, did you mean "{meant}"?') from None
