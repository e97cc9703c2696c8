"""The configuration file as it is written: classes that mirror it, and their reader.

Here only shapes are judged: known keys, right types, values that can be read at all.
`None` means "not written"; what that comes to is decided in `resolve`.  A model's table is
in `raw_model`, those about who may ask are in `raw_access`, what is done by itself in `raw_hooks`.
"""

# ruff: noqa: RUF009 - `key` declares a field, as attrs.field does

from __future__ import annotations

from typing import Any

import attrs

from trioswap.config.keys import key
from trioswap.config.kinds import Amount, Capacity, Count, Duration, Json, Number, Patience, Secret, Size
from trioswap.config.mistakes import Mistakes, Path
from trioswap.config.raw_access import RawCors, RawKey, RawTls
from trioswap.config.raw_hooks import RawHooks
from trioswap.config.raw_model import MACROS, RawFilters, RawModel, RawTimeouts
from trioswap.config.schema import LOG_LEVELS, LOG_TARGETS, POLICIES, STRATEGIES, TIME_FORMATS
from trioswap.config.strict import Wrong, structure


@attrs.frozen
class RawGroup:
    """A table `[groups.NAME]`."""

    swap: bool | None = key("Whether at most one member is resident.", default="true")
    exclusive: bool | None = key("Whether a member that starts puts out the models of other groups.", default="true")
    persistent: bool | None = key("Whether members are never put out for a model of another group.", default="false")
    members: list[str] | None = key("The models in it, by name; each model is in one group at most.", default="[]")


@attrs.frozen
class RawMatrix:
    """The table `[matrix]`."""

    vars: dict[str, str] | None = key(
        "Short names for models, of 1 to 32 letters, digits, `.` and `-`, for use in the sets and costs.", default="{}"
    )
    evict_costs: dict[str, Count] | None = key(
        "What putting a model out costs, by var or name; the cheapest go. 1 for those that are not here.",
        yaml="evict_costs",
        default="{}",
    )
    sets: dict[str, str] | None = key(
        "Combinations by name: `&` is together with, `|` is or, `+NAME` is what another set says.", required=True
    )


@attrs.frozen
class RawMemory:
    """The table `[memory]`."""

    headroom: Amount | None = key("What is kept free on each device.", default='"512MiB"', unit="bytes")
    yield_to_others: bool | None = key(
        "Whether models with nothing to do go when other programs need the memory.", default="false"
    )
    learn: bool | None = key("Whether what models need is measured while they run.", default="true")
    devices: dict[str, Capacity] | None = key(
        'How large each device is, by name (`ram`, `gpu0`, `gpu1`, ...), or `"auto"` to ask the machine. What is not'
        " in it is not used.",
        default="all that the machine has",
        unit="bytes",
    )


@attrs.frozen
class RawStore:
    """The table `[store]`."""

    path: str | None = key(
        "The SQLite file in which the list of past requests is kept. Relative to the directory of the configuration;"
        " `~` is your home.",
        required=True,
    )


@attrs.frozen
class RawActivity:
    """The table `[ui.activity]`."""

    session_id: list[str] | None = key(
        "Request headers that tell which session a request belongs to, the first that is there; an empty array: none.",
        yaml="session_id",
        default='["X-Session-ID", "X-Litellm-Session-Id"]',
    )


@attrs.frozen
class RawUi:
    """The table `[ui]`."""

    activity: RawActivity | None = key("The page of past requests.")


@attrs.frozen
class RawPerformance:
    """The table `[performance]`."""

    disabled: bool | None = key("Whether the load of the machine is not measured.", default="false")
    every: Duration | None = key("The time between two measurements; 5 seconds or more.", default="5", unit="s")


@attrs.frozen
class RawUpstream:
    """The table `[upstream]`: the paths `/upstream/MODEL/...`."""

    ignore_paths: list[str] | None = key(
        "Requests whose path behind the model's name matches one of these regular expressions never load a model. They"
        " are in the dialect of Python's `re`, at most 64 of 500 characters, and match anywhere in the path unless"
        " they say `^` or `$`; an empty array: every path loads.",
        default=r"['\.(js|json|css|png|gif|jpe?g|ico|txt)$']",
    )


@attrs.frozen
class RawProfile:
    """A table `[profiles.NAME]`."""

    description: str | None = key("A sentence about it, for people.", default='""')
    pins: dict[str, str | None] | None = key(
        "What requests for a name are sent to while the profile is active: a model, an alias, a selector or a peer's"
        " model; an empty text: to nobody.",
        required=True,
    )


@attrs.frozen
class RawSelectorSettings:
    """A table `[selectors.NAME.settings]`."""

    spillover: Count | None = key("For `spillover`: requests at one target before the next is started.", default="1")


@attrs.frozen
class RawSelector:
    """A table `[selectors.NAME]`."""

    strategy: str | None = key(
        'How the target is chosen: `"pin"`, always the first; `"warm"`, the first that is loaded; `"spillover"`, the'
        " one with the fewest requests, and a further one when all have enough.",
        required=True,
        choices=STRATEGIES,
    )
    targets: list[str] | None = key(
        "Models, aliases or peers' models, in the order of preference. Those of `warm` are local; local ones of"
        " `spillover` must be able to be resident together.",
        required=True,
    )
    settings: RawSelectorSettings | None = key("Settings of single strategies.")
    name: str | None = key("Its name for people, in `/v1/models`.", default='""')
    description: str | None = key("A sentence about it, in `/v1/models`.", default='""')
    unlisted: bool | None = key("Whether it is left out of `/v1/models`.", default="false")
    metadata: dict[str, Json] | None = key("Anything else for `/v1/models`, under `meta.llamaswap`.", default="{}")


@attrs.frozen
class RawPeer:
    """A table `[peers.NAME]`."""

    proxy: str | None = key("Where the peer is asked: `http[s]://HOST[:PORT][/PATH]`.", required=True)
    api_key: Secret | None = key("The key that requests to the peer carry.", default='""')
    models: list[str] | None = key(
        "What the peer offers. Clients ask for `PEER/MODEL`, or for `MODEL` where nobody else has that name.",
        required=True,
    )
    filters: RawFilters | None = key("What is changed in requests on their way to the peer.")
    timeouts: RawTimeouts | None = key("How long trioswap waits for the peer in single steps.")


@attrs.frozen
class RawConfig:
    """The whole file."""

    listen: str | None = key(
        "Where clients connect, `HOST:PORT`, or `unix:/PATH` of a socket. `0.0.0.0:8080` listens on every interface,"
        " port 0 lets the system choose.",
        default='"127.0.0.1:8080"',
    )
    api_keys: list[Secret] | None = key(
        "Keys of which clients must show one, or one of `keys`; these may do everything. Where there are none at all,"
        " nobody is asked.",
        default="[]",
    )
    log_level: str | None = key("How much is logged.", default='"info"', choices=LOG_LEVELS)
    log_time_format: str | None = key(
        "How our lines of the log tell the time, in Go's words and the local time zone; empty: not at all.",
        default="UTC, as 2026-01-31T12:00:00Z",
        choices=TIME_FORMATS,
    )
    log_to_stdout: str | None = key(
        'Whose lines go to the standard output: `"proxy"`, our own; `"upstream"`, those of the model servers; `"both"`;'
        ' `"none"`. Other lines go nowhere but to `/logs` and `log_dir`.',
        default="our own go to the standard error",
        choices=LOG_TARGETS,
    )
    log_dir: str | None = key(
        "A directory for log files: `trioswap.log`, and `model-NAME.log` for each model server. Relative to the"
        " directory of the configuration; `~` is your home.",
        default="none",
    )
    log_file_size: Size | None = key(
        "The size at which such a file is renamed to `NAME.1` and a new one begins; 4KiB or more.",
        default='"10MiB"',
        unit="bytes",
    )
    log_files: Count | None = key(
        "How many such files of each name are kept, the current one included.", default="3", unit="files"
    )
    log_requests: bool | None = key("Accepted from older files, and without effect.", default="false")
    start_port: int | None = key(
        "The first port for `${PORT}`. Models that use it get one each, in the order of their names.", default="5800"
    )
    max_request_body: Size | None = key(
        "The largest request body of those that must be read whole: JSON and forms.", default='"128MiB"', unit="bytes"
    )
    max_upload: Size | None = key(
        "The largest request body of those that are passed on as they come: forms with files, and what goes through"
        " `/upstream`.",
        default='"4GiB"',
        unit="bytes",
    )
    state_dir: str | None = key(
        "Where what trioswap learns about models is kept, a directory. Relative to the directory of the configuration;"
        " `~` is your home.",
        default="`$STATE_DIRECTORY` (systemd's), else `$XDG_STATE_HOME/trioswap`, else `~/.local/state/trioswap`",
    )
    policy: str | None = key(
        'Who is next: `"lease"`, who has waited longest, but a model that was just loaded keeps its turn for a while;'
        ' `"fifo"`, by priority and then by arrival, as llama-swap does it.',
        default='"lease"',
        choices=POLICIES,
    )
    max_queue: Count | None = key(
        "Requests that wait at the same time, for all models together; the next are answered with 503.",
        default="1000",
        unit="requests",
    )
    heartbeat: Duration | None = key(
        "How long a streaming answer stays silent that waits for its model, or for the first event of its server: then"
        " it begins with a comment, and goes on with one each time so much has passed; 0: it stays silent.",
        default="5",
        unit="s",
    )
    trusted_proxies: list[str] | None = key(
        "Proxies that are believed where a request came from (`X-Forwarded-For`): addresses, or networks such as"
        " `10.0.0.0/8`.",
        default="[]",
    )
    parallel_loads: Count | None = key("Models that load at the same time.", default="1")
    global_ttl: Duration | None = key(
        "Idle time after which a model is unloaded; 0: never. For one model: `ttl`.",
        yaml="globalTTL",
        default="0",
        unit="s",
    )
    health_check_timeout: Patience | None = key(
        "How long a server may take from its start until it is ready; not 0.", default="120", unit="s"
    )
    unload_timeout: Duration | None = key(
        "How long a server may take to end after the stop signal; then comes SIGKILL.", default="10", unit="s"
    )
    liveness: Duration | None = key(
        "The time between two looks whether a server still answers. One that is at work on a request is not asked,"
        " because it may be too busy; one that has a request and computes nothing is. 0: nobody looks.",
        default="0",
        unit="s",
    )
    liveness_misses: Count | None = key(
        "So many looks in a row must find no answer until a server is stopped as dead.", default="3", unit="looks"
    )
    backoff: Duration | None = key(
        "How long a model whose start failed is not tried again: requests are answered with 503 at once, and nobody is"
        " put out for it. Twice as long after each more failure in a row; 0: it is always tried.",
        default="1",
        unit="s",
    )
    backoff_max: Duration | None = key("The longest that this grows to.", default="60", unit="s")
    max_wait: Duration | None = key(
        "How long a request waits for a model that is not resident before the models in its way take no new requests.",
        default="60",
        unit="s",
    )
    queue_timeout: Duration | None = key(
        "How long a request waits before it is answered with 503; 0: as long as it takes.", default="0", unit="s"
    )
    drain_timeout: Duration | None = key(
        "How long a swap then waits for the requests that a model is still serving, before it cuts them off.",
        default="until they are done",
        unit="s",
    )
    unload_drain_timeout: Duration | None = key("The same for unload and shutdown.", default="30", unit="s")
    turn_lease: Number | None = key(
        "How long a model that was just loaded keeps its turn, counted in what its swap took (stop and load), but"
        " never longer than `max_wait` or one swap, whichever is longer; 0: no turns.",
        default="4",
        unit="swaps",
    )
    linger: Number | None = key(
        "How long at most a model with nothing to do stays although another is asked for, when its next request is"
        " likely to come soon; 0: it does not stay.",
        default="1",
        unit="swaps",
    )
    parallel: Count | None = key(
        "Requests sent to one server at the same time; the rest wait in trioswap.", default="10"
    )
    send_loading_state: bool | None = key(
        "Whether streaming clients see the progress of loading as reasoning text.", default="false"
    )
    include_aliases_in_list: bool | None = key("Whether `/v1/models` lists aliases as models.", default="false")
    metrics_max_in_memory: Count | None = key(
        "Past requests that are listed where no `store` keeps them.", default="1000", unit="requests"
    )
    capture_buffer: Amount | None = key(
        "Memory for the bodies of past requests and answers; 0: they are not kept. In YAML a whole number is in MiB.",
        default='"10MiB"',
        unit="bytes",
    )
    macros: dict[str, Any] | None = key(MACROS.replace("{where}", "the whole file, its models included"), default="{}")
    models: dict[str, RawModel] | None = key("The models, by the name under which clients ask for them.")
    groups: dict[str, RawGroup] | None = key(
        "Models that share a rule about who puts out whom, by name. In YAML also under `routing.router.settings`."
    )
    matrix: RawMatrix | None = key(
        "Instead of groups: the combinations of models that may be resident together. In YAML also under"
        " `routing.router.settings`."
    )
    memory: RawMemory | None = key("The memory of the machine, as the budget that models share.")
    keys: dict[str, RawKey] | None = key("Keys of clients that have names and may do less, by name.")
    tls: RawTls | None = key("Serving over TLS.", default="without")
    cors: RawCors | None = key("Which web pages may ask.")
    hooks: RawHooks | None = key("What is done when something happens.")
    profiles: dict[str, RawProfile] | None = key(
        "Sets of names that are sent elsewhere, by name; one of them can be made active while trioswap runs."
    )
    selectors: dict[str, RawSelector] | None = key("Names that stand for one of several models, chosen per request.")
    peers: dict[str, RawPeer] | None = key("Other servers whose models are offered along with ours, by name.")
    upstream: RawUpstream | None = key("Requests under `/upstream/MODEL/`.")
    store: RawStore | None = key("Where the list of past requests outlives trioswap.", default="it does not")
    performance: RawPerformance | None = key("The load of the machine over time.")
    ui: RawUi | None = key("The web pages.")


def read(document: dict[str, Any], mistakes: Mistakes) -> RawConfig:
    """The *document* as classes; what is wrong goes to *mistakes* and is left out.

    Changes *document*: wrong values are taken out of it, so that the rest can still be
    read and judged in the same run.
    """
    try:
        return structure(document, RawConfig)
    except Wrong as exc:
        wrong = exc.mistakes
    for path, text in wrong:
        mistakes.add(path, text)
        _mend(document, path)
    return structure(document, RawConfig)


def _mend(document: dict[str, Any], path: Path) -> None:
    """Take the wrong value at *path* out of *document*.

    What others may refer to keeps its place: list elements keep their indices; models,
    groups, devices, keys and the like keep their names.
    """
    *parents, last = path
    holder: Any = document
    for part in parents:
        holder = holder[part]
    match path:
        case (*_, int()):
            holder[last] = ""
        case ("models" | "groups" | "profiles" | "selectors" | "peers" | "keys", _):
            holder[last] = {}
        case ("memory", "devices", _):
            holder[last] = "auto"
        case _:
            del holder[last]
