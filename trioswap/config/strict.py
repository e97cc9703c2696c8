"""The strict converter: from plain dicts and lists to raw classes, with every mistake in its place.

cattrs converts: it takes "no" for true, 5 for "5", and the letters of a text for a list.
So each type is asked for first, by the readers in `kinds`.  Which classes there are is the
business of `raw`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar, get_args, get_origin

import attrs
from cattrs import Converter
from cattrs.cols import list_structure_factory, mapping_structure_factory
from cattrs.dispatch import StructureHook
from cattrs.errors import (
    AttributeValidationNote,
    BaseValidationError,
    ClassValidationError,
    ForbiddenExtraKeysError,
    IterableValidationNote,
)
from cattrs.gen import make_dict_structure_fn, override

from trioswap.config.keys import keys_of
from trioswap.config.kinds import READERS, Amount, Command, Json, Need, Secret, hidden, read_json_scalar
from trioswap.config.mistakes import Path, did_you_mean, found
from trioswap.config.values import SIZES

T = TypeVar("T")


class Wrong(Exception):
    """A document that does not have the shape asked for."""

    def __init__(self, mistakes: list[tuple[Path, str]]) -> None:
        super().__init__(f"{len(mistakes)} mistakes")
        self.mistakes = mistakes


def structure(document: object, table: type[T]) -> T:
    """The *document* as an instance of the raw class *table*.

    Raises:
        Wrong: with all mistakes there are.
    """
    try:
        return _CONVERTER.structure(document, table)
    except ClassValidationError as group:
        raise Wrong(_flatten(group, ())) from None


def _flatten(error: BaseException, path: Path) -> list[tuple[Path, str]]:
    """The mistakes within cattrs' tree of errors (the walk of `cattrs.transform_error`, with our paths and texts)."""
    if isinstance(error, ForbiddenExtraKeysError):
        known = list(keys_of(error.cl))
        return [((*path, key), _unknown_key(key, known)) for key in sorted(error.extra_fields)]
    if not isinstance(error, BaseValidationError):
        return [(path, str(error))]  # one of the readers said why
    return [mistake for inner in error.exceptions for mistake in _flatten(inner, (*path, *_step(inner)))]


def _step(error: BaseException) -> Path:
    """Where *error* lies within the group that holds it: cattrs leaves that in a note."""
    for note in getattr(error, "__notes__", ()):
        if isinstance(note, AttributeValidationNote):
            return (note.name.removesuffix("_"),)
        if isinstance(note, IterableValidationNote):
            return (note.index,)
    return ()


def _unknown_key(key: str, known: list[str]) -> str:
    hint = did_you_mean(key, known)
    return f"unknown key{hint}" if hint else f"unknown key, allowed are {', '.join(known)}"


# ---- hooks --------------------------------------------------------------------------------


def _hook(read: Callable[[object], object]) -> StructureHook:
    return lambda value, _: read(value)


def _guarded(kind: type, allowed: str, hook: StructureHook, *, hides: bool) -> StructureHook:
    """*hook* for values of *kind* only; *hides*: what may be a secret in the wrong place is not shown."""

    def structure(value: object, type_: Any) -> object:
        if not isinstance(value, kind):
            raise ValueError(
                hidden(allowed) if hides and isinstance(value, str | int | float) else found(value, allowed)
            )
        return hook(value, type_)

    return structure


def _origin_is(kind: type) -> Callable[[Any], bool]:
    """A predicate that knows `list[str]` by *kind* `list`."""
    return lambda type_: get_origin(type_) is kind


def _holds_secret(type_: Any) -> bool:
    """Whether a secret is expected right in a value of *type_*, so that it may stand in its place."""
    if isinstance(type_, type) and attrs.has(type_):
        return any(_holds_secret(key.type) for key in keys_of(type_).values() if key.table is None)
    arguments = get_args(type_)
    return type_ is Secret or (bool(arguments) and _holds_secret(arguments[-1]))


def _table_hook(table: type, converter: Converter) -> StructureHook:
    renamed = {key.attribute: override(rename=key.name) for key in keys_of(table).values()}
    # Other settings of the function share its keyword arguments with the names of fields.
    hook: StructureHook = make_dict_structure_fn(table, converter, **renamed)  # type: ignore[arg-type]
    return _guarded(dict, "a table", hook, hides=_holds_secret(table))


def _make_converter() -> Converter:
    converter = Converter(detailed_validation=True, forbid_extra_keys=True)

    def command(value: object, _: object) -> object:
        if value is None:
            return None
        if not isinstance(value, str | list):
            raise ValueError(found(value, "text or an array of texts"))
        return converter.structure(value, list[str] if isinstance(value, list) else str)

    def need(value: object, _: object) -> object:
        if value is None:
            return None
        if not isinstance(value, str | int | float | dict):
            raise ValueError(found(value, f"{SIZES}, or a table of such sizes by device"))
        return converter.structure(value, dict[str, Amount] if isinstance(value, dict) else Amount)

    def json(value: object, _: object) -> object:
        if isinstance(value, list):
            return converter.structure(value, list[Json])
        return converter.structure(value, dict[str, Json]) if isinstance(value, dict) else read_json_scalar(value)

    for type_, read in READERS.items():
        converter.register_structure_hook(type_, _hook(read))
    converter.register_structure_hook(Command | None, command)
    converter.register_structure_hook(Need | None, need)
    converter.register_structure_hook(Json, json)
    converter.register_structure_hook_factory(
        _origin_is(list),
        lambda type_: _guarded(
            list, "an array of texts", list_structure_factory(type_, converter), hides=_holds_secret(type_)
        ),
    )
    converter.register_structure_hook_factory(
        _origin_is(dict),
        # Keys are text anyway, and names have rules of their own (`checks`), so keys are not structured.
        lambda type_: _guarded(
            dict, "a table", mapping_structure_factory(type_, converter, key_type=Any), hides=_holds_secret(type_)
        ),
    )
    converter.register_structure_hook_factory(attrs.has, lambda type_: _table_hook(type_, converter))
    return converter


_CONVERTER: Final = _make_converter()
