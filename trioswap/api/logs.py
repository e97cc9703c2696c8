"""The last lines of the daemon and of its children (surface reference 2.8)."""

from __future__ import annotations

from urllib.parse import unquote

from trioswap.api import Services
from trioswap.asgi import Exchange
from trioswap.errors import UnknownModel
from trioswap.logs import LogRing
from trioswap.request import Headers

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
    await _stream(exchange, services.logs.combined)


async def stream_one(exchange: Exchange, services: Services, rest: bytes) -> None:
    """GET /logs/stream/{proxy | upstream | MODEL}: one source, as it comes."""
    name = unquote(rest.decode("ascii", "replace"))
    await _stream(exchange, _ring(services, name))


def _ring(services: Services, name: str) -> LogRing:
    if ring := services.logs.find(name):
        return ring
    model = services.config.resolve(name)
    if model is None:
        raise UnknownModel(name, services.config.similar(name))
    return services.logs.of(model)


async def _stream(exchange: Exchange, ring: LogRing) -> None:
    """Send until the client leaves; one that reads slowly loses its own lines and nobody else's.

    With `?no-follow` only what is kept already.
    """
    if b"no-follow" in exchange.raw_query:
        await exchange.respond(200, "text/plain; charset=utf-8", ring.history())
        return
    with_history = b"no-history" not in exchange.raw_query

    async def send() -> None:
        with ring.follow(with_history=with_history) as chunks:
            await exchange.start(200, _PLAIN)
            async for chunk in chunks:
                await exchange.write(chunk)

    await exchange.while_connected(send)
