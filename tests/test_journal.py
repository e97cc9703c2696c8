"""What the journal keeps of the scheduler's decisions, and what it logs."""

from __future__ import annotations

import logging

import pytest
import trio
from fakes import Script, make_group

from trioswap.errors import ModelUnloaded
from trioswap.journal import KEPT, Journal
from trioswap.lifecycle import State
from trioswap.messages import Cause, CloseGate, Eviction, Grant, OpenGate, Reject, Start, Stop, Swap


def kept(journal: Journal) -> list[tuple[str, str, str]]:
    return [(entry.model, entry.what, entry.why) for entry in journal.entries]


@pytest.mark.parametrize(
    ("command", "what", "why"),
    [
        (CloseGate("a", 7, "for b, waited 60.0 s"), "close gate", "for b, waited 60.0 s"),
        (OpenGate("a", 7, "nobody needs its room any more"), "open gate", "nobody needs its room any more"),
        (Stop("a", 7, "idle for 30 s (ttl)"), "stop", "idle for 30 s (ttl)"),
        (Start("a", 7), "start", "it is wanted"),
        (Start("a", 7, {"gpu0": 9 << 30}), "start", "it is wanted; it may use 9 GiB on gpu0"),
    ],
)
def test_a_decision_about_a_model_is_kept_and_logged(command, what, why, caplog):
    """Once, with the reason; the log line has the attempt, too."""
    journal = Journal()
    with caplog.at_level(logging.INFO):
        journal.note(command)

    assert kept(journal) == [("a", what, why)]
    [record] = caplog.records
    assert record.getMessage().startswith(f"{what} model=a attempt=7 reason={why}")


def test_for_whose_sake_a_server_ends_is_kept():
    """Of each decision that ends one; what is only told in words is for people."""
    journal = Journal()
    for cause in Cause:
        journal.note(Stop("a", 7, "because", cause))
        journal.note(CloseGate("a", 7, "because", unload=True, cause=cause))
    journal.note(Start("a", 8))

    assert [entry.cause for entry in journal.entries] == [c for c in Cause for _ in range(2)] + [Cause.OTHERS]


def test_a_swap_is_an_eviction_for_each_victim():
    """Each with its own reason."""
    journal = Journal()
    first = Eviction("a", 1, "c", State.READY, idle=3.0, reload=2.0, waited=1.0)
    second = Eviction("b", 2, "c", State.DRAINING, idle=0.0, reload=9.0, waited=1.0)
    journal.note(Swap("c", (first, second)))

    assert kept(journal) == [("a", "evict", str(first)), ("b", "evict", str(second))]


def test_what_concerns_a_single_request_is_not_kept(caplog):
    """A refusal is worth a line in the log, a grant is not."""
    journal = Journal()
    with caplog.at_level(logging.INFO):
        journal.note(Grant(4, "a", 1))
        assert not caplog.records
        journal.note(Reject(5, ModelUnloaded("a")))

    assert not journal.entries
    [record] = caplog.records
    assert "ticket=5" in record.getMessage()
    assert 'model "a" was unloaded' in record.getMessage()


def test_the_oldest_decisions_are_forgotten():
    """The last ones are kept, in their order, with the time of day."""
    journal = Journal()
    for number in range(KEPT + 10):
        journal.note(Stop("a", number, str(number)))

    assert [entry.why for entry in journal.entries] == [str(number) for number in range(10, KEPT + 10)]
    times = [entry.at for entry in journal.entries]
    assert times == sorted(times)
    assert times[0] > 1.7e9, "Unix seconds"


async def test_a_group_keeps_what_it_did(nursery, autojump_clock):
    """Two models take turns: each start and each eviction once, and nothing else."""
    group = make_group(Script())
    await nursery.start(group.run)
    for model in ("a", "a", "b", "a"):
        async with group.lease(model):
            await trio.sleep(1)

    found = [(model, what) for model, what, _ in kept(group.journal) if what in ("start", "evict")]
    assert found == [("a", "start"), ("a", "evict"), ("b", "start"), ("b", "evict"), ("a", "start")]
    nursery.cancel_scope.cancel()
