"""What OpenAI's and Anthropic's servers answer, in small: for `model_server.py --formats`.

As little as their clients' strictest parsers take.  The words of every answer are the name of
the model, so that a client can tell who answered.  Imports little, as its user does.
"""

import base64
import json

WORDS_PER_STREAM = 3
VECTOR = (0.25, -0.5)
TOOL_CALL = {"city": "Rome"}
VERBOSE = {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4}


def answer(path, wants, name):
    """(content type, body) of the answer to a request for *path*; None: nothing is known of such requests."""
    bare = path.partition("?")[0]
    if bare in RAW:
        return RAW[bare](name)
    if bare not in WHOLE:
        return None
    return "application/json", json.dumps(WHOLE[bare](wants, name)).encode()


def events(path, wants, name):
    """The events of the stream, each as bytes; None: nothing is known of such streams."""
    bare = path.partition("?")[0]
    if bare not in STREAMS:
        return None
    named, ends, documents = STREAMS[bare]
    told = [event(document, named=named) for document in documents(wants, name)]
    return told + ([b"data: [DONE]\n\n"] if ends else [])


def event(document, *, named):
    head = f"event: {document['type']}\n" if named else ""
    return f"{head}data: {json.dumps(document)}\n\n".encode()


def words(name):
    return [f"{name} "] * WORDS_PER_STREAM


def halves(text):
    middle = len(text) // 2
    return text[:middle], text[middle:]


# ---- OpenAI: chat and text ---------------------------------------------------------------


def called(name):
    """The call of a tool that a model makes which is given some."""
    return {"name": f"weather_of_{name}", "arguments": json.dumps(TOOL_CALL)}


def chat(wants, name):
    if wants.get("tools"):
        calls = [{"id": "call_1", "type": "function", "function": called(name)}]
        message = {"role": "assistant", "content": None, "tool_calls": calls}
        choice = {"index": 0, "finish_reason": "tool_calls", "message": message, "logprobs": None}
    else:
        message = {"role": "assistant", "content": name, "refusal": None}
        choice = {"index": 0, "finish_reason": "stop", "message": message, "logprobs": None}
    head = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": name}
    return {**head, "choices": [choice], "usage": VERBOSE}


def chat_stream(wants, name):
    def chunk(delta, reason=None):
        choices = [{"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}]
        return {**head, "choices": choices}

    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": name}
    yield chunk({"role": "assistant", "content": None if wants.get("tools") else ""})
    if wants.get("tools"):
        call = called(name)
        begun = {"id": "call_1", "type": "function", "function": {**call, "arguments": ""}}
        yield chunk({"tool_calls": [{"index": 0, **begun}]})
        for half in halves(call["arguments"]):
            yield chunk({"tool_calls": [{"index": 0, "function": {"arguments": half}}]})
        yield chunk({}, "tool_calls")
    else:
        yield from (chunk({"content": word}) for word in words(name))
        yield chunk({}, "stop")
    if (wants.get("stream_options") or {}).get("include_usage"):
        yield {**head, "choices": [], "usage": VERBOSE}


def text_chunk(name, text, reason=None):
    choices = [{"index": 0, "text": text, "finish_reason": reason, "logprobs": None}]
    return {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": name, "choices": choices}


def text(_, name):
    return {**text_chunk(name, name, "stop"), "usage": VERBOSE}


def text_stream(_, name):
    yield from (text_chunk(name, word) for word in words(name))
    yield text_chunk(name, "", "stop")


def embeddings(wants, name):
    asked = wants.get("input")
    count = len(asked) if isinstance(asked, list) else 1
    vector = list(VECTOR)
    if wants.get("encoding_format") == "base64":
        # VECTOR as two little-endian floats.
        vector = base64.b64encode(bytes.fromhex("0000803e000000bf")).decode()
    data = [{"object": "embedding", "index": index, "embedding": vector} for index in range(count)]
    usage = {"prompt_tokens": count, "total_tokens": count}
    return {"object": "list", "model": name, "data": data, "usage": usage}


def rerank(wants, name):
    count = len(wants.get("documents", []))
    results = [{"index": index, "relevance_score": 1.0 / (1 + index)} for index in range(count)]
    return {"object": "list", "model": name, "results": results, "usage": {"prompt_tokens": 1, "total_tokens": 1}}


# ---- OpenAI: responses -------------------------------------------------------------------


def response(name, status, output):
    usage = {
        "input_tokens": 1,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": 3,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 4,
    }
    return {
        "id": "resp_1",
        "object": "response",
        "created_at": 1,
        "model": name,
        "status": status,
        "output": output,
        "parallel_tool_calls": False,
        "tool_choice": "auto",
        "tools": [],
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "metadata": {},
        "temperature": 1.0,
        "top_p": 1.0,
        "usage": usage if status == "completed" else None,
    }


def said(words):
    return {"type": "output_text", "text": words, "annotations": []}


def item(wants, name):
    """What the response consists of, and the whole of its text."""
    if wants.get("tools"):
        call = called(name)
        about = {"id": "fc_1", "type": "function_call", "call_id": "call_1", "status": "completed"}
        return {**about, **call}, call["arguments"]
    text = "".join(words(name)) if wants.get("stream") else name
    about = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed"}
    return {**about, "content": [said(text)]}, text


def responses(wants, name):
    return response(name, "completed", [item(wants, name)[0]])


def responses_stream(wants, name):
    for number, document in enumerate(responses_events(wants, name)):
        yield {**document, "sequence_number": number}


def responses_events(wants, name):
    done, text = item(wants, name)
    place = {"item_id": done["id"], "output_index": 0}
    empty = {**done, "status": "in_progress"} | ({"arguments": ""} if "call_id" in done else {"content": []})
    yield {"type": "response.created", "response": response(name, "in_progress", [])}
    yield {"type": "response.in_progress", "response": response(name, "in_progress", [])}
    yield {"type": "response.output_item.added", "output_index": 0, "item": empty}
    if "call_id" in done:
        for half in halves(text):
            yield {"type": "response.function_call_arguments.delta", **place, "delta": half}
        yield {
            "type": "response.function_call_arguments.done", **place, "name": done["name"], "arguments": text
        }  # fmt: skip
    else:
        place["content_index"] = 0
        yield {"type": "response.content_part.added", **place, "part": said("")}
        for word in words(name):
            yield {"type": "response.output_text.delta", **place, "delta": word, "logprobs": []}
        yield {"type": "response.output_text.done", **place, "text": text, "logprobs": []}
        yield {"type": "response.content_part.done", **place, "part": said(text)}
    yield {"type": "response.output_item.done", "output_index": 0, "item": done}
    yield {"type": "response.completed", "response": response(name, "completed", [done])}


# ---- OpenAI: sound and pictures ----------------------------------------------------------


def transcription(_, name):
    return {"text": name, "usage": {"type": "duration", "seconds": 1}}


def transcription_stream(_, name):
    for word in words(name):
        yield {"type": "transcript.text.delta", "delta": word}
    yield {"type": "transcript.text.done", "text": "".join(words(name))}


def picture(name):
    """The name for pixels: nobody looks at them."""
    return base64.b64encode(name.encode()).decode()


def images(wants, name):
    data = [{"b64_json": picture(name), "revised_prompt": name}] * int(wants.get("n") or 1)
    return {"created": 1, "data": data}


def images_stream(kind):
    def stream(_, name):
        about = {"created_at": 1, "size": "1024x1024", "quality": "low", "background": "auto", "output_format": "png"}
        yield {"type": f"{kind}.partial_image", **about, "b64_json": picture("?"), "partial_image_index": 0}
        usage = {"input_tokens": 1, "output_tokens": 1, "total_tokens": 2}
        usage["input_tokens_details"] = {"text_tokens": 1, "image_tokens": 0}
        yield {"type": f"{kind}.completed", **about, "b64_json": picture(name), "usage": usage}

    return stream


# ---- Anthropic ----------------------------------------------------------------------------


def messages(wants, name):
    head = {"id": "msg_1", "type": "message", "role": "assistant", "model": name}
    blocks, reason = [{"type": "text", "text": name}], "end_turn"
    if wants.get("tools"):
        blocks.append({"type": "tool_use", "id": "toolu_1", "name": called(name)["name"], "input": TOOL_CALL})
        reason = "tool_use"
    usage = {"input_tokens": 1, "output_tokens": 3}
    return {**head, "content": blocks, "stop_reason": reason, "stop_sequence": None, "usage": usage}


def messages_stream(wants, name):
    whole = messages(wants, name)
    yield {"type": "message_start", "message": {**whole, "content": [], "stop_reason": None}}
    yield {"type": "ping"}
    for index, block in enumerate(whole["content"]):
        if block["type"] == "text":
            empty, deltas = {**block, "text": ""}, [{"type": "text_delta", "text": word} for word in words(name)]
        else:
            pieces = halves(json.dumps(block["input"]))
            empty, deltas = {**block, "input": {}}, [{"type": "input_json_delta", "partial_json": p} for p in pieces]
        yield {"type": "content_block_start", "index": index, "content_block": empty}
        yield from ({"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas)
        yield {"type": "content_block_stop", "index": index}
    delta = {"stop_reason": whole["stop_reason"], "stop_sequence": None}
    yield {"type": "message_delta", "delta": delta, "usage": {"output_tokens": 3}}
    yield {"type": "message_stop"}


def count_tokens(wants, _):
    return {"input_tokens": len(wants.get("messages", []))}


# ---- by path -------------------------------------------------------------------------------

WHOLE = {
    "/v1/chat/completions": chat,
    "/v1/completions": text,
    "/v1/responses": responses,
    "/v1/embeddings": embeddings,
    "/v1/rerank": rerank,
    "/v1/audio/transcriptions": transcription,
    "/v1/audio/translations": transcription,
    "/v1/images/generations": images,
    "/v1/images/edits": images,
    "/v1/images/variations": images,
    "/v1/messages": messages,
    "/v1/messages/count_tokens": count_tokens,
}
# What is not JSON.
RAW = {"/v1/audio/speech": lambda name: ("audio/mpeg", b"\xff\xf3" + name.encode())}
# Whether events have names, whether [DONE] is the last, and the documents.
STREAMS = {
    "/v1/chat/completions": (False, True, chat_stream),
    "/v1/completions": (False, True, text_stream),
    "/v1/responses": (True, False, responses_stream),
    "/v1/messages": (True, False, messages_stream),
    "/v1/audio/transcriptions": (False, True, transcription_stream),
    "/v1/images/generations": (True, False, images_stream("image_generation")),
    "/v1/images/edits": (True, False, images_stream("image_edit")),
}
