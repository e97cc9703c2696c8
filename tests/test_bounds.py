"""The bound that the self-check holds waits against: never less than what is proved, and honest about drains."""

from __future__ import annotations

import math
import random

import attrs
import pytest
from test_scheduler_bounds import SEEDS, WORLDS, one_of, trial

from trioswap.bounds import Limits, bound_of, held_by, overdue_decisions, waiters
from trioswap.lifecycle import State
from trioswap.messages import Arrived, BecameReady, CloseGate, Drained, Policy, Start, WokeUp
from trioswap.scheduler import Scheduler

SLOW = Limits(load=10.0, stop=1.0, drain=None)


def scheduler(**policy) -> Scheduler:
    """a and b, one at a time."""
    names, residency = one_of("a", "b")
    return Scheduler(dict.fromkeys(names, Policy(**policy)), residency)


def serving_a(**policy) -> Scheduler:
    """a serves ticket 1, b is waited for by ticket 2."""
    core = scheduler(**policy)
    [start] = core.handle(Arrived(1, "a"), 0.0)
    assert isinstance(start, Start)
    core.handle(BecameReady("a", start.attempt), 10.0)
    core.handle(Arrived(2, "b"), 10.0)
    return core


@pytest.mark.parametrize("world", WORLDS)
def test_it_is_never_less_than_what_is_proved(world):
    """With the speeds of the worlds in which no wait is longer than `Trial.wait`, for lines of any length."""
    for seed in SEEDS:
        rng = random.Random(seed)
        played = trial(rng, world, weight={"b": 0.25, "a": 4.0})
        models = played.loop.core.models
        limits = {name: Limits(speed.load, speed.stop, played.longest) for name, speed in played.loop.speeds.items()}
        alone = played.loop.core.residency.capacity(frozenset(models)) == 1
        for model in models.values():
            model.queue.add(1, 0.0, model.policy.weight)
        for name, model in models.items():
            for place in (1, 2, 5, 9):
                bound = bound_of(name, model.policy.weight, models, limits, alone=alone, brief=0.0).at(place)

                assert played.wait(name, place) <= bound < math.inf


def test_it_is_the_formula():
    """Two models, equal weights: once `max_wait` for its own line, then the sum of docs/scheduling.md."""
    core = scheduler(max_wait=60.0, turn_lease=4.0, parallel=2)
    core.handle(Arrived(1, "b"), 0.0)
    limits = dict.fromkeys("ab", Limits(load=10.0, stop=1.0, drain=7.0))

    def bound(place: int) -> float:
        return bound_of("b", 1.0, core.models, limits, alone=True, brief=5.0).at(place)

    turn = 60 + (44 + 7) + 2 * 11
    assert bound(1) == bound(2) == 60 + turn + 7
    assert bound(3) == 60 + 2 * turn + 3 * 7


def test_llama_swaps_line_has_none():
    """Without `max_wait` nothing bounds anything."""
    core = scheduler(max_wait=math.inf, turn_lease=0.0, linger=0.0)
    core.handle(Arrived(1, "b"), 0.0)

    assert bound_of("b", 1.0, core.models, dict.fromkeys("ab", SLOW), alone=True, brief=5.0).at(1) == math.inf


def test_places_are_those_in_which_they_are_served():
    """A light request stands behind a heavy one that came a little later."""
    core = serving_a()
    core.handle(Arrived(3, "b", 0.5), 10.0)
    core.handle(Arrived(4, "b", 2.0), 11.0)

    assert [(w.ticket, w.place) for w in waiters(core.models) if w.model == "b"] == [(4, 1), (2, 2), (3, 3)]


def test_who_is_held_and_by_whom():
    """By a drain without a deadline, and by its own busy model; not before `max_wait`, and not with a deadline."""
    core = serving_a(parallel=1)
    core.handle(Arrived(3, "a"), 11.0)
    bounded = {"a": attrs.evolve(SLOW, drain=20.0), "b": SLOW}

    def holders(limits) -> dict[int, list[str]]:
        return {w.ticket: [model.name for model in held_by(w.model, core.models, limits)] for w in waiters(core.models)}

    assert holders(dict.fromkeys("ab", SLOW)) == {2: [], 3: ["a"]}
    assert any(isinstance(command, CloseGate) for command in core.handle(WokeUp(), core.wake_at))
    assert holders(dict.fromkeys("ab", SLOW)) == {2: ["a"], 3: ["a"]}
    assert holders(bounded) == {2: [], 3: []}
    core.handle(Drained("a", core.models["a"].attempt), 100.0)
    assert core.models["a"].state is State.STOPPING
    assert holders(dict.fromkeys("ab", SLOW)) == {2: [], 3: []}


def test_a_forgotten_decision_is_seen():
    """Nothing is to be decided before the alarm; when it does not ring, that is seen."""
    core = serving_a()

    def overdue(now: float) -> frozenset[str]:
        return overdue_decisions(core.models, core.residency, core.rules, now)

    assert overdue(core.wake_at - 0.001) == frozenset()
    assert overdue(core.wake_at) == {"b"}
    core.handle(WokeUp(), core.wake_at)
    assert overdue(1000.0) == frozenset(), "the gate is closed, and what drains may take its time"


def test_a_server_with_room_and_a_line_is_seen():
    """Whoever could be served at once, is; a time to live that is over, too."""
    core = serving_a(ttl=30.0)
    core.models["a"].queue.add(9, 10.0, 1.0)

    assert "a" in overdue_decisions(core.models, core.residency, core.rules, 10.0)
    core.models["a"].queue.remove(9)
    core.models["a"].end_lease(1)
    core.models["a"].idle_since = 10.0
    core.models["b"].queue.remove(2)
    assert overdue_decisions(core.models, core.residency, core.rules, 40.0) == frozenset()
    assert overdue_decisions(core.models, core.residency, core.rules, 42.0) == {"a"}
