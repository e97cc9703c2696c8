"""The guardian: stops what a daemon leaves when it is killed.  A program of its own (`guardian.command`).

Nobody who has been killed cleans up after itself, so this waits beside the daemon, with a pipe from it
as standard input.  It hears, line by line, which attempts at running model servers there are:

    began PID START_TIME MARKER STOP    STOP: {"argv": [...], "env": {...}} is to be run at the end, or -
    ended MARKER
    forget                              everything heard so far; it is told anew
    end                                 all is well; nothing is stopped

When the pipe ends without `end`, the daemon is dead, however it died.  Then whoever carries the marker of an attempt of
INSTANCE in its environment is stopped, and whoever is in the session of an attempt that was told.  A number alone
proves nothing, for pids are given to others: a session counts only while its leader has the start time that was told,
or a member carries the marker or was found before.  What was forked and has not loaded its program yet, which takes
long where a file system does not answer, has no marker but the name of the thread that forked it (`thread_name`).

Only a little of the standard library is imported, so that it is small and there at once.  What it
reads in /proc is explained in `proctree`.  `instance` uses `Sweep` for what an earlier daemon left.
"""
# pathlib and contextlib would cost megabytes, and the stop commands are the configuration's:
# ruff: noqa: PTH123, PTH208, SIM105, S603

from __future__ import annotations

import _thread  # the part of threading that is there already
import os
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from collections.abc import Callable, Collection, Iterable
    from subprocess import Popen
    from typing import TypeVar

    T = TypeVar("T")
else:
    import _signal as signal  # all but the enumerations, which would cost a megabyte

MARKER = b"TRIOSWAP_ATTEMPT="
# The marker of an attempt ends so when its processes must not get SIGKILL; as it is told, it says what holds now.
SPARED = "-spared"
# The kernel keeps so many bytes of the name of a thread (TASK_COMM_LEN less its NUL, prctl(2)).
NAME_LENGTH = 15
# What systemd tells a service and nobody else (sd_notify(3), sd_watchdog_enabled(3)).
NOT_INHERITED = ("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC")
# Seconds from SIGTERM to SIGKILL, for a stop command, and for all of it.
GRACE = 0.5
COMMAND_TIME = 10.0
PATIENCE = 30.0
# Seconds for which the next daemon has to wait, stop commands aside: who is left by then has survived SIGKILL.
HELD = 2.0
# ENOMEM, ENFILE, EMFILE (errno(3)): a look that fails of one of these has not found that nobody is there.
SHORTAGE = (12, 23, 24)
# Seconds between looks at /proc, each of which takes some milliseconds.
PAUSE = 0.05
# Seconds granted to what may be stuck and must not hold up the rest: a line to somebody who does not read, a
# program on a file system that does not answer, a process that waits for one; and for each more that hangs at once.
ASIDE = 0.5
ASIDE_MORE = 0.05

Identity = tuple[int, int]
"""Pid and start time: one process, and no other before or after it."""
Attempts = dict[str, tuple[Identity, str]]
"""By marker: the leader, and the stop command as it was told."""


def main(instance: str, *held: int) -> None:
    """Wait for the end of the daemon, then stop what it left; *held* keeps the next one waiting (`Sweep.held`)."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which the stop commands would inherit
    attempts: Attempts = {}
    if hear(sys.stdin.buffer, attempts):
        return
    sweep = Sweep([instance], attempts)
    sweep.held += held
    try:
        sweep.look()  # before a stop command ends a leader, which alone may tell whose its session is
    except OSError:
        pass
    sweep.run(GRACE, PATIENCE, start_commands(attempts))
    if sweep.found:
        rest = f", {len(sweep.left)} are still there" if sweep.left else ""
        say(f"the daemon has left processes, which were stopped: {len(sweep.found)}{rest}")


def hear(lines: Iterable[bytes], attempts: Attempts) -> bool:
    """Keep *attempts* as the daemon tells; return whether it said `end`."""
    for line in lines:
        match line.decode(errors="replace").rstrip("\n").split(" ", 4):
            case ["began", pid, start_time, marker, stop]:
                attempts[marker] = (int(pid), int(start_time)), stop
            case ["ended", marker]:
                attempts.pop(marker, None)
            case ["forget"]:
                attempts.clear()
            case ["end"]:
                return True
    return False


def say(text: str) -> None:
    """To whom the daemon spoke, if anybody listens."""

    def write() -> None:
        try:
            os.write(2, f"trioswap: guardian: {text}\n".encode())
        except OSError:
            pass

    try:
        wait(begin(write), ASIDE)
    except RuntimeError:
        pass


def begin(job: Callable[..., None], *arguments: object) -> _thread.LockType:
    """Do *job* in a thread, for whose end the end of the program does not wait; the lock is held until it is done.

    Raises:
        RuntimeError: no thread is to be had.
    """
    over = _thread.allocate_lock()

    def work() -> None:
        try:
            job(*arguments)
        finally:
            over.release()

    over.acquire()
    _thread.start_new_thread(work, ())
    return over


def wait(over: _thread.LockType, seconds: float) -> bool:
    """Whether that is done now, or in so many *seconds*."""
    done = over.acquire(timeout=max(0.0, seconds))
    if done:
        over.release()
    return done


def inherited() -> dict[str, str]:
    """Our environment, without that which would let a child speak in our name, as `podman run` does."""
    return {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}


def thread_name(instance: str) -> str:
    """The name of a thread that spawns for *instance*; what it forks has it, too, until its program is loaded."""
    return f"spawn-{instance}"[:NAME_LENGTH]


class Sweep:
    """The end of everything that some instances of the daemon have started."""

    def __init__(self, instances: Collection[str], attempts: Attempts, changed: Collection[str] = ()) -> None:
        self.prefixes = tuple(f"{instance}-" for instance in instances)
        self.threads = {thread_name(instance) for instance in instances}
        self.attempts = attempts
        self.told = {*attempts, *changed}
        self.found: dict[Identity, tuple[str, str]] = {}
        """Everybody who was to be stopped: the marker of the attempt, and the program's name."""
        self.left: set[Identity] | None = None
        """Who was still there at the last look that succeeded; None: none has, so nobody can say."""
        self.held: list[int] = []
        """Descriptors to be closed as soon as the next daemon need not wait any longer."""
        self.questions = Questions()

    def run(self, grace: float, patience: float, commands: Commands | None = None) -> None:
        """SIGTERM; after *grace* seconds SIGKILL, until nobody is seen twice and *commands* have ended.

        Whoever is spared gets SIGTERM alone and is waited for no longer than *grace*.  Takes *patience* at most.
        """
        begun, nobody, now = time.monotonic(), 0, 0.0
        asked: set[Identity] = set()
        while (nobody < 2 or (commands is not None and commands.busy(now))) and now < patience:
            try:
                self.left = self.look()
            except OSError:  # nobody can say, so nobody is taken for gone
                nobody = -1
            left = self.left or set()
            to_kill = {process for process in left if not self.is_spared(process)}
            for process in left:
                if now >= grace and process in to_kill:
                    send(process, signal.SIGKILL)
                elif process not in asked:
                    send(process, signal.SIGTERM)
            asked |= left
            nobody = 0 if to_kill or (left and now < grace) else nobody + 1
            if commands is not None and now > COMMAND_TIME:
                commands.end()
            if self.held and now > HELD and not (commands is not None and commands.busy(0.0)):
                os.close(self.held.pop())
            time.sleep(PAUSE)  # noqa: TID251 - in a program, or a thread, of its own
            now = time.monotonic() - begun

    def is_spared(self, process: Identity) -> bool:
        """Whether it must not get SIGKILL, as was told last, else since its start."""
        marker = self.found[process][0]
        attempt = marker.removesuffix(SPARED)
        return attempt + SPARED in self.told or (marker != attempt and attempt not in self.told)

    def look(self) -> set[Identity]:
        """Who is there now; `found` grows by those that are new.

        Raises:
            OSError: of `SHORTAGE`, so nobody can say.
        """
        processes = {(pid, stat[2]): stat for pid in pids() if (stat := read_stat(pid)) is not None}
        alive = {identity for identity, stat in processes.items() if not stat[3]}
        markers = self.questions.ask(marker_of, alive)
        for identity, marker in markers.items():
            if marker.startswith(self.prefixes):
                # Anew each time: what had not loaded its program may be one that is spared.
                self.found[identity] = marker, processes[identity][0]
            elif processes[identity][0] in self.threads:
                self.found.setdefault(identity, ("", processes[identity][0]))
        for marker, (leader, _) in self.attempts.items():
            same = marker.removesuffix(SPARED), marker.removesuffix(SPARED) + SPARED
            members = [identity for identity in alive if processes[identity][1] == leader[0]]
            # A leader that is dead and not yet reaped holds its number.
            if leader in processes or any(self.found.get(member, ("",))[0] in same for member in members):
                for member in members:
                    self.found.setdefault(member, (marker, processes[member][0]))
        return alive & self.found.keys()


class Questions:
    """Questions to many processes, of which one that hangs may leave its own unanswered.

    Its environment, for one, is read under the lock of its memory map.  Who maps a file of a file system that does not
    answer holds that lock until it does.  So the questions are put in a thread, which is left to itself when it hangs.
    """

    def __init__(self) -> None:
        self.late: list[list[Identity]] = []
        """By thread that was left to itself: whose answer it waits for; nobody's once it has ended."""

    def ask(self, question: Callable[[int], T], processes: Iterable[Identity]) -> dict[Identity, T]:
        """The answers of those who give one, by their pids; who hangs costs `ASIDE` seconds at most, once.

        Raises:
            OSError: from *question*.
        """
        answers: dict[Identity, T] = {}
        errors: list[OSError] = []

        def work(at: list[Identity], rest: list[Identity]) -> None:
            try:
                for process in rest:
                    at[:] = [process]
                    answers[process] = question(process[0])
            except OSError as exc:
                errors.append(exc)
            finally:
                at.clear()

        self.late = [at for at in self.late if at]
        hanging = {process for at in self.late for process in at}
        rest, seconds = [process for process in processes if process not in hanging], ASIDE
        while rest:
            at: list[Identity] = []
            try:
                done = wait(begin(work, at, rest), seconds)
            except RuntimeError:  # no thread is to be had
                work(at, rest)
                done = True
            if errors:
                raise errors[0]
            if done:
                break
            # It may have got further meanwhile: then somebody is asked twice, no more.
            self.late.append(at)
            rest, seconds = [process for process in rest if process not in answers and process not in at], ASIDE_MORE
        return dict(answers)  # a late one writes to the other


# ---- stop commands --------------------------------------------------------------------


class Commands:
    """Stop commands under way; a container, for one, is no descendant of its client."""

    def __init__(self) -> None:
        self.starts: list[_thread.LockType] = []
        """Held until the start of one is over."""
        self.started: list[Popen[bytes]] = []

    def busy(self, now: float) -> bool:
        """Whether any has not ended, or may still start; *now* is the time since they began."""
        starting = now <= COMMAND_TIME and any(over.locked() for over in self.starts)
        return starting or any(command.poll() is None for command in self.started)

    def end(self) -> None:
        """SIGKILL to those that are late, and to what they have started."""
        for command in self.started:
            if command.poll() is None:
                try:
                    os.killpg(command.pid, signal.SIGKILL)
                except OSError:  # another user's by now
                    pass


def start_commands(attempts: Attempts) -> Commands:
    """Run the stop commands; return when they have started, which is waited for `ASIDE` seconds at most.

    For a command whose ${PID} has been ended before makes no sense any more.
    """
    commands = Commands()
    for leader, stop in attempts.values():
        if stop != "-":
            try:
                commands.starts.append(begin(start, leader, stop, commands.started))
            except RuntimeError:  # no thread, so no process is to be had either
                pass
    deadline = time.monotonic() + ASIDE
    for over in commands.starts:
        wait(over, deadline - time.monotonic())
    return commands


def start(leader: Identity, stop: str, started: list[Popen[bytes]]) -> None:
    """Add one stop command to those *started*, unless it cannot be run, or its ${PID} may be somebody else by now."""
    try:
        import json
        import subprocess

        if sys.version_info < (3, 11, 4):  # as in `spawning`: vfork would hold up all threads
            vars(subprocess)["_USE_VFORK"] = False
        told = json.loads(stop)
        argv = [part.replace("${PID}", str(leader[0])) for part in told["argv"]]
        stat = read_stat(leader[0])
        if argv != told["argv"] and (stat is None or stat[2] != leader[1]):
            return
        quiet, env = subprocess.DEVNULL, {**os.environ, **told["env"]}
        started.append(subprocess.Popen(argv, env=env, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True))
    # ImportError: the interpreter was replaced or removed while the daemon ran.
    except (ImportError, OSError, ValueError, LookupError) as exc:
        say(f"a stop command cannot be run: {exc}")


# ---- /proc ----------------------------------------------------------------------------


def pids() -> list[int]:
    """Of all processes but this one."""
    try:
        return [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()]
    except OSError as exc:
        if exc.errno in SHORTAGE:
            raise
        return []


def read_stat(pid: int) -> tuple[str, int, int, bool] | None:
    """Name, session, start time, and whether it is dead and not yet reaped (proc_pid_stat(5))."""
    head, _, tail = read(pid, "stat").rpartition(b")")
    fields = tail.split()
    if len(fields) < 20:
        return None
    # A main thread that has ended is a zombie too while other threads of its process run on.
    dead = fields[0] in b"ZX" and int(fields[17]) <= 1
    return head.partition(b"(")[2].decode(errors="replace"), int(fields[3]), int(fields[19]), dead


def marker_of(pid: int) -> str:
    """The attempt in the environment that the process was started with, or nothing."""
    return (b"\0" + read(pid, "environ")).partition(b"\0" + MARKER)[2].partition(b"\0")[0].decode(errors="replace")


def read(pid: int, name: str) -> bytes:
    """One file of a process; empty when the process is gone or the file is not for us."""
    try:
        with open(f"/proc/{pid}/{name}", "rb", buffering=0) as file:
            return file.read()
    except OSError as exc:
        if exc.errno in SHORTAGE:
            raise
        return b""


def send(process: Identity, number: int) -> None:
    """Signal *process* and nobody who got its pid later, as `proctree.kill` does."""
    try:
        descriptor = os.pidfd_open(process[0])
    except (AttributeError, OSError):
        descriptor = -1
    try:
        stat = read_stat(process[0])
        if stat is not None and stat[2] == process[1]:
            if descriptor < 0:
                os.kill(process[0], number)
            else:
                signal.pidfd_send_signal(descriptor, number)
    except OSError:
        pass
    if descriptor >= 0:
        os.close(descriptor)
