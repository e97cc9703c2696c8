"""What an earlier daemon has left and could not end: real processes, in a real daemon and in a fleet."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
from children import PATIENCE, alive, python, wait_gone
from children import running as running_child
from commands import daemon as command
from daemons import Scripted, chat, daemon, eventually, fetch, is_running, pid_of, running, scripted, write_config
from fakes import FakeMachine, Script, spec

from trioswap import guard, instance, leftover, proctree
from trioswap.config import Config, GroupConfig, MemoryConfig
from trioswap.config.changes import compare, effective
from trioswap.errors import ModelRemoved, ModelStuck
from trioswap.fleet import Fleet
from trioswap.leftover import Leftover
from trioswap.lifecycle import State
from trioswap.memory import make_memory

pytestmark = pytest.mark.skipif(not proctree.PROC.joinpath("self/stat").exists(), reason="there is no /proc")

CHAT = "/v1/chat/completions"
A = f"c{os.getpid():07x}"  # others run at the same time
DEAF = python("import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up'); signal.pause()")
# Its descendant has the marker, is in a session of its own, and outlives it.
DEAF_WITH_CHILD = python(
    "import os, signal\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "if os.fork() == 0:\n    os.setsid()\n    print('child', os.getpid(), 'up')\nsignal.pause()"
)
BUDGET = {"memory": {"headroom": 0, "devices": {"ram": "1GiB"}}}
SWAP = {"groups": {"g": {"members": ["a", "c"], "swap": True}}}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No test waits long for who is deaf, or for news of its end."""
    monkeypatch.setattr(instance, "GRACE", 0.1)
    monkeypatch.setattr(leftover, "QUARANTINE_POLL", 0.1)


def left_by(directory: Path, *instances: str) -> None:
    """The file of a daemon that is gone."""
    (directory / instance.FILE).write_text(json.dumps({"pid": 1, "start_time": 2, "instances": instances}))


# ---- the next daemon ------------------------------------------------------------------------------


def models(rules: dict[str, object]) -> dict[str, Scripted]:
    """Of which only one fits at a time: `c`, which never ends by itself, and `a`."""
    size = {"memory": "800MiB"} if rules is BUDGET else {}
    return {
        "c": scripted("--ignore-sigterm", never_kill=True, unload_timeout=0.1, **size),
        "a": scripted(**size),
    }


@pytest.mark.parametrize("rules", [BUDGET, SWAP], ids=["budget", "groups"])
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL], ids=["stopped", "killed"])
async def test_the_next_daemon_starts_nothing_beside_what_was_spared(tmp_path, rules, end):
    """It is stuck as in the daemon before, who asks is told of its pid, and once it has ended all is as ever."""
    both = models(rules)
    path = write_config(tmp_path, both, state_dir=str(tmp_path / "state"), **rules)
    async with command("serve", "-c", path) as first:
        assert (await fetch(first.port, "POST", CHAT, chat("c"))).status == 200
        pid = await pid_of(both["c"].port)
        answer = await fetch(first.port, "POST", CHAT, chat("a"))
        assert (answer.status, f"end pid {pid} by hand" in answer.text) == (503, True)
        first.process.send_signal(end)
        with trio.fail_after(PATIENCE):
            assert await first.process.wait() == (0 if end == signal.SIGTERM else -end)
    try:
        async with command("serve", "-c", path) as second:
            stuck = (
                'the process of model "c" could not be ended and still holds its memory;'
                f" wait until it ends by itself, or end pid {pid} by hand"
            )
            for model, said in (("a", f'model "a" cannot start: {stuck}'), ("c", stuck), ("a", stuck)):
                answer = await fetch(second.port, "POST", CHAT, chat(model))
                assert answer.status == 503
                assert said in answer.json()["error"]["message"]
            assert await is_running(second.port, "c", state="stopping")
            assert "a" not in await running(second.port)
            assert (await fetch(second.port, "POST", "/api/models/unload/c")).status == 503
            assert await stuck_at(second.port) == ["c"]
            assert alive(pid)

            os.kill(pid, signal.SIGKILL)
            await eventually(partial(is_stopped, second.port, "c"))
            assert (await fetch(second.port, "POST", CHAT, chat("a"))).status == 200
    finally:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


async def stuck_at(port: int) -> list[str]:
    return (await fetch(port, "GET", "/api/selfcheck")).json()["stuck"]


async def is_stopped(port: int, model: str) -> bool:
    return model not in await running(port)


async def test_a_daemon_that_is_stopped_does_not_wait_for_it(tmp_path):
    """And the one after knows of it, too."""
    left_by(tmp_path, A)
    async with running_child(DEAF, until="up", env={proctree.MARKER: f"{A}-1:c{guard.SPARED}"}) as child:
        for _ in range(2):
            async with daemon(models(SWAP), state_dir=str(tmp_path), **SWAP) as served:
                assert (await running(served.port))["c"]["state"] == "stopping"
        assert alive(child.pid)


async def test_what_a_reload_says_of_sigkill_is_for_the_daemon_after(tmp_path):
    """Of what the daemon before has left, and does not know as its own."""
    state = tmp_path / "state"
    model = scripted("--ignore-sigterm", unload_timeout=0.1).table("c")
    path = write_config(tmp_path, {"c": {**model, "never_kill": True}}, state_dir=str(state))
    async with command("serve", "-c", path) as first:
        pid = int((await fetch(first.port, "GET", "/upstream/c/pid")).text)
    try:
        async with command("serve", "-c", path) as second:
            assert await stuck_at(second.port) == ["c"]
            write_config(tmp_path, {"c": {**model, "never_kill": False}}, state_dir=str(state))
            answer = await fetch(second.port, "POST", "/api/reload")
            assert answer.json()["updated"] == {"c": ["never_kill"]}
            await eventually(partial(is_noted, state))
            assert alive(pid)
        async with command("serve", "-c", path):
            assert not alive(pid)
    finally:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


async def is_noted(state: Path) -> bool:
    return len(json.loads((state / instance.FILE).read_text())["changed"]) == 1


@pytest.mark.parametrize("marked", ["", guard.SPARED], ids=["", "spared"])
async def test_what_holds_of_sigkill_is_noted_where_the_marker_says_otherwise(marked):
    """Whatever was noted earlier, and only for as long as it does."""
    claim = instance.Claim(A)
    attempts = [claim.marker(1, "m"), claim.marker(2, "m")]
    left = leftover.Left(spec("m"), tuple(attempt + marked for attempt in attempts), [], claim.note)
    for never_kill in (True, False, True, False):
        left.spec = spec("m", never_kill=never_kill)
        holds = guard.SPARED if never_kill else ""
        assert claim.changed == ({attempt + holds for attempt in attempts} if holds != marked else set())


async def test_a_model_that_is_preloaded_is_no_exception(tmp_path, caplog):
    """It is in the books before anybody can ask."""
    left_by(tmp_path, A)
    async with running_child(DEAF, until="up", env={proctree.MARKER: f"{A}-1:c{guard.SPARED}"}):
        async with daemon(models(SWAP), state_dir=str(tmp_path), hooks={"on_startup": {"preload": ["a"]}}, **SWAP):
            await eventually(partial(is_logged, caplog, "preload failed model=a: model"))
        assert "spawned" not in caplog.text


async def is_logged(caplog: pytest.LogCaptureFixture, text: str) -> bool:
    return text in caplog.text


# ---- a fleet ----------------------------------------------------------------------------------------


@pytest.fixture
def script() -> Script:
    return Script(load=0.0, stop=0.0, machine=FakeMachine({"ram": 100}))


@asynccontextmanager
async def fleet_with(config: Config, script: Script, *left: Leftover) -> AsyncIterator[Fleet]:
    """The fleet of *config*, which begins with what is *left*."""
    memory = None if config.memory is None else make_memory(config, script.machine)
    fleet = Fleet(config, script.supervise, memory)
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            await nursery.start(fleet.run, left)
            yield fleet
            fleet.shutdown()
            await fleet.wait_ended()


@asynccontextmanager
async def one_left(model: str, argv=DEAF) -> AsyncIterator[tuple[Leftover, trio.Process]]:
    """A process of *model* that does not end, and what `instance` says of it."""
    marker = f"{A}-1:{model}"
    async with running_child(argv, until="up", env={proctree.MARKER: marker}) as child:
        yield Leftover(model, (marker,), (proctree.look(child.pid),)), child


def sharing(*names: str, memory: int | None = 30, **settings: object) -> Config:
    return Config({n: spec(n, memory=memory) for n in names}, (), memory=MemoryConfig(headroom=0, **settings))


def swapping(*names: str) -> Config:
    return Config({name: spec(name) for name in names}, (GroupConfig("g", names),))


async def ask(fleet: Fleet, model: str) -> str:
    async with fleet.lease(model) as lease:
        return lease.upstream.answer()


def held(fleet: Fleet) -> dict[str, dict[str, int]]:
    return {view.name: dict(view.holding) for view in fleet.views() if view.holding}


async def end(child: trio.Process, fleet: Fleet, model: str) -> None:
    """End *child*; return when the fleet knows."""
    child.kill()
    await child.wait()

    async def is_over() -> bool:
        return fleet.state(model) is State.STOPPED

    await eventually(is_over)


@pytest.mark.parametrize(("used", "holding"), [(10, 30), (70, 70), (0, 30)])
async def test_it_holds_what_it_needs_and_what_it_uses(script, used, holding):
    """The larger of both, and nothing once it has ended."""
    async with one_left("a") as (left, child):
        script.machine.uses[child.pid] = {"ram": used}
        async with fleet_with(sharing("a", "b"), script, left) as fleet:
            assert held(fleet) == {"a": {"ram": holding}}
            assert await ask(fleet, "b") == "b"
            await end(child, fleet, "a")
            assert "a" not in held(fleet)
            assert await ask(fleet, "a") == "a"


async def test_a_machine_that_cannot_tell_is_no_reason_not_to_start(script, monkeypatch, caplog):
    """It holds what it needs."""

    def used_by(*_: object) -> dict[str, int]:
        raise ValueError("seeded")

    monkeypatch.setattr(FakeMachine, "used_by", used_by)
    async with one_left("a") as (left, _), fleet_with(sharing("a", "b", learn=False), script, left) as fleet:
        assert held(fleet) == {"a": {"ram": 30}}
        assert "seeded" in caplog.text


async def test_who_does_not_fit_beside_it_waits_for_nothing(script):
    """It is told at once."""
    async with one_left("a") as (left, child):
        script.machine.uses[child.pid] = {"ram": 75}
        async with fleet_with(sharing("a", "b"), script, left) as fleet:
            with pytest.raises(ModelStuck, match=f'"b" cannot start.*end pid {child.pid} by hand'):
                await ask(fleet, "b")


async def test_its_processes_are_not_other_programs(script):
    """What it uses is taken off once, not as its own and as somebody else's."""
    async with one_left("a") as (left, child):
        script.machine.uses[child.pid] = {"ram": 40}
        async with fleet_with(sharing("a", "b", yield_to_others=True), script, left) as fleet:
            await trio.testing.wait_all_tasks_blocked()
            assert fleet.memory.budget.sizes == {"ram": 100}
            assert await ask(fleet, "b") == "b"


async def test_nothing_is_learned_from_it(script):
    """It may have been started with another command."""
    async with one_left("a") as (left, child):
        script.machine.uses[child.pid] = {"ram": 70}
        async with fleet_with(sharing("a", "b", memory=None), script, left) as fleet:
            assert held(fleet) == {"a": {"ram": 70}}
            await end(child, fleet, "a")
            assert fleet.memory.budget.footprints.learned() == {}
            assert fleet.costs["a"].stop.measured == 0


async def test_a_descendant_keeps_it_there(script):
    """Also one that is found only by the marker, after everybody who was known has ended."""
    async with one_left("a", DEAF_WITH_CHILD) as (left, child), fleet_with(swapping("a", "b"), script, left) as fleet:
        [other] = set(fleet.groups[0].pids()) - {child.pid}
        child.kill()
        await child.wait()
        try:
            assert fleet.groups[0].pids() == [other]
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(ModelStuck):
                await ask(fleet, "b")
        finally:
            os.kill(other, signal.SIGKILL)
        await wait_gone(other)

        async def is_over() -> bool:
            return fleet.state("a") is State.STOPPED

        await eventually(is_over)


async def test_more_may_be_left_than_may_live_together(script):
    """By other rules: nobody starts until all have ended, in whichever order."""
    async with one_left("a") as (one, first), one_left("b") as (two, second):
        async with fleet_with(swapping("a", "b", "c"), script, one, two) as fleet:
            await end(second, fleet, "b")
            with pytest.raises(ModelStuck):
                await ask(fleet, "c")
            await end(first, fleet, "a")
            assert await ask(fleet, "c") == "c"
            assert await ask(fleet, "b") == "b"
            assert fleet.groups[0].limiter.borrowed_tokens == 1
        assert fleet.groups[0].limiter.borrowed_tokens == 0


async def test_a_reload_moves_a_model_to_where_more_are_left(script):
    """All have their tokens there in the step of the reload, and whoever comes next waits until they are gone."""

    def config(*members: str) -> Config:
        groups = [GroupConfig(name, (*names,), exclusive=False) for name, names in zip("gh", members, strict=False)]
        return Config({name: spec(name) for name in "abc"}, tuple(groups))

    before, after = config("ab", "c"), config("abc")
    async with (
        one_left("a") as (one, first),
        one_left("b") as (two, second),
        fleet_with(before, script, one, two) as fleet,
    ):
        assert await ask(fleet, "c") == "c"
        await fleet.reload(effective(before, after), compare(before, after))
        [group] = fleet.groups
        assert group.limiter.borrowed_tokens == 3
        await end(first, fleet, "a")
        await end(second, fleet, "b")
        assert await ask(fleet, "c") == "c"
        assert await ask(fleet, "a") == "a"
        assert (group.limiter.borrowed_tokens, group.limiter.total_tokens) == (1, 1)


# ---- models that are not configured any more ------------------------------------------------------------


async def test_what_is_not_configured_any_more_keeps_its_memory(script):
    """As one that a reload has removed: it is stuck, and forgotten when it has ended."""
    async with one_left("old") as (left, child):
        script.machine.uses[child.pid] = {"ram": 75}
        async with fleet_with(sharing("a", "b"), script, left) as fleet:
            assert held(fleet) == {"old": {"ram": 75}}
            with pytest.raises(ModelStuck, match='process of model "old"'):
                await ask(fleet, "a")
            with pytest.raises(ModelRemoved):
                await ask(fleet, "old")
            child.kill()
            await child.wait()

            async def is_forgotten() -> bool:
                return "old" not in fleet.arrangement.home

            await eventually(is_forgotten)
            assert held(fleet) == {}
            assert await ask(fleet, "a") == "a"
            assert await ask(fleet, "b") == "b"


async def test_it_may_be_configured_again(script):
    """It is not started before what was left has ended."""
    async with one_left("old") as (left, child), fleet_with(sharing("a"), script, left) as fleet:
        before, after = fleet.arrangement.config, sharing("a", "old")
        await fleet.reload(effective(before, after), compare(before, after))
        with pytest.raises(ModelStuck):
            await ask(fleet, "old")
        await end(child, fleet, "old")
        assert await ask(fleet, "old") == "old"


async def test_where_memory_does_not_count_it_is_in_nobodys_way(script, caplog):
    """No rule says anything of it."""
    async with one_left("old") as (left, _), fleet_with(swapping("a", "b"), script, left) as fleet:
        assert "model=old is not configured any more, and its memory is not counted" in caplog.text
        assert await ask(fleet, "a") == "a"
        assert [view.name for view in fleet.views()] == ["a", "b"]
