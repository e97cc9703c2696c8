"""Scanning multipart/form-data in pieces, with httpx as the one who writes the bodies, and by hand."""

from __future__ import annotations

import contextlib
import itertools

import httpx  # noqa: TID251 - as the writer of forms
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trioswap import multipart
from trioswap.errors import BadRequest
from trioswap.multipart import Field, FormScanner, boundary_of

FILE = 'Content-Disposition: form-data; name="file"; filename="a.wav"\r\nContent-Type: audio/wav'


def named(name, more=""):
    return f'Content-Disposition: form-data; name="{name}"{more}'


def body_of(*parts, boundary=b"B", end=b"--\r\n"):
    """A body by hand: each part is its head and its content."""
    pieces = [b"--" + boundary + b"\r\n" + head.encode() + b"\r\n\r\n" + content + b"\r\n" for head, content in parts]
    return b"".join(pieces) + b"--" + boundary + end


def scan(body, boundary=b"B", wanted=("model", "stream"), step=None):
    """What a scanner finds when it gets *body* in pieces of *step* bytes, or cut at the offsets *step*."""
    scanner = FormScanner(boundary, wanted)
    cuts = sorted(step) if isinstance(step, list) else range(0, len(body), step or max(1, len(body)))
    for start, end in itertools.pairwise([0, *cuts, len(body)]):
        scanner.feed(body[start:end])
    scanner.close()
    return scanner


def refused(body, step=None):
    """The text of the refusal, which is the same in pieces of one byte."""
    with pytest.raises(BadRequest) as whole:
        scan(body)
    with pytest.raises(BadRequest) as pieces:
        scan(body, step=1)
    assert str(whole.value) == str(pieces.value)
    return str(whole.value).removeprefix("the multipart body is malformed at ")


# ---- the boundary ----


@pytest.mark.parametrize(
    ("content_type", "boundary"),
    [
        (b"multipart/form-data; boundary=abc", b"abc"),
        (b"Multipart/Form-Data;BOUNDARY=abc", b"abc"),
        (b' multipart/form-data ; charset=utf-8 ; boundary="a b:c=d" ', b"a b:c=d"),
        (b"multipart/form-data; boundary=----WebKitFormBoundaryX0'()+_,./:=?;", b"----WebKitFormBoundaryX0'()+_,./:=?"),
        (b"multipart/form-data; boundary=" + b"x" * 70, b"x" * 70),
    ],
)
def test_the_boundary_is_found(content_type, boundary):
    """Letters of any size, quotes, and other parameters around it."""
    assert boundary_of(content_type) == boundary


@pytest.mark.parametrize(
    ("content_type", "why"),
    [
        (b"", 'the Content-Type is "", not multipart/form-data'),
        (b"multipart/mixed; boundary=a", 'the Content-Type is "multipart/mixed", not multipart/form-data'),
        (b"multipart/form-data", "names no boundary"),
        (b"multipart/form-data; boundary=", 'the boundary "" is not one'),
        (b'multipart/form-data; boundary="a "', "is not one"),
        (b"multipart/form-data; boundary=" + b"x" * 71, "is not one"),
        (b'multipart/form-data; boundary="a\\"b"', "is not one"),
        (b'multipart/form-data; boundary="a\r\nb"', "is not one"),
        (b"multipart/form-data; boundary=\xc3\xa9", r'the boundary "\xc3\xa9" is not one'),
        (b"multipart/form-data; boundary=a; boundary=b", '"boundary" is in the Content-Type twice'),
        (b'multipart/form-data; boundary="a', 'the Content-Type is malformed at ""a"'),
        (b"multipart/form-data; boundary=a b", 'malformed at "b"'),
    ],
)
def test_a_wrong_boundary_is_refused(content_type, why):
    """The message says what is wrong with it."""
    with pytest.raises(BadRequest) as caught:
        boundary_of(content_type)
    assert why in str(caught.value)


# ---- well-formed bodies ----


def test_what_httpx_writes_is_read():
    """Fields around a file are found with the offsets of their values; a file of the same name is none."""
    request = httpx.Request(
        "POST",
        "http://x/",
        data={"model": "whisper", "prompt": "model", "stream": "true"},
        files={"file": ('we"ird\\.wav', b"\r\n--B\r\n" * 1000, "audio/wav"), "model": ("model", b"no")},
    )
    body = request.read()
    found = scan(body, boundary_of(request.headers["content-type"].encode()))
    assert {name: [each.value for each in fields] for name, fields in found.fields.items()} == {
        "model": ["whisper"],
        "stream": ["true"],
    }
    for (field,) in found.fields.values():
        assert body[field.start : field.end].decode() == field.value


def test_of_several_the_last_counts_and_all_are_known():
    """Every occurrence keeps its place, so that all can be replaced."""
    body = body_of((named("model"), b"one"), (FILE, b"x"), (named("model"), "zwö".encode()))
    found = scan(body)
    assert found.value("model") == "zwö"
    assert [body[each.start : each.end] for each in found.fields["model"]] == [b"one", "zwö".encode()]
    assert found.value("stream") is None


@pytest.mark.parametrize(
    "head",
    [
        'content-disposition:form-data;name="model"',
        "Content-Disposition: FORM-DATA; Name=model",
        "Content-Type: text/plain\r\nContent-Disposition: form-data;\r\n  name=model",
        named("model") + "\r\nContent-Transfer-Encoding: 8BIT",
        named("model", ";"),
        named("model", '; x="a;\\"b"'),
    ],
)
def test_the_head_of_a_part_may_be_written_in_many_ways(head):
    """Letters of any size, no quotes, folded lines, other headers."""
    assert scan(body_of((head, b"m"))).value("model") == "m"


def test_names_are_taken_out_of_their_quotes():
    """A quoted quote or backslash is one; percent signs, as browsers write them, are not decoded."""
    body = body_of((named('a\\"b\\\\c'), b"1"), (named("a%22"), b"2"))
    found = scan(body, wanted=['a"b\\c', "a%22"])
    assert (found.value('a"b\\c'), found.value("a%22")) == ("1", "2")


@pytest.mark.parametrize("filename", ['filename="x"', 'filename=""', "filename*=utf-8''x"])
def test_a_file_is_no_field(filename):
    """Whatever its name, a part with a file name is a file."""
    assert scan(body_of((named("model", "; " + filename), b"\xff"))).fields == {}


@pytest.mark.parametrize("end", [b"--", b"--\r\n", b"-- \t\r\n", b"--\r\nepilogue\r\n--B\r\n", b"-- "])
def test_what_is_around_the_parts_has_no_meaning(end):
    """A preamble, an epilogue, white space behind a delimiter; and the last line needs no end."""
    body = b"preamble --B\r\n" + body_of((named("model"), b"m"), end=end).replace(b"--B\r\n", b"--B \t\r\n", 1)
    for step in (None, 1):
        assert scan(body, step=step).fields == {"model": [Field("m", body.index(b"m\r\n"), body.index(b"m\r\n") + 1)]}


def test_a_form_may_be_empty():
    """The last delimiter may be the first."""
    assert scan(b"--B--").fields == {}


def test_values_may_be_empty_or_as_long_as_is_allowed():
    """The limit is the last length that passes."""
    longest = b"x" * multipart.MAX_VALUE
    found = scan(body_of((named("model"), b""), (named("stream"), longest)), step=1)
    assert (found.value("model"), found.value("stream")) == ("", longest.decode())


# Contents and pieces that look like delimiters, to a careless eye.
CRUMBS = st.sampled_from(
    [b"\r", b"\n", b"-", b"--", b"\r\n", b"\r\n-", b"\r\n--", b"--B", b"B", b"a", b"\0", b"\r\r\n--"]
)
CONTENT = st.lists(CRUMBS, max_size=12).map(b"".join).filter(lambda data: b"\r\n--B" not in b"\r\n" + data)
PART = st.one_of(
    st.tuples(st.sampled_from([FILE, named("other")]), CONTENT),
    st.tuples(st.sampled_from([named("model"), named("stream")]), st.text(max_size=5).map(str.encode)),
)


@given(parts=st.lists(PART, max_size=5), data=st.data())
def test_any_cut_finds_the_same(parts, data):
    """However a body comes in pieces, what is found is what was put in, where it was put."""
    parts = [(head, content) for head, content in parts if b"\r\n--B" not in b"\r\n" + content]
    body = body_of(*parts)
    cuts = data.draw(st.lists(st.integers(0, len(body)), max_size=8))
    expected, at = {}, 0
    for head, content in parts:
        at = body.index(head.encode(), at) + len(head) + 4
        if (name := head.split('"')[1]) in {"model", "stream"}:
            expected.setdefault(name, []).append(Field(content.decode(), at, at + len(content)))
        at += len(content)
    for step in (None, 1, cuts):
        assert scan(body, step=step).fields == expected


@given(st.dictionaries(st.sampled_from(["model", "stream", "x", "ö"]), st.text(max_size=9)), st.binary(max_size=99))
def test_any_form_of_httpx_is_read(fields, content):
    """Values come out as they went in, with httpx as the writer."""
    request = httpx.Request("POST", "http://x/", data=fields, files={"file": content})
    found = scan(request.read(), boundary_of(request.headers["content-type"].encode()), wanted=list(fields), step=3)
    assert {name: found.value(name) for name in fields} == fields
    assert len(found.fields) == len(fields)


@given(st.lists(CRUMBS, max_size=40).map(b"".join))
def test_rubbish_is_refused_in_any_cut_or_in_none(body):
    """What is made of arbitrary bytes does not depend on the pieces, and nothing but BadRequest is raised."""

    def outcome(step):
        try:
            return scan(body, step=step).fields
        except BadRequest as exc:
            return str(exc)

    assert outcome(None) == outcome(1) == outcome(7)


# ---- malformed ones ----


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "byte 0: it ends before its first delimiter"),
        (b"hello", "byte 5: it ends before its first delimiter"),
        (b"--B", "byte 3: it ends in part 0, before its last delimiter"),
        (body_of((FILE, b"x"), end=b""), "byte 101: it ends in part 1, before its last delimiter"),
        (b"--B\r\n" + FILE.encode(), "it ends in part 1, before its last delimiter"),
        (b"--Bee\r\n", "byte 3: a delimiter is followed by other text in its line"),
        (b"--B--x\r\n", "byte 3: a delimiter is followed by other text in its line"),
        (b"--B" + b" " * 300 + b"\r\n", "byte 3: the line of a delimiter does not end"),
        (b"--B\r\n\r\nx\r\n--B--", "byte 5: part 1: it has no Content-Disposition of form-data with a name"),
        (body_of(("Content-Type: text/plain", b"x")), "part 1: it has no Content-Disposition"),
        (body_of(('Content-Disposition: attachment; name="model"', b"x")), "part 1: it has no Content-Disposition"),
        (body_of(("Content-Disposition: form-data; name*=utf-8''model", b"x")), "part 1: it has no Content-Disp"),
        (body_of((named("a", "; name*=utf-8''model"), b"x")), "part 1: it has no Content-Disposition"),
        (body_of((named("a", '; name="model"'), b"x")), 'part 1: "name" is in the Content-Disposition twice'),
        (body_of((named("a", ' "'), b"x")), 'part 1: the Content-Disposition is malformed at """'),
        (body_of((FILE, b"x"), (named("a") + "\r\n" + named("model"), b"x")), '"content-disposition" is there twice'),
        (body_of((named("a") + "\r\nno header", b"x")), 'part 1: "no header" is no header line'),
        (body_of((named("a") + "\nX: y", b"x")), r"is no header line"),
        (body_of((named("a") + "\r\nX\0: y", b"x")), r'"X\x00: y" is no header line'),
        (b"--B\r\n" + named("model").encode() + b"\r\n\r\n--B--", "without a line break of its own"),
        (body_of((named("model"), b"a\xff")), 'byte 54: the value of "model" is not UTF-8'),
        (
            body_of((named("model") + "\r\nContent-Transfer-Encoding: base64", b"bQ==")),
            '"model" is encoded as "base64"; send it as it is',
        ),
    ],
)
def test_malformed_bodies_are_refused(body, why):
    """The message says what is wrong, and at which byte."""
    assert why in refused(body)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (
            body_of((named("model"), b"x" * (multipart.MAX_VALUE + 1))),
            f'byte 53: the value of "model" is longer than {multipart.MAX_VALUE} bytes',
        ),
        (body_of(("X: " + "x" * multipart.MAX_HEAD, b"")), f"the head of part 1 is longer than {multipart.MAX_HEAD}"),
        (body_of(*[(named("model"), b"")] * (multipart.MAX_FIELDS + 1)), "is there once too often"),
        (body_of(*[(named("x"), b"")] * (multipart.MAX_PARTS + 1)), f"it has more than {multipart.MAX_PARTS} parts"),
    ],
    ids=["value", "head", "fields", "parts"],
)
def test_limits(body, why):
    """What could fill the memory is refused, and before it has come."""
    assert why in refused(body)


@pytest.mark.parametrize("name", ["model", "file"])
def test_what_is_held_is_bounded(name):
    """Parts that do not end, wanted or not, are not kept."""
    scanner = FormScanner(b"B", ["model"])
    scanner.feed(b"--B\r\n" + named(name).encode() + b"\r\n\r\n")
    most = 0
    with pytest.raises(BadRequest) if name == "model" else contextlib.nullcontext():
        for _ in range(10_000):
            scanner.feed(b"\r\n--")
            most = max(most, len(scanner._buffer))
    assert most <= (multipart.MAX_VALUE + 100 if name == "model" else 8)
