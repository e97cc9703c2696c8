"""GET /api/events of a real daemon, read over real sockets: what user interfaces live on."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import attrs
import trio
from children import PATIENCE
from daemons import Client, Daemon, chat, connect, daemon, eventually, fetch, running, scripted
from test_events import BURST, Told, told

from trioswap import events

CHAT = "/v1/chat/completions"
ENDLESS = {"chunks": 10**6, "chunk_delay": 0.01}


@attrs.define(eq=False)
class Reader:
    """Takes events from a response, one by one."""

    client: Client
    rest: bytes = b""
    found: list[Told] = attrs.field(factory=list)

    async def next(self) -> Told:
        while not self.found:
            piece = await self.client.piece()
            assert piece, "the stream has ended"
            whole, _, self.rest = (self.rest + piece).rpartition(b"\n\n")
            self.found = told(whole + b"\n\n") if whole else []
        return self.found.pop(0)

    async def burst(self) -> list[Told]:
        return [await self.next() for _ in BURST]

    async def until(self, kind: str, condition: Callable[[object], bool] = lambda _: True) -> object:
        """The data of the next event of the kind that fits."""
        while (event := await self.next()).kind != kind or not condition(event.data):
            pass
        return event.data

    async def until_state(self, model: str, state: str) -> dict:
        """The row of *model* when it is in *state*."""

        def fits(rows) -> bool:
            return any(row["id"] == model and row["state"] == state for row in rows)

        return next(row for row in await self.until("modelStatus", fits) if row["id"] == model)


@asynccontextmanager
async def watching(served: Daemon, *headers: tuple[str, str], small_buffer: bool = False) -> AsyncIterator[Reader]:
    """A client that has the head of its stream."""
    with trio.fail_after(PATIENCE):
        async with await connect(served.port, small_buffer=small_buffer) as client:
            await client.ask("GET", "/api/events", b"", *headers)
            head = await client.head()
            assert head.status_code == 200
            assert dict(head.headers)[b"content-type"] == b"text/event-stream"
            assert dict(head.headers)[b"cache-control"] == b"no-cache"
            assert dict(head.headers)[b"x-content-type-options"] == b"nosniff"
            assert dict(head.headers)[b"x-accel-buffering"] == b"no"
            yield Reader(client)


# ---- what comes first ---------------------------------------------------------------------------


async def test_everything_as_it_stands():
    """In llama-swap's order; every model, also the unlisted, with what is configured of it, then those of peers."""
    models = {
        "b": scripted(
            name="Big", description="all of it", aliases=["two"], unlisted=True,
            capabilities={"in": ["text", "image"], "out": ["text"], "tools": True, "context": 4096},
        ),
        "a": scripted(),
    }  # fmt: skip
    peers = {"there": {"proxy": "http://127.0.0.1:9", "models": ["x", "org/y"]}}
    profiles = {"night": {"pins": {"gpt": "a"}}}
    async with daemon(models, peers=peers, profiles=profiles) as served:
        await fetch(served.port, "POST", "/api/models/load/a")
        await fetch(served.port, "PUT", "/api/profiles/active", b'{"name": "night"}')
        async with watching(served) as reader:
            burst = await reader.burst()
    assert [event.kind for event in burst] == BURST
    ours, theirs, status, interface, profile, inflight, queue = [event.data for event in burst]
    assert ours == {"source": "proxy", "data": ""}
    assert theirs == {"source": "upstream", "data": "listening\nready\n"}
    plain = {"name": "", "description": "", "unlisted": False, "peerID": ""}
    assert status == [
        {"id": "a", **plain, "state": "ready"},
        {
            "id": "b", "name": "Big", "description": "all of it", "state": "stopped", "unlisted": True, "peerID": "",
            "aliases": ["two"], "capabilities": {"vision": True, "function_calling": True}, "context_length": 4096,
        },
        {"id": "there/x", **plain, "state": "", "peerID": "there"},
        {"id": "there/org/y", **plain, "state": "", "peerID": "there"},
    ]  # fmt: skip
    assert interface == {"activity": {"session_id": ["X-Session-ID", "X-Litellm-Session-Id"]}}
    assert profile == {"active": "night"}
    assert inflight == {"operation": "snapshot"}
    assert queue == {"waiting": []}


async def test_whoever_comes_again_gets_everything_again():
    """Last-Event-ID changes nothing, but numbers never come twice."""
    async with daemon({"a": scripted()}) as served:
        async with watching(served) as reader:
            first = await reader.burst()
        async with watching(served, ("last-event-id", str(first[-1].number))) as reader:
            again = await reader.burst()
    assert [event.kind for event in again] == BURST
    numbers = [event.number for event in first + again]
    assert numbers == sorted(set(numbers))


# ---- what changes -------------------------------------------------------------------------------


async def test_the_states_of_a_model(nursery):
    """A load, its end by hand, and another that succeeds."""
    async with daemon({"a": scripted("--never-ready"), "b": scripted()}) as served, watching(served) as reader:
        await reader.burst()
        nursery.start_soon(fetch, served.port, "POST", "/api/models/load/a")
        await reader.until_state("a", "starting")
        await fetch(served.port, "POST", "/api/models/unload/a")
        await reader.until_state("a", "stopped")
        nursery.start_soon(fetch, served.port, "POST", CHAT, chat("b"))
        await reader.until_state("b", "ready")


async def test_a_model_that_drains_is_stopping_to_others():
    """With our own word beside the one that llama-swap's interfaces know; and it may go on after all."""
    models = {name: scripted(max_wait=0, turn_lease=0, linger=0) for name in "ab"}
    async with daemon(models) as served, watching(served) as reader, await connect(served.port) as busy:
        await busy.ask("POST", CHAT, chat("a", stream=True, **ENDLESS))
        await busy.head()
        assert "draining" not in await reader.until_state("a", "ready")
        async with await connect(served.port) as waiting:
            await waiting.ask("POST", CHAT, chat("b"))
            assert (await reader.until_state("a", "stopping"))["draining"] is True
        assert "draining" not in await reader.until_state("a", "ready")


async def test_a_request_from_its_begin_to_its_end():
    """It is there, its response has a head, its bytes grow, it is gone; no secrets."""
    async with daemon({"a": scripted()}) as served, watching(served) as reader:
        await reader.burst()
        async with await connect(served.port) as busy:
            headers = [("authorization", "Bearer secret-1"), ("cookie", "secret-2"), ("user-agent", "test")]
            await busy.ask("POST", CHAT, chat("a", stream=True, **ENDLESS), *headers)
            rows = [(await reader.until("inflight"))["request"]]
            while len({row["resp_bytes"] for row in rows if row["resp_headers"]}) < 4:
                rows.append((await reader.until("inflight"))["request"])
        assert await reader.until("inflight", lambda data: data["operation"] != "upsert") == {
            "operation": "remove",
            "id": "1",
        }
    for row in rows:
        about = [row[key] for key in ("id", "model", "req_path", "method")]
        assert about == ["1", "a", CHAT, "POST"]
        assert row["req_headers"]["user-agent"] == "test"
        assert row["req_headers"]["authorization"] == row["req_headers"]["cookie"] == "[REDACTED]"
    assert "secret" not in json.dumps(rows)
    assert rows[-1]["resp_headers"]["content-type"].startswith("text/event-stream")
    sizes = [row["resp_bytes"] for row in rows if row["resp_headers"]]
    assert sizes == sorted(set(sizes))


async def test_who_waits_for_what():
    """The rows of /api/queue, again and again, and an end of it."""
    async with daemon({"a": scripted(), "b": scripted()}) as served, watching(served) as reader:
        await reader.burst()
        async with await connect(served.port) as busy, await connect(served.port) as queued:
            await busy.ask("POST", CHAT, chat("a", stream=True, **ENDLESS))
            await busy.head()
            await queued.ask("POST", CHAT, chat("b"))
            waits = [await reader.until("queue", lambda data: [row["model"] for row in data["waiting"]] == ["b"])]
            waits.append(await reader.until("queue"))
            [there] = (await fetch(served.port, "GET", "/api/queue")).json()["waiting"]
            [[first], [second]] = [data["waiting"] for data in waits]
            assert first.keys() == there.keys()
            assert (first["request"], first["waits_for"]) == (there["request"], ["a"])
            assert first["waited"] < second["waited"]
        assert await reader.until("queue", lambda data: not data["waiting"]) == {"waiting": []}


async def test_profiles_and_lines():
    """Another profile is active; the daemon and a model server write something."""
    async with (
        daemon({"a": scripted()}, profiles={"night": {"pins": {"gpt": "a"}}}) as served,
        watching(served) as reader,
    ):
        await reader.burst()
        await fetch(served.port, "PUT", "/api/profiles/active", b'{"name": "night"}')
        assert await reader.until("profileChanged") == {"active": "night"}
        served.logs.from_ourselves(b"our line\n")
        assert await reader.until("logData") == {"source": "proxy", "data": "our line\n"}
        await fetch(served.port, "POST", "/api/models/load/a")
        text = ""
        while text != "listening\nready\n":
            data = await reader.until("logData")
            assert data["source"] == "upstream"
            text += data["data"]


# ---- what it costs others --------------------------------------------------------------------------


async def test_watching_is_no_use():
    """It loads nothing, and a model that is watched stops when nobody has used it for its ttl (I12)."""
    async with daemon({"a": scripted(ttl=0.2), "b": scripted()}) as served, watching(served) as reader:
        await reader.burst()
        assert await running(served.port) == {}
        await fetch(served.port, "POST", CHAT, chat("a"))
        await reader.until_state("a", "stopped")
        assert await running(served.port) == {}


async def test_a_client_that_never_reads_delays_nobody(monkeypatch):
    """Models start, serve and swap, and another client sees it (I10); then it reads what it lost and how all stands."""
    monkeypatch.setattr(events, "BACKLOG", 4)
    models = {name: scripted(turn_lease=0, linger=0) for name in "ab"}
    async with daemon(models) as served, watching(served, small_buffer=True) as deaf, watching(served) as reader:
        await deaf.burst()
        await reader.burst()
        while not any(follower._dropped for follower in served.logs.upstream._followers):
            served.logs.from_child("a", b"x" * 100_000 + b"\n")
            await reader.until("logData", lambda data: data["data"].endswith("\n"))
        for model in "ab":
            assert (await fetch(served.port, "POST", CHAT, chat(model))).json()["model"] == model
            await reader.until_state(model, "ready")
        async with await connect(served.port) as busy:
            await busy.ask("POST", CHAT, chat("b", stream=True, **ENDLESS))
            for _ in range(2 * events.BACKLOG):
                await reader.until("inflight")
            await deaf.until("logData", lambda data: " bytes dropped --" in data["data"])
            snapshot = await deaf.until("inflight", lambda data: data["operation"] == "snapshot")
            assert [row["model"] for row in snapshot["requests"]] == ["b"]
            await deaf.until("inflight", lambda data: data["operation"] == "upsert")


async def test_head():
    """The same head and no body, and the connection serves the next request."""
    async with daemon({"a": scripted()}) as served, await connect(served.port) as client:
        with trio.fail_after(PATIENCE):
            await client.ask("HEAD", "/api/events")
            answer = await client.answer()
            assert (answer.status, answer["content-type"], answer.body) == (200, "text/event-stream", b"")
            client.parser.start_next_cycle()
            await client.ask("GET", "/health")
            assert (await client.answer()).text == "OK"


async def test_it_is_for_operators():
    """It shows what others ask for."""
    keys = {"user": {"key": "k1"}, "root": {"key": "k2", "admin": True}}
    async with daemon({"a": scripted()}, keys=keys) as served:
        assert (await fetch(served.port, "GET", "/api/events")).status == 401
        assert (await fetch(served.port, "GET", "/api/events", b"", ("authorization", "Bearer k1"))).status == 403
        async with watching(served, ("authorization", "Bearer k2")) as reader:
            assert (await reader.next()).kind == "logData"


async def test_whoever_leaves_is_forgotten():
    """Nothing is kept for a client that has gone, and the next one is served."""
    async with daemon({"a": scripted()}) as served:
        async with watching(served) as reader:
            await reader.burst()
            assert len(served.logs.proxy._followers) == 1

        async def gone() -> bool:
            return not served.logs.proxy._followers

        await eventually(gone)
        async with watching(served) as reader:
            assert [event.kind for event in await reader.burst()] == BURST


async def test_the_end_of_the_daemon(nursery):
    """The stream ends cleanly with the daemon, and says last that every model has stopped."""
    ended = trio.Event()
    last: list[Told] = []

    async def read(reader: Reader) -> None:
        last.extend(told(b"".join((reader.rest + await reader.client.rest()).rpartition(b"id: ")[1:])))
        ended.set()

    with trio.fail_after(PATIENCE):
        async with daemon({"a": scripted()}) as served:
            client = await connect(served.port)
            await client.ask("GET", "/api/events")
            await client.head()
            reader = Reader(client)
            await fetch(served.port, "POST", "/api/models/load/a")
            await reader.until_state("a", "ready")
            nursery.start_soon(read, reader)
        await ended.wait()
        await client.stream.aclose()
    [event] = last
    assert (event.kind, [row["state"] for row in event.data]) == ("modelStatus", ["stopped"])
