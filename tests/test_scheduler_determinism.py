"""The same events give the same commands, in whatever order the models were told, and however Python hashes text.

A long random history is played to the scheduler by a shell that draws from a seed and keeps no
sets, so that any difference is one of the scheduler's.
"""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from trioswap.config.matrix import read_matrix
from trioswap.config.mistakes import Mistakes
from trioswap.errors import StartFailed
from trioswap.footprints import Footprints, Wish
from trioswap.learning import Costs
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
    Rules,
    Squeezed,
    Start,
    Stop,
    Swap,
    UnloadAsked,
    WokeUp,
)
from trioswap.outlook import waiting
from trioswap.residency.budget import Budget
from trioswap.residency.matrix import Matrix
from trioswap.scheduler import Scheduler

# Names that hash to other places with every seed, and whose order is not that of their sizes.
MODELS = ("qwen", "gemma", "llama", "phi", "mistral", "embed")
EVENTS = 2000


def policy(name: str) -> Policy:
    """Alike but for what tells models apart."""
    return Policy(max_wait=4.0, parallel=2, ttl=30.0 if name == "phi" else None, priority=len(name) % 2)


def under_a_budget(names: Sequence[str]) -> Scheduler:
    """Two GPUs and memory; equal needs, so that often several choices are equally good."""
    wishes = {name: Wish(declared=3 + (name in ("llama", "gemma"))) for name in names}
    budget = Budget({"gpu0": 8, "gpu1": 8, "ram": 20}, Footprints(("gpu0", "gpu1", "ram"), wishes))
    return Scheduler(
        {name: policy(name) for name in names},
        budget,
        rules=Rules(parallel_loads=2),
        costs={name: Costs() for name in names},
        budget=budget,
    )


def by_a_matrix(names: Sequence[str]) -> Scheduler:
    """Pairs and triples of equal cost."""
    mistakes = Mistakes()
    sets = {"talk": "(qwen | gemma) & (llama | phi) & embed", "more": "mistral & (embed | qwen | phi)"}
    matrix = Matrix(read_matrix({}, {}, sets, names, mistakes))
    assert mistakes.lines() == []
    return Scheduler({name: policy(name) for name in names}, matrix, costs={name: Costs() for name in names})


WORLDS: dict[str, Callable[[Sequence[str]], Scheduler]] = {"budget": under_a_budget, "matrix": by_a_matrix}


class History:
    """What was said and done, from a seed."""

    def __init__(self, core: Scheduler, seed: int) -> None:
        self.core, self.rng = core, random.Random(seed)
        self.now, self.ticket = 0.0, 0
        self.lines: list[str] = []
        self.kinds: Counter[str] = Counter()
        self.alive: dict[int, None] = {}
        """Tickets that wait or are served."""
        self.runs: dict[str, tuple[int, str]] = {}
        """model -> attempt, and what it is at: loading, ready or stopping."""
        for _ in range(EVENTS):
            self.step()

    def step(self) -> None:
        self.now += self.rng.choice([0.0, 0.1, self.rng.uniform(0, 2)])
        event = self.some_event()
        commands = self.core.handle(event, self.now)
        self.lines += [f"{self.now!r} {event!r}", *map(said, commands), repr(self.core.wake_at)]
        self.lines += map(repr, waiting(self.core.models, self.core.plan, self.core.residency, self.now))
        self.kinds.update(type(command).__name__ for command in commands)
        for command in commands:
            self.obey(command)

    def some_event(self) -> Event:
        draw = self.rng.random()
        if draw < 0.3 and len(self.alive) < 12:
            self.ticket += 1
            self.alive[self.ticket] = None
            return Arrived(self.ticket, self.rng.choice(MODELS), self.rng.choice([None, 0.5, 1.0, 2.0]))
        if draw < 0.55 and self.alive:
            ticket = self.rng.choice(list(self.alive))
            del self.alive[ticket]
            return Left(ticket)
        if draw < 0.9 and self.runs:
            return self.some_news(*self.rng.choice([(name, *run) for name, run in self.runs.items()]))
        if draw < 0.92:
            return UnloadAsked((self.rng.choice(MODELS),))
        if draw < 0.93:
            return Squeezed({"gpu0": self.rng.randint(4, 8), "gpu1": 8, "ram": 20})
        return WokeUp()

    def some_news(self, name: str, attempt: int, stage: str) -> Event:
        draw = self.rng.random()
        if stage == "stopping" or draw < 0.03:
            del self.runs[name]
            return Ended(name, attempt, StartFailed(name, "broken", out_of_memory=True) if draw < 0.02 else None)
        if stage == "loading":
            self.runs[name] = attempt, "ready"
            return BecameReady(name, attempt)
        if draw < 0.06:
            self.runs[name] = attempt, "stopping"
            return self.rng.choice([Died, GotStuck])(name, attempt)
        return Measured(name, attempt, {"gpu1": self.rng.randint(1, 4)}) if draw < 0.3 else Drained(name, attempt)

    def obey(self, command: Command) -> None:
        match command:
            case Start(name, attempt):
                self.runs[name] = attempt, "loading"
            case Stop(name, attempt):
                self.runs[name] = attempt, "stopping"
            case Swap(_, evictions):
                for eviction in evictions:
                    self.runs[eviction.model] = eviction.attempt, "stopping"
            case Reject(ticket):
                del self.alive[ticket]


def said(command: Command) -> str:
    """*command* without the address of an error."""
    return f"Reject {command.ticket} {command.error}" if isinstance(command, Reject) else repr(command)


def digest(seed: int) -> str:
    """All that is said in both worlds, as one number."""
    lines = [line for make in WORLDS.values() for line in History(make(MODELS), seed).lines]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@pytest.mark.parametrize("world", WORLDS)
def test_the_order_in_which_models_are_told_does_not_matter(world):
    """Forwards, backwards and shuffled: the same commands, the same times to wake, the same estimates."""
    make = WORLDS[world]
    first = History(make(MODELS), seed=1)
    for names in (sorted(MODELS), MODELS[::-1], ("phi", "embed", "qwen", "mistral", "llama", "gemma")):
        assert History(make(names), seed=1).lines == first.lines


@pytest.mark.parametrize("world", WORLDS)
def test_the_history_is_one_in_which_much_happens(world):
    """Every command is given many times, and another seed makes another history."""
    one, other = (History(WORLDS[world](MODELS), seed) for seed in (1, 2))

    for kind in (Grant, Reject, CloseGate, OpenGate, Swap, Start, Stop):
        assert one.kinds[kind.__name__] >= 10, kind
    assert one.lines != other.lines


def test_how_text_is_hashed_does_not_matter():
    """Two interpreters that put names into sets in another order say the same."""
    digests = [run_with_hash_seed(seed) for seed in ("1", "2")]

    assert digests == [digest(1)] * 2


def run_with_hash_seed(seed: str) -> str:
    path = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, str(Path(__file__))],
        env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return done.stdout.strip()


if __name__ == "__main__":
    print(digest(1))
