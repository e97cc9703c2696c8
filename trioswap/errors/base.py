"""What every error of ours knows: its status, and its text in the shapes that clients parse.

Each class carries `status`; `kind` and `code` follow from it by the table that
llama-swap's clients know (surface reference 1.10).
"""

from __future__ import annotations

from typing import Any, ClassVar, Final, Self

# status -> (type, code) of the OpenAI-shaped error object.
_KINDS: Final[dict[int, tuple[str, str]]] = {
    400: ("invalid_request_error", "bad_request"),
    401: ("authentication_error", "unauthorized"),
    403: ("authentication_error", "forbidden"),
    404: ("invalid_request_error", "not_found"),
    409: ("invalid_request_error", "conflict"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
    499: ("invalid_request_error", "cancelled"),
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
    retry_after: int | None = None  # seconds, sent as Retry-After

    def anew(self) -> Self:
        """The same for one more who asks: one that is raised twice collects the tracebacks of both."""
        other = type(self).__new__(type(self), *self.args)  # without __init__, which wants what the message is made of
        other.__dict__.update(self.__dict__)
        return other

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


class IllegalTransition(Exception):
    """A lifecycle event in a state that does not know it: a bug of ours."""
