"""The rows of `/v1/models` (surface reference 2.1): what there is to ask for, and whether it is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import attrs

from trioswap.access import Key
from trioswap.config import Config, ModelConfig
from trioswap.config.parts import CapabilityConfig, SelectorConfig
from trioswap.lifecycle import OCCUPIED, State
from trioswap.names import AtPeer, Here, Names, Target

Row = dict[str, Any]

# What takes the one and gives the other is called so (surface reference 2.1).
_ABILITIES: Final = {
    "audio_transcriptions": ("audio", "text"),
    "audio_speech": ("text", "audio"),
    "image_generation": ("text", "image"),
    "image_to_image": ("image", "image"),
}
# What capabilities say, metadata may not say otherwise.
_RESERVED: Final = ("architecture", "capabilities", "supported_parameters", "context_length")


@attrs.frozen
class Listing:
    """What one client may see of it now."""

    names: Names
    profile: str | None
    """The active one."""
    states: Mapping[str, State]
    """Of the models of ours."""
    key: Key
    created: int
    """Unix seconds, the same for all."""

    @property
    def _config(self) -> Config:
        return self.names.config

    def rows(self) -> list[Row]:
        """All that is listed, sorted by id."""
        return sorted(self._all(listed_only=True), key=lambda row: row["id"])

    def row(self, name: str) -> Row | None:
        """The one called *name*, or of the model that *name* means, listed or not; None: there is none."""
        found = {row["id"]: row for row in self._all(listed_only=False)}
        meant = self.names.meaning(name)
        return found.get(name) or found.get("" if meant is None else meant.real)

    def _all(self, *, listed_only: bool) -> Iterator[Row]:
        for model in self._config.models.values():
            if not (listed_only and model.unlisted):
                yield from self._of_model(model)
        for name, found in self.names.peers.qualified.items():
            yield from self._of_peer(AtPeer(*found, name))
        for selector in self._config.selectors.values():
            if not (listed_only and selector.unlisted):
                yield from self._of_selector(selector)
        yield from self._of_pins()

    # ---- the kinds of rows ---------------------------------------------------------------------

    def _of_model(self, model: ModelConfig) -> Iterator[Row]:
        loaded = self.states.get(model.name) in OCCUPIED
        about = abilities(model.capabilities)
        metadata = {k: v for k, v in model.metadata.items() if not (about and k in _RESERVED)}
        for name in self._names_of(model):
            if name == model.name:
                ours: Row = {"type": "model"} | ({"aliases": list(model.aliases)} if model.aliases else {})
            else:
                ours = {"type": "alias", "modelID": model.name}
            named = self._row(name, model.display_name, model.description) | about
            yield _finished(named, {**metadata, **ours}, model.capabilities, loaded=loaded)

    def _names_of(self, model: ModelConfig) -> list[str]:
        """Those it is listed by; who may not use its own name must see which others there are."""
        own = [model.name] if self.key.may_use(model.name) else []
        others = () if own and not self._config.include_aliases_in_list else model.aliases
        return own + [alias for alias in others if self.key.may_use(alias, model.name)]

    def _of_peer(self, target: AtPeer) -> Iterator[Row]:
        name = target.name
        if not self.key.may_use(name, at_peer=True) and self._is_known_alone(target):
            name = target.model
        if self.key.may_use(name, at_peer=True):
            row = self._row(name, f"{target.peer}: {target.model}", "")
            yield _finished(row, {"type": "peer", "peerID": target.peer}, None, loaded=False)

    def _is_known_alone(self, target: AtPeer) -> bool:
        """Whether MODEL without PEER/ means the same."""
        meant = None if target.model in self._config.selectors else self.names.meaning(target.model)
        return meant is not None and meant.at_peer and meant.real == target.real

    def _of_selector(self, selector: SelectorConfig) -> Iterator[Row]:
        if self._may_reach(selector.name, selector.name):
            about: Row = {"type": "selector", "strategy": selector.strategy, "targets": list(selector.targets)}
            if selector.strategy == "spillover":
                about["spillover"] = selector.spillover
            row = self._row(selector.name, selector.display_name, selector.description)
            yield _finished(row, {**selector.metadata, **about}, None, loaded=self._is_warm(selector))

    def _of_pins(self) -> Iterator[Row]:
        pins = {} if self.profile is None else self._config.profiles[self.profile].pins
        for pin, pinned in pins.items():
            is_new = pin not in self._config.selectors and self.names.meaning(pin) is None
            if pinned is not None and is_new and self._may_reach(pin, pinned):
                yield _finished(self._row(pin, "", ""), {"type": "profile"}, None, loaded=False)

    def _may_reach(self, name: str, pinned: str) -> bool:
        """Whether a request for *name*, which stands for *pinned*, would get to a model."""
        return any(may_use(self.key, name, pinned, target) for target in self.names.targets(pinned))

    def _is_warm(self, selector: SelectorConfig) -> bool:
        targets = self.names.targets(selector.name)
        considered = targets[:1] if selector.strategy == "pin" else targets
        states = [self.states.get(target.model) for target in considered if isinstance(target, Here)]
        return State.READY in states or State.STARTING in states

    def _row(self, name: str, display_name: str, description: str) -> Row:
        row: Row = {"id": name, "object": "model", "created": self.created, "owned_by": "trioswap"}
        for key, text in (("name", display_name), ("description", description)):
            if text.strip():
                row[key] = text.strip()
        return row


def may_use(key: Key, name: str, pinned: str, target: Target) -> bool:
    """Whether who shows *key* may use *target* by asking for *name*, which stands for *pinned*."""
    return key.may_use(name, pinned, target.name, target.real, at_peer=target.at_peer)


def _finished(row: Row, about: Row, can: CapabilityConfig | None, *, loaded: bool) -> Row:
    # The key is llama-swap's: user interfaces read it.
    meta = {"llamaswap": about} | ({"n_ctx": can.context} if can is not None and can.context else {})
    return {**row, "meta": meta, "status": {"value": "loaded" if loaded else "unloaded"}}


def abilities(can: CapabilityConfig | None) -> Row:
    """What a model can do, in the fields of the list."""
    if can is None:
        return {}
    row: Row = {}
    modalities = {"input_modalities": list(can.takes), "output_modalities": list(can.gives)}
    shape: Row = {key: kinds for key, kinds in modalities.items() if kinds}
    if can.takes and can.gives:
        shape["modality"] = f"{'+'.join(can.takes)}->{'+'.join(can.gives)}"
    if shape:
        row["architecture"] = shape
    able = {name: True for name, (takes, gives) in _ABILITIES.items() if takes in can.takes and gives in can.gives}
    able |= {"vision": True} if "image" in can.takes else {}
    able |= {"function_calling": True} if can.tools else {}
    able |= {"reranker": True} if can.reranker else {}
    if able:
        row["capabilities"] = able
    if can.tools:
        row["supported_parameters"] = ["tools", "tool_choice"]
    if can.context:
        row["context_length"] = can.context
    return row
