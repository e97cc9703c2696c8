"""The states of one model server and the table between them.

Only the scheduler moves a model through this table.  There is no "failed" state: a
start that failed is a value handed to its waiters, and the model is stopped again.
"""

from __future__ import annotations

import enum
from typing import Final

from trioswap.errors import IllegalTransition


class State(enum.Enum):
    """Where a model server is; the values are what `/running` shows."""

    STOPPED = "stopped"
    STARTING = "starting"  # spawned, or about to be; not ready yet
    READY = "ready"  # serves whatever comes
    DRAINING = "draining"  # gate closed: finishes what it serves, takes nothing new
    STOPPING = "stopping"  # told to end; its tree is not reaped yet


class Event(enum.Enum):
    """What happens to a model server."""

    START = enum.auto()
    READY = enum.auto()
    CLOSE_GATE = enum.auto()
    OPEN_GATE = enum.auto()
    STOP = enum.auto()
    EXIT = enum.auto()


TRANSITIONS: Final = {
    State.STOPPED: {Event.START: State.STARTING},
    State.STARTING: {Event.READY: State.READY, Event.STOP: State.STOPPING, Event.EXIT: State.STOPPED},
    State.READY: {Event.CLOSE_GATE: State.DRAINING, Event.STOP: State.STOPPING, Event.EXIT: State.STOPPED},
    State.DRAINING: {Event.OPEN_GATE: State.READY, Event.STOP: State.STOPPING, Event.EXIT: State.STOPPED},
    State.STOPPING: {Event.EXIT: State.STOPPED},
}

# Holds memory, or is about to: everything the residency policy must count.
OCCUPIED: Final = frozenset(State) - {State.STOPPED}


def next_state(state: State, event: Event) -> State:
    """The state that *event* leads to.

    Raises:
        IllegalTransition: the pair is not in the table.
    """
    try:
        return TRANSITIONS[state][event]
    except KeyError:
        raise IllegalTransition(f"{event.name} while {state.name}") from None
