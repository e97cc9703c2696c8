"""The same events lead to the same commands, whatever the order of the models and the hash seed."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest

from trioswap.config.matrix import read_matrix
from trioswap.config.mistakes import Mistakes
from trioswap.footprints import Footprints, Wish
from trioswap.messages import Arrived, BecameReady, Ended, Event, Grant, Left, Policy, Start, Stop, Swap, WokeUp
from trioswap.residency import Residency
from trioswap.residency.budget import Budget
from trioswap.residency.matrix import Matrix
from trioswap.scheduler import Scheduler

NEEDS = {"a": 4, "b": 3, "c": 6, "d": 2, "e": 5}


def rule(kind: str, names: str) -> Residency:
    if kind == "budget":
        return Budget({"gpu0": 8, "gpu1": 7}, Footprints(("gpu0", "gpu1"), {n: Wish(declared=NEEDS[n]) for n in names}))
    return Matrix(read_matrix({}, {}, {"s": "a & (b | c) | d & e"}, set(names), Mistakes()))


class Shell:
    """Does what the scheduler says as far as that matters here, and writes it down."""

    def __init__(self, core: Scheduler) -> None:
        self.core = core
        self.said: list[str] = []
        self.served: set[int] = set()
        self.starting: dict[str, int] = {}
        self.stopping: dict[str, int] = {}

    def feed(self, event: Event, now: float) -> None:
        for command in self.core.handle(event, now):
            self.said.append(str(command))
            match command:
                case Grant(ticket):
                    self.served.add(ticket)
                case Start(name, attempt):
                    self.starting[name] = attempt
                case Stop(name, attempt):
                    self.stop(name, attempt)
                case Swap(_, evictions):
                    for eviction in evictions:
                        self.stop(eviction.model, eviction.attempt)

    def stop(self, name: str, attempt: int) -> None:
        self.starting.pop(name, None)
        self.stopping[name] = attempt


def history(kind: str, names: str) -> list[str]:
    """What the scheduler says to 3,000 events that a seed has drawn."""
    rng = random.Random(11)
    shell = Shell(Scheduler(dict.fromkeys(names, Policy(max_wait=20.0, parallel=2)), rule(kind, names)))
    for number in range(3000):
        now = 0.5 * number
        event: Event = WokeUp()
        match rng.randrange(4):
            case 0:
                event = Arrived(number, rng.choice(sorted(names)), rng.choice([None, 0.5, 2.0]))
            case 1 if shell.served:
                event = Left(rng.choice(sorted(shell.served)))
                shell.served.remove(event.ticket)
            case 2 if shell.starting:
                name = rng.choice(sorted(shell.starting))
                event = BecameReady(name, shell.starting.pop(name))
            case 3 if shell.stopping:
                name = rng.choice(sorted(shell.stopping))
                event = Ended(name, shell.stopping.pop(name))
        shell.feed(event, now)
    return shell.said


@pytest.mark.parametrize("kind", ["budget", "matrix"])
def test_the_order_of_the_models_makes_no_difference(kind):
    """In the configuration they may stand in any order."""
    said = history(kind, "abcde")

    assert len(said) > 500
    assert said == history(kind, "ecdba")


def test_the_hash_seed_makes_no_difference():
    """Two processes with other seeds for the order of sets tell the same history."""
    code = "import test_scheduler_determinism as t; print(*t.history('budget', 'abcde'), *t.history('matrix', 'abcde'))"
    told = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True, check=True, text=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip

    assert len(told) == 1
