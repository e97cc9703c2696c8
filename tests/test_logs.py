"""Rings keep the newest bytes, and followers lose only their own lines."""

from __future__ import annotations

import re

import pytest
import trio
from hypothesis import example, given
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from trioswap import logs
from trioswap.logs import LogRing, Logs

NOTICE = re.compile(rb"\A\n?-- (\d+) bytes dropped --\n")
GUARD = 30  # seconds; only a hang gets there

# Few letters and many line ends, so that cuts fall everywhere.
output = st.lists(st.text("ab\n", max_size=12).map(str.encode), max_size=40)


async def read(follower):
    """The follower's next piece."""
    with trio.fail_after(GUARD):
        return await anext(follower)


# ---- rings ----


@given(output, st.integers(1, 30))
@example([b"a\nb"], 2)  # one piece larger than the ring, cut inside its first line
def test_history_is_the_newest_bytes_from_a_line_start(pieces, capacity):
    """History is all there was, or the longest suffix within the capacity that starts with a line."""
    ring = LogRing(capacity)
    for piece in pieces:
        ring.append(piece)
    everything = b"".join(pieces)
    history = ring.history()
    assert everything.endswith(history)
    start = len(everything) - len(history)
    oldest = max(0, len(everything) - capacity)
    line_starts = [0, *(i + 1 for i, byte in enumerate(everything) if byte == ord("\n"))]
    possible = [i for i in line_starts if oldest <= i < len(everything)]
    assert start == (possible[0] if possible else oldest)


@given(output, st.integers(1, 30))
def test_a_ring_never_holds_more_than_twice_its_capacity(pieces, capacity):
    """The memory of a ring is bounded whatever is appended, in whatever pieces."""
    ring = LogRing(capacity)
    for piece in pieces:
        ring.append(piece)
        assert len(ring._kept) <= 2 * capacity + 1


def test_the_default_ring_keeps_100_kib():
    """A ring made without a number keeps 100 KiB."""
    ring = LogRing()
    for number in range(30_000):
        ring.append(b"line %06d\n" % number)
    history = ring.history()
    assert 100 * 1024 - 12 < len(history) <= 100 * 1024
    assert history.endswith(b"line 029999\n")


def test_tail_is_for_people():
    """The tail is the last lines as text, and bytes that are no UTF-8 do not break it."""
    ring = LogRing()
    ring.append(b"one\ntwo\nthree \xff\nfour")
    assert ring.tail(2) == "three \N{REPLACEMENT CHARACTER}\nfour"
    assert ring.tail(10).startswith("one\ntwo\n")
    assert LogRing().tail(3) == ""


# ---- followers ----


async def test_a_follower_reads_history_and_then_what_comes():
    """A follower starts with what is kept and wakes for each thing appended."""
    ring = LogRing()
    ring.append(b"old\n")
    with ring.follow() as follower:
        assert await read(follower) == b"old\n"
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def _():
                assert await read(follower) == b"new\n"

            await wait_all_tasks_blocked()
            ring.append(b"new\n")


async def test_a_follower_may_skip_history():
    """Without history a follower sees only what comes after it began."""
    ring = LogRing()
    ring.append(b"old\n")
    with ring.follow(with_history=False) as follower:
        ring.append(b"new\n")
        assert await read(follower) == b"new\n"


async def test_a_follower_that_left_costs_nothing():
    """After the block the ring knows the follower no more, also when it was cancelled while it waited."""
    ring = LogRing()
    with trio.move_on_after(0), ring.follow() as follower:
        await anext(follower)
    assert ring._followers == []


@given(st.lists(st.one_of(st.just("read"), st.text("ab\n", min_size=1, max_size=12)), max_size=60), st.integers(4, 40))
async def test_a_follower_sees_everything_or_is_told_how_much_not(steps, size):
    """What is read, and the counts of what was dropped, add up to exactly what was appended."""
    ring, everything, seen, unread, overflown = LogRing(), b"", 0, 0, False
    with pytest.MonkeyPatch.context() as patch, ring.follow() as follower:
        patch.setattr(logs, "FOLLOWER_BUFFER", size)
        last = b"\n"
        for step in [*steps, "read"]:
            if step != "read":
                everything += step.encode()
                ring.append(step.encode())
                unread += len(step)
                overflown = overflown or unread > size + 1
            elif unread:
                piece = await read(follower)
                notice = NOTICE.match(piece)
                assert bool(notice) is overflown, "a notice exactly when something was lost"
                if notice:
                    assert piece.startswith(b"\n") is (last != b"\n"), "the notice is a line of its own"
                    seen += int(notice[1])
                    piece = piece[notice.end() :]
                    assert everything[seen - 1 : seen] == b"\n" or b"\n" not in piece[:-1], "cut at a line"
                assert len(piece) <= size + 1
                assert everything[seen : seen + len(piece)] == piece
                seen += len(piece)
                last, unread, overflown = piece[-1:] or b"\n", 0, False
    assert seen == len(everything)


async def test_a_stalled_follower_delays_nobody():
    """A follower that never reads loses its own lines; another one and the ring itself lose none."""
    ring = LogRing()
    with ring.follow() as stalled, ring.follow() as eager:
        for number in range(100):
            ring.append(b"%09d\n" % number * 1000)
            assert await read(eager) == b"%09d\n" % number * 1000
        piece = await read(stalled)
    notice = NOTICE.match(piece)
    assert notice is not None
    assert int(notice[1]) + len(piece) - notice.end() == 1_000_000
    assert 256 * 1024 - 10 <= len(piece) - notice.end() <= 256 * 1024 + 1
    assert ring.history().endswith(b"000000099\n")


# ---- the hub ----


def test_lines_go_to_their_own_ring_and_the_common_ones():
    """Children and we ourselves have separate rings, and one holds both in order."""
    hub = Logs()
    hub.from_ourselves(b"starting\n")
    hub.from_child("a", b"from a\n")
    hub.from_child("b", b"from b\n")
    assert hub.proxy.history() == b"starting\n"
    assert hub.upstream.history() == b"from a\nfrom b\n"
    assert hub.combined.history() == b"starting\nfrom a\nfrom b\n"
    assert hub.of("a").history() == b"from a\n"


def test_names_of_streams():
    """The empty name is everything, two names are ours, others are models that have a ring."""
    hub = Logs()
    ring = hub.of("org/model")
    assert hub.find("") is hub.combined
    assert hub.find("proxy") is hub.proxy
    assert hub.find("upstream") is hub.upstream
    assert hub.find("org/model") is ring is hub.of("org/model")
    assert hub.find("other") is None


def test_what_children_write_is_copied_inside_a_block():
    """A listener gets it with the model's name, in order, and nothing of ours, and nothing afterwards."""
    hub, heard = Logs(), []
    hub.from_child("a", b"before\n")
    with hub.copied(lambda model, data: heard.append((model, data))):
        hub.from_child("a", b"1")
        hub.from_ourselves(b"ours\n")
        hub.from_child("b", b"2\n")
    hub.from_child("a", b"after\n")
    assert heard == [("a", b"1"), ("b", b"2\n")]
