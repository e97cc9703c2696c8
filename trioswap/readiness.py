"""Whether a server is ready, whether it still answers, and whose the port is.

What follows from the answers is decided in `process`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Final
from urllib.parse import urlsplit

import attrs
import trio

from trioswap import proctree
from trioswap.config import ModelConfig
from trioswap.limits import Limits
from trioswap.output import Output
from trioswap.proctree import PortOwner
from trioswap.remote import Prober
from trioswap.stopping import Family, pauses

# A refused probe costs about a millisecond, so the first come quickly; later ones at 2 % of
# the time since the child last said something, so that a long silent load costs no CPU.
PROBE_MIN: Final = 0.01
PROBE_MAX: Final = 0.25
PROBE_SHARE: Final = 0.02
# As probes tell them (`connection.reason`).
_SHORTAGE: Final = tuple(os.strerror(number).lower() for number in proctree.SHORTAGE)


@attrs.frozen
class Port:
    """The port at which a server is asked."""

    number: int
    host: str | None
    asked: bool
    """Whether it matters who listens there."""

    @classmethod
    def of(cls, spec: ModelConfig) -> Port:
        """That of the model *spec*."""
        url = urlsplit(spec.proxy)
        return cls(url.port or 80, url.hostname, spec.port_owner != "any")

    def stranger(self, family: Family) -> str | None:
        """Who else than *family* listens here, in a sentence; None: nobody else, or nobody can say.

        Before the spawn everybody who listens is a stranger.
        """
        if not self.asked:
            return None
        if proctree.port_owner(self.number, self.host, family.members()) is not PortOwner.STRANGER:
            return None
        try:
            owners = ", ".join(f"{p.name} (pid {p.pid})" for p in proctree.who_listens(self.number, self.host))
        except OSError:  # nobody can say (`proctree.SHORTAGE`)
            owners = ""
        return (
            f"port {self.number} belongs to {owners or 'another process'}, not to the server of this model; stop that,"
            ' use ${PORT}, or set port_owner = "any" when the server runs in a container'
        )

    async def wait_free(self, family: Family) -> None:
        """Return when nobody listens here; a stranger will not leave for our sake.  May wait for ever."""
        for pause in pauses():
            with contextlib.suppress(OSError):  # while nobody can say, it is not free
                if not proctree.listening_inodes(self.number, self.host) or self.stranger(family):
                    return
            await trio.sleep(pause)


@attrs.define(eq=False)
class Health:
    """Asks one server at *url*."""

    url: str
    prober: Prober
    last_answer: str = "none was answered"
    """What the last probe found, when that was not that all is well."""

    async def wait_ready(self, output: Output) -> None:
        """Return once the server answers 200.  May wait for ever."""
        while not await self._is_well():
            output.spoke = trio.Event()
            await trio.sleep(PROBE_MIN)
            silence = trio.current_time() - output.last_word
            with trio.move_on_after(max(0.0, min(PROBE_MAX, PROBE_SHARE * silence) - PROBE_MIN)):
                await output.spoke.wait()  # a server that says "ready" is probed at once

    async def wait_dead(self, limits: Limits, is_at_work: Callable[[], bool]) -> int:
        """Return how many probes in a row, every `liveness` seconds, found no answer 200: once `liveness_misses` did.

        Both are what *limits* say by then; without `liveness` this waits for ever.  A server at work
        is not asked, and not judged by what was asked before, for many answer one request at a
        time.  In the very step in which this returns it is not at work.
        """
        missed = 0
        while missed < limits.spec.liveness_misses:
            await limits.sleep("liveness")
            # Asked twice: who has been given a request meanwhile may be busy with it.
            if is_at_work() or await self._is_well() or is_at_work() or self._could_not_ask:
                missed = 0
            else:
                missed += 1
        return missed

    @property
    def _could_not_ask(self) -> bool:
        """Whether the last probe failed because we have no descriptor left, which says nothing about the server."""
        return any(words in self.last_answer for words in _SHORTAGE)

    async def _is_well(self) -> bool:
        answer = await self.prober.ready(self.url)
        self.last_answer = answer or self.last_answer
        return answer is None
