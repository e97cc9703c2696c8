"""What the default policy is worth beside llama-swap's, with real daemons, real servers and real clients.

Two traces of the simulation, `duel` and `agents`, are played SCALE times as fast: users in
closed loops ask, wait for the answer, pause and ask again.  A request takes the same time
wherever it is served: what the machine of the simulation needs for it alone, on a server
that knows the session.  What a swap costs a cache, and requests each other, is left out;
with it the gap between the policies would be wider.

One daemon for each policy and seed, all of a trace at the same time, so that whatever else
the machine does hits all of them.  Beside each figure stands what the simulation says of
the same demand.

    wait    from sending a request to the first byte of its answer, less the time the answer takes

Run it with `nox -s bench`.  It judges nothing but that every request gets its own answer.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial

import attrs
from common import PATIENCE, Address, Daemon, ask, daemon, model

from trioswap.messages import Policy
from trioswap.simulation.contenders import CONTENDERS, Settings
from trioswap.simulation.figures import measure
from trioswap.simulation.machine import Machine
from trioswap.simulation.traces import build
from trioswap.simulation.workload import Session, Step, Workload

TRACES = ("duel", "agents")
SEEDS = range(3)
SWAP = 10.0  # seconds that a load takes in the traces
SCALE = 20
LIMIT = 170.0  # seconds for all traces; they take about 120
# What the configuration calls a policy -> what the simulation does.
POLICIES = {"lease": "lease", "fifo": "llama-swap"}


@attrs.frozen
class Outcome:
    """What a run comes to; times are seconds."""

    swaps: float
    mean_wait: float
    longest_wait: float
    makespan: float


@attrs.frozen
class Turn:
    """One request that was answered."""

    sent: float
    done: float
    service: float

    @property
    def wait(self) -> float:
        return self.done - self.sent - self.service


# ---- the demand ----------------------------------------------------------------------------


def scaled(workload: Workload) -> Workload:
    """*workload* in small: SCALE times as fast, and each request takes a fixed time."""
    specs = {spec.name: spec for spec in workload.models}

    def step(big: Step) -> Step:
        service = sum(big.work(specs[big.model], warm=True)) / SCALE
        return attrs.evolve(big, think=big.think / SCALE, service=service)

    return attrs.evolve(
        workload,
        models=tuple(attrs.evolve(spec, load=spec.load / SCALE, stop=spec.stop / SCALE) for spec in workload.models),
        sessions=tuple(
            attrs.evolve(who, start=who.start / SCALE, steps=tuple(map(step, who.steps))) for who in workload.sessions
        ),
        policies={name: Policy(max_wait=Policy().max_wait / SCALE) for name in specs},
        jitter={},
    )


# ---- simulated -----------------------------------------------------------------------------


def simulated(workload: Workload, policy: str) -> Outcome:
    """What the simulation makes of it."""
    machine = Machine(workload, CONTENDERS[POLICIES[policy]](workload, Settings()))
    machine.run()
    figures = measure(machine)
    return Outcome(figures.loads, figures.mean_wait, figures.longest_wait, figures.makespan)


# ---- real ----------------------------------------------------------------------------------


def servers(workload: Workload) -> dict[str, dict[str, object]]:
    """The models of *workload* for a configuration."""
    return {
        spec.name: model(
            spec.name,
            *("--ready-delay", spec.load, "--stop-delay", spec.stop),
            parallel=spec.slots,
            max_wait=workload.policies[spec.name].max_wait,
        )
        for spec in workload.models
    }


def user(session: Session, address: Address, begun: float, deadline: float) -> list[Turn]:
    """Ask for each step when the one before has been answered.

    Raises:
        AssertionError: there was no time for all of them.
    """
    turns, at = [], begun + session.start
    for step in session.steps:
        assert step.service is not None
        at += step.think
        time.sleep(max(0.0, at - time.monotonic()))  # noqa: TID251 - no event loop here
        sent = time.monotonic()
        assert sent < deadline, f"the traces take longer than {LIMIT:g} s"
        at, _ = ask(address, step.model, patience=min(PATIENCE, deadline - sent), answer_delay=step.service)
        turns.append(Turn(sent, at, step.service))
    return turns


def swaps(served: Daemon) -> int:
    """How many servers have been started."""
    return served.log.read_text().count(" start model=")


def outcome(served: Daemon, workload: Workload, begun: float, turns: Sequence[Turn]) -> Outcome:
    """The figures of a run."""
    assert len(turns) == sum(len(session.steps) for session in workload.sessions), "requests were lost"
    waits = [turn.wait for turn in turns]
    makespan = max(turn.done for turn in turns) - begun - min(who.start for who in workload.sessions)
    return Outcome(swaps(served), sum(waits) / len(waits), max(waits), makespan)


def real(workloads: Sequence[Workload], deadline: float) -> dict[str, list[Outcome]]:
    """What daemons make of *workloads*, under each policy, all at the same time."""
    runs = [(policy, workload) for workload in workloads for policy in POLICIES]
    with ExitStack() as stack:
        daemons = [
            stack.enter_context(daemon(servers(workload), log_level="info", policy=policy)) for policy, workload in runs
        ]
        users = stack.enter_context(ThreadPoolExecutor(sum(len(workload.sessions) for _, workload in runs)))
        begun = time.monotonic()
        asked = [
            users.map(partial(user, address=served.address, begun=begun, deadline=deadline), workload.sessions)
            for served, (_, workload) in zip(daemons, runs, strict=True)
        ]
        outcomes = {policy: list[Outcome]() for policy in POLICIES}
        for served, (policy, workload), sessions in zip(daemons, runs, asked, strict=True):
            turns = [turn for session in sessions for turn in session]
            outcomes[policy].append(outcome(served, workload, begun, turns))
    return outcomes


# ---- side by side --------------------------------------------------------------------------


def mean(outcomes: Sequence[Outcome]) -> Outcome:
    """The mean of each figure."""
    return Outcome(*(sum(column) / len(outcomes) for column in zip(*map(attrs.astuple, outcomes), strict=True)))


def ratio(one: Outcome, other: Outcome) -> Outcome:
    """How many times the figures of *other* those of *one* are."""
    return Outcome(*(a / b for a, b in zip(attrs.astuple(one), attrs.astuple(other), strict=True)))


def row(label: str, source: str, outcome: Outcome, digits: tuple[int, int, int, int]) -> str:
    """A line of the table."""
    figures = zip(attrs.astuple(outcome), digits, strict=True)
    return f"  {label:12} {source:10}" + "".join(f"{figure:14.{digit}f}" for figure, digit in figures)


def table(by_source: Mapping[str, Mapping[str, Outcome]]) -> list[str]:
    """The figures of one trace; *by_source* has source -> policy -> its means."""
    heads = ("swaps", "mean wait", "longest wait", "makespan")
    lines = [f"  {'policy':12} {'':10}" + "".join(f"{head:>14}" for head in heads)]
    for policy in POLICIES:
        lines += [row(policy, source, of_policy[policy], (1, 3, 2, 1)) for source, of_policy in by_source.items()]
    for source, of_policy in by_source.items():
        lines.append(row("lease : fifo", source, ratio(of_policy["lease"], of_policy["fifo"]), (2, 2, 2, 2)))
    return lines


def main() -> int:
    """Play, print."""
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr] # each table when it is there
    deadline = time.monotonic() + LIMIT
    print(f"Means of {len(SEEDS)} seeds; seconds.  Everything {SCALE} times as fast: loads of {SWAP / SCALE:g} s.")
    for trace in TRACES:
        workloads = [scaled(build(trace, seed, SWAP)) for seed in SEEDS]
        played = real(workloads, deadline)
        told = {policy: [simulated(workload, policy) for workload in workloads] for policy in POLICIES}
        requests = sum(len(session.steps) for workload in workloads for session in workload.sessions)
        print(f"{trace}: {requests} requests with each policy, none lost")
        by_source = {"real": played, "simulated": told}
        means = {s: {policy: mean(runs) for policy, runs in of.items()} for s, of in by_source.items()}
        print("\n".join(table(means)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
