"""Places in TOML texts: the scanner finds the same keys as tomllib, each where it stands, and bounds what it reads."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from trioswap.config import toml_places
from trioswap.config.document import Unreadable
from trioswap.config.toml import parse_toml
from trioswap.config.toml_places import find_places

ROOT = Path(__file__).parent.parent
FILES = [*sorted((ROOT / "configs").glob("*.toml")), ROOT / "pyproject.toml"]


def paths(value: object, path: tuple[str | int, ...] = ()) -> set[tuple[str | int, ...]]:
    """Paths of all keys and array elements within *value*."""
    found = set()
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in inside:
        found |= {(*path, key)} | paths(inner, (*path, key))
    return found


def check(text: str) -> None:
    """The scanner agrees with tomllib about *text*, and each key stands where its place says."""
    places = find_places(text, "c.toml")
    lines = text.split("\n")

    assert set(places) == paths(tomllib.loads(text))
    for path, place in places.items():
        rest = lines[place.line - 1][place.column - 1 :]
        if isinstance(path[-1], str) and not rest.startswith("["):  # a table stands where its header begins
            assert key_at(rest) == path[-1]


def key_at(text: str) -> str:
    """The first part of the key with which *text* begins."""
    for end in range(1, len(text) + 1):
        try:
            found = tomllib.loads(f"{text[:end]} = 1")
        except tomllib.TOMLDecodeError:
            continue
        if text[end : end + 1] in ("", ".", " ", "\t", "=", "]"):
            return next(iter(found))
    raise AssertionError(text)


# ---- agreement ------------------------------------------------------------------------------


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_real_files(file):
    """The examples, and the file of this project."""
    check(file.read_text())


ODD = r"""
# comment [x] = "y"
a = 1 # [b]
"q.d" . 'r' .s = DDD
[not]
x = \DDD ""
DDD
	[ t . "u" ] # c
l = [ 1, # ]
 [ 2, { z.y = 3, "w" = '}' } ],
 DDDa
]DDD, QQQ'QQQ, 1979-05-27 07:32:00, [], {},
]
[[ aa ]]
b = 'x#y'
[[aa.c]]
d = {}
[[aa.c]]
[aa.c.e]
f=[]
[[aa]]
[aa.c]
g = inf
[t.u.v]
[x.y]
[x]
"\u00e9\"" = "\\"
'' = '\'
"e" . "" = DDD""\DDD""
""".replace("DDD", '"' * 3).replace("QQQ", "'" * 3)


@pytest.mark.parametrize(
    "text",
    [
        ODD,
        ODD.replace("\n", "\r\n"),
        "",
        "\n\n",
        "a=1",
        "a=[]\n[b]",
        "a = '''\n'''''\nb = 1\n",
        'a = """\\\\"""\nb = 1\n',
        'a = """\n\\"""\n[x]\n""" \nb = 1\n',
        "a = ['''x''''', 1]\nb = 1\n",
        'a = ["""x""""", 1]\nb = 1\n',
        "a = [\n  1\n  ,\n  # c ]\n  2\n  ,\n]\nb = 1",
        "a = {b = {c = [{d = 1}, {e = 2}]}}",
        "[a]\nb.c = 1\nb.d.e = 2\n[a.f]\n[g]\n",
        "[[a]]\n[[a.b]]\n[a.b.c]\n[[a.b]]\nx = 1\n[[a]]\n[[a.b]]\n",
        "a = 1e5\nb = 0xFF\nc = 1_000\nd = -inf\ne = 07:32:00\nf = true\n",
        'a = "#" # "\nb = \'"\' # \'\n',
        '"é" = 1\n',
        'x = "ünï"\t\n   "y z" = 1\n',
        "[a.b.c]\n[a]\nd = 1\n",
    ],
)
def test_odd_layouts(text):
    """Everything that TOML 1.0 lets a person do."""
    check(text)


def test_places_are_exact():
    """Line and column of a key, of an element, of the header of a table; columns count characters."""
    places = find_places('"ü" = 1\na = ["ü", {x = 1,\ty.z = 2}]\n\n  [ b . c ]\n[[d]]\n', "c.toml")

    assert {path: (place.line, place.column) for path, place in places.items()} == {
        ("ü",): (1, 1),
        ("a",): (2, 1),
        ("a", 0): (2, 6),
        ("a", 1): (2, 11),
        ("a", 1, "x"): (2, 12),
        ("a", 1, "y"): (2, 19),
        ("a", 1, "y", "z"): (2, 21),
        ("b",): (4, 5),
        ("b", "c"): (4, 3),
        ("d",): (5, 3),
        ("d", 0): (5, 1),
    }
    assert {place.file for place in places.values()} == {"c.toml"}


def test_a_table_stands_at_its_own_header():
    """And not where it is first named on the way to another."""
    places = find_places("[models.a.env]\nX = '1'\n[models.a]\ncmd = 'x'\n", "c.toml")

    assert places[("models", "a")].line == 3
    assert places[("models",)].line == 1


KEYS = st.text(max_size=4) | st.text(alphabet="ab-_.\"'\\\n\t[]{}#= é", max_size=4)
SCALARS = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63),
    st.floats(),
    st.datetimes(),
    st.dates(),
    st.times(),
    st.text(max_size=6),
    st.text(alphabet="\"'\\\n\t[]{}#=,\r a", max_size=8),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=12,
)


@settings(derandomize=True, deadline=None, max_examples=400)
@given(st.dictionaries(KEYS, VALUES, max_size=4), st.booleans())
def test_generated_documents(document, multiline):
    """Whatever a writer makes of any document."""
    check(tomli_w.dumps(document, multiline_strings=multiline))


@settings(derandomize=True, deadline=None, max_examples=600)
@given(st.text(alphabet="ab.=[]{}\"'#\n ,1\\\t", max_size=40), st.integers(0, len(ODD)), st.integers(0, 30))
def test_mangled_texts(stuffing, start, length):
    """Any text is gone through without an error; where tomllib reads it, the two agree."""
    for text in (stuffing, ODD[:start] + stuffing + ODD[start + length :]):
        places = find_places(text, "c.toml")
        try:
            document = tomllib.loads(text)
        except tomllib.TOMLDecodeError:
            continue
        assert set(places) == paths(document)


# ---- bounds -----------------------------------------------------------------------------------

DEEP = "found values nested more than 100 levels deep, allowed are fewer levels"


@pytest.mark.parametrize(
    "text",
    [
        ".".join("a" * 101) + " = 1",
        ".".join("a" * 100_000) + " = 1",
        f"[{'.'.join('a' * 101)}]",
        "\n".join(f"[[{'.'.join('a' * depth)}]]" for depth in range(1, 60)),
        "x = " + "[" * 101,
        "x = " + "{a = " * 101,
        f"[{'.'.join('a' * 99)}]\nb.c = 1",
    ],
    ids=["key", "long key", "header", "arrays of tables", "arrays", "inline tables", "key in a table"],
)
def test_deep_nesting_is_refused(text):
    """Before tomllib sees it, which would take very long over long keys."""
    with pytest.raises(Unreadable) as caught:
        parse_toml(text, "c.toml")

    assert caught.value.text == DEEP
    assert caught.value.line is not None


def test_nesting_up_to_the_bound_is_read():
    """A hundred levels of keys, or of arrays."""
    key, array = ".".join("a" * 100) + " = 1", "a = " + "[" * 99 + "1" + "]" * 99

    assert max(map(len, parse_toml(key, "c.toml").places)) == 100
    assert max(map(len, parse_toml(array, "c.toml").places)) == 100


def test_the_number_of_values_is_bounded(monkeypatch):
    """Whether they are keys or elements."""
    monkeypatch.setattr(toml_places, "MAX_VALUES", 10)

    assert len(find_places("a = [1, 2, 3, 4, 5, 6, 7, 8, 9]", "c.toml")) == 10
    with pytest.raises(Unreadable, match="found more than 1,000,000 values"):
        find_places("a = [1, 2, 3, 4, 5, 6, 7, 8, 9]\nb = 1", "c.toml")


class Counting(str):
    """A text that counts how many characters the scanner has searched for line breaks."""

    __slots__ = ()
    searched = 0

    def count(self, _: str, start: int = 0, end: int = 0) -> int:
        Counting.searched += end - start
        return super().count("\n", start, end)


@pytest.mark.parametrize(
    "text", ["a = [" + "1, " * 2_000 + "]", "a = 1\n[b]\n" * 2_000], ids=["one line", "many lines"]
)
def test_line_breaks_are_counted_once(text, monkeypatch):
    """So the time grows with the text and not with its square, also when all is on one line."""
    monkeypatch.setattr(Counting, "searched", 0)

    find_places(Counting(text), "c.toml")

    assert Counting.searched <= 2 * len(text)
