"""From one native Document to the Config that it means: the steps, in their order.

What is in a file is read by `toml` and `yaml_source`; which files there are, by `loading`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path as FilePath

from trioswap.config.asked import as_asked
from trioswap.config.checks import check
from trioswap.config.document import Document
from trioswap.config.macros import expand_macros
from trioswap.config.mistakes import Mistakes
from trioswap.config.raw import read
from trioswap.config.resolve import resolve
from trioswap.config.schema import Config


def understand(document: Document, directory: FilePath, environ: Mapping[str, str], mistakes: Mistakes) -> Config:
    """The configuration meant by *document*; when *mistakes* has any, it must not be used.

    *directory* is what relative paths are relative to; *environ* has been filled in
    already, as far as it could be.  Looks whether `gguf` files exist.
    """
    document = as_asked(expand_macros(document, environ, mistakes))
    raw = read(document.values, mistakes)
    config = resolve(raw, directory, mistakes)
    check(config, mistakes)
    return config
