"""The frozen configuration: what every reader produces and everyone else uses.

Inside, types are true: every value is resolved, `None` means "off", never "inherit".
Durations are seconds (float), sizes are bytes (int).
"""

from __future__ import annotations

import difflib
import re
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import attrs

from trioswap.config.matrix import MatrixConfig
from trioswap.config.parts import (
    CapabilityConfig,
    CorsConfig,
    FilterConfig,
    HooksConfig,
    KeyConfig,
    Network,
    PeerConfig,
    PerformanceConfig,
    ProfileConfig,
    SelectorConfig,
    StoreConfig,
    TimeoutConfig,
    TlsConfig,
    UiConfig,
)

# The first port given to a model that asks for ${PORT} (llama-swap, core reference 1.5).
START_PORT: Final = 5800
# llama-swap's healthCheckTimeout default and its unloadTimeout default (core reference 1.7).
HEALTH_CHECK_TIMEOUT: Final = 120.0
UNLOAD_TIMEOUT: Final = 10.0
# What lets a pull of an image or a mount over the network end, and no request wait for a hook that hangs.
HOOK_TIMEOUT: Final = 30.0
# As many as Kubernetes' failureThreshold: one late answer proves nothing.
LIVENESS_MISSES: Final = 3
# Kubernetes waits 10 s to 5 min between restarts of a container that fails (CrashLoopBackOff); here people wait.
BACKOFF: Final = 1.0
BACKOFF_MAX: Final = 60.0
# How long a claim waits before the gate of what is in its way closes (design 4, simulated: 30 and 60 are as good).
MAX_WAIT: Final = 60.0
# What unload and shutdown grant to requests being served; llama-swap's shutdown grants as much (core reference 4.4).
UNLOAD_DRAIN_TIMEOUT: Final = 30.0
# The best of what was simulated for turns, and for holding idle models, in swap costs (design 4).
TURN_LEASE: Final = 4.0
LINGER: Final = 1.0
# llama-swap's default for concurrencyLimit (core reference 1.8).
PARALLEL: Final = 10
# What drivers, other programs and wrong guesses are left on each device.
HEADROOM: Final = 512 * 2**20
AUTO: Final = "auto"
"""As the device of a model: any GPU, or host memory where there is none; as the size of a device: ask the machine."""
RAM: Final = "ram"
"""The name of host memory; every other device is a GPU."""
# Images travel in JSON bodies as base64; 128 MiB is ten times the largest a chat client sends today.
MAX_REQUEST_BODY: Final = 128 * 2**20
# What is passed on without having to be held in memory: files of speech are large, models of images even more.
MAX_UPLOAD: Final = 4 * 2**30
# Long before a proxy on the way gives up on a silent answer (60 s is the default of many).
HEARTBEAT: Final = 5.0
# More requests than a household has; each costs some 50 KB while it waits.
MAX_QUEUE: Final = 1000
# llama-swap's metricsMaxInMemory, and its captureBuffer as documented (core reference 1.7 and 1.18).
METRICS_MAX_IN_MEMORY: Final = 1000
CAPTURE_BUFFER: Final = 10 * 2**20
# What pages are made of, but no model is needed for (core reference 1.7).
IGNORE_PATHS: Final = (re.compile(r"\.(js|json|css|png|gif|jpe?g|ico|txt)$"),)

LOG_LEVELS: Final = ("debug", "info", "warning", "error")
LOG_TARGETS: Final = ("proxy", "upstream", "both", "none")
# Go's names of its formats, without a time at first (core reference 1.7).
TIME_FORMATS: Final = (
    "",
    "ansic",
    "unixdate",
    "rubydate",
    "rfc822",
    "rfc822z",
    "rfc850",
    "rfc1123",
    "rfc1123z",
    "rfc3339",
    "rfc3339nano",
    "kitchen",
    "stamp",
    "stampmilli",
    "stampmicro",
    "stampnano",
)
LOG_FILE_SIZE: Final = 10 * 2**20
# A page: what is less would be all renaming.
LEAST_LOG_FILE_SIZE: Final = 4096
POLICIES: Final = ("lease", "fifo")
PORT_OWNERS: Final = ("child", "any")
# Signals that ask a server to end.  SIGKILL asks nothing, but some servers deserve no better.
STOP_SIGNALS: Final = ("SIGTERM", "SIGINT", "SIGQUIT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGKILL")
MODALITIES: Final = ("text", "audio", "image")
STRATEGIES: Final = ("pin", "warm", "spillover")


@attrs.frozen
class ModelHooks:
    """Commands around the life of a model's server, split and filled in; None: there is none."""

    before_start: tuple[str, ...] | None = None
    after_ready: tuple[str, ...] | None = None
    """May still contain ${PID}, as `before_stop` may."""
    before_stop: tuple[str, ...] | None = None
    after_stop: tuple[str, ...] | None = None


@attrs.frozen
class ModelConfig:
    """One model and the server that runs it."""

    name: str
    argv: tuple[str, ...]
    """The command, split and with ${PORT} and ${MODEL_ID} filled in; never empty."""
    proxy: str
    """Base URL of the model server, without a trailing slash."""
    stop_argv: tuple[str, ...] | None = None
    """Run instead of the stop signal; may still contain ${PID}."""
    check_endpoint: str | None = "/health"
    """Path that answers 200 when the server is ready; None: ready as soon as it runs."""
    port: int | None = attrs.field(default=None, eq=False)
    """What ${PORT} has become, which shows in `argv`, `proxy` and so on; None: it is not used."""
    port_owner: str = "child"
    """`child`: the port must be listened on by our child's process tree; `any`: by whom is not asked (containers)."""
    env: Mapping[str, str] = attrs.field(factory=dict)
    aliases: tuple[str, ...] = ()
    """Those that are written, then the names in `filters.set_params_by_id` that are not among them."""
    unlisted: bool = False
    display_name: str = ""
    description: str = ""
    use_model_name: str | None = None
    """What the field `model` of requests says to the server; None: what the client wrote."""
    ttl: float | None = None
    """Idle seconds after which the model is unloaded."""
    health_check_timeout: float = HEALTH_CHECK_TIMEOUT
    """Seconds from the decision to spawn it within which the server must be ready."""
    unload_timeout: float = UNLOAD_TIMEOUT
    """Grace in seconds between the stop signal and SIGKILL."""
    stop_signal: signal.Signals = signal.SIGTERM
    never_kill: bool = False
    """Its processes never get SIGKILL: who has not ended after the grace is left to itself, its memory reserved."""
    hooks: ModelHooks = attrs.field(factory=ModelHooks)
    hook_timeout: float = HOOK_TIMEOUT
    """Seconds that each of them may take."""
    liveness: float | None = None
    """Seconds between two looks whether an idle or stalled server still answers; None: nobody looks."""
    liveness_misses: int = LIVENESS_MISSES
    """So many looks in a row must find no answer until it counts as dead."""
    backoff: float = BACKOFF
    """Seconds for which it is not tried again after a start that failed; twice as many after each more in a row."""
    backoff_max: float = BACKOFF_MAX
    """But never more than these."""
    max_wait: float = MAX_WAIT
    """Seconds its oldest request waits before the gate of what is in its way closes."""
    drain_timeout: float | None = None
    """Seconds that a swap waits for requests this model is serving; None: until they are done."""
    unload_drain_timeout: float = UNLOAD_DRAIN_TIMEOUT
    """The same for unload and shutdown, which are always bounded."""
    turn_lease: float = TURN_LEASE
    """A fresh turn is protected for so many times its own swap cost, but never longer than max(max_wait, one swap)."""
    linger: float = LINGER
    """When idle, it is held for at most so many times its swap cost; 0: not at all."""
    parallel: int = PARALLEL
    """Requests sent to its server at the same time; the rest wait in trioswap."""
    concurrency_limit: int | None = None
    """Requests let in at the same time, waiting ones included; None: all."""
    queue_timeout: float | None = None
    """Seconds that a request waits before it is answered with 503; None: for ever."""
    weight: float = 1.0
    """How fast the waiting of its requests counts; above 0."""
    priority: int = 0
    """Who is next among those that are not overdue: the highest."""
    load_cost: float | None = None
    """Seconds a start is expected to take until starts have been measured; None: not said."""
    stop_cost: float | None = None
    """The same for a stop."""
    memory: Mapping[str, int] | int | None = None
    """Bytes it needs: of each of these devices, or of the one in `device`; None: not said."""
    device: str | None = None
    """Where `memory` is needed unless that says it; None is as good as "auto"."""
    filters: FilterConfig = attrs.field(factory=FilterConfig)
    timeouts: TimeoutConfig = attrs.field(factory=TimeoutConfig)
    capabilities: CapabilityConfig | None = None
    metadata: Mapping[str, object] = attrs.field(factory=dict)
    send_loading_state: bool = False
    """Streaming clients see the progress of loading."""
    ignore_websockets: bool = False
    """Websockets neither load it nor keep it from being unloaded."""


@attrs.frozen
class GroupConfig:
    """Models that share a rule about living together (core reference 1.11)."""

    name: str
    members: tuple[str, ...]
    swap: bool = True
    """At most one member is resident."""
    exclusive: bool = True
    """A member that starts puts out the models of other groups."""
    persistent: bool = False
    """Members are never put out for a model of another group."""


@attrs.frozen
class MemoryConfig:
    """The budget that the memory of the machine is."""

    headroom: int = HEADROOM
    """Bytes kept free on each device."""
    yield_to_others: bool = False
    """Idle models go when other programs need the memory."""
    learn: bool = True
    """What models need is measured while they run."""
    devices: Mapping[str, int | None] | None = None
    """Bytes of each device, None: ask the machine; None as a whole: find the devices, too."""


@attrs.frozen
class Config:
    """The whole configuration.

    Which models may be resident together is ruled by `groups`, by `matrix`, by `memory`,
    or by memory along with one of the other two; there is always a rule.
    """

    models: Mapping[str, ModelConfig] = attrs.field(factory=dict)
    groups: tuple[GroupConfig, ...] = ()
    """Where groups alone rule, every model is in one: those in no written group are in "(default)"."""
    matrix: MatrixConfig | None = None
    memory: MemoryConfig | None = attrs.field()

    @memory.default
    def _rule_alone(self) -> MemoryConfig | None:
        return None if self.groups or self.matrix is not None else MemoryConfig()

    policy: str = "lease"
    """Who is next: `lease`, by waiting and turns; `fifo`, by arrival as llama-swap does it."""
    parallel_loads: int = 1
    """Models that load at the same time."""
    start_port: int = START_PORT
    """The lowest port that a model with ${PORT} is given."""
    listen: str = "127.0.0.1:8080"
    api_keys: tuple[str, ...] = attrs.field(default=(), repr=False)
    """Clients must show one of them, or one of `keys`; where there are none nobody is asked. They may do everything."""
    keys: Mapping[str, KeyConfig] = attrs.field(factory=dict)
    """Keys with names, which may do less."""
    tls: TlsConfig | None = None
    cors: CorsConfig = attrs.field(factory=CorsConfig)
    trusted_proxies: tuple[Network, ...] = ()
    """Whose word counts for where a request came from (X-Forwarded-For)."""
    heartbeat: float | None = HEARTBEAT
    """Seconds until a stream that waits for its model begins with comments, and between two; None: it does not."""
    max_queue: int = MAX_QUEUE
    """Requests that wait at the same time, for all models together."""
    log_level: str = "info"
    log_time_format: str | None = None
    """How our lines of the log tell the time, one of TIME_FORMATS; empty: not at all; None: in our own way."""
    log_to_stdout: str | None = None
    """Whose lines go to the standard output, one of LOG_TARGETS; None: our own, to the standard error."""
    log_dir: Path | None = None
    """An absolute path: where log files are kept; None: there are none."""
    log_file_size: int = LOG_FILE_SIZE
    """Bytes of a log file at most."""
    log_files: int = 3
    """Log files of each name that are kept."""
    max_request_body: int = MAX_REQUEST_BODY
    """Bytes of a body that must be read whole to be understood: JSON and forms."""
    max_upload: int = MAX_UPLOAD
    """Bytes of any other body: multipart forms with files, and what goes through `/upstream`."""
    state_dir: Path | None = None
    """An absolute path: where the daemon keeps what it learns; None: it chooses."""
    include_aliases_in_list: bool = False
    metrics_max_in_memory: int = METRICS_MAX_IN_MEMORY
    """Past requests that are listed without a `store`."""
    capture_buffer: int | None = CAPTURE_BUFFER
    """Bytes for the bodies of past requests and answers."""
    profiles: Mapping[str, ProfileConfig] = attrs.field(factory=dict)
    selectors: Mapping[str, SelectorConfig] = attrs.field(factory=dict)
    peers: Mapping[str, PeerConfig] = attrs.field(factory=dict)
    hooks: HooksConfig = attrs.field(factory=HooksConfig)
    ignore_paths: tuple[re.Pattern[str], ...] = IGNORE_PATHS
    """Requests under `/upstream/MODEL` whose path one of them is found in never load a model."""
    store: StoreConfig | None = None
    performance: PerformanceConfig | None = attrs.field(factory=PerformanceConfig)
    ui: UiConfig = attrs.field(factory=UiConfig)
    _not_acted_on: tuple[str, ...] = attrs.field(default=(), eq=False, repr=False)

    def not_acted_on(self) -> tuple[str, ...]:
        """Key paths that are written, and that this version reads and judges but does not act on yet."""
        return self._not_acted_on

    def resolve(self, requested: str) -> str | None:
        """Name of the model that *requested* stands for (itself or an alias), or None."""
        if requested in self.models:
            return requested
        return self._aliases.get(requested)

    def similar(self, requested: str) -> str | None:
        """The listed name most like *requested*, for "did you mean"."""
        names = [model.name for model in self.models.values() if not model.unlisted]
        return next(iter(difflib.get_close_matches(requested, names, n=1)), None)

    _aliases: Mapping[str, str] = attrs.field(init=False, repr=False, eq=False)

    @_aliases.default
    def _index_aliases(self) -> dict[str, str]:
        return {alias: model.name for model in self.models.values() for alias in model.aliases}

    longest_name: int = attrs.field(init=False, repr=False, eq=False)
    """Characters of the longest model name or alias."""

    @longest_name.default
    def _measure_names(self) -> int:
        return max(map(len, [*self.models, *self._aliases]), default=0)
