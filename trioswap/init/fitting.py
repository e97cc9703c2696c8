"""Whether a model fits into the memory there is, and with how much context."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

import attrs

from trioswap.footprints import RAM
from trioswap.gguf import estimate
from trioswap.init.models import Model

# Tokens.  With less, a chat forgets what was said a page ago.
_LEAST: Final = 2048


@attrs.frozen
class Room:
    """The most that one model can have."""

    device: str
    size: int
    """Bytes."""


@attrs.frozen
class Fit:
    """How a model is started, and what it then needs: both are guesses, rather too high."""

    context: int
    """Tokens it can be asked with."""
    need: int
    """Bytes."""
    whole: int
    """Bytes with all the context it was trained with."""
    fits: bool
    """False: not even with little context, which `context` and `need` then are about."""


def largest(sizes: Mapping[str, int]) -> Room | None:
    """The device for which a model is measured: the largest GPU, host memory where there is none.

    *sizes* are bytes of each device; None: there is none.
    """
    gpus = {device: size for device, size in sizes.items() if device != RAM}
    return max((Room(*item) for item in (gpus or sizes).items()), key=lambda room: room.size, default=None)


def fit(model: Model, room: Room | None, *, most: int | None = None, beside: int = 0) -> Fit:
    """The largest context with which *model* fits into *room* (None: nothing is known, so it fits).

    The whole one, or *most* tokens if that is less, else powers of two below.  *beside* are bytes
    that it needs besides, for a projector.
    """
    whole = _need(model, model.context, beside)
    for context in _contexts(min(model.context, most or model.context)):
        need = _need(model, context, beside)
        if room is None or need <= room.size:
            return Fit(context, need, whole, fits=True)
    return Fit(context, need, whole, fits=False)


def _contexts(most: int) -> Iterator[int]:
    """*most*, and then the powers of two up to it, the largest first."""
    yield most
    context = 1 << most.bit_length() >> 1
    while context >= _LEAST:
        yield context
        context //= 2


def _need(model: Model, context: int, beside: int) -> int:
    return estimate(model.header, model.size, context=context) + beside
