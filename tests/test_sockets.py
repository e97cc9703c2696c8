"""Websockets through a daemon: real clients, the whole way, real model servers."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial

import attrs
import h2.events
import h2.settings
import pytest
import trio
from daemons import Daemon, chat, counts, daemon, eventually, fetch, is_running, pid_of, running, scripted
from daemons import connect as connect_http
from serving import Client2, read_to_end
from test_reload import reloading
from websocket_peers import Peer, connect
from wsproto.connection import Connection, ConnectionType
from wsproto.events import CloseConnection, TextMessage

CHAT = "/v1/chat/completions"
KEY = ("x-api-key", "k1")


@attrs.define(eq=False)
class World:
    """A daemon, and those who are connected with it."""

    served: Daemon
    streams: list[trio.SocketStream] = attrs.field(factory=list)

    @property
    def port(self) -> int:
        return self.served.port

    async def open(self, path: str, *headers: tuple[str, str], small_buffer: bool = False, **options) -> Peer:
        """A client whose handshake has been answered."""
        stream = (await connect_http(self.port, small_buffer=small_buffer)).stream
        self.streams.append(stream)
        return await connect(stream, path, headers=headers, **options)

    async def accepted(self, path: str, *headers: tuple[str, str], **options) -> Peer:
        """A client whose websocket is open."""
        client = await self.open(path, *headers, **options)
        assert client.response.status_code == 101, bytes(client.response.body)
        return client

    async def get(self, path: str):
        """The document at *path*."""
        return (await fetch(self.port, "GET", path, b"", KEY)).json()

    async def seen(self, model: str):
        """The last request that the server of *model* got."""
        return (await fetch(self.served.model_ports[model], "GET", "/seen")).json()

    async def closes(self, model: str):
        """How clients closed, as the server of *model* heard it."""
        return (await fetch(self.served.model_ports[model], "GET", "/closes")).json()

    async def unload(self, model: str) -> None:
        assert (await fetch(self.port, "POST", f"/api/models/unload/{model}", b"", KEY)).status == 200

    async def has_stopped(self) -> bool:
        """Whether no model runs."""
        return all(row["state"] == "stopped" for row in (await running(self.port)).values())

    async def is_idle(self) -> bool:
        """Whether nobody is served, and nobody waits."""
        rows = (await self.get("/running"))["running"]
        return (
            not any(row["serving"] or row["waiting"] for row in rows)
            and not (await self.get("/api/inflight"))["requests"]
        )


@asynccontextmanager
async def world(models: Mapping[str, object] | None = None, **settings: object) -> AsyncIterator[World]:
    """A daemon for the length of the block; then all clients go, and nothing of them may be left."""
    async with daemon({"a": scripted()} if models is None else models, **settings) as served:
        here = World(served)
        try:
            yield here
        finally:
            for stream in here.streams:
                stream.socket.close()
        await eventually(here.is_idle)


async def says(client: Peer, message: str | bytes = "hello") -> None:
    """It is an echo that the client talks to."""
    await client.send(message)
    assert await client.receive() == message


def error_of(client: Peer) -> tuple[int, str, str]:
    """Status, code and message of the response that the client got instead of a websocket."""
    response = client.response
    assert response.headers["Content-Type"] == "application/json"
    assert response.headers["X-Request-Id"].startswith("req_")
    document = json.loads(bytes(response.body))
    assert document["src"] == "trioswap"
    return response.status_code, document["error"]["code"], document["error"]["message"]


async def is_serving(here: World, model: str, count: int) -> bool:
    return await is_running(here.port, model, serving=count)


# ---- there and back --------------------------------------------------------------------------


async def test_a_websocket_loads_its_model():
    """And passes whole: path, query, headers, subprotocol, messages of both kinds and any size, codes of the end."""
    async with world() as here:
        client = await here.accepted(
            "/upstream/a/x%2Fy?q=1&r=%20", ("X-Mine", "1"), ("Cookie", "c=1"), subprotocols=["one", "two"]
        )
        assert client.protocol.subprotocol == "two"
        assert client.response.headers["Set-Cookie"] == "seen=yes"
        for message in ("hello", b"hello", "", b"", "grüß 🦙", bytes(2**20), "ä" * 2**19):
            await says(client, message)
        [row] = (await here.get("/api/inflight"))["requests"]
        assert (row["model"], row["method"], row["req_path"]) == ("a", "GET", "/x/y")
        assert row["resp_bytes"] > 2**20
        assert await is_running(here.port, "a", state="ready", serving=1)
        seen = await here.seen("a")
        headers = dict(seen["headers"])
        assert (seen["method"], seen["target"]) == ("GET", "/x%2Fy?q=1&r=%20")
        assert (headers["x-mine"], headers["cookie"]) == ("1", "c=1")
        assert headers["host"] == headers["x-forwarded-host"] == f"127.0.0.1:{here.port}"
        assert (headers["x-forwarded-for"], headers["x-forwarded-proto"]) == ("127.0.0.1", "http")
        await client.send("!close 4321 enough")
        assert await client.closed() == (4321, "enough")
        await eventually(partial(is_serving, here, "a", 0))

        async def noted() -> bool:  # it notes the answer to its close a moment after we have sent it
            return await here.closes("a") == [4321]

        await eventually(noted)


async def test_a_client_that_closes():
    """The model server hears it, and the lease is given back at once."""
    async with world() as here:
        client = await here.accepted("/upstream/a/")
        await says(client)
        await client.close(1000, "bye")
        assert await client.closed() == (1000, "bye")
        await eventually(here.is_idle)
        [code] = await here.closes("a")
        assert code != "broken"
        assert await counts(here.served.model_ports["a"]) == {"started": 1, "finished": 1, "aborted": 0}


async def test_credentials_are_for_us():
    """The model server sees none of them where keys are asked for, and what else the client says."""
    async with world(api_keys=["k1"]) as here:
        await here.accepted("/upstream/a/", ("Authorization", "Bearer k1"), ("X-Mine", "1"))
        headers = dict((await here.seen("a"))["headers"])
        assert headers["x-mine"] == "1"
        assert headers.keys().isdisjoint({"authorization", "x-api-key", "api-key"})


async def test_the_name_without_a_path():
    """Is the root of the model server."""
    async with world() as here:
        await says(await here.accepted("/upstream/a?x=1"))
        assert (await here.seen("a"))["target"] == "/?x=1"


@pytest.mark.parametrize(
    ("name", "model", "target"),
    [("a", "a", "a"), ("nick", "b", "nick"), ("pick", "b", "b"), ("w%C3%B6%2F+x", "c", "real")],
)
async def test_the_model_in_the_query(name, model, target):
    """By any of its names; the server sees the name that a model route would show it."""
    models = {"a": scripted(), "b": scripted(aliases=["nick"]), "c": scripted(aliases=["wö/ x"], use_model_name="real")}
    selectors = {"pick": {"strategy": "pin", "targets": ["b", "a"]}}
    async with world(models, selectors=selectors) as here:
        await says(await here.accepted(f"/v1/realtime?x=%2F&model={name}"))
        assert (await here.seen(model))["target"] == f"/v1/realtime?x=%2F&model={target}"
        assert list(await running(here.port)) == [model]
        [row] = (await here.get("/api/inflight"))["requests"]
        assert (row["model"], row.get("metadata")) == (model, {"selector": "pick"} if name == "pick" else None)


@pytest.mark.parametrize(
    ("path", "error", "words"),
    [
        ("/v1/realtime", (400, "bad_request"), "no model is named"),
        ("/v1/realtime?model=", (400, "bad_request"), "no model is named"),
        ("/v1/realtime?model=%ff", (400, "bad_request"), "not UTF-8"),
        ("/v1/realtime?model=x", (404, "not_found"), 'model "x" is not configured'),
        ("/v1/realtime/?model=a", (404, "not_found"), "no such path"),
        ("/upstream/x/y", (404, "not_found"), 'model "x" is not configured'),
        ("/upstream/", (404, "not_found"), "is not configured"),
        ("/upstream", (404, "not_found"), "is not configured"),
        ("/comfyui/ws", (404, "not_found"), 'model "comfyui_auto" is not configured'),
        ("/ws", (404, "not_found"), "no such path"),
    ],
)
async def test_a_refusal_is_a_response(path, error, words):
    """With status and body; the connection ends, and nothing was loaded."""
    async with world() as here:
        client = await here.open(path)
        *found, message = error_of(client)
        assert tuple(found) == error
        assert words in message
        assert await read_to_end(client.stream) == b""
        assert await running(here.port) == {}


# ---- swaps, drains and ends ----------------------------------------------------------------------

AT_ONCE = {"turn_lease": 0, "linger": 0}  # a swap waits only for what is being served


async def test_a_swap_waits_for_a_websocket():
    """Which goes on; when it is over its model goes, and the other's websocket opens."""
    async with world({"a": scripted(), "b": scripted(max_wait=0)}, **AT_ONCE) as here:
        first = await here.accepted("/upstream/a/")
        opened: list[Peer] = []

        async def second() -> None:
            opened.append(await here.accepted("/upstream/b/"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(second)
            await eventually(partial(is_running, here.port, "a", state="draining", serving=1))
            await says(first)
            assert not opened
            await first.close(1000)
        assert list(await running(here.port)) == ["b"]
        await says(opened[0])


async def test_a_swap_waits_no_longer_than_the_drain_timeout():
    """Then the websocket is closed with 1012, whether its client reads or not."""
    async with world({"a": scripted(drain_timeout=0.1), "b": scripted(max_wait=0)}, **AT_ONCE) as here:
        deaf = await here.accepted("/upstream/a/", small_buffer=True)
        await deaf.send("!flood")
        client = await here.accepted("/upstream/a/")
        await says(client)
        await says(await here.accepted("/upstream/b/"))
        code, reason = await client.closed()
        assert code == 1012
        assert reason.startswith('the request was cut off while model "a" served it: ')
        assert list(await running(here.port)) == ["b"]


async def test_unloading_closes_a_websocket():
    """With 1012, after unload_drain_timeout."""
    async with world({"a": scripted(unload_drain_timeout=0.1)}) as here:
        client = await here.accepted("/upstream/a/")
        await here.unload("a")
        assert (await client.closed())[0] == 1012
        assert await running(here.port) == {}


@pytest.mark.parametrize("ignored", [False, True])
async def test_the_end_of_the_daemon(ignored):
    """Closes a websocket with 1001, not later than unload_drain_timeout; one that never reads does not hold it."""
    ends = []
    async with trio.open_nursery() as nursery:
        model = scripted(unload_drain_timeout=0.1, compat={"ignore_websockets": ignored})
        async with daemon({"a": model}) as served:
            assert (await fetch(served.port, "GET", "/upstream/a/")).status == 200
            here = World(served)
            client = await here.accepted("/upstream/a/")
            await says(client)
            deaf = await here.accepted("/upstream/a/", small_buffer=True)
            await deaf.send("!flood")

            async def note_end() -> None:
                ends.append(await client.closed())

            nursery.start_soon(note_end)
    assert ends == [(1001, "trioswap is shutting down; send the request again in a moment")]
    for stream in here.streams:
        await stream.aclose()


@pytest.mark.parametrize("command", ["!die", "!break"])
async def test_a_model_server_that_breaks_off(command):
    """The client is closed with 1011 and told why; the next one is served, by a fresh server if need be."""
    async with world() as here:
        client = await here.accepted("/upstream/a/")
        pid = await pid_of(here.served.model_ports["a"])
        await client.send(command)
        code, reason = await client.closed()
        assert code == 1011
        assert reason.startswith('model "a" failed while it handled the request: ')
        await says(await here.accepted("/upstream/a/"))
        assert (await pid_of(here.served.model_ports["a"]) != pid) == (command == "!die")


async def test_a_model_server_that_dies_in_each_websocket_is_not_tried_for_ever():
    """That it accepted them is no proof: after the second death in a row who asks is told when to come again."""
    async with world({"a": scripted(backoff=3600, backoff_max=3600)}) as here:
        for _ in range(2):
            client = await here.accepted("/upstream/a/")
            await client.send("!die")
            await client.closed()
            await eventually(here.has_stopped)
        refused = (await here.open("/upstream/a/")).response
        assert (refused.status_code, int(refused.headers["retry-after"]) > 1800) == (503, True)


async def test_a_model_server_that_dies_before_it_answers():
    """The handshake is made once more with a fresh one, and the client notices nothing."""
    async with world() as here:
        assert (await fetch(here.port, "GET", "/upstream/a/")).status == 200
        pid = await pid_of(here.served.model_ports["a"])
        os.kill(pid, signal.SIGSTOP)
        async with trio.open_nursery() as nursery:

            async def open_and_talk() -> None:
                await says(await here.accepted("/upstream/a/"))

            nursery.start_soon(open_and_talk)
            await eventually(partial(is_serving, here, "a", 1))
            os.kill(pid, signal.SIGKILL)
        assert await pid_of(here.served.model_ports["a"]) != pid


async def test_a_model_server_that_does_not_answer():
    """Its handshake is broken off when its model is unloaded, and the client gets a response."""
    async with world({"a": scripted("--hold", unload_drain_timeout=0.1)}) as here, trio.open_nursery() as nursery:

        async def wait() -> None:
            status, _, message = error_of(await here.open("/upstream/a/"))
            assert status == 503
            assert message.startswith('the request was cut off while model "a" served it: ')

        nursery.start_soon(wait)
        await eventually(partial(is_serving, here, "a", 1))
        await here.unload("a")


async def test_a_client_that_leaves_before_the_model_server_answers():
    """The model server hears it, and the lease is given back."""
    async with world({"a": scripted("--hold")}) as here:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(here.open, "/upstream/a/")
            await eventually(partial(is_serving, here, "a", 1))
            nursery.cancel_scope.cancel()
        await here.streams[0].aclose()
        await eventually(here.is_idle)

        async def is_aborted() -> bool:
            return await counts(here.served.model_ports["a"]) == {"started": 1, "finished": 0, "aborted": 1}

        await eventually(is_aborted)


async def test_a_model_that_does_not_start():
    """Is a 503 that says so."""
    async with world({"a": scripted("--exit-at-start", 1)}) as here:
        client = await here.open("/upstream/a/")
        status, _, message = error_of(client)
        assert status == 503
        assert message.startswith('model "a" did not start: ')


async def test_a_model_server_that_refuses():
    """Its own status and body reach the client."""
    async with world({"a": scripted("--status", 418)}) as here:
        client = await here.open("/upstream/a/")
        assert client.response.status_code == 418
        assert json.loads(bytes(client.response.body))["error"]["message"] == "a says 418"
        assert client.response.headers["X-Request-Id"].startswith("req_")
        assert await read_to_end(client.stream) == b""


async def test_a_client_that_never_reads_delays_only_itself():
    """Another websocket of the same model goes on, and an unload takes no longer than it may."""
    async with world({"a": scripted(unload_drain_timeout=0.1)}) as here:
        deaf = await here.accepted("/upstream/a/", small_buffer=True)
        await deaf.send("!flood")
        other = await here.accepted("/upstream/a/")
        for _ in range(20):
            await says(other)
        await here.unload("a")
        assert (await other.closed())[0] == 1012


async def test_a_model_server_that_never_reads():
    """A client that leaves it holds nothing."""
    async with world() as here:
        client = await here.accepted("/upstream/a/")
        await client.send("!deaf")
        await client.stream.aclose()
        await eventually(here.is_idle)


# ---- waiting ------------------------------------------------------------------------------------


async def waiting(here: World, *models: str) -> bool:
    """Whether exactly these are waited for."""
    return sorted(row["model"] for row in (await here.get("/api/queue"))["waiting"]) == sorted(models)


async def test_a_client_that_leaves_while_its_model_loads(tmp_path):
    """Its place is free, and the model may go on loading; the next one does not wait for it."""
    ready = tmp_path / "ready"
    async with world({"a": scripted("--ready-once", str(ready), concurrency_limit=1)}) as here:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(here.open, "/upstream/a/")
            await eventually(partial(waiting, here, "a"))
            nursery.cancel_scope.cancel()
        await here.streams[0].aclose()
        await eventually(here.is_idle)
        ready.touch()
        await says(await here.accepted("/upstream/a/"))
        assert await counts(here.served.model_ports["a"]) == {"started": 1, "finished": 0, "aborted": 0}


async def test_a_websocket_that_waits_too_long():
    """`queue_timeout` is for websockets, too."""
    async with world({"a": scripted("--never-ready", queue_timeout=0.1)}) as here:
        status, _, message = error_of(await here.open("/upstream/a/"))
        assert status == 503
        assert "(queue_timeout)" in message


async def test_what_is_served_has_waited_enough():
    """`queue_timeout` is over when the model serves."""
    async with world({"a": scripted(queue_timeout=0.2)}) as here:
        assert (await fetch(here.port, "POST", "/api/models/load/a")).status == 200
        client = await here.accepted("/upstream/a/")
        late = trio.current_time() + 0.4
        while trio.current_time() < late:
            await says(client)


async def test_nothing_is_started_for_a_client_that_has_left():
    """While others wait: its model is passed over."""
    models = {name: scripted(max_wait=0) for name in ("a", "b", "c")}
    async with world(models) as here:
        first = await here.accepted("/upstream/a/")
        async with trio.open_nursery() as nursery:
            async with trio.open_nursery() as impatient:
                impatient.start_soon(here.open, "/upstream/b/")
                await eventually(partial(waiting, here, "b"))
                nursery.start_soon(here.accepted, "/upstream/c/")
                await eventually(partial(waiting, here, "b", "c"))
                impatient.cancel_scope.cancel()
            await here.streams[1].aclose()
            await eventually(partial(waiting, here, "c"))
            await says(first)
            await first.close()
        assert list(await running(here.port)) == ["c"]
        decisions = (await here.get("/api/queue"))["decisions"]
        assert "b" not in {row["model"] for row in decisions}


# ---- what is no use of a model ------------------------------------------------------------------


IGNORED = {"compat": {"ignore_websockets": True}}


async def test_an_ignored_websocket_loads_nothing():
    """409 where its model is not ready."""
    async with world({"a": scripted(**IGNORED)}) as here:
        for path in ("/upstream/a/", "/v1/realtime?model=a"):
            status, code, message = error_of(await here.open(path))
            assert (status, code) == (409, "conflict")
            assert message == 'model "a" is not loaded, and a websocket does not load it'
        assert await running(here.port) == {}


async def test_an_ignored_websocket_delays_no_swap():
    """It is closed with 1012 when its model stops, and counts for nothing until then."""
    async with world({"a": scripted(concurrency_limit=1, **IGNORED), "b": scripted()}) as here:
        assert (await fetch(here.port, "GET", "/upstream/a/")).status == 200
        clients = [await here.accepted("/upstream/a/") for _ in range(3)]
        assert await is_running(here.port, "a", serving=0)
        assert len((await here.get("/api/inflight"))["requests"]) == 3
        assert (await fetch(here.port, "GET", "/upstream/a/")).status == 200
        await says(clients[0])
        assert (await fetch(here.port, "POST", CHAT, chat("b"))).status == 200
        for client in clients:
            assert await client.closed() == (1012, "the model was stopped")
        assert list(await running(here.port)) == ["b"]


async def test_an_ignored_websocket_is_not_counted_by_selectors():
    """The model is as free as without it, and no further one is started."""
    selectors = {"pick": {"strategy": "spillover", "targets": ["a", "b"]}}
    groups = {"both": {"swap": False, "members": ["a", "b"]}}
    async with world({"a": scripted(**IGNORED), "b": scripted()}, selectors=selectors, groups=groups) as here:
        assert (await fetch(here.port, "GET", "/upstream/a/")).status == 200
        await says(await here.accepted("/v1/realtime?model=pick"))
        answer = await fetch(here.port, "POST", CHAT, chat("pick"))
        assert answer.json()["model"] == "a"


async def test_an_ignored_websocket_keeps_no_model():
    """The ttl is over although it talks all the time."""
    async with world({"a": scripted(ttl=0.5, **IGNORED)}) as here:
        assert (await fetch(here.port, "GET", "/upstream/a/")).status == 200
        client = await here.accepted("/upstream/a/")
        talked = 0
        with suppress(trio.BrokenResourceError, AssertionError):
            while True:
                await says(client)
                talked += 1
        assert talked
        assert await client.closed() == (1012, "the model was stopped")
        assert await running(here.port) == {}


async def test_the_websocket_of_comfyui():
    """Its pages hold one all the time: only the first page loads the model, and the websocket never does."""
    async with world({"comfyui_auto": scripted(), "b": scripted()}) as here:
        assert error_of(await here.open("/comfyui/ws"))[:2] == (409, "conflict")
        assert await running(here.port) == {}
        assert (await fetch(here.port, "GET", "/comfyui/")).text == "comfyui_auto /"
        client = await here.accepted("/comfyui/ws%20?clientId=1")
        await says(client)
        assert (await here.seen("comfyui_auto"))["target"] == "/ws%20?clientId=1"
        assert await is_running(here.port, "comfyui_auto", serving=0)
        assert (await fetch(here.port, "POST", CHAT, chat("b"))).status == 200
        assert (await client.closed())[0] == 1012


# ---- who may, and how many ----------------------------------------------------------------------


async def test_keys():
    """No key or a wrong one is 401, one that is not enough 403; nothing is loaded, and the right one opens."""
    models = {"a": scripted(), "b": scripted()}
    async with world(models, api_keys=["k1"], keys={"some": {"key": "k2", "models": ["b"]}}) as here:
        for path in ("/upstream/a/", "/v1/realtime?model=a", "/ws", "/v1/realtime"):
            for headers in ((), (("Authorization", "Bearer k3"),)):
                client = await here.open(path, *headers)
                if path == "/ws":
                    assert error_of(client)[0] == 404
                    continue
                assert error_of(client)[:2] == (401, "unauthorized")
                assert client.response.headers["WWW-Authenticate"] == 'Basic realm="trioswap"'
        for path in ("/upstream/a/", "/v1/realtime?model=a"):
            assert error_of(await here.open(path, ("Authorization", "Bearer k2")))[:2] == (403, "forbidden")
        assert (await here.get("/running"))["running"] == []
        await says(await here.accepted("/upstream/b/", ("Authorization", "Bearer k2")))
        await says(await here.accepted("/upstream/b/", KEY))


@pytest.mark.parametrize("path", ["/upstream/a/", "/v1/realtime?model=a"])
async def test_pages_of_others(path):
    """Browsers let every page open a websocket to everywhere, so we refuse what is not ours; nothing is loaded."""
    async with world() as here:
        assert error_of(await here.open(path, ("Origin", "https://evil.example")))[0] == 403
        assert await running(here.port) == {}
        await says(await here.accepted(path, ("Origin", "http://localhost:3000")))


async def test_limits():
    """A websocket is one of the requests that may be there at the same time."""
    async with world({"a": scripted(concurrency_limit=1)}) as here:
        client = await here.accepted("/upstream/a/")
        refused = await here.open("/upstream/a/")
        assert error_of(refused)[:2] == (429, "rate_limit_exceeded")
        assert int(refused.response.headers["Retry-After"]) >= 1
        assert (await fetch(here.port, "POST", CHAT, chat("a"))).status == 429
        await client.close()
        await eventually(here.is_idle)
        await says(await here.accepted("/upstream/a/"))


# ---- an operator ends it ------------------------------------------------------------------------


async def cancel_the_only_one(here: World) -> None:
    [row] = (await here.get("/api/inflight"))["requests"]
    assert (await fetch(here.port, "POST", f"/api/inflight/{row['id']}/cancel")).status == 200


async def test_an_operator_closes_a_websocket():
    """With 1008, after which clients do not come again by themselves."""
    async with world() as here:
        client = await here.accepted("/upstream/a/")
        await cancel_the_only_one(here)
        assert await client.closed() == (1008, "the request was cancelled by an operator")
        await eventually(here.is_idle)


async def test_an_operator_ends_the_waiting(tmp_path):
    """Of one whose model loads: a response that says so."""
    async with world({"a": scripted("--ready-once", str(tmp_path / "ready"))}) as here, trio.open_nursery() as nursery:

        async def wait() -> None:
            assert error_of(await here.open("/upstream/a/"))[:2] == (499, "cancelled")

        nursery.start_soon(wait)
        await eventually(partial(waiting, here, "a"))
        await cancel_the_only_one(here)


# ---- peers --------------------------------------------------------------------------------------


@asynccontextmanager
async def two_worlds(**far: object) -> AsyncIterator[tuple[World, World]]:
    """A daemon, and another one whose peer `far` it is, which has model `m`."""
    async with world({"m": scripted(aliases=["m2"])}, **far) as there:
        url = f"http://127.0.0.1:{there.port}/"
        peers = {"far": {"proxy": url, "models": ["m", "m2"], **({"api_key": "k1"} if far else {})}}
        async with world({"local": scripted()}, peers=peers) as here:
            yield here, there


@pytest.mark.parametrize("far", [{}, {"api_keys": ["k1"]}])
@pytest.mark.parametrize("path", ["/v1/realtime?x=1&model=far%2Fm2", "/upstream/far/m2/v1/realtime?x=1&model=m2"])
async def test_a_peer(path, far):
    """Daemon to daemon: it is asked by its own name for the model, and with its key instead of the client's."""
    async with two_worlds(**far) as (here, there):
        client = await here.accepted(
            path, ("X-Forwarded-For", "10.0.0.1"), ("X-Mine", "1"), subprotocols=["one", "two"]
        )
        assert client.protocol.subprotocol == "two"
        for message in ("hello", b"hello", bytes(2**20)):
            await says(client, message)
        seen = await there.seen("m")
        headers = dict(seen["headers"])
        assert seen["target"] == "/v1/realtime?x=1&model=m2"
        assert (headers["host"], headers["x-mine"]) == (f"127.0.0.1:{there.port}", "1")
        assert headers["x-forwarded-for"] == "127.0.0.1"
        assert headers.keys().isdisjoint({"authorization", "x-api-key"})
        [row] = (await here.get("/api/inflight"))["requests"]
        assert row["model"] == "far/m2"
        await client.send("!close 4321 enough")
        assert await client.closed() == (4321, "enough")


async def test_a_peer_that_refuses():
    """What it says reaches the client."""
    async with two_worlds() as (here, _):
        client = await here.open("/upstream/far/m/ws")
        assert error_of(client) == (404, "not_found", "no such path: /ws")


async def test_a_peer_that_is_not_there():
    """502, and the reason."""
    async with world(peers={"far": {"proxy": "http://127.0.0.1:9", "models": ["m"]}}) as here:
        status, _, message = error_of(await here.open("/v1/realtime?model=far/m"))
        assert status == 502
        assert "far" in message


async def test_the_end_of_the_daemon_before_a_peer():
    """The client is closed with 1001, and the peer hears of it."""
    ends = []
    async with world() as there, trio.open_nursery() as nursery:
        peers = {"far": {"proxy": f"http://127.0.0.1:{there.port}", "models": ["a"]}}
        async with daemon({"local": scripted()}, peers=peers) as served:
            client = await World(served).accepted("/v1/realtime?model=far/a")

            async def note_end() -> None:
                ends.append(await client.closed())

            nursery.start_soon(note_end)
        await eventually(there.is_idle)
        assert await there.closes("a") == [1001]
    assert [code for code, _ in ends] == [1001]
    await client.stream.aclose()


@pytest.mark.parametrize("to_peer", [False, True])
async def test_a_websocket_that_waits_goes_on_with_whom_its_name_means_by_then(tmp_path, to_peer):
    """Be that a model of ours or a peer's; and it hears of the end of the daemon like any other."""
    never, ends, open_ = scripted("--ready-once", str(tmp_path / "never")), [], trio.Event()
    async with world() as there, trio.open_nursery() as nursery:
        peers = {"far": {"proxy": f"http://127.0.0.1:{there.port}", "models": ["a"]}}
        async with reloading(tmp_path, {"a": never}) as served:
            here = World(served)

            async def talk() -> None:
                client = await here.accepted("/v1/realtime?model=a")
                await says(client)
                open_.set()
                ends.append(await client.closed())
                await client.stream.aclose()

            nursery.start_soon(talk)
            await eventually(partial(waiting, here, "a"))
            if to_peer:
                await served.reload({}, peers=peers)
            else:
                await served.reload({"b": scripted(aliases=["a"], unload_drain_timeout=0.1)})
            await open_.wait()
        await eventually(there.is_idle)
    assert [code for code, _ in ends] == [1001]


# ---- HTTP/2 -------------------------------------------------------------------------------------


@attrs.define(eq=False)
class Socket2:
    """A websocket in a stream of HTTP/2 (RFC 8441)."""

    client: Client2
    stream_id: int
    frames: Connection = attrs.field(factory=partial(Connection, ConnectionType.CLIENT))

    async def send(self, event) -> None:
        self.client.parser.send_data(self.stream_id, self.frames.send(event))
        await self.client.flush()

    async def receive(self):
        """The next event of the websocket."""
        while True:
            for event in self.frames.events():
                return event
            data = await self.client.expect(h2.events.DataReceived, self.stream_id)
            self.client.parser.acknowledge_received_data(data.flow_controlled_length, self.stream_id)
            await self.client.flush()
            self.frames.receive_data(data.data)


async def client2(here: World) -> Client2:
    client = Client2((await connect_http(here.port)).stream)
    here.streams.append(client.stream)
    await client.flush()
    settings = await client.expect(h2.events.RemoteSettingsChanged)
    assert settings.changed_settings[h2.settings.SettingCodes.ENABLE_CONNECT_PROTOCOL].new_value == 1
    return client


async def ask_for_websocket2(client: Client2, path: str) -> int:
    """Send a handshake; its stream."""
    stream_id = client.parser.get_next_available_stream_id()
    head = [(":method", "CONNECT"), (":protocol", "websocket"), (":scheme", "http"), (":path", path)]
    client.parser.send_headers(stream_id, [*head, (":authority", "127.0.0.1"), ("sec-websocket-version", "13")])
    await client.flush()
    return stream_id


async def status2(client: Client2, stream_id: int) -> str:
    """Of the answer."""
    answer = await client.expect(h2.events.ResponseReceived, stream_id)
    return dict(answer.headers)[b":status"].decode()


async def ask2(client: Client2, path: str) -> tuple[int, str]:
    """Ask for a websocket; its stream, and the status of the answer."""
    stream_id = await ask_for_websocket2(client, path)
    return stream_id, await status2(client, stream_id)


async def test_a_websocket_in_http2():
    """Several in one connection, beside an ordinary request, each with an end of its own."""
    async with world() as here:
        client = await client2(here)
        sockets = []
        for number in range(2):
            stream_id, status = await ask2(client, f"/upstream/a/{number}")
            assert status == "200"
            sockets.append(Socket2(client, stream_id))
        for socket in sockets:
            await socket.send(TextMessage("hello"))
            assert (await socket.receive()).data == "hello"
        assert await is_running(here.port, "a", serving=2)
        await sockets[0].send(TextMessage("!close 4321 enough"))
        end = await sockets[0].receive()
        assert isinstance(end, CloseConnection)
        assert (end.code, end.reason) == (4321, "enough")
        await sockets[0].send(end.response())
        await eventually(partial(is_serving, here, "a", 1))
        await sockets[1].send(TextMessage("still there?"))
        assert (await sockets[1].receive()).data == "still there?"
        await client.stream.aclose()
        await eventually(here.is_idle)


async def test_a_refusal_in_http2():
    """A proper response, and the connection goes on."""
    async with world() as here:
        client = await client2(here)
        stream_id, status = await ask2(client, "/v1/realtime?model=x")
        assert status == "404"
        body = await client.expect(h2.events.DataReceived, stream_id)
        assert json.loads(body.data)["error"]["code"] == "not_found"
        ordinary = await client.ask("/health")
        assert (await client.expect(h2.events.DataReceived, ordinary)).data == b"OK"
        await client.stream.aclose()


@pytest.mark.parametrize("how", ["reset", "data"])
async def test_a_rude_client_in_http2(how):
    """One that resets its stream, or sends what is no frame: the daemon lives, and nothing is left."""
    async with world() as here:
        client = await client2(here)
        stream_id, _ = await ask2(client, "/upstream/a/")
        if how == "reset":
            client.parser.reset_stream(stream_id)
        else:
            client.parser.send_data(stream_id, b"\xff" * 100)
        await client.flush()
        await eventually(here.is_idle)
        await says(await here.accepted("/upstream/a/"))
        await client.stream.aclose()


async def test_a_client_that_closes_in_http2():
    """Is answered, and the stream ends, so that it is none of those that may be open at the same time."""
    async with world() as here:
        client = await client2(here)
        stream_id, _ = await ask2(client, "/upstream/a/")
        socket = Socket2(client, stream_id)
        await socket.send(CloseConnection(4321, "enough"))
        assert (await socket.receive()).code == 4321
        await client.expect(h2.events.StreamEnded, stream_id)
        await eventually(here.is_idle)
        await client.stream.aclose()


async def test_a_client_that_ends_its_stream_in_http2():
    """Has gone, as when it ends a connection (RFC 8441, 5); our side ends, too."""
    async with world() as here:
        client = await client2(here)
        stream_id, _ = await ask2(client, "/upstream/a/")
        client.parser.end_stream(stream_id)
        await client.flush()
        await client.expect(h2.events.StreamEnded, stream_id)
        await eventually(here.is_idle)
        await client.stream.aclose()


async def test_data_before_the_answer_in_http2(tmp_path):
    """Is refused, and nobody waits for the model any more."""
    async with world({"a": scripted("--ready-once", str(tmp_path / "ready"))}) as here:
        client = await client2(here)
        stream_id = await ask_for_websocket2(client, "/upstream/a/")
        await eventually(partial(waiting, here, "a"))
        client.parser.send_data(stream_id, Connection(ConnectionType.CLIENT).send(TextMessage("hello")))
        await client.flush()
        assert await status2(client, stream_id) == "400"
        await eventually(here.is_idle)
        await client.stream.aclose()
