"""How long what is under way may take, as the configuration has it by now.

A reload may change the limit of something that has begun.  Then its deadline moves, and one that
is in the past by then has passed.  Which limit there is for what, and what follows when it is
over, is for others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import attrs
import trio

from trioswap.config import ModelConfig

Key = Literal[
    "health_check_timeout", "hook_timeout", "liveness", "unload_timeout", "drain_timeout", "unload_drain_timeout"
]
"""Fields of a model's configuration in seconds, called like their keys; None: without a limit."""


@attrs.define(eq=False)
class Limit:
    """So many seconds, counted from when it began."""

    key: Key
    begun: float
    seconds: float
    """As they were configured last; once they are over, as they were applied."""

    def __str__(self) -> str:
        """For people, with the key that they can change."""
        return f"{self.seconds:g} s ({self.key})"

    @property
    def deadline(self) -> float:
        """When they are over, if nothing changes."""
        return self.begun + self.seconds


@attrs.define(eq=False)
class Limits:
    """The limits of one attempt at a model that is configured as *spec* says."""

    spec: ModelConfig
    _kept: dict[Limit, trio.CancelScope] = attrs.field(factory=dict, init=False)

    def begin(self, key: Key) -> Limit:
        """The limit *key*, which counts from now on."""
        return Limit(key, trio.current_time(), self._seconds(key))

    @contextmanager
    def keep(self, limit: Limit) -> Iterator[trio.CancelScope]:
        """Cut the block at the end of *limit*, wherever that has moved by then; the scope tells whether it was."""
        with trio.CancelScope() as scope:
            self._kept[limit] = scope
            self._move(limit, scope)
            try:
                yield scope
            finally:
                del self._kept[limit]

    async def sleep(self, key: Key) -> None:
        """Sleep for as long as *key* says by then."""
        with self.keep(self.begin(key)):
            await trio.sleep_forever()

    def follow(self, spec: ModelConfig) -> None:
        """From now on *spec* counts, for what is under way as well."""
        self.spec = spec
        for limit, scope in self._kept.items():
            self._move(limit, scope)

    def _move(self, limit: Limit, scope: trio.CancelScope) -> None:
        if not scope.cancel_called:  # else it has been applied, and is told as it was
            limit.seconds = self._seconds(limit.key)
            scope.deadline = limit.deadline

    def _seconds(self, key: Key) -> float:
        seconds: float | None = getattr(self.spec, key)
        return math.inf if seconds is None else seconds
