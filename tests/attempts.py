"""One call of a supervised process's `run`, watched: what it reports, how it ends, what it leaves."""

from __future__ import annotations

import itertools
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import attrs
import trio
from children import PATIENCE

from trioswap import proctree
from trioswap.config import ModelConfig
from trioswap.errors import StartFailed
from trioswap.logs import Logs
from trioswap.process import ModelProcess, Supervised
from trioswap.remote import Prober
from trioswap.upstream import Upstream

_numbers = itertools.count(1)


@attrs.define(eq=False)
class Trial:
    """One run of a supervised process; it takes the report of readiness itself."""

    process: Supervised
    on_ready: Callable[[], None] = lambda: None
    """Called in the very step that reports readiness."""
    upstreams: list[Upstream] = attrs.field(factory=list)
    """What was reported, each time it was."""
    deaths: int = 0
    """How often it was reported to have ended by itself."""
    why: str = ""
    """What was said of it then."""
    idle: Callable[[], bool] = lambda: True
    """Whether the server has nothing to do."""
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    result: StartFailed | None = None
    _settled: trio.Event = attrs.field(factory=trio.Event)
    _over: trio.Event = attrs.field(factory=trio.Event)

    def started(self, value: Upstream) -> None:
        self.upstreams.append(value)
        self._settled.set()
        self.on_ready()

    def died(self, why: str = "") -> None:
        self.deaths += 1
        self.why = why

    def is_idle(self) -> bool:
        return self.idle()

    async def run(self) -> StartFailed | None:
        """Run the process to its end, or until the scope is cancelled."""
        with self.scope:
            self.result = await self.process.run(task_status=self)
        self._settled.set()
        self._over.set()
        return self.result

    @asynccontextmanager
    async def under_way(self) -> AsyncIterator[None]:
        """Run the process beside the block; at the end of the block it is stopped."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.run)
            yield
            self.scope.cancel(reason="the block is over")

    async def wait_ready(self) -> Upstream:
        """The way to the server, once it is ready; it must become so."""
        with trio.fail_after(PATIENCE):
            await self._settled.wait()
        assert self.upstreams, f"not ready: {self.result}"
        return self.upstreams[-1]

    async def wait_over(self) -> StartFailed | None:
        """What `run` returned, once it has; it must do so by itself."""
        with trio.fail_after(PATIENCE):
            await self._over.wait()
        assert not self.scope.cancel_called
        return self.result

    @property
    def over(self) -> bool:
        return self._over.is_set()


@attrs.define(eq=False, kw_only=True)
class Attempt(Trial):
    """A run of a real server."""

    process: ModelProcess
    logs: Logs

    @property
    def port(self) -> int:
        """Where the server is asked for."""
        return int(self.process.spec.proxy.rpartition(":")[2])

    @property
    def output(self) -> str:
        """What the child has said, as far as it is kept."""
        return self.logs.of("m").history().decode()

    async def said(self, text: str) -> None:
        """Wait until the child has said it; it must do so before it ends."""
        seen = b""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._cancel_when_over, nursery.cancel_scope)
            with self.logs.of("m").follow() as news, trio.fail_after(PATIENCE):
                while text.encode() not in seen:
                    seen += await anext(news)
            nursery.cancel_scope.cancel(reason="it has been said")
        assert text.encode() in seen, f"{seen[-1000:]!r} {self.result}"

    async def _cancel_when_over(self, scope: trio.CancelScope) -> None:
        await self._over.wait()
        scope.cancel(reason="the child is gone")

    @property
    def family(self) -> list[proctree.Process]:
        """Every process of this attempt that exists."""
        return proctree.members(self.process.pid or -1, self.process.marker)

    @property
    def nothing_left(self) -> bool:
        """No process of the attempt is alive, and none is a zombie."""
        return not self.family and (self.process.pid is None or is_reaped(self.process.pid))


def attempt(
    argv: tuple[str, ...], prober: Prober, *, port: int = 1, logs: Logs | None = None, **changes: object
) -> Attempt:
    """An attempt at running *argv* as model m; *changes* are fields of its configuration."""
    spec = ModelConfig("m", argv, f"http://127.0.0.1:{port}", **changes)  # type: ignore[arg-type]
    logs = logs or Logs()
    return Attempt(
        process=ModelProcess(spec, f"attempt-{os.getpid()}-{next(_numbers)}", logs, prober),
        logs=logs,
    )


def is_reaped(pid: int) -> bool:
    """Whether the pid is no child of ours, not even a dead one."""
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return True
    return False
