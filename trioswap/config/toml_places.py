"""Finds where each key and each array element of a TOML text stands, which tomllib does not tell.

The scanner follows the text by the rules of TOML 1.0 but judges nothing: it never raises for
a text that tomllib refuses, and what it says of one is worth nothing.  On every text that
tomllib reads, the paths are exactly those of the document (a test compares the two).  It runs
first, in linear time, and so guards tomllib against keys of thousands of parts, for which
tomllib needs time by the square.
"""

from __future__ import annotations

import re
import tomllib
from typing import Final

import attrs

from trioswap.config.document import MAX_DEPTH, MAX_VALUES, TOO_DEEP, TOO_MANY, Place, Unreadable
from trioswap.config.mistakes import Path

_GAP: Final = re.compile(r"(?:[ \t\r\n]++|#[^\n]*+)*+")
"""What may stand between the lines, and between the elements of an array."""
_BLANK: Final = re.compile(r"[ \t]*+")
_BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]*+")
_BARE_VALUE: Final = re.compile(r"[^,\]}#\n]*+")
"""Numbers, dates (which may hold a space), true and false."""
_ENDS: Final = {
    '"': re.compile(r'\\.|"', re.DOTALL),
    '"""': re.compile(r'\\.|"{3,5}', re.DOTALL),
    "'": re.compile(r"'"),
    "'''": re.compile(r"'{3,5}"),
}
"""By how a string opens, what may end it (a long one may end with two quotes of its own), or hides such an end."""


def find_places(text: str, file: str) -> dict[Path, Place]:
    """Where the keys and array elements of *text* begin, by their paths; *file* is what places call it.

    Keys that only stand in longer ones (`a` of `[a.b]`) stand where they are named first.

    Raises:
        Unreadable: it is nested too deeply, or has too many values.
    """
    scanner = _Scanner(text, file)
    scanner.scan()
    return scanner.places


@attrs.define(eq=False)
class _Scanner:
    text: str
    file: str
    places: dict[Path, Place] = attrs.field(factory=dict)
    _at: int = 0
    """How far the text has been read; it only grows."""
    _arrays: dict[Path, int] = attrs.field(factory=dict)
    """The last index of each array of tables."""
    _line: int = 1
    _line_start: int = 0
    _seen: int = 0
    """The last position that `_place` was asked for, behind which it counts on."""

    def scan(self) -> None:
        """Go through the text line by line, as far as values do not span lines."""
        table: Path = ()
        self._skip(_GAP)
        while self._at < len(self.text):
            if self._next("["):
                table = self._header()
            else:
                self._pair(table)
            self._end_line()
            self._skip(_GAP)

    # ---- tables and keys ----------------------------------------------------------------

    def _header(self) -> Path:
        """The path of the table that a `[...]` or `[[...]]` opens."""
        place = self._place(self._at)
        is_array = self._next("[[")
        self._at += 2 if is_array else 1
        path: Path = ()
        keys = self._key()
        for number, (part, at) in enumerate(keys, start=1):
            path = (*path, part)
            self._note(path, at)
            if path in self._arrays and not (is_array and number == len(keys)):
                path = (*path, self._arrays[path])
        if is_array:
            self._arrays[path] = index = self._arrays.get(path, -1) + 1
            path = (*path, index)
        self.places[path] = place
        return path

    def _pair(self, table: Path) -> None:
        """A `key = value`."""
        path = table
        for part, at in self._key():
            path = (*path, part)
            self._note(path, at)
        self._skip(_BLANK)
        if self._next("="):
            self._at += 1
            self._value(path)

    def _key(self) -> list[tuple[str, int]]:
        """The parts of the dotted key that comes next, each with its position."""
        parts: list[tuple[str, int]] = []
        while True:
            self._skip(_BLANK)
            start = self._at
            part = self._key_part()
            if part is None:
                return parts
            parts.append((part, start))
            self._skip(_BLANK)
            if not self._next("."):
                return parts
            self._at += 1

    def _key_part(self) -> str | None:
        start = self._at
        if self._next('"') or self._next("'"):
            self._string()
            return _meaning(self.text[start : self._at])
        self._skip(_BARE_KEY)
        return self.text[start : self._at] or None

    # ---- values ---------------------------------------------------------------------------

    def _value(self, path: Path) -> None:
        self._skip(_BLANK)
        if self._next("["):
            self._array(path)
        elif self._next("{"):
            self._inline_table(path)
        elif self._next('"') or self._next("'"):
            self._string()
        else:
            self._skip(_BARE_VALUE)

    def _array(self, path: Path) -> None:
        self._at += 1
        index = 0
        while True:
            self._skip(_GAP)
            start = self._at
            if start >= len(self.text) or self._next("]"):
                break
            self._note((*path, index), start)
            self._value((*path, index))
            self._skip(_GAP)
            if not self._next(","):
                break
            self._at += 1
            index += 1
        self._close("]")

    def _inline_table(self, path: Path) -> None:
        self._at += 1
        while True:
            self._skip(_GAP)  # TOML 1.1 allows more than blanks
            if self._at >= len(self.text) or self._next("}"):
                break
            self._pair(path)
            self._skip(_GAP)
            if not self._next(","):
                break
            self._at += 1
        self._close("}")

    def _string(self) -> None:
        """Go behind the string that begins here, or to the end of the text."""
        quote = self.text[self._at]
        opening = quote * 3 if self._next(quote * 3) else quote
        self._at += len(opening)
        while (match := _ENDS[opening].search(self.text, self._at)) is not None:
            self._at = match.end()
            if match[0].startswith(quote):
                return
        self._at = len(self.text)

    # ---- the text ---------------------------------------------------------------------------

    def _next(self, text: str) -> bool:
        return self.text.startswith(text, self._at)

    def _skip(self, pattern: re.Pattern[str]) -> None:
        match = pattern.match(self.text, self._at)
        assert match is not None  # each of them matches nothing, too
        self._at = match.end()

    def _close(self, char: str) -> None:
        if self._next(char):
            self._at += 1

    def _end_line(self) -> None:
        """Whatever is left of the line is the closing brackets of a header, a comment, or not TOML."""
        end = self.text.find("\n", self._at)
        self._at = len(self.text) if end < 0 else end + 1

    def _note(self, path: Path, at: int) -> None:
        if path not in self.places:
            self.places[path] = self._place(at)
        if len(path) > MAX_DEPTH:
            raise self._unreadable(TOO_DEEP, at)
        if len(self.places) > MAX_VALUES:
            raise self._unreadable(TOO_MANY, at)

    def _place(self, at: int) -> Place:
        """The place of a position that is not before the last one asked for."""
        if lines := self.text.count("\n", self._seen, at):
            self._line += lines
            self._line_start = self.text.rfind("\n", self._seen, at) + 1
        self._seen = at
        return Place(self.file, self._line, at - self._line_start + 1)

    def _unreadable(self, text: str, at: int) -> Unreadable:
        place = self._place(at)
        return Unreadable(text, place.line, place.column)


def _meaning(quoted: str) -> str:
    """What a quoted key says: tomllib knows best."""
    if "\\" not in quoted:
        return quoted[1:-1]
    try:
        return str(tomllib.loads(f"k = {quoted}")["k"])
    except ValueError:
        return quoted
