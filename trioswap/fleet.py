"""All swap groups together: every model of the configuration, found by name."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import AsyncIterator, Callable, Container, Iterable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, contextmanager
from functools import partial
from typing import Final

import attrs
import trio

from trioswap import lent
from trioswap.arrangement import Arrangement, costs_of, policy_of
from trioswap.config import Config, ModelConfig
from trioswap.config.changes import Changes
from trioswap.errors import ModelRemoved, NoBudget
from trioswap.footprints import Need, Wish
from trioswap.forecast import Forecast, forecast, in_the_way, plan_of
from trioswap.group import SwapGroup
from trioswap.journal import Entry
from trioswap.leftover import Leftover, Note, adopt, keep, not_noted
from trioswap.lifecycle import State
from trioswap.memory import FOREIGN_LOOK, Memory
from trioswap.messages import ModelView, Squeezed, WaitView
from trioswap.outlook import waiting
from trioswap.reads import Reads
from trioswap.residency import Holding
from trioswap.runs import Lease, Run, Supervise, wait_over

logger = logging.getLogger(__name__)

# Seconds; a heartbeat is rarer than that.
_PROGRESS_AGE: Final = 0.5


@attrs.frozen
class Loan:
    """Memory that is lent to a program that is not ours."""

    name: str
    holding: Holding
    """Bytes of each device."""
    age: float
    """Seconds since it was given."""


class Fleet:
    """The models of one configuration, each in the swap group of those it can collide with."""

    def __init__(
        self,
        config: Config,
        supervise: Supervise,
        memory: Memory | None = None,
    ) -> None:
        self.arrangement = Arrangement(config, supervise, memory)
        self.costs, self.groups = self.arrangement.costs, self.arrangement.groups
        self.memory = memory
        self.reads = Reads()
        self._supervise = supervise
        self._seen: dict[str, WaitView] = {}  # what `progress` saw last, and when
        self._seen_at = -math.inf
        self.closing = trio.Event()
        """`shutdown` has begun."""
        self._ended = trio.Event()
        self._watching: trio.CancelScope | None = None  # around the look at other programs, while there is one
        self._group_of = self.arrangement.home
        self._nursery: trio.Nursery | None = None

    def __repr__(self) -> str:
        """The groups as they stand."""
        return f"<Fleet {self.groups!r}>"

    async def run(
        self,
        left: Iterable[Leftover] = (),
        note: Note = not_noted,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Own every model server; return after `shutdown()` when all process trees are gone.

        What earlier daemons have *left* is in the books before `started`; what changes of it is told to *note*.
        """
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            for group in self.groups:
                await nursery.start(group.run)
            for leftover in left:
                await self._adopt(leftover, note, nursery)
            self._watch_others_in(nursery)
            task_status.started()
            await self.closing.wait()  # also while there is no model: a reload may bring some
        self._ended.set()

    async def _adopt(self, leftover: Leftover, note: Note, nursery: trio.Nursery) -> None:
        if leftover.model not in self._group_of and not self._add_unconfigured(leftover.model):
            logger.warning("model=%s is not configured any more, and its memory is not counted", leftover.model)
            return
        group = self._group_of[leftover.model]
        nursery.start_soon(keep, group, await adopt(group, leftover, self.memory, note))

    def _add_unconfigured(self, name: str) -> bool:
        """Have *name* in the books as one that a reload has removed and that has not ended; False: nobody counts it."""
        if self.memory is None or not self.groups:
            return False
        spec = ModelConfig(name, argv=(name,), proxy="http://127.0.0.1")  # it will not be started
        group = self._group_of[name] = self.groups[0]  # where memory counts there is only one
        self.costs[name] = costs_of(spec)
        self.memory.budget.footprints.add(name, Wish())
        group.add(spec, policy_of(self.arrangement.config, spec), self._supervise, self.costs[name])
        group.core.models[name].removed = True
        return True

    async def reload(self, config: Config, changes: Changes) -> None:
        """Have *config*, which differs in *changes*, in effect; returns when what can be live is.

        Servers that have to end drain and end afterwards.  One call at a time.

        Raises:
            ConfigError: files of models do not answer; nothing is changed.
            ShuttingDown: it is too late; nothing is changed.
        """
        assert self._nursery is not None, "run() owns the groups"
        prospect = None
        if self.memory is not None:
            prospect = await self.reads.call(partial(self.memory.prospect, config), "files of models")
        await self.arrangement.change(config, changes, prospect, self._nursery, self.closing)
        self._watch_others_in(self._nursery)

    def _watch_others_in(self, nursery: trio.Nursery) -> None:
        """Begin to, if somebody should and nobody does."""
        if self.memory is not None and self.memory.config.yield_to_others and self._watching is None:
            self._watching = trio.CancelScope()
            nursery.start_soon(self._watch_others, self.memory, self._watching)

    async def _watch_others(self, memory: Memory, scope: trio.CancelScope) -> None:
        """Tell the scheduler what programs that are not ours leave for models, until nobody wants to know.

        A look that breaks is logged, and the next one may be better: it is no reason to end the daemon.
        """

        def report(sizes: Holding) -> None:
            for group in self.groups:
                group.feed(Squeezed(sizes))

        def pids() -> list[int]:
            return [pid for group in self.groups for pid in group.pids()]

        with scope:
            while memory.config.yield_to_others:
                try:
                    await memory.watch_others(pids, report, lambda: _unseen(self.groups))
                except Exception:
                    logger.exception("cannot tell what other programs leave of the memory")
                    await trio.sleep(FOREIGN_LOOK)
        self._watching = None

    async def wait_ended(self) -> None:
        """Return when `run` has: after `shutdown()` every process tree is gone."""
        await self._ended.wait()

    def lease(self, model: str, weight: float | None = None, label: str = "") -> AbstractAsyncContextManager[Lease]:
        """Hold *model* up and serving for the length of the block; see `SwapGroup.lease`.

        Raises:
            ModelRemoved: since its name was found a reload has removed it.
        """
        if model not in self._group_of:
            raise ModelRemoved(model)
        return self._group_of[model].lease(model, weight, label)

    def passing(self, model: str) -> Lease | None:
        """The way to *model* for what must not count as use; None: it is not ready.  See `SwapGroup.passing`."""
        return self._group_of[model].passing(model) if model in self._group_of else None

    def pass_by(self, way: Lease) -> AbstractContextManager[None]:
        """Use *way*, which `passing` gave, for the length of the block; see `InFlight.passing`."""
        return self.arrangement.desk.inflight.passing(way.model, way.attempt)

    def state(self, model: str) -> State:
        """How far *model* is; one that was removed is stopped."""
        return self._group_of[model].core.models[model].state if model in self._group_of else State.STOPPED

    def is_open(self, model: str) -> bool:
        """Whether the next request for *model* need not wait: it is served at once, or it was removed."""
        if model not in self._group_of:
            return True
        found = self._group_of[model].core.models[model]
        return found.state is State.READY and found.has_room

    def is_failing(self, model: str) -> bool:
        """Whether *model* has just failed, so that who asks for it now is refused at once."""
        if model not in self._group_of:
            return True
        return self._group_of[model].core.models[model].circuit.is_open(trio.current_time())

    def progress(self, request: str) -> WaitView | None:
        """How the request of that label is doing; None: it does not wait.

        Many clients ask at the same time, and looking costs as much for one as for all: what
        is said may be half a second old.
        """
        now = trio.current_time()
        if request not in self._seen or now >= self._seen_at + _PROGRESS_AGE:
            self._seen_at, self._seen = now, {view.label: view for view in self.waiting()}
        return self._seen.get(request)

    def service_cost(self, model: str) -> float:
        """Seconds that *model* is expected to serve one request for."""
        return self.costs[model].service.value if model in self.costs else 0.0

    async def unload(self, models: Iterable[str]) -> None:
        """Drain (bounded) and stop *models*; return when they are gone.

        Raises:
            ModelStuck: a process could not be ended.
        """
        wanted, runs = frozenset(models), list[Run]()
        for group in list(self.groups):  # in one step: a model may go to another group, and must not be missed by both
            runs += group.begin_unload(tuple(sorted(wanted.intersection(group.models))))
        await wait_over(runs)

    def shutdown(self) -> None:
        """Take no new work, reject what waits, drain (bounded) and stop everything."""
        self.closing.set()
        if self._watching is not None:
            self._watching.cancel(reason="shutdown")
        for group in list(self.groups):
            group.shutdown()

    def hasten(self, why: str) -> None:
        """Cut everything that is being served."""
        for group in self.groups:
            group.hasten(why)

    @contextmanager
    def watch(self, listener: Callable[[], None]) -> Iterator[None]:
        """Inside the block, call *listener* at the end of each step in which a model may have changed.

        It must return at once and raise nothing: requests wait for it.
        """
        listeners = self.arrangement.desk.listeners
        listeners.append(listener)
        try:
            yield
        finally:
            listeners.remove(listener)

    def views(self) -> list[ModelView]:
        """Every model as it stands, sorted by name; also what stands for memory that is lent."""
        return sorted((view for group in self.groups for view in group.views()), key=lambda view: view.name)

    def waiting(self) -> list[WaitView]:
        """Every waiting request: its place, what it waits for, and an honest estimate."""
        return [view for group in self.groups for view in _waiting(group, trio.current_time())]

    def forecast(self, model: str) -> Forecast:
        """What would happen if one more request came for *model* now; nothing is changed."""
        core = self._group_of[model].core
        return forecast(model, core.models, core.residency, core.rules, trio.current_time())

    def need(self, model: str) -> Need | None:
        """What *model* needs of the memory; None where memory plays no part."""
        return None if self.memory is None else self.memory.budget.footprints.need(model)

    def loans(self) -> list[Loan]:
        """Memory that is lent to programs that are not ours, the oldest loan first."""
        now = trio.current_time()
        lent = [model for group in self.groups for model in group.core.models.values() if not model.policy.yields]
        loans = [Loan(model.name, model.holding, now - model.ready_at) for model in lent if model.serves]
        return sorted(loans, key=lambda loan: -loan.age)

    def journal(self) -> list[Entry]:
        """The last decisions, oldest first."""
        return sorted((entry for group in self.groups for entry in group.journal.entries), key=lambda entry: entry.at)

    @asynccontextmanager
    async def hold(self, name: str, wish: Wish) -> AsyncIterator[Holding]:
        """Lend memory to a program that is not ours, for the length of the block; see `lent.hold`.

        Raises:
            NoBudget: memory is not counted here.
        """
        if self.memory is None or not self.groups:  # without models nobody decides
            raise NoBudget
        async with lent.hold(self.groups[0], self.memory.budget, name, wish) as holding:
            yield holding


def _unseen(groups: Iterable[SwapGroup]) -> Holding:
    """What is reserved for programs of which we do not see the processes: in containers, or borrowers."""
    total = Counter[str]()
    for group in groups:
        for view in group.views():
            if group.models[view.name].port_owner == "any":
                total.update(view.holding)
    return total


def _waiting(group: SwapGroup, now: float) -> list[WaitView]:
    core = group.core
    views = waiting(core.models, plan_of(core.models, core.residency, core.rules, now), core.residency, now)
    # While all are at work and nobody is overdue the plan names nobody.
    unnamed = {view.model for view in views if not view.waits_for and core.models[view.model].is_claim}
    found = {name: in_the_way(name, core.models, core.residency, core.rules, now) for name in unnamed}
    return [
        attrs.evolve(
            view,
            waits_for=found.get(view.model, view.waits_for),
            weight=_weight(core.models[view.model].queue.lines, view.ticket),
            label=group.labels[view.ticket],
        )
        for view in views
    ]


def _weight(lines: Mapping[float, Container[int]], ticket: int) -> float:
    return next(weight for weight, line in lines.items() if ticket in line)
