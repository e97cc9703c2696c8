"""The daemon's side of the guardian: start the program `guard`, tell it what there is to guard, end it.

To tell costs microseconds and never waits: a line that the pipe does not take at once is
told later, and all over again to a guardian that had to be started anew.  Meanwhile nothing
is lost, for the processes of a model server carry the marker too.
"""

from __future__ import annotations

import json
import logging
import os
import select
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, Protocol

import attrs
import trio

from trioswap import guard, proctree

logger = logging.getLogger(__name__)

PROGRAM: Final = Path(guard.__file__).absolute()
# Imported, because Python keeps compiled what is, which saves a megabyte.  Ended without `threading`, which would take
# the thread that has imported it first, for a stop command, for the main one.
_LOAD: Final = """
import os, sys
sys.path.insert(0, os.path.dirname(sys.argv[1]))
import guard
del sys.path[0]
guard.main(sys.argv[2], *map(int, sys.argv[3:]))
os._exit(0)
"""
# Seconds until a guardian that died is replaced: at first, and when the next ones die too.
RESTART_MIN: Final = 0.1
RESTART_MAX: Final = 60.0
# It has nothing to do after its farewell.
END_WAIT: Final = 2.0

_FORGET: Final = b"forget\n"
_END: Final = b"end\n"


class Watcher(Protocol):
    """Who is told which attempts at running model servers there are.  Never waits, never fails."""

    def began(self, pid: int, marker: str, stop: Sequence[str] = (), env: Mapping[str, str] | None = None) -> None:
        """The child *pid* was started in a session of its own, with *marker*.

        *stop* is the command that stops it, ${PID} not yet filled in, with *env* besides our own environment.
        May be told again, with other news or with the other marker that the attempt may have (`guard.SPARED`),
        even when the child has ended and others of its session have not.
        """
        ...

    def ended(self, marker: str) -> None:
        """Nobody is left of that attempt."""
        ...


class _Nobody:
    def began(self, pid: int, marker: str, stop: Sequence[str] = (), env: Mapping[str, str] | None = None) -> None:
        """Nothing."""

    def ended(self, marker: str) -> None:
        """Nothing."""


NOBODY: Final[Watcher] = _Nobody()


def command(instance: str, keeps_open: Sequence[int] = ()) -> list[str]:
    """The command of the program, for *instance*; the descriptors that it *keeps_open* are for it to close."""
    return [sys.executable, "-I", "-S", "-B", "-c", _LOAD, str(PROGRAM), instance, *map(str, keeps_open)]


@asynccontextmanager
async def guarded(
    instance: str, anybody_late: Callable[[], bool] = lambda: False, keeps_open: Sequence[int] = ()
) -> AsyncIterator[Guardian]:
    """A guardian for what the block starts; it stays until the block has ended, however that ends.

    The program has the descriptors that it *keeps_open* for as long as the next daemon has to wait (`guard.Sweep`),
    and hands them to nobody.

    If *anybody_late* says in the end that something may still come (`spawning`), it is left to the guardian.
    """
    async with trio.open_nursery() as nursery:
        guardian = Guardian(instance, anybody_late, keeps_open)
        await nursery.start(guardian.run)
        try:
            yield guardian
        finally:
            nursery.cancel_scope.cancel(reason="nothing is left to guard")


@attrs.define(eq=False)
class Guardian:
    """The guardian of the attempts whose markers begin with *instance* and a dash."""

    instance: str
    _anybody_late: Callable[[], bool] = lambda: False
    _keeps_open: Sequence[int] = ()
    pid: int | None = attrs.field(default=None, init=False)
    """Of the program; None while there is none."""
    _pipe: int | None = attrs.field(default=None, init=False)
    _attempts: dict[str, bytes] = attrs.field(factory=dict, init=False)
    """What there is to tell of each attempt, by its marker."""
    _told: bool = attrs.field(default=False, init=False)
    """The program knows `_attempts`; else `_catch_up` is at work."""
    _news: trio.Event = attrs.field(factory=trio.Event, init=False)
    _complaint: str = attrs.field(default="", init=False)
    """Why it could not be started the last time; said once."""

    def began(self, pid: int, marker: str, stop: Sequence[str] = (), env: Mapping[str, str] | None = None) -> None:
        """Guard the family of *pid* too; see `Watcher`."""
        known = f"began {pid} {self._start_time(pid, marker)} {marker} "
        command = json.dumps({"argv": list(stop), "env": dict(env or {})}) if stop else "-"
        if len(known) + len(command) >= select.PIPE_BUF:  # a longer line might be written in part
            logger.warning("cmd_stop is too long for the guardian, which will signal only attempt=%s", marker)
            command = "-"
        self._attempts[marker] = f"{known}{command}\n".encode()
        self._tell(self._attempts[marker])

    def _start_time(self, pid: int, marker: str) -> int:
        """Of the child; as it was told before, for once that has ended its pid may be somebody else's."""
        attempt = marker.removesuffix(guard.SPARED)
        if told := self._attempts.get(attempt) or self._attempts.get(attempt + guard.SPARED):
            return int(told.split(b" ", 3)[2])
        try:
            process = proctree.look(pid)
        except OSError:  # nobody can say; the marker still tells whose it is
            process = None
        return process.start_time if process else 0

    def ended(self, marker: str) -> None:
        """Guard that attempt no longer."""
        if self._attempts.pop(marker, None) is not None:
            self._tell(f"ended {marker}\n".encode())

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the program running until cancelled, and end it then; `started` when it has been started, or cannot be.

        Takes at most twice `END_WAIT` for the end.
        """
        pause = RESTART_MIN
        if not proctree.PROC.joinpath("self/stat").exists():
            logger.info("there is no /proc, so nobody would stop the model servers if the daemon were killed")
        while True:
            begun = trio.current_time()
            program = await self._start()
            task_status.started()
            task_status = trio.TASK_STATUS_IGNORED
            # No checkpoint since the spawn, so no cancellation comes in between.
            if program is not None:
                await self._stay_with(program)
            if trio.current_time() > begun + RESTART_MAX:
                pause = RESTART_MIN
            await trio.sleep(pause)
            pause = min(2 * pause, RESTART_MAX)

    async def _start(self) -> trio.Process | None:
        try:
            program = await trio.lowlevel.open_process(
                command(self.instance, self._keeps_open),
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
                pass_fds=self._keeps_open,
                # Without the marker of a daemon that may have started us: its guardian would stop ours.
                env={name: value for name, value in guard.inherited().items() if name != proctree.MARKER},
            )
        except (OSError, ValueError) as exc:
            if str(exc) != self._complaint:
                logger.warning("no guardian, so a daemon that is killed leaves its model servers: %s", exc)
            self._complaint = str(exc)
            return None
        self._complaint = ""
        return program

    async def _stay_with(self, program: trio.Process) -> None:
        """Tell it everything, until it ends by itself; when cancelled, end it."""
        assert isinstance(program.stdin, trio.lowlevel.FdStream)
        self.pid, self._pipe = program.pid, program.stdin.fileno()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._catch_up, self._pipe)
                await program.wait()
                nursery.cancel_scope.cancel(reason="the guardian ended")
            logger.warning("the guardian has died pid=%d code=%s; it is started again", program.pid, program.returncode)
        finally:
            pipe, self.pid, self._pipe, self._told = self._pipe, None, None, False
            # Shielded, or a zombie would be left; it reacts at once, and SIGKILL ends it if it does not.
            with trio.CancelScope(shield=True):
                await _end(program, pipe, farewell=not self._anybody_late())

    def _tell(self, line: bytes) -> None:
        if self._pipe is None or not self._told or not _write(self._pipe, line):
            self._told = False
            self._news.set()

    async def _catch_up(self, pipe: int) -> None:
        """Tell everything at the beginning, and whenever `_tell` could not."""
        while True:
            self._news = trio.Event()
            self._told = await self._tell_all(pipe)
            if self._told:
                logger.info("the guardian has been told pid=%s attempts=%d", self.pid, len(self._attempts))
                await self._news.wait()

    async def _tell_all(self, pipe: int) -> bool:
        """Return False when something has happened meanwhile, so that it must be told again."""
        for line in [_FORGET, *self._attempts.values()]:
            while not _write(pipe, line):
                await trio.lowlevel.wait_writable(pipe)
                if self._news.is_set():
                    return False
        return True


def _write(pipe: int, line: bytes) -> bool:
    """Write all or nothing, at once; return whether that is done.  A pipe without a reader takes everything."""
    try:
        os.write(pipe, line)
    except BlockingIOError:
        return False
    except BrokenPipeError:
        pass
    return True


async def _end(program: trio.Process, pipe: int, *, farewell: bool) -> None:
    """Say farewell and wait; a guardian that cannot hear it must not think that we are dead.

    Without *farewell* it stops what is left, for which it may take longer than we live.
    """
    assert program.stdin is not None
    if program.returncode is None and not farewell:
        await program.stdin.aclose()
        with trio.move_on_after(END_WAIT):
            await program.wait()
        return
    if program.returncode is None and _write(pipe, _END):
        with trio.move_on_after(END_WAIT):
            await program.wait()
    if program.returncode is None:
        program.kill()
        with trio.move_on_after(END_WAIT):  # it may sleep in the kernel, where it reads of a process that does
            await program.wait()
    await program.stdin.aclose()
