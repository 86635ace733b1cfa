"""The sparse graph: its bounds against exact sums, sampled graphs and every choice of the dead; who is chosen."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from accord_shared.errors import PlanError
from accord_shared.secagg import graph
from accord_shared.secagg.graph import (
    abort_bits,
    choose_neighbours,
    log2_tail,
    most_left_out,
    secrecy_bits,
    sparse_thresholds,
)
from accord_shared.secagg.thresholds import signatures

Graph = list[frozenset[int]]


def sampled_graphs(sites: int, degree: int, count: int, seed: int) -> Iterator[Graph]:
    """`count` graphs: whom each site chose."""
    source = np.random.default_rng(seed).bytes
    for _ in range(count):
        yield [frozenset(choose_neighbours(own, sites, degree, source)) for own in range(sites)]


# Bounds


@given(st.integers(2, 300), st.data())
def test_tail_is_the_hypergeometric_one(sites: int, data: st.DataObject) -> None:
    marked, degree = data.draw(st.integers(0, sites - 1)), data.draw(st.integers(1, sites - 1))
    least = data.draw(st.integers(0, degree))
    exact = float(stats.hypergeom.sf(least - 1, sites - 1, marked, degree))
    assert 2 ** log2_tail(sites, marked, degree, least) == pytest.approx(exact, rel=1e-6, abs=1e-12)


def test_tail_counts_corrupt_holders() -> None:
    sites, corrupt, degree, share, runs = 60, 12, 10, 5, 300
    hits = sum(
        sum(1 for chosen in sample[corrupt:] if sum(v < corrupt for v in chosen) >= share)
        for sample in sampled_graphs(sites, degree, runs, seed=1)
    )
    expected = runs * (sites - corrupt) * 2 ** log2_tail(sites, corrupt, degree, share)
    assert expected > 100
    assert abs(hits - expected) < 5 * math.sqrt(expected)


@pytest.mark.parametrize(
    ("minimum", "colluders", "degree", "share"),
    [
        (900, 100, 45, 27),
        (900, 0, 15, 5),
        (700, 0, 82, 34),
        (700, 10, 89, 38),
    ],
)
def test_thousand_sites(minimum: int, colluders: int, degree: int, share: int) -> None:
    rule = sparse_thresholds(1000, minimum, colluders)
    assert (rule.sites, rule.degree, rule.share, rule.sign) == (1000, degree, share, minimum)
    assert secrecy_bits(1000, minimum, colluders, degree, share) >= 40
    assert abort_bits(1000, minimum, degree, share) >= 20


def exact_bits(sites: int, minimum: int, colluders: int, degree: int, share: int) -> float:
    """−log2 of bounds 1 to 3 with whole numbers throughout; (a) and (b) are both tried for every s."""

    def tail(marked: int, least: int) -> float:
        ways = sum(math.comb(marked, j) * math.comb(others - marked, degree - j) for j in range(least, degree + 1))
        return math.log2(ways) - math.log2(everything) if ways else -math.inf

    def none(marked: int) -> float:
        ways = math.comb(others - marked, degree)
        return math.log2(ways) - math.log2(everything) if ways else -math.inf

    others, honest, dead = sites - 1, minimum - colluders, sites - minimum
    everything, opened = math.comb(others, degree), (minimum - colluders) // 2 + 1
    bounds = [math.log2(sites) + tail(colluders, share)]
    pairs = math.log2(math.comb(sites, dead) * math.comb(sites, opened))
    bounds.append(pairs + opened * tail(dead + colluders, share - 1))
    for s in range(1, sites // 2 + 1):
        r = max(s, honest - s)
        held = math.log2(math.comb(sites, s)) + s * tail(s - 1 + colluders, share - 1)
        cut = math.log2(math.comb(sites, s) * math.comb(sites - s, r)) + s * none(r) + r * none(s)
        bounds.append(min(held, cut))
    return -max(bounds) - math.log2(sum(2 ** (bound - max(bounds)) for bound in bounds))


@pytest.mark.parametrize(
    ("sites", "minimum", "colluders"),
    [
        (160, 148, 2),
        (400, 393, 2),
        (250, 238, 0),
        (130, 125, 0),
        (130, 125, 2),
        (1000, 950, 0),
        (1000, 700, 10),
        (1000, 900, 100),
    ],
)
def test_bounds_are_those_of_whole_numbers(sites: int, minimum: int, colluders: int) -> None:
    rule = sparse_thresholds(sites, minimum, colluders)
    assert rule.degree is not None
    numbers = (sites, minimum, colluders, rule.degree, rule.share)
    exact = exact_bits(*numbers)
    assert exact >= 40
    assert secrecy_bits(*numbers) == pytest.approx(exact, abs=1e-6)


def test_no_graph_with_fewer_neighbours_would_do_by_whole_numbers() -> None:
    """The search is for the least degree: no t_share at all serves one less."""
    rule = sparse_thresholds(130, 125, 1)
    assert (rule.degree, rule.share) == (7, 3)
    assert all(exact_bits(130, 125, 1, 6, s) < 40 or abort_bits(130, 125, 6, s) < 20 for s in range(2, 8))
    assert exact_bits(130, 125, 1, 7, 2) < 40


def most_cut_off(chosen: Graph, dead: int, *, both_ways: bool) -> int:
    """Sites that a greedy coordinator separates from all others by `dead` deaths; `both_ways` as masks really are."""
    choosers: list[set[int]] = [set() for _ in chosen]
    for site, its in enumerate(chosen):
        for peer in its:
            choosers[peer].add(site)
    around = [frozenset(choosers[v]) | (chosen[v] if both_ways else frozenset()) for v in range(len(chosen))]
    cut, killed = set[int](), set[int]()
    while True:
        left = [v for v in range(len(chosen)) if v not in cut | killed]
        best = min(left, key=lambda v: len(around[v] - killed - cut))
        if len(killed | around[best] - cut) > dead:
            return len(cut)
        cut.add(best)
        killed |= around[best] - cut


def test_killing_choosers_leaves_out_more_than_killing_partners() -> None:
    """What the first version allowed, and what masks at both ends leave of it: no more than `most_left_out`."""
    rule = sparse_thresholds(1000, 950, 0)
    assert rule.degree is not None
    allowed = most_left_out(1000, 950, 0, rule.degree)
    for chosen in sampled_graphs(1000, rule.degree, 5, seed=5):
        assert most_cut_off(chosen, 50, both_ways=False) > 2 * allowed > 0
        assert 0 < most_cut_off(chosen, 50, both_ways=True) <= allowed


@settings(deadline=None)  # the search takes a third of a second where it is long
@given(sites=st.integers(129, 400), survive=st.floats(0.7, 1.0), corrupt=st.floats(0.0, 0.3))
def test_chosen_numbers_keep_their_promises(sites: int, survive: float, corrupt: float) -> None:
    minimum, colluders = math.ceil(survive * sites), int(corrupt * sites)
    try:
        rule = sparse_thresholds(sites, minimum, colluders)
    except PlanError:
        return
    assert rule.degree is not None
    assert 2 <= rule.share <= rule.degree + 1 <= sites
    assert 2 * rule.sign > sites + colluders
    assert signatures(sites, colluders) <= rule.sign == minimum
    assert secrecy_bits(sites, minimum, colluders, rule.degree, rule.share) >= 40
    assert abort_bits(sites, minimum, rule.degree, rule.share) >= 20
    assert most_left_out(sites, minimum, colluders, rule.degree) < (minimum - colluders) / 2


def test_least_minimum_to_sign() -> None:
    least = signatures(1000, 400)
    with pytest.raises(PlanError, match=f"need {least} to sign, more than cohort.minimum = {least - 1}"):
        sparse_thresholds(1000, least - 1, 400)
    assert sparse_thresholds(200, signatures(200, 0), 0).sign == signatures(200, 0)


def test_no_smaller_degree_would_do() -> None:
    rule = sparse_thresholds(200, 160, 10)
    assert rule.degree is not None
    for degree in range(1, rule.degree):
        for share in range(2, degree + 2):
            secret = secrecy_bits(200, 160, 10, degree, share) >= 40
            assert not (secret and abort_bits(200, 160, degree, share) >= 20)


def test_bounds_are_monotone() -> None:
    more_shares = [secrecy_bits(1000, 900, 100, 48, share) for share in range(20, 40)]
    assert more_shares == sorted(more_shares)
    more_colluders = [secrecy_bits(1000, 900, c, 48, 27) for c in range(0, 200, 10)]
    assert more_colluders == sorted(more_colluders, reverse=True)
    more_dead = [secrecy_bits(1000, minimum, 50, 60, 30) for minimum in range(1000, 700, -20)]
    assert more_dead == sorted(more_dead, reverse=True)
    aborts = [abort_bits(1000, 900, degree, 27) for degree in range(30, 80)]
    assert aborts == sorted(aborts)
    cuts = np.array([graph._cuts(300, 240, 20, degree) for degree in range(1, 60)])
    assert (np.diff(cuts, axis=0)[np.isfinite(cuts[1:])] < 0).all()
    left_out = [most_left_out(1000, 700, 10, degree) for degree in range(20, 300, 20)]
    assert left_out == sorted(left_out, reverse=True)
    assert left_out[-1] == 0


@pytest.mark.parametrize(
    ("sites", "minimum", "colluders", "says"),
    [
        (1000, 600, 0, "1000 sites with 0 colluders need 667 to sign, more than cohort.minimum = 600"),
        (1000, 700, 500, "need 751 to sign"),
        (1000, 1001, 0, "cohort.minimum = 1001"),
        (1000, 700, 1000, "leaves none honest"),
        (9000, 6300, 3590, "no sparse graph serves 9000 sites with cohort.minimum = 6300 and 3590 colluders"),
    ],
)
def test_impossible_plans_are_refused(sites: int, minimum: int, colluders: int, says: str) -> None:
    with pytest.raises(PlanError, match=says):
        sparse_thresholds(sites, minimum, colluders)


# Brute force: every set of the dead that a coordinator could declare after it saw the graph. Sites 0 … c−1 are corrupt.


def dead_sets(sites: int, minimum: int, colluders: int) -> Iterator[frozenset[int]]:
    for size in range(sites - minimum + 1):
        yield from map(frozenset, itertools.combinations(range(colluders, sites), size))


def components(chosen: Graph, alive: frozenset[int]) -> Iterator[frozenset[int]]:
    """Honest survivors that masks connect."""
    rest = set(alive)
    while rest:
        part, edge = set[int](), {rest.pop()}
        while edge:
            part |= edge
            edge = {v for v in rest if any(v in chosen[u] or u in chosen[v] for u in edge)}
            rest -= edge
        yield frozenset(part)


def opened_parts(chosen: Graph, alive: frozenset[int], corrupt: frozenset[int], share: int) -> Iterator[int]:
    """Sizes of the components whose own seeds are all opened, by surviving honest holders and corrupt ones."""
    for part in components(chosen, alive):
        if all(len((chosen[u] | {u}) & (alive | corrupt)) >= share for u in part):
            yield len(part)


def leaks(chosen: Graph, minimum: int, colluders: int, share: int) -> set[int]:
    """Sizes of opened parts with at most half of the honest survivors, over all choices of the dead."""
    sites, corrupt = len(chosen), frozenset(range(colluders))
    found: set[int] = set()
    for dead in dead_sets(sites, minimum, colluders):
        alive = frozenset(range(colluders, sites)) - dead
        found |= {s for s in opened_parts(chosen, alive, corrupt, share) if 2 * s <= len(alive)}
    return found


def bound_of_size(s: int, sites: int, minimum: int, colluders: int, degree: int, share: int) -> float:
    held = math.log2(math.comb(sites, s)) + s * log2_tail(sites, s - 1 + colluders, degree, share - 1)
    return min(1.0, 2 ** min(held, float(graph._cuts(sites, minimum, colluders, degree)[s - 1])))


@pytest.mark.parametrize(
    ("sites", "minimum", "colluders", "degree", "share"),
    [(10, 7, 2, 3, 3), (10, 7, 1, 2, 2), (10, 8, 2, 4, 4), (9, 6, 2, 4, 3), (12, 9, 1, 2, 3), (12, 9, 2, 3, 4)],
)
def test_parts_leak_no_more_than_bounded(sites: int, minimum: int, colluders: int, degree: int, share: int) -> None:
    runs, seen = 100, Counter[int]()
    for chosen in sampled_graphs(sites, degree, runs, seed=2):
        seen.update(leaks(chosen, minimum, colluders, share))
    for s in range(1, sites // 2 + 1):
        bound = bound_of_size(s, sites, minimum, colluders, degree, share)
        assert seen[s] <= runs * bound + 5 * math.sqrt(runs * bound)


@pytest.mark.parametrize(("sites", "minimum", "degree", "share"), [(8, 5, 2, 2), (9, 5, 3, 3), (10, 8, 4, 2)])
def test_second_attempts_open_no_more_than_bounded(sites: int, minimum: int, degree: int, share: int) -> None:
    """The bound is a first moment: pairs of few openers and many sites that they open, counted here."""
    runs, pairs, enough = 200, 0, minimum // 2 + 1
    for chosen in sampled_graphs(sites, degree, runs, seed=3):
        for openers in map(frozenset, itertools.combinations(range(sites), sites - minimum)):
            opened = sum(len((chosen[u] | {u}) & openers) >= share for u in range(sites))
            pairs += math.comb(opened, enough)
    bound = 2 ** graph._again(sites, minimum, 0, degree, share)
    assert 0 < pairs / runs <= bound


# Choosing


def p_of_uniform(choose: Callable[[], tuple[int, ...]], draws: int) -> float:
    """The p-value of a chi-square test that all 20 subsets of three of six are equally likely."""
    counts = Counter(choose() for _ in range(draws))
    everything = itertools.combinations((0, 1, 3, 4, 5, 6), 3)
    return float(stats.chisquare([counts[subset] for subset in everything]).pvalue)


def test_choices_are_uniform() -> None:
    source = np.random.default_rng(4).bytes
    assert p_of_uniform(lambda: choose_neighbours(2, 7, 3, source), 20_000) > 1e-3


def test_chi_square_rejects_a_biased_chooser() -> None:
    source = np.random.default_rng(4).bytes

    def next_free() -> tuple[int, ...]:
        chosen: set[int] = set()
        for _ in range(3):
            pick = source(1)[0] % 6
            while pick in chosen:  # the next free place, where Floyd's algorithm takes the last
                pick = (pick + 1) % 6
            chosen.add(pick)
        return tuple(sorted(index + (index >= 2) for index in chosen))

    assert p_of_uniform(next_free, 20_000) < 1e-6


def test_words_beyond_the_last_multiple_are_drawn_again() -> None:
    words = iter([b"\xff" * 8, (7).to_bytes(8, "little")])
    assert graph._below(5, lambda _: next(words)) == 2
    assert next(words, None) is None


@given(st.integers(2, 200), st.data())
def test_choices_are_others_ascending(sites: int, data: st.DataObject) -> None:
    own, degree = data.draw(st.integers(0, sites - 1)), data.draw(st.integers(1, sites - 1))
    chosen = choose_neighbours(own, sites, degree, np.random.default_rng(sites).bytes)
    assert len(set(chosen)) == degree
    assert list(chosen) == sorted(chosen)
    assert own not in chosen
    assert 0 <= chosen[0] <= chosen[-1] < sites


@pytest.mark.parametrize(("own", "sites", "degree"), [(5, 5, 1), (-1, 5, 1), (0, 5, 5), (0, 5, 0)])
def test_impossible_choices_are_refused(own: int, sites: int, degree: int) -> None:
    with pytest.raises(PlanError, match="cannot choose"):
        choose_neighbours(own, sites, degree, bytes)
