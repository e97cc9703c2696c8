"""Sets up the standard library's logging: which lines go where, and how they begin.

Our own lines go to the rings, to one of the standard streams, and to a file if files are
wanted; those of model servers to their rings in any case, and to the other two if that is
wanted.  Nobody waits for any of it (`logwriter`).
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Final

import attrs
import trio

from trioswap.config import Config
from trioswap.logfiles import OURS, RotatedFile, file_name
from trioswap.logs import Logs
from trioswap.logtimes import in_utc, timestamp
from trioswap.logwriter import Descriptor, LogWriter, Sink

logger = logging.getLogger(__name__)

# Seconds granted to the last lines when logging ends.
GRACE: Final = 1.0
# Seconds between two warnings that lines cannot be written to files.
PAUSE: Final = 60.0
STDOUT: Final = 1
STDERR: Final = 2

# Control characters would let a client's model name forge lines or repaint a terminal.
_CONTROLS: Final = {code: f"\\x{code:02x}" for code in (*range(32), 127) if chr(code) != "\t"}
# sd-daemon(3): the priorities of syslog, as what a line begins with.
_PRIORITIES: Final = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}


# ---- lines ------------------------------------------------------------------------------


def _when(layout: str | None, created: float) -> str:
    if layout is None:
        return in_utc(int(created))
    return timestamp(layout, datetime.fromtimestamp(created).astimezone())


class LineFormatter(logging.Formatter):
    """`2026-01-31T12:00:00Z INFO daemon: message`; only a traceback takes more lines."""

    def __init__(self, layout: str | None = None) -> None:
        super().__init__()
        self.layout = layout
        """Of the time, see `timestamp`."""
        self._last: tuple[logging.LogRecord, str] | None = None

    def format(self, record: logging.LogRecord) -> str:
        """One line for all handlers: they get the same record one after the other, and ask for the same."""
        last = self._last
        if last is None or last[0] is not record:
            last = record, super().format(record)
            # A traceback would keep alive whatever its frames know.
            self._last = None if record.exc_info else last
        return last[1]

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the library's name
        """The line, to which the library adds a traceback if there is one."""
        name = record.name.removeprefix("trioswap.")
        when = _when(self.layout, record.created)
        return f"{when}{record.levelname} {name}: {record.message.translate(_CONTROLS)}"


class _JournalFormatter(LineFormatter):
    """`<6>INFO daemon: message`: the journal has a clock of its own, and makes an entry of each line."""

    def __init__(self) -> None:
        super().__init__("")

    def format(self, record: logging.LogRecord) -> str:
        mark = _mark(record.levelno)
        return "\n".join(mark + line for line in super().format(record).split("\n"))


def _mark(level: int) -> str:
    return f"<{_PRIORITIES.get(level, 6)}>"


class _LineHandler(logging.Handler):
    """Formats records; a record that cannot be formatted becomes a line that says so.

    The library's own way is a traceback on standard error, where it may block.
    """

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__()
        self.setFormatter(formatter)

    def line(self, record: logging.LogRecord) -> bytes:
        try:
            text = self.format(record)
        except Exception as exc:  # arguments that do not fit the message: a bug, but not worth a request
            text = f"{record.levelname} {record.name}: {record.msg!r} could not be formatted: {exc!r}"
        return text.encode(errors="backslashreplace") + b"\n"


class RingHandler(_LineHandler):
    """Puts log records into our own rings.

    Rings wake followers, and only the thread that runs Trio may do that.  So records
    of other threads are handed to it and arrive a moment later.  Before Trio runs and
    after, nobody can be waiting: then they are stored at once, one by one under the
    lock that the library holds around `emit`.
    """

    def __init__(self, logs: Logs, formatter: logging.Formatter | None = None) -> None:
        super().__init__(formatter or LineFormatter())
        self._logs = logs
        self._trio: trio.lowlevel.TrioToken | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Store one record, or have it stored."""
        line = self.line(record)
        if trio.lowlevel.in_trio_run():
            self._trio = trio.lowlevel.current_trio_token()
        elif self._trio is not None:
            with suppress(trio.RunFinishedError):
                self._trio.run_sync_soon(self._logs.from_ourselves, line)
                return
        self._logs.from_ourselves(line)


class SinkHandler(_LineHandler):
    """Leaves the writing to a thread and never waits for it.

    The library has `QueueListener` for this, but its `stop` waits for ever when nobody
    reads standard error, and its target's lock, held by a stuck write, blocks the exit.
    """

    def __init__(self, put: Callable[[bytes], None], formatter: logging.Formatter) -> None:
        super().__init__(formatter)
        self._put = put

    def emit(self, record: logging.LogRecord) -> None:
        """Have one record written."""
        self._put(self.line(record))


# ---- where they go ----------------------------------------------------------------------


@contextmanager
def setup_logging(config: Config, logs: Logs) -> Iterator[None]:
    """Inside the block, log records go where *config* says, and to *logs*.

    Others' loggers only get through with warnings.  Leaving takes a second at most,
    even when nobody reads what is written.
    """
    formatter = LineFormatter(config.log_time_format)
    with ExitStack() as stack:
        outputs: list[_Stream | _Files] = [
            *([_Files(logs, config.log_dir, config, formatter)] if config.log_dir else []),
            _Stream(logs, config, formatter),
        ]
        # Not when each is left: a second is for all of them.
        stack.callback(_stop, outputs)
        for output in outputs:
            output.begin(stack)
        stack.enter_context(_handling(RingHandler(logs, formatter)))
        set_level(config.log_level)
        yield


def _stop(outputs: list[_Stream | _Files]) -> None:
    deadline = time.monotonic() + GRACE
    for output in outputs:
        output.stop(deadline)


@contextmanager
def _handling(handler: logging.Handler) -> Iterator[None]:
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)


@attrs.define(eq=False)
class _Stream:
    """Standard output, for whom `log_to_stdout` names; without it our own lines go to standard error."""

    logs: Logs
    config: Config
    formatter: logging.Formatter
    writer: LogWriter = attrs.field(factory=lambda: LogWriter("log stream"), init=False)

    def begin(self, stack: ExitStack) -> None:
        chosen = self.config.log_to_stdout
        number = STDERR if chosen is None else STDOUT
        journal = is_journal(number)
        sink = Sink(Descriptor(number), _mark(logging.WARNING).encode() if journal else b"")
        if chosen in (None, "proxy", "both"):
            formatter = _JournalFormatter() if journal else self.formatter
            stack.enter_context(_handling(SinkHandler(lambda line: self.writer.put(sink, line), formatter)))
        if chosen in ("upstream", "both"):
            # As they come: those that know the journal's marks may use them.
            stack.enter_context(self.logs.copied(lambda model, data: self.writer.put(sink, data, model)))

    def stop(self, deadline: float) -> None:
        self.writer.stop(deadline)


@attrs.define(eq=False)
class _Files:
    """A file for each model server and one for ourselves.

    They have a thread of their own: a stopped terminal must not hold up what a disk would
    take, nor a slow disk what somebody reads.
    """

    logs: Logs
    directory: Path
    config: Config
    formatter: logging.Formatter
    writer: LogWriter = attrs.field(init=False)
    sinks: dict[str, Sink] = attrs.field(factory=dict, init=False)
    """By file name; for the thread that runs Trio, except our own."""
    next_warning: float = attrs.field(default=float("-inf"), init=False)
    """For the writer's thread: the monotonic time from which on it may warn again."""

    def __attrs_post_init__(self) -> None:
        self.writer = LogWriter("log files", self._warn)

    def begin(self, stack: ExitStack) -> None:
        ours = self._sink(OURS)
        handler = SinkHandler(lambda line: self.writer.put(ours, line), self.formatter)
        stack.enter_context(_handling(handler))
        stack.enter_context(self.logs.copied(lambda model, data: self.writer.put(self._sink(file_name(model)), data)))

    def stop(self, deadline: float) -> None:
        if self.writer.stop(deadline):
            for sink in self.sinks.values():
                assert isinstance(sink.target, RotatedFile)
                sink.target.close()

    def _sink(self, name: str) -> Sink:
        if name not in self.sinks:
            file = RotatedFile(self.directory / name, self.config.log_file_size, self.config.log_files)
            self.sinks[name] = Sink(file)
        return self.sinks[name]

    def _warn(self, exc: OSError) -> None:
        if time.monotonic() >= self.next_warning:
            self.next_warning = time.monotonic() + PAUSE
            logger.warning("log lines are lost, for they cannot be written to log_dir: %s", exc)


def is_journal(descriptor: int) -> bool:
    """Whether *descriptor* leads to the journal: systemd says in JOURNAL_STREAM what that is (systemd.exec(5))."""
    try:
        status = os.fstat(descriptor)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


# ---- how much, and when -----------------------------------------------------------------


def set_level(level: str) -> None:
    """Log of our own what is at least *level*, one of `config.schema.LOG_LEVELS`; at any time."""
    logging.getLogger("trioswap").setLevel(level.upper())


def set_time_format(layout: str | None) -> None:
    """Have our lines tell the time as *layout* does (`timestamp`), at any time.  The journal has a clock of its own."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _LineHandler) and type(handler.formatter) is LineFormatter:
            handler.formatter.layout = layout


def level() -> str:
    """The level that holds now."""
    return logging.getLevelName(logging.getLogger("trioswap").getEffectiveLevel()).lower()
