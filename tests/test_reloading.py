"""What runs beside reloads, and breaks for want of a thread: the daemon goes on, and so does it when there are some."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
from children import PATIENCE, free_port
from daemons import chat, daemon, eventually, fetch, scripted

from trioswap.reloading import Reloader
from trioswap.watching import Watch


@contextmanager
def no_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As where a container has used up its `pids.max`."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr("trio._threads.start_thread_soon", refuse)
        yield


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
