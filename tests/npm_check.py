"""The npm packages `openai` and `@anthropic-ai/sdk` against a real daemon, as a program: `nox -s npm`.

Installs them as npm/package-lock.json has them, into a temporary directory, runs npm/clients.mjs
there, and judges what it prints: every call must give the answer of the model that it asked for,
with nothing loaded and through a swap, once with heartbeats alone and once with loading text, and
what must fail must fail in the class that the packages have for it.  A relay sees to it that
heartbeats were in every stream.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from relay import HEARTBEATS, daemon_behind_relay, failing, well_formed

NPM = Path(__file__).with_name("npm")
FILES = ("package.json", "package-lock.json", "clients.mjs")
MODELS = ("tiny/alpha", "beta:q4")
KEY = "sk-of-the-house"
# Seconds for what takes half a minute.
PATIENCE = 600.0


def run(directory: Path, *, loading_text: bool) -> list[str]:
    """What is wrong with one run of all calls; says on one line what was done."""
    state = directory / ("text" if loading_text else "plain")
    state.mkdir()
    models = {**{name: well_formed(state) for name in MODELS}, "fails": failing(state)}
    with daemon_behind_relay(state, models, send_loading_state=loading_text, api_keys=[KEY]) as daemon:
        environment = {"TRIOSWAP_URL": daemon.url, "TRIOSWAP_API_KEY": KEY, "MODELS": json.dumps(MODELS)}
        done = subprocess.run(
            ["node", "clients.mjs"],
            cwd=directory,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            timeout=PATIENCE,
            check=False,
            text=True,
        )
        streams = [exchange for exchange in daemon.relay.taken() if exchange.streams]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    problems = [f"clients.mjs exited with {done.returncode}"] if done.returncode else []
    problems += [f"wrong: {line}" for line in lines if not is_right(line)]
    problems += [f"no heartbeats in {exchange.target}" for exchange in streams if exchange.heartbeats < HEARTBEATS]
    told = [exchange for exchange in streams if b'"reasoning_content":"' in exchange.response]
    if bool(told) != loading_text:
        problems.append(f"loading text in {len(told)} streams")
    if len(lines) < 2 * len(MODELS) or not streams:
        problems.append("nothing was done")
    sys.stdout.write(
        f"npm: {len(lines)} calls, {len(streams)} of them streams with "
        f"{sum(exchange.heartbeats for exchange in streams)} heartbeats"
        f"{f' and loading text in {len(told)}' if loading_text else ''}, {len(problems)} problems\n"
    )
    return problems


def is_right(line: dict[str, object]) -> bool:
    """Whether a call did what it should."""
    if "models" in line:
        return line["models"] == sorted([*MODELS, "fails"])
    return line["right"] is True if "right" in line else line.get("said") == line["model"]


def main() -> int:
    """Install, run, judge; the exit code."""
    missing = [program for program in ("node", "npm") if shutil.which(program) is None]
    if missing:
        sys.stdout.write(f"npm: SKIPPED, nothing was checked: {' and '.join(missing)} not found\n")
        return 0
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        for file in FILES:
            shutil.copy(NPM / file, directory)
        subprocess.run(
            ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=directory, timeout=PATIENCE, check=True
        )
        problems = run(directory, loading_text=False) + run(directory, loading_text=True)
    sys.stdout.writelines(f"{problem}\n" for problem in problems)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
