"""Patience, bounded writes, reading ahead and the inbox, on a mock clock or without any clock."""

from __future__ import annotations

import attrs
import pytest
import trio
import trio.testing

from trioswap.bounded import BoundedStream, Inbox, Patience, ReadAhead

LEFT = {"type": "http.disconnect"}


async def wait_and_record(patience, ends):
    with patience.wait():
        await trio.sleep_forever()
    ends.append(trio.current_time())


async def test_patience_ends_after_its_seconds(autojump_clock):
    """Who waits without progress is let go in time."""
    ends = []
    await wait_and_record(Patience(5), ends)
    assert ends == [5]


async def test_progress_starts_the_patience_anew(autojump_clock):
    """A renewed wait has its full time again."""
    patience = Patience(5)
    with patience.wait() as scope:
        for _ in range(10):
            await trio.sleep(4)
            patience.renew(scope)
        await trio.sleep_forever()
    assert trio.current_time() == 45


async def test_shortened_patience_applies_to_who_waits_already(autojump_clock):
    """Waits that have begun end sooner, never later; new ones have the shorter time."""
    patience, ends = Patience(30), []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait_and_record, patience, ends)
        await trio.sleep(1)
        patience.shorten(2)
        patience.shorten(9)
    await wait_and_record(patience, ends)
    assert ends == [3, 5]


async def test_cancelled_patience_ends_whatever_progress_is_made(autojump_clock):
    """After the cancellation, renewing is of no use beyond the last seconds."""
    patience = Patience(30)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(patience.end_when_cancelled, 2)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True), patience.wait() as scope:
            while True:
                await trio.sleep(0.5)
                patience.renew(scope)
    assert trio.current_time() == 2


@attrs.define(eq=False)
class SlowSocket:
    """Takes one byte each *pause* seconds, `takes` in all."""

    pause: float
    takes: int
    taken: bytes = b""
    closed: bool = False
    did_shutdown_SHUT_WR: bool = False  # noqa: N815 - the name is Trio's

    async def send(self, data):
        if len(self.taken) == self.takes:
            await trio.sleep_forever()
        await trio.sleep(self.pause)
        self.taken += bytes(data[:1])
        return 1

    def fileno(self):
        return -1 if self.closed else 3

    def close(self):
        self.closed = True


@attrs.define(eq=False)
class SlowStream:
    """As much of a `trio.SocketStream` as a write needs."""

    socket: SlowSocket


async def test_a_slow_write_with_progress_is_completed(autojump_clock):
    """It may take many times the patience, as long as some bytes are taken within each."""
    sock = SlowSocket(pause=4, takes=10)
    await BoundedStream(SlowStream(sock), Patience(5)).send_all(b"0123456789")
    assert sock.taken == b"0123456789"
    assert trio.current_time() == 40


async def test_a_write_whose_progress_ends_gives_up_and_closes(autojump_clock):
    """The patience counts from the last byte taken; later writes fail at once."""
    sock = SlowSocket(pause=4, takes=3)
    stream = BoundedStream(SlowStream(sock), Patience(5))
    with pytest.raises(trio.BrokenResourceError, match="stopped reading"):
        await stream.send_all(b"0123456789")
    assert trio.current_time() == 17
    assert sock.closed
    with pytest.raises(trio.ClosedResourceError):
        await stream.send_all(b"more")


async def test_the_bounded_stream_is_a_stream():
    """It passes Trio's own contract for streams that can close one direction."""

    async def pair():
        return tuple(BoundedStream(trio.SocketStream(sock), Patience(60)) for sock in trio.socket.socketpair())

    await trio.testing.check_half_closeable_stream(pair, None)


def never() -> bool:
    return False


async def test_what_may_be_dropped_does_not_hide_the_end():
    """Past the limit of a busy parser further requests are dropped, so that the end of input is seen behind them."""
    ahead = ReadAhead(4)
    send, receive = trio.testing.memory_stream_one_way_pair()
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ahead.fill, receive, lambda: True)
            await send.send_all(b"1st")
            assert await ahead.take() == b"1st"
            await send.send_all(b"and more than can be kept")
            await send.aclose()

    assert ahead.dropped


async def test_nobody_gets_what_follows_a_gap():
    """After bytes were dropped a parser waits in vain, rather than read nonsense."""
    ahead = ReadAhead(4)
    send, receive = trio.testing.memory_stream_one_way_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ahead.fill, receive, lambda: True)
        await send.send_all(b"1st")
        await ahead.take()
        await send.send_all(b"lost" + b"nonsense")
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(ahead.take)
        await trio.testing.wait_all_tasks_blocked()
        assert ahead.dropped
        assert len(nursery.child_tasks) == 2
        nursery.cancel_scope.cancel()


async def test_reading_ahead_stops_at_its_limit():
    """A busy parser costs no more than the limit; the rest waits in the stream, and nothing is lost."""
    ahead = ReadAhead(4)
    send, receive = trio.testing.memory_stream_one_way_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ahead.fill, receive, never)
        await send.send_all(b"0123456789")
        await trio.testing.wait_all_tasks_blocked()
        received = b""
        while len(received) < 10:
            piece = await ahead.take()
            assert len(piece) <= 4
            received += piece
        assert received == b"0123456789"
        await send.aclose()


async def test_the_last_bytes_reach_a_waiting_parser_before_the_end():
    """Bytes and the end of input in one go: the end is reported when the parser has the bytes."""
    ahead, taken = ReadAhead(100), []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(take_one, ahead, taken)
        await ahead.fill(AtOnce([b"last words", b""]), never)
        assert taken == [b"last words"]


@attrs.define(eq=False)
class AtOnce:
    """A stream that gives all it has in one scheduling step."""

    pieces: list[bytes]

    async def receive_some(self, max_bytes):
        return self.pieces.pop(0)


async def take_one(ahead, taken):
    taken.append(await ahead.take())


async def test_the_end_does_not_wait_for_a_busy_parser():
    """A parser that is busy with the first bytes holds nobody who waits for the end of input."""
    ahead = ReadAhead(100)
    send, receive = trio.testing.memory_stream_one_way_pair()
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ahead.fill, receive, never)
            await send.send_all(b"first")
            assert await ahead.take() == b"first"
            await send.send_all(b"second")
            await send.aclose()


async def test_a_full_inbox_makes_the_parser_wait():
    """The client's messages are bounded, and come in order."""
    inbox = Inbox(2)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(put_all, inbox, [1, 2, 3, 4])
        await trio.testing.wait_all_tasks_blocked()
        assert len(nursery.child_tasks) == 1
        assert [(await inbox.get())["n"] for _ in range(4)] == [1, 2, 3, 4]


async def put_all(inbox, numbers):
    for n in numbers:
        await inbox.put({"type": "http.request", "n": n})


async def test_a_disconnect_overtakes_the_body_and_never_waits():
    """The end comes next even if the inbox is full, lets the parser go, and is told again and again."""
    inbox = Inbox(2)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(put_all, inbox, [1, 2, 3, 4])
            await trio.testing.wait_all_tasks_blocked()
            await inbox.put(LEFT)
    assert [await inbox.get() for _ in range(3)] == [LEFT] * 3


async def test_a_websocket_is_read_to_its_last_message():
    """Its messages are of use without their sender; a second end changes nothing."""
    inbox = Inbox(2)
    message, end = {"type": "websocket.receive", "text": "bye"}, {"type": "websocket.disconnect", "code": 1000}
    await inbox.put(message)
    await inbox.put(end)
    await inbox.put({"type": "websocket.disconnect", "code": 1006})
    assert [await inbox.get() for _ in range(3)] == [message, end, end]


@pytest.mark.parametrize("there", [[], [1]])
async def test_a_cancelled_receive_loses_no_message(there):
    """An application may put a deadline around receive(), and is cancelled there whether it would wait or not."""
    inbox = Inbox(2)
    await put_all(inbox, there)
    with trio.CancelScope() as scope:
        scope.cancel()
        await inbox.get()
    assert scope.cancelled_caught
    await put_all(inbox, [2])
    assert [(await inbox.get())["n"] for _ in [*there, 2]] == [*there, 2]


async def test_who_only_receives_lets_others_run():
    """Messages are had without a wait; the end, which never runs out, is told once in each step of the others."""
    inbox, turns = Inbox(2), []

    async def other():
        while True:
            turns.append("other")
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        await trio.lowlevel.checkpoint()
        await put_all(inbox, [1, 2])
        turns.clear()
        assert [(await inbox.get())["n"] for _ in range(2)] == [1, 2]
        assert turns == []
        await inbox.put(LEFT)
        for _ in range(10):
            await inbox.get()
        assert len(turns) >= 9
        nursery.cancel_scope.cancel()
