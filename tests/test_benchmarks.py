"""The benchmarks' own parts: what they play and what they measure, on sizes that take no time."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("numpy")  # of the extra that simulates
sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import policies
import scheduler_cost

from trioswap.simulation.traces import build


@pytest.mark.parametrize("trace", policies.TRACES)
def test_the_demand_in_small_is_the_same_but_faster(trace: str) -> None:
    """Loads, stops and pauses are divided alike, so the simulation sees the same swaps in a fraction of the time."""
    big = build(trace, 0, policies.SWAP)
    small = policies.scaled(big)
    for before, after in zip(big.models, small.models, strict=True):
        assert (after.load, after.stop) == (before.load / policies.SCALE, before.stop / policies.SCALE)
    for before, after in zip(big.sessions, small.sessions, strict=True):
        assert [step.model for step in after.steps] == [step.model for step in before.steps]
        assert [step.think * policies.SCALE for step in after.steps] == pytest.approx([s.think for s in before.steps])
        assert all(step.service for step in after.steps)


def test_the_default_policy_wins_the_small_duel_in_the_simulation() -> None:
    """So a benchmark in which it does not has found something."""
    workload = policies.scaled(build("duel", 0, policies.SWAP))
    lease, fifo = policies.simulated(workload, "lease"), policies.simulated(workload, "fifo")
    assert lease.swaps < fifo.swaps / 4
    assert lease.makespan < fifo.makespan


@pytest.mark.parametrize("scene", [*scheduler_cost.GROUPS, *scheduler_cost.MATRICES])
def test_each_scene_is_about_what_it_says(scene: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The world comes to the swap that its scene leads up to, with every decision on the way timed."""
    monkeypatch.setattr(scheduler_cost, "REPEATS", 1)
    make, happens = {**scheduler_cost.GROUPS, **scheduler_cost.MATRICES}[scene]
    made = make(6, 12)
    happens(made)
    assert all(len(times) == 1 for times in made.took.values())
    assert any(what.startswith("timer") for what in made.took)


@pytest.mark.parametrize("scene", scheduler_cost.MEMORY)
def test_the_machine_is_full_where_memory_decides(scene: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a claim would just start, and nobody would be chosen to go."""
    monkeypatch.setattr(scheduler_cost, "REPEATS", 1)
    make, happens = scheduler_cost.MEMORY[scene]
    made = make(30, 40)
    assert len(made.serving) == scheduler_cost.RESIDENT
    happens(made)
    assert any(what.startswith("timer") for what in made.took)
