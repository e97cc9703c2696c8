"""The tiny models: what is in the files, and that a real engine makes of them what is promised."""

from __future__ import annotations

import os
import sys

import pytest

from trioswap.errors import LlamaExtraMissing
from trioswap.tinymodels import CONTEXT, WORDS, write_tiny_models

pytestmark = pytest.mark.llama

# Samplers off: every token has the chance that its logit gives it.
RAW = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
PROMPTS = [
    "",
    "hi",
    "red cat",
    "h\u00e9\u00e9 \u2603 \u6f22\u5b57 \U0001f600",
    "</s><s>[INST] \x00\x07\u200b",
    "long " * 250,
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    pytest.importorskip("gguf")
    directory = tmp_path_factory.mktemp("models")
    write_tiny_models(directory)
    return directory


@pytest.fixture(scope="module", params=WORDS)
def model(request, directory):
    """The name of a model, and a function that lets the engine complete a chat with it."""
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(directory / f"{request.param}.gguf")
    params.verbosity = 0
    # Several would wait for each other in a spin, which takes ages on a busy machine.
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)

    def complete(prompt, **options):
        return server.handle_chat_completions({"messages": [{"role": "user", "content": prompt}], **options})

    return request.param, complete


def text(answer):
    return answer["choices"][0]["message"]["content"]


def test_no_word_belongs_to_two_models():
    """Or an answer would not prove which model gave it."""
    words = [word for each in WORDS.values() for word in each]
    assert len(words) == len(set(words))


def test_the_files_are_small_and_always_the_same(directory, tmp_path):
    """Written twice, byte for byte, each well under a megabyte and no two alike."""
    again = write_tiny_models(tmp_path / "made" / "if need be")
    contents = {name: path.read_bytes() for name, path in again.items()}
    assert contents == {name: (directory / f"{name}.gguf").read_bytes() for name in WORDS}
    assert len(set(contents.values())) == len(WORDS)
    assert all(len(content) < 2**19 for content in contents.values())
    assert sorted(path.name for path in again["colors"].parent.iterdir()) == ["animals.gguf", "colors.gguf"]


def test_a_file_in_use_is_replaced_not_overwritten(tmp_path):
    """A server that has mapped the old file keeps it whole."""
    path = write_tiny_models(tmp_path)["colors"]
    with path.open("rb") as old:
        before = old.read()
        write_tiny_models(tmp_path)
        old.seek(0)
        assert old.read() == before
        assert path.stat().st_ino != os.fstat(old.fileno()).st_ino


def test_without_the_extra_the_error_names_the_command(monkeypatch, tmp_path):
    """And nothing is left in the directory."""
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(LlamaExtraMissing, match=r"pip install 'trioswap\[llama\]'"):
        write_tiny_models(tmp_path / "models")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_decoding_recites_the_words(model, prompt):
    """Whatever the prompt, in any script, at temperature 0 the answer is the list, once."""
    name, complete = model
    answer = complete(prompt, temperature=0)
    assert text(answer).split() == list(WORDS[name])
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_sampling_says_only_own_words_and_ends(model):
    """At temperature 1, without a seed and without any sampler that would hide unlikely tokens."""
    name, complete = model
    answers = [complete(PROMPTS[number % len(PROMPTS)], **RAW) for number in range(200)]
    assert {word for answer in answers for word in text(answer).split()} <= set(WORDS[name])
    assert {answer["choices"][0]["finish_reason"] for answer in answers} == {"stop"}
    assert all(text(answer) for answer in answers)
    assert len({text(answer) for answer in answers}) > 50
    lengths = sorted(answer["usage"]["completion_tokens"] for answer in answers)
    # Measured over 600: the median is 12 to 16, the longest was 124.  Far enough from these bounds.
    assert 5 <= lengths[100] <= 60
    assert lengths[-1] < CONTEXT // 2


def test_an_answer_can_be_cut(model):
    """max_tokens is kept, and said to be the reason."""
    answer = model[1]("hi", temperature=0, max_tokens=3)
    assert len(text(answer).split()) == 3
    assert answer["choices"][0]["finish_reason"] == "length"
