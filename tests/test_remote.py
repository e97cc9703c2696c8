"""Readiness probes and the command line's client, against real sockets."""

from __future__ import annotations

import socket
import ssl
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Thread

import pytest
import trio
import trustme
from clocks import guarded, passes
from commands import daemon as command
from commands import trioswap
from daemons import scripted, write_config
from origins import Server, closing_after, server_context
from trio.testing import wait_all_tasks_blocked

from trioswap.errors import DaemonRefused, DaemonUnreachable, Misuse
from trioswap.remote import Prober, daemon_client, memory_loan

GUARD = 30  # seconds; only a hang gets there
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@pytest.fixture
async def prober():
    prober = Prober()
    with trio.fail_after(GUARD):
        yield prober
    await prober.aclose()


@pytest.fixture
def serve(nursery):
    """Start a server that says *answer* to every connection and waits for the client to close."""

    async def start(answer, seen=None):
        async def script(stream):
            request = await stream.receive_some()
            if seen is not None:
                seen.append(request)
            if answer:
                await stream.send_all(answer)
            await stream.receive_some()

        listeners = await nursery.start(partial(trio.serve_tcp, script, 0, host="127.0.0.1"))
        return f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"

    return start


@pytest.fixture
def nobody():
    """The URL of a port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


async def test_only_200_is_ready(serve, prober):
    """200 is ready and everything else says what it was, redirects included."""
    assert await prober.ready(await serve(OK) + "/health") is None
    for head in (b"503 Loading", b"404 Not Found", b"204 No Content", b"301 Moved\r\nLocation: /"):
        url = await serve(OK.replace(b"200 OK", head))
        assert await prober.ready(url) == f"answered {int(head[:3])}"


async def test_the_path_is_asked_for(serve, prober):
    """The probe is a GET of exactly the URL."""
    seen = []
    await prober.ready(await serve(OK, seen) + "/v1/health?deep=1")
    assert seen[0].startswith(b"GET /v1/health?deep=1 HTTP/1.1\r\n")


async def test_a_refused_connection_is_a_value(nobody, prober):
    """Before the server binds its port the reason is that nobody is there, and the prober can go on."""
    for _ in range(2):
        assert await prober.ready(nobody) == "connection refused"


@pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH_9.6\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n"])
async def test_a_server_that_speaks_no_http_is_a_value(serve, prober, answer):
    """Something else on the port is a reason, not an exception."""
    why = await prober.ready(await serve(answer))
    assert why
    assert "200" not in why


async def test_an_endless_body_is_not_waited_for(serve, prober):
    """The head of the answer decides: a body that never ends does not delay it."""
    assert await prober.ready(await serve(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nx")) is None


async def test_a_hanging_server_is_given_up_after_five_seconds(serve, nursery, mock_clock):
    """A server that takes the connection and says nothing has not answered."""
    seen, said = [], []

    async def ask(url) -> None:
        said.append(await prober.ready(url))

    with guarded():
        prober = Prober()
        nursery.start_soon(ask, await serve(b"", seen))
        while not seen:
            await trio.lowlevel.checkpoint()
        await passes(mock_clock, 4.9)
        assert said == []
        await passes(mock_clock, 0.2)
        assert said == ["no answer within 5 s"]
        await prober.aclose()


async def test_each_probe_has_its_own_connection(prober, nursery):
    """No connection is kept: it might belong to the process that had the port before."""
    numbers, closed = [], []

    async def script(stream):
        number = len(numbers)
        numbers.append(number)
        while await stream.receive_some():
            await stream.send_all(OK)
        closed.append(number)

    listeners = await nursery.start(partial(trio.serve_tcp, script, 0, host="127.0.0.1"))
    url = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
    for _ in range(3):
        assert await prober.ready(url) is None
    await wait_all_tasks_blocked()
    assert closed == numbers == [0, 1, 2]


async def test_probes_do_not_wait_for_each_other(serve, prober):
    """However many servers hang, all of them are asked at the same time."""
    seen = []
    url = await serve(b"", seen)
    async with trio.open_nursery() as nursery:
        for _ in range(120):  # more than the client library's default limit of 100
            nursery.start_soon(prober.ready, url)
        await wait_all_tasks_blocked(0.05)
        assert len(seen) == 120
        nursery.cancel_scope.cancel(reason="test")


async def test_a_proxy_of_the_environment_is_not_asked(serve, prober, nobody, monkeypatch):
    """Probes go straight to the server."""
    monkeypatch.setenv("HTTP_PROXY", nobody)
    monkeypatch.setenv("http_proxy", nobody)
    assert await prober.ready(await serve(OK)) is None


async def test_a_cancelled_probe_leaves_nothing(serve, prober):
    """Cancelled while it waits for the answer, a probe leaves no socket open."""
    url = await serve(b"")
    await prober.ready("http://127.0.0.1:1")  # the client is made now, not in between

    def sockets():
        return [path for path in Path("/proc/self/fd").iterdir() if path.is_socket()]

    before = len(sockets())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(prober.ready, url)
        await wait_all_tasks_blocked()
        assert len(sockets()) == before + 2  # both ends are ours here
        nursery.cancel_scope.cancel(reason="test")
    await wait_all_tasks_blocked()
    assert len(sockets()) == before


async def test_a_prober_that_never_probed_can_be_closed():
    """Closing needs no probe before."""
    await Prober().aclose()


# ---- the command line's client ----


@pytest.mark.parametrize("key", ["secret", None])
async def test_the_daemon_is_asked_with_the_key(serve, key):
    """Paths are below the daemon's URL, and the key goes as a bearer token when there is one."""
    seen = []
    url = await serve(OK, seen)

    def ask():
        with daemon_client(url, key) as client:
            return client.get("/running").text

    with trio.fail_after(GUARD):
        assert await trio.to_thread.run_sync(ask) == "ok"
    assert seen[0].startswith(b"GET /running HTTP/1.1\r\n")
    assert (b"bearer secret" in seen[0].lower()) is (key is not None)
    assert (b"authorization" in seen[0].lower()) is (key is not None)


def test_only_answers_are_waited_for_without_end():
    """A load may take minutes; a daemon that is not there is told within seconds."""
    with daemon_client("http://127.0.0.1:1", None) as client:
        assert client.timeout.read is None
        assert client.timeout.connect == 5.0


def test_a_daemon_that_is_not_there_is_said_to_be(nobody):
    """A refused connection names the address and the cause."""
    with pytest.raises(DaemonUnreachable, match=f"{nobody}: connection refused"), daemon_client(nobody, None) as client:
        client.get("/running")


REFUSAL = b'{"src": "trioswap", "error": {"message": "no such model"}}'


@pytest.mark.parametrize(
    ("body", "message"),
    [(REFUSAL, "^no such model$"), (b"<html>", "/running answered 404 Not Found; is that trioswap")],
)
async def test_the_daemon_s_refusal_is_told_in_its_words(serve, body, message):
    """An error answer becomes its message, and something that is not ours is recognised."""
    url = await serve(b"HTTP/1.1 404 Not Found\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))

    def ask():
        with daemon_client(url, None) as client:
            client.get("/running")

    with trio.fail_after(GUARD), pytest.raises(DaemonRefused, match=message):
        await trio.to_thread.run_sync(ask)


# ---- other ways to a daemon ---------------------------------------------------------------------


async def test_the_command_line_reaches_a_unix_socket(tmp_path, monkeypatch):
    """`--url unix:/PATH` goes there, with the key; no such socket is told as every unreachable daemon."""
    path = tmp_path / "socket"
    monkeypatch.setenv("TRIOSWAP_API_KEY", "k1")
    config = write_config(tmp_path, {"a": scripted()}, listen=f"unix:{path}", api_keys=["k1"])
    async with command("serve", "-c", config):
        done = await trioswap("ps", "--url", f"unix:{path}")
        assert (done.returncode, done.stderr) == (0, "")
    done = await trioswap("ps", "--url", f"unix:{path}")
    assert done.returncode == 1
    assert f"no answer from trioswap at unix:{path}" in done.stderr


def test_certificates_of_ones_own(tmp_path, monkeypatch):
    """A file without certificates is the user's mistake, told before anything is asked."""
    file = tmp_path / "ca.pem"
    file.write_text("nothing")
    monkeypatch.setenv("TRIOSWAP_CA_FILE", str(file))
    words = r"TRIOSWAP_CA_FILE: .*ca\.pem holds no certificates"
    with pytest.raises(Misuse, match=words), daemon_client("https://127.0.0.1:1", None):
        pytest.fail("it is asked")


async def test_whom_the_system_trusts_and_certificates_of_ones_own(tmp_path, monkeypatch):
    """Both, not the one in place of the other."""
    system, own = trustme.CA(), trustme.CA()
    for name, authority in (("SSL_CERT_FILE", system), ("TRIOSWAP_CA_FILE", own)):
        authority.cert_pem.write_to_path(tmp_path / name)
        monkeypatch.setenv(name, str(tmp_path / name))

    with trio.fail_after(GUARD):
        async with trio.open_nursery() as nursery:
            for authority in (system, own):
                server = await Server(closing_after(OK), server_context(authority)).start(nursery)
                await trio.to_thread.run_sync(ask, server.url)
            nursery.cancel_scope.cancel()


def ask(url: str) -> None:
    """As the commands do."""
    with daemon_client(url, None) as client:
        client.get("/running")


def borrow(url: str) -> None:
    """As `trioswap hold` does."""

    async def run() -> None:
        async with memory_loan(url, None, {}):
            pytest.fail("there is no memory")

    trio.run(run)


REFUSED = "certificate verify failed: .*; TRIOSWAP_CA_FILE can name"
PLAIN = "TLS failed: wrong version number; is it http:// rather than https://"


@pytest.mark.parametrize("how", [ask, borrow])
@pytest.mark.parametrize(("speaks_tls", "words"), [(True, REFUSED), (False, PLAIN)])
def test_tls_that_fails_is_told_in_openssl_s_words(how, speaks_tls, words):
    """And with what helps: its errors have numbers of their own, of which 1 is no EPERM."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)

    def serve() -> None:
        with suppress(OSError), server.accept()[0] as end:
            if speaks_tls:
                context.wrap_socket(end, server_side=True)
            else:
                end.recv(1000)
                end.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as server:
        Thread(target=serve, daemon=True).start()
        with pytest.raises(DaemonUnreachable, match=words):
            how(f"https://127.0.0.1:{server.getsockname()[1]}")
