"""Notices that files of the configuration have changed; reading them again is up to whoever waits for it.

Files are looked at every now and then.  Being told by the kernel (inotify) would be sooner, but
it hears nothing of what others write on a network file system, and must be set up anew for
each directory that a symbolic link may lead through.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final

import attrs
import trio

from trioswap.errors import ConfigError

logger = logging.getLogger(__name__)

# Seconds between two looks; llama-swap's (surface reference 5).
WATCH_EVERY: Final = 2.0

# Of one file: where links lead, device, inode, size, and the time of its last change in ns.
_Stamp = tuple[Path, int, int, int, int]
# None: not all of them are there.
_Look = Mapping[Path, _Stamp] | None


@attrs.define(eq=False)
class Watch:
    """The files of one configuration, as they were when they were last read.

    To be made before they are read for the first time, or what is changed meanwhile goes unnoticed:

        watch = Watch(sources)
        config = read()
        while True:
            await watch.wait_changed()
            config = read()
    """

    sources: Callable[[], Iterable[Path]]
    """The files there are now; called in a thread.  It may raise ConfigError where it cannot tell."""
    every: float = WATCH_EVERY
    _known: _Look = attrs.field(init=False, repr=False)

    @_known.default
    def _look_first(self) -> _Look:
        return self._look()

    async def wait_changed(self) -> list[Path]:
        """Return the files that are other ones than when they were last waited for, new or gone, sorted.

        Editors and copies write in several steps, so a change counts when the next look finds
        the same.  While a file is missing that was asked for by name, or a directory with all that was
        in it, somebody is about to put another in its place: nothing has changed until it is back.
        """
        before = self._known
        while True:
            await trio.sleep(self.every)
            # In a thread, which is not waited for at the end: a network file system may be away for minutes.
            now = await trio.to_thread.run_sync(self._look, abandon_on_cancel=True)
            if now is not None and now == before and now != self._known:
                changed = _between(self._known or {}, now)
                self._known = now
                return changed
            before = now

    def _look(self) -> _Look:
        try:
            return {file: _stamp(file) for file in self.sources()}
        except (OSError, RuntimeError, ConfigError) as exc:  # RuntimeError: a ring of links
            logger.debug("files of the configuration are not there: %s", exc)
            return None


def _stamp(file: Path) -> _Stamp:
    real = file.resolve(strict=True)
    status = real.stat()
    return real, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _between(old: Mapping[Path, _Stamp], new: Mapping[Path, _Stamp]) -> list[Path]:
    return sorted(file for file in {*old, *new} if old.get(file) != new.get(file))
