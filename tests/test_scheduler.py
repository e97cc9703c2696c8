"""The scheduler: every reachable state of small worlds, and single rules shown one by one."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
from worlds import Limits, make_world, stale_events, walk

from trioswap import lifecycle
from trioswap.config import GroupConfig
from trioswap.errors import ModelStuck, ModelUnloaded, ShuttingDown, StartFailed
from trioswap.lifecycle import State
from trioswap.messages import (
    AbandonSwap,
    Arrived,
    BecameReady,
    Cleared,
    Drained,
    Ended,
    GotStuck,
    Grant,
    Left,
    Policy,
    Reject,
    ShutdownBegan,
    Start,
    Stop,
    Swap,
    UnloadAsked,
    WokeUp,
)
from trioswap.residency import Groups
from trioswap.scheduler import Scheduler

DEFAULT = (GroupConfig("(default)", ("a", "b")),)
THREE = (GroupConfig("(default)", ("a", "b", "c")),)
# A newcomer in `big` puts out both members of `pair`: a swap with two victims.
TWO_VICTIMS = (GroupConfig("big", ("a",)), GroupConfig("pair", ("b", "c"), swap=False, exclusive=False))
PERSISTENT = (GroupConfig("swap", ("a", "b")), GroupConfig("stays", ("c",), exclusive=False, persistent=True))

WALKS = {
    "one at a time": (DEFAULT, Limits()),
    "one at a time, unkillable": (DEFAULT, Limits(stuck=True, passing=False)),
    "three models": (THREE, Limits(crashes=False, unloads=False, shutdown=False, cuts=False)),
    "two victims": (TWO_VICTIMS, Limits(unloads=False, shutdown=False, passing=False)),
    "persistent": (PERSISTENT, Limits(unloads=False, shutdown=False, passing=False)),
}


@pytest.mark.parametrize("name", WALKS)
def test_every_reachable_state_keeps_the_laws(name):
    """All invariants that concern scheduling hold in every world that can be reached."""
    groups, limits = WALKS[name]

    assert walk(make_world(groups, limits, ttl=None if len(groups[0].members) > 2 else 2)) > 300


# ---- seeded bugs ----------------------------------------------------------------------------


def lease_not_counted(s: type[Scheduler]) -> None:
    def grant(self, model):
        for ticket in model.waiting:
            self._out.append(Grant(ticket, model.name, model.attempt))
        model.waiting.clear()

    s._grant_all = grant


def only_first_waiter_is_granted(s: type[Scheduler]) -> None:
    original = s._grant_all

    def grant(self, model):
        rest = dict(list(model.waiting.items())[1:])
        for ticket in rest:
            del model.waiting[ticket]
        original(self, model)
        model.waiting.update(rest)

    s._grant_all = grant


def busy_model_is_never_drained(s: type[Scheduler]) -> None:
    s._next_swap = _patched(s._next_swap, lambda self: [setattr(m, "out_at", math.inf) for m in self._claims()])


def gate_stays_open(s: type[Scheduler]) -> None:
    s._close_gate = lambda self, model: setattr(model, "drained", False)


def abandoned_swap_keeps_gates_closed(s: type[Scheduler]) -> None:
    def abandon(self, reason):
        self._out.append(AbandonSwap(self._swap.attempt, reason))
        self._swap = None

    s._abandon = abandon


def victims_stop_before_they_are_drained(s: type[Scheduler]) -> None:
    def clear(self):
        swap = self._swap
        if swap is not None and swap.phase.name == "DRAIN":
            swap.phase = type(swap.phase)["CLEAR"]
            for victim in swap.victims:
                if victim.state is State.DRAINING:
                    self._stop(victim, "hasty")

    s._clear_when_drained = clear


def failed_start_leaves_waiters(s: type[Scheduler]) -> None:
    original = s._ended
    s._ended = lambda self, model, attempt, failure: original(self, model, attempt, None)


def starts_after_shutdown(s: type[Scheduler]) -> None:
    original = s._shut_down

    def shut_down(self):
        original(self)
        self._closing = False

    s._shut_down = shut_down


def ttl_ignores_leases(s: type[Scheduler]) -> None:
    def plan(self, original=s._plan):
        for model in self._models.values():
            if model.state is State.READY and model.idle_since + 2 <= self._now:
                self._stop(model, "ttl")
        original(self)

    s._plan = plan


def nobody_is_evicted(s: type[Scheduler]) -> None:
    s._victims = lambda self, target: []


def left_waiter_stays_in_the_queue(s: type[Scheduler]) -> None:
    s._left = lambda self, ticket: None


def load_goes_on_for_nobody(s: type[Scheduler]) -> None:
    s._give_up_for_others = lambda self: None


def unload_keeps_waiters(s: type[Scheduler]) -> None:
    original = s._unload

    def unload(self, model, error, reason):
        waiting, model.waiting = model.waiting, {}
        original(self, model, error, reason)
        model.waiting = {} if model.state is State.STOPPED else waiting

    s._unload = unload


def crash_is_not_noticed(s: type[Scheduler]) -> None:
    original = s._ended

    def ended(self, model, attempt, failure):
        if model.state is not State.READY:
            original(self, model, attempt, failure)

    s._ended = ended


def _patched(method: Callable, before: Callable) -> Callable:
    def wrapper(self, *args):
        before(self)
        return method(self, *args)

    return wrapper


BUGS = [
    lease_not_counted,
    only_first_waiter_is_granted,
    busy_model_is_never_drained,
    gate_stays_open,
    abandoned_swap_keeps_gates_closed,
    victims_stop_before_they_are_drained,
    failed_start_leaves_waiters,
    starts_after_shutdown,
    ttl_ignores_leases,
    nobody_is_evicted,
    left_waiter_stays_in_the_queue,
    load_goes_on_for_nobody,
    unload_keeps_waiters,
    crash_is_not_noticed,
]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_seeded_bug_is_caught_by_a_law(bug):
    """Each mutant of the scheduler breaks some law somewhere in the walk."""

    class Mutant(Scheduler):
        pass

    bug(Mutant)

    with pytest.raises((AssertionError, KeyError, StopIteration, lifecycle.IllegalTransition)):
        walk(make_world(DEFAULT, Limits(stuck=False), scheduler=Mutant))


def test_stale_news_changes_nothing():
    """What belongs to an attempt that is over changes no state and causes no command (I2)."""
    rng = random.Random(5)
    world = make_world(DEFAULT)
    for _ in range(3000):
        before = world.key()
        for news in stale_events(world):
            commands = world.core.handle(news, float(world.now))

            assert commands == []
            assert world.key() == before
        world.step(rng.choice(list(world.enabled())))


def test_same_events_same_commands():
    """The order in which the configuration names the models makes no difference."""

    def history(names: str) -> list[str]:
        rng = random.Random(7)
        world = make_world((GroupConfig("(default)", tuple(names)),))
        said = []
        for _ in range(400):
            said += map(str, world.step(rng.choice(sorted(world.enabled(), key=str))))
        return said

    assert history("abc") == history("cab")


# ---- single rules ------------------------------------------------------------------------------


def scheduler(groups=DEFAULT, max_wait=60.0, ttl=None) -> Scheduler:
    names = [member for group in groups for member in group.members]
    return Scheduler({name: Policy(max_wait, ttl) for name in names}, Groups(groups))


def bring_up(core: Scheduler, model: str, ticket: int, now: float = 0.0) -> int:
    """Let *ticket* load *model* in an empty place; return the attempt."""
    [swap] = core.handle(Arrived(ticket, model), now)
    assert isinstance(swap, Swap)
    assert core.handle(Cleared(swap.attempt), now) == [Start(model, swap.attempt)]
    assert core.handle(BecameReady(model, swap.attempt), now) == [Grant(ticket, model, swap.attempt)]
    return swap.attempt


def test_one_start_serves_all_waiters():
    """Whoever comes while the model loads is granted in the step that sees it ready (I5)."""
    core = scheduler()
    [swap] = core.handle(Arrived(1, "a"), 0)
    core.handle(Cleared(swap.attempt), 0)

    assert core.handle(Arrived(2, "a"), 1) == []
    assert core.handle(Arrived(3, "a"), 2) == []
    assert core.handle(BecameReady("a", 1), 3) == [Grant(1, "a", 1), Grant(2, "a", 1), Grant(3, "a", 1)]


def test_a_busy_model_is_left_alone_until_max_wait():
    """B waits while A works; at max_wait the gate of A closes, and what A serves may finish."""
    core = scheduler(max_wait=60)
    bring_up(core, "a", 1)

    assert core.handle(Arrived(2, "b"), 5) == []
    assert core.wake_at == 65
    [granted] = core.handle(Arrived(3, "a"), 64.9)
    assert isinstance(granted, Grant)
    assert [type(c) for c in core.handle(WokeUp(), 65)] == [Swap]
    assert core.handle(Arrived(4, "a"), 66) == []  # the gate is closed
    assert core.handle(Left(1), 70) == core.handle(Left(3), 71) == []
    assert [type(c) for c in core.handle(Drained("a", 1), 71)] == [Stop]


def test_an_endless_stream_for_a_does_not_starve_b():
    """With a request for A always in flight, B is served within max_wait, one drain and one load (I11)."""
    core = scheduler(max_wait=60)
    bring_up(core, "a", 1)
    core.handle(Arrived(2, "b"), 0.5)
    ticket = 10
    for now in range(1, 61):
        [granted] = core.handle(Arrived(ticket, "a"), now)
        assert isinstance(granted, Grant)
        core.handle(Left(ticket - 1 if ticket > 10 else 1), now + 0.1)
        ticket += 1
    [swap] = core.handle(WokeUp(), 60.5)

    assert isinstance(swap, Swap)
    assert core.handle(Arrived(99, "a"), 61) == []


def test_an_idle_model_goes_at_once():
    """Nobody waits for a turn that nobody uses."""
    core = scheduler()
    bring_up(core, "a", 1)
    core.handle(Left(1), 1)

    [swap] = core.handle(Arrived(2, "b"), 2)

    assert (swap.model, swap.victims) == ("b", ("a",))


def test_a_model_just_put_out_goes_to_the_back():
    """Of two claims the one kept waiting longest is next; a model put out starts to wait anew."""
    core = scheduler(THREE, max_wait=10)
    bring_up(core, "a", 1)
    core.handle(Arrived(2, "b"), 1)
    core.handle(Arrived(3, "c"), 2)
    core.handle(WokeUp(), 11)
    core.handle(Arrived(4, "a"), 11)
    core.handle(Left(1), 12)
    core.handle(Drained("a", 1), 12)
    core.handle(Ended("a", 1), 13)
    core.handle(Cleared(2), 13)

    grant, swap = core.handle(BecameReady("b", 2), 14)  # c is overdue by now; a has waited since 12

    assert grant == Grant(2, "b", 2)
    assert (swap.model, swap.victims) == ("c", ("b",))


def test_the_last_waiter_that_leaves_calls_the_swap_off():
    """While the victim still drains, its gate opens again and its own queue is served."""
    core = scheduler(max_wait=10)
    bring_up(core, "a", 1)
    core.handle(Arrived(2, "b"), 0)
    core.handle(WokeUp(), 10)
    core.handle(Arrived(3, "a"), 11)

    commands = core.handle(Left(2), 12)

    assert [type(c) for c in commands] == [AbandonSwap, Grant]
    assert core.views()[0].state is State.READY


def test_a_load_that_nobody_wants_gives_way_only_to_others():
    """Alone it may finish and stay; once another model is asked for it is stopped."""
    core = scheduler()
    [swap] = core.handle(Arrived(1, "a"), 0)
    core.handle(Cleared(swap.attempt), 0)

    assert core.handle(Left(1), 1) == []
    [stop] = core.handle(Arrived(2, "b"), 2)
    assert isinstance(stop, Stop)
    assert [type(c) for c in core.handle(Ended("a", 1), 3)] == [Swap]


def test_a_failed_start_is_told_to_every_waiter_with_its_own_error():
    """Each waiter gets a fresh instance, and the next request tries again."""
    core = scheduler()
    [swap] = core.handle(Arrived(1, "a"), 0)
    core.handle(Cleared(swap.attempt), 0)
    core.handle(Arrived(2, "a"), 0)

    one, two = core.handle(Ended("a", 1, StartFailed("a", "boom")), 1)

    assert isinstance(one.error, StartFailed)
    assert one.error is not two.error
    assert [type(c) for c in core.handle(Arrived(3, "a"), 2)] == [Swap]


def test_ttl_counts_from_the_end_of_the_last_request():
    """A long answer does not count as idleness, and a model loaded for nobody has its time too."""
    core = scheduler(ttl=30.0)
    bring_up(core, "a", 1)

    assert core.wake_at == math.inf
    core.handle(Left(1), 100)
    assert core.wake_at == 130
    assert core.handle(WokeUp(), 129.9) == []
    assert [type(c) for c in core.handle(WokeUp(), 130)] == [Stop]


def test_unload_tells_the_waiters_and_lets_the_served_finish():
    """Waiting requests are answered at once; the model stops when nothing is in flight any more."""
    core = scheduler()
    bring_up(core, "a", 1)
    core.handle(Arrived(2, "b"), 1)

    commands = core.handle(UnloadAsked(("a", "b")), 2)

    assert [type(c).__name__ for c in commands] == ["Drain", "Reject"]
    assert isinstance(commands[1].error, ModelUnloaded)
    core.handle(Left(1), 3)
    assert [type(c) for c in core.handle(Drained("a", 1), 3)] == [Stop]


def test_after_shutdown_nothing_starts():
    """Waiting and new requests are told; a load under way is stopped (I8)."""
    core = scheduler()
    [swap] = core.handle(Arrived(1, "a"), 0)
    core.handle(Cleared(swap.attempt), 0)

    reject, stop = core.handle(ShutdownBegan(), 1)

    assert isinstance(reject.error, ShuttingDown)
    assert isinstance(stop, Stop)
    [late] = core.handle(Arrived(2, "b"), 2)
    assert isinstance(late.error, ShuttingDown)


def test_an_unkillable_process_blocks_nobody_for_ever():
    """Who needs its room is told at once; the model that holds it is told too (I6, I7)."""
    core = scheduler()
    bring_up(core, "a", 1)
    core.handle(Left(1), 1)
    core.handle(Arrived(2, "b"), 2)
    core.handle(Drained("a", 1), 2)

    commands = core.handle(GotStuck("a", 1), 30)

    assert [type(c) for c in commands] == [AbandonSwap, Reject]
    assert isinstance(commands[1].error, ModelStuck)
    [again] = core.handle(Arrived(3, "a"), 31)
    assert isinstance(again, Reject)
    core.handle(Ended("a", 1), 60)
    assert [type(c) for c in core.handle(Arrived(4, "b"), 61)] == [Swap]
