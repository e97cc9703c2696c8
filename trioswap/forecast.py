"""What would happen if one more request came for a model: who would go for it, when, and why.

Asks, changes nothing: the plan that the scheduler would make is made with one more waiter
in a copy of the model's queue.  Also puts into words why a model does not fit beside others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import attrs

from trioswap.circuit import Circuit
from trioswap.config import GroupConfig
from trioswap.config.resolve import DEFAULT_GROUP
from trioswap.errors import DoesNotFit
from trioswap.footprints import Need
from trioswap.lifecycle import OCCUPIED, State
from trioswap.messages import Rules
from trioswap.outlook import hopeless, waiting
from trioswap.planning import Plan, make_plan
from trioswap.residency import Holding, Residency
from trioswap.residency.both import Both
from trioswap.residency.budget import Budget
from trioswap.residency.groups import Groups
from trioswap.residency.matrix import Matrix
from trioswap.turns import Model, Queue, free_at

# Who asks "what if" comes after everybody who really waits; no group gives out so many tickets.
_TICKET: Final = 2**62


@attrs.frozen
class Victim:
    """A resident model that would go."""

    model: str
    state: State
    serving: int
    idle: float
    """Seconds since its last request; 0 while it works."""
    reload: float
    """Seconds its next load is expected to take."""
    when: float
    """Seconds until it can be made to go; inf: nobody can tell."""


@attrs.frozen
class Forecast:
    """The answer for one model."""

    model: str
    state: State
    fits: bool
    """It is resident, or has room beside those who are."""
    evicts: tuple[Victim, ...]
    why: str
    """One sentence for people."""
    estimate: float
    """Seconds until the request would be served; inf: it would be refused."""
    failure: str = ""
    """Why it failed last; empty: it has not, since it last proved to work."""
    retry_in: float = 0.0
    """Seconds for which it is not tried again after that, so that requests are refused; 0: the next one is taken."""


def forecast(name: str, models: Mapping[str, Model], residency: Residency, rules: Rules, now: float) -> Forecast:
    """What one more request for *name* would meet."""
    asked = _with_one_more(models[name], now)
    retry_in = asked.circuit.retry_in(now)
    models = {**models, name: asked}
    plan = plan_of(models, residency, rules, now)
    view = next(view for view in waiting(models, plan, residency, now) if view.ticket == _TICKET)
    beside = {m.name: m.holding for m in models.values() if m.state in OCCUPIED and not m.leaving and m is not asked}
    refused = retry_in > 0 or any(claim is asked for claim, _ in plan.hopeless)
    victims = () if refused or not asked.is_claim else in_the_way(name, models, residency, rules, now)
    weight = sum(model.queue.weight for model in models.values() if model.is_claim)
    return Forecast(
        model=name,
        state=asked.state,
        fits=not asked.is_claim or residency.place(name, beside) is not None,
        evicts=tuple(_victim(models[victim], asked, weight, now) for victim in victims),
        why=_why_not_tried(asked.circuit, retry_in)
        if retry_in
        else _why(asked, models, plan, _budget_of(residency), because(residency, name, beside)),
        estimate=math.inf if refused else view.estimate,
        failure=asked.circuit.failure,
        retry_in=retry_in,
    )


def in_the_way(
    claim: str, models: Mapping[str, Model], residency: Residency, rules: Rules, now: float
) -> tuple[str, ...]:
    """Who would go for *claim* if it were overdue now; until it is, the scheduler need not look for them."""
    pressing = attrs.evolve(models[claim], policy=attrs.evolve(models[claim].policy, max_wait=0.0))
    blocked = plan_of({**models, claim: pressing}, residency, rules, now).blocked.get(claim)
    return () if blocked is None else blocked.by


def plan_of(models: Mapping[str, Model], residency: Residency, rules: Rules, now: float) -> Plan:
    """The plan of this instant; the scheduler's own is that of the last event."""
    claims = [model for model in models.values() if model.is_claim]
    return make_plan(claims, [model for model in models.values() if model.state in OCCUPIED], residency, rules, now)


def as_document(found: Forecast, need: Need | None) -> dict[str, Any]:
    """*found* and what the model needs of the memory, as JSON tells it; what nobody can tell is null."""
    return {
        "model": found.model,
        "state": found.state.value,
        "need": None if need is None else {
            "source": need.source,
            "holdings": [dict(holding) for holding in need.holdings],
            "note": need.note,
        },
        "fits": found.fits,
        "evicts": [
            {
                "model": victim.model,
                "state": victim.state.value,
                "serving": victim.serving,
                "idle": seconds(victim.idle),
                "reload": seconds(victim.reload),
                "when": seconds(victim.when),
            }
            for victim in found.evicts
        ],
        "why": found.why,
        "estimate": seconds(found.estimate),
        "failure": found.failure or None,
        "retry_in": seconds(found.retry_in),
    }  # fmt: skip


def seconds(value: float) -> float | None:
    """*value* in milliseconds' precision; None where nobody can tell, because JSON has no infinity."""
    return round(value, 3) if value < math.inf else None


def _budget_of(residency: Residency) -> Budget | None:
    if isinstance(residency, Both):
        return residency.budget
    return residency if isinstance(residency, Budget) else None


def _with_one_more(model: Model, now: float) -> Model:
    """A copy that one more request waits for; what it shares with *model* is only read."""
    lines = {weight: dict(line) for weight, line in model.queue.lines.items()}
    queue = Queue(lines, model.queue.count, model.queue.weight)
    queue.add(_TICKET, now, model.policy.weight)
    return attrs.evolve(model, queue=queue)


def _victim(model: Model, asked: Model, waiting_weight: float, now: float) -> Victim:
    return Victim(
        model.name,
        model.state,
        serving=len(model.leases),
        idle=0.0 if model.has_work else now - model.idle_since,
        reload=model.costs.load.value,
        when=max(0.0, free_at(model, asked, waiting_weight, now) - now),
    )


# ---- why ----------------------------------------------------------------------------------------


def _why(asked: Model, models: Mapping[str, Model], plan: Plan, budget: Budget | None, obstacle: str) -> str:
    if not asked.is_claim:
        return _why_resident(asked, plan)
    for claim, blocker in plan.hopeless:
        if claim is asked:
            refusal = hopeless(claim, blocker, budget)()
            begin = f'model "{asked.name}" cannot start: '
            return obstacle if isinstance(refusal, DoesNotFit) else refusal.message.removeprefix(begin)
    if obstacle:
        return obstacle
    if any(claim is asked for claim, _ in plan.start):
        return "there is room for it"
    for before in (
        [model.name for model in models.values() if model.leaving],
        [model.name for model in models.values() if model.state is State.STARTING],
        plan.order[: plan.order.index(asked.name)],
    ):
        if before:
            return f"there is room for it, but {enumerated(before)} {'is' if len(before) == 1 else 'are'} before it"
    return "there is room for it"


def _why_not_tried(circuit: Circuit, retry_in: float) -> str:
    times = "has just failed" if circuit.failures == 1 else f"has failed {circuit.failures} times in a row"
    return f"it {times}, and is not tried again for {math.ceil(retry_in)} s"


def _why_resident(asked: Model, plan: Plan) -> str:
    match asked.state:
        case State.STARTING:
            return "it is loading"
        case State.DRAINING if asked.name in plan.closed:
            return f"it is going for {plan.closed[asked.name].name}, and takes no more requests"
        case State.DRAINING:
            return "it is being unloaded, and takes no more requests"
        case _ if not asked.has_room:
            return f"it is resident, and serves as many requests at once as it may ({len(asked.leases)})"
        case _:
            return "it is resident"


def because(residency: Residency, target: str, resident: Mapping[str, Holding]) -> str:
    """Why *target* does not fit beside *resident*, what they hold by name; empty: it does."""
    if residency.place(target, resident) is not None:
        return ""
    match residency:
        case Both(rules, budget, models):
            ruled = {name: holding for name, holding in resident.items() if models is None or name in models}
            return "; ".join(filter(None, (because(rules, target, ruled), because(budget, target, resident))))
        case Groups(groups):
            return _by_groups(groups, target, resident)
        case Matrix():
            return _by_matrix(residency, target, resident)
        case Budget():
            return _by_budget(residency, target, resident)
    raise AssertionError(f"a rule without words: {residency!r}")


def _by_groups(groups: Sequence[GroupConfig], target: str, resident: Iterable[str]) -> str:
    own = next(group for group in groups if target in group.members)
    named = f'group "{own.name}"' if own.name != DEFAULT_GROUP else "the group of models in no group"
    others = {name: group for group in groups for name in group.members if name in resident and group is not own}
    inside = [name for name in own.members if name in resident]
    outside = [name for name, group in others.items() if not group.persistent]
    sentences = []
    if own.swap and inside:
        sentences.append(f"{named} has one model resident at a time, so {enumerated(inside)} must go")
    if own.exclusive and outside:
        sentences.append(f"{named} is exclusive, so {enumerated(outside)} must go")
    return "; ".join(sentences)


def _by_matrix(matrix: Matrix, target: str, resident: Mapping[str, Holding]) -> str:
    solution = matrix.solve(target, resident)
    evicted = enumerated(f"{name} (cost {matrix.config.cost(name)})" for name in solution.evict)
    if solution.set_name is None:
        return f"it is in no set of the matrix, so it is resident alone, and {evicted} must go"
    together = " & ".join(sorted(solution.combination))
    return f'the cheapest choice is {together} of set "{solution.set_name}", so {evicted} must go'


def _by_budget(budget: Budget, target: str, resident: Mapping[str, Holding]) -> str:
    need = budget.footprints.need(target)
    free = dict(budget.sizes)
    for holding in resident.values():
        for device, size in holding.items():
            free[device] = free.get(device, 0) - size

    def room(device: str) -> str:
        return f"{amount(max(0, free.get(device, 0)))} of {amount(budget.sizes.get(device, 0))} free"

    ways = [
        enumerated(f"{amount(size)} on {device} ({room(device)})" for device, size in way.items())
        for way in need.holdings
    ]
    if not ways:
        return "it is not known yet what it needs, so it gets the machine for itself"
    return f"it needs {' or '.join(ways)}"


# ---- words --------------------------------------------------------------------------------------


def amount(size: int) -> str:
    """*size* bytes, about: "12 GiB", "1.5 GiB", "300 MiB"."""
    if size >= 2**30:
        return f"{round(size / 2**30, 1):g} GiB"
    return f"{round(size / 2**20, 1):g} MiB"


def amounts(holding: Holding) -> str:
    """What is held of each device: "12 GiB on gpu0 and 1 GiB on ram"."""
    return enumerated(f"{amount(size)} on {device}" for device, size in holding.items())


def enumerated(words: Iterable[str]) -> str:
    """*words* as a sentence has them: "a, b and c"."""
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last
