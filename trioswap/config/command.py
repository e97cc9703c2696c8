"""Splits command texts into arguments and fills in placeholders; runs nothing.

The rules are llama-swap's (core reference 1.6), because its users bring their commands
along.  There is no shell: no globbing, no variables, no pipes, no `~`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

import attrs

# One piece of a command.  No backslash stands before a newline any more: see _meaningful_lines.
_PIECE: Final = re.compile(
    r"""
      (?P<space>    [ \t\n]+ )                  # carriage return is no separator
    | (?P<plain>    [^ \t\n'"\\]+ )
    | ' (?P<single> [^']* ) '
    | " (?P<double> (?: [^"\\] | \\. )* ) "
    | \\ (?P<escaped> . )
    """,
    re.VERBOSE,
)
# Within double quotes a backslash means something before these only.
_DOUBLE_ESCAPE: Final = re.compile(r'\\([$`"\\])')
# llama-swap's names of macros, and the dot: so that its ${env.X} is called unknown, not passed on.
_PLACEHOLDER: Final = re.compile(r"\$\{([A-Za-z0-9_.-]+)\}")


@attrs.define(eq=False)
class UnterminatedQuote(Exception):
    """A quote of a command is opened and never closed."""

    quote: str
    line: int
    """Within the command text, from 1."""
    column: int
    """Within the line, from 1."""

    def __str__(self) -> str:
        return (
            f"found {self.quote} at line {self.line}, column {self.column} of the command, allowed are quotes in pairs"
        )


def split(text: str) -> list[str]:
    r"""The arguments of the command *text*.

    Lines that begin with `#` are comments; a backslash at the end of a line joins it to
    the next.  Separators are space, tab and newline.  Single quotes keep everything,
    double quotes all but a backslash before one of ``$`"\``, and a
    backslash outside quotes keeps the next character.

    Raises:
        UnterminatedQuote: a quote is never closed.
    """
    lines = _meaningful_lines(text)
    joined = "\n".join(line for _, line in lines)
    arguments: list[str] = []
    current: list[str] = []  # pieces of the argument being read; [""] is an empty one
    position = 0
    while position < len(joined):
        match = _PIECE.match(joined, position)
        if match is None:
            # Everything else matches, so this is a quote without its other half.
            raise _unterminated(joined, position, [number for number, _ in lines])
        if match["space"] is None:
            current.append(_meaning(match))
        elif current:
            arguments.append("".join(current))
            current = []
        position = match.end()
    if current:
        arguments.append("".join(current))
    return arguments


def placeholders(text: str) -> list[str]:
    """Names of the placeholders `${NAME}` in *text*, in their order."""
    return _PLACEHOLDER.findall(text)


def substitute(text: str, values: Mapping[str, str]) -> str:
    """*text* with each `${NAME}` that *values* knows replaced once; others stay."""
    return _PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), text)


def _meaningful_lines(text: str) -> list[tuple[int, str]]:
    """The lines that are no comments with their numbers, continuation backslashes replaced by a space."""
    lines = []
    for number, line in enumerate(text.split("\n"), start=1):
        trimmed = line.rstrip()
        if trimmed.lstrip().startswith("#"):
            continue
        lines.append((number, f"{trimmed[:-1]} " if trimmed.endswith("\\") else line))
    return lines


def _meaning(match: re.Match[str]) -> str:
    """What one piece adds to its argument."""
    match match.lastgroup:
        case "double":
            return _DOUBLE_ESCAPE.sub(r"\1", match["double"])
        case name:
            assert name is not None  # each alternative of _PIECE has a group
            return match[name]


def _unterminated(joined: str, position: int, numbers: list[int]) -> UnterminatedQuote:
    before = joined[:position]
    return UnterminatedQuote(
        quote=joined[position],
        line=numbers[before.count("\n")],
        column=position - before.rfind("\n"),
    )
