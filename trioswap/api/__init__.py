"""Operator endpoints, one module per family; `Services` is what they and the model routes work with."""

from __future__ import annotations

from typing import Final

import attrs

from trioswap.config import Config
from trioswap.errors import UnknownModel
from trioswap.fleet import Fleet
from trioswap.logs import Logs

# Characters of a name that are looked at and repeated.  A client may send megabytes of them, and to look for
# similar names takes a second for each.
NAME_LIMIT: Final = 200


@attrs.frozen
class Services:
    """Everything a handler may use."""

    config: Config
    fleet: Fleet
    logs: Logs
    started: int
    """Unix seconds: when this daemon began, the `created` of every model."""

    def model(self, requested: str) -> str:
        """The configured name that *requested* stands for.

        Raises:
            UnknownModel: it is neither a model nor an alias.
        """
        name = self.config.resolve(requested)
        if name is None:
            raise self.unknown(requested)
        return name

    def unknown(self, requested: str) -> UnknownModel:
        """The error that says so, and what may have been meant."""
        if len(requested) > NAME_LIMIT:
            return UnknownModel(requested[:NAME_LIMIT] + "...")
        return UnknownModel(requested, self.config.similar(requested))
