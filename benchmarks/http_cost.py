"""What the way through trioswap costs a request, beside the same request sent to the model server itself.

    small JSON   one client on one connection: median time of a request, direct and through the daemon, in turns
                 in the same run, and processor time of the daemon for each
    stream       the same for a stream of EVENTS events: time until the last of them

Run it with `nox -s bench`; it takes some seconds, and a minute at most.  Absolute times depend on the machine; the
ratio, which is that of the middle round, and the processor time do so less.  The daemon logs as it does by default.
"""

from __future__ import annotations

import http.client
import json
import os
import statistics
import time
from pathlib import Path

from common import PATIENCE, Address, daemon, model

ROUNDS = 5
REQUESTS = 200
EVENTS = 500
BUDGET = 30.0  # seconds for all rounds of a row; a machine that is that slow gets fewer of them


def took(address: Address, path: str, body: bytes, count: int) -> list[float]:
    """Seconds of each of *count* requests on one connection."""
    connection = http.client.HTTPConnection(*address, timeout=PATIENCE)
    times = []
    try:
        for _ in range(count):
            begun = time.perf_counter()
            connection.request("POST", path, body, {"content-type": "application/json"})
            response = connection.getresponse()
            assert response.status == 200, response.read()
            response.read()
            times.append(time.perf_counter() - begun)
    finally:
        connection.close()
    return times


def processor_time(pid: int) -> float:
    """Seconds that a process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def compare(what: str, direct: Address, through: Address, pid: int, body: bytes, count: int) -> None:
    """Print one row."""
    path = "/v1/chat/completions"
    for address in (direct, through):
        took(address, path, body, 5)
    plain, proxied, used = list[float](), list[float](), 0.0
    end = time.monotonic() + BUDGET
    for number in range(ROUNDS):
        if number and time.monotonic() > end:
            break
        plain.append(statistics.median(took(direct, path, body, count)))
        before = processor_time(pid)
        proxied.append(statistics.median(took(through, path, body, count)))
        used += processor_time(pid) - before
    one, two = statistics.median(plain), statistics.median(proxied)
    ratio = statistics.median(b / a for a, b in zip(plain, proxied, strict=True))
    each = used / (len(proxied) * count)
    print(
        f"{what:12} direct {one * 1e3:7.3f} ms   through {two * 1e3:7.3f} ms   ratio {ratio:5.1f}"
        f"   processor {each * 1e3:7.3f} ms"
    )


def main() -> None:
    table = model("a")
    direct = ("127.0.0.1", int(str(table["proxy"]).rpartition(":")[2]))
    with daemon({"a": table}, log_level="info") as served:
        small = json.dumps({"model": "a", "script": {}}).encode()
        stream = json.dumps({"model": "a", "stream": True, "script": {"chunks": EVENTS}}).encode()
        took(served.address, "/v1/chat/completions", small, 1)
        compare("small JSON", direct, served.address, served.pid, small, REQUESTS)
        compare("stream", direct, served.address, served.pid, stream, REQUESTS // 20)


if __name__ == "__main__":
    main()
