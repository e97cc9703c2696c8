"""From one native Document to the Config that it means: the steps, in their order.

What is in a file is read by `toml` and `yaml_source`; which files there are, by `loading`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path as FilePath
from types import MappingProxyType
from typing import Any, Final

from trioswap.config.asked import as_asked
from trioswap.config.checks import check
from trioswap.config.document import Copying, Document
from trioswap.config.macros import expand_macros
from trioswap.config.mistakes import Mistakes, Path
from trioswap.config.raw import read
from trioswap.config.resolve import resolve
from trioswap.config.schema import Config

_NOWHERE: Final[Mapping[str, FilePath]] = MappingProxyType({})


def understand(
    document: Document,
    directory: FilePath,
    environ: Mapping[str, str],
    mistakes: Mistakes,
    *,
    elsewhere: Mapping[str, FilePath] = _NOWHERE,
    keep: Config | None = None,
) -> Config:
    """The configuration meant by *document*; when *mistakes* has any, it must not be used.

    *directory* is what relative paths are relative to, unless the place of the path is in
    one of the files that *elsewhere* gives another directory.  *environ* has been filled in
    already, as far as it could be.  In the place of *keep*, models keep the ports they have there.
    Looks whether `gguf` files exist.
    """
    document = as_asked(expand_macros(document, environ, mistakes))
    if elsewhere:
        document = _anchored(document, elsewhere)
    raw = read(document.values, mistakes)
    config = resolve(raw, directory, mistakes, keep)
    check(config, mistakes)
    return config


def _anchored(document: Document, directories: Mapping[str, FilePath]) -> Document:
    """*document* with the relative paths of files in *directories* made absolute."""

    def change(path: Path, value: Any, text: str | None) -> tuple[Any, str | None]:
        place = document.places.get(path)
        match path:
            case ("state_dir",) | ("store", "path") | ("tls", "cert_file" | "key_file") | ("models", _, "gguf"):
                is_relative = isinstance(value, str) and value and not value.startswith("~")
                if is_relative and place is not None and place.file in directories:
                    # An absolute path stays what it is when something is put before it.
                    return str((directories[place.file] / value).absolute()), text
        return value, text

    anchored = Document({}, {})
    copying = Copying(document, anchored, Mistakes(), change)  # no key changes, so no mistakes
    anchored.values.update(copying.copy(document.values, (), ()))
    return anchored
