"""Keeps one request body: a small one in memory, a larger one in a file without a name.

A body is received whole before its model is asked for: a slow uploader then holds no
place at a model, and the body can be sent again after a retry.  The file is unlinked
before its first byte, so that nothing is left behind however the daemon ends.  Reading
the body from the client, its limit, and sending it on are for others.

Every system call on the file runs in a thread, for a disk may take its time; pieces are
gathered before, as the way to a thread costs more than copying a small piece.  A disk may
also not answer at all, so a call that has begun is left to itself when the task is cancelled:
a cancelled read can be done again, but after a cancelled write the body can only be closed.
The file is closed when no call is under way, for its number would soon be another file's.
"""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import IO, Final, Self, TypeVar

import attrs
import trio

from trioswap.errors import StorageFull

# Bytes that stay in memory: chat requests do, pictures and sound do not.
MEMORY_LIMIT: Final = 2**20
# Bytes gathered before they go to the file, 50 times the cost of a call in a thread (about 50 us at 5 GB/s).
GATHER: Final = 256 * 1024
# Calls at a time, of all bodies.  Apart from Trio's own threads: when the disk does not answer, others need those.
CALLS: Final = 40
_CALLS: Final[trio.lowlevel.RunVar[trio.CapacityLimiter]] = trio.lowlevel.RunVar("calls on spooled bodies")

_T = TypeVar("_T")


def directory() -> str | None:
    """Where bodies are spooled; None: where `tempfile` thinks best.

    /tmp is memory on many systems, so that spooling there would save nothing: /var/tmp is not.
    """
    for name in (os.environ.get("TMPDIR"), "/var/tmp"):  # noqa: S108 - a file without a name cannot be guessed
        if name and Path(name).is_dir() and os.access(name, os.W_OK | os.X_OK):
            return name
    return None


def _limiter() -> trio.CapacityLimiter:
    try:
        return _CALLS.get()
    except LookupError:
        _CALLS.set(trio.CapacityLimiter(CALLS))
        return _CALLS.get()


@attrs.define(eq=False)
class Spool:
    """One body: written in pieces, then read any number of times, then closed.

    One task at a time writes or reads, and none while it is closed.
    """

    size: int = attrs.field(default=0, init=False)
    """Bytes written."""
    _tail: bytearray = attrs.field(factory=bytearray, init=False, repr=False)
    """What is not in the file."""
    # Made, used and closed only in threads.
    _file: IO[bytes] | None = attrs.field(default=None, init=False)
    _closed: bool = attrs.field(default=False, init=False)
    _has_called: bool = attrs.field(default=False, init=False)
    """A call may have begun, so that there is a file, or soon will be."""
    # Held during each call.
    _calling: threading.Lock = attrs.field(factory=threading.Lock, init=False, repr=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def in_memory(self) -> bytes | None:
        """The whole body, copied, when none of it is in a file; else None."""
        return bytes(self._tail) if self._file is None else None

    async def write(self, data: bytes) -> None:
        """Append *data*.  Not a checkpoint while it is only gathered; when cancelled the body can only be closed.

        Raises:
            StorageFull: the file takes no more.
        """
        self._tail += data
        self.size += len(data)
        if len(self._tail) > (MEMORY_LIMIT if self._file is None else GATHER):
            await self._call(partial(self._flush, self._tail, self.size - len(self._tail)))
            self._tail = bytearray()

    async def read(self, offset: int, size: int) -> bytes:
        """Up to *size* bytes from *offset* on; fewer only at the end.  Not a checkpoint for what is in memory.

        Raises:
            OSError: the disk does not give back what it took.
        """
        filed = self.size - len(self._tail)
        if offset >= filed:
            return bytes(self._tail[offset - filed : offset - filed + size])
        data = await self._call(partial(self._pread, offset, min(size, filed - offset)))
        missing = size - len(data)
        return data + self._tail[:missing] if missing else data

    def splice(self, start: int, end: int, replacement: bytes) -> Spliced:
        """This body as it is, with *replacement* in the place of the bytes from *start* to *end*.

        The body must be complete, and stay open for as long as the result is read.
        """
        return Spliced(self, [_Range(0, self.size)]).splice(start, end, replacement)

    def close(self) -> None:
        """Give back memory and file; nothing may be read any more."""
        self._tail = bytearray()
        self._closed = True
        if self._has_called:
            # Closing frees the blocks of the file: 50 ms for 1 GB, in which no stream would move.
            # Nobody needs to wait for it, and the end of the process does the same.
            trio.lowlevel.start_thread_soon(self._close, lambda _: None)

    async def _call(self, function: Callable[[], _T]) -> _T:
        self._has_called = True
        return await trio.to_thread.run_sync(self._alone, function, abandon_on_cancel=True, limiter=_limiter())

    # ---- in a thread ---------------------------------------------------------------------

    def _alone(self, function: Callable[[], _T]) -> _T:
        with self._calling:
            if self._closed:  # then nobody waits for this any more
                raise OSError(errno.EBADF, "the request body was given back")
            return function()

    def _close(self) -> None:
        with self._calling:
            if self._file is not None:
                self._file.close()
                self._file = None

    def _flush(self, tail: bytearray, offset: int) -> None:
        where = directory()
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=where, buffering=0)  # noqa: SIM115 - closed by close
            with memoryview(tail) as rest:
                done = 0
                while done < len(rest):
                    done += os.pwrite(self._file.fileno(), rest[done:], offset + done)
        except OSError as exc:
            raise StorageFull(where or "the temporary directory", exc.strerror or str(exc)) from exc

    def _pread(self, offset: int, size: int) -> bytes:
        assert self._file is not None
        pieces, missing = [], size
        while missing:
            piece = os.pread(self._file.fileno(), missing, offset + size - missing)
            if not piece:
                raise OSError(errno.EIO, "the file with the request body has become shorter")
            pieces.append(piece)
            missing -= len(piece)
        return b"".join(pieces)


@attrs.frozen
class _Range:
    """Bytes of a spool; `end` is the offset behind the last."""

    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start

    def __getitem__(self, cut: slice) -> _Range:
        start, end, _ = cut.indices(len(self))
        return _Range(self.start + start, self.start + end)


_Part = _Range | bytes


def _without_empty(parts: Sequence[_Part]) -> list[_Part]:
    return [part for part in parts if len(part)]


@attrs.frozen(eq=False)
class Spliced:
    """A body in which some bytes are replaced; nothing of it is copied before it is read."""

    _spool: Spool
    _parts: Sequence[_Part] = attrs.field(converter=_without_empty)
    _ends: Sequence[int] = attrs.field(init=False, repr=False)
    """Of each part, the offset behind its last byte."""

    @_ends.default
    def _(self) -> list[int]:
        return list(accumulate(map(len, self._parts)))

    @property
    def size(self) -> int:
        """Bytes."""
        return self._ends[-1] if self._ends else 0

    @property
    def in_memory(self) -> bytes | None:
        """The whole body, copied, when the spool has it in memory; else None."""
        whole = self._spool.in_memory
        if whole is None:
            return None
        return b"".join(whole[part.start : part.end] if isinstance(part, _Range) else part for part in self._parts)

    async def read(self, offset: int, size: int) -> bytes:
        """Up to *size* bytes from *offset* on; fewer only at the end.  Not a checkpoint for what is in memory.

        Raises:
            OSError: the disk does not give back what it took.
        """
        return b"".join(
            [
                await self._spool.read(part.start, len(part)) if isinstance(part, _Range) else part
                for part in self._between(offset, offset + size)
            ]
        )

    def splice(self, start: int, end: int, replacement: bytes) -> Spliced:
        """This body with *replacement* in the place of the bytes from *start* to *end*, counted in this body.

        Who replaces several does it from the last to the first, and the other offsets stay true.
        """
        assert 0 <= start <= end <= self.size, (start, end, self.size)
        return Spliced(self._spool, [*self._between(0, start), replacement, *self._between(end, self.size)])

    def _between(self, start: int, end: int) -> Iterator[_Part]:
        """The parts, or pieces of them, that make up these bytes."""
        for index in range(bisect_right(self._ends, start), len(self._parts)):
            part = self._parts[index]
            first = self._ends[index] - len(part)
            if first >= end:
                return
            yield part[max(0, start - first) : end - first]
