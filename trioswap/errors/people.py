"""Mistakes of the user at the command line, and what the world has done to it there."""

from __future__ import annotations

from pathlib import Path

from trioswap.errors.base import TrioswapError


class ConfigError(TrioswapError):
    """The configuration has mistakes; `mistakes` holds one line for each."""

    def __init__(self, source: str, mistakes: list[str]) -> None:
        self.source, self.mistakes = source, mistakes
        count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        super().__init__("\n".join([f"{source}: {count}", *(f"  {line}" for line in mistakes)]))


class Misuse(TrioswapError):
    """A mistake of the user that is not inside a configuration file."""


class LlamaExtraMissing(Misuse):
    """The packages of the extra `llama` are not installed."""

    def __init__(self) -> None:
        super().__init__("the embedded engine is not installed; run: pip install 'trioswap[llama]'")


class BadCertificate(Misuse):
    """A certificate or its key cannot be used; `path` is the file to look at."""

    def __init__(self, path: Path, what: str, advice: str) -> None:
        self.path = path
        super().__init__(f"cannot serve TLS with {path}: {what}; {advice}")


# ---- the world's ------------------------------------------------------------------------


class CannotWrite(TrioswapError):
    """A file cannot be written."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"cannot write {path}: {why}")


class InitFailed(TrioswapError):
    """There is no model to write a configuration for, or the file cannot be written."""


class CannotListen(TrioswapError):
    """The listen address is not to be had."""

    def __init__(self, listen: str, why: str) -> None:
        super().__init__(
            f"cannot listen on {listen}: {why}; stop what uses it, "
            "or choose another with --listen HOST:PORT or --listen unix:/PATH"
        )


class DaemonUnreachable(TrioswapError):
    """No daemon answers at the address, or the connection broke."""

    def __init__(self, url: str, why: str) -> None:
        super().__init__(
            f"no answer from trioswap at {url}: {why}; is it running?  "
            f"Choose another address with --url or TRIOSWAP_URL"
        )


class DaemonRefused(TrioswapError):
    """The daemon answered with an error; the message is its own."""
