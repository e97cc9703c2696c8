"""Whom a requested name means: pins of the active profile, selectors, models, aliases, models of peers.

In this order (surface reference, glossary): a pin may lead to a selector, a selector to
models and peers' models, and nothing leads back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import attrs

from trioswap.config import Config
from trioswap.config.parts import SelectorConfig
from trioswap.config.peers import PeerNames, peer_names
from trioswap.lifecycle import State


@attrs.frozen
class Here:
    """A model of ours."""

    model: str
    """As it is configured."""
    name: str
    """The name that led to it: itself or an alias."""
    at_peer: ClassVar[bool] = False

    @property
    def real(self) -> str:
        """The name that nothing else has."""
        return self.model


@attrs.frozen
class AtPeer:
    """A model of a peer."""

    peer: str
    model: str
    """As it is called there."""
    name: str
    """The name that led to it: PEER/MODEL or MODEL."""
    at_peer: ClassVar[bool] = True

    @property
    def real(self) -> str:
        """The name that nothing else has."""
        return f"{self.peer}/{self.model}"


Target = Here | AtPeer


@attrs.frozen
class Names:
    """All names of one configuration."""

    config: Config
    peers: PeerNames = attrs.field(init=False)
    longest: int = attrs.field(init=False)
    """Characters of the longest of them."""

    @peers.default
    def _find_peers(self) -> PeerNames:
        return peer_names(self.config.peers)

    @longest.default
    def _measure(self) -> int:
        pins = (pin for profile in self.config.profiles.values() for pin in profile.pins)
        names = [*self.peers.qualified, *self.peers.bare, *self.config.selectors, *pins]
        return max([self.config.longest_name, *map(len, names)])

    def pinned(self, name: str, profile: str | None) -> str | None:
        """What *name* stands for while *profile* is active; None: nobody answers to it then."""
        pins = {} if profile is None else self.config.profiles[profile].pins
        return pins.get(name, name)

    def knows(self, name: str, profile: str | None) -> str | None:
        """*name*, if it leads anywhere, or is pinned to nobody."""
        pins = {} if profile is None else self.config.profiles[profile].pins
        known = name in pins or name in self.config.selectors or self.meaning(name) is not None
        return name if known else None

    def meaning(self, name: str) -> Target | None:
        """The model that *name* leads to; selectors and pins lead there before."""
        model = self.config.resolve(name)
        if model is not None:
            return Here(model, name)
        found = self.peers.find(name)
        return None if found is None else AtPeer(*found, name)

    def targets(self, name: str) -> list[Target]:
        """The models that *name* may lead to, which no pin changes any more: several only if it is a selector."""
        selector = self.config.selectors.get(name)
        targets = (name,) if selector is None else selector.targets
        return [target for target in map(self.meaning, targets) if target is not None]


@attrs.frozen
class Candidate:
    """A target of a selector, as it stands."""

    target: Target
    state: State | None
    """None: at a peer."""
    reserved: int
    """Requests that the selector has sent there and that are not over."""
    down: bool = False
    """The peer did not answer when it was asked last, or the model has just failed and is not tried again yet."""

    @property
    def is_active(self) -> bool:
        """Whether it is at work, or about to be: a further request makes no further model start."""
        return bool(self.reserved) or self.state in (State.READY, State.STARTING)


def choose(selector: SelectorConfig, candidates: Sequence[Candidate], turn: int) -> Candidate:
    """The one of *candidates*, of which there is at least one, that the next request goes to (surface reference 1.8).

    *turn* counts the requests of the selector: who is as good as another takes turns with it.
    """
    if selector.strategy == "pin":
        return candidates[0]
    if selector.strategy == "warm":
        return min(candidates, key=_warmth)
    return _spill_over(selector, _usable(candidates), turn)


def _warmth(candidate: Candidate) -> int:
    return {State.READY: 0, State.STARTING: 1}.get(candidate.state or State.STOPPED, 2)


def _usable(candidates: Sequence[Candidate]) -> Sequence[Candidate]:
    """Those that are there and stay, else those that are there: a request that waits for the next turn is not lost."""
    there = [candidate for candidate in candidates if not candidate.down]
    staying = [candidate for candidate in there if candidate.state not in (State.STOPPING, State.DRAINING)]
    return staying or there or candidates


def _spill_over(selector: SelectorConfig, usable: Sequence[Candidate], turn: int) -> Candidate:
    active = [candidate for candidate in usable if candidate.is_active]
    cold = [candidate for candidate in usable if not candidate.is_active]
    least = min((candidate.reserved for candidate in active), default=0)
    if cold and (not active or least >= selector.spillover):
        return cold[0]
    best = [candidate for candidate in active if candidate.reserved == least]
    return best[turn % len(best)]
