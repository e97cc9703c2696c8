"""Single values that llama-swap's YAML writes in another way than the native document.

Which key has which rule; where they stand, and what has another structure altogether, is the
business of `llamaswap`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

from trioswap.config.raw import RawConfig, RawPerformance
from trioswap.config.raw_model import RawModel
from trioswap.config.schema import LOG_LEVELS, TIME_FORMATS
from trioswap.config.values import parse_duration

Rule = Callable[[Any, Any], Any]
"""Gets a value as it is written, and with its macros filled in, by which it judges.

Gives the native value: the written one itself where that will do, so that its macros stay;
None: as if the key were not written.
"""

_URL: Final = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#]*(?P<path>[^?#]*).*", re.IGNORECASE | re.DOTALL)


def _none_where(is_default: Callable[[float], bool]) -> Rule:
    """A rule for numbers of which some say what holds anyway."""

    def rule(written: Any, meaning: Any) -> Any:
        is_number = isinstance(meaning, int | float) and not isinstance(meaning, bool)
        return None if is_number and is_default(meaning) else written

    return rule


def _mebibytes(written: Any, meaning: Any) -> Any:
    """A whole number is in MiB; whatever is not above 0 is none."""
    if not isinstance(meaning, int) or isinstance(meaning, bool):
        return written
    return f"{written}MiB" if meaning > 0 else 0


def _every(written: Any, meaning: Any) -> Any:
    """No time is the default."""
    try:
        return None if meaning == "0" or parse_duration(meaning) == 0 else written
    except ValueError:
        return written


def _log_level(written: Any, meaning: Any) -> Any:
    """In any case, between blanks, and `warn` for `warning`."""
    level = meaning.strip().lower() if isinstance(meaning, str) else None
    level = "warning" if level == "warn" else level
    return level if level != meaning and level in LOG_LEVELS else written


def _time_format(written: Any, meaning: Any) -> Any:
    """In any case."""
    name = meaning.lower() if isinstance(meaning, str) else None
    return name if name != meaning and name in TIME_FORMATS else written


def _endpoint(written: Any, meaning: Any) -> Any:
    """Between blanks, and of a URL the path."""
    if not isinstance(meaning, str):
        return written
    path = meaning.strip()
    if match := _URL.fullmatch(path):
        path = match["path"] or "/"
    return written if path == meaning else path


_ZERO: Final = _none_where(lambda number: number == 0)
_NOT_ABOVE_ZERO: Final = _none_where(lambda number: number <= 0)

RULES: Final[dict[tuple[type, str], Rule]] = {
    (RawConfig, "capture_buffer"): _mebibytes,
    (RawConfig, "log_level"): _log_level,
    (RawConfig, "log_time_format"): _time_format,
    (RawConfig, "metrics_max_in_memory"): _NOT_ABOVE_ZERO,
    (RawConfig, "unload_timeout"): _ZERO,
    (RawModel, "check_endpoint"): _endpoint,
    (RawModel, "concurrency_limit"): _NOT_ABOVE_ZERO,
    (RawModel, "ttl"): _none_where(lambda number: number == -1),
    (RawModel, "unload_timeout"): _ZERO,
    (RawPerformance, "every"): _every,
}
"""By raw class and native key (core reference 1.7 and 1.8)."""
