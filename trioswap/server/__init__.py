"""Hypercorn, contained: accepts connections and lets Hypercorn's protocols speak HTTP on them.

The only importer of hypercorn.  It keeps Hypercorn's parsers (`hypercorn.protocol`) and
replaces what Hypercorn 0.18 does around them on Trio, because of what one client can do there:

* An exception in one connection's protocol code ends the process.  Here it ends the connection.
* A client that stops reading blocks a write for ever.  Here such a write gives up (`Patience`).
* A parser that waits (for the application to take a body, or to answer before the next request is
  parsed) does not see that the client left.  Here reading goes on ahead of the parser (`connection`),
  and http.disconnect overtakes what the application has not read, and never waits (`Inbox`).
* A client that sends slowly is waited for.  Here handshake, head and body are bounded.
* HTTP/2 has waits of its own (`http2`).

Left to others: sockets, certificates, signals and the deadline of a shutdown (daemon), requests (app).
"""

from __future__ import annotations

import logging
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import attrs
import trio
from hypercorn.app_wrappers import ASGIWrapper  # noqa: TID251 - this package is the one that may
from hypercorn.config import Config  # noqa: TID251

from trioswap.bounded import Patience
from trioswap.keepalive import probe_when_idle
from trioswap.server.applications import Context
from trioswap.server.connection import Connection, Limits
from trioswap.server.secure import Wire

__all__ = ["Application", "HttpServer"]

logger = logging.getLogger(__name__)

# Of a request head in bytes.  h11's 16 KiB is less than some proxies' cookies and long query strings.
MAX_REQUEST_HEAD: Final = 2**16

# ASGI messages are Any by nature.
Application = Callable[[Any, Any, Any], Awaitable[None]]


def _make_config() -> Config:
    config = Config()
    config.accesslog, config.errorlog = None, logger
    config.include_server_header = False
    config.h11_max_incomplete_size = MAX_REQUEST_HEAD
    return config


@attrs.define(eq=False, repr=False)
class HttpServer:
    """Serves one ASGI application on any number of listeners, once."""

    app: Application
    write_stall: float = 30.0
    """Seconds without progress after which a write gives up and the connection is closed."""
    shutdown_write_stall: float = 2.0
    """The same once shutdown has begun, for writes that stall already too."""
    keep_alive: float = 75.0
    """Seconds without a request after which a connection is closed.

    Longer than the idle timeouts of pooled clients, or they send a request into a closed
    connection; Hypercorn's default is 5. nginx has the same 75.
    """
    handshake: float = 10.0
    """Seconds that a TLS handshake may take; llama-swap grants the same where it is the client."""
    head: float = 30.0
    """Seconds from the first byte of a request's head to its last (nginx: 60); then the answer is 408.

    Of HTTP/1.1; on HTTP/2 the same is bounded by `keep_alive`.  Never longer than that.
    """
    body_stall: float = 30.0
    """Seconds that an application which waits for the body is kept without a byte of it; then the answer is 408.

    A body that comes in, but slower than `MIN_BODY_RATE`, uses them up too.
    """
    tls: Callable[[], ssl.SSLContext] | None = None
    """Asked for each new connection, so that certificates can change; None: plain HTTP.

    Connections over unix sockets are always plain: the mode of the socket file guards them.
    """
    _connections: set[Connection] = attrs.field(factory=set, init=False)
    _accepting: trio.CancelScope = attrs.field(factory=trio.CancelScope, init=False)
    _config: Config = attrs.field(factory=_make_config, init=False)
    _context: Context = attrs.field(init=False)

    @_context.default
    def _make_context(self) -> Context:
        return Context(Patience(self.write_stall))

    def __repr__(self) -> str:
        stage = "shutting down" if self._context.terminated.is_set() else "serving"
        return f"<HttpServer {stage}, {self.open_connections} open connections>"

    @property
    def open_connections(self) -> int:
        """Connections that have not ended, idle ones included."""
        return len(self._connections)

    async def run(
        self,
        listeners: Sequence[trio.SocketListener],
        *,
        task_status: trio.TaskStatus[list[trio.SocketListener]] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Accept and serve until `begin_shutdown` was called and the last connection has ended.

        Put a deadline around it: requests being served may take any time.  Cancelled, it
        ends within `shutdown_write_stall`, if the application lets itself be cancelled.
        Closes the listeners.
        """
        async with trio.open_nursery() as guard:
            guard.start_soon(self._context.patience.end_when_cancelled, self.shutdown_write_stall)
            async with trio.open_nursery() as connections:
                with self._accepting:
                    await trio.serve_listeners(
                        self._serve, list(listeners), handler_nursery=connections, task_status=task_status
                    )
            guard.cancel_scope.cancel(reason="all connections have ended")

    def begin_shutdown(self) -> None:
        """Stop accepting, close idle connections; the others end with the request they serve."""
        self._context.terminate_nowait()
        self._accepting.cancel(reason="shutdown")
        self._context.patience.shorten(self.shutdown_write_stall)
        for connection in self._connections:
            if connection.idle:
                connection.set_idle(True)

    async def _serve(self, stream: trio.SocketStream) -> None:
        try:
            connection = self._connection(stream)
            if stream.socket.family != socket.AF_UNIX:
                probe_when_idle(stream, self.keep_alive)
        except OSError:
            return
        self._connections.add(connection)
        try:
            await connection.run()
        except* Exception:
            logger.warning(
                "the connection from %s ended with an error in its protocol", connection.client, exc_info=True
            )
        finally:
            self._connections.discard(connection)
            stream.socket.close()

    def _connection(self, stream: trio.SocketStream) -> Connection:
        over_tcp = stream.socket.family != trio.socket.AF_UNIX
        context = self.tls() if self.tls is not None and over_tcp else None
        limits = Limits(self.handshake, self.head, self.body_stall, self.keep_alive)
        wire = Wire(stream, self._context.patience)
        return Connection(ASGIWrapper(self.app), self._config, self._context, wire, limits, context)
