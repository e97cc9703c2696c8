"""Environment variables in a document: fills in each `${env.NAME}` (core reference 1.3).

That is done scalar by scalar after parsing, not in the text of the file as llama-swap does
it: so a value cannot break the file, needs no escapes, and counts only where it is used.
What a variable holds is not filled in again.  A reference that cannot be filled in stays,
and `unfilled` says why, once the keys have their final names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final

import attrs

from trioswap.config.document import Copying, Document
from trioswap.config.mistakes import Mistakes, Path, did_you_mean, quoted
from trioswap.config.scalars import resolve

# Values of a configuration are command lines at most.  Macros of macros could double with each step.
MAX_VALUE: Final = 2**20
MAX_IN_ALL: Final = 64 * 2**20
"""Characters that may be filled in, into one value and into one document."""

_REFERENCE: Final = re.compile(r"\$\{env\.([^{}\n]*)\}")
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_UNFIT: Final = re.compile(r"[\n\r\0]")


class TooLarge(Exception):
    """What a value becomes is beyond the bounds; the text says which."""


@attrs.define(eq=False)
class Filling:
    """Fills in references, and counts what becomes of them."""

    _left: int = attrs.field(factory=lambda: MAX_IN_ALL)

    def fill(self, text: str, reference: re.Pattern[str], meaning: Callable[[str], str | None]) -> str:
        """*text* with the *meaning* of the name (group 1) for each *reference*; None: it stays as it is.

        Raises:
            TooLarge: before it has grown so large; about all together it is raised once.
        """
        if self._left < 0:
            return text
        pieces, length, end = [], len(text), 0
        for match in reference.finditer(text):
            filled = meaning(match[1])
            if filled is not None:
                length += len(filled) - len(match[0])
                if length > MAX_VALUE:
                    raise TooLarge(f"found what becomes more than {MAX_VALUE:,} characters, allowed are fewer")
                pieces += [text[end : match.start()], filled]
                end = match.end()
        if pieces:
            self._left -= length
        if self._left < 0:
            raise TooLarge(f"found more than {MAX_IN_ALL:,} characters in what is filled in so far, allowed are fewer")
        return "".join([*pieces, text[end:]])


def fill_environment(document: Document, environ: Mapping[str, str], mistakes: Mistakes) -> Document:
    """*document* with the values of *environ* in its texts and keys.

    What YAML writes without quotes gets its type once it is filled in.  *mistakes* hears
    of keys that become the same, and of values that become too large.
    """
    filling = Filling()

    def meaning(name: str) -> str | None:
        return None if _problem(name, environ) else environ[name]

    def fill(path: Path, text: str) -> str:
        try:
            return filling.fill(text, _REFERENCE, meaning)
        except TooLarge as exc:
            mistakes.add(path, str(exc))
            return text

    def change(path: Path, value: Any, text: str | None) -> tuple[Any, str | None]:
        if not isinstance(value, str) or (filled := fill(path, value)) == value:
            return value, text
        return (filled, None) if text is None else (resolve(filled), filled)

    def rename(path: Path) -> str:
        return fill(path, str(path[-1]))

    filled = Document({}, {})
    copying = Copying(document, filled, mistakes, change, rename)
    filled.values.update(copying.copy(document.values, (), ()))
    return filled


def unfilled(text: str, environ: Mapping[str, str]) -> str | None:
    """What is wrong with the first reference in *text* that could not be filled in, if there is one."""
    problems = (_problem(match[1], environ) for match in _REFERENCE.finditer(text))
    return next((problem for problem in problems if problem is not None), None)


def _shown(name: str) -> str:
    reference = f"${{env.{name}}}"
    return reference if reference.isprintable() else quoted(reference)


def _problem(name: str, environ: Mapping[str, str]) -> str | None:
    """Why `${env.NAME}` has no value that can be used; no message shows what a variable holds."""
    found = f"found {_shown(name)}"
    if not _NAME.fullmatch(name):
        return f"{found}, allowed are names of letters, digits and _ that do not begin with a digit"
    if name not in environ:
        allowed = f"allowed are variables of the environment{did_you_mean(name, environ)}"
        return f"{found}, but no such variable is set, {allowed}"
    if _UNFIT.search(environ[name]):
        return f"{found}, which holds line breaks or NUL characters, allowed are variables without"
    return None
