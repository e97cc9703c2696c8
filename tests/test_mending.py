"""A scheduler that breaks, at any event and in any way: its domain begins anew, and others notice nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

import attrs
import pytest
import trio
from daemons import chat, connect, daemon, eventually, fetch, scripted, speakers
from fakes import Script, make_group, spec
from trio.testing import wait_all_tasks_blocked

from trioswap.config import Config, GroupConfig
from trioswap.errors import LeaseCut, SchedulerBroke, TrioswapError
from trioswap.fleet import Fleet
from trioswap.group import SwapGroup
from trioswap.lent import POLICY, Lent
from trioswap.lifecycle import State
from trioswap.mending import PAUSE, REASON
from trioswap.messages import (
    Arrived,
    BecameReady,
    CloseGate,
    Died,
    Drained,
    Ended,
    Event,
    GotStuck,
    Grant,
    Left,
    Reject,
    ShutdownBegan,
    Start,
    Stop,
    Swap,
    UnloadAsked,
    WokeUp,
)
from trioswap.scheduler import Scheduler

pytestmark = pytest.mark.breaks_scheduler

CHAT = "/v1/chat/completions"
DAY = 86_400.0


@attrs.define(eq=False)
class Bug:
    """Raises once, at the next *event* of the domain in which model *domain* is."""

    event: type[Event]
    when: str
    """`before` the scheduler knows, or `after` it has decided, so that all commands are lost."""
    domain: str = "a"
    armed: bool = True

    def handle(self, original: Callable, core: Scheduler, event: Event, now: float) -> object:
        hit = self.armed and isinstance(event, self.event) and self.domain in core.models
        if hit and self.when == "before":
            self._strike()
        commands = original(core, event, now)
        if hit:
            self._strike()
        return commands

    def _strike(self) -> None:
        self.armed = False
        raise ZeroDivisionError("seeded")


def seed(monkeypatch: pytest.MonkeyPatch, bug: Bug) -> None:
    original = Scheduler.handle
    monkeypatch.setattr(Scheduler, "handle", lambda core, event, now: bug.handle(original, core, event, now))


@pytest.fixture
def script() -> Script:
    return Script()


@asynccontextmanager
async def two_domains(script: Script, **changes: object) -> AsyncIterator[tuple[Fleet, trio.Nursery]]:
    """a and b, of which one may be there, and so c and d."""
    groups = (GroupConfig("x", ("a", "b"), exclusive=False), GroupConfig("y", ("c", "d"), exclusive=False))
    fleet = Fleet(Config({name: spec(name, **changes) for name in "abcd"}, groups), script.supervise)
    script.on_spawn = partial(alone, script)
    async with trio.open_nursery() as nursery:
        await nursery.start(fleet.run)
        yield fleet, nursery
        nursery.cancel_scope.cancel(reason="seen")


def alone(script: Script, name: str) -> None:
    """Nobody of its own group is there when *name* is spawned (I4)."""
    group = "ab" if name in "ab" else "cd"
    assert not set(group) & script.alive.keys(), f"{name} beside {sorted(script.alive)}"


async def use(fleet: Fleet | SwapGroup, model: str, seconds: float, outcomes: list[str] | None = None) -> str:
    """One request: who answered at its end, or the name of its error."""
    try:
        with trio.fail_after(DAY):
            async with fleet.lease(model) as lease:
                await trio.sleep(seconds)
                outcome = lease.upstream.answer()
    except TrioswapError as exc:
        outcome = type(exc).__name__
    if outcomes is not None:
        outcomes.append(outcome)
    return outcome


# What happens in the scenes below, but for what an operator or a stuck process would have to do.
EVENTS = (Arrived, Left, WokeUp, Drained, BecameReady, Ended, Died)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.__name__)
async def test_a_bug_at_any_event(script, autojump_clock, monkeypatch, caplog, event, when):
    """Swaps and a death in both domains: everybody is answered, the other domain by its own models, and all goes on."""
    bug = Bug(event, when, armed=False)
    seed(monkeypatch, bug)
    ours, theirs = list[str](), list[str]()
    async with two_domains(script, max_wait=10.0, unload_drain_timeout=300.0) as (fleet, nursery):
        for group, outcomes in (("ab", ours), ("cd", theirs)):
            first, second = group
            nursery.start_soon(use, fleet, first, 30.0, outcomes)
            await trio.sleep(6)
            nursery.start_soon(use, fleet, second, 3.0, outcomes)
        bug.armed = True
        await trio.sleep(200)
        for name in ("a", "c"):
            nursery.start_soon(use, fleet, name, 0.0, ours if name == "a" else theirs)
        await trio.sleep(20)
        for name in ("a", "c"):
            if name in script.alive:
                script.alive[name].crash()
        await trio.sleep(20)
        assert not bug.armed, "else there is nothing to see here"
        assert set(theirs) == {"c", "d"}
        assert len(theirs) == len(ours) == 3
        assert set(ours) <= {"a", "b", "SchedulerBroke"}
        assert [group.faults for group in fleet.groups] == [1, 0]
        assert "ZeroDivisionError: seeded" in caplog.text
        for name in "abcdab":
            assert await use(fleet, name, 1.0) == name, "it works again"
        await wait_all_tasks_blocked()
        fleet.shutdown()
        await fleet.wait_ended()
    assert not script.alive
    for group in fleet.groups:
        assert group.limiter.borrowed_tokens == 0
        assert not group._answers
        assert not group._gates


@pytest.mark.parametrize("command", [Grant, Reject, CloseGate, Swap, Start, Stop], ids=lambda command: command.__name__)
async def test_a_command_that_cannot_be_carried_out(script, autojump_clock, monkeypatch, command):
    """The same for what the group does."""
    original, struck = SwapGroup._obey, []

    def obey(self, asked):
        if isinstance(asked, command) and not struck:
            struck.append(asked)
            raise KeyError("seeded")
        original(self, asked)

    monkeypatch.setattr(SwapGroup, "_obey", obey)
    outcomes = list[str]()
    async with two_domains(script, max_wait=10.0, ttl=20.0) as (fleet, nursery):
        for name, seconds in (("a", 25.0), ("b", 3.0), ("a", 0.0)):
            nursery.start_soon(use, fleet, name, seconds, outcomes)
            await trio.sleep(6)
        await trio.sleep(100)
        script.fails = True
        assert await use(fleet, "c", 0.0) in {"StartFailed", "SchedulerBroke"}
        script.fails = False
        assert struck
        assert len(outcomes) == 3
        assert set(outcomes) <= {"a", "b", "SchedulerBroke"}
        await trio.sleep(100)
        for name in "abcd":
            assert await use(fleet, name, 1.0) == name
        fleet.shutdown()
        await fleet.wait_ended()
    assert not script.alive


async def test_what_is_served_may_finish(script, nursery, autojump_clock, monkeypatch):
    """Bounded as in an unload; nothing new is let in, and what loads or is idle ends at once."""
    seed(monkeypatch, bug := Bug(WokeUp, "before", armed=False))
    group = make_group(script, unload_drain_timeout=40.0)
    await nursery.start(group.run)
    short, long, late = list[str](), list[str](), list[str]()
    nursery.start_soon(use, group, "a", 20.0, short)
    nursery.start_soon(use, group, "a", 1000.0, long)
    await trio.sleep(10)
    bug.armed = True
    group.think_again()
    assert group.core.wake_at == trio.current_time() + PAUSE
    nursery.start_soon(use, group, "a", 0.0, late)
    await wait_all_tasks_blocked()
    assert group.core.models["a"].state is State.DRAINING
    await trio.sleep(39)
    assert (short, long, late) == (["a"], [], [])
    await trio.sleep(1.1)
    assert long == [LeaseCut.__name__]
    await trio.sleep(20)
    assert late == ["a"], "it waited for the server that came next"
    assert [entry.why for entry in group.journal.entries if entry.what == "close gate"] == [REASON]
    nursery.cancel_scope.cancel()


async def test_an_unload_that_is_under_way_returns(script, nursery, autojump_clock, monkeypatch):
    """What was asked of the old scheduler is not forgotten by the new one: its models end anyway."""
    seed(monkeypatch, Bug(UnloadAsked, "after"))
    group = make_group(script)
    await nursery.start(group.run)
    nursery.start_soon(use, group, "a", 10.0)
    await trio.sleep(6)
    await group.unload(("a", "b", "c"))

    assert group.faults == 1
    assert not script.alive
    nursery.cancel_scope.cancel()


async def test_a_shutdown_that_breaks_ends_all_the_same(script, autojump_clock, monkeypatch):
    """And nothing starts after it."""
    seed(monkeypatch, Bug(ShutdownBegan, "after"))
    outcomes = list[str]()
    async with two_domains(script, unload_drain_timeout=100.0) as (fleet, nursery):
        nursery.start_soon(use, fleet, "a", 30.0, outcomes)
        await trio.sleep(10)
        nursery.start_soon(use, fleet, "b", 0.0, outcomes)
        await wait_all_tasks_blocked()
        fleet.shutdown()
        await fleet.wait_ended()
    assert sorted(outcomes) == ["SchedulerBroke", "a"]
    assert not script.alive
    assert not any(text == "b spawned" for _, text in script.trace)


async def test_who_is_stuck_stays_stuck(script, nursery, autojump_clock, monkeypatch):
    """Its memory is not there for others after that either."""
    seed(monkeypatch, Bug(GotStuck, "after"))
    script.stays_stuck = True
    group = make_group(script)
    await nursery.start(group.run)
    assert await use(group, "a", 0.0) == "a"
    group.feed(UnloadAsked(("a",)))
    await trio.sleep(10)
    assert group.faults == 1
    assert group.core.models["a"].stuck
    assert await use(group, "b", 0.0) == "ModelStuck"
    script.stays_stuck = False
    script.alive["a"].die_after_all()
    await trio.sleep(10)
    assert await use(group, "b", 0.0) == "b"
    nursery.cancel_scope.cancel()


async def test_memory_that_is_lent_stays_lent(script, nursery, autojump_clock, monkeypatch):
    """There is nothing to end, and who has borrowed it is not to lose it for our bug."""
    seed(monkeypatch, bug := Bug(WokeUp, "before", armed=False))
    group = make_group(script, GroupConfig("all", ("a", "loan"), swap=False))
    group.forget("loan")
    group.add(spec("loan"), POLICY, lambda spec, _attempt, _holding: Lent(spec))
    await nursery.start(group.run)
    outcomes = list[str]()

    async def borrow() -> None:
        async with group.lease("loan"):
            await trio.sleep(1000.0)
        outcomes.append("given back")

    nursery.start_soon(borrow)
    await use(group, "a", 0.0)
    await trio.sleep(10)
    bug.armed = True
    group.think_again()
    await trio.sleep(500)
    assert (script.alive, group.faults) == ({}, 1)
    assert group.core.models["loan"].state is State.READY
    await trio.sleep(500)
    assert outcomes == ["given back"]
    assert group.core.models["loan"].state is State.STOPPED
    nursery.cancel_scope.cancel()


async def test_one_that_always_breaks_keeps_nobody_busy(script, nursery, autojump_clock, monkeypatch):
    """Once a second at most, and whoever asks is told at once; nothing is wedged, nothing is silent."""

    def broken(self, event, now):
        raise ZeroDivisionError("seeded")

    group = make_group(script)
    await nursery.start(group.run)
    assert await use(group, "a", 0.0) == "a"
    monkeypatch.setattr(Scheduler, "handle", broken)
    for _ in range(3):
        assert await use(group, "a", 0.0) == "SchedulerBroke"
    await trio.sleep(100)
    assert 90 < group.faults < 120
    assert not script.alive
    nursery.cancel_scope.cancel()


def test_the_error_says_whose_fault_it_is():
    """503, at once to be tried again."""
    error = SchedulerBroke()

    assert (error.status, error.retry_after) == (503, 1)
    assert "a fault of trioswap" in error.message


async def test_a_real_daemon_goes_on(monkeypatch, caplog):
    """The bug strikes one domain while both stream: both streams end well, readiness tells, then all is as before."""
    bug = Bug(Arrived, "after", domain="b", armed=False)
    seed(monkeypatch, bug)
    monkeypatch.setattr("trioswap.selfcheck.LOOK", 0.05)
    groups = {"x": {"members": ["a"]}, "y": {"members": ["b"], "exclusive": False}}
    async with daemon({"a": scripted(), "b": scripted()}, groups=groups) as served:
        clients = {}
        for name in "ab":
            clients[name] = await connect(served.port)
            await clients[name].ask("POST", CHAT, chat(name, stream=True, chunks=50, chunk_delay=0.02))
            await clients[name].head()
        bug.armed = True
        answer = await fetch(served.port, "POST", CHAT, chat("b"))
        assert (answer.status, answer["retry-after"]) == (503, "1")
        assert "the scheduler of trioswap broke" in answer.json()["error"]["message"]

        async def ready(status: int) -> bool:
            return (await fetch(served.port, "GET", "/health/ready")).status == status

        await eventually(partial(ready, 503))
        await eventually(partial(ready, 200))
        for name, client in clients.items():
            async with client:
                assert speakers(await client.rest()) == [*50 * [name], "[DONE]"]
        for name in "ab":
            assert (await fetch(served.port, "POST", CHAT, chat(name))).status == 200
    assert caplog.text.count("the scheduler broke") == 1
