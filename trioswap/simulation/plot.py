"""A picture of the ratios, trace by trace: one panel for each figure, one mark for each contender.

Needs matplotlib, from the extra `simulate`.  Colours are those of Okabe and Ito, which
colour-blind people can tell apart, and each contender has a shape of its own; the card is
white, so the picture stands on any page.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from trioswap.config.mistakes import quoted
from trioswap.errors import Misuse
from trioswap.simulation.compare import Results
from trioswap.simulation.figures import geometric_mean
from trioswap.simulation.report import BASELINES, METRICS, ratio

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES: Final = (".png", ".svg")
_MARKS: Final = {"lease": ("#0072B2", "o"), "llama-swap": ("#E69F00", "s"), "strict-fifo": ("#D55E00", "D")}
_INK: Final = "#333333"
_GRID: Final = "#dddddd"
_BAND: Final = "#f0f0f0"
_OVERALL: Final = "geometric mean"
_COLUMNS: Final = 3
_APART: Final = 0.26


def check(path: Path, policies: list[str]) -> None:
    """See, before anything is run, that a picture of *policies* can be drawn to *path*.

    Raises:
        Misuse: it cannot.
    """
    if path.suffix not in SUFFIXES:
        raise Misuse(f"--plot: found {quoted(str(path))}, allowed is a file that ends in {' or '.join(SUFFIXES)}")
    if not path.absolute().parent.is_dir():
        raise Misuse(f"--plot: there is no directory {path.absolute().parent}")
    if len(policies) < 2 or baseline(policies) is None:
        raise Misuse(f"--plot: found nothing to compare, allowed are policies with {' or '.join(BASELINES)} among them")
    try:
        import matplotlib as mpl  # noqa: F401
    except ImportError:
        raise Misuse("--plot needs matplotlib; run: pip install 'trioswap[simulate]'") from None


def baseline(policies: list[str]) -> str | None:
    """What the others are compared with."""
    return next((name for name in BASELINES if name in policies), None)


def draw(results: Mapping[str, Results], path: Path) -> None:
    """Write the picture of *results* to *path*, which `check` has seen."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    policies = list(next(iter(results.values())))
    base = baseline(policies)
    assert base is not None, "checked before anything was run"
    others = [policy for policy in policies if policy != base]
    lines = -(-len(METRICS) // _COLUMNS)
    # The salt keeps the names within an SVG the same from run to run.
    with mpl.rc_context({"font.size": 9, "text.color": _INK, "svg.hashsalt": "trioswap", "svg.fonttype": "none"}):
        figure = Figure(
            figsize=(9.6, 1.2 + lines * (0.9 + 0.2 * (len(results) + 1))), facecolor="white", layout="constrained"
        )
        grid = figure.subplots(lines, _COLUMNS, sharey=True, squeeze=False)
        for axes, (key, name) in zip(grid.flat, METRICS.items(), strict=False):
            _panel(axes, name, {policy: _points(results, policy, base, key) for policy in others})
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(others), frameon=False)
        figure.suptitle(f"Simulated, as ratio to {base}: left of the line is better", fontsize=11)
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def _points(results: Mapping[str, Results], policy: str, base: str, key: str) -> dict[str, float]:
    """The ratio in each trace, and over all of them."""
    points = {trace: ratio(of_trace, policy, base, key) for trace, of_trace in results.items()}
    return {**points, _OVERALL: geometric_mean(points.values())} if len(points) > 1 else points


def _panel(axes: Axes, title: str, series: Mapping[str, Mapping[str, float]]) -> None:
    rows = list(next(iter(series.values())))
    axes.set_title(title, fontsize=10, loc="left")
    axes.axvline(1.0, color=_INK, linewidth=1)
    for place, (policy, points) in enumerate(series.items()):
        colour, shape = _MARKS[policy]
        # A little apart, so that equal ones do not hide each other.
        heights = [row + _APART * (place - (len(series) - 1) / 2) for row in range(len(rows))]
        sizes = [44 if row == _OVERALL else 22 for row in rows]
        axes.scatter(
            list(points.values()), heights, sizes, color=colour, marker=shape, label=policy, zorder=3, linewidths=0
        )
    axes.set_xscale("log", base=2)
    axes.margins(x=0.1)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}" if x >= 1 else f"1/{1 / x:g}")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    if _OVERALL in rows:
        axes.axhspan(len(rows) - 1.5, len(rows) - 0.5, color=_BAND)
    axes.grid(color=_GRID, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
