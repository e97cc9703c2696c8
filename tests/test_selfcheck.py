"""The daemon's look at itself: no false alarm, nothing forgotten stays forgotten, and whoever waits is answered."""

from __future__ import annotations

import random
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio
from daemons import chat, daemon, fetch, scripted
from fakes import Script, spec
from serving import serving
from trio.testing import MockClock

from trioswap import selfcheck
from trioswap.api import Services
from trioswap.app import App
from trioswap.config import Config, GroupConfig
from trioswap.errors import NotReady, TrioswapError, WaitTooLong
from trioswap.fleet import Fleet
from trioswap.logs import Logs
from trioswap.messages import Arrived, WokeUp
from trioswap.names import Names
from trioswap.notify import feed_watchdog
from trioswap.routing import Routing
from trioswap.scheduler import Scheduler
from trioswap.selfcheck import LOOK, PERSISTS, SelfCheck

HOUR = 3600.0
DAY = 24 * HOUR


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def lines(caplog) -> Callable[[], list[str]]:
    """Gives what the self-check has logged."""
    return lambda: [record.getMessage() for record in caplog.records if record.name == "trioswap.selfcheck"]


@asynccontextmanager
async def checked(script: Script, **changes: object) -> AsyncIterator[tuple[Fleet, SelfCheck, trio.Nursery]]:
    """a, b and c, one at a time, and a self-check that runs."""
    models = {name: spec(name, **changes) for name in "abc"}
    fleet = Fleet(Config(models, (GroupConfig("(default)", ("a", "b", "c")),)), script.supervise)
    check = SelfCheck(fleet)
    async with trio.open_nursery() as nursery:
        await nursery.start(fleet.run)
        await nursery.start(check.run)
        yield fleet, check, nursery
        nursery.cancel_scope.cancel()


async def use(fleet: Fleet, model: str, seconds: float, label: str = "") -> str:
    """One request; the model that answered, or the name of its error."""
    try:
        with trio.fail_after(30 * HOUR):  # on the mock clock: whoever is forgotten fails the test
            async with fleet.lease(model, label=label) as lease:
                await trio.sleep(seconds)
                return lease.upstream.answer()
    except TrioswapError as exc:
        return type(exc).__name__


# ---- no false alarm ------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"drain_timeout": 20.0}, {"ttl": 30.0, "parallel": 1}, {"max_wait": 1.0}])
@pytest.mark.parametrize("seed", range(3))
async def test_swaps_and_drains_are_no_alarm(script, lines, autojump_clock, changes, seed):
    """Three models take turns for an hour, with drains, lines and pauses: each look is content."""
    rng = random.Random(seed)
    async with checked(script, **changes) as (fleet, check, nursery):
        looks = list[tuple[str, ...]]()
        nursery.start_soon(_note_looks, check, looks)
        while trio.current_time() < HOUR:
            for _ in range(rng.randrange(4)):
                nursery.start_soon(use, fleet, rng.choice("abc"), rng.choice([0.0, 1.0, 8.0, 90.0]))
            await trio.sleep(rng.choice([0.0, 3.0, 20.0]))

        assert len(looks) > 600
        assert set(looks) == {()}
        assert [line for line in lines() if "held" not in line] == []
        assert check.given_up == 0
        assert check.is_alive
        assert len([1 for _, text in script.trace if text.endswith("spawned")]) > 20, "there were swaps"


async def _note_looks(check: SelfCheck, looks: list[tuple[str, ...]]) -> None:
    while True:
        looks.append(check.not_ready)
        await trio.sleep(LOOK)


async def test_a_look_costs_little_for_each_of_many_who_wait(script, autojump_clock, monkeypatch):
    """What is the same for all in one line is worked out once, for each model and weight."""
    worked_out = []

    def bound_of(name: str, weight: float, *args: object, **kwargs: object) -> object:
        worked_out.append((name, weight))
        return original(name, weight, *args, **kwargs)

    original = selfcheck.bound_of
    async with checked(script, parallel=1) as (fleet, check, nursery):
        for number in range(300):
            nursery.start_soon(use, fleet, "abc"[number % 3], DAY)
        await trio.testing.wait_all_tasks_blocked()
        monkeypatch.setattr(selfcheck, "bound_of", bound_of)
        check.look()
        assert sorted(worked_out) == [("a", 1.0), ("b", 1.0), ("c", 1.0)]


async def test_a_wait_behind_an_endless_stream_is_told_not_ended(script, lines, autojump_clock):
    """Nothing bounds it without `drain_timeout`: who is in the way is named, and it is served in the end."""
    async with checked(script) as (fleet, check, nursery):
        nursery.start_soon(use, fleet, "a", 24 * HOUR, "req_stream")
        await trio.sleep(10)
        nursery.start_soon(use, fleet, "b", 0.0, "req_waits")
        await trio.sleep(23 * HOUR)

        [held] = check.held
        assert (held.request, held.model, held.by, held.of) == ("req_waits", "b", "req_stream", "a")
        assert held.seconds == pytest.approx(23 * HOUR - 60, abs=2 * LOOK)
        assert (check.not_ready, check.given_up) == ((), 0)
        [first, *others] = lines()
        assert re.search(r"request=req_waits model=b by=req_stream of=a seconds=\d+; drain_timeout", first)
        assert len(others) < 24 * 60, "once a minute at most"
        await trio.sleep(2 * HOUR)
        assert script.trace[-1][1] == "b ready"
        assert check.held == ()


# ---- what was seeded is found ----------------------------------------------------------------------


async def test_a_lost_wake_up_is_found_and_made_good(script, lines, autojump_clock, monkeypatch):
    """A scheduler that never wants to be woken: the gate of a busy model would stay open for ever."""
    original = Scheduler._replan

    def forget(self):
        original(self)
        self.wake_at = float("inf")

    monkeypatch.setattr(Scheduler, "_replan", forget)
    async with checked(script) as (fleet, check, nursery):
        nursery.start_soon(use, fleet, "a", 200.0)
        await trio.sleep(10)
        assert await use(fleet, "b", 0.0) == "b"
        assert trio.current_time() == pytest.approx(200 + 5 + 2 + 5, abs=0.1), "the gate was closed in time"
        [line, *others] = lines()
        assert all("a wait is held" in other for other in others), "found once, and then a drains"
        assert "nothing was decided about b" in line
        assert "models=[a ready" in line
        assert "serves 1 waiting 0" in line
        assert "queue=[ticket 2 for b" in line
        assert "wake_in=inf" in line
        await trio.sleep(2 * LOOK)
        assert check.not_ready == ()


async def test_an_alarm_that_does_not_ring_is_found(script, lines, autojump_clock, monkeypatch):
    """Nobody feeds the scheduler's alarm any more; the look does."""
    monkeypatch.setattr("trioswap.group.SwapGroup._wake_the_scheduler", _sleep_for_ever)
    async with checked(script, ttl=12.0) as (fleet, check, _):
        await use(fleet, "a", 0.0)
        await trio.sleep(30)

        [line] = lines()
        assert "an alarm was missed" in line
        assert script.trace[-1][1] == "a gone", "its time to live is over all the same"
        assert check.not_ready == ()


async def _sleep_for_ever(_: object) -> None:
    await trio.sleep_forever()


async def test_who_is_never_granted_is_answered(script, lines, autojump_clock, monkeypatch):
    """b is ready and has room, and nobody is let in: within four looks there is an error, not silence."""
    original = Scheduler._grant_all
    monkeypatch.setattr(Scheduler, "_grant_all", lambda self, model: model.name == "b" or original(self, model))
    async with checked(script) as (fleet, check, _):
        assert await use(fleet, "b", 0.0, "req_1") == "WaitTooLong"
        assert trio.current_time() <= script.load + 4 * LOOK
        assert check.given_up == 1
        assert check.not_ready == (
            "the scheduler does not answer as it should",
            "a request waited longer than it ever should",
        )
        with pytest.raises(NotReady, match="a request waited longer"):
            check.require_ready()
        assert len(lines()) == 2, "that it was forgotten, and that thinking again is of no help"
        assert all("req_1" in line for line in lines())
        assert await use(fleet, "a", 0.0) == "a", "others are served"
        await trio.sleep(LOOK)
        assert check.not_ready == ()


async def test_who_is_in_no_queue_is_answered(script, lines, autojump_clock, monkeypatch):
    """The scheduler loses a request: the next look finds that nobody knows of it."""
    original = Scheduler.handle

    def lose(self, event, now):
        return [] if isinstance(event, Arrived) and event.ticket == 1 else original(self, event, now)

    monkeypatch.setattr(Scheduler, "handle", lose)
    async with checked(script) as (fleet, check, _):
        assert await use(fleet, "a", 0.0, "req_lost") == "WaitTooLong"
        assert trio.current_time() <= LOOK
        [line] = lines()
        assert "requests are in no queue: req_lost" in line
        assert check.given_up == 1


async def test_who_has_left_leaves_the_queue(script, lines, autojump_clock):
    """An entry that belongs to nobody goes, and does not have a model loaded again and again."""
    async with checked(script) as (fleet, _, nursery):
        [group] = fleet.groups
        nursery.start_soon(use, fleet, "a", 100.0)
        await trio.sleep(10)
        group.core.handle(Arrived(99, "b"), trio.current_time())
        await trio.sleep(LOOK + 1)

        assert group.core.models["b"].queue.count == 0
        [line] = lines()
        assert "nobody waits any more who is in a queue: ticket 99" in line


async def test_a_wait_beyond_its_bound_is_logged_once_and_answered(script, lines, autojump_clock):
    """A start that outlives every limit: no request waits for it in silence."""
    script.load = 100 * HOUR
    async with checked(script) as (fleet, check, _):
        assert await use(fleet, "a", 0.0, "req_1") == "WaitTooLong"
        assert check.given_up == 1
        [line] = lines()
        counted, bound = (float(found) for found in re.search(r"counted=(\d+) bound=(\d+)", line).groups())
        assert bound < counted <= bound + 2 * LOOK
        assert "requests=req_1" in line
        assert "a starting" in line
        await trio.sleep(LOOK + 1)
        assert (check.not_ready, check.is_alive) == ((), True)


def test_the_error_says_what_to_do():
    """503, soon to be tried again."""
    error = WaitTooLong(700.4)

    assert (error.status, error.retry_after) == (503, 1)
    assert "waited 700 s" in error.message


@pytest.mark.breaks_scheduler
async def test_a_scheduler_that_raises_ends_nobody(script, autojump_clock, monkeypatch, caplog):
    """It is logged; the daemon goes on, is not ready, and when it goes on breaking, not alive either."""
    async with checked(script) as (_, check, _nursery):
        original = Scheduler.handle

        def broken(self, event, now):
            if isinstance(event, WokeUp):
                raise ZeroDivisionError("seeded")
            return original(self, event, now)

        with monkeypatch.context() as patch:
            patch.setattr(Scheduler, "handle", broken)
            await trio.sleep(1.5 * LOOK)
            assert check.not_ready == ("the scheduler does not answer as it should",)
            assert check.is_alive
            await trio.sleep(PERSISTS * LOOK)
            assert not check.is_alive
            broke = [record for record in caplog.records if record.name == "trioswap.group"]
            assert {record.exc_info[0] for record in broke} == {ZeroDivisionError}
            assert len(broke) < 2 * trio.current_time(), "it is asked once a second, and by the looks"
        await trio.sleep(2 * LOOK)
        assert (check.not_ready, check.is_alive) == ((), True)


async def test_what_is_stuck_is_listed(script, autojump_clock):
    """Quarantine is not silent, and no reason to send requests elsewhere."""
    script.stays_stuck = True
    async with checked(script, ttl=1.0) as (fleet, check, _):
        await use(fleet, "a", 0.0)
        await trio.sleep(20)

        assert check.stuck == ("a",)
        assert check.not_ready == ()


# ---- the event loop, and the watchdog --------------------------------------------------------------


async def block(clock: MockClock, times: int) -> None:
    """Block the event loop so that each look comes 3 s late."""
    for _ in range(times):
        await trio.sleep(LOOK - 1)
        clock.jump(4.0)
        await trio.lowlevel.checkpoint()


async def test_a_blocked_loop_is_noted(script, lines, autojump_clock):
    """Once is only noted; again and again means not ready, and not alive."""
    async with checked(script) as (_, check, _nursery):
        await block(autojump_clock, 1)
        await trio.sleep(0.1)
        assert lines() == ["the event loop was late seconds=3.0"]
        assert (check.late, check.not_ready, check.is_alive) == (3.0, (), True)
        await block(autojump_clock, PERSISTS - 1)
        await trio.sleep(0.1)
        assert check.not_ready == ("the event loop is blocked again and again",)
        assert not check.is_alive
        await trio.sleep(LOOK)
        assert (check.not_ready, check.is_alive) == ((), True)


async def test_nobody_looks_any_more(script, autojump_clock):
    """What was well once says nothing later on."""
    groups = (GroupConfig("(default)", ("a",)),)
    check = SelfCheck(Fleet(Config({"a": spec("a")}, groups), script.supervise))
    assert check.not_ready == ("it has not looked at itself yet",)
    assert not check.is_alive
    assert check.checked_ms_ago is None
    check.fleet.groups.clear()
    check.look()
    assert (check.not_ready, check.is_alive) == ((), True)
    await trio.sleep(PERSISTS * LOOK + 1)

    assert check.not_ready == ("it has not looked at itself for more than 15 s",)
    assert not check.is_alive


async def test_the_watchdog_starves_while_the_loop_is_blocked(script, autojump_clock, monkeypatch):
    """Signs of life stop when the looks are late again and again, and come again soon after that is over."""
    fed = list[float]()
    monkeypatch.setenv("WATCHDOG_USEC", "20000000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    monkeypatch.setattr("trioswap.notify.notify", lambda state: fed.append(trio.current_time()))
    async with checked(script) as (_, check, nursery):
        nursery.start_soon(feed_watchdog, lambda: check.is_alive)
        await trio.sleep(60.0)
        assert fed == [0, 10, 20, 30, 40, 50, 60] or fed == [0, 10, 20, 30, 40, 50]
        await block(autojump_clock, 8)
        blocked = trio.current_time()
        assert blocked - fed[-1] > 20, "systemd has restarted us by now"
        await trio.sleep(LOOK + 1)
        assert fed[-1] > blocked


# ---- a real daemon ---------------------------------------------------------------------------------


async def test_a_real_daemon_is_ready():
    """From the first request on, loading and swapping or not; nothing is loaded for it."""
    async with daemon({"a": scripted(), "b": scripted()}) as served:
        answer = await fetch(served.port, "GET", "/health/ready")
        assert answer.status == 200
        assert answer.json()["ready"] is True
        assert answer.json()["checked_ms_ago"] >= 0
        assert (await fetch(served.port, "HEAD", "/health/ready")).status == 200
        for model in "ab":
            assert (await fetch(served.port, "POST", "/v1/chat/completions", chat(model))).status == 200
            assert (await fetch(served.port, "GET", "/health/ready")).status == 200
        found = (await fetch(served.port, "GET", "/api/selfcheck")).json()
        assert (found["ready"], found["reasons"], found["stuck"], found["held"]) == (True, [], [], [])


async def test_a_daemon_that_stops_is_not_ready(script):
    """Over the wire, from the application of a daemon whose shutdown has begun: no names, and when to ask again."""
    config = Config({"a": spec("a")}, (GroupConfig("(default)", ("a",)),))
    fleet = Fleet(config, script.supervise)
    services = Services(config, fleet, Logs(), Routing(Names(config), fleet, {}), 0)
    services.check.look()
    fleet.closing.set()
    async with serving(App(services)) as served:
        answer = await fetch(served.port, "GET", "/health/ready")
        found = (await fetch(served.port, "GET", "/api/selfcheck")).json()

    assert (answer.status, answer["retry-after"]) == (503, "5")
    assert (answer.json()["ready"], answer.json()["src"]) == (False, "trioswap")
    assert answer.json()["error"]["message"] == "trioswap is not ready: it is shutting down"
    assert (found["ready"], found["reasons"]) == (False, ["it is shutting down"])
