"""One model as the scheduler sees it, and the rules about its turn: when is it due, when may it be put out?

A *claim* is a model that is not resident and has waiters.  A *turn* runs from a model
becoming ready until its stop begins.  The *turn lease* is the part of a turn during which
others cannot end it.  *Lingering* is an idle model that is held for a moment, because its
own history says that the next request usually comes soon.

Formulas only; who is compared with whom is the business of `planning`, and who changes a
model that of `scheduler`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from typing import Final

import attrs

from trioswap import lifecycle
from trioswap.circuit import Circuit
from trioswap.learning import Costs
from trioswap.lifecycle import State
from trioswap.messages import ModelView, Policy
from trioswap.residency import NOTHING, Holding

# Fewer gaps than this are an anecdote.
GAPS_NEEDED: Final = 3
# A gap that was seen will come again, about: so much longer is waited for it.
GAP_STRETCH: Final = 1.25
GAP_MARGIN: Final = 0.05


# ---- who waits -------------------------------------------------------------------------------


@attrs.define(eq=False)
class Queue:
    """The waiting requests of one model: a line for each weight, the oldest first in each."""

    lines: dict[float, dict[int, float]] = attrs.field(factory=dict)
    """weight -> ticket -> when it arrived.  No line is empty."""
    count: int = 0
    weight: float = 0.0
    """Of all together."""

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(ticket for line in self.lines.values() for ticket in line))

    def add(self, ticket: int, arrived: float, weight: float) -> None:
        """*ticket* waits from *arrived* on, which is no earlier than that of any other."""
        self.lines.setdefault(weight, {})[ticket] = arrived
        self.count += 1
        self.weight += weight

    def remove(self, ticket: int) -> float:
        """*ticket* waits no more; return its weight."""
        weight = next(weight for weight, line in self.lines.items() if ticket in line)
        del self.lines[weight][ticket]
        if not self.lines[weight]:
            del self.lines[weight]
        self.count -= 1
        self.weight = self.weight - weight if self.count else 0.0
        return weight

    def arrived(self, ticket: int) -> float:
        """When *ticket* came."""
        return next(line[ticket] for line in self.lines.values() if ticket in line)

    def first(self, max_wait: float) -> int:
        """Who is served next: by weighted age, so that light ones are not overtaken for ever."""
        if len(self.lines) == 1:
            return next(iter(next(iter(self.lines.values()))))
        heads = [(next(iter(line.items())), weight) for weight, line in self.lines.items()]
        return min((arrived + max_wait / weight, ticket) for (ticket, arrived), weight in heads)[1]

    @property
    def oldest(self) -> float:
        """When the first of those who wait came."""
        return min(next(iter(line.values())) for line in self.lines.values())

    @property
    def heaviest(self) -> float:
        """The largest weight; 0 when nobody waits."""
        if len(self.lines) == 1:
            for weight in self.lines:
                return weight
        return max(self.lines, default=0.0)

    def due(self, since: float, max_wait: float) -> float:
        """When the first of them has waited *max_wait* weighted seconds, of which none count before *since*."""
        due = math.inf
        for weight, line in self.lines.items():
            for arrived in line.values():  # the first one only
                due = min(due, (max(since, arrived)) + max_wait / weight)
                break
        return due


# ---- a model ---------------------------------------------------------------------------------


@attrs.frozen
class Served:
    """One lease."""

    weight: float
    since: float


@attrs.define(eq=False)
class Model:
    """Everything the scheduler remembers of one model.  Only the scheduler changes it."""

    name: str
    policy: Policy
    costs: Costs
    state: State = State.STOPPED
    attempt: int = 0
    """Of the present run, or of the last one; 0: never started."""
    holding: Holding = NOTHING
    """What it has reserved, from its start until it has ended; grows with what is measured."""
    placed: Holding = NOTHING
    """What it reserved at its start."""
    peak: Holding = NOTHING
    """What it was measured to use, in this run."""
    queue: Queue = attrs.field(factory=Queue)
    """While READY only beyond `parallel`: an open gate lets in whom it can."""
    leases: dict[int, Served] = attrs.field(factory=dict)
    """Tickets being served.  Empty unless READY or DRAINING (invariant I1)."""
    began: float = 0.0
    """When the present state did."""
    ready_at: float = 0.0
    """When this turn began."""
    idle_since: float = 0.0
    """When it last ran out of work; counts only while READY or DRAINING without leases."""
    out_at: float = -math.inf
    """When its last turn ended: from then on its waiters wait anew."""
    out_of_work: bool = False
    """Nobody has asked for it since `idle_since`: a gap is being measured."""
    credit: float = 0.0
    """What its loss costs (Landlord; Young, On-line file caching): set upon use, sinks relative to the floor."""
    retiring: bool = False
    """Being unloaded: the gate does not open again in this run."""
    outdated: bool = False
    """Its run, if there is one, is of another command line than the next: what is measured of it is not learned."""
    removed: bool = False
    """It is not configured any more: nobody may wait for it, and once it has ended it is forgotten."""
    drained: bool = False
    """`Drained` has come in this DRAINING: who is still counted is to be cut loose."""
    stuck: bool = False
    """Its process could not be ended (`GotStuck`); only while STOPPING."""
    pids: tuple[int, ...] = ()
    """While it is stuck: who is left, where that was said."""
    out_of_memory: bool = False
    """Its last start failed for want of memory, and it is tried once more."""
    circuit: Circuit = attrs.field(factory=Circuit)
    """While it is open nobody waits for this model, so nothing is planned for it."""

    _working: dict[float, int] = attrs.field(factory=dict)
    """weight -> how many leases of that weight."""

    def begin_lease(self, ticket: int, served: Served) -> None:
        """*ticket* is being served."""
        self.leases[ticket] = served
        self._working[served.weight] = self._working.get(served.weight, 0) + 1

    def end_lease(self, ticket: int) -> Served:
        """*ticket* is not served any more."""
        served = self.leases.pop(ticket)
        self._working[served.weight] -= 1
        if not self._working[served.weight]:
            del self._working[served.weight]
        return served

    def view(self, now: float) -> ModelView:
        """What others may see of it."""
        return ModelView(
            name=self.name,
            state=self.state,
            attempt=self.attempt,
            leases=len(self.leases),
            waiting=self.queue.count,
            holding=self.holding,
            retry_in=self.circuit.retry_in(now),
            failure=self.circuit.failure,
        )

    def move(self, event: lifecycle.Event, now: float) -> None:
        """Change the state as the table says.

        Raises:
            IllegalTransition: the table knows no such change.
        """
        self.state = lifecycle.next_state(self.state, event)
        self.began = now

    @property
    def measured(self) -> Costs:
        """Where to enter what its run costs; nobody looks there if that says nothing of the next."""
        return Costs() if self.outdated else self.costs

    @property
    def is_claim(self) -> bool:
        """Whether it is kept from its waiters."""
        return self.queue.count > 0 and self.state in (State.STOPPED, State.STOPPING)

    @property
    def must_start(self) -> bool:
        """Whether a server of it has to be started for who asks now; there is none for memory that is lent."""
        return self.state in (State.STOPPED, State.STOPPING) and self.policy.yields

    @property
    def serves(self) -> bool:
        """Whether its server is up and nobody has ended its turn for good."""
        return self.state in (State.READY, State.DRAINING) and not self.retiring

    @property
    def leaving(self) -> bool:
        """Whether it will be gone without anybody doing more."""
        return (self.state is State.STOPPING or self.retiring) and not self.stuck

    @property
    def has_work(self) -> bool:
        """Whether it serves somebody, or somebody waits for it."""
        return bool(self.leases) or self.queue.count > 0

    @property
    def has_room(self) -> bool:
        """Whether one more request may be granted."""
        return len(self.leases) < self.policy.parallel

    @property
    def can_end(self) -> bool:
        """Whether nobody is hurt when its server ends."""
        return not self.leases or self.drained

    @property
    def expires(self) -> float:
        """When its time to live is over; never while it works."""
        idle = self.state is State.READY and not self.leases
        return self.idle_since + self.policy.ttl if idle and self.policy.ttl is not None else math.inf

    @property
    def claim_start(self) -> float:
        """Since when its waiters are kept from it: the oldest came, or it was put out, whichever is later."""
        return max(self.queue.oldest, self.out_at)

    @property
    def heaviest(self) -> float:
        """The largest weight that works or waits here; 1 where there is none."""
        return max(max(self._working, default=0.0), self.queue.heaviest) or 1.0


# ---- when ---------------------------------------------------------------------------------------


def due_at(claim: Model, against: float = 1.0) -> float:
    """When *claim* is overdue, as seen by work of weight *against*."""
    return claim.queue.due(claim.out_at, claim.policy.max_wait * against)


def turn_lease(model: Model) -> float:
    """Seconds for which a turn is protected: never longer than others may be kept waiting, or one swap."""
    swap = model.costs.swap
    longest = max(model.policy.max_wait, swap)
    return min(model.policy.turn_lease * swap, longest) if model.policy.turn_lease else 0.0


def credit(model: Model) -> float:
    """What its loss would cost: seconds to load it again, for each GiB that it holds (for 1, if it holds none)."""
    room = sum(model.holding.values()) / 2**30
    return model.costs.load.value / room if room else model.costs.load.value


def free_at(model: Model, claim: Model, waiting: float, now: float) -> float:
    """When *model* may be put out for *claim*; *waiting* is the weight of all requests that are kept waiting."""
    # A load whose waiters have all left; or a turn that was ended rightly, and what worked then is done: judged by
    # what is left, it would be a light load with a full lease again.
    if model.state is State.STARTING or (model.state is State.DRAINING and not model.has_work):
        return now
    if model.has_work:
        return max(due_at(claim, model.heaviest), _lease_end(model, claim.queue.heaviest))
    return _held_until(model, claim.queue.heaviest, _detour(claim), waiting, now)


def exposed_at(
    model: Model, claims: Collection[Model], shortest: Callable[[], tuple[float, float]], waiting: float, now: float
) -> float:
    """No time before this is `free_at` for one of *claims* that is not overdue; much cheaper than to ask for each."""
    if model.state is State.STARTING or (model.state is State.DRAINING and not model.has_work):
        return now
    if model.has_work:
        light = model.heaviest < 1.0
        return min(due_at(claim, model.heaviest) for claim in claims) if light else math.inf
    # Nobody is held longer for a short way round than for a long one, nor against the heavy than against the light.
    theirs, detour = shortest()
    return _held_until(model, theirs, detour, waiting, now)


def shortest_visit(claims: Collection[Model]) -> tuple[float, float]:
    """The largest weight among *claims*, and the seconds that the quickest of them needs for a turn."""
    return max(claim.queue.heaviest for claim in claims), min(map(_detour, claims))


def _lease_end(model: Model, theirs: float) -> float:
    """When the turn lease of *model* is over, as seen by work of weight *theirs*."""
    mine = model.heaviest
    return model.ready_at + turn_lease(model) * (1.0 if mine >= theirs else mine / theirs)


def _held_until(model: Model, theirs: float, detour: float, waiting: float, now: float) -> float:
    """Until when *model* stays, with nothing to do."""
    lease_end = _lease_end(model, theirs)
    if lease_end <= now:
        return lease_end
    return min(lease_end, model.idle_since + linger(model, waiting, model.costs.swap + detour))


def _detour(claim: Model) -> float:
    """Seconds that *claim* needs to come, to serve those who wait, and to go."""
    turns = max(1, math.ceil(claim.queue.count / claim.policy.parallel))
    return claim.costs.swap + turns * claim.costs.service.value


def linger(model: Model, waiting: float, back: float) -> float:
    """Idle seconds worth granting *model* while requests of weight *waiting* would rather have its place.

    A return within g saves the *back* seconds of a round trip for one request, and costs
    every waiter the gap and one service.  Of the gaps that were seen the best is chosen.
    """
    cap = model.policy.linger * model.costs.swap
    gaps = sorted(model.costs.gaps)
    saved = back - waiting * model.costs.service.value
    if cap <= 0 or len(gaps) < GAPS_NEEDED or saved <= waiting * gaps[0]:
        return 0.0
    best, pick, shorter, longer = 0.0, 0.0, 0.0, len(gaps)
    for hits, gap in enumerate(gaps, start=1):
        if gap > cap:
            break
        shorter += gap
        longer -= 1
        gain = hits * saved - waiting * (shorter + longer * gap)
        if gain > best:
            best, pick = gain, gap
    return min(pick * GAP_STRETCH + GAP_MARGIN, cap) if pick else 0.0
