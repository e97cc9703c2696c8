"""The memory budget: who fits beside whom, and who goes for whom, against every possible choice."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trioswap.config import GroupConfig
from trioswap.footprints import RAM, Footprints, Wish
from trioswap.residency import NOTHING, Holding, Offer, Residency
from trioswap.residency.both import Both
from trioswap.residency.budget import Budget
from trioswap.residency.groups import Groups

TWO = {"gpu0": 24, "gpu1": 16, RAM: 64}
NOW = 100.0
IDLE = Offer(NOW, busy=False, cost=1.0)
Resident = dict[str, Holding]


def budget_of(wish: Wish, sizes: Mapping[str, int] = TWO) -> Budget:
    """A budget that knows one model, `m`."""
    return Budget(sizes, Footprints(tuple(sizes), {"m": wish}))


def learned(peak: Holding, wish: Wish, sizes: Mapping[str, int]) -> Budget:
    budget = budget_of(wish, sizes)
    budget.footprints.measured("m", sizes, peak)
    return budget


def offering(**offers: Offer | None) -> Callable[[str], Offer | None]:
    return lambda name: offers.get(name, IDLE)


# ---- who fits ------------------------------------------------------------------------------------


def test_of_two_gpus_the_one_with_more_room():
    """Counted beside what is held already; the first of equals."""
    budget = budget_of(Wish(8))
    assert budget.place("m", {}) == {"gpu0": 8}
    assert budget.place("m", {"a": {"gpu0": 10}}) == {"gpu1": 8}
    assert budget.place("m", {"a": {"gpu0": 8}}) == {"gpu0": 8}
    assert budget.place("m", {"a": {"gpu0": 10}, "b": {"gpu1": 9}}) == {"gpu0": 8}
    assert budget.place("m", {"a": {"gpu0": 17}, "b": {"gpu1": 9}}) is None


def test_every_device_it_names_must_have_room():
    """To the last byte."""
    budget = budget_of(Wish({"gpu0": 10, RAM: 30}))
    assert budget.place("m", {"a": {"gpu0": 14, RAM: 34}}) == {"gpu0": 10, RAM: 30}
    assert budget.place("m", {"a": {"gpu0": 15}}) is None
    assert budget.place("m", {"a": {RAM: 35}}) is None


def test_a_declared_need_larger_than_the_device_never_fits():
    """The user's word is not second-guessed, and nobody is put out in vain."""
    budget = budget_of(Wish(25))
    assert budget.place("m", {}) is None
    assert budget.victims("m", {"a": {"gpu0": 20}}, offering()) is None
    assert budget_of(Wish(5, "gpu9")).place("m", {}) is None


def test_an_unknown_need_wants_the_machine_for_itself():
    """It holds all there is, so nobody else comes in."""
    budget = budget_of(Wish())
    assert budget.place("m", {}) == TWO
    assert budget.place("m", {"a": {RAM: 1}}) is None
    assert budget.place("m", {"a": NOTHING}) is None
    assert budget_of(Wish(1)).place("m", {"unknown": TWO}) is None


def test_a_guess_is_no_reason_to_refuse():
    """Estimated to be larger than any device, it gets the machine for itself."""
    budget = budget_of(Wish(estimate=25))
    assert budget.place("m", {}) == TWO
    assert budget.place("m", {"a": {RAM: 1}}) is None
    assert budget.victims("m", {"a": {RAM: 1}}, offering()) == {"a"}
    assert budget_of(Wish(estimate=20)).place("m", {}) == {"gpu0": 20}


def test_who_was_seen_to_use_more_than_the_budget_gets_the_whole_device():
    """It ran, so it can run again; beside whoever is on other devices."""
    budget = learned({"gpu1": 17, RAM: 2}, Wish(None, "gpu1"), TWO)
    assert budget.place("m", {"a": {"gpu0": 24, RAM: 62}}) == {"gpu1": 16, RAM: 2}
    assert budget.place("m", {"a": {"gpu1": 1}}) is None
    assert budget.victims("m", {"a": {"gpu1": 1}, "b": {"gpu0": 24}}, offering()) == {"a"}


def test_what_fits_is_preferred_to_a_whole_device_that_is_too_small():
    """Learned on the large GPU, it is not sent to the small one because it is "all there is"."""
    budget = learned({"gpu0": 20}, Wish(), TWO)
    assert budget.place("m", {"a": {"gpu0": 5}}) is None
    assert budget.place("m", {}) == {"gpu0": 20}


def test_failures_raise_a_declared_need_up_to_the_whole_device():
    """Asking for more room never makes a model impossible that the user says fits."""
    budget = budget_of(Wish(14), {"gpu0": 16})
    budget.footprints.ran_out("m", {"gpu0": 14})
    assert budget.footprints.need("m").holdings == ({"gpu0": 18},)
    assert budget.place("m", {}) == {"gpu0": 16}
    assert budget.place("m", {"a": {"gpu0": 1}}) is None


def test_nothing_fits_on_a_device_that_others_fill():
    """Not even who would take all there is."""
    budget = learned({"gpu0": 17}, Wish(), {"gpu0": 16})
    budget.resize({"gpu0": 0})
    assert budget.place("m", {}) is None
    assert budget.victims("m", {"a": {"gpu0": 16}}, offering()) is None


def test_the_budget_follows_other_programs():
    """It shrinks under those who run, and comes back."""
    budget, resident = budget_of(Wish(8)), {"a": {"gpu0": 20, RAM: 4}, "b": {"gpu1": 8}}
    assert budget.overcommitted(resident) == {}
    budget.resize({"gpu0": 15, "gpu1": 16, RAM: 64})
    assert budget.overcommitted(resident) == {"gpu0": 5}
    assert budget.place("m", resident) == {"gpu1": 8}
    budget.resize({"gpu0": 15, "gpu1": 15, RAM: 64})
    assert budget.place("m", resident) is None
    budget.resize(TWO)
    assert budget.place("m", resident) == {"gpu1": 8}
    assert budget.overcommitted({"a": {"gpu9": 1}}) == {"gpu9": 1}


def test_an_overfull_device_is_in_the_way_of_its_own_models_only():
    """Who needs nothing there is placed."""
    budget, resident = budget_of(Wish({"gpu0": 0, RAM: 5})), {"a": {"gpu0": 20}}
    budget.resize({"gpu0": 10, RAM: 64})
    assert budget.place("m", resident) == {"gpu0": 0, RAM: 5}
    assert budget.victims("m", resident, offering()) == frozenset()


def test_a_budget_that_shrank_does_not_change_what_is_too_large():
    """A guess that fits at best waits for the room; it does not take the machine for itself."""
    budget = budget_of(Wish(estimate=20))
    budget.resize({"gpu0": 12, "gpu1": 12, RAM: 64})
    assert budget.place("m", {}) is None


def test_a_budget_that_grew_does():
    """There was room for it once, so it is waited for."""
    budget = budget_of(Wish(estimate=40))
    assert budget.place("m", {}) == TWO
    budget.resize({"gpu0": 24, "gpu1": 48, RAM: 64})
    assert budget.place("m", {}) == {"gpu1": 40}
    budget.resize(TWO)
    assert budget.place("m", {}) is None


def test_one_domain_without_a_bound_on_heads():
    """Any two may be in each other's way; memory is counted in bytes."""
    budget = budget_of(Wish())
    assert budget.domains(["b", "a"]) == [{"a", "b"}]
    assert budget.domains([]) == []
    assert budget.capacity(frozenset("abc")) == 3


# ---- who goes ------------------------------------------------------------------------------------


def test_nobody_goes_where_there_is_room():
    """And the question needs no offers."""
    assert budget_of(Wish(8)).victims("m", {"a": {"gpu0": 16}}, pytest.fail) == frozenset()


HALVES = {"a": {RAM: 5}, "b": {RAM: 5}}


@pytest.mark.parametrize(
    ("offers", "gone"),
    [
        ({"a": Offer(NOW, False, 2), "b": Offer(NOW, False, 1)}, {"b"}),
        ({"a": Offer(NOW, False, 9), "b": Offer(NOW, True, 1)}, {"a"}),
        ({"a": Offer(NOW, True, 9), "b": Offer(NOW + 1, False, 1)}, {"a"}),
        ({"a": Offer(NOW, False, 1), "b": Offer(NOW, False, 1)}, {"a"}),
        ({"a": None, "b": Offer(NOW + 9, True, 9)}, {"b"}),
        ({"a": None, "b": None}, None),
    ],
)
def test_soonest_then_idle_then_cheapest_then_by_name(offers, gone):
    """Each counts only where the ones before are equal."""
    assert budget_of(Wish(5), {RAM: 10}).victims("m", HALVES, offering(**offers)) == gone


def test_two_cheap_ones_rather_than_a_dear_one():
    """What counts is the sum."""
    resident = {"big": {RAM: 10}, "s": {RAM: 5}, "t": {RAM: 5}}
    offers = offering(big=Offer(NOW, False, 3), s=Offer(NOW, False, 1), t=Offer(NOW, False, 1))
    assert budget_of(Wish(10), {RAM: 20}).victims("m", resident, offers) == {"s", "t"}


def test_of_equal_sets_the_one_that_comes_first_by_name():
    """However many they are, and whoever is looked at first."""
    resident = {"a": {RAM: 10}, "b": {RAM: 5}, "c": {RAM: 5}}
    offers = offering(a=Offer(NOW, False, 3), b=Offer(NOW, False, 1), c=Offer(NOW, False, 2))
    assert budget_of(Wish(10), {RAM: 20}).victims("m", resident, offers) == {"a"}


def test_the_device_is_chosen_for_the_sake_of_the_victims():
    """Room is made where that is best; who holds nothing there stays."""
    resident = {"a": {"gpu0": 24}, "b": {"gpu1": 16}, "c": {RAM: 64}}
    offers = offering(a=Offer(NOW, True, 1), b=Offer(NOW, False, 5))
    assert budget_of(Wish(8)).victims("m", resident, offers) == {"b"}
    assert budget_of(Wish(20)).victims("m", resident, offers) == {"a"}


def test_for_an_unknown_need_all_go_or_none():
    """One that cannot go is in the way of all."""
    resident = {"a": {RAM: 1}, "b": NOTHING}
    assert budget_of(Wish()).victims("m", resident, offering()) == {"a", "b"}
    assert budget_of(Wish()).victims("m", resident, offering(b=None)) is None
    assert budget_of(Wish()).victims("m", {}, offering()) == frozenset()


# ---- against brute force -------------------------------------------------------------------------

DEVICES = ("gpu0", "gpu1", RAM)
OFFERS = st.none() | st.builds(
    Offer,
    at=st.sampled_from([NOW, NOW + 1, NOW + 2]),
    busy=st.booleans(),
    # Whole numbers, or the order of additions would decide between equals.
    cost=st.integers(1, 6).map(float),
)
HOLDINGS = st.dictionaries(st.sampled_from(DEVICES), st.integers(0, 12), max_size=3)
WISHES = st.builds(
    Wish,
    declared=st.none() | st.integers(1, 22) | st.dictionaries(st.sampled_from(DEVICES), st.integers(0, 22), min_size=1),
    estimate=st.none() | st.integers(1, 22),
)
SIZES = st.fixed_dictionaries(dict.fromkeys(DEVICES, st.integers(0, 20)))


@st.composite
def worlds(draw, models=(0, 7)) -> tuple[Budget, Resident, dict[str, Offer | None]]:
    budget = budget_of(draw(WISHES), draw(SIZES))
    if draw(st.booleans()):
        budget.footprints.measured("m", dict.fromkeys(DEVICES, 9), draw(HOLDINGS))
    if draw(st.booleans()):
        budget.resize(draw(SIZES))
    names = "abcdefghijklmnopqrst"[: draw(st.integers(*models))]
    resident = {name: draw(HOLDINGS) for name in names}
    return budget, resident, {name: draw(OFFERS) for name in names}


def without(resident: Mapping[str, Holding], gone: frozenset[str]) -> Resident:
    return {name: holding for name, holding in resident.items() if name not in gone}


def sufficient(rule: Residency, resident: Resident, offers: Mapping[str, Offer | None]) -> list[frozenset[str]]:
    """Every set of those who can go that makes room."""
    leaving = [name for name in sorted(resident) if offers[name] is not None]
    subsets = (frozenset(s) for k in range(len(leaving) + 1) for s in itertools.combinations(leaving, k))
    return [subset for subset in subsets if rule.place("m", without(resident, subset)) is not None]


def key(gone: frozenset[str], offers: Mapping[str, Offer | None]) -> tuple:
    mine = [offers[name] for name in gone]
    latest = max((offer.at for offer in mine), default=0)
    return latest, any(offer.busy for offer in mine), sum(offer.cost for offer in mine), sorted(gone)


def upside_down(resident: Resident) -> Resident:
    return {name: dict(reversed(holding.items())) for name, holding in reversed(resident.items())}


@settings(max_examples=600, deadline=None)
@given(worlds())
def test_the_choice_is_the_best_of_all(world):
    """Compared with every set there is; the answer does not depend on the order of any dict."""
    budget, resident, offers = world
    best = min(sufficient(budget, resident, offers), key=lambda gone: key(gone, offers), default=None)
    assert budget.victims("m", resident, offers.get) == best
    assert budget.victims("m", upside_down(resident), offers.get) == best


@st.composite
def crowds(draw) -> tuple[Budget, Resident, dict[str, Offer | None]]:
    """Full devices and up to eight who could all go at the same time: only the costs decide."""
    resident = {name: draw(CROWDED) for name in "abcdefgh"[: draw(st.integers(2, 8))]}
    sizes = dict.fromkeys(DEVICES, 0) | Budget({}, Footprints((), {})).overcommitted(resident)
    offers = {name: Offer(NOW, busy=False, cost=float(draw(st.integers(1, 9)))) for name in resident}
    return budget_of(draw(st.builds(Wish, declared=CROWDED)), sizes), resident, offers


CROWDED = st.fixed_dictionaries({RAM: st.integers(1, 9)}, optional={"gpu0": st.integers(1, 9)})


@settings(max_examples=600, deadline=None)
@given(crowds())
def test_the_cheapest_choice_is_found(world):
    """Compared with every set there is."""
    budget, resident, offers = world
    best = min(sufficient(budget, resident, offers), key=lambda gone: key(gone, offers), default=None)
    assert budget.victims("m", resident, offers.get) == best


@settings(max_examples=300, deadline=None)
@given(worlds(models=(8, 20)))
def test_among_many_the_choice_is_good(world):
    """It makes room, of its members none can stay, and by time and idleness there is no better."""
    budget, resident, offers = world
    gone = budget.victims("m", resident, offers.get)
    assert budget.victims("m", upside_down(resident), offers.get) == gone
    everybody = frozenset(name for name, offer in offers.items() if offer is not None)
    if gone is None:
        assert budget.place("m", without(resident, everybody)) is None
        return
    assert gone <= everybody
    assert budget.place("m", without(resident, gone)) is not None
    for name in gone:
        assert budget.place("m", without(resident, gone - {name})) is None
    latest, busy = key(gone, offers)[:2]
    sooner = frozenset(name for name in everybody if offers[name].at < latest)
    idle = frozenset(name for name in everybody if offers[name].at <= latest and not offers[name].busy)
    if gone:
        assert budget.place("m", without(resident, sooner)) is None
        assert not busy or budget.place("m", without(resident, idle)) is None


@settings(max_examples=300, deadline=None)
@given(worlds(), st.data())
def test_who_fits_beside_some_fits_beside_fewer(world, data):
    """And what it is given never exceeds the budget."""
    budget, resident, _ = world
    holding = budget.place("m", resident)
    if holding is None:
        return
    fewer = data.draw(st.sets(st.sampled_from(sorted(resident)))) if resident else set()
    assert budget.place("m", without(resident, frozenset(fewer))) is not None
    over = budget.overcommitted(resident | {"m": holding})
    assert not {device for device, size in holding.items() if size} & set(over)
    assert budget.place("m", upside_down(resident)) == holding


def test_among_many_equal_ones_the_first_by_name():
    """Whoever is told first."""
    resident = {name: {RAM: 1} for name in "jihgfedcba"}
    for told in (resident, upside_down(resident)):
        assert budget_of(Wish(3), {RAM: 10}).victims("m", told, offering()) == {"a", "b", "c"}


def test_among_many_it_earns_nothing_to_free_more_than_is_needed():
    """A large model is not cheap because it is large."""
    resident = {"large": {RAM: 100}, "small": {RAM: 10}} | {name: {RAM: 1} for name in "abcdefgh"}
    offers = {name: Offer(NOW, False, 9.0) for name in resident} | {"small": Offer(NOW, False, 2.0)}
    assert budget_of(Wish(10), {RAM: 118}).victims("m", resident, offers.get) == {"small"}


def test_the_greedy_choice_lets_the_dearest_stay():
    """Of the first two by price one is needless after the third."""
    resident = {"s": {RAM: 4}, "t": {RAM: 4}, "u": {RAM: 6}} | {name: {RAM: 1} for name in "abcdefgh"}
    costs = {"s": 0.8, "t": 1.2, "u": 3.0}
    offers = {name: Offer(NOW, False, costs.get(name, 9.0)) for name in resident}
    assert budget_of(Wish(10), {RAM: 22}).victims("m", resident, offers.get) == {"s", "u"}


def test_the_greedy_choice_drops_what_it_took_in_vain():
    """Many cheap crumbs that do not suffice come first by price; with the large one they are needless."""
    resident = {f"crumb{number}": {RAM: 1} for number in range(9)} | {"large": {RAM: 100}}
    offers = offering(large=Offer(NOW, False, 101.0))
    assert budget_of(Wish(100), {RAM: 109}).victims("m", resident, offers) == {"large"}


# ---- rules and a budget ------------------------------------------------------------------------------


class AtMost:
    """A rule that leaves a choice: a number of models at the same time, whoever they are."""

    def __init__(self, most: int) -> None:
        self.most = most

    def place(self, target, resident):
        return NOTHING if len(resident) < self.most else None

    def victims(self, target, resident, offers):
        leaving = sorted((name for name in resident if offers(name)), key=lambda name: (offers(name).cost, name))
        many = max(0, len(resident) + 1 - self.most)
        return frozenset(leaving[:many]) if many <= len(leaving) else None

    def domains(self, models):
        return [frozenset({name}) for name in models]

    def capacity(self, models):
        return min(self.most, len(models))


def both(most: int, wish: Wish, sizes: Mapping[str, int] = TWO) -> Both:
    return Both(AtMost(most), budget_of(wish, sizes))


def test_both_must_agree():
    """The rules say whether, the budget says what it holds."""
    assert both(2, Wish(8)).place("m", {"a": {"gpu0": 10}}) == {"gpu1": 8}
    assert both(1, Wish(8)).place("m", {"a": {"gpu0": 10}}) is None
    assert both(2, Wish(30)).place("m", {}) is None


def test_one_domain_and_the_smaller_capacity():
    """The budget joins what the rules would keep apart."""
    assert both(2, Wish()).domains("ab") == [{"a", "b"}]
    assert both(2, Wish()).capacity(frozenset("abc")) == 2


def test_victims_of_the_rules_and_of_the_budget():
    """Groups name one; the memory still needs another."""
    groups = [GroupConfig("swap", ("m", "a"), exclusive=False), GroupConfig("other", ("b", "c"), exclusive=False)]
    rule = Both(Groups(groups), budget_of(Wish(10), {RAM: 20}))
    resident = {"a": {RAM: 4}, "b": {RAM: 9}, "c": {RAM: 7}}
    assert rule.victims("m", resident, offering()) == {"a", "b"}
    assert rule.victims("m", {"a": {RAM: 4}}, offering()) == {"a"}
    assert rule.victims("m", resident, offering(a=None)) is None
    assert rule.victims("m", resident, offering(b=None, c=None)) is None


def test_nobody_goes_for_both_in_vain():
    """The rules' own choice may stay, when the one that the budget needs satisfies the rules."""
    resident = {"cheap": {RAM: 1}, "large": {RAM: 10}}
    offers = offering(large=Offer(NOW, False, 5.0))
    assert both(2, Wish(10), {RAM: 11}).victims("m", resident, offers) == {"large"}


def test_the_dearest_stays_when_both_do_not_need_all():
    """The rules named two; with the one that goes for the budget one of them is enough."""
    resident = {"r": {RAM: 1}, "s": {RAM: 1}, "large": {RAM: 10}}
    offers = offering(s=Offer(NOW, False, 2.0), large=Offer(NOW, False, 5.0))
    assert both(2, Wish(10), {RAM: 12}).victims("m", resident, offers) == {"r", "large"}


def test_the_budget_counts_what_the_rules_set_free():
    """Else it would choose the larger one, which costs more."""
    groups = [GroupConfig("swap", ("m", "a"), exclusive=False), GroupConfig("other", ("b", "c"), exclusive=False)]
    rule = Both(Groups(groups), budget_of(Wish(10), {RAM: 20}))
    offers = offering(a=Offer(NOW, False, 9.0), c=Offer(NOW, False, 1.5))
    assert rule.victims("m", {"a": {RAM: 4}, "b": {RAM: 6}, "c": {RAM: 10}}, offers) == {"a", "b"}


@settings(max_examples=300, deadline=None)
@given(worlds(models=(0, 6)), st.integers(1, 7))
def test_both_find_room_where_there_is_any(world, most):
    """None only where no choice is enough; else it is enough, and nobody goes without need."""
    budget, resident, offers = world
    rule = Both(AtMost(most), budget)
    gone = rule.victims("m", resident, offers.get)
    choices = sufficient(rule, resident, offers)
    if gone is None:
        assert not choices
        return
    assert gone in choices
    assert not any(choice < gone for choice in choices)
