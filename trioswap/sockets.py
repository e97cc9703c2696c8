"""The websockets behind which models are: who is meant, whether that is allowed, and on it goes."""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from typing import Final
from urllib.parse import parse_qs, unquote

import attrs
import trio

from trioswap import asked
from trioswap.access import Scope
from trioswap.api import Services
from trioswap.asgi_websocket import Socket
from trioswap.config.parts import FilterConfig
from trioswap.errors import (
    BadRequest,
    LeaseCut,
    MissingModel,
    NotLoaded,
    QueueTimedOut,
    ShuttingDown,
    UnknownPath,
    UpstreamFailed,
)
from trioswap.inference import Errand, Wish, comfyui, split
from trioswap.names import AtPeer, Here
from trioswap.routing import Route
from trioswap.tunnel import relay
from trioswap.way import Held, Way
from trioswap.websocket import WebSocket, open_websocket

logger = logging.getLogger(__name__)

Handler = Callable[[Socket, Services], Awaitable[None]]


async def realtime_socket(socket: Socket, services: Services) -> None:
    """A route whose query names the model."""
    name = _named(socket.raw_query)

    def target_of(services: Services, route: Route) -> bytes:
        return socket.raw_path + _query(socket, services, route)

    await _connect(socket, services, lambda _: name, socket.path, target_of)


async def upstream_socket(socket: Socket, services: Services) -> None:
    """/upstream/{model}/...: the rest of the path goes to the model server untouched."""
    name, remainder = split(socket, services)
    path = remainder or b"/"
    shown = unquote(path.decode("ascii", "replace"))
    await _connect(socket, services, lambda _: name, shown, lambda *_: path + socket.raw_query)


async def comfyui_socket(socket: Socket, services: Services) -> None:
    """/comfyui/...: the pages of ComfyUI hold one each for as long as they are open."""
    target = b"/" + socket.rest + socket.raw_query
    await _connect(socket, services, comfyui, socket.path, lambda *_: target)


async def _connect(
    socket: Socket,
    services: Services,
    name: Callable[[Services], str],
    shown: str,
    target_of: Callable[[Services, Route], bytes],
) -> None:
    """On to the model called *name*; *shown* is the path as others see it, *target_of* makes that for the server."""

    def wish_of(services: Services, route: Route) -> Wish:
        return Wish(target_of(services, route), b"", passing="a websocket" if _is_ignored(services, route) else None)

    with services.tracker.track(socket, shown) as row, ExitStack() as chosen, ExitStack() as admission:
        errand = Errand(socket, row, name, wish_of, chosen, admission)
        errand.begin(services)
        if errand.way.passing is not None:
            chosen.close()  # it is not counted where selectors look for who has little to do (surface reference 1.8)
        await relay(socket, lambda: _open(errand, socket), _end_of(errand.way), _Closing(errand))


@asynccontextmanager
async def _open(errand: Errand, socket: Socket) -> AsyncIterator[WebSocket]:
    """A websocket to the server, once that may be asked, and the right to it.

    Raises:
        QueueTimedOut: it waited as long as it may.
        ShuttingDown: its right was taken away because we end.
        TrioswapError: what else the wait or the server ended it with.
    """
    waiting = trio.CancelScope()  # cancelled by its deadline alone
    try:
        with waiting:
            async with AsyncExitStack() as stack:
                yield await _reach(errand, socket, waiting, stack)
                return
    except LeaseCut:
        if errand.way.services.fleet.closing.is_set():
            raise ShuttingDown from None  # the model is not all that goes
        raise
    raise QueueTimedOut(errand.way.model, errand.queue_timeout, errand.way.retry_after())


async def _reach(errand: Errand, socket: Socket, waiting: trio.CancelScope, stack: AsyncExitStack) -> WebSocket:
    """Open a websocket, whose end is on *stack*; once more if the server died before it answered (invariant I14)."""
    waiting.deadline = trio.current_time() + errand.queue_timeout

    async def attempt(held: Held) -> WebSocket:
        waiting.deadline = math.inf
        way = errand.way
        headers = way.headers if way.peer is None else way.peer.passed_on(way.headers)
        url, target, offered = held.upstream.base_url, errand.wish.target, socket.subprotocols
        opening = open_websocket(way.model, url, target, headers, offered, timeouts=way.timeouts)
        websocket = await stack.enter_async_context(opening)
        held.answered(101)
        return websocket

    held = await stack.enter_async_context(errand.source())
    try:
        return await attempt(held)
    except UpstreamFailed as exc:
        if not exc.before_first_byte:
            raise
        if not await held.has_died():
            raise
    logger.info("retry on a fresh start model=%s", errand.way.model)
    await stack.aclose()
    return await attempt(await stack.enter_async_context(errand.source()))


def _named(query: bytes) -> str:
    """The model that *query*, with its question mark, names.

    Raises:
        BadRequest: it is not UTF-8.
        MissingModel: it names none.
    """
    try:
        fields = parse_qs(query[1:].decode("ascii"), keep_blank_values=True, errors="strict")
    except UnicodeDecodeError:
        raise BadRequest("the query is not UTF-8") from None
    [name, *_] = fields.get("model", [""])
    if not name:
        raise MissingModel
    return name


def _query(socket: Socket, services: Services, route: Route) -> bytes:
    """The query as the server is to see it: with the name by which it knows the model, as on model routes."""
    name = _named(socket.raw_query)
    match route.target:
        case Here(model, chosen):
            rename = services.config.models[model].use_model_name or (chosen if chosen != name else None)
        case AtPeer(_, model):
            rename = model
    wants = asked.Asked(asked.Kind.QUERY, name, stream=False, query=socket.raw_query, body=b"")
    return wants.renamed(rename, FilterConfig(), name)[0]


def _is_ignored(services: Services, route: Route) -> bool:
    """Whether websockets are no use of the model: `compat.ignore_websockets` (surface reference 1.9)."""
    return isinstance(route.target, Here) and services.config.models[route.target.model].ignore_websockets


def _end_of(way: Way) -> trio.Event | None:
    """What is set when the server ends under a websocket that holds no right to it.

    Raises:
        NotLoaded: there is no server.
    """
    if way.passing is None:
        return None
    held = way.services.fleet.passing(way.model)
    if held is None:
        raise NotLoaded(way.model, way.passing)
    return held.dead


@attrs.frozen
class _Closing:
    """The end of the daemon, for a websocket that holds no lease which would be cut then.

    What goes to a peer may go on as long as anything does.
    """

    errand: Errand

    async def wait(self) -> None:
        """Return when it has come, for who serves the websocket by now."""
        way = self.errand.way
        if way.peer is not None:
            await way.services.fleet.wait_ended()
        elif way.passing is not None:
            await way.services.fleet.closing.wait()
        else:
            await trio.sleep_forever()


@attrs.frozen
class SocketRoute:
    """One row of the table of websockets."""

    path: str
    """What ends in a slash begins all paths that it is about."""
    handler: Handler
    summary: str
    """One line for people."""
    scope: Scope = Scope.USE


SOCKETS: Final = (
    SocketRoute("/v1/realtime", realtime_socket, "The model in the query."),
    SocketRoute("/upstream/", upstream_socket, "Any websocket of a model's own server."),
    SocketRoute("/comfyui/", comfyui_socket, "The websocket of ComfyUI's pages."),
)


def find(raw_path: bytes) -> tuple[SocketRoute, bytes]:
    """The route of a websocket, and what follows its path.

    Raises:
        UnknownPath: there is none.
    """
    path = raw_path.decode("ascii", "replace")
    for route in SOCKETS:
        if path == route.path.rstrip("/") or (route.path.endswith("/") and path.startswith(route.path)):
            return route, raw_path[len(route.path) :]
    raise UnknownPath(path)
