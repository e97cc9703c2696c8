"""What was learned of each model, kept over restarts: one small JSON file in the state directory.

What is known of a model belongs to its command line; under another one it is forgotten.  A
file that cannot be read is no reason not to start, and one that cannot be written none to
stop: both are logged, and learning begins anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import attrs
import trio
from cattrs import Converter
from cattrs.errors import BaseValidationError

from trioswap.config import Config, ModelConfig
from trioswap.footprints import Footprints, Record
from trioswap.learning import Costs, recall, remember

logger = logging.getLogger(__name__)

FILE: Final = "learned.json"
# Seconds between looks whether there is something new to write.
SAVE_EVERY: Final = 60.0


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

    version: int = 1
    models: dict[str, Entry] = attrs.field(factory=dict)


_CONVERTER: Final = Converter(forbid_extra_keys=True)


def default_directory(environ: Mapping[str, str]) -> Path:
    """Where state goes unless the configuration says it: systemd's place, else that of the XDG base directories."""
    if systemd := environ.get("STATE_DIRECTORY"):  # systemd.exec(5): may be several, separated by colons
        return Path(systemd.partition(":")[0])
    home = environ.get("XDG_STATE_HOME") or str(Path(environ.get("HOME") or "/") / ".local" / "state")
    return Path(home) / "trioswap"


@attrs.define(eq=False)
class State:
    """The file, and the books that it is made of and read into."""

    path: Path
    config: Config
    costs: Mapping[str, Costs]
    footprints: Footprints | None
    _written: Contents = attrs.field(factory=Contents, init=False)

    def restore(self) -> None:
        """Put what the file says into the books."""
        self._written = contents = _read(self.path)
        known = {
            name: entry
            for name, entry in contents.models.items()
            if name in self.config.models and entry.command == command_id(self.config.models[name])
        }
        for name, entry in known.items():
            recall(self.costs[name], entry.costs, entry.gaps)
        if self.footprints is not None:
            self.footprints.restore({name: entry.memory for name, entry in known.items() if entry.memory is not None})

    async def run(self) -> None:
        """Write what is new, now and then, and when cancelled once more."""
        try:
            while True:
                await trio.sleep(SAVE_EVERY)
                await trio.to_thread.run_sync(self.save)
        finally:
            self.save()  # a few kilobytes; in no thread, because a cancelled task cannot wait for one

    def save(self) -> None:
        """Write the file, if there is something new: whole, or not at all."""
        contents = self._contents()
        if contents == self._written:
            return
        text = json.dumps(_CONVERTER.unstructure(contents), indent=1, sort_keys=True)
        fresh = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fresh.write_text(text + "\n", encoding="utf-8")
            fresh.replace(self.path)
        except OSError as exc:
            logger.warning("what was learned cannot be kept: %s", exc)
            return
        self._written = contents

    def _contents(self) -> Contents:
        memory = {} if self.footprints is None else self.footprints.learned()
        entries = {}
        for name, model in self.config.models.items():
            costs, gaps = remember(self.costs[name])
            if costs or gaps or name in memory:
                entries[name] = Entry(command_id(model), costs, gaps, memory.get(name))
        # Models that are not configured today may be so again tomorrow.
        others = {name: entry for name, entry in self._written.models.items() if name not in self.config.models}
        return Contents(models={**others, **entries})


def command_id(model: ModelConfig) -> str:
    """What tells the command line of *model* from others, and where it runs, whatever port it was given."""
    port = str(urlsplit(model.proxy).port)
    parts = [part.replace(port, "PORT") for part in (*model.argv, *map("=".join, sorted(model.env.items())))]
    return hashlib.sha256(json.dumps([parts, model.device]).encode()).hexdigest()[:16]


def _read(path: Path) -> Contents:
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
        contents = _CONVERTER.structure(found, Contents)
        if contents.version != Contents().version:
            raise ValueError(f"version {contents.version}")
    except FileNotFoundError:
        return Contents()
    except (OSError, ValueError, TypeError, KeyError, BaseValidationError) as exc:
        logger.warning("what was learned before cannot be read from %s, so it is learned anew: %s", path, exc)
        return Contents()
    return contents
