"""What `trioswap demo` serves and says: two tiny models, the configuration that names them, lines to try.

To run it is the command line's business, by the very same path as `trioswap serve`.
"""

from __future__ import annotations

import secrets
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import tomli_w

from trioswap.tinymodels import write_tiny_models

# Ports for the models: below those that Linux gives to outgoing connections (32768 and up), and drawn by
# lot, so that two demos do not meet.
_PORTS: Final = range(20_000, 32_000)


def engine_is_installed() -> bool:
    """Whether the packages of the extra `llama` are there."""
    return all(find_spec(name) is not None for name in ("gguf", "xllamacpp"))


@contextmanager
def config_file() -> Iterator[Path]:
    """The configuration of the demo, in a directory with its models that goes with the block."""
    with tempfile.TemporaryDirectory(prefix="trioswap-demo-") as name:
        directory = Path(name)
        models = write_tiny_models(directory)
        path = directory / "trioswap.toml"
        path.write_text(tomli_w.dumps(_config(models)), encoding="utf-8")
        yield path


def _config(models: dict[str, Path]) -> dict[str, object]:
    # One thread: such small models are slower with more.
    tables = {name: {"gguf": path.name, "args": ["--threads", "1"]} for name, path in models.items()}
    # An empty table: all models are in the default group, so one is resident at a time and there is a swap to see.
    return {"start_port": _free_ports(len(models)), "state_dir": "state", "groups": {}, "models": tables}


def _free_ports(count: int) -> int:
    """The first of *count* neighbouring ports on which nobody listens."""
    while True:
        first = _PORTS.start + secrets.randbelow(len(_PORTS) - count)
        if all(map(_is_free, range(first, first + count))):
            return first


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def instructions(url: str) -> str:
    """What a newcomer can try against the demo at *url*."""
    return f"""
Two tiny models, one resident at a time.  Each knows only its own words, so an answer shows
who gave it.  Try, in another terminal:

  {_curl(url, '"model": "colors"')}
  {_curl(url, '"model": "animals"')}
  {_curl(url, '"model": "colors", "stream": true')}

Look and steer:    trioswap ps --url {url}    (also: load, unload, logs)
openai package:    OpenAI(base_url="{url}/v1", api_key="none")

Ctrl-C stops it and leaves nothing behind.
"""


def _curl(url: str, fields: str) -> str:
    body = f'{{{fields}, "messages": [{{"role": "user", "content": "hi"}}]}}'
    return f"curl -N {url}/v1/chat/completions -d '{body}'"
