"""One request to a peer and its answer, between what forwarding wants and what httpcore offers."""

from __future__ import annotations

import math
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import suppress
from typing import Final

import attrs
import httpcore  # noqa: TID251 - the package is the one that may
import trio

from trioswap.errors import PeerFailed
from trioswap.origin import Header
from trioswap.remote.wire import Broken, Wire
from trioswap.request import Body

# Bytes of a request's body that are read and sent at a time.  Each piece that is taken counts as progress.
PIECE: Final = 256 * 1024
# What httpcore raises for what the other end does.
FOREIGN: Final = (httpcore.NetworkError, httpcore.ProtocolError)


@attrs.frozen(eq=False)
class PeerResponse:
    """The head of a peer's answer, and its body as it comes."""

    status: int
    headers: list[Header]
    """Names in small letters; without the fields that concern one connection only."""
    _pieces: Pieces

    def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes, still in its Content-Encoding, never waiting for more than there is.

        Raises (while iterated):
            PeerFailed: the body broke off; what came before must not be taken for all of it.
        """
        return self._pieces


@attrs.define(eq=False)
class Pieces:
    """The body of one answer: an iterator with nothing to clean up, in front of generators that have."""

    _peer: str
    _response: httpcore.Response
    _source: AsyncIterator[bytes] = attrs.field(init=False)
    _left: bool = attrs.field(default=False, init=False)

    @_source.default
    def _(self) -> AsyncIterator[bytes]:
        assert isinstance(self._response.stream, AsyncIterable)
        return aiter(self._response.stream)

    def __aiter__(self) -> Pieces:
        return self

    async def __anext__(self) -> bytes:
        assert not self._left, "a body is read inside the block of its request"
        try:
            return await anext(self._source)
        except (Broken, *FOREIGN) as exc:
            raise PeerFailed(self._peer, f"its answer broke off: {exc}", before_first_byte=False) from exc

    async def leave(self) -> None:
        """End the exchange: keep its connection when all has been said, else close it at once.

        httpcore's generators, several deep, must not be left half way: Trio would finish them
        some time later.  With the wire hung up they come to their end now, and without waiting.
        """
        self._left = True
        wire = self._response.extensions.get("network_stream")
        if isinstance(wire, Wire):
            wire.hang_up()
            with suppress(Broken, *FOREIGN):
                async for _ in self._source:
                    pass
        await self._response.aclose()


@attrs.define(eq=False)
class Upload:
    """A request's body on its way to httpcore; gives *scope* a new deadline with each piece that is taken."""

    _body: bytes | Body
    _limit: float | None
    """Seconds without progress, and then for the head of the answer."""
    _scope: trio.CancelScope
    _offset: int = attrs.field(default=0, init=False)
    begun: bool = attrs.field(default=False, init=False)
    """There is a connection, and the head of the request is out."""
    complete: bool = attrs.field(default=False, init=False)

    def __aiter__(self) -> Upload:
        return self

    async def __anext__(self) -> bytes:
        self.begun = True
        self._scope.deadline = math.inf if self._limit is None else trio.current_time() + self._limit
        piece = await self._piece()
        if not piece:
            self.complete = True
            raise StopAsyncIteration
        self._offset += len(piece)
        return piece

    async def _piece(self) -> bytes:
        if isinstance(self._body, bytes):
            return self._body[self._offset : self._offset + PIECE]
        return await self._body.read(self._offset, PIECE)
