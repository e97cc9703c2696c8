"""The vocabulary between the scheduler and those who carry out its decisions.

Events are past tense: what happened.  Commands are imperative: what must be done about it.
"""

from __future__ import annotations

import attrs

from trioswap.errors import StartFailed, TrioswapError
from trioswap.lifecycle import State

# ---- events --------------------------------------------------------------------------------


@attrs.frozen
class Arrived:
    """A request for *model* came; *ticket* names it from now on."""

    ticket: int
    model: str


@attrs.frozen
class Left:
    """The request is over: served, rejected, cut or cancelled, wherever it was."""

    ticket: int


@attrs.frozen
class Drained:
    """Nothing is in flight on a model whose gate is closed, or its drain deadline has cut the rest."""

    model: str
    attempt: int


@attrs.frozen
class Cleared:
    """Every victim of the swap has ended: process tree reaped, port free."""

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


@attrs.frozen
class GotStuck:
    """The process survived SIGKILL; its memory is not coming back for now."""

    model: str
    attempt: int


@attrs.frozen
class UnloadAsked:
    """An operator wants these models gone."""

    models: tuple[str, ...]


@attrs.frozen
class ShutdownBegan:
    """The daemon ends: no start after this (invariant I8)."""


@attrs.frozen
class WokeUp:
    """`wake_at` has come."""


Event = (
    Arrived | Left | Drained | Cleared | BecameReady | Died | Ended | GotStuck | UnloadAsked | ShutdownBegan | WokeUp
)

# ---- commands ------------------------------------------------------------------------------


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
class Swap:
    """Under the group's lock: drain and end *victims*, report `Cleared`, then wait for the newcomer."""

    model: str
    attempt: int
    victims: tuple[str, ...]
    reason: str


@attrs.frozen
class AbandonSwap:
    """The swap is off; whoever carries it out lets go of the lock."""

    attempt: int
    reason: str


@attrs.frozen
class Drain:
    """Without the lock: wait, bounded, until nothing is in flight, then report `Drained`."""

    model: str
    attempt: int
    reason: str


@attrs.frozen
class Start:
    """Start the supervised task of this attempt."""

    model: str
    attempt: int


@attrs.frozen
class Stop:
    """Cancel the supervised task of this attempt."""

    model: str
    attempt: int
    reason: str


Command = Grant | Reject | Swap | AbandonSwap | Drain | Start | Stop


# ---- what goes in before, and what can be seen ----------------------------------------------


@attrs.frozen
class Policy:
    """What the scheduler must know of one model."""

    max_wait: float
    ttl: float | None = None


@attrs.frozen
class ModelView:
    """One model as others may see it."""

    name: str
    state: State
    attempt: int
    leases: int
    waiting: int
