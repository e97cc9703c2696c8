"""What clients of the event stream are told, whatever happens and however slowly they read."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Self

import attrs
import pytest
import trio
from children import PATIENCE
from fakes import Script, spec
from trio.testing import wait_all_tasks_blocked

from trioswap import events
from trioswap.asgi import Exchange
from trioswap.config import Config, GroupConfig
from trioswap.events import BACKLOG, BRIEF, BYTES_EVERY, KEEP_ALIVE, PACE, QUEUE_EVERY, Events
from trioswap.fleet import Fleet
from trioswap.lifecycle import State
from trioswap.logs import Logs
from trioswap.tracker import Tracked, Tracker

BURST = ["logData", "logData", "modelStatus", "uiConfig", "profileChanged", "inflight", "queue"]
SNAPSHOT = ["modelStatus", "profileChanged", "inflight", "queue"]
# More than the longest time from a change to its message.
SETTLED = 2 * QUEUE_EVERY


# ---- both sides of the hub ----------------------------------------------------------------------


@attrs.frozen
class Told:
    """One event as a browser sees it."""

    number: int
    kind: str
    data: object


def told(stream: bytes) -> list[Told]:
    """The events in whole pieces of a stream; anything but numbered messages, comments and `retry` is refused."""
    found = []
    *blocks, rest = stream.split(b"\n\n")
    assert rest == b"", "a piece ends with an event"
    for block in blocks:
        if block in (b": keep-alive", b"retry: 2000"):
            continue
        number, name, data = block.split(b"\n")
        assert name == b"event: message"
        document = json.loads(data.removeprefix(b"data: "))
        assert document.keys() == {"type", "data"}
        found.append(Told(int(number.removeprefix(b"id: ")), document["type"], json.loads(document["data"])))
    return found


@attrs.define(eq=False)
class Stage:
    """What is looked at: changed by the test, and it counts how often somebody looks."""

    tracker: Tracker = attrs.field(factory=Tracker)
    logs: Logs = attrs.field(factory=Logs)
    states: dict[str, str] = attrs.field(factory=lambda: {"a": "stopped"})
    active: str | None = None
    queue: list[str] = attrs.field(factory=list)
    listeners: list = attrs.field(factory=list)
    looks: int = 0

    @contextmanager
    def watch(self, listener) -> Iterator[None]:
        self.listeners.append(listener)
        try:
            yield
        finally:
            self.listeners.remove(listener)

    def models(self):
        self.looks += 1
        return [{"id": name, "state": state} for name, state in self.states.items()]

    def profile(self):
        return self.active

    def waiting(self):
        return [{"request": name} for name in self.queue]

    def row(self, request: Tracked):
        exchange = request.exchange
        return {"id": str(request.number), "bytes": exchange.sent, "head": exchange.status is not None}

    def interface(self):
        return {"activity": {"session_id": []}}

    # ---- what the test does with it ----

    def ring(self) -> None:
        for listener in list(self.listeners):
            listener()

    def set_state(self, state: str) -> None:
        self.states["a"] = state
        self.ring()

    def request(self) -> contextmanager[Tracked]:
        return self.tracker.track(Exchange({}, "req", None, None), "/x")


@attrs.define(eq=False)
class Screen:
    """A client, which takes what it is sent unless its gate is closed, and knows what its messages amount to."""

    taken: list[tuple[float, Told]] = attrs.field(factory=list)
    pieces: list[bytes] = attrs.field(factory=list)
    gate: trio.Event = attrs.field(factory=trio.Event)
    models: object = None
    profile: object = None
    waiting: object = None
    requests: dict[str, object] = attrs.field(factory=dict)

    @classmethod
    def reading(cls) -> Self:
        screen = cls()
        screen.gate.set()
        return screen

    async def write(self, data: bytes) -> None:
        await self.gate.wait()
        self.pieces.append(data)
        for message in told(data):
            self.taken.append((trio.current_time(), message))
            self.apply(message)

    def apply(self, message: Told) -> None:
        match message.kind, message.data:
            case "modelStatus", models:
                self.models = models
            case "profileChanged", {"active": profile}:
                self.profile = profile
            case "queue", {"waiting": waiting}:
                self.waiting = waiting
            case "inflight", {"operation": "snapshot", **rest}:
                self.requests = {row["id"]: row for row in rest.get("requests", [])}
            case "inflight", {"operation": "upsert", "request": row}:
                self.requests[row["id"]] = row
            case "inflight", {"operation": "remove", "id": number}:
                self.requests.pop(number, None)

    def kinds(self) -> list[str]:
        return [message.kind for _, message in self.taken]

    def since_burst(self, kind: str) -> list[tuple[float, object]]:
        """How many seconds after the burst messages of the kind came, and their data."""
        began, _ = self.taken[0]
        later = [(round(at - began, 6), message) for at, message in self.taken[len(BURST) :]]
        return [(after, message.data) for after, message in later if message.kind == kind]


@pytest.fixture
def stage():
    return Stage()


@pytest.fixture
def hub():
    return Events()


@pytest.fixture
async def screen(hub, stage, nursery):
    """A client that reads and has had its burst."""
    screen = Screen.reading()
    nursery.start_soon(hub.stream, stage, screen.write)
    await wait_all_tasks_blocked()
    assert screen.kinds() == BURST
    return screen


# ---- what comes first ---------------------------------------------------------------------------


async def test_the_burst(hub, stage, nursery, autojump_clock):
    """Everything as it stands, in the order of llama-swap, then who waits; data is JSON within JSON."""
    stage.logs.from_ourselves(b"one\n")
    stage.logs.from_child("a", "zwölf\n".encode())
    stage.active, stage.queue = "night", ["q"]
    with stage.request():
        screen = Screen.reading()
        nursery.start_soon(hub.stream, stage, screen.write)
        await wait_all_tasks_blocked()
    [piece] = screen.pieces
    assert piece.startswith(
        b'retry: 2000\n\nid: 1\nevent: message\ndata: {"type":"logData",'
        rb'"data":"{\"source\":\"proxy\",\"data\":\"one\\n\"}"}' + b"\n\nid: 2\n"
    )
    assert [(message.kind, message.data) for _, message in screen.taken] == [
        ("logData", {"source": "proxy", "data": "one\n"}),
        ("logData", {"source": "upstream", "data": "zwölf\n"}),
        ("modelStatus", [{"id": "a", "state": "stopped"}]),
        ("uiConfig", {"activity": {"session_id": []}}),
        ("profileChanged", {"active": "night"}),
        ("inflight", {"operation": "snapshot", "requests": [{"id": "1", "bytes": 0, "head": False}]}),
        ("queue", {"waiting": [{"request": "q"}]}),
    ]
    assert piece.isascii()


async def test_nothing_under_way_has_no_key(screen, autojump_clock):
    """A snapshot without requests is llama-swap's: the key is absent."""
    assert screen.taken[5][1].data == {"operation": "snapshot"}


async def test_numbers_grow(hub, stage, nursery, autojump_clock):
    """For each client, and over all of them: whoever comes again finds none that it has seen."""
    first = Screen.reading()
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as inner:
            inner.start_soon(hub.stream, stage, first.write)
            for name in ("starting", "ready"):
                await trio.sleep(SETTLED)
                stage.logs.from_ourselves(b"x\n")
                stage.set_state(name)
            await trio.sleep(SETTLED)
            scope.cancel()
    again = Screen.reading()
    nursery.start_soon(hub.stream, stage, again.write)
    await wait_all_tasks_blocked()
    numbers = [message.number for _, message in first.taken + again.taken]
    assert len(first.taken) == len(BURST) + 4
    assert again.kinds() == BURST
    assert numbers == sorted(set(numbers))


# ---- models, profiles, lines -----------------------------------------------------------------------


async def test_a_change_is_told_at_once_and_then_at_a_pace(stage, screen, autojump_clock):
    """The first change after a quiet time comes in the same instant; of those that follow closely the last one."""
    await trio.sleep(PACE)
    for state in ("starting", "ready", "stopping"):
        stage.set_state(state)
        await trio.sleep(PACE / 4)
    await trio.sleep(SETTLED)

    assert screen.since_burst("modelStatus") == [
        (PACE, [{"id": "a", "state": "starting"}]),
        (2 * PACE, [{"id": "a", "state": "stopping"}]),
    ]


async def test_what_rings_no_bell_is_seen_all_the_same(stage, screen, autojump_clock):
    """A profile that becomes active, soon; the models come with it, as llama-swap sends them."""
    await trio.sleep(0.01)
    stage.active = "night"
    await trio.sleep(SETTLED)

    assert screen.since_burst("profileChanged") == [(QUEUE_EVERY, {"active": "night"})]
    assert screen.since_burst("modelStatus") == [(QUEUE_EVERY, [{"id": "a", "state": "stopped"}])]


async def test_lines_come_as_they_are_written(stage, screen, autojump_clock):
    """At once, by their source, whole characters however they were cut."""
    data = "größe\n".encode()
    stage.logs.from_child("a", data[:3])
    await wait_all_tasks_blocked()
    stage.logs.from_child("a", data[3:])
    await wait_all_tasks_blocked()
    stage.logs.from_ourselves(b"\xff\n")
    await wait_all_tasks_blocked()

    assert screen.since_burst("logData") == [
        (0, {"source": "upstream", "data": "gr"}),
        (0, {"source": "upstream", "data": "öße\n"}),
        (0, {"source": "proxy", "data": "\ufffd\n"}),
    ]


# ---- requests --------------------------------------------------------------------------------------


async def test_the_life_of_a_request(stage, screen, autojump_clock):
    """When it begins, when its response has a head, its bytes now and then, when it ends."""
    await trio.sleep(PACE)
    with stage.request() as request:
        await trio.sleep(0.3)
        request.exchange.status = 200
        await trio.sleep(0.3)
        for _ in range(100):
            request.exchange.sent += 1
            await trio.sleep(0.01)
    await trio.sleep(SETTLED)

    begun, headed, *growing, removed = screen.since_burst("inflight")
    assert begun == (PACE, {"operation": "upsert", "request": {"id": "1", "bytes": 0, "head": False}})
    assert headed[1]["request"] == {"id": "1", "bytes": 0, "head": True}
    assert headed[0] <= 0.4 + BYTES_EVERY
    times = [at for at, _ in growing]
    sizes = [data["request"]["bytes"] for _, data in growing]
    assert sizes == sorted(set(sizes))
    assert len(sizes) in (3, 4)
    assert min(later - earlier for earlier, later in pairwise(times)) >= BYTES_EVERY - 1e-6
    assert removed == (1.7, {"operation": "remove", "id": "1"})


async def test_a_request_that_rings_shows_no_bytes_too_often(stage, screen, autojump_clock):
    """Other news do not make bytes news."""
    with stage.request() as request:
        for number in range(20):
            request.exchange.sent += 1
            stage.set_state(str(number))
            await trio.sleep(PACE)

    times = [at for at, data in screen.since_burst("inflight") if data["request"]["bytes"]]
    assert 5 < len(times) < 8
    assert min(later - earlier for earlier, later in pairwise(times)) >= BYTES_EVERY - 1e-6


async def test_requests_between_two_looks(stage, screen, autojump_clock):
    """The first few are told with all they were; a thousand of them cost no more."""
    for _ in range(1000):
        with stage.request() as request:
            request.exchange.sent = 7
    await trio.sleep(SETTLED)
    seen = screen.since_burst("inflight")

    assert len(seen) == 2 * BRIEF
    assert seen[0] == (PACE, {"operation": "upsert", "request": {"id": "1", "bytes": 7, "head": False}})
    assert screen.requests == {}


# ---- who waits -------------------------------------------------------------------------------------


async def test_who_waits_is_told_while_somebody_does(stage, screen, autojump_clock):
    """Twice a second, though nothing else happens, and that nobody does any more, once."""
    await trio.sleep(PACE)
    stage.queue = ["q"]
    stage.ring()
    await trio.sleep(3.5 * QUEUE_EVERY)
    stage.queue = []
    stage.ring()
    await trio.sleep(SETTLED)

    *busy, last = screen.since_burst("queue")
    assert [data for _, data in busy] == 4 * [{"waiting": [{"request": "q"}]}]
    assert [at for at, _ in busy] == [PACE + n * QUEUE_EVERY for n in range(4)]
    assert last[1] == {"waiting": []}


# ---- bells -----------------------------------------------------------------------------------------


async def test_models_ring(nursery, autojump_clock):
    """Inside the block, in the very steps in which something happens to a model of any group; outside it no more."""
    script, rung = Script(load=1), []
    models = {name: spec(name) for name in "ab"}
    groups = tuple(GroupConfig(name, (name,), exclusive=False) for name in "ab")
    fleet = Fleet(Config(models, groups), script.supervise)
    await nursery.start(fleet.run)
    assert len(fleet.groups) == 2
    with trio.fail_after(PATIENCE), fleet.watch(lambda: rung.append((fleet.state("a"), fleet.state("b")))):
        async with fleet.lease("a"), fleet.lease("b"):
            seen = list(dict.fromkeys(rung))
    before = len(rung)
    async with fleet.lease("a"), fleet.lease("b"):
        pass
    fleet.shutdown()

    assert seen == [
        (State.STARTING, State.STOPPED),
        (State.READY, State.STOPPED),
        (State.READY, State.STARTING),
        (State.READY, State.READY),
    ]
    assert len(rung) == before


# ---- clients that are quiet, slow or gone -------------------------------------------------------------


async def test_silence_is_broken_by_comments(stage, screen, autojump_clock):
    """Every 15 s of it; events count as noise."""
    await trio.sleep(KEEP_ALIVE - 1)
    stage.logs.from_ourselves(b"x\n")
    await trio.sleep(2 * KEEP_ALIVE + 1)

    assert screen.pieces[2:] == 2 * [b": keep-alive\n\n"]


async def test_nobody_listening_is_no_work(hub, stage, autojump_clock):
    """Before the first client and after the last: nothing rings, and nobody looks."""
    with stage.request():
        stage.ring()
    assert (stage.looks, stage.tracker.begun, stage.tracker.ended, stage.listeners) == (0, [], [], [])
    with trio.move_on_after(SETTLED):
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(hub.stream, stage, Screen.reading().write)
    looks = stage.looks
    assert looks
    with stage.request():
        stage.ring()
        await trio.sleep(SETTLED)
    assert (stage.looks, stage.tracker.begun, stage.tracker.ended, stage.listeners) == (looks, [], [], [])
    assert stage.logs.proxy._followers == stage.logs.upstream._followers == []
    assert repr(hub) == "<Events 0 clients>"


async def test_a_busy_daemon_is_looked_at_at_a_pace(stage, screen, autojump_clock):
    """However often it rings, and however many clients there are."""
    looks = stage.looks
    for _ in range(1000):
        stage.ring()
        await trio.sleep(0.001)

    assert stage.looks - looks <= 1 / PACE


async def test_a_slow_client_starts_again(hub, stage, nursery, screen, autojump_clock):
    """No more than the limit is kept for it; then it gets a snapshot, then what changes; others wait for nothing."""
    slow = Screen()
    nursery.start_soon(hub.stream, stage, slow.write)
    await wait_all_tasks_blocked()
    for number in range(BACKLOG + 10):
        await trio.sleep(1.5 * PACE)
        stage.set_state(f"state {number}")
        assert all(len(client.backlog) <= BACKLOG for client in hub._clients)
    await wait_all_tasks_blocked()
    assert len(screen.since_burst("modelStatus")) == BACKLOG + 10
    assert slow.pieces == []
    slow.gate.set()
    await wait_all_tasks_blocked()
    after_burst = slow.kinds()[len(BURST) :]
    # One message was already on its way to the writer.
    assert after_burst == ["modelStatus", *SNAPSHOT]
    assert slow.models == [{"id": "a", "state": f"state {BACKLOG + 9}"}]
    stage.set_state("in the end")
    await trio.sleep(SETTLED)
    assert slow.kinds()[len(BURST) + len(after_burst) :] == ["modelStatus"]
    assert slow.models == screen.models == [{"id": "a", "state": "in the end"}]


async def test_a_little_behind_is_not_too_far(hub, stage, nursery, screen, autojump_clock):
    """As many messages as the limit are kept, beside the one that is on its way, and come in order."""
    slow = Screen()
    nursery.start_soon(hub.stream, stage, slow.write)
    await wait_all_tasks_blocked()
    for number in range(BACKLOG + 1):
        await trio.sleep(1.5 * PACE)  # so that each is told at once
        stage.set_state(str(number))
    slow.gate.set()
    await trio.sleep(SETTLED)

    assert [data[0]["state"] for _, data in slow.since_burst("modelStatus")] == list(map(str, range(BACKLOG + 1)))


async def test_a_slow_client_loses_log_lines_of_its_own(hub, stage, nursery, screen, autojump_clock):
    """It reads how many bytes; who reads has them all."""
    slow = Screen()
    nursery.start_soon(hub.stream, stage, slow.write)
    await wait_all_tasks_blocked()
    for _ in range(100):
        stage.logs.from_child("a", b"x" * 9_999 + b"\n")
        await wait_all_tasks_blocked()
    slow.gate.set()
    await wait_all_tasks_blocked()

    assert sum(len(data["data"]) for _, data in screen.since_burst("logData")) == 1_000_000
    first, rest = [data["data"] for _, data in slow.since_burst("logData")]
    assert first == "x" * 9_999 + "\n"
    assert rest.startswith("-- ")
    assert " bytes dropped --\n" in rest[:40]


async def test_a_first_look_shows_no_ghosts(hub, stage, nursery, screen, monkeypatch, autojump_clock):
    """A request that a newcomer is shown before anybody else is taken from it when it ends, too."""
    monkeypatch.setattr(events, "BRIEF", 0)
    late = Screen.reading()
    with stage.request():
        nursery.start_soon(hub.stream, stage, late.write)
        await wait_all_tasks_blocked()
        assert late.requests.keys() == {"1"}
    await trio.sleep(SETTLED)

    assert late.requests == {}


async def test_a_look_after_losses_shows_no_ghosts(hub, stage, nursery, screen, monkeypatch, autojump_clock):
    """Nor does one that only a client that starts again has seen."""
    monkeypatch.setattr(events, "BRIEF", 0)
    monkeypatch.setattr(events, "BACKLOG", 0)
    slow = Screen()
    nursery.start_soon(hub.stream, stage, slow.write)
    for state in ("starting", "ready"):  # the first waits for the writer, the second is lost
        await trio.sleep(2 * PACE)
        stage.set_state(state)
        await wait_all_tasks_blocked()
    with stage.request():
        slow.gate.set()
        await wait_all_tasks_blocked()
        assert slow.requests.keys() == {"1"}
    await trio.sleep(SETTLED)

    assert slow.requests == {}


@attrs.define(eq=False)
class World:
    """Steps that may come in any order."""

    hub: Events
    stage: Stage
    nursery: trio.Nursery
    rng: random.Random
    screens: list[Screen] = attrs.field(factory=list)
    numbers: Iterator[int] = attrs.field(factory=lambda: itertools.count(1))

    def begin(self) -> None:
        """What `Tracker.track` does, without a block: requests need not end in order."""
        row = Tracked(next(self.numbers), Exchange({}, "req", None, None), 0.0, 0.0, "/x")
        self.stage.tracker.rows[row.number] = row
        for listener in self.stage.tracker.begun:
            listener(row)

    def end(self) -> None:
        if rows := self.stage.tracker.rows:
            row = rows.pop(self.rng.choice(list(rows)))
            for listener in self.stage.tracker.ended:
                listener(row)

    def serve(self) -> None:
        if rows := self.stage.tracker.rows:
            exchange = self.rng.choice(list(rows.values())).exchange
            exchange.status, exchange.sent = 200, exchange.sent + 1

    def wait(self) -> None:
        self.stage.queue = self.rng.choice([[], ["q"], ["q", "r"]])
        self.stage.ring()

    def change(self) -> None:
        self.stage.set_state(self.rng.choice(["stopped", "starting", "ready"]))

    def switch(self) -> None:
        self.stage.active = self.rng.choice([None, "day", "night"])

    def come(self) -> None:
        if len(self.screens) < 6:
            self.screens.append(Screen())
            self.nursery.start_soon(self.hub.stream, self.stage, self.screens[-1].write)

    def turn(self) -> None:
        """A client goes on reading, or stops."""
        if self.screens:
            screen = self.rng.choice(self.screens)
            if screen.gate.is_set():
                screen.gate = trio.Event()
            else:
                screen.gate.set()


@pytest.mark.parametrize("seed", range(40))
async def test_in_the_end_everybody_knows_the_truth(hub, stage, nursery, autojump_clock, monkeypatch, seed):
    """Whenever a client comes, however it reads, what its messages amount to is what is (seeded)."""
    monkeypatch.setattr(events, "BACKLOG", 5)
    monkeypatch.setattr(events, "BRIEF", seed % 3)
    rng = random.Random(seed)
    world = World(hub, stage, nursery, rng)
    steps = [world.begin, world.end, world.serve, world.serve, world.wait, world.change, world.switch, world.turn]
    for _ in range(300):
        rng.choice([*steps, world.come])()
        if rng.random() < 0.7:
            await trio.sleep(rng.choice([0, 0, 0.01, 0.05, 0.12, 0.3]))
    for screen in world.screens:
        screen.gate.set()
    await trio.sleep(SETTLED)

    for screen in world.screens:
        assert screen.models == stage.models()
        assert screen.profile == stage.active
        assert screen.waiting == stage.waiting()
        assert screen.requests == {str(row.number): stage.row(row) for row in stage.tracker.rows.values()}
        numbers = [message.number for _, message in screen.taken]
        assert numbers == sorted(set(numbers))
