"""The clients of `chaos.py`: requests of every kind, what came back, and the ways in which clients misbehave."""

from __future__ import annotations

import json
import socket
import zlib
from collections.abc import Awaitable, Callable
from contextlib import suppress
from random import Random

import attrs
import h11
import trio
import websocket_peers
from chaos_judge import Asked, End, Excuses, Got, Kind, Tally, Verdict
from chaos_world import BOUND, World
from daemons import Client, connect
from websockets.protocol import State

CHAT = "/v1/chat/completions"
BOUNDARY = "chaos"
RESET = b"\1\0\0\0\0\0\0\0"
# More than the spool keeps in memory.
LARGE = 3 * 2**19

Meanwhile = Callable[[Client, Got], Awaitable[bool]]
"""Called after each piece of an answer; True: the client has seen enough."""


async def never(_client: Client, _got: Got) -> bool:
    return False


@attrs.frozen
class Message:
    """A request, ready to be sent."""

    asked: Asked
    target: str
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()


@attrs.define(eq=False)
class Clients:
    """Everybody who asks the daemon for models."""

    world: World
    tally: Tally
    last_answer: float = 0.0
    """When a request was last answered, or told what went wrong."""
    under_way: int = 0
    _tokens: int = 0

    # ---- making requests -------------------------------------------------------------------

    def token(self) -> str:
        self._tokens += 1
        return f"t{self._tokens}"

    def json(self, model: str, target: str = CHAT, **script: object) -> Message:
        """One with an answer in one piece."""
        token = self.token()
        body = json.dumps({"model": model, "input": "x", "script": {"token": token, **script}}).encode()
        return Message(Asked(token, model, Kind.JSON), target, body)

    def stream(self, model: str, chunks: int = 5, **script: object) -> Message:
        """One with an answer in events."""
        token = self.token()
        text = {"model": model, "stream": True, "script": {"token": token, "chunks": chunks, **script}}
        return Message(Asked(token, model, Kind.STREAM, chunks), CHAT, json.dumps(text).encode())

    def upload(self, model: str, rng: Random, size: int = LARGE) -> Message:
        """A form with a file."""
        token = self.token()
        parts = [
            f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="model"\r\n\r\n{model}\r\n'.encode(),
            f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'.encode(),
            rng.randbytes(1024) * (size // 1024),
            f"\r\n--{BOUNDARY}--\r\n".encode(),
        ]
        body = b"".join(parts)
        headers = (("content-type", f"multipart/form-data; boundary={BOUNDARY}"), ("x-chaos-token", token))
        asked = Asked(token, model, Kind.UPLOAD, sum=zlib.crc32(body))
        return Message(asked, "/v1/audio/transcriptions", body, headers)

    def any(self, model: str, rng: Random) -> Message:
        """One of them, as many clients send them."""
        draw = rng.random()
        if draw < 0.45:
            return self.stream(model, rng.randint(1, 12), chunk_delay=rng.choice((0, 0.01, 0.03)))
        if draw < 0.75:
            return self.json(model, answer_delay=rng.choice((0, 0, 0.05)))
        if draw < 0.93:
            return self.json(model, "/v1/embeddings")
        return self.upload(model, rng, rng.choice((20_000, LARGE)))

    # ---- sending them ----------------------------------------------------------------------

    async def send(
        self,
        message: Message,
        *,
        own_fault: bool = False,
        cancelled: bool = False,
        meanwhile: Meanwhile = never,
        small_buffer: bool = False,
    ) -> tuple[Verdict | None, str]:
        """Send *message* and judge what comes back; None when the client left (`meanwhile` said so).

        *own_fault*: the server was told to break this very answer; *cancelled*: an operator tries to end it.
        """
        since, got = trio.current_time(), Got()
        self.under_way += 1
        try:
            with trio.move_on_after(BOUND):
                if await _exchange(self.world.port, message, got, meanwhile, small_buffer):
                    self.tally.aborted += 1
                    return None, f"left at {got.status}"
        finally:
            self.under_way -= 1
            got.seconds = trio.current_time() - since
        server = own_fault or self.world.was_touched(message.asked.model, since)
        return self._judged(message.asked, got, Excuses(self.world.was_down(since), server, cancelled))

    async def socket(self, model: str, messages: int, end: str = "") -> tuple[Verdict | None, str]:
        """Talk by websocket; *end* is "reset", or a message after which the server ends it in its own way."""
        token, since, got = self.token(), trio.current_time(), Got()
        asked = Asked(token, model, Kind.JSON)
        self.under_way += 1
        try:
            with trio.move_on_after(BOUND):
                await _talk(self.world.port, asked, messages, end, got)
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            got.end = End.BROKEN if got.status else End.REFUSED
        finally:
            self.under_way -= 1
            got.seconds = trio.current_time() - since
        if end == "reset" and got.status == 200 and got.end is End.BROKEN:
            self.tally.aborted += 1
            return None, "reset"
        down = self.world.was_down(since)
        return self._judged(asked, got, Excuses(down, bool(end) or self.world.was_touched(model, since)))

    def _judged(self, asked: Asked, got: Got, excuses: Excuses) -> tuple[Verdict, str]:
        verdict, why = self.tally.judged(asked, got, excuses)
        if verdict in (Verdict.ANSWERED, Verdict.ERROR):
            self.last_answer = trio.current_time()
        return verdict, why


async def _exchange(port: int, message: Message, got: Got, meanwhile: Meanwhile, small_buffer: bool) -> bool:
    """Fill *got*; return whether the client left."""
    try:
        client = await connect(port, small_buffer=small_buffer)
    except OSError:
        got.end = End.REFUSED
        return False
    async with client:
        with suppress(trio.BrokenResourceError):  # it may have answered before it closed
            await client.ask("POST", message.target, message.body, *message.headers)
        return await _receive(client, got, meanwhile)


async def _receive(client: Client, got: Got, meanwhile: Meanwhile) -> bool:
    begun, pieces = trio.current_time(), bytearray()
    try:
        while not await meanwhile(client, got):
            match await client.next_event():
                case h11.Response() as head:
                    got.status, got.first = head.status_code, trio.current_time() - begun
                    got.headers = {name.decode(): value.decode("latin-1") for name, value in head.headers}
                case h11.Data() as data:
                    pieces += data.data
                    got.body = bytes(pieces) if len(pieces) < 2**17 else got.body
                case h11.EndOfMessage():
                    got.body, got.end = bytes(pieces), End.CLEAN
                    return False
                case h11.ConnectionClosed():
                    got.body, got.end = bytes(pieces), End.BROKEN
                    return False
    except (h11.RemoteProtocolError, OSError):
        got.body, got.end = bytes(pieces), End.BROKEN
        return False
    return True


async def _talk(port: int, asked: Asked, messages: int, end: str, got: Got) -> None:
    """Fill *got*, as if it had been a request."""
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        peer = await websocket_peers.connect(stream, f"/upstream/{asked.model}/chaos")
        got.end = End.BROKEN
        if peer.response is None:
            return
        got.headers = {name.lower(): value for name, value in peer.response.headers.raw_items()}
        if peer.response.status_code != 101:
            got.status, got.body, got.end = peer.response.status_code, peer.response.body or b"", End.CLEAN
            return
        got.status = 200
        heard = set()
        for _ in range(messages):
            if peer.protocol.state is not State.OPEN:
                break
            await peer.send(f"!who {asked.token}")
            heard.add((await peer.receive(), await peer.receive()))
        if end == "reset":
            peer.reset()
            return
        if peer.protocol.state is State.OPEN:
            await (peer.send(end) if end else peer.close(1000))
        await peer.closed()
        _conclude(got, heard, asked, peer.protocol)


def _conclude(got: Got, heard: set, asked: Asked, protocol) -> None:
    """How a websocket ended: with our close frame, with one that says what is wrong, or with none."""
    said, right = protocol.close_rcvd, (asked.model, f"!who {asked.token}")
    if strange := {pair for pair in heard if None not in pair and pair != right}:
        got.status, got.end, got.body = 200, End.CLEAN, json.dumps({"model": repr(strange)}).encode()
    elif said is not None and said.code == 1000:
        got.end, got.body = End.CLEAN, json.dumps({"model": asked.model, "token": asked.token}).encode()
    elif said is not None:
        error = {"message": f"{said.code} {said.reason}", "type": "close frame"}
        got.status, got.end, got.body = said.code, End.CLEAN, json.dumps({"error": error}).encode()


def reset(client: Client) -> None:
    """End a connection in the least polite way."""
    client.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    client.stream.socket.close()
