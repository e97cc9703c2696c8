"""The configuration file as it is written: classes that mirror it, and their strict reader.

Here only shapes are judged: known keys, right types, values that can be read at all.
`None` means "not written"; what that comes to is decided in `resolve`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Literal, NewType, get_origin

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
from cattrs.gen import make_dict_structure_fn

from trioswap.config.mistakes import Mistakes, Path, did_you_mean, found, shown
from trioswap.config.values import DURATIONS, NUMBERS, SIZES, parse_count, parse_duration, parse_number, parse_size

Duration = NewType("Duration", float)
Patience = NewType("Patience", float)
"""A duration that cannot be 0."""
Size = NewType("Size", int)
"""A size that cannot be 0."""
Amount = NewType("Amount", int)
"""A size that can."""
Number = NewType("Number", float)
Factor = NewType("Factor", float)
"""A number that cannot be 0."""
Count = NewType("Count", int)
Command = str | list[str] | None
"""A text to be split, or the arguments as they are."""
Need = Amount | dict[str, Amount] | None
"""Memory of one device, or of each of several."""
Capacity = Amount | Literal["auto"]
"""How large a device is; "auto": ask the machine."""


@attrs.frozen
class RawModel:
    """A table `[models.NAME]`."""

    cmd: Command = None
    gguf: str | None = None
    args: list[str] | None = None
    cmd_stop: Command = None
    proxy: str | None = None
    check_endpoint: str | None = None
    port_owner: str | None = None
    env: dict[str, str] | None = None
    aliases: list[str] | None = None
    unlisted: bool | None = None
    name: str | None = None
    description: str | None = None
    ttl: Duration | None = None
    health_check_timeout: Patience | None = None
    unload_timeout: Duration | None = None
    stop_signal: str | None = None
    max_wait: Duration | None = None
    drain_timeout: Duration | None = None
    unload_drain_timeout: Duration | None = None
    turn_lease: Number | None = None
    linger: Number | None = None
    parallel: Count | None = None
    weight: Factor | None = None
    priority: int | None = None
    load_cost: Duration | None = None
    stop_cost: Duration | None = None
    memory: Need = None
    device: str | None = None


@attrs.frozen
class RawGroup:
    """A table `[groups.NAME]`."""

    swap: bool | None = None
    exclusive: bool | None = None
    persistent: bool | None = None
    members: list[str] | None = None


@attrs.frozen
class RawMatrix:
    """The table `[matrix]`."""

    vars: dict[str, str] | None = None
    evict_costs: dict[str, Count] | None = None
    sets: dict[str, str] | None = None


@attrs.frozen
class RawMemory:
    """The table `[memory]`."""

    headroom: Amount | None = None
    yield_to_others: bool | None = None
    learn: bool | None = None
    devices: dict[str, Capacity] | None = None


@attrs.frozen
class RawConfig:
    """The whole file."""

    listen: str | None = None
    log_level: str | None = None
    start_port: int | None = None
    global_ttl: Duration | None = None
    health_check_timeout: Patience | None = None
    unload_timeout: Duration | None = None
    max_wait: Duration | None = None
    drain_timeout: Duration | None = None
    unload_drain_timeout: Duration | None = None
    turn_lease: Number | None = None
    linger: Number | None = None
    parallel: Count | None = None
    parallel_loads: Count | None = None
    policy: str | None = None
    max_request_body: Size | None = None
    state_dir: str | None = None
    models: dict[str, RawModel] | None = None
    groups: dict[str, RawGroup] | None = None
    matrix: RawMatrix | None = None
    memory: RawMemory | None = None


def read(document: dict[str, Any], mistakes: Mistakes) -> RawConfig:
    """The *document* as classes; what is wrong goes to *mistakes* and is left out.

    Changes *document*: wrong values are taken out of it, so that the rest can still be
    read and judged in the same run.
    """
    try:
        return _CONVERTER.structure(document, RawConfig)
    except ClassValidationError as group:
        wrong = _flatten(group, ())
    for path, text in wrong:
        mistakes.add(path, text)
        _mend(document, path)
    return _CONVERTER.structure(document, RawConfig)


def _flatten(error: BaseException, path: Path) -> list[tuple[Path, str]]:
    """The mistakes within cattrs' tree of errors (the walk of `cattrs.transform_error`, with our paths and texts)."""
    if isinstance(error, ForbiddenExtraKeysError):
        known = [field.name for field in attrs.fields(error.cl)]
        return [((*path, key), _unknown_key(key, known)) for key in sorted(error.extra_fields)]
    if not isinstance(error, BaseValidationError):
        return [(path, str(error))]  # one of the hooks below said why
    return [mistake for inner in error.exceptions for mistake in _flatten(inner, (*path, *_step(inner)))]


def _step(error: BaseException) -> Path:
    """Where *error* lies within the group that holds it: cattrs leaves that in a note."""
    for note in getattr(error, "__notes__", ()):
        if isinstance(note, AttributeValidationNote):
            return (note.name,)
        if isinstance(note, IterableValidationNote):
            return (note.index,)
    return ()


# ---- the strict converter -------------------------------------------------------------
#
# cattrs converts: it takes "no" for true, 5 for "5", and the letters of a text for a list.
# A file that says such things has a mistake in it, so each type here is asked for first.


def _text(value: object, _: object) -> str:
    if not isinstance(value, str):
        # A number where text belongs is mostly a forgotten pair of quotes.
        hint = f', did you mean "{shown(value)}"?' if isinstance(value, int | float) and abs(value) < 1e9 else ""
        raise ValueError(found(value, "text in quotes") + hint)
    if "\0" in value:
        raise ValueError(found(value, "text without NUL characters"))
    return value


def _flag(value: object, _: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(found(value, "true or false"))
    return value


def _integer(value: object, _: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(found(value, "a whole number"))
    return value


def _above_zero(parse: Callable[[object], float], allowed: str) -> StructureHook:
    """A hook for what *parse* reads, but 0."""

    def structure(value: object, _: object) -> float:
        result = parse(value)
        if not result:
            raise ValueError(found(value, f"{allowed}, but not 0"))
        return result

    return structure


def _capacity(value: object, _: object) -> int | str:
    if value == "auto":
        return "auto"
    try:
        return parse_size(value)
    except ValueError:
        raise ValueError(found(value, f'{SIZES}, or "auto"')) from None


def _guarded(kind: type, allowed: str, hook: StructureHook) -> StructureHook:
    """*hook* for values of *kind* only."""

    def structure(value: object, type_: Any) -> object:
        if not isinstance(value, kind):
            raise ValueError(found(value, allowed))
        return hook(value, type_)

    return structure


def _origin_is(kind: type) -> Callable[[Any], bool]:
    """A predicate that knows `list[str]` by *kind* `list`."""
    return lambda type_: get_origin(type_) is kind


def _make_converter() -> Converter:
    converter = Converter(detailed_validation=True, forbid_extra_keys=True)

    def command(value: object, _: object) -> object:
        if not isinstance(value, str | list):
            raise ValueError(found(value, "text or an array of texts"))
        return converter.structure(value, list[str] if isinstance(value, list) else str)

    def need(value: object, _: object) -> object:
        if not isinstance(value, str | int | float | dict):
            raise ValueError(found(value, f"{SIZES}, or a table of such sizes by device"))
        return converter.structure(value, dict[str, Amount] if isinstance(value, dict) else Amount)

    converter.register_structure_hook(str, _text)
    converter.register_structure_hook(bool, _flag)
    converter.register_structure_hook(int, _integer)
    converter.register_structure_hook(Duration, lambda value, _: parse_duration(value))
    converter.register_structure_hook(Patience, _above_zero(parse_duration, DURATIONS))
    converter.register_structure_hook(Size, _above_zero(parse_size, SIZES))
    converter.register_structure_hook(Amount, lambda value, _: parse_size(value))
    converter.register_structure_hook(Number, lambda value, _: parse_number(value))
    converter.register_structure_hook(Factor, _above_zero(parse_number, NUMBERS))
    converter.register_structure_hook(Count, lambda value, _: parse_count(value))
    converter.register_structure_hook(Command, command)
    converter.register_structure_hook(Need, need)
    converter.register_structure_hook(Capacity, _capacity)
    converter.register_structure_hook_factory(
        _origin_is(list),
        lambda type_: _guarded(list, "an array of texts", list_structure_factory(type_, converter)),
    )
    converter.register_structure_hook_factory(
        _origin_is(dict),
        # Keys are text anyway, and names have rules of their own (`checks`), so keys are not structured.
        lambda type_: _guarded(dict, "a table", mapping_structure_factory(type_, converter, key_type=Any)),
    )
    converter.register_structure_hook_factory(
        attrs.has,
        lambda type_: _guarded(dict, "a table", make_dict_structure_fn(type_, converter)),
    )
    return converter


_CONVERTER: Final = _make_converter()


def _unknown_key(key: str, known: list[str]) -> str:
    hint = did_you_mean(key, known)
    return f"unknown key{hint}" if hint else f"unknown key, allowed are {', '.join(known)}"


def _mend(document: dict[str, Any], path: Path) -> None:
    """Take the wrong value at *path* out of *document*.

    What others may refer to keeps its place: list elements keep their indices; models,
    groups and devices keep their names.
    """
    *parents, last = path
    holder: Any = document
    for part in parents:
        holder = holder[part]
    match path:
        case (*_, int()):
            holder[last] = ""
        case ("models" | "groups", _):
            holder[last] = {}
        case ("memory", "devices", _):
            holder[last] = "auto"
        case _:
            del holder[last]
