"""Routing: where a request goes while a profile is active, what selectors have given out, and what is given back."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack

import attrs
import pytest
import trio
from children import PATIENCE, free_port

from trioswap.access import ANYBODY, Key
from trioswap.config import Config, ModelConfig
from trioswap.config.parts import PeerConfig, ProfileConfig, SelectorConfig
from trioswap.errors import Forbidden, PeerFailed, PinnedToNobody, UnknownModel, UnknownProfile
from trioswap.lifecycle import State
from trioswap.names import AtPeer, Here, Names
from trioswap.remote import Peer
from trioswap.routing import NAME_LIMIT, Routing


@attrs.frozen
class Models:
    """What routing asks the fleet for."""

    states: dict[str, State]

    def state(self, model: str) -> State:
        return self.states.get(model, State.STOPPED)

    def is_failing(self, model: str) -> bool:
        return False


def routing(selectors: Mapping[str, SelectorConfig] | None = None, **states: State) -> Routing:
    """Of models a, b, c, and gpt at a peer to which nobody listens."""
    models = {
        name: ModelConfig(name, ("server",), "http://127.0.0.1:1", aliases=aliases)
        for name, aliases in {"a": ("nick",), "b": (), "c": ()}.items()
    }
    pins = {"a": "b", "b": "a", "gone": None, "c": None, "any": "pick", "cloud": "gpt"}
    config = Config(
        models=models,
        peers={"far": PeerConfig("far", f"http://127.0.0.1:{free_port()}", ("gpt",))},
        selectors={"pick": SelectorConfig("pick", "spillover", ("nick", "b", "far/gpt")), **(selectors or {})},
        profiles={"work": ProfileConfig("work", pins), "other": ProfileConfig("other", {"a": "c"})},
    )
    peers = {name: Peer(peer, {}) for name, peer in config.peers.items()}
    return Routing(Names(config), Models(states), peers)


def key(*models: str, **settings: object) -> Key:
    return Key("some", b"", models=models, **settings)


def target_of(route: Routing, name: str, by: Key = ANYBODY):
    """Where one request goes that is over at once."""
    with route.route(name, by) as found:
        return found.target


# ---- models and pins ------------------------------------------------------------------------


def test_without_a_profile_names_mean_themselves():
    """By whatever name; no selector had a hand in it."""
    found = routing()

    assert target_of(found, "a") == Here("a", "a")
    assert target_of(found, "nick") == Here("a", "nick")
    assert target_of(found, "gpt") == AtPeer("far", "gpt", "gpt")
    with found.route("far/gpt", ANYBODY) as route:
        assert (route.target, route.selector) == (AtPeer("far", "gpt", "far/gpt"), None)


def test_a_profile_sends_names_elsewhere():
    """Once, so two names can change places; other names, aliases among them, are not concerned."""
    found = routing()
    found.activate("work")

    assert target_of(found, "a") == Here("b", "b")
    assert target_of(found, "b") == Here("a", "a")
    assert target_of(found, "nick") == Here("a", "nick")
    assert target_of(found, "cloud") == AtPeer("far", "gpt", "gpt")
    with found.route("any", ANYBODY) as route:
        assert (route.target, route.selector) == (Here("a", "nick"), "pick")

    found.activate("other")
    assert target_of(found, "a") == Here("c", "c")
    found.activate(None)
    assert target_of(found, "a") == Here("a", "a")


@pytest.mark.parametrize("name", ["gone", "c"])
def test_a_disabled_pin_is_nobodys(name):
    """Whether it is a model's name or not; the error says who has decided that."""
    found = routing()
    found.activate("work")
    assert found.knows(name) == name

    words = f'nobody answers to "{name}" while profile "work"'
    with pytest.raises(PinnedToNobody, match=words), found.route(name, ANYBODY):
        pytest.fail("there is a way")


def test_an_unknown_profile_changes_nothing(caplog):
    """And a name is not repeated without bound."""
    found = routing()
    found.activate("work")

    for name in ("nobody", "", "x" * 100_000):
        with pytest.raises(UnknownProfile) as caught:
            found.activate(name)
        assert len(caught.value.message) < NAME_LIMIT + 100
        assert found.profile == "work"


def test_a_change_is_logged(caplog):
    """One line each, and none where nothing changes."""
    caplog.set_level(logging.INFO, "trioswap.routing")
    found = routing()
    for profile in (None, "work", "work", "other", None):
        found.activate(profile)

    assert [record.message for record in caplog.records] == ["profile=work", "profile=other", "profile=None"]


# ---- names that lead nowhere ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nobody", "", "far", "x" * 1_000_000])
def test_an_unknown_name(name):
    """It is said, and a long name neither looked at nor repeated as a whole."""
    found = routing()

    with pytest.raises(UnknownModel) as caught, found.route(name, ANYBODY):
        pytest.fail("there is a way")
    assert len(caught.value.message) < NAME_LIMIT + 100
    assert found.knows(name) is None


def test_the_model_of_a_name():
    """For what is asked of models of ours only: pins, selectors and peers are nothing there."""
    found = routing()
    found.activate("work")

    assert found.model("nick") == found.model("a") == "a"
    for name in ("pick", "gpt", "far/gpt", "any", "gone"):
        with pytest.raises(UnknownModel):
            found.model(name)
    with pytest.raises(UnknownModel, match='did you mean "a"'):
        found.model("aa")


# ---- keys -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("by", "name"),
    [
        (key("b"), "a"),
        (key("nick"), "a"),
        (key("a", peers=False), "gpt"),
        (Key("some", b"", peers=False), "far/gpt"),
        (key("far"), "gpt"),
        (key("c"), "pick"),
    ],
)
def test_a_key_may_not(by, name):
    """Go where none of the names on the way is its own, nor to a peer without that right."""
    found = routing()

    with pytest.raises(Forbidden, match=f'the key "some" may not use model "{name}"'), found.route(name, by):
        pytest.fail("let in")


def test_a_key_may():
    """By the name it asks for, by where that leads, and by the real one."""
    found = routing()
    assert target_of(found, "nick", key("a")) == target_of(found, "nick", key("nick")) == Here("a", "nick")
    assert target_of(found, "gpt", key("far/*")) == AtPeer("far", "gpt", "gpt")

    found.activate("work")
    assert target_of(found, "a", key("b")) == target_of(found, "a", key("a")) == Here("b", "b")
    assert (
        target_of(found, "cloud", key("gpt")) == target_of(found, "cloud", key("cloud")) == AtPeer("far", "gpt", "gpt")
    )
    assert target_of(found, "any", key("any")) == target_of(found, "any", key("pick")) == Here("a", "nick")


def test_a_selector_leaves_out_what_a_key_may_not():
    """Also when that is what it would take otherwise; who is given the selector gets all of it."""
    found = routing(a=State.READY)

    assert target_of(found, "pick") == target_of(found, "pick", key("pick")) == Here("a", "nick")
    assert target_of(found, "pick", key("b")) == Here("b", "b")
    assert target_of(found, "pick", key("far/gpt")) == AtPeer("far", "gpt", "far/gpt")
    with pytest.raises(Forbidden), found.route("pick", key("far/gpt", peers=False)):
        pytest.fail("let in")


# ---- selectors ----------------------------------------------------------------------------------


def test_states_decide():
    """What is loaded is taken, in the order of the targets."""
    warm = {"warm": SelectorConfig("warm", "warm", ("a", "b"))}

    assert target_of(routing(warm, b=State.READY), "warm") == Here("b", "b")
    assert target_of(routing(b=State.STARTING), "pick") == Here("b", "b")
    assert target_of(routing(a=State.STOPPING), "pick") == Here("b", "b")


def test_requests_spill_over_and_are_given_back():
    """Each further one to a target of its own, then in turn; who is over makes room."""
    found = routing()
    with ExitStack() as stack:
        routes = [stack.enter_context(found.route("pick", ANYBODY)) for _ in range(3)]
        assert [route.target.real for route in routes] == ["a", "b", "far/gpt"]
        assert {route.selector for route in routes} == {"pick"}
        further = [target_of(found, "pick").real for _ in range(6)]
        assert sorted(further) == ["a", "a", "b", "b", "far/gpt", "far/gpt"]
    assert target_of(found, "pick") == Here("a", "nick")


def test_selectors_do_not_count_for_each_other():
    """What one has sent to a model does not fill it for the other."""
    found = routing({"other": SelectorConfig("other", "spillover", ("a", "b"))})

    with found.route("pick", ANYBODY) as route:
        assert route.target.real == "a"
        assert target_of(found, "other").real == "a"
        assert target_of(found, "pick").real == "b"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_a_reservation_is_given_back_when_the_request_fails(error):
    """Whatever it was."""
    found = routing()
    for _ in range(3):
        with pytest.raises(error), found.route("pick", ANYBODY):
            raise error
        assert target_of(found, "pick").real == "a"


async def test_a_reservation_is_given_back_when_the_request_is_cancelled():
    """While others of the same selector go on."""
    found = routing()
    with found.route("pick", ANYBODY):
        with trio.move_on_after(0) as scope, found.route("pick", ANYBODY) as route:
            await trio.sleep_forever()
        assert scope.cancelled_caught
        assert route.target.real == "b"
        assert target_of(found, "pick").real == "b"


def test_who_may_not_reserves_nothing():
    """A refused request takes no turn and no place."""
    found = routing()
    for _ in range(3):
        with pytest.raises(Forbidden), found.route("pick", key("c")):
            pytest.fail("let in")

    assert target_of(found, "pick").real == "a"


async def test_a_peer_that_is_down_is_left_out():
    """As long as there is another target; alone it is tried, for that is how one learns that it is back."""
    pick = {name: SelectorConfig(name, "spillover", targets) for name, targets in
            {"first": ("far/gpt", "a"), "only": ("far/gpt",)}.items()}  # fmt: skip
    found = routing(pick)
    assert target_of(found, "first").real == "far/gpt"

    with trio.fail_after(PATIENCE), pytest.raises(PeerFailed):
        async with found.peers["far"].request("GET", b"/", [], b""):
            pytest.fail("somebody listens")
    assert target_of(found, "first").real == "a"
    assert target_of(found, "only").real == "far/gpt"
