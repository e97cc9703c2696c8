"""Profiles: which there are, and which is active (surface reference 2.4)."""

from __future__ import annotations

import json
from typing import Any, Final

from trioswap.api import Services
from trioswap.asgi import Exchange
from trioswap.errors import BadRequest

# Bytes; a name and its quotes.
_LIMIT: Final = 64 * 1024


async def show(exchange: Exchange, services: Services) -> None:
    """GET /api/profiles: all of them, sorted by id."""
    rows = [
        {
            "id": name,
            "description": profile.description,
            "pins": {pin: target or "" for pin, target in profile.pins.items()},
        }
        for name, profile in sorted(services.config.profiles.items())
    ]
    await exchange.json(200, {"active": services.routing.profile, "profiles": rows})


async def activate(exchange: Exchange, services: Services) -> None:
    """PUT /api/profiles/active: `{"name": "ID"}`, or null for none; requests that are here already go on as before.

    Raises:
        BadRequest: the body does not say that.
        BodyTooLarge: no name is that long.
        UnknownProfile: it is not configured.
    """
    body = b"".join([piece async for piece in exchange.pieces(_LIMIT, "of PUT /api/profiles/active")])
    services.routing.activate(_name(body))
    services.events.stir()
    await exchange.json(200, {"active": services.routing.profile})


def _name(body: bytes) -> str | None:
    try:
        document: Any = json.loads(body)
    except (ValueError, RecursionError) as exc:
        raise BadRequest(f"the body is not JSON: {exc}") from None
    if not isinstance(document, dict) or "name" not in document:
        raise BadRequest('the body must be a JSON object such as {"name": "coding"}, or {"name": null} for no profile')
    name = document["name"]
    if name is not None and not isinstance(name, str):
        raise BadRequest('"name" must be a string, or null for no profile')
    return name or None
