"""Random histories of a fleet, in which everything happens together that elsewhere happens alone.

Reloads that change groups, matrices, models and who comes back; loans; unloads; crashes, failed starts and stuck
processes; other programs' memory; processes that cannot be made; and schedulers that break, before and after
they have decided.  The books of all groups must agree at any time, and in the end everybody has an answer.
"""

from __future__ import annotations

import logging
import math
import random
from collections import Counter
from contextlib import suppress

import attrs
import pytest
import trio
from fakes import FakeMachine, FakeProcess, Script, spec

from trioswap.config import Config, GroupConfig, MemoryConfig, ModelConfig
from trioswap.config.changes import compare, effective
from trioswap.config.matrix import read_matrix
from trioswap.config.mistakes import Mistakes
from trioswap.config.parts import HooksConfig
from trioswap.errors import DoesNotFit, MemoryTaken, ModelStuck, TrioswapError, UpstreamFailed
from trioswap.fleet import Fleet
from trioswap.footprints import Wish
from trioswap.group import SwapGroup
from trioswap.lifecycle import OCCUPIED, State
from trioswap.memory import make_memory
from trioswap.messages import Command, Event
from trioswap.returning import Returner
from trioswap.scheduler import Scheduler
from trioswap.selfcheck import LOOK, SelfCheck

NAMES = "abcdef"
SPAN = 900.0
# Longer than anything that is configured here may make a request wait.
PATIENT = 3600.0
SEEDS = range(12)


# ---- what is drawn -----------------------------------------------------------------------------


def draw_model(rng: random.Random, name: str, *, memory: bool) -> ModelConfig:
    return spec(
        name,
        ttl=rng.choice([None, 5.0, 60.0]),
        parallel=rng.choice([1, 2, 10]),
        max_wait=rng.choice([0.0, 5.0, 30.0]),
        drain_timeout=rng.choice([None, 3.0]),
        unload_drain_timeout=rng.choice([1.0, 30.0]),
        backoff=rng.choice([0.0, 1.0]),
        backoff_max=10.0,
        health_check_timeout=60.0,
        env=rng.choice([{}, {}, {"X": "1"}]),
        memory=rng.choice([None, 10, 30, 50]) if memory else None,
    )


def draw_config(rng: random.Random, *, memory: bool) -> Config:
    names = sorted(rng.sample(NAMES, rng.choice([0, 1, 2, 3, 4, 5, 6, 6])))
    kind = rng.choice(["groups", "memory alone"] if memory else ["groups", "groups", "matrix"])
    groups, matrix = (), None
    if kind == "matrix" and len(names) > 1:
        sets = {f"s{i}": " & ".join(sorted(rng.sample(names, rng.randint(1, len(names))))) for i in range(2)}
        matrix = read_matrix({}, {}, sets, names, Mistakes())
    elif kind != "memory alone" and names:
        groups = tuple(draw_groups(rng, names))
    return Config(
        {name: draw_model(rng, name, memory=memory) for name in names},
        groups,
        matrix,
        MemoryConfig(headroom=0, yield_to_others=rng.random() < 0.5) if memory else None,
        policy=rng.choice(["lease"] * 5 + ["fifo"]),
        parallel_loads=rng.choice([1, 1, 2]),
        hooks=HooksConfig((), tuple(rng.sample(names, rng.randint(0, min(2, len(names))))), rng.choice([1.0, 20.0])),
    )


def draw_groups(rng: random.Random, names: list[str]):
    left = rng.sample(names, len(names))
    while left:
        size = rng.randint(1, len(left))
        part, left = left[:size], left[size:]
        flags = {key: rng.random() < 0.5 for key in ("swap", "exclusive", "persistent")}
        yield GroupConfig(f"g{len(left)}", tuple(part), **flags)


# ---- a history ---------------------------------------------------------------------------------


@attrs.define(eq=False)
class Walk:
    """A fleet, and everybody who has to do with it."""

    rng: random.Random
    faulty: bool
    """Schedulers break."""
    memory: bool = attrs.field(init=False)
    script: Script = attrs.field(init=False)
    fleet: Fleet = attrs.field(init=False)
    returner: Returner = attrs.field(init=False)
    check: SelfCheck = attrs.field(init=False)
    addresses: dict[str, str] = attrs.field(factory=lambda: {name: spec(name).proxy for name in NAMES})
    """Where models are to listen, configured or not; a reload may exchange two of them."""
    outcomes: Counter[str] = attrs.field(factory=Counter)
    over: bool = False
    loans: int = 0
    faults: int = 0
    met: int = 0
    """How often one came to listen where another still did."""

    def __attrs_post_init__(self) -> None:
        rng = self.rng
        self.memory = rng.random() < 0.5
        machine = FakeMachine({"gpu0": 60, "ram": 80}) if self.memory else None
        self.script = Script(load=rng.choice([0.5, 5.0]), stop=rng.choice([0.1, 2.0]), rng=rng, machine=machine)
        config = draw_config(rng, memory=self.memory)
        self.fleet = Fleet(config, self.supervise, make_memory(config, machine) if machine is not None else None)
        self.fleet.reads.limit = math.inf  # the clock does not wait for threads
        self.returner, self.check = Returner(self.fleet, config), SelfCheck(self.fleet)
        self.script.on_spawn = self.on_spawn

    def supervise(self, spec: ModelConfig, attempt: int, holding: object) -> FakeProcess:
        if not self.over and self.rng.random() < 0.01:
            raise OSError("seeded")
        return self.script.supervise(spec, attempt, holding)

    def on_spawn(self, name: str) -> None:
        at = Counter(process.spec.proxy for process in self.script.alive.values())
        self.met += at[self.fleet.arrangement.desk.runs[name].spec.proxy]

    async def live(self) -> None:
        async with trio.open_nursery() as everything:
            await everything.start(self.fleet.run)
            everything.start_soon(self.returner.run)
            everything.start_soon(self.look_around)
            async with trio.open_nursery() as busy:
                for _ in range(8):
                    busy.start_soon(self.client)
                for _ in range(2 if self.memory else 0):
                    busy.start_soon(self.borrower)
                busy.start_soon(self.chance, busy)
                await trio.sleep(SPAN)
                self.over = True
                self.mend()
                await trio.sleep(60)
                self.mend()  # who got stuck meanwhile
            await trio.sleep(60)
            await self.judge_the_end()
            everything.cancel_scope.cancel(reason="it is over")

    def mend(self) -> None:
        script = self.script
        script.stays_stuck = script.fails = script.runs_out = False
        if script.machine is not None:
            script.machine.foreign = {}
        for process in list(script.alive.values()):
            if process.stuck:
                process.die_after_all()

    async def client(self) -> None:
        rng = self.rng
        while not self.over:
            await trio.sleep(rng.expovariate(1 / 12))
            outcome = "left"
            with trio.move_on_after(rng.choice([math.inf] * 3 + [rng.uniform(0, 20)])):
                outcome = await self.ask(rng.choice(NAMES), rng.choice([None, None, 0.25, 4.0]), rng.uniform(0, 8))
            self.outcomes[outcome] += 1

    async def ask(self, name: str, weight: float | None = None, seconds: float = 0.0) -> str:
        try:
            with trio.fail_after(PATIENT):
                async with self.fleet.lease(name, weight, label=f"one for {name}") as lease:
                    await trio.sleep(seconds)
                    with suppress(UpstreamFailed):
                        answered = f"answered by {lease.upstream.answer()}"
                        lease.answered(200)
                        return answered
                    return "lost"
        except TrioswapError as exc:
            return type(exc).__name__

    async def borrower(self) -> None:
        rng = self.rng
        while not self.over:
            await trio.sleep(rng.expovariate(1 / 40))
            self.loans += 1
            with trio.move_on_after(rng.choice([math.inf, rng.uniform(0, 30)])), suppress(TrioswapError):
                async with self.fleet.hold(f"loan{self.loans}", Wish(rng.randint(1, 40))):
                    await trio.sleep(rng.uniform(0, 60))

    async def chance(self, nursery: trio.Nursery) -> None:
        rng, script = self.rng, self.script
        while not self.over:
            await trio.sleep(rng.expovariate(1 / 8))
            if self.over:
                return
            match rng.choice(["crash", "crash", "unload", "reload", "reload", "fail", "stuck", "others", "mend"]):
                case "crash" if script.alive:
                    rng.choice(list(script.alive.values())).crash()
                case "unload":
                    nursery.start_soon(self.unload, rng.sample(NAMES, 2), rng.choice([1.0, math.inf]))
                case "reload":
                    await self.reload()
                case "fail":
                    script.fails, script.runs_out = rng.random() < 0.3, rng.random() < 0.2
                    script.sweep = rng.choice([0.0, 1.0])
                case "stuck":
                    script.stays_stuck = rng.random() < 0.3
                case "others" if self.memory:
                    script.machine.foreign = {"gpu0": rng.choice([0, 0, 20, 60])}
                case "mend":
                    self.mend()

    async def unload(self, names: list[str], patience: float) -> None:
        with trio.move_on_after(patience), suppress(ModelStuck):
            await self.fleet.unload(names)

    async def reload(self) -> None:
        old, new = self.fleet.arrangement.config, draw_config(self.rng, memory=self.memory)
        # Most of those that stay, stay as they were.
        kept = {name: old.models[name] for name in new.models if name in old.models and self.rng.random() < 0.7}
        if self.rng.random() < 0.3:
            one, other = self.rng.sample(NAMES, 2)
            self.addresses[one], self.addresses[other] = self.addresses[other], self.addresses[one]
        models = {**new.models, **kept}
        models = {name: attrs.evolve(model, proxy=self.addresses[name]) for name, model in models.items()}
        new = attrs.evolve(new, models=models)
        await self.fleet.reload(effective(old, new), compare(old, new))
        self.returner.renew(self.fleet.arrangement.config)

    # ---- what must hold ------------------------------------------------------------------------

    async def look_around(self) -> None:
        while True:
            await trio.sleep(LOOK)
            self.judge_books()
            self.check.look()
            self.fleet.waiting()
            assert self.check.given_up == 0
            assert self.faulty or self.check.reasons == ()

    def judge_books(self) -> None:
        """Arrangement, desk, groups and schedulers say the same of every model."""
        arrangement = self.fleet.arrangement
        desk, there = arrangement.desk, dict[str, SwapGroup]()
        for group in arrangement.groups:
            assert group.models.keys() == group.core.models.keys()
            assert not group.models.keys() & there.keys()
            there |= dict.fromkeys(group.models, group)
            self.judge_scheduler(group.core)
            for model in group.core.models.values():
                attempt = desk.runs[model.name].attempt if model.name in desk.runs else None
                assert (model.attempt if model.state in OCCUPIED else None) == attempt
        assert desk.tell == {name: group.feed for name, group in there.items()}
        assert desk.runs.keys() <= there.keys()
        assert {run.attempt for run in desk.runs.values()} >= desk.gates.keys()
        assert arrangement.home.items() <= there.items()
        assert arrangement.config.models.keys() <= arrangement.home.keys()
        assert arrangement.home.keys() - arrangement.config.models.keys() <= desk.runs.keys(), "removed and forgotten"
        if self.memory:
            assert self.fleet.memory.budget.footprints.wishes.keys() == there.keys()

    def judge_scheduler(self, core: Scheduler) -> None:
        assert Counter(model.name for model in core._where.values()) == +Counter(
            {model.name: model.queue.count + len(model.leases) for model in core.models.values()}
        )
        assert core._claims.keys() == {model.name for model in core.models.values() if model.is_claim}
        assert core._occupied.keys() == {model.name for model in core.models.values() if model.state in OCCUPIED}
        for model in core.models.values():
            assert not model.leases or model.state in (State.READY, State.DRAINING), "I1"

    async def judge_the_end(self) -> None:
        self.faulty = False
        self.judge_books()
        arrangement, desk = self.fleet.arrangement, self.fleet.arrangement.desk
        assert not self.met
        assert not desk.answers
        assert not desk.labels
        assert not desk.inflight._entries
        assert not desk.inflight._idle
        assert arrangement.home.keys() == arrangement.config.models.keys()
        for name in arrangement.config.models:
            assert await self.ask(name) in (f"answered by {name}", DoesNotFit.__name__, MemoryTaken.__name__)
        self.fleet.shutdown()
        with trio.fail_after(PATIENT):
            await self.fleet.wait_ended()
        assert not self.script.alive
        assert not desk.runs
        assert not desk.gates
        assert all(group.limiter.borrowed_tokens == 0 for group in self.fleet.groups)


def break_now_and_then(monkeypatch: pytest.MonkeyPatch, walk: Walk) -> None:
    original = Scheduler.handle

    def handle(core: Scheduler, event: Event, now: float) -> list[Command]:
        fate = walk.rng.random() if walk.faulty else 1.0
        if fate < 0.01:
            raise ZeroDivisionError("seeded before")
        commands = original(core, event, now)
        if fate < 0.02:
            raise ZeroDivisionError("seeded after")
        return commands

    begin_anew = SwapGroup._begin_anew

    def note(group: SwapGroup, event: Event, exc: Exception) -> None:
        if not isinstance(exc, ZeroDivisionError):
            raise exc  # a bug that is none of the seeded ones
        walk.faults += 1
        begin_anew(group, event, exc)

    monkeypatch.setattr(Scheduler, "handle", handle)
    monkeypatch.setattr(SwapGroup, "_begin_anew", note)


@pytest.mark.breaks_scheduler
@pytest.mark.parametrize("faulty", [False, True], ids=["sound", "faulty"])
@pytest.mark.parametrize("seed", SEEDS)
async def test_everything_at_once(seed, faulty, monkeypatch, autojump_clock):
    """A quarter of an hour in which it all happens; then everything is served again, and nothing is left."""
    logging.disable(logging.CRITICAL)
    monkeypatch.setattr("trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING", True)
    trio._core._run._r.seed(seed)
    walk = Walk(random.Random(seed), faulty)
    break_now_and_then(monkeypatch, walk)
    try:
        await walk.live()
    finally:
        logging.disable(logging.NOTSET)
    assert sum(walk.outcomes.values()) > 300
    assert faulty == (walk.faults > 0)
