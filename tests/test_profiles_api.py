"""Profiles and cancelling, through a daemon: what is shown, what is changed, and what becomes of the requests."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from functools import partial

import h11
import pytest
import trio
from children import PATIENCE
from daemons import Answer, by_hand, chat, connect, counts, daemon, eventually, fetch, is_running, running, scripted
from trio.testing import wait_all_tasks_blocked

from trioswap import sse
from trioswap.access import CREDENTIALS
from trioswap.errors import Cancelled

CHAT = "/v1/chat/completions"
PROFILES = {
    "work": {"description": "At the desk.", "pins": {"a": "b", "off": "", "b": ""}},
    "home": {"pins": {"pinned": "org/a", "any": "pick", "org/x": "b"}},
}
SELECTORS = {"pick": {"strategy": "warm", "targets": ["b", "org/a"]}}


def models() -> dict[str, object]:
    return {"a": scripted(), "b": scripted(aliases=["nick"]), "org/a": scripted()}


async def put(port: int, body: object, *headers: tuple[str, str]) -> Answer:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return await fetch(port, "PUT", "/api/profiles/active", data, *headers)


async def active(port: int) -> str | None:
    return (await fetch(port, "GET", "/api/profiles")).json()["active"]


async def who(port: int, name: str) -> str:
    """The model that answers to *name*, on a model route and under /upstream, or the status of a refusal."""
    posted = await fetch(port, "POST", CHAT, chat(name))
    passed = await fetch(port, "GET", f"/upstream/{name}/v1/x")
    assert posted.status == passed.status, (posted, passed)
    if posted.status != 200:
        return str(posted.status)
    model = posted.json()["model"]
    assert passed.text == f"{model} /v1/x"
    return model


# ---- profiles -----------------------------------------------------------------------------------


async def test_the_profiles_are_shown():
    """Sorted, with what each pins; none is active at the start."""
    async with daemon(models(), profiles=PROFILES, selectors=SELECTORS) as served:
        answer = await fetch(served.port, "GET", "/api/profiles")
    assert answer.status == 200
    assert answer.json() == {
        "active": None,
        "profiles": [
            {"id": "home", "description": "", "pins": PROFILES["home"]["pins"]},
            {"id": "work", "description": "At the desk.", "pins": PROFILES["work"]["pins"]},
        ],
    }


async def test_without_profiles():
    """There is nothing to choose, and to choose nothing is fine."""
    async with daemon({"a": scripted()}) as served:
        assert (await fetch(served.port, "GET", "/api/profiles")).json() == {"active": None, "profiles": []}
        assert (await put(served.port, {"name": None})).json() == {"active": None}


@pytest.mark.parametrize("none", [None, ""])
async def test_a_profile_is_activated(none):
    """Until another one is, or none; the answer says which is active now."""
    async with daemon(models(), profiles=PROFILES, selectors=SELECTORS) as served:
        for name in ("work", "work", "home", none):
            answer = await put(served.port, {"name": name, "other": 1})
            assert (answer.status, answer.json()) == (200, {"active": name or None})
            assert await active(served.port) == (name or None)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, "the body is not JSON"),
        (b"{", 400, "the body is not JSON"),
        (b"\xff\xfe\xfd", 400, "the body is not JSON"),
        (b"[" * 10_000, 400, "the body is not JSON"),
        (b"1" * 5000, 400, "the body is not JSON"),
        (b"null", 400, "must be a JSON object such as"),
        (b'["name"]', 400, "must be a JSON object such as"),
        (b'"name"', 400, "must be a JSON object such as"),
        (b"{}", 400, "must be a JSON object such as"),
        (b'{"Name": "home"}', 400, "must be a JSON object such as"),
        (b'{"name": 1}', 400, '"name" must be a string'),
        (b'{"name": false}', 400, '"name" must be a string'),
        (b'{"name": ["home"]}', 400, '"name" must be a string'),
        (b'{"name": "HOME"}', 404, 'profile "HOME" is not configured; GET /api/profiles lists them'),
        (b'{"name": "\\ud800"}', 404, "is not configured"),
        (b'{"name": "%s"}' % (b"x" * 60_000), 404, 'x..." is not configured'),
        (b'{"name": "%s"}' % (b"x" * 70_000), 413, "larger than 65536 bytes"),
    ],
    ids=lambda value: repr(value[:20]) if isinstance(value, bytes) else None,
)
async def test_a_wrong_choice_changes_nothing(body, status, message):
    """It is said what is wrong, in few words, and the profile from before is the active one."""
    async with daemon(models(), profiles=PROFILES, selectors=SELECTORS) as served:
        await put(served.port, {"name": "work"})
        answer = await put(served.port, body)
        assert await active(served.port) == "work"
    assert answer.status == status
    assert message in answer.json()["error"]["message"]
    assert len(answer.json()["error"]["message"]) < 300


async def test_pins_are_in_effect():
    """For model routes and under /upstream; a name in the path may have a slash, and the longest one counts."""
    async with daemon(models(), profiles=PROFILES, selectors=SELECTORS) as served:
        before = [await who(served.port, name) for name in ("a", "nick", "pinned", "org/x")]
        assert before == ["a", "b", "404", "404"]

        await put(served.port, {"name": "work"})
        assert [await who(served.port, name) for name in ("a", "nick", "org/a", "b", "off")] == [
            "b",
            "b",
            "org/a",
            "404",
            "404",
        ]
        await put(served.port, {"name": "home"})
        found = [await who(served.port, name) for name in ("a", "pinned", "any", "org/x", "off")]
        assert found == ["a", "org/a", "org/a", "b", "404"]
        rows = {row["id"]: row for row in (await fetch(served.port, "GET", "/v1/models")).json()["data"]}
        assert rows["pinned"]["meta"] == {"llamaswap": {"type": "profile"}}

        await put(served.port, {"name": None})
        assert await who(served.port, "a") == "a"
        assert await who(served.port, "pinned") == "404"


async def test_the_rest_of_a_path_is_kept_behind_a_pin():
    """With its escapes, and a body under /upstream is not touched though it names a pin."""
    async with daemon(models(), profiles=PROFILES, selectors=SELECTORS) as served:
        await put(served.port, {"name": "work"})
        got = await fetch(served.port, "GET", "/upstream/a/%2Fx/%C3%A4?q=%20")
        posted = await fetch(served.port, "POST", "/upstream/a/x", chat("a"))
    assert got.text == "b /%2Fx/%C3%A4?q=%20"
    assert (posted.json()["model"], posted.json()["echo"]["model"]) == ("b", "a")


async def test_the_model_server_sees_the_name_that_is_pinned():
    """A pin renames the request; without one the client's own word is passed on."""
    async with daemon(models(), profiles=PROFILES, selectors=SELECTORS) as served:
        assert (await fetch(served.port, "POST", CHAT, chat("nick"))).json()["echo"]["model"] == "nick"
        await put(served.port, {"name": "work"})
        assert (await fetch(served.port, "POST", CHAT, chat("a"))).json()["echo"]["model"] == "b"


async def test_a_request_under_way_goes_on():
    """Whatever is activated meanwhile: it is where it was sent."""
    async with daemon(models(), profiles=PROFILES, selectors=SELECTORS) as served, await connect(served.port) as client:
        with trio.fail_after(PATIENCE):
            await client.ask("POST", CHAT, chat("a", stream=True, chunks=1000, chunk_delay=0.001))
            await client.piece_of_body()
            await put(served.port, {"name": "work"})
            assert b'"model": "a"' in await client.piece()


async def test_profiles_are_for_administrators_to_change():
    """A plain key sees them and changes nothing."""
    keys = {"some": {"key": "k1"}, "boss": {"key": "k2", "admin": True}}
    async with daemon(models(), profiles=PROFILES, selectors=SELECTORS, keys=keys) as served:
        some, boss = ("x-api-key", "k1"), ("x-api-key", "k2")
        assert (await put(served.port, {"name": "work"}, some)).status == 403
        assert (await put(served.port, {"name": "work"})).status == 401
        assert (await fetch(served.port, "GET", "/api/profiles", b"", some)).json()["active"] is None
        assert (await put(served.port, {"name": "work"}, boss)).status == 200


# ---- requests under way -----------------------------------------------------------------------------


async def under_way(port: int) -> list[dict[str, object]]:
    return (await fetch(port, "GET", "/api/inflight")).json()["requests"]


async def wait_under_way(port: int, number: int) -> list[dict[str, object]]:
    """The rows, once there are *number* of them."""

    async def are_there() -> bool:
        return len(await under_way(port)) == number

    await eventually(are_there)
    return await under_way(port)


async def cancel(port: int, row: dict[str, object]) -> None:
    answer = await fetch(port, "POST", f"/api/inflight/{row['id']}/cancel")
    assert (answer.status, answer.json()) == (200, {"msg": "ok"})


def assert_cancelled(answer: Answer) -> None:
    """The client was told who did it."""
    assert answer.status == 499
    assert answer.json()["error"]["message"] == "the request was cancelled by an operator"


async def aborted(port: int) -> bool:
    return (await counts(port))["aborted"] == 1


async def test_what_is_shown_of_a_request():
    """Who asks what of whom, since when, and no secret."""
    secrets = {name: f"secret-{name}" for name in [*(name.decode() for name in CREDENTIALS), "cookie"]}
    keys = {"laptop": {"key": "secret-x-api-key", "admin": True}}
    async with daemon(models(), keys=keys, selectors=SELECTORS) as served, await connect(served.port) as client:
        own = ("x-api-key", "secret-x-api-key")
        headers = [pair for pair in secrets.items() if pair[0] != "authorization"]
        body = chat("pick", stream=True, chunks=10_000, chunk_delay=0.01)
        with trio.fail_after(PATIENCE):
            await client.ask("POST", CHAT + "?q=secret", body, *headers, ("x-twice", "1"), ("x-twice", "2"))
            head = await client.head()
            first = await client.piece()
            answer = await fetch(served.port, "GET", "/api/inflight", b"", own)
    [row] = answer.json()["requests"]
    assert "secret" not in answer.text
    assert {name: row["req_headers"][name] for name in dict(headers)} == dict.fromkeys(dict(headers), "[REDACTED]")
    assert row["req_headers"]["x-twice"] == "1"
    assert row["resp_headers"]["content-type"] == "text/event-stream"
    assert row["request"] == row["resp_headers"]["x-request-id"] == dict(head.headers)[b"x-request-id"].decode()
    assert row["resp_bytes"] >= len(first)
    assert row["elapsed_ms"] >= 0
    assert abs(datetime.fromisoformat(row["timestamp"]) - datetime.now(UTC)) < timedelta(seconds=2 * PATIENCE)
    assert {key: row[key] for key in ("id", "model", "req_path", "method", "remote_ip", "key", "metadata")} == {
        "id": "1",
        "model": "b",
        "req_path": CHAT,
        "method": "POST",
        "remote_ip": "127.0.0.1",
        "key": "laptop",
        "metadata": {"selector": "pick"},
    }


async def test_under_upstream_the_rest_of_the_path_is_shown():
    """As text; a request that no answer has come to has no answer's headers."""
    async with daemon({"org/a": scripted("--hold")}) as served, await connect(served.port) as client:
        await client.ask("GET", "/upstream/org%2Fa/v1/%C3%A4")
        [row] = await wait_under_way(served.port, 1)
        await cancel(served.port, row)
        with trio.fail_after(PATIENCE):
            assert_cancelled(await client.answer())
    assert (row["model"], row["req_path"], row["method"]) == ("org/a", "/v1/ä", "GET")
    assert (row["resp_headers"], row["resp_bytes"]) == ({}, 0)
    assert "metadata" not in row


async def test_a_request_that_is_served_is_cancelled():
    """The model server sees its client leave; the next request is served as if nothing had been."""
    async with daemon({"a": scripted()}) as served, await connect(served.port) as client:
        port = served.model_ports["a"]
        await client.ask("POST", CHAT, chat("a", hold=True))
        await eventually(partial(is_running, served.port, "a", serving=1))
        await eventually(partial(has_begun, port))
        await cancel(served.port, (await under_way(served.port))[0])
        with trio.fail_after(PATIENCE):
            assert_cancelled(await client.answer())
        await eventually(partial(aborted, port))
        assert await under_way(served.port) == []
        assert (await fetch(served.port, "POST", CHAT, chat("a"))).status == 200
        await eventually(partial(is_running, served.port, "a", serving=0, state="ready"))


async def has_begun(port: int) -> bool:
    return (await counts(port))["started"] == 1


async def test_a_request_that_waits_is_cancelled():
    """It leaves the queue, and its model is not loaded for it; the one that is being served goes on."""
    async with (
        daemon({"a": scripted(), "b": scripted()}) as served,
        await connect(served.port) as first,
        await connect(served.port) as second,
    ):
        await first.ask("POST", CHAT, chat("a", stream=True, chunks=100_000, chunk_delay=0.001))
        with trio.fail_after(PATIENCE):
            await first.piece_of_body()
        await second.ask("POST", "/v1/messages", chat("b"))
        rows = await wait_under_way(served.port, 2)
        assert [(row["model"], row["id"]) for row in rows] == [("a", "1"), ("b", "2")]
        await eventually(partial(is_running, served.port, "b", waiting=1))
        await cancel(served.port, rows[1])
        with trio.fail_after(PATIENCE):
            answer = await second.answer()
            assert await first.piece()
        assert (answer.status, answer.json()["type"]) == (499, "error")
        assert list(await running(served.port)) == ["a"]
        assert [row["id"] for row in await under_way(served.port)] == ["1"]


async def test_a_request_whose_model_loads_is_cancelled():
    """It does not wait for the load to end."""
    async with daemon({"a": scripted("--never-ready")}) as served, await connect(served.port) as client:
        await client.ask("POST", CHAT, chat("a"))
        await eventually(partial(is_running, served.port, "a", state="starting"))
        await cancel(served.port, (await under_way(served.port))[0])
        with trio.fail_after(PATIENCE):
            assert_cancelled(await client.answer())


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/messages", "/v1/responses"])
async def test_a_stream_is_cancelled(path):
    """Its last event says so in the words of its endpoint, and nothing is generated on."""
    async with daemon({"a": scripted()}) as served, await connect(served.port) as client:
        await client.ask("POST", path, chat("a", stream=True, chunks=100_000, chunk_delay=0.001))
        with trio.fail_after(PATIENCE):
            await client.piece_of_body()
            await cancel(served.port, (await under_way(served.port))[0])
            *_, last = (await client.rest()).split(b"\n\n")[:-1]
        assert last + b"\n\n" == sse.error_event(sse.dialect_of(path), Cancelled())
        await eventually(partial(aborted, served.model_ports["a"]))
        assert await under_way(served.port) == []
        assert (await fetch(served.port, "POST", CHAT, chat("a"))).status == 200


async def test_a_stream_that_has_comments_only_is_cancelled():
    """Its status is 200 already, so that its end must say what has happened."""
    async with daemon({"a": scripted("--never-ready")}, heartbeat=0.05) as served, await connect(served.port) as client:
        await client.ask("POST", CHAT, chat("a", stream=True))
        with trio.fail_after(PATIENCE):
            assert (await client.piece_of_body()).startswith(b": trioswap")
            await cancel(served.port, (await under_way(served.port))[0])
            assert (await client.rest()).endswith(sse.error_event(sse.Dialect.CHAT, Cancelled()))


async def test_a_stream_is_cancelled_by_its_request_id():
    """The one that its answer, the log and the queue show."""
    async with daemon({"a": scripted()}) as served, await connect(served.port) as client:
        await client.ask("POST", CHAT, chat("a", stream=True, chunks=100_000, chunk_delay=0.001))
        with trio.fail_after(PATIENCE):
            ident = dict((await client.head()).headers)[b"x-request-id"].decode()
            answer = await fetch(served.port, "POST", f"/api/inflight/{ident}/cancel")
            assert (answer.status, answer.json()) == (200, {"msg": "ok"})
            assert (await client.rest()).endswith(sse.error_event(sse.Dialect.CHAT, Cancelled()))
            assert await wait_under_way(served.port, 0) == []
        assert (await fetch(served.port, "POST", f"/api/inflight/{ident}/cancel")).status == 404


async def test_a_whole_answer_that_has_begun_is_cancelled():
    """There is no place in it for an error: it breaks off, and does not look complete."""
    async with by_hand() as server, daemon({"a": server}) as served, await connect(served.port) as client:
        await client.ask("POST", CHAT, chat("a"))
        async with await server.accept() as model:
            while not isinstance(await model.next_event(), h11.EndOfMessage):
                pass
            await model.send(h11.Response(status_code=200, headers=[("transfer-encoding", "chunked")]))
            await model.send(h11.Data(data=b"half"))
            with trio.fail_after(PATIENCE):
                assert await client.piece_of_body() == b"half"
                await cancel(served.port, (await under_way(served.port))[0])
                with pytest.raises(h11.RemoteProtocolError):
                    await client.rest()
                assert await model.stream.receive_some() == b""
        await server.close()


async def test_a_client_that_does_not_read_is_cancelled():
    """What it has not taken yet is not sent to it first, and its model is free at once."""
    async with daemon({"a": scripted()}) as served, await connect(served.port, small_buffer=True) as client:
        await client.ask("POST", CHAT, chat("a", stream=True, chunks=10**6, name="x" * 50_000))
        with trio.fail_after(PATIENCE):
            await client.head()
            await eventually(partial(stands_still, served.port))
            [row] = await under_way(served.port)
            await cancel(served.port, row)
            await eventually(partial(is_running, served.port, "a", serving=0))
            [after] = await under_way(served.port)
            rest = await client.rest()
        assert rest.endswith(sse.error_event(sse.Dialect.CHAT, Cancelled()))
        assert len(rest) < after["resp_bytes"] + 1000


async def stands_still(port: int) -> bool:
    """Whether all buffers on the way to the client are full."""
    before = await under_way(port)
    await wait_all_tasks_blocked(0.1)
    return before[0]["resp_bytes"] == (await under_way(port))[0]["resp_bytes"] > 0


@pytest.mark.parametrize("number", ["1", "2", "0", "01", "-1", "%31%32", "x", "%2e", "9" * 400])
async def test_a_request_that_is_not_there(number):
    """Over, or not begun, or no number at all."""
    async with daemon({"a": scripted()}) as served:
        assert (await fetch(served.port, "POST", CHAT, chat("a"))).status == 200
        assert await wait_under_way(served.port, 0) == []
        answer = await fetch(served.port, "POST", f"/api/inflight/{number}/cancel")
        assert (await fetch(served.port, "GET", f"/api/inflight/{number}/cancel")).status == 405
    assert answer.status == 404
    assert "it may be over" in answer.json()["error"]["message"]
    assert len(answer.text) < 400


async def test_what_is_refused_is_not_under_way():
    """Nor is what came and went."""
    async with daemon({"a": scripted()}) as served:
        for body in (chat("nobody"), b"{", chat("a")):
            await fetch(served.port, "POST", CHAT, body)
        assert await wait_under_way(served.port, 0) == []
