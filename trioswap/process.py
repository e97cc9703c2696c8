"""One supervised child: its life from the first hook to the last, and the sweep of what it leaves.

Everything about one attempt at running one model server comes together here: `spawning` starts
it, `output` hears it, `readiness` asks it, `stopping` knows its family, `hooks` runs the commands
around it.  When to start and when to stop is for others.  `run` ends in one of three ways: the
start failed (a value), the server ended by itself, or the task was cancelled.  In each of them the
process tree is gone afterwards and the port is free, or `stuck` says that somebody is left.
"""

from __future__ import annotations

import logging
import signal
from functools import partial
from typing import Final, Protocol

import trio

from trioswap import guard, hooks, output, proctree
from trioswap.config import ModelConfig
from trioswap.config.schema import ModelHooks
from trioswap.errors import NothingLeftToStart, StartFailed
from trioswap.guardian import NOBODY, Watcher
from trioswap.hooks import Commands
from trioswap.limits import Limit, Limits
from trioswap.logs import Logs
from trioswap.output import Output, exit_text
from trioswap.readiness import Health, Port
from trioswap.remote import Prober
from trioswap.spawning import HOLD, Child, SpawnTooLate, shortage, spawn
from trioswap.stopping import Family
from trioswap.upstream import Upstream, reason

logger = logging.getLogger(__name__)

# SIGKILL takes effect at once unless the process sleeps in the kernel; freeing 100 GB takes seconds.
KILL_WAIT: Final = 15.0
# A container's port proxy outlives its container by a moment.
PORT_WAIT: Final = 2.0
# Time for the last words of the dead.
OUTPUT_GRACE: Final = output.OUTPUT_GRACE
QUARANTINE_POLL: Final = 5.0
# Who stops everybody at once, as a service manager may (systemd: KillMode=control-group) or Ctrl-C does, may reach
# a server a moment before it reaches us.  How servers end then:
STOP_NOTICE: Final = 0.25
_ASKED_TO: Final = frozenset(
    {0, *(code for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) for code in (-number, 128 + number))}
)


class Report(Protocol):
    """What `run` tells while it runs."""

    def started(self, value: Upstream) -> None:
        """The server is ready and *value* is the way to it."""
        ...

    def died(self, why: str = "") -> None:
        """The server, once ready, has ended by itself, or hangs for good; the sweep comes next."""
        ...

    def is_idle(self) -> bool:
        """Whether the server, once ready, has nothing to do.  Asked only with `liveness`."""
        ...


class Supervised(Protocol):
    """One attempt at running a model server: `ModelProcess`, or a fake that passes the same tests."""

    spec: ModelConfig
    """Another one may take its place while it runs, that differs in what is still to come, or in the limits of that."""
    stuck: bool
    """Some process could not be ended: it survived SIGKILL, or must not get it.  True only after `run` is over."""

    async def run(self, *, task_status: Report) -> StartFailed | None:
        """Run the server until it ends or the task is cancelled; return why a start failed.

        When this is over the process tree is gone, or `stuck` is True.
        """
        ...

    async def wait_gone(self) -> None:
        """Return once a stuck process has ended after all.  May wait for ever."""
        ...

    def pids(self) -> list[int]:
        """Its process tree, as far as it can be seen."""
        ...


def load_limit(spec: ModelConfig) -> float:
    """Seconds within which a server of *spec* is ready, or its start has failed and its end begins."""
    return spec.health_check_timeout + OUTPUT_GRACE + hooks.limit(spec, "before_start", "after_ready")


def stop_limit(spec: ModelConfig) -> float:
    """Seconds that the end of a server of *spec* takes at most, whenever it begins.

    A spawn that is under way, the grace, SIGKILL, the port, and the last words (twice with
    `cmd_stop`); what hooks have left is granted the grace and SIGKILL once more.
    """
    end = spec.unload_timeout + KILL_WAIT
    swept = end if spec.hooks != ModelHooks() else 0.0
    return HOLD + end + PORT_WAIT + 2 * OUTPUT_GRACE + hooks.limit(spec, "before_stop", "after_stop") + swept


class ModelProcess:
    """One attempt at running the server of one model."""

    def __init__(self, spec: ModelConfig, marker: str, logs: Logs, prober: Prober, guardian: Watcher = NOBODY) -> None:
        self._limits = Limits(spec)
        self._commands = Commands(self._limits, marker, logs)
        self.marker = marker
        self.stuck = False
        self._prober = prober
        self._guardian = guardian
        self._guarded: str | None = None  # the name under which the guardian knows it, while it does
        self._port = Port.of(spec)
        self._family = Family(marker)
        self._output = Output(spec.name, logs)
        self._shortage: str | None = None  # what we had run out of when it was to be spawned
        self._is_serving = False  # it was reported to be ready, and has not died since
        self._computed = 0  # clock ticks of its whole tree, when they were counted last

    def __repr__(self) -> str:
        """Name, pid and marker."""
        return f"<ModelProcess {self.spec.name} pid={self.pid} {self.marker}{' stuck' if self.stuck else ''}>"

    @property
    def spec(self) -> ModelConfig:
        """What it is run with; another counts for its commands and for what is under way, too."""
        return self._limits.spec

    @spec.setter
    def spec(self, spec: ModelConfig) -> None:
        self._limits.follow(spec)
        child = self._family.leader
        if child is not None and self._guarded is not None:  # be it only that others of its family are left
            self._guard(child)

    def _guard(self, child: Child) -> None:
        """Tell the guardian how *child* is to be ended; its environment goes on to say what held at its start."""
        before, spec = self._guarded, self.spec
        self._guarded = self.marker.removesuffix(guard.SPARED) + (guard.SPARED if spec.never_kill else "")
        self._guardian.began(child.pid, self._guarded, spec.stop_argv or (), spec.env)
        if before is not None and before != self._guarded:
            self._guardian.ended(before)

    def _unguard(self) -> None:
        if self._guarded is not None:
            self._guardian.ended(self._guarded)
            self._guarded = None

    @property
    def pid(self) -> int | None:
        """Of the server; None until it is spawned."""
        return None if self._family.leader is None else self._family.leader.pid

    async def run(self, *, task_status: Report) -> StartFailed | None:
        """Run the server until it ends or the task is cancelled; return why a start failed.

        Once it is cancelled this takes `stop_limit` at most.
        """
        async with trio.open_nursery() as nursery:
            try:
                return await self._live(nursery, task_status)
            finally:
                # Shielded, or the cancelled task would leave the tree running; every wait inside has its deadline.
                with trio.CancelScope(shield=True):
                    await self._end_for_certain()

    def pids(self) -> list[int]:
        """Its process tree, as far as it can be seen."""
        return [process.pid for process in self._family.members()]

    async def wait_gone(self) -> None:
        """Return once a stuck process has ended after all.  May wait for ever."""
        if self._family.leader is not None:
            await self._family.leader.wait()
        while self._anybody_left():  # noqa: ASYNC110 - /proc gives no notice
            await trio.sleep(QUARANTINE_POLL)
        self._unguard()

    # ---- from the first hook to the end of the server ------------------------------------

    async def _live(self, nursery: trio.Nursery, task_status: Report) -> StartFailed | None:
        if why := await self._commands.hook("before_start") or self._port.stranger(self._family):
            return self._failure(why)
        limit = self._limits.begin("health_check_timeout")
        try:
            await self._spawn(nursery, limit.deadline)
        except SpawnTooLate as exc:
            return self._failure(f"not spawned within {limit}: {exc}")
        except (OSError, ValueError) as exc:  # ValueError: no system call takes a NUL
            self._shortage = shortage(exc)
            return self._failure(f"cannot run {self.spec.argv[0]!r}: {reason(exc)}")
        child = self._family.leader
        assert child is not None
        health = Health(self.spec.proxy + (self.spec.check_endpoint or ""), self._prober)
        failure = await self._wait_ready(child, health, limit)
        if failure is None:
            task_status.started(Upstream(self.spec.name, self.spec.proxy, self.spec.timeouts))
            self._is_serving = True
            await self._serve(child, health, task_status)
        return failure

    async def _spawn(self, nursery: trio.Nursery, deadline: float) -> None:
        def adopt(child: Child) -> None:
            self._family.leader = child
            self._guard(child)
            nursery.start_soon(self._output.keep, child)
            logger.info("spawned model=%s pid=%d attempt=%s", self.spec.name, child.pid, self.marker)

        env = {**self.spec.env, proctree.MARKER: self.marker}
        last_signal = self.spec.stop_signal if self.spec.never_kill else signal.SIGKILL
        await spawn(self.spec.argv, env, adopt, deadline=deadline, last_signal=last_signal)

    async def _wait_ready(self, child: Child, health: Health, limit: Limit) -> StartFailed | None:
        """Readiness with its hook, exit and *limit*, raced; the first wins."""
        why: str | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancel_on_exit, child, nursery.cancel_scope)
            with self._limits.keep(limit) as late:
                if self.spec.check_endpoint is not None:
                    await health.wait_ready(self._output)
                    why = self._port.stranger(self._family)
            if not late.cancelled_caught and why is None:
                why = await self._commands.hook("after_ready", child.pid)
            nursery.cancel_scope.cancel(reason="ready, or not")
        if child.returncode is not None:
            await _wait_told(child.returncode)
            with trio.move_on_after(OUTPUT_GRACE):
                await self._output.silent.wait()
            return self._failure(f"{exit_text(child.returncode)} before it was ready{self._output.last_line}")
        if late.cancelled_caught:
            why = f"not ready within {limit}, last probe: {health.last_answer}{self._output.last_line}"
        return self._failure(why) if why else None

    async def _serve(self, child: Child, health: Health, task_status: Report) -> None:
        """Return when the server has died, and that is told."""
        if self.spec.check_endpoint is None:
            await child.wait()
        else:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_cancel_on_exit, child, nursery.cancel_scope)
                is_at_work = partial(self._is_at_work, task_status)
                misses = await health.wait_dead(self._limits, is_at_work)
                # In this very step: who is given to the server now, would wait in vain.
                how = f"did not answer its health check {misses} times, last probe: {health.last_answer}"
                self._died(how, child, task_status)
                nursery.cancel_scope.cancel(reason="the server hangs")
        if self._is_serving:
            assert child.returncode is not None
            await _wait_told(child.returncode)
            self._died(exit_text(child.returncode), child, task_status)

    def _is_at_work(self, task_status: Report) -> bool:
        """Whether the server has requests and has computed since this was asked the last time.

        Who has requests and computes nothing is stalled.  In a container nobody can say, so it counts as at work.
        """
        if task_status.is_idle():
            return False
        before = self._computed
        try:
            self._computed = proctree.cpu_time(self._family.members())
        except OSError:  # nobody can say (`proctree.SHORTAGE`)
            return True
        return self._computed != before or not self._port.asked

    def _died(self, how: str, child: Child, task_status: Report) -> None:
        self._is_serving = False
        self._output.catch_up(child)
        task_status.died(f"{how}{self._output.last_line}")
        if child.returncode in _ASKED_TO:  # by somebody else, and a moment later we were not told
            logger.info("model server ended by itself model=%s pid=%d %s", self.spec.name, child.pid, how)
        else:
            logger.warning("model server died model=%s pid=%d %s", self.spec.name, child.pid, how)

    # ---- stop ----------------------------------------------------------------------------

    async def _end_for_certain(self) -> None:
        """`_end`; should that break, nobody is left all the same, or `stuck` says so: a new attempt may come next."""
        try:
            await self._end()
        except Exception:
            if not self.spec.never_kill:
                with trio.move_on_after(KILL_WAIT):
                    await self._family.kill()
            self.stuck = self._anybody_left()
            raise

    async def _end(self) -> None:
        """Stop what was started, and undo what hooks did.  Bounded."""
        if self._family.leader is not None:
            await self._stop(self._family.leader)
        if self._commands.ran or self.spec.hooks.after_stop is not None:
            await self._end_hooks()
        if not self.stuck:
            self._unguard()

    async def _stop(self, child: Child) -> None:
        """Hook, stop signal or command, grace, SIGKILL to the whole tree, port free, last words."""
        try:
            if self._is_serving and child.returncode is None:
                self._warn(await self._commands.hook("before_stop", child.pid))
            limit = self._limits.begin("unload_timeout")
            if self._family:
                await self._ask_to_stop(child, limit)
                with self._limits.keep(limit):
                    await self._family.wait_gone()
            if not self.spec.never_kill:
                with trio.move_on_after(KILL_WAIT):
                    await self._family.kill()
            self.stuck = self._anybody_left()
            if not self.stuck:
                with trio.move_on_after(PORT_WAIT):
                    await self._port.wait_free(self._family)
        finally:
            self._output.scope.deadline = trio.current_time() + OUTPUT_GRACE

    async def _ask_to_stop(self, child: Child, limit: Limit) -> None:
        # Not by command once the child is reaped: ${PID} might name somebody else.
        if self.spec.stop_argv is not None and child.returncode is None:
            why = await self._commands.run(self.spec.stop_argv, child.pid, limit)
            if why is None:
                return
            self._warn(f"cmd_stop {why}")
        self._family.signal(self.spec.stop_signal)

    async def _end_hooks(self) -> None:
        """The last hook, and the end of whoever hooks have left; not while the server is still there."""
        if self.stuck:
            self._warn("hook after_stop is not run, for the server has not ended")
            return
        self._warn(await self._commands.hook("after_stop"))
        with self._limits.keep(self._limits.begin("unload_timeout")):
            await self._family.end_strays(self.spec.stop_signal)
        if not self.spec.never_kill:
            with trio.move_on_after(KILL_WAIT):
                await self._family.end_strays(signal.SIGKILL)
        self.stuck = self._anybody_left()

    def _anybody_left(self) -> bool:
        commands = self._commands
        return (
            bool(self._family)
            or any(child.returncode is None for child in commands.deaf)
            or (commands.ran and self._family.has_strays())
        )

    # ---- words ---------------------------------------------------------------------------

    def _failure(self, why: str) -> StartFailed:
        logger.warning("start failed model=%s: %s", self.spec.name, why)
        if ours := self._shortage or self._commands.shortage:
            return NothingLeftToStart(self.spec.name, ours)
        # Nobody else kills a server that is loading with SIGKILL: the kernel does when memory is short.
        # Shells and container runtimes say it of theirs in their own exit code.
        child = self._family.leader
        killed = child is not None and child.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL)
        return StartFailed(self.spec.name, why, out_of_memory=killed or self._output.short_of_memory)

    def _warn(self, why: str | None) -> None:
        if why is not None:
            logger.warning("model=%s: %s", self.spec.name, why)


async def _wait_told(code: int) -> None:
    """Be cancelled if a server that ended with *code* was told to, and we are told the same in a moment."""
    if code in _ASKED_TO:
        await trio.sleep(STOP_NOTICE)


async def _cancel_on_exit(child: Child, scope: trio.CancelScope) -> None:
    await child.wait()
    scope.cancel(reason="the child ended")
