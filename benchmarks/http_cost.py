"""What the way through trioswap costs a request, beside the same request sent to the model server itself.

    small JSON   one client on one connection: median time of a request, direct and through the daemon, in turns
                 in the same run, and processor time of the daemon for each
    stream       the same for a stream of EVENTS events: time until the last of them

Run it with `nox -s bench`.  Absolute times depend on the machine; the ratio and the processor time do so less.
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
    for _ in range(ROUNDS):
        plain += took(direct, path, body, count)
        before = processor_time(pid)
        proxied += took(through, path, body, count)
        used += processor_time(pid) - before
    one, two = statistics.median(plain), statistics.median(proxied)
    each = used / len(proxied)
    print(
        f"{what:12} direct {one * 1e3:7.3f} ms   through {two * 1e3:7.3f} ms   ratio {two / one:5.1f}"
        f"   processor {each * 1e3:7.3f} ms"
    )


def main() -> None:
    table = model("a")
    direct = ("127.0.0.1", int(str(table["proxy"]).rpartition(":")[2]))
    with daemon({"a": table}, log_level="warning") as served:
        small = json.dumps({"model": "a", "script": {}}).encode()
        stream = json.dumps({"model": "a", "stream": True, "script": {"chunks": EVENTS}}).encode()
        took(served.address, "/v1/chat/completions", small, 1)
        compare("small JSON", direct, served.address, served.pid, small, REQUESTS)
        compare("stream", direct, served.address, served.pid, stream, REQUESTS // 20)


if __name__ == "__main__":
    main()
