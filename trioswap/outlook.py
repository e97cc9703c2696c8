"""The truth while you wait: why somebody was put out, who waits for what, and for how long, as far as can be told.

Says, decides nothing.  The estimates are made of learned costs; a model that works may fall
idle sooner than assumed, so they rather err to the long side, and a load that takes longer
than ever is expected to take a tenth more of what it has taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Final

from trioswap.errors import DoesNotFit, MemoryLent, MemoryTaken, ModelStuck, TrioswapError
from trioswap.lifecycle import OCCUPIED, State
from trioswap.messages import Eviction, WaitView
from trioswap.planning import Plan
from trioswap.residency import Residency
from trioswap.residency.budget import Budget
from trioswap.turns import Model, due_at

# Who is late is expected to be late by a tenth of its time: no better guess, but it grows with the delay.
_LATE: Final = 0.1


_Outlook = tuple[str, tuple[str, ...], float]
"""Stage, who is in the way, seconds until the model serves."""


def eviction(victim: Model, claim: Model, now: float) -> Eviction:
    """Why *victim* goes for *claim*, to be called before it is told to."""
    return Eviction(
        model=victim.name,
        attempt=victim.attempt,
        target=claim.name,
        was=victim.state,
        idle=now - victim.idle_since,
        reload=victim.costs.load.value,
        waited=now - claim.claim_start,
    )


def hopeless(claim: Model, blocker: Model | None, budget: Budget | None) -> Callable[[], TrioswapError]:
    """What to tell the waiters of *claim*: *blocker* will not go, or (None) there is not enough memory for it."""
    if blocker is None:
        taken = budget is not None and budget.could_fit(claim.name)
        return partial(MemoryTaken if taken else DoesNotFit, claim.name)
    if blocker.stuck:
        return partial(ModelStuck, claim.name, blocker.name, blocker.pids)
    return partial(MemoryLent, claim.name, blocker.name)


def waiting(models: Mapping[str, Model], plan: Plan, residency: Residency, now: float) -> list[WaitView]:
    """Every waiting request; those of one model in the order in which they came."""
    served_in: dict[str, _Outlook] = {}
    for model in models.values():
        if model.queue.count and model.state is State.STARTING:
            served_in[model.name] = ("loading", (), _load_left(model, now))
        elif model.queue.count and model.state is State.READY:
            served_in[model.name] = ("queued", (), 0.0)
    served_in |= _claims(models, plan, residency, now)
    return [
        WaitView(ticket, name, now - models[name].queue.arrived(ticket), place, stage, waits_for, wait)
        for name, (stage, waits_for, until) in served_in.items()
        for place, (ticket, wait) in enumerate(_line(models[name], until), start=1)
    ]


def _line(model: Model, until: float) -> Iterator[tuple[int, float]]:
    """The waiting tickets of *model*, which serves in *until* seconds, and when each has its turn."""
    beside = len(model.leases)
    for place, ticket in enumerate(model.queue, start=1):
        rounds = math.ceil((place + beside) / model.policy.parallel) - 1 if model.policy.parallel < math.inf else 0
        yield ticket, until + max(0, rounds) * model.costs.service.value


def _claims(models: Mapping[str, Model], plan: Plan, residency: Residency, now: float) -> dict[str, _Outlook]:
    """The claims one after the other: each loads when its room is free and the one before it has loaded.

    Those that *plan* lets start wait for nobody; once it is carried out they are claims no more.
    """
    found: dict[str, _Outlook] = {}
    loaded = max((_load_left(m, now) for m in models.values() if m.state is State.STARTING), default=0.0)
    starting = {claim.name for claim, _ in plan.start}
    before: list[tuple[Model, float]] = []
    # Claims, once they are gone.
    going = [model for model in models.values() if model.queue.count and model.state is State.DRAINING]
    for claim in [*(models[name] for name in plan.order if models[name].is_claim), *going]:
        name = claim.name
        stage, waits_for, free = _room(claim, models, plan, residency, now)
        for other, done in before:
            if residency.place(name, {other.name: other.holding}) is None:
                free = max(free, done + other.costs.stop.value)
        served = (0.0 if name in starting else max(loaded, free)) + claim.costs.load.value
        loaded = max(loaded, served)
        found[name] = (stage, waits_for, served)
        before.append((claim, served + _turn(claim)))
    return found


def _room(claim: Model, models: Mapping[str, Model], plan: Plan, residency: Residency, now: float) -> _Outlook:
    """How far *claim* is with those that are resident now: stage, who is in the way, seconds until they are gone."""
    if claim.state is State.DRAINING:
        successor = plan.closed.get(claim.name)
        after = () if successor is None else (successor.name,)
        return "queued", after, _drain_left(claim, now) + claim.costs.stop.value
    blocked = plan.blocked.get(claim.name)
    # Those that the plan named and that have not gone yet: the plan may be older than their stop.
    victims = [models[name] for name in blocked.by if not models[name].leaving] if blocked is not None else []
    names = tuple(victim.name for victim in victims)
    others = {m.name: m.holding for m in models.values() if m.state in OCCUPIED and m is not claim}
    if blocked is None and claim.state is State.STOPPED and residency.place(claim.name, others) is not None:
        return "queued", (), 0.0  # nobody is in its way: it waits for a load, or for a claim that is before it
    stopping = [model for model in models.values() if model.state is State.STOPPING]
    if any(plan.closed.get(name) is claim for name in names):
        return "draining", names, max(_drain_left(victim, now) + victim.costs.stop.value for victim in victims)
    if not victims and stopping:
        return "stopping", tuple(m.name for m in stopping), max(_left(m.costs.stop.value, m, now) for m in stopping)
    until = blocked.until if blocked is not None and blocked.until < math.inf else due_at(claim)
    if until == math.inf:  # llama-swap's line: until those at work are done, whenever that is
        until = now + max((victim.costs.service.value for victim in victims), default=0.0)
    return "queued", names, max(0.0, until - now) + max((v.costs.stop.value for v in victims), default=0.0)


def _turn(claim: Model) -> float:
    """Seconds it takes to serve those who wait now."""
    parallel = claim.policy.parallel
    return claim.costs.service.value * (math.ceil(claim.queue.count / parallel) if parallel < math.inf else 1)


def _load_left(model: Model, now: float) -> float:
    return _left(model.costs.load.value, model, now)


def _drain_left(model: Model, now: float) -> float:
    oldest = max((now - lease.since for lease in model.leases.values()), default=math.inf)
    return 0.0 if oldest == math.inf else max(model.costs.service.value - oldest, _LATE * oldest)


def _left(expected: float, model: Model, now: float) -> float:
    """Seconds until what *model* began is done."""
    taken = now - model.began
    return max(expected - taken, _LATE * taken)
