"""What was learned is kept over restarts: the file, and every way in which it can be broken."""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import attrs
import pytest
import trio
import trio.testing
from children import PATIENCE
from commands import daemon
from daemons import chat, fetch, scripted, write_config
from fakes import spec
from hypothesis import given
from hypothesis import strategies as st

from trioswap import state
from trioswap.config import Config
from trioswap.footprints import Footprints, Wish
from trioswap.learning import Costs, command_id
from trioswap.state import FILE, SAVE_EVERY, State, default_directory

GIB = 2**30
DEVICES = ("gpu0", "ram")


@attrs.define(eq=False)
class Books:
    """What a daemon knows of its models, and its state."""

    state: State
    costs: dict[str, Costs]
    footprints: Footprints | None

    def learn(self, model: str, load: float, peak: int) -> None:
        """*model* took *load* seconds and *peak* bytes."""
        self.costs[model].load.add(load)
        self.costs[model].gaps.extend([load, 2 * load])
        if self.footprints is not None:
            self.footprints.measured(model, {"gpu0": peak}, {"gpu0": peak})

    def load(self, model: str) -> float | None:
        """The seconds known of a load; None: it was never measured."""
        average = self.costs[model].load
        return average.value if average.measured else None

    def peak(self, model: str) -> int | None:
        """The bytes known."""
        need = self.footprints.need(model)
        return need.holdings[0]["gpu0"] if need.holdings else None


def books(path: Path, *models, counted: bool = True) -> Books:
    """A daemon that starts with these models, and has read its file."""
    models = {model.name: model for model in models or (spec("a"), spec("b"))}
    costs = {name: Costs() for name in models}
    footprints = Footprints(DEVICES, {name: Wish() for name in models}) if counted else None
    state = State(path, Config(models), costs, footprints)
    state.restore()
    return Books(state, costs, footprints)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "state" / FILE


def written(path: Path) -> dict:
    return json.loads(path.read_text())


# ---- there and back --------------------------------------------------------------------------


def test_what_was_learned_is_known_after_a_restart(path):
    """Costs, gaps and peaks; what was never measured is still a guess."""
    before = books(path)
    before.learn("a", 7.5, 5 * GIB)
    before.footprints.ran_out("a", {"gpu0": 5 * GIB})
    before.state.save()
    after = books(path)

    assert (after.load("a"), after.load("b")) == (7.5, None)
    assert list(after.costs["a"].gaps) == [7.5, 15.0]
    assert after.footprints.need("a") == before.footprints.need("a")
    assert after.footprints.need("a").holdings == ({"gpu0": 5 * GIB * 5 // 4},)
    assert after.costs["a"].stop.measured is False
    assert after.peak("b") is None


def test_another_command_line_is_another_model(path):
    """Another argument, another variable, another device, however it is said: forgotten."""
    before = books(path)
    before.learn("a", 7.5, GIB)
    before.state.save()
    for changed in (
        attrs.evolve(spec("a"), argv=("serve-a", "--more")),
        attrs.evolve(spec("a"), env={"LAYERS": "9"}),
        attrs.evolve(spec("a"), device="ram"),
        attrs.evolve(spec("a"), memory={"ram": GIB}),
    ):
        after = books(path, changed)
        assert (after.load("a"), list(after.costs["a"].gaps), after.peak("a")) == (None, [], None)


def test_another_port_is_the_same_command_line():
    """Ports are given out in order, so a new model shifts those of others; a longer number is no port."""

    def at(port: int, *more: str) -> str:
        argv = ("serve", "--port", str(port), f"--url=http://127.0.0.1:{port}/v1", f"--log=m_{port}.txt", *more)
        return command_id(attrs.evolve(spec("a"), argv=argv, proxy=f"http://127.0.0.1:{port}", env={"P": str(port)}))

    assert at(5800) == at(5801)
    assert at(5800, "--ctx", "8192") == at(5801, "--ctx", "8192")
    assert at(5800, "--ctx", "8192") != at(5800, "--ctx", "4096")
    assert at(5800, "--seed", "58001") == at(5801, "--seed", "58001")


def test_another_amount_is_the_same_command_line():
    """It says nothing of where it is needed, and the server may use what it used before."""
    where = {"gpu1": GIB, "ram": GIB}

    assert command_id(spec("a", memory=GIB)) == command_id(spec("a", memory=2 * GIB)) == command_id(spec("a"))
    assert command_id(spec("a", memory=where)) == command_id(spec("a", memory={"ram": 0, "gpu1": 5 * GIB}))
    assert command_id(spec("a", memory=where)) != command_id(spec("a", memory={"gpu0": GIB, "ram": GIB}))


def test_a_model_that_is_gone_may_come_back(path):
    """What is known of it stays in the file meanwhile."""
    first = books(path)
    first.learn("a", 7.5, GIB)
    first.state.save()
    second = books(path, spec("b"))
    second.learn("b", 2.0, 2 * GIB)
    second.state.save()
    third = books(path)

    assert (third.load("a"), third.load("b")) == (7.5, 2.0)
    assert (third.peak("a"), third.peak("b")) == (GIB, 2 * GIB)


def test_where_memory_is_not_counted_what_is_known_of_it_is_kept(path):
    """Groups for a day do not cost what was measured."""
    first = books(path)
    first.learn("a", 7.5, GIB)
    first.state.save()
    second = books(path, counted=False)
    second.learn("a", 4.0, 0)
    second.state.save()
    third = books(path)

    assert third.load("a") != 7.5
    assert third.peak("a") == GIB


def test_nothing_new_is_not_written(path):
    """Nor is a file made where nothing was learned."""
    fresh = books(path)
    fresh.state.save()
    assert not path.parent.exists()

    fresh.learn("a", 1.0, GIB)
    fresh.state.save()
    path.write_text("changed by hand")
    fresh.state.save()
    assert path.read_text() == "changed by hand"


# ---- files that cannot be read ------------------------------------------------------------------


def entry(**changes: object) -> str:
    """A file about model a."""
    model = {"command": command_id(spec("a")), "costs": {"load": 3.0}, "gaps": [1.0], **changes}
    return json.dumps({"version": 1, "models": {"a": model}})


def memory(**changes: object) -> str:
    return entry(memory={"peak": {"gpu0": GIB}, "grown": {}, "fixed": False, **changes})


BROKEN = {
    "empty": "",
    "no JSON": "{",
    "cut off": memory()[:-30],
    "not UTF-8": b"\xff\xfe\x00",
    "NUL": "\0" * 100,
    "another kind": "[]",
    "a number": "7",
    "nothing": "null",
    "too deep": "[" * 100_000,
    "no version": '{"models": {}}',
    "a newer version": '{"version": 2, "models": {}, "more": 1}',
    "an unknown key": entry(color="red"),
    "no models": '{"version": 1, "models": []}',
    "no model": '{"version": 1, "models": {"a": 7}}',
    "no command": '{"version": 1, "models": {"a": {}}}',
    "costs of another kind": entry(costs=[1]),
    "a cost in words": entry(costs={"load": "long"}),
    "a cost that is none": entry(costs={"load": None}),
    "NaN": entry(costs={"load": math.nan}),
    "infinite": entry(costs={"stop": math.inf}),
    "infinite in digits": entry(costs={"load": 1}).replace('"load": 1', '"load": 1e999'),
    "negative": entry(costs={"service": -1e-9}),
    "a huge number": entry(costs={"load": 1e300}),
    "a number beyond floats": entry(costs={"load": 10**400}),
    "a number beyond reading": entry(costs={"load": 1}).replace('"load": 1', '"load": 1' + "0" * 5000),
    "a gap of NaN": entry(gaps=[1.0, math.nan]),
    "a gap before the last": entry(gaps=[-5]),
    "a negative peak": memory(peak={"gpu0": -1}),
    "a peak of NaN": memory(peak={"gpu0": math.nan}),
    "an endless peak": memory(peak={"gpu0": math.inf}),
    "a peak of all memory there ever was": memory(peak={"gpu0": 2**64}),
    "a raise below nothing": memory(grown={"ram": -GIB}),
    "fixed nowhere": memory(peak={}, fixed=True),
    "half a record": entry(memory={"peak": {}}),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_file_that_cannot_be_believed_is_not(path, caplog, content):
    """One line says why, nothing of it reaches the books, and what is learned anew is written over it."""
    path.parent.mkdir()
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    after = books(path)

    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert record.exc_info is None
    assert str(path) in record.getMessage()
    assert len(record.getMessage()) < 500
    assert (after.load("a"), list(after.costs["a"].gaps), after.peak("a")) == (None, [], None)
    after.learn("a", 2.0, GIB)
    after.state.save()
    assert books(path).load("a") == 2.0


def test_a_good_file_is_believed(path):
    """The frame of the broken ones is right: only what is broken in them is wrong."""
    path.parent.mkdir()
    path.write_text(memory())

    assert (books(path).load("a"), books(path).peak("a")) == (3.0, GIB)


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to(path)], ids=["directory", "loop"])
def test_what_is_no_file_is_survived(path, caplog, make):
    """Reading and writing: a line each, and the daemon goes on."""
    path.parent.mkdir()
    make(path)
    after = books(path)
    after.learn("a", 2.0, GIB)
    after.state.save()

    assert "cannot be read" in caplog.records[0].getMessage()
    assert all(record.exc_info is None for record in caplog.records)


def test_a_device_that_is_gone_takes_what_was_learned_on_it(path):
    """Its amounts name nothing; the costs are as true as before."""
    path.parent.mkdir()
    path.write_text(memory(peak={"gpu1": GIB}))
    after = books(path)

    assert (after.load("a"), after.peak("a")) == (3.0, None)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
KEYS = st.sampled_from(
    ["version", "models", "a", "command", "costs", "load", "gaps", "memory", "peak", "gpu0", "fixed"]
)
DOCUMENTS = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
)
MODELS = st.fixed_dictionaries(
    {"command": st.just(command_id(spec("a")))},
    optional={
        "costs": st.dictionaries(KEYS, st.floats() | SCALARS, max_size=3),
        "gaps": st.lists(st.floats(), max_size=3) | DOCUMENTS,
        "memory": st.fixed_dictionaries(
            {
                "peak": st.dictionaries(st.sampled_from(DEVICES), st.integers() | st.floats(), max_size=2),
                "grown": st.dictionaries(st.sampled_from(DEVICES), st.integers(), max_size=2),
                "fixed": st.booleans(),
            }
        ),
    },
)


@given(DOCUMENTS | MODELS.map(lambda model: {"version": 1, "models": {"a": model}}))
def test_whatever_stands_in_the_file_the_books_stay_sane(tmp_path_factory, document):
    """No exception, and only numbers with which one can reckon."""
    path = tmp_path_factory.mktemp("state") / FILE
    path.write_text(json.dumps(document))
    after = books(path)

    costs = after.costs["a"]
    for value in (costs.load.value, costs.stop.value, costs.service.value, costs.swap, *costs.gaps):
        assert 0 <= value < math.inf
    for holding in after.footprints.need("a").holdings:
        assert all(0 <= size < 2**62 and isinstance(size, int) for size in holding.values())


# ---- files that cannot be written ----------------------------------------------------------------


def test_a_directory_that_cannot_be_made_is_survived(tmp_path, caplog):
    """One line, not one every minute; it is written as soon as that works."""
    (tmp_path / "state").write_text("a file in the way")
    path = tmp_path / "state" / FILE
    learned = books(path)
    caplog.clear()
    for load in (1.0, 2.0, 3.0):
        learned.learn("a", load, GIB)
        learned.state.save()
    [record] = caplog.records
    assert record.getMessage().startswith("what was learned cannot be kept: ")

    (tmp_path / "state").unlink()
    learned.state.save()
    assert books(path).load("a") == learned.load("a")


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file can grow beyond *room* bytes: the kernel writes as much and then refuses."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_is_written_whole_or_not_at_all(path, caplog):
    """In the middle of it the disk is full: the old one stays as it was, and no piece is left."""
    learned = books(path)
    learned.learn("a", 7.5, GIB)
    learned.state.save()
    learned.learn("b", 2.0, GIB)
    with full_disk(50):
        learned.state.save()
    assert len(caplog.records) == 1
    assert books(path).load("a") == 7.5
    assert books(path).load("b") is None
    assert list(path.parent.iterdir()) == [path]

    learned.state.save()
    assert books(path).load("b") == 2.0


# ---- when ------------------------------------------------------------------------------------


async def test_it_is_saved_now_and_then_and_at_the_end(path, autojump_clock, monkeypatch):
    """Every minute what is new, and when it is cancelled what has come since."""

    async def inline(function, *arguments, **_):
        # The clock would jump while a thread writes.
        await trio.lowlevel.checkpoint()
        return function(*arguments)

    monkeypatch.setattr(trio.to_thread, "run_sync", inline)
    learned = books(path)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(learned.state.run)
        learned.learn("a", 7.5, GIB)
        await trio.sleep(0.9 * SAVE_EVERY)
        assert not path.exists()
        await trio.sleep(0.2 * SAVE_EVERY)
        assert books(path).load("a") == 7.5

        learned.learn("b", 2.0, GIB)
        await trio.sleep(SAVE_EVERY)
        assert books(path).load("b") == 2.0

        learned.learn("b", 3.0, GIB)
        nursery.cancel_scope.cancel()

    assert books(path).load("b") == learned.load("b") != 2.0


async def test_without_a_thread_it_is_saved_later(path, autojump_clock, monkeypatch, caplog):
    """The machine may have no thread left (RLIMIT_NPROC): that ends nobody, and is said once."""
    threads = 0

    async def scarce(function, *arguments, **_):
        await trio.lowlevel.checkpoint()
        if not threads:
            raise RuntimeError("can't start new thread")
        return function(*arguments)

    monkeypatch.setattr(trio.to_thread, "run_sync", scarce)
    learned = books(path)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(learned.state.run)
        learned.learn("a", 7.5, GIB)
        await trio.sleep(2.5 * SAVE_EVERY)
        assert not path.exists()
        [record] = [record for record in caplog.records if record.name == "trioswap.state"]
        assert "can't start new thread" in record.getMessage()

        threads = 1
        await trio.sleep(SAVE_EVERY)
        assert books(path).load("a") == 7.5
        nursery.cancel_scope.cancel()


# ---- a file system that does not answer ---------------------------------------------------------


async def test_a_daemon_ends_whatever_its_state_directory_does(tmp_path):
    """A FIFO that nobody reads stands for it: who opens it to write waits for ever."""
    path = write_config(tmp_path, {"a": scripted()}, state_dir=str(tmp_path / "state"))
    async with daemon("serve", "-c", path) as served:
        assert (await fetch(served.port, "POST", "/v1/chat/completions", chat("a"))).status == 200
        os.mkfifo(tmp_path / "state" / f"{FILE}.{served.process.pid}")

        assert await served.stop() == 0


@attrs.frozen
class Disk:
    """A disk that takes its time with the first file that takes the place of another."""

    begun: threading.Event = attrs.field(factory=threading.Event)
    go_on: threading.Event = attrs.field(factory=threading.Event)
    replace: Callable[[Path, Path], Path] = Path.replace

    def __call__(self, fresh: Path, path: Path) -> Path:
        if not self.begun.is_set():
            self.begun.set()
            assert self.go_on.wait(PATIENCE)
        return self.replace(fresh, path)


@pytest.fixture
def disk(monkeypatch) -> Iterator[Disk]:
    disk = Disk()

    def replace(fresh: Path, path: Path) -> Path:
        return disk(fresh, path)

    monkeypatch.setattr(Path, "replace", replace)
    yield disk
    disk.go_on.set()


@pytest.mark.parametrize("every", [SAVE_EVERY, 0.0])
async def test_a_write_is_not_waited_for_beyond_the_end(path, disk, caplog, monkeypatch, every):
    """Not for the last one, nor for one that hangs since long before; what that costs is said."""
    monkeypatch.setattr(state, "SAVE_EVERY", every)
    monkeypatch.setattr(state, "LAST_SAVE", 0.01)
    learned = books(path)
    learned.learn("a", 7.5, GIB)
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(learned.state.run)
            while not every and not disk.begun.is_set():
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()

    assert not path.exists()
    assert "what was learned cannot be kept: it could not be written within 0.01 s" in caplog.text


async def test_a_slow_write_and_the_last_one_are_not_mixed(path, disk, caplog, monkeypatch):
    """They write to the same file, so the last begins when the other has ended."""
    monkeypatch.setattr(state, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(state, "LAST_SAVE", PATIENCE)
    learned = books(path)
    learned.learn("a", 7.5, GIB)
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(learned.state.run)
            while not disk.begun.is_set():
                await trio.lowlevel.checkpoint()
            learned.learn("b", 2.0, GIB)
            nursery.cancel_scope.cancel()
            with trio.move_on_after(0.05, shield=True):  # if it did not wait, it would be written by then
                while not path.exists():
                    await trio.lowlevel.checkpoint()
            disk.go_on.set()

    assert books(path).load("b") == 2.0
    assert list(path.parent.iterdir()) == [path]
    assert not caplog.records


async def test_what_others_have_left_to_hang_does_not_prevent_it(path):
    """All of Trio's own threads may wait for another disk."""
    go_on = threading.Event()
    trio.to_thread.current_default_thread_limiter().total_tokens = 1
    learned = books(path)
    learned.learn("a", 7.5, GIB)
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(trio.to_thread.run_sync, go_on.wait, PATIENCE, abandon_on_cancel=True))
            nursery.start_soon(learned.state.run)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
    go_on.set()
    assert books(path).load("a") == 7.5


# ---- where -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "directory"),
    [
        ({"STATE_DIRECTORY": "/var/lib/trioswap", "XDG_STATE_HOME": "/x", "HOME": "/h"}, "/var/lib/trioswap"),
        ({"STATE_DIRECTORY": "/var/lib/one:/var/lib/two"}, "/var/lib/one"),
        ({"STATE_DIRECTORY": "", "XDG_STATE_HOME": "/x", "HOME": "/h"}, "/x/trioswap"),
        ({"XDG_STATE_HOME": "", "HOME": "/h"}, "/h/.local/state/trioswap"),
        ({"XDG_STATE_HOME": "relative/path", "HOME": "/h"}, "/h/.local/state/trioswap"),
        ({"HOME": "/h"}, "/h/.local/state/trioswap"),
        ({"HOME": ""}, "/.local/state/trioswap"),
        ({}, "/.local/state/trioswap"),
    ],
)
def test_where_state_goes_by_default(environ, directory):
    """systemd's place before that of the XDG base directories before the home."""
    assert default_directory(environ) == Path(directory)
