"""Another configuration for a daemon that runs: nobody who is served, or waits, is hurt by it."""

from __future__ import annotations

import json
import logging
import signal
import ssl
import threading
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import attrs
import httpx  # noqa: TID251 - a client that speaks TLS
import pytest
import trio
import trustme
from children import PATIENCE, alive
from commands import daemon as command
from daemons import (
    Scripted,
    at_once,
    by_hand,
    chat,
    connect,
    document,
    eventually,
    fetch,
    is_running,
    running,
    scripted,
    speakers,
)
from test_proxy import asked

from trioswap.cli.serving import Source
from trioswap.daemon import serve
from trioswap.errors import ShuttingDown
from trioswap.logs import Logs

# Each in a domain, and so in a swap group, of its own.
FREE = {name: {"members": [name], "exclusive": False} for name in "ab"}


@attrs.define(eq=False)
class Reloading:
    """A daemon in the test whose configuration file can be written anew."""

    file: Path
    port: int
    state: str
    stopping: bool = False

    def stop(self) -> None:
        self.stopping = True
        signal.raise_signal(signal.SIGTERM)

    def write(self, models: Mapping[str, Scripted], **settings: object) -> None:
        self.file.write_text(text_of(models, state_dir=self.state, **settings))

    async def reload(self, models: Mapping[str, Scripted], **settings: object):
        """Take over another configuration; what has changed."""
        self.write(models, **settings)
        answer = await fetch(self.port, "POST", "/api/reload")
        assert answer.status == 200, answer.text
        return answer.json()

    async def ask(self, model: str, **script: object):
        return await fetch(self.port, "POST", "/v1/chat/completions", chat(model, **script))

    async def pid(self, model: str) -> int:
        return await pid_of(self.port, model)

    async def listed(self) -> list[str]:
        return [row["id"] for row in (await fetch(self.port, "GET", "/v1/models")).json()["data"]]


def text_of(models: Mapping[str, Scripted], **settings: object) -> str:
    """The configuration; without the table of groups that others start with where a matrix stands for it."""
    text = document(models, **settings)
    return text.replace("[groups]\n", "") if "matrix" in settings else text


@asynccontextmanager
async def reloading(
    path: Path, models: Mapping[str, Scripted], through=lambda reread, keep: reread(keep), **settings: object
) -> AsyncIterator[Reloading]:
    """Run it while the block runs; then it gets SIGTERM and must end by itself.  It reads again *through* that."""
    file, state = path / "trioswap.toml", str(path / "state")
    file.write_text(text_of(models, state_dir=state, **settings))
    source, logs = Source((str(file),)), Logs()
    config = source.read()
    with trio.fail_after(3 * PATIENCE):
        async with trio.open_nursery() as nursery:
            [url] = await nursery.start(serve, config, logs, partial(through, source.reread))
            daemon = Reloading(file, int(url.rpartition(":")[2]), state)
            yield daemon
            if not daemon.stopping:  # else it may be gone, and the signal would be ours
                daemon.stop()


@asynccontextmanager
async def streaming(port: int, model: str, chunks: int = 10_000, delay: float = 0.01):
    """A client that gets a stream, of which the first piece has come."""
    async with await connect(port) as client:
        await client.ask("POST", "/v1/chat/completions", chat(model, stream=True, chunks=chunks, chunk_delay=delay))
        await client.piece_of_body()
        yield client


async def some(answers: list[object]) -> bool:
    """Whether there are any."""
    return bool(answers)


def changed(model: Scripted, **settings: object) -> Scripted:
    """The same at the same port, with other settings."""
    return attrs.evolve(model, settings={**model.settings, **settings})


def renamed(model: Scripted) -> Scripted:
    """Another server at the same port: it has another command line."""
    return attrs.evolve(model, flags=(*model.flags, "--chunks", 4))


# ---- what has not changed goes on -----------------------------------------------------------------


async def streams_survive(path: Path, reloads: int, clients: int) -> None:
    """*clients* stream from unchanged models through *reloads* reloads, each of which changes everything else."""
    models = {name: scripted() for name in "abcd"}
    together = {"groups": {"g": {"swap": False, "members": [*"abcd"]}}}
    async with reloading(path, models, **together) as daemon:
        pids = {name: await daemon.pid(name) for name in "ab"}
        async with trio.open_nursery() as nursery:
            done = trio.Event()
            finished = list[list[str]]()

            async def stream(model: str) -> None:
                while not done.is_set():
                    body = chat(model, stream=True, chunks=20, chunk_delay=0.01)
                    answer = await fetch(daemon.port, "POST", "/v1/chat/completions", body)
                    finished.append(speakers(answer.body))

            for number in range(clients):
                nursery.start_soon(stream, "ab"[number % 2])
            for number in range(reloads):
                others = {"c": renamed(models["c"])} if number % 2 else {"c": models["c"], "d": models["d"]}
                now = {"a": models["a"], "b": changed(models["b"], ttl=600 + number), **others}
                swap = number % 3 == 2
                groups = {"g": {"swap": False, "members": ["a", "b"]}, "h": {"exclusive": False, "members": [*others]}}
                await daemon.reload(now, groups=groups if swap else {"g": {"swap": False, "members": [*now]}})
                if number % 4 == 0:
                    assert (await daemon.ask("c")).status == 200
            done.set()
        assert finished
        assert all(said in ([name] * 20 + ["[DONE]"] for name in "ab") for said in finished)
        assert {name: await daemon.pid(name) for name in "ab"} == pids


async def test_unchanged_models_keep_their_servers_and_their_streams(tmp_path):
    """Whatever else changes around them: limits, groups, other models and their commands."""
    await streams_survive(tmp_path, reloads=20, clients=8)


@pytest.mark.reloads
async def test_two_hundred_reloads_under_sixteen_streams(tmp_path):
    """The same for longer."""
    await streams_survive(tmp_path, reloads=200, clients=16)


async def test_nothing_changed(tmp_path):
    """Says so, and does nothing."""
    models = {"a": scripted()}
    async with reloading(tmp_path, models) as daemon:
        pid = await daemon.pid("a")
        assert not any((await daemon.reload(models)).values())
        assert await daemon.pid("a") == pid


# ---- what has changed ------------------------------------------------------------------------------


async def test_another_command_drains_and_restarts(tmp_path):
    """What streams finishes, who comes meanwhile waits, and is served by the new server."""
    models = {"a": scripted()}
    async with reloading(tmp_path, models) as daemon:
        old = await daemon.pid("a")
        async with streaming(daemon.port, "a", chunks=100, delay=0.005) as client:
            assert (await daemon.reload({"a": renamed(models["a"])}))["restarted"] == {"a": ["cmd"]}
            answers = []

            async def wait() -> None:
                answers.append((await daemon.ask("a")).json()["pid"])

            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait)
                assert speakers(await client.rest())[-1] == "[DONE]"
        assert answers != [old]
        assert await daemon.pid("a") == answers[0]
        assert not alive(old)


async def test_a_model_that_nobody_uses_is_replaced_at_once(tmp_path):
    """And not started again before somebody asks for it."""
    models = {"a": scripted()}
    async with reloading(tmp_path, models) as daemon:
        old = await daemon.pid("a")
        await daemon.reload({"a": renamed(models["a"])})

        async def gone() -> bool:
            return not await running(daemon.port)

        await eventually(gone)
        assert not alive(old)
        assert await daemon.pid("a") != old


async def test_who_waits_for_a_removed_model_is_told(tmp_path, caplog):
    """What streams finishes, then the process goes and all memory of it; the model is listed no more."""
    caplog.set_level(logging.INFO, "trioswap")
    models = {"a": scripted(parallel=1), "b": scripted()}
    async with reloading(tmp_path, models) as daemon:
        old = await daemon.pid("a")
        async with streaming(daemon.port, "a", chunks=100, delay=0.005) as client:
            answers = []

            async def wait() -> None:
                answers.append(await daemon.ask("a"))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait)
                await eventually(partial(is_running, daemon.port, "a", waiting=1))
                assert (await daemon.reload({"b": models["b"]}))["removed"] == ["a"]
            [answer] = answers
            assert answer.status == 404
            assert "was removed from the configuration while this request waited" in answer.text
            assert await daemon.listed() == ["b"]
            assert (await daemon.ask("a")).status == 404
            assert alive(old)
            assert speakers(await client.rest())[-1] == "[DONE]"

        async def gone() -> bool:
            return "removed model=a" in caplog.text

        await eventually(gone)
        assert not alive(old)
        assert (await daemon.ask("b")).status == 200


@pytest.mark.parametrize("begun", [False, True])
async def test_who_waits_goes_on_with_whom_its_name_means_by_then(tmp_path, begun):
    """As that one is to be asked, also if the stream has begun with words of ours; it counts once, and there."""
    never = scripted("--ready-once", str(tmp_path / "never"))
    fresh = scripted(aliases=["a"], use_model_name="cc", filters={"set_params": {"top_k": 7}}, concurrency_limit=1)
    async with (
        reloading(tmp_path, {"a": never, "b": scripted()}, heartbeat=0.05) as daemon,
        await connect(daemon.port) as client,
    ):
        await client.ask("POST", "/v1/chat/completions", chat("a", stream=begun))
        if begun:
            assert (await client.piece_of_body()).startswith(b":")
        await eventually(partial(is_running, daemon.port, "a", state="starting", waiting=1))
        assert (await daemon.reload({"c": fresh}, heartbeat=0.05))["removed"] == ["a", "b"]
        if begun:
            lines = [line for line in (await client.rest()).splitlines() if line.startswith(b"data: ")]
            assert b'"model":"c"' in lines[0].replace(b" ", b"")
            assert lines[-1] == b"data: [DONE]"
        else:
            answer = await client.answer()
            assert answer.status == 200
            assert {**answer.json()["echo"], "script": {}} == {"model": "cc", "stream": False, "script": {}, "top_k": 7}
        assert (await daemon.ask("a")).status == 200
        assert await daemon.listed() == ["c"]


async def test_who_waits_goes_on_after_each_reload(tmp_path):
    """However often its model is called otherwise while it waits."""
    async with (
        reloading(tmp_path, {"a": scripted("--ready-once", str(tmp_path / "a"))}) as daemon,
        await connect(daemon.port) as client,
    ):
        await client.ask("POST", "/v1/chat/completions", chat("a"))
        await eventually(partial(is_running, daemon.port, "a", state="starting", waiting=1))
        for name in "bcd":
            await daemon.reload({name: scripted("--ready-once", str(tmp_path / name), aliases=["a"])})
            await eventually(partial(is_running, daemon.port, name, state="starting", waiting=1))
        await daemon.reload({"e": scripted(aliases=["a"])})
        assert (await client.answer()).status == 200


async def test_who_was_let_in_stays_in(tmp_path):
    """Whatever the limits of the model that it goes on with; they are for others."""
    never = scripted("--ready-once", str(tmp_path / "never"))
    few = scripted("--ready-once", str(tmp_path / "few"), aliases=["a"], concurrency_limit=1)
    async with reloading(tmp_path, {"a": never}) as daemon, trio.open_nursery() as nursery:
        answers = []

        async def ask() -> None:
            answers.append((await daemon.ask("a")).status)

        for _ in range(3):
            nursery.start_soon(ask)
        await eventually(partial(is_running, daemon.port, "a", state="starting", waiting=3))
        await daemon.reload({"b": few}, max_queue=1)
        await eventually(partial(is_running, daemon.port, "b", state="starting", waiting=3))
        assert (await daemon.ask("a")).status == 429
        await daemon.reload({"c": scripted(aliases=["a"])}, max_queue=1)
        with trio.fail_after(PATIENCE):
            while len(answers) < 3:  # noqa: ASYNC110 - nobody tells
                await trio.sleep(0.01)
    assert answers == [200] * 3


async def test_who_waits_for_a_page_of_comfyui_goes_on(tmp_path):
    """With whom that is by then."""
    never = scripted("--ready-once", str(tmp_path / "never"), aliases=["comfyui_auto"])
    async with reloading(tmp_path, {"a": never}) as daemon, await connect(daemon.port) as client:
        await client.ask("GET", "/comfyui/")
        await eventually(partial(is_running, daemon.port, "a", state="starting", waiting=1))
        await daemon.reload({"b": scripted(aliases=["comfyui_auto"])})
        assert (await client.answer()).text == "b /"


async def test_who_waits_is_told_as_whom_it_waits_for_by_then_says(tmp_path):
    """Here in the text of its answer how far it is."""
    never = scripted("--ready-once", str(tmp_path / "never"), send_loading_state=False)
    telling = scripted("--ready-once", str(tmp_path / "telling"), aliases=["a"], send_loading_state=True)
    async with reloading(tmp_path, {"a": never}, heartbeat=0.05) as daemon, await connect(daemon.port) as client:
        await client.ask("POST", "/v1/chat/completions", chat("a", stream=True))
        assert (await client.piece_of_body()).startswith(b":")
        await daemon.reload({"b": telling}, heartbeat=0.05)
        with trio.fail_after(PATIENCE):
            while b"Loading model b" not in await client.piece():
                pass
        (tmp_path / "telling").touch()
        assert (await client.rest()).strip().endswith(b"data: [DONE]")


async def test_who_goes_on_with_a_peer_is_told_of_the_end(tmp_path):
    """As all are whom that peer serves."""
    never = scripted("--ready-once", str(tmp_path / "never"))
    answers = []
    async with by_hand() as peer, trio.open_nursery() as nursery:
        peers = {"p": {"proxy": peer.table("p")["proxy"], "models": ["a"]}}
        async with reloading(tmp_path, {"a": never}) as daemon:

            async def ask() -> None:
                answers.append(await daemon.ask("a"))

            nursery.start_soon(ask)
            await eventually(partial(is_running, daemon.port, "a", state="starting", waiting=1))
            await daemon.reload({}, peers=peers)
            there = await asked(peer)
        await there.stream.aclose()
    assert [(answer.status, answer.json()["error"]["message"]) for answer in answers] == [(503, ShuttingDown().message)]


@pytest.mark.parametrize("allowed", [["a"], ["b"], None])
async def test_who_waits_goes_on_only_with_whom_it_may_use(tmp_path, allowed):
    """By the keys of the new configuration, where its own may be missing; else its model was removed."""
    root, key = ("x-api-key", "root"), ("x-api-key", "k")
    never = scripted("--ready-once", str(tmp_path / "never"))

    def keys(models: list[str] | None) -> dict[str, object]:
        mine = {} if models is None else {"mine": {"key": "k", "models": models}}
        return {"keys": {"root": {"key": "root", "admin": True}, **mine}}

    async with reloading(tmp_path, {"a": never}, **keys(["a"])) as daemon, await connect(daemon.port) as client:

        async def waits() -> bool:
            return bool((await fetch(daemon.port, "GET", "/api/queue", b"", root)).json()["waiting"])

        await client.ask("POST", "/v1/chat/completions", chat("a"), key)
        await eventually(waits)
        daemon.write({"b": scripted(), "c": scripted(aliases=["a"])}, **keys(allowed))
        assert (await fetch(daemon.port, "POST", "/api/reload", b"", root)).status == 200
        answer = await client.answer()
        if allowed == ["a"]:
            assert answer.status == 200
        else:
            assert answer.status == 404
            assert "was removed from the configuration while this request waited" in answer.text


async def test_a_removed_model_keeps_others_out_until_it_is_gone(tmp_path):
    """Its memory is still in use, whatever the new configuration calls the one that takes its place."""
    models = {"a": scripted()}
    async with reloading(tmp_path, models, groups={"g": {"members": ["a"]}}) as daemon:
        old = await daemon.pid("a")
        async with streaming(daemon.port, "a", chunks=100, delay=0.005) as client:
            b = scripted()
            await daemon.reload({"b": b}, groups={"g": {"members": ["b"]}})
            answers = []

            async def ask() -> None:
                answers.append((await daemon.ask("b"), alive(old)))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask)
                assert speakers(await client.rest())[-1] == "[DONE]"
        assert [(answer.status, still) for answer, still in answers] == [(200, False)]


async def test_a_model_that_comes_back_before_it_has_gone(tmp_path):
    """Is that of the new configuration: nothing is forgotten that is needed."""
    models = {"a": scripted(), "b": scripted()}
    async with reloading(tmp_path, models) as daemon:
        old = await daemon.pid("a")
        async with streaming(daemon.port, "a", chunks=100, delay=0.005) as client:
            await daemon.reload({"b": models["b"]})
            await daemon.reload(models)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.rest)
                assert await daemon.pid("a") != old


async def test_an_added_model_serves_at_once(tmp_path):
    """Beside one that streams, where they may live together."""
    models = {"a": scripted(), "b": scripted()}
    async with (
        reloading(tmp_path, {"a": models["a"]}, groups={"g": {"swap": False, "members": ["a"]}}) as daemon,
        streaming(daemon.port, "a"),
    ):
        assert (await daemon.reload(models, groups={"g": {"swap": False, "members": ["a", "b"]}}))["added"] == ["b"]
        assert (await daemon.ask("b")).status == 200
        assert await daemon.listed() == ["a", "b"]


async def test_what_is_looked_up_changes_at_once(tmp_path):
    """Aliases, limits, time to live and keys; the server goes on."""
    model = scripted()
    async with reloading(tmp_path, {"a": model}) as daemon:
        pid = await daemon.pid("a")
        await daemon.reload({"a": changed(model, aliases=["x"], concurrency_limit=0 + 1)})
        assert await daemon.pid("x") == pid
        async with streaming(daemon.port, "a"):
            assert (await daemon.ask("a")).status == 429
            await daemon.reload({"a": changed(model, aliases=["y"])})
            assert (await daemon.ask("a")).status == 200
        assert (await daemon.ask("x")).status == 404
        assert await daemon.pid("y") == pid

        await daemon.reload({"a": changed(model, ttl=0.01)})

        async def gone() -> bool:
            return not alive(pid)

        await eventually(gone)
        await daemon.reload({"a": model}, api_keys=["secret"])
        assert (await daemon.ask("a")).status == 401
        assert (await fetch(daemon.port, "GET", "/running", b"", ("x-api-key", "secret"))).status == 200


async def test_a_model_that_has_failed_may_be_tried_as_soon_as_it_is_said(tmp_path):
    """A shorter `backoff` counts for what has failed already, too."""
    failing = scripted("--exit-at-start", 7, backoff=1000, backoff_max=1000)
    async with reloading(tmp_path, {"a": failing}) as daemon:
        await daemon.ask("a")
        assert "is not tried again for" in (await daemon.ask("a")).text
        assert (await daemon.reload({"a": changed(failing, backoff=0)}))["updated"] == {"a": ["backoff"]}
        answer = await daemon.ask("a")
        assert answer.status == 503
        assert "exited with 7" in answer.text
        assert "is not tried again for" not in answer.text


def noting(path: Path, word: str) -> dict[str, list[str]]:
    """Hooks around the stop that write *word* and their names to a file."""
    return {name: ["sh", "-c", f"echo {word} {name} >> {path}"] for name in ("before_stop", "after_stop")}


@pytest.mark.parametrize("before", [True, False])
async def test_hooks_of_a_server_that_runs(tmp_path, before):
    """It is stopped with the new ones, whether it was started with others or with none."""
    model, said = scripted(), tmp_path / "said"
    async with reloading(tmp_path, {"a": changed(model, hooks=noting(said, "old")) if before else model}) as daemon:
        pid = await daemon.pid("a")
        new = changed(model, hooks=noting(said, "new"))
        assert (await daemon.reload({"a": new}))["updated"] == {"a": ["hooks"]}
        assert await daemon.pid("a") == pid
        await fetch(daemon.port, "POST", "/api/models/unload/a")
        assert said.read_text().splitlines() == ["new before_stop", "new after_stop"]

        await daemon.pid("a")
        await daemon.reload({"a": model})
        await fetch(daemon.port, "POST", "/api/models/unload/a")
        assert len(said.read_text().splitlines()) == 2


async def test_the_time_that_hooks_of_a_server_that_runs_have(tmp_path, caplog):
    """Theirs is the new `hook_timeout`, too."""
    model = scripted(hooks={"before_stop": ["sleep", "20"]}, hook_timeout=30)
    async with reloading(tmp_path, {"a": model}) as daemon:
        await daemon.pid("a")
        await daemon.reload({"a": changed(model, hook_timeout=0.1)})
        await fetch(daemon.port, "POST", "/api/models/unload/a")
        assert "hook before_stop did not end within 0.1 s (hook_timeout)" in caplog.text


# ---- what goes wrong -------------------------------------------------------------------------------


async def test_mistakes_change_nothing(tmp_path):
    """All of them are told, and what runs goes on."""
    models = {"a": scripted()}
    async with reloading(tmp_path, models) as daemon, streaming(daemon.port, "a") as client:
        pid = await daemon.pid("a")
        daemon.file.write_text("nothing = 1\nlisten = 2\n")
        answer = await fetch(daemon.port, "POST", "/api/reload")
        assert answer.status == 422
        assert len(answer.json()["error"]["mistakes"]) == 2
        assert await daemon.pid("a") == pid
        await client.piece()
        assert (await daemon.reload({**models, "b": scripted()}))["added"] == ["b"]


@pytest.mark.parametrize(
    ("address", "why"),
    [("http://192.168.1.256:8080", "four numbers from 0 to 255"), ("http://xn--:80", "is no address")],
)
async def test_a_peer_without_an_address_changes_nothing(tmp_path, address, why):
    """Not even what was to change beside it: what is removed in the same file stays, and serves."""
    models = {"a": scripted()}
    async with reloading(tmp_path, models) as daemon:
        pid = await daemon.pid("a")
        daemon.write({"b": scripted()}, peers={"p": {"proxy": address, "models": ["m"]}})
        answer = await fetch(daemon.port, "POST", "/api/reload")
        assert answer.status == 422
        assert why in answer.json()["error"]["mistakes"][0]
        assert await daemon.pid("a") == pid
        assert await daemon.listed() == ["a"]
        assert (await daemon.reload({"b": scripted()}))["removed"] == ["a"]


async def test_a_certificate_that_cannot_be_used_changes_nothing(tmp_path):
    """It is told each time, and clients go on to see the old one."""
    authority = trustme.CA()
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    for name in ("old", "new"):
        issued = authority.issue_cert("127.0.0.1")
        issued.private_key_pem.write_to_path(tmp_path / f"{name}.key")
        issued.cert_chain_pems[0].write_to_path(tmp_path / f"{name}.pem")

    def tls(certificate: str, key: str) -> dict[str, str]:
        return {"cert_file": str(tmp_path / f"{certificate}.pem"), "key_file": str(tmp_path / f"{key}.key")}

    async with reloading(tmp_path, {"a": scripted()}, tls=tls("old", "old")) as daemon:
        url = f"https://127.0.0.1:{daemon.port}"
        async with httpx.AsyncClient(base_url=url, verify=trusting, timeout=PATIENCE) as client:
            for models in ({"a": scripted()}, {"b": scripted()}):
                daemon.write(models, tls=tls("new", "old"))
                answer = await client.post("/api/reload")
                assert answer.status_code == 422
                assert "tls: " in answer.json()["error"]["mistakes"][0]
                assert [row["id"] for row in (await client.get("/v1/models")).json()["data"]] == ["a"]
            daemon.write({"b": scripted()}, tls=tls("new", "new"))
            answer = await client.post("/api/reload")
            assert answer.status_code == 200
            assert "tls" in answer.json()["settings"]
        expected = ssl.PEM_cert_to_DER_cert((tmp_path / "new.pem").read_text())
        shown = await trio.to_thread.run_sync(ssl.get_server_certificate, ("127.0.0.1", daemon.port))
        assert ssl.PEM_cert_to_DER_cert(shown) == expected


async def test_many_reloads_at_once(tmp_path):
    """The last one wins, and all are answered."""
    models = {"a": scripted()}
    async with reloading(tmp_path, models) as daemon:
        daemon.write({**models, "b": scripted()})
        ask = partial(fetch, daemon.port, "POST", "/api/reload")
        answers = await at_once([ask] * 8)
        assert {answer.status for answer in answers} == {200}
        assert await daemon.listed() == ["a", "b"]


async def test_a_reload_while_a_model_loads(tmp_path):
    """Who waits for it is served by the server that the new configuration speaks of."""
    once = tmp_path / "ready"
    slow = scripted("--ready-once", str(once))
    async with reloading(tmp_path, {"a": slow}) as daemon, trio.open_nursery() as nursery:
        answers = []

        async def ask() -> None:
            answers.append(await daemon.ask("a"))

        nursery.start_soon(ask)
        await eventually(partial(is_running, daemon.port, "a", state="starting"))
        await daemon.reload({"a": attrs.evolve(slow, flags=())})
        await eventually(partial(some, answers))
        assert answers[0].status == 200
        assert not once.exists()


async def test_a_reload_in_the_middle_of_a_swap(tmp_path):
    """The claim is kept, and its model starts as it is configured by now."""
    models, apart = {"a": scripted("--stop-delay", 0.3), "b": scripted()}, {"g": {"members": ["a", "b"]}}
    async with reloading(tmp_path, models, groups=apart) as daemon, trio.open_nursery() as nursery:
        await daemon.ask("a")
        answers = []

        async def ask() -> None:
            answers.append(await daemon.ask("b"))

        nursery.start_soon(ask)
        await eventually(partial(is_running, daemon.port, "a", state="stopping"))
        await daemon.reload({"a": renamed(models["a"]), "b": renamed(models["b"])}, groups=apart)
        await eventually(partial(some, answers))
        assert answers[0].status == 200
        assert (await daemon.ask("a")).status == 200


async def test_too_late(tmp_path):
    """A daemon that ends takes nothing over, says so to who has asked, and ends."""
    models, begun, going_on = {"a": scripted()}, threading.Event(), threading.Event()

    def slowly(reread, keep):
        begun.set()
        going_on.wait(PATIENCE)
        return reread(keep)

    async with reloading(tmp_path, models, slowly) as daemon, streaming(daemon.port, "a", 200, 0.005) as client:
        daemon.write({"b": scripted()})
        async with await connect(daemon.port) as late:
            await late.ask("POST", "/api/reload")
            await trio.to_thread.run_sync(begun.wait, PATIENCE)
            daemon.stop()
            assert (await late.answer()).status == 503
        assert speakers(await client.rest())[-1] == "[DONE]"
        going_on.set()


# ---- who may live together -------------------------------------------------------------------------


async def test_two_that_lived_together_exclude_each_other(tmp_path):
    """One of them goes, the one that has work stays; from then on they take turns."""
    models = {"a": scripted(), "b": scripted()}
    apart = {"g": {"members": ["a", "b"]}}
    async with reloading(tmp_path, models, groups=FREE) as daemon:
        pids = {name: await daemon.pid(name) for name in "ab"}
        async with streaming(daemon.port, "b", chunks=100, delay=0.005) as client:
            await daemon.reload(models, groups=apart)

            async def gone() -> bool:
                return not alive(pids["a"])

            await eventually(gone)
            async with trio.open_nursery() as nursery:
                answers = []

                async def ask() -> None:
                    answers.append((await daemon.ask("a"), alive(pids["b"])))

                nursery.start_soon(ask)
                assert speakers(await client.rest())[-1] == "[DONE]"
        assert [(answer.status, still) for answer, still in answers] == [(200, False)]


async def test_two_that_excluded_each_other_live_together(tmp_path):
    """Who waited for the other's end is served at once."""
    models = {"a": scripted(), "b": scripted()}
    async with (
        reloading(tmp_path, models, groups={"g": {"members": ["a", "b"]}}) as daemon,
        streaming(daemon.port, "a") as client,
        trio.open_nursery() as nursery,
    ):
        answers = []

        async def ask() -> None:
            answers.append(await daemon.ask("b"))

        nursery.start_soon(ask)
        await eventually(partial(is_running, daemon.port, "b", waiting=1))
        await daemon.reload(models, groups=FREE)
        while not answers:
            await client.piece()
        assert answers[0].status == 200
        assert set(await running(daemon.port)) == {"a", "b"}


async def test_more_memory(tmp_path):
    """What there is for models, and what they need, counts from then on; that it is counted is for the next start."""
    needs = {"a": scripted(memory="600MiB"), "b": scripted(memory="600MiB")}
    sizes = {size: {"headroom": 0, "learn": False, "devices": {"ram": size}} for size in ("1GiB", "2GiB")}
    async with reloading(tmp_path, needs, memory=sizes["1GiB"]) as daemon:
        for name in "ab":
            assert (await daemon.ask(name)).status == 200
        assert set(await running(daemon.port)) == {"b"}

        assert (await daemon.reload(needs, memory=sizes["2GiB"]))["settings"] == ["memory.devices"]
        assert (await daemon.ask("a")).status == 200
        assert set(await running(daemon.port)) == {"a", "b"}

        more = {**needs, "c": scripted(memory="1GiB")}
        await daemon.reload(more, memory=sizes["2GiB"])
        assert (await daemon.ask("c")).status == 200
        assert set(await running(daemon.port)) in ({"a", "c"}, {"b", "c"})

        assert (await daemon.reload(more))["later"] == ["memory.devices"]
        assert (await daemon.ask("b")).status == 200


async def test_a_peer_that_comes_and_goes(tmp_path):
    """Its models are listed and served from then on; one that has not changed keeps its connections."""
    async with reloading(tmp_path, {"a": scripted()}) as daemon:
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listener.socket.getsockname()[1]
        await daemon.reload({"a": scripted()}, peers={"far": {"proxy": f"http://127.0.0.1:{port}", "models": ["m"]}})
        assert await daemon.listed() == ["a", "far/m"]

        async def serve() -> None:
            async with await listener.accept() as stream:
                await stream.receive_some()
                await stream.send_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")

        async with listener, trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            answer = await daemon.ask("m")
            assert (answer.status, answer.body) == (200, b"{}")
        assert (await daemon.reload({"a": scripted()}))["settings"] == ["peers.far"]
        assert await daemon.listed() == ["a"]
        assert (await daemon.ask("m")).status == 404


async def test_who_listens_hears_of_it(tmp_path):
    """The events of one who has listened since before."""
    models = {"a": scripted()}
    async with reloading(tmp_path, models) as daemon, await connect(daemon.port) as client:
        await client.ask("GET", "/api/events")
        await client.piece_of_body()
        await daemon.reload({"b": scripted()})
        heard = b""
        while b'\\"id\\":\\"b\\"' not in heard:
            heard += await client.piece()


# ---- what asks for it ------------------------------------------------------------------------------


async def test_a_signal_and_a_changed_file(tmp_path):
    """SIGHUP, and whoever watches the file."""
    file, state = tmp_path / "trioswap.toml", str(tmp_path / "state")
    models = {name: scripted() for name in "abc"}

    def write(names: str) -> None:
        fresh = tmp_path / "fresh.toml"
        fresh.write_text(document({name: models[name] for name in names}, state_dir=state))
        fresh.replace(file)

    write("a")
    async with command("serve", "-c", str(file), "--watch-config") as daemon:

        async def lists(names: str) -> bool:
            return [row["id"] for row in (await fetch(daemon.port, "GET", "/v1/models")).json()["data"]] == [*names]

        pid = await pid_of(daemon.port, "a")
        write("ab")
        daemon.process.send_signal(signal.SIGHUP)
        await eventually(partial(lists, "ab"))
        write("abc")
        await eventually(partial(lists, "abc"))
        assert await pid_of(daemon.port, "a") == pid
    assert daemon.process.returncode == 0


async def pid_of(port: int, model: str) -> int:
    """The pid of the server that answers for *model*."""
    return json.loads((await fetch(port, "POST", "/v1/chat/completions", chat(model))).body)["pid"]
