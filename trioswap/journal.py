"""What the schedulers have decided lately: one log line each, and the last ones kept for whoever asks why."""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import Final

import attrs

from trioswap.forecast import amounts
from trioswap.messages import Cause, CloseGate, Command, OpenGate, Reject, Start, Stop, Swap

logger = logging.getLogger(__name__)

KEPT: Final = 200


@attrs.frozen
class Entry:
    """One decision about a model."""

    at: float
    """Unix seconds, to be shown to people."""
    model: str
    what: str
    """`start`, `evict`, `stop`, `close gate`, `open gate`."""
    why: str
    cause: Cause = Cause.OTHERS
    """For whose sake a server ends."""


@attrs.define(eq=False)
class Journal:
    """The last decisions, oldest first."""

    entries: deque[Entry] = attrs.field(factory=lambda: deque(maxlen=KEPT))

    def note(self, command: Command) -> None:
        """Log *command*, and keep it if it is about a model; the only place where decisions are logged."""
        match command:
            case Swap(_, evictions):
                for eviction in evictions:
                    self._keep("evict", eviction.model, eviction.attempt, str(eviction))
            case CloseGate(model, attempt, reason, _, cause):
                self._keep("close gate", model, attempt, reason, cause)
            case OpenGate(model, attempt, reason):
                self._keep("open gate", model, attempt, reason)
            case Stop(model, attempt, reason, cause):
                self._keep("stop", model, attempt, reason, cause)
            case Start(model, attempt, holding):
                room = f"; it may use {amounts(holding)}" if holding else ""
                self._keep("start", model, attempt, f"it is wanted{room}")
            case Reject(ticket, error):
                logger.info("reject ticket=%d error=%s", ticket, error)
            case _:
                logger.debug("%s", command)

    def take(self, other: Journal) -> None:
        """Keep what another one has kept, too."""
        entries = sorted([*self.entries, *other.entries], key=lambda entry: entry.at)
        self.entries.clear()
        self.entries.extend(entries)

    def _keep(self, what: str, model: str, attempt: int, why: str, cause: Cause = Cause.OTHERS) -> None:
        logger.info("%s model=%s attempt=%d reason=%s", what, model, attempt, why)
        self.entries.append(Entry(time.time(), model, what, why, cause))
