"""Keeps the last bytes of every child and of ourselves, and feeds followers that can only lose their own lines.

What is worth a line, where it goes besides (`logsetup`), and who may read it over HTTP, is
decided elsewhere.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Final

import attrs
import trio

# Bytes of history; llama-swap's log monitors keep as much (surface reference 2.8).
CAPACITY: Final = 100 * 1024
# Bytes a follower may be behind: the whole history that it starts with, and more than as much again.
FOLLOWER_BUFFER: Final = 256 * 1024


Listener = Callable[[str, bytes], None]
"""Takes the name of a model and what its server wrote."""


@attrs.define(eq=False)
class LogRing:
    """The newest bytes of one source, and whoever follows it.

    Nothing here waits, so a source can never be held up by its readers.
    """

    capacity: int = CAPACITY
    # Up to twice the capacity and one byte, then cut back to one capacity and one byte: each
    # byte is moved once.  The byte more tells whether history starts at the start of a line.
    _kept: bytearray = attrs.field(factory=bytearray, init=False)
    _followers: list[_Follower] = attrs.field(factory=list, init=False)

    def append(self, data: bytes) -> None:
        """Add *data*, forgetting the oldest bytes."""
        self._kept += data[-self.capacity - 1 :]
        if len(self._kept) > 2 * self.capacity + 1:
            del self._kept[: -self.capacity - 1]
        for follower in self._followers:
            follower.push(data)

    def history(self) -> bytes:
        """What is kept: everything, or the newest `capacity` bytes from the first line that starts there."""
        dropped = len(self._kept) - self.capacity
        return bytes(self._kept[_line_start(self._kept, max(dropped, 0)) :])

    def tail(self, lines: int) -> str:
        """The last *lines* lines for people; undecodable bytes are replaced."""
        return "\n".join(self.history().decode(errors="replace").splitlines()[-lines:])

    @contextmanager
    def follow(self, *, with_history: bool = True) -> Iterator[AsyncIterator[bytes]]:
        """Iterate over what is appended inside the block, after what is kept already.

        Yields bytes as they came, as many as there are.  Whoever is more than 256 KiB
        behind finds a line "-- N bytes dropped --" where the oldest of them were.
        """
        follower = _Follower()
        if with_history:
            follower.push(self.history())
        self._followers.append(follower)
        try:
            yield follower
        finally:
            self._followers.remove(follower)


@attrs.define(eq=False)
class _Follower:
    """What one reader has not read yet."""

    # The buffer and, once something was dropped, the byte before it (see `LogRing`).
    _pending: bytearray = attrs.field(factory=bytearray, init=False)
    _dropped: int = attrs.field(default=0, init=False)
    """Bytes that went from the front of `_pending` since the last read."""
    _line_ended: bool = attrs.field(default=True, init=False)
    """What was read last ended with its line."""
    _news: trio.Event = attrs.field(factory=trio.Event, init=False)

    def push(self, data: bytes) -> None:
        self._pending += data
        over = len(self._pending) - FOLLOWER_BUFFER - 1
        if over > 0:
            del self._pending[:over]
            self._dropped += over
        if self._pending:
            self._news.set()

    def __aiter__(self) -> _Follower:
        return self

    async def __anext__(self) -> bytes:
        await self._news.wait()
        self._news = trio.Event()
        data = self._with_notice() if self._dropped else bytes(self._pending)
        self._pending.clear()
        self._dropped = 0
        self._line_ended = data.endswith(b"\n")
        return data

    def _with_notice(self) -> bytes:
        # The rest of the line that was cut goes as well.
        start = _line_start(self._pending, 1)
        notice = b"-- %d bytes dropped --\n" % (self._dropped + start)
        return (b"" if self._line_ended else b"\n") + notice + self._pending[start:]


def _line_start(data: bytearray, index: int) -> int:
    """The first line start at or after *index*; *index* itself if no line ends after it."""
    if index == 0 or data[index - 1 : index] == b"\n":
        return index
    return data.find(b"\n", index, len(data) - 1) + 1 or index


@attrs.define(eq=False)
class Logs:
    """Every ring there is: ours, the children's, both together, and one for each model."""

    proxy: LogRing = attrs.field(factory=LogRing, init=False)
    upstream: LogRing = attrs.field(factory=LogRing, init=False)
    combined: LogRing = attrs.field(factory=LogRing, init=False)
    _models: dict[str, LogRing] = attrs.field(factory=dict, init=False)
    _listeners: list[Listener] = attrs.field(factory=list, init=False)

    @contextmanager
    def copied(self, listener: Listener) -> Iterator[None]:
        """Inside the block, *listener* gets what children write, too; it must not wait."""
        self._listeners.append(listener)
        try:
            yield
        finally:
            self._listeners.remove(listener)

    def of(self, model: str) -> LogRing:
        """The ring of *model*, which outlives each run of its server; made when first asked for."""
        return self._models.setdefault(model, LogRing())

    def find(self, name: str) -> LogRing | None:
        """The ring that `/logs/stream/NAME` shows; None when nothing of that name has a ring yet."""
        ours = {"": self.combined, "proxy": self.proxy, "upstream": self.upstream}
        return ours.get(name) or self._models.get(name)

    def from_child(self, model: str, data: bytes) -> None:
        """Take what the server of *model* wrote."""
        for ring in (self.of(model), self.upstream, self.combined):
            ring.append(data)
        for listener in self._listeners:
            listener(model, data)

    def from_ourselves(self, data: bytes) -> None:
        """Take lines of our own."""
        for ring in (self.proxy, self.combined):
            ring.append(data)
