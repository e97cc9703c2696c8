"""Reads native TOML files: from bytes to a frozen Config, or to all mistakes at once.

The steps are `raw` (shapes), `resolve` and `model` (meaning), `checks` (what must hold
between the values); this module reads the file and its syntax, and runs them.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any, Final

from trioswap.config.checks import check
from trioswap.config.mistakes import Mistakes
from trioswap.config.raw import read
from trioswap.config.resolve import resolve
from trioswap.config.schema import Config
from trioswap.errors import ConfigError

# How tomllib ends its messages; it keeps the numbers nowhere else before Python 3.14.
_PLACE: Final = re.compile(
    r"(?P<what>.*) \(at (?:line (?P<line>\d+), column (?P<column>\d+)|end of document)\)", re.DOTALL
)


def load(path: str | Path) -> Config:
    """The configuration in the file *path*; relative paths in it are relative to its directory.

    Raises:
        ConfigError: the file cannot be read, is not UTF-8, or has mistakes.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as exc:
        raise ConfigError(str(path), [f"cannot read the file: {exc.strerror}"]) from exc
    try:
        text = data.decode()
    except UnicodeDecodeError as exc:
        line = data.count(b"\n", 0, exc.start) + 1
        raise ConfigError(str(path), [f"line {line}: found byte 0x{data[exc.start]:02x}, allowed is UTF-8"]) from exc
    return loads(text, str(path), directory=path.parent)


def loads(text: str, source: str = "config", *, directory: Path | None = None) -> Config:
    """The configuration in the TOML document *text*.

    *source* is what errors call it; *directory* is what relative paths in it are relative
    to, the current directory unless given.  Looks whether `gguf` files exist.

    Raises:
        ConfigError: it has mistakes; all of them are told, one line each.
    """
    mistakes = Mistakes()
    raw = read(_parse(text, source), mistakes)
    config = resolve(raw, directory or Path(), mistakes)
    check(config, mistakes)
    if lines := mistakes.lines():
        raise ConfigError(source, lines)
    return config


def _parse(text: str, source: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except RecursionError as exc:
        raise ConfigError(source, ["found arrays or tables nested too deeply to be read"]) from exc
    except ValueError as exc:  # mostly TOMLDecodeError; Python itself refuses integers of thousands of digits
        raise ConfigError(source, [_syntax_mistake(str(exc), text)]) from exc


def _syntax_mistake(message: str, text: str) -> str:
    """The *message* of tomllib with its place first, as in all our lines."""
    match = _PLACE.fullmatch(message)
    if match is None:
        return "found a number of more digits than Python reads (4300), allowed are fewer"
    line, column = match["line"], match["column"]
    if line is None:  # at the end of the document
        line, column = str(text.count("\n") + 1), str(len(text) - text.rfind("\n"))
    return f"line {line}, column {column}: {match['what']}"
