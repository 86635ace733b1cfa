"""The rules of PROTOCOL.md leave the coordinator no attack; without one of them there is one, or the others suffice."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import pytest

from formal.model import (
    FORGED,
    GENUINE,
    INVARIANTS,
    RULES,
    Context,
    Result,
    Site,
    View,
    World,
    enough,
    explore,
    one_sum,
    sums,
)

THREE = World(honest=2, corrupt=1, minimum=3, sign=3, share=3, models=2, tampering=True)
"""All must answer (section 4 for n = 3); everything that can be shown to a site is tampered with, two attempts."""
THREE_ONCE = replace(THREE, models=1, rounds=(1,))
FIVE = World(honest=4, corrupt=1, minimum=4, sign=4, share=3, rounds=(1,))
"""Section 4 for n = 5, c = 1, n_min = 4: one may drop out; one attempt."""
FOUR = World(honest=3, corrupt=1, minimum=3, sign=3, share=3)
"""Three of four, which meets the inequalities of section 4: one may drop out; two attempts of a round."""
TOO_SMALL = World(honest=2, corrupt=1, minimum=3, sign=3, share=3, rounds=(1,), cohorts=(((0, 1, 2), (0, 2)),))
"""A cohort below n_min is on offer."""
ALL_OF_FOUR = World(honest=3, corrupt=1, minimum=4, sign=3, share=3, rounds=(1,))
"""n_min above the thresholds."""
OVERLAP = World(honest=4, corrupt=0, minimum=2, sign=2, share=2, cohorts=(((0, 1, 2),), ((0, 1, 3),)))
"""The second attempt of a round has a site that the first had not."""
SEMI = World(honest=4, corrupt=1, minimum=4, sign=4, share=4, rounds=(1,), signatures=False)
"""`semi_honest`: section 4 for n = 5, c = 1."""

SPARSE = World(
    honest=5,
    corrupt=0,
    minimum=4,
    sign=4,
    share=2,
    rounds=(1,),
    graph=tuple(map(frozenset, ((1, 4), (0, 4), (0, 3), (1, 2), (0, 1)))),
    redrawn=tuple(map(frozenset, ((1, 4), (0, 4), (3, 4), (2, 4), (0, 1)))),
    short=tuple(map(frozenset, ((1,), (0,), (3,), (2,), (0,)))),
    silent=frozenset({4}),
    named=(frozenset(range(4)), frozenset(range(5))),
)
"""Five sites that choose two each, of which one has died. All four others are connected, by edges that 2 and 3 chose;
without those, or where 0 and 1 do not know of them, {0, 1} has masks of its own alone. So has {2, 3} the other way."""
SPARSE_WITHOUT = replace(SPARSE, named=(frozenset(range(4)),))

SECRECY = (enough, one_sum)


@lru_cache(maxsize=1)
def four() -> Result:
    return explore(FOUR)


def attack(world: World, invariants: tuple[object, ...] = INVARIANTS) -> str:
    """The name of the broken invariant; the trace is printed."""
    found = explore(world, invariants).attack  # type: ignore[arg-type]
    assert found is not None, "no attack"
    print(found)  # for `pytest -s`
    return found.invariant


# --- with all rules


@pytest.mark.parametrize(
    ("world", "states"),
    [(THREE, 4389), (FIVE, 214), (TOO_SMALL, 12), (ALL_OF_FOUR, 17), (OVERLAP, 1793)],
    ids=["three", "five", "too small a cohort", "all of four", "overlap"],
)
def test_no_attack(world: World, states: int) -> None:
    result = explore(world)
    assert result.attack is None, str(result.attack)
    assert result.states == states  # a model that lost a move would have fewer


def test_no_attack_over_two_attempts_with_dropouts() -> None:
    assert four().attack is None, str(four().attack)
    assert four().states == 14814


def test_no_attack_over_two_rounds() -> None:
    assert explore(replace(FOUR, rounds=(1, 2))).attack is None


def test_no_attack_on_a_sparse_graph() -> None:
    """Whatever choices are shown to whom, and whoever is withheld: the sum of all four, or none."""
    result = explore(SPARSE)
    assert result.attack is None, str(result.attack)
    assert result.learned == {frozenset(range(4))}
    assert result.states == 8311


def test_honest_rounds_do_open() -> None:
    """So "no attack" is not "nothing happens": with dropouts all sums that the protocol allows are opened."""
    assert explore(THREE).learned == {frozenset({0, 1})}
    assert four().learned == {frozenset(u) for u in ((0, 1), (0, 2), (1, 2), (0, 1, 2))}


def test_semi_honest_opens_one_sum_but_thresholds_one_lower_do_not() -> None:
    assert explore(SEMI).attack is None
    assert frozenset({0}) in explore(replace(SEMI, share=3), ()).learned


# --- without a rule


@pytest.mark.parametrize(
    ("world", "off", "broken"),
    [
        (THREE, ("R4 own",), "authentic"),
        (THREE, ("R4 session",), "authentic"),
        (THREE, ("R4 signature",), "authentic"),
        (THREE, ("R5 introduction",), "authentic"),
        (FOUR, ("R2 order",), "fresh"),
        (FOUR, ("R2 opened",), "one_sum"),
        (FOUR, ("R10 durable",), "one_sum"),
        (OVERLAP, ("R2 cohort",), "one_sum"),
        (FOUR, ("R9 once",), "one_set"),
        (FIVE, ("R8 quorum",), "enough"),
        (ALL_OF_FOUR, ("R7 minimum",), "enough"),
        (TOO_SMALL, ("R3 minimum", "R7 minimum"), "enough"),
        (FOUR, ("ctx signed",), "fresh"),
        (replace(FOUR, rounds=(1, 2)), ("ctx salt",), "enough"),
        (SPARSE_WITHOUT, ("ctx choices",), "enough"),
        (SPARSE_WITHOUT, ("R5 chosen",), "enough"),
        (SPARSE_WITHOUT, ("R5 choosers",), "enough"),
        (SPARSE_WITHOUT, ("one draw",), "enough"),
        (SPARSE_WITHOUT, ("roster",), "enough"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else "",
)
def test_without_a_rule_there_is_an_attack(world: World, off: tuple[str, ...], broken: str) -> None:
    assert attack(world.without(*off)) == broken


@pytest.mark.parametrize("lower", ["sign", "share"])
def test_thresholds_one_lower_are_attacked(lower: str) -> None:
    weaker = replace(FOUR, **{lower: 2})  # type: ignore[arg-type]
    assert attack(weaker) == {"sign": "one_set", "share": "one_sum"}[lower]


@pytest.mark.parametrize(
    "off",
    [("R4 signature", "R4 session", "R4 own"), ("R5 introduction",), ("R4 signature", "R5 introduction")],
    ids="+".join,
)
def test_secrecy_survives_forged_bundles_or_forged_introductions(off: tuple[str, ...]) -> None:
    """Section 10: an adversary that forges Ed25519 lacks kem_uv; and a forged view gathers no certificate."""
    assert explore(THREE_ONCE.without(*off), SECRECY).attack is None


def test_secrecy_falls_with_both_and_a_bundle_that_its_owner_does_not_know() -> None:
    assert attack(THREE_ONCE.without("R4 signature", "R5 introduction", "R4 own"), SECRECY) == "enough"


@pytest.mark.parametrize("rule", ["R8 same", "R7 self", "R3 minimum"])
def test_rules_that_others_already_imply(rule: str) -> None:
    """Defence in depth: a certified set is unique whoever opens it, and |U| ≥ n_min implies a cohort of n_min."""
    assert explore(FIVE.without(rule)).attack is None
    assert explore(TOO_SMALL.without(rule)).attack is None


def test_every_rule_is_tried() -> None:
    marks = [mark for mark in test_without_a_rule_there_is_an_attack.pytestmark if mark.name == "parametrize"]  # type: ignore[attr-defined]
    tried = {rule for _, off, _ in marks[0].args[1] for rule in off} | {"R8 same", "R7 self"}
    assert tried == set(RULES)


def test_an_attack_tells_how() -> None:
    found = explore(FIVE.without("R8 quorum")).attack
    assert found is not None
    assert str(found).splitlines()[0] == "enough: the sum over {1} alone is known"
    assert sum(": open" in step for step in found.trace) == 4


# --- the coordinator's arithmetic, by hand


VIEW = View(Context(0, (0, 1, 2), 0, (GENUINE, GENUINE)), (GENUINE, GENUINE))
ALL = frozenset({0, 1, 2})


def uploaded(*opened: frozenset[int]) -> Site:
    """A site that uploaded, and opened these sets."""
    return Site(done=frozenset([("upload", VIEW), *(("open", VIEW, u) for u in opened)]))


def test_sums_by_hand() -> None:
    silent, opened = uploaded(), uploaded(ALL)
    assert sums(THREE_ONCE, (silent, silent)) == ()
    assert sums(THREE_ONCE, (opened, silent)) == ()
    assert sums(THREE_ONCE, (opened, opened)) == (frozenset({0, 1}),)
    assert sums(THREE_ONCE, (Site(), opened)) == ()
    two = replace(THREE_ONCE, share=2)
    assert sums(two, (opened, silent)) == (frozenset({0, 1}),)  # one honest share and the corrupt one's


def test_a_dropped_partners_masks_are_opened() -> None:
    two = replace(THREE_ONCE, share=2)
    alone = uploaded(frozenset({0, 2}))
    assert sums(two, (alone, Site())) == (frozenset({0}),)
    assert sums(two, (alone, uploaded())) == (frozenset({0}),)


def test_a_seed_with_both_halves_forged_is_the_coordinators() -> None:
    forged = View(Context(0, (0, 1, 2), 0, (GENUINE, FORGED)), (GENUINE, FORGED))
    half = View(Context(0, (0, 1, 2), 0, (GENUINE, FORGED)), (GENUINE, GENUINE))
    for view, known in ((forged, (frozenset({0}),)), (half, ())):
        site = Site(done=frozenset({("upload", view), ("open", view, ALL)}))
        assert sums(THREE_ONCE, (site, Site())) == known
