"""What breaks in reloads and beside them, for want of a thread or of an answer: the daemon goes on.

And so does what broke, as soon as it can.
"""

from __future__ import annotations

import math
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path

import attrs
import pytest
import trio
from children import PATIENCE, free_port
from clocks import guarded
from daemons import chat, daemon, eventually, fetch, scripted
from fakes import Script

from trioswap.api import Services
from trioswap.cli.serving import Source
from trioswap.config import Config
from trioswap.errors import ConfigError, ShuttingDown, StartFailed, TrioswapError
from trioswap.fleet import Fleet
from trioswap.logs import Logs
from trioswap.names import Names
from trioswap.reads import CALLS, NoAnswer, Reads
from trioswap.reloading import Reloader
from trioswap.routing import Routing
from trioswap.state import State
from trioswap.watching import Watch


@contextmanager
def no_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As where a container has used up its `pids.max`."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr("trio._threads.start_thread_soon", refuse)
        yield


@asynccontextmanager
async def reloading(reread: Callable[[Config], Config], **more: object) -> AsyncIterator[Reloader]:
    """One that runs while the block does, for a daemon without models."""
    config = Config({}, (), memory=None)
    fleet = Fleet(config, Script().supervise)
    services = Services(config, fleet, Logs(), Routing(Names(config), fleet, {}), 0)
    reloader = Reloader(services, State(Path("nowhere"), config, fleet.costs, None), reread, **more)
    with guarded():
        async with trio.open_nursery() as nursery:
            await nursery.start(fleet.run)
            await nursery.start(reloader.run)
            yield reloader
            nursery.cancel_scope.cancel()


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trioswap.reloading.AGAIN", 0.01)


async def test_files_that_cannot_be_looked_at(tmp_path: Path, monkeypatch, caplog):
    """It is logged, and what has changed meanwhile is found afterwards."""
    file = tmp_path / "trioswap.toml"
    file.write_text("")
    reloader = Reloader(None, None, reread=lambda config: config)
    async with trio.open_nursery() as nursery:
        with no_threads(monkeypatch):
            nursery.start_soon(reloader.watch, Watch(lambda: [file], every=0.01))
            await eventually(partial(said, caplog, "cannot look whether the configuration has changed"))
            file.write_text("# another one")
        assert not reloader._wanted.is_set()
        with trio.fail_after(PATIENCE):
            await reloader._wanted.wait()
        nursery.cancel_scope.cancel()


async def test_files_that_do_not_answer():
    """Each reload fails in time, however many hang already, and takes nobody's threads; then they answer."""
    answer, asked = threading.Event(), 0

    def reread(config: Config) -> Config:
        nonlocal asked
        asked += 1
        answer.wait()
        return config

    async with reloading(reread, reads=Reads(0.01)) as reloader:
        try:
            for _ in range(CALLS + 2):
                with pytest.raises(NoAnswer, match=r"files of the configuration: no answer within 0.01 s .*stays as"):
                    await reloader.reload()
            assert asked <= CALLS
            assert reloader.reads.hangs
            assert not trio.to_thread.current_default_thread_limiter().borrowed_tokens
        finally:
            answer.set()
        reloader.reads.limit = PATIENCE
        assert (await reloader.reload()).nothing
        with trio.fail_after(PATIENCE):
            while reloader.reads.hangs:  # noqa: ASYNC110 - the other threads end when they do
                await trio.sleep(0.01)


@attrs.define(eq=False)
class Saying:
    """Reads a configuration that is no good, and says why, as long as the script has a reason."""

    why: list[str]
    at: list[float] = attrs.field(factory=list)
    """When it was asked."""

    def __call__(self, config: Config) -> Config:
        self.at.append(trio.current_time())
        if self.why and (why := self.why.pop(0)):
            raise ConfigError("f", [why])
        return config


class AtOnce(Reads):
    """Without threads: the clock would not wait for them."""

    async def call(self, function: Callable[[], Config], what: str) -> Config:
        await trio.lowlevel.checkpoint()
        return function()


@attrs.define(eq=False)
class Changing:
    """Files that change at these times."""

    at: list[float]

    async def wait_changed(self) -> list[Path]:
        await trio.sleep_until(self.at.pop(0) if self.at else math.inf)
        return [Path("f")]


async def reread_at(
    caplog: pytest.LogCaptureFixture, says: Saying, changes: list[float], asks: list[float]
) -> list[str]:
    """What is logged in an hour in which files change and somebody asks, at these times; *says* knows when it reads."""
    async with reloading(says, reads=AtOnce()) as reloader, trio.open_nursery() as nursery:
        begun = trio.current_time()
        nursery.start_soon(reloader.watch, Changing([begun + at for at in changes]))
        for at in asks:
            await trio.sleep_until(begun + at)
            reloader.ask()
        await trio.sleep_until(begun + 3600)
        nursery.cancel_scope.cancel()
    says.at = [at - begun for at in says.at]
    return [record.getMessage().split("\n  ")[-1] for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize("failure", [ConfigError("f", ["a", "b"]), StartFailed("m", "it did not"), ShuttingDown()])
async def test_each_who_asks_is_told_why(failure):
    """What it was, in an exception of its own."""
    told = []

    def fail(config: Config) -> Config:
        raise failure

    async def ask(reloader: Reloader) -> None:
        with pytest.raises(TrioswapError) as caught:
            await reloader.reload()
        told.append(caught.value)

    async with reloading(fail) as reloader, trio.open_nursery() as nursery:
        nursery.start_soon(ask, reloader)
        nursery.start_soon(ask, reloader)
    one, other = told
    assert (type(one), one.args, vars(one)) == (type(failure), failure.args, vars(failure))
    assert len({id(one), id(other), id(failure)}) == 3


async def test_what_is_mended_outside_the_files(autojump_clock, caplog):
    """Files that were no good are read again, ever more seldom, until they are; what is the same is logged once."""
    says = Saying(["a"] * 7 + ["b"] * 2)

    assert await reread_at(caplog, says, [100], []) == ["a", "b"]
    assert says.at == [100, 105, 115, 135, 175, 255, 415, 715, 1015, 1315]


@attrs.define(eq=False)
class Away(AtOnce):
    """From a file system that is away until then."""

    until: float = math.inf

    @property
    def hangs(self) -> bool:
        return trio.current_time() < self.until

    async def call(self, function: Callable[[], Config], what: str) -> Config:
        found = await super().call(function, what)
        if self.hangs:
            raise NoAnswer("configuration", ["no answer"])
        return found


async def test_files_that_do_not_answer_are_asked_once(autojump_clock, caplog):
    """However long they are away, and again soon after they are back; files that change meanwhile are read at once."""
    says, away = Saying([]), Away()
    async with reloading(says, reads=away) as reloader, trio.open_nursery() as nursery:
        begun = trio.current_time()
        away.until = begun + 2999
        nursery.start_soon(reloader.watch, Changing([begun, begun + 1000]))
        await trio.sleep_until(begun + 3600)
        nursery.cancel_scope.cancel()
    assert [at - begun for at in says.at] == [0, 1000, 3000]


async def test_a_model_that_is_put_in_place(tmp_path, monkeypatch, caplog):
    """With real files: its name was in the configuration before it was there."""
    monkeypatch.setattr("trioswap.reloading.FIRST_RETRY", 0.01)
    file, model = tmp_path / "trioswap.toml", tmp_path / "m.gguf"
    file.write_text("")
    source = Source((str(file),))
    async with reloading(source.reread) as reloader, trio.open_nursery() as nursery:
        nursery.start_soon(reloader.watch, Watch(source.paths, every=0.01))
        file.write_text('[groups]\n[models.m]\ngguf = "m.gguf"\n')
        await eventually(partial(said, caplog, "no such file"))
        model.write_bytes(b"")
        with trio.fail_after(PATIENCE):
            while "m" not in reloader.config.models:  # noqa: ASYNC110 - nobody tells
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()


async def test_files_that_change_again(autojump_clock, caplog):
    """It begins anew, and is told anew."""
    says = Saying(["a"] * 5)

    assert await reread_at(caplog, says, [0, 30], []) == ["a", "a"]
    assert says.at == [0, 5, 15, 30, 35, 45]


async def test_who_asks_asks_once(autojump_clock, caplog):
    """And hears each time what is wrong; where it is not any more, nothing is tried again."""
    says = Saying(["a", "a"])
    assert await reread_at(caplog, says, [], [0, 10]) == ["a", "a"]
    assert says.at == [0, 10]

    caplog.clear()
    says = Saying(["a"])
    assert await reread_at(caplog, says, [0], [1]) == ["a"]
    assert says.at == [0, 1]


async def test_a_peer_that_cannot_be_looked_after(monkeypatch, caplog):
    """Its name cannot be looked up: the daemon serves on, and sees that the peer is back when it can."""
    monkeypatch.setattr("trioswap.remote.health.FIRST_PAUSE", 0.01)
    peers = {"far": {"proxy": f"http://localhost:{free_port()}", "models": ["m"]}}
    async with daemon({"a": scripted()}, peers=peers) as served:
        assert (await fetch(served.port, "POST", "/v1/chat/completions", chat("m"))).status == 502
        with no_threads(monkeypatch):
            await eventually(partial(said, caplog, "cannot look after a peer"))
            assert (await fetch(served.port, "GET", "/health")).status == 200


async def said(caplog: pytest.LogCaptureFixture, words: str) -> bool:
    return words in caplog.text
