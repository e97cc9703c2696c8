"""What the head of a request says, and what of it travels on."""

from __future__ import annotations

import math
from ipaddress import ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trioswap.errors import AmbiguousLength
from trioswap.request import check_framing, client_of, forwarded, preferred_wait, split_upstream

NAMES = frozenset({"a", "author", "author/model", "author/model:q4", "with space", "ümlaut"})


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


HERE = [ip_network("127.0.0.0/8"), ip_network("10.0.0.0/8"), ip_network("::1/128")]


@pytest.mark.parametrize(
    ("peer", "sent", "client"),
    [
        ("192.0.2.9", [], "192.0.2.9"),
        ("192.0.2.9", [b"192.0.2.1"], "192.0.2.9"),
        ("127.0.0.1", [], "127.0.0.1"),
        ("127.0.0.1", [b"192.0.2.1"], "192.0.2.1"),
        ("::ffff:127.0.0.1", [b"192.0.2.1"], "192.0.2.1"),
        ("::1", [b"198.51.100.7, 192.0.2.1, 10.0.0.2"], "192.0.2.1"),
        ("::1", [b"198.51.100.7", b"10.0.0.3", b"10.0.0.2"], "198.51.100.7"),
        ("127.0.0.1", [b"10.0.0.3"], "10.0.0.3"),
        ("127.0.0.1", [b"unknown"], "127.0.0.1"),
        ("127.0.0.1", [b"1.2.3.4\r\nx: y"], "127.0.0.1"),
        (None, [b"192.0.2.1"], None),
    ],
)
def test_the_client_is_who_trusted_proxies_name(peer, sent, client):
    """The last address that is no proxy of ours; what others say of themselves does not count."""
    headers = [(b"X-Forwarded-For", value) for value in sent]
    assert client_of(peer, headers, HERE) == client


@pytest.mark.parametrize("trusted", [False, True])
def test_who_asks_travels_on(trusted):
    """What the client says of where it comes from is kept only if it is a proxy whose word counts."""
    said = [(b"x-forwarded-for", b"192.0.2.1"), (b"x-forwarded-proto", b"https"), (b"forwarded", b"for=192.0.2.1")]
    headers = [(b"host", b"h:1"), *said, (b"a", b"1")]
    told = dict(forwarded(headers, "127.0.0.1", "http", trusted=trusted))
    assert told == {
        b"host": b"h:1",
        b"a": b"1",
        b"x-forwarded-for": b"192.0.2.1, 127.0.0.1" if trusted else b"127.0.0.1",
        b"x-forwarded-proto": b"https" if trusted else b"http",
        b"x-forwarded-host": b"h:1",
    }


def test_who_has_no_address_has_none_to_tell():
    """A unix socket has no other side with an address."""
    assert forwarded([], None, "http", trusted=False) == [(b"x-forwarded-proto", b"http")]


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        (None, math.inf),
        (b"wait=5", 5.0),
        (b"respond-async, wait=10", 10.0),
        (b"Wait = 0", 0.0),
        (b"handling=lenient; wait=3", 3.0),
        (b"wait", math.inf),
        (b"wait=-1", math.inf),
        (b"await=5", math.inf),
        (b"wait=5x", math.inf),
    ],
)
def test_how_long_a_client_wants_to_wait(said, seconds):
    """RFC 7240, 4.3; what is no such wish is none."""
    assert preferred_wait([] if said is None else [(b"Prefer", said)]) == seconds


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
