"""What each model needs of each device, and how we come to believe it.

Three sources, in order of trust: what the user declared, the peak that earlier runs reached,
what the model's file suggests.  Who may be resident beside whom is the business of
`residency.budget`; measuring, and keeping on disk what was learned, are that of others.

The rules:

* What is declared is the user's word.  It is kept when less is measured, because nobody
  knows what the user allows for (longer prompts, more of them at once); it is exceeded when
  more is measured, because memory that is used is used whatever was declared.
* A higher peak counts at once; a lower one, at the end of a run, takes back a tenth of the
  difference.  So after one high peak of long ago 22 ordinary runs are needed to forget nine
  tenths of it, and a model with two habits is prepared for the larger.
* A start that failed for want of memory asks for a quarter more next time, declared or not.
  Each run that got by with less takes back a tenth of the difference, as with peaks: room that
  nobody needs is lost to the others, and a failure of long ago may have had another reason.
* What was learned on one GPU holds for every other as long as the device is a free choice.
  A model that uses several GPUs, or another than it was sent to, has no choice: what was
  learned then names its devices.

What was learned belongs to one command line.  Who restores it checks that it is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, TypedDict

import attrs

from trioswap.residency import NOTHING, Holding

RAM: Final = "ram"
"""The name of host memory; every other device is a GPU."""

_FORGETTING: Final = 10  # a lower peak takes back one part in so many of the difference
_RAISE: Final = (5, 4)  # what a start asks for after one that ran out of memory, times that one's holding


@attrs.frozen
class Wish:
    """What is known of a model without having run it."""

    declared: int | Mapping[str, int] | None = None
    """Bytes on one device, or on each of those named; None: the user did not say."""
    device: str | None = None
    """Where amounts without a device go; None or "auto": any GPU, or host memory where there is no GPU."""
    estimate: int | None = None
    """Bytes on one device, guessed from the model's file."""


@attrs.frozen
class Need:
    """What a model needs: one of *holdings*."""

    holdings: tuple[Holding, ...] = ()
    """Equally good, in the order of the devices.  Empty: not known, it needs the machine for itself."""
    source: str = "unknown"
    """`declared`, `learned`, `estimated` or `unknown`."""
    declared: tuple[Holding, ...] = ()
    """The same before measurements and failures raised it: all that the user answers for.  Empty unless declared."""
    note: str = ""
    """Why it is not what its source says; for people."""


class Record(TypedDict):
    """What was learned of one model, as plain values to be kept."""

    peak: dict[str, int]
    """device -> bytes.  Unless *fixed*, the first GPU stands for the one of choice."""
    grown: dict[str, int]
    """The least to ask for after running out of memory: device -> bytes."""
    fixed: bool
    """It uses the devices named, whatever it is sent to."""


@attrs.frozen
class _Learned:
    peak: Holding = NOTHING
    grown: Holding = NOTHING
    fixed: bool = False


@attrs.define(eq=False)
class Footprints:
    """What is known of each model's need; it grows with `measured` and `ran_out`."""

    devices: tuple[str, ...]
    """The names of the devices in order of preference, GPUs first."""
    wishes: Mapping[str, Wish]
    """model -> what is known beforehand; the models there are."""
    trusts_measurement: bool = True
    """False where an accelerator is present that nobody can measure: peaks are neither learned nor used."""
    _learned: dict[str, _Learned] = attrs.field(factory=dict, init=False)
    _needs: dict[str, Need] = attrs.field(factory=dict, init=False)
    """Answers of `need` that still hold: it is asked for every waiting model, again and again."""

    def add(self, model: str, wish: Wish) -> None:
        """There is one more model."""
        self.wishes = {**self.wishes, model: wish}

    def remove(self, model: str) -> None:
        """There is one less."""
        self.wishes = {name: wish for name, wish in self.wishes.items() if name != model}
        self._needs.pop(model, None)

    def replace(self, wishes: Mapping[str, Wish], *, trusts: bool) -> None:
        """Other wishes, perhaps of other models; what was learned of a model that is gone is kept for its return."""
        self.wishes, self.trusts_measurement = wishes, trusts
        self._needs.clear()

    def need(self, model: str) -> Need:
        """What *model* needs, as far as is known now.

        Raises:
            KeyError: there is no such model.
        """
        if model not in self._needs:
            self._needs[model] = self._work_out(model)
        return self._needs[model]

    def _work_out(self, model: str) -> Need:
        wish, learned = self.wishes[model], self._known(model)
        home = self._home(wish, learned)
        declared = _at(home, wish.declared)
        if declared:
            amounts, source = _larger(declared, learned.peak), "declared"
        elif learned.peak:
            amounts, source = learned.peak, "learned"
        elif wish.estimate is not None:
            amounts, source = _at(home, wish.estimate), "estimated"
        else:
            return Need()
        movable = _is_free(wish) and not learned.fixed
        needed = _larger(amounts, learned.grown)
        return Need(
            holdings=self._alternatives(needed, movable),
            source=source,
            declared=self._alternatives(declared, movable) if declared else (),
            note=_note(declared, amounts, needed),
        )

    def measured(self, model: str, placed: Holding, peak: Holding, *, so_far: bool = False) -> None:
        """A run of *model* that was placed as *placed* reached *peak*, in bytes on each device.

        To be called once when the run is over.  With *so_far*, as often as you like while it
        goes on: that only raises what is known already, because the peak of a model that is
        still loading says nothing.
        """
        used: Holding = {device: size for device, size in peak.items() if size > 0 and device in self.devices}
        if not used or not self.trusts_measurement:
            return
        free = _is_free(self.wishes[model])
        fixed = free and not self._went_where_sent(placed, used)
        if free and not fixed:
            used = self._on_first(used)
        old = self._learned.get(model, _Learned())
        if old.peak and old.fixed == fixed:
            grown = _follow(old.grown, used, forget=True) if old.grown and not so_far else old.grown
            self._learn(model, attrs.evolve(old, peak=_follow(old.peak, used, forget=not so_far), grown=grown))
        elif not so_far:
            # It has no choice any more, or has one again: old amounts name other devices.
            grown = old.grown if old.fixed == fixed else NOTHING
            self._learn(model, _Learned(used, grown, fixed))

    def ran_out(self, model: str, placed: Holding) -> None:
        """A start of *model* that was placed as *placed* failed for want of memory; the next one asks for more.

        Nothing is learned when it had more than it asked for, as one that was given the
        machine for itself: there is no more to give.
        """
        old = self._learned.get(model, _Learned())
        had = self._on_first(placed) if _is_free(self.wishes[model]) and not old.fixed else placed
        asked = next(iter(self.need(model).holdings), NOTHING)
        if any(size > asked.get(device, 0) for device, size in had.items()):
            return
        times, parts = _RAISE
        grown = {device: -(-size * times // parts) for device, size in had.items()}
        self._learn(model, attrs.evolve(old, grown=_larger(old.grown, grown)))

    def forget(self, model: str) -> None:
        """What was learned of *model* was learned of another one of its name."""
        self._learned.pop(model, None)
        self._needs.pop(model, None)

    def learned(self) -> dict[str, Record]:
        """All that was learned, by model, to be kept for `restore`."""
        return {
            model: Record(peak=dict(known.peak), grown=dict(known.grown), fixed=known.fixed)
            for model, known in sorted(self._learned.items())
        }

    def restore(self, records: Mapping[str, Record]) -> None:
        """Know again what `learned` gave; without models that are gone, and without amounts on devices that are."""
        for model, record in records.items():
            if model in self.wishes and {*record["peak"], *record["grown"]} <= {*self.devices}:
                self._learn(model, _Learned(dict(record["peak"]), dict(record["grown"]), record["fixed"]))

    def _learn(self, model: str, learned: _Learned) -> None:
        self._learned[model] = learned
        self._needs.pop(model, None)

    # ---- devices ---------------------------------------------------------------------------

    @property
    def _gpus(self) -> tuple[str, ...]:
        return tuple(device for device in self.devices if device != RAM)

    def _known(self, model: str) -> _Learned:
        known = self._learned.get(model, _Learned())
        return known if self.trusts_measurement else _Learned(grown=known.grown)

    def _home(self, wish: Wish, learned: _Learned) -> str:
        """Where an amount without a device goes; the first GPU stands for all where there is a choice."""
        if wish.device is not None and not _is_free(wish):
            return wish.device
        if learned.fixed:
            return max(learned.peak, key=lambda device: (device != RAM, learned.peak[device]))
        return next(iter(self._gpus), RAM)

    def _went_where_sent(self, placed: Holding, used: Holding) -> bool:
        gpus = [gpu for gpu in self._gpus if gpu in used]
        return not gpus or (len(gpus) == 1 and gpus[0] in placed)

    def _on_first(self, holding: Holding) -> Holding:
        """*holding* with the first GPU in place of the only one it names."""
        gpus = [gpu for gpu in self._gpus if gpu in holding]
        return _moved(holding, gpus[0], self._gpus[0]) if len(gpus) == 1 else holding

    def _alternatives(self, amounts: Holding, movable: bool) -> tuple[Holding, ...]:
        gpus = [gpu for gpu in self._gpus if gpu in amounts]
        if not movable or len(gpus) != 1:
            return (amounts,)
        return tuple(_moved(amounts, gpus[0], gpu) for gpu in self._gpus)


def _is_free(wish: Wish) -> bool:
    return wish.device in (None, "auto") and not isinstance(wish.declared, Mapping)


def _at(home: str, declared: int | Mapping[str, int] | None) -> Holding:
    if declared is None:
        return NOTHING
    return dict(declared) if isinstance(declared, Mapping) else {home: declared}


def _moved(holding: Holding, old: str, new: str) -> Holding:
    return {new if device == old else device: size for device, size in holding.items()}


def _larger(one: Holding, other: Holding) -> Holding:
    """The larger amount on each device."""
    return {device: max(one.get(device, 0), other.get(device, 0)) for device in {**one, **other}}


def _follow(old: Holding, new: Holding, *, forget: bool) -> Holding:
    """*old*, raised to *new* where that is more, and a little nearer to it where it is less."""
    followed = {}
    for device in {**old, **new}:
        was, now = old.get(device, 0), new.get(device, 0)
        followed[device] = was - (was - now) // _FORGETTING if forget and now < was else max(was, now)
    return followed


def _note(declared: Holding, amounts: Holding, needed: Holding) -> str:
    notes = []
    if declared and amounts != declared:
        notes.append(f"{_text(declared)} declared, but {_text(amounts)} used")
    if needed != amounts:
        notes.append(f"{_text(needed)} after running out of memory")
    return "; ".join(notes)


def _text(holding: Holding) -> str:
    return " + ".join(f"{size / 2**30:.1f} GiB" for size in holding.values())
