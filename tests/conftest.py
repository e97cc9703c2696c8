"""Shared by all tests: helper modules beside them are importable by their plain name."""

from __future__ import annotations

import sys
from pathlib import Path

from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))

# No verdict depends on how fast the machine is.
settings.register_profile("trioswap", deadline=None)
settings.load_profile("trioswap")


def pytest_addoption(parser) -> None:
    """Options of the seeded searches, so that any failure replays."""
    parser.addoption("--race-seed", type=int, default=0, help="first seed of the seeded schedules")
    parser.addoption("--race-count", type=int, default=2000, help="how many seeded schedules to run")
    parser.addoption("--fuzz-seed", type=int, default=0, help="first number of the mangled files")
    parser.addoption("--fuzz-count", type=int, default=1000, help="how many mangled files to read")
