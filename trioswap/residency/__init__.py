"""Which models may be resident together, and who must go for whom.

A policy is a pure function of what it is asked: no memory of its own, no clock, no
logging; it is asked "what if" far more often than a swap happens.

What is resident comes with what it *holds*: bytes reserved on each device, fixed when its
start was decided, because a running model cannot be moved.  Where memory plays no part the
holding is empty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final, Protocol

import attrs

Holding = Mapping[str, int]
"""device -> bytes."""

NOTHING: Final[Holding] = {}


@attrs.frozen
class Offer:
    """A resident model that could be put out."""

    at: float
    """When, at the earliest; times that have come are all the same number."""
    busy: bool
    """It still has something to do."""
    cost: float
    """What its loss costs compared with that of others; above 0, no unit."""


Offers = Callable[[str], Offer | None]
"""What a resident model offers; None: it cannot go now (it is loading, stuck, ...)."""


class Residency(Protocol):
    """A rule about living together."""

    def place(self, target: str, resident: Mapping[str, Holding]) -> Holding | None:
        """What *target* would hold beside *resident* (which does not include it); None: it does not fit.

        Whoever fits beside some models fits beside fewer of them.
        """
        ...

    def victims(self, target: str, resident: Mapping[str, Holding], offers: Offers) -> frozenset[str] | None:
        """Who of *resident* had best go so that *target* fits beside the rest; None: no choice of those who can go.

        Where there is a choice: those who are all free soonest, then rather idle ones, then
        the cheapest; equal ones by name.
        """
        ...

    def domains(self, models: Iterable[str]) -> list[frozenset[str]]:
        """*models* split into the smallest sets that are never in each other's way."""
        ...

    def capacity(self, models: frozenset[str]) -> int:
        """How many of *models* can ever be resident together: the size of their `CapacityLimiter`."""
        ...
