"""Web pages: which may ask, what their browsers are told, and that nothing a model server says gets in between."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import trio
from children import PATIENCE
from daemons import Answer, by_hand, chat, connect, counts, daemon, fetch, running, scripted
from hypothesis import given
from hypothesis import strategies as st

from trioswap.config import Config
from trioswap.config.parts import CorsConfig, KeyConfig
from trioswap.cors import METHODS, Cors, without_cors

CHAT = "/v1/chat/completions"
HERE = b"127.0.0.1:8080"
EVIL = b"https://evil.example"
BASIC = (b"authorization", b"Basic dTprMQ==")
ACAO = b"access-control-allow-origin"


def cors(*origins: str, keys: bool = False, given: bool = False, private_network: bool = False) -> Cors:
    """With these origins written, if any are or *given*."""
    written = origins if origins or given else None
    keyed = {"k": KeyConfig("k", b"")} if keys else {}
    return Cors.of(Config(keys=keyed, cors=CorsConfig(written, private_network)))


def asks(origin: bytes | None = None, *others: tuple[bytes, bytes], host: bytes = HERE) -> list[tuple[bytes, bytes]]:
    """The headers of a request from a page of *origin*."""
    return [(b"host", host), *([] if origin is None else [(b"origin", origin)]), *others]


# ---- which pages are trusted -------------------------------------------------------------------

LOCAL = [
    b"http://localhost",
    b"http://localhost:3000",
    b"HTTP://LOCALHOST:3000",
    b"http://localhost.",
    b"http://app.localhost",
    b"https://127.0.0.1:8443",
    b"http://127.8.9.1",
    b"http://[::1]:5173",
    b"app://obsidian.md",
    b"tauri://localhost",
    b"vscode-webview://1abc",
    b"file://",
]
FOREIGN = [
    EVIL,
    b"null",
    b"",
    b"http://",
    b"https://localhost.evil.example",
    b"http://notlocalhost",
    b"http://127.0.0.1.evil.example",
    b"http://evil.example/127.0.0.1",
    b"http://192.168.0.7",
    b"http://0.0.0.0",
    b"http://[::1",
    b"http://[fe80::1]",
    b"http://\xe4.example",
    b"chrome-extension://abc",
    b"app",
    b"data:",
    b"https://evil.example http://localhost",
]


@pytest.mark.parametrize("origin", LOCAL)
def test_pages_of_this_machine(origin):
    """Are let in where nothing is written and no key is asked for, and hear that they are."""
    rule = cors()

    assert rule.allows(origin, HERE)
    assert rule.refused("POST", asks(origin)) is None
    assert (ACAO, origin) in rule.headers(asks(origin))


@pytest.mark.parametrize("origin", FOREIGN)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "QUERY"])
def test_pages_of_others(origin, method):
    """Are refused, also when they only look: a GET may load a model, too.  They could not read the answer anyway."""
    rule = cors()

    assert not rule.allows(origin, HERE)
    assert rule.refused(method, asks(origin)) == origin
    assert rule.headers(asks(origin)) == [(b"vary", b"Origin")]
    assert rule.preflight(asks(origin)) == [(b"vary", b"Origin")]


@pytest.mark.parametrize("origin", [None, *LOCAL])
def test_who_is_no_foreign_page(origin):
    """Programs say nothing of where they come from, and do what they like."""
    for rule in (cors(), cors("https://chat.example"), cors(keys=True)):
        assert rule.refused("POST", asks(None)) is None
    assert cors().refused("DELETE", asks(origin)) is None


def test_origins_that_are_written():
    """They are let in and no others, those of this machine neither; spelt in any case."""
    rule = cors("https://chat.example", "app://obsidian.md")

    for origin in (b"https://chat.example", b"HTTPS://Chat.Example", b"app://obsidian.md"):
        assert rule.refused("POST", asks(origin)) is None
        assert (ACAO, origin) in rule.headers(asks(origin))
    others = (b"https://chat.example:444", b"http://chat.example", b"https://a.chat.example", b"http://localhost")
    for origin in (*others, b"null", b"*"):
        assert rule.refused("POST", asks(origin)) == origin
        assert rule.headers(asks(origin)) == [(b"vary", b"Origin")]
    assert cors(given=True).refused("POST", asks(b"http://localhost")) == b"http://localhost"


@pytest.mark.parametrize("rule", [cors("*"), cors(keys=True), cors("*", keys=True)])
@pytest.mark.parametrize("origin", [None, *LOCAL, *FOREIGN])
def test_everybody(rule, origin):
    """Where that is written, or a key must be shown that no page has: one answer for all, so that it may be cached."""
    assert rule.refused("POST", asks(origin)) is None
    assert rule.headers(asks(origin)) == rule.headers(asks())
    assert rule.headers(asks())[0] == (ACAO, b"*")
    assert not any(name == b"vary" for name, _ in rule.headers(asks(origin)))


def test_credentials_are_never_allowed():
    """A page that asks with the browser's own ones cannot read the answer."""
    for rule, origin in itertools.product((cors(), cors("*"), cors(keys=True), cors("https://a.example")), LOCAL):
        names = {name for name, _ in [*rule.headers(asks(origin)), *rule.preflight(asks(origin))]}
        assert b"access-control-allow-credentials" not in names


def test_keys_do_not_widen_what_is_written():
    """Then those alone may ask, whatever they show."""
    rule = cors("https://chat.example", keys=True)

    assert rule.refused("POST", asks(EVIL, (b"authorization", b"Bearer k"))) == EVIL
    assert rule.refused("POST", asks(b"https://chat.example")) is None


# ---- what browsers say without an origin ---------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "refused"),
    [
        ({"site": "cross-site", "mode": "no-cors", "dest": "image"}, True),
        ({"site": "cross-site"}, True),
        ({"site": "cross-site", "mode": "navigate", "dest": "document"}, False),
        ({"site": "cross-site", "mode": "navigate"}, False),
        ({"site": "cross-site", "mode": "navigate", "dest": "iframe"}, True),
        ({"site": "cross-site", "mode": "websocket", "dest": "websocket"}, True),
        ({"site": "same-site", "mode": "no-cors"}, False),
        ({"site": "same-origin", "mode": "cors"}, False),
        ({"site": "none", "mode": "navigate", "dest": "document"}, False),
        ({"mode": "cors"}, False),
    ],
)
def test_fetch_metadata(said, refused):
    """An image or a frame of a foreign page is refused; a link to us is followed (Fetch Metadata)."""
    headers = asks(None, *((f"sec-fetch-{name}".encode(), value.encode()) for name, value in said.items()))

    for rule in (cors(), cors("https://chat.example")):
        assert rule.refused("GET", headers) == (b"another site" if refused else None)
    for rule in (cors("*"), cors(keys=True)):
        assert rule.refused("GET", headers) is None


def test_a_proxy_may_have_changed_the_host():
    """A browser says itself that a page is of the same origin, and only where that is proven."""
    headers = asks(b"https://llm.example", (b"sec-fetch-site", b"same-origin"))

    assert cors().refused("POST", headers) is None
    assert cors().refused("POST", asks(b"https://llm.example")) == b"https://llm.example"


# ---- pages of our own, and pages that have taken our name ----------------------------------------


@pytest.mark.parametrize(
    "host",
    [
        b"127.0.0.1:8080",
        b"192.168.0.7:8080",
        b"[fe80::1]:8080",
        b"8.8.8.8",
        b"localhost:8080",
        b"gpu:8080",
        b"GPU.local:8080",
        b"gpu.lan",
        b"gpu.home.arpa",
        b"host.docker.internal:1",
        b"a.localhost:8080",
        b"gpu.local.:8080",
    ],
)
def test_pages_of_our_own(host):
    """Where the name of this host is nobody else's, a page of the same origin is ours, with any rule."""
    for rule in (cors(), cors("https://chat.example"), cors(given=True)):
        assert rule.refused("POST", asks(b"http://" + host.lower(), host=host)) is None
        assert rule.refused("GET", asks(None, (b"accept-language", b"de"), host=host)) is None


@pytest.mark.parametrize(
    "host", [b"evil.example:8080", b"127.0.0.1.nip.io", b"local.example", b"evil.example.", b"fritz.box", b"[::1.:8080"]
)
def test_a_page_that_has_taken_our_name(host):
    """A name that can be bought may lead here today and was another's page before (DNS rebinding)."""
    origin = b"http://" + host
    looks = asks(None, (b"accept-language", b"de"), host=host)

    assert cors().refused("POST", asks(origin, host=host)) == origin
    assert cors().refused("GET", looks) == host
    assert cors("*").refused("GET", looks) is None
    # Programs, of which one (Node.js) speaks like a browser half way.
    assert cors().refused("GET", asks(None, host=host)) is None
    assert cors().refused("POST", [*looks, (b"sec-fetch-mode", b"cors")]) is None


def test_a_name_that_is_really_ours():
    """A certificate proves it, or whoever writes it into the configuration; where keys are asked for it matters not."""
    secure, plain, looks = (
        asks(b"https://llm.example", host=b"llm.example"),
        asks(b"http://llm.example", host=b"llm.example"),
        asks(None, (b"accept-language", b"de"), host=b"LLM.example"),
    )

    assert cors().refused("POST", secure) is None
    for rule in (cors("http://llm.example"), cors("https://chat.example", keys=True), cors(keys=True)):
        assert rule.refused("POST", plain) is None
        assert rule.refused("GET", looks) is None
    assert cors(given=True).refused("POST", plain) == b"http://llm.example"


# ---- passwords that browsers show by themselves --------------------------------------------------


def test_a_password_is_no_proof_of_a_key():
    """Once typed it comes along with whatever page asks: so only pages of this machine and our own may ask with it."""
    for rule in (cors(keys=True), cors("*", keys=True)):
        assert rule.refused("POST", asks(EVIL, BASIC)) == EVIL
        assert rule.refused("POST", asks(b"null", (b"Authorization", b"BASIC dTprMQ=="))) == b"null"
        assert rule.refused("GET", asks(None, BASIC, (b"sec-fetch-site", b"cross-site"))) == b"another site"
        assert rule.refused("POST", asks(EVIL, (b"authorization", b"Bearer k1"))) is None
        assert rule.refused("POST", asks(b"http://localhost:3000", BASIC)) is None
        assert rule.refused("POST", asks(b"http://llm.example", BASIC, host=b"llm.example")) is None
        assert rule.refused("GET", asks(None, BASIC, (b"accept-language", b"de"), host=b"llm.example")) is None
    assert cors("https://chat.example", keys=True).refused("POST", asks(b"https://chat.example", BASIC)) is None


# ---- preflights ------------------------------------------------------------------------------------


def test_a_preflight():
    """What is asked for is allowed, but for what is no field name; for a day."""
    asked = (b"access-control-request-headers", b"x-stainless-lang, content-type,b\xe4d, two words,,X-API-Key")
    answer = dict(cors().preflight(asks(b"http://localhost", asked)))

    assert answer == {
        ACAO: b"http://localhost",
        b"vary": b"Origin",
        b"access-control-allow-methods": METHODS,
        b"access-control-allow-headers": b"x-stainless-lang, content-type, X-API-Key",
        b"access-control-max-age": b"86400",
    }


def test_a_preflight_that_asks_for_nothing():
    """The usual fields are allowed; and nobody is refused, whatever it is about."""
    answer = dict(cors("*").preflight(asks(EVIL)))

    assert answer[b"access-control-allow-headers"] == b"Content-Type, Authorization, Accept, X-Requested-With"
    assert answer[ACAO] == b"*"
    assert cors().refused("OPTIONS", asks(EVIL)) is None


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("allowed", [True, False])
def test_private_networks(allowed, wanted):
    """Said only if it is asked and allowed, and never to those who may not ask at all."""
    rule = cors("https://chat.example", private_network=allowed)
    asked = [(b"access-control-request-private-network", b"true")] if wanted else []
    answer = rule.preflight(asks(b"https://chat.example", *asked))

    assert ((b"access-control-allow-private-network", b"true") in answer) == (allowed and wanted)
    assert rule.preflight(asks(EVIL, *asked)) == [(b"vary", b"Origin")]


# ---- whatever is sent --------------------------------------------------------------------------------

TEXT = st.one_of(st.sampled_from([*LOCAL, *FOREIGN, HERE, b"evil.example"]), st.binary(max_size=30))
RULES = st.sampled_from([cors(), cors("*"), cors(keys=True), cors("https://chat.example"), cors(given=True)])


@given(RULES, TEXT, TEXT, st.binary(max_size=50))
def test_no_origin_gets_more_than_one_answer(rule, origin, host, fields):
    """Nothing raises; who may read is told so once and by its own name, and who may not is refused."""
    headers = asks(origin, (b"access-control-request-headers", fields), host=host)
    answers = [rule.headers(headers), rule.preflight(headers)]

    for answer in answers:
        assert len({name for name, _ in answer}) == len(answer)
        assert dict(answer).get(ACAO, b"*") in (b"*", origin)
        assert not any(b"\r" in value or b"\n" in value for name, value in answer if name != ACAO)
    assert rule.allows(origin, host) == any(name == ACAO for name, _ in answers[0])
    assert (rule.refused("POST", headers) is None) == rule.allows(origin, host)


def test_what_model_servers_say_of_pages_is_dropped():
    """All of it, in any case, and nothing else."""
    kept = [(b"content-type", b"x"), (b"vary", b"Origin"), (b"x-access-control-y", b"1")]
    own = [(b"Access-Control-Allow-Origin", b"*"), (b"access-control-max-age", b"1")]

    assert without_cors([*own, *kept]) == kept


# ---- through a daemon ----------------------------------------------------------------------------------


def of_pages(answer: Answer) -> dict[str, list[str]]:
    """All that an answer says to browsers, each field as often as it came."""
    found: dict[str, list[str]] = {}
    for name, value in answer.headers:
        if name.startswith("access-control-") or name == "vary":
            found.setdefault(name, []).append(value)
    return found


EXPOSED = ["x-request-id, retry-after, server-timing"]


@pytest.mark.parametrize("path", [CHAT, "/upstream/a/thing"])
async def test_one_rule_though_the_model_server_has_its_own(path):
    """Exactly one origin is allowed, whatever it said itself; the rest of its headers arrive."""
    async with by_hand() as server, daemon({"a": server}) as served, trio.open_nursery() as nursery:
        answers: list[Answer] = []

        async def ask() -> None:
            answers.append(await fetch(served.port, "POST", path, chat("a"), ("origin", "http://localhost:3000")))

        nursery.start_soon(ask)
        with trio.fail_after(PATIENCE):
            async with await server.accept() as asked:
                while not await is_end(asked):
                    pass
                own = ["Access-Control-Allow-Origin: *", "Access-Control-Allow-Credentials: true", "Vary: Accept"]
                lines = ["HTTP/1.1 200 OK", "Content-Length: 2", *own, "X-Own: 1", "", "ok"]
                await asked.stream.send_all("\r\n".join(lines).encode())
                while not answers:
                    await trio.lowlevel.checkpoint()
        await server.close()
    [answer] = answers
    assert (answer.status, answer.text, answer["x-own"]) == (200, "ok", "1")
    assert of_pages(answer) == {
        "access-control-allow-origin": ["http://localhost:3000"],
        "access-control-expose-headers": EXPOSED,
        "vary": ["Accept", "Origin"],
    }


async def is_end(client) -> bool:
    """Whether the request is complete with its next event."""
    return type(await client.next_event()).__name__ == "EndOfMessage"


@pytest.mark.parametrize(
    "path", [CHAT, "/v1/models", "/nowhere", "//", "/upstream/a/x", "/upstream/nobody", "/logs", "/api/profiles/active"]
)
async def test_a_preflight_is_answered_for_any_path(path):
    """Without a key, without a model, and without looking whether there is such a path."""
    async with daemon({"a": scripted()}, api_keys=["k1"]) as served:
        asked = ("access-control-request-headers", "authorization"), ("access-control-request-method", "POST")
        answer = await fetch(served.port, "OPTIONS", path, b"", ("origin", EVIL.decode()), *asked)
        assert (answer.status, answer.body) == (204, b"")
        assert of_pages(answer) == {
            "access-control-allow-origin": ["*"],
            "access-control-allow-methods": [METHODS.decode()],
            "access-control-allow-headers": ["authorization"],
            "access-control-max-age": ["86400"],
        }
        assert await running_with(served.port, "k1") == {}


async def running_with(port: int, key: str) -> dict[str, object]:
    """The rows of /running, for who shows *key*."""
    rows = (await fetch(port, "GET", "/running", b"", ("authorization", f"Bearer {key}"))).json()["running"]
    return {row["model"]: row for row in rows}


async def test_errors_can_be_read_by_pages():
    """A page that may ask sees what was wrong: a path, a model, a key."""
    async with daemon({"a": scripted()}) as served:
        ask = partial(fetch, served.port)
        page = ("origin", "http://localhost:3000")
        answers = [
            await ask("GET", "/nowhere", b"", page),
            await ask("PATCH", CHAT, b"", page),
            await ask("POST", CHAT, chat("nobody"), page),
            await ask("POST", CHAT, b"{", page),
            await ask("GET", "/upstream/nobody/x", b"", page),
        ]
    assert [answer.status for answer in answers] == [404, 405, 404, 400, 404]
    for answer in answers:
        assert answer["access-control-allow-origin"] == "http://localhost:3000"
        assert answer["vary"] == "Origin"

    async with daemon({"a": scripted()}, api_keys=["k1"]) as served:
        unknown = await fetch(served.port, "POST", CHAT, chat("a"), ("origin", EVIL.decode()))
    assert (unknown.status, unknown["access-control-allow-origin"]) == (401, "*")


async def test_foreign_pages_are_refused():
    """For what costs something, whatever they say that it is; no model is loaded, and they cannot read why."""
    async with daemon({"a": scripted()}) as served:
        ask = partial(fetch, served.port)
        page, simple = ("origin", EVIL.decode()), ("content-type", "text/plain")
        answers = [
            await ask("POST", CHAT, chat("a"), page, simple),
            await ask("POST", CHAT, chat("a"), ("origin", "null")),
            await ask("POST", "/api/models/load/a", b"", page),
            await ask("PUT", "/api/profiles/active", b'{"name": null}', page),
            await ask("GET", "/upstream/a/x", b"", page),
            await ask("GET", "/upstream/a/x", b"", ("sec-fetch-site", "cross-site"), ("sec-fetch-mode", "no-cors")),
            await ask("GET", "/v1/models", b"", page),
        ]
        assert await running(served.port) == {}
        assert (await ask("GET", "/health", b"", page)).status == 200, "this is open to anybody"
    assert [answer.status for answer in answers] == [403] * len(answers)
    assert not any(answer["access-control-allow-origin"] for answer in answers)
    assert answers[0].json()["error"]["message"] == (
        "web pages of https://evil.example may not ask here; allow them under [cors] origins"
    )


@pytest.mark.parametrize("origin", ["http://localhost:3000", "http://127.0.0.1", "http://test", "app://obsidian.md"])
async def test_pages_of_this_machine_are_served(origin):
    """And those that came from this daemon: its Host is "test" here.  The model server sees who asks."""
    async with daemon({"a": scripted()}) as served:
        answer = await fetch(served.port, "POST", CHAT, chat("a"), ("origin", origin))
        assert answer.status == 200
        assert answer.json()["headers"]["origin"] == origin
        assert answer["access-control-allow-origin"] == origin


async def test_pages_of_anybody_who_has_a_key():
    """Where keys are asked for; without one, or with a password that the browser added, nothing is done for them."""
    async with daemon({"a": scripted()}, api_keys=["k1"]) as served:
        ask = partial(fetch, served.port, "POST", CHAT, chat("a"), ("origin", EVIL.decode()))
        [bearer, x_key, none, basic] = [
            await ask(("authorization", "Bearer k1")),
            await ask(("x-api-key", "k1")),
            await ask(),
            await ask(("authorization", "Basic dTprMQ==")),
        ]
        assert [answer.status for answer in (bearer, x_key, none, basic)] == [200, 200, 401, 403]
        assert {answer["access-control-allow-origin"] for answer in (bearer, x_key, none, basic)} == {"*"}
        assert (await counts(served.model_ports["a"]))["finished"] <= 2
        ours = await fetch(served.port, "POST", CHAT, chat("a"), ("authorization", "Basic dTprMQ=="))
        assert ours.status == 200


async def test_origins_of_the_configuration():
    """Those that are written, and no others."""
    async with daemon({"a": scripted()}, cors={"origins": ["https://Chat.example:443"]}) as served:
        ask = partial(fetch, served.port, "POST", CHAT, chat("a"))
        listed, local, foreign, program = [
            await ask(("origin", "https://chat.example")),
            await ask(("origin", "http://localhost")),
            await ask(("origin", EVIL.decode())),
            await ask(),
        ]
    assert [answer.status for answer in (listed, local, foreign, program)] == [200, 403, 403, 200]
    assert listed["access-control-allow-origin"] == "https://chat.example"
    assert program["access-control-allow-origin"] is None
    assert program["vary"] == "Origin"


async def test_a_stream_carries_the_headers():
    """Also one whose head is ours, because it begins while its model is loading."""
    model = scripted("--never-ready")
    async with daemon({"a": model}, heartbeat=0.01) as served, await connect(served.port) as client:
        with trio.fail_after(PATIENCE):
            await client.ask("POST", CHAT, chat("a", stream=True), ("origin", "http://localhost"))
            head = await client.head()
            assert (await client.piece()).startswith(b": ")
    assert head.status_code == 200
    assert head.headers.raw_items().count((b"access-control-allow-origin", b"http://localhost")) == 1
