"""The commands that talk to a running daemon."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import click

from trioswap.cli.base import config_options, main, read_config, url_option
from trioswap.errors import Misuse, TrioswapError

if TYPE_CHECKING:
    from trioswap.remote import DaemonClient


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
@config_options
@click.option("--url", help="Ask the daemon there what would happen now.")
def plan(
    model: str, resident: str | None, files: Sequence[str], directory: str | None, lenient: bool, url: str | None
) -> None:
    """Tell what MODEL needs, whom a request for it would put out, and why.

    Without --url the configuration alone is asked.
    """
    from trioswap import telling

    if url is None:
        from trioswap import whatif

        found = whatif.plan(
            read_config(files, directory, lenient=lenient), model, resident.split(",") if resident else ()
        )
        click.echo(telling.plan(found, live=False))
        return
    if resident is not None or files or directory:
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
    with _daemon(url) as client, client.stream("GET", path) as answer:
        for data in answer.iter_bytes():
            out.write(data)
            out.flush()


def _daemon(url: str) -> AbstractContextManager[DaemonClient]:
    from trioswap.remote import daemon_client

    # Who only asks and prints is ended by Ctrl-C as `tail -f` is, by the kernel.  A handler of Python's is overlooked
    # when the signal comes just before the wait for the daemon's next word.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else a shell has us ignore it: we run with `&`
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    return daemon_client(url, os.environ.get("TRIOSWAP_API_KEY"))


def _answer(client: DaemonClient, path: str, key: str) -> dict[str, Any]:
    """The JSON object at *path*, which has a *key* if it is ours."""
    try:
        document: dict[str, Any] = client.get(path).json()
        document[key]
    except (ValueError, LookupError, TypeError):
        raise TrioswapError(f"what answers at {client.base_url} is not trioswap; choose with --url") from None
    return document
