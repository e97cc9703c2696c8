"""What is known of each key of a configuration file beside its type: meaning, default, unit, YAML spelling.

`raw` and `raw_model` declare their fields with `key`; the page `docs/configuration.md`, the
JSON schema and the translation of llama-swap's YAML are made from what they declare.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Final, Union, get_args, get_origin, get_type_hints

import attrs

_NOTE: Final = "trioswap.key"
_WORD: Final = re.compile(r"_([a-z0-9])")


@attrs.frozen
class _Note:
    """What `key` leaves in the metadata of a field."""

    text: str
    yaml: str | None
    default: str
    unit: str
    required: bool
    choices: tuple[str, ...]


@attrs.frozen
class Key:
    """One key of a table."""

    name: str
    """In TOML."""
    yaml: str
    """In YAML."""
    attribute: str
    """Of the raw class; `in` is no name in Python."""
    type: Any
    """Of its value, where there is one."""
    text: str
    """What it means, in Markdown."""
    default: str
    """A TOML literal, or words; empty: none."""
    unit: str
    required: bool
    choices: tuple[str, ...]
    """All texts that are allowed, where they can be counted."""

    @property
    def table(self) -> type | None:
        """The raw class of the table, or of the tables by free names, that it holds; None: it holds none."""
        inner = get_args(self.type)[1] if self.is_by_name else self.type
        return inner if isinstance(inner, type) and attrs.has(inner) else None

    @property
    def is_by_name(self) -> bool:
        """Whether it holds a table whose own keys are free."""
        return get_origin(self.type) is dict


def key(
    text: str,
    *,
    yaml: str | None = None,
    default: str = "",
    unit: str = "",
    required: bool = False,
    choices: tuple[str, ...] = (),
) -> Any:
    """A field of a raw class: not written unless the file says it.

    *yaml* is its spelling there, in camelCase unless given; *default* is what holds when
    it is not written, as TOML or in words.
    """
    note = _Note(text, yaml, default, unit, required, choices)
    return attrs.field(default=None, metadata={_NOTE: note})


@functools.cache
def keys_of(table: type) -> Mapping[str, Key]:
    """The keys of the raw class *table* by their TOML names, in the order in which they are declared."""
    types = get_type_hints(table)
    keys = [_key(field, types[field.name]) for field in attrs.fields(table)]
    return MappingProxyType({key.name: key for key in keys})


def _key(field: attrs.Attribute[Any], type_: Any) -> Key:
    name = field.name.removesuffix("_")
    note: _Note = field.metadata[_NOTE]
    return Key(
        name=name,
        yaml=note.yaml or _WORD.sub(lambda match: match[1].upper(), name),
        attribute=field.name,
        type=_written(type_),
        text=note.text,
        default=note.default,
        unit=note.unit,
        required=note.required,
        choices=note.choices,
    )


def _written(type_: Any) -> Any:
    """*type_* without the None that stands for "not written"."""
    if get_origin(type_) not in (Union, UnionType):
        return type_
    return Union[tuple(arg for arg in get_args(type_) if arg is not NoneType)]  # noqa: UP007 - of a computed tuple
