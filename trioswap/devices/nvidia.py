"""NVIDIA's GPUs, as its management library NVML tells of them.

Through `pynvml` of the package nvidia-ml-py, which is optional: without it an NVIDIA GPU
cannot be measured, and nothing else is tried.  No error of it leaves this module.  A driver that was
updated under a running library, or a GPU that fell off the bus, means that something cannot be told.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any, TypeVar

import attrs

from trioswap.devices.base import RAM, Device, Roots, entries

T = TypeVar("T")


def load() -> ModuleType | None:
    """`pynvml`, ready for use; None when it is not installed or finds no driver that it can talk to.

    May block for seconds where the driver puts idle GPUs to sleep (no persistence mode); no question does later.
    """
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None
    return nvml if _ask(nvml, _initialised) else None


@attrs.frozen
class Gpu:
    """One GPU as the library knows it."""

    handle: Any  # an opaque pointer of the library
    address: str
    """PCI, by which CUDA numbers them when told to."""
    uuid: str
    total: int
    """Bytes of its own; 0: it works in the host's memory."""


@attrs.define(eq=False)
class Nvidia:
    """The GPUs that were there when we looked."""

    nvml: ModuleType | None
    devices: tuple[Device, ...]
    hidden: bool
    """There is a GPU of which not enough can be told."""
    _gpus: Sequence[tuple[str, Gpu]] = attrs.field(repr=False)
    """Each with the name of the device that it takes memory of."""
    _processes: bool
    """What single processes use can be told."""

    def free(self) -> dict[str, int]:
        """Bytes free of each device; those that do not answer are missing."""
        answers = {device: _ask(self.nvml, _memory, gpu.handle) for device, gpu in self._gpus}
        return {device: memory[1] for device, memory in answers.items() if memory is not None}

    def used_by(self, pids: Iterable[int]) -> dict[str, int]:
        """Bytes that the processes use of each device; those that do not answer are missing.

        With the multi-process service (MPS), NVML shows its server in the place of the clients.
        """
        family, used = frozenset(pids), dict[str, int]()
        for device, gpu in self._gpus if self._processes else ():
            if (size := _ask(self.nvml, _used, gpu.handle, family)) is not None:
                used[device] = used.get(device, 0) + size
        return used


def find(nvml: ModuleType | None, roots: Roots, *, on_the_bus: bool) -> Nvidia:
    """Look for GPUs; *on_the_bus*: the kernel shows one to whoever draws, whatever its driver.

    A GPU in MIG mode is hidden: it is several, and they are not told apart here.
    """
    gpus = _ask(nvml, _gpus) or []
    told = sorted((gpu for gpu in gpus if gpu is not None), key=lambda gpu: gpu.address)
    own = [gpu for gpu in told if gpu.total]
    named = [(f"gpu{index}", gpu) for index, gpu in enumerate(own)]
    devices = tuple(_device(name, gpu, roots) for name, gpu in named)
    there = on_the_bus or any(_is_gpu(entry.name) for entry in entries(roots.dev))
    shared = [(RAM, gpu) for gpu in told if not gpu.total]
    processes = roots.pids_are_global
    hidden = len(told) < len(gpus) or (there and not gpus) or (bool(shared) and not processes)
    return Nvidia(nvml, devices, hidden, [*named, *shared], processes)


def _device(name: str, gpu: Gpu, roots: Roots) -> Device:
    """With the variables that CUDA reads (CUDA programming guide, "CUDA Environment Variables").

    The unique id names the GPU whatever the order.  The order is set for those that
    get an index from somebody else: by default CUDA numbers the fastest first, and everyone else by PCI address.
    """
    environment = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": gpu.uuid}
    return Device(name, "nvidia", gpu.total, roots.pids_are_global, environment)


def _is_gpu(name: str) -> bool:
    """Whether an entry of /dev is a GPU: nvidia0, ..., or that of Windows under its Linux."""
    return re.fullmatch(r"nvidia\d+|dxg", name) is not None


# ---- questions to the library -----------------------------------------------------------


def _ask(nvml: ModuleType | None, question: Callable[..., T], *arguments: Any) -> T | None:
    """The answer, or None when there is no library or it fails."""
    if nvml is None:
        return None
    # Raised when the driver lacks a function; the package has it since 12.555 or so, and older ones are about.
    mismatch = getattr(nvml, "NVMLLibraryMismatchError", nvml.NVMLError)
    try:
        return question(nvml, *arguments)
    except (nvml.NVMLError, mismatch):
        return None


def _initialised(nvml: ModuleType) -> bool:
    nvml.nvmlInit()
    return True


def _gpus(nvml: ModuleType) -> list[Gpu | None]:
    """All there are; None for one that nothing can be told about."""
    return [_ask(nvml, _gpu, index) for index in range(nvml.nvmlDeviceGetCount())]


def _gpu(nvml: ModuleType, index: int) -> Gpu | None:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    if _is_partitioned(nvml, handle):
        return None
    address = str(nvml.nvmlDeviceGetPciInfo(handle).busId).lower()
    return Gpu(handle, address, str(nvml.nvmlDeviceGetUUID(handle)), _memory(nvml, handle)[0])


def _is_partitioned(nvml: ModuleType, handle: Any) -> bool:
    try:
        current, _ = nvml.nvmlDeviceGetMigMode(handle)
    except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound):  # no such GPU, a driver from before MIG
        return False
    return bool(current == nvml.NVML_DEVICE_MIG_ENABLE)


def _memory(nvml: ModuleType, handle: Any) -> tuple[int, int]:
    """Bytes in all and free.  GPUs that share the host's memory do not support the question (GB10, say)."""
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    except nvml.NVMLError_NotSupported:
        return 0, 0
    return int(memory.total), int(memory.free)


def _used(nvml: ModuleType, handle: Any, family: frozenset[int]) -> int | None:
    """Bytes that the processes use; None when the driver says that one uses it, but not how much."""
    computing = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    drawing = nvml.nvmlDeviceGetGraphicsRunningProcesses(handle)
    # Whoever does both is in both lists, each time with all that it uses.
    sizes = {process.pid: process.usedGpuMemory for process in (*computing, *drawing) if process.pid in family}
    return None if None in sizes.values() else sum(sizes.values())
