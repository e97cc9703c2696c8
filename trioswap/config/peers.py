"""Peers from what is written to what is meant, and the names under which their models are known.

The rules are llama-swap's (core reference 1.16): a model of a peer is always known as
PEER/MODEL, and as MODEL alone where only one peer offers it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import attrs

from trioswap.config.addresses import Address, UnixAddress, parse_listen, parse_peer
from trioswap.config.mistakes import Mistakes, quoted
from trioswap.config.parts import PEER_RESPONSE_HEADER, PeerConfig
from trioswap.config.raw import RawPeer
from trioswap.config.rules import check_name
from trioswap.config.traffic import read_filters, read_timeouts


def read_peer(name: str, raw: RawPeer, mistakes: Mistakes) -> PeerConfig:
    """The peer *name* meant by *raw*."""
    path = ("peers", name)
    if raw.proxy is None:
        mistakes.add((*path, "proxy"), "found none, allowed is the address of the peer")
    for index, model in enumerate(raw.models or ()):
        check_name((*path, "models", index), model, mistakes)
    if not raw.models:
        mistakes.add((*path, "models"), "found none, allowed is at least one")
    if raw.api_key is not None and any(char.isspace() or not char.isprintable() for char in raw.api_key):
        mistakes.add((*path, "api_key"), "found a key with spaces or control characters, allowed is one without")
    return PeerConfig(
        name=name,
        proxy=(raw.proxy or "").rstrip("/"),
        models=tuple(dict.fromkeys(raw.models or ())),
        api_key=raw.api_key or None,
        filters=read_filters(raw.filters, (*path, "filters"), mistakes),
        timeouts=read_timeouts(raw.timeouts, response_header=PEER_RESPONSE_HEADER),
    )


@attrs.frozen
class PeerNames:
    """Who is meant by a name that no model here has."""

    qualified: Mapping[str, tuple[str, str]]
    """PEER/MODEL -> peer and model."""
    bare: Mapping[str, tuple[str, str]]
    """MODEL -> the only peer that offers it, and the model."""

    def find(self, name: str) -> tuple[str, str] | None:
        """The peer and the model that *name* stands for; as PEER/MODEL, if it can be that."""
        return self.qualified.get(name) or self.bare.get(name)


def peer_names(peers: Mapping[str, PeerConfig]) -> PeerNames:
    """The names of all models of *peers*."""
    offers = [(peer.name, model) for peer in peers.values() for model in peer.models]
    qualified: dict[str, tuple[str, str]] = {}
    for peer, model in offers:
        qualified.setdefault(f"{peer}/{model}", (peer, model))
    times = Counter(model for _, model in offers)
    bare = {model: (peer, model) for peer, model in offers if times[model] == 1}
    return PeerNames(qualified, bare)


def check_peers(peers: Mapping[str, PeerConfig], listen: str, mistakes: Mistakes) -> None:
    """Addresses must be some, and not ours; no PEER/MODEL may mean two things."""
    here = _listening(listen)
    owners: dict[str, str] = {}
    for peer in peers.values():
        _check_address(peer, here, mistakes)
        for name in (f"{peer.name}/{model}" for model in peer.models):
            other = owners.setdefault(name, peer.name)
            if other != peer.name:
                text = f"found {quoted(name)}, which a model of peer {quoted(other)} is called already"
                mistakes.add(("peers", peer.name, "models"), f"{text}, allowed is a name of its own")


def _listening(listen: str) -> Address | UnixAddress | None:
    try:
        return parse_listen(listen)
    except ValueError:
        return None  # told where the address itself is judged


def _check_address(peer: PeerConfig, here: Address | UnixAddress | None, mistakes: Mistakes) -> None:
    path = ("peers", peer.name, "proxy")
    if mistakes.about(path):
        return
    try:
        address = parse_peer(peer.proxy)
    except ValueError as exc:
        mistakes.add(path, str(exc))
        return
    if here is not None and here.overlaps(address):
        mistakes.add(path, f"found {quoted(peer.proxy)}, which is where trioswap listens, allowed is another address")
