"""The physics of the box: how models load, serve and end while time passes.

A request has a prefill phase, whose end is the first token, and a decode phase.  k
requests in one server each run at 1 / (1 + penalty x (k - 1)) of their speed alone
(continuous batching), and servers at work at the same time share the GPU equally.  A
server that ended has lost its cache, so the next prompt of a session is prefilled whole.
Models that load at the same time share the bandwidth.

What may be done when, and who decides it, is left to `machine`.
"""

from __future__ import annotations

import math
from collections import deque

import attrs

from trioswap.lifecycle import Event, State, next_state
from trioswap.simulation.workload import ModelSpec, Step, Workload

EPSILON = 1e-9
"""What is so few seconds ahead is now: sums of floats do not meet exactly."""


@attrs.define(eq=False)
class Request:
    """One request on its way; times are seconds, NaN: not yet."""

    ticket: int
    session: int
    place: int
    """Which step of the session it is."""
    step: Step
    user: str
    arrived: float
    alone: float
    """Seconds of service it takes alone on a warm server."""
    granted: float = math.nan
    first: float = math.nan
    """When its first token was there."""
    done: float = math.nan
    to_prefill: float = 0.0
    """Seconds of prefill ahead, when alone."""
    to_decode: float = 0.0

    def speed(self, together: float) -> float:
        """Its speed in a server where requests run at *together*: a recorded duration has the others in it already."""
        return together if self.step.service is None else 1.0

    @property
    def ahead(self) -> float:
        """Seconds to the end of its phase, when alone."""
        return self.to_prefill if self.to_prefill > 0 else self.to_decode

    def run(self, seconds: float) -> None:
        """Do so much work."""
        if self.to_prefill > 0:
            self.to_prefill -= seconds
        else:
            self.to_decode -= seconds


@attrs.define(eq=False)
class Server:
    """One model, and its server if it runs."""

    spec: ModelSpec
    state: State = State.STOPPED
    attempt: int = 0
    loads: int = 0
    """How often it was loaded so far."""
    to_load: float = 0.0
    """Seconds of loading ahead, when nothing else loads."""
    ends_at: float = math.inf
    queue: deque[Request] = attrs.field(factory=deque)
    """In flight, but without a slot."""
    running: list[Request] = attrs.field(factory=list)

    def move(self, event: Event) -> None:
        """Follow the table of states.

        Raises:
            IllegalTransition: this cannot happen to it now.
        """
        self.state = next_state(self.state, event)


@attrs.define(eq=False)
class Box:
    """All servers and the clock."""

    workload: Workload
    now: float = 0.0
    busy: float = 0.0
    """Seconds in which something was served."""
    swapping: float = 0.0
    """Seconds in which nothing was served, because something loaded or ended."""
    servers: dict[str, Server] = attrs.field(init=False)
    _warm: dict[tuple[int, str], int] = attrs.field(factory=dict, init=False)
    """(session, model) -> the load whose cache knows the session."""

    @servers.default
    def _make_servers(self) -> dict[str, Server]:
        return {spec.name: Server(spec) for spec in self.workload.models}

    def resident(self) -> frozenset[str]:
        """Whose memory is taken."""
        return frozenset(name for name, server in self.servers.items() if server.state is not State.STOPPED)

    # ---- what can be done -----------------------------------------------------------------

    def start(self, server: Server) -> None:
        """Begin to load."""
        server.move(Event.START)
        jitter = self.workload.jitter.get(server.spec.name, (1.0,))
        server.to_load = server.spec.load * jitter[server.loads % len(jitter)]
        server.loads += 1

    def end(self, server: Server) -> None:
        """Begin to stop."""
        server.move(Event.STOP)
        server.ends_at = self.now + server.spec.stop

    def serve(self, request: Request) -> None:
        """Hand the request to its server."""
        server = self.servers[request.step.model]
        server.queue.append(request)
        self._fill(server)

    def _fill(self, server: Server) -> None:
        while server.queue and len(server.running) < server.spec.slots:
            request = server.queue.popleft()
            warm = self._warm.get((request.session, server.spec.name)) == server.loads
            request.to_prefill, request.to_decode = request.step.work(server.spec, warm=warm)
            server.running.append(request)

    # ---- time -----------------------------------------------------------------------------

    def ahead(self) -> float:
        """Seconds until something changes by itself; inf: nothing will."""
        changes = [server.ends_at - self.now for server in self.servers.values() if server.state is State.STOPPING]
        loading = self._loading()
        changes += [server.to_load * len(loading) for server in loading]
        for server, speed in self._speeds():
            changes += [request.ahead / request.speed(speed) for request in server.running]
        return min(changes, default=math.inf)

    def advance(self, seconds: float) -> None:
        """Let time pass, but not beyond the next change."""
        speeds, loading = self._speeds(), self._loading()
        if speeds:
            self.busy += seconds
        elif loading or any(server.state is State.STOPPING for server in self.servers.values()):
            self.swapping += seconds
        for server, speed in speeds:
            for request in server.running:
                request.run(seconds * request.speed(speed))
        for server in loading:
            server.to_load -= seconds / len(loading)
        self.now += seconds

    def _loading(self) -> list[Server]:
        return [server for server in self.servers.values() if server.state is State.STARTING]

    def _speeds(self) -> list[tuple[Server, float]]:
        """Who is at work, and the speed of its requests compared with one alone."""
        active = [server for server in self.servers.values() if server.running]
        return [
            (server, 1.0 / ((1 + server.spec.penalty * (len(server.running) - 1)) * len(active))) for server in active
        ]

    # ---- changes that are due -------------------------------------------------------------

    def became_ready(self) -> list[Server]:
        """Who has loaded by now."""
        ready = [server for server in self._loading() if server.to_load <= EPSILON]
        for server in ready:
            server.move(Event.READY)
        return ready

    def ended(self) -> list[Server]:
        """Who has stopped by now."""
        ended = [server for server in self.servers.values() if server.ends_at <= self.now + EPSILON]
        for server in ended:
            server.move(Event.EXIT)
            server.ends_at = math.inf
        return ended

    def served(self) -> list[Request]:
        """What has been answered by now; notes first tokens on the way."""
        served = []
        for server in self.servers.values():
            for request in server.running:
                if request.to_prefill <= EPSILON and math.isnan(request.first):
                    request.to_prefill, request.first = 0.0, self.now
            over = [request for request in server.running if request.to_prefill <= EPSILON >= request.to_decode]
            for request in over:
                server.running.remove(request)
                request.done = self.now
                self._warm[request.session, server.spec.name] = server.loads
            self._fill(server)
            served += over
        return served
