"""Serve one request by its model: lease, forward, stream.

Two tasks share the work.  The *reader* holds the lease and reads the model server; the
*writer* sends to the client.  Between them is a short bounded hand-over.  The split is
there because a send to a client that does not read cannot be cancelled: so the lease
belongs to the task that can be, and a drain deadline takes it back at once whatever the
client does (invariant I10).

First-byte rule (I14): before the head of the response is handed over, a failure becomes a
proper status, or one retry when the model server died; after it the response is broken off.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

import attrs
import trio

from trioswap.asgi import Exchange
from trioswap.errors import TrioswapError, UpstreamFailed
from trioswap.group import Lease
from trioswap.request import Call, Headers
from trioswap.upstream import UpstreamResponse

logger = logging.getLogger(__name__)

# Pieces (of at most one read each) between the reader and a client that is slower.
HAND_OVER = 8
# A dying server breaks its connections a moment before its supervisor sees it end.
DEATH_NOTICE = 2.0
# Response headers that are ours to send: the date of this response, and the id that our log knows.
OUR_HEADERS = frozenset({b"date", b"x-request-id"})

Leaser = Callable[[str], AbstractAsyncContextManager[Lease]]


@attrs.frozen
class Head:
    """Status and headers of the model server's response."""

    status: int
    headers: Headers


class End:
    """The response is complete."""


Piece = Head | bytes | End | TrioswapError


async def forward(exchange: Exchange, lease: Leaser, model: str, call: Call) -> None:
    """Answer *exchange* with what *model* says to *call*; end early when the client leaves.

    Raises:
        TrioswapError: nothing has been sent yet and this is the answer.
    """
    hand, take = trio.open_memory_channel[Piece](HAND_OVER)

    async def answer() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_read, hand, lease, model, call)
            failure = await _write(exchange, take)
            nursery.cancel_scope.cancel(reason="answered")
        if failure is not None:
            raise failure

    await exchange.while_connected(answer)


async def _read(hand: trio.MemorySendChannel[Piece], lease: Leaser, model: str, call: Call) -> None:
    """The reader: everything the model server says, then `End` or the error as a value."""
    async with hand:
        try:
            if not await _attempt(hand, lease, model, call):
                logger.info("retry on a fresh start model=%s", model)
                await _attempt(hand, lease, model, call, last=True)
            await hand.send(End())
        except TrioswapError as exc:
            await hand.send(exc)


async def _attempt(
    hand: trio.MemorySendChannel[Piece], lease: Leaser, model: str, call: Call, *, last: bool = False
) -> bool:
    """Forward once; False: the model server died before its first byte, so try again."""
    async with lease(model) as held:
        try:
            async with held.upstream.request(call.method, call.target, call.headers, call.body) as response:
                await _relay(hand, response)
            return True
        except UpstreamFailed as exc:
            if last or not exc.before_first_byte:
                raise
            with trio.move_on_after(DEATH_NOTICE):
                await held.dead.wait()
            if not held.dead.is_set():
                raise
    return False


async def _relay(hand: trio.MemorySendChannel[Piece], response: UpstreamResponse) -> None:
    await hand.send(Head(response.status, response.headers))
    async for chunk in response.chunks():
        await hand.send(chunk)


async def _write(exchange: Exchange, take: trio.MemoryReceiveChannel[Piece]) -> TrioswapError | None:
    """The writer; returns the error that came before anything was sent."""
    async with take:
        async for piece in take:
            match piece:
                case Head(status, headers):
                    await exchange.start(status, _response_headers(headers))
                case bytes():
                    await exchange.write(piece)
                case End():
                    await exchange.finish()
                case TrioswapError() if exchange.status is None:
                    return piece
                case TrioswapError():
                    logger.warning("response broken off request=%s: %s", exchange.request_id, piece)
    return None


def _response_headers(headers: Headers) -> Headers:
    """What the client sees of the model server's headers; proxies must not buffer events."""
    kept = [(name, value) for name, value in headers if name.lower() not in OUR_HEADERS]
    if any(name.lower() == b"content-type" and b"text/event-stream" in value for name, value in headers):
        kept.append((b"x-accel-buffering", b"no"))
    return kept
