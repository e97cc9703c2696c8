"""What became of a request of `chaos.py`: answered, told what went wrong, broken off, or lost.  No I/O.

An answer that ends cleanly must be whole, and the own one; an error must be readable, in our shape.
A connection that breaks is fine only where something was done that breaks connections; that of a stream, which
can say what is wrong, only where it was done to the daemon.
"""

from __future__ import annotations

import enum
import json
import re
from collections import Counter
from collections.abc import Mapping

import attrs

_TOKENS = re.compile(rb'"token": "([^"]*)"')


class Kind(enum.Enum):
    """What is asked."""

    JSON = "JSON"
    STREAM = "stream"
    UPLOAD = "upload"


class End(enum.Enum):
    """How the answer ended."""

    CLEAN = "ended cleanly"
    BROKEN = "was broken off"
    SILENT = "did not end within its bound"
    REFUSED = "could not connect"


class Verdict(enum.Enum):
    """What became of the request."""

    ANSWERED = "answered"
    ERROR = "failed with a clear error"
    BROKEN = "visibly broken off"
    ABSENT = "found no daemon while it was down"
    LOST = "lost"
    FOREIGN = "foreign answer"
    GARBLED = "garbled stream"
    INTERNAL = "internal error"


BAD = (Verdict.LOST, Verdict.FOREIGN, Verdict.GARBLED, Verdict.INTERNAL)


@attrs.frozen
class Asked:
    """A request as it was sent."""

    token: str
    model: str
    kind: Kind
    chunks: int = 0
    """Events of a stream, without the last."""
    sum: int = 0
    """CRC of an upload."""


@attrs.define(eq=False)
class Got:
    """What came back."""

    end: End = End.SILENT
    status: int | None = None
    headers: Mapping[str, str] = attrs.field(factory=dict)
    body: bytes = b""
    """As far as it came."""
    first: float | None = None
    """Seconds until the status."""
    seconds: float = 0.0
    """All in all."""


@attrs.frozen
class Excuses:
    """What was done on purpose while the request was under way."""

    daemon: bool = False
    """The daemon was killed or stopped, or not yet there again."""
    server: bool = False
    """Something happened to the model server, or to this request there, after which its answer cannot go on."""
    operator: bool = False
    """An operator may have ended this very request."""


Judgement = tuple[Verdict, str]


def judge(asked: Asked, got: Got, excuses: Excuses) -> Judgement:
    """The verdict, and why."""
    if any(token.decode() != asked.token for token in _TOKENS.findall(got.body)):
        return Verdict.FOREIGN, "the token of another request"
    if got.end is not End.CLEAN or got.status is None:
        return _unfinished(asked, got, excuses)
    if got.status != 200:
        return _error(got)
    return (_stream if asked.kind is Kind.STREAM else _whole)(asked, got)


def _unfinished(asked: Asked, got: Got, excuses: Excuses) -> Judgement:
    # Before its first byte a failure must become a status, whatever happened to the model server (I14), and
    # a stream of events, none of which is large here, can always end with one that says what has happened.
    begun, can_tell = got.status is not None, asked.kind is Kind.STREAM and got.status == 200
    may_break = excuses.daemon or (begun and not can_tell and (excuses.operator or excuses.server))
    if got.end is End.REFUSED and excuses.daemon:
        return Verdict.ABSENT, got.end.value
    if got.end is not End.SILENT and may_break:
        return Verdict.BROKEN, got.end.value
    number, last = got.headers.get("x-request-id"), got.body[-80:]
    return Verdict.LOST, f"{got.end.value}, {got.status}, {got.seconds:.1f} s, {number}, behind {last!r}"


def _error(got: Got) -> Judgement:
    found = _object(got.body)
    error = found.get("error")
    if not isinstance(error, dict) or not error.get("message") or not error.get("type"):
        return Verdict.LOST, f"status {got.status} without a readable error: {got.body[:200]!r}"
    if got.status == 500 and found.get("src") == "trioswap":
        return Verdict.INTERNAL, error["message"]
    # Clients that are not told when to come again come at once; x-should-retry says that it is of no use.
    if got.status in (429, 503) and "retry-after" not in got.headers and "x-should-retry" not in got.headers:
        return Verdict.LOST, f"status {got.status} without Retry-After: {error['message']}"
    return Verdict.ERROR, f"{got.status} {error['message']}"


def _whole(asked: Asked, got: Got) -> Judgement:
    found = _object(got.body)
    if not found:
        return Verdict.LOST, f"ended cleanly, but it is no whole JSON: {got.body[-100:]!r}"
    if (found.get("model"), found.get("token")) != (asked.model, asked.token):
        return Verdict.FOREIGN, f"model {found.get('model')!r}, token {found.get('token')!r}"
    if asked.kind is Kind.UPLOAD and found.get("sum") != asked.sum:
        return Verdict.FOREIGN, "the server received another body"
    return Verdict.ANSWERED, ""


def _stream(asked: Asked, got: Got) -> Judgement:
    texts = _data(got.body)
    done = _DONE in texts
    if done and texts.index(_DONE) != len(texts) - 1:
        return Verdict.GARBLED, f"an event behind [DONE]: {texts[texts.index(_DONE) + 1]!r}"
    events = [_object(text) for text in texts if text != _DONE]
    if {} in events:
        return Verdict.GARBLED, f"a torn event: {texts[events.index({})]!r}"
    failed = bool(events) and isinstance(events[-1].get("error"), dict)
    chunks = events[:-1] if failed else events
    for each in chunks:
        if (each.get("model"), each.get("token")) != (asked.model, asked.token):
            return Verdict.FOREIGN, f"an event of another stream: {each}"
    if [each.get("number") for each in chunks] != list(range(len(chunks))):
        return Verdict.LOST, "events are missing, or in another order"
    if failed:
        return Verdict.ERROR, f"event: {events[-1]['error'].get('message')}"
    if not done or len(chunks) != asked.chunks:
        return Verdict.LOST, f"ended cleanly after {len(chunks)} of {asked.chunks} events, [DONE]: {done}"
    return Verdict.ANSWERED, ""


_DONE = b"[DONE]"


def _data(body: bytes) -> list[bytes]:
    """What the events say, without comments; the last may lack the blank line that makes it an event."""
    *events, rest = body.split(b"\n\n")
    return [each.removeprefix(b"data: ") for each in events if not each.startswith(b":")] + ([rest] if rest else [])


def _object(text: bytes) -> dict:
    """The JSON object, empty when it is none."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


# ---- the sum of it ------------------------------------------------------------------------


@attrs.define(eq=False)
class Tally:
    """What was done and what became of it."""

    planned: Counter[str] = attrs.field(factory=Counter)
    injected: Counter[str] = attrs.field(factory=Counter)
    verdicts: Counter[Verdict] = attrs.field(factory=Counter)
    aborted: int = 0
    """Requests whose client left on purpose."""
    longest: float = 0.0
    """Seconds of the longest request that waited for its answer."""
    reasons: Counter[str] = attrs.field(factory=Counter)
    """What clear errors say, without names and numbers."""
    problems: list[str] = attrs.field(factory=list)

    def judged(self, asked: Asked, got: Got, excuses: Excuses) -> Judgement:
        """The same as `judge`, and count it."""
        verdict, why = judge(asked, got, excuses)
        self.verdicts[verdict] += 1
        self.longest = max(self.longest, got.seconds)
        if verdict is Verdict.ERROR:
            self.reasons[re.sub(r'"[^"]*"|/\S+|(?<=\D)\d[\d.]*', "_", why)[:90]] += 1
        if verdict in BAD:
            self.problem(f"{verdict.value}: {asked.kind.value} {asked.token} for {asked.model}: {why}")
        return verdict, why

    def problem(self, text: str) -> None:
        """Something is not as it must be."""
        self.problems.append(text)

    @property
    def sent(self) -> int:
        """Requests."""
        return sum(self.verdicts.values()) + self.aborted
