"""Days of a simulated daemon, drawn from a seed: its configuration, its clients, its operators, and what goes wrong.

One seed is one configuration.  It is lived through by one daemon after the other, each with what the ones
before it have learned, until the hours are over.  All runs on a mock clock, and Trio's order of ready tasks
is drawn as well, so the seed decides everything: the same seed gives the same history to the last step.
"""

from __future__ import annotations

import gc
import logging
import math
import random
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

import attrs
import pytest
import sim_machine
import trio
from fakes import FakeMachine
from sim_machine import EPSILON, Account, Fate, Group, Request, WatchedFleet, total

from trioswap import arrangement, inference
from trioswap.access import ANYBODY
from trioswap.api import Services
from trioswap.asgi import Exchange
from trioswap.config import Config, GroupConfig, MemoryConfig, ModelConfig
from trioswap.config.matrix import read_matrix
from trioswap.config.mistakes import Mistakes
from trioswap.errors import (
    Cancelled,
    DoesNotFit,
    LeaseCut,
    MemoryLent,
    MemoryTaken,
    ModelCrashed,
    ModelError,
    ModelStuck,
    ModelUnloaded,
    QueueFull,
    QueueTimedOut,
    ShuttingDown,
    StartFailed,
    StillLoading,
    TooManyRequests,
    TrioswapError,
    UpstreamFailed,
)
from trioswap.footprints import RAM, Wish
from trioswap.group import CUT_GRACE
from trioswap.incoming import ClientLeft
from trioswap.learning import recall, remember
from trioswap.logs import Logs
from trioswap.memory import RETURN_WAIT, make_memory
from trioswap.messages import BecameReady, Died, Drained, Ended, GotStuck, Measured
from trioswap.names import Names
from trioswap.process import KILL_WAIT
from trioswap.routing import Routing
from trioswap.runs import DEATH_NOTICE
from trioswap.tracker import Tracked

G = 2**30
TARGET = b"/v1/chat/completions"
# Seconds for which a client that reads nothing is waited for: what `server` grants a write without progress.
STUCK_WRITE = 30.0
# Seconds between looks at what must hold at any time.
LOOK_EVERY = 30.0
HOUR = 3600.0
# So many looks at the clock within one instant: somebody never lets time go on, or nobody is ever woken.
STANDSTILL = 300_000
# Seconds: later than whoever lost its server waits for the news.
LATE_NOTICE = DEATH_NOTICE + 1


class JumpingClock(trio.abc.Clock):
    """`trio.testing.MockClock` with `autojump_threshold=0`, in half of the steps.

    Trio asks how long it may sleep when no task is ready: it is the next deadline at once.
    """

    def __init__(self, on_standstill: Callable[[], None]) -> None:
        self.now = 0.0
        self.asked = 0
        self.on_standstill = on_standstill

    def start_clock(self) -> None:
        return

    def current_time(self) -> float:
        self.asked += 1
        if self.asked == STANDSTILL:
            self.on_standstill()
        return self.now

    def deadline_to_sleep_time(self, deadline: float) -> float:
        if self.now < deadline < math.inf:
            self.now, self.asked = deadline, 0
        return 0.0


# ---- a world ------------------------------------------------------------------------------------------


@attrs.frozen
class World:
    """A configuration, and how everything behaves in it."""

    kind: str
    config: Config
    totals: dict[str, int]
    needs: dict[str, int]
    load: tuple[float, float]
    stop: float
    service: float
    """Seconds that a request is served at most, if its client reads as it comes."""
    slow: float
    """The part of clients that read slowly."""
    clients: int
    think: float
    trouble: float
    """Mean seconds between two acts of an operator or of chance."""
    ill: float
    """The part of attempts that go wrong by themselves, and of requests."""
    lasting: float = 120.0
    """Seconds that a loan, a squeeze, or a stuck process lasts at most."""

    @property
    def longest(self) -> float:
        """V: seconds that a request is served at most."""
        return self.service + (90.0 if self.slow else 0.0) + 2 * LATE_NOTICE


def draw_world(rng: random.Random) -> World:
    names = list("abcde"[: rng.choice([2, 3, 3, 4, 5])])
    kind = rng.choice(["group", "groups", "matrix", "memory", "memory and group"])
    totals, needs, memory = {}, {}, None
    if "memory" in kind:
        totals = rng.choice(
            [{RAM: 24 * G}, {"gpu0": 24 * G, RAM: 48 * G}, {"gpu0": 24 * G, "gpu1": 12 * G, RAM: 32 * G}]
        )
        needs = {name: rng.randint(2, 11) * G for name in names}
        memory = MemoryConfig(headroom=rng.choice([0, G]), yield_to_others=rng.random() < 0.5, learn=rng.random() < 0.8)
    common = {
        "max_wait": rng.choice([0.0, 5.0, 30.0, 60.0]),
        "turn_lease": rng.choice([0.0, 1.0, 4.0]),
        "linger": rng.choice([0.0, 1.0]),
        "drain_timeout": rng.choice([None, None, 3.0, 30.0]),
        "unload_drain_timeout": rng.choice([1.0, 30.0]),
        "backoff": rng.choice([0.0, 1.0, 5.0]),
        "backoff_max": rng.choice([10.0, 60.0]),
        "health_check_timeout": 60.0,
    }
    models = {name: _draw_model(rng, name, common, needs.get(name)) for name in names}
    groups, matrix = _draw_rules(rng, kind, names)
    config = Config(
        models,
        groups,
        matrix,
        memory,
        policy=rng.choice(["lease"] * 9 + ["fifo"]),
        parallel_loads=rng.choice([1, 1, 2]),
        heartbeat=rng.choice([None, None, None, 15.0]),
        max_queue=rng.choice([1000, 1000, 1000, 6]),
    )
    return World(
        kind,
        config,
        totals,
        needs,
        load=(0.5, rng.choice([3.0, 10.0, 20.0])),
        stop=rng.choice([0.2, 3.0]),
        service=rng.choice([2.0, 8.0]),
        slow=rng.choice([0.0, 0.03]),
        clients=rng.randint(10, 20),
        think=rng.uniform(25.0, 50.0),
        trouble=rng.uniform(20.0, 50.0),
        ill=rng.choice([0.02, 0.06, 0.15]),
    )


def _draw_model(rng: random.Random, name: str, common: dict[str, object], need: int | None) -> ModelConfig:
    memory, device = None, None
    if need is not None:
        memory, device = rng.choice([(need, None), (need + G, None), ({RAM: need}, None), (need, RAM), (None, None)])
    return ModelConfig(
        name,
        (f"serve-{name}",),
        "http://127.0.0.1:5800",
        memory=memory,
        device=device,
        ttl=rng.choice([None, 2.0, 60.0, 600.0]),
        parallel=rng.choice([1, 2, 4, 10]),
        weight=rng.choice([1.0, 1.0, 1.0, 0.25, 4.0]),
        priority=rng.choice([0, 0, 1]),
        queue_timeout=rng.choice([None, None, None, 20.0, 300.0]),
        concurrency_limit=rng.choice([None, None, None, 5]),
        send_loading_state=rng.random() < 0.05,
        **common,
    )


def _draw_rules(rng: random.Random, kind: str, names: list[str]):
    everybody = (GroupConfig("(default)", tuple(names)),)
    match kind:
        case "group":
            return everybody, None
        case "memory and group":
            return (GroupConfig("some", tuple(names[:2])),), None
        case "groups":
            cut = rng.randint(1, len(names) - 1)
            flags = [
                {"swap": rng.random() < 0.6, "exclusive": rng.random() < 0.5, "persistent": rng.random() < 0.2}
                for _ in range(2)
            ]
            parts = tuple(names[:cut]), tuple(names[cut:])
            return tuple(GroupConfig(f"g{i}", part, **flags[i]) for i, part in enumerate(parts)), None
        case "matrix":
            sets = [rng.sample(names, rng.randint(1, len(names) - 1)) for _ in range(rng.randint(1, 3))]
            written = {f"s{i}": " & ".join(sorted(chosen)) for i, chosen in enumerate(sets)}
            matrix = read_matrix({}, {}, written, names, Mistakes())
            sim_machine.SETS[id(matrix)] = [set(chosen) for chosen in sets]
            return (), matrix
    return (), None


# ---- fates ------------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class Fates:
    """Draws what becomes of servers."""

    world: World
    rng: random.Random

    def __call__(self, name: str) -> Fate:
        rng, world = self.rng, self.world
        fate = Fate(rng.uniform(*world.load), rng.uniform(0.0, world.stop), rng.choice([0.0, 0.0, 1.0]), self.notice())
        if rng.random() >= world.ill:
            return fate
        ills = [
            {"fails_at": rng.uniform(0, fate.load)},
            {"load": math.inf},
            {"runs_out": True},
            {"crashes_at": rng.expovariate(1 / 30)},
            {"hangs": True},
            {"stuck": HOUR if rng.random() < 0.1 else rng.uniform(1, world.lasting)},
            {"greed": 1.3},
        ]
        return attrs.evolve(fate, **rng.choice(ills))

    def notice(self) -> float:
        """How late a death is seen."""
        return self.rng.choice([0.0, 0.0, 0.01, 0.5, LATE_NOTICE])


# ---- one daemon ---------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class Life:
    """One daemon from its start to its end, and everybody who has to do with it."""

    world: World
    rng: random.Random
    seconds: float
    account: Account = attrs.field(init=False)
    fleet: WatchedFleet = attrs.field(init=False)
    services: Services = attrs.field(init=False)
    outcomes: Counter[str] = attrs.field(factory=Counter)
    numbers: int = 0
    over: bool = False
    """Clients ask no more."""
    budget: object = None
    stale: list[object] = attrs.field(factory=list)
    """News of attempts that are over."""
    keys: list[object] = attrs.field(factory=list)
    turn: dict[Group, float] = attrs.field(factory=dict)

    # ---- its beginning -----------------------------------------------------------------------

    def build(self, learned: Learned, trace: bool, digest: int) -> None:
        world, config = self.world, self.world.config
        machine = FakeMachine(world.totals or {RAM: 64 * G})
        self.account = Account(
            config=config, rng=self.rng, numbers=Fates(world, self.rng), machine=machine, needs=world.needs,
            bound=self.bound, trace=trace, digest=digest,
        )  # fmt: skip
        memory = make_memory(config, machine)
        Group.account = self.account
        self.account.fleet = self.fleet = WatchedFleet(config, self.account.supervise, memory)
        self.fleet.account = self.account
        self.budget = memory.budget if memory is not None else None
        if self.budget is not None:
            self.account.sizes = dict(self.budget.sizes)
        learned.restore(self.fleet, self.budget)
        routing = Routing(Names(config), self.fleet, {})
        self.services = Services(config, self.fleet, Logs(), routing, 0)
        self.keys = [ANYBODY] * 6 + [attrs.evolve(ANYBODY, weight=weight) for weight in (0.25, 4.0)]
        self.turn = {group: self._turn(group) for group in self.fleet.groups}

    def _turn(self, group: Group) -> float:
        """Seconds of a turn of all others and of all swaps (docs/scheduling.md), without `max_wait`."""
        world = self.world
        load, stop = world.load[1], world.stop + RETURN_WAIT
        swap = load + stop
        total = 0.0
        for model in group.models.values():
            lease = min(model.turn_lease * swap, max(model.max_wait, swap)) if model.turn_lease else 0.0
            linger = model.linger * swap
            # With several resident one more load each; a death is told, and swept, before it is over.
            total += lease + linger + self.world.longest + swap + load + LATE_NOTICE + 1.0
        return total

    def bound(self, request: Request, trouble: int) -> float:
        """Seconds that *request* may wait, with so much trouble meanwhile: what docs/scheduling.md says, and more."""
        world, config = self.world, self.world.config
        if config.policy == "fifo":
            return math.inf
        models = config.models
        weights = [*(model.weight for model in models.values()), *(k.weight or 0 for k in self.keys)]
        group = next(group for group in self.fleet.groups if request.model in group.models)
        model = models[request.model]
        wait = model.max_wait * max(weights) / min(request.weight, max(weights))
        turn = wait + self.turn[group]
        rounds = math.ceil(request.place / model.parallel)
        # What fails may do so in the last moment, take its whole grace, and what is then there is another turn.
        ill = model.health_check_timeout + model.unload_timeout + KILL_WAIT + world.lasting + model.backoff_max + 30.0
        return (rounds + trouble) * turn + (2 * rounds - 1) * world.longest + trouble * (ill + world.longest)

    async def live(self) -> None:
        """Everything that happens in it."""
        with self.account.scope:
            before = trio.lowlevel.current_statistics().tasks_living
            async with trio.open_nursery() as everything:
                await everything.start(self.fleet.run)
                everything.start_soon(self._look_around)
                async with trio.open_nursery() as busy:
                    for _ in range(self.world.clients):
                        busy.start_soon(self._client)
                    busy.start_soon(self._chance, busy)
                    await trio.sleep(self.seconds)
                    quiet = self.rng.random() < 0.3
                    if quiet:
                        self.over = True
                    else:
                        await self._shut_down(everything)
                        await trio.sleep(self.rng.uniform(0, 10))
                        self.over = True
                if quiet:
                    self._check_quiet()
                    await self._shut_down(everything)
                with trio.move_on_after(self._shutdown_bound()) as late:
                    await self.fleet.wait_ended()
                self.account.law(not late.cancelled_caught, "a shutdown ends (I6)")
                everything.cancel_scope.cancel(reason="it is over")
            self._check_nothing_left(before)

    async def _shut_down(self, nursery: trio.Nursery) -> None:
        self.account.say("shutdown")
        self.account.closing = True
        for server in self.account.alive.values():
            self.account.gates[server.attempt] = min(
                self.account.gates.get(server.attempt, math.inf),
                trio.current_time() + server.spec.unload_drain_timeout,
            )
        self.fleet.shutdown()
        if self.rng.random() < 0.3:
            nursery.start_soon(self._hasten, self.rng.uniform(0, 10))

    async def _hasten(self, seconds: float) -> None:
        await trio.sleep(seconds)
        self.account.hastened = True
        self.fleet.hasten("a second signal")

    def _shutdown_bound(self) -> float:
        models = self.world.config.models.values()
        grace = max(model.unload_timeout + model.unload_drain_timeout for model in models)
        # No client is in it: whoever holds a lease can be cut. But a death may be told late, and be swept for a second.
        return grace + KILL_WAIT + CUT_GRACE + RETURN_WAIT + self.world.stop + LATE_NOTICE + 1.0

    # ---- its clients ---------------------------------------------------------------------------

    async def _client(self) -> None:
        """Ask, think, and ask again; now and then many times in a row."""
        rng, world = self.rng, self.world
        names = list(world.config.models)
        rng.shuffle(names)
        favourites = names + names[:1] * 3
        while not self.over:
            await trio.sleep(rng.expovariate(1 / world.think))
            model, haste = rng.choice(favourites), 1
            if rng.random() < 0.03:
                haste = rng.randint(5, 30)
            for _ in range(haste):
                if self.over:
                    break
                request = self._draw_request(model)
                request.leaves += trio.current_time()
                if await self._ask(request) not in ("answered", "left"):
                    break  # a program in its right mind does not ask again at once

    def _draw_request(self, model: str) -> Request:
        rng, world = self.rng, self.world
        self.numbers += 1
        pieces = rng.randint(1, 4)
        request = Request(
            self.numbers,
            model,
            first=rng.uniform(0, 0.4 * world.service),
            pieces=pieces,
            gap=rng.uniform(0, 0.5 * world.service / pieces),
        )
        if rng.random() < 0.06:
            request.leaves = rng.expovariate(1 / 15)
        if rng.random() < world.ill:
            request.fault = rng.choice(["refused", "killed", "killed", "cut", "killed late", "hangs"])
            if request.fault == "hangs":
                request.leaves = math.inf
        if rng.random() < 0.01:
            request.patience = rng.choice([5, 30])
        return request

    async def _ask(self, request: Request) -> str:
        account, rng = self.account, self.rng
        request.begun = trio.current_time()
        client = _Client(self, request)
        if rng.random() < self.world.slow:
            request.pieces = 14
            client.slow = rng.choice([rng.uniform(0, 2), math.inf])
        exchange = Exchange(_scope(request), request.label, client.receive, client.send)
        exchange.key = rng.choice(self.keys)
        request.weight = exchange.key.weight or self.world.config.models[request.model].weight
        account.requests[request.label] = request
        try:
            outcome = await self._forward(exchange, request, client)
        finally:
            del account.requests[request.label]
        if request.leaves <= trio.current_time() + EPSILON and not exchange.finished:
            outcome = "left"
        account.say(f"{request.label}: {outcome}")
        self.outcomes[outcome] += 1
        if outcome == "left":
            account.faults["client leaves"] += 1
        return outcome

    async def _forward(self, exchange: Exchange, request: Request, client: _Client) -> str:
        """What `inference.model_route` does once it knows the model, and the error boundary of `app`."""
        services = self.services
        try:
            with services.tracker.track(exchange, exchange.path) as row:
                wish = inference.Wish(TARGET, request.label.encode(), streams=client.stream)
                await inference.forward(exchange, services, row, lambda _: request.model, lambda *_: wish)
        except TrioswapError as exc:
            self.account.law(
                exchange.status is None or isinstance(exc, Cancelled), "no error after the first byte (I14)"
            )
            return self._judge_error(exc, request)
        except ClientLeft:
            self.account.law(client.left, "nobody is taken for gone who is not")
            return "left"
        return self._judge_answer(exchange, request, client)

    def _judge_answer(self, exchange: Exchange, request: Request, client: _Client) -> str:
        """Law: it is the request's own answer, and all of it; or what breaks it off has a reason (I5, I14)."""
        law = self.account.law
        law(exchange.status == 200, "what the server says is passed on")
        # What we say ourselves while it waits, and what tells of the load.
        pieces = [piece for piece in client.pieces if piece.endswith(b"\n\n") and b" of attempt " in piece]
        attempts = {piece.split(b" ")[4] for piece in pieces}
        law(len(attempts) <= 1, "an answer comes from one server (I14)")
        attempt = int(next(iter(attempts), b"0"))
        right = [request.piece(index, attempt) for index in range(1, request.pieces + 1)]
        law(pieces == right[: len(pieces)], f"{request.label} gets its own answer, in order and once (I2, I5)")
        error = bool(client.pieces) and b'"error"' in client.pieces[-1]
        if exchange.finished and not error:
            law(len(pieces) == request.pieces, f"{request.label} gets all of its answer (I14)")
            return "answered"
        reason = (
            request.fault in ("cut", "killed late", "killed", "refused")
            or self._server_failed(request, attempt)
            or self.account.cut_is_due(attempt)
            or client.pieces_of_ours  # the stream was ours before there was an answer
        )
        law(reason, f"{request.label} is broken off for a reason")
        return "error event" if error else "broken off"

    def _server_failed(self, request: Request, attempt: int) -> bool:
        return self.account.has_happened("crash", request.model, since=request.begun - LATE_NOTICE)

    def _judge_error(self, error: TrioswapError, request: Request) -> str:  # noqa: C901 - one case for each error
        """Law: an error is clear, and true."""
        account, model, now = self.account, request.model, trio.current_time()
        happened, since = account.has_happened, request.begun
        spec = self.world.config.models[model]
        match error:
            case StartFailed():
                true = happened("failed start", model) and not error.why.startswith("internal error")
            case ModelCrashed():
                true = happened("crash", model)
            case ModelUnloaded():
                true = happened("unload", model, since=since)
            case ModelStuck():
                true = happened("survives SIGKILL", since=since)
            case MemoryLent():
                true = happened("loan", since=since)
            case MemoryTaken() | DoesNotFit():
                true = bool(self.world.totals) and (not account.honest or happened("out of memory"))
            case ShuttingDown():
                true = account.closing
            case LeaseCut():
                true = happened("unload", model, since=since) or spec.drain_timeout is not None or account.closing
            case QueueTimedOut():
                true = spec.queue_timeout is not None and now >= since + spec.queue_timeout - EPSILON
            case StillLoading():
                true = now >= since + request.patience - EPSILON
            case TooManyRequests():
                true = spec.concurrency_limit is not None
            case QueueFull():
                true = self.world.config.max_queue < 1000
            case Cancelled():
                true = request.cancelled
            case UpstreamFailed():
                account.law(request.sends == 2 or request.lost != "death", "who had no byte yet is tried again (I14)")
                true = bool(request.fault) or happened("crash", model, since=since - LATE_NOTICE)
            case _:
                true = False
        account.law(true, f"an error is true: {type(error).__name__}: {error}")
        account.law(error.message and 400 <= error.status < 600, "an error is clear")
        return type(error).__name__

    # ---- its operators, and chance -------------------------------------------------------------

    async def _chance(self, nursery: trio.Nursery) -> None:
        rng = self.rng
        acts = [
            self._crash, self._crash, self._crash, self._unload, self._load, self._cancel, self._tell_stale_news,
            self._tell_stale_news, self._watch,
        ]  # fmt: skip
        if self.budget is not None:
            acts += [self._borrow, self._borrow, self._squeeze]
        while not self.over:
            await trio.sleep(rng.expovariate(1 / self.world.trouble))
            if not self.over:
                nursery.start_soon(rng.choice(acts))

    async def _crash(self) -> None:
        """A server dies, in whatever phase it is."""
        living = [server for server in self.account.alive.values() if not server.stuck]
        if living:
            server = self.rng.choice(living)
            self.account.fault(f"crash while {server.phase}", server.spec.name)
            server.die()

    async def _unload(self) -> None:
        account, rng, config = self.account, self.rng, self.world.config
        names = tuple(rng.sample(list(config.models), rng.randint(1, len(config.models))))
        account.faults["unload"] += 1
        for name in names:
            account.trouble("unload", name, lasts=True)
        with trio.move_on_after(rng.choice([math.inf, 1.0])), suppress(ModelStuck):
            await self.fleet.unload(names)
        for name in names:
            account.trouble_over("unload", name)

    async def _load(self) -> None:
        """An operator loads a model, as preloading does."""
        rng = self.rng
        request = Request(-self.numbers, rng.choice(list(self.world.config.models)), begun=trio.current_time())
        self.numbers += 1
        request.number = 10**9 + self.numbers
        request.weight = self.world.config.models[request.model].weight
        self.account.requests[request.label] = request
        try:
            with trio.move_on_after(rng.choice([math.inf, 10.0])):
                async with self.fleet.lease(request.model, label=request.label) as lease:
                    there = lease.dead.is_set() or self.fleet.passing(request.model) is not None
                    self.account.law(there, "what was loaded is there")
        except TrioswapError as exc:
            self._judge_error(exc, request)
        finally:
            del self.account.requests[request.label]

    async def _cancel(self) -> None:
        """An operator ends a request."""
        rows: list[Tracked] = list(self.services.tracker.rows.values())
        if rows:
            row = self.rng.choice(rows)
            self.account.requests[row.exchange.request_id].cancelled = True
            self.account.faults["cancelled by an operator"] += 1
            self.services.tracker.cancel(str(row.number))

    async def _tell_stale_news(self) -> None:
        """Somebody says late what was true of an attempt that is over: nothing may come of it (I2)."""
        rng, fleet = self.rng, self.fleet
        group = rng.choice(fleet.groups)
        model = group.core.models[rng.choice(sorted(self.world.config.models.keys() & group.models.keys()))]
        if model.attempt < 2:
            return
        self.account.faults["stale news"] += 1
        old = rng.randint(1, model.attempt - 1)
        news = rng.choice(
            [
                Died(model.name, old),
                BecameReady(model.name, old),
                Drained(model.name, old),
                Ended(model.name, old, rng.choice([None, StartFailed(model.name, "long ago")])),
                GotStuck(model.name, old),
                Measured(model.name, old, {RAM: 10 * G}),
            ]
        )
        if group.core.wake_at <= trio.current_time():
            return  # what is due now would be done as well
        before = model.state, model.attempt, len(model.leases), model.stuck, dict(model.holding)
        group.feed(news)
        after = model.state, model.attempt, len(model.leases), model.stuck, dict(model.holding)
        self.account.law(before == after, f"news of an attempt that is over change nothing: {type(news).__name__} (I2)")

    async def _watch(self) -> None:
        """Somebody looks at everything there is to see (I12)."""
        fleet, names = self.fleet, list(self.world.config.models)
        fleet.views()
        for view in fleet.waiting():
            self.account.law(view.estimate >= 0 and view.place >= 1, "what is told of a wait makes sense")
        name = self.rng.choice(names)
        fleet.forecast(name)
        fleet.passing(name)
        fleet.loans()
        fleet.need(name)
        repr(fleet)

    async def _borrow(self) -> None:
        """A program that is not ours wants memory, and has it for a while."""
        rng, account = self.rng, self.account
        self.numbers += 1
        name, size = f"lent{self.numbers}", rng.randint(1, 8) * G
        wish = rng.choice([Wish(size), Wish({RAM: size})])
        account.fault("loan", lasts=True)
        try:
            with trio.move_on_after(rng.choice([math.inf, rng.uniform(0, 60)])), suppress(ModelError, ShuttingDown):
                async with self.fleet.hold(name, wish) as holding:
                    account.fits([*(s.reserved for s in account.alive.values()), *account.lent.values()], holding, name)
                    account.lent[name] = dict(holding)
                    self._note_foreign(holding, 1)
                    try:
                        await trio.sleep(rng.uniform(0, self.world.lasting))
                    finally:
                        del account.lent[name]
                        self._note_foreign(holding, -1)
        finally:
            account.trouble_over("loan")

    async def _squeeze(self) -> None:
        """A program that is not ours takes memory, and asks nobody."""
        rng, account = self.rng, self.account
        device = rng.choice(list(self.world.totals))
        taken = {device: int(account.machine.free()[device] * rng.uniform(0.2, 1.0))}
        account.honest = False
        account.fault("squeeze", lasts=True)
        self._note_foreign(taken, 1)
        try:
            await trio.sleep(rng.uniform(0, self.world.lasting))
        finally:
            self._note_foreign(taken, -1)
            account.trouble_over("squeeze")

    def _note_foreign(self, holding: dict[str, int], sign: int) -> None:
        machine = self.account.machine
        machine.foreign = total([machine.foreign, {device: sign * size for device, size in holding.items()}])

    # ---- looks --------------------------------------------------------------------------------

    async def _look_around(self) -> None:
        while True:
            await trio.sleep(LOOK_EVERY)
            self.account.look()

    def _check_quiet(self) -> None:
        """Nobody is there any more, and the daemon runs on."""
        law = self.account.law
        for group in self.fleet.groups:
            law(not group._answers and not group.labels, "no ticket and no label is left")
            law(not group.core._where, "nobody is remembered who left (I9)")
            law(not group.inflight._entries, "nobody is counted who left")
            law(
                sorted(group.models) == sorted(n for n in self.world.config.models if n in group.models), "no loan left"
            )
            for model in group.core.models.values():
                law(not model.leases and not model.queue.count, "no lease and no place in a line is left")
        self._check_counts()

    def _check_counts(self) -> None:
        law, services = self.account.law, self.services
        law(not services.tracker.rows, "no request is tracked that is over")
        law(not services.quotas.waiting and not services.quotas._of_models, "nobody is counted who left")
        law(not self.account.holders and not +self.account.waiting, "nobody holds anything")
        law(not self.account.requests, "everybody has an outcome (I5)")

    def _check_nothing_left(self, tasks: int) -> None:
        law, account = self.account.law, self.account
        if account.broken is not None:
            return
        law(all(server.stuck for server in account.alive.values()), "no process is left but stuck ones (I7)")
        for group in self.fleet.groups:
            law(not group._runs and not group._gates, "no run and no gate is left")
            law(group.limiter.borrowed_tokens == 0, "every token is given back")
            law(not group._lock.locked(), "the lock is free")
        self._check_quiet()
        law(trio.lowlevel.current_statistics().tasks_living == tasks, "no task is left")


@attrs.define(eq=False)
class _Client:
    """The client's end of a request: ASGI's two functions."""

    life: Life
    request: Request
    slow: float = 0.0
    """Seconds for each piece; inf: it reads nothing, and is given up."""
    stream: bool = attrs.field(init=False)
    pieces: list[bytes] = attrs.field(factory=list)
    left: bool = False
    pieces_of_ours: bool = False
    _given_up: trio.Event = attrs.field(factory=trio.Event)

    def __attrs_post_init__(self) -> None:
        self.stream = self.life.rng.random() < 0.7

    async def receive(self) -> dict[str, object]:
        until = self.request.leaves
        if self.request.fault == "hangs":  # nobody waits for ever
            until = min(until, self.request.begun + 45.0)
        with trio.move_on_at(until):
            await self._given_up.wait()
        self.left = True
        self.request.leaves = min(self.request.leaves, trio.current_time())
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, object]) -> None:
        data = message.get("body")
        if not data:
            return
        if self.slow and not self.pieces:
            self.life.account.faults["slow reader"] += 1
        self.pieces.append(data)
        if b" of attempt " not in data:
            told = self.stream or len(self.pieces) > 1
            self.life.account.law(told, f"{self.request.label} asked for no stream, and gets no comments")
            self.pieces_of_ours = True
        if self.slow == math.inf:
            # The write of a real server is shielded as well, and bounded.
            with trio.CancelScope(shield=True):
                await trio.sleep(STUCK_WRITE)
            self.slow = 0.0
            self._given_up.set()
        elif self.slow:
            await trio.sleep(self.slow)
        else:
            await trio.lowlevel.checkpoint()


_HEAD = {
    "type": "http",
    "method": "POST",
    "path": TARGET.decode(),
    "raw_path": TARGET,
    "query_string": b"",
    "headers": [(b"host", b"simulated"), (b"content-type", b"application/json")],
    "client": ("127.0.0.1", 1),
    "scheme": "http",
}


def _scope(request: Request) -> dict[str, object]:
    if request.patience == math.inf:
        return _HEAD
    return {**_HEAD, "headers": [*_HEAD["headers"], (b"prefer", b"wait=%d" % request.patience)]}


# ---- from one daemon to the next -------------------------------------------------------------------------


@attrs.define(eq=False)
class Learned:
    """What `state` keeps in its file."""

    costs: dict[str, object] = attrs.field(factory=dict)
    memory: dict[str, object] = attrs.field(factory=dict)

    def restore(self, fleet: WatchedFleet, budget: object) -> None:
        for name, (averages, gaps) in self.costs.items():
            recall(fleet.costs[name], averages, gaps)
        if budget is not None:
            budget.footprints.restore(self.memory)

    def save(self, life: Life) -> None:
        self.costs = {name: remember(costs) for name, costs in life.fleet.costs.items()}
        if life.budget is not None:
            self.memory = life.budget.footprints.learned()


@attrs.frozen
class Report:
    """What one seed has come to."""

    seed: int
    kind: str
    hours: float
    lives: int
    outcomes: Counter[str]
    faults: Counter[str]
    starts: int
    longest: float
    """The longest wait without trouble meanwhile, as a part of its bound."""
    longest_troubled: float
    digest: int
    broken: str = ""

    @property
    def requests(self) -> int:
        return sum(self.outcomes.values())


def simulate(seed: int, hours: float, *, trace: bool = False) -> Report:
    """Live through *hours* of the world of *seed*; ends when a law is broken."""
    logging.disable(logging.CRITICAL)
    rng = random.Random(seed)
    world, learned = draw_world(rng), Learned()
    lives: list[Life] = []
    broken = ""

    async def main() -> None:
        end = hours * HOUR
        while trio.current_time() < end:
            left = end - trio.current_time()
            seconds = min(rng.choice([60.0, 1200.0, HOUR, 2 * HOUR]) * rng.uniform(0.5, 1.5), left)
            life = Life(world, rng, seconds)
            life.build(learned, trace, lives[-1].account.digest if lives else 0)
            lives.append(life)
            await life.live()
            if life.account.broken is not None:
                return
            learned.save(life)
        taken.append(trio.current_time())

    def stand_still() -> None:
        lives[-1].account.law(False, "time goes on (I6)")

    taken: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING", True)
        patch.setattr(arrangement, "SwapGroup", Group)
        trio._core._run._r.seed(seed)
        gc.disable()
        try:
            trio.run(main, clock=JumpingClock(stand_still))
        except BaseExceptionGroup as group:
            broken = f"nothing of ours breaks (I13): {_first(group)!r}"
        except Exception as exc:
            broken = f"nothing of ours breaks (I13): {exc!r}"
        finally:
            gc.enable()
            logging.disable(logging.NOTSET)
    accounts = [life.account for life in lives]
    kept = next((str(account.broken) for account in accounts if account.broken is not None), "")
    return Report(
        seed,
        world.kind,
        (taken[0] if taken else 0.0) / HOUR,
        len(lives),
        sum((life.outcomes for life in lives), Counter()),
        sum((account.faults for account in accounts), Counter()),
        sum(len(account.known) for account in accounts),
        max(account.longest for account in accounts),
        max(account.longest_troubled for account in accounts),
        accounts[-1].digest,
        kept or broken,
    )


def _first(group: BaseExceptionGroup) -> BaseException:
    first = group.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
