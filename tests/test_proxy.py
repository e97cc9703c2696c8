"""Requests through a daemon to real model servers: streaming, clients that leave, servers that die."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial

import h11
import pytest
import trio
from children import MODEL_SERVER, PATIENCE, free_port
from daemons import (
    Client,
    at_once,
    by_hand,
    chat,
    connect,
    counts,
    daemon,
    ending,
    eventually,
    fetch,
    is_running,
    running,
    scripted,
    speakers,
)
from trio.testing import wait_all_tasks_blocked

from trioswap.bounded import BoundedStream
from trioswap.daemon import CONNECTION_GRACE
from trioswap.errors import ShuttingDown
from trioswap.proxy import LAST_CHANCE

CHAT = "/v1/chat/completions"
# Of the clock, for what takes a hundredth of it: a client that left is noticed at once.
NOTICED = 1.0
HOUR = 3600
CHAOS_CHILD = MODEL_SERVER.with_name("chaos_child.py")


async def stream_of(port: int, model: str, **script: object) -> list[str]:
    answer = await fetch(port, "POST", CHAT, chat(model, stream=True, **script))
    assert answer.status == 200
    return speakers(answer.body)


async def answer_of(port: int, model: str, **script: object) -> str:
    answer = await fetch(port, "POST", CHAT, chat(model, **script))
    assert answer.status == 200
    return answer.json()["model"]


# ---- each request its own answer -------------------------------------------------------------


async def test_five_models_on_one_port_answer_for_themselves():
    """Five parallel requests for five models that share a port: each is answered by its own model."""
    port, names = free_port(), list("abcde")
    async with daemon({name: scripted(port=port) for name in names}) as served:
        for _ in range(3):
            assert await at_once(partial(answer_of, served.port, name) for name in names) == names


async def test_interleaved_streams_of_two_models_are_complete():
    """Four clients stream from two models in turn: no failure, and every chunk names its own model."""
    async with daemon({"a": scripted(max_wait=0.05), "b": scripted(max_wait=0.05)}) as served:

        async def client(number: int) -> None:
            for turn in range(10):
                model = "ab"[(number + turn) % 2]
                assert await stream_of(served.port, model, chunks=8) == [model] * 8 + ["[DONE]"]

        await at_once(partial(client, number) for number in range(4))


async def test_pieces_are_passed_on_as_they_come():
    """The client has each piece before the model server says the next: nothing is held back."""
    async with by_hand() as server, daemon({"a": server}) as served, await connect(served.port) as client:
        await client.ask("POST", CHAT, chat("a"))
        model = await server.accept()
        while not isinstance(await model.next_event(), h11.EndOfMessage):
            pass
        await model.send(h11.Response(status_code=200, headers=[("content-type", "text/event-stream")]))
        assert (await client.head()).status_code == 200
        for number in range(5):
            await model.send(h11.Data(data=b"data: %d\n\n" % number))
            assert await client.piece() == b"data: %d\n\n" % number
        await model.send(h11.EndOfMessage())
        assert await client.piece() == b""
        await model.stream.aclose()
        await server.close()


async def test_an_answer_that_comes_at_once_goes_on_at_once(monkeypatch):
    """One read of the model server's, one write to the client: head and body of a small answer."""
    writes, send_all = [], BoundedStream.send_all

    async def spy(self, data):
        writes.append(bytes(data))
        await send_all(self, data)

    monkeypatch.setattr(BoundedStream, "send_all", spy)
    async with by_hand() as server, daemon({"a": server}) as served, await connect(served.port) as client:
        await client.ask("POST", CHAT, chat("a"))
        async with await asked(server) as model:
            await model.stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")
            assert (await client.answer()).body == b"hello"
        await server.close()
    assert len(writes) == 1
    assert writes[0].endswith(b"\r\n\r\nhello")


async def test_many_pieces_at_once_are_passed_on_whole():
    """A client that reads a fast stream gets every byte of it, in order."""
    async with daemon({"a": scripted()}) as served:
        assert await stream_of(served.port, "a", chunks=5000) == ["a"] * 5000 + ["[DONE]"]


async def test_a_large_body_arrives_whole():
    """What the client uploads reaches the model server to the last byte."""
    body = json.dumps({"model": "a", "padding": "x" * 5_000_000}).encode()
    async with daemon({"a": scripted()}) as served:
        answer = await fetch(served.port, "POST", CHAT, body)
        assert answer.json()["bytes"] == len(body)


# ---- clients that leave -----------------------------------------------------------------------

BEHIND = {"nothing behind": b"", "junk behind": b"\0junk" * 1000}


async def has(port: int, **wanted: int) -> bool:
    found = await counts(port)
    return all(found[key] == value for key, value in wanted.items())


@pytest.mark.parametrize("behind", BEHIND)
@pytest.mark.parametrize(
    ("stream", "script"),
    [(True, {"chunks": 10**6, "chunk_delay": 0.01}), (False, {"answer_delay": 1000})],
    ids=["streaming", "waiting for the head"],
)
async def test_the_model_server_hears_that_the_client_left(behind, stream, script):
    """Its connection is closed at once, and the request holds the model no longer (I9)."""
    times = []
    async with daemon({"a": scripted()}) as served:
        await answer_of(served.port, "a")
        for number in range(5):
            async with await connect(served.port) as client:
                await client.ask("POST", CHAT, chat("a", stream=stream, **script))
                await client.stream.send_all(BEHIND[behind])
                await eventually(partial(has, served.model_ports["a"], started=number + 2))
                if stream:
                    await client.piece_of_body()
            times.append(await eventually(partial(has, served.model_ports["a"], aborted=number + 1)))
            await eventually(partial(is_running, served.port, "a", serving=0, waiting=0))
    assert statistics.median(times) < NOTICED


async def test_a_client_that_left_the_queue_costs_nothing():
    """A request that waited for its turn is forgotten, and its model is never started for it."""
    async with daemon({"a": scripted(), "b": scripted()}) as served, await connect(served.port) as busy:
        await busy.ask("POST", CHAT, chat("a", stream=True, chunks=10**6, chunk_delay=0.01))
        assert (await busy.head()).status_code == 200
        async with await connect(served.port) as client:
            await client.ask("POST", CHAT, chat("b"))
            await eventually(partial(is_running, served.port, "b", waiting=1))

        async def forgotten() -> bool:
            return (await running(served.port)).keys() == {"a"}

        assert await eventually(forgotten) < NOTICED
        assert await is_running(served.port, "a", serving=1)


async def test_a_client_that_left_during_the_load_is_not_forwarded():
    """Its request waits no longer; the model server becomes ready and never sees it."""
    async with daemon({"a": scripted("--ready-delay", 0.5)}) as served:
        async with await connect(served.port) as client:
            await client.ask("POST", CHAT, chat("a"))
            await eventually(partial(is_running, served.port, "a", state="starting", waiting=1))
        assert await eventually(partial(is_running, served.port, "a", waiting=0)) < NOTICED
        await eventually(partial(is_running, served.port, "a", state="ready", serving=0))
        assert await counts(served.model_ports["a"]) == {"started": 0, "finished": 0, "aborted": 0}


async def test_a_client_that_leaves_in_its_upload_is_forgotten():
    """Half a body loads no model."""
    async with daemon({"a": scripted()}) as served:
        async with await connect(served.port) as client:
            body = chat("a")
            await client.stream.send_all(b"POST %s HTTP/1.1\r\nHost: x\r\n" % CHAT.encode())
            await client.stream.send_all(b"Content-Length: %d\r\n\r\n" % (len(body) + 1) + body)
        assert await running(served.port) == {}
        assert await answer_of(served.port, "a") == "a"
        assert (await counts(served.model_ports["a"]))["started"] == 1


# ---- clients that do not read -------------------------------------------------------------------


async def test_a_client_that_does_not_read_delays_a_swap_by_the_drain_timeout():
    """The lease of a stalled client is taken back at the drain deadline, whatever its socket does (I10)."""
    models = {"a": scripted(drain_timeout=0.5), "b": scripted(max_wait=0.2)}
    async with daemon(models) as served, await connect(served.port, small_buffer=True) as stalled:
        await stalled.ask("POST", CHAT, chat("a", stream=True, chunks=10**6, name="x" * 50_000))
        assert (await stalled.head()).status_code == 200
        begun = trio.current_time()
        assert await answer_of(served.port, "b") == "b"
        took = trio.current_time() - begun
        assert 0.2 + 0.5 <= took < 10, "far less than the 30 s that a write may stall"
        assert "[DONE]" not in await ending(stalled)


# ---- model servers that fail ----------------------------------------------------------------------


def dies_until(attempt: int, counter, *flags: str, later: Sequence[str] = ()) -> dict[str, object]:
    """A model server with *flags* in each start before the *attempt*th, then with *later*; *counter* counts starts."""
    port = free_port()
    code = (
        "import os, sys; file = open(sys.argv[1], 'a+'); file.write('started\\n'); file.flush(); file.seek(0);"
        f"flags = {list(flags or ['--die-on-request'])} if len(file.readlines()) < {attempt} else {list(later)};"
        "os.execv(sys.executable, [sys.executable, '-S', '-E', *sys.argv[2:], *flags])"
    )
    server = [str(MODEL_SERVER), "--port", str(port), "--name", "a"]
    cmd = [sys.executable, "-S", "-E", "-c", code, str(counter), *server]
    return {"cmd": cmd, "proxy": f"http://127.0.0.1:{port}"}


async def test_a_server_that_died_before_its_first_byte_is_started_again(tmp_path):
    """The request is sent once more to a fresh start, and the client never learns of it (I14)."""
    async with daemon({"a": dies_until(2, tmp_path / "starts")}) as served:
        assert await answer_of(served.port, "a") == "a"
        assert (await fetch(served.port, "GET", "/upstream/a/requests")).json()["started"] == 1
    assert (tmp_path / "starts").read_text() == "started\n" * 2


async def test_the_family_that_a_dead_server_leaves_delays_the_retry_and_spoils_it_not(tmp_path):
    """Its group member ignores SIGTERM, so the sweep lasts longer than a proxy waits for the news of a death."""
    dead = dies_until(2, tmp_path / "starts", "--die-on-request", "--fork")
    async with daemon({"a": {**dead, "unload_timeout": 3.0}}) as served:
        assert await answer_of(served.port, "a") == "a"
    assert (tmp_path / "starts").read_text() == "started\n" * 2


async def test_a_server_that_dies_again_is_a_502(tmp_path):
    """One retry, not more: the answer is an error that says whose fault it was."""
    async with daemon({"a": dies_until(99, tmp_path / "starts")}) as served:
        answer = await fetch(served.port, "POST", CHAT, chat("a"))
    assert answer.status == 502
    assert answer.json()["error"]["code"] == "bad_gateway"
    assert 'model "a" failed' in answer.json()["error"]["message"]
    assert (tmp_path / "starts").read_text() == "started\n" * 2


async def has_stopped(port: int, model: str) -> bool:
    """Whether it does not run, however it came to that."""
    return model not in await running(port) or await is_running(port, model, state="stopped")


async def test_a_server_that_dies_behind_each_error_puts_out_others_twice_at_most():
    """An answer of 5xx is no proof that it works: the second death in a row opens the circuit, as if none had come."""
    models = {
        "bad": scripted("--status", 500, "--die-on-error", backoff=HOUR, backoff_max=HOUR, max_wait=0.0),
        "good": scripted(max_wait=0.0),
    }
    async with daemon(models, turn_lease=0, linger=0) as served:
        found, pids = [], []
        for _ in range(5):
            pids.append((await fetch(served.port, "POST", CHAT, chat("good"))).json()["pid"])
            answer = await fetch(served.port, "POST", CHAT, chat("bad"))
            found.append((answer.status, int(answer["retry-after"] or 0) > HOUR / 2))
            await eventually(partial(has_stopped, served.port, "bad"))
    assert found == [(500, False)] * 2 + [(503, True)] * 3
    assert len(set(pids)) == 3


async def test_a_server_that_lives_on_behind_its_errors_is_asked_again():
    """They open no circuit: what it says next may be an answer."""
    async with daemon({"a": scripted("--status", 500, backoff=HOUR, backoff_max=HOUR)}) as served:
        answers = [await fetch(served.port, "POST", CHAT, chat("a")) for _ in range(3)]
        assert [answer.status for answer in answers] == [500] * 3
        assert await answer_of(served.port, "a", status=200) == "a"


async def test_many_requests_of_a_server_that_died_are_all_retried(tmp_path):
    """Everybody who had no byte yet is served by the one fresh start."""
    async with daemon({"a": dies_until(2, tmp_path / "starts")}) as served:
        await fetch(served.port, "POST", "/api/models/load/a")
        assert await at_once([partial(answer_of, served.port, "a")] * 5) == ["a"] * 5
    assert (tmp_path / "starts").read_text() == "started\n" * 2


async def test_a_server_that_takes_its_time_to_die_loses_nobody(tmp_path, monkeypatch):
    """It serves nobody any more, and ends much later than is usual: who was there, and who comes meanwhile, waits."""
    monkeypatch.setattr("trioswap.runs.DEATH_NOTICE", 0.05)
    dying = dies_until(2, tmp_path / "starts", "--die-on-request", "--dying", "1.0")
    async with daemon({"a": dying}) as served:
        await fetch(served.port, "POST", "/api/models/load/a")

        async def in_time(seconds: float) -> str:
            await trio.sleep(seconds)
            return await answer_of(served.port, "a")

        assert await at_once([partial(in_time, 0.1 * number) for number in range(5)]) == ["a"] * 5
    assert (tmp_path / "starts").read_text() == "started\n" * 2


async def test_who_was_served_waits_again_however_many_wait(tmp_path):
    """`max_queue` is for newcomers: eight are served when the server dies, and all of them wait for the next one."""
    async with daemon({"a": dies_until(2, tmp_path / "starts", "--hold")}, max_queue=2) as served:
        pid = (await fetch(served.port, "GET", "/upstream/a/pid")).json()

        async def kill() -> str:
            await eventually(partial(is_running, served.port, "a", serving=8))
            os.kill(pid, signal.SIGKILL)
            return "a"

        assert await at_once([*[partial(answer_of, served.port, "a")] * 8, kill]) == ["a"] * 9
    assert (tmp_path / "starts").read_text() == "started\n" * 2


async def test_a_second_wait_is_told_like_the_first(tmp_path):
    """The server dies when the stream has begun: the comments go on to say what happens."""
    table = dies_until(2, tmp_path / "starts", "--hold", later=["--ready-delay", "0.5"])
    async with daemon({"a": table}, heartbeat=0.05) as served, await connect(served.port) as client:
        pid = (await fetch(served.port, "GET", "/upstream/a/pid")).json()
        await client.ask("POST", CHAT, chat("a", stream=True))
        assert (await client.head()).status_code == 200
        os.kill(pid, signal.SIGKILL)
        events = (await client.rest()).decode().split("\n\n")
    stages = [event.split()[2] for event in events if event.startswith(": trioswap ")]
    assert stages[0] == "processing"
    assert "loading" in stages
    assert '"a"' in events[len(stages)]


async def test_a_second_wait_is_bounded_like_the_first(tmp_path):
    """The time that was served is not of the wait."""
    table = dies_until(2, tmp_path / "starts", "--hold", later=["--never-ready"])
    async with daemon({"a": {**table, "queue_timeout": 0.5}}) as served, await connect(served.port) as client:
        pid = (await fetch(served.port, "GET", "/upstream/a/pid")).json()
        await client.ask("POST", CHAT, chat("a"))
        await eventually(partial(is_running, served.port, "a", serving=1))
        await trio.sleep(0.6)
        os.kill(pid, signal.SIGKILL)
        assert (await client.head()).status_code == 503
        assert b"waited 0.5 s" in await client.rest()


async def test_a_server_that_dies_in_a_stream_ends_it_with_an_error(tmp_path):
    """What came is passed on, an error ends it, and the request is not sent again; the next one starts it anew."""
    async with daemon({"a": dies_until(2, tmp_path / "starts", "--die-mid-stream", "2")}) as served:
        async with await connect(served.port) as client:
            await client.ask("POST", CHAT, chat("a", stream=True, chunks=9, chunk_delay=0.01))
            assert (await client.head()).status_code == 200
            *events, last = (await client.rest()).decode().strip().split("\n\n")
        assert [json.loads(event.removeprefix("data: "))["model"] for event in events] == ["a", "a"]
        assert "failed while it handled the request" in json.loads(last.removeprefix("data: "))["error"]["message"]
        assert (tmp_path / "starts").read_text() == "started\n"
        assert await answer_of(served.port, "a") == "a"


async def test_a_truncated_answer_has_no_clean_end():
    """Fewer bytes than were declared: the client sees that too."""
    async with daemon({"a": scripted()}) as served, await connect(served.port) as client:
        await client.ask("POST", CHAT, chat("a", truncate=True))
        assert (await client.head()).status_code == 200
        assert await ending(client) == "broken off"
        assert await is_running(served.port, "a", state="ready")


def breaks(directory, last: str) -> dict[str, object]:
    """A model server of which *last* is the last that anybody gets of a stream."""
    port = free_port()
    flags = ["--port", str(port), "--name", "a", "--die-behind", last]
    return {
        "cmd": [sys.executable, "-S", "-E", str(CHAOS_CHILD), str(directory), *flags],
        "proxy": f"http://127.0.0.1:{port}",
    }


@pytest.mark.parametrize("last", ["da", 'data: {"id', '"number": 2, "of": 5}', '"number": 2, "of": 5}\n'])
async def test_a_server_that_dies_within_an_event(tmp_path, last):
    """Nothing of that event reaches the client, so that what is wrong can be told, and read."""
    async with daemon({"a": breaks(tmp_path, last)}) as served:
        answer = await fetch(served.port, "POST", CHAT, chat("a", stream=True, chunks=5, chunk_delay=0.01))
    *events, failed = [json.loads(each.removeprefix("data: ")) for each in answer.text.strip().split("\n\n")]
    assert [event["number"] for event in events] == list(range(2 if "number" in last else 0))
    assert "failed while it handled the request" in failed["error"]["message"]


async def test_a_server_that_dies_behind_the_end_of_its_stream(tmp_path):
    """Nothing is missing, so nobody is told of a failure: the stream is as it is when all goes well."""
    async with daemon({"a": breaks(tmp_path, "data: [DONE]\n\n")}) as served:
        assert await stream_of(served.port, "a", chunks=3) == ["a", "a", "a", "[DONE]"]


async def test_a_peers_answers_end_with_the_daemon():
    """A stream that goes on and on ends with an error that says so, and what has no answer yet gets the same as one."""
    assert LAST_CHANCE < CONNECTION_GRACE
    ends: list[object] = []
    async with by_hand() as peer, trio.open_nursery() as nursery:
        peers = {"p": {"proxy": peer.table("p")["proxy"], "models": ["x"]}}
        async with daemon({"a": scripted()}, peers=peers) as served:

            async def ask(*, answered: bool, task_status: trio.TaskStatus[None]) -> None:
                async with await connect(served.port) as client:
                    await client.ask("POST", CHAT, chat("p/x", stream=answered))
                    async with await asked(peer) as model:
                        if answered:
                            await model.send(h11.Response(status_code=200, headers=EVENTS))
                            await model.send(h11.Data(data=b"data: 1\n\n"))
                            assert await client.piece_of_body() == b"data: 1\n\n"
                        task_status.started()
                        ends.append(await ending(client) if answered else (await client.answer()).status)

            await nursery.start(partial(ask, answered=True))
            await nursery.start(partial(ask, answered=False))
        with trio.fail_after(PATIENCE):
            while len(ends) < 2:
                await wait_all_tasks_blocked(0.01)
    assert set(ends) == {ShuttingDown().message, 503}


async def asked(server) -> Client:
    """The connection on which a whole request came; looks at its health do not count."""
    while True:
        model = await server.accept()
        with contextlib.suppress(h11.RemoteProtocolError):
            while not isinstance(event := await model.next_event(), h11.EndOfMessage | h11.ConnectionClosed):
                pass
            if isinstance(event, h11.EndOfMessage):
                return model
        await model.stream.aclose()


EVENTS = [("content-type", "text/event-stream")]
FAILED = "failed while it handled the request"


@pytest.mark.parametrize(
    ("sent", "end"),
    [
        ([b'data: {"model": "a"}\n\n'], FAILED),
        ([b'data: {"mod'], FAILED),
        ([b'data: {"model": "a"}\n'], FAILED),
        ([b'data: {"model": "a"}\n\ndata: {"mod'], FAILED),
        ([b'data: {"mod', b'el": "a"}\n\n'], FAILED),
        ([b'data: {"mod', b'el": "a', b'"}\n\n'], FAILED),
        ([b'data: {"mod', b'el": "a'], "broken off"),  # more than is kept back
        ([], FAILED),
    ],
)
async def test_a_truncated_stream_ends_with_an_error_event_where_one_can_stand(sent, end):
    """Behind a whole event; within one it would become part of it, so there the connection breaks."""
    assert await ending_of_stream(EVENTS, sent) == end


@pytest.mark.parametrize(
    ("sent", "more"),
    [([], ("content-encoding", "gzip")), ([b"data: 1\n\n"], ("content-length", "30"))],
    ids=["encoded", "of a certain length"],
)
async def test_a_truncated_stream_to_which_nothing_can_be_added(caplog, sent, more):
    """Plain words mean nothing between encoded ones, and none go beyond the length that was declared."""
    assert await ending_of_stream([*EVENTS, more], sent) == "broken off"
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@asynccontextmanager
async def streaming(headers: list[tuple[str, str]], sent: list[bytes]) -> AsyncIterator[tuple[Client, Client]]:
    """The client and the model server of a stream of which *sent* has come, piece by piece."""
    async with by_hand() as server, daemon({"a": server}) as served, await connect(served.port) as client:
        await client.ask("POST", CHAT, chat("a", stream=True))
        async with await server.accept() as model:
            while not isinstance(await model.next_event(), h11.EndOfMessage):
                pass
            await model.send(h11.Response(status_code=200, headers=headers))
            for piece in sent:
                await model.send(h11.Data(data=piece))
                await wait_all_tasks_blocked(0.01)
            assert (await client.head()).status_code == 200
            yield client, model
        await server.close()


async def ending_of_stream(headers: list[tuple[str, str]], sent: list[bytes]) -> str:
    """How the client's stream ends when its server's is broken off behind *sent*."""
    async with streaming(headers, sent) as (client, model):
        await model.stream.aclose()
        end = await ending(client)
    return FAILED if FAILED in end else end


@pytest.mark.parametrize(
    "pieces",
    [
        [b"data: 1\n\n", b"data: 2"],
        [b"data: 1\r\n", b"\r\ndata: 2\r\n", b"\r\n"],
        [b"data: 1\n", b"data: 2\n", b"data: 3\n"],
        [b": c\n\ndata: 1\n"],
    ],
)
async def test_a_stream_that_ends_by_itself_is_passed_on_to_its_last_byte(pieces):
    """Also when its last line is none."""
    async with streaming(EVENTS, pieces) as (client, model):
        await model.send(h11.EndOfMessage())
        assert await client.rest() == b"".join(pieces)


async def test_a_model_server_that_speaks_no_http_is_a_502():
    """Nonsense from the model server becomes an error the client can read; it is not sent again to the same server."""
    async with by_hand() as server, daemon({"a": server}) as served, await connect(served.port) as client:
        await client.ask("POST", CHAT, chat("a"))
        async with await server.accept() as model:
            await model.stream.send_all(b"\x15\x03\x01\x00\x02\x02\x0a not http\r\n\r\n")
            answer = await client.answer()
        await server.close()
    assert answer.status == 502
    assert "does not speak HTTP" in answer.json()["error"]["message"]


# ---- headers ------------------------------------------------------------------------------------


async def test_request_headers_travel_on():
    """The client's address comes along; what it says of others, and what concerns the connection only, does not."""
    sent = {
        "authorization": "Bearer x",
        "x-forwarded-for": "192.0.2.1",
        "connection": "x-mine",
        "x-mine": "1",
        "te": "a",
    }
    async with daemon({"a": scripted()}) as served:
        seen = (await fetch(served.port, "POST", CHAT, chat("a"), *sent.items())).json()["headers"]
    assert seen["authorization"] == "Bearer x"
    assert seen["x-forwarded-for"] == "127.0.0.1"
    assert seen["host"] == "test"
    assert seen["content-length"] == str(len(chat("a")))
    assert not {"connection", "x-mine", "te"} & seen.keys()


async def test_response_headers_travel_back():
    """Status and headers of the model server reach the client; hop-by-hop ones and a second date do not."""
    fields = [
        ("content-type", "text/event-stream"),
        ("set-cookie", "a=1"),
        ("set-cookie", "b=2"),
        ("date", "Thu, 01 Jan 1970 00:00:00 GMT"),
        ("keep-alive", "timeout=5"),
        ("connection", "keep-alive, x-hop"),
        ("x-hop", "1"),
        ("x-request-id", "the model server's own"),
    ]
    async with by_hand() as server, daemon({"a": server}) as served, await connect(served.port) as client:
        await client.ask("POST", CHAT, chat("a"))
        async with await server.accept() as model:
            while not isinstance(await model.next_event(), h11.EndOfMessage):
                pass
            await model.send(h11.InformationalResponse(status_code=102, headers=[]))
            await model.send(h11.Response(status_code=418, headers=fields))
            await model.send(h11.EndOfMessage())
            answer = await client.answer()
        await server.close()
    assert answer.status == 418
    assert [value for name, value in answer.headers if name == "set-cookie"] == ["a=1", "b=2"]
    assert answer["x-accel-buffering"] == "no"
    assert answer["date"] is not None
    assert not answer["date"].startswith("Thu, 01 Jan 1970")
    assert answer["x-request-id"].startswith("req_")
    assert not {"keep-alive", "x-hop"} & {name for name, _ in answer.headers}


async def test_an_error_of_the_model_server_is_passed_on_as_it_is():
    """Its status and body are its own; trioswap adds nothing and retries nothing."""
    async with daemon({"a": scripted("--status", 429)}) as served:
        answer = await fetch(served.port, "POST", CHAT, chat("a"))
        assert answer.status == 429
        assert answer.json()["error"]["message"] == "a says 429"
        assert (await counts(served.model_ports["a"]))["started"] == 1
