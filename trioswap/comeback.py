"""When models come back that others have put out: decided by what was seen of them, and by the scheduler's own plan.

A *default model* is one of `[hooks.on_idle]`.  It comes back when its server has ended and nobody has
asked for any other model of its domain for a while; requests for default models are no burst.

What could go round in circles is broken where it begins.  A model that was stopped for itself (by
hand, by its `ttl`, because other programs use its memory) stays away until it is asked for: who
stopped it would have to do it again and again.  Default models put out each other only for one that
has precedence.  And whoever has crashed, or could not be loaded, comes back no sooner than a burst
would have to be over, nor before the scheduler would try it for a request.

Pure: `returning` acts.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Final

import attrs

from trioswap.config import Config
from trioswap.forecast import plan_of
from trioswap.lifecycle import State
from trioswap.messages import Cause, Rules
from trioswap.residency import Residency
from trioswap.scheduler import Scheduler
from trioswap.turns import Model, Queue

# How fast the waiting of a load counts that nobody has asked for: anybody's request is due before it.
LIGHT: Final = 1e-9
# No group gives out so many tickets.
_TICKET: Final = 2**62


# ---- when ---------------------------------------------------------------------------------------


@attrs.frozen
class Seen:
    """One model at one instant."""

    name: str
    gone: bool = False
    """It has no server."""
    since: float = -math.inf
    """Since when it is as it is."""
    serves: bool = False
    """Requests are served by it."""
    waits: bool = False
    """Requests wait for it."""
    retry_at: float = -math.inf
    """When it may be tried again after it failed."""


@attrs.frozen
class Look:
    """What there is to do."""

    due: tuple[str, ...] = ()
    """Who is to come back now, the first ones first."""
    earliest: float = -math.inf
    """Nothing changes before this, whatever happens."""
    latest: float = math.inf
    """When to look again even if nothing happens."""


@attrs.define(eq=False)
class Defaults:
    """Which models come back, what is remembered of them, and since when the others have been quiet."""

    names: tuple[str, ...] = ()
    """Who comes back; the first ones have precedence."""
    after: float = math.inf
    """Seconds for which nobody must have asked for others."""
    since: float = -math.inf
    """When others may have been asked for last, if nobody has seen it."""
    away: set[str] = attrs.field(factory=set)
    """Models that stay away until they are asked for."""
    _asked: dict[str, float] = attrs.field(factory=dict)
    """Another model -> when it last had work."""
    _working: frozenset[str] = frozenset()
    """Those that have work now."""
    _refused: dict[str, float] = attrs.field(factory=dict)
    """A model that the scheduler did not even begin to load -> when that was."""

    def renew(self, names: tuple[str, ...], after: float, models: Container[str]) -> None:
        """Another configuration has come, with these *models*; what was seen of them is still known."""
        self.names, self.after = names, after
        self.away = {name for name in self.away if name in models}
        self._asked = {name: at for name, at in self._asked.items() if name in models}

    def worked(self, others: AbstractSet[str], now: float) -> None:
        """*others* are the models that have work from now on and are no default models."""
        if others != self._working:
            self._asked.update(dict.fromkeys(self._working - others, now))
            self._working = frozenset(others)

    def decided(self, model: str, what: str, cause: Cause, gone: Iterable[str]) -> None:
        """The scheduler has decided *what* about *model*, for *cause*; its domain has the *gone* default models."""
        if what == "start":
            self.away.discard(model)
        elif cause is not Cause.OTHERS:  # it ends, or will when it has drained
            self.away.add(model)
            if cause is Cause.OPERATOR:  # who wanted the room of the others back did not want it for these
                self.away.update(gone)

    def refused(self, name: str, now: float) -> None:
        """*name* was to come back, and the scheduler would not have it."""
        self._refused[name] = now

    def is_missing(self, name: str) -> bool:
        """Whether *name*, which has no server, is to come back some time."""
        return name in self.names and name not in self.away

    def look(self, domain: Collection[Seen], now: float) -> Look:
        """Who of *domain* comes back, or when to look again."""
        gone = {seen.name: seen for seen in domain if seen.gone and self.is_missing(seen.name)}
        if not gone:
            return Look()
        others = [seen for seen in domain if seen.name not in self.names]
        if any(seen.waits for seen in domain) or any(seen.serves for seen in others):
            return Look(earliest=now + self.after)
        quiet = max((self._asked.get(seen.name, self.since) for seen in others), default=self.since) + self.after
        ready = {name: max(quiet, self._ready_at(gone[name])) for name in self.names if name in gone}
        due = tuple(name for name, at in ready.items() if at <= now)
        if due:
            return Look(due)
        return Look(earliest=min(ready.values()), latest=min(ready.values()))

    def _ready_at(self, seen: Seen) -> float:
        return max(seen.retry_at, max(seen.since, self._refused.get(seen.name, -math.inf)) + self.after)


# ---- in whose place ------------------------------------------------------------------------------


@attrs.frozen
class Way:
    """How a model may be loaded for nobody."""

    at: float
    """When: now, later, or when something changes (inf)."""
    kept: tuple[str, ...] = ()
    """Models that must not go for it."""
    leased: tuple[str, ...] = ()
    """Those of them that the scheduler would take, although others would do."""


def way_back(name: str, defaults: Sequence[str], core: Scheduler, now: float) -> Way:
    """How *name*, which has no server, may be loaded at the expense of nobody but idle models.

    As many of the other *defaults* stay as possible, the first ones before the others, and those before
    it in any case.  Where there is a choice the scheduler may take one of them, because it was asked for
    longest ago; leased ones it does not.
    """
    others = [other for other in defaults if other != name and other in core.models]
    earlier = sum(defaults.index(other) < defaults.index(name) for other in others)
    at = math.inf
    for count in range(len(others), earlier - 1, -1):
        kept = tuple(others[:count])
        for leased in ((), tuple(other for other in kept if _is_open(core.models[other]))):
            models = {**core.models, **{other: _pinned(core.models[other]) for other in leased}}
            possible = room_at(name, models, core.residency, core.rules, kept, now)
            if possible <= now:
                return Way(now, kept, leased)
            at = min(at, possible)
    return Way(at)


def _is_open(model: Model) -> bool:
    return model.state is State.READY and model.has_room


def _pinned(model: Model) -> Model:
    """The same as if it were leased: nobody puts it out."""
    return attrs.evolve(model, policy=attrs.evolve(model.policy, yields=False))


def room_at(
    name: str, models: Mapping[str, Model], residency: Residency, rules: Rules, kept: Collection[str], now: float
) -> float:
    """When *name* may be loaded for nobody: now, later, or when something changes (inf).

    By the scheduler's own plan, in which it waits for nothing but the end of idle models, none of *kept*.
    """
    if sum(model.state is State.STARTING for model in models.values()) >= rules.parallel_loads:
        return math.inf
    queue = Queue()
    queue.add(_TICKET, now, LIGHT)
    asked = attrs.evolve(models[name], queue=queue)
    plan = plan_of({**models, name: asked}, residency, rules, now)
    victims = [victim for claim, victims in plan.swap if claim is asked for victim in victims]
    if not victims and all(claim is not asked for claim, _ in plan.start):
        return plan.wake_at if plan.wake_at > now else math.inf
    if any(victim.name in kept or victim.state is State.STARTING for victim in victims):  # a load may end in peace
        return math.inf
    return now


def in_order(config: Config) -> tuple[str, ...]:
    """Who comes back by *config*: in an order in which nobody puts out one before it, where groups have one.

    That is, members of exclusive groups first, and of these the persistent ones (core reference 1.11).
    """
    group_of = {member: group for group in config.groups for member in group.members}

    def rank(name: str) -> tuple[bool, bool]:
        group = group_of.get(name)
        return (True, True) if group is None else (not group.exclusive, not group.persistent)

    return tuple(sorted(config.hooks.idle_preload, key=rank))
