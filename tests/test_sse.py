"""What trioswap says inside event streams, read by the parsers that people use."""

from __future__ import annotations

import json
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from children import PATIENCE
from hypothesis import given, settings
from hypothesis import strategies as st

from trioswap.errors import LeaseCut, QueueTimedOut, StillLoading, TrioswapError
from trioswap.messages import WaitView
from trioswap.sse import (
    PROCESSING,
    Dialect,
    LoadingText,
    Progress,
    WholeEvents,
    comment,
    dialect_of,
    error_event,
    upstream_error_event,
)

openai = pytest.importorskip("openai")
anthropic = pytest.importorskip("anthropic")

QUEUED = Progress("qwen", "queued", 2, ("llama-70b",), 3.0, 13.2)
LOADING = Progress("qwen", "loading", 1, (), 5.0, 8.0)

# ---- a server that says what it is told to --------------------------------------------------


class Sayer(socketserver.ThreadingTCPServer):
    """Answers every request with the same stream, whose end is the end of the connection."""

    daemon_threads = True
    stream = b""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Saying)


class Saying(socketserver.StreamRequestHandler):
    timeout = PATIENCE

    def handle(self) -> None:
        length = 0
        while (line := self.rfile.readline().strip()) != b"":
            name, _, value = line.partition(b":")
            length = int(value) if name.lower() == b"content-length" else length
        self.rfile.read(length)
        head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
        self.wfile.write(head + self.server.stream)


@pytest.fixture(scope="module")
def sayer() -> Iterator[Sayer]:
    with Sayer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join(PATIENCE)


# ---- what servers say, and what programs make of it -------------------------------------------


def events(*documents: dict[str, Any], named: bool = False, last: bytes = b"") -> list[bytes]:
    return [
        (f"event: {document['type']}\n" if named else "").encode() + b"data: " + json.dumps(document).encode() + b"\n\n"
        for document in documents
    ] + ([last] if last else [])


def chunk(**choice: Any) -> dict[str, Any]:
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    rest = {"choices": [{"index": 0, "finish_reason": None, **choice}]} if choice else {"choices": [], "usage": usage}
    return {"id": "s", "object": "chat.completion.chunk", "created": 5, "model": "qwen", **rest}


CHAT = events(
    chunk(delta={"role": "assistant", "content": None}),
    chunk(delta={"reasoning_content": "Hm."}),
    chunk(delta={"content": "Hel"}),
    chunk(delta={"content": "lo"}),
    chunk(delta={}, finish_reason="stop"),
    chunk(),
    last=b"data: [DONE]\n\n",
)


def completion(text: str, reason: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "text": text, "finish_reason": reason, "logprobs": None}
    return {"id": "s", "object": "text_completion", "created": 5, "model": "qwen", "choices": [choice]}


COMPLETIONS = events(completion("Hel"), completion("lo", "stop"), last=b"data: [DONE]\n\n")

MESSAGES = events(
    {
        "type": "message_start",
        "message": {
            "id": "s",
            "type": "message",
            "role": "assistant",
            "model": "qwen",
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"input_tokens": 1, "output_tokens": 0},
        },
    },
    {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hel"}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "lo"}},
    {"type": "content_block_stop", "index": 0},
    {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 2}},
    {"type": "message_stop"},
    named=True,
)


def response(status: str, *output: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": "s",
        "object": "response",
        "created_at": 5,
        "model": "qwen",
        "status": status,
        "output": list(output),
        "parallel_tool_calls": False,
        "tool_choice": "auto",
        "tools": [],
    }


def output(status: str, *texts: str) -> dict[str, Any]:
    content = [{"type": "output_text", "text": text, "annotations": []} for text in texts]
    return {"id": "o", "type": "message", "role": "assistant", "status": status, "content": content}


PART: dict[str, Any] = {"item_id": "o", "output_index": 0, "content_index": 0}

RESPONSES = events(
    *(
        {"sequence_number": number, **document}
        for number, document in enumerate(
            [
                {"type": "response.created", "response": response("in_progress")},
                {"type": "response.output_item.added", "output_index": 0, "item": output("in_progress")},
                {
                    "type": "response.content_part.added",
                    **PART,
                    "part": {"type": "output_text", "text": "", "annotations": []},
                },
                {"type": "response.output_text.delta", **PART, "delta": "Hel", "logprobs": []},
                {"type": "response.output_text.delta", **PART, "delta": "lo", "logprobs": []},
                {"type": "response.output_item.done", "output_index": 0, "item": output("completed", "Hello")},
                {"type": "response.completed", "response": response("completed", output("completed", "Hello"))},
            ]
        )
    ),
    named=True,
)


def openai_client(url: str):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE)


def anthropic_client(url: str):
    return anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, timeout=PATIENCE)


PROMPT: Any = [{"role": "user", "content": "say hello"}]


def chat_chunks(url: str) -> list[Any]:
    with openai_client(url) as client, client.chat.completions.create(model="m", messages=PROMPT, stream=True) as said:
        return [part.model_dump() for part in said]


def chat_answer(url: str) -> Any:
    with openai_client(url) as client, client.chat.completions.stream(model="m", messages=PROMPT) as said:
        return said.get_final_completion().model_dump()


def completions(url: str) -> Any:
    with openai_client(url) as client, client.completions.create(model="m", prompt="", stream=True) as said:
        return [part.model_dump() for part in said]


def responses_events(url: str) -> Any:
    with openai_client(url) as client, client.responses.create(model="m", input="", stream=True) as said:
        return [event.model_dump(warnings=False) for event in said]


def responses_answer(url: str) -> Any:
    with openai_client(url) as client, client.responses.stream(model="m", input="") as said:
        return [event.type for event in said], said.get_final_response().model_dump(warnings=False)


def messages_events(url: str) -> Any:
    with (
        anthropic_client(url) as client,
        client.messages.create(model="m", max_tokens=9, messages=PROMPT, stream=True) as said,
    ):
        return [event.model_dump() for event in said]


def messages_answer(url: str) -> Any:
    with anthropic_client(url) as client, client.messages.stream(model="m", max_tokens=9, messages=PROMPT) as said:
        return [event.type for event in said], said.get_final_message().model_dump()


@attrs.frozen
class Reader:
    """A way to read a stream, and one to read."""

    read: Any
    dialect: Dialect
    stream: list[bytes]


READERS = [
    Reader(chat_chunks, Dialect.CHAT, CHAT),
    Reader(chat_answer, Dialect.CHAT, CHAT),
    Reader(completions, Dialect.COMPLETIONS, COMPLETIONS),
    Reader(responses_events, Dialect.RESPONSES, RESPONSES),
    Reader(responses_answer, Dialect.RESPONSES, RESPONSES),
    Reader(messages_events, Dialect.MESSAGES, MESSAGES),
    Reader(messages_answer, Dialect.MESSAGES, MESSAGES),
]

readers = pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.read.__name__)


def read(sayer: Sayer, reader: Reader, *stream: bytes) -> Any:
    sayer.stream = b"".join(stream)
    return reader.read(f"http://127.0.0.1:{sayer.server_address[1]}")


def loading_text(dialect: Dialect) -> bytes:
    text = LoadingText(dialect, "chatcmpl-7", 1_700_000_000)
    return text.tell(QUEUED) + text.tell(LOADING) + text.end(14.2)


# ---- the SDKs ---------------------------------------------------------------------------------


@readers
def test_the_streams_of_this_test_are_real(sayer, reader):
    """Every reader finds the whole answer, or the tests below compare nothing."""
    said = json.dumps(read(sayer, reader, *reader.stream))

    assert "Hello" in said or ('"Hel"' in said and '"lo"' in said)


@readers
@pytest.mark.parametrize("numbered", [False, True])
def test_comments_before_the_answer_change_nothing(sayer, reader, numbered):
    """Heartbeats of every stage, then the answer, also of a server that numbers its events."""
    stream = [b"id: %d\n" % number + event for number, event in enumerate(reader.stream)] if numbered else reader.stream
    beats = [comment(QUEUED), comment(LOADING), comment(Progress('o"d\r\nd\u2028', PROCESSING))]

    assert read(sayer, reader, *beats, *stream) == read(sayer, reader, *stream)


@readers
def test_comments_between_events_change_nothing(sayer, reader):
    """A heartbeat behind each event, of a server that does not number them."""
    stream = [event + comment(LOADING) for event in reader.stream]

    assert read(sayer, reader, *stream) == read(sayer, reader, *reader.stream)


@pytest.mark.parametrize("reader", [reader for reader in READERS if reader.dialect is not Dialect.CHAT])
def test_loading_text_is_harmless(sayer, reader):
    """Where there is no place for such a text, programs do not see it."""
    text = loading_text(reader.dialect)

    assert b"llama-70b" in text
    assert read(sayer, reader, text, *reader.stream) == read(sayer, reader, *reader.stream)


LOADING_WORDS = (
    "Waiting for model qwen behind llama-70b, place 2 in its queue (about 14 s)\n"
    "Loading model qwen (about 8 s)\n"
    "Model qwen is ready (waited 14 s)\n"
    "\n"
)


def test_loading_text_in_chat_chunks(sayer):
    """The chunks of ours come first and hold nothing but reasoning text; the server's are as they were."""
    reader = READERS[0]
    theirs = read(sayer, reader, *reader.stream)
    chunks = read(sayer, reader, loading_text(Dialect.CHAT), *reader.stream)
    ours = chunks[: -len(theirs)]

    assert chunks[-len(theirs) :] == theirs
    assert "".join(chunk["choices"][0]["delta"]["reasoning_content"] for chunk in ours) == LOADING_WORDS
    assert {chunk["choices"][0]["delta"]["content"] for chunk in ours} == {None}


def test_loading_text_in_an_accumulated_chat_answer(sayer):
    """The whole answer differs only in where it began: reasoning text, id and time, not in role or content."""
    reader = READERS[1]
    plain = read(sayer, reader, *reader.stream)
    told = read(sayer, reader, loading_text(Dialect.CHAT), *reader.stream)

    assert told["choices"][0]["message"]["role"] == "assistant"
    assert told["choices"][0]["message"].pop("reasoning_content") == f"{LOADING_WORDS}Hm."
    assert plain["choices"][0]["message"].pop("reasoning_content") == "Hm."
    assert told | {"id": plain["id"], "created": plain["created"]} == plain


def test_chat_chunks_satisfy_strict_clients():
    """Each is all that the schema of a chunk demands."""
    for event in loading_text(Dialect.CHAT).removesuffix(b"\n\n").split(b"\n\n"):
        found = openai.types.chat.ChatCompletionChunk.model_validate_json(event.removeprefix(b"data: "), strict=True)

        # The package does not ask for it, the schema does.
        assert document(event)["choices"][0]["finish_reason"] is None
        assert (found.id, found.created, found.model) == ("chatcmpl-7", 1_700_000_000, "qwen")


@pytest.mark.parametrize("pieces", [0, 1, 2])
@pytest.mark.parametrize("told", [False, True])
@readers
def test_failures_raise(sayer, reader, pieces, told):
    """With the right class and text: at once, behind what we said, and in the middle of an answer."""
    error = QueueTimedOut("qwen", 60, 7) if pieces == 0 else LeaseCut("qwen", "drain deadline")
    before = [comment(QUEUED), loading_text(reader.dialect)] if told else []
    base = anthropic.APIStatusError if reader.dialect is Dialect.MESSAGES else openai.APIError

    with pytest.raises(base) as caught:
        read(sayer, reader, *before, *reader.stream[:pieces], error_event(reader.dialect, error))

    assert error.message in str(caught.value)
    if reader.dialect is Dialect.MESSAGES:
        assert caught.value.body == {"type": "error", "error": {"type": "overloaded_error", "message": error.message}}
    else:
        assert caught.value.message == error.message
        assert (caught.value.type, caught.value.code) == ("server_error", "service_unavailable")


@readers
def test_failures_of_the_model_server_raise(sayer, reader):
    """Its own words reach the program."""
    body = b'{"error":{"code":400,"message":"the request exceeds the context","type":"exceed_context_size_error"}}'
    base = anthropic.APIStatusError if reader.dialect is Dialect.MESSAGES else openai.APIError

    with pytest.raises(base, match="the request exceeds the context") as caught:
        read(sayer, reader, comment(LOADING), upstream_error_event(reader.dialect, 400, body))

    assert "exceed_context_size_error" in str(caught.value.body)


def test_other_streams_fail_in_the_openai_package_too(sayer):
    """Speech, pictures and transcripts are streamed as well."""
    sayer.stream = comment(LOADING) + error_event(Dialect.PLAIN, LeaseCut("qwen", "shutdown"))
    url = f"http://127.0.0.1:{sayer.server_address[1]}"

    with (
        openai_client(url) as client,
        pytest.raises(openai.APIError, match="cut off"),
        client.images.generate(model="m", prompt="", stream=True) as said,
    ):
        list(said)


# ---- comments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("progress", "line"),
    [
        (QUEUED, b": trioswap queued place=2 expected=14s waits_for=llama-70b waited=3s model=qwen"),
        (LOADING, b": trioswap loading place=1 expected=8s waited=5s model=qwen"),
        (Progress("a/b:c", PROCESSING), b": trioswap processing model=a/b:c"),
        (Progress("m", "queued", estimate=float("inf")), b": trioswap queued model=m"),
        (Progress("m", "draining", 1, ("a", "b c,\n")), rb': trioswap draining place=1 waits_for=a,"b c,\n" model=m'),
        (Progress("m\u2028n", "queued"), rb': trioswap queued model="m\u2028n"'),
    ],
)
def test_comments(progress, line):
    """One line that says how things stand, names in quotes where they need them."""
    assert comment(progress) == line + b"\n\n"


def test_the_documented_comment_is_a_real_one():
    """docs/http.md shows what comes after the first heartbeat, to the letter."""
    line = comment(Progress("qwen", "loading", place=1, waited=5.0, estimate=13.4)).decode().strip()

    assert f"`{line}`" in (Path(__file__).parent.parent / "docs" / "http.md").read_text()


names = st.text(st.characters(exclude_categories=()))


@settings(derandomize=True, deadline=None)
@given(names, st.lists(names, max_size=2), st.floats() | st.none())
def test_a_comment_is_one_line(name, others, estimate):
    """Whatever models are called, whoever cuts the lines."""
    line, blank = comment(Progress(name, "queued", 1, tuple(others), 0.0, estimate)).decode("ascii").splitlines()

    assert line.startswith(": trioswap queued place=1 ")
    assert blank == ""


def test_progress_of_a_wait():
    """What the scheduler says is taken over whole."""
    view = WaitView(7, "qwen", 3.0, 2, "queued", ("llama-70b",), 13.2)

    assert Progress.of(view) == QUEUED


def test_progress_as_json():
    """Milliseconds are enough, and JSON knows no infinity."""
    progress = Progress("m", "queued", 1, ("a",), 1.23456, 7.65432)

    assert progress.document() == {
        "model": "m",
        "stage": "queued",
        "place": 1,
        "waits_for": ["a"],
        "waited": 1.235,
        "estimate": 7.654,
    }
    assert Progress("m", "queued", estimate=float("inf")).document()["estimate"] is None


# ---- loading text -------------------------------------------------------------------------------


def texts(words: bytes) -> list[str]:
    """The reasoning text of chat chunks."""
    documents = [json.loads(event.removeprefix(b"data: ")) for event in words.split(b"\n\n") if event]
    return [document["choices"][0]["delta"]["reasoning_content"] for document in documents]


def test_loading_text_says_what_is_new():
    """Another stage, place or obstacle; other seconds, or a place in a load that is for all, are not."""
    text = LoadingText(Dialect.CHAT, "i", 0)
    a = Progress("a", "queued", 3, ("b",), 0.0, 90.0)
    steps = [
        a,
        attrs.evolve(a, waited=1.0, estimate=89.0),
        attrs.evolve(a, place=2),
        attrs.evolve(a, stage="draining", place=1, estimate=20.5),
        attrs.evolve(a, stage="stopping", place=1, estimate=None),
        attrs.evolve(a, stage="stopping", place=1, waits_for=("b", "c"), estimate=None),
        attrs.evolve(a, stage="loading", place=2, waits_for=(), estimate=14.0),
        attrs.evolve(a, stage="loading", place=1, waits_for=(), estimate=2.0, waited=95.0),
    ]

    assert [line for step in steps for line in texts(text.tell(step))] == [
        "Waiting for model a behind b, place 3 in its queue (about 90 s)\n",
        "Waiting for model a behind b, place 2 in its queue (about 90 s)\n",
        "Waiting for model a until b has finished, place 1 in its queue (about 21 s)\n",
        "Waiting for model a until b has stopped, place 1 in its queue\n",
        "Waiting for model a until b, c have stopped, place 1 in its queue\n",
        "Loading model a (about 14 s)\n",
    ]
    assert texts(text.end()) == ["Model a is ready (waited 95 s)\n", "\n"]
    assert text.tell(a) == text.end() == b""


def test_loading_text_ends_once():
    """Who was told that the model is ready is not told again."""
    text = LoadingText(Dialect.CHAT, "i", 0)

    assert texts(text.tell(Progress("a", PROCESSING, waited=3.0))) == ["Model a is ready (waited 3 s)\n"]
    assert texts(text.end(9.0)) == ["\n"]


@pytest.mark.parametrize("dialect", Dialect)
def test_loading_text_without_beginning_has_no_end(dialect):
    """A model that was ready leaves no trace."""
    assert LoadingText(dialect, "i", 0).end(3.0) == b""


def test_loading_text_as_ping():
    """The text stands in a field of ours, on one line."""
    words = LoadingText(Dialect.MESSAGES, "i", 0).tell(LOADING)

    assert words == (b'event: ping\ndata: {"type":"ping","trioswap":{"text":"Loading model qwen (about 8 s)"}}\n\n')


@pytest.mark.parametrize("dialect", [Dialect.COMPLETIONS, Dialect.RESPONSES, Dialect.PLAIN])
def test_loading_text_as_comment(dialect):
    """Where the protocol has no place for it."""
    text = LoadingText(dialect, "i", 0)

    assert text.tell(LOADING) == comment(LOADING)
    assert text.end(14.2) == comment(Progress("qwen", PROCESSING, waited=14.2))


# ---- failures -----------------------------------------------------------------------------------


def document(words: bytes) -> dict[str, Any]:
    """What the one data line of an event says."""
    (data,) = [line for line in words.decode("ascii").splitlines() if line.startswith("data: ")]
    return json.loads(data.removeprefix("data: "))


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (error_event(Dialect.RESPONSES, QueueTimedOut("qwen", 60, 7)), "service_unavailable"),
        (upstream_error_event(Dialect.RESPONSES, 400, b'{"error":{"code":400,"message":"no"}}'), "400"),
    ],
)
def test_failures_in_responses_stand_twice(words, code):
    """Flat, as the reference has it, valid for its schema, and nested, as the servers send it."""
    found = document(words)
    schema = openai.types.responses.ResponseErrorEvent.model_validate(found, strict=True)

    assert (schema.type, schema.code, schema.message, schema.param) == ("error", code, found["error"]["message"], None)


@pytest.mark.parametrize("dialect", Dialect)
def test_failures_are_named_where_events_have_names(dialect):
    """Elsewhere a name would hide them from clients that listen to unnamed events only."""
    named = dialect not in {Dialect.CHAT, Dialect.COMPLETIONS}

    for words in error_event(dialect, TrioswapError("no")), upstream_error_event(dialect, 500, b""):
        assert words.startswith(b"event: error\ndata: {" if named else b"data: {")


def test_failures_keep_what_their_class_adds():
    """`StillLoading` says how far things are, in a stream too."""
    error = StillLoading("qwen", {"stage": "loading"}, 7)

    for dialect in Dialect:
        assert document(error_event(dialect, error))["loading"] == {"stage": "loading"}


@settings(derandomize=True, deadline=None)
@given(st.sampled_from(Dialect), names)
def test_a_failure_is_one_event(dialect, message):
    """Whatever the message holds."""
    for words in (
        error_event(dialect, TrioswapError(message)),
        upstream_error_event(dialect, 500, json.dumps({"error": message}).encode()),
    ):
        assert words.endswith(b"\n\n")
        assert len(words.decode("ascii").splitlines()) == 2 + words.startswith(b"event: error\n")
        assert not message or document(words)["error"]["message"] == message


OURS = ("invalid_request_error", "not_found", None)

SAID = [
    (b'{"error":{"message":"no","type":"t","code":"c","param":"p"}}', ("no", "t", "c", "p")),
    (b'{"type":"error","error":{"type":"t","message":"no"}}', ("no", "t", "not_found", None)),
    (b'{"error":{"code":404,"message":"no","type":"t"}}', ("no", "t", 404, None)),
    (b'{"error":{"message":"no","type":"","code":true,"param":[1]}}', ("no", *OURS)),
    (b'{"error":"no"}', ("no", *OURS)),
    (b'{"error":"no","type":"t"}', ("no", *OURS)),
    (b'{"object":"error","message":"no","type":"t","code":404}', ("no", "t", 404, None)),
    (b'{"detail":"no"}', ("no", *OURS)),
    (b'{"detail":[{"loc":["body"],"msg":"no"},{"msg":"never"},3]}', ("no; never", *OURS)),
    (b'{"error":{"message":""},"message":"no"}', ("no", *OURS)),
]


@pytest.mark.parametrize(("body", "expected"), SAID)
def test_words_of_the_model_server(body, expected):
    """In whatever form its error comes."""
    found = document(upstream_error_event(Dialect.CHAT, 404, body))

    assert found == {"error": dict(zip(("message", "type", "code", "param"), expected, strict=True))}


@pytest.mark.parametrize(
    "body",
    [b"", b"<html>", b"3", b'"no"', b"[]", b"{}", b"\xff\xfe\xff", b"[" * 100_000, b'{"error":[3]}', b'{"detail":[]}'],
)
def test_a_model_server_without_words(body):
    """Its status, with the text that goes with it."""
    assert document(upstream_error_event(Dialect.CHAT, 502, body)) == {
        "error": {
            "message": "the model server answered with status 502 (Bad Gateway)",
            "type": "server_error",
            "code": "bad_gateway",
            "param": None,
        }
    }


def test_answers_that_are_no_stream():
    """What is in them is no error of theirs; statuses that nobody knows have no text."""
    success = document(upstream_error_event(Dialect.CHAT, 200, b'{"message":"hello"}'))
    unknown = document(upstream_error_event(Dialect.MESSAGES, 599, b""))

    assert success["error"]["message"] == "the model server answered with status 200, but not with an event stream"
    assert unknown == {
        "type": "error",
        "error": {"type": "api_error", "message": "the model server answered with status 599"},
    }


def test_an_anthropic_failure_has_its_own_fields_only():
    """`code` and `param` of an OpenAI-shaped answer have no place there."""
    found = document(upstream_error_event(Dialect.MESSAGES, 404, SAID[0][0]))

    assert found == {"type": "error", "error": {"type": "t", "message": "no"}}


# ---- dialects -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "dialect"),
    [
        ("/v1/chat/completions", Dialect.CHAT),
        ("/v/chat/completions", Dialect.CHAT),
        ("/chat/completions", Dialect.CHAT),
        ("/v1/completions", Dialect.COMPLETIONS),
        ("/v/completions", Dialect.COMPLETIONS),
        ("/completion", Dialect.COMPLETIONS),
        ("/infill", Dialect.COMPLETIONS),
        ("/v1/messages", Dialect.MESSAGES),
        ("/v/messages/count_tokens", Dialect.MESSAGES),
        ("/v1/responses", Dialect.RESPONSES),
        ("/v/responses", Dialect.RESPONSES),
        ("/v1/audio/speech", Dialect.PLAIN),
        ("/v1/responses/r1", Dialect.PLAIN),
        ("/v2/messages", Dialect.PLAIN),
        ("/v1messages", Dialect.PLAIN),
        ("/v", Dialect.PLAIN),
        ("", Dialect.PLAIN),
    ],
)
def test_dialects(path, dialect):
    """Each endpoint has its own; all others are plain."""
    assert dialect_of(path) is dialect


# ---- what may pass -------------------------------------------------------------------------------


def passing(*pieces: bytes) -> list[bytes]:
    """What may pass with each piece, and at the end."""
    stream = WholeEvents()
    return [*map(stream.feed, pieces), stream.rest()]


@pytest.mark.parametrize(
    ("pieces", "passes"),
    [
        ([b"data: x\n\n"], [b"data: x\n\n", b""]),
        ([b"data: x\r\n\r\n"], [b"data: x\r\n\r\n", b""]),
        ([b"data: x\r\r"], [b"data: x\r\r", b""]),
        ([b"data: x\n\ndata: y\n\nda"], [b"data: x\n\ndata: y\n\n", b"da"]),
        ([b"data: x\n\nda", b"ta: y\n\n"], [b"data: x\n\n", b"data: y\n\n", b""]),
        ([b"data: x\n", b"\n"], [b"", b"data: x\n\n", b""]),
        ([b"data: x\r", b"\n", b"\r\n"], [b"", b"data: x\r\n", b"\r\n", b""]),
        ([b"data: x\r\n\r", b"\n", b"data: y\n\n"], [b"data: x\r\n\r", b"\n", b"data: y\n\n", b""]),
        ([b"\n", b"data: x\n\n"], [b"\n", b"data: x\n\n", b""]),
        # One piece is kept, and no more: an event that is very large, and a stream without blank lines.
        ([b"data: ", b"x", b"y", b"\n\n", b"da"], [b"", b"data: x", b"y", b"\n\n", b"", b"da"]),
        ([b"data: x\n", b"data: y\n", b"data: z\n"], [b"", b"data: x\ndata: y\n", b"data: z\n", b""]),
    ],
)
def test_events_pass_as_soon_as_they_are_whole(pieces, passes):
    assert passing(*pieces) == passes


@settings(derandomize=True, deadline=None, max_examples=500)
@given(st.lists(st.lists(st.sampled_from([b"\r", b"\n", b"\r\n", b"x", b"data: x"]), max_size=6).map(b"".join)))
def test_what_passes_however_it_is_cut(pieces):
    """Every byte once and in order, all events that are whole, and clean means behind a blank line."""
    stream, fed, passed = WholeEvents(), b"", b""
    for piece in pieces:
        fed += piece
        passed += stream.feed(piece)

        assert fed.startswith(passed)
        assert stream.is_clean == is_between_events(passed)
        assert last_blank_line(fed) <= len(passed)
        assert piece.endswith(fed.removeprefix(passed)), "what is kept came with the last piece"
    assert passed + stream.rest() == fed


def is_between_events(stream: bytes) -> bool:
    """As if all of it had been cut into lines."""
    lines = stream.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return not lines.strip(b"\n") or lines.endswith(b"\n\n")


def last_blank_line(stream: bytes) -> int:
    """Where it ends."""
    return max(end for end in range(len(stream) + 1) if is_between_events(stream[:end]))


@readers
def test_an_error_behind_what_has_passed_is_seen(sayer, reader):
    """Wherever the stream is cut."""
    pieces = reader.stream[:2]
    cuts = []
    for place in range(len(b"".join(pieces))):
        stream = WholeEvents()
        cuts.append(stream.feed(b"".join(pieces)[:place]))
        assert stream.is_clean

    assert set(cuts) == {b"", pieces[0]}
    for cut in set(cuts):
        with pytest.raises((openai.APIError, anthropic.APIStatusError), match="cut off"):
            read(sayer, reader, cut, error_event(reader.dialect, LeaseCut("qwen", "shutdown")))


# ---- when it is over -----------------------------------------------------------------------------


@readers
@pytest.mark.parametrize("size", [1, 3, 10**6])
def test_a_stream_is_over_behind_its_last_event_only(reader, size):
    """However it is cut."""
    text, stream, over = b"".join(reader.stream), WholeEvents(), []
    for place in range(0, len(text), size):
        stream.feed(text[place : place + size])
        over.append(stream.is_over)

    assert over == [False] * (len(over) - 1) + [True]


@pytest.mark.parametrize(
    ("pieces", "over"),
    [
        ([], False),
        ([b"data:[DONE]\r\n\r\n"], True),
        ([b"data: [DONE]\n\n", b"\n"], True),
        ([b"id: 7\nevent: response.incomplete\ndata: {}\n\n"], True),
        ([b"event: response.failed\n", b"data: ", b"{}", b"\n\n"], True),
        ([b"data: [DONE]\n\n", b"data: 1\n\n"], False),
        ([b"data: [DONE]\n\n", b"data: ", b"1"], False),
        ([b"data: [DONE]\n\n", b"data: ", b"1", b"\n\n"], False),
        ([b"data: ", b"[DONE]", b"\n\ndata: 1\n\n"], False),
        ([b"data: [DONE]\n\n", b"data: 1"], True),  # which is kept back
        ([b"data: [DONE]\n"], False),
        ([b"data: [DONE]\n", b"id: 1\n"], False),
        ([b'data: {"text": "data: [DONE]"}\n\n'], False),
        ([b"event: response.failed.not\ndata: {}\n\n"], False),
    ],
)
def test_when_a_stream_is_over(pieces, over):
    stream = WholeEvents()
    for piece in pieces:
        stream.feed(piece)

    assert stream.is_over is over
