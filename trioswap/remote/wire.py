"""TCP and TLS to a peer, on Trio, below httpcore's connections.

httpcore leaves this layer to others by design ("network backends"), and its own for Trio
does less than a gateway needs.  Here

- connecting and the TLS handshake have limits of their own, and a cancelled handshake
  leaves no socket;
- a server is heard that answers before it has read the whole request (413, 401), whether
  it hangs up then or waits, over TLS as well;
- it is known to the byte whether anything of an answer had come, and whether the connection had served
  before and broke at once: only then may a request that failed be sent again;
- reading can be ended without waiting (`hang_up`).
"""

from __future__ import annotations

import math
import re
import socket
import ssl
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import attrs
import httpcore  # noqa: TID251 - the package is the one that may
import trio

from trioswap.config.parts import TimeoutConfig
from trioswap.connection import READ_SIZE, reason, tls_reason
from trioswap.keepalive import MAX_KEEPALIVE

# Seconds.  A server that has begun its answer, and takes nothing of the request for so long, will take no more of it.
PATIENCE: Final = 2.0
# Seconds after the last byte of a request: what breaks later than that was no idle connection, closed just then by a
# server that never saw the request.  The longest way to it and back that we count with; Go repeats no POST at all.
UNSEEN: Final = 1.0
# Bytes of an early answer that are read while the request is still being sent.
EARLY_LIMIT: Final = 4 * READ_SIZE
# The first line of an answer that is not an interim one (RFC 9110, 15), among or behind interim ones.
_FINAL: Final = re.compile(rb"(?:\A|\r\n\r\n)HTTP/1\.[01] [2-9]")


class NoConnection(Exception):
    """There is no connection; `late`: it took too long."""

    def __init__(self, why: str, *, late: bool = False) -> None:
        super().__init__(why)
        self.why, self.late = why, late


class Broken(Exception):
    """The connection broke."""

    def __init__(self, why: str, *, heard: bool, unseen: bool) -> None:
        super().__init__(why)
        self.why = why
        self.heard = heard
        """A byte of the answer had come."""
        self.unseen = unseen
        """Perhaps the server closed the connection as idle in this very moment, and never saw the request."""


@attrs.frozen(eq=False)
class Backend(httpcore.AsyncNetworkBackend):
    """Makes the connections of a pool.  Limits that httpcore passes are ignored: these are finer."""

    _timeouts: TimeoutConfig

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> Wire:
        """A connection to *host*.

        Raises:
            NoConnection: there is none, or not in time.
        """
        limit = self._timeouts.connect
        try:
            with _at_most(limit, f"no connection to {host}:{port} within {limit} s (timeouts.connect)"):
                stream = await trio.open_tcp_stream(host, port)
        except OSError as exc:
            raise NoConnection(_no_connection(exc, host, port)) from exc
        for option in _keepalive(self._timeouts.keepalive):
            stream.socket.setsockopt(*option)
        pipe = _Pipe(stream.socket)
        return Wire(self._timeouts, pipe, pipe)

    async def sleep(self, seconds: float) -> None:
        """Of a retry, which we never ask httpcore for."""
        await trio.sleep(seconds)


@attrs.frozen(eq=False)
class Nowhere(httpcore.AsyncNetworkBackend):
    """Connects to nobody, and says why."""

    _why: str

    async def connect_tcp(self, *_: object, **__: object) -> Wire:
        """Never a connection.

        Raises:
            NoConnection: always.
        """
        await trio.lowlevel.checkpoint()
        raise NoConnection(self._why)


@attrs.define(eq=False)
class _Pipe(trio.abc.Stream):
    """A socket that drops what the other end no longer takes: reading will tell what it had to say.

    An error would do harm: it leaves a TLS connection above unable to read as well.
    """

    socket: trio.socket.SocketType
    deaf: bool = False
    """The other end takes no more."""
    _patience: float = math.inf
    """Seconds for one call to send anything at all."""
    _sending: trio.CancelScope = attrs.field(factory=trio.CancelScope)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send *data*, or as much of it as is taken."""
        await trio.lowlevel.checkpoint()
        with memoryview(data) as rest:
            done = 0
            while done < len(rest) and not self.deaf:
                done += await self._send_some(rest[done:])

    async def _send_some(self, data: memoryview) -> int:
        # Trio's send is all or nothing when it is cancelled, so no byte is lost or sent twice.
        with data, trio.move_on_after(self._patience) as self._sending:
            try:
                return await self.socket.send(data)
            except OSError:
                pass
        self.deaf = True
        return 0

    async def wait_send_all_might_not_block(self) -> None:
        """Part of the interface; nobody here uses it."""
        await trio.lowlevel.wait_writable(self.socket)

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """What one read brings.

        Raises:
            trio.BrokenResourceError: from what the operating system said.
        """
        try:
            return await self.socket.recv(max_bytes or READ_SIZE)
        except OSError as exc:
            raise trio.BrokenResourceError(reason(exc)) from exc

    def allow(self, seconds: float) -> None:
        """From now on, drop the rest when *seconds* pass in which nothing is taken."""
        self._patience = seconds
        self._sending.deadline = trio.current_time() + seconds

    async def aclose(self) -> None:
        """Close at once."""
        self.socket.close()
        await trio.lowlevel.cancel_shielded_checkpoint()


@attrs.define(eq=False)
class Wire(httpcore.AsyncNetworkStream):
    """One connection, perhaps through TLS, that serves one request after the other."""

    _timeouts: TimeoutConfig
    _pipe: _Pipe
    _stream: trio.abc.Stream
    """The pipe itself, or TLS on top of it."""
    _requests: int = attrs.field(default=0, init=False)
    _in_answer: bool = attrs.field(default=True, init=False)
    """Reading has begun, so that the next write begins another request."""
    _heard: bool = attrs.field(default=False, init=False)
    """A byte of the answer to the present request has come."""
    _wrote: float = attrs.field(default=-math.inf, init=False)
    """Trio's time at which something was sent last."""
    _early: deque[bytes | trio.BrokenResourceError] = attrs.field(factory=deque, init=False)
    """What was read while sending: pieces, and perhaps the end."""
    _hung_up: bool = attrs.field(default=False, init=False)

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Send *buffer*, listening meanwhile.

        Raises:
            httpcore.WriteError: the server takes no more; httpcore then reads what it answered.
        """
        if self._in_answer:
            self._in_answer = self._heard = self._hung_up = False
            self._requests += 1
            self._pipe.allow(math.inf)
        if not buffer:
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._listen)
            await self._send(buffer)
            self._wrote = trio.current_time()
            nursery.cancel_scope.cancel(reason="sent")
        if self._pipe.deaf:
            raise httpcore.WriteError("the server takes no more of the request")

    async def _send(self, buffer: bytes) -> None:
        try:
            await self._stream.send_all(buffer)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._pipe.deaf = True  # TLS has failed; reading tells why

    async def _listen(self) -> None:
        while len(early := b"".join(piece for piece in self._early if isinstance(piece, bytes))) < EARLY_LIMIT:
            if _FINAL.search(early):
                self._pipe.allow(PATIENCE)
            try:
                piece: bytes | trio.BrokenResourceError = bytes(await self._stream.receive_some(READ_SIZE))
            except trio.BrokenResourceError as exc:
                piece = exc
            except trio.ClosedResourceError:
                return
            self._early.append(piece)
            if not isinstance(piece, bytes) or not piece:
                self._pipe.allow(0)
                return

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """What the next read brings; b"" at the end.

        Raises:
            Broken: the connection broke, or ended before anything had come.
            httpcore.ReadError: we have hung up.
        """
        self._in_answer = True
        if self._hung_up:
            raise httpcore.ReadError("nobody waits for the rest of the answer")
        try:
            data = await self._next(max_bytes)
        except trio.BrokenResourceError as exc:
            raise self._broken(reason(exc)) from exc
        except trio.ClosedResourceError as exc:
            raise self._broken("the connection was closed on our side") from exc
        self._heard = self._heard or bool(data)
        if not self._heard:
            raise self._broken("it closed the connection without an answer")
        return data

    async def _next(self, max_bytes: int) -> bytes:
        if not self._early:
            return bytes(await self._stream.receive_some(max_bytes))
        await trio.lowlevel.checkpoint()
        piece = self._early.popleft()
        if isinstance(piece, bytes):
            return piece
        raise piece

    def _broken(self, why: str) -> Broken:
        soon = trio.current_time() - self._wrote <= UNSEEN
        return Broken(why, heard=self._heard, unseen=soon and self._requests > 1)

    def hang_up(self) -> None:
        """Whoever reads on this request finds the connection broken instead of waiting."""
        self._hung_up = True

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> Wire:
        """The same connection with TLS on it.

        Raises:
            NoConnection: no TLS, or not in time; the connection is closed then.
        """
        limit = self._timeouts.tls_handshake
        # https_compatible: ends without TLS's own goodbye, as everybody does; a body that is too short is seen by HTTP.
        stream = trio.SSLStream(self._stream, ssl_context, server_hostname=server_hostname, https_compatible=True)
        try:
            with _at_most(limit, f"no TLS with {server_hostname} within {limit} s (timeouts.tls_handshake)"):
                await stream.do_handshake()
        except trio.BrokenResourceError as exc:
            self._pipe.socket.close()
            raise NoConnection(_no_tls(exc)) from exc
        except BaseException:  # cancelled as well
            self._pipe.socket.close()
            raise
        return Wire(self._timeouts, self._pipe, stream)

    async def aclose(self) -> None:
        """Close at once, so that the server can notice within a scheduling step."""
        await self._pipe.aclose()

    def get_extra_info(self, info: str) -> Any:
        """What httpcore asks for: whether a connection that idles has something to say, which makes it useless."""
        return self._pipe.socket.is_readable() if info == "is_readable" else None


@contextmanager
def _at_most(limit: float | None, otherwise: str) -> Iterator[None]:
    try:
        with trio.fail_after(math.inf if limit is None else limit):
            yield
    except trio.TooSlowError as exc:
        raise NoConnection(otherwise, late=True) from exc


def _keepalive(interval: float | None) -> list[tuple[int, int, int]]:
    if interval is None:
        return [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 0)]
    seconds = min(max(1, math.ceil(interval)), MAX_KEEPALIVE)
    return [
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, seconds),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, seconds),
    ]


# ---- what to tell people -------------------------------------------------------------


def _no_connection(exc: OSError, host: str, port: int) -> str:
    if isinstance(exc, socket.gaierror):
        return f"the name {host} was not found ({reason(exc)})"
    return f"{reason(exc)} at {host}:{port}"


def _no_tls(exc: BaseException) -> str:
    why = tls_reason(exc)
    if why is None:
        return f"{reason(exc)} during the TLS handshake"
    if why == "wrong version number":
        return f"{why}: what answers there speaks no TLS; is it http:// rather than https://?"
    if why.startswith("certificate verify failed"):
        return f"{why}; this system must trust who signed it, or SSL_CERT_FILE name a file of those it trusts"
    return f"no TLS: {why}"
