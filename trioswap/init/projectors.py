"""Which projector ("mmproj") belongs to which model; nothing in the files says so outright."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from trioswap.init.models import Kind, Model, Projector, quantisation, text

# Every backend computes with F16; with others some are slow, and F32 is only larger.
_PREFERRED: Final = ("F16", "BF16", "Q8_0")
# Words in names of files that say nothing of the model.
_NOISE: Final = re.compile(r"mmproj|gguf|model|(?:ud[-_])?i?q[1-9]_[a-z0-9_]+|b?f16|f32|mxfp4", re.IGNORECASE)


def pair(models: Sequence[Model], projectors: Iterable[Projector]) -> dict[Path, Projector]:
    """Path of a model -> the projector it is served with, for models that have one.

    A projector belongs to models in its directory and the ones directly below, where split
    models often are.  Among those it is told by its name in the header, else by the name of its file,
    of which the beginning of the model's is to be found in it; one that says nothing belongs to
    them if they are all the same model.
    """
    best = dict[Path, Projector]()
    for projector in sorted(projectors, key=_preference):
        for model in _owners(projector, [model for model in models if _is_near(projector, model)]):
            best.setdefault(model.path, projector)
    return best


def _preference(projector: Projector) -> tuple[int, str]:
    type_ = quantisation(projector.path, projector.header)
    return (_PREFERRED.index(type_) if type_ in _PREFERRED else len(_PREFERRED), str(projector.path))


def _is_near(projector: Projector, model: Model) -> bool:
    home = projector.path.parent
    return model.kind is Kind.CHAT and home in (model.path.parent, model.path.parent.parent)


def _owners(projector: Projector, near: Sequence[Model]) -> list[Model]:
    """Those of *near* that the projector belongs to."""
    called = {_plain(text(projector.header, key)) for key in ("general.name", "general.basename")} - {""}
    if named := [model for model in near if _plain(text(model.header, "general.name")) in called]:
        return named
    stem = _plain(_NOISE.sub("", projector.path.stem))
    if stem:
        return [model for model in near if _plain(model.stem).startswith(stem)]
    return list(near) if len({_plain(model.title) for model in near}) == 1 else []


def _plain(name: str) -> str:
    """*name* without what different tools spell differently."""
    return "".join(filter(str.isalnum, name)).casefold()
