"""The commands that need no daemon: about configurations and keys, and the scheduler in virtual time."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import click

from trioswap.cli.base import main, read_config
from trioswap.errors import CannotWrite, Misuse

# Characters; headers of 64 KiB are refused anyway, and the standard input may be endless.
_LONGEST_KEY: Final = 4096
# More bytes than such a key and its line break can have in UTF-8.
_MOST_READ: Final = 4 * _LONGEST_KEY + 3


@main.command()
@click.argument("directories", nargs=-1, metavar="[DIR]...")
@click.option("-o", "--output", metavar="FILE", default="trioswap.toml", show_default=True, help='"-" prints it.')
@click.option("--force", is_flag=True, help="Replace an existing file.")
def init(directories: Sequence[str], output: str, force: bool) -> None:
    """Find GGUF files and write a configuration for them, which is yours from then on.

    Without DIR: the caches of llama.cpp and Hugging Face, ~/models and the current directory.
    """
    from trioswap import init as first

    outcome = first.init(directories, output, force=force)
    if output == first.STDOUT:
        click.echo(outcome.document, nl=False)
    click.echo(outcome.summary, err=output == first.STDOUT)


@main.command()
@click.argument("file", metavar="IN")
@click.option("-o", "--output", metavar="OUT", help="A file that is not there yet.  Default: standard output.")
def convert(file: str, output: str | None) -> None:
    """llama-swap's YAML to native TOML, or back; comments are kept where they have a place."""
    from trioswap import convert as conversion

    source = Path(file)
    language = conversion.YAML if source.suffix == ".toml" else conversion.TOML
    converted = conversion.convert(source, language, os.environ)
    if output is None:
        click.echo(converted.text, nl=False)
    else:
        _write_new(Path(output), converted.text, language)
        if Path(output).resolve().parent != source.resolve().parent:
            click.echo("trioswap: relative paths in it are relative to the new file's directory now", err=True)
    for note in converted.notes:
        click.echo(f"trioswap: {note}", err=True)


def _write_new(target: Path, text: str, language: str) -> None:
    from trioswap.convert import LANGUAGES

    if LANGUAGES.get(target.suffix) != language:
        raise Misuse(f"-o: found {str(target)!r}, allowed is the name of a {language.upper()} file")
    try:
        with target.open("x", encoding="utf-8") as out:
            out.write(text)
    except FileExistsError:
        raise Misuse(f"-o: {target} is there already") from None
    except OSError as exc:
        raise CannotWrite(str(target), exc.strerror or str(exc)) from exc


@main.command()
@click.option("--yaml", "spelling", flag_value="yaml", help="For llama-swap's YAML files.")
@click.option("--toml", "spelling", flag_value="toml", default=True, help="For native files; the default.")
def schema(spelling: str) -> None:
    """Print the JSON schema of configuration files, for editors."""
    import json

    from trioswap.config.jsonschema import schema as made

    click.echo(json.dumps(made("yaml" if spelling == "yaml" else "toml"), indent=2))


@main.group()
def key() -> None:
    """Make keys for clients; the configuration holds only their hashes."""


@key.command()
@click.argument("name", default="client", metavar="[NAME]")
def new(name: str) -> None:
    """Print a fresh key for the client NAME, and the lines of TOML that let it in.

    The key is shown this once and kept nowhere.
    """
    import tomli_w

    from trioswap.config.mistakes import found

    # What the reader of the configuration asks of names.
    if not name or not name.isprintable() or name != name.strip():
        raise Misuse(f"NAME: {found(name, 'a name of printable characters without spaces around it')}")
    made = new_key()
    click.echo(made)
    click.echo()
    click.echo(tomli_w.dumps({"keys": {name: {"hash": _hash(made)}}}), nl=False)


@key.command("hash")
def hash_of_key() -> None:
    """Read a key from the standard input, and print the hash of it for `[keys.NAME]`."""
    if sys.stdin.isatty():
        written = click.prompt("Key", hide_input=True, err=True)
    else:
        # What is no UTF-8 becomes surrogates, which nobody prints.
        data = sys.stdin.buffer.read(_MOST_READ)
        written = data.decode("utf-8", "surrogateescape").removesuffix("\n").removesuffix("\r")
    if not 0 < len(written) <= _LONGEST_KEY or any(char.isspace() or not char.isprintable() for char in written):
        raise Misuse(  # without what was found: that may be a key
            "found something else on the standard input, allowed is one key, without spaces or control characters"
        )
    click.echo(_hash(written))


def new_key() -> str:
    """A fresh key: 32 random bytes, so nobody finds it by trying, in letters that need no quotes anywhere."""
    import secrets

    return f"ts-{secrets.token_urlsafe(32)}"


def _hash(written: str) -> str:
    from trioswap.access import digest_of

    return f"sha256:{digest_of(written).hex()}"


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
