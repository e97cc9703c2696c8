"""Macros: fills in each `${NAME}` that the file defines (core reference 1.4, 1.6.1).

Runs on a native document after its parts are merged and before anything else looks at the
values.  `${PORT}` and `${PID}` of models stay: they are known when models are resolved, or
stopped.  Environment variables are filled in before; here it is told which could not be.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any, Final

import attrs

from trioswap.config.document import Copying, Document
from trioswap.config.environment import Filling, TooLarge, unfilled
from trioswap.config.mistakes import Mistakes, Path, did_you_mean, quoted, shown

RESERVED: Final = ("MODEL_ID", "PID", "PORT")
MAX_NAME: Final = 63
# Each step costs a little of Python's stack; people stop at three.
MAX_CHAIN: Final = 100

_NAME: Final = re.compile(r"[A-Za-z0-9_-]+")
_REFERENCE: Final = re.compile(r"\$\{([A-Za-z0-9_-]+)\}")
# The text of a comment in a command, as `command.split` knows comments.
_COMMENT: Final = re.compile(r"^([^\S\n]*#)[^\n]*", re.MULTILINE)
_COMMANDS: Final = (
    ("cmd",),
    ("cmd_stop",),
    ("hooks", "before_start"),
    ("hooks", "after_ready"),
    ("hooks", "before_stop"),
    ("hooks", "after_stop"),
)
# Those that run when there is a process.
_HAVE_PID: Final = (("cmd_stop",), ("hooks", "after_ready"), ("hooks", "before_stop"))
# As in YAML; and Python refuses to write numbers of thousands of digits.
_MOST_BITS: Final = 64
_LISTED: Final = 12
"""So many names are listed in a mistake."""
_LEADING_ZERO: Final = re.compile(r"[-+]?0[0-9]+")


def expand_macros(document: Document, environ: Mapping[str, str], mistakes: Mistakes) -> Document:
    """*document*, which is native, with its macros filled in everywhere but in their own definitions.

    A text that is a reference and nothing else becomes the typed value of the macro.
    Keys stay as they are, but those in `filters.set_params_by_id` of models.

    *mistakes* hears of wrong definitions, of references to what is not defined, or is
    defined later, and of values that become too large.
    """
    expanded = Document({}, {})
    expander = _Expander(document, environ, mistakes)
    expander.check_definitions()
    copying = Copying(document, expanded, mistakes, expander.change, expander.rename)
    expanded.values.update(copying.copy(document.values, (), ()))
    return expanded


@attrs.frozen
class _Value:
    """A text with its macros filled in, or a macro."""

    value: str | float | bool
    text: str
    """What it is within a longer text."""


@attrs.frozen
class _Macro(_Value):
    path: Path
    """Where it is defined."""


@attrs.define(eq=False)
class _Expander:
    """Decides for each place of the document which macros hold there."""

    document: Document
    environ: Mapping[str, str]
    mistakes: Mistakes
    _filling: Filling = attrs.field(factory=Filling)
    _scopes: dict[str | None, _Scope] = attrs.field(factory=dict)
    """By model; None: outside the models."""

    def check_definitions(self) -> None:
        """Read all definitions, those that nobody uses too."""
        models = self.document.values.get("models")
        for model in models if isinstance(models, dict) else ():
            self._scope(("models", model))
        self._scope(())

    def change(self, path: Path, value: Any, text: str | None) -> tuple[Any, str | None]:
        """The scalar *value* with its macros filled in."""
        if path[0] == "models" and path[2:] in _COMMANDS and isinstance(value, str):
            value = _COMMENT.sub(r"\1", value)
        if not isinstance(value, str) or "${" not in value or _is_definition(path):
            return value, text
        if problem := unfilled(value, self.environ):
            self.mistakes.add(path, problem)
            return value, text
        new = self._expand(path, value)
        is_typed = not isinstance(new.value, str)
        return new.value, new.text if is_typed or text is not None else None

    def rename(self, path: Path) -> str:
        """The last key of *path*, with its macros filled in where that is done."""
        key = str(path[-1])
        if "${" not in key:
            return key
        if problem := unfilled(key, self.environ):
            self.mistakes.add(path, problem)
        elif path[0] == "models" and path[2:-1] == ("filters", "set_params_by_id"):
            return self._expand(path, key).text
        return key

    def _expand(self, path: Path, text: str) -> _Value:
        scope = self._scope(path)
        try:
            value = scope.expand(text)
        except TooLarge as exc:
            self.mistakes.add(path, str(exc))
            return _Value(text, text)
        has_pid = any(path[2 : 2 + len(key)] == key for key in _HAVE_PID)
        unknown = [*scope.unknown, *(["PID"] if "${PID}" in value.text and scope.left and not has_pid else [])]
        if unknown:
            self.mistakes.add(path, scope.complaint(unknown, has_pid=has_pid))
        return value

    def _scope(self, path: Path) -> _Scope:
        model = str(path[1]) if path[:1] == ("models",) and len(path) > 1 else None
        if model not in self._scopes:
            self._scopes[model] = self._make_scope(model)
        return self._scopes[model]

    def _make_scope(self, model: str | None) -> _Scope:
        if model is None:
            return _Scope(self._defined(("macros",)), (), self._filling, self.mistakes)
        itself = _Macro(model, model, ("models", model))
        # A dict keeps the place of a key whose value is replaced: so a global macro that mentions
        # a later redefined one sees the model's value, as in llama-swap.
        macros = {"MODEL_ID": itself} | self._scope(()).macros | self._defined(("models", model, "macros"))
        return _Scope(macros, ("PORT", "PID"), self._filling, self.mistakes)

    def _defined(self, path: Path) -> dict[str, _Macro]:
        """The macros of the table at *path*, in their order; of what is wrong a stand-in."""
        table: Any = self.document.values
        for part in path:
            table = table.get(part) if isinstance(table, dict) else None
        if not isinstance(table, dict):
            return {}
        macros = {}
        for name, value in table.items():
            where = (*path, name)
            if problem := self._problem(name, value):
                self.mistakes.add(where, problem)
                macros[name] = _Macro(name, name, where)
            else:
                macros[name] = _Macro(value, _text_of(value, self.document.texts.get(where)), where)
        return {name: macro for name, macro in macros.items() if name not in RESERVED}

    def _problem(self, name: str, value: object) -> str | None:
        """What is wrong with a definition, in llama-swap's order."""
        if len(name) > MAX_NAME:
            return f"found a name of {len(name)} characters, allowed are at most {MAX_NAME}"
        if not _NAME.fullmatch(name):
            return f"found the name {quoted(name)}, allowed are letters, digits, _ and -"
        if not isinstance(value, str | int | float | bool):
            return f"found {shown(value)}, allowed is text, a number, true or false"
        if isinstance(value, int) and value.bit_length() > _MOST_BITS:
            return "found a huge number, allowed are numbers of at most 64 bits"
        if isinstance(value, str) and f"${{{name}}}" in value:
            return f"found ${{{name}}} in its own definition, allowed are macros defined before it"
        if name in RESERVED:
            return f"found the name {name}, which trioswap gives a meaning to, allowed is any other name"
        return unfilled(value, self.environ) if isinstance(value, str) else None


def _is_definition(path: Path) -> bool:
    return path[0] == "macros" or (path[0] == "models" and path[2:3] == ("macros",))


# ---- one scope ------------------------------------------------------------------------------


@attrs.define(eq=False)
class _Scope:
    """The macros that hold in one place, in their order: each may use those before it."""

    macros: dict[str, _Macro]
    left: tuple[str, ...]
    """References that stay as they are."""
    filling: Filling
    mistakes: Mistakes
    unknown: list[str] = attrs.field(factory=list)
    """What the last text referred to that is nowhere."""
    _order: dict[str, int] = attrs.field(init=False)
    _expanded: dict[str, _Macro] = attrs.field(factory=dict)

    def __attrs_post_init__(self) -> None:
        self._order = {name: index for index, name in enumerate(self.macros)}

    def expand(self, text: str) -> _Value:
        """The value that *text* stands for.

        Raises:
            TooLarge: it is too large.
        """
        value, self.unknown = self._fill(text, len(self.macros), 0)
        return value

    def complaint(self, unknown: list[str], *, has_pid: bool) -> str:
        """The mistake about *unknown* references."""
        wrong = ", ".join(f"${{{name}}}" for name in unknown)
        if not self.left and all(name in RESERVED for name in unknown):
            return f"found {wrong}, allowed is that only within models"
        known = {*self.macros, *self.left} - (set() if has_pid else {"PID"})
        return f"found {wrong}, allowed {_choice(known)}{did_you_mean(unknown[0], known)}"

    def _fill(self, text: str, before: int, depth: int) -> tuple[_Value, list[str]]:
        """*text* with the macros of an order below *before*, and the names that are no such macros."""
        unknown: dict[str, None] = {}

        def meaning(name: str) -> _Macro | None:
            if self._order.get(name, before) < before:
                return self._expand_macro(name, depth)
            if name not in self.left:
                unknown[name] = None
            return None

        def text_of(name: str) -> str | None:
            macro = meaning(name)
            return None if macro is None else macro.text

        alone = _REFERENCE.fullmatch(text)
        value: _Value | None = meaning(alone[1]) if alone else None
        if value is None:
            filled = self.filling.fill(text, _REFERENCE, text_of)
            value = _Value(filled, filled)
        return value, list(unknown)

    def _expand_macro(self, name: str, depth: int) -> _Macro:
        """The macro *name* with those it uses filled in; in place of a wrong one its name."""
        macro = self.macros[name]
        if not isinstance(macro.value, str) or "${" not in macro.value or name == "MODEL_ID":
            return macro
        if name not in self._expanded:
            if depth == MAX_CHAIN:
                raise TooLarge(f"found macros that use each other in more than {MAX_CHAIN} steps, allowed are fewer")
            value, unknown = self._fill(macro.value, self._order[name], depth + 1)
            if unknown:
                self.mistakes.add(macro.path, self._complain_about(name, unknown))
                value = _Value(name, name)
            self._expanded[name] = _Macro(value.value, value.text, macro.path)
        return self._expanded[name]

    def _complain_about(self, name: str, unknown: list[str]) -> str:
        """The mistake of the macro *name*, which refers to *unknown*."""
        first = unknown[0]
        if first in self.macros:
            return f"found ${{{first}}}, which is defined after it, allowed are macros defined before"
        if first in RESERVED:
            return f"found ${{{first}}} in a macro used outside models, allowed is that only within models"
        before = [*self.macros][: self._order[name]]
        return f"found ${{{first}}}, allowed {_choice({*before, *self.left})}{did_you_mean(first, before)}"


def _choice(names: Iterable[str]) -> str:
    names = sorted(names)
    if not names:
        return "are macros, of which none is defined"
    if len(names) > _LISTED:
        return f"is one of the {len(names)} macros defined for this place"
    return f"is one of {', '.join(f'${{{name}}}' for name in names)}"


# ---- values as text -------------------------------------------------------------------------


def _text_of(value: str | float | bool, written: str | None = None) -> str:
    """What *value* is within a longer text; *written* is how YAML wrote it.

    A number that begins with 0 is a name to whoever wrote it, so it stays as it is; other
    numbers are written as llama-swap writes them.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) and written is not None and _LEADING_ZERO.fullmatch(written):
        return written
    return float_text(value) if isinstance(value, float) else str(value)


def float_text(value: float) -> str:
    """*value* as Go's `%v` writes it: the fewest digits, with an exponent below -4 and from 6 up."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else f"{'+' if value > 0 else '-'}Inf"
    if value == 0:
        return "-0" if math.copysign(1, value) < 0 else "0"
    number = Decimal(repr(value)).normalize()
    sign, digits, _ = number.as_tuple()
    exponent = number.adjusted()
    if -4 <= exponent < 6:
        return format(number, "f")
    first, *rest = map(str, digits)
    fraction = f".{''.join(rest)}" if rest else ""
    return f"{'-' if sign else ''}{first}{fraction}e{'-' if exponent < 0 else '+'}{abs(exponent):02d}"
