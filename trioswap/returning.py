"""Brings models back that others have put out, once these are not asked for any more (`[hooks.on_idle]`).

Who comes back, and when, is decided by `comeback`; who has to go for that, by the scheduler as
always.  A load that comes back is nobody's request, so it must never be in anybody's way:

* It begins only if the plan of this instant lets it begin, at the expense of nobody but idle models.
  So it never stands in the line of those who really want something, except for the moment in which
  its victims end; there it has next to no weight, and leaves when somebody comes.
* As soon as its server is being started nobody waits for that any more, and the scheduler puts out a
  load that nobody waits for at once when its room is needed.
"""

from __future__ import annotations

import logging
import math
from contextlib import AsyncExitStack
from typing import Final

import attrs
import trio

from trioswap.comeback import LIGHT, Defaults, Look, Seen, in_order, room_at, way_back
from trioswap.config import Config
from trioswap.errors import TrioswapError
from trioswap.fleet import Fleet
from trioswap.group import SwapGroup
from trioswap.journal import Entry
from trioswap.lifecycle import State
from trioswap.turns import Model

logger = logging.getLogger(__name__)

# Seconds between two looks, however much happens: whoever has been away for minutes can wait so long.
PACE: Final = 0.1


@attrs.define(eq=False)
class _Asking:
    """The moment in which a default model waits for its victims to end."""

    name: str
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)


class Returner:
    """Brings the default models of a fleet back, one after the other."""

    def __init__(self, fleet: Fleet, config: Config) -> None:
        self.fleet = fleet
        self.defaults = Defaults()
        self._asking: _Asking | None = None
        self._loading: set[str] = set()  # what comes back and is not ready yet
        self._read: dict[SwapGroup, Entry] = {}  # the last entry of each journal that was read
        self._changed = trio.Event()
        self._sleep = trio.CancelScope()
        self.renew(config)

    def __repr__(self) -> str:
        """Who comes back, and who stays away."""
        return f"<Returner {self.defaults.names} away {sorted(self.defaults.away)}>"

    def renew(self, config: Config) -> None:
        """From now on *config* says who comes back; what was seen of models is still known."""
        self.defaults.renew(in_order(config), config.hooks.idle_after, config.models)
        self._read = {group: entry for group, entry in self._read.items() if group in self.fleet.groups}
        self._sleep.cancel(reason="another configuration")

    async def run(self) -> None:
        """Bring them back, for ever; asleep while there is nobody to bring back."""
        self.defaults.since = trio.current_time()
        with self.fleet.watch(self._note):
            while True:
                self._changed, self._sleep = trio.Event(), trio.CancelScope()
                try:
                    look = await self._look()
                except Exception:  # what nobody has asked for is no reason to end the daemon
                    logger.exception("nobody is brought back for now")
                    later = trio.current_time() + self.defaults.after
                    look = Look(earliest=later, latest=later)
                if look is not None:
                    await self._wait(look)

    async def _wait(self, look: Look) -> None:
        """Return when there may be something to do."""
        with self._sleep:
            await trio.sleep_until(max(look.earliest, trio.current_time() + PACE))
            with trio.move_on_at(look.latest):
                await self._changed.wait()

    # ---- what happens: in the steps of the scheduler -------------------------------------------

    def _note(self) -> None:
        """Something may have changed.  Requests wait for this, so it is a few comparisons."""
        if not self.defaults.names:
            return
        working, groups = set[str](), self._domains()
        for group in groups:
            working.update(model.name for model in group.core.models.values() if self._is_burst(model))
            if self._has_news(group):
                self._read_journal(group)
        self.defaults.worked(working, trio.current_time())
        if self._loading:
            self._judge_loads()
        if self._asking is not None and self._is_over(self._asking):
            self._asking.scope.cancel(reason="it is being loaded, or somebody really asks")
        if not self._changed.is_set() and any(map(self._lacks, groups)):
            self._changed.set()

    def _is_burst(self, model: Model) -> bool:
        """Whether somebody wants another model; who holds memory that is lent wants none."""
        return model.has_work and model.policy.yields and model.name not in self.defaults.names

    def _has_news(self, group: SwapGroup) -> bool:
        entries = group.journal.entries
        return bool(entries) and entries[-1] is not self._read.get(group)

    def _read_journal(self, group: SwapGroup) -> None:
        """Take note of what was decided since this was done last."""
        last, new = self._read.get(group), list[Entry]()
        for entry in reversed(group.journal.entries):
            if entry is last:
                break
            new.append(entry)
        self._read[group] = new[0]
        gone = self._gone(group)
        for entry in reversed(new):
            self.defaults.decided(entry.model, entry.what, entry.cause, gone)

    def _lacks(self, group: SwapGroup) -> bool:
        """Whether somebody is to come back there."""
        return any(map(self.defaults.is_missing, self._gone(group)))

    def _judge_loads(self) -> None:
        for name in list(self._loading):
            model = self._model(name)
            if model is None or model.state is not State.STARTING:
                self._loading.remove(name)
            if model is None or model.state in (State.STARTING, State.STOPPING):
                continue  # the scheduler says for whom it went
            if model.state is State.STOPPED:
                logger.warning("not loaded again model=%s: %s", name, model.circuit.failure or "it was not ready")
            else:
                logger.info("loaded again model=%s", name)

    def _is_over(self, asking: _Asking) -> bool:
        """Whether it needs not wait any more, or must not."""
        group = self.fleet.arrangement.home.get(asking.name)
        if group is None or group.core.models[asking.name].state not in (State.STOPPED, State.STOPPING):
            return True
        for model in group.core.models.values():
            ours = 1 if model.name == asking.name else 0
            if model.queue.count > ours or self._is_burst(model):
                return True
        return False

    # ---- what is done about it -------------------------------------------------------------------

    async def _look(self) -> Look | None:
        """Bring somebody back (None), or say when to look again."""
        if self.fleet.closing.is_set():
            return Look()
        now, looks = trio.current_time(), list[Look]()
        for group in self._domains():
            look = self.defaults.look([_seen(model, now) for model in group.core.models.values()], now)
            for name in look.due:
                at = await self._bring(name, group)
                if at is None:
                    return None
                look = attrs.evolve(look, latest=min(look.latest, at))
            looks.append(look)
        return Look(
            earliest=min((look.earliest for look in looks), default=-math.inf),
            latest=min((look.latest for look in looks), default=math.inf),
        )

    async def _bring(self, name: str, group: SwapGroup) -> float | None:
        """Begin to load *name* (None) if that hurts nobody, else return when it may be so."""
        core, now = group.core, trio.current_time()
        way = way_back(name, self.defaults.names, core, now)
        if way.at > now:
            return way.at
        try:
            async with AsyncExitStack() as stack:
                for other in way.leased:  # it has room, so this does not wait
                    await stack.enter_async_context(self.fleet.lease(other, label=f"{other} stays"))
                # Only what is certain: no time has passed, but the leases are news.
                if room_at(name, core.models, core.residency, core.rules, way.kept, now) <= now:
                    await self._ask(name)
                else:
                    self.defaults.refused(name, now)
        except TrioswapError as exc:
            self.defaults.refused(name, trio.current_time())
            logger.warning("not loaded again model=%s: %s", name, exc)
        return None

    async def _ask(self, name: str) -> None:
        """Want *name* until its server is being started, or somebody really wants something."""
        logger.info("loading again model=%s, nobody has asked for others", name)
        self._asking = asking = _Asking(name)
        try:
            with asking.scope:
                async with self.fleet.lease(name, LIGHT, f"return of {name}"):
                    pass
        finally:
            self._asking = None
        model = self._model(name)
        if model is not None and model.state is State.STARTING:
            self._loading.add(name)

    # ---- what there is -----------------------------------------------------------------------------

    def _domains(self) -> list[SwapGroup]:
        """The swap groups in which somebody comes back."""
        home = self.fleet.arrangement.home
        return list(dict.fromkeys(home[name] for name in self.defaults.names if name in home))

    def _model(self, name: str) -> Model | None:
        group = self.fleet.arrangement.home.get(name)
        return None if group is None else group.core.models[name]

    def _gone(self, group: SwapGroup) -> list[str]:
        """The default models of *group* that have no server."""
        models = group.core.models
        return [name for name in self.defaults.names if name in models and models[name].state is State.STOPPED]


def _serves(model: Model) -> bool:
    """Whether it serves requests; who has borrowed memory holds it, and that is all."""
    return bool(model.leases) and model.policy.yields


def _seen(model: Model, now: float) -> Seen:
    return Seen(
        model.name,
        gone=model.state is State.STOPPED,
        since=model.began,
        serves=_serves(model),
        waits=model.queue.count > 0,
        retry_at=now + model.circuit.retry_in(now),
    )
