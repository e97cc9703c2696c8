"""The schedulers that are compared, by the names of the command line."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Final

import attrs

from trioswap.config import GroupConfig
from trioswap.config.mistakes import did_you_mean, quoted
from trioswap.errors import Misuse
from trioswap.footprints import RAM, Footprints, Wish
from trioswap.lifecycle import State
from trioswap.messages import (
    Arrived,
    BecameReady,
    Command,
    Ended,
    Event,
    Grant,
    Left,
    Policy,
    Rules,
    Start,
    Stop,
)
from trioswap.residency import Residency
from trioswap.residency.budget import Budget
from trioswap.residency.groups import Groups
from trioswap.scheduler import Scheduler
from trioswap.simulation.machine import Brain
from trioswap.simulation.workload import ModelSpec, Workload


@attrs.frozen
class Settings:
    """What is to be different about `lease`; meanings as in `messages`, None: as the workload says."""

    max_wait: float | None = None
    turn_lease: float | None = None
    linger: float | None = None
    parallel_loads: float | None = None


def lease(workload: Workload, settings: Settings) -> Brain:
    """The daemon's scheduler as it is by default."""
    changes = {key: value for key, value in attrs.asdict(settings).items() if value is not None}
    loads = changes.pop("parallel_loads", workload.parallel_loads)

    def policy(spec: ModelSpec) -> Policy:
        return attrs.evolve(workload.policies.get(spec.name, Policy()), parallel=spec.slots, **changes)

    policies = {spec.name: policy(spec) for spec in workload.models}
    return Scheduler(policies, residency(workload), rules=Rules(parallel_loads=loads))


def llama_swap(workload: Workload, _: Settings) -> Brain:
    """The same scheduler with `policy = "fifo"`: what llama-swap does at 0bdb372, without its limit of 10 requests."""
    policy = Policy(max_wait=math.inf, turn_lease=0.0, linger=0.0, parallel=math.inf)
    rules = Rules(parallel_loads=math.inf, by_arrival=True)
    return Scheduler({spec.name: policy for spec in workload.models}, residency(workload), rules=rules)


def residency(workload: Workload) -> Residency:
    """The workload's rule about living together, as the daemon knows it."""
    if workload.budget is None:
        return Groups([GroupConfig("(default)", tuple(spec.name for spec in workload.models))])
    footprints = Footprints((RAM,), {spec.name: Wish(declared=spec.memory) for spec in workload.models})
    return Budget({RAM: workload.budget}, footprints)


@attrs.define(eq=False)
class StrictFifo:
    """llama-swap before its commit 46cea36b: one lock, and strictly in the order of arrival.

    The request that causes a swap is served alone, under the lock; the next ones, also those
    for the loaded model, wait behind it.  Where several models fit, the one used longest ago goes.
    """

    workload: Workload
    wake_at: float = attrs.field(default=math.inf, init=False)
    _line: deque[tuple[int, str]] = attrs.field(factory=deque, init=False)
    """(ticket, model) in order of arrival."""
    _serving: dict[int, str] = attrs.field(factory=dict, init=False)
    """ticket -> model."""
    _states: dict[str, State] = attrs.field(init=False)
    _attempts: dict[str, int] = attrs.field(factory=dict, init=False)
    _used: dict[str, float] = attrs.field(factory=dict, init=False)
    """When its last request was over."""
    _numbers: Iterator[int] = attrs.field(factory=itertools.count, init=False)
    _fresh: str | None = attrs.field(default=None, init=False)
    """It is being loaded, for the head of the line."""
    _alone: int | None = attrs.field(default=None, init=False)
    """Who holds the lock."""

    @_states.default
    def _all_stopped(self) -> dict[str, State]:
        return {spec.name: State.STOPPED for spec in self.workload.models}

    def handle(self, event: Event, now: float) -> list[Command]:
        """Take what happened; return what must be done about it."""
        match event:
            case Arrived(ticket, model):
                self._line.append((ticket, model))
            case Left(ticket):
                self._used[self._serving.pop(ticket)] = now
                self._alone = None if self._alone == ticket else self._alone
            case BecameReady(model):
                self._states[model] = State.READY
            case Ended(model):
                self._states[model] = State.STOPPED
        return list(self._decide())

    def _decide(self) -> Iterator[Command]:
        while self._line and self._alone is None:
            ticket, model = self._line[0]
            if self._states[model] is not State.READY:
                yield from self._bring(model)
                return
            self._line.popleft()
            self._serving[ticket] = model
            if self._fresh == model:
                self._fresh, self._alone = None, ticket
            yield Grant(ticket, model, self._attempts[model])

    def _bring(self, model: str) -> Iterator[Command]:
        """The next thing to do so that *model* becomes ready."""
        if self._states[model] is not State.STOPPED:
            return
        resident = {name for name, state in self._states.items() if state is not State.STOPPED}
        if self.workload.fits(frozenset(resident | {model})):
            self._states[model], self._fresh = State.STARTING, model
            self._attempts[model] = next(self._numbers)
            yield Start(model, self._attempts[model])
        elif State.STOPPING not in self._states.values():
            ready = [name for name, state in self._states.items() if state is State.READY]
            victim = min(ready, key=lambda name: self._used[name])
            if victim not in self._serving.values():
                self._states[victim] = State.STOPPING
                yield Stop(victim, self._attempts[victim], f"makes room for {model}")


CONTENDERS: Final[Mapping[str, Callable[[Workload, Settings], Brain]]] = {
    "lease": lease,
    "llama-swap": llama_swap,
    "strict-fifo": lambda workload, _: StrictFifo(workload),
}


def chosen(names: str) -> list[str]:
    """The contenders that a list with commas names.

    Raises:
        Misuse: one of them is none.
    """
    wanted = list(dict.fromkeys(name.strip() for name in names.split(",")))
    for name in wanted:
        if name not in CONTENDERS:
            hint = did_you_mean(name, CONTENDERS)
            raise Misuse(f"--policy: found {quoted(name)}, allowed are {', '.join(CONTENDERS)}{hint}")
    return wanted
