"""New rules about living together, while servers are still there that were started under the old ones.

A model that was removed means nothing to the new rules, and a server that is about to be replaced
is not yet what they speak of.  Both still hold their memory until they are gone, so whoever
comes meanwhile has to fit beside them by the rules they were started under.  Both also
listen where they did, so who is to listen there now comes after them, whatever the rules say.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import attrs

from trioswap.config import GroupConfig
from trioswap.residency import NOTHING, Holding, Offers, Residency
from trioswap.residency.groups import Groups
from trioswap.residency.matrix import Matrix


@attrs.define(eq=False)
class Leaving:
    """The new rules; beside those who are leaving also the old ones.

    A newcomer that the old rules do not know is judged as if the leaving model were still a
    member of its group; where there is a matrix, and nobody can say, it waits until that one is gone.
    """

    rules: Residency
    """The new ones, without those about memory: memory is counted, whoever holds it."""
    groups: Sequence[GroupConfig] | None
    """The same as groups; None: they are a matrix."""
    models: frozenset[str]
    """Those the new rules are about."""
    before: Residency
    models_before: frozenset[str]
    ports: frozenset[tuple[str, str]]
    """Who is leaving, and who is to listen where that one still may."""
    names: dict[str, GroupConfig | None]
    """Who is leaving, with the group it was in when it was last configured; None: there was a matrix."""

    def place(self, target: str, resident: Mapping[str, Holding]) -> Holding | None:
        """What the new rules say, where nobody who is leaving is in the way."""
        if any(self._keeps_out(name, target) for name in resident):
            return None
        return self.rules.place(target, self._known(resident))

    def victims(self, target: str, resident: Mapping[str, Holding], offers: Offers) -> frozenset[str] | None:
        """Whom the new rules name; None where somebody is in the way who is leaving anyway."""
        if any(self._keeps_out(name, target) for name in resident):
            return None
        return self.rules.victims(target, self._known(resident), offers)

    def domains(self, models: Iterable[str]) -> list[frozenset[str]]:
        """Those of the new rules; who is leaving is in one with all that it keeps out."""
        domains = self.rules.domains(models)
        for name in self.names:
            touched = [
                domain for domain in domains if name in domain or any(self._keeps_out(name, other) for other in domain)
            ]
            domains = [domain for domain in domains if domain not in touched]
            domains.append(frozenset({name}).union(*touched))
        return sorted(domains, key=min)

    def capacity(self, models: frozenset[str]) -> int:
        """What the new rules allow of those they are about."""
        return self.rules.capacity(models & self.models)

    def gone(self, name: str) -> None:
        """*name* has ended: nobody needs to think of it any more."""
        self.names.pop(name, None)
        if isinstance(self.before, Leaving):
            self.before.gone(name)

    def _keeps_out(self, name: str, target: str) -> bool:
        """Whether *name* is leaving, and *target* must not start before it is gone."""
        if name not in self.names or name == target:
            return False
        if (name, target) in self.ports:
            return True
        if target in self.models_before:
            return self.before.place(target, {name: NOTHING}) is None
        group = self.names[name]
        if self.groups is None or group is None:
            return True
        others = [other for other in self.groups if other.name != group.name]
        same = next((other for other in self.groups if other.name == group.name), group)
        whole = attrs.evolve(same, members=(*same.members, name))
        return Groups([*others, whole]).place(target, {name: NOTHING}) is None

    def _known(self, resident: Mapping[str, Holding]) -> dict[str, Holding]:
        return {name: holding for name, holding in resident.items() if name in self.models}


def too_many(rules: Residency, resident: Collection[str]) -> list[str]:
    """Who of *resident* had to go for all of them to be allowed by *rules*; the first ones stay.

    Two may stay if one of them could have come second.
    """
    staying: dict[str, Holding] = {}
    going = []
    for name in resident:
        pairs = all(_may_meet(rules, name, other) for other in staying)
        # Only a matrix says more of three than of each two of them.
        if pairs and (not isinstance(rules, Matrix) or rules.place(name, staying) is not None):
            staying[name] = {}
        else:
            going.append(name)
    return going


def _may_meet(rules: Residency, one: str, other: str) -> bool:
    return rules.place(one, {other: {}}) is not None or rules.place(other, {one: {}}) is not None
