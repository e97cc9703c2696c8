"""Written rules about living together, and a memory budget on top."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import attrs

from trioswap.residency import Holding, Offers, Residency
from trioswap.residency.budget import Budget


@attrs.frozen
class Both:
    """Who fits satisfies the rules and the budget."""

    rules: Residency
    budget: Budget
    models: frozenset[str] | None = None
    """Those that the rules are about; what memory is lent for has other names.  None: all."""

    def place(self, target: str, resident: Mapping[str, Holding]) -> Holding | None:
        """What the budget says, where the rules let it live at all."""
        if self._is_ruled(target) and self.rules.place(target, self._ruled(resident)) is None:
            return None
        return self.budget.place(target, resident)

    def victims(self, target: str, resident: Mapping[str, Holding], offers: Offers) -> frozenset[str] | None:
        """Whom the rules name, and whom of the rest the budget still needs.

        Each part is the best choice of its own; where the rules leave a choice, both together
        need not be.  Nobody goes without need.
        """
        named = (
            self.rules.victims(target, self._ruled(resident), offers) if self._is_ruled(target) else frozenset[str]()
        )
        if named is None:
            return None
        more = self.budget.victims(target, _without(resident, named), offers)
        if more is None:
            return None
        return more | self._needed(target, _without(resident, more), named, offers)

    def domains(self, models: Iterable[str]) -> list[frozenset[str]]:
        """One, for the budget's sake."""
        return self.budget.domains(models)

    def capacity(self, models: frozenset[str]) -> int:
        """What both allow."""
        return min(self.rules.capacity(models), self.budget.capacity(models))

    def _is_ruled(self, name: str) -> bool:
        return self.models is None or name in self.models

    def _ruled(self, resident: Mapping[str, Holding]) -> dict[str, Holding]:
        return {name: holding for name, holding in resident.items() if self._is_ruled(name)}

    def _needed(
        self, target: str, resident: Mapping[str, Holding], named: frozenset[str], offers: Offers
    ) -> frozenset[str]:
        """*named* without those who can stay after all, because those who went for the budget do for the rules."""

        def cost(name: str) -> float:
            offer = offers(name)
            assert offer is not None, "only those who can go were chosen"
            return offer.cost

        for name in sorted(named, key=lambda name: (-cost(name), name)):
            fewer = named - {name}
            if self.place(target, _without(resident, fewer)) is not None:
                named = fewer
        return named


def _without(resident: Mapping[str, Holding], gone: frozenset[str]) -> dict[str, Holding]:
    return {name: holding for name, holding in resident.items() if name not in gone}
