"""What systemd is told, by a real daemon over a real socket."""

from __future__ import annotations

import os
import secrets
import socket
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from children import PATIENCE
from commands import daemon
from daemons import scripted, write_config
from sockets import notify_socket

from trioswap import notify as notify_module
from trioswap.config import load
from trioswap.daemon import CONNECTION_GRACE
from trioswap.guardian import END_WAIT
from trioswap.notify import ALIVE, feed_watchdog, more_time, notify, watchdog_interval
from trioswap.process import KILL_WAIT
from trioswap.selfcheck import limits_of
from trioswap.state import LAST_SAVE


async def test_a_service_from_start_to_stop(tmp_path):
    """systemd hears that it is ready, then signs of life at half the asked interval, then that it stops."""
    with notify_socket(tmp_path / "notify") as notices:
        environment = {**notices.environment, "WATCHDOG_USEC": "20000"}
        async with daemon("serve", "-c", write_config(tmp_path, {"a": scripted()}), env=environment) as served:
            await notices.wait_for("READY=1")
            await notices.wait_for("WATCHDOG=1")
            await notices.wait_for("WATCHDOG=1")
            assert await served.stop() == 0
            await notices.wait_for("STOPPING=1")


async def test_abstract_socket(monkeypatch):
    """An address that begins with "@" is a name in Linux's abstract name space."""
    with notify_socket(f"@trioswap-test-{secrets.token_hex(8)}") as notices:
        monkeypatch.setenv("NOTIFY_SOCKET", notices.environment["NOTIFY_SOCKET"])
        notify("STATUS=hello")

        assert await notices.next() == "STATUS=hello"


async def test_who_does_not_read_for_a_while_hears_it_later(monkeypatch, tmp_path):
    """As systemd while it reloads: nothing that it waits for is lost, and all comes in order; signs of life may be."""
    said = ["READY=1", "STOPPING=1", *(f"STATUS={number}" for number in range(20))]
    with notify_socket(tmp_path / "notify") as notices:
        monkeypatch.setenv("NOTIFY_SOCKET", notices.environment["NOTIFY_SOCKET"])
        before = fill(tmp_path / "notify")
        for state in said:
            notify(state)
            notify(ALIVE)
        assert [await notices.next() for _ in range(before)] == ["full"] * before
        assert [await notices.next() for _ in said] == said

        notify("STATUS=at once")
        assert await notices.next() == "STATUS=at once"


async def test_nothing_overtakes_what_waits(monkeypatch, tmp_path):
    """There may be room again before it is sent; only signs of life go at once."""
    go_on = threading.Event()
    first = threading.Thread(target=go_on.wait, args=(PATIENCE,))
    first.start()
    monkeypatch.setattr(notify_module, "_senders", [first])
    with notify_socket(tmp_path / "notify") as notices:
        monkeypatch.setenv("NOTIFY_SOCKET", notices.environment["NOTIFY_SOCKET"])
        notify("STOPPING=1")
        notify(ALIVE)
        assert await notices.next() == ALIVE
        go_on.set()
        assert await notices.next() == "STOPPING=1"


def fill(address: Path) -> int:
    """Send to a socket until it takes no more; how often that was."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        sock.connect(str(address))
        sent = 0
        with suppress(BlockingIOError):
            while sock.send(b"full"):
                sent += 1
        return sent


@pytest.mark.parametrize("address", ["", "no-such-socket", "@trioswap-nobody-listens-here"])
def test_nobody_listens(address, monkeypatch, tmp_path):
    """A missing or dead socket is no error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NOTIFY_SOCKET", address)

    notify("READY=1")

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
async def test_watchdog_interval(environment, seconds, monkeypatch):
    """Signs of life come twice as often as asked, and only when they are asked of this process."""
    for name in ("WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    assert watchdog_interval() == seconds
    if seconds is None:
        await feed_watchdog()  # returns: nobody wants any


@pytest.mark.parametrize(
    ("settings", "least"),
    [
        ({}, 30 + 10),
        ({"unload_drain_timeout": "1h", "unload_timeout": 7}, 3600 + 7),
        ({"hooks": {"before_stop": ["true"], "after_stop": ["true"]}, "hook_timeout": "5m"}, 30 + 10 + 2 * 300),
    ],
)
async def test_it_asks_for_the_time_that_the_stop_may_take(tmp_path, settings, least):
    """Whatever is configured: drain, grace, SIGKILL and hooks of the slowest model, and some seconds for the rest."""
    models = {"quick": scripted(unload_drain_timeout=0, unload_timeout=0), "slow": scripted(**settings)}
    with notify_socket(tmp_path / "notify") as notices:
        path = write_config(tmp_path, models)
        async with daemon("serve", "-c", path, env=notices.environment) as served:
            assert await served.stop() == 0
        await notices.wait_for("STOPPING=1")
        name, _, number = (await notices.next()).partition("=")
    assert name == "EXTEND_TIMEOUT_USEC"
    assert least + KILL_WAIT < int(number) / 1e6 < least + KILL_WAIT + 60
    rest = CONNECTION_GRACE + LAST_SAVE + 2 * END_WAIT
    assert int(number) / 1e6 >= limits_of(load(path).models["slow"]).stop + rest


def test_more_time_is_never_too_little():
    """In whole microseconds."""
    assert more_time(1.0000001) == "EXTEND_TIMEOUT_USEC=1000001"
