"""Threads that write log lines, so that whoever logs never waits: not for a full pipe, a stopped terminal, or a disk.

What may block for ever is only ever blocked in such a thread, which the exit of the daemon
does not wait for beyond a deadline.  Lines that find no room are dropped and counted, and
the count stands where they were.  What is written where is decided in `logsetup`.
"""

from __future__ import annotations

import itertools
import os
import select
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Final, Protocol

import attrs

# Bytes on their way to a reader that is slow, or a disk; more than a pipe holds, and than a ring keeps.
ROOM: Final = 1024 * 1024
# Seconds between two rounds of writing.  The first line after a pause goes out at once; those that come faster share
# the way: to wake a thread for each of a thousand lines a second cost as much as to make them.
GATHER: Final = 0.01
# What a short line takes in memory beside its letters, about.
_OVERHEAD: Final = 100


class Target(Protocol):
    """Where bytes can go."""

    def write(self, data: bytes) -> int:
        """Write some of *data* and return how many bytes, at least one; it may block.

        Raises:
            OSError: none could be written.
        """


@attrs.frozen
class Descriptor:
    """A file descriptor that is somebody else's, as the standard ones are."""

    number: int

    def write(self, data: bytes) -> int:
        """The same as `os.write`, but waits even where the descriptor does not block, as another owner may have set it.

        Not through `sys.stderr`: a write that is stuck would hold its lock, and the interpreter's exit.
        """
        while True:
            try:
                return os.write(self.number, data)
            except BlockingIOError:
                poll = select.poll()
                poll.register(self.number, select.POLLOUT)
                poll.poll()


@attrs.define(eq=False)
class Sink:
    """A target, and what must be remembered between two writes to it."""

    target: Target
    mark: bytes = b""
    """What a line of our own about dropped lines begins with."""
    # Lines that were dropped and not told yet; under the writer's lock.
    lost: int = attrs.field(default=0, init=False)
    # Only for the writer's thread.
    source: str = attrs.field(default="", init=False)
    """Who wrote last."""
    line_ended: bool = attrs.field(default=True, init=False)
    """What was written last ended with its line."""


@attrs.frozen
class _Item:
    sink: Sink
    source: str
    lost: int
    """Lines that were dropped before this."""
    data: bytes
    count: int = 1
    """Of how many pieces it was made."""

    @property
    def cost(self) -> int:
        return len(self.data) + self.count * _OVERHEAD


@attrs.define(eq=False)
class LogWriter:
    """One thread and what it has to write, in order.

    A sink that blocks holds up the others of the same writer: what depends on different
    things gets different writers.
    """

    name: str
    on_failure: Callable[[OSError], None] = lambda _: None
    """Told in the thread of each piece that could not be written."""
    room: int = ROOM
    _items: list[_Item] = attrs.field(factory=list, init=False)
    # What `_items` cost together, and those that are being written.
    _taken: int = attrs.field(default=0, init=False)
    _stopping: threading.Event = attrs.field(factory=threading.Event, init=False)
    # Held for a few lines of code, never during a write.
    _changed: threading.Condition = attrs.field(factory=threading.Condition, init=False)
    _thread: threading.Thread = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)
        self._thread.start()

    def put(self, sink: Sink, data: bytes, source: str = "") -> None:
        """Have *data* written to *sink*, or dropped if there is no room; from any thread, and never waits.

        A line that one *source* has not ended is ended before another one's begins.
        """
        with self._changed:
            item = _Item(sink, source, sink.lost, data)
            if self._taken + item.cost > self.room:
                sink.lost += _lines(data)
                return
            sink.lost = 0
            self._items.append(item)
            self._taken += item.cost
            self._changed.notify()

    def stop(self, deadline: float) -> bool:
        """Let the last lines out, until *deadline* on the monotonic clock at the latest; whether they all are."""
        with self._changed:
            self._stopping.set()
            self._changed.notify()
        self._thread.join(max(0.0, deadline - time.monotonic()))
        return not self._thread.is_alive()

    def _run(self) -> None:
        while items := self._next():
            for item in _joined(items):
                self._write(item)
                with self._changed:
                    self._taken -= item.cost
            self._stopping.wait(GATHER)

    def _next(self) -> list[_Item]:
        """All there is to write; nothing when that is done and we were told to stop."""
        with self._changed:
            while not self._items and not self._stopping.is_set():
                self._changed.wait()
            items, self._items = self._items, []
            return items

    def _write(self, item: _Item) -> None:
        sink = item.sink
        head = b"" if sink.line_ended or (not item.lost and item.source == sink.source) else b"\n"
        if item.lost:
            head += b"%s-- %d lines dropped --\n" % (sink.mark, item.lost)
        data = head + item.data
        written = 0
        try:
            while written < len(data):
                written += sink.target.write(data[written:])
                sink.line_ended = data[written - 1 : written] == b"\n"
        except OSError as exc:
            told = written >= len(head) - 1  # the end of its line comes with the next
            rest = data[max(written, len(head)) :]
            with self._changed:
                sink.lost += _lines(rest) + (0 if told else item.lost)
            self.on_failure(exc)
        sink.source = item.source


def _joined(items: Iterable[_Item]) -> Iterator[_Item]:
    """*items* in their order, those that follow each other on the same way in one piece."""
    for (sink, source, lost), group in itertools.groupby(items, lambda item: (item.sink, item.source, item.lost)):
        alike = list(group)
        if lost:  # the count stands before the first of them, and any other is another loss
            yield from alike
        else:
            yield _Item(sink, source, 0, b"".join(item.data for item in alike), len(alike))


def _lines(data: bytes) -> int:
    """How many lines are lost with *data*; a part of a line counts as one."""
    return data.count(b"\n") + (not data.endswith(b"\n"))
