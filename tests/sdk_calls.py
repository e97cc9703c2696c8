"""The calls that people make through the `openai` and `anthropic` packages, each in a few lines.

A call takes a client of a daemon and a model, and returns what the model said; it fails when the
package or the call itself finds that the answer is not whole.  Behind are `model_server.py` with
`--formats`, whose models say their own names.
"""

from __future__ import annotations

import base64
import io
import json
import warnings
from collections.abc import Callable

import anthropic
import attrs
import openai
from model_answers import TOOL_CALL, VECTOR, WORDS_PER_STREAM

PROMPT = [{"role": "user", "content": "say something"}]
WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
# More than is kept in memory.
SOUND = b"RIFF" + bytes(1_500_000)
PICTURE = b"\x89PNG" + bytes(1000)


@attrs.frozen
class Call:
    """One of them."""

    ask: Callable[..., str]
    streams: bool

    @property
    def name(self) -> str:
        """For reports."""
        return self.ask.__name__.strip("_")

    @property
    def package(self) -> str:
        """Which client it takes."""
        return self.name.partition("_")[0]


CALLS: list[Call] = []


def call(*, streams: bool = False):
    """Lists a function as a call."""

    def listed(ask: Callable[..., str]) -> Callable[..., str]:
        CALLS.append(Call(ask, streams))
        return ask

    return listed


def one_word(text: str) -> str:
    """The word of which a stream consists."""
    words = text.split()
    assert len(words) == WORDS_PER_STREAM
    [word] = set(words)
    return word


def of_tool(name: str, arguments: str | object) -> str:
    """The model in the call of a tool."""
    assert (json.loads(arguments) if isinstance(arguments, str) else arguments) == TOOL_CALL
    return name.removeprefix("weather_of_")


# ---- openai: text --------------------------------------------------------------------------

CHAT_TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": WEATHER}}]


@call()
def openai_chat(client: openai.OpenAI, model: str) -> str:
    done = client.chat.completions.create(model=model, messages=PROMPT)
    assert done.choices[0].finish_reason == "stop"
    assert done.usage.total_tokens == 4
    return done.choices[0].message.content


@call()
def openai_chat_raw(client: openai.OpenAI, model: str) -> str:
    raw = client.chat.completions.with_raw_response.create(model=model, messages=PROMPT)
    assert raw.headers["x-request-id"].startswith("req_")
    return raw.parse().choices[0].message.content


@call(streams=True)
def openai_chat_stream(client: openai.OpenAI, model: str) -> str:
    asked = {"model": model, "messages": PROMPT, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert chunks[-1].usage.total_tokens == 4
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert {chunk.model for chunk in chunks} == {model}
    return one_word("".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices))


@call(streams=True)
def openai_chat_helper(client: openai.OpenAI, model: str) -> str:
    """The helper that accumulates, which is stricter than the bare stream."""
    with client.chat.completions.stream(model=model, messages=PROMPT) as stream:
        kinds = {event.type for event in stream}
        done = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert done.choices[0].message.role == "assistant"
    return one_word(done.choices[0].message.content)


@call()
def openai_tools(client: openai.OpenAI, model: str) -> str:
    done = client.chat.completions.create(model=model, messages=PROMPT, tools=CHAT_TOOLS)
    assert done.choices[0].finish_reason == "tool_calls"
    [called] = done.choices[0].message.tool_calls
    return of_tool(called.function.name, called.function.arguments)


@call(streams=True)
def openai_tools_helper(client: openai.OpenAI, model: str) -> str:
    with client.chat.completions.stream(model=model, messages=PROMPT, tools=CHAT_TOOLS) as stream:
        [called] = stream.get_final_completion().choices[0].message.tool_calls
    return of_tool(called.function.name, called.function.arguments)


@call()
def openai_completions(client: openai.OpenAI, model: str) -> str:
    return client.completions.create(model=model, prompt="go").choices[0].text


@call(streams=True)
def openai_completions_stream(client: openai.OpenAI, model: str) -> str:
    chunks = list(client.completions.create(model=model, prompt="go", stream=True))
    assert chunks[-1].choices[0].finish_reason == "stop"
    return one_word("".join(chunk.choices[0].text for chunk in chunks))


@call()
def openai_responses(client: openai.OpenAI, model: str) -> str:
    done = client.responses.create(model=model, input="go")
    assert done.status == "completed"
    return done.output_text


@call(streams=True)
def openai_responses_stream(client: openai.OpenAI, model: str) -> str:
    events = list(client.responses.create(model=model, input="go", stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert (events[0].type, events[-1].type) == ("response.created", "response.completed")
    return one_word("".join(event.delta for event in events if event.type == "response.output_text.delta"))


@call(streams=True)
def openai_responses_helper(client: openai.OpenAI, model: str) -> str:
    with client.responses.stream(model=model, input="go") as stream:
        return one_word(stream.get_final_response().output_text)


@call()
def openai_responses_tools(client: openai.OpenAI, model: str) -> str:
    tools = [{"type": "function", "name": "weather", "parameters": WEATHER, "strict": False}]
    [called] = client.responses.create(model=model, input="go", tools=tools).output
    return of_tool(called.name, called.arguments)


@call(streams=True)
def openai_responses_tools_helper(client: openai.OpenAI, model: str) -> str:
    tools = [{"type": "function", "name": "weather", "parameters": WEATHER, "strict": False}]
    with client.responses.stream(model=model, input="go", tools=tools) as stream:
        [called] = stream.get_final_response().output
    return of_tool(called.name, called.arguments)


@call()
def openai_embeddings(client: openai.OpenAI, model: str) -> str:
    """The package asks for base64 when nothing else is said."""
    done = client.embeddings.create(model=model, input=["one", "two"])
    assert [tuple(row.embedding) for row in done.data] == [VECTOR, VECTOR]
    return done.model


@call()
def openai_embeddings_float(client: openai.OpenAI, model: str) -> str:
    done = client.embeddings.create(model=model, input="one", encoding_format="float")
    assert tuple(done.data[0].embedding) == VECTOR
    return done.model


# ---- openai: sound and pictures --------------------------------------------------------------


@call()
def openai_transcription(client: openai.OpenAI, model: str) -> str:
    return client.audio.transcriptions.create(model=model, file=("a.wav", SOUND)).text


@call(streams=True)
def openai_transcription_stream(client: openai.OpenAI, model: str) -> str:
    events = list(client.audio.transcriptions.create(model=model, file=("a.wav", io.BytesIO(SOUND)), stream=True))
    assert events[-1].type == "transcript.text.done"
    assert events[-1].text == "".join(event.delta for event in events[:-1])
    return one_word(events[-1].text)


@call()
def openai_translation(client: openai.OpenAI, model: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer versions call it that
        return client.audio.translations.create(model=model, file=("a.wav", SOUND)).text


@call()
def openai_speech(client: openai.OpenAI, model: str) -> str:
    sound = client.audio.speech.create(model=model, voice="alloy", input="hello").read()
    assert sound.startswith(b"\xff\xf3")
    return sound[2:].decode()


@call()
def openai_speech_in_pieces(client: openai.OpenAI, model: str) -> str:
    asked = {"model": model, "voice": "alloy", "input": "hello"}
    with client.audio.speech.with_streaming_response.create(**asked) as answer:
        return b"".join(answer.iter_bytes())[2:].decode()


@call()
def openai_image(client: openai.OpenAI, model: str) -> str:
    done = client.images.generate(model=model, prompt="a cat", n=2)
    assert len(done.data) == 2
    return base64.b64decode(done.data[0].b64_json).decode()


@call(streams=True)
def openai_image_stream(client: openai.OpenAI, model: str) -> str:
    partial, done = client.images.generate(model=model, prompt="a cat", stream=True, partial_images=1)
    assert (partial.type, done.type) == ("image_generation.partial_image", "image_generation.completed")
    return base64.b64decode(done.b64_json).decode()


@call()
def openai_image_edit(client: openai.OpenAI, model: str) -> str:
    pictures = [("1.png", PICTURE, "image/png"), ("2.png", PICTURE, "image/png")]
    done = client.images.edit(model=model, image=pictures, mask=("m.png", PICTURE, "image/png"), prompt="a dog")
    return base64.b64decode(done.data[0].b64_json).decode()


@call(streams=True)
def openai_image_edit_stream(client: openai.OpenAI, model: str) -> str:
    picture = ("1.png", PICTURE, "image/png")
    *_, done = client.images.edit(model=model, image=picture, prompt="a dog", stream=True)
    assert done.type == "image_edit.completed"
    return base64.b64decode(done.b64_json).decode()


@call()
def openai_image_variation(client: openai.OpenAI, model: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        done = client.images.create_variation(model=model, image=("1.png", PICTURE, "image/png"))
    return base64.b64decode(done.data[0].b64_json).decode()


@call()
def openai_rerank(client: openai.OpenAI, model: str) -> str:
    """The package has no method for it, but one for whatever it has none for."""
    body = {"model": model, "query": "q", "documents": ["one", "two"]}
    done = client.post("/rerank", body=body, cast_to=dict[str, object])
    assert [row["index"] for row in done["results"]] == [0, 1]
    return done["model"]


# ---- anthropic -------------------------------------------------------------------------------

ASKED = {"messages": PROMPT, "max_tokens": 8}
TOOLS = [{"name": "weather", "input_schema": WEATHER}]


@call()
def anthropic_messages(client: anthropic.Anthropic, model: str) -> str:
    done = client.messages.create(model=model, **ASKED)
    assert (done.stop_reason, done.usage.output_tokens) == ("end_turn", 3)
    return done.content[0].text


@call(streams=True)
def anthropic_stream(client: anthropic.Anthropic, model: str) -> str:
    events = list(client.messages.create(model=model, **ASKED, stream=True))
    assert (events[0].type, events[-1].type) == ("message_start", "message_stop")
    assert "ping" not in {event.type for event in events}
    deltas = [event.delta for event in events if event.type == "content_block_delta"]
    return one_word("".join(delta.text for delta in deltas))


@call(streams=True)
def anthropic_helper(client: anthropic.Anthropic, model: str) -> str:
    with client.messages.stream(model=model, **ASKED) as stream:
        said = "".join(stream.text_stream)
        assert stream.get_final_message().content[0].text == said
    return one_word(said)


@call()
def anthropic_tools(client: anthropic.Anthropic, model: str) -> str:
    done = client.messages.create(model=model, **ASKED, tools=TOOLS)
    assert done.stop_reason == "tool_use"
    return of_tool(done.content[1].name, done.content[1].input)


@call(streams=True)
def anthropic_tools_helper(client: anthropic.Anthropic, model: str) -> str:
    with client.messages.stream(model=model, **ASKED, tools=TOOLS) as stream:
        called = stream.get_final_message().content[1]
    return of_tool(called.name, called.input)


@call()
def anthropic_beta(client: anthropic.Anthropic, model: str) -> str:
    """The same with `?beta=true` behind the path."""
    return client.beta.messages.create(model=model, **ASKED).content[0].text


@call()
def anthropic_count_tokens(client: anthropic.Anthropic, model: str) -> str:
    assert client.messages.count_tokens(model=model, messages=PROMPT).input_tokens == 1
    return model  # the answer has no other words
