"""Certificates in real files: what is wrong with them is said, and renewals are noticed."""

from __future__ import annotations

import logging
import ssl
import threading
from contextlib import suppress

import attrs
import pytest
import trio
import trustme
from children import PATIENCE
from cryptography.hazmat.primitives import serialization

from trioswap.config.parts import TlsConfig
from trioswap.errors import BadCertificate, Misuse
from trioswap.tls import WATCH_EVERY, Certificates, look, look_again, make_context

AUTHORITY = trustme.CA()


@attrs.define
class Files:
    """A certificate and its key, to be replaced."""

    config: TlsConfig

    def write(self, issued, *, certificate=True, key=True):
        """Put *issued* there, or one half of it."""
        if certificate:
            replace(self.config.cert_file, b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        if key:
            replace(self.config.key_file, issued.private_key_pem.bytes())


def replace(path, data):
    """As certbot does: a new file each time, to which a link leads."""
    target = path.with_name(f"{path.name}-{len(list(path.parent.iterdir()))}")
    target.write_bytes(data)
    link = path.with_name("link")
    link.symlink_to(target)
    link.replace(path)


@pytest.fixture
def files(tmp_path):
    """A pair that fits."""
    files = Files(TlsConfig(tmp_path / "cert.pem", tmp_path / "key.pem"))
    files.write(AUTHORITY.issue_cert("localhost"))
    return files


def serial(context):
    """Serial number of the certificate that a client of *context* is shown."""
    trusting = ssl.create_default_context()
    AUTHORITY.configure_trust(trusting)
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = trusting.wrap_bio(to_client, to_server, server_hostname="localhost")
    server = context.wrap_bio(to_server, to_client, server_side=True)
    for side in (client, server, client):
        with suppress(ssl.SSLWantReadError):
            side.do_handshake()
    return client.getpeercert()["serialNumber"]


# ---- what cannot be used --------------------------------------------------------------------


def encrypted(files):
    key = serialization.load_pem_private_key(files.config.key_file.read_bytes(), None)
    passphrase = serialization.BestAvailableEncryption(b"secret")
    form = serialization.PrivateFormat.PKCS8
    files.config.key_file.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, passphrase))


def stranger(files):
    files.write(trustme.CA().issue_cert("localhost"), certificate=False)


def other_kind(files):
    files.write(AUTHORITY.issue_cert("localhost", key_type=trustme.KeyType.RSA), certificate=False)


BAD = {
    "no certificate": (lambda files: files.config.cert_file.unlink(), "cert_file", "No such file"),
    "no key": (lambda files: files.config.key_file.unlink(), "key_file", "No such file"),
    "a directory": (
        lambda files: (files.config.key_file.unlink(), files.config.key_file.mkdir()),
        "key_file",
        "directory",
    ),
    "empty certificate": (lambda files: files.config.cert_file.write_bytes(b""), "cert_file", "no certificate"),
    "certificate not PEM": (
        lambda files: files.config.cert_file.write_bytes(b"\x30\x82"),
        "cert_file",
        "no certificate",
    ),
    "empty key": (lambda files: files.config.key_file.write_bytes(b""), "key_file", "no private key"),
    "key of another": (stranger, "key_file", "not the key of the certificate"),
    "key of another kind": (other_kind, "key_file", "not the key of the certificate"),
    "encrypted key": (encrypted, "key_file", "openssl pkey -in"),
    "broken certificate": (
        lambda files: files.config.cert_file.write_text(
            "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
        ),
        "cert_file",
        "both in PEM",
    ),
    "swapped": (
        lambda files: files.config.cert_file.write_bytes(files.config.key_file.read_bytes()),
        "cert_file",
        "no certificate",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_pair_is_explained(what, files):
    """The user's mistake: which file, what is wrong with it, and what to do."""
    spoil, blamed, words = BAD[what]
    spoil(files)
    with pytest.raises(BadCertificate, match="cannot serve TLS with") as bad:
        Certificates(files.config)

    assert isinstance(bad.value, Misuse)
    assert bad.value.path == getattr(files.config, blamed)
    assert str(bad.value.path) in bad.value.message
    assert words in bad.value.message


def test_what_is_spoken(files):
    """TLS 1.2 at least, both versions of HTTP, and nothing that HTTP/2 forbids."""
    context = make_context(files.config)

    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    for cipher in context.get_ciphers():
        assert cipher["aead"]
        assert cipher["protocol"] == "TLSv1.3" or cipher["name"].startswith("ECDHE")


# ---- renewal ----------------------------------------------------------------------------------


async def at_once(function, *arguments):
    """In place of a thread, which a clock that jumps does not wait for."""
    await trio.lowlevel.checkpoint()
    return function(*arguments)


@pytest.fixture
async def watched(files, nursery):
    """Certificates whose files are watched."""
    certificates = Certificates(files.config, at_once)
    nursery.start_soon(certificates.run)
    await trio.sleep(WATCH_EVERY / 2)
    return certificates


async def test_reload(autojump_clock, watched, files):
    """New connections get the new certificate."""
    before = serial(watched.current())
    files.write(AUTHORITY.issue_cert("localhost"))

    watched.reload()
    await trio.testing.wait_all_tasks_blocked()
    assert serial(watched.current()) != before


@pytest.mark.parametrize("what", BAD)
async def test_a_bad_pair_keeps_the_old(what, autojump_clock, watched, files, caplog):
    """One line says so, and the old certificate is served on."""
    before = serial(watched.current())
    BAD[what][0](files)

    watched.reload()
    await trio.testing.wait_all_tasks_blocked()
    assert serial(watched.current()) == before
    assert [(record.levelname, record.exc_info) for record in caplog.records] == [("ERROR", None)]
    assert "old certificate stays in use: cannot serve TLS with" in caplog.messages[0]


async def test_a_file_system_that_does_not_answer(files, nursery):
    """A look that hangs hangs alone: connections are opened with what was there."""
    hangs, goes_on = threading.Event(), threading.Event()

    def look():
        hangs.set()
        goes_on.wait(PATIENCE)

    certificates = Certificates(files.config, lambda *_: trio.to_thread.run_sync(look, abandon_on_cancel=True))
    nursery.start_soon(certificates.run)
    certificates.reload()
    try:
        assert await trio.to_thread.run_sync(hangs.wait, PATIENCE)
        assert serial(certificates.current())
    finally:
        goes_on.set()


async def test_other_files_than_those_that_do_not_answer(files, nursery, tmp_path):
    """A reload that names them is not the last one that is noticed."""
    hangs, goes_on = threading.Event(), threading.Event()
    (tmp_path / "other").mkdir()
    other = Files(TlsConfig(tmp_path / "other" / "cert.pem", tmp_path / "other" / "key.pem"))
    other.write(AUTHORITY.issue_cert("localhost"))

    def ask(config, known):
        if config is files.config:
            hangs.set()
            goes_on.wait(PATIENCE)
        return look_again(config, known)

    certificates = Certificates(
        files.config, lambda _, *files: trio.to_thread.run_sync(ask, *files, abandon_on_cancel=True)
    )
    nursery.start_soon(certificates.run)
    certificates.reload()
    try:
        assert await trio.to_thread.run_sync(hangs.wait, PATIENCE)
        certificates.replace(other.config, look(other.config))
        before = serial(certificates.current())
        other.write(AUTHORITY.issue_cert("localhost"))
        certificates.reload()
        with trio.fail_after(PATIENCE / 2):
            while serial(certificates.current()) == before:  # noqa: ASYNC110 - nobody tells
                await trio.sleep(0.01)
    finally:
        goes_on.set()


async def test_no_thread_for_a_look(autojump_clock, watched, files, caplog):
    """A machine that lacks threads for a while is no reason to end."""
    before = serial(watched.current())
    files.write(AUTHORITY.issue_cert("localhost"))

    async def refuse(*_):
        await trio.lowlevel.checkpoint()
        raise RuntimeError("can't start new thread")

    watched.in_thread = refuse
    await trio.sleep(WATCH_EVERY)
    watched.in_thread = at_once
    assert "cannot look whether the certificate has changed" in caplog.messages[0]

    await trio.sleep(WATCH_EVERY)
    assert serial(watched.current()) != before


async def test_a_renewal_is_noticed(autojump_clock, watched, files, caplog):
    """Within a minute, and once."""
    caplog.set_level(logging.INFO)
    before = serial(watched.current())
    files.write(AUTHORITY.issue_cert("localhost"))
    await trio.sleep(WATCH_EVERY)
    assert serial(watched.current()) != before

    await trio.sleep(10 * WATCH_EVERY)
    assert len(caplog.messages) == 1


async def test_unchanged_files_are_left_alone(autojump_clock, watched, caplog):
    """No new context, which would cost all clients their sessions."""
    caplog.set_level(logging.INFO)
    before = watched.current()
    await trio.sleep(10 * WATCH_EVERY)

    assert watched.current() is before
    assert not caplog.messages


async def test_a_renewal_met_halfway(autojump_clock, watched, files, caplog):
    """A new certificate with the old key is a bad pair, said once; the key that follows is noticed."""
    caplog.set_level(logging.INFO)
    before = serial(watched.current())
    issued = AUTHORITY.issue_cert("localhost")
    files.write(issued, key=False)
    await trio.sleep(3 * WATCH_EVERY)
    assert serial(watched.current()) == before
    files.write(issued, certificate=False)
    await trio.sleep(WATCH_EVERY)

    assert serial(watched.current()) != before
    assert [record.levelname for record in caplog.records] == ["ERROR", "INFO"]


async def test_files_that_come_back(autojump_clock, watched, files):
    """A directory that is not mounted for a while ends nothing."""
    before = serial(watched.current())
    files.config.cert_file.rename(files.config.cert_file.with_name("away"))
    await trio.sleep(2 * WATCH_EVERY)
    assert serial(watched.current()) == before
    files.write(AUTHORITY.issue_cert("localhost"))
    await trio.sleep(WATCH_EVERY)

    assert serial(watched.current()) != before


@pytest.mark.parametrize("first", ["a bad pair", "a good pair"])
async def test_a_change_while_loading_is_noticed(first, files, nursery, autojump_clock, monkeypatch):
    """What is replaced between the look and the reading, or behind it, is loaded the next time."""
    certificates = Certificates(files.config, at_once)
    nursery.start_soon(certificates.run)
    last = AUTHORITY.issue_cert("localhost")
    files.write(last if first == "a bad pair" else AUTHORITY.issue_cert("localhost"), key=first == "a good pair")

    def load_then_replace(config):
        try:
            return make_context(config)
        finally:
            files.write(last)
            monkeypatch.undo()

    monkeypatch.setattr("trioswap.tls.make_context", load_then_replace)
    await trio.sleep(WATCH_EVERY * 1.5)
    before = serial(certificates.current())
    await trio.sleep(WATCH_EVERY)
    assert serial(certificates.current()) != before
