"""Reads native TOML texts: into Documents, and alone or as a file into a Config.

What the values mean is found out in `pipeline`; several files, and YAML, are the job of
`loading`.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

from trioswap.config.document import Document, Unreadable, read_file
from trioswap.config.environment import fill_environment
from trioswap.config.mistakes import Mistakes
from trioswap.config.pipeline import understand
from trioswap.config.schema import Config
from trioswap.config.toml_places import find_places
from trioswap.errors import ConfigError

_NOTHING: Final[Mapping[str, str]] = MappingProxyType({})
# How tomllib ends its messages; it keeps the numbers nowhere else before Python 3.14.
_PLACE: Final = re.compile(
    r"(?P<what>.*) \(at (?:line (?P<line>\d+), column (?P<column>\d+)|end of document)\)", re.DOTALL
)


def load(path: str | Path, environ: Mapping[str, str] = _NOTHING) -> Config:
    """The configuration in the TOML file *path*; relative paths in it are relative to its directory.

    *environ* is what `${env.NAME}` stands for.

    Raises:
        ConfigError: the file cannot be read, is not UTF-8, or has mistakes.
    """
    path = Path(path)
    try:
        text = read_file(path)
    except Unreadable as exc:
        raise ConfigError(str(path), [exc.line_of_its_own()]) from exc
    return loads(text, str(path), directory=path.parent, environ=environ)


def loads(
    text: str, source: str = "config", *, directory: Path | None = None, environ: Mapping[str, str] = _NOTHING
) -> Config:
    """The configuration in the TOML document *text*.

    *source* is what errors call it; *directory* is what relative paths in it are relative
    to, the current directory unless given.  Looks whether `gguf` files exist.

    Raises:
        ConfigError: it has mistakes; all of them are told, one line each.
    """
    mistakes = Mistakes()
    try:
        document = parse_toml(text, source)
    except Unreadable as exc:
        raise ConfigError(source, [exc.line_of_its_own()]) from exc
    document = fill_environment(document, environ, mistakes)
    config = understand(document, directory or Path(), environ, mistakes)
    if lines := mistakes.lines():
        raise ConfigError(source, lines)
    return config


def parse_toml(text: str, file: str) -> Document:
    """The document that *text* is; *file* is what places call it.

    Raises:
        Unreadable: it is no TOML, or beyond the bounds of `document`.
    """
    places = find_places(text, file)
    try:
        return Document(tomllib.loads(text), places)
    except ValueError as exc:  # mostly TOMLDecodeError; Python itself refuses integers of thousands of digits
        raise _unreadable(str(exc), text) from exc


def _unreadable(message: str, text: str) -> Unreadable:
    """The *message* of tomllib, with its place apart."""
    match = _PLACE.fullmatch(message)
    if match is None:
        return Unreadable("found a number of more digits than Python reads (4300), allowed are fewer")
    line, column = match["line"], match["column"]
    if line is None:  # at the end of the document
        return Unreadable(match["what"], text.count("\n") + 1, len(text) - text.rfind("\n"))
    return Unreadable(match["what"], int(line), int(column))
