"""The packages that people use, with the real engine behind: cold, and through a swap, heartbeats in every stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from children import PATIENCE
from relay import Behind, daemon_behind_relay

from trioswap.tinymodels import WORDS, write_tiny_models

pytest.importorskip("xllamacpp")
openai = pytest.importorskip("openai")
anthropic = pytest.importorskip("anthropic")

pytestmark = pytest.mark.llama

PROMPT = [{"role": "user", "content": "say something"}]
ASKED = {"messages": PROMPT, "max_tokens": 8}
# As little as makes them small and quick; the last two for embeddings.
ARGS = ["--threads", "1", "--ctx-size", "512", "--pooling", "mean", "--embeddings"]


@pytest.fixture(scope="module", params=["heartbeats", "loading text"])
def daemon(request, tmp_path_factory) -> Iterator[Behind]:
    """Two tiny models, one of them resident, and a heartbeat so short that no load is without one."""
    directory = tmp_path_factory.mktemp("llama")
    models = {name: {"gguf": str(path), "args": ARGS} for name, path in write_tiny_models(directory).items()}
    settings = {"heartbeat": "2ms", "send_loading_state": request.param == "loading text"}
    with daemon_behind_relay(directory, models, **settings) as made:
        yield made


# ---- what they say ---------------------------------------------------------------------------


def chat(client: openai.OpenAI, model: str) -> str:
    return client.chat.completions.create(model=model, **ASKED).choices[0].message.content


def chat_stream(client: openai.OpenAI, model: str) -> str:
    chunks = client.chat.completions.create(model=model, **ASKED, stream=True)
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


def chat_helper(client: openai.OpenAI, model: str) -> str:
    with client.chat.completions.stream(model=model, messages=PROMPT) as stream:
        return stream.until_done().get_final_completion().choices[0].message.content


def completions_stream(client: openai.OpenAI, model: str) -> str:
    chunks = client.completions.create(model=model, prompt="go", max_tokens=8, stream=True)
    return "".join(choice.text for chunk in chunks for choice in chunk.choices)


def responses(client: openai.OpenAI, model: str) -> str:
    return client.responses.create(model=model, input="go", max_output_tokens=8).output_text


def responses_stream(client: openai.OpenAI, model: str) -> str:
    events = list(client.responses.create(model=model, input="go", max_output_tokens=8, stream=True))
    assert (events[0].type, events[-1].type) == ("response.created", "response.completed")
    return "".join(event.delta for event in events if event.type == "response.output_text.delta")


def messages(client: anthropic.Anthropic, model: str) -> str:
    return client.messages.create(model=model, **ASKED).content[0].text


def messages_stream(client: anthropic.Anthropic, model: str) -> str:
    with client.messages.stream(model=model, **ASKED) as stream:
        return stream.get_final_message().content[0].text


TEXTS = [chat, chat_stream, chat_helper, completions_stream, responses, responses_stream, messages, messages_stream]


def ask(daemon: Behind, call: Callable[..., object], model: str) -> object:
    """What *call* returns, with the client that it takes."""
    options = {"api_key": "none", "max_retries": 0, "timeout": PATIENCE}
    if "messages" in call.__name__:
        with anthropic.Anthropic(base_url=daemon.url, **options) as client:
            return call(client, model)
    with openai.OpenAI(base_url=f"{daemon.url}/v1", **options) as client:
        return call(client, model)


# ---- through loads -----------------------------------------------------------------------------


@pytest.mark.parametrize("call", TEXTS, ids=lambda call: call.__name__)
def test_text(daemon, call):
    """Words of the model that was asked, with nothing loaded and with the other one loaded."""
    daemon.unload()
    daemon.relay.taken()
    for model in WORDS:
        words = ask(daemon, call, model).split()
        [exchange] = daemon.relay.taken()

        assert words
        assert set(words) <= set(WORDS[model])
        assert daemon.running() == [model]
        assert exchange.streams == (exchange.heartbeats > 0)
        assert exchange.streams == ("stream" in call.__name__ or "helper" in call.__name__)


def test_embeddings(daemon):
    """As base64, which the package asks for, and as numbers: the same ones."""

    def as_it_likes(client: openai.OpenAI, model: str) -> list[float]:
        return client.embeddings.create(model=model, input="go").data[0].embedding

    def as_numbers(client: openai.OpenAI, model: str) -> list[float]:
        return client.embeddings.create(model=model, input="go", encoding_format="float").data[0].embedding

    daemon.unload()
    for model in WORDS:
        numbers = ask(daemon, as_numbers, model)
        assert daemon.running() == [model]
        assert len(numbers) > 0
        assert ask(daemon, as_it_likes, model) == pytest.approx(numbers, abs=1e-5)


def test_counting_tokens(daemon):
    """Anthropic's way to ask before asking."""

    def messages_tokens(client: anthropic.Anthropic, model: str) -> int:
        return client.messages.count_tokens(model=model, messages=PROMPT).input_tokens

    daemon.unload()
    for model in WORDS:
        assert ask(daemon, messages_tokens, model) > 0
        assert daemon.running() == [model]
