"""The frozen parts of a configuration around its models and its rule of residency.

What happens to requests on their way, names beside those of models, and what the daemon
does besides serving.  Durations are seconds (float), sizes are bytes (int).
"""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Final

import attrs

# llama-swap's defaults (core reference 1.10), the fifth from its code.
CONNECT: Final = 30.0
KEEPALIVE: Final = 30.0
TLS_HANDSHAKE: Final = 10.0
EXPECT_CONTINUE: Final = 1.0
IDLE_CONN: Final = 90.0
PEER_RESPONSE_HEADER: Final = 60.0
"""Of a peer only: a local server may take as long as a long prompt takes it."""
# llama-swap's default, and the least it takes (core reference 1.7).
PERFORMANCE_EVERY: Final = 5.0
# Ollama keeps a model so long that nobody asks for (OLLAMA_KEEP_ALIVE): about as long as a person thinks.
IDLE_AFTER: Final = 300.0
# llama-swap's default, in its spelling (core reference 1.7).
SESSION_HEADERS: Final = ("X-Session-ID", "X-Litellm-Session-Id")


@attrs.frozen
class FilterConfig:
    """What is changed in the JSON of requests, in this order (core reference 1.9).

    Fields are named by paths in which a dot leads into an object; `model` is never among them.
    """

    strip_params: tuple[str, ...] = ()
    """Fields that are taken out, sorted."""
    set_params: Mapping[str, object] = attrs.field(factory=dict)
    """Fields and their values, sorted."""
    set_params_by_id: Mapping[str, Mapping[str, object]] = attrs.field(factory=dict)
    """The same, by the name as the client wrote it."""


@attrs.frozen
class TimeoutConfig:
    """Seconds that single steps of a request may take; None: no limit, of `keepalive`: no probes."""

    connect: float | None = CONNECT
    keepalive: float | None = KEEPALIVE
    """Between two probes."""
    response_header: float | None = None
    tls_handshake: float | None = TLS_HANDSHAKE
    expect_continue: float | None = EXPECT_CONTINUE
    """Then the body is sent without having been asked for; None: at once."""
    idle_conn: float | None = IDLE_CONN


@attrs.frozen
class CapabilityConfig:
    """What the listing says that a model can do."""

    takes: tuple[str, ...] = ()
    gives: tuple[str, ...] = ()
    tools: bool = False
    reranker: bool = False
    context: int | None = None
    """Tokens."""


@attrs.frozen
class ProfileConfig:
    """Names that are sent elsewhere while the profile is active (core reference 1.14)."""

    name: str
    pins: Mapping[str, str | None]
    """requested name -> model, alias, selector or name at a peer; None: nobody answers to it."""
    description: str = ""


@attrs.frozen
class SelectorConfig:
    """A name that stands for one of several targets (core reference 1.15)."""

    name: str
    strategy: str
    """`pin`, `warm` or `spillover`."""
    targets: tuple[str, ...]
    """As written: models, aliases, or names at peers; never selectors."""
    spillover: int = 1
    """Requests at one target before a further one is started."""
    display_name: str = ""
    description: str = ""
    unlisted: bool = False
    metadata: Mapping[str, object] = attrs.field(factory=dict)


@attrs.frozen
class PeerConfig:
    """Another server whose models are offered along with ours (core reference 1.16)."""

    name: str
    proxy: str
    """Base URL, without a trailing slash."""
    models: tuple[str, ...]
    """As they are called there, each once."""
    api_key: str | None = attrs.field(default=None, repr=False)
    filters: FilterConfig = attrs.field(factory=FilterConfig)
    timeouts: TimeoutConfig = attrs.field(factory=lambda: TimeoutConfig(response_header=PEER_RESPONSE_HEADER))


@attrs.frozen
class HooksConfig:
    """What is done when something happens."""

    preload: tuple[str, ...] = ()
    """Models to load at the start, by their real names, each once."""
    idle_preload: tuple[str, ...] = ()
    """Models to load again when the others are not asked for any more, in the same manner."""
    idle_after: float = IDLE_AFTER
    """Seconds for which they are not, at the least."""


@attrs.frozen
class StoreConfig:
    """Where the list of past requests outlives the daemon."""

    path: Path
    """Absolute; whether it can be written, the daemon finds out."""


@attrs.frozen
class PerformanceConfig:
    """Measuring the load of the machine."""

    every: float = PERFORMANCE_EVERY


@attrs.frozen
class UiConfig:
    """The web pages."""

    session_headers: tuple[str, ...] = SESSION_HEADERS
    """Request headers that tell the session, the first that is there; equal in no two spellings."""


Network = IPv4Network | IPv6Network


@attrs.frozen
class KeyConfig:
    """A key of a client that has a name, and what it may do."""

    name: str
    digest: bytes = attrs.field(repr=False)
    """SHA-256 of the key: the key itself is not kept."""
    models: tuple[str, ...] | None = None
    """Patterns (`*` is any text) of the names that may be asked for; None: all."""
    endpoints: tuple[str, ...] | None = None
    """Patterns of the paths that may be asked; None: all that the rest allows."""
    peers: bool = True
    """Models of peers may be asked for."""
    admin: bool = False
    """Models may be loaded and unloaded, logs, events and others' requests seen."""
    read_only: bool = False
    """Only what is listed may be seen; no model is asked."""
    weight: float | None = None
    """How fast the waiting of its requests counts, above 0; None: as the model says."""
    concurrency: int | None = None
    """Its requests that are let in at the same time, waiting ones included; None: all."""


@attrs.frozen
class TlsConfig:
    """Serving over TLS; both files are PEM, and their paths absolute."""

    cert_file: Path
    key_file: Path


@attrs.frozen
class CorsConfig:
    """Which web pages may ask."""

    origins: tuple[str, ...] | None = None
    """Origins such as `https://chat.example`, or `*` alone; None: all where keys are asked for, else of this host."""
    private_network: bool = False
    """Pages from the internet may ask this address of a private network."""
