"""Merging documents: tables, arrays, scalars and null, tables of which a key belongs to one file, places."""

from __future__ import annotations

import pytest

from trioswap.config.document import Document
from trioswap.config.merge import IDENTITY, YAML_IDENTITY, merge
from trioswap.config.mistakes import Mistakes
from trioswap.config.yaml_source import parse_yaml


def merged(*texts: str, identity: frozenset[tuple[str, ...]] = YAML_IDENTITY) -> tuple[Document, list[str]]:
    """The YAML *texts* as files a, b, ... merged, and the mistakes."""
    mistakes = Mistakes()
    documents = [parse_yaml(text, name, mistakes) for text, name in zip(texts, "abcde", strict=False)]
    document = merge(documents, identity, mistakes)
    mistakes.places = document.places
    return document, mistakes.lines()


@pytest.mark.parametrize(
    ("texts", "values"),
    [
        (["a: 1", "b: 2"], {"a": 1, "b": 2}),
        (["a: {b: {c: 1}}", "a: {b: {d: 2}, e: 3}"], {"a": {"b": {"c": 1, "d": 2}, "e": 3}}),
        (["a: [1, 2]", "a: [2, [3]]", "a: [4]"], {"a": [1, 2, 2, [3], 4]}),
        (["a: 1", "a: 1"], {"a": 1}),
        (["a: x", "a: 'x'"], {"a": "x"}),
        (["a: 10", "a: 0xA"], {"a": 10}),
        # null yields, on either side and to everything
        (["a: ~", "a: 1"], {"a": 1}),
        (["a: 1", "a: ~"], {"a": 1}),
        (["a: ~", "a: {b: 1}"], {"a": {"b": 1}}),
        (["a: [1]", "a: ~"], {"a": [1]}),
        (["a: ~", "a: ~"], {"a": None}),
        (["models: ~", "models: {m: {}}"], {"models": {"m": {}}}),
        (["models: {m: ~}", "models: {m: {cmd: x}}"], {"models": {"m": {"cmd": "x"}}}),
        # an empty file says nothing
        (["", "a: 1", "# c"], {"a": 1}),
        # different keys of tables that belong to one file each
        (["models: {m: {}}", "models: {n: {}}"], {"models": {"m": {}, "n": {}}}),
        (["matrix: {vars: {}}", "matrix: {sets: {}}"], {"matrix": {"vars": {}, "sets": {}}}),
        # the rule is about keys of these tables, not about tables within them, nor about others
        (["macros: {a: 1}", "macros: {a: 1, b: 2}"], {"macros": {"a": 1, "b": 2}}),
        (["x: {models: {m: {a: 1}}}", "x: {models: {m: {b: 1}}}"], {"x": {"models": {"m": {"a": 1, "b": 1}}}}),
    ],
)
def test_what_goes_together(texts, values):
    """Core reference 1.2."""
    document, mistakes = merged(*texts)

    assert (document.values, mistakes) == (values, [])


def test_the_order_is_that_of_first_mention():
    """File by file: macros and sets depend on it."""
    document, _ = merged("b: 1\nmacros: {y: 1}", "a: 1\nmacros: {x: 1, y: 1, a: 1}")

    assert list(document.values) == ["b", "macros", "a"]
    assert list(document.values["macros"]) == ["y", "x", "a"]


@pytest.mark.parametrize(
    ("texts", "values", "line"),
    [
        (["a: 1", "\na: 2"], {"a": 1}, "a:1: a: found another value at b:2, allowed is the same in all files"),
        (["a: 1", "a: 1.0"], {"a": 1}, "a:1: a: found another value at b:1, allowed is the same in all files"),
        (["a: 1", "a: true"], {"a": 1}, "a:1: a: found another value at b:1, allowed is the same in all files"),
        (["a: 1", "a: '1'"], {"a": 1}, "a:1: a: found another value at b:1, allowed is the same in all files"),
        (["a: 1", "a: {}"], {"a": 1}, "a:1: a: found a single value here and a table at b:1, allowed is one kind"),
        (["a: []", "a: {}"], {"a": []}, "a:1: a: found an array here and a table at b:1, allowed is one kind"),
        (["a: {}", "a: x"], {"a": {}}, "a:1: a: found a table here and a single value at b:1, allowed is one kind"),
        (
            ["x: 1\nmodels:\n  m: {cmd: x}", "models: {m: {cmd: x}}"],
            {"x": 1, "models": {"m": {"cmd": "x"}}},
            "a:3: models.m: found it again at b:1, allowed is one file for each",
        ),
        (
            ["matrix: {sets: {a: b}}", "matrix: {sets: {c: d}}"],
            {"matrix": {"sets": {"a": "b"}}},
            "a:1: matrix.sets: found it again at b:1, allowed is one file for each",
        ),
        (
            ["a: {b: {c: 1}}", "a: {b: {d: 1}}", "a: {b: {c: 2}}"],
            {"a": {"b": {"c": 1, "d": 1}}},
            "a:1: a.b.c: found another value at c:1, allowed is the same in all files",
        ),
    ],
)
def test_what_contradicts(texts, values, line):
    """Is told with both places and without the values, some of which are secret; the first stays."""
    document, mistakes = merged(*texts)

    assert (document.values, mistakes) == (values, [line])


@pytest.mark.parametrize("path", sorted(YAML_IDENTITY))
def test_tables_of_which_a_key_belongs_to_one_file(path):
    """Those of llama-swap's names; of native names only what stands at the top."""
    head, tail = "".join(f"{{{key}: " for key in path), "}" * len(path)
    texts = [f"{head}{{k: {{{key}: 1}}}}{tail}" for key in "ab"]

    assert len(merged(*texts)[1]) == 1
    assert len(merged(*texts, identity=IDENTITY)[1]) == (1 if len(path) == 1 else 0)


def test_all_contradictions_are_told():
    """Not only the first."""
    _, mistakes = merged("a: 1\nb: 2\nc: {d: 3}", "a: 2\nb: 2\nc: {d: 4}")

    assert len(mistakes) == 2


def test_places_and_texts_come_along():
    """Those of appended elements under their new index; of a table the place where it is first named."""
    document, _ = merged("a:\n- x\nt: {}\nn: ~\nw: ~", "\n\na: [01, {k: 02}]\nt: {u: 03}\nn: 04\nw: 'q'")
    where = {path: str(place) for path, place in document.places.items()}

    assert where == {
        ("a",): "a:1",
        ("a", 0): "a:2",
        ("t",): "a:3",
        ("n",): "b:5",
        ("w",): "b:6",
        ("a", 1): "b:3",
        ("a", 2): "b:3",
        ("a", 2, "k"): "b:3",
        ("t", "u"): "b:4",
    }
    assert document.texts == {
        ("a", 0): "x", ("a", 1): "01", ("a", 2, "k"): "02", ("t", "u"): "03", ("n",): "04",
    }  # fmt: skip


def test_one_document_stays_as_it_is():
    """There is nothing to merge."""
    document = Document({"a": 1}, {})

    assert merge([document], IDENTITY, Mistakes()) is document


def test_no_source_is_changed():
    """What is merged is made anew."""
    mistakes = Mistakes()
    first, second = parse_yaml("a: {b: [1]}", "a", mistakes), parse_yaml("a: {b: [2], c: 3}", "b", mistakes)

    merge([first, second], IDENTITY, mistakes)

    assert (first.values, second.values) == ({"a": {"b": [1]}}, {"a": {"b": [2], "c": 3}})
