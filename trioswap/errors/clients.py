"""The client's fault (4xx)."""

from __future__ import annotations

from typing import Any

from trioswap.errors.base import TrioswapError


class RequestError(TrioswapError):
    """The client sent something that cannot be served."""

    status = 400


class BadRequest(RequestError):
    """The request is malformed."""


class AmbiguousLength(BadRequest):
    """Where the request ends depends on who reads it; the connection is of no further use."""

    def __init__(self) -> None:
        super().__init__("Content-Length together with Transfer-Encoding is ambiguous; send one of them")

    def headers(self) -> list[tuple[bytes, bytes]]:
        """RFC 9112, 6.1: what follows may be meant as another's request."""
        return [(b"connection", b"close")]


class MissingModel(RequestError):
    """No model is named."""

    param = "model"

    def __init__(self) -> None:
        super().__init__('no model is named; put "model": "NAME" into the JSON body (GET /v1/models lists the names)')


class UnknownModel(RequestError):
    """The model is not configured."""

    status = 404
    param = "model"

    def __init__(self, model: str, suggestion: str | None = None) -> None:
        hint = f'; did you mean "{suggestion}"?' if suggestion else "; GET /v1/models lists the names"
        super().__init__(f'model "{model}" is not configured{hint}')
        self.model = model


class ModelRemoved(RequestError):
    """The model is not in the configuration any more that came while the request waited."""

    status = 404
    param = "model"

    def __init__(self, model: str) -> None:
        super().__init__(
            f'model "{model}" was removed from the configuration while this request waited; '
            "GET /v1/models lists those that are left"
        )
        self.model = model


class ConfigRejected(RequestError):
    """The configuration that was to be taken over has mistakes; the answer lists them."""

    status = 422

    def __init__(self, source: str, mistakes: list[str]) -> None:
        count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        super().__init__(f"nothing is reloaded, the configuration stays as it was; {source}: {count}")
        self.mistakes = mistakes

    def openai_body(self) -> dict[str, Any]:
        """With one line for each mistake."""
        body = super().openai_body()
        body["error"]["mistakes"] = self.mistakes
        return body


class NothingToReload(RequestError):
    """The daemon was started with a configuration that is in no file."""

    status = 409

    def __init__(self) -> None:
        super().__init__("this daemon has no configuration file to read again; restart it instead")


class PinnedToNobody(RequestError):
    """The active profile says that nobody answers to the name."""

    status = 404
    param = "model"

    def __init__(self, name: str, profile: str) -> None:
        super().__init__(f'nobody answers to "{name}" while profile "{profile}" is active')


class UnknownPath(RequestError):
    """No route has this path."""

    status = 404

    def __init__(self, path: str) -> None:
        super().__init__(f"no such path: {path}")


class WrongMethod(RequestError):
    """The path exists, but not for this method."""

    status = 405

    def __init__(self, method: str, path: str, allowed: list[str]) -> None:
        super().__init__(f"{method} is not allowed on {path}; use {' or '.join(allowed)}")
        self.allowed = allowed

    def headers(self) -> list[tuple[bytes, bytes]]:
        """RFC 9110, 15.5.6: the methods that would do."""
        return [(b"allow", ", ".join(self.allowed).encode())]


class BodyTooLarge(RequestError):
    """The request body passes the limit."""

    status = 413

    def __init__(self, limit: int, setting: str) -> None:
        super().__init__(f"the request body is larger than {limit} bytes ({setting})")


class StorageFull(RequestError):
    """The request body is larger than memory is meant for, and the disk does not take it (RFC 4918, 11.5)."""

    status = 507

    def __init__(self, where: str, why: str) -> None:
        super().__init__(
            f"the request body cannot be kept in {where}: {why}; make room there, or set TMPDIR to another directory"
        )


class Unauthorized(RequestError):
    """The client shows no key, or a wrong one."""

    status = 401

    def __init__(self) -> None:
        super().__init__("unauthorized: invalid or missing API key")

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Browsers ask for a password, which is the key (RFC 9110, 11.6.1)."""
        return [*super().headers(), (b"www-authenticate", b'Basic realm="trioswap"')]


class NotWaiting(RequestError):
    """No request of that name waits."""

    status = 404

    def __init__(self, request: str) -> None:
        super().__init__(
            f'request "{request}" does not wait: it is being served, or over, or there never was one; '
            "GET /api/queue lists those that wait"
        )


class NoBudget(RequestError):
    """Memory is asked for where it is not counted."""

    status = 409

    def __init__(self) -> None:
        super().__init__(
            "memory is not counted here, because groups or a matrix alone say which models may be resident; "
            "write [memory] into the configuration"
        )


class Forbidden(RequestError):
    """The client's key is known, but not enough for this."""

    status = 403

    def __init__(self, key: str, what: str) -> None:
        super().__init__(f'the key "{key}" may not {what}')


class ForeignOrigin(RequestError):
    """A web page of another origin asks for something that changes or costs something."""

    status = 403

    def __init__(self, origin: str) -> None:
        super().__init__(f"web pages of {origin} may not ask here; allow them under [cors] origins")


class NotLoaded(RequestError):
    """What may not load a model asks for one that is not loaded (invariant I12)."""

    status = 409

    def __init__(self, model: str, what: str) -> None:
        super().__init__(f'model "{model}" is not loaded, and {what} does not load it')


class TooManyRequests(RequestError):
    """As many requests as are let in, for this model or by this key, are here already."""

    status = 429

    def __init__(self, whose: str, limit: int, retry_after: int) -> None:
        super().__init__(f"{whose} has {limit} requests already, and no more are let in; try again in {retry_after} s")
        self.retry_after = retry_after


class Cancelled(RequestError):
    """An operator cancelled the request.  499 as google.rpc.Code CANCELLED has it; clients do not retry it."""

    status = 499

    def __init__(self) -> None:
        super().__init__("the request was cancelled by an operator")


class NoSuchRequest(RequestError):
    """There is no request of that number."""

    status = 404

    def __init__(self, request: str) -> None:
        super().__init__(f'no request "{request}" is here; it may be over')


class UnknownProfile(RequestError):
    """The profile is not configured."""

    status = 404

    def __init__(self, name: str) -> None:
        super().__init__(f'profile "{name}" is not configured; GET /api/profiles lists them')
