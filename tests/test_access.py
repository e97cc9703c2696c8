"""Keys: who may ask, and that nobody behind us sees them."""

from __future__ import annotations

import base64

import pytest
from daemons import chat, daemon, fetch, scripted

from trioswap.access import admits, credential, without_credentials

BASIC = b"Basic " + base64.b64encode(b"anybody:k1")


@pytest.mark.parametrize(
    ("headers", "shown"),
    [
        ([], None),
        ([(b"authorization", b"Bearer k1")], b"k1"),
        ([(b"Authorization", b"bearer  k1 ")], b"k1"),
        ([(b"authorization", BASIC)], b"k1"),
        ([(b"x-api-key", b"k1")], b"k1"),
        ([(b"x-api-key", b"k1"), (b"authorization", b"Bearer wrong")], b"wrong"),
        ([(b"x-api-key", b"k1"), (b"authorization", b"Basic !!!")], b"k1"),
        ([(b"x-api-key", b"k1"), (b"authorization", b"Basic " + base64.b64encode(b"nobody:"))], b"k1"),
        ([(b"authorization", b"Bearer")], None),
        ([(b"authorization", b"Digest k1")], None),
        ([(b"x-api-key", b"")], None),
    ],
)
def test_one_credential_is_looked_at(headers, shown):
    """The password of Basic, else the token of Bearer, else x-api-key."""
    assert credential(headers) == shown


def test_any_of_the_keys_will_do():
    """And nothing that only begins like one."""
    keys = ("k1", "k\u00e9y")
    assert admits(keys, [(b"x-api-key", b"k1")])
    assert admits(keys, [(b"x-api-key", "k\u00e9y".encode())])
    assert not admits(keys, [(b"x-api-key", b"k")])
    assert not admits(keys, [(b"x-api-key", b"k11")])
    assert not admits((), [(b"x-api-key", b"k1")])


def test_credentials_go_no_further():
    """Everything else does."""
    headers = [(b"accept", b"*/*"), (b"Authorization", b"Bearer k1"), (b"X-Api-Key", b"k1")]
    assert without_credentials(headers) == [(b"accept", b"*/*")]


async def test_a_daemon_with_keys():
    """401 with a challenge without one, on every route but /health; the server behind does not see it."""
    async with daemon({"a": scripted()}, api_keys=["k1"]) as running:
        assert (await fetch(running.port, "GET", "/health")).status == 200
        assert (await fetch(running.port, "GET", "/nowhere")).status == 404
        for path in ("/v1/models", "/running", "/api/queue", "/upstream/a/x", "/logs"):
            answer = await fetch(running.port, "GET", path)
            assert (answer.status, answer["www-authenticate"]) == (401, 'Basic realm="trioswap"')
            assert answer.json()["error"]["code"] == "unauthorized"
        key = ("authorization", "Bearer k1")
        assert (await fetch(running.port, "GET", "/v1/models", b"", key)).status == 200
        answer = await fetch(running.port, "POST", "/v1/chat/completions", chat("a"), key)
        assert answer.status == 200
        assert "authorization" not in str(answer.json()["headers"]).lower()
