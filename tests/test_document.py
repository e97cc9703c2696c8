"""Documents: places fall back to what holds a key, copies keep them, and files are read within bounds."""

from __future__ import annotations

import pytest

from trioswap.config.document import MAX_BYTES, Copying, Document, Place, Unreadable, read_file
from trioswap.config.mistakes import Mistakes

TABLE = Place("c.yaml", 1, 1)
KEY = Place("c.yaml", 2, 3)


def document() -> Document:
    """`a: {b: 0123, c: [x]}` as YAML says it, over three lines."""
    return Document(
        {"a": {"b": 83, "c": ["x"]}},
        {("a",): TABLE, ("a", "b"): KEY, ("a", "c"): Place("c.yaml", 3, 3), ("a", "c", 0): Place("c.yaml", 3, 7)},
        texts={("a", "b"): "0123"},
        shown={("a", "b"): ("A", "B")},
    )


@pytest.mark.parametrize(
    ("path", "place"),
    [(("a", "b"), KEY), (("a", "b", "x", 3), KEY), (("a", "z"), TABLE), (("z",), None), ((), None)],
)
def test_what_has_no_place_stands_where_its_holder_does(path, place):
    """The nearest one that is known."""
    assert document().place(path) == place


def test_a_place_reads_as_editors_take_it():
    """FILE:LINE."""
    assert str(KEY) == "c.yaml:2"


@pytest.mark.parametrize(("path", "text"), [(("a", "b"), "0123"), (("a", "c", 0), "x"), (("a", "c"), None)])
def test_a_scalar_as_text_is_what_was_written(path, text):
    """A number has the text it was written as; a list has none."""
    assert document().as_text(path) == text


def test_a_copy_takes_places_texts_and_spelling_along():
    """Under the new path, and of what is copied only."""
    source, target = document(), Document({}, {})

    copied = Copying(source, target, Mistakes()).copy(source.values["a"], ("a",), ("n", 4))

    assert copied == {"b": 83, "c": ["x"]}
    assert target.places[("n", 4, "b")] == KEY
    assert target.places[("n", 4, "c", 0)] == Place("c.yaml", 3, 7)
    assert len(target.places) == len(source.places)
    assert target.texts == {("n", 4, "b"): "0123"}
    assert target.shown == {("n", 4, "b"): ("A", "B")}


def test_a_copy_shares_nothing_with_its_source():
    """Whoever changes one does not change the other."""
    source, target = document(), Document({}, {})
    copied = Copying(source, target, Mistakes()).copy(source.values, (), ())

    copied["a"]["c"].append("y")

    assert source.values["a"]["c"] == ["x"]


def test_keys_that_become_one_are_a_mistake():
    """The first stays."""
    source = Document({"a": 1, "b": 2}, {("a",): TABLE, ("b",): KEY})
    target, mistakes = Document({}, {}), Mistakes()

    copied = Copying(source, target, mistakes, rename=lambda _: "same").copy(source.values, (), ())

    assert copied == {"same": 1}
    assert mistakes.lines() == ["same: found it again on line 2 once the names are filled in, allowed is once"]


@pytest.mark.parametrize(
    ("content", "mistake"),
    [
        (None, "c.toml: cannot read the file: No such file or directory"),
        (b"a\nb\xff", "c.toml:2: found byte 0xff, allowed is UTF-8"),
        (b" " * (MAX_BYTES + 1), "c.toml: found a file of more than 16 MiB, allowed are smaller ones"),
    ],
    ids=["missing", "not UTF-8", "too large"],
)
def test_a_file_that_cannot_be_read_is_told(tmp_path, content, mistake):
    """With the line, where there is one."""
    file = tmp_path / "c.toml"
    if content is not None:
        file.write_bytes(content)

    with pytest.raises(Unreadable) as caught:
        read_file(file)

    assert caught.value.line_about("c.toml") == mistake


def test_a_file_of_the_largest_size_is_read(tmp_path):
    """The bound itself is allowed."""
    file = tmp_path / "c.toml"
    file.write_bytes(b" " * MAX_BYTES)

    assert len(read_file(file)) == MAX_BYTES
