"""What Linux's /proc tells about a model server's family of processes, and how to signal them without mistake.

Looking is all it does: synchronous reads of a few milliseconds, no state but who hangs.  When to look, how long
to wait and what to make of it is the business of `stopping`, `readiness` and `guard`.

Why it is hard: a pid is a number that the kernel gives to somebody else as soon as its process is
reaped, and a server may fork, daemonize, and leave its group and its session.  So a process is known
by its pid together with its start time, and it belongs to an attempt for one of two reasons:

- Its session is the leader's, the child that we started in a session of its own (so its group is in
  it too).  The kernel gives no new process a number that still names a session, so this is proof
  even when the leader is gone: from the spawn until the first look that finds nobody.  After that
  the number may be somebody else's, and must not be asked about again.
- Its environment holds `MARKER` with the attempt's unique id.  Every descendant inherits that, the
  ones that called setsid and forked twice too.  It gets lost only when a program clears its
  environment on purpose, or overwrites it to show a title.

A look that fails for want of a descriptor would find nobody, and a family that nobody is known to be
left of is left alone for ever: so one descriptor is kept for it (`_Spare`), and when even that does not
help the look raises, for "nobody was found" must mean that nobody is there (`SHORTAGE`).

Environments are read in a thread, for one process that hangs would hold up the reader with it
(`guard.Questions`).  Such a one belongs to an attempt by its session, or because it was seen earlier.

Without /proc (other systems) nothing is known: lists and sets are empty, nothing is signalled, and
`port_owner` says UNKNOWN.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import FileIO
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Final, TypeVar

import attrs

from trioswap import guard

# Set for each child to an id that no other attempt has.
MARKER: Final = "TRIOSWAP_ATTEMPT"

PROC = Path("/proc")

# What a look may fail of though the process is there: the process, or the machine, has no descriptor or no memory left.
SHORTAGE: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})

T = TypeVar("T")


@attrs.frozen
class Process:
    """One process, told from all others before and after it by pid and start time."""

    pid: int
    start_time: int
    """Clock ticks since boot."""
    name: str = attrs.field(eq=False)
    """The program's name as the kernel has it, at most 15 bytes."""


class PortOwner(enum.Enum):
    """Who takes the connections made to a port."""

    TREE = "tree"
    STRANGER = "stranger"
    NOBODY = "nobody"  # in our network namespace: a child that has its own is not seen
    UNKNOWN = "unknown"  # somebody whose descriptors we may not read, or there is no /proc


# ---- processes ------------------------------------------------------------------------


def look(pid: int) -> Process | None:
    """The live process that has *pid* now; None when there is none.

    Raises:
        OSError: of `SHORTAGE`, so nobody can say.
    """
    stat = _stat(pid)
    return None if stat is None else Process(pid, stat.start_time, stat.name)


def members(leader: int, marker: str) -> list[Process]:
    """Every live process of the attempt *marker* whose child was *leader*, for the reasons named above.

    Zombies do not count, nor does who has left the session and hangs, which costs `guard.ASIDE` seconds once.
    Processes that changed their user count by session, so one that we may not signal is still reported.
    It is no snapshot: who forks during the look may be missed, so whoever wants them all gone looks again
    after the kill, until nothing is found.

    Raises:
        OSError: of `SHORTAGE`, so nobody can say.
    """
    entry = f"\0{MARKER}={marker}\0".encode()
    stats = {(pid, stat.start_time): stat for pid in _pids() if (stat := _stat(pid)) is not None}
    others = [identity for identity, stat in stats.items() if stat.session != leader]
    marked = _questions.ask(lambda pid: entry in _environ(pid), others)
    return [
        Process(*identity, stat.name)
        for identity, stat in stats.items()
        if stat.session == leader or marked.get(identity, False)
    ]


def cpu_time(processes: Iterable[Process]) -> int:
    """Clock ticks that *processes* have computed so far, all together; who is gone counts nothing.

    Raises:
        OSError: of `SHORTAGE`, so nobody can say.
    """
    ticks = 0
    for process in processes:
        fields = _read(process.pid, "stat").rpartition(b")")[2].split()
        ticks += int(fields[11]) + int(fields[12]) if fields else 0  # utime and stime of proc_pid_stat(5)
    return ticks


def kill(process: Process, number: int) -> bool:
    """Send signal *number* to *process*; return False when it is gone, not ours to signal, or cannot be looked at now.

    Never hits another process that has got the pid since: a pidfd names one process for good, so
    the start time is compared after it was opened.  Where pidfds cannot be had (kernel before 5.3,
    no descriptor free) a gap of microseconds remains.
    """
    with _pidfd(process.pid) as pidfd:
        try:
            if look(process.pid) != process:
                return False
            if pidfd is None:
                os.kill(process.pid, number)
            else:
                signal.pidfd_send_signal(pidfd, number)
        except OSError:  # with ProcessLookupError and PermissionError
            return False
    return True


@attrs.frozen
class _Stat:
    """The fields of /proc/PID/stat that matter here (proc_pid_stat(5))."""

    name: str
    session: int
    start_time: int


def _stat(pid: int) -> _Stat | None:
    text = _read(pid, "stat").decode(errors="replace")
    # The name stands in parentheses and may itself contain them, and spaces.
    head, _, tail = text.rpartition(")")
    fields = tail.split()
    if not fields:
        return None
    # A main thread that has ended is a zombie too while other threads of its process run on.
    state, threads = fields[0], int(fields[17])
    if state in "ZX" and threads <= 1:
        return None
    return _Stat(head.partition("(")[2], int(fields[3]), int(fields[19]))


# Of all families, so that who hangs does so for one of them.
_questions: Final = guard.Questions()


def _environ(pid: int) -> bytes:
    """The environment the process was started with, each entry between two NULs."""
    return b"\0" + _read(pid, "environ") + b"\0"


def _read(pid: int, name: str) -> bytes:
    """One file of a process; empty when the process is gone or the file is not for us."""
    try:
        return _spare.read(f"{PROC}/{pid}/{name}")
    except OSError as exc:
        _raise_shortage(exc)
        return b""


def _pids() -> list[int]:
    try:
        return [int(entry) for entry in _spare.names(str(PROC)) if entry.isdigit()]
    except OSError as exc:
        _raise_shortage(exc)
        return []


def _raise_shortage(exc: OSError) -> None:
    """Return when *exc* says something about what was looked at, rather than about us."""
    if exc.errno in SHORTAGE:
        raise exc


class _Spare:
    """Reads files and directories, with the descriptor that it keeps when the process or the machine has no other.

    Another thread may be faster to take what is set free for a moment: then the look fails after all.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: int | None = None
        self._keep()

    def read(self, path: str) -> bytes:
        return self._with_descriptor(_read_file, path)

    def names(self, directory: str) -> list[str]:
        return self._with_descriptor(os.listdir, directory)

    def _with_descriptor(self, look: Callable[[str], T], path: str) -> T:
        try:
            return look(path)
        except OSError as exc:
            if exc.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            # Who has it may hang with it.
            if not self._lock.acquire(timeout=guard.ASIDE_MORE):
                raise
        try:
            if self._kept is not None:
                os.close(self._kept)
                self._kept = None
            return look(path)
        finally:
            self._keep()
            self._lock.release()

    def _keep(self) -> None:
        with contextlib.suppress(OSError):
            self._kept = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)


_spare: Final = _Spare()


def _read_file(path: str) -> bytes:
    # Unbuffered and without a Path in between: three times as fast, and there are hundreds.
    with FileIO(path) as file:
        return file.readall()


@contextmanager
def _pidfd(pid: int) -> Iterator[int | None]:
    """A descriptor for the process that has *pid* now, or None where that cannot be had."""
    try:
        descriptor = os.pidfd_open(pid)
    except (AttributeError, OSError):
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


# ---- ports ----------------------------------------------------------------------------


def port_owner(port: int, host: str | None, tree: Iterable[Process]) -> PortOwner:
    """Whether a connection to *host*:*port* is taken by one of *tree*, or by whom else."""
    try:
        inodes = listening_inodes(port, host)
        if not inodes:
            return PortOwner.NOBODY if _tables() else PortOwner.UNKNOWN
        if any(holds_any(process.pid, inodes) for process in tree):
            return PortOwner.TREE
        return PortOwner.STRANGER if who_listens(port, host) else PortOwner.UNKNOWN
    except OSError:  # of `SHORTAGE`
        return PortOwner.UNKNOWN


def listening_inodes(port: int, host: str | None = None) -> frozenset[int]:
    """The inodes of the sockets that take connections made to *port* at *host*.

    The kernel prefers a socket bound to just this address; failing that, one bound to all addresses
    takes it, an IPv6 one for IPv4 as well (unless it was told not to, which is not shown).  Without
    *host*, or when it is a name and no address, every listener on the port counts.  Only sockets of
    our own network namespace are seen.

    Raises:
        OSError: of `SHORTAGE`, so nobody can say.
    """
    listeners = [entry for table in _tables() for entry in _listeners(table, port)]
    wanted = _address(host)
    if wanted is None:
        return frozenset(inode for _, inode in listeners)
    for accepted in (wanted, _ANY[wanted.version], _ANY[6]):
        if inodes := frozenset(inode for address, inode in listeners if address == accepted):
            return inodes
    return frozenset()


def holds_any(pid: int, inodes: frozenset[int]) -> bool:
    """Whether the process has one of these sockets open; False too when we may not know.

    Raises:
        OSError: of `SHORTAGE`, so nobody can say.
    """
    names = {f"socket:[{inode}]" for inode in inodes}
    directory = f"{PROC}/{pid}/fd"
    try:
        return any(_target(f"{directory}/{descriptor}") in names for descriptor in _spare.names(directory))
    except OSError as exc:
        _raise_shortage(exc)
        return False


def who_listens(port: int, host: str | None = None) -> list[Process]:
    """The processes that hold the listening sockets, as far as we may read their descriptors.

    Looks through every process, some 10 ms on a desktop: for the message to people, after the
    family has been asked with `holds_any`.

    Raises:
        OSError: of `SHORTAGE`, so nobody can say.
    """
    inodes = listening_inodes(port, host)
    if not inodes:
        return []
    holders = (look(pid) for pid in _pids() if holds_any(pid, inodes))
    return [process for process in holders if process is not None]


_Address = IPv4Address | IPv6Address
_ANY: Final[dict[int, _Address]] = {4: IPv4Address(0), 6: IPv6Address(0)}

# A listening row of /proc/net/tcp or tcp6 (kernel documentation, networking/proc_net_tcp; 0A is
# TCP_LISTEN).  A pattern, because the rows of thousands of connections stand there too.
_ROW: Final = rb"^ *\d+: ([0-9A-F]+):%04X [0-9A-F]+:[0-9A-F]+ 0A \S+ \S+ \S+ +\d+ +\d+ (\d+) "


def _tables() -> list[bytes]:
    tables = []
    for name in ("tcp", "tcp6"):
        try:
            tables.append(_spare.read(f"{PROC}/net/{name}"))
        except OSError as exc:  # a kernel without IPv6, for one
            _raise_shortage(exc)
    return tables


def _listeners(table: bytes, port: int) -> Iterator[tuple[_Address, int]]:
    for match in re.finditer(_ROW % port, table, re.MULTILINE):
        yield _decode(match[1].decode()), int(match[2])


def _decode(digits: str) -> _Address:
    """The address in a row: words of 32 bits, each printed as this machine's integer."""
    words = [int(digits[at : at + 8], 16).to_bytes(4, sys.byteorder) for at in range(0, len(digits), 8)]
    return _unmapped(ip_address(b"".join(words)))


def _address(host: str | None) -> _Address | None:
    """The address that decides which listener it is; None when none does."""
    try:
        address = _unmapped(ip_address(host or ""))
    except ValueError:
        return None
    # A connection to "all addresses" goes to this host, by way of which address is not said.
    return None if address.is_unspecified else address


def _unmapped(address: _Address) -> _Address:
    """An IPv4 address in IPv6 clothes as what it is."""
    return (address.version == 6 and address.ipv4_mapped) or address


def _target(descriptor: str) -> str:
    try:
        return os.readlink(descriptor)  # noqa: PTH115 - for hundreds of them
    except OSError:
        return ""
