"""Operator endpoints, one module per family; `Services` is what they and the model routes work with."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import attrs

from trioswap.access import Keyring
from trioswap.config import Config
from trioswap.config.changes import Changes
from trioswap.cors import Cors
from trioswap.events import Events
from trioswap.fleet import Fleet
from trioswap.logs import Logs
from trioswap.quotas import Quotas
from trioswap.routing import Routing
from trioswap.selfcheck import SelfCheck
from trioswap.tracker import Tracker


@attrs.define(eq=False)
class Succession:
    """What a reload has put in the place of the first services, and how to ask for another."""

    newest: Services | None = None
    reload: Callable[[], Awaitable[Changes]] | None = None
    """See `reloading`; None: nobody reloads."""


@attrs.frozen
class Services:
    """Everything a handler may use, as the configuration says it that was in effect when the request came."""

    config: Config
    fleet: Fleet
    logs: Logs
    routing: Routing
    started: int
    """Unix seconds: when this daemon began, the `created` of every model."""
    keyring: Keyring = attrs.field()
    cors: Cors = attrs.field()
    quotas: Quotas = attrs.field()
    check: SelfCheck = attrs.field()
    tracker: Tracker = attrs.field(factory=Tracker)
    events: Events = attrs.field(factory=Events)
    succession: Succession = attrs.field(factory=Succession)

    @property
    def now(self) -> Services:
        """Those for what begins now."""
        return self.succession.newest or self

    def succeed(self, new: Services) -> None:
        """From now on *new* are those for what begins."""
        self.succession.newest = new

    @keyring.default
    def _make_keyring(self) -> Keyring:
        return Keyring.of(self.config)

    @cors.default
    def _make_cors(self) -> Cors:
        return Cors.of(self.config)

    @quotas.default
    def _make_quotas(self) -> Quotas:
        return Quotas(self.config)

    @check.default
    def _make_check(self) -> SelfCheck:
        return SelfCheck(self.fleet)
