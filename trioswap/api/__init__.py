"""Operator endpoints, one module per family; `Services` is what they and the model routes work with."""

from __future__ import annotations

import attrs

from trioswap.access import Keyring
from trioswap.config import Config
from trioswap.cors import Cors
from trioswap.events import Events
from trioswap.fleet import Fleet
from trioswap.logs import Logs
from trioswap.quotas import Quotas
from trioswap.routing import Routing
from trioswap.selfcheck import SelfCheck
from trioswap.tracker import Tracker


@attrs.frozen
class Services:
    """Everything a handler may use."""

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
