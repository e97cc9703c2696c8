"""The memory budget: models may be resident together as long as what they hold fits on every device.

What a model needs is known to `Footprints`, what a resident one holds comes with the
question; programs other than ours appear as a smaller budget, or as residents with a holding
that nobody may put out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

import attrs

from trioswap.footprints import Footprints, Need
from trioswap.residency import NOTHING, Holding, Offer, Offers

# Among so many candidates every choice is looked at, 256 at most; beyond, a good one must do.
_EXACT: Final = 8


@attrs.define(eq=False)
class Budget:
    """Room on each device, and who fits into it.

    Which alternative: the one that leaves most room on the devices it names, the first of
    equals.  So two models that run at the same time rather run on two GPUs; the price is that
    the last large hole goes sooner than by best fit.

    Too large for the whole machine.  What was declared is refused.  A guess is no reason to
    refuse: the model gets the machine for itself, as one of which nothing is known.  What was
    learned to be more than the budget gives fitted somehow: such a model gets all of the
    devices it uses.
    """

    sizes: Mapping[str, int]
    """device -> bytes usable now."""
    footprints: Footprints
    _whole: Mapping[str, int] = attrs.field(init=False)
    """device -> bytes usable at best; "too large" is judged by these, or a busy moment would decide it."""

    @_whole.default
    def _at_first(self) -> Mapping[str, int]:
        return self.sizes

    def resize(self, sizes: Mapping[str, int]) -> None:
        """Other programs took memory or gave it back: now *sizes* are usable, in bytes on each device."""
        self.sizes = dict(sizes)
        self._whole = {
            device: max(self._whole.get(device, 0), size) for device, size in {**self._whole, **sizes}.items()
        }

    def replace(self, sizes: Mapping[str, int], whole: Mapping[str, int]) -> None:
        """By another configuration *sizes* are usable now, and *whole* at best, in bytes on each device."""
        self.sizes, self._whole = dict(sizes), dict(whole)

    def overcommitted(self, resident: Mapping[str, Holding]) -> dict[str, int]:
        """By how many bytes *resident* exceed the budget, for each device where they do."""
        over = {device: held - self.sizes.get(device, 0) for device, held in _held(resident).items()}
        return {device: size for device, size in over.items() if size > 0}

    def place(self, target: str, resident: Mapping[str, Holding]) -> Holding | None:
        """What *target* would hold beside *resident*; None: it does not fit."""
        ways = self._ways(self.footprints.need(target))
        if ways is None:
            return None if resident else dict(self.sizes)
        held = _held(resident)
        best, most = None, 0
        for way in ways:
            if self._gap(way, held) != NOTHING:
                continue
            left = sum(self.sizes[device] - held.get(device, 0) - size for device, size in way.items() if size)
            if best is None or left > most:
                best, most = way, left
        return best

    def victims(self, target: str, resident: Mapping[str, Holding], offers: Offers) -> frozenset[str] | None:
        """Who of *resident* had best go so that *target* fits beside the rest; None: no choice of those who can go.

        The best by (when all are free, whether one is busy, sum of costs, names), whatever
        alternative it makes room for.  The first two are exact; the cost is so where up to
        eight models come into question.
        """
        ways = self._ways(self.footprints.need(target))
        if ways is None:
            return frozenset(resident) if all(offers(name) is not None for name in resident) else None
        held = _held(resident)
        gaps = [gap for way in ways if (gap := self._gap(way, held)) is not None]
        if not all(gaps):
            return frozenset()
        # By name, so that sums of costs do not depend on the order in which we were told.
        leaving = [(name, offer, resident[name]) for name in sorted(resident) if (offer := offers(name)) is not None]
        choices = [choice for gap in gaps if (choice := _choose(gap, leaving)) is not None]
        return frozenset(min(choices)[-1]) if choices else None

    def domains(self, models: Iterable[str]) -> list[frozenset[str]]:
        """One: any two may be in each other's way."""
        together = frozenset(models)
        return [together] if together else []

    def capacity(self, models: frozenset[str]) -> int:
        """All of them: memory is counted in bytes, not in models."""
        return len(models)

    def could_fit(self, target: str) -> bool:
        """Whether *target* would fit alone if other programs gave back what they have taken."""
        ways = self._ways(self.footprints.need(target))
        return ways is None or bool(ways)

    def reserve(self, peak: Holding) -> Holding:
        """What a model holds that was measured to use *peak*: of a device that is smaller, all there is now."""
        return {device: self._all_there_is(device, size) for device, size in peak.items()}

    def _ways(self, need: Need) -> Sequence[Holding] | None:
        """The holdings to try; None: the machine for itself."""
        fitting = [holding for holding in need.holdings if self._fits_at_best(holding)]
        if fitting:
            return fitting
        if need.source in ("estimated", "unknown"):
            return None
        declared = need.declared or (NOTHING,) * len(need.holdings)
        return [
            {device: self._all_there_is(device, size) for device, size in holding.items()}
            for holding, promise in zip(need.holdings, declared, strict=True)
            if self._fits_at_best(promise)
        ]

    def _fits_at_best(self, holding: Holding) -> bool:
        return all(size <= self._whole.get(device, 0) for device, size in holding.items())

    def _all_there_is(self, device: str, size: int) -> int:
        """*size*, or all of *device* when that is too much; at least a byte, which does not fit into nothing."""
        return size if size <= self._whole.get(device, 0) else max(1, self.sizes.get(device, 0))

    def _gap(self, way: Holding, held: Holding) -> Holding | None:
        """What is wanting on each device for *way*; None: even the empty device is too small now."""
        gap = {}
        for device, size in way.items():
            room = self.sizes.get(device, 0)
            if size > room:
                return None
            if size and (missing := held.get(device, 0) + size - room) > 0:
                gap[device] = missing
        return gap


def _held(resident: Mapping[str, Holding]) -> dict[str, int]:
    """The sum of what they hold, on each device."""
    total = dict[str, int]()
    for holding in resident.values():
        for device, size in holding.items():
            total[device] = total.get(device, 0) + size
    return total


# ---- who goes ------------------------------------------------------------------------------
#
# The best set by (latest `at`, any busy, sum of costs).  The first two decide who comes into
# question at all: let t be the earliest time by which enough could be free.  No set that is
# enough is free before t, so nobody who goes later than t needs a look; and if the idle ones
# up to t are enough, nobody busy does.  Of those left every set that is enough is equally good
# by the first two, and only the cheapest remains to be found.


@attrs.frozen
class _Candidate:
    name: str
    offer: Offer
    frees: tuple[int, ...]
    """Bytes on each device of the gap."""


_Choice = tuple[float, bool, float, list[str]]
"""When, any busy, cost, names: the smaller, the better."""


def _choose(gap: Holding, leaving: Iterable[tuple[str, Offer, Holding]]) -> _Choice | None:
    wanted = tuple(gap.values())
    candidates = []
    for name, offer, holding in leaving:
        frees = tuple(holding.get(device, 0) for device in gap)
        if any(frees):
            candidates.append(_Candidate(name, offer, frees))
    pool = _in_question(candidates, wanted)
    if pool is None:
        return None
    chosen = _cheapest(pool, wanted) if len(pool) <= _EXACT else _cheap(pool, wanted)
    offers = [candidate.offer for candidate in chosen]
    return max(o.at for o in offers), any(o.busy for o in offers), sum(o.cost for o in offers), _names(chosen)


def _in_question(candidates: Sequence[_Candidate], wanted: tuple[int, ...]) -> list[_Candidate] | None:
    """Those of the sets that are best by time and idleness; None: all together are not enough."""
    missing = wanted
    for last in sorted(candidates, key=lambda candidate: candidate.offer.at):
        missing = _without(missing, last)
        if _is_met(missing):
            pool = [candidate for candidate in candidates if candidate.offer.at <= last.offer.at]
            idle = [candidate for candidate in pool if not candidate.offer.busy]
            return idle if _is_met(_missing(wanted, idle)) else pool
    return None


def _cheapest(pool: Sequence[_Candidate], wanted: tuple[int, ...]) -> Sequence[_Candidate]:
    """The best set that is enough, by cost and names; looks at all but those that cost more than one found."""
    best: tuple[float, list[str]] | None = None
    winners = tuple[_Candidate, ...]()
    partial = [(0.0, winners, wanted)]
    # The cheap ones first: so a good set is found soon, and most others need no look.
    for candidate in sorted(pool, key=lambda candidate: candidate.offer.cost):
        for before, chosen, missing in list(partial):
            cost, larger = before + candidate.offer.cost, (*chosen, candidate)
            if best is not None and cost > best[0]:
                continue
            left = _without(missing, candidate)
            if not _is_met(left):
                partial.append((cost, larger, left))
            elif best is None or (cost, _names(larger)) < best:
                best, winners = (cost, _names(larger)), larger
    return _by_name(winners)


def _cheap(pool: Sequence[_Candidate], wanted: tuple[int, ...]) -> Sequence[_Candidate]:
    """A set that is enough and of which nobody can stay: by cost for what it frees, then without the needless."""

    def price(candidate: _Candidate) -> float:
        return candidate.offer.cost / sum(
            min(size, missing) / missing for size, missing in zip(candidate.frees, wanted, strict=True)
        )

    chosen = list(_until_met(sorted(pool, key=price), wanted))
    for candidate in sorted(chosen, key=lambda candidate: -candidate.offer.cost):
        rest = [other for other in chosen if other is not candidate]
        if _is_met(_missing(wanted, rest)):
            chosen = rest
    return _by_name(chosen)


def _by_name(chosen: Iterable[_Candidate]) -> list[_Candidate]:
    return sorted(chosen, key=lambda candidate: candidate.name)


def _names(chosen: Iterable[_Candidate]) -> list[str]:
    return sorted(candidate.name for candidate in chosen)


def _until_met(candidates: Iterable[_Candidate], wanted: tuple[int, ...]) -> Iterator[_Candidate]:
    for candidate in candidates:
        yield candidate
        wanted = _without(wanted, candidate)
        if _is_met(wanted):
            return


def _missing(wanted: tuple[int, ...], chosen: Iterable[_Candidate]) -> tuple[int, ...]:
    for candidate in chosen:
        wanted = _without(wanted, candidate)
    return wanted


def _without(wanted: tuple[int, ...], candidate: _Candidate) -> tuple[int, ...]:
    return tuple(missing - size for missing, size in zip(wanted, candidate.frees, strict=True))


def _is_met(wanted: tuple[int, ...]) -> bool:
    return max(wanted) <= 0
