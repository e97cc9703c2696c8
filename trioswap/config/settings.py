"""What the daemon does besides serving models, from what is written to what is meant.

Paths that load nothing, what is loaded without being asked for, the list of past requests,
measurements, the web pages.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Final

from trioswap.config.mistakes import Mistakes, Path, found
from trioswap.config.parts import (
    IDLE_AFTER,
    PERFORMANCE_EVERY,
    SESSION_HEADERS,
    HooksConfig,
    PerformanceConfig,
    StoreConfig,
    UiConfig,
)
from trioswap.config.raw import RawActivity, RawConfig, RawPerformance, RawUi
from trioswap.config.raw_hooks import RawHooks, RawIdle, RawStartup

# Python's `re` can take for ever over a pattern that asks for it.  Short patterns, and few,
# are no guard against that, but a long one is hardly meant.
_MOST_PATTERNS: Final = 64
_LONGEST_PATTERN: Final = 500
# A field name of HTTP (RFC 9110, 5.6.2).
_HEADER: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


def read_ignore_paths(written: Sequence[str], mistakes: Mistakes) -> tuple[re.Pattern[str], ...]:
    """The regular expressions, compiled."""
    path = ("upstream", "ignore_paths")
    if len(written) > _MOST_PATTERNS:
        mistakes.add(path, f"found {len(written)} regular expressions, allowed are at most {_MOST_PATTERNS}")
    patterns = []
    for index, text in enumerate(written[:_MOST_PATTERNS]):
        try:
            patterns.append(_compile(text))
        except ValueError as exc:
            mistakes.add((*path, index), str(exc))
    return tuple(patterns)


def _compile(text: str) -> re.Pattern[str]:
    allowed = f"a regular expression of Python's re of at most {_LONGEST_PATTERN} characters"
    if len(text) > _LONGEST_PATTERN:
        raise ValueError(f"found one of {len(text)} characters, allowed is {allowed}")
    try:
        with warnings.catch_warnings():
            # `[[:alpha:]]` of other dialects is taken for something else, with a warning only.
            warnings.simplefilter("error")
            return re.compile(text)
    except (re.error, OverflowError, Warning) as exc:
        raise ValueError(f"{found(text, allowed)} ({exc})") from None


def read_hooks(raw: RawConfig, names: Mapping[str, str], mistakes: Mistakes) -> HooksConfig:
    """What is loaded unasked; *names* leads from models and aliases to models."""
    hooks = raw.hooks or RawHooks()
    startup, idle = hooks.on_startup or RawStartup(), hooks.on_idle or RawIdle()
    return HooksConfig(
        preload=_preload("on_startup", startup.preload or (), names, mistakes),
        idle_preload=_preload("on_idle", idle.preload or (), names, mistakes),
        idle_after=IDLE_AFTER if idle.after is None else idle.after,
    )


def _preload(hook: str, written: Sequence[str], names: Mapping[str, str], mistakes: Mistakes) -> tuple[str, ...]:
    """The models, each once."""
    preload: dict[str, None] = {}
    for index, name in enumerate(written):
        model = names.get(name.strip())
        if model is not None:
            preload[model] = None
        elif name.strip() and not mistakes.about(("models",)):
            path = ("hooks", hook, "preload", index)
            mistakes.add(path, found(name, "the name of a model or an alias") + mistakes.guess(name, names))
    return tuple(preload)


def read_store(raw: RawConfig, directory: FilePath, mistakes: Mistakes) -> StoreConfig | None:
    """The file of past requests."""
    if raw.store is None:
        return None
    path = file_path(raw.store.path or "", directory, ("store", "path"), "the path of a file", mistakes)
    return None if path is None else StoreConfig(path)


def read_performance(raw: RawPerformance | None, mistakes: Mistakes) -> PerformanceConfig | None:
    """How often the machine is measured; None: never."""
    every = PERFORMANCE_EVERY if raw is None or raw.every is None else raw.every
    if every < PERFORMANCE_EVERY:
        mistakes.add(("performance", "every"), found(every, f"{PERFORMANCE_EVERY:g} seconds or more"))
    return None if raw is not None and raw.disabled else PerformanceConfig(every)


def read_ui(raw: RawConfig, mistakes: Mistakes) -> UiConfig:
    """Headers without blanks and without repetitions; their case says nothing."""
    activity = (raw.ui or RawUi()).activity or RawActivity()
    written = SESSION_HEADERS if activity.session_id is None else activity.session_id
    headers: dict[str, str] = {}
    for index, header in enumerate(map(str.strip, written)):
        if header and not _HEADER.fullmatch(header):
            mistakes.add(("ui", "activity", "session_id", index), found(header, "the name of a header of HTTP"))
        elif header:
            headers.setdefault(header.lower(), header)
    return UiConfig(session_headers=tuple(headers.values()))


def file_path(written: str, directory: FilePath, path: Path, allowed: str, mistakes: Mistakes) -> FilePath | None:
    """The same as `absolute`, and no directory, which is looked at."""
    file = absolute(written, directory, path, allowed, mistakes)
    if file is None:
        return None
    try:
        problem = "it is a directory" if file.is_dir() else None
    except OSError as exc:
        problem = f"cannot look at it: {exc.strerror}"
    if problem is not None:
        mistakes.add(path, f"{found(written, allowed)} ({problem})")
    return file


def absolute(written: str, directory: FilePath, path: Path, allowed: str, mistakes: Mistakes) -> FilePath | None:
    """*written*, at *path*, as an absolute path of a file system; whether it is there is not asked.

    *directory* is what it is relative to.
    """
    if not written:
        mistakes.add(path, found(written, allowed))
        return None
    try:
        return (directory / FilePath(written).expanduser()).absolute()
    except (OSError, RuntimeError) as exc:  # RuntimeError: a `~` without a home
        mistakes.add(path, f"{found(written, allowed)} ({exc})")
        return None
