"""Which models there are, and which of them run (surface reference 2.1, 2.2)."""

from __future__ import annotations

import shlex
from typing import Any

from trioswap.api import Services
from trioswap.asgi import Exchange
from trioswap.config import ModelConfig
from trioswap.lifecycle import OCCUPIED


async def list_models(exchange: Exchange, services: Services) -> None:
    """GET /v1/models: every listed model, sorted by id."""
    states = {view.name: view.state for view in services.fleet.views()}
    rows = [
        _row(model, services.started, loaded=states[name] in OCCUPIED)
        for name, model in sorted(services.config.models.items())
        if not model.unlisted
    ]
    await exchange.json(200, {"object": "list", "data": rows})


async def running(exchange: Exchange, services: Services) -> None:
    """GET /running: every model that is not stopped, what it serves and who waits for it.

    And where memory plays a part, what is reserved for it: bytes of each device.
    """
    rows = []
    for view in services.fleet.views():
        model = services.config.models.get(view.name)
        if model is None or (view.state not in OCCUPIED and not view.waiting):
            continue
        row = {
            "model": view.name,
            "state": view.state.value,
            "cmd": shlex.join(model.argv),
            "proxy": model.proxy,
            "ttl": model.ttl or 0,
            "name": model.display_name,
            "description": model.description,
            "serving": view.leases,
            "waiting": view.waiting,
        }
        memory = {} if services.fleet.memory is None else {"memory": dict(view.holding)}
        rows.append({**row, **memory})
    await exchange.json(200, {"running": rows})


async def health(exchange: Exchange, _: Services) -> None:
    """GET /health: the daemon answers."""
    await exchange.text(200, "OK")


def _row(model: ModelConfig, created: int, *, loaded: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"id": model.name, "object": "model", "created": created, "owned_by": "trioswap"}
    for key, text in (("name", model.display_name), ("description", model.description)):
        if text.strip():
            row[key] = text.strip()
    about: dict[str, Any] = {"type": "model"}
    if model.aliases:
        about["aliases"] = list(model.aliases)
    # The key is llama-swap's: user interfaces read it.
    return {**row, "meta": {"llamaswap": about}, "status": {"value": "loaded" if loaded else "unloaded"}}
