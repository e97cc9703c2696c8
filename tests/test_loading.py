"""From files to a Config: which files are read, how several come together, places in mistakes, and types as asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from trioswap.config import load as load_toml
from trioswap.config.document import Copying, Document
from trioswap.config.loading import find_sources, load_sources
from trioswap.config.mistakes import Mistakes
from trioswap.config.schema import Config, MemoryConfig
from trioswap.errors import ConfigError, Misuse

TOML = "[models.a]\ncmd = 'x ${PORT}'\n"
YAML = "models:\n  b:\n    command: y ${PORT}\n"


def translate(document: Document, mistakes: Mistakes) -> Document:
    """A small foreign language: `command` is `cmd`, and one model at a time unless `free` is written."""
    native = Document({}, {})

    def rename(path: tuple[str | int, ...]) -> str:
        return "cmd" if path[-1] == "command" else str(path[-1])

    native.values.update(Copying(document, native, mistakes, rename=rename).copy(document.values, (), ()))
    for name in native.values.get("models", {}):
        native.shown[("models", name, "cmd")] = ("models", name, "command")
    if not native.values.pop("free", False):
        native.values.setdefault("groups", {})
    return native


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes files into the current directory and gives their paths."""
    monkeypatch.chdir(tmp_path)

    def write(**texts: str | bytes) -> list[Path]:
        files = [Path(name.replace("__", "/").replace("_", ".")) for name in texts]
        for file, text in zip(files, texts.values(), strict=True):
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(text.encode() if isinstance(text, str) else text)
        return files

    return write


def load(files: list[Path], directory: Path | None = None, environ: dict[str, str] | None = None) -> Config:
    return load_sources(files, directory, environ or {}, translate)


def mistakes(files: list[Path], directory: Path | None = None, environ: dict[str, str] | None = None) -> list[str]:
    """What is wrong with the *files*."""
    with pytest.raises(ConfigError) as caught:
        load(files, directory, environ)
    return caught.value.mistakes


# ---- which files --------------------------------------------------------------------------------


def test_files_then_those_of_the_directory(write):
    """By name; no other kinds, no hidden ones, nothing from directories within."""
    write(z_toml="", d__b_toml="", d__a_yaml="", d__c_yml="", d__x_txt="")
    Path("d/.hidden.toml").touch()
    Path("d/e.toml").mkdir()
    Path("d/e.toml/f.toml").touch()

    assert find_sources([Path("z.toml")], Path("d")) == [
        Path("z.toml"), Path("d/a.yaml"), Path("d/b.toml"), Path("d/c.yml"),
    ]  # fmt: skip


def test_nothing_named_is_a_misuse():
    """It says what to name."""
    with pytest.raises(Misuse, match="give --config FILE, or --config-dir DIRECTORY, or both"):
        find_sources([], None)


def test_a_directory_without_files(write):
    """Is a mistake alone, and none beside a file."""
    write(z_toml="", d__x_txt="")

    assert find_sources([Path("z.toml")], Path("d")) == [Path("z.toml")]
    assert mistakes([], Path("d")) == [
        "found no file *.toml, *.yaml or *.yml, allowed is at least one, or --config FILE beside it"
    ]


def test_a_directory_that_cannot_be_read(write):
    """Because it is none, or not there."""
    write(z_toml="")

    assert mistakes([], Path("no")) == ["cannot read the directory: No such file or directory"]
    assert mistakes([], Path("z.toml")) == ["cannot read the directory: Not a directory"]


def test_no_file_is_read_twice(write):
    """Also not under another name."""
    write(d__a_toml=TOML)
    Path("link.toml").symlink_to("d/a.toml")
    what = "found it twice among the files to read, by --config or in --config-dir, allowed is once"

    assert mistakes([Path("d/a.toml")], Path("d")) == [f"d/a.toml: {what}"]
    assert mistakes([Path("d/a.toml"), Path("link.toml"), Path("d/../d/a.toml")]) == [
        f"link.toml: {what}", f"d/../d/a.toml: {what}",
    ]  # fmt: skip


COLON = 'found ":" where no key can end, allowed is one `key: value` on a line, with text that holds ": " in quotes'


def test_files_that_cannot_be_read_are_told_together(write):
    """Each with its own reason, and its line where there is one."""
    files = write(a_toml="x = ", b_yaml="a: b: c", c_toml=b"\n\xff", d_json="{}", e_yaml="- a\n", f_yaml="a: 1\na: 2\n")
    Path("ring.toml").symlink_to("ring.toml")

    lines = mistakes([*files, Path("no.toml"), Path("ring.toml")])

    assert [line.split(" (")[0] for line in lines] == [
        "a.toml:1: Invalid value",
        f"b.yaml:1: {COLON}",
        "c.toml:2: found byte 0xff, allowed is UTF-8",
        "d.json: found a file of another kind, allowed are *.toml, and *.yaml or *.yml of llama-swap",
        "e.yaml:1: found a list at the top of the file, allowed are keys with values",
        "f.yaml:1: a: found it again on line 2, allowed is once",
        "no.toml: cannot read the file: No such file or directory",
        "ring.toml: cannot read the file: Too many levels of symbolic links",
    ]


def test_the_error_names_the_files(write):
    """One by its name, more by the first and their number."""
    files = write(a_toml="x = 1", b_toml="", c_toml="")
    sources = []
    for some in (files[:1], files):
        with pytest.raises(ConfigError) as caught:
            load(some)
        sources.append(caught.value.source)

    assert sources == ["a.toml", "a.toml and 2 more"]


# ---- several files ------------------------------------------------------------------------------


def test_empty_files_are_the_defaults(write):
    """Zero models are legal."""
    assert load(write(a_toml="", b_toml="# c\n")) == Config()
    assert load(write(a_yaml="free: true", b_yml="# c\n")) == Config()


def test_files_of_both_languages_come_together(write):
    """Models of one, settings of the other."""
    config = load(write(a_toml=TOML + "[memory]\nheadroom = '1GiB'", b_yaml=YAML))

    assert [config.models[name].argv[0] for name in "ab"] == ["x", "y"]
    assert config.memory == MemoryConfig(headroom=2**30)


@pytest.mark.parametrize(
    ("toml", "alone"), [("", True), ("[memory]", False), ("[matrix]\nsets.s = 'b'", False), ("[groups.g]", True)]
)
def test_the_default_of_llama_swap_yields_to_what_is_written(write, toml, alone):
    """One model at a time is not what somebody means who writes how memory is to be used."""
    config = load(write(a_yaml=YAML, b_toml=toml))

    assert (config.memory is None and config.matrix is None) == alone


def test_macros_go_across_files(write):
    """In the order of the files; those of llama-swap stand together."""
    files = write(
        a_toml="macros.one = 'x'", b_yaml="macros: {two: '${one}'}", c_toml="[models.m]\ncmd = '${three} ${PORT}'",
        d_yaml="macros: {three: '${two}'}",
    )  # fmt: skip

    assert load(files).models["m"].argv == ("x", "5800")


def test_foreign_files_stand_where_the_first_of_them_does(write):
    """So a native file behind it may use its macros."""
    files = write(a_yaml="macros: {one: x}", b_toml="macros.two = '${one}'\n[models.m]\ncmd = '${two} ${PORT}'")

    assert load(files).models["m"].argv == ("x", "5800")


def test_groups_that_are_written_do_not_yield(write):
    """Then they rule beside the memory."""
    config = load(write(a_yaml=YAML + "groups: {g: {members: [b]}}", b_toml="[memory]"))

    assert [group.name for group in config.groups] == ["g"]
    assert config.memory is not None


def test_contradictions_name_both_places(write):
    """Of native files along with all other mistakes; what comes third to the same place adds nothing."""
    files = write(
        a_toml="log_level = 'info'\n" + TOML,
        b_toml="log_level = 'debug'\nlisten = 5\n" + TOML,
        c_yaml="models: {a: {command: z}}",
    )

    assert mistakes(files) == [
        "a.toml:1: log_level: found another value at b.toml:1, allowed is the same in all files",
        "a.toml:2: models.a: found it again at b.toml:3, allowed is one file for each",
        'b.toml:2: listen: found 5, allowed is text in quotes, did you mean "5"?',
    ]


def test_contradictions_of_foreign_files_come_first(write):
    """What is translated must be whole."""
    files = write(a_yaml="\nmodels: {a: {command: z}}", b_yaml="models: {a: {command: z}}")

    assert mistakes(files) == ["a.yaml:2: models.a: found it again at b.yaml:1, allowed is one file for each"]


# ---- places and spelling in mistakes --------------------------------------------------------------


def test_mistakes_have_places_and_the_spelling_of_the_file(write):
    """In the order of the files and lines; what is not written has the place of its holder."""
    files = write(
        a_toml="[models.m]\nproxy = 'http://h:1'\ncmd = 5\n[models.n]\nttl = 1",
        b_yaml="models:\n  b:\n    command: 'x ${oops}'\n    aliases:\n      - n\nfree: 1\n",
    )

    assert mistakes(files) == [
        "a.toml:3: models.m.cmd: found 5, allowed is text or an array of texts",
        "a.toml:4: models.n.cmd: found neither cmd nor gguf, allowed is one of them",
        "b.yaml:3: models.b.command: found ${oops}, allowed is one of ${MODEL_ID}, ${PORT}",
        'b.yaml:5: models.b.aliases[0]: found "n", which is the name of a model, allowed is a name of its own',
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("macros.a = '<${zz}>'", "a.toml:1: macros.a: found ${zz}"),
        ("macros.a = '${a}'", "a.toml:1: macros.a: found ${a} in its own definition"),
        ("macros = {PORT = 1, a = 1}", "a.toml:1: macros.PORT: found the name PORT"),
        ("macros.a = '${env.ZZ}'", "a.toml:1: macros.a: found ${env.ZZ}"),
        ("macros.aa = 1", "a.toml:3: models.m.cmd: found ${a}"),
    ],
)
def test_a_wrong_macro_is_one_mistake(write, text, line):
    """Nothing follows from it where the macro is used."""
    (told,) = mistakes(write(a_toml=f"{text}\n[models.m]\ncmd = 'x ${{a}} ${{PORT}}'"))

    assert told.startswith(line)


def test_the_environment_of_a_toml_file_is_given_by_hand(write):
    """For who reads one native file."""
    (file,) = write(a_toml="log_level = '${env.LEVEL}'")

    assert load_toml(file, {"LEVEL": "debug"}).log_level == "debug"


def test_the_environment_is_filled_in(write):
    """And what is missing is told with its place, beside other mistakes."""
    files = write(a_toml="log_level = '${env.LEVEL}'\n[models.m]\ncmd = '${env.CMD} ${PORT}'\nttl = 'x'")

    assert load(write(b_toml="log_level = '${env.LEVEL}'"), environ={"LEVEL": "debug"}).log_level == "debug"
    assert [line.split(",")[0] for line in mistakes(files, environ={"LEVEL": "info"})] == [
        "a.toml:3: models.m.cmd: found ${env.CMD}",
        'a.toml:4: models.m.ttl: found "x"',
    ]


# ---- relative paths -------------------------------------------------------------------------------


def test_paths_are_relative_to_the_file_they_are_written_in(write, tmp_path):
    """Also when a macro of another file is part of them."""
    write(x_gguf="", d__x_gguf="", a_toml="macros.name = 'x'\n[models.m]\ngguf = '${name}.gguf'")
    write(d__b_toml="state_dir = 's'\n[models.n]\ngguf = '${name}.gguf'", d__c_toml="store.path = 't/u'")

    config = load([Path("a.toml")], Path("d"))

    assert str(tmp_path / "x.gguf") in config.models["m"].argv
    assert str(tmp_path / "d/x.gguf") in config.models["n"].argv
    assert config.state_dir == tmp_path / "d/s"
    assert config.store is not None
    assert config.store.path == tmp_path / "d/t/u"


def test_absolute_paths_stay(write, tmp_path, monkeypatch):
    """And so do those of the home, and those that are wrong."""
    monkeypatch.setenv("HOME", str(tmp_path))
    write(x_gguf="", a_toml="", d__b_toml=f"state_dir = '~/s'\n[models.n]\ngguf = '{tmp_path}/x.gguf'")
    config = load([Path("a.toml")], Path("d"))

    assert str(tmp_path / "x.gguf") in config.models["n"].argv
    assert config.state_dir == tmp_path / "s"
    write(d__b_toml="state_dir = ''\nmodels.n.gguf = 5")
    assert [line.split(",")[0] for line in mistakes([Path("a.toml")], Path("d"))] == [
        'd/b.toml:1: state_dir: found ""',
        "d/b.toml:2: models.n.gguf: found 5",
    ]


# ---- types as they are asked for --------------------------------------------------------------------

MODEL = "free: true\nmodels:\n  m:\n    command: x ${{PORT}}\n    {}\n"


@pytest.mark.parametrize(
    ("line", "attribute", "value"),
    [
        ("description: 0123", "description", "0123"),
        ("description: 1_000", "description", "1_000"),
        ("description: 2001-01-01", "description", "2001-01-01"),
        ("description: true", "description", "true"),
        ("description: on", "description", "on"),
        ("description: ~", "description", ""),
        ("aliases: [1e5, 0x10, .inf]", "aliases", ("1e5", "0x10", ".inf")),
        ("env: {A: 007, B: '5', C: no}", "env", {"A": "007", "B": "5", "C": "no"}),
        ("unlisted: yes", "unlisted", True),
        ("unlisted: Off", "unlisted", False),
        ("unlisted: TRUE", "unlisted", True),
        ("ttl: 017", "ttl", 15.0),
        ("ttl: 1e2", "ttl", 100.0),
        ("ttl: 1m", "ttl", 60.0),
        ("macros: {k: 0123}\n    description: ${k}", "description", "0123"),
        ("macros: {k: 1_0}\n    description: ${k}", "description", "10"),
        ("macros: {k: 1_0}\n    ttl: ${k}", "ttl", 10.0),
        ("macros: {k: 1_0}\n    env: {A: '${k}'}", "env", {"A": "10"}),
        ("macros: {k: yes}\n    unlisted: ${k}", "unlisted", True),
        ("concurrency_limit: 0x10", "concurrency_limit", 16),
        ("metadata: {a: 0123, b: yes}", "metadata", {"a": 83, "b": "yes"}),
    ],
)
def test_plain_scalars_are_what_their_field_asks_for(write, line, attribute, value):
    """A text is what was written, a number what that means; where any type goes, it has its own."""
    config = load(write(a_yaml=MODEL.format(line)))

    assert getattr(config.models["m"], attribute) == value


def test_secrets_are_text_too(write):
    """A key of digits keeps its zeros."""
    assert load(write(a_yaml="api_keys: [0012, 1e5]")).api_keys == ("0012", "1e5")


@pytest.mark.parametrize(
    ("line", "mistake"),
    [
        ("unlisted: 'yes'", 'unlisted: found "yes", allowed is true or false'),
        ("ttl: '5'", 'ttl: found "5"'),
        ("priority: 1.0", "priority: found 1.0"),
        ("ttl: .inf", "ttl: found inf"),
        ("ttl: yes", 'ttl: found "yes"'),
    ],
)
def test_what_no_reading_makes_right_is_a_mistake(write, line, mistake):
    """Quotes mean text, and nothing is rounded."""
    (told,) = mistakes(write(a_yaml=MODEL.format(line)))

    assert told.startswith(f"a.yaml:5: models.m.{mistake}")


def test_toml_says_which_type_it_means(write):
    """Only values of macros are read as their field asks for it."""
    assert load(write(a_toml=TOML + "description = '${n}'\n[macros]\nn = 5")).models["a"].description == "5"
    (number,) = mistakes(write(a_toml=TOML + "description = 5"))
    assert number.startswith("a.toml:3: models.a.description: found 5, allowed is text in quotes")
    (flag,) = mistakes(write(a_toml=TOML + "unlisted = 'yes'"))
    assert flag.startswith('a.toml:3: models.a.unlisted: found "yes"')


def test_a_table_of_several_files_has_the_places_of_each(write):
    """A mistake in what a later file adds is told there."""
    files = write(a_toml="[memory]\nheadroom = '1GiB'", b_toml="[memory]\nlearn = 5")

    assert mistakes(files) == ["b.toml:2: memory.learn: found 5, allowed is true or false"]
