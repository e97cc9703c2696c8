"""Who may ask, where and how long: keys, TLS, origins, proxies, sockets, limits; and every mistake by its words."""

from __future__ import annotations

import hashlib
import re
from ipaddress import ip_network
from itertools import product
from pathlib import Path

import pytest
from config_texts import mistakes

from trioswap.config import Config, load, loads
from trioswap.config.addresses import Address, UnixAddress, parse_listen
from trioswap.config.llamaswap import translate
from trioswap.config.loading import load_sources
from trioswap.config.parts import CorsConfig, KeyConfig, TlsConfig
from trioswap.config.patterns import fits
from trioswap.errors import ConfigError

MODELS = """
models.qwen = { cmd = 'x ${PORT}', aliases = ['gpt-4o'], filters.set_params_by_id = { 'qwen:strict' = {} } }
models.gemma.cmd = 'x ${PORT}'
peers.far = { proxy = 'http://far', models = ['llama'] }
selectors.best = { strategy = 'pin', targets = ['qwen'] }
profiles.night.pins = { o1 = 'gemma' }
"""
HIDDEN = "found something else (not shown, it may be a secret), allowed is"
HASH = "sha256:" + "ab" * 32
ORIGIN = 'allowed is SCHEME://HOST[:PORT] without a path, such as "https://chat.example", or "*" alone'
NETWORK = 'allowed is an address or a network, such as "10.0.0.5" or "10.0.0.0/8"'
NAME = "allowed is the name of a model, an alias, a selector, a pin or a peer's model, or a pattern of such names"
ENDPOINT = 'allowed is a path such as "/v1/embeddings" or "/v1/audio/*", without ? and #'
SOCKET = 'allowed is unix: and an absolute path, such as "unix:/run/trioswap.sock"'


def key_with(settings: str) -> str:
    """Names to ask for, and a key with these *settings*."""
    return f"{MODELS}\n[keys.k]\nkey = 's'\n{settings}"


def digest(key: str) -> bytes:
    """What is kept of *key*."""
    return hashlib.sha256(key.encode()).digest()


# ---- keys ---------------------------------------------------------------------------------------


def test_every_key_of_a_key_arrives():
    """The key itself does not: its hash is enough."""
    config = loads(f"""{MODELS}
        [keys."my phone"]
        key = "sesäme"
        models = ["qwen", "g*"]
        endpoints = ["/v1/models", "/v1/*"]
        peers = false
        admin = true
        read_only = false
        weight = 0.5
        concurrency = 3
        [keys.reader]
        key = "other"
        read_only = true
    """)

    assert config.keys == {
        "my phone": KeyConfig(
            "my phone", digest("sesäme"), ("qwen", "g*"), ("/v1/models", "/v1/*"), False, True, False, 0.5, 3
        ),
        "reader": KeyConfig("reader", digest("other"), read_only=True),
    }


@pytest.mark.parametrize("spelling", [str, str.upper])
def test_a_hash_stands_for_its_key(spelling):
    """In either case of its digits."""
    written = spelling(digest("sesame").hex())

    assert loads(f"keys.k.hash = 'sha256:{written}'") == loads("keys.k.key = 'sesame'")


def test_an_empty_array_allows_nothing():
    """And no array allows everything."""
    none, everything = loads("keys.a = { key = 'a', models = [], endpoints = [] }\nkeys.b.key = 'b'").keys.values()

    assert (none.models, none.endpoints) == ((), ())
    assert (everything.models, everything.endpoints) == (None, None)


@pytest.mark.parametrize(
    "pattern",
    [
        "qwen",
        "gpt-4o",
        "qwen:strict",
        "llama",
        "far/llama",
        "best",
        "o1",
        "*",
        "**",
        "far/*",
        "*wen",
        "q*t",
        "*:*",
        "b*",
    ],
)
def test_names_that_a_key_may_be_given(pattern):
    """Models, aliases, those that filters make, peers' models by both names, selectors and pins."""
    assert loads(key_with(f"models = ['{pattern}']")).keys["k"].models == (pattern,)


def test_all_names_is_right_where_there_are_none_yet():
    """So keys can be written first."""
    assert loads("keys.k = { key = 's', models = ['*'] }").keys["k"].models == ("*",)


def test_patterns_that_are_hard_to_judge_are_believed():
    """Thousands of patterns over thousands of names are not all tried."""
    models = "".join(f"models.m{index}.cmd = 'x ${{PORT}}'\n" for index in range(200))
    patterns = [f"x{index}*" for index in range(2_000)]

    told = mistakes(f"{models}keys.k = {{ key = 's', models = {patterns} }}")

    assert len(told) == 1_000


def test_secrets_are_not_shown():
    """Neither by a config that is printed, nor by a mistake, wherever a key was written by mistake."""
    config = loads("keys.a.key = 'top-secret'")

    assert "secret" not in repr(config)
    assert digest("top-secret").hex() not in repr(config)
    assert repr(digest("top-secret")) not in repr(config)
    assert mistakes("""
        [keys]
        a = "top-secret"
        b = 123456
        c.key = "top secret"
        d.key = ["top-secret"]
        e.hash = "top-secret"
        f.hash = 123456
        g.key = ""
        h = ["top-secret"]
        i = { key = "deep-secret" }
        j = { key = "deep-secret" }
        k = { key = "deep-secret", hash = "top-secret" }
        l = { hash = "sha256:top-secret" }
    """) == [
        f"keys.a: {HIDDEN} a table",
        f"keys.b: {HIDDEN} a table",
        "keys.c.key: found a key with spaces or control characters, allowed are keys without",
        f"keys.d.key: {HIDDEN} text in quotes",
        f'keys.e.hash: {HIDDEN} "sha256:" and 64 hexadecimal digits, as `trioswap key new` makes it',
        f"keys.f.hash: {HIDDEN} text in quotes",
        "keys.g.key: found an empty key, allowed are keys of at least one character",
        "keys.h: found an array, allowed is a table",
        'keys.j.key: found the key that is that of "i" already, allowed is one of its own',
        "keys.k.hash: found hash beside key, allowed is one of them",
        f'keys.l.hash: {HIDDEN} "sha256:" and 64 hexadecimal digits, as `trioswap key new` makes it',
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("keys = 'top-secret'", f"keys: {HIDDEN} a table"),
        ("keys = ['top-secret']", "keys: found an array, allowed is a table"),
        ("api_keys = 'top-secret'", f"api_keys: {HIDDEN} an array of texts"),
        ("api_keys = 123456", f"api_keys: {HIDDEN} an array of texts"),
        ("peers.p = 'top-secret'", f"peers.p: {HIDDEN} a table"),
    ],
)
def test_secrets_in_place_of_what_holds_them_are_not_shown(text, line):
    """As people write it who have not read on."""
    assert mistakes(text) == [line]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("keys.k = {}", "keys.k.key: found neither key nor hash, allowed is one of them"),
        (f"keys.k = {{ key = 's', hash = '{HASH}' }}", "keys.k.hash: found hash beside key, allowed is one of them"),
        (
            "api_keys = ['t', 's']\nkeys.k.key = 's'",
            "keys.k.key: found the key that is one of api_keys already, allowed is one of its own",
        ),
        (
            f"api_keys = ['s']\nkeys.k.hash = 'sha256:{digest('s').hex()}'",
            "keys.k.hash: found the key that is one of api_keys already, allowed is one of its own",
        ),
        (
            f"keys.'a b'.hash = '{HASH}'\nkeys.b.hash = '{HASH.replace('b', 'B')}'",
            'keys.b.hash: found the key that is that of "a b" already, allowed is one of its own',
        ),
        (
            "keys.' k'.key = 's'",
            'keys." k": found " k", allowed is a name of printable characters without spaces around it',
        ),
        (
            key_with("admin = true\nread_only = true"),
            "keys.k.read_only: found read_only beside admin, allowed is one of them",
        ),
        (key_with("admin = 'yes'"), 'keys.k.admin: found "yes", allowed is true or false'),
        (key_with("weight = 0"), "keys.k.weight: found 0, allowed is a number from 0 up, but not 0"),
        (key_with("concurrency = 0"), "keys.k.concurrency: found 0, allowed is a whole number from 1 up"),
        (key_with("modles = []"), 'keys.k.modles: unknown key, did you mean "models"?'),
        (key_with("models = 'qwen'"), 'keys.k.models: found "qwen", allowed is an array of texts'),
        (key_with("models = ['qwen', 5]"), 'keys.k.models[1]: found 5, allowed is text in quotes, did you mean "5"?'),
        (
            key_with("models = ['qwen', 'qwen', 'qwne']"),
            f'keys.k.models[2]: found "qwne", {NAME}, did you mean "qwen"?',
        ),
        (key_with("models = ['gema*']"), f'keys.k.models[0]: found "gema*", {NAME}, did you mean "gemma"?'),
        (key_with("models = ['']"), f'keys.k.models[0]: found "", {NAME}'),
        (key_with("models = ['?wen']"), f'keys.k.models[0]: found "?wen", {NAME}, did you mean "qwen"?'),
        (key_with("models = ['night']"), f'keys.k.models[0]: found "night", {NAME}'),
        (key_with("endpoints = ['v1/models']"), f'keys.k.endpoints[0]: found "v1/models", {ENDPOINT}'),
        (key_with("endpoints = ['/v1/*', '/a?b']"), f'keys.k.endpoints[1]: found "/a?b", {ENDPOINT}'),
        (key_with("endpoints = ['/a#b']"), f'keys.k.endpoints[0]: found "/a#b", {ENDPOINT}'),
        (key_with("endpoints = ['/a b']"), f'keys.k.endpoints[0]: found "/a b", {ENDPOINT}'),
        (key_with("endpoints = ['*']"), f'keys.k.endpoints[0]: found "*", {ENDPOINT}'),
    ],
)
def test_a_mistake_about_a_key_is_told_in_one_line(text, line):
    """One mistake, one line: where, what was found, what is allowed; no other that follows from it."""
    assert mistakes(text) == [line]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("models = 5\nkeys.k = { key = 's', models = ['qwen'] }", 1),
        ("models.a = 5\nkeys.k = { key = 's', models = ['a'] }", 1),
        ("models.a = { cmd = 'x ${PORT}', aliases = 'b' }\nkeys.k = { key = 's', models = ['b'] }", 1),
        ("selectors = 5\nkeys.k = { key = 's', models = ['b'] }", 1),
        ("peers = 5\nkeys.k = { key = 's', models = ['b'] }", 1),
        ("profiles = 5\nkeys.k = { key = 's', models = ['b'] }", 1),
        ("profiles.p.pins = 'b'\nkeys.k = { key = 's', models = ['b'] }", 1),
        ("api_keys = [5]\nkeys.k.hash = 5", 2),
        ("api_keys = ['']\nkeys.k.key = ''", 2),
        ("keys = { a.key = '', b.key = '' }", 2),
        ("keys = { a.key = 5, b.hash = 5 }", 2),
    ],
)
def test_a_mistake_hides_what_only_follows_from_it(text, lines):
    """What cannot be known because of a mistake is not told as another: one line for each value that is wrong."""
    assert len(mistakes(text)) == lines


def test_the_rest_is_judged_beside_a_wrong_value():
    """Keys keep their names and patterns their places."""
    text = """
        keys.a = 5
        keys.b = { key = 's', models = [5, 'x'], endpoints = [5, 'x'], weight = 'much' }
        cors.origins = [5, 'x']
        trusted_proxies = [5, 'x']
        tls = { cert_file = 5 }
        heartbeat = -1
    """

    assert [line.partition(":")[0] for line in mistakes(text)] == [
        "cors.origins[0]",
        "cors.origins[1]",
        "heartbeat",
        "keys.a",
        "keys.b.endpoints[0]",
        "keys.b.endpoints[1]",
        "keys.b.models[0]",
        "keys.b.models[1]",
        "keys.b.weight",
        "tls.cert_file",
        "tls.key_file",
        "trusted_proxies[0]",
        "trusted_proxies[1]",
    ]


# ---- patterns -----------------------------------------------------------------------------------


def texts(alphabet: str, longest: int) -> list[str]:
    """All texts of so many characters at most."""
    return ["".join(word) for length in range(longest + 1) for word in product(alphabet, repeat=length)]


def test_a_pattern_means_what_a_regular_expression_does():
    """In which every star is `.*`: all short patterns, on all short texts."""
    for pattern in texts("ab*", 5):
        expression = re.compile(".*".join(map(re.escape, pattern.split("*"))))
        for text in texts("ab", 4):
            assert fits(pattern, text) == (expression.fullmatch(text) is not None), (pattern, text)


@pytest.mark.parametrize("character", [".", "?", "[a]", "\\", "^", "$", "+"])
def test_nothing_but_the_star_means_anything(character):
    """Names may hold whatever regular expressions and shells have a meaning for."""
    assert fits(f"x{character}*", f"x{character}y")
    assert not fits(f"x{character}*", "xay")


# ---- TLS ----------------------------------------------------------------------------------------


def test_files_of_tls_are_relative_to_the_configuration(tmp_path, monkeypatch):
    """Or to the home, or to nothing; they need not be there yet."""
    monkeypatch.setenv("HOME", "/home/x")
    file = tmp_path / "c.toml"

    file.write_text("tls = { cert_file = 'tls/a.crt', key_file = '/etc/a.key' }")
    assert load(file).tls == TlsConfig(tmp_path / "tls/a.crt", Path("/etc/a.key"))
    file.write_text("tls = { cert_file = '~/a.crt', key_file = 'a.key' }")
    assert load(file).tls == TlsConfig(Path("/home/x/a.crt"), tmp_path / "a.key")


def test_files_of_tls_are_relative_to_the_file_that_names_them(tmp_path):
    """Also where it is the second of two."""
    (tmp_path / "more").mkdir()
    (tmp_path / "a.toml").write_text("tls.cert_file = 'a.crt'")
    (tmp_path / "more" / "b.yaml").write_text("tls: {keyFile: a.key}")

    config = load_sources([tmp_path / "a.toml", tmp_path / "more" / "b.yaml"], None, {}, translate)

    assert config.tls == TlsConfig(tmp_path / "a.crt", tmp_path / "more" / "a.key")


# ---- web pages, proxies, sockets ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "origins"),
    [
        (["https://Chat.Example", "http://10.0.0.1:3000"], ("https://chat.example", "http://10.0.0.1:3000")),
        (["HTTPS://a:443", "http://a:80", "http://a:443"], ("https://a", "http://a", "http://a:443")),
        (["https://a", "https://A", "https://a:0443"], ("https://a",)),
        (["http://[::1]:8080"], ("http://[::1]:8080",)),
        (
            ["tauri://localhost", "app://obsidian.md", "app://x:443"],
            ("tauri://localhost", "app://obsidian.md", "app://x:443"),
        ),
        (["chrome-extension://Fabc", "capacitor://localhost"], ("chrome-extension://fabc", "capacitor://localhost")),
        (["*"], ("*",)),
        ([], ()),
    ],
)
def test_origins_are_as_browsers_send_them(written, origins):
    """In lower case, without the port that goes without saying (RFC 6454, 6.1), each once."""
    assert loads(f"cors = {{ origins = {written}, private_network = true }}").cors == CorsConfig(origins, True)


def test_networks_arrive():
    """Addresses are networks of one; each counts once."""
    config = loads("trusted_proxies = ['127.0.0.1', '10.0.0.0/8', '::1', 'fd00::/8', '10.0.0.0/255.0.0.0']")

    assert config.trusted_proxies == tuple(map(ip_network, ["127.0.0.1/32", "10.0.0.0/8", "::1/128", "fd00::/8"]))


def test_a_socket_of_the_file_system():
    """It is told apart from a host and a port, and stands in nobody's way."""
    text = "listen = 'unix:/run/my socket.sock'\npeers.p = { proxy = 'http://h:80', models = ['m'] }"

    assert loads(text + MODELS.replace("peers.far", "peers.q")).listen == "unix:/run/my socket.sock"
    assert parse_listen("unix:/run/x.sock") == UnixAddress("/run/x.sock")
    assert parse_listen(f"unix:/{'x' * 106}") == UnixAddress(f"/{'x' * 106}")
    assert parse_listen("localhost:80") == Address("127.0.0.1", 80)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("tls = {}", "tls.cert_file: found none, allowed is the path of a PEM file"),
        ("tls.cert_file = 'a'", "tls.key_file: found none, allowed is the path of a PEM file"),
        ("tls = { cert_file = 'a', key_file = '' }", 'tls.key_file: found "", allowed is the path of a PEM file'),
        (
            "tls = { cert_file = '/', key_file = 'a' }",
            'tls.cert_file: found "/", allowed is the path of a PEM file (it is a directory)',
        ),
        ("tls = 'a.pem'", 'tls: found "a.pem", allowed is a table'),
        ("cors.origins = 'https://a'", 'cors.origins: found "https://a", allowed is an array of texts'),
        (
            "cors.origins = ['https://A.example/chat']",
            f'cors.origins[0]: found "https://A.example/chat", {ORIGIN}, did you mean "https://A.example"?',
        ),
        ("cors.origins = ['http://a/']", f'cors.origins[0]: found "http://a/", {ORIGIN}, did you mean "http://a"?'),
        ("cors.origins = ['a.example']", f'cors.origins[0]: found "a.example", {ORIGIN}'),
        ("cors.origins = ['https://*.example']", f'cors.origins[0]: found "https://*.example", {ORIGIN}'),
        (
            "cors.origins = ['https://\\u212aa']".replace("'", '"'),
            f'cors.origins[0]: found "https://\u212aa", {ORIGIN}',
        ),
        ("cors.origins = ['https://']", f'cors.origins[0]: found "https://", {ORIGIN}'),
        ("cors.origins = ['']", f'cors.origins[0]: found "", {ORIGIN}'),
        ("cors.origins = ['https://a?x']", f'cors.origins[0]: found "https://a?x", {ORIGIN}'),
        ("cors.origins = ['http://a:0']", 'cors.origins[0]: found port 0 in "http://a:0", allowed is 1 to 65535'),
        (
            "cors.origins = ['http://a:65536']",
            'cors.origins[0]: found port 65536 in "http://a:65536", allowed is 1 to 65535',
        ),
        ("cors.origins = ['http://a', '*']", f'cors.origins[1]: found "*" beside other origins, {ORIGIN}'),
        ("cors.origins = ['*', '*']", f'cors.origins[0]: found "*" beside other origins, {ORIGIN}'),
        ("cors.origins = ['Null']", f'cors.origins[0]: found "Null", which any page can be, {ORIGIN}'),
        ("trusted_proxies = '10.0.0.1'", 'trusted_proxies: found "10.0.0.1", allowed is an array of texts'),
        ("trusted_proxies = ['proxy']", f'trusted_proxies[0]: found "proxy", {NETWORK}'),
        ("trusted_proxies = ['']", f'trusted_proxies[0]: found "", {NETWORK}'),
        ("trusted_proxies = ['10.0.0.0/33']", f'trusted_proxies[0]: found "10.0.0.0/33", {NETWORK}'),
        ("trusted_proxies = ['10.0.0.1:80']", f'trusted_proxies[0]: found "10.0.0.1:80", {NETWORK}'),
        ("trusted_proxies = ['fe80::1%eth0']", f'trusted_proxies[0]: found "fe80::1%eth0", {NETWORK}'),
        (
            "trusted_proxies = ['::1', '10.1.2.3/8']",
            (
                f'trusted_proxies[1]: found "10.1.2.3/8", which is an address within a network, {NETWORK}, '
                'did you mean "10.0.0.0/8"?'
            ),
        ),
        ("listen = 'unix:run/x.sock'", f'listen: found "unix:run/x.sock", {SOCKET}'),
        ("listen = 'unix:~/x.sock'", f'listen: found "unix:~/x.sock", {SOCKET}'),
        ("listen = 'unix:///run/x.sock'", f'listen: found "unix:///run/x.sock", {SOCKET}'),
        ("listen = 'unix:/run/'", f'listen: found "unix:/run/", {SOCKET}'),
        ("listen = 'unix:'", f'listen: found "unix:", {SOCKET}'),
        ('listen = "unix:/a\\nb"', f'listen: found "unix:/a\\nb", {SOCKET}'),
        (
            f"listen = 'unix:/{'ä' * 60}'",
            "listen: found a path of 121 bytes, allowed are at most 107 for a socket",
        ),
        ("max_queue = 0", "max_queue: found 0, allowed is a whole number from 1 up"),
        (
            "heartbeat = '5 s'",
            (
                'heartbeat: found "5 s", allowed is a number of seconds from 0 up, or text such as '
                '"90s", "1h30m", "500ms", "2d"'
            ),
        ),
        (
            "max_upload = 0",
            (
                "max_upload: found 0, allowed is a whole number of bytes from 0 up, or text such as "
                '"18GiB", "512MiB", "2GB", but not 0'
            ),
        ),
    ],
)
def test_a_mistake_is_told_first_in_one_line(text, line):
    """Where, what was found, what is allowed; of `tls` and `*` both halves are wrong alike."""
    told = mistakes(text)

    assert told[0] == line
    assert len(told) == 1 + (text in ("tls = {}", "cors.origins = ['*', '*']"))


# ---- limits -------------------------------------------------------------------------------------


def test_every_limit_arrives():
    """Durations in seconds, sizes in bytes."""
    config = loads("heartbeat = '2m'\nmax_queue = 7\nmax_upload = '1GiB'")

    assert (config.heartbeat, config.max_queue, config.max_upload) == (120.0, 7, 2**30)


def test_limits_have_defaults():
    """A file that says nothing has them all."""
    config = loads("")

    assert (config.heartbeat, config.max_queue, config.max_upload) == (5.0, 1000, 4 * 2**30)
    assert (config.keys, config.tls, config.cors, config.trusted_proxies) == ({}, None, CorsConfig(), ())


def test_no_heartbeat():
    """0 says none."""
    assert loads("heartbeat = 0").heartbeat is None


@pytest.mark.parametrize(
    ("above", "own", "seconds"),
    [("", "", None), ("5", "", 5.0), ("'1m'", "0", None), ("0", "7", 7.0), ("5", "'1m'", 60.0), ("0", "", None)],
)
def test_the_time_in_the_queue_is_inherited(above, own, seconds):
    """What a model says wins, and 0 is no limit."""
    text = f"queue_timeout = {above}\n" if above else ""
    text += "models.a.cmd = 'x ${PORT}'\n" + (f"models.a.queue_timeout = {own}" if own else "")

    assert loads(text).models["a"].queue_timeout == seconds


# ---- other files ----------------------------------------------------------------------------------


def test_the_same_in_yaml(tmp_path):
    """Names in camel case; a key may look like a number, and be in the environment."""
    (tmp_path / "c.yaml").write_text("""
        keys:
          phone: {key: 0123, models: ["qwen*"], endpoints: [/v1/*], readOnly: yes, concurrency: 2}
          env: {key: "${env.KEY}", peers: false}
        tls: {certFile: a.crt, keyFile: a.key}
        cors: {origins: ["*"], privateNetwork: true}
        trustedProxies: [10.0.0.0/8, "::1"]
        heartbeat: 0
        maxQueue: 5
        maxUpload: 1MiB
        queueTimeout: 90
        models: {qwen: {cmd: "x ${PORT}"}, slow: {cmd: "x ${PORT}", queueTimeout: 0}}
    """)
    (tmp_path / "c.toml").write_text("""
        keys.phone = { key = "0123", models = ["qwen*"], endpoints = ["/v1/*"], read_only = true, concurrency = 2 }
        keys.env = { key = "sesame", peers = false }
        tls = { cert_file = "a.crt", key_file = "a.key" }
        cors = { origins = ["*"], private_network = true }
        trusted_proxies = ["10.0.0.0/8", "::1"]
        heartbeat = 0
        max_queue = 5
        max_upload = "1MiB"
        queue_timeout = "90s"
        models = { qwen.cmd = "x ${PORT}", slow = { cmd = "x ${PORT}", queue_timeout = 0 } }
        groups = {}
    """)

    [yaml, toml] = [
        load_sources([tmp_path / name], None, {"KEY": "sesame"}, translate) for name in ("c.yaml", "c.toml")
    ]

    assert yaml == toml
    assert isinstance(yaml, Config)
    assert yaml.keys["env"].digest == digest("sesame")


def test_a_key_is_in_one_file(tmp_path):
    """Nobody adds rights to it elsewhere; arrays of both count."""
    (tmp_path / "a.toml").write_text("keys.k.key = 'top-secret'\ntrusted_proxies = ['::1']")
    (tmp_path / "b.toml").write_text("keys.k.admin = true")

    with pytest.raises(ConfigError) as caught:
        load_sources([tmp_path / "a.toml", tmp_path / "b.toml"], None, {}, translate)

    a, b = tmp_path / "a.toml", tmp_path / "b.toml"
    assert caught.value.mistakes == [f"{a}:1: keys.k: found it again at {b}:1, allowed is one file for each"]
