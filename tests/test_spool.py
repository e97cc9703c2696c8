"""Bodies in memory and in a real file."""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from trioswap import spool
from trioswap.errors import StorageFull
from trioswap.spool import GATHER, MEMORY_LIMIT, Spool

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


async def test_a_cancelled_write_or_read_loses_nothing(where):
    """Cancelled at each of their checkpoints, a write keeps its data and a read can be done again."""
    with Spool() as body:
        for start in range(0, len(LARGE), GATHER):
            with trio.CancelScope() as scope:  # the one over the limit goes to a thread, and is cancelled there
                scope.cancel(reason="test")
                await body.write(LARGE[start : start + GATHER])
        assert body.size == len(LARGE)
        await body.write(b"!")
        with trio.CancelScope() as scope:
            scope.cancel(reason="test")
            await body.read(0, 10)
        assert scope.cancelled_caught
        assert await body.read(0, body.size) == LARGE + b"!"


async def test_a_call_that_has_begun_is_waited_for(where, monkeypatch):
    """A cancellation in the middle of a system call comes after it; the file is not closed under it."""
    begun, go_on, real = trio.Event(), threading.Event(), os.pwrite

    def slow(fd, data, offset):
        trio.from_thread.run_sync(begun.set)
        assert go_on.wait(PATIENCE)
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", slow)
    body = Spool()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(body.write, LARGE)
        await begun.wait()
        nursery.cancel_scope.cancel(reason="test")
        go_on.set()
    assert await body.read(0, len(LARGE)) == LARGE
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
