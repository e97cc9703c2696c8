"""The whole file from what is written to what is meant, and which rule of residency holds.

A single model is the job of `model`, ports are that of `ports`, a matrix that of `matrix`; what can be seen from the
resolved values alone is judged in `checks`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path as FilePath
from typing import Final

from trioswap.config.access import read_api_keys, read_cors, read_keys, read_proxies, read_tls
from trioswap.config.later import not_acted_on
from trioswap.config.matrix import MatrixConfig, read_matrix
from trioswap.config.mistakes import Mistakes
from trioswap.config.model import ModelReader, given
from trioswap.config.peers import read_peer
from trioswap.config.ports import give_ports, start_port
from trioswap.config.raw import RawConfig, RawGroup, RawMatrix, RawMemory, RawUpstream
from trioswap.config.routes import read_profile, read_selector
from trioswap.config.schema import AUTO, Config, GroupConfig, MemoryConfig
from trioswap.config.settings import (
    absolute,
    read_hooks,
    read_ignore_paths,
    read_performance,
    read_store,
    read_ui,
)

# llama-swap's name for the group of all models that are in none (core reference 1.11).
DEFAULT_GROUP: Final = "(default)"

_DEFAULTS: Final = Config()
_GROUP_DEFAULTS: Final = GroupConfig(name="", members=())
_MEMORY_DEFAULTS: Final = MemoryConfig()


def resolve(raw: RawConfig, directory: FilePath, mistakes: Mistakes, keep: Config | None = None) -> Config:
    """The configuration meant by *raw*; after mistakes it holds stand-ins and must not be used.

    *directory* is what relative paths of the file are relative to.  *keep* is the configuration
    in whose place this one comes: models keep the ports they have there.
    """
    readers = {name: ModelReader(name, model, raw, directory, mistakes) for name, model in (raw.models or {}).items()}
    ports = give_ports(sorted(name for name, reader in readers.items() if reader.uses_port), raw, mistakes, keep)
    models = {name: reader.resolve(ports.get(name)) for name, reader in readers.items()}
    names = {alias: model.name for model in models.values() for alias in model.aliases} | {
        name: name for name in models
    }
    api_keys = read_api_keys(raw.api_keys or (), mistakes)
    groups, matrix, memory = _residency(raw, models, mistakes)
    return Config(
        models=models,
        groups=groups,
        matrix=matrix,
        memory=memory,
        policy=given(raw.policy, default=_DEFAULTS.policy),
        parallel_loads=given(raw.parallel_loads, default=_DEFAULTS.parallel_loads),
        start_port=start_port(raw),
        listen=given(raw.listen, default=_DEFAULTS.listen),
        api_keys=api_keys,
        keys=read_keys(raw.keys or {}, api_keys, mistakes),
        tls=read_tls(raw.tls, directory, mistakes),
        cors=read_cors(raw.cors, mistakes),
        trusted_proxies=read_proxies(raw.trusted_proxies or (), mistakes),
        heartbeat=given(raw.heartbeat, default=_DEFAULTS.heartbeat) or None,  # 0 says none
        max_queue=given(raw.max_queue, default=_DEFAULTS.max_queue),
        log_level=given(raw.log_level, default=_DEFAULTS.log_level),
        log_time_format=raw.log_time_format,
        log_to_stdout=raw.log_to_stdout,
        log_dir=_directory("log_dir", raw.log_dir, directory, mistakes),
        log_file_size=given(raw.log_file_size, default=_DEFAULTS.log_file_size),
        log_files=given(raw.log_files, default=_DEFAULTS.log_files),
        max_request_body=given(raw.max_request_body, default=_DEFAULTS.max_request_body),
        max_upload=given(raw.max_upload, default=_DEFAULTS.max_upload),
        state_dir=_directory("state_dir", raw.state_dir, directory, mistakes),
        include_aliases_in_list=given(raw.include_aliases_in_list, default=_DEFAULTS.include_aliases_in_list),
        metrics_max_in_memory=given(raw.metrics_max_in_memory, default=_DEFAULTS.metrics_max_in_memory),
        capture_buffer=given(raw.capture_buffer, default=_DEFAULTS.capture_buffer) or None,  # 0 says none
        profiles={name: read_profile(name, profile, mistakes) for name, profile in (raw.profiles or {}).items()},
        selectors={name: read_selector(name, selector, mistakes) for name, selector in (raw.selectors or {}).items()},
        peers={name: read_peer(name, peer, mistakes) for name, peer in (raw.peers or {}).items()},
        hooks=read_hooks(raw, names, mistakes),
        ignore_paths=_ignore_paths(raw.upstream or RawUpstream(), mistakes),
        store=read_store(raw, directory, mistakes),
        performance=read_performance(raw.performance, mistakes),
        ui=read_ui(raw, mistakes),
        not_acted_on=not_acted_on(raw),
    )


def _directory(key: str, written: str | None, directory: FilePath, mistakes: Mistakes) -> FilePath | None:
    """Absolute; whether it is there, or can be made, the daemon finds out."""
    if written is None:
        return None
    return absolute(written, directory, (key,), "the path of a directory", mistakes)


def _ignore_paths(raw: RawUpstream, mistakes: Mistakes) -> tuple[re.Pattern[str], ...]:
    return _DEFAULTS.ignore_paths if raw.ignore_paths is None else read_ignore_paths(raw.ignore_paths, mistakes)


# ---- which rule of residency holds ------------------------------------------------------
#
# Groups and a matrix are two ways to say who may live beside whom, so a file says one of
# them.  Memory counts beside either when the file speaks of it; where the file says nothing
# at all, memory alone decides.


def _residency(
    raw: RawConfig, models: Collection[str], mistakes: Mistakes
) -> tuple[tuple[GroupConfig, ...], MatrixConfig | None, MemoryConfig | None]:
    """What become `groups`, `matrix` and `memory` of the Config."""
    matrix = None if raw.matrix is None else _matrix(raw.matrix, models, mistakes)
    if matrix is not None and raw.groups is not None:
        mistakes.add(("matrix",), "found matrix beside groups, allowed is one of them")
    counts = _memory_counts(raw)
    groups = () if raw.groups is None else _groups(raw.groups, sorted(models), mistakes, with_default=not counts)
    alone = raw.groups is None and matrix is None
    return groups, matrix, _memory(raw.memory or RawMemory()) if counts or alone else None


def _memory_counts(raw: RawConfig) -> bool:
    """Whether the file speaks of memory anywhere."""
    models = (raw.models or {}).values()
    return raw.memory is not None or any(model.memory is not None or model.device is not None for model in models)


def _matrix(raw: RawMatrix, models: Collection[str], mistakes: Mistakes) -> MatrixConfig:
    return read_matrix(raw.vars or {}, raw.evict_costs or {}, raw.sets or {}, models, mistakes)


def _memory(raw: RawMemory) -> MemoryConfig:
    devices = {name: None if size == AUTO else size for name, size in (raw.devices or {}).items()}
    return MemoryConfig(
        headroom=given(raw.headroom, default=_MEMORY_DEFAULTS.headroom),
        yield_to_others=given(raw.yield_to_others, default=_MEMORY_DEFAULTS.yield_to_others),
        learn=given(raw.learn, default=_MEMORY_DEFAULTS.learn),
        devices=devices or None,  # a table without devices says nothing about them
    )


def _groups(
    written: Mapping[str, RawGroup], names: list[str], mistakes: Mistakes, *, with_default: bool
) -> tuple[GroupConfig, ...]:
    """The groups as *written*, then *with_default* the group of those of *names* that are in none."""
    if DEFAULT_GROUP in written:
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
        for name, group in written.items()
    ]
    grouped = {member for group in groups for member in group.members}
    rest = tuple(name for name in names if name not in grouped)
    if rest and with_default:
        groups.append(GroupConfig(name=DEFAULT_GROUP, members=rest))
    return tuple(groups)
