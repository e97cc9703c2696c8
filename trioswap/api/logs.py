"""The last lines of the daemon and of its children (surface reference 2.8), and how much of our own there is."""

from __future__ import annotations

import json
import logging
from typing import Any, Final

import trio

from trioswap import logsetup
from trioswap.api import Services
from trioswap.asgi import Exchange
from trioswap.config.schema import LOG_LEVELS
from trioswap.errors import BadRequest
from trioswap.fleet import Fleet
from trioswap.logs import LogRing
from trioswap.request import Headers

logger = logging.getLogger(__name__)

# Bytes; a level and its quotes.
_LIMIT: Final = 1024

_PLAIN: Headers = [
    (b"content-type", b"text/plain; charset=utf-8"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-accel-buffering", b"no"),
    (b"cache-control", b"no-cache"),
]


async def history(exchange: Exchange, services: Services) -> None:
    """GET /logs: what is kept of everything."""
    await exchange.respond(200, "text/plain; charset=utf-8", services.logs.combined.history())


async def stream_all(exchange: Exchange, services: Services) -> None:
    """GET /logs/stream: everything, as it comes."""
    await _stream(exchange, services.fleet, services.logs.combined)


async def stream_one(exchange: Exchange, services: Services) -> None:
    """GET /logs/stream/{proxy | upstream | MODEL}: one source, as it comes."""
    await _stream(exchange, services.fleet, _ring(services, exchange.name))


def _ring(services: Services, name: str) -> LogRing:
    if ring := services.logs.find(name):
        return ring
    return services.logs.of(services.routing.model(name))


async def _stream(exchange: Exchange, fleet: Fleet, ring: LogRing) -> None:
    """Send until the client leaves or the daemon ends; who reads slowly loses its own lines and nobody else's.

    With `?no-follow` only what is kept already.
    """
    if "no-follow" in exchange.query_keys:
        await exchange.respond(200, "text/plain; charset=utf-8", ring.history())
        return
    with_history = "no-history" not in exchange.query_keys

    async def send() -> None:
        await exchange.start(200, _PLAIN)
        if exchange.method != "HEAD":
            await _follow(exchange, fleet, ring, with_history=with_history)
        await exchange.finish()

    await exchange.while_connected(send)


async def _follow(exchange: Exchange, fleet: Fleet, ring: LogRing, *, with_history: bool) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_end, fleet, nursery.cancel_scope)
        with ring.follow(with_history=with_history) as chunks:
            async for chunk in chunks:
                await exchange.write(chunk)


async def _end(fleet: Fleet, scope: trio.CancelScope) -> None:
    # A log is not told to its end by its source, and would hold the shutdown (I12).
    await fleet.wait_ended()
    scope.cancel(reason="the daemon ends")


async def show_level(exchange: Exchange, _: Services) -> None:
    """GET /api/log-level: what is logged at least."""
    await exchange.json(200, {"level": logsetup.level()})


async def change_level(exchange: Exchange, _: Services) -> None:
    """PUT /api/log-level: `{"level": "debug"}`; it holds at once, and until the daemon ends.

    Raises:
        BadRequest: the body does not say that.
        BodyTooLarge: no level is that long.
    """
    level = _level(b"".join([piece async for piece in exchange.pieces(_LIMIT, "of PUT /api/log-level")]))
    logger.info("log level %s, was %s", level, logsetup.level())
    logsetup.set_level(level)
    await exchange.json(200, {"level": level})


def _level(body: bytes) -> str:
    try:
        document: Any = json.loads(body)
    except (ValueError, RecursionError) as exc:
        raise BadRequest(f"the body is not JSON: {exc}") from None
    level = document.get("level") if isinstance(document, dict) else None
    if level not in LOG_LEVELS:
        allowed = ", ".join(LOG_LEVELS)
        raise BadRequest(f'the body must be a JSON object such as {{"level": "debug"}}; there are {allowed}')
    return str(level)
