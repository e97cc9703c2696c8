"""Profiles, selectors and peers: names that lead on, what they come to, and what is wrong with them."""

from __future__ import annotations

import config_texts
import pytest

from trioswap.config import Config, loads
from trioswap.config.parts import (
    FilterConfig,
    PeerConfig,
    ProfileConfig,
    SelectorConfig,
    TimeoutConfig,
)
from trioswap.config.peers import peer_names

MODELS = "".join(f"\nmodels.{name}.cmd = 'x ${{PORT}}'" for name in "abc") + "\nmodels.a.aliases = ['al']\n"
PEERS = """
peers.p = { proxy = "http://p", models = ["m", "n", "deep/er"] }
peers.q = { proxy = "http://q", models = ["n", "m2"] }
"""
OWN = "allowed is a name of its own"
TARGET = "allowed is the name of a model, an alias, or the name of a peer's model"
PIN = "allowed is the name of a model, an alias, a selector or the name of a peer's model, or an empty text"


def mistakes(text: str) -> list[str]:
    """What is wrong with the file *text* beside three models and two peers, one line for each mistake."""
    return config_texts.mistakes(MODELS + PEERS + text)


def right(text: str) -> Config:
    """The file *text* beside three models and two peers."""
    return loads(MODELS + PEERS + text)


# ---- what is right --------------------------------------------------------------------------------


def test_every_key_of_a_profile_arrives():
    """An empty text stands for nobody."""
    config = right("profiles.x = { description = 'd', pins = { one = 'al', two = '', three = 'p/m' } }")

    assert config.profiles == {"x": ProfileConfig("x", {"one": "al", "two": None, "three": "p/m"}, "d")}


def test_every_key_of_a_selector_arrives():
    """Targets stay as they are written."""
    config = right("""
        [selectors.s]
        strategy = "spillover"
        targets = ["al", "p/m"]
        settings.spillover = 3
        name = "S"
        description = "d"
        unlisted = true
        metadata = { x = 1 }
    """)

    assert config.selectors == {"s": SelectorConfig("s", "spillover", ("al", "p/m"), 3, "S", "d", True, {"x": 1})}


def test_a_selector_of_two_keys_has_all_defaults():
    """How and what are enough."""
    config = right("selectors.s = { strategy = 'pin', targets = ['a'] }")

    assert config.selectors == {"s": SelectorConfig("s", "pin", ("a",))}


def test_every_key_of_a_peer_arrives():
    """Filters and timeouts are as those of models, but it has a minute for the head of an answer."""
    config = loads("""
        [peers.p]
        proxy = "https://h:8443/base/"
        api_key = "k"
        models = ["m", "m", "n"]
        filters = { strip_params = ["seed"] }
        timeouts = { connect = 1 }
        [peers.q]
        proxy = "http://h"
        models = ["m"]
        timeouts = { response_header = 0 }
    """)

    timeouts = TimeoutConfig(connect=1.0, response_header=60.0)
    expected = PeerConfig("p", "https://h:8443/base", ("m", "n"), "k", FilterConfig(("seed",)), timeouts)
    assert config.peers["p"] == expected
    assert config.peers["q"] == PeerConfig("q", "http://h", ("m",), timeouts=TimeoutConfig(response_header=None))


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("p/m", ("p", "m")),
        ("p/deep/er", ("p", "deep/er")),
        ("m", ("p", "m")),
        ("deep/er", ("p", "deep/er")),
        ("q/n", ("q", "n")),
        ("n", None),
        ("p", None),
        ("q/m", None),
    ],
)
def test_models_of_peers_are_known_by_two_names(name, found):
    """With the peer always, without it where only one peer has it."""
    assert peer_names(right("").peers).find(name) == found


def test_a_name_with_its_peer_wins_over_one_without():
    """A model that is called like PEER/MODEL of another peer is known with its own peer only."""
    config = loads(
        "peers.p = { proxy = 'http://h', models = ['m'] }\npeers.q = { proxy = 'http://h', models = ['p/m'] }"
    )
    names = peer_names(config.peers)

    assert (names.find("p/m"), names.find("q/p/m")) == (("p", "m"), ("q", "p/m"))


@pytest.mark.parametrize("target", ["a", "al", "p/n", "m2", "s", ""])
def test_what_a_pin_may_lead_to(target):
    """A model, an alias, a model of a peer by either name, a selector, or nobody."""
    assert right(f"selectors.s = {{ strategy = 'pin', targets = ['a'] }}\nprofiles.x.pins.y = '{target}'").profiles


def test_a_pin_may_have_the_name_of_a_model():
    """That is what profiles are for."""
    assert right("profiles.x.pins = { a = 'b', al = 'b', m = 'b' }").profiles


SPILLOVER = "selectors.s = { strategy = 'spillover', targets = ['al', 'b', 'p/m'] }\n"


@pytest.mark.parametrize(
    "rule",
    [
        "",
        "memory = {}",
        "groups.g = { members = ['a', 'b'], swap = false }",
        "groups.g = { members = ['a'], exclusive = false }\ngroups.h = { members = ['b'] }",
        "groups.g = { members = ['a'], persistent = true }\ngroups.h = { members = ['b'] }",
        "groups.g = { members = ['a'] }\nmemory = {}",
        "matrix.sets.s = 'c & (a | c) & (b | c)'",
        "matrix.sets = { s = 'a & +t', t = 'b | c' }",
    ],
)
def test_targets_of_spillover_that_can_be_resident_together(rule):
    """By groups, by a matrix, or because nothing is said against it; peers are never in the way."""
    assert right(SPILLOVER + rule).selectors


@pytest.mark.parametrize(
    ("rule", "why"),
    [
        ("groups = {}", 'of which groups never let "a" and "b" be resident together'),
        ("groups.g.members = ['a', 'b']", 'of which groups never let "a" and "b" be resident together'),
        (
            "groups.g.members = ['a']\ngroups.h.members = ['b']",
            'of which groups never let "a" and "b" be resident together',
        ),
        ("matrix.sets.s = 'a | b'", 'that no set of the matrix has together ("a", "b")'),
        ("matrix.sets = { s = 'a & c', t = 'b & c' }", 'that no set of the matrix has together ("a", "b")'),
    ],
)
def test_targets_of_spillover_that_cannot(rule, why):
    """A request could never spill over without putting out where it comes from."""
    assert mistakes(SPILLOVER + rule) == [
        f"selectors.s.targets: found targets {why}, allowed with spillover are targets that can be"
    ]


@pytest.mark.parametrize("strategy", ["pin", "warm"])
def test_other_strategies_need_no_room_for_all(strategy):
    """They have one target at a time."""
    assert right(f"selectors.s = {{ strategy = '{strategy}', targets = ['a', 'b'] }}\ngroups = {{}}").selectors


def test_a_matrix_of_too_many_combinations_is_believed():
    """The question is hard in general, and no file may hang its reader."""
    names = [f"m{index}" for index in range(40)]
    models = "".join(f"models.{name}.cmd = 'x ${{PORT}}'\n" for name in names)
    expression = " & ".join(f"({one} | {other})" for one, other in zip(names[::2], names[1::2], strict=True))
    text = f"{models}matrix.sets.s = '{expression}'\nhooks.on_startup.preload = {names}"

    assert len(loads(text).hooks.preload) == 40


# ---- what is wrong --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("profiles.x = {}", "profiles.x.pins: found no pin, allowed is at least one"),
        ("profiles.x = ['a']", "profiles.x: found an array, allowed is a table"),
        (
            "profiles.'' = { pins = { a = 'b' } }",
            'profiles."": found "", allowed is a name of printable characters without spaces around it',
        ),
        (
            "profiles.x.pins = { ' ' = 'a' }",
            'profiles.x.pins." ": found " ", allowed is a name of printable characters without spaces around it',
        ),
        ("profiles.x.pins = { y = 'all' }", f'profiles.x.pins.y: found "all", {PIN}, did you mean "al"?'),
        ("profiles.x.pins = { y = 5 }", 'profiles.x.pins.y: found 5, allowed is text in quotes, did you mean "5"?'),
        (
            "profiles.x.pins.'p/m' = 'a'",
            f'profiles.x.pins."p/m": found "p/m", which a model of peer "p" is called, {OWN}',
        ),
        (
            "selectors.s.targets = ['a']",
            "selectors.s.strategy: found none, allowed is one of pin, warm, spillover",
        ),
        (
            "selectors.s = { strategy = 'wram', targets = ['a'] }",
            'selectors.s.strategy: found "wram", allowed is one of pin, warm, spillover, did you mean "warm"?',
        ),
        ("selectors.s.strategy = 'pin'", "selectors.s.targets: found none, allowed is at least one"),
        (
            "selectors.s = { strategy = 'pin', targets = [] }",
            "selectors.s.targets: found none, allowed is at least one",
        ),
        (
            "selectors.s = { strategy = 'pin', targets = ['a', 'zzz'] }",
            f'selectors.s.targets[1]: found "zzz", {TARGET}',
        ),
        (
            "selectors.s = { strategy = 'pin', targets = ['n'] }",
            f'selectors.s.targets[0]: found "n", {TARGET}',
        ),
        (
            "selectors.s = { strategy = 'pin', targets = ['s'] }",
            f'selectors.s.targets[0]: found "s", which is a selector itself, {TARGET}',
        ),
        (
            "selectors.s = { strategy = 'pin', targets = ['a', 'b', 'al'] }",
            ('selectors.s.targets[2]: found "al", which "a" before it stands for already, allowed is each target once'),
        ),
        (
            "selectors.s = { strategy = 'pin', targets = ['p/m', 'm'] }",
            (
                'selectors.s.targets[1]: found "m", which "p/m" before it stands for already, '
                "allowed is each target once"
            ),
        ),
        (
            "selectors.s = { strategy = 'warm', targets = ['a', 'm2'] }",
            'selectors.s.targets[1]: found "m2", which is at a peer, allowed are models of our own with warm',
        ),
        (
            "selectors.s = { strategy = 'spillover', targets = ['a'], settings = { spillover = 0 } }",
            "selectors.s.settings.spillover: found 0, allowed is a whole number from 1 up",
        ),
        (
            "selectors.a = { strategy = 'pin', targets = ['b'] }",
            f'selectors.a: found "a", which is the name of a model, {OWN}',
        ),
        (
            "selectors.al = { strategy = 'pin', targets = ['b'] }",
            f'selectors.al: found "al", which is the name of model "a", as an alias, {OWN}',
        ),
        (
            "selectors.'p/m' = { strategy = 'pin', targets = ['b'] }",
            f'selectors."p/m": found "p/m", which a model of peer "p" is called, {OWN}',
        ),
        (
            "selectors.'x ' = { strategy = 'pin', targets = ['b'] }",
            'selectors."x ": found "x ", allowed is a name of printable characters without spaces around it',
        ),
        (
            "models.'p/m'.cmd = 'x ${PORT}'",
            f'models."p/m": found "p/m", which a model of peer "p" is called, {OWN}',
        ),
        (
            "models.b.aliases = ['x', 'q/n']",
            f'models.b.aliases[1]: found "q/n", which a model of peer "q" is called, {OWN}',
        ),
        (
            "models.b.filters.set_params_by_id.'q/n' = {}",
            f'models.b.filters.set_params_by_id."q/n": found "q/n", which a model of peer "q" is called, {OWN}',
        ),
        ("peers.r.models = ['x']", "peers.r.proxy: found none, allowed is the address of the peer"),
        ("peers.r.proxy = 'http://h'", "peers.r.models: found none, allowed is at least one"),
        ("peers.r = { proxy = 'http://h', models = [] }", "peers.r.models: found none, allowed is at least one"),
        (
            "peers.r = { proxy = 'http://h', models = [''] }",
            'peers.r.models[0]: found "", allowed is a name of printable characters without spaces around it',
        ),
        (
            "peers.'' = { proxy = 'http://h', models = ['x'] }",
            'peers."": found "", allowed is a name of printable characters without spaces around it',
        ),
        (
            "peers.r = { proxy = 'ftp://h', models = ['x'] }",
            'peers.r.proxy: found "ftp://h", allowed is http[s]://HOST[:PORT][/PATH]',
        ),
        (
            "peers.r = { proxy = 'https://h:0', models = ['x'] }",
            'peers.r.proxy: found port 0 in "https://h:0", allowed is 1 to 65535',
        ),
        (
            "listen = '127.0.0.1:443'\npeers.r = { proxy = 'https://localhost', models = ['x'] }",
            'peers.r.proxy: found "https://localhost", which is where trioswap listens, allowed is another address',
        ),
        (
            "peers.'p/deep' = { proxy = 'http://h', models = ['er'] }",
            f'peers."p/deep".models: found "p/deep/er", which a model of peer "p" is called already, {OWN}',
        ),
        (
            "peers.r = { proxy = 'http://h', models = ['x'], use_model_name = 'y' }",
            "peers.r.use_model_name: unknown key, allowed are proxy, api_key, models, filters, timeouts",
        ),
    ],
)
def test_a_mistake_is_told_in_one_line(text, line):
    """One mistake, one line: where, what was found, what is allowed; no other that follows from it."""
    assert mistakes(text) == [line]


@pytest.mark.parametrize(
    "text",
    [
        "selectors = 5\nprofiles.x.pins.y = 's'",
        "selectors.s = 5\nprofiles.x.pins.y = 's'",
        "models.b.aliases = 'bl'\nprofiles.x.pins.y = 'bl'",
        "models.b.filters = 'bl'\nselectors.s = { strategy = 'pin', targets = ['bl'] }",
        "peers.r = { proxy = 5, models = ['x'] }\nselectors.s = { strategy = 'pin', targets = ['x'] }",
        "peers.r = { proxy = 'http://h', models = 'x' }\nselectors.s = { strategy = 'pin', targets = ['r/x'] }",
        "listen = 'nowhere'\npeers.r = { proxy = 'http://nowhere', models = ['x'] }",
        "groups.g.members = ['a', 5]\n" + SPILLOVER,
        "matrix.sets.s = 'a &'\n" + SPILLOVER,
    ],
)
def test_a_mistake_hides_what_only_follows_from_it(text):
    """What cannot be known because of one mistake is not told as another."""
    assert len(mistakes(text)) == 1
