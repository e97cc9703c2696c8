"""Stand-ins that pass the same contract tests as what they stand for (test_supervised.py, test_memory.py)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import attrs
import trio

from trioswap.arrangement import policy_of, residency_of
from trioswap.config import Config, GroupConfig, MemoryConfig, ModelConfig
from trioswap.devices import RAM, Device
from trioswap.errors import StartFailed, UpstreamFailed
from trioswap.group import SwapGroup
from trioswap.memory import Memory
from trioswap.process import Report
from trioswap.residency import NOTHING, Holding
from trioswap.residency.budget import Budget
from trioswap.scheduler import Scheduler

T = TypeVar("T")


@attrs.define(eq=False)
class FakeMachine:
    """`devices.Machine` without a machine: who uses what is said by the test."""

    totals: Mapping[str, int]
    """device -> bytes; "ram", or the name of an NVIDIA GPU."""
    unmeasured: bool = False
    uses: dict[int, Holding] = attrs.field(factory=dict)
    """pid -> bytes of each device."""
    foreign: Holding = NOTHING
    """What programs use that are not ours."""
    looks: int = 0
    late: bool = False

    @property
    def devices(self) -> tuple[Device, ...]:
        return tuple(
            Device(name, "host" if name == RAM else "nvidia", total, measurable=True, environment=_visible(name))
            for name, total in self.totals.items()
        )

    def discover(self) -> tuple[Device, ...]:
        return self.devices

    def free(self) -> dict[str, int]:
        used = self.used_by(self.uses)
        return {name: total - used[name] - self.foreign.get(name, 0) for name, total in self.totals.items()}

    def used_by(self, pids: Iterable[int]) -> dict[str, int]:
        self.looks += 1
        ours = [self.uses.get(pid, NOTHING) for pid in pids]
        return {name: sum(used.get(name, 0) for used in ours) for name in self.totals}

    async def in_time(self, look: Callable[[], T]) -> T | None:
        return look()


def _visible(name: str) -> dict[str, str]:
    return {} if name == RAM else {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": f"GPU-of-{name}"}


@attrs.define(eq=False)
class FakeUpstream:
    """The way to a fake server: answers with the server's name, and fails once the server is gone."""

    model: str
    alive: bool = True
    closed: bool = False
    timeouts: object = None

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
    runs_out: bool = False
    """Starts fail for want of memory."""
    stays_stuck: bool = False
    rng: random.Random | None = None
    """Sprinkles checkpoints where real code would wait for the kernel."""
    alive: dict[str, FakeProcess] = attrs.field(factory=dict)
    """Servers whose processes exist, by model."""
    trace: list[tuple[float, str]] = attrs.field(factory=list)
    on_spawn: Callable[[str], None] = lambda name: None
    machine: FakeMachine | None = None
    """Where servers take their memory."""
    uses: dict[str, Holding] = attrs.field(factory=dict)
    """What servers use once they are ready, by model; others what they may."""

    def supervise(self, spec: ModelConfig, attempt: int, holding: Holding = NOTHING) -> FakeProcess:
        return FakeProcess(spec, attempt, self, holding)

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
    holding: Holding = NOTHING
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
            if script.fails or script.runs_out or not loaded.cancelled_caught:
                return StartFailed(name, "it was told to fail", out_of_memory=script.runs_out)
            script.say(f"{name} ready")
            if script.machine is not None:
                script.machine.uses[self.attempt] = script.uses.get(name, self.holding)
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
        self._vanish()
        self.script.say(f"{self.spec.name} gone")

    def _vanish(self) -> None:
        del self.script.alive[self.spec.name]
        if self.script.machine is not None:
            self.script.machine.uses.pop(self.attempt, None)

    def pids(self) -> list[int]:
        """One, with the number of the attempt."""
        return [self.attempt] if self.script.alive.get(self.spec.name) is self else []

    async def wait_gone(self) -> None:
        await self._gone.wait()
        self._vanish()


def spec(name: str, **changes: object) -> ModelConfig:
    """A model as the configuration would describe it, at an address of its own."""
    return ModelConfig(name, (f"serve-{name}",), f"http://{name}.localhost:5800", **changes)  # type: ignore[arg-type]


def make_group(
    script: Script,
    *groups: GroupConfig,
    kind: type[SwapGroup] = SwapGroup,
    budget: Budget | None = None,
    memory: Memory | None = None,
    **changes: object,
) -> SwapGroup:
    """A swap group of fakes; without groups and budget, models a, b and c one at a time.

    With a *budget*, or the *memory* that has one, its models.
    """
    budget = memory.budget if memory is not None else budget
    if budget is None:
        groups = groups or (GroupConfig("(default)", ("a", "b", "c")),)
    names = [name for group in groups for name in group.members] if budget is None else budget.footprints.wishes
    models = {name: spec(name, **changes) for name in names}
    config = Config(models, groups, memory=None if budget is None else MemoryConfig())
    policies = {name: policy_of(config, model) for name, model in models.items()}
    return kind(models, Scheduler(policies, residency_of(config, budget), budget=budget), script.supervise, memory)
