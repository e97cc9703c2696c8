"""Who is served when, and who is put out for whom: events in, commands out.

One scheduler decides for one swap domain: the models that can be in each other's way.
It does no I/O, reads no clock (`now` comes in, `wake_at` goes out) and does not log.

The policy of this version.  A ready model serves whatever comes for it, so work is
batched by model.  A model with waiters that is not resident is a *claim*; the claim that
has waited longest is next, and a model that was just put out starts to wait anew.  A
claim takes its turn as soon as nothing in its way is busy; once it has waited `max_wait`
the gates of what is in its way close: nothing new is sent there, what runs may finish.

One swap is under way at a time, in three phases:

    DRAIN   the gates of the victims are closed, their requests run out   (-> may be abandoned)
    CLEAR   the victims are being stopped                                 (-> no way back)
    START   the newcomer is loading                                       (-> stopped if nobody waits but others)

Identity.  Every start has an attempt number.  What comes back carries it, and what
belongs to another attempt than the present one changes nothing (invariant I2).
"""

from __future__ import annotations

import enum
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import attrs

from trioswap import lifecycle
from trioswap.errors import ModelStuck, ModelUnloaded, ShuttingDown, StartFailed, TrioswapError
from trioswap.lifecycle import OCCUPIED, State
from trioswap.messages import (
    AbandonSwap,
    Arrived,
    BecameReady,
    Cleared,
    Command,
    Died,
    Drain,
    Drained,
    Ended,
    Event,
    GotStuck,
    Grant,
    Left,
    ModelView,
    Policy,
    Reject,
    ShutdownBegan,
    Start,
    Stop,
    Swap,
    UnloadAsked,
    WokeUp,
)
from trioswap.residency import Residency

# ---- what it remembers ----------------------------------------------------------------------


@attrs.define(eq=False)
class _Model:
    name: str
    policy: Policy
    state: State = State.STOPPED
    attempt: int = 0
    """Of the present run, or of the last one; 0: never started."""
    waiting: dict[int, float] = attrs.field(factory=dict)
    """ticket -> when it arrived, in order of arrival.  Empty while READY: the gate is open."""
    leases: set[int] = attrs.field(factory=set)
    """Tickets being served.  Empty unless READY or DRAINING (invariant I1)."""
    idle_since: float = 0.0
    """When it last ran out of work; counts only while READY without leases."""
    out_at: float = -math.inf
    """When its last turn ended."""
    retiring: bool = False
    """Being unloaded: the gate does not open again in this run."""
    drained: bool = False
    """`Drained` has come in this DRAINING."""
    stuck: bool = False
    """Its process survived SIGKILL; only while STOPPING."""

    def move(self, event: lifecycle.Event) -> None:
        self.state = lifecycle.next_state(self.state, event)

    @property
    def is_claim(self) -> bool:
        return bool(self.waiting) and self.state in (State.STOPPED, State.STOPPING)

    @property
    def claim_start(self) -> float:
        """Since when its waiters are kept from it: the oldest came, or it was put out."""
        return max(next(iter(self.waiting.values())), self.out_at)

    @property
    def due(self) -> float:
        return self.claim_start + self.policy.max_wait

    @property
    def expires(self) -> float:
        """When its time to live is over; never while it works."""
        idle = self.state is State.READY and not self.leases
        return self.idle_since + self.policy.ttl if idle and self.policy.ttl is not None else math.inf


class _Phase(enum.Enum):
    DRAIN = enum.auto()
    CLEAR = enum.auto()
    START = enum.auto()


@attrs.define(eq=False)
class _Swap:
    target: _Model
    attempt: int
    victims: list[_Model]
    phase: _Phase


class Scheduler:
    """The decisions of one swap domain.  Not thread-safe, and needs not be: every call is one step."""

    def __init__(
        self, policies: Mapping[str, Policy], residency: Residency, attempts: Iterator[int] | None = None
    ) -> None:
        self._models = {name: _Model(name, policy) for name, policy in sorted(policies.items())}
        self._residency = residency
        self._attempts = attempts if attempts is not None else itertools.count(1)
        self._where: dict[int, _Model] = {}  # ticket -> model, for exactly the tickets in waiting and leases
        self._swap: _Swap | None = None
        self._closing = False
        self._now = 0.0
        self._out: list[Command] = []

    def __repr__(self) -> str:
        """Every model that is not plainly stopped."""
        busy = [
            f"{v.name} {v.state.value} {v.leases}+{v.waiting}" for v in self.views() if v.state in OCCUPIED or v.waiting
        ]
        return f"<Scheduler {', '.join(busy) or 'idle'}>"

    def views(self) -> list[ModelView]:
        """Every model as it stands, sorted by name."""
        return [ModelView(m.name, m.state, m.attempt, len(m.leases), len(m.waiting)) for m in self._models.values()]

    @property
    def wake_at(self) -> float:
        """When `WokeUp` is wanted at the latest, in the time of `now`; inf: not at all."""
        times = [model.expires for model in self._models.values()]
        if self._swap is None:
            times += [claim.due for claim in self._claims() if claim.due > self._now]
        return min(times, default=math.inf)

    def handle(self, event: Event, now: float) -> list[Command]:  # noqa: C901 - one case for each event
        """Take one event, return what must be done about it, in this order."""
        self._now = now
        match event:
            case Arrived(ticket, name):
                self._arrived(ticket, self._models[name])
            case Left(ticket):
                self._left(ticket)
            case Drained(name, attempt):
                self._drained(self._models[name], attempt)
            case Cleared(attempt):
                self._cleared(attempt)
            case BecameReady(name, attempt):
                self._ready(self._models[name], attempt)
            case Ended(name, attempt, failure):
                self._ended(self._models[name], attempt, failure)
            case Died(name, attempt):
                self._died(self._models[name], attempt)
            case GotStuck(name, attempt):
                self._got_stuck(self._models[name], attempt)
            case UnloadAsked(names):
                for name in names:
                    self._unload(self._models[name], partial(ModelUnloaded, name), "unloaded by an operator")
            case ShutdownBegan():
                self._shut_down()
            case WokeUp():
                pass
        self._plan()
        commands, self._out = self._out, []
        return commands

    # ---- requests --------------------------------------------------------------------------

    def _arrived(self, ticket: int, model: _Model) -> None:
        if self._closing:
            self._out.append(Reject(ticket, ShuttingDown()))
            return
        self._where[ticket] = model
        model.waiting[ticket] = self._now
        if model.state is State.READY:
            self._grant_all(model)

    def _left(self, ticket: int) -> None:
        model = self._where.pop(ticket, None)
        if model is None:  # rejected, or its model died: already forgotten
            return
        model.waiting.pop(ticket, None)
        if ticket in model.leases:
            model.leases.remove(ticket)
            model.idle_since = self._now

    def _grant_all(self, model: _Model) -> None:
        """Count the leases in the very step that decides them: no window, no lost request."""
        for ticket in model.waiting:
            model.leases.add(ticket)
            self._out.append(Grant(ticket, model.name, model.attempt))
        model.waiting.clear()

    def _reject_all(self, model: _Model, error: Callable[[], TrioswapError]) -> None:
        for ticket in model.waiting:
            del self._where[ticket]
            self._out.append(Reject(ticket, error()))
        model.waiting.clear()

    # ---- the life of a model server ----------------------------------------------------------

    def _ready(self, model: _Model, attempt: int) -> None:
        if model.attempt != attempt or model.state is not State.STARTING:
            return
        model.move(lifecycle.Event.READY)
        model.idle_since = self._now
        if self._swap is not None and self._swap.attempt == attempt:
            self._swap = None
        self._grant_all(model)

    def _drained(self, model: _Model, attempt: int) -> None:
        if model.attempt != attempt or model.state is not State.DRAINING:
            return
        model.drained = True
        if model.retiring:
            self._stop(model, "unloaded")
        self._clear_when_drained()

    def _ended(self, model: _Model, attempt: int, failure: StartFailed | None) -> None:
        if model.attempt != attempt or model.state is State.STOPPED:
            return
        if model.state in (State.READY, State.DRAINING):  # it died by itself
            model.out_at = self._now
        self._forget_leases(model)
        model.move(lifecycle.Event.EXIT)
        model.retiring = model.drained = model.stuck = False
        if self._swap is not None and self._swap.attempt == attempt:
            self._swap = None
            if failure is not None:
                self._reject_all(model, failure.again)
        self._clear_when_drained()

    def _died(self, model: _Model, attempt: int) -> None:
        """Its gate closes now: a request granted during the sweep would meet nobody."""
        if model.attempt == attempt and model.state in (State.READY, State.DRAINING):
            self._begin_stop(model)
            self._clear_when_drained()

    def _got_stuck(self, model: _Model, attempt: int) -> None:
        if model.attempt != attempt or model.state is State.STOPPED:
            return
        if model.state is not State.STOPPING:  # it ended by itself, and left something that does not
            self._begin_stop(model)
        model.stuck = True
        swap = self._swap
        if swap is not None and (model in swap.victims or model is swap.target):
            self._abandon(f"the process of {model.name} survived SIGKILL")

    def _stop(self, model: _Model, reason: str) -> None:
        self._begin_stop(model)
        self._out.append(Stop(model.name, model.attempt, reason))

    def _begin_stop(self, model: _Model) -> None:
        if model.state in (State.READY, State.DRAINING):
            model.out_at = self._now
        self._forget_leases(model)
        model.move(lifecycle.Event.STOP)

    def _forget_leases(self, model: _Model) -> None:
        for ticket in model.leases:
            del self._where[ticket]
        model.leases.clear()

    def _unload(self, model: _Model, error: Callable[[], TrioswapError], reason: str) -> None:
        self._reject_all(model, error)
        match model.state:
            case State.STARTING:
                self._stop(model, reason)
            case State.READY if not model.leases:
                self._stop(model, reason)
            case State.READY | State.DRAINING:
                if model.state is State.READY:
                    self._close_gate(model)
                model.retiring = True
                self._out.append(Drain(model.name, model.attempt, reason))

    def _shut_down(self) -> None:
        self._closing = True
        for model in self._models.values():
            self._unload(model, ShuttingDown, "trioswap is shutting down")
        if self._swap is not None and self._swap.phase is not _Phase.START:
            self._abandon("trioswap is shutting down")

    # ---- swaps -----------------------------------------------------------------------------

    def _plan(self) -> None:
        self._give_up_for_others()
        for model in self._models.values():
            if model.expires <= self._now:
                self._stop(model, f"idle for {self._now - model.idle_since:.0f} s (ttl)")
        while self._swap is None and not self._closing and self._next_swap():
            pass

    def _claims(self) -> list[_Model]:
        """Claims, the longest waiting first."""
        return sorted((m for m in self._models.values() if m.is_claim), key=lambda m: (m.claim_start, m.name))

    def _victims(self, target: _Model) -> list[_Model]:
        occupied = frozenset(m.name for m in self._models.values() if m.state in OCCUPIED and m is not target)
        return [self._models[name] for name in sorted(self._residency.victims(target.name, occupied))]

    def _next_swap(self) -> bool:
        """Begin the swap of the first claim that may have its turn now, or reject one that never can."""
        for claim in self._claims():
            victims = self._victims(claim)
            stuck = next((m for m in [claim, *victims] if m.stuck), None)
            if stuck is not None:
                self._reject_all(claim, partial(ModelStuck, claim.name, stuck.name))
                return True
            busy = any(victim.leases and not victim.retiring for victim in victims)
            if claim.state is State.STOPPED and (not busy or claim.due <= self._now):
                self._begin(claim, victims)
                return True
        return False

    def _begin(self, target: _Model, victims: list[_Model]) -> None:
        for victim in victims:
            if victim.state is State.READY:
                self._close_gate(victim)
        self._swap = _Swap(target, next(self._attempts), victims, _Phase.DRAIN)
        reason = f"for {target.name}, waited {self._now - target.claim_start:.1f} s"
        self._out.append(Swap(target.name, self._swap.attempt, tuple(v.name for v in victims), reason))
        self._clear_when_drained()

    def _close_gate(self, model: _Model) -> None:
        model.move(lifecycle.Event.CLOSE_GATE)
        model.drained = False

    def _clear_when_drained(self) -> None:
        """Stop the victims together, once the last has drained: until then all can stay."""
        swap = self._swap
        if swap is None or swap.phase is not _Phase.DRAIN:
            return
        left = [victim for victim in swap.victims if victim.state is State.DRAINING]
        if all(victim.drained for victim in left):
            swap.phase = _Phase.CLEAR
            for victim in left:
                self._stop(
                    victim, f"evicted for {swap.target.name}, waited {self._now - swap.target.claim_start:.1f} s"
                )

    def _cleared(self, attempt: int) -> None:
        swap = self._swap
        if swap is None or swap.attempt != attempt or swap.phase is not _Phase.CLEAR:
            return
        if not swap.target.waiting:
            self._swap = None
            return
        assert not self._victims(swap.target), "a newcomer starts only where it fits (invariant I4)"
        swap.phase = _Phase.START
        swap.target.move(lifecycle.Event.START)
        swap.target.attempt = attempt
        self._out.append(Start(swap.target.name, attempt))

    def _give_up_for_others(self) -> None:
        """Nobody waits for the newcomer any more: undo what can be undone (invariant I9)."""
        swap = self._swap
        if swap is None or swap.target.waiting:
            return
        if swap.phase is _Phase.DRAIN:
            self._abandon("nobody waits for it any more")
        elif swap.target.state is State.STARTING:
            wanted = next((claim for claim in self._claims() if swap.target in self._victims(claim)), None)
            if wanted is not None:
                self._stop(swap.target, f"nobody waits for it any more, but for {wanted.name}")

    def _abandon(self, reason: str) -> None:
        """Call the swap off; the victims that can still serve open their gates again."""
        swap, self._swap = self._swap, None
        assert swap is not None
        self._out.append(AbandonSwap(swap.attempt, reason))
        for victim in swap.victims:
            if victim.state is State.DRAINING and not victim.retiring:
                victim.move(lifecycle.Event.OPEN_GATE)
                self._grant_all(victim)
