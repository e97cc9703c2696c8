"""The certificate that clients see: loads it and its key, and notices when they have been renewed.

Left to others: handshakes (server), when a signal asks for it again (daemon).
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Final

import attrs
import trio

from trioswap.config.parts import TlsConfig
from trioswap.errors import BadCertificate

logger = logging.getLogger(__name__)

# Seconds between two looks at the files.  A renewal comes weeks before the old certificate expires.
WATCH_EVERY: Final = 60.0

# For TLS 1.2, whose other suites HTTP/2 forbids (RFC 9113, 9.2.2 and appendix A); 1.3 has good ones only.
_CIPHERS: Final = "ECDHE+AESGCM:ECDHE+CHACHA20"
_PROTOCOLS: Final = ["h2", "http/1.1"]
_DECRYPT: Final = "store it without a passphrase: openssl pkey -in {} -out NEW.pem, readable only by this user"

# The last for a key of another kind, as RSA is another than EC: it looks for a certificate of that kind.
_MISMATCHES: Final = {"KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED"}

# Of one file: device, inode, size, and the time of its last change in ns; None: it is not there.
_Stamp = tuple[int, int, int, int] | None

_in_thread: Final = partial(trio.to_thread.run_sync, abandon_on_cancel=True)


class _KeyIsEncrypted(Exception):
    """OpenSSL asked for a passphrase."""


@attrs.frozen
class Found:
    """What the files of a certificate hold."""

    stamps: tuple[_Stamp, _Stamp]
    """Of certificate and key, before they were read: what is changed in between is read the next time."""
    context: ssl.SSLContext | BadCertificate


@attrs.define(eq=False)
class Certificates:
    """What TLS connections are opened with; the same for all that begin at the same time."""

    config: TlsConfig
    context: ssl.SSLContext = attrs.field(init=False, repr=False)
    """For new connections; where another is put in its place, open connections keep theirs."""
    in_thread: Callable[..., Awaitable[Found | None]] = _in_thread
    """Calls what reads files, which may hang where a file system does not answer."""
    _stamps: tuple[_Stamp, _Stamp] = attrs.field(init=False, repr=False)
    """When the files were last loaded, or could not be."""
    _wanted: trio.Event = attrs.field(factory=trio.Event, init=False)
    _looking: trio.CancelScope = attrs.field(factory=trio.CancelScope, init=False, repr=False)
    """Around the look that is under way."""

    def __attrs_post_init__(self) -> None:
        """Raises BadCertificate."""
        found = look(self.config)
        if isinstance(found.context, BadCertificate):
            raise found.context
        self._stamps, self.context = found.stamps, found.context

    def current(self) -> ssl.SSLContext:
        """The context for a new connection."""
        return self.context

    def reload(self) -> None:
        """Load both files again, soon.  If they are no pair, that is logged, and the old one stays."""
        self._wanted.set()

    def replace(self, config: TlsConfig, found: Found) -> None:
        """Show what was *found* in the files of *config*, if that can be shown."""
        self.config, self._stamps = config, found.stamps
        self._looking.cancel(reason="other files count")  # where the old ones are, it may hang for ever
        # In a context of its own: a pair that turns out not to fit would have spoilt half of the old one.
        if isinstance(found.context, BadCertificate):
            logger.error("the old certificate stays in use: %s", found.context.message)
        else:
            self.context = found.context
            logger.info("loaded the certificate in %s", config.cert_file)

    async def run(self) -> None:
        """Reload when a file, or what a symbolic link leads to, is another than before; for ever.

        A pair is often replaced one file after the other.  Met in between it is a bad one,
        and the second file's change has it loaded again.
        """
        while True:
            with trio.move_on_after(WATCH_EVERY):
                await self._wanted.wait()
            known = None if self._wanted.is_set() else self._stamps
            self._wanted, config = trio.Event(), self.config
            found = None
            try:
                with trio.CancelScope() as self._looking:
                    found = await self.in_thread(look_again, config, known)
            except Exception as exc:  # no thread can be started, say: no reason to end the daemon
                logger.error("cannot look whether the certificate has changed: %r", exc)
                continue
            if found is not None and config is self.config:  # else a new configuration has others meanwhile
                self.replace(config, found)


def look(config: TlsConfig) -> Found:
    """Read the files of *config*."""
    stamps = _stamps(config)
    try:
        return Found(stamps, make_context(config))
    except BadCertificate as exc:
        return Found(stamps, exc)


def look_again(config: TlsConfig, known: tuple[_Stamp, _Stamp] | None) -> Found | None:
    """The same; None: they are as they were *known*."""
    return None if _stamps(config) == known else look(config)


def make_context(config: TlsConfig) -> ssl.SSLContext:
    """A server's TLS 1.2 and 1.3 with HTTP/2 and HTTP/1.1.

    Raises:
        BadCertificate: a file cannot be read, or the two are no certificate and its key.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(_CIPHERS)
    context.set_alpn_protocols(_PROTOCOLS)
    context.options |= ssl.OP_NO_RENEGOTIATION  # of TLS 1.2: costs a client nothing, and us a handshake each time
    certificate, key = _read(config.cert_file), _read(config.key_file)
    try:
        # Without a callback OpenSSL would ask for the passphrase on the terminal.
        context.load_cert_chain(config.cert_file, config.key_file, _refuse_passphrase)
    except _KeyIsEncrypted:
        raise BadCertificate(config.key_file, "it is encrypted", _DECRYPT.format(config.key_file)) from None
    except OSError as exc:  # as ssl.SSLError is
        raise _explain(config, certificate, key, exc) from exc
    return context


def _refuse_passphrase() -> str:
    raise _KeyIsEncrypted


def _read(path: Path) -> str:
    try:
        return path.read_text("ascii", "replace")
    except OSError as exc:
        advice = "correct the path, or let this user read the file"
        raise BadCertificate(path, exc.strerror or str(exc), advice) from exc


def _explain(config: TlsConfig, certificate: str, key: str, exc: OSError) -> BadCertificate:
    """Which of the two files is wrong, and how: OpenSSL does not say."""
    if "-----BEGIN CERTIFICATE-----" not in certificate:
        return BadCertificate(config.cert_file, "it holds no certificate in PEM", "convert it, or name another file")
    if "PRIVATE KEY-----" not in key:
        return BadCertificate(config.key_file, "it holds no private key in PEM", "convert it, or name another file")
    reason = getattr(exc, "reason", None) or str(exc)
    if reason in _MISMATCHES:
        what = f"it is not the key of the certificate in {config.cert_file}"
        return BadCertificate(config.key_file, what, "name the two files that were issued together")
    what = f"OpenSSL cannot use it with {config.key_file}: {reason.replace('_', ' ').lower()}"
    return BadCertificate(config.cert_file, what, "name a certificate and its key, both in PEM")


def _stamps(config: TlsConfig) -> tuple[_Stamp, _Stamp]:
    return _stamp(config.cert_file), _stamp(config.key_file)


def _stamp(path: Path) -> _Stamp:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
