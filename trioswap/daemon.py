"""The one place that wires everything: nurseries, sockets, signals, drain, shutdown.

Lifetimes, from the outside in: the model servers (fleet) outlive the connections, the
connections outlive the accept loop.  Shutdown goes the other way round:

    signal -> no new connections, no new work, waiting requests are told
           -> requests being served finish, bounded by each model's unload_drain_timeout
           -> model servers stop with their full grace -> nothing is left -> exit 0

A second signal cuts what is being served, so only the grace of the model servers remains.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import time
from collections.abc import AsyncIterator, Sequence
from functools import partial

import attrs
import trio

from trioswap.api import Services
from trioswap.app import App
from trioswap.config import Config, ModelConfig
from trioswap.config.addresses import parse_listen
from trioswap.errors import CannotListen
from trioswap.fleet import Fleet
from trioswap.logs import Logs
from trioswap.memory import Memory, make_memory
from trioswap.notify import feed_watchdog, notify
from trioswap.process import ModelProcess
from trioswap.remote import Prober
from trioswap.residency import Holding
from trioswap.server import HttpServer
from trioswap.state import FILE, State, default_directory

logger = logging.getLogger(__name__)

# After the models are gone nobody has anything left to say; what a client does not take by then is lost to it.
CONNECTION_GRACE = 3.0


async def open_listeners(listen: str) -> Sequence[trio.SocketListener]:
    """Listening sockets for HOST:PORT; port 0 is a free one.

    Raises:
        CannotListen: the port is in use, or the address is not ours.
    """
    address = parse_listen(listen)
    try:
        return await trio.open_tcp_listeners(address.port, host=address.host.strip("[]"))
    except OSError as exc:
        raise CannotListen(listen, exc.strerror or str(exc)) from exc


async def serve(
    config: Config, logs: Logs, *, task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED
) -> None:
    """Run the daemon until SIGTERM or SIGINT, then stop cleanly; `started` gives the bound URLs.

    Raises:
        CannotListen: before anything was started.
    """
    listeners = await open_listeners(config.listen)
    prober = Prober()
    memory = await trio.to_thread.run_sync(make_memory, config)
    fleet = Fleet(config, partial(_supervise, secrets.token_hex(4), logs, prober, memory), memory)
    directory = config.state_dir or default_directory(os.environ)
    state = State(directory / FILE, config, fleet.costs, memory.budget.footprints if memory else None)
    state.restore()
    http = HttpServer(App(Services(config, fleet, logs, int(time.time()))))
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        async with trio.open_nursery() as nursery:
            await nursery.start(fleet.run)
            nursery.start_soon(feed_watchdog)
            nursery.start_soon(state.run)
            async with trio.open_nursery() as connections:
                await connections.start(http.run, listeners)
                task_status.started(_urls(listeners))
                notify("READY=1")
                await _wait_stop_signal(signals)
                notify("STOPPING=1")
                http.begin_shutdown()
                fleet.shutdown()
                nursery.start_soon(_hasten_on_signal, signals, fleet)
                await fleet.wait_ended()
                connections.cancel_scope.deadline = trio.current_time() + CONNECTION_GRACE
            nursery.cancel_scope.cancel(reason="everything has ended")
    await prober.aclose()
    logger.info("stopped")


def _supervise(
    instance: str, logs: Logs, prober: Prober, memory: Memory | None, spec: ModelConfig, attempt: int, holding: Holding
) -> ModelProcess:
    env = {} if memory is None else memory.environment(holding)
    return ModelProcess(attrs.evolve(spec, env={**env, **spec.env}), f"{instance}-{attempt}", logs, prober)


async def _wait_stop_signal(signals: AsyncIterator[int]) -> None:
    async for number in signals:
        logger.info("received %s", signal.Signals(number).name)
        if number != signal.SIGHUP:
            return
        logger.warning("this version does not reload its configuration; restart it instead")


async def _hasten_on_signal(signals: AsyncIterator[int], fleet: Fleet) -> None:
    await _wait_stop_signal(signals)
    fleet.hasten("a second signal hastened the shutdown")


def _urls(listeners: Sequence[trio.SocketListener]) -> list[str]:
    names = [listener.socket.getsockname() for listener in listeners]
    return [f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}" for host, port, *_ in names]
