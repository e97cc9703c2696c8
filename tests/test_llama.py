"""The whole thing with the real engine: llama.cpp servers swapped behind real SDK clients."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from trioswap.tinymodels import WORDS, write_tiny_models

openai = pytest.importorskip("openai")
anthropic = pytest.importorskip("anthropic")

pytestmark = pytest.mark.llama

PROMPT = [{"role": "user", "content": "say something"}]


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> Iterator[str]:
    """A daemon with two tiny models, one resident at a time."""
    directory: Path = tmp_path_factory.mktemp("llama")
    models = [
        f"[models.{name}]\ngguf = {json.dumps(str(path))}\n"
        'args = ["--threads", "1", "--ctx-size", "512", "--pooling", "mean", "--embeddings"]\n'
        for name, path in write_tiny_models(directory).items()
    ]
    config = directory / "trioswap.toml"
    config.write_text('listen = "127.0.0.1:0"\nstart_port = 15800\n' + "\n".join(models))
    argv = [sys.executable, "-m", "trioswap", "serve", "-c", str(config)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as daemon:
        yield daemon.stdout.readline().split()[-1]
        daemon.send_signal(signal.SIGTERM)

        assert daemon.wait(60) == 0


@pytest.fixture
def client(url) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def check_words(text: str, model: str) -> None:
    words = text.split()

    assert words
    assert set(words) <= set(WORDS[model]), f"not the words of {model}: {text!r}"


def test_openai_chat_across_twenty_swaps(client):
    """Each request goes to the model that is not resident; plain and streamed answers alternate."""
    for model, streamed in itertools.islice(
        zip(itertools.cycle(WORDS), itertools.cycle([0, 0, 1, 1]), strict=False), 24
    ):
        if streamed:
            with client.chat.completions.create(model=model, messages=PROMPT, max_tokens=8, stream=True) as stream:
                text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
        else:
            answer = client.chat.completions.create(model=model, messages=PROMPT, max_tokens=8)
            text = answer.choices[0].message.content
            assert answer.model == model

        check_words(text, model)


@pytest.mark.parametrize("model", WORDS)
def test_the_other_openai_endpoints(client, model):
    """Completions, responses and embeddings, through a swap each."""
    check_words(client.completions.create(model=model, prompt="go", max_tokens=8).choices[0].text, model)
    check_words(client.responses.create(model=model, input="go", max_output_tokens=8).output_text, model)

    assert len(client.embeddings.create(model=model, input="go", encoding_format="float").data[0].embedding) > 0


@pytest.mark.parametrize("model", WORDS)
def test_anthropic_messages(url, model):
    """The other SDK, plain and streamed."""
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
        answer = client.messages.create(model=model, messages=PROMPT, max_tokens=8)
        check_words(answer.content[0].text, model)
        with client.messages.stream(model=model, messages=PROMPT, max_tokens=8) as stream:
            check_words("".join(stream.text_stream), model)


def test_sdks_understand_our_errors(url, client):
    """A name that is not configured is the SDK's NotFoundError, with our words in it."""
    with pytest.raises(openai.NotFoundError, match='did you mean "colors"'):
        client.chat.completions.create(model="colours", messages=PROMPT)
    with (
        anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as other,
        pytest.raises(anthropic.NotFoundError, match="not configured"),
    ):
        other.messages.create(model="nobody", messages=PROMPT, max_tokens=8)
