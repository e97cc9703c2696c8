"""Many clients against `trioswap demo`, as a program: `nox -s demo`.

Eight clients ask both models in turn, streaming, through the openai package, while another
thread looks every few milliseconds which engine processes there are.  It fails when a request
fails, when an answer has a word of the other model, when two engines run at once, or when
anything is left at the end.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai

from trioswap.tinymodels import WORDS

CLIENTS = 8
REQUESTS = 200
# Seconds for one answer, which takes milliseconds besides its turn.
PATIENCE = 120.0
LOOK_EVERY = 0.004

MODELS = tuple(WORDS)


def answer(url: str, model: str, *, stream: bool) -> str:
    """What *model* says, by way of the openai package; raises whatever goes wrong, also a broken stream."""
    messages = [{"role": "user", "content": "say something"}]
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE) as client:
        if not stream:
            done = client.chat.completions.create(model=model, messages=messages)
            return done.choices[0].message.content
        events = list(client.chat.completions.create(model=model, messages=messages, stream=True))
    choices = [choice for event in events for choice in event.choices]
    if choices[-1].finish_reason is None:
        raise RuntimeError(f"the stream was cut short: {choices[-1]}")
    return "".join(choice.delta.content or "" for choice in choices)


def words_of(text: str) -> set[str]:
    """The models whose words stand in *text*; "?" is for words of none."""
    owner = {word: model for model, words in WORDS.items() for word in words}
    return {owner.get(word, "?") for word in text.split()}


def engines(parent: int) -> list[int]:
    """Pids of the engine processes that run under *parent*."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [pid for pid in pids if _is_engine(pid) and _parent(pid) == parent]


def _is_engine(pid: int) -> bool:
    try:
        return b"trioswap.engine" in Path(f"/proc/{pid}/cmdline").read_bytes()  # empty for a zombie
    except (FileNotFoundError, ProcessLookupError):
        return False


def _parent(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return None


class Observer(threading.Thread):
    """Looks again and again which engines there are."""

    def __init__(self, daemon: int) -> None:
        super().__init__(daemon=True)
        self.looks, self.most = 0, 0
        self.seen: set[int] = set()
        self._daemon, self._over = daemon, threading.Event()

    def run(self) -> None:
        while not self._over.wait(LOOK_EVERY):
            now = engines(self._daemon)
            self.looks, self.most = self.looks + 1, max(self.most, len(now))
            self.seen.update(now)

    def stop(self) -> None:
        self._over.set()
        self.join()


def client(url: str, number: int) -> list[str]:
    """The requests of one client; returns what went wrong."""
    problems = []
    for turn in range(REQUESTS // CLIENTS):
        model = MODELS[(number + turn) % len(MODELS)]
        try:
            said = answer(url, model, stream=True)
        except Exception as exc:
            problems.append(f"client {number} request {turn} to {model}: {exc!r}")
        else:
            if words_of(said) != {model}:
                problems.append(f"client {number} request {turn} to {model}: answered {said!r}")
    return problems


def check(url: str, observer: Observer) -> list[str]:
    """Everything that went wrong; says on one line what was done."""
    begun = time.monotonic()
    observer.start()
    with ThreadPoolExecutor(CLIENTS) as pool:
        problems = [line for lines in pool.map(client, [url] * CLIENTS, range(CLIENTS)) for line in lines]
    observer.stop()
    seconds = time.monotonic() - begun
    if observer.most != 1 or len(observer.seen) < len(MODELS):
        problems.append(f"{observer.most} engines at once, {len(observer.seen)} in all")
    sys.stdout.write(
        f"demo: {REQUESTS} streamed answers to {CLIENTS} clients, {len(problems)} problems, "
        f"{len(observer.seen)} loads, at most {observer.most} engine at once in {observer.looks} looks, "
        f"{seconds:.1f} s\n"
    )
    return problems


def main() -> int:
    """Run the demo, check it, stop it; the exit code."""
    command = [sys.executable, "-m", "trioswap", "demo", "--listen", "127.0.0.1:0", "--log-level", "warning"]
    with tempfile.TemporaryDirectory() as directory:
        environment = {**os.environ, "TMPDIR": directory}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as demo:
            observer = Observer(demo.pid)
            try:
                problems = check(demo.stdout.readline().split()[-1], observer)
            finally:
                demo.terminate()
                code = demo.wait(PATIENCE)
        problems += [f"left behind: {path}" for path in Path(directory).iterdir()]
    problems += [f"left behind: process {pid}" for pid in observer.seen if _is_engine(pid)]
    if code != 0:
        problems.append(f"the demo exited with {code}")
    sys.stdout.writelines(f"{problem}\n" for problem in problems)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
