"""Bodies in memory and in a real file."""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import attrs
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from trioswap import spool
from trioswap.errors import StorageFull
from trioswap.spool import CALLS, GATHER, MEMORY_LIMIT, Spool

PATIENCE = 30  # seconds; only a hang gets there
LARGE = bytes(range(256)) * (MEMORY_LIMIT // 64)  # four times what stays in memory


def files(where):
    """The open files of this process that are, or were, in a directory."""
    found = []
    for each in Path("/proc/self/fd").iterdir():
        try:
            found.append(each.readlink())
        except FileNotFoundError:  # the one that looks
            continue
    return [str(path) for path in found if path.is_relative_to(where)]


async def filled(data, piece=10_000):
    body = Spool()
    for start in range(0, len(data), piece):
        await body.write(data[start : start + piece])
    return body


async def wait_closed(where):
    """Return when no file in *where* is open; closing is left to a thread."""
    while files(where):  # noqa: ASYNC110 - the kernel gives no notice
        await trio.sleep(0.001)


@pytest.fixture
async def where(tmp_path, monkeypatch):
    """The directory that bodies are spooled to; in the end nothing is left there."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with trio.fail_after(PATIENCE):
        yield tmp_path
        await wait_closed(tmp_path)
    assert not list(tmp_path.iterdir())


# ---- where ----


async def test_a_small_body_stays_in_memory(where):
    """Up to the limit there is no file, and the body is at hand at once."""
    with await filled(LARGE[:MEMORY_LIMIT]) as body:
        assert files(where) == []
        assert body.in_memory == LARGE[:MEMORY_LIMIT]
        assert body.size == MEMORY_LIMIT
        assert await body.read(0, MEMORY_LIMIT + 1) == LARGE[:MEMORY_LIMIT]


async def test_a_larger_one_goes_to_a_file_without_a_name(where):
    """One byte more is one too many; the file has no name from the beginning, so a killed daemon leaves none."""
    with await filled(LARGE[: MEMORY_LIMIT + 1]) as body:
        assert body.in_memory is None
        (path,) = files(where)
        assert path.endswith("(deleted)")
        assert list(where.iterdir()) == []
        assert await body.read(0, body.size) == LARGE[: MEMORY_LIMIT + 1]


async def test_what_is_in_memory_is_bounded(where):
    """A long body leaves in memory only what has not been gathered yet."""
    with await filled(LARGE) as body:
        assert len(body._tail) <= GATHER


def test_the_directory(tmp_path, monkeypatch):
    """TMPDIR comes first, then /var/tmp; what is not there or not to be written is passed over."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert spool.directory() == str(tmp_path)
    for useless in ("", str(tmp_path / "none")):
        monkeypatch.setenv("TMPDIR", useless)
        assert spool.directory() in {"/var/tmp", None}
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert spool.directory() is None


async def test_system_calls_are_few_and_in_threads(where, monkeypatch):
    """A disk that takes its time holds up nobody, and small pieces are gathered."""
    calls = []

    def watched(name):
        real = getattr(os, name)

        def call(fd, data, offset):
            calls.append((name, threading.get_ident()))
            return real(fd, data, offset)

        monkeypatch.setattr(os, name, call)

    watched("pwrite")
    watched("pread")
    with await filled(LARGE, piece=1000) as body:
        await body.read(0, 1000)
    names = [name for name, _ in calls]
    assert names.count("pwrite") <= len(LARGE) // GATHER
    assert names.count("pread") == 1
    assert threading.get_ident() not in {thread for _, thread in calls}


async def test_system_calls_may_do_less_than_they_are_asked(where, monkeypatch):
    """The rest is asked for again."""
    pwrite, pread = os.pwrite, os.pread
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:70_001], offset))
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: pread(fd, min(size, 70_001), offset))
    with await filled(LARGE) as body:
        assert await body.read(0, len(LARGE)) == LARGE


# ---- what ----


async def all_of(body, piece):
    """The whole body, in pieces."""
    pieces = [await body.read(at, piece) for at in range(0, body.size + piece, piece)]
    assert all(len(each) == piece for each in pieces[: body.size // piece])
    return b"".join(pieces)


@st.composite
def edits(draw, data):
    """Some replacements in *data*, one after the other, and what comes out."""
    found = []
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(data)))
        end = draw(st.integers(start, min(len(data), start + 9)))
        replacement = draw(st.binary(max_size=5))
        found.append((start, end, replacement))
        data = data[:start] + replacement + data[end:]
    return found, data


@settings(deadline=None)  # files and threads
@given(pieces=st.lists(st.binary(max_size=30), max_size=8), data=st.data())
def test_what_is_written_is_read(pieces, data):
    """In pieces of any size, wherever it is kept, with and without replacements."""
    whole = b"".join(pieces)
    changes, changed = data.draw(edits(whole))
    piece = data.draw(st.integers(1, 40))

    async def check():
        with trio.fail_after(PATIENCE), Spool() as body:
            for each in pieces:
                await body.write(each)
            assert body.size == len(whole)
            assert body.in_memory == (whole if len(whole) <= 20 else None)
            assert await all_of(body, piece) == whole
            view = body.splice(0, 0, b"")
            for change in changes:
                view = view.splice(*change)
            assert view.size == len(changed)
            assert view.in_memory == (changed if len(whole) <= 20 else None)
            assert await all_of(view, piece) == changed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spool, "MEMORY_LIMIT", 20)
        patch.setattr(spool, "GATHER", 7)
        trio.run(check)


async def test_a_part_of_a_large_body_is_replaced(where):
    """The bytes around the replaced ones come from the file as they are."""
    with await filled(LARGE) as body:
        view = body.splice(MEMORY_LIMIT, MEMORY_LIMIT + 10, b"new name")
        assert view.size == len(LARGE) - 2
        assert await all_of(view, GATHER) == LARGE[:MEMORY_LIMIT] + b"new name" + LARGE[MEMORY_LIMIT + 10 :]


# ---- cancelled, broken ----


@attrs.frozen
class Hanging:
    """A system call that does not return before it is let go; then it does what it should."""

    real: Callable[..., object]
    token: trio.lowlevel.TrioToken = attrs.field(factory=trio.lowlevel.current_trio_token)
    begun: trio.Event = attrs.field(factory=trio.Event)
    go_on: threading.Event = attrs.field(factory=threading.Event)
    returned: list[object] = attrs.field(factory=list)

    def __call__(self, *args, **options):
        self.token.run_sync_soon(self.begun.set)
        assert self.go_on.wait(PATIENCE)
        self.returned.append(self.real(*args, **options))
        return self.returned[-1]

    async def cancelled(self, call: Callable[..., Awaitable[object]], *args: object) -> None:
        """Cancel a *call* that hangs here."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(call, *args)
            await self.begun.wait()
            nursery.cancel_scope.cancel(reason="test")
        assert not self.returned


@pytest.fixture
async def hang(where, monkeypatch):
    """Makes a function of a module hang."""
    hanging = []

    def make(module, name):
        hanging.append(Hanging(getattr(module, name)))
        monkeypatch.setattr(module, name, hanging[-1])
        return hanging[-1]

    yield make
    for each in hanging:
        each.go_on.set()


async def test_a_cancelled_write_does_not_wait_for_the_disk(where, hang, monkeypatch):
    """The call goes on by itself, and its file is not closed under it: the number would be another file's."""
    closers, disk, body = [], hang(os, "pwrite"), Spool()

    def in_thread(function, deliver):
        closers.append(threading.Thread(target=function))
        closers[-1].start()

    monkeypatch.setattr(trio.lowlevel, "start_thread_soon", in_thread)
    await disk.cancelled(body.write, LARGE)
    body.close()
    closers[0].join(0.05)  # if it did not wait, it would have ended by then
    assert len(files(where)) == 1

    disk.go_on.set()
    closers[0].join(PATIENCE)
    assert disk.returned == [len(LARGE)]
    assert files(where) == []


async def test_a_file_that_is_made_too_late_is_closed(where, hang):
    """Its body was given back while the disk made it."""
    disk, body = hang(tempfile, "TemporaryFile"), Spool()
    await disk.cancelled(body.write, LARGE)
    body.close()
    assert files(where) == []

    disk.go_on.set()
    while not disk.returned or not disk.returned[0].closed:  # noqa: ASYNC110 - a thread does it
        await trio.sleep(0.001)


async def test_a_cancelled_read_can_be_done_again(where, hang):
    """Whether the disk had begun with it or not."""
    with await filled(LARGE) as body:
        with trio.CancelScope() as scope:
            scope.cancel(reason="test")
            await body.read(0, 10)
        assert scope.cancelled_caught

        disk = hang(os, "pread")
        await disk.cancelled(body.read, 0, 10)
        disk.go_on.set()
        assert await body.read(0, body.size) == LARGE


async def test_nothing_is_read_from_a_body_that_was_given_back(where):
    """A call may get its thread when nobody waits for it any more."""
    body = await filled(LARGE)
    body.close()
    with pytest.raises(OSError, match="given back"):
        await body.read(0, 10)


async def test_a_disk_that_does_not_answer_takes_no_thread_from_others(where, hang):
    """Not even when more bodies are written than calls may be under way."""
    trio.to_thread.current_default_thread_limiter().total_tokens = 1
    disk, bodies = hang(os, "pwrite"), [Spool() for _ in range(CALLS + 1)]
    async with trio.open_nursery() as nursery:
        for body in bodies:
            nursery.start_soon(body.write, LARGE)
        await disk.begun.wait()
        assert await trio.to_thread.run_sync(int) == 0
        nursery.cancel_scope.cancel(reason="test")
    for body in bodies:
        body.close()


async def test_a_full_disk_is_a_clear_error(where, monkeypatch):
    """The message says where and why, the status that there is no room; the file is closed afterwards."""
    full = os.fdopen(os.open("/dev/full", os.O_RDWR), "r+b", buffering=0)
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: full)
    with Spool() as body:
        with pytest.raises(StorageFull) as caught:
            await body.write(LARGE)
        assert caught.value.status == 507
        assert str(caught.value) == (
            f"the request body cannot be kept in {where}: No space left on device; "
            "make room there, or set TMPDIR to another directory"
        )
    while not full.closed:  # noqa: ASYNC110 - a thread does it
        await trio.sleep(0.001)


async def test_a_directory_that_takes_no_file_is_one_too(monkeypatch):
    """Where no file can be made, the error is the same."""

    def refuse(**_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with Spool() as body, pytest.raises(StorageFull, match="Read-only file system"):
        await body.write(LARGE)


async def test_a_file_that_became_shorter_is_an_error(where):
    """What the disk does not give back is never taken for the end of the body."""
    with await filled(LARGE) as body:
        body._file.truncate(10)
        with pytest.raises(OSError, match="shorter"):
            await body.read(0, 100)
