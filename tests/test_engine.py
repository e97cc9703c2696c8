"""The embedded engine as a real child: it serves, it stops when told, and it says what is wrong."""

from __future__ import annotations

import json
import signal
import socket
import sys

import pytest
import trio
from children import PATIENCE, ask, read_until, running

from trioswap.tinymodels import CONTEXT, WORDS, write_tiny_models

pytestmark = pytest.mark.llama

CHAT = {"model": "any", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    return write_tiny_models(tmp_path_factory.mktemp("models"))


def engine(model, *flags, port=0):
    # One thread: several would wait for each other in a spin, which takes ages on a busy machine.
    head = (sys.executable, "-m", "trioswap.engine", "--threads", "1")
    return (*head, "--model", str(model), "--port", str(port), *flags)


async def port_of(server):
    """The port it chose; known only when it serves."""
    said = await read_until(server, "\n")
    assert said.startswith("listening on http://127.0.0.1:")
    return int(said.rpartition(":")[2])


async def post(port, path, request):
    status, body = await ask(port, "POST", path, json.dumps(request).encode(), "Content-Type: application/json")
    return status, unframed(body)


def unframed(body):
    """The JSON of a plain answer, or the list of events of a stream."""
    if body.startswith(b"{"):
        return json.loads(body)
    return [line.removeprefix("data: ") for line in body.decode().splitlines() if line.startswith("data: ")]


async def failing(*argv):
    """Run an engine that ends by itself; return its exit code and the one line that it says in its own name."""
    with trio.fail_after(PATIENCE):
        result = await trio.run_process(argv, check=False, capture_stdout=True, capture_stderr=True)
    assert result.stdout == b""
    (line,) = (line for line in result.stderr.decode().splitlines() if line.startswith("trioswap.engine: "))
    return result.returncode, line


@pytest.mark.parametrize("name", WORDS)
async def test_it_serves_the_model_it_was_given(models, name):
    """Healthy as soon as it says that it listens; answers are in the model's own words, under its file's name."""
    async with running(engine(models[name])) as server:
        port = await port_of(server)
        assert await ask(port, "GET", "/health") == (200, b'{"status":"ok"}')
        status, answer = await post(port, "/v1/chat/completions", CHAT)
        assert status == 200
        said = answer["choices"][0]["message"]["content"].split()
        assert said
        assert set(said) <= set(WORDS[name])
        assert answer["model"] == f"{name}.gguf"


async def test_it_streams_under_its_alias(models):
    """Each event carries the alias, and together they are an answer."""
    async with running(engine(models["colors"], "--alias", "my/model:1")) as server:
        port = await port_of(server)
        status, (*events, done) = await post(port, "/v1/chat/completions", {**CHAT, "stream": True, "temperature": 0})
        assert (status, done) == (200, "[DONE]")
        chunks = [json.loads(event) for event in events]
        assert {chunk["model"] for chunk in chunks} == {"my/model:1"}
        said = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
        assert said.split() == list(WORDS["colors"])
        _, answer = await post(port, "/v1/chat/completions", CHAT)
        assert answer["model"] == "my/model:1"


async def test_one_request_may_fill_the_context_beside_free_slots(models):
    """The context is not cut into one part for each slot; what passes it is refused as too long."""
    async with running(engine(models["colors"], "-c", "512", "-np", "4")) as server:
        port = await port_of(server)
        _, slots = await slots_of(port)
        assert [slot["n_ctx"] for slot in slots] == [512] * 4
        long = {**CHAT, "messages": [{"role": "user", "content": "x" * 400}]}
        assert (await post(port, "/v1/chat/completions", long))[0] == 200
        longer = {**CHAT, "messages": [{"role": "user", "content": "x" * 600}]}
        status, answer = await post(port, "/v1/chat/completions", longer)
        assert (status, answer["error"]["type"]) == (400, "exceed_context_size_error")


async def test_the_context_is_never_larger_than_the_model_s_own(models):
    """By default 4096 tokens, of which this model knows what to do with half."""
    async with running(engine(models["colors"])) as server:
        _, slots = await slots_of(await port_of(server))
        assert {slot["n_ctx"] for slot in slots} == {CONTEXT}


async def slots_of(port):
    status, body = await ask(port, "GET", "/slots")
    return status, json.loads(body)


async def test_it_serves_embeddings_and_chat_at_once(models):
    """Vectors of the model's width, the same for the same text, for inputs as long as the context."""
    async with running(engine(models["colors"], "--embeddings", "--pooling", "mean")) as server:
        port = await port_of(server)
        texts = ["hi", "hi", "ho", "x" * (CONTEXT - 100)]
        status, answer = await post(port, "/v1/embeddings", {"model": "any", "input": texts})
        assert status == 200
        first, second, other, long = (entry["embedding"] for entry in answer["data"])
        assert len(first) == len(long) == 64
        assert first == pytest.approx(second, abs=1e-4)
        assert first != pytest.approx(other, abs=1e-4)
        assert (await post(port, "/v1/chat/completions", CHAT))[0] == 200


async def test_a_chat_template_of_ones_own_is_used(models, tmp_path):
    """It stands in for the model's, so a prompt of another length reaches the model."""
    template = tmp_path / "template.jinja"
    template.write_text("{{ 'x' * 77 }}")
    async with running(engine(models["colors"], "--chat-template-file", str(template))) as server:
        _, answer = await post(await port_of(server), "/v1/chat/completions", CHAT)
        # The beginning of the text and the space that SentencePiece puts in front come on top.
        assert answer["usage"]["prompt_tokens"] == 77 + 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
async def test_it_stops_with_zero_in_the_middle_of_an_answer(models, number):
    """It does not wait for the answers it is generating."""
    async with running(engine(models["colors"])) as server:
        port = await port_of(server)
        endless = json.dumps({"prompt": "hi", "n_predict": -1, "ignore_eos": True, "stream": True}).encode()
        async with await trio.open_tcp_stream("127.0.0.1", port) as client:
            await client.send_all(b"POST /completion HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(endless) + endless)
            with trio.fail_after(PATIENCE):
                assert (await client.receive_some()).startswith(b"HTTP/1.1 200")
                server.send_signal(number)
                assert await server.wait() == 0


async def test_a_missing_file_is_named(tmp_path):
    """One line, and exit code 1."""
    pytest.importorskip("xllamacpp")
    missing = tmp_path / "missing.gguf"
    code, line = await failing(*engine(missing))
    assert (code, line) == (1, f"trioswap.engine: cannot read {missing}: No such file or directory")


@pytest.mark.parametrize("content", [b"", b"this is no model", "half"], ids=["empty", "text", "half a model"])
async def test_a_file_that_is_no_model_is_named(models, tmp_path, content):
    """llama.cpp says why, our line says what."""
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(models["colors"].read_bytes()[:100_000] if content == "half" else content)
    code, line = await failing(*engine(bad))
    assert code == 1
    assert line == f"trioswap.engine: cannot serve {bad} on 127.0.0.1 port 0; the lines of llama.cpp say why"


async def test_a_port_in_use_is_named(models):
    """The same for the port."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, line = await failing(*engine(models["colors"], port=port))
    assert code == 1
    assert f"on 127.0.0.1 port {port};" in line


async def test_without_the_wheel_it_names_the_command(tmp_path):
    """One line with the pip command, and exit code 2."""
    code = "import sys, trioswap.engine as e; sys.modules['xllamacpp'] = None; e.main(sys.argv[1:])"
    result = await failing(sys.executable, "-c", code, "-m", str(tmp_path / "any"), "--port", "0")
    hint = "trioswap.engine: the wheel xllamacpp is not installed; run: pip install 'trioswap[llama]'"
    assert result == (2, hint)


@pytest.mark.parametrize("flags", [("--port", "65536"), ("-c", "-1"), ("-np", "0"), ("-t", "x"), ("--pooling", "none")])
async def test_bad_arguments_are_refused(tmp_path, flags):
    """Exit code 2 and the flag by its name, before anything is loaded."""
    code, line = await failing(*engine(tmp_path / "any"), *flags)
    assert code == 2
    assert flags[0] in line
