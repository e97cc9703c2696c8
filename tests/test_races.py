"""The shell under thousands of seeded schedules, the invariants checked after every single task step.

A seed decides everything: the groups or the memory there is, who arrives when and with which
weight, how long it stays, who leaves early, crashes, failing starts, starts that run out of
memory, unkillable processes, unloads, memory that is lent, the time to live, the shutdown, how
often a fake yields where the kernel would make real code wait, and in which order Trio runs
tasks that are ready.  So any failure replays: `pytest -m races --race-seed N --race-count 1`.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress

import attrs
import pytest
import trio
from fakes import Script, make_group
from sim_mutants import (
    budget_not_asked,
    lease_dropped_early,
    leaver_stays_in_line,
    token_given_back_early,
    tracker_forgets,
)
from trio.testing import MockClock

from trioswap import lent
from trioswap.config import GroupConfig
from trioswap.devices import RAM
from trioswap.errors import ModelError, ModelStuck, ShuttingDown
from trioswap.footprints import Footprints, Wish
from trioswap.group import SwapGroup
from trioswap.lifecycle import OCCUPIED, State
from trioswap.messages import Ended
from trioswap.residency import NOTHING, Holding
from trioswap.residency.budget import Budget
from trioswap.residency.groups import Groups
from trioswap.scheduler import Scheduler

pytestmark = pytest.mark.races

CLIENTS = 14
# Longest load, stop and hold below, max_wait, and the drain: nobody waits longer than all of them in a row.
PATIENCE = 3000.0


@attrs.frozen
class World:
    """Who may be resident beside whom."""

    groups: tuple[GroupConfig, ...] = ()
    sizes: Holding = NOTHING
    """Memory of each device; without any it is not counted."""
    wishes: Mapping[str, Wish] = attrs.field(factory=dict)

    def budget(self) -> Budget | None:
        """A fresh one: it learns."""
        return Budget(self.sizes, Footprints(tuple(self.sizes), self.wishes)) if self.sizes else None


WORLDS = [
    World((GroupConfig("(default)", ("a", "b")),)),
    World((GroupConfig("(default)", ("a", "b", "c")),)),
    World((GroupConfig("big", ("a",)), GroupConfig("pair", ("b", "c"), swap=False, exclusive=False))),
    World((GroupConfig("swap", ("a", "b")), GroupConfig("stays", ("c",), exclusive=False, persistent=True))),
    # Two of three fit, but not every two.
    World(sizes={RAM: 10}, wishes={"a": Wish(4), "b": Wish(6), "c": Wish(5)}),
    # A choice of GPUs, a table by device, and one of which nothing is known.
    World(
        sizes={"gpu0": 10, "gpu1": 8, RAM: 16},
        wishes={"a": Wish(6), "b": Wish(6), "c": Wish({"gpu0": 4, RAM: 9}), "d": Wish()},
    ),
    World(
        (GroupConfig("swap", ("a", "b")),),
        sizes={"gpu0": 12, RAM: 8},
        wishes={"a": Wish(5), "b": Wish(4), "c": Wish(6), "d": Wish(3, RAM)},
    ),
]


@attrs.define(eq=False)
class Race(trio.abc.Instrument):
    """One seeded run, watched after every step."""

    seed: int
    rng: random.Random = attrs.field(init=False)
    world: World = attrs.field(init=False)
    budget: Budget | None = attrs.field(init=False)
    names: list[str] = attrs.field(init=False)
    """The models; what memory is lent for has other names."""
    group: SwapGroup = attrs.field(init=False)
    script: Script = attrs.field(init=False)
    outcomes: Counter[str] = attrs.field(factory=Counter, init=False)
    closing: bool = attrs.field(default=False, init=False)
    broken: BaseException | None = attrs.field(default=None, init=False)
    scope: trio.CancelScope = attrs.field(init=False)
    """Ends the race when a law is broken: a broken one need not end by itself."""
    numbers: Iterator[int] = attrs.field(factory=itertools.count, init=False)

    def __attrs_post_init__(self) -> None:
        self.rng = random.Random(self.seed)

    async def main(self) -> None:
        """Everything that happens in this race."""
        rng = self.rng
        self.script = Script(
            load=rng.uniform(0, 10), stop=rng.uniform(0, 5), sweep=rng.choice([0, 8]), rng=rng, on_spawn=self._on_spawn
        )
        self.world = rng.choice(WORLDS)
        self.budget = self.world.budget()
        self.group = make_group(
            self.script,
            *self.world.groups,
            budget=self.budget,
            max_wait=rng.choice([0.0, 5.0, 60.0]),
            turn_lease=rng.choice([0.0, 1.0, 4.0]),
            parallel=rng.choice([1, 3, 10]),
            ttl=rng.choice([None, 0.5, 20.0]),
            drain_timeout=rng.choice([None, 3.0]),
            unload_drain_timeout=rng.choice([0.5, 30.0]),
        )
        self.names = sorted(self.group.models)
        trio.lowlevel.add_instrument(self)
        async with trio.open_nursery() as nursery:
            self.scope = nursery.cancel_scope
            await nursery.start(self.group.run)
            with trio.fail_after(PATIENCE):
                async with trio.open_nursery() as clients:
                    for _ in range(CLIENTS):
                        clients.start_soon(self._client)
                    for _ in range(rng.randrange(4)):
                        clients.start_soon(self._troublemaker)
            await self._shut_down()
        trio.lowlevel.remove_instrument(self)

    async def _client(self) -> None:
        """Arrive, hold a lease for a while, perhaps leave early: exactly one outcome."""
        rng = self.rng
        await trio.sleep(rng.uniform(0, 60))
        model = rng.choice(self.names)
        patience = rng.choice([PATIENCE, PATIENCE, rng.uniform(0, 40)])
        seconds, weight = rng.choice([0, 0.1, rng.uniform(0, 30)]), rng.choice([None, None, 0.2, 3.0])
        with trio.move_on_after(patience) as gone:
            self.outcomes[await self._use(model, seconds, weight)] += 1
        if gone.cancelled_caught:
            self.outcomes["left"] += 1

    async def _use(self, model: str, seconds: float, weight: float | None = None) -> str:
        try:
            async with self.group.lease(model, weight) as lease:
                await self.script.dither()  # between "decided" and "forwarded"
                await trio.sleep(seconds)
                process = self.script.alive.get(model)
                if process is not None and process.attempt == lease.attempt and not process._crash.is_set():
                    assert lease.upstream.answer() == model, "a foreign answer"
                    lease.answered(200)
                return "served"
        except (ModelError, ShuttingDown) as exc:
            return type(exc).__name__

    async def _troublemaker(self) -> None:
        """Crash, unload, borrow memory, make starts fail or processes unkillable, once, at some time."""
        rng = self.rng
        await trio.sleep(rng.uniform(0, 70))
        match rng.randrange(6):
            case 0:
                for process in list(self.script.alive.values()):
                    process.crash()
            case 1:
                with trio.move_on_after(rng.choice([PATIENCE, 1.0])), suppress(ModelStuck):
                    await self.group.unload(tuple(rng.sample(self.names, 1 + rng.randrange(2))))
            case 2:
                self.script.fails = True
                await trio.sleep(rng.uniform(0, 20))
                self.script.fails = False
            case 3:
                self.script.stays_stuck = True
                await trio.sleep(rng.uniform(0, 20))
                self.script.stays_stuck = False
                for process in self.script.alive.values():
                    if process.stuck:
                        process.die_after_all()

            case 4:
                self.script.runs_out = True
                await trio.sleep(rng.uniform(0, 20))
                self.script.runs_out = False
            case 5 if self.budget is not None:
                await self._borrow(self.budget)

    async def _borrow(self, budget: Budget) -> None:
        """Hold memory for a while, wait for it in vain, or leave early."""
        rng = self.rng
        wish = rng.choice([Wish(3), Wish(7), Wish({RAM: 6}), Wish()])
        with trio.move_on_after(rng.choice([PATIENCE, rng.uniform(0, 40)])), suppress(ModelError, ShuttingDown):
            async with lent.hold(self.group, budget, f"lent{next(self.numbers)}", wish) as holding:
                self.outcomes["lent"] += 1
                assert holding, "something is lent"
                await trio.sleep(rng.uniform(0, 30))

    async def _shut_down(self) -> None:
        """Sometimes with a request on board; run() must end by itself, and soon."""
        async with trio.open_nursery() as nursery:
            if self.rng.random() < 0.5:
                nursery.start_soon(self._use, self.rng.choice(self.names), self.rng.uniform(0, 50))
                await trio.sleep(self.rng.uniform(0, 20))
            self.closing = True
            self.group.shutdown()

    def _on_spawn(self, name: str) -> None:
        """The group takes what is raised here for a failed start, so it is kept as well."""
        try:
            self._check_spawn(name)
        except AssertionError as exc:
            self._is_broken(exc)
            raise

    def _check_spawn(self, name: str) -> None:
        alive = self.script.alive
        assert not self.closing, "nothing starts after shutdown (I8)"
        assert name not in alive, f"two processes of {name} (I3)"
        assert Groups(self.world.groups).place(name, dict.fromkeys(alive, NOTHING)) is not None, (
            f"{name} beside {sorted(alive)} (I4)"
        )
        processes = [process.holding for process in alive.values()]
        self._check_fits([*processes, self.group._runs[name].holding], "the processes fit (I4)")

    def _check_fits(self, holdings: Iterable[Holding], law: str) -> None:
        total: Counter[str] = Counter()
        for holding in holdings:
            total.update(holding)
        assert all(size <= self.world.sizes[device] for device, size in total.items()), law

    # ---- after every step --------------------------------------------------------------------

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        """Trio's instruments swallow exceptions, so the first broken law is kept."""
        if self.broken is None:
            try:
                self._check()
            except BaseException as exc:
                self._is_broken(exc)

    def _is_broken(self, exc: BaseException) -> None:
        self.broken = self.broken or exc
        self.scope.cancel(reason="a law is broken")

    def _check(self) -> None:
        group, alive = self.group, self.script.alive
        core = group.core
        for model in core.models.values():
            process = alive.get(model.name)
            if model.leases:
                assert model.state in (State.READY, State.DRAINING), "leases need a live model (I1)"
                if model.name in self.names:
                    assert process is not None, "a model with leases has a process (I1)"
                    assert process.attempt == model.attempt, "and it is that of the present attempt (I2)"
            served = group.inflight._entries.get(model.attempt, {}).keys()
            if model.state in (State.READY, State.DRAINING):
                assert model.leases.keys() == served, "the scheduler counts what the tracker counts (I1)"
            if model.state is State.READY:
                assert not model.queue.count or not model.has_room, "an open gate lets in whom it can (I5)"
            if model.state is State.STOPPED:
                assert process is None, "stopped means gone (I7)"
        known = set(core._where)
        assert known <= group._answers.keys(), "nobody who left is remembered (I9)"
        waiting = {ticket for ticket, answer in group._answers.items() if not answer.given.is_set()}
        assert waiting <= known, "whoever waits is in the queue (I5)"
        assert group.limiter.borrowed_tokens <= group.limiter.total_tokens
        occupied = [model.holding for model in core.models.values() if model.state in OCCUPIED]
        assert len(occupied) <= group.limiter.total_tokens, "what is occupied fits (I4)"
        self._check_fits(occupied, "what is reserved fits (I4)")
        assert len(alive) <= group.limiter.borrowed_tokens, "a process holds its token (I7)"
        for model in core.models.values():
            if model.state is State.DRAINING and not model.retiring:
                assert core.plan.closed[model.name].is_claim, "a gate is closed for somebody (I9)"


def run_race(seed: int) -> Race:
    """Run one race to its end; raises whatever law was broken."""
    race = Race(seed)
    trio._core._run._r.seed(seed)
    try:
        trio.run(race.main, clock=MockClock(autojump_threshold=0))
    finally:
        if race.broken is not None:  # what came of it is of less interest
            raise race.broken
    assert not race.script.alive, "nothing is left when run() is over (I7)"
    assert sum(race.outcomes.values()) - race.outcomes["lent"] == CLIENTS, "everybody has exactly one outcome (I5)"
    assert not race.group.faults, "no scheduler broke"
    assert not race.group._answers
    assert not race.group._runs
    assert not race.group._gates
    assert not race.group.inflight._entries
    assert race.group.limiter.borrowed_tokens == 0
    assert sorted(race.group.models) == sorted(race.group.core.models) == race.names, "what was lent is forgotten"
    if race.budget is not None:
        assert sorted(race.budget.footprints.wishes) == race.names, "and so is what was wished for"
    return race


@pytest.fixture(autouse=True)
def _seeded_scheduling(monkeypatch):
    """Trio shuffles ready tasks by its own random numbers; with this switch the seed alone decides."""
    monkeypatch.setattr("trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING", True)


def test_seeded_schedules(request, capsys):
    """All invariants hold after every step of every race; every request has exactly one outcome."""
    first, count = request.config.getoption("--race-seed"), request.config.getoption("--race-count")
    outcomes: Counter[str] = Counter()
    for seed in range(first, first + count):
        try:
            outcomes += run_race(seed).outcomes
        except BaseException as exc:
            exc.add_note(f"replay: pytest -m races --race-seed {seed} --race-count 1")
            raise
    with capsys.disabled():
        print(f"\n{count} schedules from seed {first}: {dict(outcomes.most_common())}")

    assert outcomes["served"] > count


def test_a_seed_replays():
    """The same seed gives the same history to the last entry."""
    assert run_race(7).script.trace == run_race(7).script.trace


# ---- seeded bugs of the shell ------------------------------------------------------------------


def swap_does_not_wait_for_the_end(monkeypatch) -> None:
    """The scheduler is told that the victims have ended while they are still being stopped."""
    original = SwapGroup._swap

    async def hasty(self, swap, victims):
        for run in victims:
            self.feed(Ended(run.spec.name, run.attempt))
        await original(self, swap, victims)

    monkeypatch.setattr(SwapGroup, "_swap", hasty)


def room_is_free_before_it_is(monkeypatch) -> None:
    """Whoever is told to stop is not counted any more, so a newcomer starts beside it."""
    original = Budget.place

    def place(self, target, resident):
        return original(self, target, {name: held for name, held in resident.items() if name not in stopping})

    stopping = set[str]()
    begin, move = Scheduler._begin_stop, Scheduler._move

    def begin_stop(self, model):
        begin(self, model)
        stopping.add(model.name)

    def moved(self, model, event):
        move(self, model, event)
        stopping.discard(model.name)

    monkeypatch.setattr(Budget, "place", place)
    monkeypatch.setattr(Scheduler, "_begin_stop", begin_stop)
    monkeypatch.setattr(Scheduler, "_move", moved)


def shutdown_rejects_nobody(monkeypatch) -> None:
    """Who waits when the shutdown begins waits on, so its model is started again."""
    original = Scheduler._reject_all

    def reject_all(self, model, error):
        if not self._closing:
            original(self, model, error)

    monkeypatch.setattr(Scheduler, "_reject_all", reject_all)


def lender_forgets(monkeypatch) -> None:
    """Who borrowed memory and left stays in the books."""

    monkeypatch.setattr(SwapGroup, "forget", lambda self, name: None)


BUGS = {
    tracker_forgets: "the scheduler counts what the tracker counts",
    lease_dropped_early: "the scheduler counts what the tracker counts",
    swap_does_not_wait_for_the_end: "stopped means gone",
    leaver_stays_in_line: "nobody who left is remembered",
    budget_not_asked: "what is reserved fits",
    room_is_free_before_it_is: "what is reserved fits",
    token_given_back_early: "a process holds its token",
    shutdown_rejects_nobody: "nothing starts after shutdown",
    lender_forgets: "what was lent is forgotten",
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_seeded_bug_of_the_shell_is_caught(bug, monkeypatch):
    """Some schedule among the first hundred shows it, and the law that it breaks is the one that complains."""
    bug(monkeypatch)

    with pytest.raises(AssertionError, match=BUGS[bug]):
        run_races(100)


def run_races(count: int) -> None:
    for seed in range(count):
        run_race(seed)
