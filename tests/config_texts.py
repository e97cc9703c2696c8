"""Configurations as texts, for tests of what they come to and of the words for what is wrong with them."""

from __future__ import annotations

import pytest

from trioswap.config import loads
from trioswap.errors import ConfigError


def mistakes(text: str) -> list[str]:
    """What is wrong with the file *text*, one line for each mistake."""
    with pytest.raises(ConfigError) as caught:
        loads(text)
    return caught.value.mistakes


def model(settings: str = "", name: str = "a") -> str:
    """The table of a model with these *settings*."""
    return f"\n[models.{name}]\ncmd = 'x ${{PORT}}'\n{settings}\n"
