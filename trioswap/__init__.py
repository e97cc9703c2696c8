"""trioswap: swaps local model servers in and out behind one endpoint."""

__version__ = "0.1.0"
