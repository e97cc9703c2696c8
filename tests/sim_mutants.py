"""Bugs of the control plane, to see that the simulation notices: each is one small patch of what runs in it."""

from __future__ import annotations

import math
from collections.abc import Callable

import attrs
import pytest
import trio

from trioswap.books import Books
from trioswap.errors import UpstreamFailed
from trioswap.group import SwapGroup
from trioswap.inflight import InFlight
from trioswap.messages import CloseGate, Died, Drained, Left, Reject
from trioswap.proxy import _Relay
from trioswap.residency.budget import Budget
from trioswap.residency.groups import Groups
from trioswap.runs import News
from trioswap.scheduler import Scheduler

Patch = pytest.MonkeyPatch


def lease_dropped_early(patch: Patch) -> None:
    """The scheduler forgets a request as soon as it has granted it."""
    original = Scheduler._grant_all

    def grant_all(self, model):
        original(self, model)
        for ticket in list(model.leases):
            model.end_lease(ticket)
            del self._where[ticket]

    patch.setattr(Scheduler, "_grant_all", grant_all)


def tracker_forgets(patch: Patch) -> None:
    """A grant is not counted in the in-flight tracker."""
    patch.setattr(InFlight, "enter", lambda self, attempt, ticket, entry: None)


def lock_dropped(patch: Patch) -> None:
    """Swaps do not wait for one another."""
    original = SwapGroup._swap

    async def swap(self, command, victims):
        kept, self._lock = self._lock, trio.Lock()
        running = original(self, command, victims)
        try:
            await running
        finally:
            self._lock = kept

    patch.setattr(SwapGroup, "_swap", swap)


def stale_news_accepted(patch: Patch) -> None:
    """What is told of an attempt is not compared with the present one."""
    patch.setattr(Books, "_is_news", lambda self, model, attempt, *states: model.state in states)


def gate_left_open(patch: Patch) -> None:
    """A model that has to go is drained, and takes new requests meanwhile."""

    def close_gate(self, model, claim):
        if self._closed_for.get(model.attempt) != claim.name:
            self._closed_for[model.attempt] = claim.name
            self._out.append(CloseGate(model.name, model.attempt, f"for {claim.name}"))

    patch.setattr(Scheduler, "_closed_for", {}, raising=False)
    patch.setattr(Scheduler, "_close_gate", close_gate)


def token_given_back_early(patch: Patch) -> None:
    """The token goes when the server is told to end, not when it is gone."""
    original = SwapGroup._run_process

    async def run_process(self, process, run):
        async def give_back() -> None:
            try:
                await trio.sleep_forever()
            finally:
                run.token.release_on_behalf_of(run)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(give_back)
            try:
                return await original(self, process, run)
            finally:
                nursery.cancel_scope.cancel(reason="it has ended")
                with trio.CancelScope(shield=True):
                    await trio.lowlevel.checkpoint()
                run.token.acquire_on_behalf_of_nowait(run)

    patch.setattr(SwapGroup, "_run_process", run_process)


def leaver_stays_in_line(patch: Patch) -> None:
    """Whoever leaves while it waits is not taken out of the line."""
    original = Scheduler._left

    def left(self, ticket, *, served):
        model = self._where.get(ticket)
        if model is None or ticket in model.leases:
            original(self, ticket, served=served)

    patch.setattr(Scheduler, "_left", left)


def leaving_not_told(patch: Patch) -> None:
    """Whoever is cancelled is not reported to the scheduler."""
    original = SwapGroup.feed

    def feed(self, event):
        if not (isinstance(event, Left) and not event.served):
            original(self, event)

    patch.setattr(SwapGroup, "feed", feed)


def grants_after_shutdown(patch: Patch) -> None:
    """Requests that come during the shutdown are taken."""
    original = Scheduler._arrived

    def arrived(self, ticket, model, weight):
        closing, self._closing = self._closing, False
        try:
            original(self, ticket, model, weight)
        finally:
            self._closing = closing

    patch.setattr(Scheduler, "_arrived", arrived)


def waiter_forgotten(patch: Patch) -> None:
    """When a start fails, the last in the line is not told."""
    original = Books._reject_all

    def reject_all(self, model, error):
        before = len(self._out)
        original(self, model, error)
        rejected = [command for command in self._out[before:] if isinstance(command, Reject)]
        if len(rejected) > 1:
            self._out.remove(rejected[-1])

    patch.setattr(Books, "_reject_all", reject_all)


def retried_for_ever(patch: Patch) -> None:
    """A request is tried again as often as its server dies."""
    original = _Relay._attempt

    async def attempt(self, hand, *, last=False):
        while not await original(self, hand):
            pass
        return True

    patch.setattr(_Relay, "_attempt", attempt)


def retried_after_the_first_byte(patch: Patch) -> None:
    """A request is tried again though its client has begun to get the answer."""
    original = UpstreamFailed.__init__

    def init(self, model, why, *, before_first_byte=False):
        original(self, model, why, before_first_byte=True)

    patch.setattr(UpstreamFailed, "__init__", init)


def not_retried(patch: Patch) -> None:
    """Nobody is told that the server has died, so nothing is tried again."""

    def died(self, why=""):
        self.tell(self.run.spec.name, Died(self.run.spec.name, self.run.attempt, why))

    async def attempt(self, hand, *, last=False):
        return await original(self, hand, last=True)

    original = _Relay._attempt
    patch.setattr(News, "died", died)
    patch.setattr(_Relay, "_attempt", attempt)


def drained_too_early(patch: Patch) -> None:
    """A model is reported to have run dry when its gate closes."""

    async def drain(self, run, scope, why, unload):
        await trio.lowlevel.checkpoint()
        if self._gates.get(run.attempt) is scope:
            del self._gates[run.attempt]
            self.feed(Drained(run.spec.name, run.attempt))

    patch.setattr(SwapGroup, "_drain", drain)


def deadline_cuts_nobody(patch: Patch) -> None:
    """A drain deadline passes and every lease stays."""
    patch.setattr(InFlight, "cut", lambda self, attempt, why: 0)


def stuck_taken_for_gone(patch: Patch) -> None:
    """A process that survived SIGKILL is forgotten, and so is what it holds."""

    async def wait_in_quarantine(self, process, run):
        await trio.lowlevel.checkpoint()

    patch.setattr(SwapGroup, "_wait_in_quarantine", wait_in_quarantine)


def quarantine_holds_the_shutdown(patch: Patch) -> None:
    """At the shutdown a stuck process is waited for."""

    def shutdown(self):
        for run in self._runs.values():
            run.quarantine = trio.CancelScope()  # and that one is cancelled
        begin(self)

    begin = SwapGroup.shutdown
    patch.setattr(SwapGroup, "shutdown", shutdown)


def budget_not_asked(patch: Patch) -> None:
    """Whoever comes gets the memory it needs, whatever others hold."""
    original = Budget.place
    patch.setattr(Budget, "place", lambda self, target, resident: original(self, target, {}))


def rules_not_asked(patch: Patch) -> None:
    """Whoever comes may live beside anybody."""
    patch.setattr(Groups, "place", lambda self, target, resident: {})


def patience_is_rounded(patch: Patch) -> None:
    """Whether time is up is asked of a difference, which may be rounded to less than the sum that woke us."""
    original = _Relay._out_of_time

    def out_of_time(self):
        waited, manner = trio.current_time() - self.since, self.manner
        if self.granted is not None or (waited < manner.limit and (self.begun or waited < manner.patience)):
            return None
        return original(self)

    patch.setattr(_Relay, "_out_of_time", out_of_time)


def alarm_not_set(patch: Patch) -> None:
    """The scheduler is not woken when it wants to be."""
    original = SwapGroup.feed

    def feed(self, event):
        original(self, event)
        self._alarm.deadline = math.inf

    patch.setattr(SwapGroup, "feed", feed)


def hand_over_ignores_the_cut(patch: Patch) -> None:
    """A drain cuts nobody who has begun to answer: it is only counted that he left."""
    original = InFlight.cut

    def cut(self, attempt, why):
        entries = self._entries.pop(attempt, {})
        if attempt in self._idle:
            self._idle.pop(attempt).set()
        return len(entries) or original(self, attempt, why)

    patch.setattr(InFlight, "cut", cut)


def comments_for_all(patch: Patch) -> None:
    """Who waits gets comments, though it may not have asked for a stream."""
    original = _Relay._next_look

    def next_look(self):
        manner = attrs.evolve(self.manner, stream=True)
        self.how = lambda: manner
        return original(self)

    patch.setattr(_Relay, "_next_look", next_look)


MUTANTS: list[Callable[[Patch], None]] = [
    lease_dropped_early,
    tracker_forgets,
    lock_dropped,
    stale_news_accepted,
    gate_left_open,
    token_given_back_early,
    leaver_stays_in_line,
    leaving_not_told,
    grants_after_shutdown,
    waiter_forgotten,
    retried_for_ever,
    retried_after_the_first_byte,
    not_retried,
    drained_too_early,
    deadline_cuts_nobody,
    hand_over_ignores_the_cut,
    stuck_taken_for_gone,
    quarantine_holds_the_shutdown,
    budget_not_asked,
    rules_not_asked,
    patience_is_rounded,
    alarm_not_set,
    comments_for_all,
]
