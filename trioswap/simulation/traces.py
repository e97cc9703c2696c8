"""The built-in workloads, made from a seed and the seconds that a swap takes.

Request sizes, pauses and arrivals are drawn here, all before the replay begins.  The
order of the draws is part of each trace: to change it is to change the figures that the
documentation quotes.  The only module of the simulation that needs numpy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from trioswap.simulation.workload import ModelSpec, Session, Step, Workload

GB: Final = 10**9
# Loads are noisy by this much (sigma of a log-normal factor), so that no two of them take the same.
_JITTER: Final = 0.1
_LOADS: Final = 4096  # factors drawn for each model; more loads than any trace needs

Rng = np.random.Generator
Parts = tuple[list[ModelSpec], list[Session]]


def build(name: str, seed: int, swap: float) -> Workload:
    """The trace *name* where loading a middling model takes *swap* seconds.

    Raises:
        KeyError: there is no such trace.
    """
    make, number = TRACES[name]
    models, sessions = make(np.random.default_rng([seed, number]), swap)
    noise = np.random.default_rng(seed + 7919)
    names = sorted(spec.name for spec in models)
    factors = {model: np.exp(noise.normal(0, _JITTER, _LOADS)).tolist() for model in names}
    return Workload(name, tuple(models), tuple(sessions), 24 * GB if name.endswith("_budget") else None, jitter=factors)


def _seconds(rng: Rng, median: float, sigma: float, most: float = 1e9) -> float:
    return float(min(rng.lognormal(np.log(median), sigma), most))


def _tokens(rng: Rng, median: float, sigma: float = 0.6) -> int:
    return int(min(max(rng.lognormal(np.log(median), sigma), 8), 4000))


def _stop(swap: float) -> float:
    """Memory is back a moment after the end is asked for."""
    return 0.3 + 0.05 * swap


def _chain(
    rng: Rng,
    model: str,
    length: int,
    *,
    prompt: int,
    grows: int,
    new: int,
    out: float,
    think: float,
    sigma: float,
    most: float,
) -> tuple[Step, ...]:
    """A closed loop on one model: *length* requests whose prompt *grows* from one to the next."""
    return tuple(
        Step(model, prompt + grows * i, new, _tokens(rng, out), _seconds(rng, think, sigma, most))
        for i in range(length)
    )


def _agents(rng: Rng, swap: float) -> Parts:
    """Two coding agents: in each round one planner call, then 2 to 6 coder calls with short tool pauses."""
    models = [
        ModelSpec("planner", swap, _stop(swap), decode=30.0),
        ModelSpec("coder", 0.8 * swap, _stop(swap), decode=60.0),
    ]
    sessions = []
    for user in range(2):
        steps, prompt = [], 3000
        for _ in range(12):
            steps.append(Step("planner", prompt, 600, _tokens(rng, 350), _seconds(rng, 0.4, 0.5)))
            for _ in range(int(rng.integers(2, 7))):
                steps.append(Step("coder", prompt, 500, _tokens(rng, 250), _seconds(rng, 1.2, 0.8, 20)))
                prompt += 350
        sessions.append(Session(f"agent{user}", float(rng.uniform(0, 20)), tuple(steps)))
    return models, sessions


def _alternate(rng: Rng, swap: float) -> Parts:
    """One agent, strictly planner, coder, planner, coder: every call needs a swap, and to hold a model never helps."""
    models = [ModelSpec("planner", swap, _stop(swap), decode=30.0), ModelSpec("coder", swap, _stop(swap), decode=60.0)]
    steps = tuple(
        Step(("planner", "coder")[i % 2], 3000 + 300 * i, 500, _tokens(rng, 300), _seconds(rng, 0.5, 0.5))
        for i in range(40)
    )
    return models, [Session("agent", 0.0, steps)]


def _fanout(rng: Rng, swap: float) -> Parts:
    """An orchestrator, two explorers and a coder at work at the same time on three models, each in a closed loop."""
    models = [
        ModelSpec("orch", 1.2 * swap, _stop(swap), decode=30.0),
        ModelSpec("expl", 0.5 * swap, _stop(swap), decode=80.0),
        ModelSpec("code", swap, _stop(swap), decode=50.0),
    ]
    work = [("orch", 10, 6.0, 300), ("expl", 20, 1.0, 150), ("expl", 20, 1.0, 150), ("code", 20, 2.0, 250)]
    sessions = []
    for user, (model, length, think, out) in enumerate(work):
        steps = _chain(rng, model, length, prompt=2500, grows=300, new=500, out=out, think=think, sigma=0.7, most=40)
        sessions.append(Session(f"{model}{user}", float(rng.uniform(0, 3)), steps))
    return models, sessions


def _rag(rng: Rng, swap: float) -> Parts:
    """Three chat users, each turn an embedding and then a chat call, and a job of 400 embeddings, four at a time."""
    models = [
        ModelSpec("chat", swap, _stop(swap), decode=45.0),
        ModelSpec("embed", 0.25 * swap, _stop(swap) / 2, slots=8, prefill=6000.0, decode=1e9),
    ]
    sessions = []
    for user in range(3):
        steps = []
        for turn in range(12):
            steps.append(Step("embed", 60, 60, 0, _seconds(rng, 25, 0.5, 120) if turn else 0.0))
            steps.append(Step("chat", 1500 + 500 * turn, 900, _tokens(rng, 220), 0.05))
        sessions.append(Session(f"chat{user}", float(rng.uniform(0, 40)), tuple(steps)))
    job = (Step("embed", 800, 800, 0, 0.02),) * 100
    return models, sessions + [Session("index", 60.0 + 0.01 * lane, job, weight=0.25) for lane in range(4)]


def _zipf(rng: Rng, swap: float) -> Parts:
    """Ten models, one at a time, Zipf popularity, bursts of open arrivals."""
    loads = [1.0, 0.6, 1.5, 0.4, 1.0, 0.8, 2.0, 0.5, 1.0, 0.7]
    models = [ModelSpec(f"m{i}", swap * load, _stop(swap), decode=50.0) for i, load in enumerate(loads)]
    return models, _bursts(rng, [spec.name for spec in models], count=300, rate=1 / 35.0)


def _bursts(rng: Rng, names: list[str], *, count: int, rate: float) -> list[Session]:
    """*count* requests of 12 users in bursts for one model each, *rate* bursts per second on average."""
    popularity = 1.0 / np.arange(1, len(names) + 1) ** 1.1
    popularity /= popularity.sum()
    now, sessions = 0.0, list[Session]()
    while len(sessions) < count:
        now += rng.exponential(1.0 / rate)
        model = names[int(rng.choice(len(names), p=popularity))]
        user = f"user{int(rng.integers(0, 12))}"
        at = now
        for _ in range(int(rng.geometric(0.4))):
            prompt = _tokens(rng, 900, 0.8)
            sessions.append(Session(user, at, (Step(model, prompt, prompt, _tokens(rng, 150)),)))
            at += rng.exponential(2.0)
    return sessions[:count]


def _duel(rng: Rng, swap: float) -> Parts:
    """Two users, each hammering a model of their own in a closed loop with short pauses."""
    models = [ModelSpec("A", swap, _stop(swap), decode=45.0), ModelSpec("B", swap, _stop(swap), decode=45.0)]
    sessions = []
    for user, model in enumerate("AB"):
        steps = _chain(rng, model, 40, prompt=1500, grows=120, new=300, out=140, think=0.6, sigma=0.6, most=6)
        sessions.append(Session(f"u{model}", 0.2 * user, steps))
    return models, sessions


def _batch(rng: Rng, swap: float) -> Parts:
    """A batch of 160 requests, all at once, on A, against a person who chats with B."""
    models = [ModelSpec("A", swap, _stop(swap), decode=50.0), ModelSpec("B", swap, _stop(swap), decode=50.0)]
    sessions = [Session("batch", 0.0, (Step("A", 700, 700, _tokens(rng, 260)),), weight=0.25) for _ in range(160)]
    steps = _chain(rng, "B", 12, prompt=800, grows=350, new=200, out=150, think=25, sigma=0.5, most=90)
    return models, [*sessions, Session("person", 15.0, steps)]


def _starve(rng: Rng, swap: float) -> Parts:
    """Three agents keep A hardly ever idle, yet far from full; B gets a lone request now and then."""
    models = [ModelSpec("A", swap, _stop(swap), decode=40.0), ModelSpec("B", swap, _stop(swap), decode=50.0)]
    sessions = []
    for user in range(3):
        steps = _chain(rng, "A", 45, prompt=2000, grows=150, new=400, out=300, think=0.8, sigma=0.6, most=8)
        sessions.append(Session(f"agent{user}", float(rng.uniform(0, 5)), steps))
    at = 20.0
    for _ in range(5):
        sessions.append(Session("rare", at, (Step("B", 700, 700, _tokens(rng, 150)),)))
        at += float(rng.uniform(40, 160))
    return models, sessions


def _office(rng: Rng, swap: float) -> Parts:
    """Eight people, three models, closed loops with human pauses; moderate load."""
    models = [
        ModelSpec(name, swap * load, _stop(swap), decode=45.0)
        for name, load in (("big", 1.5), ("mid", 1.0), ("code", 0.8))
    ]
    sessions = []
    for user, model in enumerate(["big", "mid", "code", "mid", "code", "big", "mid", "code"]):
        # Completions of code are short and quick.
        new, out, think, sigma, most = (250, 60, 4, 0.9, 60) if model == "code" else (300, 200, 20, 0.7, 120)
        steps = _chain(rng, model, 14, prompt=1000, grows=200, new=new, out=out, think=think, sigma=sigma, most=most)
        sessions.append(Session(f"p{user}", float(rng.uniform(0, 60)), steps))
    return models, sessions


def _zipf_budget(rng: Rng, swap: float) -> Parts:
    """Ten models of 2 to 20 GB in 24 GB; loading goes with the size and with the engine, some three times slower."""
    sizes = [8, 5, 14, 3, 8, 6, 20, 4, 8, 2]
    engines = [1, 2.5, 0.7, 1, 0.5, 3, 0.7, 1, 2, 3]
    models = [
        ModelSpec(f"m{i}", swap * engine * size / 10, _stop(swap), memory=size * GB, decode=400 / size**0.8)
        for i, (size, engine) in enumerate(zip(sizes, engines, strict=True))
    ]
    return models, _bursts(rng, [spec.name for spec in models], count=400, rate=1 / 20.0)


def _rag_budget(rng: Rng, swap: float) -> Parts:
    """Five people: embedding, reranking, now and then vision, then one of two chat models; 32.5 GB in 24 GB."""
    models = [
        ModelSpec("chat", swap, _stop(swap), memory=14 * GB, decode=40.0),
        ModelSpec("small", 0.6 * swap, _stop(swap), memory=9 * GB, decode=70.0),
        ModelSpec("vision", 0.5 * swap, _stop(swap), memory=7 * GB, decode=60.0),
        ModelSpec("embed", 0.15 * swap, 0.3, memory=GB, slots=8, prefill=8000.0, decode=1e9),
        ModelSpec("rerank", 0.2 * swap, 0.3, memory=3 * GB // 2, slots=8, prefill=6000.0, decode=1e9),
    ]
    sessions = []
    for user in range(5):
        steps = []
        for turn in range(10):
            steps.append(Step("embed", 60, 60, 0, _seconds(rng, 30, 0.6, 150) if turn else 0.0))
            steps.append(Step("rerank", 2500, 2500, 0, 0.02))
            if user in (1, 4) and rng.random() < 0.4:
                steps.append(Step("vision", 1200, 1200, _tokens(rng, 90), 0.05))
            steps.append(Step("chat" if user < 3 else "small", 1200 + 450 * turn, 900, _tokens(rng, 220), 0.05))
        sessions.append(Session(f"user{user}", float(rng.uniform(0, 60)), tuple(steps)))
    return models, sessions


TRACES: Final[dict[str, tuple[Callable[[Rng, float], Parts], int]]] = {
    "agents": (_agents, 1),
    "alternate": (_alternate, 2),
    "fanout": (_fanout, 11),
    "rag": (_rag, 3),
    "zipf": (_zipf, 4),
    "duel": (_duel, 7),
    "batch": (_batch, 8),
    "starve": (_starve, 9),
    "office": (_office, 10),
    "zipf_budget": (_zipf_budget, 5),
    "rag_budget": (_rag_budget, 6),
}
"""By name: how it is made, and its number, which keeps the draws of two traces of one seed apart."""
