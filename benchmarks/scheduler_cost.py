"""What one decision of the scheduler costs: `Scheduler.handle`, in microseconds.  No daemon, no clock.

    grant       a request for a model that is ready and open: the same whatever the number of models and waiters
    decisions   whatever makes a new plan for everybody who waits, in different worlds:

    one at a time   all models in one group, one resident that is busy
    light           the same, but the resident's work has a quarter of the weight, so it may have to go earlier
    lingering       the same, but the resident is idle, and held because its history says so; its service and its
                    pauses are so short that this pays however many wait
    matrix          one of the first half of the models beside one of the second
    memory          needs of many sizes, 20 models resident, on one device or on either of two

Each decision is made REPEATS times, on copies of one state.  Other programs can only make it
slower, so the best time is judged, and the median is shown beside it.  The garbage
collector is off.

Run it with `nox -s bench`.  Exits with 1 when a promise is not kept.
"""

from __future__ import annotations

import copy
import gc
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import attrs

from trioswap.config import GroupConfig
from trioswap.config.matrix import read_matrix
from trioswap.config.mistakes import Mistakes
from trioswap.footprints import Footprints, Wish
from trioswap.learning import Costs
from trioswap.messages import Arrived, BecameReady, Command, Ended, Event, Grant, Left, Policy, Start, Swap, WokeUp
from trioswap.residency import Residency
from trioswap.residency.budget import Budget
from trioswap.residency.groups import Groups
from trioswap.residency.matrix import Matrix
from trioswap.scheduler import Scheduler

GRANT = 10.0  # microseconds, promised for every size
GRANT_MODELS, GRANT_WAITING = (2, 20, 200, 1000), (0, 200, 5000)
RESIDENT = 20  # models at the same time where memory decides
REPEATS = 15
BATCHES, BATCH = 30, 200
TICK = 1e-6  # seconds from one event to the next: nobody is overdue for 60 s
GAPS = 12  # as many as are remembered


# ---- a scheduler at work ---------------------------------------------------------------------


@attrs.define(eq=False)
class World:
    """A scheduler with time, tickets and a stopwatch."""

    core: Scheduler
    now: float = 0.0
    serving: dict[int, str] = attrs.field(factory=dict)
    """ticket -> model."""
    spare: str = ""
    """A model nobody has asked for."""
    took: dict[str, list[float]] = attrs.field(factory=dict)
    """What happened -> the microseconds that the decision took, time after time; the dearest if it happened twice."""
    _tickets: Iterator[int] = attrs.field(factory=lambda: itertools.count(1), init=False)

    def tell(self, event: Event) -> list[Command]:
        """Let it happen."""
        self.now += TICK
        commands = self.core.handle(event, self.now)
        self.serving |= {command.ticket: command.model for command in commands if isinstance(command, Grant)}
        return commands

    def decide(self, what: str, event: Event) -> list[Command]:
        """The same, with a stopwatch: first on copies of the scheduler, then in earnest."""
        rules = {id(self.core.residency): self.core.residency}  # they never change, so they need no copy
        times = []
        for _ in range(REPEATS):
            core = copy.deepcopy(self.core, dict(rules))
            begun = time.perf_counter()
            core.handle(event, self.now + TICK)
            times.append(1e6 * (time.perf_counter() - begun))
        self.took[what] = max(times, self.took.get(what, times), key=min)
        return self.tell(event)

    def arrival(self, model: str, weight: float | None = None) -> Arrived:
        """A request for *model* comes."""
        return Arrived(next(self._tickets), model, weight)

    def leaving(self) -> Left:
        """The oldest of the requests that are served is over."""
        ticket = next(iter(self.serving))
        del self.serving[ticket]
        return Left(ticket)


@attrs.frozen
class Rule:
    """How models may live together, and who begins."""

    residency: Callable[[Sequence[str]], Residency]
    """Of the names of all models."""
    resident: Callable[[Sequence[str]], Sequence[str]]
    """Of them, those that are resident."""


def world(
    rule: Rule,
    models: int,
    waiting: int,
    *,
    costs: Costs | None = None,
    parallel: float = 10,
) -> World:
    """The resident models serve one request each; *waiting* others are spread over the rest, but one."""
    names = [f"model{number:04}" for number in range(models)]
    residency, resident = rule.residency(names), rule.resident(names)
    policies = {name: Policy(parallel=parallel) for name in names}
    known = {name: copy.deepcopy(costs or Costs()) for name in names}
    budget = residency if isinstance(residency, Budget) else None
    made = World(Scheduler(policies, residency, costs=known, budget=budget))
    for name in resident:
        [start] = made.tell(made.arrival(name))
        assert isinstance(start, Start)
        made.tell(BecameReady(name, start.attempt))
    made.spare, *claims = [name for name in names if name not in resident]
    for claim in itertools.islice(itertools.cycle(claims or [names[-1]]), waiting):
        made.tell(made.arrival(claim))
    return made


# ---- rules -----------------------------------------------------------------------------------


def one_group(names: Sequence[str]) -> Residency:
    """One at a time."""
    return Groups([GroupConfig("(default)", tuple(names))])


def two_halves(names: Sequence[str]) -> Residency:
    """One of the first half beside one of the second."""
    half, mistakes = len(names) // 2, Mistakes()
    pairs = f"({' | '.join(names[:half])}) & ({' | '.join(names[half:])})"
    return Matrix(read_matrix({}, {}, {"pairs": pairs}, names, mistakes))


def memory(*devices: str) -> Callable[[Sequence[str]], Residency]:
    """Models of 1 to 10 GiB on *devices*, which the first 20 of them fill."""

    def budget(names: Sequence[str]) -> Residency:
        sizes = {name: (1 + number // 2 % 10) * 2**30 for number, name in enumerate(names)}
        room = sum(sizes[name] for name in names[:RESIDENT]) // len(devices)
        return Budget(dict.fromkeys(devices, room), Footprints(devices, {n: Wish(sizes[n]) for n in names}))

    return budget


GROUP = Rule(one_group, lambda names: names[:1])
MATRIX = Rule(two_halves, lambda names: [names[0], names[len(names) // 2]])
ONE_DEVICE = Rule(memory("gpu0"), lambda names: names[:RESIDENT])
TWO_DEVICES = Rule(memory("gpu0", "gpu1"), lambda names: names[:RESIDENT])


# ---- what happens there ----------------------------------------------------------------------


def busy(made: World) -> None:
    """Every kind of event around a swap, while those who are resident work."""
    made.decide("arrival, a new claim", made.arrival(made.spare))
    made.decide("arrival, a known claim", made.arrival(made.spare))
    swap: Swap | None = None
    while swap is None:
        commands = made.decide("last request of a model leaves", made.leaving())
        swap = next((command for command in commands if isinstance(command, Swap)), None)
    start: Start | None = None
    for eviction in swap.evictions:
        commands = made.decide("a victim has ended", Ended(eviction.model, eviction.attempt))
        start = next((command for command in commands if isinstance(command, Start)), start)
    assert start is not None
    made.decide("a load is ready", BecameReady(start.model, start.attempt))
    made.now = made.core.wake_at
    made.decide("timer, a claim is overdue", WokeUp())


def light(made: World) -> None:
    """The same, while the work of those who are resident has a quarter of the weight of those who wait."""
    for name in list(made.serving.values()):
        made.tell(made.arrival(name, weight=0.25))
        made.tell(made.leaving())
    busy(made)


def lingering(made: World) -> None:
    """The resident models have nothing to do, but stay."""
    while len(made.serving) > 1:
        made.tell(made.leaving())
    made.decide("last request leaves, the model stays", made.leaving())
    made.decide("arrival, a known claim", made.arrival(made.spare))
    made.now = made.core.wake_at
    commands = made.decide("timer, it stayed long enough", WokeUp())
    assert isinstance(commands[0], Swap)


def quick() -> Costs:
    """Those of a model that serves in no time and is soon asked again, but needs long to load."""
    costs = Costs()
    costs.load.add(10.0)
    costs.service.add(TICK)
    costs.gaps.extend(TICK * number for number in range(1, GAPS + 1))
    return costs


Scene = tuple[Callable[[int, int], World], Callable[[World], None]]
"""Makes a world of so many models and waiting requests; and what happens there."""

GROUPS: Mapping[str, Scene] = {
    "one at a time": (partial(world, GROUP), busy),
    "light": (partial(world, GROUP), light),
    "lingering": (partial(world, GROUP, costs=quick()), lingering),
}
MATRICES: Mapping[str, Scene] = {"matrix": (partial(world, MATRIX), busy)}
MEMORY: Mapping[str, Scene] = {
    "memory, one device": (partial(world, ONE_DEVICE), busy),
    "memory, one device, lingering": (partial(world, ONE_DEVICE, costs=quick()), lingering),
    "memory, two devices": (partial(world, TWO_DEVICES), busy),
    "memory, two devices, lingering": (partial(world, TWO_DEVICES, costs=quick()), lingering),
}
# Models, waiting requests, microseconds promised for a decision, where.
DECISIONS: Sequence[tuple[int, int, float, Mapping[str, Scene]]] = (
    (20, 200, 200.0, {**GROUPS, **MATRICES}),
    (50, 200, 1000.0, MEMORY),
    (1000, 5000, 5000.0, GROUPS),
)


# ---- grants ----------------------------------------------------------------------------------


def grant_times(models: int, waiting: int) -> list[float]:
    """Microseconds to grant a request to a model that is ready and open, the mean of each batch."""
    made = world(GROUP, models, waiting, parallel=math.inf)
    [name] = made.serving.values()
    times = []
    for _ in range(BATCHES):
        events = [made.arrival(name) for _ in range(BATCH)]
        begun = time.perf_counter()
        granted = [made.core.handle(event, made.now) for event in events]
        times.append(1e6 * (time.perf_counter() - begun) / BATCH)
        assert all(isinstance(command, Grant) for [command] in granted)
        for event in events:
            made.core.handle(Left(event.ticket), made.now)
    return times


# ---- the table -------------------------------------------------------------------------------


def line(what: str, times: Sequence[float], promise: float) -> bool:
    """Print it; return whether the promise is kept."""
    best = min(times)
    kept = best <= promise
    note = "" if kept else "   broken"
    print(f"  {what:40} {best:9.1f} {statistics.median(times):9.1f} {promise:9.0f}{note}")
    return kept


def heading(title: str) -> None:
    """Begin a part of the table."""
    print(f"{title:42} {'best':>9} {'median':>9} {'promise':>9}")


def main() -> int:
    """Measure, print, judge."""
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr] # each figure when it is there
    gc.disable()
    heading("a grant, microseconds")
    kept = [
        line(f"{models} models, {waiting} waiting", grant_times(models, waiting), GRANT)
        for models, waiting in itertools.product(GRANT_MODELS, GRANT_WAITING)
    ]
    for models, waiting, promise, scenes in DECISIONS:
        heading(f"a decision, {models} models, {waiting} waiting")
        for name, (make, happens) in scenes.items():
            made = make(models, waiting)
            happens(made)
            print(f"  {name}")
            kept += [line(f"  {what}", times, promise) for what, times in made.took.items()]
    return 0 if all(kept) else 1


if __name__ == "__main__":
    sys.exit(main())
