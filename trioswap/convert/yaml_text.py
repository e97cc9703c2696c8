"""Writes a document as YAML for people: in blocks, with texts of several lines as such, and comments."""

from __future__ import annotations

import json
import math
import re
from typing import Any, Final

from trioswap.config.mistakes import Path
from trioswap.config.scalars import FLAGS, resolve
from trioswap.convert.comments import Comment, Comments
from trioswap.convert.writing import Page, quoted

# What is text without quotes to every reader of YAML.
_PLAIN: Final = re.compile(r"[A-Za-z_/][A-Za-z0-9_./@+=-]*(?::[A-Za-z0-9_./@+=-]+)*|[0-9]+(?:\.[0-9]+)?[A-Za-z]+")
# Also commands, with references within them: alone these might get a type, and those to the
# environment get one wherever they stand.
_PLAIN_WORDS: Final = re.compile(
    r"[A-Za-z_/.](?:(?!\$\{env\.)[A-Za-z0-9_./@+=,$'\"{}-]|(?<=[^ ]):(?=[^ ])| (?=[^ #]))*(?<! )"
)
# A literal block shows these as they are.  Where it begins with blanks, or holds a line of
# blanks, or ends with an empty one, its reader would have to guess.
_BLOCK: Final = re.compile(
    r"(?![ \n])(?:[\t\n\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff])+"
)
_STEP: Final = "  "


def write_yaml(values: dict[str, Any], comments: Comments) -> str:
    """The *values* with *comments* by their paths, in their order."""
    page = Page(dict(comments))
    if values:
        _mapping(page, values, (), "")
    else:
        page.lines.append("{}")
    return page.text()


def _mapping(page: Page, mapping: dict[str, Any], path: Path, indent: str) -> None:
    for number, (key, value) in enumerate(mapping.items()):
        # Sections, and the tables by name within them, keep a distance.
        if isinstance(value, dict) and value and (not path or (len(path) == 1 and number)):
            page.gap()
        _entry(page, f"{indent}{_key(key)}:", value, (*path, key), indent)
        if not path and isinstance(value, dict) and value and number < len(mapping) - 1:
            page.gap()


def _entry(page: Page, start: str, value: Any, path: Path, indent: str) -> None:
    """A *value* behind its key, or behind the dash of a list."""
    comment = page.take(path)
    page.add_before(comment, indent)
    inner = indent + _STEP
    if isinstance(value, dict) and value:
        page.add(start, comment)
        _mapping(page, value, path, inner)
    elif isinstance(value, list) and value:
        page.add(start, comment)
        for index, element in enumerate(value):
            _entry(page, f"{inner}-", element, (*path, index), inner)
    elif isinstance(value, str) and _is_block(value):
        _block(page, start, value, inner, comment)
    else:
        page.add(f"{start} {_scalar(value)}", comment)


def _is_block(text: str) -> bool:
    lines = text.split("\n")
    has_blanks = any(line and not line.strip(" \t") for line in lines)
    return len(lines) > 1 and not text.endswith("\n\n") and not has_blanks and bool(_BLOCK.fullmatch(text))


def _block(page: Page, start: str, text: str, indent: str, comment: Comment) -> None:
    page.add(f"{start} |{'' if text.endswith(chr(10)) else '-'}", comment)
    page.lines += [indent + line if line else "" for line in text.removesuffix("\n").split("\n")]


def _scalar(value: Any) -> str:
    match value:
        case None:
            return "null"
        case float() if not math.isfinite(value):
            return ".nan" if math.isnan(value) else f"{'-' if value < 0 else ''}.inf"
        case str():
            is_plain = _PLAIN.fullmatch(value) or (" " in value and _PLAIN_WORDS.fullmatch(value))
            return value if is_plain and _stays_text(value) else quoted(value)
        case _:
            return json.dumps(value)  # numbers, true, false, [] and {}


def _key(key: str) -> str:
    return key if _PLAIN.fullmatch(key) and _stays_text(key) else quoted(key)


def _stays_text(text: str) -> bool:
    return isinstance(resolve(text), str) and text not in FLAGS
