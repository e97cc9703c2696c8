"""HTTP/2 streams against a real socket: none waits for ever, none ends cleanly that was cut short."""

from __future__ import annotations

import h2.errors
import h2.events
import pytest
import trio
from serving import LONG, App, read_to_end, serving, until


async def test_a_response_cut_short_resets_its_stream():
    """On HTTP/2 the stream is reset behind what was sent, and the connection's other streams go on."""
    async with serving(App()) as served:
        client = await served.client2()
        cut = await client.ask("/cut")
        assert (await client.expect(h2.events.DataReceived, cut)).data == b"half of the an"
        assert (await client.expect(h2.events.StreamReset, cut)).error_code == h2.errors.ErrorCodes.INTERNAL_ERROR
        whole = await client.ask("/hello")
        assert (await client.expect(h2.events.DataReceived, whole)).data == b"hello"
        await client.expect(h2.events.StreamEnded, whole)
        await client.stream.aclose()


async def test_shutdown_lets_an_http2_stream_finish():
    """The stream being served ends; then the client is told to go away and the connection ends."""
    app = App()
    async with serving(app) as served:
        idle, busy = await served.client2(), await served.client2()
        waiting = await busy.ask("/wait")
        await app.entered.wait()
        served.server.begin_shutdown()
        await read_to_end(idle.stream)
        app.release.set()
        await busy.expect(h2.events.StreamEnded, waiting)
        await busy.expect(h2.events.ConnectionTerminated)
        assert await read_to_end(busy.stream) == b""


async def test_an_upload_answered_early_spares_the_other_streams():
    """Data for a stream that was answered is dropped; a stream beside it is served."""
    app = App()
    async with serving(app) as served:
        client = await served.client2()
        waiting = await client.ask("/wait")
        early = await client.ask("/early", method="POST", whole=False)
        await client.expect(h2.events.StreamEnded, early)
        client.parser.send_data(early, b"unwanted")
        await client.flush()
        app.release.set()
        await client.expect(h2.events.StreamEnded, waiting)
        await client.stream.aclose()


async def flooded2(served, app):
    """An HTTP/2 client in the middle of `/flood` that opens no window, once the window is full."""
    client = await served.client2()
    flood = await client.ask("/flood")
    received = 0
    while received < 65535:  # the initial window, RFC 9113, 6.9.2
        received += len((await client.expect(h2.events.DataReceived, flood)).data)
    return client, flood


async def test_a_shut_window_resets_the_stream():
    """A client that opens no window loses the stream after write_stall, not the connection."""
    app = App()
    async with serving(app, write_stall=0.3) as served:
        client, flood = await flooded2(served, app)
        assert (await client.expect(h2.events.StreamReset, flood)).error_code == h2.errors.ErrorCodes.CANCEL
        await app.left.wait()
        client.parser.increment_flow_control_window(65535)
        hello = await client.ask("/hello")
        await client.expect(h2.events.StreamEnded, hello)
        await client.stream.aclose()


async def test_a_shut_window_stops_the_application():
    """What the client does not take is not kept for it without end: the application's send waits."""
    app = App()
    async with serving(app) as served:
        client, _ = await flooded2(served, app)
        for _ in range(500):
            await trio.lowlevel.checkpoint()
        assert app.sent <= 2
        await client.stream.aclose()


async def test_a_shut_window_does_not_hold_a_head():
    """The status is no part of what windows bound (RFC 9113, 5.2.1), however large the piece is that follows it."""
    app = App()
    async with serving(app, write_stall=LONG) as served:
        client, _ = await flooded2(served, app)
        other = await client.ask("/flood")
        await client.expect(h2.events.ResponseReceived, other)
        await client.stream.aclose()


@pytest.mark.parametrize("path", ["/flood", "/deaf"])
async def test_leaving_with_a_shut_window_frees_the_application(path):
    """Who waits for a window is let go when the client leaves, even if it never looks at receive()."""
    app = App()
    async with serving(app, write_stall=LONG) as served:
        client = await served.client2()
        stream_id = await client.ask(path)
        await client.expect(h2.events.DataReceived, stream_id)
        await client.stream.aclose()
        await until(lambda: app.ended == 1)
        await until(lambda: served.server.open_connections == 0)


async def test_a_client_that_resets_its_stream_has_left():
    """A stream reset by the client is an http.disconnect."""
    app = App()
    async with serving(app) as served:
        client = await served.client2()
        stream_id = await client.ask("/listen")
        await app.entered.wait()
        client.parser.reset_stream(stream_id)
        await client.flush()
        await app.left.wait()
        await client.stream.aclose()
