"""The scheduler: every reachable state of small worlds keeps the laws, under each kind of residency."""

from __future__ import annotations

import math

import pytest
from test_matrix import matrix
from walks import walk
from worlds import MAX_WAIT, TTL, Limits, World, make_budget, make_world

from trioswap.config import GroupConfig
from trioswap.footprints import Wish
from trioswap.messages import Policy, Rules
from trioswap.residency import Residency
from trioswap.residency.both import Both
from trioswap.residency.groups import Groups

ONE_OF_TWO = Groups((GroupConfig("(default)", ("a", "b")),))
ONE_OF_THREE = Groups((GroupConfig("(default)", ("a", "b", "c")),))
# A newcomer in `big` puts out both members of `pair`: a swap with two victims.
TWO_VICTIMS = Groups((GroupConfig("big", ("a",)), GroupConfig("pair", ("b", "c"), swap=False, exclusive=False)))
PERSISTENT = Groups((GroupConfig("swap", ("a", "b")), GroupConfig("stays", ("c",), exclusive=False, persistent=True)))
FIFO = Rules(math.inf, by_arrival=True)


def policy(ttl: float | None = None, **more: float) -> Policy:
    """For a small world: a turn lease of one swap, and no back-off."""
    return Policy(**{"max_wait": MAX_WAIT, "ttl": ttl, "turn_lease": 1.0, "backoff": 0.0, **more})


PLAIN = policy()
NO_POLICY = policy(max_wait=math.inf, turn_lease=0, linger=0)
"""What llama-swap's line has of each model."""


def ruled(residency: Residency, models: str, limits: Limits, **more) -> World:
    return make_world(residency, models, limits, **{"policy": PLAIN, **more})


def sized(sizes, needs, limits: Limits, beside: Residency | None = None, **more) -> World:
    budget = make_budget(sizes, needs)
    residency = budget if beside is None else Both(beside, budget)
    return make_world(residency, sorted(needs), limits, budget=budget, **{"policy": PLAIN, **more})


def few(tickets: int = 2, **more) -> Limits:
    """Nothing but requests and time, and what *more* says."""
    return Limits(**{"tickets": tickets, "crashes": False, "unloads": False, "shutdown": False, "cuts": False, **more})


FAILING = few(crashes=True, failing="a")
BACKING_OFF = policy(backoff=1.0, backoff_max=2.0)
WALKS = {
    # ---- who puts out whom is written down
    "one at a time": lambda: ruled(ONE_OF_TWO, "ab", Limits(turns=True), policy=policy(TTL)),
    "one at a time, unkillable": lambda: ruled(ONE_OF_TWO, "ab", Limits(stuck=True, passing=False)),
    "three models": lambda: ruled(ONE_OF_THREE, "abc", few(turns=True)),
    "two victims": lambda: ruled(TWO_VICTIMS, "abc", few()),
    "two victims and troubles": lambda: ruled(TWO_VICTIMS, "abc", Limits(passing=False, unloads=False)),
    "two victims, two loads": lambda: ruled(TWO_VICTIMS, "abc", few(crashes=True, passing=False), rules=Rules(2)),
    "persistent": lambda: ruled(PERSISTENT, "abc", few(leaves=False)),
    "reloads": lambda: ruled(ONE_OF_TWO, "ab", few(3, retires=True, cuts=True, passing=False)),
    "reloads and troubles": lambda: ruled(
        ONE_OF_TWO, "ab", Limits(tickets=1, retires=True, stuck=True, passing=False, shutdown=False)
    ),
    # ---- what a model's policy says
    "weights": lambda: ruled(ONE_OF_TWO, "ab", few(weights=(1.0, 2.0))),
    "one request at a time": lambda: ruled(ONE_OF_TWO, "ab", few(3, leaves=False), policy=policy(parallel=1)),
    "lingering": lambda: ruled(ONE_OF_TWO, "ab", few(turns=True), gaps=(0.9, 0.9, 0.9)),
    "no turn lease": lambda: ruled(ONE_OF_TWO, "ab", few(cuts=True, turns=True), policy=policy(turn_lease=0)),
    "priorities": lambda: ruled(ONE_OF_THREE, "abc", few(), policies={"c": policy(priority=1)}),
    "one does not yield": lambda: ruled(ONE_OF_TWO, "ab", Limits(shutdown=False), policies={"a": policy(yields=False)}),
    "llama-swap's line": lambda: ruled(
        ONE_OF_TWO, "ab", Limits(unloads=False, shutdown=False), policy=NO_POLICY, rules=FIFO
    ),
    "one fails again and again": lambda: ruled(ONE_OF_TWO, "ab", FAILING, policies={"a": BACKING_OFF}),
    # ---- matrix
    "a matrix of one each": lambda: ruled(matrix("ab", s="a | b"), "ab", few(crashes=True, turns=True)),
    "a matrix of a pair": lambda: ruled(matrix("abc", s="a & b | c"), "abc", few(leaves=False)),
    "a matrix of overlapping sets": lambda: ruled(matrix("abc", {"a": 3}, s="a & b | b & c"), "abc", few(leaves=False)),
    "a matrix and one in no set": lambda: ruled(matrix("abx", s="a & b"), "abx", few(passing=False, crashes=True)),
    # ---- memory
    "a large one and two small ones": lambda: sized({"gpu0": 6}, {"a": 6, "b": 3, "c": 3}, few(leaves=False)),
    "two devices": lambda: sized(
        {"gpu0": 6, "gpu1": 6}, {"a": 6, "b": 2, "c": 3, "d": 3}, few(leaves=False, passing=False)
    ),
    "an unknown need": lambda: sized({"gpu0": 6}, {"a": None, "b": 3}, few(crashes=True)),
    "an estimated need": lambda: sized({"gpu0": 6}, {"a": Wish(estimate=4), "b": 3}, few(ooms=2, passing=False)),
    "out of memory": lambda: sized({"gpu0": 8}, {"a": 4, "b": 4}, few(ooms=3, passing=False)),
    "measured": lambda: sized({"gpu0": 8}, {"a": 4, "b": 4}, few(peaks=({"gpu0": 6},), passing=False)),
    "squeezed": lambda: sized(
        {"gpu0": 8}, {"a": 4, "b": 3}, few(squeezes=({"gpu0": 8}, {"gpu0": 6}, {"gpu0": 3}), passing=False)
    ),
    "lent memory": lambda: sized(
        {"gpu0": 10}, {"a": 4, "b": 7, "z": 6}, few(unloads=True, passing=False), policies={"z": policy(yields=False)}
    ),
    "memory that never comes back": lambda: sized({"gpu0": 10}, {"a": 4, "b": 7}, few(stuck=True, passing=False)),
    "too large": lambda: sized({"gpu0": 6}, {"a": 7, "b": 6, "c": 3}, few()),
    "groups in a budget": lambda: sized({"gpu0": 6}, {"a": 4, "b": 2, "c": 3}, few(leaves=False), beside=ONE_OF_TWO),
    "llama-swap's line in a budget": lambda: sized(
        {"gpu0": 6}, {"a": 6, "b": 3, "c": 3}, few(passing=False), policy=NO_POLICY, rules=FIFO
    ),
}

LARGER = {
    "both fail again and again": lambda: ruled(ONE_OF_TWO, "ab", Limits(stuck=True), policy=BACKING_OFF),
    "one at a time, three requests": lambda: ruled(ONE_OF_TWO, "ab", few(3, turns=True, cuts=True)),
    "three models and troubles": lambda: ruled(ONE_OF_THREE, "abc", Limits(turns=True)),
    "two victims and time": lambda: ruled(TWO_VICTIMS, "abc", few(unloads=True), policy=policy(TTL)),
    "a matrix of overlapping sets": lambda: ruled(matrix("abc", {"a": 3}, s="a & b | b & c"), "abc", few(cuts=True)),
    "a matrix and one in no set": lambda: ruled(matrix("abx", s="a & b"), "abx", few()),
    "a large one and two small ones": lambda: sized({"gpu0": 6}, {"a": 6, "b": 3, "c": 3}, few(cuts=True)),
    "two devices": lambda: sized(
        {"gpu0": 6, "gpu1": 6}, {"a": 6, "b": 2, "c": 3, "d": 3}, few(3, leaves=False, passing=False)
    ),
    "measured": lambda: sized({"gpu0": 8}, {"a": 4, "b": 4}, few(peaks=({"gpu0": 6},))),
    "lent memory": lambda: sized(
        {"gpu0": 10}, {"a": 4, "b": 7, "z": 6}, few(unloads=True), policies={"z": policy(yields=False)}
    ),
    "groups in a budget": lambda: sized({"gpu0": 6}, {"a": 4, "b": 3, "c": 3}, few(), beside=ONE_OF_TWO),
    "llama-swap's line in a budget": lambda: sized(
        {"gpu0": 6}, {"a": 6, "b": 3, "c": 3}, few(), policy=NO_POLICY, rules=FIFO
    ),
}


@pytest.mark.parametrize("name", WALKS)
def test_every_reachable_state_keeps_the_laws(name):
    """All invariants that concern scheduling hold in every world that can be reached."""
    assert walk(WALKS[name]()) > 60


@pytest.mark.walks
@pytest.mark.parametrize("name", LARGER)
def test_every_reachable_state_of_larger_worlds_keeps_the_laws(name):
    """The same, where a walk takes a minute."""
    assert walk(LARGER[name](), bound=150_000) > 5_000
