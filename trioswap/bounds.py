"""How long a request may wait: the bound of docs/scheduling.md, from what the configuration lets everything take.

Says, decides nothing.  Its numbers are limits, not expectations: loads that last as long as
`health_check_timeout` lets them, stops that need their grace and SIGKILL.  So a wait beyond it
means that something of ours is broken, and `overdue_decisions` names what that can be seen by
long before.

Requests that are being served end when they like, unless `drain_timeout` says otherwise; so
time that passes while somebody waits for them alone (`held_by`) counts toward no bound.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Final

import attrs

from trioswap.forecast import plan_of
from trioswap.lifecycle import State
from trioswap.messages import Rules
from trioswap.residency import Residency
from trioswap.turns import Model

# Seconds by which an alarm may ring late while the event loop is busy with something else.
ALARM_GRACE: Final = 1.0


@attrs.frozen
class Limits:
    """The longest that one model server may take, in seconds."""

    load: float
    """From the decision to start it until it is ready or has failed."""
    stop: float
    """From the decision to stop it until the last of its processes is gone, or it is quarantined."""
    drain: float | None
    """From the closing of its gate until nothing is in flight; None: nobody cuts what it serves."""


@attrs.frozen
class Waiter:
    """One request in the line for a model."""

    ticket: int
    model: str
    arrived: float
    weight: float
    place: int
    """1: it is served next."""


def waiters(models: Mapping[str, Model]) -> Iterator[Waiter]:
    """Everybody who waits, as the scheduler would serve them."""
    for model in models.values():
        line = [
            (arrived + _patience(model, weight), ticket, arrived, weight)
            for weight, tickets in model.queue.lines.items()
            for ticket, arrived in tickets.items()
        ]
        for place, (_, ticket, arrived, weight) in enumerate(sorted(line), start=1):
            yield Waiter(ticket, model.name, arrived, weight, place)


@attrs.frozen
class Bound:
    """What bounds the waits in one line for those of one weight, in seconds."""

    patience: float
    turn: float
    """Until it is the turn of its model, once it is overdue, and that is loaded."""
    longest: float
    """The longest drain."""
    parallel: float
    """Requests that are served at the same time."""

    def at(self, place: int) -> float:
        """Within which whoever has that *place* is served."""
        rounds = max(1, math.ceil(place / self.parallel)) if self.parallel < math.inf else 1
        # Those who are heavier and come within its patience go before it in its own line, however many they are.
        return self.patience + rounds * self.turn + (2 * rounds - 1) * self.longest


def bound_of(
    name: str,
    weight: float,
    models: Mapping[str, Model],
    limits: Mapping[str, Limits],
    *,
    alone: bool,
    brief: float,
) -> Bound:
    """The bound of all who wait for the model *name* with that *weight*: looks at all models, so once is enough.

    The formula is proved where one model is resident at a time (*alone*); elsewhere one more load
    of each is added, and all swaps are doubled, since a start that fails for want of memory is tried
    twice.  A drain or a busy moment that is shorter than *brief* seconds may go unnoticed, so it
    is part of the bound.
    """
    drains = {other: max(brief, limits[other].drain or 0.0) for other in models}
    model, longest = models[name], max(drains.values())
    patience = _patience(model, weight)
    overdue = patience * max(1.0, weight, *(other.heaviest for other in models.values()))
    turns = sum(_longest_lease(m, limits[m.name]) + drains[m.name] for m in models.values() if m is not model)
    swaps = sum(limits[other].load + limits[other].stop for other in models)
    between = 0.0 if alone else swaps + len(models) * max(limits[other].load for other in models)
    return Bound(patience, overdue + turns + swaps + between, longest, model.policy.parallel)


def _patience(model: Model, weight: float) -> float:
    """Seconds that a request of that weight waits before it is overdue against work of weight 1."""
    return model.policy.max_wait / weight


def _longest_lease(model: Model, limits: Limits) -> float:
    """As `turns.turn_lease`, with the slowest swap that there can be."""
    swap = limits.load + limits.stop
    return min(model.policy.turn_lease * swap, max(model.policy.max_wait, swap)) if model.policy.turn_lease else 0.0


def held_by(name: str, models: Mapping[str, Model], limits: Mapping[str, Limits]) -> list[Model]:
    """Whose requests those wait for who wait for the model *name*, and which nothing bounds.

    Its own model serves as many as it may, or another (or its own) is to go and `drain_timeout` is
    not set.  A drain for somebody else counts too: that one may be before it.
    """
    own = models[name]
    if own.state is State.READY:
        return [] if own.has_room else [own]
    if own.state is State.STARTING:
        return []
    return [
        model
        for model in models.values()
        if model.state is State.DRAINING
        and model.leases
        and not (model.drained or model.retiring)
        and limits[model.name].drain is None
    ]


def overdue_decisions(models: Mapping[str, Model], residency: Residency, rules: Rules, now: float) -> frozenset[str]:
    """The models about which something is to be decided at once; between two steps there is none.

    A server with room and a line, one whose time to live is over, and what a plan of this
    instant would do.  A cost that was learned since the last decision can bring one forward by
    moments, so only who is found twice in a row, with nothing decided in between, was forgotten.
    """
    plan = plan_of(models, residency, rules, now)
    found = {model.name for model in models.values() if _could_serve(model) or model.expires < now - ALARM_GRACE}
    found |= {claim.name for claim, _ in plan.start}
    found |= {claim.name for claim, _ in plan.swap}
    found |= {claim.name for claim, _ in plan.hopeless}
    found |= {claim.name for name, claim in plan.closed.items() if models[name].state is State.READY}
    return frozenset(found)


def _could_serve(model: Model) -> bool:
    return model.state is State.READY and model.queue.count > 0 and model.has_room


def in_words(models: Collection[Model], now: float) -> str:
    """Every model that is not plainly stopped: state and for how long, attempt, served and waiting."""
    rows = [
        f"{model.name} {model.state.value} {now - model.began:.1f} s attempt {model.attempt} "
        f"serves {len(model.leases)} waiting {model.queue.count}"
        f"{' retiring' * model.retiring}{' drained' * model.drained}{' stuck' * model.stuck}"
        for model in models
        if model.state is not State.STOPPED or model.queue.count
    ]
    return ", ".join(rows) or "all stopped"
