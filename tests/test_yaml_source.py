"""YAML texts: types of plain scalars, places, merges and aliases, and every text that is refused."""

from __future__ import annotations

import math
import re

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from trioswap.config import yaml_source
from trioswap.config.document import Document, Place, Unreadable
from trioswap.config.mistakes import Mistakes
from trioswap.config.scalars import resolve
from trioswap.config.yaml_source import parse_yaml

LOADERS = [yaml.BaseLoader]
if hasattr(yaml, "CBaseLoader"):
    LOADERS.append(yaml.CBaseLoader)


@pytest.fixture(autouse=True, params=LOADERS, ids=lambda loader: loader.__name__)
def loader(request, monkeypatch):
    """Both parsers of PyYAML: the C one is not built in everywhere."""
    monkeypatch.setattr(yaml_source, "LOADER", request.param)


def parse(text: str) -> Document:
    """The document *text*, which has no mistakes."""
    mistakes = Mistakes()
    document = parse_yaml(text, "c.yaml", mistakes)
    assert mistakes.lines() == []
    return document


def refusal(text: str) -> str:
    """The line about the text *text*, without PyYAML's reason."""
    with pytest.raises(Unreadable) as caught:
        parse_yaml(text, "c.yaml", Mistakes())
    line = caught.value.line_about("c.yaml")
    assert len(line.splitlines()) == 1
    return re.sub(r" \(column \d+: .*\)$", "", line)


# ---- scalars --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        # only these are null and flags
        *[(text, None) for text in ("", "~", "null", "Null", "NULL")],
        *[(text, True) for text in ("true", "True", "TRUE")],
        *[(text, False) for text in ("false", "False", "FALSE")],
        *[(text, text) for text in ("on", "off", "yes", "no", "y", "N", "nULL", "tRUE", "None")],
        # integers
        ("0", 0),
        ("-0", 0),
        ("42", 42),
        ("+7", 7),
        ("-13", -13),
        ("1_000", 1000),
        ("0x1F", 31),
        ("-0x1f", -31),
        ("0b101", 5),
        ("0o17", 15),
        ("017", 15),
        ("0123", 83),
        (str(2**64 - 1), 2**64 - 1),
        (str(-(2**63)), -(2**63)),
        (str(2**64), float(2**64)),
        (str(-(2**63) - 1), float(-(2**63) - 1)),
        # floats
        ("0.5", 0.5),
        (".5", 0.5),
        ("5.", 5.0),
        ("1e5", 1e5),
        ("1.0e+5", 1e5),
        ("-1.5E-3", -0.0015),
        ("089", 89.0),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("+.Inf", math.inf),
        # text
        ("1:30", "1:30"),
        ("2001-12-14", "2001-12-14"),
        ("2001-12-14T21:59:43.10-05:00", "2001-12-14T21:59:43.10-05:00"),
        ("1.2.3", "1.2.3"),
        ("0x", "0x"),
        ("0x" + "f" * 17, "0x" + "f" * 17),
        ("1e999", "1e999"),
        ("_1", "_1"),
        ("._5", "._5"),
        (".", "."),
        ("-", "-"),
        ("127.0.0.1", "127.0.0.1"),
        ("inf", "inf"),
        ("nan", "nan"),
        (f"0.{'1' * 398}", 1 / 9),
        (f"0.{'1' * 399}", f"0.{'1' * 399}"),
    ],
)
def test_plain_scalars_have_the_types_of_yaml_v3(text, value):
    """Where no type is asked for (core reference, part 10)."""
    resolved = resolve(text)

    assert (type(resolved), resolved) == (type(value), value)


def test_nan_is_a_number():
    """The one value that equals nothing."""
    assert all(math.isnan(resolve(text)) for text in (".nan", ".NaN", ".NAN"))


@settings(derandomize=True, deadline=None, max_examples=500)
@given(st.text(alphabet="0123456789abefxo+-._E:", max_size=12))
def test_any_scalar_resolves(text):
    """To something of which the text is one way to write it, or to itself."""
    value = resolve(text)

    if isinstance(value, int) and text.strip("+-0123456789") == "" and not text.lstrip("+-").startswith("0"):
        assert value == int(text)
    elif isinstance(value, float) and math.isfinite(value):
        assert value == float(text.replace("_", ""))
    assert isinstance(value, str | int | float | None)


def test_scalars_in_their_places():
    """Quotes, blocks and tags make text; plain scalars keep what was written beside their value."""
    document = parse("a: 0123\nb: '0123'\nc: |\n  0123\nd: !!str 0123\ne: ! 7\nf: !!float 1\ng: on\nh: [0x10, ~]\n")

    assert document.values == {
        "a": 83, "b": "0123", "c": "0123\n", "d": "0123", "e": "7", "f": 1.0, "g": "on", "h": [16, None],
    }  # fmt: skip
    assert document.texts == {("a",): "0123", ("g",): "on", ("h", 0): "0x10", ("h", 1): "~"}
    assert type(document.values["f"]) is float


def test_keys_are_text_as_they_are_written():
    """A model may be called 1 or on; llama-swap then drops all models."""
    values = parse("1: a\n0123: b\non: c\n~: d\n1.50: e\n'q': f\ntrue: g\n2001-01-01: h\n").values

    assert list(values) == ["1", "0123", "on", "~", "1.50", "q", "true", "2001-01-01"]


def test_the_order_of_keys_is_that_of_the_file():
    """Macros and sets of a matrix depend on it."""
    assert list(parse("z: 1\na: 2\nm: 3\n").values) == ["z", "a", "m"]


# ---- places ---------------------------------------------------------------------------------


def test_keys_and_elements_have_places():
    """Line and column count from 1; a key stands where it begins, an element where its value does."""
    document = parse("# c\na:\n  bé: {c: 1, d: [x,\n    y]}\ne:\n- f: 1\n  g: 2\n-   h\n")

    assert {path: (place.line, place.column) for path, place in document.places.items()} == {
        ("a",): (2, 1),
        ("a", "bé"): (3, 3),
        ("a", "bé", "c"): (3, 8),
        ("a", "bé", "d"): (3, 14),
        ("a", "bé", "d", 0): (3, 18),
        ("a", "bé", "d", 1): (4, 5),
        ("e",): (5, 1),
        ("e", 0): (6, 3),
        ("e", 0, "f"): (6, 3),
        ("e", 0, "g"): (7, 3),
        ("e", 1): (8, 5),
    }
    assert document.places[("a",)].file == "c.yaml"


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("start", ["", "\ufeff"], ids=["plain", "BOM"])
def test_files_of_other_systems_read_the_same(start, end):
    """Byte order mark and CRLF change neither values nor places."""
    document = parse(start + "a: x" + end + "b:" + end + "  c: |" + end + "    y" + end + "    z" + end)

    assert document.values == {"a": "x", "b": {"c": "y\nz\n"}}
    assert document.places[("a",)] == Place("c.yaml", 1, 1)
    assert document.places[("b", "c")] == Place("c.yaml", 3, 3)


@pytest.mark.parametrize("text", ["", "\ufeff", "# nothing\n", "---\n", "~\n", "--- # c\n...\n", "\n\n"])
def test_a_file_that_says_nothing_is_empty(text):
    """It has no keys, and no mistakes."""
    document = parse(text)

    assert (document.values, document.places) == ({}, {})


def test_directives_and_markers_are_allowed():
    """One document may begin with --- and end with `...`."""
    assert parse("%YAML 1.2\n---\na: 1\n...\n").values == {"a": 1}


# ---- aliases and merges -----------------------------------------------------------------------


def test_an_alias_is_a_copy():
    """With the places of what it stands for; as an element it stands where the alias is."""
    document = parse("a: &x\n  k: [1]\nb: *x\nc: [*x]\n")

    assert document.values == {"a": {"k": [1]}, "b": {"k": [1]}, "c": [{"k": [1]}]}
    assert document.values["a"]["k"] is not document.values["b"]["k"]
    assert document.places[("b",)].line == 3
    assert document.places[("b", "k")].line == 2
    assert document.places[("c", 0)] == Place("c.yaml", 4, 5)
    assert document.texts[("c", 0, "k", 0)] == "1"


def test_an_anchor_may_be_set_again():
    """An alias means the last one before it (YAML 1.2, 7.1)."""
    assert parse("a: &x 1\nb: *x\nc: &x 2\nd: *x\n").values == {"a": 1, "b": 1, "c": 2, "d": 2}


@pytest.mark.parametrize(
    ("text", "merged"),
    [
        ("<<: *x\n  b: 9", {"a": 1, "b": 9}),
        ("b: 9\n  <<: *x", {"b": 9, "a": 1}),
        ("<<: {a: 5, c: 6}", {"a": 5, "c": 6}),
        ("<<: [*x, *y]", {"a": 1, "b": 2, "c": 4}),
        ("<<: [*y, *x]", {"b": 3, "c": 4, "a": 1}),
        ("k: 0\n  <<: *x\n  l: 0", {"k": 0, "a": 1, "b": 2, "l": 0}),
        ("<<: *z", {"c": 7, "b": 3}),
        ("!!merge <<: *x", {"a": 1, "b": 2}),
        ("'<<': *x", {"<<": {"a": 1, "b": 2}}),
    ],
)
def test_merge_keys(text, merged):
    """Written keys win, then the first mapping; merged ones come in where the `<<` stands."""
    anchors = "x: &x {a: 1, b: 2}\ny: &y {b: 3, c: 4}\nz: &z {c: 7, <<: *y}\n"
    values = parse(f"{anchors}t:\n  {text}\n").values["t"]

    assert (values, list(values)) == (merged, list(merged))


def test_merged_keys_stand_where_they_are_written():
    """So a mistake in one names the line to repair."""
    document = parse("x: &x\n  a: 1\nt:\n  <<: *x\n")

    assert document.places[("t", "a")].line == 2
    assert ("t", "<<") not in document.places


# ---- references within brackets -----------------------------------------------------------------


def test_references_within_brackets_are_text():
    """There the braces of ${NAME} are structure, which would make such a text unreadable."""
    document = parse('a: [${env.X}, "${b}", -${c}-]\nb: {c: ${PORT}, ${k}: 1}\nd: ${e}\n')

    assert document.values == {
        "a": ["${env.X}", "${b}", "-${c}-"], "b": {"c": "${PORT}", "${k}": 1}, "d": "${e}",
    }  # fmt: skip
    assert document.texts[("a", 0)] == "${env.X}"
    assert document.places[("a", 1)] == Place("c.yaml", 1, 15)


def test_a_mistake_beside_references_within_brackets_is_told():
    """The references are not to blame for it, and are shown as they are written."""
    assert refusal("a: [${X}]\nb: @${Y}\n") == (
        'c.yaml:2: found "@" at the beginning of a value, allowed is such text in quotes'
    )
    assert refusal("a: [${X}, *${Y}]\n").startswith("c.yaml:1: ")


def test_characters_that_hide_references_may_be_in_the_file():
    """They are text then, and nothing is hidden."""
    assert parse("a: '\ue000\ue001x\ue002'\n").values == {"a": "\ue000\ue001x\ue002"}
    assert "bracket" in refusal("a: [${X}]\nb: \ue000\n")


# ---- what is refused ----------------------------------------------------------------------------

FITS = (
    "found what fits neither the line before nor, by its indentation, those above, "
    "allowed are `key: value` or `- item`, indented like their neighbours"
)
COLON = 'found ":" where no key can end, allowed is one `key: value` on a line, with text that holds ": " in quotes'
BRACKET = "found neither a comma nor the closing bracket of a list or mapping in brackets, allowed is one of them"
QUOTE = "found a quote that is never closed, allowed are quotes in pairs"
NO_COLON = "found a key without its colon, allowed is key: value"
ESCAPE = r"found an unknown escape within double quotes, allowed are \\ for a backslash, or 'single' quotes"
TAGS = "allowed here are !!str, !!int, !!float, !!bool, !!null, or none"
ALIAS = "allowed is the name of an anchor (&{}) that is complete before it"
DEEP = "found values nested more than 100 levels deep, allowed are fewer levels"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        # syntax
        ("a:\n\tb: 1\n", "2: found a tab, allowed are spaces to indent with"),
        ("a: b\n\tc: d\n", "2: found a tab, allowed are spaces to indent with"),
        ("a: b: c\n", f"1: {COLON}"),
        ('a: 1\nb: "x\nc: y\n', f"2: {QUOTE}"),
        ("a: 1\nb: 'x\n", f"2: {QUOTE}"),
        ("a: @x\n", '1: found "@" at the beginning of a value, allowed is such text in quotes'),
        ("a: `x`\n", '1: found "`" at the beginning of a value, allowed is such text in quotes'),
        ("a:\n  b: 1\n c: 2\n", f"3: {FITS}"),
        ("- a\nb: 1\n", f"2: {FITS}"),
        ('a: "b" c\n', f"1: {FITS}"),
        ("a: 1\nkey\n", f"2: {NO_COLON}"),
        ("a: [1,\n  2\n", f"3: {BRACKET}"),
        ("a: {b: 1\n c: 2}\n", f"2: {BRACKET}"),
        ('a: "\\q"\n', f"1: {ESCAPE}"),
        ('a: "\\xZZ"\n', f"1: {ESCAPE}"),
        ("a: - b\n", "1: found what is no YAML, allowed is YAML"),
        # characters
        ("a: 1\nb: \0\n", "2: found the character U+0000, allowed are printable ones"),
        ("a: \x1b\n", "1: found the character U+001B, allowed are printable ones"),
        # one document, one mapping
        ("a: 1\n---\nb: 2\n", "2: found a second document (---), allowed is one in a file"),
        ("- a\n", "1: found a list at the top of the file, allowed are keys with values (key: value)"),
        ("\nx\n", "2: found text at the top of the file, allowed are keys with values (key: value)"),
        ("5\n", "1: found text at the top of the file, allowed are keys with values (key: value)"),
        # keys
        ("a: 1\n? [b]\n: 1\n", "2: found a list as a key, allowed is text"),
        ("? {b: 1}\n: 1\n", "1: found a mapping as a key, allowed is text"),
        ("<<: 5\n", "1: found a single value behind <<, allowed is a mapping, or a list of mappings"),
        ("<<: [{}, []]\n", "1: found a list behind <<, allowed is a mapping, or a list of mappings"),
        # tags
        ("a: !!timestamp 2001-01-01\n", f"1: found the tag !!timestamp, {TAGS}"),
        ("a: !!python/name:os.system x\n", f"1: found the tag !!python/name:os.system, {TAGS}"),
        ("a: !mine x\n", f"1: found the tag !mine, {TAGS}"),
        ("a: !<int> 5\n", f"1: found the tag int, {TAGS}"),
        ("a: !!set {x}\n", "1: found the tag !!set, allowed here are !!map, or none"),
        ("a: !!map []\n", "1: found the tag !!map, allowed here are !!seq, or none"),
        ("a: !!int x\n", '1: found "x" under the tag !!int, allowed is what it names'),
        ("a: !!int true\n", '1: found "true" under the tag !!int, allowed is what it names'),
        # aliases
        ("a: &abc 1\nb: *abd\n", f'2: found the alias *abd, {ALIAS.format("abd")}, did you mean "abc"?'),
        ("a: &x [*x]\n", f"1: found the alias *x, {ALIAS.format('x')}"),
        # bounds
        ("a: " + "[" * 101, f"1: {DEEP}"),
        ("a: " + "[" * 100_000, f"1: {DEEP}"),
        ("- " * 101, f"1: {DEEP}"),
    ],
)  # fmt: skip
def test_a_text_that_is_no_document_is_refused(text, line):
    """In words that say what to repair, with the line, whichever parser found it."""
    assert refusal(text) == f"c.yaml:{line}"


def test_the_reason_of_the_parser_is_kept():
    """It may tell more to whoever knows YAML well."""
    with pytest.raises(Unreadable, match=r"\(column 5: mapping values are not allowed"):
        parse_yaml("a: b: c\n", "c.yaml", Mistakes())


def test_half_a_character_is_refused():
    """Such text could not be written to a log or an answer; each parser has its own words for it."""
    assert refusal('a: "\\ud800"\n').startswith("c.yaml:1: found ")


def test_keys_that_are_there_twice_are_mistakes():
    """All of them, each with both places; the first one stays."""
    mistakes = Mistakes()
    document = parse_yaml("a: 1\nb:\n  c: 1\n  c: 2\na: 3\n'1': x\n1: y\nd: {e: 1, e: 2}\n", "c.yaml", mistakes)
    mistakes.places = document.places

    assert mistakes.lines() == [
        "c.yaml:1: a: found it again on line 5, allowed is once",
        "c.yaml:3: b.c: found it again on line 4, allowed is once",
        "c.yaml:6: 1: found it again on line 7, allowed is once",
        "c.yaml:8: d.e: found it twice on the line, allowed is once",
    ]
    assert document.values == {"a": 1, "b": {"c": 1}, "1": "x", "d": {"e": 1}}


def test_two_merge_keys_are_a_mistake_too():
    """A list says the same with a clear order."""
    mistakes = Mistakes()
    parse_yaml("<<: {a: 1}\n<<: {b: 1}\n", "c.yaml", mistakes)

    assert mistakes.lines() == ['"<<": found it again on line 2, allowed is once']


# ---- bombs --------------------------------------------------------------------------------------


@pytest.fixture
def few_values(monkeypatch):
    """A bound that is soon reached."""
    monkeypatch.setattr(yaml_source, "MAX_VALUES", 5_000)


def test_aliases_of_aliases_are_bounded(few_values):
    """A text of a few lines stands for a billion values; what is made is counted."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]

    line = refusal("\n".join(lines))

    assert "found more than 1,000,000 values, allowed are fewer (what an alias stands for counts each time)" in line


def test_merges_of_merges_are_bounded(few_values):
    """Also when each step merges the one before it three times, and adds nothing to it."""
    lines = ["a0: &a0 {k: 1, l: 1}"]
    lines += [f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}, *a{n - 1}]}}" for n in range(1, 1_000)]

    assert "found more than 1,000,000 values" in refusal("\n".join(lines))


def test_many_values_are_read(few_values):
    """Up to the bound; the list itself is one of them."""
    assert len(parse("a: [" + "1, " * 4_998 + "1]").values["a"]) == 4_999


def test_nesting_by_aliases_is_bounded():
    """Each level may come from another line."""
    lines = ["a0: &a0 []"] + [f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 150)]

    assert refusal("\n".join(lines)).endswith(DEEP)


def test_a_chain_of_merges_that_were_never_made_is_bounded():
    """What a written key hides is not made, so a merge of it follows the whole chain."""
    lines = ["a0: &a0 {k: 1}"]
    lines += [f"a{n}: {{<<: {{k: &a{n} {{<<: *a{n - 1}}}}}, k: 1}}" for n in range(1, 1_000)]

    assert refusal("\n".join([*lines, "z: {<<: *a999}"])).endswith(DEEP)


def test_a_long_chain_of_merges_is_read():
    """What has been merged once is not followed again."""
    lines = ["a0: &a0 {k: 1}"] + [f"a{n}: &a{n} {{<<: *a{n - 1}}}" for n in range(1, 1_000)]

    assert parse("\n".join(lines)).values["a999"] == {"k": 1}


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.text(alphabet="ab:- \n\t'\"[]{},&*!|>%@`#?<~0.1\\$e\ue000\ufeff", max_size=40))
def test_any_text_is_a_document_or_refused(text):
    """Nothing else comes out of the parser, and every key of the values has a place."""
    try:
        document = parse_yaml(text, "c.yaml", Mistakes())
    except Unreadable as exc:
        line = exc.line_about("c.yaml")
    else:
        line = ""
        assert {(key,) for key in document.values} == {path for path in document.places if len(path) == 1}
    assert len(line.splitlines()) <= 1
