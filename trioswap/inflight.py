"""The in-flight tracker: who is being served by which attempt, and when an attempt runs out of work.

Counted by attempt and not by model: whoever waits for an old attempt to run dry must
neither wait for nor cut off what its successor serves (invariant I2).

An entry is made in the very step that grants a lease, before anything awaits, and ends
when the lease does.  Each entry carries the cancel scope of its lease, so that a drain
deadline can cut what does not end by itself.

Who only passes by (invariant I12) counts for nothing, and nobody waits for it; but it is cut with the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import attrs
import trio

from trioswap.errors import LeaseCut


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
        self._passing: dict[int, list[Entry]] = {}  # for exactly the attempts that somebody passes by
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

    @contextmanager
    def passing(self, model: str, attempt: int) -> Iterator[None]:
        """The block uses *attempt* of *model* without being counted.

        Raises:
            LeaseCut: it was cut.
        """
        entry = Entry(trio.CancelScope())
        self._passing.setdefault(attempt, []).append(entry)
        try:
            with entry.scope:
                yield
        finally:
            self._passing[attempt].remove(entry)
            if not self._passing[attempt]:
                del self._passing[attempt]
        if entry.scope.cancelled_caught:
            raise LeaseCut(model, entry.cut_because or "cancelled")

    def count(self, attempt: int) -> int:
        """How many requests *attempt* is serving."""
        return len(self._entries.get(attempt, {}))

    async def wait_idle(self, attempt: int) -> None:
        """Return once nothing is in flight on *attempt*.  May wait for ever: put a cancel scope around it."""
        await trio.lowlevel.checkpoint()
        while self.count(attempt):
            await self._idle.setdefault(attempt, trio.Event()).wait()

    def cut(self, attempt: int, why: str) -> int:
        """Cancel every lease on *attempt*, and who passes by; return how many there were."""
        entries = [*self._entries.get(attempt, {}).values(), *self._passing.get(attempt, [])]
        for entry in entries:
            entry.cut_because = why
            entry.scope.cancel(reason=why)
        return len(entries)
