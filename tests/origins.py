"""Servers that say awkward things, for tests of the clients toward model servers and peers; plain, or over TLS."""

from __future__ import annotations

import os
import socket
import ssl
from functools import partial
from pathlib import Path

import trio

GUARD = 30  # seconds; only a hang gets there
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
HUGE = b"x" * (32 * 2**20)  # more than all socket buffers between us and a server hold


class End:
    """The server's end of one connection."""

    def __init__(self, number, stream, transport):
        self.number, self.stream, self.transport = number, stream, transport

    async def request(self):
        """One whole request, as it came; b"" when the client closed."""
        data = b""
        while b"\r\n\r\n" not in data:
            more = await self.stream.receive_some()
            if not more:
                assert data == b"", "closed in the middle of a head"
                return b""
            data += more
        head, _, body = data.partition(b"\r\n\r\n")
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                body = bytearray(body)
                while len(body) < int(line.split(b":")[1]):
                    body += await self.stream.receive_some()
        return head + b"\r\n\r\n" + body

    async def head(self):
        """The first bytes of a request; the rest stays unread."""
        return await self.stream.receive_some(10)

    async def say(self, data):
        await self.stream.send_all(data)

    async def close(self):
        await self.stream.aclose()

    async def gone(self):
        """Return when the client has closed its end, whatever it sent before."""
        try:
            while await self.stream.receive_some():
                pass
        except trio.BrokenResourceError:  # closed with bytes unread: a reset
            pass

    def say_and_reset(self, data):
        """Without a checkpoint in between, so that the client finds both at once; over TLS not as the first words."""
        if self.stream is not self.transport:
            self.stream._ssl_object.write(data)
            data = self.stream._outgoing.read()
        os.write(self.transport.socket.fileno(), data)
        self.reset()

    def reset(self):
        """Close so that the client sees "connection reset"."""
        self.transport.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.transport.socket.close()


class Server:
    """Does on each connection what *script*, a function of an `End`, says."""

    def __init__(self, script, context=None):
        self.script, self.context, self.connections = script, context, 0

    async def start(self, nursery, port=0):
        serve = partial(trio.serve_tcp, self._serve, port, host="127.0.0.1")
        listeners = await nursery.start(serve)
        self.port = listeners[0].socket.getsockname()[1]
        return self

    @property
    def url(self):
        return f"{'https' if self.context else 'http'}://127.0.0.1:{self.port}"

    async def _serve(self, transport):
        stream, number = transport, self.connections
        self.connections += 1
        if self.context is not None:
            stream = trio.SSLStream(transport, self.context, server_side=True, https_compatible=True)
            try:
                await stream.do_handshake()
            except trio.BrokenResourceError:  # the client does not trust us, or has left
                return
        await self.script(End(number, stream, transport))


def server_context(authority):
    """What a server at 127.0.0.1 or localhost needs, signed by *authority*."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1", "localhost").configure_cert(context)
    return context


def saying(*answers):
    """A script: to each request on a connection the next of *answers*, then wait for the client to close."""

    async def script(end):
        for answer in answers:
            await end.request()
            await end.say(answer)
        await end.gone()

    return script


def closing_after(answer):
    """A script: one answer, then the end of the connection."""

    async def script(end):
        await end.request()
        await end.say(answer)

    return script


async def ask(origin, method="GET", target=b"/", headers=(), body=b""):
    """One whole exchange: status, headers, body."""
    async with origin.request(method, target, headers, body) as answer:
        return answer.status, answer.headers, b"".join([chunk async for chunk in answer.chunks()])


def refused_port():
    """A port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def open_sockets():
    """How many sockets this process has open."""
    return sum(path.is_socket() for path in Path("/proc/self/fd").iterdir())
