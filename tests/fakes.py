"""Stand-ins that pass the same contract tests as what they stand for (test_supervised.py)."""

from __future__ import annotations

import random
from collections.abc import Callable

import attrs
import trio

from trioswap.config import Config, GroupConfig, ModelConfig
from trioswap.errors import StartFailed, UpstreamFailed
from trioswap.group import SwapGroup
from trioswap.fleet import policy_of
from trioswap.process import Report
from trioswap.residency import NOTHING, Holding
from trioswap.residency.groups import Groups
from trioswap.scheduler import Scheduler


@attrs.define(eq=False)
class FakeUpstream:
    """The way to a fake server: answers with the server's name, and fails once the server is gone."""

    model: str
    alive: bool = True
    closed: bool = False

    def answer(self) -> str:
        """What the server says; only a live one says anything."""
        if not self.alive:
            raise UpstreamFailed(self.model, "it is gone", before_first_byte=True)
        return self.model

    def close(self) -> None:
        self.closed = True


@attrs.define(eq=False)
class Script:
    """How fake servers behave, and what has happened to them."""

    load: float = 5.0
    stop: float = 2.0
    sweep: float = 0.0
    """How long what a dead server left lives on."""
    fails: bool = False
    stays_stuck: bool = False
    rng: random.Random | None = None
    """Sprinkles checkpoints where real code would wait for the kernel."""
    alive: dict[str, FakeProcess] = attrs.field(factory=dict)
    """Servers whose processes exist, by model."""
    trace: list[tuple[float, str]] = attrs.field(factory=list)
    on_spawn: Callable[[str], None] = lambda name: None

    def supervise(self, spec: ModelConfig, attempt: int, holding: Holding = NOTHING) -> FakeProcess:
        return FakeProcess(spec, attempt, self)

    def say(self, text: str) -> None:
        self.trace.append((trio.current_time(), text))

    async def dither(self) -> None:
        """Let others run a few times."""
        for _ in range(self.rng.randrange(3) if self.rng else 0):
            await trio.lowlevel.checkpoint()


@attrs.define(eq=False)
class FakeProcess:
    """`process.ModelProcess` without a process: times are scripted."""

    spec: ModelConfig
    attempt: int
    script: Script
    stuck: bool = False
    _crash: trio.Event = attrs.field(factory=trio.Event)
    _gone: trio.Event = attrs.field(factory=trio.Event)
    upstream: FakeUpstream | None = None

    def crash(self) -> None:
        """Die by itself."""
        self._crash.set()

    def die_after_all(self) -> None:
        """End a process that was stuck."""
        self._gone.set()

    async def run(self, *, task_status: Report) -> StartFailed | None:
        script, name = self.script, self.spec.name
        await script.dither()
        assert name not in script.alive, f"two processes of {name}"
        script.on_spawn(name)
        script.alive[name] = self
        script.say(f"{name} spawned")
        try:
            with trio.move_on_after(script.load) as loaded:
                await self._crash.wait()
            if script.fails or not loaded.cancelled_caught:
                return StartFailed(name, "it was told to fail")
            script.say(f"{name} ready")
            self.upstream = FakeUpstream(name)
            task_status.started(self.upstream)
            await self._crash.wait()
            self.upstream.alive = False
            task_status.died()
            await trio.sleep(self.script.sweep)
            return None
        finally:
            with trio.CancelScope(shield=True):
                await self._end()

    async def _end(self) -> None:
        if self.upstream is not None:
            self.upstream.alive = False
        if not self._crash.is_set():
            await trio.sleep(self.script.stop)
        await self.script.dither()
        if self.script.stays_stuck:
            self.stuck = True
            return
        del self.script.alive[self.spec.name]
        self.script.say(f"{self.spec.name} gone")

    def pids(self) -> list[int]:
        return []

    async def wait_gone(self) -> None:
        await self._gone.wait()
        del self.script.alive[self.spec.name]


def spec(name: str, **changes: object) -> ModelConfig:
    """A model as the configuration would describe it."""
    return ModelConfig(name, (f"serve-{name}",), "http://127.0.0.1:5800", **changes)  # type: ignore[arg-type]


def make_group(script: Script, *groups: GroupConfig, kind: type[SwapGroup] = SwapGroup, **changes: object) -> SwapGroup:
    """A swap group of fakes; without groups, models a, b and c one at a time."""
    groups = groups or (GroupConfig("(default)", ("a", "b", "c")),)
    models = {name: spec(name, **changes) for group in groups for name in group.members}
    config = Config(models, groups)
    policies = {name: policy_of(config, model) for name, model in models.items()}
    return kind(models, Scheduler(policies, Groups(groups)), script.supervise)
