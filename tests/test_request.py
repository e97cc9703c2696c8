"""What a request asks for, read from its bytes."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trioswap.errors import AmbiguousLength, BadRequest, MissingModel
from trioswap.request import check_framing, forwarded, model_in, split_upstream

NAMES = frozenset({"a", "author", "author/model", "author/model:q4", "with space", "ümlaut"})


# ---- the model in a body ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "a"}',
        b'\xef\xbb\xbf{"model": "a"}',
        '{"model": "a"}'.encode("utf-16"),
        b'{"messages": [{"model": "b"}], "model": "\\u0061"}',
    ],
    ids=["plain", "byte order mark", "UTF-16", "nested and escaped"],
)
def test_the_model_is_found(body):
    """JSON in any encoding that JSON may have; only the top level counts."""
    assert model_in(body) == "a"


@pytest.mark.parametrize("body", [b"{}", b'{"model": null}', b'{"model": ""}'])
def test_no_model_is_missing(body):
    """Not there, null and empty are the same mistake."""
    with pytest.raises(MissingModel, match="no model is named"):
        model_in(body)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "not JSON"),
        (b"model=a", "not JSON"),
        (b'{"model": "a"', "not JSON"),
        (b"\xff\xfe\xfd", "not JSON"),
        (b"[" * 200_000, "not JSON"),
        (b"9" * 5000, "not JSON"),
        (b'["a"]', "must be a JSON object"),
        (b'"a"', "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'{"model": 1}', '"model" must be a string'),
        (b'{"model": ["a"]}', '"model" must be a string'),
        (b'{"model": false}', '"model" must be a string'),
    ],
)
def test_what_names_no_model_is_a_mistake_of_the_client(body, why):
    """Each says what is wrong; none is anything else than a BadRequest, however deep or long it is."""
    with pytest.raises(BadRequest, match=why):
        model_in(body)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(st.binary(max_size=60) | JSON.map(lambda document: json.dumps({"model": document}).encode()))
def test_no_bytes_break_the_reader(body):
    """Any bytes, and anything for a model: a name comes out, or a mistake of the client."""
    with contextlib.suppress(BadRequest, MissingModel):
        assert model_in(body)


# ---- framing --------------------------------------------------------------------------------


def test_a_length_stated_twice_is_refused():
    """Content-Length and Transfer-Encoding together, in any case of letters; each alone is fine."""
    length, encoding = (b"Content-Length", b"5"), (b"transfer-encoding", b"chunked")
    check_framing([length])
    check_framing([encoding])
    check_framing([])
    with pytest.raises(AmbiguousLength):
        check_framing([length, encoding])


# ---- headers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "client", "chain"),
    [
        ([], "192.0.2.9", [b"192.0.2.9"]),
        ([b"192.0.2.1"], "192.0.2.9", [b"192.0.2.1, 192.0.2.9"]),
        ([b"192.0.2.1, 192.0.2.2", b"192.0.2.3"], "::1", [b"192.0.2.1, 192.0.2.2, 192.0.2.3, ::1"]),
        ([b"192.0.2.1"], None, [b"192.0.2.1"]),
        ([], None, []),
    ],
)
def test_the_client_is_appended_to_the_chain(sent, client, chain):
    """X-Forwarded-For becomes one header with the client's address last; the others keep their order."""
    headers = [(b"a", b"1"), *((b"X-Forwarded-For", value) for value in sent), (b"b", b"2")]

    result = forwarded(headers, client)

    assert result == [(b"a", b"1"), (b"b", b"2"), *((b"x-forwarded-for", value) for value in chain)]


# ---- /upstream/ ------------------------------------------------------------------------------


def split(rest: bytes):
    """Split with the names above, each of which stands for itself."""
    return split_upstream(rest, {name: name for name in NAMES}.get, max(map(len, NAMES)))


def test_nobody_looks_further_than_the_longest_name_reaches():
    """A path of thousands of slashes costs as many looks as a name has characters, not as many as it has slashes."""
    looks: list[str] = []
    assert split_upstream(b"/" * 60_000, looks.append, 30) is None
    assert len(looks) <= 31


@pytest.mark.parametrize(
    ("rest", "found"),
    [
        (b"a/v1/x", ("a", b"/v1/x")),
        (b"a/", ("a", b"/")),
        (b"a", ("a", b"")),
        (b"a//x", ("a", b"//x")),
        (b"a/%2Fx%252F%C3%A4", ("a", b"/%2Fx%252F%C3%A4")),
        (b"author/v1", ("author", b"/v1")),
        (b"author/model/v1", ("author/model", b"/v1")),
        (b"author%2Fmodel/v1", ("author/model", b"/v1")),
        (b"author%2fmodel%3Aq4/", ("author/model:q4", b"/")),
        (b"author/model:q4", ("author/model:q4", b"")),
        (b"with%20space/a", ("with space", b"/a")),
        (b"%C3%BCmlaut/a", ("ümlaut", b"/a")),
        (b"b/a", None),
        (b"/a", None),
        (b"", None),
        (b"a%2Fv1", None),
        (b"%ff%00/a", None),
    ],
)
def test_the_longest_known_name_is_split_off(rest, found):
    """The name may be escaped; the escapes of what follows it are kept as they are."""
    assert split(rest) == found


@given(st.sampled_from(sorted(NAMES)), st.text("/%aA2fF.", max_size=20).map(str.encode))
def test_a_known_name_is_always_found(name, rest):
    """Whatever follows the slash, the name or a longer one is found, and nothing of the path is lost."""
    path = name.replace(" ", "%20").replace("ü", "%C3%BC").encode() + b"/" + rest
    found = split(path)
    assert found is not None
    assert len(found[0]) >= len(name)
    assert path.endswith(found[1])
