"""The plan for a configuration that no daemon runs: who would go for whom, as far as the file tells.

What earlier runs have taught a daemon plays no part here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import attrs

from trioswap.arrangement import costs_of, policy_of, residency_of, rules_of
from trioswap.config import Config
from trioswap.config.mistakes import did_you_mean, quoted, shown
from trioswap.devices import Machine
from trioswap.errors import Misuse
from trioswap.forecast import as_document, because, forecast
from trioswap.lifecycle import State
from trioswap.memory import make_memory
from trioswap.residency import Holding, Residency
from trioswap.turns import Model, credit


def plan(config: Config, model: str, resident: Sequence[str]) -> dict[str, Any]:
    """What GET /api/plan/{model} would answer while just *resident* were loaded, in this order, and idle.

    Raises:
        Misuse: a name is unknown, or they cannot be resident together.
    """
    name = _resolve(config, "MODEL", model)
    names = list(dict.fromkeys(_resolve(config, "--resident", other) for other in resident))
    memory = make_memory(config, Machine())
    budget = None if memory is None else memory.budget
    residency = residency_of(config, budget)
    models = {n: Model(n, policy_of(config, spec), costs_of(spec)) for n, spec in config.models.items()}
    for other, holding in _placed(names, residency).items():
        # Idle for long: no turn protects it.
        settled = attrs.evolve(models[other], state=State.READY, holding=holding, ready_at=-math.inf)
        models[other] = attrs.evolve(settled, credit=credit(settled))
    found = forecast(name, models, residency, rules_of(config), now=0.0)
    return as_document(found, None if budget is None else budget.footprints.need(name))


def _placed(names: Sequence[str], residency: Residency) -> dict[str, Holding]:
    placed: dict[str, Holding] = {}
    for name in names:
        holding = residency.place(name, placed)
        if holding is None:
            why = f"{name} does not fit: {because(residency, name, placed)}"
            found = f"found {shown(','.join(names))}, allowed is models that can be resident together"
            raise Misuse(f"--resident: {found}; {why}")
        placed[name] = holding
    return placed


def _resolve(config: Config, place: str, name: str) -> str:
    found = config.resolve(name)
    if found is None:
        hint = did_you_mean(name, config.models) or f", such as {quoted(min(config.models))}" if config.models else ""
        raise Misuse(f"{place}: found {shown(name)}, allowed is the name of a model{hint}")
    return found
