"""Asks model servers whether they are ready.

When a probe is due, and how many may fail, is decided by the supervisor.
"""

from __future__ import annotations

from typing import Final

import httpx  # noqa: TID251 - the package is the one that may
import trio

from trioswap.connection import reason

# Seconds for one probe.  A server that needs longer for a health check is not ready, and the next probe asks again.
PROBE_TIMEOUT: Final = 5.0


class Prober:
    """Asks model servers whether they are ready.  One serves all of them."""

    def __init__(self) -> None:
        # Made by the first probe: httpx needs some 30 ms for it, and meanwhile the model server still starts.
        self._client: httpx.AsyncClient | None = None

    async def ready(self, url: str) -> str | None:
        """None when a GET of *url* is answered with exactly 200 within 5 s, else why not, in a few words."""
        with trio.move_on_after(PROBE_TIMEOUT):
            try:
                status = await self._status(url)
            except httpx.TransportError as exc:
                return reason(exc)
            return None if status == 200 else f"answered {status}"
        return f"no answer within {PROBE_TIMEOUT:.0f} s"

    async def aclose(self) -> None:
        """Close the client; no probe may be under way."""
        if self._client is not None:
            await self._client.aclose()

    async def _status(self, url: str) -> int:
        if self._client is None:
            self._client = _probe_client()
        # The head is enough, and a body could be endless.
        async with self._client.stream("GET", url) as response:
            return response.status_code


def _probe_client() -> httpx.AsyncClient:
    return httpx.AsyncClient(
        verify=False,  # noqa: S501 - health is asked, nothing secret told; local servers sign their own certificates
        trust_env=False,  # a proxy would answer for the server
        timeout=None,  # noqa: S113 - the deadline is around the whole probe
        follow_redirects=False,
        # A connection kept open might belong to an earlier process on the same port.
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
    )
