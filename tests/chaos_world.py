"""The daemon of `chaos.py`, its models, and what can be seen of both from outside.

Whatever the daemon and its children start carries `RUN` in its environment; so nothing that
is left escapes notice, however it was started.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import secrets
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import attrs
import h11
import tomli_w
import trio
from children import PATIENCE, free_port
from commands import TRIOSWAP
from daemons import Answer, connect

CHILD = Path(__file__).with_name("chaos_child.py")
RUN = "TRIOSWAP_CHAOS_RUN"
MARKER = "TRIOSWAP_ATTEMPT"

# At most one of the first three, and at most two of all: a memory budget beside the group.
GROUP = ("ant", "bee", "cow")
MODELS = (*GROUP, "dog", "eel")
NEED, BUDGET = 100 * 2**20, 200 * 2**20

# Seconds.  Short, so that much happens; long enough for a machine that has other things to do.
MAX_WAIT, DRAIN, GRACE, READY, HEAD = 1.0, 2.0, 0.5, 2.5, 2.0
# A request that waits for its turn sees at most every other model wait longest, run dry, stop and load before it;
# twice, for it is tried again once; then its server answers.  And what this program itself may hold up.
HELD_UP = 12.0
BOUND = 2 * len(MODELS) * (MAX_WAIT + DRAIN + GRACE + READY) + HEAD + HELD_UP
# Until nothing is left of a daemon that was killed.
ORPHANS_WITHIN = 2.0
# Until a daemon listens; and until it has ended: drain, stop, and its own farewell, with a margin.
STARTS_WITHIN = PATIENCE
ENDS_WITHIN = DRAIN + GRACE + READY + 20.0


@attrs.frozen(order=True)
class Process:
    """One process at one look; with its start time a pid is nobody else's."""

    pid: int
    start_time: int
    marker: str = attrs.field(eq=False)
    """Of its attempt; empty for the daemon and its guardian."""
    model: str = attrs.field(eq=False)
    """Whose server it is, or is left from."""

    def is_alive(self) -> bool:
        """Whether it still runs; a zombie does not."""
        return _start_time(self.pid) == self.start_time

    def send(self, number: signal.Signals) -> bool:
        """Signal it; return whether it was still there."""
        with suppress(ProcessLookupError):
            if self.is_alive():
                os.kill(self.pid, number)
                return True
        return False


def _start_time(pid: int) -> int | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _processes(run: str) -> Iterator[Process]:
    wanted = f"{RUN}={run}".encode()
    for name in filter(str.isdigit, (entry.name for entry in Path("/proc").iterdir())):
        with suppress(OSError):
            variables = Path(f"/proc/{name}/environ").read_bytes().split(b"\0")
            if wanted not in variables:
                continue
            marker = next((each.partition(b"=")[2] for each in variables if each.startswith(MARKER.encode())), b"")
            words = Path(f"/proc/{name}/cmdline").read_bytes().decode().split("\0")
            model = words[words.index("--name") + 1] if "--name" in words else ""
            start_time = _start_time(int(name))
            if start_time is not None:
                yield Process(int(name), start_time, marker.decode(), model)


@attrs.frozen
class Figures:
    """What a daemon costs at rest."""

    descriptors: int
    threads: int
    memory: int
    """Resident bytes."""


@attrs.define(eq=False)
class World:
    """One daemon after the other, with the same configuration, state directory and port."""

    directory: Path
    run: str = attrs.field(factory=lambda: secrets.token_hex(8))
    port: int = attrs.field(factory=free_port)
    model_ports: dict[str, int] = attrs.field(factory=lambda: {name: free_port() for name in MODELS})
    process: trio.Process | None = None
    starts: int = 0
    _holds: list[list[float]] = attrs.field(factory=list)
    """When the daemon was kept from answering: from, to."""
    _downs: list[list[float]] = attrs.field(factory=list)
    """When the daemon was killed or stopped, and when it was there again: from, to."""
    _touches: list[tuple[str, list[float]]] = attrs.field(factory=list)
    """What was done to model servers: model (empty: all); from, to."""

    _mistakes: Iterator[int] = attrs.field(factory=itertools.count)

    def __attrs_post_init__(self) -> None:
        for model in MODELS:
            self.mistakes_of(model).mkdir(parents=True)
        self.config.write_text(self.document())

    # ---- files ---------------------------------------------------------------------------

    @property
    def config(self) -> Path:
        return self.directory / "trioswap.toml"

    @property
    def log(self) -> Path:
        return self.directory / "log"

    def mistakes_of(self, model: str) -> Path:
        """Where the next servers of *model* look for what is to go wrong; see `chaos_child.py`."""
        return self.directory / "mistakes" / model

    def document(self) -> str:
        """The configuration."""
        return tomli_w.dumps(
            {
                "listen": f"127.0.0.1:{self.port}",
                "state_dir": str(self.directory / "state"),
                "log_level": "info",
                "heartbeat": "200ms",
                "parallel_loads": 2,
                "max_wait": MAX_WAIT,
                "drain_timeout": DRAIN,
                "unload_drain_timeout": DRAIN,
                "unload_timeout": GRACE,
                "health_check_timeout": READY,
                "backoff": "100ms",
                "backoff_max": "400ms",
                "memory": {"headroom": 0, "learn": False, "devices": {"ram": BUDGET}},
                "groups": {
                    "one": {"swap": True, "exclusive": False, "members": list(GROUP)},
                    "all": {"swap": False, "exclusive": False, "members": list(MODELS[len(GROUP) :])},
                },
                "models": {name: self._model(name) for name in MODELS},
            }
        )

    def _model(self, name: str) -> dict[str, object]:
        port = self.model_ports[name]
        own = [str(self.mistakes_of(name)), "--port", str(port), "--name", name]
        return {
            "cmd": [sys.executable, "-S", "-E", str(CHILD), *own],
            "proxy": f"http://127.0.0.1:{port}",
            "memory": NEED,
            "device": "ram",
            "timeouts": {"response_header": HEAD},
        }

    # ---- the daemon ----------------------------------------------------------------------

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    async def start(self) -> float:
        """Start the daemon; the seconds until it answers.

        Raises:
            RuntimeError: it ended instead.
            trio.TooSlowError: it is late.
        """
        begun = trio.current_time()
        with self.log.open("ab") as log:
            self.process = await trio.lowlevel.open_process(
                [*TRIOSWAP, "serve", "-c", str(self.config)],
                stdout=log,
                stderr=log,
                env={**os.environ, RUN: self.run, "TMPDIR": str(self.directory)},
                start_new_session=True,
            )
        self.starts += 1
        with trio.fail_after(STARTS_WITHIN):
            while not await self.is_healthy():
                if self.process.poll() is not None:
                    raise RuntimeError(f"the daemon ended with {self.process.returncode}; its log: {self.log}")
                await trio.sleep(0.02)
        return trio.current_time() - begun

    async def is_healthy(self) -> bool:
        try:
            return (await self.ask("GET", "/health")).status == 200
        except (OSError, h11.RemoteProtocolError, AssertionError):  # whatever a daemon that is being killed says
            return False

    async def ask(self, method: str, target: str, body: bytes = b"", *headers: tuple[str, str]) -> Answer:
        """One request without a bound."""
        async with await connect(self.port) as client:
            await client.ask(method, target, body, *headers)
            return await client.answer()

    async def json(self, method: str, target: str):
        """The same, as a value."""
        return (await self.ask(method, target)).json()

    # ---- seen from outside -----------------------------------------------------------------

    def look(self) -> list[Process]:
        """Everybody who belongs to this run."""
        return list(_processes(self.run))

    def servers(self) -> list[Process]:
        """Those of them that model servers are, or have left."""
        return [process for process in self.look() if process.marker]

    def too_many(self) -> str | None:
        """Which models run at the same time although they must not; no snapshot, so each is looked at twice."""
        seen = self.servers()
        models = {process.model for process in seen}
        for limit, group in ((1, set(GROUP)), (BUDGET // NEED, set(MODELS))):
            if len(models & group) > limit:
                alive = {process.model for process in seen if process.model in group and process.is_alive()}
                if len(alive) > limit:
                    return f"{', '.join(sorted(alive))} run at the same time: {seen}"
        return None

    def figures(self) -> Figures:
        """What the daemon costs now."""
        status = dict(
            line.split(":", 1) for line in Path(f"/proc/{self.pid}/status").read_text().splitlines() if ":" in line
        )
        descriptors = len(list(Path(f"/proc/{self.pid}/fd").iterdir()))
        return Figures(descriptors, int(status["Threads"]), int(status["VmRSS"].split()[0]) * 1024)

    def waited(self) -> float:
        """Seconds that the daemon could have run, but others had the processors (sched-stats, /proc/PID/schedstat)."""
        with suppress(OSError):
            return int(Path(f"/proc/{self.pid}/schedstat").read_text().split()[1]) / 1e9
        return 0.0

    def ports_taken(self) -> list[int]:
        """The models' ports on which somebody listens (proc_net_tcp; 0A is TCP_LISTEN)."""
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        listening = {int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == "0A"}
        return [port for port in self.model_ports.values() if port in listening]

    # ---- what may break connections ----------------------------------------------------------

    @contextmanager
    def down(self) -> Iterator[None]:
        """The daemon is killed or stopped at the beginning of the block, and is there again at its end."""
        with _interval() as interval:
            self._downs.append(interval)
            yield

    @contextmanager
    def touching(self, model: str = "") -> Iterator[None]:
        """Something is done to the servers of *model* (empty: of all) while the block runs."""
        with _interval() as interval:
            self._touches.append((model, interval))
            yield

    @contextmanager
    def holding_up(self) -> Iterator[None]:
        """The daemon cannot answer while the block runs."""
        with _interval() as interval:
            self._holds.append(interval)
            yield

    def was_held_up(self, since: float) -> bool:
        """Whether the daemon was kept from answering at any moment since then."""
        return any(until >= since for _, until in self._holds)

    @property
    def is_down(self) -> bool:
        """Whether it is so now."""
        return self.was_down(math.inf)

    def was_down(self, since: float) -> bool:
        """Whether the daemon was killed, stopped or not there at any moment since then."""
        return any(until >= since for _, until in self._downs)

    def was_touched(self, model: str, since: float) -> bool:
        """Whether something was done to a server of *model* since then, or a moment before."""
        return any(name in ("", model) and until >= since - 1.0 for name, (_, until) in self._touches)

    def plan_mistake(self, model: str, flags: list[str]) -> Path:
        """Let a start of *model* go wrong in this way, after those that are planned already; gone once it has."""
        draft = self.directory / "draft"
        draft.write_text(json.dumps(flags))
        return draft.replace(self.mistakes_of(model) / f"{next(self._mistakes):06}")

    def forget_mistakes(self) -> None:
        """Let no start go wrong."""
        for path in self.directory.glob("mistakes/*/*"):
            path.unlink(missing_ok=True)


@contextmanager
def _interval() -> Iterator[list[float]]:
    interval = [trio.current_time(), math.inf]
    try:
        yield interval
    finally:
        interval[1] = trio.current_time()
