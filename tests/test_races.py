"""The shell under thousands of seeded schedules, the invariants checked after every single task step.

A seed decides everything: the groups, who arrives when, how long it stays, who leaves
early, crashes, failing starts, unkillable processes, unloads, the time to live, the
shutdown, how often a fake yields where the kernel would make real code wait, and in
which order Trio runs tasks that are ready.  So any failure replays: `pytest -m races --race-seed N --race-count 1`.
"""

from __future__ import annotations

import random
from collections import Counter
from contextlib import suppress

import attrs
import pytest
import trio
from fakes import Script, make_group
from trio.testing import MockClock

from trioswap.config import GroupConfig
from trioswap.errors import ModelError, ModelStuck, ShuttingDown
from trioswap.group import SwapGroup
from trioswap.inflight import InFlight
from trioswap.lifecycle import OCCUPIED, State
from trioswap.messages import Ended
from trioswap.residency import NOTHING
from trioswap.scheduler import Scheduler

pytestmark = pytest.mark.races

CLIENTS = 14
# Longest load, stop and hold below, max_wait, and the drain: nobody waits longer than all of them in a row.
PATIENCE = 3000.0

DOMAINS = [
    (GroupConfig("(default)", ("a", "b")),),
    (GroupConfig("(default)", ("a", "b", "c")),),
    (GroupConfig("big", ("a",)), GroupConfig("pair", ("b", "c"), swap=False, exclusive=False)),
    (GroupConfig("swap", ("a", "b")), GroupConfig("stays", ("c",), exclusive=False, persistent=True)),
]


@attrs.define(eq=False)
class Race(trio.abc.Instrument):
    """One seeded run, watched after every step."""

    seed: int
    rng: random.Random = attrs.field(init=False)
    group: SwapGroup = attrs.field(init=False)
    script: Script = attrs.field(init=False)
    outcomes: Counter[str] = attrs.field(factory=Counter, init=False)
    closing: bool = attrs.field(default=False, init=False)
    broken: BaseException | None = attrs.field(default=None, init=False)

    def __attrs_post_init__(self) -> None:
        self.rng = random.Random(self.seed)

    async def main(self) -> None:
        """Everything that happens in this race."""
        rng = self.rng
        self.script = Script(
            load=rng.uniform(0, 10), stop=rng.uniform(0, 5), sweep=rng.choice([0, 8]), rng=rng, on_spawn=self._on_spawn
        )
        self.group = make_group(
            self.script,
            *rng.choice(DOMAINS),
            max_wait=rng.choice([0.0, 5.0, 60.0]),
            turn_lease=rng.choice([0.0, 1.0, 4.0]),
            parallel=rng.choice([1, 3, 10]),
            ttl=rng.choice([None, 0.5, 20.0]),
            drain_timeout=rng.choice([None, 3.0]),
            unload_drain_timeout=rng.choice([0.5, 30.0]),
        )
        trio.lowlevel.add_instrument(self)
        async with trio.open_nursery() as nursery:
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
        model = rng.choice(sorted(self.group.models))
        patience = rng.choice([PATIENCE, PATIENCE, rng.uniform(0, 40)])
        with trio.move_on_after(patience) as gone:
            self.outcomes[await self._use(model, rng.choice([0, 0.1, rng.uniform(0, 30)]))] += 1
        if gone.cancelled_caught:
            self.outcomes["left"] += 1

    async def _use(self, model: str, seconds: float) -> str:
        try:
            async with self.group.lease(model) as lease:
                await self.script.dither()  # between "decided" and "forwarded"
                await trio.sleep(seconds)
                process = self.script.alive.get(model)
                if process is not None and process.attempt == lease.attempt and not process._crash.is_set():
                    assert lease.upstream.answer() == model, "a foreign answer"
                return "served"
        except (ModelError, ShuttingDown) as exc:
            return type(exc).__name__

    async def _troublemaker(self) -> None:
        """Crash, unload, make starts fail or processes unkillable, once, at some time."""
        rng = self.rng
        await trio.sleep(rng.uniform(0, 70))
        match rng.randrange(4):
            case 0:
                for process in list(self.script.alive.values()):
                    process.crash()
            case 1:
                with trio.move_on_after(rng.choice([PATIENCE, 1.0])), suppress(ModelStuck):
                    await self.group.unload(tuple(rng.sample(sorted(self.group.models), 1 + rng.randrange(2))))
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

    async def _shut_down(self) -> None:
        """Sometimes with a request on board; run() must end by itself, and soon."""
        async with trio.open_nursery() as nursery:
            if self.rng.random() < 0.5:
                nursery.start_soon(self._use, self.rng.choice(sorted(self.group.models)), self.rng.uniform(0, 50))
                await trio.sleep(self.rng.uniform(0, 20))
            self.closing = True
            self.group.shutdown()

    def _on_spawn(self, name: str) -> None:
        assert not self.closing, "nothing starts after shutdown (I8)"
        others = dict.fromkeys(self.script.alive, NOTHING)
        assert self.group.core.residency.place(name, others) is not None, f"{name} beside {sorted(others)} (I4)"

    # ---- after every step --------------------------------------------------------------------

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        """Trio's instruments swallow exceptions, so the first broken law is kept."""
        if self.broken is None:
            try:
                self._check()
            except BaseException as exc:
                self.broken = exc

    def _check(self) -> None:
        group, alive = self.group, self.script.alive
        core = group.core
        for model in core.models.values():
            process = alive.get(model.name)
            if model.leases:
                assert model.state in (State.READY, State.DRAINING), "leases need a live model (I1)"
                assert process is not None, "a model with leases has a process (I1)"
                assert process.attempt == model.attempt, "and it is that of the present attempt (I2)"
            if model.state is State.READY:
                assert not model.queue.count or not model.has_room, "an open gate lets in whom it can (I5)"
            if model.state is State.STOPPED:
                assert process is None, "stopped means gone (I7)"
            served = group.inflight._entries.get(model.attempt, {}).keys()
            if model.state in (State.READY, State.DRAINING):
                assert model.leases.keys() == served, "the scheduler counts what the tracker counts (I1)"
        known = set(core._where)
        assert known <= group._answers.keys(), "nobody who left is remembered (I9)"
        waiting = {ticket for ticket, answer in group._answers.items() if not answer.given.is_set()}
        assert waiting <= known, "whoever waits is in the queue (I5)"
        assert group.limiter.borrowed_tokens <= group.limiter.total_tokens
        occupied = sum(model.state in OCCUPIED for model in core.models.values())
        assert occupied <= group.limiter.total_tokens, "what is occupied fits (I4)"
        assert len(alive) <= group.limiter.borrowed_tokens, "a process holds its token (I7)"
        for model in core.models.values():
            if model.state is State.DRAINING and not model.retiring:
                assert core.plan.closed[model.name].is_claim, "a gate is closed for somebody (I9)"


def run_race(seed: int) -> Race:
    """Run one race to its end; raises whatever law was broken."""
    race = Race(seed)
    trio._core._run._r.seed(seed)
    trio.run(race.main, clock=MockClock(autojump_threshold=0))
    if race.broken is not None:
        raise race.broken
    assert not race.script.alive, "nothing is left when run() is over (I7)"
    assert sum(race.outcomes.values()) == CLIENTS, "everybody has exactly one outcome (I5)"
    assert not race.group._answers
    assert not race.group._runs
    assert not race.group._gates
    assert not race.group.inflight._entries
    assert race.group.limiter.borrowed_tokens == 0
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


def tracker_forgets(monkeypatch) -> None:
    """A grant is not counted in the in-flight tracker."""
    monkeypatch.setattr(InFlight, "enter", lambda self, attempt, ticket, entry: None)


def scheduler_forgets(monkeypatch) -> None:
    """A grant is not counted in the scheduler, so a swap may come between."""
    original = Scheduler._grant_all

    def grant_all(self, model):
        original(self, model)
        for ticket in list(model.leases):
            model.end_lease(ticket)
            del self._where[ticket]

    monkeypatch.setattr(Scheduler, "_grant_all", grant_all)


def swap_does_not_wait_for_the_end(monkeypatch) -> None:
    """The scheduler is told that the victims have ended while they are still being stopped."""
    original = SwapGroup._swap

    async def hasty(self, swap, victims):
        for run in victims:
            self.feed(Ended(run.spec.name, run.attempt))
        await original(self, swap, victims)

    monkeypatch.setattr(SwapGroup, "_swap", hasty)


def leaver_stays(monkeypatch) -> None:
    """A client that leaves the queue is not taken out of it."""
    original = Scheduler._left

    def left(self, ticket):
        model = self._where.get(ticket)
        if model is None or ticket in model.leases:
            original(self, ticket)

    monkeypatch.setattr(Scheduler, "_left", left)


@pytest.mark.parametrize("bug", [tracker_forgets, scheduler_forgets, swap_does_not_wait_for_the_end, leaver_stays])
def test_a_seeded_bug_of_the_shell_is_caught(bug, monkeypatch):
    """Some schedule among the first hundred shows it."""
    bug(monkeypatch)

    with pytest.raises((AssertionError, KeyError, BaseExceptionGroup, trio.TooSlowError)):
        run_races(100)


def run_races(count: int) -> None:
    for seed in range(count):
        run_race(seed)
