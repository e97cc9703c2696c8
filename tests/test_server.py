"""The server against real sockets: clients that leave or stop reading, idle ones, and shutdown.

`serving` also sees to it that nothing is left behind.
"""

from __future__ import annotations

import contextlib
import socket

import h11
import pytest
import trio
import trio.testing
from serving import HTTP2_PREFACE, LONG, PIECE, App, read_to_end, serving, until

from trioswap.bounded import BoundedStream

# ---- answers -----------------------------------------------------------------------------


async def test_an_exception_of_the_application_is_a_500(caplog):
    """The application's own exception is logged and answered; the connection serves the next request."""
    async with serving(App()) as served:
        client = await served.client()
        await client.ask("/broken")
        assert await client.response() == (500, b"")
    assert [record.message for record in caplog.records] == ["the application failed on /broken"]


async def test_an_application_that_leaves_with_its_last_message_leaves_no_connection():
    """The application hears http.disconnect before its last send is done, and cancels it: the client sees the end."""
    async with serving(App(), keep_alive=LONG) as served:
        client = await served.client()
        await client.ask("/watched", ("connection", "close"))
        assert await client.response() == (200, b"hello")
        assert await read_to_end(client.stream) == b""


# ---- clients that stop reading ----------------------------------------------------------


async def test_a_write_without_progress_gives_up():
    """A client that stops reading loses its connection after write_stall, and nobody else notices."""
    feed, numbers = trio.open_memory_channel(0)
    app = App(numbers=numbers)
    async with serving(app, write_stall=0.3) as served:
        neighbour = await served.client()
        await neighbour.ask("/stream")
        await neighbour.next_event()
        stuck = await served.client(small_buffer=True)
        await stuck.ask("/flood")
        await app.left.wait()
        await until(lambda: served.server.open_connections == 1)
        for number in range(5):
            await feed.send(number)
            assert (await neighbour.next_event()).data == b"%d\n" % number
        await feed.aclose()
        assert isinstance(await neighbour.next_event(), h11.EndOfMessage)
        assert not (await read_to_end(stuck.stream)).endswith(b"\r\n0\r\n\r\n")


async def stall(served, app):
    """A client in the middle of `/flood` that reads nothing, once the server cannot write any more."""
    client = await served.client(small_buffer=True)
    await client.ask("/flood")
    await app.entered.wait()
    before = -1
    while app.sent > before:
        before = app.sent
        for _ in range(200):
            await trio.lowlevel.checkpoint()
    return client


@pytest.mark.parametrize("how", ["begin_shutdown", "cancel"])
async def test_shutdown_shortens_a_stall_that_has_begun(how):
    """A write that stalls already, with a long patience, gives up soon when the shutdown begins."""
    app = App()
    async with serving(app, write_stall=LONG, shutdown_write_stall=0.3) as served:
        await stall(served, app)
        if how == "cancel":
            served.running.cancel()
        else:
            served.server.begin_shutdown()
            await app.left.wait()
        await until(lambda: served.server.open_connections == 0)


async def test_a_client_that_takes_one_byte_at_a_time_cannot_hold_a_cancelled_server():
    """Progress renews the patience of a write, but not beyond the end of a cancelled run()."""
    app = App()
    async with serving(app, write_stall=LONG, shutdown_write_stall=0.3) as served:
        client = await served.client(small_buffer=True)
        await client.ask("/hurried")
        await app.entered.wait()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read_byte_by_byte, client.stream)
            served.running.cancel()
            await until(lambda: served.server.open_connections == 0)
            nursery.cancel_scope.cancel()


async def read_byte_by_byte(stream):
    with contextlib.suppress(trio.BrokenResourceError):
        while await stream.receive_some(1):
            pass


async def test_a_write_is_whole_although_its_sender_is_cancelled():
    """What the application sends after a cancelled send does not land in the middle of a chunk."""
    app = App()
    async with serving(app) as served:
        client = await served.client(small_buffer=True)
        await client.ask("/hurried")
        await client.next_event()
        received = (await client.next_event()).data
        app.release.set()
        await trio.testing.wait_all_tasks_blocked()
        while isinstance(event := await client.next_event(), h11.Data):
            received += event.data
        assert received == PIECE * 256 + b"end"


async def test_a_deaf_application_with_unread_pieces_does_not_leak_when_the_write_fails():
    """An application that only sends, behind a full inbox, is let go when its client stops reading."""
    app = App()
    async with serving(app, write_stall=0.3) as served:
        client = await served.client(small_buffer=True)
        await client.ask("/deaf", ("transfer-encoding", "chunked"), method="POST", whole=False)
        for _ in range(50):
            await client.send(h11.Data(data=b"unread"))
        await until(lambda: app.ended == 1)
        await until(lambda: served.server.open_connections == 0)


# ---- clients that leave -------------------------------------------------------------------


LEAVING = {
    "plain": b"",
    "next request behind": b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n",
    "much behind": b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n" * 1000,
}


@pytest.mark.parametrize("stage", ["serving", "shutting down"])
@pytest.mark.parametrize("behind", LEAVING)
async def test_the_application_hears_that_the_client_left(behind, stage):
    """http.disconnect comes while the request is served, whatever else the client had sent, in a shutdown too."""
    app = App()
    async with serving(app) as served:
        client = await served.client()
        await client.ask("/listen")
        await client.stream.send_all(LEAVING[behind])
        await app.entered.wait()
        if stage == "shutting down":
            served.server.begin_shutdown()
        assert not app.left.is_set()
        await client.stream.aclose()
        await app.left.wait()
        await until(lambda: served.server.open_connections == 0)


async def test_a_failed_write_ends_a_connection_that_reads_no_more():
    """Behind more bytes than are read ahead, the end of input is not seen; the next write meets it."""
    app = App()
    async with serving(app) as served:
        client = await served.client()
        await client.ask("/flood")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.stream.send_all, LEAVING["much behind"] * 100)
            await app.entered.wait()
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        await client.stream.aclose()
        await app.left.wait()
        await until(lambda: served.server.open_connections == 0)


async def test_the_application_hears_that_the_client_left_in_an_upload():
    """http.disconnect comes when the client leaves in the middle of a body of many pieces."""
    app = App()
    async with serving(app) as served:
        client = await served.client()
        await client.ask("/listen", ("transfer-encoding", "chunked"), method="POST", whole=False)
        for _ in range(50):
            await client.send(h11.Data(data=b"piece"))
        await client.stream.aclose()
        await app.left.wait()


async def test_a_flood_of_further_requests_does_not_hide_that_the_client_left():
    """However much is sent behind a request: http.disconnect comes, and is not stuck behind it."""
    app = App()
    async with serving(app) as served:
        client = await served.client()
        await client.ask("/listen")
        await app.entered.wait()
        for _ in range(64):
            await client.stream.send_all(b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n" * 256)
        await client.stream.aclose()
        await app.left.wait()


async def test_after_a_flood_the_connection_closes():
    """The request being served is answered, and what was kept behind it; what was dropped is never guessed at."""
    app = App()
    async with serving(app) as served:
        client = await served.client()
        await client.ask("/wait")
        await app.entered.wait()
        for _ in range(64):
            await client.stream.send_all(b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n" * 256)
        app.release.set()
        answers = await read_to_end(client.stream)

    assert 1 <= answers.count(b"HTTP/1.1 200") == answers.count(b"\r\n\r\nhello") < 64 * 256
    assert answers.count(b"HTTP/1.1") == answers.count(b"HTTP/1.1 200")


async def test_a_reset_reaches_the_application():
    """A connection that is reset rather than closed is noticed as well."""
    app = App()
    async with serving(app) as served:
        client = await served.client()
        await client.ask("/listen")
        await app.entered.wait()
        client.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        await client.stream.aclose()
        await app.left.wait()


async def test_a_client_that_only_closes_its_sending_side_is_answered():
    """A request and the end of input in one go is still a request."""
    async with serving(App()) as served:
        for _ in range(20):
            stream = await served.connect()
            await stream.send_all(b"GET /hello HTTP/1.0\r\n\r\n")
            await stream.send_eof()
            assert (await read_to_end(stream)).endswith(b"\r\n\r\nhello")


async def test_the_heads_of_request_and_response():
    """Request heads may be large; responses have a date and do not say what serves."""
    async with serving(App()) as served:
        client = await served.client()
        head = client.parser.send(h11.Request(method="GET", target="/hello", headers=[("host", "x" * 50_000)]))
        await client.stream.send_all(head[:40_000])
        await trio.testing.wait_all_tasks_blocked()
        await client.stream.send_all(head[40_000:])
        await client.send(h11.EndOfMessage())
        response = await client.next_event()
        assert response.status_code == 200
        assert [name for name, _ in response.headers] == [b"content-length", b"date"]


@pytest.mark.parametrize("path", ["/hello", "/cut"])
async def test_head_and_first_piece_are_one_write(path, monkeypatch):
    """And so, mostly, one packet and one system call for a small answer."""
    writes, send_all = [], BoundedStream.send_all

    async def spy(self, data):
        writes.append(bytes(data))
        await send_all(self, data)

    monkeypatch.setattr(BoundedStream, "send_all", spy)
    async with serving(App()) as served:
        client = await served.client()
        await client.ask(path)
        await client.next_event()
        said = (await client.next_event()).data
    assert len(writes) == 1
    assert writes[0].startswith(b"HTTP/1.1 200")
    assert said in writes[0]


async def test_the_head_before_an_empty_piece_is_sent():
    """An application can say that it was asked before it has anything to say; the pieces that follow come singly."""
    feed, numbers = trio.open_memory_channel(0)
    async with serving(App(numbers=numbers)) as served:
        client = await served.client()
        await client.ask("/stream")
        assert (await client.next_event()).status_code == 200
        for number in range(3):
            await feed.send(number)
            assert (await client.next_event()).data == b"%d\n" % number
        await feed.aclose()
        assert isinstance(await client.next_event(), h11.EndOfMessage)


async def test_a_head_without_a_body_is_broken_off():
    """It is sent for what it is worth; nobody can take the answer for a whole one."""
    async with serving(App()) as served:
        client = await served.client()
        await client.ask("/head-only")
        assert (await client.next_event()).status_code == 200
        with pytest.raises(h11.RemoteProtocolError, match="without sending complete message body"):
            await client.next_event()


async def test_pipelined_requests_are_answered_in_order():
    """What was read ahead of a busy parser is parsed when its turn comes."""
    async with serving(App()) as served:
        stream = await served.connect()
        await stream.send_all(b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n" * 99)
        await stream.send_all(b"GET /hello HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert (await read_to_end(stream)).count(b"\r\n\r\nhello") == 100


# ---- answers before the end of the upload -----------------------------------------------


async def test_an_early_answer_reaches_a_client_that_is_still_uploading():
    """The client may send on, reads the whole answer, and then the end; no task is left."""
    async with serving(App()) as served:
        client = await served.client()
        await client.ask("/early", ("transfer-encoding", "chunked"), method="POST", whole=False)
        for _ in range(64):
            await client.send(h11.Data(data=PIECE))
        assert await client.response() == (413, b"large")
        await client.stream.aclose()
        await until(lambda: served.server.open_connections == 0)


async def test_an_upload_that_never_ends_is_cut_after_an_early_answer():
    """A client that neither finishes its upload nor closes is closed after write_stall."""
    async with serving(App(), write_stall=0.3) as served:
        client = await served.client()
        await client.ask("/early", ("transfer-encoding", "chunked"), method="POST", whole=False)
        await client.send(h11.Data(data=PIECE))
        assert await client.response() == (413, b"large")
        await until(lambda: served.server.open_connections == 0)


# ---- answers cut short ------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/cut", "/cut-sized"])
async def test_a_response_cut_short_has_no_clean_end(path):
    """The application returned in the middle: what it sent arrives, the terminator does not."""
    async with serving(App()) as served:
        client = await served.client()
        await client.ask(path)
        await client.next_event()
        assert (await client.next_event()).data == b"half of the an"
        with pytest.raises(h11.RemoteProtocolError, match="without sending complete message body"):
            await client.next_event()


# ---- idle connections ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "sent", [b"", b"GET /hello HTTP/1.1\r\nHost", HTTP2_PREFACE], ids=["nothing", "half a head", "preface"]
)
async def test_a_connection_without_a_request_is_closed(sent):
    """It ends after keep_alive seconds, whatever of a request was sent."""
    async with serving(App(), keep_alive=0.3) as served:
        stream = await served.connect()
        await stream.send_all(sent)
        await read_to_end(stream)
        await until(lambda: served.server.open_connections == 0)


async def test_a_connection_is_closed_after_its_last_request():
    """The idle timeout runs again when a request was served, not while it is."""
    app = App()
    async with serving(app, keep_alive=0.3) as served:
        idle = await served.connect()
        client = await served.client()
        await client.ask("/wait")
        await app.entered.wait()
        await read_to_end(idle)  # keep_alive has passed for both
        app.release.set()
        assert await client.response() == (200, b"hello")
        assert await read_to_end(client.stream) == b""


# ---- shutdown ----------------------------------------------------------------------------


async def test_shutdown_closes_idle_connections_and_lets_requests_finish():
    """Idle connections end at once, a request is answered and its connection closed, nobody new is accepted."""
    app = App()
    async with serving(app, keep_alive=LONG) as served:
        idle, busy = await served.client(), await served.client()
        await idle.ask("/hello")
        assert await idle.response() == (200, b"hello")
        await busy.ask("/wait")
        await app.entered.wait()
        served.server.begin_shutdown()
        assert await read_to_end(idle.stream) == b""
        await until(lambda: served.server.open_connections == 1)
        with pytest.raises(ConnectionRefusedError):
            await served.connect()
        assert repr(served.server) == "<HttpServer shutting down, 1 open connections>"
        app.release.set()
        assert await busy.response() == (200, b"hello")
        assert await read_to_end(busy.stream) == b""


async def test_shutdown_with_a_pipelined_request_behind():
    """The request being served is answered, the one behind it is not begun, and the connection ends."""
    app = App()
    async with serving(app) as served:
        stream = await served.connect()
        await stream.send_all(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n" * 2)
        await app.entered.wait()
        served.server.begin_shutdown()
        app.release.set()
        assert (await read_to_end(stream)).count(b"hello") == 1


# ---- cancellation --------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["serving", "shutting down"])
async def test_a_cancelled_server_ends_with_everything_it_served(stage):
    """Busy, stalled, uploading, half-asked and idle connections all end when run() is cancelled."""
    app = App()
    async with serving(app, write_stall=LONG, shutdown_write_stall=0.3, keep_alive=LONG) as served:
        stalled = await stall(served, app)
        busy, asking, idle, uploading = [await served.client() for _ in range(4)]
        await busy.ask("/wait")
        await busy.stream.send_all(LEAVING["much behind"])
        await asking.stream.send_all(b"GET /hel")
        await idle.ask("/hello")
        assert await idle.response() == (200, b"hello")
        await uploading.ask("/early", ("transfer-encoding", "chunked"), method="POST", whole=False)
        assert await uploading.response() == (413, b"large")
        if stage == "shutting down":
            served.server.begin_shutdown()
        served.running.cancel()
        await until(lambda: served.server.open_connections == 0)
        for client in (busy, asking, idle):
            assert await read_to_end(client.stream) == b""
        assert not (await read_to_end(stalled.stream)).endswith(b"\r\n0\r\n\r\n")
