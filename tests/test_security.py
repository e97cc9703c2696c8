"""What nobody may get out of the daemon, or do to it: keys on every route, forged heads, smuggled requests, sizes.

Web pages have `test_cors`, slow clients `test_server_slow`, the server without the daemon `test_server_hostile`.
"""

from __future__ import annotations

import base64
import json
import re
from contextlib import suppress
from functools import partial
from urllib.parse import urljoin, urlsplit

import attrs
import commands
import h11
import hpack
import pytest
import trio
import websocket_peers
from children import PATIENCE, python
from daemons import (
    chat,
    connect,
    counts,
    daemon,
    eventually,
    fetch,
    running,
    scripted,
    write_config,
)
from hyperframe.frame import DataFrame, PingFrame
from serving import read_to_end, receive_or_nothing
from test_server_hostile import CONNECT, HOSTILE, PING, http2, request, upgrade

from trioswap.access import Scope
from trioswap.inference import model_route
from trioswap.names import Names
from trioswap.routes import ANY, ROUTES, Route
from trioswap.sockets import SOCKETS, SocketRoute

CHAT = "/v1/chat/completions"
REFUSED = {401, 403}
ADMIN = ("authorization", "Bearer key-of-admin")


# ---- keys: every route and every kind of client -------------------------------------------------


# Routes of the scope `use` that lead to no model at all, and those that lead to a certain one.
NO_MODEL = {"/comfyui"}
COMFYUI = {"/comfyui/", "/comfyui/{path}"}


@attrs.frozen
class Caller:
    """Somebody who asks for everything."""

    name: str
    may: set[Scope]
    """What it is let in for, with the model that it asks for."""
    rights: dict[str, object] | None = None
    """Of its key; None: the configuration has none of that name."""
    model: str = "a"
    """What it asks for."""
    only: str | None = None
    """The one path it may ask."""
    denied: bool = False
    """The model is one that it may not use."""
    elsewhere: set[str] = NO_MODEL
    """Routes of the scope `use` that do not lead to that model, whatever a client says."""
    without: int = 403
    """The status that it gets for the rest."""

    @property
    def fields(self) -> list[tuple[str, str]]:
        return [] if self.name == "nobody" else [("authorization", f"Bearer key-of-{self.name}")]


FULL = set(Scope)
USER = {Scope.OPEN, Scope.USE, Scope.READ}
LOOKER = {Scope.OPEN, Scope.READ}
CALLERS = [
    Caller("nobody", {Scope.OPEN}, without=401),
    Caller("stranger", {Scope.OPEN}, without=401),
    Caller("plain", FULL),
    Caller("admin", FULL, {"admin": True}),
    Caller("named", USER, {}),
    Caller("looker", LOOKER, {"read_only": True}),
    Caller("other-model", USER, {"models": ["b"]}, denied=True),
    Caller("one-model", USER, {"models": ["a", "comfyui_auto"]}),
    Caller("one-path", {Scope.OPEN}, {"endpoints": ["/v1/models"]}, only="/v1/models"),
    Caller("at-home", USER, {"peers": False}),
    Caller("homesick", USER, {"peers": False}, model="there/far", denied=True, elsewhere=NO_MODEL | COMFYUI),
    Caller("traveller", USER, {"peers": True}, model="there/far"),
]
# What stands for the parameters of paths.  A route with another parameter needs a word here.
WORDS = {"source": "proxy", "id": "1", "request": "req_1", "path": "x"}
# What a websocket of each row is asked for.  A new row needs a word here.
SOCKET_TARGETS = {"/v1/realtime": "/v1/realtime?model={}", "/upstream/": "/upstream/{}/ws", "/comfyui/": "/comfyui/ws"}


def refusal(caller: Caller, route: Route | SocketRoute) -> int | None:
    """The status that *caller* is to see; None: it is let in."""
    if route.scope not in caller.may and route.path != caller.only:
        return caller.without
    let_in = route.scope is not Scope.USE or route.path in caller.elsewhere
    return caller.without if caller.denied and not let_in else None


def asks(route: Route, model: str) -> list[tuple[str, str, bytes]]:
    """Requests for *route*, one for each method that it may have."""
    path = re.sub(r"{(\w+)}", lambda found: {**WORDS, "model": model}[found[1]], route.path)
    body = chat(model) if route.handler is model_route else b'{"name": null}'
    methods = ("GET", "POST", "DELETE") if route.method == ANY else (route.method,)
    if route.path.startswith("/upstream/"):
        path += "/x"
    if "GET" in methods:
        query = f"?model={model}" if route.scope is Scope.USE else ""
        return [(method, path + query, b"") for method in (*methods, "HEAD")]
    return [(method, path, body) for method in methods]


async def status_of(port: int, method: str, target: str, body: bytes, *headers: tuple[str, str]) -> int:
    """Of the answer, whose body need not end."""
    with trio.fail_after(PATIENCE):
        async with await connect(port) as client:
            await client.ask(method, target, body, *headers)
            head = await client.head()
            if head.status_code == 401:
                assert dict(head.headers)[b"www-authenticate"] == b'Basic realm="trioswap"'
            return head.status_code


async def socket_status(port: int, target: str, *headers: tuple[str, str]) -> int:
    """Of the answer to a handshake."""
    with trio.fail_after(PATIENCE):
        async with await connect(port) as client:
            peer = await websocket_peers.connect(client.stream, target, headers=headers)
            return peer.response.status_code


def settings() -> dict[str, object]:
    """Of a daemon that knows the keys of all callers."""
    keys = {
        caller.name: {"key": f"key-of-{caller.name}", **caller.rights}
        for caller in CALLERS
        if caller.rights is not None
    }
    peers = {"there": {"proxy": "http://127.0.0.1:9", "models": ["far"]}}
    groups = {"all": {"swap": False, "members": ["a", "b", "comfyui_auto"]}}
    return {"api_keys": ["key-of-plain"], "keys": keys, "peers": peers, "groups": groups}


@pytest.mark.parametrize("caller", CALLERS, ids=lambda caller: caller.name)
async def test_who_may_ask_for_what(caller):
    """On every route and every websocket there is; what is refused loads nothing."""
    wrong: list[str] = []

    async def check(row, what, status) -> None:
        expected = refusal(caller, row)
        if (status in REFUSED or expected is not None) and status != expected:
            wrong.append(f"{what} of {row.path}: {status}, and not {expected or 'let in'}")

    models = {name: scripted() for name in ("a", "b", "comfyui_auto")}
    async with daemon(models, **settings()) as served:
        for let_in in (False, True):
            for route in ROUTES:
                if (refusal(caller, route) is None) is let_in:
                    for method, target, body in asks(route, caller.model):
                        await check(
                            route,
                            f"{method} {target}",
                            await status_of(served.port, method, target, body, *caller.fields),
                        )
            for row in SOCKETS:
                if (refusal(caller, row) is None) is let_in:
                    target = SOCKET_TARGETS[row.path].format(caller.model)
                    await check(row, f"websocket {target}", await socket_status(served.port, target, *caller.fields))
            if not let_in:
                answer = await fetch(served.port, "GET", "/running", b"", ADMIN)
                assert answer.json() == {"running": []}

    assert wrong == []


def test_what_routes_may_be_open():
    """Whoever adds one must think of it here; and what only looks is a GET."""
    assert {route.path for route in ROUTES if route.scope is Scope.OPEN} <= {
        "/",
        "/health",
        "/health/ready",
        "/wol-health",
        "/favicon.ico",
        "/api/openapi.json",
    }
    assert {route.method for route in ROUTES if route.scope in (Scope.OPEN, Scope.READ)} == {"GET"}
    for route in ROUTES:
        if re.match(r"/(logs|api/(events|inflight|hold|captures))", route.path):
            assert route.scope is Scope.ADMIN, route.path
    assert {row.scope for row in SOCKETS} == {Scope.USE}


def test_there_is_a_route_of_every_scope():
    """So the test above means something."""
    assert {route.scope for route in ROUTES} == set(Scope)
    for caller in CALLERS:
        refused = {refusal(caller, route) for route in ROUTES} - {None}
        assert refused == (set() if caller.may == FULL else {caller.without})


SECRET = "s3cr3t-of-mine"


def shown(key: str) -> list[tuple[str, str]]:
    """The ways to show *key*, the one that is looked at first in front."""
    basic = base64.b64encode(f"me:{key}".encode()).decode()
    return [
        ("authorization", f"Basic {basic}"),
        ("authorization", f"Bearer {key}"),
        ("x-api-key", key),
        ("api-key", key),
    ]


SHOWN = shown(SECRET)


@pytest.mark.parametrize("way", range(4))
async def test_one_way_to_show_a_key_is_looked_at(way):
    """Each does, but none makes good what a better one got wrong."""
    async with daemon({"a": scripted()}, api_keys=[SECRET]) as served:
        ask = partial(fetch, served.port, "GET", "/running", b"")
        right, wrong = SHOWN[way], shown("wrong")[way]
        assert (await ask(right)).status == 200
        assert (await ask(wrong)).status == 401
        for other in range(4):
            if SHOWN[other][0] != right[0]:
                assert (await ask(right, shown("wrong")[other])).status == (200 if way < other else 401)
                assert (await ask(wrong, SHOWN[other])).status == (401 if way < other else 200)


async def test_a_key_is_seen_by_nobody_else(tmp_path):
    """Not by the model server, in the log, in what is under way, in events, or in what goes wrong."""
    rights = {"laptop": {"key": SECRET, "admin": True}, "phone": {"key": "of-the-phone", "models": ["b"]}}
    model = scripted("--hold")
    path = write_config(tmp_path, {"a": model, "b": scripted()}, keys=rights)
    seen: list[bytes] = []
    async with commands.daemon("serve", "-c", path, "--log-level", "debug") as served:
        for field in SHOWN:
            async with await connect(served.port) as client:
                await client.ask("POST", CHAT, chat("a"), field, ("cookie", "theme=dark"), ("x-api-key", SECRET))
                await eventually(lambda: is_held(served.port, SHOWN[0]))
                seen.append((await fetch(served.port, "GET", "/api/inflight", b"", field)).body)
            seen.append((await fetch(model.port, "GET", "/requests")).body)
            seen.append((await fetch(served.port, "POST", CHAT, chat(SECRET[:4]), field)).body)
            seen.append((await fetch(served.port, "POST", "/v1/messages", b"{", field)).body)
            wrong = (field[0], field[1] + "-wrong")
            seen.append((await fetch(served.port, "GET", "/running", b"", wrong)).body)
        seen.append((await fetch(served.port, "GET", "/logs", b"", ("api-key", "of-the-phone"))).body)
        with trio.fail_after(PATIENCE):
            async with await connect(served.port) as client:
                await client.ask("GET", "/api/events", b"", SHOWN[0])
                seen.append(await client.piece_of_body())
        seen.append((await fetch(served.port, "GET", "/running", b"", SHOWN[0])).body)
        log = (await fetch(served.port, "GET", "/logs", b"", SHOWN[0])).body
    assert b"key=laptop" in log
    assert b'"theme=dark"' not in seen[0]
    assert b"[REDACTED]" in seen[0]
    for text in (log, *seen):
        for secret in (SECRET.encode(), base64.b64encode(f"me:{SECRET}".encode()), b"of-the-phone"):
            assert secret not in text


async def is_held(port: int, field: tuple[str, str]) -> bool:
    """Whether a request to "a" is under way, and its model server has it."""
    rows = (await fetch(port, "GET", "/running", b"", field)).json()["running"]
    return any(row["model"] == "a" and row["serving"] == 1 for row in rows)


async def test_a_model_server_sees_no_credentials():
    """Of all four ways to show one nothing is left."""
    async with daemon({"a": scripted()}, api_keys=[SECRET]) as served:
        for field in SHOWN:
            others = [other for other in SHOWN if other[0] != field[0]]
            for target, body in ((CHAT, chat("a")), ("/upstream/a/x", b"{}")):
                fields = (field, *others, ("proxy-authorization", SECRET), ("x-kept", "yes"))
                assert (await fetch(served.port, "POST", target, body, *fields)).status == 200
                said = (await fetch(served.model_ports["a"], "GET", "/seen")).json()
                assert ["x-kept", "yes"] in said["headers"]
                assert SECRET not in json.dumps(said)
                assert "Basic" not in json.dumps(said)


# ---- names and paths that would like to be more -------------------------------------------------

NASTY = [
    "a%0d%0aSet-Cookie:%20x=y",
    "a%0aX: y".replace(" ", "%20"),
    "a%00b",
    "%22a%22",
    "a%E2%80%A8b",
    "a%C2%85b",
    "%0d%0a%0d%0a<html>",
    "2026-01-01T00:00:00Z%20INFO%20app:%20forged",
    "%0a2026-01-01T00:00:00Z%20INFO%20app:%20forged",
    "%1b[2J",
    "%FF%FE",
    "..%2f..%2fetc%2fpasswd",
]
LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ (DEBUG|INFO|WARNING|ERROR) [\w.]+: [^\x00-\x08\x0a-\x1f\x7f]*")
HEADERS = {"content-type", "content-length", "vary", "x-request-id", "date"}


async def test_names_forge_neither_headers_nor_log_lines(tmp_path):
    """Whatever it contains, in a path, a query or a body: it is quoted in a JSON body and in one line of the log."""
    path = write_config(tmp_path, {"a": scripted()})
    async with commands.daemon("serve", "-c", path, "--log-level", "debug") as served:
        for name in NASTY:
            for method, target, body in (
                ("GET", f"/upstream/{name}/x", b""),
                ("GET", f"/upstream/{name}", b""),
                ("GET", f"/props?model={name}", b""),
                ("GET", f"/{name}", b""),
                ("POST", CHAT, json.dumps({"model": f"\r\n{name}\r\nX: y\x00\x1b\u2028"}).encode()),
                ("POST", f"/api/models/load/{name}", b""),
                ("GET", f"/logs/stream/{name}", b""),
                ("POST", f"/api/inflight/{name}/cancel", b""),
            ):
                answer = await fetch(served.port, method, target, body)
                assert answer.status == 404 or (answer.status == 400 and "%FF" in target), f"{method} {target}"
                assert set(dict(answer.headers)) == HEADERS
                assert answer.json()["error"]["message"]
        assert (await fetch(served.port, "GET", "/health")).status == 200
        lines = (await fetch(served.port, "GET", "/logs")).body.decode().split("\n")
    assert lines.pop() == ""
    assert [line for line in lines if not LINE.fullmatch(line)] == []
    assert len([line for line in lines if " app: request=req_" in line]) == 8 * len(NASTY) + 1


LEAVING = [
    "/upstream//evil.example",
    "/upstream//evil.example/",
    "//evil.example",
    "//evil.example/upstream/a",
    "//evil.example/%2e%2e/upstream/a",
    "//evil.example/../upstream/a",
    "///evil.example/..//health",
    "/\\evil.example/../health",
    "/upstream/a",
    "/upstream/a?//evil.example",
    "/upstream/a?@evil.example",
    "/upstream/%2F%2Fevil.example",
    "/upstream//a",
    "/upstream/./a",
    "//upstream/a",
    "/.//upstream/a",
    "/..//..//upstream/a",
    "/x/..//upstream/a",
    "/upstream/%61",
    "/comfyui",
    "/comfyui?next=//evil.example",
    "//comfyui",
    "//health",
    "https://evil.example/upstream/a",
    "http://evil.example//evil.example/../upstream/a",
    "http://evil.example/comfyui",
]


@pytest.mark.parametrize("target", LEAVING)
async def test_no_redirect_leaves_us(target):
    """A Location is a path, and a browser stays with us when it follows it."""
    async with daemon({"a": scripted(), "comfyui_auto": scripted()}) as served:
        answer = await fetch(served.port, "GET", target)
        assert answer.status in (200, 301, 307, 404)
        location = answer["location"]
        assert (location is not None) == (answer.status in (301, 307))
        if location is not None:
            assert urlsplit(urljoin("http://here:8080/x/y", location.replace("\\", "/"))).netloc == "here:8080"
            assert re.fullmatch(r"/[\w%.][!-~]*", location)


@pytest.mark.parametrize(
    "rest",
    [
        "/../x",
        "/..%2fx",
        "/%2e%2e/x",
        "/%2E%2E%2F%2E%2E%2Fetc/passwd",
        "/%252e%252e/x",
        "/x%00y",
        "/x%0d%0aHost:%20evil",
        "/\\..\\x",
        "/%5c..%5cx",
        "/;/..;/x",
        "//evil.example/x",
        "/http://evil.example/",
        "/x?next=//evil.example&%0d%0a",
        "/%ff%fe",
        "/x?y?z",
        "/",
    ],
)
async def test_a_model_server_sees_the_rest_of_the_path_as_it_was(rest):
    """Byte for byte, so that there is nothing to gain by how we read it; and it is one request."""
    async with daemon({"a": scripted(), "b": scripted()}) as served:
        answer = await fetch(served.port, "GET", f"/upstream/a{rest}")
        assert (answer.status, answer.text) == (200, f"a {rest}")
        assert (await counts(served.model_ports["a"]))["started"] == 1
        assert set(await running(served.port)) == {"a"}


@pytest.mark.parametrize(
    "path", ["/" * 60_000, "x/" * 30_000, "%2F" * 20_000, "a" + "/" * 59_000, "a/" * 29_000], ids=lambda path: path[:6]
)
async def test_a_path_of_many_parts_costs_little(path, monkeypatch):
    """A name that could end anywhere is looked for no further than the longest name reaches."""
    looks = 0
    knows = Names.knows

    def counted(*arguments):
        nonlocal looks
        looks += 1
        return knows(*arguments)

    monkeypatch.setattr(Names, "knows", counted)
    async with daemon({"a": scripted(), "longer/name": scripted()}) as served:
        answer = await fetch(served.port, "GET", f"/upstream/{path}")
        assert answer.status in (200, 404)
        assert len(answer.body) < 65_000
    assert looks < 50


# ---- forms of the target (RFC 9112, 3.2) ---------------------------------------------------------


def head(*lines: str) -> bytes:
    """Of a request."""
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


async def said_to(port: int, data: bytes, *, whole: bool = True) -> bytes:
    """What is said to *data*, until the daemon ends the connection; unless *whole*, the client does that first."""
    with trio.fail_after(PATIENCE):
        async with await connect(port) as client:
            await send(client.stream, data)
            if not whole:
                await client.stream.send_eof()
            return await read_to_end(client.stream)


async def send(stream: trio.SocketStream, data: bytes) -> None:
    """Send it, as far as it is taken."""
    with suppress(trio.BrokenResourceError):
        await stream.send_all(data)


def statuses(said: bytes) -> list[int]:
    """Of the answers in *said*."""
    return [int(status) for status in re.findall(rb"^HTTP/1\.1 (\d{3})", said, re.MULTILINE)]


@pytest.mark.parametrize(
    ("line", "status", "text"),
    [
        ("GET http://elsewhere/health HTTP/1.1", 200, b"OK"),
        ("GET HTTP://elsewhere:80/health?x HTTP/1.1", 200, b"OK"),
        ("GET https://user:password@elsewhere/health HTTP/1.1", 200, b"OK"),
        ("GET http://elsewhere HTTP/1.1", 200, b"trioswap"),
        ("GET http://elsewhere?x=y HTTP/1.1", 200, b"trioswap"),
        ("GET http:///health HTTP/1.1", 200, b"OK"),
        ("GET http:/health HTTP/1.1", 404, b"no such path"),
        ("GET ftp://elsewhere/health HTTP/1.1", 404, b"no such path"),
        ("GET /http://elsewhere/health HTTP/1.1", 404, b"no such path"),
        ("OPTIONS * HTTP/1.1", 204, b""),
        ("GET * HTTP/1.1", 404, b"no such path"),
        ("GET elsewhere:443 HTTP/1.1", 404, b"no such path"),
        ("CONNECT elsewhere:443 HTTP/1.1", 404, b"no such path"),
        ("CONNECT /upstream/a/x HTTP/1.1", 400, b"CONNECT"),
        ("GET health HTTP/1.1", 307, b""),
    ],
)
async def test_forms_of_the_target(line, status, text):
    """A proxy's form is one of ours; what is none is refused, and nobody is connected with anybody."""
    async with daemon({"a": scripted()}) as served:
        said = await said_to(served.port, head(line, "Host: here", "Connection: close"))
        assert statuses(said) == [status]
        assert text in said.partition(b"\r\n\r\n")[2]
        assert status != 400 or (await counts(served.model_ports["a"]))["started"] == 0


async def test_a_target_in_absolute_form_is_the_path_and_the_host():
    """For the model server, for keys that may ask one path only, and for websockets."""
    rights = {"k": {"key": "k", "endpoints": ["/upstream/a/x", "/v1/realtime"]}}
    async with daemon({"a": scripted()}, keys=rights) as served:

        async def ask(*lines: str) -> bytes:
            return await said_to(served.port, head(*lines, "Connection: close"))

        said = await ask("GET http://elsewhere/upstream/a/x?q=%2F HTTP/1.1", "Host: here", "x-api-key: k")
        assert statuses(said) == [200]
        seen = (await fetch(served.model_ports["a"], "GET", "/seen")).json()
        assert seen["target"] == "/x?q=%2F"
        assert dict(seen["headers"])["host"] == dict(seen["headers"])["x-forwarded-host"] == "elsewhere"
        assert statuses(await ask("GET http://elsewhere/running HTTP/1.1", "Host: here", "x-api-key: k")) == [403]
        assert statuses(await ask("GET http://elsewhere/running HTTP/1.1", "Host: here")) == [401]
        assert statuses(await ask("GET http://elsewhere/upstream/a/y HTTP/1.1", "Host: a", "x-api-key: k")) == [403]


# ---- smuggling ------------------------------------------------------------------------------------

BODY = chat("a")
HIDDEN = b"GET /upstream/a/smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
CHUNKED = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
LENGTH = f"Content-Length: {len(BODY)}"
TE = "Transfer-Encoding: "
POST = f"POST {CHAT} HTTP/1.1"
# Name -> the head beside the request line and Host, and the body.  None of them is a request.
MALFORMED = {
    "both": ([LENGTH, TE + "chunked"], CHUNKED),
    "both, the other way round": ([TE + "chunked", LENGTH], CHUNKED),
    "both, one that means nothing": (["Content-Length: 0", TE + "chunked"], CHUNKED),
    "two lengths": ([LENGTH, "Content-Length: 3"], BODY),
    "two lengths in one field": ([LENGTH + ", 3"], BODY),
    "chunked and more": ([TE + "chunked, identity"], CHUNKED),
    "identity": ([TE + "identity"], CHUNKED),
    "chunked twice": ([TE + "chunked", TE + "chunked"], CHUNKED),
    "chunked twice in one field": ([TE + "chunked, chunked"], CHUNKED),
    "compressed": ([TE + "gzip, chunked"], CHUNKED),
    "nearly chunked": ([TE + "xchunked"], CHUNKED),
    "quoted": ([TE + '"chunked"'], CHUNKED),
    "vertical tab": ([TE + "\x0bchunked"], CHUNKED),
    "nul": (["X-A: b\0c", LENGTH], BODY),
    "bare CR": (["X-A: b\r" + TE + "chunked", LENGTH], BODY),
    "bare LF": (["X-A: b\n" + TE + "chunked", LENGTH], CHUNKED),
    "folded first line": ([" X-A: b", LENGTH], BODY),
    "space before colon": ([f"Content-Length : {len(BODY)}"], BODY),
    "space before the other colon": (["Transfer-Encoding : chunked", LENGTH], CHUNKED),
    "no colon": (["Transfer-Encoding chunked", LENGTH], CHUNKED),
    "no name": ([": chunked", LENGTH], CHUNKED),
    "length with a plus": ([f"Content-Length: +{len(BODY)}"], BODY),
    "length with a minus": (["Content-Length: -1"], BODY),
    "no length": (["Content-Length:"], BODY),
    "length with a blank": (["Content-Length: 4 5"], BODY),
    "length in hex": (["Content-Length: 0x2d"], BODY),
    "length with an underscore": (["Content-Length: 4_5"], BODY),
    "length in other digits": (["Content-Length: \xb2"], BODY),
    "length beyond all": ([f"Content-Length: {'9' * 30}"], BODY),
    "length beyond the limit": ([f"Content-Length: {'9' * 19}"], BODY),
    "negative chunk": ([TE + "chunked"], b"-1\r\n" + BODY),
    "chunk in C": ([TE + "chunked"], b"0x2d\r\n" + BODY),
    "chunk with a plus": ([TE + "chunked"], b"+2d\r\n" + BODY),
    "chunk without a size": ([TE + "chunked"], b"\r\n" + BODY),
    "chunk beyond all": ([TE + "chunked"], b"f" * 30 + b"\r\n" + BODY),
    "chunk that is longer": ([TE + "chunked"], b"%x\r\n%sxx0\r\n\r\n" % (len(BODY), BODY)),
    "two hosts": (["Host: y", LENGTH], BODY),
}


@pytest.mark.parametrize("name", MALFORMED)
async def test_a_malformed_request_is_refused_and_nothing_follows_it(name):
    """4xx or 501 and the end of the connection; neither it nor what stands behind it gets to a model server."""
    lines, body = MALFORMED[name]
    async with daemon({"a": scripted()}) as served:
        said = await said_to(served.port, head(POST, *lines, "Host: x") + body + HIDDEN)
        [status] = statuses(said)
        assert status == 501 or status // 100 == 4
        assert await running(served.port) == {}


UNFINISHED = {
    "chunk of which not all comes": ([TE + "chunked"], b"%x\r\n%s" % (2**79, BODY)),
    "less than it says": ([f"Content-Length: {len(BODY) + len(HIDDEN) + 1}"], BODY),
    "chunks without the last": ([TE + "chunked"], CHUNKED[:-5]),
}


@pytest.mark.parametrize("name", UNFINISHED)
async def test_half_a_request_is_none(name):
    """The client ends in the middle of it, and what it meant to hide is a part of the body."""
    lines, body = UNFINISHED[name]
    async with daemon({"a": scripted()}) as served:
        said = await said_to(served.port, head(POST, "Host: x", *lines) + body + HIDDEN, whole=False)
        assert 200 not in statuses(said)
        assert await running(served.port) == {}


# Name -> the same of requests that are odd, but can only be read in one way.
ODD = {
    "the same length twice": ([LENGTH, LENGTH], BODY),
    "the same length twice in one field": ([f"{LENGTH}, {len(BODY)}"], BODY),
    "leading zeros": ([f"Content-Length: 000{len(BODY)}"], BODY),
    "capitals": ([TE + "CHUNKED"], CHUNKED),
    "tab": (["Transfer-Encoding:\tchunked"], CHUNKED),
    "folded": (["X-A: b\r\n Content-Length: 3", LENGTH], BODY),
    "folded value": (["Transfer-Encoding:\r\n chunked"], CHUNKED),
    "extensions": ([TE + "chunked"], b'%x;a="\xff";b\r\n%s\r\n0;c\r\n\r\n' % (len(BODY), BODY)),
    "trailers": ([TE + "chunked"], CHUNKED[:-2] + b"Content-Length: 3\r\nHost: y\r\n\r\n"),
    "many chunks": ([TE + "chunked"], b"".join(b"1\r\n%c\r\n" % byte for byte in BODY) + b"0\r\n\r\n"),
    "named by Connection": (["Connection: content-length, host, x-b", "X-B: 1", LENGTH], BODY),
    "named by Connection, chunked": (["Connection: transfer-encoding, te", TE + "chunked"], CHUNKED),
    "TE": (["TE: trailers, chunked", "Trailer: Content-Length", LENGTH], BODY),
    "upgrade to something": (["Connection: upgrade", "Upgrade: chunked", LENGTH], BODY),
    "expected": (["Expect: 100-continue", LENGTH], BODY),
}


@pytest.mark.parametrize("name", ODD)
async def test_an_odd_request_is_one_request_for_the_model_server(name):
    """Sent on with one length of ours; and what stands behind it is a request of its own, no more and no less."""
    lines, body = ODD[name]
    behind = HIDDEN.replace(b"Host: x", b"Host: y\r\nConnection: close")
    async with daemon({"a": scripted()}) as served:
        with trio.fail_after(PATIENCE):
            async with await connect(served.port) as client:
                await client.stream.send_all(head(POST, "Host: x", *lines) + body)
                client.parser.send(h11.Request(method="POST", target="/", headers=[("host", "x")]))
                client.parser.send(h11.EndOfMessage())
                answer = await client.answer()
                assert answer.status == 200
                assert answer.json()["echo"] == json.loads(BODY)
                seen = (await fetch(served.model_ports["a"], "GET", "/seen")).json()
                await client.stream.send_all(behind)
                said = await read_to_end(client.stream)
        assert seen["body"].encode() == BODY
        names = [name for name, _ in seen["headers"]]
        assert [value for name, value in seen["headers"] if name == "content-length"] == [str(len(BODY))]
        assert len(names) == len(set(names))
        assert names.count("host") == 1
        hop_by_hop = {"transfer-encoding", "connection", "te", "trailer", "upgrade", "expect", "x-b"}
        assert hop_by_hop.isdisjoint(names)
        assert statuses(said) == [200]
        assert said.endswith(b"a /smuggled")
        assert (await counts(served.model_ports["a"]))["started"] == 2


async def test_lines_that_end_in_a_line_feed_alone_are_lines():
    """Of the whole head (RFC 9112, 2.2 allows it); so nothing that a stricter reader takes for a value is a field."""
    async with daemon({"a": scripted()}) as served:
        said = await said_to(served.port, f"{POST}\nHost: x\nConnection: close\n{LENGTH}\n\n".encode() + BODY)
        assert statuses(said) == [200]
        assert (await fetch(served.model_ports["a"], "GET", "/seen")).json()["body"].encode() == BODY


@pytest.mark.parametrize(
    "fields",
    [
        [(b"transfer-encoding", b"chunked")],
        [(b"content-length", b"3")],
        [(b"content-length", b"-1")],
        [(b"connection", b"close")],
        [(b"x-a", b"b\r\nX-C: d")],
        [(b"x-a", b"b\nX-C: d")],
        [(b"x-a", b"b\0c")],
        [(b"x a", b"b")],
        [(b"X-A", b"b")],
        [(b":path", b"/upstream/a/other")],
    ],
    ids=lambda fields: repr(fields[0]),
)
async def test_http2_cannot_say_what_http1_would_misread(fields):
    """A request over HTTP/2 that could become two in HTTP/1.1 reaches no model server."""
    async with daemon({"a": scripted()}) as served:
        await provoke(
            served.port,
            [http2(raw_request(b"POST", b"/upstream/a/x", *fields), DataFrame(1, BODY, flags=["END_STREAM"]))],
        )
        assert (await fetch(served.port, "GET", "/health")).status == 200
        assert await running(served.port) == {}


def raw_request(method: bytes, path: bytes, *fields: tuple[bytes, bytes]):
    """The head of a request over HTTP/2, as nobody checks it; a body follows."""
    frame = request(method, path, flags=("END_HEADERS",))
    frame.data += hpack.Encoder().encode(fields)
    return frame


async def provoke(port: int, parts: list[bytes]) -> bytes:
    """Send *parts*, each but the first upon an answer, and read to the end, which a PING's answer is, too."""
    received = b""
    with trio.fail_after(PATIENCE):
        async with await connect(port) as client:
            for number, part in enumerate(parts):
                while number and b'"error"' not in received:
                    received += await client.stream.receive_some()
                await send(client.stream, part)
            while PING not in received and (data := await receive_or_nothing(client.stream)):
                received += data
    return received


# ---- sizes ----------------------------------------------------------------------------------------

KIB = 1024
FORM = ("content-type", "multipart/form-data; boundary=x")
LIMITS = {"max_request_body": "64KiB", "max_upload": "128KiB"}


@pytest.mark.parametrize(
    "lines",
    [
        pytest.param(["GET /health HTTP/1.1", "Host: x", "X-A: " + "y" * 2**20], id="a field of 1 MiB"),
        pytest.param(["GET /health HTTP/1.1", "Host: x", *["X-A: y"] * 100_000], id="100,000 fields"),
        pytest.param(["GET /" + "x" * 2**20 + " HTTP/1.1", "Host: x"], id="a target of 1 MiB"),
        pytest.param(["GET /health HTTP/1.1", "Host: x", "X: " + "\r\n y" * 200_000], id="a field of 200,000 lines"),
        pytest.param(["X" * 2**20], id="no request at all"),
    ],
)
async def test_an_oversized_head_is_refused(lines):
    """With 431 or 400 and the end of the connection, whether or not it ever ends."""
    async with daemon({"a": scripted()}) as served:
        for data in (head(*lines), head(*lines)[:-4]):
            assert statuses(await said_to(served.port, data)) in ([431], [400])
        assert (await fetch(served.port, "GET", "/health")).status == 200


async def test_a_large_head_within_the_limit_arrives():
    """Long cookies and long queries are legal."""
    async with daemon({"a": scripted()}) as served:
        fields = [("x-long", "y" * 20_000), *((f"x-{number}", "z") for number in range(100))]
        answer = await fetch(served.port, "GET", f"/upstream/a/x?{'q' * 20_000}", b"", *fields)
        assert (answer.status, len(answer.body)) == (200, len("a /x?") + 20_000)
        seen = dict((await fetch(served.model_ports["a"], "GET", "/seen")).json()["headers"])
        assert all(seen[name] == value for name, value in fields)


@pytest.mark.parametrize(
    ("target", "field", "limit", "setting"),
    [
        (CHAT, ("content-type", "application/json"), 64 * KIB, "max_request_body"),
        (CHAT, ("content-type", "application/x-www-form-urlencoded"), 64 * KIB, "max_request_body"),
        (CHAT, FORM, 128 * KIB, "max_upload"),
        ("/upstream/a/x", ("content-type", "application/json"), 128 * KIB, "max_upload"),
        ("/comfyui/", FORM, 128 * KIB, "max_upload"),
    ],
)
async def test_an_oversized_body_is_refused(target, field, limit, setting):
    """At once where its length is told, else when it passes the limit; no model is loaded for it."""
    async with daemon({"a": scripted(), "comfyui_auto": scripted()}, **LIMITS) as served:
        for told in (True, False):
            with trio.fail_after(PATIENCE):
                async with await connect(served.port) as client:
                    length = ("content-length", str(limit + 1)) if told else ("transfer-encoding", "chunked")
                    await client.send(h11.Request(method="POST", target=target, headers=[("host", "x"), field, length]))
                    if not told:
                        await send(client.stream, b"%x\r\n%s\r\n" % (limit, b"x" * limit))
                        await send(client.stream, b"1\r\nx\r\n")
                    answer = await client.answer()
                    assert answer.status == 413
                    assert answer.json()["error"]["message"].endswith(f"larger than {limit} bytes ({setting})")
                    await client.stream.send_eof()
                    assert await read_to_end(client.stream) == b""
        assert await running(served.port) == {}


async def test_a_body_of_just_the_limit_is_served():
    """The limit is the largest that passes."""
    async with daemon({"a": scripted()}, **LIMITS) as served:
        padding = 64 * KIB - len(chat("a", padding=""))
        assert (await fetch(served.port, "POST", CHAT, chat("a", padding="x" * padding))).status == 200
        assert (await fetch(served.port, "POST", CHAT, chat("a", padding="x" * (padding + 1)))).status == 413
        assert (await fetch(served.port, "POST", "/upstream/a/x", b"x" * 128 * KIB)).status == 200


# ---- what ended Hypercorn's process, through the whole daemon ---------------------------------------

HANDSHAKE = upgrade()[0].replace(b"/ws", b"/upstream/a/ws")
ENDING = {
    **HOSTILE,
    "byte-behind-upgrade-to-a-model": [HANDSHAKE + b"\x81"],
    "frame-behind-upgrade-to-a-model": [HANDSHAKE + b"\x81\x80\x00\x00\x00\x00" * 100],
    "protocol-to-a-model-not-ascii": [HANDSHAKE[:-2] + b"Sec-WebSocket-Protocol: \xff\r\n\r\n"],
    "path-of-a-model-not-ascii": [http2(request(path=b"/upstream/a/\xff"))],
    "method-for-a-model-not-ascii": [http2(request(method=b"\xff", path=b"/upstream/a/x"))],
    "connect-without-path-twice": [http2(CONNECT, CONNECT)],
    "data-after-the-answer-of-a-model": [
        http2(request(b"POST", b"/upstream/b/x", flags=("END_HEADERS",))),
        DataFrame(1, b"x" * 1000).serialize() * 10 + PingFrame(0, PING).serialize(),
    ],
}


@pytest.mark.parametrize("name", ENDING)
async def test_nothing_that_a_client_sends_ends_the_daemon(name):
    """Its connection may end; others go on, and new ones are served."""
    async with daemon({"a": scripted()}, max_upload="64MiB") as served, await connect(served.port) as neighbour:
        for _ in range(3):
            await provoke(served.port, ENDING[name])
            with trio.fail_after(PATIENCE):
                await neighbour.ask("GET", "/health")
                assert (await neighbour.answer()).text == "OK"
                neighbour.parser.start_next_cycle()
            assert (await fetch(served.port, "GET", "/health")).status == 200


BEHIND = {
    "half a frame": b"\x81",
    "a frame without a mask": b"\x81\x01x",
    "a reserved opcode": b"\x83\x80\x00\x00\x00\x00",
    "reserved bits": b"\xf1\x80\x00\x00\x00\x00",
    "a long ping": b"\x89\xfe\x00\x7e" + bytes(4 + 126),
    "a ping in pieces": b"\x09\x80\x00\x00\x00\x00",
    "text that is none": b"\x81\x82\x00\x00\x00\x00\xff\xff",
    "a length beyond all": b"\x82\xff\xff\xff\xff\xff\xff\xff\xff\xff" + bytes(4),
    "a close of one byte": b"\x88\x81\x00\x00\x00\x00\x03",
    "a close with no reason at all": b"\x88\x82\x00\x00\x00\x00\xff\xff",
    "a continuation of nothing": b"\x80\x80\x00\x00\x00\x00",
    "a second handshake": HIDDEN,
}


async def test_nothing_that_a_client_sends_on_a_websocket_ends_the_daemon():
    """Behind a handshake that a model server has accepted, and along with it."""
    async with websocket_peers.model_server(websocket_peers.echo) as model:
        row = {"cmd": list(python("import signal; signal.pause()")), "proxy": model.url}
        async with daemon({"a": {**row, "check_endpoint": "none", "port_owner": "any"}}) as served:
            for name, data in BEHIND.items():
                for along in (data, b""):
                    with trio.fail_after(PATIENCE):
                        async with await connect(served.port) as client:
                            await client.stream.send_all(HANDSHAKE + along)
                            if not along:
                                assert (await client.stream.receive_some()).startswith(b"HTTP/1.1 101 "), name
                                await send(client.stream, data)
                            with suppress(trio.BrokenResourceError):
                                await client.stream.send_eof()
                            await read_to_end(client.stream)
                    assert (await fetch(served.port, "GET", "/health")).status == 200, name
            assert len(model.peers) >= len(BEHIND)


# ---- websockets: who may -----------------------------------------------------------------------------


async def test_a_websocket_of_a_foreign_page_is_refused():
    """Browsers let every page open one, and keys do not help there: 403, before anything is loaded."""
    async with daemon({"a": scripted()}) as served:
        for target in ("/upstream/a/ws", "/v1/realtime?model=a"):
            assert await socket_status(served.port, target, ("Origin", "https://evil.example")) == 403
            assert await socket_status(served.port, target, ("Origin", "null")) == 403
        assert await running(served.port) == {}
        assert await socket_status(served.port, "/upstream/a/ws", ("Origin", "http://localhost:3000")) != 403


async def test_a_websocket_without_a_key_is_refused():
    """With a proper 401, and a path that is none with 404."""
    async with daemon({"a": scripted()}, api_keys=[SECRET]) as served:
        with trio.fail_after(PATIENCE):
            async with await connect(served.port) as client:
                peer = await websocket_peers.connect(client.stream, "/upstream/a/ws")
                assert peer.response.status_code == 401
                assert peer.response.headers["WWW-Authenticate"] == 'Basic realm="trioswap"'
                assert json.loads(peer.response.body)["error"]["code"] == "unauthorized"
        assert await socket_status(served.port, "/nowhere") == 404
        answer = await fetch(served.port, "GET", "/running", b"", SHOWN[0])
        assert answer.json() == {"running": []}
