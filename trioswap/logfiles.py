"""Log files that begin anew when they are large, a few of each kept: for every model server, and for ourselves.

Everything here may block, and is called by a thread that may (`logwriter`).
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Final
from urllib.parse import quote

import attrs

OURS: Final = "trioswap.log"
# Most file systems take names of 255 bytes; some are for what is around the model's name.
_LONGEST: Final = 200
# Logs can hold what people asked: for us and our group.
_FILE_MODE: Final = 0o640
_DIRECTORY_MODE: Final = 0o750


def file_name(model: str) -> str:
    """The name of a model's file: `model-org%2Fname.log`; different models have different ones.

    Names too long for a file system are cut, and end with a digest of the whole.
    """
    safe = quote(model, safe=" ")
    if len(safe) > _LONGEST:
        safe = f"{safe[: _LONGEST - 17]}-{hashlib.sha256(model.encode()).hexdigest()[:16]}"
    return f"model-{safe}.log"


@attrs.define(eq=False)
class RotatedFile:
    """A file `NAME`, the one before it `NAME.1`, and so on.

    It may be moved, removed or emptied by others at any time, and so may its directory:
    then it is made anew.
    """

    path: Path
    size: int
    """Bytes that a file has at most."""
    files: int
    """How many are kept, the current one included."""
    _descriptor: int | None = attrs.field(default=None, init=False)

    def write(self, data: bytes) -> int:
        """Append some of *data*, whole lines where they fit into a file, and return how many bytes.

        Raises:
            OSError: the disk is full, the directory cannot be made, or whatever it is.
        """
        descriptor, used = self._open()
        piece = data[: max(self.size - used, 0)]
        if len(piece) < len(data):
            piece = piece[: piece.rfind(b"\n") + 1] or (b"" if used else piece)
        if not piece:
            self._rotate()
            return self.write(data)
        return os.write(descriptor, piece)

    def close(self) -> None:
        """Give the descriptor back; the next write opens the file again."""
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            os.close(descriptor)

    def _open(self) -> tuple[int, int]:
        """A descriptor of what is at `path` now, and its size."""
        if self._descriptor is not None:
            with suppress(FileNotFoundError):
                there, ours = self.path.stat(), os.fstat(self._descriptor)
                if os.path.samestat(there, ours):
                    return self._descriptor, there.st_size
            self.close()
        self.path.parent.mkdir(_DIRECTORY_MODE, parents=True, exist_ok=True)
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, _FILE_MODE)
        return self._descriptor, os.fstat(self._descriptor).st_size

    def _rotate(self) -> None:
        """Make room for a new file: each gets the number of the next, and the last is removed."""
        self.close()
        numbered = next(number for number in count(1) if not self._numbered(number).exists())
        # More than one where fewer are kept than before.
        for number in range(self.files, numbered):
            self._numbered(number).unlink()
        for number in range(min(self.files, numbered) - 1, -1, -1):
            if number + 1 < self.files:
                self._numbered(number).rename(self._numbered(number + 1))
            else:
                self._numbered(number).unlink()

    def _numbered(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}") if number else self.path
