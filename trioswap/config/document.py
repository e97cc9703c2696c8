"""One parsed document, TOML or YAML: its values, and where in which file each of them stands.

The values are plain dicts with keys of text, lists and scalars.  Parsing texts is the job of
`toml` and `yaml_source`; what the keys mean is no business of this module.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path as FilePath
from typing import Any, Final

import attrs

from trioswap.config.mistakes import Mistakes, Path

# Files of people have thousands of values and a few levels.  Beyond these bounds is a machine
# gone wild, or a text made to hang its reader.
MAX_BYTES: Final = 16 * 2**20
MAX_DEPTH: Final = 100
MAX_VALUES: Final = 1_000_000

TOO_DEEP: Final = f"found values nested more than {MAX_DEPTH} levels deep, allowed are fewer levels"
TOO_MANY: Final = f"found more than {MAX_VALUES:,} values, allowed are fewer"
TOO_LONG: Final = f"found a file of more than {MAX_BYTES // 2**20} MiB, allowed are smaller ones"


@attrs.frozen
class Place:
    """Where a key or an array element begins; line and column count from 1, columns in characters."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@attrs.define(eq=False)
class Unreadable(Exception):
    """A text that is no document at all, so that nothing can be said about its keys."""

    text: str
    """What was found and what is allowed."""
    line: int | None = None
    column: int | None = None

    def __str__(self) -> str:
        return self.text

    def line_of_its_own(self) -> str:
        """The mistake with its place, for where the file is named elsewhere."""
        if self.line is None:
            return self.text
        column = "" if self.column is None else f", column {self.column}"
        return f"line {self.line}{column}: {self.text}"

    def line_about(self, file: str) -> str:
        """The mistake with its place in *file*."""
        return f"{file}: {self.text}" if self.line is None else f"{file}:{self.line}: {self.text}"


def read_file(path: FilePath) -> str:
    """The text of the file *path*.

    Raises:
        Unreadable: it cannot be read, is not UTF-8, or is larger than any configuration.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as exc:
        raise Unreadable(f"cannot read the file: {exc.strerror}") from exc
    if len(data) > MAX_BYTES:
        raise Unreadable(TOO_LONG)
    try:
        return data.decode()
    except UnicodeDecodeError as exc:
        line = data.count(b"\n", 0, exc.start) + 1
        raise Unreadable(f"found byte 0x{data[exc.start]:02x}, allowed is UTF-8", line) from exc


@attrs.frozen(eq=False)
class Document:
    """What one or several files say; whoever changes it makes a new one."""

    values: dict[str, Any]
    places: dict[Path, Place] = attrs.field(factory=dict)
    """Of every key, where the key stands, and of every array element; the top has none."""
    texts: dict[Path, str] = attrs.field(factory=dict)
    """Scalars that had a text before they had a type, with that text.

    These are what YAML writes without quotes (`0123` is 83 for a number, but "0123" for a
    name), and typed values of macros.
    """
    shown: dict[Path, Path] = attrs.field(factory=dict)
    """How the file spells the path of a key, where that differs."""

    def place(self, path: Path) -> Place | None:
        """Where *path* stands, or the nearest that holds it."""
        held = (self.places.get(path[:length]) for length in range(len(path), 0, -1))
        return next((place for place in held if place is not None), None)

    def as_text(self, path: Path) -> str | None:
        """The scalar at *path* as it is written, whatever type it has; None: it is no text and never was."""
        value: Any = self.values
        for part in path:
            value = value[part]
        return value if isinstance(value, str) else self.texts.get(path)


Change = Callable[[Path, Any, str | None], tuple[Any, str | None]]
"""Gets the path of a scalar, its value and its entry in `texts`; gives the new value and entry."""
Rename = Callable[[Path], str]
"""Gets the path of a key and gives the new key."""


def _unchanged(_: Path, value: Any, text: str | None) -> tuple[Any, str | None]:
    return value, text


def _same_name(path: Path) -> str:
    return str(path[-1])


@attrs.frozen(eq=False)
class Copying:
    """Copies parts of one document into another, with their places, and changes them on the way."""

    source: Document
    target: Document
    mistakes: Mistakes
    """Hears of keys that are the same under their new names; the first stays."""
    change: Change = _unchanged
    rename: Rename = _same_name

    def copy(self, value: Any, old: Path, new: Path) -> Any:
        """*value*, which is at *old* in the source, as it is to be at *new* in the target; the caller puts it there."""
        self._note(old, new)
        if isinstance(value, dict):
            return self._table(value, old, new)
        if isinstance(value, list):
            return [self.copy(element, (*old, index), (*new, index)) for index, element in enumerate(value)]
        changed, text = self.change(old, value, self.source.texts.get(old))
        if text is None:
            self.target.texts.pop(new, None)  # of a null that has yielded
        else:
            self.target.texts[new] = text
        return changed

    def _table(self, table: dict[str, Any], old: Path, new: Path) -> dict[str, Any]:
        copied: dict[str, Any] = {}
        for key, value in table.items():
            name = self.rename((*old, key))
            if name in copied:
                again = self.source.place((*old, key))
                where = f" on line {again.line}" if again is not None else ""
                self.mistakes.add((*new, name), f"found it again{where} once the names are filled in, allowed is once")
            else:
                copied[name] = self.copy(value, (*old, key), (*new, name))
        return copied

    def _note(self, old: Path, new: Path) -> None:
        if old in self.source.places:
            self.target.places[new] = self.source.places[old]
        if old in self.source.shown:
            self.target.shown[new] = self.source.shown[old]
