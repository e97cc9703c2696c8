"""What is different in a new configuration, and what each difference takes: at once, a fresh server, a fresh daemon.

Here it is only decided; carrying it out is the daemon's job.  Two configurations are compared
by what they mean, so comments, blanks and macros make no difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import attrs

from trioswap.config.schema import Config, GroupConfig, MemoryConfig

# ---- fields, with the keys by which people know them: a test holds that each has its place ----

# What a server was started with, or is watched by: it has to be started again.
RESTARTS: Final = {
    "argv": "cmd",  # also what has become of `gguf`, `args` and ${PORT}
    "proxy": "proxy",
    "check_endpoint": "check_endpoint",
    "port_owner": "port_owner",
    "env": "env",
}
# What is looked up when it is needed, of a server that runs as well; limits of what is under way
# move (`limits`).  What a server takes of the memory, and where, counts from its next start: what
# it holds was reserved by the old rule.
UPDATES: Final = {
    "stop_argv": "cmd_stop",
    "aliases": "aliases",
    "unlisted": "unlisted",
    "display_name": "name",
    "description": "description",
    "use_model_name": "use_model_name",
    "ttl": "ttl",
    "health_check_timeout": "health_check_timeout",
    "unload_timeout": "unload_timeout",
    "stop_signal": "stop_signal",
    "never_kill": "never_kill",
    "hooks": "hooks",
    "hook_timeout": "hook_timeout",
    "liveness": "liveness",
    "liveness_misses": "liveness_misses",
    "backoff": "backoff",
    "backoff_max": "backoff_max",
    "max_wait": "max_wait",
    "drain_timeout": "drain_timeout",
    "unload_drain_timeout": "unload_drain_timeout",
    "turn_lease": "turn_lease",
    "linger": "linger",
    "parallel": "parallel",
    "concurrency_limit": "concurrency_limit",
    "queue_timeout": "queue_timeout",
    "weight": "weight",
    "priority": "priority",
    "load_cost": "load_cost",
    "stop_cost": "stop_cost",
    "memory": "memory",
    "device": "device",
    "filters": "filters",
    "timeouts": "timeouts",
    "capabilities": "capabilities",
    "metadata": "metadata",
    "send_loading_state": "send_loading_state",
    "ignore_websockets": "compat.ignore_websockets",
}
# What requests, listings and decisions look up anew each time.
SETTINGS: Final = {
    "policy": "policy",
    "parallel_loads": "parallel_loads",
    "matrix": "matrix",
    "start_port": "start_port",  # whose port it changes is among the models
    "api_keys": "api_keys",
    "cors": "cors",
    "trusted_proxies": "trusted_proxies",
    "heartbeat": "heartbeat",
    "max_queue": "max_queue",
    "log_level": "log_level",
    "log_time_format": "log_time_format",
    "max_request_body": "max_request_body",
    "max_upload": "max_upload",
    "include_aliases_in_list": "include_aliases_in_list",
    "hooks": "hooks",  # what is new in a `preload` is loaded, now or then; what is gone from it stays
    "ignore_paths": "upstream.ignore_paths",
    # The rest is not acted on by this version (config.later), so nothing stands in its way.
    "metrics_max_in_memory": "metrics_max_in_memory",
    "capture_buffer": "capture_buffer",
    "store": "store",
    "performance": "performance",
    "ui": "ui",
}
# The same, of which each entry is told by its name.
TABLES: Final = ("keys", "profiles", "selectors", "peers")
# What a daemon does once, at its start.
LATER: Final = {
    "listen": "listen",  # clients have connections to the old address, and it may be a privileged one
    "state_dir": "state_dir",  # the claim to it names this daemon, and the marks of its model servers
    "log_to_stdout": "log_to_stdout",  # the handlers of logging are there from the first line to the last
    "log_dir": "log_dir",
    "log_file_size": "log_file_size",
    "log_files": "log_files",
}
# Of each the comparison has a function of its own.
OTHERS: Final = ("models", "groups", "memory", "tls")


@attrs.frozen
class Changes:
    """What is different in a new configuration; a model is in one of the first four at most."""

    added: tuple[str, ...] = ()
    """Models, sorted."""
    removed: tuple[str, ...] = ()
    """Models, sorted."""
    restarted: Mapping[str, tuple[str, ...]] = attrs.field(factory=dict)
    """Models whose server, if it runs, must be stopped before they are what is written, with the keys that changed."""
    updated: Mapping[str, tuple[str, ...]] = attrs.field(factory=dict)
    """Models that differ in what takes effect at once, with the keys that changed."""
    settings: tuple[str, ...] = ()
    """Key paths beside the models that take effect at once; never values, of which some are secret."""
    later: tuple[str, ...] = ()
    """Key paths that take effect when the daemon is started again."""

    @property
    def nothing(self) -> bool:
        """Both mean the same."""
        return self == Changes()

    def document(self) -> dict[str, Any]:
        """The same for JSON."""
        return {
            "added": list(self.added),
            "removed": list(self.removed),
            "restarted": {name: list(keys) for name, keys in self.restarted.items()},
            "updated": {name: list(keys) for name, keys in self.updated.items()},
            "settings": list(self.settings),
            "later": list(self.later),
        }

    def __str__(self) -> str:
        """One line for the log, of bounded length."""
        parts = (
            ("added", self.added),
            ("removed", self.removed),
            ("restarted", [f"{name} ({', '.join(keys)})" for name, keys in self.restarted.items()]),
            ("updated", [f"{name} ({', '.join(keys)})" for name, keys in self.updated.items()]),
            ("settings", self.settings),
            ("only when trioswap is started again", self.later),
        )
        return "; ".join(f"{title}: {_some(names)}" for title, names in parts if names) or "nothing changed"


# Longer lists tell less.
_SHOWN: Final = 10


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def compare(old: Config, new: Config) -> Changes:
    """What it takes to get from *old*, which is in effect, to *new*."""
    both = sorted(old.models.keys() & new.models.keys())
    different = {name: tuple(_different(old.models[name], new.models[name], RESTARTS | UPDATES)) for name in both}
    restarts = {*RESTARTS.values()}
    return Changes(
        added=tuple(sorted(new.models.keys() - old.models.keys())),
        removed=tuple(sorted(old.models.keys() - new.models.keys())),
        restarted={name: keys for name, keys in different.items() if not restarts.isdisjoint(keys)},
        updated={name: keys for name, keys in different.items() if keys and restarts.isdisjoint(keys)},
        settings=tuple(sorted(_settings(old, new))),
        later=tuple(sorted(_later(old, new))),
    )


def effective(old: Config, new: Config) -> Config:
    """*new*, but as in *old* where a daemon that runs with *old* must be started again for it.

    To be compared with the next one: what waits for a start is then told each time.
    """
    fields = [*LATER, *(["tls"] if (old.tls is None) != (new.tls is None) else [])]
    new = attrs.evolve(new, **{field: getattr(old, field) for field in fields})
    if _is_anew(old.memory, new.memory):
        if old.memory is not None and new.memory is not None:
            return attrs.evolve(new, memory=attrs.evolve(new.memory, devices=old.memory.devices))
        new = attrs.evolve(new, memory=old.memory)
        if old.memory is None and not new.groups and new.matrix is None:
            # It counts on memory alone; until that is counted one model at a time is on the safe side.
            new = attrs.evolve(new, groups=(GroupConfig("memory", tuple(sorted(new.models))),))
    return new


def _is_anew(old: MemoryConfig | None, new: MemoryConfig | None) -> bool:
    """Whether what is held now was never counted, will not be, or is of other devices."""
    if old is None or new is None:
        return old is not new
    same = None if old.devices is None else old.devices.keys()
    return same != (None if new.devices is None else new.devices.keys())


def _settings(old: Config, new: Config) -> Iterator[str]:
    yield from _different(old, new, SETTINGS)
    for table in TABLES:
        yield from _in_table(table, getattr(old, table), getattr(new, table))
    before, after = ({group.name: group for group in config.groups} for config in (old, new))
    yield from _in_table("groups", before, after)
    if old.memory is not None and new.memory is not None:
        names = {field.name: f"memory.{field.name}" for field in attrs.fields(MemoryConfig)}
        changed = _different(old.memory, new.memory, names)
        yield from (key for key in changed if not (key == "memory.devices" and _is_anew(old.memory, new.memory)))
    if old.tls is not None and new.tls is not None and old.tls != new.tls:
        yield "tls"  # a certificate and its key in other files


def _later(old: Config, new: Config) -> Iterator[str]:
    yield from _different(old, new, LATER)
    if _is_anew(old.memory, new.memory):
        yield "memory" if old.memory is None or new.memory is None else "memory.devices"
    if (old.tls is None) != (new.tls is None):
        yield "tls"  # whoever has connected speaks as before, and the bound URL is another


def _in_table(table: str, old: Mapping[str, object], new: Mapping[str, object]) -> Iterator[str]:
    """Paths of the entries that differ; that of the *table* where only their order does, which listings show."""
    paths = [f"{table}.{name}" for name in {**old, **new} if not _same(old.get(name), new.get(name))]
    yield from paths
    if not paths and list(old) != list(new):
        yield table


def _different(old: object, new: object, keys: Mapping[str, str]) -> list[str]:
    """The values of *keys* whose fields differ."""
    return [key for field, key in keys.items() if not _same(getattr(old, field), getattr(new, field))]


def _same(old: Any, new: Any) -> bool:
    """Whether both are the same also as JSON: for Python, True, 1 and 1.0 are equal."""
    if type(old) is not type(new):
        return False
    if isinstance(old, Mapping):
        return old.keys() == new.keys() and all(_same(value, new[key]) for key, value in old.items())
    if isinstance(old, (tuple, list)):
        return len(old) == len(new) and all(map(_same, old, new))
    if attrs.has(type(old)):
        fields = [field.name for field in attrs.fields(type(old)) if field.eq]
        return all(_same(getattr(old, name), getattr(new, name)) for name in fields)
    return bool(old == new)
