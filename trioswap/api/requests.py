"""The requests to models that are under way, and ending one of them (surface reference 2.5, 2.7)."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final

import trio

from trioswap.access import CREDENTIALS
from trioswap.api import Services
from trioswap.asgi import Exchange
from trioswap.request import Headers
from trioswap.tracker import Tracked

# Fields whose values are nobody's business (surface reference 2.11, and the other ways to send a key: pages that
# speak OpenAI's realtime protocol have no other place for it than the protocols they offer).
_SECRET: Final = CREDENTIALS | {b"cookie", b"set-cookie", b"sec-websocket-protocol"}


async def show(exchange: Exchange, services: Services) -> None:
    """GET /api/inflight: the oldest first."""
    await exchange.json(200, {"requests": [row_of(row) for row in services.tracker.rows.values()]})


async def cancel(exchange: Exchange, services: Services) -> None:
    """POST /api/inflight/{id}/cancel: end it, wherever it is; the id is its number or its request id.

    Raises:
        NoSuchRequest: it is over, or never was.
    """
    services.tracker.cancel(exchange.name)
    await exchange.json(200, {"msg": "ok"})


def row_of(row: Tracked) -> dict[str, Any]:
    """One request as others may see it."""
    exchange = row.exchange
    document = {
        "id": str(row.number),
        "request": exchange.request_id,
        "timestamp": datetime.fromtimestamp(row.arrived, UTC).isoformat(timespec="microseconds"),
        "model": row.model,
        "req_path": row.path,
        "method": exchange.method,
        "req_headers": _shown(exchange.headers),
        "remote_ip": exchange.client or "",
        "key": exchange.key.name,
        "resp_headers": _shown(exchange.response_headers),
        "resp_bytes": exchange.sent,
        "elapsed_ms": round((trio.current_time() - row.since) * 1000),
    }
    return {**document, "metadata": dict(row.metadata)} if row.metadata else document


def _shown(headers: Headers) -> dict[str, str]:
    """The first value of each field, without secrets."""
    shown: dict[str, str] = {}
    for name, value in headers:
        text = "[REDACTED]" if name.lower() in _SECRET else value.decode("latin-1")
        shown.setdefault(name.decode("latin-1"), text)
    return shown
