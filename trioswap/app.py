"""The ASGI application: route table, request id, error boundary.

Nothing that happens to one request gets past this module (invariant I13).
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final, TypeVar
from urllib.parse import unquote

import attrs
import trio

from trioswap import proxy
from trioswap.access import admits, without_credentials
from trioswap.api import Services, admin, logs, models, scheduling
from trioswap.asgi import ClientLeft, Exchange, Message, Receive, Send
from trioswap.errors import InternalError, TrioswapError, Unauthorized, UnknownPath, WrongMethod
from trioswap.request import Call, check_framing, forwarded, model_in, split_upstream

logger = logging.getLogger(__name__)

Handler = Callable[[Exchange, Services], Awaitable[None]]
PrefixHandler = Callable[[Exchange, Services, bytes], Awaitable[None]]
H = TypeVar("H", Handler, PrefixHandler)


async def model_route(exchange: Exchange, services: Services) -> None:
    """A route whose JSON body names the model; the answer is the model server's own."""
    body = await exchange.body(services.config.max_request_body)
    model = services.model(model_in(body))
    await _forward(exchange, services, model, exchange.target, body)


async def upstream_route(exchange: Exchange, services: Services, rest: bytes) -> None:
    """Any method on /upstream/{model}/...: the rest of the path goes to the model server untouched."""
    found = split_upstream(rest, services.config.resolve, services.config.longest_name)
    if found is None:
        raise services.unknown(unquote(rest.decode("ascii", "replace")).partition("/")[0])
    model, remainder = found
    if not remainder:
        await _redirect(exchange, exchange.raw_path + b"/" + exchange.raw_query)
        return
    body = await exchange.body(services.config.max_request_body)
    await _forward(exchange, services, model, remainder + exchange.raw_query, body)


async def _forward(exchange: Exchange, services: Services, model: str, target: bytes, body: bytes) -> None:
    headers = without_credentials(exchange.headers) if services.config.api_keys else exchange.headers
    call = Call(exchange.method, target, forwarded(headers, exchange.client), body)
    lease = partial(services.fleet.lease, label=exchange.request_id)
    await proxy.forward(exchange, lease, model, call)


async def _redirect(exchange: Exchange, location: bytes) -> None:
    permanent = 301 if exchange.method in ("GET", "HEAD") else 308
    await exchange.text(permanent, "", [(b"location", location)])


MODEL_ROUTES: Final = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/messages",
    "/v1/responses",
)

# What is answered without a key, where keys are asked for.
OPEN: Final = ("/health",)

# path -> method -> handler.  HEAD is answered wherever GET is.
ROUTES: Final[dict[str, dict[str, Handler]]] = {
    **{path: {"POST": model_route} for path in MODEL_ROUTES},
    "/v1/models": {"GET": models.list_models},
    "/health": {"GET": models.health},
    "/running": {"GET": models.running},
    "/logs": {"GET": logs.history},
    "/logs/stream": {"GET": logs.stream_all},
    "/api/models/unload": {"POST": admin.unload_all},
    "/api/queue": {"GET": scheduling.queue},
    "/api/hold": {"POST": scheduling.hold},
}

# prefix -> method ("*": any) -> handler of what follows the prefix, escapes untouched.
PREFIXES: Final[dict[str, dict[str, PrefixHandler]]] = {
    "/logs/stream/": {"GET": logs.stream_one},
    "/api/models/unload/": {"POST": admin.unload_one},
    "/api/models/load/": {"POST": admin.load},
    "/api/queue/": {"GET": scheduling.queue_of_one},
    "/api/plan/": {"GET": scheduling.plan},
    "/upstream/": {"*": upstream_route},
}


def find_handler(method: str, raw_path: bytes) -> Handler:
    """The handler of a request.

    Raises:
        UnknownPath, WrongMethod: there is none.
    """
    path = raw_path.decode("ascii", "replace")
    if path in ROUTES:
        return _by_method(ROUTES[path], method, path)
    for prefix, methods in PREFIXES.items():
        if path.startswith(prefix) and len(path) > len(prefix):
            handler = _by_method(methods, method, path)
            rest = raw_path[len(prefix) :]
            return lambda exchange, services: handler(exchange, services, rest)
    raise UnknownPath(path)


def _by_method(methods: dict[str, H], method: str, path: str) -> H:
    handler = methods.get(method) or methods.get("*") or (methods.get("GET") if method == "HEAD" else None)
    if handler is None:
        raise WrongMethod(method, path, sorted({*methods, "HEAD"} if "GET" in methods else methods))
    return handler


@attrs.frozen
class App:
    """What the HTTP server calls for each request."""

    services: Services

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request, whatever happens while doing so."""
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})  # before the handshake: the client sees 403
            return
        exchange = Exchange(scope, f"req_{secrets.token_hex(8)}", receive, send)
        begun = trio.current_time()
        try:
            await self._answer(exchange)
        finally:
            _access_log(exchange, trio.current_time() - begun)

    async def _answer(self, exchange: Exchange) -> None:
        try:
            try:
                check_framing(exchange.headers)
                handler = find_handler(exchange.method, exchange.raw_path)
                self._check_key(exchange)
                await handler(exchange, self.services)
            except TrioswapError as exc:
                await _send_error(exchange, exc)
        except* ClientLeft:
            pass
        except* Exception:
            logger.exception("request failed request=%s path=%s", exchange.request_id, exchange.path)
            await _send_error(exchange, InternalError(exchange.request_id))

    def _check_key(self, exchange: Exchange) -> None:
        keys = self.services.config.api_keys
        if keys and exchange.path not in OPEN and not admits(keys, exchange.headers):
            raise Unauthorized


async def _send_error(exchange: Exchange, error: TrioswapError) -> None:
    """The error in the shape of the route; a response that has begun is broken off instead."""
    if exchange.status is not None or exchange.left:
        return
    anthropic = exchange.path.startswith("/v1/messages")
    await exchange.json(error.status, error.anthropic_body() if anthropic else error.openai_body(), error.headers())


def _access_log(exchange: Exchange, seconds: float) -> None:
    # 499 is nginx's number for a client that left before the answer.
    status = 499 if exchange.left and not exchange.finished else exchange.status
    logger.info(
        "request=%s client=%s method=%s path=%s status=%s bytes=%d seconds=%.3f",
        exchange.request_id, exchange.client, exchange.method, exchange.path, status, exchange.sent, seconds,
    )  # fmt: skip
