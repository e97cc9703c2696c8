"""Bugs that llama-swap has had (reference, known bugs, section 3.1): none of them is here.

Each test has the id of its row in its name.  A row that has none here has one elsewhere, or
a reason; docs/reliability.md says which, and the last tests hold it to that.
"""

from __future__ import annotations

import ast
import random
import re
import signal
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import attrs
import h11
import pytest
import trio
import trio.testing
from children import PATIENCE, alive, python
from clocks import guarded, passes
from commands import daemon as command
from daemons import (
    Scripted,
    at_once,
    by_hand,
    chat,
    connect,
    counts,
    daemon,
    document,
    ending,
    eventually,
    fetch,
    is_running,
    pid_of,
    running,
    scripted,
    write_config,
)
from fakes import Script, make_group
from test_daemon import family_at, held, refuses

from trioswap.config import loads
from trioswap.daemon import serve
from trioswap.lifecycle import State
from trioswap.logs import Logs

CHAT = "/v1/chat/completions"
UNLOAD = "/api/models/unload"
ENDLESS = {"stream": True, "chunks": 10**6, "chunk_delay": 0.01}
HOUR = 3600.0


# ---- model servers in a wrapper ------------------------------------------------------------

# One GPU for one model: a server that starts while a process of another one still lives ends with an error.
ONE_GPU = (
    "import fcntl, os, sys; gpu = open(sys.argv[1], 'a'); fcntl.flock(gpu, fcntl.LOCK_EX | fcntl.LOCK_NB);"
    "gpu.write('started\\n'); gpu.flush(); os.set_inheritable(gpu.fileno(), True); os.execv(sys.argv[2], sys.argv[2:])"
)
# Notes how the server in it has ended: 0 when it stopped by itself; killed by SIGKILL it cannot.
NOTES_THE_END = 'trap "" TERM INT; "$@"; echo $? >> "$0"'
# A container as its CLI shows it: the name is in use until somebody removes it.
CONTAINER = (
    "import os, sys; os.close(os.open(sys.argv[1], os.O_CREAT | os.O_EXCL)); os.execv(sys.argv[2], sys.argv[2:])"
)
# No start succeeds before the file is there.
CURED_BY = (
    "import os, sys; open(sys.argv[1], 'a').write('started\\n');"
    "os.path.exists(sys.argv[2]) or sys.exit(1); os.execv(sys.argv[3], sys.argv[3:])"
)


@attrs.frozen
class Wrapped(Scripted):
    """A model server that another program runs."""

    wrapper: tuple[str, ...] = ()

    def table(self, name):
        table = super().table(name)
        return {**table, "cmd": [*self.wrapper, *table["cmd"]]}


def wrapped(wrapper, *flags, **settings) -> Wrapped:
    model = scripted(*flags, **settings)
    return Wrapped(model.flags, model.port, model.settings, tuple(wrapper))


def on_gpu(gpu: Path, *flags, **settings) -> Wrapped:
    """A model server that needs the *gpu* for itself; the file has a line for each start."""
    return wrapped((*python(ONE_GPU), str(gpu)), *flags, **settings)


def cured_by(cured: Path, starts: Path, *flags, **settings) -> Wrapped:
    """A model server that does not start until *cured* exists; *starts* has a line for each time it was tried."""
    return wrapped((*python(CURED_BY), str(starts), str(cured)), *flags, **settings)


def noting_its_end(file: Path, *flags, **settings) -> Wrapped:
    return wrapped(("sh", "-c", NOTES_THE_END, str(file)), *flags, **settings)


async def say(port: int, model: str, **script) -> str:
    """Who answers a request to *model*."""
    answer = await fetch(port, "POST", CHAT, chat(model, **script))
    assert answer.status == 200, answer.text
    return answer.json()["model"]


async def status(port: int, model: str, **script) -> int:
    return (await fetch(port, "POST", CHAT, chat(model, **script))).status


async def is_stopped(port: int, model: str) -> bool:
    return model not in await running(port)


async def has_started(port: int, requests: int) -> bool:
    """Whether the model server on *port* has got so many requests."""
    return (await counts(port))["started"] == requests


# ---- starts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [("--exit-at-start", 1), ("--never-ready", "--exit-after", 0.1)])
async def test_s2_s3_a_server_that_ends_while_loading_is_noticed(flags):
    """Nobody looked at the process while it loaded, so a wrong flag cost the whole time-out; here it costs none."""
    async with daemon({"a": scripted(*flags, health_check_timeout=HOUR)}) as served:
        answer = await fetch(served.port, "POST", CHAT, chat("a"))  # long before the hour is over
    assert answer.status == 503
    assert "before it was ready" in answer.json()["error"]["message"]


async def test_s8_ctrl_c_ends_a_load(tmp_path):
    """Ctrl-C was not heard while a model loaded; here the load ends with the daemon, and so does its process."""
    model = scripted("--never-ready")
    path = write_config(tmp_path, {"a": model})
    async with command("serve", "-c", path) as served, await connect(served.port) as waiting:
        await waiting.ask("POST", CHAT, chat("a"))

        async def loads_already() -> bool:
            return not await refuses(model.port)

        await eventually(loads_already)
        pid = await pid_of(model.port)
        served.process.send_signal(signal.SIGINT)
        assert (await waiting.answer()).status == 503
        with trio.fail_after(PATIENCE):
            assert await served.process.wait() == 0
        assert not alive(pid)


async def test_s11_failed_starts_lead_to_no_dead_end(tmp_path):
    """After some failed starts a model stayed "failed" until a restart of llama-swap; here the next one may succeed."""
    starts, cured = tmp_path / "starts", tmp_path / "cured"
    async with daemon({"a": cured_by(cured, starts, backoff=0)}) as served:
        for _ in range(3):
            assert await status(served.port, "a") == 503
        cured.touch()
        assert await status(served.port, "a") == 200
    assert starts.read_text() == "started\n" * 4


async def test_s14_a_model_that_loads_is_in_the_way_too(tmp_path):
    """Only ready models were thought to hold memory, so a second one was loaded beside one that was still loading."""
    gpu = tmp_path / "gpu"
    models = {name: on_gpu(gpu, "--fork", "--ready-delay", 0.1, unload_timeout=0.1, max_wait=0.0) for name in "abc"}
    async with daemon(models, turn_lease=0) as served:
        names = list("abcab")
        assert await at_once(partial(say, served.port, name) for name in names) == names
        async with await connect(served.port) as leaving:  # nobody waits for a's load any more, but it is there
            await leaving.ask("POST", CHAT, chat("a", answer_delay=HOUR))
            await eventually(partial(is_running, served.port, "a"))
        assert await say(served.port, "b") == "b"


# ---- time to live ------------------------------------------------------------------------------


async def test_s5_a_time_to_live_ends_with_its_process():
    """The timer outlived its process and unloaded for ever; here nothing is left of it, and it stops once."""
    async with daemon({"a": scripted(ttl=0.05)}) as served:

        async def back() -> bool:
            await trio.testing.wait_all_tasks_blocked()
            return held() == baseline

        await fetch(served.port, "GET", "/health")
        await trio.testing.wait_all_tasks_blocked()
        baseline = held()
        for _ in range(3):
            assert await say(served.port, "a") == "a"
            await eventually(partial(is_stopped, served.port, "a"))
        await eventually(back)
        decisions = (await fetch(served.port, "GET", "/api/queue")).json()["decisions"]
    assert [entry["what"] for entry in decisions].count("stop") == 3


async def test_s15_l5_a_request_at_the_very_end_of_the_time_to_live(nursery, autojump_clock):
    """A request that met the end of the time to live waited for ever, or got a 503; here it is served at any moment.

    Five thousand requests, one for each millisecond around the end of the idle time and of the stop.
    """
    script = Script(load=0.02, stop=0.03, rng=random.Random(15))
    group = make_group(script, ttl=0.05)
    await nursery.start(group.run)
    for offset in [milliseconds / 1000 for milliseconds in range(30, 100)] * 72:
        async with group.lease("a") as lease:
            await script.dither()
            assert lease.upstream.answer() == "a"
        await trio.sleep(offset)
    spawned = sum(text == "a spawned" for _, text in script.trace)

    assert 10 < spawned < 5000, "some came in time, some too late"
    nursery.cancel_scope.cancel()


async def test_s15_l5_the_same_with_a_real_server():
    """As above, with fewer requests: each is answered with 200."""
    async with daemon({"a": scripted(ttl=0.05)}) as served:
        for offset in range(20):
            assert await say(served.port, "a") == "a"
            await trio.sleep(0.040 + offset / 1000)


# ---- stops --------------------------------------------------------------------------------------


async def test_s7_ten_stops_are_one(tmp_path):
    """Two waited for the same process, and one of them in vain; here ten return, and the server is asked once."""
    said = tmp_path / "said"
    code = (
        "import signal, sys; said = open(sys.argv[1], 'w', 1);"
        "signal.signal(signal.SIGALRM, lambda *_: sys.exit());"
        "signal.signal(signal.SIGTERM, lambda *_: (said.write('asked\\n'), signal.setitimer(signal.ITIMER_REAL, 0.3)));"
        "said.write('up\\n');\nwhile True: signal.pause()"
    )
    cmd = [*python(code), str(said)]
    model = {"cmd": cmd, "proxy": "http://127.0.0.1:9", "check_endpoint": "none", "port_owner": "any"}
    async with daemon({"a": model}) as served:
        assert (await fetch(served.port, "POST", "/api/models/load/a")).status == 200

        async def listens() -> bool:
            return said.exists() and said.read_text() == "up\n"

        await eventually(listens)
        answers = await at_once(partial(fetch, served.port, "POST", f"{UNLOAD}/a") for _ in range(10))
        assert [answer.status for answer in answers] == [200] * 10
        assert await running(served.port) == {}
    assert said.read_text() == "up\nasked\n"


@pytest.mark.parametrize("script", [{"hold": True}, ENDLESS], ids=["no head", "endless"])
async def test_s12_an_unload_does_not_wait_for_ever(script):
    """An unload waited for requests that the server never answered; here they are cut at the drain deadline."""
    model = scripted("--ignore-sigterm", unload_drain_timeout=0.2, unload_timeout=0.2)
    async with daemon({"a": model}) as served, await connect(served.port) as client:
        await client.ask("POST", CHAT, chat("a", **script))
        await eventually(partial(is_running, served.port, "a", serving=1))
        await eventually(partial(has_started, model.port, 1))
        pid = await pid_of(model.port)
        assert (await fetch(served.port, "POST", f"{UNLOAD}/a")).status == 200
        assert not alive(pid)
        if script is ENDLESS:
            await client.head()
            told = await ending(client)
        else:
            told = (await client.answer()).text
    assert "unloaded by an operator" in told


async def test_s13_a_killed_server_has_stopped_not_failed():
    """A server that had to be killed counted as crashed and was not started again; here it is."""
    async with daemon({"a": scripted("--ignore-sigterm", unload_timeout=0.1)}) as served:
        for _ in range(2):
            assert await say(served.port, "a") == "a"
            assert (await fetch(served.port, "POST", f"{UNLOAD}/a")).status == 200
            assert await running(served.port) == {}


async def test_s17_an_unload_grants_the_grace(tmp_path):
    """An unload by hand killed at once, without any grace; here a server that needs a while to stop has it."""
    ends = tmp_path / "ends"
    async with daemon({"a": noting_its_end(ends, "--stop-delay", 0.5, unload_timeout=PATIENCE)}) as served:
        assert await say(served.port, "a") == "a"
        assert (await fetch(served.port, "POST", UNLOAD)).status == 200
        assert ends.read_text() == "0\n"


async def test_s17_an_unload_waits_for_its_command(tmp_path):
    """The command that stops the other nodes was cut off; here the unload ends when it has."""
    done = tmp_path / "done"
    code = (
        f"import os, signal, time; time.sleep(0.5); open({str(done)!r}, 'w'); os.kill(int('${{PID}}'), signal.SIGTERM)"
    )
    async with daemon({"a": scripted(cmd_stop=[*python(code)])}) as served:
        assert await say(served.port, "a") == "a"
        assert (await fetch(served.port, "POST", f"{UNLOAD}/a")).status == 200
        assert done.exists()


async def test_o2_a_server_behind_a_wrapper_is_stopped():
    """Only the wrapper was signalled, and the server's hold on its output kept the stop waiting for ever."""
    wrapper = ("bash", "-c", 'trap "" TERM; "$@" & wait; exit 0', "bash")
    model = wrapped(wrapper, "--ignore-sigterm", "--fork", "--setsid-child", unload_timeout=0.2)
    async with daemon({"a": model}) as served:
        assert await say(served.port, "a") == "a"
        family = await family_at(model.port)
        assert len(family.left) == 4, "the wrapper, the server, and its two children"
        assert (await fetch(served.port, "POST", f"{UNLOAD}/a")).status == 200
        assert family.left == []
        assert await refuses(model.port)


async def test_o3_o4_a_container_is_gone_before_its_name_is_used_again(tmp_path):
    """A container outlived the program that had started it, and the next start found its name in use."""
    container = tmp_path / "container"
    stop = (
        "import os, signal, time; os.kill(int('${PID}'), signal.SIGTERM);"
        f"time.sleep(0.2); os.unlink({str(container)!r})"
    )
    models = {
        "a": wrapped((*python(CONTAINER), str(container)), cmd_stop=[*python(stop)]),
        "b": scripted(max_wait=0.0),
    }
    async with daemon(models, turn_lease=0) as served:
        for name in "abaa":
            assert await say(served.port, name) == name
        assert (await fetch(served.port, "POST", UNLOAD)).status == 200
        assert await say(served.port, "a") == "a"
    assert not container.exists()


# ---- state that others see ---------------------------------------------------------------------------


async def test_s16_who_looks_gets_a_copy(nursery, autojump_clock):
    """The list of running models was read while it was written; here what was given out never changes."""
    group = make_group(Script())
    await nursery.start(group.run)
    async with group.lease("a"):
        [view, *_] = before = group.views()
        copy = list(before)
        with pytest.raises(attrs.exceptions.FrozenInstanceError):
            view.state = State.STOPPED
    await group.unload(("a",))

    assert before == copy
    assert view.state is State.READY
    nursery.cancel_scope.cancel()


# ---- queue and leases --------------------------------------------------------------------------------


async def test_w5_a_limit_is_told_before_a_stream_begins():
    """The 429 came after the stream had begun; here a streaming request over the limit gets a plain one."""
    model = scripted("--never-ready", concurrency_limit=1)
    async with daemon({"a": model}, heartbeat=0.01) as served, await connect(served.port) as waiting:
        await waiting.ask("POST", CHAT, chat("a", stream=True))
        assert (await waiting.head()).status_code == 200
        assert (await waiting.piece()).startswith(b": trioswap "), "its own stream has begun, without a model"
        answer = await fetch(served.port, "POST", CHAT, chat("a", stream=True))
    assert answer.status == 429
    assert int(answer["retry-after"]) >= 1
    assert answer.json()["error"]["code"] == "rate_limit_exceeded"


async def test_w6_nothing_is_loaded_for_those_who_left(tmp_path):
    """A queued request whose client had gone started a load for nobody; here a hundred leave, and nothing starts."""
    starts = tmp_path / "gpu"
    async with daemon({"a": scripted(), "b": on_gpu(starts)}) as served, await connect(served.port) as busy:
        await busy.ask("POST", CHAT, chat("a", **ENDLESS))
        await busy.piece_of_body()
        async with AsyncExitStack() as clients:
            for _ in range(100):
                client = await clients.enter_async_context(await connect(served.port))
                await client.ask("POST", CHAT, chat("b"))
            await eventually(partial(is_running, served.port, "b", waiting=100))
        await eventually(partial(is_stopped, served.port, "b"))
        await busy.stream.aclose()
        await eventually(partial(is_running, served.port, "a", serving=0))
        assert await say(served.port, "a") == "a"
        assert not starts.exists()


async def test_w7_whoever_leaves_gives_back_the_lease():
    """A grant to a client that had gone was counted for ever, and its model stayed; here all are given back."""
    rng = random.Random(7)
    async with daemon({"a": scripted("--ready-delay", 0.05), "b": scripted()}, turn_lease=0, linger=0) as served:

        async def leave_somewhere(name: str, seconds: float) -> None:
            async with await connect(served.port) as client:
                await client.ask("POST", CHAT, chat(name, **ENDLESS))
                with trio.move_on_after(seconds):
                    await client.piece_of_body()

        for _ in range(3):
            await at_once(partial(leave_somewhere, rng.choice("aaab"), rng.uniform(0, 0.5)) for _ in range(20))

        async def idle() -> bool:
            rows = (await running(served.port)).values()
            return all(row["serving"] == row["waiting"] == 0 for row in rows)

        await eventually(idle)
        for name in "abab":
            assert await say(served.port, name) == name


async def test_w8_a_limit_counts_only_what_models_serve():
    """Pages used up the limit of the server; here they are answered while every model is at its limit."""
    async with daemon({"a": scripted(concurrency_limit=1)}) as served, await connect(served.port) as busy:
        await busy.ask("POST", CHAT, chat("a", **ENDLESS))
        await busy.piece_of_body()
        assert await status(served.port, "a") == 429
        for path in ("/health", "/v1/models", "/running", "/logs", "/api/version"):
            answers = await at_once(partial(fetch, served.port, "GET", path) for _ in range(5))
            assert [answer.status for answer in answers] == [200] * 5


# ---- failures stay where they are ------------------------------------------------------------------------


async def test_k1_k2_k3_a_client_that_leaves_while_it_is_told_to_wait():
    """Who left during "loading ..." ended the process, by a writer that outlived its request; here nothing does."""
    async with daemon({"a": scripted("--never-ready")}, heartbeat=0.01) as served:

        async def leave_after(ticks: int) -> None:
            async with await connect(served.port) as client:
                await client.ask("POST", CHAT, chat("a", stream=True))
                for tick in range(ticks):
                    assert (await (client.piece() if tick else client.piece_of_body())).startswith(b": trioswap ")

        async def back() -> bool:
            await trio.testing.wait_all_tasks_blocked()
            return held() == baseline

        await fetch(served.port, "GET", "/health")
        await trio.testing.wait_all_tasks_blocked()
        baseline = held()
        await at_once(partial(leave_after, ticks) for ticks in [*range(10)] * 3)
        await fetch(served.port, "POST", UNLOAD)
        await eventually(back)
        assert (await fetch(served.port, "GET", "/health")).text == "OK"


# ---- time -----------------------------------------------------------------------------------------------------


async def test_b4_an_idle_daemon_sleeps(mock_clock):
    """Tickers used the CPU with nothing to do; here an idle daemon looks at itself every 5 s, and does little else."""
    wakes = 0
    with guarded():
        async with trio.open_nursery() as nursery:
            await nursery.start(serve, loads(document({"a": scripted(ttl=60)})), Logs())
            await trio.testing.wait_all_tasks_blocked()
            begun = trio.current_time()
            while trio.current_time() < begun + HOUR:
                wakes += 1
                await passes(mock_clock, min(trio.lowlevel.current_statistics().seconds_to_next_deadline, HOUR))
            mock_clock.rate = 1
            signal.raise_signal(signal.SIGTERM)
    assert wakes < HOUR / 4


async def test_b5_a_long_prefill_passes(mock_clock):
    """One constant bounded connection and first token, so long prompts failed; here an hour of silence passes."""
    mock_clock.rate = 1
    with guarded():
        async with by_hand() as server, trio.open_nursery() as nursery:
            [url] = await nursery.start(serve, loads(document({"a": server})), Logs())
            async with await connect(int(url.rpartition(":")[2])) as client:
                await client.ask("POST", CHAT, chat("a"))
                async with await server.accept() as model:
                    while await model.next_event() and model.parser.their_state is not h11.DONE:
                        pass
                    await passes(mock_clock, HOUR)
                    await model.stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nlate")
                    assert (await client.answer()).text == "late"
            await server.close()
            signal.raise_signal(signal.SIGTERM)


# ---- the page that maps rows to tests --------------------------------------------------------------------------

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "reliability.md"
ROW = re.compile(r"\| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|")
TEST = re.compile(r"`(test_\w+)::(test_\w+)`")
# How many rows of the reference have each letter; those of other projects have names.
LETTERS = {"S": 19, "W": 8, "O": 6, "K": 4, "B": 5, "R": 3, "L": 17}
OTHERS = 24


def rows() -> dict[str, str]:
    """The last column of the tables by the first."""
    found = [match.groups() for match in map(ROW.fullmatch, PAGE.read_text().splitlines()) if match]
    return {first: last for first, _, _, last in found if first != "id"}


def functions_of(module: str) -> set[str]:
    functions = ast.walk(ast.parse((TESTS / f"{module}.py").read_text()))
    return {node.name for node in functions if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_every_row_of_the_reference_is_there():
    """None is left out, and each has a test or says why not."""
    found = rows()
    numbered = [f"{letter}{number}" for letter, count in LETTERS.items() for number in range(1, count + 1)]

    assert [row for row in found if re.fullmatch(r"[A-Z][0-9]+", row)] == numbered
    assert len(found) == len(numbered) + OTHERS
    for row, last in found.items():
        assert TEST.search(last) or last.startswith(("not yet: ", "does not apply: ")), row


def test_every_test_of_the_page_is_there():
    """Whoever renames one corrects the page."""
    named = {test for last in rows().values() for test in TEST.findall(last)}

    assert sorted(named - {(module, test) for module, _ in named for test in functions_of(module)}) == []


def test_every_test_here_is_in_its_row():
    """In the row of each id that its name begins with."""
    found = rows()
    for module in sorted(file.stem for file in TESTS.glob("test_known_bugs*.py")):
        for test in sorted(functions_of(module)):
            ids = re.match(r"test_((?:[a-z][0-9]+_)+)", test)
            named = [row for row, last in found.items() if (module, test) in TEST.findall(last)]
            if ids is not None:
                assert {word.upper() for word in ids[1].split("_")[:-1]} <= {*named}, test
            elif test.startswith("test_") and not test.startswith("test_every_"):
                project = named[0].split("#")[0].split()[0].lower() if named else "in no row"
                assert test.startswith(f"test_{re.sub('[^a-z]', '_', project)}"), test
