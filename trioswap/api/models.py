"""Which models there are, and which of them run (surface reference 2.1, 2.2)."""

from __future__ import annotations

import shlex

import attrs

from trioswap import __version__
from trioswap.api import Services
from trioswap.asgi import Exchange
from trioswap.lifecycle import OCCUPIED
from trioswap.listing import Listing


async def list_models(exchange: Exchange, services: Services) -> None:
    """GET /v1/models: every listed model that the client may use, sorted by id."""
    await exchange.json(200, {"object": "list", "data": _listing(exchange, services).rows()})


async def one_model(exchange: Exchange, services: Services) -> None:
    """GET /v1/models/{model}: the same for one of them, listed or not.

    Raises:
        UnknownModel: there is none of that name.
    """
    row = _listing(exchange, services).row(exchange.name)
    if row is None:
        raise services.routing.unknown(exchange.name)
    await exchange.json(200, row)


def _listing(exchange: Exchange, services: Services) -> Listing:
    states = {view.name: view.state for view in services.fleet.views()}
    routing = services.routing
    return Listing(routing.names, routing.profile, states, exchange.key, services.started)


async def running(exchange: Exchange, services: Services) -> None:
    """GET /running: every model that is not stopped, what it serves and who waits for it.

    And where memory plays a part, what is reserved for it: bytes of each device.  Also those that
    are not tried again for a while, and why each failed that has not proved to work since.
    """
    rows = []
    for view in services.fleet.views():
        model = services.config.models.get(view.name)
        if model is None or not (view.state in OCCUPIED or view.waiting or view.retry_in):
            continue
        row = {
            "model": view.name,
            "state": view.state.value,
            "cmd": shlex.join(model.argv) if exchange.key.admin else "",  # it may hold secrets
            "proxy": model.proxy,
            "ttl": model.ttl or 0,
            "name": model.display_name,
            "description": model.description,
            "serving": view.leases,
            "waiting": view.waiting,
        }
        memory = {} if services.fleet.memory is None else {"memory": dict(view.holding)}
        failing = {"failure": view.failure, "retry_in": round(view.retry_in, 3)} if view.failure else {}
        rows.append({**row, **memory, **failing})
    await exchange.json(200, {"running": rows})


async def health(exchange: Exchange, _: Services) -> None:
    """GET /health: the daemon answers."""
    await exchange.text(200, "OK")


async def ready(exchange: Exchange, services: Services) -> None:
    """GET /health/ready: requests are served now, as far as the last look at ourselves can tell; cheap, too.

    Raises:
        NotReady: they are not; why is said in words that tell no names.
    """
    services.check.require_ready()
    await exchange.json(200, {"ready": True, "checked_ms_ago": services.check.checked_ms_ago})


async def selfcheck(exchange: Exchange, services: Services) -> None:
    """GET /api/selfcheck: what that look has found, with names."""
    check, memory = services.check, services.fleet.memory
    await exchange.json(
        200,
        {
            "ready": not check.not_ready,
            "reasons": list(check.not_ready),
            "checked_ms_ago": check.checked_ms_ago,
            "late": round(check.late, 3),
            "stuck": list(check.stuck),
            "held": [{**attrs.asdict(held), "seconds": round(held.seconds, 3)} for held in check.held],
            "given_up": check.given_up,
            "memory_late": memory is not None and memory.machine.late,
        },
    )


async def version(exchange: Exchange, _: Services) -> None:
    """GET /api/version: what this is.  There is no commit and no build, since nothing is built."""
    await exchange.json(200, {"version": __version__, "commit": "", "build_date": ""})


async def root(exchange: Exchange, _: Services) -> None:
    """GET /: who this is, for people."""
    await exchange.text(
        200, f"trioswap {__version__}\nGET /v1/models lists the models, GET /api/openapi.json all routes.\n"
    )
