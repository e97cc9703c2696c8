"""The truth while you wait: places, stages and estimates, from costs that are known."""

from __future__ import annotations

import math

import pytest
from test_scheduler import Play

from trioswap.learning import Average
from trioswap.lifecycle import State
from trioswap.messages import Eviction, Left, Rules, WaitView, WokeUp
from trioswap.outlook import waiting

# What `Play` says of every model: 5 s to load, 1 s to stop; here also 2 s to serve a request.
SERVICE = 2.0


def play(models: str = "ab", **policy) -> Play:
    found = Play(models, **{"max_wait": 60.0, **policy})
    for model in found.core.models.values():
        model.costs.load, model.costs.service = Average(5.0), Average(SERVICE)
    return found


def views(world: Play, now: float) -> dict[int, WaitView]:
    core = world.core
    return {view.ticket: view for view in waiting(core.models, core.plan, core.residency, now)}


def test_who_waits_for_a_load_is_told_what_is_left_of_it():
    """Of the five seconds two have passed; one that takes longer than ever is late by a tenth of its time."""
    world = play()
    world.ask("a", 0)
    assert views(world, 2)[1] == WaitView(1, "a", 2.0, 1, "loading", (), 3.0)
    assert views(world, 40)[1].estimate == pytest.approx(4.0)


def test_who_waits_behind_a_busy_model_is_told_until_when_at_the_latest():
    """Until it is overdue, then the stop and the load."""
    world = play()
    world.bring_up("a")
    world.core.models["a"].costs.load = Average(5.0)
    world.ask("b", 10)
    view = views(world, 20)[2]
    assert (view.stage, view.waited, view.place) == ("queued", 10.0, 1)
    assert view.estimate == pytest.approx(50 + 5.0, abs=1.1)


def test_a_gate_that_has_closed_is_a_stage():
    """What still runs, the stop, and the load are left; who waits for the model that goes waits for both turns."""
    world = play()
    world.bring_up("a")
    world.core.models["a"].costs.load = Average(5.0)
    world.ask("b", 0)
    world.say(WokeUp(), 60)
    world.ask("a", 61)
    found = views(world, 61)
    assert (found[2].stage, found[2].waits_for) == ("draining", ("a",))
    drain = 0.1 * 61  # it should have ended after 2 s
    assert found[2].estimate == pytest.approx(drain + 1 + 5)
    assert (found[3].stage, found[3].waits_for) == ("queued", ("b",))
    assert found[3].estimate == pytest.approx(drain + 1 + 5 + SERVICE + 1 + 5)


def test_a_stop_under_way_is_a_stage():
    """What is left of it, and the load."""
    world = play()
    world.bring_up("a")
    world.say(Left(1), 1)
    world.ask("b", 2)
    view = views(world, 2.5)[2]
    assert (view.stage, view.waits_for) == ("stopping", ("a",))
    assert view.estimate == pytest.approx(0.5 + 5)


def test_claims_have_their_turns_one_after_the_other():
    """The second waits for the load, the turn and the stop of the first."""
    world = play("abc")
    world.bring_up("a")
    world.say(Left(1), 1)
    world.ask("b", 2)
    world.ask("c", 2)
    found = views(world, 2)
    assert found[2].estimate == pytest.approx(1 + 5)
    assert found[3].estimate == pytest.approx(1 + 5 + SERVICE + 1 + 5)


def test_who_has_room_waits_for_loads_only():
    """Not until it is overdue, which plays no part where nobody is in its way."""
    world = Play("abc", needs={"a": 3, "b": 3, "c": 3}, size=9, max_wait=60.0)
    for name in "abc":
        world.ask(name, 0)
    found = views(world, 2)
    assert [(found[t].stage, found[t].waits_for, found[t].estimate) for t in (2, 3)] == [
        ("queued", (), pytest.approx(3 + 5)),
        ("queued", (), pytest.approx(3 + 5 + 5)),
    ]


def test_places_are_counted_in_the_line_of_the_model():
    """With two at once the third and fourth come in the second round."""
    world = play(parallel=2)
    for _ in range(4):
        world.ask("a", 0)
    assert [(v.place, v.estimate) for v in views(world, 0).values()] == [(1, 5.0), (2, 5.0), (3, 7.0), (4, 7.0)]
    world.ready("a", 5)
    assert [(v.place, v.estimate) for v in views(world, 5).values()] == [(1, SERVICE), (2, SERVICE)]


def test_in_llama_swaps_line_nobody_can_tell():
    """A busy model stays as long as it is busy; the usual time of a request is all there is to say."""
    world = Play(rules=Rules(math.inf, by_arrival=True), max_wait=math.inf, linger=0.0)
    world.bring_up("a")
    world.ask("b", 1)
    assert views(world, 2)[2].stage == "queued"
    assert 0 < views(world, 2)[2].estimate < math.inf


@pytest.mark.parametrize(
    ("was", "says"),
    [
        (State.READY, "idle 540.0 s"),
        (State.DRAINING, "busy until its gate closed"),
        (State.STARTING, "loading for nobody"),
    ],
)
def test_an_eviction_is_a_sentence(was, says):
    """What it did, what its loss costs, for whom, and how long that one has waited."""
    eviction = Eviction("b", 7, "a", was, idle=540.0, reload=6.0, waited=4.0)
    assert str(eviction) == f"evicted b: {says}, reload costs 6.0 s; for a, waited 4.0 s"
