"""What a swap group keeps of each attempt at a model, and of each request that wants one."""

from __future__ import annotations

from collections.abc import Callable

import attrs
import trio

from trioswap.config import ModelConfig
from trioswap.errors import TrioswapError
from trioswap.inflight import Entry
from trioswap.process import Supervised
from trioswap.residency import NOTHING, Holding
from trioswap.upstream import Upstream

Supervise = Callable[[ModelConfig, int, Holding], Supervised]
"""Makes the process of one attempt at a model, which may use what it holds of each device."""


@attrs.define(eq=False)
class Run:
    """One attempt of one model, from `Start` until its task has ended."""

    spec: ModelConfig
    attempt: int
    holding: Holding = NOTHING
    """What it may use of each device, in bytes."""
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    quarantine: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    """Around the wait for a stuck process; cancelled when the daemon ends."""
    stuck: bool = False
    process: Supervised | None = None
    upstream: Upstream | None = None
    """The way to the server; None until it is ready."""
    free: Holding = NOTHING
    """Bytes of each device that were free beside it, when that was looked at last."""
    used: Holding = NOTHING
    """Its peak so far."""
    dead: trio.Event = attrs.field(factory=trio.Event)
    """Its server has ended, however it came to that; what it left may still be swept."""
    over: trio.Event = attrs.field(factory=trio.Event)
    """Its process tree is gone and its token given back, or it is stuck: nobody needs to wait any longer."""


@attrs.frozen
class Lease:
    """A request's right to a model: no swap stops it while this is held."""

    model: str
    attempt: int
    upstream: Upstream
    holding: Holding
    """What it may use of each device, in bytes."""
    dead: trio.Event
    """The server has ended: what one that died has set a moment later."""


@attrs.define(eq=False)
class Answer:
    """What the scheduler says to one ticket."""

    entry: Entry = attrs.field(factory=lambda: Entry(trio.CancelScope()))
    lease: Lease | None = None
    error: TrioswapError | None = None
    given: trio.Event = attrs.field(factory=trio.Event)
