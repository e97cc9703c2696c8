"""Hypercorn's websocket of one client, with two repairs.

It tells the application how the client closed, where Hypercorn says 1006 to every close of a client's.  And it
agrees to no compression: deflating costs some 20 ms of everybody's time for each megabyte, most of what is large
here is compressed already, and what a few kilobytes may blow up to is not for a client to decide.
"""

from __future__ import annotations

import dataclasses

import hypercorn.protocol.h2  # noqa: TID251 - this package is the one that may
import hypercorn.protocol.h11  # noqa: TID251
from hypercorn.protocol.events import Event, Request, StreamClosed  # noqa: TID251
from hypercorn.protocol.ws_stream import WSStream  # noqa: TID251
from wsproto.connection import ConnectionState
from wsproto.events import CloseConnection
from wsproto.events import Event as FrameEvent

_EXTENSIONS = b"sec-websocket-extensions"


class WebsocketStream(WSStream):
    """One websocket."""

    _said: CloseConnection | None = None
    """The client's close frame."""

    async def handle(self, event: Event) -> None:
        """As Hypercorn's."""
        if isinstance(event, Request):
            kept = [(name, value) for name, value in event.headers if name.lower() != _EXTENSIONS]
            await super().handle(dataclasses.replace(event, headers=kept))
        elif isinstance(event, StreamClosed) and self._said is not None and not self.closed:
            self.closed = True
            message = {"type": "websocket.disconnect", "code": int(self._said.code), "reason": self._said.reason or ""}
            assert self.app_put is not None
            await self.app_put(message)
        else:
            await super().handle(event)

    async def _send_wsproto_event(self, event: FrameEvent) -> None:
        if isinstance(event, CloseConnection) and self.connection.state is ConnectionState.REMOTE_CLOSING:
            self._said = event  # the answer repeats what the client said
        await super()._send_wsproto_event(event)


def install() -> None:
    """Have Hypercorn's protocols make these from now on; they take no class as an argument."""
    for module in (hypercorn.protocol.h11, hypercorn.protocol.h2):
        assert "WSStream" in vars(module)
        vars(module)["WSStream"] = WebsocketStream
