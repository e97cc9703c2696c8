"""How many requests are let in: for each model, for each key, and how many may wait.

A request is let in with `admit`, waiting or served; while it waits for its model it is in
`queue`, too.  Both are blocks that give back what they took however they end, and nothing
in them awaits, so between a look at a count and its change nobody comes in.

Whether a request has to wait is for the scheduler to say, and so is how long it will.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import attrs

from trioswap.access import Key
from trioswap.config import Config
from trioswap.errors import QueueFull, TooManyRequests

RetryAfter = int | Callable[[], int]
"""Seconds after which it pays to try again, or who estimates them, asked only when they are told."""


@attrs.define(eq=False)
class Quotas:
    """Counts who is in, and lets no more in than the configuration allows."""

    config: Config
    """Another one may take its place: who is in stays in and counted, and further ones are judged by it."""
    _of_models: Counter[str] = attrs.field(factory=Counter, init=False)
    _of_keys: Counter[str] = attrs.field(factory=Counter, init=False)
    _waiting: int = attrs.field(default=0, init=False)

    @contextmanager
    def admit(self, model: str, key: Key, retry_after: RetryAfter, *, was_in: bool = False) -> Iterator[None]:
        """Count a request to *model*, by its real name, of who shows *key*, while the block runs.

        A model that is not of ours has no limit.  What *was_in* until now, for another one, stays in.

        Raises:
            TooManyRequests: there are as many for this model, or by this key, as may be.
        """
        # The key first: to hear that somebody else fills the model helps nobody who may not send more anyway.
        if not was_in:
            _check(f'the key "{key.name}"', self._of_keys[key.name], key.concurrency, retry_after)
            _check(f'model "{model}"', self._of_models[model], self._limit(model), retry_after)
        self._of_models[model] += 1
        self._of_keys[key.name] += 1
        try:
            yield
        finally:
            _subtract(self._of_models, model)
            _subtract(self._of_keys, key.name)

    @contextmanager
    def queue(self, retry_after: RetryAfter, *, was_in: bool = False) -> Iterator[None]:
        """Count a request as waiting while the block runs; what *was_in* until now stays in.

        Raises:
            QueueFull: as many wait as may, for all models together.
        """
        if not was_in and self._waiting >= self.config.max_queue:
            raise QueueFull(self.config.max_queue, _seconds(retry_after))
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return self._waiting

    def of_model(self, model: str) -> int:
        """How many requests for *model* are in."""
        return self._of_models[model]

    def of_key(self, name: str) -> int:
        """How many requests of the key called *name* are in."""
        return self._of_keys[name]

    def _limit(self, model: str) -> int | None:
        known = self.config.models.get(model)
        return None if known is None else known.concurrency_limit


def _check(whose: str, count: int, limit: int | None, retry_after: RetryAfter) -> None:
    if limit is not None and count >= limit:
        raise TooManyRequests(whose, limit, _seconds(retry_after))


def _seconds(retry_after: RetryAfter) -> int:
    return retry_after if isinstance(retry_after, int) else retry_after()


def _subtract(counts: Counter[str], name: str) -> None:
    counts[name] -= 1
    if not counts[name]:
        del counts[name]  # names of peers' models and of keys come and go
