"""The truth while you wait: who waits for what, and what a request would meet; looking changes nothing."""

from __future__ import annotations

import math
import re
import time
from functools import partial

import jsonschema
import trio
from daemons import at_once, chat, connect, daemon, eventually, fetch, is_running, running, scripted

from trioswap.openapi.schemas import SCHEMAS

CHAT = "/v1/chat/completions"
GIB = 2**30
# Eight of memory, whatever this machine has; nothing is measured.
MEMORY = {"headroom": 0, "learn": False, "devices": {"ram": "8GiB"}}
BUSY = {"stream": True, "chunks": 10**6, "chunk_delay": 0.01}


async def queue(port: int) -> dict:
    return (await fetch(port, "GET", "/api/queue")).json()


async def plan(port: int, model: str) -> dict:
    """What /api/plan says, which must be what its schema does."""
    answer = await fetch(port, "GET", f"/api/plan/{model}")
    assert answer.status == 200
    jsonschema.validate(answer.json(), {"$ref": "#/components/schemas/Plan", "components": {"schemas": SCHEMAS}})
    return answer.json()


async def keep_busy(client, model: str) -> None:
    """A stream that goes on until *client* closes."""
    await client.ask("POST", CHAT, chat(model, **BUSY))
    await client.head()


# ---- who waits ---------------------------------------------------------------------------------


async def test_every_waiting_request_can_be_asked_for():
    """Its place, what is in its way, and when it will be served, under the id that its answer carries."""
    models = {"a": scripted(), "b": scripted(weight=2.0, parallel=1)}
    async with (
        daemon(models) as served,
        await connect(served.port) as busy,
        await connect(served.port) as first,
        await connect(served.port) as second,
    ):
        assert (await queue(served.port))["waiting"] == []
        await keep_busy(busy, "a")
        await first.ask("POST", CHAT, chat("b"))
        await eventually(partial(is_running, served.port, "b", waiting=1))
        await second.ask("POST", CHAT, chat("b"))
        await eventually(partial(is_running, served.port, "b", waiting=2))

        rows = (await queue(served.port))["waiting"]
        assert [(row["model"], row["weight"], row["place"]) for row in rows] == [("b", 2.0, 1), ("b", 2.0, 2)]
        for row in rows:
            assert row.keys() == {
                "request", "model", "weight", "waited", "place", "stage", "waits_for", "estimate",
            }  # fmt: skip
            assert (row["stage"], row["waits_for"]) == ("queued", ["a"])
            assert 0 <= row["waited"] < row["estimate"]
        assert rows[0]["waited"] >= rows[1]["waited"]
        assert rows[0]["estimate"] < rows[1]["estimate"], "one at a time"

        later = (await fetch(served.port, "GET", f"/api/queue/{rows[0]['request']}")).json()
        assert later["waited"] >= rows[0]["waited"]
        assert {**later, "waited": 0, "estimate": 0} == {**rows[0], "waited": 0, "estimate": 0}

        await busy.stream.aclose()
        answers = [await first.answer(), await second.answer()]
        assert [answer["x-request-id"] for answer in answers] == [row["request"] for row in rows]
        assert (await queue(served.port))["waiting"] == []
        over = await fetch(served.port, "GET", f"/api/queue/{rows[0]['request']}")
        assert over.status == 404
        assert f'request "{rows[0]["request"]}" does not wait' in over.json()["error"]["message"]


async def test_who_left_waits_no_more():
    """A client that has gone is not in the line, and neither is who never was."""
    async with daemon({"a": scripted("--never-ready")}) as served:
        async with await connect(served.port) as client:
            await client.ask("POST", CHAT, chat("a"))
            await eventually(partial(is_running, served.port, "a", waiting=1))
            [row] = (await queue(served.port))["waiting"]
            assert (row["stage"], row["place"], row["waits_for"]) == ("loading", 1, [])
        await eventually(partial(is_running, served.port, "a", waiting=0))
        assert (await fetch(served.port, "GET", f"/api/queue/{row['request']}")).status == 404
        nobody = await fetch(served.port, "GET", "/api/queue/" + "x" * 5000)
        assert nobody.status == 404
        assert len(nobody.body) < 1000, "what a client sends is not repeated without bound"
        assert (await fetch(served.port, "POST", "/api/models/unload")).status == 200


async def test_a_load_by_hand_waits_like_any_request():
    """With an id of its own."""
    async with daemon({"a": scripted("--never-ready")}) as served, await connect(served.port) as client:
        await client.ask("POST", "/api/models/load/a")
        await eventually(partial(is_running, served.port, "a", waiting=1))
        [row] = (await queue(served.port))["waiting"]
        assert row["request"].startswith("req_")
        assert (await fetch(served.port, "POST", "/api/models/unload")).status == 200
        assert (await client.answer())["x-request-id"] == row["request"]


async def test_the_last_decisions_are_told_with_their_reasons():
    """Oldest first: what was decided about which model, when, and why."""
    begun = time.time()
    async with daemon({"a": scripted(), "b": scripted()}) as served:
        for model in "ab":
            assert (await fetch(served.port, "POST", f"/api/models/load/{model}")).status == 200
        decisions = (await queue(served.port))["decisions"]
    assert [(entry["what"], entry["model"]) for entry in decisions] == [("start", "a"), ("evict", "a"), ("start", "b")]
    assert decisions[1]["why"].startswith("evicted a: idle ")
    assert "; for b, waited " in decisions[1]["why"]
    times = [entry["at"] for entry in decisions]
    assert begun - 1 <= times[0] <= times[1] <= times[2] <= time.time() + 1


async def test_models_that_never_collide_have_schedulers_of_their_own():
    """A daemon with several domains starts, and its line is that of all of them."""
    groups = {name: {"members": [name], "exclusive": False} for name in "ab"}
    models = {name: scripted("--never-ready") for name in "ab"}
    async with daemon(models, groups=groups) as served, trio.open_nursery() as nursery:
        for name in "ab":
            nursery.start_soon(fetch, served.port, "POST", CHAT, chat(name))
            await eventually(partial(is_running, served.port, name, waiting=1))
        assert [row["model"] for row in (await queue(served.port))["waiting"]] == ["a", "b"]
        assert (await fetch(served.port, "POST", "/api/models/unload")).status == 200


# ---- what a request would meet ------------------------------------------------------------------


async def test_a_plan_tells_who_would_go_and_comes_true():
    """What the model needs, who goes for it and when; then it is asked for, and that is what happens."""
    models = {"a": scripted(memory="3GiB"), "b": scripted(memory="4GiB"), "big": scripted(memory="5GiB")}
    async with daemon(models, memory=MEMORY) as served:
        told = await plan(served.port, "big")
        assert told == {
            "model": "big", "state": "stopped",
            "need": {"source": "declared", "holdings": [{"ram": 5 * GIB}], "note": ""},
            "fits": True, "evicts": [], "why": "there is room for it", "estimate": told["estimate"],
            "failure": None, "retry_in": 0.0,
        }  # fmt: skip
        assert told["estimate"] > 0
        for model in "ab":
            await fetch(served.port, "POST", f"/api/models/load/{model}")
        told = await plan(served.port, "big")
        assert not told["fits"]
        assert told["why"] == "it needs 5 GiB on ram (1 GiB of 8 GiB free)"
        [victim] = told["evicts"]
        assert victim == {
            "model": victim["model"], "state": "ready", "serving": 0, "idle": victim["idle"],
            "reload": victim["reload"], "when": 0.0,
        }  # fmt: skip
        assert victim["idle"] > 0
        assert victim["reload"] > 0
        assert (await fetch(served.port, "POST", CHAT, chat("big"))).status == 200
        evicted = [entry["model"] for entry in (await queue(served.port))["decisions"] if entry["what"] == "evict"]
        assert evicted == [victim["model"]]


async def test_a_plan_tells_of_what_has_just_failed():
    """The error, how long requests are refused, and that nobody goes for one: as the request itself finds out."""
    models = {"a": scripted(), "b": scripted("--exit-at-start", 7, backoff=500, backoff_max=500)}
    async with daemon(models) as served:
        assert (await fetch(served.port, "POST", CHAT, chat("b"))).status == 503
        assert (await fetch(served.port, "POST", CHAT, chat("a"))).status == 200
        told = await plan(served.port, "b")
        assert not told["fits"]
        assert told["evicts"] == []
        assert told["estimate"] is None
        assert told["failure"].startswith("exited with 7")
        assert 400 < told["retry_in"] <= 500
        assert re.fullmatch(r"it has just failed, and is not tried again for (500|4\d\d) s", told["why"])
        refused = await fetch(served.port, "POST", CHAT, chat("b"))
        assert refused.status == 503
        assert int(refused["retry-after"]) <= math.ceil(told["retry_in"])
        assert told["failure"] in refused.json()["error"]["message"]
        assert (await running(served.port))["a"]["state"] == "ready"


async def test_a_plan_tells_when_a_busy_model_can_be_made_to_go():
    """Not before max_wait has passed; an idle one goes now, and nothing of that changes because it is asked."""
    models = {"a": scripted(memory="6GiB"), "b": scripted(memory="4GiB", max_wait=50, load_cost=3)}
    async with daemon(models, memory=MEMORY) as served, await connect(served.port) as busy:
        await keep_busy(busy, "a")
        told = await plan(served.port, "b")
        [victim] = told["evicts"]
        assert (victim["model"], victim["state"], victim["serving"], victim["idle"]) == ("a", "ready", 1, 0.0)
        assert victim["when"] >= 50
        assert told["estimate"] >= victim["when"] + 3
        assert await plan(served.port, "a") == {
            "model": "a", "state": "ready",
            "need": {"source": "declared", "holdings": [{"ram": 6 * GIB}], "note": ""},
            "fits": True, "evicts": [], "why": "it is resident", "estimate": 0.0, "failure": None, "retry_in": 0.0,
        }  # fmt: skip
        assert (await running(served.port)).keys() == {"a"}
        await busy.stream.aclose()
        await eventually(partial(is_running, served.port, "a", serving=0))
        [victim] = (await plan(served.port, "b"))["evicts"]
        assert (victim["serving"], victim["when"]) == (0, 0.0)


async def test_a_plan_where_memory_plays_no_part():
    """There is no need to tell; the rule is named, by alias and through a slash in the name, too."""
    models = {"a": scripted(), "org/b": scripted(aliases=["nick"])}
    async with daemon(models) as served:
        await fetch(served.port, "POST", "/api/models/load/a")
        told = [await plan(served.port, name) for name in ("org/b", "org%2Fb", "nick")]
        assert [(found["model"], found["need"], found["fits"]) for found in told] == [("org/b", None, False)] * 3
        assert told[0]["why"] == "the group of models in no group has one model resident at a time, so a must go"
        assert [victim["model"] for victim in told[0]["evicts"]] == ["a"]
        unknown = await fetch(served.port, "GET", "/api/plan/nik")
        assert unknown.status == 404
        assert "is not configured" in unknown.json()["error"]["message"]


async def test_what_is_reserved_is_told():
    """Bytes of each device in /running, where memory plays a part, from the start of the load on."""
    models = {"a": scripted("--never-ready", memory="3GiB"), "b": scripted(memory="6GiB")}
    async with daemon(models, memory=MEMORY) as served, trio.open_nursery() as nursery:
        nursery.start_soon(fetch, served.port, "POST", CHAT, chat("a"))
        await eventually(partial(is_running, served.port, "a", state="starting"))
        nursery.start_soon(fetch, served.port, "POST", CHAT, chat("b"))
        await eventually(partial(is_running, served.port, "b", waiting=1))
        rows = await running(served.port)
        assert (rows["a"]["memory"], rows["b"]["memory"]) == ({"ram": 3 * GIB}, {})
        assert (await fetch(served.port, "POST", "/api/models/unload")).status == 200
    async with daemon({"a": scripted()}) as served:
        await fetch(served.port, "POST", "/api/models/load/a")
        assert "memory" not in (await running(served.port))["a"]


async def test_looking_loads_nothing_and_is_no_use():
    """The GETs start no model, and who is idle stays so: its idle time goes on, and its ttl runs out (I12)."""
    models = {"a": scripted(memory="6GiB", ttl=0.5), "b": scripted(memory="6GiB")}
    async with daemon(models, memory=MEMORY) as served:

        async def look() -> list:
            return await at_once(
                partial(fetch, served.port, method, path)
                for path in ("/api/queue", "/api/queue/req_x", "/api/plan/a", "/api/plan/b")
                for method in ("GET", "HEAD")
            )

        assert [answer.status for answer in await look()] == [200, 200, 404, 404, 200, 200, 200, 200]
        assert await running(served.port) == {}
        await fetch(served.port, "POST", "/api/models/load/a")
        idle = []
        with trio.fail_after(60):
            while victims := (await plan(served.port, "b"))["evicts"]:
                idle += [victim["idle"] for victim in victims if victim["state"] == "ready"]
                await look()
        assert idle == sorted(idle), "no look ends its idleness"
        decisions = (await queue(served.port))["decisions"]
        assert [(entry["what"], entry["model"]) for entry in decisions] == [("start", "a"), ("stop", "a")]
