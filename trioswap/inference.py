"""The routes behind which models are: who is meant, whether that is allowed, and on it goes."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from typing import Final
from urllib.parse import unquote

import attrs

from trioswap import asked, jsontext, proxy, sse
from trioswap.api import Services
from trioswap.asgi import Exchange
from trioswap.errors import Forbidden, ModelRemoved, NotLoaded, UnknownModel
from trioswap.incoming import Incoming
from trioswap.names import AtPeer, Here
from trioswap.request import Body, Call, preferred_wait, split_upstream
from trioswap.routing import Route
from trioswap.spool import Spool
from trioswap.tracker import Tracked
from trioswap.way import Held, Way

# Where `"stream": true` asks for a stream of events.
_STREAMING: Final = (
    "/v1/audio/transcriptions",
    "/v1/images/generations",
    "/v1/images/edits",
)
# The model behind llama-swap's ComfyUI pages (surface reference 1.9).
COMFYUI: Final = "comfyui_auto"


async def model_route(exchange: Exchange, services: Services) -> None:
    """A route whose request names the model; the answer is the model server's own."""
    with ExitStack() as stack:
        wants = await asked.read(exchange, services.config, stack.enter_context)
        row = stack.enter_context(services.tracker.track(exchange, exchange.path))
        path = _stripped(exchange.raw_path)

        def wish_of(services: Services, route: Route) -> Wish:
            match route.target:
                case Here(model, name):
                    spec = services.config.models[model]
                    rename = spec.use_model_name or (name if name != wants.name else None)
                    query, body = wants.renamed(rename, spec.filters, name)
                case AtPeer(peer, model, name):
                    query, body = wants.renamed(model, services.config.peers[peer].filters, name)
            stream = wants.stream
            if wants.kind is asked.Kind.JSON and isinstance(body, bytes) and body is not wants.body:
                stream = jsontext.outline(body).stream  # a filter may have asked for one, or for none
            return Wish(path + query, body, streams=stream and _can_stream(path))

        await forward(exchange, services, row, lambda _: wants.name, wish_of)


async def upstream_route(exchange: Exchange, services: Services) -> None:
    """Any method on /upstream/{model}/...: the rest of the path goes to the model server untouched."""
    name, remainder = split(exchange, services)
    if not remainder:
        await redirect(exchange, exchange.raw_path + b"/" + exchange.raw_query)
        return
    with ExitStack() as stack:
        body = await _upload(exchange, services, stack)
        row = stack.enter_context(services.tracker.track(exchange, unquote(remainder.decode("ascii", "replace"))))
        passing = "a request for a page's file" if _is_passing(services, remainder) else None
        wish = Wish(remainder + exchange.raw_query, body, passing=passing)
        await forward(exchange, services, row, lambda _: name, lambda *_: wish)


async def comfyui_route(exchange: Exchange, services: Services) -> None:
    """Any method on /comfyui/...: the model of that name, which only `/comfyui/` itself starts.

    Raises:
        NotLoaded: another page is asked for, and the model is not ready.
    """
    model = comfyui(services)
    with ExitStack() as stack:
        with services.routing.route(model, exchange.key):  # who may not is told so before anything else
            if exchange.rest and services.fleet.passing(model) is None:
                raise NotLoaded(model, "any page but /comfyui/")
        body = await _upload(exchange, services, stack)
        row = stack.enter_context(services.tracker.track(exchange, exchange.path))
        target = b"/" + exchange.rest + exchange.raw_query
        await forward(exchange, services, row, comfyui, lambda *_: Wish(target, body))


def comfyui(services: Services) -> str:
    """The name of that model.

    Raises:
        UnknownModel: there is none.
    """
    return services.routing.model(COMFYUI)


async def comfyui_root(exchange: Exchange, _: Services) -> None:
    """Any method on /comfyui: its pages are below."""
    await redirect(exchange, b"/comfyui/" + exchange.raw_query)


async def redirect(exchange: Exchange, location: bytes) -> None:
    """Say that it is elsewhere, for good; what is no GET keeps its method and its body."""
    permanent = 301 if exchange.method in ("GET", "HEAD") else 308
    await exchange.text(permanent, "", [(b"location", location)])


def split(exchange: Incoming, services: Services) -> tuple[str, bytes]:
    """The name in the path of /upstream/..., and what follows it."""
    routing = services.routing
    found = split_upstream(exchange.rest, routing.knows, routing.names.longest)
    if found is None:
        raise routing.unknown(exchange.name.partition("/")[0])
    return found


def _stripped(path: bytes) -> bytes:
    """The path as servers know it (surface reference 1.1)."""
    if path.startswith(b"/v/"):
        return path[2:]
    return path.removeprefix(b"/audioapi")


def _can_stream(path: bytes) -> bool:
    text = path.decode("ascii", "replace")
    return sse.dialect_of(text) is not sse.Dialect.PLAIN or text in _STREAMING


def _is_passing(services: Services, path: bytes) -> bool:
    """Whether the request is for a page's files, which never load a model and are no use of it (I12)."""
    text = unquote(path.decode("ascii", "replace"))
    return any(pattern.search(text) for pattern in services.config.ignore_paths)


async def _upload(exchange: Exchange, services: Services, stack: ExitStack) -> bytes | Spool:
    """The request body, on disk if it is large."""
    spool = stack.enter_context(Spool())
    async for data in exchange.pieces(services.config.max_upload):
        await spool.write(data)
    return spool if spool.in_memory is None else spool.in_memory


@attrs.frozen
class Wish:
    """What is asked of the server."""

    target: bytes
    body: bytes | Body
    streams: bool = False
    passing: str | None = None
    """See `Way`."""


@attrs.define(eq=False)
class Errand:
    """A request or websocket on its way to whom *name* leads, even if a reload changes that while it waits."""

    incoming: Incoming
    row: Tracked
    name: Callable[[Services], str]
    wish_of: Callable[[Services, Route], Wish]
    chosen: ExitStack
    """Gives back what the choice has reserved."""
    admission: ExitStack
    way: Way = attrs.field(init=False)
    wish: Wish = attrs.field(init=False)
    queue_timeout: float = attrs.field(init=False)
    """Seconds that it may wait for its model, as they were when it came."""

    def begin(self, services: Services, *, was_in: bool = False) -> None:
        """Find out where it goes, and let it in.

        Raises:
            UnknownModel, PinnedToNobody, Forbidden: it goes nowhere.
            TooManyRequests: it is one too many.
        """
        route = self.chosen.enter_context(services.routing.route(self.name(services), self.incoming.key))
        self.wish = self.wish_of(services, route)
        passing = None if was_in else self.wish.passing  # what only passes by has not waited
        self.way = Way(self.incoming, services, self.row, route, passing, was_in)
        self.admission.enter_context(self.way.admitted())
        if not was_in:
            self.queue_timeout = self.way.queue_timeout

    def _begin_anew(self, removed: ModelRemoved) -> None:
        services = self.way.services.now
        if services is self.way.services:  # nothing says who is in its place
            raise removed
        self.admission.close()
        self.chosen.close()
        key = services.keyring.find(self.incoming.headers)
        if key is None:
            raise removed
        self.incoming.key = key
        try:
            self.begin(services, was_in=True)
        except (UnknownModel, Forbidden):  # nobody is called so, or nobody whom this client may ask
            raise removed from None

    @asynccontextmanager
    async def source(self) -> AsyncIterator[Held]:
        """See `way.Source`."""
        async with AsyncExitStack() as stack:
            held: Held | None = None
            while held is None:
                try:
                    held = await stack.enter_async_context(self.way.source())
                except ModelRemoved as exc:  # by a reload that is newer than its way
                    self._begin_anew(exc)
            yield held

    def call(self) -> Call:
        """What the server that was found is asked."""
        return Call(self.incoming.method, self.wish.target, self.way.headers, self.wish.body)


@attrs.define(eq=False)
class _Request(Errand):
    """One whose client is kept informed, as is right for whom it leads to."""

    manner: proxy.Manner = attrs.field(init=False)

    def begin(self, services: Services, *, was_in: bool = False) -> None:
        """See `Errand`."""
        super().begin(services, was_in=was_in)
        self.manner = _manner(self)


async def forward(
    exchange: Exchange,
    services: Services,
    row: Tracked,
    name: Callable[[Services], str],
    wish_of: Callable[[Services, Route], Wish],
) -> None:
    """Answer *exchange* with what the server says to whom *name* leads, which is asked what *wish_of* says of it."""
    with ExitStack() as chosen, ExitStack() as admission:
        errand = _Request(exchange, row, name, wish_of, chosen, admission)
        errand.begin(services)
        await proxy.forward(exchange, row, errand.source, errand.call, lambda: errand.manner)


def _manner(errand: Errand) -> proxy.Manner:
    way, incoming, streams = errand.way, errand.incoming, errand.wish.streams
    config, dialect = way.services.config, sse.dialect_of(incoming.path)
    spec = config.models.get(way.model)
    wants_text = streams and spec is not None and spec.send_loading_state

    def progress() -> sse.Progress | None:
        view = way.services.fleet.progress(incoming.request_id)
        return None if view is None else sse.Progress.of(view)

    def text() -> sse.LoadingText:
        return sse.LoadingText(dialect, incoming.request_id, int(time.time()))

    return proxy.Manner(
        way.model,
        dialect,
        streams,
        progress,
        config.heartbeat,
        text if wants_text else None,
        preferred_wait(incoming.headers),
        errand.queue_timeout,
        errand.admission.close,  # whoever has its answer, and asks again, is not to meet itself
        None if way.peer is None else way.services.fleet.wait_ended,
    )
