"""JSON text: what leads a request is found, and an edit changes what it names and not a byte more."""

from __future__ import annotations

import json
import tracemalloc
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trioswap import jsonview
from trioswap.errors import BadRequest, MissingModel
from trioswap.jsontext import MAX_INDEX, Outline, Set, Strip, edit, outline, parts_of

PICTURE = b"QUJD/+" * 700_000
"""Like base64, 4 MB."""


SHORT = 8
"""A stride with which short strings are cut, but not the keys below."""


def cutting(stride: int = SHORT):
    """Within it, insides of strings are cut out that are merely so many bytes long, or twice as many."""
    return mock.patch.object(jsonview, "_STRIDE", stride)


# ---- outline ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "model", "stream"),
    [
        (b'{"model": "a"}', "a", False),
        (b' \t\r\n{"model"\n:\t"a" , "stream" : true }\n', "a", True),
        (b'{"stream": true, "model": "a", "stream": false, "model": "b"}', "b", False),
        (b'{"model": 1, "model": "b"}', "b", False),
        (b'{"messages": [{"model": "x", "stream": true}], "model": "a", "more": {"model": "y"}}', "a", False),
        (b'{"\\u006dodel": "\\u0061", "stre\\u0061m": true}', "a", True),
        ('{"model": "ümlaut 模型 😀"}'.encode(), "ümlaut 模型 😀", False),
        (b'{"model": "\\u00fc\\ud83d\\ude00"}', "ü😀", False),
        ('{"model": "\\u00fcü"}'.encode(), "üü", False),
        (b'\xef\xbb\xbf{"model": "a"}', "a", False),
        ('{"model": "ü", "stream": true}'.encode("utf-16"), "ü", True),
        ('{"model": "a"}'.encode("utf-32-be"), "a", False),
        (b'{"x": [NaN, -Infinity, 1e999, -0.0], "model": "a"}', "a", False),
        (b'{"model": "a", "stream": 1}', "a", False),
        (b'{"model": "a", "stream": "true"}', "a", False),
        (b'{"model": "a", "stream": {"a": true}}', "a", False),
        (b"{}", None, False),
        (b'{"model": null, "stream": true}', None, True),
        (b'{"model": ""}', None, False),
    ],
)
def test_what_leads_a_request(body, model, stream):
    """In any encoding and spelling; only the top level counts, and of duplicates the last."""
    assert outline(body) == Outline(model, stream)
    with cutting():
        assert outline(body) == Outline(model, stream)


BROKEN = [
    (b"", "the body is not JSON: Expecting value"),
    (b"model=a", "the body is not JSON: Expecting value"),
    (b'{"model": "a"', "the body is not JSON: Expecting ',' delimiter"),
    (b'{"model": "a"} {}', "the body is not JSON: Extra data"),
    (b'{"model": "a",}', "the body is not JSON: "),  # in other words since Python 3.13
    (b'{"model" "a"}', "the body is not JSON: Expecting ':' delimiter"),
    (b'{"\\u006dodel" "a"}', "the body is not JSON: Expecting ':' delimiter"),
    (b'{"model": }', "the body is not JSON: Expecting value"),
    (b"{model: 1}", "the body is not JSON: .*double quotes"),
    (b'{"model": "a\nb"}', "the body is not JSON: Invalid control character"),
    (b'{"mo\ndel": "a"}', "the body is not JSON: Invalid control character"),
    (b'{"model": "\\x"}', r"the body is not JSON: Invalid \\escape"),
    (b'{"model": "a", "x": "\xff"}', "the body is not JSON: 'utf-8' codec can't decode"),
    (b"\xff\xfe\xfd", "the body is not JSON: 'utf-16"),
    (b"[" * 200_000, "the body is not JSON: it is nested too deeply"),
    (b'{"model": ' + b'{"a":' * 200_000, "the body is not JSON: it is nested too deeply"),
    (b'{"x": ' + b"9" * 5000 + b"}", "the body is not JSON: a number has more than 4300 digits"),
    (b"9" * 5000, "the body is not JSON: a number has more than 4300 digits"),
    (b'["a"]', "the body must be a JSON object"),
    (b'[{"model": "a"}]', "the body must be a JSON object"),
    (b' "a"', "the body must be a JSON object"),
    (b"null", "the body must be a JSON object"),
]


@pytest.mark.parametrize(("body", "why"), BROKEN, ids=[repr(body[:30]) for body, _ in BROKEN])
@pytest.mark.parametrize("look", [outline, lambda body: edit(body, [Strip("model")])], ids=["outline", "edit"])
def test_what_is_no_object_is_a_mistake_of_the_client(look, body, why):
    """Each says what is wrong, however deep, long or odd it is."""
    with pytest.raises(BadRequest, match=why):
        look(body)
    with cutting(), pytest.raises(BadRequest, match=why):
        look(body)


@pytest.mark.parametrize("value", ["1", '["a"]', "false", "{}", '{"a": "b"}', "NaN"])
def test_a_model_is_a_string(value):
    """Nothing else is one, and an object is not taken for null."""
    with pytest.raises(BadRequest, match='"model" must be a string'):
        outline(f'{{"model": {value}}}'.encode())


def test_a_missing_model_is_told_when_it_is_needed():
    """Not there is no mistake by itself: a path or a query may name the model as well."""
    assert outline(b'{"model": "a"}').named() == "a"
    with pytest.raises(MissingModel, match="no model is named"):
        outline(b"{}").named()


@settings(derandomize=True, deadline=None, max_examples=90)
@given(st.text(alphabet='{}[]",:\\ \nabmu01é', max_size=30), st.integers(0, 90), st.integers(0, 30))
def test_mangled_bodies(stuffing, start, length):
    """Whether a body is JSON, and which model it names, is as json.loads has it, with and without cuts."""
    whole = '{"é": ["a\\"b", {"model": "bbbbbbbbbbbbbbbb"}, "aaaaaaaaaaaaaa"], "model": "aaaaaaaaaaaaaaaa"}'
    body = (whole[:start] + stuffing + whole[start + length :]).encode()
    try:
        document = json.loads(body)
    except ValueError:
        document = None

    for stride in (jsonview._STRIDE, SHORT):
        with cutting(stride):
            if isinstance(document, dict) and isinstance(document.get("model", ""), str):
                assert outline(body).model == (document.get("model") or None)
            else:
                with pytest.raises(BadRequest):
                    outline(body)
            if isinstance(document, dict):
                assert edit(body, [Strip("nothing")]) is body
            else:
                with pytest.raises(BadRequest):
                    edit(body, [Strip("nothing")])


# ---- edit: examples -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "change", "after"),
    [
        # replaced where it stands, added at the end
        ('{"a": 1, "b" : 2 }', Set("a", 3), '{"a": 3, "b" : 2 }'),
        ('{"a": 1, "b" : 2 }', Set("b", [True, None]), '{"a": 1, "b" : [true,null] }'),
        ('{"a": 1, "b" : 2 }', Set("c", {"d": "é"}), '{"a": 1, "b" : 2,"c":{"d":"\\u00e9"} }'),
        ("{}", Set("a", 1), '{"a":1}'),
        (" { } ", Set("a", 1), ' {"a":1 } '),
        ('{\n  "a": 1,\n  "b": 2\n}\n', Set("c", 3), '{\n  "a": 1,\n  "b": 2,"c":3\n}\n'),
        # taken out with its comma
        ('{"a": 1, "b": 2, "c": 3}', Strip("a"), '{ "b": 2, "c": 3}'),
        ('{"a": 1, "b": 2, "c": 3}', Strip("b"), '{"a": 1, "c": 3}'),
        ('{\n  "a": 1,\n  "b": 2\n}\n', Strip("b"), '{\n  "a": 1\n}\n'),
        ('{ "a": 1 }', Strip("a"), "{ }"),
        ('{"a": 1}', Strip("b"), '{"a": 1}'),
        # every duplicate
        ('{"a": 1, "b": 2, "a": 3}', Set("a", 0), '{"a": 0, "b": 2, "a": 0}'),
        ('{"a": 1, "b": 2, "\\u0061": 3}', Strip("a"), '{ "b": 2}'),
        ('{"a": {"b": 1}, "a": {"c": 1}}', Set("a.b", 0), '{"a": {"b": 0}, "a": {"c": 1,"b":0}}'),
        ('{"a": {"b": 1}, "a": {"c": 1, "b": 2}}', Strip("a.b"), '{"a": {}, "a": {"c": 1}}'),
        # what nobody named keeps its spelling
        ('{"x": 1.0e+02, "x": "\\u0041\\/é", "a": 1, "y": -0}', Set("a", 2), None),
        # nested, made where it is missing
        ('{"a": {"b": {"c": 1}}, "b": 1}', Set("a.b.c", 2), '{"a": {"b": {"c": 2}}, "b": 1}'),
        ('{"a": {"b": {"c": 1}}, "b": 1}', Strip("a.b"), '{"a": {}, "b": 1}'),
        ('{"x": 1}', Set("a.b.c", 2), '{"x": 1,"a":{"b":{"c":2}}}'),
        ('{"a": {}}', Set("a.b.c", 2), '{"a": {"b":{"c":2}}}'),
        ('{"x": 1}', Strip("a.b.c"), '{"x": 1}'),
        # what is in the way of a set gives way, and stops a strip
        ('{"a": null}', Set("a.b", 1), '{"a": {"b":1}}'),
        ('{"a": "text"}', Set("a.b", 1), '{"a": {"b":1}}'),
        ('{"a": 5}', Set("a.0", 1), '{"a": [1]}'),
        ('{"a": "text"}', Strip("a.b"), '{"a": "text"}'),
        ('{"a": [1]}', Strip("a.b"), '{"a": [1]}'),
        # arrays
        ('{"a": [1, 2 , 3]}', Set("a.1", 0), '{"a": [1, 0 , 3]}'),
        ('{"a": [1, {"b": 2}]}', Set("a.1.b", 0), '{"a": [1, {"b": 0}]}'),
        ('{"a": [ 1 ]}', Set("a.-1", 0), '{"a": [ 1,0 ]}'),
        ('{"a": [1]}', Set("a.-1.b", 0), '{"a": [1,{"b":0}]}'),
        ('{"a": []}', Set("a.-1", 0), '{"a": [0]}'),
        ('{"a": [1]}', Set("a.3", 0), '{"a": [1,null,null,0]}'),
        ("{}", Set("a.2", 0), '{"a":[null,null,0]}'),
        ("{}", Set("a.-1", 0), '{"a":[0]}'),
        ('{"a": [1, 2, 3]}', Strip("a.1"), '{"a": [1, 3]}'),
        ('{"a": [1, 2, 3]}', Strip("a.-1"), '{"a": [1, 2]}'),
        ('{"a": [1, 2, 3]}', Strip("a.3"), '{"a": [1, 2, 3]}'),
        ('{"a": []}', Strip("a.-1"), '{"a": []}'),
        ('{"a": [[1, 2], [3]]}', Strip("a.-1.0"), '{"a": [[1, 2], []]}'),
        ('{"a": [7, 7]}', Set("a.01", 0), '{"a": [7, 0]}'),
        # numbers as keys
        ('{"a": {"1": 2, "-1": 3}}', Set("a.1", 0), '{"a": {"1": 0, "-1": 3}}'),
        ('{"a": {"1": 2, "-1": 3}}', Set("a.-1", 0), '{"a": {"1": 2, "-1": 0}}'),
        ('{"a": {"1": 2, "-1": 3}}', Strip("a.-1"), '{"a": {"1": 2}}'),
        ("{}", Set("logit_bias.:42", -5), '{"logit_bias":{"42":-5}}'),
        ("{}", Set(f"a.{MAX_INDEX + 1}", 0), '{"a":{"1001":0}}'),
        ("{}", Set("logit_bias.50256", -5), '{"logit_bias":{"50256":-5}}'),
        # odd keys
        ('{"a.b": 1, "a": {"b": 2}}', Set("a\\.b", 0), '{"a.b": 0, "a": {"b": 2}}'),
        ('{"": {"": 1}}', Set(".", 0), '{"": {"": 0}}'),
        ('{":a": 1}', Strip("\\:a"), "{}"),
        ('{"é": 1, "\\u00e9": 2, "Ã©": 3}', Strip("é"), '{ "Ã©": 3}'),
        ('{"x": 1}', Set('é"', 0), '{"x": 1,"\\u00e9\\"":0}'),
        ('{"\\ud83d\\ude00": 1}', Strip("😀"), "{}"),
        ('{"\\ud800": 1}', Set("\ud800", 0), '{"\\ud800": 0}'),
    ],
)
def test_one_change(before, change, after):
    """What is named is changed, all else is the same; None: but for one digit."""
    after = before.replace('"a": 1', '"a": 2') if after is None else after

    assert edit(before.encode(), [change]).decode() == after
    with cutting():
        assert edit(before.encode(), [change]).decode() == after


def test_changes_follow_one_another():
    """A later one finds what an earlier one left."""
    changes = [Set("a", {"b": 1, "é": 2}), Set("a.é.c", 3), Strip("a.b"), Set("x.-1", 1), Set("x.-1", 2), Strip("y")]

    assert edit(b'{"y": 1}', changes) == b'{"a":{"\\u00e9":{"c":3}},"x":[1,2]}'


def test_an_array_is_not_given_up_for_a_key():
    """Unlike a word or a number, it may be what the client came for."""
    with pytest.raises(BadRequest, match='the body has an array where this server sets "b", which needs an object'):
        edit(b'{"a": [1]}', [Set("a.b", 0)])


@pytest.mark.parametrize("changes", [[], [Strip("b")], [Strip("a.b"), Strip("c.d")], [Set("a", 1)]])
def test_without_a_change_the_same_bytes_come_back(changes):
    """Not even a copy of them, whatever their encoding."""
    body = '{"a":1}'.encode("utf-16")

    assert edit(body, changes) is body


def test_encodings():
    """UTF-8 stays as it is, with its mark and with surrogates that stand alone; other encodings become UTF-8."""
    assert edit('\ufeff{"é": 1, "a": 2}'.encode(), [Set("a", 3)]) == '\ufeff{"é": 1, "a": 3}'.encode()
    assert edit('{"é": 1, "a": 2}'.encode("utf-16"), [Set("a", 3)]) == '{"é": 1, "a": 3}'.encode()
    alone = '{"b": "\ud800", "a": 1}'.encode("utf-8", "surrogatepass")
    assert edit(alone, [Strip("a")]) == alone.replace(b', "a": 1', b"")


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("a", [("a", None)]),
        ("a.b", [("a", None), ("b", None)]),
        ("a..", [("a", None), ("", None), ("", None)]),
        ("a\\.b.c", [("a.b", None), ("c", None)]),
        ("\\a\\\\.b", [("a\\", None), ("b", None)]),
        ("0.-1.1000.1001", [("0", 0), ("-1", -1), ("1000", 1000), ("1001", None)]),
        (":0.:-1.::a.:.b:", [("0", None), ("-1", None), (":a", None), ("", None), ("b:", None)]),
        ("-2.+1.1e1.٣.1\n", [("-2", None), ("+1", None), ("1e1", None), ("٣", None), ("1\n", None)]),
        ("a\\", [("a", None)]),
    ],
)
def test_paths(path, parts):
    """Dots part them, backslashes take a meaning away, colons make keys of numbers."""
    assert [(part.name, part.index) for part in parts_of(path)] == parts


# ---- edit: laws ---------------------------------------------------------------------------------

KEYS = ["a", "b", "é", "1", "-1", "", "a.b"]
NUMBERS = ["0", "-0", "1.0", "1E+2", "12345678901234567890123", "NaN"]
BLANKS = st.sampled_from(["", "", " ", "\n\t", "\r\n  "])
STRINGS = st.text(alphabet='ab é"\\\n/{[,:😀', max_size=9) | st.text(alphabet="ab,:]} ", min_size=16, max_size=40)


class Members(list):
    """A JSON object as its members in a row, duplicates included."""


class Number(str):
    """As it is spelt."""

    __slots__ = ()


def loads(body: bytes) -> object:
    """The document, with nothing lost but blanks and the escapes of strings."""
    return json.loads(body, object_pairs_hook=Members, parse_int=Number, parse_float=Number, parse_constant=Number)


@st.composite
def texts(draw, depth=2):
    """Any JSON text, in any spelling."""
    kind = draw(st.sampled_from(["number", "word", "string", *["object", "object", "array"][: 3 * depth]]))
    if kind == "number":
        return draw(st.sampled_from(NUMBERS))
    if kind == "word":
        return draw(st.sampled_from(["null", "true", "false"]))
    if kind == "string":
        return json.dumps(draw(STRINGS), ensure_ascii=draw(st.booleans()))
    if kind == "array":
        items = draw(st.lists(texts(depth - 1), max_size=3))
        return "[" + (",".join(draw(BLANKS) + item + draw(BLANKS) for item in items) or draw(BLANKS)) + "]"
    return draw(objects(depth))


@st.composite
def objects(draw, depth=3):
    """Any JSON text of an object, in any spelling, with duplicate keys."""
    keys = draw(st.lists(st.sampled_from(KEYS), max_size=4))
    members = [
        draw(BLANKS) + json.dumps(key, ensure_ascii=draw(st.booleans())) + draw(BLANKS) + ":" + draw(BLANKS) + value
        for key, value in [(key, draw(texts(depth - 1))) for key in keys]
    ]
    return "{" + (",".join(member + draw(BLANKS) for member in members) or draw(BLANKS)) + "}"


ROUTES = st.lists(st.sampled_from([*KEYS, "0", "2"]), min_size=1, max_size=3)
VALUES = st.sampled_from([7, "é", None, {"a": [1], "b": {}}, []])
CHANGES = st.tuples(ROUTES, st.none() | st.tuples(VALUES))
"""A route and a value, or None to strip."""


def written(change) -> Set | Strip:
    """The change as it is asked for."""
    route, new = change
    path = ".".join(part.replace(".", "\\.") for part in route)
    return Strip(path) if new is None else Set(path, new[0])


def index_of(part: str, count: int, last: int) -> int | None:
    """The element that *part* counts to, of *count* ones; *last* is what -1 means; None: it counts none."""
    return last if part == "-1" else int(part) if part in {"0", "1", "2"} else None


def after_set(value, route, new):
    """The document with *new* at *route*, in plain words; a ValueError where a key leads into an array."""
    if not route:
        return new
    part, *rest = route
    if not isinstance(value, list):
        value = Members() if index_of(part, 0, 0) is None else []
    if isinstance(value, Members):
        if not any(key == part for key, _ in value):
            return Members([*value, (part, after_set(None, rest, new))])
        return Members((key, after_set(old, rest, new) if key == part else old) for key, old in value)
    index = index_of(part, len(value), len(value))
    if index is None:
        raise ValueError(part)
    padded = value + [None] * (index + 1 - len(value))
    padded[index] = after_set(padded[index], rest, new)
    return padded


def after_strip(value, route):
    """The document without what is at *route*, in plain words."""
    part, *rest = route
    if isinstance(value, Members):
        if not rest:
            return Members((key, old) for key, old in value if key != part)
        return Members((key, after_strip(old, rest) if key == part else old) for key, old in value)
    if isinstance(value, list):
        index = index_of(part, len(value), len(value) - 1)
        if index is not None and 0 <= index < len(value):
            kept = [after_strip(value[index], rest)] if rest else []
            return [*value[:index], *kept, *value[index + 1 :]]
    return value


def edited(body: bytes, changes) -> bytes | None:
    """The body after *changes*, the same with and without cuts; None: a key leads into an array."""
    results = []
    for stride in (jsonview._STRIDE, SHORT):
        with cutting(stride):
            try:
                results.append(edit(body, changes))
            except BadRequest:
                results.append(None)
    assert results[0] == results[1]
    return results[0]


@settings(derandomize=True, deadline=None, max_examples=90)
@given(objects(), BLANKS, st.lists(CHANGES, min_size=1, max_size=3))
def test_an_edit_of_the_text_is_one_of_the_document(text, blanks, changes):
    """Whatever the text and the changes: parsed afterwards, it is what the changes make of the parsed."""
    body = (blanks + text + blanks).encode()
    expected = loads(body)
    try:
        for route, new in changes:
            value = new and loads(json.dumps(new[0]).encode())
            expected = after_strip(expected, route) if new is None else after_set(expected, route, value)
    except ValueError:
        expected = None

    result = edited(body, [written(change) for change in changes])

    assert (result and loads(result)) == expected


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.sampled_from("abc"), texts(), st.tuples(*[BLANKS] * 4)), min_size=1), BLANKS)
def test_not_a_byte_more_is_touched(members, blanks):
    """Setting changes values alone; stripping takes whole members with their commas, but no blanks at the end."""

    def body(members) -> bytes:
        raw = [f'{one}"{key}"{two}:{three}{value}{four}' for key, value, (one, two, three, four) in members]
        return f'{{"x":{{{",".join(raw)}{blanks}}} }}\n'.encode()

    *others, (key, value, inner) = members
    members = [*others, (key, value, (*inner[:3], ""))]  # blanks at the end belong to the object
    kept = [(k, v, b) for k, v, b in members if k != "a"]
    replaced = [(k, "[0]" if k == "a" else v, b) for k, v, b in members]
    if len(kept) == len(members):
        replaced.append(("a", "[0]", ("", "", "", "")))

    assert edited(body(members), [Set("x.a", [0])]) == body(replaced)
    assert edited(body(members), [Strip("x.a")]) == body(kept)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(objects(), CHANGES)
def test_a_second_time_changes_nothing(text, change):
    """Unless it counts from the end, or takes out by number, a change that has been made is made."""
    route, new = change
    if "-1" in route or (new is None and index_of(route[-1], 0, 0) is not None):
        route = ["a"]
    once = edited(text.encode(), [written((route, new))])

    assert once is None or edited(once, [written((route, new))]) == once


# ---- what it costs ------------------------------------------------------------------------------


def peak(work) -> int:
    """Bytes that *work* needs at most beside what is there before."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def with_picture(picture: bytes) -> bytes:
    """A request with *picture*."""
    return b'{"model": "a", "messages": [{"url": "data:image/png;base64,%s"}], "stream": true}' % picture


def test_a_picture_is_not_scanned():
    """It is stepped over, and at last copied once."""
    body = with_picture(PICTURE)
    assert peak(lambda: outline(body)) < len(PICTURE) / 10
    assert peak(lambda: edit(body, [Set("model", "b")])) < len(PICTURE) * 1.1

    assert outline(body) == Outline("a", stream=True)
    assert edit(body, [Set("model", "b")]) == body.replace(b'"a"', b'"b"')
    assert edit(body, [Strip("stream")]) == body.replace(b', "stream": true', b"")
    assert edit(body, [Set("messages.0.url", "")]) == body.replace(b"data:image/png;base64," + PICTURE, b"")


@pytest.mark.parametrize("odd", [b"\\n", b"\\u00e9", "é".encode(), b'\\"'], ids=["newline", "escape", "UTF-8", "quote"])
def test_a_picture_with_something_else_in_it(odd):
    """Any string of megabytes is kept to the byte."""
    body = with_picture(PICTURE + odd + PICTURE)

    assert outline(body) == Outline("a", stream=True)
    assert edit(body, [Set("model", "b")]) == body.replace(b'"a"', b'"b"')


@pytest.mark.parametrize("odd", [b"\n", b"\xff", b'"', b"\\x"])
def test_a_picture_with_something_wrong_in_it(odd):
    """However long the string, it makes the body no JSON."""
    with pytest.raises(BadRequest, match="not JSON"):
        outline(with_picture(PICTURE + odd + PICTURE))


def test_megabytes_that_are_no_string():
    """What is long and without quotes may as well be numbers, or blanks."""
    body = b'{"input": [%s1], "model"%s: "a", "stream": true}' % (b"1, " * 50_000, b" " * 100_000)

    assert outline(body) == Outline("a", stream=True)
    assert edit(body, [Set("model", "b")]) == body.replace(b'"a"', b'"b"')


def test_small_objects_do_not_pile_up():
    """Of a body of many, hardly more than its own size is needed; json.loads needs ten times as much."""
    body = b'{"messages": [%s{}], "model": "a"}' % (b'{"role": "user", "n": 1.5}, ' * 20_000)

    assert peak(lambda: outline(body)) < 2 * len(body)
    assert peak(lambda: edit(body, [Set("model", "b")])) < 5 * len(body)


def test_a_key_sent_many_times():
    """Needs no time by the square: with that, this would take most of a minute."""
    body = b'{%s"model": "a"}' % (b'"seed":1,' * 200_000)

    assert edit(body, [Set("seed", 2), Strip("seed")]) == b'{"model": "a"}'
    assert outline(b'{"model": "a", "x": {%s}}' % body[1:-1]).model == "a"
