"""One model from what is written to what is meant: command, placeholders, inheritance.

After a mistake a stand-in goes on in its place, so that the rest of the file can be
judged too; a configuration with mistakes is never handed out, so no stand-in gets
anywhere.  What can be seen from the resolved values alone is judged in `checks`.
"""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path as FilePath
from typing import Any, Final, TypeVar

import attrs

from trioswap.config.command import UnterminatedQuote, placeholders, split, substitute
from trioswap.config.kinds import Command, Json
from trioswap.config.mistakes import Mistakes, did_you_mean, found, quoted
from trioswap.config.parts import CapabilityConfig
from trioswap.config.raw import RawConfig
from trioswap.config.raw_model import RawCapabilities, RawCompat, RawFilters, RawModel, RawModelHooks
from trioswap.config.schema import STOP_SIGNALS, ModelConfig, ModelHooks
from trioswap.config.traffic import auto_aliases, read_filters, read_timeouts

T = TypeVar("T")

DEFAULT_PROXY: Final = "http://127.0.0.1:${PORT}"
# The model behind llama-swap's /comfyui/: its pages hold many connections, and websockets
# that live as long as a page is open (core reference 1.8).
_COMFYUI: Final = "comfyui_auto"
_COMFYUI_PARALLEL: Final = 50

# What a shell takes as a variable name too.
_ENV_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ENDPOINT: Final = re.compile(r"/[!-~]*")
# Read for the defaults of the schema; its own three values mean nothing.
_DEFAULTS: Final = ModelConfig(name="", argv=("",), proxy="")
# It is known when the command runs, not now.
_PID_LATER: Final = {"PID": "${PID}"}


def given(*values: T | None, default: T) -> T:
    """The first of *values* that is written, else *default*."""
    return next((value for value in values if value is not None), default)


@attrs.define(eq=False)
class ModelReader:
    """Turns one `[models.NAME]` into a ModelConfig, in two steps: ports are given out in between."""

    name: str
    written: RawModel
    inherited: RawConfig
    directory: FilePath
    """What a relative `gguf` is relative to."""
    mistakes: Mistakes
    words: tuple[str, ...] = attrs.field(init=False)
    """The arguments of `cmd` with their placeholders; empty with `gguf`."""
    uses_port: bool = attrs.field(init=False)
    """Whether the model is to be given a port."""

    def __attrs_post_init__(self) -> None:
        self.words = self._words(self.written.cmd, "cmd")
        if self.written.cmd is not None and self.written.gguf is not None:
            self._wrong("gguf", text="found gguf beside cmd, allowed is one of them")
        elif self.written.cmd is None and self.written.gguf is None and not self._is_wrong("gguf"):
            self._wrong("cmd", text="found neither cmd nor gguf, allowed is one of them")
        # What is wrong may well have meant ${PORT}: no second mistake out of the first.
        uncertain = self._is_wrong("cmd") or self._is_wrong("gguf")
        beyond_id = any(name != "MODEL_ID" for name in _names(self.words))
        self.uses_port = uncertain or beyond_id or self.written.gguf is not None

    def resolve(self, port: int | None) -> ModelConfig:
        """The model, with *port* (None: it uses none) filled in."""
        values = {"MODEL_ID": self.name} | ({} if port is None else {"PORT": str(port)})
        written, above = self._filled(values), self.inherited
        filters = read_filters(written.filters, ("models", self.name, "filters"), self.mistakes)
        return ModelConfig(
            name=self.name,
            argv=self._argv(values),
            port=port,
            proxy=self._proxy(values),
            stop_argv=self._stop_argv(values),
            check_endpoint=self._check_endpoint(values),
            port_owner=given(written.port_owner, default=_DEFAULTS.port_owner),
            env=self._env(values),
            aliases=(*(written.aliases or ()), *auto_aliases(filters, (self.name, *(written.aliases or ())))),
            unlisted=given(written.unlisted, default=_DEFAULTS.unlisted),
            display_name=given(written.name, default=_DEFAULTS.display_name),
            description=given(written.description, default=_DEFAULTS.description),
            use_model_name=written.use_model_name or None,
            ttl=given(written.ttl, above.global_ttl, default=0.0) or None,  # 0 says never
            health_check_timeout=given(
                written.health_check_timeout, above.health_check_timeout, default=_DEFAULTS.health_check_timeout
            ),
            unload_timeout=given(written.unload_timeout, above.unload_timeout, default=_DEFAULTS.unload_timeout),
            stop_signal=self._stop_signal(),
            never_kill=given(written.never_kill, default=_DEFAULTS.never_kill),
            hooks=self._hooks(written.hooks or RawModelHooks(), values),
            hook_timeout=given(written.hook_timeout, default=_DEFAULTS.hook_timeout),
            liveness=given(written.liveness, above.liveness, default=0.0) or None,  # 0 says never
            liveness_misses=given(written.liveness_misses, above.liveness_misses, default=_DEFAULTS.liveness_misses),
            backoff=given(written.backoff, above.backoff, default=_DEFAULTS.backoff),
            backoff_max=given(written.backoff_max, above.backoff_max, default=_DEFAULTS.backoff_max),
            max_wait=given(written.max_wait, above.max_wait, default=_DEFAULTS.max_wait),
            queue_timeout=given(written.queue_timeout, above.queue_timeout, default=0.0) or None,  # 0 says for ever
            drain_timeout=given(written.drain_timeout, above.drain_timeout, default=_DEFAULTS.drain_timeout),
            unload_drain_timeout=given(
                written.unload_drain_timeout, above.unload_drain_timeout, default=_DEFAULTS.unload_drain_timeout
            ),
            turn_lease=given(written.turn_lease, above.turn_lease, default=_DEFAULTS.turn_lease),
            linger=given(written.linger, above.linger, default=_DEFAULTS.linger),
            parallel=self._parallel(),
            concurrency_limit=self._concurrency_limit(),
            weight=given(written.weight, default=_DEFAULTS.weight),
            priority=given(written.priority, default=_DEFAULTS.priority),
            load_cost=written.load_cost,
            stop_cost=written.stop_cost,
            memory=written.memory,
            device=written.device,
            filters=filters,
            timeouts=read_timeouts(written.timeouts),
            capabilities=_capabilities(written.capabilities or RawCapabilities()),
            metadata=written.metadata or {},
            send_loading_state=given(written.send_loading_state, above.send_loading_state, default=False),
            ignore_websockets=(written.compat or RawCompat()).ignore_websockets or self.name == _COMFYUI,
        )

    # ---- the command --------------------------------------------------------------------

    def _words(self, command: Command | None, *key: str) -> tuple[str, ...]:
        if command is None:
            return ()
        try:
            words = split(command) if isinstance(command, str) else command
        except UnterminatedQuote as exc:
            self._wrong(*key, text=str(exc))
            return ()
        if not words or not words[0]:
            self._wrong(*key, text="found an empty command, allowed is a program with its arguments")
        return tuple(words)

    def _argv(self, values: Mapping[str, str]) -> tuple[str, ...]:
        arguments = self.written.args or ()
        if self.written.gguf is None:
            if arguments:
                self._wrong("args", text="found args without gguf, allowed is to write them into cmd")
            return self._fill(self.words, values, "cmd")
        engine = (sys.executable, "-m", "trioswap.engine", "--model", self._gguf(self.written.gguf))
        own = ("--port", values.get("PORT", ""), "--alias", self.name)
        return (*engine, *own, *self._fill(arguments, values, "args"))

    def _gguf(self, written: str) -> str:
        """The absolute path of the model file."""
        try:
            path = (self.directory / FilePath(written).expanduser()).absolute()
            if path.is_file():
                return str(path)
            problem = f"not a file: {path}" if path.exists() else f"no such file: {path}"
        except (OSError, RuntimeError) as exc:  # RuntimeError: a `~` without a home
            problem = f"cannot look at it: {getattr(exc, 'strerror', None) or exc}"
        self._wrong("gguf", text=f"{found(written, 'the path of a GGUF file')} ({problem})")
        return written

    def _stop_argv(self, values: Mapping[str, str]) -> tuple[str, ...] | None:
        return self._command(self.written.cmd_stop, {**values, **_PID_LATER}, "cmd_stop")

    def _hooks(self, written: RawModelHooks, values: Mapping[str, str]) -> ModelHooks:
        with_pid = {**values, **_PID_LATER}
        return ModelHooks(
            before_start=self._command(written.before_start, values, "hooks", "before_start"),
            after_ready=self._command(written.after_ready, with_pid, "hooks", "after_ready"),
            before_stop=self._command(written.before_stop, with_pid, "hooks", "before_stop"),
            after_stop=self._command(written.after_stop, values, "hooks", "after_stop"),
        )

    def _command(self, command: Command | None, values: Mapping[str, str], *key: str) -> tuple[str, ...] | None:
        return self._fill(self._words(command, *key), values, *key) or None

    # ---- the rest -----------------------------------------------------------------------

    def _proxy(self, values: Mapping[str, str]) -> str:
        written = given(self.written.proxy, default=DEFAULT_PROXY)
        has_port = "PORT" in placeholders(written)
        if self.written.proxy is None and not self.uses_port:
            self._wrong("proxy", text="found neither proxy nor ${PORT} in cmd, allowed is one of them or both")
        elif self.written.gguf is not None and self.written.cmd is None and not has_port:
            self._wrong("proxy", text=found(written, f"{DEFAULT_PROXY} beside gguf"))
        return self._fill([written], values, "proxy")[0].rstrip("/")

    def _check_endpoint(self, values: Mapping[str, str]) -> str | None:
        if self.written.check_endpoint is None:
            return _DEFAULTS.check_endpoint
        endpoint = self._fill([self.written.check_endpoint], values, "check_endpoint")[0]
        if endpoint == "none":
            return None
        if not _ENDPOINT.fullmatch(endpoint):
            self._wrong("check_endpoint", text=found(endpoint, 'a path such as "/health", or "none"'))
        return endpoint

    def _env(self, values: Mapping[str, str]) -> dict[str, str]:
        env = {}
        for key, value in (self.written.env or {}).items():
            if not _ENV_NAME.fullmatch(key):
                self._wrong(
                    "env", key, text=f"found the name {quoted(key)}, allowed are letters, digits and _, no digit first"
                )
            env[key] = self._fill([value], values, "env", key)[0]
        return env

    def _parallel(self) -> int:
        """Who lets in no more than so many means no more than so many at the server."""
        fallback = given(self.inherited.parallel, default=_DEFAULTS.parallel)
        if self.name == _COMFYUI:
            fallback = max(fallback, _COMFYUI_PARALLEL)
        return given(self.written.parallel, self._concurrency_limit(), default=fallback)

    def _concurrency_limit(self) -> int | None:
        written = self.written.concurrency_limit
        return max(written, _COMFYUI_PARALLEL) if written is not None and self.name == _COMFYUI else written

    def _stop_signal(self) -> signal.Signals:
        name = given(self.written.stop_signal, default=_DEFAULTS.stop_signal.name)
        if name == signal.SIGKILL.name and self.written.never_kill:
            self._wrong("stop_signal", text=found(name, "any other signal beside never_kill"))
        if name in STOP_SIGNALS:
            return signal.Signals[name]
        hint = did_you_mean(name, STOP_SIGNALS)
        self._wrong("stop_signal", text=found(name, f"one of {', '.join(STOP_SIGNALS)}") + hint)
        return _DEFAULTS.stop_signal

    # ---- placeholders and mistakes --------------------------------------------------------

    def _filled(self, values: Mapping[str, str]) -> RawModel:
        """What is written, with *values* filled into all that is not read by a method of its own."""
        written = self.written
        texts = ("name", "description", "use_model_name", "aliases")
        changes = {key: self._fill_within(getattr(written, key), values, key, typed=False) for key in texts}
        changes["metadata"] = self._fill_within(written.metadata, values, "metadata")
        if written.filters is not None:
            changes["filters"] = self._filled_filters(written.filters, values)
        return attrs.evolve(written, **changes)

    def _filled_filters(self, filters: RawFilters, values: Mapping[str, str]) -> RawFilters:
        """The only table whose keys have placeholders, too (core reference 1.4)."""
        by_id: dict[str, dict[str, Json]] = {}
        for name, params in (filters.set_params_by_id or {}).items():
            path = ("filters", "set_params_by_id", name)
            filled = self._fill([name], values, *path)[0]
            if filled in by_id:
                self._wrong(*path, text=f"found {quoted(filled)} again once it is filled in, allowed is each name once")
            by_id[filled] = self._fill_within(params, values, *path)
        return attrs.evolve(
            filters,
            strip_params=self._fill_within(filters.strip_params, values, "filters", "strip_params", typed=False),
            set_params=self._fill_within(filters.set_params, values, "filters", "set_params"),
            set_params_by_id=by_id,
        )

    def _fill_within(self, value: Any, values: Mapping[str, str], *key: str | int, typed: bool = True) -> Any:
        """*value*, of whatever shape, filled in; *typed*: a text that is nothing but the port becomes a number."""
        if isinstance(value, dict):
            return {name: self._fill_within(inner, values, *key, name) for name, inner in value.items()}
        if isinstance(value, list):
            return [self._fill_within(inner, values, *key, index, typed=typed) for index, inner in enumerate(value)]
        if not isinstance(value, str) or "${" not in value:
            return value
        if typed and value == "${PORT}" and "PORT" in values:
            return int(values["PORT"])
        return self._fill([value], values, *key)[0]

    def _fill(self, texts: Iterable[str], values: Mapping[str, str], *key: str | int) -> tuple[str, ...]:
        """*texts* with the placeholders of *values* filled in; others are a mistake of *key*."""
        texts = tuple(texts)
        unknown = [name for name in _names(texts) if name not in values]
        if unknown == ["PORT"]:
            self._wrong(*key, text="found ${PORT}, allowed is that only when cmd uses ${PORT} too")
        elif unknown:
            names, allowed = (", ".join(f"${{{name}}}" for name in group) for group in (unknown, sorted(values)))
            self._wrong(*key, text=f"found {names}, allowed is one of {allowed}{did_you_mean(unknown[0], values)}")
        return tuple(substitute(text, values) for text in texts)

    def _wrong(self, *key: str | int, text: str) -> None:
        self.mistakes.add(("models", self.name, *key), text)

    def _is_wrong(self, key: str) -> bool:
        return self.mistakes.touch(("models", self.name, key))


def _capabilities(raw: RawCapabilities) -> CapabilityConfig | None:
    """None where nothing is said but no and 0, as llama-swap takes it."""
    capabilities = CapabilityConfig(
        takes=tuple(raw.in_ or ()),
        gives=tuple(raw.out or ()),
        tools=raw.tools or False,
        reranker=raw.reranker or False,
        context=raw.context or None,
    )
    return None if capabilities == CapabilityConfig() else capabilities


def _names(texts: Iterable[str]) -> list[str]:
    """Names of the placeholders in *texts*, each once."""
    return list(dict.fromkeys(name for text in texts for name in placeholders(text)))
