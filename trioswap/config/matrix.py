"""The matrix: which models may be resident together, written as small expressions.

This reads the language and the names in it (core reference 1.12).  Who must go for whom is
decided in `residency.matrix`; that a cost is a whole number and an expression a text is
judged before.

    expression = term { "|" term }              one of them: alternatives
    term       = atom { "&" atom }              all of them: together; binds tighter than "|"
    atom       = NAME | "+" SET | "(" expression ")"

NAME is a var or, failing that, a model; "+" right before a name stands for what that other
set allows.  Names are of Unicode letters, decimal digits, `_`, `-` and `.`; a model with
another name needs a var.  White space between them means nothing.

What a set allows is a family of combinations: a model alone is one combination, "|" puts
families side by side, "&" unites each combination of its left side with each of its right.
Whoever may be resident in a combination may also be resident with fewer of it.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Collection, Container, Iterable, Iterator, Mapping
from typing import Final

import attrs

from trioswap.config.mistakes import Mistakes, found, quoted, shown

# What putting out a model costs that has no evict_cost (core reference 1.12).
DEFAULT_COST: Final = 1

_VARS: Final = ("matrix", "vars")
_COSTS: Final = ("matrix", "evict_costs")
_SETS: Final = ("matrix", "sets")

_VAR_NAME: Final = re.compile(r"[A-Za-z0-9.-]{1,32}")
_STRENGTH: Final = {"(": 0, "|": 1, "&": 2}
# A circle of more sets is shown by its ends.
_SHOWN_STEPS: Final = 6

_AN_ATOM: Final = 'a var, a model, "+" with the name of a set, or "("'
_A_CHARACTER: Final = 'letters, digits, "_", "-" and "." in names (other models need a var), "&", "|", "+", "(" and ")"'


# ---- what is read -------------------------------------------------------------------------


@attrs.frozen
class Member:
    """A leaf of an expression: one model."""

    model: str


@attrs.frozen
class Reference:
    """A leaf of an expression: what another set allows."""

    set_name: str


class Operator(enum.Enum):
    """Joins the two operands before it."""

    AND = "&"
    OR = "|"


Expression = tuple[Member | Reference | Operator, ...]
"""In postfix order: `a & (b | c)` is a b c | &.

Flat, not a tree, so that no depth of an expression exhausts the stack of whoever compares,
prints or walks it.
"""


@attrs.frozen
class MatrixSet:
    """One entry of `matrix.sets`."""

    name: str
    source: str
    """The expression as written."""
    expression: Expression
    """Its models are real names: vars are replaced."""


@attrs.frozen
class MatrixConfig:
    """The matrix of a configuration; every model and set it mentions exists."""

    sets: tuple[MatrixSet, ...] = ()
    """As written."""
    costs: Mapping[str, int] = attrs.field(factory=dict)
    """model -> what putting it out costs, above 0, no unit; for those that are given."""
    search_order: tuple[str, ...] = ()
    """Names of the sets as they are looked through: as written, but what a set refers to comes before it."""

    def cost(self, model: str) -> int:
        """What putting out *model* costs."""
        return self.costs.get(model, DEFAULT_COST)


def read_matrix(
    variables: Mapping[str, str],
    evict_costs: Mapping[str, int],
    sets: Mapping[str, str],
    models: Collection[str],
    mistakes: Mistakes,
) -> MatrixConfig:
    """The matrix meant by the tables `vars`, `evict_costs` and `sets`, for these *models*.

    All that is wrong goes to *mistakes*, under the path `matrix`; the result is then what
    is left of the matrix, and must not be used.  One mistake makes no second: names that
    *mistakes* knows already are not called unknown.
    """
    reader = _Reader(variables, sets, models, mistakes)
    reader.check_variables()
    parsed = {name: reader.parse(name, text) for name, text in sets.items()}
    if not sets and not mistakes.touch(_SETS):
        mistakes.add(_SETS, "found no set, allowed is at least one")
    expressions: dict[str, Expression] = {}
    for name in reader.order(parsed):
        expression = reader.expression(parsed[name], expressions)
        if expression is not None and not mistakes.about((*_SETS, name)):
            expressions[name] = expression
    return MatrixConfig(
        sets=tuple(MatrixSet(name, text, expressions[name]) for name, text in sets.items() if name in expressions),
        costs=reader.costs(evict_costs),
        search_order=tuple(expressions),
    )


# ---- names --------------------------------------------------------------------------------


@attrs.frozen
class _Token:
    """A piece of an expression: a name, "+" with a name, an operator or a parenthesis."""

    text: str
    source: str
    """The whole expression."""
    position: int
    """Where in it the token begins, from 0."""

    @property
    def place(self) -> str:
        """The same for people."""
        return _place(self.source, self.position)

    @property
    def is_operator(self) -> bool:
        return self.text in ("&", "|")

    @property
    def is_reference(self) -> bool:
        return self.text.startswith("+")

    @property
    def name(self) -> str:
        """That of the set, var or model."""
        return self.text.removeprefix("+")


@attrs.define(eq=False)
class _Reader:
    """Knows all names that may be meant."""

    variables: Mapping[str, str]
    sets: Mapping[str, str]
    models: Collection[str]
    mistakes: Mistakes

    def check_variables(self) -> None:
        for name, model in self.variables.items():
            if not _VAR_NAME.fullmatch(name):
                text = found(name, 'a name of 1 to 32 letters A to Z, a to z, digits, "." and "-"')
                self.mistakes.add((*_VARS, name), text)
            elif model not in self.models and not self.mistakes.about(("models",)):
                text = found(model, "the name of a model") + self.mistakes.guess(model, self.models)
                self.mistakes.add((*_VARS, name), text)

    def costs(self, evict_costs: Mapping[str, int]) -> dict[str, int]:
        """By model.  Two keys for one model are a mistake, even where they agree: neither is the one that counts."""
        costs: dict[str, int] = {}
        givers: dict[str, str] = {}
        for name, cost in evict_costs.items():
            path = (*_COSTS, name)
            model = self._model(name)
            if cost < 1:
                self.mistakes.add(path, found(cost, "a whole number from 1 up"))
            if model is None:
                if not self._is_known(name):
                    self.mistakes.add(path, self._unknown(name))
            elif model in givers:
                text = f"found a second cost of model {quoted(model)}, besides that of {quoted(givers[model])}"
                self.mistakes.add(path, f"{text}, allowed is one for each model")
            else:
                givers[model], costs[model] = name, cost
        return costs

    def parse(self, set_name: str, text: str) -> list[_Token]:
        """The expression *text* in postfix order; nothing after a mistake of its grammar."""
        path = (*_SETS, set_name)
        try:
            tokens = _postfix(text)
        except ValueError as exc:
            self.mistakes.add(path, str(exc))
            return []
        names: dict[str, _Token] = {}
        for token in tokens:
            names.setdefault(token.text, token)  # a wrong name is told once, where it is first
        if wrong := list(filter(None, map(self._complaint, names.values()))):
            self.mistakes.add(path, "; ".join(wrong))
        return tokens

    def expression(self, tokens: Iterable[_Token], sets: Container[str]) -> Expression | None:
        """The meaning of *tokens*, None where a name means nothing; *sets* are those that can be referred to."""
        meanings = [self._meaning(token, sets) for token in tokens]
        whole = tuple(meaning for meaning in meanings if meaning is not None)
        return whole if len(whole) == len(meanings) else None

    def order(self, parsed: Mapping[str, list[_Token]]) -> list[str]:
        """The sets, each after those it refers to; references are followed from left to right.

        A reference that leads back is a mistake of the set that contains it.
        """
        ordered: dict[str, None] = {}
        for start in parsed:
            # The way from the start to here, each set with its references not yet followed.
            way = {} if start in ordered else {start: iter(parsed[start])}
            while way:
                here, rest = next(reversed(way.items()))
                following = next((token for token in rest if token.is_reference and token.name not in ordered), None)
                if following is None:
                    del way[here]
                    ordered[here] = None
                elif following.name in way:
                    self._lead_back(following, list(way))
                elif following.name in parsed:
                    way[following.name] = iter(parsed[following.name])
        return list(ordered)

    def _lead_back(self, token: _Token, way: list[str]) -> None:
        *_, here = way
        circle = [here, *way[way.index(token.name) :]]
        if len(circle) > _SHOWN_STEPS:
            circle[_SHOWN_STEPS // 2 : -_SHOWN_STEPS // 2] = ["..."]
        text = f"found {shown(token.text)} {token.place}, which leads back here ({' -> '.join(circle)})"
        self.mistakes.add((*_SETS, here), f"{text}, allowed are references that come to an end")

    def _meaning(self, token: _Token, sets: Container[str]) -> Member | Reference | Operator | None:
        if token.is_operator:
            return Operator(token.text)
        if token.is_reference:
            return Reference(token.name) if token.name in sets else None
        model = self._model(token.name)
        return None if model is None else Member(model)

    def _complaint(self, token: _Token) -> str | None:
        """What is wrong with the name in *token*."""
        if token.is_operator:
            return None
        if not token.is_reference:
            return None if self._is_known(token.name) else self._unknown(token.name, f" {token.place}")
        if token.name in self.sets or self.mistakes.about((*_SETS, token.name)):
            return None
        hint = self.mistakes.guess(token.name, self.sets)
        return f'found {shown(token.text)} {token.place}, allowed is "+" with the name of a set{hint}'

    def _unknown(self, name: str, place: str = "") -> str:
        hint = self.mistakes.guess(name, [*self.variables, *self.models])
        return f"found {shown(name)}{place}, allowed is the name of a var or of a model{hint}"

    def _model(self, name: str) -> str | None:
        """The model that *name* stands for, as a var or else by itself."""
        model = self.variables.get(name, name)
        return model if model in self.models else None

    def _is_known(self, name: str) -> bool:
        """Whether *name* can be used, or why it cannot is known already."""
        known = name in self.variables or name in self.models
        return known or self.mistakes.about((*_VARS, name)) or self.mistakes.about(("models",))


# ---- grammar ------------------------------------------------------------------------------


def _postfix(text: str) -> list[_Token]:
    """The tokens of *text*, operators behind their operands, without parentheses.

    Dijkstra's shunting yard: it needs no recursion.

    Raises:
        ValueError: *text* is no expression; says what was found where and what is allowed.
    """
    output: list[_Token] = []
    held: list[_Token] = []  # operators and "(" that wait for what comes right of them
    expects_atom = True
    for token in _tokens(text):
        if expects_atom != (token.text not in (")", "&", "|")):
            end = '")"' if any(other.text == "(" for other in held) else "the end"
            allowed = _AN_ATOM if expects_atom else f'"&", "|" or {end}'
            raise ValueError(f"found {shown(token.text)} {token.place}, allowed is {allowed}")
        match token.text:
            case "(":
                held.append(token)
            case ")":
                output += _release(held, 1)
                if not held:
                    raise ValueError(f'found ")" {token.place} without its "(", allowed are parentheses in pairs')
                held.pop()
            case "&" | "|":
                output += _release(held, _STRENGTH[token.text])
                held.append(token)
                expects_atom = True
            case _:
                output.append(token)
                expects_atom = False
    if not output and not held:
        raise ValueError(found(text, 'an expression, such as "a & (b | c)"'))
    if expects_atom:
        raise ValueError(f"found the end of the expression, allowed is {_AN_ATOM}")
    output += _release(held, 1)
    if held:
        raise ValueError(f'found "(" {held[-1].place} without its ")", allowed are parentheses in pairs')
    return output


def _release(held: list[_Token], strength: int) -> Iterator[_Token]:
    """Those last held that bind at least so strongly, taken away."""
    while held and _STRENGTH[held[-1].text] >= strength:
        yield held.pop()


def _tokens(text: str) -> Iterator[_Token]:
    position = 0
    while position < len(text):
        char, start = text[position], position
        position += 1
        if char.isspace():
            continue
        if char == "+" or _is_of_name(char):
            while position < len(text) and _is_of_name(text[position]):
                position += 1
        token = _Token(text[start:position], text, start)
        if token.text == "+":
            raise ValueError(f'found "+" {token.place}, allowed is "+" with the name of a set right behind it')
        if not _is_of_name(char) and char not in "+&|()":
            raise ValueError(f"found {shown(char)} {token.place}, allowed are {_A_CHARACTER}")
        yield token


def _is_of_name(char: str) -> bool:
    """Unicode's categories L and Nd, and three more; `isalnum` would let in fractions and superscripts."""
    return char.isalpha() or char.isdecimal() or char in "_-."


def _place(text: str, position: int) -> str:
    """Where *position* is, counted from 1; the line where there are several."""
    before = text[:position]
    column = f"column {position - before.rfind(chr(10))}"
    return f"at line {before.count(chr(10)) + 1}, {column}" if "\n" in text else f"at {column}"
