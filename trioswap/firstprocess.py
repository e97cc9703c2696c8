"""What the first process of a container has to do, so that the daemon need not: `trioswap serve` is often just that.

The kernel gives every process whose parent has ended to the first one of its pid namespace, and the
dead among them stay zombies until that waits for them (pid_namespaces(7)); each holds a place of what
`pids.max` grants.  It also withholds from the first process all signals that it has no handler for, SIGTERM
as well, while the daemon is still being set up.  And all others are killed when the first one ends, which
cuts the guardian off from its work.

So there the daemon runs in a child, and the first process stands by: it waits for whoever ends,
passes signals on, and ends as the daemon does.  Elsewhere, and behind an init such as `docker run --init`,
nothing is done.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from trioswap import guard

_FIRST: Final = 1
# In these a service manager says whom it means by number (sd_listen_fds(3), sd_watchdog_enabled(3)).
_MEANT_FOR: Final = ("LISTEN_PID", "WATCHDOG_PID")
_GUARDIAN: Final = bytes(Path(guard.__file__).absolute())
# What a shell says of a program that a signal has ended: this and the signal's number.
_SIGNALLED: Final = 128


def step_aside() -> None:
    """Return in a child if this is the first process of a container, and at once otherwise.

    The first process itself never returns from here.  To be called while there is one thread.
    """
    if os.getpid() != _FIRST:
        return
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # none is withheld that is blocked
    try:
        daemon = os.fork()
    except OSError:  # nothing can be forked, so there will be no orphans either
        daemon = 0
    if daemon:
        os._exit(_stand_by(daemon))
    with suppress(PermissionError):  # the fork has failed, and we lead a session
        os.setsid()  # or Ctrl-C in a terminal would reach the daemon twice, which hastens it
    for name in _MEANT_FOR:
        if os.environ.get(name) == str(_FIRST):
            os.environ[name] = str(os.getpid())
    signal.pthread_sigmask(signal.SIG_SETMASK, earlier)


def _stand_by(daemon: int) -> int:
    """Wait for everybody until the child *daemon* has ended; the exit code to end with.

    If it was killed, its guardian is waited for, until it has stopped what was left, or somebody is in a hurry.
    """
    code, deadline = 0, float("inf")
    questions = guard.Questions()
    while True:
        for pid, status in _ended():
            if pid == daemon:
                code = os.waitstatus_to_exitcode(status)
                deadline = time.monotonic() + (guard.PATIENCE if code < 0 else 0.0)
        if time.monotonic() >= deadline or (deadline < float("inf") and not _has_guardian(questions)):
            return code if code >= 0 else _SIGNALLED - code
        number = _next_signal(deadline)
        if number is not None and number != signal.SIGCHLD:
            if deadline < float("inf"):
                deadline = 0.0
            else:
                os.kill(daemon, number)


def _ended() -> Iterator[tuple[int, int]]:
    """The pid and the status of each child that has ended, which is no zombie then."""
    with suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            yield found


def _has_guardian(questions: guard.Questions) -> bool:
    """Whether one of our children, which those of the daemon have become, is a guardian; True when nobody can say."""
    try:
        stats = {pid: guard.read(pid, "stat").rpartition(b")")[2].split() for pid in guard.pids()}
        children = [(pid, int(stat[19])) for pid, stat in stats.items() if stat and int(stat[1]) == os.getpid()]
        return any(questions.ask(_is_guardian, children).values())
    except OSError:
        return True


def _is_guardian(pid: int) -> bool:
    return _GUARDIAN in guard.read(pid, "cmdline").split(b"\0")


def _next_signal(deadline: float) -> int | None:
    """The next signal, all of which are blocked; None at *deadline* on the monotonic clock."""
    if deadline == float("inf"):
        return signal.sigwaitinfo(signal.valid_signals()).si_signo
    found = signal.sigtimedwait(signal.valid_signals(), max(0.0, deadline - time.monotonic()))
    return None if found is None else found.si_signo
