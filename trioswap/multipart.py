"""Finds text fields in a multipart/form-data body that passes by in pieces (RFC 7578; RFC 2046, 5.1).

It tells the value of each wanted field and at which bytes of the body it stands, so
that whoever keeps the body can replace just those bytes and leave every file, its
headers and the order of the parts as they are.  Keeping the body, its limit, and
what the fields mean are for others.

Servers differ in what they make of malformed forms, and what two servers read
differently is a way past whoever decides by the first reading.  So this refuses what
is not clearly well-formed: line breaks other than CRLF, text behind a delimiter, parts
without a name, encodings of parts (RFC 7578, 4.7 deprecates them).

The hard part is to hold little and to look at each byte a bounded number of times,
whatever the pieces are.  The buffer keeps only what may still be the beginning of a
delimiter, a part's head up to its limit, or a wanted value up to its limit; a search
begins where the last one ended.  The delimiter has at most 74 bytes, so even a body
made of near misses costs at most that many comparisons per byte.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from enum import Enum, auto
from typing import Final

import attrs

from trioswap.errors import BadRequest

# Bytes of the header lines of one part.  Browsers and SDKs send about 200; a long file name is 1,000.
MAX_HEAD: Final = 8 * 1024
# Bytes of a wanted value: names of models and flags.
MAX_VALUE: Final = 4 * 1024
MAX_PARTS: Final = 10_000
# Occurrences of wanted fields, all together; each is kept, so that all can be replaced.
MAX_FIELDS: Final = 100
# Bytes between a delimiter and the end of its line.  RFC 2046 allows white space there, and nobody sends it.
MAX_PADDING: Final = 256

_CRLF: Final = b"\r\n"
_BLANK: Final = b" \t"
# RFC 2046, 5.1.1: 1 to 70 of these, the last of them no space.
_BOUNDARY: Final = re.compile(rb"[0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-]")
_PARAMETER: Final = re.compile(rb';[ \t]*([^\s=;"]+)[ \t]*=[ \t]*("(?:[^"\\]|\\.)*"|[^;"\s]*)[ \t]*', re.DOTALL)
_HEADER: Final = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+)[ \t]*:([^\r\n\0]*)")
_FOLD: Final = re.compile(rb"\r\n[ \t]+")
# RFC 7578, 4.7: the encodings that change nothing.
_IDENTITY: Final = frozenset({b"7bit", b"8bit", b"binary"})


def boundary_of(content_type: bytes) -> bytes:
    """The boundary that a Content-Type of multipart/form-data names.

    Raises:
        BadRequest: it is another type, or names no boundary, or one that RFC 2046, 5.1.1 does not allow.
    """
    kind, parameters = _parameters(content_type.strip(), "Content-Type")
    if kind != b"multipart/form-data":
        raise BadRequest(f'the Content-Type is "{_shown(kind)}", not multipart/form-data')
    boundary = parameters.get(b"boundary")
    if boundary is None:
        raise BadRequest("the Content-Type multipart/form-data names no boundary")
    if not _BOUNDARY.fullmatch(boundary):
        raise BadRequest(f'the boundary "{_shown(boundary)}" is not one that RFC 2046 allows')
    return boundary


@attrs.frozen
class Field:
    """One occurrence of a wanted text field."""

    value: str
    start: int
    """Offset in the body of the value's first byte."""
    end: int
    """Offset of the byte after its last."""


class _State(Enum):
    PREAMBLE = auto()
    """Before the first delimiter."""
    LINE = auto()
    """Behind a delimiter, up to the end of its line."""
    HEAD = auto()
    CONTENT = auto()
    EPILOGUE = auto()
    """Behind the last delimiter; what comes there has no meaning."""


class FormScanner:
    """Reads one body: `feed` it in pieces, then `close`; from then on `fields` is complete.

    After an error nothing more may be fed.
    """

    def __init__(self, boundary: bytes, wanted: Collection[str]) -> None:
        self._delimiter = b"\r\n--" + boundary
        self._wanted = {name.encode(): name for name in wanted}
        self._fields: dict[str, list[Field]] = {}
        self._state = _State.PREAMBLE
        # The first delimiter needs no line break before it; with one put before the body, it is as all others.
        self._buffer = bytearray(_CRLF)
        self._start = -len(_CRLF)  # where the buffer begins in the body
        self._searched = 0  # bytes of the buffer at whose beginning nothing can be found any more
        self._parts = 0
        self._name: str | None = None  # of the present part, when it is wanted; then its content stays in the buffer
        self._content = 0  # where the content of the present part begins in the body

    def __repr__(self) -> str:
        return f"<FormScanner {self._state.name} at byte {self._start}: {self._parts} parts>"

    @property
    def fields(self) -> Mapping[str, Sequence[Field]]:
        """The wanted fields that were found, by name; of each all occurrences in their order."""
        return self._fields

    def value(self, name: str) -> str | None:
        """The value of a wanted field; None: there is none.

        Of several it is the last, as most model servers (FastAPI, Starlette) and the JSON parsers of
        all read it; Go's take the first, so who forwards a changed value must replace all occurrences.
        """
        found = self._fields.get(name)
        return found[-1].value if found else None

    def feed(self, data: bytes) -> None:
        """Read the next piece of the body, of any size.

        Raises:
            BadRequest: the body is malformed, or passes a limit; the message says where.
        """
        if self._state is _State.EPILOGUE:
            self._start += len(data)
            return
        self._buffer += data
        while self._step():
            pass

    def close(self) -> None:
        """The body is complete.

        Raises:
            BadRequest: it ends before its last delimiter.
        """
        # RFC 2046, 5.1.1: the line of the last delimiter needs no end.
        if self._state is _State.LINE and self._buffer[:2] == b"--" and not self._buffer[2:].strip():
            self._state = _State.EPILOGUE
        if self._state is not _State.EPILOGUE:
            where = "before its first" if self._state is _State.PREAMBLE else f"in part {self._parts}, before its last"
            raise self._malformed(len(self._buffer), f"it ends {where} delimiter")

    # ---- one step each; False: more data is needed ---------------------------------------

    def _step(self) -> bool:
        match self._state:
            case _State.PREAMBLE | _State.CONTENT:
                return self._find_delimiter()
            case _State.LINE:
                return self._end_line()
            case _State.HEAD:
                return self._read_head()
            case _State.EPILOGUE:
                self._drop(len(self._buffer))
                return False

    def _find_delimiter(self) -> bool:
        at = self._buffer.find(self._delimiter, self._searched)
        if at < 0:
            self._searched = max(self._searched, len(self._buffer) - len(self._delimiter) + 1)
            if self._name is None:
                self._drop(self._searched)
            else:
                self._check_value(self._searched)
            return False
        if self._state is _State.CONTENT:
            self._end_part(at)
        self._drop(at + len(self._delimiter))
        self._state = _State.LINE
        return True

    def _end_part(self, at: int) -> None:
        if self._start + at < self._content:  # the blank line's own break was taken for the delimiter's
            raise self._malformed(at, "the delimiter follows the head of a part without a line break of its own")
        if self._name is None:
            return
        self._check_value(at)
        try:
            value = self._buffer[len(_CRLF) : at].decode()
        except UnicodeDecodeError as exc:
            raise self._malformed(len(_CRLF) + exc.start, f'the value of "{self._name}" is not UTF-8') from None
        found = Field(value, self._content, self._start + at)
        self._fields.setdefault(self._name, []).append(found)
        if sum(map(len, self._fields.values())) > MAX_FIELDS:
            raise self._malformed(at, f'"{self._name}" is there once too often; {MAX_FIELDS} fields are looked at')

    def _check_value(self, length: int) -> None:
        if length - len(_CRLF) > MAX_VALUE:
            raise self._malformed(
                self._content - self._start, f'the value of "{self._name}" is longer than {MAX_VALUE} bytes'
            )

    def _end_line(self) -> bool:
        end = self._buffer.find(_CRLF)
        rest = self._buffer if end < 0 else self._buffer[:end]
        if len(rest) > MAX_PADDING:
            raise self._malformed(0, "the line of a delimiter does not end")
        if end < 0:
            return False
        last = rest.startswith(b"--")
        if (rest[2:] if last else rest).strip(_BLANK):
            raise self._malformed(0, "a delimiter is followed by other text in its line")
        self._drop(end)
        self._state = _State.EPILOGUE if last else _State.HEAD
        self._parts += not last
        if self._parts > MAX_PARTS:
            raise self._malformed(0, f"it has more than {MAX_PARTS} parts")
        return True

    def _read_head(self) -> bool:
        # The buffer begins with the line break of the delimiter, so that a head without lines has its blank line too.
        end = self._buffer.find(b"\r\n\r\n", self._searched)
        if (len(self._buffer) if end < 0 else end) > MAX_HEAD + len(_CRLF):
            raise self._malformed(0, f"the head of part {self._parts} is longer than {MAX_HEAD} bytes")
        if end < 0:
            self._searched = max(0, len(self._buffer) - 3)
            return False
        self._name = self._named(bytes(self._buffer[len(_CRLF) : end]))
        self._content = self._start + end + 2 * len(_CRLF)
        self._drop(end + len(_CRLF))  # keep the break of the blank line: a delimiter must not use it
        self._state = _State.CONTENT
        return True

    def _drop(self, count: int) -> None:
        del self._buffer[:count]
        self._start += count
        self._searched = 0

    # ---- the head of a part --------------------------------------------------------------

    def _named(self, head: bytes) -> str | None:
        """The name of the part when it is a wanted text field; None when it is not."""
        try:
            name, headers = _text_field(head)
        except BadRequest as exc:
            raise self._malformed(len(_CRLF), f"part {self._parts}: {exc.message}") from None
        wanted = self._wanted.get(name) if name is not None else None
        encoding = headers.get(b"content-transfer-encoding", b"binary").lower()
        if wanted is not None and encoding not in _IDENTITY:
            raise self._malformed(0, f'"{wanted}" is encoded as "{_shown(encoding)}"; send it as it is')
        return wanted

    def _malformed(self, at: int, what: str) -> BadRequest:
        return BadRequest(f"the multipart body is malformed at byte {max(0, self._start + at)}: {what}")


def _text_field(head: bytes) -> tuple[bytes | None, dict[bytes, bytes]]:
    """The name in the head of a part, None when that is a file, and the headers."""
    headers: dict[bytes, bytes] = {}
    for line in _FOLD.sub(b" ", head).split(_CRLF) if head else ():
        match = _HEADER.fullmatch(line)
        if match is None:
            raise BadRequest(f'"{_shown(line)}" is no header line')
        name = match[1].lower()
        if name in headers:
            raise BadRequest(f'"{_shown(name)}" is there twice')
        headers[name] = match[2].strip(_BLANK)
    kind, parameters = _parameters(headers.get(b"content-disposition", b""), "Content-Disposition")
    # RFC 7578, 4.2: each part has this type and a name, and the name is not in the form of RFC 5987.
    if kind != b"form-data" or b"name" not in parameters or b"name*" in parameters:
        raise BadRequest("it has no Content-Disposition of form-data with a name")
    is_file = b"filename" in parameters or b"filename*" in parameters
    return None if is_file else parameters[b"name"], headers


def _parameters(value: bytes, header: str) -> tuple[bytes, dict[bytes, bytes]]:
    """`kind; name=value; name="value"`; kind and names in small letters.

    Raises:
        BadRequest: it is not of that form, or a name is there twice.
    """
    kind, _, _ = value.partition(b";")
    parameters: dict[bytes, bytes] = {}
    at = len(kind)
    while match := _PARAMETER.match(value, at):
        name, at = match[1].lower(), match.end()
        if name in parameters:
            raise BadRequest(f'"{_shown(name)}" is in the {header} twice')
        parameters[name] = _unquoted(match[2])
    if value[at:].strip(b"; \t"):
        raise BadRequest(f'the {header} is malformed at "{_shown(value[at:])}"')
    return kind.strip(_BLANK).lower(), parameters


def _unquoted(value: bytes) -> bytes:
    # Other backslashes stay: browsers of old sent C:\\path\\file, and servers read it so.
    return re.sub(rb'\\(["\\])', rb"\1", value[1:-1]) if value.startswith(b'"') else value


def _shown(value: bytes) -> str:
    """What a client sent, short and harmless in a message."""
    return repr(value[:60])[2:-1]
