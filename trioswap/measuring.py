"""What a model server uses of the memory: measured from its readiness to its end, and told.

How it is measured is the business of `memory`, what follows from it that of the scheduler.
"""

from __future__ import annotations

from collections.abc import Callable

from trioswap.memory import Memory
from trioswap.messages import Event, Measured
from trioswap.residency import Holding
from trioswap.runs import Run


async def measure(run: Run, memory: Memory | None, tell: Callable[[str, Event], None]) -> None:
    """Watch what the server of *run* uses, and *tell* of each new peak; until cancelled, or at once without *memory*.

    Of a container only the client could be seen, so that is left alone.
    """

    def report(peak: Holding) -> None:
        assert memory is not None
        run.used, run.free = peak, memory.free()
        tell(run.spec.name, Measured(run.spec.name, run.attempt, peak))

    assert run.process is not None
    if memory is not None and run.spec.port_owner == "child":
        await memory.watch(run.process.pids, report)
