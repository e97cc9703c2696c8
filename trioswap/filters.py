"""What the configuration changes in the JSON of requests, in which order (surface reference 1.5).

How JSON text is changed is the business of `jsontext`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from trioswap.config.parts import FilterConfig
from trioswap.jsontext import Change, Set, Strip, edit, parts_of

# It leads a request to its server, so no filter may touch it (core reference 1.9).
_PROTECTED: Final = "model"


def apply(body: bytes, filters: FilterConfig, *, asked: str, rename: str | None) -> bytes:
    """*body* with `model` renamed to *rename* (None: as it is), then stripped, then set by *filters*.

    *asked* is the name that the client wrote, after profile and selector; it may have settings of its own, which
    come last.  The very same object comes back when nothing is to be changed.

    Raises:
        BadRequest: *body* is not a JSON object, or has an array where a field is to be set.
    """
    renamed = [] if rename is None else [Set(_PROTECTED, rename)]
    return edit(body, [*renamed, *_filtered(filters, asked)])


def _filtered(filters: FilterConfig, asked: str) -> Iterator[Change]:
    by_name = filters.set_params_by_id.get(asked, {})
    changes: list[Change] = [
        *(Strip(path) for path in filters.strip_params),
        *(Set(path, value) for path, value in filters.set_params.items()),
        *(Set(path, value) for path, value in by_name.items()),
    ]
    # The configuration drops the plain spelling; `:model`, `\model` and `model.x` mean it too.
    return (change for change in changes if parts_of(change.path)[0].name != _PROTECTED)
