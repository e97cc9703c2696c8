"""A listener between clients and a daemon: what it saw is what was really on the wire.

It also says when models may get ready.  Whoever asks for a stream is to see heartbeats first,
on a machine of any speed, so the file that models wait for (`--ready-once` of `model_server.py`)
is there at once for other requests, but for a stream only after some heartbeats.
"""

from __future__ import annotations

import http.client
import itertools
import json
import os
import re
import socket
import socketserver
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from http.client import HTTPResponse
from pathlib import Path

import attrs
from children import PATIENCE, python
from commands import LISTENS, TRIOSWAP
from daemons import Scripted, Table, scripted, write_config

# How a request asks for a stream, in JSON and in a form.
ASKS_FOR_STREAM = re.compile(rb'"stream" ?: ?true|name="?stream"?\r\n\r\ntrue')
HEARTBEAT = b": trioswap "
# Heartbeats in a stream before its model may get ready.
HEARTBEATS = 2


@attrs.define(eq=False)
class Exchange:
    """A request and its response, byte for byte."""

    request: bytearray = attrs.field(factory=bytearray)
    response: bytearray = attrs.field(factory=bytearray)
    streams: bool = False
    """It asks for a stream, as far as it is known."""

    def ask(self, data: bytes) -> None:
        """Take more of the request."""
        self.request += data
        # Only what is new, and what a cut may have gone through: uploads are large.
        begin = len(self.request) - len(data) - 50
        self.streams = self.streams or ASKS_FOR_STREAM.search(self.request, begin) is not None

    @property
    def target(self) -> str:
        """The path and query that were asked for."""
        return self.request.split(b" ", 2)[1].decode()

    @property
    def is_answered(self) -> bool:
        """Whether the answer has begun; to be told to go on (RFC 9110, 15.2.1) is none."""
        return bool(re.sub(rb"\AHTTP/1.1 100 .*?\r\n\r\n", b"", self.response[:1000], flags=re.DOTALL))

    @property
    def heartbeats(self) -> int:
        """How many there are in the response."""
        return self.response.count(HEARTBEAT)


class Relay(socketserver.ThreadingTCPServer):
    """Passes everything on, and keeps it."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, port: int, gate: Path) -> None:
        super().__init__(("127.0.0.1", 0), Connection)
        self.behind, self.gate = port, gate
        self.port = self.server_address[1]
        self._exchanges: list[Exchange] = []

    def taken(self) -> list[Exchange]:
        """What has passed since this was asked last."""
        taken, self._exchanges = self._exchanges, []
        return taken

    def begun(self) -> Exchange:
        """A new exchange."""
        exchange = Exchange()
        self._exchanges.append(exchange)
        return exchange

    def let_ready(self, yes: bool) -> None:
        """Whether models may get ready from now on."""
        if yes:
            self.gate.touch()
        else:
            self.gate.unlink(missing_ok=True)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client or the daemon went away in the middle: that is for the test to judge."""


class Connection(socketserver.BaseRequestHandler):
    """One connection of a client, and one to the daemon for it."""

    server: Relay

    def handle(self) -> None:
        with socket.create_connection(("127.0.0.1", self.server.behind), PATIENCE) as behind:
            behind.settimeout(None)
            self.exchange: Exchange | None = None
            back = threading.Thread(target=self.pass_back, args=(behind,), daemon=True)
            back.start()
            while data := self.request.recv(65536):
                if self.exchange is None or self.exchange.is_answered:
                    self.exchange = self.server.begun()
                self.exchange.ask(data)
                # Before the daemon has it, so before it starts a model for it.
                self.server.let_ready(not self.exchange.streams)
                behind.sendall(data)
            behind.shutdown(socket.SHUT_WR)
            back.join(PATIENCE)

    def pass_back(self, behind: socket.socket) -> None:
        try:
            while data := behind.recv(65536):
                exchange = self.exchange
                exchange.response += data
                if exchange.heartbeats >= HEARTBEATS:
                    self.server.let_ready(True)
                self.request.sendall(data)
            self.request.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # the client has gone


@contextmanager
def relay(port: int, gate: Path) -> Iterator[Relay]:
    """Stand before the daemon on *port* while the block runs."""
    with Relay(port, gate) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join(PATIENCE)


# ---- the daemon ---------------------------------------------------------------------------


@attrs.frozen
class Behind:
    """A daemon in a process of its own, behind a relay."""

    port: int
    relay: Relay
    loading_text: bool
    key: str
    """What it wants to be shown by those who may do everything; empty: nothing."""

    @property
    def url(self) -> str:
        """Where clients ask."""
        return f"http://127.0.0.1:{self.relay.port}"

    @contextmanager
    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Iterator[HTTPResponse]:
        """A request of the test's own, past the relay; the answer has begun."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            connection.request(method, path, body, {"x-api-key": self.key, **headers})
            yield connection.getresponse()
        finally:
            connection.close()

    def running(self) -> list[str]:
        """Which models have a server, or are waited for."""
        with self.ask("GET", "/running") as answer:
            return [row["model"] for row in json.load(answer)["running"]]

    def unload(self) -> None:
        """Nothing is running any more when this returns."""
        with self.ask("POST", "/api/models/unload") as answer:
            assert answer.status == 200
        assert self.running() == []


@contextmanager
def daemon_behind_relay(
    directory: Path, models: Mapping[str, Scripted | Table], **settings: object
) -> Iterator[Behind]:
    """Run a daemon with *models* while the block runs; its files are in *directory*."""
    defaults = {"heartbeat": "50ms", "log_level": "warning", "start_port": start_port()}
    config = write_config(directory, models, **{**defaults, **settings})
    command = [*TRIOSWAP, "serve", "-c", config]
    with ExitStack() as stack:
        process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        stack.callback(process.wait, PATIENCE)
        stack.callback(process.terminate)
        said = process.stdout.readline()
        assert said.startswith(LISTENS), f"the daemon did not start; it said {said!r}"
        port = int(said.strip().rpartition(":")[2])
        loading_text, [key] = bool(settings.get("send_loading_state")), settings.get("api_keys", [""])
        yield Behind(port, stack.enter_context(relay(port, _gate(directory))), loading_text, key)


def well_formed(directory: Path) -> Scripted:
    """A model whose answers are well-formed, ready when the relay of *directory* lets it."""
    return served("--formats", "--ready-once", str(_gate(directory)))


def served(*flags: str | float, **settings: object) -> Scripted:
    """A scripted model server on a port that the daemon picks, for a daemon with a `start_port`."""
    return scripted(*flags, port="${PORT}", **settings)


def start_port() -> int:
    """The first of some ports for models that are loaded again and again.

    Below those that the system gives away: between two loads any connection could take one of
    these.  Two runs of the tests at the same time have others.
    """
    return 10_000 + os.getpid() % 600 * 32 + next(_starts) * 8 % 32


_starts = itertools.count()


def failing(directory: Path) -> Table:
    """A model whose start fails when the relay would let it get ready, each time it is asked for."""
    wait = f"import os, threading\nwhile not os.path.exists({str(_gate(directory))!r}): threading.Event().wait(0.01)\n"
    # Nobody listens on port 9, and nobody is to.
    cmd = list(python(wait + "raise SystemExit('no such file: weights')"))
    return {"cmd": cmd, "proxy": "http://127.0.0.1:9", "backoff": 0}


def _gate(directory: Path) -> Path:
    return directory / "gate"
