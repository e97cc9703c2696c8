"""A daemon inside the test, model servers for it, and an HTTP client that can do each step alone.

A daemon in a process of its own is `commands.daemon`; the clients here serve for both.
"""

from __future__ import annotations

import itertools
import json
import signal
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Self

import attrs
import h11
import tomli_w
import trio
from children import PATIENCE, free_port, model_argv, python

from trioswap.config import loads
from trioswap.daemon import serve
from trioswap.logs import Logs

Table = dict[str, object]

# What daemons learn in tests: a directory for each, and all of them gone at the end.
STATE = tempfile.TemporaryDirectory(prefix="trioswap-state-")
_COUNTER = itertools.count()


# ---- model servers ------------------------------------------------------------------------


@attrs.frozen
class Scripted:
    """A `model_server.py` with these flags, and what the configuration says of it."""

    flags: tuple[str | float, ...]
    port: int
    settings: Table

    def table(self, name: str) -> Table:
        """The table [models.NAME]."""
        cmd = list(model_argv(name, *self.flags, port=self.port))
        return {"cmd": cmd, "proxy": f"http://127.0.0.1:{self.port}", **self.settings}


def scripted(*flags: str | float, port: int | None = None, **settings: object) -> Scripted:
    """A model server that does what *flags* say; its port is a free one unless given."""
    return Scripted(flags, free_port() if port is None else port, settings)


@attrs.frozen
class ByHand:
    """A model whose answers the test itself writes, byte by byte; the child only stands there.

    Take the listener down before the daemon ends, or it waits for the port.
    """

    _listener: trio.SocketListener

    def table(self, _: str) -> Table:
        """The table [models.NAME]."""
        port = self._listener.socket.getsockname()[1]
        cmd = list(python("import signal; signal.pause()"))
        proxy = f"http://127.0.0.1:{port}"
        return {"cmd": cmd, "proxy": proxy, "check_endpoint": "none", "port_owner": "any"}

    async def accept(self) -> Client:
        """The next connection of the daemon; `parser` is that of a server."""
        return Client(await self._listener.accept(), h11.Connection(h11.SERVER))

    async def close(self) -> None:
        """Free the port."""
        await self._listener.aclose()


@asynccontextmanager
async def by_hand() -> AsyncIterator[ByHand]:
    """A model server that is the test."""
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        yield ByHand(listener)


# ---- the daemon ---------------------------------------------------------------------------


@attrs.frozen
class Daemon:
    """A daemon that accepts requests."""

    port: int
    logs: Logs
    model_ports: Mapping[str, int]
    """Of its scripted model servers."""


@asynccontextmanager
async def daemon(models: Mapping[str, Scripted | ByHand | Table], **settings: object) -> AsyncIterator[Daemon]:
    """Run a daemon while the block runs; then it gets SIGTERM and must end by itself."""
    with trio.fail_after(2 * PATIENCE):
        async with trio.open_nursery() as nursery:
            logs = Logs()
            [url] = await nursery.start(serve, loads(document(models, **settings)), logs)
            ports = {name: model.port for name, model in models.items() if isinstance(model, Scripted)}
            yield Daemon(int(url.rpartition(":")[2]), logs, ports)
            signal.raise_signal(signal.SIGTERM)


def document(models: Mapping[str, Scripted | ByHand | Table], **settings: object) -> str:
    """A configuration in TOML that listens on a free port."""
    tables = {name: model if isinstance(model, dict) else model.table(name) for name, model in models.items()}
    state = str(Path(STATE.name) / str(next(_COUNTER)))
    return tomli_w.dumps({"listen": "127.0.0.1:0", "state_dir": state, "groups": {}, **settings, "models": tables})


def write_config(directory: Path, models: Mapping[str, Scripted | ByHand | Table], **settings: object) -> str:
    """The same in a file; its path."""
    path = directory / "trioswap.toml"
    path.write_text(document(models, **settings))
    return str(path)


# ---- clients ------------------------------------------------------------------------------


@attrs.frozen
class Answer:
    """A whole response."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()

    def json(self):
        return json.loads(self.body)

    def __getitem__(self, name: str) -> str | None:
        """The one header *name*, or None."""
        values = [value for key, value in self.headers if key == name]
        assert len(values) <= 1, f"{name} came {len(values)} times"
        return values[0] if values else None


@attrs.define(eq=False)
class Client:
    """One side of an HTTP/1.1 connection, step by step."""

    stream: trio.SocketStream
    parser: h11.Connection = attrs.field(factory=partial(h11.Connection, h11.CLIENT))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stream.aclose()

    async def send(self, event: h11.Event) -> None:
        await self.stream.send_all(self.parser.send(event))

    async def ask(self, method: str, target: str, body: bytes = b"", *headers: tuple[str, str]) -> None:
        """Send a whole request."""
        fields = [("host", "test"), *([("content-length", str(len(body)))] if body else []), *headers]
        data = self.parser.send(h11.Request(method=method, target=target, headers=fields))
        data += self.parser.send(h11.Data(data=body)) if body else b""
        await self.stream.send_all(data + self.parser.send(h11.EndOfMessage()))

    async def next_event(self):
        """What the other side said next.

        Raises:
            h11.RemoteProtocolError: it broke off, or spoke nonsense.
        """
        while (event := self.parser.next_event()) is h11.NEED_DATA:
            try:
                self.parser.receive_data(await self.stream.receive_some())
            except trio.BrokenResourceError:
                self.parser.receive_data(b"")
        return event

    async def head(self) -> h11.Response:
        """The head of the response."""
        while not isinstance(event := await self.next_event(), h11.Response):
            assert isinstance(event, h11.InformationalResponse), event
        return event

    async def piece(self) -> bytes:
        """The next piece of the body; nothing at its clean end."""
        event = await self.next_event()
        return bytes(event.data) if isinstance(event, h11.Data) else b""

    async def piece_of_body(self) -> bytes:
        """The first piece of the body, with the head before it."""
        await self.head()
        return await self.piece()

    async def rest(self) -> bytes:
        """The body up to its clean end."""
        received = b""
        while data := await self.piece():
            received += data
        return received

    async def answer(self) -> Answer:
        """The whole response."""
        head = await self.head()
        headers = [(name.decode(), value.decode("latin-1")) for name, value in head.headers]
        return Answer(head.status_code, headers, await self.rest())


async def connect(port: int, *, small_buffer: bool = False) -> Client:
    """A client of what listens on *port*; with *small_buffer* it soon takes no more if it does not read."""
    sock = trio.socket.socket()
    try:
        if small_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await sock.connect(("127.0.0.1", port))
    except BaseException:
        sock.close()
        raise
    return Client(trio.SocketStream(sock))


async def fetch(port: int, method: str, target: str, body: bytes = b"", *headers: tuple[str, str]) -> Answer:
    """One request on a connection of its own."""
    with trio.fail_after(PATIENCE):
        async with await connect(port) as client:
            await client.ask(method, target, body, *headers)
            return await client.answer()


async def exchange(port: int, data: bytes) -> bytes:
    """Everything that comes back for *data*, which must end the connection."""
    with trio.fail_after(PATIENCE):
        async with await connect(port) as client:
            await client.stream.send_all(data)
            return b"".join([piece async for piece in client.stream])


def chat(model: object, *, stream: bool = False, **script: object) -> bytes:
    """The body of a request to *model*; for *script* see `model_server.py`."""
    return json.dumps({"model": model, "stream": stream, "script": script}).encode()


def speakers(body: bytes) -> list[str]:
    """Which model each chunk of a stream names; the last is "[DONE]" if all went well."""
    data = [line.removeprefix("data: ") for line in body.decode().split("\n\n") if line]
    return [text if text == "[DONE]" else json.loads(text)["model"] for text in data]


async def ending(client) -> str:
    """How a response that was cut ends: the error in its last event, or "broken off"."""
    received = b""
    try:
        while data := await client.piece():
            received = (received + data)[-10_000:]
    except h11.RemoteProtocolError:
        return "broken off"
    last = received.decode().strip().rpartition("\n\n")[2]
    return json.loads(last.removeprefix("data: "))["error"]["message"]


# ---- what has become of it ------------------------------------------------------------------


async def running(port: int) -> dict[str, dict[str, object]]:
    """The rows of /running by model."""
    return {row["model"]: row for row in (await fetch(port, "GET", "/running")).json()["running"]}


async def counts(port: int) -> dict[str, int]:
    """What a model server says of its requests, asked directly."""
    return (await fetch(port, "GET", "/requests")).json()


async def pid_of(port: int) -> int:
    """The pid of a model server, asked directly."""
    return int((await fetch(port, "GET", "/pid")).body)


async def eventually(condition: Callable[[], Awaitable[bool]]) -> float:
    """Ask until *condition* holds; the seconds it took."""
    begun = trio.current_time()
    with trio.fail_after(PATIENCE):
        while not await condition():
            await trio.lowlevel.checkpoint()
    return trio.current_time() - begun


async def is_running(port: int, model: str, **values: object) -> bool:
    """Whether /running has a row for *model* with these values."""
    row = (await running(port)).get(model)
    return row is not None and all(row[key] == value for key, value in values.items())


async def at_once(calls: Iterable[Callable[[], Awaitable[object]]]) -> list:
    """What *calls* return, run at the same time."""
    calls = list(calls)
    results: list = [None] * len(calls)

    async def run(index: int, call) -> None:
        results[index] = await call()

    async with trio.open_nursery() as nursery:
        for index, call in enumerate(calls):
            nursery.start_soon(run, index, call)
    return results
