"""Configurations from one language into the other: llama-swap's YAML and native TOML.

Macros and `${env.NAME}` stay as they are.  What is written must mean what was read, or else
nothing is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any, Final

import attrs

from trioswap.config.asked import as_asked
from trioswap.config.document import Document, Unreadable, read_file
from trioswap.config.environment import fill_environment
from trioswap.config.keys import keys_of
from trioswap.config.llamaswap import SETTINGS, translate
from trioswap.config.macros import expand_macros
from trioswap.config.mistakes import Mistakes, key_path
from trioswap.config.pipeline import understand
from trioswap.config.raw import RawConfig
from trioswap.config.schema import Config
from trioswap.config.toml import parse_toml
from trioswap.config.yaml_source import parse_yaml
from trioswap.convert.comments import toml_comments, transfer, yaml_comments
from trioswap.convert.limits import without_nulls, written_out
from trioswap.convert.spelling import spell
from trioswap.convert.toml_text import write_toml
from trioswap.convert.yaml_text import write_yaml
from trioswap.errors import ConfigError, Misuse

TOML: Final = "toml"
YAML: Final = "yaml"
LANGUAGES: Final = {".toml": TOML, ".yaml": YAML, ".yml": YAML}
_FIELDS: Final = [field.name for field in attrs.fields(Config) if field.eq]


@attrs.frozen
class Converted:
    """What came of a configuration."""

    text: str
    notes: tuple[str, ...]
    """What is otherwise than before, for people."""


def convert(file: FilePath, language: str, environ: Mapping[str, str]) -> Converted:
    """The configuration in *file* in *language*, `TOML` or `YAML`, with its comments.

    *environ* is what `${env.NAME}` stands for when the results are compared.  Looks whether
    `gguf` files exist.

    Raises:
        Misuse: the file is of another kind, or in that language already.
        ConfigError: it cannot be read, has mistakes, or says what the other language cannot.
    """
    source = LANGUAGES.get(file.suffix)
    if source is None:
        raise Misuse(f"{file}: found a file of another kind, allowed are *.toml, *.yaml and *.yml")
    if source == language:
        raise Misuse(f"{file}: found {language.upper()} already, allowed is what is in another language")
    try:
        text = read_file(file)
        reading = _Reading.of(text, source, file, environ)
    except Unreadable as exc:
        raise ConfigError(str(file), [exc.line_of_its_own()]) from exc
    converted = _to_toml(reading, text, environ) if language == TOML else _to_yaml(reading, text)
    _compare(reading, converted, file, language, environ)
    return converted


@attrs.frozen(eq=False)
class _Reading:
    """A text, from what is written to what it means."""

    source: Document
    """In its own language."""
    native: Document
    """With macros and references to the environment."""
    meaning: Document
    """With both filled in."""
    config: Config

    @classmethod
    def of(cls, text: str, language: str, file: FilePath, environ: Mapping[str, str]) -> _Reading:
        """The *text* in *language*, which is that of *file*.

        Raises:
            ConfigError: it has mistakes.
        """
        mistakes, again = Mistakes(), Mistakes()
        source = parse_toml(text, str(file)) if language == TOML else parse_yaml(text, str(file), mistakes)
        filled = fill_environment(source, environ, mistakes)
        filled = filled if language == TOML else translate(filled, mistakes)
        mistakes.places, mistakes.shown = filled.places, filled.shown
        config = understand(filled, file.parent, environ, mistakes)
        native = as_asked(source if language == TOML else translate(source, again))
        again.places, again.shown = native.places, native.shown
        if lines := mistakes.lines() or again.lines():
            raise ConfigError(str(file), lines)
        return cls(source, native, as_asked(expand_macros(filled, environ, mistakes)), config)


def _to_toml(reading: _Reading, text: str, environ: Mapping[str, str]) -> Converted:
    native, notes = without_nulls(reading.native), _left_out(reading)
    document = parse_toml(write_toml(native.values, {}), "")
    got = as_asked(expand_macros(fill_environment(document, environ, Mistakes()), environ, Mistakes()))
    native, changes = written_out(native, reading.meaning, got, keeps_texts="${env." in text)
    comments, astray = transfer(yaml_comments(text, reading.source), reading.source, native)
    return Converted(write_toml(native.values, comments), (*notes, *changes, *_about(astray)))


def _to_yaml(reading: _Reading, text: str) -> Converted:
    spelled = spell(reading.native, reading.meaning)
    comments, astray = transfer(toml_comments(text, reading.source), reading.source, spelled)
    return Converted(write_yaml(spelled.values, comments), _about(astray))


def _about(astray: int) -> tuple[str, ...]:
    """The note about comments without their keys."""
    what = "1 line of comments is" if astray == 1 else f"{astray} lines of comments are"
    return (f"{what} about keys that are not there any more, and stand nearby",) if astray else ()


def _left_out(reading: _Reading) -> list[str]:
    """What a YAML file holds without meaning it."""
    known = {key.yaml for key in keys_of(RawConfig).values()} | {"routing"}
    notes = [
        f"{key_path((name,))} is left out: what others take from it is written where they are"
        for name in reading.source.values
        if name not in known
    ]
    settings: Any = reading.source.values
    for part in SETTINGS:
        settings = (settings or {}).get(part)
    other = [
        name for name, value in (settings or {}).items() if value is not None and name not in reading.native.values
    ]
    why = "is left out: routing.router.use says that it does not count"
    return [*notes, *(f"{key_path((*SETTINGS, name))} {why}" for name in other)]


def _compare(before: _Reading, converted: Converted, file: FilePath, language: str, environ: Mapping[str, str]) -> None:
    """What is written must mean what was read.

    Raises:
        ConfigError: it does not, because the other language has no words for it.
    """
    try:
        after = _Reading.of(converted.text, language, file, environ)
        wrong = [name for name in _FIELDS if getattr(after.config, name) != getattr(before.config, name)]
    except ConfigError as exc:
        wrong = [line.removeprefix(f"{file}:").partition(": ")[2] for line in exc.mistakes]
    if wrong:
        text = f"found what {language.upper()} cannot say, so nothing is converted, allowed is what both can say"
        raise ConfigError(str(file), [f"{text} ({line})" for line in wrong])
