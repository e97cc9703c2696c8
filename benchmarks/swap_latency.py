"""How much trioswap adds to the start of a model server, and to a swap.

Two figures, each the median of ROUNDS, with a scriptable server that becomes ready a known
time after its start and reports when that was on the clock that all processes share:

    ready -> first byte   from "the server answers 200" to the first byte of the answer at the client
    swap                  the whole swap through the daemon, as a ratio to stopping and starting
                          the same servers by hand, side by side in this run

Run it with `nox -s bench`.  Exits with 1 when the promise (50 ms) is not kept.
"""

from __future__ import annotations

import http.client
import statistics
import subprocess
import sys
import time

from common import PATIENCE, Address, ask, command, daemon, free_port, model

ROUNDS = 20
PROMISE = 0.050  # seconds from ready to the first forwarded byte
# name -> flags: a server that says when it is ready, and one that says nothing at all.
SERVERS = {
    "talks-200ms": ("--ready-delay", "0.2"),
    "silent-200ms": ("--ready-delay", "0.2", "--silent"),
    "talks-1s": ("--ready-delay", "1"),
    "silent-1s": ("--ready-delay", "1", "--silent"),
    "late-port-1s": ("--bind-delay", "1", "--silent"),
}


def ready_to_first_byte(address: Address, name: str, other: str) -> list[float]:
    """Seconds by which the first byte comes after the server was ready, each time through a swap."""
    delays = []
    for _ in range(ROUNDS):
        ask(address, other)
        first_byte, answer = ask(address, name)
        delays.append(first_byte - answer["ready_at"])
    return delays


def swaps_through_daemon(address: Address, models: tuple[str, str]) -> list[float]:
    """Seconds from the request to the answer when the other model is resident."""
    ask(address, models[1])
    took = []
    for index in range(ROUNDS):
        begun = time.monotonic()
        ask(address, models[index % 2])
        took.append(time.monotonic() - begun)
    return took


def swaps_by_hand(models: tuple[str, str]) -> list[float]:
    """The same with nothing in between: start one, ask it as soon as it is ready, stop it."""
    took, port = [], free_port()
    for index in range(ROUNDS):
        name, begun = models[index % 2], time.monotonic()
        with subprocess.Popen(command(name, port, *SERVERS[name]), stdout=subprocess.DEVNULL) as server:
            try:
                ask_when_ready(("127.0.0.1", port), name)
            finally:
                server.terminate()
        took.append(time.monotonic() - begun)
    return took


def ask_when_ready(address: Address, name: str) -> None:
    """Poll without mercy: the fastest anybody could be; but not for ever."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            connection = http.client.HTTPConnection(*address, timeout=PATIENCE)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                break
        except OSError:
            pass
        finally:
            connection.close()
        time.sleep(0.001)  # noqa: TID251 - no event loop here
    ask(address, name)


def main() -> int:
    """Measure, print, judge."""
    kept = True
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr] # each figure when it is there
    servers = {name: model(name, *flags) for name, flags in SERVERS.items()}
    with daemon(servers, log_level="error") as served:
        address = served.address
        print(f"ready -> first byte at the client, median of {ROUNDS} (promise: {PROMISE * 1e3:.0f} ms)")
        for name in SERVERS:
            delays = ready_to_first_byte(address, name, "talks-200ms" if name != "talks-200ms" else "silent-200ms")
            median = statistics.median(delays)
            kept = kept and median <= PROMISE
            low, high = min(delays) * 1e3, max(delays) * 1e3
            print(f"  {name:14} {median * 1e3:6.1f} ms   (min {low:.1f}, max {high:.1f})")
        pair = ("talks-200ms", "silent-200ms")
        through, by_hand = map(statistics.median, (swaps_through_daemon(address, pair), swaps_by_hand(pair)))
    print(f"swap of two servers that need 200 ms, median of {ROUNDS}")
    print(f"  by hand        {by_hand * 1e3:6.1f} ms")
    added = 1e3 * (through - by_hand)
    print(f"  through us     {through * 1e3:6.1f} ms   ratio {through / by_hand:.2f}, added {added:.1f} ms")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
