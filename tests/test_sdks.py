"""The packages that people use, unmodified, against a daemon that swaps: cold, and through a swap.

A relay before the daemon sees what was on the wire, so that no call passes because there was
nothing to bear.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import anthropic
import openai
import pytest
import trio
from children import PATIENCE
from commands import daemon as daemon_process
from daemons import chat, fetch, write_config
from relay import HEARTBEATS, Behind, Exchange, daemon_behind_relay, failing, served, start_port, well_formed
from sdk_calls import ASKED, CALLS, PROMPT, Call

# Names as people have them: with a slash, with a colon.
MODELS = ("tiny/alpha", "beta:q4")
KEY = "sk-of-the-house"


@contextmanager
def client_of(daemon: Behind, package: str, **options: object) -> Iterator[openai.OpenAI | anthropic.Anthropic]:
    """The client of *package*, which asks *daemon*; it tries only once unless told otherwise."""
    options = {"api_key": "none", "max_retries": 0, "timeout": PATIENCE, **options}
    if package == "openai":
        made = openai.OpenAI(base_url=f"{daemon.url}/v1", **options)
    else:
        made = anthropic.Anthropic(base_url=daemon.url, **options)
    with made as client:
        yield client


BOTH = pytest.mark.parametrize("daemon", ["heartbeats", "loading text"], indirect=True)


@pytest.fixture(scope="module")
def daemon(request, tmp_path_factory) -> Iterator[Behind]:
    """Two models of which one can be resident."""
    directory = tmp_path_factory.mktemp("sdks")
    model = {name: well_formed(directory) for name in MODELS}
    with daemon_behind_relay(directory, model, send_loading_state=request.param == "loading text") as made:
        yield made


@pytest.fixture(scope="module")
def clients(daemon) -> Iterator[dict[str, openai.OpenAI | anthropic.Anthropic]]:
    """One of each package for all calls: they keep their connections, and to make one costs more than a call."""
    with client_of(daemon, "openai") as first, client_of(daemon, "anthropic") as second:
        yield {"openai": first, "anthropic": second}


# ---- every call, cold and through a swap ------------------------------------------------------


@pytest.mark.parametrize(
    ("daemon", "call"),
    [("heartbeats", call) for call in CALLS] + [("loading text", call) for call in CALLS if call.streams],
    ids=lambda value: value.name if isinstance(value, Call) else value,
    indirect=["daemon"],
)
def test_cold_and_through_a_swap(daemon, clients, call):
    """Each call, first with nothing loaded, then with the other model loaded."""
    daemon.unload()
    daemon.relay.taken()
    for model in MODELS:
        assert call.ask(clients[call.package], model) == model
        assert daemon.running() == [model]
        [exchange] = daemon.relay.taken()
        check_wire(exchange, call, loading_text=daemon.loading_text)


def check_wire(exchange: Exchange, call: Call, *, loading_text: bool) -> None:
    """What the package took for an answer has been what it should have been."""
    assert exchange.streams == call.streams
    if not call.streams:
        assert exchange.heartbeats == 0
        return
    # All of them before the first word of the model server.
    ours, _, theirs = bytes(exchange.response).rpartition(b": trioswap ")
    assert exchange.heartbeats >= HEARTBEATS
    assert b"data: " in theirs
    shown = {"/v1/chat/completions": TEXT_IN_CHAT, "/v1/messages": TEXT_IN_MESSAGES}.get(exchange.target)
    if shown is not None:
        assert (shown.search(ours) is not None) == loading_text


TEXT_IN_CHAT = re.compile(rb'data: {[^\n]*"reasoning_content":"(Loading|Waiting for) model ')
TEXT_IN_MESSAGES = re.compile(rb'event: ping\ndata: {"type":"ping","trioswap":{"text":"(Loading|Waiting for) model ')


def test_every_call_is_made():
    """The list is what was asked for, and streams are in it."""
    paths = {"chat", "tools", "completions", "responses", "embeddings", "transcription", "speech", "image", "stream"}
    names = " ".join(call.name for call in CALLS)

    assert all(path in names for path in paths)
    assert {call.package for call in CALLS} == {"openai", "anthropic"}


@BOTH
def test_loading_text_is_seen_as_reasoning(daemon):
    """By whoever shows `reasoning_content`; the answer itself has none of it."""
    daemon.unload()
    with client_of(daemon, "openai") as client:
        chunks = list(client.chat.completions.create(model=MODELS[0], messages=PROMPT, stream=True))
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    shown = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)

    if daemon.loading_text:
        assert f"Loading model {MODELS[0]}" in shown
        assert f"Model {MODELS[0]} is ready" in shown
    else:
        assert shown == ""
    assert "".join(delta.content or "" for delta in deltas).split() == [MODELS[0]] * 3


# ---- the asynchronous clients, on Trio -----------------------------------------------------------


@BOTH
# What the package leaves over after [DONE] is drained by it, but not in the way that Trio wants.
@pytest.mark.filterwarnings("ignore:Async generator '(httpcore|httpx|openai):ResourceWarning")
async def test_async_openai_on_trio(daemon):
    """Two at once for two models, each a stream through a load."""
    daemon.unload()
    said = {}

    async def talk(client: openai.AsyncOpenAI, model: str) -> None:
        async with await client.chat.completions.create(model=model, messages=PROMPT, stream=True) as stream:
            words = [chunk.choices[0].delta.content or "" async for chunk in stream]
        said[model] = "".join(words).split()

    with trio.fail_after(PATIENCE):
        options = {"api_key": "none", "max_retries": 0, "timeout": PATIENCE}
        async with openai.AsyncOpenAI(base_url=f"{daemon.url}/v1", **options) as client, trio.open_nursery() as nursery:
            for model in MODELS:
                nursery.start_soon(talk, client, model)

    assert said == {model: [model] * 3 for model in MODELS}


@BOTH
async def test_async_anthropic_on_trio(daemon):
    """The same with the other package."""
    daemon.unload()
    with trio.fail_after(PATIENCE):
        options = {"api_key": "none", "max_retries": 0, "timeout": PATIENCE}
        async with anthropic.AsyncAnthropic(base_url=daemon.url, **options) as client:
            for model in MODELS:
                async with client.messages.stream(model=model, **ASKED) as stream:
                    said = "".join([text async for text in stream.text_stream])
                assert said.split() == [model] * 3


# ---- what is no model's business ---------------------------------------------------------------


@BOTH
def test_listing_models(daemon):
    """Both packages read the list, and one of it by its name, slash and all."""
    with client_of(daemon, "openai") as client:
        assert sorted(row.id for row in client.models.list()) == sorted(MODELS)
        assert {row.owned_by for row in client.models.list()} == {"trioswap"}
        assert [client.models.retrieve(model).id for model in MODELS] == list(MODELS)
    with client_of(daemon, "anthropic") as client:
        assert sorted(row.id for row in client.models.list()) == sorted(MODELS)
        assert [client.models.retrieve(model).id for model in MODELS] == list(MODELS)


# ---- failures ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trouble(tmp_path_factory) -> Iterator[Behind]:
    """Models that do not start, or not at once, or take no more requests; and keys."""
    directory = tmp_path_factory.mktemp("trouble")
    models = {"good": well_formed(directory), "fails": failing(directory)}
    for package in PLAIN:
        flag = str(directory / package)
        models[f"narrow for {package}"] = served("--formats", concurrency_limit=1)
        models[f"starts the second time for {package}"] = served("--formats", "--killed-unless", flag)
    with daemon_behind_relay(directory, models, api_keys=[KEY]) as made:
        yield made


STREAMING = {
    "openai": {
        "chat": lambda client, model: list(client.chat.completions.create(model=model, messages=PROMPT, stream=True)),
        "completions": lambda client, model: list(client.completions.create(model=model, prompt="go", stream=True)),
        "responses": lambda client, model: list(client.responses.create(model=model, input="go", stream=True)),
        "images": lambda client, model: list(client.images.generate(model=model, prompt="go", stream=True)),
        "transcriptions": lambda client, model: list(
            client.audio.transcriptions.create(model=model, file=("a.wav", b"RIFF"), stream=True)
        ),
    },
    "anthropic": {
        "messages": lambda client, model: list(client.messages.create(model=model, **ASKED, stream=True)),
    },
}
PLAIN = {
    "openai": lambda client, model: client.chat.completions.create(model=model, messages=PROMPT),
    "anthropic": lambda client, model: client.messages.create(model=model, **ASKED),
}
PACKAGES = {"openai": openai, "anthropic": anthropic}


@pytest.mark.parametrize("package", PLAIN)
def test_a_start_that_fails_before_the_answer(trouble, package):
    """A status that the package knows, with the last words of the server."""
    with (
        client_of(trouble, package, api_key=KEY) as client,
        pytest.raises(PACKAGES[package].InternalServerError) as caught,
    ):
        PLAIN[package](client, "fails")

    assert caught.value.status_code == 503
    assert int(caught.value.response.headers["retry-after"]) >= 1
    assert "no such file: weights" in str(caught.value)


@pytest.mark.parametrize(
    ("package", "call"), [(package, name) for package, calls in STREAMING.items() for name in calls]
)
def test_a_start_that_fails_in_the_stream(trouble, package, call):
    """Heartbeats have been sent, so there is no status any more; the package raises all the same."""
    trouble.relay.taken()
    with client_of(trouble, package, api_key=KEY) as client, pytest.raises(PACKAGES[package].APIError) as caught:
        STREAMING[package][call](client, "fails")
    [exchange] = trouble.relay.taken()

    assert exchange.response.startswith(b"HTTP/1.1 200 ")
    assert exchange.heartbeats >= HEARTBEATS
    assert "no such file: weights" in str(caught.value)


@pytest.mark.parametrize("package", PLAIN)
def test_a_model_server_that_dies_in_its_answer(trouble, package):
    """Half an answer is not taken for a whole one."""
    script = {"script": {"formats": False, "die_mid_stream": 2}}
    with client_of(trouble, package, api_key=KEY) as client:
        create = client.chat.completions.create if package == "openai" else client.messages.create
        stream = create(model="good", **ASKED, stream=True, extra_body=script)
        with pytest.raises(PACKAGES[package].APIError, match="failed while"):
            list(stream)


@pytest.mark.parametrize("package", PLAIN)
def test_a_model_server_that_refuses(trouble, package):
    """In the stream its words are an APIError; where no stream has begun, its status and class are its own."""
    script = {"script": {"status": 400}}
    trouble.unload()
    with client_of(trouble, package, api_key=KEY) as client:
        create = client.chat.completions.create if package == "openai" else client.messages.create
        stream = create(model="good", **ASKED, stream=True, extra_body=script)
        with pytest.raises(PACKAGES[package].APIError, match="good says 400"):
            list(stream)
        with pytest.raises(PACKAGES[package].BadRequestError, match="good says 400"):
            create(model="good", **ASKED, extra_body=script)
        with pytest.raises(PACKAGES[package].BadRequestError, match="good says 400"):
            create(model="good", **ASKED, stream=True, extra_body=script)


@pytest.mark.parametrize("package", PLAIN)
def test_a_model_that_nobody_knows(trouble, package):
    """NotFoundError, and what was probably meant."""
    with client_of(trouble, package, api_key=KEY) as client, pytest.raises(PACKAGES[package].NotFoundError) as caught:
        PLAIN[package](client, "goood")

    assert 'did you mean "good"' in str(caught.value)


@pytest.mark.parametrize("package", PLAIN)
def test_a_wrong_key(trouble, package):
    """AuthenticationError."""
    with client_of(trouble, package, api_key="sk-guessed") as client:
        with pytest.raises(PACKAGES[package].AuthenticationError):
            PLAIN[package](client, "good")
        with pytest.raises(PACKAGES[package].AuthenticationError):
            client.models.list()


@pytest.mark.parametrize("package", PLAIN)
def test_more_than_are_let_in(trouble, package):
    """RateLimitError, with the time after which to try again."""
    model = f"narrow for {package}"
    held = chat(model, stream=True, formats=False, chunk_delay=10 * PATIENCE)
    with (
        trouble.ask("POST", "/v1/chat/completions", held) as answer,
        client_of(trouble, package, api_key=KEY) as client,
    ):
        assert answer.status == 200
        with pytest.raises(PACKAGES[package].RateLimitError, match="no more are let in") as caught:
            PLAIN[package](client, model)

    assert int(caught.value.response.headers["retry-after"]) >= 1


@pytest.mark.parametrize("package", PLAIN)
def test_the_package_tries_again(trouble, package):
    """After a 503 it waits as long as Retry-After says, and has its answer."""
    trouble.relay.taken()
    with client_of(trouble, package, api_key=KEY, max_retries=1) as client:
        done = PLAIN[package](client, f"starts the second time for {package}")
    first, second = trouble.relay.taken()

    assert first.response.startswith(b"HTTP/1.1 503 ")
    assert b"\r\nretry-after: 1\r\n" in first.response
    assert second.response.startswith(b"HTTP/1.1 200 ")
    assert done.model == f"starts the second time for {package}"


# ---- curl ----------------------------------------------------------------------------------------

needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
BODY = json.dumps({"model": MODELS[0], "messages": PROMPT})
CURL = {
    # `-d` alone declares a form.
    "a body that is called a form": ["/v1/chat/completions", "-d", BODY],
    "JSON": ["/v1/chat/completions", "--json", BODY],
    "a stream": ["/v1/chat/completions", "--no-buffer", "-d", BODY[:-1] + ', "stream": true}'],
    "an upload": ["/v1/audio/transcriptions", "-F", f"model={MODELS[0]}", "-F", "file=@{upload};type=audio/wav"],
    "an upload in pieces": [
        *("/v1/audio/transcriptions", "-H", "Transfer-Encoding: chunked"),
        *("-F", "file=@{upload}", "-F", f"model={MODELS[0]}"),
    ],
    "HTTP/1.0": ["/v1/chat/completions", "--http1.0", "--json", BODY],
}


async def curl(*arguments: str) -> str:
    """What `curl ARGUMENTS` writes; it fails where curl does, also for a status of 400 and above."""
    command = ["curl", "--silent", "--show-error", "--fail-with-body", "--max-time", str(PATIENCE), *arguments]
    with trio.fail_after(PATIENCE):
        return (await trio.run_process(command, capture_stdout=True)).stdout.decode()


@needs_curl
@pytest.mark.parametrize("daemon", ["heartbeats"], indirect=True)
@pytest.mark.parametrize("name", CURL)
async def test_curl(daemon, tmp_path, name):
    """As people type it, cold."""
    upload = tmp_path / "a.wav"
    upload.write_bytes(bytes(1_500_000))  # more than is kept in memory
    daemon.unload()
    daemon.relay.taken()
    path, *arguments = [word.replace("{upload}", str(upload)) for word in CURL[name]]
    said = await curl(f"{daemon.url}{path}", *arguments)
    [exchange] = daemon.relay.taken()

    assert MODELS[0] in said
    assert exchange.streams == (name == "a stream")
    assert (exchange.heartbeats >= HEARTBEATS) == exchange.streams
    if exchange.streams:
        assert said.endswith("data: [DONE]\n\n")


@needs_curl
async def test_curl_at_a_socket(tmp_path):
    """`--unix-socket`, through a swap."""
    path = tmp_path / "socket"
    config = write_config(
        tmp_path, {name: served("--formats") for name in MODELS}, listen=f"unix:{path}", start_port=start_port()
    )
    async with daemon_process("serve", "-c", config):
        for model in MODELS:
            body = json.dumps({"model": model, "messages": PROMPT})
            said = await curl("--unix-socket", str(path), "http://trioswap/v1/chat/completions", "-d", body)
            assert json.loads(said)["choices"][0]["message"]["content"] == model


# ---- Open WebUI ----------------------------------------------------------------------------------


async def test_what_open_webui_asks(trouble):
    """Its requests, one after the other, as its back end sends them."""
    trouble.relay.taken()
    port = trouble.relay.port
    plain = [("content-type", "application/json"), ("user-agent", "Python/3.11 aiohttp/3.11.11")]
    refused = await fetch(port, "GET", "/v1/models", b"", *plain)
    assert (refused.status, refused.json()["error"]["code"]) == (401, "unauthorized")

    headers = [*plain, ("authorization", f"Bearer {KEY}"), ("x-openwebui-user-name", "Zo%C3%AB")]
    listed = (await fetch(port, "GET", "/v1/models", b"", *headers)).json()
    assert listed["object"] == "list"
    for row in listed["data"]:
        assert row["object"] == "model"
        assert isinstance(row["id"], str)
        assert isinstance(row["owned_by"], str)
        assert isinstance(row["created"], int)
    assert "good" in {row["id"] for row in listed["data"]}

    answer = await fetch(port, "POST", "/v1/chat/completions", json.dumps(OPEN_WEBUI_CHAT).encode(), *headers)
    assert answer.status == 200
    # By this header it decides whether to pass the answer on in pieces.
    assert "text/event-stream" in answer["content-type"]
    *lines, done = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    assert done == "[DONE]"
    chunks = [json.loads(line) for line in lines]
    assert "".join(choice["delta"].get("content") or "" for c in chunks for choice in c["choices"]) == "good " * 3
    assert chunks[-1]["usage"]["total_tokens"] == 4


OPEN_WEBUI_CHAT = {
    "stream": True,
    "model": "good",
    "messages": [{"role": "user", "content": [{"type": "text", "text": "say something"}]}],
    "stream_options": {"include_usage": True},
}
