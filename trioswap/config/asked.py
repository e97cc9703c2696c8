"""Gives scalars the type that their field asks for, where YAML lets them be read in two ways.

What is written without quotes has a type before anybody knows what it is for: `0123` is a
number, and `yes` a text.  In a field for text it is what is written, and in one for true or
false it is that, as llama-swap has it.  TOML says which type it means, and stays strict.
"""

from __future__ import annotations

from types import UnionType
from typing import Any, Union, get_args, get_origin

import attrs

from trioswap.config.document import Copying, Document
from trioswap.config.keys import keys_of
from trioswap.config.kinds import Secret
from trioswap.config.mistakes import Mistakes, Path
from trioswap.config.raw import RawConfig
from trioswap.config.scalars import FLAGS


def as_asked(document: Document) -> Document:
    """The native *document* with the types that `raw` asks for, as far as its `texts` allow it."""
    asked = Document({}, {})
    copying = Copying(document, asked, Mistakes(), _change)  # no key changes, so no mistakes
    asked.values.update(copying.copy(document.values, (), ()))
    return asked


def _change(path: Path, value: Any, text: str | None) -> tuple[Any, str | None]:
    if text is None or value is None or (isinstance(value, str) and value not in FLAGS):
        return value, text
    types = _types_at(path)
    takes_text = str in types or Secret in types
    if isinstance(value, str):
        is_flag = bool in types and not takes_text
        return (FLAGS[value] if is_flag else value), text
    return (text if takes_text else value), text


def _types_at(path: Path) -> tuple[Any, ...]:
    """The types that the field at *path* may have; none where there is no such field."""
    types: tuple[Any, ...] = (RawConfig,)
    for part in path:
        types = next((_alternatives(inner) for type_ in types if (inner := _inside(type_, part)) is not None), ())
    return types


def _inside(type_: Any, part: str | int) -> Any:
    """The type of what is at *part* in a value of *type_*, or None."""
    if isinstance(part, int):
        return get_args(type_)[0] if get_origin(type_) is list else None
    if get_origin(type_) is dict:
        return get_args(type_)[1]
    key = keys_of(type_).get(part) if isinstance(type_, type) and attrs.has(type_) else None
    return None if key is None else key.type


def _alternatives(type_: Any) -> tuple[Any, ...]:
    return get_args(type_) if get_origin(type_) in (Union, UnionType) else (type_,)
