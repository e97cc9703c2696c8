"""The circuit of one model: how long it stays open, what closes it, what those who ask are told."""

from __future__ import annotations

import math

import pytest

from trioswap.circuit import PAUSE, Circuit, Shortage
from trioswap.errors import ModelCrashed, NothingLeftToStart, StartFailed

BROKEN = StartFailed("m", "exited with 1", out_of_memory=True)
DEAD = ModelCrashed("m", "was killed by SIGSEGV")


def delays(*failures: StartFailed | ModelCrashed, first: float = 1.0, longest: float = 60.0) -> list[float]:
    """For how long each of them opens it, one after the other."""
    circuit, found = Circuit(), []
    for failure in failures:
        circuit.failed(failure, first, longest, 100.0)
        found.append(circuit.retry_in(100.0))
    return found


def test_the_delay_doubles_up_to_its_limit():
    """From the first failed start on, for ever and without an overflow."""
    assert delays(*[BROKEN] * 9) == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert delays(*[BROKEN] * 3, first=2.0, longest=5.0) == [2, 4, 5]
    assert delays(*[BROKEN] * 2_000)[-1] == 60
    assert delays(*[BROKEN] * 100, longest=math.inf)[-1] == delays(*[BROKEN] * 99, longest=math.inf)[-1] < math.inf


def test_the_first_death_is_forgiven():
    """A server that served and died is started again at once; the next one in a row waits."""
    assert delays(*[DEAD] * 4) == [0, 1, 2, 4]
    assert delays(BROKEN, DEAD, BROKEN) == [1, 1, 4]
    assert delays(DEAD, BROKEN) == [0, 2]


def test_without_a_delay_it_never_opens():
    """`backoff = 0`, or `backoff_max = 0`."""
    assert delays(*[BROKEN, DEAD] * 3, first=0.0) == [0] * 6
    assert delays(*[BROKEN, DEAD] * 3, longest=0.0) == [0] * 6


def test_it_is_open_until_its_time_has_come():
    """And not in the very instant, or who comes when it was told to would be refused again."""
    circuit = Circuit()
    assert not circuit.is_open(0)
    circuit.failed(BROKEN, 1.5, 60, 10)

    assert circuit.is_open(10)
    assert circuit.is_open(11.49)
    assert not circuit.is_open(11.5)
    assert (circuit.retry_in(11), circuit.retry_in(20)) == (0.5, 0.0)


@pytest.mark.parametrize(
    ("first", "longest", "left"),
    [(0.0, 60.0, 0.0), (1.0, 60.0, 4.0), (8.0, 5.0, 1.0), (2.0, 60.0, 12.0), (90.0, 900.0, 12.0)],
)
def test_it_is_open_for_no_longer_than_is_said_by_now(first, longest, left):
    """Counted from the last failure; and never for longer, for somebody may be trying it already."""
    circuit = Circuit()
    circuit.shorten(first, longest)
    assert not circuit.is_open(0)
    for _ in range(4):
        circuit.failed(BROKEN, 2.0, 60.0, 10)
    assert circuit.retry_in(10) == 16
    circuit.shorten(first, longest)

    assert circuit.retry_in(14) == left
    assert circuit.failures == 4


@pytest.mark.parametrize(("now", "left"), [(10, 2), (10.5, 1), (11.499, 1)])
def test_a_refusal_says_what_went_wrong_and_when_to_come_again(now, left):
    """In whole seconds, never too few; each time another instance, for each collects a traceback of its own."""
    circuit = Circuit()
    circuit.failed(BROKEN, 1.5, 60, 10)

    one, other = circuit.refusal(now), circuit.refusal(now)
    assert one is not other
    assert (type(one), one.status, one.retry_after, one.out_of_memory) == (StartFailed, 503, left, True)
    assert one.message == (
        f'model "m" did not start: exited with 1; it is not tried again for {left} s (backoff); '
        "its last output is at /logs/stream/m"
    )


def test_a_refusal_after_deaths_says_that_it_crashed():
    """And how many failures there were."""
    circuit = Circuit()
    circuit.failed(BROKEN, 1, 60, 0)
    circuit.failed(DEAD, 1, 60, 10)

    refusal = circuit.refusal(10)
    assert (type(refusal), refusal.status, refusal.retry_after) == (ModelCrashed, 503, 1)
    assert 'model "m" crashed: was killed by SIGSEGV; that makes 2 failures in a row, ' in refusal.message
    assert circuit.failure == "was killed by SIGSEGV"


def test_a_failure_that_opens_nothing_does_not_say_that_it_does():
    """Without back-off the next request is a trial, and a second is a good time to wait."""
    circuit = Circuit()
    circuit.failed(BROKEN, 0, 60, 0)
    assert (circuit.refusal(0).message, circuit.refusal(0).retry_after) == (BROKEN.message, 1)


def test_closed_is_as_if_nothing_had_happened():
    """The next failure is the first one."""
    circuit = Circuit()
    for _ in range(5):
        circuit.failed(BROKEN, 1, 60, 0)
    circuit.close()

    assert (circuit.is_open(0), circuit.failure, circuit.retry_in(0)) == (False, "", 0)
    circuit.failed(BROKEN, 1, 60, 0)
    assert circuit.retry_in(0) == 1


# ---- what all lack ---------------------------------------------------------------------------------


def test_a_shortage_lasts_for_as_long_as_its_error_says():
    """From the last start that could not be tried; failures of the models' own are none."""
    shortage, ours = Shortage(), NothingLeftToStart("m", "no descriptor is left")
    for failure in (BROKEN, DEAD):
        shortage.note(failure, 10)
    assert not shortage.lasts(10)
    shortage.note(ours, 10)
    shortage.note(ours, 12)
    shortage.note(BROKEN, 13)

    assert ours.retry_after == PAUSE
    assert shortage.lasts(12 + PAUSE - 0.01)
    assert not shortage.lasts(12 + PAUSE)
    shortage.over()
    assert not shortage.lasts(13)
    refusal = shortage.refusal("other")
    assert (type(refusal), refusal.model, refusal.why) == (NothingLeftToStart, "other", ours.why)
