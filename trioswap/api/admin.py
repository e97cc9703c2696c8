"""Loading and unloading by hand (surface reference 2.3)."""

from __future__ import annotations

from trioswap.api import Services
from trioswap.asgi import Exchange
from trioswap.config.changes import Changes
from trioswap.errors import ConfigError, ConfigRejected, NothingToReload


async def unload_all(exchange: Exchange, services: Services) -> None:
    """POST /api/models/unload: drain and stop every model; answers when they are gone."""
    await exchange.while_connected(lambda: services.fleet.unload(services.config.models))
    await exchange.json(200, {"msg": "ok"})


async def unload_one(exchange: Exchange, services: Services) -> None:
    """POST /api/models/unload/{model}: the same for one model; one that is not running is no error."""
    name = services.routing.model(exchange.name)
    await exchange.while_connected(lambda: services.fleet.unload([name]))
    await exchange.text(200, "OK")


async def reload(exchange: Exchange, services: Services) -> None:
    """POST /api/reload: read the configuration again and take it over; answers what has changed once it is in effect.

    Servers that have to end for it may still be finishing what they serve.  A configuration with
    mistakes changes nothing, and the answer lists them.

    Raises:
        ConfigRejected: it has mistakes.
        NothingToReload: it comes from no file.
        ShuttingDown: it is too late.
    """
    reload = services.succession.reload
    if reload is None:
        raise NothingToReload
    changes = Changes()

    async def until_in_effect() -> None:
        nonlocal changes
        try:
            changes = await reload()
        except ConfigError as exc:
            raise ConfigRejected(exc.source, exc.mistakes) from None

    await exchange.while_connected(until_in_effect)
    await exchange.json(200, changes.document())


async def load(exchange: Exchange, services: Services) -> None:
    """POST /api/models/load/{model}: start a model as a request would; answers when it is ready."""
    name = services.routing.model(exchange.name)

    async def until_ready() -> None:
        async with services.fleet.lease(name, label=exchange.request_id):
            pass

    await exchange.while_connected(until_ready)
    await exchange.json(200, {"msg": "ok", "model": name})
