"""Finds the comments of a configuration text, and the keys that they belong to.

A comment that has a line for itself belongs to the key or array element that comes next; one
behind something, to what begins on its line, or to the last before it.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterator
from typing import Any, Final

import attrs
import yaml

from trioswap.config.document import Document
from trioswap.config.mistakes import Path
from trioswap.config.yaml_source import LOADER

# Strings hide what looks like a comment.  A long one may end with two quotes of its own.
_TOML: Final = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}|\'\'\'.*?\'{3,5}|"(?:\\.|[^"\\\n])*"|\'[^\'\n]*\'|(#[^\n]*)', re.DOTALL
)
_YAML: Final = re.compile(r"(?:^|(?<=[ \t]))#.*")
# Where a text cannot be parsed for the braces of references, they are hidden (as `yaml_source` does it).
_REFERENCE: Final = re.compile(r"\$\{[A-Za-z0-9_.-]+\}")


@attrs.define
class Comment:
    """What is said about one key."""

    before: list[str] = attrs.field(factory=list)
    """Whole lines, without blanks around them; empty ones keep paragraphs apart."""
    behind: str = ""
    """In the line of the key."""

    def lines(self) -> list[str]:
        """All of it as whole lines."""
        return [*self.before, *([self.behind] if self.behind else [])]


Comments = dict[Path, Comment]
"""By the path of the key, or one of these."""
TOP: Final[Path] = ()
END: Final[Path] = (-1,)


@attrs.frozen
class _Found:
    line: int
    """From 1, as in places."""
    column: int
    text: str


def toml_comments(text: str, document: Document) -> Comments:
    """The comments of the TOML *text*, which is the *document*."""
    found = [_found(text, match) for match in _TOML.finditer(text) if match[1]]
    return _attach(found, text, document)


def yaml_comments(text: str, document: Document) -> Comments:
    """The comments of the YAML *text*, which is the *document*."""
    text = text.removeprefix("\ufeff")
    try:
        free = _free_from(text)
    except yaml.YAMLError:
        free = _free_from(_REFERENCE.sub(lambda match: "x" * len(match[0]), text))
    found = []
    for number, line in enumerate(_lines(text)):
        start = free.get(number, 0)
        match = None if start is None else _YAML.search(line, start)
        if match:
            found.append(_Found(number + 1, match.start() + 1, match[0].rstrip()))
    return _attach(found, text, document)


def _found(text: str, match: re.Match[str]) -> _Found:
    line_start = text.rfind("\n", 0, match.start()) + 1
    return _Found(text.count("\n", 0, line_start) + 1, match.start() - line_start + 1, match[1].rstrip())


def _lines(text: str) -> list[str]:
    return [line.removesuffix("\r") for line in text.split("\n")]


def _free_from(text: str) -> dict[int, int | None]:
    """For lines (from 0) with scalars on them, the column behind the last; None: all of it is within one."""
    free: dict[int, int | None] = {}
    for event in yaml.parse(text, Loader=LOADER):
        if isinstance(event, yaml.ScalarEvent):
            start, end = event.start_mark, event.end_mark
            assert start is not None and end is not None  # noqa: PT018 - events of a parser have places
            # A block begins behind its sign, in the next line, and ends where another line begins.
            is_block = event.style in ("|", ">")
            for number in range(start.line + is_block, end.line + (end.column > 0)):
                free[number] = None
            if not is_block:
                free[end.line] = end.column
    return free


def _attach(found: list[_Found], text: str, document: Document) -> Comments:
    """Each comment to its key."""
    keys = _first_on_lines(document)
    starts = [line for line, _ in keys]
    lines = _lines(text)
    comments: Comments = {}
    ends: dict[Path, int] = {}
    for comment in found:
        index = bisect.bisect_right(starts, comment.line)
        is_whole = not lines[comment.line - 1][: comment.column - 1].strip()
        path = (keys[index][1] if index < len(keys) else END) if is_whole else keys[index - 1][1]
        at = comments.setdefault(path, Comment())
        if is_whole or at.behind:
            if ends.get(path, comment.line) < comment.line - 1:
                at.before.append("")
            at.before.append(comment.text)
            ends[path] = comment.line
        else:
            at.behind = comment.text
    for line, path in keys:
        if path in ends and ends[path] < line - 1:
            comments[path].before.append("")
    return comments


def _first_on_lines(document: Document) -> list[tuple[int, Path]]:
    """The lines on which something begins, in their order, with what is the first to begin there."""
    first: dict[int, tuple[int, int, Path]] = {}
    for path, place in document.places.items():
        here = (place.column, len(path), path)
        if place.line not in first or here[:2] < first[place.line][:2]:
            first[place.line] = here
    return sorted((line, path) for line, (_, _, path) in first.items())


# ---- where they go --------------------------------------------------------------------------


def transfer(comments: Comments, source: Document, target: Document) -> tuple[Comments, int]:
    """*comments* by the paths of *target*, and how many lines are about something that is not there.

    `shown` of the target says where in *source* its keys come from.  What has no
    counterpart goes to the first thing within it that has one, or else to the nearest
    table that holds it.
    """
    exact, within = _counterparts(source, target)
    # What an alias stands for has the place of what the anchor is at.
    twins = {source.places[path]: new for path, new in reversed(exact.items()) if path in source.places}
    moved: Comments = {}
    astray = 0
    for path, comment in comments.items():
        place = source.places.get(path)
        same = exact.get(path) or (twins.get(place) if place is not None else None)
        new = END if path == END else same or within.get(path)
        if new is None:
            astray += sum(map(bool, [*comment.before, comment.behind]))
            new = next((exact[path[:length]] for length in range(len(path), 0, -1) if path[:length] in exact), TOP)
        at = moved.setdefault(new, Comment())
        is_behind = same is not None and not at.behind
        at.before += comment.before if is_behind else comment.lines()
        at.behind = comment.behind if is_behind else at.behind
    return moved, astray


def _counterparts(source: Document, target: Document) -> tuple[dict[Path, Path], dict[Path, Path]]:
    """By the paths of *source*: what comes from there, and what comes from the first within that has such."""
    exact: dict[Path, Path] = {}
    for path in _paths(target.values, ()):
        length = next((length for length in range(len(path), 0, -1) if path[:length] in target.shown), 0)
        exact.setdefault((*target.shown.get(path[:length], ()), *path[length:]), path)
    within: dict[Path, Path] = {}
    for path in source.places:
        for length in range(1, len(path)):
            if path in exact:
                within.setdefault(path[:length], exact[path])
    return exact, within


def _paths(value: Any, path: Path) -> Iterator[Path]:
    """The paths of all that *value*, at *path*, holds, in its order."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for part, held in inner:
        yield (*path, part)
        yield from _paths(held, (*path, part))
