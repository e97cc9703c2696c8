"""The machine's memories: which there are, how much is free, how much a family of processes uses.

Looking is all that happens here, with synchronous reads and no state but the list of devices: 10 processes
take half a millisecond on a slow machine without a GPU.  But a driver that is wedged never answers, so whoever shares
a thread with others looks through `Machine.in_time`.  Who may have how much is the business of `residency`,
which processes belong to a server that of `proctree`.

Not seen: processes in containers whose pids we do not have (a server started through docker
is no child of ours), so what they use is somebody else's to us.  From inside a container with pids of its own
NVIDIA's GPUs can be counted but not by process.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Final, Protocol, TypeVar

import attrs
import trio

from trioswap.devices import drm, host, nvidia
from trioswap.devices.base import RAM, Device, Roots

__all__ = ["RAM", "Device", "Gauge", "Machine", "Roots", "wait_returned"]

T = TypeVar("T")

logger = logging.getLogger(__name__)

# Seconds after which we go on without an answer; some milliseconds are usual, and who was only late is asked again.
LOOK_WAIT: Final = 3.0


class _Accelerators(Protocol):
    """GPUs that are asked in the same way."""

    devices: tuple[Device, ...]
    hidden: bool

    def free(self) -> dict[str, int]: ...

    def used_by(self, pids: Iterable[int]) -> dict[str, int]: ...


@attrs.define(eq=False)
class Machine:
    """This machine; `discover` comes first."""

    roots: Roots = attrs.field(factory=Roots)
    nvml: ModuleType | None = attrs.field(factory=nvidia.load, repr=False)
    """`pynvml`, initialised; None: NVIDIA's GPUs are not measured."""
    devices: tuple[Device, ...] = attrs.field(default=(), init=False)
    unmeasured: bool = attrs.field(default=False, init=False)
    """There is a GPU of which nobody tells how much memory it has, or who uses it.

    Then footprints that were learned are not to be trusted.  Also where there is no /proc to ask (macOS).
    An integrated GPU that works in the host's memory is no such GPU; what it holds counts as `ram`.
    """
    late: bool = attrs.field(default=False, init=False)
    """A look hangs, and nobody has had an answer since."""
    _accelerators: tuple[_Accelerators, ...] = attrs.field(default=(), init=False, repr=False)
    _looking: trio.CapacityLimiter = attrs.field(factory=lambda: trio.CapacityLimiter(1), init=False, repr=False)
    """Has one token; a look that was given up has it until the driver answers after all."""
    _turns: trio.Lock = attrs.field(factory=trio.Lock, init=False, repr=False)
    """One look at a time."""

    def discover(self) -> tuple[Device, ...]:
        """Look which memories there are: the GPUs' first, then the host's."""
        present = drm.nodes(self.roots)
        drawing = any(node.vendor == drm.NVIDIA for node in present)
        nvidias = nvidia.find(self.nvml, self.roots, on_the_bus=drawing)
        others = drm.find(self.roots, present, first=len(nvidias.devices))
        memory = host.total(self.roots)
        ram = () if memory is None else (Device(RAM, "host", memory, measurable=True),)
        self._accelerators = (nvidias, others)
        self.devices = (*nvidias.devices, *others.devices, *ram)
        told = bool(ram) and all(device.measurable for device in self.devices)
        self.unmeasured = not told or nvidias.hidden or others.hidden
        return self.devices

    def free(self) -> Mapping[str, int]:
        """Bytes free now of each device.  One that does not answer (a lost GPU, say) is missing.

        Weights that are mapped from files are not free, so that "all, less what is free, less what our servers use"
        is what others use.
        """
        gpus = [accelerators.free() for accelerators in self._accelerators]
        ram = host.free(self.roots) if any(device.name == RAM for device in self.devices) else None
        return _sum([*gpus, {} if ram is None else {RAM: ram}])

    def used_by(self, pids: Iterable[int]) -> Mapping[str, int]:
        """Bytes that the processes of one server use now of each device.

        One that cannot be told is missing; 0 means that it was told.  Ask when the server is ready:
        while it loads, weights on their way to a GPU can be in the host's memory as well.
        """
        family = tuple(pids)
        gpus = [accelerators.used_by(family) for accelerators in self._accelerators]
        return _sum([{RAM: host.resident(self.roots, family)}, *gpus])

    async def in_time(self, look: Callable[[], T]) -> T | None:
        """What *look* at this machine finds, in a thread; None: that takes longer than `LOOK_WAIT`.

        While one hangs no other is begun, and the answer is None at once.
        """
        async with self._turns:  # who waits here waits for drivers that answer
            if self.late and self._looking.borrowed_tokens:
                return None
            with trio.move_on_after(LOOK_WAIT):
                try:
                    found = await trio.to_thread.run_sync(look, abandon_on_cancel=True, limiter=self._looking)
                except RuntimeError as exc:  # "can't start new thread"
                    logger.warning("the memory could not be looked at: %s", exc)
                    return None
                if self.late:
                    logger.warning("the memory can be looked at again")
                self.late = False
                return found
            if not self.late:
                logger.error("no answer about the memory within %g s: what was known last counts", LOOK_WAIT)
            self.late = True
            return None


def _sum(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total = dict[str, int]()
    for part in parts:
        for name, size in part.items():
            total[name] = total.get(name, 0) + size
    return total


# ---- the memory of an ended server ----------------------------------------------------------


class Gauge(Protocol):
    """What tells how much is free: a `Machine`."""

    def free(self) -> Mapping[str, int]:
        """Bytes of each device."""
        ...

    async def in_time(self, look: Callable[[], T]) -> T | None:
        """What *look* finds; None: it does not come back."""
        ...


# Seconds between looks.  A driver gives memory back within milliseconds of the end of the process, mostly.
FIRST_PAUSE: Final = 0.02
LAST_PAUSE: Final = 0.25
# What may be missing: other programs take some meanwhile, and what was expected is an estimate.
TOLERATED_PART: Final = 0.1
TOLERATED_BYTES: Final = 256 * 2**20


async def wait_returned(gauge: Gauge, before: Mapping[str, int], expected: Callable[[], Mapping[str, int]]) -> None:
    """Return when the GPUs have the memory of ended servers back, or nearly.

    A driver frees it some time after the process is gone, and who is started too early finds it taken.  *before*
    is what was free while the servers had their memory, *expected* what all had that have ended by then, both in
    bytes.  Never waits for `ram`, which the kernel has back once the process is reaped, nor for a device that does
    not answer, or not in time.

    Waits for ever if something else took the memory: put a cancel scope around it.
    """

    def goals() -> dict[str, int]:
        return {
            device: before[device] + size - max(TOLERATED_BYTES, int(size * TOLERATED_PART))
            for device, size in expected().items()
            if device != RAM and device in before
        }

    pause = FIRST_PAUSE
    await trio.lowlevel.checkpoint()
    while goals() and not _reached(goals(), await gauge.in_time(gauge.free) or {}):
        await trio.sleep(pause)
        pause = min(2 * pause, LAST_PAUSE)


def _reached(goals: Mapping[str, int], free: Mapping[str, int]) -> bool:
    return all(free.get(device, goal) >= goal for device, goal in goals.items())
