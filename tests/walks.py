"""Walks: every world that can be reached from one, with the laws checked on the way."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import laws
from laws import law
from worlds import MAX_WAIT, World

from trioswap.lifecycle import State
from trioswap.messages import (
    Arrived,
    BecameReady,
    CloseGate,
    Command,
    Died,
    Drained,
    Ended,
    Event,
    GotStuck,
    Left,
    Measured,
    OpenGate,
)

STEPS = 80  # more than any of these worlds needs to answer everybody


def walk(start: World, bound: int = 60_000) -> int:
    """Visit every reachable world once; return how many there are.

    The laws are checked inside `step`.  From every new world the shell alone, with clients
    that do nothing more, must be able to answer everybody; what comes too late must change
    nothing; and whoever comes and goes must leave no trace.

    Raises:
        LawBroken: with the shortest history that leads there as a note.
    """
    seen, todo = {start.key()}, deque([start])
    good = set[object]()
    while todo:
        before = todo.popleft()
        for event in list(before.enabled()):
            after = before.fork()
            after.step(event)
            key = after.key()
            if key not in seen:
                assert len(seen) < bound, "the world is larger than it was meant to be"
                seen.add(key)
                todo.append(after)
                _look_at(after, good, traces=len(seen) % 4 == 0)
    return len(seen)


def _look_at(world: World, good: set[object], *, traces: bool) -> None:
    laws.check_views(world)
    late_news_change_nothing(world)
    if traces and world.limits.leaves and not world.closing:
        who_leaves_leaves_no_trace(world)
    settle(world.fork(), good)


def settle(world: World, good: set[object] | None = None) -> None:
    """Let the shell work, and served requests end: everybody who waits must be answered in the end (I5, I6, I11).

    After a shutdown nothing may be left running, except what cannot be killed.  *good* are the
    keys of worlds from which that is known; those on the way are added.
    """
    good = set() if good is None else good
    way = []
    for _ in range(STEPS):
        running = [run for run in world.runs.values() if world.closing and not run.stuck]
        way.append(world.key())
        if way[-1] in good or not (world.waiting or running):
            good.update(way)
            return
        event = next((e for e in world.helpful() if not _is_stuck(world, e)), None)
        if event is None and world.serving:
            event = Left(min(world.serving))
        world.step(event if event is not None else "pass")
    law(False, "everybody is answered, and after shutdown everything ends (I6)")


def _is_stuck(world: World, event: Event) -> bool:
    return isinstance(event, Ended) and event.model in world.runs and world.runs[event.model].stuck


def late_news(world: World) -> Iterator[Event]:
    """News of attempts that are long over, and of requests that are."""
    yield Left(-1)
    for name in world.core.models:
        yield from (Drained(name, -1), BecameReady(name, -1), Ended(name, -1), Died(name, -1), GotStuck(name, -1))
        yield Measured(name, -1, {"gpu0": 1_000})


def late_news_change_nothing(world: World) -> None:
    """What belongs to an attempt that is over changes no state and causes no command (I2)."""
    before = world.key()
    for news in late_news(world):
        law(world.core.handle(news, float(world.now)) == [], "late news cause nothing (I2)")
    law(world.key() == before, "late news change nothing (I2)")


def who_leaves_leaves_no_trace(world: World) -> None:
    """A request that waits until it is overdue and then leaves: all is as if it had never come (I9).

    Only where nothing happened meanwhile that has no way back.
    """
    wait = MAX_WAIT if world.limits.passing else 0
    alone = world.fork()
    said = _pass(alone, wait)
    for name in world.limits.asked or world.core.models:
        if world.core.models[name].state is not State.READY:
            other = world.fork()
            ticket = other.next_ticket
            done = [*said, *other.step(Arrived(ticket, name)), *_pass(other, wait)]
            if all(isinstance(command, OpenGate) or _may_open(command) for command in done):
                other.step(Left(ticket))
                # That it was asked for may count for its time to live; else nothing is left of it.
                other.core.models[name].idle_since = alone.core.models[name].idle_since
                law(other.key() == alone.key(), f"who waited for {name} and left leaves no trace (I9)")


def _may_open(command: Command) -> bool:
    return isinstance(command, CloseGate) and not command.unload


def _pass(world: World, wait: int) -> list[Command]:
    return [command for _ in range(wait) for command in world.step("pass")]
