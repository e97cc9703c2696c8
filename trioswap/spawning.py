"""Starts children in sessions of their own, within a bound, and waits for their end.

What is run, what becomes of its output, and how it is stopped is for others.

Why it is hard: a program is loaded by the system call that the child makes, and when its file system
is dead that call does not return, nor can anybody end it.  So the spawn happens in a thread, which
is left to itself when it is late, and this is what follows from it:

- Whoever waits and the thread agree under a lock on whose the process is.  A process that comes
  when nobody waits any more is ended and reaped by the thread: it is never lost.  When the daemon
  ends before that, its guardian ends it (`anybody_late`, `guard.thread_name`).
- Such a thread may stay for ever, so it takes no place of those that Trio has for all.
- `subprocess` uses vfork, which holds the calling thread until the program is loaded, and before
  Python 3.11.4 all threads (CPython issue 104372).  There it is told to fork, which takes some
  milliseconds more.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final

import attrs
import trio

from trioswap import guard, proctree

logger = logging.getLogger(__name__)

if sys.version_info < (3, 11, 4):
    vars(subprocess)["_USE_VFORK"] = False  # as its documentation says; typeshed calls it final

# What a start may fail of whatever is to be started, and what can be done about it (fork(2), pipe(2)).
_SHORTAGES: Final = {
    errno.EMFILE: "trioswap has no file descriptor left; raise LimitNOFILE of its service, or `ulimit -n`",
    errno.ENFILE: "the machine has no file descriptor left; raise fs.file-max, or see who has so many open",
    errno.EAGAIN: "no process can be added; raise TasksMax and LimitNPROC of the service, or `ulimit -u`",
    errno.ENOMEM: "the kernel has no memory left; see who uses it",
}
# Seconds for which a cancellation waits for a spawn that is under way: mostly the process is there at once.
HOLD: Final = 5.0
# Seconds between two looks whether a child has ended where nothing tells; whether what came too late has ended: at
# first, doubled each time, and at most.
LOOK_FIRST: Final = 0.05
LOOK_MAX: Final = 5.0


def shortage(exc: BaseException) -> str | None:
    """What we have run out of, and what to do, if *exc* says that; it is no fault of what was to be started."""
    return _SHORTAGES.get(exc.errno or 0) if isinstance(exc, OSError) else None


# Whose thread is not over though nobody waits for it.
_late: Final[set[_Handover]] = set()


def anybody_late() -> bool:
    """Whether something was given up that may still come, or has come too late and not ended yet."""
    return bool(_late)


class SpawnTooLate(Exception):
    """The program was not loaded in time."""

    def __str__(self) -> str:
        """What may be the matter."""
        return "it is not loaded in time, does the file system that it is on answer?"


@attrs.define(eq=False)
class Child:
    """A process that we started."""

    _popen: subprocess.Popen[bytes]
    stdout: trio.lowlevel.FdStream
    """What it writes to its standard output and error; whoever reads it closes it."""

    @property
    def pid(self) -> int:
        """Its number, which is somebody else's as soon as `returncode` is not None."""
        return self._popen.pid

    @property
    def returncode(self) -> int | None:
        """Its exit code, or minus the signal that ended it; None while it lives."""
        return self._popen.poll()

    async def wait(self) -> int:
        """Return `returncode` once it has ended.  May wait for ever."""
        await trio.lowlevel.checkpoint()
        while (code := self._popen.poll()) is None:
            await _wait_ended(self.pid)
        return code

    def signal_group(self, number: int) -> None:
        """Signal its process group, unless it has been reaped, or the group is not ours to signal."""
        if self.returncode is None:
            with contextlib.suppress(PermissionError):
                os.killpg(self.pid, number)


async def _wait_ended(pid: int) -> None:
    """Return when our child *pid*, which is not reaped, has ended, or is to be looked at once more."""
    try:
        descriptor = os.pidfd_open(pid)
    except (AttributeError, OSError):  # another system, a kernel before 5.3, or no descriptor free
        look = partial(os.waitid, os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        try:
            await trio.to_thread.run_sync(look, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1))
        except ChildProcessError:  # somebody has asked for its `returncode` meanwhile
            pass
        except RuntimeError:  # "can't start new thread"
            await trio.sleep(LOOK_FIRST)
        return
    try:
        await trio.lowlevel.wait_readable(descriptor)
    finally:
        os.close(descriptor)


async def spawn(
    argv: Sequence[str],
    env: Mapping[str, str],
    adopt: Callable[[Child], None],
    *,
    deadline: float,
    last_signal: signal.Signals = signal.SIGKILL,
) -> None:
    """Start *argv* in a session of its own, with *env* besides our environment, no input, and its output in a pipe.

    The process, once there, is handed to *adopt*, also when a cancellation comes meanwhile: that is
    held back, for `HOLD` seconds at most.  A process that comes later still, or after *deadline*
    (Trio's time), gets *last_signal* and is reaped without being handed to anybody.

    Raises:
        SpawnTooLate: the program was not loaded by then.
        OSError: it cannot be run.
        ValueError: an argument or a variable cannot be passed on.
    """
    await trio.lowlevel.checkpoint_if_cancelled()
    handover = _Handover(argv, {**guard.inherited(), **env}, last_signal, trio.lowlevel.current_trio_token())
    try:
        with trio.move_on_at(deadline):
            await handover.start()
    finally:
        # Shielded, or each cancelled start would end in the thread, unseen; it has its deadline.
        with trio.CancelScope(deadline=min(deadline, trio.current_time() + HOLD), shield=True):
            await handover.settled.wait()
        child = handover.take()
        if child is not None:
            adopt(child)
    if child is None:
        raise SpawnTooLate


@attrs.define(eq=False)
class _Handover:
    """A spawn in a thread, and the agreement who owns what comes of it."""

    argv: Sequence[str]
    env: Mapping[str, str]
    last_signal: signal.Signals
    token: trio.lowlevel.TrioToken
    settled: trio.Event = attrs.field(factory=trio.Event)
    """The thread is over, or about to be."""
    _lock: threading.Lock = attrs.field(factory=threading.Lock)
    _spawned: tuple[subprocess.Popen[bytes], int] | None = None
    """The process and our end of its output, until somebody takes them."""
    _given_up: bool = False
    _over: bool = False

    def take(self) -> Child | None:
        """What has come; None: nothing, and what comes later is the thread's."""
        with self._lock:
            self._given_up = self._spawned is None
            if self._spawned is None:
                if not self._over:
                    _late.add(self)
                return None
            popen, output = self._spawned
            return Child(popen, trio.lowlevel.FdStream(output))

    async def start(self) -> None:
        """Run in a thread, which is left to itself when this is cancelled.

        Raises:
            OSError, ValueError: nothing can be spawned.
        """
        name = guard.thread_name(self.env.get(proctree.MARKER, "").partition("-")[0])
        try:
            await trio.to_thread.run_sync(
                self.run, thread_name=name, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1)
            )
        except RuntimeError as exc:  # "can't start new thread"
            self._over = True
            self.settled.set()
            raise OSError(errno.EAGAIN, str(exc)) from exc

    def run(self) -> None:
        """Spawn.  In the thread.

        Raises:
            OSError, ValueError: nothing can be spawned.
        """
        try:
            output, theirs = os.pipe()
            try:
                popen = self._open(theirs)
            except BaseException:
                os.close(output)
                raise
            finally:
                os.close(theirs)
            with self._lock:
                if not self._given_up:
                    self._spawned = popen, output
                    return
            self._end(popen, output)
        finally:
            with self._lock:
                self._over = True
                _late.discard(self)
            with contextlib.suppress(trio.RunFinishedError):
                self.token.run_sync_soon(self.settled.set)

    def _open(self, output: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(  # noqa: S603 - the command is the configuration's
            self.argv,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=self.env,
        )

    def _end(self, popen: subprocess.Popen[bytes], output: int) -> None:
        """End what nobody waits for any more, and whom it has started; waits for that as long as it takes."""
        os.close(output)
        logger.warning("a process came too late and is ended pid=%d %s", popen.pid, self.argv[0])
        with contextlib.suppress(OSError):
            os.killpg(popen.pid, self.last_signal)
        popen.wait()
        marker, asked, pause = self.env.get(proctree.MARKER), set[proctree.Process](), LOOK_FIRST
        while marker is not None:
            with contextlib.suppress(OSError):  # while nobody can say, somebody is there
                # By the marker alone: the number is not its own any more.
                left = set(proctree.members(-1, marker))
                if not left:
                    return
                for process in left - asked:
                    proctree.kill(process, self.last_signal)
                asked |= left
            threading.Event().wait(pause)
            pause = min(2 * pause, LOOK_MAX)
