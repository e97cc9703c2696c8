"""Collects the mistakes of one configuration and words them.

Every mistake is one line, `FILE:LINE: key.path: what was found, what is allowed`, so that a
person can repair the whole file at once; without the place where none is known.  What is
right and what is wrong is decided elsewhere.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Final, Protocol, TypeVar

import attrs

T = TypeVar("T")

Path = tuple[str | int, ...]
"""Keys and list indices from the top of the file: `("models", "qwen", "aliases", 0)`."""

# What TOML lets stand without quotes (TOML 1.0, "Keys").
_BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")
# Longer found texts are cut: a line should stay a line.
_SHOWN_CHARS: Final = 60
# Comparisons of names that all guesses about one configuration may come to: half a second.
# Ten wrong names are guessed at; after a thousand, nobody reads on.
_MOST_COMPARISONS: Final = 20_000
# Larger integers are not worth their digits, and Python refuses to print the largest.
_SHOWN_BITS: Final = 128


class Place(Protocol):
    """Where a key stands; whoever reads files has a class for it."""

    @property
    def file(self) -> str:
        """Its name, as lines of mistakes show it."""

    @property
    def line(self) -> int:
        """From 1."""

    @property
    def column(self) -> int:
        """From 1."""


@attrs.define(eq=False)
class Mistakes:
    """The mistakes found so far, at most one for each place.

    Readers go on with a stand-in after a mistake, and a stand-in may offend a later
    check.  So the first word about a place, or about what contains it, is the only one.
    """

    places: Mapping[Path, Place] | None = None
    """Where in which file each key and list element stands; what is not in it stands where its holder does."""
    shown: Mapping[Path, Path] | None = None
    """How the file spells the path of each key, where it is not TOML; what follows is spelled as here."""
    _texts: dict[Path, str] = attrs.field(factory=dict, init=False)
    _holders: set[Path] = attrs.field(factory=set, init=False)
    """Everything that contains a place with a mistake."""
    _compared: int = attrs.field(default=0, init=False)

    def add(self, path: Path, text: str) -> None:
        """Note *text* about *path*, unless something is known about it already."""
        if not self.about(path):
            self._texts[path] = text
            self._holders.update(path[:length] for length in range(1, len(path)))

    def guess(self, word: str, options: Collection[str]) -> str:
        """What `did_you_mean` says where *options* may be many; nothing once that has taken its time."""
        self._compared += len(options)
        return did_you_mean(word, options) if self._compared <= _MOST_COMPARISONS else ""

    def about(self, path: Path) -> bool:
        """Whether something is wrong with *path* itself or with what contains it."""
        return any(path[:length] in self._texts for length in range(1, len(path) + 1))

    def touch(self, path: Path) -> bool:
        """Whether something is wrong with *path*, what contains it, or what it contains."""
        return path in self._holders or self.about(path)

    def lines(self) -> list[str]:
        """One line for each mistake: in the order of the files, and before that, without places, of the key paths."""
        return [line for *_, line in sorted(self._line(path) for path in self._texts)]

    def _line(self, path: Path) -> tuple[str, int, int, Path, str]:
        """The line about *path*, behind what it is sorted by."""
        spelled, rest = _nearest(path, self.shown or {}) or ((), path)
        line = f"{key_path((*spelled, *rest))}: {self._texts[path]}"
        known = _nearest(path, self.places or {})
        if known is None:
            return "", 0, 0, path, line
        place, _ = known
        return place.file, place.line, place.column, path, f"{place.file}:{place.line}: {line}"


def _nearest(path: Path, known: Mapping[Path, T]) -> tuple[T, Path] | None:
    """What is *known* of *path* or of the nearest that holds it, and the rest of *path* from there on."""
    for length in range(len(path), -1, -1):
        if path[:length] in known:
            return known[path[:length]], path[length:]
    return None


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
        case None:  # only YAML can say it
            return "nothing"
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
