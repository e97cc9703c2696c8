"""Lines of mistakes: their order, their places, and the spelling of the file."""

from __future__ import annotations

import attrs
import pytest

from trioswap.config.mistakes import Mistakes, shown


@attrs.frozen
class Place:
    """What a document knows of a key."""

    file: str
    line: int
    column: int


PLACES = {
    ("models",): Place("a.toml", 3, 1),
    ("models", "x"): Place("a.toml", 4, 9),
    ("models", "x", "ttl"): Place("a.toml", 9, 1),
    ("models", "x", "aliases"): Place("a.toml", 5, 1),
    ("models", "x", "aliases", 0): Place("a.toml", 5, 12),
    ("models", "y"): Place("b.toml", 1, 9),
    ("listen",): Place("b.toml", 12, 1),
}


def lines(mistakes: Mistakes, *paths: tuple[str | int, ...]) -> list[str]:
    """What is told of something wrong at *paths*."""
    for path in paths:
        mistakes.add(path, "wrong")
    return mistakes.lines()


def test_without_places_lines_follow_the_keys():
    """In the order of the key paths, however they were found."""
    assert lines(Mistakes(), ("models", "y"), ("listen",), ("models", "x", "aliases", 0)) == [
        "listen: wrong",
        "models.x.aliases[0]: wrong",
        "models.y: wrong",
    ]


def test_with_places_lines_follow_the_files():
    """File and line come first, and what stands nowhere comes before all."""
    paths = [("listen",), ("models", "y"), ("models", "x", "ttl"), ("models", "x", "aliases", 0), ("policy",)]

    assert lines(Mistakes(PLACES), *paths) == [
        "policy: wrong",
        "a.toml:5: models.x.aliases[0]: wrong",
        "a.toml:9: models.x.ttl: wrong",
        "b.toml:1: models.y: wrong",
        "b.toml:12: listen: wrong",
    ]


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (("models", "x", "cmd"), "a.toml:4: models.x.cmd: wrong"),
        (("models", "x", "aliases", 7), "a.toml:5: models.x.aliases[7]: wrong"),
        (("models", "z", "env", "A"), "a.toml:3: models.z.env.A: wrong"),
    ],
)
def test_what_is_missing_stands_where_its_holder_does(path, line):
    """The nearest that the file has."""
    assert lines(Mistakes(PLACES), path) == [line]


def test_keys_are_spelled_as_in_the_file():
    """What has a spelling of its own, and what is within it."""
    spelled = {
        ("groups",): ("routing", "router", "settings", "groups"),
        ("models", "x", "check_endpoint"): ("models", "x", "checkEndpoint"),
    }
    mistakes = Mistakes(PLACES, spelled)

    assert lines(mistakes, ("groups", "g", "members", 0), ("models", "x", "check_endpoint"), ("listen",)) == [
        "routing.router.settings.groups.g.members[0]: wrong",
        "a.toml:4: models.x.checkEndpoint: wrong",
        "b.toml:12: listen: wrong",
    ]


def test_guesses_come_to_an_end():
    """Thousands of wrong names among thousands of names are told all the same, only without a guess."""
    mistakes = Mistakes()
    options = [f"name{index}" for index in range(5_000)]

    guesses = [mistakes.guess("nmae7", options) for _ in range(6)]

    assert [bool(guess) for guess in guesses] == [True] * 4 + [False] * 2


def test_nothing_is_shown_as_such():
    """YAML can say it."""
    assert shown(None) == "nothing"
