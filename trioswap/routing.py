"""Where the next request for a name goes: the active profile, and what selectors have given out."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import attrs

from trioswap.access import Key
from trioswap.errors import Forbidden, PinnedToNobody, UnknownModel, UnknownProfile
from trioswap.fleet import Fleet
from trioswap.listing import may_use
from trioswap.names import AtPeer, Candidate, Here, Names, Target, choose
from trioswap.remote import Peer, PeerState

logger = logging.getLogger(__name__)

# Characters of a name that are looked at and repeated.  A client may send megabytes of them, and to look for
# similar names takes a second for each.
NAME_LIMIT = 200


@attrs.frozen
class Route:
    """Where one request goes."""

    target: Target
    selector: str | None = None
    """The selector that chose it."""


@attrs.define(eq=False)
class Routing:
    """Knows what may change while the daemon runs."""

    names: Names
    fleet: Fleet
    peers: Mapping[str, Peer]
    profile: str | None = None
    """The active one."""
    _reserved: Counter[tuple[str, str]] = attrs.field(factory=Counter, init=False)
    """Requests under way by selector and the model they were sent to, whatever it is called there."""
    _turns: Counter[str] = attrs.field(factory=Counter, init=False)

    def renewed(self, names: Names, peers: Mapping[str, Peer]) -> Routing:
        """The same by another configuration: no profile is active, and what selectors have sent is still counted."""
        routing = Routing(names, self.fleet, peers)
        routing._reserved, routing._turns = self._reserved, self._turns
        return routing

    def activate(self, profile: str | None) -> None:
        """From now on *profile* is active; None: none.

        Raises:
            UnknownProfile: it is not configured.
        """
        if profile is not None and profile not in self.names.config.profiles:
            raise UnknownProfile(_shortened(profile))
        if profile != self.profile:
            self.profile = profile
            logger.info("profile=%s", profile)

    def knows(self, name: str) -> str | None:
        """*name*, if it means something now."""
        return self.names.knows(name, self.profile)

    def model(self, name: str) -> str:
        """The model of ours that *name* is, or is an alias of.

        Raises:
            UnknownModel: it is neither.
        """
        model = self.names.config.resolve(name)
        if model is None:
            raise self.unknown(name)
        return model

    def unknown(self, name: str) -> UnknownModel:
        """The error that says so, and what may have been meant."""
        if len(name) > NAME_LIMIT:
            return UnknownModel(_shortened(name))
        return UnknownModel(name, self.names.config.similar(name))

    @contextmanager
    def route(self, name: str, key: Key) -> Iterator[Route]:
        """Where the request for *name* of who shows *key* goes; the block is its life.

        Raises:
            UnknownModel, PinnedToNobody: *name* leads nowhere.
            Forbidden: *key* may not go there.
        """
        pinned = self.names.pinned(name, self.profile)
        if pinned is None:
            assert self.profile is not None, "without a profile there are no pins"
            raise PinnedToNobody(name, self.profile)
        if pinned in self.names.config.selectors:
            with self._selected(name, pinned, key) as route:
                yield route
            return
        target = self.names.meaning(pinned)
        if target is None:
            raise self.unknown(name)
        if not may_use(key, name, pinned, target):
            raise Forbidden(key.name, f'use model "{name}"')
        yield Route(target)

    @contextmanager
    def _selected(self, name: str, selector: str, key: Key) -> Iterator[Route]:
        rule = self.names.config.selectors[selector]
        targets = [target for target in self.names.targets(selector) if may_use(key, name, selector, target)]
        candidates = [self._candidate(selector, target) for target in targets]
        if not candidates:
            raise Forbidden(key.name, f'use model "{name}"')
        chosen = choose(rule, candidates, self._turns[selector])
        self._turns[selector] += 1
        self._reserved[selector, chosen.target.real] += 1
        try:
            yield Route(chosen.target, selector)
        finally:
            self._reserved[selector, chosen.target.real] -= 1

    def _candidate(self, selector: str, target: Target) -> Candidate:
        reserved = self._reserved[selector, target.real]
        match target:
            case Here():
                down = self.fleet.is_failing(target.model)  # or its quick refusals would draw all requests
                return Candidate(target, self.fleet.state(target.model), reserved, down)
            case AtPeer():
                return Candidate(target, None, reserved, down=self.peers[target.peer].health.state is PeerState.DOWN)


def _shortened(name: str) -> str:
    return name if len(name) <= NAME_LIMIT else name[:NAME_LIMIT] + "..."
