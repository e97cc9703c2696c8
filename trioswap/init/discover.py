"""Finds GGUF files, in the directories named or where models usually are.

Only names and kinds of files are looked at; what is in them is the business of `models`.
Ollama's models are not found: its files are called by their checksums and need its manifests to be told apart.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Final

import attrs

# Directories below the one named: a repository in a cache of Hugging Face takes four of them.
_DEPTH: Final = 8
# Entries looked at in each directory named: half a second on a slow machine, and a home directory is rarely larger.
_ENTRIES: Final = 200_000
# Each model takes a port of its own, and there are not many more.
_FILES: Final = 10_000
# What the kernel and the system show there are no files of the user's, and some of them never end.
_PSEUDO: Final = frozenset({"/proc", "/sys", "/dev", "/run"})
# A repository in the cache of Hugging Face (Hub documentation, "Hub Local Cache").
_REPOSITORY: Final = "models--"
# Characters of a commit in refs/main: 40, with some room.
_LONGEST_REF: Final = 200


@attrs.frozen
class Skipped:
    """A file or directory that gave no model."""

    path: Path
    reason: str


@attrs.frozen
class Found:
    """What a search gave."""

    files: tuple[Path, ...]
    """Absolute, each file once, whatever it is called besides; not resolved, because caches link to blobs."""
    skipped: tuple[Skipped, ...]


def usual_places(environment: Mapping[str, str]) -> list[Path]:
    """Where models usually are, absolute, most certain first; some of them may not be there.

    The caches of llama.cpp (`fs_get_cache_directory` in common/common.cpp, which is the one
    before 2026) and of Hugging Face, with the variables that llama.cpp's common/hf-cache.cpp
    knows; then ~/models and the current directory.
    """

    def said(name: str) -> Path | None:
        value = environment.get(name)
        return Path(value) if value else None

    home, hf_home = said("HOME"), said("HF_HOME")
    cache = said("XDG_CACHE_HOME") or (home and home / ".cache")
    hub = said("HF_HUB_CACHE") or said("HUGGINGFACE_HUB_CACHE") or (hf_home and hf_home / "hub")
    places = [
        said("LLAMA_CACHE"),
        cache and cache / "llama.cpp",
        hub or (cache and cache / "huggingface" / "hub"),
        home and home / "models",
        Path(),
    ]
    return list(dict.fromkeys(place.absolute() for place in places if place is not None))


def find(directories: Iterable[Path]) -> Found:
    """The GGUF files in *directories* and below, directory by directory, each in the order of names.

    Hidden directories below are left out.  Symbolic links are followed; each directory is entered
    once, so loops end.  Of a repository in the cache of Hugging Face only one revision counts.
    """
    walk = _Walk()
    for directory in directories:
        walk.top(directory.absolute())
    return Found(tuple(walk.files), tuple(walk.skipped))


@attrs.define(eq=False)
class _Walk:
    files: list[Path] = attrs.field(factory=list)
    skipped: list[Skipped] = attrs.field(factory=list)
    seen: set[tuple[int, int]] = attrs.field(factory=set)
    """Device and inode of the files and directories met."""
    left: int = 0
    """Entries that may still be looked at."""

    def top(self, directory: Path) -> None:
        """Look through one of the directories named; one that is not there has nothing."""
        self.left = _ENTRIES
        try:
            status = directory.stat()
        except FileNotFoundError:
            return
        except OSError as exc:
            self.skip(directory, f"cannot be read: {exc.strerror}")
            return
        self.enter(directory, status, _DEPTH)
        if self.left <= 0:
            self.skip(directory, f"looked at only in part: it has more than {_ENTRIES} entries")
        if len(self.files) >= _FILES:
            self.skip(directory, f"looked at only in part: there are more than {_FILES} GGUF files")

    def enter(self, directory: Path, status: os.stat_result, depth: int) -> None:
        if str(directory) in _PSEUDO or not self.is_new(status):
            return
        if directory.name.startswith(_REPOSITORY) and (revision := _revision(directory)) is not None:
            directory = revision
        for entry in self.entries(directory):
            self.left -= 1
            if self.left <= 0 or len(self.files) >= _FILES:
                return
            self.look(directory / entry.name, entry, depth)

    def entries(self, directory: Path) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(directory) as entries:
                return sorted(islice(entries, self.left), key=lambda entry: entry.name)
        except OSError as exc:
            self.skip(directory, f"cannot be read: {exc.strerror}")
            return []

    def look(self, path: Path, entry: os.DirEntry[str], depth: int) -> None:
        if entry.name.startswith("."):
            return
        named_so = path.suffix.lower() == ".gguf"
        try:
            status = entry.stat()
        except OSError as exc:
            if named_so:
                self.skip(path, f"cannot be read: {exc.strerror}")
            return
        if stat.S_ISDIR(status.st_mode):
            if depth > 0:
                self.enter(path, status, depth - 1)
        elif named_so and not stat.S_ISREG(status.st_mode):
            self.skip(path, "is no regular file")  # to open a pipe would wait for ever
        elif named_so and self.is_new(status):
            self.files.append(path)

    def is_new(self, status: os.stat_result) -> bool:
        identity = (status.st_dev, status.st_ino)
        if identity in self.seen:
            return False
        self.seen.add(identity)
        return True

    def skip(self, path: Path, reason: str) -> None:
        self.skipped.append(Skipped(path, reason))


# ---- the cache of Hugging Face ------------------------------------------------------------


def _revision(repository: Path) -> Path | None:
    """The directory of the revision to use: what refs/main names, else the newest; None: it is no repository.

    Of those that have GGUF files: a look at the repository moves refs/main before anything is downloaded.
    """
    try:
        there = [path for path in (repository / "snapshots").iterdir() if path.is_dir()]
        main = _main(repository)
        there.sort(key=lambda path: (path.name == main, path.stat().st_mtime_ns, path.name), reverse=True)
    except OSError:
        return None
    return next((path for path in there if any(path.rglob("*.gguf"))), None)


def _main(repository: Path) -> str:
    """The commit in refs/main; empty when there is none."""
    path = repository / "refs" / "main"
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return file.read(_LONGEST_REF).decode(errors="replace").strip()
