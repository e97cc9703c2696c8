"""All swap groups together: every model of the configuration, found by name."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager

import trio

from trioswap.config import Config, ModelConfig
from trioswap.errors import ModelStuck
from trioswap.group import Lease, SwapGroup
from trioswap.messages import ModelView
from trioswap.process import Supervised
from trioswap.residency import Groups, swap_domains

Supervise = Callable[[ModelConfig, int], Supervised]


class Fleet:
    """The models of one configuration, each in the swap group of those it can collide with."""

    def __init__(self, config: Config, supervise: Supervise) -> None:
        policy = Groups(config.groups)
        attempts = itertools.count(1)  # one sequence for all: an attempt number names one process for ever
        self.groups = [
            SwapGroup({name: config.models[name] for name in sorted(domain)}, policy, supervise, attempts)
            for domain in swap_domains(config.models, policy)
        ]
        self._ended = trio.Event()
        self._group_of = {name: group for group in self.groups for name in group.models}

    def __repr__(self) -> str:
        """The groups as they stand."""
        return f"<Fleet {self.groups!r}>"

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own every model server; return after `shutdown()` when all process trees are gone."""
        async with trio.open_nursery() as nursery:
            for group in self.groups:
                await nursery.start(group.run)
            task_status.started()
        self._ended.set()

    async def wait_ended(self) -> None:
        """Return when `run` has: after `shutdown()` every process tree is gone."""
        await self._ended.wait()

    def lease(self, model: str) -> AbstractAsyncContextManager[Lease]:
        """Hold *model* up and serving for the length of the block; see `SwapGroup.lease`."""
        return self._group_of[model].lease(model)

    async def unload(self, models: Iterable[str]) -> None:
        """Drain (bounded) and stop *models*; return when they are gone.

        Raises:
            ModelStuck: a process survived SIGKILL.
        """
        wanted, failures = frozenset(models), list[ModelStuck]()

        async def unload(group: SwapGroup) -> None:
            try:
                await group.unload(tuple(sorted(wanted.intersection(group.models))))
            except ModelStuck as exc:  # expected: carried out as a value
                failures.append(exc)

        async with trio.open_nursery() as nursery:
            for group in self.groups:
                nursery.start_soon(unload, group)
        if failures:
            raise failures[0]

    def shutdown(self) -> None:
        """Take no new work, reject what waits, drain (bounded) and stop everything."""
        for group in self.groups:
            group.shutdown()

    def hasten(self, why: str) -> None:
        """Cut everything that is being served."""
        for group in self.groups:
            group.hasten(why)

    def views(self) -> list[ModelView]:
        """Every model as it stands, sorted by name."""
        return sorted((view for group in self.groups for view in group.views()), key=lambda view: view.name)
