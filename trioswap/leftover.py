"""What an earlier daemon has left and could not end: in quarantine from the first moment of this one.

`never_kill` spares processes that outlive the daemon, and one that sleeps in the kernel does so, too.  Their
memory is not there for others, whoever started them.  So the model that they belong to begins as one that is
stuck, with what it holds: it is not started beside them, nothing is that they leave no room for, and when
they have ended after all it is stopped, as any other.

Who is left is found by `instance`, which model may live beside which is decided as always.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Final, Protocol

import attrs
import trio

from trioswap import guard, lifecycle, proctree
from trioswap.config import ModelConfig
from trioswap.errors import StartFailed
from trioswap.forecast import amounts
from trioswap.group import SwapGroup
from trioswap.memory import Memory
from trioswap.messages import Ended, GotStuck
from trioswap.process import QUARANTINE_POLL, Report
from trioswap.residency import NOTHING, Holding
from trioswap.runs import Run
from trioswap.scheduler import Scheduler

logger = logging.getLogger(__name__)

# Not a number that this daemon gives to an attempt: those count from 1.
ATTEMPT: Final = 0
# Who has just got SIGTERM may end at once; who has not by then, not so soon.
_LOOK_FIRST: Final = 0.1
_LOOK_GROWTH: Final = 1.5


@attrs.frozen
class Leftover:
    """The processes of one model that an earlier daemon has left."""

    model: str
    markers: tuple[str, ...]
    """Of their attempts: who forks or comes to light later carries one of them, too."""
    processes: tuple[proctree.Process, ...]


class Note(Protocol):
    """`Claim.note`: whether *marker* says what now holds of an attempt, and its processes' do not."""

    def __call__(self, marker: str, *, changed: bool) -> None:
        """Never waits."""
        ...


def not_noted(marker: str, *, changed: bool) -> None:
    """Nothing: there is no next daemon."""


@attrs.define(eq=False)
class Left:
    """Stands for the supervised process of a model that was left: nobody stops it, it is only waited for."""

    _spec: ModelConfig
    _markers: tuple[str, ...]
    _seen: list[proctree.Process]
    _note: Note = not_noted
    stuck: bool = True

    @property
    def spec(self) -> ModelConfig:
        """How its model is configured; what another says of SIGKILL is for the next daemon, which asks it to end."""
        return self._spec

    @spec.setter
    def spec(self, spec: ModelConfig) -> None:
        self._spec = spec
        for marker in self._markers:
            attempt = marker.removesuffix(guard.SPARED)
            for name, holds in ((attempt, not spec.never_kill), (attempt + guard.SPARED, spec.never_kill)):
                self._note(name, changed=holds and name != marker)

    async def run(self, *, task_status: Report) -> StartFailed | None:
        """It has run."""
        await trio.lowlevel.checkpoint()
        return None

    async def wait_gone(self) -> None:
        """Return when nobody is left.  May wait for ever."""
        pause = _LOOK_FIRST
        while self._look():
            await trio.sleep(pause)
            pause = min(pause * _LOOK_GROWTH, QUARANTINE_POLL)

    def pids(self) -> list[int]:
        """Who is left, as far as that can be seen."""
        return [process.pid for process in self._look()]

    def _look(self) -> list[proctree.Process]:
        with contextlib.suppress(OSError):  # nobody can say, so whoever was there still is
            # Not by session: its leader may have gone long ago, and the number be somebody else's.
            found = {process for marker in self._markers for process in proctree.members(-1, marker)}
            ending = [one for one in self._seen if one not in found and proctree.look(one.pid) == one]
            self._seen = sorted([*found, *ending], key=lambda process: process.pid)
        return self._seen


async def adopt(group: SwapGroup, leftover: Leftover, memory: Memory | None, note: Note = not_noted) -> Run:
    """Have what was left in the books of *group*, as the stuck run of its model; `keep` waits for its end.

    What a reload says of SIGKILL is told to *note*.
    It holds what its model needs, and what it is measured to use where that is more.
    """
    process = Left(group.models[leftover.model], leftover.markers, list(leftover.processes), note)
    pids = process.pids()
    holding = NOTHING if memory is None else await _holding(memory, leftover.model, pids)
    run = Run(process.spec, ATTEMPT, holding, group.limiter, stuck=True, process=process)
    run.take_token()
    run.dead.set()
    run.over.set()
    group.desk.runs[leftover.model] = run
    _enter(group.core, run, trio.current_time())
    group.feed(GotStuck(leftover.model, ATTEMPT, tuple(pids)))
    logger.error(
        "quarantined model=%s pids=%s: an earlier daemon has left it%s; until it has ended it is not started anew, and"
        " its memory is not there for others",
        leftover.model,
        ",".join(map(str, pids)),
        f" with {amounts(holding)}" if holding else "",
    )
    return run


async def _holding(memory: Memory, model: str, pids: list[int]) -> Holding:
    """A driver that breaks is no reason not to start: then it holds what it would if it were placed now."""
    try:
        return await memory.held_by(model, pids)
    except Exception:
        logger.exception("the memory could not be looked at model=%s pids=%s", model, pids)
        return memory.budget.place(model, {}) or NOTHING


def _enter(core: Scheduler, run: Run, now: float) -> None:
    """The model of *run*, which was stopped, is stopping."""
    model, tickets = core.release(run.spec.name)
    model.attempt, model.holding, model.placed = run.attempt, run.holding, run.holding
    model.move(lifecycle.Event.START, now)
    model.move(lifecycle.Event.STOP, now)
    core.adopt(model, tickets)


async def keep(group: SwapGroup, run: Run) -> None:
    """Wait until nobody is left of *run*, which `adopt` has made, or the daemon ends; it has ended then."""
    assert run.process is not None
    assert run.token is not None
    desk, name = group.desk, run.spec.name
    try:
        with run.quarantine:
            await run.process.wait_gone()
            logger.info("what an earlier daemon had left has ended model=%s", name)
    finally:
        run.token.release_on_behalf_of(run)
    del desk.runs[name]
    desk.is_ending(name)
    if tell := desk.tell.get(name):  # of the group that it is in by now
        tell(Ended(name, run.attempt, None))
    desk.has_ended(name)
