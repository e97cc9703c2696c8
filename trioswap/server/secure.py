"""A client's socket, and TLS on it: the handshake, what clients are told that speak none, an end that can be trusted.

Left to others: certificates (tls), deadlines (server.connection).
"""

from __future__ import annotations

import json
import socket
import ssl
import struct
from contextlib import suppress
from typing import Final

import trio

from trioswap.bounded import BoundedStream
from trioswap.errors import BadRequest

_ADVICE: Final = json.dumps(
    BadRequest("this port speaks TLS: write https:// instead of http://").openai_body()
).encode()
_PLAIN_HTTP_ANSWER: Final = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s"
) % (len(_ADVICE), _ADVICE)

_NO_LINGER: Final = struct.pack("ii", 1, 0)  # on, 0 seconds (socket(7), SO_LINGER)


class Wire(BoundedStream):
    """A client's socket; closing it only says that no more is sent.

    The socket itself is closed by who accepted it: before, what the client still sends may have
    to be taken, or the answer that tells it to stop is lost.
    """

    async def aclose(self) -> None:
        """As `send_eof`."""
        await self.send_eof()

    def reset_when_closed(self) -> None:
        """Let the connection end with a reset: an error for the client, which a plain end is not always."""
        with suppress(OSError):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)


class TlsStream(trio.abc.HalfCloseableStream):
    """TLS over a `Wire`, from the server's side; the handshake comes first."""

    # Not `https_compatible`, which would send no close_notify.  With it a client can tell a whole answer
    # from one broken off even where only the end of the connection ends it (HTTP/1.0), and OpenSSL 3
    # calls its absence an error.  Clients that skip theirs just end: who reads does not ask how.

    def __init__(self, wire: Wire, context: ssl.SSLContext) -> None:
        self.wire = wire
        self._tls = trio.SSLStream(wire, context, server_side=True)

    async def handshake(self) -> str | None:
        """The protocol agreed upon by ALPN, if any.  Takes as long as the client lets it.

        Raises:
            trio.BrokenResourceError: the client speaks no TLS (in plain HTTP it is told to), no TLS that we
                do, does not trust us, or has left.
        """
        try:
            await self._tls.do_handshake()
        except trio.BrokenResourceError as exc:
            if isinstance(exc.__cause__, ssl.SSLError) and exc.__cause__.reason == "HTTP_REQUEST":
                await self._answer_plain_http()
            raise trio.BrokenResourceError(str(exc.__cause__ or exc)) from exc
        protocol: str | None = self._tls.selected_alpn_protocol()
        return protocol

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """As `BoundedStream`.  Cancelled, the stream is of no further use."""
        await self._tls.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        """As `BoundedStream`."""
        await self._tls.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """As `BoundedStream`; raises trio.BrokenResourceError at an end without close_notify."""
        return bytes(await self._tls.receive_some(max_bytes))

    async def send_eof(self) -> None:
        """Send close_notify, which says that nothing was cut off, and the end; without a handshake only the end."""
        await self._tls.aclose()

    async def aclose(self) -> None:
        """As `send_eof`."""
        await self.send_eof()

    async def _answer_plain_http(self) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await self.wire.send_all(_PLAIN_HTTP_ANSWER)
            await self.wire.send_eof()
            await self.wire.discard_input()
