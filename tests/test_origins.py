"""What `trioswap.origin` promises, kept by both who answer: a model server of ours, and a peer, plain or over TLS."""

from __future__ import annotations

import gzip

import attrs
import pytest
import trio
import trustme
from clocks import guarded
from origins import (
    CHUNKED,
    GUARD,
    HUGE,
    OK,
    End,
    Server,
    ask,
    closing_after,
    open_sockets,
    refused_port,
    saying,
    server_context,
)
from trio.testing import wait_all_tasks_blocked

from trioswap.config.parts import PeerConfig
from trioswap.errors import BadRequest, PeerFailed, UpstreamFailed
from trioswap.remote import Peer, wire
from trioswap.spool import Spool
from trioswap.upstream import Upstream


@pytest.fixture(scope="module")
def authority():
    """Who signs the peers' certificates."""
    return trustme.CA()


@attrs.frozen
class Kind:
    """One kind of origin."""

    make: object
    failure: type[Exception]
    context: object = None


@pytest.fixture(params=["model server", "peer", "peer over TLS"])
def kind(request, authority, monkeypatch, tmp_path):
    """What each test is run with."""
    if request.param == "model server":
        return Kind(lambda url: Upstream("m", url), UpstreamFailed)
    if request.param == "peer":
        return Kind(peer_at, PeerFailed)
    authority.cert_pem.write_to_path(tmp_path / "trusted.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "trusted.pem"))
    return Kind(peer_at, PeerFailed, server_context(authority))


def peer_at(url):
    return Peer(PeerConfig("p", url, ("m",)), {})


@pytest.fixture
async def serve(kind, nursery):
    """Start a server; gives it and the origin that talks to it."""
    made = []

    async def start(script, base=""):
        server = await Server(script, kind.context).start(nursery)
        made.append(kind.make(server.url + base))
        return server, made[-1]

    with guarded():
        yield start
    for origin in made:
        await origin.aclose() if isinstance(origin, Peer) else origin.close()


async def seen(serve, *args, base=""):
    """The request as the server got it: head lines, and body."""
    got = []

    async def script(end):
        got.append(await end.request())
        await end.say(OK)

    server, origin = await serve(script, base)
    assert await ask(origin, *args) == (200, [(b"content-length", b"2")], b"ok")
    head, _, body = got[0].partition(b"\r\n\r\n")
    return head.replace(b":%d" % server.port, b":PORT").split(b"\r\n"), body


# ---- what the server is sent ----


async def test_a_request_arrives_as_it_was_given(serve):
    """Method, target with its escapes, the client's fields in their order and writing, and the body arrive."""
    headers = [(b"X-One", b"1"), (b"User-Agent", b"curl/8"), (b"x-two", b"2"), (b"X-One", b"3"), (b"Accept", b"a/b")]
    lines, body = await seen(serve, "POST", b"/v1/%2F%7e/../x?y=%20&z", headers, b'{"a": 1}')
    assert lines[0] == b"POST /v1/%2F%7e/../x?y=%20&z HTTP/1.1"
    assert lines[1].lower() == b"host: 127.0.0.1:port"
    assert lines[2:] == [
        b"X-One: 1",
        b"User-Agent: curl/8",
        b"x-two: 2",
        b"X-One: 3",
        b"Accept: a/b",
        b"content-length: 8",
    ]
    assert body == b'{"a": 1}'


async def test_nothing_is_invented(serve):
    """A client that says nothing about itself, and accepts no encoding, is not made to."""
    lines, _ = await seen(serve)
    assert lines[0] == b"GET / HTTP/1.1"
    assert [line.lower() for line in lines[1:]] == [b"host: 127.0.0.1:port"]


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
    ]
    lines, _ = await seen(serve, "POST", b"/", headers, b"hi")
    assert lines[2:] == [b"content-length: 2"]


@pytest.mark.parametrize(("method", "expected"), [("POST", True), ("PUT", True), ("PATCH", True), ("GET", False)])
async def test_an_empty_body_has_a_length_where_one_is_expected(serve, method, expected):
    """POST, PUT and PATCH without a body say so; GET says nothing."""
    lines, _ = await seen(serve, method, b"/")
    assert (b"content-length: 0" in lines) is expected


async def test_the_path_of_the_base_comes_first(serve):
    """The base URL's path is put before the request's."""
    lines, _ = await seen(serve, "GET", b"/v1/models?x=1?", base="/api/")
    assert lines[0] == b"GET /api/v1/models?x=1? HTTP/1.1"


@pytest.mark.parametrize(
    ("method", "target", "headers"),
    [
        ("GET", b"/a b", []),
        ("GET", b"/\xc3\xa9", []),
        ("GET", b"/", [(b"x", b"a\r\nb: c")]),
        ("G T", b"/", []),
        ("CONNECT", b"/", []),
    ],
)
async def test_what_http_1_1_cannot_say_is_the_client_s_fault(serve, method, target, headers):
    """A request that another protocol allowed and HTTP/1.1 does not is refused before anything is sent."""
    server, origin = await serve(saying(OK))
    with pytest.raises(BadRequest):
        await ask(origin, method, target, headers)
    await wait_all_tasks_blocked()
    assert server.connections == 0


async def test_a_large_body_arrives_whole(serve):
    """A body larger than all buffers reaches the server unchanged."""
    body = bytes(range(256)) * 40_000
    _, got = await seen(serve, "POST", b"/", [], body)
    assert got == body


async def test_a_spooled_body_arrives_whole(serve):
    """A body that is not in memory is sent with its length, and not in chunks."""
    body = bytes(range(256)) * 10_000
    with Spool() as spool:
        await spool.write(body)
        assert spool.in_memory is None
        lines, got = await seen(serve, "POST", b"/", [], spool)
    assert lines[2:] == [b"content-length: %d" % len(body)]
    assert got == body


# ---- what comes back ----


async def test_a_stream_comes_piece_by_piece(serve):
    """What the server has said is handed on at once: nothing is held back for more to come."""
    more = trio.Event()

    async def script(end):
        await end.request()
        await end.say(CHUNKED + b"1\r\na\r\n1\r\nb\r\n")
        await more.wait()
        await end.say(b"1\r\nc\r\n2;ext=1\r\nde\r\n0\r\nTrailer: x\r\n\r\n")
        await end.gone()

    _, origin = await serve(script)
    async with origin.request("GET", b"/", [], b"") as answer:
        pieces, got = answer.chunks(), b""
        while got != b"ab":
            got += await anext(pieces)
        more.set()
        assert b"".join([piece async for piece in pieces]) == b"cde"


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
    server, origin = await serve(saying(answer, OK))
    async with origin.request(method, b"/", [], b"") as head:
        assert head.status == int(answer[9:12])
        if read:
            assert [chunk async for chunk in head.chunks()] == []
    assert await ask(origin) == (200, [(b"content-length", b"2")], b"ok")
    assert server.connections == 1


async def test_a_body_is_not_decoded(serve):
    """What is compressed stays so, and says so."""
    body = gzip.compress(b"hello" * 1000)
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(body)
    _, origin = await serve(saying(head + body))
    fields = [(b"content-encoding", b"gzip"), (b"content-length", b"%d" % len(body))]
    assert await ask(origin) == (200, fields, body)


async def test_fields_of_the_server_s_connection_stay_behind(serve):
    """The answer's hop-by-hop fields and those it names are removed, repeated ones are kept, in small letters."""
    answer = (
        b"HTTP/1.1 201 Created\r\nConnection: close, x-hop\r\nX-Hop: 1\r\nKeep-Alive: timeout=5\r\nUpgrade: h2c\r\n"
        b"Set-Cookie: a\r\nSet-Cookie: b\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    )
    _, origin = await serve(saying(answer))
    assert await ask(origin) == (201, [(b"set-cookie", b"a"), (b"set-cookie", b"b")], b"")


async def test_cookies_are_not_kept(serve):
    """What one client is told to remember is not sent for another."""
    got = []

    async def script(end):
        for _ in range(2):
            got.append(await end.request())
            await end.say(OK.replace(b"\r\n\r\n", b"\r\nSet-Cookie: a=1\r\n\r\n"))

    _, origin = await serve(script)
    for _ in range(2):
        await ask(origin)
    assert b"cookie" not in got[1].lower()


async def test_redirects_are_passed_on(serve):
    """Where to go is for the client to decide."""
    server, origin = await serve(saying(b"HTTP/1.1 302 Found\r\nLocation: /other\r\nContent-Length: 0\r\n\r\n"))
    assert await ask(origin) == (302, [(b"location", b"/other"), (b"content-length", b"0")], b"")
    assert server.connections == 1


async def test_interim_answers_are_skipped(serve):
    """100 and 103 are not the answer."""
    _, origin = await serve(saying(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + OK))
    assert await ask(origin) == (200, [(b"content-length", b"2")], b"ok")


async def test_a_head_may_come_in_single_bytes(serve):
    """However slowly the head comes, it is one head."""

    async def script(end):
        await end.request()
        for byte in OK:
            await end.say(bytes([byte]))
        await end.gone()

    _, origin = await serve(script)
    assert (await ask(origin))[2] == b"ok"


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
async def test_a_body_may_end_with_the_connection(serve, version):
    """Without a length the body is what comes until the server closes."""
    _, origin = await serve(closing_after(b"HTTP/%b 200 OK\r\n\r\nall of it" % version))
    assert await ask(origin) == (200, [], b"all of it")


async def test_a_long_body_comes_whole(serve):
    """A body of many reads arrives unchanged."""
    body = bytes(range(256)) * 40_000
    _, origin = await serve(saying(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body))
    assert (await ask(origin))[2] == body


async def test_a_body_is_read_inside_its_block_only(serve):
    """Pieces of an answer cannot be taken from the next request on the same connection."""
    _, origin = await serve(saying(OK, OK))
    async with origin.request("GET", b"/", [], b"") as answer:
        pieces = answer.chunks()
        assert await anext(pieces) == b"ok"
    async with origin.request("GET", b"/", [], b""):
        with pytest.raises(AssertionError, match="inside the block"):
            await anext(pieces)


# ---- what goes wrong ----


@pytest.mark.parametrize(
    ("answer", "before"),
    [
        (b"", True),
        (b"HTTP/1.1 200 OK\r\nContent-", False),
        (b"HTTP/1.1 100 Continue\r\n\r\n", False),
        (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", False),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n", False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", False),
    ],
)
async def test_no_answer_is_an_error_that_says_whether_a_byte_came(serve, kind, answer, before):
    """A fresh connection that yields no proper head fails once, is not tried again, and tells if it may be."""
    server, origin = await serve(closing_after(answer))
    with pytest.raises(kind.failure) as caught:
        await ask(origin)
    assert caught.value.before_first_byte is before
    assert caught.value.status == 502
    assert server.connections == 1


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf",
        CHUNKED + b"4\r\nhalf\r\n",
        CHUNKED + b"8\r\nhalf",
        CHUNKED + b"4\r\nhalf\r\n0\r\n",
    ],
)
async def test_a_broken_off_body_is_not_taken_for_a_whole_one(serve, kind, answer):
    """A body shorter than announced is handed on and then ends in an error."""
    _, origin = await serve(closing_after(answer))
    async with origin.request("GET", b"/", [], b"") as head:
        pieces, got = head.chunks(), b""
        with pytest.raises(kind.failure) as caught:  # noqa: PT012 - how many reads it takes is the kernel's affair
            while True:
                got += await anext(pieces)
    assert got == b"half"
    assert caught.value.before_first_byte is False


async def test_a_reset_is_an_error_in_its_own_words(serve, kind):
    """A reset in the middle of a body says what happened."""
    more = trio.Event()

    async def script(end):
        await end.request()
        await end.say(CHUNKED + b"4\r\nhalf\r\n")
        await more.wait()
        end.reset()

    _, origin = await serve(script)
    async with origin.request("GET", b"/", [], b"") as answer:
        pieces = answer.chunks()
        assert await anext(pieces) == b"half"
        more.set()
        with pytest.raises(kind.failure, match="connection reset by peer"):
            await anext(pieces)


async def test_nobody_listens(kind):
    """A refused connection is an error before the first byte, and says so."""
    with pytest.raises(kind.failure, match="connection refused") as caught:
        await ask(kind.make(f"http://127.0.0.1:{refused_port()}"))
    assert caught.value.before_first_byte is True


# ---- connections ----


async def test_a_connection_serves_one_request_after_the_other(serve):
    """Requests one after another share a connection."""
    server, origin = await serve(saying(*[OK] * 5))
    for _ in range(5):
        assert (await ask(origin, "POST", body=b"hello"))[0] == 200
    assert server.connections == 1


async def test_requests_at_the_same_time_have_their_own_connections(serve):
    """However many there are: none waits for another's end."""
    server, origin = await serve(saying(OK))
    open_now, all_open = 0, trio.Event()

    async def one():
        nonlocal open_now
        async with origin.request("GET", b"/", [], b"") as answer:
            open_now += 1
            if open_now == 120:
                all_open.set()
            await all_open.wait()
            assert [chunk async for chunk in answer.chunks()] == [b"ok"]

    async with trio.open_nursery() as nursery:
        for _ in range(120):
            nursery.start_soon(one)
    assert server.connections == 120


async def reset(end):
    end.reset()


async def close(end):
    await end.close()


async def close_unread(end):
    """As a server does that has nothing more to say on an idle connection, and does not know of the next request."""
    await trio.lowlevel.wait_readable(end.transport.socket)
    await close(end)


async def read_and_reset(end):
    await end.request()
    end.reset()


@pytest.mark.parametrize("how", [close_unread, read_and_reset])
async def test_a_request_on_a_dead_idle_connection_is_sent_again(serve, how):
    """When a reused connection ends without a byte, a fresh one serves the same request."""
    requests = []

    async def script(end):
        requests.append(await end.request())
        await end.say(OK)
        await (how if end.number == 0 else End.gone)(end)

    server, origin = await serve(script)
    await ask(origin)
    assert (await ask(origin, "POST", b"/x", [], b"payload"))[2] == b"ok"
    assert server.connections == 2
    assert requests[1].endswith(b"payload")


async def test_what_a_server_has_worked_on_is_not_sent_again(serve, kind, monkeypatch):
    """A server that has read a request, works, and hangs up without an answer has perhaps done it (RFC 9110, 9.2.2)."""
    monkeypatch.setattr(wire, "UNSEEN", 0.0)  # a moment is long for a peer
    requests = []

    async def script(end):
        while request := await end.request():
            requests.append(request)
            if request.endswith(b"work"):
                await trio.testing.wait_all_tasks_blocked(0.01)
                return
            await end.say(OK)

    _, origin = await serve(script)
    await ask(origin)
    with pytest.raises(kind.failure) as caught:
        await ask(origin, "POST", b"/x", [], b"work")
    assert caught.value.before_first_byte is True
    assert len(requests) == 2


@pytest.mark.parametrize("how", [reset, close])
async def test_a_request_that_was_answered_in_part_is_not_sent_again(serve, kind, how):
    """After the first byte of an answer there is no second try."""

    async def script(end):
        await end.request()
        await end.say(OK)
        await end.request()
        await end.say(b"HTTP/1.1 2")
        await wait_all_tasks_blocked()
        await how(end)

    server, origin = await serve(script)
    await ask(origin)
    with pytest.raises(kind.failure) as caught:
        await ask(origin)
    assert caught.value.before_first_byte is False
    assert server.connections == 1


@pytest.mark.parametrize("late", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nwrong"])
async def test_an_idle_connection_that_spoke_or_ended_is_not_used(serve, late):
    """What a server says without being asked is never the answer to the next request."""
    now, done = trio.Event(), trio.Event()

    async def script(end):
        await end.request()
        await end.say(OK)
        if end.number == 0:
            await now.wait()
            await (end.say(late) if late else end.close())
            done.set()
        if late:
            await end.gone()

    server, origin = await serve(script)
    assert (await ask(origin))[2] == b"ok"
    now.set()
    await done.wait()
    assert (await ask(origin))[2] == b"ok"
    assert server.connections == 2


# ---- answers that come early ----


async def test_an_early_refusal_is_heard_while_the_body_is_still_being_sent(serve, monkeypatch):
    """A server that answers without reading the body, and waits, is heard; the half-used connection is closed."""
    monkeypatch.setattr(wire, "PATIENCE", 0)
    left = trio.Event()

    async def script(end):
        await end.head()
        await end.say(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nbig")
        await end.gone()
        left.set()

    _, origin = await serve(script)
    assert await ask(origin, "POST", body=HUGE) == (413, [(b"content-length", b"3")], b"big")
    await left.wait()


async def test_an_early_refusal_is_heard_when_the_server_hangs_up(serve):
    """The answer of a server that closes on a body it did not read is not lost to the broken connection."""

    async def script(end):
        await end.head()
        await end.say(b"HTTP/1.1 401 No\r\nContent-Length: 2\r\n\r\nno")

    _, origin = await serve(script)
    assert await ask(origin, "POST", body=HUGE) == (401, [(b"content-length", b"2")], b"no")


async def test_a_send_that_breaks_does_not_hide_the_answer(serve):
    """Answer and reset may be there at once; whether we notice as sender or as reader first, the answer counts."""

    async def script(end):
        await end.head()
        await end.say(b"HTTP/1.1 100 Continue\r\n\r\n")
        # Both tasks of the client wake, and Trio runs them in random order.
        end.say_and_reset(b"HTTP/1.1 401 No\r\nContent-Length: 2\r\n\r\nno")

    _, origin = await serve(script)
    for _ in range(20):
        assert await ask(origin, "POST", body=HUGE) == (401, [(b"content-length", b"2")], b"no")


async def test_a_server_may_answer_while_it_reads(serve, monkeypatch):
    """An answer that starts before the body is through does not stop the body."""
    monkeypatch.setattr(wire, "PATIENCE", GUARD)

    async def script(end):
        await end.head()
        await end.say(b"HTTP/1.1 100 Continue\r\n\r\n" + CHUNKED + b"5\r\nearly\r\n")
        total = 10
        while not (data := await end.stream.receive_some()).endswith(b"!"):
            total += len(data)
        await end.say(b"4\r\nlate\r\n0\r\n\r\n")
        assert total + len(data) > len(HUGE)
        await end.gone()

    _, origin = await serve(script)
    assert (await ask(origin, "POST", body=HUGE + b"!"))[2] == b"earlylate"


# ---- leaving early; on a clock that stands still, where nothing that ends has waited for a limit ----


async def sending(end):
    await end.head()


async def waiting_for_the_head(end):
    await end.request()


async def reading_the_body(end):
    await end.request()
    await end.say(CHUNKED + b"4\r\npart\r\n")


@pytest.mark.parametrize("phase", [sending, waiting_for_the_head, reading_the_body])
async def test_a_cancelled_request_leaves_nothing(serve, phase, mock_clock):
    """Cancelled in any phase, a request's connection is closed so that the server sees it, and no socket stays open."""
    reached, read, look, left = trio.Event(), trio.Event(), trio.Event(), trio.Event()

    async def script(end):
        await phase(end)
        reached.set()
        await look.wait()
        await end.gone()
        left.set()

    async def exchange():
        async with origin.request("POST", b"/", [], HUGE if phase is sending else b"small") as answer:
            async for _ in answer.chunks():
                read.set()

    _, origin = await serve(script)
    before = open_sockets()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(exchange)
        await (read if phase is reading_the_body else reached).wait()
        await wait_all_tasks_blocked()
        assert open_sockets() == before + 2  # both ends are ours here
        nursery.cancel_scope.cancel(reason="test")
    assert open_sockets() == before + 1
    look.set()
    await left.wait()
    await wait_all_tasks_blocked()
    assert open_sockets() == before


@pytest.mark.parametrize("read", [True, False])
async def test_leaving_the_block_early_closes_at_once(serve, read, mock_clock):
    """A caller that leaves before the end of a body ends the connection, and an error of its own passes untouched."""
    left = trio.Event()

    async def script(end):
        await reading_the_body(end)
        await end.gone()
        left.set()

    server, origin = await serve(script)
    with pytest.raises(ZeroDivisionError):  # noqa: PT012 - the block is the subject
        async with origin.request("GET", b"/", [], b"") as answer:
            if read:
                await anext(answer.chunks())
            raise ZeroDivisionError
    await left.wait()
    assert server.connections == 1
