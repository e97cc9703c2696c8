"""The command line: arguments in, exit codes out.

    0  done, or stopped cleanly
    1  the world said no: a port in use, no daemon there, an unknown model; or a bug of ours, with its traceback
    2  the user's mistake: bad arguments, a bad configuration

Every expected error is text on standard error.  What a command needs is imported inside
it, so that `trioswap --version` imports nothing but click.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

import click

from trioswap import __version__
from trioswap.errors import CannotListen, ConfigError, LlamaExtraMissing, Misuse, TrioswapError

if TYPE_CHECKING:
    from trioswap.config import Config
    from trioswap.remote import DaemonClient

CONFIG_PLACES: Final = ("trioswap.toml", "~/.config/trioswap/trioswap.toml", "/etc/trioswap/trioswap.toml")
"""Where a configuration is looked for when none is named; the first that exists is read."""
DAEMON_URL: Final = "http://127.0.0.1:8080"

_STDOUT: Final = 1
_STDERR: Final = 2


class Commands(click.Group):
    """Turns expected errors into text and an exit code; anything else is a bug and keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except TrioswapError as exc:
            click.echo(f"trioswap: {exc.message}", err=True)
            return ctx.exit(2 if isinstance(exc, (ConfigError, Misuse)) else 1)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="trioswap %(version)s")
def main() -> None:
    """Swap local model servers in and out behind one OpenAI-compatible endpoint."""


# ---- the daemon -----------------------------------------------------------------------------

config_option = click.option(
    "-c", "--config", "files", multiple=True, metavar="FILE", help=f"Default: the first of {', '.join(CONFIG_PLACES)}."
)
log_level_option = click.option("--log-level", metavar="LEVEL", help="debug, info, warning or error.")


@main.command()
@config_option
@click.option("--listen", metavar="HOST:PORT", help="Instead of what the file says; port 0 is a free one.")
@log_level_option
def serve(files: Sequence[str], listen: str | None, log_level: str | None) -> None:
    """Run the daemon until SIGTERM or Ctrl-C; a second one cuts what is being served."""
    run_daemon(override(read_config(files), listen=listen, log_level=log_level), ready_line)


@main.command()
@config_option
def check(files: Sequence[str]) -> None:
    """Validate a configuration and print every mistake."""
    begun = time.perf_counter()
    config = read_config(files)
    what = _count(len(config.models), "model")
    if config.matrix is not None:
        what += f", a matrix of {_count(len(config.matrix.sets), 'set')}"
    elif config.groups:
        what += f" in {_count(len(config.groups), 'group')}"
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


def read_config(files: Sequence[str]) -> Config:
    """The configuration in the one file named, or else in the first of `CONFIG_PLACES` that exists.

    Raises:
        Misuse: several files are named, or none exists.
        ConfigError: it has mistakes.
    """
    from trioswap.config import load

    if len(files) > 1:
        raise Misuse(f"-c was given {len(files)} times; this version reads one configuration file")
    path = Path(files[0]) if files else _config_place()
    if path.suffix in (".yaml", ".yml"):
        raise ConfigError(str(path), ["this version reads TOML, not llama-swap's YAML; see configs/full.toml"])
    return load(path)


def _config_place() -> Path:
    places = [Path(place).expanduser() for place in CONFIG_PLACES]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        where = ", ".join(map(str, places))
        raise Misuse(f"there is no configuration: none of {where}; name one with -c FILE, or try `trioswap demo`")
    return found


def override(config: Config, *, listen: str | None = None, log_level: str | None = None) -> Config:
    """*config* with what the command line says instead, checked again as a whole.

    Raises:
        ConfigError: what came out has mistakes.
    """
    import attrs

    from trioswap.config.checks import check as check_config
    from trioswap.config.mistakes import Mistakes

    config = attrs.evolve(config, listen=listen or config.listen, log_level=log_level or config.log_level)
    mistakes = Mistakes()
    check_config(config, mistakes)
    if lines := mistakes.lines():
        raise ConfigError("command line", lines)
    return config


def run_daemon(config: Config, announcement: Callable[[list[str]], str]) -> None:
    """Serve in this process until told to stop; print what *announcement* makes of the bound URLs once they are.

    Raises:
        CannotListen: before anything was started.
    """
    _fill_standard_descriptors()
    import trio

    from trioswap import daemon
    from trioswap.logs import Logs, setup_logging

    logs = Logs()
    with setup_logging(config.log_level, logs):
        trio.run(partial(daemon.serve, config, logs, task_status=_Ready(announcement)))


def ready_line(urls: list[str]) -> str:
    """The line that says where clients find us."""
    return f"trioswap listens on {' and '.join(urls)}\n"


class _Ready:
    """What the daemon reports to once it accepts requests."""

    def __init__(self, announcement: Callable[[list[str]], str]) -> None:
        self.announcement = announcement

    def started(self, value: list[str] | None = None) -> None:
        # In a thread that the exit does not wait for: nobody may ever read our standard output.
        text = self.announcement(value or [])
        threading.Thread(target=_write, args=(text.encode(),), name="announcement", daemon=True).start()


def _write(data: bytes) -> None:
    # Not through sys.stdout: a write that is stuck would hold its lock, and the interpreter's exit.
    with contextlib.suppress(OSError):
        os.write(_STDOUT, data)


def _fill_standard_descriptors() -> None:
    """Open what the parent closed of 0, 1 and 2: else a socket gets the number, and a client our log lines."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= _STDERR:
        pass
    os.close(descriptor)


# ---- in virtual time ------------------------------------------------------------------------


def _number(least: float, most: float) -> Callable[[click.Context, click.Parameter, float | None], float | None]:
    """A check of an option; click's own FloatRange lets nan through."""

    def check(_: click.Context, __: click.Parameter, value: float | None) -> float | None:
        if value is not None and not least <= value <= most:
            raise click.BadParameter(f"found {value:g}, allowed is a number from {least:g} to {most:g}")
        return value

    return check


def _float_option(name: str, most: float, help_: str, default: float | None = None) -> Callable[[Any], Any]:
    return click.option(name, type=float, default=default, callback=_number(0, most), help=help_)


@main.command()
@click.argument("traces", nargs=-1, metavar="[TRACE]...")
@click.option("-c", "--config", "file", metavar="FILE", help="What the models of recorded traces are like.")
@click.option("--seeds", type=click.IntRange(1), default=10, show_default=True, help="Variants of each built-in trace.")
@_float_option("--swap", 3600, "Seconds a middling model of the built-in traces loads for.  [default: 10]", 10.0)
@click.option("--policy", "policies", metavar="NAME,...", default="lease,llama-swap,strict-fifo", show_default=True)
@_float_option("--max-wait", float("inf"), "For the policy lease: max_wait, in seconds.")
@_float_option("--turn-lease", float("inf"), "For the policy lease: turn_lease, in swap costs.")
@_float_option("--linger", float("inf"), "For the policy lease: linger, in swap costs.")
@click.option("--parallel-loads", type=click.IntRange(1), help="For the policy lease: parallel_loads.")
@click.option("--weights", is_flag=True, help="Let the weights of the users in the traces count.")
@click.option("--plot", metavar="FILE", help="Draw the ratios, too; .png or .svg.")
def simulate(
    traces: Sequence[str],
    file: str | None,
    seeds: int,
    swap: float,
    policies: str,
    weights: bool,
    plot: str | None,
    **settings: float | None,
) -> None:
    """Replay TRACEs through the scheduler in virtual time, and compare policies.

    A TRACE is built in, or a file of records, one JSON object in each line; without one,
    all that are built in are replayed.
    """
    from trioswap.simulation import compare, configured, contenders, report
    from trioswap.simulation import plot as picture

    names = contenders.chosen(policies)
    if plot:
        picture.check(Path(plot), names)
    frame = configured.frame(read_config([file])) if file else None
    found = compare.find(traces, seeds, swap, frame)
    click.echo("\n".join([report.intro(seeds, swap), "", *report.heading()]))
    results = {}
    for trace in found:
        results[trace.name] = compare.run(trace, names, contenders.Settings(**settings), weights=weights)
        click.echo("\n".join(report.rows(trace.name, results[trace.name])))
    click.echo("\n".join([*report.refusals(results), *report.ratios(results)]))
    if plot:
        picture.draw(results, Path(plot))


# ---- talking to a running daemon ------------------------------------------------------------

url_option = click.option("--url", envvar="TRIOSWAP_URL", default=DAEMON_URL, show_default=True, show_envvar=True)


@main.command()
@url_option
def ps(url: str) -> None:
    """List the models, their state, what they serve, who waits, and the memory they have reserved."""
    from trioswap import telling

    with _daemon(url) as client:
        listed = [row["id"] for row in _answer(client, "/v1/models", "data")["data"]]
        running = _answer(client, "/running", "running")["running"]
        lent = _answer(client, "/api/queue", "lent")["lent"]
    click.echo(telling.models(listed, running, lent))


@main.command()
@url_option
def queue(url: str) -> None:
    """Show who waits for what and for how long, and the last decisions."""
    from trioswap import telling

    with _daemon(url) as client:
        click.echo(telling.queue(_answer(client, "/api/queue", "waiting")))


@main.command()
@click.argument("model")
@click.option("--resident", metavar="MODEL,...", help="Which models are loaded, in the configuration alone.")
@config_option
@click.option("--url", help="Ask the daemon there what would happen now.")
def plan(model: str, resident: str | None, files: Sequence[str], url: str | None) -> None:
    """Tell what MODEL needs, whom a request for it would put out, and why.

    Without --url the configuration alone is asked.
    """
    from trioswap import telling

    if url is None:
        from trioswap import whatif

        found = whatif.plan(read_config(files), model, resident.split(",") if resident else ())
        click.echo(telling.plan(found, live=False))
        return
    if resident is not None or files:
        raise Misuse("--url asks a daemon, which knows its configuration and who is resident: no -c, no --resident")
    with _daemon(url) as client:
        click.echo(telling.plan(_answer(client, f"/api/plan/{quote(model, safe='')}", "why"), live=True))


@main.command()
@click.argument("memory")
@click.argument("command", nargs=-1, required=True, metavar="-- COMMAND...")
@click.option("--device", help="Where: ram, gpu0, ...  Default: any GPU, or ram where there is none.")
@click.option("--label", help="What others see.  Default: the command and its process.")
@url_option
def hold(memory: str, command: Sequence[str], device: str | None, label: str | None, url: str) -> None:
    """Wait until MEMORY ("12GiB") is there, and run COMMAND while no model may use it."""
    from trioswap.borrow import run

    sys.exit(run(url, os.environ.get("TRIOSWAP_API_KEY"), memory, device, label, command))


@main.command()
@click.argument("model")
@url_option
def load(model: str, url: str) -> None:
    """Load MODEL as a request would, and wait until it is ready."""
    begun = time.perf_counter()
    with _daemon(url) as client:
        client.post(f"/api/models/load/{quote(model, safe='')}")
    click.echo(f"{model} is ready ({time.perf_counter() - begun:.1f} s)")


@main.command()
@click.argument("model", required=False)
@url_option
def unload(model: str | None, url: str) -> None:
    """Unload MODEL, or all models: what is served may finish (bounded), then the process ends."""
    begun = time.perf_counter()
    with _daemon(url) as client:
        client.post(f"/api/models/unload/{quote(model, safe='')}" if model else "/api/models/unload")
    what = f"{model} is" if model else "all models are"
    click.echo(f"{what} unloaded ({time.perf_counter() - begun:.1f} s)")


@main.command()
@click.argument("model", required=False)
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes, until Ctrl-C.")
@url_option
def logs(model: str | None, follow: bool, url: str) -> None:
    """Print what MODEL's server wrote last; without MODEL everything, trioswap's own lines too."""
    path = f"/logs/stream/{quote(model, safe='')}" if model else "/logs/stream"
    path += "" if follow else "?no-follow"
    out = sys.stdout.buffer
    # Ctrl-C is how one ends what goes on for ever.
    with contextlib.suppress(KeyboardInterrupt), _daemon(url) as client, client.stream("GET", path) as answer:
        for data in answer.iter_bytes():
            out.write(data)
            out.flush()


def _daemon(url: str) -> contextlib.AbstractContextManager[DaemonClient]:
    from trioswap.remote import daemon_client

    return daemon_client(url, os.environ.get("TRIOSWAP_API_KEY"))


def _answer(client: DaemonClient, path: str, key: str) -> dict[str, Any]:
    """The JSON object at *path*, which has a *key* if it is ours."""
    try:
        document: dict[str, Any] = client.get(path).json()
        document[key]
    except (ValueError, LookupError, TypeError):
        raise TrioswapError(f"what answers at {client.base_url} is not trioswap; choose with --url") from None
    return document


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
