"""Memory lent to a program that is not ours: a model that never serves, so it waits like one.

It stands in the same line, gets its room by the same plan, and holds it until it is given
back; nobody can put it out.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import attrs
import trio

from trioswap.config import ModelConfig
from trioswap.errors import StartFailed
from trioswap.footprints import Wish
from trioswap.group import SwapGroup
from trioswap.messages import Policy
from trioswap.process import Report
from trioswap.residency import Holding
from trioswap.residency.budget import Budget
from trioswap.upstream import Upstream

# Seconds.  It ends by itself in a few steps, unless the whole group is being cancelled too: then nobody ends it.
# Where the event loop stands still, or the scheduler breaks, it takes longer.
GIVE_BACK: Final = 1.0
# Given back at once when nobody holds it any more; asked for like anything else.
POLICY: Final = Policy(ttl=0.0, yields=False)


@attrs.define(eq=False)
class Lent:
    """Stands for the process of a model server; it is ready at once, and there is no process."""

    spec: ModelConfig
    stuck: bool = False

    async def run(self, *, task_status: Report) -> StartFailed | None:
        """Hold the memory until cancelled."""
        task_status.started(Upstream(self.spec.name, self.spec.proxy))
        await trio.sleep_forever()

    async def wait_gone(self) -> None:
        """Never stuck."""
        await trio.lowlevel.checkpoint()

    def pids(self) -> list[int]:
        """What the other program uses is its business."""
        return []


@asynccontextmanager
async def hold(group: SwapGroup, budget: Budget, name: str, wish: Wish) -> AsyncIterator[Holding]:
    """Lend memory under *name*, which is no model's, for the length of the block: bytes of each device.

    Waits as a request does; models that need the room wait, or are told that they cannot have it.

    Raises:
        DoesNotFit, ModelStuck, MemoryLent, ShuttingDown: the memory is not to be had.
        LeaseCut: the daemon ends, and has waited for it as long as for requests.
    """
    budget.footprints.add(name, wish)
    spec = ModelConfig(name, argv=(name,), proxy="http://127.0.0.1", port_owner="any")  # no process of ours
    group.add(spec, POLICY, lambda spec, _attempt, _holding: Lent(spec))
    try:
        async with group.lease(name) as lease:
            yield lease.holding
    finally:
        if (run := group.desk.runs.get(name)) is not None:
            # Shielded, or a cancelled holder would leave it in the books.
            with trio.move_on_after(GIVE_BACK, shield=True):
                await run.over.wait()
        if name in group.desk.runs:  # forgotten when it has ended, like a model that is not configured any more
            group.core.models[name].removed = True
        else:
            group.forget(name)
            budget.footprints.remove(name)
