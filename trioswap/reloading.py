"""A new configuration for the daemon that runs: read, compared, taken over in one step, or rejected whole.

Whoever has begun with the old one ends with it: requests keep their `Services`.  What becomes of
model servers is the business of `arrangement`.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Final

import attrs
import trio

from trioswap import logsetup
from trioswap.access import Keyring
from trioswap.api import Services
from trioswap.config import Config
from trioswap.config.changes import Changes, compare, effective
from trioswap.cors import Cors
from trioswap.errors import BadCertificate, ConfigError, NothingToReload, ShuttingDown, TrioswapError
from trioswap.names import Names
from trioswap.reads import NoAnswer, Reads
from trioswap.remote import Peer, make_peers
from trioswap.returning import Returner
from trioswap.state import State
from trioswap.tls import Certificates, Found, look
from trioswap.watching import Watch

logger = logging.getLogger(__name__)

# Seconds between two looks whether requests to a peer that was removed are over.
PEER_LOOK: Final = 1.0
# Seconds after which what has broken is tried again: a machine that lacks threads, say, lacks them for a while.
AGAIN: Final = 10.0
# Seconds until changed files that were no good are read again, for what is missing may be elsewhere (a model, a
# certificate); then twice as many, up to the last: a mistake that nobody mends costs a look every five minutes.
FIRST_RETRY: Final = 5.0
LAST_RETRY: Final = 300.0


@attrs.define(eq=False)
class _Round:
    """One reload, for all who asked for it before it began: the files are read when it does."""

    changes: Changes | None = None
    failure: TrioswapError | None = None
    is_retry: bool = True
    """Nobody but a retry has asked, so nobody needs to hear the same again."""
    over: trio.Event = attrs.field(factory=trio.Event)


@attrs.define(eq=False)
class Reloader:
    """Takes over new configurations, one after the other.

    Who asks while one is being taken over is served by the next one, however many ask: it reads
    what is there by then, so the last change wins.
    """

    services: Services
    state: State
    reread: Callable[[Config], Config] | None = None
    """Reads the files again, in a thread; the models of the one that it is given keep their ports."""
    certificates: Certificates | None = None
    preload: Callable[[str], Awaitable[None]] | None = None
    returner: Returner | None = None
    reads: Reads = attrs.field(factory=Reads)
    _wanted: trio.Event = attrs.field(factory=trio.Event, init=False)
    _next: _Round = attrs.field(factory=_Round, init=False)
    _failure: str | None = attrs.field(default=None, init=False)
    """What the last reload failed for; None: it has not."""
    _peers: dict[Peer, trio.CancelScope] = attrs.field(factory=dict, init=False)

    @property
    def config(self) -> Config:
        """The one that is in effect."""
        return self.services.now.config

    def ask(self) -> None:
        """Reload soon; what comes of it is logged."""
        if self.reread is None:
            logger.warning("nothing is reloaded: %s", NothingToReload().message)
        self._join(is_retry=False)

    def _join(self, *, is_retry: bool) -> _Round:
        """The next reload, which is soon."""
        self._next.is_retry &= is_retry
        self._wanted.set()
        return self._next

    async def reload(self) -> Changes:
        """Reload, and return what has changed once that is in effect; also if who asks does not wait for it.

        Raises:
            ConfigError: the new configuration has mistakes, or cannot be read; the old one stays.
            NothingToReload: there are no files.
            ShuttingDown: it is too late.
            TrioswapError: what else has made it fail; the old one stays.
        """
        if self.reread is None:
            raise NothingToReload
        if self.services.fleet.closing.is_set():
            raise ShuttingDown
        round_ = self._join(is_retry=False)
        await round_.over.wait()
        if round_.changes is None:
            raise ShuttingDown if round_.failure is None else round_.failure.anew()
        return round_.changes

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take over what comes, until the daemon ends; owns the peers."""
        async with trio.open_nursery() as nursery:
            self._run_peers(nursery, self.services.routing.peers)
            task_status.started()
            with trio.CancelScope() as reloads:
                nursery.start_soon(_cancel_when, self.services.fleet.closing, reloads)
                await self._take_turns(nursery)
            self._next.over.set()  # nobody has to wait any more

    async def watch(self, watch: Watch) -> None:
        """Reload whenever the files have changed, again and again until they are good; never returns."""
        attempts = trio.CancelScope()
        async with trio.open_nursery() as nursery:
            while True:
                try:
                    changed = await watch.wait_changed()
                except Exception as exc:  # no thread can be started, say: no reason to end the daemon
                    logger.error("cannot look whether the configuration has changed: %r", exc)
                    await trio.sleep(AGAIN)
                    continue
                logger.info("changed: %s", ", ".join(map(str, changed)))
                attempts.cancel(reason="the files have changed again")
                attempts = trio.CancelScope()
                self.ask()
                nursery.start_soon(self._retry, self._next, attempts)

    async def _retry(self, round_: _Round, scope: trio.CancelScope) -> None:
        """Reload again, ever more seldom, if *round_* fails, until a reload has not failed or *scope* is cancelled."""
        pause = FIRST_RETRY
        with scope:
            await round_.over.wait()
            while round_.failure is not None:
                await trio.sleep(pause)
                if self._failure is None:  # somebody else has asked meanwhile
                    return
                if isinstance(round_.failure, NoAnswer) and self._hangs:
                    continue  # another try would be one more call that hangs, and too many let no reload through
                round_, pause = self._join(is_retry=True), min(2 * pause, LAST_RETRY)
                await round_.over.wait()

    @property
    def _hangs(self) -> bool:
        return self.reads.hangs or self.services.fleet.reads.hangs

    async def _take_turns(self, nursery: trio.Nursery) -> None:
        while True:
            await self._wanted.wait()
            round_, self._next, self._wanted = self._next, _Round(), trio.Event()
            if self.reread is None:
                continue
            try:
                round_.changes = await self._take_over(self.reread, nursery)
                self._failure = None
            except TrioswapError as exc:
                self._fail(round_, exc)
            except Exception as exc:  # a bug in reading one file must not end the daemon
                self._fail(round_, ConfigError("configuration", [f"internal error: {exc!r}"]), exc)
            finally:
                round_.over.set()

    def _fail(self, round_: _Round, failure: TrioswapError, bug: Exception | None = None) -> None:
        round_.failure = failure
        if not round_.is_retry or failure.message != self._failure:
            why = failure.message
            logger.error("nothing is reloaded, the configuration stays as it was: %s", why, exc_info=bug)
        self._failure = failure.message

    async def _take_over(self, reread: Callable[[Config], Config], nursery: trio.Nursery) -> Changes:
        old, services = self.config, self.services.now
        # Who was removed listens at its port until it has ended, which may take more than one reload.
        there = {name: run.spec for name, run in services.fleet.arrangement.desk.runs.items()}
        keep = attrs.evolve(old, models={**there, **old.models})
        new = await self.reads.call(partial(reread, keep), "files of the configuration")
        changes, config = compare(old, new), effective(old, new)
        if not changes.nothing:
            # Whatever can fail comes first, while nothing has changed.
            fresh = make_peers(peer for peer in config.peers.values() if peer not in old.peers.values())
            certificate = await self._certificate(config, changes)
            await services.fleet.reload(config, changes)
            # The rest belongs to the same step: nothing awaits.
            self.state.renew(config)
            self._replace(services, config, changes, fresh, nursery)
            if certificate is not None and config.tls is not None and self.certificates is not None:
                self.certificates.replace(config.tls, certificate)
        logger.info("reloaded: %s", changes)
        return changes

    async def _certificate(self, config: Config, changes: Changes) -> Found | None:
        """What is shown from now on; None: it is the old one."""
        if self.certificates is None or config.tls is None or "tls" not in changes.settings:
            return None
        found = await self.reads.call(partial(look, config.tls), "files of the certificate")
        if isinstance(found.context, BadCertificate):
            raise ConfigError("configuration", [f"tls: {found.context.message}"])
        return found

    def _replace(
        self, services: Services, config: Config, changes: Changes, fresh: Mapping[str, Peer], nursery: trio.Nursery
    ) -> None:
        old_peers = services.routing.peers
        peers = {name: old_peers[name] for name in config.peers if name not in fresh}
        # The active profile is none again, as after a reload of llama-swap (surface reference, glossary).
        routing = services.routing.renewed(Names(config), {**peers, **fresh})
        services.quotas.config = config
        services.succeed(
            attrs.evolve(services, config=config, routing=routing, keyring=Keyring.of(config), cors=Cors.of(config))
        )
        self._run_peers(nursery, fresh)
        for name, peer in old_peers.items():
            if name not in peers:
                self._peers.pop(peer).cancel(reason="the peer is not configured any more")
                nursery.start_soon(self._close, peer, frozenset(services.tracker.rows))
        if "log_level" in changes.settings:
            logsetup.set_level(config.log_level)
        if "log_time_format" in changes.settings:
            logsetup.set_time_format(config.log_time_format)
        self._preload(nursery, config, services.config)
        if self.returner is not None:
            self.returner.renew(config)
        services.events.stir()

    def _preload(self, nursery: trio.Nursery, config: Config, old: Config) -> None:
        for name in config.hooks.preload:
            if self.preload is not None and name not in old.hooks.preload:
                nursery.start_soon(self.preload, name)

    def _run_peers(self, nursery: trio.Nursery, peers: Mapping[str, Peer]) -> None:
        for peer in peers.values():
            self._peers[peer] = scope = trio.CancelScope()
            nursery.start_soon(_run_peer, peer, scope)

    async def _close(self, peer: Peer, users: frozenset[int]) -> None:
        """Close *peer* once none of the requests that were under way when it was removed is."""
        try:
            while users & self.services.tracker.rows.keys():  # noqa: ASYNC110 - seldom, and nobody waits for it
                await trio.sleep(PEER_LOOK)
        finally:
            await peer.aclose()  # bounded, and shielded


async def _run_peer(peer: Peer, scope: trio.CancelScope) -> None:
    """Look after *peer* until *scope* is cancelled; where that breaks, requests to it still tell how it is."""
    with scope:
        while True:
            try:
                await peer.run()
            except Exception:
                logger.exception("cannot look after a peer")
                await trio.sleep(AGAIN)


async def _cancel_when(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel(reason="shutdown")
