"""Who may ask for what: the keys that clients show, and the rights of each (surface reference 4.1).

One credential is looked at: the password of `Authorization: Basic`, else the token of
`Authorization: Bearer`, else `x-api-key`, else `api-key`.  So a wrong one is not made good
by a right one further down.

Keys are told apart by their SHA-256, and what is shown is compared with every one of them:
how long that takes tells neither how much of a key was right nor which one it was.

Which route needs which scope is for `app`, what a name leads to for `names`, and how many
requests a key may have at the same time for `quotas`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from enum import Enum
from typing import Final, Self
from urllib.parse import unquote

import attrs

from trioswap.config import Config
from trioswap.config.parts import KeyConfig
from trioswap.config.patterns import fits
from trioswap.request import Headers

CREDENTIALS: Final = frozenset({b"authorization", b"proxy-authorization", b"x-api-key", b"api-key"})
"""Headers that are meant for us, and no business of model servers.  Cookies are theirs: web pages under `/upstream`."""


class Scope(Enum):
    """What a route is about."""

    OPEN = "open"
    """Anybody may ask."""
    USE = "use"
    """Models are asked."""
    READ = "read"
    """What may be seen: lists, what runs, the queue, the plan."""
    ADMIN = "admin"
    """Logs, events, others' requests; loading, unloading, holding, profiles."""


# ---- keys and what they may ------------------------------------------------------------


@attrs.frozen
class Key(KeyConfig):
    """A key of a client, and what is allowed to who shows it.

    `name` is for logs and messages: the key itself is not kept.
    """

    @classmethod
    def of(cls, config: KeyConfig) -> Self:
        """The key that *config* describes."""
        return cls(**attrs.asdict(config, recurse=False))

    def may(self, scope: Scope, path: str) -> bool:
        """Whether routes of *scope* may be asked at *path*, which is without a query.

        Patterns are about the path as it was sent, as the table of routes is: escapes in it
        stand for themselves.  Of `admin` and `read_only` the narrower one holds.
        """
        if scope is Scope.OPEN:
            return True
        if self.endpoints is not None and not self._is_endpoint(path):
            return False
        if scope is Scope.READ:
            return True
        return not self.read_only and (scope is Scope.USE or self.admin)

    def _is_endpoint(self, path: str) -> bool:
        """Whether *path* is one of `endpoints`, and will still be when a server has taken the dots out of it."""
        if not {".", ".."}.isdisjoint(unquote(path).replace("\\", "/").split("/")):
            return False
        return any(fits(pattern, path) for pattern in self.endpoints or ())

    def may_use(self, name: str, *meanings: str, at_peer: bool = False) -> bool:
        """Whether the model may be used that a client asks for as *name*.

        *meanings* are the names that this one leads to, step by step, the real one at the
        end (`PEER/MODEL` for a model *at_peer*): a pin leads to a selector, a selector to
        an alias, an alias to a model.  One of all these names must be allowed.  So

        - who is given a model may use it by whatever name;
        - who is given an alias may use it, and the model by none of its other names;
        - who is given a selector or a pinned name may use whatever it leads to.

        Who is given some targets of a selector and not the selector is let through when
        one of those is chosen: leave the others out of the choice.
        """
        if at_peer and not self.peers:
            return False
        if self.models is None:
            return True
        return any(fits(pattern, known) for known in (name, *meanings) for pattern in self.models)


ANYBODY: Final = Key("anybody", b"", admin=True)
"""Whoever asks where no key is asked for."""


# ---- who asks --------------------------------------------------------------------------


@attrs.frozen
class Keyring:
    """All keys of a configuration."""

    keys: tuple[Key, ...]
    """Those with a name first, so that a key that is written twice may do less and not more."""

    @classmethod
    def of(cls, config: Config) -> Self:
        """Those of *config*; the ones without a name are numbered from 1."""
        named = [Key.of(key) for key in config.keys.values()]
        plain = [Key(f"api key {number}", digest_of(key), admin=True) for number, key in enumerate(config.api_keys, 1)]
        return cls((*named, *plain))

    @property
    def asked(self) -> bool:
        """Whether clients must show a key."""
        return bool(self.keys)

    def find(self, headers: Headers) -> Key | None:
        """The key that *headers* show: `ANYBODY` where none is asked for, None where it is none of ours."""
        if not self.asked:
            return ANYBODY
        shown = credential(headers)
        if shown is None:
            return None
        digest = _digest(shown)
        found = [key for key in self.keys if hmac.compare_digest(key.digest, digest)]  # all of them, whichever fits
        return found[0] if found else None


def digest_of(key: str) -> bytes:
    """What is kept of *key*: its SHA-256, as UTF-8.

    Neither salted nor slow, for keys are random (`trioswap key new`) and not to be found by trying.
    """
    return _digest(key.encode())


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def credential(headers: Headers) -> bytes | None:
    """What the client shows, or None."""
    found = {name.lower(): value for name, value in reversed(headers)}
    scheme, _, rest = found.get(b"authorization", b"").strip().partition(b" ")
    if scheme.lower() == b"basic" and (password := _password(rest.strip())):
        return password
    if scheme.lower() == b"bearer" and rest.strip():
        return rest.strip()
    return found.get(b"x-api-key") or found.get(b"api-key") or None


def _password(encoded: bytes) -> bytes | None:
    try:
        return base64.b64decode(encoded, validate=True).partition(b":")[2]
    except binascii.Error:
        return None


def without_credentials(headers: Headers) -> Headers:
    """*headers* as a model server may see them."""
    return [(name, value) for name, value in headers if name.lower() not in CREDENTIALS]
