"""The proving machine: a real daemon and real model servers while everything goes wrong, watched from outside.

    python tests/chaos.py [--minutes 2] [--seed N]        (nox -s chaos)

Many clients ask for five models, at most two of which may run at the same time.  Meanwhile faults are done in
an order that the seed says (`chaos_faults`), and clients judge what they get (`chaos_judge`).  After each round of
faults everything comes to rest, and then nothing may be left of it.  It prints what was done and what became of
it, and exits with 1 if anything was not as it must be.
"""

from __future__ import annotations

import argparse
import math
import secrets
import shutil
import signal
import sys
import tempfile
import traceback
from contextlib import suppress
from pathlib import Path
from random import Random

import attrs
import h11
import trio
from chaos_clients import Clients
from chaos_faults import ALONE, KINDS, RELOAD, RELOADS, Chaos, deck, stop
from chaos_judge import Tally, Verdict
from chaos_world import BOUND, MODELS, Figures, World

CLIENTS = 16
# Seconds between two requests of one client at most, and between two faults.
PAUSE = 0.3
PACE = 0.08
# Faults that are under way at the same time.
AT_ONCE = 40
# How often it is tried to do one; others may get in its way.
TRIES = 3
# Seconds without any answer, while clients wait and nothing keeps the daemon from answering.
WEDGED = 20.0
# Seconds for /health; looks at processes and at it come so often.
HEALTH = 1.0
LOOK_EVERY = 0.25
# More than this too late to look at the clock says that the machine, not the daemon, was slow.
BUSY = 0.3
TICK = 0.05
HEALTH_AT_MOST = 10.0
# Trio keeps threads for 10 s; connections close a moment after their last byte.
SETTLES_WITHIN = 15.0
# Beyond the baseline: the connection that asks, and one that is being closed.
MORE_DESCRIPTORS = 2
MORE_THREADS = 2
MORE_MEMORY = 40 * 2**20


@attrs.define(eq=False)
class Run:
    """One run of the machine."""

    chaos: Chaos
    seed: int
    minutes: float
    """Until no new fault begins."""
    began: float = 0.0
    ended: float = 0.0
    resting: bool = False
    slowest_health: float = 0.0
    last_late: float = -math.inf
    """When the machine was last seen to be slow."""
    looks: int = 0
    wedges: int = 0
    baseline: Figures | None = None
    last: Figures | None = None
    rests: int = 0
    told: int = 0
    """Problems that have been printed."""
    reported: set[str] = attrs.field(factory=set)

    @property
    def until(self) -> float:
        return self.began + 60 * self.minutes

    @property
    def world(self) -> World:
        return self.chaos.world

    @property
    def tally(self) -> Tally:
        return self.chaos.clients.tally

    async def __call__(self) -> None:
        """From the first start of the daemon to its end."""
        self.began = trio.current_time()
        await self.world.start()
        await self.warm_up()
        async with trio.open_nursery() as watchers:
            watchers.start_soon(self.watch_clock)
            watchers.start_soon(self.watch_health)
            watchers.start_soon(self.watch_processes)
            watchers.start_soon(self.watch_progress)
            number = 0
            while trio.current_time() < self.until:
                await self.round(number)
                number += 1
            watchers.cancel_scope.cancel()
        self.ended = trio.current_time()
        with self.world.down():
            await stop(self.chaos)
        if taken := self.world.ports_taken():
            self.tally.problem(f"ports are taken at the end: {taken}")
        before = ""
        for text in self.world.log.read_text(errors="replace").split("\n"):
            # Trio's own words when there are no descriptors.
            if "Traceback" in text and "accept returned E" not in before:
                self.tally.problem(f"the log: {before}: {text}")
            before = text

    async def warm_up(self) -> None:
        """One request of each kind to each model; then the baseline."""
        clients, rng = self.chaos.clients, Random(0)
        for model in MODELS:
            for message in (clients.json(model), clients.stream(model), clients.upload(model, rng)):
                verdict, why = await clients.send(message)
                if verdict is not Verdict.ANSWERED:
                    self.tally.problem(f"nothing was wrong yet: {why}")
            await clients.socket(model, 2)
        await self.chaos.unload()
        await trio.sleep(0.5)
        self.baseline = self.world.figures()

    # ---- one round ---------------------------------------------------------------------------

    async def round(self, number: int) -> None:
        """Clients ask while the faults of one deck are done; then all come to rest."""
        async with trio.open_nursery() as nursery:
            over = trio.Event()
            for client in range(CLIENTS):
                nursery.start_soon(self.client, Random(f"{self.seed}-{number}-client-{client}"), over)
            await self.inject(number)
            over.set()
        await self.rest(number)

    async def client(self, rng: Random, over: trio.Event) -> None:
        clients, favourite = self.chaos.clients, rng.choice(MODELS)
        while not over.is_set():
            model = favourite if rng.random() < 0.5 else rng.choice(MODELS)
            if rng.random() < 0.08:
                await clients.socket(model, rng.randint(1, 4))
            else:
                await clients.send(clients.any(model, rng))
            with trio.move_on_after(rng.uniform(0, PAUSE)):
                await over.wait()
            while self.world.is_down:  # noqa: ASYNC110 - as clients do that come again and again
                await trio.sleep(0.05)

    async def inject(self, number: int) -> None:
        without = set() if await self.has_reload() else RELOADS
        limiter = trio.CapacityLimiter(AT_ONCE)
        self.chaos.ending = False
        async with trio.open_nursery() as nursery:
            for name, rng in deck(self.seed, number, without=without):
                if trio.current_time() >= self.until:
                    break
                self.tally.planned[name] += 1
                if name in ALONE:
                    await self.do(name, rng)
                else:
                    await limiter.acquire_on_behalf_of(rng)
                    nursery.start_soon(self.do, name, rng, limiter)
                await trio.sleep(PACE)
            self.chaos.ending = True

    async def do(self, name: str, rng: Random, limiter: trio.CapacityLimiter | None = None) -> None:
        try:
            for _ in range(TRIES):
                if await KINDS[name][0](self.chaos, rng):
                    self.tally.injected[name] += 1
                    break
                if self.chaos.ending:
                    break
        finally:
            if limiter is not None:
                limiter.release_on_behalf_of(rng)

    async def has_reload(self) -> bool:
        return RELOAD in (await self.world.json("GET", "/api/openapi.json"))["paths"]

    # ---- at rest -----------------------------------------------------------------------------

    async def rest(self, number: int) -> None:
        """Nothing may be under way, and everything back where it was."""
        self.rests += 1
        self.world.forget_mistakes()
        await self.chaos.unload()
        problem = "not looked at"
        with trio.move_on_after(SETTLES_WITHIN):
            while problem := await self.not_at_rest():  # noqa: ASYNC110 - it is another program
                await trio.sleep(0.1)
        if problem:
            self.tally.problem(f"at rest after round {number}: {problem}")
        self.last = self.world.figures()
        print(
            f"  round {number}: {sum(self.tally.injected.values())} faults, {self.tally.sent} requests, "
            f"{len(self.tally.problems)} problems",
            *self.tally.problems[self.told :],
            sep="\n    ",
            file=sys.stderr,
        )
        self.told = len(self.tally.problems)

    async def not_at_rest(self) -> str:
        """What is still under way, or there."""
        if waiting := (await self.world.json("GET", "/api/queue"))["waiting"]:
            return f"waiting: {waiting}"
        if rows := (await self.world.json("GET", "/api/inflight"))["requests"]:
            return f"in flight: {rows}"
        running = (await self.world.json("GET", "/running"))["running"]
        if rows := [row for row in running if row["state"] != "stopped" or row["serving"] or row["waiting"]]:
            return f"running: {rows}"
        if left := self.world.servers():
            return f"processes: {left}"
        if taken := self.world.ports_taken():
            return f"ports taken: {taken}"
        return self.beyond_baseline(self.world.figures())

    def beyond_baseline(self, now: Figures) -> str:
        assert self.baseline is not None
        if now.descriptors > self.baseline.descriptors + MORE_DESCRIPTORS:
            names = []
            for each in Path(f"/proc/{self.world.pid}/fd").iterdir():
                with suppress(OSError):
                    names.append(str(each.readlink()))
            return f"{now.descriptors} descriptors, {self.baseline.descriptors} at first: {sorted(names)}"
        if now.threads > self.baseline.threads + MORE_THREADS:
            return f"{now.threads} threads, {self.baseline.threads} at first"
        if now.memory > self.baseline.memory + MORE_MEMORY:
            return f"{now.memory >> 20} MiB, {self.baseline.memory >> 20} MiB at first"
        return ""

    # ---- watchers ----------------------------------------------------------------------------

    async def watch_clock(self) -> None:
        """Notice when the machine is slow."""
        while True:
            due = trio.current_time() + TICK
            await trio.sleep_until(due)
            if trio.current_time() > due + BUSY:
                self.last_late = trio.current_time()

    async def watch_health(self) -> None:
        """/health answers in time, whatever happens to models."""
        while True:
            await trio.sleep(LOOK_EVERY)
            asked, waited = trio.current_time(), self.world.waited()
            with trio.move_on_after(HEALTH_AT_MOST), suppress(OSError, h11.RemoteProtocolError):
                await self.world.ask("GET", "/health")
            seconds = trio.current_time() - asked - max(0.0, self.world.waited() - waited)
            await trio.sleep(2 * TICK)  # so that the clock has been looked at
            # What waited before may come first.
            if self.last_late < asked - LOOK_EVERY and not self.world.was_held_up(asked - HEALTH):
                self.slowest_health = max(self.slowest_health, seconds)
                if seconds > HEALTH:
                    self.tally.problem(f"/health took {seconds:.1f} s")

    async def watch_processes(self) -> None:
        """Never more models at a time than may be."""
        while True:
            text = await trio.to_thread.run_sync(self.world.too_many)
            self.looks += 1
            if text and text not in self.reported:
                self.reported.add(text)
                self.tally.problem(text)
            await trio.sleep(LOOK_EVERY)

    async def watch_progress(self) -> None:
        """Somebody is answered as long as somebody asks."""
        clients = self.chaos.clients
        free_since = trio.current_time()
        while True:
            await trio.sleep(1.0)
            now = trio.current_time()
            if self.world.was_held_up(now) or not clients.under_way:
                free_since = now
            if now - max(free_since, clients.last_answer) > WEDGED:
                self.wedges += 1
                self.tally.problem(f"wedged: no answer for {now - clients.last_answer:.0f} s: {await self.snapshot()}")
                free_since = now

    async def snapshot(self) -> str:
        with suppress(OSError, h11.RemoteProtocolError), trio.move_on_after(5):
            return f"{await self.world.json('GET', '/running')} {await self.world.json('GET', '/api/queue')}"
        return "it does not say anything"


# ---- the table ----------------------------------------------------------------------------------


def report(run: Run) -> str:
    """What was done and what became of it."""
    tally, verdicts = run.tally, run.tally.verdicts
    faults = sum(tally.injected.values())
    minutes = (run.ended - run.began) / 60
    lines = [f"chaos: seed {run.seed}, {minutes:.1f} minutes, {run.world.starts} starts of the daemon", ""]
    lines += ["| fault | planned | done |", "|---|---|---|"]
    lines += [f"| {name} | {tally.planned[name]} | {tally.injected[name]} |" for name in KINDS]
    lines += [f"| all | {sum(tally.planned.values())} | {faults} |", "", "| figure | value |", "|---|---|"]
    orphans = sum(text.startswith(("orphans", "left by")) for text in tally.problems)
    first, last = run.baseline, run.last
    rows: list[tuple[str, object]] = [
        ("faults per minute", f"{faults / minutes:.0f}"),
        ("requests sent", tally.sent),
        *((f"requests {verdict.value}", verdicts[verdict]) for verdict in Verdict),
        ("requests whose client left", tally.aborted),
        ("longest wait, and its bound", f"{tally.longest:.1f} s of {BOUND:.0f} s"),
        ("orphans", orphans),
        ("longest life of what a killed daemon left", f"{max(run.chaos.grace, default=0.0):.2f} s of 2 s"),
        ("wedges", run.wedges),
        ("slowest /health, while it had a processor", f"{run.slowest_health * 1000:.0f} ms"),
        ("looks at processes", run.looks),
        ("rests", run.rests),
    ]
    if first is not None and last is not None:
        rows += [
            ("descriptors, at first and at last", f"{first.descriptors}, {last.descriptors}"),
            ("threads", f"{first.threads}, {last.threads}"),
            ("resident memory", f"{first.memory >> 20} MiB, {last.memory >> 20} MiB"),
        ]
    rows.append(("problems", len(tally.problems)))
    lines += [f"| {name} | {value} |" for name, value in rows]
    lines += ["", "| clear error | times |", "|---|---|"]
    lines += [f"| {text} | {count} |" for text, count in tally.reasons.most_common(12)]
    return "\n".join([*lines, "", *(f"PROBLEM {text}" for text in tally.problems), ""])


async def proving(run: Run) -> None:
    """The whole run; nothing is left of it, however it ends."""
    try:
        await run()
    except Exception as exc:
        run.tally.problem(f"the machine itself could not go on: {exc!r}")
        traceback.print_exc()
    finally:
        run.ended = run.ended or trio.current_time()
        for process in run.world.look():
            process.send(signal.SIGKILL)


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6))
    options = parser.parse_args()
    print(f"chaos: seed {options.seed}", file=sys.stderr)
    directory = Path(tempfile.mkdtemp(prefix="trioswap-chaos-"))
    world, tally = World(directory), Tally()
    run = Run(Chaos(world, Clients(world, tally)), options.seed, options.minutes)
    # As Ctrl-C, so that nothing is left then either.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    trio.run(proving, run)
    print(report(run))
    if tally.problems:
        print(f"the log of the daemon: {world.log}")
        return 1
    shutil.rmtree(directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
