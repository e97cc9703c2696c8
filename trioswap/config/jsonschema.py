"""The JSON schema of configuration files, for editors, made from what the raw classes declare.

It judges shapes, as `raw` does; what must hold between values only the daemon knows.  A
file that it refuses is wrong; but where a macro stands for a number, it believes it.
"""

from __future__ import annotations

import tomllib
from typing import Any, Final, Literal, get_args, get_origin

from trioswap.config.describe import is_literal
from trioswap.config.keys import Key, keys_of
from trioswap.config.kinds import (
    Amount,
    Capacity,
    Command,
    Count,
    Duration,
    Factor,
    Json,
    Need,
    Number,
    Patience,
    Secret,
    Size,
    Whole,
)
from trioswap.config.raw import RawConfig, RawMatrix, RawMemory, RawProfile
from trioswap.config.raw_access import RawKey
from trioswap.config.raw_model import RawModel
from trioswap.config.values import DURATION_PATTERN, LARGEST, MOST, SIZE_PATTERN
from trioswap.config.yaml_shapes import more_keys, wider

Schema = dict[str, Any]
Spelling = Literal["toml", "yaml"]

DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"

# Any value but text may come out of a macro, or of the environment; these are texts until then.
_MACRO: Final[Schema] = {"type": "string", "pattern": r"\$\{"}
_NOT_0: Final[Schema] = {"pattern": "[1-9]"}
_TEXT: Final[Schema] = {"type": "string"}
_DURATION: Final[Schema] = {"type": "string", "minLength": 1, "pattern": f"^{DURATION_PATTERN}$"}
_SIZE: Final[Schema] = {"type": "string", "pattern": f"^{SIZE_PATTERN}$"}


def _one_of(*shapes: Schema) -> Schema:
    return {"oneOf": [*shapes, _MACRO]}


_AMOUNT: Final = _one_of({"type": "integer", "minimum": 0, "maximum": LARGEST}, _SIZE)

_SHAPES: Final[dict[Any, Schema]] = {
    str: _TEXT,
    str | None: {"type": ["string", "null"]},
    Secret: _TEXT,
    bool: _one_of({"type": "boolean"}),
    int: _one_of({"type": "integer"}),
    Count: _one_of({"type": "integer", "minimum": 1}),
    Whole: _one_of({"type": "integer", "minimum": 0}),
    Number: _one_of({"type": "number", "minimum": 0, "maximum": MOST}),
    Factor: _one_of({"type": "number", "exclusiveMinimum": 0, "maximum": MOST}),
    Duration: _one_of({"type": "number", "minimum": 0, "maximum": MOST}, _DURATION),
    Patience: _one_of({"type": "number", "exclusiveMinimum": 0, "maximum": MOST}, {"allOf": [_DURATION, _NOT_0]}),
    Size: _one_of({"type": "integer", "minimum": 1, "maximum": LARGEST}, {"allOf": [_SIZE, _NOT_0]}),
    Amount: _AMOUNT,
    Capacity: {"oneOf": [{"const": "auto"}, *_AMOUNT["oneOf"]]},
    Need: {"oneOf": [*_AMOUNT["oneOf"], {"type": "object", "additionalProperties": _AMOUNT}]},
    Command: {"oneOf": [_TEXT, {"type": "array", "items": _TEXT, "minItems": 1}]},
    Json: {},
    Any: {"type": ["string", "number", "boolean"]},
}

# What names must look like: those of tables, and others.
_A_NAME: Final = r"^\S(.*\S)?$"
_ANYTHING: Final = "^"
_NAMES: Final = {
    (RawProfile, "pins"): _A_NAME,
    (RawModel, "env"): r"^[A-Za-z_][A-Za-z0-9_]*$",
    (RawModel, "macros"): r"^[A-Za-z0-9_-]{1,63}$",
    (RawConfig, "macros"): r"^[A-Za-z0-9_-]{1,63}$",
    (RawMatrix, "vars"): r"^[A-Za-z0-9.-]{1,32}$",
    (RawMemory, "devices"): r"^[A-Za-z0-9_-]+$",
}


def schema(spelling: Spelling) -> Schema:
    """The JSON schema (draft 2020-12) of native files, or of YAML files, llama-swap's and ours."""
    parts: dict[str, Schema] = {}
    root = _table(RawConfig, spelling, parts)
    title = "Configuration of trioswap" if spelling == "toml" else "Configuration of trioswap, in llama-swap's YAML"
    return {"$schema": DIALECT, "title": title, **root, "$defs": parts}


def _table(table: type, spelling: Spelling, parts: dict[str, Schema]) -> Schema:
    """The shape of the raw class *table*; those of the tables in it go to *parts*."""
    keys = keys_of(table)
    properties = {_spelled(key, spelling): _property(table, key, spelling, parts) for key in keys.values()}
    if spelling == "yaml":
        properties |= more_keys(table, properties)
    shape: Schema = {"type": "object", "properties": properties, "additionalProperties": False}
    if required := [_spelled(key, spelling) for key in keys.values() if key.required]:
        shape["required"] = required
    if table is RawModel:
        shape["anyOf"] = [{"required": ["cmd"]}, {"required": ["gguf"]}]
    if table is RawKey:
        shape["oneOf"] = [{"required": ["key"]}, {"required": ["hash"]}]
    return shape


def _spelled(key: Key, spelling: Spelling) -> str:
    return key.name if spelling == "toml" else key.yaml


def _property(table: type, key: Key, spelling: Spelling, parts: dict[str, Schema]) -> Schema:
    names = _NAMES.get((table, key.name), _A_NAME if key.table else _ANYTHING)
    shape = _shape(key.type, names, key.choices, spelling, parts)
    if spelling == "yaml":
        shape = wider(table, key.name, shape)
    about: Schema = {"title": _spelled(key, spelling), "description": key.text}
    if is_literal(key.default):
        about["default"] = tomllib.loads(f"x = {key.default}")["x"]
    return about | shape


def _shape(type_: Any, names: str, choices: tuple[str, ...], spelling: Spelling, parts: dict[str, Schema]) -> Schema:
    if get_origin(type_) is list:
        return {"type": "array", "items": _shape(get_args(type_)[0], names, choices, spelling, parts)}
    if get_origin(type_) is dict:
        inner = _shape(get_args(type_)[1], _ANYTHING, (), spelling, parts)
        return {"type": "object", "patternProperties": {names: inner}, "additionalProperties": False}
    if choices:
        return _one_of({"enum": list(choices)})
    if type_ in _SHAPES:
        return _SHAPES[type_]
    name = type_.__name__.removeprefix("Raw").lower()
    if name not in parts:
        parts[name] = {}  # so that a table within itself would come to an end
        parts[name] = _table(type_, spelling, parts)
    return {"$ref": f"#/$defs/{name}"}
