"""The simulation: the physics of the box, the demand, the contenders, recorded traces, and what is shown of them."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

import attrs
import pytest
from commands import trioswap

from trioswap.config import loads
from trioswap.errors import IllegalTransition, Misuse, ShuttingDown
from trioswap.lifecycle import State
from trioswap.messages import (
    Arrived,
    CloseGate,
    Eviction,
    Grant,
    Left,
    OpenGate,
    Policy,
    Reject,
    Start,
    Stop,
    Swap,
    WokeUp,
)
from trioswap.simulation import compare, configured, plot, records, report
from trioswap.simulation.contenders import CONTENDERS, Settings, StrictFifo, chosen
from trioswap.simulation.figures import average, geometric_mean, measure, quantile
from trioswap.simulation.machine import Machine, Misbehaved
from trioswap.simulation.workload import ModelSpec, Session, Step, Workload

GB = 10**9


def model(name: str, **changes) -> ModelSpec:
    return attrs.evolve(
        ModelSpec(name, load=10, stop=1, memory=GB, slots=2, prefill=1000, decode=10, penalty=0.25), **changes
    )


def workload(*sessions: Session, budget: int | None = None, **changes) -> Workload:
    return Workload("test", (model("a"), model("b")), sessions, budget, **changes)


def asks(name: str, *, at: float = 0, out: int = 30, prompt: int = 0, **changes) -> Session:
    """A session of one request; alone and without a prompt it takes 3 s."""
    return Session("ann", at, (Step(name, prompt, prompt, out, **changes),))


def replay(work: Workload, contender: str = "llama-swap", **settings) -> Machine:
    """The machine after the replay; llama-swap's rule grants whatever is ready at once."""
    machine = Machine(work, CONTENDERS[contender](work, Settings(**settings)))
    machine.run()
    return machine


def times(machine: Machine, field: str) -> list[float]:
    return [round(getattr(request, field), 6) for request in machine.requests]


class Script:
    """A scheduler that answers the n-th event with the n-th list of commands, whatever it is."""

    def __init__(self, *answers: list, wake_at: float = math.inf) -> None:
        self.answers, self.wake_at, self.seen = list(answers), wake_at, []

    def handle(self, event, now):
        self.seen.append((now, event))
        return self.answers.pop(0) if self.answers else []


# ---- the physics ------------------------------------------------------------------------------


def test_a_request_waits_for_the_load_then_prefills_then_decodes():
    """First token and end of a request that is alone come as its tokens and the model's speeds say."""
    machine = replay(workload(asks("a", at=5, prompt=2000)))

    assert (times(machine, "granted"), times(machine, "first"), times(machine, "done")) == ([15], [17], [20])


def test_the_next_step_comes_after_a_pause_and_finds_its_prompt_in_the_cache():
    """A session's next request comes when the user has thought; only the new tokens are prefilled on a warm server."""
    steps = (Step("a", 2000, 2000, 30), Step("a", 3000, 500, 30, think=1))
    machine = replay(workload(Session("ann", 0, steps)))

    assert times(machine, "arrived") == [0, 16]
    assert times(machine, "first") == [12, 16.5]


def test_a_server_that_ended_has_lost_its_cache():
    """After a swap there and back the whole prompt is prefilled again."""
    steps = (Step("a", 2000, 2000, 30), Step("b", 0, 0, 30), Step("a", 3000, 500, 30))
    machine = replay(workload(Session("ann", 0, steps)))

    # 15: done; 1 s to stop a, 10 s to load b, 3 s of service; 1 s to stop b, 10 s to load a, 3 s of prefill.
    assert times(machine, "granted") == [10, 26, 40]
    assert times(machine, "first") == [12, 26, 43]


def test_requests_of_a_batch_slow_each_other_down():
    """Two together run at 1 / 1.25 of their speed alone; the third waits in the server for a slot."""
    machine = replay(workload(asks("a"), asks("a"), asks("a")))

    assert times(machine, "granted") == [10, 10, 10]
    assert times(machine, "done") == [13.75, 13.75, 16.75]


def test_two_loads_share_the_bandwidth_and_two_busy_models_the_gpu():
    """What happens at the same time takes twice as long, until one of the two is done."""
    quick = model("b", load=4)
    work = Workload("test", (model("a"), quick), (asks("a"), asks("b", out=80)), budget=2 * GB)
    machine = replay(work)

    # b is ready when both have had 4 s; it serves 6 of its 8 s alone, and the rest at half speed.
    assert times(machine, "granted") == [14, 8]
    assert times(machine, "done") == [19, 18]


def test_recorded_service_is_not_slowed_down_again():
    """What a request was seen to take has the others in it already; tokens say when the first one came."""
    machine = replay(
        workload(asks("a", service=3.0), asks("a", service=3.0), asks("a", prompt=1000, out=10, service=8.0))
    )

    assert times(machine, "done") == [13, 13, 21]
    assert times(machine, "first") == [10, 10, 17]


def test_loads_vary_as_drawn():
    """The n-th load of a model takes the n-th factor, over and over."""
    steps = tuple(Step(name, out=30) for name in "ababa")
    machine = replay(workload(Session("ann", 0, steps), jitter={"a": (1.5, 0.5)}))

    waits = [
        granted - arrived for granted, arrived in zip(times(machine, "granted"), times(machine, "arrived"), strict=True)
    ]
    assert waits == pytest.approx([15, 11, 6, 11, 16])


def test_time_is_served_or_swapped_or_neither():
    """Busy is when something is served, swapping when nothing is, for want of a model."""
    machine = replay(workload(asks("a", at=5), asks("b", at=30)))

    assert machine.box.now == pytest.approx(44)
    assert machine.box.busy == pytest.approx(6)
    assert machine.box.swapping == pytest.approx(21)


# ---- the protocol -------------------------------------------------------------------------------

START, BOTH = Start("a", 1), workload(asks("a"), asks("b"))


def eviction(attempt: int) -> Eviction:
    return Eviction("a", attempt, "b", was=State.READY, idle=0, reload=0, waited=0)


@pytest.mark.parametrize(
    ("answers", "what"),
    [
        ([[START, Grant(0, "a", 1)]], "a model that is starting"),
        ([[START], [], [Grant(1, "a", 1)]], "Grant"),
        ([[START], [], [Grant(0, "a", 1), Grant(0, "a", 1)]], "Grant"),
        ([[START], [], [Grant(0, "a", 2)]], "attempt 1"),
        ([[START], [], [CloseGate("a", 1, ""), Grant(0, "a", 1)]], "a model that is draining"),
        ([[START], [Start("b", 2)]], "does not fit: a, b"),
        ([[START], [], [Grant(0, "a", 1), Stop("a", 1, "")]], "which serves 1"),
        ([[START], [], [Grant(0, "a", 1), Swap("b", (eviction(1),))]], "which serves 1"),
        ([[START], [], [Swap("b", (eviction(2),))]], "attempt 1"),
        ([[START], [], [Stop("a", 1, ""), Start("b", 2)]], "does not fit: a, b"),
        ([], "wait for what never comes"),
        ([[START], [], [Grant(0, "a", 1)]], "1 requests wait for what never comes"),
    ],
)
def test_what_no_shell_could_do_raises(answers, what):
    """The machine does not trust the scheduler."""
    with pytest.raises(Misbehaved, match=what):
        Machine(BOTH, Script(*answers)).run()


@pytest.mark.parametrize(
    "answers",
    [
        [[START, Start("a", 2)]],
        [[START], [], [OpenGate("a", 1, "")]],
        [[START], [], [Stop("a", 1, ""), Stop("a", 1, "")]],
    ],
)
def test_what_the_table_of_states_does_not_know_raises(answers):
    """A model server has no other states here than in the daemon."""
    with pytest.raises(IllegalTransition):
        Machine(BOTH, Script(*answers)).run()


def test_the_scheduler_is_woken_when_it_asked_for_it():
    """`WokeUp` comes at `wake_at`, not before, though nothing else happens."""

    class Late(Script):
        def handle(self, event, now):
            if isinstance(event, Arrived):
                self.wake_at = 25.3
            elif isinstance(event, WokeUp):
                self.wake_at = math.inf
            return super().handle(event, now)

    late = Late([], [START], [Grant(0, "a", 1)])
    machine = Machine(workload(asks("a", at=0.1)), late)
    machine.run()

    assert late.seen[1] == (25.3, WokeUp())
    assert times(machine, "granted") == [35.3]


def test_a_scheduler_that_wakes_up_for_nothing_is_found_out():
    """Otherwise the replay would never end."""

    class Restless(Script):
        def handle(self, event, now):
            self.wake_at = now + 60
            return []

    with pytest.raises(Misbehaved, match="again and again"):
        Machine(workload(asks("a")), Restless()).run()


def test_a_refused_request_is_counted_and_gone():
    """Its user does not come back, and the scheduler learns that it has left."""
    refusing = Script([Reject(0, ShuttingDown())])
    machine = Machine(workload(Session("ann", 0, (Step("a", out=30), Step("a", out=30)))), refusing)
    machine.run()

    assert machine.rejected == 1
    assert [event for _, event in refusing.seen] == [Arrived(0, "a", None), Left(0)]


def test_weights_are_told_on_demand():
    """Without the switch all users are alike."""
    heavy = attrs.evolve(asks("a"), weight=4.0)
    told = Script([Reject(0, ShuttingDown())])
    Machine(workload(heavy), told, weights=True).run()

    assert told.seen[0] == (0, Arrived(0, "a", 4.0))


# ---- figures ------------------------------------------------------------------------------------


def test_figures_of_a_replay():
    """Hand-made: two users, one of whom waits for a swap."""
    figures = measure(replay(workload(asks("a"), attrs.evolve(asks("b"), user="bob"))))

    assert figures.requests == 2
    assert figures.loads == 2
    assert figures.mean == pytest.approx((10 + 24) / 2)
    assert figures.longest_wait == pytest.approx(24)
    assert figures.makespan == pytest.approx(27)
    assert figures.worst_slowdown == pytest.approx(27 / 3)
    assert figures.mean_slowdown == pytest.approx((13 / 3 + 27 / 3) / 2)
    assert figures.busy == pytest.approx(6 / 27)
    assert figures.swapping == pytest.approx(21 / 27)
    assert average([figures, attrs.evolve(figures, loads=4)]).loads == 3


def test_work_that_takes_no_time_has_figures():
    """Records may say so, and nothing is divided by it."""
    figures = measure(replay(workload(asks("a", out=0, service=0.0))))

    assert figures.worst_slowdown == 1


def test_quantiles_and_means():
    """In between by proportion; ratios by their product."""
    assert quantile([1, 2, 3, 4], 0.5) == 2.5
    assert quantile([1, 2, 3, 4], 1) == 4
    assert quantile([7], 0.99) == 7
    assert geometric_mean([0.5, 2, 8]) == pytest.approx(2)


# ---- built-in traces ------------------------------------------------------------------------------

# Of seed 3: requests; tokens of all prompts, of them new, generated; starts and pauses in seconds.
DEMAND = {
    "agents": (119, 1298500, 61900, 37891, 212.243891),
    "alternate": (40, 354000, 20000, 13675, 21.948669),
    "fanout": (70, 359500, 35000, 16818, 189.652634),
    "rag": (472, 475160, 354560, 8899, 1294.809348),
    "zipf": (300, 359020, 359020, 57352, 601805.076166),
    "duel": (80, 307200, 24000, 14075, 53.375672),
    "batch": (172, 144700, 114400, 50231, 291.711814),
    "starve": (140, 719000, 57500, 46355, 1177.123650),
    "office": (112, 257600, 31500, 19503, 2291.835214),
    "zipf_budget": (400, 475278, 475278, 77340, 547724.945683),
    "rag_budget": (157, 297650, 181400, 14406, 1677.596852),
}

# Means of the seeds 0 to 2 with swaps of 10 s: swaps, TTFT mean and p99, longest wait, makespan.  From
# the simulator in which the policy was found, which has schedulers and a machine of its own.
KNOWN = {
    "lease": {
        "agents": (32.667, 12.676, 62.538, 74.62, 1402.5),
        "alternate": (40, 16.753, 21.113, 12.844, 1008.9),
        "fanout": (21.333, 20.672, 82.253, 83.779, 671.35),
        "rag": (54, 2.7189, 23.739, 25.203, 755.18),
        "zipf": (93.667, 13.525, 54.602, 63.257, 4295.6),
        "duel": (16.333, 9.4492, 72.259, 72.769, 573.53),
        "batch": (10.667, 275, 572.89, 577.58, 839.98),
        "starve": (9, 6.1771, 83.135, 87.287, 829.86),
        "office": (35.667, 25.958, 68.756, 75.276, 936.09),
        "zipf_budget": (78, 7.7181, 33.468, 38.971, 3178.2),
        "rag_budget": (51.667, 3.721, 16.717, 16.641, 663.3),
    },
    "llama-swap": {
        "agents": (37.333, 13.208, 60.741, 86.958, 1454.5),
        "alternate": (40, 16.753, 21.113, 12.844, 1008.9),
        "fanout": (35.667, 32.699, 71.478, 69.007, 805.95),
        "rag": (56.667, 4.4448, 27.723, 29.134, 722.18),
        "zipf": (93.667, 13.456, 54.577, 63.232, 4295.6),
        "duel": (80, 29.565, 38.606, 37.052, 1371.6),
        "batch": (2, 218.04, 451.42, 449.39, 879.28),
        "starve": (3, 15.555, 472.44, 575.64, 734.89),
        "office": (42.667, 34.864, 64.122, 63.513, 910.72),
        "zipf_budget": (85, 10.564, 45.969, 55.017, 3177.6),
        "rag_budget": (26.667, 4.2053, 33.79, 37.765, 679.2),
    },
    "strict-fifo": {
        "agents": (40.667, 17.203, 67.911, 84.879, 1659.7),
        "alternate": (40, 16.753, 21.113, 12.844, 1008.9),
        "fanout": (53.667, 47.008, 74.856, 72.821, 1064.9),
        "rag": (56, 4.9122, 29.092, 31.094, 745.16),
        "zipf": (111.67, 31.023, 123.98, 135.2, 4329.8),
        "duel": (80, 29.565, 38.606, 37.052, 1371.6),
        "batch": (2, 220.44, 454.06, 451.99, 881.87),
        "starve": (11, 5.7715, 51.613, 53.896, 890.22),
        "office": (81.667, 79.126, 123.6, 127.5, 1542),
        "zipf_budget": (83, 14.447, 67.081, 75.437, 3189.6),
        "rag_budget": (66, 7.8389, 32.443, 32.895, 771.05),
    },
}


@pytest.fixture
def traces():
    """The module that makes them."""
    pytest.importorskip("numpy", reason="extra simulate")
    from trioswap.simulation import traces

    return traces


def found(name: str, seeds: int = 3) -> compare.Trace:
    [trace] = compare.find([name], seeds, 10.0)
    return trace


@pytest.mark.parametrize("name", DEMAND)
def test_the_demand_is_the_documented_one(name, traces):
    """The draws are part of a trace: figures in the documentation stay true."""
    work = traces.build(name, 3, 10.0)
    steps = [step for session in work.sessions for step in session.steps]
    seconds = sum(session.start for session in work.sessions) + sum(step.think for step in steps)

    tokens = (sum(step.prompt for step in steps), sum(step.new for step in steps), sum(step.out for step in steps))
    assert (len(steps), *tokens, pytest.approx(seconds, abs=1e-5)) == DEMAND[name]
    assert {step.model for step in steps} <= {spec.name for spec in work.models}


def test_all_traces_are_known_here(traces):
    """A trace without figures would be tested by nobody."""
    assert list(traces.TRACES) == list(DEMAND)


def test_loads_are_noisy_in_the_documented_way(traces):
    """The factors belong to the seed and the place of the model among the sorted names."""
    jitter = traces.build("duel", 3, 10.0).jitter

    assert jitter["A"][:2] == pytest.approx([1.06382787, 0.9609879])
    assert jitter["B"][:2] == pytest.approx([1.1332423, 0.95267843])


def test_only_the_named_traces_share_a_budget(traces):
    """The others are for one model at a time."""
    budgets = {name: traces.build(name, 0, 10.0).budget for name in traces.TRACES}

    assert {name for name, budget in budgets.items() if budget} == {"zipf_budget", "rag_budget"}
    assert budgets["zipf_budget"] == 24 * GB


@pytest.mark.parametrize(("contender", "name"), [(key, name) for key, known in KNOWN.items() for name in known])
@pytest.mark.usefixtures("traces")
def test_the_scheduler_does_what_was_simulated(contender, name):
    """The daemon's scheduler reproduces the figures by which its policy was chosen."""
    figures = compare.run(found(name), [contender], Settings())[contender]

    got = (figures.loads, figures.mean, figures.p99, figures.longest_wait, figures.makespan)
    assert got == pytest.approx(KNOWN[contender][name], rel=0.05)
    assert figures.rejected == 0


@pytest.mark.usefixtures("traces")
@pytest.mark.parametrize(
    ("name", "settings", "figure"),
    [
        ("starve", {"max_wait": 15.0}, "longest_wait"),
        ("duel", {"linger": 0.0}, "makespan"),
        ("fanout", {"turn_lease": 0.0}, "makespan"),
        ("zipf_budget", {"parallel_loads": 4}, "longest_wait"),
    ],
)
def test_settings_reach_the_scheduler(name, settings, figure):
    """Each changes what the trace that it is about comes to."""
    trace = found(name, 1)
    default = compare.run(trace, ["lease"], Settings())["lease"]
    changed = compare.run(trace, ["lease"], Settings(**settings))["lease"]

    assert getattr(changed, figure) != pytest.approx(getattr(default, figure), rel=0.01)


@pytest.mark.usefixtures("traces")
def test_weights_let_people_wait_less_for_a_batch():
    """In the trace `batch` the person is four times as heavy as the job."""
    trace = found("batch", 1)
    alike, weighed = (compare.run(trace, ["lease"], Settings(), weights=weights)["lease"] for weights in (False, True))

    assert weighed.loads > 1.5 * alike.loads


def test_contenders_are_checked():
    """Names come with commas; a wrong one is told what there is."""
    assert chosen("strict-fifo, lease,lease") == ["strict-fifo", "lease"]
    with pytest.raises(Misuse, match='found "leese", allowed are lease, llama-swap, strict-fifo, did you mean "lease"'):
        chosen("lease,leese")


def test_strict_fifo_serves_the_cause_of_a_swap_alone():
    """The request that causes a swap holds the lock; whoever comes behind it waits, in order, for whatever model."""
    work = workload(asks("a"), asks("a"), asks("b", at=1), asks("a", at=2))
    machine = Machine(work, StrictFifo(work))
    machine.run()

    assert times(machine, "granted") == [10, 13, 27, 41]


def test_strict_fifo_puts_out_the_one_used_longest_ago():
    """Where several fit; and only when it is idle."""
    models = (model("a"), model("b"), model("c", memory=2 * GB))
    sessions = (asks("a"), asks("b", at=20), asks("a", at=40), asks("c", at=60, out=30), asks("a", at=100))
    work = Workload("test", models, sessions, budget=3 * GB)
    machine = Machine(work, StrictFifo(work))
    machine.run()

    # b goes for c; a has stayed.
    assert times(machine, "granted") == [10, 30, 40, 71, 100]


# ---- records ----------------------------------------------------------------------------------------


def write(directory: Path, *lines: object) -> Path:
    """A file of JSON lines; texts are written as they are."""
    path = directory / "records.jsonl"
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def test_records_become_open_arrivals(tmp_path):
    """Times count from the first request, wherever in the file it stands; what is not said has a default."""
    path = write(
        tmp_path,
        {"model": "a", "at": 1007.5, "user": "ann", "weight": 2, "service": 3},
        "",
        {"model": "b", "at": 1000, "prompt": 500, "out": 20},
    )
    work = records.read(path)

    assert work.sessions == (
        Session("ann", 7.5, (Step("a", 0, 0, 0, service=3.0),), 2.0),
        Session("somebody", 0.0, (Step("b", 500, 500, 20),), 1.0),
    )
    assert work.models == (ModelSpec("a", 10, 1), ModelSpec("b", 10, 1))
    assert work.budget is None
    assert times(replay(work), "granted") == pytest.approx([10, 10 + 500 / 1500 + 20 / 40 + 1 + 10])


def test_the_first_line_may_describe_the_models(tmp_path):
    """With the memory that they share."""
    head = {"models": {"a": {"load": 2, "memory": "8GB"}, "b": {"slots": 1, "memory": 5}}, "budget": "24GB"}
    work = records.read(write(tmp_path, head, {"model": "a", "at": 0, "out": 1}))

    assert work.models == (ModelSpec("a", 2, 1, 8 * GB), ModelSpec("b", 10, 1, 5, slots=1))
    assert work.budget == 24 * GB


REQUEST = {"model": "a", "at": 0, "out": 1}


@pytest.mark.parametrize(
    ("lines", "mistake"),
    [
        (["{"], ":1: found what is no JSON"),
        (["[" * 100_000], ":1: found what is no JSON"),
        (["9" * 5_000], ":1: found what is no JSON"),
        (["[]"], ":1: found an array, allowed is one object in each line"),
        ([REQUEST, {**REQUEST, "at": -1}], ":2: at: found -1, allowed is a number of seconds from 0 up"),
        (['{"model": "a", "at": NaN, "out": 1}'], ":1: at: found nan, allowed is"),
        ([{**REQUEST, "at": True}], ":1: at: found true, allowed is"),
        ([{**REQUEST, "at": 1_760_000_000_000}], ":1: at: found 1760000000000, allowed is"),
        ([{**REQUEST, "model": ""}], ':1: model: found "", allowed is text'),
        ([{**REQUEST, "weight": 0}], ":1: weight: found 0, allowed is a number above 0"),
        ([{**REQUEST, "out": 1.5}], ":1: out: found 1.5, allowed is a whole number from 0 up"),
        ([{**REQUEST, "sevice": 1}], ':1: sevice: unknown key, did you mean "service"?'),
        ([{"at": 0, "out": 1}], ":1: model: found nothing, but it is needed"),
        ([{"model": "a", "at": 0}], ":1: found neither service nor out, but one of them is needed"),
        ([{"models": []}, REQUEST], ":1: models: found an array, allowed is an object"),
        ([{"models": {"a": 1}}, REQUEST], ":1: models.a: found 1, allowed is an object"),
        ([{"models": {"a": {"slots": 0}}}, REQUEST], ":1: models.a.slots: found 0, allowed is"),
        ([{"models": {"a": {"memory": "8GX"}}}, REQUEST], ':1: models.a.memory: found "8GX", allowed is'),
        ([REQUEST, {"models": {}}], ":2: found models after the first request, allowed is before it"),
        ([{"budget": 9}, REQUEST], ':2: the memory of model "a": found nothing, allowed is from 1 to the budget of 9'),
        (
            [{"budget": 9, "models": {"a": {"memory": 10}}}, REQUEST],
            ':2: the memory of model "a": found 10 bytes, allowed is from 1',
        ),
        ([], ": found no request, allowed is one in each line"),
    ],
)
def test_mistakes_in_records_have_a_place_and_a_reason(lines, mistake, tmp_path):
    """Each names file and line, what was found, and what is allowed."""
    path = write(tmp_path, *lines)

    with pytest.raises(Misuse) as caught:
        records.read(path)

    assert f"{path}{mistake}" in caught.value.message


def test_all_mistakes_in_records_are_told_but_not_a_thousand_times(tmp_path):
    """A person can repair the file at once."""
    path = write(tmp_path, {"model": 1, "at": "x"}, *[{"model": "a"}] * 30)

    with pytest.raises(Misuse) as caught:
        records.read(path)

    lines = caught.value.message.splitlines()
    assert len(lines) == 22
    assert lines[1:4] == [
        f"{path}:1: model: found 1, allowed is text",
        f'{path}:1: at: found "x", allowed is a number of seconds from 0 up',
        f"{path}:1: found neither service nor out, but one of them is needed",
    ]
    assert lines[-1] == "and 43 more"


def test_no_utf8_is_a_mistake(tmp_path):
    """And no crash."""
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'{"model": "\xff", "at": 0, "out": 1}\n')

    with pytest.raises(Misuse, match=":1: found what is no JSON"):
        records.read(path)


def test_a_file_that_cannot_be_read_is_a_mistake(tmp_path):
    """The reason is the system's."""
    with pytest.raises(Misuse, match="cannot read the file: Is a directory"):
        records.read(tmp_path)


CONFIG = """
max_wait = 20
parallel_loads = 2
[memory]
headroom = "1GB"
[memory.devices]
gpu0 = "21GB"
[models.a]
cmd = "server --port ${PORT}"
memory = "8GB"
load_cost = 4
stop_cost = 2
parallel = 3
linger = 0
[models.b]
cmd = "server --port ${PORT}"
"""


def test_a_configuration_describes_the_models(tmp_path):
    """What it says of costs, memory and scheduling counts; a model of unknown size needs all there is."""
    frame = configured.frame(loads(CONFIG))
    work = records.read(write(tmp_path, {"model": "a", "at": 0, "out": 1}), frame)

    assert work.models == (
        ModelSpec("a", 4, 2, 8 * GB, slots=3),
        ModelSpec("b", 10, 1, 20 * GB, slots=loads(CONFIG).models["b"].parallel),
    )
    assert work.budget == 20 * GB
    assert work.parallel_loads == 2
    assert work.policies["a"] == Policy(max_wait=20, linger=0)
    assert len(work.sessions) == 1


def test_a_configuration_knows_all_models(tmp_path):
    """Others are a mistake then, and so are models in the file."""
    frame = configured.frame(loads(CONFIG))
    path = write(tmp_path, {"models": {"a": {}}}, {"model": "aa", "at": 0, "out": 1})

    with pytest.raises(Misuse) as caught:
        records.read(path, frame)

    assert "records.jsonl:1: found models, allowed is either these or a configuration" in caught.value.message
    assert 'records.jsonl:2: model: found "aa", which is not configured, did you mean "a"?' in caught.value.message


def test_one_group_that_swaps_is_one_model_at_a_time():
    """The other rule that the machine can play."""
    text = '[models.a]\ncmd = "server"\nproxy = "http://localhost:1"\n'
    frame = configured.frame(loads(text + '[groups.g]\nmembers = ["a"]\n'))

    assert frame.budget is None


@pytest.mark.parametrize(
    ("rule", "what"),
    [
        ('[groups.g]\nmembers = ["a"]\nswap = false\n', "another rule"),
        ('[memory.devices]\ngpu0 = "1GB"\ngpu1 = "1GB"\n', "another rule"),
        ("", "another rule"),
        ('[memory.devices]\ngpu0 = "auto"\n', 'memory.devices.gpu0: found "auto"'),
    ],
)
def test_rules_that_cannot_be_played_are_refused(rule, what):
    """Better than figures about something else."""
    text = '[models.a]\ncmd = "server"\nproxy = "http://localhost:1"\n'

    with pytest.raises(Misuse, match=what):
        configured.frame(loads(text + rule))


# ---- what is shown ------------------------------------------------------------------------------------


@pytest.fixture
def results():
    """Of two traces that differ by a factor of two in everything."""
    base = measure(replay(workload(asks("a"), asks("b"))))
    half = attrs.evolve(base, **{key: getattr(base, key) / 2 for key in report.METRICS})
    first = {"lease": half, "llama-swap": base, "strict-fifo": base}
    second = {"lease": base, "llama-swap": half, "strict-fifo": attrs.evolve(half, rejected=1)}
    return {"one": first, "two": second}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_is_markdown(results):
    """A head, a rule, and a line for each trace and contender, all of the same width."""
    lines = [*report.heading(), *report.rows("one", results["one"])]

    assert cells(lines[0])[:4] == ["trace", "policy", "swaps", "TTFT mean"]
    assert cells(lines[2]) == ["one", "lease", "1", "8.5", "11.9", "12.0", "14", "3.3", "0.22"]
    assert {line.count("|") for line in lines} == {10}
    assert len({len(line) for line in lines}) == 1


def test_ratios_are_geometric_means(results):
    """Half in one trace and twice in the other come to once; compared with llama-swap and with strict FIFO."""
    lines = report.ratios(results)

    assert [line for line in lines if line.startswith("Geo")] == [
        "Geometric means over the traces, as ratios to llama-swap:",
        "Geometric means over the traces, as ratios to strict-fifo:",
    ]
    assert cells(lines[5]) == ["lease", *["1.00"] * 6]
    assert cells(report.ratios({"one": results["one"]})[5]) == ["lease", *["0.50"] * 6]


def test_nothing_compared_with_nothing_is_once(results):
    """No swaps at all, say, on both sides."""
    none = attrs.evolve(results["one"]["lease"], loads=0)

    assert report.ratio({"lease": none, "llama-swap": none}, "lease", "llama-swap", "loads") == 1


def test_refusals_are_told(results):
    """The figures are about the rest."""
    assert report.refusals(results) == ["strict-fifo refused 1 of 2 requests of two."]


def test_nothing_to_compare_has_no_ratios(results):
    """With one contender the table is all."""
    assert report.ratios({"one": {"lease": results["one"]["lease"]}}) == []


@pytest.mark.parametrize("suffix", plot.SUFFIXES)
def test_the_picture(suffix, results, tmp_path):
    """Each format is written, the same bytes each time, on a white card; one trace alone can be drawn, too."""
    pytest.importorskip("matplotlib", reason="extra simulate")
    pictures = []
    for path in (tmp_path / f"first{suffix}", tmp_path / f"second{suffix}"):
        plot.check(path, ["lease", "llama-swap"])
        plot.draw(results, path)
        pictures.append(path.read_bytes())
    plot.draw({"one": results["one"]}, tmp_path / f"one{suffix}")

    assert pictures[0] == pictures[1]
    if suffix == ".svg":
        text = pictures[0].decode()
        assert all(word in text for word in ("geometric mean", "one", "two", "lease", "strict-fifo", "TTFT p99"))
        assert "fill: #ffffff" in text


@pytest.mark.parametrize(
    ("name", "policies", "what"),
    [
        ("x.pdf", ["lease", "llama-swap"], "allowed is a file that ends in .png or .svg"),
        ("nowhere/x.png", ["lease", "llama-swap"], "there is no directory"),
        ("x.png", ["llama-swap"], "nothing to compare"),
        ("x.png", ["lease"], "nothing to compare"),
    ],
)
def test_a_picture_that_cannot_be_drawn_is_refused_before_the_work(name, policies, what, tmp_path):
    """The replay takes long enough."""
    with pytest.raises(Misuse, match=what):
        plot.check(tmp_path / name, policies)


def test_without_matplotlib_the_picture_says_what_to_install(monkeypatch, tmp_path):
    """The extra is optional."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    with pytest.raises(Misuse, match=r"pip install 'trioswap\[simulate\]'"):
        plot.check(tmp_path / "x.png", ["lease", "llama-swap"])


def test_without_numpy_records_can_be_replayed(monkeypatch, tmp_path):
    """Only the built-in traces need it."""
    monkeypatch.setitem(sys.modules, "numpy", None)
    monkeypatch.delitem(sys.modules, "trioswap.simulation.traces", raising=False)
    monkeypatch.delattr("trioswap.simulation.traces", raising=False)
    path = write(tmp_path, REQUEST)
    [trace] = compare.find([str(path)], 10, 10.0)

    assert compare.run(trace, CONTENDERS, Settings())["lease"].loads == 1
    with pytest.raises(Misuse, match=r"pip install 'trioswap\[simulate\]'"):
        compare.find(["duel"], 10, 10.0)


# ---- the command ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("traces")
async def test_the_command_prints_the_same_whatever_the_hash_seed(tmp_path):
    """Same trace, same table: no decision hangs on the order of a set."""
    path = write(tmp_path, *({"model": name, "at": at, "service": 2} for at, name in enumerate("abcabc")))
    done = [
        await trioswap(
            "simulate", "duel", "rag_budget", str(path), "--seeds", "1", env={**os.environ, "PYTHONHASHSEED": seed}
        )
        for seed in ("1", "2")
    ]

    assert done[0].returncode == 0, done[0].stderr
    assert done[0].stdout == done[1].stdout
    table = [cells(line) for line in done[0].stdout.splitlines() if line.startswith("|")]
    assert [row[:2] for row in table[2:5]] == [["duel", "lease"], ["duel", "llama-swap"], ["duel", "strict-fifo"]]
    assert [row[0] for row in table[8:11]] == [str(path)] * 3


@pytest.mark.usefixtures("traces")
@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["duell"], 'found "duell" as a trace, which is neither a file nor built in, did you mean "duel"?'),
        (["duel", "--policy", "lifo"], 'found "lifo", allowed are lease, llama-swap, strict-fifo'),
        (["duel", "--swap", "nan"], "found nan, allowed is a number from 0 to 3600"),
        (["duel", "--plot", "x.pdf"], "allowed is a file that ends in .png or .svg"),
    ],
)
async def test_the_command_refuses_mistakes(arguments, what):
    """Exit code 2 and a sentence."""
    done = await trioswap("simulate", *arguments)

    assert (done.returncode, done.stdout) == (2, "")
    assert what in done.stderr


@pytest.mark.usefixtures("traces")
async def test_a_configuration_is_for_recorded_traces(tmp_path):
    """Built-in ones have models of their own."""
    (tmp_path / "trioswap.toml").write_text(CONFIG)
    path = write(tmp_path, REQUEST)
    config = str(tmp_path / "trioswap.toml")
    replayed, refused = [await trioswap("simulate", trace, "-c", config) for trace in (str(path), "duel")]

    assert replayed.returncode == 0, replayed.stderr
    assert refused.returncode == 2
    assert "name files of records" in refused.stderr
