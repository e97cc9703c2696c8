"""Talks HTTP/1.1 to one local model server: a small connection pool and streamed answers.

The only place that reads a model server's bytes, and where every foreign error
(sockets, h11) becomes one of ours.  What the request says, who may send it, how
long it may take and whether a failed one is tried elsewhere is decided by others:
callers put cancel scopes around it.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Final
from urllib.parse import urlsplit

import attrs
import h11
import trio

from trioswap.errors import BadRequest, UpstreamFailed

Header = tuple[bytes, bytes]

# Seconds; llama-swap's default for connections to a model server (surface reference 1.6).
CONNECT_TIMEOUT: Final = 30.0
# Idle connections kept for one server; llama-swap keeps 10 per host as well (surface reference 1.6).
MAX_IDLE: Final = 10
# Bytes asked of the socket at a time.  One read is one piece for the client, so this also bounds the pieces.
READ_SIZE: Final = 64 * 1024
# Bytes; h11 refuses longer heads.  Its own 16 KiB is less than some servers send (long debug headers are legal).
MAX_HEAD: Final = 256 * 1024
# Bytes up to which body and head go out in one system call; copying that much is cheaper than a second call.
JOIN_LIMIT: Final = 64 * 1024

# Fields that concern one connection only (RFC 9110, 7.6.1, and the older Proxy-Connection and Keep-Alive).
HOP_BY_HOP: Final = frozenset(
    b"connection keep-alive proxy-connection te trailer transfer-encoding upgrade"
    b" proxy-authenticate proxy-authorization".split()
)
# Request fields we set ourselves, or that ask for a conversation we do not hold: the body is complete already.
_OURS: Final = frozenset({b"content-length", b"expect"})
_WITH_BODY: Final = frozenset({"POST", "PUT", "PATCH"})


def end_to_end(headers: Iterable[Header]) -> list[Header]:
    """*headers* without what concerns one connection only, as RFC 9110, 7.6.1 asks of every intermediary."""
    headers = list(headers)
    named = {
        option.strip().lower()
        for name, value in headers
        if name.lower() == b"connection"
        for option in value.split(b",")
    }
    dropped = HOP_BY_HOP | named
    return [(name, value) for name, value in headers if name.lower() not in dropped]


def reason(exc: BaseException) -> str:
    """What the operating system said, in small letters: "connection refused".

    Trio wraps the failures of all addresses of a name into one group, and httpx
    wraps that again (its pool even cuts the chain of causes), so this looks for the
    errors inside that have a number.
    """
    return ", ".join(dict.fromkeys(_os_errors(exc))) or str(exc) or type(exc).__name__


def _os_errors(exc: BaseException) -> Iterator[str]:
    if isinstance(exc, OSError) and exc.errno is not None:
        # socket.gaierror numbers names that cannot be looked up in a range of its own.
        yield (os.strerror(exc.errno) if exc.errno in errno.errorcode else str(exc.strerror)).lower()
    elif isinstance(exc, BaseExceptionGroup):
        for each in exc.exceptions:
            yield from _os_errors(each)
    elif (inner := exc.__cause__ or exc.__context__) is not None:
        yield from _os_errors(inner)


@attrs.define(eq=False)
class _Connection:
    """One connection to the model server, and the exchange that is under way on it."""

    model: str
    _socket: trio.socket.SocketType
    _http: h11.Connection = attrs.field(factory=lambda: h11.Connection(h11.CLIENT, MAX_HEAD), init=False)
    _unsent: deque[memoryview] = attrs.field(factory=deque, init=False)
    _deaf: bool = attrs.field(default=False, init=False)
    """The server takes no more of the request; what it has said may still be read."""
    _heard: bool = attrs.field(default=False, init=False)
    """A byte of the answer to the present request has come."""
    _complete: bool = attrs.field(default=False, init=False)
    """The answer's body has ended as it should."""
    exchange: int = attrs.field(default=0, init=False)
    """Counts requests, so that nobody reads the answer to another's."""

    async def ask(self, head: h11.Request, body: bytes) -> h11.Response:
        """Send a request and return the head of its answer, skipping interim (1xx) ones.

        Waits as long as the server does.

        Raises:
            UpstreamFailed: the connection broke, or what came is no HTTP.
        """
        self._queue(head, body)
        await self._send_some()
        while True:
            event = self._next_event()
            if isinstance(event, h11.Response):
                return event
            if event is h11.NEED_DATA:
                await self._read()

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
            await self._read()

    def start_over(self) -> bool:
        """Make ready for another request; False when that cannot be and the connection is only good for closing."""
        try:
            self._body_at_hand()  # nobody reads the empty body of a HEAD or 204 answer; notice its end
        except UpstreamFailed:
            return False
        states = {self._http.our_state, self._http.their_state}
        if states != {h11.DONE} or self._http.trailing_data != (b"", False) or self._unsent:
            return False
        self._http.start_next_cycle()
        self._heard = self._complete = False
        self.exchange += 1
        return True

    def is_stale(self) -> bool:
        """Whether the server closed this idle connection, or spoke without being asked."""
        return self._socket.is_readable()

    def close(self) -> None:
        """Close at once, so that the server can notice within a scheduling step."""
        self._socket.close()

    def failed(self, why: str) -> UpstreamFailed:
        return UpstreamFailed(self.model, why, before_first_byte=not self._heard)

    # ---- sending -------------------------------------------------------------------

    def _queue(self, head: h11.Request, body: bytes) -> None:
        data = self._http.send(head)
        if body:
            self._http.send_with_data_passthrough(h11.Data(data=body))
        self._http.send(h11.EndOfMessage())
        pieces = [data + body] if len(body) <= JOIN_LIMIT else [data, body]
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

    async def _send_until_readable(self) -> None:
        # A server may answer a large body without reading it (413, 401) and then wait for
        # us to listen, or answer while it reads: who only sends, or only listens, may wait
        # for ever.  So what is left is sent for as long as the server says nothing; trio's
        # send is all or nothing when it is cancelled, so no byte is lost or sent twice.
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send_rest)
            await trio.lowlevel.wait_readable(self._socket)
            nursery.cancel_scope.cancel(reason="the server spoke")

    async def _send_rest(self) -> None:
        while self._unsent and not self._deaf:
            await self._send_some()

    # ---- receiving -----------------------------------------------------------------

    async def _read(self) -> None:
        if self._unsent and not self._deaf:
            await self._send_until_readable()
        try:
            data = await self._socket.recv(READ_SIZE)
        except OSError as exc:
            raise self.failed(reason(exc)) from exc
        if not data and self._http.their_state is h11.SEND_RESPONSE:
            raise self.failed("it closed the connection before the head of its answer was complete")
        self._heard = self._heard or bool(data)
        self._http.receive_data(data)

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


@attrs.frozen(eq=False)
class UpstreamResponse:
    """The head of an answer, and its body as it comes."""

    status: int
    headers: list[Header]
    """Names in small letters; without the fields that concern one connection only."""
    _connection: _Connection

    def chunks(self) -> AsyncIterator[bytes]:
        """The body, piece by piece, one for each read from the server, never waiting for more than there is.

        Raises (while iterated):
            UpstreamFailed: the body broke off; what came before must not be taken for all of it.
        """
        return _Body(self._connection, self._connection.exchange)


@attrs.frozen(eq=False)
class _Body:
    """An iterator with nothing to clean up, unlike an async generator that is left half way."""

    _connection: _Connection
    _exchange: int

    def __aiter__(self) -> _Body:
        return self

    async def __anext__(self) -> bytes:
        assert self._connection.exchange == self._exchange, "a body is read inside the block of its request"
        data = await self._connection.read_body()
        if not data:
            raise StopAsyncIteration
        return data


class Upstream:
    """One run of one model server, as seen by its clients.

    Make a new one for every start of the server: connections of this one can then
    never reach another process that got the same port.  `base_url` is http only;
    its path and query come before those of each request.
    """

    def __init__(self, model: str, base_url: str) -> None:
        self.model, self.base_url = model, base_url
        url = urlsplit(base_url)
        assert url.scheme == "http", base_url
        assert url.hostname, base_url
        self._address = url.hostname, url.port or 80
        self._host = url.netloc.rpartition("@")[2].encode()
        self._path, self._query = url.path.rstrip("/").encode(), url.query.encode()
        self._idle: list[_Connection] = []  # newest last
        self._closed = False

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._idle)} idle"
        return f"<Upstream {self.model} at {self.base_url}: {state}>"

    @property
    def idle(self) -> int:
        """How many connections wait for a next request."""
        return len(self._idle)

    def close(self) -> None:
        """Close what is idle and refuse new requests; those under way go on until their server ends."""
        self._closed = True
        while self._idle:
            self._idle.pop().close()

    @asynccontextmanager
    async def request(
        self, method: str, target: bytes, headers: Sequence[Header], body: bytes
    ) -> AsyncIterator[UpstreamResponse]:
        """Send one request; the answer's head is there on entry, its body may be read inside the block.

        *target* is path and query as the client wrote them.  Leaving the block early, by
        whatever way, closes the connection at once, which tells the server to stop.

        Raises:
            UpstreamFailed: no connection within 30 s, or it broke, or what came is no HTTP.
            BadRequest: the request cannot be expressed in HTTP/1.1.
        """
        head = self._head(method, target, headers, body)
        connection, answer = await self._first_answer(head, body)
        try:
            yield UpstreamResponse(answer.status_code, end_to_end(answer.headers), connection)
        finally:
            self._give_back(connection)

    def _head(self, method: str, target: bytes, headers: Sequence[Header], body: bytes) -> h11.Request:
        fields = [(name, value) for name, value in end_to_end(headers) if name.lower() not in _OURS]
        if not any(name.lower() == b"host" for name, _ in fields):
            fields.insert(0, (b"host", self._host))
        if body or method in _WITH_BODY:
            fields.append((b"content-length", b"%d" % len(body)))
        if method == "CONNECT":
            raise BadRequest("CONNECT asks for a tunnel, and model servers offer none")
        try:
            return h11.Request(method=method, target=self._prefixed(target), headers=fields)
        except h11.LocalProtocolError as exc:
            # Another protocol (HTTP/2) brought what HTTP/1.1 has no words for.
            raise BadRequest(f"the request cannot be passed on as HTTP/1.1: {exc}") from exc

    def _prefixed(self, target: bytes) -> bytes:
        path, _, query = target.partition(b"?")
        query = b"&".join(filter(None, (self._query, query)))
        return self._path + path + (b"?" + query if query else b"")

    async def _first_answer(self, head: h11.Request, body: bytes) -> tuple[_Connection, h11.Response]:
        connection = self._take_idle()
        if connection is not None:
            try:
                return connection, await _ask(connection, head, body)
            except UpstreamFailed as exc:
                # A server closes a connection that was idle for long just when we send on it:
                # it never saw the request, and a fresh connection would have served it.
                if not exc.before_first_byte:
                    raise
        connection = await self._connect()
        return connection, await _ask(connection, head, body)

    def _take_idle(self) -> _Connection | None:
        # The newest first: it is the least likely to be near the server's idle timeout.
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_stale():
                return connection
            connection.close()
        return None

    def _give_back(self, connection: _Connection) -> None:
        if self._closed or len(self._idle) >= MAX_IDLE or not connection.start_over():
            connection.close()
        else:
            self._idle.append(connection)

    async def _connect(self) -> _Connection:
        self._check_open()
        try:
            with trio.fail_after(CONNECT_TIMEOUT):
                stream = await trio.open_tcp_stream(*self._address)
        except trio.TooSlowError as exc:
            raise self._no_connection(f"no connection within {CONNECT_TIMEOUT:.0f} s") from exc
        except OSError as exc:
            raise self._no_connection(reason(exc)) from exc
        connection = _Connection(self.model, stream.socket)
        if self._closed:  # meanwhile; the port may be another's by now
            connection.close()
        self._check_open()
        return connection

    def _check_open(self) -> None:
        if self._closed:
            raise self._no_connection("its server has been stopped")

    def _no_connection(self, why: str) -> UpstreamFailed:
        return UpstreamFailed(self.model, why, before_first_byte=True)


async def _ask(connection: _Connection, head: h11.Request, body: bytes) -> h11.Response:
    try:
        return await connection.ask(head, body)
    except BaseException:  # cancelled as well: the server is to notice
        connection.close()
        raise
