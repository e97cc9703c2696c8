"""Hypercorn's HTTP/2 without its endless waits; HTTP/1.1 has h11 to keep order.

What is repaired here: a response that the application cuts short never ends, for a client that opens no
window everything is kept, and a shutdown may forestall the end of a response.  Here such streams are
reset, the application waits, the end comes first.  Left to others: the connection (server.connection).
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import h2.errors
import h2.events
import h2.exceptions
import trio
from hypercorn.events import Closed, Event  # noqa: TID251 - this package is the one that may
from hypercorn.protocol.events import Body, Data, EndBody, EndData, StreamClosed  # noqa: TID251
from hypercorn.protocol.events import Event as StreamEvent  # noqa: TID251
from hypercorn.protocol.h2 import BUFFER_HIGH_WATER, H2Protocol  # noqa: TID251
from hypercorn.protocol.http_stream import HTTPStream  # noqa: TID251
from hypercorn.protocol.ws_stream import WSStream  # noqa: TID251

from trioswap.server.applications import Context


class Http2(H2Protocol):
    """Hypercorn's HTTP/2, where no stream waits for ever, on either side."""

    context: Context

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._stalls: set[trio.CancelScope] = set()
        self._progress = trio.lowlevel.ParkingLot()

    async def handle(self, event: Event) -> None:
        """As Hypercorn's; it also lets go of who waits for a closed connection to take data."""
        await super().handle(event)
        if isinstance(event, Closed):
            for buffer in list(self.stream_buffers.values()):
                await buffer.close()
            self._progress.unpark_all()

    async def stream_send(self, event: StreamEvent) -> None:
        """As Hypercorn's; waits for the client to take it, and resets what was cut short or is not taken."""
        with self.context.patience.wait() as stall:
            self._stalls.add(stall)
            try:
                if isinstance(event, StreamClosed):
                    await self._reset_if_cut_short(event.stream_id)
                    await self._end_if_websocket(event.stream_id)
                await super().stream_send(event)
                while self._is_behind(event):
                    await self._progress.park()
            finally:
                self._stalls.discard(stall)
        if stall.cancelled_caught:
            await self._reset(event.stream_id, h2.errors.ErrorCodes.CANCEL)
            await self._close_stream(event.stream_id)

    def _is_behind(self, event: StreamEvent) -> bool:
        # Hypercorn wakes the writer whenever it looks at a stream, also if the window is shut, and
        # says "drained" before END_STREAM is written, which GOAWAY would then forestall in a shutdown.
        buffer = self.stream_buffers.get(event.stream_id)
        if buffer is None or self.closed:
            return False
        full = isinstance(event, Body | Data) and len(buffer.buffer) >= BUFFER_HIGH_WATER
        return full or isinstance(event, EndBody | EndData)

    async def _send_data(self, stream_id: int) -> None:
        buffer = self.stream_buffers.get(stream_id)
        before = len(buffer.buffer) if buffer is not None else 0
        await super()._send_data(stream_id)
        if buffer is not None and len(buffer.buffer) < before:
            # Of the whole connection: streams take turns, so one may well wait for a slow client's others.
            for stall in self._stalls:
                self.context.patience.renew(stall)
        self._progress.unpark_all()

    async def _handle_events(self, events: list[h2.events.Event]) -> None:
        # One by one, since handling one may end the stream of the next.  Hypercorn fails upon data
        # for a stream whose application has answered early; it is no fault of the client (RFC 9113, 8.1).
        for event in events:
            if isinstance(event, h2.events.DataReceived) and event.stream_id not in self.streams:
                self.connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            elif isinstance(event, h2.events.StreamEnded) and await self._end_if_websocket(event.stream_id):
                # As the end of a connection (RFC 8441, 5).  Hypercorn passes it over, and the websocket would live on.
                await self._close_stream(event.stream_id)
            else:
                await super()._handle_events([event])
                await self._tell_refused(event)
        await self._flush()

    async def _tell_refused(self, event: h2.events.Event) -> None:
        """Tell the application of a websocket that Hypercorn has refused, because data came before its answer."""
        if isinstance(event, h2.events.DataReceived):
            stream = self.streams.get(event.stream_id)
            if isinstance(stream, WSStream) and stream.closed:
                stream.closed = False  # or it would not tell
                await self._close_stream(event.stream_id)

    async def _reset_if_cut_short(self, stream_id: int) -> None:
        buffer = self.stream_buffers.get(stream_id)
        if buffer is None or buffer._complete or not isinstance(self.streams.get(stream_id), HTTPStream):
            return
        if buffer.buffer:
            await buffer.drain()
        await self._reset(stream_id, h2.errors.ErrorCodes.INTERNAL_ERROR)

    async def _end_if_websocket(self, stream_id: int) -> bool:
        """Let our side of a websocket end, which Hypercorn forgets when the client closes, behind what is unsent."""
        if not isinstance(self.streams.get(stream_id), WSStream):
            return False
        buffer = self.stream_buffers.get(stream_id)
        if buffer is not None and not buffer._complete:
            buffer.set_complete()
            await self._window_updated(stream_id)  # so that the sending task looks at the stream
        return True

    async def _reset(self, stream_id: int, code: h2.errors.ErrorCodes) -> None:
        with suppress(h2.exceptions.ProtocolError):  # the client was faster
            self.connection.reset_stream(stream_id, code)
        await self._window_updated(stream_id)  # so that the sending task looks at the stream, and forgets it
        await self._flush()
