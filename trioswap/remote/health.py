"""Whether a peer answers, as far as is known, and looking after one that does not.

Knowledge comes from requests; a peer that nobody asks is left alone as long as it was not
found down.  What a look is, and what follows from a peer being down, is for others.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Awaitable, Callable
from typing import Final

import attrs
import trio

logger = logging.getLogger(__name__)

# Seconds until a peer that is down is looked at again: at first, doubled each time, and at most.
FIRST_PAUSE: Final = 5.0
LONGEST_PAUSE: Final = 60.0


class PeerState(enum.Enum):
    """Whether a peer answers."""

    UNKNOWN = "unknown"
    """Nobody has asked it yet."""
    UP = "up"
    DOWN = "down"
    """The last attempt to connect failed.  Requests still go there: they find out whether it is back."""


@attrs.frozen
class PeerHealth:
    """A peer's state at one moment."""

    state: PeerState = PeerState.UNKNOWN
    since: float | None = None
    """Trio's time at which this state began."""
    why: str | None = None
    """What went wrong last, when it is down."""


@attrs.define(eq=False)
class Watch:
    """What is known of one peer."""

    name: str
    health: PeerHealth = attrs.field(factory=PeerHealth, init=False)
    _turned: trio.Event = attrs.field(factory=trio.Event, init=False, repr=False)
    """Set, and replaced, when the state changes."""

    def note_up(self) -> None:
        """It has answered."""
        if self.health.state is not PeerState.UP:
            if self.health.state is PeerState.DOWN:
                logger.info("peer is back peer=%s", self.name)
            self._turn(PeerHealth(PeerState.UP, trio.current_time()))

    def note_down(self, why: str) -> None:
        """There was no connection to be had."""
        if self.health.state is PeerState.DOWN:
            self.health = attrs.evolve(self.health, why=why)
        else:
            logger.warning("peer is down peer=%s: %s", self.name, why)
            self._turn(PeerHealth(PeerState.DOWN, trio.current_time(), why))

    def _turn(self, health: PeerHealth) -> None:
        self.health = health
        self._turned.set()
        self._turned = trio.Event()

    async def run(self, look: Callable[[], Awaitable[None]]) -> None:
        """While the peer is down, call *look*, which notes what it sees, from every 5 to every 60 s; never returns."""
        while True:
            if self.health.state is not PeerState.DOWN:
                await self._turned.wait()
            pause = FIRST_PAUSE
            while self.health.state is PeerState.DOWN:
                with trio.move_on_after(pause):
                    await self._turned.wait()  # an ordinary request may notice first
                    break
                await look()
                pause = min(2 * pause, LONGEST_PAUSE)
