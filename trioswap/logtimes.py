"""How a line of the log tells the time: Go's named layouts, as llama-swap offers them (surface reference 2.8).

The names are those of `config.schema.TIME_FORMATS`; what is not given here is our own, for
files that say nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import Final

_STRFTIME: Final = {
    "ansic": "%a %b %e %H:%M:%S %Y",
    "unixdate": "%a %b %e %H:%M:%S %Z %Y",
    "rubydate": "%a %b %d %H:%M:%S %z %Y",
    "rfc822": "%d %b %y %H:%M %Z",
    "rfc822z": "%d %b %y %H:%M %z",
    "rfc850": "%A, %d-%b-%y %H:%M:%S %Z",
    "rfc1123": "%a, %d %b %Y %H:%M:%S %Z",
    "rfc1123z": "%a, %d %b %Y %H:%M:%S %z",
    "stamp": "%b %e %H:%M:%S",
    "stampmicro": "%b %e %H:%M:%S.%f",
    "stampnano": "%b %e %H:%M:%S.%f000",  # a clock of Python's has microseconds
}


# ---- what strftime has no letters for: a zone with a colon, an hour without a zero, milliseconds ----


def _rfc3339(moment: datetime) -> str:
    return f"{moment:%Y-%m-%dT%H:%M:%S}{_zone(moment)}"


def _rfc3339_nano(moment: datetime) -> str:
    # Go leaves out the zeros at the end, and the point when nothing is left.
    fraction = f".{moment.microsecond:06}".rstrip("0").rstrip(".")
    return f"{moment:%Y-%m-%dT%H:%M:%S}{fraction}{_zone(moment)}"


def _zone(moment: datetime) -> str:
    zone = f"{moment:%z}"
    return "Z" if zone == "+0000" else f"{zone[:3]}:{zone[3:5]}"


def _kitchen(moment: datetime) -> str:
    return f"{moment.hour % 12 or 12}:{moment:%M}{'AM' if moment.hour < 12 else 'PM'}"


def _stamp_milli(moment: datetime) -> str:
    return f"{moment:%b %e %H:%M:%S}.{moment.microsecond // 1000:03}"


_OTHERS: Final[Mapping[str, Callable[[datetime], str]]] = {
    "rfc3339": _rfc3339,
    "rfc3339nano": _rfc3339_nano,
    "kitchen": _kitchen,
    "stampmilli": _stamp_milli,
}


@lru_cache(maxsize=1)  # most lines of a busy daemon are of the same second as the one before
def in_utc(second: int) -> str:
    """What lines begin with where nothing is said; *second* is Unix time."""
    return f"{datetime.fromtimestamp(second, UTC):%Y-%m-%dT%H:%M:%SZ} "


def timestamp(layout: str | None, moment: datetime) -> str:
    """*moment* as the named *layout* has it, in its own time zone, and a space; nothing for the empty name.

    Without a name it is UTC, to the second: `2026-01-31T12:00:00Z `.
    """
    if layout is None:
        return in_utc(int(moment.timestamp()))
    if not layout:
        return ""
    return f"{moment:{_STRFTIME[layout]}} " if layout in _STRFTIME else f"{_OTHERS[layout](moment)} "
