"""How a service manager stops a service: real daemons with real families, and the signals that systemd would send.

KillMode=mixed       SIGTERM to the daemon alone; in the end SIGKILL to everybody (systemd.kill(5))
KillMode=control-group   SIGTERM to everybody at once, model servers and guardian included; in the end the same
"""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from functools import partial

import attrs
import pytest
import trio
from attempts import attempt, is_reaped
from children import PATIENCE, alive, free_port, model_argv, python, wait_gone
from commands import Daemon
from commands import daemon as command
from daemons import chat, connect, ending, eventually, fetch, is_running, pid_of, scripted, write_config
from test_daemon import family_at, refuses
from test_guardian import carriers, guardian_of, guardians_of

from trioswap import process, proctree
from trioswap.remote import Prober

pytestmark = pytest.mark.skipif(not proctree.PROC.joinpath("self/stat").exists(), reason="there is no /proc")

CHAT = "/v1/chat/completions"


@attrs.frozen
class Service:
    """A daemon as its service manager knows it: some processes in a control group."""

    served: Daemon
    instance: str
    guardian: int
    servers: list[int]
    """The processes of all model servers."""

    @property
    def group(self) -> list[int]:
        """Everybody."""
        return [*self.servers, self.guardian, self.served.process.pid]

    async def terminate(self, leaders: Iterable[int]) -> None:
        """SIGTERM to everybody in the worst order: *leaders* have ended before the daemon can notice anything."""
        self.kill(signal.SIGSTOP, [self.served.process.pid])
        self.kill(signal.SIGTERM)
        for pid in leaders:
            await wait_gone(pid)
        self.kill(signal.SIGCONT, [self.served.process.pid])

    def kill(self, number: int, pids: Iterable[int] | None = None) -> None:
        for pid in self.group if pids is None else pids:
            os.kill(pid, number)

    async def wait_ended(self) -> int:
        """The exit code, once nothing is left."""
        with trio.fail_after(PATIENCE):
            code = await self.served.process.wait()
        for pid in self.group:
            await wait_gone(pid)
        assert carriers(self.instance) == []
        assert guardians_of(self.instance) == []
        return code


@asynccontextmanager
async def service(path: str, *ports: int) -> AsyncIterator[Service]:
    """A daemon whose models at *ports* have been loaded."""
    async with command("serve", "-c", path) as served:
        servers, instance = list[int](), ""
        for number, port in enumerate(ports):
            assert (await fetch(served.port, "POST", CHAT, chat("ab"[number]))).status == 200
            family = await family_at(port)
            servers += [process.pid for process in family.left]
            instance = family.marker.partition("-")[0]
        guardian = await guardian_of(instance)
        yield Service(served, instance, guardian, servers)


TOGETHER = {"groups": {"all": {"members": ["a", "b"], "swap": False}}}


async def test_mixed_leaves_the_stop_to_us(tmp_path):
    """Each server gets its own signal from us, and all the time that it needs; its children too."""
    note = tmp_path / "note"
    code = f"""
import os, signal, sys, threading
if os.fork() == 0:
    def stop(*_):
        threading.Event().wait(0.2)
        os.write(os.open({str(note)!r}, os.O_CREAT | os.O_WRONLY), b"SIGINT and time")
        os._exit(0)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, stop)
    signal.alarm(120)
    while True:
        signal.pause()
os.execv(sys.argv[1], sys.argv[1:])
"""
    port = free_port()
    cmd = [*python(code), *model_argv("a", port=port)]
    model = {"cmd": cmd, "proxy": f"http://127.0.0.1:{port}", "stop_signal": "SIGINT", "unload_timeout": PATIENCE}
    async with service(write_config(tmp_path, {"a": model}), port) as played:
        assert len(played.servers) == 2
        played.kill(signal.SIGTERM, [played.served.process.pid])
        assert await played.wait_ended() == 0
    assert note.read_text() == "SIGINT and time"


async def test_control_group_is_no_crash(tmp_path, capfd):
    """Servers that have heard SIGTERM before we have did not crash, and nobody starts them again."""
    ports = [free_port(), free_port()]
    models = {name: scripted("--fork", port=port, unload_timeout=0.5) for name, port in zip("ab", ports, strict=True)}
    async with service(write_config(tmp_path, models, **TOGETHER), *ports) as played:
        await played.terminate([await pid_of(port) for port in ports])
        assert await played.wait_ended() == 0
    assert_no_crash(capfd.readouterr().err, starts=2)


async def test_control_group_during_requests(tmp_path, capfd):
    """A stream is broken off, who was not answered yet and who waits are told, and nothing starts for them."""
    ports = [free_port(), free_port()]
    models = {name: scripted(port=port) for name, port in zip("ab", ports, strict=True)}
    models["c"] = scripted()
    groups = {"x": {"members": ["a"]}, "y": {"members": ["b", "c"], "exclusive": False}}
    path = write_config(tmp_path, models, groups=groups, backoff=0)
    async with service(path, *ports) as played, trio.open_nursery() as nursery:
        answers = list[int]()
        stream = await connect(played.served.port)
        await stream.ask("POST", CHAT, chat("a", stream=True, chunks=10**6, chunk_delay=0.01))
        assert await stream.piece_of_body()
        nursery.start_soon(note_status, played.served.port, "b", answers)
        await eventually(partial(is_running, played.served.port, "b", serving=1))
        nursery.start_soon(note_status, played.served.port, "c", answers)
        await eventually(partial(is_running, played.served.port, "c", waiting=1))
        await played.terminate(played.servers)
        async with stream:
            assert await ending(stream)
        assert await played.wait_ended() == 0
    assert answers == [503, 503]
    assert_no_crash(capfd.readouterr().err, starts=2)


async def note_status(port: int, model: str, answers: list[int]) -> None:
    answers.append((await fetch(port, "POST", CHAT, chat(model, hold=True))).status)


async def test_control_group_while_loading(tmp_path, capfd):
    """A server that ends while it loads, because everybody is told to, is no failed start."""
    port = free_port()
    path = write_config(tmp_path, {"a": scripted("--never-ready", port=port)})
    async with command("serve", "-c", path) as served, trio.open_nursery() as nursery:
        answers = list[int]()
        nursery.start_soon(note_status, served.port, "a", answers)
        pid = 0

        async def is_up() -> bool:
            nonlocal pid
            try:
                pid = await pid_of(port)
            except OSError:
                return False
            return True

        await eventually(is_up)
        served.process.send_signal(signal.SIGSTOP)
        served.process.terminate()
        os.kill(pid, signal.SIGTERM)
        await wait_gone(pid)
        served.process.send_signal(signal.SIGCONT)
        assert await served.stop() == 0
    assert answers == [503]
    assert_no_crash(capfd.readouterr().err, starts=1)


def assert_no_crash(said: str, *, starts: int) -> None:
    """What the daemon wrote tells of no crash and of no more than the first *starts*."""
    assert "received SIGTERM" in said
    assert said.count("spawned model=") == starts
    for words in ("died", "crashed", "start failed", "Traceback", "ERROR"):
        assert words not in said, said


@pytest.mark.parametrize("killed", ["nobody", "the daemon"])
async def test_the_guardian_stays_until_the_daemon_has_gone(tmp_path, killed):
    """SIGTERM to all does not end who is there in case the daemon is killed in the middle of its stop."""
    port = free_port()
    grace = 0.5 if killed == "nobody" else PATIENCE
    model = scripted("--ignore-sigterm", "--setsid-child", port=port, unload_timeout=grace)
    async with service(write_config(tmp_path, {"a": model}), port) as played:
        played.kill(signal.SIGTERM)
        await eventually(partial(refuses, played.served.port))  # the shutdown has begun
        assert alive(played.guardian)
        if killed == "the daemon":
            played.kill(signal.SIGKILL, [played.served.process.pid])
        assert await played.wait_ended() == (0 if killed == "nobody" else -signal.SIGKILL)


async def test_the_end_of_patience(tmp_path):
    """SIGKILL to everybody in the middle of the stop leaves nothing, and nothing that the next start minds."""
    port = free_port()
    model = scripted("--ignore-sigterm", "--fork", "--setsid-child", port=port, unload_timeout=PATIENCE)
    path = write_config(tmp_path, {"a": model})
    async with service(path, port) as played:
        assert len(played.servers) == 3
        played.kill(signal.SIGTERM)
        await eventually(partial(refuses, played.served.port))  # the shutdown has begun
        played.kill(signal.SIGKILL)
        assert await played.wait_ended() == -signal.SIGKILL
    async with command("serve", "-c", path) as served:
        assert "an earlier daemon has left" not in (await fetch(served.port, "GET", "/logs")).text


# ---- one server alone ---------------------------------------------------------------------------


@pytest.fixture
async def prober() -> AsyncIterator[Prober]:
    prober = Prober()
    yield prober
    await prober.aclose()


@pytest.mark.parametrize("flags", [(), ("--never-ready",)], ids=["serving", "loading"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
async def test_who_was_told_to_end_has_not_failed(prober, monkeypatch, caplog, flags, number):
    """Its server ends first, then we are told the same: no crash, no failed start, nothing is left."""
    monkeypatch.setattr(process, "STOP_NOTICE", PATIENCE)
    server = attempt(model_argv("m", *flags, port=(port := free_port())), prober, port=port, unload_timeout=PATIENCE)
    async with server.under_way():
        await (server.said("listening") if flags else server.wait_ready())
        os.kill(server.process.pid, number)
        with trio.fail_after(PATIENCE):
            while not is_reaped(server.process.pid):
                await trio.lowlevel.checkpoint()
    assert server.scope.cancelled_caught
    assert (server.deaths, server.result) == (0, None)
    assert server.nothing_left
    assert not [record for record in caplog.records if record.levelname != "INFO"]


async def test_who_ends_though_nobody_is_told_has_ended(prober, monkeypatch, caplog):
    """A moment later, and in words that call nothing a crash; the reason is told to who decides."""
    monkeypatch.setattr(process, "STOP_NOTICE", 0.01)
    caplog.set_level("INFO")
    server = attempt(model_argv("m", port=(port := free_port())), prober, port=port, unload_timeout=PATIENCE)
    async with server.under_way():
        await server.wait_ready()
        os.kill(server.process.pid, signal.SIGTERM)
        await server.wait_over()
    assert (server.deaths, server.why) == (1, 'exited with 0 ("ready")')
    assert "model server ended by itself model=m" in caplog.text


async def test_a_crash_is_told_at_once(prober, monkeypatch, caplog):
    """Nobody is told to end by SIGKILL or with another exit code."""
    monkeypatch.setattr(process, "STOP_NOTICE", 10 * PATIENCE)
    for number in (signal.SIGKILL, signal.SIGSEGV):
        server = attempt(model_argv("m", port=(port := free_port())), prober, port=port, unload_timeout=PATIENCE)
        async with server.under_way():
            await server.wait_ready()
            os.kill(server.process.pid, number)
            await server.wait_over()
        assert server.deaths == 1
    server = attempt(model_argv("m", "--exit-at-start", 3, port=free_port()), prober)
    async with server.under_way():
        assert await server.wait_over() is not None
    assert caplog.text.count("model server died") == 2
