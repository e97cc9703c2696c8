"""One supervised child: spawn, output, readiness, stop, and the sweep of what it leaves.

Everything about one attempt at running one model server is here; when to start and when
to stop is for others.  `run` ends in one of three ways: the start failed (a value), the
server ended by itself, or the task was cancelled.  In each of them the process tree is
gone afterwards and the port is free, or `stuck` says that SIGKILL did not help.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from typing import Final, Protocol
from urllib.parse import urlsplit

import trio

from trioswap import proctree
from trioswap.config import ModelConfig
from trioswap.errors import StartFailed
from trioswap.guardian import NOBODY, Watcher
from trioswap.logs import Logs
from trioswap.proctree import PortOwner
from trioswap.remote import Prober
from trioswap.symptoms import OVERLAP, is_out_of_memory
from trioswap.upstream import Upstream, reason

logger = logging.getLogger(__name__)

# A refused probe costs about a millisecond, so the first come quickly; later ones at 2 % of
# the time since the child last said something, so that a long silent load costs no CPU.
PROBE_MIN: Final = 0.01
PROBE_MAX: Final = 0.25
PROBE_SHARE: Final = 0.02
# Time for the last words of the dead; a grandchild may hold the pipe for ever.
OUTPUT_GRACE: Final = 1.0
# Bytes of its last line that a failed start quotes; a line has no limit of its own.
LAST_LINE: Final = 300
# SIGKILL takes effect at once unless the process sleeps in the kernel; freeing 100 GB takes seconds.
KILL_WAIT: Final = 15.0
# A container's port proxy outlives its container by a moment.
PORT_WAIT: Final = 2.0
# A look at /proc takes milliseconds: at first often, then ever less, a quarter late at most.
LOOK_FIRST: Final = 0.02
LOOK_GROWTH: Final = 1.25
LOOK_MAX: Final = 0.25
QUARANTINE_POLL: Final = 5.0


class Report(Protocol):
    """What `run` tells while it runs."""

    def started(self, value: Upstream) -> None:
        """The server is ready and *value* is the way to it."""
        ...

    def died(self, why: str = "") -> None:
        """The server, once ready, has ended by itself; the sweep of what it leaves comes next."""
        ...


class Supervised(Protocol):
    """One attempt at running a model server: `ModelProcess`, or a fake that passes the same tests."""

    stuck: bool
    """The process survived SIGKILL; True only after `run` is over."""

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


class ModelProcess:
    """One attempt at running the server of one model."""

    def __init__(self, spec: ModelConfig, marker: str, logs: Logs, prober: Prober, guardian: Watcher = NOBODY) -> None:
        self.spec = spec
        self.marker = marker
        self.stuck = False
        self.pid: int | None = None
        self._logs = logs
        self._prober = prober
        self._guardian = guardian
        url = urlsplit(spec.proxy)
        self._host, self._port = url.hostname, url.port or 80
        self._child: trio.Process | None = None
        self._gone = False  # nobody is left of the tree, and the child's number may be somebody else's
        self._last_probe = "none was answered"
        self._last_word = 0.0
        self._last_bytes = b""
        self._short_of_memory = False  # its output has complained
        self._spoke = trio.Event()  # replaced whenever somebody begins to listen
        self._silent = trio.Event()  # its output has ended

    def __repr__(self) -> str:
        """Name, pid and marker."""
        return f"<ModelProcess {self.spec.name} pid={self.pid} {self.marker}{' stuck' if self.stuck else ''}>"

    async def run(self, *, task_status: Report) -> StartFailed | None:
        """Run the server until it ends or the task is cancelled; return why a start failed.

        Once it is cancelled this takes at most `unload_timeout` for the grace, `KILL_WAIT` for
        SIGKILL, `PORT_WAIT` for the port and `OUTPUT_GRACE` for the last words (twice with `cmd_stop`).
        """
        if stranger := self._stranger_on_port():
            return self._failure(stranger)
        try:
            child = await self._spawn()
        except (OSError, ValueError) as exc:  # ValueError: no system call takes a NUL
            return self._failure(f"cannot run {self.spec.argv[0]!r}: {reason(exc)}")
        # Entering a nursery is no checkpoint: from the spawn to the `try` no cancellation can come in between.
        async with trio.open_nursery() as nursery:
            output = trio.CancelScope(shield=True)  # a server that is being stopped still speaks
            nursery.start_soon(self._keep_output, child, output)
            try:
                return await self._serve(child, task_status)
            finally:
                # Shielded, or the cancelled task would leave the tree running; every wait inside has its deadline.
                with trio.CancelScope(shield=True):
                    await self._end(child, output)

    def pids(self) -> list[int]:
        """Its process tree, as far as it can be seen."""
        return [] if self._child is None else [process.pid for process in self._family(self._child)]

    async def wait_gone(self) -> None:
        """Return once a stuck process has ended after all.  May wait for ever."""
        assert self._child is not None
        await self._child.wait()
        while self._alive(self._child):  # noqa: ASYNC110 - /proc gives no notice
            await trio.sleep(QUARANTINE_POLL)
        self._guardian.ended(self.marker)

    # ---- start ---------------------------------------------------------------------------

    async def _spawn(self) -> trio.Process:
        child = self._child = await self._open(self.spec.argv)
        self.pid = child.pid
        self._guardian.began(child.pid, self.marker, self.spec.stop_argv or (), self.spec.env)
        self._last_word = trio.current_time()
        logger.info("spawned model=%s pid=%d attempt=%s", self.spec.name, child.pid, self.marker)
        return child

    async def _open(self, argv: Sequence[str]) -> trio.Process:
        """A new process in a session of its own, with the marker and its output in a pipe.

        Trio spawns in a thread.  A cancellation that comes before the thread runs prevents the spawn;
        one that comes later is held back until the process is there and returned: it is never lost.
        The thread waits for the program to be loaded, without bound when its file system hangs.

        Raises:
            OSError: the program cannot be run.
            ValueError: an argument or a variable cannot be passed on.
        """
        return await trio.lowlevel.open_process(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **self.spec.env, proctree.MARKER: self.marker},
        )

    async def _keep_output(self, process: trio.Process, scope: trio.CancelScope) -> None:
        """Read by chunks and never wait for a reader of the logs, or a full pipe would stop the child."""
        assert process.stdout is not None
        with scope:
            try:
                async for chunk in process.stdout:
                    self._logs.from_child(self.spec.name, bytes(chunk))
                    self._short_of_memory = self._short_of_memory or is_out_of_memory(
                        self._last_bytes[-OVERLAP:] + chunk
                    )
                    self._last_bytes = (self._last_bytes + chunk[-LAST_LINE:])[-LAST_LINE:]
                    self._last_word = trio.current_time()
                    self._spoke.set()
            finally:
                self._silent.set()
                await process.stdout.aclose()  # closes the pipe even when this task is cancelled, and then says so

    async def _serve(self, child: trio.Process, task_status: Report) -> StartFailed | None:
        failure = await self._wait_ready(child)
        if failure is None:
            task_status.started(Upstream(self.spec.name, self.spec.proxy, self.spec.timeouts))
            code = await child.wait()
            task_status.died(f"{_exit_text(code)}{self._last_line()}")
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
            limit = f"{self.spec.health_check_timeout:g} s (health_check_timeout)"
            return self._failure(f"not ready within {limit}, last probe: {self._last_probe}{self._last_line()}")
        return self._failure(stranger) if stranger else None

    async def _probe_until_ready(self, child: trio.Process) -> str | None:
        """Return once the server answers 200; the text says whose server it is when it is not our child's."""
        if self.spec.check_endpoint is None:
            return None
        url = self.spec.proxy + self.spec.check_endpoint
        while (answer := await self._prober.ready(url)) is not None:
            self._last_probe = answer
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
        tree = self._family(child) if child else []
        if proctree.port_owner(self._port, self._host, tree) is not PortOwner.STRANGER:
            return None
        owners = ", ".join(f"{p.name} (pid {p.pid})" for p in proctree.who_listens(self._port, self._host))
        return (
            f"port {self._port} belongs to {owners or 'another process'}, not to the server of this model; stop that, "
            f'use ${{PORT}}, or set port_owner = "any" when the server runs in a container'
        )

    # ---- stop ----------------------------------------------------------------------------

    async def _end(self, child: trio.Process, output: trio.CancelScope) -> None:
        """Stop signal or command, grace, SIGKILL to the whole tree, port free, last words.  Bounded."""
        try:
            deadline = trio.current_time() + self.spec.unload_timeout
            if self._alive(child):
                await self._ask_to_stop(child, deadline)
                with trio.move_on_at(deadline):
                    await self._wait_tree_gone(child)
            with trio.move_on_after(KILL_WAIT):
                await self._kill_tree(child)
            self.stuck = self._alive(child)
            if not self.stuck:
                self._guardian.ended(self.marker)
                with trio.move_on_after(PORT_WAIT):
                    await self._wait_port_free()
        finally:
            output.deadline = trio.current_time() + OUTPUT_GRACE

    async def _ask_to_stop(self, child: trio.Process, deadline: float) -> None:
        # Not by command once the child is reaped: ${PID} might name somebody else.
        by_command = self.spec.stop_argv is not None and child.returncode is None
        if not (by_command and await self._run_stop_command(child, deadline)):
            self._signal(child, self.spec.stop_signal)

    async def _run_stop_command(self, child: trio.Process, deadline: float) -> bool:
        """Run `cmd_stop` to its end or the deadline; True when it ended with 0.

        It carries the marker: what it leaves running is swept with the tree.
        """
        assert self.spec.stop_argv is not None
        try:
            command = await self._open([part.replace("${PID}", str(child.pid)) for part in self.spec.stop_argv])
        except (OSError, ValueError) as exc:
            logger.warning("cmd_stop cannot be run model=%s: %s", self.spec.name, reason(exc))
            return False
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_output, command, trio.CancelScope())
            with trio.move_on_at(deadline):
                await command.wait()
            nursery.cancel_scope.deadline = trio.current_time() + OUTPUT_GRACE
            if command.returncode is None:
                _kill(command)
                await command.wait()
        if command.returncode != 0:
            logger.warning("cmd_stop failed model=%s code=%s", self.spec.name, command.returncode)
        return command.returncode == 0

    def _signal(self, child: trio.Process, number: signal.Signals) -> None:
        """Signal the whole tree, each process once: a second SIGTERM makes some servers give up at once.

        What belongs to another user stays untouched, and so will be found to be stuck.
        """
        group = child.pid if child.returncode is None else None  # not reaped yet, so the number is still ours
        if group is not None:
            with contextlib.suppress(PermissionError):
                os.killpg(group, number)
        for process in self._family(child):
            if group is None or _group_of(process.pid) != group:
                proctree.kill(process, number)

    def _alive(self, child: trio.Process) -> bool:
        return child.returncode is None or bool(self._family(child))

    def _family(self, child: trio.Process) -> list[proctree.Process]:
        """Who is left of the tree; once that is nobody, `proctree.members` must not be asked again."""
        if self._gone:
            return []
        reaped = child.returncode is not None
        # One look may miss a server that forks and ends just then, as daemons do; a second one finds its child.
        found = proctree.members(child.pid, self.marker) or proctree.members(child.pid, self.marker)
        self._gone = reaped and not found
        return found

    async def _wait_tree_gone(self, child: trio.Process) -> None:
        await child.wait()
        for pause in _pauses():
            if not self._alive(child):
                return
            await trio.sleep(pause)

    async def _kill_tree(self, child: trio.Process) -> None:
        for pause in _pauses():
            if not self._alive(child):
                return
            self._signal(child, signal.SIGKILL)  # again and again: who forks during a look is found by the next one
            await trio.sleep(pause)

    async def _wait_port_free(self) -> None:
        """A stranger will not leave the port for our sake."""
        for pause in _pauses():
            if not proctree.listening_inodes(self._port, self._host) or self._stranger_on_port():
                return
            await trio.sleep(pause)

    # ---- words ---------------------------------------------------------------------------

    def _failure(self, why: str) -> StartFailed:
        logger.warning("start failed model=%s: %s", self.spec.name, why)
        # Nobody else kills a server that is loading with SIGKILL: the kernel does when memory is short.
        # Shells and container runtimes say it of theirs in their own exit code.
        killed = self._child is not None and self._child.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL)
        return StartFailed(self.spec.name, why, out_of_memory=killed or self._short_of_memory)

    def _last_line(self) -> str:
        """Of this attempt; the ring also keeps what earlier ones said."""
        lines = self._last_bytes.decode(errors="replace").strip().splitlines()
        return f' ("{lines[-1].strip()}")' if lines else ""


def _pauses() -> Iterator[float]:
    """Seconds between looks at what gives no notice."""
    pause = LOOK_FIRST
    while True:
        yield pause
        pause = min(pause * LOOK_GROWTH, LOOK_MAX)


def _group_of(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except OSError:
        return None


async def _cancel_on_exit(child: trio.Process, scope: trio.CancelScope) -> None:
    await child.wait()
    scope.cancel(reason="the child ended")


def _kill(process: trio.Process) -> None:
    with contextlib.suppress(PermissionError):
        process.kill()


def _exit_text(code: int) -> str:
    if code >= 0:
        return f"exited with {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
