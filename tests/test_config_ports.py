"""Ports over reloads: who has one keeps it, and nobody gets one that somebody may still be listening on."""

from __future__ import annotations

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trioswap.config import Config
from trioswap.config.addresses import MAX_PORT
from trioswap.config.loading import load_sources
from trioswap.config.mistakes import Mistakes
from trioswap.config.ports import give_ports
from trioswap.config.raw import RawConfig
from trioswap.config.schema import START_PORT, ModelConfig
from trioswap.errors import ConfigError


@pytest.fixture
def load(tmp_path):
    """Loads a configuration of models with ports, and of more text, in the place of another."""

    def load(names: str, keep: Config | None = None, text: str = "", before: str = "") -> Config:
        models = "\n".join(f"[models.{name}]\ncmd = 'x ${{PORT}}'" for name in names)
        file = tmp_path / "c.toml"
        file.write_text(f"{before}\n{models}\n{text}")
        return load_sources([file], None, {}, lambda document, _: document, keep)

    return load


def ports(config: Config) -> dict[str, int]:
    """Those of all models that use one, as they are in commands and URLs too."""
    given = {model.name: model.port for model in config.models.values() if model.port is not None}
    for name, port in given.items():
        assert config.models[name].argv[-1] == str(port)
        assert config.models[name].proxy == f"http://127.0.0.1:{port}"
    return given


def test_without_an_earlier_configuration_they_follow_each_other(load):
    """And a model without ${PORT} has none."""
    config = load("cab", text="[models.aa]\ncmd = 'x'\nproxy = 'http://127.0.0.1:1'")

    assert ports(config) == {"a": 5800, "b": 5801, "c": 5802}
    assert config.models["aa"].port is None
    assert config.start_port == START_PORT == 5800


def test_a_new_model_shifts_nobody(load):
    """It gets the lowest port that is free, wherever its name stands."""
    old = load("bd")

    assert ports(load("abcd", old)) == {"b": 5800, "d": 5801, "a": 5802, "c": 5803}


def test_the_port_of_a_removed_model_is_nobodys_at_first(load):
    """Its server may still listen there; by the next reload it is gone."""
    first = load("abc")
    second = load("bcd", first)
    third = load("bcde", second)

    assert ports(second) == {"b": 5801, "c": 5802, "d": 5803}
    assert ports(third) == {"b": 5801, "c": 5802, "d": 5803, "e": 5800}


def test_a_model_that_drains_can_be_kept_in_mind(load):
    """Who reloads twice in a row hands in all whose servers still run."""
    first = load("abc")
    second = load("bc", first)
    running = attrs.evolve(second, models={**first.models, **second.models})

    assert ports(load("bcd", running)) == {"b": 5801, "c": 5802, "d": 5803}


def test_when_all_others_are_in_use_it_is_the_port_of_a_removed_model(load):
    """Better than none."""
    before = f"start_port = {MAX_PORT - 1}"
    old = load("ab", before=before)

    assert ports(load("bc", old, before=before)) == {"b": MAX_PORT, "c": MAX_PORT - 1}


def test_too_many_models_for_the_ports(load):
    """The same mistake as at the start."""
    before = f"start_port = {MAX_PORT - 1}"
    with pytest.raises(ConfigError) as caught:
        load("abc", load("ab", before=before), before=before)

    assert [mistake.partition("start_port: ")[2] for mistake in caught.value.mistakes] == [
        "found 65534, from which 3 models need the ports up to 65536, allowed is 1 to 65535"
    ]


@pytest.mark.parametrize(("start", "expected"), [(5801, {"a": 5802, "b": 5803}), (5799, {"a": 5799, "b": 5802})])
def test_another_start_port_is_a_wish_for_other_ports(load, start, expected):
    """All are given anew, and still none on which another's server may be."""
    old = load("ab")

    assert ports(load("ab", old, before=f"start_port = {start}")) == expected


def test_a_model_that_comes_to_use_its_port(load):
    """What it had been written to use was not given to it."""
    old = load("b", text="[models.a]\ncmd = 'x'\nproxy = 'http://127.0.0.1:5900'")

    assert ports(load("ab", old)) == {"b": 5800, "a": 5801}


def test_a_port_that_is_written_now_is_stepped_aside_for(load):
    """A start with this file would have had no clash, so a reload has none."""
    old = load("abc")
    literal = "[models.d]\ncmd = 'x'\nproxy = 'http://localhost:5802'"

    assert ports(load("bc", old, text=literal)) == {"b": 5801, "c": 5803}
    assert ports(load("bc", old, before="listen = '0.0.0.0:5802'")) == {"b": 5801, "c": 5803}


def test_a_port_of_another_machine_is_no_obstacle(load):
    """Servers there are in nobody's way."""
    literal = "[models.d]\ncmd = 'x'\nproxy = 'http://10.0.0.1:5801'"

    assert ports(load("abc", load("ab"), text=literal)) == {"a": 5800, "b": 5801, "c": 5802}


def test_a_port_that_models_of_a_group_share_is_kept(load):
    """It was written before, too, so nobody is restarted for it."""
    group = "\n[groups.g]\nmembers = ['a', 'd']"
    literal = "[models.d]\ncmd = 'x'\nproxy = 'http://127.0.0.1:5800'"
    old = load("a", text=literal + group)

    assert ports(load("a", old, text=literal + "\nttl = 1" + group)) == {"a": 5800}


def test_the_address_we_listen_on_is_given_to_nobody(load):
    """Also when the file does not say it: the command line may."""
    old = attrs.evolve(load("a"), listen="127.0.0.1:5801")

    assert ports(load("ab", old)) == {"a": 5800, "b": 5802}


names = st.lists(st.sampled_from("abcdefghij"), unique=True)


@given(st.lists(st.tuples(names, st.sampled_from([5800, 5803, MAX_PORT - 12])), min_size=2, max_size=6))
def test_over_any_reloads(reloads):
    """No two models share a port, none is out of range, and as long as start_port is the same each keeps its own."""
    keep = Config()
    for wanted, start in reloads:
        mistakes = Mistakes()
        found = give_ports(sorted(wanted), RawConfig(start_port=start), mistakes, keep)

        assert not mistakes.lines()
        assert found.keys() == set(wanted)
        assert len({*found.values()}) == len(found)
        assert all(start <= port <= MAX_PORT for port in found.values())
        before = {name: model.port for name, model in keep.models.items()}
        if start == keep.start_port:
            assert all(found[name] == before[name] for name in wanted if name in before)
        others = {name: {port for other, port in before.items() if other != name} for name in wanted}
        if start < MAX_PORT - 20:
            assert all(found[name] not in others[name] for name in wanted)
        models = {name: ModelConfig(name, ("x",), "http://127.0.0.1:1", port=port) for name, port in found.items()}
        keep = Config(models=models, start_port=start)


def test_thousands_of_models_are_no_work():
    """Each port is looked at once or twice, not once for each model: this would take hours."""
    wanted = sorted(f"m{index}" for index in range(MAX_PORT - START_PORT + 1))
    models = {name: ModelConfig(name, ("x",), "http://h", port=START_PORT + index) for index, name in enumerate(wanted)}
    renamed = [f"n{name}" for name in wanted]

    found = give_ports(renamed, RawConfig(), Mistakes(), Config(models=models))
    assert sorted(found.values()) == list(range(START_PORT, MAX_PORT + 1))
