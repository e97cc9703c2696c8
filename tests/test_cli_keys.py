"""`trioswap key`: what it prints lets a client in, and a key is in no place where it does not belong."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pty
import re
import subprocess
import tomllib
from functools import partial

import pytest
import trio
from children import PATIENCE
from commands import TRIOSWAP, trioswap

from trioswap.access import Keyring
from trioswap.config import loads

# 32 bytes in base64 without padding are 43 letters.
KEY = re.compile(r"ts-[A-Za-z0-9_-]{43}")


def hash_of(key: str) -> str:
    return f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"


def printed(done: subprocess.CompletedProcess[str]) -> tuple[str, dict[str, object]]:
    """The key and the lines of TOML that `key new` printed."""
    assert (done.returncode, done.stderr) == (0, "")
    key, gap, toml = done.stdout.partition("\n\n")
    assert gap
    assert KEY.fullmatch(key)
    return key, tomllib.loads(toml)


@pytest.mark.parametrize("name", ["laptop", "my laptop", "a.b", 'qu"ote', "k\u00e9y", "back\\slash"])
async def test_new_makes_a_key_for_a_client(name):
    """The key alone in its line, then the table with the name, quoted where TOML wants that, and the hash."""
    key, document = printed(await trioswap("key", "new", name))

    assert document == {"keys": {name: {"hash": hash_of(key)}}}


async def test_new_without_a_name():
    """There is one to be replaced."""
    done = await trioswap("key", "new")
    key, _ = printed(done)

    assert done.stdout == f'{key}\n\n[keys.client]\nhash = "{hash_of(key)}"\n'


async def test_no_key_is_made_twice():
    """Two runs, two keys."""
    keys = {printed(await trioswap("key", "new"))[0] for _ in range(2)}

    assert len(keys) == 2


async def test_what_is_printed_lets_in():
    """In a configuration as it is, whoever shows the key is known by the name."""
    done = await trioswap("key", "new", "my laptop")
    key, _, toml = done.stdout.partition("\n\n")
    keys = Keyring.of(loads(toml))

    assert keys.find([(b"authorization", f"Bearer {key}".encode())]).name == "my laptop"
    assert keys.find([(b"authorization", f"Bearer {key}x".encode())]) is None


@pytest.mark.parametrize("name", ["", " laptop", "lap\ntop", "lap\ttop", "\x7f"])
async def test_new_with_a_name_that_is_none(name):
    """The configuration would refuse it, too; and no key is printed."""
    done = await trioswap("key", "new", name)

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("trioswap: NAME: found ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
@pytest.mark.parametrize("key", ["k1", "k\u00e9y", "\N{KEY}" * 4096])
async def test_hash_of_what_is_piped_in(key, end):
    """In UTF-8; a line break behind the key is none of it, and the key itself is not printed."""
    done = await trioswap("key", "hash", stdin=f"{key}{end}".encode())

    assert (done.returncode, done.stdout, done.stderr) == (0, f"{hash_of(key)}\n", "")


async def test_hash_knows_the_keys_of_new():
    """Both commands say the same of a key."""
    key, document = printed(await trioswap("key", "new", "laptop"))
    done = await trioswap("key", "hash", stdin=f"{key}\n".encode())

    assert done.stdout == f"{document['keys']['laptop']['hash']}\n"


@pytest.mark.parametrize(
    "written",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"\n", id="an empty line"),
        pytest.param(b"secret 1\n", id="a space within"),
        pytest.param(b" secret\n", id="a space before"),
        pytest.param(b"secret\nsecret\n", id="two lines"),
        pytest.param(b"secret\n\n", id="an empty line behind"),
        pytest.param(b"secret\0", id="a control character"),
        pytest.param(b"secret\xff", id="no UTF-8"),
        pytest.param(b"secret" * 1000, id="very much"),
        pytest.param(b"secret" * 10_000, id="too much to be read"),
    ],
)
async def test_hash_of_what_is_no_key(written):
    """The message does not repeat it: it may have been meant as one."""
    done = await trioswap("key", "hash", stdin=written)

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("trioswap: found something else on the standard input, allowed is one key")
    assert "secret" not in done.stderr


async def test_hash_on_a_terminal_shows_no_key():
    """It asks, on the standard error so that the hash alone can be redirected, and nothing echoes."""
    ours, theirs = pty.openpty()
    # A session of its own has no terminal but its standard input.
    command = partial(
        trio.run_process, (*TRIOSWAP, "key", "hash"),
        stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    said = b""
    try:
        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                process = await nursery.start(command)
                while not said.endswith(b"Key: "):  # what is written before the space at the end echoes
                    data = await process.stderr.receive_some()
                    assert data, said
                    said += data
                os.write(ours, b"s3cret\n")
                output = b"".join([data async for data in process.stdout])
                said += b"".join([data async for data in process.stderr])
        echoed = what_came(ours)
    finally:
        os.close(ours)
        os.close(theirs)

    assert output.decode() == f"{hash_of('s3cret')}\n"
    assert b"s3cret" not in said + echoed


def what_came(terminal: int) -> bytes:
    """What can be read without waiting."""
    os.set_blocking(terminal, False)
    with contextlib.suppress(BlockingIOError):
        return os.read(terminal, 1000)
    return b""
