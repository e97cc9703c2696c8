"""From one language into the other: the meaning stays, and so do comments, order, macros and readable texts."""

from __future__ import annotations

import re
import tomllib

import pytest
import tomli_w
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from trioswap.config.llamaswap import translate
from trioswap.config.loading import load_sources
from trioswap.config.mistakes import Mistakes
from trioswap.config.yaml_source import parse_yaml
from trioswap.convert import TOML, YAML, Converted, convert
from trioswap.convert.toml_text import write_toml
from trioswap.convert.yaml_text import write_yaml
from trioswap.errors import ConfigError, Misuse

MODEL = "models: {a: {cmd: x ${PORT}}}\n"


@pytest.fixture(scope="module")
def there_and_back(tmp_path_factory):
    """Converts a TOML text into YAML and that into TOML again; all three mean the same."""
    directory = tmp_path_factory.mktemp("convert")

    def there_and_back(text: str) -> tuple[Converted, Converted]:
        files = [directory / "a.toml", directory / "b.yaml", directory / "c.toml"]
        files[0].write_text(text)
        there = convert(files[0], YAML, {})
        files[1].write_text(there.text)
        back = convert(files[1], TOML, {})
        files[2].write_text(back.text)
        first, *others = [load_sources([file], None, {}, translate) for file in files]
        assert all(config == first for config in others)
        return there, back

    return there_and_back


@pytest.fixture
def to_toml(tmp_path):
    """Converts a YAML text."""

    def to_toml(text: str, **environ: str) -> Converted:
        (tmp_path / "c.yaml").write_text(text)
        return convert(tmp_path / "c.yaml", TOML, environ)

    return to_toml


@pytest.fixture
def to_yaml(tmp_path):
    """Converts a TOML text."""

    def to_yaml(text: str, **environ: str) -> Converted:
        (tmp_path / "c.toml").write_text(text)
        return convert(tmp_path / "c.toml", YAML, environ)

    return to_yaml


# ---- what it looks like ---------------------------------------------------------------------------

FOREIGN = r"""# At the top.
# In two lines.

# Before a key.
healthCheckTimeout: 300   # behind it
logLevel: warn

macros:
  # Before a macro.
  server: |
    /bin/server --port ${PORT}
  ctx: 4096

# Before the models.
models:
  # Before a model.
  "large one":  # behind its name
    cmd: |  # behind the sign of a block
      # within a command, so no comment of the file
      ${server} \
      --ctx ${ctx} --note "# neither"
    ttl: -1  # of a key that says nothing
    env:
      # Before a variable.
      - "A=# no"  # behind a variable
      - B=${env.HOME}
    aliases: [b,  # within brackets
      0123]
    filters:
      stripParams: "top_p, seed"
  small:
    cmd: ${server} -m 'C:\x'

routing:
  router:
    use: group
    settings:
      groups:
        # Before a group.
        g: {swap: no, members: [small]}
hooks: {on_startup: {preload: [small]}}
# At the end.
"""
NATIVE = r"""# At the top.
# In two lines.

# Before a key.
health_check_timeout = 300  # behind it
log_level = "warning"

[macros]
# Before a macro.
server = '''
/bin/server --port ${PORT}
'''
ctx = 4096

# Before the models.

# Before a model.
# of a key that says nothing
[models."large one"]  # behind its name
cmd = '''
# within a command, so no comment of the file
${server} \
--ctx ${ctx} --note "# neither"
'''  # behind the sign of a block
aliases = ["b", "0123"]  # within brackets

[models."large one".env]
# Before a variable.
A = "# no"  # behind a variable
B = "${env.HOME}"

[models."large one".filters]
strip_params = ["top_p", "seed"]

[models.small]
cmd = "${server} -m 'C:\\x'"

# Before a group.
[groups.g]
swap = false
members = ["small"]

[hooks.on_startup]
preload = ["small"]

# At the end.
"""


def test_yaml_becomes_toml_for_people(to_toml):
    """Sections and texts of lines, comments where their keys are, and macros."""
    converted = to_toml(FOREIGN, HOME="/h")

    assert converted.text == NATIVE
    assert converted.notes == ("1 line of comments is about keys that are not there any more, and stand nearby",)


def test_toml_becomes_yaml_as_llama_swap_has_it(to_yaml):
    """Whole seconds, MiB, lists of NAME=VALUE, and the block `routing`."""
    converted = to_yaml(
        """
# The first.
capture_buffer = "10MiB"
log_level = "warning"
global_ttl = "1h"  # an hour
performance = { every = 10 }

# A model.
[models.a]
cmd = ["x", "${PORT}"]
ttl = "1.5s"
unload_timeout = 0
priority = 3  # before others
env = { A = "1", "B" = "${MODEL_ID}" }
filters.strip_params = ["a", "b"]
max_wait = "1m"
device = "auto"

# Two at a time.
[matrix.sets]
s = "a"
# The end.
"""
    )

    assert (converted.text, converted.notes) == (
        """# The first.
captureBuffer: 10
logLevel: warn
globalTTL: 3600  # an hour

performance:
  every: 10s

models:
  # A model.
  a:
    cmd:
      - x
      - "${PORT}"
    ttl: 1.5s
    unloadTimeout: 0s
    env:
      - A=1
      - "B=${MODEL_ID}"
    filters:
      stripParams: a, b
    maxWait: 1m
    device: auto

routing:
  router:
    use: matrix
    settings:
      matrix:
        # Two at a time.
        sets:
          s: a

  scheduler:
    use: fifo
    settings:
      fifo:
        priority:
          a: 3  # before others

# The end.
""",
        (),
    )


def test_memory_alone_rules_in_both(to_yaml):
    """In TOML that is what holds when nothing is said; YAML has to say it."""
    assert to_yaml("").text == "memory: {}\n"
    assert to_yaml("[groups]\n").text.startswith("routing:\n  router:\n")


def test_values_in_macros_and_the_environment_stay_references(to_toml, to_yaml):
    """Secrets, too."""
    foreign = to_toml(
        'macros: {t: 5}\napiKeys: ["${env.K}", ${env.K}]\nmodels: {a: {cmd: "${PORT}", ttl: "${t}"}}', K="s"
    )
    native = to_yaml('api_keys = ["${env.K}"]\n[macros]\nt = "5m"\n[models.a]\ncmd = "${PORT}"\nttl = "${t}"\n', K="1")

    assert 'api_keys = ["${env.K}", "${env.K}"]' in foreign.text
    assert 'ttl = "${t}"' in foreign.text
    assert '- "${env.K}"' in native.text
    assert 'ttl: "${t}"' in native.text


def test_a_block_that_ends_with_the_file_holds_no_comments(to_toml):
    """Also without a line break at its end."""
    text = "models:\n  a:\n    cmd: |\n      x ${PORT}\n      # one\n      # two"

    assert to_toml(text).text == "[models.a]\ncmd = '''\nx ${PORT}\n# one\n# two'''\n\n[groups]\n"


# ---- what the other language has no words for -------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "line", "note"),
    [
        (
            "parallel: ${env.N}",
            "parallel = 4",
            "models.a.parallel is 4 now: TOML would take ${env.N} for something else",
        ),
        ("parallel: ${n}", "parallel = 4", "models.a.parallel is 4 now: TOML would take ${n} for something else"),
        (
            "unlisted: ${yes}",
            "unlisted = true",
            "models.a.unlisted is true now: TOML would take ${yes} for something else",
        ),
    ],
)
def test_what_is_no_text_only_in_yaml_is_written_out(to_toml, written, line, note):
    """With a note about each."""
    text = f"macros: {{n: ${{env.N}}, yes: yes}}\nmodels: {{a: {{cmd: '${{PORT}}', {written}}}}}"

    converted = to_toml(text, N="4")

    assert line in converted.text.splitlines()
    assert converted.notes == (note,)


def test_a_name_in_a_macro_is_written_out(to_toml):
    """YAML remembers how it was written, TOML does not; but no text of the environment is written out."""
    text = "macros: {n: 0123, v: ${env.V}}\nmodels: {a: {cmd: '${PORT}', name: '${n}'}}"

    assert 'name = "0123"' in to_toml(text.replace("${env.V}", "v")).text
    with pytest.raises(ConfigError, match=r"found what TOML cannot say, so nothing is converted"):
        to_toml(text, V="secret")


def test_null_in_json(to_toml):
    """TOML has none; a pin to nobody can be said otherwise."""
    with pytest.raises(ConfigError) as caught:
        to_toml("models:\n  a:\n    cmd: ${PORT}\n    metadata: {x: [1, null]}\n")

    assert [line.rpartition("c.yaml:")[2] for line in caught.value.mistakes] == [
        "4: models.a.metadata.x[1]: found nothing, which TOML cannot say, allowed is to leave it out, or a value"
    ]
    assert 'x = ""' in to_toml(MODEL + "profiles: {p: {pins: {x: }}}").text


def test_pairs_that_come_out_of_the_environment(to_toml):
    """A table has no place for them."""
    with pytest.raises(ConfigError, match=r'models\.a\.env\[0\]: found "\$\{env\.P\}", allowed is a text NAME=VALUE'):
        to_toml("models: {a: {cmd: '${PORT}', env: ['${env.P}']}}", P="A=1")


def test_what_does_not_count_is_left_out_with_a_note(to_toml):
    """Keys that only hold what is repeated, and the rule that was not chosen."""
    text = """
defs: {d: &d {ttl: 5}}
models: {a: {<<: *d, cmd: '${PORT}'}}
routing: {router: {use: group, settings: {groups: {g: {members: [a]}}, matrix: {sets: {s: a}}}}}
"""

    assert to_toml(text).notes == (
        "defs is left out: what others take from it is written where they are",
        "routing.router.settings.matrix is left out: routing.router.use says that it does not count",
    )


def test_comments_about_what_is_gone(to_toml):
    """They go to the top of the nearest table that is left, or of the file; what an anchor says keeps its own."""
    text = """
# about defs
defs:
  d: &d
    # about ttl
    ttl: 5  # five
# about models
models:
  a:
    <<: *d
    cmd: ${PORT}
    # about nothing
    unloadTimeout: 0  # as elsewhere
"""

    converted = to_toml(text)

    assert (
        converted.text
        == """# about defs

# about models

# about nothing
# as elsewhere
[models.a]
# about ttl
ttl = 5  # five
cmd = "${PORT}"

[groups]
"""
    )
    assert converted.notes[1:] == ("3 lines of comments are about keys that are not there any more, and stand nearby",)


# ---- what is refused --------------------------------------------------------------------------------


def test_other_files(tmp_path):
    """Of another kind, or in the language already, or not there."""
    with pytest.raises(Misuse, match=r"found a file of another kind, allowed are \*\.toml, \*\.yaml and \*\.yml"):
        convert(tmp_path / "a.json", TOML, {})
    with pytest.raises(Misuse, match="found YAML already"):
        convert(tmp_path / "a.yml", YAML, {})
    with pytest.raises(ConfigError, match="cannot read the file"):
        convert(tmp_path / "a.yml", TOML, {})


def test_mistakes_are_those_of_the_file(to_toml, to_yaml):
    """Nothing is converted before they are mended."""
    with pytest.raises(ConfigError, match=r'c\.yaml:1: model: unknown key, did you mean "models"\?'):
        to_toml("model: {}\n")
    with pytest.raises(ConfigError, match=r"c\.toml:2: ttl: unknown key"):
        to_yaml("\nttl = 5\n")


# ---- whatever it says -------------------------------------------------------------------------------

WORDS = [
    "a", "0123", "yes", "NO", "on", "null", "~", "<<", "1:30", "1e5", "0x1F", ".inf", "-", "- a", "#a", "a #b", "a: b",
    "a:", "[a", "{a", "a/b:c", "it's", '"q"', "*a", "&a", "!a", "%a", "@a", "`a", "\\", "é", "\U0001f600", "2024-01-01",
    "=", "?", "? a", "|", ">", "'''", '"""', "a,b", "true", "1_0", "0o7", "5s", "''", "a'", "\ufeff", "a\u2028b",
]  # fmt: skip
NAMES = st.sampled_from([word for word in WORDS if word.isprintable() and word == word.strip()])
LINES = st.lists(st.sampled_from([*WORDS, "", " ", " a", "a ", "\t", "a\tb", "\x85", "\r", "\x7f", "\x01"]), max_size=4)
TEXTS = (
    st.sampled_from(["", *WORDS])
    | LINES.map("\n".join)
    | st.text(st.characters(exclude_characters="$\0", codec="utf-8"), max_size=5)
)
SECONDS = st.sampled_from([0, 1, 2.5, 3600, "0s", "90s", "1h30m", "1.5s", "500ms"])
NOT_0 = SECONDS.filter(lambda value: value not in (0, "0s"))
FLAGS = st.booleans()
NUMBERS = st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False)
REFERENCES = st.sampled_from(["${m}", "${n}", "${m}-${n}", "${MODEL_ID}"])
JSON = st.recursive(
    TEXTS | NUMBERS | FLAGS | REFERENCES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)
FIELDS = st.sampled_from(["a", "b.c", "a,b", " x ", "5", "yes", ""])
PARAMS = st.dictionaries(st.sampled_from(["a", "b.c", "yes", "0123", "x y"]), JSON, max_size=3)
COMMANDS = st.sampled_from(
    [
        "x ${PORT}",
        "x ${PORT} \\\n  -y # no\n",
        "# c\nx ${PORT}\n",
        ["x", "${PORT}", "# a", ""],
        "x '${PORT}' \"#\"\n\n",
        " x ${PORT}",
    ]
)


def tables(**optional: st.SearchStrategy[object]) -> st.SearchStrategy[dict[str, object]]:
    return st.fixed_dictionaries({}, optional=optional)


MODELS = st.fixed_dictionaries(
    {"cmd": COMMANDS},
    optional={
        "name": TEXTS,
        "description": TEXTS | REFERENCES,
        "cmd_stop": st.sampled_from(["kill ${PID}", ["a", "b"]]),
        "env": st.dictionaries(st.sampled_from(["A", "B_1", "yes"]), TEXTS | REFERENCES, max_size=3),
        "unlisted": FLAGS,
        "check_endpoint": st.sampled_from(["/", "/x", "none"]),
        "ttl": SECONDS,
        "unload_timeout": SECONDS,
        "health_check_timeout": NOT_0,
        "max_wait": SECONDS,
        "queue_timeout": SECONDS,
        "concurrency_limit": st.integers(1, 9),
        "priority": st.integers(-9, 9) | st.just("${n}"),
        "weight": st.sampled_from([1, 0.5]),
        "memory": st.sampled_from(["1KiB", 5]),
        "device": st.just("auto"),
        "filters": tables(strip_params=st.lists(FIELDS, max_size=3), set_params=PARAMS),
        "timeouts": tables(connect=SECONDS, idle_conn=SECONDS),
        "capabilities": st.fixed_dictionaries({"in": st.just(["text"]), "context": st.integers(0, 9)}),
        "metadata": st.dictionaries(TEXTS, JSON, max_size=3),
        "compat": tables(ignore_websockets=FLAGS),
        "macros": st.fixed_dictionaries({"n": st.integers(1, 9)}),
    },
)
RESIDENCY = st.sampled_from(
    [{}, {"groups": {}}, {"groups": {"yes": {"swap": False, "members": []}}}, {"memory": {"headroom": 0}}]
)
KEYS = [
    {"key": "0124", "models": ["*"], "endpoints": ["/v1/*", "/yes"], "peers": False, "weight": 0.5},
    {"key": "${n}k", "admin": True, "concurrency": 3},
    {"hash": "sha256:" + "0" * 64, "read_only": True},
]
SETTINGS = tables(
    log_level=st.sampled_from(["debug", "warning"]),
    capture_buffer=st.sampled_from([0, 7, 5 * 2**20, "10MiB", "1KiB", "${n}", "${n}MiB"]),
    unload_timeout=SECONDS,
    global_ttl=SECONDS,
    performance=tables(every=st.sampled_from([5, 7.5, "10s"]), disabled=FLAGS),
    metrics_max_in_memory=st.integers(1, 9),
    api_keys=st.lists(st.sampled_from(["k", "0123", "yes", "1e5"]), max_size=3),
    keys=st.dictionaries(NAMES, st.sampled_from(KEYS), max_size=1),
    cors=tables(origins=st.sampled_from([["*"], [], ["http://a:1", "App://yes"]]), private_network=FLAGS),
    tls=st.just({"cert_file": "a.crt", "key_file": "a.key"}),
    listen=st.sampled_from(["unix:/run/a b", "0.0.0.0:1"]),
    trusted_proxies=st.lists(st.sampled_from(["::1", "10.0.0.0/8"]), max_size=2),
    heartbeat=SECONDS,
    queue_timeout=SECONDS,
    max_queue=st.integers(1, 9) | st.just("${n}"),
    max_upload=st.sampled_from([5, "1KiB", "${n}MiB"]),
    upstream=tables(ignore_paths=st.just([r"\.js$", "#"])),
    ui=tables(activity=tables(session_id=st.just(["X-Id"]))),
    peers=st.just({"p": {"proxy": "http://h", "models": ["0123", "m"], "api_key": "5"}}),
)


@st.composite
def documents(draw: st.DrawFn) -> dict[str, object]:
    """Native documents that mean something."""
    models = {name: draw(MODELS) for name in draw(st.lists(NAMES, unique=True, max_size=3))}
    for index, model in enumerate(models.values()):
        if draw(FLAGS):
            model["aliases"] = [f"{index}{word}" for word in draw(st.lists(NAMES, unique=True, max_size=3))]
    profiles = {"p": {"pins": {"x": next(iter(models)), "no": ""}}} if models and draw(FLAGS) else {}
    macros = {"m": draw(TEXTS | st.integers(-9, 9) | FLAGS), "n": draw(st.integers(1, 9))}
    document = draw(SETTINGS) | {"macros": macros, "models": models, "profiles": profiles} | draw(RESIDENCY)
    return dict(draw(st.permutations(list(document.items()))))


SAID = st.recursive(
    TEXTS | NUMBERS | FLAGS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3)
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(TEXTS, SAID, max_size=4))
def test_what_is_written_is_what_is_read(values):
    """Whatever keys and texts look like."""
    for text in (word for word in WORDS if word not in values):
        values[text] = [text, f"{text}\n", f"{text}\n{text}", f"{text}\n\n"]
    mistakes = Mistakes()

    assert tomllib.loads(write_toml(values, {})) == values
    assert parse_yaml(write_yaml(values, {}), "", mistakes).values == values
    assert mistakes.lines() == []


def test_other_readers_of_yaml_take_texts_for_texts():
    """Those, too, for whom `yes` and `1:30` are none."""
    values = {word: word for word in WORDS if word.isprintable()}

    assert yaml.safe_load(write_yaml(values, {})) == values


@settings(max_examples=100, deadline=None)
@given(documents())
def test_there_and_back_means_the_same(there_and_back, document):
    """Whatever is in it, and nothing has to be said about it."""
    there, back = there_and_back(tomli_w.dumps(document))

    assert (there.notes, back.notes) == ((), ())


@settings(max_examples=50, deadline=None)
@given(documents(), st.randoms(use_true_random=False))
def test_no_comment_is_lost(there_and_back, document, random):
    """Wherever they stand, each is there once in the other language, and once again in the first."""
    lines = [
        f"# w{number}w\n{line}  # b{number}b" if line and random.random() < 0.7 else line
        for number, line in enumerate(tomli_w.dumps(document).split("\n"))
    ]
    text = "\n".join([*lines, "# end"])
    expected = sorted(re.findall(r"# (w\d+w|b\d+b|end)", text))

    for converted in there_and_back(text):
        assert sorted(re.findall(r"# (w\d+w|b\d+b|end)$", converted.text, re.MULTILINE)) == expected


def test_the_default_configuration(there_and_back):
    """Nothing stays nothing."""
    _, back = there_and_back("")

    assert back.text == "[memory]\n"


@pytest.mark.parametrize("break_", ["\x85", "\u2028", "\u2029"])
def test_a_comment_stays_a_comment(tmp_path, break_):
    """What ends a line in one language and not in the other becomes a blank."""
    path = tmp_path / "c.toml"
    path.write_text(f"# one {break_}two\nlog_level = 'info'\n", encoding="utf-8")

    assert "# one  two\n" in convert(path, YAML, {}).text
