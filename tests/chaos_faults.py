"""What goes wrong in `chaos.py`, kind by kind, and the seeded order of it.

A kind is a function that does it once and says whether it really happened: a stream that was over before
it could be cancelled was not cancelled.
"""

from __future__ import annotations

import resource
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from random import Random

import attrs
import h11
import trio
from chaos_clients import CHAT, Clients, reset
from chaos_judge import Got, Verdict
from chaos_world import ENDS_WITHIN, MODELS, ORPHANS_WITHIN, Process, World
from daemons import Client, connect

GUARD = b"guard.py"


@attrs.define(eq=False)
class Chaos:
    """What the faults work on."""

    world: World
    clients: Clients
    daemon_lock: trio.Lock = attrs.field(factory=trio.Lock)
    """Held by who does something to the daemon itself."""
    ending: bool = False
    """No more is begun."""
    grace: list[float] = attrs.field(factory=list)
    """How long what a killed daemon left was there, in seconds."""

    def problem(self, text: str) -> None:
        self.clients.tally.problem(text)

    async def unload(self, model: str = "") -> None:
        """As an operator does; an answer is not needed."""
        with self.world.touching(model), suppress(OSError, h11.RemoteProtocolError), trio.move_on_after(10):
            await self.world.ask("POST", "/api/models/unload" + (f"/{model}" if model else ""))


Kind = Callable[[Chaos, Random], Awaitable[bool]]


def some(rng: Random) -> str:
    return rng.choice(MODELS)


# ---- children --------------------------------------------------------------------------------


async def start_goes_wrong(chaos: Chaos, rng: Random, flags: list[str]) -> bool:
    """The next start does as *flags* say; it comes with the next swap, or an operator helps."""
    model = some(rng)
    mistake = chaos.world.plan_mistake(model, flags)
    with chaos.world.touching(model):
        for _ in range(4):
            await chaos.clients.send(chaos.clients.any(model, rng))
            if not mistake.exists() or chaos.ending:
                return not mistake.exists()
            await trio.sleep(0.3)
        await chaos.unload(model)
        with trio.move_on_after(8):
            while mistake.exists() and not chaos.ending:  # noqa: ASYNC110 - it is another program
                await trio.sleep(0.1)
    return not mistake.exists()


async def runs_out_of_memory(chaos: Chaos, rng: Random) -> bool:
    path = chaos.world.directory / f"memory-{chaos.clients.token()}"
    happened = await start_goes_wrong(chaos, rng, ["--out-of-memory-unless", str(path)])
    path.unlink(missing_ok=True)
    return happened


async def answer_goes_wrong(chaos: Chaos, rng: Random, streams: bool, **script: object) -> bool:
    """The server does with one request what *script* says, and with that to others what it may."""
    model = some(rng)
    make = chaos.clients.stream if streams else chaos.clients.json
    with chaos.world.touching(model):
        verdict, _ = await chaos.clients.send(make(model, **script), own_fault=True)
    return verdict in (Verdict.ERROR, Verdict.BROKEN)


async def dies_behind_the_last(chaos: Chaos, rng: Random) -> bool:
    """All has been said but that it is all: nothing is missing, and the stream ends as if nothing had happened."""
    model = some(rng)
    message = chaos.clients.stream(model, 3, die_behind="[DONE]\n\n")
    with chaos.world.touching(model):
        verdict, _ = await chaos.clients.send(message, own_fault=True)
    return verdict is Verdict.ANSWERED


async def hangs_mid_stream(chaos: Chaos, rng: Random) -> bool:
    model, since = some(rng), trio.current_time()

    async def enough(_: Client, got: Got) -> bool:
        with trio.move_on_after(0.3 if got.body else 0):
            await trio.sleep(0.3)
        return bool(got.body) or trio.current_time() > since + 20

    message = chaos.clients.stream(model, 2, chunk_delay=3.0)
    with chaos.world.touching(model):
        verdict, _ = await chaos.clients.send(message, own_fault=True, meanwhile=enough)
    return verdict in (None, Verdict.ERROR, Verdict.BROKEN)


def victim(chaos: Chaos, rng: Random) -> Process | None:
    """The main process of some model server."""
    servers = sorted(chaos.world.servers())
    leaders = [each for each in servers if not any(o.marker == each.marker and o < each for o in servers)]
    return rng.choice(leaders) if leaders else None


async def killed_from_outside(chaos: Chaos, rng: Random) -> bool:
    process = victim(chaos, rng)
    if process is None:
        return False
    with chaos.world.touching(process.model):
        return process.send(signal.SIGKILL)


async def stops_for_a_while(chaos: Chaos, rng: Random) -> bool:
    process = victim(chaos, rng)
    if process is None:
        return False
    with chaos.world.touching(process.model):
        happened = process.send(signal.SIGSTOP)
        await trio.sleep(rng.uniform(0.2, 1.5))
        process.send(signal.SIGCONT)
    return happened


async def stranger_on_port(chaos: Chaos, rng: Random) -> bool:
    """Somebody else listens where the server is to be, and even says that all is well."""
    model = some(rng)
    port = chaos.world.model_ports[model]
    for _ in range(5):
        await chaos.unload(model)
        with suppress(OSError):
            [listener] = await trio.open_tcp_listeners(port, host="127.0.0.1")
            break
    else:
        return False

    async def pretend(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 16\r\n\r\nI am a stranger.")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, pretend, [listener])
        with chaos.world.touching(model):
            verdict, _ = await chaos.clients.send(chaos.clients.json(model))
        nursery.cancel_scope.cancel()
    return verdict in (Verdict.ERROR, Verdict.BROKEN)


# ---- clients -----------------------------------------------------------------------------------


async def leaves_at_once(chaos: Chaos, rng: Random) -> bool:
    """While it is queued, or hardly that."""

    async def enough(_: Client, got: Got) -> bool:
        await trio.sleep(rng.choice((0, 0.005, 0.02)))
        return True

    verdict, _ = await chaos.clients.send(chaos.clients.any(some(rng), rng), meanwhile=enough)
    return verdict is None


async def leaves_while_loading(chaos: Chaos, rng: Random) -> bool:
    async def enough(_: Client, got: Got) -> bool:
        return b": trioswap " in got.body and b"loading" in got.body

    model = some(rng)
    chaos.world.plan_mistake(model, ["--ready-delay", "0.7"])
    await chaos.unload(model)
    verdict, _ = await chaos.clients.send(chaos.clients.stream(model), meanwhile=enough)
    return verdict is None


async def leaves_mid_stream(chaos: Chaos, rng: Random) -> bool:
    async def enough(client: Client, got: Got) -> bool:
        if b"data: " in got.body and leaves_rudely:
            reset(client)
        return b"data: " in got.body

    leaves_rudely = rng.random() < 0.5
    message = chaos.clients.stream(some(rng), 50, chunk_delay=0.02)
    verdict, _ = await chaos.clients.send(message, meanwhile=enough)
    return verdict is None


async def leaves_while_uploading(chaos: Chaos, rng: Random) -> bool:
    message = chaos.clients.upload(some(rng), rng)
    return await _begins(chaos, rng, _head(message.target, len(message.body)) + message.body[: rng.randrange(10**6)])


async def sends_half_a_head(chaos: Chaos, rng: Random) -> bool:
    return await _begins(chaos, rng, _head(CHAT, 100)[: rng.randrange(1, 60)])


async def sends_half_a_body(chaos: Chaos, rng: Random) -> bool:
    return await _begins(chaos, rng, _head(CHAT, 100) + b'{"model": "ant"')


async def speaks_nonsense(chaos: Chaos, rng: Random) -> bool:
    return await _begins(chaos, rng, rng.randbytes(rng.randrange(1, 3000)))


def _head(target: str, size: int) -> bytes:
    kind = "multipart/form-data; boundary=chaos"
    return f"POST {target} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: {size}\r\n\r\n".encode()


async def _begins(chaos: Chaos, rng: Random, data: bytes) -> bool:
    """Send *data*, wait a little, and go, one way or the other."""
    try:
        async with await connect(chaos.world.port) as client:
            await client.stream.send_all(data)
            await trio.sleep(rng.uniform(0, 0.4))
            if rng.random() < 0.5:
                reset(client)
    except OSError:
        return False
    except trio.BrokenResourceError:
        pass
    chaos.clients.tally.aborted += 1
    return True


async def reads_slowly(chaos: Chaos, rng: Random) -> bool:
    """Takes nothing for a while, of more than all buffers hold."""
    waited = []

    async def enough(_: Client, got: Got) -> bool:
        if got.status is not None and not waited:
            waited.append(await trio.sleep(rng.uniform(0.5, 2.0)))
        return False

    message = chaos.clients.stream(some(rng), 6000)
    await chaos.clients.send(message, own_fault=True, meanwhile=enough, small_buffer=True)
    return bool(waited)


async def cuts_websocket(chaos: Chaos, rng: Random) -> bool:
    verdict, _ = await chaos.clients.socket(some(rng), rng.randint(1, 3), "reset")
    return verdict is None


async def websocket_is_cut(chaos: Chaos, rng: Random, message: str) -> bool:
    model = some(rng)
    with chaos.world.touching(model):
        verdict, _ = await chaos.clients.socket(model, 1, message)
    return verdict in (Verdict.ERROR, Verdict.BROKEN)


# ---- operators ---------------------------------------------------------------------------------


async def unloads(chaos: Chaos, rng: Random) -> bool:
    await chaos.unload(some(rng))
    return True


async def unloads_all(chaos: Chaos, _: Random) -> bool:
    await chaos.unload()
    return True


async def loads(chaos: Chaos, rng: Random) -> bool:
    with suppress(OSError, h11.RemoteProtocolError), trio.move_on_after(30):
        await chaos.world.ask("POST", f"/api/models/load/{some(rng)}")
        return True
    return False


async def cancels(chaos: Chaos, rng: Random) -> bool:
    """Ends a request of somebody else."""
    done = []

    async def enough(_: Client, got: Got) -> bool:
        if b"data: " in got.body and not done:
            done.append(await _cancel(chaos, got.headers["x-request-id"]))
        return False

    message = chaos.clients.stream(some(rng), 60, chunk_delay=0.05)
    verdict, _ = await chaos.clients.send(message, cancelled=True, meanwhile=enough)
    if done == [True] and verdict is Verdict.ANSWERED:
        chaos.problem(f"{message.asked.token} was cancelled and answered all the same")
    return done == [True]


async def _cancel(chaos: Chaos, request: str) -> bool:
    with suppress(OSError, h11.RemoteProtocolError, KeyError):
        rows = (await chaos.world.json("GET", "/api/inflight"))["requests"]
        number = next((row["id"] for row in rows if row["request"] == request), None)
        if number is not None:
            return (await chaos.world.ask("POST", f"/api/inflight/{number}/cancel")).status == 200
    return False


# ---- the daemon --------------------------------------------------------------------------------


async def clock_jumps(chaos: Chaos, rng: Random) -> bool:
    """Seen from inside: the daemon is stopped and goes on."""
    async with chaos.daemon_lock:
        with chaos.world.holding_up(), chaos.world.touching():
            chaos.world.process.send_signal(signal.SIGSTOP)
            await trio.sleep(rng.choice((0.3, 1.0, 2.0, 4.0)))
            chaos.world.process.send_signal(signal.SIGCONT)
    return True


@contextmanager
def limited(world: World, what: int, value: int) -> Iterator[None]:
    """Set a soft limit of the daemon; what it starts meanwhile has it too, so theirs is set back as well."""
    soft, hard = resource.prlimit(world.pid, what)
    resource.prlimit(world.pid, what, (value, hard))
    try:
        yield
    finally:
        for pid in [world.pid, *(process.pid for process in world.look())]:
            with suppress(ProcessLookupError):
                resource.prlimit(pid, what, (soft, hard))


async def descriptors_run_out(chaos: Chaos, rng: Random) -> bool:
    async with chaos.daemon_lock:
        world = chaos.world
        with world.touching(), world.holding_up(), limited(world, resource.RLIMIT_NOFILE, world.figures().descriptors):
            await trio.sleep(rng.uniform(0.3, 1.5))
    return True


async def disk_is_full(chaos: Chaos, rng: Random) -> bool:
    """No file takes more than it has: bodies that are spooled, the log, the state."""
    async with chaos.daemon_lock:
        with chaos.world.touching(), limited(chaos.world, resource.RLIMIT_FSIZE, 1024):
            verdict, why = await chaos.clients.send(chaos.clients.upload(some(rng), rng))
            await trio.sleep(rng.uniform(0.1, 0.5))
    if verdict is Verdict.ANSWERED:
        chaos.problem("an upload went through a disk that was full")
    return verdict is Verdict.ERROR and why.startswith("507")


async def is_killed(chaos: Chaos, rng: Random, with_guardian: bool = False) -> bool:
    """SIGKILL; then the same state directory and port at once, or after a while."""
    async with chaos.daemon_lock:
        world = chaos.world
        with world.holding_up(), world.down():
            if with_guardian:
                _kill_guardians(world)
            world.process.kill()
            begun = trio.current_time()
            await world.process.wait()
            left = world.servers()
            if with_guardian:
                # It is for the next daemon to stop them, before it listens.
                await world.start()
                await _wait_gone(chaos, left, trio.current_time())
            else:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_wait_gone, chaos, left, begun)
                    # At once, so that two clean up; or so late that the guardian must have done it alone.
                    await trio.sleep(rng.choice((0, ORPHANS_WITHIN + 0.2)))
                    await world.start()
            chaos.clients.last_answer = trio.current_time()
    return True


def _kill_guardians(world: World) -> None:
    for process in world.look():
        with suppress(OSError):
            if GUARD in Path(f"/proc/{process.pid}/cmdline").read_bytes():
                process.send(signal.SIGKILL)


async def _wait_gone(chaos: Chaos, left: list[Process], begun: float) -> None:
    """Nobody of *left* may be there when `ORPHANS_WITHIN` has passed."""
    while alive := [process for process in left if process.is_alive()]:
        if trio.current_time() > begun + ORPHANS_WITHIN:
            chaos.problem(f"orphans {ORPHANS_WITHIN:g} s after the daemon was killed: {alive}")
            for process in alive:
                process.send(signal.SIGKILL)
            return
        await trio.sleep(0.02)
    chaos.grace.append(trio.current_time() - begun)


async def is_stopped(chaos: Chaos, rng: Random) -> bool:
    """SIGTERM, perhaps a second one, and a new start."""
    async with chaos.daemon_lock:
        world = chaos.world
        with world.holding_up(), world.down():
            await stop(chaos, hasten=rng.random() < 0.5)
            await world.start()
            chaos.clients.last_answer = trio.current_time()
    return True


async def stop(chaos: Chaos, *, hasten: bool = False) -> None:
    """End the daemon as an init system does; nothing may be left when it has ended."""
    world, begun = chaos.world, trio.current_time()
    world.process.terminate()
    with trio.move_on_after(ENDS_WITHIN) as late:
        if hasten:
            await trio.sleep(0.2)
            if world.process.poll() is None:
                world.process.terminate()
        await world.process.wait()
    if late.cancelled_caught:
        chaos.problem(f"the daemon did not end within {ENDS_WITHIN:g} s of SIGTERM")
        world.process.kill()
        await world.process.wait()
    elif world.process.returncode != 0:
        chaos.problem(f"the daemon ended with {world.process.returncode}, {trio.current_time() - begun:.1f} s on")
    if left := world.look():
        chaos.problem(f"left by a daemon that was stopped: {left}")


async def config_breaks(chaos: Chaos, rng: Random) -> bool:
    """A file that makes no sense, SIGHUP, the right file, SIGHUP."""
    async with chaos.daemon_lock:
        world = chaos.world
        right = world.config.read_text()
        for text in ("[models.ant\n", right):
            world.config.write_text(text)
            world.process.send_signal(signal.SIGHUP)
            await trio.sleep(rng.uniform(0.05, 0.3))
    return True


async def hangs_up_often(chaos: Chaos, rng: Random) -> bool:
    async with chaos.daemon_lock:
        for _ in range(rng.randint(5, 20)):
            chaos.world.process.send_signal(signal.SIGHUP)
            await trio.sleep(rng.choice((0, 0.01)))
    return True


async def reloads_often(chaos: Chaos, rng: Random) -> bool:
    """POST /api/reload again and again, with something new each time."""
    async with chaos.daemon_lock:
        right, done = chaos.world.config.read_text(), 0
        with chaos.world.touching(), suppress(OSError, h11.RemoteProtocolError):
            for number in range(rng.randint(3, 8)):
                chaos.world.config.write_text(f"{right}\n[models.dog.metadata]\nnumber = {number}\n")
                done += (await chaos.world.ask("POST", RELOAD)).status == 200
            chaos.world.config.write_text(right)
            await chaos.world.ask("POST", RELOAD)
    return bool(done)


RELOAD = "/api/reload"

# ---- the order -----------------------------------------------------------------------------------


def _start(*flags: str) -> Kind:
    return partial(start_goes_wrong, flags=list(flags))


# Kind, and how often in each deck.
KINDS: dict[str, tuple[Kind, int]] = {
    "child: crashes at its start": (_start("--exit-at-start", "3"), 4),
    "child: crashes while loading": (_start("--ready-delay", "2", "--exit-after", "0.2"), 4),
    "child: runs out of memory at its start": (runs_out_of_memory, 2),
    "child: never gets ready": (_start("--never-ready"), 1),
    "child: never takes its port": (_start("--wrong-port"), 1),
    "child: starts slowly": (_start("--bind-delay", "0.3", "--ready-delay", "0.8"), 3),
    "child: ignores SIGTERM": (_start("--ignore-sigterm"), 3),
    "child: stops slowly": (_start("--stop-delay", "0.3"), 2),
    "child: forks": (_start("--fork"), 3),
    "child: forks twice and escapes": (_start("--setsid-child"), 3),
    "child: escapes and ignores SIGTERM": (_start("--setsid-child", "--fork", "--ignore-sigterm"), 3),
    "child: talks without end": (_start("--spam", "3000000"), 2),
    "child: a stranger has its port": (stranger_on_port, 2),
    "child: crashes on a request": (partial(answer_goes_wrong, streams=False, die_on_request=True), 4),
    "child: crashes mid-stream": (partial(answer_goes_wrong, streams=True, die_mid_stream=2), 4),
    "child: dies within an event": (partial(answer_goes_wrong, streams=True, die_behind='"number": 2'), 4),
    "child: dies behind its last event": (dies_behind_the_last, 4),
    "child: is killed from outside": (killed_from_outside, 6),
    "child: is stopped and goes on": (stops_for_a_while, 4),
    "child: hangs on a request": (partial(answer_goes_wrong, streams=False, hold=True), 2),
    "child: hangs mid-stream": (hangs_mid_stream, 3),
    "child: truncates an answer": (partial(answer_goes_wrong, streams=False, truncate=True), 4),
    "child: truncates a stream": (partial(answer_goes_wrong, streams=True, truncate=True), 4),
    "child: speaks no HTTP": (partial(answer_goes_wrong, streams=False, nonsense=True), 3),
    "child: breaks a websocket": (partial(websocket_is_cut, message="!break"), 3),
    "child: dies with a websocket": (partial(websocket_is_cut, message="!die"), 2),
    "client: leaves at once": (leaves_at_once, 8),
    "client: leaves while its model loads": (leaves_while_loading, 3),
    "client: leaves mid-stream": (leaves_mid_stream, 6),
    "client: leaves while uploading": (leaves_while_uploading, 4),
    "client: sends half a head": (sends_half_a_head, 4),
    "client: sends half a body": (sends_half_a_body, 4),
    "client: speaks nonsense": (speaks_nonsense, 4),
    "client: reads slowly": (reads_slowly, 3),
    "client: cuts a websocket": (cuts_websocket, 4),
    "operator: unloads a model": (unloads, 4),
    "operator: unloads all": (unloads_all, 1),
    "operator: loads a model": (loads, 3),
    "operator: cancels a request": (cancels, 4),
    "daemon: is stopped and goes on (its clock jumps)": (clock_jumps, 2),
    "daemon: runs out of descriptors": (descriptors_run_out, 2),
    "daemon: finds the disk full": (disk_is_full, 2),
    "daemon: its configuration breaks, with SIGHUP": (config_breaks, 1),
    "daemon: gets many SIGHUP": (hangs_up_often, 1),
    "daemon: reload storm": (reloads_often, 2),
    "daemon: kill -9 and a new start": (is_killed, 2),
    "daemon: kill -9 of it and its guardian": (partial(is_killed, with_guardian=True), 1),
    "daemon: SIGTERM and a new start": (is_stopped, 1),
}
# Nothing else begins while these are done.
ALONE = {name for name, (kind, _) in KINDS.items() if getattr(kind, "func", kind) in (is_killed, is_stopped)}
RELOADS = {name for name, (kind, _) in KINDS.items() if kind is reloads_often}


def deck(seed: int, number: int, *, without: set[str] = frozenset()) -> list[tuple[str, Random]]:
    """The faults of one round, in their order, each with the randomness it is to use.

    The daemon is killed and stopped in every second round only, so that it sometimes lives for longer.
    """
    rng = Random(f"{seed}-{number}")
    without = without | (ALONE if number % 2 == 0 else set())
    names = [name for name, (_, count) in KINDS.items() if name not in without for _ in range(count)]
    rng.shuffle(names)
    return [(name, Random(f"{seed}-{number}-{index}")) for index, name in enumerate(names)]
