"""The OpenAPI document: what the table of routes says, for machines.

A pure function of the table.  What single routes take and give is in `contracts`, what bodies
look like in `schemas`; here is what holds for all of them: keys, errors, headers, names.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from http import HTTPStatus
from typing import Any, Final, Protocol

from trioswap.access import Scope
from trioswap.openapi.contracts import ANYTHING, FLAGS, JSON, TAGS, TEXT, Content, Contract
from trioswap.openapi.schemas import SCHEMAS, ref
from trioswap.sse import Dialect, dialect_of

Document = dict[str, Any]

VERSION: Final = "3.1.1"
"""Of the OpenAPI specification."""
ANY: Final = "*"
"""As a route's method: every one."""
# Those that such a route is shown with; the description speaks of HEAD and OPTIONS.
_SHOWN: Final = ("GET", "POST", "PUT", "PATCH", "DELETE")


class Row(Protocol):
    """One row of the table of routes, as far as the document goes."""

    @property
    def method(self) -> str:
        """In capitals, or `ANY`."""

    @property
    def path(self) -> str:
        """With at most one parameter in braces."""

    @property
    def scope(self) -> Scope:
        """What a key must allow."""

    @property
    def summary(self) -> str:
        """One line for people."""

    @property
    def contract(self) -> Contract:
        """What is asked and answered."""


def document(rows: Iterable[Row], version: str) -> Document:
    """The OpenAPI document of *rows*, as plain values for JSON; *version* is ours."""
    paths: dict[str, Document] = {}
    for row in rows:
        for method in methods(row):
            paths.setdefault(row.path, {})[method.lower()] = _operation(method, row)
    return {
        "openapi": VERSION,
        "info": {
            "title": "trioswap",
            "version": version,
            "summary": "Local model servers behind one endpoint.",
            "description": _DESCRIPTION,
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": "/", "description": "This daemon."}],
        "tags": [{"name": name, "description": text} for name, text in TAGS.items()],
        "security": _SECURITY,
        "paths": paths,
        "components": {
            "schemas": SCHEMAS,
            "responses": dict(_responses()),
            "headers": _HEADERS,
            "securitySchemes": _SCHEMES,
        },
    }


def methods(row: Row) -> tuple[str, ...]:
    """Those that *row* is shown with."""
    return _SHOWN if row.method == ANY else (row.method,)


_DESCRIPTION: Final = """\
HEAD is answered wherever GET is, and OPTIONS on every path (CORS). Any other method than those listed gets a 405, and a
path that is not listed a 404, in the shape of every error. A path with empty segments or dots in it may be answered
with a redirect (307) to the same path without them.

Requests to models are forwarded. Only their `model` and `stream` are looked at here, so their schemas are loose on
purpose: all else belongs to the model server, and so does the answer. `src` tells our errors from those of model
servers: where it is `trioswap`, we speak. On Anthropic's routes errors have Anthropic's shape.

A parameter at the end of a path takes all that follows: names with slashes may be written with them or with `%2F`.

Where the configuration has no keys, none is asked for.
"""


# ---- one operation --------------------------------------------------------------------------


def _operation(method: str, row: Row) -> Document:
    contract = row.contract
    operation: Document = {
        "operationId": _name(method, row.path),
        "summary": row.summary,
        "tags": [contract.tag],
        "responses": dict(_answers(method, row)),
        "x-trioswap-scope": row.scope.value,
    }
    if note := _note(contract):
        operation["description"] = note
    if parameters := [*_in_path(row.path), *_in_query(contract)]:
        operation["parameters"] = parameters
    if contract.body is not None and method != "GET":
        # What may be anything may be nothing.
        operation["requestBody"] = {"required": ANYTHING not in contract.body, "content": _content(contract.body)}
    if row.scope is Scope.OPEN:
        operation["security"] = []
    return operation


def _note(contract: Contract) -> str:
    endless = "The answer ends when the client leaves, or the daemon." if contract.endless else ""
    return "  ".join(filter(None, (contract.note, endless)))


def _name(method: str, path: str) -> str:
    """Such as `getV1ModelsByModel`: no two operations have the same."""
    words = [word for segment in path[1:].split("/") for word in _words(segment)]
    return method.lower() + "".join(word[:1].upper() + word[1:] for word in words)


def _words(segment: str) -> list[str]:
    if not segment:
        return ["root"]  # what ends with a slash
    by = ["by"] if segment.startswith("{") else []
    return [*by, *re.findall(r"[A-Za-z0-9]+", segment)]


def _in_path(path: str) -> Iterator[Document]:
    for name in re.findall(r"\{(.+?)\}", path):
        last = path.endswith(f"{{{name}}}")
        text = _PARAMETERS[name] + (" May contain slashes, written as they are or as `%2F`." if last else "")
        yield {
            "name": name,
            "in": "path",
            "required": True,
            "description": text,
            "schema": {"type": "string", "minLength": 1},
        }


_PARAMETERS: Final = {
    "model": "A model's name or alias.",
    "source": "`proxy` for the daemon itself, `upstream` for all model servers, or a model's name or alias.",
    "path": "The path at the model server.",
    "id": "The number of a request, from /api/inflight, or its request id, from x-request-id or /api/queue.",
    "request": "The x-request-id of a request.",
}


def _in_query(contract: Contract) -> Iterator[Document]:
    for name, text in contract.query.items():
        flag = name in FLAGS
        about: Document = {"name": name, "in": "query", "required": not flag, "description": text}
        if flag:
            yield about | {"allowEmptyValue": True, "schema": {"type": "string"}}
        else:
            yield about | {"schema": {"type": "string", "minLength": 1}}


def _content(content: Content) -> Document:
    return {media: {"schema": _schema(media, name)} for media, name in content.items()}


def _schema(media: str, name: str) -> Document:
    if name:
        return ref(name)
    return {"type": "string"} if media.startswith("text/") else {}


# ---- answers --------------------------------------------------------------------------------


def _answers(method: str, row: Row) -> Iterator[tuple[str, Document]]:
    contract = row.contract
    if contract.answer:
        text = "What the model server says." if contract.forwards else "Done."
        yield "200", {"description": text, "headers": _header_refs(), "content": _content(contract.answer)}
    if contract.moved:
        yield str(301 if method == "GET" else 308), _MOVED
    for status in statuses(row):
        yield str(status), {"$ref": f"#/components/responses/{_error_name(status, row.path)}"}
    if contract.forwards:
        yield "default", {"description": "What else the model server says; its errors are its own, without our `src`."}


def statuses(row: Row) -> list[int]:
    """Those of the errors that *row* may answer with, except for bugs of ours (500)."""
    always = {400} if row.scope is Scope.OPEN else {400, 401, 403}
    return sorted(always.union(row.contract.fails))


_MOVED: Final[Document] = {
    "description": "It is there, and will stay there.",
    "headers": {"Location": {"schema": {"type": "string", "format": "uri-reference"}}},
    "content": {TEXT: {"schema": {"type": "string"}}},
}

# status -> what it means here; those that a client may meet on listed paths, and 405 for methods that are not.
_MEANINGS: Final = {
    400: "The request is malformed.",
    401: "No key of ours is shown.",
    403: "The key does not allow this, or a web page asks that has no business here.",
    404: "There is nothing of that name.",
    405: "The path is known, but not for this method.",
    409: "What this needs is not there, and asking does not make it so.",
    413: "The body passes the limit (`max_request_body`, `max_upload`).",
    422: "The configuration has mistakes, and stays as it was.",
    429: "As many requests as may be are here already, for this model or by this key.",
    499: "An operator cancelled the request.",
    502: "The model server, or a peer, broke off before its answer began.",
    503: "The model is not to be had now, or the daemon is stopping.",
    504: "The model server, or a peer, did not answer in time.",
    507: "The disk has no room for the body.",
}
# Headers that an error may have beside what every answer has.
_ERROR_HEADERS: Final = {
    401: "WWW-Authenticate",
    405: "Allow",
    429: "Retry-After",
    503: "Retry-After",
}
_HEADERS: Final[Mapping[str, Document]] = {
    "X-Request-Id": {"description": "By which the log knows the request.", "schema": {"type": "string"}},
    "Retry-After": {
        "description": "Seconds after which it pays to try again; missing where it never will.",
        "schema": {"type": "integer", "minimum": 0},
    },
    "WWW-Authenticate": {"description": "So that browsers ask for a password.", "schema": {"type": "string"}},
    "Allow": {"description": "The methods that would do.", "schema": {"type": "string"}},
}


def _header_refs(*names: str) -> Document:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in ("X-Request-Id", *names)}


def _responses() -> Iterator[tuple[str, Document]]:
    for (status, text), anthropic in itertools.product(_MEANINGS.items(), (False, True)):
        named = [_ERROR_HEADERS[status]] if status in _ERROR_HEADERS else []
        schema = ref("AnthropicError" if anthropic else "Error")
        answer = {"description": text, "headers": _header_refs(*named), "content": {JSON: {"schema": schema}}}
        yield _response_name(status, anthropic=anthropic), answer


def _error_name(status: int, path: str) -> str:
    return _response_name(status, anthropic=dialect_of(path) is Dialect.MESSAGES)


def _response_name(status: int, *, anthropic: bool) -> str:
    word = "Cancelled" if status == 499 else HTTPStatus(status).phrase.title().replace(" ", "")
    return f"Anthropic{word}" if anthropic else word


# ---- keys -----------------------------------------------------------------------------------

_SCHEMES: Final[Mapping[str, Document]] = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "basic": {"type": "http", "scheme": "basic", "description": "The key is the password; any user will do."},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    "api-key": {"type": "apiKey", "in": "header", "name": "api-key"},
}
# Any one of them; the last is none, for where no key is configured.
_SECURITY: Final = [*({name: list[str]()} for name in _SCHEMES), {}]
