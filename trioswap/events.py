"""What happens, for user interfaces and tools that watch: the messages of `/api/events` (surface reference 2.6, 2.7).

The obvious way is that whoever changes something puts a message about it into a queue of
each client.  Then requests pay for those who watch them, a thousand short ones a second
are two thousand messages that nobody can follow, and a client that is slow loses some and
is wrong from then on.  So nobody reports anything here.  Whoever changes something rings
(`stir`), and soon after a *look* compares what is with what was told last; what differs
becomes messages for all clients.  The last state is always told, states that came and
went between two looks may not be.

Looks are taken by the tasks of the clients themselves, whichever is awake first: nobody
listening means no work, and there is no task to own.  A client that does not read keeps
nobody waiting but itself (invariant I10).  When it is too far behind, what it has not
taken is thrown away, and it starts again with all there is at the moment when it reads.

Each source of log lines has followers of its own (`logs`), which can only lose their own
lines and say so.  What rows look like is the business of `api.events`.
"""

from __future__ import annotations

import codecs
import itertools
import json
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Final, Protocol

import attrs
import trio

from trioswap.logs import LogRing, Logs
from trioswap.tracker import Tracked, Tracker

logger = logging.getLogger(__name__)

# Messages that a client may be behind (surface reference 2.6).
BACKLOG: Final = 1024
# Seconds from one look to the next however much happens: people see no faster.
PACE: Final = 0.1
# Seconds between two messages about the bytes of one request (surface reference 2.7).
BYTES_EVERY: Final = 0.25
# Seconds between two messages about who waits; also from one look to the next when nothing rings.
QUEUE_EVERY: Final = 0.5
# Requests that came and went between two looks and are told all the same.
BRIEF: Final = 32
# Seconds of silence; proxies give up on a connection after 30 or 60.
KEEP_ALIVE: Final = 15.0
_COMMENT: Final = b": keep-alive\n\n"
# Milliseconds until a client that was cut off comes again.
_RETRY: Final = b"retry: 2000\n\n"

Row = dict[str, Any]
Write = Callable[[bytes], Awaitable[None]]


class Observed(Protocol):
    """What is looked at."""

    @property
    def tracker(self) -> Tracker:
        """The requests under way."""

    @property
    def logs(self) -> Logs:
        """What the daemon and its children write."""

    def watch(self, listener: Callable[[], None]) -> AbstractContextManager[None]:
        """Inside the block, call *listener* in each step in which a model may have changed."""

    def models(self) -> list[Row]:
        """All models as they are now; called at each look."""

    def profile(self) -> str | None:
        """The active profile."""

    def waiting(self) -> list[Row]:
        """Who waits."""

    def row(self, request: Tracked) -> Row:
        """One request, without secrets."""

    def interface(self) -> Row:
        """Settings of user interfaces."""


@attrs.frozen
class _Told:
    """What was last said of a request."""

    at: float
    model: str
    has_head: bool
    """Its response had begun."""
    sent: int

    @classmethod
    def of(cls, request: Tracked, now: float) -> _Told:
        return cls(now, request.model, request.exchange.status is not None, request.exchange.sent)

    def is_old(self, now: _Told) -> bool:
        """Whether *now* is worth a message."""
        if (self.model, self.has_head) != (now.model, now.has_head):
            return True
        return self.sent != now.sent and now.at >= self.at + BYTES_EVERY


@attrs.define(eq=False)
class _Client:
    """What one client has not taken yet."""

    backlog: list[bytes] = attrs.field(factory=list)
    lost: bool = False
    """It was too far behind; then the backlog is empty, and stays so until it takes a snapshot."""

    def push(self, message: bytes) -> None:
        if self.lost:
            return
        self.backlog.append(message)
        if len(self.backlog) > BACKLOG:
            self.backlog.clear()
            self.lost = True


class Events:
    """Numbers messages, and tells them to the clients of one daemon."""

    def __init__(self) -> None:
        self._clients: list[_Client] = []
        self._numbers = itertools.count(1)
        self._idle = trio.lowlevel.ParkingLot()  # the tasks of clients that have taken everything
        self._looked_at = -math.inf
        self._due = -math.inf  # of the next look
        self._stirred = False  # since the last look
        # What was told last.
        self._models: list[Row] = []
        self._profile: str | None = None
        self._requests: dict[int, _Told] = {}
        self._waiting: list[Row] = []
        self._waiting_at = -math.inf
        self._begun: dict[int, Tracked] = {}  # since the last look, the first few

    def __repr__(self) -> str:
        """How many listen."""
        return f"<Events {len(self._clients)} clients>"

    def stir(self) -> None:
        """Something may have changed: look soon.  Cheap, and made to be called from anywhere."""
        if not self._stirred:
            self._stirred = True
            self._due = min(self._due, self._looked_at + PACE)
            self._idle.unpark_all()

    async def stream(self, observed: Observed, write: Write) -> None:
        """Tell one client, piece by piece through *write*, what there is and then what changes; never returns.

        A piece is one or more whole events.  Each has a number, larger than all before it;
        for the client they grow, with gaps.  Nothing is kept by number: whoever comes again
        with `Last-Event-ID` gets all there is, like whoever comes first.
        """
        with ExitStack() as stack:
            sources = [_Source(name, ring) for name, ring in _rings(observed.logs)]
            chunks = [stack.enter_context(source.ring.follow(with_history=False)) for source in sources]
            client = stack.enter_context(self._connected(observed))
            models, *others = self._state(observed)
            interface = _message("uiConfig", observed.interface())
            burst = [*(source.message(source.ring.history()) for source in sources), models, interface, *others]
            # Whoever has a message waits until the writer takes it, so the bounds are those of the sources.
            hand, take = trio.open_memory_channel[list[bytes]](0)
            async with trio.open_nursery() as nursery:
                for source, follower in zip(sources, chunks, strict=True):
                    nursery.start_soon(_follow, source, follower, hand)
                nursery.start_soon(self._pump, client, observed, hand)
                await write(_RETRY + self._frames(burst))
                while True:
                    await write(await self._next(take))

    def last_words(self, observed: Observed) -> bytes:
        """The piece that ends a stream: how the models are in the end."""
        return self._frames([_message("modelStatus", observed.models())])

    # ---- one client ----------------------------------------------------------------------------

    @contextmanager
    def _connected(self, observed: Observed) -> Iterator[_Client]:
        """A client that is told everything from now on."""
        self._look(observed, everything=True)
        client, tracker = _Client(), observed.tracker
        self._clients.append(client)
        tracker.begun.append(self._on_begun)
        tracker.ended.append(self._on_ended)
        try:
            with observed.watch(self.stir):
                yield client
        finally:
            tracker.ended.remove(self._on_ended)
            tracker.begun.remove(self._on_begun)
            self._clients.remove(client)

    async def _pump(self, client: _Client, observed: Observed, hand: trio.MemorySendChannel[list[bytes]]) -> None:
        while True:
            self._look(observed)
            if messages := self._take(client, observed):
                await hand.send(messages)
            else:
                with trio.move_on_at(self._due):
                    await self._idle.park()

    def _take(self, client: _Client, observed: Observed) -> list[bytes]:
        if client.lost:
            logger.info("an event stream was more than %d messages behind and starts again", BACKLOG)
            self._look(observed, everything=True)
            client.lost = False
            return self._state(observed)
        taken, client.backlog = client.backlog, []
        return taken

    async def _next(self, take: trio.MemoryReceiveChannel[list[bytes]]) -> bytes:
        with trio.move_on_after(KEEP_ALIVE):
            return self._frames(await take.receive())
        return _COMMENT

    def _frames(self, messages: Iterable[bytes]) -> bytes:
        # Numbered when they go out: messages overtake each other on the way to a client.
        return b"".join(b"id: %d\nevent: message\ndata: %b\n\n" % (next(self._numbers), data) for data in messages)

    # ---- what changes --------------------------------------------------------------------------

    def _on_begun(self, request: Tracked) -> None:
        if len(self._begun) < BRIEF:
            self._begun[request.number] = request
        self.stir()

    def _on_ended(self, _: Tracked) -> None:
        self.stir()

    def _look(self, observed: Observed, *, everything: bool = False) -> None:
        """Tell what has changed, if it is time; *everything*: a snapshot follows, which must not be ahead of this."""
        now = trio.current_time()
        if now < self._due and not everything:
            return
        self._looked_at, self._stirred = now, False
        self._compare_models(observed)
        self._compare_requests(observed, now)
        if everything or now >= self._waiting_at + QUEUE_EVERY:
            self._compare_waiting(observed, now)
        self._due = now + (BYTES_EVERY if self._requests else QUEUE_EVERY)

    def _compare_models(self, observed: Observed) -> None:
        models, profile = observed.models(), observed.profile()
        if models != self._models or profile != self._profile:  # the reference tells the models with the profile
            self._publish("modelStatus", models)
        if profile != self._profile:
            self._publish("profileChanged", {"active": profile})
        self._models, self._profile = models, profile

    def _compare_requests(self, observed: Observed, now: float) -> None:
        rows, told = observed.tracker.rows, self._requests
        for number, request in {**self._begun, **rows}.items():
            current = _Told.of(request, now)
            if number not in told or told[number].is_old(current):
                told[number] = current
                self._publish("inflight", {"operation": "upsert", "request": observed.row(request)})
        for number in told.keys() - rows.keys():
            del told[number]
            self._publish("inflight", {"operation": "remove", "id": str(number)})
        self._begun.clear()

    def _compare_waiting(self, observed: Observed, now: float) -> None:
        """While somebody waits there is always news: how long."""
        waiting = observed.waiting()
        if waiting or self._waiting:
            self._waiting_at = now
            self._publish("queue", {"waiting": waiting})
        self._waiting = waiting

    def _publish(self, kind: str, payload: object) -> None:
        if self._clients:
            message = _message(kind, payload)
            for client in self._clients:
                client.push(message)
            self._idle.unpark_all()

    def _state(self, observed: Observed) -> list[bytes]:
        """All that may have changed, as it was at the look in this very step."""
        requests = [observed.row(request) for request in observed.tracker.rows.values()]
        return [
            _message("modelStatus", self._models),
            _message("profileChanged", {"active": self._profile}),
            _message("inflight", {"operation": "snapshot", **({"requests": requests} if requests else {})}),
            _message("queue", {"waiting": self._waiting}),
        ]


# ---- log lines ----------------------------------------------------------------------------------


@attrs.define(eq=False)
class _Source:
    """Log lines on their way to one client; pieces may end within a character."""

    name: str
    ring: LogRing
    _decoder: codecs.IncrementalDecoder = attrs.field(
        factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"), init=False
    )

    def message(self, data: bytes) -> bytes:
        return _message("logData", {"source": self.name, "data": self._decoder.decode(data)})


def _rings(logs: Logs) -> list[tuple[str, LogRing]]:
    """In the order of the reference."""
    return [("proxy", logs.proxy), ("upstream", logs.upstream)]


async def _follow(source: _Source, chunks: AsyncIterator[bytes], hand: trio.MemorySendChannel[list[bytes]]) -> None:
    async for chunk in chunks:
        await hand.send([source.message(chunk)])


def _message(kind: str, payload: object) -> bytes:
    """The data of an event: JSON, and in it JSON as text, which is how clients of llama-swap read it.

    ASCII without line ends, whatever the payload holds.
    """
    return _json({"type": kind, "data": _json(payload)}).encode("ascii")


def _json(document: object) -> str:
    return json.dumps(document, separators=(",", ":"))
