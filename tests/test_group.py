"""The swap group on a mock clock: leases, swaps, drains, unloads, shutdown."""

from __future__ import annotations

from functools import partial

import pytest
import trio
from fakes import Script, make_group, spec
from sim_mutants import lease_dropped_early, tracker_forgets
from trio.testing import MockClock, wait_all_tasks_blocked

from trioswap.config import GroupConfig
from trioswap.errors import LeaseCut, ModelStuck, ModelUnloaded, ShuttingDown, StartFailed
from trioswap.group import SwapGroup
from trioswap.lifecycle import State
from trioswap.runs import Run


@pytest.fixture
def script() -> Script:
    return Script()


async def use(group: SwapGroup, model: str, seconds: float, script: Script) -> str:
    """One request: hold a lease for a while and return who answered at the end."""
    async with group.lease(model) as lease:
        script.say(f"{model} serves")
        await trio.sleep(seconds)
        script.say(f"{model} served")
        lease.answered(200)
        return lease.upstream.answer()


def state_of(group: SwapGroup, model: str) -> State:
    return {view.name: view.state for view in group.views()}[model]


async def test_a_swap_waits_for_the_busy_model(script, nursery, autojump_clock):
    """B starts when A's request is done, and not before A's process is gone."""
    group = make_group(script)
    await nursery.start(group.run)
    nursery.start_soon(use, group, "a", 10, script)
    await wait_all_tasks_blocked()
    nursery.start_soon(use, group, "b", 1, script)
    await trio.sleep(60)

    assert script.trace == [
        (0, "a spawned"), (5, "a ready"), (5, "a serves"), (15, "a served"), (17, "a gone"),
        (17, "b spawned"), (22, "b ready"), (22, "b serves"), (23, "b served"),
    ]  # fmt: skip
    nursery.cancel_scope.cancel()


# ---- the two races that llama-swap's #667 was about, and the mutations they catch ------------


async def parked_request_survives(group: SwapGroup, script: Script, disturb) -> None:
    """A request parked between "decided" and "forwarded" is answered by its own model, and *disturb* waits."""
    async with trio.open_nursery() as nursery:
        await nursery.start(group.run)
        answer: list[str] = []
        go = trio.Event()

        async def park() -> None:
            async with group.lease("a") as lease:
                await go.wait()  # decided, but nothing has been sent yet
                answer.append(lease.upstream.answer())

        nursery.start_soon(park)
        await trio.sleep(10)  # a is ready and the request is parked
        nursery.start_soon(disturb)
        await trio.sleep(100)  # past max_wait: the gate of a is closed

        assert script.alive.keys() == {"a"}, "the swap waits for the parked request"
        go.set()
        await trio.sleep(30)
        assert answer == ["a"], "it is answered by its own model"
        nursery.cancel_scope.cancel()


def disturb_by_swap(group: SwapGroup, script: Script):
    return lambda: use(group, "b", 1, script)


def disturb_by_unload(group: SwapGroup, script: Script):
    return lambda: group.unload(("a", "b", "c"))


DISTURBANCES = pytest.mark.parametrize("disturb", [disturb_by_swap, disturb_by_unload])
# The unload of a parked request must be allowed to wait as long as the test parks it.
PATIENT = {"unload_drain_timeout": 1000.0}


@DISTURBANCES
async def test_a_parked_request_is_not_lost(script, autojump_clock, disturb):
    """Another model is asked for, or everything is unloaded, while a request is parked."""
    group = make_group(script, **PATIENT)

    await parked_request_survives(group, script, disturb(group, script))

    assert script.trace[-1][1].endswith(("gone", "served"))


def without_lease(monkeypatch) -> None:
    """The decision step takes no lease at all."""
    tracker_forgets(monkeypatch)
    lease_dropped_early(monkeypatch)


@DISTURBANCES
@pytest.mark.parametrize("mutate", [tracker_forgets, without_lease])
async def test_without_the_lease_the_parked_request_is_lost(script, autojump_clock, monkeypatch, disturb, mutate):
    """The test above can fail: take the lease out of the decision step and it does."""
    mutate(monkeypatch)
    group = make_group(script, **PATIENT)

    with pytest.RaisesGroup(AssertionError, flatten_subgroups=True):
        await parked_request_survives(group, script, disturb(group, script))


async def test_the_fast_path_has_no_checkpoint(script, nursery, autojump_clock):
    """A lease on a ready model is granted without giving anybody else a turn."""
    group = make_group(script)
    await nursery.start(group.run)
    await use(group, "a", 0, script)
    lease = group.lease("a")
    with trio.testing.assert_no_checkpoints():
        held = await lease.__aenter__()

    assert held.model == "a"
    await lease.__aexit__(None, None, None)
    nursery.cancel_scope.cancel()


# ---- swaps ---------------------------------------------------------------------------------


async def test_one_start_serves_everybody_who_waits(script, nursery, autojump_clock):
    """Ten requests, one process (I5)."""
    group = make_group(script)
    await nursery.start(group.run)
    async with trio.open_nursery() as clients:
        for _ in range(10):
            clients.start_soon(use, group, "a", 1, script)

    assert [text for _, text in script.trace].count("a spawned") == 1
    nursery.cancel_scope.cancel()


async def test_interleaved_requests_are_batched(script, nursery, autojump_clock):
    """A B C A B C costs three loads, not six."""
    group = make_group(script)
    await nursery.start(group.run)
    async with trio.open_nursery() as clients:
        for model in "abcabc":
            clients.start_soon(use, group, model, 1, script)

    assert sum(text.endswith("spawned") for _, text in script.trace) == 3
    nursery.cancel_scope.cancel()


async def test_the_lock_is_free_while_the_newcomer_serves(script, nursery, autojump_clock):
    """The swap ends when the newcomer is ready: the first response does not hold it."""
    group = make_group(script)
    await nursery.start(group.run)
    nursery.start_soon(use, group, "a", 1000, script)
    await trio.sleep(10)

    assert not group._lock.locked()
    assert group.limiter.borrowed_tokens == 1
    nursery.cancel_scope.cancel()


async def test_a_drain_deadline_cuts_what_does_not_end(script, nursery, autojump_clock):
    """With drain_timeout set, B waits max_wait and the drain, no longer; the cut request is told why."""
    group = make_group(script, max_wait=60.0, drain_timeout=20.0)
    await nursery.start(group.run)
    cut: list[str] = []

    async def endless() -> None:
        try:
            await use(group, "a", 10_000, script)
        except LeaseCut as exc:
            cut.append(exc.message)

    nursery.start_soon(endless)
    await trio.sleep(5)
    begun = trio.current_time()
    await use(group, "b", 0, script)

    assert trio.current_time() - begun == 60 + 20 + script.stop + script.load
    assert "20 s after its model was to stop" in cut[0]
    nursery.cancel_scope.cancel()


async def test_an_old_drain_does_not_cut_the_successor(script, nursery, autojump_clock):
    """Unload is draining attempt 1 when it dies; what attempt 2 serves outlives that deadline (I2)."""
    group = make_group(script, unload_drain_timeout=50.0)
    await nursery.start(group.run)
    nursery.start_soon(use_and_fail, group, script)
    await trio.sleep(6)
    nursery.start_soon(group.unload, ("a",))
    await trio.sleep(1)
    script.alive["a"].crash()

    assert await use(group, "a", 500, script) == "a"
    nursery.cancel_scope.cancel()


async def use_and_fail(group: SwapGroup, script: Script) -> None:
    """Hold a lease for long, whatever becomes of the model: it is cut in the end."""
    with pytest.raises(LeaseCut):
        await use(group, "a", 1000, script)


async def test_an_unload_that_is_repeated_does_not_take_longer(script, nursery, autojump_clock):
    """Who asks again and again would else give it the whole time each time, and nobody else would ever come."""
    group = make_group(script, GroupConfig("pair", ("a", "b")), max_wait=5.0)
    await nursery.start(group.run)

    async def use_for_ever() -> None:
        with pytest.raises(LeaseCut, match="30 s after its model was to stop"):
            await use(group, "a", 1e5, script)

    nursery.start_soon(use_for_ever)
    await trio.sleep(10)

    async def ask_again() -> None:
        while True:
            with trio.move_on_after(5):
                await group.unload(["a"])
            await trio.sleep(1)

    nursery.start_soon(ask_again)
    await trio.sleep(1)
    begun = trio.current_time()
    await use(group, "b", 0, script)
    assert trio.current_time() - begun < group.models["a"].unload_drain_timeout + 10
    nursery.cancel_scope.cancel()


async def test_an_unload_of_one_that_makes_room_already_does_not_forget_who_waits(script, nursery, autojump_clock):
    """An idle model goes together with one that serves; unloaded meanwhile, it goes alone, and the newcomer comes."""
    pair = GroupConfig("pair", ("b", "c"), swap=False, exclusive=False)
    group = make_group(script, GroupConfig("big", ("a",)), pair, max_wait=5.0)
    await nursery.start(group.run)
    await use(group, "c", 0, script)
    nursery.start_soon(use, group, "b", 100, script)
    await trio.sleep(10)
    nursery.start_soon(use, group, "a", 0, script)
    await trio.sleep(20)
    assert (state_of(group, "b"), state_of(group, "c")) == (State.DRAINING, State.DRAINING)
    await group.unload(["c"])
    assert state_of(group, "c") is State.STOPPED
    await trio.sleep(200)

    assert "a served" in [text for _, text in script.trace]
    nursery.cancel_scope.cancel()


async def test_groups_that_cannot_collide_do_not_wait_for_each_other(script, nursery, autojump_clock):
    """Two members of a group that does not swap load one after the other and stay."""
    group = make_group(script, GroupConfig("together", ("a", "b"), swap=False))
    await nursery.start(group.run)
    await use(group, "a", 0, script)
    await use(group, "b", 0, script)

    assert script.alive.keys() == {"a", "b"}
    nursery.cancel_scope.cancel()


# ---- clients that leave ---------------------------------------------------------------------


async def test_a_client_that_leaves_the_queue_leaves_nothing(script, nursery, autojump_clock):
    """Its ticket is forgotten, the swap it wanted is called off and the gate opens again (I9)."""
    group = make_group(script, max_wait=10.0)
    await nursery.start(group.run)
    nursery.start_soon(use, group, "a", 1000, script)
    await trio.sleep(6)
    with trio.move_on_after(20):
        await use(group, "b", 1, script)

    await wait_all_tasks_blocked()
    assert state_of(group, "a") is State.READY
    assert not group._lock.locked()
    assert set(group.core._where) == {1}
    nursery.cancel_scope.cancel()


async def test_an_abandoned_load_gives_way(script, nursery, autojump_clock):
    """Nobody waits for A's load any more and B does: A is stopped at once and B starts (llama-swap #727)."""
    script.load = 500.0
    group = make_group(script)
    await nursery.start(group.run)
    with trio.move_on_after(10):
        await use(group, "a", 1, script)
    await use(group, "b", 1, script)

    assert (12, "a gone") in script.trace
    assert (512, "b ready") in script.trace
    nursery.cancel_scope.cancel()


# ---- failures --------------------------------------------------------------------------------


async def test_a_failed_start_is_an_answer_not_a_state(script, nursery, autojump_clock):
    """Three failing starts, then a good one, with nothing but time in between."""
    group = make_group(script)
    await nursery.start(group.run)
    script.fails = True
    for _ in range(3):
        with pytest.raises(StartFailed) as caught:
            await use(group, "a", 1, script)
        await trio.sleep(caught.value.retry_after)
    script.fails = False

    assert await use(group, "a", 1, script) == "a"
    nursery.cancel_scope.cancel()


async def test_a_bug_in_the_supervision_is_one_models_failure(script, nursery, autojump_clock):
    """An unexpected exception reaches the waiters as a failed start, not the daemon (I13)."""
    group = make_group(script)
    await nursery.start(group.run)

    def explode(name: str) -> None:
        raise RuntimeError("boom")

    script.on_spawn = explode
    with pytest.raises(StartFailed, match="boom"):
        await use(group, "a", 1, script)
    script.on_spawn = lambda name: None

    assert await use(group, "b", 1, script) == "b"
    nursery.cancel_scope.cancel()


async def test_who_asks_too_soon_is_told_what_went_wrong(script, nursery, autojump_clock):
    """At once, and without a start: until then nobody goes for it, and then all who ask share one trial."""
    group = make_group(script)
    await nursery.start(group.run)
    script.fails = True
    with pytest.raises(StartFailed):
        await use(group, "a", 1, script)
    script.fails = False
    await use(group, "b", 1, script)
    script.fails = True
    with pytest.raises(StartFailed):
        await use(group, "a", 1, script)
    script.trace.clear()
    began = trio.current_time()

    for wait, left in ((0.0, 2), (0.5, 2), (0.75, 1)):
        await trio.sleep(wait)
        with pytest.raises(StartFailed, match="told to fail; that makes 2 failures in a row") as caught:
            await use(group, "a", 1, script)
        assert caught.value.retry_after == left
    assert (script.trace, trio.current_time() - began) == ([], 1.25)

    await trio.sleep(0.75)
    script.fails = False
    async with trio.open_nursery() as asking:
        for _ in range(3):
            asking.start_soon(use, group, "a", 1, script)
    assert [text for _, text in script.trace].count("a spawned") == 1
    nursery.cancel_scope.cancel()


async def test_a_request_that_was_not_served_proves_nothing(script, nursery, autojump_clock):
    """Who gives up while it is served, is cut off, or gets an error, does not close the circuit; who is served does."""
    group = make_group(script)
    await nursery.start(group.run)

    async def crash_after(proof) -> list[float]:
        script.fails = True
        with pytest.raises(StartFailed):
            await use(group, "a", 1, script)
        script.fails = False
        await trio.sleep(group.views()[0].retry_in)
        await proof()
        script.alive["a"].crash()
        await trio.sleep(0.1)
        return group.views()[0].retry_in

    async def given_up() -> None:
        with trio.move_on_after(6):
            await use(group, "a", 100, script)

    async def told(*statuses: int) -> None:
        async with group.lease("a") as lease:
            for status in statuses:
                lease.answered(status)

    async def served() -> None:
        await use(group, "a", 1, script)

    for proof in (given_up, told, partial(told, 500), partial(told, 503)):
        assert await crash_after(proof) == pytest.approx(0.9)
        await group.unload(("a",))
    assert await crash_after(partial(told, 404)) == 0
    assert await crash_after(served) == 0
    nursery.cancel_scope.cancel()


async def test_a_crash_frees_the_place(script, nursery, autojump_clock):
    """A model that dies while it serves is started again for the next request."""
    group = make_group(script)
    await nursery.start(group.run)
    await use(group, "a", 1, script)
    script.alive["a"].crash()
    await wait_all_tasks_blocked()

    assert state_of(group, "a") is State.STOPPED
    assert await use(group, "a", 1, script) == "a"
    nursery.cancel_scope.cancel()


async def test_what_a_dead_server_left_is_granted_to_nobody(script, nursery, autojump_clock):
    """From the death to the end of the sweep requests wait, and a fresh start serves them."""
    script.sweep = 8.0
    group = make_group(script)
    await nursery.start(group.run)
    async with group.lease("a") as lease:
        script.alive["a"].crash()
        await wait_all_tasks_blocked()
        assert lease.dead.is_set()
        assert state_of(group, "a") is State.STOPPING
        begun = trio.current_time()

        assert await use(group, "a", 0, script) == "a"
    assert trio.current_time() - begun == script.sweep + script.load
    nursery.cancel_scope.cancel()


async def test_a_swap_does_not_wait_for_who_reads_from_the_dead(script, nursery, autojump_clock):
    """A lease on a dead server that is still held (by a client that does not read) delays no drain."""
    group = make_group(script, max_wait=10.0)
    await nursery.start(group.run)
    async with group.lease("a"):
        nursery.start_soon(use, group, "b", 0, script)
        await trio.sleep(20)
        assert state_of(group, "a") is State.DRAINING
        script.alive["a"].crash()
        await trio.sleep(20)

        assert script.alive.keys() == {"b"}
    nursery.cancel_scope.cancel()


async def test_a_stuck_process_keeps_its_token_and_blocks_nobody_for_ever(script, nursery, autojump_clock):
    """Who needs its room is told; when it ends after all the place is free again (I6, I7)."""
    group = make_group(script)
    await nursery.start(group.run)
    await use(group, "a", 1, script)
    script.stays_stuck = True
    with pytest.raises(ModelStuck):
        await use(group, "b", 1, script)
    stuck = script.alive["a"]

    assert group.limiter.borrowed_tokens == 1
    with pytest.raises(ModelStuck):
        await group.unload(("a",))
    script.stays_stuck = False
    stuck.die_after_all()
    await wait_all_tasks_blocked()
    assert await use(group, "b", 1, script) == "b"
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("never_kill", [False, True])
async def test_what_is_said_of_a_stuck_process_is_true(script, nursery, autojump_clock, caplog, never_kill):
    """Only who was sent SIGKILL has survived it; and who it is, for somebody has to end it."""
    script.stays_stuck = True
    group = make_group(script, never_kill=never_kill)
    await nursery.start(group.run)
    await use(group, "a", 1, script)
    with pytest.raises(ModelStuck, match='the process of model "a" could not be ended') as found:
        await use(group, "b", 1, script)

    assert "SIGKILL" not in found.value.message
    assert "end pid 1 by hand" in found.value.message
    with pytest.raises(ModelStuck, match="end pid 1 by hand"):
        await group.unload(("a",))
    why = "must not get SIGKILL (never_kill)" if never_kill else "survived SIGKILL"
    assert f"quarantined model=a pids=1: it did not end and {why}" in caplog.text
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("never_kill", [False, True])
async def test_who_is_served_by_a_stuck_process_is_told(script, nursery, autojump_clock, never_kill):
    """It neither answers nor breaks the connection; and when it has ended after all, its place is free."""
    script.stays_stuck, script.sweep = True, 7.0
    group = make_group(script, never_kill=never_kill)
    await nursery.start(group.run)

    async def hang() -> None:
        await trio.sleep(script.load + 1)
        script.alive["a"].crash()

    nursery.start_soon(hang)
    with pytest.raises(LeaseCut) as found:
        await use(group, "a", 1000, script)

    assert trio.current_time() == script.load + 1 + script.sweep
    why = "must not get SIGKILL (never_kill)" if never_kill else "survived SIGKILL"
    assert found.value.message.endswith(f'while model "a" served it: its process did not end and {why}')
    assert state_of(group, "a") is State.STOPPING
    script.stays_stuck = False
    script.alive["a"].die_after_all()
    await wait_all_tasks_blocked()
    assert await use(group, "a", 1, script) == "a"
    nursery.cancel_scope.cancel()


# ---- time to live, unload, shutdown ------------------------------------------------------------


async def test_ttl_unloads_an_idle_model_at_its_deadline(script, nursery, autojump_clock):
    """The clock starts when the last request ends."""
    group = make_group(script, ttl=30.0)
    await nursery.start(group.run)
    await use(group, "a", 100, script)
    ended = trio.current_time()
    await trio.sleep(1000)

    assert script.trace[-1] == (ended + 30 + script.stop, "a gone")
    nursery.cancel_scope.cancel()


async def test_unload_waits_for_what_is_served_and_tells_who_waits(script, nursery, autojump_clock):
    """The served request ends well, the waiting one is told, and unload returns when the tree is gone."""
    group = make_group(script)
    await nursery.start(group.run)
    answers: list[str] = []

    async def served() -> None:
        answers.append(await use(group, "a", 20, script))

    async def waits() -> None:
        with pytest.raises(ModelUnloaded):
            await use(group, "b", 1, script)
        answers.append("told")

    nursery.start_soon(served)
    await trio.sleep(6)
    nursery.start_soon(waits)
    await wait_all_tasks_blocked()
    await group.unload(("a", "b", "c"))

    assert answers == ["told", "a"]
    assert not script.alive
    nursery.cancel_scope.cancel()


async def test_unload_during_a_load_stops_it(script, nursery, autojump_clock):
    """And a request that comes meanwhile gets a fresh start of its own."""
    group = make_group(script)
    await nursery.start(group.run)

    async def first() -> None:
        with pytest.raises(ModelUnloaded):
            await use(group, "a", 1, script)

    nursery.start_soon(first)
    await trio.sleep(1)
    nursery.start_soon(group.unload, ("a",))
    await wait_all_tasks_blocked()

    assert await use(group, "a", 1, script) == "a"
    assert [text for _, text in script.trace].count("a spawned") == 2
    nursery.cancel_scope.cancel()


async def test_shutdown_finishes_what_is_served_and_ends(script, autojump_clock):
    """run() returns when everything is gone; new and waiting requests are told (I8)."""
    group = make_group(script)
    async with trio.open_nursery() as nursery:
        await nursery.start(group.run)
        nursery.start_soon(use, group, "a", 20, script)
        await trio.sleep(6)
        group.shutdown()
        with pytest.raises(ShuttingDown):
            await use(group, "b", 1, script)

    assert script.trace[-2:] == [(25, "a served"), (27, "a gone")]


async def test_shutdown_is_bounded_and_can_be_hastened(script, autojump_clock):
    """What does not end is cut at the drain deadline, or at once when asked."""
    for hasten in (False, True):
        group = make_group(script, unload_drain_timeout=30.0)
        begun = trio.current_time()
        async with trio.open_nursery() as nursery:
            await nursery.start(group.run)
            nursery.start_soon(cut_request, group, script)
            await trio.sleep(6)
            group.shutdown()
            if hasten:
                await wait_all_tasks_blocked()
                group.hasten("now")

        assert trio.current_time() - begun == 6 + (0 if hasten else 30) + script.stop


async def cut_request(group: SwapGroup, script: Script) -> None:
    with pytest.raises(LeaseCut):
        await use(group, "a", 10_000, script)


async def test_cancelling_the_group_ends_every_process(script):
    """However deep in a load or a drain: when run() is over nothing is left (I7)."""
    for when in range(0, 80, 3):
        clock = MockClock(autojump_threshold=0)

        async def main(moment: float = when) -> None:
            group = make_group(script, max_wait=20.0)
            with trio.move_on_after(moment):
                async with trio.open_nursery() as nursery:
                    await nursery.start(group.run)
                    nursery.start_soon(use, group, "a", 30, script)
                    nursery.start_soon(use, group, "b", 30, script)

        await trio.to_thread.run_sync(lambda c=clock, m=main: trio.run(m, clock=c))

        assert not script.alive


async def test_a_token_comes_to_where_there_is_none(autojump_clock):
    """Who is there has one at once; who has waited is let in before it, and there are no more for others."""
    here, there = trio.CapacityLimiter(1), trio.CapacityLimiter(1)
    moving, holding, waiting = (Run(spec("a"), 1, limiter=limiter) for limiter in (here, there, there))
    await moving.wait_token()
    await holding.wait_token()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(waiting.wait_token)
        await wait_all_tasks_blocked()
        moving.move_token(there)
        assert moving.token is there
        assert (here.borrowed_tokens, there.total_tokens) == (0, 1)
    assert set(there.statistics().borrowers) == {moving, holding, waiting}
