"""Profiles and selectors: names that lead on to models.

From what is written to what is meant, and what must hold between the names (core reference
1.14 and 1.15).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Final

import attrs

from trioswap.config.coexist import Coexistence
from trioswap.config.mistakes import Mistakes, Path, found, quoted
from trioswap.config.parts import ProfileConfig, SelectorConfig
from trioswap.config.peers import PeerNames, peer_names
from trioswap.config.raw import RawProfile, RawSelector, RawSelectorSettings
from trioswap.config.rules import alias_path, check_choice, check_name
from trioswap.config.schema import STRATEGIES, Config

_DEFAULTS: Final = SelectorConfig(name="", strategy="", targets=())
_A_TARGET: Final = "the name of a model, an alias, or the name of a peer's model"


def read_profile(name: str, raw: RawProfile, mistakes: Mistakes) -> ProfileConfig:
    """The profile *name* meant by *raw*."""
    path = ("profiles", name, "pins")
    if not raw.pins and not mistakes.touch(path):
        mistakes.add(path, "found no pin, allowed is at least one")
    pins = {pin: target or None for pin, target in (raw.pins or {}).items()}
    return ProfileConfig(name=name, pins=pins, description=raw.description or "")


def read_selector(name: str, raw: RawSelector, mistakes: Mistakes) -> SelectorConfig:
    """The selector *name* meant by *raw*."""
    if raw.strategy is None:
        mistakes.add(("selectors", name, "strategy"), f"found none, allowed is one of {', '.join(STRATEGIES)}")
    if not raw.targets:
        mistakes.add(("selectors", name, "targets"), "found none, allowed is at least one")
    settings = raw.settings or RawSelectorSettings()
    return SelectorConfig(
        name=name,
        strategy=raw.strategy or "",
        targets=tuple(raw.targets or ()),
        spillover=_DEFAULTS.spillover if settings.spillover is None else settings.spillover,
        display_name=raw.name or "",
        description=raw.description or "",
        unlisted=raw.unlisted or False,
        metadata=raw.metadata or {},
    )


@attrs.frozen
class Names:
    """What clients may ask for."""

    all: Mapping[str, None]
    """Models, aliases, models of peers, selectors and pins; in this order."""
    certain: bool
    """Whether these are all: a name that a mistake hides is not called unknown."""

    @classmethod
    def of(cls, config: Config, mistakes: Mistakes) -> Names:
        """Those of *config*, in which there are these *mistakes*."""
        pins = (pin for profile in config.profiles.values() for pin in profile.pins)
        hidden = mistakes.touch(("profiles",)) or not _targets_are_certain(config, mistakes)
        return cls(dict.fromkeys([*_targets(config), *config.selectors, *pins]), not hidden)


def _targets(config: Config) -> list[str]:
    """All names that mean a model, of ours or of a peer."""
    peers = peer_names(config.peers)
    aliases = (alias for model in config.models.values() for alias in model.aliases)
    return [*config.models, *aliases, *peers.bare, *peers.qualified]


def _targets_are_certain(config: Config, mistakes: Mistakes) -> bool:
    """Whether all of these, and selectors, are known."""
    return not (
        mistakes.about(("models",))
        or mistakes.about(("selectors",))
        or mistakes.touch(("peers",))
        or any(mistakes.touch(("models", name, key)) for name in config.models for key in ("aliases", "filters"))
    )


def check_routes(config: Config, mistakes: Mistakes) -> None:
    """Add what is wrong with the profiles and selectors of *config* to *mistakes*."""
    judge = _Judge(config, mistakes)
    for selector in config.selectors.values():
        judge.check_selector(selector)
    for profile in config.profiles.values():
        judge.check_profile(profile)
    judge.check_reserved()


@attrs.define(eq=False)
class _Judge:
    """Knows what each name means."""

    config: Config
    mistakes: Mistakes
    peers: PeerNames = attrs.field(init=False)
    names: list[str] = attrs.field(init=False)
    """All that a name may be, to guess from."""
    certain: bool = attrs.field(init=False)
    """Whether these are all: a name that a mistake hides is not called unknown."""

    def __attrs_post_init__(self) -> None:
        self.peers = peer_names(self.config.peers)
        self.names = _targets(self.config)
        self.certain = _targets_are_certain(self.config, self.mistakes)

    # ---- selectors ------------------------------------------------------------------------

    def check_selector(self, selector: SelectorConfig) -> None:
        path = ("selectors", selector.name)
        check_choice((*path, "strategy"), selector.strategy, STRATEGIES, self.mistakes)
        seen: dict[str | tuple[str, str], str] = {}
        for index, target in enumerate(selector.targets):
            place = (*path, "targets", index)
            meaning = self._meaning(target)
            if target in self.config.selectors and meaning is None:
                text = f"found {quoted(target)}, which is a selector itself, allowed is {_A_TARGET}"
                self.mistakes.add(place, text)
            elif meaning is None:
                self._unknown(place, target, _A_TARGET, self.names)
            elif meaning in seen:
                text = f"found {quoted(target)}, which {quoted(seen[meaning])} before it stands for already"
                self.mistakes.add(place, f"{text}, allowed is each target once")
            elif selector.strategy == "warm" and not isinstance(meaning, str):
                text = f"found {quoted(target)}, which is at a peer, allowed are models of our own with warm"
                self.mistakes.add(place, text)
            if meaning is not None:
                seen.setdefault(meaning, target)
        if selector.strategy == "spillover":
            self._check_together((*path, "targets"), [name for name in seen if isinstance(name, str)])

    def _check_together(self, path: Path, models: list[str]) -> None:
        """Requests can spill over only from a model to one that does not put it out."""
        if not self.mistakes.touch(("groups",)) and not self.mistakes.touch(("matrix",)):
            obstacle = Coexistence.of(self.config).obstacle(models)
            if obstacle is not None:
                self.mistakes.add(path, f"found targets {obstacle}, allowed with spillover are targets that can be")

    # ---- profiles -------------------------------------------------------------------------

    def check_profile(self, profile: ProfileConfig) -> None:
        path: Path = ("profiles", profile.name, "pins")
        for pin, target in profile.pins.items():
            check_name((*path, pin), pin, self.mistakes)
            if target is not None and target not in self.config.selectors and self._meaning(target) is None:
                allowed = "the name of a model, an alias, a selector or the name of a peer's model, or an empty text"
                self._unknown((*path, pin), target, allowed, [*self.names, *self.config.selectors])

    # ---- names that may mean one thing only -------------------------------------------------

    def check_reserved(self) -> None:
        """Selectors have names of their own, and PEER/MODEL is nobody else's name."""
        for name in self.config.selectors:
            model = self.config.resolve(name)
            if model is not None:
                what = "of a model" if model == name else f"of model {quoted(model)}, as an alias"
                text = f"found {quoted(name)}, which is the name {what}, allowed is a name of its own"
                self.mistakes.add(("selectors", name), text)
        for path, name in self._others():
            if name in self.peers.qualified:
                peer, _ = self.peers.qualified[name]
                text = f"found {quoted(name)}, which a model of peer {quoted(peer)} is called"
                self.mistakes.add(path, f"{text}, allowed is a name of its own")

    def _others(self) -> Iterable[tuple[Path, str]]:
        """Names that could be taken for those of peers' models, with their places."""
        for model in self.config.models.values():
            yield ("models", model.name), model.name
            for index, alias in enumerate(model.aliases):
                yield alias_path(model, index), alias
        for selector in self.config.selectors:
            yield ("selectors", selector), selector
        for profile in self.config.profiles.values():
            for pin in profile.pins:
                yield ("profiles", profile.name, "pins", pin), pin

    # ---- meanings ---------------------------------------------------------------------------

    def _meaning(self, name: str) -> str | tuple[str, str] | None:
        """The model, or the peer and its model, that *name* stands for."""
        return self.config.resolve(name) or self.peers.find(name)

    def _unknown(self, path: Path, name: str, allowed: str, options: Collection[str]) -> None:
        if self.certain:
            self.mistakes.add(path, found(name, allowed) + self.mistakes.guess(name, options))
