"""The models of a configuration as the machine plays them."""

from __future__ import annotations

from collections.abc import Mapping

from trioswap.config import Config, ModelConfig
from trioswap.errors import Misuse
from trioswap.learning import LOAD, STOP
from trioswap.messages import Policy
from trioswap.simulation.workload import ModelSpec, Workload


def frame(config: Config) -> Workload:
    """A workload with nothing to do yet: the models, the rule about living together, the parameters.

    Raises:
        Misuse: the machine cannot play the rule.
    """
    device, budget = _budget(config)
    return Workload(
        name="",
        models=tuple(_spec(model, device, budget) for model in config.models.values()),
        sessions=(),
        budget=budget,
        policies={name: _policy(model) for name, model in config.models.items()},
        parallel_loads=config.parallel_loads,
    )


def _budget(config: Config) -> tuple[str, int | None]:
    """The one device and its usable bytes; None: one model at a time."""
    one_group = len(config.groups) == 1 and config.groups[0].swap
    if config.memory is None and config.matrix is None and one_group:
        return "", None
    devices = config.memory.devices if config.memory else None
    if config.memory is None or config.matrix is not None or config.groups or not devices or len(devices) > 1:
        raise Misuse(
            "found a configuration with another rule about living together, allowed for a simulation are "
            "one group that swaps, or [memory] alone with one device"
        )
    [(device, size)] = devices.items()
    if size is None:
        raise Misuse(f'memory.devices.{device}: found "auto", allowed for a simulation is a size such as "24GiB"')
    return device, max(size - config.memory.headroom, 0)


def _spec(model: ModelConfig, device: str, budget: int | None) -> ModelSpec:
    memory = model.memory.get(device, 0) if isinstance(model.memory, Mapping) else model.memory
    return ModelSpec(
        model.name,
        load=LOAD if model.load_cost is None else model.load_cost,
        stop=STOP if model.stop_cost is None else model.stop_cost,
        # Of which nothing is known, that needs the machine for itself.
        memory=(budget or 0) if memory is None else memory,
        slots=model.parallel,
    )


def _policy(model: ModelConfig) -> Policy:
    return Policy(
        max_wait=model.max_wait,
        ttl=model.ttl,
        weight=model.weight,
        priority=model.priority,
        turn_lease=model.turn_lease,
        linger=model.linger,
    )
