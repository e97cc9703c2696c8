"""The operator endpoints of the daemon: listings, loading and unloading by hand, logs."""

from __future__ import annotations

import logging
from functools import partial

import pytest
import trio
from children import PATIENCE, alive
from daemons import (
    chat,
    connect,
    daemon,
    eventually,
    fetch,
    is_running,
    pid_of,
    running,
    scripted,
)

from trioswap.logs import CAPACITY

CHAT = "/v1/chat/completions"


# ---- listings --------------------------------------------------------------------------------


async def test_the_models_are_listed():
    """Sorted by id, without the unlisted, in OpenAI's shape with llama-swap's additions."""
    models = {
        "b/c": scripted(aliases=["two", "three"], description=" long "),
        "a": scripted(name="Model A"),
        "hidden": scripted(unlisted=True),
    }
    async with daemon(models) as served:
        assert (await fetch(served.port, "POST", CHAT, chat("three"))).status == 200
        listed = (await fetch(served.port, "GET", "/v1/models")).json()
    created = listed["data"][0]["created"]
    fixed = {"object": "model", "created": created, "owned_by": "trioswap"}
    assert created > 1_700_000_000
    assert listed == {
        "object": "list",
        "data": [
            {
                "id": "a", **fixed, "name": "Model A",
                "meta": {"llamaswap": {"type": "model"}}, "status": {"value": "unloaded"},
            },
            {
                "id": "b/c", **fixed, "description": "long",
                "meta": {"llamaswap": {"type": "model", "aliases": ["two", "three"]}}, "status": {"value": "loaded"},
            },
        ],
    }  # fmt: skip


async def test_what_runs_is_told():
    """One row for a model that is not stopped, or that somebody waits for, with its command and its load."""
    models = {"a": scripted(ttl=600, description="d"), "b": scripted()}
    async with daemon(models) as served, await connect(served.port) as busy, await connect(served.port) as queued:
        assert (await fetch(served.port, "GET", "/running")).json() == {"running": []}
        await busy.ask("POST", CHAT, chat("a", stream=True, chunks=10**6, chunk_delay=0.01))
        await busy.head()
        await queued.ask("POST", CHAT, chat("b"))
        await eventually(partial(is_running, served.port, "b", waiting=1))
        rows = await running(served.port)
        port = served.model_ports["a"]
        assert f"--port {port} --name a" in rows["a"].pop("cmd")
        assert rows["a"] == {
            "model": "a", "state": "ready", "proxy": f"http://127.0.0.1:{port}", "ttl": 600.0, "name": "",
            "description": "d", "serving": 1, "waiting": 0,
        }  # fmt: skip
        assert (rows["b"]["state"], rows["b"]["serving"]) == ("stopped", 0)


async def test_passive_requests_load_nothing():
    """Looking at the daemon starts no model (I12)."""
    async with daemon({"a": scripted()}) as served:
        for path in (
            "/health",
            "/running",
            "/v1/models",
            "/logs",
            "/logs/stream/a?no-follow",
            "/logs/stream?no-follow",
        ):
            assert (await fetch(served.port, "GET", path)).status == 200
        assert await running(served.port) == {}


# ---- loading and unloading -----------------------------------------------------------------------

SPELLINGS = ["org/model", "org%2Fmodel", "org%2fmodel", "nick", "sla/sh", "sla%2Fsh"]


@pytest.mark.parametrize("spelling", SPELLINGS)
async def test_a_model_is_loaded_and_unloaded_by_hand(spelling):
    """By name or alias, slashes escaped or not; the answers come when it is ready, and when its process is gone."""
    async with daemon({"org/model": scripted(aliases=["nick", "sla/sh"]), "org": scripted()}) as served:
        answer = await fetch(served.port, "POST", f"/api/models/load/{spelling}")
        assert (answer.status, answer.json()) == (200, {"msg": "ok", "model": "org/model"})
        assert await is_running(served.port, "org/model", state="ready", serving=0)
        pid = await pid_of(served.model_ports["org/model"])
        answer = await fetch(served.port, "POST", f"/api/models/unload/{spelling}")
        assert (answer.status, answer.text) == (200, "OK")
        assert not alive(pid)
        assert await running(served.port) == {}


async def test_unloading_what_does_not_run_is_no_error():
    """Neither one model nor all; only an unknown one is."""
    async with daemon({"a": scripted()}) as served:
        assert (await fetch(served.port, "POST", "/api/models/unload/a")).status == 200
        assert (await fetch(served.port, "POST", "/api/models/unload")).json() == {"msg": "ok"}
        for action in ("load", "unload"):
            answer = await fetch(served.port, "POST", f"/api/models/{action}/b")
            assert (answer.status, answer.json()["error"]["param"]) == (404, "model")


async def test_who_waits_for_an_unloaded_model_is_told():
    """The operator's word ends the load, and the request that waited for it is a 503."""
    async with daemon({"a": scripted("--never-ready")}) as served, trio.open_nursery() as nursery:

        async def wait() -> None:
            answer = await fetch(served.port, "POST", CHAT, chat("a"))
            assert answer.status == 503
            assert "was unloaded while this request waited" in answer.json()["error"]["message"]

        nursery.start_soon(wait)
        await eventually(partial(is_running, served.port, "a", state="starting", waiting=1))
        assert (await fetch(served.port, "POST", "/api/models/unload/a")).status == 200


async def test_an_operator_who_leaves_stops_nothing(caplog):
    """A client hangs up on its load request: the waiting ends, the daemon goes on, the log says who ended it."""
    caplog.set_level(logging.INFO, "trioswap.app")
    async with daemon({"a": scripted("--ready-delay", 0.3)}) as served:
        async with await connect(served.port) as client:
            await client.ask("POST", "/api/models/load/a")
            await eventually(partial(is_running, served.port, "a", waiting=1))
        await eventually(partial(is_running, served.port, "a", waiting=0))
        await eventually(partial(is_running, served.port, "a", state="ready", serving=0))
    [line] = [record.message for record in caplog.records if "path=/api/models/load/a" in record.message]
    assert "status=499" in line


# ---- logs -------------------------------------------------------------------------------------


async def follow_until(client, wanted: bytes) -> bytes:
    received = b""
    with trio.fail_after(PATIENCE):
        while wanted not in received:
            piece = await client.piece()
            assert piece
            received += piece
    return received


@pytest.mark.parametrize("path", ["/logs/stream", "/logs/stream/upstream", "/logs/stream/a", "/logs/stream/nick"])
async def test_a_follower_gets_the_history_and_then_what_comes(path):
    """What the model server wrote before, then each line as it is written, over restarts of the server."""
    async with daemon({"a": scripted(aliases=["nick"])}) as served:
        await fetch(served.port, "POST", "/api/models/load/a")
        async with await connect(served.port) as client, await connect(served.port) as late:
            await client.ask("GET", path)
            assert (await client.head()).status_code == 200
            await late.ask("GET", f"{path}?no-history")
            assert (await late.head()).status_code == 200
            assert await follow_until(client, b"ready\n") == b"listening\nready\n"
            await fetch(served.port, "POST", "/api/models/unload")
            await fetch(served.port, "POST", "/api/models/load/a")
            assert await follow_until(client, b"ready\n") == b"listening\nready\n"
            assert await follow_until(late, b"ready\n") == b"listening\nready\n"


async def test_the_history_is_one_answer():
    """GET /logs, and a stream that is told not to follow."""
    async with daemon({"a": scripted()}) as served:
        await fetch(served.port, "POST", "/api/models/load/a")
        for path in ("/logs", "/logs/stream?no-follow", "/logs/stream/a?no-follow"):
            answer = await fetch(served.port, "GET", path)
            assert answer["content-type"] == "text/plain; charset=utf-8"
            assert answer.text == "listening\nready\n"
        assert (await fetch(served.port, "GET", "/logs/stream/proxy?no-follow")).text == ""
        assert (await fetch(served.port, "GET", "/logs/stream/b?no-follow")).status == 404


async def test_a_follower_that_never_reads_blocks_nobody():
    """A model server that writes 5 MB starts, serves, and is logged, while somebody follows and takes nothing (I10)."""
    models = {"a": scripted("--spam", 5_000_000), "b": scripted()}
    async with daemon(models) as served, await connect(served.port, small_buffer=True) as deaf:
        await deaf.ask("GET", "/logs/stream")
        assert (await deaf.head()).status_code == 200
        for model in "aba":
            assert (await fetch(served.port, "POST", CHAT, chat(model))).json()["model"] == model
        history = (await fetch(served.port, "GET", "/logs")).body
        assert history.endswith(b"ready\n")
        assert len(history) <= CAPACITY
        await follow_until(deaf, b"bytes dropped --\n")
