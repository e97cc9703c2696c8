"""The decision: given who waits and who is resident, whose gates close, who is put out, who starts.

A plan is a pure function of the models and the time.  It is made anew whenever something
happened that may matter, and remembers nothing, so a cancelled request, a crash or a
server that went by itself needs no case of its own: the next plan is simply another one.

The claims are taken in order.  Each gets room beside those who stay, or else victims; the
room that an earlier claim was given is taken for the later ones.  A claim that is overdue
and whose room is not free yet is promised it: later claims may only use what is left, or
small models would take turns in front of a large one for ever.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from functools import cache

import attrs

from trioswap.lifecycle import State
from trioswap.messages import Rules
from trioswap.residency import Holding, Offer, Residency
from trioswap.residency.budget import Budget
from trioswap.turns import Model, due_at, exposed_at, free_at, shortest_visit

# Landlord credits are compared, not added up, so the cheapest victim must still cost something.
LEAST_COST = 1e-6


@attrs.frozen
class Blocked:
    """Why a claim has to wait."""

    by: tuple[str, ...]
    """Who is in its way; empty: somebody who loads, or another claim that was before it."""
    until: float
    """When they can be made to go; inf: nobody can tell."""


@attrs.define(eq=False)
class Plan:
    """What is to be done now, and when to think again."""

    start: list[tuple[Model, Holding]] = attrs.field(factory=list)
    swap: list[tuple[Model, list[Model]]] = attrs.field(factory=list)
    """A claim, and those who end for it: all of them can."""
    closed: dict[str, Model] = attrs.field(factory=dict)
    """Whose gate is to be closed, for which claim."""
    hopeless: list[tuple[Model, Model | None]] = attrs.field(factory=list)
    """A claim that can never be served, and the model that will not go (None: it is too large for the machine)."""
    wake_at: float = math.inf
    blocked: dict[str, Blocked] = attrs.field(factory=dict)
    order: list[str] = attrs.field(factory=list)
    """The claims, the next one first."""

    @property
    def leaves_more_to_decide(self) -> bool:
        """Whether there is another plan once this one is carried out; to be asked before.

        Who is put out may be a claim then, or makes room for a load, or for a claim that another
        gate was closed for; who is refused, or starts and does not yield, changes what others can hope for.
        """
        gone = {victim.name: victim for _, victims in self.swap for victim in victims}
        return (
            bool(self.hopeless)
            or any(victim.queue.count or victim.state is State.STARTING for victim in gone.values())
            or bool(gone and self.closed.keys() - gone.keys())
            or any(not claim.policy.yields for claim, _ in self.start)
        )

    @property
    def at_the_cost_of_others(self) -> list[Model]:
        """The claims that others end for so that a server can be started; a loan starts none.

        Not those that have room, for which a load that nobody waits for ends.
        """
        return [claim for claim, _ in self.swap if claim.must_start and claim.name in self.blocked]


def make_plan(
    claims: Iterable[Model], occupied: Iterable[Model], residency: Residency, rules: Rules, now: float
) -> Plan:
    """Decide for everybody."""
    return _Planner(list(claims), list(occupied), residency, rules, now).plan()


def one_to_relieve(occupied: Collection[Model], budget: Budget) -> Model | None:
    """The cheapest idle model whose memory others use; None: nobody has to go, or nobody can."""
    over = budget.overcommitted({model.name: model.holding for model in occupied if not model.leaving})
    idle = [model for model in occupied if model.state is State.READY and not model.has_work and model.policy.yields]
    idle = [model for model in idle if over.keys() & model.holding.keys()]
    return min(idle, key=lambda model: (model.credit, model.name), default=None)


def rank(claim: Model, due: float, rules: Rules, now: float) -> tuple[float, float, float, str]:
    """Sort key of a claim that is due at *due*.

    The one that is due first is next, which with equal weights is the one that has waited
    longest; a model that was just put out has begun to wait anew.  Priority goes before
    that only among those that are not overdue, so it cannot starve anybody.
    """
    if rules.by_arrival:
        return (0.0, -claim.policy.priority, claim.queue.oldest, claim.name)
    return (0.0, 0.0, due, claim.name) if due <= now else (1.0, -claim.policy.priority, due, claim.name)


class _Planner:
    def __init__(
        self, claims: list[Model], occupied: list[Model], residency: Residency, rules: Rules, now: float
    ) -> None:
        self.due = {claim.name: due_at(claim) for claim in claims}
        self.claims = sorted(claims, key=lambda claim: rank(claim, self.due[claim.name], rules, now))
        self.models = {model.name: model for model in occupied}
        self.residency, self.rules, self.now = residency, rules, now
        # Who will be resident when everything decided so far has happened, and who takes room right now.
        self.after = {model.name: model.holding for model in occupied if not model.leaving}
        self.held = {model.name: model.holding for model in occupied}
        self.promised: list[str] = []  # claims that have room in `after` and have not started
        self.loads = sum(model.state is State.STARTING for model in occupied)
        self.unmovable = {m.name: m.holding for m in occupied if m.stuck or not (m.policy.yields or m.leaving)}
        movable = [model for model in occupied if _can_be_put_out(model)]
        self.movable = {model.name for model in movable}
        self.exposed, self.soonest = set[str](), math.inf  # who may have to go for a claim that is not overdue; later
        self.draining = {model.name for model in occupied if model.state is State.DRAINING}
        self.waiting = sum(claim.queue.weight for claim in claims)
        shortest = cache(lambda: shortest_visit(claims))  # many a plan does not need it
        for model in movable if claims else ():
            at = exposed_at(model, claims, shortest, self.waiting, now)
            if at <= now:
                self.exposed.add(model.name)
            else:
                self.soonest = min(self.soonest, at)
        self.cheapest = min((model.credit for model in movable), default=0.0)
        self.result = Plan(order=[claim.name for claim in self.claims])

    def plan(self) -> Plan:
        claims = iter(self.claims)
        for claim in claims:
            if claim.stuck:
                self.result.hopeless.append((claim, claim))
                continue
            holding = self.residency.place(claim.name, self.after)
            if holding is not None:
                self._give(claim, holding)
                self._start(claim)
            elif not self._make_room(claim):
                break
        for claim in claims:  # nobody after it may have room, but who can never have any is told
            self._is_hopeless(claim)
        return self.result

    def _start(self, claim: Model) -> None:
        """There is room, now or when a stop under way is over.

        Nobody starts who would have to go again for an earlier claim: groups may let a
        newcomer in beside one that would put it out.
        """
        if claim.state is not State.STOPPED:
            return
        holding = self._place_now(claim)
        if holding is None or any(self._would_put_out(n, claim, holding) for n in self.promised):
            return
        if self.loads >= self.rules.parallel_loads and not self._end_a_load_for_nobody(claim):
            return
        self.promised.remove(claim.name)
        self.held[claim.name] = self.after[claim.name] = holding
        self.loads += 1
        self.result.start.append((claim, holding))

    def _end_a_load_for_nobody(self, claim: Model) -> bool:
        """Whether one is left out, so that *claim*, which has room beside it, may load instead."""
        loads = [m for m in self.models.values() if m.state is State.STARTING and m.name in self.movable]
        if self.loads > self.rules.parallel_loads or not loads:
            return False
        victim = max(loads, key=lambda model: (model.began, model.name))  # which has most of its way before it
        self.movable.remove(victim.name)
        del self.after[victim.name]
        self.result.swap.append((claim, [victim]))
        self.loads -= 1
        return True

    def _place_now(self, claim: Model) -> Holding | None:
        """Where *claim* fits beside those who are there, so that who was promised room still has it."""
        promised = [name for name in self.promised if name != claim.name]
        beside_all = {**self.held, **{name: _larger(self.held.get(name, {}), self.after[name]) for name in promised}}
        holding = self.residency.place(claim.name, beside_all)
        if holding is not None or not promised:
            return holding
        holding = self.residency.place(claim.name, self.held)
        if holding is None:
            return None
        after = {name: held for name, held in self.after.items() if name not in promised} | {claim.name: holding}
        for name in promised:
            room = self.residency.place(name, after)
            if room is None:
                return None
            after[name] = room
        return holding

    def _would_put_out(self, other: str, claim: Model, holding: Holding) -> bool:
        return other != claim.name and self.residency.place(other, {claim.name: holding}) is None

    def _make_room(self, claim: Model) -> bool:
        """Take the room from others, now or later; False: nobody after this claim may have any."""
        overdue = self.due[claim.name] <= self.now
        if self.movable.isdisjoint(self.movable if overdue else self.exposed):
            return self._wait(claim, self.soonest)
        offers = _Offers(self, claim)
        victims = self._choose(claim, offers, any_time=overdue or self.rules.by_arrival)
        if victims is None:
            return self._wait(claim, min(self.soonest, offers.later))
        until = max(offers.free_at(name) for name in victims)
        self.result.blocked[claim.name] = Blocked(tuple(sorted(victims)), until)
        if until > self.now:
            self.result.wake_at = min(self.result.wake_at, until)
            if not overdue:
                self.result.wake_at = min(self.result.wake_at, self.due[claim.name])
                return True
            if any(self._outweighs(name, claim) for name in victims):
                return True
            if not victims.isdisjoint(self.promised):  # by arrival: a claim before it, which has had no turn yet
                return False
        self.movable -= victims
        for name in victims:
            del self.after[name]
        holding = self.residency.place(claim.name, self.after)
        assert holding is not None, "whoever was chosen makes enough room"
        self._give(claim, holding)
        if until <= self.now:
            self._put_out(claim, [self.models[name] for name in sorted(victims)])
        return True

    def _outweighs(self, name: str, claim: Model) -> bool:
        """Whether *name* works for somebody so heavy that *claim* is not overdue against it yet.

        Then nothing is promised: who is as heavy as that may be due before, and would wait for a light one.
        """
        model = self.models.get(name)
        return model is not None and model.has_work and due_at(claim, model.heaviest) > self.now

    def _choose(self, claim: Model, offers: _Offers, *, any_time: bool) -> frozenset[str] | None:
        """Those who are draining already, if they are enough: else two could take turns in being reopened.

        Who may go at *any_time* is chosen where the claim is overdue; else it takes what is free now, or nothing.
        """
        if self.draining:
            # Only those that it may have now: else it takes one that drains for somebody else, who drains another.
            chosen = self.residency.victims(
                claim.name,
                self.after,
                lambda name: offers(name) if name in self.draining and offers.free_at(name) <= self.now else None,
            )
            if chosen is not None:
                return chosen
        return self.residency.victims(claim.name, self.after, offers if any_time else offers.now)

    def _give(self, claim: Model, holding: Holding) -> None:
        self.after[claim.name] = holding
        self.promised.append(claim.name)

    def _put_out(self, claim: Model, victims: list[Model]) -> None:
        for victim in victims:
            if victim.state is not State.STARTING:
                self.result.closed[victim.name] = claim
        if all(victim.can_end for victim in victims):
            self.result.swap.append((claim, victims))
            self.loads -= sum(victim.state is State.STARTING for victim in victims)
            self._start(claim)  # perhaps in room that is free now and promised to others, who get what becomes free

    def _is_hopeless(self, claim: Model) -> bool:
        if not claim.stuck and self.residency.place(claim.name, self.unmovable) is not None:
            return False
        alone = self.residency.place(claim.name, {})
        blocker = claim if claim.stuck else None if alone is None else self.models[min(self.unmovable)]
        self.result.hopeless.append((claim, blocker))
        return True

    def _wait(self, claim: Model, until: float) -> bool:
        """Nobody can go for it before *until*; perhaps nobody ever will."""
        if self._is_hopeless(claim):
            return True
        due = self.due[claim.name]
        self.result.blocked[claim.name] = Blocked((), math.inf)
        if due > self.now:  # then it is before others, even where nobody can be put out
            self.result.wake_at = min(self.result.wake_at, due, until)
        return due > self.now


def _larger(one: Holding, other: Holding) -> Holding:
    return {device: max(one.get(device, 0), other.get(device, 0)) for device in {**one, **other}}


def _can_be_put_out(model: Model) -> bool:
    loads_for_nobody = model.state is State.STARTING and not model.queue.count
    return model.policy.yields and (model.serves or loads_for_nobody)


class _Offers:
    """What the resident models offer to one claim."""

    def __init__(self, planner: _Planner, claim: Model) -> None:
        self.planner, self.claim = planner, claim
        self._free_at: dict[str, float] = {}
        self.later = math.inf
        """When somebody that was not free `now` will be, at the earliest."""

    def __call__(self, name: str) -> Offer | None:
        planner = self.planner
        if planner.rules.by_arrival and name not in planner.unmovable:
            # llama-swap chooses without a look at who is busy or loading, then waits.
            return Offer(planner.now, busy=False, cost=1.0)
        if name not in planner.movable:
            return None
        model = planner.models[name]
        cost = model.credit - planner.cheapest + LEAST_COST
        return Offer(max(self.free_at(name), planner.now), busy=model.has_work, cost=cost)

    def now(self, name: str) -> Offer | None:
        """The same for a claim that is not overdue: who is not free now offers nothing."""
        if name not in self.planner.exposed:
            return None
        if (at := self.free_at(name)) > self.planner.now:
            self.later = min(self.later, at)
            return None
        return self(name)

    def free_at(self, name: str) -> float:
        if name not in self.planner.movable:
            return math.inf
        if name not in self._free_at:
            planner = self.planner
            self._free_at[name] = free_at(planner.models[name], self.claim, planner.waiting, planner.now)
        return self._free_at[name]
