"""Talks HTTP/1.1 to one local model server: a small connection pool and streamed answers.

What happens on one connection is in `connection`.  What the request says, who may send
it, how long it may take in all and whether a failed one is tried elsewhere is decided by
others: callers put cancel scopes around it.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Final
from urllib.parse import urlsplit

import attrs
import h11
import trio

from trioswap.config.parts import TimeoutConfig
from trioswap.connection import Connection, reason
from trioswap.errors import BadRequest, UpstreamFailed, UpstreamTimedOut
from trioswap.keepalive import probe_when_idle
from trioswap.request import Body

__all__ = ["Upstream", "UpstreamResponse", "end_to_end", "reason"]

Header = tuple[bytes, bytes]

# Idle connections kept for one server; llama-swap keeps 10 per host as well (surface reference 1.6).
MAX_IDLE: Final = 10
# Fields that concern one connection only (RFC 9110, 7.6.1, and the older Proxy-Connection and Keep-Alive).
HOP_BY_HOP: Final = frozenset(
    b"connection keep-alive proxy-connection te trailer transfer-encoding upgrade"
    b" proxy-authenticate proxy-authorization".split()
)
# Request fields we set ourselves, or that ask for a conversation we do not hold: the body is complete already.
_OURS: Final = frozenset({b"content-length", b"expect"})
_WITH_BODY: Final = frozenset({"POST", "PUT", "PATCH"})
# Seconds for a connection on the same machine that is made to see whether anybody is there.
_LISTENS: Final = 2.0


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


@attrs.frozen(eq=False)
class UpstreamResponse:
    """The head of an answer, and its body as it comes."""

    status: int
    headers: list[Header]
    """Names in small letters; without the fields that concern one connection only."""
    _connection: Connection

    def chunks(self) -> AsyncIterator[bytes]:
        """The body, piece by piece, one for each read from the server, never waiting for more than there is.

        Raises (while iterated):
            UpstreamFailed: the body broke off; what came before must not be taken for all of it.
        """
        return _Body(self._connection, self._connection.exchange)


@attrs.frozen(eq=False)
class _Body:
    """An iterator with nothing to clean up, unlike an async generator that is left half way."""

    _connection: Connection
    _exchange: int

    def __aiter__(self) -> _Body:
        return self

    async def __anext__(self) -> bytes:
        assert self._connection.exchange == self._exchange, "a body is read inside the block of its request"
        data = await self._connection.read_body()
        if not data:
            raise StopAsyncIteration
        return data


_TIMEOUTS: Final = TimeoutConfig()


class Upstream:
    """One run of one model server, as seen by its clients.

    Make a new one for every start of the server: connections of this one can then
    never reach another process that got the same port.  `base_url` is http only;
    its path and query come before those of each request.

    Of *timeouts*, two have no meaning here: there is no TLS, and nothing waits for the
    permission to send a body (`expect_continue`).
    """

    def __init__(self, model: str, base_url: str, timeouts: TimeoutConfig = _TIMEOUTS) -> None:
        self.model, self.base_url = model, base_url
        self.timeouts = timeouts
        url = urlsplit(base_url)
        assert url.scheme == "http", base_url
        assert url.hostname, base_url
        self._address = url.hostname, url.port or 80
        self._host = url.netloc.rpartition("@")[2].encode()
        self._path, self._query = url.path.rstrip("/").encode(), url.query.encode()
        self._idle: list[Connection] = []  # newest last
        self._closed = False

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._idle)} idle"
        return f"<Upstream {self.model} at {self.base_url}: {state}>"

    @property
    def idle(self) -> int:
        """How many connections wait for a next request.  One that does so for too long is closed at the next look."""
        return len(self._idle)

    def close(self) -> None:
        """Close what is idle and refuse new requests; those under way go on until their server ends."""
        self._closed = True
        while self._idle:
            self._idle.pop().close()

    @asynccontextmanager
    async def request(
        self, method: str, target: bytes, headers: Sequence[Header], body: bytes | Body
    ) -> AsyncIterator[UpstreamResponse]:
        """Send one request; the answer's head is there on entry, its body may be read inside the block.

        *target* is path and query as the client wrote them.  A *body* that is not bytes is sent
        piece by piece, and must stay open until the block is left.  Leaving the block early, by
        whatever way, closes the connection at once, which tells the server to stop.

        Raises:
            UpstreamTimedOut: there was no connection in time (`connect`), or no answer (`response_header`).
            UpstreamFailed: there was no connection, or it broke, or what came is no HTTP.
            BadRequest: the request cannot be expressed in HTTP/1.1.
        """
        head = self._head(method, target, headers, body)
        connection, answer = await self._first_answer(head, body)
        try:
            yield UpstreamResponse(answer.status_code, end_to_end(answer.headers), connection)
        finally:
            self._give_back(connection)

    async def listens(self) -> bool:
        """Whether connections are taken at its address; one is made for that, and closed."""
        with trio.move_on_after(_LISTENS), suppress(OSError):
            await (await trio.open_tcp_stream(*self._address)).aclose()
            return True
        return False

    def _head(self, method: str, target: bytes, headers: Sequence[Header], body: bytes | Body) -> h11.Request:
        size = len(body) if isinstance(body, bytes) else body.size
        fields = [(name, value) for name, value in end_to_end(headers) if name.lower() not in _OURS]
        if not any(name.lower() == b"host" for name, _ in fields):
            fields.insert(0, (b"host", self._host))
        if size or method in _WITH_BODY:
            fields.append((b"content-length", b"%d" % size))
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

    async def _first_answer(self, head: h11.Request, body: bytes | Body) -> tuple[Connection, h11.Response]:
        connection = self._take_idle()
        if connection is not None:
            try:
                return connection, await self._ask(connection, head, body)
            except UpstreamTimedOut:
                raise  # it has seen the request, and may still be at work on it
            except UpstreamFailed:
                # A server closes a connection that was idle for long just when we send on it:
                # it never saw the request, and a fresh connection would have served it.
                if not connection.was_refused:
                    raise
        connection = await self._connect()
        return connection, await self._ask(connection, head, body)

    async def _ask(self, connection: Connection, head: h11.Request, body: bytes | Body) -> h11.Response:
        limit = self.timeouts.response_header
        try:
            await connection.send(head, body)
            if limit is None:
                return await connection.answer()
            with trio.fail_after(limit):
                return await connection.answer()
        except trio.TooSlowError as exc:
            connection.close()
            raise connection.failed(f"no answer within {limit:g} s (response_header)", UpstreamTimedOut) from exc
        except BaseException:  # cancelled as well: the server is to notice
            connection.close()
            raise

    def _take_idle(self) -> Connection | None:
        self._close_expired()
        # The newest first: it is the least likely to be near the server's idle timeout.
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_stale():
                return connection
            connection.close()
        return None

    def _give_back(self, connection: Connection) -> None:
        self._close_expired()
        if self._closed or len(self._idle) >= MAX_IDLE or not connection.start_over():
            connection.close()
        else:
            connection.idle_since = trio.current_time()
            self._idle.append(connection)

    def _close_expired(self) -> None:
        """Close what has been idle for too long: at a request, for no task is there to do it in time."""
        limit = self.timeouts.idle_conn
        if limit is not None:
            while self._idle and self._idle[0].idle_since < trio.current_time() - limit:
                self._idle.pop(0).close()

    async def _connect(self) -> Connection:
        self._check_open()
        limit = math.inf if self.timeouts.connect is None else self.timeouts.connect
        try:
            with trio.fail_after(limit):
                stream = await trio.open_tcp_stream(*self._address)
        except trio.TooSlowError as exc:
            why = f"no connection within {limit:g} s (connect)"
            raise UpstreamTimedOut(self.model, why, before_first_byte=True) from exc
        except OSError as exc:
            raise self._no_connection(reason(exc)) from exc
        probe_when_idle(stream, self.timeouts.keepalive)
        connection = Connection(self.model, stream.socket)
        if self._closed:  # meanwhile; the port may be another's by now
            connection.close()
        self._check_open()
        return connection

    def _check_open(self) -> None:
        if self._closed:
            raise self._no_connection("its server has been stopped")

    def _no_connection(self, why: str) -> UpstreamFailed:
        return UpstreamFailed(self.model, why, before_first_byte=True)
