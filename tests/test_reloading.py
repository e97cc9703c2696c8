"""What breaks in reloads and beside them, for want of a thread or of an answer: the daemon goes on.

And so does what broke, as soon as it can.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
from children import PATIENCE, free_port
from daemons import chat, daemon, eventually, fetch, scripted
from fakes import Script

from trioswap.api import Services
from trioswap.config import Config
from trioswap.errors import ConfigError
from trioswap.fleet import Fleet
from trioswap.logs import Logs
from trioswap.names import Names
from trioswap.reads import CALLS, Reads
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
    reloader = Reloader(services, State(Path("nowhere"), config, {}, None), reread, **more)
    with trio.fail_after(PATIENCE):
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
                with pytest.raises(
                    ConfigError, match=r"files of the configuration: no answer within 0.01 s .*stays as"
                ):
                    await reloader.reload()
            assert asked <= CALLS
            assert not trio.to_thread.current_default_thread_limiter().borrowed_tokens
        finally:
            answer.set()
        reloader.reads.limit = PATIENCE
        assert (await reloader.reload()).nothing


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
