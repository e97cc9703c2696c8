"""llama-swap's matrix: what may be resident together is written down, and the cheapest leave.

The language of the sets is read in `config.matrix`.  This finds the combination to load for
a target.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final, NamedTuple

import attrs

from trioswap.config.matrix import MatrixConfig, Member, Operator, Reference
from trioswap.residency import NOTHING, Holding, Offers

# A set can stand for millions of combinations, so it is never written out.  A question concerns
# only the target and the resident models: seen through them, most combinations are equal, or
# one has all that another has.  Costs are above 0, so having more is never worse: the lesser
# combination is dropped, and as a piece of larger ones it may be dropped at once.  Bottom-up
# that leaves a short *front* for each part of an expression.
#
# Two things would still go wrong:
#   - With everybody resident, `(a1 | b1) & (a2 | b2) & ...` has 2 ** n combinations none of
#     which has all of another.  But only a model that stands on both sides of some "&" can
#     meet itself, and has to be known by its bit; of the others it is enough to know what
#     the kept ones are worth.
#   - Of equally cheap combinations the first must win, and what was dropped may have been a
#     piece of it.  So fronts only tell the best cost; then a second walk, from the top, takes
#     each time the first alternative from which that cost can still be reached.
#
# What is left is exponential at worst only in the number of resident models that meet
# themselves, and not in the size of the matrix.


# Answers that are kept: those about 20 models two at a time are 4000 at most.
_KEPT: Final = 4096


@attrs.frozen
class Solution:
    """The answer to one question: whom to evict so that the target can be resident."""

    target: str
    evict: tuple[str, ...]
    """Sorted."""
    set_name: str | None
    """The set that allows it; None: the target is resident already, or in no set and runs alone."""
    combination: frozenset[str]
    """The models that set allows together, resident or not, target included; without a set: who is resident then."""
    cost: int
    """The sum of the costs of the evicted."""
    states: int
    """Pieces of combinations that were looked at: how much work the question was."""

    def __str__(self) -> str:
        """One sentence for people."""
        did = f"evicts {', '.join(self.evict)} (cost {self.cost})" if self.evict else "evicts nobody"
        where = "by no set, resident then:" if self.set_name is None else f"set {self.set_name} allows"
        return f"{self.target} {did}; {where} {', '.join(sorted(self.combination))}"


@attrs.frozen
class Matrix:
    """The rules of the core reference, 1.12.

    For a target that is not resident:
      1. Candidates are all combinations of all sets that contain it.
      2. The cost of one is the sum of the costs of those resident who are not in it.
      3. The cheapest wins; of equally cheap ones the first.
      4. Whoever is resident and not in the winner must go.
      5. A target that is in no set runs alone.
    Candidates come in this order: set by set as written, but what a set refers to before it;
    within a set from left to right, so that `(a | b) & (c | d)` is ac, ad, bc, bd.  A set
    that another refers to is thus looked through by itself, too.
    """

    config: MatrixConfig
    _parts: _Parts = attrs.field(init=False, repr=False, eq=False)
    _beside: dict[str, int] = attrs.field(factory=dict, init=False, repr=False, eq=False)
    """Target -> those that some combination has with it, as bits; found when first asked for."""
    _solved: dict[tuple[str, frozenset[str]], Solution] = attrs.field(factory=dict, init=False, repr=False, eq=False)
    """Answers to the questions of late: the same few are asked again and again."""

    @_parts.default
    def _compile(self) -> _Parts:
        return _compile(self.config)

    def place(self, target: str, resident: Mapping[str, Holding]) -> Holding | None:
        """Nothing, or None where somebody is resident and no combination has all of them and the target."""
        if not all(self._meet(target, name) for name in resident):
            return None
        return None if resident and self.solve(target, resident).evict else NOTHING

    def victims(self, target: str, resident: Mapping[str, Holding], offers: Offers) -> frozenset[str] | None:
        """Whom the rules name; None when one of them cannot go."""
        if any(offers(name) is None for name in resident if not self._meet(target, name)):
            return None  # as the rest would say, only later
        named = self.solve(target, resident).evict
        return None if any(offers(name) is None for name in named) else frozenset(named)

    def domains(self, models: Iterable[str]) -> list[frozenset[str]]:
        """One with all *models*: who is in no set together with a target is in its way."""
        together = frozenset(models)
        return [together] if together else []

    def capacity(self, models: frozenset[str]) -> int:
        """How many of *models* can be resident together, at most.

        An upper bound, because nothing is written out: alternatives count as the larger,
        both sides of "&" as their sum, though never as more than the models they mention.
        """
        wanted = self._parts.mask(models)
        largest: list[int] = []
        for part in self._parts.parts:
            mentioned = (part.support & wanted).bit_count()
            match part.operator:
                case None:
                    largest.append(mentioned)
                case Operator.OR:
                    largest.append(max(largest[part.left], largest[part.right]))
                case Operator.AND:
                    largest.append(min(largest[part.left] + largest[part.right], mentioned))
        return max(1, max((largest[root] for root in self._parts.roots.values()), default=1))

    def _meet(self, target: str, other: str) -> bool:
        """Whether some combination has both of them."""
        if target not in self._beside:
            self._beside[target] = self._parts.beside(target)
        return self._beside[target] & self._parts.bits.get(other, 0) != 0

    def solve(self, target: str, resident: Collection[str]) -> Solution:
        """The winner of the rules, and who must go for it.

        A target that is resident has its place already, whatever the sets say of the others.
        """
        if target in resident:
            return Solution(target, (), None, frozenset(resident), 0, 0)
        question = target, frozenset(resident)
        if question not in self._solved:
            if len(self._solved) >= _KEPT:
                self._solved.clear()
            self._solved[question] = self._work_out(target, resident)
        return self._solved[question]

    def _work_out(self, target: str, resident: Collection[str]) -> Solution:
        costs = {name: self.config.cost(name) for name in resident}
        question = _Question(self._parts, target, costs)
        set_name, needs = question.cheapest()
        combination = frozenset({target}) if set_name is None else self._parts.names(question.first(set_name, needs))
        evict = tuple(sorted(costs.keys() - combination))
        return Solution(target, evict, set_name, combination, sum(costs[name] for name in evict), question.states)


# ---- the sets, compiled -------------------------------------------------------------------


@attrs.frozen
class _Part:
    """A model, or two parts joined."""

    support: int
    """The models it mentions, as bits."""
    operator: Operator | None = None
    """None: a model."""
    left: int = 0
    """Index of a part that stands before it; so is *right*."""
    right: int = 0


@attrs.frozen
class _Parts:
    """All expressions as one list, each part behind those it is made of."""

    bits: Mapping[str, int]
    """model -> its bit; those that are in some set."""
    parts: Sequence[_Part]
    roots: Mapping[str, int]
    """Set -> its part, in the order of the search."""
    meeting: int
    """The models that stand on both sides of some "&": only these can be united with themselves."""

    def mask(self, models: Iterable[str]) -> int:
        """The bits of those *models* that have one."""
        return sum(self.bits[name] for name in set(models) if name in self.bits)

    def beside(self, target: str) -> int:
        """Those that some combination has together with *target*, as bits: who stands across an "&" from it."""
        bit, across = self.bits.get(target, 0), 0
        for part in self.parts:
            if part.operator is Operator.AND and part.support & bit:
                left, right = self.parts[part.left].support, self.parts[part.right].support
                across |= (right if left & bit else 0) | (left if right & bit else 0)
        return across

    def names(self, mask: int) -> frozenset[str]:
        """The models of *mask*."""
        return frozenset(name for name, bit in self.bits.items() if bit & mask)


def _compile(config: MatrixConfig) -> _Parts:
    bits: dict[str, int] = {}
    parts: list[_Part] = []
    leaves: dict[str, int] = {}
    roots: dict[str, int] = {}
    meeting = 0
    expressions = {item.name: item.expression for item in config.sets}
    for name in config.search_order:
        operands: list[int] = []
        for step in expressions[name]:
            match step:
                case Reference():
                    operands.append(roots[step.set_name])
                    continue
                case Member(model) if model in leaves:
                    operands.append(leaves[model])
                    continue
                case Member(model):
                    bits[model] = 1 << len(bits)
                    leaves[model] = len(parts)
                    part = _Part(bits[model])
                case Operator():
                    right, left = operands.pop(), operands.pop()
                    ours, theirs = parts[left].support, parts[right].support
                    part = _Part(ours | theirs, step, left, right)
                    if step is Operator.AND:
                        meeting |= ours & theirs
            operands.append(len(parts))
            parts.append(part)
        [roots[name]] = operands
    return _Parts(bits, parts, roots, meeting)


# ---- one question -------------------------------------------------------------------------


class _State(NamedTuple):
    """What a question sees of a combination; or, as a need, what it asks of one."""

    mask: int
    """The target and the meeting resident models in it, as bits."""
    kept: int
    """The cost of the other resident models in it."""

    def covers(self, other: _State) -> bool:
        return self.mask & other.mask == other.mask and self.kept >= other.kept

    def __or__(self, other: _State) -> _State:
        return _State(self.mask | other.mask, self.kept + other.kept)

    def without(self, other: _State) -> _State:
        """What is left to ask for when *other* is there."""
        return _State(self.mask & ~other.mask, max(0, self.kept - other.kept))


_NOTHING_SEEN: Final = _State(0, 0)


@attrs.define(eq=False)
class _Question:
    """One target among certain resident models."""

    parts: _Parts
    target: str
    costs: Mapping[str, int]
    """Of the resident models."""
    states: int = attrs.field(default=0, init=False)
    _target: int = attrs.field(init=False)
    """Its bit; 0: it is in no set."""
    _weights: dict[int, int] = attrs.field(init=False)
    """bit -> cost of the resident models that are in some set."""
    _exact: int = attrs.field(init=False)
    """The bits that a state has of its own."""
    _fronts: dict[int, list[_State]] = attrs.field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        self._target = self.parts.mask([self.target])
        self._weights = {self.parts.bits[name]: cost for name, cost in self.costs.items() if name in self.parts.bits}
        self._exact = self.parts.meeting & sum(self._weights) | self._target

    def cheapest(self) -> tuple[str | None, frozenset[_State]]:
        """The first set with a cheapest combination, and how those of its combinations look; None: no set."""
        roots = {name: root for name, root in self.parts.roots.items() if self.parts.parts[root].support & self._target}
        self._fill(roots.values())
        set_name, most, looks = None, -1, frozenset[_State]()
        for name, root in roots.items():
            # A combination with the target is covered only by such.
            worths = {state: self._worth(state) for state in self._front(root) if state.mask & self._target}
            if (worth := max(worths.values())) > most:
                set_name, most = name, worth
                looks = frozenset(state for state in worths if worths[state] == worth)
        return set_name, looks

    def first(self, set_name: str, needs: frozenset[_State]) -> int:
        """The first combination of a set that covers one of *needs*, which there must be; as bits.

        Each step looks for the first combination of one part.  Left of "&" that is one which
        something on the right completes; what it does not cover the right side has to.  So no
        need on the way holds a bit that is chosen already, and a part that is met again with
        the same needs would choose the same again.  That keeps the walk short: a need that is
        not empty takes a new model, and with an empty one each part is walked once.
        """
        chosen = 0
        met: set[tuple[int, frozenset[_State]]] = set()
        todo = [(self.parts.roots[set_name], needs, 0)]
        while todo:
            index, needs, before = todo.pop()
            left_of_it = self._view(chosen & ~before)
            needs = _minimal(need.without(left_of_it) for need in needs)
            if (index, needs) in met:
                continue
            met.add((index, needs))
            self.states += len(needs)
            part = self.parts.parts[index]
            match part.operator:
                case None:
                    chosen |= part.support
                case Operator.OR:
                    possible = any(state.covers(need) for state in self._front(part.left) for need in needs)
                    todo.append((part.left if possible else part.right, needs, chosen))
                case Operator.AND:
                    completed = _minimal(need.without(state) for state in self._front(part.right) for need in needs)
                    todo += [(part.right, needs, chosen), (part.left, completed, chosen)]
        return chosen

    def _fill(self, roots: Iterable[int]) -> None:
        """Find the fronts of these parts and of all they are made of."""
        for index in self._concerned(roots):
            part = self.parts.parts[index]
            match part.operator:
                case None:
                    states = [self._view(part.support)]
                case Operator.OR:
                    states = [*self._front(part.left), *self._front(part.right)]
                case Operator.AND:
                    rights = self._front(part.right)
                    states = [left | right for left in self._front(part.left) for right in rights]
            self.states += len(states)
            self._fronts[index] = _maximal(states)

    def _concerned(self, roots: Iterable[int]) -> list[int]:
        """Those parts that mention the target or a resident model, each behind those it is made of."""
        asked = self._target | sum(self._weights)
        found: set[int] = set()
        todo = list(roots)
        while todo:
            index = todo.pop()
            part = self.parts.parts[index]
            if index not in found and part.support & asked:
                found.add(index)
                if part.operator is not None:
                    todo += [part.left, part.right]
        return sorted(found)

    def _front(self, index: int) -> Sequence[_State]:
        """States of which one covers whatever the part allows."""
        return self._fronts.get(index, [_NOTHING_SEEN])

    def _view(self, mask: int) -> _State:
        """What this question sees of the models *mask*."""
        others = mask & ~self._exact
        return _State(mask & self._exact, sum(cost for bit, cost in self._weights.items() if bit & others))

    def _worth(self, state: _State) -> int:
        """The cost of the resident models that stay."""
        return state.kept + sum(cost for bit, cost in self._weights.items() if bit & state.mask)


def _maximal(states: Iterable[_State]) -> list[_State]:
    """Those of *states* that no other covers."""
    result: list[_State] = []
    for state in sorted(set(states), key=_size, reverse=True):
        if not any(other.covers(state) for other in result):
            result.append(state)
    return result


def _minimal(needs: Iterable[_State]) -> frozenset[_State]:
    """Those of *needs* that are met by nothing less: whoever covers another covers one of them."""
    result: list[_State] = []
    for need in sorted(set(needs), key=_size):
        if not any(need.covers(other) for other in result):
            result.append(need)
    return frozenset(result)


def _size(state: _State) -> tuple[int, int]:
    """Larger for whoever covers the other."""
    return state.mask.bit_count(), state.kept
