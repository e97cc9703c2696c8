"""The fleet where something around it breaks, or comes and goes: it goes on, and nothing is left in the books."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

import attrs
import pytest
import trio
from fakes import FakeMachine, Script, spec
from trio.testing import wait_all_tasks_blocked

from trioswap.config import Config, GroupConfig, MemoryConfig, ModelConfig
from trioswap.config.changes import compare, effective
from trioswap.errors import ModelStuck, StartFailed
from trioswap.fleet import Fleet
from trioswap.footprints import Wish
from trioswap.group import SwapGroup
from trioswap.memory import FOREIGN_LOOK, make_memory
from trioswap.messages import Event, RetireAsked, Stop
from trioswap.scheduler import Scheduler

ALL = {"ram": 100, "gpu0": 100}


@attrs.define(eq=False)
class BrokenMachine(FakeMachine):
    """One whose driver can be made to raise what nobody thought of."""

    broken: bool = False

    def free(self) -> dict[str, int]:
        if self.broken:
            raise ValueError("seeded")
        return super().free()

    def used_by(self, pids) -> dict[str, int]:
        if self.broken:
            raise ValueError("seeded")
        return super().used_by(pids)


@pytest.fixture
def script() -> Script:
    return Script()


@asynccontextmanager
async def running(config: Config, script: Script, supervise: Callable | None = None) -> AsyncIterator[Fleet]:
    """The fleet of *config* while the block runs; its servers take memory of the machine that *script* has."""
    memory = None if config.memory is None else make_memory(config, script.machine)
    fleet = Fleet(config, supervise or script.supervise, memory)
    async with trio.open_nursery() as nursery:
        await nursery.start(fleet.run)
        yield fleet
        fleet.shutdown()
        await fleet.wait_ended()


def one_at_a_time(*names: str) -> Config:
    return Config({name: spec(name) for name in names}, (GroupConfig("(default)", names),) if names else ())


def with_memory(**settings: object) -> Config:
    models = {name: spec(name, memory=30) for name in "ab"}
    return Config(models, (), memory=MemoryConfig(headroom=0, **settings))


async def reload(fleet: Fleet, config: Config) -> None:
    old = fleet.arrangement.config
    await fleet.reload(effective(old, config), compare(old, config))


async def ask(fleet: Fleet, model: str) -> str:
    async with fleet.lease(model) as lease:
        return lease.upstream.answer()


# ---- reloads ---------------------------------------------------------------------------------


async def test_models_that_come_to_a_fleet_without_any(script, autojump_clock):
    """At first there are only peers; then come models, all of them go, and one comes back."""
    async with running(one_at_a_time(), script) as fleet:
        for names in ("ab", "", "a"):
            await reload(fleet, one_at_a_time(*names))
            await trio.sleep(10)
            assert [await ask(fleet, name) for name in names] == list(names)


async def test_other_programs_are_looked_at_whenever_that_is_wanted(script, autojump_clock):
    """It is turned off and on again, and what is seen afterwards counts as it did before."""
    script.machine = FakeMachine(ALL)
    async with running(with_memory(yield_to_others=True), script) as fleet:
        for wanted in (False, True, False, True):
            await reload(fleet, with_memory(yield_to_others=wanted))
            await trio.sleep(2 * FOREIGN_LOOK)
        script.machine.foreign = {"gpu0": 60}
        await trio.sleep(2 * FOREIGN_LOOK)
        assert fleet.memory.budget.sizes["gpu0"] == 40


async def test_any_number_of_reloads_while_somebody_does_not_go(script, autojump_clock):
    """Each time it is remembered whom the removed model keeps out, and whom it does not, until it is gone at last."""
    groups = (GroupConfig("x", ("a", "b"), exclusive=False), GroupConfig("y", ("c",), exclusive=False))
    before = Config({name: spec(name) for name in "abc"}, groups)
    async with running(before, script) as fleet:
        await ask(fleet, "a")
        script.stays_stuck = True
        for ttl in range(1, 500):
            models = {name: spec(name, ttl=float(ttl)) for name in "bc"}
            await reload(fleet, Config(models, (attrs.evolve(groups[0], members=("b",)), groups[1])))
        await trio.sleep(10)
        script.stays_stuck = False
        assert await ask(fleet, "c") == "c"
        with pytest.raises(ModelStuck):
            await ask(fleet, "b")
        script.alive["a"].die_after_all()
        await trio.sleep(10)
        assert await ask(fleet, "b") == "b"


@pytest.mark.breaks_scheduler
async def test_a_removed_model_is_forgotten_although_its_scheduler_broke(script, autojump_clock, monkeypatch):
    """It broke when it was told: the server ends for that, and nothing is left of the model."""
    break_at(monkeypatch, RetireAsked)
    async with running(one_at_a_time("a", "b"), script) as fleet:
        await ask(fleet, "a")
        await reload(fleet, one_at_a_time("b"))
        await trio.sleep(10)
        assert fleet.groups[0].faults == 1
        assert fleet.arrangement.home.keys() == {"b"}
        assert await ask(fleet, "b") == "b"


# ---- what breaks -----------------------------------------------------------------------------


def break_at(monkeypatch: pytest.MonkeyPatch, kind: type[Event]) -> None:
    """The first event of that kind breaks the scheduler."""
    original, struck = Scheduler.handle, []

    def handle(core: Scheduler, event: Event, now: float) -> object:
        if isinstance(event, kind) and not struck:
            struck.append(event)
            raise ZeroDivisionError("seeded")
        return original(core, event, now)

    monkeypatch.setattr(Scheduler, "handle", handle)


async def test_a_process_that_cannot_even_be_made(script, autojump_clock, caplog):
    """It fails the start, the token is given back, and the next attempt is made as usual."""
    made = []

    def supervise(spec: ModelConfig, attempt: int, holding: object) -> object:
        made.append(attempt)
        if len(made) == 1:
            raise OSError("seeded")
        return script.supervise(spec, attempt)

    async with running(one_at_a_time("a", "b"), script, supervise) as fleet:
        with pytest.raises(StartFailed, match="seeded"):
            await ask(fleet, "a")
        assert fleet.groups[0].limiter.borrowed_tokens == 0
        assert await ask(fleet, "b") == "b"
        assert await ask(fleet, "a") == "a"
    assert "supervision broke model=a attempt=1" in caplog.text


@pytest.mark.parametrize("when", ["while it serves", "when it ends"])
async def test_memory_that_cannot_be_looked_at(script, autojump_clock, caplog, when):
    """Who is served by the model goes on, and its end is its end."""
    script.machine = machine = BrokenMachine(ALL)
    async with running(with_memory(), script) as fleet:
        async with fleet.lease("a") as lease:
            await trio.sleep(5)
            machine.broken = when == "while it serves"
            await trio.sleep(30)
            assert lease.upstream.answer() == "a"
        machine.broken = True
        await fleet.unload(["a"])
        assert not script.alive
        assert await ask(fleet, "b") == "b"
    assert "the memory could not be looked at model=a" in caplog.text


async def test_other_programs_that_cannot_be_looked_at(script, autojump_clock, caplog):
    """The next look that succeeds counts again."""
    script.machine = machine = BrokenMachine(ALL)
    async with running(with_memory(yield_to_others=True, learn=False), script) as fleet:
        await trio.sleep(1)
        machine.broken = True
        await trio.sleep(10 * FOREIGN_LOOK)
        machine.broken, machine.foreign = False, {"gpu0": 60}
        await trio.sleep(3 * FOREIGN_LOOK)
        assert fleet.memory.budget.sizes["gpu0"] == 40
    assert "cannot tell what other programs leave" in caplog.text


async def test_a_listener_that_breaks(script, autojump_clock, caplog):
    """Neither a request nor a server suffers, and the listeners after it are told."""
    heard = []

    def broken() -> None:
        raise ValueError("seeded")

    async with running(one_at_a_time("a", "b"), script) as fleet:
        with fleet.watch(broken), fleet.watch(partial(heard.append, 1)):
            assert [await ask(fleet, name) for name in "ab"] == ["a", "b"]
    assert heard
    assert "ValueError: seeded" in caplog.text


# ---- memory that is lent ---------------------------------------------------------------------


@pytest.mark.breaks_scheduler
async def test_a_loan_that_ends_too_late_is_forgotten_all_the_same(script, autojump_clock, monkeypatch):
    """Its end is overlooked for a while, as by a scheduler that breaks: then it is gone, and so is its wish."""
    script.machine = FakeMachine(ALL)
    original, lost = SwapGroup._obey, []

    def obey(group: SwapGroup, command: object) -> None:
        if isinstance(command, Stop) and not lost:
            lost.append(command)
            raise ZeroDivisionError("seeded")
        original(group, command)

    monkeypatch.setattr(SwapGroup, "_obey", obey)
    async with running(with_memory(), script) as fleet:
        async with fleet.hold("loan", Wish(20)):
            await wait_all_tasks_blocked()
        await trio.sleep(10)
        assert lost
        assert [view.name for view in fleet.views()] == ["a", "b"]
        assert fleet.memory.budget.footprints.wishes.keys() == {"a", "b"}
        async with fleet.hold("loan", Wish(20)) as holding:
            assert holding == {"gpu0": 20}
