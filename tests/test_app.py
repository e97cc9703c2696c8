"""The HTTP surface of the daemon: routes, errors in each client's format, and what is passed through."""

from __future__ import annotations

import re
from functools import partial

import attrs
import h2.events
import pytest
import trio
from children import PATIENCE
from daemons import (
    at_once,
    chat,
    connect,
    counts,
    daemon,
    exchange,
    fetch,
    running,
    scripted,
)
from serving import Client2

import trioswap.routes
from trioswap import sse
from trioswap.inference import model_route
from trioswap.routes import ROUTES

CHAT = "/v1/chat/completions"
MODEL_ROUTES = [row.path for row in ROUTES if row.handler is model_route and row.method == "POST"]
NOWHERE = {"cmd": ["/nonexistent/server"], "proxy": "http://127.0.0.1:9"}


def error_of(answer) -> dict:
    """The error in OpenAI's shape; every response has an id."""
    assert answer["content-type"] == "application/json"
    assert answer["x-request-id"].startswith("req_")
    document = answer.json()
    assert document["src"] == "trioswap"
    assert document["error"].keys() == {"message", "type", "param", "code"}
    return document["error"]


# ---- errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "message", "param"),
    [
        (chat("qwen-7"), 404, 'model "qwen-7" is not configured; did you mean "qwen-7b"?', "model"),
        (chat("xyz"), 404, 'model "xyz" is not configured; GET /v1/models lists the names', "model"),
        (chat("hidde"), 404, 'model "hidde" is not configured; GET /v1/models lists the names', "model"),
        (b"{", 400, "the body is not JSON", None),
        (b"", 400, "the body is not JSON", None),
        (b"[1]", 400, "the body must be a JSON object", None),
        (b"{}", 400, "no model is named", "model"),
        (b'{"model": 5}', 400, '"model" must be a string', None),
        (b'{"model": "' + b"x" * 600_000 + b'"}', 404, 'model "xxx', "model"),
        (b'{"model": "\\ud800"}', 404, 'model "\ud800" is not', "model"),
        (chat("qwen-7b", padding="x" * 2**20), 413, "larger than 1048576 bytes (max_request_body)", None),
    ],
    ids=lambda value: None if isinstance(value, bytes) else str(value)[:30].encode("ascii", "replace").decode(),
)
async def test_what_is_wrong_with_a_request_is_said(body, status, message, param):
    """The status, a message that says what to do next, and the field that is wrong; no model is loaded for it."""
    async with daemon({"qwen-7b": scripted(), "hidden": scripted(unlisted=True)}, max_request_body="1MiB") as served:
        answer = await fetch(served.port, "POST", CHAT, body)
        assert answer.status == status
        error = error_of(answer)
        assert message in error["message"]
        assert len(error["message"]) < 300, "what a client sends is not repeated without bound"
        assert error["param"] == param
        assert error["type"] == "invalid_request_error"
        assert await running(served.port) == {}


@pytest.mark.parametrize("path", MODEL_ROUTES)
async def test_errors_have_the_format_of_the_route(path):
    """Anthropic's clients read Anthropic's errors, everybody else OpenAI's; the same for errors of a model."""
    async with daemon({"a": NOWHERE}) as served:
        unknown, failed = await at_once(partial(fetch, served.port, "POST", path, chat(m)) for m in ("b", "a"))
    assert (unknown.status, failed.status) == (404, 503)
    if sse.dialect_of(path) is sse.Dialect.MESSAGES:
        assert unknown.json()["type"] == failed.json()["type"] == "error"
        assert unknown.json()["error"]["type"] == "not_found_error"
        assert failed.json()["error"]["type"] == "overloaded_error"
        assert unknown["x-request-id"] != failed["x-request-id"]
    else:
        assert error_of(unknown)["code"] == "not_found"
        assert error_of(failed)["code"] == "service_unavailable"


@pytest.mark.parametrize(
    ("server", "why"),
    [
        (NOWHERE, "cannot run '/nonexistent/server'"),
        (scripted("--exit-at-start", 7), 'exited with 7 before it was ready ("a: cannot load the model")'),
        (scripted("--never-ready", health_check_timeout=0.3), "not ready within 0.3 s (health_check_timeout)"),
    ],
    ids=["no such program", "exits", "never ready"],
)
async def test_a_start_that_fails_is_a_503(server, why):
    """Everybody who waited is told why, when to come again, and where the last output is; so is who looks."""
    async with daemon({"a": server}, backoff="1h", backoff_max="1h") as served:
        for answer in await at_once([partial(fetch, served.port, "POST", CHAT, chat("a"))] * 3):
            assert answer.status == 503
            assert int(answer["retry-after"]) >= 1
            message = error_of(answer)["message"]
            assert why in message
            assert "/logs/stream/a" in message
        row = (await running(served.port))["a"]
        assert (row["state"], row["waiting"]) == ("stopped", 0)
        assert why in row["failure"]


async def test_a_request_with_two_lengths_ends_its_connection():
    """Content-Length and Transfer-Encoding together are refused, and what follows is no request (RFC 9112, 6.1)."""
    body = chat("a")
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    smuggled = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    async with daemon({"a": scripted()}) as served:
        answer = await exchange(served.port, head.encode() + chunked + smuggled)
        assert answer.count(b"HTTP/1.1 ") == 1
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert b"ambiguous" in answer
        assert await running(served.port) == {}


@pytest.mark.parametrize(
    "path", ["//", "/v1/model", "/v1/models/", "/upstream/", "/api/models/unload/", "/api/inflight/1/2/cancel", "/%2e"]
)
async def test_an_unknown_path_is_a_404(path):
    """The message repeats the path."""
    async with daemon({"a": scripted()}) as served:
        answer = await fetch(served.port, "GET", path)
    assert answer.status == 404
    assert error_of(answer)["message"] == f"no such path: {path}"


async def test_a_wrong_method_is_a_405():
    """It says which methods there are; HEAD is one wherever GET is."""
    methods: dict[str, set[str]] = {}
    for row in ROUTES:
        methods.setdefault(re.sub(r"{\w+}", "a", row.path), set()).add(row.method)
    async with daemon({"a": scripted()}) as served:
        for path, allowed in methods.items():
            if "*" in allowed:
                continue
            answer = await fetch(served.port, "PATCH", path)
            assert answer.status == 405, path
            assert answer["allow"] == ", ".join(sorted(allowed | ({"HEAD"} if "GET" in allowed else set())))
            assert "PATCH is not allowed" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "path", ["/v1/models", "/health", "/running", "/logs", "/logs/stream", "/logs/stream/a", "/upstream/a/x"]
)
async def test_head_is_answered_where_get_is(path):
    """The same head and no body, and the connection serves the next request; a stream that would go on ends at once."""
    async with daemon({"a": scripted()}) as served, await connect(served.port) as client:
        await client.ask("HEAD", path)
        with trio.fail_after(PATIENCE):
            answer = await client.answer()
        assert (answer.status, answer.body) == (200, b"")
        assert answer["x-request-id"].startswith("req_")
        client.parser.start_next_cycle()
        await client.ask("GET", "/health")
        assert (await client.answer()).text == "OK"


async def test_a_websocket_where_there_is_none_is_a_404():
    """With an error that can be read; no model is loaded, and the daemon serves on."""
    fields = ["Host: x", "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"]
    key = "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="
    async with daemon({"a": scripted()}) as served:
        for path in ("/ws", CHAT, "/health"):
            request = "\r\n".join([f"GET {path} HTTP/1.1", *fields, key, "", ""])
            answer = await exchange(served.port, request.encode())
            assert answer.startswith(b"HTTP/1.1 404 ")
            assert b'"not_found"' in answer
        assert await running(served.port) == {}


async def test_a_bug_is_a_500_with_the_request_id(monkeypatch, caplog):
    """What we did not expect ends one request, is logged with its id, and tells the client no more than that."""

    async def broken(exchange, services):
        raise ZeroDivisionError("seeded")

    row = next(row for row in ROUTES if row.path == "/health")
    monkeypatch.setitem(trioswap.routes._FIXED, b"/health", [attrs.evolve(row, handler=broken)])
    async with daemon({"a": scripted()}) as served:
        answer = await fetch(served.port, "GET", "/health")
        assert answer.status == 500
        assert answer["x-request-id"] in error_of(answer)["message"]
        assert "seeded" not in answer.text
        assert (await fetch(served.port, "GET", "/v1/models")).status == 200
    assert [r for r in caplog.records if r.exc_info and answer["x-request-id"] in r.message]


async def test_http2_is_served_like_http1():
    """A request over HTTP/2 without TLS reaches the model server and its stream comes back whole."""
    async with daemon({"a": scripted()}) as served:
        client = Client2((await connect(served.port)).stream)
        fields = [(":method", "POST"), (":scheme", "http"), (":path", CHAT), (":authority", "x")]
        client.parser.send_headers(1, fields)
        client.parser.send_data(1, chat("a", stream=True), end_stream=True)
        await client.flush()
        head = await client.expect(h2.events.ResponseReceived)
        assert dict(head.headers)[b":status"] == b"200"
        assert (await client.expect(h2.events.DataReceived)).data.startswith(b"data: ")
        await client.expect(h2.events.StreamEnded)
        await client.stream.aclose()


# ---- /upstream/ ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "model", "seen"),
    [
        ("/upstream/a/", "a", "/"),
        ("/upstream/a/v1/x?q=1&q=%20+", "a", "/v1/x?q=1&q=%20+"),
        ("/upstream/a/%2Fx/%252F/%C3%A4//y/../z", "a", "/%2Fx/%252F/%C3%A4//y/../z"),
        ("/upstream/a/health", "a", None),
        ("/upstream/org/model/v1/x", "org/model", "/v1/x"),
        ("/upstream/org%2Fmodel/v1/x", "org/model", "/v1/x"),
        ("/upstream/org/x/", "org", "/x/"),
        ("/upstream/nick/x", "a", "/x"),
        ("/upstream/a/x?", "a", "/x"),
    ],
)
async def test_the_rest_of_the_path_goes_to_the_model_server(target, model, seen):
    """The longest name or alias is split off; escapes and query arrive as they were sent."""
    async with daemon({"a": scripted(aliases=["nick"]), "org": scripted(), "org/model": scripted()}) as served:
        answer = await fetch(served.port, "GET", target)
        assert answer.status == 200
        assert answer.text == ("ok" if seen is None else f"{model} {seen}")


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "POST", "PROPFIND"])
async def test_any_method_passes(method):
    """With its body, to a model server that sees the same method."""
    async with daemon({"a": scripted()}) as served:
        answer = await fetch(served.port, method, "/upstream/a/thing", b'{"x": 1}')
        assert answer.status == 200
        if method == "POST":
            assert answer.json()["echo"] == {"x": 1}
        assert (await counts(served.model_ports["a"]))["started"] == 1


async def test_head_has_the_headers_and_no_body():
    """The length of what GET would bring, and nothing behind it."""
    async with daemon({"a": scripted()}) as served:
        got = await fetch(served.port, "GET", "/upstream/a/thing")
        head = await fetch(served.port, "HEAD", "/upstream/a/thing")
        assert got["content-length"] == head["content-length"] == str(len("a /thing"))
        assert (got.body, head.body) == (b"a /thing", b"")


@pytest.mark.parametrize(("method", "status"), [("GET", 301), ("HEAD", 301), ("POST", 308), ("DELETE", 308)])
@pytest.mark.parametrize("path", ["/upstream/a", "/upstream/org%2Fmodel"])
async def test_a_missing_slash_is_a_redirect(method, status, path):
    """To the same path with the slash, query kept; no model is loaded for it."""
    async with daemon({"a": scripted(), "org/model": scripted()}) as served:
        answer = await fetch(served.port, method, f"{path}?q=%2F")
        assert (answer.status, answer["location"]) == (status, f"{path}/?q=%2F")
        assert await running(served.port) == {}


async def test_an_unknown_model_in_the_path_is_a_404():
    """With the name that may have been meant."""
    async with daemon({"model": scripted()}) as served:
        answer = await fetch(served.port, "GET", "/upstream/modell/v1/x")
    assert answer.status == 404
    assert error_of(answer)["message"] == 'model "modell" is not configured; did you mean "model"?'
