"""What the parts of this package share: a device, where the kernel shows its files, and how they are read.

Every reader answers "nothing" for a file that is gone, closed to us or broken: processes end
and devices go while we look.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

import attrs

RAM: Final = "ram"
"""The name of the host's memory among the devices."""

Kind = Literal["host", "nvidia", "amd", "intel"]


@attrs.frozen
class Device:
    """A memory that models can be put into."""

    name: str
    """`ram`, or `gpu0`, `gpu1`, ...: NVIDIA's first, then AMD's, then Intel's, each by PCI address."""
    kind: Kind
    total: int
    """Bytes."""
    measurable: bool
    """It can be told how much of it a process uses."""
    environment: Mapping[str, str] = attrs.field(factory=dict)
    """What makes a child see only this one of the GPUs of its kind; empty for `ram`.

    Other vendors' GPUs are not hidden, because their runtimes ask other variables.  Vulkan is not
    told: `GGML_VK_VISIBLE_DEVICES` of llama.cpp takes numbers in the order in which the Vulkan
    loader and its layers list the GPUs, which cannot be known from here.
    """


@attrs.frozen
class Roots:
    """Where the kernel shows itself."""

    proc: Path = Path("/proc")
    sys: Path = Path("/sys")
    dev: Path = Path("/dev")
    cgroup: Path = Path("/sys/fs/cgroup")

    @property
    def pids_are_global(self) -> bool:
        """Our process ids are those of the machine: we are in its first pid namespace.

        Drivers that report pids mostly report these, whoever asks, so in a container that has
        its own they are other processes' numbers.  The first namespace has a fixed inode, PID_NS_INIT_INO
        (0xEFFFFFFC) in Linux's include/uapi/linux/nsfs.h.
        """
        return link(self.proc / "self" / "ns" / "pid") == "pid:[4026531836]"


def text(path: Path) -> str:
    """The content of a file; empty when it cannot be read."""
    try:
        return path.read_bytes().decode(errors="replace")
    except OSError:
        return ""


def number(path: Path) -> int | None:
    """The one number in a file; None when there is none ("max", say)."""
    content = text(path).strip()
    return int(content) if content.isascii() and content.isdecimal() else None


def link(path: Path) -> str:
    """Where a symbolic link points; empty when that cannot be read."""
    try:
        return str(path.readlink())
    except OSError:
        return ""


def entries(directory: Path) -> list[Path]:
    """What is in *directory*, in no order; empty when it cannot be read."""
    try:
        return list(directory.iterdir())
    except OSError:
        return []


_UNITS: Final = {"": 1, "kB": 2**10, "KiB": 2**10, "MiB": 2**20}
_QUANTITY: Final = re.compile(r"^(\S+?):?[ \t]+(\d+)(?:[ \t]+(kB|KiB|MiB))?[ \t]*$", re.MULTILINE | re.ASCII)


def quantities(content: str) -> dict[str, int]:
    """The lines of *content* that are a name and a number, with sizes in bytes.

    Fits /proc/meminfo and /proc/PID/status (whose kB is 1024 bytes, proc(5)), DRM's fdinfo
    (KiB and MiB, kernel documentation gpu/drm-usage-stats), and the keyed files of cgroups.
    """
    return {key: int(value) * _UNITS[unit] for key, value, unit in _QUANTITY.findall(content)}
