"""Keys around models and the daemon's own: what they come to, and every mistake by its words."""

from __future__ import annotations

import attrs
import pytest
from config_texts import mistakes, model

from trioswap.config import Config, load, loads
from trioswap.config.parts import (
    CapabilityConfig,
    FilterConfig,
    HooksConfig,
    PerformanceConfig,
    TimeoutConfig,
    UiConfig,
)

COUNTS = "allowed is a whole number from 1 up"
DURATIONS = 'allowed is a number of seconds from 0 up, or text such as "90s", "1h30m", "500ms", "2d"'
JSON = "allowed is what JSON can say: text, a finite number, true or false, an array or a table"
PATTERN = "allowed is a regular expression of Python's re of at most 500 characters"


# ---- models -----------------------------------------------------------------------------------


def test_every_further_key_of_a_model_arrives():
    """Each in its field; what is a table in the file is a class."""
    config = loads(
        model("""
        use_model_name = "org/real"
        concurrency_limit = 7
        send_loading_state = true
        metadata = { a = [1, { b = 0.5 }], c = "x" }
        filters.strip_params = ["top_k"]
        filters.set_params = { seed = 1, "options.mirostat" = [true] }
        timeouts.connect = "2s"
        capabilities = { in = ["text", "image"], out = ["text"], tools = true, reranker = true, context = 4096 }
        compat.ignore_websockets = true
    """)
    ).models["a"]

    assert config.use_model_name == "org/real"
    assert config.concurrency_limit == 7
    assert config.send_loading_state
    assert config.metadata == {"a": [1, {"b": 0.5}], "c": "x"}
    assert config.filters == FilterConfig(("top_k",), {"options.mirostat": [True], "seed": 1})
    assert config.timeouts == TimeoutConfig(connect=2.0)
    assert config.capabilities == CapabilityConfig(("text", "image"), ("text",), True, True, 4096)
    assert config.ignore_websockets


@pytest.mark.parametrize(
    ("written", "parallel", "limit"),
    [
        ("", 10, None),
        ("parallel = 3", 3, None),
        ("concurrency_limit = 4", 4, 4),
        ("concurrency_limit = 40", 40, 40),
        ("parallel = 3\nconcurrency_limit = 40", 3, 40),
    ],
)
def test_a_limit_of_requests_limits_those_at_the_server(written, parallel, limit):
    """Where fewer are let in than the server would get, it is the number of both."""
    config = loads(model(written)).models["a"]

    assert (config.parallel, config.concurrency_limit) == (parallel, limit)


def test_a_limit_of_a_model_wins_over_parallel_of_the_file():
    """It says something about this very model."""
    config = loads("parallel = 2" + model("concurrency_limit = 4") + model(name="b"))

    assert (config.models["a"].parallel, config.models["b"].parallel) == (4, 2)


@pytest.mark.parametrize(
    ("written", "parallel", "limit"),
    [("", 50, None), ("concurrency_limit = 5", 50, 50), ("concurrency_limit = 60", 60, 60), ("parallel = 3", 3, None)],
)
def test_comfyui_is_special(written, parallel, limit):
    """Its websockets never load it, and it gets 50 requests at once at least, unless `parallel` says otherwise."""
    config = loads(model(written, name="comfyui_auto")).models["comfyui_auto"]

    assert config.ignore_websockets
    assert (config.parallel, config.concurrency_limit) == (parallel, limit)


def test_the_loading_state_is_inherited():
    """What a model says wins."""
    config = loads("send_loading_state = true" + model() + model("send_loading_state = false", name="b"))

    assert [config.models[name].send_loading_state for name in "ab"] == [True, False]


def test_a_timeout_of_0_is_none():
    """Not written is the default, 0 is off."""
    zeros = "\n".join(f"timeouts.{field.name} = 0" for field in attrs.fields(TimeoutConfig))

    assert loads(model(zeros)).models["a"].timeouts == TimeoutConfig(None, None, None, None, None, None)
    assert loads(model()).models["a"].timeouts == TimeoutConfig(30.0, 30.0, None, 10.0, 1.0, 90.0)


@pytest.mark.parametrize("written", ["", "capabilities = {}", "capabilities = { in = [], tools = false, context = 0 }"])
def test_capabilities_that_say_nothing_are_none(written):
    """No and 0 are what nothing means."""
    assert loads(model(written)).models["a"].capabilities is None


def test_filters_are_tidied_up():
    """Blanks, repetitions and the protected field `model` are dropped; the rest is sorted."""
    filters = (
        loads(
            model("""
        [models.a.filters]
        strip_params = [" top_k ", "model", "", "seed", "top_k"]
        set_params = { z = 1, model = "other", a = 2 }
        set_params_by_id = { "a:x" = { z = 1, model = "other", a = 2 }, a = {} }
    """)
        )
        .models["a"]
        .filters
    )

    assert filters.strip_params == ("seed", "top_k")
    assert list(filters.set_params.items()) == [("a", 2), ("z", 1)]
    assert filters.set_params_by_id == {"a:x": {"a": 2, "z": 1}, "a": {}}


def test_names_in_filters_are_aliases():
    """But the model's own name and aliases that it has already."""
    config = loads(model("aliases = ['b', 'c']\nfilters.set_params_by_id = { a = {}, c = {}, 'a:x' = {} }"))

    assert config.models["a"].aliases == ("b", "c", "a:x")
    assert config.resolve("a:x") == "a"


def test_the_port_is_filled_in_everywhere():
    """In texts as text; where any value may stand, a text that is nothing but the port is a number."""
    config = loads(
        model("""
        name = "on ${PORT}"
        description = "${MODEL_ID}"
        use_model_name = "${PORT}"
        aliases = ["a-${PORT}"]
        metadata = { port = "${PORT}", all = ["${PORT}", "${PORT}/x"], "${PORT}" = 1 }
        filters.strip_params = ["${PORT}"]
        filters.set_params = { port = "${PORT}" }
        filters.set_params_by_id = { "a:${PORT}" = { port = "p${PORT}" } }
    """)
    ).models["a"]

    assert (config.display_name, config.description, config.use_model_name) == ("on 5800", "a", "5800")
    assert config.aliases == ("a-5800", "a:5800")
    assert config.metadata == {"port": 5800, "all": [5800, "5800/x"], "${PORT}": 1}
    assert config.filters == FilterConfig(("5800",), {"port": 5800}, {"a:5800": {"port": "p5800"}})


# ---- the daemon ---------------------------------------------------------------------------------


def test_every_key_of_the_daemon_arrives(tmp_path):
    """Each in its field; files are relative to the directory of the configuration."""
    file = tmp_path / "c.toml"
    file.write_text("""
        api_keys = ["one", "two", "one"]
        log_time_format = "rfc3339"
        log_to_stdout = "both"
        log_requests = true
        include_aliases_in_list = true
        metrics_max_in_memory = 5
        capture_buffer = "1MiB"
        store.path = "activity.db"
        performance.every = "1m"
        ui.activity.session_id = ["X-One", " x-one", "", "Two"]
        upstream.ignore_paths = ['^/static/']
        macros = { a = 5 }
    """)
    config = load(file)

    assert config.api_keys == ("one", "two")
    assert (config.log_time_format, config.log_to_stdout) == ("rfc3339", "both")
    assert config.include_aliases_in_list
    assert (config.metrics_max_in_memory, config.capture_buffer) == (5, 2**20)
    assert config.store is not None
    assert config.store.path == tmp_path / "activity.db"
    assert config.performance == PerformanceConfig(60.0)
    assert config.ui == UiConfig(("X-One", "Two"))
    assert [pattern.pattern for pattern in config.ignore_paths] == ["^/static/"]


def test_what_can_be_switched_off_is():
    """0, an empty array, or a key of its own."""
    config = loads("""
        capture_buffer = 0
        performance.disabled = true
        ui.activity.session_id = []
        upstream.ignore_paths = []
    """)

    assert (config.capture_buffer, config.performance, config.store) == (None, None, None)
    assert config.ui.session_headers == ()
    assert config.ignore_paths == ()


@pytest.mark.parametrize(
    ("path", "ignored"),
    [("/index.js", True), ("/a/b.jpeg", True), ("/b.jpg", True), ("/b.js/", False), ("/v1/chat", False)],
)
def test_the_paths_that_load_nothing(path, ignored):
    """What pages are made of."""
    assert any(pattern.search(path) for pattern in Config().ignore_paths) == ignored


def test_preload_takes_names_and_aliases():
    """They are replaced by the names of the models; blanks and repetitions are dropped."""
    text = model("aliases = ['x']") + model(name="b") + "\n[hooks.on_startup]\npreload = [' b ', '', 'x', 'a']"

    assert loads(text).hooks == HooksConfig(("b", "a"))


def test_models_that_come_back_are_named_in_the_same_manner():
    """And nobody comes back unless the file says it; after five minutes, unless it says something else."""
    text = model("aliases = ['x']") + model(name="b") + "\n[hooks.on_idle]\npreload = [' b ', '', 'x', 'a']\n"

    assert loads(text).hooks == HooksConfig(idle_preload=("b", "a"), idle_after=300.0)
    assert loads(text + "after = '1h30m'").hooks == HooksConfig(idle_preload=("b", "a"), idle_after=5400.0)
    assert loads("").hooks == HooksConfig()


def test_a_model_that_nobody_asks_for_stays():
    """Until its place is needed: no time to live is the default, and 0 says the same."""
    config = loads(model() + model("ttl = 0", name="b") + model("ttl = 5", name="c"))

    assert [config.models[name].ttl for name in "abc"] == [None, None, 5.0]
    assert loads("global_ttl = 0" + model()).models["a"].ttl is None


def test_secrets_are_not_shown():
    """Neither by a config that is printed, nor by a mistake."""
    config = loads(
        "api_keys = ['top-secret']\npeers.p = { proxy = 'http://h', models = ['m'], api_key = 'deep-secret' }"
    )

    assert "secret" not in repr(config)
    wrong = """
        api_keys = ["top secret", 123456, "", "secret\\u0007"]
        peers.p = { proxy = 'http://h', models = ['m'], api_key = "deep secret" }
        peers.q = { proxy = 'http://h', models = ['m'], api_key = 123456 }
    """
    hidden = "found something else (not shown, it may be a secret), allowed is text in quotes"
    assert mistakes(wrong) == [
        "api_keys[0]: found a key with spaces or control characters, allowed are keys without",
        f"api_keys[1]: {hidden}",
        "api_keys[2]: found an empty key, allowed are keys of at least one character",
        "api_keys[3]: found a key with spaces or control characters, allowed are keys without",
        "peers.p.api_key: found a key with spaces or control characters, allowed is one without",
        f"peers.q.api_key: {hidden}",
    ]


# ---- what is not acted on yet -------------------------------------------------------------------


def test_what_is_not_acted_on_yet_is_told():
    """Key paths, each once, however many models have it; only of what the file asks for."""
    config = loads(
        "api_keys = ['k']\nmetrics_max_in_memory = 5\ncapture_buffer = 0\nlog_requests = true\n"
        "send_loading_state = false\n"
        + model("filters.strip_params = ['x']\nmetadata = {}\nttl = 5")
        + model("filters.set_params = { x = 1 }\ncompat.ignore_websockets = false", name="b")
        + "\n[ui.activity]\nsession_id = ['x']\n[hooks.on_startup]\npreload = ['a']"
    )

    assert config.not_acted_on() == ("metrics_max_in_memory", "ui")


@pytest.mark.parametrize("text", ["", "listen = '127.0.0.1:1'\npolicy = 'fifo'" + model("memory = 5\nweight = 2")])
def test_what_is_acted_on_is_not_told(text):
    """A file of such keys only hears nothing."""
    assert loads(text).not_acted_on() == ()


# ---- what is wrong --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (model("concurrency_limit = 0"), f"models.a.concurrency_limit: found 0, {COUNTS}"),
        (model("metadata = { a = { b = [2000-01-01] } }"), f"models.a.metadata.a.b[0]: found a date or time, {JSON}"),
        (model("metadata = { a = inf }"), f"models.a.metadata.a: found inf, {JSON}"),
        (model("metadata = 5"), "models.a.metadata: found 5, allowed is a table"),
        (model("filters.set_params = { a = nan }"), f"models.a.filters.set_params.a: found nan, {JSON}"),
        (
            model("filters.set_params = { 'a.*' = 1 }"),
            (
                'models.a.filters.set_params."a.*": found "a.*", allowed is the name of a field, such as "seed" or '
                '"options.seed", without * ? # |'
            ),
        ),
        (
            model("filters.strip_params = ['x', 'a#']"),
            (
                'models.a.filters.strip_params[1]: found "a#", allowed is the name of a field, such as "seed" or '
                '"options.seed", without * ? # |'
            ),
        ),
        (
            model("filters.set_params_by_id.x = { '' = 1 }"),
            (
                'models.a.filters.set_params_by_id.x."": found "", allowed is the name of a field, such as "seed" or '
                '"options.seed", without * ? # |'
            ),
        ),
        (
            "models.a = { cmd = 'x', proxy = 'http://h:1', metadata = { a = ['${PORT}'] } }",
            "models.a.metadata.a[0]: found ${PORT}, allowed is that only when cmd uses ${PORT} too",
        ),
        (
            model("filters.set_params_by_id = { 'x5800' = {}, 'x${PORT}' = {} }"),
            (
                'models.a.filters.set_params_by_id."x${PORT}": found "x5800" again once it is filled in, '
                "allowed is each name once"
            ),
        ),
        (model("filters.set_params_by_id.x = 5"), "models.a.filters.set_params_by_id.x: found 5, allowed is a table"),
        (model("filters.stripParams = 'x'"), 'models.a.filters.stripParams: unknown key, did you mean "strip_params"?'),
        (
            model("filters.set_params_by_id.b = {}") + model(name="b"),
            (
                'models.a.filters.set_params_by_id.b: found "b", which is the name of a model, '
                "allowed is a name of its own"
            ),
        ),
        (
            model("filters.set_params_by_id.x = {}", name="b") + model("aliases = ['x']"),
            'models.a.aliases[0]: found "x", which is an alias of "b" already, allowed is a name of its own',
        ),
        (
            model("filters.set_params_by_id.' x' = {}"),
            (
                'models.a.filters.set_params_by_id." x": found " x", allowed is a name of printable characters '
                "without spaces around it"
            ),
        ),
        (
            model("timeouts.connect = -1"),
            (
                "models.a.timeouts.connect: found -1, allowed is a number of seconds from 0 up, or text such as "
                '"90s", "1h30m", "500ms", "2d"'
            ),
        ),
        (
            model("timeouts.responseHeader = 1"),
            'models.a.timeouts.responseHeader: unknown key, did you mean "response_header"?',
        ),
        (
            model("capabilities.in = ['text', 'smell']"),
            'models.a.capabilities.in[1]: found "smell", allowed is one of text, audio, image',
        ),
        (
            model("capabilities.out = ['txt']"),
            'models.a.capabilities.out[0]: found "txt", allowed is one of text, audio, image, did you mean "text"?',
        ),
        (model("capabilities.in = 'text'"), 'models.a.capabilities.in: found "text", allowed is an array of texts'),
        (
            model("capabilities.context = -1"),
            "models.a.capabilities.context: found -1, allowed is a whole number from 0 up",
        ),
        (
            model("capabilities.inn = []"),
            'models.a.capabilities.inn: unknown key, did you mean "in"?',
        ),
        (model("compat.ignore_websockets = 1"), "models.a.compat.ignore_websockets: found 1, allowed is true or false"),
        ("metrics_max_in_memory = 0", f"metrics_max_in_memory: found 0, {COUNTS}"),
        (
            "capture_buffer = -1",
            (
                "capture_buffer: found -1, allowed is a whole number of bytes from 0 up, or text such as "
                '"18GiB", "512MiB", "2GB"'
            ),
        ),
        (
            "log_to_stdout = 'proxi'",
            'log_to_stdout: found "proxi", allowed is one of proxy, upstream, both, none, did you mean "proxy"?',
        ),
        ("performance.every = '4s'", "performance.every: found 4.0, allowed is 5 seconds or more"),
        ("performance.enable = true", "performance.enable: unknown key, allowed are disabled, every"),
        ("store = {}", 'store.path: found "", allowed is the path of a file'),
        ("store.path = '/'", 'store.path: found "/", allowed is the path of a file (it is a directory)'),
        (
            f"store.path = '{'x' * 300}'",
            (
                f'store.path: found "{"x" * 57}...", allowed is the path of a file '
                "(cannot look at it: File name too long)"
            ),
        ),
        (
            "ui.activity.session_id = ['X-One', 'a b']",
            'ui.activity.session_id[1]: found "a b", allowed is the name of a header of HTTP',
        ),
        (
            "upstream.ignore_paths = ['ok', '(']",
            (f'upstream.ignore_paths[1]: found "(", {PATTERN} (missing ), unterminated subpattern at position 0)'),
        ),
        (
            "upstream.ignore_paths = ['[[:alpha:]]']",
            f'upstream.ignore_paths[0]: found "[[:alpha:]]", {PATTERN} (Possible nested set at position 1)',
        ),
        (
            f"upstream.ignore_paths = ['{'x' * 501}']",
            f"upstream.ignore_paths[0]: found one of 501 characters, {PATTERN}",
        ),
        (
            "upstream.ignore_paths = ['a{99999999999}']",
            f'upstream.ignore_paths[0]: found "a{{99999999999}}", {PATTERN} (the repetition number is too large)',
        ),
        (
            f"upstream.ignore_paths = {['x'] * 65}",
            "upstream.ignore_paths: found 65 regular expressions, allowed are at most 64",
        ),
        (
            model(name="qwen") + "\n[hooks.on_startup]\npreload = ['qwen', 'qwne']",
            (
                'hooks.on_startup.preload[1]: found "qwne", allowed is the name of a model or an alias, '
                'did you mean "qwen"?'
            ),
        ),
        (
            model() + model(name="b") + "\n[hooks.on_startup]\npreload = ['a', 'b']\n[groups]",
            (
                'hooks.on_startup.preload: found models of which groups never let "a" and "b" be resident together, '
                "allowed are models that can be"
            ),
        ),
        (
            model() + model(name="b") + "\n[hooks.on_startup]\npreload = ['a', 'b']\n[matrix]\nsets.s = 'a | b'",
            (
                'hooks.on_startup.preload: found models that no set of the matrix has together ("a", "b"), '
                "allowed are models that can be"
            ),
        ),
        (
            model(name="qwen") + "\n[hooks.on_idle]\npreload = ['qwne']",
            'hooks.on_idle.preload[0]: found "qwne", allowed is the name of a model or an alias, did you mean "qwen"?',
        ),
        (
            model() + model(name="b") + "\n[hooks.on_idle]\npreload = ['a', 'b']\n[groups]",
            (
                'hooks.on_idle.preload: found models of which groups never let "a" and "b" be resident together, '
                "allowed are models that can be"
            ),
        ),
        ("hooks.on_idle.after = 0", f"hooks.on_idle.after: found 0, {DURATIONS}, but not 0"),
        (
            "hooks.on_idle.preloads = []",
            ('hooks.on_idle.preloads: unknown key, did you mean "preload"?'),
        ),
    ],
)
def test_a_mistake_is_told_in_one_line(text, line):
    """One mistake, one line: where, what was found, what is allowed; no other that follows from it."""
    assert mistakes(text) == [line]


def test_an_unknown_format_of_the_time():
    """All that are known are named, and the closest is offered."""
    [line] = mistakes("log_time_format = 'rfc3338'")

    assert line.startswith('log_time_format: found "rfc3338", allowed is one of ansic, unixdate, ')
    assert line.endswith('stampnano, did you mean "rfc3339"?')


@pytest.mark.parametrize(
    "text",
    [
        "models = 5\nhooks.on_startup.preload = ['a']\nhooks.on_idle.preload = ['a']",
        model() + model(name="b") + "\n[hooks.on_startup]\npreload = ['a', 'b']\n[groups]\ng.members = ['a', 'c']",
        model() + model(name="b") + "\n[hooks.on_startup]\npreload = ['a', 'b']\n[matrix]\nsets.s = 'a & c'",
        "api_keys = 5",
    ],
)
def test_a_mistake_hides_what_only_follows_from_it(text):
    """What cannot be known because of one mistake is not told as another."""
    assert len(mistakes(text)) == 1
