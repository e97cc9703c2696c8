"""Files that nobody would write: whatever they hold, they are a configuration or a list of mistakes.

Known files are mutated, and documents are made up along the keys that there are; both
readers, and the converter behind them, must never raise anything of their own making.  Each
file has a number, from which it can be made again: `pytest -m fuzz --fuzz-seed N --fuzz-count 1`.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import attrs
import pytest
import tomli_w

from trioswap.config import coexist, llamaswap
from trioswap.config.keys import Key, keys_of
from trioswap.config.kinds import (
    Amount,
    Capacity,
    Count,
    Duration,
    Factor,
    Json,
    Number,
    Patience,
    Secret,
    Size,
    Whole,
)
from trioswap.config.llamaswap import translate
from trioswap.config.loading import load_sources
from trioswap.config.macros import expand_macros
from trioswap.config.mistakes import Mistakes
from trioswap.config.raw import RawConfig
from trioswap.convert import TOML, YAML, convert
from trioswap.errors import ConfigError

pytestmark = pytest.mark.fuzz

ROOT = Path(__file__).parent.parent
KNOWN = {path: path.read_bytes() for path in sorted((ROOT / "configs").glob("*.toml"))}
KNOWN |= {path: path.read_bytes() for path in sorted((ROOT / "tests" / "data").glob("*.yaml"))}
LARGEST = 64 * 1024  # bytes of one file
ENVIRON = {"HOME": "/home/x", "EXAMPLE_KEY": "k", "EXAMPLE_HOME": "${bin}", "EMPTY": "", "BAD": "a\nb"}

# What means something somewhere, or nearly does.
PIECES = [
    *"\"'#:-[]{}&*!|>%@`,?=\\\t\r\n\0. $+~",
    *("${", "}", "${PORT}", "${PID}", "${MODEL_ID}", "${env.HOME}", "${env.", "${env.BAD}", "${env.EMPTY}", "${x}"),
    *("<<: *usual", "&usual ", "*usual", "---\n", "...\n", "- ", "!!int ", "!!str ", "!!binary ", "? ", "%YAML 9\n"),
    *("null", "~", "true", "yes", "0123", "0o17", "1_000", ".inf", "-.nan", "1e999", "-1", "9" * 400, "2024-01-01"),
    *("'''", '"""', "[[models]]\n", "[models.a]\n", "models:\n", "groups: {}\n", "matrix.sets.s = '+s'\n", '"\\u0000"'),
    *("\ufeff", "\u0085", "\u2028", "\U0001f600", "\ue000", "é", "18GiB", "1h30m", "(a|b)*", "a & (b | +s)", "[" * 120),
]
NAMES = ["a", "b", "c", "a:x", "far/m", "${MODEL_ID}", "ram", "gpu0", "é"]
WRONG: list[Any] = [
    *(None, True, False, 0, -1, 2**63, 2**70, -0.0, 1e300, float("inf"), float("nan")),
    *([], {}, [[]], {"a": {}}, "", " ", "${x}", "${y}", "${env.BAD}", "+s", "((a", "'open", "\0", "\ud800", "(", "#"),
    *("x" * 70, "a\nb", "0:0", "1e9s"),
]
RIGHT: dict[Any, list[Any]] = {
    str: ["a", "b", "x", "${x}", "${env.HOME}", "/health", "none", "http://127.0.0.1:9000", "0.0.0.0:8080", "~/x"],
    bool: [True, False],
    int: [1, 5800, -3],
    Duration: [0, 1.5, "90s", "1h30m"],
    Patience: [1, "2m"],
    Size: [1, "2GiB"],
    Amount: [0, "2GiB"],
    Capacity: ["auto", "24GiB"],
    Number: [0, 0.5],
    Factor: [2, 0.25],
    Count: [1, 7],
    Whole: [0, 8192],
    Secret: ["k", "${env.EXAMPLE_KEY}"],
    Json: [1, "${x}", True, [1, "a"], {"b": {"c": 0.5}}],
    Any: ["x ${PORT}", 4096, 0.7, "${env.HOME}/x"],
}
RIGHT_ONES: dict[str, list[Any]] = {
    "endpoints": [["/v1/*"], []],
    "origins": [["*"], ["https://a", "APP://b:443"]],
    "trusted_proxies": [["::1", "10.0.0.0/8"], []],
    "read_only": [False],
    "listen": ["unix:/x/y", "0.0.0.0:8080"],
}
COMMANDS = ["x ${PORT}", "x ${PORT} ${x}", "x ${PORT} 'a b'\n# c\n", ["x", "${PORT}"]]
SETS = ["a", "a & b", "a | (b & c)", "+s | b"]


@attrs.frozen
class Example:
    """A file."""

    suffix: str
    content: bytes


# ---- how files are made -----------------------------------------------------------------------------


def make(seed: int) -> Example:
    """The file of this number."""
    rng = random.Random(seed)
    if rng.random() < 0.4:
        example = made_up(rng)
        return mutated(example, rng, rng.choice([0, 0, 1, 2]))
    path = rng.choice([*KNOWN])
    return mutated(Example(path.suffix, KNOWN[path]), rng, rng.choice([1, 1, 2, 3, 8, 30]))


def mutated(example: Example, rng: random.Random, times: int) -> Example:
    """*example* after so many changes, and no larger than `LARGEST`."""
    content = example.content
    for _ in range(times):
        content = rng.choice([cut, repeat, insert, exchange, reindent, flip])(content, rng)[:LARGEST]
    return attrs.evolve(example, content=content)


def span(content: bytes, rng: random.Random, longest: int = 200) -> slice:
    begin = rng.randrange(len(content) + 1)
    return slice(begin, begin + rng.randrange(1, longest))


def cut(content: bytes, rng: random.Random) -> bytes:
    gone = span(content, rng)
    return content[: gone.start] + content[gone.stop :]


def repeat(content: bytes, rng: random.Random) -> bytes:
    """A piece comes again elsewhere."""
    at = span(content, rng).start
    return content[:at] + content[span(content, rng)] + content[at:]


def insert(content: bytes, rng: random.Random) -> bytes:
    """A piece that means something comes in."""
    at = span(content, rng)
    piece = rng.choice(PIECES).encode() * rng.choice([1, 1, 1, 2, 50])
    return content[: at.start] + piece + content[at.start if rng.random() < 0.5 else at.stop :]


def exchange(content: bytes, rng: random.Random) -> bytes:
    """A line takes the place of another."""
    lines = content.splitlines(keepends=True) or [b""]
    lines[rng.randrange(len(lines))] = rng.choice(lines)
    return b"".join(lines)


def reindent(content: bytes, rng: random.Random) -> bytes:
    """A line moves to the side."""
    lines = content.splitlines(keepends=True) or [b""]
    index = rng.randrange(len(lines))
    lines[index] = b" " * rng.randrange(9) + lines[index].lstrip(b" ")
    return b"".join(lines)


def flip(content: bytes, rng: random.Random) -> bytes:
    """One byte becomes another."""
    at = span(content, rng).start
    return content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :]


def made_up(rng: random.Random) -> Example:
    """A document with keys that there are, and values that may be right."""
    is_toml = rng.random() < 0.5
    values = table(RawConfig, rng, is_toml=is_toml)
    if is_toml:
        return Example(".toml", tomli_w.dumps(sayable(values)).encode(errors="replace")[:LARGEST])
    return Example(".yaml", json.dumps(values, indent=rng.choice([None, 1])).encode()[:LARGEST])  # JSON is YAML


def table(raw: type, rng: random.Random, *, is_toml: bool) -> dict[str, Any]:
    keys = list(keys_of(raw).values())
    chosen = rng.sample(keys, rng.randrange(min(len(keys), 8)))
    chosen += [key for key in keys if key.required or key.name in ("cmd", "key", "models", "macros")]
    return {
        key.name if is_toml else key.yaml: value(key, rng, is_toml=is_toml)
        for key in chosen
        if key.name not in ("gguf", "hash")
    }


def value(key: Key, rng: random.Random, *, is_toml: bool) -> Any:
    """One for *key*; wrong now and then, as each of dozens in a file would be too often."""
    if rng.random() < 0.01:
        return rng.choice(WRONG)
    if key.table is not None and not key.is_by_name:
        return table(key.table, rng, is_toml=is_toml)
    names = rng.sample(NAMES, rng.randrange(1, 4))
    if key.table is not None:
        return {name: table(key.table, rng, is_toml=is_toml) for name in names}
    if key.name == "macros":
        return {"x": rng.choice(RIGHT[Any]), "y": "${x}"}
    if key.name in ("cmd", "cmd_stop"):
        return rng.choice(COMMANDS)
    if key.name in RIGHT_ONES:
        return rng.choice(RIGHT_ONES[key.name])
    if key.name == "key":
        return f"k{rng.randrange(100)}"
    if key.name in ("sets", "members", "targets"):
        return {"s": rng.choice(SETS[:3]), "t": rng.choice(SETS)} if key.name == "sets" else rng.sample("abc", 2)
    return plain(key.type, key.choices, rng)


def plain(type_: Any, choices: tuple[str, ...], rng: random.Random) -> Any:
    """A value of *type_*, which is no table of ours."""
    if isinstance(type_, UnionType) or get_origin(type_) is Union:
        return plain(rng.choice([inner for inner in get_args(type_) if inner is not NoneType]), choices, rng)
    if get_origin(type_) is list:
        return [plain(get_args(type_)[0], choices, rng) for _ in range(rng.randrange(3))]
    if get_origin(type_) is dict:
        return {name: plain(get_args(type_)[1], choices, rng) for name in rng.sample(NAMES[:4], rng.randrange(3))}
    return rng.choice(choices or RIGHT.get(type_, ["auto"]))


def sayable(values: Any) -> Any:
    """*values* without what TOML cannot say."""
    if isinstance(values, dict):
        return {name: sayable(inner) for name, inner in values.items() if inner is not None}
    if isinstance(values, list):
        return [sayable(inner) for inner in values if inner is not None]
    return values


# ---- what must hold -----------------------------------------------------------------------------------


def outcome(example: Example, directory: Path) -> str:
    """What became of the *example*; raises what must never come out."""
    file = directory / f"fuzz{example.suffix}"
    file.write_bytes(example.content)
    try:
        load_sources([file], None, ENVIRON, translate)
    except ConfigError as exc:
        check_lines(exc.mistakes, file)
        lenient(file)
        return "refused"
    try:
        converted = convert(file, YAML if example.suffix == ".toml" else TOML, ENVIRON)
    except ConfigError:
        return "loaded"
    assert isinstance(converted.text, str)
    return "converted"


def check_lines(lines: Sequence[str], file: Path) -> None:
    """Each is about the file, and one line that a screen can hold."""
    assert lines
    for line in lines:
        assert line.startswith(f"{file}:"), line
        assert line.isprintable(), line
        assert len(line) < 2000, line


def lenient(file: Path) -> None:
    """The same with unknown keys left out; they are told of apart."""
    unknown = Mistakes()
    try:
        load_sources([file], None, ENVIRON, partial(translate, unknown=unknown))
    except ConfigError as exc:
        check_lines(exc.mistakes, file)
    for line in unknown.lines():
        check_lines([line], file)


def fuzz(first: int, count: int, directory: Path) -> Counter[str]:
    """How many of the files from the number *first* on came to what."""
    outcomes: Counter[str] = Counter()
    for seed in range(first, first + count):
        example = make(seed)
        assert len(example.content) <= LARGEST
        try:
            outcomes[outcome(example, directory)] += 1
        except BaseException as exc:
            exc.add_note(f"replay: pytest -m fuzz --fuzz-seed {seed} --fuzz-count 1")
            raise
    return outcomes


def test_whatever_a_file_holds(request, capsys, tmp_path):
    """It loads, or each of its mistakes is one line with the file before it."""
    first = request.config.getoption("--fuzz-seed", default=0)
    count = request.config.getoption("--fuzz-count", default=1000)
    outcomes = fuzz(first, count, tmp_path)
    with capsys.disabled():
        print(f"\n{count} files from seed {first}: {dict(outcomes.most_common())}")

    assert sum(outcomes.values()) == count


def test_files_of_all_outcomes_are_made(tmp_path):
    """A fuzzer whose files are all refused for their syntax would look at the readers' doors only."""
    assert fuzz(0, 100, tmp_path).keys() >= {"refused", "converted"}


def test_a_number_makes_the_same_file_again():
    """To the last byte."""
    assert [make(seed) for seed in range(20)] == [make(seed) for seed in range(20)]


def macros_are_expected(monkeypatch) -> None:
    """A file without macros is not thought of."""

    def expand(document, environ, mistakes):
        assert document.values["macros"] is not mistakes
        return expand_macros(document, environ, mistakes)

    monkeypatch.setattr(llamaswap, "expand_macros", expand)


def groups_are_expected(monkeypatch) -> None:
    """Nor that a model may be in no group when it is asked who excludes whom."""
    monkeypatch.setattr(coexist.Coexistence, "obstacle", lambda self, models: self.group_of[models[0]].name and None)


@pytest.mark.parametrize("bug", [macros_are_expected, groups_are_expected])
def test_a_seeded_bug_is_caught(bug, monkeypatch, tmp_path):
    """Some file among the first hundred runs into it, and the report says how to make that again."""
    bug(monkeypatch)

    with pytest.raises(LookupError) as caught:
        fuzz(0, 100, tmp_path)
    assert any("--fuzz-seed" in note for note in caught.value.__notes__)
