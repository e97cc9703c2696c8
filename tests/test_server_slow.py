"""Clients that send a request slowly, or only half of it: heads and bodies have a bound, those of others go on.

`serving` also sees to it that nothing is left behind.
"""

from __future__ import annotations

import attrs
import h2.events
import h11
import pytest
import trio
import trio.testing
from serving import LONG, PIECE, App, read_to_end, serving, until

from trioswap.bounded import Inbox
from trioswap.server.applications import MIN_BODY_RATE, Upload

HEAD = b"GET /hello HTTP/1.1\r\nHost: x\r\nX-Padding: "


@attrs.define(eq=False)
class Reader(App):
    """An application that reads whole bodies, as ours does."""

    gave_up: int = 0
    """Times that it was told that the client had left."""
    received: int = 0

    async def read(self, receive, send):
        if await self.whole(receive):
            await self.hello(receive, send)

    async def answer_first(self, receive, send):
        await self.begin(send)
        await self.whole(receive)

    async def begin(self, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})

    async def whole(self, receive):
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.gave_up += 1
                return False
            self.received += len(message["body"])
            more = message["more_body"]
        return True


async def dribble(stream):
    """Send a byte again and again, as long as it is taken."""
    try:
        while True:
            await stream.send_all(b"x")
            await trio.testing.wait_all_tasks_blocked(0.01)
    except trio.BrokenResourceError:
        pass


# ---- heads ----------------------------------------------------------------------------------


async def test_a_head_that_dribbles_in_is_refused():
    """Each byte is progress, but the time of a head counts from its first; the answer is 408, and the end."""
    async with serving(App(), head=0.3, keep_alive=LONG) as served:
        slow, other = await served.client(), await served.client()
        await slow.stream.send_all(HEAD)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(dribble, slow.stream)
            slow.parser.send(h11.Request(method="GET", target="/", headers=[("host", "x")]))
            response = await slow.next_event()
            await other.ask("/hello")
            assert await other.response() == (200, b"hello")
            await until(lambda: served.server.open_connections == 1)
            nursery.cancel_scope.cancel()
    assert (response.status_code, dict(response.headers)[b"connection"]) == (408, b"close")


async def test_an_idle_connection_is_not_told_408():
    """Nothing was asked, so nothing is answered: pooled clients would take it for an answer to their next request."""
    async with serving(App(), head=LONG, keep_alive=0.3) as served:
        stream = await served.connect()
        assert await read_to_end(stream) == b""


async def test_a_client_that_leaves_in_a_head_is_not_told_408():
    """It has no time left to lose."""
    async with serving(App(), keep_alive=LONG) as served:
        stream = await served.connect()
        await stream.send_all(HEAD)
        await trio.testing.wait_all_tasks_blocked()
        await stream.send_eof()
        assert await read_to_end(stream) == b""


async def test_a_second_head_has_its_own_time():
    """The one behind an answered request counts from its own first byte, also when that came with the first."""
    app = App()
    async with serving(app, head=0.3, keep_alive=LONG) as served:
        client, other = await served.client(), await served.connect()
        await client.stream.send_all(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n" + HEAD)
        await app.entered.wait()
        await other.send_all(HEAD)
        await read_to_end(other)  # the time of a head has passed: it does not count while the first is served
        app.release.set()
        client.parser.send(h11.Request(method="GET", target="/", headers=[("host", "x")]))
        client.parser.send(h11.EndOfMessage())
        assert await client.response() == (200, b"hello")
        client.parser.start_next_cycle()
        client.parser.send(h11.Request(method="GET", target="/", headers=[("host", "x")]))
        assert (await client.next_event()).status_code == 408


async def test_a_slow_head_is_forgotten_once_it_is_whole():
    """The connection is idle behind its answer as any other, and ends as such."""
    async with serving(App(), head=LONG, keep_alive=0.3) as served:
        client = await served.client()
        await client.stream.send_all(HEAD)
        await trio.testing.wait_all_tasks_blocked()
        client.parser.send(h11.Request(method="GET", target="/hello", headers=[("host", "x")]))
        client.parser.send(h11.EndOfMessage())
        await client.stream.send_all(b"x\r\n\r\n")
        assert await client.response() == (200, b"hello")
        assert await read_to_end(client.stream) == b""


async def test_half_a_head_does_not_hold_up_a_shutdown():
    """The connection is idle: it ends at once, without an answer."""
    async with serving(App(), head=LONG, keep_alive=LONG) as served:
        stream = await served.connect()
        await stream.send_all(HEAD)
        await until(lambda: served.server.open_connections == 1)
        await trio.testing.wait_all_tasks_blocked()
        served.server.begin_shutdown()
        assert await read_to_end(stream) == b""


# ---- bodies -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", ["nothing", "some", "a dribble"])
async def test_a_body_without_progress_is_refused(sent):
    """The application that waits for it is let go, and the client is told."""
    app = Reader()
    async with serving(app, body_stall=0.3, write_stall=0.3) as served:
        client = await served.client()
        await client.ask("/read", ("content-length", "1000000"), method="POST", whole=False)
        async with trio.open_nursery() as nursery:
            if sent == "some":
                await client.stream.send_all(b"some")
            if sent == "a dribble":
                nursery.start_soon(dribble, client.stream)
            response = await client.next_event()
            await until(lambda: served.server.open_connections == 0)
            nursery.cancel_scope.cancel()
    assert response.status_code == 408
    assert app.gave_up == 1


async def test_a_body_without_progress_is_refused_on_http2():
    """There the stream ends with the 408; those beside it go on."""
    app = Reader()
    async with serving(app, body_stall=0.3) as served:
        client = await served.client2()
        beside = await client.ask("/wait")
        slow = await client.ask("/read", method="POST", whole=False)
        refused = await client.expect(h2.events.ResponseReceived, slow)
        assert dict(refused.headers)[b":status"] == b"408"
        await client.expect(h2.events.StreamEnded, slow)
        app.release.set()
        await client.expect(h2.events.StreamEnded, beside)
        await client.stream.aclose()


async def test_a_body_that_stalls_behind_the_answer_cuts_it_short(caplog):
    """An answer that has begun cannot become a 408: it ends abnormally."""
    app = Reader()
    async with serving(app, body_stall=0.3, write_stall=0.3) as served:
        client = await served.client()
        await client.ask("/answer_first", ("content-length", "1000000"), method="POST", whole=False)
        assert (await client.next_event()).status_code == 200
        assert (await client.next_event()).data == b"half"
        with pytest.raises(h11.RemoteProtocolError, match="without sending complete message body"):
            await client.next_event()
    assert app.gave_up == 1
    assert not caplog.records


async def test_a_whole_body_has_no_such_bound():
    """Who has sent everything may wait for the answer as long as that takes, and read as `receive` what is left."""
    app = Reader()
    async with serving(app, body_stall=0.3, write_stall=0.3) as served:
        client, uploader, slow = [await served.client() for _ in range(3)]
        await client.ask("/listen")
        await uploader.ask("/wait", ("content-length", "4"), method="POST", whole=False)
        await uploader.send(h11.Data(data=b"body"))
        await slow.ask("/read", ("content-length", "4"), method="POST", whole=False)
        assert (await slow.response())[0] == 408  # the time of a body has passed for all
        assert not app.left.is_set()
        app.release.set()
        assert await uploader.response() == (200, b"hello")
        await client.stream.aclose()
        await app.left.wait()


async def test_a_large_body_arrives_whole():
    """The bound is of progress, not of the whole."""
    app = Reader()
    async with serving(app) as served:
        client = await served.client()
        await client.ask("/read", ("content-length", str(100 * len(PIECE))), method="POST", whole=False)
        for _ in range(100):
            await client.send(h11.Data(data=PIECE))
        await client.send(h11.EndOfMessage())
        assert await client.response() == (200, b"hello")
    assert app.received == 100 * len(PIECE)


# ---- the time in hand, on a clock of its own -----------------------------------------------------


async def give(inbox, *pieces):
    """Put (seconds to wait before, bytes) into *inbox*."""
    for seconds, size in pieces:
        await trio.sleep(seconds)
        await inbox.put({"type": "http.request", "body": bytes(size), "more_body": True})


async def survives(*pieces, stall=30):
    """Whether an application that does nothing but wait gets all of *pieces*."""
    inbox = Inbox(100)
    upload = Upload(inbox, stall)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(give, inbox, *pieces)
        got = [(await upload.receive())["type"] for _ in pieces]
        nursery.cancel_scope.cancel()
    assert upload.late == ("http.disconnect" in got)
    return not upload.late


ENOUGH = 30 * MIN_BODY_RATE


@pytest.mark.parametrize(
    ("pieces", "whole"),
    [
        ([(29, 1)], True),
        ([(31, 1)], False),
        ([(29, 1)] * 2, False),  # a byte buys 2 ms
        ([(20, 10 * MIN_BODY_RATE), (19, 1)], True),
        ([(20, 10 * MIN_BODY_RATE), (21, 1)], False),
        ([(29, ENOUGH)] * 50, True),
        ([(1, MIN_BODY_RATE)] * 500, True),
        ([(1, MIN_BODY_RATE // 2)] * 70, False),
        ([(0, 1000 * ENOUGH), (31, 1)], False),  # no more is kept in hand than at the beginning
    ],
)
async def test_what_a_client_has_in_hand(pieces, whole, autojump_clock):
    """Waiting spends seconds, bytes bring them back, up to what there was."""
    assert await survives(*pieces) == whole


async def test_a_slow_application_costs_the_client_nothing(autojump_clock):
    """Only waiting for the client counts."""
    inbox = Inbox(100)
    upload = Upload(inbox, 30)
    for _ in range(10):
        await inbox.put({"type": "http.request", "body": b"x", "more_body": True})
        await trio.sleep(100)
        assert (await upload.receive())["body"] == b"x"


async def test_a_cancelled_wait_counts(autojump_clock):
    """Who waits in small portions waits all the same."""
    upload = Upload(Inbox(100), 30)
    for _ in range(3):
        with trio.move_on_after(9):
            await upload.receive()
    with trio.fail_after(4):
        assert (await upload.receive())["type"] == "http.disconnect"
    assert upload.late
