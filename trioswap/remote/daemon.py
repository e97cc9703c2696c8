"""The command line's clients of a running daemon."""

from __future__ import annotations

import json
import os
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, Final

import attrs
import httpx  # noqa: TID251 - the package is the one that may

from trioswap.config.mistakes import shown
from trioswap.connection import reason, tls_reason
from trioswap.errors import DaemonRefused, DaemonUnreachable, Misuse

# Seconds until the command line says that no daemon is there.
CONNECT_TIMEOUT: Final = 5.0

DaemonClient = httpx.Client


@contextmanager
def daemon_client(base_url: str, api_key: str | None) -> Iterator[DaemonClient]:
    """A client of the daemon at *base_url*, which may be `unix:/PATH`, for the command line.

    Waits for answers as long as it takes, because loading a model may take minutes.

    Raises:
        Misuse: *base_url* is no address, or the file in TRIOSWAP_CA_FILE holds no certificates.
        DaemonUnreachable: inside the block a request found no daemon, or its answer broke off.
        DaemonRefused: inside the block an answer was other than 2xx.
    """

    def check(response: httpx.Response) -> None:
        if not response.is_success:
            response.read()
            raise _refusal(response)

    settings = _settings(base_url, api_key, httpx.HTTPTransport)
    with _translated(base_url), httpx.Client(**settings, event_hooks={"response": [check]}) as client:
        yield client


@attrs.frozen
class Loan:
    """Memory that the daemon holds for us."""

    environment: Mapping[str, str]
    """What makes a program see just the GPUs that it holds memory of."""
    wait_ended: Callable[[], Awaitable[None]]
    """Returns when the daemon takes it back, or is gone."""


@asynccontextmanager
async def memory_loan(base_url: str, api_key: str | None, wish: Mapping[str, object]) -> AsyncIterator[Loan]:
    """Borrow memory for the length of the block; waits until it is there, as long as it takes.

    Raises:
        Misuse, DaemonUnreachable, DaemonRefused: as in `daemon_client`, before the block begins.
    """

    async def check(response: httpx.Response) -> None:
        if not response.is_success:
            await response.aread()
            raise _refusal(response)

    settings = _settings(base_url, api_key, httpx.AsyncHTTPTransport)
    with _translated(base_url):
        async with (
            httpx.AsyncClient(**settings, event_hooks={"response": [check]}) as client,
            client.stream("POST", "/api/hold", json=wish) as answer,
        ):
            lines = answer.aiter_lines()
            try:
                environment = dict(json.loads(await anext(lines, ""))["environment"])
            except (ValueError, LookupError, TypeError):
                raise DaemonRefused(f"what answers at {base_url} is not trioswap, or has just ended") from None

            async def wait_ended() -> None:
                with suppress(httpx.TransportError):
                    async for _ in lines:
                        pass

            yield Loan(environment, wait_ended)


def _settings(base_url: str, api_key: str | None, transport: Callable[..., Any]) -> dict[str, Any]:
    """What both kinds of clients are made with; *transport* is the one of the kind.

    Raises:
        Misuse: *base_url* is no address, or the file in TRIOSWAP_CA_FILE holds no certificates.
    """
    path = base_url.removeprefix("unix:")
    if path == base_url and not base_url.lower().startswith(("http://", "https://")):
        raise Misuse(f"--url: found {shown(base_url)}, allowed is http[s]://HOST[:PORT] or unix:/PATH")
    where = {"base_url": base_url, "verify": _trust()}
    if path != base_url:
        where = {"base_url": "http://trioswap", "transport": transport(uds=path)}
    return {
        **where,
        "headers": {b"authorization": f"Bearer {api_key}".encode()} if api_key else None,
        "timeout": httpx.Timeout(CONNECT_TIMEOUT, read=None),
        "trust_env": False,
    }


def _trust() -> ssl.SSLContext:
    """Whom the system trusts, and the certificates of one's own."""
    context = ssl.create_default_context()
    file = os.environ.get("TRIOSWAP_CA_FILE")
    if not file:
        return context
    try:
        context.load_verify_locations(file)
    except OSError as exc:  # ssl.SSLError is one
        raise Misuse(f"TRIOSWAP_CA_FILE: {file} holds no certificates that can be read: {exc}") from None
    return context


@contextmanager
def _translated(base_url: str) -> Iterator[None]:
    try:
        yield
    except (httpx.TransportError, httpx.InvalidURL) as exc:
        raise DaemonUnreachable(base_url, _why(exc)) from exc


def _why(exc: Exception) -> str:
    """What went wrong, and for TLS what to do about it."""
    why = tls_reason(exc)
    if why is None:
        return reason(exc)
    if why.startswith("certificate verify failed"):
        return f"{why}; TRIOSWAP_CA_FILE can name a file with the certificate of who signed it"
    return f"TLS failed: {why}" + ("; is it http:// rather than https://?" if why == "wrong version number" else "")


def _refusal(response: httpx.Response) -> DaemonRefused:
    try:
        return DaemonRefused(str(response.json()["error"]["message"]))
    except (ValueError, LookupError, TypeError):  # not from trioswap
        what = f"{response.url} answered {response.status_code} {response.reason_phrase}"
        return DaemonRefused(f"{what}; is that trioswap?")
