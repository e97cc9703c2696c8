"""What failed in a row, and until when it is not tried again: a circuit for each model, and one for what all lack.

A failure opens it for a time that doubles with each one in a row; then the next request is a
trial: it closes the circuit or opens it for longer.  Nothing is decided here: the scheduler
says what happened and asks.  It tells news of an attempt that is over from those of the
present one, so an old failure never opens the circuit of a newer attempt (invariant I2).
"""

from __future__ import annotations

import math
from typing import Final

import attrs

from trioswap.errors import ModelCrashed, NothingLeftToStart, StartFailed

# Seconds of life after which a death is the first one again.  Kubernetes wants 10 min, but there nobody sits and waits.
HEALTHY: Final = 60.0
# Seconds in which nobody is put out after a start that could not even be tried: what its error says, too.
PAUSE: Final = 5.0
# Doubling so often is more than any limit, and still a number.
_DOUBLINGS: Final = 64


@attrs.define(eq=False)
class Circuit:
    """The failures of one model since it last proved to work."""

    failures: int = 0
    """In a row."""
    open_until: float = -math.inf
    last: StartFailed | ModelCrashed | None = None
    """The last of them."""
    _since: float = -math.inf
    _doublings: int = -1
    """How often the time has doubled for which it is open since then; -1: it is no time at all."""

    def is_open(self, now: float) -> bool:
        """Whether its model is not to be tried."""
        return now < self.open_until

    def retry_in(self, now: float) -> float:
        """Seconds until it may be tried; 0: it may."""
        return max(0.0, self.open_until - now)

    @property
    def failure(self) -> str:
        """Why it failed last; empty: it has not, since it last proved to work."""
        return "" if self.last is None else self.last.why

    def failed(self, failure: StartFailed | ModelCrashed, first: float, longest: float, now: float) -> None:
        """One more *failure*: open for *first* seconds, or twice as long as the last time, at most *longest*.

        The first death in a row costs no time: it may have been one bad request, and who lost the
        server to it is served by a fresh one.  A start that we could not even try says nothing about
        the model: it is told, and does not count.
        """
        self.last = failure
        if isinstance(failure, NothingLeftToStart):
            return
        self.failures += 1
        self._since, self._doublings = now, self.failures - (2 if isinstance(failure, ModelCrashed) else 1)
        self.open_until = now + self._delay(first, longest)

    def shorten(self, first: float, longest: float) -> None:
        """Be open for no longer than these say now; what is longer counts from the next failure.

        Who was told that it may be tried relies on that, and may be waiting for its start.
        """
        self.open_until = min(self.open_until, self._since + self._delay(first, longest))

    def _delay(self, first: float, longest: float) -> float:
        return min(first * 2.0 ** min(self._doublings, _DOUBLINGS), longest) if self._doublings >= 0 else 0.0

    def close(self) -> None:
        """It works, or an operator wants it to be tried."""
        self.failures, self.open_until, self.last = 0, -math.inf, None

    def refusal(self, now: float) -> StartFailed | ModelCrashed:
        """The last failure anew, for one more who asks; to be called after a failure only."""
        assert self.last is not None
        if not self.is_open(now):
            return self.last.again()
        return self.last.again(times=self.failures, retry_after=math.ceil(self.open_until - now))


@attrs.define(eq=False)
class Shortage:
    """What every start of a domain lacks: while that lasts nobody is put out for one, which would be in vain."""

    until: float = -math.inf
    """When somebody may be put out again, if somebody asks."""
    why: str = ""

    def lasts(self, now: float) -> bool:
        """Whether it is of no use to make room for a start."""
        return now < self.until

    def note(self, failure: StartFailed | ModelCrashed, now: float) -> None:
        """A start has failed so: was that a shortage?"""
        if isinstance(failure, NothingLeftToStart):
            self.until, self.why = now + PAUSE, failure.why

    def over(self) -> None:
        """A start has succeeded."""
        self.until = -math.inf

    def refusal(self, model: str) -> NothingLeftToStart:
        """What who asks for *model* is told."""
        return NothingLeftToStart(model, self.why)
