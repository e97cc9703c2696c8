"""Patterns of names and paths, in which `*` is any text, the empty one and slashes included."""

from __future__ import annotations

from typing import Final

ANY: Final = "*"


def fits(pattern: str, text: str) -> bool:
    """Whether *pattern* is about the whole of *text*.

    No other character means anything.  What is between two `*` is taken where it first
    occurs, which leaves the most to the rest: so nothing is tried twice, whatever a
    client sends.
    """
    first, *rest = pattern.split(ANY)
    if not rest:
        return text == pattern
    *middle, last = rest
    end = len(text) - len(last)
    if len(first) > end or not text.startswith(first) or not text.endswith(last):
        return False
    position = len(first)
    for piece in middle:
        found = text.find(piece, position, end)
        if found < 0:
            return False
        position = found + len(piece)
    return True
