"""Asks a model server for a websocket: the connection, the request, the answer.

Handshakes are wsproto's.  What is said on the websocket then is `websocket`'s business.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Final
from urllib.parse import urlsplit

import attrs
import h11
import trio
from wsproto import ConnectionType, WSConnection, events
from wsproto.connection import Connection
from wsproto.utilities import RemoteProtocolError

from trioswap.config.parts import TimeoutConfig
from trioswap.connection import READ_SIZE, reason
from trioswap.errors import BadRequest, UpstreamFailed, UpstreamTimedOut
from trioswap.keepalive import probe_when_idle
from trioswap.upstream import Header, end_to_end

# Seconds for a step that the configuration gives no limit.  A server has nothing to generate before it
# accepts, and nothing waits for ever here; llama-swap gives a peer's answer as long (surface reference 1.6).
STEP_TIMEOUT: Final = 60.0
# Seconds for the body of a refusal, which may have no end.
REFUSAL_GRACE: Final = 2.0
# Bytes of the body of a refusal; a longer one is left out.
MAX_REFUSAL: Final = 64 * 1024

# Request fields that wsproto writes, or that belong to a body, which there is not.
_OURS: Final = frozenset({b"host", b"content-length", b"expect"})
_HANDSHAKE: Final = b"sec-websocket-"


@attrs.frozen
class Answer:
    """An ordinary response where a websocket was asked for."""

    status: int
    headers: list[Header]
    """Without the length, and what concerns one connection only."""
    body: bytes


class HandshakeRefused(UpstreamFailed):
    """The model server answered the handshake with an ordinary response, which is the client's to see."""

    def __init__(self, model: str, answer: Answer) -> None:
        super().__init__(model, f"it refused the websocket with status {answer.status}")
        self.answer = answer


class Handshake:
    """One handshake, each step in its time."""

    def __init__(
        self,
        model: str,
        base_url: str,
        target: bytes,
        headers: Sequence[Header],
        subprotocols: Sequence[str],
        timeouts: TimeoutConfig,
    ) -> None:
        """Raises BadRequest when HTTP/1.1, or the name of a host, cannot say it."""
        self._model, self._timeouts = model, timeouts
        self._url = urlsplit(base_url)
        assert self._url.scheme in ("http", "https"), base_url
        assert self._url.hostname, base_url
        self._http = WSConnection(ConnectionType.CLIENT)
        host = self._url.netloc.rpartition("@")[2].encode()
        try:
            request = events.Request(
                host=next((value for name, value in headers if name.lower() == b"host"), host).decode("ascii"),
                target=self._prefixed(target).decode("ascii"),
                subprotocols=list(subprotocols),
                extra_headers=_passed_on(headers),
            )
            self._request = self._http.send(request)
        except (h11.LocalProtocolError, UnicodeError) as exc:
            raise BadRequest(f"the request cannot be passed on as a websocket handshake: {exc}") from exc

    def _prefixed(self, target: bytes) -> bytes:
        path, _, query = target.partition(b"?")
        query = b"&".join(filter(None, (self._url.query.encode(), query)))
        return self._url.path.rstrip("/").encode() + path + (b"?" + query if query else b"")

    async def connect(self) -> trio.SocketStream:
        """A connection; nothing is said on it yet.

        Raises:
            UpstreamFailed: there is none, or not in time.
        """
        assert self._url.hostname
        with self._in_time("connect", "no connection"):
            stream = await trio.open_tcp_stream(self._url.hostname, self._url.port or (443 if self._tls else 80))
        probe_when_idle(stream, self._timeouts.keepalive)
        return stream

    async def shake(
        self, tcp: trio.SocketStream, context: ssl.SSLContext | None
    ) -> tuple[trio.abc.Stream, events.AcceptConnection, Connection]:
        """Ask on *tcp*; return what to talk on, what the server accepted, and the parser of what follows.

        Raises:
            HandshakeRefused: it answered with something else.
            UpstreamFailed: it answered with nothing, or not in time, or with what is no HTTP.
        """
        stream: trio.abc.Stream = tcp
        if self._tls:
            with self._in_time("tls_handshake", "no TLS"):
                stream = await self._encrypted(tcp, context or ssl.create_default_context())
        with self._in_time("response_header", "no answer to the handshake"):
            await stream.send_all(self._request)
            head = await self._head(stream)
        if isinstance(head, events.AcceptConnection):
            assert self._http.connection is not None
            return stream, head, self._http.connection
        if head.status_code < 200:
            raise self._failed(f"it answered the handshake with status {head.status_code}")
        headers = [(name, value) for name, value in end_to_end(head.headers) if name != b"content-length"]
        raise HandshakeRefused(self._model, Answer(head.status_code, headers, await self._body(stream)))

    @property
    def _tls(self) -> bool:
        return self._url.scheme == "https"

    async def _encrypted(self, tcp: trio.SocketStream, context: ssl.SSLContext) -> trio.abc.Stream:
        stream = trio.SSLStream(tcp, context, server_hostname=self._url.hostname, https_compatible=True)
        await stream.do_handshake()
        return stream

    async def _head(self, stream: trio.abc.Stream) -> events.AcceptConnection | events.RejectConnection:
        while data := await stream.receive_some(READ_SIZE):
            self._feed(data)
            for event in self._http.events():
                assert isinstance(event, events.AcceptConnection | events.RejectConnection), event
                return event
        raise self._failed("it closed the connection before the head of its answer was complete")

    async def _body(self, stream: trio.abc.Stream) -> bytes:
        """The body of a refusal; nothing if it is long, slow or broken: it only explains."""
        body = b""
        with trio.move_on_after(REFUSAL_GRACE), suppress(UpstreamFailed, trio.BrokenResourceError):
            while True:
                for event in self._http.events():
                    assert isinstance(event, events.RejectData), event
                    body += event.data
                    if len(body) > MAX_REFUSAL:
                        return b""
                    if event.body_finished:
                        return body
                self._feed(await stream.receive_some(READ_SIZE))  # the end of the connection may be that of the body
        return b""

    def _feed(self, data: bytes | bytearray) -> None:
        try:
            self._http.receive_data(bytes(data))
        except (RemoteProtocolError, UnicodeError) as exc:
            raise self._failed(f"it does not speak websocket as it should: {exc}") from exc

    @contextmanager
    def _in_time(self, setting: str, what: str) -> Iterator[None]:
        limit = getattr(self._timeouts, setting) or STEP_TIMEOUT
        try:
            with trio.fail_after(limit):
                yield
        except trio.TooSlowError as exc:
            text = f"{what} within {limit:g} s ({setting})"
            raise UpstreamTimedOut(self._model, text, before_first_byte=True) from exc
        except (OSError, trio.BrokenResourceError) as exc:
            raise self._failed(reason(exc)) from exc

    def _failed(self, text: str) -> UpstreamFailed:
        # Nothing of the answer has been used, and what is asked has no effect: it may be asked again.
        return UpstreamFailed(self._model, text, before_first_byte=True)


def _passed_on(headers: Sequence[Header]) -> list[Header]:
    return [
        (name, value)
        for name, value in end_to_end(headers)
        if name.lower() not in _OURS and not name.lower().startswith(_HANDSHAKE)
    ]
