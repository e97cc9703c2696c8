"""What the README, the unit and the changelog promise is what there is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from trioswap import daemon
from trioswap.config import load
from trioswap.selfcheck import limits_of

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
UNIT = ROOT / "configs" / "trioswap.service"


def blocks(language: str) -> list[str]:
    """The fenced blocks of the README in *language*."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_ci_runs_the_test_command():
    """The second command of the README is what CI runs, to the letter, and nothing else."""
    [command] = blocks("sh")[1].splitlines()
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    commands = [line for line in script if line and not line.startswith("#")]

    assert command.endswith("nox")
    assert commands == ["set -euo pipefail", 'cd "$(dirname "$0")/.."', command]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_the_first_command_is_the_demo():
    """The first command of the README is one line that ends in the demo."""
    [command] = blocks("sh")[0].splitlines()

    assert command.endswith(".venv/bin/trioswap demo")


def test_the_configuration_is_the_file():
    """The configuration in the README is the shipped one, of five lines, and valid."""
    [text] = blocks("toml")

    assert text == (ROOT / "configs" / "minimal.toml").read_text()
    assert text.count("\n") == 5
    assert list(load(ROOT / "configs" / "minimal.toml").models) == ["qwen"]


def test_every_dependency_has_its_reason():
    """The table of dependencies names what pyproject.toml does, each in its extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {(name_of(line), "") for line in project["dependencies"]}
    for extra, lines in project["optional-dependencies"].items():
        wanted |= {(name_of(line), extra) for line in lines}
    rows = re.findall(r"^\| ([a-z0-9., -]+?)(?: \(extra `(\w+)`\))? \| [^|]{10,} \|$", README, re.MULTILINE)

    assert {(name, extra) for names, extra in rows for name in names.split(", ") if name != "package"} == wanted


def name_of(requirement: str) -> str:
    return re.match(r"[a-z0-9.-]+", requirement)[0]


@pytest.mark.parametrize("name", ["README.md", "CHANGELOG.md", "docs/differences.md"])
def test_links_lead_somewhere(name):
    """Every relative link names a file that is there."""
    page = ROOT / name
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()) if "://" not in link]

    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_unit_waits_long_enough():
    """systemd's patience is longer than the longest clean stop with default settings."""
    [model] = load(ROOT / "configs" / "minimal.toml").models.values()
    stop = limits_of(model).stop + daemon.REST

    assert int(re.search(r"^TimeoutStopSec=(\d+)$", UNIT.read_text(), re.MULTILINE)[1]) > stop


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_the_unit_is_valid(tmp_path):
    """systemd finds nothing to complain about in the unit."""
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/trioswap/bin/trioswap", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)

    # It also speaks of the machine's own units.
    assert [line for line in done.stderr.splitlines() if UNIT.stem in line] == []
