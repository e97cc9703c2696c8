"""What YAML can say and TOML cannot: null, and references that are no text.

A number out of the environment, or `yes` out of a macro, is what it is in YAML without
quotes only.  In TOML such a value has to be written out.
"""

from __future__ import annotations

from typing import Any

import attrs

from trioswap.config.document import Copying, Document
from trioswap.config.mistakes import Mistakes, Path, key_path, shown
from trioswap.errors import ConfigError


def without_nulls(native: Document) -> Document:
    """*native* with empty texts where pins of profiles are null, which is the same.

    Raises:
        ConfigError: there are others, in what is passed on as JSON.
    """
    nulls = Mistakes(native.places, native.shown)

    def change(path: Path, value: Any, text: str | None) -> tuple[Any, str | None]:
        if value is None and path[0] != "profiles":
            nulls.add(path, "found nothing, which TOML cannot say, allowed is to leave it out, or a value")
        return ("" if value is None else value), text

    changed = Document({})
    changed.values.update(Copying(native, changed, Mistakes(), change).copy(native.values, (), ()))
    if lines := nulls.lines():
        raise ConfigError(next(iter(native.places.values())).file, lines)
    return changed


def written_out(native: Document, wanted: Document, got: Document, *, keeps_texts: bool) -> tuple[Document, list[str]]:
    """*native* with values in place of those references that came to something else, and a note on each.

    *wanted* is what it means, *got* what was read from it as TOML.  What an environment
    holds may be secret: with *keeps_texts* only what is no text is written out.
    """
    notes: list[str] = []

    def mend(value: Any, meant: Any, read: Any, path: Path) -> Any:
        if path == ("macros",) or (len(path) == 3 and path[0] == "models" and path[2] == "macros"):
            return value
        if isinstance(value, dict | list) and len(value) != len(meant):
            return value  # the caller will see that it is something else
        if isinstance(value, dict) and isinstance(read, dict):
            inner = zip(value.items(), meant.items(), strict=True)
            return {key: mend(held, part, read.get(name), (*path, key)) for (key, held), (name, part) in inner}
        if isinstance(value, list) and isinstance(read, list) and len(value) == len(read):
            inner_list = enumerate(zip(value, meant, read, strict=True))
            return [mend(*parts, (*path, index)) for index, parts in inner_list]
        is_same = type(meant) is type(read) and meant == read
        if is_same or not isinstance(value, str) or "${" not in value or (keeps_texts and isinstance(meant, str)):
            return value
        notes.append(f"{key_path(path)} is {shown(meant)} now: TOML would take {value} for something else")
        return meant

    return attrs.evolve(native, values=mend(native.values, wanted.values, got.values, ())), notes
