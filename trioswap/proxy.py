"""Serve one request by its model: lease, forward, stream, and tell the truth while the client waits.

Two tasks share the work.  The *reader* holds the lease and reads the model server; the
*writer* sends to the client.  Between them is a short bounded hand-over.  The split is
there because a send to a client that does not read cannot be cancelled: so the lease
belongs to the task that can be, and a drain deadline takes it back at once whatever the
client does (invariant I10).

First-byte rule (I14): before the head of the response is sent, a failure becomes a proper
status, or one retry when the model server died.  After it the response is broken off; but
a stream of events, which is passed on by whole events (`sse.WholeEvents`), ends with an
error event, or, when its own last event has passed already, as if nothing had happened.

A client that asked for a stream and waits, for the model or for the first byte of its
server, gets the head of its stream early, and comments in it (`Manner`).  From then on the
status is 200, whatever the model server says later.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from typing import Final

import attrs
import trio

from trioswap import sse
from trioswap.asgi import Exchange
from trioswap.cors import without_cors
from trioswap.errors import QueueTimedOut, ShuttingDown, StillLoading, TrioswapError, UpstreamFailed, UpstreamTimedOut
from trioswap.origin import Answer
from trioswap.request import Call, Headers
from trioswap.tracker import Tracked
from trioswap.way import Source

logger = logging.getLogger(__name__)

# Pieces (of at most one read each) between the reader and a client that is slower.
HAND_OVER: Final = 8
# Seconds that an answer has to end by itself once the daemon ends; it cuts what is not over a second later.
LAST_CHANCE: Final = 2.0
# Response headers that are ours to send: the date of this response, and the id that our log knows.
_OURS: Final = frozenset({b"date", b"x-request-id"})
# Seconds between two looks at how far a load is, for those who see it as text.
_TEXT_EVERY: Final = 1.0
# Bytes of an answer that are looked at for what went wrong.
_ERROR_LIMIT: Final = 64 * 1024
_STREAM_HEAD: Final[Headers] = [
    (b"content-type", b"text/event-stream"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


@attrs.frozen
class Manner:
    """How a client is kept informed, and how long it waits."""

    model: str
    dialect: sse.Dialect
    stream: bool
    """It asked for a stream of events."""
    progress: Callable[[], sse.Progress | None]
    """How far its model is; None: nothing is known."""
    heartbeat: float | None
    """Seconds until the first comment, and between two; None: there are none."""
    text: Callable[[], sse.LoadingText] | None = None
    """Makes what tells of the load as text; None: nobody wants that."""
    patience: float = math.inf
    """Seconds after which the client would rather be told (`Prefer: wait`)."""
    limit: float = math.inf
    """Seconds that a request may wait for its model (`queue_timeout`)."""
    over: Callable[[], object] = lambda: None
    """Called when the server has said everything, before the client can have seen all of it."""
    closing: Callable[[], Awaitable[None]] | None = None
    """Waits for the end of the daemon; None: who serves the request ends before that, and tells."""


@attrs.frozen
class Head:
    """Status and headers of the model server's response."""

    status: int
    headers: Headers

    @property
    def is_events(self) -> bool:
        """Whether a stream of events follows."""
        return any(name == b"content-type" and b"text/event-stream" in value for name, value in self.headers)

    @property
    def continues_stream(self) -> bool:
        """Whether its body can follow a stream that we have begun."""
        plain = not any(name == b"content-encoding" for name, _ in self.headers)
        return self.status == 200 and self.is_events and plain

    @property
    def has_length(self) -> bool:
        """Whether it has said how long its body is, so that nothing can be added."""
        return any(name == b"content-length" for name, _ in self.headers)


class End:
    """The response is complete."""


Piece = Head | bytes | End | TrioswapError


async def forward(
    exchange: Exchange, row: Tracked, source: Source, call: Callable[[], Call], manner: Callable[[], Manner]
) -> None:
    """Answer *exchange* with what the server of *source* says to *call*; end early when the client leaves.

    What *call* is may depend on what *source* has found, so it is asked then, and so may *manner* at any time.
    Who ends *row* from outside ends it as a failure of the server does.

    Raises:
        TrioswapError: nothing has been sent yet and this is the answer.
    """
    await exchange.while_connected(_Relay(exchange, row, source, call, manner).run)


@attrs.define(eq=False)
class _Relay:
    """One request on its way, and the answer on its way back."""

    exchange: Exchange
    row: Tracked
    source: Source
    call: Callable[[], Call]
    how: Callable[[], Manner]
    since: float = attrs.field(factory=trio.current_time)
    waits_since: float = attrs.field(factory=trio.current_time)
    """When it began to wait for its model, for the last time."""
    granted: float | None = None
    """When the request was let through to its server; None: it waits."""
    look: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    """Its deadline is when the client is to be told something, as long as nothing has come from the server."""
    begun: bool = False
    """The head of the stream is ours."""
    looked_at: float = -math.inf
    said_at: float = -math.inf
    text: sse.LoadingText | None = None
    events: sse.WholeEvents | None = None
    """What of the stream may pass; None: no stream of events, or none that we could add to."""
    nursery: trio.Nursery = attrs.field(init=False)
    """Whose tasks end with it."""

    @property
    def manner(self) -> Manner:
        """As it is by now: the request may go on with another model than the one that it waited for."""
        return self.how()

    async def run(self) -> None:
        hand, take = trio.open_memory_channel[Piece](HAND_OVER)
        with take:  # for as long as the reader is there: what it says when all has been said already does no harm
            async with trio.open_nursery() as self.nursery:
                self.nursery.start_soon(self._read, hand)
                failure = await self._write(take)
                self.nursery.cancel_scope.cancel(reason="answered")
        if failure is not None:
            raise failure

    async def _end_when_closing(self, closing: Callable[[], Awaitable[None]]) -> None:
        await closing()
        await trio.sleep(LAST_CHANCE)
        self.row.end(ShuttingDown())

    # ---- the reader --------------------------------------------------------------------------

    async def _read(self, hand: trio.MemorySendChannel[Piece]) -> None:
        """Everything the model server says, then `End` or the error as a value."""
        async with hand:
            try:
                with self.row.cancellable():
                    if not await self._attempt(hand):
                        logger.info("retry on a fresh start model=%s", self.manner.model)
                        self._wait_again()
                        await self._attempt(hand, last=True)
                self.manner.over()  # in the step in which the last piece was handed over
                await _pass(hand, End())
            except TrioswapError as exc:
                await _pass(hand, exc)

    async def _attempt(self, hand: trio.MemorySendChannel[Piece], *, last: bool = False) -> bool:
        """Forward once; False: the model server died before its first byte, so try again."""
        async with self.source() as held:
            call, closing = self.call(), self.manner.closing
            if closing is not None:  # not before: who waits for a model of ours may go on with a peer's
                self.nursery.start_soon(self._end_when_closing, closing)
            self.granted = trio.current_time()
            self.look.deadline = self._next_look()
            # What follows a stream that is ours must be readable without more ado, and it may be so by then.
            ours = self.begun or (self.manner.stream and self.manner.heartbeat is not None)
            headers = _without(call.headers, b"accept-encoding") if ours else call.headers
            try:
                async with held.upstream.request(call.method, call.target, headers, call.body) as response:
                    held.answered(response.status)
                    await _relay(hand, response)
                return True
            except UpstreamFailed as exc:  # the end of a peer is told by nobody
                if last or not exc.before_first_byte or isinstance(exc, UpstreamTimedOut):
                    raise
                if not await held.has_died():
                    raise
        return False

    def _wait_again(self) -> None:
        """Its server has died: it waits for the next one like any other."""
        self.granted, self.waits_since = None, trio.current_time()
        self.look.deadline = self._next_look()

    # ---- the writer --------------------------------------------------------------------------

    async def _write(self, take: trio.MemoryReceiveChannel[Piece]) -> TrioswapError | None:
        """Returns the error that came before anything was sent."""
        match first := await self._first(take):
            case Head() if self.begun and not first.continues_stream:
                await self._explain(first, take)
                return None
            case Head():
                await self._start(first, take)
            case TrioswapError():
                return await self._fail(first)
            case _:
                raise AssertionError(f"a response begins with its head, not with {first!r}")
        while True:
            match await _next(take):
                case bytes() if self.row.failure is not None:  # a slow client need not have the rest first
                    return await self._fail(self.row.failure)
                case bytes() as piece:
                    await self.exchange.write(piece if self.events is None else self.events.feed(piece))
                case End():
                    await self.exchange.finish(b"" if self.events is None else self.events.rest())
                    return None
                case TrioswapError() as error:
                    return await self._fail(error)

    async def _start(self, head: Head, take: trio.MemoryReceiveChannel[Piece]) -> None:
        if self.text is not None and self.begun:
            await self._say(self.text.end(trio.current_time() - self.since))
        if head.continues_stream and not head.has_length:
            self.events = sse.WholeEvents()
        if not self.begun:
            # Not to wait for a body that has not begun: the client is to know at once that it was heard.
            start = self.exchange.begin if take.statistics().current_buffer_used else self.exchange.start
            await start(head.status, [*_response_headers(head), *self._timing()])

    async def _fail(self, error: TrioswapError) -> TrioswapError | None:
        """*error*, if it can still be the answer; else it ends what has begun."""
        if self.exchange.status is None:
            return error
        if self.events is not None and self.events.is_over:
            logger.info("failed behind its last event request=%s: %s", self.exchange.request_id, error)
            await self.exchange.finish()
            return None
        logger.warning("response broken off request=%s: %s", self.exchange.request_id, error)
        if self.events is not None and self.events.is_clean:
            await self._say(sse.error_event(self.manner.dialect, error))
            await self.exchange.finish()
        return None

    async def _explain(self, head: Head, take: trio.MemoryReceiveChannel[Piece]) -> None:
        """An answer that cannot follow the stream we have begun: say what it says as an error event."""
        body = b""
        async for piece in take:
            if not isinstance(piece, bytes) or len(body) > _ERROR_LIMIT:
                break
            body += piece
        await self._say(sse.upstream_error_event(self.manner.dialect, head.status, body[:_ERROR_LIMIT]))
        await self.exchange.finish()

    def _timing(self) -> Headers:
        """How long the request waited before it was let through (W3C Server Timing)."""
        waited = 0.0 if self.granted is None else self.granted - self.since
        return [(b"server-timing", b"queue;dur=%.0f" % (waited * 1000))] if waited >= 0.001 else []

    # ---- while it waits ------------------------------------------------------------------------

    async def _first(self, take: trio.MemoryReceiveChannel[Piece]) -> Piece:
        """The first piece; meanwhile the client is told how things stand, or that it waits for too long."""
        while True:
            with trio.CancelScope(deadline=self._next_look()) as self.look:
                return await take.receive()
            if (failure := self._out_of_time()) is not None:
                return failure
            if trio.current_time() >= self._next_look():  # what was to be told may have changed in this very moment
                await self._tell()

    def _next_look(self) -> float:
        times = [math.inf]
        manner = self.manner
        if self.granted is None:
            times += [self.waits_since + manner.limit, math.inf if self.begun else self.waits_since + manner.patience]
        if manner.stream and manner.heartbeat is not None:
            times.append(max(self.since, self.said_at) + manner.heartbeat)
        if manner.stream and manner.text is not None and self.granted is None:
            times.append(max(self.since, self.looked_at + _TEXT_EVERY))
        return min(times)

    def _out_of_time(self) -> TrioswapError | None:
        """The answer for who has waited as long as it may, or as it wants to."""
        if self.granted is not None:
            return None
        now, manner = trio.current_time(), self.manner
        # The very sums of `_next_look`: a difference may be rounded to less, and the next look would be at once.
        too_long = now >= self.waits_since + manner.limit
        if not too_long and (self.begun or now < self.waits_since + manner.patience):
            return None
        progress = manner.progress()
        retry_after = max(1, (progress.expected if progress is not None else None) or 1)
        if too_long:
            return QueueTimedOut(manner.model, manner.limit, retry_after)
        return StillLoading(manner.model, {} if progress is None else progress.document(), retry_after)

    async def _tell(self) -> None:
        manner, now = self.manner, trio.current_time()
        waited = now - self.since
        progress = manner.progress() if self.granted is None else None
        if progress is None:  # it has just come, or is with its server by now
            stage = "queued" if self.granted is None else sse.PROCESSING
            progress = sse.Progress(manner.model, stage, waited=waited)
        words = b""
        if manner.text is not None and self.granted is None:
            self.text = self.text or manner.text()
            words = self.text.tell(progress)
        if not words and manner.heartbeat is not None and now >= max(self.since, self.said_at) + manner.heartbeat:
            words = sse.comment(progress)
        self.looked_at = now
        if words:
            self.said_at = now
            await self._say(words)

    async def _say(self, words: bytes) -> None:
        """Write *words* of our own into the stream, which begins with them if it has not."""
        if not words:
            return
        if self.exchange.status is None:
            self.begun, self.events = True, sse.WholeEvents()
            await self.exchange.begin(200, _STREAM_HEAD)
        await self.exchange.write(words)


async def _relay(hand: trio.MemorySendChannel[Piece], response: Answer) -> None:
    await _pass(hand, Head(response.status, list(response.headers)))
    async for chunk in response.chunks():
        await _pass(hand, chunk)


async def _pass(hand: trio.MemorySendChannel[Piece], piece: Piece) -> None:
    """Hand *piece* over; no checkpoint while there is room, so that what came together goes on together."""
    try:
        hand.send_nowait(piece)
    except trio.WouldBlock:
        await hand.send(piece)


async def _next(take: trio.MemoryReceiveChannel[Piece]) -> Piece:
    """The next piece; no checkpoint if it is there."""
    try:
        return take.receive_nowait()
    except (trio.WouldBlock, trio.EndOfChannel):  # the reader ends without a word when both are cancelled
        return await take.receive()


def _response_headers(head: Head) -> Headers:
    """What the client sees of the model server's headers; proxies must not buffer events."""
    kept = [(name, value) for name, value in without_cors(head.headers) if name not in _OURS]
    if head.is_events:
        kept = [*_without(kept, b"x-accel-buffering"), (b"x-accel-buffering", b"no")]
    return kept


def _without(headers: Headers, unwanted: bytes) -> Headers:
    return [(name, value) for name, value in headers if name.lower() != unwanted]
