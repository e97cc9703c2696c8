"""What a replay comes to, in figures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import attrs

from trioswap.simulation.machine import Machine


@attrs.frozen
class Figures:
    """One replay, or the mean of several; times are seconds."""

    requests: float
    rejected: float
    loads: float
    mean: float
    """Time to first token, as is the one below."""
    p99: float
    longest_wait: float
    """From arrival until the request is handed to a server."""
    mean_wait: float
    makespan: float
    """From the first session's start to the last token."""
    worst_slowdown: float
    """How many times longer the worst-off user's requests took, all in all, than alone on a warm server."""
    mean_slowdown: float
    busy: float
    """Share of the time in which something was served."""
    swapping: float
    """Share of the time in which nothing was served, because something loaded or ended."""


def measure(machine: Machine) -> Figures:
    """The figures of *machine*, which has run and served something."""
    served = [request for request in machine.requests if not math.isnan(request.done)]
    first = sorted(request.first - request.arrived for request in served)
    waits = [request.granted - request.arrived for request in served]
    speeds = _speeds(machine)
    box = machine.box
    time = box.now or 1.0  # shares of nothing are nothing
    return Figures(
        requests=len(machine.requests),
        rejected=machine.rejected,
        loads=sum(server.loads for server in box.servers.values()),
        mean=_mean(first),
        p99=quantile(first, 0.99),
        longest_wait=max(waits),
        mean_wait=_mean(waits),
        makespan=max(request.done for request in served) - min(who.start for who in machine.workload.sessions),
        worst_slowdown=1 / min(speeds),
        mean_slowdown=_mean([1 / speed for speed in speeds]),
        busy=box.busy / time,
        swapping=box.swapping / time,
    )


def average(runs: Sequence[Figures]) -> Figures:
    """The mean of each figure."""
    rows = [attrs.astuple(run) for run in runs]
    return Figures(*(_mean(column) for column in zip(*rows, strict=True)))


def quantile(ordered: Sequence[float], share: float) -> float:
    """The value below which *share* of the *ordered* values lie, in between by proportion."""
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def geometric_mean(values: Iterable[float]) -> float:
    """The mean of ratios: twice and half come to once."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def _speeds(machine: Machine) -> list[float]:
    """Of each user with work: the time all requests take alone and warm, by the time they took; 1 = never waits."""
    alone, took = dict[str, float](), dict[str, float]()
    for request in machine.requests:
        if not math.isnan(request.done):
            alone[request.user] = alone.get(request.user, 0.0) + request.alone
            took[request.user] = took.get(request.user, 0.0) + request.done - request.arrived
    return [alone[user] / took[user] for user in alone if alone[user] > 0] or [1.0]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
