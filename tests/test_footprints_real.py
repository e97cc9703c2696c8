"""The memory budget at work: a real daemon, real servers that really allocate, and /proc as the judge.

No number of this machine decides: what a server uses is measured first, and the budget made of that.
"""

from __future__ import annotations

import itertools
import json
import os
import random
from pathlib import Path

import attrs
import pytest
import trio
from children import free_port, model_argv, python, running
from commands import daemon as command
from daemons import Scripted, at_once, chat, daemon, eventually, fetch, is_running, scripted
from daemons import running as rows

from trioswap.group import SwapGroup
from trioswap.lifecycle import OCCUPIED
from trioswap.messages import Start, Stop, Swap
from trioswap.state import FILE

MIB = 2**20


# ---- what /proc says ------------------------------------------------------------------------


def rss(pid: int) -> int:
    """Bytes that the process has in memory; none once it is dead."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    line = next((line for line in status.splitlines() if line.startswith("VmRSS:")), "VmRSS: 0 kB")
    return int(line.split()[1]) * 1024


def servers() -> list[int]:
    """The children of this process but its guardian, which are the model servers of the daemon in it."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            after_name = (directory / "stat").read_text().rpartition(")")[2].split()
            is_guardian = b"guard.py" in (directory / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(after_name[1]) == os.getpid() and not is_guardian:
            found.append(int(directory.name))
    return found


def in_use() -> int:
    """Bytes that all model servers have in memory."""
    return sum(map(rss, servers()))


async def alone(megabytes: int) -> int:
    """Bytes that a server that allocates so much has in memory when it is ready."""
    argv = model_argv("alone", "--allocate", megabytes * MIB, port=free_port())
    async with running(argv, until="ready") as server:
        return rss(server.pid)


# ---- what the daemon decides ----------------------------------------------------------------


@attrs.define(eq=False)
class Ledger:
    """Looks at everybody's memory in the very step in which something is decided."""

    budget: int
    """Bytes."""
    starts: list[str] = attrs.field(factory=list)
    evictions: list[str] = attrs.field(factory=list)
    holdings: list[int] = attrs.field(factory=list)
    """Of each start: what it may use of the host's memory."""
    faults: list[str] = attrs.field(factory=list)

    def note(self, group: SwapGroup, command: object) -> None:
        """Judge *command*, which was just carried out."""
        match command:
            case Start(model, _, holding):
                self.starts.append(model)
                self.holdings.append(holding["ram"])
                if in_use() + holding["ram"] > self.budget and holding["ram"] < self.budget:
                    self.faults.append(f"{model} starts with {holding} beside {in_use()} bytes in use")
                if holding["ram"] == self.budget and servers():
                    self.faults.append(f"{model} starts with all there is beside {len(servers())} servers")
            case Swap(_, evictions):
                self.evictions += [eviction.model for eviction in evictions]
            case Stop(model):
                self.evictions.append(model)
        reserved = sum(m.holding["ram"] for m in group.core.models.values() if m.state in OCCUPIED)
        if reserved > self.budget:
            self.faults.append(f"{reserved} bytes are reserved after {command}")


@pytest.fixture
def watch(monkeypatch):
    """Makes a ledger of all that is decided from now on."""

    def watch(budget: int) -> Ledger:
        ledger, original = Ledger(budget), SwapGroup._obey

        def obey(self, command) -> None:
            original(self, command)
            ledger.note(self, command)

        monkeypatch.setattr(SwapGroup, "_obey", obey)
        return ledger

    return watch


def counted(budget: int, **more: object) -> dict[str, object]:
    """The table [memory] with so many bytes of host memory and nothing kept free."""
    return {"headroom": 0, "devices": {"ram": budget}, **more}


async def ask(port: int, model: str, **script: object) -> None:
    answer = await fetch(port, "POST", "/v1/chat/completions", chat(model, **script))
    assert (answer.status, answer.json()["model"]) == (200, model), answer.text


async def ready(port: int) -> set[str]:
    return {name for name, row in (await rows(port)).items() if row["state"] == "ready"}


def learned(directory: Path) -> dict[str, int]:
    """Bytes of host memory that the file says each model needs."""
    models = json.loads((directory / FILE).read_text())["models"]
    return {name: entry["memory"]["peak"]["ram"] for name, entry in models.items() if entry["memory"]}


# ---- the budget --------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [{"a": 64, "b": 64, "c": 64}, {"a": 128, "b": 80, "c": 32}], ids=["equal", "unequal"])
async def test_as_many_as_fit_are_resident_and_never_more(tmp_path, watch, sizes):
    """Nothing is declared.  After a round each, whoever fits together stays together, over a restart, too."""
    needs = {name: await alone(size) for name, size in sizes.items()}
    # Two fit, all three do not; where they are not equal, the two larger ones do not either.
    spare = needs["c"] if sizes["b"] == sizes["c"] else needs["b"] - needs["c"]
    budget = needs["a"] + needs["c"] + spare // 2
    models = {name: scripted("--allocate", size * MIB, linger=0, turn_lease=0) for name, size in sizes.items()}
    settings = {"memory": counted(budget), "state_dir": str(tmp_path)}
    ledger = watch(budget)

    async with daemon(models, **settings) as first:
        for model in "abc":
            await ask(first.port, model)
        assert ledger.holdings == [budget] * 3, "of whom nothing is known has the machine for itself"
        await ask(first.port, "a")  # which puts out the last of these
        await walk_through_orders(first.port, ledger, needs)
        for model in "ac":
            await ask(first.port, model)
        # Which two depends on whose load was measured to cost least, where all are equal.
        assert len(await ready(first.port)) == 2, "they share"
    assert ledger.faults == []
    assert learned(tmp_path) == {name: pytest.approx(size, rel=0.2) for name, size in needs.items()}

    ledger = watch(budget)
    async with daemon(models, **settings) as second:
        for model in "ac":
            await ask(second.port, model)
        assert await ready(second.port) == {"a", "c"}
        assert (ledger.starts, ledger.evictions) == (["a", "c"], []), "they share from the first request on"
        assert ledger.holdings == [learned(tmp_path)[name] for name in "ac"]
    assert ledger.faults == []


async def walk_through_orders(port: int, ledger: Ledger, needs: dict[str, int]) -> None:
    """Ask for the models in every order, then by chance, then all at once; nothing is done without need."""
    orders = [model for order in itertools.permutations(needs) for model in order]
    chance = random.Random(7)
    for model in [*orders, *(chance.choice(sorted(needs)) for _ in range(20))]:
        resident, starts, gone = await ready(port), len(ledger.starts), len(ledger.evictions)
        await ask(port, model)
        fits = sum(needs[name] for name in resident | {model}) <= ledger.budget
        assert len(ledger.starts) - starts == (model not in resident), "one start, where it is needed"
        if model in resident or fits:
            assert len(ledger.evictions) == gone, f"{ledger.evictions[gone:]} went for {model} beside {resident}"
        assert in_use() <= ledger.budget
    for _ in range(3):
        await at_once([lambda m=model: ask(port, m) for model in needs for _ in range(2)])
        assert in_use() <= ledger.budget


async def test_what_grows_while_it_serves_is_seen(watch):
    """Two fit; one of them grows over what is left, and the idle one goes, because nobody else can."""
    one = await alone(48)
    budget = 3 * one
    watch(budget)
    models = {name: scripted("--allocate", 48 * MIB, memory=one, linger=0, turn_lease=0) for name in "ab"}
    async with daemon(models, memory=counted(budget)) as running_daemon:
        port = running_daemon.port
        await ask(port, "b")
        await ask(port, "a")
        assert await ready(port) == {"a", "b"}
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetch, port, "POST", "/v1/chat/completions", chat("a", grow=2 * one, hold=True))
            await eventually(lambda: is_running(port, "a", serving=1))

            async def b_is_gone() -> bool:
                return "b" not in await rows(port)

            await eventually(b_is_gone)
            assert await ready(port) == {"a"}
            nursery.cancel_scope.cancel()


async def test_only_the_devices_that_are_written_count():
    """A budget for a GPU alone: the host's memory that every server uses puts out nobody."""
    models = {name: scripted(memory=40) for name in "ab"}
    async with daemon(models, memory={"headroom": 0, "devices": {"gpu0": 100}}) as running_daemon:
        for model in "abab":
            await ask(running_daemon.port, model)
        assert await ready(running_daemon.port) == {"a", "b"}


async def test_what_was_taken_just_before_the_end_is_learned(tmp_path):
    """It grows with its only request and is put out at once: the last look is when it is told to stop."""
    one = await alone(8)
    models = {
        "a": scripted("--allocate", 8 * MIB, "--stop-delay", 0.3, linger=0, turn_lease=0),
        "b": scripted(linger=0, turn_lease=0),
    }
    async with daemon(models, memory=counted(20 * one), state_dir=str(tmp_path)) as running_daemon:
        await ask(running_daemon.port, "a", grow=100 * MIB)
        await ask(running_daemon.port, "b")

    assert learned(tmp_path)["a"] > 100 * MIB


# ---- out of memory ------------------------------------------------------------------------------

# No measuring, so that a few bytes are enough.
TINY = {"headroom": 0, "learn": False, "devices": {"ram": 100}}


@pytest.mark.parametrize("flag", ["--out-of-memory-unless", "--killed-unless"])
async def test_a_start_without_enough_memory_is_tried_once_more_with_more_room(tmp_path, watch, flag):
    """Whether it says so or the kernel kills it: the client gets its answer, and an idle model goes for the room."""
    ledger = watch(100)
    models = {"a": scripted(flag, str(tmp_path / "seen"), memory=60), "b": scripted(memory=40)}
    async with daemon(models, memory=TINY) as running_daemon:
        await ask(running_daemon.port, "b")
        await ask(running_daemon.port, "a")
        assert await ready(running_daemon.port) == {"a"}

    assert ledger.starts == ["b", "a", "a"]
    assert ledger.holdings == [40, 60, 75]
    assert ledger.evictions[0] == "b"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import sys; sys.exit('cudaMalloc failed: out of memory')", "cudaMalloc failed: out of memory"),
        ("import os; os.kill(os.getpid(), 9)", "was killed by SIGKILL"),
        ("raise SystemExit(137)", "exited with 137"),  # what a shell makes of a killed child
    ],
    ids=["it says so", "killed", "a child of it killed"],
)
async def test_twice_without_enough_memory_is_an_answer(watch, code, reason):
    """503 with the reason, after two starts; nobody who is idle goes for more than was asked for."""
    ledger = watch(100)
    failing = {"cmd": list(python(code)), "proxy": f"http://127.0.0.1:{free_port()}", "memory": 30}
    async with daemon({"a": failing, "b": scripted(memory=40)}, memory=TINY) as running_daemon:
        await ask(running_daemon.port, "b")
        answer = await fetch(running_daemon.port, "POST", "/v1/chat/completions", chat("a"))
        assert answer.status == 503
        assert reason in answer.json()["error"]["message"]
        assert await ready(running_daemon.port) == {"b"}

    assert ledger.starts == ["b", "a", "a"]
    assert ledger.holdings == [40, 30, 38]


async def test_a_start_that_fails_otherwise_is_not_tried_again(watch):
    """More memory would not help."""
    ledger = watch(100)
    async with daemon({"a": scripted("--exit-at-start", 7, memory=30)}, memory=TINY) as running_daemon:
        answer = await fetch(running_daemon.port, "POST", "/v1/chat/completions", chat("a"))
        assert answer.status == 503

    assert ledger.starts == ["a"]


# ---- the command -------------------------------------------------------------------------------


async def test_the_command_keeps_what_it_learned_in_the_users_state_directory(tmp_path):
    """`trioswap serve`, stopped with SIGTERM: costs and peak are in the place that XDG names."""
    model: Scripted = scripted("--allocate", 8 * MIB)
    table = model.table("a")
    config = tmp_path / "trioswap.toml"
    config.write_text(
        f'[memory]\nheadroom = 0\n[models.a]\ncmd = {json.dumps(table["cmd"])}\nproxy = "{table["proxy"]}"\n'
    )
    env = {"STATE_DIRECTORY": "", "XDG_STATE_HOME": str(tmp_path / "home")}
    async with command("serve", "-c", str(config), "--listen", "127.0.0.1:0", env=env) as started:
        await ask(started.port, "a")
        assert await started.stop() == 0

    file = tmp_path / "home" / "trioswap" / FILE
    entry = json.loads(file.read_text())["models"]["a"]
    assert entry["memory"]["peak"]["ram"] > 8 * MIB
    assert entry["costs"].keys() == {"load", "stop", "service"}
