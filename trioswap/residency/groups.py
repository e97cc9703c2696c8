"""llama-swap's groups: who puts out whom is written down."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import attrs

from trioswap.config import GroupConfig
from trioswap.residency import NOTHING, Holding, Offers


@attrs.frozen
class Groups:
    """The rules of the core reference, 1.11.

    For a target in group G, a resident model of group H must go
      1. when H is G and G swaps,
      2. when H is another group, G is exclusive and H is not persistent.
    So `exclusive` belongs to the newcomer's group: a newcomer that is not exclusive leaves
    a resident exclusive model alone.  A model in no group is in nobody's way.
    """

    groups: Sequence[GroupConfig]
    _group_of: dict[str, GroupConfig] = attrs.field(init=False, repr=False)

    @_group_of.default
    def _index(self) -> dict[str, GroupConfig]:
        return {member: group for group in self.groups for member in group.members}

    def place(self, target: str, resident: Mapping[str, Holding]) -> Holding | None:
        """Nothing, or None where somebody would have to go first."""
        for other in resident:
            if self._puts_out(target, other):
                return None
        return NOTHING

    def victims(self, target: str, resident: Mapping[str, Holding], offers: Offers) -> frozenset[str] | None:
        """Whom the rules name; None when one of them cannot go."""
        named = frozenset(other for other in resident if self._puts_out(target, other))
        return None if any(offers(name) is None for name in named) else named

    def domains(self, models: Iterable[str]) -> list[frozenset[str]]:
        """*models* split into the smallest sets that are never in each other's way.

        Each becomes one swap group with its own lock and scheduler, so what cannot collide
        never waits for each other.
        """
        names = sorted(models)
        neighbours = {name: {other for other in names if self._puts_out(name, other)} for name in names}
        for name, others in list(neighbours.items()):
            for other in others:
                neighbours[other].add(name)
        return _components(names, neighbours)

    def capacity(self, models: frozenset[str]) -> int:
        """How many of *models* can ever be resident together."""
        touched = [group for group in self.groups if models.intersection(group.members)]
        free = len(models - self._group_of.keys())
        return free + sum(1 if group.swap else len(models.intersection(group.members)) for group in touched)

    def _puts_out(self, newcomer: str, other: str) -> bool:
        mine, theirs = self._group_of.get(newcomer), self._group_of.get(other)
        if newcomer == other or mine is None or theirs is None:
            return False
        if mine is theirs:
            return mine.swap
        return mine.exclusive and not theirs.persistent


def _components(names: Sequence[str], neighbours: Mapping[str, set[str]]) -> list[frozenset[str]]:
    """Who is connected with whom, over any number of steps; sorted by the first name."""
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
