"""The contract of a supervised process, kept by the real one and by the fake that other tests rely on."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import pytest
import trio
from attempts import Attempt, Trial, attempt
from children import PATIENCE, free_port, model_argv
from fakes import FakeProcess, FakeUpstream, Script, spec
from trio.testing import wait_all_tasks_blocked

from trioswap import process, proctree
from trioswap.remote import Prober
from trioswap.upstream import Upstream

FLAGS = {"quick": (), "endless": ("--never-ready",), "failing": ("--exit-at-start", 7)}


class Real:
    """Makes runs of the scriptable model server, and meddles with them."""

    def __init__(self, prober: Prober, monkeypatch: pytest.MonkeyPatch) -> None:
        self.prober, self.monkeypatch = prober, monkeypatch
        self.port, self.grace = free_port(), PATIENCE

    def make(self, load: str) -> Attempt:
        argv = model_argv("m", *FLAGS[load], port=self.port)
        # Only where signals do not arrive is the grace ever used up.
        return attempt(argv, self.prober, port=self.port, unload_timeout=self.grace)

    async def wait_loading(self, trial: Attempt) -> None:
        await trial.said("listening")

    async def name_of(self, upstream: Upstream) -> str:
        """Who answers there."""
        async with upstream.request("GET", b"/", [], b"") as answer:
            return b"".join([chunk async for chunk in answer.chunks()]).decode().partition(" ")[0]

    def exists(self, trial: Attempt) -> bool:
        return not trial.nothing_left

    def crash(self, trial: Attempt) -> None:
        os.kill(trial.process.pid, signal.SIGKILL)

    @contextmanager
    def unkillable(self) -> Iterator[None]:
        """Signals do not arrive, as when the process belongs to another user."""

        def refuse(group: int, number: int) -> None:
            raise PermissionError

        self.grace = 0.0
        with self.monkeypatch.context() as patch:
            patch.setattr(os, "killpg", refuse)
            patch.setattr(proctree, "kill", lambda process, number: False)
            patch.setattr(process, "KILL_WAIT", 0.0)
            yield

    end_at_last = crash


class Fake:
    """The same with a fake that takes no time."""

    def __init__(self, prober: Prober, monkeypatch: pytest.MonkeyPatch) -> None:
        self.script = Script(load=0, stop=0, on_spawn=lambda name: self.spawned.set())
        self.spawned = trio.Event()

    def make(self, load: str) -> Trial:
        self.script.load = math.inf if load == "endless" else 0
        self.script.fails = load == "failing"
        return Trial(FakeProcess(spec("m", unload_timeout=0.0), 1, self.script))

    async def wait_loading(self, trial: Trial) -> None:
        await self.spawned.wait()

    async def name_of(self, upstream: FakeUpstream) -> str:
        return upstream.answer()

    def exists(self, trial: Trial) -> bool:
        return bool(self.script.alive)

    def crash(self, trial: Trial) -> None:
        trial.process.crash()

    @contextmanager
    def unkillable(self) -> Iterator[None]:
        self.script.stays_stuck = True
        yield

    def end_at_last(self, trial: Trial) -> None:
        trial.process.die_after_all()


@pytest.fixture
async def prober() -> AsyncIterator[Prober]:
    prober = Prober()
    yield prober
    await prober.aclose()


@pytest.fixture(params=[Real, Fake])
def bench(request, prober, monkeypatch) -> Real | Fake:
    return request.param(prober, monkeypatch)


async def test_it_reports_once_with_a_way_to_the_server(bench):
    """The report comes when the server answers, and there is no second one."""
    trial = bench.make("quick")
    async with trial.under_way():
        upstream = await trial.wait_ready()
        assert bench.exists(trial)
        assert await bench.name_of(upstream) == "m"
        upstream.close()

    assert trial.upstreams == [upstream]
    assert trial.result is None


async def test_cancelled_while_serving_it_ends_when_the_process_is_gone(bench):
    """At the moment `run` is over, nothing of the server exists."""
    trial = bench.make("quick")
    async with trial.under_way():
        await trial.wait_ready()
        await wait_all_tasks_blocked()
        assert not trial.over

    assert trial.scope.cancelled_caught
    assert not bench.exists(trial)
    assert not trial.process.stuck
    assert trial.deaths == 0


async def test_cancelled_while_loading_it_never_reports(bench):
    """The load is broken off and nothing of the server exists afterwards."""
    trial = bench.make("endless")
    async with trial.under_way():
        await bench.wait_loading(trial)
        assert bench.exists(trial)

    assert trial.scope.cancelled_caught
    assert trial.upstreams == []
    assert not bench.exists(trial)
    assert not trial.process.stuck


async def test_cancelled_before_it_begins_it_starts_nothing(bench):
    """A scope that is cancelled already lets no server come into being for good."""
    trial = bench.make("quick")
    trial.scope.cancel()
    await trial.run()

    assert trial.scope.cancelled_caught
    assert trial.upstreams == []
    assert not bench.exists(trial)


async def test_a_start_that_fails_is_returned(bench):
    """It is a value and no exception, there is no report, and nothing exists afterwards."""
    trial = bench.make("failing")
    failure = await trial.run()

    assert failure is not None
    assert failure.model == "m"
    assert failure.why
    assert trial.upstreams == []
    assert not bench.exists(trial)
    assert not trial.process.stuck


async def test_a_death_while_loading_is_a_failed_start(bench):
    """The process ends by itself before the server is ready."""
    trial = bench.make("endless")
    async with trial.under_way():
        await bench.wait_loading(trial)
        bench.crash(trial)
        assert await trial.wait_over() is not None

    assert trial.upstreams == []
    assert trial.deaths == 0
    assert not bench.exists(trial)


async def test_a_death_while_serving_is_no_failed_start(bench):
    """It is reported once, `run` returns None by itself, and nothing exists afterwards."""
    trial = bench.make("quick")
    async with trial.under_way():
        await trial.wait_ready()
        bench.crash(trial)
        assert await trial.wait_over() is None

    assert len(trial.upstreams) == trial.deaths == 1
    assert not bench.exists(trial)
    assert not trial.process.stuck


async def test_one_attempt_after_another(bench):
    """Each starts where the one before it has left nothing; after a failed one too."""
    for load in ("quick", "failing", "quick"):
        trial = bench.make(load)
        async with trial.under_way():
            if load == "failing":
                assert await trial.wait_over() is not None
            else:
                upstream = await trial.wait_ready()
                assert await bench.name_of(upstream) == "m"
                upstream.close()
        assert not bench.exists(trial)


async def test_a_process_that_cannot_be_killed_is_stuck_until_it_ends(bench):
    """`run` ends all the same and says so; `wait_gone` returns when the process has ended after all."""
    gone = trio.Event()

    async def wait_gone() -> None:
        await trial.process.wait_gone()
        gone.set()

    with bench.unkillable():
        trial = bench.make("quick")
        async with trial.under_way():
            await trial.wait_ready()
    assert trial.process.stuck
    assert bench.exists(trial)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait_gone)
        await wait_all_tasks_blocked()
        assert not gone.is_set()
        bench.end_at_last(trial)
        with trio.fail_after(PATIENCE):
            await gone.wait()
    assert not bench.exists(trial)
