"""The books of a scheduler: who waits, who is served, which models are claims, and which run.

Each entry keeps all of them true at once: a lease is counted in the step that grants it, a
ticket is known for exactly as long as it waits or is served, and the indexes say what the
models say.  When an entry is to be made is for `scheduler`, and what follows from it for `planning`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from trioswap import lifecycle
from trioswap.circuit import HEALTHY
from trioswap.errors import TrioswapError
from trioswap.lifecycle import OCCUPIED, State
from trioswap.messages import Cause, Command, Grant, Reject, Stop
from trioswap.turns import Model, Served, credit


class Books:
    """What one scheduler remembers; it alone makes entries."""

    def __init__(self, models: Iterable[Model]) -> None:
        self.models = {model.name: model for model in models}
        self.wake_at = math.inf
        """When `WokeUp` is wanted at the latest, in the time of `now`; inf: not at all."""
        self._where: dict[int, Model] = {}  # ticket -> model, for exactly the tickets in queues and leases
        self._claims: dict[str, Model] = {}
        self._occupied: dict[str, Model] = {}
        self._floor = 0.0  # credit of whoever was put out last
        self._now = 0.0
        self._stale = False  # something has happened since the last plan that may change it
        self._out: list[Command] = []

    def release(self, name: str) -> tuple[Model, list[int]]:
        """Give away a model, whatever it is doing, with the tickets that wait for it or are served by it."""
        model = self.models.pop(name)
        self._claims.pop(name, None)
        self._occupied.pop(name, None)
        tickets = [*model.queue, *model.leases]
        for ticket in tickets:
            del self._where[ticket]
        self._stale = True
        return model, tickets

    def adopt(self, model: Model, tickets: Iterable[int]) -> None:
        """Take a model over that was in other books; it goes on as if it had always been in these."""
        self.models[model.name] = model
        self._where.update(dict.fromkeys(tickets, model))
        self._classify(model)
        self._stale = True

    def begin_anew(self, models: Iterable[Model], wake_at: float) -> None:
        """Forget everything, and know *models* instead, for none of which anybody waits; `wake_at` is *wake_at*."""
        self.models = {model.name: model for model in models}
        for known in (self._where, self._claims, self._occupied, self._out):
            known.clear()
        for model in self.models.values():
            self.adopt(model, model.leases)
        self._floor, self.wake_at = 0.0, wake_at

    # ---- requests --------------------------------------------------------------------------

    def _grant_all(self, model: Model) -> None:
        """Count the leases in the very step that decides them: no window, no lost request."""
        while model.queue.count and model.has_room:
            ticket = model.queue.first(model.policy.max_wait)
            weight = model.queue.remove(ticket)
            model.begin_lease(ticket, Served(weight, self._now))
            model.credit = self._floor + credit(model)
            self._out.append(Grant(ticket, model.name, model.attempt))

    def _reject_all(self, model: Model, error: Callable[[], TrioswapError]) -> None:
        for ticket in model.queue:
            del self._where[ticket]
            model.queue.remove(ticket)
            self._out.append(Reject(ticket, error()))
        model.out_of_memory = False
        self._classify(model)

    def _note_idleness(self, model: Model) -> None:
        if model.serves and not model.has_work:
            model.idle_since = self._now
            model.out_of_work = True
            self.wake_at = min(self.wake_at, model.expires)

    # ---- runs ------------------------------------------------------------------------------

    def _is_news(self, model: Model, attempt: int, *states: State) -> bool:
        """Whether news of *attempt* concern the present run, in one of *states*."""
        return model.attempt == attempt and model.state in states

    def _stop(self, model: Model, reason: str, cause: Cause = Cause.OTHERS) -> None:
        self._begin_stop(model)
        self._out.append(Stop(model.name, model.attempt, reason, cause))

    def _begin_stop(self, model: Model) -> None:
        self._end_turn(model)
        self._move(model, lifecycle.Event.STOP)

    def _end_turn(self, model: Model) -> None:
        if model.state in (State.READY, State.DRAINING):
            if self._now - model.ready_at >= HEALTHY:
                model.circuit.close()
            model.out_at = self._now
            self._floor = max(self._floor, model.credit)
        for ticket in list(model.leases):
            model.end_lease(ticket)
            del self._where[ticket]

    def _move(self, model: Model, event: lifecycle.Event) -> None:
        model.move(event, self._now)
        self._stale = True
        self._classify(model)

    def _classify(self, model: Model) -> None:
        """Keep the indexes true."""
        for index, belongs in ((self._claims, model.is_claim), (self._occupied, model.state in OCCUPIED)):
            if belongs:
                index[model.name] = model
            else:
                index.pop(model.name, None)
