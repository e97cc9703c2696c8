"""The command line as a real process: what it prints, where, and its exit codes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import trio
from children import PATIENCE, alive, ask, free_port, model_argv, read_until, running
from commands import TRIOSWAP, daemon, trioswap
from daemons import scripted, write_config
from sockets import notify_socket

from trioswap import __version__

# Three mistakes of three kinds: a value, a placeholder, a key.
BAD = """
listen = "8080"
[models.a]
cmd = "server --port ${PROT}"
unload_timeot = 1
"""
MISTAKES = ("listen:", "models.a.cmd:", "models.a.unload_timeot:")


def one_line(text: str) -> str:
    assert text.count("\n") == 1, text
    return text


# ---- arguments and configuration -------------------------------------------------------------


async def test_version():
    """`trioswap --version` prints name and version on one line."""
    done = await trioswap("--version")

    assert (done.returncode, done.stdout, done.stderr) == (0, f"trioswap {__version__}\n", "")


async def test_version_is_quick_because_little_is_imported():
    """The command line imports none of the heavy libraries until a command needs them."""
    code = "import sys, trioswap.cli; print(*sys.modules)"
    done = await trio.run_process([sys.executable, "-c", code], capture_stdout=True)
    imported = {name.partition(".")[0] for name in done.stdout.decode().split()}

    assert "click" in imported
    assert imported.isdisjoint({"trio", "httpx", "hypercorn", "h11", "attr", "attrs", "cattrs", "asyncio"})


async def test_check_accepts(tmp_path):
    """`check` says in one line how much it has read."""
    config = write_config(tmp_path, {"a": scripted(), "b": scripted()}, groups={"g": {"members": ["a"]}})
    done = await trioswap("check", "-c", config)

    assert (done.returncode, done.stderr) == (0, "")
    assert one_line(done.stdout).startswith("no mistakes: 2 models in 2 groups")


@pytest.mark.parametrize("command", ["check", "serve"])
async def test_every_mistake_is_told(command, tmp_path):
    """A bad configuration ends `check` and `serve` with 2 and all its mistakes, one line each."""
    path = tmp_path / "bad.toml"
    path.write_text(BAD)
    done = await trioswap(command, "-c", str(path))

    assert (done.returncode, done.stdout) == (2, "")
    head, *lines = done.stderr.splitlines()
    assert head == f"trioswap: {path}: 3 mistakes"
    assert sorted(line.split()[1] for line in lines) == sorted(MISTAKES)
    assert all(line.startswith(f"  {path}:") for line in lines), "each with its place"


async def test_no_configuration(tmp_path):
    """Without a configuration anywhere the message lists the places."""
    done = await trioswap("serve", cwd=tmp_path, env={**os.environ, "HOME": str(tmp_path)})

    assert (done.returncode, done.stdout) == (2, "")
    for place in ("trioswap.toml", f"{tmp_path}/.config/trioswap/trioswap.toml", "/etc/trioswap/trioswap.toml"):
        assert place in one_line(done.stderr)


@pytest.mark.parametrize("place", ["", ".config/trioswap"])
async def test_configuration_is_found(place, tmp_path):
    """The configuration in the current directory is read, and the one in the home."""
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    write_config(tmp_path / place, {"a": scripted()})
    done = await trioswap("check", cwd=tmp_path, env={**os.environ, "HOME": str(tmp_path)})

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("check", "-c", "a.toml", "-c", "b.toml"), "a.toml"),
        (("check", "-c", "CONFIG", "-c", "CONFIG"), "allowed is once"),
        (("check", "-c", "llama-swap.yaml"), "llama-swap.yaml"),
        (("convert", "settings.ini"), "allowed are *.toml"),
        (("serve", "-c", "CONFIG", "--listen", "8080"), "listen: found"),
        (("serve", "-c", "CONFIG", "--log-level", "warn"), 'did you mean "warning"'),
        (("serve", "--nonsense"), "--nonsense"),
        (("load",), "MODEL"),
    ],
)
async def test_bad_arguments(arguments, words, tmp_path):
    """Bad arguments end with 2 and a sentence about them, never with a traceback."""
    config = write_config(tmp_path, {"a": scripted()})
    done = await trioswap(*(config if word == "CONFIG" else word for word in arguments))

    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr
    assert "Traceback" not in done.stderr


# ---- serve ------------------------------------------------------------------------------------


async def test_port_in_use(tmp_path):
    """A port that is taken ends `serve` with 1 and one line that names it."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = await trioswap("serve", "-c", write_config(tmp_path, {"a": scripted()}), "--listen", address)

    assert (done.returncode, done.stdout) == (1, "")
    assert f"cannot listen on {address}" in one_line(done.stderr)


async def test_serve_from_start_to_stop(tmp_path):
    """`serve` prints one line, answers, and after SIGTERM exits with 0 and leaves no model server."""
    config = write_config(tmp_path, {"a": scripted("--setsid-child", unload_timeout=0.2)})
    async with daemon("serve", "-c", config) as running_daemon:
        status, body = await ask(running_daemon.port, "GET", "/upstream/a/children")
        status_pid, pid = await ask(running_daemon.port, "GET", "/upstream/a/pid")
        assert (status, status_pid) == (200, 200)
        family = [int(pid), *json.loads(body)]
        assert all(map(alive, family))

        assert await running_daemon.stop() == 0
        assert not any(map(alive, family))
        assert one_line(running_daemon.said) == f"trioswap listens on {running_daemon.url}\n"
        assert await running_daemon.process.stdout.receive_some() == b""


async def test_signals_until_the_very_end(tmp_path):
    """Who asks again and again, and once more when all but the exit is done, gets the exit code of a clean stop."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        async with daemon("serve", "-c", write_config(tmp_path, {"a": scripted()})) as served:
            served.process.terminate()
            with trio.fail_after(PATIENCE):
                while served.process.poll() is None:
                    served.process.send_signal(number)
                    await trio.lowlevel.checkpoint()
            assert served.process.returncode == 0


async def test_stdout_that_nobody_reads(tmp_path):
    """A full pipe as standard output holds up neither the start nor the exit."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(writer, bytes(4096)):
            pass
    os.set_blocking(writer, True)
    with notify_socket(tmp_path / "notify") as notices:
        process = await trio.lowlevel.open_process(
            (*TRIOSWAP, "serve", "-c", write_config(tmp_path, {"a": scripted()})),
            stdout=writer,
            env=notices.environment,
        )
        try:
            await notices.wait_for("READY=1")
            process.terminate()
            with trio.fail_after(PATIENCE):
                assert await process.wait() == 0
        finally:
            process.kill()
            os.close(reader)
            os.close(writer)


async def test_closed_stdout_and_stderr(tmp_path):
    """Closed standard streams do no harm: no socket gets their numbers, so no client gets our log lines."""
    port = free_port()
    config = write_config(tmp_path, {"a": scripted()}, listen=f"127.0.0.1:{port}", log_level="debug")
    shell = ("sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *TRIOSWAP, "serve", "-c", config)
    with notify_socket(tmp_path / "notify") as notices:
        process = await trio.lowlevel.open_process(shell, env=notices.environment)
        try:
            await notices.wait_for("READY=1")
            for _ in range(3):
                assert await ask(port, "GET", "/upstream/a/x") == (200, b"a /x")
            assert standard_streams(process.pid) == [Path(os.devnull)] * 3
            process.terminate()
            with trio.fail_after(PATIENCE):
                assert await process.wait() == 0
        finally:
            # Not killed, or its model server would be left; shielded, or a failed test would leave both.
            process.terminate()
            with trio.move_on_after(PATIENCE, shield=True):
                await process.wait()


def standard_streams(pid: int) -> list[Path]:
    return [Path(f"/proc/{pid}/fd/{number}").readlink() for number in range(3)]


# ---- talking to a running daemon ----------------------------------------------------------------


async def test_ps_load_unload_logs(tmp_path):
    """The four commands show and steer what a running daemon does."""
    config = write_config(tmp_path, {"a/b c": scripted(), "other": scripted()})
    async with daemon("serve", "-c", config) as served:
        url = ("--url", served.url)
        loaded = await trioswap("load", "a/b c", *url)
        assert one_line(loaded.stdout).startswith("a/b c is ready (")
        table = await trioswap("ps", *url)
        rows = [line.rsplit(maxsplit=3) for line in table.stdout.splitlines()]
        assert rows == [
            ["MODEL", "STATE", "SERVING", "WAITING"],
            ["a/b c", "ready", "0", "0"],
            ["other", "stopped", "0", "0"],
        ]
        assert (await trioswap("logs", "a/b c", *url)).stdout == "listening\nready\n"
        assert "spawned model=a/b c" in (await trioswap("logs", *url)).stdout
        assert one_line((await trioswap("unload", "a/b c", *url)).stdout).startswith("a/b c is unloaded (")
        assert "ready" not in (await trioswap("ps", *url)).stdout

        await trioswap("load", "other", *url)
        assert one_line((await trioswap("unload", *url)).stdout).startswith("all models are unloaded (")
        assert "ready" not in (await trioswap("ps", env={**os.environ, "TRIOSWAP_URL": served.url})).stdout


async def test_daemon_says_no(tmp_path):
    """What the daemon refuses is told in its own words, on one line, with exit code 1."""
    config = write_config(tmp_path, {"alpha": scripted(), "broken": scripted("--exit-at-start", "7")})
    async with daemon("serve", "-c", config) as served:
        unknown = [await trioswap(command, "alhpa", "--url", served.url) for command in ("load", "unload", "logs")]
        broken = await trioswap("load", "broken", "--url", served.url)

    for done in unknown:
        assert (done.returncode, done.stdout) == (1, "")
        assert 'did you mean "alpha"?' in one_line(done.stderr)
    assert broken.returncode == 1
    assert "exited with 7" in one_line(broken.stderr)


@pytest.mark.parametrize("command", [("ps",), ("load", "a"), ("unload",), ("logs",), ("logs", "-f")])
async def test_no_daemon(command):
    """Without a daemon each command says which URL was asked and how to choose another."""
    url = f"http://127.0.0.1:{free_port()}"
    done = await trioswap(*command, "--url", url)

    assert (done.returncode, done.stdout) == (1, "")
    assert f"at {url}: connection refused" in one_line(done.stderr)
    assert "--url" in done.stderr


@pytest.mark.parametrize("url", ["http://", "http://[::", "http://127.0.0.1:port"])
async def test_no_url(url):
    """What is no URL of ours is an error of one line."""
    done = await trioswap("ps", "--url", url)

    assert (done.returncode, done.stdout) == (1, "")
    assert url in one_line(done.stderr)


@pytest.mark.parametrize(
    ("url", "command"),
    [
        ("localhost:1", ("ps",)),
        ("127.0.0.1:1", ("hold", "1GiB", "true")),
        ("ftp://127.0.0.1", ("plan", "a")),
        ("", ("unload",)),
    ],
)
async def test_an_address_without_its_kind(url, command):
    """The user's mistake, told with what is allowed; nobody is asked."""
    done = await trioswap(*command, "--url", url)

    assert (done.returncode, done.stdout) == (2, "")
    words = f'--url: found "{url}", allowed is http[s]://HOST[:PORT] or unix:/PATH'
    assert one_line(done.stderr) == f"trioswap: {words}\n"


async def test_another_program_at_the_url():
    """A server that is not trioswap is recognised."""
    port = free_port()
    async with running(model_argv("a", port=port), until="listening"):
        done = await trioswap("ps", "--url", f"http://127.0.0.1:{port}")

    assert (done.returncode, done.stdout) == (1, "")
    assert "is not trioswap" in one_line(done.stderr)


async def test_api_key_is_sent():
    """TRIOSWAP_API_KEY goes along as a bearer token."""
    listener = await trio.open_tcp_listeners(0, host="127.0.0.1")
    heads = []

    async def answer(stream):
        heads.append(bytes(await stream.receive_some()))
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nOK")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, answer, listener)
        url = f"http://127.0.0.1:{listener[0].socket.getsockname()[1]}"
        done = await trioswap("unload", "a", "--url", url, env={**os.environ, "TRIOSWAP_API_KEY": "geheim-ä"})
        nursery.cancel_scope.cancel()

    assert done.returncode == 0, done.stderr
    assert "\r\nauthorization: bearer geheim-ä\r\n" in heads[0].decode().lower()


@pytest.fixture
def ctrl_c():
    """Children are not deaf to SIGINT, as they are when a shell has started these tests with `&`."""
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, earlier)


async def test_logs_follow_until_ctrl_c(tmp_path, ctrl_c):
    """`logs -f` goes on with what comes; Ctrl-C ends it as it ends `tail -f`, and without a word."""
    words = tmp_path / "words"
    async with (
        daemon("serve", "-c", write_config(tmp_path, {"a": scripted()})) as served,
        trio.open_nursery() as nursery,
    ):
        follow = (*TRIOSWAP, "logs", "-f", "a", "--url", served.url)
        with words.open("wb") as file, trio.fail_after(PATIENCE):
            process = await nursery.start(
                partial(trio.run_process, follow, stdout=subprocess.PIPE, stderr=file, check=False)
            )
            await trioswap("load", "a", "--url", served.url)
            await read_until(process, "ready\n")
            process.send_signal(signal.SIGINT)
            assert await process.wait() == -signal.SIGINT
            await process.stdout.aclose()
    assert words.read_bytes() == b""


async def test_reader_that_left(tmp_path):
    """`trioswap logs | head` ends without a word when head has seen enough."""
    async with daemon("serve", "-c", write_config(tmp_path, {"a": scripted()})) as served:
        reader, writer = os.pipe()
        os.close(reader)
        done = await trioswap("logs", "--url", served.url, stdout=writer)
        os.close(writer)

    assert done.stderr == ""
