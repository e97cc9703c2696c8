"""The matrix as a policy: the solver against writing everything out, ties, costs, size."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trioswap.config.matrix import read_matrix
from trioswap.config.mistakes import Mistakes
from trioswap.residency import NOTHING, Offer
from trioswap.residency.matrix import Matrix, Solution

IDLE = Offer(at=0.0, busy=False, cost=1.0)


def matrix(models, costs=None, **sets: str) -> Matrix:
    """The policy of *sets*, in which nothing may be wrong."""
    mistakes = Mistakes()
    config = read_matrix({}, costs or {}, sets, models, mistakes)
    assert mistakes.lines() == []
    return Matrix(config)


def beside(resident) -> dict:
    """Those resident, holding nothing."""
    return dict.fromkeys(resident, NOTHING)


def winner(policy: Matrix, target: str, resident) -> tuple[str, str | None, str]:
    """Who is evicted, by which set, with which combination; for models of one letter."""
    solution = policy.solve(target, resident)
    return "".join(solution.evict), solution.set_name, "".join(sorted(solution.combination))


# ---- the rules --------------------------------------------------------------------------------


def test_whoever_shares_a_combination_with_the_target_stays():
    """The rest goes."""
    policy = matrix("abcd", s="a & b | c & d")

    assert winner(policy, "a", "bcd") == ("cd", "s", "ab")
    assert winner(policy, "a", "b") == ("", "s", "ab")


def test_a_combination_allows_less_of_it():
    """Nobody has to be there for the others."""
    policy = matrix("abc", s="a & b & c")

    assert winner(policy, "a", "c") == ("", "s", "abc")
    assert winner(policy, "a", "") == ("", "s", "abc")


def test_the_first_alternative_is_loaded_into_an_empty_house():
    """All cost nothing then."""
    assert winner(matrix("abc", s="a & (b | c)"), "a", "") == ("", "s", "ab")


def test_a_target_in_no_set_runs_alone():
    """Everybody must go for it, and it for everybody."""
    policy = matrix("abx", s="a & b")

    assert winner(policy, "x", "ab") == ("ab", None, "x")
    assert winner(policy, "a", "bx") == ("x", "s", "ab")
    assert winner(policy, "x", "") == ("", None, "x")


def test_a_resident_target_evicts_nobody():
    """Even if no set covers who is there."""
    assert winner(matrix("abc", s="a & b"), "a", "ac") == ("", None, "ac")


def test_the_cheapest_combination_wins():
    """Costs are summed over those who go, wherever the combination stands."""
    assert winner(matrix("abcde", s="a & b | a & c & d"), "a", "bcd")[0] == "b"
    assert winner(matrix("abcde", {"b": 2}, s="a & c & d | a & b"), "a", "bcd") == ("b", "s", "acd")
    assert winner(matrix("abcde", {"b": 3}, s="a & c & d | a & b"), "a", "bcd") == ("cd", "s", "ab")


def test_a_model_in_no_set_costs_too_but_decides_nothing():
    """It goes in any case."""
    solution = matrix("abx", {"x": 5, "b": 2}, s="a", t="b").solve("a", "bx")

    assert (solution.evict, solution.cost) == (("b", "x"), 7)


def test_the_cost_of_the_target_plays_no_part():
    """It is not evicted."""
    assert winner(matrix("abc", {"a": 100}, s="a & b", t="a & c"), "a", "bc") == ("c", "s", "ab")


# ---- ties: the first in the order of the search -----------------------------------------------


def test_ties_go_to_the_first_set_as_written():
    """Not by name."""
    assert winner(matrix("abc", z="a & b", y="a & c"), "a", "bc") == ("c", "z", "ab")
    assert winner(matrix("abc", y="a & c", z="a & b"), "a", "bc") == ("b", "y", "ac")


def test_ties_go_to_a_set_before_those_that_refer_to_it():
    """It is looked through by itself first, though it is written last."""
    policy = matrix("abcd", top="a & c | +low", mid="a & d", low="a & b")

    assert winner(policy, "a", "bcd") == ("cd", "low", "ab")
    assert winner(policy, "a", "cd") == ("d", "top", "ac")


def test_ties_go_to_the_leftmost_alternative():
    """And the left side of "&" varies last."""
    assert winner(matrix("abc", s="a & (b | c)"), "a", "bc") == ("c", "s", "ab")
    assert winner(matrix("abc", s="a & (c | b)"), "a", "bc") == ("b", "s", "ac")
    # ac, ad, bc, bd: from the left, (a, d) is before (b, c).
    assert winner(matrix("abcdt", s="t & (a | b) & (c | d)"), "t", "ad") == ("", "s", "adt")
    policy = matrix("abcdt", {"a": 1, "b": 2, "c": 2, "d": 3}, s="t & (a | b) & (c | d)")
    assert winner(policy, "t", "abcd") == ("ac", "s", "bdt")
    policy = matrix("abcdt", {"a": 1, "b": 2, "c": 2, "d": 1}, s="t & (a | b) & (c | d)")
    assert winner(policy, "t", "abcd") == ("ad", "s", "bct")


def test_the_first_piece_wins_though_a_larger_one_stands_behind_it():
    """With c on the right, `a` makes ac before `b` makes bc; that `a & c` has more than `a` changes no place."""
    policy = matrix("abct", s="t & (a | b | a & c) & c")

    assert winner(policy, "t", "abc") == ("b", "s", "act")


def test_the_larger_piece_wins_only_from_its_own_place():
    """`b & d` stands before `a & c` and is as good; that `a & c` has all of the first piece changes nothing."""
    policy = matrix("abcdt", s="t & (a | b & d | a & c)")

    assert winner(policy, "t", "abcd") == ("ac", "s", "bdt")


def test_what_the_left_side_keeps_is_not_asked_for_twice():
    """The `y` is worth its place, whatever `x` was worth further left."""
    policy = matrix("nxyzt", s="t & x & ((n | y) & z)")

    assert winner(policy, "t", "xyz") == ("", "s", "txyz")


# ---- the protocol -----------------------------------------------------------------------------


def test_place_is_nothing_or_none():
    """A matrix gives out room, not memory."""
    policy = matrix("abc", s="a & b")

    assert policy.place("a", beside("b")) == NOTHING
    assert policy.place("c", {}) == NOTHING
    assert policy.place("a", beside("c")) is None


def test_victims_are_who_must_go():
    """Whoever offers to go does not have to."""
    assert matrix("abcd", s="a & b").victims("a", beside("bcd"), lambda _: IDLE) == {"c", "d"}
    assert matrix("abcd", s="a & b").victims("a", beside("b"), lambda _: None) == frozenset()


def test_there_is_no_other_choice():
    """When one who must go cannot, others that could do not help."""
    policy = matrix("abc", s="a & b | a & c")
    offers = {"b": IDLE, "c": None}

    assert policy.solve("a", "bc").evict == ("c",)
    assert policy.victims("a", beside("bc"), offers.__getitem__) is None


def test_all_models_are_one_domain():
    """A matrix is one swap group, and no models are none."""
    policy = matrix("abcd", s="a & b", t="c")

    assert policy.domains("dcba") == [frozenset("abcd")]
    assert policy.domains([]) == []


def test_capacity_is_of_the_largest_combination():
    """Sum over "&", largest over "|" and over the sets; only the models that are asked for count."""
    policy = matrix("abcdex", s="a & (b | c & d)", t="e", u="+s & +t")

    assert policy.capacity(frozenset("abcdex")) == 4
    assert policy.capacity(frozenset("abex")) == 3
    assert policy.capacity(frozenset("ae")) == 2
    assert policy.capacity(frozenset("bcd")) == 2
    assert policy.capacity(frozenset("x")) == 1
    assert policy.capacity(frozenset()) == 1


def test_the_capacity_of_sets_that_square_each_other():
    """Their sums alone would be numbers of thousands of digits."""
    sets = {"s0": "a | b"} | {f"s{n}": f"+s{n - 1} & +s{n - 1}" for n in range(1, 10_000)}

    assert matrix("ab", **sets).capacity(frozenset("ab")) == 2


def test_a_solution_tells_how_much_it_looked_at():
    """Two models and their "&", upwards and downwards; each set that has the target, upwards."""
    assert matrix("abc", s="a & b").solve("a", "b").states == 6
    assert matrix("abc", s="a & b", t="a & c").solve("a", "b").states == 7
    assert matrix("abc", s="a & b").solve("c", "b").states == 0


def test_a_solution_is_a_sentence():
    """For a log line or a person."""
    policy = matrix("abcd", {"c": 3}, s="a & b")

    assert str(policy.solve("a", "bcd")) == "a evicts c, d (cost 4); set s allows a, b"
    assert str(policy.solve("c", "")) == "c evicts nobody; by no set, resident then: c"


# ---- against everything written out -----------------------------------------------------------

MODELS = "abcdefg"


def rendered(tree) -> str:
    """The text of a *tree*."""
    if isinstance(tree, str):
        return tree
    operator, left, right = tree
    return f"({rendered(left)} {operator} {rendered(right)})"


def expanded(tree, families) -> list[frozenset[str]]:
    """All combinations in the order of the search, equal ones included."""
    if isinstance(tree, str):
        return families[tree[1:]] if tree.startswith("+") else [frozenset(tree)]
    operator, left, right = tree
    lefts, rights = expanded(left, families), expanded(right, families)
    return lefts + rights if operator == "|" else [one | other for one, other in itertools.product(lefts, rights)]


def references(tree) -> list[str]:
    """The sets that *tree* refers to, from left to right."""
    if isinstance(tree, str):
        return [tree[1:]] if tree.startswith("+") else []
    return references(tree[1]) + references(tree[2])


def written_out(trees) -> dict[str, list[frozenset[str]]]:
    """The families of all sets, in the order of the search."""
    families: dict[str, list[frozenset[str]]] = {}

    def visit(name: str) -> None:
        if name not in families:
            for other in references(trees[name]):
                visit(other)
            families[name] = expanded(trees[name], families)

    for name in trees:
        visit(name)
    return families


def solved(families, costs, target, resident) -> tuple[tuple[str, ...], str | None, frozenset[str], int]:
    """The rules of the core reference word by word, over all combinations."""
    best = None
    for name, family in families.items():
        for combination in family:
            if target in combination:
                evict = tuple(sorted(set(resident) - combination))
                cost = sum(costs.get(model, 1) for model in evict)
                if best is None or cost < best[3]:
                    best = evict, name, combination, cost
    everybody = tuple(sorted(resident))
    return best or (everybody, None, frozenset({target}), sum(costs.get(model, 1) for model in everybody))


@st.composite
def worlds(draw):
    """Trees by set name in any order, references without circles, and costs that often tie."""
    trees = {}
    for index in range(draw(st.integers(1, 4))):
        leaves = [*MODELS[:6], *(f"+s{other}" for other in range(index))]  # g is in no set
        joined = st.recursive(
            st.sampled_from(leaves), lambda inner: st.tuples(st.sampled_from("&|"), inner, inner), max_leaves=10
        )
        trees[f"s{index}"] = draw(joined)
    order = draw(st.permutations(list(trees)))
    costs = draw(st.dictionaries(st.sampled_from(MODELS), st.integers(1, 3)))
    return {name: trees[name] for name in order}, costs


WORLDS = worlds().filter(lambda world: family_sizes(world[0]) < 3_000)
SUBSETS = st.sets(st.sampled_from(MODELS))


def family_sizes(trees) -> int:
    """How many combinations *trees* have, so that none too many are written out."""
    sizes: dict[str, int] = {}

    def size(tree) -> int:
        if isinstance(tree, str):
            return sizes[tree[1:]] if tree.startswith("+") else 1
        left, right = size(tree[1]), size(tree[2])
        return left + right if tree[0] == "|" else left * right

    for name in sorted(trees):  # s0 refers to nobody, s1 at most to s0, ...
        sizes[name] = size(trees[name])
    return sum(sizes.values())


def policy_of(world) -> Matrix:
    trees, costs = world
    return matrix(MODELS, costs, **{name: rendered(tree) for name, tree in trees.items()})


@settings(derandomize=True, deadline=None, max_examples=400)
@given(WORLDS, st.lists(SUBSETS, min_size=1, max_size=8))
def test_the_solver_finds_what_writing_everything_out_finds(world, residents):
    """The same victims, set, combination and cost for each target, ties included."""
    policy, families = policy_of(world), written_out(world[0])

    for target, some in itertools.product(MODELS, [*residents, set(MODELS)]):
        resident = some - {target}
        solution = policy.solve(target, resident)
        evict, set_name, combination, cost = solved(families, world[1], target, resident)
        assert solution == Solution(target, evict, set_name, combination, cost, solution.states)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(WORLDS, SUBSETS)
def test_place_victims_and_solve_agree(world, some):
    """There is a place when nobody must go, and one combination covers all; and after the victims have gone."""
    policy, families = policy_of(world), written_out(world[0]).values()

    for target in MODELS:
        resident = some - {target}
        evict = policy.solve(target, resident).evict
        covered = any({target} | resident <= combination for family in families for combination in family)
        assert (policy.place(target, beside(resident)) is not None) == (not evict) == (covered or not resident)
        assert policy.victims(target, beside(resident), lambda _: IDLE) == set(evict)
        assert policy.place(target, beside(resident.difference(evict))) == NOTHING


@settings(derandomize=True, deadline=None, max_examples=200)
@given(WORLDS, SUBSETS, SUBSETS)
def test_whoever_fits_beside_some_fits_beside_fewer(world, some, gone):
    """Nobody's leaving ever closes a place."""
    policy = policy_of(world)

    for target in MODELS:
        resident = some - {target}
        if policy.place(target, beside(resident)) is not None:
            assert policy.place(target, beside(resident - gone)) is not None


@settings(derandomize=True, deadline=None, max_examples=200)
@given(WORLDS, SUBSETS)
def test_capacity_is_never_too_small(world, models):
    """No combination has more of the models; and never is it more than there are."""
    families = written_out(world[0]).values()
    sizes = [len(combination & models) for family in families for combination in family]

    capacity = policy_of(world).capacity(frozenset(models))

    assert max([1, *sizes]) <= capacity <= max(1, len(models))


# ---- size -------------------------------------------------------------------------------------

PAIRS = 20  # 2 ** 20 is more than a million combinations


def pairs(count: int = PAIRS) -> str:
    return " & ".join(f"(a{n} | b{n})" for n in range(count))


NAMES = [f"{letter}{n}" for letter in "ab" for n in range(PAIRS)]


@pytest.mark.parametrize(
    ("resident", "evicted"),
    [
        ([], []),
        (["a3", "b7", "b19"], []),
        (NAMES[:PAIRS], []),
        ([*NAMES[:PAIRS], "b5"], ["b5"]),  # of the pair the first stays
    ],
)
def test_a_million_combinations(resident, evicted):
    """Each "&" looks at a few, not at a product."""
    policy = matrix([*NAMES, "t"], s=f"t & {pairs()}")

    solution = policy.solve("t", resident)

    assert list(solution.evict) == sorted(evicted)
    assert len(solution.combination) == PAIRS + 1
    assert solution.states < 15 * PAIRS


def test_work_grows_with_the_expression_not_with_its_combinations():
    """Even when all that can be chosen between is resident, and costs differ."""
    for count in (1, 2, 4, 8, PAIRS):  # so that a product shows before it never ends
        costs = {f"b{n}": 1 + n % 2 for n in range(count)}
        solution = matrix([*NAMES, "t"], costs, s=f"t & {pairs(count)}").solve("t", NAMES)
        assert solution.combination == {"t", *("ab"[n % 2] + str(n) for n in range(count))}
        assert solution.states < 15 * count


def test_equal_and_lesser_pieces_are_looked_at_once():
    """Where everything meets everything, pieces do pile up, but far fewer than the 4,096 products."""
    names = [f"a{n}" for n in range(16)]
    ring = " | ".join(f"a{n} & a{(n + 1) % 16}" for n in range(16))

    solution = matrix([*names, "t"], s=f"t & ({ring}) & ({ring}) & ({ring})").solve("t", names)

    assert solution.combination == {"t", "a0", "a1", "a2", "a3", "a4", "a5"}
    assert solution.states < 6_000


def test_what_mentions_nobody_asked_for_is_not_searched():
    """An expression costs the one walk through its first combination."""
    solution = matrix([*NAMES, "t"], s=f"t & ({pairs()})").solve("t", [])

    assert solution.states < 5 * PAIRS


def test_a_million_combinations_of_which_half_have_the_target():
    """What a target excludes is known from its own pair."""
    solution = matrix(NAMES, s=pairs()).solve("b0", NAMES[:PAIRS])

    assert solution.evict == ("a0",)
    assert solution.states < 15 * PAIRS


def test_more_models_than_a_machine_word_has_bits():
    """Two hundred in one set, and the last ones count as the first."""
    names = [f"m{n}" for n in range(200)]
    policy = matrix([*names, "x"], all=" & ".join(names), other="x & m0 & m199")

    assert policy.solve("m100", names[:100] + names[101:]).evict == ()
    assert policy.solve("x", names).evict == tuple(sorted(names[1:199]))
    assert policy.capacity(frozenset(names)) == 200


def test_a_set_without_the_target_is_not_looked_at():
    """However many combinations of resident models it has."""
    resident = NAMES[:PAIRS]
    alone = matrix([*NAMES, "t"], s="t & a0").solve("t", resident)

    assert matrix([*NAMES, "t"], s="t & a0", large=pairs()).solve("t", resident) == alone


def test_sets_that_square_each_other():
    """At last two to the power of two to the power of 3,000 combinations; each set is looked at once or twice."""
    for depth in (3, 10, 3_000):  # so that a product shows before it never ends
        sets = {"s0": "a | b | c"} | {f"s{n}": f"+s{n - 1} & +s{n - 1}" for n in range(1, depth)}
        policy = matrix("abctx", top=f"t & +s{depth - 1}", **sets)
        solution = policy.solve("t", "abcx")
        assert solution.set_name == "top"
        assert solution.states < 30 * depth
        assert (solution.evict, solution.combination) == (("x",), frozenset("abct"))


def test_no_depth_is_too_deep():
    """Ten thousand operators within each other are solved without recursion."""
    depth = 10_000
    policy = matrix("abct", s="a & (b | (" * depth + "c & t" + "))" * depth)

    assert winner(policy, "t", "abc") == ("b", "s", "act")
    assert policy.capacity(frozenset("abct")) == 4
