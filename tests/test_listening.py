"""The sockets that clients connect to, as real ones: in the file system, handed over by systemd, over TLS."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import socket
import ssl
import stat
import sys
from functools import partial

import attrs
import httpx  # noqa: TID251 - a client that people use
import pytest
import trio
import trustme
from children import PATIENCE, read_until, running
from commands import TRIOSWAP, daemon, trioswap
from daemons import chat, connect, eventually, fetch, scripted, write_config
from test_spawning import no_descriptor_left

from trioswap.errors import CannotListen
from trioswap.listening import handed_over, listening, open_listeners, urls


def client_of(path, **options):
    """An HTTP client that connects to the socket at *path*."""
    transport = httpx.AsyncHTTPTransport(uds=str(path))
    return httpx.AsyncClient(
        transport=transport, base_url="http://trioswap", trust_env=False, timeout=PATIENCE, **options
    )


@contextlib.contextmanager
def left_behind(path):
    """The file of a socket that is not listened on any more, as a killed daemon leaves it."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        dead.listen()
    yield


# ---- no connection can be accepted --------------------------------------------------------------


class Exhausted(trio.abc.Listener):
    """A listener for which there is no descriptor."""

    def __init__(self, number: int) -> None:
        self.number, self.asked = number, 0

    async def accept(self):
        self.asked += 1
        raise OSError(self.number, os.strerror(self.number))

    async def aclose(self) -> None:
        """Nothing."""


@pytest.mark.parametrize(
    ("number", "advice"), [(errno.EMFILE, "LimitNOFILE"), (errno.ENOBUFS, "no buffer space available")]
)
async def test_a_complaint_a_minute(autojump_clock, caplog, number, advice):
    """Trio tries again ten times a second and says so each time: one line is left of 600, and says what to do."""
    listener = Exhausted(number)
    async with listening("127.0.0.1:0"):
        with trio.move_on_after(150.0):
            await trio.serve_listeners(None, [listener])

    assert listener.asked >= 1400
    assert len(caplog.records) == 3
    for record in caplog.records:
        assert (record.levelno, record.name, record.exc_info) == (logging.WARNING, "trioswap.listening", None)
        assert record.getMessage().startswith("connections cannot be accepted, and wait: ")
        assert advice in record.getMessage()


async def test_what_else_trio_says_stays(caplog):
    """Also the same, after a daemon has ended."""
    async with listening("127.0.0.1:0"):
        logging.getLogger("trio.serve_listeners").error("something else")
    with pytest.raises(trio.TooSlowError), trio.fail_after(0.0):
        await trio.serve_listeners(None, [Exhausted(errno.EMFILE)])
    assert [record.levelno for record in caplog.records] == [logging.ERROR, logging.ERROR]


async def is_told(client) -> bool:
    client.parser.start_next_cycle()
    await client.ask("GET", "/logs")
    return "connections cannot be accepted" in (await client.answer()).text


async def test_connections_wait_until_there_are_descriptors_again(tmp_path):
    """A real daemon that has none: who comes then is served when it has some, and the log says why it took so long."""
    async with daemon("serve", "-c", write_config(tmp_path, {"a": scripted()})) as served:
        async with await connect(served.port) as early:
            await early.ask("GET", "/health")
            assert (await early.answer()).status == 200
            with no_descriptor_left(served.process.pid):
                late = await connect(served.port)
                await late.ask("GET", "/health")
                await eventually(partial(is_told, early))
            async with late:
                with trio.fail_after(PATIENCE):
                    assert (await late.answer()).status == 200
        said = (await fetch(served.port, "GET", "/logs")).text
        assert (
            "WARNING listening: connections cannot be accepted, and wait: trioswap has no file descriptor left" in said
        )
        assert said.count("Too many open files") == 0


# ---- socket files ---------------------------------------------------------------------------


async def test_a_socket_file_for_a_block(tmp_path):
    """It is there, for user and group alone, while the block runs."""
    path = tmp_path / "socket"
    async with listening(f"unix:{path}") as listeners:
        assert urls(listeners, secure=True) == [f"unix:{path}"]
        assert stat.filemode(path.stat().st_mode) == "srw-rw----"
        async with await trio.open_unix_socket(path), await listeners[0].accept():
            pass

    assert not path.exists()


async def test_the_mode_does_not_depend_on_the_umask(tmp_path):
    """A strict umask of the daemon's start does not shut the group out."""
    before = os.umask(0o777)
    try:
        async with listening(f"unix:{tmp_path / 'socket'}"):
            mode = (tmp_path / "socket").stat().st_mode
    finally:
        os.umask(before)

    assert stat.S_IMODE(mode) == 0o660


async def test_a_stale_socket_file_is_replaced(tmp_path):
    """Nobody listens there: connecting is refused."""
    path = tmp_path / "socket"
    with left_behind(path):
        async with listening(f"unix:{path}"), await trio.open_unix_socket(path):
            pass

    assert not path.exists()


async def test_a_living_socket_is_left_alone(tmp_path):
    """It belongs to somebody, who goes on listening."""
    path = tmp_path / "socket"
    async with listening(f"unix:{path}"):
        with pytest.raises(CannotListen, match=f"cannot listen on unix:{path}: Address already in use"):
            await open_listeners(f"unix:{path}")
        async with await trio.open_unix_socket(path):
            pass


async def test_a_living_socket_with_a_full_queue_is_left_alone(tmp_path):
    """Whoever is too busy to accept is alive."""
    path = tmp_path / "socket"
    with contextlib.ExitStack() as stack:
        busy = stack.enter_context(socket.socket(socket.AF_UNIX))
        busy.bind(str(path))
        busy.listen(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
                waiting.setblocking(False)
                waiting.connect(str(path))
        with pytest.raises(CannotListen):
            await open_listeners(f"unix:{path}")

    assert path.exists()


@pytest.mark.parametrize("what", ["file", "directory", "link to a file"])
async def test_what_is_no_socket_is_left_alone(what, tmp_path):
    """A mistyped path costs nobody a file."""
    path = tmp_path / "socket"
    if what == "directory":
        path.mkdir()
    else:
        (tmp_path / "file").write_text("precious")
        path.symlink_to("file") if what == "link to a file" else (tmp_path / "file").rename(path)
    with pytest.raises(CannotListen):
        await open_listeners(f"unix:{path}")

    assert path.is_dir() or path.read_text() == "precious"


async def test_a_directory_that_is_missing(tmp_path):
    """The error says so."""
    with pytest.raises(CannotListen, match="No such file or directory"):
        await open_listeners(f"unix:{tmp_path / 'no' / 'socket'}")


async def test_anothers_socket_file_stays(tmp_path):
    """Who has taken the path over meanwhile keeps it."""
    path = tmp_path / "socket"
    async with listening(f"unix:{path}") as listeners:
        await listeners[0].aclose()
        successor = await open_listeners(f"unix:{path}")
    async with await trio.open_unix_socket(path):
        await successor[0].aclose()


async def test_a_failure_inside_removes_the_file(tmp_path):
    """However the block ends."""
    path = tmp_path / "socket"
    with pytest.raises(ZeroDivisionError):
        async with listening(f"unix:{path}"):
            raise ZeroDivisionError

    assert not path.exists()


# ---- a daemon behind one ------------------------------------------------------------------------


async def test_a_daemon_on_a_socket_file(tmp_path):
    """Requests are answered, and the model server is told of no client's address; SIGTERM removes the file."""
    path = tmp_path / "socket"
    config = write_config(tmp_path, {"a": scripted()}, listen=f"unix:{path}")
    async with daemon("serve", "-c", config) as served:
        assert served.url == f"unix:{path}"
        async with client_of(path) as client:
            assert (await client.get("/health")).status_code == 200
            answer = await client.post("/v1/chat/completions", content=chat("a"))
            assert answer.json()["model"] == "a"
            assert "x-forwarded-for" not in answer.json()["headers"]
        assert await served.stop() == 0

    assert not path.exists()


async def test_a_killed_daemon_does_not_hold_up_the_next(tmp_path):
    """It leaves its socket file, which the next one replaces; a third is told that the second lives."""
    path = tmp_path / "socket"
    command = ("serve", "-c", write_config(tmp_path, {"a": scripted()}), "--listen", f"unix:{path}")
    (tmp_path / "other").mkdir()
    other = write_config(tmp_path / "other", {"a": scripted()})  # with a state directory of its own
    async with daemon(*command) as killed:
        killed.process.kill()
        await killed.process.wait()
    assert path.exists()
    async with daemon(*command):
        third = await trioswap("serve", "-c", other, "--listen", f"unix:{path}")
        assert third.returncode == 1
        assert f"cannot listen on unix:{path}: Address already in use" in third.stderr
        async with client_of(path) as client:
            assert (await client.get("/health")).status_code == 200


# ---- handed over by systemd -----------------------------------------------------------------------


# What systemd does: sockets from 3 on, and LISTEN_PID, which is known only in the child.
ACTIVATE = """
import os, socket, sys
unix, tcp = socket.socket(socket.AF_UNIX), socket.create_server(("127.0.0.1", 0))
unix.bind(sys.argv[1])
unix.listen()
for number, fd in enumerate([os.dup(unix.fileno()), os.dup(tcp.fileno())], 3):
    os.dup2(fd, number, inheritable=True)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="2", LISTEN_FDNAMES="a:b")
os.execv(sys.argv[2], sys.argv[2:])
"""


async def test_sockets_from_systemd(tmp_path):
    """They are used instead of `listen`; the file stays, for it is systemd's; the children hear nothing of it."""
    path = tmp_path / "socket"
    config = write_config(tmp_path, {"a": scripted()}, listen=f"unix:{tmp_path / 'unused'}")
    async with running((sys.executable, "-c", ACTIVATE, str(path), *TRIOSWAP, "serve", "-c", config)) as process:
        with trio.fail_after(PATIENCE):
            said = await read_until(process, "\n")
        where, _, url = said.strip().removeprefix("trioswap listens on ").partition(" and ")
        assert where == f"unix:{path}"
        async with client_of(path) as client:
            assert (await client.post("/v1/chat/completions", content=chat("a"))).status_code == 200
            pid = int((await client.get("/upstream/a/pid")).text)
            assert b"LISTEN_" not in await trio.Path(f"/proc/{pid}/environ").read_bytes()
        async with httpx.AsyncClient(trust_env=False) as client:
            assert (await client.get(f"{url}/health")).status_code == 200
        process.terminate()
        with trio.fail_after(PATIENCE):
            assert await process.wait() == 0

    assert path.exists()
    assert not (tmp_path / "unused").exists()


@pytest.mark.parametrize(
    "environment",
    [{}, {"LISTEN_FDS": "1"}, {"LISTEN_PID": "1", "LISTEN_FDS": "1"}, {"LISTEN_PID": str(os.getpid())}],
    ids=["nothing", "no pid", "another's", "no number"],
)
async def test_nothing_is_handed_over(environment):
    """Variables that are meant for another process, or say nothing, are left alone."""
    before = dict(environment)

    assert handed_over(environment) == []
    assert environment == before


async def test_something_else_is_handed_over(monkeypatch):
    """Such as a datagram socket: the error says which."""
    number = socket.socket(socket.AF_INET, socket.SOCK_DGRAM).detach()
    monkeypatch.setattr("trioswap.listening._FIRST_HANDED", number)
    with pytest.raises(CannotListen, match=f"descriptor {number}, which systemd handed over: .*SOCK_STREAM"):
        handed_over({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"})
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


# ---- TLS ---------------------------------------------------------------------------------------


@attrs.frozen
class Pair:
    """Files of a certificate, what they are for on the command line, and a client that trusts it."""

    authority: trustme.CA
    cert: object
    key: object

    @property
    def flags(self):
        return ("--tls-cert-file", str(self.cert), "--tls-key-file", str(self.key))

    def issue(self):
        issued = self.authority.issue_cert("127.0.0.1")
        self.cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        self.key.write_bytes(issued.private_key_pem.bytes())

    def trusting(self):
        context = ssl.create_default_context()
        self.authority.configure_trust(context)
        return context

    async def serial(self, port):
        """Serial number of the certificate shown at *port*."""
        stream = await trio.open_ssl_over_tcp_stream("127.0.0.1", port, ssl_context=self.trusting())
        async with stream:
            await stream.do_handshake()
            return stream.getpeercert()["serialNumber"]


@pytest.fixture
def pair(tmp_path):
    pair = Pair(trustme.CA(), tmp_path / "cert.pem", tmp_path / "key.pem")
    pair.issue()
    return pair


async def test_a_daemon_over_tls(pair, tmp_path, monkeypatch):
    """It says https, and answers over HTTP/2; SIGHUP has it show the certificate that is in the files now."""
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path, {"a": scripted()})
    async with daemon("serve", "-c", config, "--tls-cert-file", "cert.pem", "--tls-key-file", "key.pem") as served:
        assert served.url == f"https://127.0.0.1:{served.port}"
        async with httpx.AsyncClient(
            base_url=served.url, verify=pair.trusting(), http2=True, trust_env=False
        ) as client:
            answer = await client.post("/v1/chat/completions", content=chat("a"), timeout=PATIENCE)
            assert (answer.json()["model"], answer.http_version) == ("a", "HTTP/2")
            before = await pair.serial(served.port)
            pair.issue()
            served.process.send_signal(signal.SIGHUP)
            with trio.fail_after(PATIENCE):
                while await pair.serial(served.port) == before:
                    pass
            assert (await client.get("/health")).status_code == 200
        assert await served.stop() == 0


async def test_tls_from_the_configuration(pair, tmp_path):
    """As from the command line."""
    tls = {"cert_file": str(pair.cert), "key_file": str(pair.key)}
    async with daemon("serve", "-c", write_config(tmp_path, {"a": scripted()}, tls=tls)) as served:
        assert served.url.startswith("https://")
        await pair.serial(served.port)


async def test_a_socket_file_needs_no_tls(pair, tmp_path):
    """Its mode guards it, also where TLS is configured for the rest."""
    path = tmp_path / "socket"
    config = write_config(tmp_path, {"a": scripted()})
    async with daemon("serve", "-c", config, *pair.flags, "--listen", f"unix:{path}") as served:
        assert served.url == f"unix:{path}"
        async with client_of(path) as client:
            assert (await client.get("/health")).status_code == 200


MISUSES = {
    "no key": (["--tls-cert-file", "cert.pem"], "TLS needs a certificate and its key: add --tls-key-file FILE"),
    "no certificate": (["--tls-key-file", "key.pem"], "TLS needs a certificate and its key: add --tls-cert-file FILE"),
    "missing file": (["--tls-cert-file", "cert.pem", "--tls-key-file", "no.pem"], "no.pem: No such file or directory"),
    "no pair": (["--tls-cert-file", "cert.pem", "--tls-key-file", "cert.pem"], "it holds no private key in PEM"),
}


@pytest.mark.parametrize("what", MISUSES)
async def test_tls_misused(what, pair, tmp_path, monkeypatch):
    """Exit code 2, one line, and nothing was started."""
    monkeypatch.chdir(tmp_path)
    flags, words = MISUSES[what]
    done = await trioswap("serve", "-c", write_config(tmp_path, {"a": scripted()}), *flags)

    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
