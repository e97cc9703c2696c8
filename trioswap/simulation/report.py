"""Results as Markdown that can also be read in a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from trioswap.simulation.compare import Results
from trioswap.simulation.figures import Figures, geometric_mean

BASELINES: Final = ("llama-swap", "strict-fifo")
"""What the others are compared with."""

METRICS: Final[Mapping[str, str]] = {
    "loads": "swaps",
    "mean": "TTFT mean",
    "p99": "TTFT p99",
    "longest_wait": "longest wait",
    "makespan": "makespan",
    "worst_slowdown": "worst slowdown",
}
"""Field of `Figures` -> what people call it; less is better for each of them."""

_FORMATS: Final = {"loads": ".0f", "makespan": ".0f", "busy": ".2f"}
_COLUMNS: Final = {**METRICS, "busy": "GPU busy"}
_WIDTH: Final = 14
# Smaller is nothing, and nothing has no ratio.
_NOTHING: Final = 1e-9


def intro(seeds: int, swap: float) -> str:
    """What the table is about."""
    count = "1 seed" if seeds == 1 else f"means of {seeds} seeds"
    return (
        f"Simulated; {count} and swaps of {swap:g} s in the built-in traces.  "
        "Times in seconds; TTFT: time to first token."
    )


def heading() -> list[str]:
    """The head of the table of traces."""
    return _head(["trace", "policy"], _COLUMNS.values())


def rows(trace: str, results: Results) -> list[str]:
    """The lines of one trace."""
    return [
        _row([trace, policy], [format(getattr(figures, key), _FORMATS.get(key, ".1f")) for key in _COLUMNS])
        for policy, figures in results.items()
    ]


def refusals(results: Mapping[str, Results]) -> list[str]:
    """Who refused requests: their figures are about the rest only."""
    return [
        f"{policy} refused {figures.rejected:g} of {figures.requests:g} requests of {trace}."
        for trace, of_trace in results.items()
        for policy, figures in of_trace.items()
        if figures.rejected
    ]


def ratios(results: Mapping[str, Results]) -> list[str]:
    """Tables of geometric means over the traces, one for each baseline that was run with others."""
    policies = list(next(iter(results.values())))
    lines = []
    for baseline in BASELINES:
        if baseline in policies and len(policies) > 1:
            lines += ["", f"Geometric means over the traces, as ratios to {baseline}:", ""]
            lines += _head(["policy"], METRICS.values())
            for policy in policies:
                means = [
                    geometric_mean(ratio(results[trace], policy, baseline, key) for trace in results) for key in METRICS
                ]
                lines.append(_row([policy], [format(mean, ".2f") for mean in means]))
    return lines


def ratio(results: Results, policy: str, baseline: str, key: str) -> float:
    """How many times the *baseline*'s figure that of *policy* is."""

    def value(figures: Figures) -> float:
        return max(float(getattr(figures, key)), _NOTHING)

    return value(results[policy]) / value(results[baseline])


def _head(labels: Sequence[str], columns: Iterable[str]) -> list[str]:
    """Texts to the left, figures to the right."""
    names = [*columns]
    rules = [":" + "-" * (_WIDTH + 1)] * len(labels) + ["-" * (_WIDTH + 1) + ":"] * len(names)
    return [_row(labels, names), f"|{'|'.join(rules)}|"]


def _row(labels: Sequence[str], figures: Sequence[str]) -> str:
    cells = [label.ljust(_WIDTH) for label in labels] + [figure.rjust(_WIDTH) for figure in figures]
    return f"| {' | '.join(cells)} |"
