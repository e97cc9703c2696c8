"""The types that values in a configuration file have, and how each is read, strictly.

A file that says 5 where text belongs has a mistake in it: nothing is converted.  Errors
are ValueErrors whose text says what was found and what is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final, Literal, NewType

from trioswap.config.mistakes import found, shown
from trioswap.config.values import (
    DURATIONS,
    NUMBERS,
    SIZES,
    parse_count,
    parse_duration,
    parse_number,
    parse_size,
    parse_whole,
)

Duration = NewType("Duration", float)
Patience = NewType("Patience", float)
"""A duration that cannot be 0."""
Size = NewType("Size", int)
"""A size that cannot be 0."""
Amount = NewType("Amount", int)
"""A size that can."""
Number = NewType("Number", float)
Factor = NewType("Factor", float)
"""A number that cannot be 0."""
Count = NewType("Count", int)
"""A whole number from 1 up."""
Whole = NewType("Whole", int)
"""A whole number from 0 up."""
Secret = NewType("Secret", str)
"""Text that no message repeats."""
Json = NewType("Json", object)
"""Whatever can be written in JSON."""
Command = str | list[str]
"""A text to be split, or the arguments as they are."""
Need = Amount | dict[str, Amount]
"""Memory of one device, or of each of several."""
Capacity = Amount | Literal["auto"]
"""How large a device is; "auto": ask the machine."""


def read_text(value: object) -> str:
    """Any text that the system can take in."""
    if not isinstance(value, str):
        # A number where text belongs is mostly a forgotten pair of quotes.
        hint = f', did you mean "{shown(value)}"?' if isinstance(value, int | float) and abs(value) < 1e9 else ""
        raise ValueError(found(value, "text in quotes") + hint)
    if "\0" in value:
        raise ValueError(found(value, "text without NUL characters"))
    return value


def read_secret(value: object) -> str:
    """The same, but the mistake does not show it: lines of mistakes end up in logs and reports."""
    if not isinstance(value, str) or "\0" in value:
        raise ValueError(hidden("text in quotes"))
    return value


def hidden(allowed: str) -> str:
    """What `found` says, but of a value that may be a secret in the wrong place."""
    return f"found something else (not shown, it may be a secret), allowed is {allowed}"


def read_flag(value: object) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise ValueError(found(value, "true or false"))
    return value


def read_integer(value: object) -> int:
    """A whole number of either sign."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(found(value, "a whole number"))
    return value


def read_capacity(value: object) -> int | str:
    """A size, or "auto"."""
    if value == "auto":
        return "auto"
    try:
        return parse_size(value)
    except ValueError:
        raise ValueError(found(value, f'{SIZES}, or "auto"')) from None


def read_json_scalar(value: object) -> object:
    """What JSON can say without braces and brackets; dates and infinite numbers it cannot."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    raise ValueError(found(value, "what JSON can say: text, a finite number, true or false, an array or a table"))


def _above_zero(parse: Callable[[object], float], allowed: str) -> Callable[[object], float]:
    """A reader for what *parse* reads, but 0."""

    def read(value: object) -> float:
        result = parse(value)
        if not result:
            raise ValueError(found(value, f"{allowed}, but not 0"))
        return result

    return read


READERS: Final[dict[Any, Callable[[object], object]]] = {
    str: read_text,
    bool: read_flag,
    int: read_integer,
    Duration: parse_duration,
    Patience: _above_zero(parse_duration, DURATIONS),
    Size: _above_zero(parse_size, SIZES),
    Amount: parse_size,
    Number: parse_number,
    Factor: _above_zero(parse_number, NUMBERS),
    Count: parse_count,
    Whole: parse_whole,
    Secret: read_secret,
    Capacity: read_capacity,
}
"""How a value of each type is read that is no table, no array, and not one of several types."""
