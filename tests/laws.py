"""The laws of scheduling: what holds in every world after every step, whatever happened before.

Numbers such as I4 are those of the design's invariants.  A law is judged from what the shell
of a `World` has seen, not from what the scheduler thinks, wherever that is possible.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from trioswap.circuit import HEALTHY
from trioswap.errors import (
    DoesNotFit,
    MemoryLent,
    MemoryTaken,
    ModelCrashed,
    ModelRemoved,
    ModelStuck,
    ModelUnloaded,
    ShuttingDown,
    StartFailed,
    TrioswapError,
)
from trioswap.lifecycle import OCCUPIED, State
from trioswap.messages import (
    Arrived,
    Command,
    Died,
    Ended,
    Event,
    Left,
    OpenGate,
    Reject,
    RetireAsked,
    ShutdownBegan,
    Stop,
    UnloadAsked,
    WokeUp,
)
from trioswap.outlook import waiting
from trioswap.planning import make_plan
from trioswap.residency import Holding, Offer
from trioswap.turns import GAPS_NEEDED, Model, due_at, turn_lease

if TYPE_CHECKING:
    from worlds import World


class LawBroken(AssertionError):
    """The scheduler did what it must not."""


def law(holds: object, what: str) -> None:
    """State that *what* is so."""
    if not holds:
        raise LawBroken(what)


# ---- after one event ----------------------------------------------------------------------------


class Told:
    """What one event must lead to, and must not."""

    def __init__(self, world: World, event: Event) -> None:
        """To be made before *event* happens."""
        self.world, self.event = world, event
        failed = isinstance(event, Ended) and event.failure is not None and not world.runs[event.model].stopping
        self.failed = event.model if failed else None
        self.waited = [t for t, m in world.waiting.items() if m == self.failed]
        self.before, self.attempts = dict(world.waiting), {run.attempt for run in world.runs.values()}
        self.had = world.runs[self.failed].holding if self.failed else {}

    def check(self, commands: Sequence[Command], gates: Mapping[tuple[str, int], str]) -> None:
        """To be called when *commands* are carried out; *gates* is as it was before."""
        self._failed_start(commands)
        self._unloaded()
        self._retired()
        self._gates_stay_closed(commands, gates)
        self._who_left()

    def _failed_start(self, commands: Sequence[Command]) -> None:
        world, name = self.world, self.failed
        if name is None:
            return
        told = {c.ticket for c in commands if isinstance(c, Reject) and isinstance(c.error, StartFailed)}
        if self.event.failure.out_of_memory and world.budget is not None and name not in world.again:
            law(not told, "out of memory: it is tried once more before anybody is told")
            if self.waited:
                world.again[name] = self.had
        else:
            law(told == set(self.waited), "a failed start is told to all who wait for it (I5)")

    def _unloaded(self) -> None:
        world = self.world
        match self.event:
            case UnloadAsked(names):
                pass
            case ShutdownBegan():
                names = tuple(world.core.models)
            case _:
                return
        for name in names:
            law(name not in world.waiting.values(), "who waits for an unloaded model is told at once (I5)")
            run = world.runs.get(name)
            ends = run is None or run.stopping or world.gates.get((name, run.attempt)) == ""
            law(ends, "an unloaded model ends, now or when it has run dry")

    def _retired(self) -> None:
        world = self.world
        if not isinstance(self.event, RetireAsked):
            return
        removed, replaced = self.event.removed, self.event.replaced
        for name in (*removed, *replaced):
            run = world.runs.get(name)
            fresh = run is None or run.attempt not in self.attempts
            ends = fresh or run.stopping or world.gates.get((name, run.attempt)) == ""
            law(ends, "a model that was replaced or removed ends, now or when it has run dry")
        kept = {t for t, name in self.before.items() if name not in removed}
        law(kept <= world.waiting.keys() | world.serving.keys(), "who waits for what is replaced goes on waiting")
        law(not {*removed} & {*world.waiting.values()}, "who waits for a removed model is told at once (I5)")

    def _gates_stay_closed(self, commands: Sequence[Command], gates: Mapping[tuple[str, int], str]) -> None:
        """Else two that are in the way could take turns in being reopened."""
        world = self.world
        usual = isinstance(self.event, Arrived | Left | WokeUp) and not any(isinstance(c, Stop) for c in commands)
        if not usual or len(world.limits.weights) > 1:
            return
        for command in commands:
            if isinstance(command, OpenGate):
                claim = world.core.models[gates[command.model, command.attempt]]
                waits = claim.is_claim and due_at(claim) <= world.now and not self._somebody_has_to_stay()
                law(not waits, f"the gate of {command.model} opens again and {claim.name} waits on (I11)")

    def _somebody_has_to_stay(self) -> bool:
        """In a swap of several victims one of them may have got work that is protected."""
        world = self.world
        fresh = {n for n, r in world.runs.items() if world.now < r.ready_at + turn_lease(world.core.models[n])}
        return any(not run.stopping and (not run.ready or name in fresh) for name, run in world.runs.items())

    def _who_left(self) -> None:
        world = self.world
        for name in [name for name in world.again if name not in world.waiting.values()]:
            del world.again[name]


# ---- what a command may be --------------------------------------------------------------------------


def on_grant(world: World, ticket: int, name: str, attempt: int) -> None:
    """A request is served."""
    law(world.waiting.get(ticket) == name, "a grant is for somebody who waits")
    law(name in world.runs, "a grant needs a process")
    run = world.runs[name]
    law(run.ready, "a grant needs a ready model")
    law(not run.stopping, "a grant needs a model that stays (I1)")
    law(run.attempt == attempt, "a grant is for the present attempt (I2)")
    law((name, attempt) not in world.gates, "nobody passes a closed gate")
    served = [*world.serving.values(), *world.cut.values()].count(name)
    law(served < world.core.models[name].policy.parallel, "no more are served at the same time than may be")
    world.again.pop(name, None)


def on_reject(world: World, ticket: int, error: TrioswapError, event: Event) -> None:
    """A request gets an error, and a true one."""
    law(ticket in world.waiting, "an error is for somebody who waits")
    name = world.waiting[ticket]
    match error:
        case StartFailed() | ModelCrashed() if isinstance(event, Arrived):
            true = _may_be_refused(world, name, error)
        case StartFailed():
            true = isinstance(event, Ended) and event.model == name and event.failure is not None
        case ModelCrashed():
            died = isinstance(event, Died | Ended) and event.model == name
            true = died and _may_be_refused(world, name, error)
        case ModelUnloaded():
            true = isinstance(event, UnloadAsked) and name in event.models
        case ModelRemoved():
            asked = isinstance(event, RetireAsked) and name in event.removed
            true = asked or (isinstance(event, Arrived) and world.core.models[name].removed)
        case ShuttingDown():
            true = world.closing
        case DoesNotFit() | ModelStuck() | MemoryLent() | MemoryTaken():
            blockers = unmovable(world)
            true = name in blockers or world.core.residency.place(name, blockers) is None
        case _:
            true = False
    law(true, f"an error is true, also {type(error).__name__}")
    law(error.retry_after is None or error.retry_after >= 1, "nobody is told to ask again at once")
    if isinstance(error, StartFailed | ModelCrashed):
        asked_again = world.now + (error.retry_after or 0)
        law(asked_again >= _open_until(world, name), "who asks again when it was told to is not refused for that")


def _may_be_refused(world: World, name: str, error: StartFailed | ModelCrashed) -> bool:
    return world.now < _open_until(world, name) and error.model == name


def on_start(world: World, name: str, holding: Holding) -> None:
    """A process begins."""
    core = world.core
    law(not world.closing, "no start after shutdown (I8)")
    law(name not in world.runs, "one process for a model (I3)")
    law(name in world.waiting.values(), "no load for nobody (I9)")
    _keeps_promises(world, name, holding)
    others = {other: core.models[other].holding for other in world.runs}
    law(core.residency.place(name, others) is not None, f"{name} starts beside {sorted(others)} (I4)")
    if core._budget is not None:
        over = core._budget.overcommitted({**others, name: holding})
        law(not over.keys() & holding.keys(), f"what {name} holds fits beside {sorted(others)} (I4)")
    loads = 1 + sum(not run.ready and not run.stopping for run in world.runs.values())
    law(loads <= core.rules.parallel_loads, "no more load at the same time than may")
    if name in world.again and core._budget is not None:
        had, sizes = world.again[name], core._budget.sizes
        all_there_is = any(size == sizes.get(device) for device, size in holding.items())
        law(all_there_is or sum(holding.values()) > sum(had.values()), "after running out of memory it gets more")


def _keeps_promises(world: World, newcomer: str, holding: Holding) -> None:
    """Who starts takes nothing away from the claim before it, neither the room it was promised nor a way to get it."""
    core = world.core
    order = core.plan.order[: core.plan.order.index(newcomer)] if newcomer in core.plan.order else []
    first = next((core.models[name] for name in order if core.models[name].is_claim), None)
    if first is None:
        return
    stays = {n: core.models[n].holding for n in staying(world) if core.plan.closed.get(n) is not first}
    if core.residency.place(first.name, stays) is not None:
        stays[newcomer] = holding
        law(core.residency.place(first.name, stays) is not None, f"{newcomer} took the room of {first.name} (I11)")
    elif due_at(first) <= world.now and not core.rules.by_arrival and _could_have(world, first.name, stays):
        stays[newcomer] = holding
        law(_could_have(world, first.name, stays), f"{newcomer} took the way out of {first.name} (I11)")


def _could_have(world: World, name: str, stays: Mapping[str, Holding]) -> bool:
    def offers(other: str) -> Offer | None:
        run = world.runs.get(other)
        goes = run is not None and run.ready and not run.stuck and world.core.models[other].policy.yields
        return Offer(0, busy=False, cost=1) if goes else None

    return world.core.residency.victims(name, stays, offers) is not None


def on_stop(world: World, name: str, event: Event) -> None:
    """A process is told to end, not for others."""
    model = world.core.models[name]
    asked = isinstance(event, UnloadAsked | RetireAsked | ShutdownBegan) or model.retiring
    law(model.policy.yields or asked, "who does not yield is only unloaded")


def on_swap(world: World, target: str, victims: Sequence[str]) -> None:
    """Processes are told to end for another."""
    core = world.core
    law(not world.closing, "no swap after shutdown (I8)")
    law(target in world.waiting.values(), "nobody is put out for nobody (I9)")
    law(all(core.models[name].policy.yields for name in victims), "who does not yield is not put out")
    if [claim.name for claim in world.claims()] == [target]:
        stay = {n: core.models[n].holding for n in staying(world) if n not in victims}
        for name in victims:
            room = core.residency.place(target, {**stay, name: core.models[name].holding})
            law(room is None, f"{name} was put out without need for {target}")


def on_end(world: World, name: str, attempt: int) -> None:
    """A process is told to end."""
    law(name in world.runs, "who is stopped runs")
    run = world.runs[name]
    law(run.attempt == attempt, "a stop is for the present attempt (I2)")
    law(not run.stopping, "one teardown (I3)")
    law(name not in world.serving.values(), "nobody is served by what is stopped (I1)")


def on_close(world: World, name: str, attempt: int, unload: bool) -> None:
    """A gate is closed."""
    run, model = world.runs[name], world.core.models[name]
    law(run.attempt == attempt, "a gate of the present attempt (I2)")
    if unload:
        return
    law(model.policy.yields, "the gate of one that does not yield stays open")
    claim = world.core.plan.closed.get(name)
    law(claim in world.claims(), "a gate is closed for somebody (I9)")
    if name in world.serving.values():
        lightest = min(1.0, model.heaviest / max(c.queue.heaviest for c in world.claims()))
        law(world.now >= run.ready_at + turn_lease(model) * lightest, "a turn has its lease")
        law(due_at(claim, model.heaviest) <= world.now, "who works goes on until somebody is overdue")


def on_open(world: World, name: str, attempt: int) -> None:
    """A gate is opened again."""
    law(world.runs[name].attempt == attempt, "a gate of the present attempt (I2)")
    law(world.gates.get((name, attempt)) != "", "a gate that was closed for an unload stays closed")


def turn_begins(world: World, name: str) -> None:
    """A model became ready: with one resident nobody has two turns while another waits."""
    if not world.limits.turns:
        return
    for claim in world.claims():
        since, others = world.turns.get(claim.name, (-math.inf, frozenset()))
        if since != claim.claim_start:
            since, others = claim.claim_start, frozenset()
        law(name not in others, f"{name} has two turns while {claim.name} waits (I11)")
        # A turn that began in the very instant may be over in it, and who was first then is a question of names.
        begun_since = {name} if world.now > since and claim.name != name else set()
        world.turns[claim.name] = since, others | begun_since


# ---- what has failed ------------------------------------------------------------------------------


def fails(world: World, name: str) -> None:
    """A start failed, or a server that was ready ended by itself; to be called before its run is."""
    policy, run = world.core.models[name].policy, world.runs[name]
    before = 0 if run.ready and world.now - run.ready_at >= HEALTHY else world.failures.get(name, (0, 0))[0]
    doublings = before - 1 if run.ready else before  # the first death is forgiven
    delay = min(policy.backoff * 2**doublings, policy.backoff_max) if doublings >= 0 else 0
    world.failures[name] = before + 1, world.now + delay


def on_trial(world: World, name: str) -> None:
    """*name* is started, or others have to go for it."""
    law(world.now >= _open_until(world, name), f"nothing is done for {name}, which has just failed")


def _open_until(world: World, name: str) -> float:
    return world.failures.get(name, (0, -math.inf))[1]


def _circuits(world: World) -> None:
    for name, model in world.core.models.items():
        failing = world.now < _open_until(world, name)
        law(model.circuit.is_open(world.now) == failing, "what fails is not tried, and what does not fail is")
        law(not failing or name not in world.waiting.values(), "nobody waits for what has just failed (I6)")


# ---- what holds always ------------------------------------------------------------------------------


def check(world: World) -> None:
    """All that can be seen at any time."""
    for name, model in world.core.models.items():
        _books(world, name, model)
    tickets = {*world.waiting, *world.serving, *world.cut}
    law(set(world.core._where) == tickets, "who left is not remembered (I9)")
    _indexes(world)
    _room(world)
    _circuits(world)
    if not world.closing:
        _nothing_was_missed(world)
        _the_first_claim(world)
        _hopeless(world)
        _squeezed(world)
    law(world.core.wake_at > world.now, "a time that has passed is acted on, not asked for again")
    at_rest = not (world.serving or world.cut or world.drains) and all(run.ready for run in world.runs.values())
    if world.waiting and at_rest:
        stopping = any(run.stopping for run in world.runs.values())
        law(stopping or world.core.wake_at < math.inf, "whoever waits, something will happen (I6)")


def _books(world: World, name: str, model: Model) -> None:
    granted = {t for tickets in (world.serving, world.cut) for t, m in tickets.items() if m == name}
    law(set(model.leases) == granted, "the scheduler counts exactly what is being served (I1)")
    law(set(model.queue) == {t for t, m in world.waiting.items() if m == name}, "no waiter is lost (I5)")
    law(not model.leases or model.state in (State.READY, State.DRAINING), "leases need a live model (I1)")
    law(not (model.state is State.READY and model.has_room and len(model.queue)), "an open gate lets in whom it can")
    law((model.state in OCCUPIED) == (name in world.runs), "state and process agree")
    if model.state is State.DRAINING and not model.retiring:
        law(world.core.plan.closed.get(name) in world.claims(), "a gate is closed for somebody (I9)")


def _indexes(world: World) -> None:
    models = world.core.models.values()
    law(set(world.core._claims) == {m.name for m in models if m.is_claim}, "the index of claims is true")
    law(set(world.core._occupied) == {m.name for m in models if m.state in OCCUPIED}, "the index of runs is true")


def _room(world: World) -> None:
    """What is resident fits, in the order in which it came (I4)."""
    if not world.limits.static:
        return
    room = sorted(world.runs.items(), key=lambda item: item[1].attempt)
    for i, (name, _) in enumerate(room):
        before = {other: run.holding for other, run in room[:i]}
        law(world.core.residency.place(name, before) is not None, f"{name} beside {sorted(before)} (I4)")


def _nothing_was_missed(world: World) -> None:
    """A plan made now would change nothing: what was not decided again need not have been."""
    core, models = world.core, world.core.models.values()
    fresh = make_plan(
        [m for m in models if m.is_claim], [m for m in models if m.state in OCCUPIED],
        core.residency, core.rules, float(world.now),
    )  # fmt: skip
    law(not fresh.start, "no start was missed")
    law(not fresh.swap, "no swap was missed")
    law(not fresh.hopeless, "no answer was missed")
    shut = {m.name for m in models if m.state is State.DRAINING and not m.retiring}
    law(set(fresh.closed) == shut, "gates are as they should be")
    law(core.wake_at <= fresh.wake_at, "it wakes in time")


def _the_first_claim(world: World) -> None:
    """Whoever is first in line is not kept waiting by somebody who could go, or by nobody."""
    core, claims = world.core, [claim for claim in world.claims() if not claim.stuck]
    if not claims or core.rules.by_arrival:
        return
    first = min(claims, key=lambda claim: _place_in_line(claim, world.now))
    stays = {name: core.models[name].holding for name in staying(world)}
    going = {n for n, r in world.runs.items() if (n, r.attempt) in world.gates}
    stays = {name: holding for name, holding in stays.items() if name not in going}

    def offers(name: str) -> Offer | None:
        return Offer(0, busy=False, cost=1) if _may_go(world, name, first) else None

    if core.residency.place(first.name, stays) is None:
        could_go = core.residency.victims(first.name, stays, offers) or frozenset()
        # Who loads for nobody goes on loading until the others who are in the way have run dry.
        waits = first.name in world.gates.values() and all(not world.runs[name].ready for name in could_go)
        law(not could_go or waits, "who is first in line gets its turn (I11)")
        return
    loads = sum(model.state is State.STARTING for model in core.models.values())
    held = {name: core.models[name].holding for name in world.runs}
    free = core.residency.place(first.name, held) is not None and first.state is State.STOPPED
    law(not free or loads >= core.rules.parallel_loads, "who is first in line and has room is started (I11)")


def _place_in_line(claim: Model, now: float) -> tuple[bool, float, float, str]:
    due = due_at(claim)
    return (due > now, 0 if due <= now else -claim.policy.priority, due, claim.name)


def _may_go(world: World, name: str, claim: Model) -> bool:
    """Whether there is no reason at all to wait for *name*."""
    model, run, now = world.core.models[name], world.runs[name], world.now
    if not model.policy.yields or run.stopping or (name, run.attempt) in world.gates:
        return False
    if not run.ready:
        return name not in world.waiting.values()
    had_its_turn = now >= run.ready_at + turn_lease(model)
    if name in world.serving.values() or name in world.cut.values() or name in world.waiting.values():
        return had_its_turn and due_at(claim, model.heaviest) <= now
    return had_its_turn or len(model.costs.gaps) < GAPS_NEEDED or not model.policy.linger


def _hopeless(world: World) -> None:
    blockers = unmovable(world)
    for claim in world.claims():
        hope = not claim.stuck and world.core.residency.place(claim.name, blockers) is not None
        law(hope, "who can never be served is told at once (I6)")


def _squeezed(world: World) -> None:
    if world.budget is None:
        return
    core = world.core
    over = world.budget.overcommitted({name: core.models[name].holding for name in staying(world)})
    for name in staying(world):
        model = core.models[name]
        idle = model.state is State.READY and not model.has_work and model.policy.yields
        law(not idle or not over.keys() & model.holding.keys(), "who is idle gives back what others have taken")


def staying(world: World) -> list[str]:
    """Who will not be gone without anybody doing more."""
    unloaded = {name for (name, _), claim in world.gates.items() if claim == ""}
    unloaded |= {name for name, model in world.core.models.items() if model.retiring}
    return [n for n, run in world.runs.items() if run.stuck or not (run.stopping or n in unloaded)]


def unmovable(world: World) -> dict[str, Holding]:
    """Who will not go whatever is asked for."""
    models = world.core.models
    return {n: models[n].holding for n in staying(world) if world.runs[n].stuck or not models[n].policy.yields}


# ---- what can be seen ---------------------------------------------------------------------------------


def check_views(world: World) -> None:
    """Whoever waits can see where it stands."""
    core = world.core
    views = waiting(core.models, core.plan, core.residency, float(world.now))
    law(sorted(view.ticket for view in views) == sorted(world.waiting), "everybody who waits is shown, once")
    for name in world.core.models:
        line = [view for view in views if view.model == name]
        law([view.place for view in line] == list(range(1, len(line) + 1)), "places are 1, 2, 3")
    for view in views:
        law(0 <= view.estimate < math.inf, "an estimate is a number of seconds")
        law(view.waited >= 0, "nobody has waited less than nothing")
        law(view.stage in ("queued", "draining", "stopping", "loading"), "a stage is one of four")
