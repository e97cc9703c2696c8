"""A model's table as it is written, and the tables that peers write in the same way.

`None` means "not written"; what that comes to is decided in `model` and `traffic`.
"""

# ruff: noqa: RUF009 - `key` declares a field, as attrs.field does

from __future__ import annotations

from typing import Any, Final

import attrs

from trioswap.config.keys import key
from trioswap.config.kinds import Command, Count, Duration, Factor, Json, Need, Number, Patience, Whole
from trioswap.config.schema import MODALITIES, PORT_OWNERS, STOP_SIGNALS

_AS_ABOVE: Final = "as for all models"

MACROS: Final = (
    "Texts, numbers, true or false by name, for use as `${NAME}` in the values of {where}. A name is of 1 to 63"
    " letters, digits, `_` and `-`; a macro may use those that stand before it. `${env.NAME}` is a variable of the"
    " environment, without being declared."
)


@attrs.frozen
class RawFilters:
    """A table `filters`, of a model or a peer."""

    strip_params: list[str] | None = key(
        "Fields that are taken out of JSON requests, so that the server's own settings hold. `model` always stays."
        " A dot leads into an object: `options.seed`.",
        default="[]",
    )
    set_params: dict[str, Json] | None = key(
        "Fields that JSON requests get, whatever the client says, with their values; names as in `strip_params`."
        " `model` cannot be set.",
        default="{}",
    )
    set_params_by_id: dict[str, dict[str, Json]] | None = key(
        "The same for single names that a client may ask for: tables like `set_params` by name, which win over it."
        " For a model each such name is an alias, too.",
        yaml="setParamsByID",
        default="{}",
    )


@attrs.frozen
class RawTimeouts:
    """A table `timeouts`, of a model or a peer."""

    connect: Duration | None = key("How long connecting may take; 0: no limit.", default="30", unit="s")
    keepalive: Duration | None = key(
        "The time between TCP keep-alive probes; 0: none are sent.", default="30", unit="s"
    )
    response_header: Duration | None = key(
        "How long the head of the answer may take; 0: no limit.", default="0, for peers 60", unit="s"
    )
    tls_handshake: Duration | None = key("How long the TLS handshake may take; 0: no limit.", default="10", unit="s")
    expect_continue: Duration | None = key(
        "How long a body that was announced with `Expect: 100-continue` waits to be asked for; 0: not at all.",
        default="1",
        unit="s",
    )
    idle_conn: Duration | None = key(
        "How long a connection without requests is kept open; 0: no limit.", default="90", unit="s"
    )


@attrs.frozen
class RawCapabilities:
    """A table `capabilities`: what `/v1/models` says that the model can do."""

    in_: list[str] | None = key("What it takes.", default="[]", choices=MODALITIES)
    out: list[str] | None = key("What it gives.", default="[]", choices=MODALITIES)
    tools: bool | None = key("Whether it calls tools.", default="false")
    reranker: bool | None = key("Whether it ranks documents.", default="false")
    context: Whole | None = key("Length of its context; 0: not said.", default="0", unit="tokens")


@attrs.frozen
class RawCompat:
    """A table `compat`: concessions to servers that do as they please."""

    ignore_websockets: bool | None = key(
        "Whether websockets neither load the model nor keep it from being unloaded. Always so for a model named"
        " `comfyui_auto`.",
        default="false",
    )


@attrs.frozen
class RawModelHooks:
    """A table `[models.NAME.hooks]`: commands around the life of the server."""

    before_start: Command | None = key(
        "Run before the server is started, each time. When it fails or is late, so has the start. `${PORT}` and"
        " `${MODEL_ID}` are filled in here and below.",
        default="none",
    )
    after_ready: Command | None = key(
        "Run once the server is ready; it gets no request before this has ended. When it fails or is late, the server"
        " is stopped again. `${PID}` is the server's process.",
        default="none",
    )
    before_stop: Command | None = key(
        "Run before the server is asked to end, but not when it has crashed or hangs, or was never ready. `${PID}` is"
        " the server's process. A failure is logged and changes nothing.",
        default="none",
    )
    after_stop: Command | None = key(
        "Run when nothing of the server is left, however that came, also after a start that failed. A failure is"
        " logged and changes nothing.",
        default="none",
    )


@attrs.frozen
class RawModel:
    """A table `[models.NAME]`."""

    cmd: Command | None = key(
        "The command that starts the server: text that is split as in a shell (but no shell runs), or an array of"
        " arguments. `${PORT}` is a port that trioswap picks, `${MODEL_ID}` the name of the model. In text a line that"
        " begins with `#` is a comment, and a backslash at the end of a line joins it to the next. Either this or"
        " `gguf` is needed.",
    )
    gguf: str | None = key(
        "Instead of `cmd`: a model file for the embedded llama.cpp engine (extra `llama`). Relative to the directory of"
        " the configuration; `~` is your home.",
    )
    args: list[str] | None = key("More arguments for the embedded engine, as `llama-server` knows them.", default="[]")
    cmd_stop: Command | None = key(
        "A command that stops the server, instead of the stop signal; `${PID}` is the server's process.",
        default="none, the signal is sent",
    )
    proxy: str | None = key(
        "Where the server is asked: `http://HOST[:PORT][/PATH]`. Needed when `cmd` does not use `${PORT}`.",
        default='"http://127.0.0.1:${PORT}"',
    )
    check_endpoint: str | None = key(
        'The path that answers 200 once the server is ready; `"none"`: it is ready as soon as it runs.',
        default='"/health"',
    )
    port_owner: str | None = key(
        'Who must listen on the port before the server counts as ready: `"child"`, the command or what it started;'
        ' `"any"` asks for nobody, as containers need it.',
        default='"child"',
        choices=PORT_OWNERS,
    )
    env: dict[str, str] | None = key(
        "Environment variables for the server, besides those of trioswap itself. In YAML also a list of `NAME=VALUE`.",
        default="{}",
    )
    aliases: list[str] | None = key("Other names under which clients may ask for the model.", default="[]")
    unlisted: bool | None = key(
        "Whether it is left out of `/v1/models`; it can be asked for all the same.", default="false"
    )
    name: str | None = key("Its name for people, in `/v1/models`.", default='""')
    description: str | None = key("A sentence about it, in `/v1/models`.", default='""')
    use_model_name: str | None = key(
        "The name that requests to the server carry in their field `model`, for servers that insist on one.",
        default="none, what the client wrote",
    )
    ttl: Duration | None = key(
        "Idle time after which it is unloaded; 0: never.", default="that of `global_ttl`", unit="s"
    )
    health_check_timeout: Patience | None = key(
        "How long the server may take from its start until it is ready; not 0.", default=_AS_ABOVE, unit="s"
    )
    unload_timeout: Duration | None = key(
        "How long it may take to end after the stop signal; then comes SIGKILL.", default=_AS_ABOVE, unit="s"
    )
    stop_signal: str | None = key("The signal that asks the server to end.", default='"SIGTERM"', choices=STOP_SIGNALS)
    never_kill: bool | None = key(
        "Whether its processes are never sent SIGKILL, for hardware that wedges on it. What has not ended after the"
        " grace is then left to itself, and its memory stays reserved until it has, by the next trioswap with the same"
        " `state_dir` too; the model is not started anew before. A service manager must not send SIGKILL either:"
        " `SendSIGKILL=no` for systemd.",
        default="false",
    )
    hooks: RawModelHooks | None = key(
        "Commands around the life of the server. They have its environment, and what they say is in its log."
    )
    hook_timeout: Patience | None = key(
        "How long each of the `hooks` may take; then it is killed. Not 0.", default="30", unit="s"
    )
    liveness: Duration | None = key(
        "The time between two looks whether the server still answers `check_endpoint`; 0: nobody looks.",
        default=_AS_ABOVE,
        unit="s",
    )
    liveness_misses: Count | None = key(
        "So many looks in a row must find no answer until the server is stopped as dead.",
        default=_AS_ABOVE,
        unit="looks",
    )
    backoff: Duration | None = key(
        "How long it is not tried again after a start that failed.", default=_AS_ABOVE, unit="s"
    )
    backoff_max: Duration | None = key("The longest that this grows to.", default=_AS_ABOVE, unit="s")
    max_wait: Duration | None = key(
        "How long its oldest request waits before the models in its way take no new requests.",
        default=_AS_ABOVE,
        unit="s",
    )
    queue_timeout: Duration | None = key(
        "How long a request for it waits before it is answered with 503; 0: as long as it takes.",
        default=_AS_ABOVE,
        unit="s",
    )
    drain_timeout: Duration | None = key(
        "How long a swap waits for requests that it is serving.", default=_AS_ABOVE, unit="s"
    )
    unload_drain_timeout: Duration | None = key("The same for unload and shutdown.", default=_AS_ABOVE, unit="s")
    turn_lease: Number | None = key("How long it keeps its turn after it was loaded.", default=_AS_ABOVE, unit="swaps")
    linger: Number | None = key("How long it stays with nothing to do.", default=_AS_ABOVE, unit="swaps")
    parallel: Count | None = key(
        "Requests sent to the server at the same time; the rest wait in trioswap.",
        default="that of `concurrency_limit`, else as for all models",
    )
    concurrency_limit: Count | None = key(
        "Requests that are let in at the same time, waiting ones included; the next are answered with 429.",
        default="no limit",
    )
    weight: Factor | None = key(
        "How fast the waiting of its requests counts, above 0: with 2, a second counts as two.", default="1"
    )
    priority: int | None = key(
        "Among models that nobody has waited for too long, the highest is next; may be negative.", default="0"
    )
    load_cost: Duration | None = key(
        "What a start is expected to take until starts have been measured.", default="a guess", unit="s"
    )
    stop_cost: Duration | None = key("The same for a stop.", default="a guess", unit="s")
    memory: Need | None = key(
        'The memory it needs: a size, or a table of sizes by device, `{ gpu0 = "1GiB", ram = "500MiB" }`.',
        default="what has been measured or can be guessed",
        unit="bytes",
    )
    device: str | None = key(
        'The device on which it needs that: a name, or `"auto"`, which is any GPU, or `"ram"` where there is none.',
        default='"auto"',
    )
    filters: RawFilters | None = key("What is changed in requests on their way to the server.")
    timeouts: RawTimeouts | None = key("How long trioswap waits for the server in single steps.")
    capabilities: RawCapabilities | None = key("What `/v1/models` says that it can do.")
    metadata: dict[str, Json] | None = key("Anything else for `/v1/models`, under `meta.llamaswap`.", default="{}")
    send_loading_state: bool | None = key(
        "Whether streaming clients see the progress of loading as reasoning text.", default=_AS_ABOVE
    )
    compat: RawCompat | None = key("Concessions to servers that do as they please.")
    macros: dict[str, Any] | None = key(
        MACROS.replace("{where}", "this model, before those of the file with the same name"), default="{}"
    )
