"""How much is logged, asked and changed at a running daemon."""

from __future__ import annotations

import json

import commands
from daemons import Answer, fetch, scripted, write_config

LEVEL = "/api/log-level"
JSON = ("content-type", "application/json")


async def put(port: int, body: object) -> Answer:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return await fetch(port, "PUT", LEVEL, data, JSON)


async def logged(port: int, target: str) -> bool:
    """Whether a request to *target*, which is logged at INFO, is in our lines."""
    assert (await fetch(port, "GET", target)).status == 200
    return f"path={target.partition('?')[0]} " in (await fetch(port, "GET", "/logs/stream/proxy?no-follow")).text


async def test_the_level_changes_what_is_logged(tmp_path):
    """At once, up and down; the answer says what holds, and so does every GET after it."""
    config = write_config(tmp_path, {"a": scripted()}, log_level="error")
    async with commands.daemon("serve", "-c", config) as served:
        assert (await fetch(served.port, "GET", LEVEL)).json() == {"level": "error"}
        assert not await logged(served.port, "/v1/models")
        for level, seen in (("info", True), ("warning", False), ("debug", True)):
            answer = await put(served.port, {"level": level})
            assert (answer.status, answer.json()) == (200, {"level": level})
            assert (await fetch(served.port, "GET", LEVEL)).json() == {"level": level}
            target = {"info": "/running", "warning": "/api/version", "debug": "/api/queue"}[level]
            assert await logged(served.port, target) is seen
        # Only debug tells the scheduler's small steps.
        await fetch(served.port, "POST", "/api/models/load/a")
        assert " DEBUG journal: " in (await fetch(served.port, "GET", "/logs")).text


NO_LEVELS = [
    b"",
    b"debug",
    b"\xff",
    b"[" * 900,
    {},
    [],
    "debug",
    {"level": None},
    {"level": ["info"]},
    {"level": "warn"},
]


async def test_what_is_no_level_is_refused(tmp_path):
    """With an example of what is meant; and the one that holds stays."""
    async with commands.daemon("serve", "-c", write_config(tmp_path, {"a": scripted()})) as served:
        for body in NO_LEVELS:
            answer = await put(served.port, body)
            assert (answer.status, "JSON" in answer.json()["error"]["message"]) == (400, True), body
        assert (await put(served.port, {"level": "x" * 2000})).status == 413  # no level is that long
        assert (await fetch(served.port, "GET", LEVEL)).json() == {"level": "info"}
