"""Small worlds around the scheduler: what may happen next, and the laws that hold after every step.

A `World` is the scheduler plus an abstract shell: the runs, swaps and drains that the
scheduler's commands have set going.  `enabled` lists every event that may come next,
`step` feeds one and checks the laws.  Walking all reachable worlds is then a search.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping

import attrs

from trioswap.config import GroupConfig
from trioswap.errors import StartFailed
from trioswap.lifecycle import OCCUPIED, State
from trioswap.messages import (
    AbandonSwap,
    Arrived,
    BecameReady,
    Cleared,
    Command,
    Died,
    Drain,
    Drained,
    Ended,
    Event,
    GotStuck,
    Grant,
    Left,
    Policy,
    Reject,
    ShutdownBegan,
    Start,
    Stop,
    Swap,
    UnloadAsked,
    WokeUp,
)
from trioswap.residency import Groups
from trioswap.scheduler import Scheduler

MAX_WAIT = 2  # units of time; enough to be before, at and after the limit
TTL = 2


@attrs.define
class FakeRun:
    """A supervised task, as far as the scheduler can tell."""

    attempt: int
    ready: bool = False
    stopping: bool = False
    stuck: bool = False


@attrs.define
class FakeSwap:
    """A swap being carried out."""

    target: str
    victims: tuple[tuple[str, int], ...]
    undrained: set[tuple[str, int]]


@attrs.define
class Limits:
    """What keeps the world small."""

    tickets: int = 2
    """Requests alive at the same time."""
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
    swaps: dict[int, FakeSwap] = attrs.field(factory=dict)
    drains: set[tuple[str, int]] = attrs.field(factory=set)
    closing: bool = False

    # ---- what may happen next ----------------------------------------------------------

    def enabled(self) -> Iterator[Event | str]:  # noqa: C901 - one clause for each kind of event
        """Every event that may come next; "pass" is a unit of time."""
        yield from self.helpful()
        if len(self.waiting) + len(self.serving) < self.limits.tickets:
            for name in self.core._models:
                yield Arrived(self.next_ticket, name)
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
            for name in self.core._models:
                yield UnloadAsked((name,))
        if self.limits.shutdown and not self.closing:
            yield ShutdownBegan()
        if self.limits.passing:
            yield "pass"

    def helpful(self) -> Iterator[Event]:
        """What the shell and well-behaved servers do by themselves."""
        for attempt, swap in self.swaps.items():
            for name, of in sorted(swap.undrained):
                if self.limits.cuts or name not in self.serving.values():
                    yield Drained(name, of)
            if not swap.undrained and not any(self._runs_on(victim) for victim in swap.victims):
                yield Cleared(attempt)
        for name, attempt in sorted(self.drains):
            yield Drained(name, attempt)
        for name, run in self.runs.items():
            if not run.ready and not run.stopping:
                yield BecameReady(name, run.attempt)
            if run.stopping:
                yield Ended(name, run.attempt)

    def _runs_on(self, victim: tuple[str, int]) -> bool:
        name, attempt = victim
        return name in self.runs and self.runs[name].attempt == attempt

    def fork(self) -> World:
        """A copy that shares what never changes."""
        fixed = [self.core._residency, self.limits, *(m.policy for m in self.core._models.values())]
        return copy.deepcopy(self, {id(thing): thing for thing in fixed})

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
                present = self._runs_on((name, attempt))
                for ticket in [t for t, m in self.serving.items() if m == name and present]:
                    del self.serving[ticket]
                    self.core.handle(Left(ticket), float(self.now))
                self.drains.discard((name, attempt))
                for swap in self.swaps.values():
                    swap.undrained.discard((name, attempt))
            case Cleared(attempt):
                del self.swaps[attempt]
            case BecameReady(name, _):
                self.runs[name].ready = True
            case Died(name, _) | GotStuck(name, _):
                self.runs[name].stopping = True
                self.runs[name].stuck = isinstance(event, GotStuck)
                for ticket in [t for t, m in self.serving.items() if m == name]:
                    del self.serving[ticket]
            case Ended(name, attempt, _):
                assert self.runs.pop(name).attempt == attempt
                self.drains.discard((name, attempt))  # what it would still say is stale: `stale_events`
                for ticket in [t for t, m in self.serving.items() if m == name]:
                    del self.serving[ticket]
            case ShutdownBegan():
                self.closing = True

    def _obey(self, command: Command) -> None:
        match command:
            case Grant(ticket, name, attempt):
                run = self.runs[name]
                assert run.ready, "a grant needs a ready model"
                assert not run.stopping, "a grant needs a model that stays (I1)"
                assert run.attempt == attempt, "a grant is for the present attempt (I2)"
                self.serving[ticket] = self.waiting.pop(ticket)
            case Reject(ticket, _):
                del self.waiting[ticket]
            case Start(name, attempt):
                assert not self.closing, "no start after shutdown (I8)"
                assert name not in self.runs, "one process for a model"
                assert name in self.waiting.values(), "no load for nobody (I9)"
                others = frozenset(self.runs)
                assert not self.core._residency.victims(name, others), f"{name} starts beside {sorted(others)} (I4)"
                self.runs[name] = FakeRun(attempt)
            case Stop(name, attempt, _):
                run = self.runs[name]
                assert run.attempt == attempt, "a stop is for the present attempt (I2)"
                assert not run.stopping, "one teardown (I3)"
                assert name not in self.serving.values(), "nobody is served by what is stopped (I1)"
                run.stopping = True
            case Swap(name, attempt, victims, _):
                assert not self.closing, "no swap after shutdown (I8)"
                pairs = tuple((victim, self.runs[victim].attempt) for victim in victims)
                self.swaps[attempt] = FakeSwap(name, pairs, set(pairs))
            case AbandonSwap(attempt, _):
                # In the shell its task may be anywhere; what it still says afterwards is stale.
                self.swaps.pop(attempt, None)
            case Drain(name, attempt, _):
                self.drains.add((name, attempt))

    # ---- the laws ---------------------------------------------------------------------------

    def check(self) -> None:
        """What holds in every world, whatever happened before."""
        models = self.core._models
        for name, model in models.items():
            granted = {t for t, m in self.serving.items() if m == name}
            assert set(model.leases) == granted, "the scheduler counts exactly what is being served"
            assert set(model.waiting) == {t for t, m in self.waiting.items() if m == name}, "no waiter is lost (I5)"
            assert not model.leases or model.state in (State.READY, State.DRAINING), "leases need a live model (I1)"
            assert not (model.state is State.READY and model.waiting), "an open gate lets everybody in"
            assert (model.state in OCCUPIED) == (name in self.runs), "state and process agree"
            if model.state is State.DRAINING and not model.retiring:
                assert self.core._swap is not None, "a gate is closed for somebody (I9)"
                assert model in self.core._swap.victims
        if self.core._swap is not None:
            states = {victim.name: victim.state for victim in self.core._swap.victims}
            assert State.READY not in states.values(), "the gates of the victims are closed"
        tickets = set(self.core._where)
        assert tickets == set(self.waiting) | set(self.serving), "nobody who left is remembered (I9)"
        self._check_groups()
        self._check_progress()

    def _check_groups(self) -> None:
        for group in self.core._residency.groups:  # type: ignore[attr-defined]
            if group.swap:
                assert len(self.runs.keys() & set(group.members)) <= 1, "one member at a time (I4)"

    def _check_progress(self) -> None:
        core = self.core
        if core._swap is None and not core._closing:
            for claim in core._claims():
                if claim.state is State.STOPPED and claim.due <= core._now:
                    raise AssertionError(f"{claim.name} is overdue and has no turn (I11)")
        assert core.wake_at > core._now, "a time that has passed is acted on, not asked for again"
        if self.waiting and not self.swaps and not self.drains and not any(r.stopping for r in self.runs.values()):
            starting = any(not run.ready for run in self.runs.values())
            assert starting or core.wake_at < math.inf, "whoever waits, something will happen (I6)"

    # ---- identity -------------------------------------------------------------------------------

    def key(self) -> object:
        """The same for worlds that differ only in names of tickets and attempts, and in absolute time."""
        core, now = self.core, self.now
        tickets = {t: i for i, t in enumerate(sorted({*self.waiting, *self.serving}))}
        age = lambda t: min(now - t, MAX_WAIT + 1)  # noqa: E731
        swap = core._swap
        return (
            tuple(
                (
                    m.state,
                    tuple((tickets[t], age(at)) for t, at in m.waiting.items()),
                    tuple(sorted(tickets[t] for t in m.leases)),
                    age(m.idle_since) if m.state is State.READY and not m.leases else 0,
                    age(m.out_at) if m.waiting else 0,
                    m.retiring,
                    m.drained,
                    m.stuck,
                )
                for m in core._models.values()
            ),
            swap and (swap.target.name, tuple(v.name for v in swap.victims), swap.phase),
            tuple(sorted((n, r.ready, r.stopping, r.stuck) for n, r in self.runs.items())),
            tuple(
                (s.target, tuple(sorted(s.undrained)), tuple(map(self._runs_on, s.victims)))
                for s in self.swaps.values()
            ),
            tuple(sorted((n, n in self.runs and self.runs[n].attempt == a) for n, a in self.drains)),
            core._closing,
        )


def make_world(
    groups: tuple[GroupConfig, ...],
    limits: Limits | None = None,
    *,
    ttl: float | None = TTL,
    scheduler: Callable[..., Scheduler] = Scheduler,
) -> World:
    """A world at rest."""
    names = [member for group in groups for member in group.members]
    policies: Mapping[str, Policy] = {name: Policy(MAX_WAIT, ttl) for name in names}
    return World(scheduler(policies, Groups(groups)), limits or Limits())


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
        for name in world.core._models
        for news in (
            Drained(name, -1),
            BecameReady(name, -1),
            Ended(name, -1),
            Died(name, -1),
            GotStuck(name, -1),
            Cleared(-1),
        )
    ]
