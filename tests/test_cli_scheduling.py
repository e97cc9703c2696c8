"""`trioswap queue`, `plan` and what `ps` says of memory: text for people, against real daemons and bare files."""

from __future__ import annotations

import json
import re
from functools import partial

import pytest
import trio
from children import free_port
from commands import trioswap
from daemons import chat, connect, daemon, eventually, fetch, is_running, scripted, write_config

from trioswap import telling

CHAT = "/v1/chat/completions"
# Eight of memory, whatever this machine has; nothing is measured.
MEMORY = {"headroom": 0, "learn": False, "devices": {"ram": "8GiB"}}
BUSY = {"stream": True, "chunks": 10**6, "chunk_delay": 0.01}


async def shown(*arguments: str, port: int | None = None) -> list[str]:
    """The lines of a command that succeeds."""
    url = () if port is None else ("--url", f"http://127.0.0.1:{port}")
    done = await trioswap(*arguments, *url)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def cells(line: str) -> list[str]:
    """What stands between two spaces or more."""
    return re.split(r"  +", line)


# ---- queue and ps --------------------------------------------------------------------------------


async def test_the_line_and_the_last_decisions():
    """Who waits for what and for how long, then what was decided when and why; with nobody and nothing, a few words."""
    models = {"a": scripted(), "b": scripted(max_wait=500)}
    async with daemon(models) as served, await connect(served.port) as busy, await connect(served.port) as client:
        assert await shown("queue", port=served.port) == ["nobody waits"]
        await busy.ask("POST", CHAT, chat("a", **BUSY))
        await busy.head()
        await client.ask("POST", CHAT, chat("b"))
        await eventually(partial(is_running, served.port, "b", waiting=1))
        head, row, blank, *decisions = await shown("queue", port=served.port)
    assert cells(head) == ["REQUEST", "MODEL", "WAITED", "PLACE", "STAGE", "WAITS FOR", "SERVED IN"]
    request, model, waited, *rest = cells(row)
    assert (request[:4], model, rest) == ("req_", "b", ["1", "queued", "a", "about 8 min"])
    assert re.fullmatch(r"\d+\.\d s", waited)
    assert blank == ""
    assert cells(decisions[0]) == ["TIME", "DECISION", "MODEL", "WHY"]
    [at, *decision] = cells(decisions[1])
    assert re.fullmatch(r"\d\d:\d\d:\d\d", at)
    assert decision == ["start", "a", "it is wanted"]


async def test_ps_tells_what_is_reserved_and_lent():
    """A column where memory plays a part, and a line for each loan."""
    models = {"a": scripted(memory="1536MiB"), "other": scripted(memory="1GiB")}
    async with daemon(models, memory=MEMORY) as served, await connect(served.port) as holder:
        await fetch(served.port, "POST", "/api/models/load/a")
        await holder.ask("POST", "/api/hold", json.dumps({"memory": "2GiB", "label": "training"}).encode())
        await holder.piece_of_body()
        *table, loan = await shown("ps", port=served.port)
    assert [cells(line) for line in table] == [
        ["MODEL", "STATE", "SERVING", "WAITING", "MEMORY"],
        ["a", "ready", "0", "0", "1.5 GiB on ram"],
        ["other", "stopped", "0", "0"],
    ]
    assert re.fullmatch(r"2 GiB on ram lent to training since \d\d:\d\d:\d\d", loan)


# ---- plan, of a running daemon ---------------------------------------------------------------------


async def test_a_plan_of_a_running_daemon():
    """State, need, who would go and when, and when the model would serve."""
    models = {"a": scripted(memory="6GiB"), "org/b": scripted(memory="4GiB", max_wait=500, load_cost=3)}
    async with daemon(models, memory=MEMORY) as served, await connect(served.port) as busy:
        await busy.ask("POST", CHAT, chat("a", **BUSY))
        await busy.head()
        lines = await shown("plan", "org/b", port=served.port)
        resident = await shown("plan", "a", port=served.port)
    assert [cells(line) for line in lines[:4]] == [
        ["model", "org/b"],
        ["state", "stopped"],
        ["needs", "4 GiB on ram (as configured)"],
        ["fits", "no: it needs 4 GiB on ram (2 GiB of 8 GiB free)"],
    ]
    label, victim = cells(lines[4])
    assert label == "evicts"
    assert re.fullmatch(r"a \(ready, serves 1\), in about 8 min; to load it again takes about \d+ s", victim)
    assert cells(lines[5]) == ["served in", "about 8 min"]
    assert [cells(line) for line in resident[3:]] == [
        ["fits", "yes: it is resident"],
        ["evicts", "nobody"],
        ["served in", "at once"],
    ]


async def test_a_plan_for_what_has_just_failed():
    """The last error, and that requests are refused for a while; nobody would go."""
    models = {"a": scripted(), "b": scripted("--exit-at-start", 7, backoff=500, backoff_max=500)}
    async with daemon(models) as served:
        await fetch(served.port, "POST", CHAT, chat("b"))
        await fetch(served.port, "POST", CHAT, chat("a"))
        _, state, *lines = await shown("plan", "b", port=served.port)
    assert cells(state) == ["state", "stopped"]
    assert [cells(line)[0] for line in lines] == ["fits", "refused", "last error", "evicts", "served in"]
    fits, refused, error, evicts, served_in = (cells(line)[1] for line in lines)
    assert (fits, evicts, served_in) == ("no", "nobody", "not before it is tried again, in about 8 min")
    assert re.fullmatch(r"it has just failed, and is not tried again for (500|4\d\d) s", refused)
    assert error.startswith("exited with 7")


async def test_what_a_daemon_does_not_know():
    """Its own words, one line, and 1, as for every command that asks a daemon."""
    async with daemon({"alpha": scripted()}) as served:
        done = await trioswap("plan", "alhpa", "--url", f"http://127.0.0.1:{served.port}")
    assert (done.returncode, done.stdout) == (1, "")
    assert 'did you mean "alpha"?' in done.stderr


@pytest.mark.parametrize("command", [("queue",), ("plan", "a")])
async def test_no_daemon_and_no_trioswap(command):
    """Without a daemon the URL is named, and a server that is not ours is recognised."""
    url = f"http://127.0.0.1:{free_port()}"
    done = await trioswap(*command, "--url", url)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"at {url}: connection refused" in done.stderr

    async def answer(stream) -> None:
        await stream.receive_some()
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")

    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, answer, [listener])
        done = await trioswap(*command, "--url", f"http://127.0.0.1:{listener.socket.getsockname()[1]}")
        nursery.cancel_scope.cancel()
    assert (done.returncode, done.stdout) == (1, "")
    assert "is not trioswap" in done.stderr


# ---- plan, of a configuration ------------------------------------------------------------------------


async def test_a_plan_by_memory(tmp_path):
    """Without a daemon: what the file says the model needs, and who of those named would go."""
    models = {"a": scripted(memory="3GiB", load_cost=90), "b": scripted(memory="3GiB"), "c": scripted(memory="5GiB")}
    config = write_config(tmp_path, {**models, "new": scripted(aliases=["nick"])}, memory=MEMORY)
    assert await shown("plan", "c", "--resident", "a,b", "-c", config) == [
        "model   c",
        "needs   5 GiB on ram (as configured)",
        "fits    no: it needs 5 GiB on ram (2 GiB of 8 GiB free)",
        "evicts  b",
    ]
    assert await shown("plan", "nick", "--resident", "a,b", "-c", config) == [
        "model   new",
        "needs   not known yet",
        "fits    no: it is not known yet what it needs, so it gets the machine for itself",
        "evicts  a",
        "        b",
    ]
    assert (await shown("plan", "a", "--resident", "a", "-c", config))[2:] == [
        "fits    yes: it is resident",
        "evicts  nobody",
    ]


async def test_a_plan_by_groups(tmp_path):
    """The rule is named with its group."""
    groups = {"g": {"members": ["a", "b"]}, "p": {"members": ["c"], "persistent": True}}
    config = write_config(tmp_path, {name: scripted() for name in "abcd"}, groups=groups)
    assert await shown("plan", "a", "--resident", "c,b", "-c", config) == [
        "model   a",
        'fits    no: group "g" has one model resident at a time, so b must go',
        "evicts  b",
    ]
    assert await shown("plan", "a", "-c", config) == [
        "model   a",
        "fits    yes: there is room for it",
        "evicts  nobody",
    ]


async def test_a_plan_by_a_matrix(tmp_path):
    """The set, the combination that was chosen, and what each eviction costs."""
    path = tmp_path / "trioswap.toml"
    matrix = '[matrix]\nsets.small = "a & b"\nsets.large = "(a | b) & c"\nevict_costs.a = 5\n'
    servers = "".join(f'[models.{name}]\ncmd = "serve --port ${{PORT}}"\n' for name in "abcd")
    path.write_text(matrix + servers)
    assert await shown("plan", "c", "--resident", "a,b", "-c", str(path)) == [
        "model   c",
        'fits    no: the cheapest choice is a & c of set "large", so b (cost 1) must go',
        "evicts  b",
    ]
    assert await shown("plan", "d", "--resident", "a", "-c", str(path)) == [
        "model   d",
        "fits    no: it is in no set of the matrix, so it is resident alone, and a (cost 5) must go",
        "evicts  a",
    ]


TOGETHER = "models that can be resident together; gamma does not fit: it needs 5 GiB on ram (2 GiB of 8 GiB free)"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("alhpa",), 'MODEL: found "alhpa", allowed is the name of a model, did you mean "alpha"?'),
        (("zzz",), 'MODEL: found "zzz", allowed is the name of a model, such as "alpha"'),
        (("alpha", "--resident", "beta,gama"), '--resident: found "gama", allowed is the name of a model, did you'),
        (("alpha", "--resident", "beta,gamma"), f'--resident: found "beta,gamma", allowed is {TOGETHER}'),
        (("alpha", "--resident", "beta", "--url", "http://127.0.0.1:1"), "--url asks a daemon"),
    ],
)  # fmt: skip
async def test_mistakes_in_a_plan(arguments, words, tmp_path):
    """2, and a sentence with what was found and what is allowed."""
    models = {"alpha": scripted(memory="1GiB"), "beta": scripted(memory="6GiB"), "gamma": scripted(memory="5GiB")}
    config = write_config(tmp_path, models, memory=MEMORY)
    done = await trioswap("plan", *arguments, "-c", config)

    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


# ---- words --------------------------------------------------------------------------------------------


def test_times_are_rounded_for_people():
    """Seconds up to two minutes, then minutes; nothing is "about 0"."""
    times = [0.0, 0.2, 1.4, 12.4, 119.4, 120, 3600, None]

    assert [telling.about(seconds) for seconds in times] == [
        "at once", "about 1 s", "about 1 s", "about 12 s", "about 119 s", "about 2 min", "about 60 min",
        "nobody can tell",
    ]  # fmt: skip


NEED = {"source": "learned", "holdings": [{"gpu0": 2**30, "ram": 2**20}, {"gpu1": 2**30, "ram": 2**20}], "note": ""}


@pytest.mark.parametrize(
    ("need", "words"),
    [
        (NEED, "1 GiB on gpu0 and 1 MiB on ram or 1 GiB on gpu1 and 1 MiB on ram (learned from earlier runs)"),
        (
            {"source": "declared", "holdings": [{"ram": 2**31}], "note": "1.0 GiB declared, but 2.0 GiB used"},
            "2 GiB on ram (as configured; 1.0 GiB declared, but 2.0 GiB used)",
        ),
        ({"source": "estimated", "holdings": [{"ram": 2**30}], "note": ""}, "1 GiB on ram (guessed from its file)"),
    ],
)
def test_a_need_says_whence_it_is_known(need, words):
    """Each alternative, the source, and why it is another than its source says."""
    found = {"model": "a", "need": need, "fits": True, "why": "w", "evicts": []}

    assert telling.plan(found, live=False).splitlines()[1] == f"needs   {words}"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "v (ready, idle for 12 s), now; to load it again takes about 9 s"),
        ({"serving": 2, "when": 30.2}, "v (ready, serves 2), in about 30 s; to load it again takes about 9 s"),
        ({"when": 0.4}, "v (ready, idle for 12 s), in about 1 s; to load it again takes about 9 s"),
        ({"serving": 1, "when": None}, "v (ready, serves 1), nobody can tell when; to load it again takes about 9 s"),
    ],
)
def test_a_victim_is_told_with_its_time(changes, words):
    """What it does, and when it can be made to go."""
    victim = {"model": "v", "state": "ready", "serving": 0, "idle": 12.3, "reload": 9.0, "when": 0.0, **changes}
    found = {"model": "a", "state": "stopped", "need": None, "fits": False, "why": "w", "evicts": [victim]}

    assert telling.plan({**found, "estimate": None}, live=True).splitlines()[3:] == [
        f"evicts     {words}",
        "served in  never as things are",
    ]
