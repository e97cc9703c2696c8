"""The tables about who may ask, as they are written: keys of clients, TLS, web pages of others.

`None` means "not written"; what that comes to is decided in `access`.
"""

# ruff: noqa: RUF009 - `key` declares a field, as attrs.field does

from __future__ import annotations

from typing import Final

import attrs

from trioswap.config.keys import key
from trioswap.config.kinds import Count, Factor, Secret

_RELATIVE: Final = "Relative to the directory of the configuration; `~` is your home."


@attrs.frozen
class RawKey:
    """A table `[keys.NAME]`."""

    key_: Secret | None = key("What the client shows. Either this or `hash` is needed.")
    hash: Secret | None = key(
        "Instead of the key: `sha256:` and the 64 hexadecimal digits of its SHA-256, so that the key itself is in no"
        " file. `trioswap key new` makes both."
    )
    models: list[str] | None = key(
        "The names that may be asked for, of models, aliases, selectors, pins and peers' models. `*` is any text; an"
        " empty array: none.",
        default="all",
    )
    endpoints: list[str] | None = key(
        "The paths that may be asked, such as `/v1/chat/completions` or `/v1/audio/*`. `*` is any text; an empty array:"
        " none.",
        default="all that the rest allows",
    )
    peers: bool | None = key("Whether models of peers may be asked for.", default="true")
    admin: bool | None = key(
        "Whether models may be loaded and unloaded, and logs, events and the requests of others seen.", default="false"
    )
    read_only: bool | None = key("Whether it can only see what is listed, and ask no model.", default="false")
    weight: Factor | None = key(
        "How fast the waiting of its requests counts, above 0: with 2, a second counts as two.",
        default="that of the model",
    )
    concurrency: Count | None = key(
        "Its requests that are let in at the same time, waiting ones included; the next are answered with 429.",
        default="no limit",
    )


@attrs.frozen
class RawTls:
    """The table `[tls]`."""

    cert_file: str | None = key(
        f"The PEM file of the certificate and of what leads from it up. {_RELATIVE}", required=True
    )
    key_file: str | None = key(f"The PEM file of the private key. {_RELATIVE}", required=True)


@attrs.frozen
class RawCors:
    """The table `[cors]`."""

    origins: list[str] | None = key(
        'The origins of the pages that may ask: `SCHEME://HOST[:PORT]`, such as `"https://chat.example"` or'
        ' `"app://obsidian.md"`, or `"*"` alone for all; an empty array: none.',
        default="all where keys are asked for, else those of this host",
    )
    private_network: bool | None = key(
        "Whether pages from the internet may ask trioswap at an address of a private network.", default="false"
    )
