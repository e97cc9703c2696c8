"""What type a YAML scalar without quotes has, by the rules that llama-swap's files are written for.

These are those of yaml.v3 where no type is asked for (core reference, part 10), which are
nearer to YAML 1.2 than PyYAML's: `on`, `yes` and `1:30` are text; `017` and `0o17` are
octal, `1_000` is a thousand; integers beyond 64 bits are floats, and what no float can hold
is text.  One difference: dates stay text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Final

Scalar = str | int | float | bool | None

_WORDS: Final[dict[str, Scalar]] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), math.nan),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF"), math.inf),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), -math.inf),
}
_INTEGER: Final = re.compile(
    r"(?P<sign>[-+]?)(?:0x(?P<hex>[0-9a-f]+)|0b(?P<bin>[01]+)|0o?(?P<oct>[0-7]+)|(?P<dec>0|[1-9][0-9]*))",
    re.IGNORECASE,
)
_BASES: Final = {"hex": 16, "bin": 2, "oct": 8, "dec": 10}
_FLOAT: Final = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_INTEGERS: Final = range(-(2**63), 2**64)
# No number that a float tells from its neighbours needs more, and reading digits takes time.
_MOST_DIGITS: Final = 400

# What yaml.v3 takes for a flag where one is asked for, beside true and false.
FLAGS: Final = {
    **dict.fromkeys(("y", "Y", "yes", "Yes", "YES", "on", "On", "ON"), True),
    **dict.fromkeys(("n", "N", "no", "No", "NO", "off", "Off", "OFF"), False),
}

_TYPES: Final[dict[str, tuple[type, ...]]] = {
    "int": (int,),
    "float": (float, int),
    "bool": (bool,),
    "null": (type(None),),
}
TAGS: Final = ("str", *_TYPES)
"""The tags of scalars that mean something here, without their `!!`."""


def resolve(text: str) -> Scalar:
    """The value of the plain scalar *text*."""
    if text in _WORDS:
        return _WORDS[text]
    if text[0] not in "+-.0123456789" or len(text) > _MOST_DIGITS:
        return text
    digits = text if text[0] == "." else text.replace("_", "")
    if match := _INTEGER.fullmatch(digits):
        number = _integer(match)
        if number in _INTEGERS:
            return number
    if _FLOAT.fullmatch(digits) and math.isfinite(value := float(digits)):
        return value
    return text


def resolve_tagged(tag: str, text: str) -> Scalar:
    """The value of *text* under *tag*, one of `TAGS`.

    Raises:
        ValueError: the text does not say such a value.
    """
    if tag == "str":
        return text
    value = resolve(text)
    if not _is_one_of(value, _TYPES[tag]):
        raise ValueError(f"!!{tag} cannot be {text}")
    return float(value) if tag == "float" and isinstance(value, int) else value


def _integer(match: re.Match[str]) -> int:
    base = match.lastgroup
    assert base is not None  # one alternative has matched
    return int(match["sign"] + match[base], _BASES[base])


def _is_one_of(value: Scalar, types: Iterable[type]) -> bool:
    # `type`, because a bool is an int too.
    return type(value) in types
