"""Loading and unloading by hand (surface reference 2.3)."""

from __future__ import annotations

from trioswap.api import Services
from trioswap.asgi import Exchange


async def unload_all(exchange: Exchange, services: Services) -> None:
    """POST /api/models/unload: drain and stop every model; answers when they are gone."""
    await exchange.while_connected(lambda: services.fleet.unload(services.config.models))
    await exchange.json(200, {"msg": "ok"})


async def unload_one(exchange: Exchange, services: Services) -> None:
    """POST /api/models/unload/{model}: the same for one model; one that is not running is no error."""
    name = services.routing.model(exchange.name)
    await exchange.while_connected(lambda: services.fleet.unload([name]))
    await exchange.text(200, "OK")


async def load(exchange: Exchange, services: Services) -> None:
    """POST /api/models/load/{model}: start a model as a request would; answers when it is ready."""
    name = services.routing.model(exchange.name)

    async def until_ready() -> None:
        async with services.fleet.lease(name, label=exchange.request_id):
            pass

    await exchange.while_connected(until_ready)
    await exchange.json(200, {"msg": "ok", "model": name})
