"""Puts the configuration into its file: whole or not at all, valid, and over no other file by accident."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
from pathlib import Path

from trioswap.config import load, loads
from trioswap.errors import ConfigError, InitFailed, Misuse
from trioswap.init.write import shown


def prepare(output: str, *, force: bool) -> Path:
    """Where the file named *output* is, links followed.

    Raises:
        Misuse: it is not called like a configuration, or there is something already that may not be replaced.
        InitFailed: there can be no such file.
    """
    target = Path(os.path.realpath(output))
    if target.suffix != ".toml":  # by which it is told from llama-swap's YAML
        raise Misuse(f"found {shown(output)}, allowed is the name of a file that ends in .toml")
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return target
    except OSError as exc:
        raise _cannot_write(target, exc) from exc
    if not stat.S_ISREG(mode):
        raise Misuse(f"{shown(output)} is there and is no regular file")
    if not force:
        raise _exists(target)
    return target


def _cannot_write(target: Path, exc: OSError) -> InitFailed:
    return InitFailed(f"cannot write {shown(target)}: {exc.strerror}")


def _exists(target: Path) -> Misuse:
    return Misuse(f"{shown(target)} is there already; --force replaces it, and what was changed in it is lost")


def check(text: str) -> None:
    """See that *text* is a configuration without mistakes.

    Raises:
        RuntimeError: it has some: a bug of ours.
    """
    try:
        loads(text, "what was written")
    except ConfigError as exc:
        raise RuntimeError(exc.message) from exc


def save(target: Path, text: str, *, force: bool) -> None:
    """Write *text* to *target*, which nobody ever sees half written.

    Raises:
        InitFailed: it cannot be written.
        Misuse: without *force*: somebody else has made it meanwhile.
        RuntimeError: as for `check`; then the file is as it was.
    """
    unfinished = target.with_name(f".trioswap-{secrets.token_hex(4)}.toml")
    try:
        with unfinished.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        _check_file(unfinished)
        if target.exists():
            shutil.copymode(target, unfinished)
        if not force:
            target.touch(exist_ok=False)  # ours from here on, so that the next step replaces nobody's
        unfinished.replace(target)
    except FileExistsError:
        raise _exists(target) from None
    except OSError as exc:
        raise _cannot_write(target, exc) from exc
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()


def _check_file(path: Path) -> None:
    try:
        load(path)
    except ConfigError as exc:
        raise RuntimeError(exc.message) from exc
