"""A reload in the middle of other things: memory that is lent, selectors that count, a model that leaves its port."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from contextlib import AsyncExitStack
from functools import partial

import attrs
import pytest
import trio
from children import alive, free_port, model_argv
from commands import daemon as command
from daemons import Client, Scripted, connect, document, eventually, fetch, is_running, running, scripted
from test_reload import FREE, Reloading, reloading, renamed, some, streaming

GIB = 2**30


def memory(size: str) -> dict[str, object]:
    """So much, whatever this machine has; nothing is measured."""
    return {"headroom": 0, "learn": False, "devices": {"ram": size}}


async def borrow(client: Client, size: str, label: str) -> None:
    await client.ask("POST", "/api/hold", json.dumps({"memory": size, "label": label}).encode())


async def queue(daemon: Reloading) -> dict:
    return (await fetch(daemon.port, "GET", "/api/queue")).json()


async def lent(daemon: Reloading) -> dict[str, dict[str, int]]:
    return {row["label"]: row["holding"] for row in (await queue(daemon))["lent"]}


async def waits(daemon: Reloading, name: str) -> bool:
    return any(row["model"] == name for row in (await queue(daemon))["waiting"])


async def plan(daemon: Reloading, model: str) -> dict:
    return (await fetch(daemon.port, "GET", f"/api/plan/{model}")).json()


# ---- memory that is lent ---------------------------------------------------------------------------


async def test_lent_memory_stays_lent(tmp_path):
    """It counts after a reload as before it, also where models come, change and go, and is given back as always."""
    models = {"a": scripted(memory="4GiB"), "b": scripted(memory="4GiB")}
    async with reloading(tmp_path, models, memory=memory("8GiB")) as daemon:
        async with await connect(daemon.port) as holder:
            await borrow(holder, "3GiB", "training")
            await holder.piece_of_body()
            pid = await daemon.pid("a")
            now = {"a": models["a"], "b": renamed(models["b"]), "c": scripted(memory="2GiB")}
            await daemon.reload(now, memory=memory("8GiB"))
            assert await lent(daemon) == {"training": {"ram": 3 * GIB}}
            assert await daemon.pid("a") == pid
            assert (await plan(daemon, "c"))["why"] == "it needs 2 GiB on ram (1 GiB of 8 GiB free)"
            assert (await daemon.ask("c")).status == 200
            assert set(await running(daemon.port)) == {"c"}
            await daemon.reload({"c": now["c"]}, memory=memory("8GiB"))
            assert await lent(daemon) == {"training": {"ram": 3 * GIB}}
        await eventually(partial(nothing_is_lent, daemon))
        await daemon.reload({**now, "d": scripted(memory="8GiB")}, memory=memory("8GiB"))
        assert (await daemon.ask("d")).status == 200


async def nothing_is_lent(daemon: Reloading) -> bool:
    return not await lent(daemon)


@pytest.mark.parametrize("rules", [{}, {"groups": {"g": {"swap": False, "members": ["a"]}}}])
async def test_who_waits_for_memory_goes_on_waiting(tmp_path, rules):
    """A reload does not know of it, and so must not forget what it wants."""
    model = scripted(memory="4GiB")
    async with (
        reloading(tmp_path, {"a": model}, memory=memory("6GiB"), **rules) as daemon,
        await connect(daemon.port) as holder,
    ):
        async with streaming(daemon.port, "a"):
            await borrow(holder, "3GiB", "training")
            await eventually(partial(waits, daemon, "training"))
            await daemon.reload({"a": model, "b": scripted(memory="1GiB")}, memory=memory("6GiB"))
            assert await waits(daemon, "training")
            assert (await daemon.ask("b")).status == 200
        assert json.loads(await holder.piece_of_body())["holding"] == {"ram": 3 * GIB}
        assert set(await running(daemon.port)) <= {"b"}


async def test_less_memory_than_is_lent(tmp_path):
    """Nothing starts beside it, who asks is told who has it, and what it was is there when it is given back."""
    model = scripted(memory="2GiB")
    async with reloading(tmp_path, {"a": model}, memory=memory("8GiB")) as daemon:
        async with await connect(daemon.port) as holder:
            await borrow(holder, "5GiB", "training")
            await holder.piece_of_body()
            assert (await daemon.reload({"a": model}, memory=memory("4GiB")))["settings"] == ["memory.devices"]
            assert await lent(daemon) == {"training": {"ram": 5 * GIB}}
            answer = await daemon.ask("a")
            assert answer.status == 503
            assert "the memory it needs is held by training" in answer.text
        await eventually(partial(nothing_is_lent, daemon))
        assert (await daemon.ask("a")).status == 200


async def test_a_model_with_the_name_of_a_borrower(tmp_path):
    """Nobody could tell them apart, so it is a mistake for as long as the other has the memory."""
    models = {"a": scripted(memory="1GiB")}
    more = {**models, "training": scripted(memory="1GiB")}
    async with reloading(tmp_path, models, memory=memory("8GiB")) as daemon:
        async with await connect(daemon.port) as holder:
            await borrow(holder, "5GiB", "training")
            await holder.piece_of_body()
            daemon.write(more, memory=memory("8GiB"))
            answer = await fetch(daemon.port, "POST", "/api/reload")
            assert answer.status == 422
            [mistake] = answer.json()["error"]["mistakes"]
            assert mistake.startswith("models.training: ")
            assert await daemon.listed() == ["a"]
            assert await lent(daemon) == {"training": {"ram": 5 * GIB}}
            assert (await daemon.ask("a")).status == 200
        await eventually(partial(nothing_is_lent, daemon))
        assert (await daemon.reload(more, memory=memory("8GiB")))["added"] == ["training"]
        assert (await daemon.ask("training")).status == 200


async def test_what_runs_is_measured_as_soon_as_somebody_wants_to_know(tmp_path):
    """Not only what is started from then on."""
    models = {"a": scripted("--allocate", 2**26, memory="1MiB")}

    async def held() -> int:
        return (await running(daemon.port))["a"]["memory"]["ram"]

    async def measured() -> bool:
        return await held() > 2**26

    async with reloading(tmp_path, models, memory=memory("8GiB")) as daemon:
        pid = await daemon.pid("a")
        assert await held() == 2**20
        said = await daemon.reload(models, memory={**memory("8GiB"), "learn": True})
        assert said["settings"] == ["memory.learn"]
        await eventually(measured)
        assert await daemon.pid("a") == pid


# ---- how lines of the log begin -----------------------------------------------------------------------


async def test_the_time_in_the_log_is_told_otherwise_at_once(tmp_path):
    """From the line that says so on."""
    file, models = tmp_path / "trioswap.toml", {"a": scripted()}
    settings = {"state_dir": str(tmp_path / "state")}
    file.write_text(document(models, **settings))
    async with command("serve", "-c", str(file)) as daemon:
        file.write_text(document(models, **settings, log_time_format="kitchen"))
        answer = await fetch(daemon.port, "POST", "/api/reload")
        assert answer.json()["settings"] == ["log_time_format"]
        file.write_text(document(models, **settings))
        assert (await fetch(daemon.port, "POST", "/api/reload")).json()["settings"] == ["log_time_format"]
        lines = (await fetch(daemon.port, "GET", "/logs/stream/proxy?no-follow")).text.splitlines()
    [first, second] = [line for line in lines if "reloaded: settings" in line]
    assert re.match(r"\d\d?:\d\d[AP]M INFO reloading: ", first)
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ INFO reloading: ", second)


# ---- what selectors have sent ----------------------------------------------------------------------


def selector(*targets: str) -> dict[str, object]:
    return {
        "groups": FREE,
        "selectors": {"pick": {"strategy": "spillover", "targets": list(targets), "settings": {"spillover": 1}}},
    }


async def test_a_reload_does_not_forget_who_is_busy(tmp_path):
    """Requests that were sent before it count where they are, also when their model is called otherwise by then."""
    models = {"a": scripted(aliases=["nick"]), "b": scripted()}
    async with reloading(tmp_path, models, **selector("nick", "b")) as daemon, AsyncExitStack() as stack:

        async def send() -> None:
            await stack.enter_async_context(streaming(daemon.port, "pick"))

        async def serving() -> dict[str, object]:
            return {name: row["serving"] for name, row in (await running(daemon.port)).items()}

        for _ in range(3):
            await send()
        assert await serving() == {"a": 2, "b": 1}
        await daemon.ask("pick")  # so that it is the turn of a where both are as busy
        await daemon.reload(models, **selector("nick", "b"), heartbeat=7)
        await send()
        assert await serving() == {"a": 2, "b": 2}
        await daemon.ask("pick")
        await send()
        assert await serving() == {"a": 3, "b": 2}
        await daemon.reload(models, **selector("a", "b"))
        await send()
        assert await serving() == {"a": 3, "b": 3}
        await stack.aclose()
        await eventually(partial(is_running, daemon.port, "a", serving=0))
        await eventually(partial(is_running, daemon.port, "b", serving=0))
        for _ in range(2):
            await send()
        assert await serving() == {"a": 1, "b": 1}


async def test_a_reload_does_not_send_all_to_the_first(tmp_path):
    """Whose turn it is, is remembered, however often somebody reloads."""
    models = {name: scripted() for name in "ab"}
    async with reloading(tmp_path, models, **selector("a", "b")) as daemon:
        names = {await daemon.pid(name): name for name in "ab"}
        chosen = Counter[str]()
        for number in range(6):
            await daemon.reload(models, **selector("a", "b"), heartbeat=6 + number)
            chosen[names[await daemon.pid("pick")]] += 1
    assert chosen == {"a": 3, "b": 3}


# ---- rules that change while a model leaves ----------------------------------------------------------

# The same in two languages: a and b exclude each other or not; c may live beside either.
LONE = {"h": {"exclusive": False, "members": ["c"]}}
RULES = {
    "groups, apart": {"groups": {"g": {"exclusive": False, "members": ["a", "b"]}, **LONE}},
    "groups, together": {"groups": {"g": {"exclusive": False, "swap": False, "members": ["a", "b"]}, **LONE}},
    "matrix, apart": {"matrix": {"sets": {"s": "(a | b) & c"}}},
    "matrix, together": {"matrix": {"sets": {"s": "a & b & c"}}},
}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("groups, apart", "matrix, apart"),
        ("groups, apart", "matrix, together"),
        ("groups, together", "matrix, apart"),
        ("matrix, apart", "groups, apart"),
        ("matrix, apart", "groups, together"),
        ("matrix, together", "groups, apart"),
    ],
)
async def test_other_rules_while_a_model_leaves(tmp_path, before, after):
    """Who may not live beside it by the old rules or by the new ones waits until it is gone; others need not."""
    models = {name: scripted() for name in "abc"}
    async with reloading(tmp_path, models, **RULES[before]) as daemon:
        old = await daemon.pid("a")
        async with streaming(daemon.port, "a", chunks=10**6) as client, trio.open_nursery() as nursery:
            assert (await daemon.reload({**models, "a": renamed(models["a"])}, **RULES[after]))["restarted"]
            answers = []

            async def ask(name: str) -> None:
                answers.append((await daemon.ask(name), alive(old)))

            nursery.start_soon(ask, "b")
            await eventually(partial(is_running, daemon.port, "b", waiting=1))
            assert (await daemon.ask("c")).status == 200
            assert alive(old)
            assert not answers
            await client.stream.aclose()
            await eventually(partial(some, answers))
        assert [(answer.status, still) for answer, still in answers] == [(200, False)]
        assert await daemon.pid("a") != old
        assert set(await running(daemon.port)) == {*("abc" if "together" in after else "ac")}


async def test_a_removed_model_is_in_the_way_of_a_matrix(tmp_path):
    """A matrix cannot say who may live beside a model that it does not know: nobody, until that one is gone."""
    models = {name: scripted() for name in "abc"}
    rest = {name: models[name] for name in "bc"}
    async with reloading(tmp_path, models, groups={**FREE, "c": {"members": ["c"], "exclusive": False}}) as daemon:
        old = await daemon.pid("a")
        async with streaming(daemon.port, "a", chunks=10**6) as client, trio.open_nursery() as nursery:
            new = scripted()
            together = {"matrix": {"sets": {"t": "b & c & new"}}}
            assert (await daemon.reload({**rest, "new": new}, **together))["removed"] == ["a"]
            assert (await daemon.ask("b")).status == 200, "it might live beside it before"
            assert alive(old)
            answers = []

            async def ask() -> None:
                answers.append((await daemon.ask("new"), alive(old)))

            nursery.start_soon(ask)
            await eventually(partial(is_running, daemon.port, "new", waiting=1))
            await client.stream.aclose()
            await eventually(partial(some, answers))
        assert [(answer.status, still) for answer, still in answers] == [(200, False)]
        assert set(await running(daemon.port)) == {"b", "new"}


# ---- the port of a model that leaves -----------------------------------------------------------------


def side_by_side(names: Iterable[str]) -> dict[str, object]:
    """All of them may be resident at once."""
    return {"groups": {"g": {"swap": False, "members": [*names]}}}


@pytest.mark.parametrize("way", ["renamed", "exchanged"])
async def test_who_is_to_listen_where_one_leaves_waits_for_it(tmp_path, way):
    """Its server cannot have the port before; that the two may live beside each other does not help."""
    models = {"a": scripted(), "b": scripted()}
    a, b = models["a"], models["b"]
    newer = {
        "renamed": {"c": a, "b": b},
        "exchanged": {"a": attrs.evolve(a, port=b.port), "b": attrs.evolve(b, port=a.port)},
    }[way]
    new = "c" if way == "renamed" else "b"
    async with reloading(tmp_path, models, **side_by_side(models)) as daemon:
        old = await daemon.pid("a")
        async with streaming(daemon.port, "a", chunks=10**6) as client, trio.open_nursery() as nursery:
            await daemon.reload(newer, **side_by_side(newer))
            answers = []

            async def ask() -> None:
                answers.append((await daemon.ask(new), alive(old)))

            nursery.start_soon(ask)
            await eventually(partial(is_running, daemon.port, new, waiting=1))
            await client.stream.aclose()
            await eventually(partial(some, answers))
        assert [(answer.status, still) for answer, still in answers] == [(200, False)]
        assert (await daemon.ask("a" if way == "exchanged" else "b")).status == 200


class Given(Scripted):
    """One that listens where trioswap says."""

    def table(self, name: str) -> dict[str, object]:
        """The table [models.NAME]."""
        return {"cmd": list(model_argv(name, *self.flags, port="${PORT}")), **self.settings}


async def test_however_often_somebody_reloads_a_port_in_use_is_not_given_away(tmp_path):
    """A removed model listens at the one that it was given until it has ended; a new one gets another, and serves."""
    first = free_port()
    while (second := free_port()) != first + 1:
        first = second
    settings = {"start_port": first}
    a, b = (Given((), 0, {}) for _ in range(2))
    c = scripted()
    async with reloading(tmp_path, {"a": a, "c": c}, **side_by_side("ac"), **settings) as daemon:
        old = await daemon.pid("a")
        async with streaming(daemon.port, "a", chunks=10**6):
            await daemon.reload({"c": c}, **side_by_side("c"), **settings)
            await daemon.reload({"b": b, "c": c}, **side_by_side("bc"), **settings)
            assert (await daemon.ask("b")).status == 200
            assert alive(old)


# ---- what was learned --------------------------------------------------------------------------------


async def test_what_was_learned_is_kept_for_no_other_command_line(tmp_path):
    """It is not written down as what was learned of the one that has taken its place, and has never run."""
    a = scripted()
    async with reloading(tmp_path, {"a": a}) as daemon:
        await daemon.pid("a")
        assert (await daemon.reload({"a": renamed(a)}))["restarted"]
        await eventually(partial(none_run, daemon))
    assert not (tmp_path / "state" / "learned.json").exists()


async def none_run(daemon: Reloading) -> bool:
    return not await running(daemon.port)
