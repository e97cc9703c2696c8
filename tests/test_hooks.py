"""The commands around a server's life: real ones, around real servers."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs
import pytest
import trio
from attempts import Attempt, attempt
from children import PATIENCE, alive, free_port, model_argv, python
from trio.testing import wait_all_tasks_blocked

from trioswap import hooks, process, proctree
from trioswap.config import loads
from trioswap.config.schema import ModelHooks
from trioswap.errors import ConfigError
from trioswap.logs import Logs
from trioswap.remote import Prober

pytestmark = pytest.mark.skipif(not proctree.PROC.joinpath("self/stat").exists(), reason="there is no /proc")

# Seconds for those who will use them up.
LIMIT = 0.3
NAMES = [field.name for field in attrs.fields(ModelHooks)]


@pytest.fixture
async def prober() -> AsyncIterator[Prober]:
    prober = Prober()
    yield prober
    await prober.aclose()


@pytest.fixture
def run(prober):
    """Makes an attempt at running a child that says "up" and obeys SIGTERM, or another, with some hooks."""

    def make(argv: tuple[str, ...] = (), **changes: object) -> Attempt:
        hooks = ModelHooks(**{name: changes.pop(name) for name in NAMES if name in changes})
        changes = {"check_endpoint": None, "unload_timeout": PATIENCE, "hook_timeout": PATIENCE, **changes}
        return attempt(argv or SERVER, prober, hooks=hooks, **changes)

    return make


SERVER = python("""
import os, signal
def stop(number, frame):
    os.write(1, b'down\\n')
    os._exit(0)
signal.signal(signal.SIGTERM, stop)
os.write(1, b'up\\n')
while True: signal.pause()
""")


def shell(code: str) -> tuple[str, ...]:
    return ("sh", "-c", code)


def hanging(name: str) -> tuple[str, ...]:
    """A hook that says the pids of itself and of its child, and does not end."""
    return shell(f"trap '' TERM; sleep 1000 & echo {name} $$ $!; wait; sleep 1000")


def pids_said(child: Attempt, name: str) -> list[int]:
    line = next(line for line in child.output.splitlines() if line.startswith(f"{name} "))
    return [int(pid) for pid in line.split()[1:]]


@pytest.fixture
def gate(tmp_path) -> Iterator[Gate]:
    gate = Gate(tmp_path / "gate")
    yield gate
    os.close(gate.descriptor)


class Gate:
    """Something that a hook waits for."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path = path
        self.descriptor = os.open(path, os.O_RDWR)

    def hook(self, name: str, then: str = "") -> tuple[str, ...]:
        return shell(f"echo {name} waits; read line < {self.path}; {then or 'true'}")

    def open(self) -> None:
        os.write(self.descriptor, b"\n")


# ---- in their order ---------------------------------------------------------------------------


async def test_each_runs_at_its_time(run):
    """Before the server and when it is ready, before it is asked to end and when nothing of it is left."""
    child = run(
        before_start=shell("echo before start"),
        after_ready=shell("sleep 0; echo after ready ${PID}"),
        before_stop=shell("echo before stop ${PID}"),
        after_stop=shell("echo after stop"),
    )
    async with child.under_way():
        await child.wait_ready()
        await child.said("up\n")
        pid = child.process.pid

    assert [line for line in child.output.splitlines() if line != "up"] == [
        "before start",
        f"after ready {pid}",
        f"before stop {pid}",
        "down",
        "after stop",
    ]
    assert child.nothing_left


@pytest.mark.parametrize("name", NAMES)
async def test_each_finds_the_environment_of_the_server(run, name):
    """And the marker, so that what it leaves is found even when the daemon has been killed."""
    child = run(**{name: shell("echo $EXTRA $TRIOSWAP_ATTEMPT")}, env={"EXTRA": "extra"})
    async with child.under_way():
        await child.wait_ready()
        await child.said("up\n")

    assert f"extra {child.process.marker}" in child.output.splitlines()


async def test_no_request_comes_before_the_hook_has_ended(run, gate):
    """The server is ready, and nobody is told."""
    child = run(after_ready=gate.hook("after ready"))
    async with child.under_way():
        await child.said("after ready waits\n")
        await child.said("up\n")
        await wait_all_tasks_blocked()
        assert child.upstreams == []
        gate.open()
        await child.wait_ready()

    assert child.nothing_left


async def test_the_server_is_not_spawned_before_the_hook_has_ended(run, gate):
    """Nor does its time begin."""
    child = run(before_start=gate.hook("before start"), health_check_timeout=PATIENCE)
    async with child.under_way():
        await child.said("before start waits\n")
        await wait_all_tasks_blocked()
        assert child.process.pid is None
        gate.open()
        await child.wait_ready()

    assert child.nothing_left


async def test_the_server_is_not_asked_to_end_before_the_hook_has_ended(run, gate):
    """It may still be needed for what the hook does; and the grace begins after it."""
    child = run(before_stop=gate.hook("before stop"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(child.run)
        await child.said("up\n")
        await child.wait_ready()
        child.scope.cancel()
        await child.said("before stop waits\n")
        await wait_all_tasks_blocked()
        assert alive(child.process.pid)
        assert "down" not in child.output
        gate.open()

    assert child.nothing_left


# ---- failures ---------------------------------------------------------------------------------


async def fail(child: Attempt) -> str:
    """Why the start failed; nothing was reported and nothing is left."""
    async with child.under_way():
        failure = await child.wait_over()
    assert failure is not None
    assert child.upstreams == []
    assert child.nothing_left
    assert not child.process.stuck
    return failure.why


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (shell("echo no disk >&2; exit 3"), 'exited with 3 ("no disk")'),
        (shell("kill -SEGV $$"), "was killed by SIGSEGV"),
        (("no-such-program-anywhere",), "cannot be run ('no-such-program-anywhere'): no such file or directory"),
        (("sleep", "1\0"), "cannot be run ('sleep'): embedded null byte"),
    ],
)
async def test_without_its_first_hook_a_server_is_not_started(run, command, why):
    """The error tells how it ended and what it said last; the last hook is there to clear up."""
    child = run(before_start=command, before_stop=shell("echo before stop"), after_stop=shell("echo after stop"))

    assert await fail(child) == f"hook before_start {why}"
    assert child.process.pid is None
    assert [line for line in child.output.splitlines() if line != "no disk"] == ["after stop"]


async def test_a_first_hook_that_is_late_is_killed(run):
    """With what it has started; nothing is spawned."""
    child = run(before_start=hanging("hangs"), hook_timeout=LIMIT)

    assert await fail(child) == f"hook before_start did not end within {LIMIT} s (hook_timeout)"
    assert child.process.pid is None
    assert not any(map(alive, pids_said(child, "hangs")))


async def test_when_the_hook_of_readiness_fails_the_server_is_stopped(run):
    """It was never ready, so nothing precedes its stop."""
    child = run(
        after_ready=shell("echo not so; exit 4"),
        before_stop=shell("echo before stop"),
        after_stop=shell("echo after stop"),
    )

    assert await fail(child) == 'hook after_ready exited with 4 ("not so")'
    assert child.process.pid is not None
    assert "before stop" not in child.output
    assert child.output.endswith("after stop\n")


async def test_a_hook_of_readiness_that_is_late_is_killed(run):
    """And the server is stopped."""
    child = run(after_ready=hanging("hangs"), hook_timeout=LIMIT)

    assert await fail(child) == f"hook after_ready did not end within {LIMIT} s (hook_timeout)"
    assert not any(map(alive, pids_said(child, "hangs")))


async def test_a_server_that_ends_during_the_hook_is_noticed_at_once(run):
    """Not when the hook has ended."""
    child = run(after_ready=shell("kill -KILL ${PID}; exec sleep 1000"))

    assert (await fail(child)).startswith("was killed by SIGKILL before it was ready")


@pytest.mark.parametrize("name", ["before_stop", "after_stop"])
@pytest.mark.parametrize(
    ("command", "why"),
    [
        (shell("exit 3"), "exited with 3"),
        (("no-such-program-anywhere",), "cannot be run"),
        (hanging("hangs"), "did not end within"),
    ],
)
async def test_hooks_around_the_stop_cannot_prevent_it(run, caplog, name, command, why):
    """Their failure is logged, once."""
    child = run(**{name: command}, hook_timeout=LIMIT)
    with caplog.at_level(logging.WARNING):
        async with child.under_way():
            await child.wait_ready()
            await child.said("up\n")

    assert child.nothing_left
    assert "down\n" in child.output
    assert [f"model=m: hook {name} {why}" in line for line in caplog.messages] == [True]


async def test_after_a_crash_only_the_last_hook_is_run(run):
    """There is nothing to be said to a dead server."""
    child = run(before_stop=shell("echo before stop"), after_stop=shell("echo after stop"))
    async with child.under_way():
        await child.wait_ready()
        await child.said("up\n")
        os.kill(child.process.pid, signal.SIGKILL)
        assert await child.wait_over() is None

    assert child.output == "up\nafter stop\n"
    assert child.nothing_left


async def test_after_a_server_that_cannot_be_run_the_last_hook_is_run(run):
    """What the first one did is undone."""
    child = run(("no-such-program-anywhere",), before_start=shell("echo one"), after_stop=shell("echo two"))

    assert (await fail(child)).startswith("cannot run")
    assert child.output == "one\ntwo\n"


@contextmanager
def unkillable(patch: pytest.MonkeyPatch, child: Attempt) -> Iterator[None]:
    """Signals do not arrive at the server, as when it belongs to another user."""
    kill_group = os.killpg

    def refuse(group: int, number: int) -> None:
        if group == child.process.pid:
            raise PermissionError
        kill_group(group, number)

    with patch.context() as within:
        within.setattr(os, "killpg", refuse)
        within.setattr(proctree, "kill", lambda process, number: False)
        within.setattr(process, "KILL_WAIT", 0.0)
        yield


async def test_while_the_server_is_still_there_the_last_hook_is_not_run(run, monkeypatch, caplog):
    """It could take away what the server uses."""
    child = run(after_stop=shell("echo after stop"), unload_timeout=0.0)
    with unkillable(monkeypatch, child):
        async with child.under_way():
            await child.wait_ready()
            await child.said("up\n")
    os.kill(child.process.pid, signal.SIGKILL)
    with trio.fail_after(PATIENCE):
        await child.process.wait_gone()

    assert child.process.stuck
    assert child.output == "up\n"
    assert "hook after_stop is not run" in caplog.text


# ---- nothing is left --------------------------------------------------------------------------


LEAVING = """
setsid sh -c 'trap "" TERM; echo left $$; sleep 1000; sleep 1000' > {0} 2>&1 &
while [ ! -s {0} ]; do :; done
"""


@pytest.mark.parametrize("name", NAMES)
async def test_what_a_hook_leaves_is_swept(run, tmp_path, name):
    """With the server, or after it: here a process in a session of its own that ignores SIGTERM."""
    said = tmp_path / "said"
    child = run(**{name: shell(LEAVING.format(said))}, unload_timeout=LIMIT)
    async with child.under_way():
        await child.wait_ready()
        await child.said("up\n")

    assert not alive(int(said.read_text().split()[1]))
    assert child.nothing_left
    assert not child.process.stuck


async def test_what_a_hook_leaves_lives_as_long_as_the_server(run, tmp_path):
    """A tunnel, say; and it goes too when the server cannot be run."""
    said, again = tmp_path / "said", tmp_path / "again"
    child = run(before_start=shell(LEAVING.format(said)), unload_timeout=LIMIT)
    async with child.under_way():
        await child.wait_ready()
        left = int(said.read_text().split()[1])
        assert alive(left)
    assert not alive(left)

    child = run(("no-such-program-anywhere",), before_start=shell(LEAVING.format(again)), unload_timeout=LIMIT)
    await fail(child)
    assert not alive(int(again.read_text().split()[1]))


async def test_a_hook_that_survives_is_reported(run, monkeypatch):
    """Its attempt is stuck until it has ended, though there never was a server."""
    monkeypatch.setattr(hooks, "KILL_WAIT", 0.0)
    monkeypatch.setattr(process, "KILL_WAIT", 0.0)
    monkeypatch.setattr(process, "QUARANTINE_POLL", 0.01)
    child = run(before_start=hanging("hangs"), hook_timeout=LIMIT, unload_timeout=0.0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "killpg", lambda group, number: None)
        patch.setattr(proctree, "kill", lambda process, number: False)
        async with child.under_way():
            await child.wait_over()
    assert child.process.stuck

    async with trio.open_nursery() as nursery:
        nursery.start_soon(child.process.wait_gone)
        await wait_all_tasks_blocked()
        os.killpg(pids_said(child, "hangs")[0], signal.SIGKILL)
        with trio.fail_after(PATIENCE):
            await child.process.wait_gone()


async def test_what_a_late_hook_has_started_is_waited_for_until_it_has_gone(run):
    """To give 256 MB back takes some 100 ms after it was killed; its environment with the marker is gone at once."""
    code = """
import os, signal
signal.alarm(120)
if os.fork() == 0:
    file = os.memfd_create("large")
    for _ in range(256):
        os.write(file, bytes(1 << 20))
    os.write(1, b"large %d\\n" % os.getpid())
signal.pause()
"""
    child = run(before_start=python(code), hook_timeout=PATIENCE)
    async with child.under_way():
        await child.said("large")
    assert not any(map(alive, pids_said(child, "large")))


@pytest.mark.parametrize("name", NAMES)
async def test_a_cancellation_during_a_hook_leaves_nothing(run, name):
    """Those before readiness are killed at once, those around the stop go on, within their limit."""
    child = run(**{name: hanging("hangs")}, hook_timeout=LIMIT if "stop" in name else PATIENCE)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(child.run)
        if "stop" in name:
            await child.wait_ready()
            await child.said("up\n")
            child.scope.cancel()
        await child.said("hangs")
        child.scope.cancel()
        nursery.cancel_scope.cancel()

    assert not any(map(alive, pids_said(child, "hangs")))
    assert child.nothing_left
    assert (child.process.pid is None) is (name == "before_start")


async def test_a_start_that_is_cancelled_in_a_hook_undoes_it(run):
    """The last hook is run even so."""
    child = run(before_start=hanging("hangs"), after_stop=shell("echo after stop"))
    async with child.under_way():
        await child.said("hangs")

    assert child.output.endswith("after stop\n")
    assert child.nothing_left


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_no_descriptor_is_left(run):
    """Of none of them."""
    everything: dict[str, tuple[str, ...]] = {name: shell("echo hello") for name in NAMES}

    async def once() -> int:
        child = run(**everything)
        child.on_ready = child.scope.cancel
        await child.run()
        assert child.output.count("hello") == 4
        return open_descriptors()

    assert await once() == await once()


async def test_with_a_server_that_is_asked(prober):
    """After its 200, not before."""
    port, logs = free_port(), Logs()
    child = attempt(
        model_argv("m", "--ready-delay", 0.2, port=port),
        prober,
        port=port,
        logs=logs,
        hooks=ModelHooks(after_ready=shell("echo after ready")),
    )
    async with child.under_way():
        await child.wait_ready()

    assert child.output.index("listening") < child.output.index("after ready")
    assert child.nothing_left


# ---- as they are written ------------------------------------------------------------------------


def test_they_are_split_and_filled_in():
    """Like `cmd` and `cmd_stop`; what the process is shows later, and only while there is one."""
    model = loads("""
[models.a]
cmd = "server ${PORT}"
hooks.before_start = '''
# first of all
make 'a place' ${PORT}
'''
hooks.after_ready = ["tell", "${MODEL_ID} ${PID}"]
hooks.before_stop = "tell ${who} ${PID}"
hooks.after_stop = "clear"
hook_timeout = "5s"
macros.who = "them"
""").models["a"]

    assert model.hooks == ModelHooks(
        before_start=("make", "a place", str(model.port)),
        after_ready=("tell", "a ${PID}"),
        before_stop=("tell", "them", "${PID}"),
        after_stop=("clear",),
    )
    assert model.hook_timeout == 5.0


def test_without_a_word_there_are_none():
    """Nor a table of them."""
    model = loads("models.a.cmd = 'server ${PORT}'").models["a"]

    assert (model.hooks, model.hook_timeout) == (ModelHooks(), 30.0)
    assert (model.liveness, model.liveness_misses, model.never_kill) == (None, 3, False)


@pytest.mark.parametrize(
    ("written", "path", "mistake"),
    [
        ("hooks.before_start = 'x ${PID}'", "hooks.before_start", "found ${PID}"),
        ("hooks.after_stop = ['x', '${PID}']", "hooks.after_stop", "found ${PID}"),
        ('hooks.before_stop = "x \'y"', "hooks.before_stop", "quotes in pairs"),
        ("hooks.after_ready = []", "hooks.after_ready", "found an empty command"),
        ("hooks.before = 'x'", "hooks.before", "unknown key"),
        ("hook_timeout = 0", "hook_timeout", "but not 0"),
        ("never_kill = true\nstop_signal = 'SIGKILL'", "stop_signal", "any other signal beside never_kill"),
        ("liveness_misses = 0", "liveness_misses", "from 1 up"),
    ],
)
def test_mistakes_are_told_with_their_place(written, path, mistake):
    """Where they are, and what would be right."""
    with pytest.raises(ConfigError) as caught:
        loads(f"[models.a]\ncmd = 'server ${{PORT}}'\n{written}")

    assert any(path in line and mistake in line for line in caught.value.mistakes), caught.value.mistakes


@pytest.mark.parametrize(
    ("above", "within", "expected"), [("", "", (None, 3)), ("15", "", (15.0, 5)), ("15", "0", (None, 5))]
)
def test_liveness_is_inherited(above, within, expected):
    """What a model says wins, and 0 is off."""
    text = f"liveness = {above}\nliveness_misses = 5\n" if above else ""
    text += "[models.a]\ncmd = 'server ${PORT}'\n" + (f"liveness = {within}\n" if within else "")
    model = loads(text).models["a"]

    assert (model.liveness, model.liveness_misses) == expected
