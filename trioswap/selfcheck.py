"""The daemon's look at itself: does the event loop turn, do the schedulers answer, is every wait within its bound?

What is found is never silent: it is logged with all that the scheduler knows, `/health/ready`
says so, and the systemd watchdog is not fed while it lasts.  And it is resolved: a decision
that was forgotten is made, and a request that no decision can help gets an error.

None of this should ever happen, so whatever is found here is a bug of ours, or a machine that
is overwhelmed.  Held by an endless stream is not found but told: without `drain_timeout` the
configuration bounds no such wait.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Sequence
from collections.abc import Set as AbstractSet
from functools import cache
from typing import Final

import attrs
import trio

from trioswap import memory, process
from trioswap.bounds import ALARM_GRACE, Limits, Waiter, bound_of, held_by, overdue_decisions, waiters
from trioswap.config import ModelConfig
from trioswap.errors import NotReady, WaitTooLong
from trioswap.fleet import Fleet
from trioswap.group import CUT_GRACE, SwapGroup
from trioswap.mending import name_of, snapshot, some
from trioswap.messages import Left, WokeUp
from trioswap.turns import Model

logger = logging.getLogger(__name__)

# Seconds between looks: a look at 20 models costs below 1 ms with 200 waiting requests (a plan is 0.1 ms of it) and
# 4 ms with 1,000, and whoever asks for readiness asks every 5 to 10 s.
LOOK: Final = 5.0
# Seconds by which the loop may be late.  Half a second on a busy machine is nothing; a second is felt by every stream.
LATE: Final = 1.0
# After so many bad looks in a row it is no accident, and after so many missing ones nobody looks any more.
PERSISTS: Final = 3
# Seconds between two lines about the same.
QUIET: Final = 60.0
# Seconds for a spawn on a slow disk and a last probe, beside `health_check_timeout`.
SPAWN: Final = 10.0


@attrs.frozen
class Held:
    """A request that waits for others which nothing bounds."""

    request: str
    model: str
    by: str
    """The oldest request in its way; empty: it has no name."""
    of: str
    """The model that serves it."""
    seconds: float
    """For which it has been held so far."""


@attrs.define(eq=False)
class _Wait:
    """What earlier looks saw of one waiting request."""

    counted: float = 0.0
    """Seconds that count toward the bound."""
    held: float = 0.0
    is_held: bool = False
    bound: float = 0.0
    """The largest that any look came to."""


@attrs.define(eq=False)
class _Seen:
    """What earlier looks saw of one group."""

    waits: dict[int, _Wait] = attrs.field(factory=dict)
    overdue: frozenset[str] = frozenset()
    """About whom there was something to decide."""
    thought: frozenset[str] = frozenset()
    """Those for whose sake the scheduler has been told to think again, and who have been overdue ever since."""
    faults: int = 0
    """How often its scheduler had broken."""
    logged: dict[str, float] = attrs.field(factory=dict)
    """What was logged, and when."""


class SelfCheck:
    """Looks every few seconds, and remembers what it saw."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.reasons: tuple[str, ...] = ("it has not looked at itself yet",)
        """Why the last look was not content, in words that tell no names; empty: all is well."""
        self.late = 0.0
        """Seconds by which the last look came late."""
        self.held: tuple[Held, ...] = ()
        self.stuck: tuple[str, ...] = ()
        """Models whose process could not be ended."""
        self.given_up = 0
        """Requests that were answered with an error because they waited beyond their bound."""
        self._checked_at = -math.inf
        self._late_looks = self._bad_looks = 0  # in a row
        self._seen: dict[SwapGroup, _Seen] = {}

    def __repr__(self) -> str:
        """What the last look said."""
        return f"<SelfCheck {'; '.join(self.reasons) or 'well'}>"

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Look every few seconds, for ever; `started` comes after the first look."""
        self.look()
        task_status.started()
        while True:
            due = trio.current_time() + LOOK
            await trio.sleep_until(due)
            self.look(max(0.0, trio.current_time() - due))

    # ---- what others ask ---------------------------------------------------------------------

    @property
    def checked_ms_ago(self) -> int | None:
        """Milliseconds since the last look; None: there was none."""
        ago = trio.current_time() - self._checked_at
        return round(ago * 1000) if ago < math.inf else None

    @property
    def is_alive(self) -> bool:
        """Whether a restart would be wrong: it looks, the loop turns and the schedulers answer, or nearly so."""
        return self._is_fresh and max(self._late_looks, self._bad_looks) < PERSISTS

    @property
    def not_ready(self) -> tuple[str, ...]:
        """Why requests should go elsewhere now, in words that tell no names; empty: they are served."""
        if self.fleet.closing.is_set():
            return ("it is shutting down",)
        if self._checked_at > -math.inf and not self._is_fresh:
            return (f"it has not looked at itself for more than {PERSISTS * LOOK:g} s",)
        return self.reasons

    def require_ready(self) -> None:
        """Return when requests are served.

        Raises:
            NotReady: they are not.
        """
        if self.not_ready:
            raise NotReady(self.not_ready, self.checked_ms_ago)

    @property
    def _is_fresh(self) -> bool:
        return trio.current_time() - self._checked_at <= PERSISTS * LOOK

    # ---- the look ----------------------------------------------------------------------------

    def look(self, late: float = 0.0) -> None:
        """Look at everything, once; *late* is by how many seconds this comes too late."""
        now, found = trio.current_time(), list[str]()
        passed = min(now - self._checked_at, LOOK)  # while the loop stood still nobody could be served
        self.late, self._checked_at = late, now
        self._late_looks = self._late_looks + 1 if late > LATE else 0
        if late > LATE:
            logger.warning("the event loop was late seconds=%.1f", late)
        if self._late_looks >= PERSISTS:
            found.append("the event loop is blocked again and again")
        held, stuck, bad = list[Held](), list[str](), False
        self._seen = {group: self._seen.get(group) or _Seen() for group in self.fleet.groups}
        for group, seen in self._seen.items():
            look = _Look(self, group, seen, now, late)
            look.take(passed)
            bad = bad or look.broken
            found += look.reasons
            held += look.held
            stuck += [model.name for model in group.core.models.values() if model.stuck]
        self._bad_looks = self._bad_looks + 1 if bad else 0
        self.reasons, self.held, self.stuck = tuple(dict.fromkeys(found)), tuple(held), tuple(stuck)


class _Look:
    """One look at one group."""

    def __init__(self, check: SelfCheck, group: SwapGroup, seen: _Seen, now: float, late: float) -> None:
        self.check, self.group, self.seen, self.now, self.late = check, group, seen, now, late
        self.core = group.core
        self.held: list[Held] = []
        self.broken = False
        """The scheduler does not answer, or not as it should."""
        self.too_long = False
        self.answered: set[int] = set()
        """Tickets that this look has given up; they leave the queue in the next step."""

    @property
    def reasons(self) -> list[str]:
        """What was found, for everybody."""
        words = ["the scheduler does not answer as it should"] if self.broken else []
        return words + (["a request waited longer than it ever should"] if self.too_long else [])

    def take(self, passed: float) -> None:
        """Look; *passed* seconds may be counted as waited since the last time."""
        if self.check.fleet.closing.is_set():  # nobody waits any more, and nothing is woken
            self.seen.waits.clear()
            return
        # Each by itself: what one cannot see another may.
        for step in (self._judge_alarm, self._judge_decisions, lambda: self._judge_waits(passed), self._judge_faults):
            self._try(step)

    def _try(self, step: Callable[[], None]) -> None:
        """A broken scheduler is what this is for, and no reason to end the daemon."""
        try:
            step()
        except Exception as exc:
            logger.debug("self-check: %r", exc, exc_info=True)
            self._found_broken(f"the scheduler raised {type(exc).__name__}", str(exc))

    def _judge_alarm(self) -> None:
        missed = self.now - self.core.wake_at
        if missed > ALARM_GRACE + self.late:
            self._found_broken("an alarm was missed", f"{missed:.1f} s ago")
        self.group.feed(WokeUp())

    def _judge_faults(self) -> None:
        """A scheduler that broke has begun anew, and its group has logged that; but it is not to be counted on now."""
        if self.group.faults > self.seen.faults:
            self.broken = True
        self.seen.faults = self.group.faults

    # ---- decisions ---------------------------------------------------------------------------

    def _judge_decisions(self) -> None:
        """Who is overdue twice in a row with nothing decided in between was forgotten: it is decided now.

        Where that does not help, those who wait for it are told.
        """
        overdue = overdue_decisions(self.core.models, self.core.residency, self.core.rules, self.now)
        again = overdue & self.seen.overdue
        for name in sorted(again & self.seen.thought):
            self._found_broken(f"nothing can be decided about {name}")
            for waiter in list(waiters({name: self.core.models[name]})):
                self._give_up(waiter.ticket, self.now - waiter.arrived)
        if forgotten := again - self.seen.thought:
            self._found_broken(f"nothing was decided about {', '.join(sorted(forgotten))}")
            self.group.think_again()
        self.seen.overdue, self.seen.thought = overdue, again

    # ---- waits -------------------------------------------------------------------------------

    def _judge_waits(self, passed: float) -> None:
        limits = {name: limits_of(spec) for name, spec in self.group.models.items()}
        alone = self.group.limiter.total_tokens == 1 and self.check.fleet.memory is None
        known, waits = self.seen.waits, dict[int, _Wait]()
        late = list[Waiter]()
        # Once for each line and weight, and not for each of thousands who wait.
        bounds = cache(lambda name, weight: bound_of(name, weight, self.core.models, limits, alone=alone, brief=LOOK))
        holders = {name: held_by(name, self.core.models, limits) for name in self.core.models}
        for waiter in waiters(self.core.models):
            wait = waits[waiter.ticket] = known.get(waiter.ticket, _Wait())
            wait.bound = max(wait.bound, bounds(waiter.model, waiter.weight).at(waiter.place))
            self._count(waiter, wait, holders[waiter.model], passed)
            if wait.counted > wait.bound and waiter.ticket not in self.answered:
                late.append(waiter)
        self.seen.waits = waits
        self._judge_books(waits.keys() - self.answered)
        if late:
            self._tell_late(late)

    def _judge_books(self, queued: AbstractSet[int]) -> None:
        """Who waits is in a queue, and who is in a queue waits."""
        unanswered = set(self.group.unanswered())
        if lost := unanswered - queued:
            self._found_broken("requests are in no queue:", self._names(sorted(lost)))
            for ticket in lost:
                self._give_up(ticket, 0.0)
        if ghosts := queued - unanswered:
            self._found_broken("nobody waits any more who is in a queue:", self._names(sorted(ghosts)))
            for ticket in ghosts:
                self.group.feed(Left(ticket, served=False))

    def _count(self, waiter: Waiter, wait: _Wait, holders: Sequence[Model], passed: float) -> None:
        """Count the seconds since the last look, unless the wait is held now or was then."""
        passed = min(passed, self.now - waiter.arrived)
        if wait.is_held or holders:
            wait.held += passed
        else:
            wait.counted += passed
        wait.is_held = bool(holders)
        if not holders:
            return
        by = _oldest(holders)
        held = Held(self._name(waiter.ticket), waiter.model, self._name(min(by.leases, default=0)), by.name, wait.held)
        self.held.append(held)
        drains = by.name != waiter.model  # that its own model is busy is no news
        if drains and wait.held > self.core.models[waiter.model].policy.max_wait:
            self._say_held(held)

    def _say_held(self, held: Held) -> None:
        if _may_say(self.seen, f"held by {held.of}", self.now):
            logger.warning(
                "a wait is held request=%s model=%s by=%s of=%s seconds=%.0f; drain_timeout can bound it",
                held.request, held.model, held.by, held.of, held.seconds,
            )  # fmt: skip

    def _tell_late(self, late: Sequence[Waiter]) -> None:
        names = self._names([waiter.ticket for waiter in late])
        waits = [self.seen.waits[waiter.ticket] for waiter in late]
        longest = max(waits, key=lambda wait: wait.counted - wait.bound)
        logger.error(
            "self-check: a wait passed its bound requests=%s counted=%.0f bound=%.0f %s",
            names, longest.counted, longest.bound, self.snapshot(),
        )  # fmt: skip
        for waiter in late:
            self._give_up(waiter.ticket, self.now - waiter.arrived)

    def _give_up(self, ticket: int, waited: float) -> None:
        """Answer the request; what it leaves in the queue goes with it."""
        self.too_long = True
        self.answered.add(ticket)
        self.check.given_up += 1
        self.group.give_up(ticket, WaitTooLong(waited))

    # ---- words -------------------------------------------------------------------------------

    def _found_broken(self, what: str, more: str = "") -> None:
        self.broken = True
        if _may_say(self.seen, what, self.now):
            logger.error("self-check: %s %s %s", what, more, self.snapshot())

    def _name(self, ticket: int) -> str:
        return name_of(ticket, self.group.labels)

    def _names(self, tickets: Collection[int]) -> str:
        return some([self._name(ticket) for ticket in tickets])

    def snapshot(self) -> str:
        """All that the scheduler knows, in one line."""
        return snapshot(self.core, self.group.labels, self.now)


def limits_of(spec: ModelConfig) -> Limits:
    """What the configuration, and the constants of who starts and stops servers, let one of them take."""
    stop = spec.unload_drain_timeout + 2 * CUT_GRACE + process.stop_limit(spec) + memory.STOP_WAIT
    drain = None if spec.drain_timeout is None else spec.drain_timeout + CUT_GRACE
    return Limits(process.load_limit(spec) + SPAWN, stop, drain)


def shutdown_limit(fleet: Fleet) -> float:
    """Seconds within which *fleet* has ended once `shutdown` was called: what its slowest server may take.

    All of them drain and stop at the same time.
    """
    specs = (spec for group in fleet.groups for spec in group.models.values())
    return max((limits_of(spec).stop for spec in specs), default=0.0)


def _oldest(holders: Sequence[Model]) -> Model:
    """Whose oldest request is the oldest."""
    return min(holders, key=lambda model: min((lease.since for lease in model.leases.values()), default=math.inf))


def _may_say(seen: _Seen, what: str, now: float) -> bool:
    """Whether *what* was not logged a moment ago."""
    seen.logged = {text: at for text, at in seen.logged.items() if now - at < QUIET}
    return seen.logged.setdefault(what, now) == now
