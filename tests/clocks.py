"""For tests with real sockets on a clock (`mock_clock`) that stands still until they move it.

Trio's `autojump_clock` moves whenever all tasks wait, which they also do while the kernel
carries bytes from one to the other: on a loaded machine limits pass that nobody waited for.
So these tests move the clock themselves, once they know who waits for it, and what keeps
them from waiting for ever counts real seconds.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

# Real seconds; only a hang gets there.
GUARD = 60.0


@contextmanager
def guarded() -> Iterator[None]:
    """Fail when the block takes longer than `GUARD`, whatever Trio's clock says."""
    clock = trio.lowlevel.current_clock()

    def give_up() -> None:
        scope.cancel()
        if isinstance(clock, MockClock):
            clock.rate = 1.0  # so that shields end, whose deadlines are on that clock

    with trio.CancelScope() as scope:
        token = trio.lowlevel.current_trio_token()
        timer = threading.Timer(GUARD, token.run_sync_soon, [give_up])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
    assert not scope.cancelled_caught, "the test hangs"


async def passes(clock: MockClock, seconds: float) -> None:
    """Move the clock when all tasks wait, and return when those whose time it was have done what follows.

    Only for when nothing is on its way through the kernel that somebody should have got before.
    """
    await wait_all_tasks_blocked()
    clock.jump(seconds)
    await wait_all_tasks_blocked()
