"""What PyYAML says about a text that is no YAML, said so that the text can be repaired.

Its two parsers word the same mistake in two ways; each is recognised by a part of its words.
"""

from __future__ import annotations

from typing import Final

from trioswap.config.document import TOO_DEEP, Unreadable
from trioswap.config.mistakes import quoted

_OPEN_QUOTE: Final = "found a quote that is never closed, allowed are quotes in pairs"
_NO_COLON: Final = "found a key without its colon, allowed is key: value"
# Ours, by parts of PyYAML's words (those of the C parser, those of the Python one).
_OURS: Final[dict[str, tuple[str, ...]]] = {
    'found ":" where no key can end, allowed is one `key: value` on a line, with text that holds ": " in quotes': (
        "mapping values are not allowed",
    ),
    _OPEN_QUOTE: ("found unexpected end of stream",),
    "found neither a comma nor the closing bracket of a list or mapping in brackets, allowed is one of them": (
        "expected ',' or ']'",
        "expected ',' or '}'",
    ),
    r"found an unknown escape within double quotes, allowed are \\ for a backslash, or 'single' quotes": (
        "unknown escape",
        "expected escape sequence",
        "did not find expected hexdecimal number",
    ),
    _NO_COLON: ("could not find expected ':'",),
    "found what fits neither the line before nor, by its indentation, those above, "
    "allowed are `key: value` or `- item`, indented like their neighbours": (
        "expected <block end>",
        "did not find expected key",
        "did not find expected '-' indicator",
        "<document start>",
    ),
    TOO_DEEP: ("exceeded maximum nesting depth",),
}
_GENERIC: Final = "found what is no YAML, allowed is YAML"
_CANNOT_START: Final = "cannot start any token"


Position = tuple[int, int]
"""Line and column, from 1."""


def explain(problem: str, context: str, char: str, at: Position | None, begin: Position | None) -> Unreadable:
    """PyYAML's *problem* and *context* in our words, with its own behind them.

    *char* is what stands *at* the position of the problem; what PyYAML was reading began
    at *begin*.
    """
    words = _words(problem, char)
    if words in (_OPEN_QUOTE, _NO_COLON):
        at = begin or at  # where it begins tells more than where it should have ended
    reason = " ".join(", ".join(part for part in (context, problem) if part).split())
    if at is None:
        return Unreadable(f"{words} ({reason})")
    return Unreadable(f"{words} (column {at[1]}: {reason})", *at)


def _words(problem: str, char: str) -> str:
    if char == "\t" and (_CANNOT_START in problem or "tab" in problem):
        return "found a tab, allowed are spaces to indent with"
    if _CANNOT_START in problem and char:
        return f"found {quoted(char)} at the beginning of a value, allowed is such text in quotes"
    return next((ours for ours, parts in _OURS.items() if any(part in problem for part in parts)), _GENERIC)
