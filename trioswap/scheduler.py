"""Who is served when, and who is put out for whom: events in, commands out.

One scheduler decides for one swap domain: the models that can be in each other's way.
It does no I/O, reads no clock (`now` comes in, `wake_at` goes out) and does not log.

A ready model serves whatever comes for it, so work is batched by model.  Everything else
is a plan (`planning`), made anew after each event that may change it; this module enters what
happens into the books that plans are made from (`books`), and carries them out:

    gate closed     nothing new is granted, what is served may finish   (-> may open again)
    swap            all victims of a claim have run dry: they end together  (-> no way back)
    start           the room is really there: its reservation begins

What an event cannot have changed is not decided again: to grant a request to an open model,
or to see one of several leave, costs the same whatever the number of models and waiters.

A model that has just failed is in no plan: while its circuit is open whoever asks for it is
told at once what went wrong, so nobody is put out for it (`circuit`).  Nor is anybody, for a moment, for
any model, after a start that could not even be tried.

Identity.  Every start has an attempt number.  What comes back carries it, and what
belongs to another attempt than the present one changes nothing (invariant I2).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

from trioswap import lifecycle
from trioswap.books import Books
from trioswap.circuit import Shortage
from trioswap.errors import ModelCrashed, ModelRemoved, ModelUnloaded, ShuttingDown, StartFailed, TrioswapError
from trioswap.learning import Average, Costs
from trioswap.lifecycle import OCCUPIED, State
from trioswap.messages import (
    Arrived,
    BecameReady,
    Cause,
    CloseGate,
    Command,
    Died,
    Drained,
    Ended,
    Event,
    GotStuck,
    Left,
    Measured,
    ModelView,
    OpenGate,
    Policy,
    Reject,
    RetireAsked,
    Rules,
    ShutdownBegan,
    Squeezed,
    Start,
    Swap,
    UnloadAsked,
    WokeUp,
)
from trioswap.outlook import eviction, hopeless
from trioswap.planning import Plan, make_plan, one_to_relieve
from trioswap.residency import NOTHING, Holding, Residency
from trioswap.residency.budget import Budget
from trioswap.turns import Model, Served


class Scheduler(Books):
    """The decisions of one swap domain.  Not thread-safe, and needs not be: every call is one step."""

    def __init__(
        self,
        policies: Mapping[str, Policy],
        residency: Residency,
        attempts: Iterator[int] | None = None,
        rules: Rules | None = None,
        costs: Mapping[str, Costs] | None = None,
        budget: Budget | None = None,
    ) -> None:
        super().__init__(
            Model(name, policy, (costs or {}).get(name) or Costs()) for name, policy in sorted(policies.items())
        )
        self.residency = residency
        self.rules = rules or Rules()
        self.plan = Plan()
        """The last one: who waits for what."""
        self._budget = budget  # what of the residency is about memory, if anything
        self._attempts = attempts if attempts is not None else itertools.count(1)
        self._closing = False
        self._shortage = Shortage()
        self._over = False  # more is held than there is, because those who could go are at work

    def __repr__(self) -> str:
        """Every model that is not plainly stopped."""
        busy = {**self._occupied, **self._claims}.values()
        return f"<Scheduler {', '.join(f'{m.name} {m.state.value} {len(m.leases)}+{len(m.queue)}' for m in busy)}>"

    def add(self, name: str, policy: Policy, costs: Costs | None = None) -> None:
        """There is one more model; without *costs* to load and to stop it takes no time."""
        self.models[name] = Model(name, policy, costs or Costs(load=Average(0.0), stop=Average(0.0)))

    def remove(self, name: str) -> None:
        """There is one less, which is stopped and has no waiters."""
        model, _ = self.release(name)
        assert model.state is State.STOPPED
        assert not model.queue.count
        self.plan.order = [other for other in self.plan.order if other != name]

    def views(self, now: float) -> list[ModelView]:
        """Every model as it stands, sorted by name."""
        return [model.view(now) for model in self.models.values()]

    def handle(self, event: Event, now: float) -> list[Command]:  # noqa: C901 - one case for each event
        """Take one event, return what must be done about it, in this order."""
        self._now = now
        match event:
            case Arrived(ticket, name, weight):
                self._arrived(ticket, self.models[name], weight)
            case Left(ticket, served):
                self._left(ticket, served=served)
            case Drained(name, attempt):
                self._drained(self.models[name], attempt)
            case BecameReady(name, attempt):
                self._ready(self.models[name], attempt)
            case Ended(name, attempt, failure):
                self._ended(self.models[name], attempt, failure)
            case Died(name, attempt, why):
                self._died(self.models[name], attempt, why)
            case GotStuck(name, attempt, pids):
                self._got_stuck(self.models[name], attempt, pids)
            case Measured(name, attempt, peak):
                self._measured(self.models[name], attempt, peak)
            case Squeezed(sizes) if self._budget is not None:
                self._budget.resize(sizes)
                self._stale = True
            case UnloadAsked(names):
                for name in names:
                    model, error = self.models[name], partial(ModelUnloaded, name)
                    self._unload(model, error, "unloaded by an operator", Cause.OPERATOR)
            case RetireAsked(replaced, removed, crowded):
                self._retire(replaced, removed, crowded)
            case ShutdownBegan():
                self._shut_down()
            case WokeUp():
                pass
        if self._stale or now >= self.wake_at:
            self._replan()
        commands, self._out = self._out, []
        return commands

    # ---- requests --------------------------------------------------------------------------

    def _arrived(self, ticket: int, model: Model, weight: float | None) -> None:
        if self._closing:
            self._out.append(Reject(ticket, ShuttingDown()))
            return
        if model.removed:
            self._out.append(Reject(ticket, ModelRemoved(model.name)))
            return
        if model.circuit.is_open(self._now):
            self._out.append(Reject(ticket, model.circuit.refusal(self._now)))
            return
        self._where[ticket] = model
        if model.out_of_work:
            model.costs.gaps.append(self._now - model.idle_since)
            model.out_of_work = False
        idle = not model.has_work
        model.queue.add(ticket, self._now, model.policy.weight if weight is None else weight)
        if model.state is State.READY:
            self._grant_all(model)
            # A light request protects what it wakes less than idleness did.
            self._stale = self._stale or (idle and bool(self._claims) and model.heaviest < 1.0)
        else:
            self._classify(model)
            # Who loads for somebody already is in nobody's plan; who loaded for nobody was to be put out, perhaps.
            self._stale = self._stale or model.state is not State.STARTING or model.queue.count == 1

    def _left(self, ticket: int, *, served: bool) -> None:
        model = self._where.pop(ticket, None)
        if model is None:  # rejected, or its model died: already forgotten
            return
        if ticket not in model.leases:
            model.queue.remove(ticket)
            if not model.queue.count:
                model.out_of_memory = False
            self._note_idleness(model)
            self._classify(model)
            self._stale = True
            return
        lease = model.end_lease(ticket)
        model.measured.service.add(self._now - lease.since)
        if served:
            model.circuit.close()
        if model.state is State.READY:
            self._grant_all(model)
        self._after_a_lease(model, lease)

    def _after_a_lease(self, model: Model, lease: Served) -> None:
        """Nothing is to be decided when others of the same weight go on, or nobody wants the room."""
        self._note_idleness(model)
        idle = not model.leases
        room_counts = idle and (self._claims or model.retiring or self._over)
        if room_counts or (self._claims and lease.weight > model.heaviest):
            self._stale = True
        if idle and model.retiring:
            self._stop(model, "unloaded")

    # ---- the life of a model server ----------------------------------------------------------

    def _ready(self, model: Model, attempt: int) -> None:
        if not self._is_news(model, attempt, State.STARTING):
            return
        model.measured.load.add(self._now - model.began)
        self._move(model, lifecycle.Event.READY)
        self._shortage.over()
        model.ready_at = model.idle_since = self._now
        model.out_of_memory = False
        self._grant_all(model)

    def _drained(self, model: Model, attempt: int) -> None:
        if not self._is_news(model, attempt, State.DRAINING):
            return
        model.drained = self._stale = True
        if model.retiring:
            self._stop(model, "unloaded")

    def _ended(self, model: Model, attempt: int, failure: StartFailed | None) -> None:
        if not self._is_news(model, attempt, *OCCUPIED):
            return
        self._end_turn(model)
        if model.state is State.STOPPING and not model.stuck:
            model.measured.stop.add(self._now - model.began)
        was = model.state
        self._move(model, lifecycle.Event.EXIT)
        if self._budget is not None and model.peak and not model.outdated:
            self._budget.footprints.measured(model.name, model.placed, model.peak)
        model.holding = model.peak = NOTHING
        model.retiring = model.drained = model.stuck = False
        if was is State.STARTING and failure is not None and not self._tries_again(model, failure):
            self._failed(model, failure)
        elif was in (State.READY, State.DRAINING):  # nobody has said that it died
            self._failed(model, ModelCrashed(model.name, "it ended by itself" if failure is None else failure.why))

    def _tries_again(self, model: Model, failure: StartFailed) -> bool:
        """Out of memory: once more, with more room."""
        if not failure.out_of_memory or self._budget is None:
            return False
        self._budget.footprints.ran_out(model.name, model.placed)
        again, model.out_of_memory = not model.out_of_memory, model.queue.count > 0
        return again

    def _died(self, model: Model, attempt: int, why: str) -> None:
        """Its gate closes now: a request granted during the sweep would meet nobody."""
        if self._is_news(model, attempt, State.READY, State.DRAINING):
            self._begin_stop(model)
            self._failed(model, ModelCrashed(model.name, why or "it ended by itself"))

    def _failed(self, model: Model, failure: StartFailed | ModelCrashed) -> None:
        """Whoever waits is told, unless the next start may come at once and need not fail."""
        policy = model.policy
        self._shortage.note(failure, self._now)
        model.circuit.failed(failure, policy.backoff, policy.backoff_max, self._now)
        if isinstance(failure, StartFailed) or model.circuit.is_open(self._now):
            self._reject_all(model, partial(model.circuit.refusal, self._now))

    def _got_stuck(self, model: Model, attempt: int, pids: tuple[int, ...]) -> None:
        if not self._is_news(model, attempt, *OCCUPIED):
            return
        if model.state is not State.STOPPING:  # it ended by itself, and left something that does not
            self._begin_stop(model)
        model.stuck = self._stale = True
        model.pids = pids

    def _measured(self, model: Model, attempt: int, peak: Holding) -> None:
        if self._budget is not None and self._is_news(model, attempt, *OCCUPIED):
            self._budget.footprints.measured(model.name, model.placed, peak, so_far=True)
            model.peak, taken = peak, self._budget.reserve(peak)
            model.holding = {**taken, **{d: max(size, taken.get(d, 0)) for d, size in model.holding.items()}}
            self._stale = True

    def _unload(
        self, model: Model, error: Callable[[], TrioswapError], reason: str, cause: Cause = Cause.OTHERS
    ) -> None:
        self._reject_all(model, error)
        self._end(model, reason, cause)

    def _retire(self, replaced: Iterable[str], removed: Iterable[str], crowded: Iterable[str]) -> None:
        for name in removed:
            self.models[name].removed = True
            self._reject_all(self.models[name], partial(ModelRemoved, name))
        reasons = {
            **dict.fromkeys(crowded, "by a reload it may not live beside others any more"),
            **dict.fromkeys(replaced, "changed by a reload"),
            **dict.fromkeys(removed, "removed by a reload"),
        }
        for name, reason in reasons.items():
            if not self.models[name].retiring:  # else each reload would give it the whole time again
                self._end(self.models[name], reason)
        for model in list(self._occupied.values()):
            if model.state is State.READY:  # it may serve more at once than it might before
                self._grant_all(model)
        self._stale = True

    def _end(self, model: Model, reason: str, cause: Cause = Cause.OTHERS) -> None:
        """For good, in this run; those who wait for the next one are no concern of this."""
        model.circuit.close()  # who unloads or changes a model that fails has mended it, perhaps
        if model.state is State.STARTING or (model.state is State.READY and not model.leases):
            self._stop(model, reason, cause)
        elif model.state in (State.READY, State.DRAINING):
            if model.state is State.READY:
                self._move(model, lifecycle.Event.CLOSE_GATE)
            model.retiring = True
            self._out.append(CloseGate(model.name, model.attempt, reason, unload=True, cause=cause))
        self._stale = True

    def _shut_down(self) -> None:
        self._closing = True
        for model in self.models.values():
            self._unload(model, ShuttingDown, "trioswap is shutting down")

    # ---- plans -------------------------------------------------------------------------------

    def _replan(self) -> None:
        claims, occupied = self._claims.values(), self._occupied.values()
        again = True
        while again:
            self._stop_the_expired()
            self._relieve()
            plan = make_plan(claims, occupied, self.residency, self.rules, self._now)
            vain = plan.at_the_cost_of_others if self._shortage.lasts(self._now) else []
            for claim in vain:
                self._reject_all(claim, partial(self._shortage.refusal, claim.name))
            again = bool(vain) or plan.leaves_more_to_decide
            if not vain:
                self._carry_out(plan)
            again = again or any(model.expires <= self._now for model in occupied)  # its gate was closed until now
        self.wake_at = min(self.plan.wake_at, *(model.expires for model in occupied), math.inf)
        self._stale = False

    def _relieve(self) -> None:
        """Idle models go, the cheapest first, while others use the memory that they hold."""
        while self._budget is not None and (model := one_to_relieve(self._occupied.values(), self._budget)):
            self._stop(model, "the memory that it holds is used by others", Cause.ITSELF)
        staying = {model.name: model.holding for model in self._occupied.values() if not model.leaving}
        self._over = self._budget is not None and bool(self._budget.overcommitted(staying))

    def _stop_the_expired(self) -> None:
        for model in list(self._occupied.values()):
            if model.expires <= self._now:
                idle = f"idle for {self._now - model.idle_since:.0f} s (ttl)"
                self._stop(model, idle if model.policy.yields else "given back", Cause.ITSELF)  # else it was a loan

    def _carry_out(self, plan: Plan) -> None:
        self.plan = plan
        for claim, blocker in plan.hopeless:
            self._reject_all(claim, hopeless(claim, blocker, self._budget))
        for model in list(self._occupied.values()):
            if model.state is State.DRAINING and not model.retiring and model.name not in plan.closed:
                self._open_gate(model)
        for claim, victims in plan.swap:
            self._swap(claim, victims)
        for name, claim in plan.closed.items():
            if self.models[name].state is State.READY:
                self._close_gate(self.models[name], claim)
        for claim, holding in plan.start:
            self._start(claim, holding)

    def _open_gate(self, model: Model) -> None:
        self._move(model, lifecycle.Event.OPEN_GATE)
        model.drained = False
        self._out.append(OpenGate(model.name, model.attempt, "nobody needs its room any more"))
        self._grant_all(model)

    def _close_gate(self, model: Model, claim: Model) -> None:
        self._move(model, lifecycle.Event.CLOSE_GATE)
        model.drained = False
        waited = self._now - claim.claim_start
        self._out.append(CloseGate(model.name, model.attempt, f"for {claim.name}, waited {waited:.1f} s"))

    def _swap(self, claim: Model, victims: list[Model]) -> None:
        evictions = tuple(eviction(victim, claim, self._now) for victim in victims)
        for victim in victims:
            self._begin_stop(victim)
        self._out.append(Swap(claim.name, evictions))

    def _start(self, claim: Model, holding: Holding) -> None:
        claim.attempt, claim.outdated = next(self._attempts), False
        claim.holding = claim.placed = holding
        self._move(claim, lifecycle.Event.START)
        self._out.append(Start(claim.name, claim.attempt, holding))
