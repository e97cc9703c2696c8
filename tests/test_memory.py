"""The memory of a machine as a budget: how much there is, who needs how much, who uses how much."""

from __future__ import annotations

import logging
import os
import threading
from functools import partial
from pathlib import Path

import attrs
import pytest
import trio
from children import PATIENCE
from daemons import chat, daemon, eventually, fetch, scripted
from fakes import FakeMachine, Script, make_group, spec
from trio.testing import wait_all_tasks_blocked

from trioswap import devices
from trioswap import memory as memory_module
from trioswap.config import Config, MemoryConfig, load
from trioswap.config.schema import BACKOFF
from trioswap.devices import RAM, Machine
from trioswap.errors import MemoryTaken, StartFailed
from trioswap.footprints import Footprints, Wish
from trioswap.gguf import estimate, read_header
from trioswap.group import SwapGroup
from trioswap.lifecycle import State
from trioswap.memory import (
    FIRST_LOOK,
    FOREIGN_LOOK,
    LAST_LOOK,
    RETURN_WAIT,
    Look,
    Memory,
    Prospect,
    make_memory,
    usable_sizes,
)
from trioswap.messages import Squeezed
from trioswap.residency import Holding
from trioswap.residency.budget import Budget
from trioswap.tinymodels import write_tiny_models

CHAT = "/v1/chat/completions"
GIB = 2**30
ONE, TWO = {"gpu0": 24, RAM: 64}, {"gpu0": 24, "gpu1": 16, RAM: 64}
# After so long somebody has looked.
LOOKED = 1.5 * FOREIGN_LOOK


def memory_of(machine: FakeMachine, config: MemoryConfig | None = None, **wishes: Wish) -> Memory:
    """The memory of a machine with nothing kept free unless *config* says so."""
    config = config or MemoryConfig(headroom=0)
    sizes = usable_sizes(config, machine)
    return Memory(config, machine, Budget(sizes, Footprints(tuple(sizes), wishes)))


@pytest.mark.parametrize(
    ("wish", "used", "held"),
    [
        (Wish(8), {}, {"gpu0": 8}),
        (Wish(8), {"gpu1": 5, RAM: 1}, {"gpu1": 8, RAM: 1}),
        (Wish(8), {"gpu1": 9, RAM: 1}, {"gpu1": 9, RAM: 1}),
        (Wish({"gpu0": 8, "gpu1": 4}), {"gpu1": 9}, {"gpu0": 8, "gpu1": 9}),
        (Wish(), {"gpu1": 5}, {"gpu1": 5}),
        (Wish(), {"gpu1": 99, "gpu9": 7}, {"gpu1": 16}),
    ],
)
async def test_what_is_held_by_a_server_that_nobody_has_placed(wish, used, held):
    """What its model needs, where most is used; or what is used, where that is more, and no more than there is."""
    memory = memory_of(FakeMachine(TWO, uses={5: used, 6: {"gpu0": 20}}), m=wish)

    assert {device: size for device, size in (await memory.held_by("m", [5])).items() if size} == held


async def test_a_server_of_which_nobody_knows_what_it_holds_may_hold_all():
    """Where nothing is measured that can be trusted, and nothing was said."""
    memory = memory_of(FakeMachine(TWO, uses={5: {RAM: 1}}), m=Wish())
    memory.budget.footprints.trusts_measurement = False

    assert (await memory.held_by("m", [5])) == TWO


# ---- the contract of a machine: the real one and the fake keep it --------------------------------


@pytest.fixture(params=["real", "fake"])
def machine(request) -> Machine | FakeMachine:
    found = Machine() if request.param == "real" else FakeMachine(ONE, uses={os.getpid(): {RAM: 3, "gpu0": 5}})
    found.discover()
    return found


def test_a_machine_has_devices_with_names_of_their_own(machine):
    """Host memory among them, behind the GPUs; what was discovered is what it has."""
    names = [device.name for device in machine.devices]

    assert machine.discover() == machine.devices
    assert len(set(names)) == len(names)
    assert names[-1] == RAM
    assert all(device.total > 0 for device in machine.devices)
    assert isinstance(machine.unmeasured, bool)


def test_a_machine_tells_what_is_free(machine):
    """Of devices that it has, and no more than they have."""
    totals = {device.name: device.total for device in machine.devices}

    assert machine.free().keys() <= totals.keys()
    assert all(0 <= free <= totals[name] for name, free in machine.free().items())


def test_a_machine_tells_what_processes_use(machine):
    """This one uses memory, nobody uses none, and a process that is gone used none either."""
    gone = 2**22 + 1  # above the largest pid that Linux gives

    assert machine.used_by([os.getpid()])[RAM] > 0
    assert not any(machine.used_by([]).values())
    assert machine.used_by([os.getpid(), gone]).keys() == machine.used_by([os.getpid()]).keys()
    assert not any(machine.used_by([gone]).values())


# ---- how much there is -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (MemoryConfig(headroom=0), {"gpu0": 24, "gpu1": 16, RAM: 64}),
        (MemoryConfig(headroom=4), {"gpu0": 20, "gpu1": 12, RAM: 60}),
        (MemoryConfig(headroom=20), {"gpu0": 4, "gpu1": 0, RAM: 44}),
        (MemoryConfig(headroom=0, devices={RAM: None}), {RAM: 64}),
        (MemoryConfig(headroom=0, devices={RAM: 32, "gpu1": None}), {"gpu1": 16, RAM: 32}),
        (MemoryConfig(headroom=2, devices={"gpu0": 10}), {"gpu0": 8}),
        (MemoryConfig(headroom=0, devices={"gpu7": None, "gpu8": 5}), {"gpu7": 0, "gpu8": 5}),
    ],
)
def test_what_models_may_use(config, sizes):
    """All devices or those that are written, found or written sizes, the headroom off each; GPUs come first."""
    usable = usable_sizes(config, FakeMachine(TWO))

    assert usable == sizes
    assert list(usable) == sorted(sizes, key=lambda name: name == RAM)


def test_where_memory_does_not_count_nobody_looks_at_the_machine():
    """Groups rule alone: no driver is loaded for nothing."""

    class Untouchable(FakeMachine):
        def discover(self):
            raise AssertionError

    assert make_memory(Config(memory=None), Untouchable(ONE)) is None


def test_without_a_machine_it_is_this_one():
    """Whatever that has; every size is one of a device, and smaller by the headroom."""
    found = make_memory(Config(memory=MemoryConfig(headroom=1)))

    assert found.budget.sizes == {device.name: device.total - 1 for device in found.machine.devices}


def test_a_device_that_is_not_there_is_told(caplog):
    """What is written of it can never hold a model, so one line each says so."""
    models = {"a": spec("a", device="gpu3"), "b": spec("b", memory={"gpu4": 1, RAM: 1}), "c": spec("c", device="auto")}
    make_memory(Config(models, memory=MemoryConfig(devices={"gpu9": None})), FakeMachine({RAM: GIB}))

    assert [record.getMessage() for record in caplog.records] == [
        "memory.devices: nothing is left of gpu9 for models, found on this machine: ram",
        "model=a wants memory of gpu3, found on this machine: ram",
        "model=b wants memory of gpu4, found on this machine: ram",
        "model=b wants memory of ram, found on this machine: ram",
    ]


@pytest.mark.parametrize(
    ("learn", "unmeasured", "trusts"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_what_was_learned_counts_where_all_can_be_measured(learn, unmeasured, trusts):
    """Not beside a GPU of which nobody tells, and not when the user does not want it."""
    found = make_memory(Config(memory=MemoryConfig(learn=learn)), FakeMachine(ONE, unmeasured=unmeasured))

    assert found.budget.footprints.trusts_measurement is trusts


# ---- who needs how much ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict[str, Path]:
    pytest.importorskip("gguf")
    return write_tiny_models(tmp_path_factory.mktemp("models"))


def wish_of(*argv: str | Path, machine: FakeMachine | None = None, **changes: object) -> Wish:
    """What is known of a model with this command line."""
    model = attrs.evolve(spec("m", **changes), argv=tuple(map(str, argv)))
    found = make_memory(Config({"m": model}, memory=MemoryConfig(headroom=0)), machine or FakeMachine(ONE))
    return found.budget.footprints.wishes["m"]


def guess(path: Path, *more: Path, **arguments: int) -> int:
    """The estimate by hand."""
    return estimate(read_header(path.read_bytes()), path.stat().st_size, **arguments) + sum(
        other.stat().st_size for other in more
    )


def test_a_command_line_of_llama_server_is_understood(tiny):
    """The file, the context, the requests at once; what it does not say is as llama-server does by itself."""
    colors = tiny["colors"]

    assert wish_of("llama-server", "-m", colors) == Wish(None, None, guess(colors))
    said = wish_of("llama-server", "--model", colors, "-c", "1024", "--parallel", "2")
    assert said == Wish(None, None, guess(colors, context=1024, parallel=2))
    assert said.estimate < guess(colors)


def test_its_other_files_are_added(tiny):
    """The projector for images, and the model that guesses ahead."""
    colors, animals = tiny["colors"], tiny["animals"]
    said = wish_of("llama-server", "-m", colors, "--mmproj", animals, "--model-draft", animals)

    assert said.estimate == guess(colors, animals, animals)


def test_a_model_of_the_embedded_engine_is_understood(tiny, tmp_path):
    """`gguf = "..."` becomes a command line with `-m trioswap.engine` in it, which is no model file."""
    file = tmp_path / "trioswap.toml"
    file.write_text(f'[models.m]\ngguf = "{tiny["colors"]}"\nargs = ["-c", "512", "-np", "1"]\n')
    found = make_memory(load(file), FakeMachine(ONE))

    assert found.budget.footprints.wishes["m"] == Wish(None, None, guess(tiny["colors"], context=512, parallel=1))


def test_files_in_parts_are_added_up(tiny, tmp_path):
    """The first has the header, all have weights."""
    parts = [tmp_path / f"big-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    for part in parts:
        part.write_bytes(tiny["colors"].read_bytes())

    assert wish_of("llama-server", "-m", parts[0]).estimate == guess(parts[0], *parts[1:])


def test_a_long_header_is_read_to_its_end(tiny, monkeypatch):
    """However little of it the first bytes are."""
    monkeypatch.setattr(memory_module, "_HEADER", 8)

    assert wish_of("llama-server", "-m", tiny["colors"]).estimate == guess(tiny["colors"])


def test_what_is_declared_needs_no_guess(tiny):
    """Nor a look at the file; the device is the user's word as well."""
    assert wish_of("x", "-m", tiny["colors"], memory=7) == Wish(7, None, None)
    assert wish_of("x", "-m", tiny["colors"], memory={RAM: 7}) == Wish({RAM: 7}, None, None)
    assert wish_of("x", "-m", "nowhere", memory=7, device="gpu0") == Wish(7, "gpu0", None)


def test_a_server_without_layers_on_the_gpu_is_in_host_memory(tiny):
    """Unless the user says another device, or host memory does not count."""
    argv = ("llama-server", "-m", tiny["colors"], "-ngl", "0")
    assert wish_of(*argv) == Wish(None, RAM, guess(tiny["colors"]))
    assert wish_of(*argv, device="gpu0").device == "gpu0"
    assert wish_of(*argv, machine=FakeMachine({"gpu0": GIB})).device is None
    assert wish_of("llama-server", "-m", tiny["colors"], "-ngl", "9").device is None


@pytest.mark.parametrize("broken", ["missing", "directory", "empty", "no GGUF", "cut off", "a part is missing"])
def test_a_file_that_cannot_be_read_gives_no_guess(tiny, tmp_path, caplog, broken):
    """The daemon starts all the same, and one line says why nothing is known."""
    path = tmp_path / "big-00001-of-00002.gguf" if broken == "a part is missing" else tmp_path / "m.gguf"
    match broken:
        case "directory":
            path.mkdir()
        case "empty":
            path.write_bytes(b"")
        case "no GGUF":
            path.write_bytes(b"PK\3\4" + bytes(100))
        case "cut off":
            path.write_bytes(tiny["colors"].read_bytes()[:200])
        case "a part is missing":
            path.write_bytes(tiny["colors"].read_bytes())
    with caplog.at_level(logging.INFO):
        assert wish_of("llama-server", "-m", path) == Wish()

    [record] = caplog.records
    assert record.getMessage().startswith("nothing can be guessed of the memory that model=m needs: ")


def test_another_server_gives_no_guess(caplog):
    """Its command line names no file; there is nothing to tell about that."""
    with caplog.at_level(logging.INFO):
        assert wish_of("vllm", "serve", "some/model") == Wish()
    assert not caplog.records


# ---- who sees which GPU ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("holding", "visible"),
    [
        ({"gpu0": 5}, "GPU-of-gpu0"),
        ({"gpu1": 5, RAM: 3}, "GPU-of-gpu1"),
        ({"gpu0": 5, "gpu1": 5}, None),
        ({"gpu0": 0, "gpu1": 5}, "GPU-of-gpu1"),
        ({RAM: 5}, None),
        ({}, None),
    ],
)
def test_a_server_sees_the_gpus_that_it_holds(holding, visible):
    """All of them, or none in particular: then nothing is hidden."""
    found = memory_of(FakeMachine(TWO)).environment(holding)

    expected = {} if visible is None else {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": visible}
    assert found == expected


def test_two_of_three_gpus_are_named_together():
    """In the order of the devices, separated by commas, and the order of numbering once."""
    found = memory_of(FakeMachine({"gpu0": 9, "gpu1": 9, "gpu2": 9})).environment({"gpu2": 1, "gpu0": 1})

    assert found == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "GPU-of-gpu0,GPU-of-gpu2"}


class OtherVendor(FakeMachine):
    """Three GPUs of AMD."""

    @property
    def devices(self):
        return tuple(
            attrs.evolve(device, kind="amd", environment={"ROCR_VISIBLE_DEVICES": device.name[-1]})
            for device in super().devices
        )


def test_another_vendors_gpus_are_named_only_one_at_a_time():
    """Each names its GPU in the numbering of the one before."""
    memory = memory_of(OtherVendor({"gpu0": 9, "gpu1": 9, "gpu2": 9}))

    assert memory.environment({"gpu1": 5}) == {"ROCR_VISIBLE_DEVICES": "1"}
    assert memory.environment({"gpu1": 5, "gpu2": 5}) == {}


# ---- who uses how much ------------------------------------------------------------------------


@attrs.define(eq=False)
class Watched:
    """A server being watched."""

    machine: FakeMachine = attrs.field(factory=lambda: FakeMachine(ONE, uses={1: {RAM: 10}}))
    config: MemoryConfig = attrs.field(factory=MemoryConfig)
    looks: list[float] = attrs.field(factory=list)
    reports: list[tuple[float, Holding]] = attrs.field(factory=list)

    def pids(self) -> list[int]:
        self.looks.append(trio.current_time())
        return [1]

    async def watch(self) -> None:
        await memory_of(self.machine, self.config).watch(
            self.pids, lambda peak: self.reports.append((trio.current_time(), peak))
        )

    def uses(self, ram: int) -> None:
        self.machine.uses[1] = {RAM: ram}


async def test_the_first_look_is_at_once_and_then_ever_less_often(nursery, autojump_clock):
    """Whoever ends a moment after it was ready has been looked at."""
    watched = Watched()
    nursery.start_soon(watched.watch)
    await wait_all_tasks_blocked()
    assert watched.reports == [(0, {"gpu0": 0, RAM: 10})]

    await trio.sleep(1000)
    pauses = [later - before for before, later in zip(watched.looks, watched.looks[1:], strict=False)]
    assert pauses[0] == pytest.approx(FIRST_LOOK)
    assert pauses == sorted(pauses)
    assert pauses[-1] == pytest.approx(LAST_LOOK)
    assert len(watched.reports) == 1, "what does not grow is no news"


async def test_only_growth_is_reported_and_no_noise(nursery, autojump_clock):
    """The peak so far, on every device; less, and a little more, is no news."""
    watched = Watched()
    watched.uses(1000)
    nursery.start_soon(watched.watch)
    for size in (1005, 500, 2000, 1990, 2015, 2021):
        await trio.sleep(2 * LAST_LOOK)
        watched.uses(size)
    await trio.sleep(2 * LAST_LOOK)

    assert [peak[RAM] for _, peak in watched.reports] == [1000, 2000, 2021]


async def test_slow_growth_is_not_lost_in_the_noise(nursery, autojump_clock):
    """Half a per cent at a time adds up."""
    watched = Watched()
    nursery.start_soon(watched.watch)
    for number in range(20):
        watched.uses(10_000 + 50 * number)
        await trio.sleep(2 * LAST_LOOK)

    assert watched.reports[-1][1][RAM] >= 10_950 / 1.01


async def test_the_last_look_is_at_the_end(autojump_clock):
    """What a server has taken since the look before counts, too."""
    watched = Watched()
    with trio.move_on_after(1000):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watched.watch)
            await trio.sleep(998)
            watched.uses(70)
            await trio.sleep_forever()

    assert watched.reports[-1] == (1000, {"gpu0": 0, RAM: 70})


async def test_a_device_that_does_not_count_is_not_reported(nursery, autojump_clock):
    """Who writes down the GPUs only does not want to hear of host memory, of which there would be none."""
    machine = FakeMachine(ONE, uses={1: {"gpu0": 5, RAM: 10}})
    watched = Watched(machine, MemoryConfig(headroom=0, devices={"gpu0": None}))
    nursery.start_soon(watched.watch)
    await wait_all_tasks_blocked()

    assert watched.reports == [(0, {"gpu0": 5})]


async def test_who_does_not_want_to_learn_does_not_look(autojump_clock):
    """Nor at the end."""
    watched = Watched(config=MemoryConfig(learn=False))
    with trio.move_on_after(1000):
        await watched.watch()

    assert watched.looks == watched.reports == []


@pytest.mark.parametrize("learn", [True, False])
async def test_another_configuration_may_want_to_learn(autojump_clock, learn):
    """Of a server that runs since before; and one that does not want it any more does not look, not even at its end."""
    watched = Watched(config=MemoryConfig(headroom=0, learn=not learn))
    memory = memory_of(watched.machine, watched.config)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(memory.watch, watched.pids, lambda peak: watched.reports.append((trio.current_time(), peak)))
        await trio.sleep(100)
        memory.expect(Prospect(MemoryConfig(headroom=0, learn=learn), memory.budget.sizes, {}), ())
        watched.looks.clear()
        watched.reports.clear()
        watched.uses(20)
        await wait_all_tasks_blocked()
        assert watched.reports == ([(100, {"gpu0": 0, RAM: 20})] if learn else [])
        nursery.cancel_scope.cancel()

    assert bool(watched.looks) is learn


async def test_a_gpu_that_is_late_is_waited_for(nursery, autojump_clock):
    """Until it has the memory back, and not for host memory."""
    machine = FakeMachine({"gpu0": 24 * GIB, RAM: 64 * GIB}, foreign={"gpu0": 20 * GIB, RAM: 60 * GIB})
    ended = trio.Event()

    async def wait() -> None:
        before, used = {"gpu0": 4 * GIB, RAM: 4 * GIB}, {"gpu0": 18 * GIB, RAM: 50 * GIB}
        await memory_of(machine).wait_returned(Look(used, before, {}))
        ended.set()

    nursery.start_soon(wait)
    await trio.sleep(RETURN_WAIT / 2)
    assert not ended.is_set()
    machine.foreign = {"gpu0": 2 * GIB, RAM: 60 * GIB}
    await trio.sleep(0.5)
    assert ended.is_set()


@attrs.define(eq=False)
class Late(FakeMachine):
    """A driver that gives memory back a while after the end of the process, which may differ from one to the next."""

    lags: dict[int, float] = attrs.field(factory=dict)
    """Seconds, by pid."""
    had: dict[int, tuple[int, float]] = attrs.field(factory=dict)

    def free(self):
        now = trio.current_time()
        ended = [pid for pid in self.had if pid not in self.uses]
        still = sum(self.had[pid][0] for pid in ended if now - self.had[pid][1] < self.lags.get(pid, 0))
        return {"gpu0": super().free()["gpu0"] - still}

    async def watch(self):
        """Know to a tenth of a second when who has ended."""
        while True:
            self.had.update({pid: (used["gpu0"], trio.current_time()) for pid, used in self.uses.items()})
            await trio.sleep(0.1)


def seconds_between(bench, one, other):
    """From when the trace says *one* to when it says *other*."""
    when = {text: at for at, text in bench.script.trace}
    return when[other] - when[one]


async def test_a_gpu_is_waited_for_as_it_was_last(nursery, autojump_clock):
    """a was looked at first when it was alone; b, which came later and stays, is not waited for."""
    machine = FakeMachine({"gpu0": 24 * GIB})
    crowd = await bench(nursery, None, machine, a=Wish(10 * GIB), b=Wish(10 * GIB), c=Wish(10 * GIB))
    await crowd.use("a")
    await crowd.use("b")
    await trio.sleep(100)
    await crowd.use("b")
    await crowd.use("c")
    assert set(crowd.ready()) == {"b", "c"}
    assert seconds_between(crowd, "a gone", "c spawned") < 1


async def test_a_gpu_is_waited_for_though_others_have_gone(nursery, autojump_clock):
    """b was looked at first beside a, which has ended since: its memory is not taken for that of b."""
    machine = Late({"gpu0": 24 * GIB}, lags={1: 3, 2: 3})
    nursery.start_soon(machine.watch)
    crowd = await bench(nursery, None, machine, a=Wish(10 * GIB), b=Wish(10 * GIB), c=Wish(20 * GIB))
    await crowd.use("a")
    await crowd.use("b")
    await trio.sleep(30)
    await crowd.group.unload(("a",))
    await trio.sleep(30)
    await crowd.use("c")
    assert 2.8 < seconds_between(crowd, "b gone", "c spawned") < 4


@pytest.mark.parametrize("lags", [{1: 0, 2: 3}, {1: 3, 2: 0}])
async def test_a_gpu_is_waited_for_by_each_of_those_that_end(nursery, autojump_clock, lags):
    """What one of them has given back is not taken for what the other one has."""
    machine = Late({"gpu0": 24 * GIB}, lags=lags)
    nursery.start_soon(machine.watch)
    crowd = await bench(nursery, None, machine, a=Wish(10 * GIB), b=Wish(10 * GIB), c=Wish(20 * GIB))
    await crowd.use("a")
    await crowd.use("b")
    await trio.sleep(100)
    await crowd.use("c")
    ended = max(at for at, text in crowd.script.trace if text.endswith("gone"))
    assert 2.8 < {text: at for at, text in crowd.script.trace}["c spawned"] - ended < 4


async def test_it_is_not_waited_for_without_bound(autojump_clock, caplog):
    """Something else has taken it, perhaps: after a while we go on, and say so."""
    machine = FakeMachine({"gpu0": 24 * GIB}, foreign={"gpu0": 20 * GIB})
    with trio.fail_after(10 * RETURN_WAIT):
        await memory_of(machine).wait_returned(Look({"gpu0": 18 * GIB}, {"gpu0": 4 * GIB}, {}))

    assert trio.current_time() == RETURN_WAIT
    assert "memory was not given back within 5 s" in caplog.text


# ---- what others leave -------------------------------------------------------------------------


@attrs.define(eq=False)
class Others:
    """The look at what other programs take."""

    machine: FakeMachine = attrs.field(factory=lambda: FakeMachine({"gpu0": 24, RAM: 64}))
    config: MemoryConfig = attrs.field(factory=lambda: MemoryConfig(headroom=2, yield_to_others=True))
    unseen: dict[str, int] = attrs.field(factory=dict)
    reports: list[tuple[float, Holding]] = attrs.field(factory=list)

    async def watch(self) -> None:
        await memory_of(self.machine, self.config).watch_others(
            lambda: [1], lambda sizes: self.reports.append((trio.current_time(), sizes)), lambda: self.unseen
        )


async def test_what_others_leave_is_told_when_it_changes(nursery, autojump_clock):
    """At the beginning, too: it may be little by then.  What our servers use counts as ours."""
    others = Others()
    others.machine.foreign = {"gpu0": 10}
    others.machine.uses[1] = {"gpu0": 12, RAM: 30}
    nursery.start_soon(others.watch)
    await wait_all_tasks_blocked()
    assert others.reports == [(0, {"gpu0": 12, RAM: 62})]

    await trio.sleep(10 * FOREIGN_LOOK)
    others.machine.uses[1] = {"gpu0": 1}
    await trio.sleep(10 * FOREIGN_LOOK)
    assert len(others.reports) == 1

    others.machine.foreign = {"gpu0": 3, RAM: 100}
    await trio.sleep(LOOKED)
    others.machine.foreign = {}
    await trio.sleep(LOOKED)
    assert [sizes for _, sizes in others.reports[1:]] == [{"gpu0": 19, RAM: 0}, {"gpu0": 22, RAM: 62}]


async def test_what_is_reserved_for_the_unseen_is_not_taken_twice(nursery, autojump_clock):
    """Servers in containers and borrowers use what they hold; what they use beyond that is taken from models."""
    others = Others(unseen={"gpu0": 10})
    for used, left in ((0, 22), (9, 22), (10, 22), (12, 20)):
        others.machine.foreign = {"gpu0": used}
        others.reports.clear()
        with trio.move_on_after(1):
            await others.watch()
        assert dict(others.reports[-1][1] if others.reports else {"gpu0": 22})["gpu0"] == left


async def test_a_written_size_is_not_exceeded(nursery, autojump_clock):
    """However much is free."""
    others = Others(config=MemoryConfig(headroom=2, yield_to_others=True, devices={"gpu0": 10}))
    nursery.start_soon(others.watch)
    await trio.sleep(LOOKED)
    assert others.reports == []
    others.machine.foreign = {"gpu0": 15}
    await trio.sleep(LOOKED)
    assert others.reports[-1][1] == {"gpu0": 7}


async def test_a_device_that_does_not_answer_keeps_its_size(nursery, autojump_clock):
    """A lost GPU is no reason to think that others have taken it."""

    class Lost(FakeMachine):
        def free(self):
            return {RAM: 40}

    others = Others(Lost({"gpu0": 24, RAM: 64}))
    nursery.start_soon(others.watch)
    await trio.sleep(LOOKED)

    assert others.reports[-1][1] == {"gpu0": 22, RAM: 38}


async def test_others_do_not_matter_unless_the_user_says_so(autojump_clock):
    """It returns at once."""
    others = Others(config=MemoryConfig())
    await others.watch()

    assert others.machine.looks == 0


@attrs.define(eq=False)
class Slow(FakeMachine):
    """One that is asked a second after it was to be, or answers a second late."""

    answers_late: bool = False

    async def in_time(self, look):
        found = look()
        await trio.sleep(1)
        return found if self.answers_late else look()


async def test_who_starts_during_a_look_at_others_is_none_of_them(nursery, autojump_clock):
    """What a newcomer has taken before the answer was there puts out nobody."""
    config = MemoryConfig(headroom=0, yield_to_others=True)
    crowd = await bench(nursery, config, Slow({RAM: 100}), a=Wish(40), b=Wish(40))
    crowd.script.load = 0.3
    await crowd.use("a")
    await trio.sleep(FOREIGN_LOOK + 1.2 - trio.current_time())  # during the second look
    await crowd.use("b")
    await trio.sleep(5)
    assert set(crowd.ready()) == {"a", "b"}


@attrs.define(eq=False)
class Hanging(FakeMachine):
    """One of which nothing is to be had in time, while its driver hangs."""

    hangs: bool = False

    async def in_time(self, look):
        return None if self.hangs else look()


async def test_while_a_driver_hangs_what_was_known_last_counts(nursery, autojump_clock):
    """Of what others leave and of what a server uses; and nobody waits until such a GPU has its memory back."""
    machine = Hanging({"gpu0": 24 * GIB}, uses={1: {"gpu0": GIB}}, foreign={"gpu0": 10 * GIB})
    watched, others = Watched(machine), Others(machine, MemoryConfig(headroom=0, yield_to_others=True))
    nursery.start_soon(watched.watch)
    nursery.start_soon(others.watch)
    await trio.sleep(LOOKED)
    machine.hangs, machine.foreign, machine.uses[1] = True, {}, {"gpu0": 9 * GIB}
    await trio.sleep(10 * LAST_LOOK)
    assert [len(watched.reports), len(others.reports)] == [1, 1]
    before = trio.current_time()
    await memory_of(machine).wait_returned(Look({"gpu0": 20 * GIB}, {"gpu0": GIB}, {}))
    assert trio.current_time() == before
    assert await memory_of(machine, m=Wish(5 * GIB)).held_by("m", [1]) == {"gpu0": 5 * GIB}

    machine.hangs = False
    await trio.sleep(2 * LAST_LOOK)
    assert (watched.reports[-1][1], others.reports[-1][1]) == ({"gpu0": 9 * GIB}, {"gpu0": 24 * GIB})


async def test_a_hanging_driver_stops_neither_requests_nor_swaps(monkeypatch):
    """With a real daemon, whose looks at what its servers use never come back until they may."""
    answers, used_by = threading.Event(), Machine.used_by

    def hang(self, pids):
        answers.wait(PATIENCE / 2)
        return used_by(self, pids)

    async def is_late(port: int, late: bool) -> bool:
        return (await fetch(port, "GET", "/api/selfcheck")).json()["memory_late"] is late

    monkeypatch.setattr(Machine, "used_by", hang)
    monkeypatch.setattr(devices, "LOOK_WAIT", 0.05)
    models = {name: scripted(memory="6GiB") for name in "ab"}
    async with daemon(models, memory={"headroom": 0, "devices": {"ram": "8GiB"}}) as served:
        try:
            with trio.fail_after(PATIENCE / 4):
                assert (await fetch(served.port, "POST", CHAT, chat("a"))).status == 200
                await eventually(partial(is_late, served.port, True))
                assert (await fetch(served.port, "GET", "/health")).status == 200
                for model in "ab":
                    assert (await fetch(served.port, "POST", CHAT, chat(model))).status == 200
        finally:
            answers.set()
        monkeypatch.setattr(devices, "LOOK_WAIT", PATIENCE)
        await eventually(partial(is_late, served.port, False))


# ---- the whole of it, with fake servers ------------------------------------------------------------


@attrs.define(eq=False)
class Bench:
    """A swap group of fake servers on a fake machine with 100 bytes of memory."""

    group: SwapGroup
    script: Script
    memory: Memory

    async def use(self, model: str, seconds: float = 1.0) -> str:
        """One request: hold a lease for a while and return who answered at the end."""
        async with self.group.lease(model) as lease:
            await trio.sleep(seconds)
            return lease.upstream.answer()

    def ready(self) -> dict[str, Holding]:
        """What the models hold that are ready."""
        return {view.name: view.holding for view in self.group.views() if view.state is State.READY}

    def spawned(self) -> list[str]:
        return [text.split()[0] for _, text in self.script.trace if text.endswith("spawned")]


async def bench(
    nursery, config: MemoryConfig | None = None, machine: FakeMachine | None = None, /, **wishes: Wish
) -> Bench:
    machine = machine or FakeMachine({RAM: 100})
    script = Script(machine=machine)
    memory = memory_of(machine, config, **wishes)
    group = make_group(script, memory=memory)
    await nursery.start(group.run)
    watching = partial(memory.watch_others, group.pids, lambda sizes: group.feed(Squeezed(sizes)))
    nursery.start_soon(watching)
    return Bench(group, script, memory)


def unknown(*names: str) -> dict[str, Wish]:
    return dict.fromkeys(names, Wish())


async def test_models_of_which_nothing_is_known_find_together(nursery, autojump_clock):
    """The first round runs one at a time; what was measured then lets two stay, and nobody swaps without need."""
    world = await bench(nursery, **unknown("a", "b", "c"))
    world.script.uses = {name: {RAM: 40} for name in "abc"}
    for model in "abc":
        await world.use(model)
        assert world.ready() == {model: {RAM: 100}}, "it has the machine for itself"
    await world.use("a")
    await world.use("b")
    before = len(world.spawned())
    for model in "abbabaab":
        await world.use(model)

    assert world.ready() == {"a": {RAM: 40}, "b": {RAM: 40}}
    assert len(world.spawned()) == before == 5
    nursery.cancel_scope.cancel()


async def test_what_was_measured_is_learned_even_of_a_short_run(nursery, autojump_clock):
    """A request that needs no time, and the model is put out at once."""
    world = await bench(nursery, **unknown("a", "b"))
    world.script.uses = {"a": {RAM: 40}, "b": {RAM: 30}}
    await world.use("a", 0)
    await world.use("b", 0)

    assert world.memory.budget.footprints.need("a").holdings == ({RAM: 40},)
    nursery.cancel_scope.cancel()


async def test_a_model_that_grows_costs_an_idle_one_its_place(nursery, autojump_clock):
    """It uses more than it was given: the budget holds again as soon as somebody can go."""
    world = await bench(nursery, a=Wish(40), b=Wish(50))
    await world.use("b")
    await world.use("a")
    nursery.start_soon(world.use, "a", 1000.0)
    await wait_all_tasks_blocked()
    world.script.machine.uses[world.script.alive["a"].attempt] = {RAM: 60}
    await trio.sleep(2 * LAST_LOOK)

    assert world.ready() == {"a": {RAM: 60}}
    nursery.cancel_scope.cancel()


async def test_who_grew_at_work_makes_room_when_it_can(nursery, autojump_clock):
    """Both were busy then; as soon as one is idle, the cheaper of them goes."""
    world = await bench(nursery, a=Wish(40), b=Wish(50))
    nursery.start_soon(world.use, "a", 100.0)
    nursery.start_soon(world.use, "b", 60.0)
    await trio.sleep(20)
    world.script.machine.uses[world.script.alive["a"].attempt] = {RAM: 70}
    await trio.sleep(30)
    assert world.ready() == {"a": {RAM: 70}, "b": {RAM: 50}}
    await trio.sleep(30)
    assert world.ready() == {"a": {RAM: 70}}
    nursery.cancel_scope.cancel()


async def test_a_model_larger_than_all_there_is_has_all_there_is(nursery, autojump_clock):
    """It fitted somehow: nobody is beside it, and it does not go for its own sake."""
    world = await bench(nursery, MemoryConfig(headroom=0, yield_to_others=True), a=Wish(60), b=Wish(20))
    world.script.uses = {"a": {RAM: 130}}
    await world.use("b")
    for _ in range(3):
        await world.use("a")
        await trio.sleep(10 * LAST_LOOK)
        assert world.ready() == {"a": {RAM: 100}}
    await world.use("b")
    await world.use("a")

    assert world.spawned() == ["b", "a", "b", "a"]
    nursery.cancel_scope.cancel()


async def test_a_newcomer_waits_until_the_gpu_has_its_memory_back(nursery, autojump_clock):
    """The process is gone, and the driver takes a moment longer."""
    machine = FakeMachine({"gpu0": 24 * GIB})
    world = await bench(nursery, None, machine, a=Wish(18 * GIB), b=Wish(18 * GIB))
    await world.use("a")
    nursery.start_soon(world.use, "b")
    await wait_all_tasks_blocked()
    machine.foreign = {"gpu0": 18 * GIB}  # what it will not have back when the process is gone
    await trio.sleep(world.script.stop + 1)
    assert world.script.trace[-1][1] == "a gone"

    machine.foreign = {}
    await trio.sleep(0.5)
    assert world.script.trace[-1][1] == "b spawned"
    nursery.cancel_scope.cancel()


async def test_the_cheapest_idle_model_goes_when_others_need_the_memory(nursery, autojump_clock):
    """One at a time until it fits; the one at work never."""
    world = await bench(nursery, MemoryConfig(headroom=0, yield_to_others=True), a=Wish(30), b=Wish(30), c=Wish(30))
    for model, seconds in (("a", 50.0), ("b", 1.0), ("c", 1.0)):
        world.script.load = seconds
        await world.use(model)
    nursery.start_soon(world.use, "c", 1000.0)
    await wait_all_tasks_blocked()
    world.script.machine.foreign = {RAM: 20}
    await trio.sleep(LOOKED)
    assert world.ready().keys() == {"a", "c"}, "b is quick to load"

    world.script.machine.foreign = {RAM: 60}
    await trio.sleep(LOOKED)
    assert world.ready().keys() == {"c"}

    world.script.machine.foreign = {RAM: 90}
    await trio.sleep(10 * FOREIGN_LOOK)
    assert world.ready().keys() == {"c"}, "it works"
    nursery.cancel_scope.cancel()


async def test_what_others_give_back_is_used_again(nursery, autojump_clock):
    """While they have it, a model that needs it is refused and a smaller one runs; afterwards both do."""
    world = await bench(nursery, MemoryConfig(headroom=0, yield_to_others=True), a=Wish(60), b=Wish(30))
    world.script.machine.foreign = {RAM: 50}
    await trio.sleep(LOOKED)
    assert await world.use("b") == "b"
    with pytest.raises(MemoryTaken):
        await world.use("a")

    world.script.machine.foreign = {}
    await trio.sleep(LOOKED)
    assert await world.use("a") == "a"
    assert world.ready().keys() == {"a", "b"}
    nursery.cancel_scope.cancel()


# ---- out of memory --------------------------------------------------------------------------------


def runs_out(world: Bench, model: str, times: int) -> None:
    """The next *times* starts of *model* fail for want of memory, and those of no other."""

    def on_spawn(name: str) -> None:
        world.script.runs_out = name == model and world.spawned().count(model) < times

    world.script.on_spawn = on_spawn


async def test_a_start_that_runs_out_of_memory_is_tried_once_more_with_more_room(nursery, autojump_clock):
    """A quarter more; others go for it when need be, and the client sees nothing of it."""
    world = await bench(nursery, a=Wish(60), b=Wish(40))
    await world.use("b")
    runs_out(world, "a", 1)

    assert await world.use("a") == "a"
    assert world.ready() == {"a": {RAM: 75}}
    assert world.spawned() == ["b", "a", "a"]
    nursery.cancel_scope.cancel()


async def test_others_stay_when_the_room_is_there(nursery, autojump_clock):
    """Nobody goes without need."""
    world = await bench(nursery, a=Wish(40), b=Wish(40))
    await world.use("b")
    runs_out(world, "a", 1)
    await world.use("a")

    assert world.ready() == {"a": {RAM: 50}, "b": {RAM: 40}}
    nursery.cancel_scope.cancel()


async def test_twice_out_of_memory_is_an_answer(nursery, autojump_clock):
    """Everybody who waits is told; the next request after the pause is a new try, with still more room."""
    world = await bench(nursery, a=Wish(40), b=Wish(40))
    runs_out(world, "a", 2)

    async def fail() -> None:
        with pytest.raises(StartFailed) as failed:
            await world.use("a")
        assert failed.value.status == 503
        assert failed.value.out_of_memory

    async with trio.open_nursery() as clients:
        clients.start_soon(fail)
        clients.start_soon(fail)
    assert world.spawned() == ["a", "a"]

    await trio.sleep(BACKOFF)
    assert await world.use("a") == "a"
    assert world.ready() == {"a": {RAM: 63}}
    nursery.cancel_scope.cancel()


async def test_out_of_memory_with_the_whole_machine_is_tried_once_more(nursery, autojump_clock):
    """Nothing is known of it, so there is no more to give; but what was in its way may have gone."""
    world = await bench(nursery, a=Wish())
    runs_out(world, "a", 1)

    assert await world.use("a") == "a"
    assert world.spawned() == ["a", "a"]
    nursery.cancel_scope.cancel()


async def test_a_start_that_fails_otherwise_is_not_tried_again(nursery, autojump_clock):
    """It would fail as before."""
    world = await bench(nursery, a=Wish(60))
    world.script.fails = True
    with pytest.raises(StartFailed):
        await world.use("a")

    assert world.spawned() == ["a"]
    nursery.cancel_scope.cancel()
