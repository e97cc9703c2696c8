"""The rows of /v1/models: every field of each kind of row (surface reference 2.1), and who sees which."""

from __future__ import annotations

from functools import partial

import pytest
from daemons import chat, daemon, fetch, scripted
from hypothesis import given
from hypothesis import strategies as st

from trioswap.access import ANYBODY, Key
from trioswap.config import Config, ModelConfig
from trioswap.config.parts import CapabilityConfig, PeerConfig, ProfileConfig, SelectorConfig
from trioswap.lifecycle import State
from trioswap.listing import Listing, may_use
from trioswap.names import Names

BEGAN = 1_700_000_000
UNLOADED = {"value": "unloaded"}
LOADED = {"value": "loaded"}


def model(name: str, *aliases: str, **settings: object) -> ModelConfig:
    return ModelConfig(name, ("server",), "http://127.0.0.1:1", aliases=aliases, **settings)


def config(*models: ModelConfig, **settings: object) -> Config:
    return Config(models={each.name: each for each in models}, **settings)


def listing(of: Config, key: Key = ANYBODY, profile: str | None = None, **states: State) -> Listing:
    return Listing(Names(of), profile, states, key, BEGAN)


def key(*models: str, **settings: object) -> Key:
    """One that is for these names only."""
    return Key("some", b"", models=models, **settings)


def ids(of: Config, key: Key = ANYBODY, profile: str | None = None) -> list[str]:
    return [row["id"] for row in listing(of, key, profile).rows()]


# ---- models and aliases -----------------------------------------------------------------------


def test_a_plain_model():
    """The fields that every row has, and no others."""
    assert listing(config(model("a"))).rows() == [
        {
            "id": "a",
            "object": "model",
            "created": BEGAN,
            "owned_by": "trioswap",
            "meta": {"llamaswap": {"type": "model"}},
            "status": UNLOADED,
        }
    ]


def test_a_model_with_everything():
    """Name and description without blanks around them, what it can do, and its metadata."""
    can = CapabilityConfig(("text", "image"), ("text",), tools=True, reranker=True, context=4096)
    everything = model(
        "a", "nick", display_name=" A name ", description="\tsays\n", capabilities=can, metadata={"author": {"x": [1]}}
    )

    assert listing(config(everything), a=State.READY).rows() == [
        {
            "id": "a",
            "object": "model",
            "created": BEGAN,
            "owned_by": "trioswap",
            "name": "A name",
            "description": "says",
            "architecture": {
                "input_modalities": ["text", "image"],
                "output_modalities": ["text"],
                "modality": "text+image->text",
            },
            "capabilities": {"vision": True, "function_calling": True, "reranker": True},
            "supported_parameters": ["tools", "tool_choice"],
            "context_length": 4096,
            "meta": {"llamaswap": {"author": {"x": [1]}, "type": "model", "aliases": ["nick"]}, "n_ctx": 4096},
            "status": LOADED,
        }
    ]


def test_blank_texts_are_left_out():
    """As if they were not written."""
    [row] = listing(config(model("a", display_name="  ", description="\n"))).rows()

    assert not row.keys() & {"name", "description"}


@pytest.mark.parametrize(
    ("state", "status"),
    [(state, UNLOADED if state is State.STOPPED else LOADED) for state in State],
)
def test_what_holds_memory_is_loaded(state, status):
    """While it starts, serves, drains and stops; a model nobody has a state for is not."""
    [row] = listing(config(model("a")), a=state).rows()

    assert row["status"] == status
    assert listing(config(model("b")), a=state).rows()[0]["status"] == UNLOADED


@pytest.mark.parametrize(
    ("can", "able"),
    [
        (CapabilityConfig(("audio",), ("text",)), {"audio_transcriptions"}),
        (CapabilityConfig(("text",), ("audio",)), {"audio_speech"}),
        (CapabilityConfig(("text",), ("image",)), {"image_generation"}),
        (CapabilityConfig(("image",), ("image",)), {"vision", "image_to_image"}),
        (CapabilityConfig(("image",)), {"vision"}),
        (CapabilityConfig(("text",), ("text",)), set()),
        (CapabilityConfig((), ("audio",)), set()),
        (CapabilityConfig(tools=True), {"function_calling"}),
        (CapabilityConfig(reranker=True), {"reranker"}),
        (CapabilityConfig(context=1), set()),
    ],
)
def test_what_a_model_can_do(can, able):
    """Only what is true, and nothing where nothing is."""
    [row] = listing(config(model("a", capabilities=can))).rows()

    assert row.get("capabilities", {}) == dict.fromkeys(able, True)
    assert ("capabilities" in row) == bool(able)
    assert ("supported_parameters" in row) == can.tools
    assert ("context_length" in row) == ("n_ctx" in row["meta"]) == bool(can.context)


@pytest.mark.parametrize(
    ("can", "architecture"),
    [
        (CapabilityConfig(("text", "audio")), {"input_modalities": ["text", "audio"]}),
        (CapabilityConfig((), ("image",)), {"output_modalities": ["image"]}),
        (CapabilityConfig(tools=True), None),
    ],
)
def test_a_modality_has_two_ends(can, architecture):
    """With one of them it is left out, and with none the whole of it."""
    [row] = listing(config(model("a", capabilities=can))).rows()

    assert row.get("architecture") == architecture


def test_metadata_says_nothing_else_than_we_do():
    """Our keys win; what capabilities say it may not say otherwise, but may where there are none."""
    metadata = {"type": "x", "aliases": 1, "architecture": 2, "capabilities": 3, "supported_parameters": 4} | {
        "context_length": 5,
        "mine": 6,
    }
    plain, nothing, able = (
        listing(config(model("a", "nick", metadata=metadata, capabilities=can))).rows()[0]["meta"]["llamaswap"]
        for can in (None, CapabilityConfig(), CapabilityConfig(("text",)))
    )

    assert plain == nothing == {**metadata, "type": "model", "aliases": ["nick"]}
    assert able == {"type": "model", "aliases": ["nick"], "mine": 6}
    assert listing(config(model("a", metadata=metadata))).rows()[0]["meta"]["llamaswap"]["aliases"] == 1


def test_aliases_have_rows_if_that_is_asked_for():
    """They are what their model is, and say which that is."""
    can = CapabilityConfig(("text",), ("text",), context=7)
    settings = {"display_name": "A", "capabilities": can, "metadata": {"modelID": "wrong", "mine": 1}}
    a = model("a", "z-nick", "nick", **settings)
    own, nick, z_nick = listing(config(a, include_aliases_in_list=True), a=State.DRAINING).rows()

    assert [own["id"], nick["id"], z_nick["id"]] == ["a", "nick", "z-nick"]
    assert nick["meta"] == {"llamaswap": {"type": "alias", "modelID": "a", "mine": 1}, "n_ctx": 7}
    differing = {"id", "meta"}
    assert {k: v for k, v in nick.items() if k not in differing} == {k: v for k, v in own.items() if k not in differing}
    assert nick["status"] == LOADED


def test_what_is_unlisted_is_not_listed():
    """Nor are its aliases; other rows are sorted by their ids."""
    hidden = model("h", "h-nick", unlisted=True)
    of = config(model("b"), hidden, model("B"), model("a/x"), include_aliases_in_list=True)

    assert ids(of) == ["B", "a/x", "b"]


# ---- peers, selectors, pins -------------------------------------------------------------------

FAR = PeerConfig("far", "http://127.0.0.1:2", ("gpt", "org/x", "both", "pick"))
NEAR = PeerConfig("near", "http://127.0.0.1:3", ("both", "a"))
PEERS = {"far": FAR, "near": NEAR}


def test_models_of_peers():
    """As PEER/MODEL, each once, whatever else leads there; whether they are loaded is not known."""
    rows = listing(config(model("a"), peers=PEERS)).rows()

    assert [row["id"] for row in rows] == ["a", "far/both", "far/gpt", "far/org/x", "far/pick", "near/a", "near/both"]
    assert rows[3] == {
        "id": "far/org/x",
        "object": "model",
        "created": BEGAN,
        "owned_by": "trioswap",
        "name": "far: org/x",
        "meta": {"llamaswap": {"type": "peer", "peerID": "far"}},
        "status": UNLOADED,
    }


def selector(name: str, strategy: str, *targets: str, **settings: object) -> SelectorConfig:
    return SelectorConfig(name, strategy, targets, **settings)


def test_a_selector():
    """What it is, and its metadata where that does not say otherwise; `spillover` only where it counts."""
    metadata = {"targets": "x", "strategy": "x", "type": "x", "mine": 1}
    pick = selector("s", "spillover", "a", "far/gpt", spillover=3, display_name="S", metadata=metadata)
    warm = selector("w", "warm", "a", metadata={"spillover": 9})
    hidden = selector("h", "pin", "a", unlisted=True)
    of = config(model("a"), peers=PEERS, selectors={each.name: each for each in (pick, warm, hidden)})
    rows = {row["id"]: row for row in listing(of).rows()}

    assert rows["s"] == {
        "id": "s",
        "object": "model",
        "created": BEGAN,
        "owned_by": "trioswap",
        "name": "S",
        "meta": {
            "llamaswap": {
                "mine": 1,
                "type": "selector",
                "strategy": "spillover",
                "targets": ["a", "far/gpt"],
                "spillover": 3,
            }
        },
        "status": UNLOADED,
    }
    assert rows["w"]["meta"]["llamaswap"] == {
        "type": "selector",
        "strategy": "warm",
        "targets": ["a"],
        "spillover": 9,
    }, "what does not count is not ours"
    assert "h" not in rows


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize(("strategy", "looks_at_b"), [("pin", False), ("warm", True), ("spillover", True)])
def test_a_selector_is_loaded_with_its_targets(strategy, looks_at_b, state):
    """When one that it considers is ready, or starts; with pin that is the first alone."""
    of = config(model("a"), model("b"), selectors={"s": selector("s", strategy, "far/gpt", "a")}, peers=PEERS)
    first = config(model("a"), model("b"), selectors={"s": selector("s", strategy, "b", "a")})
    is_warm = state in (State.READY, State.STARTING)

    assert (listing(first, b=state).row("s")["status"] == LOADED) == is_warm
    assert (listing(of, a=state).row("s")["status"] == LOADED) == (is_warm and looks_at_b)
    assert (listing(first, a=state).row("s")["status"] == LOADED) == (is_warm and looks_at_b)


def test_pins_of_the_active_profile():
    """Those that are new names, and lead somewhere; what is unlisted is not a new name."""
    pins = {"new": "a", "to-selector": "s", "to-peer": "gpt", "nobody": None}
    taken = dict.fromkeys(("a", "nick", "h", "s", "gpt"), "a")
    profiles = {"work": ProfileConfig("work", {**pins, **taken}), "other": ProfileConfig("other", {"elsewhere": "a"})}
    hidden = model("h", unlisted=True)
    of = config(
        model("a", "nick"), hidden, peers={"far": FAR}, selectors={"s": selector("s", "pin", "a")}, profiles=profiles
    )
    others = ids(of)

    assert set(ids(of, profile="work")) - set(others) == {"new", "to-selector", "to-peer"}
    assert set(ids(of, profile="other")) - set(others) == {"elsewhere"}
    assert listing(of, profile="work", a=State.READY).row("new") == {
        "id": "new",
        "object": "model",
        "created": BEGAN,
        "owned_by": "trioswap",
        "meta": {"llamaswap": {"type": "profile"}},
        "status": UNLOADED,
    }


# ---- one row ------------------------------------------------------------------------------------


def test_one_row():
    """By any name that means it, listed or not; the same row that the list has."""
    of = config(
        model("a", "nick"),
        model("h", unlisted=True),
        peers=PEERS,
        selectors={"s": selector("s", "pin", "a", unlisted=True)},
    )
    found = {name: listing(of).row(name) for name in ("a", "nick", "h", "far/gpt", "gpt", "s", "both", "", "x")}

    assert {name: row and row["id"] for name, row in found.items()} == {
        "a": "a",
        "nick": "a",
        "h": "h",
        "far/gpt": "far/gpt",
        "gpt": "far/gpt",
        "s": "s",
        "both": None,
        "": None,
        "x": None,
    }
    assert all(row in listing(of).rows() for name, row in found.items() if row and name not in ("h", "s"))


def test_one_row_of_an_alias_that_has_one():
    """Where aliases are listed they are themselves."""
    assert listing(config(model("a", "nick"), include_aliases_in_list=True)).row("nick")["id"] == "nick"


# ---- who sees what ------------------------------------------------------------------------------

ALL = config(
    model("a", "nick"),
    model("b"),
    peers=PEERS,
    selectors={"s": selector("s", "warm", "nick", "b"), "out": selector("out", "pin", "far/gpt")},
    profiles={"work": ProfileConfig("work", {"new": "a", "far-away": "far/gpt", "chosen": "s"})},
)


@pytest.mark.parametrize(
    ("key", "seen"),
    [
        pytest.param(key("a"), ["a", "chosen", "new", "s"], id="a model: by whatever name leads to it"),
        pytest.param(key("b"), ["b", "chosen", "s"], id="a target of a selector"),
        pytest.param(key("nick"), ["chosen", "nick", "s"], id="an alias, and not the model itself"),
        pytest.param(key("s"), ["chosen", "s"], id="a selector, and none of its targets by itself"),
        pytest.param(key("new"), ["new"], id="a pin"),
        pytest.param(key("gpt"), ["gpt"], id="a peer's model by its short name"),
        pytest.param(
            key("far/*"), ["far-away", "far/both", "far/gpt", "far/org/x", "far/pick", "out"], id="those of a peer"
        ),
        pytest.param(key("far/*", peers=False), [], id="which it may not ask"),
        pytest.param(
            Key("some", b"", peers=False), ["a", "b", "chosen", "new", "s"], id="all but those of peers, by any name"
        ),
        pytest.param(key(), [], id="none"),
    ],
)
def test_a_key_sees_what_it_may_use(key, seen):
    """And nothing else; what it may not see by one name it may not by another."""
    assert ids(ALL, key, "work") == seen


def test_a_short_name_that_means_something_else_shows_no_peer():
    """Two peers offer it, or it is a model of ours, or a selector: who is given that name is given that."""
    of = config(model("a"), peers=PEERS, selectors={"pick": selector("pick", "pin", "a")})

    assert ids(of, key("both")) == []
    assert ids(of, key("a")) == ["a", "pick"]
    assert ids(of, key("pick")) == ["pick"]


def test_one_row_is_as_hidden_as_in_the_list():
    """Also by a name that means it: nobody finds out what there is."""
    assert listing(ALL, key("b")).row("a") is None
    assert listing(ALL, key("b")).row("nick") is None
    assert listing(ALL, key("nick")).row("a") is None
    assert listing(ALL, key("nick")).row("nick")["meta"]["llamaswap"] == {"type": "alias", "modelID": "a"}


NAMES = sorted({*ids(ALL, profile="work"), "nick", "gpt", "both"})


@given(st.sets(st.sampled_from([*NAMES, "far/*", "*", "n*"])), st.booleans())
def test_every_row_can_be_asked_for(models, peers):
    """Whatever a key is for: a row it sees is of a name by which some model answers it, and no such name is unseen."""
    some = key(*models, peers=peers)
    names = Names(ALL)
    usable = set()
    for name in NAMES:
        pinned = names.pinned(name, "work")
        usable |= {name for target in names.targets(pinned) if may_use(some, name, pinned, target)}
    rows = listing(ALL, some, "work").rows()

    assert {row["id"] for row in rows} <= usable
    reachable = {target.real for name in usable for target in names.targets(names.pinned(name, "work"))}
    shown = {target.real for row in rows for target in names.targets(names.pinned(row["id"], "work"))}
    assert reachable == shown


# ---- through a daemon -----------------------------------------------------------------------------


async def test_the_lists_of_a_daemon():
    """Two paths for the same; one model by any name of it; the time is that of the daemon's start, whoever asks."""
    models = {"org/a": scripted(aliases=["nick"]), "b": scripted(unlisted=True)}
    async with daemon(models) as served:
        get = partial(fetch, served.port, "GET")
        rows = (await get("/v1/models")).json()
        assert rows["object"] == "list"
        [row] = rows["data"]
        assert (await get("/models")).json() == rows
        for name in ("org/a", "org%2Fa", "nick"):
            assert (await get(f"/v1/models/{name}")).json() == row
        assert (await get("/v1/models/b")).json()["id"] == "b"

        await fetch(served.port, "POST", "/v1/chat/completions", chat("nick"))
        assert (await get("/v1/models/nick")).json() == {**row, "status": LOADED}


async def test_a_model_that_is_not_there():
    """A 404 that says which may have been meant."""
    async with daemon({"model": scripted()}) as served:
        answer = await fetch(served.port, "GET", "/v1/models/modell")
        assert (await fetch(served.port, "POST", "/v1/models/model")).status == 405
    assert answer.status == 404
    assert answer.json()["error"]["message"] == 'model "modell" is not configured; did you mean "model"?'
