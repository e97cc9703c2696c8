"""Which model is in which swap group, and by which rules: at the start, and when another configuration comes.

The models of a domain, which can be in each other's way, are in one swap group.  A new configuration
may make other domains.  What runs goes on: a model changes its group with its server, its waiters
and its leases, in one step in which everything else takes effect, too (`change`).  After that step

* who differs in what a server is started with drains and ends, and starts again when it is asked for;
* who is not configured any more drains, ends, and is forgotten;
* who may not live beside others any more drains and ends: those stay who have work, then the others by name.

All of these drains are bounded, as that of an unload.  Until they are over there is more resident
than the new rules allow, but nothing starts beside it that either the old or the new ones forbid.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Mapping

import attrs
import trio

from trioswap.config import Config, GroupConfig, ModelConfig
from trioswap.config.addresses import parse_proxy
from trioswap.config.changes import Changes
from trioswap.errors import ConfigError, ShuttingDown
from trioswap.group import SwapGroup
from trioswap.learning import LOAD, STOP, Average, Costs, command_id
from trioswap.lifecycle import OCCUPIED, State
from trioswap.memory import Memory, Prospect
from trioswap.messages import Policy, RetireAsked, Rules
from trioswap.residency import NOTHING, Holding, Offers, Residency
from trioswap.residency.both import Both
from trioswap.residency.budget import Budget
from trioswap.residency.groups import Groups
from trioswap.residency.leaving import Leaving, too_many
from trioswap.residency.matrix import Matrix
from trioswap.runs import Desk, Supervise
from trioswap.scheduler import Scheduler
from trioswap.turns import Model

logger = logging.getLogger(__name__)


def residency_of(config: Config, budget: Budget | None) -> Residency:
    """The rule about living together that *config* asks for; *budget* is what its memory comes to, if that counts."""
    rules = _written(config)
    if config.memory is None:
        return rules or Groups([])  # of no models, where there are only peers
    assert budget is not None, "memory is in play"
    return budget if rules is None else Both(rules, budget, frozenset(config.models))


def policy_of(config: Config, model: ModelConfig) -> Policy:
    """What the scheduler must know of *model*."""
    policy = Policy(
        model.max_wait,
        model.ttl,
        model.parallel,
        weight=model.weight,
        priority=model.priority,
        turn_lease=model.turn_lease,
        linger=model.linger,
        backoff=model.backoff,
        backoff_max=model.backoff_max,
    )
    if config.policy == "fifo":
        return attrs.evolve(policy, max_wait=math.inf, weight=1.0, turn_lease=0.0, linger=0.0)
    return policy


def rules_of(config: Config) -> Rules:
    """What it must know beyond that: llama-swap loads as much at once as can live together."""
    return Rules(math.inf, by_arrival=True) if config.policy == "fifo" else Rules(config.parallel_loads)


def costs_of(model: ModelConfig) -> Costs:
    """What *model* is expected to cost before anything was measured."""
    load = LOAD if model.load_cost is None else model.load_cost
    stop = STOP if model.stop_cost is None else model.stop_cost
    return Costs(load=Average(load), stop=Average(stop))


def _written(config: Config) -> Residency | None:
    """The rules that are written down; None: there are none."""
    if config.matrix is not None:
        return Matrix(config.matrix)
    return Groups(config.groups) if config.groups else None


class Arrangement:
    """The swap groups of one fleet, and who is in which."""

    def __init__(self, config: Config, supervise: Supervise, memory: Memory | None) -> None:
        self.config = config
        """The one that is in effect."""
        self.costs = {name: costs_of(model) for name, model in config.models.items()}
        self.groups: list[SwapGroup] = []
        self.home: dict[str, SwapGroup] = {}
        """Model -> its group."""
        self.desk = Desk(ending=[self._on_ending], ended=[self._on_ended])
        self._supervise, self._memory = supervise, memory
        self._attempts: Iterator[int] = itertools.count(1)  # for all: an attempt number names one process for ever
        self._residency = residency_of(config, self._budget)
        self._rules = _written(config) or Groups([])
        self._suffered = set[str]()  # models whose run the rules do not allow: it has a token of its own
        for domain in self._residency.domains(config.models):
            group = self._make_group({name: config.models[name] for name in sorted(domain)})
            self.groups.append(group)
            self.home.update(dict.fromkeys(domain, group))

    @property
    def _budget(self) -> Budget | None:
        return None if self._memory is None else self._memory.budget

    def _make_group(self, models: Mapping[str, ModelConfig]) -> SwapGroup:
        policies = {name: policy_of(self.config, model) for name, model in models.items()}
        rules = rules_of(self.config)
        core = Scheduler(policies, self._residency, self._attempts, rules, self.costs, self._budget)
        return SwapGroup(models, core, self._supervise, self._memory, self.desk)

    # ---- another configuration -------------------------------------------------------------------

    async def change(
        self, config: Config, changes: Changes, prospect: Prospect | None, nursery: trio.Nursery, closing: trio.Event
    ) -> None:
        """Have *config* in effect, of which *changes* are new and *prospect* is what its memory comes to.

        New groups run in *nursery*.  One call at a time.

        Raises:
            ConfigError: it has a model by the name of who borrows memory; nothing is changed.
            ShuttingDown: it is too late; nothing is changed.
        """
        spare: list[SwapGroup] = []
        try:
            while True:  # groups are started first, for the rest is one step; meanwhile a model may go that had one
                if closing.is_set():
                    raise ShuttingDown
                self._check_names(config)
                residency, rules = self._next_rules(config, changes)
                heirs = self._heirs(residency.domains(config.models))
                missing = sum(heir is None for _, heir in heirs) - len(spare)
                if missing <= 0:
                    break
                for _ in range(missing):
                    spare.append(self._make_group({}))
                    await nursery.start(spare[-1].run)
            self._step(config, changes, prospect, residency, rules, [(d, heir or spare.pop()) for d, heir in heirs])
        finally:
            for group in spare:
                group.dissolve()

    @property
    def _borrowers(self) -> frozenset[str]:
        """Who borrows memory, or waits for some: in a group like a model, but in no configuration."""
        return frozenset(name for group in self.groups for name in group.models if name not in self.home)

    def _check_names(self, config: Config) -> None:
        """Two of one name in a group would be taken for each other."""
        both = sorted(self._borrowers & config.models.keys())
        if both:
            why = "memory is lent to a program under this name; choose another one, or reload when it is given back"
            raise ConfigError("configuration", [f"models.{name}: {why}" for name in both])

    def _next_rules(self, config: Config, changes: Changes) -> tuple[Residency, Residency]:
        """The residency of *config*, and the rules in it, both with regard to those who are leaving."""
        rules = _written(config) or Groups([])
        leaving = dict(self._rules.names) if isinstance(self._rules, Leaving) else {}
        for name in (*changes.removed, *changes.restarted):
            if name in self.desk.runs:
                leaving.setdefault(name, _group_in(self.config, name))
        if not leaving:
            return residency_of(config, self._budget), rules
        groups = None if config.matrix is not None else config.groups
        models, before = frozenset(config.models), frozenset(self.config.models)
        kept_out = _Before.of(_without_ports(self._rules), leaving, before)
        rules = Leaving(rules, groups, models, kept_out, before, self._same_ports(config, leaving), leaving)
        if self._budget is None:
            return rules, rules
        return Both(rules, self._budget, models | leaving.keys()), rules

    def _same_ports(self, config: Config, leaving: Iterable[str]) -> frozenset[tuple[str, str]]:
        """Who is *leaving*, and who of *config* is to listen at the same address; whoever it is that listens there."""
        places = {name: parse_proxy(model.proxy) for name, model in config.models.items()}
        there = {name: parse_proxy(self.desk.runs[name].spec.proxy) for name in leaving if name in self.desk.runs}
        pairs = itertools.product(there.items(), places.items())
        return frozenset((name, other) for (name, old), (other, new) in pairs if old.overlaps(new))

    def _heirs(self, domains: Iterable[frozenset[str]]) -> list[tuple[frozenset[str], SwapGroup | None]]:
        """For each domain the group that has most of what runs there, which fewest have to move to; None: a new one."""
        free = list(self.groups)
        heirs: list[tuple[frozenset[str], SwapGroup | None]] = []
        running = self.desk.runs.keys()
        for domain in sorted(domains, key=lambda domain: (-len(domain & running), min(domain))):
            there = {group: domain.intersection(group.models) for group in free}
            best = max(free, key=lambda group: (len(there[group] & running), len(there[group])), default=None)
            # Where memory counts there is one domain, and in its group is also who has borrowed some.
            if best is not None and (there[best] or self._memory is not None):
                free.remove(best)
            else:
                best = None
            heirs.append((domain, best))
        return heirs

    def _step(
        self,
        config: Config,
        changes: Changes,
        prospect: Prospect | None,
        residency: Residency,
        rules: Residency,
        heirs: list[tuple[frozenset[str], SwapGroup]],
    ) -> None:
        """The change itself: nobody sees half of it."""
        back = [name for name in changes.added if name in self.home]  # removed a moment ago, and not gone yet
        self.config, self._residency, self._rules = config, residency, rules
        if self._memory is not None and prospect is not None:
            self._memory.expect(prospect, keep=(self.home.keys() | self._borrowers) - config.models.keys())
        self.groups += [group for _, group in heirs if group not in self.groups]
        for domain, group in heirs:
            for name in sorted(domain):
                self._settle(name, group)
        leaving = rules.names.keys() if isinstance(rules, Leaving) else frozenset[str]()
        for name in config.models:
            self.home[name].adapt(name, leaves=name in leaving)
        for name in changes.removed:  # so that it is forgotten even if its scheduler breaks when it is told
            self.home[name].core.models[name].removed = True
        for group in self.groups:
            group.core.residency, group.core.rules = residency, rules_of(config)
        crowd = {group: self._crowd(group, {*changes.restarted, *changes.removed, *back}) for group in self.groups}
        self._suffered = {name for names in crowd.values() for name in names}
        for group in list(self.groups):
            self._count_tokens(group)
            mine = [name for name in (*changes.restarted, *back) if name in group.models]
            crowded = [name for name in crowd[group] if name not in mine and name in config.models]
            gone = [name for name in changes.removed if name in group.models]
            group.feed(RetireAsked(tuple(mine), tuple(gone), tuple(crowded)))
        for name in changes.removed:
            if name not in self.desk.runs:
                self._forget(name, self.home[name])
        self._dissolve_the_empty()

    def _settle(self, name: str, group: SwapGroup) -> None:
        """Have *name* in *group*, as it is configured now."""
        spec = self.config.models.get(name)
        if name not in self.home:
            assert spec is not None
            self.costs[name] = costs_of(spec)
            group.add(spec, policy_of(self.config, spec), self._supervise, self.costs[name])
        elif self.home[name] is not group:
            group.take(name, self.home[name])
        self.home[name] = group
        if spec is not None:
            model, before = group.core.models[name], group.models[name]
            group.models[name], model.policy, model.removed = spec, policy_of(self.config, spec), False
            if command_id(before) != command_id(spec):
                self._unlearn(model, spec)
            _expect(model.costs, spec)
            model.circuit.shorten(model.policy.backoff, model.policy.backoff_max)

    def _unlearn(self, model: Model, spec: ModelConfig) -> None:
        """What is known of *model* was learned of another command line, and a run of that one has no more to tell."""
        self.costs[model.name] = model.costs = costs_of(spec)
        model.outdated = True
        if self._memory is not None:
            self._memory.budget.footprints.forget(model.name)

    def _crowd(self, group: SwapGroup, going: set[str]) -> list[str]:
        """Who runs in *group* and may not live beside the others who do."""
        rules = self._rules.rules if isinstance(self._rules, Leaving) else self._rules
        there = [
            model
            for model in group.core.models.values()
            if model.state in OCCUPIED and model.name in self.config.models
        ]
        there.sort(key=lambda model: (model.name in going or model.leaving, not model.has_work, model.name))
        return too_many(rules, [model.name for model in there])

    def _count_tokens(self, group: SwapGroup) -> None:
        """As many as may live together, one for each of the others, and one for each that is there all the same."""
        ours = frozenset(group.models.keys() & self.config.models.keys())
        more = len(group.models) - len(ours) + len(self._suffered & ours)
        group.limiter.total_tokens = self._residency.capacity(ours) + more

    def _dissolve_the_empty(self) -> None:
        for group in [group for group in self.groups if not group.models and self._memory is None]:
            self.groups.remove(group)
            group.dissolve()
            if self.groups:
                self.groups[0].journal.take(group.journal)

    # ---- the end of a server ---------------------------------------------------------------------

    def _on_ending(self, name: str) -> None:
        if isinstance(self._rules, Leaving):
            self._rules.gone(name)

    def _on_ended(self, name: str) -> None:
        # Who borrows memory has no home, and is forgotten by whoever lent it, or here if that one could not wait.
        group = self.home.get(name) or next((group for group in self.groups if name in group.models), None)
        if group is None:
            return
        if name in self._suffered:
            self._suffered.remove(name)
            self._count_tokens(group)
        model = group.core.models[name]
        if model.removed and model.state is State.STOPPED:
            self._forget(name, group)
            self._dissolve_the_empty()

    def _forget(self, name: str, group: SwapGroup) -> None:
        self.home.pop(name, None)
        group.forget(name)
        if self._memory is not None:
            self._memory.budget.footprints.remove(name)
        logger.info("removed model=%s", name)


@attrs.frozen
class _Before:
    """The rules until now, as far as they keep others out for those who are leaving.

    A table and not the rules themselves: these may have rules before them, too, and a server that never ends
    would make that one longer with each reload.
    """

    kept_out: frozenset[tuple[str, str]]
    """Who is leaving, and who must not start before it is gone."""

    @classmethod
    def of(cls, rules: Residency, leaving: Iterable[str], models: Iterable[str]) -> _Before:
        """What *rules* say of *models* and those who are *leaving*."""
        pairs = ((one, other) for one in leaving for other in models if one != other)
        return cls(frozenset((one, other) for one, other in pairs if rules.place(other, {one: NOTHING}) is None))

    def place(self, target: str, resident: Mapping[str, Holding]) -> Holding | None:
        """Nothing where it may start; None: somebody keeps it out."""
        return None if any((name, target) in self.kept_out for name in resident) else NOTHING

    def victims(self, target: str, resident: Mapping[str, Holding], offers: Offers) -> frozenset[str] | None:
        """None: whoever leaves goes by itself."""
        return None

    def domains(self, models: Iterable[str]) -> list[frozenset[str]]:
        """The new rules say what these are."""
        return [frozenset({name}) for name in models]

    def capacity(self, models: frozenset[str]) -> int:
        """The new rules say this, too."""
        return len(models)


def _without_ports(rules: Residency) -> Residency:
    """What *rules* say where nobody listens: who was to wait for a port may be configured to have another by now."""
    return attrs.evolve(rules, ports=frozenset()) if isinstance(rules, Leaving) else rules


def _group_in(config: Config, name: str) -> GroupConfig | None:
    """The group of a model; None: there is a matrix.  Who is in none is in nobody's way."""
    if config.matrix is not None:
        return None
    alone = GroupConfig("", (name,), swap=False, exclusive=False, persistent=True)
    return next((group for group in config.groups if name in group.members), alone)


def _expect(costs: Costs, spec: ModelConfig) -> None:
    """What is written counts until something was measured."""
    written = costs_of(spec)
    for average, said in ((costs.load, written.load), (costs.stop, written.stop)):
        if not average.measured:
            average.value = said.value
