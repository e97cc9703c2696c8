"""Filters and timeouts, of models and of peers, from what is written to what is meant."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final

from trioswap.config.mistakes import Mistakes, Path, found
from trioswap.config.parts import FilterConfig, TimeoutConfig
from trioswap.config.raw_model import RawFilters, RawTimeouts

# The name of the model leads a request to its server, so no filter may touch it (core reference 1.9).
_PROTECTED: Final = "model"
# llama-swap's paths have wildcards and pipes in its library, but using them was always an
# error there; a backslash takes their meaning away.
_FIELD: Final = re.compile(r"(?:[^*?|#\\]|\\.)+", re.DOTALL)
_DEFAULTS: Final = TimeoutConfig()


def read_filters(raw: RawFilters | None, path: Path, mistakes: Mistakes) -> FilterConfig:
    """The filters meant by *raw*, which stands at *path*.

    Blanks, repetitions and the protected `model` are dropped, as llama-swap does it.
    """
    raw = raw or RawFilters()
    stripped: dict[str, None] = {}
    for index, written in enumerate(raw.strip_params or ()):
        if (field := written.strip()) and field != _PROTECTED:
            _check_field((*path, "strip_params", index), field, mistakes)
            stripped[field] = None
    by_id = raw.set_params_by_id or {}
    return FilterConfig(
        strip_params=tuple(sorted(stripped)),
        set_params=_set(raw.set_params or {}, (*path, "set_params"), mistakes),
        set_params_by_id={
            name: _set(params, (*path, "set_params_by_id", name), mistakes) for name, params in by_id.items()
        },
    )


def _set(params: Mapping[str, object], path: Path, mistakes: Mistakes) -> dict[str, object]:
    for field in params:
        _check_field((*path, field), field, mistakes)
    return {field: params[field] for field in sorted(params) if field != _PROTECTED}


def _check_field(path: Path, field: str, mistakes: Mistakes) -> None:
    if not _FIELD.fullmatch(field):
        mistakes.add(path, found(field, 'the name of a field, such as "seed" or "options.seed", without * ? # |'))


def read_timeouts(raw: RawTimeouts | None, *, response_header: float | None = None) -> TimeoutConfig:
    """The timeouts meant by *raw*; *response_header* is the default of the one that models and peers differ in."""
    raw = raw or RawTimeouts()
    return TimeoutConfig(
        connect=_limit(raw.connect, _DEFAULTS.connect),
        keepalive=_limit(raw.keepalive, _DEFAULTS.keepalive),
        response_header=_limit(raw.response_header, response_header),
        tls_handshake=_limit(raw.tls_handshake, _DEFAULTS.tls_handshake),
        expect_continue=_limit(raw.expect_continue, _DEFAULTS.expect_continue),
        idle_conn=_limit(raw.idle_conn, _DEFAULTS.idle_conn),
    )


def _limit(written: float | None, default: float | None) -> float | None:
    return default if written is None else written or None  # 0 says no limit


def auto_aliases(filters: FilterConfig, taken: Iterable[str]) -> list[str]:
    """Names that the filters of a model speak of, so that they must be names of it; without those *taken*."""
    known = set(taken)
    return [name for name in filters.set_params_by_id if name not in known]
