"""One daemon for a state directory, and nothing left of the daemons that had it before.

The file `lock` in the directory is locked (flock(2)) for as long as the daemon lives, and names it.
It also names the earlier instances of which something may still run, because they were killed together
with their guardian: whatever carries the marker of one of those is stopped before anything else starts.
And it says of which attempts a reload has changed whether SIGKILL is forbidden: their markers do not.

The file `guardian` is locked for as long as the daemon lives, and then its guardian is at work.  That may run a stop
command which knows a server by its name only, and would hit one that is started now; so its end is waited for first.
Not that of those who survive SIGKILL, though: then the guardian goes on without the lock.
Where nothing can be written, the daemon runs without, as it does without what it has learned (`state`).
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, unquote

import attrs
import trio

from trioswap import guard, proctree
from trioswap.errors import Misuse
from trioswap.guardian import Watcher
from trioswap.leftover import Leftover

logger = logging.getLogger(__name__)

FILE: Final = "lock"
GUARDIAN_FILE: Final = "guardian"
# Seconds from SIGTERM to SIGKILL, and for all of it, for what an earlier daemon left.
GRACE: Final = 1.0
PATIENCE: Final = 10.0
# Seconds between tries to lock the file of the guardian once nobody waits for that any more.
LATE_PAUSE: Final = 1.0
# Bytes read of the file; it has some hundred.
_LARGEST: Final = 65536
# What may write there can have us stop the models of another daemon.
_DIRECTORY_MODE: Final = 0o700
# As `claimed` makes them.  An empty one would be found in every marker.
_ID: Final = re.compile(r"[0-9a-f]{8}")
# As `quote` would write it, if it did.
_DASH: Final = "%2D"


@attrs.frozen
class Contents:
    """The file: the daemon that has written it last, and the instances of which something may still run."""

    pid: int = 0
    start_time: int = 0
    """Clock ticks since boot; with the pid it says which process that was."""
    instances: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    """The markers of attempts as they would be now, where their processes carry others."""


@attrs.define(eq=False)
class Claim:
    """This daemon's right to a state directory, while the block of `claimed` runs."""

    instance: str
    """What the markers of this daemon's attempts begin with; no other daemon has it."""
    earlier: tuple[str, ...] = ()
    """The instances before it of which something may still run."""
    changed: set[str] = attrs.field(factory=set[str])
    """As in `Contents`, of all instances."""
    _path: Path | None = None
    _inode: tuple[int, int] | None = None
    """Of the file that is locked: by its path another may be found since."""
    guardian_file: int | None = None
    """What the guardian is to have open for as long as it is waited for."""
    _may_start: bool = attrs.field(default=False, init=False)
    """The file is to name this one, too: not if it never gets so far, for such starts may be many."""
    left: tuple[Leftover, ...] = attrs.field(default=(), init=False)
    """What `reap` could not, or must not, end, by model."""
    _news: trio.Event = attrs.field(factory=trio.Event, init=False)

    def marker(self, attempt: int, model: str = "", *, never_kill: bool = False) -> str:
        """The value of `proctree.MARKER` for an attempt at *model*; it says too whether SIGKILL is forbidden.

        One word; the name has no dash in it, or a model named "x-spared" would be spared.
        """
        name = f":{quote(model, safe='/:').replace('-', _DASH)}" if model else ""
        return f"{self.instance}-{attempt}{name}{guard.SPARED if never_kill else ''}"

    async def reap(self) -> None:
        """Stop what earlier instances have left, and say so in a line for each process; then others may be started.

        Takes at most `PATIENCE` seconds, and some milliseconds when nothing was left; before that at most
        `guard.PATIENCE` while a guardian is still at work, and only then it can be cancelled.
        """
        await self._wait_for_the_guardian()
        if self.earlier:
            await self._stop_the_earlier()
        self._may_start = True
        self.write()

    async def _wait_for_the_guardian(self) -> None:
        """Return when that of the daemon before has ended, or should have."""
        if self.guardian_file is None or _is_locked(self.guardian_file):
            return
        logger.warning("the guardian of an earlier daemon still stops what that has left; its end is waited for")
        with trio.move_on_after(guard.PATIENCE) as late:
            await self.lock_for_guardian(guard.PAUSE)
        if late.cancelled_caught:
            logger.warning(
                "the guardian of an earlier daemon has not ended within %g s; should it still run a cmd_stop, that may"
                " hit a model server that is started now under the same name",
                guard.PATIENCE,
            )

    async def lock_for_guardian(self, pause: float = LATE_PAUSE) -> None:
        """Return when the file is locked for our own guardian: that of the daemon before has ended.

        May take for ever after `reap` has given it up.  Tries again each *pause* seconds.
        """
        file = self.guardian_file
        await trio.lowlevel.checkpoint()
        while file is not None and not _is_locked(file):  # noqa: ASYNC110 - flock(2) gives no notice
            await trio.sleep(pause)

    async def _stop_the_earlier(self) -> None:
        sweep = guard.Sweep(self.earlier, {}, self.changed)
        await trio.to_thread.run_sync(partial(sweep.run, GRACE, PATIENCE))
        if sweep.left is None:
            logger.warning("what an earlier daemon has left cannot be seen, for want of descriptors or memory")
            return
        for process, (marker, name) in sweep.found.items():
            outcome = "is still there" if process in sweep.left else "was stopped"
            logger.warning("an earlier daemon has left pid=%d %s attempt=%s; it %s", process[0], name, marker, outcome)
        stay = [sweep.found[process] for process in sweep.left]
        self.earlier = tuple(instance for instance in self.earlier if any(_is_of(instance, *found) for found in stay))
        self.changed = {marker for marker in self.changed if marker.startswith(self.earlier)}
        self.left = _by_model(sweep)

    def write(self) -> None:
        """Write the file anew, if there is one."""
        if self._path is not None:
            _write(self._path, self._inode, self._contents())

    def note(self, marker: str, *, changed: bool) -> None:
        """Note that *marker* says of an attempt what its processes' do not, or that no attempt has it any more."""
        if (marker in self.changed) is not changed:
            self.changed ^= {marker}
            self._news.set()

    async def keep(self) -> None:
        """Write the file when there was something to note, until cancelled.

        A disk may be slow; a thread that it holds for ever is left to itself when this is cancelled.
        """
        while True:
            await self._news.wait()
            self._news = trio.Event()
            if self._path is not None:
                job, limiter = partial(_write, self._path, self._inode, self._contents()), trio.CapacityLimiter(1)
                try:
                    await trio.to_thread.run_sync(job, abandon_on_cancel=True, limiter=limiter)
                except RuntimeError as exc:  # no thread is to be had
                    _complain_of_writing(exc)

    def _contents(self) -> Contents:
        me = None
        with suppress(OSError):  # nobody can say when we began
            me = proctree.look(os.getpid())
        instances = (*self.earlier, self.instance) if self._may_start else self.earlier
        return Contents(os.getpid(), me.start_time if me else 0, instances, tuple(sorted(self.changed)))


@attrs.frozen
class Noting:
    """Who watches an attempt, and the claim that notes what a reload has changed of it."""

    claim: Claim
    guardian: Watcher
    marker: str
    """In the environment of its processes."""

    def began(self, pid: int, marker: str, stop: Sequence[str] = (), env: Mapping[str, str] | None = None) -> None:
        """As for the guardian."""
        self.guardian.began(pid, marker, stop, env)
        self.claim.note(marker, changed=marker != self.marker)

    def ended(self, marker: str) -> None:
        """As for the guardian."""
        self.guardian.ended(marker)
        self.claim.note(marker, changed=False)


def _is_of(instance: str, marker: str, name: str) -> bool:
    """Whether that was started by *instance*; what has not loaded its program yet has a name, and no marker."""
    return marker.partition("-")[0] == instance or (not marker and name == guard.thread_name(instance))


def _by_model(sweep: guard.Sweep) -> tuple[Leftover, ...]:
    """Who is left; without those of whom nobody knows to which model they belong (of an earlier version)."""
    left: dict[str, dict[str, list[proctree.Process]]] = {}
    for process in sorted(sweep.left or ()):
        marker, name = sweep.found[process]
        if model := unquote(marker.removesuffix(guard.SPARED).partition(":")[2]):
            left.setdefault(model, {}).setdefault(marker, []).append(proctree.Process(*process, name))
    return tuple(
        Leftover(model, tuple(found), tuple(one for family in found.values() for one in family))
        for model, found in sorted(left.items())
    )


@contextmanager
def claimed(directory: Path) -> Iterator[Claim]:
    """This daemon's claim to the state *directory*, given up at the end of the block.

    Raises:
        Misuse: another daemon has it.
    """
    instance = secrets.token_hex(4)
    file = _open(directory)
    if file is None:
        yield Claim(instance)
        return
    guardian_file = None
    try:
        if _lock(file, directory):
            found, guardian_file = _read(file), _open_for_guardian(directory)
            claim = Claim(instance, found.instances, {*found.changed}, directory / FILE, _inode(file), guardian_file)
            claim.write()
        else:
            claim = Claim(instance)  # what the file names may be alive and well
        yield claim
    finally:
        if guardian_file is not None:
            os.close(guardian_file)
        os.close(file)


def _open(directory: Path) -> int | None:
    try:
        directory.mkdir(_DIRECTORY_MODE, parents=True, exist_ok=True)
        return os.open(directory / FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        _complain(exc)
        return None


def _open_for_guardian(directory: Path) -> int | None:
    try:
        return os.open(directory / GUARDIAN_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        logger.warning("if this daemon is killed, the next one will not wait until its guardian has ended: %s", exc)
        return None


def _is_locked(file: int) -> bool:
    """Whether it is ours now, or nobody's because there are no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as exc:
        _complain(exc)
    return True


def _lock(file: int, directory: Path) -> bool:
    """Whether the file is locked now; False where there are no locks.

    Raises:
        Misuse: another daemon has it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _read(file).pid
        raise Misuse(
            f"the state directory {directory} is in use by another trioswap{f' (pid {holder})' if holder else ''}; "
            f'stop that, or give this one a directory of its own with state_dir = "..." in its configuration'
        ) from None
    except OSError as exc:  # a file system without locks
        _complain(exc)
        return False
    return True


def _inode(file: int) -> tuple[int, int]:
    found = os.fstat(file)
    return found.st_dev, found.st_ino


def _write(path: Path, inode: tuple[int, int] | None, contents: Contents) -> None:
    data = json.dumps(attrs.asdict(contents)).encode() + b"\n"
    try:
        file = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            if _inode(file) != inode:
                raise OSError(errno.ESTALE, "another has taken its place, which may be another daemon's", str(path))
            os.pwrite(file, data, 0)  # in place: a new file would not be locked
            os.ftruncate(file, len(data))
        finally:
            os.close(file)
    except OSError as exc:
        _complain_of_writing(exc)


def _complain_of_writing(exc: Exception) -> None:
    logger.warning("after this daemon was killed, the next one would not know of it: %s", exc)


def _complain(exc: OSError) -> None:
    logger.warning("the state directory cannot be claimed, so another daemon may use it too: %s", exc)


def _read(file: int) -> Contents:
    """What the file says; nothing when it is empty or makes no sense."""
    try:
        # Only the line: who was killed while it wrote may have left some of a longer one behind it.
        text = os.pread(file, _LARGEST, 0).partition(b"\n")[0]
        if not text:
            return Contents()
        found: Any = json.loads(text)
        ids = _ids(found["instances"])
        # An earlier version says nothing of changes.
        changed = (each for each in found.get("changed", ()) if isinstance(each, str) and each.startswith(ids))
        return Contents(int(found["pid"]), int(found["start_time"]), ids, tuple(changed))
    except (OSError, ArithmeticError, ValueError, LookupError, TypeError, RecursionError) as exc:
        logger.warning("which daemon was here before cannot be read, so nothing is known of what it left: %s", exc)
        return Contents()


def _ids(found: Sequence[Any]) -> tuple[str, ...]:
    return tuple(each for each in found if isinstance(each, str) and _ID.fullmatch(each))
