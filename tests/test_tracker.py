"""The tracker: who is under way, in which order, who is told, and what cancelling one does."""

from __future__ import annotations

import pytest
import trio
from children import PATIENCE
from trio.testing import wait_all_tasks_blocked

from trioswap.asgi import Exchange
from trioswap.errors import Cancelled, NoSuchRequest
from trioswap.tracker import Tracked, Tracker


def exchange(request_id: str = "req_0") -> Exchange:
    """A request that nobody sent."""

    async def nobody(*_: object) -> dict[str, object]:
        raise AssertionError("nothing is read or said")

    return Exchange({"type": "http", "headers": []}, request_id, nobody, nobody)


async def test_requests_are_numbered_and_listed():
    """The oldest first, each as long as its block, and a number is never used again."""
    tracker = Tracker()
    with tracker.track(exchange(), "/v1/x") as first, tracker.track(exchange(), "/y", "a") as second:
        assert list(tracker.rows.values()) == [first, second]
        assert (first.number, first.path, first.model) == (1, "/v1/x", "")
        assert (second.number, second.path, second.model) == (2, "/y", "a")
        assert repr(tracker) == "<Tracker 2 requests>"
    with tracker.track(exchange(), "/") as third:
        assert tracker.rows == {3: third}
    assert not tracker.rows


async def test_who_listens_is_told():
    """Of each once, at its beginning and at its end, when it is there and when it is not any more."""
    tracker, told = Tracker(), []
    tracker.begun.append(lambda row: told.append(("begun", row.number, row.number in tracker.rows)))
    tracker.ended.append(lambda row: told.append(("ended", row.number, row.number in tracker.rows)))
    with tracker.track(exchange(), "/"), pytest.raises(ValueError, match="seeded"), tracker.track(exchange(), "/"):
        raise ValueError("seeded")

    assert told == [("begun", 1, True), ("begun", 2, True), ("ended", 2, False), ("ended", 1, False)]


async def test_a_listener_that_fails_leaves_nothing_behind():
    """The request does, and it is not listed for ever."""
    tracker = Tracker()

    def broken(_: Tracked) -> None:
        raise ZeroDivisionError

    tracker.begun.append(broken)
    with pytest.raises(ZeroDivisionError), tracker.track(exchange(), "/"):
        pytest.fail("begun")
    assert not tracker.rows


async def test_cancelling_ends_one_request():
    """Wherever it waits, with an error of its own, in the same step or later; the others go on."""
    tracker, failures = Tracker(), []

    async def request() -> None:
        try:
            with tracker.track(exchange(), "/"):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(trio.sleep_forever)
        except Cancelled as exc:
            failures.append(exc)

    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(request)
            await wait_all_tasks_blocked()
            row = tracker.rows[2]
            tracker.cancel("2")
            tracker.cancel("2")  # it is there until it has ended
            await wait_all_tasks_blocked()
            assert isinstance(row.failure, Cancelled)
            assert [(exc.status, exc.retry_after) for exc in failures] == [(499, None)]
            assert list(tracker.rows) == [1, 3]
            assert not any(other.failure for other in tracker.rows.values())
            with pytest.raises(NoSuchRequest):
                tracker.cancel("2")
            tracker.cancel("1")
            tracker.cancel("3")


async def test_a_request_is_cancelled_by_its_request_id():
    """That one; an id of nobody, or a part of one, is none."""
    tracker = Tracker()
    with tracker.track(exchange("req_1"), "/") as first, tracker.track(exchange("req_2"), "/") as second:
        for name in ("req_3", "req_", "1req", ""):
            with pytest.raises(NoSuchRequest):
                tracker.cancel(name)
        tracker.cancel("req_2")
        assert (first.failure, type(second.failure)) == (None, Cancelled)


async def test_cancelling_ends_only_what_is_cancellable():
    """Where somebody has last words, they are said: once, and what is over by then goes on."""
    tracker, said = Tracker(), []
    with trio.fail_after(PATIENCE), tracker.track(exchange(), "/") as row:
        with pytest.raises(Cancelled), row.cancellable():  # noqa: PT012 - the block is what is tested
            tracker.cancel("1")
            await trio.sleep_forever()
        await trio.lowlevel.checkpoint()
        said.append("sorry")
    with trio.fail_after(PATIENCE), tracker.track(exchange(), "/") as row:
        with row.cancellable():
            await trio.lowlevel.checkpoint()
        tracker.cancel("2")
        await trio.lowlevel.checkpoint()
        said.append("all")
    assert said == ["sorry", "all"]
    assert isinstance(row.failure, Cancelled)


async def test_a_request_that_ended_first_was_not_cancelled():
    """Its answer is complete: nothing is raised after it."""
    tracker = Tracker()
    with tracker.track(exchange(), "/") as row:
        tracker.cancel("1")
    assert isinstance(row.failure, Cancelled)


async def test_cancelling_from_outside_is_not_an_operators():
    """A client that left, or the end of the daemon, passes through as it was."""
    tracker = Tracker()
    with trio.move_on_after(0) as scope, tracker.track(exchange(), "/") as row:
        await trio.sleep_forever()
    assert scope.cancelled_caught
    assert row.failure is None
    assert not tracker.rows


@pytest.mark.parametrize("number", ["", "0", "01", "+1", "-1", " 1", "1 ", "1.0", "1_0", "\u0661", "one", "9" * 5000])
async def test_what_is_no_number_of_a_request(number):
    """It is nobody's, and is not repeated without bound."""
    tracker = Tracker()
    with tracker.track(exchange(), "/") as row:
        with pytest.raises(NoSuchRequest) as caught:
            tracker.cancel(number)
        assert row.failure is None
    assert caught.value.status == 404
    assert len(caught.value.message) < 100
