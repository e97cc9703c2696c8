"""Groups: who must go for whom, and what can never be in each other's way."""

from __future__ import annotations

from trioswap.config import GroupConfig
from trioswap.residency import NOTHING, Offer
from trioswap.residency.groups import Groups

SWAP = GroupConfig("swap", ("a", "b"))
TOGETHER = GroupConfig("together", ("c", "d"), swap=False, exclusive=False)
PERSISTENT = GroupConfig("persistent", ("p",), exclusive=False, persistent=True)


def victims(policy: Groups, target: str, *resident: str) -> set[str]:
    found = policy.victims(target, dict.fromkeys(resident, NOTHING), lambda _: Offer(0.0, busy=False, cost=1.0))
    assert found is not None
    assert (policy.place(target, dict.fromkeys(resident, NOTHING)) is None) == bool(found)
    return set(found)


def test_swap_puts_out_the_other_members():
    """Rule 1: inside a group that swaps, one at a time."""
    assert victims(Groups([SWAP]), "a", "b") == {"b"}


def test_members_of_a_group_that_does_not_swap_stay_together():
    """Rule 1 the other way round."""
    assert victims(Groups([TOGETHER]), "c", "d") == set()


def test_exclusive_belongs_to_the_newcomer():
    """Rule 2: an exclusive newcomer clears the house; one that is not leaves an exclusive resident alone."""
    policy = Groups([SWAP, TOGETHER])

    assert victims(policy, "a", "c", "d") == {"c", "d"}
    assert victims(policy, "c", "a") == set()


def test_persistent_models_stay():
    """Rule 2: nobody else's model puts out a persistent one."""
    assert victims(Groups([SWAP, PERSISTENT]), "a", "b", "p") == {"b"}


def test_persistent_does_not_protect_inside_its_own_group():
    """Rule 1 has no exception."""
    assert victims(Groups([GroupConfig("g", ("x", "y"), persistent=True)]), "x", "y") == {"y"}


def test_nobody_is_a_victim_of_itself():
    """A model that runs already is not in its own way."""
    assert victims(Groups([SWAP]), "a", "a") == set()


def test_domains_are_what_can_collide():
    """Models that can never put each other out get locks of their own."""
    apart = Groups([GroupConfig("one", ("a", "b"), exclusive=False), GroupConfig("two", ("c", "d"), exclusive=False)])

    assert apart.domains("abcd") == [{"a", "b"}, {"c", "d"}]
    assert Groups([SWAP, TOGETHER]).domains("abcd") == [{"a", "b", "c", "d"}]
    assert Groups([TOGETHER]).domains("cd") == [{"c"}, {"d"}]


def test_capacity_is_the_largest_number_that_can_live_together():
    """It is the size of the limiter: the structural bound."""
    assert Groups([SWAP]).capacity(frozenset("ab")) == 1
    assert Groups([SWAP, TOGETHER]).capacity(frozenset("abcd")) == 3


def test_one_victim_that_cannot_go_is_enough():
    """What the rules name must all go, so there is no choice without it."""
    offers = {"c": Offer(0.0, busy=False, cost=1.0), "d": None}

    assert Groups([SWAP, TOGETHER]).victims("a", {"c": NOTHING, "d": NOTHING}, offers.get) is None


def test_a_model_in_no_group_is_in_nobodys_way():
    """Where memory decides too, groups speak only of their members."""
    policy = Groups([SWAP])

    assert victims(policy, "a", "free") == victims(policy, "free", "a") == set()
    assert policy.capacity(frozenset({"a", "b", "free"})) == 2
