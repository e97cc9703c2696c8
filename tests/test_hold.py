"""Memory lent to programs that are not ours: over HTTP, and by `trioswap hold` with a real child."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
from children import PATIENCE, alive, free_port, python, read_until, wait_gone
from commands import TRIOSWAP, trioswap
from commands import daemon as daemon_process
from daemons import chat, connect, daemon, eventually, fetch, is_running, running, scripted, write_config

from trioswap.memory import Memory

CHAT = "/v1/chat/completions"
GIB = 2**30
# Eight of memory, whatever this machine has; nothing is measured.
MEMORY = {"headroom": 0, "learn": False, "devices": {"ram": "8GiB"}}
GPUS = {"headroom": 0, "learn": False, "devices": {"gpu0": "8GiB", "gpu1": "6GiB", "ram": "8GiB"}}
BUSY = {"stream": True, "chunks": 10**6, "chunk_delay": 0.01}


def body(**wish: object) -> bytes:
    return json.dumps(wish).encode()


async def lent(port: int) -> dict[str, dict[str, int]]:
    """What is lent, by label."""
    rows = (await fetch(port, "GET", "/api/queue")).json()["lent"]
    return {row["label"]: row["holding"] for row in rows}


async def is_lent(port: int, **wanted: dict[str, int]) -> bool:
    return await lent(port) == wanted


async def waiting(port: int) -> list[dict]:
    return (await fetch(port, "GET", "/api/queue")).json()["waiting"]


async def somebody_waits(port: int, model: str) -> bool:
    return any(row["model"] == model for row in await waiting(port))


def message(answer) -> str:
    return answer.json()["error"]["message"]


# ---- over HTTP ---------------------------------------------------------------------------------


async def test_memory_is_lent_until_the_client_leaves():
    """One line when it is there; who fits beside it is served, who does not is told at once; then all is free."""
    models = {"small": scripted(memory="3GiB"), "big": scripted(memory="7GiB")}
    async with daemon(models, memory=MEMORY) as served:
        async with await connect(served.port) as holder:
            await holder.ask("POST", "/api/hold", body(memory="5GiB", label="training"))
            head = await holder.head()
            assert (head.status_code, dict(head.headers)[b"content-type"]) == (200, b"application/x-ndjson")
            terms = json.loads(await holder.piece())
            assert terms == {"label": "training", "holding": {"ram": 5 * GIB}, "environment": {}}
            [row] = (await fetch(served.port, "GET", "/api/queue")).json()["lent"]
            assert row == {"label": "training", "holding": {"ram": 5 * GIB}, "since": row["since"]}
            assert row["since"] > 1_700_000_000

            assert (await fetch(served.port, "POST", CHAT, chat("small"))).status == 200
            refused = await fetch(served.port, "POST", CHAT, chat("big"))
            assert (refused.status, refused["retry-after"]) == (503, "60")
            assert message(refused) == ('model "big" cannot start: the memory it needs is held by training')
            assert await lent(served.port) == {"training": {"ram": 5 * GIB}}
            listed = (await fetch(served.port, "GET", "/v1/models")).json()["data"]
            assert [model["id"] for model in listed] == ["big", "small"], "what is lent is no model"
            assert (await running(served.port)).keys() == {"small"}
        await eventually(partial(is_lent, served.port))
        assert (await fetch(served.port, "POST", CHAT, chat("big"))).status == 200


async def test_who_has_nothing_to_do_goes_for_it():
    """An idle model is put out at once, with its reason in the decisions."""
    async with daemon({"a": scripted(memory="6GiB")}, memory=MEMORY) as served, await connect(served.port) as holder:
        await fetch(served.port, "POST", "/api/models/load/a")
        await holder.ask("POST", "/api/hold", body(memory=4 * GIB))
        assert json.loads(await holder.piece_of_body())["label"] == "hold-1"
        assert await running(served.port) == {}
        decisions = (await fetch(served.port, "GET", "/api/queue")).json()["decisions"]
        [evicted] = [entry for entry in decisions if entry["what"] == "evict"]
        assert "for hold-1, waited" in evicted["why"]


async def test_while_it_waits_it_is_a_request_like_any_other():
    """It has a row under its label, waits for who works, leaves no trace if it gives up, and has its turn."""
    async with (
        daemon({"a": scripted(memory="6GiB")}, memory=MEMORY) as served,
        await connect(served.port) as busy,
        await connect(served.port) as holder,
    ):
        await busy.ask("POST", CHAT, chat("a", **BUSY))
        await busy.head()
        async with await connect(served.port) as impatient:
            await impatient.ask("POST", "/api/hold", body(memory="4GiB", label="no patience"))
            await eventually(partial(somebody_waits, served.port, "no patience"))
        await eventually(lambda: nobody_waits(served.port))

        await holder.ask("POST", "/api/hold", body(memory="4GiB", label="training"))
        await eventually(partial(somebody_waits, served.port, "training"))
        row = (await fetch(served.port, "GET", "/api/queue/training")).json()
        assert (row["request"], row["model"], row["stage"], row["waits_for"]) == (
            "training",
            "training",
            "queued",
            ["a"],
        )
        assert await lent(served.port) == {}
        assert await is_running(served.port, "a", serving=1)

        await busy.stream.aclose()
        assert json.loads(await holder.piece_of_body())["holding"] == {"ram": 4 * GIB}
        assert await running(served.port) == {}


async def nobody_waits(port: int) -> bool:
    return not await waiting(port)


async def test_a_model_waits_for_who_waits_before_it():
    """A model that needs what is promised, and not lent yet, waits for it like for any other."""
    models = {"a": scripted(memory="6GiB"), "b": scripted(memory="6GiB")}
    async with (
        daemon(models, memory=MEMORY) as served,
        await connect(served.port) as holder,
        await connect(served.port) as client,
    ):
        async with await connect(served.port) as busy:
            await busy.ask("POST", CHAT, chat("a", **BUSY))
            await busy.head()
            await holder.ask("POST", "/api/hold", body(memory="2GiB"))
            await holder.piece_of_body()
            await client.ask("POST", CHAT, chat("b"))
            await eventually(partial(is_running, served.port, "b", waiting=1))
        assert (await client.answer()).status == 200
        assert await lent(served.port) == {"hold-1": {"ram": 2 * GIB}}


async def test_what_others_hold_is_not_to_be_had():
    """Nobody takes it from them, so that is said at once."""
    async with daemon({"a": scripted(memory="1GiB")}, memory=MEMORY) as served, await connect(served.port) as first:
        await first.ask("POST", "/api/hold", body(memory="5GiB", label="first"))
        await first.piece_of_body()
        refused = await fetch(served.port, "POST", "/api/hold", body(memory="4GiB", label="second"))
        assert (refused.status, refused["retry-after"]) == (503, "60")
        assert message(refused) == ("the memory for second is not to be had: the memory it needs is held by first")
        assert await lent(served.port) == {"first": {"ram": 5 * GIB}}


async def test_names_tell_borrowers_apart():
    """Without a label they are numbered; the same label twice gets a number, too."""
    async with daemon({"a": scripted(memory="1GiB")}, memory=MEMORY) as served, trio.open_nursery() as nursery:

        async def borrow(wish: bytes, task_status) -> None:
            async with await connect(served.port) as client:
                await client.ask("POST", "/api/hold", wish)
                task_status.started(json.loads(await client.piece_of_body())["label"])
                await trio.sleep_forever()

        wishes = [{}, {"label": "x"}, {"label": "x"}, {}, {"label": "hold-3"}, {}]
        labels = [await nursery.start(borrow, body(memory="1GiB", **wish)) for wish in wishes]
        assert labels == ["hold-1", "x", "x-2", "hold-2", "hold-3", "hold-4"]
        nursery.cancel_scope.cancel()


async def test_devices_are_chosen_or_named(monkeypatch):
    """Any GPU with most room, the one named, ram, or several at once; the environment is that of a server there."""
    monkeypatch.setattr(Memory, "environment", lambda self, holding: {"GPUS": ",".join(holding)})
    wishes = [
        ({"memory": "5GiB"}, {"gpu0": 5 * GIB}),
        ({"memory": "3GiB", "device": "auto"}, {"gpu1": 3 * GIB}),
        ({"memory": "1GiB", "device": "gpu0"}, {"gpu0": GIB}),
        ({"memory": 512, "device": "ram"}, {"ram": 512}),
        ({"memory": {"gpu0": "1GiB", "gpu1": "1GiB", "ram": "2GiB"}}, {"gpu0": GIB, "gpu1": GIB, "ram": 2 * GIB}),
    ]
    async with daemon({"a": scripted(memory="1GiB")}, memory=GPUS) as served, trio.open_nursery() as nursery:

        async def borrow(wish: dict, task_status) -> None:
            async with await connect(served.port) as client:
                await client.ask("POST", "/api/hold", body(**wish))
                task_status.started(json.loads(await client.piece_of_body()))
                await trio.sleep_forever()

        for wish, holding in wishes:
            terms = await nursery.start(borrow, wish)
            assert (terms["holding"], terms["environment"]) == (holding, {"GPUS": ",".join(holding)})
        nursery.cancel_scope.cancel()


SIZES = 'allowed is a whole number of bytes from 0 up, or text such as "18GiB", "512MiB", "2GB"'


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        (b"{", ["the body is not JSON"]),
        (b"[" * 100_000, ["the body is not JSON"]),
        (b"[1]", ['the body must be a JSON object such as {"memory": "12GiB"}']),
        (b"{}", [f"memory: found nothing, {SIZES}, or an object of such sizes by device"]),
        (body(memory={}), ["memory: found nothing"]),
        (body(memory="12"), [f'memory: found "12", {SIZES}']),
        (body(memory=-1), [f"memory: found -1, {SIZES}"]),
        (body(memory=True), ["memory: found true"]),
        (b'{"memory": NaN}', ["memory: found nan"]),
        (body(memory=["1GiB"]), ["memory: found an array"]),
        (body(memory="9GiB"), ["memory: found 9 GiB on gpu0, allowed is at most 8GiB on gpu0 or at most 6GiB on gpu1"]),
        (body(memory="7GiB", device="gpu1"), ["memory: found 7 GiB on gpu1, allowed is at most 6GiB on gpu1"]),
        (
            body(memory={"gpu0": "1GiB", "ram": "9GiB"}),
            ["memory: found 1 GiB on gpu0 and 9 GiB on ram, allowed is at most 8GiB on gpu0 or at most 8GiB on ram"],
        ),
        (
            body(memory={"gpu2": "1GiB", "ram": None}),
            ['memory.gpu2: found "gpu2", allowed is "gpu0"', "memory.ram: found null"],
        ),
        (
            body(memory="1GiB", device="gpu"),
            ['device: found "gpu", allowed is "auto" or "gpu0" or "gpu1" or "ram", did you mean "gpu'],
        ),
        (body(memory="1GiB", device=0), ["device: found 0, allowed is"]),
        (body(memory={"ram": 1}, device="ram"), ["device: found beside an object of memory by device"]),
        (body(memory="1GiB", lable="x"), ['lable: unknown key, did you mean "label"?']),
        (body(memory="1GiB", zzz=1), ["zzz: unknown key, allowed are memory, device, label"]),
        (
            body(memory="x", device="y", label=""),
            ["device: found", 'label: found "", allowed is text of 1 to 100', "memory: found"],
        ),
        (body(memory=1, label="a"), ['label: found "a", allowed is text', "but no model's name"]),
        (body(memory=1, label="nick"), ['label: found "nick"']),
        (body(memory=1, label="two\nlines"), ["label: found"]),
        (body(memory=1, label="x" * 101), ["label: found"]),
        (body(memory=1, label=5), ["label: found 5"]),
    ],
    ids=lambda value: None if isinstance(value, bytes) else value[0][:40],
)  # fmt: skip
async def test_what_is_wrong_with_a_wish_is_said(wish, said):
    """Every mistake, with its key, what was found and what is allowed; nothing is lent."""
    async with daemon({"a": scripted(memory="1GiB", aliases=["nick"])}, memory=GPUS) as served:
        answer = await fetch(served.port, "POST", "/api/hold", wish)
        assert answer.status == 400
        text = message(answer)
        assert [part for part in said if part not in text] == [], text
        assert len(text) < 700
        assert await lent(served.port) == {}


async def test_where_memory_is_not_counted_none_is_lent():
    """Groups alone say nothing about bytes: 409, and how to change that."""
    async with daemon({"a": scripted()}) as served:
        answer = await fetch(served.port, "POST", "/api/hold", body(memory="1GiB"))
    assert answer.status == 409
    assert "write [memory] into the configuration" in message(answer)


async def test_the_end_of_the_daemon_ends_the_loan(tmp_path):
    """SIGTERM ends the answer cleanly, and the daemon does not wait for the borrower."""
    config = write_config(tmp_path, {"a": scripted(memory="1GiB", unload_drain_timeout=1000)}, memory=MEMORY)
    async with daemon_process("serve", "-c", config) as served, await connect(served.port) as holder:
        await holder.ask("POST", "/api/hold", body(memory="1GiB"))
        await holder.piece_of_body()
        assert await served.stop() == 0
        assert await holder.rest() == b""


# ---- the command -------------------------------------------------------------------------------

# Says that it runs, waits for a line, and ends with 7; without a line, with 0.
WORK = 'import sys; print("runs", flush=True); sys.exit(7 if sys.stdin.readline() else 0)'


@asynccontextmanager
async def hold(port: int, *arguments: str, code: str = WORK, until: str = "runs\n") -> AsyncIterator[trio.Process]:
    """Run `trioswap hold ARGUMENTS -- python -c CODE`; the block begins when the child has written *until*."""
    argv = (*TRIOSWAP, "hold", *arguments, "--url", f"http://127.0.0.1:{port}", "--", *python(code))
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = await trio.lowlevel.open_process(argv, **pipes, start_new_session=True)
    try:
        with trio.fail_after(PATIENCE):
            await read_until(process, until)
        yield process
    finally:
        # The whole session: nothing of a failed test is left.
        with trio.move_on_after(PATIENCE, shield=True):
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            await trio.aclose_forcefully(stream)


async def end_of(process: trio.Process) -> int:
    with trio.fail_after(PATIENCE):
        return await process.wait()


async def said(process: trio.Process) -> str:
    """What it has written to stderr, at its end."""
    with trio.fail_after(PATIENCE):
        return b"".join([data async for data in process.stderr]).decode()


async def test_a_command_runs_with_memory_held_for_it():
    """Held while it lives, models that need it are refused; its exit code is passed on, and all is free."""
    async with daemon({"big": scripted(memory="7GiB")}, memory=MEMORY) as served:
        async with hold(served.port, "2GiB", "--label", "training") as process:
            assert await lent(served.port) == {"training": {"ram": 2 * GIB}}
            refused = await fetch(served.port, "POST", CHAT, chat("big"))
            assert refused.status == 503
            assert "held by training" in message(refused)
            await process.stdin.send_all(b"\n")
            assert await end_of(process) == 7
            assert await said(process) == ""
        await eventually(partial(is_lent, served.port))
        assert (await fetch(served.port, "POST", CHAT, chat("big"))).status == 200


async def test_without_a_label_the_command_is_named():
    """With its process, so that one can find who holds the memory."""
    async with daemon({"a": scripted(memory="1GiB")}, memory=MEMORY) as served, hold(served.port, "1024") as process:
        name = f"{Path(sys.executable).name} (pid {process.pid})"
        assert await lent(served.port) == {name: {"ram": 1024}}


async def test_killed_it_lets_go_of_the_memory():
    """SIGKILL leaves no chance to say so; the daemon sees the connection go."""
    async with daemon({"a": scripted(memory="1GiB")}, memory=MEMORY) as served:
        async with hold(served.port, "2GiB", "--label", "x") as process:
            pass  # killed at the end of the block, with its child
        assert process.returncode == -signal.SIGKILL
        await eventually(partial(is_lent, served.port))


async def test_killed_alone_it_leaves_the_command():
    """The command is not ours to end; it goes on without the memory."""
    async with (
        daemon({"a": scripted(memory="1GiB")}, memory=MEMORY) as served,
        hold(served.port, "2GiB", code=WORK) as process,
    ):
        [child] = map(int, children_of(process.pid))
        process.kill()
        assert await end_of(process) == -signal.SIGKILL
        await eventually(partial(is_lent, served.port))
        assert alive(child)
        await process.stdin.send_all(b"\n")
        await wait_gone(child)


def children_of(pid: int) -> list[str]:
    """Of all its threads."""
    return [child for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]


CATCHES = (
    "import signal, sys\n"
    "signal.signal(signal.SIGTERM, lambda *_: sys.exit(9))\n"
    "try:\n    print('runs', flush=True); signal.pause()\n"
    "except KeyboardInterrupt:\n    sys.exit(5)"
)


@pytest.mark.parametrize(
    ("code", "number", "group", "result"),
    [
        (CATCHES, signal.SIGTERM, False, 9),
        (WORK, signal.SIGTERM, False, 128 + signal.SIGTERM),
        (CATCHES, signal.SIGINT, True, 5),
    ],
    ids=["SIGTERM is passed on", "and kills", "Ctrl-C reaches both"],
)
async def test_signals_are_the_commands(code, number, group, result):
    """What the command makes of a signal is the result; 128 + n when it dies of it.  Then the memory is free."""
    async with daemon({"a": scripted(memory="1GiB")}, memory=MEMORY) as served:
        async with hold(served.port, "2GiB", code=code) as process:
            (os.killpg if group else os.kill)(process.pid, number)
            assert await end_of(process) == result
            assert await said(process) == ""
        await eventually(partial(is_lent, served.port))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_it_says_what_it_waits_for_and_can_be_told_to_stop(number):
    """After a second it says so on stderr; a signal ends it before the command was run."""
    async with daemon({"a": scripted(memory="6GiB")}, memory=MEMORY) as served, await connect(served.port) as busy:
        await busy.ask("POST", CHAT, chat("a", **BUSY))
        await busy.head()
        async with hold(served.port, "4GiB", "--label", "x", until="") as process:
            line = b""
            with trio.fail_after(PATIENCE):
                while not line.endswith(b"\n"):
                    line += await process.stderr.receive_some()
            assert line.startswith(b"trioswap: waiting for 4 GiB: queued, place 1, waits for a; about ")
            process.send_signal(number)
            assert await end_of(process) == 128 + number
            assert await process.stdout.receive_some() == b""
            assert await said(process) == ""
        await eventually(lambda: nobody_waits(served.port))
        assert await is_running(served.port, "a", serving=1)


async def test_the_command_goes_on_when_the_daemon_goes(tmp_path):
    """A line on stderr says so, and the exit code is still the command's."""
    config = write_config(tmp_path, {"a": scripted(memory="1GiB")}, memory=MEMORY)
    async with daemon_process("serve", "-c", config) as served, hold(served.port, "2GiB") as process:
        assert await served.stop() == 0
        with trio.fail_after(PATIENCE):
            line = (await process.stderr.receive_some()).decode()
        assert (
            line
            == f"trioswap: the daemon at {served.url} has gone, and holds no memory any more; the command goes on\n"
        )
        await process.stdin.send_all(b"\n")
        assert await end_of(process) == 7


async def test_the_command_sees_the_devices_it_holds(monkeypatch):
    """What the daemon says of the environment is put into that of the command, beside its own."""
    monkeypatch.setattr(Memory, "environment", lambda self, holding: {"GPUS": ",".join(holding)})
    monkeypatch.setenv("OWN", "kept")
    code = "import os, sys; print(os.environ['GPUS'], os.environ['OWN'], flush=True); sys.stdin.read()"
    async with (
        daemon({"a": scripted(memory="1GiB")}, memory=GPUS) as served,
        hold(served.port, "1GiB", "--device", "gpu1", code=code, until="gpu1 kept\n"),
    ):
        assert list((await lent(served.port)).values()) == [{"gpu1": GIB}]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("12 gigs", "--", sys.executable), 2, 'MEMORY: found "12 gigs", allowed is a whole number of bytes'),
        (("1GiB", "--", "/nonexistent/program"), 2, 'COMMAND: found "/nonexistent/program", allowed is a program'),
        (("1GiB",), 2, "COMMAND"),
        (("9GiB", "--", sys.executable), 1, "memory: found 9 GiB on ram, allowed is at most 8GiB on ram"),
        (("1GiB", "--device", "gpu0", "--", sys.executable), 1, 'device: found "gpu0", allowed is "auto" or "ram"'),
    ],
)
async def test_mistakes_run_nothing(arguments, code, words):
    """2 for what we see ourselves, 1 for what the daemon says; one sentence, and no command was run."""
    async with daemon({"a": scripted(memory="1GiB")}, memory=MEMORY) as served:
        url = f"http://127.0.0.1:{served.port}"
        done = await trioswap("hold", "--url", url, *arguments, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout) == (code, "")
    assert words in done.stderr
    assert "Traceback" not in done.stderr


async def test_a_program_that_is_no_program(tmp_path):
    """What the kernel refuses to run is a mistake, too, and the memory that was there for it is given back."""
    script = tmp_path / "script"
    script.write_bytes(b"\x00")
    script.chmod(0o755)
    async with daemon({"a": scripted(memory="1GiB")}, memory=MEMORY) as served:
        done = await trioswap("hold", "--url", f"http://127.0.0.1:{served.port}", "1GiB", "--", str(script))
        assert (done.returncode, done.stdout) == (2, "")
        assert "trioswap: cannot run " in done.stderr
        assert "Exec format error" in done.stderr
        await eventually(partial(is_lent, served.port))


async def test_no_daemon_no_command():
    """Without a daemon the command is not run, and the URL is named."""
    url = f"http://127.0.0.1:{free_port()}"
    done = await trioswap("hold", "1GiB", "--url", url, "--", *python("print('ran')"))

    assert (done.returncode, done.stdout) == (1, "")
    assert f"at {url}: connection refused" in done.stderr


async def test_another_program_at_the_url():
    """A server that is not trioswap lends nothing."""

    async def answer(stream) -> None:
        await stream.receive_some()
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nOK")

    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, answer, [listener])
        url = f"http://127.0.0.1:{listener.socket.getsockname()[1]}"
        done = await trioswap("hold", "1GiB", "--url", url, "--", *python("print('ran')"))
        nursery.cancel_scope.cancel()

    assert (done.returncode, done.stdout) == (1, "")
    assert "is not trioswap" in done.stderr
