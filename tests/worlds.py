"""Small worlds around the scheduler: what may happen next, and what the shell makes of the commands.

A `World` is the scheduler plus an abstract shell: the runs and closed gates that the
scheduler's commands have set going.  `enabled` lists every event that may come next,
`step` feeds one and checks the laws (`laws`).  `walks` visits every world that can be reached.

What the scheduler learns is fixed in a world that is walked (a load takes one unit of time),
or none would ever be seen twice.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence

import attrs
import laws

from trioswap.circuit import Circuit
from trioswap.errors import StartFailed
from trioswap.footprints import Footprints, Wish
from trioswap.learning import Average, Costs
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
    Measured,
    OpenGate,
    Policy,
    Reject,
    RetireAsked,
    Rules,
    ShutdownBegan,
    Squeezed,
    Start,
    Stop,
    Swap,
    UnloadAsked,
    WokeUp,
)
from trioswap.planning import Plan
from trioswap.residency import Holding, Residency
from trioswap.residency.both import Both
from trioswap.residency.budget import Budget
from trioswap.scheduler import Scheduler
from trioswap.turns import Model, Queue

MAX_WAIT = 2  # units of time; enough to be before, at and after the limit
TTL = 2
UNLOAD = ""
"""For whom a gate is closed that is closed for good."""


class Known(Average):
    """A cost that no measurement changes."""

    def add(self, sample: float) -> None:
        pass


class Habit(deque[float]):
    """Gaps that no arrival changes."""

    def append(self, gap: float) -> None:
        pass


class Attempts:
    """1, 2, 3, ...: `itertools.count`, but with a copy that goes on by itself."""

    def __init__(self) -> None:
        self.last = 0

    def __next__(self) -> int:
        self.last += 1
        return self.last

    def __iter__(self) -> Iterator[int]:
        return self


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
    ready_at: float = 0


@attrs.frozen
class Limits:
    """What keeps a world small."""

    tickets: int = 2
    """Requests alive at the same time."""
    weights: tuple[float, ...] = (1.0,)
    asked: str = ""
    """The models that are asked for, one letter each; empty: all."""
    leaves: bool = True
    """Who waits may lose patience."""
    crashes: bool = True
    failing: str = ""
    """The models that crash, one letter each; empty: all."""
    unloads: bool = True
    shutdown: bool = True
    retires: bool = False
    """Reloads replace models and remove them."""
    stuck: bool = False
    cuts: bool = True
    """Drain deadlines that cut what is being served."""
    passing: bool = True
    """Time passes."""
    ooms: int = 0
    """Starts that fail for want of memory."""
    peaks: tuple[Holding, ...] = ()
    """What a server may be measured to use."""
    squeezes: tuple[Holding, ...] = ()
    """What other programs may leave."""
    turns: bool = False
    """Nobody has two turns while another waits: where one is resident, and all weigh the same."""

    @property
    def static(self) -> bool:
        """Whether what a model needs, and what there is, stays what it was."""
        return not (self.ooms or self.peaks or self.squeezes)

    @property
    def horizon(self) -> float:
        """Of two ages beyond this, none is more: everybody is overdue against everybody."""
        return MAX_WAIT * max(self.weights) / min(self.weights) + 1


@attrs.define
class World:
    """A scheduler and everything its commands have set going."""

    core: Scheduler
    limits: Limits
    now: float = 0
    next_ticket: int = 1
    waiting: dict[int, str] = attrs.field(factory=dict)
    serving: dict[int, str] = attrs.field(factory=dict)
    cut: dict[int, str] = attrs.field(factory=dict)
    """Were served, and were told by a drain deadline to end."""
    runs: dict[str, FakeRun] = attrs.field(factory=dict)
    gates: dict[tuple[str, int], str] = attrs.field(factory=dict)
    """Closed gates: model and attempt -> for which claim."""
    drains: set[tuple[str, int]] = attrs.field(factory=set)
    """Of these the ones that somebody watches, until `Drained`."""
    closing: bool = False
    ooms: int = 0
    again: dict[str, Holding] = attrs.field(factory=dict)
    """Who is started once more after running out of memory, and what it had."""
    failures: dict[str, tuple[int, float]] = attrs.field(factory=dict)
    """Who failed: how often in a row, and until when nobody may try it."""
    turns: dict[str, tuple[float, frozenset[str]]] = attrs.field(factory=dict)
    """claim -> since when it waits, and who had a turn since then."""
    history: tuple[object, ...] = attrs.field(default=(), repr=False)
    """The last event, and the history before it."""

    # ---- what may happen next ----------------------------------------------------------

    def enabled(self) -> Iterator[Event | str]:
        """Every event that may come next; "pass" is a unit of time."""
        yield from self.helpful()
        if len(self.waiting) + len(self.serving) + len(self.cut) < self.limits.tickets:
            for name in self.limits.asked or self.core.models:
                for weight in self.limits.weights:
                    yield Arrived(self.next_ticket, name, weight)
        for ticket in [*(self.waiting if self.limits.leaves else ()), *self.serving]:
            yield Left(ticket)
        for name, run in self.runs.items():
            yield from self._troubles(name, run)
        if not self.closing:
            yield from (UnloadAsked((name,)) for name in self.core.models if self.limits.unloads)
            if self.limits.retires:
                yield from (RetireAsked((name,)) for name in self.core.models)
                yield from (RetireAsked((), (name,)) for name in self.core.models)
            yield from [ShutdownBegan()] if self.limits.shutdown else []
        yield from (Squeezed(sizes) for sizes in self.limits.squeezes)
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
        yield from map(Left, self.cut)

    def _troubles(self, name: str, run: FakeRun) -> Iterator[Event]:
        limits = self.limits
        if limits.crashes and not run.stopping and name in (limits.failing or name):
            yield Ended(name, run.attempt, None if run.ready else StartFailed(name, "crash"))
            if run.ready:
                yield Died(name, run.attempt)
        if self.ooms < limits.ooms and not run.ready and not run.stopping:
            yield Ended(name, run.attempt, StartFailed(name, "no memory", out_of_memory=True))
        if limits.stuck and not run.stuck:
            yield GotStuck(name, run.attempt)
        for peak in limits.peaks:
            if not run.stopping:
                yield Measured(name, run.attempt, peak)

    # ---- one step -------------------------------------------------------------------------

    def advance(self, seconds: float) -> list[Command]:
        """Let time pass; wake the scheduler if it wants to be."""
        self.now += seconds
        if self.core.wake_at <= self.now:
            return self._step(WokeUp())
        laws.check(self)
        return []

    def step(self, event: Event | str) -> list[Command]:
        """Feed *event*, do what the scheduler says, check the laws.

        Raises:
            laws.LawBroken: with the whole history as a note.
        """
        self.history = (event, self.history)
        try:
            return self.advance(1) if isinstance(event, str) else self._step(event)
        except laws.LawBroken as broken:
            if not hasattr(broken, "__notes__"):
                broken.add_note("\n".join(map(str, self.replay())))
            raise

    def _step(self, event: Event) -> list[Command]:
        gates = dict(self.gates)
        told = laws.Told(self, event)
        self._happen(event)
        commands = self.core.handle(event, float(self.now))
        for command in commands:
            self._obey(command, event)
        closed = self.core.plan.closed
        self.gates = {
            (m, a): closed[m].name if claim and m in closed else claim for (m, a), claim in self.gates.items()
        }
        told.check(commands, gates)
        laws.check(self)
        return commands

    def _happen(self, event: Event) -> None:  # noqa: C901 - one case for each event
        match event:
            case Arrived(ticket, name):
                self.waiting[ticket] = name
                self.next_ticket += 1
            case Left(ticket):
                if ticket in self.serving:
                    self.failures.pop(self.serving[ticket], None)
                for tickets in (self.waiting, self.serving, self.cut):
                    tickets.pop(ticket, None)
            case Drained(name, attempt):
                # Either nothing was in flight, or the deadline has cut what was, and that is not over yet.
                self.drains.discard((name, attempt))
                if name in self.runs and self.runs[name].attempt == attempt:
                    for ticket in [t for t, m in self.serving.items() if m == name]:
                        self.cut[ticket] = self.serving.pop(ticket)
            case BecameReady(name, _):
                self.runs[name].ready = True
                self.runs[name].ready_at = self.now
                laws.turn_begins(self, name)
            case Died(name, _) | GotStuck(name, _):
                if isinstance(event, Died):
                    laws.fails(self, name)
                self.runs[name].stopping = True
                self.runs[name].stuck = isinstance(event, GotStuck)
                self._forget(name)
            case Ended(name, attempt, failure):
                if not self.runs[name].stopping and (failure is not None or self.runs[name].ready):
                    laws.fails(self, name)
                assert self.runs.pop(name).attempt == attempt
                self.ooms += failure is not None and failure.out_of_memory
                self._forget(name)
            case UnloadAsked(names):
                for name in names:
                    self.failures.pop(name, None)
            case RetireAsked(replaced, removed):
                for name in (*replaced, *removed):
                    if not self.core.models[name].retiring:
                        self.failures.pop(name, None)
            case ShutdownBegan():
                self.closing = True
                self.failures.clear()

    def _forget(self, name: str) -> None:
        self.gates = {(m, attempt): claim for (m, attempt), claim in self.gates.items() if m != name}
        self.drains &= set(self.gates)
        for tickets in (self.serving, self.cut):
            for ticket in [t for t, m in tickets.items() if m == name]:
                del tickets[ticket]

    def _obey(self, command: Command, event: Event) -> None:
        match command:
            case Grant(ticket, name, attempt):
                laws.on_grant(self, ticket, name, attempt)
                self.serving[ticket] = self.waiting.pop(ticket)
            case Reject(ticket, error):
                laws.on_reject(self, ticket, error, event)
                del self.waiting[ticket]
            case Start(name, attempt, holding):
                laws.on_start(self, name, holding)
                laws.on_trial(self, name)
                self.runs[name] = FakeRun(attempt, holding)
            case Stop(name, attempt, _):
                laws.on_stop(self, name, event)
                self._end(name, attempt)
            case Swap(target, evictions):
                laws.on_swap(self, target, [eviction.model for eviction in evictions])
                laws.on_trial(self, target)
                for eviction in evictions:
                    self._end(eviction.model, eviction.attempt)
            case CloseGate(name, attempt, _, unload):
                laws.on_close(self, name, attempt, unload)
                laws.on_trial(self, UNLOAD if unload else self.core.plan.closed[name].name)
                self.drains.add((name, attempt))
                self.gates[name, attempt] = UNLOAD if unload else self.core.plan.closed[name].name
            case OpenGate(name, attempt):
                laws.on_open(self, name, attempt)
                self.gates.pop((name, attempt), None)
                self.drains &= set(self.gates)

    def _end(self, name: str, attempt: int) -> None:
        laws.on_end(self, name, attempt)
        self.runs[name].stopping = True
        self._forget(name)

    # ---- what others may ask ----------------------------------------------------------------

    @property
    def budget(self) -> Budget | None:
        """What of the residency is about memory."""
        return self.core._budget

    def claims(self) -> list[Model]:
        """Whoever is kept from its waiters."""
        return [model for model in self.core.models.values() if model.is_claim]

    def fork(self) -> World:
        """A copy that goes its own way."""
        fixed = [self.core.residency, self.budget] if self.limits.static else []
        return copied(self, {id(thing): thing for thing in fixed})

    def replay(self) -> list[object]:
        """All events so far, the first one first."""
        events, rest = list[object](), self.history
        while rest:
            event, rest = rest
            events.append(event)
        return events[::-1]

    # ---- identity -------------------------------------------------------------------------------

    def key(self) -> object:
        """The same for worlds that differ only in names of tickets and attempts, and in absolute time."""
        living = sorted({*self.waiting, *self.serving, *self.cut})
        tickets = {ticket: i for i, ticket in enumerate(living)}
        budget = self.budget
        # Of credits only the order matters, almost; they themselves grow for ever.
        values = {self.core._floor, *(model.credit for model in self.core.models.values() if model.holding)}
        ranks = {credit: i for i, credit in enumerate(sorted(values))}
        return (
            tuple(self._key_of(model, tickets, ranks) for model in self.core.models.values()),
            tuple(sorted((n, r.ready, r.stopping, r.stuck) for n, r in self.runs.items())),
            tuple(sorted((n, claim, (n, attempt) in self.drains) for (n, attempt), claim in self.gates.items())),
            tuple(tickets[t] for t in self.cut),
            tuple(sorted(self.again)),
            tuple((m.name, *sorted(self.turns[m.name][1])) for m in self.claims() if m.name in self.turns),
            self.closing,
            self.ooms,
            repr((sorted(budget.sizes.items()), sorted(budget.footprints._learned.items()))) if budget else 0,
        )

    def _key_of(self, model: Model, tickets: Mapping[int, int], ranks: Mapping[float, int]) -> object:
        def age(at: float) -> float:
            return min(self.now - at, self.limits.horizon)

        lines = model.queue.lines.items()
        return (
            model.state,
            tuple((w, tuple((tickets[t], age(at)) for t, at in line.items())) for w, line in lines),
            tuple(sorted((tickets[t], lease.weight) for t, lease in model.leases.items())),
            age(model.idle_since) if model.serves and not model.leases else 0,
            age(model.ready_at) if model.serves else 0,
            age(model.out_at) if len(model.queue) else 0,
            model.retiring, model.removed, model.drained, model.stuck, model.out_of_memory,
            # Beyond so many failures the delay grows no more.
            (min(model.circuit.failures, 4), model.circuit.retry_in(self.now)) if model.policy.backoff else 0,
            tuple(sorted(model.holding.items())), tuple(sorted(model.peak.items())),
            ranks.get(model.credit, 0) if model.holding else 0,
        )  # fmt: skip


# ---- copies -------------------------------------------------------------------------------------

# Whatever has a life of its own, and is not fixed in a world that is walked.  All else is shared.
_LIVING = (World, FakeRun, Scheduler, Model, Queue, Circuit, Plan, Budget, Footprints, Both, Attempts)


def copied(thing, memo):
    """`copy.deepcopy` of what can change, many times as fast."""
    kind = type(thing)
    if kind is dict:
        return {key: copied(value, memo) for key, value in thing.items()}
    if kind in (list, tuple):
        return kind([copied(value, memo) for value in thing])
    if kind is set:  # of what cannot change
        return set(thing)
    if kind in (int, float, str, bool) or not isinstance(thing, _LIVING):
        return thing
    if id(thing) not in memo:
        memo[id(thing)] = new = kind.__new__(kind)
        names = [a.name for a in attrs.fields(kind)] if attrs.has(kind) else vars(thing)
        for name in names:
            value = getattr(thing, name)
            object.__setattr__(new, name, value if name == "history" else copied(value, memo))
    return memo[id(thing)]


# ---- beginnings -----------------------------------------------------------------------------------


def make_world(
    residency: Residency,
    models: Sequence[str],
    limits: Limits | None = None,
    *,
    policy: Policy | None = None,
    policies: Mapping[str, Policy] | None = None,
    rules: Rules | None = None,
    gaps: Sequence[float] = (),
    scheduler: Callable[..., Scheduler] = Scheduler,
    budget: Budget | None = None,
    costs: Mapping[str, Costs] | None = None,
) -> World:
    """A world at rest; *policies* are those of single models that have not the common one."""
    each = dict.fromkeys(models, policy or Policy(MAX_WAIT, TTL, turn_lease=1.0, backoff=0.0)) | dict(policies or {})
    costs = costs or {name: known_costs(gaps) for name in models}
    core = scheduler(each, residency, Attempts(), rules=rules, costs=costs, budget=budget)
    return World(core, limits or Limits())


def make_budget(sizes: Mapping[str, int], needs: Mapping[str, Wish | int | Mapping[str, int] | None]) -> Budget:
    """A budget of *sizes*; each model with what it is declared to need, None: nobody knows."""
    wishes = {name: need if isinstance(need, Wish) else Wish(need) for name, need in needs.items()}
    return Budget(dict(sizes), Footprints(tuple(sizes), wishes))


def let(world: World, *events: Event | str) -> World:
    """*world* after *events*, which all may happen."""
    for event in events:
        world.step(event)
    return world


def bring_up(world: World, *names: str) -> World:
    """*world* after each of *names* was asked for and is ready, one after the other; they all are served."""
    for name in names:
        world.step(Arrived(world.next_ticket, name))
        for _ in itertools.takewhile(lambda _, name=name: not world.runs[name].ready, range(9)):
            world.step(BecameReady(name, world.runs[name].attempt))
    return world
