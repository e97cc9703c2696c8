"""Who may ask: the keys that clients show (surface reference 4.1).

One credential is looked at: the password of `Authorization: Basic`, else the token of
`Authorization: Bearer`, else `x-api-key`.  So a wrong one is not made good by a right one
further down.
"""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Iterable
from typing import Final

from trioswap.request import Headers

CREDENTIALS: Final = frozenset({b"authorization", b"x-api-key"})
"""Headers that are meant for us, and no business of model servers."""


def admits(keys: Iterable[str], headers: Headers) -> bool:
    """Whether *headers* show one of *keys*; how long that takes does not tell how much of it was right."""
    shown = credential(headers)
    if shown is None:
        return False
    right = [hmac.compare_digest(shown, key.encode()) for key in keys]  # all of them, whichever fits
    return any(right)


def credential(headers: Headers) -> bytes | None:
    """What the client shows, or None."""
    found = {name.lower(): value for name, value in reversed(headers)}
    scheme, _, rest = found.get(b"authorization", b"").strip().partition(b" ")
    if scheme.lower() == b"basic" and (password := _password(rest.strip())):
        return password
    if scheme.lower() == b"bearer" and rest.strip():
        return rest.strip()
    return found.get(b"x-api-key") or None


def _password(encoded: bytes) -> bytes | None:
    try:
        return base64.b64decode(encoded, validate=True).partition(b":")[2]
    except binascii.Error:
        return None


def without_credentials(headers: Headers) -> Headers:
    """*headers* as a model server may see them."""
    return [(name, value) for name, value in headers if name.lower() not in CREDENTIALS]
