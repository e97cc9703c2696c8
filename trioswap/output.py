"""Reads what a child says, for the logs and for those who want to know its last words.

It reads by chunks and never waits for a reader of the logs, or a full pipe would stop the child.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from typing import Final

import trio

from trioswap.logs import Logs
from trioswap.spawning import Child
from trioswap.symptoms import OVERLAP, is_out_of_memory

# Seconds for the last words of the dead; a grandchild may hold the pipe for ever.
OUTPUT_GRACE: Final = 1.0
# Bytes of its last line that a failed start quotes; a line has no limit of its own.
LAST_LINE: Final = 300
# Bytes read at a time, and at most by `catch_up`: what a pipe holds (pipe(7)).
_PIPE: Final = 65536


class Output:
    """The output of one child of *model*."""

    def __init__(self, model: str, logs: Logs) -> None:
        self.model = model
        self.scope = trio.CancelScope(shield=True)
        """Around the reading, shielded for a server that is being stopped still speaks; its owner sets a deadline."""
        self.last_word = 0.0
        """Trio's time at which it last said something, or was started."""
        self.short_of_memory = False
        """It has complained."""
        self.spoke = trio.Event()
        """Set when it says something; replaced by who begins to listen."""
        self.silent = trio.Event()
        """It has ended."""
        self._logs = logs
        self._last_bytes = b""

    async def keep(self, child: Child) -> None:
        """Take what *child* says until its end."""
        self.last_word = trio.current_time()
        with self.scope:
            try:
                async for chunk in child.stdout:
                    self._take(bytes(chunk))
            finally:
                self.silent.set()
                await child.stdout.aclose()  # closes the pipe even when this task is cancelled, and then says so

    def catch_up(self, child: Child) -> None:
        """Take what *child*, which has ended, has said, without waiting for who else holds the pipe.

        The end of a process and its last words become known in the same moment, in any order.
        """
        left = _PIPE
        with suppress(OSError):  # nothing is there now, or the reading has ended
            while left > 0 and not self.silent.is_set() and (chunk := os.read(child.stdout.fileno(), left)):
                self._take(chunk)
                left -= len(chunk)

    def _take(self, chunk: bytes) -> None:
        self._logs.from_child(self.model, chunk)
        self.short_of_memory = self.short_of_memory or is_out_of_memory(self._last_bytes[-OVERLAP:] + chunk)
        self._last_bytes = (self._last_bytes + chunk[-LAST_LINE:])[-LAST_LINE:]
        self.last_word = trio.current_time()
        self.spoke.set()

    @property
    def last_line(self) -> str:
        """The last line of this child, to follow a sentence; the ring also keeps what earlier ones said."""
        lines = self._last_bytes.decode(errors="replace").strip().splitlines()
        return f' ("{lines[-1].strip()}")' if lines else ""


def exit_text(code: int) -> str:
    """How a child ended, for people."""
    if code >= 0:
        return f"exited with {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
