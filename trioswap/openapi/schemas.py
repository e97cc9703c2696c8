"""What bodies look like that are ours to define: the schemas of the OpenAPI document (JSON Schema 2020-12).

What model servers are sent and what they say is theirs, so of that only the little is here
that we look at ourselves.
"""

from __future__ import annotations

from typing import Any, Final

from trioswap.config.schema import LOG_LEVELS
from trioswap.lifecycle import OCCUPIED, State

Schema = dict[str, Any]

_TEXT: Final[Schema] = {"type": "string"}
_FLAG: Final[Schema] = {"type": "boolean"}
_COUNT: Final[Schema] = {"type": "integer", "minimum": 0}
_SECONDS: Final[Schema] = {"type": "number", "minimum": 0, "description": "Seconds."}
_MAYBE_SECONDS: Final[Schema] = {
    "type": ["number", "null"],
    "minimum": 0,
    "description": "Seconds; null where nobody can tell.",
}
_TIME: Final[Schema] = {"type": "number", "description": "Unix seconds."}
_HOLDING: Final[Schema] = {
    "type": "object",
    "additionalProperties": _COUNT,
    "description": "Bytes of each device.",
}
_HEADERS: Final[Schema] = {
    "type": "object",
    "additionalProperties": _TEXT,
    "description": "The first value of each; credentials and cookies are replaced by `[REDACTED]`.",
}
_CHECKED: Final[Schema] = {
    "type": ["integer", "null"],
    "minimum": 0,
    "description": "Milliseconds since the daemon looked at itself; null: it has not yet.",
}
_FREE: Final[Schema] = {"type": "object", "additionalProperties": True}
_MODEL_NAME: Final[Schema] = {
    "type": "string",
    "minLength": 1,
    "description": "A model's name or alias, a selector, or a model of a peer; GET /v1/models lists them.",
}
_STATE: Final[Schema] = {"type": "string", "enum": [state.value for state in State]}


def ref(name: str) -> Schema:
    """The schema *name* of those below, by reference."""
    return {"$ref": f"#/components/schemas/{name}"}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _one_of(words: list[str], text: str = "") -> Schema:
    return {"type": "string", "enum": words} | ({"description": text} if text else {})


def _about(schema: Schema, text: str) -> Schema:
    return schema | {"description": text}


def _object(text: str, fields: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    """An object with all of *fields*, and maybe some that are *optional*; later versions may add further ones."""
    return {
        "type": "object",
        "description": text,
        "properties": {**fields, **(optional or {})},
        "required": list(fields),
    }


# ---- what we are sent -----------------------------------------------------------------------

_LOOSE: Final = (
    "Further fields are for the model server, whose documentation tells of them: they are neither looked at here nor "
    "changed, unless the configuration has a filter."
)
_STREAM: Final[Schema] = {"type": "boolean", "description": "Whether the answer is to be a stream of events."}


def _form(name: str) -> Schema:
    """A multipart form with a file in the field *name*."""
    fields = {"model": _MODEL_NAME, name: {"type": "string", "contentMediaType": "application/octet-stream"}}
    return {"type": "object", "description": _LOOSE, "properties": fields, "required": ["model"]}


_ASKED: Final[dict[str, Schema]] = {
    "ModelRequest": _object(_LOOSE, {"model": _MODEL_NAME}) | {"additionalProperties": True},
    "StreamRequest": _object(_LOOSE, {"model": _MODEL_NAME}, {"stream": _STREAM}) | {"additionalProperties": True},
    "FileForm": _form("file"),
    "ImageForm": _form("image"),
    "ProfileChoice": _object(
        "Which profile is to be active.",
        {"name": _about({"type": ["string", "null"]}, "The profile; null or an empty text for none.")},
    ),
    "LogLevelChoice": _object(
        "How much is to be logged.", {"level": _about(_one_of(list(LOG_LEVELS)), "The least that is logged.")}
    ),
    "HoldRequest": _object(
        "What is to be lent.",
        {
            "memory": {
                "description": 'A size, in bytes or as text such as "12GiB", or an object of sizes by device.',
                "type": ["integer", "string", "object"],
                "minimum": 0,
                "additionalProperties": {"type": ["integer", "string"], "minimum": 0},
            }
        },
        {
            "device": _about(_TEXT, "Where, if the size is one: a device, or `auto`."),
            "label": {
                "type": "string",
                "minLength": 1,
                "maxLength": 100,
                "description": "For logs and tables; printable, and no model's name.",
            },
        },
    )
    | {"additionalProperties": False},
}


# ---- what we answer -------------------------------------------------------------------------

_ERRORS: Final[dict[str, Schema]] = {
    "Error": _object(
        "An error in OpenAI's shape.",
        {
            "src": _about({"const": "trioswap"}, "Who speaks: errors of model servers do not have this."),
            "error": _object(
                "What is wrong.",
                {
                    "message": _about(_TEXT, "For people: what, which, and what to do next."),
                    "type": _one_of(
                        ["invalid_request_error", "authentication_error", "rate_limit_error", "server_error"]
                    ),
                    "param": _about({"type": ["string", "null"]}, "The parameter that is at fault."),
                    "code": _about(_TEXT, "The status as a word."),
                },
            ),
        },
        {"loading": ref("Loading"), "ready": {"const": False}, "checked_ms_ago": _CHECKED},
    ),
    "AnthropicError": _object(
        "An error in Anthropic's shape.",
        {
            "type": {"const": "error"},
            "error": _object("What is wrong.", {"type": _TEXT, "message": _about(_TEXT, "For people.")}),
        },
        {"loading": ref("Loading")},
    ),
    "Loading": _about(_FREE, "What is going on, for who did not want to wait any longer (`Prefer: wait=SECONDS`)."),
}

_MODELS: Final[dict[str, Schema]] = {
    "Model": _object(
        "A model, an alias, a selector, a pin of the active profile, or a model of a peer.",
        {
            "id": _TEXT,
            "object": {"const": "model"},
            "created": _about({"type": "integer"}, "Unix seconds: the start of the daemon."),
            "owned_by": {"const": "trioswap"},
            "meta": _object(
                "Of llama-swap's shape.",
                {
                    "llamaswap": _object(
                        "What it is, beside the metadata of the configuration.",
                        {"type": _one_of(["model", "alias", "selector", "profile", "peer"])},
                    )
                    | {"additionalProperties": True}
                },
                {"n_ctx": _COUNT},
            ),
            "status": _object("Whether it is in memory.", {"value": _one_of(["loaded", "unloaded"])}),
        },
        {
            "name": _TEXT,
            "description": _TEXT,
            "architecture": _FREE,
            "capabilities": {"type": "object", "additionalProperties": {"const": True}},
            "supported_parameters": _list(_TEXT),
            "context_length": _COUNT,
        },
    ),
    "ModelList": _object("Sorted by id.", {"object": {"const": "list"}, "data": _list(ref("Model"))}),
    "Running": _object("Sorted by name.", {"running": _list(ref("RunningModel"))}),
    "RunningModel": _object(
        "A model that is not stopped, that somebody waits for, or that is not tried again for a while.",
        {
            "model": _TEXT,
            "state": _STATE,
            "cmd": _about(_TEXT, "The command line, secrets included."),
            "proxy": _about(_TEXT, "Where the model server listens."),
            "ttl": _about(_SECONDS, "Seconds without a request after which it is stopped; 0: never."),
            "name": _TEXT,
            "description": _TEXT,
            "serving": _about(_COUNT, "Requests that are being served."),
            "waiting": _about(_COUNT, "Requests that wait for it."),
        },
        {
            "memory": _HOLDING,
            "failure": _about(_TEXT, "Why it failed last; absent once it has proved to work."),
            "retry_in": _about(_SECONDS, "Seconds for which it is not tried again; 0: the next request is a trial."),
        },
    ),
    "Ready": _object("Requests are served.", {"ready": {"const": True}, "checked_ms_ago": _CHECKED}),
    "SelfCheck": _object(
        "What the last look of the daemon at itself has found.",
        {
            "ready": _FLAG,
            "reasons": _about(_list(_TEXT), "Why it is not."),
            "checked_ms_ago": _CHECKED,
            "late": _about(_SECONDS, "Seconds by which the event loop was late for it."),
            "stuck": _about(_list(_TEXT), "Models whose process could not be ended and keeps its memory."),
            "held": _about(_list(ref("HeldRequest")), "Those that wait for requests which nothing bounds."),
            "given_up": _about(_COUNT, "Requests answered with an error because they waited longer than any should."),
            "memory_late": _about(_FLAG, "A driver does not tell how much memory is used: what was last known counts."),
        },
    ),
    "HeldRequest": _object(
        "A request that waits for one that may go on for ever.",
        {
            "request": _about(_TEXT, "Its x-request-id."),
            "model": _TEXT,
            "by": _about(_TEXT, "The x-request-id of the oldest one in its way."),
            "of": _about(_TEXT, "The model that serves that."),
            "seconds": _about(_SECONDS, "For which it has been held, as far as looks have seen."),
        },
    ),
    "Version": _object(
        "What this is; there is no commit and no build, since nothing is built.",
        {"version": _TEXT, "commit": _TEXT, "build_date": _TEXT},
    ),
}

_OPERATIONS: Final[dict[str, Schema]] = {
    "Done": _object("It is done.", {"msg": {"const": "ok"}}),
    "Loaded": _object("It is ready.", {"msg": {"const": "ok"}, "model": _about(_TEXT, "Its real name.")}),
    "Reloaded": _object(
        "What has changed.",
        {
            "added": _about(_list(_TEXT), "Models."),
            "removed": _about(_list(_TEXT), "Models."),
            "restarted": _about(
                {"type": "object", "additionalProperties": _list(_TEXT)},
                "Models whose server, if it runs, is replaced, and the keys that changed.",
            ),
            "updated": _about(
                {"type": "object", "additionalProperties": _list(_TEXT)},
                "Models whose server goes on, and the keys that changed.",
            ),
            "settings": _about(_list(_TEXT), "Keys beside the models, which hold from now on."),
            "later": _about(_list(_TEXT), "Keys that count when the daemon is started again."),
        },
    ),
    "Profiles": _object(
        "Sorted by id.", {"active": _about({"type": ["string", "null"]}, "Its id."), "profiles": _list(ref("Profile"))}
    ),
    "Profile": _object(
        "What names stand for while it is active.",
        {
            "id": _TEXT,
            "description": _TEXT,
            "pins": {
                "type": "object",
                "additionalProperties": _TEXT,
                "description": "What each name leads to; empty: to nothing.",
            },
        },
    ),
    "LogLevel": _object("What holds now.", {"level": _one_of(list(LOG_LEVELS))}),
    "ActiveProfile": _object("What holds from now on.", {"active": {"type": ["string", "null"]}}),
    "InFlight": _object("The oldest first.", {"requests": _list(ref("InFlightRequest"))}),
    "InFlightRequest": _object(
        "A request to a model that is under way.",
        {
            "id": _about(_TEXT, "Its number, by which it can be cancelled."),
            "request": _about(_TEXT, "Its x-request-id, by which it can be cancelled, too."),
            "timestamp": _about(_TEXT | {"format": "date-time"}, "When it came."),
            "model": _about(_TEXT, "The real name; empty: not known yet."),
            "req_path": _TEXT,
            "method": _TEXT,
            "req_headers": _HEADERS,
            "remote_ip": _TEXT,
            "key": _about(_TEXT, "The name of the key that was shown."),
            "resp_headers": _HEADERS,
            "resp_bytes": _COUNT,
            "elapsed_ms": _COUNT,
        },
        {"metadata": {"type": "object", "additionalProperties": _TEXT}},
    ),
}

_SCHEDULING: Final[dict[str, Schema]] = {
    "Queue": _object(
        "Who waits for what.",
        {
            "waiting": _list(ref("Waiting")),
            "lent": _list(
                _object("Memory that is lent.", {"label": _TEXT, "holding": _HOLDING, "since": _TIME}),
            ),
            "decisions": _list(
                _object("A decision.", {"at": _TIME, "model": _TEXT, "what": _TEXT, "why": _TEXT}),
            ),
        },
    ),
    "Waiting": _object(
        "A request that waits.",
        {
            "request": _about(_TEXT, "Its x-request-id, or the label of who waits for memory."),
            "model": _TEXT,
            "weight": {"type": "number", "exclusiveMinimum": 0},
            "waited": _SECONDS,
            "place": _about({"type": "integer", "minimum": 1}, "Within the line for its model."),
            "stage": _about(_TEXT, "What it waits for."),
            "waits_for": _about(_list(_TEXT), "The models that must go first."),
            "estimate": _MAYBE_SECONDS,
        },
    ),
    "Plan": _object(
        "What one more request for the model would meet now.",
        {
            "model": _TEXT,
            "state": _STATE,
            "need": {"oneOf": [{"type": "null"}, ref("Need")]},
            "fits": _about(_FLAG, "It is resident, or has room beside those that are."),
            "evicts": _list(ref("Victim")),
            "why": _about(_TEXT, "One sentence for people."),
            "estimate": _MAYBE_SECONDS,
            "failure": _about({"type": ["string", "null"]}, "Why it failed last; null: it has not since it worked."),
            "retry_in": _about(_SECONDS, "Seconds for which requests are refused after that, and nobody is put out."),
        },
    ),
    "Need": _object(
        "What the model needs of the memory.",
        {
            "source": _one_of(["declared", "learned", "estimated", "unknown"]),
            "holdings": _about(_list(_HOLDING), "One of these; none: it is not known."),
            "note": _TEXT,
        },
    ),
    "Victim": _object(
        "A resident model that would go.",
        {
            "model": _TEXT,
            "state": _one_of([state.value for state in State if state in OCCUPIED]),
            "serving": _COUNT,
            "idle": _about(_SECONDS, "Seconds since its last request."),
            "reload": _about(_MAYBE_SECONDS, "Seconds that its next load is expected to take."),
            "when": _MAYBE_SECONDS,
        },
    ),
    "Lent": _object(
        "The only line, as soon as the memory is there.",
        {
            "label": _TEXT,
            "holding": _HOLDING,
            "environment": _about(
                {"type": "object", "additionalProperties": _TEXT}, "Variables that make a program use just these GPUs."
            ),
        },
    ),
}

SCHEMAS: Final = {**_ASKED, **_ERRORS, **_MODELS, **_OPERATIONS, **_SCHEDULING}
"""All of them by name."""
