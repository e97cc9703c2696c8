"""The judge of `chaos.py` cannot call everything fine, its order is the seed's, and its eyes are open."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tomllib

import pytest
import trio
from chaos_faults import ALONE, KINDS, deck
from chaos_judge import BAD, Asked, End, Excuses, Got, Kind, Tally, Verdict, judge
from chaos_world import BUDGET, MARKER, MODELS, NEED, RUN, World
from children import PATIENCE, running

NOTHING, DAEMON, SERVER, OPERATOR = Excuses(), Excuses(daemon=True), Excuses(server=True), Excuses(operator=True)
WHOLE = Asked("t1", "ant", Kind.JSON)
STREAM = Asked("t1", "ant", Kind.STREAM, chunks=2)
UPLOAD = Asked("t1", "ant", Kind.UPLOAD, sum=7)


def answer(model="ant", token="t1", **more):
    return json.dumps({"model": model, "token": token, **more}).encode()


def events(*chunks: bytes, done: bool = True) -> bytes:
    return b"".join(b"data: %s\n\n" % chunk for chunk in [*chunks, *([b"[DONE]"] if done else [])])


FIRST, SECOND = answer(number=0), answer(number=1)
FAILED = b'{"src": "trioswap", "error": {"message": "it crashed", "type": "server_error"}}'


def got(body: bytes = b"", end: End = End.CLEAN, status: int | None = 200, **headers: str) -> Got:
    return Got(end, status, headers, body)


@pytest.mark.parametrize(
    ("asked", "came"),
    [
        (WHOLE, got(answer())),
        (STREAM, got(events(FIRST, SECOND))),
        (STREAM, got(b": trioswap queued model=ant\n\n" + events(FIRST, SECOND))),
        (UPLOAD, got(answer(sum=7))),
    ],
)
def test_the_right_answer_is_one(asked, came):
    assert judge(asked, came, NOTHING)[0] is Verdict.ANSWERED


@pytest.mark.parametrize(
    ("asked", "came"),
    [
        (WHOLE, got(FAILED, status=502)),
        (WHOLE, got(FAILED, status=503, **{"retry-after": "1"})),
        (STREAM, got(FAILED, status=504)),
        (STREAM, got(events(FIRST, FAILED, done=False))),
        (STREAM, got(events(FAILED, done=False))),
    ],
)
def test_an_error_that_can_be_read_is_one(asked, came):
    assert judge(asked, came, NOTHING)[0] is Verdict.ERROR


@pytest.mark.parametrize(
    ("asked", "came"),
    [
        (WHOLE, got(answer(model="bee"))),
        (WHOLE, got(answer(token="t2"))),
        (WHOLE, got(answer()[:-1] + b', "echo": {"token": "t2"}}')),
        (WHOLE, got(answer(token="t2")[:-1], End.BROKEN)),  # nobody may see even a part of it
        (STREAM, got(events(FIRST, answer(token="t2", number=1)))),
        (STREAM, got(events(FIRST, answer(model="bee", number=1)))),
        (STREAM, got(events(answer(token="t2", number=0), done=False), End.BROKEN)),
        (UPLOAD, got(answer(sum=8))),
    ],
)
def test_the_answer_of_another_is_foreign_whatever_the_excuse(asked, came):
    for excuses in (NOTHING, DAEMON, SERVER, OPERATOR):
        assert judge(asked, came, excuses)[0] is Verdict.FOREIGN


@pytest.mark.parametrize(
    ("asked", "came"),
    [
        (WHOLE, got(end=End.SILENT, status=None)),
        (STREAM, got(events(FIRST, done=False), End.SILENT)),
        (WHOLE, got(answer()[:-5])),  # cut short, and ended as if it were whole
        (WHOLE, got(b"")),
        (STREAM, got(b"")),
        (STREAM, got(events(FIRST, done=False))),
        (STREAM, got(events(FIRST, SECOND, done=False))),
        (STREAM, got(events(FIRST))),
        (STREAM, got(events(FIRST, FIRST))),
        (STREAM, got(events(SECOND, FIRST))),
        (STREAM, got(events(SECOND, FAILED, done=False))),
        (WHOLE, got(b"Bad Gateway", status=502)),
        (WHOLE, got(b'{"error": {}}', status=502)),
        (WHOLE, got(b"{}", status=404)),
        (WHOLE, got(FAILED, status=503)),  # and when to come again?
        (WHOLE, got(FAILED, status=429)),
    ],
)
def test_what_is_no_answer_is_lost_whatever_the_excuse(asked, came):
    for excuses in (NOTHING, DAEMON, SERVER, OPERATOR):
        assert judge(asked, came, excuses)[0] is Verdict.LOST


@pytest.mark.parametrize("end", [End.BROKEN, End.REFUSED])
def test_a_connection_may_break_before_an_answer_only_with_the_daemon(end):
    fine = {End.BROKEN: Verdict.BROKEN, End.REFUSED: Verdict.ABSENT}[end]

    excuses = (NOTHING, SERVER, OPERATOR, DAEMON)
    verdicts = [judge(WHOLE, got(end=end, status=None), each)[0] for each in excuses]

    assert verdicts == [Verdict.LOST, Verdict.LOST, Verdict.LOST, fine]


@pytest.mark.parametrize(
    ("asked", "came", "excused"),
    [
        (WHOLE, got(answer()[:9], End.BROKEN), Verdict.BROKEN),
        (STREAM, got(events(FIRST, done=False), End.BROKEN), Verdict.LOST),  # it could have said what was wrong
        (STREAM, got(FAILED[:9], End.BROKEN, status=502), Verdict.BROKEN),
    ],
)
def test_an_answer_that_has_begun_may_be_broken_off_by_others_too_unless_it_is_a_stream(asked, came, excused):
    verdicts = [judge(asked, came, excuses)[0] for excuses in (NOTHING, SERVER, OPERATOR, DAEMON)]

    assert verdicts == [Verdict.LOST, excused, excused, Verdict.BROKEN]


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (events(FIRST, done=False) + b'data: {"id\n\n' + events(FAILED, done=False), "torn event: b'{\"id'"),
        (events(FIRST, done=False) + b'data: {"id', "torn event: b'data: {\"id'"),
        (events(FIRST, done=False) + b'data: {"id' + events(FAILED, done=False), "torn event: b'{\"iddata: "),
        (b"da" + events(FAILED, done=False), "torn event: b'dadata: "),
        (b"data: 5\n\n", "torn event: b'5'"),
        (events(FIRST, SECOND)[:-1], "torn event: b'data: [DONE]\\n'"),
        (events(FIRST, SECOND) + events(FAILED, done=False), 'event behind [DONE]: b\'{"src"'),
        (events(FIRST, SECOND) + b"da", "event behind [DONE]: b'da'"),
    ],
)
def test_what_is_no_event_is_garbled_whatever_the_excuse(body, told):
    """And nobody else's: the bytes are told, so that it can be seen what they are."""
    for excuses in (NOTHING, DAEMON, SERVER, OPERATOR):
        verdict, why = judge(STREAM, got(body), excuses)
        assert verdict is Verdict.GARBLED
        assert told in why


def test_an_internal_error_is_no_excuse():
    for excuses in (NOTHING, DAEMON, SERVER, OPERATOR):
        assert judge(WHOLE, got(FAILED, status=500), excuses)[0] is Verdict.INTERNAL


def test_what_is_bad_is_a_problem_and_everything_is_counted():
    tally = Tally(aborted=1)

    tally.judged(WHOLE, got(answer()), NOTHING)
    tally.judged(WHOLE, got(answer(token="t2")), NOTHING)
    tally.judged(WHOLE, got(end=End.SILENT, status=None), NOTHING)

    assert tally.sent == 4
    assert [text.partition(":")[0] for text in tally.problems] == ["foreign answer", "lost"]
    assert {Verdict.LOST, Verdict.FOREIGN, Verdict.GARBLED, Verdict.INTERNAL} == set(BAD)


# ---- the order -------------------------------------------------------------------------------


def names(seed: int, number: int) -> list[str]:
    return [name for name, _ in deck(seed, number)]


def test_the_seed_says_the_order_and_what_each_fault_draws():
    assert names(1, 1) == names(1, 1)
    assert [rng.random() for _, rng in deck(1, 1)] == [rng.random() for _, rng in deck(1, 1)]
    assert names(1, 1) != names(2, 1)
    assert names(1, 1) != names(1, 3)


def test_each_kind_is_in_two_rounds_and_the_daemon_survives_the_first():
    assert {*names(1, 0), *names(1, 1)} == set(KINDS)
    assert not ALONE & set(names(1, 0))
    assert len(ALONE) == 3


# ---- the eyes --------------------------------------------------------------------------------


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


STAY = (sys.executable, "-S", "-E", "-u", "-c", "print('ready'); import signal; signal.pause()")


def member(world: World, model: str):
    return running((*STAY, "--name", model), until="ready", env={RUN: world.run, MARKER: f"x-{model}"})


async def test_sees_who_belongs_to_it_and_nobody_else(world):
    async with member(world, "ant") as process, running(STAY, until="ready", env={RUN: "another"}):
        [seen] = world.servers()

        assert (seen.pid, seen.model, seen.marker) == (process.pid, "ant", "x-ant")
        assert seen.send(signal.SIGKILL)
        with trio.fail_after(PATIENCE):
            await process.wait()
        assert not seen.is_alive()
        assert not seen.send(signal.SIGKILL)
    assert world.look() == []


async def test_sees_models_that_must_not_run_together(world):
    async with member(world, "ant"), member(world, "dog"):
        assert world.too_many() is None
        async with member(world, "bee"):
            assert world.too_many().startswith("ant, bee run at the same time")
        assert world.too_many() is None
        async with member(world, "eel"):
            assert world.too_many().startswith("ant, dog, eel run at the same time")


def test_the_budget_is_for_fewer_models_than_there_are():
    assert 1 < BUDGET // NEED < len(MODELS)


async def test_excuses_hold_for_their_time_and_their_model(world, autojump_clock):
    with world.touching("ant"), world.down():
        await trio.sleep(1)
        assert world.is_down
        assert world.was_touched("ant", trio.current_time())
    ended = trio.current_time()

    assert not world.is_down
    assert world.was_down(ended)
    assert not world.was_down(ended + 0.1)
    assert world.was_touched("ant", ended)
    assert not world.was_touched("ant", ended + 1.1)
    assert not world.was_touched("bee", ended)
    with world.touching():
        assert world.was_touched("bee", trio.current_time())


def test_mistakes_are_made_in_their_order_and_once(world):
    for code in ("5", "6"):
        world.plan_mistake("ant", ["--exit-at-start", code])
    command = tomllib.loads(world.document())["models"]["ant"]["cmd"]

    codes = [subprocess.run(command, check=False, timeout=PATIENCE, capture_output=True).returncode for _ in range(2)]

    assert codes == [5, 6]
    assert list(world.mistakes_of("ant").iterdir()) == []
