"""The simulation itself: its fakes keep the contracts of what they stand for, a seed replays, and laws can be broken.

The long run is `nox -s simulate`; here are some minutes of a few worlds.
"""

from __future__ import annotations

import math
import os
import random
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import attrs
import pytest
import sim_machine
import sim_mutants
import simulate as runner
import test_supervised
import trio
from attempts import Trial
from children import PATIENCE
from fakes import FakeMachine, spec
from origins import CHUNKED, Server, refused_port
from sim_days import simulate
from sim_machine import Account, Fate, Request, WatchedFleet

from trioswap.config import Config, GroupConfig
from trioswap.errors import UpstreamFailed
from trioswap.scheduler import Scheduler
from trioswap.upstream import Upstream

CONFIG = Config({"m": spec("m", unload_timeout=0.0)}, (GroupConfig("(default)", ("m",)),), memory=None)


def make_account(fate):
    """One in which every attempt has the fate that is in *fate* when it begins."""
    return Account(
        config=CONFIG, rng=random.Random(0), numbers=lambda name: fate[0], machine=FakeMachine({}), bound=lambda *_: 0.0
    )


# ---- a server keeps the contract of a supervised process ------------------------------------------------


class Simulated:
    """What the contract tests of `test_supervised` ask for, with a simulated server."""

    def __init__(self, monkeypatch):
        self.fate = [Fate(0.0, 0.0)]
        self.account = make_account(self.fate)
        self.account.fleet = WatchedFleet(CONFIG, self.account.supervise)
        self.attempts = 0
        monkeypatch.setattr(sim_machine, "KILL_WAIT", 0.0)

    def make(self, load):
        changes = {"quick": {}, "endless": {"load": math.inf}, "failing": {"load": 1.0, "fails_at": 0.0}}
        self.fate[0] = attrs.evolve(self.fate[0], **{"load": 0.0, "fails_at": math.inf, **changes[load]})
        self.attempts += 1
        return Trial(self.account.supervise(CONFIG.models["m"], self.attempts))

    async def wait_loading(self, trial):
        while trial.process.phase != "loading":
            await trio.lowlevel.checkpoint()

    async def name_of(self, upstream):
        self.account.requests["r1"] = Request(1, "m")
        async with upstream.request("GET", b"/", [], b"r1") as answer:
            return b"".join([chunk async for chunk in answer.chunks()]).decode().split()[1]

    def exists(self, trial):
        return bool(self.account.alive)

    def crash(self, trial):
        trial.process.die()

    @contextmanager
    def unkillable(self):
        self.fate[0] = attrs.evolve(self.fate[0], stuck=math.inf)
        yield

    def end_at_last(self, trial):
        trial.process.come_back()


@pytest.fixture
def bench(monkeypatch):
    return Simulated(monkeypatch)


# The very tests that the real process passes.
globals().update({name: test for name, test in vars(test_supervised).items() if name.startswith("test_")})


# ---- the way to it keeps the contract of an upstream -----------------------------------------------------


class RealWay:
    """`Upstream` toward a server on a real socket."""

    async def open(self, nursery, behaviour):
        self.left = trio.Event()

        async def script(end):
            await end.request()
            if behaviour != "dies at once":
                await end.say(CHUNKED + b"5\r\nhello\r\n")
            if behaviour == "answers":
                await end.say(b"0\r\n\r\n")
            if behaviour in ("answers", "waits"):
                await end.gone()
                self.left.set()

        if behaviour == "is gone":
            return Upstream("m", f"http://127.0.0.1:{refused_port()}")
        return Upstream("m", (await Server(script).start(nursery)).url)

    async def wait_left(self):
        await self.left.wait()

    body = b""


class SimulatedWay:
    """The same, simulated."""

    body = b"r1"

    async def open(self, nursery, behaviour):
        account = make_account([Fate(0.0, 0.0)])
        faults = {"dies at once": "killed", "dies within": "killed late"}
        account.requests["r1"] = Request(1, "m", pieces=2, fault=faults.get(behaviour, ""))
        if behaviour == "waits":
            account.requests["r1"].gap = math.inf
        self.server = account.supervise(CONFIG.models["m"], 1)
        self.server.phase = "ready"
        if behaviour == "is gone":
            self.server.die()
        return sim_machine.Way(self.server)

    async def wait_left(self):
        assert not self.server.talks


@pytest.fixture(params=[RealWay, SimulatedWay])
def way(request):
    return request.param()


def ask(origin, way):
    return origin.request("POST", b"/v1/chat/completions", [], way.body)


async def test_an_answer_ends(way, nursery):
    """Its pieces come, and then it is over."""
    origin = await way.open(nursery, "answers")
    with trio.fail_after(PATIENCE):
        async with ask(origin, way) as answer:
            assert answer.status == 200
            assert b"".join([chunk async for chunk in answer.chunks()])
    origin.close()


@pytest.mark.parametrize("behaviour", ["dies at once", "is gone"])
async def test_a_failure_before_the_first_byte_says_so(way, nursery, behaviour):
    """Then the request may be sent again (I14)."""
    origin = await way.open(nursery, behaviour)
    with trio.fail_after(PATIENCE), pytest.raises(UpstreamFailed) as caught:
        async with ask(origin, way):
            pass
    assert caught.value.before_first_byte


async def test_a_failure_within_an_answer_says_so(way, nursery):
    """What came must not be taken for all of it, nor be asked for again."""
    origin = await way.open(nursery, "dies within")
    pieces = []
    with trio.fail_after(PATIENCE):
        async with ask(origin, way) as answer:
            with pytest.raises(UpstreamFailed) as caught:
                pieces.extend([chunk async for chunk in answer.chunks()])
    assert not caught.value.before_first_byte


async def test_what_is_closed_takes_no_more(way, nursery):
    """A connection of it could reach another server on the same port."""
    origin = await way.open(nursery, "answers")
    origin.close()
    with trio.fail_after(PATIENCE), pytest.raises(UpstreamFailed) as caught:
        async with ask(origin, way):
            pass
    assert caught.value.before_first_byte


async def test_what_is_under_way_outlives_the_closing(way, nursery):
    """Who is being answered is so to the end."""
    origin = await way.open(nursery, "answers")
    with trio.fail_after(PATIENCE):
        async with ask(origin, way) as answer:
            origin.close()
            assert b"".join([chunk async for chunk in answer.chunks()])


async def test_the_server_hears_who_leaves(way, nursery):
    """Leaving the block early ends the work at the server."""
    origin = await way.open(nursery, "waits")
    with trio.fail_after(PATIENCE):
        async with ask(origin, way) as answer:
            assert await anext(answer.chunks())
        await way.wait_left()
    origin.close()


# ---- worlds ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_no_law_is_broken(seed):
    """Some minutes of a world in which much goes wrong."""
    report = simulate(seed, 0.2)

    assert not report.broken
    assert report.requests
    assert report.faults


def test_a_seed_replays_in_another_process():
    """The history is the same to the last word, whatever the hashes of names are there."""
    program = "from sim_days import simulate; report = simulate(3, 0.2); print(report.digest, report.requests)"
    paths = str(Path(__file__).parent), str(Path(__file__).parent.parent)
    told = set()
    for hashes in "12":
        environ = {**os.environ, "PYTHONHASHSEED": hashes, "PYTHONPATH": os.pathsep.join(paths)}
        run = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, check=True, timeout=60)
        told.add(run.stdout)

    assert len(told) == 1


@pytest.mark.parametrize(
    ("mutant", "law"),
    [
        (sim_mutants.lease_dropped_early, "no more are served at once|is stopped while it serves"),
        (sim_mutants.waiter_forgotten, "whoever waits is in the queue"),
        (sim_mutants.token_given_back_early, "a process holds its token"),
    ],
)
def test_a_bug_is_noticed(mutant, law, monkeypatch):
    """Some world shows it, and the law that it breaks is the one that complains (all mutants: `--mutants`)."""
    mutant(monkeypatch)
    reports = (simulate(seed, 0.25) for seed in range(10))

    assert re.search(law, next(report.broken for report in reports if report.broken))


def test_a_scheduler_that_breaks_is_noticed(monkeypatch):
    """Its group would mend that, and the daemon go on; here it is a bug."""

    def left(self, ticket, *, served):
        raise RuntimeError("a bug")

    monkeypatch.setattr(Scheduler, "_left", left)

    assert simulate(0, 0.25).broken == "nothing of ours breaks (I13): RuntimeError('a bug')"


# ---- the command -------------------------------------------------------------------------------------------


def breaks_nothing(patch):
    """No bug."""


def patches_what_is_gone(patch):
    """A bug in the mutant itself: what it patches is called in another way now."""
    patch.setattr(Scheduler, "_left", lambda self: None)


@pytest.mark.parametrize(
    ("mutant", "code", "says"),
    [
        (sim_mutants.lease_dropped_early, 0, "1 of 1 mutants noticed"),
        (breaks_nothing, 1, "NOT NOTICED in 2 seeds"),
        (patches_what_is_gone, 1, "DOES NOT APPLY"),
    ],
)
def test_a_mutant_must_be_noticed(mutant, code, says, monkeypatch, capsys):
    """And by a law: one that goes unnoticed is a failure, as is one that does not fit the code any more."""
    monkeypatch.setattr(runner, "MUTANTS", [mutant])
    monkeypatch.setattr(runner, "MUTANT_SEEDS", 2)
    monkeypatch.setattr(runner, "MUTANT_SPAN", 0.05)

    assert runner.run_mutants(1) == code
    said = capsys.readouterr().out
    assert said.startswith("(no mutant)")
    assert says in said


def test_a_world_in_which_a_law_is_broken_can_be_replayed(monkeypatch, capsys):
    """Its seed is printed with the command for it, and the exit code says that there is one."""
    monkeypatch.setattr(runner, "SPAN", 0.1)
    sim_mutants.lease_dropped_early(monkeypatch)

    assert runner.run_worlds(3, 1, 1) == 1
    assert "replay: python tests/simulate.py --seed 3 --trace" in capsys.readouterr().out
