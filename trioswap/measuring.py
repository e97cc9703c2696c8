"""What a model server uses of the memory: measured from its readiness to its end, and told.

How it is measured is the business of `memory`, what follows from it that of the scheduler.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from trioswap.memory import Look, Memory
from trioswap.messages import Event, Measured
from trioswap.residency import Holding
from trioswap.runs import Run, look_after


@asynccontextmanager
async def measuring(
    run: Run, memory: Memory | None, tell: Callable[[str, Event], None]
) -> AsyncIterator[Callable[[], None]]:
    """Gives a function; from its call on what the server of *run* uses is watched, until the block ends.

    The block is cancelled only after the last look: a server that was asked to end may have given back
    some of its memory before a thread has looked.
    """
    begin = trio.Event()
    await trio.lowlevel.checkpoint()  # who was told to end meanwhile does not begin

    async def watch() -> None:
        try:
            await begin.wait()
            await look_after(run, _measure, run, memory, tell)
            await trio.sleep_forever()
        finally:
            block.cancel(reason="its server is to end")

    async with trio.open_nursery() as nursery:
        with trio.CancelScope(shield=True) as block:
            nursery.start_soon(watch)
            yield begin.set
        nursery.cancel_scope.cancel(reason="its server has ended")


async def _measure(run: Run, memory: Memory | None, tell: Callable[[str, Event], None]) -> None:
    """Watch what the server of *run* uses, and *tell* of each new peak; until cancelled, or at once without *memory*.

    Of a container only the client could be seen, so that is left alone.
    """

    def report(peak: Holding) -> None:
        tell(run.spec.name, Measured(run.spec.name, run.attempt, peak))

    def seen(look: Look) -> None:
        run.look = look

    assert run.process is not None
    if memory is not None and run.spec.port_owner == "child":
        await memory.watch(run.process.pids, report, seen)
