"""Which models may be resident together, and who must go for whom.

A policy is a pure function of (target, resident) with no memory of its own and no
logging: it is asked "what if" far more often than a swap happens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import attrs

from trioswap.config import GroupConfig


class Residency(Protocol):
    """A rule about living together."""

    def victims(self, target: str, resident: frozenset[str]) -> frozenset[str]:
        """The models among *resident* that must be gone before *target* may start."""
        ...

    def capacity(self, models: frozenset[str]) -> int:
        """How many of *models* can ever be resident together: the size of their `CapacityLimiter`."""
        ...


@attrs.frozen
class Groups:
    """llama-swap's groups (core reference 1.11).

    For a target in group G, a resident model of group H must go
      1. when H is G and G swaps,
      2. when H is another group, G is exclusive and H is not persistent.
    So `exclusive` belongs to the newcomer's group: a newcomer that is not exclusive leaves
    a resident exclusive model alone.
    """

    groups: Sequence[GroupConfig]
    _group_of: dict[str, GroupConfig] = attrs.field(init=False, repr=False)

    @_group_of.default
    def _index(self) -> dict[str, GroupConfig]:
        return {member: group for group in self.groups for member in group.members}

    def victims(self, target: str, resident: frozenset[str]) -> frozenset[str]:
        """The models among *resident* that must be gone before *target* may start."""
        return frozenset(other for other in resident if other != target and self._puts_out(target, other))

    def capacity(self, models: frozenset[str]) -> int:
        """How many of *models* can ever be resident together."""
        touched = [group for group in self.groups if models.intersection(group.members)]
        return sum(1 if group.swap else len(models.intersection(group.members)) for group in touched)

    def _puts_out(self, newcomer: str, other: str) -> bool:
        mine, theirs = self._group_of[newcomer], self._group_of[other]
        if mine is theirs:
            return mine.swap
        return mine.exclusive and not theirs.persistent


def swap_domains(models: Iterable[str], policy: Residency) -> list[frozenset[str]]:
    """*models* split into the smallest sets that are never in each other's way.

    Each becomes one swap group with its own lock and scheduler, so what cannot collide
    never waits for each other.
    """
    names = sorted(models)
    everyone = frozenset(names)
    neighbours = {name: set(policy.victims(name, everyone)) for name in names}
    for name, others in list(neighbours.items()):
        for other in others:
            neighbours[other].add(name)
    domains, seen = [], set[str]()
    for name in names:
        if name in seen:
            continue
        domain, todo = set[str](), [name]
        while todo:
            current = todo.pop()
            if current not in domain:
                domain.add(current)
                todo.extend(neighbours[current])
        seen |= domain
        domains.append(frozenset(domain))
    return domains
