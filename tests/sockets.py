"""The socket that systemd would listen on for what a service tells it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs
import trio
from children import PATIENCE


@attrs.frozen
class Notices:
    """What came in at a notification socket."""

    environment: dict[str, str]
    """For the child that shall use it."""
    _socket: trio.socket.SocketType

    async def next(self) -> str:
        """The next notice."""
        with trio.fail_after(PATIENCE):
            return (await self._socket.recv(4096)).decode()

    async def wait_for(self, wanted: str) -> None:
        """Read on until *wanted* has come."""
        while await self.next() != wanted:
            pass


@contextmanager
def notify_socket(address: Path | str) -> Iterator[Notices]:
    """A notification socket at a path, or at an abstract "@name"; in the child's environment while the block runs."""
    name = str(address)
    with trio.socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock._sock.bind(f"\0{name[1:]}" if name.startswith("@") else name)
        yield Notices({**os.environ, "NOTIFY_SOCKET": name}, sock)
