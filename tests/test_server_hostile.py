"""Bytes that end the whole process under Hypercorn 0.18's own TCPServer: here they end a connection.

Each input was seen to do that; `caplog` counts that it still reaches the code that fails.
"""

from __future__ import annotations

import logging

import h11
import hpack
import pytest
import trio
from hyperframe.frame import DataFrame, HeadersFrame, PingFrame, PriorityFrame
from serving import HTTP2_PREFACE, LONG, App, read_to_end, receive_or_nothing, serving


def upgrade(*fields, behind=b""):
    lines = [
        b"GET /ws HTTP/1.1",
        b"Host: x",
        b"Connection: Upgrade",
        b"Upgrade: websocket",
        b"Sec-WebSocket-Version: 13",
        b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
        *fields,
    ]
    return [b"\r\n".join(lines) + b"\r\n\r\n" + behind]


def http2(*frames):
    return HTTP2_PREFACE + b"".join(f.serialize() for f in frames)


def request(method=b"GET", path=b"/hello", *, flags=("END_HEADERS", "END_STREAM")):
    fields = [(b":method", method), (b":scheme", b"http"), (b":path", path), (b":authority", b"x")]
    return HeadersFrame(1, hpack.Encoder().encode(fields), flags=flags)


CONNECT = HeadersFrame(
    1, hpack.Encoder().encode([(b":method", b"CONNECT"), (b":authority", b"x")]), flags=("END_HEADERS",)
)
PING = b"are you?"
CLOSE = b"\x88\x80\0\0\0\0"  # a frame that closes a websocket
# Name -> what the client sends; between two parts it waits for the answer to the first.
HOSTILE = {
    "byte-behind-upgrade": upgrade(behind=b"\x81"),
    "websocket-protocol-not-ascii": upgrade(b"Sec-WebSocket-Protocol: \xff"),
    "websocket-extensions-not-ascii": upgrade(b"Sec-WebSocket-Extensions: \xff", behind=CLOSE),
    "deflate-window-no-number": upgrade(
        b"Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits=x", behind=CLOSE
    ),
    "path-not-ascii": [http2(request(path=b"/\xff"))],
    "method-not-ascii": [http2(request(method=b"\xff"))],
    "connect-without-path": [http2(CONNECT)],
    "data-after-early-answer": [
        http2(request(b"POST", flags=("END_HEADERS",))),
        DataFrame(1, b"x").serialize() + PingFrame(0, PING).serialize(),
    ],
    "priorities-of-1500-idle-streams": [http2(*(PriorityFrame(2 * n + 3, stream_weight=1) for n in range(1500)))],
}
# How many of 20 break the protocol code, if not all.
BREAKING = {
    "byte-behind-upgrade": range(21),  # whether the application accepts before the byte is refused is a race
    "websocket-extensions-not-ascii": range(21),  # nobody reads them; what stands behind is the first race again
    "deflate-window-no-number": range(21),
    "data-after-early-answer": [0],  # the client does nothing wrong, so its connection lives on
}


async def provoke(served, parts):
    """Send *parts* and wait until the server has dealt with them."""
    async with await served.connect() as stream:
        received = b""
        for number, part in enumerate(parts):
            while number and b"hello" not in received:
                received += await stream.receive_some()
            await stream.send_all(part)
        while PING not in received and (data := await receive_or_nothing(stream)):
            received += data


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_client_ends_only_its_own_connection(name, caplog):
    """Bytes that break the protocol code cost their connection; streams of others go on, new requests are served."""
    caplog.set_level(logging.WARNING)
    feed, numbers = trio.open_memory_channel(0)
    async with serving(App(numbers=numbers)) as served:
        neighbour = await served.client()
        await neighbour.ask("/stream")
        await neighbour.next_event()
        for number in range(20):
            await provoke(served, HOSTILE[name])
            await feed.send(number)
            assert (await neighbour.next_event()).data == b"%d\n" % number
        await feed.aclose()
        assert isinstance(await neighbour.next_event(), h11.EndOfMessage)
        fresh = await served.client()
        await fresh.ask("/hello")
        assert await fresh.response() == (200, b"hello")
    errors = [record for record in caplog.records if "error in its protocol" in record.message]
    assert len(errors) in BREAKING.get(name, [20])


async def test_a_refused_websocket_is_closed():
    """A handshake that is no good is answered with 400, and the connection ends."""
    async with serving(App(), keep_alive=LONG) as served:
        stream = await served.connect()
        await stream.send_all(upgrade()[0].replace(b"Version: 13", b"Version: 12"))
        assert (await read_to_end(stream)).startswith(b"HTTP/1.1 400 ")
