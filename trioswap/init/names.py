"""What models are called in a configuration: short, and the same the next time."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Final

from trioswap.init.models import Model, text

# A name is typed by people and travels in paths.
_LONGEST: Final = 64
_LONGEST_PART: Final = 16
# Converters take the name of the directory when nobody gives one: these, and commits of Hugging Face's cache.
_NO_NAMES: Final = re.compile(r"|models?|hub|snapshots?|gguf|hf|tmp|[0-9a-f]{32,64}")
_FALLBACK: Final = "model"


def names(models: Sequence[Model]) -> list[str]:
    """A name for each of *models*, all different.

    What a model calls itself; where several call themselves the same, all of these also say
    their size label, then their quantisation, then are called as their files are.  Those
    that are still the same are numbered in their order.
    """
    choices = [_choices(model) for model in models]
    steps = [0] * len(models)
    while True:
        chosen = [options[step] for options, step in zip(choices, steps, strict=True)]
        counts = Counter(chosen)
        more = [
            index for index, name in enumerate(chosen) if counts[name] > 1 and steps[index] + 1 < len(choices[index])
        ]
        if not more:
            return _numbered(chosen)
        for index in more:
            steps[index] += 1


def _choices(model: Model) -> list[str]:
    """Names for *model*, the shortest first."""
    stem = _slug(model.stem)
    told = [_slug(text(model.header, key)) for key in ("general.name", "general.basename")]
    name = next((name for name in [*told, stem] if not _NO_NAMES.fullmatch(name)), _FALLBACK)
    sized = _longer(name, model.size_label)
    options = [name, sized, _longer(sized, model.quantisation), stem or _FALLBACK]
    return list(dict.fromkeys(options))


def _longer(name: str, more: str) -> str:
    """*name* with *more*, unless that is in it already."""
    slug = _slug(more)[:_LONGEST_PART]
    return name if not slug or slug in name else f"{name[: _LONGEST - len(slug) - 1]}-{slug}"


def _slug(words: str) -> str:
    """*words* in small letters, joined by hyphens."""
    folded = unicodedata.normalize("NFKC", words.casefold())
    return re.sub(r"[^\w.]+", "-", folded)[:_LONGEST].strip("-._")


def _numbered(chosen: Sequence[str]) -> list[str]:
    taken, result = set(chosen), list[str]()
    seen = set[str]()
    for name in chosen:
        unique, number = name, 2
        while unique in seen or (unique != name and unique in taken):
            unique, number = f"{name}-{number}", number + 1
        seen.add(unique)
        result.append(unique)
    return result
