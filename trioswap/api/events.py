"""What happens, as server-sent events (surface reference 2.6)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Final

import attrs
import trio

from trioswap.api import Services
from trioswap.api.requests import row_of
from trioswap.api.scheduling import waiting_row
from trioswap.asgi import Exchange
from trioswap.config import ModelConfig
from trioswap.fleet import Fleet
from trioswap.lifecycle import State
from trioswap.listing import abilities
from trioswap.logs import Logs
from trioswap.request import Headers
from trioswap.tracker import Tracked, Tracker

_HEADERS: Final[Headers] = [
    (b"content-type", b"text/event-stream"),
    (b"cache-control", b"no-cache"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-accel-buffering", b"no"),
]


async def events(exchange: Exchange, services: Services) -> None:
    """GET /api/events: all there is, then what changes, until the client leaves or the daemon ends.

    Each event is `{"type": TYPE, "data": "JSON as text"}`.  First come the log lines that
    are kept and everything as it stands; whoever comes again with `Last-Event-ID` gets that
    again, for it is all there is to know.  What was missed in between is not repeated.

    | type | data |
    |---|---|
    | `logData` | `{"source": "proxy" or "upstream", "data": TEXT}` |
    | `modelStatus` | every model, then those of peers, whenever one has changed |
    | `uiConfig` | which headers tell a session; only once |
    | `profileChanged` | `{"active": ID or null}` |
    | `inflight` | `{"operation": "snapshot", "requests": [ROW...]}` without the key when there are none, \
then `{"operation": "upsert", "request": ROW}` and `{"operation": "remove", "id": ID}` |
    | `queue` | ours: `{"waiting": [ROW...]}` as in /api/queue, twice a second while somebody waits |

    It looks and asks for nothing: no model is loaded, held or counted as used for it (I12).
    """

    async def send() -> None:
        await exchange.start(200, _HEADERS)
        if exchange.method != "HEAD":
            await _tell(exchange, services)
        await exchange.finish()

    await exchange.while_connected(send)


async def _tell(exchange: Exchange, services: Services) -> None:
    daemon = _Daemon(services)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_end, services.fleet, nursery.cancel_scope)
        await services.events.stream(daemon, exchange.write)
    await exchange.write(services.events.last_words(daemon))


async def _end(fleet: Fleet, scope: trio.CancelScope) -> None:
    # Nothing else would end it, and it would hold the shutdown.
    await fleet.wait_ended()
    scope.cancel(reason="the daemon ends")


@attrs.frozen
class _Daemon:
    """What is looked at, and how it is told; whoever listens hears of reloads as well."""

    first: Services

    @property
    def services(self) -> Services:
        return self.first.now

    @property
    def tracker(self) -> Tracker:
        return self.services.tracker

    @property
    def logs(self) -> Logs:
        return self.services.logs

    def watch(self, listener: Callable[[], None]) -> AbstractContextManager[None]:
        return self.services.fleet.watch(listener)

    def models(self) -> list[dict[str, Any]]:
        """Ours, sorted by id, then those of peers, of which nothing is known but the name."""
        fleet, config = self.services.fleet, self.services.config
        ours = [_of_model(model, fleet.state(name)) for name, model in sorted(config.models.items())]
        theirs = self.services.routing.names.peers.qualified
        return [*ours, *(_row_of_model(name, peer=peer) for name, (peer, _) in theirs.items())]

    def profile(self) -> str | None:
        return self.services.routing.profile

    def waiting(self) -> list[dict[str, Any]]:
        return [waiting_row(view) for view in self.services.fleet.waiting()]

    def row(self, request: Tracked) -> dict[str, Any]:
        return row_of(request)

    def interface(self) -> dict[str, Any]:
        return {"activity": {"session_id": list(self.services.config.ui.session_headers)}}


def _of_model(model: ModelConfig, state: State) -> dict[str, Any]:
    """A model of ours.

    llama-swap's user interfaces know `stopped`, `starting`, `ready` and `stopping`.  A model
    that drains is `stopping` to them: it takes nothing new and will most likely end.  Who
    knows us finds `"draining": true` beside that.
    """
    row = _row_of_model(model.name, model.display_name, model.description, state.value, unlisted=model.unlisted)
    if state is State.DRAINING:
        row |= {"state": State.STOPPING.value, "draining": True}
    if model.aliases:
        row["aliases"] = list(model.aliases)
    about = abilities(model.capabilities)
    return row | {key: about[key] for key in ("capabilities", "context_length") if key in about}


def _row_of_model(
    name: str, display_name: str = "", description: str = "", state: str = "", *, unlisted: bool = False, peer: str = ""
) -> dict[str, Any]:
    return {
        "id": name,
        "name": display_name,
        "description": description,
        "state": state,
        "unlisted": unlisted,
        "peerID": peer,
    }
