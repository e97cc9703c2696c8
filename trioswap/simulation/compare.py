"""Runs the contenders on traces, and averages over seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import attrs

from trioswap.config.mistakes import did_you_mean, quoted
from trioswap.errors import Misuse
from trioswap.simulation import records
from trioswap.simulation.contenders import CONTENDERS, Settings
from trioswap.simulation.figures import Figures, average, measure
from trioswap.simulation.machine import Machine
from trioswap.simulation.workload import Workload

Results = dict[str, Figures]
"""contender -> what it came to."""


@attrs.frozen
class Trace:
    """A workload in as many variants as there are seeds."""

    name: str
    build: Callable[[int], Workload]
    """The variant of a seed."""
    seeds: int


def find(names: Sequence[str], seeds: int, swap: float, frame: Workload | None = None) -> list[Trace]:
    """The traces that *names* stand for: files of records, on the models of *frame* if given, or built-in; none: all.

    Raises:
        Misuse: there is no such trace, it has mistakes, or numpy is missing.
    """
    recorded = {name: Path(name) for name in names if Path(name).is_file()}
    if frame is not None and len(recorded) < max(1, len(names)):
        raise Misuse(
            "found a configuration, but its models are not those of the built-in traces; name files of records"
        )
    built_in = _built_in(seeds, swap) if not names or len(recorded) < len(names) else {}
    found = []
    for name in names or built_in:
        if name in recorded:
            found.append(_recorded(name, records.read(recorded[name], frame)))
        elif name in built_in:
            found.append(built_in[name])
        else:
            hint = did_you_mean(name, built_in) or f", allowed are {', '.join(built_in)}, or a file of records"
            raise Misuse(f"found {quoted(name)} as a trace, which is neither a file nor built in{hint}")
    return found


def _recorded(name: str, workload: Workload) -> Trace:
    return Trace(name, lambda _: workload, 1)  # no draws: one seed says it all


def _built_in(seeds: int, swap: float) -> dict[str, Trace]:
    try:
        from trioswap.simulation import traces
    except ImportError:
        raise Misuse("the built-in traces need numpy; run: pip install 'trioswap[simulate]'") from None

    def variants(name: str) -> Callable[[int], Workload]:
        return lambda seed: traces.build(name, seed, swap)

    return {name: Trace(name, variants(name), seeds) for name in traces.TRACES}


def run(trace: Trace, contenders: Iterable[str], settings: Settings, *, weights: bool = False) -> Results:
    """What each of *contenders* makes of *trace*; all of them meet the same demand."""
    workloads = [trace.build(seed) for seed in range(trace.seeds)]
    return {
        name: average([_replay(workload, name, settings, weights) for workload in workloads]) for name in contenders
    }


def _replay(workload: Workload, contender: str, settings: Settings, weights: bool) -> Figures:
    machine = Machine(workload, CONTENDERS[contender](workload, settings), weights)
    machine.run()
    return measure(machine)
