"""Keeps the last bytes of every child and of ourselves, and feeds followers that can only lose their own lines.

Also sets up the standard library's logging.  What is worth a line, and who may
read it over HTTP, is decided elsewhere.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from typing import Final

import attrs
import trio

# Bytes of history; llama-swap's log monitors keep as much (surface reference 2.8).
CAPACITY: Final = 100 * 1024
# Bytes a follower may be behind: the whole history that it starts with, and more than as much again.
FOLLOWER_BUFFER: Final = 256 * 1024
# Lines on their way to a standard error that is read slowly; about 100 KiB of them.
STDERR_LINES: Final = 1000
# Seconds granted to the last lines when logging ends.
STDERR_GRACE: Final = 1.0
_STDERR: Final = 2


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

    def from_ourselves(self, data: bytes) -> None:
        """Take lines of our own."""
        for ring in (self.proxy, self.combined):
            ring.append(data)


# ---- the standard library's logging -----------------------------------------------------

# Control characters would let a client's model name forge lines or repaint a terminal.
_CONTROLS: Final = {code: f"\\x{code:02x}" for code in (*range(32), 127) if chr(code) != "\t"}


class _LineFormatter(logging.Formatter):
    """`2026-01-31T12:00:00Z INFO daemon: message`; only a traceback takes more lines."""

    converter = staticmethod(time.gmtime)

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(message)s", "%Y-%m-%dT%H:%M:%SZ")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the library's name
        name = record.name.removeprefix("trioswap.")
        return f"{record.asctime} {record.levelname} {name}: {record.message.translate(_CONTROLS)}"


class _LineHandler(logging.Handler):
    """Formats records; a record that cannot be formatted becomes a line that says so.

    The library's own way is a traceback on standard error, where it may block.
    """

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(_LineFormatter())

    def line(self, record: logging.LogRecord) -> bytes:
        try:
            text = self.format(record)
        except Exception as exc:  # arguments that do not fit the message: a bug, but not worth a request
            text = f"{record.levelname} {record.name}: {record.msg!r} could not be formatted: {exc!r}"
        return text.encode(errors="backslashreplace") + b"\n"


class RingHandler(_LineHandler):
    """Puts log records into our own rings.

    Rings wake followers, and only the thread that runs Trio may do that.  So records
    of other threads are handed to it and arrive a moment later.  Before Trio runs and
    after, nobody can be waiting: then they are stored at once, one by one under the
    lock that the library holds around `emit`.
    """

    def __init__(self, logs: Logs) -> None:
        super().__init__()
        self._logs = logs
        self._trio: trio.lowlevel.TrioToken | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Store one record, or have it stored."""
        line = self.line(record)
        if trio.lowlevel.in_trio_run():
            self._trio = trio.lowlevel.current_trio_token()
        elif self._trio is not None:
            with suppress(trio.RunFinishedError):
                self._trio.run_sync_soon(self._logs.from_ourselves, line)
                return
        self._logs.from_ourselves(line)


class _StderrHandler(_LineHandler):
    """Leaves the writing to a thread and never waits for it: a full queue loses lines, and says so.

    The library has `QueueListener` for this, but its `stop` waits for ever when nobody
    reads standard error, and its target's lock, held by a stuck write, blocks the exit.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lines: queue.Queue[bytes | None] = queue.Queue(STDERR_LINES)
        self._dropped = 0
        self._thread = threading.Thread(target=self._write_lines, name="stderr writer", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        line = self.line(record)
        if self._dropped:
            line = b"-- %d lines dropped --\n" % self._dropped + line
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._dropped += 1
        else:
            self._dropped = 0

    def stop(self) -> None:
        """Let the last lines out, for a second at most."""
        deadline = time.monotonic() + STDERR_GRACE
        with suppress(queue.Full):
            self._lines.put(None, timeout=STDERR_GRACE)
        self._thread.join(max(0.0, deadline - time.monotonic()))

    def _write_lines(self) -> None:
        while (line := self._lines.get()) is not None:
            # Not through sys.stderr: a write that is stuck would hold its lock, and the interpreter's exit.
            with suppress(OSError):
                os.write(_STDERR, line)


@contextmanager
def setup_logging(level: str, logs: Logs) -> Iterator[None]:
    """Inside the block, log records go to standard error and to *logs*.

    Others' loggers only get through with warnings.  Leaving takes a second at most,
    even when nobody reads standard error.
    """
    stderr, ring = _StderrHandler(), RingHandler(logs)
    root = logging.getLogger()
    root.addHandler(stderr)
    root.addHandler(ring)
    set_level(level)
    try:
        yield
    finally:
        root.removeHandler(ring)
        root.removeHandler(stderr)
        stderr.stop()


def set_level(level: str) -> None:
    """Log of our own what is at least *level*: `debug`, `info`, `warn` or `error`."""
    logging.getLogger("trioswap").setLevel(level.upper())
