"""What several checks share: names, choices, and where an alias is written."""

from __future__ import annotations

from collections.abc import Iterable

from trioswap.config.mistakes import Mistakes, Path, did_you_mean, found
from trioswap.config.schema import ModelConfig


def check_choice(path: Path, value: str, allowed: Iterable[str], mistakes: Mistakes) -> None:
    """The *value* at *path* must be one of those *allowed*; the empty text is not offered."""
    if value not in allowed:
        offered = [choice for choice in allowed if choice]
        mistakes.add(path, found(value, f"one of {', '.join(offered)}") + did_you_mean(value, offered))


def check_name(path: Path, name: str, mistakes: Mistakes) -> None:
    """The *name* that stands at *path* travels in JSON, paths and log lines."""
    if not name or not name.isprintable() or name != name.strip():
        mistakes.add(path, found(name, "a name of printable characters without spaces around it"))


def alias_path(model: ModelConfig, index: int) -> Path:
    """Where the alias *index* of *model* is written; its filters make aliases, too."""
    alias = model.aliases[index]
    if alias in model.filters.set_params_by_id:
        return ("models", model.name, "filters", "set_params_by_id", alias)
    return ("models", model.name, "aliases", index)
