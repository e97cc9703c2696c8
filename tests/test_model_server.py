"""The contract of the scriptable model server, on which the tests of everything else rest."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import openai
import pytest
import trio
from children import PATIENCE, ask, free_port, model_argv, read_until, running, wait_gone

HELLO = json.dumps({"model": "m", "messages": []}).encode()


def streaming(**script):
    return json.dumps({"model": "m", "messages": [], "stream": True, "script": script}).encode()


def events(body):
    """The data of each event in a body with chunked framing."""
    return [line.removeprefix("data: ") for line in body.decode().splitlines() if line.startswith("data: ")]


async def requests_of(port):
    _, body = await ask(port, "GET", "/requests")
    return json.loads(body)


async def settled(port, **expected):
    """Ask until the counts are as expected: they change in threads of the server."""
    with trio.fail_after(PATIENCE):
        while await requests_of(port) != expected:
            await trio.lowlevel.checkpoint()


async def test_it_answers_health_pid_and_raw_targets():
    """Reports do not count as requests; every other GET shows the target as it was sent."""
    port = free_port()
    async with running(model_argv("m", port=port), until="ready") as server:
        assert await ask(port, "GET", "/health") == (200, b"ok")
        assert await ask(port, "GET", "/pid") == (200, str(server.pid).encode())
        assert await ask(port, "GET", "/a%2Fb//c?x=%20;y") == (200, b"m /a%2Fb//c?x=%20;y")
        assert await requests_of(port) == {"started": 1, "finished": 1, "aborted": 0}


async def test_a_post_is_echoed_with_the_name_of_the_server():
    """So that a test knows who answered, and what reached it."""
    port = free_port()
    async with running(model_argv("m", port=port), until="ready") as server:
        status, body = await ask(port, "POST", "/v1/x?y", HELLO, "X-Extra: 1")
        answer = json.loads(body)
        assert status == 200
        assert (answer["model"], answer["pid"], answer["path"]) == ("m", server.pid, "/v1/x?y")
        assert answer["echo"] == json.loads(HELLO)
        assert answer["headers"]["x-extra"] == "1"


async def test_it_tells_what_it_has_seen():
    """The last request that counted: every header in its order, and every byte of the body."""
    port = free_port()
    async with running(model_argv("m", port=port), until="ready"):
        assert await ask(port, "GET", "/seen") == (200, b"null")
        status, body = await ask(port, "POST", "/v1/audio/speech", b"\xff\n", "X-A: 1", "x-a: 2")
        assert (status, body) == (200, b"\xff\xfbm")
        seen = json.loads((await ask(port, "GET", "/seen"))[1])
        assert (seen["method"], seen["target"], seen["body"]) == ("POST", "/v1/audio/speech", "\xff\n")
        assert seen["headers"][-2:] == [["x-a", "1"], ["x-a", "2"]]
        assert json.loads((await ask(port, "POST", "/v1/rerank", HELLO))[1])["results"][0]["index"] == 0


async def test_one_connection_carries_many_requests_with_either_kind_of_body():
    """Keep-alive, Content-Length and chunked request bodies."""
    port = free_port()
    async with running(model_argv("m", port=port), until="ready"):
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            sized = b"POST /1 HTTP/1.1\r\nContent-Length: 3\r\n\r\n[1]"
            chunked = b"POST /2 HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n[\r\n2\r\n2]\r\n0\r\n\r\n"
            await stream.send_all(sized + chunked + b"GET /end HTTP/1.1\r\nConnection: close\r\n\r\n")
            with trio.fail_after(PATIENCE):
                answers = b"".join([data async for data in stream])
        assert b'"path": "/1"' in answers
        assert b'"echo": [1]' in answers
        assert b'"path": "/2"' in answers
        assert b'"echo": [2]' in answers
        assert answers.endswith(b"m /end")


async def test_a_stream_is_events_and_an_end():
    """As many events as asked for, then [DONE] and the last chunk."""
    port = free_port()
    async with running(model_argv("m", "--chunks", 2, port=port), until="ready"):
        _, body = await ask(port, "POST", "/v1/chat/completions", streaming())
        *chunks, done = events(body)
        assert [json.loads(chunk)["choices"][0]["delta"]["content"] for chunk in chunks] == ["m ", "m "]
        assert done == "[DONE]"
        assert body.endswith(b"\r\n0\r\n\r\n")
        _, body = await ask(port, "POST", "/v1/chat/completions", streaming(chunks=5))
        assert len(events(body)) == 6


async def test_the_openai_sdk_understands_it():
    """Non-stream and stream, parsed by the client that people use."""
    port = free_port()

    def talk():
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
            whole = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}])
            parts = client.chat.completions.create(model="m", messages=[], stream=True)
            return whole.choices[0].message.content, "".join(part.choices[0].delta.content for part in parts)

    async with running(model_argv("m", port=port), until="ready"):
        assert await trio.to_thread.run_sync(talk) == ("m", "m m m ")


async def test_a_server_that_never_gets_ready_says_so():
    """It listens and answers 503."""
    port = free_port()
    async with running(model_argv("m", "--never-ready", port=port), until="listening"):
        assert await ask(port, "GET", "/health") == (503, b"loading")


async def test_ready_comes_after_the_delay():
    """503 before, 200 after; the line on stdout comes when it is true."""
    port = free_port()
    async with running(model_argv("m", "--ready-delay", 0.3, port=port), until="listening") as server:
        await read_until(server, "ready")
        assert await ask(port, "GET", "/health") == (200, b"ok")


async def test_the_port_is_bound_after_the_delay():
    """A lower bound holds on any machine, however slow."""
    started = trio.current_time()
    async with running(model_argv("m", "--bind-delay", 0.2, port=free_port()), until="listening"):
        assert trio.current_time() - started >= 0.2


async def test_it_takes_its_time_to_stop():
    """The same for the exit after SIGTERM."""
    async with running(model_argv("m", "--stop-delay", 0.2, port=free_port()), until="ready") as server:
        told = trio.current_time()
        server.terminate()
        assert await server.wait() == 0
        assert trio.current_time() - told >= 0.2


async def test_exit_at_start_has_its_code():
    """As of a server that cannot load its model."""
    result = await trio.run_process(
        model_argv("m", "--exit-at-start", 7, port=1), check=False, capture_stdout=True, capture_stderr=True
    )
    assert (result.returncode, result.stdout, result.stderr) == (7, b"", b"m: cannot load the model\n")


@pytest.mark.parametrize("flags", [("--exit-after", 0.05), ("--exit-after", 0.05, "--wrong-port")])
async def test_exit_after_a_while(flags):
    """As of a server that crashes, whatever it is doing."""
    async with running(model_argv("m", *flags, port=free_port())) as server:
        assert await server.wait() == 1


async def test_sigterm_ends_it_and_can_be_ignored():
    """Exit code 0 on SIGTERM; with the flag it goes on answering."""
    port = free_port()
    async with running(model_argv("m", port=port), until="ready") as server:
        server.terminate()
        assert await server.wait() == 0
    port = free_port()
    async with running(model_argv("m", "--ignore-sigterm", port=port), until="ready") as server:
        server.terminate()
        assert await ask(port, "GET", "/health") == (200, b"ok")


async def test_what_it_leaves_behind_outlives_it():
    """The fork and the escapee ignore SIGTERM; the one is in the session, the other is not."""
    port = free_port()
    async with running(model_argv("m", "--fork", "--setsid-child", port=port), until="ready") as server:
        in_session, escaped = json.loads((await ask(port, "GET", "/children"))[1])
        try:
            assert os.getsid(in_session) == server.pid != os.getsid(escaped)
            server.terminate()
            await server.wait()
            assert ignores(in_session, signal.SIGTERM)
            assert ignores(escaped, signal.SIGTERM)
        finally:
            for pid in (in_session, escaped):
                os.kill(pid, signal.SIGKILL)
                await wait_gone(pid)


def ignores(pid, number):
    status = Path(f"/proc/{pid}/status").read_text()
    (mask,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigIgn:"))
    return bool(int(mask, 16) >> (number - 1) & 1)


async def test_the_fork_holds_stdout_and_the_escapee_does_not():
    """After the server's end its output ends at once, or only with the fork."""
    port = free_port()
    async with running(model_argv("m", "--setsid-child", port=port), until="ready") as server:
        (escaped,) = json.loads((await ask(port, "GET", "/children"))[1])
        try:
            server.terminate()
            with trio.fail_after(PATIENCE):
                assert await server.stdout.receive_some() == b""
        finally:
            os.kill(escaped, signal.SIGKILL)
    port = free_port()
    async with running(model_argv("m", "--fork", port=port), until="ready") as server:
        (fork,) = json.loads((await ask(port, "GET", "/children"))[1])
        server.terminate()
        await server.wait()
        assert stdout_of(fork) == os.fstat(server.stdout.fileno()).st_ino
        os.kill(fork, signal.SIGKILL)


def stdout_of(pid):
    """The inode of what the process writes to: both ends of a pipe have the same."""
    return Path(f"/proc/{pid}/fd/1").stat().st_ino


async def test_spam_is_one_line_without_an_end():
    """More than a pipe holds, and it arrives whole."""
    port = free_port()
    async with running(model_argv("m", "--spam", 200_000, port=port), until="") as server:
        assert (await read_until(server, "listening\n")).startswith("x" * 200_000 + "listening\n")


async def test_silent_prints_nothing():
    """Not even that it listens."""
    argv = model_argv("m", "--silent", "--exit-after", 0.05, port=free_port())
    result = await trio.run_process(argv, check=False, capture_stdout=True, capture_stderr=True)
    assert (result.returncode, result.stdout, result.stderr) == (1, b"", b"")


async def test_a_client_that_leaves_is_counted():
    """Before the answer, in the middle of a stream, and with a server that never answers."""
    port = free_port()
    async with running(model_argv("m", "--chunk-delay", 60, port=port), until="ready"):
        bodies = [
            streaming(),
            HELLO[:-1] + b', "script": {"answer_delay": 60}}',
            HELLO[:-1] + b', "script": {"hold": true}}',
        ]
        for number, body in enumerate(bodies):
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                await stream.send_all(b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
                await settled(port, started=number + 1, finished=0, aborted=number)
            await settled(port, started=number + 1, finished=0, aborted=number + 1)


async def test_hold_answers_its_health_and_nothing_else():
    """The request stays open, the server looks well."""
    port = free_port()
    async with (
        running(model_argv("m", "--hold", port=port), until="ready"),
        await trio.open_tcp_stream("127.0.0.1", port) as stream,
    ):
        await stream.send_all(b"GET / HTTP/1.1\r\n\r\n")
        await settled(port, started=1, finished=0, aborted=0)
        assert await ask(port, "GET", "/health") == (200, b"ok")


@pytest.mark.parametrize("events_before", [0, 2, 3])
async def test_death_in_a_stream_comes_after_so_many_events(events_before):
    """The stream breaks off without an end, and the process is gone."""
    port = free_port()
    async with running(model_argv("m", "--die-mid-stream", events_before, port=port), until="ready") as server:
        status, body = await ask(port, "POST", "/", streaming())
        assert status == 200
        assert len(events(body)) == events_before
        assert not body.endswith(b"0\r\n\r\n")
        assert await server.wait() == 3


async def test_death_on_a_request_comes_before_any_byte():
    """Only a POST kills it."""
    port = free_port()
    async with running(model_argv("m", "--die-on-request", port=port), until="ready") as server:
        assert (await ask(port, "GET", "/"))[0] == 200
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(b"POST / HTTP/1.1\r\nContent-Length: 0\r\n\r\n")
            with trio.fail_after(PATIENCE):
                assert await stream.receive_some() == b""
        assert await server.wait() == 3


async def test_truncate_ends_the_body_too_early():
    """Less than declared; a stream stops without [DONE] and without the last chunk."""
    port = free_port()
    async with running(model_argv("m", "--truncate", port=port), until="ready"):
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(b"POST / HTTP/1.1\r\nContent-Length: 0\r\n\r\n")
            with trio.fail_after(PATIENCE):
                head, _, body = b"".join([data async for data in stream]).partition(b"\r\n\r\n")
        assert int(head.rpartition(b":")[2]) == len(body) + 100
        _, body = await ask(port, "POST", "/", streaming())
        assert len(events(body)) == 3
        assert not body.endswith(b"0\r\n\r\n")


async def test_a_status_for_every_post():
    """An error in OpenAI's shape, with the code asked for."""
    port = free_port()
    async with running(model_argv("m", "--status", 429, port=port), until="ready"):
        status, body = await ask(port, "POST", "/", HELLO)
        assert (status, json.loads(body)["error"]["message"]) == (429, "m says 429")
