"""Reads a recorded workload: JSON lines, one for each request, in any order.

    {"model": "qwen", "at": 12.5, "user": "ann", "service": 3.1}

`model` and `at` (seconds) are needed, and either `service` (seconds that the request took)
or `out` (tokens generated, from which the machine works the time out).  `user`, `weight`,
`prompt` and `new` (tokens) are optional.  Requests come when they came, whoever waits.

The first line may say what the models are like, and how much memory they share:

    {"models": {"qwen": {"load": 12, "stop": 1, "memory": "18GB", "slots": 4}}, "budget": "24GB"}

Or a configuration says it.  What nobody says is 10 s to load, 1 s to stop, 4 slots, and one
model at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import attrs

from trioswap.config.mistakes import did_you_mean, found, key_path, quoted
from trioswap.config.values import parse_size
from trioswap.errors import Misuse
from trioswap.learning import LOAD, STOP
from trioswap.simulation.workload import ModelSpec, Session, Step, Workload

# More lines with mistakes than this are mostly one mistake, made in each of them.
_SHOWN: Final = 20
# Seconds and tokens beyond this are something else, such as nanoseconds.
_MOST: Final = 1e10


def read(path: Path, frame: Workload | None = None) -> Workload:
    """The workload recorded in *path*, on the models of *frame* if there is one; its first request comes at 0.

    Raises:
        Misuse: the file cannot be read, or has mistakes: all of them are told.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as exc:
        raise Misuse(f"{path}: cannot read the file: {exc.strerror}") from exc
    reader = _Reader(str(path), frame)
    for number, line in enumerate(lines, start=1):
        if line.strip():
            reader.read(number, line)
    return reader.workload()


# ---- values ---------------------------------------------------------------------------------


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(found(value, "text"))
    return value


def _seconds(value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= _MOST:
        raise ValueError(found(value, "a number of seconds from 0 up"))
    return float(value)


def _weight(value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= _MOST:
        raise ValueError(found(value, "a number above 0"))
    return float(value)


def _tokens(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MOST:
        raise ValueError(found(value, "a whole number from 0 up"))
    return value


def _slots(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= _MOST:
        raise ValueError(found(value, "a whole number from 1 up"))
    return value


def _table(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(found(value, "an object"))
    return value


_Fields = Mapping[str, Callable[[object], Any]]
_REQUEST: Final[_Fields] = {
    "model": _text,
    "at": _seconds,
    "user": _text,
    "weight": _weight,
    "prompt": _tokens,
    "new": _tokens,
    "out": _tokens,
    "service": _seconds,
}
_HEADER: Final[_Fields] = {"models": _table, "budget": parse_size}
_MODEL: Final[_Fields] = {"load": _seconds, "stop": _seconds, "memory": parse_size, "slots": _slots}


# ---- the file -------------------------------------------------------------------------------


@attrs.define(eq=False)
class _Reader:
    source: str
    frame: Workload | None
    """Models known before the first line; others are a mistake.  None: any will do."""
    mistakes: list[str] = attrs.field(factory=list, init=False)
    sessions: list[Session] = attrs.field(factory=list, init=False)
    specs: dict[str, ModelSpec] = attrs.field(factory=dict, init=False)
    budget: int | None = attrs.field(default=None, init=False)
    _judged: set[str] = attrs.field(factory=set, init=False)
    """Models about which everything has been said."""

    def read(self, number: int, line: bytes) -> None:
        """Take one line in."""
        place = f"{self.source}:{number}"
        try:
            record = json.loads(line)
        except (
            ValueError,
            RecursionError,
        ) as exc:  # no JSON, no UTF-8, digits by the thousand; brackets by the thousand
            why = exc.msg if isinstance(exc, json.JSONDecodeError) else "it cannot be read"
            self.mistakes.append(f"{place}: found what is no JSON ({why}), allowed is one object in each line")
            return
        if not isinstance(record, dict):
            self.mistakes.append(f"{place}: {found(record, 'one object in each line')}")
        elif "models" in record or "budget" in record:
            self._header(place, record)
        else:
            self._request(place, record)

    def _header(self, place: str, record: dict[str, Any]) -> None:
        if self.sessions:
            self.mistakes.append(f"{place}: found models after the first request, allowed is before it")
        if self.frame is not None:
            self.mistakes.append(f"{place}: found models, allowed is either these or a configuration")
        header = self._checked(place, (), record, _HEADER)
        self.budget = header.get("budget")
        for name, properties in header.get("models", {}).items():
            if isinstance(properties, dict):
                values = self._checked(place, ("models", name), properties, _MODEL)
                self.specs[name] = ModelSpec(name, **{"load": LOAD, "stop": STOP, **values})
            else:
                self.mistakes.append(f"{place}: {key_path(('models', name))}: {found(properties, 'an object')}")

    def _request(self, place: str, record: dict[str, Any]) -> None:
        before = len(self.mistakes)
        values = self._checked(place, (), record, _REQUEST)
        for key in ("model", "at"):
            if key not in record:
                self.mistakes.append(f"{place}: {key}: found nothing, but it is needed")
        if "service" not in record and "out" not in record:
            self.mistakes.append(f"{place}: found neither service nor out, but one of them is needed")
        if len(self.mistakes) == before:
            self._judge(place, values["model"])
            self.sessions.append(_session(**values))

    def _judge(self, place: str, model: str) -> None:
        """See, once, that the machine can play *model*."""
        if model in self._judged:
            return
        self._judged.add(model)
        if self.frame is None:
            self.specs.setdefault(model, ModelSpec(model, LOAD, STOP))
        known = {spec.name: spec for spec in self.frame.models} if self.frame else self.specs
        budget = self.frame.budget if self.frame else self.budget
        if model not in known:
            hint = did_you_mean(model, known)
            self.mistakes.append(f"{place}: model: found {quoted(model)}, which is not configured{hint}")
        elif budget is not None and not 0 < known[model].memory <= budget:
            what = f"found {known[model].memory} bytes" if known[model].memory else "found nothing"
            self.mistakes.append(
                f"{place}: the memory of model {quoted(model)}: {what}, allowed is from 1 to the budget of {budget}"
            )

    def _checked(self, place: str, path: tuple[str, ...], record: dict[str, Any], fields: _Fields) -> dict[str, Any]:
        """What is right of *record*."""
        right = {}
        for key, value in record.items():
            where = f"{place}: {key_path((*path, key))}"
            if key not in fields:
                hint = did_you_mean(key, fields) or f", allowed are {', '.join(fields)}"
                self.mistakes.append(f"{where}: unknown key{hint}")
                continue
            try:
                right[key] = fields[key](value)
            except ValueError as exc:
                self.mistakes.append(f"{where}: {exc}")
        return right

    def workload(self) -> Workload:
        """What the lines come to.

        Raises:
            Misuse: they have mistakes, or there are none.
        """
        if not self.sessions and not self.mistakes:
            self.mistakes.append(f"{self.source}: found no request, allowed is one in each line")
        if self.mistakes:
            more = len(self.mistakes) - _SHOWN
            rest = [f"and {more} more"] if more > 0 else []
            raise Misuse("\n".join(["the records have mistakes", *self.mistakes[:_SHOWN], *rest]))
        begin = min(session.start for session in self.sessions)
        sessions = tuple(attrs.evolve(session, start=session.start - begin) for session in self.sessions)
        frame = self.frame or Workload("", tuple(self.specs.values()), (), self.budget)
        return attrs.evolve(frame, name=self.source, sessions=sessions)


def _session(
    model: str,
    at: float,
    user: str = "somebody",
    weight: float = 1.0,
    prompt: int = 0,
    new: int | None = None,
    out: int = 0,
    service: float | None = None,
) -> Session:
    """One request, which nobody else's answer is needed for."""
    step = Step(model, prompt, prompt if new is None else new, out, service=service)
    return Session(user, at, (step,), weight)
