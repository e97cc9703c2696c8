"""The project's checks.  `nox` alone runs what must pass: lint, types, tests, races."""

from __future__ import annotations

import nox

nox.needs_version = ">=2024.4.15"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "types", "tests", "races"]

RUFF = "ruff~=0.17.6"
MYPY = "mypy~=2.4"


@nox.session
def lint(session: nox.Session) -> None:
    """Style and the mistakes that can be seen without running: ruff, its ASYNC rules among them."""
    session.install(RUFF)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """mypy, strict."""
    session.install("-e", ".", MYPY, "nox", "numpy", "types-PyYAML")  # numpy: for its types, in tinymodels and traces
    session.run("mypy")


@nox.session
def tests(session: nox.Session) -> None:
    """Everything but races and large walks: real children, real sockets, the real engine, real clients."""
    session.install("-e", ".[llama,nvidia,simulate,test]")
    long = ("fuzz", "kills", "large", "races", "reloads", "schema", "walks")
    chosen = " and ".join(f"not {marker}" for marker in long)
    session.run("pytest", "-n", "auto", "--maxprocesses", "8", "--dist", "worksteal", "-m", chosen, *session.posargs)


@nox.session
def races(session: nox.Session) -> None:
    """The shell under seeded schedules on a mock clock; options: -- --race-seed N --race-count N."""
    session.install("-e", ".[test]")
    session.run("pytest", "-m", "races", *session.posargs)


@nox.session
def walks(session: nox.Session) -> None:
    """Every reachable state of larger worlds around the scheduler; some minutes."""
    session.install("-e", ".[simulate,test]")
    session.run("pytest", "-n", "auto", "--maxprocesses", "8", "-m", "walks", *session.posargs)


@nox.session
def fuzz(session: nox.Session) -> None:
    """Mangled configuration files through both readers, bounded; options: -- --fuzz-seed N --fuzz-count N."""
    session.install("-e", ".[test]")
    session.run("pytest", "-m", "fuzz", *session.posargs)


@nox.session
def schema(session: nox.Session) -> None:
    """Requests that break a promise of the OpenAPI document, about a minute; options: -- --hypothesis-seed=N."""
    session.install("-e", ".[test]")
    session.run("pytest", "-m", "schema", "-s", *session.posargs)


@nox.session
def large(session: nox.Session) -> None:
    """Bodies of 1 GiB in both directions, and what they cost in memory."""
    session.install("-e", ".[test]")
    session.run("pytest", "-m", "large", "-s", *session.posargs)


@nox.session
def kills(session: nox.Session) -> None:
    """The daemon killed 50 times each while it loads, streams and stops: what is left of its children, how long."""
    session.install("-e", ".[test]")
    session.run("pytest", "-m", "kills", "-s", *session.posargs)


@nox.session
def reloads(session: nox.Session) -> None:
    """200 reloads under 16 streams of unchanged models: no stream may break, no process may change."""
    session.install("-e", ".[test]")
    session.run("pytest", "-m", "reloads", "-s", *session.posargs)


@nox.session
def chaos(session: nox.Session) -> None:
    """A real daemon and real servers while everything goes wrong, watched from outside; -- --minutes N --seed N."""
    session.install("-e", ".[test]")
    session.run("python", "tests/chaos.py", *session.posargs)


@nox.session
def simulate(session: nox.Session) -> None:
    """The whole control plane on a mock clock, with faults, from seeds; -- --seed N --hours H, or -- --mutants."""
    session.install("-e", ".[test]")
    session.run("python", "tests/simulate.py", *session.posargs)


@nox.session
def npm(session: nox.Session) -> None:
    """The npm packages of OpenAI and Anthropic against a daemon, through loads and swaps; needs Node."""
    session.install("-e", ".[test]")
    session.run("python", "tests/npm_check.py", *session.posargs)


@nox.session
def demo(session: nox.Session) -> None:
    """`trioswap demo` under 200 interleaved streams of 8 clients, watched from outside."""
    session.install("-e", ".[llama,test]")
    session.run("python", "tests/demo_check.py", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """What trioswap adds to a start, a swap and a request, its policy against llama-swap's, what a decision costs."""
    session.install("-e", ".[simulate]")
    session.run("python", "benchmarks/swap_latency.py")
    session.run("python", "benchmarks/http_cost.py")
    session.run("python", "benchmarks/policies.py")
    session.run("python", "benchmarks/scheduler_cost.py")
    session.run("python", "benchmarks/config_load.py")
