"""Reading files for a reload, in threads: a file system that is away fails one reload, and the next has its chance.

A call that hangs, as one to a dead NFS server does, cannot be ended: its thread is left to itself.  There
are only so many such threads, and apart from Trio's own, which others need.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar

import attrs
import trio

from trioswap.errors import ConfigError

# Seconds.  Headers of a hundred models come from a slow disk within a few.
LIMIT: Final = 30.0
# At a time.  Many, for each reload that names files which do not answer costs one, and the next may ask elsewhere.
CALLS: Final = 32

_T = TypeVar("_T")


class NoAnswer(ConfigError):
    """Files do not answer."""


@attrs.define(eq=False)
class Reads:
    """Calls functions that read files, and waits for them only so long."""

    limit: float = LIMIT
    """Seconds."""
    _free: trio.CapacityLimiter = attrs.field(factory=lambda: trio.CapacityLimiter(CALLS), init=False)
    """A call that hangs keeps its token until it ends after all."""

    @property
    def hangs(self) -> bool:
        """Whether a call is under way; between two reloads one that hangs."""
        return bool(self._free.borrowed_tokens)

    async def call(self, function: Callable[[], _T], what: str) -> _T:
        """What *function* returns; *what* is that which it reads, for people.

        Raises:
            NoAnswer: it has not answered in time, or so many calls hang already that it was not even asked.
        """
        with trio.move_on_after(self.limit):
            return await trio.to_thread.run_sync(function, abandon_on_cancel=True, limiter=self._free)
        why = f"no answer within {self.limit:g} s (is a file system away?); the configuration stays as it was"
        raise NoAnswer("configuration", [f"{what}: {why}"])
