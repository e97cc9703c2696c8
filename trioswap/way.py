"""The way of one request or websocket to the server that serves it, once that is known."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AbstractContextManager, ExitStack, asynccontextmanager, nullcontext
from typing import Protocol

import attrs
import trio

from trioswap.access import without_credentials
from trioswap.api import Services
from trioswap.config.parts import TimeoutConfig
from trioswap.errors import NotLoaded
from trioswap.incoming import Incoming
from trioswap.names import AtPeer, Here
from trioswap.origin import Origin
from trioswap.remote import Peer
from trioswap.request import Headers, forwarded, without_forwarded
from trioswap.routing import Route
from trioswap.tracker import Tracked


class Held(Protocol):
    """What a request may use while it is served: a lease, or the way to a peer."""

    @property
    def upstream(self) -> Origin:
        """Who answers."""

    @property
    def dead(self) -> trio.Event:
        """Set when the server is known to have ended."""

    def answered(self, status: int) -> None:
        """The head of the server's answer has come; to be told before the right is given back."""

    async def has_died(self) -> bool:
        """Whether the server, which has broken a connection, is dead; waits for as long as it looks like that."""


Source = Callable[[], AbstractAsyncContextManager[Held]]
"""Waits until the request may be served; called again for a retry."""


@attrs.frozen
class Way:
    """Who asks, and where that goes."""

    incoming: Incoming
    services: Services
    row: Tracked
    """Of the request among those under way; what becomes known is noted there."""
    route: Route
    passing: str | None = None
    """What passes by without a right to its model, in a few words; None: it is a use of it (invariant I12)."""
    was_in: bool = False
    """It has waited for another model until now, which was removed: it is not refused for being one too many."""

    def __attrs_post_init__(self) -> None:
        self.row.model = self.model
        if self.route.selector is not None:
            self.row.metadata["selector"] = self.route.selector

    @property
    def model(self) -> str:
        """The model of ours, or the name of the one at a peer."""
        match self.route.target:
            case Here(model):
                return model
            case AtPeer(_, _, name):
                return name

    @property
    def peer(self) -> Peer | None:
        """Where it goes, if that is a peer."""
        target = self.route.target
        return self.services.routing.peers[target.peer] if isinstance(target, AtPeer) else None

    @property
    def timeouts(self) -> TimeoutConfig:
        """Of the steps of the request."""
        return self.services.config.models[self.model].timeouts if self.peer is None else self.peer.config.timeouts

    @property
    def queue_timeout(self) -> float:
        """Seconds that it may wait for its model; a peer does its own waiting."""
        limit = self.services.config.models[self.model].queue_timeout if self.peer is None else None
        return math.inf if limit is None else limit

    @property
    def headers(self) -> Headers:
        """What the server sees of the client's headers.

        Credentials are for us where we ask for any.  Who asks us is not the business of peers.
        """
        incoming, headers = self.incoming, self.incoming.headers
        if self.services.keyring.asked:
            headers = without_credentials(headers)
        if self.peer is not None:
            return without_forwarded(headers)
        return forwarded(headers, incoming.peer, incoming.scheme, trusted=incoming.behind_proxy)

    def admitted(self) -> AbstractContextManager[None]:
        """The block is one of the requests that are let in.

        Raises:
            TooManyRequests: there are as many as may be.
        """
        if self.passing is not None:
            return nullcontext()
        return self.services.quotas.admit(self.model, self.incoming.key, self.retry_after, was_in=self.was_in)

    def retry_after(self) -> int:
        """Seconds until one of those who are served now is done, as far as can be told."""
        return 1 if self.peer is not None else max(1, math.ceil(self.services.fleet.service_cost(self.model)))

    @property
    def source(self) -> Source:
        """What waits until the server may be asked, and holds the right to that."""
        if self.peer is not None:
            return self._ask_peer
        return self._lease if self.passing is None else self._pass

    @asynccontextmanager
    async def _lease(self) -> AsyncIterator[Held]:
        fleet, incoming = self.services.fleet, self.incoming
        with ExitStack() as waiting:
            if not self.row.let_in and not fleet.is_open(self.model):
                waiting.enter_context(self.services.quotas.queue(self.retry_after, was_in=self.was_in))
            async with fleet.lease(self.model, incoming.key.weight, incoming.request_id) as held:
                waiting.close()
                self.row.let_in = True
                yield held

    @asynccontextmanager
    async def _pass(self) -> AsyncIterator[Held]:
        held = self.services.fleet.passing(self.model)
        if held is None:
            raise NotLoaded(self.model, self.passing or "this")
        with self.services.fleet.pass_by(held):
            yield held

    @asynccontextmanager
    async def _ask_peer(self) -> AsyncIterator[Held]:
        assert self.peer is not None
        yield _AtPeer(self.peer)


@attrs.frozen
class _AtPeer:
    """What a request to a peer may use; the peer does its own waiting."""

    upstream: Peer
    dead: trio.Event = attrs.field(factory=trio.Event)  # nobody tells us of its end

    def answered(self, status: int) -> None:
        pass

    async def has_died(self) -> bool:
        return False
