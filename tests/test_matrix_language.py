"""The matrix language: what expressions mean, and every mistake by its words."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trioswap.config.matrix import MatrixConfig, MatrixSet, Member, Operator, Reference, read_matrix
from trioswap.config.mistakes import Mistakes

AND, OR = Operator.AND, Operator.OR
DEEP = 10_000  # far beyond any recursion limit


def read(sets, models="abcd", variables=None, evict_costs=None) -> MatrixConfig:
    """The matrix, in which nothing may be wrong."""
    mistakes = Mistakes()
    config = read_matrix(variables or {}, evict_costs or {}, sets, models, mistakes)
    assert mistakes.lines() == []
    return config


def wrong(sets, models="abcd", variables=None, evict_costs=None) -> list[str]:
    """What is wrong with a matrix, one line for each mistake."""
    mistakes = Mistakes()
    read_matrix(variables or {}, evict_costs or {}, sets, models, mistakes)
    return mistakes.lines()


def said(text: str) -> str:
    """The mistake in the only set, whose expression is *text*."""
    [line] = wrong({"s": text})
    return line.removeprefix("matrix.sets.s: ")


def postfix(text: str, models="abcd", variables=None) -> str:
    """The expression of the only set in short: a letter for each leaf and operator."""
    [only] = read({"s": text}, models, variables).sets
    return "".join(step.model if isinstance(step, Member) else step.value for step in only.expression)


# ---- what expressions mean ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("a", "a"),
        ("a & b", "ab&"),
        ("a | b & c", "abc&|"),
        ("a & b | c", "ab&c|"),
        ("a & (b | c)", "abc|&"),
        ("a & b & c", "ab&c&"),
        ("a | b | c", "ab|c|"),
        ("(a | b) & (c | d)", "ab|cd|&"),
        ("((a))", "a"),
        ("a & a", "aa&"),
    ],
)
def test_and_binds_tighter_and_both_group_from_the_left(text, meaning):
    """Operands keep their order, since it decides ties."""
    assert postfix(text) == meaning


@pytest.mark.parametrize("text", ["a&(b|c)", " a & ( b | c ) ", "\ta\n&\r\n(b|\u00a0c)\n"])
def test_white_space_between_tokens_means_nothing(text):
    """Line ends and Unicode's spaces included."""
    assert postfix(text) == "abc|&"


def test_a_set_keeps_its_name_its_text_and_its_order():
    """Sets stay as they are written, in the order they are written in."""
    config = read({"z": "a", "y": "+z & b", "10": "c", "9": "d"})

    assert config.sets == (
        MatrixSet("z", "a", (Member("a"),)),
        MatrixSet("y", "+z & b", (Reference("z"), Member("b"), AND)),
        MatrixSet("10", "c", (Member("c"),)),
        MatrixSet("9", "d", (Member("d"),)),
    )
    assert config.search_order == ("z", "y", "10", "9")


def test_a_set_is_looked_through_after_those_it_refers_to():
    """References are followed from left to right; all else stays as written."""
    config = read({"top": "+right | a | +left", "left": "+low", "other": "b", "right": "+low", "low": "c"})

    assert config.search_order == ("low", "right", "left", "top", "other")
    assert [item.name for item in config.sets] == ["top", "left", "other", "right", "low"]


def test_vars_stand_for_models_and_hide_them():
    """A name is a var first, and a model only then."""
    variables = {"v-1": "org/m:7b", "a": "b"}

    assert postfix("v-1 & a", ("org/m:7b", "a", "b"), variables) == "org/m:7bb&"


@pytest.mark.parametrize("name", ["modèle", "模型", "٣", "_", "-", ".", "qwen3-4b.Q4_K_M", "ǅ", "ªʰ"])
def test_names_are_of_unicode_letters_decimal_digits_and_three_more(name):
    """They need no var."""
    assert read({"s": f"{name}&+t", "t": name}, [name]).sets[1].expression == (Member(name),)


def test_a_set_name_can_be_anything_but_not_everything_can_be_referred_to():
    """Set names are not judged."""
    assert [item.name for item in read({"my set!": "a", "": "b"}).sets] == ["my set!", ""]


def test_costs_are_by_model_and_1_where_not_given():
    """A key may be a var or a model."""
    config = read({"s": "a"}, variables={"v": "a", "w": "b"}, evict_costs={"v": 7, "c": 3})

    assert config.costs == {"a": 7, "c": 3}
    assert [config.cost(model) for model in "abcd"] == [7, 1, 3, 1]


def test_a_cost_key_is_a_var_first():
    """As in expressions."""
    assert read({"s": "a"}, variables={"a": "b"}, evict_costs={"a": 2}).costs == {"b": 2}


# ---- depth ----------------------------------------------------------------------------------


def test_no_depth_of_an_expression_is_too_deep():
    """Ten thousand parentheses, and as many operators that do not collapse; also to print and compare."""
    assert postfix("(" * DEEP + "a" + ")" * DEEP) == "a"
    nested = "a & (b | (" * DEEP + "c" + "))" * DEEP

    [only] = read({"s": nested}).sets

    assert len(only.expression) == 4 * DEEP + 1
    assert only == read({"s": nested}).sets[0]
    assert repr(only).endswith(")")
    assert hash(only) == hash(read({"s": nested}).sets[0])


def test_no_chain_of_sets_is_too_long():
    """Written from the top, so that each set is there before what it refers to."""
    sets = {f"s{number}": f"+s{number + 1}" for number in range(DEEP)} | {f"s{DEEP}": "a"}

    order = read(sets).search_order

    assert order == tuple(f"s{number}" for number in range(DEEP, -1, -1))


def test_a_long_circle_is_told_by_its_ends():
    """One line stays one line."""
    sets = {f"s{number}": f"+s{(number + 1) % DEEP}" for number in range(DEEP)}

    [line] = wrong(sets)
    circle = "s9999 -> s0 -> s1 -> ... -> s9997 -> s9998 -> s9999"
    assert line.startswith(f'matrix.sets.s9999: found "+s0" at column 1, which leads back here ({circle}), ')


# ---- mistakes of the grammar ----------------------------------------------------------------

ATOM = 'a var, a model, "+" with the name of a set, or "("'
PAIRS = "allowed are parentheses in pairs"
CHARACTERS = 'letters, digits, "_", "-" and "." in names (other models need a var), "&", "|", "+", "(" and ")"'


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ("", 'found "", allowed is an expression, such as "a & (b | c)"'),
        (" \n", 'found " \\n", allowed is an expression, such as "a & (b | c)"'),
        ("a &", f"found the end of the expression, allowed is {ATOM}"),
        ("(", f"found the end of the expression, allowed is {ATOM}"),
        ("()", f'found ")" at column 2, allowed is {ATOM}'),
        ("& a", f'found "&" at column 1, allowed is {ATOM}'),
        ("a && b", f'found "&" at column 4, allowed is {ATOM}'),
        ("a | & b", f'found "&" at column 5, allowed is {ATOM}'),
        ("(a |) & b", f'found ")" at column 5, allowed is {ATOM}'),
        ("a b", 'found "b" at column 3, allowed is "&", "|" or the end'),
        ("(a b)", 'found "b" at column 4, allowed is "&", "|" or ")"'),
        ("a (b)", 'found "(" at column 3, allowed is "&", "|" or the end'),
        ("a+b", 'found "+b" at column 2, allowed is "&", "|" or the end'),
        ("(a & (b | c)", f'found "(" at column 1 without its ")", {PAIRS}'),
        ("a & ((b | c)", f'found "(" at column 5 without its ")", {PAIRS}'),
        ("a & b) | c", f'found ")" at column 6 without its "(", {PAIRS}'),
        ("a & + b", 'found "+" at column 5, allowed is "+" with the name of a set right behind it'),
        ("+", 'found "+" at column 1, allowed is "+" with the name of a set right behind it'),
        ("++a", 'found "+" at column 1, allowed is "+" with the name of a set right behind it'),
        ("org/a", f'found "/" at column 4, allowed are {CHARACTERS}'),
        ("a & b²", f'found "²" at column 6, allowed are {CHARACTERS}'),
        ("a\u0301", f'found "\u0301" at column 2, allowed are {CHARACTERS}'),
        ("a &\n  b c", 'found "c" at line 2, column 5, allowed is "&", "|" or the end'),
        ("a &\n!", f'found "!" at line 2, column 1, allowed are {CHARACTERS}'),
        ("a!\n", f'found "!" at line 1, column 2, allowed are {CHARACTERS}'),
    ],
)
def test_mistakes_of_the_grammar(text, mistake):
    """Each says what was found where, counted from 1, and what is allowed."""
    assert said(text) == mistake


def test_deep_mistakes_are_mistakes():
    """However deep, it is told and nothing breaks."""
    assert said("(" * DEEP) == f"found the end of the expression, allowed is {ATOM}"
    assert said("(" * DEEP + "a" + ")" * (DEEP - 1)) == f'found "(" at column 1 without its ")", {PAIRS}'
    assert said("a" + ")" * DEEP) == f'found ")" at column 2 without its "(", {PAIRS}'


@settings(derandomize=True, deadline=None, max_examples=500)
@given(st.text(alphabet="ab+x()&| \n-²/", max_size=12))
def test_any_text_is_an_expression_or_one_mistake(text):
    """Nothing else comes out, and a good one has one operator less than leaves."""
    mistakes = Mistakes()
    config = read_matrix({}, {}, {"s": text, "x": "a"}, "ab", mistakes)
    names = [item.name for item in config.sets]

    assert len(mistakes.lines()) == ("s" not in names)
    if "s" in names:
        leaves = [not isinstance(step, Operator) for step in config.sets[0].expression]
        assert leaves.count(True) == leaves.count(False) + 1


# ---- mistakes of names ----------------------------------------------------------------------


def test_unknown_names_are_told_all_at_once():
    """Each once, where it is first, with what may have been meant."""
    lines = wrong({"s": "qwem & x | llama & qwem & +t", "t": "lama"}, ["qwen", "gemma"], {"llama": "gemma"})

    allowed = "allowed is the name of a var or of a model"
    assert lines == [
        f'matrix.sets.s: found "qwem" at column 1, {allowed}, did you mean "qwen"?; found "x" at column 8, {allowed}',
        f'matrix.sets.t: found "lama" at column 1, {allowed}, did you mean "llama"?',
    ]


def test_undefined_sets():
    """A set is no model, and a model no set."""
    lines = wrong({"large": "a & +larg", "s": "+a | large"})

    allowed = 'allowed is "+" with the name of a set'
    model = 'found "large" at column 6, allowed is the name of a var or of a model'
    assert lines == [
        f'matrix.sets.large: found "+larg" at column 5, {allowed}, did you mean "large"?',
        f'matrix.sets.s: found "+a" at column 1, {allowed}; {model}',
    ]


def test_circles():
    """Told where the circle closes; who only leads into it is not to blame."""
    allowed = "allowed are references that come to an end"

    assert wrong({"s": "a | +s"}) == [
        f'matrix.sets.s: found "+s" at column 5, which leads back here (s -> s), {allowed}'
    ]
    assert wrong({"in": "+x", "x": "a & +y", "y": "b | +x", "z": "+z"}) == [
        f'matrix.sets.y: found "+x" at column 5, which leads back here (y -> x -> y), {allowed}',
        f'matrix.sets.z: found "+z" at column 1, which leads back here (z -> z), {allowed}',
    ]


def test_a_set_reached_on_two_ways_is_no_circle():
    """Sharing is what references are for."""
    assert read({"s": "+l & +r & +l", "l": "+x", "r": "+x", "x": "a"}).search_order == ("x", "l", "r", "s")


def test_a_matrix_needs_a_set():
    """Without one, no two models would ever be together."""
    assert wrong({}) == ["matrix.sets: found no set, allowed is at least one"]


@pytest.mark.parametrize("name", ["", "a_b", "a b", "x" * 33, "modèle", "a/b", "a\n"])
def test_bad_names_of_vars(name):
    """They are narrower than names of models."""
    [line] = wrong({"s": "a"}, variables={name: "b"})

    assert line.startswith("matrix.vars.")
    assert line.endswith(', allowed is a name of 1 to 32 letters A to Z, a to z, digits, "." and "-"')


def test_use_of_a_bad_var_is_no_second_mistake():
    """It is told where it is made."""
    [line] = wrong({"s": "a & a_b"}, variables={"a_b": "b"})

    assert line.startswith("matrix.vars.a_b: ")


def test_names_of_vars_at_their_limits():
    """One character and 32 of them."""
    assert read({"s": "a"}, variables={"9": "a", "-.": "a", "xY" * 16: "a"})


def test_a_var_of_no_model():
    """Told at the var, not where it is used."""
    lines = wrong({"s": "v & a", "t": "+s"}, ["a", "gemma"], {"v": "gema"}, {"v": 3})

    assert lines == ['matrix.vars.v: found "gema", allowed is the name of a model, did you mean "gemma"?']


@pytest.mark.parametrize("cost", [0, -1])
def test_costs_begin_at_1(cost):
    """With 0 or less the cheapest would not be the fewest."""
    lines = wrong({"s": "a"}, evict_costs={"a": cost})

    assert lines == [f"matrix.evict_costs.a: found {cost}, allowed is a whole number from 1 up"]


def test_costs_of_nobody():
    """A key must be a var or a model."""
    lines = wrong({"s": "a"}, ["a", "gemma"], evict_costs={"gema": 2, "b": 2})

    assert lines == [
        'matrix.evict_costs.b: found "b", allowed is the name of a var or of a model',
        'matrix.evict_costs.gema: found "gema", allowed is the name of a var or of a model, did you mean "gemma"?',
    ]


def test_two_costs_for_one_model():
    """Whether by a var and the model or by two vars, and even if they agree: which one counts would be luck."""
    variables = {"v": "a", "w": "a", "x": "b"}

    lines = wrong({"s": "a"}, variables=variables, evict_costs={"v": 2, "a": 3, "x": 1, "w": 2})

    assert lines == [
        'matrix.evict_costs.a: found a second cost of model "a", besides that of "v", allowed is one for each model',
        'matrix.evict_costs.w: found a second cost of model "a", besides that of "v", allowed is one for each model',
    ]


def test_mistakes_of_all_tables_come_together():
    """One run is enough to repair the whole matrix."""
    lines = wrong({"s": "a &", "t": "u"}, variables={"v v": "a", "w": "?"}, evict_costs={"q": 1, "a": 0})

    assert [line.partition(": ")[0] for line in lines] == [
        "matrix.evict_costs.a",
        "matrix.evict_costs.q",
        "matrix.sets.s",
        "matrix.sets.t",
        'matrix.vars."v v"',
        "matrix.vars.w",
    ]


@pytest.mark.parametrize(
    "known", [("matrix", "vars", "v"), ("matrix", "vars"), ("matrix", "sets", "t"), ("matrix", "sets"), ("models",)]
)
def test_what_is_known_to_be_wrong_is_not_called_unknown(known):
    """What the reader of the file took out because of a mistake is missed by nobody."""
    mistakes = Mistakes()
    mistakes.add(known, "bad")
    uses = {"vars": "v", "sets": "+t"}.get(known[-2] if len(known) == 3 else known[-1], "nobody")

    config = read_matrix({}, {}, {"s": f"a & {uses}", "ok": "a"}, "a", mistakes)

    assert len(mistakes.lines()) == 1
    assert "s" not in config.search_order


def test_sets_that_were_all_taken_out_are_not_missed():
    """There was a set, however wrong."""
    mistakes = Mistakes()
    mistakes.add(("matrix", "sets", "s"), "bad")

    assert read_matrix({}, {}, {}, "a", mistakes) == MatrixConfig()
    assert mistakes.lines() == ["matrix.sets.s: bad"]
