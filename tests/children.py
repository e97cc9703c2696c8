"""Real children for tests: the scriptable model server, and Python one-liners."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
import zlib
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import trio

# Seconds for what takes milliseconds; a test that needs them all has failed anyway.
PATIENCE = 60.0
MODEL_SERVER = Path(__file__).with_name("model_server.py")


def model_argv(name: str, *flags: str | float, port: int | str) -> tuple[str, ...]:
    """The command of a model server called *name*; for the flags see `model_server.py`.

    The port may be text, so that a configuration can say "${PORT}".
    """
    head = (sys.executable, "-S", "-E", str(MODEL_SERVER), "--port", str(port), "--name", name)
    return (*head, *map(str, flags))


def python(code: str) -> tuple[str, ...]:
    """The command of a child small enough to read."""
    return (sys.executable, "-S", "-E", "-u", "-c", code)


# Below the ports that the kernel gives to connections: one of those may take the port of a server that is
# being swapped.  Each is given once; the workers of a run take turns, two at a time for whoever needs neighbours, and
# two runs begin at different ones.
_RUN = zlib.crc32(os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid())).encode())
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
_PAIRS = itertools.count(10_000 + 10 * (_RUN % 1_900) + 2 * _WORKER, 2 * _WORKERS)
_PORTS = itertools.chain.from_iterable((first, first + 1) for first in _PAIRS)


def free_port() -> int:
    """A loopback port that nobody listened on a moment ago."""
    for port in _PORTS:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise AssertionError("ports do not end")


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return text.rpartition(")")[2].split()[0] not in "ZX"


async def wait_gone(pid: int) -> None:
    """Return when the process has ended, whoever reaps it."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        with trio.fail_after(PATIENCE):
            await trio.lowlevel.wait_readable(descriptor)
    finally:
        os.close(descriptor)


@asynccontextmanager
async def running(
    argv: Sequence[str], *, until: str = "", env: Mapping[str, str] | None = None
) -> AsyncIterator[trio.Process]:
    """Run a child in a session of its own; its group is killed and it is reaped at the end of the block.

    With *until*, the block begins when the child has written that to its stdout.
    """
    process = await trio.lowlevel.open_process(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env={**os.environ, **(env or {})},
        start_new_session=True,
    )
    try:
        with trio.fail_after(PATIENCE):
            await read_until(process, until)
        yield process
    finally:
        # Not reaped yet, so the number is still the group's.
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
        # Shielded, or a failed test would leave a zombie; bounded, as everything is.
        with trio.fail_after(PATIENCE, shield=True):
            await process.wait()
            await process.stdout.aclose()


async def read_until(process: trio.Process, text: str) -> str:
    """What the child writes to its stdout, up to *text*."""
    said = ""
    while text not in said:
        data = await process.stdout.receive_some()
        assert data, f"the child ended its output without {text!r}: {said[-1000:]!r}"
        said += data.decode()
    return said


async def ask(port: int, method: str, target: str, body: bytes = b"", *headers: str) -> tuple[int, bytes]:
    """One request on a connection of its own, byte for byte as given; return status and raw body.

    A chunked body comes with its framing, a truncated one as far as it came.
    """
    lines = [f"{method} {target} HTTP/1.1", "Host: test", "Connection: close", f"Content-Length: {len(body)}", *headers]
    with trio.fail_after(PATIENCE):
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all("\r\n".join([*lines, "", ""]).encode() + body)
            answer = b"".join([data async for data in stream])
    head, _, content = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), content
