"""What is under way when its limit is changed: by itself, and by a reload of a daemon with real servers."""

from __future__ import annotations

import os
import signal
from functools import partial

import pytest
import trio
from children import PATIENCE, alive
from daemons import ending, eventually, fetch, is_running, running, scripted
from fakes import spec
from test_reload import changed, reloading, renamed, some, streaming

from trioswap.limits import Limits

# Seconds for which nobody here would wait, and such that are over as soon as they count.
ENDLESS, OVER = 2 * PATIENCE, 0.05


# ---- by themselves -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("after", "moved_to", "ends"),
    [(5.0, 20.0, 20.0), (5.0, 7.0, 7.0), (5.0, 3.0, 5.0), (5.0, None, None), (12.0, 20.0, 10.0)],
)
async def test_a_deadline_moves(nursery, autojump_clock, after, moved_to, ends):
    """It counts from the beginning: what is over by then is over at once, and what was over before stays over."""
    limits, ended = Limits(spec("m", drain_timeout=10.0)), []

    async def wait() -> None:
        limit = limits.begin("drain_timeout")
        with limits.keep(limit) as late:
            await trio.sleep_forever()
        assert late.cancelled_caught
        ended.append((trio.current_time(), str(limit)))

    nursery.start_soon(wait)
    await trio.sleep(after)
    limits.follow(spec("m", drain_timeout=moved_to))
    await trio.sleep(1000)
    told = 10 if ends == 10 else moved_to
    assert ended == ([] if ends is None else [(ends, f"{told:g} s (drain_timeout)")])


async def test_a_limit_comes_and_goes(nursery, autojump_clock):
    """None is no limit."""
    limits, ended = Limits(spec("m", liveness=None)), []

    async def sleep() -> None:
        await limits.sleep("liveness")
        ended.append(trio.current_time())

    nursery.start_soon(sleep)
    await trio.sleep(50)
    for seconds in (60.0, None):
        limits.follow(spec("m", liveness=seconds))
        await trio.sleep(5)
    await trio.sleep(45)
    assert ended == []
    limits.follow(spec("m", liveness=200.0))
    await trio.sleep(1000)
    assert ended == [200.0]


async def test_what_was_applied_is_told(autojump_clock):
    """Also where another limit comes between the end of the old one and the first word about it."""
    limits = Limits(spec("m", drain_timeout=10.0))
    limit = limits.begin("drain_timeout")
    with limits.keep(limit) as late:
        try:
            await trio.sleep_forever()
        finally:
            limits.follow(spec("m", drain_timeout=20.0))
    assert late.cancelled_caught
    assert str(limit) == "10 s (drain_timeout)"


async def test_a_limit_that_was_kept_is_kept_again(autojump_clock):
    """Two steps that share one; what is set between them counts for the second."""
    limits = Limits(spec("m", drain_timeout=10.0))
    limit = limits.begin("drain_timeout")
    with limits.keep(limit):
        await trio.sleep(4)
    limits.follow(spec("m", drain_timeout=6.0))
    with limits.keep(limit) as late:
        await trio.sleep_forever()
    assert late.cancelled_caught
    assert trio.current_time() == 6


# ---- by a reload -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "key", "why"),
    [
        (scripted("--never-ready", health_check_timeout=ENDLESS), "health_check_timeout", "not ready within"),
        (
            scripted(hooks={"before_start": ["sleep", "1000"]}, hook_timeout=ENDLESS),
            "hook_timeout",
            "hook before_start did not end within",
        ),
    ],
)
async def test_a_start_that_takes_too_long_by_now(tmp_path, model, key, why):
    """It has failed, and who waits is told the limit that counted in the end."""
    async with reloading(tmp_path, {"a": model}) as daemon, trio.open_nursery() as nursery:
        answers: list[object] = []

        async def ask() -> None:
            answers.append(await daemon.ask("a"))

        nursery.start_soon(ask)
        await eventually(partial(is_running, daemon.port, "a", state="starting"))
        assert (await daemon.reload({"a": changed(model, **{key: OVER})}))["updated"] == {"a": [key]}
        await eventually(partial(some, answers))
        assert answers[0].status == 503
        assert f"{why} {OVER} s ({key})" in answers[0].text


async def test_a_drain_that_takes_too_long_by_now(tmp_path):
    """The stream that it waits for is cut, and told why; who waits for the place gets it."""
    models = {name: scripted(max_wait=0, turn_lease=0) for name in "ab"}
    together = {"groups": {"g": {"members": ["a", "b"]}}}
    async with reloading(tmp_path, models, **together) as daemon, streaming(daemon.port, "a", 10**6) as client:
        answers: list[object] = []

        async def ask() -> None:
            answers.append(await daemon.ask("b"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await eventually(partial(is_running, daemon.port, "a", state="draining"))
            models["a"] = changed(models["a"], drain_timeout=OVER)
            assert (await daemon.reload(models, **together))["updated"] == {"a": ["drain_timeout"]}
            assert f"{OVER} s after its model was to stop" in await ending(client)
        assert [answer.status for answer in answers] == [200]


async def test_an_old_server_that_serves_too_long_by_now(tmp_path):
    """A reload has it end, and the next one sees that it goes."""
    model = scripted(unload_drain_timeout=ENDLESS)
    async with reloading(tmp_path, {"a": model}) as daemon, streaming(daemon.port, "a", 10**6) as client:
        model = renamed(model)
        assert (await daemon.reload({"a": model}))["restarted"] == {"a": ["cmd"]}
        await eventually(partial(is_running, daemon.port, "a", state="draining"))
        said = await daemon.reload({"a": changed(model, unload_drain_timeout=OVER)})
        assert said["updated"] == {"a": ["unload_drain_timeout"]}
        assert f"{OVER} s after its model was to stop" in await ending(client)
        assert (await daemon.ask("a")).status == 200


async def test_an_unload_that_takes_too_long_by_now(tmp_path):
    """What it waits for is cut, and then who does not heed its signal is killed."""
    model = scripted("--ignore-sigterm", unload_drain_timeout=ENDLESS, unload_timeout=ENDLESS)
    async with reloading(tmp_path, {"a": model}) as daemon, streaming(daemon.port, "a", 10**6) as client:
        pid = await daemon.pid("a")
        answers: list[object] = []

        async def unload() -> None:
            answers.append(await fetch(daemon.port, "POST", "/api/models/unload/a"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(unload)
            await eventually(partial(is_running, daemon.port, "a", state="draining"))
            model = changed(model, unload_drain_timeout=OVER)
            await daemon.reload({"a": model})
            assert f"{OVER} s after its model was to stop" in await ending(client)
            await eventually(partial(is_running, daemon.port, "a", state="stopping"))
            assert alive(pid)
            await daemon.reload({"a": changed(model, unload_timeout=OVER)})
        assert [answer.status for answer in answers] == [200]
        assert not alive(pid)


async def test_a_server_that_nobody_watched_is_watched_by_now(tmp_path):
    """So that one that hangs is as good as dead."""
    model = scripted(unload_timeout=0)
    async with reloading(tmp_path, {"a": model}) as daemon:
        pid = await daemon.pid("a")
        os.kill(pid, signal.SIGSTOP)
        said = await daemon.reload({"a": changed(model, liveness=OVER, liveness_misses=2)})
        assert said["updated"] == {"a": ["liveness", "liveness_misses"]}

        async def gone() -> bool:
            return not await running(daemon.port)

        await eventually(gone)
        assert not alive(pid)
        assert await daemon.pid("a") != pid
