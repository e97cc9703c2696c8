"""The tables about what trioswap does unasked, as they are written; see `raw` for the whole file."""

# ruff: noqa: RUF009 - `key` declares a field, as attrs.field does

from __future__ import annotations

import attrs

from trioswap.config.keys import key
from trioswap.config.kinds import Patience


@attrs.frozen
class RawStartup:
    """The table `[hooks.on_startup]`."""

    preload: list[str] | None = key("Models that are loaded as soon as trioswap runs, by name or alias.", default="[]")


@attrs.frozen
class RawIdle:
    """The table `[hooks.on_idle]`."""

    preload: list[str] | None = key(
        "Models that are loaded when others are not asked for any more, so that they come back to their place, by name"
        " or alias; the first ones have precedence, and any request before them. Who was stopped by hand, by its `ttl`"
        " or for other programs stays away until it is asked for; so does who was away when others were unloaded by"
        " hand.",
        default="[]",
    )
    after: Patience | None = key(
        "How long nobody must have asked for other models that can be in their way; not 0.",
        default='"5m"',
        unit="s",
    )


@attrs.frozen
class RawHooks:
    """The table `[hooks]`."""

    on_startup: RawStartup | None = key("What is done at the start.", yaml="on_startup")
    on_idle: RawIdle | None = key("What is done when a burst of requests is over.", yaml="on_idle")
