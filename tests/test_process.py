"""Supervision of real children: start, readiness, output, stop, and that nothing is left of any of them."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import signal
import socket
import subprocess
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path

import attrs
import pytest
import trio
from attempts import Attempt, attempt, is_reaped
from children import PATIENCE, alive, ask, free_port, model_argv, python, wait_gone
from daemons import connect, daemon, eventually, fetch, running
from trio.testing import wait_all_tasks_blocked

from trioswap import guard, output, process, proctree, spawning
from trioswap.config.schema import ModelHooks
from trioswap.daemon import _supervise
from trioswap.guardian import NOBODY
from trioswap.hooks import Commands
from trioswap.instance import Claim
from trioswap.logs import CAPACITY, Logs
from trioswap.output import Output
from trioswap.remote import Prober
from trioswap.residency import NOTHING

pytestmark = pytest.mark.skipif(not proctree.PROC.joinpath("self/stat").exists(), reason="there is no /proc")

# Seconds of grace for those who will use it up.
GRACE = 0.2
NOBODY_ASKS = {"check_endpoint": None}


@pytest.fixture
async def prober() -> AsyncIterator[Prober]:
    prober = Prober()
    yield prober
    await prober.aclose()


@pytest.fixture
def serve(prober):
    """Makes an attempt at running the scriptable server with some flags; it stops within the grace or not at all."""

    def make(*flags: str | float, **changes: object) -> Attempt:
        port = free_port()
        changes = {"unload_timeout": PATIENCE, "health_check_timeout": PATIENCE, **changes}
        return attempt(model_argv("m", *flags, port=port), prober, port=port, **changes)

    return make


@pytest.fixture
def run(prober):
    """Makes an attempt at running any child, which is ready as soon as it exists unless it is asked."""

    def make(*argv: str, **changes: object) -> Attempt:
        return attempt(argv, prober, **{"unload_timeout": PATIENCE, **NOBODY_ASKS, **changes})

    return make


async def get(server: Attempt, target: str) -> str:
    status, body = await ask(server.port, "GET", target)
    assert status == 200
    return body.decode()


async def fail(server: Attempt) -> str:
    """Why the start failed; nothing was reported and nothing is left."""
    async with server.under_way():
        failure = await server.wait_over()
    assert failure is not None
    assert server.upstreams == []
    assert server.nothing_left
    assert not server.process.stuck
    return failure.why


@contextmanager
def at_least(seconds: float) -> Iterator[None]:
    begun = trio.current_time()
    yield
    assert trio.current_time() - begun >= seconds


# ---- ready -----------------------------------------------------------------------------------


@attrs.define(eq=False)
class Spy:
    """A prober that notes what the probes found."""

    prober: Prober
    found: list[str | None] = attrs.field(factory=list)

    async def ready(self, url: str) -> str | None:
        self.found.append(await self.prober.ready(url))
        return self.found[-1]


async def test_a_server_that_binds_late_is_ready_once_it_is_bound(serve, prober):
    """Connections are refused meanwhile."""
    spy = Spy(prober)
    server = serve("--bind-delay", 0.2)
    server.process._prober = spy
    async with server.under_way():
        await server.wait_ready()
        assert await get(server, "/pid") == str(server.process.pid)

    assert set(spy.found[:-1]) == {"connection refused"}
    assert spy.found[-1] is None
    assert server.nothing_left


async def test_a_server_that_loads_is_ready_once_it_answers_200(serve, prober):
    """It answers 503 meanwhile, as llama-server does."""
    spy = Spy(prober)
    server = serve("--ready-delay", 0.2)
    server.process._prober = spy
    async with server.under_way():
        await server.wait_ready()
        assert await get(server, "/health") == "ok"

    assert "answered 503" in spy.found
    assert spy.found[-1] is None


async def test_without_a_check_a_server_is_ready_as_soon_as_it_runs(run):
    """Nobody is asked, so a program that listens nowhere will do."""
    child = run(*python("import signal; signal.pause()"))
    async with child.under_way():
        upstream = await child.wait_ready()
        assert alive(child.process.pid)
        assert (upstream.model, upstream.base_url) == ("m", child.process.spec.proxy)

    assert child.nothing_left


# ---- not ready -------------------------------------------------------------------------------


async def test_an_exit_while_starting_names_the_code_and_the_last_line(serve):
    """At once, not when the time for loading is over."""
    why = await fail(serve("--exit-at-start", 7, health_check_timeout=10 * PATIENCE))

    assert why == 'exited with 7 before it was ready ("m: cannot load the model")'


async def test_a_signal_while_starting_is_named(run):
    """So that the user thinks of the out-of-memory killer."""
    why = await fail(run(*python("import os; print('loading'); os.kill(os.getpid(), 9)"), check_endpoint="/health"))

    assert why == 'was killed by SIGKILL before it was ready ("loading")'


async def test_an_exit_is_noticed_though_a_grandchild_holds_the_output(run, monkeypatch):
    """The last line is waited for, but not for ever."""
    monkeypatch.setattr(process, "OUTPUT_GRACE", 0.1)
    code = "import os, signal\nif os.fork() == 0: signal.pause()\nprint('so long'); os._exit(4)"

    assert await fail(run(*python(code), check_endpoint="/health")) == 'exited with 4 before it was ready ("so long")'


async def test_the_last_words_of_the_family_are_waited_for(run, monkeypatch):
    """A wrapper script ends before the server in it has said why."""
    monkeypatch.setattr(process, "OUTPUT_GRACE", PATIENCE)
    code = """
import os
end, held = os.pipe()
if os.fork():
    os._exit(4)
os.close(held)
os.read(end, 1)
print('so long')
"""

    assert await fail(run(*python(code), check_endpoint="/health")) == 'exited with 4 before it was ready ("so long")'


async def test_a_failure_quotes_no_earlier_attempt(run):
    """The ring keeps what the one before it said; who said nothing is not quoted."""
    logs = Logs()
    talker = run(*python("print('old words\\n\\n'); raise SystemExit(3)"), check_endpoint="/", logs=logs)
    assert await fail(talker) == 'exited with 3 before it was ready ("old words")'

    mute = run(*python("raise SystemExit(5)"), check_endpoint="/", logs=logs)
    assert await fail(mute) == "exited with 5 before it was ready"
    assert "old words" in talker.output


async def test_a_failure_quotes_the_end_of_an_endless_line(run):
    """A progress bar of a megabyte does not go into an error message."""
    why = await fail(run(*python("print('x' * 10**6 + ' end'); raise SystemExit(3)"), check_endpoint="/"))

    assert why.endswith('xxx end")')
    assert len(why) < 2 * output.LAST_LINE


async def test_a_server_that_is_never_ready_is_given_up(serve):
    """After health_check_timeout, and the message tells what the last probe found."""
    with at_least(0.5):
        why = await fail(serve("--never-ready", health_check_timeout=0.5))

    assert why.startswith("not ready within 0.5 s (health_check_timeout), last probe: ")


class Refusing:
    """A prober that finds no server."""

    async def ready(self, url: str) -> str | None:
        return "connection refused"


async def test_who_gives_up_tells_what_the_last_probe_found(serve):
    """The user sees that nobody listens where trioswap asks."""
    server = serve("--wrong-port", health_check_timeout=GRACE)
    server.process._prober = Refusing()

    assert "last probe: connection refused" in await fail(server)


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (("no-such-program-anywhere",), "no such file or directory"),
        ((__file__,), "permission denied"),
        (("sleep", "1\0"), "embedded null byte"),
    ],
)
async def test_what_cannot_be_run_is_a_failed_start(run, argv, reason):
    """A program that is not there, one that is not executable, and an argument that no system call takes."""
    child = run(*argv)

    assert await fail(child) == f"cannot run {argv[0]!r}: {reason}"
    assert child.process.pid is None


# ---- strangers on the port --------------------------------------------------------------------


@asynccontextmanager
async def stranger(port: int) -> AsyncIterator[None]:
    """This very process answers 200 on the port, to everything."""

    async def answer(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    async with trio.open_nursery() as nursery:
        await nursery.start(partial(trio.serve_tcp, answer, port, host="127.0.0.1"))
        yield
        nursery.cancel_scope.cancel()


def our_name() -> str:
    me = proctree.look(os.getpid())
    return f"{me.name} (pid {me.pid})"


async def test_a_stranger_that_is_there_already_prevents_the_start(serve):
    """Its name and pid are told, and nothing is spawned."""
    server = serve()
    async with stranger(server.port):
        why = await fail(server)

    assert f"belongs to {our_name()}" in why
    assert 'port_owner = "any"' in why
    assert server.process.pid is None
    assert server.output == ""


async def test_a_stranger_that_answers_does_not_make_our_server_ready(serve, monkeypatch):
    """It took the port after the spawn; our child, which never binds, is stopped, and nobody waits for the port."""
    monkeypatch.setattr(process, "PORT_WAIT", math.inf)
    server = serve("--wrong-port", "--spam", 1)
    async with server.under_way():
        await server.said("x")
        async with stranger(server.port):
            failure = await server.wait_over()

    assert f"belongs to {our_name()}" in failure.why
    assert server.upstreams == []
    assert server.process.pid is not None
    assert server.nothing_left


async def test_a_container_may_own_the_port(serve):
    """With port_owner "any" nobody asks whose server it is."""
    server = serve("--wrong-port", port_owner="any")
    async with server.under_way(), stranger(server.port):
        await server.wait_ready()

    assert server.nothing_left


async def test_the_port_of_a_container_is_waited_for(serve, monkeypatch):
    """Who forwards to a container goes a moment after our child."""
    monkeypatch.setattr(process, "PORT_WAIT", PATIENCE)
    server = serve("--wrong-port", port_owner="any")
    async with trio.open_nursery() as nursery, stranger(server.port):
        nursery.start_soon(server.run)
        await server.wait_ready()
        server.scope.cancel()
        with trio.fail_after(PATIENCE):
            while server.family:
                await trio.lowlevel.checkpoint()
        await wait_all_tasks_blocked()
        assert not server.over
    assert server.nothing_left


# ---- what the child finds ---------------------------------------------------------------------


@contextmanager
def our_input(data: bytes) -> Iterator[None]:
    """Put *data* where we read our own standard input."""
    (reader, writer), ours = os.pipe(), os.dup(0)
    os.write(writer, data)
    os.close(writer)
    os.dup2(reader, 0)
    os.close(reader)
    try:
        yield
    finally:
        os.dup2(ours, 0)
        os.close(ours)


async def test_the_child_finds_its_environment_and_no_input(run, monkeypatch):
    """Our own variables, those of the configuration on top, the marker down to grandchildren, and stdin empty."""
    monkeypatch.setenv("OURS", "ours")
    monkeypatch.setenv("BOTH", "ours")
    code = """
import json, os, signal, sys
names = ('PATH', 'OURS', 'BOTH', 'EXTRA')
grandchild = os.popen("sh -c 'echo $TRIOSWAP_ATTEMPT'").read().strip()
print(json.dumps([[os.environ[name] for name in names], grandchild, sys.stdin.read(), os.getsid(0) == os.getpid()]))
signal.pause()
"""
    child = run(*python(code), env={"EXTRA": "extra", "BOTH": "theirs"})
    with our_input(b"ours"):
        async with child.under_way():
            await child.said("\n")

    expected = [[os.environ["PATH"], "ours", "theirs", "extra"], child.process.marker, "", True]
    assert json.loads(child.output) == expected


async def test_what_systemd_tells_us_is_not_for_the_child(run, monkeypatch):
    """With our NOTIFY_SOCKET a container's client would say that we are ready, or have stopped."""
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere")
    monkeypatch.setenv("WATCHDOG_USEC", "1")
    child = run(*python("import os; print('NOTIFY_SOCKET' in os.environ, 'WATCHDOG_USEC' in os.environ)"))
    async with child.under_way():
        await child.said("\n")
    assert child.output == "False False\n"


# ---- output -----------------------------------------------------------------------------------


async def test_ten_megabytes_in_one_line_do_not_block_the_child(serve):
    """It becomes ready, and the ring holds the end of what it said."""
    server = serve("--spam", 10_000_000, "--silent")
    async with server.under_way():
        await server.wait_ready()

    assert server.output == CAPACITY * "x"


LINES = "".join(f"line {number}\n" for number in range(8000))  # more than a pipe holds, less than a ring


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGSEGV)", "os._exit(1)"])
async def test_the_output_of_a_crashed_child_is_complete(run, end):
    """What it wrote before it died has arrived when `run` is over."""
    code = f"import os, signal\nprint(''.join(f'line {{n}}\\n' for n in range(8000)), end='', flush=True)\n{end}"
    child = run(*python(code))
    async with child.under_way():
        await child.wait_over()

    assert child.output == LINES


async def test_a_death_is_told_with_the_last_words(run, tmp_path, monkeypatch):
    """However slow we read: they are in the pipe when the end is noticed, and they are kept once."""
    told = trio.Event()

    class SlowOutput(Output):
        async def keep(self, child):
            await told.wait()
            await super().keep(child)

    monkeypatch.setattr(process, "Output", SlowOutput)
    wait = tmp_path / "wait"
    os.mkfifo(wait)
    code = "import os, sys; open(sys.argv[1]).read(); os.write(1, b'CUDA error: no luck\\n'); os._exit(3)"
    child = run(*python(code), str(wait))
    async with child.under_way():
        await child.wait_ready()
        await trio.to_thread.run_sync(wait.write_text, "")
        with trio.fail_after(PATIENCE):
            while not child.deaths:
                await trio.lowlevel.checkpoint()
        told.set()
        await child.wait_over()

    assert child.why == 'exited with 3 ("CUDA error: no luck")'
    assert child.output == "CUDA error: no luck\n"


async def test_who_talks_on_after_a_death_holds_nothing_up(run, tmp_path):
    """A child that the dead server has left, and that writes without end."""
    code = "import os\nif os.fork() == 0:\n    while True: os.write(1, b'more\\n')\nimport signal; signal.pause()"
    child = run(*python(code))
    async with child.under_way():
        await child.said("more\n")
        os.kill(child.process.pid, signal.SIGKILL)
        await child.wait_over()

    assert child.why.startswith('was killed by SIGKILL ("')  # and then a last line that may be cut anywhere
    assert child.nothing_left


async def test_what_a_child_says_while_it_stops_is_kept(run):
    """Nobody closes its output before its end: a server that reports its shutdown would die of that."""
    code = """
import os, signal
def stop(number, frame):
    print(''.join(f'line {n}\\n' for n in range(8000)) + 'done', flush=True)
    os._exit(0)
signal.signal(signal.SIGTERM, stop)
os.write(1, b'up\\n')
while True: signal.pause()
"""
    child = run(*python(code))
    async with child.under_way():
        await child.said("up\n")

    assert child.output == f"up\n{LINES}done\n"


# ---- stop -------------------------------------------------------------------------------------


def reporter(*ends: int) -> tuple[str, ...]:
    """A child that tells each signal it gets, and ends upon some of them."""
    return python(f"""
import os, signal
def got(number, frame):
    os.write(1, b'got %d\\n' % number)
    if number in {[*map(int, ends)]}: os._exit(0)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1): signal.signal(number, got)
os.write(1, b'up\\n')
while True: signal.pause()
""")


async def stop(child: Attempt) -> str:
    """Run it until it is up, stop it, and return what it said."""
    async with child.under_way():
        await child.said("up\n")
    assert child.nothing_left
    return child.output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_the_stop_signal_is_the_one_of_the_configuration(run, number):
    """And the only one that a server gets which obeys it."""
    assert await stop(run(*reporter(number), stop_signal=number)) == f"up\ngot {number:d}\n"


async def test_everybody_in_the_tree_is_signalled_once(run):
    """The leader, its group, and who has left it: some servers give up their clean end upon a second signal."""
    code = """
import os, signal
def member(name, end):
    def got(number, frame):
        os.write(1, b'%s got %d\\n' % (name, number))
        end()
    signal.signal(signal.SIGTERM, got)
ready, told = os.pipe()
def child(name):
    if os.fork() == 0:
        if name == b'escapee': os.setsid()
        member(name, lambda: os._exit(0))
        os.write(told, b'.')
        while True: signal.pause()
    os.read(ready, 1)
child(b'group')
child(b'escapee')
def wait_for_both():
    os.wait(), os.wait()
    os._exit(0)
member(b'leader', wait_for_both)
os.write(1, b'up\\n')
while True: signal.pause()
"""
    up, *signals = sorted((await stop(run(*python(code)))).split("\n"), key=lambda line: line != "up")

    assert up == "up"
    assert sorted(signals) == ["", "escapee got 15", "group got 15", "leader got 15"]


@pytest.mark.parametrize(
    "flags",
    [("--ignore-sigterm",), ("--fork",), ("--setsid-child",), ("--ignore-sigterm", "--fork", "--setsid-child")],
    ids="".join,
)
async def test_who_ignores_the_signal_is_killed_after_the_grace(serve, flags):
    """The server itself, a child in its group that holds its output, a daemon that left its session, and all three."""
    server = serve(*flags, unload_timeout=GRACE)
    async with server.under_way():
        await server.wait_ready()
        pids = [server.process.pid, *json.loads(await get(server, "/children"))]
        assert len(server.family) == len(pids)
        before = trio.current_time()

    assert trio.current_time() - before >= GRACE
    assert not any(map(alive, pids))
    assert server.nothing_left
    assert not server.process.stuck


async def test_what_a_crashed_server_leaves_is_swept(serve):
    """Its children outlive it, ignore the signal, and are killed; that is no failed start."""
    server = serve("--fork", "--setsid-child", unload_timeout=GRACE)
    async with server.under_way():
        await server.wait_ready()
        children = json.loads(await get(server, "/children"))
        os.kill(server.process.pid, signal.SIGKILL)
        assert await server.wait_over() is None

    assert not any(map(alive, children))
    assert server.nothing_left


async def test_a_server_that_forks_during_a_look_is_not_overlooked(serve, monkeypatch):
    """A look that misses the child of a process that has just ended proves nothing yet."""
    looks, members = [], proctree.members

    def miss_the_first(leader: int, marker: str) -> list[proctree.Process]:
        looks.append(found := members(leader, marker))
        return [] if len(looks) == 1 else found

    server = serve("--setsid-child", unload_timeout=GRACE, check_endpoint=None)
    async with server.under_way():
        await server.said("ready")
        (daemon,) = json.loads(await get(server, "/children"))
        monkeypatch.setattr(proctree, "members", miss_the_first)
        os.kill(server.process.pid, signal.SIGKILL)
        await server.wait_over()

    assert daemon in {one.pid for one in looks[0]}
    assert not alive(daemon)


async def test_after_nobody_was_found_nobody_asks_again(serve, monkeypatch):
    """The number of the dead leader may name a new session by then, and a look would take that for ours."""
    looks, members = [], proctree.members

    def look(leader: int, marker: str) -> list[proctree.Process]:
        found = members(leader, marker)
        if is_reaped(leader):
            looks.append(found)
        return found

    monkeypatch.setattr(proctree, "members", look)
    server = serve()
    async with server.under_way():
        await server.wait_ready()

    assert looks == [[], []]


# ---- stop by command --------------------------------------------------------------------------


def shell(code: str) -> tuple[str, ...]:
    return ("sh", "-c", code)


async def test_the_command_takes_the_place_of_the_signal(run):
    """It knows the pid, and what it says is kept."""
    command = shell("echo by command; kill -USR1 ${PID}")
    said = await stop(run(*reporter(signal.SIGUSR1), stop_argv=command))

    assert sorted(said.splitlines()) == ["by command", f"got {signal.SIGUSR1:d}", "up"]


@pytest.mark.parametrize("command", [shell("echo no >&2; exit 3"), ("no-such-program-anywhere",)])
async def test_when_the_command_fails_the_signal_is_sent(run, command):
    """It ends with an error, or cannot even be run."""
    said = await stop(run(*reporter(signal.SIGTERM), stop_argv=command))

    assert said.endswith(f"got {signal.SIGTERM:d}\n")


async def test_a_command_that_hangs_is_killed_with_the_child(run):
    """At the end of the grace, together with what the command has started."""
    child = run(*reporter(), stop_argv=shell("sleep 1000 & echo $$ $!; wait"), unload_timeout=GRACE)
    with at_least(GRACE):
        said = await stop(child)

    pids = next(line for line in said.splitlines() if line.replace(" ", "").isdigit())
    assert not any(alive(int(pid)) for pid in pids.split())


async def test_a_command_may_take_its_time(run, tmp_path):
    """The signal is not sent while it works."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    command = shell(f"echo stopping; read line < {fifo}; kill -USR1 ${{PID}}")
    child = run(*reporter(signal.SIGUSR1), stop_argv=command)
    descriptor = os.open(fifo, os.O_RDWR)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(child.run)
        await child.said("up\n")
        child.scope.cancel()
        await child.said("stopping\n")
        await wait_all_tasks_blocked()
        assert alive(child.process.pid)
        os.write(descriptor, b"go\n")
    os.close(descriptor)

    assert child.output == f"up\nstopping\ngot {signal.SIGUSR1:d}\n"
    assert child.nothing_left


async def test_after_a_crash_no_command_is_run(run):
    """The pid in it may be somebody else's by then; what is left gets the signal."""
    code = f"import os\nif os.fork() == 0: os.execvp({reporter()[0]!r}, {reporter(signal.SIGTERM)!r})\nos.wait()"
    child = run(*python(code), stop_argv=shell("echo by command ${PID}"))
    async with child.under_way():
        await child.said("up\n")
        os.kill(child.process.pid, signal.SIGKILL)
        await child.wait_over()

    assert child.output == f"up\ngot {signal.SIGTERM:d}\n"
    assert child.nothing_left


@pytest.mark.parametrize("never_kill", [False, True])
async def test_a_bug_in_the_stop_leaves_nobody_unseen(run, monkeypatch, never_kill):
    """Else the next attempt would run beside a server of which nobody knows any more."""
    code = (
        "import signal; signal.alarm(120); signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up'); signal.pause()"
    )
    child = run(*python(code), never_kill=never_kill, stop_argv=("true",))

    async def break_down(*_: object) -> None:
        raise LookupError("a bug")

    with pytest.RaisesGroup(LookupError, flatten_subgroups=True):
        async with child.under_way():
            await child.said("up\n")
            monkeypatch.setattr(Commands, "run", break_down)
    assert child.process.stuck is never_kill
    if never_kill:
        os.kill(child.process.pid, signal.SIGKILL)
        await child.process.wait_gone()
    assert child.nothing_left


# ---- cancellation, wherever it comes ------------------------------------------------------------


def before_the_start(server: Attempt, patch: pytest.MonkeyPatch) -> None:
    server.scope.cancel()


def before_the_fork(server: Attempt, patch: pytest.MonkeyPatch) -> None:
    _replace_popen(patch, before=partial(trio.from_thread.run_sync, server.scope.cancel))


def after_the_fork(server: Attempt, patch: pytest.MonkeyPatch) -> None:
    _replace_popen(patch, after=partial(trio.from_thread.run_sync, server.scope.cancel))


def _replace_popen(
    patch: pytest.MonkeyPatch, before: Callable[[], object] = list, after: Callable[[], object] = list
) -> None:
    """Have something done in the thread in which Trio spawns."""
    spawn = subprocess.Popen

    def popen(*args, **options):
        before()
        child = spawn(*args, **options)
        after()
        return child

    patch.setattr(subprocess, "Popen", popen)


@attrs.define(eq=False)
class Canceller:
    """A prober that cancels the attempt, before the first probe or when that has found the server ready."""

    prober: Prober
    scope: trio.CancelScope
    when_ready: bool

    async def ready(self, url: str) -> str | None:
        if not self.when_ready:
            self.scope.cancel()
        found = await self.prober.ready(url)
        if found is None:
            self.scope.cancel()
        return found


def in_a_probe(server: Attempt, patch: pytest.MonkeyPatch) -> None:
    server.process._prober = Canceller(server.process._prober, server.scope, when_ready=False)


def when_the_probe_has_succeeded(server: Attempt, patch: pytest.MonkeyPatch) -> None:
    server.process._prober = Canceller(server.process._prober, server.scope, when_ready=True)


def in_the_report(server: Attempt, patch: pytest.MonkeyPatch) -> None:
    server.on_ready = server.scope.cancel


@pytest.mark.parametrize(
    "arrange",
    [before_the_start, before_the_fork, after_the_fork, in_a_probe, when_the_probe_has_succeeded, in_the_report],
)
async def test_a_cancellation_leaves_nothing(serve, monkeypatch, arrange):
    """At each point where one can come in; and who was cancelled before its report does not report."""
    server = serve()
    arrange(server, monkeypatch)
    descriptors = open_descriptors()
    await server.run()

    assert server.scope.cancelled_caught
    assert server.nothing_left
    assert open_descriptors() == descriptors
    assert (server.process.pid is None) is (arrange is before_the_start)
    assert bool(server.upstreams) is (arrange is in_the_report)


@pytest.mark.parametrize("hundredths", range(0, 31, 3))
async def test_a_cancellation_after_any_time_leaves_nothing(serve, hundredths):
    """Wherever the server is then: being spawned, daemonizing a child, binding, ready."""
    server = serve("--setsid-child", unload_timeout=0.05)
    with trio.move_on_after(hundredths / 100):
        await server.run()

    assert server.nothing_left


async def test_a_second_cancellation_does_not_cut_the_stop_short(run):
    """Once it is being stopped, the grace is granted and the tree is swept, whatever becomes of the caller."""
    child = run(*reporter(), unload_timeout=GRACE)
    with trio.CancelScope() as outer, at_least(GRACE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(child.run)
            await child.said("up\n")
            child.scope.cancel()
            await child.said("got 15\n")
            outer.cancel()

    assert child.nothing_left


async def test_a_cancellation_during_the_sweep_does_not_stop_it(run):
    """The leader has died by itself, and its group is being asked to end when the cancellation comes."""
    code = f"import os\nif os.fork() == 0: os.execvp({reporter()[0]!r}, {reporter()!r})\nos.wait()"
    child = run(*python(code), unload_timeout=GRACE)
    async with child.under_way():
        await child.said("up\n")
        os.kill(child.process.pid, signal.SIGKILL)
        await child.said("got 15\n")

    assert child.nothing_left


# ---- still there? -------------------------------------------------------------------------------


def deserter(port: int) -> tuple[str, ...]:
    """A server that answers with its pid; asked for /work, and upon SIGUSR1, it listens no more, and stays.

    In the first case it computes, and answers upon SIGUSR2; asked for /stall, it computes nothing, for ever.
    """
    return python(f"""
import os, signal, socket
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
listener = socket.create_server(('127.0.0.1', {port}))
pid = str(os.getpid()).encode()
def answer():
    stream.sendall(b'HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n%s' % (len(pid), pid))
    stream.close()
def stall(*_):
    listener.close()
    os.write(1, b'gone\\n')
    while True: signal.pause()
signal.signal(signal.SIGUSR1, stall)
os.write(1, b'up\\n')
while True:
    stream, _ = listener.accept()
    asked = stream.recv(4096)
    if b'/stall' in asked: stall()
    if b'/work' in asked:
        listener.close()
        while not signal.sigtimedwait([signal.SIGUSR2], 0): pass
    answer()
""")


async def test_a_server_that_does_not_answer_any_more_is_as_good_as_dead(prober, caplog):
    """It is reported to have died, stopped, swept, and logged once."""
    port = free_port()
    server = attempt(deserter(port), prober, port=port, liveness=0.01, liveness_misses=3, unload_timeout=PATIENCE)
    async with server.under_way():
        await server.wait_ready()
        os.kill(server.process.pid, signal.SIGUSR1)
        assert await server.wait_over() is None

    how = "did not answer its health check 3 times, last probe: connection refused"
    assert (server.deaths, server.why) == (1, f'{how} ("gone")')
    assert [line for line in caplog.messages if "health check" in line] == [
        f"model server died model=m pid={server.process.pid} {how}"
    ]
    assert server.nothing_left


@attrs.define(eq=False)
class Oracle:
    """A prober that finds the server ready, and then whatever comes next; at the end, it tells."""

    answers: list[str | None]
    over: trio.Event = attrs.field(factory=trio.Event)

    async def ready(self, url: str) -> str | None:
        await trio.lowlevel.checkpoint()
        if not self.answers:
            self.over.set()
            await trio.sleep_forever()
        return self.answers.pop(0)


@pytest.fixture
def asked(run):
    """Makes an attempt at running a child whose prober is an oracle."""

    def make(*answers: str | None, **changes: object) -> tuple[Attempt, Oracle]:
        oracle = Oracle([None, *answers])
        changes = {"check_endpoint": "/health", "port_owner": "any", "liveness": 0.001, "liveness_misses": 3} | changes
        child = run("sleep", "1000", **changes)
        child.process._prober = oracle
        return child, oracle

    return make


async def test_only_misses_in_a_row_count(asked):
    """An answer in between, and all is forgotten."""
    child, oracle = asked("no", "no", None, "no", "no", None)
    async with child.under_way():
        await child.wait_ready()
        with trio.fail_after(PATIENCE):
            await oracle.over.wait()
        assert alive(child.process.pid)

    assert child.deaths == 0
    assert child.nothing_left


async def test_the_last_of_so_many_misses_is_the_end(asked):
    """Two are not enough, the third is; and it is said what it found."""
    child, oracle = asked("a", "b", "c", "d")
    async with child.under_way():
        await child.wait_over()

    assert (child.deaths, child.why) == (1, "did not answer its health check 3 times, last probe: c")
    assert oracle.answers == ["d"]


async def test_a_server_at_work_is_not_asked(asked):
    """It may answer one request at a time."""
    child, oracle = asked("no", "no", "no")
    looks, enough = [], trio.Event()

    def is_idle() -> bool:
        looks.append(len(oracle.answers))
        if len(looks) == 10:
            enough.set()
        return False

    child.idle = is_idle
    async with child.under_way():
        await child.wait_ready()
        with trio.fail_after(PATIENCE):
            await enough.wait()
        assert oracle.answers == ["no", "no", "no"]

    assert child.deaths == 0


async def test_who_was_given_a_request_during_the_probe_is_not_judged(asked):
    """It was idle when the probe began, but perhaps not when the probe came in."""
    child, oracle = asked(*10 * ["no"], liveness_misses=1)
    looks = itertools.cycle([True, False])  # before a probe, and after it
    child.idle = lambda: next(looks)
    async with child.under_way():
        await child.wait_ready()
        with trio.fail_after(PATIENCE):
            await oracle.over.wait()

    assert child.deaths == 0


@pytest.mark.parametrize("changes", [{"liveness": None}, {"check_endpoint": None}])
async def test_nobody_asks_unless_told_to(asked, changes):
    """And where there is nothing to be asked; so the server stays."""
    child, oracle = asked("no", "no", "no", **changes)
    async with child.under_way():
        await child.wait_ready()
        await wait_all_tasks_blocked(0.05)
        assert alive(child.process.pid)

    assert oracle.answers[-3:] == ["no", "no", "no"]
    assert child.deaths == 0


@pytest.mark.parametrize("before", [{"liveness": None}, {"liveness": 100 * PATIENCE}, {"liveness_misses": 1000}])
async def test_how_it_is_asked_may_change_while_it_runs(asked, before):
    """Whether at all, how often, and how many misses there may be; what is said is what was counted."""
    child, oracle = asked(*1000 * ["no"], **{"liveness": 0.001, "liveness_misses": 3} | before)
    async with child.under_way():
        await child.wait_ready()
        child.process.spec = attrs.evolve(child.process.spec, liveness=0.001, liveness_misses=3)
        await child.wait_over()

    misses = 1000 - len(oracle.answers)
    assert misses < 1000
    assert child.why.startswith(f"did not answer its health check {misses} times, last probe: no")


async def test_a_server_that_hangs_gets_no_hook_before_its_stop(asked):
    """The hook would want to talk to it."""
    hooks = ModelHooks(before_stop=shell("echo before"), after_stop=shell("echo after"))
    child, _ = asked("no", liveness_misses=1, hooks=hooks, hook_timeout=PATIENCE)
    async with child.under_way():
        await child.wait_over()

    assert child.output == "after\n"


async def test_a_server_that_ends_while_it_is_watched_has_died_once(asked):
    """By itself, and that is told."""
    child, _ = asked()
    async with child.under_way():
        await child.wait_ready()
        os.kill(child.process.pid, signal.SIGKILL)
        assert await child.wait_over() is None

    assert (child.deaths, child.why) == (1, "was killed by SIGKILL")


def hosted(**changes: object) -> tuple[int, dict[str, object]]:
    """The port of a deserter that a daemon runs, and its table."""
    port = free_port()
    table = {"cmd": list(deserter(port)), "proxy": f"http://127.0.0.1:{port}", "unload_timeout": PATIENCE}
    return port, {**table, "liveness": 0.1, "liveness_misses": 2, "backoff": 0, **changes}


async def test_behind_a_daemon_a_stalled_server_is_replaced():
    """Who waits for its answer is told, and the next request is answered by a fresh one."""
    _, table = hosted()
    async with daemon({"a": table}) as served:
        first = (await fetch(served.port, "GET", "/upstream/a/")).text
        answer = await fetch(served.port, "GET", "/upstream/a/stall")
        assert answer.status in (502, 503)
        second = await fetch(served.port, "GET", "/upstream/a/")
        assert second.status == 200
        assert second.text != first
        assert not alive(int(first))


@pytest.mark.parametrize("passing", [False, True])
async def test_behind_a_daemon_who_is_served_by_one_that_cannot_be_ended_is_told(passing):
    """It hangs, keeps the connection and must not be killed: nobody waits for an answer that will never come.

    Who only passes by, for a page's file, neither.
    """
    _, table = hosted(never_kill=True, stop_signal="SIGUSR2", unload_timeout=0)  # it stays
    async with daemon({"a": table}, upstream={"ignore_paths": ["stall"] if passing else []}) as served:
        pid = int((await fetch(served.port, "GET", "/upstream/a/")).text)
        try:
            answer = await fetch(served.port, "GET", "/upstream/a/stall")
        finally:
            os.kill(pid, signal.SIGKILL)
        assert answer.status == 503
        assert "its process did not end and must not get SIGKILL (never_kill)" in answer.text

        async def gone() -> bool:
            return not await running(served.port)

        await eventually(gone)


async def test_behind_a_daemon_an_idle_server_that_has_gone_deaf_is_replaced():
    """Before anybody asks it."""
    _, table = hosted()
    async with daemon({"a": table}) as served:
        first = (await fetch(served.port, "GET", "/upstream/a/")).text
        os.kill(int(first), signal.SIGUSR1)
        await wait_gone(int(first))
        second = await fetch(served.port, "GET", "/upstream/a/")
        assert second.status == 200
        assert second.text != first


async def test_behind_a_daemon_a_server_at_work_is_left_alone(monkeypatch):
    """It computes for one request, and listens to nobody else until that is done."""
    port, table = hosted(liveness=0.05, liveness_misses=20)  # a busy machine may let it compute nothing for a while
    looks, enough = [], trio.Event()

    def cpu_time(processes: list[proctree.Process]) -> int:
        looks.append(ticks := count(processes))
        if len(looks) > 50:
            enough.set()
        return ticks

    count = proctree.cpu_time
    async with daemon({"a": table}) as served, await connect(served.port) as client:
        pid = (await fetch(served.port, "GET", "/upstream/a/")).text
        await client.ask("GET", "/upstream/a/work")
        await eventually(partial(refuses, port))
        monkeypatch.setattr(proctree, "cpu_time", cpu_time)
        with trio.fail_after(PATIENCE):
            await enough.wait()
        os.kill(int(pid), signal.SIGUSR2)
        answer = await client.answer()

        assert (answer.status, answer.text) == (200, pid)


async def refuses(port: int) -> bool:
    """Whether nobody listens on *port*."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED


# ---- never killed -------------------------------------------------------------------------------


async def test_who_must_not_be_killed_is_left_to_itself(serve, monkeypatch):
    """It had its grace, it is reported to be stuck, and when it has ended after all, that is noticed."""
    monkeypatch.setattr(process, "KILL_WAIT", math.inf)
    monkeypatch.setattr(process, "QUARANTINE_POLL", 0.01)
    server = serve("--ignore-sigterm", "--setsid-child", unload_timeout=GRACE, never_kill=True)
    async with server.under_way():
        await server.wait_ready()
        family = server.family
        before = trio.current_time()
    assert trio.current_time() - before >= GRACE
    assert server.process.stuck
    assert server.family == family
    assert len(family) == 2

    for member in family:
        proctree.kill(member, signal.SIGKILL)
    with trio.fail_after(PATIENCE):
        await server.process.wait_gone()
    assert server.nothing_left


async def test_who_must_not_be_killed_ends_upon_the_signal(serve):
    """As everybody else; then nothing is stuck."""
    server = serve(never_kill=True)
    async with server.under_way():
        await server.wait_ready()

    assert not server.process.stuck
    assert server.nothing_left


async def test_the_guardian_knows_who_must_not_be_killed(prober):
    """By the marker, which the processes carry too."""
    spec = attempt(("x",), prober, never_kill=True).process.spec
    make = partial(_supervise, Claim("i"), NOBODY, Logs(), prober, None)

    assert make(spec, 1, NOTHING).marker == f"i-1:{spec.name}{guard.SPARED}"
    assert make(attrs.evolve(spec, never_kill=False), 2, NOTHING).marker == f"i-2:{spec.name}"


async def test_an_end_is_noticed_without_pidfds_too(run, monkeypatch):
    """Where the kernel has none, or no descriptor is free."""

    def refuse(pid: int) -> int:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(os, "pidfd_open", refuse)
    child = run(*reporter(signal.SIGTERM))
    async with child.under_way():
        await child.said("up\n")
        os.kill(child.process.pid, signal.SIGKILL)
        assert await child.wait_over() is None
    assert (child.deaths, child.nothing_left) == (1, True)

    await stop(run(*reporter(signal.SIGTERM)))


async def test_an_end_is_noticed_without_threads_too(run, monkeypatch):
    """With neither descriptors nor threads the stop is not cut short."""

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("can't start new thread")

    def no_descriptor(pid: int) -> int:
        raise OSError(errno.EMFILE, "too many open files")

    deaf = (
        "import signal; signal.alarm(120); signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up'); signal.pause()"
    )
    child = run(*python(deaf), unload_timeout=GRACE)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pidfd_open", no_descriptor)
        async with child.under_way():
            await child.said("up\n")
            patch.setattr(trio.to_thread, "run_sync", refuse)
            await trio.testing.wait_all_tasks_blocked()
    assert child.nothing_left


# ---- a spawn that hangs ---------------------------------------------------------------------------


@attrs.define(eq=False)
class DeadDisk:
    """What programs are on; those who load one wait until it answers again."""

    spawned: list[subprocess.Popen[bytes]] = attrs.field(factory=list)
    _back: threading.Event = attrs.field(factory=threading.Event)
    _loaded: threading.Event = attrs.field(factory=threading.Event)

    def popen(self, spawn: Callable[..., subprocess.Popen[bytes]], *args: object, **options: object) -> object:
        assert self._back.wait(PATIENCE)
        self.spawned.append(spawn(*args, **options))
        self._loaded.set()
        return self.spawned[-1]

    async def comes_back(self) -> subprocess.Popen[bytes]:
        """The process that is spawned then; it must end, and be reaped."""
        self._back.set()
        assert await trio.to_thread.run_sync(self._loaded.wait, PATIENCE)
        with trio.fail_after(PATIENCE):
            while not is_reaped(self.spawned[0].pid):
                await trio.lowlevel.checkpoint()
        return self.spawned[0]


@pytest.fixture
def dead_disk(monkeypatch) -> DeadDisk:
    disk = DeadDisk()
    monkeypatch.setattr(subprocess, "Popen", partial(disk.popen, subprocess.Popen))
    return disk


async def test_a_program_that_is_not_loaded_in_time_is_a_failed_start(run, dead_disk):
    """The error says so, and what comes of it later is ended."""
    child = run("sleep", "1000", health_check_timeout=GRACE)
    descriptors = open_descriptors()
    with at_least(GRACE):
        why = await fail(child)
    assert why.startswith("not spawned within 0.2 s (health_check_timeout): it is not loaded in time")
    assert child.process.pid is None

    late = await dead_disk.comes_back()
    assert late.returncode in (None, -signal.SIGKILL)
    with trio.fail_after(PATIENCE):
        while open_descriptors() > descriptors:
            await trio.lowlevel.checkpoint()
    assert child.family == []


async def test_what_comes_late_is_not_killed_if_it_must_not_be(run, dead_disk):
    """It gets the stop signal."""
    child = run("sleep", "1000", health_check_timeout=GRACE, never_kill=True, stop_signal=signal.SIGUSR1)
    await fail(child)
    late = await dead_disk.comes_back()
    with trio.fail_after(PATIENCE):
        while late.returncode is None:
            await trio.lowlevel.checkpoint()

    assert late.returncode == -signal.SIGUSR1


async def test_a_spawn_that_hangs_holds_no_cancellation_up(run, dead_disk, monkeypatch):
    """Not longer than a moment."""
    monkeypatch.setattr(spawning, "HOLD", 0.01)
    child = run("sleep", "1000", health_check_timeout=10 * PATIENCE)
    async with child.under_way():
        await wait_all_tasks_blocked()

    assert child.scope.cancelled_caught
    assert child.process.pid is None
    await dead_disk.comes_back()
    assert child.family == []


async def test_spawns_that_hang_take_nobodys_place(run, dead_disk):
    """Trio has threads for 40 at a time, and everybody needs them."""
    before = trio.to_thread.current_default_thread_limiter().borrowed_tokens
    child = run("sleep", "1000", health_check_timeout=GRACE)
    await fail(child)

    assert trio.to_thread.current_default_thread_limiter().borrowed_tokens == before
    await dead_disk.comes_back()


async def test_a_hook_that_is_not_loaded_in_time_is_late(run, dead_disk):
    """Its time is its own."""
    child = run("sleep", "1000", hooks=ModelHooks(before_start=("sleep", "1000")), hook_timeout=GRACE)

    assert await fail(child) == f"hook before_start did not end within {GRACE} s (hook_timeout)"
    await dead_disk.comes_back()


# ---- in the long run ----------------------------------------------------------------------------


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_fifty_starts_and_stops_leave_no_trace(serve, run):
    """No process, no zombie, no descriptor, no thread."""

    async def once(number: int) -> None:
        child = serve() if number % 10 == 0 else run("sleep", "1000")
        child.on_ready = child.scope.cancel
        await child.run()
        assert child.upstreams
        assert child.nothing_left

    await once(0)
    descriptors, threads = open_descriptors(), threading.active_count()
    for number in range(50):
        await once(number)

    assert open_descriptors() == descriptors
    assert threading.active_count() <= threads
