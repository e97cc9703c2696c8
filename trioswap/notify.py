"""What systemd wants to be told (sd_notify(3)): ready, stopping, and that we are alive.

Does nothing when systemd did not start us.
"""

from __future__ import annotations

import math
import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import trio

# Seconds; WatchdogSec is rarely less than ten of these.
ASK_AGAIN: Final = 0.5
ALIVE: Final = "WATCHDOG=1"

# Each sends what found no room, after the one before it: systemd reads nothing while it reloads itself.
_senders: list[threading.Thread] = []


def notify(state: str) -> None:
    """Send *state*, such as "READY=1", to the socket in NOTIFY_SOCKET; never blocks, never fails.

    What finds no room there is sent when there is some, in order, for systemd would wait for it
    in vain; but no sign of life, which is soon followed by the next.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):  # Linux's abstract name space
        address = "\0" + address[1:]
    _senders[:] = [sender for sender in _senders if sender.is_alive()]
    with suppress(OSError, RuntimeError):  # RuntimeError: "can't start new thread"
        if state != ALIVE and _senders:
            _send_later(address, state)
            return
        try:
            _send(address, state, blocking=False)
        except BlockingIOError:
            if state != ALIVE:
                _send_later(address, state)


def _send(address: str, state: str, *, blocking: bool) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.setblocking(blocking)
        sock.connect(address)
        sock.sendall(state.encode())


def _send_later(address: str, state: str) -> None:
    """In a thread that the end of the process does not wait for."""
    before = _senders[-1] if _senders else None

    def send() -> None:
        if before is not None:
            before.join()
        with suppress(OSError):
            _send(address, state, blocking=True)

    sender = threading.Thread(target=send, name="notify", daemon=True)
    sender.start()
    _senders.append(sender)


def more_time(seconds: float) -> str:
    """What asks for so many seconds from now for what goes on: the start, or the stop.

    It is never shortened by this.  For `notify`; systemd 236 and newer understand it.
    """
    return f"EXTEND_TIMEOUT_USEC={math.ceil(seconds * 1e6)}"


def watchdog_interval() -> float | None:
    """Seconds between signs of life: half of WATCHDOG_USEC, as sd_watchdog_enabled(3) advises; None: not wanted."""
    wanted_of = os.environ.get("WATCHDOG_PID")
    if wanted_of is not None and wanted_of != str(os.getpid()):
        return None
    try:
        return int(os.environ["WATCHDOG_USEC"]) / 2e6 or None
    except (KeyError, ValueError):
        return None


async def feed_watchdog(is_alive: Callable[[], bool] = lambda: True) -> None:
    """Send a sign of life at the asked interval while *is_alive*, for ever; return at once when none is asked for.

    A blocked event loop sends none, a daemon that is not well neither, and systemd restarts us.
    """
    interval = watchdog_interval()
    while interval is not None:
        if is_alive():
            notify(ALIVE)
            await trio.sleep(interval)
        else:  # ask again soon: who recovers just in time must be heard in time
            await trio.sleep(min(interval, ASK_AGAIN))
