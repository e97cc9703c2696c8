"""What is asked of the machine: models, and sessions of requests for them.

All of it is fixed before anything runs, so every scheduler meets the same demand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs

from trioswap.messages import Policy, Rules


@attrs.frozen
class ModelSpec:
    """A model server as the machine plays it."""

    name: str
    load: float
    """Seconds from start to ready, when nothing else loads."""
    stop: float
    """Seconds from being told to end until its memory is back."""
    memory: int = 0
    """Bytes."""
    slots: int = 4
    """Requests it works on at the same time; the others queue inside it."""
    prefill: float = 1500.0
    """Prompt tokens per second of a request that runs alone."""
    decode: float = 40.0
    """Generated tokens per second of a request that runs alone."""
    penalty: float = 0.25
    """Each further request in a batch makes all of them slower by this share."""


@attrs.frozen
class Step:
    """One request of a session."""

    model: str
    prompt: int = 0
    """Tokens of the whole prompt."""
    new: int = 0
    """Of them, those that are not in the server's cache when it still knows the session."""
    out: int = 0
    """Tokens generated."""
    think: float = 0.0
    """Seconds since the end of the step before; for the first step, since the start of the session."""
    service: float | None = None
    """Seconds it was seen to take; then it takes just these, and the tokens only say when the first one comes."""

    def work(self, spec: ModelSpec, *, warm: bool) -> tuple[float, float]:
        """Seconds until the first token, and from there to the last, when it runs alone."""
        tokens = self.new if warm else self.prompt
        prefill, decode = tokens / spec.prefill, self.out / spec.decode
        if self.service is None:
            return prefill, decode
        share = prefill / (prefill + decode) if prefill else 0.0
        return self.service * share, self.service * (1 - share)


@attrs.frozen
class Session:
    """One user's requests, each sent when the one before has been answered."""

    user: str
    start: float
    """Seconds."""
    steps: tuple[Step, ...]
    weight: float = 1.0
    """How fast the waiting of its requests counts, where weights count at all."""


@attrs.frozen
class Workload:
    """Models, the rule about living together, and who asks for what."""

    name: str
    models: tuple[ModelSpec, ...]
    sessions: tuple[Session, ...]
    budget: int | None = None
    """Bytes that the resident models share; None: one model at a time."""
    policies: Mapping[str, Policy] = attrs.field(factory=dict)
    """What a configuration says about scheduling; not named: the defaults."""
    parallel_loads: float = Rules().parallel_loads
    jitter: Mapping[str, Sequence[float]] = attrs.field(factory=dict)
    """By how much the successive loads of a model take longer than `load`, over and over; not named: just `load`."""

    def fits(self, models: frozenset[str]) -> bool:
        """Whether *models* may be resident together."""
        if self.budget is None:
            return len(models) <= 1
        return sum(spec.memory for spec in self.models if spec.name in models) <= self.budget
