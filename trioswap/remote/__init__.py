"""The only importer of httpx and of its engine, httpcore: what is asked over the network, beside local model servers.

- `probe`: is a model server ready?
- `daemon`: the command line's clients of a running daemon
- `peer`: requests to other servers whose models are offered along with ours; below it `exchange` (one
  request), `health` (is the peer there?), `wire` (TCP and TLS) and `proxies` (which is on the way?)
"""

from trioswap.remote.daemon import DaemonClient, Loan, daemon_client, memory_loan
from trioswap.remote.exchange import PeerResponse
from trioswap.remote.health import PeerHealth, PeerState
from trioswap.remote.peer import Peer, make_peers
from trioswap.remote.probe import Prober

__all__ = [
    "DaemonClient",
    "Loan",
    "Peer",
    "PeerHealth",
    "PeerResponse",
    "PeerState",
    "Prober",
    "daemon_client",
    "make_peers",
    "memory_loan",
]
