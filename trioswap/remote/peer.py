"""Sends requests to a peer: another server, perhaps far away, whose models are offered along with ours.

The counterpart of `upstream` for servers that are not ours to start and stop: over TLS,
through proxies, with the peer's own key and with limits, and with an eye on whether the
peer is there at all.  Which models a peer has, what becomes of the client's credentials
where the peer has no key, and whether a failed request is tried elsewhere is for others.

HTTP/1.1 only, though HTTP/2 could be had: in HTTP/1.1 closing the connection tells the
peer to stop a generation nobody waits for, while httpcore leaves an HTTP/2 stream without
resetting it, and the peer would generate to the end.  Redirects are passed on and not
followed (the key would go along), and no cookie is kept, for it would be another client's:
hence httpcore's pool, below httpx's client, which adds all that and header fields of its own.
"""

from __future__ import annotations

import math
import os
import ssl
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Final

import h11
import httpcore  # noqa: TID251 - the package is the one that may
import httpx  # noqa: TID251 - the package is the one that may
import trio

from trioswap.config.parts import PeerConfig
from trioswap.errors import BadRequest, ConfigError, PeerFailed, PeerTimedOut
from trioswap.origin import Header
from trioswap.remote.exchange import FOREIGN, PeerResponse, Pieces, Upload
from trioswap.remote.health import PeerHealth, Watch
from trioswap.remote.proxies import proxy_for
from trioswap.remote.wire import Backend, Broken, NoConnection, Nowhere
from trioswap.request import Body
from trioswap.upstream import end_to_end

# Idle connections kept for one peer, as llama-swap does (surface reference 1.6).
MAX_IDLE: Final = 10
# Seconds for closing a connection, which takes a few scheduling steps.
CLOSE_GRACE: Final = 5.0
# Seconds for one look at a peer that is down.
LOOK_TIMEOUT: Final = 10.0

# Request fields that tell of the client's way to us, which is no affair of a peer's (surface reference 1.6).
_CLIENTS: Final = (b"forwarded", b"x-forwarded-")
# Request fields we set ourselves, or that ask for a conversation we do not hold: the body is complete already.
_OURS: Final = frozenset({b"host", b"content-length", b"expect"})
_CREDENTIALS: Final = frozenset({b"authorization", b"x-api-key"})
_WITH_BODY: Final = frozenset({"POST", "PUT", "PATCH"})


def make_peers(configs: Iterable[PeerConfig]) -> dict[str, Peer]:
    """A peer for each of *configs*, by name.

    Raises:
        ConfigError: an address is none, in the eyes of who is to connect there; no peer is made then.
    """
    peers, mistakes = {}, []
    for config in configs:
        try:
            peers[config.name] = Peer(config)
        except (httpx.InvalidURL, ValueError) as exc:  # UnicodeError is one: a name that is none (IDNA)
            mistakes.append(f"peers.{config.name}.proxy: found {config.proxy}, which is no address: {exc}")
    if mistakes:
        raise ConfigError("configuration", mistakes)
    return peers


class Peer:
    """One configured peer: its connections, and whether it answers.  Lives as long as its configuration.

    *environ* names proxies (`remote.proxies`).  Certificates are trusted as the system does, or as
    SSL_CERT_FILE and SSL_CERT_DIR say; where the system has no store of them, as Mozilla does (certifi).
    """

    def __init__(self, config: PeerConfig, environ: Mapping[str, str] = os.environ) -> None:
        self.config = config
        self._url = httpx.URL(config.proxy)
        self._base = self._url.raw_path.rstrip(b"/")
        self._watch = Watch(config.name)
        self._pool = _pool(config, self._url, environ)
        self._closed = False

    def __repr__(self) -> str:
        return f"<Peer {self.name} at {self.config.proxy}: {self.health.state.value}>"

    @property
    def name(self) -> str:
        """As configured."""
        return self.config.name

    @property
    def base_url(self) -> str:
        """Without a trailing slash."""
        return self.config.proxy

    @property
    def health(self) -> PeerHealth:
        """Whether the peer answers, as far as is known."""
        return self._watch.health

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Look, from every 5 s to every 60 s, whether a peer that is down is back; never returns.

        A look asks for `/health`, whose answer may be anything, and loads no model there.
        """
        task_status.started()
        await self._watch.run(self._look)

    async def aclose(self) -> None:
        """Close what is idle and refuse new requests; those under way go on until they end."""
        self._closed = True
        with trio.move_on_after(CLOSE_GRACE, shield=True):
            await self._close_idle()

    @asynccontextmanager
    async def request(
        self, method: str, target: bytes, headers: Sequence[Header], body: bytes | Body
    ) -> AsyncIterator[PeerResponse]:
        """Send one request; the answer's head is there on entry, its body may be read inside the block.

        *target* is path and query as the client wrote them.  Leaving the block early, by
        whatever way, closes the connection at once, which tells the peer to stop.  The limits
        are those of `timeouts`; that of the head of the answer counts from the last progress
        in sending the request.  Between pieces of the answer's body there is none.

        Raises:
            PeerTimedOut: a step took longer than it may.
            PeerFailed: no connection, or it broke, or what came is no HTTP.
            BadRequest: the request cannot be expressed in HTTP/1.1.
        """
        head = self._head(method, target, headers, body)
        response = await self._answer(head, body)
        pieces = Pieces(self.name, response)
        try:
            self._watch.note_up()
            fields = [(name.lower(), value) for name, value in end_to_end(response.headers)]
            yield PeerResponse(response.status, fields, pieces)
        finally:
            # Shielded, or a cancelled request would leave the peer generating; every shield is bounded.
            with trio.move_on_after(CLOSE_GRACE, shield=True):
                await pieces.leave()
                if self._closed:
                    await self._close_idle()

    def passed_on(self, headers: Sequence[Header]) -> list[Header]:
        """What the peer sees of a client's *headers*, and the key that it asks for."""
        key = (self.config.api_key or "").encode()
        ours: list[Header] = [(b"Authorization", b"Bearer " + key), (b"x-api-key", key)] if key else []
        replaced = _OURS | _CREDENTIALS if key else _OURS
        kept = [
            (name, value)
            for name, value in end_to_end(headers)
            if name.lower() not in replaced and not name.lower().startswith(_CLIENTS)
        ]
        return kept + ours

    # ---- asking --------------------------------------------------------------------

    def _head(self, method: str, target: bytes, headers: Sequence[Header], body: bytes | Body) -> h11.Request:
        fields = [(b"Host", self._url.netloc), *self.passed_on(headers)]
        size = len(body) if isinstance(body, bytes) else body.size
        if size or method in _WITH_BODY:
            fields.append((b"content-length", b"%d" % size))
        if method == "CONNECT":
            raise BadRequest("CONNECT asks for a tunnel, and peers are not asked for one")
        try:
            return h11.Request(method=method, target=self._base + target, headers=fields)
        except h11.LocalProtocolError as exc:
            # Another protocol (HTTP/2) brought what HTTP/1.1 has no words for.
            raise BadRequest(f"the request cannot be passed on as HTTP/1.1: {exc}") from exc

    async def _answer(self, head: h11.Request, body: bytes | Body) -> httpcore.Response:
        tries_left = MAX_IDLE
        while True:
            try:
                return await self._ask(head, body)
            except Broken as exc:
                # A server closes a connection that was idle for long just when we send on it:
                # it never saw the request, and a fresh connection would have served it.  Each
                # try ends one idle connection, so a fresh one comes after as many at most.
                if exc.heard or not exc.unseen or not tries_left:
                    raise self._failed(exc.why, before_first_byte=not exc.heard) from exc
                tries_left -= 1

    async def _ask(self, head: h11.Request, body: bytes | Body) -> httpcore.Response:
        if self._closed:
            raise self._failed("it has left the configuration", before_first_byte=True)
        with trio.CancelScope(deadline=trio.current_time() + self._time_to_connect()) as scope:
            upload = Upload(body, self.config.timeouts.response_header, scope)
            return await self._send(head, upload)
        raise self._late(upload)

    async def _send(self, head: h11.Request, upload: Upload) -> httpcore.Response:
        url = httpcore.URL(
            scheme=self._url.raw_scheme, host=self._url.raw_host, port=self._url.port, target=head.target
        )
        request = httpcore.Request(head.method, url, headers=head.headers.raw_items(), content=upload)
        try:
            response = await self._pool.handle_async_request(request)
        except (NoConnection, httpcore.ProxyError) as exc:
            raise self._unreachable(exc) from exc
        except FOREIGN as exc:
            raise self._failed(f"its answer broke off, or is no HTTP: {exc}", before_first_byte=False) from exc
        if response.status < 200:  # 101, though nobody asked for another protocol
            await response.aclose()
            raise self._failed("it switched to another protocol without being asked", before_first_byte=False)
        return response

    # ---- what can go wrong ---------------------------------------------------------

    def _failed(self, why: str, *, before_first_byte: bool) -> PeerFailed:
        return PeerFailed(self.name, why, before_first_byte=before_first_byte)

    def _unreachable(self, exc: NoConnection | httpcore.ProxyError) -> PeerFailed:
        why = exc.why if isinstance(exc, NoConnection) else f"the proxy in between answered: {exc}"
        self._watch.note_down(why)
        late = isinstance(exc, NoConnection) and exc.late
        return (PeerTimedOut if late else PeerFailed)(self.name, why, before_first_byte=True)

    def _late(self, upload: Upload) -> PeerTimedOut:
        limit = self.config.timeouts.response_header
        if not upload.begun:
            why = f"no connection within {self._time_to_connect():g} s; what is between us and it does not answer"
            self._watch.note_down(why)
        elif not upload.complete:
            why = f"it took nothing of the request for {limit:g} s (timeouts.response_header)"
        else:
            why = (
                f"it did not begin its answer within {limit:g} s; long answers that are not streamed"
                " need a longer timeouts.response_header"
            )
        return PeerTimedOut(self.name, why, before_first_byte=True)

    def _time_to_connect(self) -> float:
        """Seconds for all of connecting, a tunnel through a proxy included; the single steps have their own limits."""
        timeouts = self.config.timeouts
        if timeouts.connect is None or timeouts.tls_handshake is None:
            return math.inf
        return timeouts.connect + timeouts.tls_handshake

    # ---- the pool ------------------------------------------------------------------

    async def _close_idle(self) -> None:
        for connection in self._pool.connections:
            if connection.is_idle():
                await connection.aclose()

    async def _look(self) -> None:
        with trio.move_on_after(LOOK_TIMEOUT), suppress(PeerFailed):
            async with self.request("HEAD", b"/health", [], b""):
                pass


def _pool(config: PeerConfig, url: httpx.URL, environ: Mapping[str, str]) -> httpcore.AsyncConnectionPool:
    backend: httpcore.AsyncNetworkBackend = Backend(config.timeouts)
    port = url.port or {"http": 80, "https": 443}[url.scheme]
    proxy = None
    if (via := proxy_for(url.scheme, url.host, port, environ)) is not None:
        try:
            proxy = _proxy(via)
        except ValueError as exc:
            # Going around it would send there what is not to go there.
            backend = Nowhere(f"{exc}; name another in {url.scheme.upper()}_PROXY, or {url.host} in NO_PROXY")
    return httpcore.AsyncConnectionPool(
        ssl_context=_trust() if url.scheme == "https" else None,
        proxy=proxy,
        max_connections=None,
        max_keepalive_connections=MAX_IDLE,
        keepalive_expiry=config.timeouts.idle_conn,
        network_backend=backend,
    )


def _proxy(address: str) -> httpcore.Proxy:
    """The proxy meant by what the environment says.

    Raises:
        ValueError: it is none we can use; the text does not repeat the address, which may hold a password.
    """
    try:
        proxy = httpx.Proxy(address)
    except (ValueError, httpx.InvalidURL):
        raise ValueError("the address of the proxy cannot be read") from None
    url = proxy.url
    if url.scheme not in ("http", "https"):
        raise ValueError(f"the proxy speaks {url.scheme}, and only those at http:// and https:// can be used")
    return httpcore.Proxy(
        httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=b"/"),
        auth=proxy.raw_auth,
        ssl_context=_trust() if url.scheme == "https" else None,
    )


def _trust() -> ssl.SSLContext:
    known = ssl.get_default_verify_paths()
    return ssl.create_default_context() if known.cafile or known.capath else httpx.create_ssl_context(trust_env=False)
