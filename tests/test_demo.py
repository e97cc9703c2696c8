"""`trioswap demo` as a newcomer runs it: real engine, real SDK, nothing left behind."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import shutil
import socket
import sys
from functools import partial

import pytest
import trio
from children import PATIENCE, alive
from commands import daemon
from demo_check import answer, engines, words_of

from trioswap.tinymodels import WORDS

pytestmark = pytest.mark.llama

# The last line that it prints.
ALL_SAID = "Ctrl-C"


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """Where the demo puts its files, so that a test sees what it leaves."""
    pytest.importorskip("xllamacpp")
    pytest.importorskip("openai")
    directory = tmp_path / "tmp"
    directory.mkdir()
    monkeypatch.setenv("TMPDIR", str(directory))
    return directory


async def test_both_models_answer_and_nothing_is_left(temporary):
    """Each model says its own words, streamed and not; after SIGTERM the files and processes are gone."""
    async with daemon("demo", "--listen", "127.0.0.1:0", until=ALL_SAID) as demo:
        assert len(list(temporary.iterdir())) == 1
        for model in (*WORDS, *WORDS):
            for stream in (True, False):
                with trio.fail_after(PATIENCE):
                    text = await trio.to_thread.run_sync(partial(answer, demo.url, model, stream=stream))
                assert words_of(text) == {model}
        [engine] = engines(demo.process.pid)

        assert await demo.stop() == 0
        assert list(temporary.iterdir()) == []
        assert not alive(engine)


@pytest.mark.skipif(shutil.which("curl") is None, reason="the lines to try need curl")
async def test_the_lines_to_try(temporary):
    """Each curl line that the demo prints gives an answer of the model it names."""
    async with daemon("demo", "--listen", "127.0.0.1:0", until=ALL_SAID) as demo:
        lines = [line for line in demo.said.splitlines() if line.strip().startswith("curl ")]
        assert len(lines) == 3
        for line in lines:
            command = [*shlex.split(line), "--silent", "--show-error", "--fail"]
            with trio.fail_after(PATIENCE):
                body = (await trio.run_process(command, capture_stdout=True)).stdout.decode()
            text = "".join(json.loads(f'"{piece}"') for piece in re.findall(r'"content":"([^"]*)"', body))
            assert words_of(text) == {json.loads(command[command.index("-d") + 1])["model"]}


async def test_the_usual_port_is_taken():
    """When somebody has port 8080 the demo takes a free one and says so."""
    with contextlib.ExitStack() as stack:
        # Whoever has it already serves as well.
        with contextlib.suppress(OSError):
            stack.enter_context(socket.create_server(("127.0.0.1", 8080)))
        async with daemon("demo", until=ALL_SAID) as demo:
            assert demo.port != 8080
            assert "127.0.0.1:8080 is taken" in demo.said


async def test_without_the_engine(temporary):
    """Without the extra packages the demo says how to get them, exits with 2, and leaves no file."""
    code = "import sys; sys.modules['xllamacpp'] = None; from trioswap.cli import main; main()"
    with trio.fail_after(PATIENCE):
        done = await trio.run_process([sys.executable, "-c", code, "demo"], check=False, capture_stderr=True)

    assert done.returncode == 2
    assert "pip install 'trioswap[llama]'" in done.stderr.decode()
    assert "Traceback" not in done.stderr.decode()
    assert list(temporary.iterdir()) == []
