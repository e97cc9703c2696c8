"""The whole file from what is written to what is meant: ports and groups.

A single model is the job of `model`; what can be seen from the resolved values alone is
judged in `checks`.
"""

from __future__ import annotations

from pathlib import Path as FilePath
from typing import Final

from trioswap.config.addresses import MAX_PORT
from trioswap.config.mistakes import Mistakes, found
from trioswap.config.model import ModelReader, given
from trioswap.config.raw import RawConfig
from trioswap.config.schema import START_PORT, Config, GroupConfig

# llama-swap's name for the group of all models that are in none (core reference 1.11).
DEFAULT_GROUP: Final = "(default)"

_DEFAULTS: Final = Config()
_GROUP_DEFAULTS: Final = GroupConfig(name="", members=())


def resolve(raw: RawConfig, directory: FilePath, mistakes: Mistakes) -> Config:
    """The configuration meant by *raw*; after mistakes it holds stand-ins and must not be used.

    *directory* is what relative paths of the file are relative to.
    """
    readers = {name: ModelReader(name, model, raw, directory, mistakes) for name, model in (raw.models or {}).items()}
    ports = _give_ports(sorted(name for name, reader in readers.items() if reader.uses_port), raw, mistakes)
    models = {name: reader.resolve(ports.get(name)) for name, reader in readers.items()}
    return Config(
        models=models,
        groups=_groups(raw, sorted(models), mistakes),
        listen=given(raw.listen, default=_DEFAULTS.listen),
        log_level=given(raw.log_level, default=_DEFAULTS.log_level),
        max_request_body=given(raw.max_request_body, default=_DEFAULTS.max_request_body),
    )


def _give_ports(names: list[str], raw: RawConfig, mistakes: Mistakes) -> dict[str, int]:
    """A port for each of *names*, one after the other (core reference 1.5)."""
    first = given(raw.start_port, default=START_PORT)
    last = first + max(len(names), 1) - 1
    if not 1 <= first <= MAX_PORT:
        mistakes.add(("start_port",), found(first, f"1 to {MAX_PORT}"))
    elif last > MAX_PORT:
        need = f"found {first}, from which {len(names)} models need the ports up to {last}"
        mistakes.add(("start_port",), f"{need}, allowed is 1 to {MAX_PORT}")
    base = START_PORT if mistakes.about(("start_port",)) else first
    return {name: base + index for index, name in enumerate(names)}


def _groups(raw: RawConfig, names: list[str], mistakes: Mistakes) -> tuple[GroupConfig, ...]:
    """The groups as written, then the group of those of *names* that are in none."""
    if DEFAULT_GROUP in (raw.groups or {}):
        text = "found the name of the group of all models that are in no other, allowed is any other name"
        mistakes.add(("groups", DEFAULT_GROUP), text)
    groups = [
        GroupConfig(
            name=name,
            members=tuple(group.members or ()),
            swap=given(group.swap, default=_GROUP_DEFAULTS.swap),
            exclusive=given(group.exclusive, default=_GROUP_DEFAULTS.exclusive),
            persistent=given(group.persistent, default=_GROUP_DEFAULTS.persistent),
        )
        for name, group in (raw.groups or {}).items()
    ]
    grouped = {member for group in groups for member in group.members}
    if rest := tuple(name for name in names if name not in grouped):
        groups.append(GroupConfig(name=DEFAULT_GROUP, members=rest))
    return tuple(groups)
