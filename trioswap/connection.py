"""One HTTP/1.1 connection to a model server, and the exchange that is under way on it.

Every foreign error (sockets, h11) becomes one of ours here.  Which connection serves
which request, and how long a step may take, is for `upstream`.
"""

from __future__ import annotations

import errno
import os
import socket
import ssl
from collections import deque
from collections.abc import Iterator
from typing import Final

import attrs
import h11
import trio

from trioswap.errors import UpstreamFailed
from trioswap.request import Body

# Bytes asked of the socket at a time.  One read is one piece for the client, so this also bounds the pieces.
READ_SIZE: Final = 64 * 1024
# Bytes read at a time of a body that is not in memory: four times as much, for each costs the way to a thread.
BODY_PIECE: Final = 4 * READ_SIZE
# Bytes; h11 refuses longer heads.  Its own 16 KiB is less than some servers send (long debug headers are legal).
MAX_HEAD: Final = 256 * 1024
# Bytes up to which body and head go out in one system call; copying that much is cheaper than a second call.
JOIN_LIMIT: Final = 64 * 1024
# The first byte of TCP_INFO for a connection that is over, on both sides (Linux, include/net/tcp_states.h).
_TCP_CLOSE: Final = 7


def reason(exc: BaseException) -> str:
    """What the operating system said, or OpenSSL, in small letters: "connection refused".

    Trio wraps the failures of all addresses of a name into one group, and httpx
    wraps that again (its pool even cuts the chain of causes), so this looks for the
    errors inside that have a number.
    """
    return ", ".join(dict.fromkeys(_os_errors(exc))) or str(exc) or type(exc).__name__


def tls_reason(exc: BaseException) -> str | None:
    """What OpenSSL said of *exc*, or of what caused it, in small letters; None: it said nothing."""
    cause: BaseException | None = exc
    while cause is not None:
        if isinstance(cause, ssl.SSLError):
            return _openssl(cause)
        cause = cause.__cause__ or cause.__context__
    return None


def _openssl(exc: ssl.SSLError) -> str:
    if isinstance(exc, ssl.SSLCertVerificationError):
        return f"certificate verify failed: {exc.verify_message}"
    return (exc.reason or str(exc)).replace("_", " ").lower()


def _os_errors(exc: BaseException) -> Iterator[str]:
    if isinstance(exc, ssl.SSLError):  # an OSError, but its number is OpenSSL's: 1 is no EPERM
        yield _openssl(exc)
    elif isinstance(exc, OSError) and exc.errno is not None:
        # socket.gaierror numbers names that cannot be looked up in a range of its own.
        yield (os.strerror(exc.errno) if exc.errno in errno.errorcode else str(exc.strerror)).lower()
    elif isinstance(exc, BaseExceptionGroup):
        for each in exc.exceptions:
            yield from _os_errors(each)
    elif (inner := exc.__cause__ or exc.__context__) is not None:
        yield from _os_errors(inner)


@attrs.define(eq=False)
class Connection:
    """One connection to the model server; it serves one exchange after the other."""

    model: str
    _socket: trio.socket.SocketType
    _http: h11.Connection = attrs.field(factory=lambda: h11.Connection(h11.CLIENT, MAX_HEAD), init=False)
    _unsent: deque[memoryview] = attrs.field(factory=deque, init=False)
    """What goes out next."""
    _body: Body | None = attrs.field(default=None, init=False)
    """The body that is read piece by piece, as long as not all of it has been."""
    _taken: int = attrs.field(default=0, init=False)
    """Bytes of it that have been read."""
    _deaf: bool = attrs.field(default=False, init=False)
    """The server takes no more of the request; what it has said may still be read."""
    _heard: bool = attrs.field(default=False, init=False)
    """A byte of the answer to the present request has come."""
    _answer: h11.Response | None = attrs.field(default=None, init=False)
    """Its head, once that has come."""
    was_refused: bool = attrs.field(default=False, init=False)
    """The server has closed it without reading all that it was sent, and said nothing: it has not seen the request."""
    _complete: bool = attrs.field(default=False, init=False)
    """The answer's body has ended as it should."""
    idle_since: float = attrs.field(default=0.0, init=False)
    """Trio's time at which its last exchange ended; kept by who keeps the connection."""
    exchange: int = attrs.field(default=0, init=False)
    """Counts requests, so that nobody reads the answer to another's."""

    async def send(self, head: h11.Request, body: bytes | Body) -> None:
        """Send a request, until all of it is sent, or the head of its answer has come before that.

        Waits as long as the server does.  A server that hangs up is no error here: it may have answered.

        Raises:
            UpstreamFailed: the connection broke before the answer, or what came is no HTTP.
        """
        self._queue(head, body)
        await self._send_some()
        while self._is_sending() and self._answer is None:
            await self._send_until_readable()
            if self._is_sending():
                await self._receive()
                self._look_for_answer()

    async def answer(self) -> h11.Response:
        """The head of the answer, without interim (1xx) ones.

        Waits as long as the server does.

        Raises:
            UpstreamFailed: the connection broke, or what came is no HTTP.
        """
        while self._answer is None:
            await self._receive()
            self._look_for_answer()
        return self._answer

    async def read_body(self) -> bytes:
        """What the next read brings of the body, all of it and at once; b"" when the body is complete.

        Not a checkpoint when bytes are at hand already: the read that brought them was one.

        Raises:
            UpstreamFailed: the body broke off.
        """
        while True:
            data = self._body_at_hand()
            if data or self._complete:
                return data
            if self._is_sending():
                await self._send_until_readable()
            await self._receive()

    def start_over(self) -> bool:
        """Make ready for another request; False when that cannot be and the connection is only good for closing."""
        try:
            self._body_at_hand()  # nobody reads the empty body of a HEAD or 204 answer; notice its end
        except UpstreamFailed:
            return False
        states = {self._http.our_state, self._http.their_state}
        unsent = self._unsent or self._body is not None
        if states != {h11.DONE} or self._http.trailing_data != (b"", False) or unsent:
            return False
        self._http.start_next_cycle()
        self._answer = None
        self._heard = self._complete = False
        self.exchange += 1
        return True

    def is_stale(self) -> bool:
        """Whether the server closed this idle connection, or spoke without being asked."""
        return self._socket.is_readable()

    def close(self) -> None:
        """Close at once, so that the server can notice within a scheduling step."""
        self._socket.close()

    def failed(self, why: str, kind: type[UpstreamFailed] = UpstreamFailed) -> UpstreamFailed:
        """The error for what went wrong with the present exchange."""
        return kind(self.model, why, before_first_byte=not self._heard)

    # ---- sending -------------------------------------------------------------------

    def _queue(self, head: h11.Request, body: bytes | Body) -> None:
        pieces = [self._http.send(head)]
        if not isinstance(body, bytes):
            # Of what it does not send itself, h11 asks for nothing but the length (its documentation, "sendfile").
            self._http.send_with_data_passthrough(h11.Data(data=_Length(body.size)))  # type: ignore[arg-type]
            self._body, self._taken = body if body.size else None, 0
        elif body:
            self._http.send_with_data_passthrough(h11.Data(data=body))
            pieces.append(body)
            if len(body) <= JOIN_LIMIT:
                pieces = [b"".join(pieces)]
        self._http.send(h11.EndOfMessage())
        self._unsent.extend(map(memoryview, pieces))

    async def _send_some(self) -> None:
        """One system call's worth of the request.  A server that hangs up has perhaps answered: reading will tell."""
        try:
            sent = await self._socket.send(self._unsent[0])
        except OSError:
            self._deaf = True
            return
        piece = self._unsent.popleft()
        if sent < len(piece):
            self._unsent.appendleft(piece[sent:])

    def _is_sending(self) -> bool:
        return not self._deaf and (bool(self._unsent) or self._body is not None)

    async def _send_until_readable(self) -> None:
        # A server may answer a large body without reading it (413, 401) and then wait for
        # us to listen, or answer while it reads: who only sends, or only listens, may wait
        # for ever.  So what is left is sent for as long as the server says nothing.  Trio's
        # send is all or nothing when it is cancelled, and a piece of the body counts as read
        # only when it is queued: so no byte is lost or sent twice.
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._cancel_when_readable, nursery.cancel_scope)
            await self._send_rest()
            nursery.cancel_scope.cancel(reason="all is sent")

    async def _cancel_when_readable(self, scope: trio.CancelScope) -> None:
        await trio.lowlevel.wait_readable(self._socket)
        scope.cancel(reason="the server spoke")

    async def _send_rest(self) -> None:
        while self._is_sending():
            if not self._unsent:
                await self._take_piece()
            await self._send_some()

    async def _take_piece(self) -> None:
        assert self._body is not None
        data = await self._body.read(self._taken, BODY_PIECE)
        assert data, "a body is as long as it says"
        self._taken += len(data)
        self._unsent.append(memoryview(data))
        if self._taken == self._body.size:
            self._body = None

    # ---- receiving -----------------------------------------------------------------

    async def _receive(self) -> None:
        try:
            data = await self._socket.recv(READ_SIZE)
        except OSError as exc:
            self.was_refused = not self._heard and isinstance(exc, ConnectionError)
            raise self.failed(reason(exc)) from exc
        if not data and self._http.their_state is h11.SEND_RESPONSE:
            self.was_refused = not self._heard and self._was_reset()
            raise self.failed("it closed the connection before the head of its answer was complete")
        self._heard = self._heard or bool(data)
        self._http.receive_data(data)

    def _was_reset(self) -> bool:
        """Whether a reset has followed the end of what the server says.

        A TCP that has closed answers what still comes with a reset, and one that is closed with something unread sends
        one at once (RFC 9293, 3.10.7.1; RFC 2525, 2.17): of who has read everything there is none.
        """
        return self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _TCP_CLOSE

    def _look_for_answer(self) -> None:
        while self._answer is None:
            event = self._next_event()
            if isinstance(event, h11.Response):
                self._answer = event
            elif event is h11.NEED_DATA:
                return

    def _body_at_hand(self) -> bytes:
        parts = []
        while not self._complete:
            event = self._next_event()
            if isinstance(event, h11.Data):
                parts.append(event.data)
            elif isinstance(event, h11.EndOfMessage):
                self._complete = True
            else:
                assert event is h11.NEED_DATA, event
                break
        return b"".join(parts)

    def _next_event(self) -> h11.Event | type[h11.NEED_DATA | h11.PAUSED]:
        try:
            return self._http.next_event()
        except h11.RemoteProtocolError as exc:
            raise self.failed(f"it does not speak HTTP as it should: {exc}") from exc


@attrs.frozen
class _Length:
    """Stands for a body that h11 does not see."""

    size: int

    def __len__(self) -> int:
        return self.size
