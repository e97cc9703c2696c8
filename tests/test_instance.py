"""One daemon for a state directory, and what earlier ones have left: real locks, real processes, real daemons."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import math
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import TextIO

import attrs
import pytest
import trio
import trio.testing
from children import PATIENCE, alive, python, running, wait_gone
from commands import daemon as command
from commands import trioswap
from daemons import daemon, document, eventually, fetch, scripted, write_config

from trioswap import guard, instance, proctree
from trioswap.config import Config, loads
from trioswap.daemon import _reaped, serve
from trioswap.errors import Misuse
from trioswap.guardian import NOBODY
from trioswap.instance import FILE, GUARDIAN_FILE, claimed
from trioswap.logs import Logs

needs_proc = pytest.mark.skipif(not proctree.PROC.joinpath("self/stat").exists(), reason="there is no /proc")

SLEEPS = python("import signal; print('up'); signal.pause()")
DEAF = python("import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up'); signal.pause()")
# Others run at the same time, and each sweep stops all of its instance.
A, B = f"a{os.getpid():07x}", f"b{os.getpid():07x}"


def written(directory: Path) -> dict[str, object]:
    return json.loads((directory / FILE).read_text())


def write(directory: Path, *instances: object, **changes: object) -> None:
    """The file as a daemon has left it that was killed."""
    found = {"pid": 1, "start_time": 2, "instances": instances, **changes}
    (directory / FILE).write_text(json.dumps(found))


def marked(name: str) -> dict[str, str]:
    return {proctree.MARKER: name}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No test waits a second for those who are deaf."""
    monkeypatch.setattr(instance, "GRACE", 0.1)


# ---- one daemon ---------------------------------------------------------------------------------


async def test_a_second_daemon_is_refused(tmp_path):
    """With 2, naming the directory and the first one's pid, without a traceback; with its own directory it runs."""
    state = tmp_path / "state"
    path = write_config(tmp_path, {"a": scripted()}, state_dir=str(state))
    async with command("serve", "-c", path) as first:
        done = await trioswap("serve", "-c", path)
        assert done.returncode == 2
        assert f"the state directory {state} is in use by another trioswap (pid {first.process.pid})" in done.stderr
        assert 'state_dir = "..."' in done.stderr
        assert "Traceback" not in done.stderr
        async with command("serve", "-c", write_config(tmp_path, {"a": scripted()})) as second:
            assert (await fetch(second.port, "GET", "/health")).status == 200
        assert (await fetch(first.port, "GET", "/health")).status == 200
        first.process.kill()
        await first.process.wait()
        async with command("serve", "-c", path) as third:
            assert (await fetch(third.port, "GET", "/health")).status == 200


async def test_the_claim_ends_with_the_block(tmp_path):
    """And while it lasts nobody else gets one."""
    with claimed(tmp_path / "new" / "state") as claim:
        await claim.reap()
        with pytest.raises(Misuse, match=f"pid {os.getpid()}"), claimed(tmp_path / "new" / "state"):
            pass
        assert written(tmp_path / "new" / "state")["instances"] == [claim.instance], "the refused one writes nothing"
    assert oct((tmp_path / "new" / "state" / FILE).stat().st_mode)[-3:] == "600", "or others could lock it too"
    with claimed(tmp_path / "new" / "state") as again:
        assert again.instance != claim.instance


def test_a_child_does_not_inherit_the_claim(tmp_path):
    """A model server that outlives the daemon keeps no other from starting."""
    with claimed(tmp_path):
        child = subprocess.Popen(SLEEPS, stdout=subprocess.PIPE, close_fds=False)
    try:
        assert child.stdout.read(2) == b"up"
        with claimed(tmp_path):
            pass
    finally:
        child.kill()
        child.communicate()


@pytest.mark.parametrize("how", ["moved", "removed"])
async def test_the_file_of_another_daemon_is_never_written(tmp_path, caplog, how):
    """The path leads to that when the directory was replaced: both run, and each has its own."""
    first, second, state = tmp_path / "first", tmp_path / "second", tmp_path / "state"
    first.mkdir()
    second.mkdir()
    state.symlink_to(first)
    with claimed(state) as claim:
        await claim.reap()
        if how == "moved":
            state.unlink()
            state.symlink_to(second)
        else:
            shutil.rmtree(first)
            first.mkdir()
        with claimed(state) as other:
            await other.reap()
            before = written(state)
            claim.write()
            assert written(state) == before
            claim.note(claim.marker(1), changed=True)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(claim.keep)
                await eventually(partial(is_logged_twice, caplog, "another has taken its place"))
                nursery.cancel_scope.cancel(reason="seen")
            assert written(state) == before
            assert before["instances"] == [other.instance]


async def is_logged_twice(caplog: pytest.LogCaptureFixture, text: str) -> bool:
    return caplog.text.count(text) == 2


async def test_who_holds_it_is_in_the_file(tmp_path):
    """Pid and start time, those before, and the id that the markers begin with once something may be started."""
    write(tmp_path, A)
    with claimed(tmp_path) as claim:
        me = proctree.look(os.getpid())
        expected = {"pid": me.pid, "start_time": me.start_time, "instances": [A], "changed": []}
        assert written(tmp_path) == expected
        await claim.reap()
        assert written(tmp_path) == {**expected, "instances": [claim.instance]}
    assert written(tmp_path) == {**expected, "instances": [claim.instance]}


async def test_starts_that_fail_leave_no_trace(tmp_path):
    """A port that is taken, and a service manager that tries again for ever: the file must not grow."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = {"state_dir": str(tmp_path), "listen": f"127.0.0.1:{taken.getsockname()[1]}"}
        path = write_config(tmp_path, {"a": scripted()}, **settings)
        write(tmp_path, A)
        assert (await trioswap("serve", "-c", path)).returncode == 1
    assert written(tmp_path)["instances"] == [A]


async def test_a_directory_that_cannot_be_written_is_one_warning(tmp_path, caplog):
    """The daemon runs without."""
    (tmp_path / "file").write_text("")
    with claimed(tmp_path / "file" / "state") as claim:
        await claim.reap()
        assert claim.marker(7) == f"{claim.instance}-7"
    assert len(caplog.records) == 1
    assert "cannot be claimed" in caplog.text


async def test_where_there_are_no_locks_nothing_is_stopped(tmp_path, caplog, monkeypatch):
    """What the file names may be alive and well."""

    def flock(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(instance.fcntl, "flock", flock)
    write(tmp_path, A)
    before = written(tmp_path)
    with claimed(tmp_path) as claim:
        assert claim.earlier == ()
    assert written(tmp_path) == before
    assert "Operation not supported" in caplog.text


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "5",
        '{"pid": 5}',
        '{"pid": "x", "start_time": 1, "instances": []}',
        "\xff\0",
        '{"pid": Infinity, "start_time": 1, "instances": []}',
        "[" * 50_000,
    ],
)
async def test_a_file_that_makes_no_sense_is_written_anew(tmp_path, caplog, text):
    """With a warning, for something may be left."""
    (tmp_path / FILE).write_text(text, encoding="latin-1")
    with claimed(tmp_path) as claim:
        assert claim.earlier == ()
        await claim.reap()
        assert written(tmp_path)["instances"] == [claim.instance]
    assert "cannot be read" in caplog.text


def test_a_file_that_cannot_be_read_is_one_warning(tmp_path, caplog):
    """A disk that fails, say: the daemon runs."""
    (tmp_path / FILE).symlink_to("/proc/self/mem")  # whose beginning is EIO
    with claimed(tmp_path) as claim:
        assert claim.earlier == ()
    assert "Input/output error" in caplog.text


def test_what_a_longer_line_has_left_is_no_nonsense(tmp_path, caplog):
    """The daemon before was killed between writing and cutting off."""
    write(tmp_path, A)
    with (tmp_path / FILE).open("a") as file:
        file.write('\n"bbbb1111"]}\n')
    with claimed(tmp_path) as claim:
        assert claim.earlier == (A,)
    assert caplog.text == ""


def test_nobody_else_may_write_to_the_directory(tmp_path):
    """Whoever can, can have the models of another daemon of this user stopped."""
    mask = os.umask(0)
    try:
        with claimed(tmp_path / "new"):
            assert oct((tmp_path / "new").stat().st_mode)[-3:] == "700"
    finally:
        os.umask(mask)


def test_only_real_ids_are_believed(tmp_path):
    """An empty one would be found in everybody's marker."""
    write(tmp_path, "", A, "a", 5, None, "AAAA0000", f"{A}-1", [A])
    with claimed(tmp_path) as claim:
        assert claim.earlier == (A,)


# ---- the guardian of the daemon before ------------------------------------------------------------


@contextmanager
def guardian_at_work(directory: Path) -> Iterator[TextIO]:
    """The file as a guardian that lives has it."""
    with (directory / GUARDIAN_FILE).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


async def is_waiting(caplog: pytest.LogCaptureFixture) -> bool:
    return "its end is waited for" in caplog.text


async def test_the_guardian_of_an_earlier_daemon_is_waited_for(tmp_path, caplog, monkeypatch):
    """Meanwhile a further daemon is refused at once; without a guardian there is nothing to wait for."""
    monkeypatch.setattr(guard, "PATIENCE", math.inf)
    write(tmp_path, A)
    with guardian_at_work(tmp_path), claimed(tmp_path) as claim:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(claim.reap)
            await eventually(partial(is_waiting, caplog))
            with pytest.raises(Misuse, match=f"pid {os.getpid()}"), claimed(tmp_path):
                pass
            assert written(tmp_path)["instances"] == [A]
            nursery.cancel_scope.cancel(reason="seen")
        assert written(tmp_path)["instances"] == [A]
    caplog.clear()
    with claimed(tmp_path) as claim, trio.fail_after(PATIENCE):
        await claim.reap()
        assert written(tmp_path)["instances"] == [claim.instance]
    assert caplog.text == ""


async def test_a_guardian_that_hangs_is_not_waited_for_for_ever(tmp_path, caplog, monkeypatch):
    """It sleeps in the kernel, say; what it may still do is said."""
    monkeypatch.setattr(guard, "PATIENCE", 0.1)
    with guardian_at_work(tmp_path), claimed(tmp_path) as claim, trio.fail_after(PATIENCE):
        await claim.reap()
        assert written(tmp_path)["instances"] == [claim.instance]
    assert "has not ended within 0.1 s; should it still run a cmd_stop" in caplog.text


async def test_a_guardian_that_ends_too_late_makes_room_for_ours(tmp_path, caplog, monkeypatch):
    """The file is locked from then on, so that the next daemon waits for ours, which has it, too."""
    monkeypatch.setattr(guard, "PATIENCE", 0.1)
    with guardian_at_work(tmp_path) as theirs:
        async with daemon({"a": scripted()}, state_dir=str(tmp_path)):
            theirs.close()
            assert "has not ended within 0.1 s" in caplog.text
            await eventually(partial(is_taken, tmp_path / GUARDIAN_FILE))


async def is_taken(path: Path) -> bool:
    with path.open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


async def test_without_the_guardians_file_nothing_is_waited_for(tmp_path, caplog):
    """One warning, and the daemon runs."""
    (tmp_path / GUARDIAN_FILE).mkdir()
    with claimed(tmp_path) as claim:
        await claim.reap()
        assert claim.guardian_file is None
        assert written(tmp_path)["instances"] == [claim.instance]
    [record] = caplog.records
    assert "will not wait until its guardian has ended" in record.getMessage()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_the_wait(tmp_path, caplog, monkeypatch, number):
    """As Ctrl-C does; the daemon starts nothing, and ends in good order."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(guard, "PATIENCE", math.inf)
    with guardian_at_work(tmp_path), trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, loads(document({"a": scripted()}, state_dir=str(tmp_path))), Logs())
            await eventually(partial(is_waiting, caplog))
            signal.raise_signal(number)
    assert f"received {number.name} before anything was started" in caplog.text
    assert "the guardian has been told" not in caplog.text


@attrs.frozen
class Reaping:
    """A claim whose wait is what a test makes of it."""

    reap: Callable[[], Awaitable[None]]


async def test_a_signal_as_the_wait_ends_is_not_lost():
    """In the very tick: it stops the daemon now, or is there for whoever reads next."""
    token = trio.lowlevel.current_trio_token()

    async def reap() -> None:
        over = trio.Event()
        token.run_sync_soon(signal.raise_signal, signal.SIGTERM)
        token.run_sync_soon(over.set)
        await over.wait()

    with trio.fail_after(PATIENCE):
        for _ in range(50):
            with trio.open_signal_receiver(signal.SIGTERM) as signals:
                if await _reaped(Reaping(reap), signals):
                    assert await anext(signals) == signal.SIGTERM


async def test_a_second_signal_does_not_spoil_the_end():
    """A sweep cannot be cut short, and whoever is impatient meanwhile gets a clean exit all the same."""
    too_late: list[int] = []

    async def reap() -> None:
        with trio.CancelScope(shield=True):
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGTERM):
                signal.raise_signal(number)
                await trio.testing.wait_all_tasks_blocked()

    def note(number: int, _: object) -> None:
        too_late.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        with trio.open_signal_receiver(*before) as signals, trio.fail_after(PATIENCE):
            assert not await _reaped(Reaping(reap), signals)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert too_late == []


async def test_a_reload_that_is_asked_for_meanwhile_comes_afterwards(tmp_path, caplog, monkeypatch):
    """The file was read before the wait, and may have changed since."""
    monkeypatch.setattr(guard, "PATIENCE", math.inf)
    config, read = loads(document({"a": scripted()}, state_dir=str(tmp_path))), trio.Event()
    token = trio.lowlevel.current_trio_token()

    def reread(before: Config) -> Config:
        token.run_sync_soon(read.set)
        return before

    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            with guardian_at_work(tmp_path):
                nursery.start_soon(serve, config, Logs(), reread)
                await eventually(partial(is_waiting, caplog))
                signal.raise_signal(signal.SIGHUP)
                await trio.testing.wait_all_tasks_blocked()
                assert not read.is_set()
            await read.wait()
            signal.raise_signal(signal.SIGTERM)


# ---- what is left ---------------------------------------------------------------------------------


@asynccontextmanager
async def claim_after(directory: Path, *instances: str) -> AsyncIterator[instance.Claim]:
    write(directory, *instances)
    with claimed(directory) as claim:
        yield claim


@needs_proc
async def test_what_carries_the_marker_of_an_earlier_instance_is_stopped(tmp_path, caplog):
    """SIGTERM, and SIGKILL to the deaf, a warning for each; then they are forgotten."""
    async with (
        running(SLEEPS, until="up", env=marked(f"{A}-1")) as polite,
        running(DEAF, until="up", env=marked(f"{B}-22")) as deaf,
        claim_after(tmp_path, A, B) as claim,
    ):
        await claim.reap()
        assert await polite.wait() == -signal.SIGTERM
        assert await deaf.wait() == -signal.SIGKILL
        assert written(tmp_path)["instances"] == [claim.instance]
        name = SLEEPS[0].rpartition("/")[2][:15]
        said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert sorted(said) == sorted(
            f"an earlier daemon has left pid={child.pid} {name} attempt={marker}; it was stopped"
            for child, marker in ((polite, f"{A}-1"), (deaf, f"{B}-22"))
        )


@needs_proc
async def test_everybody_else_is_left_alone(tmp_path, caplog):
    """Another instance, the present one, a similar marker, a process with the pid that the file names."""
    async with trio.open_nursery() as nursery:
        with claimed(tmp_path / "other") as other:
            others = [f"{B}-1", A, f"x{A}-1", f"{A}0-1", other.marker(1)]
            children = [await nursery.start(run_child, marker) for marker in others]
            write(tmp_path, A, pid=children[0], start_time=proctree.look(children[0]).start_time)
            with claimed(tmp_path) as claim:
                children.append(await nursery.start(run_child, claim.marker(1)))
                await claim.reap()
        assert all(map(alive, children))
        assert "left" not in caplog.text
        nursery.cancel_scope.cancel(reason="seen")


async def run_child(marker: str, argv: tuple[str, ...] = SLEEPS, *, task_status: trio.TaskStatus[int]) -> None:
    async with running(argv, until="up", env=marked(marker)) as child:
        task_status.started(child.pid)
        await trio.sleep_forever()


@needs_proc
async def test_who_must_never_be_killed_is_not_forgotten(tmp_path, caplog):
    """It gets SIGTERM, is said to be there, and the next start tries again."""
    spared = f"{A}-1{guard.SPARED}"
    async with running(DEAF, until="up", env=marked(spared)) as deaf:
        async with claim_after(tmp_path, A, B) as claim:
            await claim.reap()
            assert alive(deaf.pid)
            assert f"attempt={spared}; it is still there" in caplog.text
            assert written(tmp_path)["instances"] == [A, claim.instance]
            assert claim.marker(1, never_kill=True) == f"{claim.instance}-1{guard.SPARED}"
        deaf.kill()
        await deaf.wait()
        with claimed(tmp_path) as again:
            assert again.earlier == (A, claim.instance)
            await again.reap()
            assert written(tmp_path)["instances"] == [again.instance]


@needs_proc
async def test_who_must_never_be_killed_and_ends_in_time_is_not_left(tmp_path, monkeypatch):
    """It is waited for as the others are, so its model is not in quarantine for a moment's sake."""
    monkeypatch.setattr(instance, "GRACE", PATIENCE)
    monkeypatch.setattr(instance, "PATIENCE", 2 * PATIENCE)
    end, looks, look = tmp_path / "end", 0, guard.Sweep.look
    os.mkfifo(end)

    def count(sweep: guard.Sweep) -> set[guard.Identity]:
        nonlocal looks
        looks += 1
        if looks == 5:
            end.write_text("now")
        return look(sweep)

    monkeypatch.setattr(guard.Sweep, "look", count)
    code = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(len(open(sys.argv[1]).read())));"
    argv = (*python(f"{code} print('up'); signal.pause()"), str(end))
    marker = instance.Claim(A).marker(1, "m", never_kill=True)
    async with running(argv, until="up", env=marked(marker)) as polite, claim_after(tmp_path, A) as claim:
        await claim.reap()
        assert claim.left == ()
        assert polite.poll() == len("now")
        assert written(tmp_path)["instances"] == [claim.instance]


async def test_what_a_reload_has_changed_is_in_the_file(tmp_path):
    """For as long as the attempt runs, and what earlier daemons noted for as long as one of theirs may."""
    write(tmp_path, A, changed=[f"{A}-1", f"{B}-1", 5])
    with claimed(tmp_path) as claim:
        assert written(tmp_path)["changed"] == [f"{A}-1"]
        await claim.reap()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(claim.keep)
            marker = claim.marker(1)
            watcher = instance.Noting(claim, NOBODY, marker)
            watcher.began(os.getpid(), marker)
            watcher.began(os.getpid(), marker + guard.SPARED)
            await eventually(partial(is_changed, tmp_path, marker + guard.SPARED))
            watcher.ended(marker + guard.SPARED)
            await eventually(partial(is_changed, tmp_path))
            nursery.cancel_scope.cancel(reason="seen")


async def is_changed(directory: Path, *markers: str) -> bool:
    return written(directory)["changed"] == [*markers]


@needs_proc
async def test_what_has_not_loaded_its_program_is_not_forgotten(tmp_path, caplog, monkeypatch):
    """It has no marker, and where a file system does not answer no signal ends it."""
    monkeypatch.setattr(guard, "send", lambda *_: None)
    monkeypatch.setattr(instance, "PATIENCE", 0.1)
    code = f"open('/proc/self/comm', 'w').write({guard.thread_name(A)!r}); import signal; print('up'); signal.pause()"
    async with running(python(code), until="up") as child, claim_after(tmp_path, A, B) as claim:
        await claim.reap()
        assert f"pid={child.pid} {guard.thread_name(A)} attempt=; it is still there" in caplog.text
        assert written(tmp_path)["instances"] == [A, claim.instance]
        assert claim.left == (), "of which model it is nobody knows"


@needs_proc
async def test_while_nobody_can_say_nobody_is_forgotten(tmp_path, caplog, monkeypatch):
    """The machine has no descriptor left, say; the next start looks again."""

    def refuse() -> list[int]:
        raise OSError(errno.ENFILE, "Too many open files in system")

    monkeypatch.setattr(instance, "PATIENCE", 0.1)
    async with running(SLEEPS, until="up", env=marked(f"{A}-1")) as child:
        async with claim_after(tmp_path, A) as claim:
            with monkeypatch.context() as patch:
                patch.setattr(guard, "pids", refuse)
                await claim.reap()
            assert written(tmp_path)["instances"] == [A, claim.instance]
            assert "cannot be seen" in caplog.text
        monkeypatch.setattr(instance, "PATIENCE", PATIENCE)
        with claimed(tmp_path) as again:
            await again.reap()
            assert await child.wait() == -signal.SIGTERM
            assert written(tmp_path)["instances"] == [again.instance]


@needs_proc
async def test_who_is_left_is_known_by_model(tmp_path):
    """With all markers of its attempts; not who was ended, nor who is of an earlier version and does not say."""
    with claimed(tmp_path / "other") as other:
        spared = [other.marker(number, "m", never_kill=True) for number in (1, 2)]
        killed, silent = other.marker(3, "n"), other.marker(4, never_kill=True)
    async with trio.open_nursery() as nursery:
        children = {marker: await nursery.start(run_child, marker, DEAF) for marker in (*spared, killed, silent)}
        async with claim_after(tmp_path, other.instance) as claim:
            assert claim.left == ()
            await claim.reap()
            [found] = claim.left
            assert (found.model, set(found.markers)) == ("m", set(spared))
            assert set(found.processes) == {proctree.look(children[marker]) for marker in spared}
        nursery.cancel_scope.cancel(reason="seen")


@pytest.mark.parametrize(
    "model", ["m", "spared", "x-spared", "-spared", ":", "a:b", "org/model", "two words", "100%", "%2D", "Größe\n"]
)
@pytest.mark.parametrize("never_kill", [False, True])
def test_a_marker_names_its_model(model, never_kill):
    """In one word, whatever the name; and who is called "spared" is not."""
    claim = instance.Claim(A)
    marker = claim.marker(7, model, never_kill=never_kill)
    sweep = guard.Sweep([A], {})
    sweep.found[1, 2], sweep.left = (marker, "python"), {(1, 2)}

    assert marker.isprintable()
    assert len(marker.split()) == 1
    assert marker.endswith(guard.SPARED) is never_kill
    assert marker.startswith(f"{A}-7:")
    [left] = instance._by_model(sweep)
    assert (left.model, left.markers, left.processes) == (model, (marker,), (proctree.Process(1, 2, "python"),))


@needs_proc
async def test_a_start_that_is_killed_forgets_nothing(tmp_path):
    """The file names earlier instances until nothing is left of them."""
    async with running(DEAF, until="up", env=marked(f"{A}-1")) as deaf:
        async with claim_after(tmp_path, A):
            pass  # here it was killed
        with claimed(tmp_path) as claim:
            assert claim.earlier == (A,)
            await claim.reap()
            assert await deaf.wait() == -signal.SIGKILL


@needs_proc
async def test_orphans_are_gone_before_a_model_is_preloaded(tmp_path):
    """Else the memory, or the port, that they have would fail it."""
    model = scripted()
    path = write_config(tmp_path, {"a": model}, state_dir=str(tmp_path), hooks={"on_startup": {"preload": ["a"]}})
    write(tmp_path, A)
    async with running(model.table("a")["cmd"], until="ready", env=marked(f"{A}-3")) as orphan:
        async with command("serve", "-c", path) as served:
            assert not alive(orphan.pid)
            await eventually(partial(is_ready, served.port))
        await wait_gone(orphan.pid)


async def is_ready(port: int) -> bool:
    rows = (await fetch(port, "GET", "/running")).json()["running"]
    return [row["state"] for row in rows] == ["ready"]
