"""Spells a native document in llama-swap's YAML: the way back of `config.llamaswap`.

What llama-swap has, too, is written as it wants it: whole seconds, MiB, lists of NAME=VALUE,
and the block `routing`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import attrs

from trioswap.config.document import Document
from trioswap.config.keys import Key, keys_of
from trioswap.config.llamaswap import PRIORITY, ROUTER, SCHEDULER, SETTINGS, says_residency
from trioswap.config.mistakes import Path
from trioswap.config.raw import RawConfig, RawPerformance
from trioswap.config.raw_model import RawFilters, RawModel, RawTimeouts
from trioswap.config.values import parse_duration, parse_size

_USES: Final = {"groups": "group", "matrix": "matrix"}
_MIB: Final = 2**20


def spell(native: Document, meaning: Document) -> Document:
    """*native*, in which nothing is wrong, as YAML files say it; `shown` leads back to native paths.

    *meaning* is the same with its macros filled in.
    """
    spelled = Document({})
    spelling = _Spelling(spelled.values, spelled.shown)
    spelling.add(spelled.values, RawConfig, native.values, meaning.values, (), ())
    spelling.add_priorities(native.values.get("models", {}))
    if not says_residency(native.values):
        spelled.values["memory"] = {}  # or else it would be one model at a time
    return spelled


@attrs.frozen(eq=False)
class _Spelling:
    """Goes through native values along the raw classes; the values with macros filled in go beside them."""

    top: dict[str, Any]
    origins: dict[Path, Path]

    def add(self, into: dict[str, Any], table: type, values: Any, meaning: Any, old: Path, new: Path) -> None:
        """Write *values*, which are at *old*, of the raw class *table*, into what is at *new*."""
        keys = keys_of(table)
        for (name, value), meant in zip(values.items(), meaning.values(), strict=True):
            key, here, there, holder = keys[name], (*old, name), (*new, keys[name].yaml), into
            if table is RawConfig and name in _USES:
                self._block(ROUTER)["use"] = _USES[name]
                holder, there = self._block(SETTINGS), (*SETTINGS, name)
            if not (table is RawModel and name == "priority" and _can_move(value)):
                self._note(here, there)
                holder[key.yaml] = self._value(table, key, value, meant, here, there)

    def _value(self, table: type, key: Key, value: Any, meant: Any, old: Path, new: Path) -> Any:
        if (table, key.name) == (RawModel, "env"):
            return self._env(value, old, new)
        if rule := _RULES.get((table, key.name)):
            return rule(value, meant)
        if key.table is None:
            return value
        if not key.is_by_name:
            return self._table(key.table, value, meant, old, new)
        inner = zip(value.items(), meant.values(), strict=True)
        return {
            name: self._table(key.table, held, held_meant, (*old, name), (*new, name))
            for (name, held), held_meant in inner
        }

    def _table(self, table: type, values: Any, meaning: Any, old: Path, new: Path) -> dict[str, Any]:
        into: dict[str, Any] = {}
        self.add(into, table, values, meaning, old, new)
        return into

    def _env(self, env: dict[str, str], old: Path, new: Path) -> list[str]:
        for index, name in enumerate(env):
            self._note((*old, name), (*new, index))
        return [f"{name}={value}" for name, value in env.items()]

    def add_priorities(self, models: dict[str, Any]) -> None:
        """Write the priorities of *models* in the one place that llama-swap has for them."""
        for name, model in models.items():
            if _can_move(model.get("priority")):
                self._block(SCHEDULER)["use"] = "fifo"
                self._block(PRIORITY)[name] = model["priority"]
                self._note(("models", name, "priority"), (*PRIORITY, name))

    def _block(self, path: Path) -> dict[str, Any]:
        """The mapping at *path*, made where there is none."""
        block = self.top
        for part in path:
            block = block.setdefault(str(part), {})
        return block

    def _note(self, old: Path, new: Path) -> None:
        if old != new:
            self.origins[new] = old


def _can_move(priority: Any) -> bool:
    """Whether it holds wherever it is written: a macro may be the model's own."""
    return isinstance(priority, int)


# ---- single values ----------------------------------------------------------------------------

_Rule = Callable[[Any, Any], Any]
"""Gets a native value as it is written, and with its macros filled in; gives what YAML says."""


def _seconds(written: Any, _: Any) -> Any:
    """llama-swap takes whole numbers only."""
    if not isinstance(written, str) or "${" in written:
        return written
    seconds = parse_duration(written)
    return int(seconds) if seconds == int(seconds) else written


def _grace(written: Any, meaning: Any) -> Any:
    """There 0 says that it is as elsewhere."""
    return "0s" if parse_duration(meaning) == 0 else _seconds(written, meaning)


def _text_of_duration(written: Any, _: Any) -> Any:
    """And here llama-swap takes only text."""
    return f"{written}s" if isinstance(written, int) else written


def _mebibytes(written: Any, meaning: Any) -> Any:
    if isinstance(meaning, str) and "${" in written:
        return written
    size = parse_size(meaning)
    return f"{size}B" if size % _MIB else size // _MIB


def _level(written: Any, _: Any) -> Any:
    return "warn" if written == "warning" else written


def _strip_params(written: list[str], _: Any) -> Any:
    """With commas in between, unless there are any in the names or may come out of macros."""
    is_simple = written and all(field and field == field.strip() for field in written)
    return written if not is_simple or any("," in field or "${" in field for field in written) else ", ".join(written)


_RULES: Final[dict[tuple[type, str], _Rule]] = {
    (RawConfig, "capture_buffer"): _mebibytes,
    (RawConfig, "global_ttl"): _seconds,
    (RawConfig, "health_check_timeout"): _seconds,
    (RawConfig, "log_level"): _level,
    (RawConfig, "unload_timeout"): _grace,
    (RawFilters, "strip_params"): _strip_params,
    (RawModel, "health_check_timeout"): _seconds,
    (RawModel, "ttl"): _seconds,
    (RawModel, "unload_timeout"): _grace,
    (RawPerformance, "every"): _text_of_duration,
    **{(RawTimeouts, name): _seconds for name in keys_of(RawTimeouts)},
}
