"""TCP's own question whether the other machine is still there."""

from __future__ import annotations

import math
import socket
from typing import Final

import trio

# Seconds; Linux takes no more between two TCP keep-alive probes (tcp(7); MAX_TCP_KEEPINTVL in its source).
MAX_KEEPALIVE: Final = 32_767


def probe_when_idle(stream: trio.SocketStream, every: float | None) -> None:
    """Have the kernel find out when the machine at the other end is gone: a process alone says goodbye by itself."""
    if every is not None:
        seconds = min(max(1, math.ceil(every)), MAX_KEEPALIVE)
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, seconds)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, seconds)
