"""The requests to models that are under way: what they are, and how to end one from outside."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import attrs
import trio

from trioswap.errors import Cancelled, NoSuchRequest, TrioswapError
from trioswap.incoming import Incoming

# As they are shown; no daemon gets further.
_NUMBER: Final = re.compile(r"[1-9][0-9]{0,18}")
# Characters of a number or a request id that are repeated, whatever was sent.
_LONGEST: Final = 20


@attrs.define(eq=False)
class Tracked:
    """One request to a model."""

    number: int
    exchange: Incoming
    arrived: float
    """Unix seconds."""
    since: float
    """The same in Trio's time, which nobody sets back."""
    path: str
    """As it came; under `/upstream` what follows the model."""
    model: str = ""
    """The model of ours, or the name at a peer; empty: not known yet."""
    metadata: dict[str, str] = attrs.field(factory=dict)
    let_in: bool = False
    """It has been let through to a server: it may wait for another one, however many wait already."""
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    """What `end` cancels: all of it, or what is `cancellable`."""
    failure: TrioswapError | None = None
    """Why it was ended from outside; None: it was not."""

    def end(self, why: TrioswapError) -> None:
        """End it from outside, if it is not ended yet."""
        self.failure = self.failure or why
        self.scope.cancel(reason=str(why))

    @contextmanager
    def cancellable(self) -> Iterator[None]:
        """From now on `end` cancels this block, once, and no more of the request: its client is to be told.

        Raises:
            TrioswapError: the reason.
        """
        self.scope = trio.CancelScope()
        with self.scope as scope:
            yield
        if scope.cancelled_caught:
            assert self.failure is not None
            raise self.failure


class Tracker:
    """Numbers them, and tells who listens."""

    def __init__(self) -> None:
        self.rows: dict[int, Tracked] = {}
        self.begun: list[Callable[[Tracked], None]] = []
        """Called in the step in which one begins."""
        self.ended: list[Callable[[Tracked], None]] = []
        """Called in the step in which one ends."""
        self._numbers = itertools.count(1)

    def __repr__(self) -> str:
        """How many there are."""
        return f"<Tracker {len(self.rows)} requests>"

    @contextmanager
    def track(self, exchange: Incoming, path: str, model: str = "") -> Iterator[Tracked]:
        """Count the block as a request under way.

        Raises:
            TrioswapError: why it was ended from outside.
        """
        row = Tracked(next(self._numbers), exchange, time.time(), trio.current_time(), path, model)
        self.rows[row.number] = row
        try:
            _tell(self.begun, row)
            with row.scope as scope:
                yield row
        finally:
            del self.rows[row.number]
            _tell(self.ended, row)
        if scope.cancelled_caught:
            assert row.failure is not None
            raise row.failure

    def cancel(self, name: str) -> None:
        """End the request of that number, or of that request id.

        Raises:
            NoSuchRequest: it is over, or never was.
        """
        if _NUMBER.fullmatch(name):
            row = self.rows.get(int(name))
        else:  # the log and the queue show this one, which is random and never a client's
            row = next((row for row in self.rows.values() if row.exchange.request_id == name), None)
        if row is None:
            raise NoSuchRequest(name[:_LONGEST])
        row.end(Cancelled())


def _tell(listeners: list[Callable[[Tracked], None]], row: Tracked) -> None:
    for listener in listeners:
        listener(row)
