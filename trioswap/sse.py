"""What trioswap itself says inside a server-sent event stream (HTML standard, 9.2), in each endpoint's own format.

Three things: comments that show that somebody is at work, the progress of loading as text (when
`send_loading_state` is on), and failures that come when the status line has left already (invariant I14).
Says how bytes look; when they are sent is the business of `proxy`.  The clients' parsers are the measure: each
choice below was tried with the `openai` and `anthropic` packages, with what accumulates a whole answer too.

The choices, by dialect:

CHAT         Loading text is a complete `chat.completion.chunk`, or strict clients refuse it, with the text in
             `reasoning_content`, where people see it and programs do not take it for the answer.  No `role`: clients
             that accumulate append string to string, and with the server's own it would become "assistantassistant".
COMPLETIONS  A comment.  A `text_completion` chunk has no field but the answer; one with an empty text does no harm
             to the answer, but clients that time the first token take it for that, and nobody shows a field of ours.
MESSAGES     The protocol's own `ping`, which clients must bear anywhere, with the text in a field of ours.  A
             `message_start` of ours would clash with the server's, and nothing else may come before that.
RESPONSES    A comment: `openai` raises when anything comes before `response.created`.
PLAIN        A comment, for nothing is known of these streams.

Failures are `data: {"error": ...}`, which `openai` raises as APIError, and `event: error` where the protocol names
its events.  For RESPONSES the fields stand twice: flat, as OpenAI's reference has them, and under `error`, as its
servers send them (openai-dotnet#881).  `openai` raises for the second, wherever in the stream; the first alone it
hands out like any event, or refuses with a text of its own when it comes before `response.created`.

All that is sent is ASCII: clients that cut lines the way `str.splitlines` does would find more of them in names with
U+2028 or U+0085.

Comments end with a blank line, because there are clients that split at blank lines before they look.  Such a comment
belongs before the server's first event: where a server numbers its events (`id:`), both packages take each blank
line after that for an event without data, and `openai` fails on it.
"""

from __future__ import annotations

import json
import math
import re
from enum import Enum
from http import HTTPStatus
from typing import Any, Final, Self

import attrs

from trioswap.errors import TrioswapError
from trioswap.messages import WaitView


class Dialect(Enum):
    """The format of a stream."""

    CHAT = "chat"
    """OpenAI chat completions."""
    COMPLETIONS = "completions"
    """OpenAI completions, and those of llama.cpp: /completion and /infill."""
    MESSAGES = "messages"
    """Anthropic messages; /v1/messages/count_tokens, which does not stream, as far as errors go."""
    RESPONSES = "responses"
    """OpenAI responses."""
    PLAIN = "plain"
    """Any other."""


_DIALECTS: Final = {
    "/chat/completions": Dialect.CHAT,
    "/completions": Dialect.COMPLETIONS,
    "/completion": Dialect.COMPLETIONS,
    "/infill": Dialect.COMPLETIONS,
    "/messages": Dialect.MESSAGES,
    "/messages/count_tokens": Dialect.MESSAGES,
    "/responses": Dialect.RESPONSES,
}


def dialect_of(path: str) -> Dialect:
    """The dialect of *path*, which starts with /v1, with /v (surface reference 1.1), or with neither."""
    bare = re.sub(r"\A/v1?", "", path)
    return _DIALECTS.get(bare, Dialect.PLAIN)


# ---- comments ------------------------------------------------------------------------------

PROCESSING: Final = "processing"
"""The stage after those of `WaitView`: the model server has the request and has not answered yet."""


def _finite(seconds: float | None) -> float | None:
    return seconds if seconds is not None and math.isfinite(seconds) else None


@attrs.frozen
class Progress:
    """How far a request is that waits for its first byte."""

    model: str
    stage: str
    """As in `WaitView`, or `PROCESSING`."""
    place: int | None = None
    """Within the line for its model, from 1; None: it stands in no line."""
    waits_for: tuple[str, ...] = ()
    """The models in its way."""
    waited: float = 0.0
    """Seconds since it came, as far as known."""
    estimate: float | None = attrs.field(default=None, converter=_finite)
    """Seconds until it is served; None: cannot be told, and neither can infinity."""

    @classmethod
    def of(cls, view: WaitView) -> Self:
        """What the scheduler says of the request."""
        return cls(view.model, view.stage, view.place, view.waits_for, view.waited, view.estimate)

    @property
    def expected(self) -> int | None:
        """Whole seconds until it is served, rounded up; None: cannot be told."""
        return None if self.estimate is None else math.ceil(self.estimate)

    def document(self) -> dict[str, Any]:
        """The same for JSON, times to the millisecond."""
        times = {
            "waited": round(self.waited, 3),
            "estimate": None if self.estimate is None else round(self.estimate, 3),
        }
        return {**attrs.asdict(self), "waits_for": list(self.waits_for), **times}


# What stands in a comment as it is; other names are written as JSON strings.
_BARE: Final = re.compile(r"[\w./:@+-]+", re.ASCII)


def comment(progress: Progress) -> bytes:
    """One comment line and a blank one; every parser skips it."""
    words = [progress.stage]
    if progress.place is not None:
        words.append(f"place={progress.place}")
    if progress.expected is not None:
        words.append(f"expected={progress.expected}s")
    if progress.waits_for:
        words.append(f"waits_for={','.join(map(_word, progress.waits_for))}")
    if progress.waited >= 1:
        words.append(f"waited={progress.waited:.0f}s")
    words.append(f"model={_word(progress.model)}")
    return f": trioswap {' '.join(words)}\n\n".encode("ascii")


def _word(name: str) -> str:
    return name if _BARE.fullmatch(name) else json.dumps(name)


# ---- loading text --------------------------------------------------------------------------


@attrs.define(eq=False)
class LoadingText:
    """The progress of one request, told inside its stream.

    To be told before the server's first byte only.  `end` says that the model is ready, so when a
    failure comes instead, `error_event` is all that there is to say.
    """

    dialect: Dialect
    ident: str
    """The `id` of chunks."""
    created: int
    """The `created` of chunks: seconds since 1970."""
    _last: Progress | None = attrs.field(default=None, init=False)
    _ended: bool = attrs.field(default=False, init=False)

    def tell(self, progress: Progress) -> bytes:
        """What to send; nothing when it has been said: other seconds are no news."""
        last, self._last = self._last, progress
        if self._ended or (last is not None and _news(last) == _news(progress)):
            return b""
        return self._say(progress, f"{_sentence(progress)}\n")

    def end(self, waited: float | None = None) -> bytes:
        """The last words, *waited* seconds after the request came (None: as last told); none if there were no first."""
        if self._ended or self._last is None:
            return b""
        last = self._last
        words = self.tell(Progress(last.model, PROCESSING, waited=last.waited if waited is None else waited))
        self._ended = True
        # What the model itself thinks begins a paragraph of its own.
        return words + (self._say(last, "\n") if self.dialect is Dialect.CHAT else b"")

    def _say(self, progress: Progress, text: str) -> bytes:
        match self.dialect:
            case Dialect.CHAT:
                return _event(_chunk(self.ident, self.created, progress.model, text))
            case Dialect.MESSAGES:
                return _event({"type": "ping", "trioswap": {"text": text.rstrip("\n")}}, "ping")
            case _:
                return comment(progress)


def _news(progress: Progress) -> tuple[str, str, int | None, tuple[str, ...]]:
    """What must differ for another sentence: all in it that is not a guess."""
    return progress.model, progress.stage, None if progress.stage in _NO_LINE else progress.place, progress.waits_for


# Stages that end for all in the line at once, if the model takes them together; so the place says nothing.
_NO_LINE: Final = frozenset({"loading", PROCESSING})


def _sentence(progress: Progress) -> str:
    model, others = progress.model, ", ".join(progress.waits_for)
    have = "have" if len(progress.waits_for) > 1 else "has"
    if progress.stage == PROCESSING:
        return f"Model {model} is ready (waited {progress.waited:.0f} s)"
    what = {
        "loading": f"Loading model {model}",
        "draining": f"Waiting for model {model} until {others} {have} finished",
        "stopping": f"Waiting for model {model} until {others} {have} stopped",
    }.get(progress.stage, f"Waiting for model {model}" + (f" behind {others}" if others else ""))
    if progress.place is not None and progress.stage not in _NO_LINE:
        what += f", place {progress.place} in its queue"
    return what if progress.expected is None else f"{what} (about {progress.expected} s)"


def _chunk(ident: str, created: int, model: str, text: str) -> dict[str, Any]:
    choice = {"index": 0, "delta": {"reasoning_content": text}, "finish_reason": None}
    return {"id": ident, "object": "chat.completion.chunk", "created": created, "model": model, "choices": [choice]}


# ---- failures ------------------------------------------------------------------------------


def error_event(dialect: Dialect, error: TrioswapError) -> bytes:
    """A failure after the stream has begun; it belongs where `WholeEvents` is clean, and nothing comes after it."""
    return _error(dialect, error.anthropic_body() if dialect is Dialect.MESSAGES else error.openai_body())


def upstream_error_event(dialect: Dialect, status: int, body: bytes) -> bytes:
    """The same for a model server that answers with something else than an event stream when ours has begun.

    Its own words, when *status* is an error's and *body* has some, with its own `type`, `code` and `param`;
    else the status.  No `src`: these are not our words.
    """
    theirs = _told(body) if status >= 400 else {}
    ours = _refused(status, theirs.get("message", _answered(status)))
    document = ours.anthropic_body() if dialect is Dialect.MESSAGES else ours.openai_body()
    known = document["error"].keys()
    error = document["error"] | {key: value for key, value in theirs.items() if key in known}
    return _error(dialect, {key: value for key, value in document.items() if key != "src"} | {"error": error})


def _error(dialect: Dialect, document: dict[str, Any]) -> bytes:
    match dialect:
        case Dialect.CHAT | Dialect.COMPLETIONS:
            return _event(document)
        case Dialect.RESPONSES:
            error = document["error"]
            code = None if error["code"] is None else str(error["code"])
            # Nobody has counted the server's events; no client orders by this number.
            flat = {"type": "error", "code": code, "message": error["message"], "param": error["param"]}
            return _event({**flat, "sequence_number": 0, **document}, "error")
        case Dialect.MESSAGES | Dialect.PLAIN:
            return _event(document, "error")


def _event(document: dict[str, Any], name: str | None = None) -> bytes:
    """One event; `json` escapes what is not ASCII, so it is one line whatever the strings hold."""
    data = f"data: {json.dumps(document, separators=(',', ':'))}\n\n".encode("ascii")
    return data if name is None else b"event: " + name.encode("ascii") + b"\n" + data


def _refused(status: int, message: str) -> TrioswapError:
    """An error with the status of somebody else, for which our own tables know type and code."""
    kind: type[TrioswapError] = type("UpstreamRefused", (TrioswapError,), {"status": status})
    return kind(message)


def _answered(status: int) -> str:
    if status < 400:
        return f"the model server answered with status {status}, but not with an event stream"
    known = {entry.value: f" ({entry.phrase})" for entry in HTTPStatus}
    return f"the model server answered with status {status}{known.get(status, '')}"


def _told(body: bytes) -> dict[str, Any]:
    """The error object in *body*, its message a non-empty string; or empty.

    Forms: `{"error": {"message": ...}}` (OpenAI, Anthropic, llama.cpp), `{"error": "..."}` (Ollama, TEI),
    `{"message": ...}` (older vLLM), `{"detail": ...}` (FastAPI: a text, or a list of what is wrong where).
    """
    try:
        document: Any = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(document, dict):
        return {}
    error = document.get("error")
    candidates = [error if isinstance(error, dict) else {"message": error}, document]
    candidates.append({"message": _detail(document.get("detail"))})
    return next((found for found in map(_usable, candidates) if "message" in found), {})


def _usable(error: dict[str, Any]) -> dict[str, Any]:
    """Those of the four fields that clients can bear: texts, and numbers as `code` (llama.cpp)."""
    texts = {key: error[key] for key in ("message", "type", "code", "param") if isinstance(error.get(key), str)}
    code = error.get("code")
    numbers = {"code": code} if isinstance(code, int) and not isinstance(code, bool) else {}
    return {key: value for key, value in (texts | numbers).items() if value != ""}


def _detail(detail: Any) -> str | None:
    """FastAPI's `detail` as a text, if it is one."""
    if isinstance(detail, list):
        texts = [entry["msg"] for entry in detail if isinstance(entry, dict) and isinstance(entry.get("msg"), str)]
        return "; ".join(texts)
    return detail if isinstance(detail, str) else None


# ---- what may pass ---------------------------------------------------------------------------


# Last events of streams: OpenAI's own, Anthropic's, and those of OpenAI responses.
_LAST: Final = re.compile(
    rb"(?:\A|[\r\n])(?:data: ?\[DONE\]|event: ?(?:message_stop|response\.(?:completed|incomplete|failed))[\r\n])"
)
# Bytes of an event that tell which one it is: its name comes first.
_NAME_WITHIN: Final = 64


@attrs.define(eq=False)
class WholeEvents:
    r"""Lets a passing stream through by whole events, so that it can be ended between two of them at any moment.

    An event ends with a blank line, and lines end with \n, \r\n or \r (HTML standard, 9.2.5).  What stands behind
    the last blank line is of no use to anybody yet and is kept back until the next piece.  When that does not
    complete it either, it is very large, or the server knows no blank lines: then all passes as it comes, until
    a blank line does.  So no more than one piece is kept, and nobody waits for more than the next one.
    """

    is_clean: bool = attrs.field(default=True, init=False)
    """Whether an event of ours may follow what was let through."""
    _before: bytes = attrs.field(default=b"\n\n", init=False)
    """The last two bytes that were let through; a stream begins as if behind a blank line."""
    _kept: bytes = attrs.field(default=b"", init=False)
    _begin: bytes = attrs.field(default=b"", init=False)
    """Of the last event of which anything was let through: its first bytes."""

    def feed(self, piece: bytes) -> bytes:
        """Take the next bytes, cut anywhere; those that may pass now."""
        seen = self._before + self._kept + piece
        end = _end_of_events(seen)
        if end > 2:
            passes, self._kept = seen[2:end], seen[end:]
            self._note(passes)
            self.is_clean = True
        elif self.is_clean and not self._kept:
            passes, self._kept = b"", piece
        else:
            passes, self._kept = seen[2:], b""
            self._begin = ((b"" if self.is_clean else self._begin) + passes[:_NAME_WITHIN])[:_NAME_WITHIN]
            self.is_clean = False
        self._before = (self._before + passes)[-2:]
        return passes

    def rest(self) -> bytes:
        """What is still kept back; it may pass when the stream has ended as it should, and only then."""
        return self._kept

    @property
    def is_over(self) -> bool:
        """Whether the stream has said itself that nothing more comes: whoever has that has the whole answer."""
        return self.is_clean and _LAST.search(self._begin) is not None

    def _note(self, passes: bytes) -> None:
        """Remember how the last event of these bytes begins, of which the first may have begun before them."""
        seen = self._before + passes
        begin = max(2, _end_of_events(seen.rstrip(b"\r\n")))
        if begin == 2 and not self.is_clean:
            self._begin = (self._begin + passes)[:_NAME_WITHIN]
        elif seen[begin:].strip(b"\r\n"):
            self._begin = seen[begin : begin + _NAME_WITHIN]


def _end_of_events(data: bytes) -> int:
    """Where the last blank line of *data* ends; less than 2: it has none."""
    if b"\r" not in data:  # as nearly always
        return 2 + data.rfind(b"\n\n")
    end = 2 + max(data.rfind(b"\n\n"), data.rfind(b"\n\r"), data.rfind(b"\r\r"))
    return end + 1 if data[end - 1 : end + 1] == b"\r\n" else end
