"""Quotas: who is let in, and that everything is given back, however a request ends."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack

import pytest
import trio
from children import PATIENCE
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from trioswap.access import ANYBODY, Key
from trioswap.config import Config, ModelConfig
from trioswap.errors import QueueFull, TooManyRequests
from trioswap.quotas import Quotas

SOON = 7


def config(max_queue: int = 1000, **limits: int | None) -> Config:
    """Models with these limits."""
    models = {
        name: ModelConfig(name, ("server",), "http://127.0.0.1:1", concurrency_limit=limit)
        for name, limit in limits.items()
    }
    return Config(models=models, max_queue=max_queue)


def key(name: str = "laptop", concurrency: int | None = None) -> Key:
    return Key(name, b"", concurrency=concurrency)


def nobody_asks() -> int:
    raise AssertionError("asked for an estimate that nobody is told")


# ---- one request after the other ------------------------------------------------------------


def test_a_model_has_a_limit():
    """The request after the last that may be is told whose limit, which, and when to come back; then the next may."""
    quotas = Quotas(config(a=2, b=None))
    with quotas.admit("a", ANYBODY, nobody_asks), quotas.admit("a", key(), nobody_asks):
        with pytest.raises(TooManyRequests) as caught, quotas.admit("a", ANYBODY, SOON):
            pytest.fail("let in")
        with quotas.admit("b", ANYBODY, nobody_asks):
            assert (quotas.of_model("a"), quotas.of_model("b")) == (2, 1)

    assert (caught.value.status, caught.value.retry_after) == (429, SOON)
    assert caught.value.message.startswith('model "a" has 2 requests already')
    with quotas.admit("a", ANYBODY, nobody_asks):
        assert quotas.of_model("a") == 1


def test_a_key_has_a_limit():
    """For all its models together, and other keys are not concerned."""
    quotas = Quotas(config(a=None, b=None))
    few = key(concurrency=1)
    with quotas.admit("a", few, nobody_asks):
        with pytest.raises(TooManyRequests) as caught, quotas.admit("b", few, lambda: SOON):
            pytest.fail("let in")
        with quotas.admit("a", key("phone", 1), nobody_asks), quotas.admit("a", ANYBODY, nobody_asks):
            assert (quotas.of_key("laptop"), quotas.of_key("phone")) == (1, 1)

    assert caught.value.retry_after == SOON
    assert caught.value.message.startswith('the key "laptop" has 1 requests already')
    assert quotas.of_key("laptop") == 0


def test_who_is_refused_for_one_is_not_counted_for_the_other():
    """Neither by the model when the key is full nor the other way round; where both are full the key is named."""
    quotas = Quotas(config(a=1, b=None))
    with quotas.admit("b", key(concurrency=1), SOON):
        with pytest.raises(TooManyRequests, match="the key"), quotas.admit("a", key(concurrency=1), SOON):
            pytest.fail("let in")
        assert quotas.of_model("a") == 0
        with quotas.admit("a", ANYBODY, SOON):
            with pytest.raises(TooManyRequests, match="model"), quotas.admit("a", key("phone"), SOON):
                pytest.fail("let in")
            assert quotas.of_key("phone") == 0
            with pytest.raises(TooManyRequests, match="the key"), quotas.admit("a", key(concurrency=1), SOON):
                pytest.fail("let in")


def test_what_is_not_limited():
    """Models at peers, which are no models of ours, and whatever has no limit."""
    quotas = Quotas(config(a=None))
    with ExitStack() as all_in:
        for _ in range(1000):
            all_in.enter_context(quotas.admit("there/gpt", key(), nobody_asks))
            all_in.enter_context(quotas.admit("a", ANYBODY, nobody_asks))
        assert (quotas.of_model("there/gpt"), quotas.of_model("a")) == (1000, 1000)
    assert (quotas.of_model("there/gpt"), quotas.of_model("a")) == (0, 0)


def test_the_queue_has_a_limit():
    """For all models together; who is let in and does not wait is not in it."""
    quotas = Quotas(config(max_queue=2))
    with quotas.admit("a", ANYBODY, nobody_asks), quotas.queue(nobody_asks), quotas.queue(nobody_asks):
        with pytest.raises(QueueFull) as caught, quotas.queue(lambda: SOON):
            pytest.fail("let in")
        assert quotas.waiting == 2

    assert (caught.value.status, caught.value.retry_after) == (503, SOON)
    assert caught.value.message.startswith("2 requests wait already")
    assert quotas.waiting == 0


def test_nothing_is_taken_before_the_block():
    """To make a block and not to enter it takes no place."""
    quotas = Quotas(config(max_queue=1, a=1))
    never = [quotas.admit("a", ANYBODY, SOON), quotas.queue(SOON)]

    with quotas.admit("a", ANYBODY, SOON), quotas.queue(SOON):
        assert (quotas.of_model("a"), quotas.waiting) == (1, 1)
    assert never


def test_a_failing_estimate_takes_nothing():
    """Nor does it hide."""
    quotas = Quotas(config(max_queue=0, a=0))
    with pytest.raises(ZeroDivisionError), quotas.admit("a", ANYBODY, lambda: 1 // 0):
        pytest.fail("let in")
    with pytest.raises(ZeroDivisionError), quotas.queue(lambda: 1 // 0):
        pytest.fail("let in")

    assert (quotas.of_model("a"), quotas.of_key("anybody"), quotas.waiting) == (0, 0, 0)


def test_another_configuration_takes_its_place():
    """Who is in stays counted, although the limit is lower now; and one that is lifted is lifted at once."""
    quotas = Quotas(config(max_queue=5, a=None))
    with quotas.admit("a", ANYBODY, SOON), quotas.admit("a", ANYBODY, SOON), quotas.queue(SOON):
        quotas.config = config(max_queue=1, a=1)
        with pytest.raises(TooManyRequests), quotas.admit("a", ANYBODY, SOON):
            pytest.fail("let in")
        with pytest.raises(QueueFull), quotas.queue(SOON):
            pytest.fail("let in")
        quotas.config = config(max_queue=2)
        with quotas.admit("a", ANYBODY, SOON), quotas.queue(SOON):
            assert (quotas.of_model("a"), quotas.waiting) == (3, 2)

    assert (quotas.of_model("a"), quotas.waiting) == (0, 0)


def test_who_was_in_stays_in():
    """For another model than before, beyond every limit; and is counted like all others."""
    quotas = Quotas(config(max_queue=1, a=1))
    few = key(concurrency=1)
    with quotas.admit("a", few, SOON), quotas.queue(SOON):
        with quotas.admit("a", few, nobody_asks, was_in=True), quotas.queue(nobody_asks, was_in=True):
            assert (quotas.of_model("a"), quotas.of_key(few.name), quotas.waiting) == (2, 2, 2)
        with pytest.raises(TooManyRequests), quotas.admit("a", few, SOON):
            pytest.fail("let in")
        with pytest.raises(QueueFull), quotas.queue(SOON):
            pytest.fail("let in")


def test_names_are_forgotten():
    """Those of peers' models are many, and counts of nothing are not kept."""
    quotas = Quotas(config())
    for number in range(100):
        with quotas.admit(f"there/{number}", key(f"{number}"), SOON):
            assert repr(number) in repr(quotas)

    assert "99" not in repr(quotas)


# ---- however it ends ------------------------------------------------------------------------


async def test_requests_that_are_cancelled_give_back_everything():
    """While they wait and while they are served."""
    quotas = Quotas(config(max_queue=3, a=6))
    few = key(concurrency=6)

    async def ask(*, waits: bool, task_status: trio.TaskStatus[None]) -> None:
        with quotas.admit("a", few, SOON), ExitStack() as queue:
            if waits:
                queue.enter_context(quotas.queue(SOON))
            task_status.started()
            await trio.sleep_forever()

    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            for waits in (True, False) * 3:
                await nursery.start(lambda *, task_status, waits=waits: ask(waits=waits, task_status=task_status))
            assert (quotas.of_model("a"), quotas.of_key("laptop"), quotas.waiting) == (6, 6, 3)
            nursery.cancel_scope.cancel()

    assert (quotas.of_model("a"), quotas.of_key("laptop"), quotas.waiting) == (0, 0, 0)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit, StopIteration])
def test_requests_that_fail_give_back_everything(error):
    """And fail as they did."""
    quotas = Quotas(config(a=1))
    with pytest.raises(error), quotas.admit("a", ANYBODY, SOON), quotas.queue(SOON):
        raise error

    assert (quotas.of_model("a"), quotas.of_key("anybody"), quotas.waiting) == (0, 0, 0)


MODELS = st.sampled_from(["a", "b", "there/gpt"])
LIMITS = st.none() | st.integers(0, 3)
KEYS = st.builds(key, st.sampled_from(["laptop", "phone"]), LIMITS)


class Requests(RuleBasedStateMachine):
    """Requests that come, wait, and end in any order, while the configuration changes."""

    def __init__(self) -> None:
        super().__init__()
        self.quotas = Quotas(config(max_queue=2, a=1))
        self.inside: list[tuple[ExitStack, str, str]] = []
        self.queue: list[ExitStack] = []

    @rule(model=MODELS, of=KEYS)
    def arrives(self, model: str, of: Key) -> None:
        models, keys = self.counts()
        known = self.quotas.config.models.get(model)
        limits = [(keys[of.name], of.concurrency), (models[model], known and known.concurrency_limit)]
        full = [limit for count, limit in limits if limit is not None and count >= limit]
        block = ExitStack()
        if full:
            with pytest.raises(TooManyRequests, match=f" {full[0]} requests"):
                block.enter_context(self.quotas.admit(model, of, SOON))
        else:
            block.enter_context(self.quotas.admit(model, of, SOON))
            self.inside.append((block, model, of.name))

    @rule()
    def waits(self) -> None:
        block = ExitStack()
        if len(self.queue) >= self.quotas.config.max_queue:
            with pytest.raises(QueueFull):
                block.enter_context(self.quotas.queue(SOON))
        else:
            block.enter_context(self.quotas.queue(SOON))
            self.queue.append(block)

    @rule(data=st.data(), fails=st.booleans())
    def ends(self, data: st.DataObject, fails: bool) -> None:
        blocks = [*self.queue, *(block for block, _, _ in self.inside)]
        if not blocks:
            return
        block = data.draw(st.sampled_from(blocks))
        self.queue = [other for other in self.queue if other is not block]
        self.inside = [entry for entry in self.inside if entry[0] is not block]
        if fails:
            with pytest.raises(LookupError), block:
                raise LookupError
        else:
            block.close()

    @rule(max_queue=st.integers(0, 3), a=LIMITS, b=LIMITS)
    def is_reloaded(self, max_queue: int, a: int | None, b: int | None) -> None:
        self.quotas.config = config(max_queue, a=a, b=b)

    def counts(self) -> tuple[Counter[str], Counter[str]]:
        return Counter(model for _, model, _ in self.inside), Counter(name for _, _, name in self.inside)

    @invariant()
    def everybody_is_counted_once(self) -> None:
        models, keys = self.counts()
        assert self.quotas.waiting == len(self.queue)
        assert {name: self.quotas.of_model(name) for name in models} == models
        assert {name: self.quotas.of_key(name) for name in keys} == keys

    def teardown(self) -> None:
        for block in [*self.queue, *(block for block, _, _ in self.inside)]:
            block.close()
        gone = Quotas(self.quotas.config)
        assert repr(self.quotas) == repr(gone)


TestRequests = Requests.TestCase
