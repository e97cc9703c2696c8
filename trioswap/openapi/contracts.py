"""What is asked and answered at each kind of route, as far as the table of routes does not say it.

A row of that table names one of the contracts below.  What a contract leaves out holds
everywhere, and the document adds it: a request may be malformed (400), and a route that is
not open wants a key (401, 403).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import attrs

JSON: Final = "application/json"
FORM: Final = "multipart/form-data"
TEXT: Final = "text/plain"
LINES: Final = "application/x-ndjson"
EVENTS: Final = "text/event-stream"
ANYTHING: Final = "*/*"

Content = Mapping[str, str]
"""Media type -> name of a schema in `schemas`; empty: whatever it is."""


@attrs.frozen
class Contract:
    """What goes in and what comes out."""

    tag: str
    """The family, one of `TAGS`."""
    answer: Content
    """Of a 200."""
    body: Content | None = None
    """Of the request."""
    query: Mapping[str, str] = attrs.field(factory=dict)
    """Parameter -> what it means; one of those in `FLAGS` is there or not, others must be there."""
    fails: tuple[int, ...] = ()
    """Statuses of errors, beside those that every route may answer with."""
    moved: bool = False
    """Some of its paths are elsewhere: 301 and 308."""
    forwards: bool = False
    """A model server answers, with whatever status it likes."""
    endless: bool = False
    """The answer ends when the client leaves, or the daemon."""
    note: str = ""
    """Sentences for people, beyond the summary."""


FLAGS: Final = frozenset({"no-history", "no-follow"})
"""Query parameters without a value."""

TAGS: Final = {
    "inference": "Requests to models: the one that is named is loaded if need be, and its server answers.",
    "upstream": "The model servers' own paths and pages.",
    "models": "Which models there are, and which of them run.",
    "operations": "Loading and unloading by hand, and the requests that are under way.",
    "profiles": "What names stand for.",
    "scheduling": "Who waits, what a load would put out, and memory for other programs.",
    "logs": "What the daemon and its model servers write, and what happens.",
    "about": "The daemon itself.",
}
"""The families, as tools group the routes."""

# What can befall a request on its way to a model server: the name is unknown, too many are here
# already, an operator cancels it, and the server or peer fails, is not to be had, or is late.
_FORWARDED: Final = (404, 429, 499, 502, 503, 504)
# A request with a body can be too large, and the disk may not take what memory is not meant for.
_SENT: Final = (413, 507)

_NAMED: Final = (
    "The body may also be a form, multipart or urlencoded, with the same field `model`.  "
    "While a request for a stream waits for its model, comments tell how far that is; an error within a stream is an "
    "event in the stream's own format."
)


def _model(answer: Content, schema: str = "ModelRequest", media: str = JSON, note: str = _NAMED) -> Contract:
    return Contract("inference", answer, {media: schema}, fails=(*_FORWARDED, *_SENT), forwards=True, note=note)


# ---- models ---------------------------------------------------------------------------------

STREAM: Final = _model({JSON: "", EVENTS: ""}, "StreamRequest")
ANSWER: Final = _model({JSON: ""})
MEDIA: Final = _model({ANYTHING: ""})
AUDIO_FORM: Final = _model({ANYTHING: ""}, "FileForm", FORM, "The body may also be JSON.")
IMAGE_FORM: Final = _model({JSON: "", EVENTS: ""}, "ImageForm", FORM, "The body may also be JSON.")
QUERY: Final = Contract(
    "inference", {ANYTHING: ""}, query={"model": "The model that is asked."}, fails=_FORWARDED, forwards=True
)

UPSTREAM: Final = Contract(
    "upstream", {ANYTHING: ""}, {ANYTHING: ""}, fails=(409, *_FORWARDED, *_SENT), moved=True, forwards=True,
    note="What follows the model's name is the path at its server, and stays as it is, query and escapes included; "
    "without even a slash after the name the answer is a redirect to the path with it.  Files of pages (the setting "
    "`ignore_paths`) load no model.  Every other method passes, too, but OPTIONS.",
)  # fmt: skip
COMFYUI: Final = Contract(
    "upstream", {ANYTHING: ""}, {ANYTHING: ""}, fails=(409, *_FORWARDED, *_SENT), forwards=True,
    note="The model is the one called `comfyui_auto`, which only /comfyui/ itself loads.  Every other method passes, "
    "too, but OPTIONS.",
)  # fmt: skip
COMFYUI_ROOT: Final = Contract("upstream", {}, moved=True)

# ---- what there is --------------------------------------------------------------------------

MODEL_LIST: Final = Contract("models", {JSON: "ModelList"})
MODEL: Final = Contract("models", {JSON: "Model"}, fails=(404,))
RUNNING: Final = Contract("models", {JSON: "Running"})
WORDS: Final = Contract("about", {TEXT: ""})
READY: Final = Contract(
    "about", {JSON: "Ready"}, fails=(503,),
    note="For whoever sends requests elsewhere while we cannot be counted on; why is said in general words.",
)  # fmt: skip
SELF_CHECK: Final = Contract("about", {JSON: "SelfCheck"})
VERSION: Final = Contract("about", {JSON: "Version"})
DOCUMENT: Final = Contract("about", {JSON: ""})

# ---- operations -----------------------------------------------------------------------------

UNLOAD_ALL: Final = Contract("operations", {JSON: "Done"}, fails=(503,), note="Answers when their processes are gone.")
UNLOAD: Final = Contract("operations", {TEXT: ""}, fails=(404, 503), note="Answers when its process is gone.")
LOAD: Final = Contract("operations", {JSON: "Loaded"}, fails=(404, 503), note="Answers when it is ready.")
RELOAD: Final = Contract(
    "operations", {JSON: "Reloaded"}, fails=(409, 422, 503),
    note="Answers what has changed once it is in effect; servers that have to end may still finish what they serve.  "
    "With mistakes nothing changes, and `error.mistakes` lists all of them.",
)  # fmt: skip
IN_FLIGHT: Final = Contract("operations", {JSON: "InFlight"})
CANCEL: Final = Contract("operations", {JSON: "Done"}, fails=(404,))
PROFILES: Final = Contract("profiles", {JSON: "Profiles"})
ACTIVATE: Final = Contract("profiles", {JSON: "ActiveProfile"}, {JSON: "ProfileChoice"}, fails=(404, 413))

# ---- scheduling -----------------------------------------------------------------------------

_ONLY_LOOKS: Final = "Loads nothing."
QUEUE: Final = Contract("scheduling", {JSON: "Queue"}, note=_ONLY_LOOKS)
WAITING: Final = Contract("scheduling", {JSON: "Waiting"}, fails=(404,), note=_ONLY_LOOKS)
PLAN: Final = Contract("scheduling", {JSON: "Plan"}, fails=(404,), note=_ONLY_LOOKS)
HOLD: Final = Contract(
    "scheduling", {LINES: "Lent"}, {JSON: "HoldRequest"}, fails=(409, 413, 503), endless=True,
    note="One line comes when the memory is there; it is held until the client or the daemon goes.  Where memory is "
    "not counted the answer is 409.",
)  # fmt: skip

# ---- what happens ---------------------------------------------------------------------------

HISTORY: Final = Contract("logs", {TEXT: ""})
_FOLLOW: Final = {"no-history": "Without what is kept already.", "no-follow": "Only what is kept already."}
FOLLOW_ALL: Final = Contract("logs", {TEXT: ""}, query=_FOLLOW, endless=True)
FOLLOW: Final = Contract("logs", {TEXT: ""}, query=_FOLLOW, fails=(404,), endless=True)
LEVEL: Final = Contract("logs", {JSON: "LogLevel"})
SET_LEVEL: Final = Contract(
    "logs", {JSON: "LogLevel"}, {JSON: "LogLevelChoice"}, fails=(413,),
    note="It holds until the daemon ends, or is told another one.",
)  # fmt: skip
HAPPENINGS: Final = Contract(
    "logs", {EVENTS: ""}, endless=True,
    note='Each event is `{"type": TYPE, "data": "JSON as text"}`.  First comes all there is, then what changes.',
)  # fmt: skip
