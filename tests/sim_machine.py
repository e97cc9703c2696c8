"""The machine under a simulated daemon: its servers, its memory, and an account of both by which the laws are judged.

Nothing here asks the scheduler's books.  What runs is known from the servers themselves, who is served
from the clients, and what was decided from the commands as they are carried out (`Group`).  Numbers such
as I4 are those of the design's invariants.
"""

from __future__ import annotations

import math
import random
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Self

import attrs
import trio
from fakes import FakeMachine

from trioswap.config import Config, ModelConfig
from trioswap.errors import StartFailed, UpstreamFailed
from trioswap.fleet import Fleet
from trioswap.group import CUT_GRACE, SwapGroup
from trioswap.journal import Journal
from trioswap.messages import CloseGate, Command, Event, Grant, Measured, OpenGate, Squeezed, Start, Stop, Swap
from trioswap.process import KILL_WAIT, Report
from trioswap.residency import NOTHING, Holding
from trioswap.runs import LONGEST_DEATH, Lease

EPSILON = 1e-6
# Whoever is told something may need some steps; what a step of the simulation takes is nothing.
NO_TIME = 1e-9


class LawBroken(AssertionError):
    """The control plane did what it must not."""


# ---- what the world does to it --------------------------------------------------------------------


@attrs.frozen
class Fate:
    """What becomes of one attempt at a server, seconds; drawn before it begins."""

    load: float
    stop: float
    sweep: float = 0.0
    """How long what a dead server left lives on."""
    notice: float = 0.0
    """From its death until its supervisor sees it."""
    fails_at: float = math.inf
    """It exits while it loads."""
    runs_out: bool = False
    """It finds no memory at the end of its load, whatever there is."""
    crashes_at: float = math.inf
    """Seconds after it was ready."""
    hangs: bool = False
    """It does not end before SIGKILL."""
    stuck: float = 0.0
    """For so long it survives SIGKILL; 0: it does not."""
    greed: float = 1.0
    """What it uses once it has served somebody, in parts of what it needs."""


@attrs.define(eq=False)
class Request:
    """One request of a client, what it will meet, and what has become of it."""

    number: int
    model: str
    weight: float = 1.0
    first: float = 0.0
    """Seconds until the server's first byte."""
    pieces: int = 1
    gap: float = 0.0
    """Seconds between two pieces."""
    fault: str = ""
    """`refused` and `killed`: before the first byte; `cut` and `killed late`: after it; `hangs`: never an answer."""
    leaves: float = math.inf
    """When its client goes."""
    cancelled: bool = False
    """By an operator."""
    patience: float = math.inf
    begun: float = 0.0
    since: float = 0.0
    """When it began to wait, the last time."""
    place: int = 0
    troubles: int = 0
    """How much trouble there had been when it began to wait, less what was going on."""
    attempt: int = 0
    """Whose lease it holds; 0: none."""
    waits: bool = False
    sends: int = 0
    lost: str = ""
    """How its last server was lost to it before the first byte."""
    first_sender: int = 0

    @property
    def label(self) -> str:
        return f"r{self.number}"

    def piece(self, index: int, attempt: int) -> bytes:
        """What its own server says."""
        return b"data: %s of attempt %d to %d: %d\n\n" % (self.model.encode(), attempt, self.number, index)


# ---- the account -----------------------------------------------------------------------------------


@attrs.define(eq=False, kw_only=True)
class Account:
    """Everything that really is so, from the start of one daemon until it has ended."""

    config: Config
    rng: random.Random
    numbers: object
    """Draws fates: a function of a model's name."""
    machine: FakeMachine
    sizes: Holding = NOTHING
    """Bytes of each device that there are for models, as the daemon was told last; empty: memory is not counted."""
    needs: dict[str, int] = attrs.field(factory=dict)
    """model -> bytes that its server uses."""
    bound: object = None
    fleet: Fleet | None = None
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    """Ends everything when a law is broken."""
    broken: LawBroken | None = None
    trace: bool = False
    digest: int = 0
    alive: dict[int, Server] = attrs.field(factory=dict)
    """Attempts of which processes exist."""
    known: set[int] = attrs.field(factory=set)
    """All attempts that there were."""
    requests: dict[str, Request] = attrs.field(factory=dict)
    """Those that are under way, by label."""
    holders: dict[int, set[str]] = attrs.field(factory=dict)
    """attempt -> labels of those who were granted and have not left it."""
    waiting: Counter[str] = attrs.field(factory=Counter)
    last_left: dict[str, float] = attrs.field(factory=dict)
    """model -> when somebody waited for it last."""
    gates: dict[int, float] = attrs.field(factory=dict)
    """Attempt whose gate is closed -> when the drain is over for good."""
    evicted: dict[int, int] = attrs.field(factory=dict)
    """Attempt -> the number of the swap that it goes for."""
    ended: set[int] = attrs.field(factory=set)
    """Attempts that were told to end."""
    swaps: int = 0
    closing: bool = False
    hastened: bool = False
    honest: bool = True
    """No server uses more than it says, and no other program memory that it was not lent."""
    lent: dict[str, Holding] = attrs.field(factory=dict)
    faults: Counter[str] = attrs.field(factory=Counter)
    happened: dict[tuple[object, ...], float] = attrs.field(factory=dict)
    """A kind of trouble, with and without its model -> when it was there last."""
    now: Counter[tuple[object, ...]] = attrs.field(factory=Counter)
    """How often it is there now."""
    troubles: int = 0
    """How much trouble there has been."""
    going_on: int = 0
    """How much of it there is now."""
    waits: int = 0
    longest: float = 0.0
    """The longest wait without trouble, as a part of its bound."""
    longest_troubled: float = 0.0

    # ---- laws -------------------------------------------------------------------------------

    def law(self, holds: object, what: str) -> None:
        """State that *what* is so; the first that is not is kept, and ends the simulation."""
        if not holds and self.broken is None:
            self.broken = LawBroken(f"{what}, at {trio.current_time():.3f} s")
            self.say(f"BROKEN: {what}")
            self.scope.cancel(reason="a law is broken")

    def say(self, text: str) -> None:
        """Add to the history, of which only a sum is kept."""
        line = f"{trio.current_time():.6f} {text}"
        self.digest = zlib.crc32(line.encode(), self.digest)
        if self.trace:
            print(line)

    def fault(self, kind: str, *about: object, lasts: bool = False) -> None:
        """The world makes trouble: one more of *kind*; where it *lasts*, until `over`."""
        self.faults[kind] += 1
        self.trouble(kind, *about, lasts=lasts)

    def trouble(self, kind: str, *about: object, lasts: bool = False) -> None:
        """Something that costs those who wait time, or explains an error, without being a fault of its own."""
        self.say(f"trouble: {kind} {about}")
        self.troubles += 1
        self.going_on += lasts
        for key in {(kind,), (kind, *about)}:
            self.now[key] += lasts
            self.happened[key] = trio.current_time()

    def trouble_over(self, kind: str, *about: object) -> None:
        """What lasted is over."""
        self.going_on -= 1
        for key in {(kind,), (kind, *about)}:
            self.now[key] -= 1
            self.happened[key] = trio.current_time()

    def has_happened(self, *key: object, since: float = -math.inf) -> bool:
        """Whether there was trouble of that kind at *since* or later."""
        return self.now[key] > 0 or self.happened.get(key, -math.inf) >= since - EPSILON

    async def dither(self) -> None:
        """Let others run a few times, where real code would wait for the kernel."""
        for _ in range(self.rng.randrange(3)):
            await trio.lowlevel.checkpoint()

    # ---- servers ------------------------------------------------------------------------------

    def supervise(self, spec: ModelConfig, attempt: int, holding: Holding = NOTHING) -> Server:
        """What `Fleet` is given: makes the process of one attempt."""
        return Server(self, spec, attempt, holding, self.numbers(spec.name))

    def spawned(self, server: Server) -> None:
        """A process of *server* exists from now on."""
        name, now = server.spec.name, trio.current_time()
        self.say(f"{name} spawned as attempt {server.attempt}")
        others = list(self.alive.values())
        self.law(not self.closing, "nothing starts after shutdown (I8)")
        self.law(server.attempt not in self.known, "an attempt number names one process for ever (I2)")
        self.law(all(other.spec.name != name for other in others), f"two processes of {name} (I3)")
        # What was decided in one step may happen in any order; the rules ask who comes to whom.
        older = sorted(other.spec.name for other in others if other.attempt < server.attempt)
        self.law(may_live(self.config, name, older), f"{name} starts beside {older} (I4)")
        wanted = self.waiting[name] > 0 or self.last_left.get(name, -math.inf) >= now - NO_TIME
        self.law(wanted, f"{name} is started for nobody (I9)")
        group = self.group_of(server)
        loading = [s for s in others if s.phase == "loading" and s.attempt not in self.ended]
        loading = [s for s in loading if self.group_of(s) is group]
        self.law(len(loading) < group.core.rules.parallel_loads, "no more load at the same time than may")
        self.known.add(server.attempt)
        self._check_memory(server, others)
        self.alive[server.attempt] = server
        self._check_tokens(server)

    def group_of(self, server: Server) -> SwapGroup:
        """The swap group that its model is in now."""
        return next(group for group in self.fleet.groups if server.spec.name in group.models)

    def _check_memory(self, server: Server, others: Sequence[Server]) -> None:
        if not self.sizes:
            return
        self.fits([*(other.reserved for other in others), *self.lent.values()], server.holding, server.spec.name)
        if self.honest:
            uses = [*(other.use for other in others), server.use, *self.lent.values()]
            used = total(uses)
            self.law(
                all(size <= self.machine.totals[device] for device, size in used.items()),
                f"the machine has what its servers use, with {server.spec.name} (I4)",
            )

    def fits(self, reserved: Iterable[Holding], newcomer: Holding, name: str) -> None:
        """Law: what is reserved fits, on the devices that the newcomer asks for."""
        sums = total([*reserved, newcomer])
        over = {d: sums[d] for d, size in newcomer.items() if size and sums[d] > self.sizes.get(d, 0)}
        self.law(not over, f"what {name} reserves fits beside the others: {over} (I4)")

    def _check_tokens(self, server: Server) -> None:
        group = self.group_of(server)
        # At a shutdown nobody waits for a process that cannot be ended.
        mine = [s for s in self.alive.values() if self.group_of(s) is group and not (s.stuck and self.closing)]
        self.law(len(mine) <= group.limiter.borrowed_tokens, "a process holds its token until it is gone (I7)")

    def stopping(self, server: Server) -> None:
        """*server* is told to end."""
        self.say(f"{server.spec.name} is stopped")
        self.law(not self.holders.get(server.attempt), f"{server.spec.name} is stopped while it serves (I1)")
        swap = self.evicted.get(server.attempt)
        if swap is not None:
            group = self.group_of(server)
            rivals = [
                s
                for s in self.alive.values()
                if s is not server and s.told and not s.stuck and self.group_of(s) is group
            ]
            mixed = [s.spec.name for s in rivals if self.evicted.get(s.attempt, swap) != swap]
            self.law(not mixed, f"one swap at a time, but {mixed} still go for another one")
        server.told = True

    def vanished(self, server: Server) -> None:
        """Nothing of it is left."""
        self.say(f"{server.spec.name} is gone")
        self._check_tokens(server)
        del self.alive[server.attempt]
        self.machine.uses.pop(server.attempt, None)

    def takes(self, server: Server, use: Holding) -> None:
        """It uses so much from now on; where there is not so much, the kernel ends it."""
        server.use = use
        self.machine.uses[server.attempt] = use
        short = any(size < 0 for size in self.machine.free().values())
        if short:
            self.law(not self.honest, "an honest machine never runs out of memory (I4)")
        server.short = short

    # ---- requests ---------------------------------------------------------------------------------

    def arrives(self, request: Request) -> None:
        """It wants a lease."""
        request.since, request.waits = trio.current_time(), True
        self.waiting[request.model] += 1
        request.place = self.waiting[request.model]
        request.troubles = self.troubles - self.going_on

    def waits_no_more(self, request: Request) -> None:
        """It was granted, rejected, or left."""
        if request.waits:
            request.waits = False
            self.waiting[request.model] -= 1
            self.last_left[request.model] = trio.current_time()

    def granted(self, label: str, model: str, attempt: int) -> None:
        """The scheduler says that it is served."""
        request, server = self.requests.get(label), self.alive.get(attempt)
        if request is None:  # memory that is lent
            return
        self.law(request.waits, "a grant is for somebody who waits")
        self.law(request.model == model, "a grant is for the model that was asked for")
        self.law(server is not None and server.spec.name == model, "a grant needs a process of the attempt (I1, I2)")
        self.law(server is not None and server.phase == "ready", "a grant needs a server that is ready (I1)")
        self.law(attempt not in self.gates, f"nobody passes the closed gate of {model} (I11)")
        self.law(not self.closing, "nobody is granted after shutdown (I8)")
        holders = self.holders.setdefault(attempt, set())
        self.law(len(holders) < self.config.models[model].parallel, "no more are served at once than may be")
        holders.add(label)
        request.attempt = attempt
        self.judge_wait(request)
        self.waits_no_more(request)
        self.say(f"{label} is granted {model}")

    def over(self, request: Request) -> None:
        """It has given its lease back, or waits no longer for one."""
        self.waits_no_more(request)
        if request.attempt:
            holders = self.holders[request.attempt]
            holders.discard(request.label)
            if not holders:
                del self.holders[request.attempt]
            request.attempt = 0

    def judge_wait(self, request: Request) -> None:
        """Law: nobody waits for longer than can be promised (I11)."""
        self.waits += 1
        waited, trouble = trio.current_time() - request.since, self.troubles - request.troubles
        bound = self.bound(request, trouble)
        self.law(waited <= bound, f"{request.label} waits {waited:.0f} s for {request.model}, bound {bound:.0f} (I11)")
        if trouble:
            self.longest_troubled = max(self.longest_troubled, waited / bound)
        else:
            self.longest = max(self.longest, waited / bound)

    # ---- at any time ----------------------------------------------------------------------------

    def look(self) -> None:
        """What must hold whenever somebody looks."""
        now = trio.current_time()
        for request in list(self.requests.values()):
            if request.waits:
                waited, bound = now - request.since, self.bound(request, self.troubles - request.troubles)
                self.law(waited <= bound, f"{request.label} waits for ever for {request.model} (I6, I11)")
        for attempt, server in self.alive.items():
            deadline = self.gates.get(attempt, math.inf) if server.dead_since == math.inf else math.inf
            late = self.holders.get(attempt) and now > deadline + CUT_GRACE + EPSILON
            self.law(not late, "a drain deadline takes the leases back (I6, I10)")
        groups = self.fleet.groups
        self.law(all(group.core.wake_at > now for group in groups), "the scheduler is woken when it wants to be (I6)")
        known = {ticket for group in groups for ticket in group.core._where}
        answers = {ticket: answer for group in groups for ticket, answer in group._answers.items()}
        self.law(known <= answers.keys(), "nobody who left is remembered (I9)")
        waiting = {ticket for ticket, answer in answers.items() if not answer.given.is_set()}
        self.law(waiting <= known, "whoever waits is in the queue (I5)")

    def cut_is_due(self, attempt: int) -> bool:
        """Whether leases on *attempt* may have been taken away."""
        return self.hastened or trio.current_time() >= self.gates.get(attempt, math.inf) - EPSILON


def total(holdings: Iterable[Holding]) -> Counter[str]:
    """The sum on each device."""
    sums: Counter[str] = Counter()
    for holding in holdings:
        sums.update(holding)
    return sums


def may_live(config: Config, newcomer: str, others: Sequence[str]) -> bool:
    """Whether the written rules let *newcomer* start beside *others*; written anew, from the reference."""
    group_of = {member: group for group in config.groups for member in group.members}
    mine = group_of.get(newcomer)
    for other in others:
        theirs = group_of.get(other)
        if mine is None or theirs is None:
            continue
        if mine.swap if mine is theirs else mine.exclusive and not theirs.persistent:
            return False
    if config.matrix is None or not others:
        return True
    together = {newcomer, *others}
    return any(together <= allowed for allowed in SETS[id(config.matrix)])


SETS: dict[int, list[set[str]]] = {}
"""id of a matrix -> its combinations, as they were drawn."""


# ---- a server ----------------------------------------------------------------------------------------


@attrs.define(eq=False)
class Server:
    """`process.ModelProcess` without a process: it does what its fate says, whatever it is told."""

    account: Account
    spec: ModelConfig
    attempt: int
    holding: Holding
    fate: Fate
    stuck: bool = False
    phase: str = "new"
    told: bool = False
    """To end."""
    dead_since: float = math.inf
    short: bool = False
    use: Holding = NOTHING
    seen: Holding = NOTHING
    """What the daemon has measured."""
    talks: dict[_Talk, None] = attrs.field(factory=dict)
    upstream: Way | None = None
    back_at: float = math.inf
    _death: trio.Event = attrs.field(factory=trio.Event)
    _back: trio.Event = attrs.field(factory=trio.Event)

    def __attrs_post_init__(self) -> None:
        size = self.account.needs.get(self.spec.name)
        if size is not None and self.holding:
            gpus = [device for device in self.holding if device != "ram" and self.holding[device]]
            self.use = {(gpus or ["ram"])[0]: size}

    @property
    def reserved(self) -> Holding:
        """What it was given, or what it was seen to use, whichever is more."""
        return {d: max(self.holding.get(d, 0), self.seen.get(d, 0)) for d in {**self.holding, **self.seen}}

    def die(self) -> None:
        """End, and break all connections."""
        if not self._death.is_set():
            self._death.set()
            self.dead_since = trio.current_time()
            self.break_off()

    def break_off(self) -> None:
        for talk in list(self.talks):
            talk.break_off()

    async def run(self, *, task_status: Report) -> StartFailed | None:
        account = self.account
        await account.dither()
        self.phase = "loading"
        account.spawned(self)
        try:
            if (failure := await self._load()) is not None:
                account.trouble("failed start", self.spec.name)
                return failure
            self.phase = "ready"
            account.say(f"{self.spec.name} is ready")
            self.upstream = Way(self)
            task_status.started(self.upstream)
            await self._wait_death(self.fate.crashes_at)
            if not self._death.is_set():
                account.fault("crash while serving", self.spec.name)
                self.die()
            account.trouble("crash", self.spec.name)
            await trio.sleep(self.fate.notice)
            task_status.died("it was told to die")
            await trio.sleep(self.fate.sweep)
            return None
        finally:
            # Shielded as the real one's is: nothing may be left.
            with trio.CancelScope(shield=True):
                await self._end()

    async def _load(self) -> StartFailed | None:
        fate, account, name = self.fate, self.account, self.spec.name
        account.takes(self, self.use)
        limit = self.spec.health_check_timeout
        if self.short:
            return StartFailed(name, "there is no memory", out_of_memory=True)
        late = fate.load > limit
        if late:
            account.fault("never ready", name, lasts=True)
        try:
            await self._wait_death(min(fate.load, fate.fails_at, limit))
        finally:
            if late:
                account.trouble_over("never ready", name)
        if self._death.is_set() or fate.fails_at < min(fate.load, limit):
            account.fault("exit while loading", name)
            return StartFailed(name, "it exited with 1 before it was ready")
        if late:
            return StartFailed(name, "not ready in time")
        if fate.runs_out:
            account.fault("out of memory", name)
            return StartFailed(name, "there is no memory", out_of_memory=True)
        return None

    async def _wait_death(self, seconds: float) -> None:
        with trio.move_on_after(seconds):
            await self._death.wait()

    async def _end(self) -> None:
        account, fate, name = self.account, self.fate, self.spec.name
        was, self.phase = self.phase, "stopping"
        if was == "ready" and not self._death.is_set():
            account.stopping(self)
            self.break_off()
        self.told = True
        if not self._death.is_set():
            late = fate.hangs or bool(fate.stuck)
            if late:
                account.fault("hang at stop", name, lasts=True)
            await self._wait_death(self.spec.unload_timeout if late else fate.stop)
            if late:
                account.trouble_over("hang at stop", name)
            if fate.stuck and not self._death.is_set():
                account.fault("survives SIGKILL", name, lasts=True)
                await trio.sleep(KILL_WAIT)
                self.stuck, self.back_at = True, trio.current_time() + fate.stuck
                return
        await account.dither()
        account.vanished(self)

    def pids(self) -> list[int]:
        """One, with the number of the attempt."""
        return [self.attempt] if self.attempt in self.account.alive else []

    def come_back(self) -> None:
        """End after all, though it was stuck."""
        self._back.set()

    async def wait_gone(self) -> None:
        with trio.move_on_at(self.back_at):
            await self._back.wait()
        self.account.trouble_over("survives SIGKILL", self.spec.name)
        self.account.vanished(self)


@attrs.define(eq=False)
class Way:
    """`upstream.Upstream` without sockets: the way to one server, which says what `Request.piece` says."""

    server: Server
    closed: bool = False
    base_url: str = "http://127.0.0.1:1"

    def request(self, method: str, target: bytes, headers: object, body: bytes) -> _Talk:
        return _Talk(self, self.server.account.requests[body.decode()])

    async def listens(self) -> bool:
        await trio.lowlevel.checkpoint()
        return self.server.dead_since == math.inf and self.server.phase == "ready"

    def close(self) -> None:
        self.closed = True


@attrs.define(eq=False)
class _Talk:
    """One request at its server: the block of it, and the answer."""

    way: Way
    request: Request
    status: int = 200
    headers: tuple[tuple[bytes, bytes], ...] = ((b"content-type", b"text/event-stream"),)
    said: int = 0
    begun: bool = False
    broken: bool = False
    _scope: trio.CancelScope | None = None

    async def __aenter__(self) -> Self:
        server, request = self.way.server, self.request
        account = server.account
        request.sends += 1
        account.law(request.sends <= 2, "a request is sent twice at most (I14)")
        first = account.alive.get(request.first_sender)
        died = first is None or first.told or first.dead_since < math.inf
        account.law(request.sends == 1 or (request.lost and died), "only the death of a server is a reason to retry")
        account.law(request.attempt == server.attempt, "a request goes to the server that it has a lease on (I1, I2)")
        request.lost, request.first_sender = "", server.attempt
        await trio.lowlevel.checkpoint()
        if self.way.closed or server.dead_since < math.inf or server.phase != "ready":
            raise self._lost("connection refused")
        server.talks[self] = None
        try:
            await self._speak_first()
        except BaseException:
            del server.talks[self]
            raise
        if server.fate.greed > 1 and server.use and not request.fault:
            self._grow()
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.way.server.talks.pop(self, None)

    async def _speak_first(self) -> None:
        server, request = self.way.server, self.request
        await self._pass(request.first)
        match request.fault:
            case "refused":
                server.account.fault("no answer")
                raise self._lost("it broke the connection")
            case "killed" if request.sends == 1:
                server.account.fault("death before the first byte", server.spec.name)
                server.die()
                await self._pass(0)
            case "hangs":
                server.account.fault("hanging request", lasts=True)
                try:
                    await self._pass(math.inf)
                finally:
                    server.account.trouble_over("hanging request")
        self.begun = True

    def _grow(self) -> None:
        server = self.way.server
        use = {device: int(size * server.fate.greed) for device, size in server.use.items()}
        if use != server.seen and any(size > server.reserved.get(d, 0) for d, size in use.items()):
            server.account.fault("more memory than said", server.spec.name)
            server.account.honest = False
            server.account.takes(server, use)
            if server.short:
                server.die()

    def chunks(self) -> AsyncIterator[bytes]:
        return self

    def __aiter__(self) -> _Talk:
        return self

    async def __anext__(self) -> bytes:
        request, server = self.request, self.way.server
        if self.said == request.pieces:
            raise StopAsyncIteration
        if self.said:
            await self._pass(request.gap)
        if self.said == (request.pieces + 1) // 2:
            if request.fault == "cut":
                server.account.fault("truncated answer")
                raise self._lost("the body broke off")
            if request.fault == "killed late":
                server.account.fault("death within an answer", server.spec.name)
                server.die()
                await self._pass(0)
        self.said += 1
        return request.piece(self.said, server.attempt)

    async def _pass(self, seconds: float) -> None:
        """Time passes, unless the connection breaks."""
        if not self.broken:
            with trio.CancelScope(deadline=trio.current_time() + seconds) as self._scope:
                await trio.sleep_forever() if seconds else await trio.lowlevel.checkpoint()
        else:
            await trio.lowlevel.checkpoint()
        if self.broken:
            raise self._lost("connection reset")

    def break_off(self) -> None:
        self.broken = True
        if self._scope is not None:
            self._scope.cancel(reason="the server breaks the connection")

    def _lost(self, why: str) -> UpstreamFailed:
        server, request = self.way.server, self.request
        if not self.begun:
            # What is told in time must be retried; what is told too late need not be.
            died = server.dead_since < math.inf or server.told
            left = server.dead_since + server.fate.notice - trio.current_time()
            request.lost = "death" if died else "refused"
            if died and left > LONGEST_DEATH - EPSILON:
                request.lost = "death, told late"
        return UpstreamFailed(server.spec.name, why, before_first_byte=not self.begun)


# ---- the shell, watched -----------------------------------------------------------------------------


class Silence(Journal):
    """Keeps nothing: to write it down takes longer than to decide it."""

    def note(self, command: Command) -> None:
        return


class Group(SwapGroup):
    """A swap group whose decisions are noted in the account as they are carried out."""

    account: Account
    """Of all groups of the life that is being simulated."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.journal = Silence()

    def feed(self, event: Event) -> None:
        match event:
            case Squeezed(sizes):
                self.account.sizes = dict(sizes)
            case Measured(model, attempt, peak):
                server = self.account.alive.get(attempt)
                if server is not None and server.spec.name == model:  # else it is stale
                    server.seen = peak
        super().feed(event)

    def _begin_anew(self, event: Event, exc: Exception) -> None:
        """A scheduler that breaks is a bug, however well its group mends that."""
        raise exc

    def _obey(self, command: Command) -> None:
        account = self.account
        match command:
            case Grant(ticket, model, attempt):
                account.granted(self.labels.get(ticket, ""), model, attempt)
            case Start():
                account.law(not account.closing, "no start is decided after shutdown (I8)")
            case CloseGate(model, attempt, _, unload):
                spec = self.models[model]
                timeout = spec.unload_drain_timeout if unload else spec.drain_timeout
                account.gates[attempt] = trio.current_time() + (math.inf if timeout is None else timeout)
                account.say(f"the gate of {model} is closed")
            case OpenGate(_, attempt):
                account.gates.pop(attempt, None)
            case Swap(_, evictions):
                account.swaps += 1
                account.evicted.update((eviction.attempt, account.swaps) for eviction in evictions)
                account.ended.update(eviction.attempt for eviction in evictions)
            case Stop(_, attempt):
                account.ended.add(attempt)
        super()._obey(command)


class WatchedFleet(Fleet):
    """A fleet that notes in the account who wants a lease, and who has given it back."""

    account: Account

    @asynccontextmanager
    async def lease(self, model: str, weight: float | None = None, label: str = "") -> AsyncIterator[Lease]:
        account = self.account
        request = account.requests[label]
        account.arrives(request)
        try:
            async with super().lease(model, weight, label) as lease:
                try:
                    yield lease
                finally:
                    account.over(request)  # before the next in line is granted
        finally:
            account.over(request)
