"""Looks into the JSON text of a request, and edits it without touching the rest.

Nothing is parsed and written again, for upstreams may care for the spelling of a number,
and people for finding what they sent: places are found, and only their bytes change.  What
is changed and why is the business of `filters`, which model a name means that of others,
and what makes it fast that of `jsonview`.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from json import JSONDecodeError, JSONDecoder
from typing import Any, Final

import attrs

from trioswap.errors import BadRequest, MissingModel
from trioswap.jsonview import View, items_of, object_at, read, seen, skip_blanks

MAX_INDEX: Final = 1000
"""Numbers above it in a path are keys, such as those of tokens in `logit_bias`; as the number of an element, one
would cost a null for each element before it."""


# ---- looking in --------------------------------------------------------------------------------

_LEADING: Final = frozenset({"model", "stream"})


@attrs.frozen
class Outline:
    """What of a request's body leads it."""

    model: str | None
    """None: not there, null, or empty."""
    stream: bool
    """Whether `stream` is true, and not merely something like it."""

    def named(self) -> str:
        """The model.

        Raises:
            MissingModel: none is named.
        """
        if self.model is None:
            raise MissingModel
        return self.model


def outline(body: bytes) -> Outline:
    """What of *body* leads the request; of keys that stand twice the last one counts, as it does for model servers.

    Raises:
        BadRequest: not a JSON object, or `model` is no string.
    """
    leading = read(body, _leading)
    model = leading.get("model")
    if "model" in leading and not (isinstance(model, str) and model.isascii()):
        # Rare: None may be an object as well, and what is not ASCII was seen byte by byte.
        model = read(body, lambda _: json.loads(body)["model"])
    if model is not None and not isinstance(model, str):
        raise BadRequest('"model" must be a string')
    return Outline(model=model or None, stream=leading.get("stream") is True)


def _leading(view: View) -> dict[str, Any]:
    """The values at the top that lead, as far as they are there; None may stand for an object.

    The hook is called at the end of each object, hence for the outermost one last, and
    drops what it had before: a body of many small objects never stands in memory whole.
    """
    object_at(view.text)
    last: deque[list[tuple[str, Any]]] = deque(maxlen=1)
    JSONDecoder(object_pairs_hook=last.append).decode(view.text)
    return {key: value for key, value in last[0] if key in _LEADING}


# ---- editing -----------------------------------------------------------------------------------


@attrs.frozen
class Set:
    """Give what is at *path* a value, and make what leads there."""

    path: str
    value: object


@attrs.frozen
class Strip:
    """Take out what is at *path*, if it is there."""

    path: str


Change = Set | Strip


def edit(body: bytes, changes: Sequence[Change]) -> bytes:
    r"""*body* after *changes*, one after the other; the very same object when nothing changes.

    A path is a row of keys with dots between (surface reference 1.5).  In an array a number
    counts its elements, and `-1` sets behind the last one, or strips the last one.  A
    backslash takes the meaning of the character behind it, and a colon before a part makes
    it a key although it is a number, as in `logit_bias.:42`.

    Of a key that stands twice, each is changed, because upstreams differ in which one they
    read.  New keys come last.  What leads to the place of a `Set` and is neither object nor
    array, null and text alike, gives way to an object (before a number, to an array);
    arrays are filled with nulls up to the number.  `Strip` goes through nothing but what is there.

    Raises:
        BadRequest: not a JSON object, or a `Set` leads by a key into an array.
    """
    if not changes:
        return body
    steps = [(parts_of(change.path), _written(change)) for change in changes]
    wanted = frozenset(part.seen for path, _ in steps for part in path)

    def edited(view: View) -> bytes:
        text = _edited(view.text, steps, wanted)
        return body if text == view.text else view.bytes_of(text)

    return read(body, edited)


def _written(change: Change) -> str | None:
    """The text of the new value; None: there is none."""
    if isinstance(change, Strip):
        return None
    return json.dumps(change.value, separators=(",", ":"), allow_nan=False)


# ---- paths -------------------------------------------------------------------------------------

_TOKEN: Final = re.compile(r"\\(?P<escaped>.?)|(?P<plain>[^\\.]+)|(?P<dot>\.)", re.DOTALL)


@attrs.frozen
class Part:
    """One step of a path."""

    name: str
    """As a key."""
    index: int | None
    """As the number of an element, -1 for the last; None: it is none."""
    seen: str = attrs.field(init=False, default=attrs.Factory(lambda self: seen(self.name), takes_self=True))
    """The name as it stands in the text of a view."""


@lru_cache(maxsize=1024)  # Paths come from the configuration, never from clients.
def parts_of(path: str) -> tuple[Part, ...]:
    """The steps of *path*, at least one, by the rules that `edit` tells."""
    names, keys = [""], [False]
    for token in _TOKEN.finditer(path):
        if token["dot"]:
            names.append("")
            keys.append(False)
        elif not (names[-1] or keys[-1]) and token[0].startswith(":"):
            names[-1] = token[0][1:]
            keys[-1] = True
        else:
            names[-1] += token["plain"] or token["escaped"]
    return tuple(Part(name, None if is_key else _index(name)) for name, is_key in zip(names, keys, strict=True))


def _index(name: str) -> int | None:
    if name == "-1":
        return -1
    return int(name) if re.fullmatch("[0-9]{1,4}", name) and int(name) <= MAX_INDEX else None


# ---- objects and arrays, opened as far as paths lead into them -----------------------------------


@attrs.define(eq=False)
class _Item:
    """A member of an object or an element of an array, without the comma behind it.

    Or several members that no path leads to, with the commas between them, all in `lead`.
    """

    lead: str
    """What stands before the value: blanks, and the key with its colon."""
    value: _Value
    trail: str = ""
    """Blanks between the value and its comma."""
    key: str | None = None
    """As seen in the text, but without escapes; None of elements, and of several members."""


@attrs.define(eq=False)
class _Container:
    is_object: bool
    """Or else it is an array."""
    items: list[_Item] = attrs.field(factory=list)
    tail: str = ""
    """Blanks before the closing bracket."""

    def at(self, part: Part) -> list[_Item]:
        """What is there of that name, duplicates included, or of that number."""
        if self.is_object:
            return [item for item in self.items if item.key == part.seen]
        if part.index is None:
            return []
        return self.items[part.index :][:1]

    def add(self, part: Part, value: str) -> None:
        """Put *value* behind the last item.

        Raises:
            BadRequest: this is an array, and *part* no number.
        """
        if self.is_object:
            self.items.append(_Item(json.dumps(part.name) + ":", value, key=part.seen))
            return
        if part.index is None:
            raise BadRequest(f'the body has an array where this server sets "{part.name}", which needs an object')
        self.items += [_Item("", "null") for _ in range(len(self.items), part.index)]
        self.items.append(_Item("", value))

    def drop(self, dropped: Sequence[_Item]) -> None:
        """Take *dropped* out, each with a comma."""
        gone = set(dropped)  # A client may send a key a million times.
        self.items = [item for item in self.items if item not in gone]

    def write(self, out: list[str]) -> None:
        """Append the text to *out*, in pieces."""
        out.append("{" if self.is_object else "[")
        for number, item in enumerate(self.items):
            out += [",", item.lead] if number else [item.lead]
            if isinstance(item.value, str):
                out.append(item.value)
            else:
                item.value.write(out)
            out.append(item.trail)
        out += [self.tail, "}" if self.is_object else "]"]


_Value = str | _Container
"""JSON text without blanks around it, or what was made of it."""
_Path = tuple[Part, ...]


def _edited(text: str, steps: Sequence[tuple[_Path, str | None]], wanted: frozenset[str]) -> str:
    start = object_at(text)
    root, end = _open(text, start, wanted)
    if (rest := skip_blanks(text, end)) < len(text):
        raise JSONDecodeError("Extra data", text, rest)
    for path, new in steps:
        if new is None:
            _strip(root, path, wanted)
        else:
            _set(root, path, new, wanted)
    out = [text[:start]]
    root.write(out)
    return "".join([*out, text[end:]])


def _set(value: _Value, path: _Path, new: str, wanted: frozenset[str]) -> _Value:
    if not path:
        return new
    container = _opened(value, wanted)
    if container is None:
        return _made(path, new)
    part, rest = path[0], path[1:]
    is_behind = part.index == -1 and not container.is_object
    found = [] if is_behind else container.at(part)
    for item in found:
        item.value = _set(item.value, rest, new, wanted)
    if not found:
        container.add(part, _made(rest, new))
    return container


def _strip(value: _Value, path: _Path, wanted: frozenset[str]) -> _Value:
    container = _opened(value, wanted)
    if container is None:
        return value
    part, rest = path[0], path[1:]
    found = container.at(part)
    if not rest:
        container.drop(found)
        return container
    for item in found:
        item.value = _strip(item.value, rest, wanted)
    return container


def _made(path: _Path, new: str) -> str:
    """The text of nothing but *new* at *path*."""
    opening, closing = [], []
    for part in path:
        is_key = part.index is None
        opening.append(f"{{{json.dumps(part.name)}:" if is_key else "[" + "null," * max(part.index or 0, 0))
        closing.append("}" if is_key else "]")
    return "".join([*opening, new, *reversed(closing)])


def _opened(value: _Value, wanted: frozenset[str]) -> _Container | None:
    """None: it is neither object nor array."""
    if isinstance(value, str):
        return _open(value, 0, wanted)[0] if value[0] in "{[" else None
    return value


def _open(text: str, start: int, wanted: frozenset[str]) -> tuple[_Container, int]:
    """The object or array that begins at *start*, and where it ends.

    Of an object's members only those *wanted* are told apart: the rest are many, and stay as they are.
    """
    container = _Container(is_object=text[start] == "{")
    end = close = skip_blanks(text, start + 1)
    if text[close : close + 1] == ("}" if container.is_object else "]"):
        container.tail = text[start + 1 : close]
        return container, close + 1
    passed = None  # where a row of members began that are not wanted
    for at, key, value, end, close in items_of(text, start):
        if key is not None and key not in wanted:
            passed = at if passed is None else passed
            continue
        if passed is not None:
            container.items.append(_Item(text[passed : at - 1], ""))
            passed = None
        container.items.append(_Item(text[at:value], text[value:end], text[end:close], key))
    # Now `end` and `close` are those of the last item, whose trail is the tail.
    if passed is None:
        container.items[-1].trail = ""
    else:
        container.items.append(_Item(text[passed:end], ""))
    container.tail = text[end:close]
    return container, close + 1
