"""Bodies that are larger than memory is meant for pass through a daemon that stays small.

The daemon is a process of its own, so that its memory is nobody else's; the model server counts what it
gets and makes up what it sends.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import attrs
import commands
import h2.events
import h11
import pytest
import trio
from children import PATIENCE, free_port, python
from daemons import connect, write_config
from serving import Client2

MB = 10**6
MOST = 20 * MB
"""Bytes that the daemon may take beside what it needs anyway, whatever the size of the body."""
SIZES = [64 * MB, pytest.param(1024 * MB, marks=pytest.mark.large)]
PIECE = bytes(range(256)) * 1024

# GET /make/SIZE answers with so many bytes; a POST with how many it brought, and their CRC-32; all else with "ok".
MODEL_SERVER = """
import json, socket, sys, threading, zlib
PIECE = bytes(range(256)) * 1024

def head_of(reader):
    line = reader.readline().split()
    fields = {}
    while (field := reader.readline()).strip():
        name, _, value = field.partition(b":")
        fields[name.strip().lower()] = value.strip()
    return line, fields

def count(reader, size):
    crc, left = 0, size
    while left:
        data = reader.read1(min(left, len(PIECE)))
        if not data:
            raise OSError("the body broke off")
        crc, left = zlib.crc32(data, crc), left - len(data)
    return json.dumps({"bytes": size, "crc": crc}).encode()

def answer(connection, size):
    connection.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Type: text/plain\\r\\nContent-Length: %d\\r\\n\\r\\n" % size)

def serve(connection):
    with connection, connection.makefile("rb") as reader:
        while True:
            line, fields = head_of(reader)
            if not line:
                return
            if line[1].startswith(b"/make/"):
                left = int(line[1].rpartition(b"/")[2])
                answer(connection, left)
                while left:
                    left -= connection.send(PIECE[:left])
                continue
            said = b"ok" if line[0] == b"GET" else count(reader, int(fields[b"content-length"]))
            answer(connection, len(said))
            connection.sendall(said)

listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""


# ---- the daemon ------------------------------------------------------------------------------------


@attrs.frozen
class Daemon:
    """A daemon whose model is loaded, and which has served a request of each kind."""

    port: int
    status: Path
    """What the kernel says of its process."""

    def start_over(self) -> int:
        """Forget the peak so far, where that is permitted; the bytes in use, or else the peak."""
        with suppress(PermissionError):
            self.status.with_name("clear_refs").write_text("5")  # proc_pid_clear_refs(5)
        return self.peak()

    def peak(self) -> int:
        """The most bytes that were in use."""
        [line] = [line for line in self.status.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024


@asynccontextmanager
async def daemon(directory: Path) -> AsyncIterator[Daemon]:
    """Run one."""
    port = free_port()
    model = {"cmd": [*python(MODEL_SERVER), str(port)], "proxy": f"http://127.0.0.1:{port}"}
    path = write_config(directory, {"a": model})
    async with commands.daemon("serve", "-c", path) as served:
        here = Daemon(served.port, Path(f"/proc/{served.process.pid}/status"))
        for way in (UPLOADS["HTTP/1.1"], UPLOADS["HTTP/2"], DOWNLOADS["HTTP/1.1"], DOWNLOADS["HTTP/2"]):
            await way(here.port, 3 * MB)
        yield here


async def growth(served: Daemon, work: Callable[[int, int], Awaitable[None]], size: int) -> int:
    """Bytes by which the daemon grows while *work* goes on."""
    before = served.start_over()
    await work(served.port, size)
    return served.peak() - before


# ---- what is sent ------------------------------------------------------------------------------------

HEAD = b'--x\r\nContent-Disposition: form-data; name="file"; filename="f.wav"\r\n\r\n'
TAIL = b'\r\n--x\r\nContent-Disposition: form-data; name="model"\r\n\r\na\r\n--x--\r\n'


def form(size: int) -> Iterator[bytes]:
    """A form of *size* bytes whose last field names the model."""
    yield HEAD
    left = size - len(HEAD) - len(TAIL)
    while left:
        yield PIECE[:left]
        left -= len(PIECE[:left])
    yield TAIL


def expected(size: int) -> dict[str, int]:
    """What the model server says of it."""
    crc = 0
    for piece in form(size):
        crc = zlib.crc32(piece, crc)
    return {"bytes": size, "crc": crc}


def fields(size: int) -> list[tuple[str, str]]:
    return [("content-type", "multipart/form-data; boundary=x"), ("content-length", str(size))]


TARGET = "/v1/audio/transcriptions"


async def upload(port: int, size: int) -> None:
    """Over HTTP/1.1."""
    async with await connect(port) as client:
        await client.send(h11.Request(method="POST", target=TARGET, headers=[("host", "x"), *fields(size)]))
        for piece in form(size):
            await client.send(h11.Data(data=piece))
        await client.send(h11.EndOfMessage())
        answer = await client.answer()
    assert (answer.status, answer.json()) == (200, expected(size))


async def download(port: int, size: int) -> None:
    """Over HTTP/1.1."""
    async with await connect(port) as client:
        await client.ask("GET", f"/upstream/a/make/{size}")
        assert (await client.head()).status_code == 200
        received = 0
        while data := await client.piece():
            received += len(data)
    assert received == size


async def upload2(port: int, size: int) -> None:
    """Over HTTP/2."""
    async with await connect(port) as connection:
        client = Client2(connection.stream)
        client.parser.send_headers(1, [*asks("POST", TARGET), *fields(size)])
        for piece in form(size):
            sent = 0
            while sent < len(piece):
                room = client.parser.local_flow_control_window(1)
                if not room:
                    client.parser.receive_data(await connection.stream.receive_some())  # more room, and nothing else
                    continue
                part = piece[sent : sent + min(room, client.parser.max_outbound_frame_size)]
                client.parser.send_data(1, part)
                await client.flush()
                sent += len(part)
        client.parser.end_stream(1)
        await client.flush()
        assert await status(client) == b"200"
        answer = await client.expect(h2.events.DataReceived)
    assert json.loads(answer.data) == expected(size)


async def download2(port: int, size: int) -> None:
    """Over HTTP/2."""
    async with await connect(port) as connection:
        client = Client2(connection.stream)
        client.parser.send_headers(1, asks("GET", f"/upstream/a/make/{size}"), end_stream=True)
        await client.flush()
        assert await status(client) == b"200"
        received = 0
        while received < size:
            piece = await client.expect(h2.events.DataReceived)
            client.parser.acknowledge_received_data(piece.flow_controlled_length, 1)
            await client.flush()
            received += len(piece.data)
    assert received == size


def asks(method: str, path: str) -> list[tuple[str, str]]:
    return [(":method", method), (":scheme", "http"), (":path", path), (":authority", "x")]


async def status(client: Client2) -> bytes:
    return dict((await client.expect(h2.events.ResponseReceived)).headers)[b":status"]


UPLOADS = {"HTTP/1.1": upload, "HTTP/2": upload2}
DOWNLOADS = {"HTTP/1.1": download, "HTTP/2": download2}


# ---- what it takes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("version", UPLOADS)
async def test_a_large_upload_takes_little_memory(size, version, tmp_path):
    """The form is read as it comes, and kept in a file until its last field has said who is meant."""
    with trio.fail_after(10 * PATIENCE):
        async with daemon(tmp_path) as served:
            grown = await growth(served, UPLOADS[version], size)
    print(f"grown by {grown / MB:.1f} MB")
    assert grown < MOST


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("version", DOWNLOADS)
async def test_a_large_answer_takes_little_memory(size, version, tmp_path):
    """It goes on as it comes, no faster than the client takes it."""
    with trio.fail_after(10 * PATIENCE):
        async with daemon(tmp_path) as served:
            grown = await growth(served, DOWNLOADS[version], size)
    print(f"grown by {grown / MB:.1f} MB")
    assert grown < MOST
