"""The one place that wires everything: nurseries, sockets, signals, drain, shutdown.

Lifetimes, from the outside in: the claim to the state directory and the guardian outlive the
model servers (fleet), these outlive the connections, and those the accept loop.  Shutdown goes
the other way round:

    signal -> no new connections, no new work, waiting requests are told
           -> requests being served finish, bounded by each model's unload_drain_timeout
           -> model servers stop with their full grace -> nothing is left -> exit 0

A second signal cuts what is being served, so only the grace of the model servers remains.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial

import attrs
import trio

from trioswap.api import Services
from trioswap.app import App
from trioswap.config import Config, ModelConfig
from trioswap.errors import TrioswapError
from trioswap.fleet import Fleet
from trioswap.guardian import END_WAIT, Guardian, guarded
from trioswap.instance import Claim, Noting, claimed
from trioswap.listening import listening, open_listeners, urls
from trioswap.logs import Logs
from trioswap.memory import Memory, make_memory
from trioswap.names import Names
from trioswap.notify import feed_watchdog, more_time, notify
from trioswap.process import ModelProcess
from trioswap.reloading import Reloader
from trioswap.remote import Peer, Prober, make_peers
from trioswap.residency import Holding
from trioswap.returning import Returner
from trioswap.routing import Routing
from trioswap.selfcheck import shutdown_limit
from trioswap.server import HttpServer
from trioswap.spawning import anybody_late
from trioswap.state import FILE, LAST_SAVE, State, default_directory
from trioswap.tls import Certificates
from trioswap.watching import Watch

__all__ = ["open_listeners", "serve"]

logger = logging.getLogger(__name__)

# After the models are gone nobody has anything left to say; what a client does not take by then is lost to it.
CONNECTION_GRACE = 3.0
# Seconds that all may take once the models are gone; the guardian is waited for again if it has to be killed.
REST = CONNECTION_GRACE + LAST_SAVE + 2 * END_WAIT


async def serve(
    config: Config,
    logs: Logs,
    reread: Callable[[Config], Config] | None = None,
    watch: Watch | None = None,
    *,
    task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run the daemon until SIGTERM or SIGINT, then stop cleanly; `started` gives the bound URLs.

    *reread* reads the configuration again, for a reload, in a thread; its models keep the ports of
    the one that it is given.  With *watch* that happens whenever the files have changed, too.

    Raises:
        BadCertificate, CannotListen: before anything was started.
        ConfigError: likewise; the address of a peer is none.
        Misuse: another daemon has the state directory.
    """
    certificates = Certificates(config.tls) if config.tls is not None else None
    peers = make_peers(config.peers.values())
    with (
        # The outermost: a signal that comes while the last things end must not end us without them.
        trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals,
        claimed(config.state_dir or default_directory(os.environ)) as claim,
    ):
        async with listening(config.listen) as listeners:
            if not await _reaped(claim, signals):
                return
            keeps_open = () if claim.guardian_file is None else (claim.guardian_file,)
            async with guarded(claim.instance, anybody_late, keeps_open) as guardian:
                await _serve(
                    config, logs, reread, watch, listeners, certificates, peers, claim, guardian, signals, task_status
                )


async def _reaped(claim: Claim, signals: AsyncIterator[int]) -> bool:
    """Whether nothing of earlier daemons is in the way; a signal to stop ends the wait for that."""
    told: list[int] = []
    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            nursery.start_soon(_cancel_on_stop_signal, signals, scope, told)
            await claim.reap()
        nursery.cancel_scope.cancel(reason="nothing is in the way, or there is nothing to start")
    return not told  # not before the reader has ended, which may just have taken a signal


async def _cancel_on_stop_signal(signals: AsyncIterator[int], scope: trio.CancelScope, told: list[int]) -> None:
    """Add the signals to stop to *told*: further ones, too, or they would end us when nobody takes them.

    One to reload is for whoever reads *signals* next.
    """
    reload = False
    try:
        async for number in signals:
            if number == signal.SIGHUP:
                reload = True
            else:
                logger.info("received %s before anything was started", signal.Signals(number).name)
                told.append(number)
                scope.cancel(reason="a signal to stop")
    finally:
        if reload and not told:
            signal.raise_signal(signal.SIGHUP)


async def _serve(
    config: Config,
    logs: Logs,
    reread: Callable[[Config], Config] | None,
    watch: Watch | None,
    listeners: Sequence[trio.SocketListener],
    certificates: Certificates | None,
    peers: Mapping[str, Peer],
    claim: Claim,
    guardian: Guardian,
    signals: AsyncIterator[int],
    task_status: trio.TaskStatus[list[str]],
) -> None:
    prober = Prober()
    memory = await trio.to_thread.run_sync(make_memory, config)
    fleet = Fleet(config, partial(_supervise, claim, guardian, logs, prober, memory), memory)
    directory = config.state_dir or default_directory(os.environ)
    state = State(directory / FILE, config, fleet.costs, memory.budget.footprints if memory else None)
    state.restore()
    tls = certificates.current if certificates is not None else None
    routing = Routing(Names(config), fleet, peers)
    services = Services(config, fleet, logs, routing, int(time.time()))
    returner = Returner(fleet, config)
    reloader = Reloader(services, state, reread, certificates, partial(_preload, fleet), returner)
    services.succession.reload = reloader.reload if reread is not None else None
    http = HttpServer(App(services), tls=tls)
    async with trio.open_nursery() as nursery:
        await nursery.start(fleet.run, claim.left, claim.note)
        await nursery.start(services.check.run)
        nursery.start_soon(feed_watchdog, lambda: services.check.is_alive)
        if certificates is not None:
            nursery.start_soon(certificates.run)
        nursery.start_soon(state.run)
        nursery.start_soon(claim.keep)
        nursery.start_soon(claim.lock_for_guardian)
        await nursery.start(reloader.run)
        if watch is not None:
            nursery.start_soon(reloader.watch, watch)
        for name in config.hooks.preload:
            nursery.start_soon(_preload, fleet, name)
        nursery.start_soon(returner.run)
        async with trio.open_nursery() as connections:
            await connections.start(http.run, listeners)
            task_status.started(urls(listeners, secure=tls is not None))
            notify("READY=1")
            await _wait_stop_signal(signals, reloader)
            notify("STOPPING=1")
            notify(more_time(shutdown_limit(fleet) + REST))
            http.begin_shutdown()
            fleet.shutdown()
            nursery.start_soon(_hasten_on_signal, signals, fleet)
            await fleet.wait_ended()
            connections.cancel_scope.deadline = trio.current_time() + CONNECTION_GRACE
        nursery.cancel_scope.cancel(reason="everything has ended")
    for peer in services.now.routing.peers.values():
        await peer.aclose()
    await prober.aclose()
    logger.info("stopped")


async def _preload(fleet: Fleet, model: str) -> None:
    """Load *model* as a request would; whoever asks for another meanwhile has its turn as always."""
    try:
        async with fleet.lease(model, label=f"preload of {model}"):
            logger.info("preloaded model=%s", model)
    except TrioswapError as exc:
        logger.warning("preload failed model=%s: %s", model, exc)


def _supervise(
    claim: Claim,
    guardian: Guardian,
    logs: Logs,
    prober: Prober,
    memory: Memory | None,
    spec: ModelConfig,
    attempt: int,
    holding: Holding,
) -> ModelProcess:
    env = {} if memory is None else memory.environment(holding)
    spec = attrs.evolve(spec, env={**env, **spec.env})
    marker = claim.marker(attempt, spec.name, never_kill=spec.never_kill)
    return ModelProcess(spec, marker, logs, prober, Noting(claim, guardian, marker))


async def _wait_stop_signal(signals: AsyncIterator[int], reloader: Reloader | None = None) -> None:
    async for number in signals:
        logger.info("received %s", signal.Signals(number).name)
        if number != signal.SIGHUP:
            return
        if reloader is None:
            continue
        if reloader.certificates is not None:
            reloader.certificates.reload()
        reloader.ask()


async def _hasten_on_signal(signals: AsyncIterator[int], fleet: Fleet) -> None:
    await _wait_stop_signal(signals)
    fleet.hasten("a second signal hastened the shutdown")
