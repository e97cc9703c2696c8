"""A search for requests that the daemon answers otherwise than its OpenAPI document says.

Schemathesis makes requests of every operation from the schemas, valid ones and others; some
are then spoiled further.  They go over real sockets to a daemon in a process of its own, with
model servers that work, that do not start, that die, and that stay silent.  Whatever comes,

- nothing is answered with 500, no connection is dropped, nothing hangs;
- the status is one that the document lists for the operation, and so is the content type;
- bodies that are ours have the fields that the document describes, and no others.

Hypothesis runs in a thread and sends by way of Trio.  What it finds is not shrunk: the daemon
remembers what it was asked before, so the same request need not fail again.  Instead all
failures of all operations are reported, each with its request.
"""

from __future__ import annotations

import contextlib
import copy
import random
import re
import zlib
from collections import Counter
from contextlib import asynccontextmanager
from functools import partial
from urllib.parse import quote

import attrs
import h11
import hypothesis
import jsonschema
import pytest
import requests
import schemathesis
import trio
from children import PATIENCE, free_port
from commands import daemon
from daemons import Answer, at_once, chat, connect, eventually, fetch, scripted, write_config
from hypothesis import HealthCheck, Phase, given
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012
from schemathesis import GenerationMode

from trioswap import __version__
from trioswap.openapi import contracts, document
from trioswap.routes import ROUTES

DOCUMENT = document(ROUTES, __version__)
# Those that say most come first; a parameter is one segment, or at the end all that follows.
PATTERNS = {
    path: re.compile(re.sub(r"\\{\w+\\}$", ".+", re.sub(r"\\{\w+\\}(?!$)", "[^/]+", re.escape(path))))
    for path in sorted(DOCUMENT["paths"], key=lambda path: ("{" in path, -len(path)))
}
ENDLESS = {(route.method, route.path) for route in ROUTES if route.contract.endless}

# ---- the daemon ------------------------------------------------------------------------------

KEYS = {"admin": "adminkey", "reader": "readerkey", "narrow": "narrowkey"}
# Those of whom an answer comes at once.
NAMES = ["a", "org/b", "nick", "choice", "pinned", "nothing", "comfyui_auto", "broken"]


def models() -> dict:
    """Of every kind that a client can meet; all may be resident together, so that no time goes into swaps."""
    quick = {"memory": "1MiB"}
    return {
        "a": scripted(**quick, aliases=["nick"], description="one", capabilities={"in": ["text"], "out": ["text"]}),
        "org/b": scripted(**quick, concurrency_limit=1),
        "comfyui_auto": scripted(**quick),
        "broken": scripted("--exit-at-start", 1, **quick),
        "dying": scripted("--die-on-request", **quick, backoff=0),  # it is to die each time, not to be refused
        "silent": scripted("--hold", **quick, timeouts={"response_header": 0.05}),
        "stuck": scripted("--never-ready", **quick),
    }


SETTINGS = {
    "memory": {"headroom": 0, "learn": False, "devices": {"ram": "8GiB"}},
    "parallel_loads": 8,
    "unload_drain_timeout": 1,
    "max_request_body": "4KiB",
    "max_upload": "8KiB",
    "selectors": {"choice": {"strategy": "warm", "targets": ["a", "org/b"]}},
    "profiles": {"coding": {"pins": {"pinned": "a", "nothing": ""}}},
    "keys": {
        "admin": {"key": KEYS["admin"], "admin": True},
        "reader": {"key": KEYS["reader"], "read_only": True},
        "narrow": {"key": KEYS["narrow"], "models": ["a"]},
    },
}
ADMIN = ("x-api-key", KEYS["admin"])


@asynccontextmanager
async def searched(directory):
    """A daemon's port, in which somebody always waits for the model that never gets ready."""
    peers = {"there": {"proxy": f"http://127.0.0.1:{free_port()}", "models": ["x"]}}
    config = write_config(directory, models(), **SETTINGS, peers=peers)
    async with daemon("serve", "-c", config) as served, trio.open_nursery() as nursery:
        nursery.start_soon(_wait_for_ever, served.port)
        yield served.port
        nursery.cancel_scope.cancel(reason="the search is over")


async def _wait_for_ever(port: int) -> None:
    while True:
        async with await connect(port) as client:  # again, whenever the model is unloaded or the request cancelled
            sent = Sent("POST", "/v1/chat/completions", (ADMIN,), chat("stuck"))
            await client.ask(sent.method, sent.target, sent.body, *sent.headers)
            check(sent, answer := await client.answer())
            assert answer.status in (499, 503)


# ---- requests --------------------------------------------------------------------------------


@attrs.frozen
class Sent:
    """One request."""

    method: str
    target: str
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""

    @property
    def path(self) -> str | None:
        """The one of the document that it is for; with a slash or a dot in a parameter it may be another, or none."""
        raw = self.target.partition("?")[0]
        return next((path for path, pattern in PATTERNS.items() if pattern.fullmatch(raw)), None)

    @property
    def is_endless(self) -> bool:
        """Whether a good answer does not end."""
        return (self.method, self.path) in ENDLESS and "no-follow" not in self.target


def named(schema: dict) -> dict:
    """The document with nothing but names that mean something in the fields that take one."""
    changed = copy.deepcopy(schema)
    known = {"model": [*NAMES, "a/v1/x", "a/x.js", "org/b/"], "source": ["proxy", "upstream", *NAMES]}
    for item in changed["paths"].values():
        for about in [about for operation in item.values() for about in operation.get("parameters", [])]:
            if about["name"] in known:
                about["schema"] = {"enum": known[about["name"]]}
    schemas = changed["components"]["schemas"]
    for name in ("ModelRequest", "StreamRequest", "FileForm", "ImageForm"):
        schemas[name]["properties"]["model"] = {"enum": NAMES}
    schemas["ProfileChoice"]["properties"]["name"] = {"enum": ["coding", "", None]}
    schemas["HoldRequest"]["properties"]["memory"] = {"enum": ["1MiB", 1, {"ram": "2MiB"}, "9GiB"]}
    schemas["HoldRequest"]["properties"]["device"] = {"enum": ["ram", "auto"]}
    return changed


@attrs.frozen
class Kind:
    """Requests of one operation, made in one way."""

    operation: schemathesis.APIOperation
    mode: GenerationMode
    way: str

    @property
    def share(self) -> int:
        """How many times as many as others: more where a body is ours to read, for each such route has its own code."""
        about = DOCUMENT["paths"][self.operation.path][self.operation.method]
        return 8 if "requestBody" in about and about["tags"][0] not in ("inference", "upstream") else 1


def kinds() -> list[Kind]:
    """Of every operation: requests with known names, with any, and where the document forbids something, wrong ones."""
    return [
        *[Kind(operation, GenerationMode.POSITIVE, "known") for operation in _operations(named(DOCUMENT))],
        *[Kind(operation, GenerationMode.POSITIVE, "any") for operation in _operations(copy.deepcopy(DOCUMENT))],
        *[
            Kind(operation, GenerationMode.NEGATIVE, "wrong")
            for operation in _operations(copy.deepcopy(DOCUMENT))
            if _can_be_wrong(DOCUMENT["paths"][operation.path][operation.method])
        ],
    ]


def _operations(schema: dict) -> list[schemathesis.APIOperation]:
    return [found.ok() for found in schemathesis.openapi.from_dict(schema).get_all_operations()]


def _can_be_wrong(operation: dict) -> bool:
    """A path of any text cannot, nor a body of anything."""
    bodies = operation.get("requestBody", {"content": {"*/*": {}}})["content"]
    return "*/*" not in bodies or any(about["in"] == "query" for about in operation.get("parameters", []))


def prepared(case: schemathesis.Case) -> Sent:
    """The request of *case* as it goes over the wire."""
    wanted = ("method", "url", "headers", "params", "data", "json", "files", "cookies")
    found = {key: value for key, value in case.as_transport_kwargs(base_url="http://x").items() if key in wanted}
    ready = requests.Request(**found).prepare()
    body = ready.body or b""
    headers = [(name, value) for name, value in ready.headers.items() if name.lower() == "content-type"]
    return Sent(
        case.method.upper(),
        ready.path_url,
        tuple(headers),
        body.encode() if isinstance(body, str) else body,
    )


CREDENTIALS = [
    *[(("x-api-key", KEYS["admin"]),)] * 8,
    (("authorization", f"Bearer {KEYS['admin']}"),),
    (("api-key", KEYS["narrow"]),),
    (("x-api-key", KEYS["reader"]),),
    (("authorization", "Basic !"),),
    (("x-api-key", "wrong"),),
    (),
]
EXTRAS = [
    *[()] * 6,
    (("prefer", "wait=0"),),
    (("origin", "http://foreign.example"), ("sec-fetch-site", "cross-site")),
    (("accept-encoding", "gzip"), ("accept", "text/html")),
    (("x-forwarded-for", "1.2.3.4, nonsense"),),
]
STREAMING = {f"{route.method} {route.path}" for route in ROUTES if route.contract == contracts.STREAM}
TYPES = ["application/json", "application/x-www-form-urlencoded", "multipart/form-data", "text/plain", "multipart/"]


@st.composite
def spoiled(draw, sent: Sent) -> Sent:
    """*sent*, mostly with the right key, and sometimes with something else wrong with it."""
    headers = (*sent.headers, *draw(st.sampled_from(CREDENTIALS)), *draw(st.sampled_from(EXTRAS)))
    sent = attrs.evolve(sent, headers=headers)
    if draw(st.booleans()):  # clients write names with slashes in both ways
        sent = attrs.evolve(sent, target=sent.target.replace("%2F", "/"))
    match draw(st.sampled_from(["", "", "", "", "method", "cut", "byte", "type", "stream", "large"])):
        case "method":
            return attrs.evolve(sent, method=draw(st.sampled_from(["HEAD", "GET", "POST", "OPTIONS", "PROPFIND"])))
        case "cut" if sent.body:
            return attrs.evolve(sent, body=sent.body[: draw(st.integers(0, len(sent.body) - 1))])
        case "byte" if sent.body:
            place = draw(st.integers(0, len(sent.body) - 1))
            byte = bytes([draw(st.integers(0, 255))])
            return attrs.evolve(sent, body=sent.body[:place] + byte + sent.body[place + 1 :])
        case "type":
            others = [field for field in headers if field[0].lower() != "content-type"]
            return attrs.evolve(sent, headers=(*others, ("content-type", draw(st.sampled_from(TYPES)))))
        case "stream" if f"{sent.method} {sent.target}" in STREAMING:
            return attrs.evolve(sent, body=chat("a", stream=True))
        case "large" if sent.method != "GET":
            return attrs.evolve(sent, body=sent.body + b" " * 9000)
    return sent


async def send(port: int, sent: Sent) -> Answer:
    """The answer; of one that does not end the head and what came with it."""
    with trio.fail_after(PATIENCE):
        async with await connect(port) as client:
            await client.ask(sent.method, sent.target, sent.body, *sent.headers)
            head = await client.head()
            headers = [(name.decode(), value.decode("latin-1")) for name, value in head.headers]
            if head.status_code == 200 and sent.is_endless:
                return Answer(200, headers, await client.piece() if sent.path == "/api/hold" else b"")
            return Answer(head.status_code, headers, await client.rest())


# ---- what the document says of the answer ----------------------------------------------------


def closed(schema):
    """*schema* without room for fields that it does not describe."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: closed(value) for key, value in schema.items()}
    # A schema, and no object of schemas in which a field is called so.
    if isinstance(schema.get("properties"), dict) and "required" in schema:
        found.setdefault("additionalProperties", False)
    return found


SPOKEN = {**DOCUMENT, "components": closed(DOCUMENT["components"])}
REGISTRY = Registry().with_resource("urn:document", Resource(contents=SPOKEN, specification=DRAFT202012))


def validate(value: object, schema: dict) -> None:
    """Raises ValidationError."""
    name = schema.get("$ref")
    whole = {"$ref": f"urn:document{name}"} if name else schema
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    jsonschema.Draft202012Validator(whole, registry=REGISTRY, format_checker=checker).validate(value)


def listed(sent: Sent, status: int) -> dict:
    """The document's response for it, or for what the document says in general."""
    anthropic = "Anthropic" if sent.path is not None and "/messages" in sent.path else ""
    item = SPOKEN["paths"].get(sent.path, {})
    method = "get" if sent.method == "HEAD" else sent.method.lower()
    if sent.method == "OPTIONS":
        assert status == 204
        return {}
    if sent.path is None:
        assert status in (307, 400, 404), f"status {status} for a path that is not listed"
        return {} if status == 307 else _response({400: "BadRequest", 404: "NotFound"}[status])
    if method not in item and not _is_for_all(sent.path):
        assert status == 405, f"status {status} for a method that is not listed"
        return _response(f"{anthropic}MethodNotAllowed")
    found = item.get(method, item.get("post"))["responses"].get(str(status))  # which stands for all others
    assert found is not None, f"status {status} is not listed"
    return _response(found["$ref"].rpartition("/")[2]) if "$ref" in found else found


def _is_for_all(path: str) -> bool:
    return any(route.path == path and route.method == "*" for route in ROUTES)


def _response(name: str) -> dict:
    return SPOKEN["components"]["responses"][name]


def check(sent: Sent, answer: Answer) -> None:
    """Raises AssertionError or ValidationError: the answer is none that the document promises."""
    assert answer.status != 500
    assert re.fullmatch(r"req_[0-9a-f]{16}", answer["x-request-id"] or "")
    if (after := answer["retry-after"]) is not None:
        assert answer.status in (429, 503)
        assert int(after) >= 1
    response = listed(sent, answer.status)
    for name in response.get("headers", {}):
        assert answer[name.lower()] is not None or name in ("Retry-After", "Location"), f"no {name}"
    if "content" not in response:
        return
    media = (answer["content-type"] or "").partition(";")[0]
    found = response["content"].get(media) or response["content"].get("*/*")
    assert found is not None, f"content type {media!r} is not listed for {answer.status}"
    if sent.method == "HEAD" or (sent.is_endless and not answer.body):
        return
    if media == "application/json" and ("$ref" in found["schema"] or answer.status >= 400):
        validate(answer.json(), found["schema"])
    elif media == "application/x-ndjson":
        assert answer.body.count(b"\n") == 1
        validate(answer.json(), found["schema"])


# ---- the search ------------------------------------------------------------------------------


@attrs.define
class Search:
    """What was asked, and what was wrong with the answers."""

    port: int
    seed: int
    examples: int
    """Of each kind, times its share."""
    seen: Counter[tuple[str, int]] = attrs.field(factory=Counter)
    failures: list[str] = attrs.field(factory=list)

    def run(self) -> None:
        """In a thread of its own."""
        for kind in kinds():
            self._one(kind)

    def _one(self, kind: Kind) -> None:
        @hypothesis.seed(self.seed ^ zlib.crc32(f"{kind.operation.label} {kind.way}".encode()))
        @hypothesis.settings(
            max_examples=self.examples * kind.share,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(st.data(), kind.operation.as_strategy(generation_mode=kind.mode))
        def ask(data, case) -> None:
            self.tell(data.draw(spoiled(prepared(case))))

        with contextlib.suppress(Unsatisfiable):  # there are fewer requests of this kind than asked for
            ask()

    def tell(self, sent: Sent) -> None:
        """Send it and look at the answer."""
        answer = None
        try:
            answer = trio.from_thread.run(send, self.port, sent)
            self.seen[sent.method, answer.status] += 1
            check(sent, answer)
        except (AssertionError, ValueError, jsonschema.ValidationError) as exc:
            self.failures.append(f"{sent}\n    {type(exc).__name__}: {str(exc)[:500]}\n    {answer}")
        except (h11.RemoteProtocolError, trio.TooSlowError, OSError, trio.BrokenResourceError) as exc:
            self.failures.append(f"{sent}\n    no answer: {exc!r}")


# ---- requests that are right -----------------------------------------------------------------


async def right(port: int, method: str, path: str) -> Sent:
    """A request of an operation that must succeed."""
    values = {"model": "a", "source": "proxy", "path": "x"}
    if path in ("/api/inflight/{id}/cancel", "/api/queue/{request}"):
        await eventually(partial(_somebody_waits, port))
        if path.startswith("/api/queue"):
            [row] = (await fetch(port, "GET", "/api/queue", b"", ADMIN)).json()["waiting"]
            values["request"] = row["request"]
        else:
            [row] = (await fetch(port, "GET", "/api/inflight", b"", ADMIN)).json()["requests"]
            values["id"] = row["id"]
    target = re.sub(r"\{(.+?)\}", lambda found: quote(values[found[1]], safe=""), path)
    about = DOCUMENT["paths"][path][method.lower()]
    if any(parameter["in"] == "query" and parameter["required"] for parameter in about.get("parameters", [])):
        target += "?model=a"
    if path.startswith("/upstream"):
        target += "/thing"
    body, headers = b"", [ADMIN]
    if about.get("requestBody", {}).get("required"):
        [media] = about["requestBody"]["content"]
        bodies = {
            "/api/profiles/active": b'{"name": "coding"}',
            "/api/hold": b'{"memory": "1MiB"}',
            "/api/log-level": b'{"level": "warning"}',
        }
        body = bodies.get(path, b'{"model": "a"}')
        if media == "multipart/form-data":
            media, body = f"{media}; boundary=x", FORM
        headers.append(("content-type", media))
    return Sent(method, target, tuple(headers), body)


FORM = (
    b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\na\r\n'
    b'--x\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\ndata\r\n--x--\r\n'
)


async def _somebody_waits(port: int) -> bool:
    return bool((await fetch(port, "GET", "/api/queue", b"", ADMIN)).json()["waiting"])


async def test_every_operation_succeeds_as_the_document_says(tmp_path):
    """With a request that is right: a 200, or where the document has none, a redirect."""
    async with searched(tmp_path) as port:
        page = Sent("GET", "/comfyui/x", (ADMIN,))
        check(page, answer := await send(port, page))
        assert answer.status == 409  # for it loads nothing, other than the first
        await send(port, Sent("GET", "/comfyui/", (ADMIN,)))
        for path, item in DOCUMENT["paths"].items():
            for method in map(str.upper, item):
                sent = await right(port, method, path)
                answer = await send(port, sent)
                check(sent, answer)
                expected = (301, 308) if path == "/comfyui" else (200,)
                assert answer.status in expected, (sent, answer)


# ---- what may fail ---------------------------------------------------------------------------

FAILURES = {
    "broken": 503,  # exits at its start
    "dying": 502,  # exits upon each request
    "silent": 504,
    "there/x": 502,  # a peer that is not there
    "org/b": 429,  # which serves as many as it may
    "nobody": 404,
    "stuck": 503,  # and the client does not want to wait
}


async def test_failures_are_told_as_the_document_says(tmp_path):
    """With their status, in the shape of the route, and when to come again where that helps."""
    async with searched(tmp_path) as port, await connect(port) as busy:
        await busy.ask(
            "POST", "/v1/chat/completions", chat("org/b", stream=True, chunks=10**6, chunk_delay=0.01), ADMIN
        )
        await busy.head()

        async def fail(path: str, name: str, status: int) -> None:
            target = path.replace("{model}", f"{name}/v1/x")
            sent = Sent("POST", target, (ADMIN, ("prefer", "wait=0" if name == "stuck" else "wait=60")), chat(name))
            answer = await send(port, sent)
            assert answer.status == status, (sent, answer)
            check(sent, answer)
            assert (answer["retry-after"] is not None) == (status in (429, 503))
            assert ("loading" in answer.json()) == (name == "stuck")

        for path in ("/v1/chat/completions", "/v1/messages", "/v1/embeddings", "/upstream/{model}"):
            # Nobody waits for another, and least of all for those who time out.
            await at_once([partial(fail, path, name, status) for name, status in FAILURES.items()])


# ---- any requests ----------------------------------------------------------------------------


async def search(directory, seed: int, examples: int) -> None:
    """Look for failures; the daemon must be well at the end, and go when it is told to."""
    print(f"replay with --hypothesis-seed={seed}")
    async with searched(directory) as port:
        found = Search(port, seed, examples)
        await trio.to_thread.run_sync(found.run, abandon_on_cancel=True)
        assert (await fetch(port, "GET", "/health")).text == "OK"
        answer = await fetch(port, "POST", "/v1/chat/completions", chat("a"), ADMIN)
        assert answer.status == 200, answer
    assert not found.failures, "\n".join(found.failures)
    # Or it has not looked at much.
    assert {200, 204, 301, 308, 400, 401, 403, 404, 405, 413, 503} <= {status for _, status in found.seen}


async def test_a_short_search_finds_nothing(tmp_path):
    """The same requests every time."""
    await search(tmp_path, 0, 3)


@pytest.mark.schema
async def test_a_long_search_finds_nothing(tmp_path, request):
    """Other requests every time."""
    chosen = request.config.getoption("--hypothesis-seed")
    seed = random.getrandbits(32) if chosen is None else int(chosen)
    await search(tmp_path, seed, 25)
