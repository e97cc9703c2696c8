"""What forwarding needs of who answers, be it a model server of ours or a peer.

*Origin* as in RFC 9110, 3.6 and 3.7: the server that a gateway asks on behalf of its client.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from trioswap.request import Body

Header = tuple[bytes, bytes]


class Answer(Protocol):
    """The head of an answer, and its body as it comes."""

    @property
    def status(self) -> int:
        """Never an interim (1xx) one."""
        ...

    @property
    def headers(self) -> Sequence[Header]:
        """Names in small letters; without the fields that concern one connection only."""
        ...

    def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes, still in its Content-Encoding, never waiting for more than there is.

        Raises (while iterated):
            ModelError: the body broke off; what came before must not be taken for all of it.
        """
        ...


class Origin(Protocol):
    """Answers requests; its errors tell by `before_first_byte` whether a request may be sent again."""

    @property
    def base_url(self) -> str:
        """Where it is, for what is asked in another way: websockets."""
        ...

    def request(
        self, method: str, target: bytes, headers: Sequence[Header], body: bytes | Body
    ) -> AbstractAsyncContextManager[Answer]:
        """Send one request; the answer's head is there on entry, its body may be read inside the block.

        *target* is path and query as the client wrote them.  Leaving the block early, by
        whatever way, closes the connection at once, which tells the server to stop.

        Raises:
            ModelError: no connection, no answer, or none in time.
            BadRequest: the request cannot be expressed in HTTP/1.1.
        """
        ...
