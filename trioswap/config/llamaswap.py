"""Translates what llama-swap's YAML files say into the native document (core reference, part 1).

Keys get their native names, and what has another structure there is put where it belongs
here.  Macros stay as they are; only where the structure hangs on what a macro says is it
filled in.  Whether values are right is judged where all configurations are read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from typing import Any, Final

import attrs

from trioswap.config.document import Copying, Document, Place
from trioswap.config.keys import Key, keys_of
from trioswap.config.llamaswap_values import RULES
from trioswap.config.macros import expand_macros
from trioswap.config.mistakes import Mistakes, Path, did_you_mean, found, quoted
from trioswap.config.raw import RawConfig, RawProfile
from trioswap.config.raw_model import RawFilters, RawModel

ROUTER: Final[Path] = ("routing", "router")
SETTINGS: Final[Path] = (*ROUTER, "settings")
SCHEDULER: Final[Path] = ("routing", "scheduler")
PRIORITY: Final[Path] = (*SCHEDULER, "settings", "fifo", "priority")
_RULES_OF_RESIDENCY: Final = ("groups", "matrix")
_USES: Final = {"group": "groups", "matrix": "matrix"}
# Top-level keys of this kind hold what the file repeats, as they do in the YAML of other programs.
_FREE: Final = "x-"
_OLD_PROFILE: Final = "found a list, as older versions had it, allowed is a mapping with pins, of names to targets"


def translate(document: Document, mistakes: Mistakes, *, unknown: Mistakes | None = None) -> Document:
    """The native document of what *document* says, which knows how the file spells its keys.

    *mistakes* hears of what cannot be translated.  So do unknown keys, unless *unknown* is
    there to hear of them: then they are left out.
    """
    native = Document({}, {})
    # Wrong macros are told of where those of the translated document are filled in.
    expanded = expand_macros(document, {}, Mistakes())
    translation = _Translation(document, expanded, native, mistakes, unknown, _holders(document))
    native.values.update(translation.top())
    if unknown is not None:
        unknown.places, unknown.shown = native.places, native.shown
    return native


def _at(document: Document, path: Path) -> Any:
    """The value at *path*, None where there is nothing."""
    value: Any = document.values
    for part in path:
        if isinstance(value, dict):
            value = value.get(part)
        else:
            value = value[part] if isinstance(value, list) and isinstance(part, int) else None
    return value


def _holders(document: Document) -> set[str]:
    """The top-level keys with anchors in them that are used elsewhere.

    What an alias stands for has the places of what its anchor is at.
    """
    users: dict[Place, set[str]] = defaultdict(set)
    for path, place in document.places.items():
        if len(path) > 1:
            users[place].add(str(path[0]))
    holders = set()
    for place, names in users.items():
        for name in names if len(names) > 1 else ():
            top = document.place((name,))
            # An anchor stands before its aliases: what is from before the key is not its own.
            if top and top.file == place.file and (top.line, top.column) <= (place.line, place.column):
                holders.add(name)
    return holders


@attrs.frozen(eq=False)
class _Translation:
    """Goes through a document along the raw classes."""

    source: Document
    expanded: Document
    """The same with its macros filled in."""
    native: Document
    mistakes: Mistakes
    unknown: Mistakes | None
    holders: set[str]
    """Top-level keys that need no meaning."""

    def top(self) -> dict[str, Any]:
        """The values of the whole document."""
        values: dict[str, Any] = self._table(RawConfig, (), ())
        models = values.get("models")
        self._add_priorities(models if isinstance(models, dict) else {})
        if not says_residency(values):
            values["groups"] = {}  # one model at a time is the default there
        return values

    # ---- tables -----------------------------------------------------------------------------

    def _table(self, table: type, old: Path, new: Path) -> Any:
        """What is at *old*, a table of the raw class *table*, as it is to be at *new*."""
        value = _at(self.source, old)
        if not isinstance(value, dict):
            return self._copy(old, new)
        keys = {key.yaml: key for key in keys_of(table).values()}
        native: dict[str, Any] = {}
        for name in value:
            if name in keys:
                self._put(native, table, keys[name], (*old, name), new)
            elif table is RawFilters and name == "strip_params":  # `stripParams` in older files
                if not value.get("stripParams"):
                    self._put(native, table, keys["stripParams"], (*old, name), new)
            elif table is RawConfig and name == "routing":
                self._put_residency(native)
            elif not (table is RawConfig and (name.startswith(_FREE) or name in self.holders)):
                self._add_unknown((*old, name), new, keys)
        for name, key in keys.items():
            if key.required and value.get(name) is None:  # so that it is called missing by the name it has here
                self.native.shown[(*new, key.name)] = (*old, name)
        return native

    def _put(self, native: dict[str, Any], table: type, key: Key, old: Path, holder: Path) -> None:
        """Add the *key* of *table*, which is at *old*, to *native*, which is to be at *holder*."""
        if _at(self.source, old) is not None:  # a null is as good as nothing
            new = (*holder, key.name)
            value = self._value(table, key, old, new)
            if value is not None:
                self._note(old, new)
                native[key.name] = value

    def _value(self, table: type, key: Key, old: Path, new: Path) -> Any:
        """The value of the *key*, None: as if it were not written."""
        if (table, key.name) == (RawModel, "env"):
            return self._env(old, new)
        if (table, key.name) == (RawFilters, "strip_params"):
            return self._strip_params(old, new)
        if rule := RULES.get((table, key.name)):
            written = _at(self.source, old)
            value = rule(written, _at(self.expanded, old))
            return self._copy(old, new) if value is written else value
        if key.table is None:
            return self._copy(old, new)
        return self._tables(key.table, old, new) if key.is_by_name else self._table(key.table, old, new)

    def _tables(self, table: type, old: Path, new: Path) -> Any:
        """Tables of the raw class *table* by names that are free."""
        value = _at(self.source, old)
        if not isinstance(value, dict):
            return self._profile(table, old, new)
        native = {}
        for name in value:
            self._note((*old, name), (*new, name))
            native[name] = self._profile(table, (*old, name), (*new, name))
        return native

    def _profile(self, table: type, old: Path, new: Path) -> Any:
        """A table of the raw class *table*, which was a list once if it is about profiles."""
        if table is not RawProfile or not isinstance(_at(self.source, old), list):
            return self._table(table, old, new)
        self._add_mistake(old, new, _OLD_PROFILE)
        return {}

    # ---- what has another structure -----------------------------------------------------------

    def _env(self, old: Path, new: Path) -> Any:
        """A table, of a list of `NAME=VALUE` in which the last of a name wins."""
        value = _at(self.source, old)
        if isinstance(value, dict):
            return self._copy(old, new)
        if not isinstance(value, list):
            self._add_mistake(old, new, found(value, "a list of texts NAME=VALUE"))
            return None
        env = {}
        for index, item in enumerate(value):
            where = (*old, index)
            name, sign, text = (self.source.as_text(where) or "").partition("=")
            if "${" in name or not sign:
                name, sign, text = (self.expanded.as_text(where) or "").partition("=")
            if sign:
                self._note(where, (*new, name))
                env[name] = text
            else:
                self._add_mistake(where, (*new, index), found(item, "a text NAME=VALUE"))
        return env

    def _strip_params(self, old: Path, new: Path) -> Any:
        """An array, of a text with commas."""
        text, meaning = self.source.as_text(old), self.expanded.as_text(old)
        if text is None or meaning is None:
            return self._copy(old, new)
        if text.count(",") != meaning.count(","):  # some come out of macros
            text = meaning
        fields = [field.strip() for field in text.split(",") if field.strip()]
        for index in range(len(fields)):
            self._note(old, (*new, index))
        return fields

    # ---- the block `routing` (core reference 1.11) ----------------------------------------------

    def _put_residency(self, native: dict[str, Any]) -> None:
        """Put the groups or the matrix that the block chooses into *native*."""
        self._block(("routing",), ("router", "scheduler"))
        self._block(ROUTER, ("use", "settings"))
        settings = self._block(SETTINGS, _RULES_OF_RESIDENCY)
        use = self._choice((*ROUTER, "use"), _USES)
        older = [name for name in _RULES_OF_RESIDENCY if _at(self.source, (name,)) is not None]
        if use is None:
            return
        if older:
            if use or any(settings.values()):
                allowed = f"allowed is one of them, and routing.router.settings.{older[0]} is its place there"
                self._add_mistake((older[0],), (older[0],), f"found {older[0]} beside routing.router, {allowed}")
        elif use == "matrix" and "matrix" not in settings:
            allowed = "allowed is that along with routing.router.settings.matrix"
            self._add_mistake((*ROUTER, "use"), (*ROUTER, "use"), f'found "matrix", but no such matrix, {allowed}')
        elif not use and "matrix" in settings:
            allowed = "allowed is that with `use: matrix`, or with `use: group`, and then it does not count"
            where = (*SETTINGS, "matrix")
            self._add_mistake(where, where, f"found matrix, but no routing.router.use, {allowed}")
        else:
            name = _USES[use or "group"]
            self._put(native, RawConfig, keys_of(RawConfig)[name], (*SETTINGS, name), ())

    def _add_priorities(self, models: dict[str, Any]) -> None:
        """Give the priorities that the scheduler has by name to their *models*."""
        self._block(SCHEDULER, ("use", "settings"))
        self._choice((*SCHEDULER, "use"), ("fifo",))
        self._block(PRIORITY[:-2], ("fifo",))
        self._block(PRIORITY[:-1], ("priority",))
        priorities = self._block(PRIORITY)
        names = self._names(models) if priorities else {}
        for name in priorities:
            where = (*PRIORITY, name)
            if name in names:
                self._add_priority(models[names[name]], where, ("models", names[name], "priority"))
            else:
                hint = self.mistakes.guess(name, names)
                self._add_mistake(where, where, found(name, "the name of a model or an alias") + hint)

    def _add_priority(self, model: dict[str, Any], old: Path, new: Path) -> None:
        if "priority" in model:
            text = f"found a second priority for {quoted(str(new[1]))}, allowed is one"
            self._add_mistake(old, old, text)
            return
        # The model's own macros do not hold where the priority is written.
        model["priority"] = _at(self.expanded, old) if "macros" in model else self._copy(old, new)
        self._note(old, new)

    def _names(self, models: dict[str, Any]) -> dict[str, str]:
        """The models that can be spoken of, by their names and aliases."""
        part = attrs.evolve(self.native, values={"macros": _at(self.source, ("macros",)), "models": models})
        part = expand_macros(part, {}, Mistakes())
        names = {name: name for name, model in models.items() if isinstance(model, dict)}
        for name in list(names):
            aliases, by_id = ("models", name, "aliases"), ("models", name, "filters", "set_params_by_id")
            written = [part.as_text((*aliases, index)) for index in range(len(_at(part, aliases) or ()))]
            for alias in [*written, *(_at(part, by_id) or ())]:
                names.setdefault(str(alias), name)
        return names

    def _block(self, path: Path, known: Collection[str] | None = None) -> dict[str, Any]:
        """What is written in the mapping at *path*, which has the *known* keys; None: any."""
        value = _at(self.source, path)
        if value is None:
            return {}
        if not isinstance(value, dict):
            self._add_mistake(path, path, found(value, "a table"))
            return {}
        for name in value:
            if known is not None and name not in known:
                self._add_unknown((*path, name), path, known)
        return {name: inner for name, inner in value.items() if inner is not None}

    def _choice(self, path: Path, choices: Collection[str]) -> str | None:
        """Which of the *choices* stands at *path*; empty: nothing does; None: something else."""
        value = _at(self.expanded, path)
        if value is None or value in ("", *choices):
            return value or ""
        hint = did_you_mean(value, choices) if isinstance(value, str) else ""
        self._add_mistake(path, path, found(value, f"one of {', '.join(choices)}") + hint)
        return None

    # ---- keys that are not known ------------------------------------------------------------------

    def _add_unknown(self, old: Path, holder: Path, known: Collection[str]) -> None:
        name = str(old[-1])
        hint = self.mistakes.guess(name, known) or f", allowed are {', '.join(known)}"
        # Under a name that no key has: the native one of another key may be spelled like it.
        new = (*holder, f"?{name}")
        self._note(old, new)
        if self.unknown is None:
            self.mistakes.add(new, f"unknown key{hint} (with --lenient it would be left out)")
        else:
            self.unknown.add(new, f"unknown key, left out{hint}")

    # ---- places -------------------------------------------------------------------------------------

    def _add_mistake(self, old: Path, new: Path, text: str) -> None:
        self._note(old, new)
        self.mistakes.add(new, text)

    def _note(self, old: Path, new: Path) -> None:
        """What is at *new* was written at *old*."""
        place = self.source.place(old)
        if place is not None:
            self.native.places[new] = place
        if new != old:
            self.native.shown[new] = old

    def _copy(self, old: Path, new: Path) -> Any:
        """What is at *old*, for *new*, as it is."""
        return Copying(self.source, self.native, self.mistakes).copy(_at(self.source, old), old, new)


def says_residency(values: dict[str, Any]) -> bool:
    """Whether the native *values* say anything about which models may be resident together."""
    models = values.get("models")
    tables = models.values() if isinstance(models, dict) else ()
    says_memory = any(isinstance(model, dict) and {"memory", "device"} & model.keys() for model in tables)
    return says_memory or bool({*_RULES_OF_RESIDENCY, "memory"} & values.keys())
