"""Durations, sizes and plain numbers as people write them, turned into seconds, bytes and floats.

Errors are ValueErrors whose text says what was found and what is allowed; the reader
adds the key path.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Final, TypeGuard

from trioswap.config.mistakes import found

# Longest first: that is the order in which the parts of a duration are written.
_SECONDS: Final = {
    "d": Fraction(86_400),
    "h": Fraction(3_600),
    "m": Fraction(60),
    "s": Fraction(1),
    "ms": Fraction(1, 1_000),
}
_BYTES: Final = {"B": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("B", 1_000), ("iB", 1_024))
}

# So many digits keep every result finite, and a float still tells milliseconds apart.
_NUMBER: Final = r"([0-9]{1,12}(?:\.[0-9]{1,9})?)"
DURATION_PATTERN: Final = "".join(f"(?:{_NUMBER}{unit})?" for unit in _SECONDS)
"""Matches what a duration is as text, and the empty text, which is none."""
SIZE_PATTERN: Final = f"{_NUMBER} ?({'|'.join(_BYTES)})"
_DURATION: Final = re.compile(DURATION_PATTERN)
_SIZE: Final = re.compile(SIZE_PATTERN)
MOST: Final = 1e12  # seconds, or a plain number; what twelve digits can say
LARGEST: Final = 2**63 - 1  # bytes; what a file offset can say

DURATIONS: Final = 'a number of seconds from 0 up, or text such as "90s", "1h30m", "500ms", "2d"'
SIZES: Final = 'a whole number of bytes from 0 up, or text such as "18GiB", "512MiB", "2GB"'
NUMBERS: Final = "a number from 0 up"
COUNTS: Final = "a whole number from 1 up"
WHOLES: Final = "a whole number from 0 up"


def parse_duration(value: object) -> float:
    """Seconds meant by *value*: a number, or text of the units d, h, m, s, ms in this order.

    Raises:
        ValueError: it is neither, or negative, or not finite.
    """
    if _is_number(value):
        return float(value)
    if isinstance(value, str) and value and (match := _DURATION.fullmatch(value)):
        parts = zip(match.groups(default="0"), _SECONDS.values(), strict=True)
        # Fractions, because 0.7 is not 700 * 0.001 in floats.
        return float(sum(Fraction(number) * unit for number, unit in parts))
    raise ValueError(found(value, DURATIONS))


def parse_size(value: object) -> int:
    """Bytes meant by *value*: an integer, or text in B, KB, MB, GB, TB (1000) or KiB, MiB, GiB, TiB (1024).

    Parts of a byte are dropped.

    Raises:
        ValueError: it is neither, or negative, or beyond what a file offset can say.
    """
    size = -1
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    elif isinstance(value, str) and (match := _SIZE.fullmatch(value)):
        size = int(Fraction(match[1]) * _BYTES[match[2]])
    if not 0 <= size <= LARGEST:
        raise ValueError(found(value, SIZES))
    return size


def parse_number(value: object) -> float:
    """The number *value*, which has no unit.

    Raises:
        ValueError: it is no number, or negative, or not finite.
    """
    if not _is_number(value):
        raise ValueError(found(value, NUMBERS))
    return float(value)


def parse_count(value: object) -> int:
    """The integer *value*.

    Raises:
        ValueError: it is no integer, or below 1.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(found(value, COUNTS))
    return value


def parse_whole(value: object) -> int:
    """The integer *value*.

    Raises:
        ValueError: it is no integer, or negative.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(found(value, WHOLES))
    return value


def format_size(size: int) -> str:
    """*size* bytes for people: in the largest unit that tells it exactly with at most three decimals."""
    for unit, factor in reversed(_BYTES.items()):
        if factor <= size < 1_024 * factor and size * 1_000 % factor == 0:
            return f"{size / factor:.10g}{unit}"
    return f"{size}B"


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= MOST
