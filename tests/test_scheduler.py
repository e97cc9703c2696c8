"""The scheduler: single rules, shown one by one.

That they hold in every state, and together, is shown by walks (`test_scheduler_walks`), by chance
(`test_scheduler_machine`) and against adversaries (`test_scheduler_bounds`).
"""

from __future__ import annotations

import math

import pytest

from trioswap.config import GroupConfig
from trioswap.errors import (
    DoesNotFit,
    MemoryLent,
    ModelCrashed,
    ModelRemoved,
    ModelStuck,
    ModelUnloaded,
    NothingLeftToStart,
    ShuttingDown,
    StartFailed,
)
from trioswap.footprints import Footprints, Wish
from trioswap.learning import Average, Costs
from trioswap.lifecycle import State
from trioswap.messages import (
    Arrived,
    BecameReady,
    CloseGate,
    Command,
    Died,
    Drained,
    Ended,
    Event,
    GotStuck,
    Grant,
    Left,
    Measured,
    OpenGate,
    Policy,
    Reject,
    RetireAsked,
    Rules,
    ShutdownBegan,
    Squeezed,
    Start,
    Stop,
    Swap,
    UnloadAsked,
    WokeUp,
)
from trioswap.residency.budget import Budget
from trioswap.residency.groups import Groups
from trioswap.scheduler import Scheduler

A_LOAD, A_STOP = 5.0, 1.0  # seconds that everything is expected to take here


class Play:
    """A scheduler, and who is who: events are said with names, attempts are looked up."""

    def __init__(self, models: str = "ab", *, rules: Rules | None = None, needs=None, size=None, **policy) -> None:
        policies = {name: Policy(**{"turn_lease": 0.0, **policy}) for name in models}
        costs = {name: Costs(Average(A_LOAD, True), Average(A_STOP, True)) for name in models}
        self.budget = None
        residency = Groups((GroupConfig("(default)", tuple(models)),))
        if needs is not None:
            wishes = {name: Wish(declared=needs.get(name)) for name in models}
            residency = self.budget = Budget({"ram": size}, Footprints(("ram",), wishes))
        self.core = Scheduler(policies, residency, rules=rules, costs=costs, budget=self.budget)
        self.ticket = 0

    def policy(self, name: str, **changes) -> None:
        """Let *name* have a policy of its own."""
        self.core.models[name].policy = Policy(**{"turn_lease": 0.0, **changes})

    def say(self, event: Event, now: float) -> list[Command]:
        return self.core.handle(event, now)

    def ask(self, name: str, now: float, weight: float | None = None) -> list[Command]:
        self.ticket += 1
        return self.say(Arrived(self.ticket, name, weight), now)

    def attempt(self, name: str) -> int:
        return self.core.models[name].attempt

    def ready(self, name: str, now: float) -> list[Command]:
        return self.say(BecameReady(name, self.attempt(name)), now)

    def ended(self, name: str, now: float, failure: StartFailed | None = None) -> list[Command]:
        return self.say(Ended(name, self.attempt(name), failure), now)

    def drained(self, name: str, now: float) -> list[Command]:
        return self.say(Drained(name, self.attempt(name)), now)

    def bring_up(self, name: str, now: float = 0.0) -> int:
        """Let a request load *name* where there is room; return its ticket, which holds a lease."""
        assert types(self.ask(name, now)) == [Start]
        assert types(self.ready(name, now)) == [Grant]
        return self.ticket

    def state(self, name: str) -> State:
        return self.core.models[name].state


def types(commands: list[Command]) -> list[type]:
    return [type(command) for command in commands]


def evicted(commands: list[Command]) -> set[str]:
    return {e.model for command in commands if isinstance(command, Swap) for e in command.evictions}


def told(commands: list[Command]) -> list[tuple[int, type, int | None]]:
    """Who is refused, with what, and when to ask again."""
    return [(c.ticket, type(c.error), c.error.retry_after) for c in commands if isinstance(c, Reject)]


# ---- serving -----------------------------------------------------------------------------------


def test_one_start_serves_all_waiters():
    """Whoever comes while the model loads is granted in the step that sees it ready (I5)."""
    play = Play()
    assert play.ask("a", 0) == [Start("a", 1)]
    assert play.ask("a", 1) == play.ask("a", 2) == []
    assert play.ready("a", 3) == [Grant(1, "a", 1), Grant(2, "a", 1), Grant(3, "a", 1)]


def test_no_more_at_once_than_the_server_can():
    """Beyond `parallel` they wait here, and each that leaves lets in the next."""
    play = Play(parallel=2)
    play.bring_up("a")
    assert types(play.ask("a", 1)) == [Grant]
    assert play.ask("a", 2) == play.ask("a", 3) == []
    assert play.say(Left(1), 4) == [Grant(3, "a", 1)]
    assert play.say(Left(2), 5) == [Grant(4, "a", 1)]


def test_within_a_model_the_weighted_age_decides():
    """The heavy one that came later goes first, but a light one is not overtaken for ever."""
    play = Play(parallel=1, max_wait=60.0)
    play.bring_up("a")
    play.ask("a", 0, 0.25)  # 240 s from now
    play.ask("a", 10, 4.0)  # 25
    play.ask("a", 239, 1.0)  # 299
    assert play.say(Left(1), 240) == [Grant(3, "a", 1)]
    assert play.say(Left(3), 241) == [Grant(2, "a", 1)]


# ---- turns --------------------------------------------------------------------------------------


def test_an_idle_model_goes_at_once():
    """Nobody waits for a turn that nobody uses; the newcomer starts in the step in which the other has ended."""
    play = Play()
    play.bring_up("a")
    play.say(Left(1), 1)
    assert evicted(play.ask("b", 2)) == {"a"}
    assert play.ended("a", 3) == [Start("b", 2)]


def test_a_busy_model_is_left_alone_until_max_wait():
    """B waits while A works; at max_wait the gate of A closes, and what A serves may finish."""
    play = Play(max_wait=60.0)
    play.bring_up("a")
    assert play.ask("b", 5) == []
    assert play.core.wake_at == 65
    assert types(play.ask("a", 64.9)) == [Grant]
    assert types(play.say(WokeUp(), 65)) == [CloseGate]
    assert play.ask("a", 66) == []
    assert play.say(Left(1), 70) == []
    assert evicted(play.say(Left(3), 71)) == {"a"}


def test_a_fresh_turn_has_its_lease():
    """Though somebody is overdue already: swaps alone serve nobody."""
    play = Play("abc", turn_lease=2.0, max_wait=20.0)
    play.bring_up("c")
    play.ask("a", 1)
    play.ask("b", 2)
    play.say(WokeUp(), 21)
    play.say(Left(1), 22)
    play.ended("c", 23)
    assert types(play.ready("a", 28)) == [Grant]  # the gate stays open, though b is overdue since 22
    assert play.core.wake_at == 28 + 2 * (A_LOAD + A_STOP)
    assert types(play.say(WokeUp(), 40)) == [CloseGate]


@pytest.mark.parametrize(("max_wait", "seconds"), [(60.0, 24.0), (10.0, 10.0), (2.0, 6.0)])
def test_a_turn_lease_is_never_longer_than_others_may_wait(max_wait, seconds):
    """Nor shorter than one swap: else nothing but swaps would happen."""
    from trioswap.turns import Model, turn_lease

    model = Model("a", Policy(max_wait=max_wait), Costs(Average(A_LOAD), Average(A_STOP)))
    assert turn_lease(model) == seconds


def test_a_model_just_put_out_goes_to_the_back():
    """Of two claims the one kept waiting longest is next; a model put out starts to wait anew."""
    play = Play("abc", max_wait=10.0)
    play.bring_up("a")
    play.ask("b", 1)
    play.ask("c", 2)
    play.say(WokeUp(), 11)
    play.ask("a", 11.5)
    play.say(Left(1), 12)
    play.ended("a", 13)
    grant, close = play.ready("b", 14)  # c is overdue by now; a has waited since 12
    assert isinstance(grant, Grant)
    assert (close.model, close.reason) == ("b", "for c, waited 12.0 s")


def test_an_agent_that_pauses_keeps_its_model():
    """Three short pauses are a habit: the fourth is waited for, and only as long as it usually takes."""
    play = Play(turn_lease=4.0)
    play.core.models["a"].costs.service.value = play.core.models["b"].costs.service.value = 1.0
    play.bring_up("a")
    now = 0.0
    for _ in range(4):
        now += 1.0
        play.say(Left(play.ticket), now)
        now += 0.5
        assert types(play.ask("a", now)) == [Grant]
    last = play.ticket
    assert play.ask("b", now) == []
    assert play.say(Left(last), now + 1) == [], "it is held"
    assert now + 1 + 0.5 < play.core.wake_at < now + 1 + 1.0
    assert evicted(play.say(WokeUp(), now + 2)) == {"a"}


def test_nobody_is_held_without_a_habit():
    """Long pauses, or none seen yet: an idle model goes at once."""
    play = Play(turn_lease=4.0)
    play.core.models["a"].costs.gaps.extend([30.0] * 12)
    play.bring_up("a")
    play.ask("b", 1)
    assert evicted(play.say(Left(1), 2)) == {"a"}


def test_waiting_counts_by_weight():
    """Four times as heavy is overdue in a quarter of the time, a quarter as heavy in four times."""
    for weight, due in ((4.0, 15.0), (1.0, 60.0), (0.25, 240.0)):
        play = Play(max_wait=60.0)
        play.bring_up("a")
        play.ask("b", 0, weight)
        assert play.core.wake_at == due


def test_priority_decides_only_among_those_that_are_not_overdue():
    """The higher goes first when somebody goes by himself; once one is overdue only time counts."""
    play = Play("abc", max_wait=60.0)
    play.policy("c", priority=5)
    play.bring_up("a")
    play.ask("b", 1)
    play.ask("c", 2)
    [swap] = play.say(Left(1), 3)
    assert swap.target == "c"

    play = Play("abc", max_wait=60.0)
    play.policy("c", priority=5)
    play.bring_up("a")
    play.ask("b", 1)
    play.ask("c", 2)
    play.say(WokeUp(), 61)
    [swap] = play.say(Left(1), 62.5)
    assert swap.target == "b"


def test_llama_swaps_line_knows_no_bound():
    """By priority and arrival, and a busy model stays as long as it is busy."""
    play = Play("abc", rules=Rules(math.inf, by_arrival=True), max_wait=math.inf, linger=0.0)
    play.bring_up("a")
    play.ask("b", 1)
    assert play.core.wake_at == math.inf
    assert play.say(WokeUp(), 10_000) == []
    [swap] = play.say(Left(1), 10_001)
    assert swap.target == "b"


def test_a_loan_does_not_put_out_who_has_only_been_promised_its_room():
    """Who is before it in the line has its turn first, and who came later has none before either of them."""
    needs = {"a": 6, "b": 6, "c": 3, "d": 1, "e": 2, "z": 7}
    play = Play("abcdez", rules=Rules(math.inf, by_arrival=True), needs=needs, size=10)
    for name in "abcde":
        play.policy(name, max_wait=math.inf, linger=0.0)
    play.policy("z", yields=False)
    play.bring_up("d")
    play.bring_up("a")
    play.ask("b", 1)
    play.ask("z", 2)
    assert types(play.say(WokeUp(), 62)) == [CloseGate]
    [swap] = play.say(Left(2), 63)
    assert (swap.target, evicted([swap])) == ("b", {"a"})

    assert play.ask("c", 64) == []  # beside `b` there is room, but then `z` had to wait for both
    assert play.ask("e", 64) == []
    assert play.core.plan.blocked["z"].by == ("b",)
    assert play.ended("a", 65) == [Start("b", 3, {"ram": 6}), Start("e", 4, {"ram": 2})]
    assert types(play.ready("b", 70)) == [Grant, CloseGate]
    assert types(play.say(Left(3), 71)) == [Swap]
    assert play.ended("b", 72)[-1] == Start("z", 5, {"ram": 7})


# ---- changes of mind ---------------------------------------------------------------------------


def test_the_last_waiter_that_leaves_opens_the_gate_again():
    """The victim goes on, and its own queue is served."""
    play = Play(max_wait=10.0)
    play.bring_up("a")
    play.ask("b", 0)
    assert types(play.say(WokeUp(), 10)) == [CloseGate]
    play.ask("a", 11)
    assert types(play.say(Left(2), 12)) == [OpenGate, Grant]
    assert play.state("a") is State.READY


def test_a_load_that_nobody_wants_gives_way_only_to_others():
    """Alone it may finish and stay; once another model is asked for it is stopped."""
    play = Play()
    play.ask("a", 0)
    assert play.say(Left(1), 1) == []
    [swap] = play.ask("b", 2)
    assert [(e.model, e.was) for e in swap.evictions] == [("a", State.STARTING)]
    assert types(play.ended("a", 3)) == [Start]


def test_an_eviction_says_why():
    """How long it was idle, what its loss costs, for whom, and how long that one has waited."""
    play = Play()
    play.bring_up("a")
    play.say(Left(1), 10)
    [swap] = play.ask("b", 550)
    assert str(swap.evictions[0]) == "evicted a: idle 540.0 s, reload costs 3.5 s; for b, waited 0.0 s"


# ---- failures -----------------------------------------------------------------------------------


def test_a_failed_start_is_told_to_every_waiter_with_its_own_error():
    """Each waiter gets a fresh instance, and the next request tries again."""
    play = Play()
    play.ask("a", 0)
    play.ask("a", 0)
    one, two = play.ended("a", 1, StartFailed("a", "boom"))
    assert isinstance(one.error, StartFailed)
    assert one.error is not two.error
    assert types(play.ask("a", 2)) == [Start]


@pytest.mark.parametrize("mended_by", ["time", "success"])
def test_nobody_is_put_out_for_what_cannot_even_be_tried(mended_by):
    """For a moment, or until a start succeeds; who is there serves on, and who needs nobody's place is tried."""
    play = Play("abcde", needs={"a": 40, "b": 40, "c": 40, "d": 70, "e": 10}, size=100)
    play.bring_up("e")
    tickets = [play.bring_up(name) for name in "ab"]
    for ticket, now in zip(tickets, (1, 2), strict=True):
        play.say(Left(ticket), now)
    assert evicted(play.ask("c", 600)) == {"a"}
    assert types(play.ended("a", 601)) == [Start]
    [reject] = play.ended("c", 602, NothingLeftToStart("c", "no descriptor is left"))
    assert isinstance(reject.error, NothingLeftToStart)
    [refused] = play.ask("d", 603)
    assert (refused.error.model, refused.error.why) == ("d", "no descriptor is left")
    assert types(play.ask("b", 604)) == [Grant]
    play.say(Squeezed({"ram": 10}), 604)
    assert types(play.ask("b", 604)) == [Grant], "it would not fit any more, but it is there"
    play.say(Squeezed({"ram": 100}), 604)
    for ticket in (play.ticket, play.ticket - 1):
        play.say(Left(ticket), 604)
    if mended_by == "time":
        assert evicted(play.ask("d", 607)) == {"b"}
    else:
        assert types(play.ask("c", 605)) == [Start]
        play.ready("c", 605)
        play.say(Left(play.ticket), 605)
        assert evicted(play.ask("d", 606)) == {"b", "c"}


@pytest.mark.parametrize("gate_closed", [False, True])
def test_nor_for_a_claim_that_was_there_before_the_shortage(gate_closed):
    """It is told what a newcomer is when others would go for it; while they work it waits on, and may outlast it."""
    play = Play("abcd", needs={"a": 40, "b": 60, "c": 40, "d": 60}, size=100, max_wait=60.0)
    tickets = {name: play.bring_up(name) for name in "ab"}
    play.ask("c", 1)
    assert play.ask("d", 1) == []
    assert evicted(play.say(Left(tickets["a"]), 58)) == {"a"}
    assert types(play.ended("a", 59)) == [Start]
    [failed] = play.ended("c", 60, NothingLeftToStart("c", "no descriptor is left"))
    assert failed.ticket == 3
    if not gate_closed:
        assert types(play.say(Left(tickets["b"]), 60.5)) == [Reject]
        assert types(play.ask("b", 62)) == [Grant]
        return
    assert types(play.say(WokeUp(), 61)) == [CloseGate]
    play.ask("b", 61)
    reject, opened, grant = play.say(Left(tickets["b"]), 62)
    assert (reject.ticket, type(reject.error), reject.error.model) == (4, NothingLeftToStart, "d")
    assert types([opened, grant]) == [OpenGate, Grant]
    play.say(Left(play.ticket), 64)
    assert evicted(play.ask("d", 65)) == {"b"}


def test_a_claim_that_waits_out_the_shortage_is_served():
    """Nobody was to be put out for it meanwhile."""
    play = Play("abcd", needs={"a": 40, "b": 60, "c": 40, "d": 60}, size=100)
    tickets = {name: play.bring_up(name) for name in "ab"}
    play.say(Left(tickets["a"]), 1)
    assert evicted(play.ask("c", 2)) == {"a"}
    play.ended("a", 3)
    play.ended("c", 4, NothingLeftToStart("c", "no descriptor is left"))
    assert play.ask("d", 5) == []
    assert evicted(play.say(Left(tickets["b"]), 9)) == {"b"}


def test_who_has_room_is_tried_during_a_shortage_though_a_load_for_nobody_ends_for_it():
    """That one is no loss: nobody waits for it."""
    play = Play("abc", needs={"a": 30, "b": 30, "c": 30}, size=100)
    play.ask("c", 0)
    play.ended("c", 1, NothingLeftToStart("c", "no descriptor is left"))
    assert types(play.ask("a", 2)) == [Start]
    play.say(Left(play.ticket), 2.5)
    assert evicted(play.ask("b", 3)) == {"a"}


def test_out_of_memory_is_tried_once_more_with_more_room():
    """A quarter more, for which others go; the second failure is the answer."""
    play = Play(needs={"a": 40, "b": 60}, size=100)
    play.say(Left(play.bring_up("b")), 1)
    assert play.ask("a", 2) == [Start("a", 2, {"ram": 40})]
    assert evicted(play.ended("a", 3, StartFailed("a", "out of memory", out_of_memory=True))) == {"b"}
    assert play.ended("b", 4) == [Start("a", 3, {"ram": 50})]
    [reject] = play.ended("a", 5, StartFailed("a", "out of memory", out_of_memory=True))
    assert isinstance(reject.error, StartFailed)


def test_an_unkillable_process_blocks_nobody_for_ever():
    """Who needs its room is told at once; the model that holds it is told too (I6, I7)."""
    play = Play()
    play.say(Left(play.bring_up("a")), 1)
    play.ask("b", 2)
    [reject] = play.say(GotStuck("a", 1), 30)
    assert isinstance(reject.error, ModelStuck)
    assert isinstance(play.ask("a", 31)[0].error, ModelStuck)
    play.ended("a", 60)
    assert types(play.ask("b", 61)) == [Start]


def test_what_can_never_fit_is_told_at_once():
    """Too large for the machine, or beside memory that is lent."""
    play = Play(needs={"a": 101, "b": 60}, size=100)
    [reject] = play.ask("a", 0)
    assert isinstance(reject.error, DoesNotFit)

    play = Play(needs={"a": 50, "b": 60}, size=100)
    play.policy("a", ttl=0.0, yields=False)
    play.bring_up("a")
    [reject] = play.ask("b", 1)
    assert isinstance(reject.error, MemoryLent)


# ---- memory -------------------------------------------------------------------------------------


def test_who_fits_shares():
    """No group is written, and both are resident."""
    play = Play("abc", needs={"a": 40, "b": 50, "c": 60}, size=100)
    play.bring_up("a")
    play.bring_up("b", 1)
    assert [v.holding for v in play.core.views(0)] == [{"ram": 40}, {"ram": 50}, {}]


def test_the_room_of_an_overdue_claim_is_promised():
    """A large model is not overtaken for ever by small ones that would still fit."""
    play = Play("abc", needs={"a": 40, "b": 40, "c": 80}, size=100, max_wait=10.0)
    play.bring_up("a")
    play.ask("c", 1)
    play.say(WokeUp(), 11)  # the gate of a closes
    assert play.state("a") is State.DRAINING
    assert play.ask("b", 12) == [], "there is room for it, but not for long"
    assert evicted(play.say(Left(1), 13)) == {"a"}


def test_the_cheapest_set_goes():
    """Not the model that takes three times as long to load again for the same room."""
    play = Play("abc", needs={"a": 40, "b": 40, "c": 60}, size=100)
    play.core.models["a"].costs.load = Average(15.0, True)
    for name in "ab":
        play.say(Left(play.bring_up(name)), 1)
    play.core.models["a"].credit, play.core.models["b"].credit = 15.0, 5.0
    assert evicted(play.ask("c", 2)) == {"b"}


def test_idle_models_go_while_others_use_their_memory():
    """The cheapest idle one first; who works stays."""
    play = Play("ab", needs={"a": 40, "b": 40}, size=100)
    play.say(Left(play.bring_up("a")), 1)
    play.bring_up("b", 2)
    [stop] = play.say(Squeezed({"ram": 50}), 3)
    assert isinstance(stop, Stop)
    assert (stop.model, stop.reason) == ("a", "the memory that it holds is used by others")
    play.ended("a", 4)
    assert play.say(Squeezed({"ram": 10}), 5) == []


def test_what_is_measured_is_held():
    """Who uses more than it asked for counts with what it uses, and is remembered."""
    play = Play("ab", needs={"a": 40, "b": 40}, size=100)
    play.bring_up("a")
    play.say(Measured("a", 1, {"ram": 70}), 1)
    assert play.core.views(0)[0].holding == {"ram": 70}
    assert types(play.ask("b", 2)) == [], "there is no room for it now"
    play.say(UnloadAsked(("a",)), 3)
    play.say(Left(1), 4)
    play.ended("a", 5)
    assert play.budget.footprints.need("a").holdings == ({"ram": 70},)


def test_two_claims_do_not_drain_each_others_victim():
    """Each event would close one gate and open the other, and neither model would ever run dry."""
    play = Play("abde", needs=dict.fromkeys("abde", 5), size=10, max_wait=2.0)
    play.policy("a", max_wait=10.0)
    for name in "de":
        play.ask(name, 0, 4.0)
        play.ready(name, 0)
    play.ask("a", 0)
    play.ask("b", 8)
    assert types(play.say(WokeUp(), 16)) == [CloseGate]
    for now in (17, 18, 19):
        assert play.ask("b", now) == []


def test_a_light_request_that_wakes_an_idle_model_is_thought_about():
    """It protects the model less than its habit of coming back did, so the time to wake is earlier."""
    play = Play(turn_lease=4.0, max_wait=2.0)
    play.core.models["a"].costs.load = Average(10.0, True)
    play.bring_up("a", 10)
    for model in play.core.models.values():
        model.costs.load, model.costs.service = Average(10.0, True), Average(1.0, True)
        model.costs.gaps.extend([3.0] * 6)
    play.say(Left(1), 12)
    assert play.ask("b", 12.1) == []
    held_until = play.core.wake_at
    assert types(play.ask("a", 12.2, 0.25)) == [Grant]
    assert held_until > play.core.wake_at == pytest.approx(12.1 + 2.0 / 4)


# ---- the end -----------------------------------------------------------------------------------


def test_ttl_counts_from_the_end_of_the_last_request():
    """A long answer does not count as idleness."""
    play = Play(ttl=30.0)
    play.bring_up("a")
    assert play.core.wake_at == math.inf
    play.say(Left(1), 100)
    assert play.core.wake_at == 130
    assert play.say(WokeUp(), 129.9) == []
    assert types(play.say(WokeUp(), 130)) == [Stop]


def test_unload_tells_the_waiters_and_lets_the_served_finish():
    """Waiting requests are answered at once; the model stops when nothing is in flight any more."""
    play = Play()
    play.bring_up("a")
    play.ask("b", 1)
    close, reject = play.say(UnloadAsked(("a", "b")), 2)
    assert (close.model, close.unload) == ("a", True)
    assert isinstance(reject.error, ModelUnloaded)
    assert types(play.say(Left(1), 3)) == [Stop]


def test_a_reload_replaces_a_server_and_keeps_its_waiters():
    """What is served may finish, nobody new is granted, and then the next server starts for those who wait."""
    play = Play()
    play.bring_up("a")
    [close] = play.say(RetireAsked(("a",)), 2)
    assert (close.model, close.unload) == ("a", True)
    assert play.ask("a", 3) == []
    assert play.say(RetireAsked(("a",)), 4) == []  # it has its time once, however many reloads come
    assert types(play.say(Left(1), 5)) == [Stop]
    assert types(play.say(Ended("a", 1), 6)) == [Start]


def test_a_reload_that_removes_a_model_tells_its_waiters():
    """Who waits, and whoever comes until it is gone; what is served may finish, and nothing starts again."""
    play = Play()
    play.bring_up("a")
    play.policy("a", parallel=1)
    play.ask("a", 1)
    reject, close = play.say(RetireAsked((), ("a",)), 2)
    assert isinstance(reject.error, ModelRemoved)
    assert (close.model, close.unload) == ("a", True)
    [late] = play.ask("a", 3)
    assert isinstance(late.error, ModelRemoved)
    assert types(play.say(Left(1), 4)) == [Stop]
    assert play.say(Ended("a", 1), 5) == []


def test_a_reload_lets_more_be_served_at_once():
    """Who has waited behind the old limit does not wait for somebody to leave."""
    play = Play(parallel=1)
    play.bring_up("a")
    assert play.ask("a", 1) == []
    play.policy("a", parallel=2)
    assert types(play.say(RetireAsked(), 2)) == [Grant]


def test_a_model_changes_its_scheduler_with_all_that_it_does():
    """Who is served is, who waits does, in the same order; the books it leaves know nothing of it any more."""
    play, other = Play(), Play()
    play.bring_up("a")
    play.policy("a", parallel=1)
    play.ask("a", 1)
    other.core.release("a")
    other.core.adopt(*play.core.release("a"))
    assert not {*play.core._where, *play.core._occupied, *play.core.models} & {1, 2, "a"}
    play.core.add("a", Policy())
    assert play.say(Left(1), 2) == []
    [grant] = other.say(Left(1), 2)
    assert (grant.ticket, grant.model) == (2, "a")


def test_an_unload_that_waits_too_long_is_cut():
    """`Drained` says that the deadline has cut what was left."""
    play = Play()
    play.bring_up("a")
    play.say(UnloadAsked(("a",)), 2)
    assert types(play.drained("a", 32)) == [Stop]


def test_after_shutdown_nothing_starts():
    """Waiting and new requests are told; a load under way is stopped (I8)."""
    play = Play()
    play.ask("a", 0)
    reject, stop = play.say(ShutdownBegan(), 1)
    assert isinstance(reject, Reject)
    assert isinstance(reject.error, ShuttingDown)
    assert isinstance(stop, Stop)
    [late] = play.ask("b", 2)
    assert isinstance(late.error, ShuttingDown)


# ---- what fails again and again ------------------------------------------------------------------


def fail(play: Play, name: str, now: float) -> list[tuple[int, type, int | None]]:
    """A start of *name*, which is asked for and has room, fails; returns who is told what."""
    assert types(play.ask(name, now)) == [Start]
    return told(play.ended(name, now, StartFailed(name, "boom")))


def test_who_has_just_failed_is_refused_and_puts_out_nobody():
    """Until its time has come; that doubles, and the next failure is told with the new time."""
    play = Play()
    assert fail(play, "a", 0) == [(1, StartFailed, 1)]
    play.bring_up("b", 0)
    play.say(Left(2), 0.25)

    assert told(play.ask("a", 0.5)) == [(3, StartFailed, 1)]
    assert play.state("b") is State.READY
    assert evicted(play.ask("a", 1)) == {"b"}
    assert types(play.ended("b", 2)) == [Start]
    play.ask("a", 2.5)
    assert told(play.ended("a", 3, StartFailed("a", "boom"))) == [(4, StartFailed, 2), (5, StartFailed, 2)]
    assert told(play.ask("a", 4.9)) == [(6, StartFailed, 1)]
    assert types(play.ask("a", 5)) == [Start]


def test_one_crash_costs_no_time_and_the_second_in_a_row_does():
    """Who waits at the first goes on waiting, for the next start; at the second it is told."""
    play = Play(parallel=1)
    play.bring_up("a")
    play.ask("a", 0)
    assert play.say(Died("a", 1, "exited with 1"), 1) == []
    assert types(play.ended("a", 2)) == [Start]
    assert types(play.ready("a", 3)) == [Grant]
    play.ask("a", 3)

    [reject] = play.say(Died("a", 2, "exited with 2"), 4)
    assert (reject.ticket, type(reject.error), reject.error.retry_after) == (3, ModelCrashed, 1)
    assert "exited with 2; that makes 2 failures in a row" in reject.error.message
    assert told(play.ask("a", 4.5)) == [(4, ModelCrashed, 1)]  # while what it left is swept
    assert play.ended("a", 4.6) == []
    assert [(view.retry_in, view.failure) for view in play.core.views(4.75)] == [(0.25, "exited with 2"), (0.0, "")]
    assert types(play.ask("a", 5)) == [Start]


def test_an_end_that_nobody_has_told_of_is_a_crash():
    """The supervision itself broke, say."""
    play = Play()
    for now in (0, 10):
        play.bring_up("a", now)
        play.ended("a", now + 1, StartFailed("a", "internal error"))
    assert told(play.ask("a", 11)) == [(3, ModelCrashed, 1)]


@pytest.mark.parametrize(("served", "lived", "delay"), [(True, 1, 0), (False, 1, 2), (False, 59.9, 2), (False, 60, 0)])
def test_who_serves_one_request_or_lives_for_a_minute_works(served, lived, delay):
    """Its next failure is the first one again; to have become ready is not enough."""
    play = Play()
    fail(play, "a", 0)
    fail(play, "a", 1)
    ticket = play.bring_up("a", 10)
    play.say(Left(ticket, served), 10.5)
    play.say(Died("a", play.attempt("a")), 10 + lived)
    assert play.core.views(10 + lived)[0].retry_in == delay  # of the third in a row, or none


def test_a_minute_of_life_counts_however_it_ends():
    """Also when it is put out for another."""
    play = Play()
    fail(play, "a", 0)
    play.say(Left(play.bring_up("a", 1), False), 2)
    assert play.core.views(2)[0].failure == "boom"
    assert evicted(play.ask("b", 61)) == {"a"}
    assert play.core.views(61)[0].failure == ""


def test_an_operator_who_unloads_it_lets_it_be_tried():
    """Perhaps it is mended."""
    play = Play()
    for now in (0, 1, 3):
        fail(play, "a", now)
    play.say(UnloadAsked(("b",)), 4)
    assert told(play.ask("a", 4)) == [(4, StartFailed, 3)]
    play.say(UnloadAsked(("a",)), 4)
    assert play.core.views(4)[0].failure == ""
    assert fail(play, "a", 4) == [(5, StartFailed, 1)]


def test_a_start_that_was_broken_off_is_no_failure():
    """Whatever the process says of it."""
    play = Play()
    play.ask("a", 0)
    play.say(Left(1), 1)
    assert evicted(play.ask("b", 2)) == {"a"}
    play.ended("a", 3, StartFailed("a", "was killed"))
    assert play.core.views(3)[0].failure == ""


def test_out_of_memory_is_a_failure_only_the_second_time():
    """The first is no news for those who ask: it is tried again at once."""
    play = Play(needs={"a": 40, "b": 40}, size=100)
    play.ask("a", 0)
    assert types(play.ended("a", 1, StartFailed("a", "full", out_of_memory=True))) == [Start]
    assert told(play.ended("a", 2, StartFailed("a", "full", out_of_memory=True))) == [(1, StartFailed, 1)]
    assert told(play.ask("a", 2.5)) == [(2, StartFailed, 1)]


def test_the_pause_of_a_model_is_its_own():
    """Or that of all; without one it is always tried."""
    play = Play(backoff=8.0, backoff_max=10.0)
    play.policy("b", backoff=0.0)
    assert fail(play, "a", 0) == [(1, StartFailed, 8)]
    assert fail(play, "a", 8) == [(2, StartFailed, 10)]
    assert [fail(play, "b", 9) for _ in range(3)] == [[(n, StartFailed, 1)] for n in (3, 4, 5)]
