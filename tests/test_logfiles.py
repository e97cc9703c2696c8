"""Log files: their names, when a new one begins, and what others may do to them meanwhile."""

from __future__ import annotations

import errno
import os
import shutil
import string
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trioswap.logfiles import RotatedFile, file_name

SIZE = 100  # of the files here


def put(file: RotatedFile, data: bytes) -> None:
    """Write all of it, as `logwriter` does."""
    while data:
        written = file.write(data)
        assert 0 < written <= len(data)
        data = data[written:]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def make(tmp_path):
    made = []

    def make(files: int = 3) -> RotatedFile:
        made.append(RotatedFile(tmp_path / "logs" / "a.log", SIZE, files))
        return made[-1]

    yield make
    for file in made:
        file.close()


# ---- names ----


def test_names_of_files():
    """Slashes, dots and all that a shell or a file system would take for something else are escaped."""
    assert file_name("llama") == "model-llama.log"
    assert file_name("org/model:q4") == "model-org%2Fmodel%3Aq4.log"
    assert file_name("..") == "model-...log"
    assert file_name("größe") == "model-gr%C3%B6%C3%9Fe.log"


@given(st.lists(st.text(max_size=300), min_size=2, max_size=2, unique=True))
def test_two_models_have_two_files(models):
    """Whatever they are called, and every name is one that a file system takes."""
    first, second = (file_name(name.encode("utf-8", "replace").decode()) for name in models)
    if models[0].encode("utf-8", "replace") != models[1].encode("utf-8", "replace"):
        assert first != second
    assert set(first) <= {*string.ascii_letters, *string.digits, *"%_.-~ "}
    assert len(first) < 230


def test_long_names_are_cut_and_stay_different():
    """Also where only the end differs."""
    assert file_name("x" * 500 + "1") != file_name("x" * 500 + "2")


# ---- rotation ----


def test_a_file_grows_until_it_is_full(make, tmp_path):
    """The line that does not fit begins a new file, and the old one keeps its whole lines."""
    file = make()
    for number in range(11):
        put(file, b"line %04d\n" % number)  # ten bytes each
    assert contents(tmp_path / "logs") == {
        "a.log.1": b"".join(b"line %04d\n" % number for number in range(10)),
        "a.log": b"line 0010\n",
    }


def test_a_chunk_of_many_lines_is_parted_between_them(make, tmp_path):
    """A child's output comes in whatever pieces; a line that would be cut goes into the next file instead."""
    lines = [b"line %024d\n" % number for number in range(7)]  # 30 bytes each
    put(make(), b"".join(lines))
    assert contents(tmp_path / "logs") == {
        "a.log.2": b"".join(lines[:3]),
        "a.log.1": b"".join(lines[3:6]),
        "a.log": lines[6],
    }


@pytest.mark.parametrize("files", [1, 2, 3])
def test_only_so_many_are_kept(make, tmp_path, files):
    """The newest, each with the number of its age."""
    file = make(files)
    for number in range(50):
        put(file, b"line %04d\n" % number)
    names = ["a.log", "a.log.1", "a.log.2"][:files]
    expected = {
        name: b"".join(b"line %04d\n" % number for number in range(40 - 10 * age, 50 - 10 * age))
        for age, name in enumerate(names)
    }
    assert contents(tmp_path / "logs") == expected


def test_fewer_are_kept_than_before(make, tmp_path):
    """After the setting became smaller, the next rotation removes what is too much."""
    for files in (3, 2):
        file = make(files)
        for number in range(50):
            put(file, b"line %04d\n" % number)
        file.close()
    assert set(contents(tmp_path / "logs")) == {"a.log", "a.log.1"}


@given(st.lists(st.text("ab\n", min_size=1, max_size=250).map(str.encode), max_size=30), st.integers(1, 120))
def test_nothing_is_lost_or_changed_by_rotation(pieces, size):
    """All files together are what was written, and none is too large."""
    with tempfile.TemporaryDirectory() as directory:
        file = RotatedFile(Path(directory) / "a.log", size, 10_000)
        for piece in pieces:
            put(file, piece)
        file.close()
        files = contents(Path(directory))
    ages = sorted(files, key=lambda name: -int("0" + name.removeprefix("a.log").removeprefix(".")))
    assert b"".join(files[name] for name in ages) == b"".join(pieces)
    assert all(len(data) <= size for data in files.values())


def test_it_goes_on_where_an_earlier_daemon_ended(make, tmp_path):
    """What is there counts, and is kept."""
    put(make(), b"x" * 89 + b"\n")
    file = make()
    put(file, b"line 0001\n")
    put(file, b"line 0002\n")
    assert contents(tmp_path / "logs") == {"a.log.1": b"x" * 89 + b"\nline 0001\n", "a.log": b"line 0002\n"}


# ---- what others do to it ----


def test_a_directory_that_vanishes_is_made_anew(make, tmp_path):
    """What is written afterwards is in a new file at the same place."""
    file = make()
    put(file, b"one\n")
    shutil.rmtree(tmp_path / "logs")
    put(file, b"two\n")
    assert contents(tmp_path / "logs") == {"a.log": b"two\n"}


def test_a_file_that_was_moved_or_emptied_by_others(make, tmp_path):
    """As other programs rotate: the next line is at the path, not in what was moved."""
    file = make()
    put(file, b"one\n")
    (tmp_path / "logs" / "a.log").rename(tmp_path / "logs" / "moved")
    put(file, b"two\n")
    (tmp_path / "logs" / "a.log").write_bytes(b"")
    put(file, b"three\n")
    assert contents(tmp_path / "logs") == {"moved": b"one\n", "a.log": b"three\n"}


def test_a_file_where_the_directory_should_be(make, tmp_path):
    """An error while it is so, and no memory of it afterwards."""
    file = make()
    (tmp_path / "logs").touch()
    with pytest.raises(OSError, match="logs"):
        file.write(b"one\n")
    (tmp_path / "logs").unlink()
    put(file, b"two\n")
    assert contents(tmp_path / "logs") == {"a.log": b"two\n"}


def test_a_full_disk(make, tmp_path):
    """An error, and the next write tries again."""
    file = make()
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "a.log").symlink_to("/dev/full")
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        file.write(b"one\n")
    (tmp_path / "logs" / "a.log").unlink()
    put(file, b"two\n")
    assert contents(tmp_path / "logs") == {"a.log": b"two\n"}


def test_only_we_and_our_group_read_them(make, tmp_path):
    """What people ask can be in it."""
    put(make(), b"one\n")
    assert (tmp_path / "logs").stat().st_mode & 0o007 == 0
    assert (tmp_path / "logs" / "a.log").stat().st_mode & 0o137 == 0
