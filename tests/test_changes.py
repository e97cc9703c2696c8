"""What differs between two configurations: each key in its class, nothing forgotten, nothing secret told."""

from __future__ import annotations

import json
import re
import signal
from ipaddress import ip_network
from pathlib import Path

import attrs
import pytest

from trioswap.config import Config, GroupConfig, MatrixConfig, MemoryConfig, ModelConfig, load, loads
from trioswap.config.changes import LATER, OTHERS, RESTARTS, SETTINGS, TABLES, UPDATES, Changes, compare, effective
from trioswap.config.parts import (
    CapabilityConfig,
    CorsConfig,
    FilterConfig,
    HooksConfig,
    KeyConfig,
    PeerConfig,
    PerformanceConfig,
    ProfileConfig,
    SelectorConfig,
    StoreConfig,
    TimeoutConfig,
    TlsConfig,
    UiConfig,
)
from trioswap.config.schema import ModelHooks

MODEL = ModelConfig("a", argv=("x", "--port", "5800"), proxy="http://127.0.0.1:5800", port=5800)
BASE = Config(models={"a": MODEL})
TLS = TlsConfig(Path("/c.pem"), Path("/k.pem"))

# field -> another value, and the key by which the change is told
RESTARTING = {
    "argv": (("y",), "cmd"),
    "proxy": ("http://127.0.0.1:1", "proxy"),
    "check_endpoint": (None, "check_endpoint"),
    "port_owner": ("any", "port_owner"),
    "env": ({"A": "1"}, "env"),
}
UPDATING = {
    "stop_argv": (("stop",), "cmd_stop"),
    "aliases": (("b",), "aliases"),
    "unlisted": (True, "unlisted"),
    "display_name": ("A", "name"),
    "description": ("text", "description"),
    "use_model_name": ("b", "use_model_name"),
    "ttl": (60.0, "ttl"),
    "health_check_timeout": (1.0, "health_check_timeout"),
    "unload_timeout": (1.0, "unload_timeout"),
    "stop_signal": (signal.SIGINT, "stop_signal"),
    "never_kill": (True, "never_kill"),
    "hooks": (ModelHooks(before_start=("x",)), "hooks"),
    "hook_timeout": (1.0, "hook_timeout"),
    "liveness": (1.0, "liveness"),
    "liveness_misses": (1, "liveness_misses"),
    "backoff": (2.0, "backoff"),
    "backoff_max": (3.0, "backoff_max"),
    "max_wait": (1.0, "max_wait"),
    "drain_timeout": (1.0, "drain_timeout"),
    "unload_drain_timeout": (1.0, "unload_drain_timeout"),
    "turn_lease": (1.0, "turn_lease"),
    "linger": (0.0, "linger"),
    "parallel": (1, "parallel"),
    "concurrency_limit": (1, "concurrency_limit"),
    "queue_timeout": (1.0, "queue_timeout"),
    "weight": (2.0, "weight"),
    "priority": (1, "priority"),
    "load_cost": (1.0, "load_cost"),
    "stop_cost": (1.0, "stop_cost"),
    "memory": (1, "memory"),
    "device": ("ram", "device"),
    "filters": (FilterConfig(strip_params=("top_k",)), "filters"),
    "timeouts": (TimeoutConfig(connect=1.0), "timeouts"),
    "capabilities": (CapabilityConfig(tools=True), "capabilities"),
    "metadata": ({"a": 1}, "metadata"),
    "send_loading_state": (True, "send_loading_state"),
    "ignore_websockets": (True, "compat.ignore_websockets"),
}
IMMEDIATE = {
    "policy": ("fifo", "policy"),
    "parallel_loads": (2, "parallel_loads"),
    "matrix": (MatrixConfig(costs={"a": 2}), "matrix"),
    "groups": ((GroupConfig("g", ("a",)),), "groups.g"),
    "start_port": (7000, "start_port"),
    "api_keys": (("sesame",), "api_keys"),
    "keys": ({"k": KeyConfig("k", b"sesame")}, "keys.k"),
    "cors": (CorsConfig(private_network=True), "cors"),
    "trusted_proxies": ((ip_network("10.0.0.0/8"),), "trusted_proxies"),
    "heartbeat": (None, "heartbeat"),
    "max_queue": (1, "max_queue"),
    "log_time_format": ("kitchen", "log_time_format"),
    "log_level": ("debug", "log_level"),
    "max_request_body": (1, "max_request_body"),
    "max_upload": (1, "max_upload"),
    "include_aliases_in_list": (True, "include_aliases_in_list"),
    "profiles": ({"p": ProfileConfig("p", {})}, "profiles.p"),
    "selectors": ({"s": SelectorConfig("s", "pin", ("a",))}, "selectors.s"),
    "peers": ({"p": PeerConfig("p", "http://p", ("m",))}, "peers.p"),
    "hooks": (HooksConfig(preload=("a",)), "hooks"),
    "ignore_paths": ((re.compile("a"),), "upstream.ignore_paths"),
    "metrics_max_in_memory": (1, "metrics_max_in_memory"),
    "capture_buffer": (None, "capture_buffer"),
    "store": (StoreConfig(Path("/s")), "store"),
    "performance": (PerformanceConfig(60.0), "performance"),
    "ui": (UiConfig(("X-Session",)), "ui"),
}
WAITING = {
    "listen": ("127.0.0.1:1", "listen"),
    "state_dir": (Path("/s"), "state_dir"),
    "tls": (TLS, "tls"),
    "log_to_stdout": ("both", "log_to_stdout"),
    "log_dir": (Path("/l"), "log_dir"),
    "log_file_size": (4096, "log_file_size"),
    "log_files": (1, "log_files"),
}


def with_model(**changes: object) -> Config:
    return attrs.evolve(BASE, models={"a": attrs.evolve(MODEL, **changes)})


def fields_of(kind: type) -> set[str]:
    """All that is handed in."""
    return {field.name for field in attrs.fields(kind) if field.init}


# ---- nothing is forgotten -------------------------------------------------------------------


def test_every_field_of_a_model_has_its_class():
    """A new field must be put into one before this passes; `name` tells models apart, `port` shows in others."""
    assert fields_of(ModelConfig) == {*RESTARTS, *UPDATES, "name", "port"}
    assert RESTARTS.keys().isdisjoint(UPDATES)
    assert (RESTARTING.keys(), UPDATING.keys()) == (RESTARTS.keys(), UPDATES.keys())


def test_every_field_of_a_configuration_has_its_class():
    """The same; what is not acted on is no part of what is meant."""
    classes = [*SETTINGS, *TABLES, *LATER, *OTHERS]

    assert sorted(classes) == sorted(fields_of(Config) - {"_not_acted_on"})
    assert {*IMMEDIATE, *WAITING} == {*classes} - {"models", "memory"}


@pytest.mark.parametrize("field", RESTARTING)
def test_what_a_server_was_started_with(field):
    """It must be stopped for it."""
    value, key = RESTARTING[field]

    assert compare(BASE, with_model(**{field: value})) == Changes(restarted={"a": (key,)})
    assert compare(with_model(**{field: value}), BASE) == Changes(restarted={"a": (key,)})


@pytest.mark.parametrize("field", UPDATING)
def test_what_is_looked_up_when_needed(field):
    """The server goes on."""
    value, key = UPDATING[field]

    assert compare(BASE, with_model(**{field: value})) == Changes(updated={"a": (key,)})
    assert compare(with_model(**{field: value}), BASE) == Changes(updated={"a": (key,)})


@pytest.mark.parametrize("field", IMMEDIATE)
def test_settings(field):
    """No server is touched."""
    value, key = IMMEDIATE[field]
    new = attrs.evolve(BASE, **{field: value})

    assert compare(BASE, new) == Changes(settings=(key,))
    assert compare(new, BASE) == Changes(settings=(key,))
    assert effective(BASE, new) == new


@pytest.mark.parametrize("field", WAITING)
def test_what_waits_for_the_next_start(field):
    """It is told at each reload until then, for what is in effect has it not."""
    value, key = WAITING[field]
    new = attrs.evolve(BASE, **{field: value})

    assert compare(BASE, new) == Changes(later=(key,))
    assert compare(new, BASE) == Changes(later=(key,))
    assert effective(BASE, new) == BASE
    assert compare(effective(BASE, new), new) == Changes(later=(key,))


@pytest.mark.parametrize("field", [field.name for field in attrs.fields(MemoryConfig)])
def test_memory(field):
    """Sizes and habits change at once; with other devices all that is reserved would have to begin anew."""
    values = {"headroom": 1, "yield_to_others": True, "learn": False, "devices": {"ram": None}}
    new = attrs.evolve(BASE, memory=attrs.evolve(MemoryConfig(), **{field: values[field]}))

    key = f"memory.{field}"
    assert compare(BASE, new) == (Changes(later=(key,)) if field == "devices" else Changes(settings=(key,)))


# ---- models ---------------------------------------------------------------------------------


def test_models_that_come_and_go():
    """A model under another name is another model."""
    old = Config(models={name: attrs.evolve(MODEL, name=name) for name in "cab"})
    new = Config(models={name: attrs.evolve(MODEL, name=name) for name in "dbe"})

    assert compare(old, new) == Changes(added=("d", "e"), removed=("a", "c"))


def test_a_model_is_in_one_class_only():
    """One that starts again does so with all that is new."""
    assert compare(BASE, with_model(ttl=1.0, argv=("y",))) == Changes(restarted={"a": ("cmd", "ttl")})


def test_the_same_command_is_no_change():
    """Not even when its port was written in figures before."""
    old, new = (loads(f"[models.a]\ncmd = 'x {port}'\nproxy = 'http://127.0.0.1:5800'") for port in ("5800", "${PORT}"))

    assert (old.models["a"].port, new.models["a"].port) == (None, 5800)
    assert compare(old, new).nothing


def test_a_gguf_file_is_part_of_the_command(tmp_path):
    """So are its arguments."""
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    (tmp_path / "c.toml").write_text("[models.m]\ngguf = 'a.gguf'")
    old = load(tmp_path / "c.toml")

    for text in ("gguf = 'b.gguf'", "gguf = 'a.gguf'\nargs = ['-x']"):
        (tmp_path / "c.toml").write_text(f"[models.m]\n{text}")
        assert compare(old, load(tmp_path / "c.toml")) == Changes(restarted={"m": ("cmd",)})


def test_an_inherited_value_is_told_of_each_model_that_inherits_it():
    """A key for all models is one of each."""
    models = "[models.a]\ncmd = 'x ${PORT}'\n[models.b]\ncmd = 'x ${PORT}'\nttl = 1"

    assert compare(loads(models), loads("global_ttl = 9\n" + models)) == Changes(updated={"a": ("ttl",)})


@pytest.mark.parametrize(("old", "new"), [("1", "true"), ("1", "1.0"), ("[1]", "[true]"), ("{x = 0}", "{x = false}")])
def test_what_differs_in_json_only(old, new):
    """Python takes them for equal, a model server does not."""
    first, second = (
        f"[models.a]\ncmd = 'x ${{PORT}}'\n[models.a.filters.set_params]\nk = {value}" for value in (old, new)
    )

    assert compare(loads(first), loads(second)) == Changes(updated={"a": ("filters",)})


@pytest.mark.parametrize("text", ["# a comment", "macros = {m = 'x'}", "[models.a.macros]\nm = 1"])
def test_what_means_nothing(text):
    """Comments and macros that nobody uses make no difference."""
    model = "[models.a]\ncmd = 'x ${PORT}'"
    written = f"{model}\n{text}" if text.startswith("[") else f"{text}\n{model}"

    assert compare(loads(model), loads(written)).nothing


# ---- the rest -------------------------------------------------------------------------------


def test_counting_memory_begins_or_ends():
    """Nothing is reserved for what runs, or all of it is, so this waits for a start."""
    groups = (GroupConfig("g", ("a",)),)
    without, counted = attrs.evolve(BASE, memory=None, groups=groups), attrs.evolve(BASE, groups=groups)

    for old, new in ((without, counted), (counted, without)):
        assert compare(old, new) == Changes(later=("memory",))
        assert effective(old, new) == old
        assert compare(effective(old, new), new) == Changes(later=("memory",))


def test_what_counts_on_memory_alone_is_kept_apart_until_it_is_counted():
    """Without it such models would be in nobody's way."""
    old = attrs.evolve(BASE, memory=None, groups=(GroupConfig("g", ("a",)),))
    counting = attrs.evolve(BASE, models={"a": MODEL, "b": attrs.evolve(MODEL, name="b")})

    [group] = effective(old, counting).groups
    assert (group.members, group.swap, effective(old, counting).memory) == (("a", "b"), True, None)


def test_another_size_of_the_same_device():
    """Nothing has to be stopped for it here."""
    old, new = (attrs.evolve(BASE, memory=MemoryConfig(devices={"ram": size})) for size in (None, 2**30))

    assert compare(old, new) == Changes(settings=("memory.devices",))


def test_another_certificate():
    """New connections get it; only whether there is TLS needs a new start."""
    old, new = (attrs.evolve(BASE, tls=TlsConfig(Path(name), Path("/k.pem"))) for name in ("/a.pem", "/b.pem"))

    assert compare(old, new) == Changes(settings=("tls",))
    assert effective(old, new) == new


def test_tables_are_told_by_entry():
    """Each that comes, goes or differs; and the table when nothing but the order differs."""
    peers = {name: PeerConfig(name, f"http://{name}", ("m",)) for name in "abc"}
    old = Config(peers=peers)

    other = {"b": peers["b"], "c": attrs.evolve(peers["c"], models=("n",)), "d": peers["a"]}
    assert compare(old, Config(peers=other)).settings == ("peers.a", "peers.c", "peers.d")
    assert compare(old, Config(peers=dict(reversed(peers.items())))).settings == ("peers",)


# ---- how it is told -------------------------------------------------------------------------


def test_one_line():
    """For the log, in the order in which it matters; long lists are cut."""
    changes = Changes(
        added=tuple(f"m{index:02}" for index in range(12)),
        removed=("r",),
        restarted={"s": ("cmd", "env")},
        updated={"u": ("ttl",)},
        settings=("cors", "keys.k"),
        later=("listen",),
    )

    assert str(changes) == (
        "added: m00, m01, m02, m03, m04, m05, m06, m07, m08, m09 and 2 more; removed: r; restarted: s (cmd, env); "
        "updated: u (ttl); settings: cors, keys.k; only when trioswap is started again: listen"
    )
    assert str(Changes()) == "nothing changed"


def test_a_document():
    """JSON with all of it."""
    changes = Changes(("a",), ("r",), {"s": ("cmd",)}, {"u": ("ttl",)}, ("cors",), ("listen",))

    assert json.loads(json.dumps(changes.document())) == {
        "added": ["a"],
        "removed": ["r"],
        "restarted": {"s": ["cmd"]},
        "updated": {"u": ["ttl"]},
        "settings": ["cors"],
        "later": ["listen"],
    }


def test_no_secret_is_told():
    """Keys are among what changes; paths and names are all that is said of them."""
    new = attrs.evolve(BASE, api_keys=("sesame",), peers={"p": PeerConfig("p", "http://p", ("m",), api_key="sesame")})
    changes = compare(BASE, new)

    assert not changes.nothing
    assert "sesame" not in f"{changes} {changes!r} {changes.document()}"
