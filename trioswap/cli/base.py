"""What all commands share: the group they belong to, its errors and exit codes, and finding the configuration."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from trioswap import __version__
from trioswap.errors import ConfigError, Misuse, TrioswapError

if TYPE_CHECKING:
    from trioswap.config import Config

Command = TypeVar("Command", bound=Callable[..., Any])

CONFIG_PLACES: Final = ("trioswap.toml", "~/.config/trioswap/trioswap.toml", "/etc/trioswap/trioswap.toml")
"""Where a configuration is looked for when none is named; the first that exists is read."""
DAEMON_URL: Final = "http://127.0.0.1:8080"


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


_CONFIG_OPTIONS: Final = (
    click.option(
        "-c",
        "--config",
        "files",
        multiple=True,
        metavar="FILE",
        help=f"TOML, or llama-swap's YAML; may be repeated.  Default: the first of {', '.join(CONFIG_PLACES)}.",
    ),
    click.option("--config-dir", "directory", metavar="DIR", help="All *.toml, *.yaml and *.yml in it, too."),
    click.option("--lenient", is_flag=True, help="Unknown keys in YAML files are warnings, not mistakes."),
)


def config_options(command: Command) -> Command:
    """The options that say where the configuration is."""
    for option in reversed(_CONFIG_OPTIONS):
        command = option(command)
    return command


log_level_option = click.option("--log-level", metavar="LEVEL", help="debug, info, warning or error.")
url_option = click.option(
    "--url",
    envvar="TRIOSWAP_URL",
    default=DAEMON_URL,
    show_default=True,
    show_envvar=True,
    help="Where the daemon is, or unix:/PATH.  TRIOSWAP_CA_FILE names the certificates to trust besides the system's.",
)


def _complain(line: str) -> None:
    click.echo(f"trioswap: {line}", err=True)


def read_config(
    files: Sequence[str],
    directory: str | None = None,
    *,
    lenient: bool = False,
    keep: Config | None = None,
    say: Callable[[str], None] = _complain,
) -> Config:
    """The configuration in *files* and in *directory*; without either in the first of `CONFIG_PLACES` that exists.

    Tells *say* (standard error) what is known and not acted on yet, and, when *lenient*, what is
    not known.  In the place of *keep*, models keep the ports they have there.

    Raises:
        Misuse: there is none.
        ConfigError: it has mistakes.
    """
    from trioswap.config.llamaswap import translate
    from trioswap.config.loading import load_sources
    from trioswap.config.mistakes import Mistakes

    unknown = Mistakes() if lenient else None
    reader = partial(translate, unknown=unknown)
    sources = config_files(files, directory)
    config = load_sources(sources, Path(directory) if directory else None, os.environ, reader, keep)
    for line in unknown.lines() if unknown is not None else ():
        say(f"warning: {line}")
    if later := config.not_acted_on():
        say(f"this version does not act on {', '.join(later)} yet")
    return config


def config_files(files: Sequence[str], directory: str | None) -> list[Path]:
    """The *files*; where nothing is named, *directory* neither, the first of `CONFIG_PLACES` that exists.

    Raises:
        Misuse: there is none.
    """
    return [Path(file) for file in files] or ([] if directory else [_config_place()])


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


def count(number: int, noun: str) -> str:
    """As people say it: "1 model", "2 models"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
