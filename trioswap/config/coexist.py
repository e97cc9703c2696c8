"""Who can be resident beside whom, as far as groups and a matrix say it.

What memory allows shows when models run, so it keeps nobody apart here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Final

import attrs

from trioswap.config.matrix import Expression, MatrixConfig, Member, Operator, Reference
from trioswap.config.mistakes import quoted
from trioswap.config.schema import Config, GroupConfig

# Pieces of combinations that are looked at for one part of an expression.  A few models come
# to a few dozen; what is hard to find out is allowed, for no configuration may hang its reader.
_MOST_PIECES: Final = 64


@attrs.frozen
class Coexistence:
    """Answers for the groups and the matrix of one configuration."""

    group_of: Mapping[str, GroupConfig]
    matrix: MatrixConfig | None

    @classmethod
    def of(cls, config: Config) -> Coexistence:
        """Those of *config*."""
        return cls({member: group for group in config.groups for member in group.members}, config.matrix)

    def obstacle(self, models: Sequence[str]) -> str | None:
        """Why *models* can never all be resident together, to follow their noun; None: they can.

        For groups, pairs are all there is to it: an order in which all come, so that
        nobody puts out another, exists when it exists for each two (first the members of
        groups that are exclusive, and of those first the persistent ones).
        """
        return self._obstacle_of_groups(models) or self._obstacle_of_matrix(models)

    def _obstacle_of_groups(self, models: Sequence[str]) -> str | None:
        first: dict[str, str] = {}  # group -> its first model
        for model in models:
            group = self.group_of.get(model)
            if group is not None and first.setdefault(group.name, model) != model and group.swap:
                return _apart(first[group.name], model)
        for one, other in combinations(first.values(), 2):
            if not groups_coexist(self.group_of[one], self.group_of[other]):
                return _apart(one, other)
        return None

    def _obstacle_of_matrix(self, models: Sequence[str]) -> str | None:
        if self.matrix is None or matrix_allows(self.matrix, models):
            return None
        return f"that no set of the matrix has together ({', '.join(map(quoted, models))})"


def matrix_allows(matrix: MatrixConfig, models: Sequence[str]) -> bool:
    """Whether some combination of *matrix* has all of *models*; one alone may always be resident.

    Combinations are seen through *models* only, as bit masks, and of these only the largest
    count.  Yes, too, where there are too many of them.
    """
    bits = {model: 1 << index for index, model in enumerate(models)}
    wanted = (1 << len(bits)) - 1
    expressions = {entry.name: entry.expression for entry in matrix.sets}
    pieces: dict[str, list[int]] = {}
    for name in matrix.search_order:
        pieces[name] = _pieces(expressions[name], bits, pieces)
        if wanted in pieces[name] or len(pieces[name]) > _MOST_PIECES:
            return True
    return len(bits) < 2


def _pieces(expression: Expression, bits: Mapping[str, int], sets: Mapping[str, list[int]]) -> list[int]:
    """The largest of *bits* that combinations of *expression* have; those of other *sets* are known."""
    stack: list[list[int]] = []
    for part in expression:
        match part:
            case Member(model):
                stack.append([bits.get(model, 0)])
            case Reference(name):
                stack.append(sets[name])
            case Operator.AND | Operator.OR:
                right, left = stack.pop(), stack.pop()
                both = {*left, *right} if part is Operator.OR else {one | other for one in left for other in right}
                stack.append(_largest(both))
                if len(stack[-1]) > _MOST_PIECES:
                    break
    return stack.pop()


def _largest(masks: Iterable[int]) -> list[int]:
    """Those of *masks* of which no other has everything; no more than one too many."""
    kept: list[int] = []
    for mask in sorted(masks, key=int.bit_count, reverse=True):
        if len(kept) <= _MOST_PIECES and not any(mask | other == other for other in kept):
            kept.append(mask)
    return kept


def _apart(one: str, other: str) -> str:
    return f"of which groups never let {quoted(one)} and {quoted(other)} be resident together"


def groups_coexist(one: GroupConfig | None, other: GroupConfig | None) -> bool:
    """Whether members of the two groups can be resident together (core reference 1.11, eviction rule).

    What is resident stays when the newcomer's group is not exclusive, or its own is
    persistent; either may be the newcomer.  Models in no group (None) are in nobody's way.
    """
    if one is None or other is None:
        return True
    if one is other:
        return not one.swap
    return any(not new.exclusive or old.persistent for new, old in ((one, other), (other, one)))
