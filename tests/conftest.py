"""Shared by all tests: helper modules beside them are importable by their plain name."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
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


@pytest.fixture(autouse=True)
def no_scheduler_broke(request: pytest.FixtureRequest) -> Iterator[None]:
    """A scheduler that breaks begins anew, so that nobody else would notice."""
    broke: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith("the scheduler broke"):
                broke.append(f"{record.getMessage()}: {record.exc_info}")

    logger, ear = logging.getLogger("trioswap.group"), Ear(logging.ERROR)
    logger.addHandler(ear)
    yield
    logger.removeHandler(ear)
    if request.node.get_closest_marker("breaks_scheduler") is None:
        assert not broke
