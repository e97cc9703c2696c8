"""What this version reads and judges, but does not act on yet: the only list of it.

`check` and `serve` say which of it a file uses, and the page about the configuration marks it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import attrs

from trioswap.config.raw import RawConfig

NOT_YET: Final = (
    "capture_buffer",
    "metrics_max_in_memory",
    "performance",
    "store",
    "ui",
)
"""Key paths as in TOML; `*` is any name."""


def not_acted_on(raw: RawConfig) -> tuple[str, ...]:
    """Those of the list that *raw* asks for; what is empty, off or 0 asks for nothing."""
    return tuple(path for path in NOT_YET if any(map(_asks, _values(raw, path.split(".")))))


def _values(holder: Any, path: list[str]) -> Iterator[object]:
    """What stands at *path* in *holder*."""
    if not path or holder is None:
        yield holder
    elif path[0] == "*":
        assert isinstance(holder, dict)
        for value in holder.values():
            yield from _values(value, path[1:])
    else:
        yield from _values(getattr(holder, path[0]), path[1:])


def _asks(value: Any) -> bool:
    if attrs.has(type(value)):
        return any(_asks(getattr(value, field.name)) for field in attrs.fields(type(value)))
    return bool(value)
