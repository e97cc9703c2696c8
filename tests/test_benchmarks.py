"""The benchmarks' own parts: what they play and what they measure, on sizes that take no time."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("numpy")  # of the extra that simulates
sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import http_cost
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


@pytest.mark.parametrize(("budget", "rounds"), [(30.0, 2), (-1.0, 1)])
def test_a_request_is_sent_both_ways_in_turns(
    budget: float, rounds: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row for each kind, with a ratio of both; when the time is up no further round begins."""
    sent = list[tuple[http_cost.Address, int]]()
    real = http_cost.took

    def took(address: http_cost.Address, path: str, body: bytes, count: int) -> list[float]:
        sent.append((address, count))
        return real(address, path, body, count)

    settings = {"took": took, "ROUNDS": 2, "REQUESTS": 40, "EVENTS": 3, "BUDGET": budget}
    for name, value in settings.items():
        monkeypatch.setattr(http_cost, name, value)
    http_cost.main()
    rows = capsys.readouterr().out.splitlines()
    assert [row.partition("  ")[0] for row in rows] == ["small JSON", "stream"]
    assert all(float(row.partition("ratio")[2].split()[0]) > 0 for row in rows)
    ways = [address for address, count in sent if count == 40]
    assert len(ways) == 2 * rounds
    assert ways[::2] == ways[:1] * rounds
    assert ways[1::2] == ways[1:2] * rounds
    assert ways[0] != ways[1]


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
