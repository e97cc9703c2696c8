"""Memory lent to programs that are not ours, on a mock clock: waiting for it, holding it, giving it back."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress

import attrs
import pytest
import trio
from fakes import Script, make_group
from trio.testing import wait_all_tasks_blocked

from trioswap import lent
from trioswap.arrangement import residency_of
from trioswap.config import loads
from trioswap.config.schema import MAX_WAIT, UNLOAD_DRAIN_TIMEOUT
from trioswap.devices import RAM
from trioswap.errors import DoesNotFit, LeaseCut, MemoryLent, ShuttingDown
from trioswap.footprints import Footprints, Wish
from trioswap.group import SwapGroup
from trioswap.lifecycle import State
from trioswap.residency import Holding, Offer
from trioswap.residency.budget import Budget


@attrs.define(eq=False)
class Bench:
    """Models a (4 of 10 bytes) and b (5), and a borrower."""

    script: Script = attrs.field(factory=Script)
    budget: Budget = attrs.field(init=False)
    group: SwapGroup = attrs.field(init=False)
    got: trio.Event = attrs.field(factory=trio.Event)
    give_back: trio.Event = attrs.field(factory=trio.Event)

    def __attrs_post_init__(self) -> None:
        self.budget = Budget({RAM: 10}, Footprints((RAM,), {"a": Wish(4), "b": Wish(5)}))
        self.group = make_group(self.script, budget=self.budget, max_wait=20.0, unload_drain_timeout=30.0)

    async def use(self, model: str, seconds: float = 1.0) -> str:
        """One request: hold a lease for a while and return who answered at the end."""
        async with self.group.lease(model) as lease:
            await trio.sleep(seconds)
            return lease.upstream.answer()

    async def borrow(self, size: int | None, name: str = "comfy") -> Holding:
        """Hold *size* bytes until told to give them back."""
        async with lent.hold(self.group, self.budget, name, Wish(size)) as holding:
            self.got.set()
            await self.give_back.wait()
            return holding

    def states(self) -> dict[str, State]:
        """Of everything that is not stopped."""
        return {view.name: view.state for view in self.group.views() if view.state is not State.STOPPED}

    def assert_forgotten(self) -> None:
        """Nothing tells that something was ever lent."""
        assert sorted(self.group.models) == sorted(self.group.core.models) == ["a", "b"]
        assert sorted(self.budget.footprints.wishes) == ["a", "b"]
        assert self.group.limiter.total_tokens == 2
        assert not [answer for answer in self.group._answers.values() if answer.lease is None]
        assert self.group._runs.keys() <= {"a", "b"}


@pytest.fixture
async def bench(nursery) -> Bench:
    bench = Bench()
    await nursery.start(bench.group.run)
    yield bench
    bench.give_back.set()
    await wait_all_tasks_blocked()


# ---- having it -------------------------------------------------------------------------------


async def test_memory_that_is_free_is_lent_at_once(bench, autojump_clock):
    """Nobody has to go, and what is lent is what was asked for."""
    await bench.use("a")
    begun = trio.current_time()
    async with lent.hold(bench.group, bench.budget, "comfy", Wish(6)) as holding:
        assert holding == {RAM: 6}
        assert trio.current_time() == begun
        assert bench.states() == {"a": State.READY, "comfy": State.READY}

    assert bench.states() == {"a": State.READY}
    bench.assert_forgotten()


async def test_the_decisions_tell_of_a_loan(bench, autojump_clock):
    """It begins because it is wanted, and ends because it was given back: no time to live was ever set for it."""
    async with lent.hold(bench.group, bench.budget, "comfy", Wish(6)):
        await trio.sleep(5)

    told = [(entry.what, entry.why.partition(";")[0]) for entry in bench.group.journal.entries]
    assert told == [("start", "it is wanted"), ("stop", "given back")]


async def test_idle_models_go_for_it(bench, autojump_clock):
    """As many as it takes; the borrower has the memory when their processes are gone."""
    await bench.use("a")
    await bench.use("b")
    async with lent.hold(bench.group, bench.budget, "comfy", Wish(10)) as holding:
        assert holding == {RAM: 10}
        assert not bench.script.alive


async def test_a_busy_model_is_waited_for(bench, nursery, autojump_clock):
    """It finishes what it serves, as before a swap."""
    nursery.start_soon(bench.use, "a", 12.0)
    await trio.sleep(6)
    async with lent.hold(bench.group, bench.budget, "comfy", Wish(8)):
        assert trio.current_time() == bench.script.load + 12 + bench.script.stop


async def test_a_busy_model_cannot_keep_it_for_ever(bench, nursery, autojump_clock):
    """Past max_wait the gate closes: no later request gets in before the borrower."""

    async def keep_busy() -> None:
        while not bench.got.is_set():
            nursery.start_soon(ask)
            await trio.sleep(4)

    async def ask() -> None:
        with suppress(MemoryLent):
            await bench.use("a", 8.0)

    nursery.start_soon(keep_busy)
    await trio.sleep(6)
    async with lent.hold(bench.group, bench.budget, "comfy", Wish(8)):
        bench.got.set()
        # Until it is overdue, and then until the last one let in is done.
        assert trio.current_time() <= 6 + MAX_WAIT + 8 + bench.script.stop


async def test_all_there_is_when_nobody_says_how_much(bench, autojump_clock):
    """A wish without a size gets the machine for itself."""
    await bench.use("a")
    async with lent.hold(bench.group, bench.budget, "comfy", Wish()) as holding:
        assert holding == {RAM: 10}
        assert not bench.script.alive


async def test_more_than_there_is_cannot_be_had(bench, autojump_clock):
    """It is refused at once, nobody goes for it, and it leaves nothing."""
    await bench.use("a")
    with pytest.raises(DoesNotFit):
        await bench.borrow(11)

    assert bench.script.alive.keys() == {"a"}
    bench.assert_forgotten()


async def test_two_borrowers_who_do_not_fit_together(bench, nursery, autojump_clock):
    """The second one is told, and the first keeps what it has."""
    nursery.start_soon(bench.borrow, 6)
    await bench.got.wait()
    with pytest.raises(MemoryLent):
        await bench.borrow(5, "games")
    async with lent.hold(bench.group, bench.budget, "games", Wish(4)):
        assert bench.states() == {"comfy": State.READY, "games": State.READY}


# ---- models beside it ------------------------------------------------------------------------


async def test_a_model_that_needs_it_is_refused_at_once(bench, nursery, autojump_clock):
    """503 with a name, however long the others wait; models that fit run on; afterwards it is served."""
    nursery.start_soon(bench.borrow, 6)
    await bench.got.wait()
    begun = trio.current_time()
    with pytest.raises(MemoryLent, match="held by comfy") as refused:
        await bench.use("b")
    assert trio.current_time() == begun
    assert refused.value.status == 503
    assert refused.value.retry_after
    assert await bench.use("a") == "a"

    bench.give_back.set()
    await wait_all_tasks_blocked()
    assert await bench.use("b") == "b"
    assert bench.script.alive.keys() == {"a", "b"}


async def test_nobody_puts_it_out(bench, nursery, autojump_clock):
    """However long it is held: what is lent is neither idle nor overdue."""
    nursery.start_soon(bench.borrow, 6)
    await bench.got.wait()
    for _ in range(5):
        with pytest.raises(MemoryLent):
            await bench.use("b")
        await trio.sleep(1000)

    assert bench.states() == {"comfy": State.READY}


async def test_an_operator_who_unloads_all_models_leaves_it_alone(bench, nursery, autojump_clock):
    """It is no model."""
    await bench.use("a")
    nursery.start_soon(bench.borrow, 6)
    await bench.got.wait()
    await bench.group.unload(("a", "b"))

    assert bench.states() == {"comfy": State.READY}


async def test_a_request_that_could_fit_beside_it_waits(bench, nursery, autojump_clock):
    """What is in its way is another model, which may go: it is not refused, and served when memory is given back."""
    nursery.start_soon(bench.use, "b", 1000.0)
    await trio.sleep(6)
    nursery.start_soon(bench.borrow, 4)
    await bench.got.wait()
    await cancelled(lambda: bench.use("a"), 10)
    bench.give_back.set()

    assert await bench.use("a") == "a"
    assert bench.states() == {"a": State.READY, "b": State.READY}


# ---- leaving ---------------------------------------------------------------------------------


async def cancelled(call: Callable[[], Awaitable[object]], after: float) -> None:
    with trio.move_on_after(after) as scope:
        await call()
    assert scope.cancelled_caught


async def test_cancelled_while_waiting_it_leaves_nothing(bench, nursery, autojump_clock):
    """The model in its way goes on, with its gate open."""
    nursery.start_soon(bench.use, "a", 100.0)
    await trio.sleep(6)
    await cancelled(lambda: bench.borrow(8), 30)

    await wait_all_tasks_blocked()
    assert not bench.got.is_set()
    assert bench.states() == {"a": State.READY}
    bench.assert_forgotten()


async def test_cancelled_while_others_stop_for_it_it_leaves_nothing(bench, autojump_clock):
    """Its room is there a moment later, and nobody takes it."""
    await bench.use("a")
    await cancelled(lambda: bench.borrow(8), 1)

    await trio.sleep(10)
    assert bench.states() == {}
    bench.assert_forgotten()


async def test_cancelled_while_holding_it_leaves_nothing(bench, autojump_clock):
    """The memory is free in the very moment."""
    await cancelled(lambda: bench.borrow(8), 5)

    assert bench.got.is_set()
    assert bench.states() == {}
    bench.assert_forgotten()
    assert await bench.use("b") == "b"


async def test_an_error_of_the_holder_gives_it_back(bench, autojump_clock):
    """And stays what it is."""
    with pytest.raises(ZeroDivisionError):
        async with lent.hold(bench.group, bench.budget, "comfy", Wish(8)):
            raise ZeroDivisionError

    bench.assert_forgotten()


async def test_cancelled_together_with_everything_it_ends(autojump_clock):
    """When the daemon breaks nobody ends what was lent any more, and the holder does not wait for that for ever."""
    bench = Bench()
    with trio.fail_after(100):
        async with trio.open_nursery() as nursery:
            await nursery.start(bench.group.run)
            nursery.start_soon(bench.borrow, 8)
            await bench.got.wait()
            nursery.cancel_scope.cancel()


# ---- beside written rules -------------------------------------------------------------------------


def test_a_matrix_does_not_rule_over_what_is_lent():
    """The name is in no set, and yet it need not be alone: only its memory counts."""
    config = loads("""
        memory.headroom = 0
        matrix.sets.s = "a & b"
        models.a.cmd = "x ${PORT}"
        models.b.cmd = "x ${PORT}"
        models.c.cmd = "x ${PORT}"
    """)
    budget = Budget({RAM: 10}, Footprints((RAM,), {"a": Wish(4), "b": Wish(5), "c": Wish(1), "lent": Wish(3)}))
    rule = residency_of(config, budget)
    lent, a, b = {"lent": {RAM: 3}}, {"a": {RAM: 4}}, {"b": {RAM: 5}}

    assert rule.place("lent", a) == {RAM: 3}
    assert rule.place("a", lent) == {RAM: 4}
    assert rule.place("b", lent | a) is None, "the memory is short"
    assert rule.place("c", lent) == {RAM: 1}
    assert rule.place("c", lent | a) is None, "c runs without other models"
    assert rule.victims("lent", a | b, lambda name: Offer(0, busy=False, cost=1)) == {"a"}
    assert rule.victims("c", lent | a, lambda name: Offer(0, busy=False, cost=1)) == {"a"}


# ---- the end ---------------------------------------------------------------------------------


async def test_a_shutdown_does_not_wait_for_ever(autojump_clock):
    """A holder that does not give back is cut when the time for draining is over, and told."""
    bench = Bench()
    async with trio.open_nursery() as nursery:
        await nursery.start(bench.group.run)
        nursery.start_soon(cut, bench)
        await bench.got.wait()
        begun = trio.current_time()
        bench.group.shutdown()

    assert trio.current_time() - begun == UNLOAD_DRAIN_TIMEOUT
    bench.assert_forgotten()


async def cut(bench: Bench) -> None:
    with pytest.raises(LeaseCut, match="shutting down"):
        await bench.borrow(8)


async def test_a_shutdown_ends_at_once_when_it_is_given_back(autojump_clock):
    """And whoever waits for memory is told."""
    bench = Bench()
    async with trio.open_nursery() as nursery:
        await nursery.start(bench.group.run)
        nursery.start_soon(bench.borrow, 8)
        await bench.got.wait()
        bench.group.shutdown()
        with pytest.raises(ShuttingDown):
            await bench.borrow(1, "games")
        bench.give_back.set()

    assert trio.current_time() == 0
    bench.assert_forgotten()


async def test_a_second_signal_cuts_it(autojump_clock):
    """As it does with requests."""
    bench = Bench()
    async with trio.open_nursery() as nursery:
        await nursery.start(bench.group.run)
        nursery.start_soon(hastened, bench)
        await bench.got.wait()
        bench.group.shutdown()
        await wait_all_tasks_blocked()
        bench.group.hasten("a second signal")

    assert trio.current_time() == 0


async def hastened(bench: Bench) -> None:
    with pytest.raises(LeaseCut, match="a second signal"):
        await bench.borrow(8)
