"""Loading and unloading by hand (surface reference 2.3)."""

from __future__ import annotations

from urllib.parse import unquote

from trioswap.api import Services
from trioswap.asgi import Exchange


async def unload_all(exchange: Exchange, services: Services) -> None:
    """POST /api/models/unload: drain and stop every model; answers when they are gone."""
    await exchange.while_connected(lambda: services.fleet.unload(services.config.models))
    await exchange.json(200, {"msg": "ok"})


async def unload_one(exchange: Exchange, services: Services, rest: bytes) -> None:
    """POST /api/models/unload/{model}: the same for one model; one that is not running is no error."""
    name = services.model(_name(rest))
    await exchange.while_connected(lambda: services.fleet.unload([name]))
    await exchange.text(200, "OK")


async def load(exchange: Exchange, services: Services, rest: bytes) -> None:
    """POST /api/models/load/{model}: start a model as a request would; answers when it is ready."""
    name = services.model(_name(rest))

    async def until_ready() -> None:
        async with services.fleet.lease(name, label=exchange.request_id):
            pass

    await exchange.while_connected(until_ready)
    await exchange.json(200, {"msg": "ok", "model": name})


def _name(rest: bytes) -> str:
    return unquote(rest.decode("ascii", "replace"))
