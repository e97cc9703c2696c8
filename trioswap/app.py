"""The ASGI application: request id, who may ask, error boundary.

Nothing that happens to one request gets past this module (invariant I13).
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

import attrs
import trio

from trioswap import routes, sockets, sse
from trioswap.access import Scope
from trioswap.api import Services
from trioswap.asgi import Exchange
from trioswap.asgi_websocket import Socket
from trioswap.errors import Forbidden, ForeignOrigin, InternalError, TrioswapError, Unauthorized
from trioswap.incoming import ClientLeft, Incoming, Message, Receive, Send, in_origin_form
from trioswap.request import check_framing, client_of, is_in

logger = logging.getLogger(__name__)

# Asked so often, and by machines, that a line for each would hide the rest (surface reference 2.5, 2.8).
_NOT_LOGGED: Final = frozenset({"/wol-health", "/metrics", "/api/performance"})


@attrs.frozen
class App:
    """What the HTTP server calls for each request."""

    services: Services
    """The first ones; a request keeps those that are there when it comes."""

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request or serve one websocket, whatever happens while doing so."""
        request_id = f"req_{secrets.token_hex(8)}"
        scope, services = in_origin_form(scope), self.services.now
        if scope["type"] == "websocket":
            socket = Socket(scope, request_id, receive, send)
            await self._serve(socket, services, lambda: self._connect(socket, services), socket.fail)
        elif scope["type"] == "http":
            exchange = Exchange(scope, request_id, receive, send)
            fail = partial(_send_error, exchange)
            await self._serve(exchange, services, lambda: self._answer(exchange, services), fail)

    async def _serve(
        self,
        incoming: Incoming,
        services: Services,
        answer: Callable[[], Awaitable[None]],
        fail: Callable[[TrioswapError], Awaitable[None]],
    ) -> None:
        """The error boundary around *answer*; *fail* tells the client of an error."""
        begun = trio.current_time()
        try:
            try:
                try:
                    _recognise(incoming, services)
                    await answer()
                except TrioswapError as exc:
                    await fail(exc)
            except* ClientLeft:
                pass
            except* Exception:
                logger.exception("request failed request=%s path=%s", incoming.request_id, incoming.path)
                await fail(InternalError(incoming.request_id))
        finally:
            if incoming.path not in _NOT_LOGGED:
                _access_log(incoming, trio.current_time() - begun)

    async def _answer(self, exchange: Exchange, services: Services) -> None:
        if exchange.method == "OPTIONS":
            # Whatever the path: browsers ask before they may show a key, and nobody else asks this.
            exchange.always = services.cors.preflight(exchange.headers)
            await exchange.begin(204, [])
            await exchange.finish()
            return
        route, exchange.rest = routes.find(exchange.method, exchange.raw_path)
        _check(exchange, services, route.scope)
        await route.handler(exchange, services)

    async def _connect(self, socket: Socket, services: Services) -> None:
        route, socket.rest = sockets.find(socket.raw_path)
        _check(socket, services, route.scope)
        await route.handler(socket, services)


def _recognise(incoming: Incoming, services: Services) -> None:
    """Find out where it comes from, and what its answer says to web pages."""
    headers = incoming.headers
    trusted = services.config.trusted_proxies
    incoming.behind_proxy = incoming.peer is not None and is_in(incoming.peer, trusted)
    incoming.client = client_of(incoming.peer, headers, trusted)
    incoming.always = services.cors.headers(headers)
    check_framing(headers)


def _check(incoming: Incoming, services: Services, scope: Scope) -> None:
    """Whether the client may ask for this.

    Raises:
        Unauthorized, Forbidden: it shows no key of ours, or one that is not enough.
        ForeignOrigin: it is a web page that has no business here.
    """
    if scope is Scope.OPEN:
        return
    foreign = services.cors.refused(incoming.method, incoming.headers)
    if foreign is not None:
        raise ForeignOrigin(foreign.decode("latin-1"))
    key = services.keyring.find(incoming.headers)
    if key is None:
        raise Unauthorized
    if not key.may(scope, incoming.raw_path.decode("ascii", "replace")):
        raise Forbidden(key.name, f"ask for {incoming.method} {incoming.path}")
    incoming.key = key


async def _send_error(exchange: Exchange, error: TrioswapError) -> None:
    """The error in the shape of the route; a response that has begun is broken off instead."""
    if exchange.status is not None or exchange.left:
        return
    anthropic = sse.dialect_of(exchange.path) is sse.Dialect.MESSAGES
    await exchange.json(error.status, error.anthropic_body() if anthropic else error.openai_body(), error.headers())


def _access_log(incoming: Incoming, seconds: float) -> None:
    # 499 is nginx's number for a client that left before the answer; a websocket ends in no other way.
    left = incoming.left and not incoming.finished and incoming.status != 101
    logger.info(
        "request=%s client=%s key=%s method=%s path=%s status=%s bytes=%d seconds=%.3f",
        incoming.request_id, incoming.client, incoming.key.name, incoming.method, incoming.raw_path.decode("latin-1"),
        499 if left else incoming.status, incoming.sent, seconds,
    )  # fmt: skip
