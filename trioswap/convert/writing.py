"""What the writers of both languages share: lines, and the comments that belong to them."""

from __future__ import annotations

import itertools
import re
from typing import Final

import attrs

from trioswap.config.mistakes import Path
from trioswap.convert.comments import END, TOP, Comment, Comments

WIDTH: Final = 100
"""What is written on one line if it fits."""
_NEEDS_ESCAPE: Final = re.compile(
    r"[^\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]|[\"\\]"
)
# Ends a comment in YAML 1.1, and so for PyYAML; in TOML it is a character like any other.
_LINE_BREAK: Final = re.compile("[\x85\u2028\u2029]")
_SHORT: Final = {"\b": "\\b", "\t": "\\t", "\n": "\\n", "\f": "\\f", "\r": "\\r", '"': '\\"', "\\": "\\\\"}


def quoted(text: str) -> str:
    """*text* in double quotes, as both languages read it."""

    def escape(match: re.Match[str]) -> str:
        return _SHORT.get(match[0]) or f"\\u{ord(match[0]):04x}"

    return f'"{_NEEDS_ESCAPE.sub(escape, text)}"'


@attrs.define(eq=False)
class Page:
    """The text as far as it is written."""

    comments: Comments
    """Those that are not written yet."""
    lines: list[str] = attrs.field(factory=list)

    def text(self) -> str:
        """The whole, with the comments at its end."""
        top, end = self.take(TOP).lines(), self.take(END).lines()
        assert not self.comments  # each has been asked for with its key
        pages = (["\n".join(part)] if part else [] for part in (top, self.lines, end))
        text = "\n\n".join(itertools.chain(*pages))
        return text and f"{text}\n"

    def take(self, path: Path) -> Comment:
        """What is said about *path*, on lines that are lines in both languages."""
        comment = self.comments.pop(path, None) or Comment()
        return Comment([_LINE_BREAK.sub(" ", line) for line in comment.before], _LINE_BREAK.sub(" ", comment.behind))

    def take_all(self, path: Path) -> Comment:
        """The same, with what is said about things within *path* in whole lines."""
        inner = [key for key in self.comments if key[: len(path)] == path and key != path]
        comment = self.take(path)
        for other in map(self.take, inner):
            comment.before += other.lines()
        return comment

    def gap(self) -> None:
        """One empty line, but none at the top."""
        if self.lines and self.lines[-1]:
            self.lines.append("")

    def add_before(self, comment: Comment, indent: str = "") -> None:
        """The whole lines of *comment*."""
        self.lines += [indent + line if line else "" for line in comment.before]

    def add(self, line: str, comment: Comment) -> None:
        """A *line* with what stands behind it."""
        self.lines.append(f"{line}  {comment.behind}" if comment.behind else line)
