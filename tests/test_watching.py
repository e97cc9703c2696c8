"""Watching files: real files, and time that passes by itself.

What happens to the files happens between two looks: the script of a test goes on by one step
each time the watch asks which files there are, so nothing depends on how fast the machine is.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest
import trio
from clocks import GUARD, guarded

from trioswap.config.loading import find_sources
from trioswap.errors import ConfigError
from trioswap.watching import WATCH_EVERY, Watch

Step = Callable[[], object] | None


class ScriptEnded(Exception):
    """There have been as many looks as the test has steps."""


@attrs.define(eq=False)
class Script:
    """Tells a watch which files there are, after the next step has been taken."""

    files: Callable[[], list[Path]]
    steps: list[Step]
    looks: int = -1
    """Not counting the first."""

    def __call__(self) -> list[Path]:
        self.looks += 1
        if self.looks:
            if self.looks > len(self.steps):
                raise ScriptEnded
            if (step := self.steps[self.looks - 1]) is not None:
                step()
        return self.files()


async def watched(files: Callable[[], list[Path]], *steps: Step) -> list[tuple[int, list[Path]]]:
    """The changes that are reported while *steps* are taken, each with the number of the look that showed it."""
    script = Script(files, list(steps))
    watch = Watch(script)
    reported = []
    with guarded(), contextlib.suppress(ScriptEnded):
        while True:
            changed = await watch.wait_changed()
            reported.append((script.looks, changed))
    return reported


def write(path: Path, text: str) -> Callable[[], object]:
    return lambda: path.write_text(text)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "trioswap.toml"
    path.write_text("one")
    return path


@pytest.fixture
def files(file):
    return lambda: [file]


# ---- one file -------------------------------------------------------------------------------


async def test_a_change_is_told_once_the_next_look_finds_the_same(autojump_clock, file, files):
    """And then never again."""
    assert await watched(files, None, write(file, "another"), None, None, None) == [(3, [file])]


async def test_looks_are_two_seconds_apart(autojump_clock, files):
    """As llama-swap has them."""
    start = trio.current_time()
    await watched(files, *[None] * 9)

    assert trio.current_time() - start == pytest.approx(10 * WATCH_EVERY)
    assert WATCH_EVERY == 2


async def test_a_change_in_several_steps(autojump_clock, file, files):
    """It is over when nothing has happened between two looks."""
    steps = [write(file, text) for text in ("a", "ab", "abc")]

    assert await watched(files, *steps, None, None) == [(4, [file])]


async def test_two_changes_are_two(autojump_clock, file, files):
    """The second counts from what the first has left."""
    reported = await watched(files, write(file, "a"), None, write(file, "one"), None, None)

    assert reported == [(2, [file]), (4, [file])]


async def test_a_change_before_the_first_wait_counts(autojump_clock, file, files):
    """What is read after the watch was made may be older than what is there when somebody waits."""
    watch = Watch(files)
    file.write_text("meanwhile")
    with guarded():
        assert await watch.wait_changed() == [file]


async def test_the_same_size_at_another_time(autojump_clock, file, files):
    """A port number mostly stays as long as it was."""

    def change() -> None:
        file.write_text("two")
        os.utime(file, ns=(1, 1))

    assert await watched(files, change, None) == [(2, [file])]


async def test_replaced_by_another_file_of_the_same_size_and_time(autojump_clock, tmp_path, file, files):
    """As `cp -p` and a rename do it."""
    before = file.stat()

    def replace() -> None:
        (tmp_path / "new").write_text("two")
        os.utime(tmp_path / "new", ns=(before.st_atime_ns, before.st_mtime_ns))
        (tmp_path / "new").rename(file)

    assert await watched(files, replace, None) == [(2, [file])]


async def test_reading_and_permissions_are_no_changes(autojump_clock, file, files):
    """Only what is in it counts."""
    assert await watched(files, file.read_text, None, lambda: file.chmod(0o600), None, None) == []


async def test_what_was_undone_before_the_next_look(autojump_clock, tmp_path, file, files):
    """The old file is back: nothing has to be read."""
    away = tmp_path / "away"

    assert await watched(files, lambda: file.rename(away), lambda: away.rename(file), None, None) == []


# ---- files that are not there ---------------------------------------------------------------


async def test_a_missing_file_is_waited_for(autojump_clock, file, files):
    """An editor may take the old one away first; what comes must be whole, too."""
    steps = [file.unlink, None, None, write(file, "half"), write(file, "half and half"), None, None]

    assert await watched(files, *steps) == [(6, [file])]


async def test_a_file_that_is_there_only_later(autojump_clock, tmp_path):
    """It was not there at the first look."""
    file = tmp_path / "late.toml"

    assert await watched(lambda: [file], None, write(file, "x"), None, None) == [(3, [file])]


async def test_a_ring_of_links_is_no_file(autojump_clock, file, files):
    """It is waited for what takes its place."""

    def ring() -> None:
        file.unlink()
        file.symlink_to(file)

    def mend() -> None:
        file.unlink()
        file.write_text("x")

    assert await watched(files, ring, None, mend, None, None) == [(4, [file])]


# ---- links ----------------------------------------------------------------------------------


async def test_a_link_is_led_elsewhere(autojump_clock, tmp_path):
    """As Kubernetes swaps a directory with all its files: nothing happens to the file's own name."""
    for name in ("1", "2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "c.toml").write_text("one")
        os.utime(tmp_path / name / "c.toml", ns=(1, 1))
    data, file = tmp_path / "data", tmp_path / "c.toml"
    data.symlink_to("1")
    file.symlink_to("data/c.toml")

    def swap() -> None:
        (tmp_path / "new").symlink_to("2")
        (tmp_path / "new").rename(data)

    assert await watched(lambda: [file], None, swap, None, None) == [(3, [file])]


async def test_another_way_to_the_same_file(autojump_clock, tmp_path, file):
    """A hard link in the new directory is the same inode; what is relative to it is not the same."""
    (tmp_path / "2").mkdir()
    os.link(file, tmp_path / "2" / file.name)
    link = tmp_path / "link.toml"
    link.symlink_to(file)

    def swap() -> None:
        link.unlink()
        link.symlink_to(tmp_path / "2" / file.name)

    assert await watched(lambda: [link], swap, None) == [(2, [link])]


# ---- directories ----------------------------------------------------------------------------


async def test_files_of_a_directory_come_and_go(autojump_clock, tmp_path):
    """Each counts; what is no configuration does not."""
    a, b = tmp_path / "a.toml", tmp_path / "b.yaml"
    a.touch()
    steps = [write(b, ""), None, write(tmp_path / ".b.yaml.swp", "x"), None, a.unlink, None, None]

    assert await watched(lambda: find_sources([], tmp_path), *steps) == [(2, [b]), (6, [a])]


async def test_a_directory_that_is_empty_for_a_while(autojump_clock, tmp_path):
    """Somebody is about to fill it again."""
    a = tmp_path / "a.toml"
    a.touch()
    steps = [a.unlink, None, None, write(a, "x"), None, None]

    assert await watched(lambda: find_sources([], tmp_path), *steps) == [(5, [a])]


async def test_a_directory_that_is_gone_for_a_while(autojump_clock, tmp_path):
    """The same."""
    directory = tmp_path / "d"
    directory.mkdir()
    a = directory / "a.toml"
    a.touch()

    def remove() -> None:
        a.unlink()
        directory.rmdir()

    steps = [remove, None, directory.mkdir, write(a, "x"), None, None]
    assert await watched(lambda: find_sources([], directory), *steps) == [(5, [a])]


# ---- its task -------------------------------------------------------------------------------


async def test_the_files_are_looked_at_in_a_thread(autojump_clock, files):
    """So a file system that does not answer holds up nobody; nor does it hold up the end."""
    asked, answer = trio.Event(), threading.Event()
    looks, answered = 0, []

    def sources() -> list[Path]:
        nonlocal looks
        looks += 1
        if looks > 1:
            trio.from_thread.run_sync(asked.set)
            answered.append(answer.wait(GUARD))
        return files()

    watch = Watch(sources)
    with guarded(), trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch.wait_changed)
            await asked.wait()
            scope.cancel()  # while the thread still asks

    assert scope.cancelled_caught
    assert answered == []
    answer.set()


async def test_other_errors_are_not_hidden(autojump_clock, files):
    """Only files that are not there are waited for."""
    watch = Watch(files)
    watch.sources = lambda: 1 / 0

    with pytest.raises(ZeroDivisionError):
        await watch.wait_changed()


def test_config_errors_are_files_that_are_not_there():
    """The first look is before anything was read: whoever reads tells what is wrong."""

    def sources() -> list[Path]:
        raise ConfigError("d", ["cannot read the directory"])

    assert Watch(sources)._known is None
