"""What /proc tells about real families of processes, and signals that hit nobody else."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path

import attrs
import pytest
import trio
from children import PATIENCE, alive, ask, free_port, model_argv, python, read_until, running, wait_gone

from trioswap import guard, proctree
from trioswap.proctree import PortOwner

pytestmark = pytest.mark.skipif(not proctree.PROC.joinpath("self/stat").exists(), reason="there is no /proc")

SLEEPS = "import signal; print('up'); signal.pause()"


# A file system (fuse(4), protocol 7.31) at the directory given, with one file whose content never comes, and two
# processes that map it: the first waits for the content; the second, whose number is said, waits for the first, and
# holds the lock of its memory map meanwhile.  All end with the file system, and nobody else sees it.
HANGS = """
import ctypes, os, signal, struct, subprocess, sys, threading, time
signal.alarm(120)
directory, fuse = sys.argv[1], os.open('/dev/fuse', os.O_RDWR)
options = f'fd={fuse},rootmode=40000,user_id=0,group_id=0'.encode()
if ctypes.CDLL(None).mount(b'test', directory.encode(), b'fuse', 0, options):
    sys.exit('no file system for us')
reading = threading.Event()
def attributes(node):
    mode, size = (0o100644, 65536) if node > 1 else (0o40755, 0)
    return struct.pack('<6Q10I', node, size, 128, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)
def serve():
    while True:
        _, what, number, node = struct.unpack_from('<IIQQ', os.read(fuse, 1 << 20))
        if what == 15:
            reading.set()
        elif what not in (2, 42):
            known = {
                26: struct.pack('<4I2H2I2H8I', 7, 31, 65536, 0, 12, 9, 65536, 1, 0, 0, *[0] * 8),
                1: struct.pack('<4Q2I', 2, 1, 3600, 3600, 0, 0) + attributes(2),
                3: struct.pack('<Q2I', 3600, 0, 0) + attributes(node),
                14: struct.pack('<QIi', 1, 1, 0),
                18: b'', 25: b'',
            }
            answer = known.get(what, b'')
            os.write(fuse, struct.pack('<IiQ', 16 + len(answer), 0 if what in known else -38, number) + answer)
threading.Thread(target=serve, daemon=True).start()
code = f"import mmap, os, sys; file = os.open({directory + '/file'!r}, os.O_RDONLY)"
code += "; os.write(1, b'o'); sys.stdin.read(1); mmap.mmap(file, 65536, mmap.MAP_PRIVATE, mmap.PROT_READ)[0]"
first, second = [subprocess.Popen([sys.executable, '-S', '-E', '-c', code], stdin=-1, stdout=-1) for _ in 'ab']
first.stdout.read(1), second.stdout.read(1)
first.stdin.close()
reading.wait()
second.stdin.close()
while open(f'/proc/{second.pid}/stat').read().rpartition(')')[2].split()[0] != 'D':
    time.sleep(0.01)
print('up', second.pid, '.', flush=True)
signal.pause()
"""
PRIVATE = ("unshare", "--map-root-user", "--mount")


def can_hang() -> bool:
    try:
        with Path("/dev/fuse").open("r+b", buffering=0):
            return subprocess.run([*PRIVATE, "true"], check=False, capture_output=True).returncode == 0
    except OSError:
        return False


@asynccontextmanager
async def family(marker, argv, until):
    """A marked child; at the end of the block every member of its family is gone."""
    async with running(argv, until=until, env={proctree.MARKER: marker}) as leader:
        try:
            yield leader
        finally:
            for process in proctree.members(leader.pid, marker):
                proctree.kill(process, signal.SIGKILL)
                if process.pid != leader.pid:
                    await wait_gone(process.pid)


async def children_of(port):
    status, body = await ask(port, "GET", "/children")
    assert status == 200
    return json.loads(body)


def pids(processes):
    return {process.pid for process in processes}


async def test_a_lone_child_is_its_whole_family():
    """The child itself is a member, with its name, and nobody else is."""
    async with family("lone", python(SLEEPS), "up") as leader:
        (only,) = proctree.members(leader.pid, "lone")
        assert only.pid == leader.pid
        assert only.name.startswith("python")
        assert only == proctree.look(leader.pid)


@contextmanager
def no_descriptors():
    """Nobody can open anything while the block runs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))  # noqa: PTH208 - as text
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
    taken = []
    try:
        with suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in taken:
            os.close(descriptor)


async def test_the_family_is_seen_when_no_descriptor_is_left():
    """Nobody found would mean that nobody is left, and the family would stay for ever."""
    port = free_port()
    async with family("full", model_argv("a", "--setsid-child", port=port), "ready") as leader:
        for child in [leader.pid, *await children_of(port)]:
            assert child in pids(proctree.members(leader.pid, "full"))
        wanted = proctree.members(leader.pid, "full")
        for _ in range(3):  # and it is kept for the next time
            with no_descriptors():
                with pytest.raises(OSError, match="Too many open files"):
                    os.open(os.devnull, os.O_RDONLY)
                assert proctree.members(leader.pid, "full") == wanted
                assert proctree.look(leader.pid) in wanted
                assert proctree.port_owner(port, "127.0.0.1", wanted) is PortOwner.TREE


async def test_a_look_that_no_descriptor_is_left_for_says_nothing(monkeypatch):
    """Not even the kept one: it raises, for an empty answer would mean that everybody has gone."""
    port = free_port()
    async with family("blind", model_argv("a", port=port), "ready") as leader:
        wanted = proctree.members(leader.pid, "blind")
        monkeypatch.setattr(proctree._spare, "_kept", None)
        with no_descriptors():
            for look in (
                partial(proctree.members, leader.pid, "blind"),
                partial(proctree.look, leader.pid),
                partial(proctree.cpu_time, wanted),
                partial(proctree.listening_inodes, port),
            ):
                with pytest.raises(OSError, match="Too many open files"):
                    look()
            assert proctree.port_owner(port, "127.0.0.1", wanted) is PortOwner.UNKNOWN
            assert not proctree.kill(wanted[0], signal.SIGKILL), "it may be somebody else by now"
        assert leader.returncode is None
        assert proctree.members(leader.pid, "blind") == wanted


async def test_whoever_hangs_with_the_kept_descriptor_keeps_nobody_else():
    """Who gets none says nothing, as above."""
    with proctree._spare._lock, no_descriptors(), pytest.raises(OSError, match="Too many open files"):
        proctree.look(os.getpid())


@pytest.mark.skipif(not can_hang(), reason="no file systems for us")
async def test_a_process_on_a_file_system_that_does_not_answer_holds_up_no_look(tmp_path):
    """A real one, whose environment nobody can read before it has ended; daemon and guardian go on."""
    marker, hangs = f"well-{os.getpid()}", (*PRIVATE, *python(HANGS), str(tmp_path))
    async with family(marker, python(SLEEPS), "up") as leader, running(hangs) as server:
        with trio.fail_after(PATIENCE):
            said = (await read_until(server, " .")).split()
            for look in (partial(proctree.members, -1, marker), guard.Sweep([f"i{os.getpid()}"], {}).look):
                await trio.to_thread.run_sync(look, abandon_on_cancel=True)
            assert pids(proctree.members(-1, marker)) == {leader.pid}
        assert int(said[1]) in {pid for at in proctree._questions.late for pid, _ in at}


async def test_a_stranger_that_hangs_holds_up_no_look(tmp_path, monkeypatch):
    """A process that maps a file of a dead file system does not let its environment be read; it is asked once."""
    os.mkfifo(pipe := tmp_path / "pipe")
    asked, read = [], proctree._read_file

    def read_file(path: str) -> bytes:
        if path == f"/proc/{stranger.pid}/environ":
            asked.append(path)
            pipe.read_bytes()  # not before the other end is opened
        return read(path)

    marker = f"hangs-{os.getpid()}"
    async with running(python(SLEEPS), until="up") as stranger, family(marker, python(SLEEPS), "up") as leader:
        monkeypatch.setattr(proctree, "_read_file", read_file)
        for session in (leader.pid, -1, -1):
            look = partial(trio.to_thread.run_sync, proctree.members, session, marker, abandon_on_cancel=True)
            with trio.fail_after(PATIENCE):
                assert pids(await look()) == {leader.pid}
        assert len(asked) == 1
        assert pids(proctree.members(stranger.pid, marker)) == {stranger.pid, leader.pid}, "by its session"
        os.close(os.open(pipe, os.O_RDWR | os.O_NONBLOCK))


async def test_a_child_in_the_group_is_a_member_without_the_marker():
    """A fork with a cleared environment belongs by its session, after the leader's end too."""
    code = f"""
import os, signal
if os.fork() == 0:
    os.execve({sys.executable!r}, {python(SLEEPS)!r}, {{}})
signal.pause()
"""
    async with family("group", python(code), "up") as leader:
        (child,) = pids(proctree.members(leader.pid, "group")) - {leader.pid}
        assert pids(proctree.members(leader.pid, "another attempt")) == {leader.pid, child}
        leader.kill()
        await leader.wait()
        assert pids(proctree.members(leader.pid, "another attempt")) == {child}


async def test_a_process_that_changed_its_group_belongs_by_its_session():
    """Job control gives a child a group of its own; the session still tells whose it is."""
    code = f"import os, signal\nif os.fork() == 0:\n    os.setpgid(0, 0)\n    {SLEEPS}\nsignal.pause()"
    async with family("job", python(code), "up") as leader:
        (child,) = pids(proctree.members(leader.pid, "another attempt")) - {leader.pid}
        assert os.getpgid(child) == child


async def test_a_similar_variable_is_no_marker():
    """Name and id must be the very ones, not the end of one and the beginning of the other."""
    almost = {f"NOT_{proctree.MARKER}": "similar", proctree.MARKER: "similar2"}
    async with family("similar", python(SLEEPS), "up") as leader, running(python(SLEEPS), until="up", env=almost):
        assert pids(proctree.members(leader.pid, "similar")) == {leader.pid}


async def test_escapees_are_found_by_the_marker():
    """Who calls setsid and forks twice is found by the inherited environment, and only under its own id."""
    port = free_port()
    async with family("escape", model_argv("m", "--fork", "--setsid-child", port=port), "ready") as leader:
        in_group, escaped = await children_of(port)
        assert os.getsid(escaped) not in (leader.pid, os.getsid(0))
        assert pids(proctree.members(leader.pid, "escape")) == {leader.pid, in_group, escaped}
        assert pids(proctree.members(leader.pid, "escap")) == {leader.pid, in_group}
        assert pids(proctree.members(leader.pid, "escape2")) == {leader.pid, in_group}


async def test_zombies_are_no_members():
    """A process that has ended and waits to be reaped is not alive."""
    code = f"""
import os, signal
pid = os.fork() or os._exit(0)
os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
{SLEEPS}
"""
    async with family("zombie", python(code), "up") as leader:
        assert pids(proctree.members(leader.pid, "zombie")) == {leader.pid}


async def test_a_process_whose_main_thread_has_ended_is_alive():
    """Such a process looks like a zombie in /proc, and still holds its memory and its port."""
    code = """
import ctypes, signal, threading
def stay():
    while open('/proc/self/stat').read().rpartition(')')[2].split()[0] != 'Z':
        pass
    print('up', flush=True)
    signal.pause()
threading.Thread(target=stay).start()
ctypes.CDLL(None).pthread_exit(None)
"""
    async with family("threads", python(code), "up") as leader:
        assert pids(proctree.members(leader.pid, "threads")) == {leader.pid}


async def test_kill_signals_the_very_process():
    """The process found is the process hit, and the answer says so."""
    async with family("kill", python(SLEEPS), "up") as leader:
        (process,) = proctree.members(leader.pid, "kill")
        assert proctree.kill(process, signal.SIGTERM)
        assert await leader.wait() == -signal.SIGTERM
        assert not proctree.kill(process, signal.SIGTERM)


@pytest.mark.parametrize("pidfds", [True, False], ids=["pidfd", "no pidfd"])
async def test_kill_spares_a_process_that_got_the_pid_later(pidfds, monkeypatch):
    """The same pid with another start time is somebody else, with and without pidfds."""
    if not pidfds:
        monkeypatch.delattr(os, "pidfd_open")
    async with family("reuse", python(SLEEPS), "up") as leader:
        process = proctree.look(leader.pid)
        earlier = attrs.evolve(process, start_time=process.start_time - 1)
        assert not proctree.kill(earlier, signal.SIGKILL)
        assert alive(leader.pid)
        assert proctree.kill(process, signal.SIGKILL)
        assert await leader.wait() == -signal.SIGKILL


async def test_a_name_with_parentheses_and_spaces_is_read_right():
    """The kernel does not escape names, so only the last parenthesis counts."""
    code = "open('/proc/self/comm', 'w').write(') S 1 (x y'); " + SLEEPS
    async with family("name", python(code), "up") as leader:
        (process,) = proctree.members(leader.pid, "name")
        assert process.name == ") S 1 (x y"


async def test_the_port_of_a_child_belongs_to_its_tree():
    """The usual case: the child itself listens."""
    port = free_port()
    async with family("port", model_argv("m", port=port), "listening") as leader:
        tree = proctree.members(leader.pid, "port")
        assert proctree.port_owner(port, "127.0.0.1", tree) is PortOwner.TREE
        assert pids(proctree.who_listens(port)) == {leader.pid}


async def test_a_stranger_on_the_port_is_told_from_the_child():
    """A server that was there before is no readiness of ours, and can be named."""
    port = free_port()
    async with (
        running(model_argv("stranger", port=port), until="listening") as stranger,
        family("late", model_argv("m", "--wrong-port", port=port), "") as leader,
    ):
        tree = proctree.members(leader.pid, "late")
        assert leader.pid in pids(tree)
        assert proctree.port_owner(port, "127.0.0.1", tree) is PortOwner.STRANGER
        (holder,) = proctree.who_listens(port, "127.0.0.1")
        assert holder.pid == stranger.pid


async def test_an_inherited_socket_belongs_to_the_tree():
    """A worker that a master forked listens too, and stays the owner after the master's end."""
    code = """
import os, signal, socket
listener = socket.create_server(('127.0.0.1', 0))
if os.fork() == 0:
    print('port', listener.getsockname()[1], 'up')
signal.pause()
"""
    async with family("worker", python(code), "up") as leader:
        (worker,) = pids(proctree.members(leader.pid, "worker")) - {leader.pid}
        (port,) = ports_of(worker)
        leader.kill()
        await leader.wait()
        tree = proctree.members(leader.pid, "worker")
        assert proctree.port_owner(port, "127.0.0.1", tree) is PortOwner.TREE


def ports_of(pid):
    """The ports whose listening sockets the process holds, found by trying each row."""
    rows = [row.split() for row in proctree.PROC.joinpath("net/tcp").read_text().splitlines()[1:]]
    ports = {int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == "0A"}
    return [port for port in ports if proctree.holds_any(pid, proctree.listening_inodes(port))]


def test_nobody_listens_on_a_free_port():
    """No row, no owner."""
    assert proctree.listening_inodes(free_port()) == frozenset()
    assert proctree.port_owner(free_port(), "127.0.0.1", []) is PortOwner.NOBODY


@pytest.fixture
def listen():
    """Opens listening sockets and closes them after the test."""
    opened = []

    def listen(host, port=0, *, only6=False):
        listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        opened.append(listener)
        if ":" in host:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only6)
        try:
            listener.bind((host, port))
        except OSError as exc:
            pytest.skip(f"no such address here: {host} ({exc})")
        listener.listen()
        return listener.getsockname()[1], os.fstat(listener.fileno()).st_ino

    yield listen
    for listener in opened:
        listener.close()


@pytest.mark.parametrize(
    ("bound", "hosts"),
    [
        ("127.0.0.1", ["127.0.0.1", "localhost", None, "0.0.0.0"]),
        ("127.0.0.2", ["127.0.0.2", None]),
        ("::1", ["::1", "localhost", None]),
        ("::ffff:127.0.0.1", ["127.0.0.1", "::ffff:127.0.0.1"]),
    ],
)
def test_a_listener_is_found_at_its_address(listen, bound, hosts):
    """IPv4, IPv6 and IPv4 in IPv6 clothes, by address, by name, or by the port alone."""
    port, inode = listen(bound)
    for host in hosts:
        assert proctree.listening_inodes(port, host) == {inode}, host
    assert proctree.listening_inodes(port, "127.9.9.9") == frozenset()


def test_the_exact_address_comes_before_all_addresses(listen):
    """As the kernel does: who is bound to just this address gets the connection."""
    port, at_v6 = listen("::1", only6=True)
    port, at_v4 = listen("127.0.0.1", port)
    assert proctree.listening_inodes(port, "127.0.0.1") == {at_v4}
    assert proctree.listening_inodes(port, "::1") == {at_v6}
    assert proctree.listening_inodes(port) == {at_v4, at_v6}


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """A /proc with nothing but socket tables: addresses that no test should really listen on."""
    monkeypatch.setattr(proctree, "PROC", tmp_path)
    tmp_path.joinpath("net").mkdir()

    def write(name, *rows):
        lines = ["  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode"]
        for number, (address, port, state, inode) in enumerate(rows):
            ends = f"{address}:{port:04X} {address}:0000"
            lines.append(
                f"{number:4}: {ends} {state} 00000000:00000000 00:00000000 00000000  1000        0 {inode} 1 0000"
            )
        tmp_path.joinpath("net", name).write_text("\n".join(lines) + "\n")

    return write


ANY4, ANY6 = "0" * 8, "0" * 32
LOOPBACK4 = "0100007F" if sys.byteorder == "little" else "7F000001"


def test_a_listener_at_all_addresses_takes_what_no_other_takes(tables):
    """The exact address first, then all of IPv4, then all of IPv6, which takes IPv4 too."""
    tables("tcp6", (ANY6, 8080, "0A", 6))
    assert proctree.listening_inodes(8080, "127.0.0.1") == {6}
    tables("tcp", (ANY4, 8080, "0A", 4))
    assert proctree.listening_inodes(8080, "127.0.0.1") == {4}
    tables("tcp", (ANY4, 8080, "0A", 4), (LOOPBACK4, 8080, "0A", 5))
    assert proctree.listening_inodes(8080, "127.0.0.1") == {5}
    assert proctree.listening_inodes(8080, "127.0.0.2") == {4}
    assert proctree.listening_inodes(8080, "::1") == {6}


def test_connections_and_other_ports_are_no_listeners(tables):
    """Only rows in the state LISTEN with exactly this port count."""
    tables("tcp", (LOOPBACK4, 8080, "01", 1), (LOOPBACK4, 80, "0A", 2), (LOOPBACK4, 18080, "0A", 3))
    assert proctree.listening_inodes(8080) == frozenset()
    assert proctree.listening_inodes(80) == {2}


def test_a_socket_that_nobody_visible_holds_has_an_unknown_owner(tables):
    """As with the processes of another user: somebody listens, and we may not know who."""
    tables("tcp", (LOOPBACK4, 8080, "0A", 1))
    assert proctree.port_owner(8080, "127.0.0.1", []) is PortOwner.UNKNOWN


def test_without_proc_nothing_is_known_and_nothing_is_signalled(tmp_path, monkeypatch):
    """Other systems get empty answers, never a wrong one."""
    me = proctree.look(os.getpid())
    monkeypatch.setattr(proctree, "PROC", tmp_path)
    assert proctree.look(os.getpid()) is None
    assert proctree.members(os.getpid(), "any") == []
    assert proctree.who_listens(8080) == []
    assert proctree.port_owner(8080, "127.0.0.1", [me]) is PortOwner.UNKNOWN
    assert not proctree.kill(me, signal.SIGTERM)
