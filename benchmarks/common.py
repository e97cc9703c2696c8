"""What the benchmarks share: scriptable model servers, a real daemon in front of them, and a client."""

from __future__ import annotations

import http.client
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import attrs
import tomli_w

PATIENCE = 30.0  # seconds for whatever takes milliseconds; then a benchmark fails instead of waiting
SERVER = Path(__file__).parent.parent / "tests" / "model_server.py"
Address = tuple[str, int]
# Below the ports that the kernel gives to connections: one of those may take the port of a server that is
# being swapped.  Each is given once, and two benchmarks at the same time begin at different ones.
_PORTS = itertools.count(10_000 + 10 * (os.getpid() % 2_000))


@attrs.frozen
class Daemon:
    """A daemon that accepts requests."""

    address: Address
    log: Path
    """What it writes to its standard error."""
    pid: int


@contextmanager
def daemon(models: Mapping[str, Mapping[str, object]], *, log_level: str, **settings: object) -> Iterator[Daemon]:
    """A real daemon that has learned nothing yet, one of *models* resident at a time.

    Raises:
        TimeoutExpired: it did not end by itself.
    """
    with tempfile.TemporaryDirectory() as directory:
        config, log = Path(directory) / "trioswap.toml", Path(directory) / "log"
        own = {"listen": "127.0.0.1:0", "state_dir": directory, "groups": {}}
        config.write_text(tomli_w.dumps({**own, **settings, "models": models}))
        argv = [sys.executable, "-m", "trioswap", "serve", "-c", str(config), "--log-level", log_level]
        with log.open("w") as errors:
            process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            yield Daemon(_address(process, log), log, process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=PATIENCE)


def _address(process: subprocess.Popen[str], log: Path) -> Address:
    """Where it says that it listens."""
    assert process.stdout is not None
    said = process.stdout.readline()
    assert said, log.read_text()
    url = urlsplit(said.split()[-1])
    assert url.hostname is not None
    assert url.port is not None
    return url.hostname, url.port


def model(name: str, *flags: str | float, **settings: object) -> dict[str, object]:
    """The table [models.NAME] of a `model_server.py` with these flags."""
    port = free_port()
    return {"cmd": command(name, port, *flags), "proxy": f"http://127.0.0.1:{port}", **settings}


def command(name: str, port: int, *flags: str | float) -> list[str]:
    """The command line of such a server."""
    return [sys.executable, "-S", "-E", str(SERVER), "--port", str(port), "--name", name, *map(str, flags)]


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


def ask(address: Address, name: str, *, patience: float = PATIENCE, **script: object) -> tuple[float, dict[str, Any]]:
    """POST a small request to the model *name*; when the first byte of its answer came, and the answer.

    For *script* see `model_server.py`.

    Raises:
        TimeoutError: nothing came for *patience* seconds.
        AssertionError: it is an error, or from another model.
    """
    connection = http.client.HTTPConnection(*address, timeout=patience)
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps({"model": name, "script": script}))
        response = connection.getresponse()
        first_byte = time.monotonic()
        answer = json.loads(response.read())
    finally:
        connection.close()
    assert response.status == 200, answer
    assert answer["model"] == name, answer
    return first_byte, answer
