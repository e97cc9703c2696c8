"""The `trioswap` command as a real process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import tomli_w
import trio
from children import PATIENCE, free_port, model_argv, read_until, running

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
    """Run `trioswap ARGUMENTS`; the block begins when it listens and has written *until*, and it ends with the block."""
    async with running((*TRIOSWAP, *arguments), env=env) as process:
        try:
            with trio.fail_after(PATIENCE):
                said = await read_until(process, LISTENS) + await read_until(process, until)
            yield Daemon(process, said.partition(LISTENS)[2].partition("\n")[0], said)
        finally:
            # Not killed, or its model servers would be left; shielded, or a failed test would leave both.
            process.terminate()
            with trio.move_on_after(PATIENCE, shield=True):
                await process.wait()


async def trioswap(*arguments: str, stdout: int = subprocess.PIPE, **options) -> subprocess.CompletedProcess[str]:
    """Run `trioswap ARGUMENTS` to its end; what it wrote is text."""
    with trio.fail_after(PATIENCE):
        done = await trio.run_process(
            (*TRIOSWAP, *arguments), check=False, stdout=stdout, stderr=subprocess.PIPE, **options
        )
    return subprocess.CompletedProcess(done.args, done.returncode, (done.stdout or b"").decode(), done.stderr.decode())


def write_config(directory: Path, models: Mapping[str, tuple[str, ...]], **settings: object) -> str:
    """A file that names scriptable model servers, name -> flags, and listens on a free port; its path."""
    tables = {name: _model(name, flags) for name, flags in models.items()}
    path = directory / "trioswap.toml"
    path.write_text(tomli_w.dumps({"listen": "127.0.0.1:0", **settings, "models": tables}))
    return str(path)


def _model(name: str, flags: tuple[str, ...]) -> dict[str, object]:
    port = free_port()
    return {"cmd": list(model_argv(name, *flags, port=port)), "proxy": f"http://127.0.0.1:{port}"}
