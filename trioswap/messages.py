"""The vocabulary between the scheduler and those who carry out its decisions.

Events are past tense: what happened.  Commands are imperative: what must be done about it.
"""

from __future__ import annotations

import enum
import math

import attrs

from trioswap.errors import StartFailed, TrioswapError
from trioswap.lifecycle import State
from trioswap.residency import NOTHING, Holding

# ---- events --------------------------------------------------------------------------------


@attrs.frozen
class Arrived:
    """A request for *model* came; *ticket* names it from now on.

    Its waiting counts *weight* times as fast; None: as the model's policy says.
    """

    ticket: int
    model: str
    weight: float | None = None


@attrs.frozen
class Left:
    """The request is over: served, rejected, cut or cancelled, wherever it was."""

    ticket: int
    served: bool = True
    """If it held a lease: it got what it came for, which proves that the server works."""


@attrs.frozen
class Drained:
    """Nothing is in flight on a model whose gate is closed, or its drain deadline has cut the rest."""

    model: str
    attempt: int


@attrs.frozen
class BecameReady:
    """The model server answered its readiness probe."""

    model: str
    attempt: int


@attrs.frozen
class Ended:
    """The supervised task of the attempt is over; *failure* is why a start did not become ready."""

    model: str
    attempt: int
    failure: StartFailed | None = None


@attrs.frozen
class Died:
    """A ready server ended by itself; what is left of its process tree is being swept."""

    model: str
    attempt: int
    why: str = ""
    """How it ended and what it said last, as far as that is known at once."""


@attrs.frozen
class GotStuck:
    """The process could not be ended, or must not get SIGKILL; its memory is not coming back for now."""

    model: str
    attempt: int
    pids: tuple[int, ...] = ()
    """Who is left, where that is known; for people."""


@attrs.frozen
class Measured:
    """What the server of an attempt has used of each device, at its peak so far, in bytes."""

    model: str
    attempt: int
    peak: Holding


@attrs.frozen
class Squeezed:
    """Bytes of each device that there are for models now: other programs have taken some, or given some back."""

    sizes: Holding


@attrs.frozen
class UnloadAsked:
    """An operator wants these models gone."""

    models: tuple[str, ...]


@attrs.frozen
class RetireAsked:
    """A new configuration has come: the servers of these models are to end, as in an unload.

    Also when there are none: what may live together, or when whose turn is, may be new.
    """

    replaced: tuple[str, ...] = ()
    """Whoever waits for them goes on waiting, for the server that comes next."""
    removed: tuple[str, ...] = ()
    """They are not configured any more; whoever waits for them is told."""
    crowded: tuple[str, ...] = ()
    """They may not live any more beside others that stay; whoever waits goes on waiting, as in a swap."""


@attrs.frozen
class ShutdownBegan:
    """The daemon ends: no start after this (invariant I8)."""


@attrs.frozen
class WokeUp:
    """`wake_at` has come."""


Event = (
    Arrived
    | Left
    | Drained
    | BecameReady
    | Died
    | Ended
    | GotStuck
    | Measured
    | Squeezed
    | UnloadAsked
    | RetireAsked
    | ShutdownBegan
    | WokeUp
)

# ---- commands ------------------------------------------------------------------------------


class Cause(enum.Enum):
    """For whose sake a server ends."""

    OTHERS = enum.auto()
    """Another model wants its room; or all end, or begin anew, as at a reload or a shutdown."""
    ITSELF = enum.auto()
    """Its time to live is over, or its memory is used by other programs."""
    OPERATOR = enum.auto()
    """By hand."""


@attrs.frozen
class Grant:
    """The request holds a lease on the model from this instant."""

    ticket: int
    model: str
    attempt: int


@attrs.frozen
class Reject:
    """The request gets this error."""

    ticket: int
    error: TrioswapError


@attrs.frozen
class CloseGate:
    """Nothing new is granted: wait, bounded, until nothing is in flight, then report `Drained`."""

    model: str
    attempt: int
    reason: str
    unload: bool = False
    """For good, with the bound of an unload; else for a swap, with the model's own bound, if it has one."""
    cause: Cause = Cause.OTHERS


@attrs.frozen
class OpenGate:
    """Whoever waits for the model to drain need not any more: it goes on."""

    model: str
    attempt: int
    reason: str


@attrs.frozen
class Eviction:
    """One model put out for another, and why."""

    model: str
    attempt: int
    target: str
    """For whose sake."""
    was: State
    """READY: it was idle.  DRAINING: its gate was closed while it worked.  STARTING: nobody waited for it any more."""
    idle: float
    """Seconds since its last request."""
    reload: float
    """Seconds its next load is expected to take."""
    waited: float
    """Seconds the oldest request for the target has waited."""

    def __str__(self) -> str:
        """One sentence for people."""
        did = {State.READY: f"idle {self.idle:.1f} s", State.STARTING: "loading for nobody"}
        return (
            f"evicted {self.model}: {did.get(self.was, 'busy until its gate closed')}, "
            f"reload costs {self.reload:.1f} s; for {self.target}, waited {self.waited:.1f} s"
        )


@attrs.frozen
class Swap:
    """Under the group's lock: end these models together.  Each reports `Ended` as always."""

    target: str
    evictions: tuple[Eviction, ...]


@attrs.frozen
class Start:
    """Start the supervised task of this attempt, which holds *holding* until it has ended."""

    model: str
    attempt: int
    holding: Holding = NOTHING


@attrs.frozen
class Stop:
    """Cancel the supervised task of this attempt."""

    model: str
    attempt: int
    reason: str
    cause: Cause = Cause.OTHERS


Command = Grant | Reject | CloseGate | OpenGate | Swap | Start | Stop


# ---- what goes in before, and what can be seen ----------------------------------------------


@attrs.frozen
class Policy:
    """What the scheduler must know of one model."""

    max_wait: float = 60.0
    """Seconds a claim waits before the gates of what is in its way close; inf: for ever."""
    ttl: float | None = None
    """Idle seconds after which it is stopped."""
    parallel: float = math.inf
    """Requests granted at the same time."""
    weight: float = 1.0
    """How fast the waiting of its requests counts."""
    priority: int = 0
    """Who is next among those that are not overdue: the highest."""
    turn_lease: float = 4.0
    """A fresh turn is protected for so many times its own swap cost, but never longer than max(max_wait, one swap)."""
    linger: float = 1.0
    """An idle model is held for at most so many times its swap cost; 0: not at all."""
    backoff: float = 1.0
    """Seconds for which a start that failed is not tried again; twice as many after each more in a row."""
    backoff_max: float = 60.0
    """But never more than these."""
    yields: bool = True
    """False: nobody puts it out once it has begun (memory lent to a program that is not ours)."""


@attrs.frozen
class Rules:
    """What the scheduler must know beyond the single model."""

    parallel_loads: float = 1
    """Models loading at the same time."""
    by_arrival: bool = False
    """llama-swap's line: by priority, then by the arrival of the oldest request, whoever was just put out."""


@attrs.frozen
class ModelView:
    """One model as others may see it."""

    name: str
    state: State
    attempt: int
    leases: int
    waiting: int
    holding: Holding = NOTHING
    retry_in: float = 0.0
    """Seconds for which nobody may have it, because it failed; 0: it may be tried."""
    failure: str = ""
    """Why it failed last; empty: it has not, since it last proved to work."""


@attrs.frozen
class WaitView:
    """One waiting request as others may see it."""

    ticket: int
    model: str
    waited: float
    """Seconds since it came."""
    place: int
    """1: it is among those served next when its model is ready; counted within the line for its model."""
    stage: str
    """What happens now: `queued`, `draining` (others finish), `stopping` (others end) or `loading`."""
    waits_for: tuple[str, ...]
    """The models in its way."""
    estimate: float
    """Seconds until it is served, as far as can be told from learned costs."""
    weight: float = 1.0
    """How fast its waiting counts."""
    label: str = ""
    """What others call it; empty: nobody has given it a name."""
