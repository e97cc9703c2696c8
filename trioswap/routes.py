"""The table of routes: what is asked where, by whom, and who answers.

Everything that goes by routes is made from it: dispatch, the scopes of keys, the OpenAPI
document, and tests that a new row cannot escape.
"""

from __future__ import annotations

import functools
import json
import posixpath
import re
from collections.abc import Awaitable, Callable, Iterable
from typing import Final

import attrs

from trioswap import __version__, inference, openapi
from trioswap.access import Scope
from trioswap.api import Services, admin, events, logs, models, profiles, requests, scheduling
from trioswap.asgi import Exchange
from trioswap.errors import UnknownPath, WrongMethod
from trioswap.openapi import ANY, contracts
from trioswap.openapi.contracts import Contract

Handler = Callable[[Exchange, Services], Awaitable[None]]

OPEN, USE, READ, ADMIN = Scope.OPEN, Scope.USE, Scope.READ, Scope.ADMIN


@attrs.frozen
class Route:
    """One row: HEAD is answered wherever GET is."""

    method: str
    path: str
    """A parameter in braces stands for one segment; at the end of the path for all that follows."""
    handler: Handler
    scope: Scope
    contract: Contract
    """What is asked and answered, for the OpenAPI document."""
    summary: str
    """One line for people."""


def _models(paths: Iterable[str], contract: Contract, summary: str) -> list[Route]:
    return [Route("POST", path, inference.model_route, USE, contract, summary) for path in paths]


async def describe(exchange: Exchange, _: Services) -> None:
    """GET /api/openapi.json: this table, for machines.  It is the same for every configuration and tells no secret."""
    await exchange.respond(200, "application/json", _described())


@functools.cache
def _described() -> bytes:
    return json.dumps(openapi.document(ROUTES, __version__)).encode()


# In the order of the surface reference 1.1, then our own.
ROUTES: Final = (
    *_models(("/v1/chat/completions", "/v/chat/completions"), contracts.STREAM, "A chat completion."),
    *_models(("/v1/responses", "/v/responses"), contracts.STREAM, "A response."),
    *_models(("/v1/completions", "/v/completions", "/completion"), contracts.STREAM, "A completion."),
    *_models(("/v1/messages", "/v/messages"), contracts.STREAM, "A message, as Anthropic has it."),
    *_models(("/v1/messages/count_tokens", "/v/messages/count_tokens"), contracts.ANSWER, "How many tokens it has."),
    *_models(("/v1/embeddings", "/v/embeddings"), contracts.ANSWER, "Embeddings of texts."),
    *_models(("/reranking", "/v1/reranking", "/v/reranking"), contracts.ANSWER, "Documents by how well they fit."),
    *_models(("/rerank", "/v1/rerank", "/v/rerank"), contracts.ANSWER, "Documents by how well they fit."),
    *_models(("/infill",), contracts.STREAM, "Code that fits into a gap."),
    *_models(("/v1/audio/speech", "/v1/audio/voices"), contracts.MEDIA, "Speech from text."),
    *_models(("/v1/audio/transcriptions", "/v1/audio/translations"), contracts.AUDIO_FORM, "Text from speech."),
    *_models(("/v1/images/generations",), contracts.STREAM, "Images."),
    *_models(("/v1/images/edits", "/v1/images/variations"), contracts.IMAGE_FORM, "Images from images."),
    *_models(("/sdapi/v1/txt2img", "/sdapi/v1/img2img"), contracts.ANSWER, "Images, as Stable Diffusion has it."),
    *_models(("/audioapi/v1/tasks/run",), contracts.MEDIA, "An audio task."),
    *_models(("/tokenize", "/detokenize", "/apply-template"), contracts.ANSWER, "Tokens and templates of llama.cpp."),
    Route("GET", "/v1/audio/voices", inference.model_route, USE, contracts.QUERY, "The voices of a model."),
    Route("GET", "/sdapi/v1/loras", inference.model_route, USE, contracts.QUERY, "The LoRAs of a model."),
    Route("GET", "/props", inference.model_route, USE, contracts.QUERY, "The properties of a model."),
    Route("GET", "/v1/models", models.list_models, READ, contracts.MODEL_LIST, "Every listed model."),
    Route("GET", "/models", models.list_models, READ, contracts.MODEL_LIST, "Every listed model."),
    Route("GET", "/v1/models/{model}", models.one_model, READ, contracts.MODEL, "One model."),
    Route("GET", "/running", models.running, READ, contracts.RUNNING, "What runs, what it serves, who waits for it."),
    Route("GET", "/logs", logs.history, ADMIN, contracts.HISTORY, "The last lines of everything."),
    Route("GET", "/logs/stream", logs.stream_all, ADMIN, contracts.FOLLOW_ALL, "Lines of everything as they come."),
    Route("GET", "/logs/stream/{source}", logs.stream_one, ADMIN, contracts.FOLLOW, "Lines of one source."),
    Route("GET", "/api/log-level", logs.show_level, ADMIN, contracts.LEVEL, "How much of our own is logged."),
    Route("PUT", "/api/log-level", logs.change_level, ADMIN, contracts.SET_LEVEL, "Log more of our own, or less."),
    Route("GET", "/health", models.health, OPEN, contracts.WORDS, "The daemon answers."),
    Route("GET", "/health/ready", models.ready, OPEN, contracts.READY, "Requests are served, and none waits too long."),
    Route("GET", "/wol-health", models.health, OPEN, contracts.WORDS, "The daemon answers; not in the access log."),
    Route("GET", "/api/openapi.json", describe, OPEN, contracts.DOCUMENT, "This document."),
    Route("GET", "/", models.root, OPEN, contracts.WORDS, "Who this is."),
    Route(ANY, "/upstream/{model}", inference.upstream_route, USE, contracts.UPSTREAM, "Anything of its own server."),
    Route(ANY, "/comfyui", inference.comfyui_root, USE, contracts.COMFYUI_ROOT, "The pages of ComfyUI are elsewhere."),
    Route(ANY, "/comfyui/", inference.comfyui_route, USE, contracts.COMFYUI, "The pages of ComfyUI."),
    Route(ANY, "/comfyui/{path}", inference.comfyui_route, USE, contracts.COMFYUI, "The pages of ComfyUI."),
    Route("POST", "/api/models/unload", admin.unload_all, ADMIN, contracts.UNLOAD_ALL, "Drain and stop every model."),
    Route("POST", "/api/models/unload/{model}", admin.unload_one, ADMIN, contracts.UNLOAD, "Drain and stop one model."),
    Route("POST", "/api/models/load/{model}", admin.load, ADMIN, contracts.LOAD, "Load one model."),
    Route("POST", "/api/reload", admin.reload, ADMIN, contracts.RELOAD, "Read the configuration again."),
    Route("GET", "/api/profiles", profiles.show, READ, contracts.PROFILES, "The profiles, and which is active."),
    Route("PUT", "/api/profiles/active", profiles.activate, ADMIN, contracts.ACTIVATE, "Make one active, or none."),
    Route("GET", "/api/inflight", requests.show, ADMIN, contracts.IN_FLIGHT, "The requests to models under way."),
    Route("POST", "/api/inflight/{id}/cancel", requests.cancel, ADMIN, contracts.CANCEL, "End one of them."),
    Route("GET", "/api/events", events.events, ADMIN, contracts.HAPPENINGS, "What happens, as server-sent events."),
    Route("GET", "/api/selfcheck", models.selfcheck, ADMIN, contracts.SELF_CHECK, "What the last self-check found."),
    Route("GET", "/api/version", models.version, READ, contracts.VERSION, "The version of the daemon."),
    Route("GET", "/api/queue", scheduling.queue, READ, contracts.QUEUE, "Who waits, and the last decisions."),
    Route("GET", "/api/queue/{request}", scheduling.queue_of_one, READ, contracts.WAITING, "How one of them is doing."),
    Route("GET", "/api/plan/{model}", scheduling.plan, READ, contracts.PLAN, "What one more request would meet now."),
    Route("POST", "/api/hold", scheduling.hold, ADMIN, contracts.HOLD, "Lend memory to another program."),
)


def _pattern(path: str) -> re.Pattern[bytes]:
    """What a raw path is compared with; the parameter is the only group."""
    before, _, after = path.partition("{")
    _, _, after = after.partition("}")
    parameter = rb"([^/]+)" if after else rb"(.+)"
    return re.compile(re.escape(before.encode()) + parameter + re.escape(after.encode()), re.DOTALL)


def _by_path() -> dict[bytes, list[Route]]:
    table: dict[bytes, list[Route]] = {}
    for route in ROUTES:
        table.setdefault(route.path.encode(), []).append(route)
    return table


_FIXED: Final = {path: routes for path, routes in _by_path().items() if b"{" not in path}
# The longest first: what is more to the point.
_OPEN: Final = sorted(
    ((_pattern(path.decode()), routes) for path, routes in _by_path().items() if b"{" in path),
    key=lambda row: -len(row[0].pattern),
)


def find(method: str, raw_path: bytes) -> tuple[Route, bytes]:
    """The route of a request, and what stands in the place of its parameter.

    Raises:
        UnknownPath, WrongMethod: there is none.
    """
    routes, rest = _FIXED.get(raw_path), b""
    if routes is None:
        routes, rest = _match(raw_path)
    wanted = {method, ANY} | ({"GET"} if method == "HEAD" else set())
    for route in routes:
        if route.method in wanted:
            return route, rest
    allowed = {route.method for route in routes}
    path = raw_path.decode("ascii", "replace")
    raise WrongMethod(method, path, sorted(allowed | ({"HEAD"} if "GET" in allowed else set())))


def _match(raw_path: bytes) -> tuple[list[Route], bytes]:
    if found := _open(raw_path):
        return found
    cleaned = _cleaned(raw_path)
    if cleaned not in (raw_path, b"/") and (cleaned in _FIXED or _open(cleaned)):
        return [_UNCLEAN], cleaned
    raise UnknownPath(raw_path.decode("ascii", "replace"))


def _open(raw_path: bytes) -> tuple[list[Route], bytes] | None:
    for pattern, routes in _OPEN:
        if found := pattern.fullmatch(raw_path):
            return routes, found[1]
    return None


def _cleaned(raw_path: bytes) -> bytes:
    """*raw_path* without empty segments and dots; `base_url` often ends with a slash too many."""
    path = posixpath.normpath(b"/" + raw_path.lstrip(b"/"))
    return path + b"/" if raw_path.endswith(b"/") and path != b"/" else path


async def _to_cleaned(exchange: Exchange, _: Services) -> None:
    await exchange.text(307, "", [(b"location", exchange.rest + exchange.raw_query)])


# As llama-swap answers, too (surface reference 1.1).
_UNCLEAN: Final = Route(ANY, "", _to_cleaned, Scope.OPEN, contracts.WORDS, "The same without empty segments.")
