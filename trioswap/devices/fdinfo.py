"""What processes hold of AMD's and Intel's GPUs: /proc/PID/fdinfo of their connections to the DRM subsystem.

The format is laid down in the kernel documentation, gpu/drm-usage-stats.  Which GPU is which device is the business
of `drm`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from trioswap.devices.base import Roots, entries, link, quantities, text

_OWNER: Final = re.compile(r"^drm-pdev:[ \t]*(\S+)", re.MULTILINE)


def clients(roots: Roots, pids: Iterable[int]) -> Iterator[tuple[str, int, int]]:
    """What each connection holds: the GPU's PCI address, bytes of its own memory, bytes of the host's.

    A connection that several descriptors or processes share comes once; its id is unique on its GPU.
    """
    seen = set()
    for file in _descriptors(roots, pids):
        content = text(file)
        values, owner = quantities(content), _OWNER.search(content)
        if owner is not None and (client := (owner[1], values.get("drm-client-id"))) not in seen:
            seen.add(client)
            yield owner[1], *_split(values)


def _descriptors(roots: Roots, pids: Iterable[int]) -> Iterator[Path]:
    """The fdinfo files of what is open below /dev/dri."""
    below = str(roots.dev / "dri") + "/"
    for pid in pids:
        process = roots.proc / str(pid)
        yield from (process / "fdinfo" / fd.name for fd in entries(process / "fd") if link(fd).startswith(below))


def _split(values: dict[str, int]) -> tuple[int, int]:
    """Bytes in the GPU's own memory and in the host's.

    `resident` is what is there now, `memory` amdgpu's older name for it, and `total` all that was asked for.
    Regions: amdgpu has vram, gtt and cpu; xe has vram0, ..., gtt and system; i915's system0 is the host's.
    """
    regions = dict[str, int]()
    for standing in ("drm-total-", "drm-memory-", "drm-resident-"):  # the better ones later
        regions |= {key.removeprefix(standing): size for key, size in values.items() if key.startswith(standing)}
    own = sum(size for region, size in regions.items() if region.startswith("vram"))
    host = sum(size for region, size in regions.items() if region in {"gtt", "cpu", "system", "system0"})
    return own, host
