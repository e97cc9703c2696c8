"""`trioswap init`: a configuration for the models that are on this machine, written once and then the user's.

    discover     files
    models       what they are
    projectors   which belong together
    names        what they are called
    fitting      whether they fit
    write        the text
    save         the file

Nothing is printed here; that is the command line's business.
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import attrs

from trioswap import devices
from trioswap.config import MemoryConfig
from trioswap.errors import InitFailed, Misuse
from trioswap.init.discover import Skipped, find, usual_places
from trioswap.init.fitting import fit, largest
from trioswap.init.models import Model, Projector, read_models
from trioswap.init.names import names
from trioswap.init.projectors import pair
from trioswap.init.save import check, prepare, save
from trioswap.init.write import INSTALL, LLAMA_SERVER, Engine, Entry, Frame, document, shown
from trioswap.memory import usable_sizes

__all__ = ["OUTPUT", "STDOUT", "InitFailed", "Outcome", "init"]

OUTPUT: Final = "trioswap.toml"
"""Where `trioswap serve` looks first."""
STDOUT: Final = "-"
# Of what was left out, told on the terminal; the file has them all.
_TOLD: Final = 10
_LONELY: Final = "is a projector (mmproj) of which no model is beside it"


@attrs.frozen
class Outcome:
    """What `init` did."""

    document: str
    """The configuration."""
    summary: str
    """What was done and what to do next, for people; without a newline at the end."""


def init(
    directories: Sequence[str],
    output: str = OUTPUT,
    *,
    force: bool = False,
    environment: Mapping[str, str] | None = None,
    machine: devices.Machine | None = None,
) -> Outcome:
    """Write a configuration with the models in *directories* to the file *output*.

    Without directories it looks where models usually are.  The output "-" is no file: the caller
    prints the document.  An existing file is replaced only with *force*, and at once.
    *environment* (None: ours) says where that is and what is on the PATH; *machine* (None: this one) has the memory.

    Reads the beginning of each model file, which may take seconds.

    Raises:
        Misuse: a directory is none, the file exists, or its name does not end in .toml.
        InitFailed: no model was found, or the file cannot be written.
    """
    environment = os.environ if environment is None else environment
    target = None if output == STDOUT else prepare(output, force=force)
    places = [_directory(name) for name in directories] or usual_places(environment)
    found = find(places)
    models, projectors, unread = read_models(found.files)
    skipped = [*found.skipped, *unread]
    if not models:
        raise InitFailed(_nothing(places, skipped))
    frame = _frame(environment, machine or devices.Machine())
    paired = pair(models, projectors)
    entries = _entries(models, paired, frame)
    used = {projector.path for projector in paired.values()}
    skipped += [Skipped(each.path, _LONELY) for each in projectors if each.path not in used]
    text = document(entries, frame, places, skipped)
    if target is None:
        check(text)
    else:
        save(target, text, force=force)
    return Outcome(text, _summary(entries, skipped, frame, output))


def _directory(name: str) -> Path:
    path = Path(name)
    if not path.is_dir():
        raise Misuse(f"found {shown(name)}, allowed is a directory that is there")
    return path.absolute()


def _frame(environment: Mapping[str, str], machine: devices.Machine) -> Frame:
    """What the models are to run on."""
    there = machine.discover()
    if shutil.which(LLAMA_SERVER, path=environment.get("PATH", os.defpath)) is not None:
        engine = Engine.SERVER
    else:
        engine = Engine.MISSING if find_spec("xllamacpp") is None else Engine.EMBEDDED
    return Frame(engine, there, largest(usable_sizes(MemoryConfig(), machine)), machine.unmeasured)


def _entries(models: Sequence[Model], paired: Mapping[Path, Projector], frame: Frame) -> list[Entry]:
    """The models by name, with what is decided about each."""
    entries = []
    for name, model in zip(names(models), models, strict=True):
        projector = paired.get(model.path)
        # The embedded engine does not load it.
        beside = projector.size if projector is not None and frame.engine is Engine.SERVER else 0
        fitted = fit(model, frame.room, most=frame.engine.context, beside=beside)
        entries.append(Entry(name, model, projector, fitted))
    return sorted(entries, key=lambda entry: entry.name)


# ---- what is told ---------------------------------------------------------------------------


def _nothing(places: Sequence[Path], skipped: Sequence[Skipped]) -> str:
    lines = ["no model was found; looked in", *(f"  {shown(place)}{_absence(place)}" for place in places)]
    if skipped:
        lines += ["and left out", *_told(skipped)]
    return "\n".join([*lines, "name other directories with: trioswap init DIR..."])


def _absence(place: Path) -> str:
    return "" if place.is_dir() else " (not there)"


def _told(skipped: Sequence[Skipped]) -> list[str]:
    lines = [f"  {shown(each.path)}: {shown(each.reason)}" for each in skipped[:_TOLD]]
    return lines if len(skipped) <= _TOLD else [*lines, f"  and {len(skipped) - _TOLD} more"]


def _summary(entries: Sequence[Entry], skipped: Sequence[Skipped], frame: Frame, output: str) -> str:
    kinds = Counter(entry.model.kind.value for entry in entries)
    what = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    lines = [("" if output == STDOUT else f"{shown(output)}: ") + f"{_count(len(entries), 'model')} ({what})"]
    large = [entry.name for entry in entries if not entry.fit.fits]
    if large:
        lines.append(f"too large for this machine: {', '.join(large)}")
    if skipped:
        lines += [f"left out {_count(len(skipped), 'file')}:", *_told(skipped)]
    if frame.engine is Engine.MISSING:
        lines.append(f"the engine that runs them is not installed: {INSTALL}")
    if output != STDOUT:
        lines.append(f"next: trioswap serve -c {shlex.quote(output)}")
    return "\n".join(lines)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
