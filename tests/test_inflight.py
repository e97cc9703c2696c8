"""The in-flight tracker: counting, waiting for the last one, cutting."""

from __future__ import annotations

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from trioswap.errors import LeaseCut
from trioswap.inflight import Entry, InFlight


@pytest.fixture
def inflight() -> InFlight:
    return InFlight()


def enter(inflight: InFlight, attempt: int, *tickets: int) -> list[Entry]:
    entries = [Entry(trio.CancelScope()) for _ in tickets]
    for ticket, entry in zip(tickets, entries, strict=True):
        inflight.enter(attempt, ticket, entry)
    return entries


async def test_each_attempt_is_counted_for_itself(inflight):
    """What one attempt serves is not what another one serves (I2)."""
    enter(inflight, 1, 10, 11)
    enter(inflight, 2, 12)

    assert (inflight.count(1), inflight.count(2), inflight.count(3)) == (2, 1, 0)
    assert repr(inflight) == "<InFlight {1: 2, 2: 1}>"


async def test_leaving_twice_is_leaving_once(inflight):
    """A ticket that is not counted, or not any more, takes nobody else's place."""
    enter(inflight, 1, 10, 11)
    inflight.leave(1, 10)
    inflight.leave(1, 10)
    inflight.leave(1, 99)
    inflight.leave(7, 10)

    assert inflight.count(1) == 1


async def test_waiting_for_an_idle_attempt_is_a_checkpoint(inflight):
    """It returns without anything having to happen, and can be cancelled."""
    with trio.testing.assert_checkpoints():
        await inflight.wait_idle(1)
    with trio.CancelScope() as scope:
        scope.cancel()
        await inflight.wait_idle(1)

    assert scope.cancelled_caught


async def test_all_who_wait_return_when_the_last_one_leaves(inflight, nursery):
    """Two waiters for one attempt, while another attempt stays busy."""
    returned: list[str] = []

    async def wait(name: str) -> None:
        await inflight.wait_idle(1)
        returned.append(name)

    enter(inflight, 1, 10, 11)
    enter(inflight, 2, 12)
    nursery.start_soon(wait, "first")
    nursery.start_soon(wait, "second")
    await wait_all_tasks_blocked()
    inflight.leave(1, 10)
    await wait_all_tasks_blocked()
    assert returned == []

    inflight.leave(1, 11)
    await wait_all_tasks_blocked()
    assert sorted(returned) == ["first", "second"]


async def test_who_enters_before_the_waiter_runs_is_waited_for(inflight, nursery):
    """The attempt was idle for an instant in which nobody could look."""
    idle = trio.Event()

    async def wait() -> None:
        await inflight.wait_idle(1)
        idle.set()

    enter(inflight, 1, 10)
    nursery.start_soon(wait)
    await wait_all_tasks_blocked()
    inflight.leave(1, 10)
    enter(inflight, 1, 11)
    await wait_all_tasks_blocked()
    assert not idle.is_set()

    inflight.leave(1, 11)
    await wait_all_tasks_blocked()
    assert idle.is_set()


async def test_a_waiter_that_gives_up_does_not_disturb_the_next(inflight, nursery):
    """A drain deadline passes; who waits afterwards still hears of the end."""
    enter(inflight, 1, 10)
    with trio.CancelScope() as scope:
        nursery.start_soon(_cancel_when_blocked, scope)
        await inflight.wait_idle(1)
    assert scope.cancelled_caught

    nursery.start_soon(_leave_when_blocked, inflight)
    with trio.fail_after(60):
        await inflight.wait_idle(1)


async def _cancel_when_blocked(scope: trio.CancelScope) -> None:
    await wait_all_tasks_blocked()
    scope.cancel()


async def _leave_when_blocked(inflight: InFlight) -> None:
    await wait_all_tasks_blocked()
    inflight.leave(1, 10)


async def test_a_cut_cancels_the_leases_of_one_attempt_and_says_why(inflight):
    """They stay counted until they leave; those of another attempt go on."""
    cut = enter(inflight, 1, 10, 11)
    (spared,) = enter(inflight, 2, 12)

    assert inflight.cut(1, "drain deadline") == 2
    assert [(entry.scope.cancel_called, entry.cut_because) for entry in cut] == [(True, "drain deadline")] * 2
    assert (spared.scope.cancel_called, spared.cut_because) == (False, None)
    assert inflight.count(1) == 2


async def test_a_cut_of_an_idle_attempt_cuts_nobody(inflight):
    """Also when it was busy before."""
    (entry,) = enter(inflight, 1, 10)
    inflight.leave(1, 10)

    assert inflight.cut(1, "too late") == 0
    assert not entry.scope.cancel_called


async def test_who_passes_by_is_cut_with_the_others_and_counts_for_nothing(inflight, nursery):
    """Nobody waits for it either; what passes by another attempt goes on."""
    heard: list[str] = []

    async def pass_by(attempt: int) -> None:
        with pytest.raises(LeaseCut, match="it was cut"), inflight.passing("m", attempt):
            await trio.sleep_forever()
        heard.append(f"{attempt} was cut")

    for attempt in (1, 1, 2):
        nursery.start_soon(pass_by, attempt)
    await wait_all_tasks_blocked()
    assert inflight.count(1) == 0
    await inflight.wait_idle(1)
    assert inflight.cut(1, "it was cut") == 2
    await wait_all_tasks_blocked()
    assert heard == ["1 was cut"] * 2

    assert inflight.cut(2, "it was cut") == 1
    await wait_all_tasks_blocked()
    assert inflight.cut(1, "again") == inflight.cut(2, "again") == 0
