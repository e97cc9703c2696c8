"""The daemon as a whole: signals, shutdown, hostile clients, unloading, and that nothing is left behind."""

from __future__ import annotations

import os
import re
import signal
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import attrs
import h11
import pytest
import trio
from children import PATIENCE, alive, free_port, wait_gone
from commands import daemon as command
from daemons import (
    at_once,
    chat,
    connect,
    daemon,
    ending,
    eventually,
    fetch,
    is_running,
    pid_of,
    running,
    scripted,
    speakers,
    write_config,
)
from test_server_hostile import HOSTILE, provoke

from trioswap import proctree
from trioswap.daemon import open_listeners
from trioswap.errors import CannotListen

CHAT = "/v1/chat/completions"
# Seconds beyond what the configuration grants; a thousand times what is needed.
MARGIN = 20.0
FAMILY = ("--fork", "--setsid-child")  # both ignore SIGTERM, and one escapes the process group


# ---- SIGTERM --------------------------------------------------------------------------------


@attrs.frozen
class Family:
    """The processes of one model server, known by more than their pids."""

    leader: int
    marker: str

    @property
    def left(self) -> list[proctree.Process]:
        return proctree.members(self.leader, self.marker)


async def family_at(port: int) -> Family:
    """The family of the model server on *port*, asked directly: it may still be loading."""
    pid = await pid_of(port)
    environment = (await trio.Path(f"/proc/{pid}/environ").read_bytes()).decode()
    marker = re.search(rf"(?:^|\0){proctree.MARKER}=([^\0]*)", environment)
    assert marker is not None
    return Family(pid, marker[1])


@asynccontextmanager
async def stopped_by_signals(tmp_path, *flags, signals: int = 1, drain: float = 0.3, grace: float = 0.3):
    """A daemon process with model `a`; after the block it gets SIGTERM and must be gone in time, with all of `a`."""
    model = scripted(*FAMILY, *flags)
    path = write_config(tmp_path, {"a": model}, unload_timeout=grace, unload_drain_timeout=drain)
    async with command("serve", "-c", path) as served:
        families: list[Family] = []

        async def note_family() -> None:
            families.append(await family_at(model.port))

        yield served, note_family, model.port
        begun = trio.current_time()
        for _ in range(signals):
            served.process.send_signal(signal.SIGTERM)
            await eventually(partial(refuses, served.port))  # so that the kernel does not merge two signals into one
        with trio.fail_after(PATIENCE):
            assert await served.process.wait() == 0
        took = trio.current_time() - begun
    assert took < (drain if signals == 1 else 0) + grace + MARGIN
    for family in families:
        assert not alive(family.leader)
        assert family.left == []


async def refuses(port: int) -> bool:
    """Whether nobody listens there any more."""
    try:
        async with await connect(port):
            return False
    except (ConnectionRefusedError, ConnectionResetError):
        return True


async def is_bound(port: int) -> bool:
    return not await refuses(port)


async def test_sigterm_when_idle(tmp_path):
    """A ready model server and its children, which ignore SIGTERM, are gone when the daemon exits with 0."""
    async with stopped_by_signals(tmp_path) as (served, note_family, port):
        assert (await fetch(served.port, "POST", CHAT, chat("a"))).status == 200
        await note_family()
        assert len((await fetch(port, "GET", "/children")).json()) == len(FAMILY)


async def test_sigterm_during_a_load(tmp_path):
    """The request that waits is told, the loading server and its children are gone."""
    answers = []
    async with trio.open_nursery() as nursery:

        async def ask(port: int) -> None:
            answers.append(await fetch(port, "POST", CHAT, chat("a")))

        async with stopped_by_signals(tmp_path, "--never-ready") as (served, note_family, port):
            nursery.start_soon(ask, served.port)
            await eventually(partial(is_bound, port))
            await note_family()
    assert answers[0].status == 503
    assert int(answers[0]["retry-after"]) >= 1
    assert "shutting down" in answers[0].json()["error"]["message"]


async def test_sigterm_lets_a_stream_finish(tmp_path):
    """What is being served when the signal comes is served to its end."""
    bodies = []
    async with trio.open_nursery() as nursery:

        async def finish(client) -> None:
            async with client:
                bodies.append(await client.rest())

        async with stopped_by_signals(tmp_path, drain=PATIENCE) as (served, note_family, _):
            client = await connect(served.port)
            await client.ask("POST", CHAT, chat("a", stream=True, chunks=30, chunk_delay=0.02))
            await client.head()
            await note_family()
            nursery.start_soon(finish, client)
    assert speakers(bodies[0]) == ["a"] * 30 + ["[DONE]"]


@pytest.mark.parametrize(("signals", "drain"), [(1, 0.3), (2, 10 * PATIENCE)], ids=["drain timeout", "second signal"])
async def test_an_endless_stream_is_cut(tmp_path, signals, drain):
    """After unload_drain_timeout, or at a second signal, the stream is cut, and its last event says so."""
    async with trio.open_nursery() as nursery:

        async def be_cut(client) -> None:
            async with client:
                assert "the request was cut off" in await ending(client)

        async with stopped_by_signals(tmp_path, signals=signals, drain=drain) as (served, note_family, _):
            client = await connect(served.port)
            await client.ask("POST", CHAT, chat("a", stream=True, chunks=10**6, chunk_delay=0.01))
            await client.head()
            await note_family()
            nursery.start_soon(be_cut, client)


async def test_a_follower_of_the_logs_does_not_hold_the_shutdown(tmp_path):
    """Passive traffic delays nothing (I12); the log is told to its end and ended cleanly."""
    bodies = []
    async with trio.open_nursery() as nursery:

        async def follow(client) -> None:
            async with client:
                bodies.append(await client.rest())

        async with stopped_by_signals(tmp_path) as (served, _, _):
            await fetch(served.port, "POST", CHAT, chat("a"))
            client = await connect(served.port)
            await client.ask("GET", "/logs/stream")
            await client.head()
            nursery.start_soon(follow, client)
    assert b"listening" in bodies[0]
    assert b"received SIGTERM" in bodies[0]


async def test_a_request_that_comes_too_late_is_refused(tmp_path):
    """An upload that is complete only after the signal gets a 503 and starts no model (I8)."""
    body = chat("a")
    path = write_config(tmp_path, {"a": scripted()})
    async with command("serve", "-c", path) as served, await connect(served.port) as client:
        fields = [("host", "x"), ("content-length", str(len(body))), ("expect", "100-continue")]
        await client.send(h11.Request(method="POST", target=CHAT, headers=fields))
        assert isinstance(await client.next_event(), h11.InformationalResponse), "the daemon has the request"
        served.process.send_signal(signal.SIGTERM)
        await eventually(partial(refuses, served.port))
        await client.send(h11.Data(data=body))
        answer = await client.answer()
        assert (answer.status, answer["retry-after"]) == (503, "5")
        with trio.fail_after(PATIENCE):
            assert await served.process.wait() == 0


async def test_a_port_in_use_is_said():
    """A listen address that is taken fails before anything was started."""
    [listener] = await open_listeners("127.0.0.1:0")
    async with listener:
        port = listener.socket.getsockname()[1]
        with pytest.raises(CannotListen, match="in use"):
            await open_listeners(f"127.0.0.1:{port}")


# ---- hostile clients ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_client_harms_nobody(name):
    """Inputs that end a process under plain Hypercorn: the daemon lives, and streams of others are complete."""
    async with daemon({"a": scripted()}) as served:
        hostile_done, streams = trio.Event(), []

        async def neighbour() -> None:
            while not streams or not hostile_done.is_set():
                answer = await fetch(served.port, "POST", CHAT, chat("a", stream=True, chunks=20, chunk_delay=0.005))
                streams.append(speakers(answer.body))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(neighbour)
            await eventually(partial(is_running, served.port, "a", serving=1))
            for _ in range(20):
                await provoke(Target(served.port), HOSTILE[name])
            hostile_done.set()
        assert all(stream == ["a"] * 20 + ["[DONE]"] for stream in streams)
        assert (await fetch(served.port, "GET", "/health")).text == "OK"


@attrs.frozen
class Target:
    """What `provoke` connects to."""

    port: int

    async def connect(self) -> trio.SocketStream:
        return (await connect(self.port)).stream


# ---- unloading ------------------------------------------------------------------------------------


async def test_an_idle_model_is_unloaded_after_its_ttl():
    """Its process ends, whoever looks at the daemon meanwhile; the next request starts it again."""
    async with daemon({"a": scripted(ttl=0.3)}) as served:
        pid = (await fetch(served.port, "POST", CHAT, chat("a"))).json()["pid"]

        async def unloaded() -> bool:  # every look is traffic that must not count as use (I12)
            return await running(served.port) == {}

        await eventually(unloaded)
        await wait_gone(pid)
        again = (await fetch(served.port, "POST", CHAT, chat("a"))).json()["pid"]
        assert again != pid


async def test_a_stream_outlives_the_ttl():
    """A model that serves is not idle, however long it takes."""
    async with daemon({"a": scripted(ttl=0.1)}) as served:
        answer = await fetch(served.port, "POST", CHAT, chat("a", stream=True, chunks=30, chunk_delay=0.02))
        assert speakers(answer.body) == ["a"] * 30 + ["[DONE]"]


async def test_unloading_all_lets_a_stream_finish():
    """The stream is complete, and the answer to the unload comes when the process is gone."""
    async with daemon({"a": scripted()}) as served, await connect(served.port) as client:
        await client.ask("POST", CHAT, chat("a", stream=True, chunks=30, chunk_delay=0.02))
        await client.head()
        pid = await pid_of(served.model_ports["a"])
        bodies = []

        async def finish() -> None:
            bodies.append(await client.rest())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(finish)
            answer = await fetch(served.port, "POST", "/api/models/unload")
            assert (answer.status, answer.json()) == (200, {"msg": "ok"})
            assert not alive(pid)
        assert speakers(bodies[0]) == ["a"] * 30 + ["[DONE]"]


async def test_an_unload_cuts_an_endless_stream():
    """After unload_drain_timeout the stream ends with an error and the process is gone."""
    async with daemon({"a": scripted(unload_drain_timeout=0.2)}) as served, await connect(served.port) as client:
        await client.ask("POST", CHAT, chat("a", stream=True, chunks=10**6, chunk_delay=0.01))
        await client.head()
        pid = await pid_of(served.model_ports["a"])
        assert (await fetch(served.port, "POST", "/api/models/unload/a")).status == 200
        assert not alive(pid)
        assert "unloaded by an operator" in await ending(client)


# ---- nothing is left --------------------------------------------------------------------------------


def own_children() -> set[int]:
    return {int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


def held() -> tuple[int, int, int]:
    """How many tasks, descriptors and children there are."""
    return (
        trio.lowlevel.current_statistics().tasks_living,
        len(list(Path("/proc/self/fd").iterdir())),
        len(own_children()),
    )


async def one_of_many(port: int, number: int) -> None:
    """A request that is answered, refused, or left in one of several stages."""
    model = "ab"[number % 2]
    match number % 9:
        case 0 | 1:
            assert (await fetch(port, "POST", CHAT, chat(model))).status == 200
        case 2:
            assert (await fetch(port, "POST", CHAT, chat(model, stream=True, chunks=20))).status == 200
        case 3:
            assert (await fetch(port, "POST", CHAT, chat("nobody"))).status == 404
        case 4:
            assert (await fetch(port, "GET", f"/upstream/{model}/x")).status == 200
        case 5:
            await leave(port, "POST", CHAT, chat(model, stream=True, chunks=10**6, chunk_delay=0.001), after_head=True)
        case 6:
            await leave(port, "POST", CHAT, chat(model, answer_delay=1000), after_head=False)
        case 7:
            assert (await fetch(port, "POST", CHAT, chat(model, status=500))).status == 500
        case 8:
            await leave(port, "GET", f"/logs/stream/{model}?no-history", b"", after_head=True)


async def leave(port: int, method: str, target: str, body: bytes, *, after_head: bool) -> None:
    async with await connect(port) as client:
        await client.ask(method, target, body)
        if after_head:
            await client.head()


async def test_nothing_leaks():
    """After 200 mixed requests over two swapping models, tasks, descriptors and children are what they were."""
    models = {"a": scripted(max_wait=0.02), "b": scripted(max_wait=0.02)}
    async with daemon(models) as served:
        await fetch(served.port, "POST", CHAT, chat("a"))
        await fetch(served.port, "POST", "/api/models/unload")

        async def back() -> bool:
            await trio.testing.wait_all_tasks_blocked()
            return held() == baseline

        await trio.testing.wait_all_tasks_blocked()
        baseline = held()
        for batch in range(10):
            await at_once(partial(one_of_many, served.port, 20 * batch + number) for number in range(20))
        await fetch(served.port, "POST", "/api/models/unload")
        await eventually(back)


# ---- what is done at the start ----------------------------------------------------------------------


async def test_preloaded_models_are_there_before_anybody_asks(caplog):
    """Those that can live together both; one that does not start is told in the log, and harms nobody."""
    models = {"a": scripted(), "b": scripted(), "broken": {"cmd": ["/nonexistent"], "proxy": "http://127.0.0.1:9"}}
    hooks = {"on_startup": {"preload": ["a", "b", "broken"]}}
    groups = {"all": {"swap": False, "members": list(models)}}
    async with daemon(models, hooks=hooks, groups=groups) as served:
        await eventually(partial(is_running, served.port, "a", state="ready"))
        await eventually(partial(is_running, served.port, "b", state="ready"))

        async def told() -> bool:
            return any("preload failed model=broken" in record.getMessage() for record in caplog.records)

        await eventually(told)
        assert (await fetch(served.port, "POST", CHAT, chat("a"))).status == 200


@pytest.mark.parametrize("parallel_loads", [1, 2])
async def test_preloaded_models_load_at_the_same_time_where_that_is_allowed(tmp_path, parallel_loads):
    """As many of one domain as `parallel_loads` says; the next one when one of them is ready."""
    go = tmp_path / "go"
    models = {name: scripted("--ready-once", go) for name in "abcx"}
    hooks = {"on_startup": {"preload": ["a", "b", "c"]}}
    groups = {"all": {"swap": False, "members": ["a", "b", "c"]}, "other": {"members": ["x"]}}
    async with daemon(models, hooks=hooks, groups=groups, parallel_loads=parallel_loads) as served:

        async def states() -> list[str]:
            return sorted(str(row["state"]) for row in (await running(served.port)).values())

        async def loads() -> bool:
            return await states() == ["starting"] * parallel_loads + ["stopped"] * (3 - parallel_loads)

        async def all_are_there() -> bool:
            return await states() == ["ready"] * 3

        await eventually(loads)
        go.touch()
        await eventually(all_are_there)


async def test_a_preloaded_model_is_there_when_its_hook_has_ended(tmp_path, caplog):
    """Not when its server is ready, but when it may be asked."""
    caplog.set_level("INFO")
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    model = scripted(hooks={"after_ready": ["sh", "-c", f"read line < {gate}"]})
    async with daemon({"a": model}, hooks={"on_startup": {"preload": ["a"]}}) as served:

        async def told(what: str) -> bool:
            return any(what in record.getMessage() for record in caplog.records)

        await eventually(partial(told, "hook begins model=a hook=after_ready"))
        assert await is_running(served.port, "a", state="starting")
        assert not await told("preloaded model=a")
        await trio.to_thread.run_sync(gate.write_text, "go\n", abandon_on_cancel=True)
        await eventually(partial(told, "preloaded model=a"))
        assert await is_running(served.port, "a", state="ready")


async def test_a_daemon_may_have_peers_only():
    """Then nothing lives beside anything, and the rule about that is empty."""
    async with daemon({"a": scripted()}) as other:
        peers = {"far": {"proxy": f"http://127.0.0.1:{other.port}", "models": ["a"]}}
        async with daemon({}, peers=peers) as served:
            assert (await fetch(served.port, "POST", CHAT, chat("far/a"))).json()["model"] == "a"


# ---- a model that fails again and again ----------------------------------------------------------


def broken(starts: Path, **settings: object) -> dict[str, object]:
    """A model whose server notes its start in *starts*, complains, and exits."""
    cmd = ["sh", "-c", f"echo started >> {starts}; echo 'no tensor named x' >&2; exit 3"]
    return {"cmd": cmd, "proxy": f"http://127.0.0.1:{free_port()}", **settings}


def count(starts: Path) -> int:
    return len(starts.read_text().splitlines()) if starts.exists() else 0


async def test_a_model_that_has_just_failed_costs_others_nothing(tmp_path):
    """Twenty requests for it: one start, one eviction; each is told at once what went wrong and when to come again."""
    starts = tmp_path / "starts"
    models = {"good": scripted(turn_lease=0, linger=0), "bad": broken(starts, backoff="1h", backoff_max="1h")}
    async with daemon(models) as served:
        assert (await fetch(served.port, "POST", CHAT, chat("good"))).status == 200
        answers, pids = [], set[int]()
        for _ in range(20):
            answers.append(await fetch(served.port, "POST", CHAT, chat("bad")))
            assert (await fetch(served.port, "POST", CHAT, chat("good"))).status == 200
            pids.add(await pid_of(served.model_ports["good"]))

        assert (count(starts), len(pids)) == (1, 1)
        for answer in answers:
            assert answer.status == 503
            assert 3_000 < int(answer["retry-after"]) <= 3_600
            message = answer.json()["error"]["message"]
            assert 'exited with 3 before it was ready ("no tensor named x")' in message
            assert f"not tried again for {answer['retry-after']} s" in message
        row = (await running(served.port))["bad"]
        assert (row["state"], row["serving"], row["waiting"]) == ("stopped", 0, 0)
        assert 'exited with 3 before it was ready ("no tensor named x")' in row["failure"]
        assert 3_000 < row["retry_in"] <= 3_600

        await fetch(served.port, "POST", "/api/models/unload/bad")
        assert "bad" not in await running(served.port)
        assert (await fetch(served.port, "POST", CHAT, chat("bad"))).status == 503
        assert count(starts) == 2


async def test_it_is_tried_once_in_each_pause_and_the_pauses_grow(tmp_path):
    """Asked without a break, by several: as many starts as pauses, and each puts out the other once at most."""
    starts, first, wanted = tmp_path / "starts", 0.05, 4
    models = {"good": scripted(turn_lease=0, linger=0, max_wait=0), "bad": broken(starts, backoff=first)}
    async with daemon(models) as served:
        begun, pids = trio.current_time(), set[int]()
        while count(starts) < wanted:
            refused = await at_once([partial(fetch, served.port, "POST", CHAT, chat("bad"))] * 5)
            assert {answer.status for answer in refused} == {503}
            assert all(int(answer["retry-after"]) >= 1 for answer in refused)
            assert (await fetch(served.port, "POST", CHAT, chat("good"))).status == 200
            pids.add(await pid_of(served.model_ports["good"]))
        pauses = sum(first * 2**n for n in range(count(starts) - 1))
        assert trio.current_time() - begun >= pauses
        assert len(pids) <= count(starts) + 1


async def test_a_server_that_dies_of_each_request_is_not_started_for_ever(tmp_path):
    """The request that killed it is tried once more; after that second death others are told at once, and why."""
    async with daemon({"a": scripted(backoff="1h", backoff_max="1h")}) as served:
        killed = await fetch(served.port, "POST", CHAT, chat("a", die_on_request=True))
        assert killed.status == 502
        refused = await fetch(served.port, "POST", CHAT, chat("a"))
        assert refused.status == 503
        assert 'model "a" crashed: exited with 3' in refused.json()["error"]["message"]
        assert "2 failures in a row" in refused.json()["error"]["message"]
        assert int(refused["retry-after"]) > 3_000
