"""The host's memory: how much there is, how much is free, how much processes hold.

Weights that a server maps from a file (llama.cpp does) are page cache, which the kernel may drop at
any time; but then the model reads its weights from disk for every token.  So here they are memory in use, for
as long as somebody has them mapped: they count for the process, and they are not free.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import attrs

from trioswap.devices.base import Roots, number, quantities, text


def total(roots: Roots) -> int | None:
    """Bytes of memory, or what our cgroups allow if that is less; None without a /proc."""
    installed = quantities(text(roots.proc / "meminfo")).get("MemTotal")
    if installed is None:
        return None
    return min([installed, *(group.limit for group in _groups(roots))])


def free(roots: Roots) -> int | None:
    """Bytes that could be taken without swapping, within the limits of our cgroups; None: it cannot be read now.

    What the kernel calls available, less what is mapped from files: see above.
    """
    info = quantities(text(roots.proc / "meminfo"))
    if "MemAvailable" not in info:  # for want of descriptors, say: that is not the same as none free
        return None
    unmapped = info["MemAvailable"] - _mapped_files(info.get("Mapped", 0), info.get("Shmem", 0))
    return max(0, min([unmapped, *(group.free() for group in _groups(roots))]))


def resident(roots: Roots, pids: Iterable[int]) -> int:
    """Bytes of memory that the processes of one family hold; those that are gone hold none.

    Private pages add up.  Of the mapped and shared ones the largest part of any one process
    counts, because the workers of a server map the same libraries, weights and buffers.  The exact answer would
    be Pss in smaps_rollup, but that walks through all page tables: 3 ms per GiB of private and 6 to 9 ms per
    GiB of mapped pages on a slow machine, half a second for a large model, while it cannot map memory.
    Reading status takes 10 us, whatever the size; its counters may lag by some MiB before Linux 6.16.

    While llama.cpp loads into a GPU, the whole file is mapped for a time; what
    does not stay in host memory is unmapped at the end.  So ask when the server is ready.
    """
    found = [quantities(text(roots.proc / str(pid) / "status")) for pid in pids]
    private = sum(status.get("RssAnon", 0) for status in found)
    return private + sum(max((status.get(key, 0) for status in found), default=0) for key in ("RssFile", "RssShmem"))


def _mapped_files(mapped: int, shared: int) -> int:
    """Bytes mapped from files.  The kernel counts shared memory as mapped too, and never as available."""
    return max(0, mapped - shared)


# ---- cgroups --------------------------------------------------------------------------


@attrs.frozen
class _Dialect:
    """The names of the same things in the two versions (kernel documentation, admin-guide/cgroup-v2 and cgroup-v1)."""

    limit: str
    usage: str
    prefix: str
    """Of what counts a group with those below it, in memory.stat."""
    mapped: str


_V2: Final = _Dialect("memory.max", "memory.current", "", "file_mapped")
_V1: Final = _Dialect("memory.limit_in_bytes", "memory.usage_in_bytes", "total_", "mapped_file")


@attrs.frozen
class _Group:
    """A cgroup that limits memory."""

    path: Path
    dialect: _Dialect
    limit: int

    def free(self) -> int:
        """Bytes, with the same meaning as for the whole machine."""
        names = self.dialect
        stat = quantities(text(self.path / "memory.stat"))

        def counted(key: str) -> int:
            return stat.get(names.prefix + key, 0)

        cache = counted("active_file") + counted("inactive_file")
        kept = _mapped_files(counted(names.mapped), counted("shmem"))
        return self.limit - (number(self.path / names.usage) or 0) + max(0, cache - kept)


def _groups(roots: Roots) -> Iterator[_Group]:
    """Our cgroup and those above it, as far as they have a limit.

    The path in /proc/self/cgroup may name directories that are not in our mount of the hierarchy (a
    container without a cgroup namespace); its top is the container's own group then, and is always asked.
    """
    for top, path, dialect in _memberships(roots):
        here = top / path
        for group in (here, *here.parents):
            if group.is_relative_to(top) and (limit := number(group / dialect.limit)) is not None:
                yield _Group(group, dialect, limit)


def _memberships(roots: Roots) -> Iterator[tuple[Path, str, _Dialect]]:
    for line in text(roots.proc / "self" / "cgroup").splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if line.startswith("0::"):
            yield roots.cgroup, path.lstrip("/"), _V2
        elif "memory" in controllers.split(","):
            yield roots.cgroup / "memory", path.lstrip("/"), _V1
