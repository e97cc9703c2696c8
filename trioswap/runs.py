"""What a swap group keeps of each attempt at a model, and of each request that wants one."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from typing import Final

import attrs
import trio

from trioswap.config import ModelConfig
from trioswap.errors import ModelStuck, TrioswapError
from trioswap.inflight import Entry, InFlight
from trioswap.limits import Limits
from trioswap.memory import Look
from trioswap.messages import BecameReady, Died, Event
from trioswap.process import Supervised
from trioswap.residency import NOTHING, Holding
from trioswap.upstream import Upstream

logger = logging.getLogger(__name__)

# A dying server breaks its connections a moment before its supervisor sees it end.
DEATH_NOTICE: Final = 2.0
# Seconds that its end may take as long as nobody listens at its port: it takes some to let go of much of a GPU.
LONGEST_DEATH: Final = 30.0
_LISTENS_EVERY: Final = 0.25

Supervise = Callable[[ModelConfig, int, Holding], Supervised]
"""Makes the process of one attempt at a model, which may use what it holds of each device."""


@attrs.define(eq=False)
class Run:
    """One attempt of one model, from `Start` until its task has ended."""

    spec: ModelConfig
    attempt: int
    holding: Holding = NOTHING
    """What it may use of each device, in bytes."""
    limiter: trio.CapacityLimiter | None = None
    """Where its token is to come from."""
    limits: Limits = attrs.field(default=attrs.Factory(lambda self: Limits(self.spec), takes_self=True))
    """How long it may take to run dry."""
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    quarantine: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    """Around the wait for a stuck process; cancelled when the daemon ends."""
    stuck: bool = False
    unloading: bool = False
    """Its gate is closed for good, and somebody counts the seconds."""
    process: Supervised | None = None
    upstream: Upstream | None = None
    """The way to the server; None until it is ready."""
    look: Look | None = None
    """What was seen of its memory last."""
    dead: trio.Event = attrs.field(factory=trio.Event)
    """Its server has ended, however it came to that; what it left may still be swept."""
    token: trio.CapacityLimiter | None = None
    """Where the one that it holds has come from."""
    over: trio.Event = attrs.field(factory=trio.Event)
    """Its process tree is gone and its token given back, or it is stuck: nobody needs to wait any longer."""

    async def wait_token(self) -> None:
        """Return when it holds one, of the group that it is in by then."""
        while (limiter := self.limiter) is not self.token:
            assert limiter is not None
            await limiter.acquire_on_behalf_of(self)
            if self.limiter is limiter:
                self.token = limiter
            else:  # it has moved meanwhile
                limiter.release_on_behalf_of(self)

    def take_token(self) -> None:
        """Hold one of its group from now on, for it is there already, however many are: others wait until it is not."""
        assert self.limiter is not None
        there, total = self.limiter.statistics(), self.limiter.total_tokens
        # Nobody can be let in before those who wait.
        self.limiter.total_tokens = there.borrowed_tokens + there.tasks_waiting + 1
        self.limiter.acquire_on_behalf_of_nowait(self)
        self.limiter.total_tokens = total
        self.token = self.limiter

    def move_token(self, limiter: trio.CapacityLimiter) -> None:
        """It is in the group of *limiter* now; if it holds a token, then one of these."""
        before, self.limiter = self.token, limiter
        if before is not None:
            self.take_token()
            before.release_on_behalf_of(self)

    def adapt(self, spec: ModelConfig, *, leaves: bool) -> None:
        """From now on *spec* says what is looked up of it while it runs, how it is stopped, and what takes how long.

        One that *leaves* is stopped as it was started to be; but how long others wait until it has run dry is new.
        """
        self.limits.follow(spec)
        if leaves:
            return
        self.spec = spec
        if self.process is not None:
            self.process.spec = attrs.evolve(spec, env=self.process.spec.env)
        if self.upstream is not None:
            self.upstream.timeouts = spec.timeouts

    async def wait_idle(self, inflight: InFlight) -> None:
        """Return when nothing is in flight on it; whoever still reads from a dead one delays nobody."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancel_when, self.dead, nursery.cancel_scope)
            await inflight.wait_idle(self.attempt)
            nursery.cancel_scope.cancel(reason="nothing is in flight")


async def _cancel_when(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel(reason="the server is dead")


async def wait_over(runs: Sequence[Run]) -> None:
    """Return when *runs*, which are asked to end, have.

    Raises:
        ModelStuck: a process could not be ended.
    """
    await trio.lowlevel.checkpoint()
    for run in runs:
        await run.over.wait()
    stuck = next((run for run in runs if run.stuck), None)
    if stuck is not None:
        raise ModelStuck(stuck.spec.name, stuck.spec.name, () if stuck.process is None else stuck.process.pids())


@attrs.frozen
class News:
    """What `Supervised.run` reports to: each decision happens in the very step that brings the news."""

    run: Run
    tell: Callable[[str, Event], None]
    """Takes what happened to a model."""
    measure: Callable[[], None]
    """Begins to watch what the server uses."""
    is_idle: Callable[[], bool]
    """Whether it serves nothing."""

    def started(self, value: Upstream) -> None:
        """It is ready."""
        self.run.upstream = value
        self.tell(self.run.spec.name, BecameReady(self.run.spec.name, self.run.attempt))
        self.measure()

    def died(self, why: str = "") -> None:
        """It has ended by itself."""
        self.run.dead.set()
        self.tell(self.run.spec.name, Died(self.run.spec.name, self.run.attempt, why))


@attrs.define(eq=False)
class Lease:
    """A request's right to a model: no swap stops it while this is held."""

    model: str
    attempt: int
    upstream: Upstream
    holding: Holding
    """What it may use of each device, in bytes."""
    dead: trio.Event
    """The server has ended: what one that died has set a moment later."""
    served: bool = attrs.field(default=False, init=False)
    """The server has proved that it works; to be ready alone is no proof."""

    def answered(self, status: int) -> None:
        """The head of the server's answer has come; an error of its own (5xx) proves nothing."""
        self.served = status < 500

    async def has_died(self) -> bool:
        """Whether its server, which has broken a connection, is dead; waits for as long as it looks like that."""
        with trio.move_on_after(DEATH_NOTICE):
            await self.dead.wait()
        with trio.move_on_after(LONGEST_DEATH):
            while not self.dead.is_set() and not await self.upstream.listens():
                with trio.move_on_after(_LISTENS_EVERY):
                    await self.dead.wait()
        return self.dead.is_set()


@attrs.define(eq=False)
class Answer:
    """What the scheduler says to one ticket."""

    model: str
    entry: Entry = attrs.field(factory=lambda: Entry(trio.CancelScope()))
    lease: Lease | None = None
    error: TrioswapError | None = None
    given: trio.Event = attrs.field(factory=trio.Event)


@attrs.define(eq=False)
class Desk:
    """What all swap groups of a fleet keep in one place, so that a model can go from one to another while it runs.

    Tickets, attempts and names are those of one fleet, and mean the same in each of its groups.
    """

    tickets: Iterator[int] = attrs.field(factory=lambda: itertools.count(1))
    answers: dict[int, Answer] = attrs.field(factory=dict)
    """For exactly the tickets whose lease() has not returned."""
    labels: dict[int, str] = attrs.field(factory=dict)
    """Of the same tickets: what others call them."""
    runs: dict[str, Run] = attrs.field(factory=dict)
    """For exactly the models whose supervised task has not ended."""
    gates: dict[int, trio.CancelScope] = attrs.field(factory=dict)
    """Attempt -> who waits until it runs dry."""
    inflight: InFlight = attrs.field(factory=InFlight)
    listeners: list[Callable[[], None]] = attrs.field(factory=list)
    """Called at the end of each step in which a model may have changed."""
    tell: dict[str, Callable[[Event], None]] = attrs.field(factory=dict)
    """Model -> who takes news of it: `feed` of the group that it is in."""
    ending: list[Callable[[str], None]] = attrs.field(factory=list)
    """Called with the name of each model whose processes have just gone, before its scheduler knows."""
    ended: list[Callable[[str], None]] = attrs.field(factory=list)
    """The same, after."""

    def changed(self) -> None:
        """Tell the listeners."""
        _call_all(self.listeners)

    def is_ending(self, model: str) -> None:
        """Tell those who want to know before the scheduler does."""
        _call_all(self.ending, model)

    def has_ended(self, model: str) -> None:
        """Tell those who want to know after it."""
        _call_all(self.ended, model)


def _call_all(listeners: Iterable[Callable[..., None]], *about: str) -> None:
    """One that breaks is logged, and costs neither the others nor the step in which it is called."""
    for listener in listeners:
        try:
            listener(*about)
        except Exception:
            logger.exception("a listener broke: %r %s", listener, " ".join(about))


async def look_after(run: Run, look: Callable[..., Awaitable[None]], *args: object) -> None:
    """Look at the memory of *run*; that this breaks is logged, and costs nobody the server or the daemon."""
    try:
        await look(*args)
    except Exception:
        logger.exception("the memory could not be looked at model=%s attempt=%d", run.spec.name, run.attempt)
