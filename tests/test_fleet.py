"""The fleet where something around it breaks, or comes and goes: it goes on, and nothing is left in the books."""

from __future__ import annotations

import math
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

import attrs
import pytest
import trio
from children import PATIENCE
from fakes import FakeMachine, Script, spec
from trio.testing import wait_all_tasks_blocked

from trioswap.config import Config, GroupConfig, MemoryConfig, ModelConfig
from trioswap.config.changes import compare, effective
from trioswap.errors import ConfigError, ModelStuck, StartFailed
from trioswap.fleet import Fleet
from trioswap.footprints import Wish
from trioswap.group import SwapGroup
from trioswap.learning import remember
from trioswap.lifecycle import State
from trioswap.memory import FOREIGN_LOOK, Memory, make_memory
from trioswap.messages import Event, RetireAsked, Stop
from trioswap.scheduler import Scheduler

ALL = {"ram": 100, "gpu0": 100}
TWO_GPUS = {**ALL, "gpu1": 100}


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


@attrs.define(eq=False)
class SlowMachine(FakeMachine):
    """One whose driver takes a second to answer."""

    async def in_time(self, look):
        found = look()
        await trio.sleep(1)
        return found


@pytest.fixture
def script() -> Script:
    return Script()


@asynccontextmanager
async def running(config: Config, script: Script, supervise: Callable | None = None) -> AsyncIterator[Fleet]:
    """The fleet of *config* while the block runs; its servers take memory of the machine that *script* has."""
    memory = None if config.memory is None else make_memory(config, script.machine)
    fleet = Fleet(config, supervise or script.supervise, memory)
    fleet.reads.limit = math.inf  # the clock of most tests does not wait for threads
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


async def test_who_does_not_yield_any_more_has_it_all(script, autojump_clock):
    """What a look at others finds that began before is not believed: nobody would say when it is given back."""
    script.machine = SlowMachine(ALL)
    async with running(with_memory(yield_to_others=True), script) as fleet:
        await trio.sleep(2)
        script.machine.foreign = {"gpu0": 60}
        await trio.sleep(FOREIGN_LOOK - 0.5)  # during the second look
        await reload(fleet, with_memory(yield_to_others=False))
        await trio.sleep(10 * FOREIGN_LOOK)
        assert fleet.memory.budget.sizes["gpu0"] == 100


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


def alone(*models: ModelConfig) -> Config:
    """Each in nobody's way."""
    return Config(
        {model.name: model for model in models},
        tuple(GroupConfig(model.name, (model.name,), exclusive=False) for model in models),
    )


@pytest.mark.parametrize("owner", ["child", "any"])
async def test_who_is_to_listen_where_one_leaves_waits_as_long_as_it_is_to(script, autojump_clock, owner):
    """And however often somebody reloads; a container is heard at its address as well as a child."""
    a, b = (spec(name, port_owner=owner) for name in "ab")
    b = attrs.evolve(b, proxy=a.proxy)
    waits: dict[str, float] = {}
    async with running(alone(a), script) as fleet, trio.open_nursery() as nursery:
        nursery.start_soon(served_after, fleet, "a", 20.0, {})
        await trio.sleep(script.load + 1)
        await reload(fleet, alone(b))
        await reload(fleet, alone(attrs.evolve(b, ttl=60.0)))
        await served_after(fleet, "b", 1.0, waits)
        assert waits.pop("b") == pytest.approx(19.0 + script.stop + script.load)
        nursery.start_soon(served_after, fleet, "b", 20.0, {})
        await trio.sleep(1)
        await reload(fleet, alone(a))
        await reload(fleet, alone(attrs.evolve(a, proxy="http://127.0.0.1:1")))
        await served_after(fleet, "a", 1.0, waits)
        assert waits.pop("a") == pytest.approx(script.load)


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


async def test_an_unload_in_the_middle_of_a_reload(script, autojump_clock):
    """Which moves the model to another group: it is unloaded, in whatever order the tasks come."""

    def config(*, exclusive: bool) -> Config:
        groups = (GroupConfig("g", ("a", "b"), swap=False, exclusive=exclusive), GroupConfig("h", ("c",)))
        free = tuple(GroupConfig(name, (name,), exclusive=False) for name in "abc")
        return Config({name: spec(name) for name in "abc"}, groups if exclusive else free)

    async def unload(fleet: Fleet, after: int) -> None:
        for _ in range(after):
            await trio.lowlevel.checkpoint()
        await fleet.unload(["b"])

    for after in [*range(8)] * 20:
        async with running(config(exclusive=True), script) as fleet:
            await ask(fleet, "a")
            await ask(fleet, "b")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(reload, fleet, config(exclusive=False))
                nursery.start_soon(unload, fleet, after)
            assert len(fleet.groups) == 3
            assert fleet.state("b") is State.STOPPED, after


async def test_files_of_models_that_do_not_answer(script, monkeypatch):
    """The reload fails and changes nothing; the next one, when they do, is in effect."""
    script.machine, answer = FakeMachine(ALL), threading.Event()
    before, after = (with_memory(devices={"ram": size}) for size in (100, 50))
    async with running(before, script) as fleet:
        prospect = Memory.prospect
        monkeypatch.setattr(Memory, "prospect", lambda memory, config: answer.wait() and prospect(memory, config))
        fleet.reads.limit = 0.01
        try:
            with (
                trio.fail_after(PATIENCE),
                pytest.raises(ConfigError, match=r"files of models: no answer within 0.01 s"),
            ):
                await reload(fleet, after)
        finally:
            answer.set()
        assert fleet.arrangement.config is before
        assert fleet.memory.budget.sizes == {"ram": 100}
        fleet.reads.limit = PATIENCE
        await reload(fleet, after)
        assert fleet.memory.budget.sizes == {"ram": 50}


# ---- what was learned of another command line --------------------------------------------------


async def learn(script: Script, fleet: Fleet, **used: int) -> None:
    """Have a run of a that uses so much, of which there is something to learn."""
    script.uses["a"] = used
    await served_after(fleet, "a", 10.0, {})
    await fleet.unload(["a"])


def known(fleet: Fleet) -> tuple[tuple[dict[str, int], ...], dict[str, float]]:
    """What a is believed to need, and what was measured of its costs."""
    return fleet.memory.budget.footprints.need("a").holdings, remember(fleet.costs["a"])[0]


@pytest.mark.breaks_scheduler
@pytest.mark.parametrize("breaks", [False, True])
async def test_another_command_line_is_learned_of_anew(script, autojump_clock, monkeypatch, breaks):
    """Neither what is known of the old one counts, nor what is seen of its last run, which is still at work."""
    script.machine = FakeMachine(TWO_GPUS)
    config = Config({"a": spec("a")}, (), memory=MemoryConfig(headroom=0))
    async with running(config, script) as fleet:
        await learn(script, fleet, gpu0=60)
        assert known(fleet) == (({"gpu0": 60}, {"gpu1": 60}), {"load": 5.0, "stop": 2.0, "service": 10.0})
        if breaks:
            break_at(monkeypatch, RetireAsked)
        async with fleet.lease("a"):
            await trio.sleep(1)
            await reload(fleet, attrs.evolve(config, models={"a": spec("a", env={"LAYERS": "9"})}))
            assert known(fleet) == ((), {})
            await trio.sleep(10)
        await trio.sleep(10)
        assert not script.alive
        assert known(fleet) == ((), {})
        script.load = 7.0
        await learn(script, fleet, gpu0=30)
        assert known(fleet) == (({"gpu0": 30}, {"gpu1": 30}), {"load": 7.0, "stop": 2.0, "service": 10.0})


@pytest.mark.parametrize("state", ["loading", "serving"])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"memory": 30}, {"memory": 30, "device": "gpu1"}),
        ({"memory": 30}, {"memory": {"gpu1": 30}}),
        ({"memory": {"gpu0": 30}}, {"memory": {"gpu1": 30}}),
        ({"memory": 30, "device": "gpu0"}, {"memory": 30, "device": "gpu1"}),
    ],
)
async def test_another_device_is_learned_of_anew(script, autojump_clock, before, after, state):
    """The server goes on where it is, and what it uses there is nothing that the next one needs beside its own."""
    script.machine = FakeMachine(TWO_GPUS)
    config = Config({"a": spec("a", **before)}, (), memory=MemoryConfig(headroom=0))
    async with running(config, script) as fleet:
        await learn(script, fleet, gpu0=40)
        assert known(fleet)[0][0] == {"gpu0": 40}
        async with trio.open_nursery() as nursery:
            nursery.start_soon(served_after, fleet, "a", 20.0, {})
            await trio.sleep(1 if state == "loading" else 10)
            await reload(fleet, attrs.evolve(config, models={"a": spec("a", **after)}))
            await trio.sleep(15)
            assert [process.attempt for process in script.alive.values()] == [2]
        await fleet.unload(["a"])
        assert known(fleet) == (({"gpu1": 30},), {})
        await learn(script, fleet, gpu1=50)
        assert known(fleet)[0] == ({"gpu1": 50},)


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


# ---- who waits for whom ------------------------------------------------------------------------


async def served_after(fleet: Fleet, name: str, seconds: float, waits: dict[str, float]) -> None:
    """Use *name* for so long; note how long that was waited for."""
    begun = trio.current_time()
    async with fleet.lease(name):
        waits.setdefault(name, trio.current_time() - begun)
        await trio.sleep(seconds)


async def test_a_light_request_books_nothing_that_heavy_ones_wait_for(autojump_clock):
    """Overdue, it still may not have the model that works for somebody heavy; who is as heavy is due there before."""
    script = Script(load=5.0, stop=1.0)
    models = {"h1": spec("h1", weight=4.0), "h2": spec("h2", weight=4.0), "l": spec("l", weight=0.25)}
    models = {name: attrs.evolve(model, max_wait=60.0) for name, model in models.items()}
    waits: dict[str, float] = {}
    config = Config(models, (GroupConfig("(default)", tuple(models)),))
    async with running(config, script) as fleet, trio.open_nursery() as nursery:

        async def hammer() -> None:
            while True:
                nursery.start_soon(served_after, fleet, "h1", 3.0, waits)
                await trio.sleep(1.0)

        nursery.start_soon(hammer)
        await trio.sleep(20)
        nursery.start_soon(served_after, fleet, "l", 1.0, waits)
        await trio.sleep(245)
        await served_after(fleet, "h2", 1.0, waits)
        nursery.cancel_scope.cancel(reason="seen")
    assert waits["h2"] < 132, "its bound in docs/scheduling.md"


async def test_who_becomes_due_is_thought_about_even_if_nobody_can_be_put_out(autojump_clock):
    """It passes one of higher priority then, so that a third one, which had to stand back, has room."""
    size = 2**30
    script = Script(load=5.0, stop=40.0, machine=FakeMachine({"ram": 12 * size}))
    models = {
        "big": spec("big", priority=1),
        "c": spec("c", memory=4 * size, max_wait=10.0),
        "d": spec("d", memory=5 * size),
    }
    config = Config(models, (), memory=MemoryConfig(devices={"ram": 12 * size}, headroom=0))
    waits: dict[str, float] = {}
    async with running(config, script) as fleet:
        await served_after(fleet, "c", 1.0, {})
        await trio.sleep(100)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(served_after, fleet, "big", 1.0, waits)
            await trio.sleep(1)
            for name in "cd":
                nursery.start_soon(served_after, fleet, name, 1.0, waits)
    assert waits["d"] == pytest.approx(15.0), "c is due after 10 s, and d takes 5 s to load"
