"""Native TOML: defaults, inheritance, ports, groups, and every kind of mistake by its words."""

from __future__ import annotations

import re
import signal
import sys
import tomllib
from pathlib import Path

import pytest
import tomli_w
from config_texts import mistakes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trioswap.config import Config, GroupConfig, ModelConfig, load, loads
from trioswap.config.keys import keys_of
from trioswap.config.raw import (
    RawConfig,
    RawGroup,
    RawMatrix,
    RawMemory,
    RawPeer,
    RawProfile,
    RawSelector,
    RawUpstream,
)
from trioswap.config.raw_access import RawCors, RawKey, RawTls
from trioswap.config.raw_hooks import RawHooks, RawIdle, RawStartup
from trioswap.config.raw_model import RawCapabilities, RawFilters, RawModel, RawTimeouts
from trioswap.errors import ConfigError

CONFIGS = Path(__file__).parent.parent / "configs"


# ---- what is right ------------------------------------------------------------------------


def test_an_empty_file_is_a_daemon_without_models():
    """Everything has a default, and no models are legal."""
    assert loads("") == Config()


def test_a_model_of_one_line_has_all_defaults():
    """A command with ${PORT} is enough."""
    config = loads("[models.a]\ncmd = 'server --port ${PORT}'")

    model = ModelConfig(name="a", argv=("server", "--port", "5800"), proxy="http://127.0.0.1:5800")
    assert config == Config(models={"a": model})


def test_every_key_of_a_model_arrives():
    """Each key ends up in its field, durations in seconds."""
    config = loads("""
        [models."org/my model"]
        cmd = ["server", "--at", "${PORT}", "a b", "${MODEL_ID}"]
        cmd_stop = 'stop ${PID} ${PORT} "x y"'
        proxy = "http://Some-Host:9000/base/"
        check_endpoint = "/ready?x=1"
        port_owner = "any"
        env = { A = "${PORT}", _b1 = "" }
        aliases = ["x", "y"]
        unlisted = true
        name = "My Model"
        description = "of mine"
        ttl = "1h30m"
        health_check_timeout = 1.5
        unload_timeout = 0
        stop_signal = "SIGINT"
        backoff = "2s"
        backoff_max = "5m"
        max_wait = "500ms"
        drain_timeout = 7
        unload_drain_timeout = "2m"
    """)

    assert config.models["org/my model"] == ModelConfig(
        name="org/my model",
        argv=("server", "--at", "5800", "a b", "org/my model"),
        proxy="http://Some-Host:9000/base",
        stop_argv=("stop", "${PID}", "5800", "x y"),
        check_endpoint="/ready?x=1",
        port_owner="any",
        env={"A": "5800", "_b1": ""},
        aliases=("x", "y"),
        unlisted=True,
        display_name="My Model",
        description="of mine",
        ttl=5_400.0,
        health_check_timeout=1.5,
        unload_timeout=0.0,
        stop_signal=signal.SIGINT,
        backoff=2.0,
        backoff_max=300.0,
        max_wait=0.5,
        drain_timeout=7.0,
        unload_drain_timeout=120.0,
    )


def test_models_inherit_what_they_do_not_say():
    """The settings of the file are defaults for each model; a 0 in a model wins over them."""
    config = loads("""
        global_ttl = 60
        health_check_timeout = 1
        unload_timeout = 2
        backoff = 6
        backoff_max = 7
        max_wait = 3
        drain_timeout = 4
        unload_drain_timeout = 5
        [models.heir]
        cmd = "a ${PORT}"
        [models.own]
        cmd = "a ${PORT}"
        ttl = 0
        health_check_timeout = 10
        unload_timeout = 0
        backoff = 0
        backoff_max = 0
        max_wait = 0
        drain_timeout = 0
        unload_drain_timeout = 0
    """)

    def durations(model: ModelConfig) -> tuple[float | None, ...]:
        waits = (model.max_wait, model.drain_timeout, model.unload_drain_timeout, model.backoff, model.backoff_max)
        return (model.ttl, model.health_check_timeout, model.unload_timeout, *waits)

    assert durations(config.models["heir"]) == (60.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0)
    assert durations(config.models["own"]) == (None, 10.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


def test_settings_of_the_daemon_arrive():
    """Those that are not for models are in the Config itself."""
    config = loads('listen = "[::1]:0"\nlog_level = "debug"\nmax_request_body = "1GiB"')

    assert config == Config(listen="[::1]:0", log_level="debug", max_request_body=2**30)


def test_ports_are_given_in_the_order_of_names():
    """Only models that use ${PORT} get one; comments of a command do not count."""
    config = loads("""
        start_port = 7000
        [models.c]
        cmd = "x ${PORT}"
        [models.a]
        cmd = ["x", "--port=${PORT}"]
        [models.b]
        cmd = '''
        x
        # ${PORT}
        '''
        proxy = "http://127.0.0.1:9"
    """)

    assert {name: model.proxy for name, model in config.models.items()} == {
        "c": "http://127.0.0.1:7001",
        "a": "http://127.0.0.1:7000",
        "b": "http://127.0.0.1:9",
    }
    assert config.models["a"].argv == ("x", "--port=7000")


def test_a_gguf_model_runs_the_embedded_engine(tmp_path):
    """The path is relative to the file's directory, and the engine gets port, alias and args."""
    (tmp_path / "m").mkdir()
    gguf = tmp_path / "m" / "tiny.gguf"
    gguf.touch()
    file = tmp_path / "c.toml"
    file.write_text("[models.'a b']\ngguf = 'm/tiny.gguf'\nargs = ['--ctx-size', '64', '-x=${MODEL_ID}']")

    model = load(file).models["a b"]

    engine = (sys.executable, "-m", "trioswap.engine", "--model", str(gguf), "--port", "5800", "--alias", "a b")
    assert model.argv == (*engine, "--ctx-size", "64", "-x=a b")
    assert model.proxy == "http://127.0.0.1:5800"


def test_a_gguf_path_may_begin_with_the_home(tmp_path, monkeypatch):
    """`~` is expanded; there is no shell that would."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "tiny.gguf").touch()

    model = loads("[models.a]\ngguf = '~/tiny.gguf'").models["a"]

    assert str(tmp_path / "tiny.gguf") in model.argv


def test_a_gguf_path_of_a_text_is_relative_to_the_current_directory(tmp_path, monkeypatch):
    """The command holds the absolute path all the same."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.gguf").touch()

    model = loads("[models.a]\ngguf = 'tiny.gguf'").models["a"]

    assert str(tmp_path / "tiny.gguf") in model.argv


def test_no_check_endpoint():
    """The text "none" switches the readiness check off."""
    config = loads("[models.a]\ncmd = 'x ${PORT}'\ncheck_endpoint = 'none'")

    assert config.models["a"].check_endpoint is None


def test_models_in_no_group_form_the_default_group():
    """It comes last, its members are sorted, and it swaps and excludes."""
    config = loads("""
        models.z.cmd = "x ${PORT}"
        models.a.cmd = "x ${PORT}"
        models.m.cmd = "x ${PORT}"
        groups.g = { members = ["m"], swap = false, exclusive = false, persistent = true }
        groups.empty = {}
    """)

    assert config.groups == (
        GroupConfig(name="g", members=("m",), swap=False, exclusive=False, persistent=True),
        GroupConfig(name="empty", members=()),
        GroupConfig(name="(default)", members=("a", "z"), swap=True, exclusive=True, persistent=False),
    )


def test_there_is_no_default_group_without_members():
    """When every model is in a written group, only those are there."""
    config = loads("models.a.cmd = 'x ${PORT}'\ngroups.g.members = ['a']")

    assert [group.name for group in config.groups] == ["g"]


def test_names_and_aliases_resolve():
    """A request may name a model or an alias."""
    config = loads("models.a = { cmd = 'x ${PORT}', aliases = ['b'] }")

    assert [config.resolve(name) for name in ("a", "b", "c")] == ["a", "a", None]


# ---- one address for two models -------------------------------------------------------------

SHARED = """
models.a = { cmd = "x", proxy = "http://localhost:9000" }
models.b = { cmd = "x", proxy = "http://127.0.0.1:9000/v1" }
"""
CLASH = (
    'models.b.proxy: found "http://127.0.0.1:9000/v1", which is the address of model "a" too, '
    "allowed is that only for models of which groups never let two be resident together"
)


@pytest.mark.parametrize(
    "groups",
    [
        "groups = {}",
        "groups.g = { members = ['a', 'b'] }",
        "groups.g = { members = ['a', 'b'], exclusive = false, persistent = true }",
        "groups.g.members = ['a']\ngroups.h.members = ['b']",
    ],
)
def test_models_that_exclude_each_other_may_share_an_address(groups):
    """One port for many is legal when one at a time is resident."""
    assert set(loads(SHARED + groups).models) == {"a", "b"}


@pytest.mark.parametrize(
    "groups",
    [
        "groups.g = { members = ['a', 'b'], swap = false }",
        "groups.g = { members = ['a'], exclusive = false }",
        "groups.g = { members = ['b'], exclusive = false }",
        "groups.g = { members = ['a'], persistent = true }",
        "groups.g = { members = ['a'], persistent = true }\ngroups.h = { members = ['b'], persistent = true }",
    ],
)
def test_models_that_can_be_resident_together_must_not(groups):
    """It takes only one side that leaves the other alone."""
    assert mistakes(SHARED + groups) == [CLASH]


@pytest.mark.parametrize(
    ("listen", "proxy", "clashes"),
    [
        ("127.0.0.1:9000", "http://localhost:9000", True),
        ("0.0.0.0:9000", "http://127.0.0.1:9000", True),
        ("[::]:9000", "http://[::1]:9000", True),
        ("127.0.0.1:80", "http://127.0.0.1", True),
        ("127.0.0.1:9000", "http://0.0.0.0:9000", True),
        ("gpu:9000", "http://GPU:9000/x", True),
        ("127.0.0.1:9000", "http://127.0.0.1:9001", False),
        ("127.0.0.1:9000", "http://127.0.0.2:9000", False),
        ("0.0.0.0:9000", "http://other:9000", False),
    ],
)
def test_no_model_is_where_trioswap_listens(listen, proxy, clashes):
    """A proxy that leads back to the daemon is a mistake, however it is written."""
    text = f"listen = '{listen}'\nmodels.a = {{ cmd = 'x', proxy = '{proxy}' }}"

    if clashes:
        expected = f'models.a.proxy: found "{proxy}", which is where trioswap listens, allowed is another address'
        assert mistakes(text) == [expected]
    else:
        assert loads(text).models["a"].proxy == proxy


# ---- what is wrong ----------------------------------------------------------------------------

DURATIONS = 'allowed is a number of seconds from 0 up, or text such as "90s", "1h30m", "500ms", "2d"'
SIZES = 'allowed is a whole number of bytes from 0 up, or text such as "18GiB", "512MiB", "2GB"'
GOOD = "cmd = 'x ${PORT}'"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a = \nb = 1", "line 1, column 5: Invalid value"),
        ("b = 1\nb = 2", "line 2, column 6: Cannot overwrite a value"),
        ("b = [1,\n2", "line 2, column 2: Unclosed array"),
        (
            "a = " + "[" * 10_000,
            "line 1, column 105: found values nested more than 100 levels deep, allowed are fewer levels",
        ),
        ("a = " + "9" * 5_000, "found a number of more digits than Python reads (4300), allowed are fewer"),
        ("lisen = 1", 'lisen: unknown key, did you mean "listen"?'),
        ("[groups.g]\nzzz = 1", "groups.g.zzz: unknown key, allowed are swap, exclusive, persistent, members"),
        (
            f"[models.a]\n{GOOD}\nhealthCheckTimeout = 1",
            'models.a.healthCheckTimeout: unknown key, did you mean "health_check_timeout"?',
        ),
        ("models = 5", "models: found 5, allowed is a table"),
        ("models.a = true", "models.a: found true, allowed is a table"),
        ("groups.g = [1]", "groups.g: found an array, allowed is a table"),
        (
            f"[models.'my model']\n{GOOD}\nttl = 'soon'",
            f'models."my model".ttl: found "soon", {DURATIONS}',
        ),
        (f"[models.a]\n{GOOD}\nmax_wait = -1", f"models.a.max_wait: found -1, {DURATIONS}"),
        ("global_ttl = nan", f"global_ttl: found nan, {DURATIONS}"),
        ("unload_timeout = 2000-01-01", f"unload_timeout: found a date or time, {DURATIONS}"),
        ("health_check_timeout = 0", f"health_check_timeout: found 0, {DURATIONS}, but not 0"),
        ("max_request_body = '1XB'", f'max_request_body: found "1XB", {SIZES}'),
        ("max_request_body = 0", f"max_request_body: found 0, {SIZES}, but not 0"),
        ("log_level = 7", 'log_level: found 7, allowed is text in quotes, did you mean "7"?'),
        ("log_level = 0x" + "f" * 99, "log_level: found a huge number, allowed is text in quotes"),
        (
            "log_level = 'warn'",
            'log_level: found "warn", allowed is one of debug, info, warning, error, did you mean "warning"?',
        ),
        ("start_port = 0", "start_port: found 0, allowed is 1 to 65535"),
        ("start_port = 65536", "start_port: found 65536, allowed is 1 to 65535"),
        ("start_port = 0x" + "f" * 9_999, "start_port: found a huge number, allowed is 1 to 65535"),
        ("start_port = true", "start_port: found true, allowed is a whole number"),
        ("start_port = 1.5", "start_port: found 1.5, allowed is a whole number"),
        (
            f"start_port = 65535\n[models.a]\n{GOOD}\n[models.b]\n{GOOD}",
            "start_port: found 65535, from which 2 models need the ports up to 65536, allowed is 1 to 65535",
        ),
        (
            "listen = ':8080'",
            (
                'listen: found ":8080", allowed is HOST:PORT, such as "127.0.0.1:8080", '
                'or "0.0.0.0:8080" for every interface, or unix:/PATH'
            ),
        ),
        ("listen = 'a:70000'", 'listen: found port 70000 in "a:70000", allowed is 0 to 65535'),
        ("[models.a]", "models.a.cmd: found neither cmd nor gguf, allowed is one of them"),
        ("models.a.cmd = '# x'", "models.a.cmd: found an empty command, allowed is a program with its arguments"),
        ("models.a.cmd = []", "models.a.cmd: found an empty command, allowed is a program with its arguments"),
        ("models.a.cmd = ['', 'x']", "models.a.cmd: found an empty command, allowed is a program with its arguments"),
        ("models.a.cmd = 5", "models.a.cmd: found 5, allowed is text or an array of texts"),
        ("models.a.cmd = ['x', 5]", 'models.a.cmd[1]: found 5, allowed is text in quotes, did you mean "5"?'),
        ('models.a.cmd = "x\\u0000"', 'models.a.cmd: found "x\\u0000", allowed is text without NUL characters'),
        (
            "models.a.cmd = '''\n# it's\nx ${PORT} 'y'''",
            "models.a.cmd: found ' at line 2, column 11 of the command, allowed are quotes in pairs",
        ),
        (
            "models.a.cmd = 'x ${prot} ${foo}'",
            'models.a.cmd: found ${prot}, ${foo}, allowed is one of ${MODEL_ID}, ${PORT}, did you mean "PORT"?',
        ),
        ("models.a.cmd = 'x ${PORT} ${PID}'", "models.a.cmd: found ${PID}, allowed is one of ${MODEL_ID}, ${PORT}"),
        (
            f"[models.a]\n{GOOD}\ncmd_stop = 'stop ${{pidd}}'",
            'models.a.cmd_stop: found ${pidd}, allowed is one of ${MODEL_ID}, ${PID}, ${PORT}, did you mean "PID"?',
        ),
        (
            f"[models.a]\n{GOOD}\ncmd_stop = ''",
            "models.a.cmd_stop: found an empty command, allowed is a program with its arguments",
        ),
        (
            "models.a.cmd = 'x'",
            "models.a.proxy: found neither proxy nor ${PORT} in cmd, allowed is one of them or both",
        ),
        (
            "models.a = { cmd = 'x', proxy = 'http://h:${PORT}' }",
            "models.a.proxy: found ${PORT}, allowed is that only when cmd uses ${PORT} too",
        ),
        (
            "models.a = { cmd = 'x', proxy = 'http://h', env = { A = '${PORT}' } }",
            "models.a.env.A: found ${PORT}, allowed is that only when cmd uses ${PORT} too",
        ),
        (
            "models.a = { cmd = 'x', proxy = 'https://h' }",
            (
                'models.a.proxy: found "https://h", allowed is http://HOST[:PORT][/PATH] '
                "(not https: local servers are asked without TLS)"
            ),
        ),
        (
            "models.a = { cmd = 'x', proxy = 'http://h/?q' }",
            'models.a.proxy: found "http://h/?q", allowed is http://HOST[:PORT][/PATH]',
        ),
        (
            "models.a = { cmd = 'x', proxy = 'http://h:0' }",
            'models.a.proxy: found port 0 in "http://h:0", allowed is 1 to 65535',
        ),
        (
            f"[models.a]\n{GOOD}\nargs = ['y']",
            "models.a.args: found args without gguf, allowed is to write them into cmd",
        ),
        (
            "models.a = { cmd = 'x ${PORT}', gguf = 'm.gguf' }",
            "models.a.gguf: found gguf beside cmd, allowed is one of them",
        ),
        (
            "models.a.gguf = '/none/m.gguf'",
            'models.a.gguf: found "/none/m.gguf", allowed is the path of a GGUF file (no such file: /none/m.gguf)',
        ),
        (
            "models.a.gguf = '/'",
            'models.a.gguf: found "/", allowed is the path of a GGUF file (not a file: /)',
        ),
        (
            "models.a.gguf = '~no-such-user/m'",
            (
                'models.a.gguf: found "~no-such-user/m", allowed is the path of a GGUF file '
                "(cannot look at it: Could not determine home directory.)"
            ),
        ),
        (
            f"models.a.gguf = '{'x' * 300}'",
            (
                f'models.a.gguf: found "{"x" * 57}...", allowed is the path of a GGUF file '
                "(cannot look at it: File name too long)"
            ),
        ),
        (
            f"[models.a]\n{GOOD}\ncheck_endpoint = 'health'",
            'models.a.check_endpoint: found "health", allowed is a path such as "/health", or "none"',
        ),
        (
            f"[models.a]\n{GOOD}\nport_owner = 'chlid'",
            'models.a.port_owner: found "chlid", allowed is one of child, any, did you mean "child"?',
        ),
        (
            f"[models.a]\n{GOOD}\nstop_signal = 'sigint'",
            (
                'models.a.stop_signal: found "sigint", allowed is one of SIGTERM, SIGINT, SIGQUIT, SIGHUP, SIGUSR1, '
                'SIGUSR2, SIGKILL, did you mean "SIGINT"?'
            ),
        ),
        (
            f"[models.a]\n{GOOD}\nenv = {{ A = 5 }}",
            'models.a.env.A: found 5, allowed is text in quotes, did you mean "5"?',
        ),
        (
            f"[models.a]\n{GOOD}\nenv.'1 b' = ''",
            'models.a.env."1 b": found the name "1 b", allowed are letters, digits and _, no digit first',
        ),
        (f"[models.a]\n{GOOD}\nunlisted = 'yes'", 'models.a.unlisted: found "yes", allowed is true or false'),
        (f"[models.a]\n{GOOD}\naliases = 'b'", 'models.a.aliases: found "b", allowed is an array of texts'),
        (
            f"[models.a]\n{GOOD}\naliases = ['b', 'a']",
            'models.a.aliases[1]: found "a", which is the name of a model, allowed is a name of its own',
        ),
        (
            f"[models.a]\n{GOOD}\naliases = ['x']\n[models.b]\n{GOOD}\naliases = ['x']",
            'models.b.aliases[0]: found "x", which is an alias of "a" already, allowed is a name of its own',
        ),
        (
            f"[models.'']\n{GOOD}",
            'models."": found "", allowed is a name of printable characters without spaces around it',
        ),
        (
            f'[models."\\u0000"]\n{GOOD}',
            'models."\\u0000": found "\\u0000", allowed is a name of printable characters without spaces around it',
        ),
        (
            f"[models.' a']\n{GOOD}",
            'models." a": found " a", allowed is a name of printable characters without spaces around it',
        ),
        (
            f"[models.'a\u2028b']\n{GOOD}",
            'models."a\\u2028b": found "a\\u2028b", allowed is a name of printable characters without spaces around it',
        ),
        (
            f'[models."a\\nb"]\n{GOOD}',
            'models."a\\nb": found "a\\nb", allowed is a name of printable characters without spaces around it',
        ),
        (
            f"[models.qwen]\n{GOOD}\n[groups.g]\nmembers = ['qwen3']",
            'groups.g.members[0]: found "qwen3", allowed is the name of a model, did you mean "qwen"?',
        ),
        (
            f"[models.qwen]\n{GOOD}\naliases = ['zz']\n[groups.g]\nmembers = ['zz']",
            'groups.g.members[0]: found "zz", allowed is the name of a model, did you mean "qwen"?',
        ),
        (
            f"[models.a]\n{GOOD}\n[groups.g]\nmembers = ['a', 'a']",
            'groups.g.members[1]: found "a", which is in this group already, allowed is one group, once',
        ),
        (
            f"[models.a]\n{GOOD}\n[groups.g]\nmembers = ['a']\n[groups.h]\nmembers = ['a']",
            'groups.h.members[0]: found "a", which is in group "g" already, allowed is one group, once',
        ),
        (
            "groups.'(default)' = {}",
            (
                'groups."(default)": found the name of the group of all models that are in no other, '
                "allowed is any other name"
            ),
        ),
    ],
)
def test_a_mistake_is_told_in_one_line(text, line):
    """One mistake, one line: where, what was found, what is allowed; no other that follows from it."""
    assert mistakes(text) == [line]


def test_a_proxy_beside_gguf_uses_the_port(tmp_path, monkeypatch):
    """The engine listens on the port it is given, so a proxy elsewhere could never be ready."""
    monkeypatch.chdir(tmp_path)
    Path("m.gguf").touch()

    assert mistakes("models.a = { gguf = 'm.gguf', proxy = 'http://h:1' }") == [
        'models.a.proxy: found "http://h:1", allowed is http://127.0.0.1:${PORT} beside gguf'
    ]


def test_mistakes_of_all_kinds_are_told_together():
    """Unknown keys, types, values, commands, names and groups, in one run and in the order of the keys."""
    text = """
        log_level = "loud"
        [models.a]
        cmd = "x '"
        tll = 5
        unlisted = 1
        [models."b c"]
        cmd = "x ${PORT}"
        ttl = "1 hour"
        aliases = [7, "a"]
        [groups.g]
        members = ["a", 5, "z"]
    """

    with pytest.raises(ConfigError) as caught:
        loads(text, "my.toml")

    assert str(caught.value).splitlines() == [
        "my.toml: 9 mistakes",
        '  groups.g.members[1]: found 5, allowed is text in quotes, did you mean "5"?',
        '  groups.g.members[2]: found "z", allowed is the name of a model',
        '  log_level: found "loud", allowed is one of debug, info, warning, error',
        "  models.a.cmd: found ' at line 1, column 3 of the command, allowed are quotes in pairs",
        '  models.a.tll: unknown key, did you mean "ttl"?',
        "  models.a.unlisted: found 1, allowed is true or false",
        '  models."b c".aliases[0]: found 7, allowed is text in quotes, did you mean "7"?',
        '  models."b c".aliases[1]: found "a", which is the name of a model, allowed is a name of its own',
        f'  models."b c".ttl: found "1 hour", {DURATIONS}',
    ]


@pytest.mark.parametrize(
    "text",
    [
        "models = 5\n[groups.g]\nmembers = ['a']",
        "groups.g.members = ['a']\n[models]\na = 5",
        "models.a = { gguf = 5, cmd_stop = 'x ${PORT}' }",
        "models.a = { cmd = ['x', 5], proxy = 'http://127.0.0.1:${PORT}', env = { A = '${PORT}' } }",
        "models.a = { cmd = 'x', gguf = 'm', proxy = 'http://h' }",
        "start_port = 'x'\nmodels.a.cmd = 'x ${PORT}'",
    ],
)
def test_a_mistake_hides_what_only_follows_from_it(text):
    """What cannot be known because of one mistake is not told as another."""
    assert len(mistakes(text)) == 1


# ---- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (None, "cannot read the file: No such file or directory"),
        (b"x = 1\ny = '\xff'", "line 2: found byte 0xff, allowed is UTF-8"),
        (b"\xef\xbb\xbfx =", "line 1, column 1: Invalid statement"),
    ],
)
def test_a_file_that_is_no_toml_is_a_config_error(tmp_path, content, line):
    """The error names the file, and the line where there is one."""
    file = tmp_path / "c.toml"
    if content is not None:
        file.write_bytes(content)

    with pytest.raises(ConfigError) as caught:
        load(file)

    assert (caught.value.source, caught.value.mistakes) == (str(file), [line])


def test_a_directory_is_a_config_error(tmp_path):
    """So is whatever else the system refuses to read."""
    with pytest.raises(ConfigError) as caught:
        load(str(tmp_path))

    assert caught.value.mistakes == ["cannot read the file: Is a directory"]


def calls_to_load(models: int, proxy: str) -> int:
    """How many functions are called to load a file of so many models."""
    table = "[models.m{0}]\ncmd = 'x ${{PORT}}'\nproxy = '{1}'\naliases = ['a{0}', 'b{0}']\n"
    text = "[groups]\n" + "".join(table.format(index, proxy) for index in range(models))
    calls = 0

    def count(_frame: object, event: str, _arg: object) -> None:
        nonlocal calls
        calls += event.endswith("call")

    sys.setprofile(count)
    try:
        loads(text)
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize("proxy", ["http://127.0.0.1:9000", "http://127.0.0.1:${PORT}"], ids=["one port", "own ports"])
def test_work_grows_with_the_file_and_not_faster(proxy):
    """Twice the models are twice the work, so that thousands load at once (calls are counted, not time)."""
    assert calls_to_load(400, proxy) < 2.1 * calls_to_load(200, proxy)


# ---- the examples -------------------------------------------------------------------------------

SWITCHED_OFF = re.compile(r"^#(?=[a-z\[])", re.MULTILINE)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.name)
def test_the_examples_load(path):
    """Each file under configs/ is right and has a model."""
    assert load(path).models


def test_the_full_example_has_the_true_defaults():
    """What it says of the daemon, and of the models that say nothing themselves, is what an empty file means."""
    settings_only = (CONFIGS / "full.toml").read_text().partition("[models.qwen]")[0]
    model = "\n[models.a]\ncmd = 'x ${PORT}'"

    assert loads(settings_only + model) == loads(model)


def switched_on(left_out: str) -> str:
    """The full example with everything that is commented out, but one of groups and matrix."""
    text = SWITCHED_OFF.sub("", (CONFIGS / "full.toml").read_text())
    return re.sub(rf"^\[{left_out}.*?(?=^# ----|\Z)", "", text, flags=re.MULTILINE | re.DOTALL)


def keys_shown(table: dict[str, object], raw: type) -> set[tuple[type, str]]:
    """The keys of *table* and of the tables in it, each with the raw class that has it."""
    found = set()
    for name, value in table.items():
        key = keys_of(raw)[name]
        found.add((raw, name))
        if key.table is not None:
            for inner in value.values() if key.is_by_name else [value]:
                found |= keys_shown(inner, key.table)
    return found


def test_the_full_example_shows_every_key():
    """Each key of each table is there, switched on or off."""
    shown = set()
    for left_out in ("groups", "matrix"):
        shown |= keys_shown(tomllib.loads(switched_on(left_out)), RawConfig)
    raws = {raw for raw, _ in shown}

    assert shown == {(raw, name) for raw in raws for name in keys_of(raw)}


def test_the_full_example_tells_every_default():
    """Above each key stands a comment with its default, or that there is none."""
    text = (CONFIGS / "full.toml").read_text()
    above = re.findall(r"((?:^#(?: .*)?\n)*)^#?([a-z_]+) = ", text, flags=re.MULTILINE)

    assert len(above) > 90
    assert [key for comment, key in above if "efault" not in comment] == []


@pytest.mark.parametrize("left_out", ["groups", "matrix"])
def test_the_full_example_loads_with_everything_switched_on(tmp_path, left_out):
    """What is commented out is right too; groups and a matrix exclude each other."""
    file = tmp_path / "full.toml"
    file.write_text(switched_on(left_out))
    (tmp_path / "tiny.gguf").touch()

    config = load(file)

    assert bool(config.groups) == (left_out != "groups")
    assert (config.matrix is not None) == (left_out != "matrix")

    assert config.models["embedded"].argv[-2:] == ("--ctx-size", "8192")
    assert config.models["embedded"].drain_timeout == 300.0


# ---- anything at all ----------------------------------------------------------------------------


def judged(text: str) -> Config | ConfigError:
    """What *text* comes to; every other exception is a failure."""
    try:
        return loads(text)
    except ConfigError as exc:
        return exc


def check_lines(result: Config | ConfigError) -> None:
    """A Config is whole; mistakes are one printable line each."""
    if isinstance(result, Config):
        assert all(model.argv and model.argv[0] and model.proxy for model in result.models.values())
        assert result.groups or result.matrix or result.memory or not result.models
        grouped = sorted(member for group in result.groups for member in group.members)
        assert grouped == sorted(result.models) or result.memory or result.matrix
    else:
        assert result.mistakes
        assert all(line and len(line.splitlines()) == 1 for line in result.mistakes)


FULL = (CONFIGS / "full.toml").read_text()


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(0, len(FULL)), st.integers(0, 40), st.text(max_size=8)), max_size=6))
def test_a_mangled_file_is_a_config_or_a_config_error(edits):
    """Cut and stuffed anywhere, the full example gives nothing else."""
    text = FULL
    for start, length, stuffing in edits:
        text = text[:start] + stuffing + text[start + length :]

    check_lines(judged(text))


SCALARS = st.one_of(
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.dates(),
    st.text(max_size=6),
    st.sampled_from(
        ["x ${PORT}", "${PID}", "http://h:80", "http://127.0.0.1:${PORT}", "/", "none", "5s", "1KB", "a", "b"]
    ),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)
NAMES = st.sampled_from(["a", "b", "c d", "(default)", "", "\0"])


def tables(raw: type, **fixed: st.SearchStrategy[object]) -> st.SearchStrategy[dict[str, object]]:
    """Tables with real keys of *raw*, mostly with wrong values."""
    keys = {name: fixed.get(name, VALUES) for name in keys_of(raw)}
    return st.fixed_dictionaries({}, optional=keys)


SIZES_OF = st.dictionaries(st.sampled_from(["ram", "gpu0", "auto", ""]), st.just("2GiB") | VALUES, max_size=2)
FILTERS = tables(
    RawFilters, set_params_by_id=st.dictionaries(st.text(max_size=2), st.dictionaries(st.text(max_size=2), VALUES))
)
MODELS = tables(
    RawModel,
    cmd=st.just("x ${PORT}") | VALUES,
    memory=SIZES_OF | VALUES,
    filters=FILTERS | VALUES,
    timeouts=tables(RawTimeouts) | VALUES,
    capabilities=tables(RawCapabilities) | VALUES,
)
GROUPS = tables(RawGroup, members=st.lists(NAMES, max_size=3) | VALUES)
DEVICES = st.dictionaries(st.sampled_from(["ram", "gpu0", "auto", ""]), st.sampled_from(["auto", "1GiB"]) | VALUES)
EXPRESSIONS = st.sampled_from(["a & b", "a | +a", "+b", "(x"])
TARGETS = st.lists(st.sampled_from(["a", "b", "c d", "a/b", "b/x", "x"]), max_size=3)
PROFILES = tables(RawProfile, pins=st.dictionaries(NAMES, st.sampled_from(["a", "b", "a/b", ""]) | VALUES, max_size=2))
STRATEGIES = st.sampled_from(["pin", "warm", "spillover"])
SELECTORS = tables(RawSelector, strategy=STRATEGIES | VALUES, targets=TARGETS | VALUES)
PEERS = tables(RawPeer, proxy=st.just("https://h/x") | VALUES, models=TARGETS | VALUES, filters=FILTERS | VALUES)
KEYS = tables(
    RawKey,
    key=st.sampled_from(["k", "l", ""]) | VALUES,
    hash=st.just("sha256:" + "0" * 64) | VALUES,
    models=TARGETS | VALUES,
    endpoints=st.lists(st.sampled_from(["/v1/*", "x"]), max_size=2) | VALUES,
)
ORIGINS = st.lists(st.sampled_from(["*", "null", "http://a", "http://a/x", "http://a:0", "app://b"]), max_size=3)
PROXIES = st.lists(st.sampled_from(["::1", "10.0.0.0/8", "10.0.0.1/8", "10", "::1%a", ""]), max_size=3)
LISTEN = st.sampled_from(["unix:/x", "unix:x", "h:1"])
DOCUMENTS = tables(
    RawConfig,
    listen=LISTEN | VALUES,
    api_keys=st.lists(st.sampled_from(["k", ""]), max_size=2) | VALUES,
    keys=st.dictionaries(NAMES, KEYS | VALUES, max_size=3) | VALUES,
    tls=tables(RawTls) | VALUES,
    cors=tables(RawCors, origins=ORIGINS | VALUES) | VALUES,
    trusted_proxies=PROXIES | VALUES,
    memory=tables(RawMemory, devices=DEVICES | VALUES) | VALUES,
    matrix=tables(RawMatrix, sets=st.dictionaries(NAMES, EXPRESSIONS | VALUES, max_size=3) | VALUES) | VALUES,
    models=st.dictionaries(NAMES, MODELS | VALUES, max_size=3) | VALUES,
    groups=st.dictionaries(NAMES, GROUPS | VALUES, max_size=3) | VALUES,
    profiles=st.dictionaries(NAMES, PROFILES | VALUES, max_size=2) | VALUES,
    selectors=st.dictionaries(NAMES, SELECTORS | VALUES, max_size=2) | VALUES,
    peers=st.dictionaries(NAMES, PEERS | VALUES, max_size=2) | VALUES,
    hooks=tables(
        RawHooks,
        on_startup=tables(RawStartup, preload=TARGETS | VALUES) | VALUES,
        on_idle=tables(RawIdle, preload=TARGETS | VALUES) | VALUES,
    )
    | VALUES,
    upstream=tables(RawUpstream, ignore_paths=st.lists(st.text(max_size=9), max_size=3) | VALUES) | VALUES,
)


@settings(derandomize=True, deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(DOCUMENTS)
def test_wrong_values_anywhere_are_mistakes(document):
    """Real keys with arbitrary values give a whole Config or lines of mistakes, and change no other outcome."""
    check_lines(judged(tomli_w.dumps(document)))
