"""Operator endpoints, one module per family; `Services` is what they and the model routes work with."""

from __future__ import annotations

import attrs

from trioswap.config import Config
from trioswap.errors import UnknownModel
from trioswap.fleet import Fleet
from trioswap.logs import Logs


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
            raise UnknownModel(requested, self.config.similar(requested))
        return name
