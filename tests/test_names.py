"""Names: what each means, in which order, and which target of a selector is chosen."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trioswap.config import Config, ModelConfig
from trioswap.config.parts import PeerConfig, ProfileConfig, SelectorConfig
from trioswap.lifecycle import State
from trioswap.names import AtPeer, Candidate, Here, Names, choose

ENDING = (State.STOPPING, State.DRAINING)


def model(name: str, *aliases: str) -> ModelConfig:
    return ModelConfig(name, ("server",), "http://127.0.0.1:1", aliases=aliases)


def names() -> Names:
    """Names that could be mistaken for each other."""
    return Names(
        Config(
            models={"a": model("a", "nick", "shared"), "org/b": model("org/b")},
            peers={
                "far": PeerConfig("far", "http://127.0.0.1:2", ("gpt", "both", "shared", "pick")),
                "near": PeerConfig("near", "http://127.0.0.1:3", ("both",)),
            },
            selectors={"pick": SelectorConfig("pick", "spillover", ("nick", "far/gpt", "org/b"))},
            profiles={
                "work": ProfileConfig("work", {"a": "org/b", "gpt": None, "new": "pick", "chain": "a"}),
                "long": ProfileConfig("long", {"a-name-that-is-longer-than-all-others": "a"}),
            },
        )
    )


# ---- what a name means ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        ("a", Here("a", "a")),
        ("nick", Here("a", "nick")),
        ("org/b", Here("org/b", "org/b")),
        ("far/gpt", AtPeer("far", "gpt", "far/gpt")),
        ("gpt", AtPeer("far", "gpt", "gpt")),
        ("near/both", AtPeer("near", "both", "near/both")),
        ("far/shared", AtPeer("far", "shared", "far/shared")),
    ],
)
def test_a_name_means_a_model(name, meaning):
    """By its own name, an alias, PEER/MODEL, or MODEL where one peer only offers it."""
    assert names().meaning(name) == meaning


@pytest.mark.parametrize("name", ["both", "far", "far/", "/gpt", "near/gpt", "A", "", "b", "new"])
def test_a_name_that_means_no_model(name):
    """Two peers offer it, or it is only a part, or differs in case; a pin is looked at before."""
    assert names().meaning(name) is None


def test_ours_go_before_those_of_peers():
    """An alias that a peer's model has for its name, too; the peer's is reached as PEER/MODEL."""
    assert names().meaning("shared") == Here("a", "shared")


def test_the_name_that_nothing_else_has():
    """Of a model of ours its own, whatever it was asked for by; of one at a peer PEER/MODEL."""
    assert Here("a", "nick").real == "a"
    assert AtPeer("far", "gpt", "gpt").real == "far/gpt"


def test_a_selector_leads_to_its_targets():
    """In their order, before the peer's model that is called the same; any other name leads to one model, or none."""
    assert names().targets("pick") == [Here("a", "nick"), AtPeer("far", "gpt", "far/gpt"), Here("org/b", "org/b")]
    assert names().targets("nick") == [Here("a", "nick")]
    assert names().targets("nobody") == []


# ---- pins -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "pinned"), [("a", "org/b"), ("gpt", None), ("new", "pick"), ("chain", "a"), ("nick", "nick"), ("x", "x")]
)
def test_pins_go_before_all_and_once(name, pinned):
    """A pin that leads to a pinned name stops there; an alias of a pinned name is a name of its own."""
    assert names().pinned(name, "work") == pinned


def test_without_a_profile_nothing_is_pinned():
    """And pins of another profile do not count."""
    assert [names().pinned(name, None) for name in ("a", "gpt", "new")] == ["a", "gpt", "new"]
    assert names().pinned("a", "long") == "a"


def test_names_that_are_known():
    """Whatever leads somewhere, and what is pinned to nobody: that it is nobody's is an answer, too."""
    known = names()

    assert all(known.knows(name, "work") == name for name in ("a", "nick", "gpt", "new", "chain", "pick", "far/both"))
    assert [known.knows(name, None) for name in ("new", "chain", "both", "")] == [None] * 4


def test_the_longest_name():
    """Of all that may stand in a path, pins of any profile included."""
    assert names().longest == len("a-name-that-is-longer-than-all-others")
    assert Names(Config(models={"abc": model("abc", "abcdef")})).longest == 6
    assert Names(Config()).longest == 0


# ---- selectors ------------------------------------------------------------------------------


def selector(strategy: str, spillover: int = 1) -> SelectorConfig:
    return SelectorConfig("pick", strategy, ("unused",), spillover)


def local(name: str, state: State = State.STOPPED, reserved: int = 0) -> Candidate:
    return Candidate(Here(name, name), state, reserved)


def remote(name: str, reserved: int = 0, *, down: bool = False) -> Candidate:
    return Candidate(AtPeer("far", name, name), None, reserved, down)


def chosen(rule: SelectorConfig, *candidates: Candidate, turn: int = 0) -> str:
    return choose(rule, candidates, turn).target.name


def test_pin_is_always_the_first():
    """Whether it is there or not: the others are for whoever edits the file."""
    assert chosen(selector("pin"), local("a"), local("b", State.READY)) == "a"
    assert chosen(selector("pin"), local("a", State.STOPPING, 9), remote("b")) == "a"
    assert chosen(selector("pin"), remote("a", down=True), remote("b"), turn=1) == "a"


@pytest.mark.parametrize(
    ("states", "which"),
    [
        ([State.STOPPED, State.STARTING, State.READY, State.READY], 2),
        ([State.STOPPED, State.STARTING, State.STARTING], 1),
        ([State.STOPPED, State.DRAINING, State.STOPPING], 0),
        ([State.STOPPING, State.STOPPED], 0),
        ([State.DRAINING, State.READY], 1),
    ],
)
def test_warm_is_the_first_that_is_loaded(states, which):
    """Else the first that loads, else the first; requests there say nothing, and no turns are taken."""
    candidates = [local(str(index), state, 5 - index) for index, state in enumerate(states)]

    assert [chosen(selector("warm"), *candidates, turn=turn) for turn in range(3)] == [str(which)] * 3


@pytest.mark.parametrize(
    ("candidates", "which"),
    [
        pytest.param([local("a"), local("b")], "a", id="all cold: the first"),
        pytest.param([local("a"), local("b", State.STARTING)], "b", id="one that loads has room"),
        pytest.param([local("a"), local("b", reserved=1), local("c")], "b", id="one that is about to load, too"),
        pytest.param([local("a", State.READY, 2), local("b"), local("c")], "b", id="enough: the next cold one"),
        pytest.param([local("a", State.READY, 2), remote("b"), local("c")], "b", id="a peer without requests is cold"),
        pytest.param([remote("a", 1), local("b")], "a", id="a peer with requests is active"),
        pytest.param([local("a", State.READY, 3), local("b", State.READY, 2)], "b", id="none is cold: the least busy"),
        pytest.param([local("a", State.READY, 1), local("b", State.READY)], "b", id="room at both: the least busy"),
        pytest.param([local("a", State.STOPPING), local("b")], "b", id="what stops is not chosen"),
        pytest.param([local("a", State.DRAINING, 1), local("b")], "b", id="what drains is not chosen"),
        pytest.param([local("a", State.READY, 5), local("b", State.STOPPING)], "a", id="nor is it a cold one"),
        pytest.param([remote("a", down=True), local("b")], "b", id="what is down is not chosen"),
        pytest.param([local("a", State.READY, 5), remote("b", down=True)], "a", id="nor is that a cold one"),
        pytest.param([local("a", State.STOPPING), local("b", State.DRAINING)], "a", id="all end: wait for one"),
        pytest.param([local("a", State.STOPPING), local("b", State.DRAINING, 1)], "b", id="all end: one with room"),
        pytest.param([remote("a", down=True), local("b", State.STOPPING)], "b", id="what comes back, not what is down"),
        pytest.param([remote("a", down=True), remote("b", down=True)], "a", id="all down: see whether one is back"),
    ],
)
def test_spillover(candidates, which):
    """With two requests at each before a further one is started."""
    assert chosen(selector("spillover", 2), *candidates) == which


def test_who_is_as_good_as_another_takes_turns():
    """Only among the least busy."""
    candidates = [local("a", State.READY), local("b", State.READY, 1), local("c", State.STARTING), local("d")]

    assert [chosen(selector("spillover", 2), *candidates, turn=turn) for turn in range(4)] == ["a", "c", "a", "c"]


def test_requests_that_come_together_fill_one_after_the_other():
    """With two at each: the first starts one target, the third the next, and the seventh has no more to start."""
    reserved, order = dict.fromkeys("abc", 0), []
    for turn in range(9):
        candidates = [local(name, reserved=count) for name, count in reserved.items()]
        order.append(chosen(selector("spillover", 2), *candidates, turn=turn))
        reserved[order[-1]] += 1

    assert order[:6] == ["a", "a", "b", "b", "c", "c"]
    assert sorted(order[6:]) == ["a", "b", "c"]


CANDIDATES = st.lists(
    st.one_of(
        st.builds(local, st.just("?"), st.sampled_from(State), st.integers(0, 3)),
        st.builds(lambda reserved, down: remote("?", reserved, down=down), st.integers(0, 3), st.booleans()),
    ),
    min_size=1,
    max_size=5,
)


@given(CANDIDATES, st.sampled_from(["pin", "warm", "spillover"]), st.integers(1, 3), st.integers(0, 10))
def test_the_chosen_one_is_a_candidate(candidates, strategy, spillover, turn):
    """Whatever their states; and it is there, and stays, if any does so and the strategy asks for it."""
    found = choose(selector(strategy, spillover), candidates, turn)

    assert any(found is candidate for candidate in candidates)
    if strategy == "spillover":
        staying = [each for each in candidates if not each.down and each.state not in ENDING]
        assert found in staying or not staying
        assert not found.down or all(each.down for each in candidates)


@given(CANDIDATES, st.integers(1, 3), st.integers(0, 10))
def test_nothing_is_started_while_there_is_room(candidates, spillover, turn):
    """Spillover never starts a cold one while an active one has fewer requests than `spillover`, and else it does."""
    found = choose(selector("spillover", spillover), candidates, turn)

    staying = [each for each in candidates if not each.down and each.state not in ENDING]
    active = [each for each in staying if each.reserved or each.state in (State.READY, State.STARTING)]
    cold = [each for each in staying if each not in active]
    if any(each.reserved < spillover for each in active):
        assert found in active
        assert found.reserved == min(each.reserved for each in active)
    elif cold:
        assert found == cold[0]
