"""Ends of websockets by another library (`websockets`, without its I/O), that can do each step alone."""

from __future__ import annotations

import socket
from collections import deque
from contextlib import asynccontextmanager, suppress
from functools import partial

import attrs
import trio
from children import PATIENCE
from websockets.client import ClientProtocol
from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory
from websockets.frames import Opcode
from websockets.http11 import Request, Response
from websockets.server import ServerProtocol
from websockets.uri import parse_uri

HUGE = 48 * 2**20  # bytes; more than all socket buffers between two ends hold


@attrs.define(eq=False)
class Peer:
    """One end.  Pings and close frames are answered as soon as they are read."""

    stream: trio.abc.Stream
    protocol: ServerProtocol | ClientProtocol
    request: Request | None = None
    """The handshake, where this is a server."""
    response: Response | None = None
    """The handshake's answer, where this is a client."""
    sent: int = 0
    """Messages."""
    _events: deque = attrs.field(factory=deque)

    async def flush(self):
        for data in self.protocol.data_to_send():
            if data:
                await self.stream.send_all(data)
            elif isinstance(self.stream, trio.SocketStream):
                await self.stream.send_eof()

    async def event(self):
        """The next event; None at the end of the connection."""
        while not self._events:
            try:
                data = await self.stream.receive_some(2**18)
            except trio.BrokenResourceError:
                data = b""
            if not data:
                self.protocol.receive_eof()
                return None
            self.protocol.receive_data(data)
            self._events.extend(self.protocol.events_received())
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):  # the other end has gone meanwhile
                await self.flush()
        return self._events.popleft()

    async def receive(self):
        """The next message; None when there will be none."""
        text, parts = False, []
        while (frame := await self.event()) is not None and frame.opcode is not Opcode.CLOSE:
            if frame.opcode not in (Opcode.PING, Opcode.PONG):
                text = text or frame.opcode is Opcode.TEXT
                parts.append(bytes(frame.data))
                if frame.fin:
                    whole = b"".join(parts)
                    return whole.decode() if text else whole
        return None

    async def send(self, message):
        if isinstance(message, str):
            self.protocol.send_text(message.encode())
        else:
            self.protocol.send_binary(message)
        await self.flush()
        self.sent += 1

    async def ping(self, data):
        self.protocol.send_ping(data)
        await self.flush()

    async def pong(self):
        """What comes back of a ping."""
        while (frame := await self.event()).opcode is not Opcode.PONG:
            pass
        return bytes(frame.data)

    async def close(self, code=None, reason=""):
        """Send a close frame."""
        self.protocol.send_close(code, reason)
        await self.flush()

    async def closed(self):
        """How the other end closed, as (code, reason); `GONE` when the connection ended without a close frame."""
        while await self.receive() is not None:
            pass
        said = self.protocol.close_rcvd
        return (said.code, said.reason) if said else GONE

    def reset(self):
        """End the connection in the least polite way."""
        self.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.stream.socket.close()


GONE = (1006, "")


@attrs.define(eq=False)
class ModelServer:
    """A model server that does on each websocket what a test says."""

    port: int = 0
    peers: list[Peer] = attrs.field(factory=list)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"


@asynccontextmanager
async def model_server(script, *, subprotocols=None, accept=True, tls=None, patience=PATIENCE):
    """Listen for the length of the block, *patience* seconds at most.

    *script* gets each `Peer`, after it has accepted unless told otherwise.
    """
    server = ModelServer()

    async def serve(stream):
        if tls is not None:
            stream = trio.SSLStream(stream, tls, server_side=True, https_compatible=True)
        peer = Peer(stream, ServerProtocol(subprotocols=subprotocols, max_size=None))
        server.peers.append(peer)
        try:
            peer.request = await peer.event()
        except trio.BrokenResourceError:  # no TLS
            return
        if accept:
            response = peer.protocol.accept(peer.request)
            response.headers["Set-Cookie"] = "seen=yes"
            peer.protocol.send_response(response)
            await peer.flush()
        await script(peer)

    with trio.fail_after(patience):
        async with trio.open_nursery() as nursery:
            listeners = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
            server.port = listeners[0].socket.getsockname()[1]
            yield server
            nursery.cancel_scope.cancel()


async def echo(peer):
    """A script: everything back."""
    while (message := await peer.receive()) is not None:
        await peer.send(message)


async def connect(stream, path="/", *, subprotocols=None, deflate=False, headers=()):
    """A client whose handshake has been answered: accepted if `response.status_code` is 101."""
    extensions = [ClientPerMessageDeflateFactory()] if deflate else None
    uri = parse_uri(f"ws://127.0.0.1:{stream.socket.getpeername()[1]}{path}")
    peer = Peer(stream, ClientProtocol(uri, extensions=extensions, subprotocols=subprotocols, max_size=None))
    request = peer.protocol.connect()
    for name, value in headers:
        request.headers[name] = value
    peer.protocol.send_request(request)
    await peer.flush()
    peer.response = await peer.event()
    return peer
