"""What is made from the declared keys: the page about the configuration and the JSON schema."""

from __future__ import annotations

import tomllib
from pathlib import Path

import attrs
import jsonschema
import pytest

from trioswap.config import Config, loads
from trioswap.config.describe import is_literal, markdown
from trioswap.config.jsonschema import schema
from trioswap.config.keys import Key, keys_of
from trioswap.config.kinds import Amount, Duration, Patience, Size
from trioswap.config.later import NOT_YET
from trioswap.config.raw import RawConfig

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))


def all_keys(table: type = RawConfig, path: str = "") -> dict[str, Key]:
    """Every key there is by its path, `*` for free names."""
    keys = {}
    for key in keys_of(table).values():
        here = f"{path}{key.name}"
        keys[here] = key
        if key.table is not None:
            keys |= all_keys(key.table, f"{here}.*." if key.is_by_name else f"{here}.")
    return keys


KEYS = all_keys()


# ---- the declarations ---------------------------------------------------------------------------


@pytest.mark.parametrize("path", KEYS)
def test_every_key_says_what_it_means(path):
    """A sentence, a unit where there is one, and where it is needed no default."""
    key = KEYS[path]

    assert key.text[0].isupper() or key.text[0] == "`"
    assert key.text.endswith(".")
    assert (key.unit == "s") == (key.type in (Duration, Patience))
    assert key.unit == "bytes" or key.type not in (Amount, Size)
    assert not (key.required and key.default)


def test_every_field_of_a_raw_class_is_a_key():
    """Fields without a text cannot even be asked for."""
    with pytest.raises(KeyError):
        keys_of(attrs.make_class("RawNew", {"field": attrs.field(default=None, type=int)}))


def test_names_in_yaml_are_those_of_llama_swap():
    """Camel case, except where llama-swap spells a key otherwise."""
    spelled = {path: KEYS[path].yaml for path in KEYS}

    assert spelled["health_check_timeout"] == "healthCheckTimeout"
    assert spelled["global_ttl"] == "globalTTL"
    assert spelled["models.*.filters.set_params_by_id"] == "setParamsByID"
    assert spelled["matrix.evict_costs"] == "evict_costs"
    assert spelled["hooks.on_startup"] == "on_startup"
    assert spelled["ui.activity.session_id"] == "session_id"
    assert spelled["models.*.capabilities.in"] == "in"
    assert spelled["models.*.timeouts.tls_handshake"] == "tlsHandshake"
    assert spelled["keys.*.read_only"] == "readOnly"
    assert spelled["keys.*.key"] == "key"
    assert spelled["tls.cert_file"] == "certFile"


LITERALS = [key for key in keys_of(RawConfig).values() if key.default and is_literal(key.default)]


@pytest.mark.parametrize("key", LITERALS, ids=lambda key: key.name)
def test_a_default_that_is_shown_is_the_true_one(key):
    """Written into a file it changes nothing."""
    assert loads(f"{key.name} = {key.default}") == Config()


@pytest.mark.parametrize("path", [path for path in KEYS if path.startswith("models.*.")])
def test_the_default_of_a_model_is_the_true_one(path):
    """The same, for the keys of a model and of the tables in it."""
    default = KEYS[path].default
    *_, table, name = path.split(".")
    header = "models.m" if table == "*" else f"models.m.{table}"
    model = "models.m.cmd = 'x ${PORT}'\n"
    if is_literal(default) and name != "args":
        # Which device is free shows later, so "auto" and nothing are two values for one thing.
        same = {"device": None} if name == "device" else {}
        written = loads(f"{model}{header}.{name} = {default}").models["m"]
        assert attrs.evolve(written, **same) == loads(model).models["m"]


def test_what_is_not_acted_on_yet_are_keys():
    """The list names nothing that is not there, and nothing twice."""
    assert set(NOT_YET) <= KEYS.keys()
    assert sorted(set(NOT_YET)) == list(NOT_YET)


# ---- the page -----------------------------------------------------------------------------------


def test_the_page_is_up_to_date():
    """It is made by `python -m trioswap.config.describe > docs/configuration.md`."""
    assert (ROOT / "docs" / "configuration.md").read_text() == markdown(), (
        "run: python -m trioswap.config.describe > docs/configuration.md"
    )


@pytest.mark.parametrize("path", KEYS)
def test_the_page_tells_every_key(path):
    """Its name, its meaning, and whether it is for later."""
    key = KEYS[path]
    rows = [row for row in markdown().splitlines() if row.startswith(f"| `{key.name}` |")]
    about = key.text.replace("|", "\\|")

    assert any(about in row and row.endswith("*Not yet.* |") == (path in NOT_YET) for row in rows)


def test_links_within_the_page_lead_to_headings():
    """Each table that a key holds has a heading of its own."""
    page = markdown()
    headings = {line[3:].strip("`[]").lower().replace(".", "") for line in page.splitlines() if line.startswith("## `")}
    links = {link.partition(")")[0] for link in page.split("](#")[1:]}

    assert links == headings


# ---- the schema ---------------------------------------------------------------------------------


def refused(document: dict[str, object], spelling: str = "toml") -> bool:
    """Whether the schema finds something wrong in *document*."""
    return not jsonschema.Draft202012Validator(schema(spelling)).is_valid(document)


@pytest.mark.parametrize("spelling", ["toml", "yaml"])
def test_the_schema_is_one(spelling):
    """It follows the rules of its dialect, and every reference in it leads somewhere."""
    made = schema(spelling)

    jsonschema.Draft202012Validator.check_schema(made)
    references = {part.partition("'")[0] for part in str(made).split("#/$defs/")[1:]}
    assert references == made["$defs"].keys()


def in_yaml(document: dict[str, object], raw: type) -> dict[str, object]:
    """The native *document* with the names of YAML."""
    return {keys_of(raw)[name].yaml: within(value, keys_of(raw)[name]) for name, value in document.items()}


def within(value: object, key: Key) -> object:
    """The *value* of *key*, with the names of YAML in the tables that it holds."""
    if key.table is None:
        return value
    if not key.is_by_name:
        return in_yaml(value, key.table)
    return {name: in_yaml(table, key.table) for name, table in value.items()}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_examples_are_valid(path):
    """Also with the names of YAML; and then not as TOML, where any name differs."""
    document = tomllib.loads(path.read_text())
    translated = in_yaml(document, RawConfig)

    assert not refused(document)
    assert not refused(translated, "yaml")
    assert refused(translated) == (translated != document)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "models.a = { gguf = 'm.gguf', ttl = '1h30m', memory = { gpu0 = '2GiB' } }",
        "models.a = { cmd = ['x'], ttl = '${ttl}', unlisted = '${hidden}', parallel = '${env.N}' }",
        "models.a = { cmd = 'x', memory = 5, env = { A = '' }, metadata = { x = [1, { y = false }] } }",
        "memory.devices = { gpu0 = 'auto', ram = 0 }",
        "macros = { a = 1, b-c = 'x', d = true, e = 0.5 }",
        "keys = { a.key = 'k', b = { hash = 'sha256:0', weight = 0.5, concurrency = '${n}' } }",
        "tls = { cert_file = 'a', key_file = 'b' }\ncors = {}\nheartbeat = 0\ntrusted_proxies = []",
    ],
)
def test_right_files_are_valid(text):
    """Durations and sizes as numbers and texts, and macros anywhere but for tables."""
    assert not refused(tomllib.loads(text))


@pytest.mark.parametrize(
    "text",
    [
        "lisen = 'x'",
        "models.a = {}",
        "models.a = { cmd = 5 }",
        "models.a = { cmd = [] }",
        "models.a = { cmd = 'x', tll = 5 }",
        "models.a = { cmd = 'x', ttl = -1 }",
        "models.a = { cmd = 'x', ttl = '' }",
        "models.a = { cmd = 'x', ttl = '5 s' }",
        "models.a = { cmd = 'x', ttl = true }",
        "models.a = { cmd = 'x', health_check_timeout = '0s' }",
        "models.a = { cmd = 'x', unlisted = 'yes' }",
        "models.a = { cmd = 'x', weight = 0 }",
        "models.a = { cmd = 'x', memory = '1XB' }",
        "models.a = { cmd = 'x', env = { '1a' = '' } }",
        "models.a = { cmd = 'x', env = ['A=1'] }",
        "models.a = { cmd = 'x', capabilities = { in = ['smell'] } }",
        "models.' a'.cmd = 'x'",
        "log_level = 'warn'",
        "max_request_body = 0",
        "capture_buffer = -1",
        "groups.g.member = []",
        "matrix = {}",
        "macros.'a b' = 1",
        "macros.a = []",
        "store = {}",
        "profiles.p = {}",
        "selectors.s = { targets = ['a'] }",
        "selectors.s = { strategy = 'hot', targets = ['a'] }",
        "peers.p = { proxy = 'http://h' }",
        "routing = {}",
        "keys.a = {}",
        "keys.a = { key = 'k', hash = 'h' }",
        "keys.a = { key = 'k', weight = 0 }",
        "keys.' a'.key = 'k'",
        "keys.a = 'k'",
        "tls = { cert_file = 'a' }",
        "cors.origin = []",
        "max_queue = 0",
    ],
)
def test_wrong_files_are_refused(text):
    """Unknown keys, wrong types, values out of range, and what is needed but not there."""
    assert refused(tomllib.loads(text))


LLAMA_SWAP = {
    "healthCheckTimeout": 120,
    "logLevel": "warn",
    "globalTTL": 0,
    "captureBuffer": 10,
    "metricsMaxInMemory": 0,
    "macros": {"server": "llama-server --port ${PORT}"},
    "models": {
        "a": {
            "cmd": "${server}",
            "cmdStop": "stop ${PID}",
            "env": ["A=1", "B="],
            "ttl": -1,
            "concurrencyLimit": 0,
            "filters": {"stripParams": "top_k, seed", "setParamsByID": {"a:x": {"seed": 1}}},
        }
    },
    "performance": {"every": "5s"},
    "profiles": {"p": {"pins": {"x": None, "y": "a"}}},
    "routing": {
        "router": {"use": "group", "settings": {"groups": {"g": {"members": ["a"]}}}},
        "scheduler": {"use": "fifo", "settings": {"fifo": {"priority": {"a": 5}}}},
    },
}


def test_files_of_llama_swap_are_valid():
    """With its own shapes of env, stripParams, captureBuffer and routing."""
    assert not refused(LLAMA_SWAP, "yaml")


@pytest.mark.parametrize(
    "change",
    [
        {"healthcheckTimeout": 1},
        {"routing": {"router": {"use": "groups"}}},
        {"routing": {"scheduler": {"settings": {"fifo": {"priority": {"a": "high"}}}}}},
        {"models": {"a": {"cmd": "x", "env": ["A"]}}},
        {"models": {"a": {"cmd": "x", "ttl": -2}}},
        {"logLevel": "loud"},
    ],
)
def test_wrong_files_of_llama_swap_are_refused(change):
    """In YAML too."""
    assert refused(LLAMA_SWAP | change, "yaml")
