"""From files to one Config: which files there are, and how several of them come together.

`*.toml` files are native, `*.yaml` and `*.yml` those of llama-swap.  The latter are merged
with each other before they are translated, because some of their keys speak of what another
file defines; so among the native ones they stand together, where the first of them stands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Final

import attrs

from trioswap.config.document import Document, Unreadable, read_file
from trioswap.config.environment import fill_environment
from trioswap.config.merge import IDENTITY, YAML_IDENTITY, merge
from trioswap.config.mistakes import Mistakes
from trioswap.config.pipeline import understand
from trioswap.config.schema import Config
from trioswap.config.toml import parse_toml
from trioswap.config.yaml_source import parse_yaml
from trioswap.errors import ConfigError, Misuse

Translate = Callable[[Document, Mistakes], Document]
"""Makes a native document of what llama-swap's files say; its mistakes are about native paths."""

_NATIVE: Final = (".toml",)
_YAML: Final = (".yaml", ".yml")


def load_sources(
    sources: Sequence[FilePath],
    directory: FilePath | None,
    environ: Mapping[str, str],
    translate: Translate,
    keep: Config | None = None,
) -> Config:
    """The configuration in the files *sources* and in those of *directory*, together.

    *environ* is what `${env.NAME}` stands for.  A relative path is relative to the file in
    which it is written.  In the place of *keep*, models keep the ports they have there.

    Raises:
        Misuse: no file and no directory is named.
        ConfigError: files cannot be read, or have mistakes; all that can be found are told, each with its place.
    """
    files = find_sources(sources, directory)
    label = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    documents = _read_all(files, environ, label)
    mistakes = Mistakes()
    native = _together(documents, translate, mistakes, label)
    mistakes.places, mistakes.shown = native.places, native.shown
    main = files[0].parent
    elsewhere = {str(file): file.parent for file in files if file.parent != main}
    config = understand(native, main, environ, mistakes, elsewhere=elsewhere, keep=keep)
    if lines := mistakes.lines():
        raise ConfigError(label, lines)
    return config


# ---- which files ----------------------------------------------------------------------------


def find_sources(sources: Sequence[FilePath], directory: FilePath | None) -> list[FilePath]:
    """The *sources* in their order, then the configuration files in *directory* in the order of their names.

    Its own directories are not looked into, and hidden files are left out: editors leave
    theirs there.

    Raises:
        Misuse: there is neither of the two.
        ConfigError: the directory cannot be read, or has no such file and there are no sources; or one is named twice.
    """
    if not sources and directory is None:
        raise Misuse("no configuration is named; give --config FILE, or --config-dir DIRECTORY, or both")
    files = [*sources, *([] if directory is None else _files_in(directory))]
    if not files:
        allowed = "allowed is at least one, or --config FILE beside it"
        raise ConfigError(str(directory), [f"found no file *.toml, *.yaml or *.yml, {allowed}"])
    if twice := _twice(files):
        what = "found it twice among the files to read, by --config or in --config-dir, allowed is once"
        raise ConfigError(str(twice[0]), [f"{file}: {what}" for file in twice])
    return files


def _files_in(directory: FilePath) -> list[FilePath]:
    try:
        return sorted(
            file
            for file in directory.iterdir()
            if file.suffix in (*_NATIVE, *_YAML) and not file.name.startswith(".") and not file.is_dir()
        )
    except OSError as exc:
        raise ConfigError(str(directory), [f"cannot read the directory: {exc.strerror}"]) from exc


def _twice(files: Iterable[FilePath]) -> list[FilePath]:
    """Those of *files* that are a file before them."""
    seen: set[FilePath] = set()
    twice = []
    for file in files:
        try:
            real = file.resolve()
        except (OSError, RuntimeError):  # a ring of links; reading it says so
            real = file.absolute()
        if real in seen:
            twice.append(file)
        seen.add(real)
    return twice


# ---- what they say --------------------------------------------------------------------------


def _read_all(files: Iterable[FilePath], environ: Mapping[str, str], label: str) -> list[tuple[FilePath, Document]]:
    """Each file with its document, environment filled in.

    Raises:
        ConfigError: with the mistakes of all files; the rest could only guess what was meant.
    """
    documents: list[tuple[FilePath, Document]] = []
    lines: list[str] = []
    for file in files:
        mistakes = Mistakes()
        try:
            document = _parse(file, mistakes)
        except Unreadable as exc:
            lines.append(exc.line_about(str(file)))
            continue
        document = fill_environment(document, environ, mistakes)
        mistakes.places = document.places
        documents.append((file, document))
        lines += mistakes.lines()
    if lines:
        raise ConfigError(label, lines)
    return documents


def _parse(file: FilePath, mistakes: Mistakes) -> Document:
    if file.suffix in _NATIVE:
        return parse_toml(read_file(file), str(file))
    if file.suffix in _YAML:
        return parse_yaml(read_file(file), str(file), mistakes)
    raise Unreadable("found a file of another kind, allowed are *.toml, and *.yaml or *.yml of llama-swap")


def _together(
    documents: Sequence[tuple[FilePath, Document]], translate: Translate, mistakes: Mistakes, label: str
) -> Document:
    """One native document; *mistakes* hears of what the files contradict each other in.

    Raises:
        ConfigError: the files of llama-swap contradict each other.
    """
    foreign = [document for file, document in documents if file.suffix in _YAML]
    parts = [document for file, document in documents if file.suffix in _NATIVE]
    if foreign:
        own = Mistakes()
        merged = merge(foreign, YAML_IDENTITY, own)
        own.places = merged.places
        if lines := own.lines():
            raise ConfigError(label, lines)
        translated = _yielding(translate(merged, mistakes), parts)
        before = next(index for index, (file, _) in enumerate(documents) if file.suffix in _YAML)
        parts.insert(before, translated)
    together = merge(parts, IDENTITY, mistakes)
    # What was left out, because it is not known, has a place all the same.
    places = {path: place for part in parts for path, place in part.places.items()} | {**together.places}
    shown = {path: name for part in parts for path, name in part.shown.items()} | {**together.shown}
    return attrs.evolve(together, places=places, shown=shown)


def _yielding(translated: Document, native: Iterable[Document]) -> Document:
    """*translated* without the table of groups that nobody has written, where a native file says what rules.

    llama-swap's default, one model at a time, is such a table: it has no place.
    """
    is_default = "groups" in translated.values and ("groups",) not in translated.places
    if is_default and any({"groups", "matrix", "memory"} & document.values.keys() for document in native):
        del translated.values["groups"]
    return translated
