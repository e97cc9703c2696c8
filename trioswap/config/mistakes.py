"""Collects the mistakes of one configuration and words them.

Every mistake is one line, `key.path: what was found, what is allowed`, so that a person
can repair the whole file at once.  What is right and what is wrong is decided elsewhere.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from typing import Final

import attrs

Path = tuple[str | int, ...]
"""Keys and list indices from the top of the file: `("models", "qwen", "aliases", 0)`."""

# What TOML lets stand without quotes (TOML 1.0, "Keys").
_BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")
# Longer found texts are cut: a line should stay a line.
_SHOWN_CHARS: Final = 60
# Larger integers are not worth their digits, and Python refuses to print the largest.
_SHOWN_BITS: Final = 128


@attrs.define(eq=False)
class Mistakes:
    """The mistakes found so far, at most one for each place.

    Readers go on with a stand-in after a mistake, and a stand-in may offend a later
    check.  So the first word about a place, or about what contains it, is the only one.
    """

    _texts: dict[Path, str] = attrs.field(factory=dict)
    _holders: set[Path] = attrs.field(factory=set)
    """Everything that contains a place with a mistake."""

    def add(self, path: Path, text: str) -> None:
        """Note *text* about *path*, unless something is known about it already."""
        if not self.about(path):
            self._texts[path] = text
            self._holders.update(path[:length] for length in range(1, len(path)))

    def about(self, path: Path) -> bool:
        """Whether something is wrong with *path* itself or with what contains it."""
        return any(path[:length] in self._texts for length in range(1, len(path) + 1))

    def touch(self, path: Path) -> bool:
        """Whether something is wrong with *path*, what contains it, or what it contains."""
        return path in self._holders or self.about(path)

    def lines(self) -> list[str]:
        """One line for each mistake, in the order of the key paths."""
        return [f"{key_path(path)}: {self._texts[path]}" for path in sorted(self._texts)]


def key_path(path: Path) -> str:
    """*path* as people write it: `models."my model".aliases[0]`."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part if _BARE_KEY.fullmatch(part) else quoted(part)}"
    return text.removeprefix(".")


def quoted(text: str) -> str:
    """*text* in double quotes, on one line, with what cannot be seen escaped."""
    return json.dumps(text, ensure_ascii=not text.isprintable())


def shown(value: object) -> str:
    """*value*, as found in a TOML file, for use within a sentence."""
    match value:
        case str():
            cut = value if len(value) <= _SHOWN_CHARS else f"{value[: _SHOWN_CHARS - 3]}..."
            return quoted(cut)
        case bool():
            return "true" if value else "false"
        case int() if value.bit_length() > _SHOWN_BITS:
            return "a huge number"
        case int() | float():
            return str(value)
        case list():
            return "an array"
        case dict():
            return "a table"
        case _:  # the four kinds of TOML dates
            return "a date or time"


def found(value: object, allowed: str) -> str:
    """The usual sentence about a wrong *value*."""
    return f"found {shown(value)}, allowed is {allowed}"


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """`, did you mean "x"?` with the closest of *options*, or nothing when none is close."""
    by_folded = {option.casefold(): option for option in options}
    close = difflib.get_close_matches(word.casefold(), by_folded, n=1)
    return f", did you mean {quoted(by_folded[close[0]])}?" if close else ""
