"""What must hold between the resolved values: names, choices, addresses, groups.

Nothing is changed here; every finding goes to the mistakes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Final

from trioswap.config.addresses import Address, parse_listen, parse_proxy
from trioswap.config.mistakes import Mistakes, Path, did_you_mean, found, quoted
from trioswap.config.schema import Config, GroupConfig

LOG_LEVELS: Final = ("debug", "info", "warning", "error")
PORT_OWNERS: Final = ("child", "any")


def check(config: Config, mistakes: Mistakes) -> None:
    """Add what is wrong with *config* to *mistakes*."""
    _check_choices(config, mistakes)
    _check_aliases(config, mistakes)
    group_of = _check_members(config, mistakes)
    _check_addresses(config, group_of, mistakes)
    # Last: a mistake about a whole table would hide those within it.
    _check_names(config, mistakes)


# ---- single values ----------------------------------------------------------------------


def _check_choices(config: Config, mistakes: Mistakes) -> None:
    _check_choice(("log_level",), config.log_level, LOG_LEVELS, mistakes)
    for model in config.models.values():
        _check_choice(("models", model.name, "port_owner"), model.port_owner, PORT_OWNERS, mistakes)


def _check_choice(path: Path, value: str, allowed: Iterable[str], mistakes: Mistakes) -> None:
    if value not in allowed:
        mistakes.add(path, found(value, f"one of {', '.join(allowed)}") + did_you_mean(value, allowed))


# ---- names ------------------------------------------------------------------------------


def _check_names(config: Config, mistakes: Mistakes) -> None:
    """Names travel in JSON, paths and log lines."""
    paths: list[Path] = [("models", name) for name in config.models]
    paths += [("groups", group.name) for group in config.groups]
    for path in paths:
        _check_name(path, str(path[-1]), mistakes)


def _check_name(path: Path, name: str, mistakes: Mistakes) -> None:
    if not name or not name.isprintable() or name != name.strip():
        mistakes.add(path, found(name, "a name of printable characters without spaces around it"))


def _check_aliases(config: Config, mistakes: Mistakes) -> None:
    owners: dict[str, str] = {}
    for model in config.models.values():
        for index, alias in enumerate(model.aliases):
            path = ("models", model.name, "aliases", index)
            _check_name(path, alias, mistakes)
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
                    hint = did_you_mean(config.resolve(member) or member, config.models)
                    mistakes.add(path, found(member, "the name of a model") + hint)
            elif member in group_of:
                where = "in this group" if group_of[member] is group else f"in group {quoted(group_of[member].name)}"
                mistakes.add(path, f"found {quoted(member)}, which is {where} already, allowed is one group, once")
            group_of.setdefault(member, group)
    return group_of


# ---- addresses --------------------------------------------------------------------------


def _check_addresses(config: Config, group_of: dict[str, GroupConfig], mistakes: Mistakes) -> None:
    listen = _address(("listen",), parse_listen, config.listen, mistakes)
    # The first model of each group on each address; a swap group may well share one.
    seen: dict[int, dict[tuple[Address, str], str]] = defaultdict(dict)
    for name, model in sorted(config.models.items()):
        path = ("models", name, "proxy")
        address = _address(path, parse_proxy, model.proxy, mistakes)
        if address is None:
            continue
        if listen is not None and listen.overlaps(address):
            mistakes.add(
                path, f"found {quoted(model.proxy)}, which is where trioswap listens, allowed is another address"
            )
        neighbours = seen[address.port]
        for (taken, _), other in neighbours.items():
            if taken.overlaps(address) and _coexist(group_of[other], group_of[name]):
                clash = f"found {quoted(model.proxy)}, which is the address of model {quoted(other)} too"
                mistakes.add(path, f"{clash}, allowed is that only for models that are never resident together")
        neighbours.setdefault((address, group_of[name].name), name)


def _address(path: Path, parse: Callable[[str], Address], value: str, mistakes: Mistakes) -> Address | None:
    if mistakes.about(path):
        return None
    try:
        return parse(value)
    except ValueError as exc:
        mistakes.add(path, str(exc))
        return None


def _coexist(one: GroupConfig, other: GroupConfig) -> bool:
    """Whether members of the two groups can be resident together (core reference 1.11, eviction rule).

    What is resident stays when the newcomer's group is not exclusive, or its own is
    persistent; either may be the newcomer.
    """
    if one is other:
        return not one.swap
    return any(not new.exclusive or old.persistent for new, old in ((one, other), (other, one)))
