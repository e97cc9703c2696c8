"""Seeded bugs: each mutant of the scheduler breaks a law in some small world, so the laws can fail."""

from __future__ import annotations

import math
from collections.abc import Callable

import attrs
import pytest
from laws import LawBroken
from test_scheduler_walks import BACKING_OFF, FAILING, ONE_OF_TWO, TWO_VICTIMS, few, policy, ruled, sized
from walks import walk
from worlds import Limits, World, bring_up, let

from trioswap import planning, turns
from trioswap.circuit import Circuit
from trioswap.errors import ModelRemoved, StartFailed
from trioswap.footprints import Wish
from trioswap.lifecycle import Event, State
from trioswap.messages import Arrived, Grant
from trioswap.scheduler import Scheduler

Patch = pytest.MonkeyPatch


def wrap(patch: Patch, owner: object, name: str, wrapper: Callable) -> None:
    """Let *wrapper* stand for a method; it gets the original one first."""
    original = getattr(owner, name)
    patch.setattr(owner, name, lambda *args, **kwargs: wrapper(original, *args, **kwargs))


# ---- worlds ------------------------------------------------------------------------------------


def two() -> World:
    return ruled(ONE_OF_TWO, "ab", Limits(turns=True), policy=policy(2.0))


def two_in_peace() -> World:
    return ruled(ONE_OF_TWO, "ab", few(3, turns=True))


def two_with_one_slot() -> World:
    return ruled(ONE_OF_TWO, "ab", few(3), policy=policy(parallel=1))


def victims() -> World:
    return ruled(TWO_VICTIMS, "abc", few())


def two_gpus() -> World:
    return sized({"gpu0": 6, "gpu1": 6}, {"a": 6, "b": 2, "c": 3, "d": 3}, few(leaves=False, passing=False))


def large_and_small() -> World:
    """`a` is overdue, and needs the room of two of three that work."""
    world = sized({"gpu0": 6}, {"a": 4, "x": 2, "y": 2, "z": 2}, few(5, leaves=False))
    return let(bring_up(world, "x", "y", "z"), Arrived(4, "a"), "pass", "pass")


def large_before_small() -> World:
    """`a` is overdue and waits for `x`; `y` would fit at once, and then `a` would not."""
    world = sized({"gpu0": 6}, {"a": 6, "x": 3, "y": 3}, few(3, leaves=False))
    return let(bring_up(world, "x"), Arrived(2, "a"), "pass", "pass")


def out_of_memory() -> World:
    return sized({"gpu0": 8}, {"a": 4, "b": 4}, few(ooms=3, passing=False))


def estimated() -> World:
    return sized({"gpu0": 8}, {"a": Wish(estimate=4), "b": 4}, few(ooms=2, passing=False))


def squeezed() -> World:
    return sized({"gpu0": 8}, {"a": 4, "b": 4}, few(squeezes=({"gpu0": 8}, {"gpu0": 5}), passing=False))


def lent() -> World:
    return sized({"gpu0": 10}, {"a": 4, "z": 7}, few(passing=False), policies={"z": policy(yields=False)})


def failing() -> World:
    return ruled(ONE_OF_TWO, "ab", FAILING, policies={"a": BACKING_OFF})


# ---- bugs ---------------------------------------------------------------------------------------


def lease_not_counted(patch: Patch) -> None:
    def grant_all(self, model):
        for ticket in model.queue:
            model.queue.remove(ticket)
            self._out.append(Grant(ticket, model.name, model.attempt))

    patch.setattr(Scheduler, "_grant_all", grant_all)


def only_the_first_waiter_is_granted(patch: Patch) -> None:
    def grant_all(original, self, model):
        rest = [(ticket, model.queue.arrived(ticket)) for ticket in list(model.queue)[1:]]
        for ticket, _ in rest:
            model.queue.remove(ticket)
        original(self, model)
        for ticket, arrived in rest:
            model.queue.add(ticket, arrived, 1.0)

    wrap(patch, Scheduler, "_grant_all", grant_all)


def gate_stays_open(patch: Patch) -> None:
    def close_gate(original, self, model, claim):
        original(self, model, claim)
        model.move(Event.OPEN_GATE, self._now)

    wrap(patch, Scheduler, "_close_gate", close_gate)


def gate_never_opens_again(patch: Patch) -> None:
    patch.setattr(Scheduler, "_open_gate", lambda self, model: None)


def victims_end_before_they_are_drained(patch: Patch) -> None:
    patch.setattr(turns.Model, "can_end", property(lambda self: True))


def failed_start_leaves_its_waiters(patch: Patch) -> None:
    wrap(patch, Scheduler, "_ended", lambda original, self, model, attempt, _: original(self, model, attempt, None))


def starts_after_shutdown(patch: Patch) -> None:
    def shut_down(original, self):
        original(self)
        self._closing = False

    wrap(patch, Scheduler, "_shut_down", shut_down)


def ttl_ignores_leases(patch: Patch) -> None:
    def expires(self):
        return self.idle_since + self.policy.ttl if self.state is State.READY and self.policy.ttl else math.inf

    patch.setattr(turns.Model, "expires", property(expires))


def nobody_is_evicted(patch: Patch) -> None:
    patch.setattr(planning, "_can_be_put_out", lambda model: False)


def who_left_stays_in_the_queue(patch: Patch) -> None:
    def left(original, self, ticket, **kwargs):
        model = self._where.get(ticket)
        if model is not None and ticket in model.leases:
            original(self, ticket, **kwargs)

    wrap(patch, Scheduler, "_left", left)


def load_goes_on_for_nobody(patch: Patch) -> None:
    patch.setattr(planning, "_can_be_put_out", lambda model: model.policy.yields and model.serves)


def unload_keeps_waiters(patch: Patch) -> None:
    def unload(original, self, model, error, *why):
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(Scheduler, "_reject_all", lambda self, model, error: None)
            original(self, model, error, *why)

    wrap(patch, Scheduler, "_unload", unload)


def a_reload_rejects_who_waits(patch: Patch) -> None:
    def end(original, self, model, reason, *cause):
        if "reload" in reason:
            self._reject_all(model, lambda: ModelRemoved(model.name))
        original(self, model, reason, *cause)

    wrap(patch, Scheduler, "_end", end)


def a_reload_forgets_what_is_served(patch: Patch) -> None:
    def retire(original, self, replaced, removed, crowded):
        idle = [name for name in replaced if not self.models[name].leases]
        original(self, idle, removed, crowded)

    wrap(patch, Scheduler, "_retire", retire)


def a_removed_model_is_waited_for(patch: Patch) -> None:
    def arrived(original, self, ticket, model, weight):
        model.removed = False
        original(self, ticket, model, weight)

    def retire(original, self, replaced, removed, crowded):
        original(self, (*replaced, *removed), (), crowded)

    wrap(patch, Scheduler, "_arrived", arrived)
    wrap(patch, Scheduler, "_retire", retire)


def reloading() -> World:
    return ruled(ONE_OF_TWO, "ab", few(retires=True, cuts=True, passing=False))


def unloaded_gate_opens_again(patch: Patch) -> None:
    def unload(original, self, model, *why):
        original(self, model, *why)
        model.retiring = False

    wrap(patch, Scheduler, "_unload", unload)


def crash_is_not_noticed(patch: Patch) -> None:
    def ended(original, self, model, attempt, failure):
        if model.state is not State.READY:
            original(self, model, attempt, failure)

    wrap(patch, Scheduler, "_ended", ended)


def death_leaves_the_gate_open(patch: Patch) -> None:
    patch.setattr(Scheduler, "_died", lambda self, *args: None)


def _forgetful(planner):
    planner.after = dict(planner.after)
    give = planner._give
    # The room is given, and given again to whoever comes next.
    planner._give = lambda claim, holding: (give(claim, holding), planner.after.pop(claim.name, None))
    return planner


def promised_room_on_another_device_is_taken(patch: Patch) -> None:
    patch.setattr(planning._Planner, "_place_now", lambda self, claim: self.residency.place(claim.name, self.held))


def turn_lease_is_dropped(patch: Patch) -> None:
    patch.setattr(turns, "turn_lease", lambda model: 0.0)


def max_wait_is_ignored(patch: Patch) -> None:
    for module in (planning, turns):
        patch.setattr(module, "due_at", lambda claim, against=1.0: math.inf)


def parallel_is_ignored(patch: Patch) -> None:
    patch.setattr(turns.Model, "has_room", property(lambda self: True))


def stale_attempts_are_believed(patch: Patch) -> None:
    patch.setattr(Scheduler, "_is_news", lambda self, model, attempt, *states: model.state in states)


def out_of_memory_is_tried_for_ever(patch: Patch) -> None:
    wrap(patch, Scheduler, "_tries_again", lambda original, self, *args: original(self, *args) or True)


def out_of_memory_is_told_at_once(patch: Patch) -> None:
    wrap(patch, Scheduler, "_tries_again", lambda original, self, *args: bool(original(self, *args)) and False)


def out_of_memory_asks_for_no_more(patch: Patch) -> None:
    patch.setattr("trioswap.footprints.Footprints.ran_out", lambda self, model, placed: None)


def memory_is_not_given_back(patch: Patch) -> None:
    patch.setattr(Scheduler, "_relieve", lambda self: None)


def circuit_never_opens(patch: Patch) -> None:
    patch.setattr(Circuit, "is_open", lambda self, now: False)


def circuit_never_closes_again(patch: Patch) -> None:
    patch.setattr(Circuit, "is_open", lambda self, now: self.failures > 1)


def success_does_not_count(patch: Patch) -> None:
    wrap(patch, Scheduler, "_left", lambda original, self, ticket, served: original(self, ticket, served=False))


def old_failures_count(patch: Patch) -> None:
    """News of an attempt that is over open the circuit of the present one."""

    def ended(original, self, model, attempt, failure):
        if attempt != model.attempt:
            model.circuit.failed(StartFailed(model.name, "long ago"), 1.0, 2.0, self._now)
        original(self, model, attempt, failure)

    wrap(patch, Scheduler, "_ended", ended)


def others_go_for_what_fails(patch: Patch) -> None:
    """Who asks waits until it may be tried, and meanwhile the place is made free."""

    def arrived(original, self, ticket, model, weight):
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(Circuit, "is_open", lambda self, now: False)
            original(self, ticket, model, weight)

    wrap(patch, Scheduler, "_arrived", arrived)


def who_waits_is_left_to_a_crash(patch: Patch) -> None:
    def failed(original, self, model, failure):
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(Scheduler, "_reject_all", lambda self, model, error: None)
            original(self, model, failure)

    wrap(patch, Scheduler, "_failed", failed)


def told_to_come_too_soon(patch: Patch) -> None:
    def refusal(self, now):
        return self.last.again(times=self.failures, retry_after=max(1, math.floor(self.open_until - now) - 1))

    patch.setattr(Circuit, "refusal", refusal)


def told_to_come_at_once(patch: Patch) -> None:
    patch.setattr(Circuit, "refusal", lambda self, now: self.last.again(retry_after=0))


def _all_movable(original, self, *args):
    original(self, *args)
    self.unmovable = {}


def hopeless_ones_wait(patch: Patch) -> None:
    patch.setattr(planning._Planner, "_is_hopeless", lambda self, claim: False)


def loads_are_not_counted(patch: Patch) -> None:
    def start(original, self, claim):
        self.loads = 0
        original(self, claim)

    wrap(patch, planning._Planner, "_start", start)


def more_go_than_need_to(patch: Patch) -> None:
    def choose(original, self, claim, *args, **kwargs):
        chosen = original(self, claim, *args, **kwargs)
        idle = {n for n in self.movable if self.models[n].state is State.READY and not self.models[n].has_work}
        return chosen if chosen is None else chosen | idle

    wrap(patch, planning._Planner, "_choose", choose)


@attrs.frozen
class Bug:
    """A mutant, the world that shows it, and the law it breaks."""

    mutate: Callable[[Patch], None]
    world: Callable[[], World]
    law: str


BUGS = [
    Bug(lease_not_counted, two, "counts exactly what is being served"),
    Bug(only_the_first_waiter_is_granted, two, "an open gate lets in whom it can"),
    Bug(gate_stays_open, two, "gates are as they should be"),
    Bug(gate_never_opens_again, two, "a gate is closed for somebody"),
    Bug(victims_end_before_they_are_drained, two, "nobody is served by what is stopped"),
    Bug(failed_start_leaves_its_waiters, two, "a failed start is told to all"),
    Bug(starts_after_shutdown, two, "no start after shutdown"),
    Bug(ttl_ignores_leases, two, "nobody is served by what is stopped"),
    Bug(nobody_is_evicted, two, "gets its turn"),
    Bug(who_left_stays_in_the_queue, two, "no waiter is lost"),
    Bug(load_goes_on_for_nobody, two, "gets its turn"),
    Bug(unload_keeps_waiters, two, "who waits for an unloaded model is told at once"),
    Bug(a_reload_rejects_who_waits, reloading, "an error is true, also ModelRemoved"),
    Bug(a_reload_forgets_what_is_served, reloading, "a model that was replaced or removed ends"),
    Bug(a_removed_model_is_waited_for, reloading, "who waits for a removed model is told at once"),
    Bug(unloaded_gate_opens_again, two, "a gate that was closed for an unload stays closed"),
    Bug(crash_is_not_noticed, two, "counts exactly what is being served|state and process agree"),
    Bug(death_leaves_the_gate_open, two, "counts exactly what is being served|a grant needs a model that stays"),
    Bug(promised_room_on_another_device_is_taken, two_gpus, "took the room of"),
    Bug(turn_lease_is_dropped, two, "a turn has its lease"),
    Bug(max_wait_is_ignored, two, "gets its turn"),
    Bug(parallel_is_ignored, two_with_one_slot, "no more are served at the same time"),
    Bug(stale_attempts_are_believed, two, "late news"),
    Bug(out_of_memory_is_tried_for_ever, out_of_memory, "a failed start is told to all"),
    Bug(out_of_memory_is_told_at_once, out_of_memory, "it is tried once more"),
    Bug(out_of_memory_asks_for_no_more, estimated, "it gets more"),
    Bug(memory_is_not_given_back, squeezed, "gives back what others have taken"),
    Bug(circuit_never_opens, failing, "what fails is not tried"),
    Bug(circuit_never_closes_again, failing, "what does not fail is"),
    Bug(success_does_not_count, failing, "what does not fail is"),
    Bug(old_failures_count, failing, "late news"),
    Bug(others_go_for_what_fails, failing, "which has just failed|nobody waits for what has just failed"),
    Bug(who_waits_is_left_to_a_crash, failing, "a failed start is told to all|which has just failed"),
    Bug(told_to_come_too_soon, failing, "who asks again when it was told to"),
    Bug(told_to_come_at_once, failing, "nobody is told to ask again at once"),
    Bug(hopeless_ones_wait, lent, "told at once"),
    Bug(loads_are_not_counted, victims, "no more load at the same time"),
    Bug(more_go_than_need_to, two_gpus, "without need"),
]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.mutate.__name__)
def test_a_seeded_bug_is_caught_by_a_law(bug, monkeypatch):
    """What breaks is a law about behaviour, not the mutant itself."""
    world = bug.world()
    bug.mutate(monkeypatch)

    with pytest.raises(LawBroken, match=bug.law):
        walk(world)


@pytest.mark.walks
@pytest.mark.parametrize("world", [large_before_small, two_in_peace], ids=lambda world: world.__name__)
def test_without_the_bug_the_same_world_keeps_the_laws(world):
    """So it is the bug that breaks them; the other worlds are walked elsewhere, or are like those."""
    assert walk(world()) > 100
