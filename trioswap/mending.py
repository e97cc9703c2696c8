"""What becomes of a scheduler that broke: it begins anew, from what is really there.

An exception inside a scheduler is a bug of ours, and anything that it remembers may be wrong.  What
its group has at hand is not: which servers there are, how far they are, and whom they serve.  So the
books are written anew from that, and the domain goes back to its beginning:

- every server ends, as when an operator unloads it: what it serves may finish, bounded;
- memory that is lent stays lent, for there is nothing to end;
- whoever waits is told (`SchedulerBroke`; by the group), and may come again at once.

Other domains notice nothing.  No decision of the scheduler is asked for here, and its alarm rings no
sooner than in `PAUSE`, so one that breaks every time keeps nobody busy.  Nor is it silent: the
self-check counts it, `/health/ready` says so, and where it goes on the watchdog is not fed any more.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

from trioswap import lifecycle
from trioswap.bounds import in_words, waiters
from trioswap.lifecycle import State
from trioswap.messages import CloseGate, Command, Stop
from trioswap.planning import Plan
from trioswap.runs import Answer, Run
from trioswap.scheduler import Scheduler
from trioswap.turns import Model, Served

# Seconds until a scheduler that broke is woken, if nothing happens before.
PAUSE: Final = 1.0
REASON: Final = "the scheduler broke, and begins anew"
# As many as a log line can bear.
SHOWN: Final = 20


def begin_anew(core: Scheduler, runs: Mapping[str, Run], answers: Mapping[int, Answer], now: float) -> list[Command]:
    """Have *core* know its models as *runs* and *answers* say that they are; return what ends their servers."""
    models = [_as_it_is(model, runs.get(name), answers, now) for name, model in core.models.items()]
    commands = [command for model in models if (command := _end(model, now)) is not None]
    core.plan = Plan()
    core.begin_anew(models, now + PAUSE)
    return commands


def _as_it_is(known: Model, run: Run | None, answers: Mapping[int, Answer], now: float) -> Model:
    """The model anew: what is configured and learned of it, and what can be seen of its *run*."""
    model = Model(known.name, known.policy, known.costs, removed=known.removed, circuit=known.circuit)
    model.outdated = known.outdated
    if run is None:
        return model
    model.attempt, model.holding, model.placed = run.attempt, run.holding, run.holding
    model.move(lifecycle.Event.START, now)
    if run.stuck or run.scope.cancel_called or run.dead.is_set():
        model.move(lifecycle.Event.STOP, now)
        model.stuck = run.stuck
    elif run.upstream is not None:
        model.move(lifecycle.Event.READY, now)
        model.ready_at = model.idle_since = now
        for ticket, answer in answers.items():
            if answer.lease is not None and answer.lease.attempt == run.attempt:
                model.begin_lease(ticket, Served(1.0, now))
    return model


def _end(model: Model, now: float) -> Command | None:
    """Begin the end of its server, if that is up and ours."""
    if model.state not in (State.STARTING, State.READY) or not model.policy.yields:
        return None
    if model.leases:
        model.move(lifecycle.Event.CLOSE_GATE, now)
        model.retiring = True
        return CloseGate(model.name, model.attempt, REASON, unload=True)
    model.move(lifecycle.Event.STOP, now)
    return Stop(model.name, model.attempt, REASON)


# ---- words -----------------------------------------------------------------------------------


def snapshot(core: Scheduler, labels: Mapping[int, str], now: float) -> str:
    """All that a scheduler knows, in one line; *labels* are what others call tickets."""
    try:
        return _snapshot(core, labels, now)
    except Exception as exc:  # where all is broken this may be, too
        return f"cannot be told: {exc!r}"


def _snapshot(core: Scheduler, labels: Mapping[int, str], now: float) -> str:
    models, plan = core.models, core.plan
    served = [f"{name_of(ticket, labels)} by {m.name}" for m in models.values() for ticket in m.leases]
    queue = [
        f"{name_of(w.ticket, labels)} for {w.model} {now - w.arrived:.1f} s place {w.place}" for w in waiters(models)
    ]
    blocked = [f"{name} by {'+'.join(b.by) or 'a load'}" for name, b in plan.blocked.items()]
    closed = [f"{name} for {claim.name}" for name, claim in plan.closed.items()]
    return (
        f"models=[{in_words(models.values(), now)}] leases=[{some(served)}] queue=[{some(queue)}] "
        f"wake_in={core.wake_at - now:.1f} order=[{some(plan.order)}] closed=[{some(closed)}] "
        f"blocked=[{some(blocked)}]"
    )


def name_of(ticket: int, labels: Mapping[int, str]) -> str:
    """What others call *ticket*, or its number."""
    return labels.get(ticket) or f"ticket {ticket}"


def some(words: Collection[str]) -> str:
    """*words*, as many as a log line can bear."""
    more = len(words) - SHOWN
    return ", ".join([*words][:SHOWN]) + (f" and {more} more" if more > 0 else "")
