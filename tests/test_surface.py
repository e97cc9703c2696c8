"""llama-swap's HTTP surface, route by route: what is asked, what is answered, and what the model server has seen.

Sections are those of the surface reference.  Where trioswap differs on purpose, docs/differences.md says so, and
here is what it does instead.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import attrs
import h11
import pytest
import trio
from children import PATIENCE, free_port, model_argv
from children import running as child
from daemons import (
    Answer,
    Daemon,
    by_hand,
    chat,
    connect,
    counts,
    daemon,
    eventually,
    fetch,
    is_running,
    running,
    scripted,
)
from model_server import SHAPES

from trioswap import __version__
from trioswap.routes import ROUTES

CHAT = "/v1/chat/completions"
DIFFERENCES = Path(__file__).parent.parent / "docs" / "differences.md"

# Surface reference 1.1, and beside each route where the model server finds the request if that is elsewhere.
REFERENCE = """
POST /v1/chat/completions
POST /v1/responses
POST /v1/completions
POST /v1/messages
POST /v1/messages/count_tokens
POST /v1/embeddings
POST /reranking
POST /rerank
POST /v1/rerank
POST /v1/reranking
POST /infill
POST /completion
POST /v1/audio/speech
POST /v1/audio/voices
POST /v1/images/generations
POST /sdapi/v1/txt2img
POST /sdapi/v1/img2img
POST /audioapi/v1/tasks/run /v1/tasks/run
POST /v/chat/completions /chat/completions
POST /v/responses /responses
POST /v/completions /completions
POST /v/messages /messages
POST /v/messages/count_tokens /messages/count_tokens
POST /v/embeddings /embeddings
POST /v/rerank /rerank
POST /v/reranking /reranking
POST /v1/audio/transcriptions
POST /v1/images/edits
GET /v1/audio/voices
GET /sdapi/v1/loras
GET /props
GET /v1/models
GET /models
GET /running
GET /unload
GET /logs
GET /logs/stream
GET /logs/stream/{id}
GET /metrics
GET /health
GET /wol-health
GET /
GET /favicon.ico
GET /ui/
GET /upstream
ANY /upstream/{model}/{rest}
ANY /comfyui
ANY /comfyui/{rest}
POST /api/models/unload
POST /api/models/unload/{model}
GET /api/profiles
PUT /api/profiles/active
POST /api/inflight/{id}/cancel
GET /api/events
GET /api/metrics/activity
GET /api/metrics/stats
GET /api/performance
GET /api/version
GET /api/hardware
GET /api/captures/{id}
"""
KNOWN = {" ".join(line.split()[:2]): line.split()[-1] for line in REFERENCE.split("\n") if line}
"""Route to the path that the model server sees."""

NOT_YET = {
    "GET /unload": "for good: a GET must not change state (docs/differences.md)",
    "GET /metrics": "comes with the numbers",
    "GET /api/metrics/activity": "comes with the numbers",
    "GET /api/metrics/stats": "comes with the numbers",
    "GET /api/performance": "comes with the numbers",
    "GET /api/hardware": "comes with the numbers",
    "GET /api/captures/{id}": "comes with the numbers",
    "GET /favicon.ico": "comes with the pages",
    "GET /ui/": "comes with the pages",
    "GET /upstream": "comes with the pages: it leads to one",
}

# Ours, which llama-swap does not have.
MORE_POSTS = (
    "/v1/audio/translations",
    "/v1/images/variations",
    "/tokenize",
    "/detokenize",
    "/apply-template",
)


# ---- the table ---------------------------------------------------------------------------------


@attrs.frozen
class Seen:
    """What a model server must have seen."""

    by: str
    target: str
    body: bytes | None = None
    """None: as the client sent it."""
    fields: Mapping[str, str | None] = attrs.field(factory=dict)
    """Headers; None: not there."""


Judge = Callable[[Answer], bool]


@attrs.frozen
class Row:
    """One request, and all that must come of it."""

    route: str
    """In `KNOWN`, or one of ours."""
    target: str
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()
    method: str = attrs.field()
    status: int = 200
    shows: Mapping[str, str | None] = attrs.field(factory=dict)
    """Headers of the response; None: not there."""
    answer: dict[str, object] | str | bytes | Judge | None = None
    """The body: some of a JSON object, a whole text, or a judge of the whole; None: whatever it is."""
    seen: Seen | None = None
    """None: no model server has seen anything."""

    @method.default
    def _method(self) -> str:
        return self.route.split()[0]

    def mistakes(self, answer: Answer, seen: list[tuple[str, dict]]) -> Iterable[str]:
        """What is not as it must be."""
        if answer.status != self.status:
            yield f"{answer.status} instead of {self.status}: {answer.body[:300]!r}"
        shown = {name: ", ".join(v for n, v in answer.headers if n == name) or None for name in self.shows}
        if shown != dict(self.shows):
            yield f"{shown} instead of {self.shows}"
        if not (answer["x-request-id"] or "").startswith("req_"):
            yield "no x-request-id"
        if not is_as_expected(self.answer, answer):
            yield f"{answer.body[:500]!r} instead of {self.answer!r}"
        yield from self._differences(seen)

    def _differences(self, seen: list[tuple[str, dict]]) -> Iterable[str]:
        expected = [] if self.seen is None else [(self.seen.by, self.method, self.seen.target)]
        found = [(by, what["method"], what["target"]) for by, what in seen]
        if found != expected:
            yield f"seen by {found} instead of {expected}"
        elif self.seen is not None:
            [(_, what)] = seen
            body = self.body if self.seen.body is None else self.seen.body
            if what["body"] != body.decode("latin-1"):
                yield f"seen {what['body'][:500]!r} instead of {body[:500]!r}"
            fields = dict(what["headers"])
            wanted = {"host": "test", "x-forwarded-for": "127.0.0.1", "connection": None, "transfer-encoding": None}
            wanted |= {"content-length": str(len(body))} if body else {}
            wanted |= {name: value for name, value in self.headers if name == "content-type"}
            for name, value in (wanted | dict(self.seen.fields)).items():
                if fields.get(name) != value:
                    yield f"seen {name}: {fields.get(name)!r} instead of {value!r}"
            if len(fields) != len(what["headers"]):
                yield f"seen twice: {what['headers']}"


def is_as_expected(expected: object, answer: Answer) -> bool:
    """Whether the body is what a row says."""
    match expected:
        case None:
            return True
        case dict():
            document = answer.json() if answer["content-type"] == "application/json" else {}
            return expected.items() <= {key: document.get(key) for key in expected}.items() if document else False
        case str():
            return answer.text == expected
        case bytes():
            return answer.body == expected
    assert callable(expected)
    return expected(answer)


@asynccontextmanager
async def together(models: Mapping[str, object], **settings: object) -> AsyncIterator[Daemon]:
    """A daemon whose models may all be resident at once."""
    groups = {"all": {"swap": False, "members": list(models)}}
    async with daemon(models, groups=groups, **settings) as served:
        yield served


async def mistakes(served: Daemon, rows: Iterable[Row]) -> list[str]:
    """Ask for each row and compare: everything that is not as it must be."""
    wrong = []
    for row in rows:
        before = await arrived(served)
        answer = await fetch(served.port, row.method, row.target, row.body, *row.headers)
        after = await arrived(served)
        seen = [
            (name, (await fetch(served.model_ports[name], "GET", "/seen")).json())
            for name in after
            if after[name] > before[name]
        ]
        asked = f"{row.method} {row.target} {dict(row.headers)} {row.body[:80]!r}"
        wrong += [f"{asked}: {text}" for text in row.mistakes(answer, seen)]
    return wrong


async def arrived(served: Daemon) -> dict[str, int]:
    """How many requests each model server has got."""
    numbers = {}
    for name, port in served.model_ports.items():
        try:
            numbers[name] = (await counts(port))["started"]
        except OSError:
            numbers[name] = 0
    return numbers


async def is_under_way(served: Daemon, number: int) -> bool:
    """Whether so many requests to models are."""
    return len((await fetch(served.port, "GET", "/api/inflight")).json()["requests"]) == number


async def waits(served: Daemon) -> bool:
    """Whether one request waits."""
    return len((await fetch(served.port, "GET", "/api/queue")).json()["waiting"]) == 1


def error(kind: str, code: str, words: str = "") -> Judge:
    """An error in OpenAI's shape."""

    def judge(answer: Answer) -> bool:
        document = answer.json() if answer["content-type"] == "application/json" else {}
        said = document.get("error", {})
        whole = document.get("src") == "trioswap" and said.keys() == {"message", "type", "param", "code"}
        return whole and (said["type"], said["code"]) == (kind, code) and words in said["message"]

    return judge


WRONG = "invalid_request_error"
NOT_FOUND = error(WRONG, "not_found")
BAD = error(WRONG, "bad_request")
CONFLICT = error(WRONG, "conflict")
UNAVAILABLE = error("server_error", "service_unavailable")

JSON = ("content-type", "application/json")
FORM = ("content-type", "application/x-www-form-urlencoded")
MULTIPART = ("content-type", 'multipart/form-data; boundary="=x="')


def form(*parts: tuple[str, str]) -> bytes:
    """A multipart form of fields, and of a file where the name is `file`."""
    pieces = []
    for name, value in parts:
        file = '; filename="a.wav"\r\nContent-Type: audio/wav' if name == "file" else ""
        pieces.append(f'--=x=\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n{value}\r\n')
    return "".join([*pieces, "--=x=--\r\n"]).encode()


# Spelled as no library would: it must arrive so.
BODY = b'{ "model" :"a",\n"input":[1.0, 1e2, "\\u00e9 \xc3\xa9"], "stream": false , "n":10000000000000000000001}'


def posts() -> Iterable[Row]:
    paths = {path: seen for route, seen in KNOWN.items() for method, path in [route.split()] if method == "POST"}
    paths = {path: seen for path, seen in paths.items() if not path.startswith("/api/")}
    for path, seen in (paths | {path: path for path in MORE_POSTS}).items():
        kind = "audio/mpeg" if path.endswith("/speech") else "application/json"
        shape = SHAPES.get(path.rpartition("/")[2], {})
        answer = b"\xff\xfba" if path.endswith("/speech") else {"model": "a", "path": seen} | shape
        yield Row(
            f"POST {path}", path, BODY, (JSON,), shows={"content-type": kind}, answer=answer, seen=Seen("a", seen)
        )
        query = "?x=%2F+&y&model=b"
        yield Row(f"POST {path}", path + query, BODY, (JSON,), seen=Seen("a", seen + query))


def uploads() -> Iterable[Row]:
    for path in ("/v1/audio/transcriptions", "/v1/audio/translations", "/v1/images/edits", "/v1/images/variations"):
        for parts in (
            [("model", "a"), ("file", "RIFF\r\n--=x\r\n"), ("n", "1")],
            [("file", "RIFF\r\n--=x\r\n"), ("n", "1"), ("model", "a")],
        ):
            answer = {"model": "a", "path": path} | SHAPES[path.rpartition("/")[2]]
            yield Row(f"POST {path}", path, form(*parts), (MULTIPART,), answer=answer, seen=Seen("a", path))


def queries() -> Iterable[Row]:
    for path in ("/v1/audio/voices", "/sdapi/v1/loras", "/props"):
        for query in ("?model=a", "?x=%2f&model=a&y=+", "?model=a&model=b", "?model=%61"):
            target = path + query
            yield Row(f"GET {path}", target, answer=f"a {target}", seen=Seen("a", target))
        yield Row(f"GET {path}", f"{path}?model=a", method="HEAD", answer=b"", seen=Seen("a", f"{path}?model=a"))
        yield Row(f"GET {path}", path, status=400, answer=BAD)
        yield Row(f"GET {path}", f"{path}?model=", status=400, answer=BAD)
        yield Row(f"GET {path}", f"{path}?model=z", status=404, answer=NOT_FOUND)


def upstream() -> Iterable[Row]:
    route = "ANY /upstream/{model}/{rest}"

    def get(target: str, by: str, seen: str) -> Row:
        return Row(route, target, method="GET", answer=f"{by} {seen}", seen=Seen(by, seen))

    yield get("/upstream/a/", "a", "/")
    yield get("/upstream/a/v1/models?q=1&q=%20+", "a", "/v1/models?q=1&q=%20+")
    yield get("/upstream/a/%2Fx/%252F/%C3%A4//y/../z", "a", "/%2Fx/%252F/%C3%A4//y/../z")
    yield get("/upstream/nick/x", "a", "/x")
    yield get("/upstream/org/x", "org", "/x")
    yield get("/upstream/org/model/x", "org/model", "/x")
    yield get("/upstream/org%2Fmodel/x", "org/model", "/x")
    yield get("/upstream/org/model/model/x", "org/model", "/model/x")
    yield get("/upstream/a/style.css", "a", "/style.css")  # the model is ready by now
    for method in ("POST", "PUT", "PATCH", "DELETE", "PROPFIND"):
        answer = {"model": "a", "path": "/v1/x"} if method == "POST" else "a /v1/x"
        yield Row(route, "/upstream/a/v1/x", b'{"model": "b"}', (JSON,), method, answer=answer, seen=Seen("a", "/v1/x"))
    yield Row(route, "/upstream/a/x", method="HEAD", answer=b"", seen=Seen("a", "/x"))
    for target in ("/upstream/a?q=%2F", "/upstream/org%2Fmodel?q=%2F"):
        shows = {"location": target.replace("?", "/?")}
        for method, status in (("GET", 301), ("HEAD", 301), ("POST", 308), ("DELETE", 308)):
            yield Row(route, target, method=method, status=status, shows=shows, answer=b"")
    for target in ("/upstream/z", "/upstream/z/a/x", "/upstream//a/x", "/upstream/%00/x"):
        yield Row(route, target, method="GET", status=404, answer=NOT_FOUND)
    yield Row(route, "/upstream/b/style.css", method="GET", status=409, answer=CONFLICT)
    yield Row(route, "/upstream/b/x/logo.png?v=1", method="POST", status=409, answer=CONFLICT)


def small() -> Iterable[Row]:
    """What is answered without a model server."""
    plain = {"content-type": "text/plain; charset=utf-8"}
    for path in ("/health", "/wol-health"):
        yield Row(f"GET {path}", path, shows=plain, answer="OK")
    yield Row("GET /", "/", shows=plain)
    about = {"version": __version__, "commit": "", "build_date": ""}
    yield Row("GET /api/version", "/api/version", answer=about)
    for path in ("/v1/models", "/models"):
        yield Row(f"GET {path}", path, answer=lambda it: [row["id"] for row in it.json()["data"]] == ["a", "b"])
        yield Row(f"GET {path}", path, method="HEAD", shows={"content-type": "application/json"}, answer=b"")
    yield Row("GET /v1/models/{model}", "/v1/models/a", answer={"id": "a", "object": "model", "owned_by": "trioswap"})
    yield Row("GET /v1/models/{model}", "/v1/models/z", status=404, answer=NOT_FOUND)
    yield Row("GET /running", "/running", answer={"running": []})
    yield Row("GET /logs", "/logs", shows=plain)
    for path in ("/logs/stream", "/logs/stream/proxy", "/logs/stream/upstream", "/logs/stream/a", "/logs/stream/nick"):
        route = "GET /logs/stream" if path == "/logs/stream" else "GET /logs/stream/{id}"
        yield Row(route, path + "?no-follow", shows=plain)
        quiet = plain | {"x-content-type-options": "nosniff", "x-accel-buffering": "no"}
        yield Row(route, path, method="HEAD", shows=quiet, answer=b"")
    yield Row("GET /logs/stream/{id}", "/logs/stream/z", status=404, answer=NOT_FOUND)
    yield Row("POST /api/models/unload", "/api/models/unload", answer={"msg": "ok"})
    for name, status in (("a", 200), ("nick", 200), ("z", 404)):
        answer = "OK" if status == 200 else NOT_FOUND
        yield Row("POST /api/models/unload/{model}", f"/api/models/unload/{name}", status=status, answer=answer)
    yield Row("POST /api/inflight/{id}/cancel", "/api/inflight/7/cancel", status=404, answer=NOT_FOUND)
    shows = {"content-type": "text/event-stream", "cache-control": "no-cache", "x-accel-buffering": "no"}
    yield Row("GET /api/events", "/api/events", method="HEAD", shows=shows, answer=b"")


def profiles() -> Iterable[Row]:
    show, activate = "GET /api/profiles", "PUT /api/profiles/active"
    rows = [
        {"id": "p", "description": "d", "pins": {"a": "b", "off": "", "x y": "b"}},
        {"id": "q", "description": "", "pins": {"z": "b"}},
    ]

    def put(body: object, **expected: object) -> Row:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return Row(activate, "/api/profiles/active", data, (JSON,), **expected)

    yield Row(show, "/api/profiles", answer={"active": None, "profiles": rows})
    yield put({"name": "p"}, answer={"active": "p"})
    yield put({"name": "z"}, status=404, answer=NOT_FOUND)
    for body in ({}, {"name": 1}, {"name": ["p"]}, [], b"{", b""):
        yield put(body, status=400, answer=BAD)
    yield Row(show, "/api/profiles", answer={"active": "p", "profiles": rows})
    # A pin acts wherever a model is named; the body says what is meant, the path loses the pin.
    renamed = BODY.replace(b'"a"', b'"b"')
    yield Row(f"POST {CHAT}", CHAT, BODY, (JSON,), answer={"model": "b"}, seen=Seen("b", CHAT, renamed))
    yield Row("GET /props", "/props?q=1&model=a", seen=Seen("b", "/props?q=1&model=b"), answer="b /props?q=1&model=b")
    yield Row("GET /props", "/props?model=x+y", seen=Seen("b", "/props?model=b"))
    for pin in ("a", "x%20y"):
        yield Row("ANY /upstream/{model}/{rest}", f"/upstream/{pin}/%2F", method="GET", seen=Seen("b", "/%2F"))
    for target in ("/props?model=off", "/upstream/off/x"):
        yield Row("GET /props", target, status=404, answer=NOT_FOUND)
    yield Row(
        "GET /v1/models", "/v1/models", answer=lambda it: [row["id"] for row in it.json()["data"]] == ["a", "b", "x y"]
    )
    yield put({"name": None}, answer={"active": None})
    yield Row("GET /props", "/props?model=a", seen=Seen("a", "/props?model=a"))
    yield put({"name": "q"}, answer={"active": "q"})
    yield put({"name": ""}, answer={"active": None})


def comfyui() -> Iterable[Row]:
    root, pages = "ANY /comfyui", "ANY /comfyui/{rest}"
    for method, status in (("GET", 301), ("HEAD", 301), ("POST", 308), ("PUT", 308)):
        yield Row(
            root, "/comfyui?x=%2F", method=method, status=status, shows={"location": "/comfyui/?x=%2F"}, answer=b""
        )
    yield Row(pages, "/comfyui/ws", method="GET", status=409, answer=CONFLICT)
    yield Row(pages, "/comfyui/prompt", b"{}", method="POST", status=409, answer=CONFLICT)
    yield Row(pages, "/comfyui/?x=1", method="GET", answer="comfyui_auto /?x=1", seen=Seen("comfyui_auto", "/?x=1"))
    yield Row(pages, "/comfyui/a%2Fb%20?x", method="GET", seen=Seen("comfyui_auto", "/a%2Fb%20?x"))
    yield Row(pages, "/comfyui/prompt", b"{}", method="POST", seen=Seen("comfyui_auto", "/prompt"))


def wrong_turns() -> Iterable[Row]:
    """What leads nowhere, and what browsers ask before they ask."""
    for route in KNOWN:
        method, path = route.split()
        path = path.replace("{model}", "a").replace("{rest}", "x").replace("{id}", "a")
        yield Row(
            route, path, method="OPTIONS", status=204, shows={"vary": "Origin", "content-length": None}, answer=b""
        )
    for target, clean in (
        ("//v1/models?x", "/v1/models?x"),
        ("/v1//models/../models", "/v1/models"),
        ("/v1/./chat//completions", CHAT),
        ("/x/../comfyui/", "/comfyui/"),
        ("//upstream/a/x", "/upstream/a/x"),
    ):
        for method in ("GET", "POST", "PUT"):
            yield Row("-", target, method=method, status=307, shows={"location": clean}, answer=b"")
    for target in (
        "/nowhere",
        "//nowhere",
        "/v1/..//x",
        "/v1",
        "/v1/models/",
        "/V1/models",
        "/v1%2Fmodels",
        "/v2/chat/completions",
        "/v/infill",
    ):
        yield Row("-", target, method="GET", status=404, answer=NOT_FOUND)
    for target, method, allowed in (
        (CHAT, "GET", "POST"),
        ("/v1/audio/voices", "PUT", "GET, HEAD, POST"),
        ("/v1/models", "POST", "GET, HEAD"),
        ("/api/models/unload", "GET", "POST"),
        ("/api/models/unload/a", "GET", "POST"),
        ("/api/profiles/active", "GET", "PUT"),
        ("/api/inflight/1/cancel", "GET", "POST"),
        ("/health", "DELETE", "GET, HEAD"),
    ):
        yield Row(
            "-", target, method=method, status=405, shows={"allow": allowed}, answer=error(WRONG, "invalid_request")
        )


def named() -> Iterable[Row]:
    """Section 1.3: where the model's name is found."""

    def post(body: bytes, *headers: tuple[str, str], by: str = "a", target: str = CHAT) -> Row:
        return Row(f"POST {CHAT}", target, body, headers, seen=Seen(by, target))

    def refused(body: bytes, *headers: tuple[str, str], words: str = "", status: int = 400) -> Row:
        judge = error(WRONG, "bad_request" if status == 400 else "not_found", words)
        return Row(f"POST {CHAT}", CHAT, body, headers, status=status, answer=judge)

    # JSON is JSON, whatever it is called.
    for declared in ("application/json; charset=utf-8", "Application/JSON", "text/plain", FORM[1], "x/y", ""):
        yield post(BODY, ("content-type", declared))
    yield post(BODY)
    yield post(b" \n\t" + BODY, FORM)
    yield post(b'{"model": "b", "model": "a"}', JSON)
    yield post(b'{"m\\u006fdel": "\\u0061"}', JSON)
    yield post(b'{"x": {"model": "b"}, "y": [{"model": "b"}], "model": "a"}', JSON)
    yield post(b'{"model": "nick"}', JSON)
    # Forms.
    yield post(b"x=%2f+&model=a&y", FORM)
    yield post(b"model=a&model=b", FORM)
    yield post(b"x=1", FORM, target=f"{CHAT}?model=a")
    yield post(b"model=a", FORM, target=f"{CHAT}?model=b")
    # Multipart forms.
    yield post(form(("x", "1"), ("model", "a")), MULTIPART)
    yield post(form(("file", "model=b"), ("model", "a")), MULTIPART)
    yield post(form(("file", "x")), MULTIPART, target=f"{CHAT}?model=a")
    yield post(form(("model", "b"), ("file", "x")), MULTIPART, target=f"{CHAT}?model=a")
    # Nothing that helps.
    for body in (b"{}", b'{"model": null}', b'{"model": ""}', b'{"x": {"model": "a"}}'):
        yield refused(body, JSON, words="no model is named")
    for body in (b'{"model": 7}', b'{"model": ["a"]}', b'{"model": true}', b'{"model": {"model": "a"}}'):
        yield refused(body, JSON, words='"model" must be a string')
    for body in (b"", b"{", b"null", b"a", b'{"model": "a"} x'):
        yield refused(body, JSON)
    for body in (b"", b"x=1", b"model="):
        yield refused(body, FORM, words="no model is named")
    yield refused(form(("file", "x")), MULTIPART, words="no model is named")
    yield refused(b"--=x=\r\n\r\n", MULTIPART)
    yield refused(b"x", ("content-type", "multipart/form-data"))
    yield refused(b'{"model": "z"}', JSON, status=404, words="z")
    yield Row(f"POST {CHAT}", f"{CHAT}?model=a", b"{}", (JSON,), status=400, answer=BAD)


def rewritten() -> Iterable[Row]:
    """Section 1.5: what of a body changes on its way."""
    route = f"POST {CHAT}"

    def post(sent: bytes, seen: bytes, by: str, *headers: tuple[str, str], target: str = CHAT, at: str = CHAT) -> Row:
        return Row(route, target, sent, headers, seen=Seen(by, at, seen))

    # use_model_name, and the alias without it.
    yield post(b'{"model": "plain-alias", "x":1.0}', b'{"model": "plain-alias", "x":1.0}', "plain", JSON)
    yield post(b'{ "model":"renamed", "x":1.0}', b'{ "model":"real", "x":1.0}', "renamed", JSON)
    yield post(b'{"model":"b","model":"alias"}', b'{"model":"real","model":"real"}', "renamed", JSON)
    yield post(b"x=%2f&model=alias&model=b", b"x=%2f&model=real&model=real", "renamed", FORM)
    query, seen = f"{CHAT}?model=alias&x=%2f", f"{CHAT}?model=real&x=%2f"
    yield post(b"x=1", b"x=1", "renamed", FORM, target=query, at=seen)
    parts = [("file", "RIFF"), ("model", "alias"), ("x", "1"), ("model", "renamed")]
    real = [(name, "real" if name == "model" else value) for name, value in parts]
    yield post(form(*parts), form(*real), "renamed", MULTIPART)
    yield post(form(*parts), form(*real), "renamed", MULTIPART, target=query, at=seen)
    for name in ("renamed", "alias", "real"):
        target, seen = f"/props?x=%2f&model={name}", "/props?x=%2f&model=real"
        if name != "real":
            yield Row("GET /props", target, seen=Seen("renamed", seen))
    # Filters: first out, then in, then in by name.
    sent = b'{"model": "filtered", "seed" :1, "top_k": 2, "o": {"seed": 3, "k": 4}, "n":1.0, "stop":["x"]}'
    added = b'"lb":{"5000":-1,"42":1},"p":{"q":[true]},"t":0.5}'
    kept = b'{"model": "filtered", "o": { "k": 4}, "n":1.0, "stop":["x","y"],' + added
    yield Row(route, CHAT, sent, (JSON,), seen=Seen("filtered", CHAT, kept))
    yield Row(
        route, CHAT, sent.replace(b"filtered", b"hot"), (JSON,),
        seen=Seen("filtered", CHAT, kept.replace(b"filtered", b"hot").replace(b"0.5", b"1.5")),
    )  # fmt: skip
    yield Row(route, CHAT, b'{"model": "filtered", "p": [1]}', (JSON,), status=400, answer=BAD)
    # What is no JSON has no fields to change; what has nothing to change stays as it is.
    yield post(b"model=filtered&seed=1", b"model=filtered&seed=1", "filtered", FORM)
    yield Row("GET /props", "/props?model=filtered&seed=1", seen=Seen("filtered", "/props?model=filtered&seed=1"))
    target = "/upstream/filtered/v1/chat/completions"
    yield Row("ANY /upstream/{model}/{rest}", target, sent, (JSON,), "POST", seen=Seen("filtered", CHAT))


# ---- one test for each family --------------------------------------------------------------------

A_AND_B = {"a": scripted(aliases=["nick"]), "b": scripted()}
PROFILES = {"p": {"description": "d", "pins": {"a": "b", "x y": "b", "off": ""}}, "q": {"pins": {"z": "b"}}}
FILTERS = {
    "strip_params": ["seed", "top_k", "o.seed", "model"],
    "set_params": {"t": 0.5, "stop.-1": "y", "p.q": [True], "model": "z", "lb.5000": -1, "lb.:42": 1},
    "set_params_by_id": {"hot": {"t": 1.5}},
}
REWRITERS = {
    "plain": scripted(aliases=["plain-alias"]),
    "renamed": scripted(aliases=["alias"], use_model_name="real"),
    "filtered": scripted(filters=FILTERS),
}

FAMILIES = {
    "posts": (posts, A_AND_B, {}),
    "uploads": (uploads, A_AND_B, {}),
    "queries": (queries, A_AND_B, {}),
    "upstream": (upstream, A_AND_B | {"org": scripted(), "org/model": scripted()}, {}),
    "comfyui": (comfyui, {"comfyui_auto": scripted(), "b": scripted()}, {}),
    "small": (small, A_AND_B, {}),
    "profiles": (profiles, A_AND_B, {"profiles": PROFILES}),
    "wrong turns": (wrong_turns, A_AND_B, {}),
    "named": (named, A_AND_B, {}),
    "rewritten": (rewritten, REWRITERS, {}),
}


@pytest.mark.parametrize("family", FAMILIES)
async def test_the_table(family):
    """Every row of one family, against one daemon, in the order in which they stand."""
    rows, models, settings = FAMILIES[family]
    async with together(models, **settings) as served:
        wrong = await mistakes(served, rows())
    assert not wrong, "\n".join(wrong)


def test_the_table_is_complete():
    """Each route of the reference has a row, or stands among those that are not there."""
    rows = {row.route for rows, _, _ in FAMILIES.values() for row in rows() if row.method != "OPTIONS"}
    assert rows >= KNOWN.keys() - NOT_YET.keys()
    assert not rows & NOT_YET.keys()


@pytest.mark.parametrize("route", NOT_YET)
async def test_what_is_not_there_is_a_404(route):
    """So that the list of what is missing cannot lie."""
    method, path = route.split()
    async with daemon({"a": scripted()}) as served:
        answer = await fetch(served.port, method, path.replace("{id}", "1"))
    assert (answer.status, answer.json()["error"]["code"]) == (404, "not_found")


def test_what_only_we_have_is_written_down():
    """Each route that is not llama-swap's has a word in the list of differences."""
    known = {route.split()[1].partition("{")[0] for route in KNOWN}
    ours = {route.path.partition("{")[0] for route in ROUTES} - known
    written = DIFFERENCES.read_text()
    assert not sorted(path for path in ours if path not in written)


# ---- names ---------------------------------------------------------------------------------------

NAMES = {
    "org/model": "org/model",
    "org/deep/model:q4": "org%2Fdeep%2fmodel:q4",
    "my model": "my%20model",
    "a#b": "a%23b",
    "what?": "what%3F",
    "100%": "100%25",
    "gr\u00f6\u00dfe \u6a21\u578b": "gr%C3%B6%C3%9Fe%20%E6%A8%A1%E5%9E%8B",
    "a+b&c=d": "a+b&c=d",
}


@pytest.mark.parametrize("name", NAMES)
async def test_any_name_is_a_name_everywhere(name):
    """In bodies, queries and paths; escapes are taken for what they mean, and only there."""
    escaped = NAMES[name]
    asked = re.sub("[+&=]", lambda found: f"%{ord(found[0]):02X}", escaped).replace("%20", "+")
    here = "ANY /upstream/{model}/{rest}"
    body = json.dumps({"model": name}).encode()
    raw = json.dumps({"model": name}, ensure_ascii=False).encode()
    rows = [
        Row(f"POST {CHAT}", CHAT, body, answer={"model": name}, seen=Seen(name, CHAT)),
        Row(f"POST {CHAT}", CHAT, raw, answer={"model": name}, seen=Seen(name, CHAT)),
        Row(f"POST {CHAT}", CHAT, form(("model", name)), (MULTIPART,), seen=Seen(name, CHAT)),
        Row(f"POST {CHAT}", CHAT, f"model={asked}".encode(), (FORM,), seen=Seen(name, CHAT)),
        Row("GET /props", f"/props?model={asked}", seen=Seen(name, f"/props?model={asked}")),
        Row(here, f"/upstream/{escaped}/a%2Fb", method="GET", answer=f"{name} /a%2Fb", seen=Seen(name, "/a%2Fb")),
        Row(here, f"/upstream/{escaped}", method="GET", status=301, shows={"location": f"/upstream/{escaped}/"}),
        Row("GET /v1/models/{model}", f"/v1/models/{escaped}", answer={"id": name}),
        Row("GET /logs/stream/{id}", f"/logs/stream/{escaped}?no-follow", answer=lambda it: "ready" in it.text),
        Row("POST /api/models/load/{model}", f"/api/models/load/{escaped}", answer={"msg": "ok", "model": name}),
        Row("POST /api/models/unload/{model}", f"/api/models/unload/{escaped}", answer="OK"),
    ]
    async with together({name: scripted(), "other": scripted()}) as served:
        wrong = await mistakes(served, rows)
    assert not wrong, "\n".join(wrong)


# ---- what travels on (1.6), and what comes back (1.7) ------------------------------------------------

SECRETS = (
    ("authorization", "Bearer k1"),
    ("x-api-key", "k2"),
    ("api-key", "k3"),
    ("proxy-authorization", "Basic eDp5"),
    ("cookie", "c=1"),
)
TALK = (
    ("x-forwarded-for", "192.0.2.1"),
    ("x-forwarded-proto", "https"),
    ("x-forwarded-host", "example.org"),
    ("forwarded", "for=192.0.2.1"),
    ("x-real-ip", "192.0.2.1"),
)
HOPS = (
    ("connection", "X-Mine, close-not"),
    ("x-mine", "1"),
    ("keep-alive", "timeout=5"),
    ("proxy-connection", "keep-alive"),
    ("te", "gzip"),
    ("trailer", "x-later"),
)
ROADS = (
    Row(f"POST {CHAT}", CHAT, BODY),
    Row(f"POST {CHAT}", CHAT, form(("model", "a")), (MULTIPART,)),
    Row("GET /props", "/props?model=a"),
    Row("ANY /upstream/{model}/{rest}", "/upstream/a/x", b"anything", method="PUT"),
)
TARGETS = (CHAT, CHAT, "/props?model=a", "/x")


def gone(*fields: tuple[str, str]) -> dict[str, None]:
    """As what a model server must not see."""
    return dict.fromkeys(name for name, _ in fields)


@pytest.mark.parametrize(
    ("sent", "seen", "settings"),
    [
        ((), {"user-agent": None, "accept-encoding": None, "accept": None, "x-forwarded-host": "test"}, {}),
        ((("accept-encoding", "br;q=1, gzip"), ("accept", "x/y")), {"accept-encoding": "br;q=1, gzip"}, {}),
        ((("user-agent", "u"), ("x-any", "1"), ("prefer", "wait=60")), {"user-agent": "u", "x-any": "1"}, {}),
        (HOPS, gone(*HOPS), {}),
        (
            TALK,
            {**gone(*TALK), "x-forwarded-for": "127.0.0.1", "x-forwarded-proto": "http", "x-forwarded-host": "test"},
            {},
        ),
        (
            TALK,
            {**dict(TALK), "x-forwarded-for": "192.0.2.1, 127.0.0.1", "forwarded": None, "x-real-ip": None},
            {"trusted_proxies": ["127.0.0.1"]},
        ),
        (SECRETS, {**dict(SECRETS), "proxy-authorization": None}, {}),
        (SECRETS, {**gone(*SECRETS), "cookie": "c=1"}, {"api_keys": ["k1"]}),
    ],
    ids=["nothing is invented", "encodings", "the rest", "hops", "talk", "a proxy of ours", "secrets", "our keys"],
)
async def test_request_headers(sent, seen, settings):
    """The client's Host, its address, and no more of this connection than that; by whatever road."""
    rows = [
        attrs.evolve(row, headers=row.headers + sent, seen=Seen("a", target, fields=seen))
        for row, target in zip(ROADS, TARGETS, strict=True)
    ]
    async with together(A_AND_B, **settings) as served:
        wrong = await mistakes(served, rows)
    assert not wrong, "\n".join(wrong)


async def test_a_body_in_chunks_gets_a_length():
    """Where it was read whole; nobody behind us has to put up with Transfer-Encoding."""
    async with together(A_AND_B) as served, await connect(served.port) as client:
        for target, kind, body in ((CHAT, JSON, BODY), (CHAT, MULTIPART, form(("model", "a"), ("file", "x" * 99)))):
            head = [("host", "test"), ("transfer-encoding", "chunked"), kind]
            await client.send(h11.Request(method="POST", target=target, headers=head))
            for cut in (body[:10], body[10:]):
                await client.send(h11.Data(data=cut))
            await client.send(h11.EndOfMessage())
            assert (await client.answer()).status == 200
            client.parser.start_next_cycle()
            seen = (await fetch(served.model_ports["a"], "GET", "/seen")).json()
            fields = dict(seen["headers"])
            assert (seen["body"].encode("latin-1"), fields["content-length"]) == (body, str(len(body)))
            assert "transfer-encoding" not in fields


@pytest.mark.parametrize(
    ("own", "settings", "seen"),
    [
        ({"api_key": "pk"}, {}, {"authorization": "Bearer pk", "x-api-key": "pk", "cookie": "c=1"}),
        ({}, {}, {"authorization": "Bearer k1", "x-api-key": "k2"}),
        ({}, {"api_keys": ["k1"]}, {"authorization": None, "x-api-key": None, "api-key": None}),
    ],
    ids=["its own key", "the client's", "ours is ours"],
)
async def test_a_peer(own, settings, seen):
    """Its own Host, its own names, its own key; who asks us is not its business."""
    port = free_port()
    fields = {**gone(*TALK), "host": f"127.0.0.1:{port}", **seen}
    far = partial(Seen, "far", fields=fields)
    sent = (*SECRETS, *TALK)
    rows = [
        Row(
            f"POST {CHAT}", CHAT, b'{"model":"far/m"}', sent, answer={"model": "far"}, seen=far(CHAT, b'{"model":"m"}')
        ),
        Row(f"POST {CHAT}", CHAT, b'{ "model":"m", "x":1.0}', sent, seen=far(CHAT, b'{ "model":"m", "x":1.0}')),
        Row(f"POST {CHAT}", CHAT, b"model=far%2Fm", (FORM, *sent), seen=far(CHAT, b"model=m")),
        Row(f"POST {CHAT}", CHAT, form(("model", "far/m")), (MULTIPART, *sent), seen=far(CHAT, form(("model", "m")))),
        Row("GET /props", "/props?model=far%2Fm", b"", sent, seen=far("/props?model=m")),
        Row("POST /v/rerank", "/v/rerank", b'{"model":"m"}', sent, seen=far("/rerank")),
        Row(
            "ANY /upstream/{model}/{rest}", "/upstream/far/m/%2F", b"", sent, "GET", answer="far /%2F", seen=far("/%2F")
        ),
        Row("ANY /upstream/{model}/{rest}", "/upstream/m/x.css", b"", sent, "GET", seen=far("/x.css")),
        Row("POST /api/models/unload/{model}", "/api/models/unload/far/m", b"", sent, status=404, answer=NOT_FOUND),
    ]
    peers = {"far": {"proxy": f"http://127.0.0.1:{port}", "models": ["m"], **own}}
    async with child(model_argv("far", port=port), until="ready"), together(A_AND_B, peers=peers, **settings) as served:
        with_peer = attrs.evolve(served, model_ports={**served.model_ports, "far": port})
        wrong = await mistakes(with_peer, rows)
    assert not wrong, "\n".join(wrong)


async def test_response_headers():
    """What concerns the connection stays behind; so do interim answers and trailers, which ASGI has no words for."""
    sent = [
        ("content-type", "text/event-stream; charset=utf-8"), ("transfer-encoding", "chunked"),
        ("trailer", "x-late"), ("x-accel-buffering", "yes"), ("connection", "x-hop"), ("x-hop", "1"),
        ("keep-alive", "timeout=1"), ("proxy-authenticate", "Basic"), ("x-own", "a"), ("x-own", "b"),
        ("access-control-allow-origin", "http://theirs.example"),
    ]  # fmt: skip
    async with by_hand() as server, daemon({"a": server}) as served, await connect(served.port) as client:
        await client.ask("POST", CHAT, chat("a"))
        async with await server.accept() as model:
            while not isinstance(await model.next_event(), h11.EndOfMessage):
                pass
            for status in (102, 103):
                await model.send(h11.InformationalResponse(status_code=status, headers=[("link", "</x>")]))
            await model.send(h11.Response(status_code=203, headers=sent))
            await model.send(h11.Data(data=b"data: 1\n\n"))
            await model.send(h11.EndOfMessage(headers=[("x-late", "1")]))
            head = await client.next_event()
            while not isinstance(event := await client.next_event(), h11.EndOfMessage):
                assert isinstance(event, h11.Data)
        await server.close()
    fields = [(name.decode(), value.decode()) for name, value in head.headers]
    assert (type(head), head.status_code, event.headers) == (h11.Response, 203, [])
    assert [value for name, value in fields if name == "x-own"] == ["a", "b"]
    assert [value for name, value in fields if name == "x-accel-buffering"] == ["no"]
    theirs = {"connection", "x-hop", "keep-alive", "proxy-authenticate", "trailer", "access-control-allow-origin"}
    assert not theirs & dict(fields).keys()


# ---- selectors (1.8) -----------------------------------------------------------------------------

SELECTORS = {
    "first": {"strategy": "pin", "targets": ["b", "a"]},
    "warm": {"strategy": "warm", "targets": ["a", "b"]},
    "spill": {"strategy": "spillover", "targets": ["a", "b"], "settings": {"spillover": 1}},
}


async def test_selectors_choose_and_name_the_chosen():
    """In every way in which a model can be named; `warm` goes where a model is loaded."""
    rows = [
        Row(f"POST {CHAT}", CHAT, b'{ "model":"first"}', seen=Seen("b", CHAT, b'{ "model":"b"}')),
        Row(f"POST {CHAT}", CHAT, b"model=first", (FORM,), seen=Seen("b", CHAT, b"model=b")),
        Row(f"POST {CHAT}", CHAT, form(("model", "first")), (MULTIPART,), seen=Seen("b", CHAT, form(("model", "b")))),
        Row("GET /props", "/props?model=first", seen=Seen("b", "/props?model=b")),
        Row("ANY /upstream/{model}/{rest}", "/upstream/first/x", method="GET", seen=Seen("b", "/x")),  # ours
        Row("GET /props", "/props?model=warm", seen=Seen("b", "/props?model=b")),
        Row("GET /props", "/props?model=spill", seen=Seen("b", "/props?model=b")),
        Row("POST /api/models/unload/{model}", "/api/models/unload/b"),
        Row("GET /props", "/props?model=warm", seen=Seen("a", "/props?model=a")),
        Row("GET /v1/models/{model}", "/v1/models/warm", answer={"status": {"value": "loaded"}}),
        Row("GET /v1/models/{model}", "/v1/models/first", answer={"status": {"value": "unloaded"}}),
    ]
    async with together(A_AND_B, selectors=SELECTORS) as served:
        wrong = await mistakes(served, rows)
    assert not wrong, "\n".join(wrong)


async def test_a_busy_target_spills_over():
    """The second request goes to the cold target while the first runs, and back when that is free."""
    async with together(A_AND_B, selectors=SELECTORS) as served, await connect(served.port) as busy:
        await busy.ask("POST", CHAT, chat("spill", stream=True, chunks=10**6, chunk_delay=0.01))
        assert b'"model": "a"' in await busy.piece_of_body()
        for _ in range(3):
            assert (await fetch(served.port, "POST", CHAT, chat("spill"))).json()["model"] == "b"
            await eventually(partial(is_under_way, served, 1))  # a row ends a moment after its answer
        [row] = (await fetch(served.port, "GET", "/api/inflight")).json()["requests"]
        assert (row["model"], row["metadata"]) == ("a", {"selector": "spill"})


# ---- errors (1.10) ------------------------------------------------------------------------------


def failing() -> Iterable[Row]:
    """Each situation in which we answer ourselves, or cannot get an answer."""

    def get(target: str, status: int, judge: Judge, *headers: tuple[str, str], **shows: str | None) -> Row:
        shown = {name.replace("_", "-"): value for name, value in shows.items()}
        return Row("-", target, b"", headers, "GET", status, shows=shown, answer=judge)

    def post(model: str, status: int, judge: Judge, **shows: str | None) -> Row:
        row = get(CHAT, status, judge, **shows)
        return attrs.evolve(row, method="POST", body=chat(model))

    yield post("z", 404, error(WRONG, "not_found", 'model "z" is not configured'), retry_after=None)
    for accept in ("text/plain", "text/html", "application/json, text/plain, */*"):
        yield attrs.evolve(post("z", 404, NOT_FOUND), headers=(("accept", accept),))
    yield get("/nowhere", 404, error(WRONG, "not_found", "no such path: /nowhere"))
    yield get(CHAT, 405, error(WRONG, "invalid_request", "use POST"), allow="POST")
    yield attrs.evolve(
        post("a", 413, error(WRONG, "invalid_request", "max_request_body")), body=chat("a", x="x" * 2048)
    )
    foreign = (("origin", "http://pages.example"), ("sec-fetch-site", "cross-site"))
    yield get("/props?model=a", 403, error("authentication_error", "forbidden", "http://pages.example"), *foreign)
    yield get("/upstream/a/x.css", 409, error(WRONG, "conflict", "not loaded"))
    yield get("/comfyui/", 404, error(WRONG, "not_found", "comfyui_auto"))
    yield post("broken", 503, error("server_error", "service_unavailable", "exited with 7"), retry_after="1")
    yield post("far/m", 502, error("server_error", "bad_gateway", 'peer "far"'), retry_after=None)


@pytest.mark.parametrize("path", [CHAT, "/v1/messages"])
async def test_errors(path, monkeypatch):
    """Status, type and code of every situation; always JSON, whatever the client accepts."""
    monkeypatch.setattr("trioswap.runs.DEATH_NOTICE", math.inf)  # nobody waits to be told of the end of a peer
    models = A_AND_B | {"broken": scripted("--exit-at-start", 7)}
    peers = {"far": {"proxy": f"http://127.0.0.1:{free_port()}", "models": ["m"]}}
    rows = [row if path == CHAT or row.target != CHAT else to_anthropic(row) for row in failing()]
    async with together(models, peers=peers, max_request_body="1KiB") as served:
        wrong = await mistakes(served, rows)
    assert not wrong, "\n".join(wrong)


def to_anthropic(row: Row) -> Row:
    """The same at Anthropic's endpoint, in its shape."""
    kinds = {404: "not_found_error", 405: WRONG, 413: "request_too_large", 502: "api_error", 503: "overloaded_error"}

    def judge(answer: Answer) -> bool:
        document = answer.json()
        shape = document.keys() == {"type", "error"} and document["error"].keys() == {"type", "message"}
        return shape and document["error"]["type"] == kinds[row.status]

    return attrs.evolve(row, target="/v1/messages", answer=judge)


@pytest.mark.parametrize(
    ("flags", "settings", "status", "code"),
    [
        (("--die-on-request",), {}, 502, "bad_gateway"),
        (("--answer-delay", 1000), {"timeouts": {"response_header": 0.2}}, 504, "gateway_timeout"),
    ],
)
async def test_errors_of_a_server_that_was_asked(flags, settings, status, code, monkeypatch):
    """With words of ours; llama-swap has an empty 502 for both."""
    monkeypatch.setattr("trioswap.runs.DEATH_NOTICE", math.inf)  # nor of the end of who is merely late
    async with daemon({"a": scripted(*flags, **settings)}) as served:
        answer = await fetch(served.port, "POST", CHAT, chat("a"))
    assert answer.status == status
    assert error("server_error", code, 'model "a" failed')(answer)


async def test_the_server_s_own_errors_are_its_own():
    """Whatever the status; only the answer's id is ours."""
    async with daemon({"a": scripted("--status", 429)}) as served:
        answer = await fetch(served.port, "POST", CHAT, chat("a"))
    assert (answer.status, answer.json()["error"]["type"], answer["retry-after"]) == (429, "scripted", None)


# ---- keys (4.1) and web pages (4.3) ------------------------------------------------------------------

BASIC = "Basic " + base64.b64encode(b"anybody:k1").decode()
KEYS = {
    "reader": {"key": "k-read", "read_only": True},
    "small": {"key": "k-small", "models": ["b"]},
}


def locked() -> Iterable[Row]:
    """What a key opens, and what is open anyway."""
    challenge = {"www-authenticate": 'Basic realm="trioswap"'}
    words = "unauthorized: invalid or missing API key"
    forbidden = error("authentication_error", "forbidden")
    for path in ("/health", "/wol-health", "/"):
        yield Row(f"GET {path}", path)
    yield Row("-", "/nowhere", method="GET", status=404, answer=NOT_FOUND)
    yield Row("-", CHAT, method="GET", status=405)
    preflight = (("origin", "http://pages.example"), ("access-control-request-headers", "x-a, b c, y"))
    shows = {
        "access-control-allow-origin": "*",
        "access-control-allow-methods": "GET, POST, PUT, PATCH, DELETE, OPTIONS",
        "access-control-allow-headers": "x-a, y",
        "access-control-max-age": "86400",
    }
    yield Row("-", CHAT, b"", preflight, "OPTIONS", 204, shows, b"")
    usual = {"access-control-allow-headers": "Content-Type, Authorization, Accept, X-Requested-With"}
    yield Row("-", "/nowhere", b"", preflight[:1], "OPTIONS", 204, usual, b"")
    for route in KNOWN.keys() - NOT_YET.keys() - {"GET /health", "GET /wol-health", "GET /"}:
        method, path = route.replace("ANY", "GET").split()
        target = path.replace("{model}", "a").replace("{rest}", "x").replace("{id}", "a") + "?model=a"
        for headers in ((), (("authorization", "Bearer x"), ("x-api-key", "k1")), (("cookie", "k1"),)):
            yield Row(
                route, target, BODY, headers, method, 401, challenge, lambda it: it.json()["error"]["message"] == words
            )
    yield Row("-", "/v1/models?api_key=k1", method="GET", status=401)
    for field in (("authorization", BASIC), ("authorization", "bearer k1"), ("x-api-key", "k1"), ("api-key", "k1")):
        yield Row("-", "/v1/models", b"", (field,), "GET", shows={"access-control-allow-origin": "*"})
    yield Row("-", "/v1/models", b"", (("x-api-key", "k-read"),), "GET", 200)
    yield Row("-", CHAT, BODY, (("x-api-key", "k-read"),), "POST", 403, answer=forbidden)
    yield Row("-", "/logs", b"", (("x-api-key", "k-small"),), "GET", 403, answer=forbidden)
    yield Row("-", "/props?model=a", b"", (("x-api-key", "k-small"),), "GET", 403, answer=forbidden)
    yield Row("-", "/props?model=b", b"", (("x-api-key", "k-small"),), "GET", seen=Seen("b", "/props?model=b"))


async def test_keys():
    """Every route but the open ones wants one; a key may open less than everything."""
    async with together(A_AND_B, api_keys=["k1"], keys=KEYS) as served:
        wrong = await mistakes(served, locked())
    assert not wrong, "\n".join(wrong)


async def test_pages_of_this_machine_may_ask_where_no_key_is():
    """And no others; every answer says so, errors included."""
    ours = (("origin", "http://localhost:3000"),)
    shows = {"access-control-allow-origin": "http://localhost:3000", "vary": "Origin"}
    none = {"access-control-allow-origin": None, "vary": "Origin"}
    theirs = (("origin", "http://pages.example"),)
    rows = [
        Row("-", "/v1/models", b"", ours, "GET", 200, shows),
        Row("-", "/nowhere", b"", ours, "GET", 404, shows),
        Row("-", CHAT, BODY, ours, "POST", 200, shows, seen=Seen("a", CHAT)),
        Row("-", CHAT, b"", ours, "OPTIONS", 204, shows),
        Row("-", CHAT, b"", theirs, "OPTIONS", 204, none),
        Row("-", CHAT, BODY, theirs, "POST", 403, none),
    ]
    async with together(A_AND_B) as served:
        wrong = await mistakes(served, rows)
    assert not wrong, "\n".join(wrong)


# ---- how many (1.11), and how long ---------------------------------------------------------------------

ENDLESS = {"stream": True, "chunks": 10**6, "chunk_delay": 0.01}


async def test_a_limit_is_a_429():
    """`concurrency_limit` counts who waits and who is served, and who is too many is told when to come again."""
    async with daemon({"a": scripted(concurrency_limit=1), "b": scripted()}) as served:
        async with await connect(served.port) as busy:
            await busy.ask("POST", CHAT, chat("a", **ENDLESS))
            await busy.piece_of_body()
            for accept in ("*/*", "text/html"):
                answer = await fetch(served.port, "POST", CHAT, chat("a"), ("accept", accept))
                assert answer.status == 429
                assert int(answer["retry-after"]) >= 1
                assert error("rate_limit_error", "rate_limit_exceeded", 'model "a" has 1 requests')(answer)
        await eventually(partial(is_under_way, served, 0))
        assert (await fetch(served.port, "POST", CHAT, chat("a"))).status == 200


async def test_without_a_limit_requests_wait_for_their_turn():
    """`parallel` is how many the server gets at a time; the next one is served when one is done."""
    async with daemon({"a": scripted(parallel=1)}) as served:
        async with await connect(served.port) as waiting:
            async with await connect(served.port) as busy:
                await busy.ask("POST", CHAT, chat("a", **ENDLESS))
                await busy.piece_of_body()
                await waiting.ask("POST", CHAT, chat("a"))
                await eventually(partial(waits, served))
                assert (await counts(served.model_ports["a"]))["started"] == 1
            answer = await waiting.answer()
        assert answer.status == 200
        assert re.fullmatch(r"queue;dur=[0-9]+", answer["server-timing"])


async def test_who_did_not_wait_is_not_told_how_long():
    """`Server-Timing` is for those who waited."""
    async with daemon({"a": scripted()}) as served:
        assert (await fetch(served.port, "POST", CHAT, chat("a")))["server-timing"].startswith("queue;dur=")
        assert (await fetch(served.port, "POST", CHAT, chat("a")))["server-timing"] is None


@pytest.mark.parametrize("path", [CHAT, "/v1/messages"])
async def test_a_client_may_prefer_to_be_told(path):
    """`Prefer: wait=N`: 503 after N seconds, with what is going on; who need not wait is served all the same."""
    async with together({"slow": scripted("--never-ready"), "a": scripted()}) as served:
        assert (await fetch(served.port, "POST", path, chat("a"))).status == 200
        for stream in (False, True):
            answer = await fetch(served.port, "POST", path, chat("slow", stream=stream), ("prefer", "wait=0"))
            assert answer.status == 503
            assert int(answer["retry-after"]) >= 1
            document = answer.json()
            assert document["loading"].keys() >= {"model", "stage", "waited", "estimate"}
            assert document["loading"]["model"] == "slow"
            assert ("src" in document) == (path == CHAT)
        for _ in range(20):
            answer = await fetch(served.port, "POST", path, chat("a"), ("prefer", "respond-async, wait=0"))
            assert answer.status == 200


async def test_whoever_is_refused_when_it_is_told_that_it_waits():
    """Both in one moment: either is the answer."""
    async with daemon({"a": scripted("--exit-at-start", 7)}) as served:
        for _ in range(100):
            assert (await fetch(served.port, "POST", CHAT, chat("a"), ("prefer", "wait=0"))).status == 503


@pytest.mark.parametrize("stream", [False, True])
async def test_whoever_asks_one_after_the_other_never_meets_itself(stream):
    """`concurrency_limit = 1`: the answer is over for the limit before the client has all of it."""
    async with daemon({"a": scripted(concurrency_limit=1)}) as served:
        for _ in range(100):
            assert (await fetch(served.port, "POST", CHAT, chat("a", stream=stream))).status == 200


async def test_comments_show_that_somebody_is_at_work():
    """A stream begins before its model is there; comments in it, as many as it takes, then what the model says."""
    async with daemon({"a": scripted("--ready-delay", 0.5)}, heartbeat=0.05) as served:
        answer = await fetch(served.port, "POST", CHAT, chat("a", stream=True))
    assert answer.status == 200
    assert (answer["content-type"], answer["cache-control"], answer["x-accel-buffering"]) == (
        "text/event-stream", "no-cache", "no",
    )  # fmt: skip
    events = [event for event in answer.text.split("\n\n") if event]
    comments = [event for event in events if event.startswith(": trioswap ")]
    assert len(comments) >= 2
    assert all("model=a" in event for event in comments)
    assert events[: len(comments)] == comments
    assert events[-1] == "data: [DONE]"


@pytest.mark.parametrize(("path", "begin"), [(CHAT, "data: "), ("/v1/messages", "event: error\ndata: ")])
async def test_a_failure_in_a_stream_of_ours_is_an_event(path, begin):
    """The status has left already; the stream ends cleanly, with the error in its own format."""
    model = scripted("--never-ready", health_check_timeout=0.5)
    async with daemon({"a": model}, heartbeat=0.05) as served:
        answer = await fetch(served.port, "POST", path, chat("a", stream=True))
    assert (answer.status, answer["content-type"]) == (200, "text/event-stream")
    last = answer.text.rstrip("\n").rpartition("\n\n")[2]
    assert last.startswith(begin)
    assert "not ready within 0.5 s" in json.loads(last.removeprefix(begin))["error"]["message"]
    assert "[DONE]" not in answer.text


@pytest.mark.parametrize("path", [CHAT, "/v1/embeddings", "/upstream/a/v1/chat/completions"])
async def test_who_asked_for_no_stream_gets_none(path):
    """However long its model takes, and whatever limits the wait for it."""
    models = {"a": scripted("--ready-delay", 0.2, "--answer-delay", 0.6, queue_timeout=0.5)}
    async with daemon(models, heartbeat=0.05) as served:
        await fetch(served.port, "POST", "/api/models/load/a")
        answer = await fetch(served.port, "POST", path, chat("a"))
    assert (answer.status, answer["content-type"]) == (200, "application/json")


async def test_comments_go_on_until_the_first_byte():
    """A server may read a long prompt for minutes; what it then says can be read in the stream that is ours."""
    async with daemon({"a": scripted("--answer-delay", 0.5)}, heartbeat=0.05) as served:
        await fetch(served.port, "POST", "/api/models/load/a")
        answer = await fetch(served.port, "POST", CHAT, chat("a", stream=True), ("accept-encoding", "gzip"))
        seen = await fetch(served.port, "GET", "/upstream/a/seen")
    assert answer.text.count(": trioswap processing ") >= 2
    assert answer.text.endswith("data: [DONE]\n\n")
    assert "accept-encoding" not in dict(seen.json()["headers"])


async def test_no_heartbeat_no_early_stream():
    """`heartbeat = 0`: the status is the model's, whatever it takes."""
    model = scripted("--never-ready", health_check_timeout=0.5)
    async with daemon({"a": model}, heartbeat=0) as served:
        answer = await fetch(served.port, "POST", CHAT, chat("a", stream=True))
    assert answer.status == 503
    assert UNAVAILABLE(answer)


async def test_a_wait_may_be_bounded():
    """`queue_timeout`: 503, with words of its own."""
    async with daemon({"a": scripted("--never-ready", queue_timeout=0.3)}) as served:
        answer = await fetch(served.port, "POST", CHAT, chat("a"))
    assert answer.status == 503
    assert int(answer["retry-after"]) >= 1
    assert error("server_error", "service_unavailable", "waited 0.3 s")(answer)


async def test_the_queue_may_be_bounded():
    """`max_queue`: who comes when it is full is sent away at once; who need not wait is served."""
    models = {"slow": scripted("--never-ready"), "a": scripted()}
    async with together(models, max_queue=1) as served, await connect(served.port) as waiting:
        assert (await fetch(served.port, "POST", CHAT, chat("a"))).status == 200
        await waiting.ask("POST", CHAT, chat("slow"))
        await eventually(partial(waits, served))
        answer = await fetch(served.port, "POST", CHAT, chat("slow"))
        assert answer.status == 503
        assert int(answer["retry-after"]) >= 1
        assert error("server_error", "service_unavailable", "max_queue")(answer)
        assert (await fetch(served.port, "POST", CHAT, chat("a"))).status == 200


@pytest.mark.parametrize("target", ["/v1/audio/transcriptions", "/upstream/a/x"])
async def test_uploads_have_a_limit_of_their_own(target):
    """`max_upload`: what is passed on may be larger than what is read; up to it every byte arrives."""
    content = bytes(range(256)).replace(b"\r", b"").decode("latin-1") * 4 * 1024
    whole = form(("file", content), ("model", "a"))
    rows = [
        Row("-", target, whole, (MULTIPART,), "POST", seen=Seen("a", target.removeprefix("/upstream/a"))),
        Row("-", target, form(("file", content * 2), ("model", "a")), (MULTIPART,), "POST", 413),
    ]
    async with together(A_AND_B, max_request_body="1KiB", max_upload="2MiB") as served:
        wrong = await mistakes(served, rows)
    assert not wrong, "\n".join(wrong)


# ---- operators ---------------------------------------------------------------------------------------


async def test_a_request_is_cancelled_by_its_number():
    """While it waits: 499, which clients do not take for an answer; a stream ends with an error event."""
    async with together({"slow": scripted("--never-ready"), "a": scripted()}) as served:
        async with await connect(served.port) as waiting, await connect(served.port) as streaming:
            await waiting.ask("POST", CHAT, chat("slow"))
            await eventually(partial(waits, served))
            await streaming.ask("POST", "/upstream/a/v1/x", chat("a", **ENDLESS))
            await streaming.piece_of_body()
            rows = (await fetch(served.port, "GET", "/api/inflight")).json()["requests"]
            assert [(row["model"], row["req_path"], row["method"]) for row in rows] == [
                ("slow", CHAT, "POST"),
                ("a", "/v1/x", "POST"),
            ]
            for row in rows:
                answer = await fetch(served.port, "POST", f"/api/inflight/{row['id']}/cancel")
                assert (answer.status, answer.json()) == (200, {"msg": "ok"})
            answer = await waiting.answer()
            assert answer.status == 499
            assert error(WRONG, "cancelled")(answer)
            with trio.fail_after(PATIENCE):
                *_, last = (await streaming.rest()).split(b"\n\n")[:-1]
            assert last.startswith(b"event: error\ndata: ")
            assert b"cancelled by an operator" in last
        await eventually(partial(is_under_way, served, 0))


async def test_who_waits_for_a_model_that_is_unloaded_is_told():
    """503, and to come again: llama-swap has a 500."""
    async with daemon({"slow": scripted("--never-ready")}) as served, await connect(served.port) as waiting:
        await waiting.ask("POST", CHAT, chat("slow"))
        await eventually(partial(is_running, served.port, "slow", state="starting"))
        assert (await fetch(served.port, "POST", "/api/models/unload/slow")).text == "OK"
        answer = await waiting.answer()
        assert answer.status == 503
        assert answer["retry-after"] is not None
        assert error("server_error", "service_unavailable", "was unloaded")(answer)
        assert await running(served.port) == {}


async def test_some_requests_are_not_logged(caplog):
    """Machines ask for them all the time (2.5, 2.8)."""
    with caplog.at_level("INFO"):
        async with daemon({"a": scripted()}) as served:
            for path in ("/wol-health", "/health"):
                await fetch(served.port, "GET", path)
    assert "path=/health " in caplog.text
    assert "/wol-health" not in caplog.text
