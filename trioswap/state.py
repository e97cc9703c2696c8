"""What was learned of each model, kept over restarts: one small JSON file in the state directory.

What is known of a model belongs to its command line; under another one it is forgotten.  A
file that cannot be read is no reason not to start, and one that cannot be written none to
stop: both are logged, and learning begins anew.  A file with a number that nobody can have
measured is not believed in anything.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import attrs
import trio
from cattrs import Converter, transform_error
from cattrs.errors import BaseValidationError

from trioswap.config import Config
from trioswap.footprints import Footprints, Record
from trioswap.learning import Costs, command_id, recall, remember

logger = logging.getLogger(__name__)

FILE: Final = "learned.json"
VERSION: Final = 1
# Seconds between looks whether there is something new to write.
SAVE_EVERY: Final = 60.0
# Seconds that the last write may take: a file system may not answer at all, and the daemon must end all the same.
LAST_SAVE: Final = 1.0
# No load takes a century of seconds, and no machine has so many bytes.
LONGEST: Final = 3.2e9
LARGEST: Final = 2**60


@attrs.frozen
class Entry:
    """One model in the file."""

    command: str
    """Which command line this was learned of."""
    costs: dict[str, float] = attrs.field(factory=dict)
    gaps: list[float] = attrs.field(factory=list)
    memory: Record | None = None


@attrs.frozen
class Contents:
    """The file."""

    version: int = VERSION
    models: dict[str, Entry] = attrs.field(factory=dict)


_CONVERTER: Final = Converter(forbid_extra_keys=True)


def default_directory(environ: Mapping[str, str]) -> Path:
    """Where state goes unless the configuration says it: systemd's place, else that of the XDG base directories."""
    if systemd := environ.get("STATE_DIRECTORY"):  # systemd.exec(5): may be several, separated by colons
        return Path(systemd.partition(":")[0])
    home = Path(environ.get("XDG_STATE_HOME", ""))
    if not home.is_absolute():  # "should consider the path invalid and ignore it" (XDG Base Directory Specification)
        home = Path(environ.get("HOME") or "/") / ".local" / "state"
    return home / "trioswap"


@attrs.define(eq=False)
class State:
    """The file, and the books that it is made of and read into."""

    path: Path
    config: Config
    costs: Mapping[str, Costs]
    footprints: Footprints | None
    _written: Contents = attrs.field(factory=Contents, init=False)
    _gone: dict[str, Entry] = attrs.field(factory=dict, init=False)
    """What was learned since then of models that were removed."""
    _complaint: str = attrs.field(default="", init=False)
    """Why it could not be written the last time; said once, not every minute."""
    # Held by the thread that writes: one that is slow must not write the same file as the next.
    _writing: threading.Lock = attrs.field(factory=threading.Lock, init=False)

    def restore(self) -> None:
        """Put what the file says into the books."""
        self._written = _read(self.path)
        known = self._still_true()
        for name, entry in known.items():
            self._put(name, entry)

    def renew(self, config: Config) -> None:
        """Another configuration has taken the place of the one before, and *costs* and *footprints* know its models.

        What was learned of a model that was removed is kept, and what is known of one that was
        added is put into the books if it is of the same command line.
        """
        known = self._contents().models
        self._gone = {name: entry for name, entry in known.items() if name not in config.models}
        for name in config.models.keys() - self.config.models.keys():
            if self.footprints is not None:
                self.footprints.forget(name)
            if name in known and known[name].command == command_id(config.models[name]):
                self._put(name, known[name])
        self.config = config

    def _put(self, name: str, entry: Entry) -> None:
        recall(self.costs[name], entry.costs, entry.gaps)
        if self.footprints is not None and entry.memory is not None:
            self.footprints.restore({name: entry.memory})

    async def run(self) -> None:
        """Write what is new, now and then, and when cancelled once more."""
        try:
            while True:
                await trio.sleep(SAVE_EVERY)
                await self._save_in_thread()
        finally:
            with trio.move_on_after(LAST_SAVE, shield=True) as late:
                await self._save_in_thread()
            if late.cancelled_caught:
                self._complain(f"it could not be written within {LAST_SAVE:g} s")

    async def _save_in_thread(self) -> None:
        """A disk may be slow; a thread that it holds for ever is left to itself when this is cancelled."""
        # The books are read here, where nobody changes them meanwhile.
        contents = self._contents()
        try:
            # A limiter of its own: what others have left to hang is no reason to write nothing.
            limiter = trio.CapacityLimiter(1)
            await trio.to_thread.run_sync(self._write, contents, abandon_on_cancel=True, limiter=limiter)
        except RuntimeError as exc:  # no thread is to be had (RLIMIT_NPROC, pids.max)
            self._complain(exc)

    def save(self) -> None:
        """Write the file, if there is something new: whole, or not at all."""
        self._write(self._contents())

    def _write(self, contents: Contents) -> None:
        with self._writing:
            if contents != self._written:
                self._replace_file(contents)

    def _replace_file(self, contents: Contents) -> None:
        text = json.dumps(_CONVERTER.unstructure(contents), indent=1, sort_keys=True)
        fresh = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fresh.write_text(text + "\n", encoding="utf-8")
            fresh.replace(self.path)
        except OSError as exc:
            with contextlib.suppress(OSError):
                fresh.unlink(missing_ok=True)
            self._complain(exc)
            return
        self._written, self._complaint = contents, ""

    def _complain(self, exc: Exception | str) -> None:
        if str(exc) != self._complaint:
            logger.warning("what was learned cannot be kept: %s", exc)
        self._complaint = str(exc)

    def _contents(self) -> Contents:
        # Where memory is not counted today, what is known of it is kept for the day on which it is.
        memory = (
            self.footprints.learned()
            if self.footprints is not None
            else {name: entry.memory for name, entry in self._still_true().items() if entry.memory is not None}
        )
        entries = {}
        for name, model in self.config.models.items():
            costs, gaps = remember(self.costs[name])
            if costs or gaps or name in memory:
                entries[name] = Entry(command_id(model), costs, gaps, memory.get(name))
        # Models that are not configured today may be so again tomorrow.
        known = {**self._written.models, **self._gone}
        others = {name: entry for name, entry in known.items() if name not in self.config.models}
        return Contents(models={**others, **entries})

    def _still_true(self) -> dict[str, Entry]:
        """What the file says of models that have the same command line today."""
        return {
            name: entry
            for name, entry in self._written.models.items()
            if name in self.config.models and entry.command == command_id(self.config.models[name])
        }


def _read(path: Path) -> Contents:
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
        if found["version"] != VERSION:
            raise ValueError(f"version: found {found['version']!r:.40}, allowed is {VERSION}")
        contents = _CONVERTER.structure(found, Contents)
        _check(contents)
    except FileNotFoundError:
        return Contents()
    except Exception as exc:  # anything may stand there, and it may break the reader in any way
        why = (
            "; ".join(transform_error(exc)) if isinstance(exc, BaseValidationError) else f"{type(exc).__name__}: {exc}"
        )
        logger.warning("what was learned before cannot be read from %s, so it is learned anew: %s", path, why)
        return Contents()
    return contents


def _check(contents: Contents) -> None:
    """Raise ValueError for what nobody can have measured: NaN too, which is in no range."""
    for name, entry in contents.models.items():
        memory = entry.memory or Record(peak={}, grown={}, fixed=False)
        bytes_ = [*memory["peak"].values(), *memory["grown"].values()]
        ranges = ("costs", LONGEST, [*entry.costs.values()]), ("gaps", LONGEST, entry.gaps), ("memory", LARGEST, bytes_)
        for key, most, values in ranges:
            wrong = [value for value in values if not 0 <= value <= most]
            if wrong:
                raise ValueError(f"models.{name}.{key}: found {wrong[0]!r:.40}, allowed is 0 to {most}")
        if memory["fixed"] and not memory["peak"]:
            raise ValueError(f"models.{name}.memory: found fixed without a peak")
