"""When models come back: a table of what was seen, and what is due for it; and in whose place."""

from __future__ import annotations

import itertools
import math
from functools import partial

import attrs
import pytest

from trioswap.comeback import LIGHT, Defaults, Look, Seen, Way, in_order, way_back
from trioswap.config import Config, GroupConfig
from trioswap.config.parts import HooksConfig
from trioswap.errors import StartFailed
from trioswap.footprints import Footprints, Wish
from trioswap.learning import Average, Costs
from trioswap.lifecycle import State
from trioswap.messages import (
    Arrived,
    BecameReady,
    Cause,
    CloseGate,
    Command,
    Ended,
    Event,
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
from trioswap.residency import Residency
from trioswap.residency.budget import Budget
from trioswap.residency.groups import Groups
from trioswap.scheduler import Scheduler

# ---- when -----------------------------------------------------------------------------------------

A, B, C = (partial(Seen, name) for name in "abc")
NOTHING = Look()


def until(at: float) -> Look:
    """Look again at that time, and not before."""
    return Look(earliest=at, latest=at)


@pytest.mark.parametrize(
    ("domain", "now", "expected"),
    [
        # Everybody who is to come back is there.
        ([A(), B()], 1000, NOTHING),
        ([A(serves=True), B(gone=True)], 1000, NOTHING),
        # Nobody has asked for others, as far as is known since 50.
        ([A(gone=True), B()], 50, until(60)),
        ([A(gone=True), B()], 60, Look(("a",))),
        ([A(gone=True)], 1000, Look(("a",))),
        # Somebody is served or waits, of others.
        ([A(gone=True), B(serves=True)], 1000, Look(earliest=1010)),
        ([A(gone=True), B(waits=True)], 1000, Look(earliest=1010)),
        # Of those who come back only who waits counts: that is decided first.
        ([A(gone=True), C(serves=True), B()], 1000, Look(("a",))),
        ([A(gone=True), C(gone=True, waits=True), B()], 1000, Look(earliest=1010)),
        # It has gone by itself a moment ago, or is not tried again yet.
        ([A(gone=True, since=995), B()], 1000, until(1005)),
        ([A(gone=True, retry_at=1001), B()], 1000, until(1001)),
        ([A(gone=True, since=995, retry_at=1001), B()], 1000, until(1005)),
        # Several: the first one first, whatever the order in which they are seen; each by itself.
        ([A(gone=True), B(), C(gone=True)], 1000, Look(("c", "a"))),
        ([A(gone=True), B(), C(gone=True, since=999)], 1000, Look(("a",))),
        ([A(gone=True, since=996), B(), C(gone=True, since=999)], 1000, until(1006)),
    ],
)
def test_what_is_due(domain, now, expected):
    """c and a come back after ten seconds, of which it is known since 50 whether they are quiet."""
    defaults = Defaults(("c", "a"), after=10.0, since=50.0)

    assert defaults.look(domain, now) == expected


def test_quiet_is_counted_from_the_end_of_the_last_request():
    """Of each model of the domain; those of others make no difference."""
    defaults = Defaults(("a",), after=10.0, since=0.0)
    domain = [A(gone=True), B()]
    defaults.worked({"b"}, 100)
    defaults.worked({"b", "x"}, 150)
    defaults.worked({"x"}, 200)
    assert defaults.look(domain, 205) == until(210)
    defaults.worked(set(), 300)
    assert defaults.look(domain, 300) == Look(("a",))
    defaults.worked({"b"}, 400)
    defaults.worked(set(), 400)

    assert defaults.look(domain, 405) == until(410)


def test_who_was_refused_is_not_tried_at_once():
    """That would be refused again."""
    defaults = Defaults(("a",), after=10.0, since=0.0)
    defaults.refused("a", 100)

    assert defaults.look([A(gone=True)], 101) == until(110)
    assert defaults.look([A(gone=True)], 110) == Look(("a",))


# ---- who stays away, in the words of the scheduler itself -----------------------------------------------


@attrs.define(eq=False)
class Told:
    """A scheduler whose commands are carried out at once, and what is remembered of its decisions."""

    core: Scheduler
    defaults: Defaults = attrs.field(factory=lambda: Defaults(("a",), after=10.0))
    now: float = 0.0
    tickets: itertools.count = attrs.field(factory=itertools.count)

    def feed(self, event: Event, later: float = 1.0) -> None:
        self.now += later
        for command in self.core.handle(event, self.now):
            self.carry_out(command)

    def carry_out(self, command: Command) -> None:
        gone = [name for name in self.defaults.names if self.core.models[name].state is State.STOPPED]
        match command:
            case Start(model, attempt):
                self.defaults.decided(model, "start", Cause.OTHERS, gone)
                self.feed(BecameReady(model, attempt), 5)
            case CloseGate(model, _, _, _, cause):
                self.defaults.decided(model, "close gate", cause, gone)
            case Stop(model, attempt, _, cause):
                self.defaults.decided(model, "stop", cause, gone)
                self.feed(Ended(model, attempt))
            case Swap(_, evictions):
                for eviction in evictions:
                    self.defaults.decided(eviction.model, "evict", Cause.OTHERS, gone)
                    self.feed(Ended(eviction.model, eviction.attempt))

    def use(self, model: str) -> None:
        ticket = next(self.tickets)
        self.feed(Arrived(ticket, model))
        self.feed(Left(ticket))
        self.now += 1000  # its turn is over


def told(residency: Residency, budget: Budget | None = None, **policies: Policy) -> Told:
    """Models a, b, c."""
    known = {name: policies.get(name, Policy()) for name in "abc"}
    costs = {name: Costs(load=Average(5.0), stop=Average(1.0)) for name in known}
    return Told(Scheduler(known, residency, itertools.count(1), Rules(1), costs, budget))


def one_at_a_time(**policies: Policy) -> Told:
    return told(Groups((GroupConfig("g", ("a", "b", "c")),)), **policies)


def sharing(total: int = 50) -> Told:
    """Two of them fit."""
    budget = Budget({"ram": total}, Footprints(("ram",), dict.fromkeys("abc", Wish(20))))
    return told(budget, budget)


def test_who_is_put_out_is_missing():
    """That is what comes back."""
    story = one_at_a_time()
    story.use("a")
    story.use("b")

    assert story.defaults.is_missing("a")
    assert not story.defaults.is_missing("b"), "it is not to come back"


def test_who_was_unloaded_is_not_missing_until_it_is_asked_for():
    """Whatever happens meanwhile."""
    story = one_at_a_time()
    story.use("a")
    story.feed(UnloadAsked(("a",)))
    assert not story.defaults.is_missing("a")
    story.use("b")
    assert not story.defaults.is_missing("a")
    story.use("a")
    story.use("b")

    assert story.defaults.is_missing("a")


def test_an_unload_counts_from_its_beginning():
    """The request that is being served may last."""
    story = one_at_a_time()
    story.feed(Arrived(100, "a"))
    story.feed(UnloadAsked(("a",)))
    assert story.core.models["a"].state is State.DRAINING

    assert not story.defaults.is_missing("a")


def test_a_gate_that_closes_for_another_model_is_no_end():
    """It may open again."""
    story = one_at_a_time(b=Policy(max_wait=1.0))
    story.use("a")
    story.feed(Arrived(100, "a"))
    story.feed(Arrived(101, "b"))
    story.feed(WokeUp(), 100)
    assert story.core.models["a"].state is State.DRAINING

    assert story.defaults.is_missing("a")


def test_whoever_frees_the_room_of_another_by_hand_wants_it_free():
    """So those who are gone then do not come for it."""
    story = one_at_a_time()
    story.use("a")
    story.use("b")
    story.feed(UnloadAsked(("b",)))

    assert not story.defaults.is_missing("a")


def test_who_went_by_its_time_to_live_is_not_missing():
    """But the time to live of another one has nothing to do with it."""
    story = one_at_a_time(a=Policy(ttl=10.0), b=Policy(ttl=10.0))
    story.use("a")
    story.feed(WokeUp())
    assert story.core.models["a"].state is State.STOPPED
    assert not story.defaults.is_missing("a")
    story = one_at_a_time(b=Policy(ttl=10.0))
    story.use("a")
    story.use("b")
    story.feed(WokeUp())
    assert story.core.models["b"].state is State.STOPPED

    assert story.defaults.is_missing("a")


def test_who_went_for_other_programs_is_not_missing():
    """Their memory is not to be taken back."""
    story = sharing()
    story.use("a")
    story.feed(Squeezed({"ram": 10}))
    assert story.core.models["a"].state is State.STOPPED

    assert not story.defaults.is_missing("a")


def test_another_configuration_forgets_only_who_is_not_in_it():
    """Who stays away still does."""
    defaults = Defaults(("a",), after=10.0, since=0.0)
    for name in "ab":
        defaults.decided(name, "stop", Cause.OPERATOR, [])
        defaults.worked({name}, 100)
    defaults.renew(("b", "a"), 20.0, {"a", "c"})

    assert [defaults.is_missing(name) for name in "ab"] == [False, True]
    assert defaults.look([B(gone=True), A()], 110) == Look(("b",)), "nobody knows of it any more"


# ---- in whose place ---------------------------------------------------------------------------------


def test_room_is_taken_as_the_scheduler_takes_it():
    """What is said to be possible now is what it does for a request of next to no weight."""
    story = one_at_a_time()
    story.use("b")
    assert way_back("a", ("a",), story.core, story.now) == Way(story.now)
    [swap] = story.core.handle(Arrived(100, "a", LIGHT), story.now)

    assert [eviction.model for eviction in swap.evictions] == ["b"]


def test_a_turn_is_not_cut_short():
    """Who has just come stays as long as it would for a request that can wait for ever; that time is told."""
    story = one_at_a_time(a=Policy(max_wait=1.0), b=Policy(turn_lease=2.0, linger=1.0))
    story.feed(Arrived(0, "b"))
    story.core.models["b"].costs.gaps.extend([5.0] * 4)
    story.feed(Left(0))
    now = story.now
    way = way_back("a", ("a",), story.core, now)
    assert now < way.at < math.inf
    assert way_back("a", ("a",), story.core, way.at) == Way(way.at)

    assert way_back("a", ("a",), story.core, way.at - 0.01).at == way.at


@pytest.mark.parametrize("waits", [True, False])
def test_who_is_at_work_stays(waits):
    """Even where nobody may be kept waiting: nothing is known of when it will be over."""
    story = one_at_a_time(a=Policy(max_wait=0.0))
    story.feed(Arrived(0, "b"))
    if waits:
        story.feed(Arrived(1, "b"))

    assert way_back("a", ("a",), story.core, story.now + 1000) == Way(math.inf)


@pytest.mark.parametrize("make", [sharing, one_at_a_time])
def test_a_load_that_is_under_way_is_waited_for(make):
    """Also one that nobody waits for: it may be one that comes back."""
    story = make()
    story.core.handle(Arrived(0, "b"), 0.0)
    assert way_back("a", ("a",), story.core, 1.0) == Way(math.inf)
    story.core.handle(Left(0), 1.0)

    assert way_back("a", ("a",), story.core, 1.0) == Way(math.inf)


def test_no_place_is_made_for_a_load_that_cannot_begin():
    """It would only stand in the line until the other one is over."""
    story = sharing(total=45)
    story.use("b")
    story.core.handle(Arrived(100, "c"), story.now)

    assert story.core.models["c"].state is State.STARTING
    assert way_back("a", ("a",), story.core, story.now) == Way(math.inf)
    story.core.rules = Rules(2)
    assert way_back("a", ("a",), story.core, story.now) == Way(story.now)


def test_who_has_failed_is_for_the_table_above():
    """Here it is only asked for the room, so that one reason does not hide the other."""
    story = one_at_a_time()
    [start] = story.core.handle(Arrived(0, "a"), 0.0)
    story.core.handle(Ended("a", start.attempt, StartFailed("a", "no")), 0.0)

    assert way_back("a", ("a",), story.core, 0.0) == Way(0.0)
    assert story.core.models["a"].circuit.is_open(0.0)


@pytest.mark.parametrize(
    ("defaults", "kept", "leased"),
    [
        ("c", "", ""),  # whoever the scheduler takes
        ("ca", "a", "a"),  # it would take a, and b will do
        ("ac", "a", "a"),
        ("cb", "b", ""),  # it takes a in any case
        ("cab", "a", "a"),  # one of them has to go: the last one
        ("cba", "b", ""),
        ("acb", "a", "a"),
        ("abc", None, None),  # both have precedence
    ],
)
def test_as_many_as_possible_stay(defaults, kept, leased):
    """a and b are there, of which a is cheaper, and c is to come back; the first ones have precedence."""
    story = sharing()
    story.use("a")
    story.use("b")
    story.core.models["b"].credit += 1000.0

    way = way_back("c", tuple(defaults), story.core, story.now)

    assert way == (Way(math.inf) if kept is None else Way(story.now, tuple(kept), tuple(leased)))


def test_nobody_is_changed_by_the_question():
    """It is asked again and again."""
    story = sharing()
    story.use("a")
    story.use("b")
    before = repr({name: attrs.asdict(model) for name, model in story.core.models.items()})
    way_back("c", ("c", "a"), story.core, story.now)

    assert repr({name: attrs.asdict(model) for name, model in story.core.models.items()}) == before


# ---- the order ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("idle", list(itertools.permutations("xyz")))
def test_members_of_exclusive_groups_come_first(idle):
    """So that each finds its place, and nobody goes for one who comes after it."""
    groups = (
        GroupConfig("free", ("x",), exclusive=False),
        GroupConfig("lasting", ("y",), persistent=True),
        GroupConfig("g", ("z",)),
    )
    config = Config({}, groups, hooks=HooksConfig(idle_preload=idle))

    assert in_order(config) == ("y", "z", "x")


def test_otherwise_the_order_is_the_written_one():
    """Where there are no groups, or all are alike."""
    hooks = HooksConfig(idle_preload=("b", "c", "a"))
    assert in_order(Config(hooks=hooks)) == ("b", "c", "a")
    groups = (GroupConfig("g", ("a", "b", "c"), swap=False),)

    assert in_order(Config({}, groups, hooks=hooks)) == ("b", "c", "a")
