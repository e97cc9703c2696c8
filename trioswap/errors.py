"""Every error trioswap raises, whose fault it is, and what the client is told.

    TrioswapError
     +- ConfigError, Misuse    the user's mistake; the command line prints it and exits with 2
     |   +- LlamaExtraMissing
     +- CannotListen, DaemonUnreachable, DaemonRefused    the world's; the command line exits with 1
     +- RequestError           the client's fault (4xx)
     |   +- BadRequest, AmbiguousLength, MissingModel, UnknownModel, UnknownPath, WrongMethod, BodyTooLarge
     +- ModelError             a model server's fault (5xx)
     |   +- StartFailed, ModelUnloaded, ModelStuck, LeaseCut, UpstreamFailed
     +- ShuttingDown           ours: the daemon is going away (503)
    IllegalTransition          a bug of ours, never sent to anyone

Each class carries `status`; `kind` and `code` follow from it by the table that
llama-swap's clients know (surface reference 1.10).  Make a new instance for each
ticket: a shared one collects everybody's traceback.
"""

from __future__ import annotations

from typing import Any, ClassVar, Final

# status -> (type, code) of the OpenAI-shaped error object.
_KINDS: Final[dict[int, tuple[str, str]]] = {
    400: ("invalid_request_error", "bad_request"),
    401: ("authentication_error", "unauthorized"),
    403: ("authentication_error", "forbidden"),
    404: ("invalid_request_error", "not_found"),
    409: ("invalid_request_error", "conflict"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
    502: ("server_error", "bad_gateway"),
    503: ("server_error", "service_unavailable"),
    504: ("server_error", "gateway_timeout"),
}

# status -> type of the Anthropic-shaped error object (Anthropic API reference, "Errors").
_ANTHROPIC_KINDS: Final[dict[int, str]] = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    529: "overloaded_error",
}


class TrioswapError(Exception):
    """An expected failure: the message says what, which, and what to do next."""

    status: ClassVar[int] = 500
    param: ClassVar[str | None] = None
    retry_after: ClassVar[int | None] = None  # seconds, sent as Retry-After

    @property
    def message(self) -> str:
        """The text for people."""
        return str(self.args[0])

    def headers(self) -> list[tuple[bytes, bytes]]:
        """What the response says besides its body."""
        return [] if self.retry_after is None else [(b"retry-after", b"%d" % self.retry_after)]

    def openai_body(self) -> dict[str, Any]:
        """The error as OpenAI clients parse it, `src` saying who spoke."""
        kind, code = _KINDS.get(
            self.status,
            ("invalid_request_error", "invalid_request") if self.status < 500 else ("server_error", "internal_error"),
        )
        return {"src": "trioswap", "error": {"message": self.message, "type": kind, "param": self.param, "code": code}}

    def anthropic_body(self) -> dict[str, Any]:
        """The error as Anthropic clients parse it."""
        kind = _ANTHROPIC_KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": self.message}}


class ConfigError(TrioswapError):
    """The configuration has mistakes; `mistakes` holds one line for each."""

    def __init__(self, source: str, mistakes: list[str]) -> None:
        self.source, self.mistakes = source, mistakes
        count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        super().__init__("\n".join([f"{source}: {count}", *(f"  {line}" for line in mistakes)]))


class Misuse(TrioswapError):
    """A mistake of the user that is not inside a configuration file."""


class LlamaExtraMissing(Misuse):
    """The packages of the extra `llama` are not installed."""

    def __init__(self) -> None:
        super().__init__("the embedded engine is not installed; run: pip install 'trioswap[llama]'")


# ---- the world's ------------------------------------------------------------------------


class CannotWrite(TrioswapError):
    """A file cannot be written."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"cannot write {path}: {why}")


class InitFailed(TrioswapError):
    """There is no model to write a configuration for, or the file cannot be written."""


class CannotListen(TrioswapError):
    """The listen address is not to be had."""

    def __init__(self, listen: str, why: str) -> None:
        super().__init__(
            f"cannot listen on {listen}: {why}; stop what uses it, or choose another with --listen HOST:PORT"
        )


class DaemonUnreachable(TrioswapError):
    """No daemon answers at the address, or the connection broke."""

    def __init__(self, url: str, why: str) -> None:
        super().__init__(
            f"no answer from trioswap at {url}: {why}; is it running?  "
            f"Choose another address with --url or TRIOSWAP_URL"
        )


class DaemonRefused(TrioswapError):
    """The daemon answered with an error; the message is its own."""


# ---- the client's fault -------------------------------------------------------------


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

    def __init__(self, limit: int) -> None:
        super().__init__(f"the request body is larger than {limit} bytes (max_request_body)")


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


# ---- a model server's fault -----------------------------------------------------------


class ModelError(TrioswapError):
    """A model server failed, or is not to be had now."""

    status = 503
    retry_after: ClassVar[int | None] = 1

    def __init__(self, model: str, message: str) -> None:
        super().__init__(message)
        self.model = model


class StartFailed(ModelError):
    """The model server could not be started, exited before it was ready, or was late."""

    def __init__(self, model: str, why: str, *, out_of_memory: bool = False) -> None:
        super().__init__(model, f'model "{model}" did not start: {why}; its last output is at /logs/stream/{model}')
        self.why = why
        self.out_of_memory = out_of_memory

    def again(self) -> StartFailed:
        """A fresh instance of the same failure, for the next waiter."""
        return StartFailed(self.model, self.why, out_of_memory=self.out_of_memory)


class ModelUnloaded(ModelError):
    """An operator unloaded the model while the request waited for it."""

    def __init__(self, model: str) -> None:
        super().__init__(
            model, f'model "{model}" was unloaded while this request waited; send it again to load the model'
        )


class ModelStuck(ModelError):
    """A process in the way survived SIGKILL, so its memory cannot be had back."""

    retry_after = 60

    def __init__(self, model: str, stuck: str) -> None:
        what = "" if model == stuck else f'model "{model}" cannot start: '
        super().__init__(model, f'{what}the process of model "{stuck}" survived SIGKILL and still holds its memory')


class MemoryLent(ModelError):
    """The memory that the model needs is lent to a program that is not ours."""

    retry_after = 60

    def __init__(self, model: str, holder: str) -> None:
        super().__init__(model, f'model "{model}" cannot start: the memory it needs is held by {holder}')


class NotToBeHad(ModelError):
    """Memory cannot be lent, now or ever."""

    retry_after = 60

    def __init__(self, name: str, why: str) -> None:
        super().__init__(name, f"the memory for {name} is not to be had: {why}")


class MemoryTaken(ModelError):
    """Programs that are not ours use the memory that the model needs."""

    retry_after = 60

    def __init__(self, model: str) -> None:
        super().__init__(model, f'model "{model}" cannot start: other programs use the memory it needs')


class DoesNotFit(ModelError):
    """The model needs more memory than there is."""

    retry_after = None

    def __init__(self, model: str) -> None:
        super().__init__(
            model,
            f'model "{model}" needs more memory than there is for models, even alone; see `trioswap plan {model}`',
        )


class LeaseCut(ModelError):
    """The request was being served and lost its model: drain deadline, operator, or shutdown."""

    def __init__(self, model: str, why: str) -> None:
        super().__init__(model, f'the request was cut off while model "{model}" served it: {why}')


class UpstreamFailed(ModelError):
    """The model server broke the connection or spoke no HTTP.

    `before_first_byte` says that nothing of an answer had come yet: only then may
    the request be sent again (design, I14).
    """

    status = 502
    retry_after = None

    def __init__(self, model: str, why: str, *, before_first_byte: bool = False) -> None:
        super().__init__(model, f'model "{model}" failed while it handled the request: {why}')
        self.why, self.before_first_byte = why, before_first_byte


# ---- ours -----------------------------------------------------------------------------


class ShuttingDown(TrioswapError):
    """The daemon takes no new work."""

    status = 503
    retry_after = 5

    def __init__(self) -> None:
        super().__init__("trioswap is shutting down; send the request again in a moment")


class InternalError(TrioswapError):
    """Something of ours broke; the log has the traceback under the request id."""

    def __init__(self, request_id: str) -> None:
        super().__init__(f"internal error; the log of trioswap says more about request {request_id}")


class IllegalTransition(Exception):
    """A lifecycle event in a state that does not know it: a bug of ours."""
