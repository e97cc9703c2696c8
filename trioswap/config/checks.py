"""What must hold between the resolved values: names, choices, groups, memory, addresses.

Nothing is changed here; every finding goes to the mistakes.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Final, TypeVar

from trioswap.config.access import check_keys
from trioswap.config.addresses import Address, parse_listen, parse_proxy
from trioswap.config.coexist import Coexistence, groups_coexist
from trioswap.config.mistakes import Mistakes, Path, found, quoted
from trioswap.config.peers import check_peers
from trioswap.config.routes import check_routes
from trioswap.config.rules import alias_path, check_choice, check_name
from trioswap.config.schema import (
    AUTO,
    LEAST_LOG_FILE_SIZE,
    LOG_LEVELS,
    LOG_TARGETS,
    MODALITIES,
    POLICIES,
    PORT_OWNERS,
    RAM,
    TIME_FORMATS,
    Config,
    GroupConfig,
    MemoryConfig,
    ModelConfig,
)
from trioswap.config.values import format_size

T = TypeVar("T")

_DEVICE: Final = re.compile(r"[A-Za-z0-9_-]+")
# Of a model that a mistake may have put out of its group: one that excludes all others, so
# that nothing is said to clash which may not.
_UNKNOWN_GROUP: Final = GroupConfig(name="", members=())


def check(config: Config, mistakes: Mistakes) -> None:
    """Add what is wrong with *config* to *mistakes*."""
    _check_choices(config, mistakes)
    _check_aliases(config, mistakes)
    group_of = _check_members(config, mistakes)
    if config.memory is not None:
        _check_memory(config.memory, config.models.values(), mistakes)
    _check_addresses(config, group_of, mistakes)
    check_peers(config.peers, config.listen, mistakes)
    check_routes(config, mistakes)
    check_keys(config, mistakes)
    _check_preload(config, mistakes)
    # Last: a mistake about a whole table would hide those within it.
    _check_names(config, mistakes)


# ---- single values ----------------------------------------------------------------------


def _check_choices(config: Config, mistakes: Mistakes) -> None:
    check_choice(("log_level",), config.log_level, LOG_LEVELS, mistakes)
    if config.log_time_format is not None:
        check_choice(("log_time_format",), config.log_time_format, TIME_FORMATS, mistakes)
    if config.log_to_stdout is not None:
        check_choice(("log_to_stdout",), config.log_to_stdout, LOG_TARGETS, mistakes)
    if config.log_file_size < LEAST_LOG_FILE_SIZE:
        text = found(format_size(config.log_file_size), f"{format_size(LEAST_LOG_FILE_SIZE)} or more")
        mistakes.add(("log_file_size",), text)
    check_choice(("policy",), config.policy, POLICIES, mistakes)
    for model in config.models.values():
        check_choice(("models", model.name, "port_owner"), model.port_owner, PORT_OWNERS, mistakes)
        if model.capabilities is not None:
            path = ("models", model.name, "capabilities")
            for key, modalities in (("in", model.capabilities.takes), ("out", model.capabilities.gives)):
                for index, modality in enumerate(modalities):
                    check_choice((*path, key, index), modality, MODALITIES, mistakes)


# ---- names ------------------------------------------------------------------------------


def _check_names(config: Config, mistakes: Mistakes) -> None:
    for table in ("models", "profiles", "selectors", "peers", "keys"):
        for name in getattr(config, table):
            check_name((table, name), name, mistakes)
    for group in config.groups:
        check_name(("groups", group.name), group.name, mistakes)


def _check_aliases(config: Config, mistakes: Mistakes) -> None:
    owners: dict[str, str] = {}
    for model in config.models.values():
        for index, alias in enumerate(model.aliases):
            path = alias_path(model, index)
            check_name(path, alias, mistakes)
            if alias in config.models:
                mistakes.add(path, f"found {quoted(alias)}, which is the name of a model, allowed is a name of its own")
            elif alias in owners:
                taken = f"which is an alias of {quoted(owners[alias])} already"
                mistakes.add(path, f"found {quoted(alias)}, {taken}, allowed is a name of its own")
            owners.setdefault(alias, model.name)


# ---- groups -----------------------------------------------------------------------------


def _check_members(config: Config, mistakes: Mistakes) -> dict[str, GroupConfig]:
    """The group of each model, for those that are in one."""
    group_of: dict[str, GroupConfig] = {}
    for group in config.groups:
        for index, member in enumerate(group.members):
            path = ("groups", group.name, "members", index)
            if member not in config.models:
                if not mistakes.about(("models",)):
                    hint = mistakes.guess(config.resolve(member) or member, config.models)
                    mistakes.add(path, found(member, "the name of a model") + hint)
            elif member in group_of:
                where = "in this group" if group_of[member] is group else f"in group {quoted(group_of[member].name)}"
                mistakes.add(path, f"found {quoted(member)}, which is {where} already, allowed is one group, once")
            group_of.setdefault(member, group)
    if mistakes.touch(("groups",)):
        group_of = dict.fromkeys(config.models, _UNKNOWN_GROUP) | group_of
    return group_of


# ---- memory -----------------------------------------------------------------------------


def _check_memory(memory: MemoryConfig, models: Iterable[ModelConfig], mistakes: Mistakes) -> None:
    for device in memory.devices or {}:
        _check_device(("memory", "devices", device), device, mistakes)
    for model in models:
        _check_devices_of(model, memory.devices, mistakes)
        if not mistakes.about(("memory", "headroom")):
            _check_need(model, memory, mistakes)


def _check_device(path: Path, name: str, mistakes: Mistakes, *, known: Iterable[str] | None = None) -> None:
    """It must be one of those *known*; None: the machine knows which there are."""
    if known is not None:
        check_choice(path, name, known, mistakes)
    elif name == AUTO or not _DEVICE.fullmatch(name):
        allowed = 'the name of a device, such as "ram" or "gpu0", of letters, digits, - and _, but not "auto"'
        mistakes.add(path, found(name, allowed))


def _check_devices_of(model: ModelConfig, known: Mapping[str, int | None] | None, mistakes: Mistakes) -> None:
    path: Path = ("models", model.name, "device")
    if isinstance(model.memory, Mapping):
        for device in model.memory:
            _check_device(("models", model.name, "memory", device), device, mistakes, known=known)
        if model.device == AUTO:
            mistakes.add(path, f"found {quoted(AUTO)} beside a table of memory by device, allowed is one of them")
    if model.device is not None and model.device != AUTO:
        _check_device(path, model.device, mistakes, known=None if known is None else (AUTO, *known))


def _check_need(model: ModelConfig, memory: MemoryConfig, mistakes: Mistakes) -> None:
    """A model that fits nowhere could never start; one without a device may go to any GPU."""
    path: Path = ("models", model.name, "memory")
    sizes = memory.devices or {}
    if isinstance(model.memory, Mapping):
        for device, need in model.memory.items():
            _check_fits((*path, device), need, {device: sizes.get(device)}, memory.headroom, mistakes)
    elif model.memory is not None:
        wanted = {model.device: sizes.get(model.device)} if model.device not in (None, AUTO) else _first_choice(sizes)
        _check_fits(path, model.memory, wanted, memory.headroom, mistakes)


def _first_choice(sizes: Mapping[str, int | None]) -> Mapping[str, int | None]:
    """The GPUs; host memory only where there is none."""
    return {device: size for device, size in sizes.items() if device != RAM} or sizes


def _check_fits(path: Path, need: int, sizes: Mapping[str, int | None], headroom: int, mistakes: Mistakes) -> None:
    """*need* must fit on one of the devices of these *sizes*; None: only the machine knows, so it may."""
    rooms = {device: max(0, size - headroom) for device, size in sizes.items() if size is not None}
    if not rooms or len(rooms) < len(sizes):
        return
    largest = max(rooms, key=rooms.__getitem__)
    if need > rooms[largest]:
        allowed = f"at most {format_size(rooms[largest])}, which is {largest} without the headroom"
        mistakes.add(path, f"found {format_size(need)}, allowed is {allowed}")


# ---- what is loaded without being asked for ----------------------------------------------


def _check_preload(config: Config, mistakes: Mistakes) -> None:
    """Each load of another would undo the one before."""
    if mistakes.touch(("groups",)) or mistakes.touch(("matrix",)):
        return
    coexistence, hooks = Coexistence.of(config), config.hooks
    for hook, models in (("on_startup", hooks.preload), ("on_idle", hooks.idle_preload)):
        obstacle = coexistence.obstacle(models)
        if obstacle is not None:
            mistakes.add(("hooks", hook, "preload"), f"found models {obstacle}, allowed are models that can be")


# ---- addresses --------------------------------------------------------------------------


def _check_addresses(config: Config, group_of: dict[str, GroupConfig], mistakes: Mistakes) -> None:
    listen = _address(("listen",), parse_listen, config.listen, mistakes)
    # The first model of each group on each address; a swap group may well share one.
    seen: dict[int, dict[tuple[Address, str | None], str]] = defaultdict(dict)
    for name, model in sorted(config.models.items()):
        path = ("models", name, "proxy")
        address = _address(path, parse_proxy, model.proxy, mistakes)
        if address is None:
            continue
        if listen is not None and listen.overlaps(address):
            mistakes.add(
                path, f"found {quoted(model.proxy)}, which is where trioswap listens, allowed is another address"
            )
        group, neighbours = group_of.get(name), seen[address.port]
        for (taken, _), other in neighbours.items():
            if taken.overlaps(address) and groups_coexist(group_of.get(other), group):
                clash = f"found {quoted(model.proxy)}, which is the address of model {quoted(other)} too"
                allowed = "that only for models of which groups never let two be resident together"
                mistakes.add(path, f"{clash}, allowed is {allowed}")
        neighbours.setdefault((address, group.name if group is not None else None), name)


def _address(path: Path, parse: Callable[[str], T], value: str, mistakes: Mistakes) -> T | None:
    if mistakes.about(path):
        return None
    try:
        return parse(value)
    except ValueError as exc:
        mistakes.add(path, str(exc))
        return None
