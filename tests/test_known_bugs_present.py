"""Bugs that llama-swap still has (reference, known bugs, section 3.2): none of them is here.

Each test has the id of its row in its name; see `test_known_bugs.py`, where L5 is, too.
"""

from __future__ import annotations

import signal
from functools import partial

import trio
from children import PATIENCE, alive
from commands import daemon as command
from daemons import (
    at_once,
    chat,
    connect,
    daemon,
    ending,
    eventually,
    fetch,
    is_running,
    pid_of,
    scripted,
    write_config,
)
from fakes import Script, make_group
from test_known_bugs import CHAT, ENDLESS, HOUR, UNLOAD, noting_its_end, on_gpu, say

from trioswap.config import loads
from trioswap.messages import BecameReady, Died, Drained, Ended, GotStuck, Left


async def test_l1_the_end_of_an_old_load_does_not_touch_the_new_one(tmp_path):
    """A load that was called off failed who waited for the next one; here each load answers for itself."""
    once = tmp_path / "ready"
    model = scripted("--ready-once", once, "--stop-delay", 0.3)
    async with daemon({"a": model}) as served, await connect(served.port) as old, await connect(served.port) as new:
        await old.ask("POST", CHAT, chat("a"))
        await eventually(partial(is_running, served.port, "a", state="starting"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetch, served.port, "POST", f"{UNLOAD}/a")
            assert (await old.answer()).status == 503
            await new.ask("POST", CHAT, chat("a"))  # the old process is still being stopped
            await eventually(partial(is_running, served.port, "a", waiting=1))
        once.touch()
        assert (await new.answer()).status == 200


async def test_l2_a_busy_model_starves_nobody():
    """Requests for the loaded model overtook all others for ever; here another model has its turn after `max_wait`."""
    models = {"a": scripted(), "b": scripted(max_wait=0.1)}
    async with daemon(models, turn_lease=0) as served:
        done = trio.Event()

        async def endless(number: int) -> None:  # at each moment some are being served
            await trio.sleep(number / 20)
            while not done.is_set():
                assert await say(served.port, "a", answer_delay=0.2) == "a"

        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(endless, number)
            await eventually(partial(is_running, served.port, "a", state="ready"))
            assert await say(served.port, "b") == "b"
            done.set()


async def test_l3_a_load_that_nobody_waits_for_gives_way(tmp_path):
    """The next model waited for the end of a load whose client had gone; here that load is called off."""
    gpu = tmp_path / "gpu"
    models = {"a": on_gpu(gpu, "--never-ready", health_check_timeout=HOUR), "b": on_gpu(gpu)}
    async with daemon(models) as served:
        async with await connect(served.port) as leaving:
            await leaving.ask("POST", CHAT, chat("a"))
            await eventually(partial(is_running, served.port, "a", state="starting"))
        assert await say(served.port, "b") == "b"


async def test_l4_an_unload_holds_up_nobody_else():
    """An unload stopped all routing until it was done; here another model answers while a stubborn one is stopped."""
    stubborn = scripted("--ignore-sigterm", unload_timeout=1.0)
    both = {"both": {"swap": False, "members": ["a", "c"]}}
    async with daemon({"a": stubborn, "c": scripted()}, groups=both) as served:
        assert await at_once(partial(say, served.port, name) for name in "ac") == ["a", "c"]
        pid = await pid_of(stubborn.port)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetch, served.port, "POST", f"{UNLOAD}/a")
            await eventually(partial(is_running, served.port, "a", state="stopping"))
            for _ in range(10):
                assert await say(served.port, "c") == "c"
            assert alive(pid), "the answers came before the unload was over"


async def test_l6_the_idle_time_begins_when_a_model_is_ready(nursery, autojump_clock):
    """A model loaded for nobody counted as idle for ever and was unloaded; here it has its whole time to live."""
    script = Script(load=100.0, stop=2.0)
    group = make_group(script, ttl=10.0)
    await nursery.start(group.run)
    with trio.move_on_after(1):
        async with group.lease("a"):
            raise AssertionError("it loads for 100 s")
    await trio.sleep(1000)

    assert script.trace == [(0, "a spawned"), (100, "a ready"), (112, "a gone")]
    nursery.cancel_scope.cancel()


async def test_l7_a_hung_model_goes_after_its_own_grace():
    """A swap gave a hung model as long as a start may take; here it has its own grace, and the next model loads."""
    hung = scripted("--ignore-sigterm", drain_timeout=0.1, unload_timeout=0.2, health_check_timeout=HOUR)
    models = {"a": hung, "b": scripted(max_wait=0.05)}
    async with daemon(models, turn_lease=0) as served, await connect(served.port) as client:
        await client.ask("POST", CHAT, chat("a", hold=True))
        await eventually(partial(is_running, served.port, "a", serving=1))
        assert await say(served.port, "b") == "b"  # long before the hour is over
        assert (await client.answer()).status == 503


async def test_o6_l8_streams_take_no_grace_from_the_models(tmp_path):
    """Streams used up the time of the shutdown, and models were killed after 1 ms; here each has its whole grace."""
    ends = [tmp_path / "a", tmp_path / "b"]
    models = [noting_its_end(file, "--stop-delay", 0.5, unload_timeout=PATIENCE) for file in ends]
    both = {"both": {"swap": False, "members": ["a", "b"]}}
    tables = dict(zip("ab", models, strict=True))
    path = write_config(tmp_path, tables, unload_drain_timeout=0.2, groups=both)
    async with command("serve", "-c", path) as served:
        async with await connect(served.port) as streaming:
            assert await say(served.port, "b") == "b"
            await streaming.ask("POST", CHAT, chat("a", **ENDLESS))
            await streaming.head()
            served.process.send_signal(signal.SIGTERM)
            assert await ending(streaming)
        with trio.fail_after(PATIENCE):
            assert await served.process.wait() == 0
        assert [file.read_text() for file in ends] == ["0\n", "0\n"]


async def test_l13_a_model_that_cannot_start_puts_out_nobody_twice(tmp_path):
    """Each try of a model that cannot start put out a healthy one; here only the first in a back-off period does."""
    gpu = tmp_path / "gpu"
    models = {"a": scripted("--exit-at-start", 1, backoff=HOUR, backoff_max=HOUR, max_wait=0.0), "b": on_gpu(gpu)}
    async with daemon(models, turn_lease=0, linger=0) as served:
        for _ in range(5):
            assert await say(served.port, "b") == "b"
            answer = await fetch(served.port, "POST", CHAT, chat("a"))
            assert answer.status == 503
            assert int(answer["retry-after"]) >= 1
        assert await say(served.port, "b") == "b"
    assert gpu.read_text() == "started\n" * 2


async def test_l16_news_that_come_late_or_twice_are_harmless(nursery, autojump_clock):
    """A lease given back twice would have ended the process; here what comes late or twice is no news."""
    script = Script()
    group = make_group(script)
    await nursery.start(group.run)
    async with group.lease("a") as lease:
        pass
    served = group.views()
    for ticket in (1, 1, 99):
        group.inflight.leave(lease.attempt, ticket)
        group.feed(Left(ticket))
    for attempt in (lease.attempt - 1, lease.attempt + 1):
        for news in (BecameReady, Drained, Died, GotStuck, partial(Ended, failure=None)):
            group.feed(news("a", attempt))
    group.feed(Drained("a", lease.attempt))  # nobody asked it to run dry
    group.feed(BecameReady("a", lease.attempt))

    assert group.views() == served
    async with group.lease("a") as again:
        assert again.attempt == lease.attempt
    nursery.cancel_scope.cancel()


def test_l17_addresses_are_numbers():
    """Servers were looked for at "localhost", which may mean ::1, where they do not listen; here at a number."""
    config = loads('models.a.cmd = "serve --port ${PORT}"')
    assert config.models["a"].proxy.startswith("http://127.0.0.1:")
