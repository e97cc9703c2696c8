"""The table of states: laws about it, not the table again."""

from __future__ import annotations

import pytest

from trioswap.errors import IllegalTransition
from trioswap.lifecycle import OCCUPIED, TRANSITIONS, Event, State, next_state


def reachable(start: State) -> set[State]:
    found, todo = set(), [start]
    while todo:
        state = todo.pop()
        if state not in found:
            found.add(state)
            todo.extend(TRANSITIONS[state].values())
    return found


@pytest.mark.parametrize("state", State)
def test_every_state_is_reachable_and_leads_back(state):
    """No state is a trap: a failure is never terminal."""
    assert state in reachable(State.STOPPED)
    assert State.STOPPED in reachable(state)


@pytest.mark.parametrize("state", sorted(OCCUPIED, key=str))
def test_every_live_state_ends_when_its_process_does(state):
    """A process may die at any moment."""
    assert next_state(state, Event.EXIT) is State.STOPPED


@pytest.mark.parametrize("state", State)
def test_an_illegal_pair_raises(state):
    """What the table does not know is a bug and says so."""
    for event in set(Event) - set(TRANSITIONS[state]):
        with pytest.raises(IllegalTransition, match=f"{event.name} while {state.name}"):
            next_state(state, event)
