"""The scheduler by chance: up to six models, every kind of residency, all that can happen, laws after every step.

Small worlds are walked completely (`test_scheduler_walks`).  Here they are larger, costs are
really learned, and time is a float that goes on by any amount before any event.  A shell
keeps its own books of what it was told and judges each command by them.
"""

from __future__ import annotations

import math
from collections import deque

import attrs
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from trioswap.config import GroupConfig
from trioswap.config.matrix import read_matrix
from trioswap.config.mistakes import Mistakes
from trioswap.errors import ModelCrashed, ShuttingDown, StartFailed
from trioswap.footprints import Footprints, Wish
from trioswap.learning import GAPS, Costs
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
    Measured,
    OpenGate,
    Policy,
    Reject,
    Rules,
    ShutdownBegan,
    Squeezed,
    Start,
    Stop,
    Swap,
    UnloadAsked,
    WokeUp,
)
from trioswap.outlook import waiting
from trioswap.planning import Plan, make_plan
from trioswap.residency import Holding, Residency
from trioswap.residency.both import Both
from trioswap.residency.budget import Budget
from trioswap.residency.groups import Groups
from trioswap.residency.matrix import Matrix
from trioswap.scheduler import Scheduler

DEVICES = ("gpu0", "gpu1", "ram")
ROOM = {"gpu0": 10, "gpu1": 6, "ram": 12}
CALM = 6
"""So many ordinary events lie between two disturbances, or no model would ever live long enough to be swapped."""
SETTLED = 400  # events by which everybody is answered when nobody asks for more: a few for each waiter and model


# ---- what is drawn --------------------------------------------------------------------------------

some_policy = st.builds(
    Policy,
    max_wait=st.sampled_from([2.0, 0.0, 0.5, 10.0, math.inf]),
    ttl=st.sampled_from([None, 3.0, 0.0]),
    parallel=st.sampled_from([1, 2, 3]),
    weight=st.sampled_from([1.0, 0.25, 4.0]),
    priority=st.sampled_from([0, 1, -1]),
    turn_lease=st.sampled_from([4.0, 0.0, 1.0]),
    linger=st.sampled_from([1.0, 0.0]),
    backoff=st.sampled_from([1.0, 0.0]),
    backoff_max=st.sampled_from([60.0, 2.0]),
    yields=st.sampled_from([True] * 11 + [False]),
)
some_rules = st.builds(Rules, parallel_loads=st.sampled_from([1, 2, math.inf])) | st.just(
    Rules(math.inf, by_arrival=True)
)
some_gaps = st.sampled_from([(), (1.0,) * 4, (0.5, 3.0, 3.0, 30.0)])
some_bytes = st.integers(1, 7)
some_holding = st.dictionaries(st.sampled_from(DEVICES), some_bytes, min_size=1, max_size=2)
some_wish = st.one_of(
    st.builds(Wish, declared=some_bytes | some_holding),
    st.builds(Wish, declared=some_bytes, device=st.sampled_from(DEVICES)),
    st.builds(Wish, estimate=some_bytes),
    st.just(Wish()),
)
MATRICES = (
    {"s": "a & b | c & d"},
    {"s": "a & (b | c | d)", "t": "e & f & (a | b)"},
    {"s": "(a | b) & (c | d) & (e | f)"},
    {"s": "a & b & c", "t": "+s & d | e"},
)
GROUPS = (
    (GroupConfig("all", tuple("abcdef")),),
    (GroupConfig("one", ("a", "b", "c")), GroupConfig("two", ("d", "e"))),
    (
        GroupConfig("one", ("a", "b"), exclusive=False),
        GroupConfig("two", ("c", "d"), swap=False),
        GroupConfig("three", ("e", "f"), persistent=True),
    ),
    (GroupConfig("one", ("a", "b"), persistent=True, exclusive=False), GroupConfig("two", ("c", "d", "e"))),
)
pauses = st.sampled_from([0.0, 0.0, 0.1, 0.7, 3.0]) | st.floats(0, 20)
weights = st.sampled_from([None, None, 0.25, 1.0, 4.0])
picks = st.integers(0, 60)
"""Which of those that come into question; counted round."""


def written(kind: int) -> Residency:
    """The rules numbered so, groups first."""
    if kind < len(GROUPS):
        return Groups(GROUPS[kind])
    mistakes = Mistakes()
    config = read_matrix({}, {"b": 3, "e": 2}, MATRICES[kind - len(GROUPS)], "abcdef", mistakes)
    assert mistakes.lines() == []
    return Matrix(config)


# ---- what the shell knows ---------------------------------------------------------------------------


@attrs.define(eq=False)
class Run:
    """The supervised task of an attempt."""

    name: str
    attempt: int
    ready: bool = False
    stopping: bool = False
    stuck: bool = False
    gate: bool = False
    """Closed: somebody waits for it to run dry."""
    cut: bool = False
    """It was reported as drained."""


def disturbs(condition=lambda self: True):
    """A rule that is only followed after some calm."""
    return precondition(lambda self: self.calm >= CALM and condition(self))


class Shell(RuleBasedStateMachine):
    """A scheduler, and a shell that does what it is told, in any order and after any time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.tickets = 0
        self.waiting: dict[int, str] = {}
        self.serving: dict[int, str] = {}
        self.gone: list[int] = []
        """Tickets that the scheduler has reason to have forgotten."""
        self.runs: dict[str, Run] = {}
        self.past: list[Run] = []
        self.again: set[str] = set()
        """Those whose start ran out of memory, and is tried once more."""
        self.closing = False
        self.calm = 0
        """Events since the last disturbance."""

    @initialize(
        names=st.integers(2, 6),
        policies=st.lists(some_policy, min_size=6, max_size=6),
        rules=some_rules,
        gaps=some_gaps,
        kind=st.none() | st.integers(0, len(GROUPS) + len(MATRICES) - 1),
        wishes=st.none() | st.lists(some_wish, min_size=6, max_size=6),
    )
    def begin(self, names, policies, rules, gaps, kind, wishes):
        models = "abcdef"[:names]
        self.budget = None
        if wishes is not None or kind is None:
            known = dict(zip(models, wishes or [Wish(declared=5)] * 6, strict=False))
            self.budget = Budget(ROOM, Footprints(DEVICES, known))
        residency = self.budget if kind is None else written(kind)
        if kind is not None and self.budget is not None:
            residency = Both(residency, self.budget, frozenset(models))
        if rules.by_arrival:  # llama-swap's line comes with nothing else (`arrangement.policy_of`), but for loans
            plain = {"max_wait": math.inf, "turn_lease": 0.0, "linger": 0.0}
            policies = [attrs.evolve(policy, **plain) if policy.yields else policy for policy in policies]
        known_policies = dict(zip(models, policies, strict=False))
        costs = {name: Costs(gaps=deque(gaps, GAPS)) for name in models}
        self.core = Scheduler(known_policies, residency, rules=rules, costs=costs, budget=self.budget)

    # ---- what happens -----------------------------------------------------------------------------

    @rule(pause=pauses, some=st.lists(picks, min_size=1, max_size=4), weight=weights)
    def ask(self, pause, some, weight):
        self.now += pause
        for pick in some:
            self.tickets += 1
            name = pick_of(self.core.models, pick)
            self.waiting[self.tickets] = name
            self.tell(Arrived(self.tickets, name, weight))

    @precondition(lambda self: self.waiting)
    @rule(pause=pauses, pick=picks)
    def loses_patience(self, pause, pick):
        ticket = pick_of(self.waiting, pick)
        del self.waiting[ticket]
        self.gone.append(ticket)
        self.tell(Left(ticket), pause)

    @precondition(lambda self: self.serving)
    @rule(pause=pauses, pick=picks, more=st.booleans())
    def is_served(self, pause, pick, more):
        """All that one model serves, or one of it."""
        name = self.serving[pick_of(self.serving, pick)]
        self.now += pause
        for ticket in [ticket for ticket, model in self.serving.items() if model == name][: None if more else 1]:
            if self.serving.pop(ticket, None):
                self.tell(Left(ticket))

    @precondition(lambda self: any(run.stopping or not run.ready for run in self.runs.values()))
    @rule(pause=pauses, pick=picks)
    def one_is_done(self, pause, pick):
        self.done(pick_of([run for run in self.runs.values() if run.stopping or not run.ready], pick), pause)

    @precondition(lambda self: any(run.gate for run in self.runs.values()))
    @rule(pause=pauses, pick=picks)
    def is_cut(self, pause, pick):
        """The drain deadline came, or nothing is left; those who were cut may be seen to leave later."""
        run = pick_of([run for run in self.runs.values() if run.gate], pick)
        run.cut = True
        self.tell(Drained(run.name, run.attempt), pause)

    @rule(pause=st.none() | pauses)
    def time_passes(self, pause):
        """As much as was asked for, or any."""
        asked = self.core.wake_at - self.now
        self.tell(WokeUp(), asked if pause is None and asked < math.inf else pause or 0.0)

    @precondition(lambda self: any(run.stopping or not run.ready for run in self.runs.values()))
    @rule(pause=pauses)
    def goes_on(self, pause):
        """Whatever is being loaded and stopped gets done."""
        for run in [run for run in self.runs.values() if not run.stuck and (run.stopping or not run.ready)]:
            self.done(run, pause)
            pause = 0.0

    # ---- what goes wrong --------------------------------------------------------------------------

    @disturbs(lambda self: self.loading())
    @rule(pause=pauses, pick=picks, out_of_memory=st.booleans())
    def fails_to_start(self, pause, pick, out_of_memory):
        run = pick_of(self.loading(), pick)
        waited = self.line(run.name)
        again = out_of_memory and self.budget is not None and run.name not in self.again
        commands = self.ends(run, pause, StartFailed(run.name, "it is broken", out_of_memory=out_of_memory))
        told = {c.ticket for c in commands if isinstance(c, Reject) and isinstance(c.error, StartFailed)}
        assert told == (set() if again else waited), "it is told to all who wait for it (I5), but tried once more"
        if again and self.line(run.name):
            self.again.add(run.name)

    @disturbs(lambda self: any(not run.stopping for run in self.runs.values()))
    @rule(pause=pauses, pick=picks, told=st.booleans())
    def crashes(self, pause, pick, told):
        run = pick_of([run for run in self.runs.values() if not run.stopping], pick)
        if run.ready and told:
            self.dies(run, Died(run.name, run.attempt), pause)
        else:
            self.ends(run, pause)

    @disturbs(lambda self: self.runs and not any(run.stuck for run in self.runs.values()))
    @rule(pause=pauses, pick=picks)
    def gets_stuck(self, pause, pick):
        """While it is stopped; or, rarely, it ended by itself and left something that does not."""
        stopping = [run for run in self.runs.values() if run.stopping]
        if not stopping and self.calm < 4 * CALM:
            return
        run = pick_of(stopping or self.runs.values(), pick)
        run.stuck = True
        self.dies(run, GotStuck(run.name, run.attempt), pause)

    @disturbs()
    @rule(pause=pauses, pick=picks)
    def is_unloaded(self, pause, pick):
        name = pick_of(self.core.models, pick)
        self.tell(UnloadAsked((name,)), pause)
        assert not self.line(name), "who waits for it is told at once (I5)"
        assert name not in self.runs or self.runs[name].stopping or self.core.models[name].retiring

    @disturbs(lambda self: self.budget is not None and self.runs)
    @rule(pause=pauses, pick=picks, peak=some_holding)
    def is_measured(self, pause, pick, peak):
        run = pick_of(self.runs.values(), pick)
        self.tell(Measured(run.name, run.attempt, peak), pause)

    @disturbs(lambda self: self.budget is not None)
    @rule(pause=pauses, taken=st.lists(st.integers(0, 6), min_size=3, max_size=3))
    def others_take_memory(self, pause, taken):
        sizes = {device: ROOM[device] - less for device, less in zip(DEVICES, taken, strict=True)}
        self.tell(Squeezed(sizes), pause)

    @disturbs(lambda self: self.calm > 8 * CALM)
    @rule(pause=pauses)
    def shuts_down(self, pause):
        self.closing = True
        self.tell(ShutdownBegan(), pause)
        assert not self.waiting, "who waits is told (I5)"

    @disturbs(lambda self: self.past)
    @rule(pick=picks)
    def old_news_come(self, pick):
        """What belongs to a run that is over, or to a request that is, changes nothing (I2)."""
        run = pick_of(self.past, pick)
        old = [news(run.name, run.attempt) for news in (Drained, BecameReady, Ended, Died, GotStuck)]
        old += [Measured(run.name, run.attempt, {"ram": 12}), Left(pick_of([*self.gone, -1], pick))]
        before = [*self.core.views(self.now), self.core.wake_at]
        for event in old:
            assert self.tell(event) == []
        assert [*self.core.views(self.now), self.core.wake_at] == before

    def done(self, run: Run, pause: float) -> None:
        """It is stopped, or ready."""
        if run.stopping:
            self.ends(run, pause)
        else:
            run.ready = True
            self.tell(BecameReady(run.name, run.attempt), pause)

    def ends(self, run: Run, pause: float, failure: StartFailed | None = None) -> list[Command]:
        self.forget(run.name)
        del self.runs[run.name]
        self.past.append(run)
        return self.tell(Ended(run.name, run.attempt, failure), pause)

    def dies(self, run: Run, event: Event, pause: float) -> None:
        self.forget(run.name)
        run.stopping, run.gate = True, False
        self.tell(event, pause)

    def forget(self, name: str) -> None:
        for ticket in [ticket for ticket, model in self.serving.items() if model == name]:
            del self.serving[ticket]
            self.gone.append(ticket)

    def loading(self) -> list[Run]:
        return [run for run in self.runs.values() if not run.ready and not run.stopping]

    def line(self, name: str) -> set[int]:
        return {ticket for ticket, model in self.waiting.items() if model == name}

    # ---- what is done about it ----------------------------------------------------------------------

    def tell(self, event: Event, pause: float = 0.0) -> list[Command]:
        self.now += pause
        usual = isinstance(event, Arrived | Left | BecameReady | WokeUp)
        self.calm = self.calm + 1 if usual else 0
        commands = self.core.handle(event, self.now)
        for command in commands:
            self.obey(command)
        self.again &= {*self.waiting.values()}
        return commands

    def obey(self, command: Command) -> None:
        match command:
            case Grant(ticket, name, attempt):
                self.grant(ticket, name, attempt)
            case Reject(ticket, error):
                del self.waiting[ticket]
                self.gone.append(ticket)
                assert self.closing or not isinstance(error, ShuttingDown)
                assert error.retry_after is None or error.retry_after >= 1
                if isinstance(error, StartFailed | ModelCrashed):
                    open_until = self.core.models[error.model].circuit.open_until
                    assert self.now + error.retry_after >= open_until, "who comes when it was told to is not refused"
            case Start(name, attempt, holding):
                self.start(name, attempt, holding)
            case Stop(name, attempt, _):
                self.stop(name, attempt)
            case Swap(target, evictions):
                assert target in self.waiting.values(), "nobody is put out for nobody (I9)"
                for eviction in evictions:
                    assert self.core.models[eviction.model].policy.yields, "who does not yield stays"
                    self.stop(eviction.model, eviction.attempt)
            case CloseGate(name, attempt, _, unload):
                run = self.present(name, attempt)
                assert unload or any(model != name for model in self.waiting.values()), (
                    "a gate closes for somebody (I9)"
                )
                run.gate, run.cut = True, False
            case OpenGate(name, attempt):
                run = self.present(name, attempt)
                assert run.gate
                run.gate = run.cut = False

    def present(self, name: str, attempt: int) -> Run:
        run = self.runs[name]
        assert run.attempt == attempt, "a command is for the present attempt (I2)"
        assert not run.stopping, "what is being stopped is left alone (I3)"
        return run

    def grant(self, ticket: int, name: str, attempt: int) -> None:
        run = self.present(name, attempt)
        assert run.ready, "a grant needs a ready model (I1)"
        assert not run.gate, "nobody passes a closed gate"
        assert self.waiting.pop(ticket) == name
        self.serving[ticket] = name
        self.again.discard(name)
        assert list(self.serving.values()).count(name) <= self.core.models[name].policy.parallel

    def start(self, name: str, attempt: int, holding: Holding) -> None:
        models = self.core.models
        assert not self.closing, "no start after shutdown (I8)"
        assert self.line(name), "no load for nobody (I9)"
        assert name not in self.runs, "one process for a model (I3)"
        others = {other: models[other].holding for other in self.runs}
        assert self.core.residency.place(name, others) is not None, f"{name} starts beside {sorted(others)} (I4)"
        if self.budget is not None:
            over = self.budget.overcommitted({**others, name: holding})
            assert not over.keys() & holding.keys(), "what it takes is there (I4)"
        self.runs[name] = Run(name, attempt)
        assert len(self.loading()) <= self.core.rules.parallel_loads, "no more load at a time than may"

    def stop(self, name: str, attempt: int) -> None:
        run = self.present(name, attempt)
        assert run.cut or name not in self.serving.values(), "nobody is served by what is stopped (I1)"
        self.forget(name)
        run.stopping, run.gate = True, False

    # ---- the laws ---------------------------------------------------------------------------------------

    @invariant()
    def books_agree(self):
        for name, model in self.core.models.items():
            served = {ticket for ticket, served_by in self.serving.items() if served_by == name}
            run = self.runs.get(name)
            assert set(model.leases) == served, "exactly what is served holds a lease (I1)"
            assert list(model.queue) == sorted(self.line(name)), "every waiter is known, once (I5)"
            assert not served or model.state in (State.READY, State.DRAINING), "leases need a live model (I1)"
            assert (model.state in OCCUPIED) == (run is not None)
            assert run is None or run.attempt == model.attempt
            assert run is None or run.gate == (model.state is State.DRAINING), "the shell drains what is draining"
            ending = model.state in (State.DRAINING, State.STOPPING)
            assert ending or not (model.retiring or model.drained), "what was said of a turn ends with it"
            failing = self.now < model.circuit.open_until
            assert not (failing and (self.line(name) or model.state not in (State.STOPPED, State.STOPPING))), (
                "who has just failed is not tried, and nobody waits for it"
            )
            assert model.stuck == (run is not None and run.stuck)
            assert not (model.state is State.READY and model.has_room and model.queue.count), "an open gate lets in"
        shown = [view.ticket for view in waiting(self.core.models, self.core.plan, self.core.residency, self.now)]
        assert sorted(shown) == sorted(self.waiting), "whoever waits is shown, once"

    @invariant()
    def nothing_was_missed(self):
        """A plan made now would change nothing, nor would one at any time before it is asked for."""
        expiry = min(model.expires for model in self.core.models.values())
        assert self.now < self.core.wake_at <= expiry, "a time that has passed is acted on, not asked for again"
        at, looks = self.now, 0
        while at < self.core.wake_at and looks < 5:
            plan = self.fresh_plan(at)
            assert not plan.hopeless, "who can never be served is told at once (I6)"
            assert not plan.start, f"it starts at {at}"
            assert not plan.swap, f"it is put out at {at}"
            # Two claims may each have closed a gate of which one would do now; the next event opens the other.
            shut = {m.name for m in self.core.models.values() if m.state is State.DRAINING and not m.retiring}
            assert plan.closed.keys() <= shut, f"a gate closes at {at}"
            assert plan.closed.keys() == shut or len(plan.order) > 1, f"a gate opens at {at}"
            at, looks = plan.wake_at, looks + 1

    @invariant()
    def something_will_happen(self):
        if not self.waiting or self.serving:
            return
        moves = any(run.stopping or run.gate or not run.ready for run in self.runs.values())
        assert moves or self.core.wake_at < math.inf, "whoever waits, something will happen (I6)"

    def fresh_plan(self, at: float) -> Plan:
        claims = [model for model in self.core.models.values() if model.is_claim]
        occupied = [model for model in self.core.models.values() if model.state in OCCUPIED]
        return make_plan(claims, occupied, self.core.residency, self.core.rules, at)

    def teardown(self):
        """When nobody asks for more, and what was begun is done, everybody is answered (I6, I11)."""
        if not hasattr(self, "core"):
            return
        for _ in range(SETTLED):
            if not self.waiting:
                return
            self.settle()
            self.books_agree()
            self.nothing_was_missed()
        raise AssertionError(f"somebody waits for ever: {self.core}")

    def settle(self) -> None:
        """What comes next without anybody's doing."""
        busy = [run for run in self.runs.values() if run.stopping or not run.ready]
        if self.serving:
            self.is_served(0.5, 0, True)
        elif busy:
            self.done(busy[0], 0.5)
        elif retiring := [run for run in self.runs.values() if run.gate and self.core.models[run.name].retiring]:
            self.tell(Drained(retiring[0].name, retiring[0].attempt), 0.5)  # an empty one that was draining already
        else:
            assert self.core.wake_at < math.inf, f"whoever waits, something will happen (I6): {self.core}"
            self.time_passes(None)


def pick_of(some, pick: int):
    """One of *some*."""
    some = list(some)
    return some[pick % len(some)]


TestShell = Shell.TestCase
TestShell.settings = settings(
    max_examples=300,
    stateful_step_count=50,
    derandomize=True,
    report_multiple_bugs=False,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
