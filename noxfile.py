"""Every check there is: `nox` runs the first four, `nox -s demo` or `nox -s bench` one of the others.

All share one virtual environment, .nox/shared, because installing takes longer than checking.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nox

nox.options.sessions = ["lint", "types", "tests", "races"]

SHARED = Path(".nox/shared")
STAMP = SHARED / "installed-for"
# Their verdicts change between minor versions.
TOOLS = ("ruff~=0.17.6", "mypy~=2.4.1", "nox")
SETTINGS = ("pyproject.toml", "noxfile.py")


def run(session: nox.Session, program: str, *arguments: str) -> None:
    """Run *program* of the shared environment, which is made anew when what is to be installed has changed."""
    wanted = "\n".join(Path(name).read_text() for name in SETTINGS)
    if not STAMP.exists() or STAMP.read_text() != wanted:
        session.run(sys.executable, "-m", "venv", "--clear", str(SHARED), external=True)
        install = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        session.run(str(SHARED / "bin/python"), *install, "-e", ".[llama,test]", *TOOLS, external=True)
        STAMP.write_text(wanted)
    session.run(str(SHARED / "bin" / program), *arguments, external=True)


@nox.session(venv_backend="none")
def lint(session: nox.Session) -> None:
    """Style and formatting."""
    run(session, "ruff", "check", ".")
    run(session, "ruff", "format", "--check", ".")


@nox.session(venv_backend="none")
def types(session: nox.Session) -> None:
    """Types, strictly."""
    run(session, "mypy")


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """Everything but the races; arguments after `--` go to pytest."""
    run(session, "pytest", "-m", "not races", *session.posargs)


@nox.session(venv_backend="none")
def races(session: nox.Session) -> None:
    """The whole shell under seeded schedules; arguments after `--` go to pytest."""
    run(session, "pytest", "-m", "races", *session.posargs)


@nox.session(venv_backend="none")
def demo(session: nox.Session) -> None:
    """Two hundred requests of eight clients against `trioswap demo`."""
    run(session, "python", "tests/demo_check.py")


@nox.session(venv_backend="none")
def bench(session: nox.Session) -> None:
    """What trioswap adds to the start of a model server and to a swap."""
    run(session, "python", "benchmarks/swap_latency.py")
