"""The daemon as the first process of a container: real pid namespaces, where the machine lets us make them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import pytest
import trio
from children import PATIENCE, free_port, model_argv, python, read_until, running
from commands import LISTENS, TRIOSWAP
from daemons import chat, connect, eventually, fetch, write_config

from trioswap import guard

CHAT = "/v1/chat/completions"
CONTAINER = ("unshare", "--map-root-user", "--fork", "--pid", "--mount-proc", "--kill-child")
# Leaves three orphans that have ended a moment later, before it becomes the program that it is given.
LEAVES_ORPHANS = """
import os, sys
for _ in range(3):
    if os.fork() == 0:
        if os.fork() == 0:
            os.setsid()
        os._exit(0)
    os.wait()
os.execv(sys.argv[1], sys.argv[1:])
"""


def can_be_made() -> bool:
    try:
        return subprocess.run([*CONTAINER, "true"], check=False, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


pytestmark = pytest.mark.skipif(not can_be_made(), reason="no pid namespaces for us")


@attrs.frozen
class Container:
    """A container that accepts requests."""

    process: trio.Process
    """What has made it; it ends as the first process in it does."""
    first: int
    """The first process, as we number it."""
    port: int

    @property
    def children(self) -> dict[int, str]:
        """Those of the first process and their states."""
        stats = {pid: stat.rpartition(b")")[2].split() for pid, stat in stats_of_all()}
        return {pid: stat[0].decode() for pid, stat in stats.items() if int(stat[1]) == self.first}

    @property
    def daemon(self) -> int:
        return next(pid for pid in self.children if b"\0serve\0" in Path(f"/proc/{pid}/cmdline").read_bytes())

    async def wait(self) -> int:
        """The exit code."""
        with trio.fail_after(PATIENCE):
            return await self.process.wait()


def stats_of_all() -> list[tuple[int, bytes]]:
    """With the zombies."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            found.append((int(directory.name), (directory / "stat").read_bytes()))
        except OSError:
            continue
    return found


@asynccontextmanager
async def container(
    directory: Path, *flags: str, wrapper: str = "", entrypoint: tuple[str, ...] = (), **settings: object
) -> AsyncIterator[Container]:
    """A container in which `trioswap serve` is all there is, but for what its *entrypoint* starts."""
    port = free_port()
    cmd = [*(python(wrapper) if wrapper else ()), *model_argv("a", *flags, port=port)]
    path = write_config(directory, {"a": {"cmd": cmd, "proxy": f"http://127.0.0.1:{port}", **settings}})
    async with running((*CONTAINER, *entrypoint, *TRIOSWAP, "serve", "-c", path)) as process:
        with trio.fail_after(PATIENCE):
            said = await read_until(process, LISTENS)
            while "\n" not in said.partition(LISTENS)[2]:
                said += await read_until(process, "\n")
        url = said.partition(LISTENS)[2].partition("\n")[0]
        [first] = [pid for pid, stat in stats_of_all() if int(stat.rpartition(b")")[2].split()[1]) == process.pid]
        yield Container(process, first, int(url.rpartition(":")[2]))


async def test_orphans_do_not_stay_zombies(tmp_path):
    """What model servers have left is waited for."""
    async with container(tmp_path, wrapper=LEAVES_ORPHANS) as there:
        assert (await fetch(there.port, "POST", CHAT, chat("a"))).status == 200

        async def no_zombies() -> bool:
            return "Z" not in there.children.values()

        await eventually(no_zombies)
        os.kill(there.first, signal.SIGTERM)
        assert await there.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_comes_once(tmp_path, number):
    """To the whole group, as from a terminal: what is served may finish, which a second signal would cut."""
    async with container(tmp_path) as there, await connect(there.port) as client:
        await client.ask("POST", CHAT, chat("a", stream=True, chunks=20, chunk_delay=0.02))
        assert await client.piece_of_body()
        os.killpg(os.getpgid(there.first), number)
        body = b""
        while piece := await client.piece():
            body += piece
        assert b"[DONE]" in body
        assert await there.wait() in (0, -number), "`unshare` itself gets it, too"


async def test_a_signal_before_it_is_ready_ends_it(tmp_path):
    """The kernel withholds from a first process what it has no handler for."""
    config = tmp_path / "trioswap.toml"
    os.mkfifo(config)
    async with running((*CONTAINER, *TRIOSWAP, "serve", "-c", str(config))) as process:

        async def in_a_child() -> bool:
            return len(serving(process.pid)) == 2

        await eventually(in_a_child)
        os.kill(serving(process.pid)[0], signal.SIGTERM)
        with trio.fail_after(PATIENCE):
            assert await process.wait() == 128 + signal.SIGTERM


def serving(unshare: int) -> list[int]:
    """The first process of the container that *unshare* has made, and its child."""
    parents = {pid: int(stat.rpartition(b")")[2].split()[1]) for pid, stat in stats_of_all()}
    first = [pid for pid, parent in parents.items() if parent == unshare]
    return [*first, *(pid for pid, parent in parents.items() if parent in first)]


async def test_a_daemon_that_is_killed_leaves_its_guardian_the_time(tmp_path):
    """It runs the stop command, then the container ends as the daemon did."""
    stopped = tmp_path / "stopped"
    code = "import sys, time; time.sleep(0.3); open(sys.argv[1], 'w').close()"
    async with container(tmp_path, cmd_stop=[*python(code), str(stopped)]) as there:
        assert (await fetch(there.port, "POST", CHAT, chat("a"))).status == 200
        os.kill(there.daemon, signal.SIGKILL)
        assert await there.wait() == 128 + signal.SIGKILL
    assert stopped.exists()


async def test_what_else_runs_there_is_not_waited_for(tmp_path):
    """The entrypoint has started it, and it stays; only the guardian gets time."""
    entrypoint = ("sh", "-c", f'sleep {10 * PATIENCE} & exec "$@"', "sh")
    async with container(tmp_path, entrypoint=entrypoint) as there:
        assert len(there.children) == 2
        os.kill(there.daemon, signal.SIGKILL)
        with trio.fail_after(guard.PATIENCE / 2):
            assert await there.wait() == 128 + signal.SIGKILL


@pytest.mark.parametrize("name", ["LISTEN_PID", "WATCHDOG_PID"])
def test_what_is_meant_for_the_first_process_is_for_the_daemon(name):
    """systemd, or who plays its part for containers, says a number."""
    code = "from trioswap.firstprocess import step_aside; step_aside(); import os; print(os.getpid(), *map(os.getenv, "
    argv = [*CONTAINER, sys.executable, "-c", f"{code}[{name!r}]))"]
    done = subprocess.run(argv, check=True, capture_output=True, text=True, env={**os.environ, name: "1"})
    assert done.stdout == "2 2\n"


def test_elsewhere_nothing_is_done():
    """No fork, no session."""
    code = "import os; from trioswap.firstprocess import step_aside; before = os.getpid(), os.getsid(0); step_aside();"
    argv = [sys.executable, "-c", f"{code} print(before == (os.getpid(), os.getsid(0)))"]
    assert subprocess.run(argv, check=True, capture_output=True, text=True).stdout == "True\n"
