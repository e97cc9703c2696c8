"""What one more request would meet: read from a scheduler, which does not notice; and the words of each rule."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable

import attrs
import pytest

from trioswap.config import GroupConfig
from trioswap.config.matrix import read_matrix
from trioswap.config.mistakes import Mistakes
from trioswap.errors import StartFailed
from trioswap.footprints import Footprints, Wish
from trioswap.forecast import amount, amounts, as_document, because, enumerated, forecast
from trioswap.learning import Average, Costs
from trioswap.lifecycle import State
from trioswap.messages import (
    Arrived,
    BecameReady,
    Command,
    Drained,
    Ended,
    Event,
    GotStuck,
    Left,
    Policy,
    Rules,
    Squeezed,
    Start,
    Stop,
    Swap,
    UnloadAsked,
    WokeUp,
)
from trioswap.residency.both import Both
from trioswap.residency.budget import Budget
from trioswap.residency.groups import Groups
from trioswap.residency.matrix import Matrix
from trioswap.scheduler import Scheduler

GIB = 2**30


def world(kind: str) -> Scheduler:
    """Models a, b, c under a rule; a and b together take the memory, c needs all of it."""
    sizes = {"a": 3, "b": 3, "c": 6}
    budget = Budget({"ram": 6}, Footprints(("ram",), {name: Wish(size) for name, size in sizes.items()}))
    groups = Groups((GroupConfig("g", ("a", "b")), GroupConfig("h", ("c",), persistent=True)))
    residency = {"groups": groups, "memory": budget, "both": Both(groups, budget)}[kind]
    policies = {"a": Policy(20, parallel=1), "b": Policy(10, ttl=30.0), "c": Policy(15, weight=2.0)}
    costs = {name: Costs(load=Average(4.0), stop=Average(1.0), service=Average(2.0)) for name in sizes}
    used = None if kind == "groups" else budget
    return Scheduler(policies, residency, itertools.count(1), Rules(1), costs, used)


def books(core: Scheduler) -> str:
    """Everything that a scheduler knows."""
    models = {name: attrs.asdict(model) for name, model in core.models.items()}
    return repr((models, core.plan, core.wake_at, sorted(core._where), core._floor, core._stale, core._out))


# ---- looking changes nothing -------------------------------------------------------------------


@attrs.define(eq=False)
class Told:
    """A scheduler whose commands are carried out at once: a load takes 4 s, a stop 1 s."""

    core: Scheduler
    look: Callable[[Scheduler, float], None]
    """Called after each event."""
    now: float = 0.0
    commands: list[list[str]] = attrs.field(factory=list)
    attempts: dict[str, int] = attrs.field(factory=lambda: dict.fromkeys("abc", 0))

    def feed(self, event: Event, later: float) -> None:
        """*event* happens *later* seconds after the last one."""
        self.now += later
        commands = self.core.handle(event, self.now)
        self.commands.append(list(map(str, commands)))
        self.look(self.core, self.now)
        for command in commands:
            self.carry_out(command)

    def carry_out(self, command: Command) -> None:
        match command:
            case Start(model, attempt):
                self.attempts[model] = attempt
                self.feed(BecameReady(model, attempt), 4)
            case Stop(model, attempt):
                self.feed(Ended(model, attempt), 1)
            case Swap(_, evictions):
                for eviction in evictions:
                    self.feed(Ended(eviction.model, eviction.attempt), 1)


def story(core: Scheduler, look: Callable[[Scheduler, float], None]) -> list[list[str]]:
    """All commands while three models are asked for in turn, one is unloaded and one gets stuck."""
    told = Told(core, look)
    for ticket, (model, gap) in enumerate([("a", 0), ("b", 1), ("a", 1), ("c", 2), ("a", 1), ("b", 3)], start=1):
        told.feed(Arrived(ticket, model), gap)
    for ticket in (1, 3, 2):
        told.feed(Left(ticket), 5)
    told.feed(WokeUp(), 40)
    for model in "abc":
        told.feed(Drained(model, told.attempts[model]), 1)
    told.feed(Left(4), 1)
    told.feed(UnloadAsked(("a", "c")), 1)
    told.feed(GotStuck("b", told.attempts["b"]), 1)
    told.feed(Arrived(7, "b"), 1)
    return told.commands


@pytest.mark.parametrize("kind", ["groups", "memory", "both"])
def test_looking_changes_nothing(kind):
    """Whatever has happened: the books are the same after a look, and so is all that is decided later."""
    seen: set[tuple[State, bool]] = set()

    def look(core: Scheduler, now: float) -> None:
        for name in core.models:
            before = books(core)
            found = forecast(name, core.models, core.residency, core.rules, now)
            assert books(core) == before
            assert found.state is core.models[name].state
            assert found.why
            assert not math.isnan(found.estimate)
            seen.add((found.state, bool(found.evicts)))

    assert story(world(kind), look) == story(world(kind), lambda core, now: None)
    assert {state for state, _ in seen} >= {State.STOPPED, State.STARTING, State.READY, State.STOPPING}
    assert (State.STOPPED, True) in seen


@pytest.mark.parametrize("kind", ["groups", "memory", "both"])
def test_who_would_start_at_once_is_promised_that(kind):
    """In each state of the story: where the request really starts its model, nothing but the load is expected."""
    started: set[str] = set()

    def look(core: Scheduler, now: float) -> None:
        for name in core.models:
            found = forecast(name, core.models, core.residency, core.rules, now)
            commands = copy.deepcopy(core).handle(Arrived(1000, name), now)
            if any(isinstance(command, Start) and command.model == name for command in commands):
                assert (found.estimate, found.evicts) == (4.0, ())
                started.add(name)

    core = world(kind)
    look(core, 0.0)
    story(core, look)
    assert started


# ---- what is told -------------------------------------------------------------------------------


def asked(core: Scheduler, name: str, now: float) -> dict:
    return as_document(forecast(name, core.models, core.residency, core.rules, now), None)


def test_each_state_has_its_sentence():
    """From a load to an unload, each time what one more request would meet."""
    core = world("memory")
    core.handle(Arrived(1, "a"), 0)
    assert (asked(core, "a", 1)["why"], asked(core, "a", 1)["estimate"]) == ("it is loading", 5.0)  # the second of two
    assert asked(core, "b", 1)["why"] == "there is room for it, but a is before it"
    core.handle(BecameReady("a", 1), 4)
    assert asked(core, "a", 5)["why"] == "it is resident, and serves as many requests at once as it may (1)"
    assert asked(core, "b", 5)["why"] == "there is room for it"
    assert [victim["when"] for victim in asked(core, "c", 5)["evicts"]] == [9.0], (
        "until 14: half its turn lease, as c weighs twice as much"
    )
    core.handle(Arrived(2, "c"), 5)
    core.handle(WokeUp(), 24)
    assert core.models["a"].state is State.DRAINING
    assert asked(core, "a", 24)["why"] == "it is going for c, and takes no more requests"
    core.handle(Left(1), 25)
    core.handle(Drained("a", 1), 25)
    assert core.models["a"].state is State.STOPPING
    assert asked(core, "c", 25)["why"] == "there is room for it, but a is before it"
    core.handle(Ended("a", 1), 26)
    core.handle(BecameReady("c", 2), 30)
    core.handle(UnloadAsked(("c",)), 31)
    assert asked(core, "c", 31)["why"] == "it is being unloaded, and takes no more requests"


@pytest.mark.parametrize(("parallel_loads", "seconds"), [(1, 2 + 4), (2, 4)])
def test_a_load_that_need_not_wait_for_another_is_not_counted_behind_it(parallel_loads, seconds):
    """There is room for both: it waits for the other's load only where one loads at a time."""
    core = world("memory")
    core.rules = Rules(parallel_loads)
    core.handle(Arrived(1, "a"), 0)
    assert asked(core, "b", 2)["estimate"] == seconds


def test_what_can_never_be_is_told_without_an_end():
    """Too large for the machine, or behind memory that does not come back: no estimate, and why."""
    budget = Budget({"ram": 8 * GIB}, Footprints(("ram",), {"a": Wish(6 * GIB), "x": Wish(9 * GIB)}))
    core = Scheduler({"a": Policy(), "x": Policy()}, budget, budget=budget)
    found = asked(core, "x", 0)
    assert (found["fits"], found["evicts"], found["estimate"]) == (False, [], None)
    assert found["why"] == "it needs 9 GiB on ram (8 GiB of 8 GiB free)"

    core = Scheduler({"a": Policy(yields=False), "b": Policy()}, budget, budget=budget)
    budget.footprints.add("b", Wish(6 * GIB))
    core.handle(Arrived(1, "a"), 0)
    core.handle(BecameReady("a", 1), 1)
    found = asked(core, "b", 2)
    assert (found["fits"], found["evicts"], found["estimate"]) == (False, [], None)
    assert found["why"] == "the memory it needs is held by a"


@pytest.mark.parametrize("both", [False, True])
def test_what_others_have_taken_is_no_fault_of_the_model(both):
    """It is refused as long as they have it, and they are named; a request that came now would not wait."""
    budget = Budget({"ram": 8 * GIB}, Footprints(("ram",), {"a": Wish(6 * GIB)}))
    residency = Both(PAIR, budget) if both else budget
    core = Scheduler({"a": Policy()}, residency, budget=budget)
    core.handle(Squeezed({"ram": 2 * GIB}), 0)
    found = asked(core, "a", 1)

    assert (found["fits"], found["estimate"]) == (False, None)
    assert found["why"] == "other programs use the memory it needs"


def test_what_has_just_failed_is_refused_for_a_while():
    """Nobody goes for it meanwhile; afterwards it is tried, and the last error is still told until it has worked."""
    groups = Groups((GroupConfig("g", ("a", "b")),))
    core = Scheduler({"a": Policy(), "b": Policy(backoff=4.0)}, groups, itertools.count(1))
    core.handle(Arrived(1, "b"), 0)
    core.handle(Ended("b", 1, StartFailed("b", "exited with 7")), 1)
    core.handle(Arrived(2, "a"), 1)
    core.handle(BecameReady("a", 2), 2)
    core.handle(Left(2), 2)

    found = asked(core, "b", 2.5)
    assert (found["fits"], found["evicts"], found["estimate"]) == (False, [], None)
    assert found["why"] == "it has just failed, and is not tried again for 3 s"
    assert (found["failure"], found["retry_in"]) == ("exited with 7", 2.5)

    found = asked(core, "b", 5)
    assert [victim["model"] for victim in found["evicts"]] == ["a"]
    assert (found["failure"], found["retry_in"]) == ("exited with 7", 0)
    assert found["estimate"] > 0

    core.handle(Arrived(3, "b"), 5)
    core.handle(Ended("a", 2), 5)
    core.handle(Ended("b", 3, StartFailed("b", "exited with 8")), 6)
    found = asked(core, "b", 6)
    assert found["why"] == "it has failed 2 times in a row, and is not tried again for 8 s"
    assert found["failure"] == "exited with 8"
    assert (asked(core, "a", 6)["failure"], asked(core, "a", 6)["retry_in"]) == (None, 0)


def test_a_wait_without_bound_is_null():
    """JSON knows no infinity."""
    core = Scheduler({"a": Policy(), "b": Policy(math.inf)}, Groups((GroupConfig("g", ("a", "b")),)))
    core.handle(Arrived(1, "a"), 0)
    core.handle(BecameReady("a", 1), 1)
    [victim] = asked(core, "b", 100)["evicts"]

    assert (victim["model"], victim["when"]) == ("a", None)


def matrix(**costs: int) -> Matrix:
    mistakes = Mistakes()
    found = read_matrix({}, costs, {"s": "a & b", "t": "(a | b) & c"}, ["a", "b", "c", "d"], mistakes)
    assert not mistakes.lines()
    return Matrix(found)


GROUPS = Groups(
    (
        GroupConfig("g", ("a", "b", "c"), swap=False),
        GroupConfig("h", ("d",), exclusive=False),
        GroupConfig("p", ("e",), persistent=True),
    )
)
TWO_GPUS = Budget(
    {"gpu0": 8 * GIB, "gpu1": 6 * GIB, "ram": 2 * GIB},
    Footprints(
        ("gpu0", "gpu1", "ram"),
        {"a": Wish(5 * GIB), "m": Wish({"gpu0": 2 * GIB, "ram": GIB // 2}), "u": Wish(), "g": Wish(estimate=99 * GIB)},
    ),
)
ROOM = "it needs 5 GiB on gpu0 (4 GiB of 8 GiB free) or 5 GiB on gpu1 (3 GiB of 6 GiB free)"
ALONE = "it is in no set of the matrix, so it is resident alone"
ONE_OF = "one model resident at a time"
PAIR = Groups((GroupConfig("g", ("a", "x")),))
TOO_LARGE = "it needs 99 GiB on gpu0 (1 GiB of 8 GiB free) or 99 GiB on gpu1 (3 GiB of 6 GiB free)"
FULL = {"x": {"gpu0": 4 * GIB, "gpu1": 3 * GIB}, "y": {"gpu0": 3 * GIB, "ram": 3 * GIB // 2}}


@pytest.mark.parametrize(
    ("residency", "target", "resident", "sentence"),
    [
        (GROUPS, "a", {"b": {}, "e": {}}, ""),
        (GROUPS, "a", {"b": {}, "d": {}, "e": {}}, 'group "g" is exclusive, so d must go'),
        (GROUPS, "e", {"a": {}, "b": {}, "d": {}}, 'group "p" is exclusive, so a, b and d must go'),
        (GROUPS, "d", {"a": {}}, ""),
        (matrix(), "b", {"a": {}}, ""),
        (matrix(a=3), "b", {"a": {}, "c": {}}, 'the cheapest choice is a & b of set "s", so c (cost 1) must go'),
        (matrix(c=3), "b", {"a": {}, "c": {}}, 'the cheapest choice is b & c of set "t", so a (cost 1) must go'),
        (matrix(b=2), "d", {"a": {}, "b": {}}, f"{ALONE}, and a (cost 1) and b (cost 2) must go"),
        (TWO_GPUS, "a", {"x": FULL["x"]}, ROOM),
        (
            TWO_GPUS, "m", FULL,
            "it needs 2 GiB on gpu0 (1 GiB of 8 GiB free) and 512 MiB on ram (512 MiB of 2 GiB free)",
        ),
        (TWO_GPUS, "u", FULL, "it is not known yet what it needs, so it gets the machine for itself"),
        (TWO_GPUS, "g", FULL, TOO_LARGE),
        (Both(PAIR, TWO_GPUS), "a", {"x": FULL["x"]}, f'group "g" has {ONE_OF}, so x must go; {ROOM}'),
        (Both(PAIR, TWO_GPUS), "a", {"x": {}}, f'group "g" has {ONE_OF}, so x must go'),
        (Both(PAIR, TWO_GPUS), "a", {"y": FULL["x"]}, ROOM),
    ],
)  # fmt: skip
def test_each_rule_has_its_words(residency, target, resident, sentence):
    """Which rule, and who or how much: empty where the target fits."""
    assert because(residency, target, resident) == sentence


def test_amounts_are_rounded_for_people():
    """In GiB from one on, in MiB below, and several as a sentence has them."""
    assert [amount(size) for size in (12 * GIB, 3 * GIB // 2, GIB - 1, 300 * 2**20, 0)] == [
        "12 GiB", "1.5 GiB", "1024 MiB", "300 MiB", "0 MiB",
    ]  # fmt: skip
    assert amounts({"gpu0": 12 * GIB, "gpu1": GIB, "ram": 2**20}) == "12 GiB on gpu0, 1 GiB on gpu1 and 1 MiB on ram"
    assert enumerated(["a", "b"]) == "a and b"
