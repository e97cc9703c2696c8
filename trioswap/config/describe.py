"""The page about the configuration, made from what the raw classes declare.

`python -m trioswap.config.describe > docs/configuration.md` writes it; a test holds the two
together.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from typing import Any, Final, get_args, get_origin

from trioswap.config.keys import Key, keys_of
from trioswap.config.kinds import (
    Amount,
    Capacity,
    Command,
    Count,
    Duration,
    Factor,
    Json,
    Need,
    Number,
    Patience,
    Secret,
    Size,
    Whole,
)
from trioswap.config.later import NOT_YET
from trioswap.config.raw import RawConfig

_WORDS: Final[dict[Any, str]] = {
    str: "text",
    str | None: "text",
    Secret: "text",
    bool: "true or false",
    int: "whole number",
    Count: "whole number from 1 up",
    Whole: "whole number from 0 up",
    Number: "number from 0 up",
    Factor: "number above 0",
    Duration: "duration",
    Patience: "duration",
    Size: "size",
    Amount: "size",
    Capacity: 'size or `"auto"`',
    Need: "size, or table of sizes",
    Command: "text, or array of texts",
    Json: "any value",
    Any: "text, number, true or false",
}

_INTRODUCTION: Final = """\
# Configuration

Every key of a configuration file. [configs/full.toml](../configs/full.toml) shows them at work.

- A file that ends in `.toml` is read as TOML, with the keys in the first column. The YAML files of llama-swap have
  their own spelling of the same keys, in the second column where it differs.
- A *duration* is a number of seconds, or text such as `"90s"`, `"1h30m"`, `"500ms"`, `"2d"`.
- A *size* is a whole number of bytes, or text such as `"18GiB"`, `"512MiB"` (1024) or `"2GB"` (1000).
- NAME stands for a name that you choose.
- Unknown keys, and values of the wrong type, are mistakes.
- *Not yet* marks what is read and judged, but not acted on by this version.

This page is made from the source: `python -m trioswap.config.describe > docs/configuration.md`.
"""
_HEAD: Final = "| key | in YAML | type | default | unit | meaning |\n|---|---|---|---|---|---|\n"


def markdown() -> str:
    """The page `docs/configuration.md`."""
    return "\n".join([_INTRODUCTION, *_sections()])


def _sections() -> Iterator[str]:
    """A heading and a table for each raw class, where it first occurs."""
    homes = _homes()
    for table, path in homes.items():
        rows = "".join(_row(key, _join(path, key.name), homes) for key in keys_of(table).values())
        yield f"## {_heading(path)}\n\n{_HEAD}{rows}"


def _homes() -> dict[type, str]:
    """The path at which each raw class first occurs, those within a table right behind it."""
    homes: dict[type, str] = {}

    def visit(table: type, path: str) -> None:
        homes[table] = path
        for key in keys_of(table).values():
            if key.table is not None and key.table not in homes:
                visit(key.table, _join(path, key.name) + (".NAME" if key.is_by_name else ""))

    visit(RawConfig, "")
    return homes


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _heading(path: str) -> str:
    return f"`[{path}]`" if path else "The file"


def _row(key: Key, path: str, homes: dict[type, str]) -> str:
    yaml = "" if key.yaml == key.name else f"`{key.yaml}`"
    cells = (f"`{key.name}`", yaml, _type(key, homes), _default(key), key.unit, _meaning(key, path))
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"


def _type(key: Key, homes: dict[type, str]) -> str:
    if key.table is None:
        return _words(key.type)
    anchor = re.sub(r"[^a-z0-9_ -]", "", _heading(homes[key.table]).lower()).replace(" ", "-")
    return f"[{'tables by name' if key.is_by_name else 'table'}](#{anchor})"


def _words(type_: Any) -> str:
    if get_origin(type_) is list:
        return f"array: {_words(get_args(type_)[0])}"
    if get_origin(type_) is dict:
        return f"table: name = {_words(get_args(type_)[1])}"
    return _WORDS[type_]


def _default(key: Key) -> str:
    if key.required:
        return "needed"
    if is_literal(key.default):
        return f"`{key.default}`"
    return key.default or ("" if key.table else "none")


def is_literal(default: str) -> bool:
    """Whether the *default* of a key is the value itself, as TOML, and not words about it."""
    try:
        tomllib.loads(f"x = {default}")
    except tomllib.TOMLDecodeError:
        return False
    return True


def _meaning(key: Key, path: str) -> str:
    choices = [f'`"{choice}"`' for choice in key.choices if choice]
    told = all(choice in key.text for choice in choices)  # with what they mean
    each = "Each is one" if get_origin(key.type) is list else "One"
    later = " *Not yet.*" if path.replace("NAME", "*") in NOT_YET else ""
    return key.text + ("" if told else f" {each} of {', '.join(choices)}.") + later


if __name__ == "__main__":
    sys.stdout.write(markdown())
