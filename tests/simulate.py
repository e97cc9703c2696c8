"""Simulates the control plane for a thousand hours and more: `python tests/simulate.py` (nox -s simulate).

Every seed is a world of its own and is lived through for the same time, whatever else is simulated, so any
seed replays alone: `--seed N --seeds 1`, with `--trace` in words.  `--mutants` breaks the control plane on
purpose, in one way after the other, and shows which law noticed.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed

import pytest
from sim_days import Report, simulate
from sim_mutants import MUTANTS

# Hours for which the world of one seed is lived through.
SPAN = 2.0
# Seeds, and hours of each, within which a mutant must be noticed.
MUTANT_SEEDS = 60
MUTANT_SPAN = 2.0


def one(seed: int) -> tuple[Report, float]:
    """The world of *seed*, and the seconds of a processor that it took."""
    begun = time.process_time()
    return simulate(seed, SPAN), time.process_time() - begun


def caught(mutant: Callable[[pytest.MonkeyPatch], None], seeds: Iterable[int] = range(MUTANT_SEEDS)) -> Report | None:
    """The first of *seeds* in which *mutant* breaks a law; None: it goes unnoticed in all of them."""
    for seed in seeds:
        with pytest.MonkeyPatch.context() as patch:
            mutant(patch)
            report = simulate(seed, MUTANT_SPAN)
        if report.broken:
            return report
    return None


def not_applied(report: Report) -> bool:
    """Whether what broke is the mutant itself: it patches what is not there, or not so, any more."""
    return bool(re.search(r"\b(TypeError|AttributeError|NameError)\(", report.broken))


def unbroken(seed: int) -> Report:
    """The same world and span without any mutant."""
    return simulate(seed, MUTANT_SPAN)


def caught_by_number(number: int) -> tuple[int, Report | None, float]:
    """The same for the mutant of that *number*, and the seconds that it took."""
    begun = time.process_time()
    return number, caught(MUTANTS[number]), time.process_time() - begun


# ---- what is printed -------------------------------------------------------------------------------


def run_worlds(first: int, seeds: int, workers: int) -> int:
    """Simulate, print, and return an exit code."""
    begun, reports, busy = time.monotonic(), [], 0.0
    for report, seconds in spread(one, range(first, first + seeds), workers):
        reports.append(report)
        busy += seconds
        if len(reports) % 50 == 0:
            print(f"{len(reports)} worlds, {sum(r.hours for r in reports):,.0f} h", file=sys.stderr, flush=True)
        if report.broken:
            print(f"seed {report.seed} ({report.kind}): {report.broken}")
            print(f"  replay: python tests/simulate.py --seed {report.seed} --trace", flush=True)
    took = time.monotonic() - begun
    requests, hours = sum(r.requests for r in reports), sum(r.hours for r in reports)
    outcomes = sum((report.outcomes for report in reports), Counter())
    faults = sum((report.faults for report in reports), Counter())
    print(
        f"{len(reports)} worlds from seed {first}: {hours:,.0f} h of {sum(r.lives for r in reports):,} daemons, ",
        end="",
    )
    print(f"{sum(r.starts for r in reports):,} starts of servers, in {took:.0f} s")
    print(f"{requests:,} requests, {requests / busy:,.0f} for each second of a core ({busy:,.0f} s of cores)")
    table("requests by outcome", outcomes)
    table("faults by kind", faults)
    print(
        f"longest wait, as a part of its bound: {max(r.longest for r in reports):.2f} without trouble meanwhile, ",
        end="",
    )
    print(f"{max(r.longest_troubled for r in reports):.2f} with it")
    kinds = Counter(report.kind for report in reports)
    print(f"worlds: {', '.join(f'{count} {kind}' for kind, count in kinds.most_common())}")
    sums = sorted((report.seed, report.digest) for report in reports)
    broken = [report.seed for report in reports if report.broken]
    verdict = f"laws were broken by seeds {sorted(broken)}" if broken else "no law was broken"
    print(f"sum of all histories: {hash(tuple(sums)) & 0xFFFFFFFF:08x}; {verdict}")
    return 1 if broken else 0


def run_mutants(workers: int) -> int:
    """Break it in every way, print who noticed, and return an exit code: unbroken it must pass, broken in no way."""
    sound = [report for report in spread(unbroken, range(MUTANT_SEEDS), workers) if report.broken]
    for report in sound:
        print(f"{'(no mutant)':32} seed {report.seed:2}: {report.broken}", flush=True)
    if not sound:
        print(f"{'(no mutant)':32} no law was broken in {MUTANT_SEEDS} seeds of {MUTANT_SPAN:g} h", flush=True)
    missed = 0
    for number, report, seconds in spread(caught_by_number, range(len(MUTANTS)), workers):
        name = MUTANTS[number].__name__
        if report is None:
            missed += 1
            print(f"{name:32} NOT NOTICED in {MUTANT_SEEDS} seeds, {seconds:.0f} s", flush=True)
        elif not_applied(report):
            missed += 1
            print(f"{name:32} DOES NOT APPLY: {report.broken}", flush=True)
        else:
            print(f"{name:32} seed {report.seed:2}, {seconds:3.0f} s: {report.broken}", flush=True)
    print(f"{len(MUTANTS) - missed} of {len(MUTANTS)} mutants noticed")
    return 1 if missed or sound else 0


def spread(work: Callable[[int], object], numbers: Iterable[int], workers: int) -> Iterator[object]:
    """What *work* says of each of *numbers*, as it comes."""
    if workers == 1:
        yield from map(work, numbers)
        return
    # An executor says so when one of its processes is killed; a pool of multiprocessing waits for its result for ever.
    # Its processes do as many tasks as come: with `max_tasks_per_child` it stands still (python/cpython#115634).
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn) as executor:
        for done in as_completed([executor.submit(work, number) for number in numbers]):
            yield done.result()


def table(title: str, counts: Counter[str]) -> None:
    """Print *counts*, the largest first, and their sum."""
    print(f"{title}: {sum(counts.values()):,}")
    for name, count in counts.most_common():
        print(f"  {count:>11,}  {name}")


def main() -> int:
    """Read the command line and do what it says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the first seed")
    parser.add_argument("--hours", type=float, default=1000.0, metavar="H", help=f"in all, {SPAN:g} for each seed")
    parser.add_argument("--seeds", type=int, metavar="N", help="how many seeds, instead of --hours")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes")
    parser.add_argument("--trace", action="store_true", help="tell the history of the first seed, and nothing else")
    parser.add_argument("--mutants", action="store_true", help="break the control plane, and see it noticed")
    options = parser.parse_args()
    if options.trace:
        print(simulate(options.seed, SPAN, trace=True))
        return 0
    if options.mutants:
        return run_mutants(options.workers)
    return run_worlds(options.seed, options.seeds or math.ceil(options.hours / SPAN), options.workers)


if __name__ == "__main__":
    sys.exit(main())
