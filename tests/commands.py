"""The `trioswap` command as a real process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import attrs
import trio
from children import PATIENCE, read_until, running

TRIOSWAP = (sys.executable, "-m", "trioswap")
LISTENS = "trioswap listens on "


@attrs.frozen
class Daemon:
    """A daemon that accepts requests."""

    process: trio.Process
    url: str
    said: str
    """Its standard output so far."""

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    async def stop(self) -> int:
        """Send SIGTERM; return the exit code."""
        self.process.terminate()
        with trio.fail_after(PATIENCE):
            return await self.process.wait()


@asynccontextmanager
async def daemon(*arguments: str, until: str = "\n", env: Mapping[str, str] | None = None) -> AsyncIterator[Daemon]:
    """Run `trioswap ARGUMENTS` while the block runs, which begins when it listens and has then written *until*."""
    async with running((*TRIOSWAP, *arguments), env=env) as process:
        try:
            with trio.fail_after(PATIENCE):
                said = await read_until(process, LISTENS)
                while until not in said.partition(LISTENS)[2]:
                    said += await read_until(process, "\n")
            yield Daemon(process, said.partition(LISTENS)[2].partition("\n")[0], said)
        finally:
            # Not killed, or its model servers would be left; shielded, or a failed test would leave both.
            process.terminate()
            with trio.move_on_after(PATIENCE, shield=True):
                await process.wait()


async def trioswap(*arguments: str, stdout: int | None = None, **options) -> subprocess.CompletedProcess[str]:
    """Run `trioswap ARGUMENTS` to its end; what it wrote is text.  *stdout* is a descriptor to use instead."""
    output = {"capture_stdout": True} if stdout is None else {"stdout": stdout}
    with trio.fail_after(PATIENCE):
        done = await trio.run_process((*TRIOSWAP, *arguments), check=False, capture_stderr=True, **output, **options)
    return subprocess.CompletedProcess(done.args, done.returncode, (done.stdout or b"").decode(), done.stderr.decode())
