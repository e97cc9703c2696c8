"""The in-flight tracker: who is being served by which attempt, and when an attempt runs out of work.

Counted by attempt and not by model: whoever waits for an old attempt to run dry must
neither wait for nor cut off what its successor serves (invariant I2).

An entry is made in the very step that grants a lease, before anything awaits, and ends
when the lease does.  Each entry carries the cancel scope of its lease, so that a drain
deadline can cut what does not end by itself.
"""

from __future__ import annotations

import attrs
import trio


@attrs.define(eq=False)
class Entry:
    """One lease being used."""

    scope: trio.CancelScope
    cut_because: str | None = None
    """Why the lease was taken away; None while it is not."""


class InFlight:
    """Counts what is being served, attempt by attempt."""

    def __init__(self) -> None:
        self._entries: dict[int, dict[int, Entry]] = {}
        self._idle: dict[int, trio.Event] = {}  # for exactly the attempts that somebody waits for

    def __repr__(self) -> str:
        """How many requests each busy attempt serves."""
        return f"<InFlight {dict(sorted((attempt, len(entries)) for attempt, entries in self._entries.items()))}>"

    def enter(self, attempt: int, ticket: int, entry: Entry) -> None:
        """Count *ticket* as being served by *attempt*."""
        self._entries.setdefault(attempt, {})[ticket] = entry

    def leave(self, attempt: int, ticket: int) -> None:
        """Count it no more; harmless when it is not counted."""
        entries = self._entries.get(attempt, {})
        entries.pop(ticket, None)
        if not entries:
            self._entries.pop(attempt, None)
            if attempt in self._idle:
                self._idle.pop(attempt).set()

    def count(self, attempt: int) -> int:
        """How many requests *attempt* is serving."""
        return len(self._entries.get(attempt, {}))

    async def wait_idle(self, attempt: int) -> None:
        """Return once nothing is in flight on *attempt*.  May wait for ever: put a cancel scope around it."""
        await trio.lowlevel.checkpoint()
        while self.count(attempt):
            await self._idle.setdefault(attempt, trio.Event()).wait()

    def cut(self, attempt: int, why: str) -> int:
        """Cancel every lease on *attempt*; return how many there were."""
        entries = self._entries.get(attempt, {})
        for entry in entries.values():
            entry.cut_because = why
            entry.scope.cancel(reason=why)
        return len(entries)
