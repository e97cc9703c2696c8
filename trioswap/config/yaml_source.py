"""Reads YAML texts into Documents.

PyYAML only cuts the text into events, with its C parser where that is built in.  What they
come to is decided here and in `scalars`, by the rules of YAML 1.2 and of yaml.v3: there is
one mapping with keys of text, no key twice, `<<` merges, and nothing but plain data.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

import attrs
import yaml

from trioswap.config.document import MAX_DEPTH, MAX_VALUES, TOO_DEEP, TOO_MANY, Document, Place, Unreadable
from trioswap.config.mistakes import Mistakes, Path, did_you_mean, quoted
from trioswap.config.scalars import TAGS, Scalar, resolve, resolve_tagged
from trioswap.config.yaml_errors import Position, explain

LOADER: Any = getattr(yaml, "CBaseLoader", yaml.BaseLoader)

# What YAML does not let stand in a text (YAML 1.2, "Character Set"); PyYAML's two parsers say it in two ways.
_UNPRINTABLE: Final = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_SURROGATE: Final = re.compile("[\ud800-\udfff]")

# The braces of `${NAME}` are structure within [ ] and { }.  Where a text cannot be read for
# that, each is hidden behind one character that no keyboard has, so that columns stay true.
_REFERENCE: Final = re.compile(r"\$\{([A-Za-z0-9_.-]+)\}")
_HIDDEN: Final = str.maketrans("${}", "\ue000\ue001\ue002")
_REVEALED: Final = str.maketrans("\ue000\ue001\ue002", "${}")

_CORE: Final = "tag:yaml.org,2002:"
_LIST, _MAPPING, _MERGE = "seq", "map", "merge"
_WHAT: Final = {_LIST: "a list", _MAPPING: "a mapping"}


def parse_yaml(text: str, file: str, mistakes: Mistakes) -> Document:
    """The document that *text* is; nothing in it, or only comments, is an empty one.

    *file* is what places call it.  Keys that are there twice go to *mistakes*, and the
    first stays.

    Raises:
        Unreadable: it is no YAML, or not what the module's docstring says, or beyond the bounds of `document`.
    """
    if bad := _UNPRINTABLE.search(text):
        line, column = text.count("\n", 0, bad.start()) + 1, bad.start() - text.rfind("\n", 0, bad.start())
        raise Unreadable(f"found the character U+{ord(bad[0]):04X}, allowed are printable ones", line, column)
    root = _compose_either_way(text)
    document = Document({}, {})
    builder = _Builder(file, document, mistakes)
    if root is not None and not builder.is_nothing(root):
        if root.kind != _MAPPING:
            what = _WHAT.get(root.kind, "text")
            allowed = "allowed are keys with values (key: value)"
            raise Unreadable(f"found {what} at the top of the file, {allowed}", root.line, root.column)
        document.values.update(builder.mapping(root, ()))
    return document


def _compose_either_way(text: str) -> _Node | None:
    try:
        return _compose(text)
    except Unreadable:
        hidden = _REFERENCE.sub(lambda match: match[0].translate(_HIDDEN), text)
        if hidden == text or text.translate(_REVEALED) != text:
            raise
    return _compose(hidden, revealed=True)


# ---- from events to nodes -----------------------------------------------------------------


@attrs.define(eq=False)
class _Node:
    """A piece of YAML before aliases and merges are followed."""

    kind: str
    """`_LIST`, `_MAPPING`, `_MERGE` (the key `<<`), or empty: a scalar."""
    tag: str
    """Without its prefix; empty: none is written."""
    line: int
    column: int
    text: str = ""
    is_plain: bool = False
    """A scalar without quotes and without a tag."""
    inner: list[_Node] = attrs.field(factory=list)
    """Elements of a list; keys and values of a mapping in turn."""


def _compose(text: str, *, revealed: bool = False) -> _Node | None:
    """The root of the only document in *text*, None when there is none."""
    composer = _Composer(revealed)
    try:
        for event in yaml.parse(text, Loader=LOADER):
            composer.take(event)
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark
        char = "" if mark is None else text[mark.index : mark.index + 1]
        places = (_place_at(mark), _place_at(exc.context_mark))
        raise explain(exc.problem or "", exc.context or "", char, *places) from exc
    except yaml.YAMLError as exc:
        raise explain(str(exc), "", "", None, None) from exc
    return composer.root


@attrs.define(eq=False)
class _Composer:
    """Makes one tree of nodes out of the events of a text."""

    revealed: bool
    """Whether scalars are to have the braces back that were hidden."""
    root: _Node | None = None
    _documents: int = 0
    _open: list[tuple[_Node, str | None]] = attrs.field(factory=list)
    """Collections that have not ended, the outermost first, with their anchors."""
    _anchors: dict[str, _Node] = attrs.field(factory=dict)

    def take(self, event: yaml.Event) -> None:
        """Put *event* into the tree.

        Raises:
            Unreadable: the text is not what the module's docstring says, or beyond the bounds of `document`.
        """
        match event:
            case yaml.ScalarEvent():
                self._add(self._scalar(event), event.anchor)
            case yaml.AliasEvent():
                self._add(self._alias(event), None)
            case yaml.CollectionStartEvent():
                kind = _LIST if isinstance(event, yaml.SequenceStartEvent) else _MAPPING
                self._open.append((_Node(kind, _tag_of(event, (kind,)), *_place_of(event)), event.anchor))
                if len(self._open) > MAX_DEPTH:
                    raise Unreadable(TOO_DEEP, *_place_of(event))
            case yaml.CollectionEndEvent():
                self._add(*self._open.pop())
            case yaml.DocumentStartEvent():
                self._documents += 1
                if self._documents > 1:
                    raise Unreadable("found a second document (---), allowed is one in a file", *_place_of(event))
            case _:
                pass  # the end of the document, and both ends of the stream

    def _scalar(self, event: yaml.ScalarEvent) -> _Node:
        text: str = event.value.translate(_REVEALED) if self.revealed else event.value
        if _SURROGATE.search(text):
            raise Unreadable("found half a character (\\uD800 to \\uDFFF), allowed are whole ones", *_place_of(event))
        tag = _tag_of(event, (*TAGS, _MERGE))
        is_plain = not tag and event.style in (None, "")
        is_merge = tag == _MERGE or (is_plain and text == "<<")
        return _Node(_MERGE if is_merge else "", tag, *_place_of(event), text=text, is_plain=is_plain)

    def _alias(self, event: yaml.AliasEvent) -> _Node:
        name = event.anchor or ""
        node = self._anchors.get(name)
        if node is None:
            allowed = f"allowed is the name of an anchor (&{name}) that is complete before it"
            raise Unreadable(
                f"found the alias *{name}, {allowed}{did_you_mean(name, self._anchors)}", *_place_of(event)
            )
        line, column = _place_of(event)
        return attrs.evolve(node, line=line, column=column)

    def _add(self, node: _Node, anchor: str | None) -> None:
        if anchor is not None:
            self._anchors[anchor] = node
        if self._open:
            self._open[-1][0].inner.append(node)
        else:
            self.root = node


def _place_of(event: yaml.Event) -> Position:
    place = _place_at(event.start_mark)
    assert place is not None  # events of a parser have places
    return place


def _place_at(mark: Any) -> Position | None:
    """PyYAML counts from 0; its two parsers have two classes of marks."""
    return None if mark is None else (mark.line + 1, mark.column + 1)


def _tag_of(event: yaml.ScalarEvent | yaml.CollectionStartEvent, allowed: tuple[str, ...]) -> str:
    """The tag of a node without its prefix; `!` alone says of a scalar that it is text."""
    written: str | None = event.tag
    if written is None:
        return ""
    if written == "!":
        return "str" if "str" in allowed else ""
    tag = written.removeprefix(_CORE)
    if tag not in allowed or tag == written:
        names = ", ".join(f"!!{name}" for name in allowed if name != _MERGE)
        shown = f"!!{tag}" if tag != written else written
        raise Unreadable(f"found the tag {shown}, allowed here are {names}, or none", *_place_of(event))
    return tag


# ---- from nodes to values -----------------------------------------------------------------


@attrs.define(eq=False)
class _Builder:
    """Makes values out of nodes; what aliases stand for is made anew each time."""

    file: str
    document: Document
    mistakes: Mistakes
    _made: int = 0
    _entries: dict[int, dict[str, tuple[_Node, _Node]]] = attrs.field(factory=dict)
    """The merged entries of each mapping, by the identity of its list of nodes."""

    def is_nothing(self, node: _Node) -> bool:
        """Whether it is a null, as an empty document is."""
        return not node.kind and self._scalar_value(node) is None

    def mapping(self, node: _Node, path: Path) -> dict[str, Any]:
        """The values of a mapping by its keys, which are text."""
        values: dict[str, Any] = {}
        for name, (key, value) in self._entries_of(node, path, 0).items():
            inner = (*path, name)
            self.document.places[inner] = Place(self.file, key.line, key.column)
            values[name] = self._value(value, inner)
        return values

    def _value(self, node: _Node, path: Path) -> Any:
        self._count(node)
        if len(path) > MAX_DEPTH:  # possible with aliases only, the composer has counted the rest
            raise Unreadable(TOO_DEEP, node.line, node.column)
        if node.kind == _MAPPING:
            return self.mapping(node, path)
        if node.kind == _LIST:
            return [self._element(inner, (*path, index)) for index, inner in enumerate(node.inner)]
        if node.is_plain:
            self.document.texts[path] = node.text
        return self._scalar_value(node)

    def _element(self, node: _Node, path: Path) -> Any:
        self.document.places[path] = Place(self.file, node.line, node.column)
        return self._value(node, path)

    def _scalar_value(self, node: _Node) -> Scalar:
        if node.is_plain:
            return resolve(node.text)
        try:
            return resolve_tagged(node.tag if node.tag in TAGS else "str", node.text)
        except ValueError:
            text = f"found {quoted(node.text)} under the tag !!{node.tag}, allowed is what it names"
            raise Unreadable(text, node.line, node.column) from None

    def _count(self, node: _Node) -> None:
        self._made += 1
        if self._made > MAX_VALUES:
            raise Unreadable(f"{TOO_MANY} (what an alias stands for counts each time)", node.line, node.column)

    # ---- keys ---------------------------------------------------------------------------

    def _entries_of(self, node: _Node, path: Path, depth: int) -> dict[str, tuple[_Node, _Node]]:
        """Keys and values, those of merges where the `<<` stands; written ones win, then the first merged."""
        known = self._entries.get(id(node.inner))
        if known is not None:
            return known
        if depth > MAX_DEPTH:
            raise Unreadable(TOO_DEEP, node.line, node.column)
        pairs = list(zip(node.inner[::2], node.inner[1::2], strict=True))
        own = self._own_entries(pairs, path)
        entries: dict[str, tuple[_Node, _Node]] = {}
        for key, value in pairs:
            if key.kind == _MERGE:
                for merged in self._merged(value):
                    for name, entry in self._entries_of(merged, path, depth + 1).items():
                        self._count(key)
                        entries.setdefault(name, own.get(name, entry))
            else:
                entries.setdefault(key.text, own[key.text])
        self._entries[id(node.inner)] = entries
        return entries

    def _own_entries(self, pairs: list[tuple[_Node, _Node]], path: Path) -> dict[str, tuple[_Node, _Node]]:
        """What is written in the mapping itself, each key once."""
        own: dict[str, tuple[_Node, _Node]] = {}
        for key, value in pairs:
            if key.kind in _WHAT:
                raise Unreadable(f"found {_WHAT[key.kind]} as a key, allowed is text", key.line, key.column)
            if key.text in own:
                first = own[key.text][0]
                # The place of the mistake is that of the first one.
                again = f"found it again on line {key.line}" if key.line != first.line else "found it twice on the line"
                self.mistakes.add((*path, key.text), f"{again}, allowed is once")
            own.setdefault(key.text, (key, value))
        return own

    def _merged(self, value: _Node) -> Iterator[_Node]:
        """The mappings that stand behind a `<<`."""
        for node in value.inner if value.kind == _LIST else [value]:
            if node.kind != _MAPPING:
                found = f"found {_WHAT.get(node.kind, 'a single value')} behind <<"
                raise Unreadable(f"{found}, allowed is a mapping, or a list of mappings", node.line, node.column)
            yield node
