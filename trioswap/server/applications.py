"""The application calls of one connection: what each receives, and what it has to say in the end.

Hypercorn's task group with three repairs.  http.disconnect overtakes what the application has not
read, and never waits (`Inbox`); sending a body is always a checkpoint; and the body of a request must make
progress (`Upload`), on HTTP/2 as well, where the connection itself never looks idle meanwhile.  The head of
an answer waits for the first piece of its body, as the specification of ASGI asks for ("Response Start"); an
application that has none yet sends an empty one.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final

import attrs
import trio
from hypercorn.config import Config  # noqa: TID251 - this package is the one that may
from hypercorn.trio.task_group import TaskGroup  # noqa: TID251
from hypercorn.trio.worker_context import EventWrapper, WorkerContext  # noqa: TID251
from hypercorn.typing import AppWrapper, ASGIReceiveEvent, ASGISendEvent, Scope  # noqa: TID251

from trioswap.bounded import Inbox, Patience

logger = logging.getLogger(__name__)

# Bytes of a body that buy a second of waiting for more: what Apache's mod_reqtimeout asks for (body=20,MinRate=500).
MIN_BODY_RATE: Final = 500
_TOO_SLOW: Final = b"the body of the request came too slowly, or not at all\n"

Send = Callable[[ASGISendEvent | None], Awaitable[None]]
SendBoth = Callable[[Send, ASGISendEvent, ASGISendEvent], Awaitable[None]]
"""Has Hypercorn send the head of an answer, and what the application says next."""

_HTTP_LEFT: Final[ASGIReceiveEvent] = {"type": "http.disconnect"}
_WS_LEFT: Final[ASGIReceiveEvent] = {"type": "websocket.disconnect", "code": 1006}


class Context(WorkerContext):
    """What the protocols of all connections share; `terminated` means that shutdown has begun."""

    def __init__(self, patience: Patience) -> None:
        super().__init__(None)
        self.patience = patience

    def terminate_nowait(self) -> None:
        """Begin the shutdown."""
        assert isinstance(self.terminated, EventWrapper)
        self.terminated._event.set()  # Hypercorn's own `set` is async without need


@attrs.define(eq=False)
class Upload:
    """What the application receives of one HTTP request, whose body may not take for ever.

    The client has `stall` seconds in hand.  Waiting for the body spends them, `MIN_BODY_RATE` bytes
    bring a second back: so neither silence nor a dribble lasts.  Only the time in which the
    application waits counts, so one that is slow itself cuts nobody off.
    """

    inbox: Inbox
    stall: float
    """Seconds."""
    late: bool = False
    """The application was told that the client had left, because its body made no progress."""
    _in_hand: float = attrs.field(init=False)
    _over: bool = False
    """The body has come, or is given up."""

    @_in_hand.default
    def _full(self) -> float:
        return self.stall

    async def receive(self) -> Any:
        """The next message: the application's `receive`."""
        if not self._over and not self.inbox.has_news:
            await self._wait()
        message = await self.inbox.get()
        if not self._over:
            self._count(message)
        return message

    async def _wait(self) -> None:
        """Wait for news of the body; for want of progress the client counts as gone."""
        begun = trio.current_time()
        with trio.move_on_after(self._in_hand) as wait:
            try:
                await self.inbox.wait()
            finally:
                self._in_hand -= trio.current_time() - begun
        if wait.cancelled_caught:
            self.late = True
            await self.inbox.put(_HTTP_LEFT)

    def _count(self, message: Any) -> None:
        self._over = not message.get("more_body", False)
        self._in_hand = min(self.stall, self._in_hand + len(message.get("body", b"")) / MIN_BODY_RATE)


class Applications(TaskGroup):
    """The application calls of one connection, each with its own `Inbox`."""

    def __init__(self, body_stall: float, send_both: SendBoth) -> None:
        super().__init__()
        self._body_stall, self._send_both = body_stall, send_both
        self._inboxes: dict[Inbox, ASGIReceiveEvent] = {}

    async def spawn_app(
        self, app: AppWrapper, config: Config, scope: Scope, send: Send
    ) -> Callable[[ASGIReceiveEvent], Awaitable[None]]:
        """Call *app* on *scope* in a task of its own; return what gives it messages."""
        assert self._nursery is not None
        inbox = Inbox(config.max_app_queue_size)
        self._nursery.start_soon(self._call, app, scope, inbox, send)
        self._inboxes[inbox] = _WS_LEFT if scope["type"] == "websocket" else _HTTP_LEFT
        return inbox.put

    async def disconnect(self) -> None:
        """Tell all calls that the client has left: Hypercorn does not tell a websocket that it has refused."""
        for inbox, message in list(self._inboxes.items()):
            await inbox.put(message)

    async def _call(self, app: AppWrapper, scope: Scope, inbox: Inbox, send: Send) -> None:
        answered, head = False, None

        async def send_and_yield(message: ASGISendEvent) -> None:
            # Hypercorn's send does nothing, not even a checkpoint, for some clients that have gone, and our
            # writes are shielded: an application that only sends would stop the process, or not be cancelled.
            nonlocal answered, head
            if message["type"] == "http.response.start" and not answered:
                answered, head = True, message
                return
            answered = True
            await trio.lowlevel.checkpoint()
            if head is None:
                await send(message)
            else:
                first, head = head, None
                await self._send_both(send, first, message)

        upload = Upload(inbox, self._body_stall)
        receive = upload.receive if scope["type"] == "http" else inbox.get
        try:
            await app(scope, receive, send_and_yield, trio.to_thread.run_sync, trio.from_thread.run)
        except* Exception:
            logger.exception("the application failed on %s", scope.get("path"))
        del self._inboxes[inbox]
        if upload.late and not answered:
            await _refuse(send)
        if head is not None:
            await send(head)
        await send(None)  # Hypercorn's "the application has returned": answers 500, or ends what was cut short


async def _refuse(send: Send) -> None:
    headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(_TOO_SLOW))]
    await send({"type": "http.response.start", "status": 408, "headers": headers})
    await send({"type": "http.response.body", "body": _TOO_SLOW, "more_body": False})
