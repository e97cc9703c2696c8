"""The family of one attempt's processes: who is left of it, signals to all of it, waiting for its end.

When to ask, in which way, and how long to wait is the business of `process`.

Nobody is taken for gone who was not looked for: while no look is to be had, for want of descriptors
(`proctree.SHORTAGE`), whoever was there counts as still there.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Final

import attrs
import trio

from trioswap import proctree
from trioswap.spawning import Child

# A look at /proc takes milliseconds: at first often, then ever less, a quarter late at most.
LOOK_FIRST: Final = 0.02
LOOK_GROWTH: Final = 1.25
LOOK_MAX: Final = 0.25


@attrs.define(eq=False)
class Family:
    """The server of one attempt and whoever descends from it, told by its session and by *marker*."""

    marker: str
    leader: Child | None = None
    """The server, once there is one."""
    _gone: bool = False
    """Nobody is left, and the leader's number may be somebody else's."""
    _seen: list[proctree.Process] = attrs.field(factory=list)
    """Who was left at the last look that succeeded."""

    def __bool__(self) -> bool:
        """Whether anybody is left, be it only a zombie; True, too, when nobody can say."""
        if self.leader is None:
            return False
        return self.leader.returncode is None or bool(self.members()) or not self._gone

    def members(self) -> list[proctree.Process]:
        """Who is left, or was at the last look if none is to be had now.

        Once that is nobody, `proctree.members` must not be asked again.
        """
        if self.leader is None or self._gone:
            return []
        reaped, pid = self.leader.returncode is not None, self.leader.pid
        with contextlib.suppress(OSError):
            # One look may miss a server that forks and ends just then, as daemons do; a second one finds its child.
            self._gone = not (self._look(pid) or self._look(pid)) and reaped
        return self._seen

    def _look(self, leader: int) -> list[proctree.Process]:
        """`proctree.members`, and who was found earlier and is still there.

        Who is ending has lost its environment, and with that the marker, but not yet the memory that it holds.

        Raises:
            OSError: nobody can say.
        """
        found = proctree.members(leader, self.marker)
        ending = [process for process in self._seen if process not in found and proctree.look(process.pid) == process]
        self._seen = found + ending
        return self._seen

    def has_strays(self) -> bool:
        """Whether anybody has the marker, or nobody can say; may be asked at any time, for no number is looked for."""
        try:
            return bool(self._look(-1))
        except OSError:
            return True

    def signal(self, number: int) -> None:
        """Signal everybody, each process once: a second SIGTERM makes some servers give up at once.

        What belongs to another user stays untouched, and so will be found to be stuck.
        """
        group = None
        if self.leader is not None and self.leader.returncode is None:  # not reaped yet, so the number is still ours
            group = self.leader.pid
            self.leader.signal_group(number)
        for process in self.members():
            if group is None or _group_of(process.pid) != group:
                proctree.kill(process, number)

    async def wait_gone(self) -> None:
        """Return when nobody is left.  May wait for ever."""
        if self.leader is not None:
            await self.leader.wait()
        for pause in pauses():
            if not self:
                return
            await trio.sleep(pause)

    async def kill(self) -> None:
        """SIGKILL until nobody is left.  May take for ever."""
        for pause in pauses():
            if not self:
                return
            self.signal(signal.SIGKILL)  # again and again: who forks during a look is found by the next one
            await trio.sleep(pause)

    async def end_strays(self, number: int) -> None:
        """The same with *number* for whoever has the marker, each once."""
        asked: set[proctree.Process] = set()
        for pause in pauses():
            with contextlib.suppress(OSError):
                left = set(self._look(-1))
                if not left:
                    return
                for process in left - asked:
                    proctree.kill(process, number)
                asked |= left
            await trio.sleep(pause)


def pauses() -> Iterator[float]:
    """Seconds between looks at what gives no notice."""
    pause = LOOK_FIRST
    while True:
        yield pause
        pause = min(pause * LOOK_GROWTH, LOOK_MAX)


def _group_of(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except OSError:
        return None
