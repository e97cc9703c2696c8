"""What models need: whom we believe, what we learn, and what can be said about it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trioswap.footprints import RAM, Footprints, Need, Wish

GIB = 2**30
ONE, TWO, NONE = ("gpu0", RAM), ("gpu0", "gpu1", RAM), (RAM,)


def footprints(wish: Wish, devices=TWO, **more) -> Footprints:
    return Footprints(devices, {"m": wish}, **more)


def needs(wish: Wish, devices=TWO) -> Need:
    return footprints(wish, devices).need("m")


# ---- what is known beforehand --------------------------------------------------------------------


def test_a_declared_size_may_go_to_any_gpu():
    """In the order of the devices."""
    assert needs(Wish(9)) == Need(({"gpu0": 9}, {"gpu1": 9}), "declared", ({"gpu0": 9}, {"gpu1": 9}))
    assert needs(Wish(9, "auto")) == needs(Wish(9))


def test_without_a_gpu_it_goes_to_host_memory():
    """There is nothing else."""
    assert needs(Wish(9), NONE).holdings == ({RAM: 9},)


@pytest.mark.parametrize("device", ["gpu1", RAM])
def test_a_named_device_is_the_only_one(device):
    """For what is declared and for what is guessed."""
    assert needs(Wish(9, device)).holdings == ({device: 9},)
    assert needs(Wish(None, device, 9)).holdings == ({device: 9},)


def test_amounts_for_several_devices_are_taken_as_they_are():
    """No other way to place them is tried."""
    assert needs(Wish({"gpu0": 5, RAM: 2})).holdings == ({"gpu0": 5, RAM: 2},)


def test_a_guess_counts_where_nothing_better_is_known():
    """Declared before estimated; nothing at all is an unknown need."""
    assert needs(Wish(9, estimate=7)).source == "declared"
    assert needs(Wish(estimate=7)) == Need(({"gpu0": 7}, {"gpu1": 7}), "estimated")
    assert needs(Wish()) == Need((), "unknown")
    assert needs(Wish(0)).source == "declared"


# ---- what is learned ---------------------------------------------------------------------------


def test_a_measured_peak_replaces_a_guess():
    """Also a smaller one, and with what it uses of other devices."""
    book = footprints(Wish(estimate=7 * GIB))
    book.measured("m", {"gpu0": 7 * GIB}, {"gpu0": 5 * GIB, RAM: GIB})
    expected = ({"gpu0": 5 * GIB, RAM: GIB}, {"gpu1": 5 * GIB, RAM: GIB})
    assert book.need("m") == Need(expected, "learned")


def test_what_was_learned_on_one_gpu_holds_for_the_other():
    """The peak is about the amount; where it goes is still free."""
    book = footprints(Wish(estimate=7))
    book.measured("m", {"gpu1": 7}, {"gpu1": 5})
    assert book.need("m").holdings == ({"gpu0": 5}, {"gpu1": 5})


def test_a_model_of_which_nothing_was_known_is_free_too():
    """It had the whole machine and used one GPU of it."""
    book = footprints(Wish())
    book.measured("m", {"gpu0": 24, "gpu1": 24, RAM: 64}, {"gpu1": 5, RAM: 1, "gpu0": 0})
    assert book.need("m").holdings == ({"gpu0": 5, RAM: 1}, {"gpu1": 5, RAM: 1})


def test_a_model_that_uses_both_gpus_has_no_choice():
    """What was learned names its devices."""
    book = footprints(Wish())
    book.measured("m", {"gpu0": 24, "gpu1": 24, RAM: 64}, {"gpu0": 5, "gpu1": 6})
    assert book.need("m").holdings == ({"gpu0": 5, "gpu1": 6},)


def test_a_model_that_went_elsewhere_has_no_choice():
    """It was sent to one GPU and used the other: what was declared is meant for that one, too."""
    book = footprints(Wish(9))
    book.measured("m", {"gpu0": 9}, {"gpu1": 5, RAM: 8})
    assert book.need("m").holdings == ({"gpu1": 9, RAM: 8},)
    book.measured("m", {"gpu1": 9}, {"gpu1": 6})
    assert book.need("m").holdings == ({"gpu0": 9}, {"gpu1": 9}), "it obeys again"


def test_a_named_device_stays():
    """Whatever was measured, the user's choice of the device is not moved."""
    book = footprints(Wish(9, "gpu1"))
    book.measured("m", {"gpu1": 9}, {"gpu1": 10, RAM: 1})
    assert book.need("m").holdings == ({"gpu1": 10, RAM: 1},)


def test_what_is_declared_is_kept_unless_more_is_measured():
    """Less measured: the user may know of longer prompts.  More measured: that memory is used."""
    book = footprints(Wish(9 * GIB), ONE)
    book.measured("m", {"gpu0": 9 * GIB}, {"gpu0": 5 * GIB})
    assert book.need("m") == Need(({"gpu0": 9 * GIB},), "declared", ({"gpu0": 9 * GIB},))
    book.measured("m", {"gpu0": 9 * GIB}, {"gpu0": 10 * GIB})
    need = book.need("m")
    assert need.holdings == ({"gpu0": 10 * GIB},)
    assert (need.source, need.declared) == ("declared", ({"gpu0": 9 * GIB},))
    assert need.note == "9.0 GiB declared, but 10.0 GiB used"


def test_higher_peaks_count_at_once_and_are_forgotten_slowly():
    """Each lower peak takes back a tenth of the difference."""
    book = footprints(Wish(), NONE)
    peaks = [1000, 2000, 1000, 1000]
    seen = []
    for peak in peaks:
        book.measured("m", {RAM: 9999}, {RAM: peak})
        seen.append(book.need("m").holdings[0][RAM])
    assert seen == [1000, 2000, 1900, 1810]


def test_a_run_that_goes_on_only_raises():
    """While it loads, a peak says nothing: neither is a first one believed nor the old one forgotten."""
    book = footprints(Wish(), NONE)
    book.measured("m", {RAM: 99}, {RAM: 10}, so_far=True)
    assert book.need("m") == Need()
    book.measured("m", {RAM: 99}, {RAM: 1000})
    for peak in (10, 500, 1200, 20):
        book.measured("m", {RAM: 99}, {RAM: peak}, so_far=True)
    assert book.need("m").holdings == ({RAM: 1200},)


def test_a_run_that_goes_on_does_not_change_devices():
    """Half loaded, a model that uses two GPUs looks like one that uses one."""
    book = footprints(Wish())
    book.measured("m", {"gpu0": 9, "gpu1": 9}, {"gpu0": 5, "gpu1": 6})
    book.measured("m", {"gpu0": 9, "gpu1": 9}, {"gpu0": 3}, so_far=True)
    assert book.need("m").holdings == ({"gpu0": 5, "gpu1": 6},)


def test_nothing_measured_is_nothing_learned():
    """Zeros come from a process that was gone; devices we do not know are none of ours."""
    book = footprints(Wish(estimate=7), ONE)
    book.measured("m", {"gpu0": 7}, {"gpu0": 0, "gpu9": 5})
    assert book.need("m").source == "estimated"
    assert book.learned() == {}


def test_measurement_can_be_distrusted():
    """Where an accelerator cannot be measured, host memory alone would pass for the need."""
    book = footprints(Wish(estimate=7), NONE, trusts_measurement=False)
    book.measured("m", {RAM: 7}, {RAM: 1})
    assert book.need("m") == Need(({RAM: 7},), "estimated")
    book.restore({"m": {"peak": {RAM: 5}, "grown": {RAM: 8}, "fixed": False}})
    book.measured("m", {RAM: 7}, {RAM: 99})
    assert book.need("m").holdings == ({RAM: 8},), "a failure needs no measurement"
    assert book.learned()["m"]["peak"] == {RAM: 5}, "kept for better times"


# ---- out of memory ---------------------------------------------------------------------------


@pytest.mark.parametrize("wish", [Wish(8 * GIB), Wish(estimate=8 * GIB)])
def test_after_running_out_of_memory_it_asks_for_a_quarter_more(wish):
    """Each time, whoever said how much; and it can be explained."""
    book = footprints(wish)
    book.ran_out("m", {"gpu1": 8 * GIB})
    need = book.need("m")
    assert need.holdings == ({"gpu0": 10 * GIB}, {"gpu1": 10 * GIB})
    assert need.note == "10.0 GiB after running out of memory"
    book.ran_out("m", {"gpu0": 10 * GIB})
    assert book.need("m").holdings[0] == {"gpu0": 12.5 * GIB}
    assert book.need("m").source == needs(wish).source


def test_the_measured_peak_counts_when_it_is_larger():
    """A start that had 8 and was seen to take 12 needs 12."""
    book = footprints(Wish(8), NONE)
    book.measured("m", {RAM: 8}, {RAM: 12})
    book.ran_out("m", {RAM: 8})
    assert book.need("m").holdings == ({RAM: 12},)


def test_what_a_failure_taught_is_forgotten_slowly():
    """Each run that got by with less takes back a tenth of the difference; looks within a run take back nothing."""
    book = footprints(Wish(), NONE)
    book.measured("m", {RAM: 99}, {RAM: 80})
    book.ran_out("m", {RAM: 80})
    assert book.need("m").holdings == ({RAM: 100},)
    book.measured("m", {RAM: 100}, {RAM: 50}, so_far=True)
    assert book.need("m").holdings == ({RAM: 100},)
    book.measured("m", {RAM: 100}, {RAM: 50})
    assert book.need("m").holdings == ({RAM: 95},)
    for _ in range(100):
        book.measured("m", {RAM: 100}, {RAM: 50})
    assert book.need("m").holdings == ({RAM: 59},)  # whole bytes: the last nine are less than a tenth


def test_an_older_failure_told_late_lowers_nothing():
    """It had less than is asked for by now."""
    book = footprints(Wish(), NONE)
    book.measured("m", {RAM: 99}, {RAM: 80})
    book.ran_out("m", {RAM: 80})
    book.ran_out("m", {RAM: 40})
    assert book.need("m").holdings == ({RAM: 100},)


@pytest.mark.parametrize("wish", [Wish(), Wish(estimate=40)])
def test_who_had_the_whole_machine_cannot_ask_for_more(wish):
    """There is nothing to learn, and later peaks count alone."""
    book = footprints(wish)
    book.ran_out("m", {"gpu0": 24, "gpu1": 24, RAM: 64})
    assert book.need("m") == needs(wish)
    assert book.learned() == {}


def test_devices_changing_hands_forget_the_failure():
    """It was about another placement."""
    book = footprints(Wish())
    book.measured("m", {"gpu0": 24, "gpu1": 24}, {"gpu0": 5, "gpu1": 6})
    book.ran_out("m", {"gpu0": 5, "gpu1": 6})
    assert book.need("m").holdings == ({"gpu0": 7, "gpu1": 8},)
    book.measured("m", {"gpu0": 7, "gpu1": 8}, {"gpu1": 9})
    assert book.need("m").holdings == ({"gpu0": 9}, {"gpu1": 9})


# ---- keeping it --------------------------------------------------------------------------------


def test_what_was_learned_survives_as_plain_values():
    """Through JSON, and the need is the same again."""
    book = footprints(Wish(9))
    book.measured("m", {"gpu1": 9}, {"gpu1": 10, RAM: 2})
    book.ran_out("m", {"gpu1": 9})
    again = footprints(Wish(9))
    again.restore(json.loads(json.dumps(book.learned())))
    assert again.need("m") == book.need("m") != needs(Wish(9))
    assert again.learned() == book.learned()


def test_models_and_devices_that_are_gone_are_not_restored():
    """The others are."""
    record = {"peak": {RAM: 5}, "grown": {}, "fixed": False}
    book = Footprints(ONE, {"a": Wish(), "b": Wish(), "c": Wish()})
    book.restore({"a": record, "gone": record, "b": record | {"peak": {"gpu7": 1}}, "c": record | {"grown": {"x": 1}}})
    assert list(book.learned()) == ["a"]


def test_models_do_not_learn_from_each_other():
    """One model's peak and failure leave the other as it was."""
    book = Footprints(ONE, {"a": Wish(5), "b": Wish(5)})
    book.measured("a", {"gpu0": 5}, {"gpu0": 9})
    book.ran_out("a", {"gpu0": 5})
    assert book.need("b") == Need(({"gpu0": 5},), "declared", ({"gpu0": 5},))


SIZES = st.integers(1, 100)
HOLDINGS = st.dictionaries(st.sampled_from(TWO), SIZES, min_size=1)
EVENTS = st.lists(st.tuples(st.sampled_from(["measured", "so_far", "ran_out"]), HOLDINGS, HOLDINGS), max_size=12)
WISHES = st.builds(
    Wish,
    declared=st.none() | SIZES | HOLDINGS,
    device=st.sampled_from([None, "auto", *TWO]),
    estimate=st.none() | SIZES,
)


@given(WISHES, EVENTS)
def test_whatever_happens_the_need_is_no_less_than_it_must(wish, events):
    """Never below what is declared or the last peak of a finished run; what is kept is enough to know it again."""
    book = footprints(wish)
    for kind, placed, peak in events:
        before = book.need("m")
        if kind == "ran_out":
            book.ran_out("m", placed)
        else:
            book.measured("m", placed, peak, so_far=kind == "so_far")
        need = book.need("m")
        assert need.source != "unknown" or not need.holdings
        assert all(size > 0 for holding in need.holdings for size in holding.values())
        for holding, declared in zip(need.holdings, need.declared, strict=False):
            assert all(holding[device] >= size for device, size in declared.items())
        if kind == "measured":
            assert any(all(holding.get(d, 0) >= size for d, size in peak.items()) for holding in need.holdings)
        if kind == "ran_out" and before.source == "unknown":
            assert need == before
    again = footprints(wish)
    again.restore(book.learned())
    assert again.need("m") == book.need("m")
