"""One websocket of a client over ASGI: accept or refuse, receive, send, close."""

from __future__ import annotations

import json
from typing import Final

import attrs
import trio

from trioswap.errors import Cancelled, LeaseCut, ShuttingDown, TrioswapError
from trioswap.incoming import Incoming, Receive, Send
from trioswap.request import Headers
from trioswap.websocket import CLOSE_GRACE, Closed, Message

# Close codes that never travel (RFC 6455, 7.4.1), and what is said instead: that it was well, or that
# it was not.  ASGI has no way to close without a code.
_UNSPEAKABLE: Final = {1005: 1000, 1006: 1011, 1015: 1011}
# Bytes of a reason in UTF-8; a close frame has 125, and the code takes two (RFC 6455, 5.5).
MAX_REASON: Final = 123


@attrs.define(eq=False)
class Socket(Incoming):
    """A websocket that a client asks for, until its end."""

    _receive: Receive
    _send: Send
    end: Closed | None = None
    """What ended it: the client's close, or ours; None: it goes on."""

    @property
    def subprotocols(self) -> list[str]:
        """What the client offers to speak, best first."""
        return list(self.scope["subprotocols"])

    @property
    def accepted(self) -> bool:
        """Messages may be sent."""
        return self.status == 101

    async def accept(self, subprotocol: str | None, headers: Headers | None = None) -> None:
        """Answer the handshake: the websocket is open.  *subprotocol* is one of those offered."""
        self.status = 101
        self.response_headers = [*(headers or []), *self.ours()]
        await self._send({"type": "websocket.accept", "subprotocol": subprotocol, "headers": self.response_headers})

    async def receive(self) -> Message | Closed:
        """The next message, or how the client ended the websocket, also before it is accepted."""
        while True:
            message = await self._receive()
            if message["type"] == "websocket.disconnect":
                self.left = True
                closed = Closed(message.get("code") or 1005, message.get("reason") or "")
                self.end = self.end or closed
                return closed
            if message["type"] == "websocket.receive":
                text = message.get("text")
                return str(text) if text is not None else bytes(message["bytes"])

    async def send(self, message: Message) -> None:
        """Send one message.  To a client that has gone, nothing."""
        self.sent += len(message)
        kind = "text" if isinstance(message, str) else "bytes"
        await self._send({"type": "websocket.send", kind: message})

    async def close(self, code: int, reason: str = "") -> None:
        """Close an accepted websocket, and wait a moment for the client to do the same.

        Without that the connection could be reset, and the close frame lost, because of what the client
        sends at the same time.  No other task may be receiving.
        """
        if self.end is not None:
            return
        code, reason = _UNSPEAKABLE.get(code, code), _shortened(reason)
        self.end = Closed(code, reason)
        await self._send({"type": "websocket.close", "code": code, "reason": reason})
        with trio.move_on_after(CLOSE_GRACE):
            while not isinstance(await self.receive(), Closed):
                pass

    async def refuse(self, status: int, headers: Headers, body: bytes) -> None:
        """Answer the handshake with an ordinary response."""
        self.status = status
        if "websocket.http.response" not in self.scope.get("extensions", {}):
            await self._send({"type": "websocket.close"})  # before the handshake: the client sees 403
            return
        kept = [(name, value) for name, value in headers if name.lower() not in (b"content-length", b"connection")]
        ours = [
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
            *self.ours(),
        ]
        await self._send({"type": "websocket.http.response.start", "status": status, "headers": [*kept, *ours]})
        await self._send({"type": "websocket.http.response.body", "body": body, "more_body": False})

    async def fail(self, error: TrioswapError) -> None:
        """Say *error*: as a response when nothing was answered yet, else as the reason of the end."""
        if self.accepted:
            await self.close(close_code(error), error.message)
        elif not self.left and self.status is None:
            head = [(b"content-type", b"application/json"), *error.headers()]
            await self.refuse(error.status, head, json.dumps(error.openai_body()).encode())


def close_code(error: TrioswapError) -> int:
    """The code that says in a close frame what *error* says in a response (IANA's registry of close codes).

    1001 "going away", 1012 "service restart", else 1011 "internal error".  There is 1014, "bad gateway",
    but it is younger, and some clients take it for a violation of the protocol.  What an operator ended
    has 1008, "policy violation", for after the others clients come again by themselves.
    """
    match error:
        case ShuttingDown():
            return 1001
        case LeaseCut():
            return 1012
        case Cancelled():
            return 1008
        case _:
            return 1011


def _shortened(reason: str) -> str:
    return reason.encode()[:MAX_REASON].decode(errors="ignore")
