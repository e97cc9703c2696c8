"""Reading the configuration of a running daemon again: the same files, the same options, the same ports."""

from __future__ import annotations

from pathlib import Path

import pytest

from trioswap.cli.serving import Source
from trioswap.config.changes import Changes, compare
from trioswap.errors import ConfigError, Misuse

MODEL = "[models.{}]\ncmd = 'x ${{PORT}}'\n"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('listen = "127.0.0.1:1"\nlog_level = "error"\n' + MODEL.format("b"))
    return path


def test_what_has_not_changed(file):
    """Is the same to the last key."""
    source = Source((str(file),))
    config = source.read()

    assert source.reread(config) == config
    assert compare(config, source.reread(config)).nothing


def test_ports_stay(file):
    """A model that is added in front of others restarts none of them."""
    source = Source((str(file),))
    config = source.read()
    file.write_text(file.read_text() + MODEL.format("a"))

    again = source.reread(config)
    assert compare(config, again) == Changes(added=("a",))
    assert (again.models["b"].port, again.models["a"].port) == (5800, 5801)


def test_the_command_line_is_still_right(file, tmp_path):
    """Whatever the files say by now."""
    cert, key = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    source = Source((str(file),), None, False, "127.0.0.1:2", "debug", cert, key)
    config = source.read()
    file.write_text('listen = "127.0.0.1:3"\nlog_level = "info"\n' + MODEL.format("b"))
    again = source.reread(config)

    assert (again.listen, again.log_level) == ("127.0.0.1:2", "debug")
    assert again.tls is not None
    assert (again.tls.cert_file, again.tls.key_file) == (Path(cert), Path(key))
    assert compare(config, again).nothing


def test_mistakes_are_all_told(file):
    """Of the files, and of what the command line makes of them."""
    source = Source((str(file),), listen="127.0.0.1:5900")
    config = source.read()

    file.write_text("nothing = 1\nlisten = 2")
    with pytest.raises(ConfigError) as caught:
        source.reread(config)
    assert len(caught.value.mistakes) == 2

    file.write_text("[models.b]\ncmd = 'x'\nproxy = 'http://127.0.0.1:5900'")
    with pytest.raises(ConfigError, match="where trioswap listens"):
        source.reread(config)


def test_complaints_are_logged(tmp_path, caplog, capsys):
    """A daemon's standard error may be a pipe that nobody reads: only logging never waits."""
    file = tmp_path / "c.yaml"
    file.write_text("captureBuffer: 1\nnonsense: 1\nmodels:\n  a:\n    cmd: x ${PORT}\n")
    source = Source((str(file),), lenient=True)
    config = source.read()
    told = capsys.readouterr().err.splitlines()
    source.reread(config)

    assert [line.startswith("trioswap: ") for line in told] == [True, True]
    assert [f"trioswap: {record.getMessage()}" for record in caplog.records] == told
    assert capsys.readouterr().err == ""


def test_files_to_watch(file, tmp_path):
    """Those that are named, and those that are in the directory by now."""
    directory = tmp_path / "d"
    directory.mkdir()
    source = Source((str(file),), str(directory))
    assert source.paths() == [file]

    (directory / "more.toml").touch()
    assert source.paths() == [file, directory / "more.toml"]
    directory.rename(tmp_path / "e")
    with pytest.raises(ConfigError):
        source.paths()


def test_half_of_tls(file):
    """Is told at the start."""
    with pytest.raises(Misuse, match="add --tls-key-file FILE"):
        Source((str(file),), tls_cert_file="cert.pem").read()
