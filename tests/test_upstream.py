"""The client toward model servers, against real sockets whose other end says awkward things."""

from __future__ import annotations

import os
import select
import socket
from pathlib import Path

import attrs
import pytest
import trio
from clocks import guarded, passes
from origins import CHUNKED, GUARD, HUGE, OK, Server, ask, closing_after, saying
from serving import until
from trio.testing import wait_all_tasks_blocked

from trioswap import connection
from trioswap.config.parts import TimeoutConfig
from trioswap.errors import BadRequest, UpstreamFailed, UpstreamTimedOut
from trioswap.spool import Spool
from trioswap.upstream import Upstream, end_to_end


@pytest.fixture
async def serve(nursery):
    """Start a server; gives it and an Upstream that talks to it."""
    made = []

    async def start(script, base="", **timeouts):
        server = await Server(script).start(nursery)
        made.append(Upstream("m", server.url + base, TimeoutConfig(**timeouts)))
        return server, made[-1]

    with guarded():
        yield start
    for up in made:
        up.close()


def open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


# ---- what the server is sent ----


async def seen(serve, *args, base=""):
    """The request as the server got it: head lines and body."""
    got = []

    async def script(peer):
        got.append(await peer.request())
        await peer.say(OK)

    server, up = await serve(script, base)
    assert await ask(up, *args) == (200, [(b"content-length", b"2")], b"ok")
    head, _, body = got[0].partition(b"\r\n\r\n")
    return head.replace(b":%d" % server.port, b":PORT").split(b"\r\n"), body


async def test_a_request_arrives_as_it_was_given(serve):
    """Method, target, headers in their order and writing, and body reach the server; the length is ours."""
    headers = [(b"Host", b"client.example"), (b"X-One", b"1"), (b"x-two", b"2"), (b"X-One", b"3")]
    lines, body = await seen(serve, "POST", b"/v1/chat?x=%20&y", headers, b'{"a": 1}')
    assert lines == [
        b"POST /v1/chat?x=%20&y HTTP/1.1",
        b"Host: client.example",
        b"X-One: 1",
        b"x-two: 2",
        b"X-One: 3",
        b"content-length: 8",
    ]
    assert body == b'{"a": 1}'


async def test_fields_of_the_client_s_connection_stay_behind(serve):
    """Hop-by-hop fields, those that Connection names, and wrong framing do not reach the server."""
    headers = [
        (b"Connection", b"close, X-Private"),
        (b"X-Private", b"1"),
        (b"Keep-Alive", b"timeout=5"),
        (b"Proxy-Connection", b"keep-alive"),
        (b"Proxy-Authorization", b"Basic x"),
        (b"TE", b"trailers"),
        (b"Trailer", b"x"),
        (b"Transfer-Encoding", b"chunked"),
        (b"Upgrade", b"websocket"),
        (b"Content-Length", b"999"),
        (b"Expect", b"100-continue"),
        (b"Authorization", b"Bearer x"),
    ]
    lines, _ = await seen(serve, "POST", b"/", headers, b"hi")
    assert lines == [b"POST / HTTP/1.1", b"host: 127.0.0.1:PORT", b"Authorization: Bearer x", b"content-length: 2"]


@pytest.mark.parametrize(
    ("base", "target", "expected"),
    [
        ("", b"/v1/models", b"/v1/models"),
        ("/api", b"/v1/models?x=1", b"/api/v1/models?x=1"),
        ("/api/", b"/v1/models", b"/api/v1/models"),
        ("/api?key=1", b"/v1/models", b"/api/v1/models?key=1"),
        ("/api?key=1", b"/v1/models?x=1?", b"/api/v1/models?key=1&x=1?"),
    ],
)
async def test_path_and_query_of_the_base_come_first(serve, base, target, expected):
    """The base URL's path is put before the request's, and its query before the request's."""
    lines, _ = await seen(serve, "GET", target, base=base)
    assert lines[0] == b"GET " + expected + b" HTTP/1.1"


@pytest.mark.parametrize(
    ("method", "target", "headers"),
    [
        ("GET", b"/a b", []),
        ("GET", b"/\xc3\xa9", []),
        ("GET", b"", []),
        ("GET", b"/", [(b"x", b"a\r\nb: c")]),
        ("GET", b"/", [(b"host", b"a"), (b"host", b"b")]),
        ("G T", b"/", []),
        ("CONNECT", b"/", []),
    ],
)
async def test_what_http_1_1_cannot_say_is_the_client_s_fault(serve, method, target, headers):
    """A request that another protocol allowed and HTTP/1.1 does not is refused before anything is sent."""
    server, up = await serve(saying(OK))
    with pytest.raises(BadRequest):
        await ask(up, method, target, headers)
    await wait_all_tasks_blocked()
    assert server.connections == 0


def test_end_to_end_keeps_the_rest():
    """Repeated fields and their order survive; names are matched whatever their letters."""
    headers = [(b"Set-Cookie", b"a"), (b"CONNECTION", b"Foo"), (b"foo", b"1"), (b"set-cookie", b"b")]
    assert end_to_end(headers) == [(b"Set-Cookie", b"a"), (b"set-cookie", b"b")]


# ---- what comes back ----


async def test_fields_of_the_server_s_connection_stay_behind(serve):
    """The answer's hop-by-hop fields and those it names are removed, repeated ones are kept."""
    answer = (
        b"HTTP/1.1 201 Created\r\nConnection: close, x-hop\r\nX-Hop: 1\r\nKeep-Alive: timeout=5\r\nUpgrade: h2c\r\n"
        b"Set-Cookie: a\r\nSet-Cookie: b\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    )
    _, up = await serve(saying(answer))
    assert await ask(up) == (201, [(b"set-cookie", b"a"), (b"set-cookie", b"b")], b"")
    assert up.idle == 0


async def test_a_head_may_come_in_single_bytes(serve):
    """However slowly the head comes, it is one head."""

    async def script(peer):
        await peer.request()
        for byte in OK:
            await peer.say(bytes([byte]))
        await peer.gone()

    _, up = await serve(script)
    assert (await ask(up))[2] == b"ok"
    assert up.idle == 1


@pytest.mark.parametrize(
    ("method", "answer"),
    [
        ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n"),
        ("GET", b"HTTP/1.1 204 No Content\r\n\r\n"),
        ("GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 500\r\n\r\n"),
    ],
)
@pytest.mark.parametrize("read", [True, False])
async def test_answers_without_a_body(serve, method, answer, read):
    """No body is waited for, and the connection serves again whether the body was asked for or not."""
    server, up = await serve(saying(answer, OK))
    async with up.request(method, b"/", [], b"") as response:
        if read:
            assert [chunk async for chunk in response.chunks()] == []
    assert await ask(up) == (200, [(b"content-length", b"2")], b"ok")
    assert server.connections == 1


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
async def test_a_body_may_end_with_the_connection(serve, version):
    """Without a length the body is what comes until the server closes; such a connection is not kept."""
    _, up = await serve(closing_after(b"HTTP/%b 200 OK\r\n\r\nall of it" % version))
    assert await ask(up) == (200, [], b"all of it")
    assert up.idle == 0


async def test_one_read_is_one_piece(serve):
    """HTTP chunks that came together are handed on together, and nothing is held back for more to come."""
    more = trio.Event()

    async def script(peer):
        await peer.request()
        await peer.say(CHUNKED + b"1\r\na\r\n1\r\nb\r\n")
        await more.wait()
        await peer.say(b"1\r\nc\r\n2;ext=1\r\nde\r\n0\r\nTrailer: x\r\n\r\n")
        await peer.gone()

    _, up = await serve(script)
    async with up.request("GET", b"/", [], b"") as response:
        pieces = response.chunks()
        assert await anext(pieces) == b"ab"
        more.set()
        assert await anext(pieces) == b"cde"
        with pytest.raises(StopAsyncIteration):
            await anext(pieces)
    assert up.idle == 1


async def test_a_long_body_comes_whole(serve):
    """A body of many reads arrives unchanged, in pieces no larger than a read."""
    body = bytes(range(256)) * 40_000
    _, up = await serve(saying(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body))
    async with up.request("GET", b"/", [], b"") as response:
        pieces = [piece async for piece in response.chunks()]
    assert b"".join(pieces) == body
    assert max(map(len, pieces)) <= connection.READ_SIZE


async def test_a_long_head_is_legal(serve):
    """A head of 200 KiB is passed on."""
    _, up = await serve(saying(OK.replace(b"\r\n\r\n", b"\r\nX-Debug: " + b"d" * 200 * 1024 + b"\r\n\r\n")))
    _, headers, body = await ask(up)
    assert len(headers[1][1]) == 200 * 1024
    assert body == b"ok"


# ---- what goes wrong ----


@pytest.mark.parametrize(
    ("answer", "before"),
    [
        (b"", True),
        (b"HTTP/1.1 200 OK\r\nContent-", False),
        (b"HTTP/1.1 100 Continue\r\n\r\n", False),
        (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", False),
        (b"\x16\x03\x01\x00", False),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n", False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", False),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 300 * 1024, False),
    ],
)
async def test_no_answer_is_an_error_that_says_whether_a_byte_came(serve, answer, before):
    """A fresh connection that yields no proper head fails once, is not tried again, and tells if it may be."""
    server, up = await serve(closing_after(answer))
    with pytest.raises(UpstreamFailed) as caught:
        await ask(up)
    assert caught.value.before_first_byte is before
    assert caught.value.model == "m"
    assert server.connections == 1


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf",
        CHUNKED + b"4\r\nhalf\r\n",
        CHUNKED + b"8\r\nhalf",
        CHUNKED + b"4\r\nhalf\r\n0\r\n",
        CHUNKED + b"4\r\nhalf",
    ],
)
async def test_a_broken_off_body_is_not_taken_for_a_whole_one(serve, answer):
    """A body shorter than announced is handed on and then ends in an error."""
    _, up = await serve(closing_after(answer))
    async with up.request("GET", b"/", [], b"") as response:
        pieces, got = response.chunks(), b""
        with pytest.raises(UpstreamFailed) as caught:  # noqa: PT012 - how many reads it takes is the kernel's affair
            while True:
                got += await anext(pieces)
    assert got == b"half"
    assert caught.value.before_first_byte is False
    assert up.idle == 0


async def test_garbage_between_chunks_is_an_error(serve):
    """What is no chunk is not handed on as one."""
    _, up = await serve(saying(CHUNKED + b"not a length\r\n"))
    with pytest.raises(UpstreamFailed, match="illegal chunk header"):
        await ask(up)


async def test_nobody_listens():
    """A refused connection is an error before the first byte, and says so."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(UpstreamFailed, match="connection refused") as caught:
        await ask(Upstream("m", f"http://127.0.0.1:{port}"))
    assert caught.value.before_first_byte is True


@pytest.fixture
async def full_port():
    """A port whose queue of connections is full: who connects to it waits."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        waiting = []
        try:
            # The kernel lets one more in than it is told; three are certain to fill it.
            for _ in range(3):
                waiting.append(socket.socket())
                waiting[-1].setblocking(False)
                waiting[-1].connect_ex(listener.getsockname())
            assert select.select([listener], [], [], GUARD)[0]
            with guarded():
                yield listener.getsockname()[1]
        finally:
            for each in waiting:
                each.close()


async def test_a_connection_is_not_waited_for_for_ever(full_port, mock_clock):
    """A server that accepts nobody is given up after 30 seconds, and nothing is left open."""
    before, errors = open_files(), []

    async def fail():
        with pytest.raises(UpstreamTimedOut, match="no connection within 30 s") as caught:
            await ask(Upstream("m", f"http://127.0.0.1:{full_port}"))
        errors.append(caught.value)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fail)
        await until(lambda: open_files() > before)
        await passes(mock_clock, 29.9)
        assert errors == []
        await passes(mock_clock, 0.2)
        assert [(error.before_first_byte, error.status) for error in errors] == [(True, 504)]
    assert open_files() == before


async def test_how_long_a_connection_is_waited_for_is_configured(full_port):
    """`connect` is the limit, and says so."""
    with pytest.raises(UpstreamTimedOut, match=r"no connection within 0.1 s \(connect\)"):
        await ask(Upstream("m", f"http://127.0.0.1:{full_port}", TimeoutConfig(connect=0.1)))


async def test_without_a_limit_a_connection_is_waited_for(full_port, mock_clock):
    """There is none of ours then."""
    before = open_files()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask, Upstream("m", f"http://127.0.0.1:{full_port}", TimeoutConfig(connect=None)))
        await until(lambda: open_files() > before)
        await passes(mock_clock, 3600)
        assert nursery.child_tasks
        nursery.cancel_scope.cancel(reason="test")
    assert open_files() == before


# ---- the pool ----


async def test_a_connection_serves_one_request_after_the_other(serve):
    """Requests one after another share a connection."""
    server, up = await serve(saying(*[OK] * 5))
    for _ in range(5):
        assert (await ask(up, "POST", body=b"hello"))[0] == 200
    assert (server.connections, up.idle) == (1, 1)
    assert repr(up) == f"<Upstream m at http://127.0.0.1:{server.port}: 1 idle>"


async def test_requests_at_the_same_time_have_their_own_connections(serve):
    """At most ten connections stay; what is more is closed."""
    server, up = await serve(saying(OK, OK))
    open_now, all_open = 0, trio.Event()

    async def one():
        nonlocal open_now
        async with up.request("GET", b"/", [], b"") as response:
            open_now += 1
            if open_now == 12:
                all_open.set()
            await all_open.wait()
            assert [chunk async for chunk in response.chunks()] == [b"ok"]

    async with trio.open_nursery() as nursery:
        for _ in range(12):
            nursery.start_soon(one)
    assert (server.connections, up.idle) == (12, 10)


async def test_the_newest_idle_connection_is_used_first(serve):
    """What was used last is used next."""

    async def script(peer):
        while await peer.request():
            await peer.say(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n%d" % peer.number)

    _, up = await serve(script)
    async with up.request("GET", b"/", [], b"") as outer:
        assert (await ask(up))[2] == b"1"  # given back first
        assert [chunk async for chunk in outer.chunks()] == [b"0"]  # given back last
    assert (await ask(up))[2] == b"0"


@pytest.mark.parametrize(
    "answer",
    [
        OK + b"HTTP/1.1 200 OK\r\n",
        OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"),
        OK.replace(b"1.1", b"1.0"),
    ],
)
async def test_a_doubtful_connection_is_closed(serve, answer):
    """After bytes nobody asked for, or an announced end, the next request gets a new connection."""
    server, up = await serve(saying(answer))
    assert (await ask(up))[2] == b"ok"
    assert up.idle == 0
    assert (await ask(up))[2] == b"ok"
    assert server.connections == 2


@pytest.mark.parametrize("late", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nwrong"])
async def test_an_idle_connection_that_spoke_or_ended_is_not_used(serve, late):
    """What a server says without being asked is never the answer to the next request."""
    now, done = trio.Event(), trio.Event()

    async def script(peer):
        await peer.request()
        await peer.say(OK)
        if peer.number == 0:
            await now.wait()
            await (peer.say(late) if late else peer.stream.aclose())
            done.set()
        if late:
            await peer.gone()

    server, up = await serve(script)
    assert (await ask(up))[2] == b"ok"
    assert up.idle == 1
    now.set()
    await done.wait()
    assert (await ask(up))[2] == b"ok"
    assert server.connections == 2


def failing_when_reused(*, how):
    """A script: the first connection answers once and fails with its second request; others answer."""

    async def script(peer):
        script.requests.append(await peer.request())
        await peer.say(OK)
        if peer.number == 0:
            script.requests.append(await peer.request())
            await how(peer)
        else:
            await peer.gone()

    script.requests = []
    return script


async def reset(peer):
    peer.reset()


async def test_a_request_is_sent_again_only_once(serve):
    """When the fresh connection fails too, the request has failed, though another idle one is there."""

    async def script(peer):
        if peer.number < 2:
            await peer.request()
            await peer.say(OK)
        await peer.request()
        peer.reset()

    server, up = await serve(script)
    async with up.request("GET", b"/", [], b"") as response:
        await ask(up)
        assert [chunk async for chunk in response.chunks()] == [b"ok"]
    assert up.idle == 2
    with pytest.raises(UpstreamFailed) as caught:
        await ask(up)
    assert caught.value.before_first_byte is True
    assert (server.connections, up.idle) == (3, 1)


async def test_a_request_that_was_answered_in_part_is_not_sent_again(serve):
    """After the first byte of an answer there is no second try."""

    async def how(peer):
        await peer.say(b"HTTP/1.1 2")
        await peer.stream.aclose()

    server, up = await serve(failing_when_reused(how=how))
    await ask(up)
    with pytest.raises(UpstreamFailed) as caught:
        await ask(up)
    assert caught.value.before_first_byte is False
    assert server.connections == 1


async def test_closing_ends_what_is_idle_and_what_would_be_new(serve):
    """After close, idle connections are gone, new requests fail, and one under way ends as usual but is not kept."""
    gone = []

    async def script(peer):
        await saying(OK)(peer)
        gone.append(peer.number)

    _, up = await serve(script)
    async with up.request("GET", b"/", [], b"") as response:
        await ask(up)
        up.close()
        await wait_all_tasks_blocked()
        assert gone == [1]
        with pytest.raises(UpstreamFailed, match="has been stopped") as caught:
            await ask(up)
        assert caught.value.before_first_byte is True
        assert [chunk async for chunk in response.chunks()] == [b"ok"]
    await wait_all_tasks_blocked()
    assert gone == [1, 0]
    assert "closed" in repr(up)


async def test_a_connection_made_while_closing_is_not_used(serve, monkeypatch):
    """A connection that comes up after close may be to another process, so nothing is sent on it."""
    got = []

    async def script(peer):
        got.append(await peer.request())

    _, up = await serve(script)
    connect = trio.open_tcp_stream

    async def slowly(*address):
        stream = await connect(*address)
        up.close()
        return stream

    monkeypatch.setattr(trio, "open_tcp_stream", slowly)
    with pytest.raises(UpstreamFailed, match="has been stopped"):
        await ask(up)
    await wait_all_tasks_blocked()
    assert got == [b""]


# ---- large bodies ----


async def test_a_large_body_arrives_whole(serve):
    """A body larger than all buffers reaches the server unchanged, and the connection is kept."""
    body = bytes(range(256)) * 40_000
    got = []

    async def script(peer):
        got.append((await peer.request()).partition(b"\r\n\r\n")[2])
        await peer.say(OK)
        await peer.gone()

    _, up = await serve(script)
    assert (await ask(up, "POST", body=body))[2] == b"ok"
    assert got == [body]
    assert up.idle == 1


async def test_an_early_refusal_is_heard_while_the_body_is_still_being_sent(serve):
    """A server that answers without reading the body, and waits, is heard; the half-used connection is closed."""
    left = trio.Event()

    async def script(peer):
        await peer.head()
        await peer.say(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nbig")
        await peer.gone()
        left.set()

    _, up = await serve(script)
    assert await ask(up, "POST", body=HUGE) == (413, [(b"content-length", b"3")], b"big")
    assert up.idle == 0
    await left.wait()


async def test_an_early_refusal_is_heard_when_the_server_hangs_up(serve):
    """The answer of a server that closes on a body it did not read is not lost to the broken connection."""

    async def script(peer):
        await peer.head()
        await peer.say(b"HTTP/1.1 401 No\r\nContent-Length: 2\r\n\r\nno")

    _, up = await serve(script)
    assert await ask(up, "POST", body=HUGE) == (401, [(b"content-length", b"2")], b"no")
    assert up.idle == 0


async def test_a_send_that_breaks_does_not_hide_the_answer(serve):
    """Answer and reset may be there at once; whether we notice as sender or as reader first, the answer counts."""

    async def script(peer):
        await peer.head()
        # No checkpoint between the two: both tasks of the client wake, and Trio runs them in random order.
        os.write(peer.stream.socket.fileno(), b"HTTP/1.1 401 No\r\nContent-Length: 2\r\n\r\nno")
        peer.reset()

    _, up = await serve(script)
    for _ in range(20):
        assert await ask(up, "POST", body=HUGE) == (401, [(b"content-length", b"2")], b"no")


async def test_a_server_may_answer_while_it_reads(serve):
    """An answer that starts before the body is through does not stop the body."""

    async def script(peer):
        await peer.head()
        await peer.say(b"HTTP/1.1 100 Continue\r\n\r\n" + CHUNKED + b"5\r\nearly\r\n")
        total = 10
        while not (data := await peer.stream.receive_some()).endswith(b"!"):
            total += len(data)
        await peer.say(b"4\r\nlate\r\n0\r\n\r\n")
        assert total + len(data) > len(HUGE)
        await peer.gone()

    _, up = await serve(script)
    assert (await ask(up, "POST", body=HUGE + b"!"))[2] == b"earlylate"
    assert up.idle == 1


# ---- bodies that are not in memory ----

LARGE = bytes(range(256)) * 50_000


@pytest.fixture
async def large():
    """A body of 12.8 MB in a file."""
    with Spool() as body:
        for start in range(0, len(LARGE), 100_000):
            await body.write(LARGE[start : start + 100_000])
        assert body.in_memory is None
        yield body


def keeping(got):
    """A script: keep each request's body, and answer."""

    async def script(peer):
        while request := await peer.request():
            got.append(request.partition(b"\r\n\r\n")[2])
            await peer.say(OK)

    return script


async def test_a_spooled_body_arrives_whole_and_again(serve, large):
    """It is sent with its length, from its beginning each time, with what is replaced in it; the connection is kept."""
    got = []
    server, up = await serve(keeping(got))
    for body in (large, large, large.splice(2, 100, b"new")):
        assert (await ask(up, "POST", body=body))[2] == b"ok"
    assert got == [LARGE, LARGE, LARGE[:2] + b"new" + LARGE[100:]]
    assert (server.connections, up.idle) == (1, 1)


async def test_a_spooled_body_may_be_small_or_empty(serve):
    """What is in memory is sent as well, and nothing has a length too."""
    got = []
    _, up = await serve(keeping(got))
    with Spool() as body:
        assert (await ask(up, "POST", body=body))[2] == b"ok"
        await body.write(b"small")
        assert (await ask(up, "POST", body=body))[2] == b"ok"
    assert got == [b"", b"small"]
    assert up.idle == 1


@pytest.mark.parametrize("hang_up", [False, True])
async def test_an_early_refusal_of_a_spooled_body_is_heard(serve, large, hang_up):
    """Whether the server waits or hangs up, its answer counts, and the half-used connection is closed."""

    async def script(peer):
        await peer.head()
        await peer.say(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nbig")
        if not hang_up:
            await peer.gone()

    _, up = await serve(script)
    assert await ask(up, "POST", body=large) == (413, [(b"content-length", b"3")], b"big")
    assert up.idle == 0


async def test_a_spooled_body_survives_a_server_that_speaks_all_the_time(serve, large):
    """Each word of the server interrupts the sending; no byte is lost or comes twice."""
    got = []

    async def script(peer):
        data = b""
        while not (begun := data.partition(b"\r\n\r\n"))[1] or len(begun[2]) < len(LARGE):
            data += await peer.stream.receive_some()
            await peer.say(b"HTTP/1.1 102 Processing\r\n\r\n")
        got.append(begun[2])
        await peer.say(OK)
        await peer.gone()

    _, up = await serve(script)
    assert (await ask(up, "POST", body=large))[2] == b"ok"
    assert got == [LARGE]
    assert up.idle == 1


async def test_a_spooled_body_goes_on_after_the_head_of_the_answer(serve, large):
    """A server may begin its answer and read on."""
    got = []

    async def script(peer):
        data = await peer.head()
        await peer.say(CHUNKED + b"5\r\nearly\r\n")
        while not data.endswith(b"the end"):
            data += await peer.stream.receive_some()
        got.append(data.partition(b"\r\n\r\n")[2])
        await peer.say(b"0\r\n\r\n")
        await peer.gone()

    _, up = await serve(script)
    assert (await ask(up, "POST", body=large.splice(large.size, large.size, b"the end")))[2] == b"early"
    assert got == [LARGE + b"the end"]
    assert up.idle == 1


@attrs.frozen
class Stuck:
    """A body whose second piece does not come."""

    size: int = 1000

    async def read(self, offset, size):
        if offset:
            await trio.sleep_forever()
        return b"x" * 10


async def test_a_connection_with_half_a_request_on_it_is_not_kept(serve):
    """Even when all that was read is sent, and the answer is complete, the server waits for the rest."""

    async def script(peer):
        await peer.head()
        await peer.say(OK)
        await peer.gone()

    _, up = await serve(script)
    assert (await ask(up, "POST", body=Stuck()))[2] == b"ok"
    assert up.idle == 0


async def test_a_body_that_cannot_be_read_ends_the_request(serve, large):
    """A broken disk is nobody's fault: the error passes as it is, and the server notices."""
    left = trio.Event()

    async def script(peer):
        await peer.gone()
        left.set()

    _, up = await serve(script)
    large._file.truncate(1_000_000)
    with pytest.RaisesGroup(OSError):
        await ask(up, "POST", body=large)
    await left.wait()
    assert up.idle == 0


async def test_a_spooled_body_on_a_dead_idle_connection_is_sent_again_from_the_start(serve, large):
    """A server that resets an idle connection while the body comes gets all of it on a fresh one."""
    got = []

    async def script(peer):
        got.append((await peer.request()).partition(b"\r\n\r\n")[2])
        await peer.say(OK)
        if peer.number == 0:
            await peer.stream.receive_some(1_000_000)
            peer.reset()
        else:
            await peer.gone()

    server, up = await serve(script)
    await ask(up)
    assert (await ask(up, "POST", body=large))[2] == b"ok"
    assert got == [b"", LARGE]
    assert server.connections == 2


async def test_a_spooled_body_that_is_cancelled_half_way_can_be_sent_to_another(serve, large):
    """The server notices, no file stays open but the spool's, and the next gets the whole body."""
    reached, left, got = trio.Event(), trio.Event(), []

    async def script(peer):
        if peer.number == 0:
            await peer.stream.receive_some(1_000_000)
            reached.set()
            await left.wait()
            await peer.gone()
        else:
            await keeping(got)(peer)

    _, up = await serve(script)
    before = open_files()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: ask(up, "POST", body=large))
        await reached.wait()
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel(reason="test")
    assert open_files() == before + 1  # the server's end
    left.set()
    assert (await ask(up, "POST", body=large))[2] == b"ok"
    assert got == [LARGE]


# ---- limits of time ----


async def test_an_answer_is_not_waited_for_longer_than_is_configured(serve, mock_clock):
    """After `response_header` it is 504, the server notices, and the request is not sent again."""
    asked, left, errors = trio.Event(), trio.Event(), []

    async def script(peer):
        await peer.request()
        await peer.say(OK)
        await peer.request()
        asked.set()
        await peer.gone()
        left.set()

    server, up = await serve(script, response_header=10.0)
    await ask(up)

    async def in_vain():
        with pytest.raises(UpstreamTimedOut, match=r"no answer within 10 s \(response_header\)") as caught:
            await ask(up, "POST", body=b"x")
        errors.append(caught.value)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(in_vain)
        await asked.wait()
        await passes(mock_clock, 9.9)
        assert errors == []
        await passes(mock_clock, 0.2)
        assert [(error.status, error.before_first_byte) for error in errors] == [(504, True)]
    await left.wait()
    assert (server.connections, up.idle) == (1, 0)


async def test_the_time_for_the_answer_begins_when_all_is_sent(serve, mock_clock):
    """A server that takes long to read a body has its time afterwards, and a begun answer may take any time."""
    begun = trio.Event()

    async def script(peer):
        await peer.head()
        await passes(mock_clock, 11)
        while not (await peer.stream.receive_some()).endswith(b"!"):
            pass
        await passes(mock_clock, 9)
        await peer.say(CHUNKED)
        await begun.wait()
        await passes(mock_clock, 11)
        await peer.say(b"0\r\n\r\n")

    _, up = await serve(script, response_header=10.0)
    async with up.request("POST", b"/", [], HUGE + b"!") as answer:
        begun.set()
        assert [chunk async for chunk in answer.chunks()] == []


async def test_connections_that_were_idle_for_too_long_are_not_used(serve, mock_clock):
    """After `idle_conn` they are closed at the next request."""
    gone, closed = [], trio.Event()

    async def script(peer):
        await saying(OK, OK, OK)(peer)
        gone.append(peer.number)
        closed.set()

    server, up = await serve(script, idle_conn=15.0)
    await ask(up)
    await passes(mock_clock, 14.9)
    await ask(up)
    assert (server.connections, up.idle) == (1, 1)
    await passes(mock_clock, 15.1)
    await ask(up)
    await closed.wait()
    assert (server.connections, up.idle, gone) == (2, 1, [0])


@pytest.mark.parametrize(("every", "on", "seconds"), [(30.0, 1, 30), (0.2, 1, 1), (1e9, 1, 32767), (None, 0, None)])
async def test_the_kernel_probes_idle_connections(serve, every, on, seconds):
    """`keepalive` is the time between probes, in whole seconds and as many as Linux takes."""
    _, up = await serve(saying(OK), keepalive=every)
    async with up.request("GET", b"/", [], b"") as response:
        sock = response._connection._socket
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == on
        if on:
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == seconds
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == seconds


# ---- leaving early ----


async def sending(peer):
    await peer.head()


async def waiting_for_the_head(peer):
    await peer.request()


async def reading_the_body(peer):
    await peer.request()
    await peer.say(CHUNKED + b"4\r\npart\r\n")


@pytest.mark.parametrize("phase", [sending, waiting_for_the_head, reading_the_body])
async def test_a_cancelled_request_leaves_nothing(serve, phase):
    """Cancelled in any phase, a request's connection is closed so that the server sees it, and no file stays open."""
    reached, look, left = trio.Event(), trio.Event(), trio.Event()

    async def script(peer):
        await phase(peer)
        reached.set()
        await look.wait()
        await peer.gone()
        left.set()

    _, up = await serve(script)
    before = open_files()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: ask(up, "POST", body=HUGE if phase is sending else b"small"))
        await reached.wait()
        await wait_all_tasks_blocked()
        assert open_files() == before + 2  # both ends are ours here
        nursery.cancel_scope.cancel(reason="test")
    assert open_files() == before + 1
    look.set()
    await left.wait()
    await wait_all_tasks_blocked()
    assert (up.idle, open_files()) == (0, before)


async def test_a_request_cancelled_while_connecting_leaves_nothing(full_port):
    """Cancelled before there is a connection, a request leaves no socket."""
    up, before = Upstream("m", f"http://127.0.0.1:{full_port}"), open_files()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask, up)
        await wait_all_tasks_blocked()
        assert open_files() == before + 1
        nursery.cancel_scope.cancel(reason="test")
    assert (up.idle, open_files()) == (0, before)


async def test_leaving_the_block_early_closes_at_once(serve):
    """A caller that leaves in the middle of a body ends the connection, and an error of its own passes untouched."""
    left = trio.Event()

    async def script(peer):
        await reading_the_body(peer)
        await peer.gone()
        left.set()

    _, up = await serve(script)
    with pytest.raises(ZeroDivisionError):  # noqa: PT012 - the block is the subject
        async with up.request("GET", b"/", [], b"") as response:
            await anext(response.chunks())
            raise ZeroDivisionError
    await left.wait()
    assert up.idle == 0
