"""When a server is measured: not before it is ready, and once more before it is asked to end."""

from __future__ import annotations

import trio
from fakes import spec

from trioswap.measuring import measuring
from trioswap.messages import Measured
from trioswap.runs import Run


class SlowMemory:
    """Takes a second for a look, as a driver may that is busy."""

    def __init__(self):
        self.looks = []

    async def watch(self, pids, report, seen):
        """A look at the end."""
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(1)
                self.looks.append(list(pids()))
                report({"ram": 5})
                seen("look")


class Server:
    """Has one process until it is asked to end."""

    def __init__(self):
        self.there = [1]

    def pids(self):
        """Who is there."""
        return self.there

    async def run(self):
        """Serve until it is cancelled."""
        try:
            await trio.sleep_forever()
        finally:
            self.there = []


async def measured(*, ready):
    """What was seen of a server, told of it, and how long its end took, that was or was never *ready*."""
    memory, server, told = SlowMemory(), Server(), []
    run = Run(spec("a"), 3, {}, process=server)
    with run.scope:
        async with measuring(run, memory, lambda name, news: told.append((name, news))) as begin:
            if ready:
                begin()
            run.scope.deadline = trio.current_time() + 5
            await server.run()
    assert trio.current_time() == 5 + len(memory.looks)
    assert run.look == ("look" if ready else None)
    return memory.looks, told


async def test_a_server_is_looked_at_before_it_is_asked_to_end(autojump_clock):
    """Else it may have given back some of what it had."""
    assert await measured(ready=True) == ([[1]], [("a", Measured("a", 3, {"ram": 5}))])


async def test_one_that_was_never_ready_ends_at_once(autojump_clock):
    """Nobody has looked at it, and nobody does."""
    assert await measured(ready=False) == ([], [])


async def test_one_that_is_told_to_end_before_it_has_begun_does_not_begin(autojump_clock):
    """A cancellation that is there already has no last look to wait for."""
    run = Run(spec("a"), 1, {}, process=Server())
    run.scope.cancel()
    with run.scope:
        async with measuring(run, SlowMemory(), lambda *_: None):
            raise AssertionError("it has begun")
    assert run.scope.cancelled_caught


async def test_one_that_ends_by_itself_has_ended(autojump_clock):
    """What it returns is returned."""

    async def ends():
        async with measuring(Run(spec("a"), 1, {}, process=Server()), None, lambda *_: None) as begin:
            begin()
            await trio.sleep(1)
            return "ended"

    assert await ends() == "ended"
