"""The configuration: files in, one frozen Config out.

`schema` says what there is, `toml` reads it; everyone else needs only these names.
"""

from trioswap.config.matrix import MatrixConfig
from trioswap.config.schema import Config, GroupConfig, MemoryConfig, ModelConfig
from trioswap.config.toml import load, loads

__all__ = ["Config", "GroupConfig", "MatrixConfig", "MemoryConfig", "ModelConfig", "load", "loads"]
