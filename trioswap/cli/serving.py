"""The commands that run the daemon in this process, and the one that only looks at its configuration."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import click

from trioswap.cli.base import config_files, config_options, count, log_level_option, main, override, read_config
from trioswap.errors import CannotListen, LlamaExtraMissing, Misuse
from trioswap.firstprocess import step_aside

if TYPE_CHECKING:
    from trioswap.config import Config
    from trioswap.watching import Watch

logger = logging.getLogger(__name__)

_STDOUT: Final = 1
_STDERR: Final = 2


@main.command()
@config_options
@click.option("--listen", metavar="HOST:PORT|unix:/PATH", help="Instead of what the file says; port 0 is a free one.")
@click.option("--tls-cert-file", metavar="FILE", help="Serve HTTPS with this certificate (PEM, with its chain).")
@click.option("--tls-key-file", metavar="FILE", help="The certificate's key (PEM, without a passphrase).")
@log_level_option
@click.option("--watch-config", is_flag=True, help="Reload the configuration whenever its files have changed.")
def serve(
    files: Sequence[str],
    directory: str | None,
    lenient: bool,
    listen: str | None,
    tls_cert_file: str | None,
    tls_key_file: str | None,
    log_level: str | None,
    watch_config: bool,
) -> None:
    """Run the daemon until SIGTERM or Ctrl-C; a second one cuts what is being served."""
    step_aside()
    named = tuple(map(str, config_files(files, directory)))
    source = Source(named, directory, lenient, listen, log_level, tls_cert_file, tls_key_file)
    watch = _watch(source) if watch_config else None  # before it is read, or what changes meanwhile goes unnoticed
    config = source.read()
    run_daemon(config, ready_line, source.reread, watch)


@main.command()
@config_options
def check(files: Sequence[str], directory: str | None, lenient: bool) -> None:
    """Validate a configuration and print every mistake."""
    begun = time.perf_counter()
    config = read_config(files, directory, lenient=lenient)
    what = count(len(config.models), "model")
    if config.matrix is not None:
        what += f", a matrix of {count(len(config.matrix.sets), 'set')}"
    elif config.groups:
        what += f" in {count(len(config.groups), 'group')}"
    what += ", as memory allows" if config.memory is not None else ""
    click.echo(f"no mistakes: {what}, checked in {1000 * (time.perf_counter() - begun):.0f} ms")


@main.command()
@click.option("--listen", metavar="HOST:PORT", help="Default: 127.0.0.1:8080, or a free port when that is taken.")
@log_level_option
def demo(listen: str | None, log_level: str | None) -> None:
    """Serve two tiny models, one resident at a time: no configuration, no download."""
    from trioswap import demo as tiny

    if not tiny.engine_is_installed():
        raise LlamaExtraMissing
    step_aside()
    # Until the daemon takes the signal over, so that the directory goes whenever it comes.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with tiny.config_file() as path:
        config = override(read_config([str(path)]), listen=listen, log_level=log_level)
        try:
            run_daemon(config, lambda urls: ready_line(urls) + tiny.instructions(urls[0]))
        except CannotListen:
            if listen is not None:
                raise
            note = f"({config.listen} is taken, so this is a free port; --listen chooses another)\n"
            config = override(config, listen="127.0.0.1:0")
            run_daemon(config, lambda urls: ready_line(urls) + note + tiny.instructions(urls[0]))


def run_daemon(
    config: Config,
    announcement: Callable[[list[str]], str],
    reread: Callable[[Config], Config] | None = None,
    watch: Watch | None = None,
) -> None:
    """Serve in this process until told to stop; print what *announcement* makes of the bound URLs once they are.

    For *reread* and *watch* see `daemon.serve`.

    Raises:
        CannotListen: before anything was started.
    """
    _fill_standard_descriptors()
    import trio

    from trioswap import daemon
    from trioswap.logs import Logs
    from trioswap.logsetup import setup_logging

    logs, ready = Logs(), _Ready(announcement)

    async def serve_to_the_end() -> None:
        with _unread_signals(ready):
            await daemon.serve(config, logs, reread, watch, task_status=ready)

    with setup_logging(config, logs):
        trio.run(serve_to_the_end)


@contextmanager
def _unread_signals(ready: _Ready) -> Iterator[None]:
    """Decide what becomes of the signals that the daemon does not read, in the block and behind it.

    Before it is ready they do what they always do.  Later there are those that come when it has all but ended, and
    get back to the handlers from before it (`trio.open_signal_receiver`): nothing is left to hasten, and
    the default action would make a clean stop look like a failure.
    """

    def handler(number: int, _: object) -> None:
        if not ready.is_so:
            signal.signal(number, earlier[number])
            signal.raise_signal(number)

    earlier = {int(each): signal.signal(each, handler) for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield
    for number in earlier:
        signal.signal(number, signal.SIG_IGN)


def with_tls(config: Config, cert_file: str | None, key_file: str | None) -> Config:
    """*config* with the certificate and the key that the command line names instead, if it does.

    Raises:
        Misuse: it names one of them only.
    """
    import attrs

    from trioswap.config.parts import TlsConfig

    if not cert_file and not key_file:
        return config
    if not cert_file or not key_file:
        missing = "--tls-key-file" if cert_file else "--tls-cert-file"
        raise Misuse(f"TLS needs a certificate and its key: add {missing} FILE")
    return attrs.evolve(config, tls=TlsConfig(Path(cert_file).absolute(), Path(key_file).absolute()))


class Source(NamedTuple):
    """Where a daemon's configuration comes from, now and at each reload."""

    files: tuple[str, ...]
    """Those that are read each time: the place where one was found is not looked for again."""
    directory: str | None = None
    lenient: bool = False
    listen: str | None = None
    """This and what follows holds instead of what the files say."""
    log_level: str | None = None
    tls_cert_file: str | None = None
    tls_key_file: str | None = None

    def read(self) -> Config:
        """The configuration at the start; complaints go to standard error.

        Raises:
            Misuse: nothing is named, or half of what TLS needs.
            ConfigError: it has mistakes.
        """
        return self._instead(read_config(self.files, self.directory, lenient=self.lenient))

    def reread(self, keep: Config) -> Config:
        """The configuration that takes the place of *keep*, whose models keep their ports; complaints are logged.

        Reads files: call it in a thread.

        Raises:
            ConfigError: it has mistakes.
        """
        config = read_config(self.files, self.directory, lenient=self.lenient, keep=keep, say=_log)
        return self._instead(config)

    def paths(self) -> list[Path]:
        """The files it is read from, as they are now.

        Raises:
            ConfigError: the directory cannot be read, or has none.
        """
        from trioswap.config.loading import find_sources

        return find_sources(config_files(self.files, self.directory), Path(self.directory) if self.directory else None)

    def _instead(self, config: Config) -> Config:
        config = override(config, listen=self.listen, log_level=self.log_level)
        return with_tls(config, self.tls_cert_file, self.tls_key_file)


def ready_line(urls: list[str]) -> str:
    """The line that says where clients find us."""
    return f"trioswap listens on {' and '.join(urls)}\n"


def _watch(source: Source) -> Watch:
    from trioswap.watching import Watch

    return Watch(source.paths)


def _log(line: str) -> None:
    logger.warning("%s", line)


class _Ready:
    """What the daemon reports to once it accepts requests."""

    def __init__(self, announcement: Callable[[list[str]], str]) -> None:
        self.announcement = announcement
        self.is_so = False

    def started(self, value: list[str] | None = None) -> None:
        self.is_so = True
        # In a thread that the exit does not wait for: nobody may ever read our standard output.
        text = self.announcement(value or [])
        threading.Thread(target=_write, args=(text.encode(),), name="announcement", daemon=True).start()


def _write(data: bytes) -> None:
    # Not through sys.stdout: a write that is stuck would hold its lock, and the interpreter's exit.
    with suppress(OSError):
        os.write(_STDOUT, data)


def _fill_standard_descriptors() -> None:
    """Open what the parent closed of 0, 1 and 2: else a socket gets the number, and a client our log lines."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= _STDERR:
        pass
    os.close(descriptor)
