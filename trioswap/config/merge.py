"""Several documents into one, by llama-swap's rules (core reference 1.2).

Tables merge key by key, arrays follow each other, a scalar may be said again but not
otherwise, and null yields to everything.  In some tables each key belongs to one file.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Final

import attrs

from trioswap.config.document import Copying, Document
from trioswap.config.mistakes import Mistakes, Path

IDENTITY: Final[frozenset[Path]] = frozenset(
    (name,) for name in ("models", "groups", "profiles", "selectors", "peers", "keys", "matrix")
)
"""Tables of which no two files may have the same key, in native documents."""
YAML_IDENTITY: Final[frozenset[Path]] = IDENTITY | {
    ("routing", "router", "settings", "groups"),
    ("routing", "router", "settings", "matrix"),
}
"""The same in the documents of llama-swap, where some of them have a second name."""


def merge(documents: Sequence[Document], identity: Collection[Path], mistakes: Mistakes) -> Document:
    """What the *documents* say together, in the order of first mention.

    *identity* are the paths of the tables whose keys belong to one document each.  Of what
    contradicts, the first stays, and *mistakes* names both places, but no values: some are secret.
    """
    if len(documents) == 1:
        return documents[0]
    merged = Document({}, {})
    for document in documents:
        merging = _Merging(merged, document, identity, mistakes)
        merging.add_table(merged.values, document.values, ())
    return merged


@attrs.frozen(eq=False)
class _Merging:
    """The step that adds one document to what has been merged before."""

    merged: Document
    added: Document
    identity: Collection[Path]
    mistakes: Mistakes

    def add_table(self, ours: dict[str, Any], theirs: dict[str, Any], path: Path) -> None:
        """Add the keys of *theirs* to *ours*, both at *path*."""
        for key, value in theirs.items():
            inner = (*path, key)
            if ours.get(key) is None:
                ours[key] = self._copy(value, inner, inner)
            elif value is None:
                pass
            elif path in self.identity:
                self.mistakes.add(inner, f"found it again at {self.added.place(inner)}, allowed is one file for each")
            elif isinstance(ours[key], dict) and isinstance(value, dict):
                self.add_table(ours[key], value, inner)
            elif isinstance(ours[key], list) and isinstance(value, list):
                self._append(ours[key], value, inner)
            else:
                self._compare(ours[key], value, inner)

    def _append(self, ours: list[Any], theirs: list[Any], path: Path) -> None:
        ours += [self._copy(value, (*path, index), (*path, len(ours) + index)) for index, value in enumerate(theirs)]

    def _compare(self, ours: object, theirs: object, path: Path) -> None:
        """Scalars may be equal, and then have the same type: 1 is not 1.0, and not true."""
        kinds = [_KINDS.get(type(value), "a single value") for value in (ours, theirs)]
        there = self.added.place(path)
        if kinds[0] != kinds[1]:
            self.mistakes.add(path, f"found {kinds[0]} here and {kinds[1]} at {there}, allowed is one kind")
        elif type(ours) is not type(theirs) or ours != theirs:
            self.mistakes.add(path, f"found another value at {there}, allowed is the same in all files")

    def _copy(self, value: Any, old: Path, new: Path) -> Any:
        return Copying(self.added, self.merged, self.mistakes).copy(value, old, new)


_KINDS: Final[dict[type, str]] = {dict: "a table", list: "an array"}
