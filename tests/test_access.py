"""Keys: who may ask, and that nobody behind us sees them."""

from __future__ import annotations

import base64
import hmac
from types import SimpleNamespace

import attrs
import pytest
from daemons import chat, daemon, fetch, scripted

from trioswap.access import ANYBODY, Key, Keyring, Scope, credential, digest_of, without_credentials
from trioswap.config import Config
from trioswap.config.parts import KeyConfig

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
        ([(b"api-key", b"k1")], b"k1"),
        ([(b"Api-Key", b"k1"), (b"x-api-key", b"")], b"k1"),
        ([(b"api-key", b"k1"), (b"x-api-key", b"wrong")], b"wrong"),
        ([(b"api-key", b"k1"), (b"authorization", b"Bearer wrong")], b"wrong"),
        ([(b"api-key", b"")], None),
        ([(b"proxy-authorization", b"Bearer k1")], None),
        ([(b"cookie", b"api-key=k1")], None),
        ([(b"x-api-key", b"first"), (b"x-api-key", b"k1")], b"first"),
    ],
)
def test_one_credential_is_looked_at(headers, shown):
    """The password of Basic, else the token of Bearer, else x-api-key, else api-key."""
    assert credential(headers) == shown


def key(**rights: object) -> Key:
    """The key "k", which is "k1", with these rights."""
    return Key.of(KeyConfig("k", digest_of("k1"), **rights))


def keyring(*api_keys: str, **named: str) -> Keyring:
    """Keys without a name, and those with one."""
    return Keyring.of(
        Config(api_keys=api_keys, keys={name: KeyConfig(name, digest_of(k)) for name, k in named.items()})
    )


def shown_by(text: str) -> list[tuple[bytes, bytes]]:
    return [(b"x-api-key", text.encode())]


# ---- whose key it is ------------------------------------------------------------------------


def test_each_key_is_found_by_itself_alone():
    """And by nothing that only begins like it, or is its hash."""
    keys = keyring("k1", "k\u00e9y", laptop="k2", phone="k3")

    found = {text: keys.find(shown_by(text)).name for text in ("k1", "k\u00e9y", "k2", "k3")}

    assert found == {"k1": "api key 1", "k\u00e9y": "api key 2", "k2": "laptop", "k3": "phone"}
    assert keys.asked
    for wrong in (
        "k",
        "k11",
        "K1",
        "",
        "api key 1",
        "laptop",
        digest_of("k1").hex(),
        f"sha256:{digest_of('k2').hex()}",
    ):
        assert keys.find(shown_by(wrong)) is None
    assert keys.find([(b"x-api-key", digest_of("k1"))]) is None
    assert keys.find([]) is None


def test_where_there_are_no_keys_everybody_may_everything():
    """Whatever is shown, and if nothing is."""
    keys = keyring()

    assert not keys.asked
    for headers in ([], shown_by("k1"), [(b"authorization", b"Bearer")]):
        assert keys.find(headers) is ANYBODY
    assert all(ANYBODY.may(scope, "/x") for scope in Scope)
    assert ANYBODY.may_use("a", at_peer=True)


def test_nobody_shows_what_anybody_has():
    """The stand-in for those who are not asked is no key of a ring, and no hash of anything."""
    assert ANYBODY not in keyring("k1").keys
    assert ANYBODY.digest == b""


def test_a_key_that_is_written_twice_may_do_less():
    """The name with its limits wins; so nobody is let through where somebody meant to keep it out."""
    found = keyring("k1", laptop="k1").find(shown_by("k1"))

    assert found.name == "laptop"
    assert not found.may(Scope.ADMIN, "/logs")


@pytest.mark.parametrize("text", ["k1", "k2", "k3", "k", "nobody's", "k" * 1000])
def test_what_is_shown_is_compared_with_every_key(text, monkeypatch):
    """In constant time: digests of one length, and all of them, wherever the right one stands."""
    compared = []

    def compare(ours: bytes, theirs: bytes) -> bool:
        compared.append((ours, theirs))
        return hmac.compare_digest(ours, theirs)

    keys = keyring("k1", "k2", laptop="k3")
    monkeypatch.setattr("trioswap.access.hmac", SimpleNamespace(compare_digest=compare))
    keys.find(shown_by(text))

    assert compared == [(each.digest, digest_of(text)) for each in keys.keys]
    assert {len(digest) for pair in compared for digest in pair} == {32}


def test_nothing_that_is_printed_tells_a_key():
    """Neither the key nor its digest, of which a weak key could be guessed."""
    keys = keyring("k1-secret", laptop="k2-secret")
    printed = f"{keys!r} {keys} {[each.name for each in keys.keys]}"

    assert "laptop" in printed
    assert "api key 1" in printed
    assert "secret" not in printed
    assert repr(digest_of("k1-secret")) not in printed
    assert "digest" not in printed


def test_a_key_has_what_the_configuration_says():
    """All of it; further rights of the configuration are rights of keys by themselves."""
    config = KeyConfig(
        "laptop",
        digest_of("k1"),
        ("a",),
        ("/v1/*",),
        peers=False,
        admin=True,
        read_only=True,
        weight=2.0,
        concurrency=3,
    )
    [found] = Keyring.of(Config(keys={"laptop": config})).keys

    assert attrs.asdict(found) == attrs.asdict(config)


# ---- what it may do -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of", "scopes"),
    [
        pytest.param(keyring("k1").keys[0], {Scope.OPEN, Scope.READ, Scope.USE, Scope.ADMIN}, id="without a name"),
        pytest.param(key(), {Scope.OPEN, Scope.READ, Scope.USE}, id="with a name"),
        pytest.param(key(admin=True), {Scope.OPEN, Scope.READ, Scope.USE, Scope.ADMIN}, id="admin"),
        pytest.param(key(read_only=True), {Scope.OPEN, Scope.READ}, id="read_only"),
        pytest.param(key(read_only=True, admin=True), {Scope.OPEN, Scope.READ}, id="both: the narrower"),
        pytest.param(key(endpoints=("/v1/*",)), {Scope.OPEN}, id="another endpoint"),
        pytest.param(key(endpoints=()), {Scope.OPEN}, id="no endpoint"),
        pytest.param(key(endpoints=("/no", "/x"), admin=True), set(Scope), id="one of the endpoints fits"),
        pytest.param(key(endpoints=("/x",), read_only=True), {Scope.OPEN, Scope.READ}, id="an endpoint is no right"),
    ],
)
def test_what_a_key_may(of, scopes):
    """What is open is open to all; the rest needs the right and the endpoint."""
    assert {scope for scope in Scope if of.may(scope, "/x")} == scopes


@pytest.mark.parametrize(
    ("pattern", "path", "may"),
    [
        ("/v1/*", "/v1/chat/completions", True),
        ("/v1/*", "/v1", False),
        ("/v1/*", "/api/v1/x", False),
        ("/v1/audio/*", "/v1/chat/completions", False),
        ("*/completions", "/v1/chat/completions", True),
        ("/v1/chat/completions", "/v1/chat/completions/", False),
        ("/v1/[ab]", "/v1/a", False),
        ("/v1/?", "/v1/a", False),
        ("/v1/a", "/V1/a", False),
        ("/upstream/a/*", "/upstream/%61/x", False),
    ],
)
def test_endpoints_are_patterns_of_paths(pattern, path, may):
    """`*` is any text, all else is itself, escapes too."""
    assert key(endpoints=(pattern,)).may(Scope.USE, path) is may


@pytest.mark.parametrize(
    ("models", "names", "may"),
    [
        pytest.param(None, ("anything",), True, id="no limit"),
        pytest.param((), ("big",), False, id="nothing"),
        pytest.param(("big",), ("big", "big"), True, id="a model by its name"),
        pytest.param(("big",), ("fast", "big"), True, id="and by an alias"),
        pytest.param(("fast",), ("fast", "big"), True, id="an alias"),
        pytest.param(("fast",), ("big", "big"), False, id="is not the model by its name"),
        pytest.param(("fast",), ("slow", "big"), False, id="nor by another alias"),
        pytest.param(("small",), ("fast", "big"), False, id="an alias of another model"),
        pytest.param(("any",), ("any", "big", "big"), True, id="a selector, whatever it chose"),
        pytest.param(("small",), ("any", "big", "big"), False, id="a selector that chose another"),
        pytest.param(("small",), ("any", "small", "small"), True, id="or the right one"),
        pytest.param(("fast",), ("any", "fast", "big"), True, id="a selector that chose the alias"),
        pytest.param(("gpt",), ("gpt", "any", "fast", "big"), True, id="a pinned name"),
        pytest.param(("big",), ("gpt", "any", "fast", "big"), True, id="a pin that leads to the model"),
        pytest.param(("gpt",), ("any", "fast", "big"), False, id="what a pin leads to, without it"),
        pytest.param(("qwen*", "ll*"), ("llama", "llama"), True, id="patterns"),
        pytest.param(("qwen*",), ("my-qwen", "my-qwen"), False, id="patterns are about the whole name"),
        pytest.param(("big",), ("big*", "big*"), False, id="a star that is asked for is a star"),
    ],
)
def test_models_are_given_by_name(models, names, may):
    """By the name that is asked for, by the real one, or by one on the way."""
    assert key(models=models).may_use(*names) is may


def test_models_of_peers():
    """Whoever may ask peers may ask for the models that were given, under PEER/MODEL as well."""
    assert key().may_use("gpt", "there/gpt", at_peer=True)
    assert key(models=("there/*",)).may_use("gpt", "there/gpt", at_peer=True)
    assert not key(models=("here/*",)).may_use("gpt", "there/gpt", at_peer=True)
    assert not key(peers=False).may_use("gpt", "there/gpt", at_peer=True)
    assert not key(peers=False, models=("*",)).may_use("gpt", "there/gpt", at_peer=True)
    assert key(peers=False).may_use("gpt", "gpt")


# ---- what others see of it ------------------------------------------------------------------


def test_credentials_go_no_further():
    """Everything else does; cookies are between the browser and the pages of a model server."""
    kept = [(b"accept", b"*/*"), (b"cookie", b"theme=dark"), (b"x-api-key-id", b"7")]
    secret = [
        (b"Authorization", b"Bearer k1"),
        (b"authorization", b"Bearer k2"),
        (b"X-Api-Key", b"k1"),
        (b"api-key", b"k1"),
        (b"API-Key", b"k1"),
        (b"Proxy-Authorization", b"Basic azE6azE="),
    ]

    assert without_credentials([*secret[:3], *kept, *secret[3:]]) == kept


def test_whatever_lets_in_is_taken_away():
    """Of every place where a key is looked for nothing is left."""
    for headers in (
        [(b"authorization", b"Bearer k1")],
        [(b"authorization", BASIC)],
        shown_by("k1"),
        [(b"api-key", b"k1")],
    ):
        assert credential(headers) == b"k1"
        assert without_credentials(headers) == []


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


@pytest.mark.parametrize("rest", ["../slots", "%2e%2E/slots", "..%5cslots"])
def test_dots_lead_nowhere_else(rest):
    """A model server may take the dots out of a path, and answer what the pattern did not mean."""
    key = Key("k", b"", endpoints=("/upstream/a/v1/*",))
    assert key.may(Scope.USE, "/upstream/a/v1/..slots")
    assert not key.may(Scope.USE, f"/upstream/a/v1/{rest}")
    assert Key("k", b"").may(Scope.USE, f"/upstream/a/v1/{rest}"), "who may ask everything may ask for that, too"
