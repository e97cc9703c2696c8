"""Models that come back: fake servers on a mock clock, and real ones once."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import attrs
import pytest
import trio
from daemons import chat, daemon, eventually, fetch, is_running, running, scripted
from fakes import FakeMachine, Script, spec
from test_reload import reloading
from trio.testing import wait_all_tasks_blocked

from trioswap.config import Config, GroupConfig, MemoryConfig
from trioswap.config.parts import HooksConfig
from trioswap.errors import TrioswapError, WaitTooLong
from trioswap.fleet import Fleet
from trioswap.footprints import Wish
from trioswap.lifecycle import State
from trioswap.memory import make_memory
from trioswap.messages import Squeezed
from trioswap.returning import PACE, Returner

AFTER = 100.0
DAY = 86_400.0
ONE_AT_A_TIME = (GroupConfig("(default)", ("a", "b", "c")),)
# Fifty bytes of memory: room for two of a, b and c, and for e beside them.
SIZES = {"a": 20, "b": 20, "c": 20, "e": 5}


@pytest.fixture
def script() -> Script:
    """A load takes 5 s, a stop 2 s."""
    return Script()


@attrs.define(eq=False)
class World:
    """A fleet of fakes, and who brings models back."""

    fleet: Fleet
    returner: Returner
    script: Script
    nursery: trio.Nursery

    async def use(self, model: str, seconds: float = 1.0) -> str:
        """One request; the model that answered, or the name of its error."""
        try:
            async with self.fleet.lease(model) as lease:
                await trio.sleep(seconds)
                return lease.upstream.answer()
        except TrioswapError as exc:
            return type(exc).__name__

    def when(self, what: str) -> list[float]:
        """When that has happened."""
        return [at for at, text in self.script.trace if text == what]

    @property
    def there(self) -> str:
        """Whose server is ready."""
        return "".join(view.name for view in self.fleet.views() if view.state is State.READY)


def configured(*groups: GroupConfig, idle: str = "a", after: float = AFTER, **changes: object) -> Config:
    """Models of *groups*; of these *idle* come back.  What else is said is of each of them, or of the whole."""
    whole = {key: changes.pop(key) for key in ("policy", "parallel_loads") if key in changes}
    groups = groups or ONE_AT_A_TIME
    models = {name: spec(name, **changes) for group in groups for name in group.members}
    return Config(models, groups, hooks=HooksConfig(idle_preload=tuple(idle), idle_after=after), **whole)


def sharing(idle: str = "a", total: int = 50, **changes: object) -> Config:
    """The models of SIZES, which share memory and nothing else."""
    models = {name: spec(name, memory=size, device="gpu0", **changes) for name, size in SIZES.items()}
    memory = MemoryConfig(headroom=0, devices={"gpu0": total})
    return Config(models, memory=memory, hooks=HooksConfig(idle_preload=tuple(idle), idle_after=AFTER))


@asynccontextmanager
async def world(script: Script, config: Config) -> AsyncIterator[World]:
    """Run it while the block runs."""
    memory = None
    if config.memory is not None:
        script.machine = FakeMachine({"gpu0": 50})
        memory = make_memory(config, script.machine)
    fleet = Fleet(config, script.supervise, memory)
    returner = Returner(fleet, config)
    async with trio.open_nursery() as nursery:
        await nursery.start(fleet.run)
        nursery.start_soon(returner.run)
        await wait_all_tasks_blocked()
        yield World(fleet, returner, script, nursery)
        nursery.cancel_scope.cancel()


# ---- after a burst --------------------------------------------------------------------------------


async def test_a_model_comes_back_when_the_others_are_not_asked_for_any_more(script, autojump_clock):
    """When the time is over, and neither sooner nor later; who is in its place goes first."""
    async with world(script, configured()) as found:
        await found.use("a")
        await found.use("b")
        over = trio.current_time()
        await trio.sleep(AFTER + 10)

        assert found.script.trace[-3:] == [
            (over + AFTER + 2, "b gone"), (over + AFTER + 2, "a spawned"), (over + AFTER + 7, "a ready"),
        ]  # fmt: skip
        await trio.sleep(DAY)
        assert found.there == "a"


async def test_each_request_of_a_burst_counts(script, autojump_clock):
    """Whichever model it is for, and from its end on; one that fails counts, too."""
    async with world(script, configured()) as found:
        await found.use("a")
        for _ in range(5):
            await found.use("b", seconds=3 * AFTER)
            await trio.sleep(AFTER - 5)
            await found.use("c")
            await trio.sleep(AFTER - 5)
        assert len(found.when("a spawned")) == 1
        script.fails = True
        assert await found.use("b") == "StartFailed"
        over = trio.current_time()
        script.fails = False
        await trio.sleep(AFTER + 10)

        assert found.when("a spawned")[1:] == [over + AFTER]


async def test_what_was_never_loaded_is_loaded(script, autojump_clock):
    """When nobody has asked for others since the start."""
    await trio.sleep(DAY)
    async with world(script, configured()) as found:
        await trio.sleep(AFTER + 10)

        assert found.when("a spawned") == [DAY + AFTER]
        assert found.there == "a"


async def test_who_is_loaded_by_hand_is_asked_for(script, autojump_clock):
    """So it has its time, however long nobody had asked for it before."""
    async with world(script, configured()) as found:
        await found.use("a")
        await trio.sleep(DAY)
        await found.use("b", seconds=0)
        over = trio.current_time()
        await trio.sleep(AFTER + 10)

        assert found.when("a spawned")[1:] == [over + AFTER + 2]


async def test_only_requests_of_its_domain_count(script, autojump_clock):
    """Who cannot be in its way may be as busy as it likes."""
    free = GroupConfig("free", ("x",), exclusive=False, persistent=True)
    async with world(script, configured(GroupConfig("g", ("a", "b")), free)) as found:
        found.nursery.start_soon(found.use, "x", DAY)
        await found.use("b")
        await trio.sleep(AFTER + 10)

        assert found.there == "ax"


async def test_requests_for_models_that_come_back_are_no_burst(script, autojump_clock):
    """Something small that is always in use keeps nobody away."""
    async with world(script, sharing("ae")) as found:
        found.nursery.start_soon(found.use, "e", DAY)
        await found.use("a")
        found.nursery.start_soon(found.use, "b", 50)
        await found.use("c")
        assert found.there == "bce"
        await trio.sleep(50 + AFTER + 10)

        assert "a" in found.there
        assert len(found.there) == 3


@pytest.fixture
def looks(monkeypatch) -> list[float]:
    """When it has looked."""
    at, original = list[float](), Returner._look

    async def look(self):
        at.append(trio.current_time())
        return await original(self)

    monkeypatch.setattr(Returner, "_look", look)
    return at


async def test_a_quiet_daemon_sleeps(script, autojump_clock, looks):
    """Whether everybody is there, or nobody is to come back."""
    async with world(script, configured()) as found:
        await found.use("a")
        await trio.sleep(1)
        before = len(looks)
        await trio.sleep(100 * DAY)
        assert len(looks) <= before + 1
        await found.fleet.unload("a")
        await trio.sleep(100 * DAY)

        assert len(looks) <= before + 4


async def test_while_there_is_work_it_looks_rarely(script, autojump_clock, looks):
    """A thousand requests are no reason for a thousand looks: neither for one who is there nor for others."""
    async with world(script, configured()) as found:
        for _ in range(1000):
            await found.use("a")
        assert len(looks) < 10
        for _ in range(1000):
            await found.use("b")

        assert len(looks) < 1000 / AFTER + 20


async def test_while_there_is_no_room_it_looks_at_a_pace(script, autojump_clock, looks):
    """However often something happens that might change it."""
    async with world(script, sharing("ae", total=10)) as found:
        await trio.sleep(AFTER + 10)
        before = len(looks)
        for _ in range(1000):
            await found.use("e", seconds=0.001)

        assert 2 <= len(looks) - before <= 1 / PACE + 2


async def test_a_turn_is_not_cut_short(script, autojump_clock):
    """Who is likely to be asked for in a moment stays as long as it would for a request."""
    async with world(script, configured(after=1.0)) as found:
        await found.use("b")
        found.fleet.costs["b"].gaps.extend([4.0] * 4)
        over = trio.current_time()
        await trio.sleep(20)

        [gone] = found.when("b gone")
        assert over + 5 < gone < over + 10
        assert found.there == "a"


# ---- a request has precedence -----------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["lease", "fifo"])
@pytest.mark.parametrize("model", ["b", "c"])
async def test_whoever_comes_while_the_others_end_is_served_first(script, autojump_clock, model, policy):
    """Also when it wants the one that is ending, and when the one that comes back is of higher priority."""
    config = configured(policy=policy)
    config = attrs.evolve(config, models={**config.models, "a": spec("a", priority=10)})
    async with world(script, config) as found:
        await found.use("a")
        await found.use("b")
        await trio.sleep(AFTER + 1)
        assert found.there == ""
        assert await found.use(model) == model
        over = trio.current_time()

        assert found.when(f"{model} spawned")[-1] == over - 6, "as soon as b was gone"
        assert len(found.when("a spawned")) == 1
        await trio.sleep(AFTER + 10)
        assert found.when("a spawned")[1:] == [over + AFTER + 2]


@pytest.mark.parametrize("policy", ["lease", "fifo"])
async def test_whoever_comes_while_it_is_loading_puts_it_out_at_once(script, autojump_clock, policy):
    """Nobody waits for the end of a load that nobody waits for."""
    async with world(script, configured(policy=policy)) as found:
        await found.use("a")
        await found.use("b")
        await trio.sleep(AFTER + 4)
        begun = trio.current_time()
        assert begun - 2 == found.when("a spawned")[-1]
        assert await found.use("c") == "c"

        assert found.when("c spawned") == [begun + 2]
        await trio.sleep(AFTER + 10)
        assert found.there == "a"


async def test_also_one_that_is_to_come_back_itself_has_precedence(script, autojump_clock):
    """When it is really asked for."""
    config = sharing("ac", total=30)
    config = attrs.evolve(config, models={**config.models, "a": attrs.evolve(config.models["a"], priority=10)})
    async with world(script, config) as found:
        await found.use("b")
        await trio.sleep(AFTER + 1)
        assert found.there == ""
        assert await found.use("c") == "c"

        assert found.when("c spawned") == found.when("b gone")
        assert found.when("a spawned") == []


async def test_who_waits_for_the_end_of_others_weighs_nothing(script, autojump_clock):
    """And whoever looks is told what it is."""
    async with world(script, configured()) as found:
        await found.use("b")
        await trio.sleep(AFTER + 1)
        [view] = found.fleet.waiting()

        assert (view.label, view.model) == ("return of a", "a")
        assert view.weight < 1e-6


async def test_whoever_fits_beside_it_does_not_wait_for_the_end_of_its_load(script, autojump_clock):
    """Where one model loads at a time, the load that nobody waits for gives its turn away."""
    script.load = 50.0
    async with world(script, sharing("a")) as found:
        await trio.sleep(AFTER + 10)
        begun = trio.current_time()
        assert await found.use("e") == "e"

        assert found.when("e spawned") == [begun]


async def test_a_look_that_breaks_is_looked_after_later(script, autojump_clock, monkeypatch, caplog):
    """It is logged; requests are served, and the next look brings the model back."""
    original, struck = Returner._look, []

    async def look(returner: Returner) -> object:
        if returner.fleet.state("b") is State.READY and len(struck) < 2:
            struck.append(trio.current_time())
            raise ZeroDivisionError("seeded")
        return await original(returner)

    monkeypatch.setattr(Returner, "_look", look)
    async with world(script, configured()) as found:
        await found.use("a")
        assert await found.use("b") == "b"
        await trio.sleep(10 * AFTER)

        assert len(struck) == 2
        assert found.there == "a"
    assert caplog.text.count("nobody is brought back for now") == 2


async def test_whoever_wants_it_while_it_comes_back_gets_it(script, autojump_clock):
    """By the load that is under way."""
    async with world(script, configured()) as found:
        await found.use("a")
        for later in (1, 4):
            await found.use("b")
            before = len(found.when("a spawned"))
            await trio.sleep(AFTER + later)
            assert await found.use("a") == "a"
            assert len(found.when("a spawned")) == before + 1


async def test_a_model_that_serves_does_not_go(script, autojump_clock):
    """Here the memory has no other room for the one that comes back."""
    async with world(script, sharing("ea")) as found:
        await found.use("b")
        await found.use("c")
        found.nursery.start_soon(found.use, "b", 10 * AFTER)
        await trio.sleep(9 * AFTER)
        assert found.there == "bc"
        await trio.sleep(3 * AFTER)

        assert set("ae") < set(found.there)


async def test_a_persistent_model_does_not_go(script, autojump_clock):
    """Nor for a day of quiet; the others of its kind stay away then, and nobody tries all the time."""
    lasting = GroupConfig("lasting", ("b",), persistent=True)
    async with world(script, configured(GroupConfig("g", ("a", "c")), lasting)) as found:
        await found.use("b")
        await found.use("c")
        await trio.sleep(AFTER + 10)

        assert found.there == "ab"


async def test_lent_memory_is_not_taken(script, autojump_clock):
    """Whoever has it keeps it, however quiet it is, and is no burst; afterwards the model comes back."""
    async with world(script, sharing("a")) as found:
        for size, comes in ((45, False), (10, True)):
            await found.use("b")
            await found.use("c")
            scope = trio.CancelScope()
            found.nursery.start_soon(borrow, found.fleet, size, scope)
            await trio.sleep(10 * AFTER)
            assert "borrower" in found.there
            assert ("a" in found.there.replace("borrower", "")) == comes
            scope.cancel()
            await trio.sleep(10)
            assert "a" in found.there


async def borrow(fleet: Fleet, size: int, scope: trio.CancelScope) -> None:
    with scope:
        async with fleet.hold("borrower", Wish(size, device="gpu0")):
            await trio.sleep_forever()


# ---- who stays away ---------------------------------------------------------------------------------


async def test_who_was_unloaded_by_hand_stays_away_until_it_is_asked_for(script, autojump_clock):
    """Whatever the others do; idle or at work."""
    async with world(script, configured(unload_drain_timeout=1000.0)) as found:
        for seconds in (0, 50):
            found.nursery.start_soon(found.use, "a", 5 + seconds)
            await trio.sleep(8 + seconds / 2)
            await found.fleet.unload("a")
            before = len(found.when("a spawned"))
            await trio.sleep(2 * AFTER)
            await found.use("b")
            await trio.sleep(2 * AFTER)
            assert len(found.when("a spawned")) == before
            await found.use("a")
            await found.use("b")
            await trio.sleep(AFTER + 10)
            assert found.there == "a"


async def test_who_frees_the_machine_by_hand_has_it_free(script, autojump_clock):
    """Also of those who were away at that time."""
    async with world(script, configured()) as found:
        await found.use("a")
        await found.use("b")
        await found.fleet.unload("abc")
        await trio.sleep(DAY)
        assert found.there == ""
        await found.use("a")
        await found.use("b")
        await trio.sleep(AFTER + 10)

        assert found.there == "a"


async def test_an_unload_is_remembered_of_those_who_were_away_then(script, autojump_clock):
    """And not of who goes for another one later."""
    async with world(script, sharing("a")) as found:
        await found.use("a")
        await found.use("b")
        await found.fleet.unload("b")
        await found.use("b")
        await found.use("c")
        assert found.there == "bc"
        await trio.sleep(AFTER + 10)

        assert "a" in found.there


async def test_who_goes_by_its_time_to_live_stays_away(script, autojump_clock):
    """Or it would come and go all day; that of another one is no reason."""
    config = configured()
    times = {"a": 30.0, "b": 50.0, "c": None}
    models = {name: attrs.evolve(model, ttl=times[name]) for name, model in config.models.items()}
    async with world(script, attrs.evolve(config, models=models)) as found:
        await found.use("a")
        await trio.sleep(DAY)
        assert (found.there, len(found.when("a spawned"))) == ("", 1)
        await found.use("a")
        await found.use("b")
        await trio.sleep(AFTER + 10)
        assert found.there == "a", "b went by its own time to live"
        await trio.sleep(DAY)

        assert found.there == ""


async def test_who_goes_for_other_programs_stays_away(script, autojump_clock):
    """They may want the memory again at any moment."""
    async with world(script, sharing("a")) as found:
        await found.use("a")
        group = found.fleet.groups[0]
        group.feed(Squeezed({"gpu0": 10}))
        await trio.sleep(10)
        group.feed(Squeezed({"gpu0": 50}))
        await trio.sleep(DAY)
        assert found.there == ""
        await found.use("a")

        assert found.there == "a"


# ---- what goes wrong ----------------------------------------------------------------------------------


async def test_who_has_crashed_comes_back(script, autojump_clock, caplog):
    """After the same time, however often."""
    async with world(script, configured()) as found:
        await found.use("a")
        for _ in range(3):
            await trio.sleep(DAY)
            script.alive["a"].crash()
            crashed = trio.current_time()
            await trio.sleep(AFTER + 10)
            assert found.when("a spawned")[-1] == crashed + AFTER


async def test_a_load_that_fails_is_not_tried_all_the_time(script, autojump_clock, caplog):
    """Not before the same time is over, nor before a request would be tried; each time is told, and why."""
    caplog.set_level("INFO", "trioswap.returning")
    script.fails = True
    async with world(script, configured(backoff=1000.0, backoff_max=2000.0)) as found:
        await trio.sleep(6000)
        assert found.when("a spawned") == [100, 1107, 3114, 5121]
        script.fails = False
        await trio.sleep(2000)

        assert found.there == "a"
    told = [record.getMessage() for record in caplog.records if record.name == "trioswap.returning"]
    assert [line.partition(" model=a")[0] for line in told] == ["loading again", "not loaded again"] * 4 + [
        "loading again", "loaded again",
    ]  # fmt: skip
    assert told[1] == "not loaded again model=a: it was told to fail"


async def test_without_a_back_off_it_is_not_tried_all_the_time_either(script, autojump_clock):
    """The time is counted from the failure."""
    script.fails = True
    async with world(script, configured(backoff=0.0)) as found:
        await trio.sleep(1000)

        assert found.when("a spawned") == [100 + 107 * number for number in range(9)]


async def test_who_is_refused_is_not_tried_all_the_time(script, autojump_clock, caplog):
    """For whatever reason that is."""
    async with world(script, configured()) as found:
        await found.use("b")
        await trio.sleep(AFTER + 1)
        [group] = found.fleet.groups
        [ticket] = group.unanswered()
        group.give_up(ticket, WaitTooLong(1.0))
        refused = trio.current_time()
        await trio.sleep(AFTER + 10)

        assert found.when("a spawned") == [refused + AFTER]
    [told] = [record.getMessage() for record in caplog.records if record.name == "trioswap.returning"]
    assert told.startswith("not loaded again model=a: ")


async def test_who_has_no_room_is_not_tried(script, autojump_clock, caplog):
    """And is no reason for an error; when there is room it comes."""
    async with world(script, sharing("a", total=10)) as found:
        await trio.sleep(DAY)
        assert script.trace == []
        found.fleet.groups[0].feed(Squeezed({"gpu0": 50}))
        await trio.sleep(10)

        assert found.there == "a"


# ---- several ------------------------------------------------------------------------------------------


async def test_each_comes_back_that_was_put_out(script, autojump_clock):
    """Without a second time of quiet between them, at the same time where that is allowed."""
    pairs = (GroupConfig("both", ("a", "d"), swap=False), GroupConfig("b", ("b",)))
    for parallel, apart in ((1, 5), (2, 0)):
        script.trace.clear()
        async with world(script, configured(*pairs, idle="da", parallel_loads=parallel)) as found:
            await found.use("a")
            await found.use("d")
            await found.use("b")
            await trio.sleep(AFTER + 20)

            assert found.there == "ad"
            assert found.when("a spawned")[-1] - found.when("d spawned")[-1] == apart
        script.trace.clear()


@pytest.mark.parametrize("idle", ["ac", "ca"])
async def test_those_that_come_back_do_not_put_out_each_other(script, autojump_clock, idle):
    """Although the one that is there was asked for longest ago, so a request for the other would put it out."""
    async with world(script, sharing(idle)) as found:
        await found.use("a")
        await found.use("b")
        found.fleet.costs["b"].load.value = 1000.0  # so it is dear, and a is cheap
        await found.use("b")
        assert [victim.model for victim in found.fleet.forecast("c").evicts] == ["a"]
        await trio.sleep(AFTER + 20)
        assert found.there == "ac"
        await trio.sleep(10 * AFTER)

        assert [text for _, text in script.trace if "ready" not in text] == [
            "a spawned", "b spawned", "b gone", "c spawned",
        ]  # fmt: skip


async def test_those_that_cannot_be_there_together_do_not_take_turns(script, autojump_clock):
    """What memory allows is not known beforehand; the first ones have precedence."""
    async with world(script, sharing("abc")) as found:
        await trio.sleep(AFTER + 20)
        assert found.there == "ab"
        await found.use("c")
        await trio.sleep(AFTER + 20)
        assert found.there == "ab"
        await trio.sleep(10 * AFTER)

        spawned = Counter(text for _, text in script.trace if "spawned" in text)
        assert spawned == {"a spawned": 2, "b spawned": 1, "c spawned": 1}


@pytest.mark.parametrize("idle", ["ad", "da"])
async def test_the_order_is_one_in_which_all_can_come(script, autojump_clock, idle):
    """A newcomer of an exclusive group would put out the others, so it is first, wherever it stands."""
    groups = (GroupConfig("g", ("d", "b")), GroupConfig("h", ("a",), exclusive=False))
    async with world(script, configured(*groups, idle=idle)) as found:
        await found.use("b")
        await found.use("a")
        assert found.there == "ab"
        await trio.sleep(AFTER + 10)
        assert found.there == "d"
        await trio.sleep(AFTER + 10)

        assert found.there == "ad"
        await trio.sleep(DAY)
        assert len(found.when("a spawned")) == 2


async def test_domains_do_not_wait_for_each_other(script, autojump_clock):
    """A burst in one of them keeps nobody in another one away."""
    groups = (GroupConfig("g", ("a", "b"), exclusive=False), GroupConfig("h", ("c", "d"), exclusive=False))
    async with world(script, configured(*groups, idle="ac")) as found:
        found.nursery.start_soon(found.use, "b", DAY)
        await found.use("d")
        await trio.sleep(AFTER + 10)

        assert found.there == "bc"


# ---- another configuration, and the end -----------------------------------------------------------------


async def test_another_configuration_counts_at_once(script, autojump_clock):
    """A shorter time, too, while the longer one runs; and who was unloaded by hand still stays away."""
    config = configured(after=DAY)
    async with world(script, config) as found:
        await found.use("c")
        await found.fleet.unload("c")
        await found.use("a")
        await found.use("b")
        await trio.sleep(AFTER)
        found.returner.renew(configured(idle="ca"))
        await trio.sleep(10)
        assert found.there == "a"
        found.returner.renew(configured(idle=""))
        await found.use("b")
        await trio.sleep(DAY)

        assert found.there == "b"


async def test_nobody_comes_back_once_the_end_has_begun(script, autojump_clock, caplog):
    """However long that takes, and although there is room; nor is it tried."""
    script.stop = 10 * AFTER
    async with world(script, sharing("a")) as found:
        await found.use("b")
        found.fleet.shutdown()
        await found.fleet.wait_ended()
        await trio.sleep(DAY)

        assert found.when("a spawned") == []
    assert [record for record in caplog.records if record.name == "trioswap.returning"] == []


# ---- real servers ---------------------------------------------------------------------------------------

CHAT = "/v1/chat/completions"


async def test_a_real_model_comes_back():
    """It is there again soon after others were asked for; who was unloaded by hand is not."""
    models = {name: scripted(turn_lease=0, linger=0) for name in "ab"}
    hooks = {"on_startup": {"preload": ["a"]}, "on_idle": {"preload": ["a"], "after": 0.05}}
    async with daemon(models, hooks=hooks) as served:
        for _ in range(3):
            await eventually(partial(is_running, served.port, "a", state="ready"))
            assert (await fetch(served.port, "POST", CHAT, chat("b"))).json()["model"] == "b"
        await eventually(partial(is_running, served.port, "a", state="ready"))
        assert (await running(served.port)).keys() == {"a"}
        await fetch(served.port, "POST", "/api/models/unload/a")
        assert (await fetch(served.port, "POST", CHAT, chat("b"))).json()["model"] == "b"

        assert (await running(served.port)).keys() == {"b"}


async def test_a_reload_can_name_models_that_are_loaded(tmp_path):
    """At once those of the start that are new, those that come back when it is quiet."""
    models = {name: scripted() for name in "abc"}
    groups = {name: {"members": [name], "exclusive": False} for name in "abc"}
    async with reloading(tmp_path, models, groups=groups) as served:
        assert (await running(served.port)) == {}
        hooks = {"on_startup": {"preload": ["b"]}, "on_idle": {"preload": ["c"], "after": 0.05}}
        assert (await served.reload(models, groups=groups, hooks=hooks))["settings"] == ["hooks"]

        await eventually(partial(is_running, served.port, "b", state="ready"))
        await eventually(partial(is_running, served.port, "c", state="ready"))
        assert (await running(served.port)).keys() == {"b", "c"}
