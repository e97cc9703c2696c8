"""Small worlds around the scheduler: what may happen next, and the laws that hold after every step.

A `World` is the scheduler plus an abstract shell: the runs and closed gates that the
scheduler's commands have set going.  `enabled` lists every event that may come next,
`step` feeds one and checks the laws.  Walking all reachable worlds is then a search.

What the scheduler learns is fixed here (a load takes one unit of time), or no world would
ever be seen twice.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence

import attrs

from trioswap.errors import StartFailed
from trioswap.learning import Average, Costs
from trioswap.lifecycle import OCCUPIED, State
from trioswap.messages import (
    Arrived,
    BecameReady,
    CloseGate,
    Command,
    Died,
    Drained,
    Ended,
    Event,
    GotStuck,
    Grant,
    Left,
    OpenGate,
    Policy,
    Reject,
    Rules,
    ShutdownBegan,
    Start,
    Stop,
    Swap,
    UnloadAsked,
    WokeUp,
)
from trioswap.planning import make_plan
from trioswap.residency import Holding, Offer, Residency
from trioswap.scheduler import Scheduler
from trioswap.turns import Model, due_at, turn_lease

MAX_WAIT = 2  # units of time; enough to be before, at and after the limit
TTL = 2


class Known(Average):
    """A cost that no measurement changes."""

    def add(self, sample: float) -> None:
        pass


class Habit(deque[float]):
    """Gaps that no arrival changes."""

    def append(self, gap: float) -> None:
        pass


def known_costs(gaps: Sequence[float] = ()) -> Costs:
    """A load takes a unit of time, a stop none, a request one."""
    return Costs(Known(1.0), Known(0.0), Known(1.0), Habit(gaps))


@attrs.define
class FakeRun:
    """A supervised task, as far as the scheduler can tell."""

    attempt: int
    holding: Holding
    ready: bool = False
    stopping: bool = False
    stuck: bool = False
    ready_at: int = 0


@attrs.define
class Limits:
    """What keeps the world small."""

    tickets: int = 2
    """Requests alive at the same time."""
    weights: tuple[float, ...] = (1.0,)
    crashes: bool = True
    unloads: bool = True
    shutdown: bool = True
    stuck: bool = False
    cuts: bool = True
    """Drain deadlines that cut leases."""
    passing: bool = True
    """Time passes."""


@attrs.define
class World:
    """A scheduler and everything its commands have set going."""

    core: Scheduler
    limits: Limits
    now: int = 0
    next_ticket: int = 1
    waiting: dict[int, str] = attrs.field(factory=dict)
    serving: dict[int, str] = attrs.field(factory=dict)
    runs: dict[str, FakeRun] = attrs.field(factory=dict)
    drains: set[tuple[str, int]] = attrs.field(factory=set)
    """Closed gates that somebody watches, until `Drained`."""
    closing: bool = False

    # ---- what may happen next ----------------------------------------------------------

    def enabled(self) -> Iterator[Event | str]:  # noqa: C901 - one clause for each kind of event
        """Every event that may come next; "pass" is a unit of time."""
        yield from self.helpful()
        if len(self.waiting) + len(self.serving) < self.limits.tickets:
            for name in self.core.models:
                for weight in self.limits.weights:
                    yield Arrived(self.next_ticket, name, weight)
        for ticket in [*self.waiting, *self.serving]:
            yield Left(ticket)
        for name, run in self.runs.items():
            if self.limits.crashes and not run.stopping:
                yield Ended(name, run.attempt, None if run.ready else StartFailed(name, "crash"))
            if self.limits.crashes and run.ready and not run.stopping:
                yield Died(name, run.attempt)
            if self.limits.stuck and not run.stuck:
                yield GotStuck(name, run.attempt)
        if self.limits.unloads and not self.closing:
            for name in self.core.models:
                yield UnloadAsked((name,))
        if self.limits.shutdown and not self.closing:
            yield ShutdownBegan()
        if self.limits.passing:
            yield "pass"

    def helpful(self) -> Iterator[Event]:
        """What the shell and well-behaved servers do by themselves."""
        for name, attempt in sorted(self.drains):
            if self.limits.cuts or name not in self.serving.values():
                yield Drained(name, attempt)
        for name, run in self.runs.items():
            if not run.ready and not run.stopping:
                yield BecameReady(name, run.attempt)
            if run.stopping:
                yield Ended(name, run.attempt)

    def fork(self) -> World:
        """A copy that shares what never changes."""
        shared = [self.core.residency, self.core.rules, self.limits]
        shared += [thing for m in self.core.models.values() for thing in (m.policy, m.costs)]
        return copy.deepcopy(self, {id(thing): thing for thing in shared})

    # ---- one step -------------------------------------------------------------------------

    def step(self, event: Event | str) -> list[Command]:
        """Feed *event*, do what the scheduler says, check the laws."""
        if event == "pass":
            self.now += 1
            event = WokeUp()
            if self.core.wake_at > self.now:
                self.check()
                return []
        assert not isinstance(event, str)
        self._before(event)
        must_resolve = [
            t for t, m in self.waiting.items() if isinstance(event, Ended) and event.failure and m == event.model
        ]
        commands = self.core.handle(event, float(self.now))
        for command in commands:
            self._obey(command)
        for ticket in must_resolve:
            assert ticket not in self.waiting, "a failed start resolves all its waiters (I5)"
        self.check()
        return commands

    def _before(self, event: Event) -> None:  # noqa: C901 - one case for each event
        match event:
            case Arrived(ticket, name):
                self.waiting[ticket] = name
                self.next_ticket += 1
            case Left(ticket):
                self.waiting.pop(ticket, None)
                self.serving.pop(ticket, None)
            case Drained(name, attempt):
                # Either nothing was in flight, or the deadline has cut what was.
                self.drains.discard((name, attempt))
                present = name in self.runs and self.runs[name].attempt == attempt
                for ticket in [t for t, m in self.serving.items() if m == name and present]:
                    del self.serving[ticket]
                    for command in self.core.handle(Left(ticket), float(self.now)):
                        self._obey(command)
            case BecameReady(name, _):
                self.runs[name].ready = True
                self.runs[name].ready_at = self.now
            case Died(name, _) | GotStuck(name, _):
                self.runs[name].stopping = True
                self.runs[name].stuck = isinstance(event, GotStuck)
                self._forget(name)
            case Ended(name, attempt, _):
                assert self.runs.pop(name).attempt == attempt
                self._forget(name)
            case ShutdownBegan():
                self.closing = True

    def _forget(self, name: str) -> None:
        self.drains = {(m, attempt) for m, attempt in self.drains if m != name}
        for ticket in [t for t, m in self.serving.items() if m == name]:
            del self.serving[ticket]

    def _obey(self, command: Command) -> None:  # noqa: C901 - one case for each command
        match command:
            case Grant(ticket, name, attempt):
                run = self.runs[name]
                assert run.ready, "a grant needs a ready model"
                assert not run.stopping, "a grant needs a model that stays (I1)"
                assert run.attempt == attempt, "a grant is for the present attempt (I2)"
                self.serving[ticket] = self.waiting.pop(ticket)
                assert list(self.serving.values()).count(name) <= self.core.models[name].policy.parallel
            case Reject(ticket, _):
                del self.waiting[ticket]
            case Start(name, attempt, holding):
                self._start(name, attempt, holding)
            case Stop(name, attempt, _):
                self._end(name, attempt)
            case Swap(target, evictions):
                assert not self.closing, "no swap after shutdown (I8)"
                assert target in self.waiting.values(), "nobody is put out for nobody (I9)"
                for eviction in evictions:
                    self._end(eviction.model, eviction.attempt)
            case CloseGate(name, attempt, _, unload):
                self._close_gate(name, attempt, unload)
            case OpenGate(name, attempt):
                assert self.runs[name].attempt == attempt, "a gate of the present attempt (I2)"
                self.drains.discard((name, attempt))

    def _start(self, name: str, attempt: int, holding: Holding) -> None:
        assert not self.closing, "no start after shutdown (I8)"
        assert name not in self.runs, "one process for a model"
        assert name in self.waiting.values(), "no load for nobody (I9)"
        self._check_promises(name)
        others = {other: run.holding for other, run in self.runs.items()}
        assert self.core.residency.place(name, others) == holding, f"{name} starts beside {sorted(others)} (I4)"
        self.runs[name] = FakeRun(attempt, holding)
        loads = sum(not run.ready and not run.stopping for run in self.runs.values())
        assert loads <= self.core.rules.parallel_loads

    def _check_promises(self, newcomer: str) -> None:
        """Who starts takes nothing away from a claim that is overdue and has waited longer (I11)."""
        core, claim = self.core, self.core.models[newcomer]
        if core.rules.by_arrival:
            return
        for other in core.models.values():
            if other.is_claim and due_at(other) <= self.now and due_at(other) < _due_before_start(claim):
                stays = {m: run.holding for m, run in self.runs.items() if not run.stopping or run.stuck}
                if self._could_have(other.name, stays):
                    stays[newcomer] = core.models[newcomer].holding
                    assert self._could_have(other.name, stays), f"{newcomer} took the room of {other.name} (I11)"

    def _could_have(self, name: str, stays: Mapping[str, Holding]) -> bool:
        def offers(other: str) -> Offer | None:
            run = self.runs.get(other)
            return Offer(0, False, 1) if run is not None and run.ready and not run.stuck else None

        place, victims = self.core.residency.place, self.core.residency.victims
        return place(name, stays) is not None or victims(name, stays, offers) is not None

    def _end(self, name: str, attempt: int) -> None:
        run = self.runs[name]
        assert run.attempt == attempt, "a stop is for the present attempt (I2)"
        assert not run.stopping, "one teardown (I3)"
        assert name not in self.serving.values(), "nobody is served by what is stopped (I1)"
        run.stopping = True
        self.drains = {(m, a) for m, a in self.drains if m != name}

    def _close_gate(self, name: str, attempt: int, unload: bool) -> None:
        run, model = self.runs[name], self.core.models[name]
        assert run.attempt == attempt, "a gate of the present attempt (I2)"
        if not unload:
            assert any(m != name for m in self.waiting.values()), "a gate is closed for somebody (I9)"
            lightest = min(1.0, model.heaviest / max(c.queue.heaviest for c in self._claims()))
            protected = run.ready_at + turn_lease(model) * lightest
            assert self.now >= protected or name not in self.serving.values(), "a turn has its lease"
        self.drains.add((name, attempt))

    def _claims(self) -> list[Model]:
        return [model for model in self.core.models.values() if model.is_claim]

    # ---- the laws ---------------------------------------------------------------------------

    def check(self) -> None:
        """What holds in every world, whatever happened before."""
        for name, model in self.core.models.items():
            granted = {t for t, m in self.serving.items() if m == name}
            assert set(model.leases) == granted, "the scheduler counts exactly what is being served"
            assert set(model.queue) == {t for t, m in self.waiting.items() if m == name}, "no waiter is lost (I5)"
            assert not model.leases or model.state in (State.READY, State.DRAINING), "leases need a live model (I1)"
            idle_slot = model.state is State.READY and model.has_room
            assert not (idle_slot and len(model.queue)), "an open gate lets in whom it can"
            assert (model.state in OCCUPIED) == (name in self.runs), "state and process agree"
            if model.state is State.DRAINING and not model.retiring:
                assert self.core.plan.closed.get(name) in self._claims(), "a gate is closed for somebody (I9)"
        assert set(self.core._where) == set(self.waiting) | set(self.serving), "who left is not remembered (I9)"
        self._check_indexes()
        self._check_room()
        self._check_nothing_was_missed()

    def _check_indexes(self) -> None:
        models = self.core.models.values()
        assert set(self.core._claims) == {m.name for m in models if m.is_claim}
        assert set(self.core._occupied) == {m.name for m in models if m.state in OCCUPIED}

    def _check_room(self) -> None:
        """What is resident fits, in the order in which it came (I4)."""
        room = sorted(self.runs.items(), key=lambda item: item[1].attempt)
        for i, (name, _) in enumerate(room):
            before = {other: run.holding for other, run in room[:i]}
            assert self.core.residency.place(name, before) is not None, f"{name} beside {sorted(before)} (I4)"

    def _check_nothing_was_missed(self) -> None:
        """A plan made now would change nothing: what was not decided again need not have been."""
        core = self.core
        models = core.models.values()
        fresh = make_plan(
            [m for m in models if m.is_claim], [m for m in models if m.state in OCCUPIED],
            core.residency, core.rules, float(self.now),
        )  # fmt: skip
        if not core._closing:
            assert not fresh.start, "a start was missed"
            assert not fresh.swap, "a swap was missed"
            assert not fresh.hopeless, "an answer was missed"
            shut = {m.name for m in models if m.state is State.DRAINING and not m.retiring}
            assert set(fresh.closed) == shut, "gates are as they should be"
        assert core.wake_at <= fresh.wake_at, "it wakes in time"
        assert core.wake_at > self.now, "a time that has passed is acted on, not asked for again"
        if self.waiting and not self.serving and not self.drains and all(r.ready for r in self.runs.values()):
            stopping = any(run.stopping for run in self.runs.values())
            assert stopping or core.wake_at < math.inf, "whoever waits, something will happen (I6)"

    # ---- identity -------------------------------------------------------------------------------

    def key(self) -> object:
        """The same for worlds that differ only in names of tickets and attempts, and in absolute time."""
        now = self.now
        tickets = {t: i for i, t in enumerate(sorted({*self.waiting, *self.serving}))}
        age = lambda t: min(now - t, MAX_WAIT + 1)  # noqa: E731
        return (
            tuple(
                (
                    m.state,
                    tuple((w, tuple((tickets[t], age(at)) for t, at in line.items())) for w, line in m.queue.lines.items()),
                    tuple(sorted((tickets[t], lease.weight) for t, lease in m.leases.items())),
                    age(m.idle_since) if m.serves and not m.leases else 0,
                    age(m.ready_at) if m.serves else 0,
                    age(m.out_at) if len(m.queue) else 0,
                    m.retiring, m.drained, m.stuck, m.out_of_memory,
                    sorted(m.holding.items()) if m.holding else 0,
                    m.credit > self.core._floor,
                )
                for m in self.core.models.values()
            ).__repr__(),
            tuple(sorted((n, r.ready, r.stopping, r.stuck) for n, r in self.runs.items())),
            tuple(sorted((n, n in self.runs and self.runs[n].attempt == a) for n, a in self.drains)),
            self.core._closing,
        )  # fmt: skip


def _due_before_start(model: Model) -> float:
    return model.queue.due(model.out_at, model.policy.max_wait)


def make_world(
    residency: Residency,
    models: Sequence[str],
    limits: Limits | None = None,
    *,
    policy: Policy | None = None,
    rules: Rules | None = None,
    gaps: Sequence[float] = (),
    scheduler: Callable[..., Scheduler] = Scheduler,
    **more: object,
) -> World:
    """A world at rest."""
    policy = policy or Policy(MAX_WAIT, TTL, turn_lease=1.0)
    costs = {name: known_costs(gaps) for name in models}
    return World(
        scheduler(dict.fromkeys(models, policy), residency, rules=rules, costs=costs, **more), limits or Limits()
    )


def walk(start: World, bound: int = 200_000) -> int:
    """Visit every reachable world once; return how many there are.

    The laws are asserts inside `step`.  From every new world the shell alone, with clients
    that do nothing more, must be able to answer everybody.
    """
    seen, todo = {start.key()}, deque([start])
    while todo:
        before = todo.popleft()
        for event in list(before.enabled()):
            after = before.fork()
            after.step(event)
            key = after.key()
            if key not in seen:
                assert len(seen) < bound, "the world is larger than it was meant to be"
                seen.add(key)
                todo.append(after)
                settle(after.fork())
    return len(seen)


def settle(world: World) -> None:
    """Let the shell work, and served requests end: everybody who waits must be answered in the end (I5, I6, I11)."""
    for _ in range(60):
        if not world.waiting:
            return
        event = next((e for e in world.helpful() if not _stuck(world, e)), None)
        if event is None and world.serving:
            event = Left(next(iter(world.serving)))
        world.step(event if event is not None else "pass")
    raise AssertionError(f"somebody waits for ever: {world}")


def _stuck(world: World, event: Event) -> bool:
    return isinstance(event, Ended) and event.model in world.runs and world.runs[event.model].stuck


def stale_events(world: World) -> list[Event]:
    """News of attempts that are long over."""
    return [
        news
        for name in world.core.models
        for news in (Drained(name, -1), BecameReady(name, -1), Ended(name, -1), Died(name, -1), GotStuck(name, -1))
    ]
