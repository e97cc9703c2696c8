"""One client's connection: reads ahead of Hypercorn's parsers, writes for them, and bounds every wait.

Left to others: HTTP/2's streams (server.http2), TLS (server.secure), application calls (server.applications).
"""

from __future__ import annotations

import logging
import math
import ssl
from contextlib import suppress
from typing import Any, Final

import attrs
import h11
import trio
from hypercorn.config import Config  # noqa: TID251 - this package is the one that may
from hypercorn.events import Closed, Event, RawData, Updated  # noqa: TID251
from hypercorn.protocol import ProtocolWrapper  # noqa: TID251
from hypercorn.protocol.h11 import H2CProtocolRequiredError, H2ProtocolAssumedError, H11Protocol  # noqa: TID251
from hypercorn.trio.tcp_server import TCPServer  # noqa: TID251
from hypercorn.typing import AppWrapper, ASGISendEvent, ConnectionState  # noqa: TID251
from hypercorn.utils import parse_socket_addr  # noqa: TID251

from trioswap.bounded import ReadAhead
from trioswap.server.applications import Applications, Context, Send
from trioswap.server.http2 import Http2
from trioswap.server.secure import TlsStream, Wire
from trioswap.server.websockets import install

logger = logging.getLogger(__name__)

install()

# Bytes read while the parser is busy, and the most taken from the kernel at once (Hypercorn's MAX_RECV).
READ_AHEAD: Final = 2**16


@attrs.frozen
class Limits:
    """Seconds that the steps of a connection may take; see `HttpServer`."""

    handshake: float
    head: float
    body_stall: float
    keep_alive: float


class Protocol(ProtocolWrapper):
    """Hypercorn's switch from HTTP/1.1 to HTTP/2, to ours."""

    async def handle(self, event: Event) -> None:
        """Feed *event* to the protocol spoken."""
        try:
            await self.protocol.handle(event)
        except H2ProtocolAssumedError as switch:
            await self.speak_http2(switch.data)
        except H2CProtocolRequiredError as switch:
            await self.speak_http2(switch.data, switch.headers, switch.settings)
        if isinstance(self.protocol, H11Protocol) and self.protocol.stream is not None and self.protocol.stream.closed:
            await self.send(Closed())  # a websocket was refused, and Hypercorn leaves it at that

    @property
    def client_state(self) -> Any:
        """Where the client is in its request, in h11's words; None when it speaks no HTTP/1.1."""
        return self.protocol.connection.their_state if isinstance(self.protocol, H11Protocol) else None

    @property
    def head_begun(self) -> bool:
        """There is a part of a head of HTTP/1.1."""
        if not isinstance(self.protocol, H11Protocol) or self.client_state is not h11.IDLE:
            return False
        return bool(self.protocol.connection.trailing_data[0])

    @property
    def answer_is_whole(self) -> bool:
        """No answer is under way whose end the client could only take from the end of the connection."""
        if not isinstance(self.protocol, H11Protocol):
            return True
        return self.protocol.connection.our_state not in {h11.SEND_RESPONSE, h11.SEND_BODY, h11.ERROR}

    @property
    def only_the_end_ends_it(self) -> bool:
        """The end of the answer is that of the connection, for the client speaks HTTP/1.0, as proxies often do."""
        connection = self.protocol.connection
        return isinstance(connection, h11.Connection) and connection.their_http_version == b"1.0"

    async def refuse_late_head(self) -> None:
        """Answer 408 to a client of HTTP/1.1 whose request has not come in time."""
        if isinstance(self.protocol, H11Protocol):
            await self.protocol._send_error_response(408)

    async def speak_http2(self, data: bytes, *upgrade: Any) -> None:
        """Go on in HTTP/2, beginning with *data*."""
        shared = (self.app, self.config, self.context, self.task_group, self.state)
        self.protocol = Http2(*shared, self.ssl, self.client, self.server, self.send)
        await self.protocol.initiate(*upgrade)
        await self.send(Updated(idle=self.protocol.idle))  # the preface passed for a request until here
        if data:
            await self.protocol.handle(RawData(data))


class Connection(TCPServer):
    """Hypercorn's TCPServer for one client, from the first byte until its last application call has ended."""

    # Two tasks read.  One takes bytes from the socket, the other feeds them to the parser, which
    # may wait as long as the application does.  What the parser waits for is never known from
    # outside, so when the client leaves, its task is simply cancelled, and the protocol is told.
    # Both live in the scope `_reading`, whose deadline is that of what the client has to do next:
    # shake hands, begin a request, or end the head of one.  It is moved to infinity while a request
    # is served, and to now when the shutdown finds the connection idle.

    protocol: Protocol
    stream: Wire | TlsStream  # type: ignore[assignment]
    state: ConnectionState

    def __init__(
        self,
        app: AppWrapper,
        config: Config,
        context: Context,
        wire: Wire,
        limits: Limits,
        tls: ssl.SSLContext | None,
    ) -> None:
        """Raises OSError if the client is gone already."""
        stream = wire if tls is None else TlsStream(wire, tls)
        super().__init__(app, config, context, ConnectionState({}), stream)  # type: ignore[arg-type] # takes any
        family = wire.socket.family
        self.client = parse_socket_addr(family, wire.socket.getpeername())
        self.idle = True
        self._wire, self._limits = wire, limits
        self._established, self._head_begun = False, False
        self._applications = Applications(limits.body_stall, self._send_both)
        self._keeps, self._kept = False, b""  # what is written next is kept, for the write that follows
        self._reading = trio.CancelScope()
        self._ahead = ReadAhead(READ_AHEAD)
        shared = (app, config, context, self._applications, self.state)
        server = parse_socket_addr(family, wire.socket.getsockname())
        self.protocol = Protocol(*shared, tls is not None, self.client, server, self.protocol_send, "http/1.1")

    async def run(self) -> None:
        """Serve the client; the caller closes the socket then.

        Raises whatever Hypercorn's protocols raise.
        """
        async with self._applications:
            self.set_idle(True)
            with self._reading:
                if await self._establish():
                    await self._read_data()
            if self._reading.cancelled_caught and not self.context.terminated.is_set():
                await self._tell_late()
            await self.protocol.handle(Closed())
            await self._applications.disconnect()
        if self.protocol.client_state is h11.SEND_BODY:
            # Closed while the client still sends, the connection would be reset, and the answer that tells
            # it to stop could be lost with that (RFC 9112, 9.6).
            await self._wire.discard_input()
        await self._send_eof()

    def set_idle(self, idle: bool) -> None:
        """Let the idle timeout run, or stop it; it is over at once in a shutdown, or when requests were dropped."""
        self.idle, self._head_begun = idle, False
        self._set_deadline()

    def _set_deadline(self) -> None:
        limits = self._limits
        if not self.idle:
            seconds = math.inf
        elif self.context.terminated.is_set() or self._ahead.dropped:
            seconds = 0
        elif not self._established:
            seconds = limits.handshake
        else:
            seconds = min(limits.head, limits.keep_alive) if self._head_begun else limits.keep_alive
        self._reading.deadline = trio.current_time() + seconds

    async def _establish(self) -> bool:
        """Shake hands, if TLS is spoken here; return whether the client can be talked to."""
        if isinstance(self.stream, TlsStream):
            try:
                protocol = await self.stream.handshake()
            except trio.BrokenResourceError as exc:
                logger.debug("no TLS with %s: %s", self.client, exc)
                return False
            if protocol == "h2":
                await self.protocol.speak_http2(b"")
        self._established = True
        self.set_idle(True)
        return True

    async def _tell_late(self) -> None:
        if not self._established:
            logger.debug("no TLS with %s: the handshake took too long", self.client)
        elif self._head_begun:
            await self.protocol.refuse_late_head()

    async def _read_data(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._parse)
            await self._ahead.fill(self.stream, lambda: self.protocol.client_state is h11.DONE)
            nursery.cancel_scope.cancel(reason="the client sends no more")

    async def _parse(self) -> None:
        while True:
            await self.protocol.handle(RawData(await self._ahead.take()))
            if self.idle and not self._head_begun and self.protocol.head_begun:
                # From its first byte: a head that dribbles in gains nothing by the bytes that follow.
                self._head_begun = True
                self._set_deadline()

    async def protocol_send(self, event: Event) -> None:
        """Do what the protocol wants."""
        match event:
            case RawData():
                await self._write(event.data)
            case Updated():
                self.set_idle(event.idle)
            case Closed():
                await self._send_eof()
                await self._end("the protocol is done")

    async def _send_both(self, send: Send, head: ASGISendEvent, piece: ASGISendEvent) -> None:
        """Send the head of an answer and the first piece, in one write instead of two, each of which costs much."""
        # Not on HTTP/2, which may wait for the client between the two.
        self._keeps = isinstance(self.protocol.protocol, H11Protocol)
        try:
            await send(head)
        finally:
            self._keeps = False
        await send(piece)
        await self._write(b"")  # the head, if the piece is empty

    async def _write(self, data: bytes) -> None:
        self._kept += data
        if self._keeps or not self._kept:
            return
        data, self._kept = self._kept, b""
        # Shielded, or half a frame could be followed by another; bounded by the stream's patience.
        # The lock too: an HTTP/2 header block that is dropped here would spoil all that follow.
        with trio.CancelScope(shield=True):
            async with self.send_lock:
                with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    await self.stream.send_all(data)
                    return
        await self._end("the client takes no more")

    async def _send_eof(self) -> None:
        # Shielded, because the application hears of the end before we do, and may cancel its sending
        # task, which is the one that is here; bounded, because every write that holds the lock is.
        with trio.CancelScope(shield=True):
            async with self.send_lock:  # behind everything that waits to be written
                with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    if self.protocol.answer_is_whole:
                        await self.stream.send_eof()
                    elif self.protocol.only_the_end_ends_it:
                        self._wire.reset_when_closed()
                    else:  # not through TLS, whose close_notify would vouch for what was broken off
                        await self._wire.send_eof()

    async def _end(self, reason: str) -> None:
        self._reading.cancel(reason=reason)
        await self.protocol.handle(Closed())
