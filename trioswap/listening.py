"""The sockets that clients connect to: opened at an address or a path, or handed over by systemd.

Left to others: what `listen` may say (config.addresses), accepting (server).

While no connection can be accepted, for want of descriptors, Trio tries again ten times a second and
logs each of them with a traceback; here that becomes one line a minute that says what to do.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import socket
import stat
from collections.abc import AsyncIterator, MutableMapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final

import trio

from trioswap.config.addresses import UnixAddress, parse_listen
from trioswap.errors import CannotListen
from trioswap.spawning import shortage

# Of a socket file: this user and its group may connect, since who may write to it may ask for everything that
# an API key does not guard.  Put a proxy's user into the group, or give the directory another one.
SOCKET_MODE: Final = 0o660
# The first descriptor that systemd hands over (sd_listen_fds(3)).
_FIRST_HANDED: Final = 3
_BACKLOG: Final = 4096  # connections not yet accepted; the kernel lowers it to its own limit
# Where Trio complains (trio/_highlevel_serve_listeners.py).
_COMPLAINTS: Final = logging.getLogger("trio.serve_listeners")
# Seconds between two lines of ours about it.
_QUIET: Final = 60.0


@asynccontextmanager
async def listening(listen: str) -> AsyncIterator[Sequence[trio.SocketListener]]:
    """Listening sockets for the length of the block: what systemd has handed over, else what *listen* says.

    The file of a socket is removed in the end, unless it is another's by then, or systemd's.

    Raises:
        CannotListen: as `open_listeners`, or systemd has handed over something else.
    """
    handed = handed_over(os.environ)
    listeners = handed or await open_listeners(listen)
    paths = [] if handed else [path for listener in listeners if (path := _path(listener.socket)) is not None]
    ours = {path: _identity(path) for path in paths}
    complaints = _Complaints()
    _COMPLAINTS.addFilter(complaints)
    try:
        yield listeners
    finally:
        _COMPLAINTS.removeFilter(complaints)
        for listener in listeners:
            listener.socket.close()
        for path, identity in ours.items():
            if _identity(path) == identity:
                with suppress(OSError):
                    path.unlink()


class _Complaints(logging.Filter):
    """Lets through one complaint a minute that nothing can be accepted, in our words."""

    def __init__(self) -> None:
        super().__init__()
        self._said_at = -math.inf

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether it is to be logged; called where Trio runs."""
        exc = record.exc_info[1] if record.exc_info else None
        if not isinstance(exc, OSError):
            return True
        now = trio.current_time()
        if now - self._said_at < _QUIET:
            return False
        self._said_at = now
        what = shortage(exc) or os.strerror(exc.errno or 0).lower()
        record.name, record.levelno, record.levelname = __name__, logging.WARNING, "WARNING"
        record.msg, record.args, record.exc_info = "connections cannot be accepted, and wait: %s", (what,), None
        return True


async def open_listeners(listen: str) -> Sequence[trio.SocketListener]:
    """Listening sockets for HOST:PORT or unix:/PATH; port 0 is a free one.

    Raises:
        CannotListen: somebody listens there, or the address is not to be had.
    """
    address = parse_listen(listen)
    try:
        if isinstance(address, UnixAddress):
            return [_open_unix(Path(address.path))]
        return await trio.open_tcp_listeners(address.port, host=address.host.strip("[]"))
    except OSError as exc:
        raise CannotListen(listen, exc.strerror or str(exc)) from exc


def urls(listeners: Sequence[trio.SocketListener], *, secure: bool) -> list[str]:
    """Where clients reach the sockets; over TLS, when *secure*, but for those in the file system."""
    return [_url(listener.socket, "https" if secure else "http") for listener in listeners]


def _url(sock: trio.socket.SocketType, scheme: str) -> str:
    path = _path(sock)
    if path is not None:
        return f"unix:{path}"
    host, port, *_ = sock.getsockname()
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


# ---- in the file system ---------------------------------------------------------------------


def _open_unix(path: Path) -> trio.SocketListener:
    """Raises OSError, with EADDRINUSE when somebody listens there, or the file is no socket."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        try:
            sock.bind(str(path))
        except OSError as exc:
            if exc.errno != errno.EADDRINUSE or not _is_stale(path):
                raise
            path.unlink(missing_ok=True)
            sock.bind(str(path))
        path.chmod(SOCKET_MODE)  # before anybody can connect, which needs `listen`
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return trio.SocketListener(trio.socket.from_stdlib_socket(sock))


def _is_stale(path: Path) -> bool:
    """A daemon that was killed has left the socket file: nobody listens there any more."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            return False
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)  # where many wait to be accepted, another would wait too
            probe.connect(str(path))
    except (ConnectionRefusedError, FileNotFoundError):
        return True
    except OSError:
        return False
    return False


def _path(sock: trio.socket.SocketType) -> Path | None:
    return Path(os.fsdecode(sock.getsockname())) if sock.family == socket.AF_UNIX else None


def _identity(path: Path) -> tuple[int, int, int] | None:
    """What no other file has, at least not at the same path: the number alone is soon given to another."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns


# ---- from systemd ------------------------------------------------------------------------


def handed_over(environment: MutableMapping[str, str]) -> list[trio.SocketListener]:
    """The listening sockets of a systemd socket unit (sd_listen_fds(3)), in its order; none when there is no such unit.

    Takes what told of them out of *environment*, for it is not meant for our children.

    Raises:
        CannotListen: one of them is no stream socket that listens (`Accept=yes`, or a datagram socket).
    """
    meant_for, count = environment.get("LISTEN_PID"), environment.get("LISTEN_FDS", "")
    if meant_for != str(os.getpid()) or not count.isdecimal():
        return []
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        environment.pop(name, None)
    return [_take(descriptor) for descriptor in range(_FIRST_HANDED, _FIRST_HANDED + int(count))]


def _take(descriptor: int) -> trio.SocketListener:
    try:
        sock = socket.socket(fileno=descriptor)
        try:
            os.set_inheritable(descriptor, False)
            return trio.SocketListener(trio.socket.from_stdlib_socket(sock))
        except BaseException:
            sock.close()
            raise
    except (OSError, ValueError) as exc:
        raise CannotListen(f"descriptor {descriptor}, which systemd handed over", str(exc)) from exc
