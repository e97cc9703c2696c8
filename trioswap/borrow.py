"""Run a command while the daemon holds memory for it: `trioswap hold`.

Whatever ends first: when the command does, the memory is given back; when we are killed,
the daemon sees the connection go; when the daemon goes, the command is left alone.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import attrs
import trio

from trioswap.config.mistakes import shown
from trioswap.config.values import parse_size
from trioswap.errors import Misuse, TrioswapError
from trioswap.forecast import amount
from trioswap.remote import Loan, daemon_client, memory_loan
from trioswap.telling import place_in_line

# Seconds of silence that nobody wonders about.
SILENCE: Final = 1.0


def run(
    url: str, api_key: str | None, memory: str, device: str | None, label: str | None, command: Sequence[str]
) -> int:
    """Wait for *memory* of the daemon at *url*, run *command*, give it back; the exit code, 128 + n for a signal n.

    Raises:
        Misuse: *memory* is no size, or the command cannot be run.
        DaemonUnreachable, DaemonRefused: the memory is not to be had; the command was not run.
    """
    try:
        size = parse_size(int(memory) if memory.isdecimal() else memory)
    except ValueError as exc:
        raise Misuse(f"MEMORY: {exc}") from None
    if shutil.which(command[0]) is None:
        raise Misuse(f"COMMAND: found {shown(command[0])}, allowed is a program that can be run")
    label = label or f"{Path(command[0]).name[:60]} (pid {os.getpid()})"
    return trio.run(_Borrower(url, api_key, size, device, label, command).run)


@attrs.define(eq=False)
class _Borrower:
    """One command, and the memory that is borrowed for it."""

    url: str
    api_key: str | None
    size: int
    """Bytes."""
    device: str | None
    label: str
    """What others see in the line, and as the holder of the memory."""
    command: Sequence[str]
    _code: int = 0
    _child: trio.Process | None = None
    _waiting: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    """Cancelled when the memory is there."""
    _running: trio.Event = attrs.field(factory=trio.Event)

    async def run(self) -> int:
        """See `run` above."""
        wish = {"memory": self.size, "device": self.device, "label": self.label}
        failure: TrioswapError | None = None
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._take_signals, signals, nursery.cancel_scope)
                nursery.start_soon(self._tell_of_waiting)
                try:
                    async with memory_loan(self.url, self.api_key, wish) as loan:
                        self._waiting.cancel(reason="the memory is there")
                        self._code = await self._run_command(loan)
                except TrioswapError as exc:  # expected: carried out as a value
                    failure = exc
                nursery.cancel_scope.cancel(reason="all is over")
        if failure is not None:
            raise failure
        return self._code

    async def _run_command(self, loan: Loan) -> int:
        try:
            self._child = await trio.lowlevel.open_process(self.command, env={**os.environ, **loan.environment})
        except OSError as exc:
            raise Misuse(f"cannot run {shown(self.command[0])}: {exc.strerror or exc}") from exc
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tell_of_the_end, loan)
            self._running.set()
            code = await self._child.wait()
            nursery.cancel_scope.cancel(reason="the command has ended")
        return code if code >= 0 else 128 - code

    async def _take_signals(self, signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
        """A signal ends the waiting; afterwards it is the command's."""
        async for number in signals:
            if not self._waiting.cancel_called:
                self._code = 128 + number
                scope.cancel(reason="a signal came before the memory")
                return
            await self._running.wait()
            assert self._child is not None
            if number == signal.SIGTERM:  # Ctrl-C has reached it already: it is in our process group
                self._child.terminate()

    async def _tell_of_waiting(self) -> None:
        with self._waiting:
            await trio.sleep(SILENCE)
            row = await trio.to_thread.run_sync(self._own_row, abandon_on_cancel=True)
            _say(f"waiting for {amount(self.size)}{place_in_line(row) if row else ' ...'}")

    def _own_row(self) -> dict[str, Any] | None:
        try:
            with daemon_client(self.url, self.api_key) as client:
                return dict(client.get(f"/api/queue/{quote(self.label, safe='')}").json())
        except (TrioswapError, ValueError):
            return None

    async def _tell_of_the_end(self, loan: Loan) -> None:
        await loan.wait_ended()
        _say(f"the daemon at {self.url} has gone, and holds no memory any more; the command goes on")


def _say(text: str) -> None:
    sys.stderr.write(f"trioswap: {text}\n")
    sys.stderr.flush()
