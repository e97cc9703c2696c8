"""One swap domain at work: carries out what its scheduler decides.

The models of a domain can be in each other's way.  Each runs as a supervised task that
holds a token of the domain's `CapacityLimiter` from before its process is spawned until
the process tree is reaped: even a scheduler with a bug cannot make two of them overlap
where only one fits.  Swaps are serialized by a `trio.Lock`:

    gates of the victims are closed, and what they serve runs out, bounded (nobody else waits for that)
    lock -> in-flight tracker drained -> victims' scopes cancelled -> their tasks ended -> unlock

and in the very step that the last task has ended the scheduler starts the newcomer.

The fast path takes no lock and awaits nothing: `feed` is one synchronous step in which
the scheduler says "granted" and the lease is counted, so there is no instant at which a
request is decided but not yet seen by a swap.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import trio

from trioswap.config import ModelConfig
from trioswap.errors import LeaseCut, SchedulerBroke, StartFailed, TrioswapError
from trioswap.journal import Journal
from trioswap.learning import Costs
from trioswap.measuring import measuring
from trioswap.memory import Memory
from trioswap.mending import begin_anew, snapshot
from trioswap.messages import (
    Arrived,
    CloseGate,
    Command,
    Drained,
    Ended,
    Event,
    GotStuck,
    Grant,
    Left,
    ModelView,
    OpenGate,
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
from trioswap.runs import Answer, Desk, Lease, News, Run, Supervise, look_after, wait_over
from trioswap.scheduler import Scheduler

logger = logging.getLogger(__name__)

# A cut lease ends within a scheduling step or two; what takes longer is a bug and must not hold a swap.
CUT_GRACE = 1.0


class SwapGroup:
    """A swap domain: limiter, lock, nursery and the scheduler they obey."""

    def __init__(
        self,
        models: Mapping[str, ModelConfig],
        core: Scheduler,
        supervise: Supervise,
        memory: Memory | None = None,
        desk: Desk | None = None,
    ) -> None:
        self.models = dict(models)
        self.core = core
        self.limiter = trio.CapacityLimiter(core.residency.capacity(frozenset(models)))
        self.journal = Journal()
        self.desk = desk = desk or Desk()
        self.inflight, self.labels = desk.inflight, desk.labels
        self._answers, self._runs, self._gates = desk.answers, desk.runs, desk.gates
        self._supervise = dict.fromkeys(models, supervise)
        self._memory = memory
        self._lock = trio.Lock()
        self._alarm = trio.CancelScope()
        self.faults = 0
        """How often the scheduler has broken and begun anew."""
        self._closing = False
        self._nursery: trio.Nursery | None = None
        desk.tell.update(dict.fromkeys(models, self.feed))

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
    async def lease(self, model: str, weight: float | None = None, label: str = "") -> AsyncIterator[Lease]:
        """Hold *model* up and serving for the length of the block.

        Waits for its turn and for its start, without bound of its own: the scheduler has one,
        and *weight* says how fast the waiting counts.  Whoever looks sees it as *label*.

        Raises:
            StartFailed, ModelCrashed, NothingLeftToStart, ModelUnloaded, ModelRemoved, ModelStuck, DoesNotFit,
                MemoryTaken, MemoryLent, ShuttingDown: what the scheduler rejected it with.
            SchedulerBroke, WaitTooLong: it was given up while it waited.
            LeaseCut: the model was taken away inside the block.
        """
        ticket, answer, served = next(self.desk.tickets), Answer(model), False
        self._answers[ticket], self.labels[ticket] = answer, label
        with answer.entry.scope:
            try:
                self.feed(Arrived(ticket, model, weight))
                if answer.lease is None:  # the fast path has no checkpoint at all
                    await answer.given.wait()
                if answer.error is not None:
                    raise answer.error
                assert answer.lease is not None
                yield answer.lease
                served = answer.lease.served
            finally:  # sync, so it cannot be interrupted
                del self._answers[ticket], self.labels[ticket]
                if answer.lease is not None:
                    self.inflight.leave(answer.lease.attempt, ticket)
                self._tell(model, Left(ticket, served))
        if answer.entry.scope.cancelled_caught:
            raise LeaseCut(model, answer.entry.cut_because or "cancelled")

    def passing(self, model: str) -> Lease | None:
        """The way to *model* for what must not count as use (invariant I12); None: it is not ready.

        It holds nobody up: when a swap ends the model, what goes on there is broken off (`InFlight.passing`).
        """
        run = self._runs.get(model)
        if run is None or run.upstream is None or run.dead.is_set():
            return None
        return Lease(model, run.attempt, run.upstream, run.holding, run.dead)

    def add(self, spec: ModelConfig, policy: Policy, supervise: Supervise, costs: Costs | None = None) -> None:
        """There is one more model, run by *supervise*; without *costs* to load and to stop it takes no time."""
        self.core.add(spec.name, policy, costs)
        self.models[spec.name] = spec
        self.limiter.total_tokens += 1
        self._supervise[spec.name] = supervise
        self.desk.tell[spec.name] = self.feed

    def adapt(self, name: str, *, leaves: bool) -> None:
        """What is looked up of a server while it runs, and when it is stopped, is from now on what is configured."""
        if name in self._runs:
            self._runs[name].adapt(self.models[name], leaves=leaves)

    def take(self, name: str, other: SwapGroup) -> None:
        """Move a model here from *other*, with its server, its token, who waits for it and who is served.

        There is no instant at which it is in both or in none.  Rules and tokens are to be set anew afterwards.
        """
        self.core.adopt(*other.core.release(name))
        self.models[name], self._supervise[name] = other.models.pop(name), other._supervise.pop(name)
        self.desk.tell[name] = self.feed
        if name in self._runs:
            self._runs[name].move_token(self.limiter)
            self.limiter.total_tokens += 1  # it has a right to one here, as it had there

    def forget(self, name: str) -> None:
        """There is one less, which has ended, and nobody asks for it."""
        self.core.remove(name)
        del self.models[name], self._supervise[name], self.desk.tell[name]
        self.limiter.total_tokens -= 1

    async def unload(self, models: tuple[str, ...]) -> None:
        """Drain (bounded) and stop *models*; return when their process trees are gone.

        Requests that wait for them are answered with `ModelUnloaded`.

        Raises:
            ModelStuck: a process could not be ended.
        """
        await wait_over(self.begin_unload(models))

    def begin_unload(self, models: tuple[str, ...]) -> list[Run]:
        """The same without the wait: those that are to be gone."""
        runs = [self._runs[name] for name in models if name in self._runs]
        self.feed(UnloadAsked(models))
        return runs

    def shutdown(self) -> None:
        """Take no new work, reject what waits, drain (bounded) and stop everything; `run` then returns."""
        self._closing = True
        self.feed(ShutdownBegan())
        self._alarm.cancel(reason="shutdown")
        for run in self._ours():
            run.quarantine.cancel(reason="shutdown")

    def hasten(self, why: str) -> None:
        """Cut what is being served: a second signal has come."""
        for run in self._ours():
            self.inflight.cut(run.attempt, why)

    def unanswered(self) -> list[int]:
        """Tickets that have been told nothing yet, the oldest first; between two steps each is in a queue."""
        mine = ((ticket, answer) for ticket, answer in self._answers.items() if answer.model in self.models)
        return [ticket for ticket, answer in mine if not answer.given.is_set()]

    def give_up(self, ticket: int, error: TrioswapError) -> None:
        """Answer *ticket*, which waits, with *error*, whatever the scheduler thinks of it."""
        self._answers[ticket].error = error
        self._answers[ticket].given.set()

    def think_again(self) -> None:
        """Have the scheduler decide everything anew, now."""
        self.core.wake_at = trio.current_time()
        self.feed(WokeUp())

    def pids(self) -> list[int]:
        """Of all processes of all model servers."""
        return [pid for run in self._ours() if run.process is not None for pid in run.process.pids()]

    def dissolve(self) -> None:
        """There is nothing left to decide; `run` returns when what it began for others is over."""
        assert not self.models
        self._closing = True
        self._alarm.cancel(reason="nothing is left to decide")

    def views(self) -> list[ModelView]:
        """Every model as it stands, sorted by name."""
        return self.core.views(trio.current_time())

    # ---- the scheduler's hands -----------------------------------------------------------------

    def feed(self, event: Event) -> None:
        """Tell the scheduler, then do as it says.  Sync on purpose: nothing can slip in between.

        Raises nothing: a scheduler that breaks begins anew.
        """
        try:
            for command in self.core.handle(event, trio.current_time()):
                self._obey(command)
        except Exception as exc:
            self._begin_anew(event, exc)
        self._alarm.deadline = self.core.wake_at
        self.desk.changed()

    def _begin_anew(self, event: Event, exc: Exception) -> None:
        """See `mending`."""
        now, self.faults = trio.current_time(), self.faults + 1
        knew = snapshot(self.core, self.labels, now)
        logger.error("the scheduler broke and begins anew event=%s %s", event, knew, exc_info=exc)
        for command in begin_anew(self.core, self._runs, self._answers, now):
            self._obey(command)
        for ticket in self.unanswered():
            self.give_up(ticket, SchedulerBroke())

    def _tell(self, model: str, event: Event) -> None:
        """Tell whoever decides about *model* by now."""
        self.desk.tell.get(model, self.feed)(event)

    def _ours(self) -> list[Run]:
        return [run for name, run in self._runs.items() if name in self.models]

    def _obey(self, command: Command) -> None:
        assert self._nursery is not None, "run() owns the tasks"
        self.journal.note(command)
        match command:
            case Grant(ticket, model):
                answer, run = self._answers[ticket], self._runs[model]
                assert run.upstream is not None, "only a ready model is granted"
                self.inflight.enter(run.attempt, ticket, answer.entry)
                answer.lease = Lease(model, run.attempt, run.upstream, run.holding, run.dead)
                answer.given.set()
            case Reject(ticket, error):
                self._answers[ticket].error = error
                self._answers[ticket].given.set()
            case CloseGate(model, attempt, reason, unload):
                if unload and self._runs[model].unloading and attempt in self._gates:
                    return  # else whoever asks again and again would give it the whole time each time
                self._runs[model].unloading = unload
                self._open_gate(attempt)  # an unload takes over from a swap
                self._gates[attempt] = scope = trio.CancelScope()
                self._nursery.start_soon(self._drain, self._runs[model], scope, reason, unload)
            case OpenGate(_, attempt):
                self._open_gate(attempt)
            case Swap():
                runs = [self._runs[eviction.model] for eviction in command.evictions]
                self._nursery.start_soon(self._swap, command, runs)
            case Start(model, attempt, holding):
                run = self._runs[model] = Run(self.models[model], attempt, holding, self.limiter)
                self._nursery.start_soon(self._supervise_run, run, self._supervise[model])
            case Stop(model, attempt, reason):
                self._open_gate(attempt)
                self._runs[model].scope.cancel(reason=reason)

    def _open_gate(self, attempt: int) -> None:
        """Nobody waits any more until it runs dry."""
        if attempt in self._gates:
            self._gates.pop(attempt).cancel(reason="the gate is open again, or nothing is left behind it")

    async def _swap(self, swap: Swap, victims: list[Run]) -> None:
        """Under the lock: see the victims drained, end them, wait until they are gone."""
        async with self._lock:
            for run in victims:  # their gates are closed and they have run dry, so this returns at once
                with trio.move_on_after(CUT_GRACE):
                    await run.wait_idle(self.inflight)
            for run, eviction in zip(victims, swap.evictions, strict=True):
                self._open_gate(run.attempt)
                run.scope.cancel(reason=str(eviction))
            for run in victims:
                await run.over.wait()

    async def _drain(self, run: Run, scope: trio.CancelScope, why: str, unload: bool) -> None:
        """Wait until nothing is in flight on *run*; after its deadline cut what is left."""
        limit = run.limits.begin("unload_drain_timeout" if unload else "drain_timeout")
        with scope:
            with run.limits.keep(limit) as late:
                await run.wait_idle(self.inflight)
            if late.cancelled_caught:
                why = f"it was still running {limit.seconds:g} s after its model was to stop ({why})"
                count = self.inflight.cut(run.attempt, why)
                logger.warning("drain deadline cuts requests model=%s count=%d", run.spec.name, count)
                with trio.move_on_after(CUT_GRACE):
                    await run.wait_idle(self.inflight)
        if self._gates.get(run.attempt) is scope:  # else the gate was opened in the step that woke us
            del self._gates[run.attempt]
            self._tell(run.spec.name, Drained(run.spec.name, run.attempt))

    async def _supervise_run(self, run: Run, supervise: Supervise) -> None:
        """The supervised task of one attempt: token, process, and the news of its end.

        A stuck process keeps the token: what it holds in memory is not there for others.
        """
        failure: StartFailed | None = None
        await run.wait_token()
        try:
            with run.scope:
                failure = await self._run_process(supervise, run)
            if run.process is not None and run.process.stuck:
                await self._wait_in_quarantine(run.process, run)
            elif self._memory is not None and run.look is not None:
                await look_after(run, self._memory.wait_returned, run.look)
        finally:
            assert run.token is not None
            run.token.release_on_behalf_of(run)
        del self._runs[run.spec.name]
        self._open_gate(run.attempt)
        run.over.set()
        self.desk.is_ending(run.spec.name)
        self._tell(run.spec.name, Ended(run.spec.name, run.attempt, failure))
        self.desk.has_ended(run.spec.name)

    async def _run_process(self, supervise: Supervise, run: Run) -> StartFailed | None:
        try:
            process = run.process = supervise(run.spec, run.attempt, run.holding)
            async with measuring(run, self._memory, self._tell) as begin:
                news = News(run, self._tell, begin, lambda: not self.inflight.count(run.attempt))
                return await process.run(task_status=news)
            return None  # it was told to end
        except Exception as exc:  # a bug in the supervision of one model is that model's failure, not the daemon's
            logger.exception("supervision broke model=%s attempt=%d", run.spec.name, run.attempt)
            return StartFailed(run.spec.name, f"internal error: {exc!r}")
        finally:
            run.dead.set()
            if run.upstream is not None:
                run.upstream.close()

    async def _wait_in_quarantine(self, process: Supervised, run: Run) -> None:
        why = "must not get SIGKILL (never_kill)" if run.spec.never_kill else "survived SIGKILL"
        name, pids = run.spec.name, tuple(process.pids())
        logger.error("quarantined model=%s pids=%s: it did not end and %s", name, ",".join(map(str, pids)), why)
        run.stuck = True
        run.over.set()
        self._tell(name, GotStuck(name, run.attempt, pids))
        # Who is dead breaks the connections to it; this one keeps them, and would never answer.
        self.inflight.cut(run.attempt, f"its process did not end and {why}")
        with run.quarantine:
            await process.wait_gone()

    async def _wake_the_scheduler(self) -> None:
        """Sleep until `wake_at`, again and again: deadlines, never a ticking loop."""
        while not self._closing:
            self._alarm = trio.CancelScope(deadline=self.core.wake_at)
            with self._alarm:
                await trio.sleep_forever()
            self.feed(WokeUp())
