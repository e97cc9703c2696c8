r"""JSON bodies as text that the scanner of the standard library steps over quickly; `jsontext` looks and edits.

Two things make it fast without a JSON library of our own:

- The text has one character per byte (it is seen as Latin-1), so that places in it are places
  in the body, and `json`'s scanner, which is written in C, steps over whole values.
- Even that scanner takes its time for what large bodies consist of: pictures and sounds, each
  one string of megabytes.  Those are found with `bytes.find`, and one character that stands
  in no Latin-1 text takes their place until the end (`View`).

As with `json.loads`, a body may be UTF-16 or UTF-32 (edited, it is UTF-8), may begin with a
byte order mark, and may hold NaN and Infinity, which some model servers take.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from json import JSONDecodeError, JSONDecoder
from typing import Final, TypeVar

import attrs

from trioswap.errors import BadRequest

_T = TypeVar("_T")

SCANNER: Final = JSONDecoder(object_pairs_hook=len)
"""Steps over values; the hook leaves nothing but a number of each object, and so its memory is free at once."""

_BLANKS: Final = re.compile(r"[ \t\n\r]*+")
_PLAIN_KEY: Final = re.compile(r'[ \t\n\r]*+"([^"\\\x00-\x1f]*+)"[ \t\n\r]*+:[ \t\n\r]*+')
"""A key without escapes, and all up to its value."""
_STRIDE: Final = 32 * 1024
"""Insides of strings at least this long may be cut out; to look for shorter ones costs more than it saves."""
_FIRST_CUT: Final = 0x100
"""The character that stands for the first cut: the first that Latin-1 does not have."""
_CUT: Final = re.compile(r"([^\x00-\xff])")


# ---- bytes and text ------------------------------------------------------------------------------


@attrs.frozen
class View:
    """A body as text of one character per byte, without the insides of its long strings.

    Each cut leaves one character.  Whether a row of bytes without quotes is the inside of a
    string or what stands between two, nobody knows before all is scanned.  But between two it
    leaves `"a"X"b"`, and before the first `X"a"`, which no scanner lets pass: so a text that
    passes was cut rightly, and one that fails is read again uncut.  Only a control character
    in a cut is not seen; that the model server will refuse it is soon enough.
    """

    text: str
    source: bytes
    """UTF-8, without the byte order mark."""
    mark: bytes
    cuts: tuple[tuple[int, int], ...] = ()
    """Start and end in `source`."""

    def bytes_of(self, text: str) -> bytes:
        """The bytes of *text*, an edited form of this one."""
        whole = memoryview(self.source)
        pieces: list[bytes | memoryview] = [self.mark]
        for number, piece in enumerate(_CUT.split(text)):
            if number % 2:
                start, end = self.cuts[ord(piece) - _FIRST_CUT]
                pieces.append(whole[start:end])
            else:
                pieces.append(piece.encode("latin-1"))
        return b"".join(pieces)


def read(body: bytes, reader: Callable[[View], _T]) -> _T:
    """What *reader*, which must scan the whole text and may be called twice, makes of *body*.

    Raises:
        BadRequest: *body* is not JSON, or *reader* says so.
    """
    try:
        source, mark = _as_utf8(body)
        if cuts := tuple(_long_insides(source)):
            with contextlib.suppress(ValueError):
                return reader(_view(source, mark, cuts))
        return reader(_view(source, mark))
    except RecursionError:
        why = "it is nested too deeply"
    except (JSONDecodeError, UnicodeDecodeError) as exc:
        why = str(exc)
    except ValueError:  # Python's guard against numbers that it would read for minutes
        why = f"a number has more than {sys.get_int_max_str_digits()} digits"
    raise BadRequest(f"the body is not JSON: {why}")


def seen(name: str) -> str:
    """*name* as it stands in the text of a view."""
    return name.encode("utf-8", "surrogatepass").decode("latin-1")


def _as_utf8(body: bytes) -> tuple[bytes, bytes]:
    """*body* as UTF-8, and the byte order mark that it may have begun with."""
    encoding = json.detect_encoding(body)
    if encoding == "utf-8":
        return body, b""
    if encoding == "utf-8-sig":
        return body[3:], body[:3]
    return body.decode(encoding, "surrogatepass").encode("utf-8", "surrogatepass"), b""


def _view(source: bytes, mark: bytes, cuts: tuple[tuple[int, int], ...] = ()) -> View:
    """The view of *source* without *cuts*; a UnicodeDecodeError when it is not UTF-8."""
    pieces = []
    at = 0
    for number, (start, end) in enumerate([*cuts, (len(source), 0)]):
        piece = source[at:start]
        if not piece.isascii():
            piece.decode("utf-8", "surrogatepass")
        pieces += [piece.decode("latin-1"), chr(_FIRST_CUT + number)]
        at = end
    return View("".join(pieces[:-1]), source, mark, cuts)


def _long_insides(source: bytes) -> Iterator[tuple[int, int]]:
    """What may be the inside of a long string: ASCII up to a quote, nothing escaped, all in one line.

    Steps of a stride find each that is twice as long, and look at little else.
    """
    at = _STRIDE
    while at < len(source):
        if source.find(b'"', at, at + _STRIDE) < 0:
            start, end = source.rfind(b'"', 0, at) + 1, source.find(b'"', at)
            if end < 0:
                return
            if _is_plain(source, start, end):
                yield start, end
            at = end
        at += _STRIDE


def _is_plain(source: bytes, start: int, end: int) -> bool:
    # In pieces that stay in the processor's cache: three looks for the price of one.
    for at in range(start, end, _STRIDE):
        chunk = source[at : min(at + _STRIDE, end)]
        if b"\\" in chunk or b"\n" in chunk or not chunk.isascii():
            return False
    return True


# ---- stepping over the text ----------------------------------------------------------------------


def object_at(text: str) -> int:
    """Where the object begins that *text* is.

    Raises:
        JSONDecodeError: it is not JSON (not always seen).
        BadRequest: it is JSON, but no object.
    """
    start = skip_blanks(text, 0)
    if text[start : start + 1] != "{":
        SCANNER.decode(text)
        raise BadRequest("the body must be a JSON object")
    return start


def items_of(text: str, start: int) -> Iterator[tuple[int, str | None, int, int, int]]:
    """The items of the object or array, which is not empty, that begins at *start*.

    Of each: where it begins with blanks, its key as seen in the text (None of an element),
    where its value begins and ends, and where the comma or the closing bracket stands.

    Raises:
        JSONDecodeError: it is not JSON.
    """
    is_object = text[start] == "{"
    ends = ",}" if is_object else ",]"
    comma = start
    while comma == start or text[comma] == ",":
        at = comma + 1
        key, value = _key(text, at) if is_object else (None, skip_blanks(text, at))
        end = SCANNER.raw_decode(text, value)[1]
        comma = skip_blanks(text, end)
        if comma == len(text) or text[comma] not in ends:
            raise JSONDecodeError("Expecting ',' delimiter", text, comma)
        yield at, key, value, end, comma


def skip_blanks(text: str, at: int) -> int:
    """Where the blanks at *at* end."""
    found = _BLANKS.match(text, at)
    assert found is not None
    return found.end()


def _key(text: str, at: int) -> tuple[str, int]:
    """The key of the member that begins at *at*, as seen in the text, and where its value begins."""
    if plain := _PLAIN_KEY.match(text, at):
        return plain[1], plain.end()
    at = skip_blanks(text, at)
    if text[at : at + 1] != '"':
        raise JSONDecodeError("Expecting property name enclosed in double quotes", text, at)
    end = SCANNER.raw_decode(text, at)[1]
    colon = skip_blanks(text, end)
    if text[colon : colon + 1] != ":":
        raise JSONDecodeError("Expecting ':' delimiter", text, colon)
    # With a cut in it this fails, and all is read again uncut: such a key is as good as never sent.
    name = json.loads(text[at:end].encode("latin-1"))
    return seen(name), skip_blanks(text, colon + 1)
