"""Shared by all tests: helper modules beside them are importable by their plain name."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
