"""AMD's and Intel's GPUs, as Linux's DRM subsystem shows them in /sys and /proc.

What processes hold through them is read in `fdinfo`.  Which GPUs have memory of their own:

- Intel: an integrated one is always the PCI device 0000:00:02.0.  The size of others' memory stands in the
  file dmem.capacity of the topmost cgroup, for the driver xe since Linux 6.14.  Under i915
  and older kernels no file tells it, so such a GPU is hidden.
- AMD: `mem_info_vram_total` (kernel documentation, gpu/amdgpu/driver-misc).  In an APU that is a piece of the host's
  memory set aside at boot; where it is smaller than what the GPU may take of the rest, the driver puts
  everything there instead (`apu_prefer_gtt` in amdgpu_ttm.c), so such an APU has no memory of its own.  Vulkan fills
  the piece first all the same; that counts as host memory, so that a model needs the same
  wherever it lands.  Only APUs show a northbridge voltage, labelled vddnb (gpu/amdgpu/thermal).

What a GPU holds of the host's memory is in no process's resident memory; it is told as used of `ram`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

import attrs

from trioswap.devices.base import RAM, Device, Kind, Roots, entries, number, quantities, text
from trioswap.devices.fdinfo import clients

NVIDIA: Final = "0x10de"
_KINDS: Final[dict[str, Kind]] = {"0x1002": "amd", "0x8086": "intel"}
_INTEGRATED_INTEL: Final = "0000:00:02.0"


@attrs.frozen
class Node:
    """A GPU that programs can work with: it has a render node in /dev/dri."""

    address: str
    """PCI, as in 0000:03:00.0."""
    vendor: str
    path: Path
    """Its directory in /sys."""
    minor: int
    """The number of its render node."""


@attrs.frozen
class Card:
    """A GPU of AMD or Intel."""

    node: Node
    kind: Kind
    total: int | None
    """Bytes of its own; 0: it works in the host's memory; None: cannot be told."""


@attrs.define(eq=False)
class Drm:
    """The GPUs that were there when we looked."""

    roots: Roots
    devices: tuple[Device, ...]
    hidden: bool
    """There is a GPU whose memory nobody tells."""
    _names: dict[str, str]
    """PCI address -> device whose memory is the GPU's; not of hidden ones."""
    _cards: Sequence[Card] = attrs.field(repr=False)
    """In the order of `devices`."""

    def free(self) -> dict[str, int]:
        """Bytes free of each device; those of which it is not told (Intel's, by older kernels) are missing."""
        used = {device.name: self._taken(card) for device, card in zip(self.devices, self._cards, strict=True)}
        return {device.name: device.total - size for device in self.devices if (size := used[device.name]) is not None}

    def used_by(self, pids: Iterable[int]) -> dict[str, int]:
        """Bytes that the processes use of each device, and of `ram` through GPUs of either sort.

        A descriptor that several of them share counts once.  Processes whose descriptors we may not read (other
        users', without privileges) count as using nothing.
        """
        if not self._names:
            return {}
        family = tuple(pids)
        used = {device.name: 0 for device in self.devices} | {RAM: 0}
        for address, own, host in clients(self.roots, family):
            used[RAM] += host
            if (name := self._names.get(address)) is not None:
                used[name] += own
        for name, size in self._computing(family).items():
            used[name] = max(used[name], size)
        return used

    def _taken(self, card: Card) -> int | None:
        if card.kind == "amd":
            return number(card.node.path / "mem_info_vram_used")
        return _managed(self.roots, "current", card.node.address)

    def _computing(self, pids: Sequence[int]) -> dict[str, int]:
        """What ROCm's own driver says that the processes have of AMD's devices.

        It knows of memory that moves between host and GPU by itself, which no DRM client holds.
        """
        if not self.roots.pids_are_global:
            return {}
        numbers, used = dict(_compute_nodes(self.roots)), {}
        for device, card in zip(self.devices, self._cards, strict=True):
            if (gpu := numbers.get(card.node.minor)) is not None:
                files = (self.roots.sys / f"class/kfd/kfd/proc/{pid}/vram_{gpu}" for pid in pids)
                used[device.name] = sum(number(file) or 0 for file in files)
        return used


def nodes(roots: Roots) -> list[Node]:
    """The GPUs on PCI that have a render node, by address.  Others (of ARM boards) use the host's memory."""
    found = []
    for entry in entries(roots.sys / "class" / "drm"):
        path = (entry / "device").resolve()
        minor = entry.name.removeprefix("renderD")
        if minor.isdecimal() and _ADDRESS.fullmatch(path.name) and (roots.dev / "dri" / entry.name).exists():
            found.append(Node(path.name, text(path / "vendor").strip(), path, int(minor)))
    return sorted(found, key=lambda node: node.address)


def find(roots: Roots, present: Sequence[Node], first: int) -> Drm:
    """The GPUs of AMD and Intel among *present*, named from gpu*first* on."""
    cards = [Card(node, kind, _total(roots, node, kind)) for node, kind in _of_kinds(present)]
    own = [card for card in cards if card.total]
    own.sort(key=lambda card: card.kind)  # AMD's first; stable, so each kind stays in PCI order
    devices = tuple(_device(roots, f"gpu{first + at}", card, cards) for at, card in enumerate(own))
    names = {card.node.address: RAM for card in cards if card.total == 0}
    names |= {card.node.address: device.name for card, device in zip(own, devices, strict=True)}
    computes = (roots.dev / "kfd").exists() and not any(card.kind == "amd" for card in cards)
    hidden = computes or any(card.total is None for card in cards)
    return Drm(roots, devices, hidden, names, own)


# PCI domain, bus, device and function.
_ADDRESS: Final = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")


def _of_kinds(present: Iterable[Node]) -> Iterator[tuple[Node, Kind]]:
    return ((node, _KINDS[node.vendor]) for node in present if node.vendor in _KINDS)


def _total(roots: Roots, node: Node, kind: Kind) -> int | None:
    if kind == "intel":
        return 0 if node.address == _INTEGRATED_INTEL else _managed(roots, "capacity", node.address)
    total = number(node.path / "mem_info_vram_total")
    of_host = number(node.path / "mem_info_gtt_total") or 0
    if total is not None and total < of_host and _is_apu(node):
        return 0
    return total


def _is_apu(node: Node) -> bool:
    sensors = entries(node.path / "hwmon")
    return any(text(sensor / "in1_label").strip() == "vddnb" for sensor in sensors)


def _managed(roots: Roots, what: str, address: str) -> int | None:
    """Bytes of the GPU's own memory, from the topmost cgroup's dmem files (admin-guide/cgroup-v2, DMEM)."""
    regions = quantities(text(roots.cgroup / f"dmem.{what}"))
    sizes = [size for region, size in regions.items() if region.startswith(f"drm/{address}/vram")]
    return sum(sizes) if sizes else None


# ---- which GPU a child sees -----------------------------------------------------------


def _device(roots: Roots, name: str, card: Card, cards: Sequence[Card]) -> Device:
    assert card.total
    environment = _for_rocm(roots, card) if card.kind == "amd" else _for_level_zero(card, cards)
    return Device(name, card.kind, card.total, measurable=True, environment=environment)


def _for_rocm(roots: Roots, card: Card) -> dict[str, str]:
    """What ROCm reads ("GPU isolation techniques" in its documentation).

    ROCR_VISIBLE_DEVICES takes "GPU-" and the unique id, of cards that have one, or the number among the
    compute nodes.  HIP_VISIBLE_DEVICES counts those that are left then: it is the first.
    """
    unique = text(card.node.path / "unique_id").strip()
    minors = [minor for minor, _ in _compute_nodes(roots)]
    if unique.strip("0"):
        chosen = f"GPU-{unique.zfill(16)}"
    elif card.node.minor in minors:
        chosen = str(minors.index(card.node.minor))
    else:
        return {}  # ROCm does not know the card
    return {"ROCR_VISIBLE_DEVICES": chosen, "HIP_VISIBLE_DEVICES": "0"}


def _compute_nodes(roots: Roots) -> list[tuple[int, int]]:
    """Render minor and GPU number of AMD's GPUs, in the order in which ROCm's runtime numbers them."""
    found = []
    topology = entries(roots.sys / "class/kfd/kfd/topology/nodes")
    for node in sorted((node for node in topology if node.name.isdecimal()), key=lambda node: int(node.name)):
        gpu = number(node / "gpu_id")
        minor = quantities(text(node / "properties")).get("drm_render_minor")
        if gpu and minor:  # processors are nodes too, with zeros
            found.append((minor, gpu))
    return found


def _for_level_zero(card: Card, cards: Sequence[Card]) -> dict[str, str]:
    """What Intel's runtimes read (Level Zero specification, "Environment Variables"; oneAPI for the last).

    The mask counts all of Intel's GPUs, integrated ones too, by PCI address when told to order them so.
    ONEAPI_DEVICE_SELECTOR counts those that are left then: it is the first.
    """
    siblings = [other.node.address for other in cards if other.kind == "intel"]
    return {
        "ZE_ENABLE_PCI_ID_DEVICE_ORDER": "1",
        "ZE_AFFINITY_MASK": str(siblings.index(card.node.address)),
        "ONEAPI_DEVICE_SELECTOR": "level_zero:0",
    }
