"""The memory of this machine as a budget: how much there is, who needs how much, who uses how much.

Puts together what `devices` sees, what `gguf` guesses and what `footprints` remembers; which
models may then be resident together is decided in `residency.budget`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final

import attrs
import trio

from trioswap.config import Config, MemoryConfig, ModelConfig
from trioswap.config.schema import AUTO
from trioswap.devices import LOOK_WAIT, Machine, wait_returned
from trioswap.footprints import RAM, Footprints, Wish
from trioswap.gguf import Header, Incomplete, estimate, llama_arguments, read_header, split_files
from trioswap.residency import NOTHING, Holding
from trioswap.residency.budget import Budget

logger = logging.getLogger(__name__)

# Seconds between looks at what a server uses.  At first often, because what it allocates for its first
# answers comes soon; then seldom, because to find the processes of a server all of the machine are looked
# through, in the event loop: 10 to 20 us each, 8 ms where there are 500 (measured).
FIRST_LOOK: Final = 0.1
LOOK_GROWTH: Final = 1.5
LAST_LOOK: Final = 10.0
# Less than this is noise, and no reason to think anew.
NOTICED: Final = 0.01
# A driver that has not given memory back after so many seconds will not be waited for.
RETURN_WAIT: Final = 5.0
# Seconds for the last look at what a server uses: its own, and one that it waits for.
END_LOOK_WAIT: Final = 2 * LOOK_WAIT
# Seconds that both add to a stop at most.
STOP_WAIT: Final = END_LOOK_WAIT + RETURN_WAIT
# Seconds between looks at what other programs take.
FOREIGN_LOOK: Final = 5.0
# The header of most models fits into this many bytes.
_HEADER: Final = 2**20


@attrs.frozen
class Look:
    """What was seen of a server's memory, in bytes of each device."""

    used: Holding
    """By the server."""
    free: Mapping[str, int]
    """Beside it, at the same time."""
    ended: Mapping[str, int]
    """What all those had used who had ended by then."""


@attrs.frozen
class Prospect:
    """What another configuration makes of the memory of the same machine."""

    config: MemoryConfig
    sizes: Mapping[str, int]
    """device -> bytes that models may use."""
    wishes: Mapping[str, Wish]


@attrs.define(eq=False)
class Memory:
    """The budget of one configuration on one machine."""

    config: MemoryConfig
    machine: Machine
    budget: Budget
    _told: Mapping[str, int] = attrs.field(factory=dict, init=False)
    """What there was for models when that was last reported."""
    _anew: trio.Event = attrs.field(factory=trio.Event, init=False)
    """Set when another configuration has come; the next one has another event."""
    _ended: Counter[str] = attrs.field(factory=Counter[str], init=False)
    """As in `Look`."""

    def prospect(self, config: Config) -> Prospect | None:
        """What *config*, which speaks of the same devices, makes of this; looks at model files: call it in a thread."""
        if config.memory is None:
            return None
        sizes = usable_sizes(config.memory, self.machine)
        _tell_of_absent(config, self.machine, sizes)
        return Prospect(config.memory, sizes, {name: _wish(model, sizes) for name, model in config.models.items()})

    def expect(self, prospect: Prospect, keep: Iterable[str]) -> None:
        """From now on it is so; what was learned stays, and of *keep*, which are not in it, also what was wished.

        What other programs have taken is still taken.
        """
        before = usable_sizes(self.config, self.machine)
        taken = {device: size - self.budget.sizes.get(device, 0) for device, size in before.items()}
        if not prospect.config.yield_to_others:  # nobody would say when it is given back
            taken = {}
        sizes = {device: max(0, size - taken.get(device, 0)) for device, size in prospect.sizes.items()}
        self.config, self._told = prospect.config, sizes
        self._anew.set()
        self._anew = trio.Event()
        self.budget.replace(sizes, prospect.sizes)
        footprints = self.budget.footprints
        kept = {name: footprints.wishes[name] for name in keep if name in footprints.wishes}
        footprints.replace({**kept, **prospect.wishes}, trusts=_trusts(prospect.config, self.machine))

    def environment(self, holding: Holding) -> dict[str, str]:
        """What makes a server use just the GPUs in *holding*; empty where it may use all."""
        gpus = [device for device in self.machine.devices if device.name != RAM]
        chosen = [device for device in gpus if holding.get(device.name)]
        if len(chosen) == len(gpus) or not chosen:
            return {}
        if len(chosen) > 1 and any(device.kind != "nvidia" for device in chosen):
            return {}  # other vendors' variables do not add up: each names its GPU in the numbering of the one before
        keys = {key for device in chosen for key in device.environment}
        return {key: ",".join(dict.fromkeys(device.environment[key] for device in chosen)) for key in sorted(keys)}

    async def watch(
        self,
        pids: Callable[[], Iterable[int]],
        report: Callable[[Holding], None],
        seen: Callable[[Look], None] = lambda _: None,
    ) -> None:
        """Report the peak of what the processes use of each device that counts, whenever it has grown; for ever.

        What else was *seen* is told each time.

        From readiness on: weights on their way to a GPU are in the host's memory as well.  The first
        look is at once and the last one when this is cancelled, so even a short run is measured.
        While nobody wants to learn, nobody looks.
        """
        peak: dict[str, int] = {}

        async def look() -> None:
            family, ended = tuple(pids()), dict(self._ended)
            if not family:  # it has ended
                return
            found = await self.machine.in_time(lambda: (self.machine.used_by(family), self.machine.free()))
            if found is None:
                return
            used = {device: size for device, size in found[0].items() if device in self.budget.sizes}
            seen(Look(used, found[1], ended))
            if any(size > (1 + NOTICED) * peak.get(device, 0) for device, size in used.items()):
                peak.update({device: max(size, peak.get(device, 0)) for device, size in used.items()})
                report(dict(peak))

        pause = FIRST_LOOK
        while True:
            if not self.config.learn:
                await self._anew.wait()
                continue
            try:
                await look()
                await trio.sleep(pause)
            except trio.Cancelled:  # the server is being stopped, and still has what it has
                if self.config.learn:
                    with trio.move_on_after(END_LOOK_WAIT, shield=True):
                        await look()
                raise
            pause = min(LOOK_GROWTH * pause, LAST_LOOK)

    async def held_by(self, model: str, pids: Iterable[int]) -> Holding:
        """What *model* holds whose server nobody has placed: what it needs, and what *pids* use where that is more."""
        found, footprints = await self.machine.in_time(lambda: self.machine.used_by(pids)), self.budget.footprints
        if found is None:
            return self.budget.place(model, {}) or NOTHING
        used = {device: size for device, size in found.items() if device in self.budget.sizes}
        ways = footprints.need(model).holdings
        if not ways and not footprints.trusts_measurement:
            return dict(self.budget.sizes)  # nobody knows, so it may be all
        # Of several ways that on which most is used; where nothing tells, the first.
        need = max(ways, key=lambda way: sum(min(size, used.get(name, 0)) for name, size in way.items()), default={})
        return self.budget.reserve({name: max(need.get(name, 0), used.get(name, 0)) for name in {**need, **used}})

    async def wait_returned(self, look: Look) -> None:
        """Return when GPUs have back what an ended server used at the last *look*, or after `RETURN_WAIT` seconds.

        What others had who have ended since is to be back as well, or theirs would be taken for this one's.
        """
        self._ended.update(look.used)

        def given_back() -> dict[str, int]:
            return {device: self._ended[device] - look.ended.get(device, 0) for device in look.used}

        with trio.move_on_after(RETURN_WAIT) as late:
            await wait_returned(self.machine, look.free, given_back)
        if late.cancelled_caught:
            logger.warning("memory was not given back within %g s: %s", RETURN_WAIT, dict(look.used))

    async def watch_others(
        self,
        pids: Callable[[], Iterable[int]],
        report: Callable[[Holding], None],
        unseen: Callable[[], Holding] = lambda: NOTHING,
    ) -> None:
        """Report what there is for models whenever other programs have taken some of it or given it back; for ever.

        What is reserved for programs whose processes we do not see (servers in containers, borrowers)
        comes from *unseen*: it is theirs, and not taken a second time by using it.
        """
        self._told = dict(self.budget.sizes)
        while self.config.yield_to_others:
            config, sizes = self.config, await self._left_by_others(pids, unseen)
            # Under another configuration what it left has been given back, and this was seen before.
            if config is self.config and sizes is not None and sizes != self._told:
                self._told = sizes
                report(sizes)
            await trio.sleep(FOREIGN_LOOK)

    async def _left_by_others(
        self, pids: Callable[[], Iterable[int]], unseen: Callable[[], Holding]
    ) -> dict[str, int] | None:
        family = frozenset(pids())
        found = await self.machine.in_time(lambda: (self.machine.free(), self.machine.used_by(family)))
        # Who has started meanwhile is one of ours, too; that it has grown since errs on the safe side.
        newcomers = frozenset(pids()) - family
        more = await self.machine.in_time(lambda: self.machine.used_by(newcomers)) if found and newcomers else {}
        if found is None or more is None:
            return None
        (free, ours), hidden = found, unseen()
        left = {
            device: max(
                0,
                size + ours.get(device, 0) + more.get(device, 0) + hidden.get(device, 0) - self.config.headroom,
            )
            for device, size in free.items()
        }
        usable = usable_sizes(self.config, self.machine)
        return {device: min(size, left.get(device, size)) for device, size in usable.items()}


def make_memory(config: Config, machine: Machine | None = None) -> Memory | None:
    """The budget that *config* asks for; None where memory is not in play.

    Looks at *machine* (None: this one) and at model files, which may take seconds: call it in a thread.
    """
    if config.memory is None:
        return None
    machine = machine or Machine()
    machine.discover()
    sizes = usable_sizes(config.memory, machine)
    _tell_of_absent(config, machine, sizes)
    wishes = {name: _wish(model, sizes) for name, model in config.models.items()}
    footprints = Footprints(tuple(sizes), wishes, trusts_measurement=_trusts(config.memory, machine))
    return Memory(config.memory, machine, Budget(sizes, footprints))


def _trusts(config: MemoryConfig, machine: Machine) -> bool:
    return config.learn and not machine.unmeasured


def usable_sizes(config: MemoryConfig, machine: Machine) -> dict[str, int]:
    """Bytes of each device that models may use, GPUs first: what is said or found, without the headroom."""
    found = {device.name: device.total for device in machine.devices}
    said = config.devices if config.devices is not None else dict.fromkeys(found)
    sizes = {name: found.get(name, 0) if size is None else size for name, size in said.items()}
    return {name: max(0, sizes[name] - config.headroom) for name in sorted(sizes, key=lambda name: name == RAM)}


def _tell_of_absent(config: Config, machine: Machine, sizes: Mapping[str, int]) -> None:
    """Say which devices the configuration speaks of that are not there: no such model will ever fit."""
    there = ", ".join(device.name for device in machine.devices) or "nothing"
    for name, size in sizes.items():
        if not size:
            logger.warning("memory.devices: nothing is left of %s for models, found on this machine: %s", name, there)
    for model in config.models.values():
        named: Iterable[str | None] = model.memory if isinstance(model.memory, Mapping) else [model.device]
        for device in named:
            if device not in (None, AUTO, *sizes):
                logger.warning("model=%s wants memory of %s, found on this machine: %s", model.name, device, there)


def _wish(model: ModelConfig, sizes: Mapping[str, int]) -> Wish:
    said = llama_arguments(model.argv)
    device = model.device
    if device is None and said.gpu_layers == 0 and RAM in sizes:
        device = RAM
    return Wish(model.memory, device, _guess(model) if model.memory is None else None)


def _guess(model: ModelConfig) -> int | None:
    """Bytes that the server of *model* needs, as far as its command line and files tell."""
    said = llama_arguments(model.argv)
    if said.model is None:
        return None
    try:
        size = sum(Path(name).stat().st_size for name in split_files(said.model))
        guess = estimate(
            _header(Path(said.model)),
            size,
            context=said.context,
            parallel=said.parallel,
            cache_k=said.cache_k,
            cache_v=said.cache_v,
            ubatch=said.ubatch,
        )
        more = [Path(name).stat().st_size for name in (said.mmproj, said.draft) if name is not None]
    except (OSError, ValueError) as exc:
        logger.info("nothing can be guessed of the memory that model=%s needs: %s", model.name, exc)
        return None
    return guess + sum(more)


def _header(path: Path) -> Header:
    with path.open("rb") as file:
        data = file.read(_HEADER)
        while isinstance(header := read_header(data), Incomplete):
            more = file.read(max(header.needed - len(data), len(data)))
            if not more:
                raise ValueError("the file ends within its header")
            data += more
    return header
