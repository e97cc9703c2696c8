"""Carries out in the box what a scheduler commands, and tells it what happens there.

It stands where `trioswap.group` stands in the daemon and speaks the same events and
commands, one event at a time.  It does not trust the scheduler: what no shell could carry
out, and what breaks the workload's rule about living together, raises.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterator
from typing import Final, Protocol, assert_never

import attrs

from trioswap import lifecycle
from trioswap.lifecycle import State
from trioswap.messages import (
    Arrived,
    BecameReady,
    CloseGate,
    Command,
    Ended,
    Event,
    Eviction,
    Grant,
    Left,
    OpenGate,
    Reject,
    Start,
    Stop,
    Swap,
    WokeUp,
)
from trioswap.simulation.box import EPSILON, Box, Request, Server
from trioswap.simulation.workload import Workload

# So many wake-ups with nothing between them: the scheduler waits for what it does not do.
_QUIET_WAKES: Final = 1000


class Brain(Protocol):
    """What decides: the daemon's scheduler, or another with its interface."""

    @property
    def wake_at(self) -> float:
        """When it wants to be woken; inf: never."""
        ...

    def handle(self, event: Event, now: float) -> list[Command]:
        """Take what happened; return what must be done about it, in this order."""
        ...


class Misbehaved(Exception):
    """The scheduler commanded what cannot be done, or lets somebody wait for ever."""


@attrs.define(eq=False)
class Machine:
    """Replays a workload under a scheduler; what came of it stays to be read."""

    workload: Workload
    brain: Brain
    weights: bool = False
    """Whether the weights of the sessions are told to the scheduler."""
    requests: list[Request] = attrs.field(factory=list, init=False)
    """In order of arrival; a ticket is an index into it."""
    rejected: int = attrs.field(default=0, init=False)
    box: Box = attrs.field(init=False)
    _arrivals: list[tuple[float, int, int]] = attrs.field(factory=list, init=False)
    """A heap of (when, session, place)."""
    _open: int = attrs.field(default=0, init=False)
    """Requests that came and are not over."""

    @box.default
    def _make_box(self) -> Box:
        return Box(self.workload)

    def run(self) -> None:
        """Replay to the end.

        Raises:
            Misbehaved, IllegalTransition: the scheduler did.
        """
        for index, session in enumerate(self.workload.sessions):
            heapq.heappush(self._arrivals, (session.start + session.steps[0].think, index, 0))
        quiet = 0
        while self._open or self._arrivals:
            self._pass_time()
            for event in self._happened():
                self._tell(event)
                quiet = 0
            quiet += self._wake()
            if quiet > _QUIET_WAKES:
                raise Misbehaved(f"at {self.box.now:.1f} s the scheduler wakes up again and again, and does nothing")

    def _pass_time(self) -> None:
        """Go on to when something is due next."""
        now = self.box.now
        seconds = min(self.box.ahead(), self.brain.wake_at - now, *(at - now for at, _, _ in self._arrivals[:1]))
        if not math.isfinite(seconds):
            states = {name: server.state.value for name, server in self.box.servers.items()}
            raise Misbehaved(f"at {now:.1f} s {self._open} requests wait for what never comes; {states}")
        self.box.advance(max(seconds, 0.0))

    # ---- what happens ---------------------------------------------------------------------

    def _happened(self) -> Iterator[Event]:
        """What is due by now.  The box goes ahead; the scheduler learns one thing after the other, as it would live."""
        for server in self.box.became_ready():
            yield BecameReady(server.spec.name, server.attempt)
        for server in self.box.ended():
            yield Ended(server.spec.name, server.attempt)
        for request in self.box.served():
            self._open -= 1
            self._think(request)
            yield Left(request.ticket)
        while self._arrivals and self._arrivals[0][0] <= self.box.now + EPSILON:
            _, session, place = heapq.heappop(self._arrivals)
            yield self._arrive(session, place)

    def _think(self, request: Request) -> None:
        """The user comes back with the next step, if there is one."""
        steps, place = self.workload.sessions[request.session].steps, request.place + 1
        if place < len(steps):
            heapq.heappush(self._arrivals, (self.box.now + steps[place].think, request.session, place))

    def _arrive(self, session: int, place: int) -> Arrived:
        who = self.workload.sessions[session]
        step = who.steps[place]
        alone = sum(step.work(self.box.servers[step.model].spec, warm=True))
        request = Request(len(self.requests), session, place, step, who.user, self.box.now, alone)
        self.requests.append(request)
        self._open += 1
        return Arrived(request.ticket, step.model, who.weight if self.weights else None)

    def _wake(self) -> bool:
        """Wake the scheduler if it is time; return whether it was."""
        at = self.brain.wake_at
        if at > self.box.now + EPSILON:
            return False
        self.box.now = max(self.box.now, at)  # never early by a rounding: it would just ask again
        self._tell(WokeUp())
        return True

    # ---- what is done about it ------------------------------------------------------------

    def _tell(self, event: Event) -> None:
        events = deque([event])
        while events:
            for command in self.brain.handle(events.popleft(), self.box.now):
                if isinstance(command, Reject):
                    # Whoever is refused goes for good, and says so.
                    self._open -= 1
                    self.rejected += 1
                    events.append(Left(command.ticket))
                else:
                    self._obey(command)

    def _obey(self, command: Grant | CloseGate | OpenGate | Swap | Start | Stop) -> None:
        match command:
            case Grant():
                self._grant(command)
            case Start():
                self._start(command)
            case Stop():
                self._end(self._server(command))
            case Swap(evictions=evictions):
                for eviction in evictions:
                    self._end(self._server(eviction))
            case CloseGate():
                self._server(command).move(lifecycle.Event.CLOSE_GATE)
            case OpenGate():
                self._server(command).move(lifecycle.Event.OPEN_GATE)
            case _:
                assert_never(command)

    def _server(self, about: Grant | CloseGate | OpenGate | Stop | Eviction) -> Server:
        """The server that the command is about.

        Raises:
            Misbehaved: it means an attempt that is over.
        """
        server = self.box.servers[about.model]
        if about.attempt != server.attempt:
            raise Misbehaved(f"{about} in attempt {server.attempt}")
        return server

    def _grant(self, grant: Grant) -> None:
        request, server = self.requests[grant.ticket], self._server(grant)
        if server.state is not State.READY or grant.model != request.step.model or not math.isnan(request.granted):
            raise Misbehaved(f"{grant} to a model that is {server.state.value}, for {request}")
        request.granted = self.box.now
        self.box.serve(request)

    def _start(self, start: Start) -> None:
        together = self.box.resident() | {start.model}
        if not self.workload.fits(together):
            raise Misbehaved(f"{start} does not fit: {', '.join(sorted(together))}")
        server = self.box.servers[start.model]
        server.attempt = start.attempt
        self.box.start(server)

    def _end(self, server: Server) -> None:
        if server.running or server.queue:
            raise Misbehaved(f"the end of {server.spec.name}, which serves {len(server.running) + len(server.queue)}")
        self.box.end(server)
