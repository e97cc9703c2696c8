"""Where a key has another shape in llama-swap's YAML than in TOML, for the JSON schema.

What these shapes come to is decided where YAML is read.
"""

from __future__ import annotations

from typing import Any, Final

from trioswap.config.raw import RawConfig
from trioswap.config.raw_model import RawFilters, RawModel

Schema = dict[str, Any]

_INTEGER: Final[Schema] = {"type": "integer"}
_ENV: Final[Schema] = {"type": "array", "items": {"type": "string", "pattern": "^[A-Za-z_][A-Za-z0-9_]*="}}

_MORE: Final[dict[tuple[type, str], Schema]] = {
    (RawModel, "env"): _ENV,
    (RawModel, "ttl"): {"const": -1},
    (RawModel, "concurrency_limit"): {"type": "integer", "maximum": 0},
    (RawConfig, "metrics_max_in_memory"): {"type": "integer", "maximum": 0},
    (RawConfig, "capture_buffer"): {"type": "integer", "maximum": -1},
    (RawConfig, "log_level"): {"const": "warn"},
    (RawFilters, "strip_params"): {"type": "string"},
}
"""What may stand there besides."""


def wider(table: type, name: str, shape: Schema) -> Schema:
    """*shape*, of the key *name* of the raw class *table*, with what YAML files may say besides."""
    more = _MORE.get((table, name))
    if more is None:
        return shape
    return {"oneOf": [*shape["oneOf"], more]} if "oneOf" in shape else {"oneOf": [shape, more]}


def more_keys(table: type, properties: Schema) -> Schema:
    """Keys that only YAML files have, for the raw class *table* that has these *properties* already."""
    if table is RawFilters:
        return {"strip_params": {"type": "string", "deprecated": True, "description": "`stripParams` in older files."}}
    return {"routing": _routing(properties)} if table is RawConfig else {}


def _routing(properties: Schema) -> Schema:
    """llama-swap's block about who puts out whom, and who is next (core reference 1.11)."""
    priority = {"type": "object", "additionalProperties": _INTEGER, "description": "`priority` of models, by name."}
    settings = _object(groups=properties["groups"], matrix=properties["matrix"])
    router = _object(use={"enum": ["", "group", "matrix"]}, settings=settings)
    scheduler = _object(use={"enum": ["", "fifo"]}, settings=_object(fifo=_object(priority=priority)))
    return _object(router=router, scheduler=scheduler) | {"description": "Groups, matrix and priorities."}


def _object(**properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "additionalProperties": False}
