"""Where log lines go, how they begin, and that nobody who logs ever waits: in this process and in real ones."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import resource
import select
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import commands
import pytest
import trio
from children import PATIENCE, free_port
from daemons import chat, fetch, scripted, write_config
from sockets import notify_socket
from trio.testing import wait_all_tasks_blocked

from trioswap import logsetup
from trioswap.config import Config
from trioswap.logs import Logs
from trioswap.logsetup import LineFormatter, RingHandler, setup_logging
from trioswap.logwriter import LogWriter

STAMP = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ "
NOTICE = re.compile(r"-- (\d+) lines dropped --")
CHAT = "/v1/chat/completions"


async def read(follower):
    """The follower's next piece."""
    with trio.fail_after(PATIENCE):
        return await anext(follower)


def record(message, *args, name="trioswap.daemon", level=logging.INFO):
    made = logging.LogRecord(name, level, __file__, 1, message, args, None)
    made.created = 1769860800.25
    return made


# ---- lines ----


def test_a_record_is_one_line():
    """A record becomes time in UTC, level, module and message, and control characters cannot forge a line."""
    hub = Logs()
    RingHandler(hub).handle(record("no model %r: %s", "x", "a\nb\x1b[2J\tc"))
    assert hub.proxy.history() == b"2026-01-31T12:00:00Z INFO daemon: no model 'x': a\\x0ab\\x1b[2J\tc\n"
    assert hub.combined.history() == hub.proxy.history()


def test_a_record_is_formatted_once_for_all(tmp_path, monkeypatch):
    """It is the same line wherever it goes; a traceback is not kept for longer than it takes."""
    made = list[str]()
    real = LineFormatter.formatMessage

    def counted(self, record):
        made.append(record.message)
        return real(self, record)

    monkeypatch.setattr(LineFormatter, "formatMessage", counted)
    hub = Logs()
    with setup_logging(Config(log_dir=tmp_path), hub):
        logging.getLogger("trioswap.x").info("one")
        logging.getLogger("trioswap.x").info("two")
        assert made == ["one", "two"]
        failure = ValueError("no")
        logging.getLogger("trioswap.x").error("three", exc_info=failure)
        formatter = logging.getLogger().handlers[-1].formatter
        assert isinstance(formatter, LineFormatter)
        assert formatter._last is None
    assert hub.proxy.history() == (tmp_path / "trioswap.log").read_bytes()
    assert b"ValueError: no" in hub.proxy.history()


def test_the_time_may_be_told_otherwise_from_now_on(tmp_path):
    """Wherever our lines go; others' handlers are left alone."""
    hub, others = Logs(), logging.StreamHandler()
    others.setFormatter(logging.Formatter("%(message)s"))
    logging.getLogger().addHandler(others)
    try:
        with setup_logging(Config(log_dir=tmp_path, log_time_format=""), hub):
            logging.getLogger("trioswap.x").info("one")
            logsetup.set_time_format("kitchen")
            logging.getLogger("trioswap.x").info("two")
            logsetup.set_time_format(None)
            logging.getLogger("trioswap.x").info("three")
    finally:
        logging.getLogger().removeHandler(others)
    told = re.compile(rf"INFO x: one\n\d\d?:\d\d[AP]M INFO x: two\n{STAMP}INFO x: three\n")
    assert told.fullmatch(hub.proxy.history().decode())
    assert told.fullmatch((tmp_path / "trioswap.log").read_text())
    assert others.formatter is not None
    assert others.formatter._fmt == "%(message)s"


def test_the_journal_keeps_its_own_clock(monkeypatch):
    """Which tells the time already."""
    monkeypatch.setattr(logsetup, "is_journal", lambda _: True)
    hub = Logs()
    with setup_logging(Config(), hub):
        logsetup.set_time_format("kitchen")
        [journal] = [
            handler.formatter
            for handler in logging.getLogger().handlers
            if isinstance(handler, logsetup.SinkHandler) and handler.formatter is not None
        ]
        assert journal.format(record("hello")) == "<6>INFO daemon: hello"


@pytest.fixture
def new_york(monkeypatch):
    """Five hours west of Greenwich while the test runs."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "EST5")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.parametrize(
    ("layout", "begin"),
    [
        (None, b"2026-01-31T12:00:00Z "),
        ("", b""),
        ("rfc3339nano", b"2026-01-31T07:00:00.25-05:00 "),
        ("unixdate", b"Sat Jan 31 07:00:00 EST 2026 "),
    ],
)
@pytest.mark.usefixtures("new_york")
def test_a_record_tells_the_time_as_it_should(layout, begin):
    """In Go's words it is the local time, as there; else UTC, or not at all."""
    hub = Logs()
    RingHandler(hub, LineFormatter(layout)).handle(record("x"))
    assert hub.proxy.history() == begin + b"INFO daemon: x\n"


def test_a_record_that_cannot_be_formatted_is_said_to_be():
    """A wrong log call costs a readable line, not an exception and not a write to standard error."""
    hub = Logs()
    RingHandler(hub).handle(record("%d models", "many"))
    assert b"INFO trioswap.daemon: '%d models' could not be formatted: TypeError" in hub.proxy.history()


# ---- rings ----


async def test_a_thread_s_record_wakes_a_follower():
    """A record of a worker thread reaches a follower that waits in Trio."""
    hub = Logs()
    handler = RingHandler(hub)
    handler.handle(record("in Trio"))
    with hub.proxy.follow(with_history=False) as follower:
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def _():
                assert (await read(follower)).endswith(b" in a thread\n")

            await wait_all_tasks_blocked()
            await trio.to_thread.run_sync(handler.handle, record("in a thread"))


async def test_a_thread_s_record_is_stored_by_trio_s_thread():
    """While Trio's thread does something else, a record of another thread waits its turn and touches no ring."""
    hub = Logs()
    handler = RingHandler(hub)
    handler.handle(record("first"))
    thread = threading.Thread(target=handler.handle, args=[record("second")])
    thread.start()
    thread.join(PATIENCE)
    assert hub.proxy.tail(1).endswith("first")
    with trio.fail_after(PATIENCE):
        while not hub.proxy.tail(1).endswith("second"):
            await trio.lowlevel.checkpoint()


def test_records_before_and_after_trio_are_stored_at_once():
    """Without a running Trio, records are there when the call returns."""
    hub = Logs()
    handler = RingHandler(hub)
    handler.handle(record("before"))

    async def during():
        handler.handle(record("during"))

    trio.run(during)
    handler.handle(record("after"))
    assert [line.split()[-1] for line in hub.proxy.tail(9).splitlines()] == ["before", "during", "after"]


def test_levels_and_leaving():
    """Our records pass from the level on, others' from WARNING on, and after the block nothing passes."""
    hub = Logs()
    ours, others = logging.getLogger("trioswap.x"), logging.getLogger("somebody.else")
    with setup_logging(Config(), hub):
        ours.debug("no")
        ours.info("yes 1")
        others.info("no")
        others.warning("yes 2")
        logsetup.set_level("debug")
        assert logsetup.level() == "debug"
        ours.debug("yes 3")
    ours.error("no")
    lines = hub.proxy.tail(9).splitlines()
    assert [line[-5:] for line in lines] == ["yes 1", "yes 2", "yes 3"]
    assert not any(isinstance(handler, RingHandler) for handler in logging.getLogger().handlers)


# ---- the standard streams ----

CHATTY = """
import logging, sys
from trioswap.config import Config
from trioswap.logs import Logs
from trioswap.logsetup import setup_logging
logs = Logs()
with setup_logging(Config({settings}), logs):
    for number in range({lines}):
        logging.getLogger("trioswap.chatty").info("line %d %s", number, "x" * 500)
        logs.from_child("m", b"child %d\\n" % number)
"""


async def chatty(lines: int, *, env=None, **settings: object) -> tuple[list[str], list[str]]:
    """What a process that logs so much has written to standard output and standard error."""
    written = ", ".join(f"{key}={value!r}" for key, value in settings.items())
    argv = [sys.executable, "-c", CHATTY.format(lines=lines, settings=written)]
    with trio.fail_after(PATIENCE):
        done = await trio.run_process(argv, capture_stdout=True, capture_stderr=True, env={**os.environ, **(env or {})})
    return done.stdout.decode().splitlines(), done.stderr.decode().splitlines()


async def test_lines_reach_standard_error():
    """All lines of a short-lived process are out when it ends; what children write is not among them."""
    out, err = await chatty(50)
    assert len(err) == 50
    assert re.fullmatch(f"{STAMP}INFO chatty: line 49 x+", err[-1])
    assert out == []


@pytest.mark.parametrize(
    ("target", "ours", "theirs"), [("proxy", 5, 0), ("upstream", 0, 5), ("both", 5, 5), ("none", 0, 0)]
)
async def test_whose_lines_go_to_standard_output(target, ours, theirs):
    """As llama-swap has it (surface reference 2.8); nothing goes to standard error then."""
    out, err = await chatty(5, log_to_stdout=target)
    assert err == []
    assert len([line for line in out if re.fullmatch(f"{STAMP}INFO chatty: line \\d x+", line)]) == ours
    assert len([line for line in out if re.fullmatch(r"child \d", line)]) == theirs
    assert len(out) == ours + theirs


async def test_a_parent_that_never_reads_cannot_hold_us():
    """With nobody reading standard error, logging goes on and the process ends normally."""
    argv = [sys.executable, "-c", CHATTY.format(lines=5000, settings="")]  # 2.5 MB: more than pipe and queue hold
    process = await trio.lowlevel.open_process(argv, stderr=subprocess.PIPE)
    with trio.fail_after(PATIENCE):
        assert await process.wait() == 0
    await process.stderr.aclose()


async def test_lines_lost_on_the_way_are_counted(monkeypatch):
    """When a slow reader catches up, it reads how many lines it missed, and the count is right."""
    readable, writable = os.pipe()
    monkeypatch.setattr(logsetup, "STDERR", writable)
    seen = b""
    with setup_logging(Config(), Logs()):
        ours = logging.getLogger("trioswap.x")
        # 3000 lines of a KiB: some 64 fill the pipe, some 900 the queue, the rest is lost.
        for number in range(3000):
            ours.info("%d %s", number, "x" * 1000)
        async with trio.lowlevel.FdStream(readable) as reader:
            with trio.fail_after(PATIENCE):
                while seen.count(b"\n") < 500:
                    seen += await reader.receive_some()
                ours.info("the last")  # there is room again
                while not seen.endswith(b"the last\n"):
                    seen += await reader.receive_some()
    os.close(writable)
    lines = seen.decode().splitlines()
    notices = [match for line in lines if (match := NOTICE.fullmatch(line))]
    assert notices
    assert len(lines) - len(notices) + sum(int(match[1]) for match in notices) == 3001


# ---- the journal ----

FAILING = """
import logging
from trioswap.config import Config
from trioswap.logs import Logs
from trioswap.logsetup import setup_logging
logs = Logs()
with setup_logging(Config(log_level="debug"), logs):
    ours = logging.getLogger("trioswap.x")
    ours.debug("one")
    ours.info("two")
    ours.warning("three")
    try:
        1 / 0
    except ZeroDivisionError:
        ours.exception("four")
    ours.critical("five")
"""


async def journal(other: int = 0) -> list[str]:
    """What reaches standard error, a pipe, when JOURNAL_STREAM names it, or the *other*-th file after it."""
    readable, writable = os.pipe()
    status = os.fstat(writable)
    env = {**os.environ, "JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino + other}"}
    with trio.fail_after(PATIENCE):
        await trio.run_process([sys.executable, "-c", FAILING], stderr=writable, env=env)
    os.close(writable)
    try:
        return os.read(readable, 65536).decode().splitlines()  # less than a pipe holds
    finally:
        os.close(readable)


async def test_the_journal_gets_priorities_and_no_time():
    """On every line, those of a traceback included; sd-daemon(3) has the numbers."""
    lines = await journal()
    assert [line for line in lines if not line.startswith("<3>")] == [
        "<7>DEBUG x: one",
        "<6>INFO x: two",
        "<4>WARNING x: three",
        "<2>CRITICAL x: five",
    ]
    errors = [line for line in lines if line.startswith("<3>")]
    assert errors[0] == "<3>ERROR x: four"
    assert errors[1] == "<3>Traceback (most recent call last):"
    assert errors[-1] == "<3>ZeroDivisionError: division by zero"


async def test_what_is_not_the_journal_gets_none():
    """The variable is inherited by whatever runs below a unit; only the file it names is the journal."""
    assert re.fullmatch(f"{STAMP}DEBUG x: one", (await journal(1))[0])


# ---- files ----


def test_lines_go_to_files(tmp_path):
    """Our own to one, each model's to its own, with the same beginnings as elsewhere; all are there at the exit."""
    hub = Logs()
    with setup_logging(Config(log_dir=tmp_path / "deep" / "logs", log_time_format=""), hub):
        logging.getLogger("trioswap.x").info("ours")
        hub.from_child("org/m", b"no end")
        hub.from_child("n", b"other\n")
    assert {path.name: path.read_text() for path in (tmp_path / "deep" / "logs").iterdir()} == {
        "trioswap.log": "INFO x: ours\n",
        "model-org%2Fm.log": "no end",
        "model-n.log": "other\n",
    }


async def test_files_that_cannot_be_written_are_one_warning_a_minute(tmp_path, monkeypatch):
    """Whatever the number of lines and of files; then the next, and when it is over, in each file what was lost."""
    (tmp_path / "logs").touch()  # where the directory should be
    hub, now = Logs(), 0.0
    writers: list[LogWriter] = []

    def make(*arguments):
        writers.append(LogWriter(*arguments))
        return writers[-1]

    monkeypatch.setattr(logsetup, "LogWriter", make)
    monkeypatch.setattr(logsetup.time, "monotonic", lambda: now)
    ours = logging.getLogger("trioswap.x")
    with setup_logging(Config(log_dir=tmp_path / "logs"), hub):

        async def say(lines: int) -> None:
            for number in range(lines):
                ours.info("%d", number)
                hub.from_child("m", b"%d\n" % number)
            with trio.fail_after(PATIENCE):
                while any(writer._taken for writer in writers):
                    await trio.lowlevel.checkpoint()
                await wait_all_tasks_blocked()  # what the thread has handed to Trio's

        await say(20)
        now = 59.0
        await say(1)
        assert hub.proxy.tail(99).count("WARNING logsetup: log lines are lost") == 1
        now = 61.0
        await say(1)
        assert hub.proxy.tail(99).count("WARNING logsetup: log lines are lost") == 2
        (tmp_path / "logs").unlink()
        await say(1)
    assert (tmp_path / "logs" / "model-m.log").read_text() == "-- 22 lines dropped --\n0\n"
    notice, line = (tmp_path / "logs" / "trioswap.log").read_text().splitlines()
    assert int(NOTICE.fullmatch(notice)[1]) == 24
    assert line.endswith(" INFO x: 0")


# ---- the whole daemon ----


@pytest.mark.parametrize("target", ["both", "upstream", "proxy", None])
async def test_a_stopped_reader_stops_nobody(tmp_path, target):
    """With a full pipe as standard output or standard error requests are answered, and the exit is 0."""
    port, readable, writable = free_port(), *os.pipe()
    fcntl.fcntl(writable, fcntl.F_SETPIPE_SZ, 4096)
    settings = {} if target is None else {"log_to_stdout": target}
    models = {"a": scripted("--spam", 300_000)}
    config = write_config(tmp_path, models, listen=f"127.0.0.1:{port}", log_level="debug", **settings)
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    streams["stderr" if target is None else "stdout"] = writable
    with notify_socket(tmp_path / "notify") as notices, trio.fail_after(2 * PATIENCE):
        argv = (*commands.TRIOSWAP, "serve", "-c", config)
        process = await trio.lowlevel.open_process(argv, env=notices.environment, **streams)
        try:
            await notices.wait_for("READY=1")
            while select.select([], [writable], [], 0)[1]:  # until there is no room
                assert (await fetch(port, "POST", CHAT, chat("a"))).status == 200
            for _ in range(5):
                assert (await fetch(port, "POST", CHAT, chat("a"))).status == 200
            assert (await fetch(port, "POST", "/api/models/unload")).status == 200
            process.terminate()
            assert await process.wait() == 0
        finally:
            # Not killed, or its model server would be left; shielded, or a failed test would leave both.
            process.terminate()
            with trio.move_on_after(PATIENCE, shield=True):
                await process.wait()
            os.close(readable)
            os.close(writable)


async def contains(path: Path, text: str) -> None:
    """Return when the file has *text*."""
    with trio.fail_after(PATIENCE):
        while not (path.exists() and text in path.read_text()):  # noqa: ASYNC240 - short
            await trio.lowlevel.checkpoint()


async def test_the_last_words_of_a_server_are_in_its_file(tmp_path):
    """Of one that crashed at its start, with the exit code in ours; also when the daemon is killed afterwards."""
    config = write_config(tmp_path, {"org/a": scripted("--exit-at-start", 7)}, log_dir=str(tmp_path / "logs"))
    async with commands.daemon("serve", "-c", config) as served:
        assert (await fetch(served.port, "POST", CHAT, chat("org/a"))).status == 503
        await contains(tmp_path / "logs" / "model-org%2Fa.log", "org/a: cannot load the model\n")
        await contains(tmp_path / "logs" / "trioswap.log", "exited with 7")
        served.process.kill()
        await served.process.wait()
    assert "exited with 7" in (tmp_path / "logs" / "trioswap.log").read_text()


async def test_files_begin_anew_at_their_size(tmp_path):
    """Of a server that writes more than all of them may hold, the newest is kept, in files of that size."""
    models = {"a": scripted("--spam", 100_000)}
    config = write_config(tmp_path, models, log_dir="logs", log_file_size="8KiB", log_files=2)
    async with commands.daemon("serve", "-c", config) as served:
        assert (await fetch(served.port, "POST", CHAT, chat("a"))).status == 200
        await contains(tmp_path / "logs" / "model-a.log", "ready")
        assert await served.stop() == 0
    files = {path.name: path.stat().st_size for path in (tmp_path / "logs").glob("model-*")}
    assert set(files) == {"model-a.log", "model-a.log.1"}
    assert files["model-a.log.1"] == 8192
    assert files["model-a.log"] <= 8192


@pytest.mark.parametrize("trouble", ["full", "limit", "gone"])
async def test_trouble_with_files_stops_nobody(tmp_path, trouble):
    """A full disk, files that may not grow, a directory that vanishes: answers come, and there is one warning."""
    directory = tmp_path / "logs"
    directory.mkdir()
    if trouble == "full":
        for name in ("trioswap.log", "model-a.log"):
            (directory / name).symlink_to("/dev/full")
    models = {"a": scripted()}
    async with commands.daemon("serve", "-c", write_config(tmp_path, models, log_dir=str(directory))) as served:
        if trouble == "limit":
            resource.prlimit(served.process.pid, resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
        if trouble == "gone":
            assert (await fetch(served.port, "POST", CHAT, chat("a"))).status == 200
            await contains(directory / "trioswap.log", "status=200")
            shutil.rmtree(directory)
            directory.touch()
        for _ in range(30):
            assert (await fetch(served.port, "POST", CHAT, chat("a"))).status == 200
        history = (await fetch(served.port, "GET", "/logs")).text
        while "log lines are lost" not in history:  # the thread may be a moment late
            history = (await fetch(served.port, "GET", "/logs")).text
        assert history.count("log lines are lost") == 1
        # And when it is over they are there again.
        resource.prlimit(served.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        if trouble == "gone":
            directory.unlink()
        if trouble == "full":
            (directory / "trioswap.log").unlink()
        assert (await fetch(served.port, "GET", "/running")).status == 200
        await contains(directory / "trioswap.log", " lines dropped --\n")
        await contains(directory / "trioswap.log", "/running")
        assert await served.stop() == 0
    assert "stopped" in (directory / "trioswap.log").read_text().splitlines()[-1]
