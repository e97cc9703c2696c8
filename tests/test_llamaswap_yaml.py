"""llama-swap's YAML files: what they mean in our terms, and what is said of those that are wrong."""

from __future__ import annotations

from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trioswap.config.document import Document
from trioswap.config.keys import keys_of
from trioswap.config.llamaswap import translate
from trioswap.config.loading import load_sources
from trioswap.config.mistakes import Mistakes
from trioswap.config.raw import RawConfig, RawGroup, RawPeer, RawSelector
from trioswap.config.raw_model import RawFilters, RawModel, RawTimeouts
from trioswap.config.schema import Config, GroupConfig, MemoryConfig
from trioswap.config.yaml_source import parse_yaml
from trioswap.errors import ConfigError

A = "models: {a: {cmd: x ${PORT}}}\n"
AB = "models: {a: {cmd: x ${PORT}}, b: {cmd: x ${PORT}}}\n"


@pytest.fixture
def load(tmp_path):
    """Reads a text as the file `c.yaml`, and further texts as files beside it."""

    def load(text: str, more: str = "", *, environ: dict[str, str] | None = None, unknown: Mistakes | None = None):
        files = [tmp_path / "c.yaml", tmp_path / "d.yaml"]
        for file, content in zip(files, (text, more), strict=True):
            file.write_text(content)
        return load_sources(files, None, environ or {}, partial(translate, unknown=unknown))

    return load


@pytest.fixture
def mistakes(load, tmp_path):
    """What is wrong with a text, with places as LINE."""

    def mistakes(text: str, more: str = "") -> list[str]:
        with pytest.raises(ConfigError) as caught:
            load(text, more)
        return [line.removeprefix(f"{tmp_path}/c.yaml:") for line in caught.value.mistakes]

    return mistakes


def native(text: str) -> Document:
    """The native document of *text*, in which nothing is wrong."""
    mistakes = Mistakes()
    document = translate(parse_yaml(text, "c.yaml", mistakes), mistakes)
    assert mistakes.lines() == []
    return document


# ---- whole files --------------------------------------------------------------------------------

TYPICAL = r"""
healthCheckTimeout: 300
logLevel: info
metricsMaxInMemory: 500
startPort: 10001
sendLoadingState: true

macros:
  latest: >
    /path/to/llama-server
    --port ${PORT}
  ctx: 4096
  temp: 0.7

apiKeys: ["${env.KEY}", 0123]

models:
  "qwen":
    name: Qwen
    cmd: |
      # the large one
      ${latest}
      -m /m/qwen.gguf \
      --ctx-size ${ctx}
    env: ["CUDA_VISIBLE_DEVICES=0,1", HOME=/x]
    checkEndpoint: /ready
    ttl: 60
    aliases:
      - gpt-4o
      - 0123
      - yes
    useModelName: org/qwen
    concurrencyLimit: 4
    unlisted: no
    filters:
      stripParams: "top_p, temperature,"
      setParams: {stop: [a, 1, null], on: on}
      setParamsByID:
        "${MODEL_ID}:think": {chat_template_kwargs: {enable_thinking: true}}
    metadata: {ctx: "${ctx}", temp: "${temp}", note: "at ${temp}"}
    capabilities: {in: [text, image], out: [text], tools: true, context: 8192}
    timeouts: {responseHeader: 600, idleConn: 0}
    compat: {ignoreWebsockets: true}
    sendLoadingState: off
  docker:
    macros: {name: d}
    proxy: http://127.0.0.1:9000
    cmd: docker run --name ${name} -p 9000:8080 img
    cmdStop: docker stop ${name}
    unloadTimeout: 3

hooks: {on_startup: {preload: [gpt-4o]}}
profiles: {quiet: {description: q, pins: {gpt-5: qwen, old: }}}
selectors: {best: {strategy: warm, targets: [qwen, docker], unlisted: true}}
peers:
  far: {proxy: "https://example.com/api", apiKey: s, models: [m], filters: {stripParams: a}, timeouts: {connect: 5}}
upstream: {ignorePaths: ['\.js$']}
performance: {every: 10s}
ui: {activity: {session_id: [X-Id]}}
"""


def test_a_typical_file(load):
    """Each thing that such files say comes to what it means there."""
    config = load(TYPICAL, environ={"KEY": "k"})
    qwen, docker = config.models["qwen"], config.models["docker"]

    assert (config.log_level, config.metrics_max_in_memory, config.api_keys) == ("info", 500, ("k", "0123"))
    assert qwen.argv == ("/path/to/llama-server", "--port", "10001", "-m", "/m/qwen.gguf", "--ctx-size", "4096")
    assert (qwen.health_check_timeout, qwen.ttl, qwen.check_endpoint) == (300.0, 60.0, "/ready")
    assert qwen.env == {"CUDA_VISIBLE_DEVICES": "0,1", "HOME": "/x"}
    assert qwen.aliases == ("gpt-4o", "0123", "yes", "qwen:think")
    assert (qwen.use_model_name, qwen.concurrency_limit, qwen.unlisted) == ("org/qwen", 4, False)
    assert qwen.filters.strip_params == ("temperature", "top_p")
    assert qwen.filters.set_params == {"on": "on", "stop": ["a", 1, None]}
    assert qwen.filters.set_params_by_id == {"qwen:think": {"chat_template_kwargs": {"enable_thinking": True}}}
    assert qwen.metadata == {"ctx": 4096, "temp": 0.7, "note": "at 0.7"}
    assert qwen.capabilities.takes == ("text", "image")
    assert (qwen.timeouts.response_header, qwen.timeouts.idle_conn, qwen.ignore_websockets) == (600.0, None, True)
    assert (qwen.send_loading_state, docker.send_loading_state) == (False, True)
    assert (docker.stop_argv, docker.unload_timeout, docker.ttl) == (("docker", "stop", "d"), 3.0, None)
    assert config.hooks.preload == ("qwen",)
    assert config.profiles["quiet"].pins == {"gpt-5": "qwen", "old": None}
    assert config.selectors["best"].targets == ("qwen", "docker")
    assert (config.peers["far"].api_key, config.peers["far"].timeouts.connect) == ("s", 5.0)
    assert [pattern.pattern for pattern in config.ignore_paths] == [r"\.js$"]
    assert (config.performance.every, config.ui.session_headers) == (10.0, ("X-Id",))
    assert config.groups == (GroupConfig("(default)", ("docker", "qwen")),)


def test_nothing_written(load):
    """An empty file is one; so are files in which each key is empty."""
    empty = load("")
    nulls = "".join(f"{key.yaml}:\n" for key in keys_of(RawConfig).values())

    assert load(nulls) == empty
    assert empty.models == {}


def test_names_of_keys_are_those_of_llama_swap():
    """The spellings that files out there have (core reference 1.7 to 1.16)."""
    assert {key.yaml for key in keys_of(RawConfig).values()} >= {
        "models", "healthCheckTimeout", "startPort", "globalTTL", "unloadTimeout", "logLevel", "logTimeFormat",
        "logToStdout", "logRequests", "metricsMaxInMemory", "captureBuffer", "store", "ui", "performance",
        "sendLoadingState", "includeAliasesInList", "macros", "apiKeys", "upstream", "profiles", "selectors", "groups",
        "matrix", "hooks", "peers",
    }  # fmt: skip
    assert {key.yaml for key in keys_of(RawModel).values()} >= {
        "cmd", "cmdStop", "proxy", "checkEndpoint", "ttl", "unloadTimeout", "aliases", "unlisted", "name",
        "description", "useModelName", "env", "concurrencyLimit", "filters", "macros", "metadata", "capabilities",
        "sendLoadingState", "timeouts", "compat", "healthCheckTimeout",
    }  # fmt: skip
    assert [key.yaml for key in keys_of(RawFilters).values()] == ["stripParams", "setParams", "setParamsByID"]
    assert [key.yaml for key in keys_of(RawTimeouts).values()] == [
        "connect", "keepalive", "responseHeader", "tlsHandshake", "expectContinue", "idleConn",
    ]  # fmt: skip
    assert [key.yaml for key in keys_of(RawGroup).values()] == ["swap", "exclusive", "persistent", "members"]
    assert "apiKey" in {key.yaml for key in keys_of(RawPeer).values()}
    assert "settings" in {key.yaml for key in keys_of(RawSelector).values()}


# ---- values that are written in another way -------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("captureBuffer: 3", {"capture_buffer": "3MiB"}),
        ("captureBuffer: 0", {"capture_buffer": 0}),
        ("captureBuffer: -1", {"capture_buffer": 0}),
        ("captureBuffer: 5KiB", {"capture_buffer": "5KiB"}),
        ("captureBuffer: yes", {"capture_buffer": "yes"}),
        ("captureBuffer: true", {"capture_buffer": True}),
        ("captureBuffer: ${n}", {"capture_buffer": "${n}MiB"}),
        ("captureBuffer: ${text}", {"capture_buffer": "${text}"}),
        ("logLevel: ' WARN '", {"log_level": "warning"}),
        ("logLevel: debug", {"log_level": "debug"}),
        ("logLevel: Loud", {"log_level": "Loud"}),
        ("logLevel: 1", {"log_level": 1}),
        ("logTimeFormat: RFC3339", {"log_time_format": "rfc3339"}),
        ("logTimeFormat: Nope", {"log_time_format": "Nope"}),
        ("metricsMaxInMemory: 0", {}),
        ("metricsMaxInMemory: 5", {"metrics_max_in_memory": 5}),
        ("metricsMaxInMemory: ${n}", {"metrics_max_in_memory": "${n}"}),
        ("metricsMaxInMemory: ${none}", {}),
        ("unloadTimeout: 0", {}),
        ("unloadTimeout: 0s", {"unload_timeout": "0s"}),
        ("unloadTimeout: false", {"unload_timeout": False}),
        ("performance: {every: 0s}", {"performance": {}}),
        ("performance: {every: '0'}", {"performance": {}}),
        ("performance: {every: 7s}", {"performance": {"every": "7s"}}),
        ("performance: {every: often}", {"performance": {"every": "often"}}),
        ("globalTTL: 0", {"global_ttl": 0}),
        ("logRequests: true", {"log_requests": True}),
        ("upstream: {ignorePaths: []}", {"upstream": {"ignore_paths": []}}),
    ],
)
def test_values_of_the_whole_file(written, meant):
    """What is a default there is not written; macros stay where they can."""
    values = native(f"macros: {{n: 4, none: 0, text: 4MiB}}\nmemory: {{}}\n{written}\n").values
    del values["memory"], values["macros"]

    assert values == meant


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("ttl: -1", {}),
        ("ttl: -2", {"ttl": -2}),
        ("ttl: 0", {"ttl": 0}),
        ("ttl: ${never}", {}),
        ("unloadTimeout: 0", {}),
        ("concurrencyLimit: 0", {}),
        ("concurrencyLimit: -3", {}),
        ("concurrencyLimit: 3", {"concurrency_limit": 3}),
        ("checkEndpoint: ' /x '", {"check_endpoint": "/x"}),
        ("checkEndpoint: ' none '", {"check_endpoint": "none"}),
        ("checkEndpoint: 'http://h:${PORT}/a/b?c'", {"check_endpoint": "/a/b"}),
        ("checkEndpoint: HTTPS://h", {"check_endpoint": "/"}),
        ("checkEndpoint: ${path}/x", {"check_endpoint": "${path}/x"}),
        ("checkEndpoint: 5", {"check_endpoint": 5}),
        ("env: {A: 1}", {"env": {"A": 1}}),
        ("env: [A=1, B=, 'C=a=b', A=2]", {"env": {"A": "2", "B": "", "C": "a=b"}}),
        ("env: ['${pair}', 'X=${path}', '${path}=1']", {"env": {"P": "Q", "X": "${path}", "/p": "1"}}),
        ("filters: {stripParams: ' a, ,b,a '}", {"filters": {"strip_params": ["a", "b", "a"]}}),
        ("filters: {stripParams: ''}", {"filters": {"strip_params": []}}),
        ("filters: {stripParams: 'x, ${path}'}", {"filters": {"strip_params": ["x", "${path}"]}}),
        ("filters: {stripParams: 'x, ${two}'}", {"filters": {"strip_params": ["x", "a", "b"]}}),
        ("filters: {stripParams: ['a,b']}", {"filters": {"strip_params": ["a,b"]}}),
        ("filters: {stripParams: 7}", {"filters": {"strip_params": ["7"]}}),
        ("filters: {strip_params: 'a, b'}", {"filters": {"strip_params": ["a", "b"]}}),
        ("filters: {strip_params: a, stripParams: b}", {"filters": {"strip_params": ["b"]}}),
        ("filters: {stripParams: b, strip_params: a}", {"filters": {"strip_params": ["b"]}}),
        ("filters: {stripParams: '', strip_params: a}", {"filters": {"strip_params": ["a"]}}),
        ("memory: {gpu0: 1GiB}", {"memory": {"gpu0": "1GiB"}}),
        ("cmd: [x, y]", {"cmd": ["x", "y"]}),
        ("metadata: {a: , b: {cC: 1}}", {"metadata": {"a": None, "b": {"cC": 1}}}),
    ],
)
def test_values_of_a_model(written, meant):
    """As above."""
    macros = "macros: {never: -1, path: /p, pair: P=Q, two: 'a, b'}\n"

    assert native(f"{macros}models: {{m: {{{written}}}}}").values["models"] == {"m": meant}


def test_macros_of_the_model_decide_before_those_of_the_file():
    """Also about what a value comes to."""
    text = "macros: {t: -1}\nmodels: {a: {macros: {t: 5}, ttl: '${t}'}, b: {ttl: '${t}'}}"

    assert native(text).values["models"] == {"a": {"macros": {"t": 5}, "ttl": "${t}"}, "b": {}}


def test_wrong_shapes_of_env(mistakes):
    """Each element is told with its line."""
    text = (
        "models:\n  a:\n    cmd: x ${PORT}\n    env:\n    - A\n    - B: 1\n    - 5\n  b: {cmd: x ${PORT}, env: C=1}\n"
    )

    assert mistakes(text) == [
        '5: models.a.env[0]: found "A", allowed is a text NAME=VALUE',
        "6: models.a.env[1]: found a table, allowed is a text NAME=VALUE",
        "7: models.a.env[2]: found 5, allowed is a text NAME=VALUE",
        '8: models.b.env: found "C=1", allowed is a list of texts NAME=VALUE',
    ]


# ---- who puts out whom ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "groups: {g: {swap: no, members: [a, b]}}",
        "routing: {router: {settings: {groups: {g: {swap: false, members: [a, b]}}}}}",
        "routing: {router: {use: group, settings: {matrix: {}, groups: {g: {swap: off, members: [a, b]}}}}}",
        "routing: {router: {use: '${r}', settings: {groups: {g: {swap: No, members: [a, b]}}}}}\nmacros: {r: group}",
        "groups: {g: {swap: n, members: [a, b]}}\nrouting: {router: {use: '', settings: {groups: {}, matrix: }}}",
    ],
)
def test_groups(load, text):
    """In all the ways to write them."""
    assert load(AB + text).groups == (GroupConfig("g", ("a", "b"), swap=False),)


@pytest.mark.parametrize(
    "text",
    [
        "matrix: {sets: {z: a, y: a & b}, evict_costs: {a: 3}}",
        "routing: {router: {use: matrix, settings: {groups: {g: {}}, matrix: {sets: {z: a, y: a & b}}}}}",
    ],
)
def test_a_matrix(load, text):
    """Its sets stay in their order."""
    config = load(AB + text)

    assert config.groups == ()
    assert list(native(AB + text).values["matrix"]["sets"]) == ["z", "y"]
    assert config.matrix is not None


def test_one_model_at_a_time_unless_memory_is_spoken_of(load):
    """The default of llama-swap, and how our own keys change it."""
    assert load(AB).groups == (GroupConfig("(default)", ("a", "b")),)
    assert (load(AB + "memory: {}\n").groups, load(AB + "memory: {}\n").memory) == ((), MemoryConfig())
    assert load("models: {a: {cmd: x ${PORT}, memory: 1GiB}}").groups == ()
    assert load("models: {a: {cmd: x ${PORT}, memory: 1GiB}}\ngroups: {}").groups == ()


OLD = "allowed is one of them, and routing.router.settings.{} is its place there"


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ("groups: {}\nrouting: {router: {use: group}}", "2: groups: found groups beside routing.router, " + OLD),
        (
            "matrix: {sets: {s: a}}\nrouting: {router: {settings: {groups: {g: }}}}",
            "2: matrix: found matrix beside routing.router, " + OLD,
        ),
        ("groups: {}\nmatrix: {sets: {s: a}}", "3: matrix: found matrix beside groups, allowed is one of them"),
        (
            "routing: {router: {use: matrix}}",
            (
                '2: routing.router.use: found "matrix", but no such matrix,'
                " allowed is that along with routing.router.settings.matrix"
            ),
        ),
        (
            "routing: {router: {settings: {matrix: {sets: {s: a}}}}}",
            (
                "2: routing.router.settings.matrix: found matrix, but no routing.router.use, allowed is that with"
                " `use: matrix`, or with `use: group`, and then it does not count"
            ),
        ),
        (
            "routing: {router: {use: groups}}",
            '2: routing.router.use: found "groups", allowed is one of group, matrix, did you mean "group"?',
        ),
        ("routing: {router: {use: 5}}", "2: routing.router.use: found 5, allowed is one of group, matrix"),
        ("routing: {scheduler: {use: lru}}", '2: routing.scheduler.use: found "lru", allowed is one of fifo'),
        ("routing: {router: [x]}", "2: routing.router: found an array, allowed is a table"),
        ("routing: 5", "2: routing: found 5, allowed is a table"),
        (
            "routing: {router: {use: matrix, settings: {matrix: {sets: {s: zz}}}}}",
            '2: routing.router.settings.matrix.sets.s: found "zz" at column 1, allowed is',
        ),
    ],
)
def test_mistakes_in_routing(mistakes, text, mistake):
    """They are told in the words of the file."""
    name = mistake.partition(": ")[2].partition(":")[0]

    assert [line[: len(mistake.format(name))] for line in mistakes(A + text)] == [mistake.format(name)]


# ---- who is next ----------------------------------------------------------------------------------


def priority(text: str) -> str:
    return f"routing: {{scheduler: {{use: fifo, settings: {{fifo: {{priority: {text}}}}}}}}}\n"


def test_priorities_go_to_models(load):
    """By name, by alias, and by the names that filters make."""
    models = """
macros: {p: 7}
models:
  a: {cmd: "x ${PORT}", aliases: [0123]}
  b: {cmd: "x ${PORT}", macros: {p: 1}, filters: {setParamsByID: {"${MODEL_ID}:hi": {}}}}
  c: {cmd: "x ${PORT}", priority: -1}
"""
    text = models + priority("{0123: 5, 'b:hi': '${p}'}")

    assert {name: model.priority for name, model in load(text).models.items()} == {"a": 5, "b": 7, "c": -1}
    assert load(text).policy == "lease"


def test_mistakes_about_priorities(mistakes):
    """Unknown names, a second one for the same model, and no number."""
    models = "models: {one: {cmd: 'x ${PORT}', aliases: [z]}, two: {cmd: 'x ${PORT}'}}\n"

    assert mistakes(models + priority("{ona: 1, one: 2, z: 3, two: high}")) == [
        (
            '2: routing.scheduler.settings.fifo.priority.ona: found "ona", allowed is the name of a model or an alias,'
            ' did you mean "one"?'
        ),
        '2: routing.scheduler.settings.fifo.priority.z: found a second priority for "one", allowed is one',
        '2: routing.scheduler.settings.fifo.priority.two: found "high", allowed is a whole number',
    ]


# ---- profiles of older versions -------------------------------------------------------------------


@pytest.mark.parametrize(("text", "path"), [("[a, b]", "profiles"), ("{p: [a, b]}", "profiles.p")])
def test_profiles_that_are_lists(mistakes, text, path):
    """Nothing else is said of them."""
    expected = "found a list, as older versions had it, allowed is a mapping with pins, of names to targets"

    assert mistakes(f"{AB}profiles: {text}\n") == [f"2: {path}: {expected}"]


# ---- unknown keys ---------------------------------------------------------------------------------

UNKNOWN = """
heathCheckTimeout: 5
models:
  a:
    cmd: x ${PORT}
    cmd_stop: y
    cmdStop: z
    timeouts: {conect: 1}
routing: {router: {settings: {groups: {g: {member: [a]}}}, uses: group}}
peers: {p: {proxy: "http://h", models: [m], api_key: k}}
"""


def test_unknown_keys(mistakes):
    """Each with its line and the key that was probably meant, as YAML spells it."""
    hint = "(with --lenient it would be left out)"

    assert mistakes(UNKNOWN) == [
        f'2: heathCheckTimeout: unknown key, did you mean "healthCheckTimeout"? {hint}',
        f'6: models.a.cmd_stop: unknown key, did you mean "cmdStop"? {hint}',
        f'8: models.a.timeouts.conect: unknown key, did you mean "connect"? {hint}',
        f'9: routing.router.settings.groups.g.member: unknown key, did you mean "members"? {hint}',
        f'9: routing.router.uses: unknown key, did you mean "use"? {hint}',
        f'10: peers.p.api_key: unknown key, did you mean "apiKey"? {hint}',
    ]


def test_unknown_keys_can_be_left_out(load, tmp_path):
    """Then each is told all the same, but the rest holds."""
    unknown = Mistakes()

    config = load(UNKNOWN, unknown=unknown)

    assert config.models["a"].stop_argv == ("z",)
    assert [line.removeprefix(str(tmp_path)) for line in unknown.lines()] == [
        '/c.yaml:2: heathCheckTimeout: unknown key, left out, did you mean "healthCheckTimeout"?',
        '/c.yaml:6: models.a.cmd_stop: unknown key, left out, did you mean "cmdStop"?',
        '/c.yaml:8: models.a.timeouts.conect: unknown key, left out, did you mean "connect"?',
        '/c.yaml:9: routing.router.settings.groups.g.member: unknown key, left out, did you mean "members"?',
        '/c.yaml:9: routing.router.uses: unknown key, left out, did you mean "use"?',
        '/c.yaml:10: peers.p.api_key: unknown key, left out, did you mean "apiKey"?',
    ]


def test_keys_that_hold_what_is_repeated(load):
    """Any name will do if anchors within it are used elsewhere, and `x-` anyway."""
    config = load("""
x-notes: {who: me}
defs:
  base: &base
    cmd: x ${PORT}
    env: &env [A=1]
more: &more
  ttl: 5
models:
  a: {<<: [*base, *more]}
  b: {<<: *base, env: *env, ttl: 6}
""")

    assert {name: (model.ttl, model.env) for name, model in config.models.items()} == {
        "a": (5.0, {"A": "1"}), "b": (6.0, {"A": "1"}),
    }  # fmt: skip


def test_a_misspelled_key_is_no_holder(mistakes):
    """Neither with anchors of its own use, nor with aliases of what stands before it."""
    text = "models: {a: &a {cmd: x ${PORT}}}\nmodles: {b: &b {cmd: y}, c: *b, d: *a}\n"

    assert mistakes(text) == ['2: modles: unknown key, did you mean "models"? (with --lenient it would be left out)']


# ---- several files --------------------------------------------------------------------------------


def test_one_file_speaks_of_what_another_defines(load):
    """Priorities, groups and macros; mistakes name the file."""
    more = "macros: {t: 9}\ngroups: {g: {members: [a, b]}}\n" + priority("{a: 1}")

    config = load("models: {a: {cmd: 'x ${PORT}', ttl: '${t}'}, b: {cmd: 'x ${PORT}'}}", more)

    assert (config.models["a"].priority, config.models["a"].ttl) == (1, 9.0)
    assert config.groups == (GroupConfig("g", ("a", "b")),)


# ---- whatever they are like -------------------------------------------------------------------------

NAMES = ["a", "${x}", "models", "use", "${MODEL_ID}", *(key.yaml for key in keys_of(RawModel).values())]
TOP = ["routing", "x-y", "zz", *(key.yaml for key in keys_of(RawConfig).values())]
SCALARS = st.sampled_from(["", "x", "a=b", "a,b", "${x}", "${PORT}", "matrix", "group", "a", "0s", "NaN", True, None])
VALUES = st.recursive(
    SCALARS | st.integers(-2, 2) | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=12,
)
ROUTING = st.fixed_dictionaries(
    {},
    optional={
        "router": VALUES | st.fixed_dictionaries({"use": VALUES, "settings": VALUES}),
        "scheduler": VALUES | st.fixed_dictionaries({"settings": st.fixed_dictionaries({"fifo": VALUES})}),
    },
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(TOP), VALUES | ROUTING, max_size=5))
def test_no_document_breaks_the_translation(values):
    """Whatever stands where, there are mistakes at most, and each has words."""
    mistakes = Mistakes()

    translate(Document(values), mistakes)

    assert all(": " in line for line in mistakes.lines())


def test_an_empty_file_is_the_default_there(load):
    """All the same as ours, but for who rules."""
    assert load("") == Config(memory=None)
