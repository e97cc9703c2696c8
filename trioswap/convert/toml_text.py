"""Writes a native document as TOML for people: sections, texts of several lines as such, comments."""

from __future__ import annotations

import math
import re
from typing import Any, Final

from trioswap.config.mistakes import Path
from trioswap.convert.comments import Comment, Comments
from trioswap.convert.writing import WIDTH, Page, quoted

_BARE: Final = re.compile(r"[A-Za-z0-9_-]+")
# What stands for itself between single quotes; a line break only in a long text, where CR would be lost.
_LITERAL: Final = re.compile(r"[\t\x20-\x26\x28-\x7e\xa0-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]*")
_LONG_LITERAL: Final = re.compile(r"(?:(?!'''|\x7f)[\t\n\x20-\ud7ff\ue000-\U0010ffff])*")


def write_toml(values: dict[str, Any], comments: Comments) -> str:
    """The *values*, which hold no null, with *comments* by their paths.

    In each table its single values stand before its tables, as the language asks for;
    otherwise everything is in its order.
    """
    page = Page(dict(comments))
    _table(page, values, ())
    return page.text()


def _table(page: Page, table: dict[str, Any], path: Path) -> None:
    for key, value in table.items():
        if not isinstance(value, dict):
            _pair(page, key, value, (*path, key))
    for key, value in table.items():
        if isinstance(value, dict):
            _section(page, value, (*path, key))


def _section(page: Page, table: dict[str, Any], path: Path) -> None:
    comment = page.take(path)
    # A table of nothing but tables needs no header.
    has_header = not table or bool(comment.behind) or not all(isinstance(value, dict) for value in table.values())
    if has_header or comment.before:
        page.gap()
    page.add_before(comment)
    if has_header:
        page.add(f"[{'.'.join(_key(str(part)) for part in path)}]", comment)
    _table(page, table, path)


def _pair(page: Page, key: str, value: Any, path: Path) -> None:
    is_open = isinstance(value, list) and any(other[: len(path)] == path and other != path for other in page.comments)
    comment = page.take(path)
    page.add_before(comment)
    if isinstance(value, str) and "\n" in value and _LONG_LITERAL.fullmatch(value):
        page.add(f"{_key(key)} = '''\n{value}'''", comment)
        return
    line = f"{_key(key)} = {_inline(value)}"
    if isinstance(value, list) and (is_open or (value and len(line) > WIDTH)):
        _array(page, key, value, path, comment)
    else:
        page.add(line, comment)


def _array(page: Page, key: str, array: list[Any], path: Path, comment: Comment) -> None:
    page.lines.append(f"{_key(key)} = [")
    for index, value in enumerate(array):
        about = page.take_all((*path, index))
        page.add_before(about, "  ")
        page.add(f"  {_inline(value)},", about)
    page.add("]", comment)


def _inline(value: Any) -> str:
    """*value* on one line."""
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            return f"'{value}'" if ("\\" in value or '"' in value) and _LITERAL.fullmatch(value) else quoted(value)
        case float() if not math.isfinite(value):
            return str(value)  # inf, -inf, nan
        case int() | float():
            return repr(value)
        case list():
            return f"[{', '.join(map(_inline, value))}]"
        case _:
            pairs = ", ".join(f"{_key(key)} = {_inline(inner)}" for key, inner in value.items())
            return f"{{ {pairs} }}" if pairs else "{}"


def _key(key: str) -> str:
    return key if _BARE.fullmatch(key) else quoted(key)
