"""Bugs that others of the kind have or had (reference, known bugs, section 3.3): none of them is here.

Each test has project and number of its row in its name; see `test_known_bugs.py`.
"""

from __future__ import annotations

import ast
import os
import random
import signal
from functools import partial
from pathlib import Path

import pytest
import trio
from daemons import at_once, chat, connect, daemon, eventually, fetch, is_running, pid_of, running, scripted
from test_known_bugs import CHAT, ENDLESS, HOUR, UNLOAD, cured_by, has_started, on_gpu, say

import trioswap

HASTY = {"turn_lease": 0, "linger": 0}


async def test_ollama_17408_a_model_that_is_to_go_is_asked_again():
    """A request revived the model that another one waited to see gone, and all waited; here both have their turn."""
    rng = random.Random(17408)
    models = {"a": scripted(max_wait=0.02), "b": scripted(max_wait=0.02)}
    async with daemon(models, **HASTY) as served:

        async def come_and_go(name: str) -> None:
            for _ in range(8):
                async with await connect(served.port) as client:
                    with trio.move_on_after(rng.uniform(0, 0.2)):
                        await client.ask("POST", CHAT, chat(name, stream=True, chunks=10, chunk_delay=0.01))
                        await client.answer()

        await at_once(partial(come_and_go, name) for name in "aaabbb")
        assert await at_once(partial(say, served.port, name) for name in "abab") == list("abab")
        assert (await fetch(served.port, "GET", "/health")).text == "OK"


async def test_ollama_14407_a_model_that_drains_takes_no_more_requests():
    """A reload waited in vain for a moment without requests; here a draining model gets none, so it comes."""
    models = {"a": scripted(), "b": scripted(max_wait=0.05)}
    async with daemon(models, **HASTY) as served, await connect(served.port) as busy:
        await busy.ask("POST", CHAT, chat("a", **ENDLESS))
        await busy.piece_of_body()
        answers = []

        async def ask(name: str) -> None:
            answers.append(await say(served.port, name))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, "b")
            await eventually(partial(is_running, served.port, "a", state="draining"))
            nursery.start_soon(ask, "a")
            await eventually(partial(is_running, served.port, "a", waiting=1))
            assert await is_running(served.port, "a", serving=1), "the one that was there before"
            await busy.stream.aclose()
        assert answers == ["b", "a"]


async def test_ollama_10819_an_unload_ends_no_other_attempt(tmp_path):
    """A client left in a load, and an unload that came late ended the next process; here it ends what it meant."""
    model = scripted("--ready-delay", 0.1)
    async with daemon({"a": model}) as served:
        for _ in range(5):
            async with await connect(served.port) as leaving:
                await leaving.ask("POST", CHAT, chat("a"))
                await eventually(partial(is_running, served.port, "a", state="starting"))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fetch, served.port, "POST", f"{UNLOAD}/a")
                await eventually(partial(is_not_starting, served.port))
                assert await say(served.port, "a") == "a"
            pid = await pid_of(model.port)
            assert await say(served.port, "a") == "a"
            assert await pid_of(model.port) == pid
            await fetch(served.port, "POST", f"{UNLOAD}/a")


async def is_not_starting(port: int) -> bool:
    return not await is_running(port, "a", state="starting")


async def test_ollama_7758_the_queue_is_bounded_for_a_loaded_model_too():
    """The bound of the queue did not count for a loaded model; here who waits at a busy one is counted as well."""
    async with (
        daemon({"a": scripted(parallel=1)}, max_queue=1) as served,
        await connect(served.port) as busy,
        await connect(served.port) as waiting,
    ):
        await busy.ask("POST", CHAT, chat("a", **ENDLESS))
        await busy.piece_of_body()
        await waiting.ask("POST", CHAT, chat("a"))
        await eventually(partial(is_running, served.port, "a", waiting=1))
        answer = await fetch(served.port, "POST", CHAT, chat("a"))
    assert answer.status == 503
    assert "max_queue" in answer.json()["error"]["message"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_llama_cpp_20763_a_server_that_is_killed_while_it_loads(number):
    """Whoever waited for a server that was killed while loading waited for ever; here all are told at once."""
    model = scripted("--never-ready", health_check_timeout=HOUR)
    async with daemon({"a": model}) as served, trio.open_nursery() as nursery:
        answers = []

        async def ask() -> None:
            answers.append(await fetch(served.port, "POST", CHAT, chat("a")))

        for _ in range(5):
            nursery.start_soon(ask)
        await eventually(partial(is_running, served.port, "a", state="starting", waiting=5))
        await eventually(partial(has_bound, model.port))
        os.kill(await pid_of(model.port), number)
        await eventually(partial(have_come, answers, 5))
    assert [answer.status for answer in answers] == [503] * 5


async def has_bound(port: int) -> bool:
    try:
        return await has_started(port, 0)
    except OSError:
        return False


async def have_come(answers: list, count: int) -> bool:
    await trio.lowlevel.checkpoint()
    return len(answers) == count


async def test_llama_cpp_28698_28443_whoever_waited_for_a_load_is_served_by_it(tmp_path):
    """The next in the queue put out a model before the request it was loaded for had reached it, or waited for ever.

    Here each start serves somebody, and everybody is served, however hasty the settings.
    """
    gpu = tmp_path / "gpu"
    models = {name: on_gpu(gpu, max_wait=0.0) for name in "ab"}
    async with daemon(models, **HASTY) as served:
        for _ in range(4):
            assert await at_once(partial(say, served.port, name) for name in "abab") == list("abab")
    assert gpu.read_text().count("started") <= 16


async def test_llama_cpp_25528_a_model_that_loads_can_be_put_out(tmp_path):
    """A loading model was chosen to go and never heard of it; here an unload or another model ends the load."""
    gpu = tmp_path / "gpu"
    models = {"a": on_gpu(gpu, "--never-ready", "--ignore-sigterm", unload_timeout=0.2), "b": on_gpu(gpu)}
    async with daemon(models) as served, await connect(served.port) as waiting:
        await waiting.ask("POST", CHAT, chat("a"))
        await eventually(partial(is_running, served.port, "a", state="starting"))
        assert (await fetch(served.port, "POST", f"{UNLOAD}/a")).status == 200
        assert (await waiting.answer()).status == 503
        assert await say(served.port, "b") == "b"


async def test_localai_11101_what_is_persistent_stays():
    """A pinned model was put out after each request; here it keeps its process through swaps of others."""
    groups = {
        "kept": {"members": ["p"], "persistent": True, "exclusive": False},
        "swapped": {"members": ["a", "b"]},
    }
    models = {"p": scripted(), "a": scripted(max_wait=0.0), "b": scripted(max_wait=0.0)}
    async with daemon(models, groups=groups, **HASTY) as served:
        assert await say(served.port, "p") == "p"
        pid = await pid_of(served.model_ports["p"])
        for name in "abpab":
            assert await say(served.port, name) == name
        assert (await running(served.port)).keys() == {"p", "b"}
        assert await pid_of(served.model_ports["p"]) == pid


async def test_lemonade_1603_1604_llamastash_56_one_load_for_all(tmp_path):
    """Two requests at once started the same server twice; here thirty start one."""
    gpu = tmp_path / "gpu"
    async with daemon({"a": on_gpu(gpu, "--ready-delay", 0.2)}) as served:
        assert await at_once(partial(say, served.port, "a") for _ in range(30)) == ["a"] * 30
    assert gpu.read_text() == "started\n"


def test_lemonade_2414_2488_one_lock_taken_in_one_place():
    """A mutex was taken again by who had it; here a domain has one, and one function takes it.

    Those of `threading` are held by small blocks that call nothing of ours, and await nothing.
    """
    trees = [ast.parse(file.read_text()) for file in sorted(Path(trioswap.__file__).parent.rglob("*.py"))]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    made = [ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)]
    held = [ast.unparse(item.context_expr) for node in nodes if isinstance(node, ast.AsyncWith) for item in node.items]

    assert sorted(name for name in made if name.endswith(("Lock", "Semaphore", "Condition"))) == [
        "threading.Lock",
        "trio.Lock",
    ]
    assert [name for name in held if name.endswith("._lock")] == ["self._lock"]


async def test_paddler_46_queueing_is_really_on():
    """The queue was silently off, and a full server meant a 502; here twenty requests for one place are served."""
    model = scripted(parallel=1)
    async with daemon({"a": model}) as served:
        answers = await at_once(partial(say, served.port, "a", answer_delay=0.01) for _ in range(20))
        assert answers == ["a"] * 20
        assert await has_started(model.port, 20)


async def test_large_model_proxy_119_the_dead_are_not_put_out():
    """A process that had died was put out again and again, and the next model never loaded; here its place is free."""
    models = {"a": scripted("--fork", unload_timeout=0.1), "b": scripted()}
    async with daemon(models) as served:
        for _ in range(2):
            assert await say(served.port, "a") == "a"
            os.kill(await pid_of(served.model_ports["a"]), signal.SIGKILL)
            assert await say(served.port, "b") == "b"


async def test_olla_144_quick_failures_draw_no_requests():
    """A server that failed at once looked idle and drew all requests; here a target that just failed is left out."""
    models = {"bad": scripted("--exit-at-start", 1, backoff=HOUR, backoff_max=HOUR), "good": scripted()}
    pick = {"strategy": "spillover", "targets": ["bad", "good"], "settings": {"spillover": 1}}
    groups = {"both": {"swap": False, "members": list(models)}}
    async with daemon(models, selectors={"pick": pick}, groups=groups) as served:
        assert (await fetch(served.port, "POST", CHAT, chat("pick"))).status == 503
        for _ in range(3):
            assert await say(served.port, "pick") == "good"


async def test_olla_74d3a5c_one_trial_closes_the_circuit(tmp_path):
    """A breaker stayed half open for ever; here a model that failed is refused, and one good start makes it whole."""
    starts, cured = tmp_path / "starts", tmp_path / "cured"
    async with daemon({"a": cured_by(cured, starts, backoff=HOUR, backoff_max=HOUR)}) as served:
        for _ in range(3):
            answer = await fetch(served.port, "POST", CHAT, chat("a"))
            assert answer.status == 503
            assert int(answer["retry-after"]) > 1
            assert "exited with 1" in answer.json()["error"]["message"]
        assert starts.read_text() == "started\n"
        cured.touch()
        await fetch(served.port, "POST", f"{UNLOAD}/a")  # an operator need not wait for the hour to end
        assert await at_once(partial(say, served.port, "a") for _ in range(5)) == ["a"] * 5
        assert await say(served.port, "a") == "a"
    assert starts.read_text() == "started\n" * 2
