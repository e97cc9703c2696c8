"""The threads that write: nobody waits for them, and what is lost is counted where it was lost."""

from __future__ import annotations

import errno
import os
import re
import threading
import time

import attrs
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from trioswap.logwriter import Descriptor, LogWriter, Sink

GUARD = 30.0  # seconds; only a hang gets there


@attrs.define(eq=False)
class Scripted:
    """A target that takes a few bytes at a time, fails when told to, and can be held."""

    steps: list[int | OSError] = attrs.field(factory=list)
    """How many bytes it takes next, or what goes wrong; then it takes all."""
    written: bytearray = attrs.field(factory=bytearray)
    open: threading.Event = attrs.field(factory=threading.Event)
    entered: threading.Event = attrs.field(factory=threading.Event)
    cut_at_the_end: int = 0
    """Lines of which all but their end was written when something went wrong."""

    def write(self, data: bytes) -> int:
        self.entered.set()
        assert self.open.wait(GUARD)
        step = self.steps.pop(0) if self.steps else len(data)
        if isinstance(step, OSError):
            in_a_line = not data.startswith(b"\n--") and not self.written.endswith(b" dropped --")
            self.cut_at_the_end += data.startswith(b"\n") and in_a_line
            raise step
        self.written += data[:step]
        return min(step, len(data))


def settle(writer: LogWriter) -> None:
    """Return when the thread has written, or failed to write, all there is."""
    deadline = time.monotonic() + GUARD
    while writer._taken:
        assert time.monotonic() < deadline
        os.sched_yield()


def finish(writer: LogWriter) -> None:
    assert writer.stop(time.monotonic() + GUARD)


def test_everything_is_written_in_order():
    """To each sink what was put there, by whatever pieces the target takes it."""
    first, second = Scripted([1, 2, 3]), Scripted()
    first.open.set()
    second.open.set()
    writer, one, two = LogWriter("test"), Sink(first), Sink(second)
    for number in range(100):
        writer.put(one, b"one %d\n" % number)
        writer.put(two, b"two %d\n" % number)
    finish(writer)
    assert bytes(first.written) == b"".join(b"one %d\n" % number for number in range(100))
    assert bytes(second.written) == b"".join(b"two %d\n" % number for number in range(100))


def test_what_comes_fast_is_written_together():
    """What waits for one target, of one source and in a row, is one write; the order stays, and so does who wrote."""
    pieces = list[bytes]()

    @attrs.define(eq=False)
    class Counting(Scripted):
        def write(self, data: bytes) -> int:
            pieces.append(data)
            return super().write(data)

    first, second = Counting(), Counting()
    second.open.set()
    writer, sinks = LogWriter("test"), [Sink(first), Sink(second)]
    writer.put(sinks[0], b"1\n")
    assert first.entered.wait(GUARD)
    for number in (2, 3, 4):
        writer.put(sinks[0], b"%d\n" % number)
    writer.put(sinks[1], b"5\n")
    writer.put(sinks[0], b"6", "a")
    writer.put(sinks[0], b"7\n", "a")
    writer.put(sinks[0], b"8\n", "b")
    first.open.set()
    finish(writer)
    assert pieces == [b"1\n", b"2\n3\n4\n", b"5\n", b"67\n", b"8\n"]
    assert writer._taken == 0


def test_nobody_waits_and_the_loss_is_told():
    """While the target is stuck putting goes on; then what found room comes, and before the next how many did not."""
    target = Scripted()
    writer = LogWriter("test", room=10_000)
    sink = Sink(target, b"<4>")
    for number in range(1000):
        writer.put(sink, b"line %04d\n" % number)
    assert writer._taken <= 10_000
    target.open.set()
    settle(writer)
    other = Scripted()
    other.open.set()
    writer.put(Sink(other), b"of another sink\n")
    writer.put(sink, b"the last\n")
    finish(writer)
    *kept, notice, last = bytes(target.written).splitlines()
    assert kept == [b"line %04d" % number for number in range(len(kept))]
    assert notice == b"<4>-- %d lines dropped --" % (1000 - len(kept))
    assert 50 < len(kept) < 1000
    assert last == b"the last"
    assert bytes(other.written) == b"of another sink\n"


def test_a_writer_that_is_stuck_cannot_hold_the_exit():
    """Stopping gives up at its deadline and says so."""
    target = Scripted()
    writer = LogWriter("test")
    writer.put(Sink(target), b"never\n")
    assert target.entered.wait(GUARD)
    assert not writer.stop(time.monotonic() + 0.01)
    target.open.set()
    finish(writer)


def test_what_cannot_be_written_is_counted_too():
    """An error costs the rest of its piece; the next one begins with the count, on a line of its own."""
    full = OSError(errno.ENOSPC, "full")
    target = Scripted([8, full, full, 1000])
    target.open.set()
    failures: list[OSError] = []
    writer = LogWriter("test", failures.append)
    sink = Sink(target)
    for data in (b"line 1\nline 2\nline 3\n", b"line 4\n", b"line 5\n"):
        writer.put(sink, data)
        settle(writer)
    finish(writer)
    assert failures == [full, full]
    assert bytes(target.written) == b"line 1\nl\n-- 3 lines dropped --\nline 5\n"


def test_one_source_does_not_go_on_in_the_line_of_another():
    """A line that is not ended is ended for it; a source that goes on in its own line is left alone."""
    target = Scripted()
    target.open.set()
    writer, sink = LogWriter("test"), Sink(target)
    for source, data in (("a", b"one "), ("a", b"line\n"), ("b", b"half"), ("", b"ours\n"), ("b", b"the rest\n")):
        writer.put(sink, data, source)
    finish(writer)
    assert bytes(target.written) == b"one line\nhalf\nours\nthe rest\n"


@given(
    st.lists(st.one_of(st.integers(1, 9), st.just("fail")), max_size=20),
    st.lists(st.integers(1, 4), min_size=1, max_size=20),
)
@example([1, "fail", "fail", 1, 3, 9, 9, "fail"], [1, 1, 1])  # the count without the end of its line
def test_no_line_is_lost_in_silence(steps, pieces):
    """Whole lines that are read, and those that are counted, are all there were, whatever fails in between."""
    total, data = 0, []
    for lines in pieces:
        data.append(b"".join(b"line %04d\n" % (total + number) for number in range(lines)))
        total += lines
    target = Scripted([OSError(errno.ENOSPC, "full") if step == "fail" else step for step in steps])
    target.open.set()
    writer, sink = LogWriter("test"), Sink(target)
    for piece in data:
        writer.put(sink, piece)
        settle(writer)
    target.steps.clear()
    writer.put(sink, b"the end\n")
    finish(writer)
    text = bytes(target.written)
    seen = len(re.findall(rb"^line \d{4}\n", text, re.MULTILINE))
    told = sum(int(match[1]) for match in re.finditer(rb"^-- (\d+) lines dropped --\n", text, re.MULTILINE))
    assert text.endswith(b"the end\n")
    assert seen + told == total + target.cut_at_the_end  # those are lines in both respects


# ---- descriptors ----


def test_a_descriptor_that_does_not_block_is_waited_for():
    """Whoever shares the terminal may have set it so; no line is lost for that."""
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    writer = LogWriter("test")
    sink = Sink(Descriptor(writable))
    sent = [b"%07d\n" % number * 1000 for number in range(50)]  # 400 KB: more than a pipe holds
    for piece in sent:
        writer.put(sink, piece)
    received = b""
    while len(received) < 400_000:
        data = os.read(readable, 65536)
        assert data
        received += data
    finish(writer)
    os.close(readable)
    os.close(writable)
    assert received == b"".join(sent)


@pytest.mark.parametrize("gone", ["reader", "descriptor"])
def test_nobody_is_there_any_more(gone):
    """A closed pipe and a closed descriptor are failures like others; the thread goes on."""
    readable, writable = os.pipe()
    os.close(readable)
    if gone == "descriptor":
        os.close(writable)
    failures: list[OSError] = []
    other = Scripted()
    other.open.set()
    writer = LogWriter("test", failures.append)
    writer.put(Sink(Descriptor(writable)), b"line\n")
    writer.put(Sink(other), b"line\n")
    finish(writer)
    if gone == "reader":
        os.close(writable)
    assert [failure.errno for failure in failures] == [errno.EPIPE if gone == "reader" else errno.EBADF]
    assert bytes(other.written) == b"line\n"
