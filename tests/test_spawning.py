"""What becomes of a start when we, or the machine, lack what every start needs: no model is blamed for that."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import pytest
import trio
from attempts import attempt
from children import PATIENCE, free_port, model_argv
from commands import daemon as command
from daemons import chat, connect, fetch, running, scripted, write_config
from fakes import spec
from test_proctree import no_descriptors

from trioswap.circuit import Circuit
from trioswap.config.schema import ModelHooks
from trioswap.errors import NothingLeftToStart, StartFailed
from trioswap.limits import Limits
from trioswap.readiness import Health
from trioswap.remote import Prober
from trioswap.spawning import shortage

CHAT = "/v1/chat/completions"


@pytest.fixture
async def prober() -> AsyncIterator[Prober]:
    prober = Prober()
    yield prober
    await prober.aclose()


@contextmanager
def no_descriptor_left(pid: int) -> Iterator[None]:
    """The process *pid* gets no new one while the block runs."""
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    taken = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}  # noqa: PTH208 - as text
    lowest = next(number for number in range(len(taken) + 1) if number not in taken)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (lowest, limits[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)


async def test_a_daemon_without_descriptors_says_so_and_tries_again(tmp_path):
    """503 with what to do and when to come again; the circuit of the model stays closed, and nobody else suffers."""
    path = write_config(tmp_path, {"a": scripted(), "b": scripted()}, backoff="1h", backoff_max="1h")
    async with command("serve", "-c", path) as served:
        assert (await fetch(served.port, "POST", CHAT, chat("b"))).status == 200
        with trio.fail_after(PATIENCE):
            async with await connect(served.port) as client:
                await client.ask("GET", "/health")
                assert (await client.answer()).status == 200
                client.parser.start_next_cycle()
                with no_descriptor_left(served.process.pid):
                    await client.ask("POST", CHAT, chat("a"))
                    answer = await client.answer()
        assert (answer.status, answer["retry-after"]) == (503, "5")
        message = answer.json()["error"]["message"]
        assert "no file descriptor left; raise LimitNOFILE of its service, or `ulimit -n`" in message
        assert "no fault of the model's" in message
        assert "a" not in await running(served.port), "whose circuit is open has a row there"
        assert (await fetch(served.port, "POST", CHAT, chat("a"))).status == 200
        assert (await fetch(served.port, "POST", CHAT, chat("b"))).status == 200


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.EMFILE, "LimitNOFILE"),
        (errno.ENFILE, "fs.file-max"),
        (errno.EAGAIN, "TasksMax"),
        (errno.ENOMEM, "the kernel has no memory left"),
    ],
)
async def test_each_shortage_has_its_advice(prober, monkeypatch, number, advice):
    """The start fails at once, as ours."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(subprocess, "Popen", refuse)
    failure = await attempt(("true",), prober, check_endpoint=None).run()

    assert isinstance(failure, NothingLeftToStart)
    assert advice in failure.message
    assert "/logs/" not in failure.message, "there is nothing to read"


async def test_no_thread_to_be_had_is_a_shortage(prober, monkeypatch):
    """As with too many processes; nothing waits for a thread that never began."""

    async def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(trio.to_thread, "run_sync", refuse)
    with trio.fail_after(PATIENCE):
        failure = await attempt(("true",), prober, check_endpoint=None, health_check_timeout=10 * PATIENCE).run()

    assert isinstance(failure, NothingLeftToStart)
    assert "TasksMax" in failure.message


@pytest.mark.parametrize("name", ["before_start", "after_ready"])
async def test_a_hook_that_cannot_be_run_for_that_reason(prober, monkeypatch, name):
    """It is no failure of the model either; one that is missing is."""
    real = subprocess.Popen

    def refuse_hooks(argv: list[str], **options: object) -> object:
        if argv[0] == "the-hook":
            raise OSError(errno.EMFILE, "too many open files")
        return real(argv, **options)

    hooks = ModelHooks(**{name: ("the-hook",)})
    assert type(await attempt(("sleep", "60"), prober, check_endpoint=None, hooks=hooks).run()) is StartFailed
    monkeypatch.setattr(subprocess, "Popen", refuse_hooks)
    trial = attempt(("sleep", "60"), prober, check_endpoint=None, hooks=hooks)
    assert isinstance(await trial.run(), NothingLeftToStart)
    assert trial.nothing_left


def test_what_is_wrong_with_the_program_is_its_own():
    """Neither a missing file nor one that is no program is a shortage."""
    for number in (errno.ENOENT, errno.EACCES, errno.ENOEXEC, errno.E2BIG):
        assert shortage(OSError(number, os.strerror(number))) is None
    assert shortage(ValueError("embedded null byte")) is None


def test_a_circuit_counts_no_start_that_could_not_be_tried():
    """It is told to those who wait, and a row of real failures goes on as if it had not been."""
    circuit, ours = Circuit(), NothingLeftToStart("m", "there is none left")
    circuit.failed(ours, 1.0, 60.0, 0.0)
    assert not circuit.is_open(0.0)
    assert circuit.refusal(0.0) is not ours
    assert (circuit.refusal(0.0).message, circuit.refusal(0.0).retry_after) == (ours.message, ours.retry_after)
    delays = []
    for failure in (StartFailed("m", "broken"), ours, StartFailed("m", "broken")):
        circuit.failed(failure, 1.0, 60.0, 100.0)
        delays.append(circuit.retry_in(100.0))
    assert delays == [1.0, 1.0, 2.0]


async def test_a_server_that_we_cannot_ask_is_not_hanging(autojump_clock):
    """Without a descriptor no probe is made: that is no miss, and the servers live on."""
    answers = ["too many open files", "no", "too many open files", "no", "no", "too many open files in system"]
    answers += ["no", "no", "no", "never asked"]

    class Told:
        async def ready(self, _: str) -> str:
            return answers.pop(0)

    limits = Limits(spec("m", liveness=1.0, liveness_misses=3))
    assert await Health("", Told()).wait_dead(limits, lambda: False) == 3
    assert answers == ["never asked"]


async def test_a_probe_without_a_descriptor_says_so(prober):
    """In the words that the test above uses, from the kernel through all layers."""
    async with trio.open_nursery() as nursery:
        server = attempt(model_argv("m", port=(port := free_port())), prober, port=port, unload_timeout=PATIENCE)
        nursery.start_soon(server.run)
        await server.wait_ready()
        health = Health(f"http://127.0.0.1:{port}/health", prober)
        with no_descriptors():
            assert not await health._is_well()
        assert health._could_not_ask
        assert await health._is_well()
        os.kill(server.process.pid, signal.SIGKILL)
