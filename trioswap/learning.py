"""What a model costs, learned from what happens: to load, to stop, to serve; and how soon it is asked again.

Pure bookkeeping: the scheduler tells, this module averages.  To keep it over a restart is
for others; `remember` and `recall` turn it into plain numbers and back.  Whatever is learned
of a model, also by others, is true of one command line: `command_id` tells it from others.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Final
from urllib.parse import urlsplit

import attrs

from trioswap.config import ModelConfig

# How much the newest measurement counts.  The first of a page-cached load after a cold one
# halves the estimate in two loads; simulated, the policy is flat between 0.1 and 0.5.
GAIN: Final = 0.3
# Seconds, until something is known.  Guesses five times too high change nothing after the first load (simulated).
LOAD: Final = 10.0
STOP: Final = 1.0
SERVICE: Final = 5.0
# Idle gaps that are remembered; 4, 8, 12 and 30 make no difference (simulated).
GAPS: Final = 12


@attrs.define(eq=False)
class Average:
    """An exponentially weighted mean; the first measurement replaces the guess."""

    value: float
    measured: bool = False

    def add(self, sample: float) -> None:
        """Take *sample* in."""
        self.value = self.value + GAIN * (sample - self.value) if self.measured else sample
        self.measured = True


@attrs.define(eq=False)
class Costs:
    """One model: seconds."""

    load: Average = attrs.field(factory=lambda: Average(LOAD))
    """From the decision to start it until it is ready."""
    stop: Average = attrs.field(factory=lambda: Average(STOP))
    """From the decision to stop it until its process tree is gone."""
    service: Average = attrs.field(factory=lambda: Average(SERVICE))
    """From the grant of a request until it is over."""
    gaps: deque[float] = attrs.field(factory=lambda: deque(maxlen=GAPS))
    """How long it was out of work before somebody asked again, the last few times."""

    @property
    def swap(self) -> float:
        """To put it out and bring it back."""
        return self.load.value + self.stop.value


def remember(costs: Costs) -> tuple[dict[str, float], list[float]]:
    """What was measured of *costs*, and the gaps, as plain numbers."""
    return {name: average.value for name, average in _averages(costs) if average.measured}, list(costs.gaps)


def recall(costs: Costs, averages: Mapping[str, float], gaps: Iterable[float]) -> None:
    """Put into *costs* what `remember` has made of others."""
    for name, average in _averages(costs):
        if name in averages:
            average.value, average.measured = averages[name], True
    costs.gaps.extend(gaps)


def command_id(model: ModelConfig) -> str:
    """What tells the command line of *model* from others, and where it runs, whatever port it was given."""
    port = rf"(?<!\d){urlsplit(model.proxy).port}(?!\d)"
    parts = [re.sub(port, "PORT", part) for part in (*model.argv, *map("=".join, sorted(model.env.items())))]
    # A table of amounts names its devices, as `device` does; the amounts change nothing of what was measured.
    where = [model.device, *([sorted(model.memory)] if isinstance(model.memory, Mapping) else [])]
    return hashlib.sha256(json.dumps([parts, *where]).encode()).hexdigest()[:16]


def _averages(costs: Costs) -> tuple[tuple[str, Average], ...]:
    return ("load", costs.load), ("stop", costs.stop), ("service", costs.service)
