"""A family of which nobody can say who is left: it counts as being there, and is ended once it is seen again."""

from __future__ import annotations

import errno
import math
import os
import signal
from functools import partial

import attrs
import pytest
import trio
from attempts import attempt
from children import PATIENCE, alive, free_port, model_argv, python, read_until, running

from trioswap import guard, proctree
from trioswap.proctree import MARKER
from trioswap.remote import Prober
from trioswap.spawning import spawn
from trioswap.stopping import Family

# Ends at once; its child, in the same session, does not.
LEAVES_ONE = """
import os, signal
reader, writer = os.pipe()
if os.fork() == 0:
    os.close(reader)
    signal.alarm(120)
    os.write(writer, b"x")
    signal.pause()
os.read(reader, 1)
"""


@attrs.define(eq=False)
class Blind:
    """`proctree._spare` while there is no descriptor, for so many looks, and while `lasts`."""

    looks: int = 0
    lasts: bool = False
    _sees: proctree._Spare = attrs.field(factory=lambda: proctree._spare)

    def read(self, path: str) -> bytes:
        self._fail()
        return self._sees.read(path)

    def names(self, directory: str) -> list[str]:
        self._fail()
        return self._sees.names(directory)

    def _fail(self) -> None:
        self.looks -= 1
        if self.lasts or self.looks >= 0:
            raise OSError(errno.ENFILE, "too many open files in system")


@pytest.fixture
def blind(monkeypatch) -> Blind:
    blind = Blind()
    monkeypatch.setattr(proctree, "_spare", blind)
    return blind


async def test_nobody_is_taken_for_gone_who_cannot_be_looked_for(blind):
    """The server has ended, its child has not: while /proc cannot be read whoever was there is still there."""
    family = Family(f"blind-{os.getpid()}")
    env = {proctree.MARKER: family.marker}
    await spawn(python(LEAVES_ONE), env, partial(setattr, family, "leader"), deadline=math.inf)
    async with family.leader.stdout:
        with trio.fail_after(PATIENCE):
            assert await family.leader.wait() == 0
        [child] = family.members()
        blind.lasts = True
        assert family
        assert family.members() == [child]
        assert family.has_strays()
        blind.lasts = False
        proctree.kill(child, signal.SIGKILL)
        with trio.fail_after(PATIENCE):
            await family.wait_gone()
        assert family.members() == []


@pytest.mark.parametrize("looks", [1, 2, 7])
async def test_a_stop_that_cannot_look_goes_on_until_it_can(blind, looks):
    """An escapee that ignores SIGTERM would be left for ever if nobody found meant that nobody is there."""
    prober = Prober()
    argv = model_argv("m", "--setsid-child", port=(port := free_port()))
    server = attempt(argv, prober, port=port, unload_timeout=0.0)
    async with server.under_way():
        await server.wait_ready()
        assert len(server.family) == 2
        blind.looks = looks
    await prober.aclose()

    assert not server.process.stuck
    assert server.nothing_left


async def test_who_is_never_seen_again_is_stuck(blind, monkeypatch):
    """Nobody can say that the stop has succeeded, so nobody does; once it can be seen, it is over."""
    monkeypatch.setattr("trioswap.process.KILL_WAIT", 0.1)
    monkeypatch.setattr("trioswap.process.QUARANTINE_POLL", 0.01)
    prober = Prober()
    argv = model_argv("m", port=(port := free_port()))
    server = attempt(argv, prober, port=port, unload_timeout=0.0)
    async with server.under_way():
        await server.wait_ready()
        blind.lasts = True
    await prober.aclose()
    assert server.process.stuck
    blind.lasts = False
    with trio.fail_after(PATIENCE):
        await server.process.wait_gone()
    assert server.nothing_left


async def test_a_guardian_that_cannot_look_goes_on_until_it_can(monkeypatch):
    """The same for what a daemon has left."""
    looks, pids = [], guard.pids

    def open_(*arguments: object, **options: object) -> object:
        if len(looks) <= 3:
            raise OSError(errno.EMFILE, "too many open files")
        return open(*arguments, **options)  # noqa: PTH123 - in its place

    monkeypatch.setattr(guard, "open", open_, raising=False)
    monkeypatch.setattr(guard, "pids", lambda: looks.append("a look") or pids())
    sleeps = python("import signal; print('up'); signal.pause()")
    async with running(sleeps, until="up", env={proctree.MARKER: "i-1"}) as child:
        await trio.to_thread.run_sync(guard.Sweep(["i"], {}).run, 0.0, PATIENCE)
        assert len(looks) > 3
        assert not alive(child.pid)


async def test_who_has_lost_the_marker_since_is_still_there(tmp_path):
    """As everybody has who is ending, for as long as it takes to give back what it holds; here for longer."""
    lose = tmp_path / "lose"
    os.mkfifo(lose)
    nameless = python("import signal; print('lost'); signal.alarm(120); signal.pause()")
    code = "import os, sys; print('up'); open(sys.argv[1]).read(); os.execve(sys.argv[2], sys.argv[2:], {})"
    family = Family(f"lost-{os.getpid()}")
    async with running((*python(code), str(lose), *nameless), until="up", env={MARKER: family.marker}) as child:
        assert family.has_strays()
        await trio.to_thread.run_sync(lose.write_text, "")
        with trio.fail_after(PATIENCE):
            await read_until(child, "lost")
            assert proctree.members(-1, family.marker) == []
            assert family.has_strays()
            await family.end_strays(signal.SIGTERM)
            assert await child.wait() == -signal.SIGTERM
        assert not family.has_strays()
