"""One swap domain at work: carries out what its scheduler decides.

The models of a domain can be in each other's way.  Each runs as a supervised task that
holds a token of the domain's `CapacityLimiter` from before its process is spawned until
the process tree is reaped: even a scheduler with a bug cannot make two of them overlap
where only one fits.  Swaps are serialized by a `trio.Lock`:

    lock -> gates of the victims are closed -> in-flight tracker drained, bounded
         -> victims' scopes cancelled -> their tasks ended -> newcomer started
         -> ready, and what waited for it holds its leases -> unlock

The fast path takes no lock and awaits nothing: `feed` is one synchronous step in which
the scheduler says "granted" and the lease is counted, so there is no instant at which a
request is decided but not yet seen by a swap.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager

import attrs
import trio

from trioswap.config import ModelConfig
from trioswap.errors import LeaseCut, ModelStuck, StartFailed, TrioswapError
from trioswap.inflight import Entry, InFlight
from trioswap.messages import (
    AbandonSwap,
    Arrived,
    BecameReady,
    Cleared,
    Command,
    Died,
    Drain,
    Drained,
    Ended,
    Event,
    GotStuck,
    Grant,
    Left,
    ModelView,
    Policy,
    Reject,
    ShutdownBegan,
    Start,
    Stop,
    Swap,
    UnloadAsked,
    WokeUp,
)
from trioswap.process import Supervised
from trioswap.residency import Residency
from trioswap.scheduler import Scheduler
from trioswap.upstream import Upstream

logger = logging.getLogger(__name__)

# A cut lease ends within a scheduling step or two; what takes longer is a bug and must not hold a swap.
CUT_GRACE = 1.0


@attrs.define(eq=False)
class Run:
    """One attempt of one model, from `Start` until its task has ended."""

    spec: ModelConfig
    attempt: int
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    quarantine: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    """Around the wait for a stuck process; cancelled when the daemon ends."""
    stuck: bool = False
    upstream: Upstream | None = None
    """The way to the server; None until it is ready."""
    dead: trio.Event = attrs.field(factory=trio.Event)
    """Its server has ended, however it came to that; what it left may still be swept."""
    settled: trio.Event = attrs.field(factory=trio.Event)
    """It is ready, or over."""
    over: trio.Event = attrs.field(factory=trio.Event)
    """Its process tree is gone and its token given back, or it is stuck: nobody needs to wait any longer."""


@attrs.frozen
class Lease:
    """A request's right to a model: no swap stops it while this is held."""

    model: str
    attempt: int
    upstream: Upstream
    dead: trio.Event
    """The server has ended: what one that died has set a moment later."""


@attrs.define(eq=False)
class _Answer:
    """What the scheduler says to one ticket."""

    entry: Entry = attrs.field(factory=lambda: Entry(trio.CancelScope()))
    lease: Lease | None = None
    error: TrioswapError | None = None
    given: trio.Event = attrs.field(factory=trio.Event)


class SwapGroup:
    """A swap domain: limiter, lock, nursery and the scheduler they obey."""

    def __init__(
        self,
        models: Mapping[str, ModelConfig],
        residency: Residency,
        supervise: Callable[[ModelConfig, int], Supervised],
        attempts: Iterator[int] | None = None,
    ) -> None:
        self.models = models
        self.core = Scheduler({n: Policy(m.max_wait, m.ttl) for n, m in models.items()}, residency, attempts)
        self.limiter = trio.CapacityLimiter(residency.capacity(frozenset(models)))
        self.inflight = InFlight()
        self._supervise = supervise
        self._tickets = itertools.count(1)
        self._lock = trio.Lock()
        self._answers: dict[int, _Answer] = {}  # for exactly the tickets whose lease() has not returned
        self._runs: dict[str, Run] = {}  # for exactly the models whose supervised task has not ended
        self._swaps: dict[int, trio.CancelScope] = {}
        self._alarm = trio.CancelScope()
        self._closing = False
        self._nursery: trio.Nursery | None = None

    def __repr__(self) -> str:
        """What the scheduler and the tracker say."""
        return f"<SwapGroup {self.core!r} {self.inflight!r}>"

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the model servers of this domain; cancel to stop them all at once.

        After `shutdown()` this returns when every process tree is gone.
        """
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._wake_the_scheduler)
            task_status.started()

    # ---- what others ask for -----------------------------------------------------------------

    @asynccontextmanager
    async def lease(self, model: str) -> AsyncIterator[Lease]:
        """Hold *model* up and serving for the length of the block.

        Waits for its turn and for its start, without bound of its own: the scheduler has one.

        Raises:
            StartFailed, ModelUnloaded, ModelStuck, ShuttingDown: what the scheduler rejected it with.
            LeaseCut: the model was taken away inside the block.
        """
        ticket, answer = next(self._tickets), _Answer()
        self._answers[ticket] = answer
        with answer.entry.scope:
            try:
                self.feed(Arrived(ticket, model))
                if answer.lease is None:  # the fast path has no checkpoint at all
                    await answer.given.wait()
                if answer.error is not None:
                    raise answer.error
                assert answer.lease is not None
                yield answer.lease
            finally:  # sync, so it cannot be interrupted
                del self._answers[ticket]
                if answer.lease is not None:
                    self.inflight.leave(answer.lease.attempt, ticket)
                self.feed(Left(ticket))
        if answer.entry.scope.cancelled_caught:
            raise LeaseCut(model, answer.entry.cut_because or "cancelled")

    async def unload(self, models: tuple[str, ...]) -> None:
        """Drain (bounded) and stop *models*; return when their process trees are gone.

        Requests that wait for them are answered with `ModelUnloaded`.

        Raises:
            ModelStuck: a process survived SIGKILL.
        """
        runs = [self._runs[name] for name in models if name in self._runs]
        self.feed(UnloadAsked(models))
        for run in runs:
            await run.over.wait()
        stuck = next((run for run in runs if run.stuck), None)
        if stuck is not None:
            raise ModelStuck(stuck.spec.name, stuck.spec.name)

    def shutdown(self) -> None:
        """Take no new work, reject what waits, drain (bounded) and stop everything; `run` then returns."""
        self._closing = True
        self.feed(ShutdownBegan())
        self._alarm.cancel(reason="shutdown")
        for run in self._runs.values():
            run.quarantine.cancel(reason="shutdown")

    def hasten(self, why: str) -> None:
        """Cut what is being served: a second signal has come."""
        for run in self._runs.values():
            self.inflight.cut(run.attempt, why)

    def views(self) -> list[ModelView]:
        """Every model as it stands, sorted by name."""
        return self.core.views()

    # ---- the scheduler's hands -----------------------------------------------------------------

    def feed(self, event: Event) -> None:
        """Tell the scheduler, then do as it says.  Sync on purpose: nothing can slip in between."""
        for command in self.core.handle(event, trio.current_time()):
            self._obey(command)
        self._alarm.deadline = self.core.wake_at

    def _obey(self, command: Command) -> None:
        assert self._nursery is not None, "run() owns the tasks"
        _log(command)
        match command:
            case Grant(ticket, model):
                answer, run = self._answers[ticket], self._runs[model]
                assert run.upstream is not None, "only a ready model is granted"
                self.inflight.enter(run.attempt, ticket, answer.entry)
                answer.lease = Lease(model, run.attempt, run.upstream, run.dead)
                answer.given.set()
            case Reject(ticket, error):
                self._answers[ticket].error = error
                self._answers[ticket].given.set()
            case Swap(_, attempt):
                self._swaps[attempt] = trio.CancelScope()
                self._nursery.start_soon(self._swap, command, [self._runs[v] for v in command.victims])
            case AbandonSwap(attempt, reason):
                self._swaps[attempt].cancel(reason=reason)
            case Drain(model, _, reason):
                run = self._runs[model]
                self._nursery.start_soon(self._drain, run, run.spec.unload_drain_timeout, reason)
            case Start(model, attempt):
                run = self._runs[model] = Run(self.models[model], attempt)
                self._nursery.start_soon(self._supervise_run, run)
            case Stop(model, _, reason):
                self._runs[model].scope.cancel(reason=reason)

    async def _swap(self, swap: Swap, victims: list[Run]) -> None:
        """One swap, under the lock: drain, end the victims, let the newcomer start, wait until it is settled."""
        with self._swaps[swap.attempt]:
            async with self._lock:
                async with trio.open_nursery() as nursery:
                    for run in victims:
                        nursery.start_soon(self._drain, run, run.spec.drain_timeout, swap.reason)
                for run in victims:
                    await run.over.wait()
                self.feed(Cleared(swap.attempt))
                newcomer = self._runs.get(swap.model)
                if newcomer is not None:
                    await newcomer.settled.wait()
        del self._swaps[swap.attempt]

    async def _drain(self, run: Run, timeout: float | None, why: str) -> None:
        """Wait until nothing is in flight on *run*; after *timeout* seconds cut what is left."""
        name = run.spec.name
        with trio.move_on_after(math.inf if timeout is None else timeout) as late:
            await self._wait_idle(run)
        if late.cancelled_caught:
            why = f"it was still running {timeout:g} s after its model was to stop ({why})"
            count = self.inflight.cut(run.attempt, why)
            logger.warning("drain deadline cuts requests model=%s count=%d", name, count)
            with trio.move_on_after(CUT_GRACE):
                await self._wait_idle(run)
        self.feed(Drained(name, run.attempt))

    async def _wait_idle(self, run: Run) -> None:
        """Return when nothing is in flight on *run*; whoever still reads from a dead one delays nobody."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancel_when, run.dead, nursery.cancel_scope)
            await self.inflight.wait_idle(run.attempt)
            nursery.cancel_scope.cancel(reason="nothing is in flight")

    async def _supervise_run(self, run: Run) -> None:
        """The supervised task of one attempt: token, process, and the news of its end.

        A stuck process keeps the token: what it holds in memory is not there for others.
        """
        process = self._supervise(run.spec, run.attempt)
        failure: StartFailed | None = None
        async with self.limiter:
            with run.scope:
                failure = await self._run_process(process, run)
            if process.stuck:
                await self._wait_in_quarantine(process, run)
        del self._runs[run.spec.name]
        run.settled.set()
        run.over.set()
        self.feed(Ended(run.spec.name, run.attempt, failure))

    async def _run_process(self, process: Supervised, run: Run) -> StartFailed | None:
        try:
            return await process.run(task_status=_Report(self, run))
        except Exception as exc:  # a bug in the supervision of one model is that model's failure, not the daemon's
            logger.exception("supervision broke model=%s attempt=%d", run.spec.name, run.attempt)
            return StartFailed(run.spec.name, f"internal error: {exc!r}")
        finally:
            run.dead.set()
            if run.upstream is not None:
                run.upstream.close()

    async def _wait_in_quarantine(self, process: Supervised, run: Run) -> None:
        logger.error("process survived SIGKILL and is quarantined model=%s attempt=%d", run.spec.name, run.attempt)
        run.stuck = True
        run.settled.set()
        run.over.set()
        self.feed(GotStuck(run.spec.name, run.attempt))
        with run.quarantine:
            await process.wait_gone()

    async def _wake_the_scheduler(self) -> None:
        """Sleep until `wake_at`, again and again: deadlines, never a ticking loop."""
        while not self._closing:
            self._alarm = trio.CancelScope(deadline=self.core.wake_at)
            with self._alarm:
                await trio.sleep_forever()
            self.feed(WokeUp())


@attrs.frozen
class _Report:
    """What `process.run` reports to: each decision happens in the very step that brings the news."""

    group: SwapGroup
    run: Run

    def started(self, value: Upstream) -> None:
        self.run.upstream = value
        self.group.feed(BecameReady(self.run.spec.name, self.run.attempt))
        self.run.settled.set()

    def died(self) -> None:
        self.run.dead.set()
        self.group.feed(Died(self.run.spec.name, self.run.attempt))


async def _cancel_when(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel(reason="the server is dead")


def _log(command: Command) -> None:
    """The only place decisions are logged."""
    match command:
        case Swap(model, attempt, victims, reason):
            logger.info(
                "swap model=%s attempt=%d evicts=%s reason=%s", model, attempt, ",".join(victims) or "-", reason
            )
        case Stop(model, attempt, reason):
            logger.info("stop model=%s attempt=%d reason=%s", model, attempt, reason)
        case AbandonSwap(attempt, reason):
            logger.info("swap abandoned attempt=%d reason=%s", attempt, reason)
        case Drain(model, attempt, reason):
            logger.info("drain model=%s attempt=%d reason=%s", model, attempt, reason)
        case Reject(ticket, error):
            logger.info("reject ticket=%d error=%s", ticket, error)
        case _:
            logger.debug("%s", command)
