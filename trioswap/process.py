"""One supervised child: spawn, output, readiness, stop, and the sweep of what it leaves.

Everything about one attempt at running one model server is here; when to start and when
to stop is for others.  `run` ends in one of three ways: the start failed (a value), the
server ended by itself, or the task was cancelled.  In each of them the process tree is
gone afterwards and the port is free, or `stuck` says that SIGKILL did not help.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
from collections.abc import Callable
from typing import Final, Protocol
from urllib.parse import urlsplit

import trio

from trioswap import proctree
from trioswap.config import ModelConfig
from trioswap.errors import StartFailed
from trioswap.logs import Logs
from trioswap.proctree import PortOwner
from trioswap.remote import Prober
from trioswap.upstream import Upstream

logger = logging.getLogger(__name__)

# A refused probe costs about a millisecond, so the first come quickly; later ones at 2 % of
# the time since the child last said something, so that a long silent load costs no CPU.
PROBE_MIN: Final = 0.01
PROBE_MAX: Final = 0.25
PROBE_SHARE: Final = 0.02
# Time for the last words of the dead; a grandchild may hold the pipe for ever.
OUTPUT_GRACE: Final = 1.0
# SIGKILL takes effect at once unless the process sleeps in the kernel; freeing 100 GB takes seconds.
KILL_WAIT: Final = 15.0
# A container's port proxy outlives its container by a moment.
PORT_WAIT: Final = 2.0
TREE_POLL: Final = 0.02
QUARANTINE_POLL: Final = 5.0


class ReadyReport(Protocol):
    """What `run` tells when the server is usable; a `trio.TaskStatus` is one."""

    def started(self, value: Upstream) -> None:
        """The server is ready and *value* is the way to it."""
        ...


class Supervised(Protocol):
    """One attempt at running a model server: `ModelProcess`, or a fake that passes the same tests."""

    stuck: bool
    """The process survived SIGKILL; True only after `run` is over."""

    async def run(self, *, task_status: ReadyReport) -> StartFailed | None:
        """Run the server until it ends or the task is cancelled; return why a start failed.

        When this is over the process tree is gone, or `stuck` is True.
        """
        ...

    async def wait_gone(self) -> None:
        """Return once a stuck process has ended after all.  May wait for ever."""
        ...


class ModelProcess:
    """One attempt at running the server of one model."""

    def __init__(self, spec: ModelConfig, marker: str, logs: Logs, prober: Prober) -> None:
        self.spec = spec
        self.marker = marker
        self.stuck = False
        self.pid: int | None = None
        self._logs = logs
        self._prober = prober
        url = urlsplit(spec.proxy)
        self._host, self._port = url.hostname, url.port or 80
        self._last_word = 0.0
        self._spoke = trio.Event()  # replaced whenever somebody begins to listen
        self._silent = trio.Event()  # its output has ended

    def __repr__(self) -> str:
        """Name, pid and marker."""
        return f"<ModelProcess {self.spec.name} pid={self.pid} {self.marker}{' stuck' if self.stuck else ''}>"

    async def run(self, *, task_status: ReadyReport) -> StartFailed | None:
        """Run the server until it ends or the task is cancelled; return why a start failed.

        Once it is cancelled this takes at most `unload_timeout` for the grace, `KILL_WAIT` for
        SIGKILL and `PORT_WAIT` for the port.
        """
        if stranger := self._stranger_on_port():
            return self._failure(stranger)
        try:
            child = await self._spawn()
        except OSError as exc:
            return self._failure(f"cannot run {self.spec.argv[0]!r}: {exc.strerror or exc}")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_output, child)
            try:
                return await self._serve(child, task_status)
            finally:
                # Shielded, or the cancelled task would leave the tree running; every wait inside has its deadline.
                with trio.CancelScope(shield=True):
                    await self._end(child)
                nursery.cancel_scope.deadline = trio.current_time() + OUTPUT_GRACE

    async def wait_gone(self) -> None:
        """Return once a stuck process has ended after all.  May wait for ever."""
        assert self.pid is not None
        leader = self.pid
        await _poll(lambda: not proctree.members(leader, self.marker), QUARANTINE_POLL)

    # ---- start ---------------------------------------------------------------------------

    async def _spawn(self) -> trio.Process:
        child = await trio.lowlevel.open_process(
            self.spec.argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=self._environment(),
        )
        self.pid = child.pid
        self._last_word = trio.current_time()
        logger.info("spawned model=%s pid=%d attempt=%s", self.spec.name, child.pid, self.marker)
        return child

    def _environment(self) -> dict[str, str]:
        return {**os.environ, **self.spec.env, proctree.MARKER: self.marker}

    async def _keep_output(self, child: trio.Process) -> None:
        """Read by chunks and never wait for a reader of the logs, or a full pipe would stop the child."""
        assert child.stdout is not None
        try:
            async for chunk in child.stdout:
                self._logs.from_child(self.spec.name, bytes(chunk))
                self._last_word = trio.current_time()
                self._spoke.set()
        finally:
            self._silent.set()
            await child.stdout.aclose()  # closes the pipe even when this task is cancelled, and then says so

    async def _serve(self, child: trio.Process, task_status: ReadyReport) -> StartFailed | None:
        failure = await self._wait_ready(child)
        if failure is None:
            task_status.started(Upstream(self.spec.name, self.spec.proxy))
            code = await child.wait()
            logger.warning(
                "model server ended by itself model=%s pid=%d %s", self.spec.name, child.pid, _exit_text(code)
            )
        return failure

    async def _wait_ready(self, child: trio.Process) -> StartFailed | None:
        """Readiness, exit and deadline, raced; the first wins."""
        stranger: str | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancel_on_exit, child, nursery.cancel_scope)
            with trio.move_on_after(self.spec.health_check_timeout) as late:
                stranger = await self._probe_until_ready(child)
            nursery.cancel_scope.cancel(reason="probe finished")
        if child.returncode is not None:
            with trio.move_on_after(OUTPUT_GRACE):
                await self._silent.wait()
            return self._failure(f"{_exit_text(child.returncode)} before it was ready{self._last_line()}")
        if late.cancelled_caught:
            return self._failure(f"not ready within {self.spec.health_check_timeout:g} s (health_check_timeout)")
        return self._failure(stranger) if stranger else None

    async def _probe_until_ready(self, child: trio.Process) -> str | None:
        """Return once the server answers 200; the text says whose server it is when it is not our child's."""
        if self.spec.check_endpoint is None:
            return None
        url = self.spec.proxy + self.spec.check_endpoint
        while await self._prober.ready(url) is not None:
            self._spoke = trio.Event()
            await trio.sleep(PROBE_MIN)
            silence = trio.current_time() - self._last_word
            with trio.move_on_after(max(0.0, min(PROBE_MAX, PROBE_SHARE * silence) - PROBE_MIN)):
                await self._spoke.wait()  # a server that says "ready" is probed at once
        return self._stranger_on_port(child)

    def _stranger_on_port(self, child: trio.Process | None = None) -> str | None:
        """Who else listens where our server should; None: nobody, our child, or nobody can say.

        Before the spawn everybody who listens is a stranger.
        """
        if self.spec.port_owner == "any":
            return None
        tree = proctree.members(child.pid, self.marker) if child else []
        if proctree.port_owner(self._port, self._host, tree) is not PortOwner.STRANGER:
            return None
        owners = ", ".join(f"{p.name} (pid {p.pid})" for p in proctree.who_listens(self._port, self._host))
        return (
            f"port {self._port} belongs to {owners or 'another process'}, not to the server of this model; stop that, "
            f'use ${{PORT}}, or set port_owner = "any" when the server runs in a container'
        )

    # ---- stop ----------------------------------------------------------------------------

    async def _end(self, child: trio.Process) -> None:
        """Stop signal or command, grace, SIGKILL to the whole tree, port free.  Bounded."""
        deadline = trio.current_time() + self.spec.unload_timeout
        if self._alive(child):
            await self._ask_to_stop(child, deadline)
            with trio.move_on_at(deadline):
                await self._wait_tree_gone(child)
        with trio.move_on_after(KILL_WAIT):
            while self._alive(child):
                self._signal(child, signal.SIGKILL)
                await trio.sleep(TREE_POLL)
        self.stuck = self._alive(child)
        if not self.stuck:
            with trio.move_on_after(PORT_WAIT):
                await self._wait_port_free()

    async def _ask_to_stop(self, child: trio.Process, deadline: float) -> None:
        if self.spec.stop_argv is None or not await self._run_stop_command(child, deadline):
            self._signal(child, self.spec.stop_signal)

    async def _run_stop_command(self, child: trio.Process, deadline: float) -> bool:
        """Run `cmd_stop` to its end or the deadline; True when it ended with 0."""
        assert self.spec.stop_argv is not None
        argv = [part.replace("${PID}", str(child.pid)) for part in self.spec.stop_argv]
        code: int | str = "still running at the end of the grace"
        with trio.move_on_at(deadline):
            try:
                done = await trio.run_process(
                    argv,
                    stdin=subprocess.DEVNULL,
                    capture_stdout=True,
                    stderr=subprocess.STDOUT,
                    check=False,
                    env=self._environment(),
                    deliver_cancel=_kill,
                )
                self._logs.from_child(self.spec.name, done.stdout)
                code = done.returncode
            except OSError as exc:
                code = exc.strerror or str(exc)
        if code != 0:
            logger.warning("cmd_stop failed model=%s result=%s", self.spec.name, code)
        return code == 0

    def _signal(self, child: trio.Process, number: signal.Signals) -> None:
        """Signal the whole tree, each process once: a second SIGTERM makes some servers give up at once."""
        group = child.pid if child.returncode is None else None  # not reaped yet, so the number is still ours
        if group is not None:
            os.killpg(group, number)
        for process in proctree.members(child.pid, self.marker):
            if group is None or _group_of(process.pid) != group:
                proctree.kill(process, number)

    def _alive(self, child: trio.Process) -> bool:
        return child.returncode is None or bool(proctree.members(child.pid, self.marker))

    async def _wait_tree_gone(self, child: trio.Process) -> None:
        await child.wait()
        await _poll(lambda: not self._alive(child), TREE_POLL)

    async def _wait_port_free(self) -> None:
        await _poll(lambda: not proctree.listening_inodes(self._port, self._host), TREE_POLL)

    # ---- words ---------------------------------------------------------------------------

    def _failure(self, why: str) -> StartFailed:
        logger.warning("start failed model=%s: %s", self.spec.name, why)
        return StartFailed(self.spec.name, why)

    def _last_line(self) -> str:
        line = self._logs.of(self.spec.name).tail(1).strip()
        return f' ("{line}")' if line else ""


async def _poll(condition: Callable[[], bool], every: float) -> None:
    while not condition():
        await trio.sleep(every)  # noqa: ASYNC110 - /proc gives no notice


def _group_of(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except OSError:
        return None


async def _cancel_on_exit(child: trio.Process, scope: trio.CancelScope) -> None:
    await child.wait()
    scope.cancel(reason="the child ended")


async def _kill(child: trio.Process) -> None:
    child.kill()


def _exit_text(code: int) -> str:
    if code >= 0:
        return f"exited with {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
