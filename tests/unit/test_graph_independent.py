"""The sparse graph's bounds anew, by integers and decimals alone, and against graphs counted one by one.

Nothing here is shared with `accord_shared.secagg.graph` but the statement of PROTOCOL.md, section 9. Two steps: the
product claims no more than the bounds as they are written there; and the bounds are no less than what a coordinator
that sees every choice really wins, in federations so small that all choices can be listed.
"""

from __future__ import annotations

import itertools
import random
from decimal import Decimal, localcontext
from fractions import Fraction
from functools import cache
from math import comb

import numpy as np
import numpy.typing as npt
import pytest

from accord_shared.errors import PlanError
from accord_shared.secagg.graph import abort_bits, most_left_out, secrecy_bits, sparse_thresholds

Masks = npt.NDArray[np.int64]
LARGE = (
    (130, 125, 0),
    (130, 125, 2),
    (160, 148, 2),
    (250, 238, 0),
    (400, 393, 2),
    (1000, 900, 100),
    (1000, 700, 0),
    (1000, 700, 10),
    (1000, 950, 0),
)
"""N, n_min, c."""


@cache
def hits(others: int, marked: int, k: int, least: int) -> Fraction:
    """P[at least `least` of k choices among `others` are marked]."""
    ways = sum(comb(marked, j) * comb(others - marked, k - j) for j in range(max(least, 0), k + 1))
    return Fraction(ways, comb(others, k))


def none(others: int, marked: int, k: int) -> Fraction:
    """P[no choice is marked]."""
    return Fraction(comb(others - marked, k), comb(others, k))


def decimal(value: Fraction) -> Decimal:
    return Decimal(value.numerator) / Decimal(value.denominator)


def alone(n: int, c: int, k: int, t: int) -> Decimal:
    """Bound 1: corrupt holders rebuild a secret of somebody."""
    return n * decimal(hits(n - 1, c, k, t))


def cut(n: int, m: int, c: int, k: int, s: int) -> Decimal:
    """Bound 2 (b): some s survivors share no mask with the others."""
    r = max(s, m - c - s)
    ways = Decimal(comb(n, s) * comb(n - s, r))
    return ways * decimal(none(n - 1, r, k)) ** s * decimal(none(n - 1, s, k)) ** r


def opened(n: int, c: int, k: int, t: int, s: int) -> Decimal:
    """Bound 2 (a): some s sites and the corrupt ones can open each of the s."""
    return Decimal(comb(n, s)) * decimal(hits(n - 1, min(s - 1 + c, n - 1), k, t - 1)) ** s


def parts(n: int, m: int, c: int, k: int, t: int) -> Decimal:
    return sum((min(opened(n, c, k, t, s), cut(n, m, c, k, s)) for s in range(1, n // 2 + 1)), Decimal(0))


def again(n: int, m: int, c: int, k: int, t: int) -> Decimal:
    """Bound 3: so few openers that the rest could be asked once more."""
    d, s = n - m, (m - c) // 2 + 1
    return Decimal(comb(n, d) * comb(n, s)) * decimal(hits(n - 1, min(d + c, n - 1), k, t - 1)) ** s


def failure(n: int, m: int, c: int, k: int, t: int) -> Decimal:
    with localcontext() as context:
        context.prec = 60
        return alone(n, c, k, t) + parts(n, m, c, k, t) + again(n, m, c, k, t)


def bits(value: Decimal) -> float:
    with localcontext() as context:
        context.prec = 60
        return float(-value.ln() / Decimal(2).ln()) if value else float("inf")


@pytest.mark.parametrize(("n", "m", "c"), LARGE)
def test_no_more_is_claimed_than_the_bounds_say(n: int, m: int, c: int) -> None:
    found = sparse_thresholds(n, m, c)
    k, t = found.degree or 0, found.share
    exact = bits(failure(n, m, c, k, t))
    assert exact >= 40.0 - 1e-9
    assert secrecy_bits(n, m, c, k, t) == pytest.approx(exact, abs=1e-6)
    assert bits(m * decimal(1 - hits(n - 1, m - 1, k, t - 1))) >= 20.0 - 1e-9
    assert abort_bits(n, m, k, t) == pytest.approx(bits(m * decimal(1 - hits(n - 1, m - 1, k, t - 1))), abs=1e-6)
    if t > 2:
        assert bits(failure(n, m, c, k, t - 1)) < 40.0 + 1e-9  # the least number of shares


@pytest.mark.parametrize(("n", "m", "c"), LARGE)
def test_no_more_are_left_out_than_is_said(n: int, m: int, c: int) -> None:
    k = sparse_thresholds(n, m, c).degree or 0
    left_out = most_left_out(n, m, c, k)
    with localcontext() as context:
        context.prec = 60
        more = sum((cut(n, m, c, k, s) for s in range(left_out + 1, n // 2 + 1)), Decimal(0))
        assert bits(more) >= 40.0 - 1e-9
        assert left_out == 0 or bits(more + cut(n, m, c, k, left_out)) < 40.0 + 1e-9


def test_no_more_is_claimed_of_any_numbers() -> None:
    rng = random.Random(11)  # noqa: S311
    for _ in range(40):
        n = rng.randrange(20, 260)
        m = rng.randrange(2 * n // 3 + 1, n + 1)
        c, k = rng.randrange(n // 10 + 1), rng.randrange(2, n // 2)
        t = rng.randrange(2, k + 2)
        assert secrecy_bits(n, m, c, k, t) <= max(0.0, bits(failure(n, m, c, k, t))) + 1e-6
        try:
            found = sparse_thresholds(n, m, c)
        except PlanError:
            continue
        assert bits(failure(n, m, c, found.degree or 0, found.share)) >= 40.0 - 1e-9


# --- every choice that there is: what a coordinator wins who sees them all


def choices(n: int, c: int, k: int) -> Masks:
    """All choices of the honest sites 0 … n − c − 1, a row each, as bits [ways, n − c]; each row is as likely."""
    honest = n - c
    own = [
        [sum(1 << other for other in picked) for picked in itertools.combinations([v for v in range(n) if v != u], k)]
        for u in range(honest)
    ]
    return np.array(np.meshgrid(*own, indexing="ij"), dtype=np.int64).reshape(honest, -1).T


def ones(values: Masks) -> Masks:
    return np.bitwise_count(values).astype(np.int64)


def components(chosen: Masks, alive: int, *, mutual: bool = True) -> Masks:
    """For each honest site, who of `alive` it shares masks with, over any number of steps, itself included.

    Not `mutual`: only those that it chose, as if whoever chose it were never told of.
    """
    count = chosen.shape[1]
    near = np.zeros_like(chosen)
    for u, v in itertools.permutations([u for u in range(count) if alive >> u & 1], 2):
        theirs = chosen[:, v] >> u if mutual else 0
        near[:, u] |= ((chosen[:, u] >> v | theirs) & 1) << v
    reach = near | (np.int64(1) << np.arange(count))
    for _ in range(count):
        for u in range(count):
            for v in range(count):
                reach[:, u] |= np.where(reach[:, u] >> v & 1, reach[:, v], 0)
    return reach


def unions(reach: Masks, alive: int, size: int) -> list[tuple[int, npt.NDArray[np.bool_]]]:
    """Sets of `size` survivors, and in which rows each is closed: no mask leads out of it."""
    members = [u for u in range(reach.shape[1]) if alive >> u & 1]
    found = []
    for picked in itertools.combinations(members, size):
        mask = sum(1 << u for u in picked)
        found.append((mask, np.all(reach[:, list(picked)] & ~np.int64(mask) == 0, axis=1)))
    return found


def wins(n: int, m: int, c: int, k: int, t: int, *, mutual: bool = True) -> dict[str, list[Fraction]]:
    """Of all choices, in how many the coordinator can cut s survivors off, and open such a part alone, by s."""
    chosen, honest = choices(n, c, k), n - c
    corrupt = sum(1 << u for u in range(honest, n))
    can_cut = np.zeros((n // 2 + 1, len(chosen)), dtype=bool)
    can_open = np.zeros_like(can_cut)
    for count in range(m - c, honest + 1):
        for picked in itertools.combinations(range(honest), count):
            alive = sum(1 << u for u in picked)
            reach = components(chosen, alive, mutual=mutual)
            enough = ones(chosen & (corrupt | alive)) + 1 >= t  # holders that answer, the site itself among them
            for s in range(1, min(count // 2, n // 2) + 1):
                for mask, closed in unions(reach, alive, s):
                    can_cut[s] |= closed
                    members = [u for u in range(honest) if mask >> u & 1]
                    can_open[s] |= closed & np.all(enough[:, members], axis=1)
    return {
        "cut": [Fraction(int(row.sum()), len(chosen)) for row in can_cut],
        "opened": [Fraction(int(row.sum()), len(chosen)) for row in can_open],
    }


MANY = pytest.mark.slow
"""A million choices and more."""
SMALL = [
    (6, 5, 1, 2, 2),
    (6, 5, 1, 2, 3),
    (6, 4, 1, 2, 2),
    (7, 6, 2, 2, 2),
    pytest.param(6, 5, 0, 2, 2, marks=MANY),
    pytest.param(7, 6, 2, 3, 3, marks=MANY),
]


@pytest.mark.parametrize(("n", "m", "c", "k", "t"), SMALL)
def test_the_bounds_on_parts_hold_of_all_choices(n: int, m: int, c: int, k: int, t: int) -> None:
    truth = wins(n, m, c, k, t)
    total = sum(truth["opened"])
    for s in range(1, n // 2 + 1):
        assert truth["cut"][s] <= cut(n, m, c, k, s) + Decimal("1e-20")
        assert truth["opened"][s] <= min(cut(n, m, c, k, s), opened(n, c, k, t, s)) + Decimal("1e-20")
    assert total <= parts(n, m, c, k, t) + Decimal("1e-20")


def test_the_listing_finds_what_there_is_to_win() -> None:
    truth = wins(6, 4, 1, 2, 2)
    assert truth["cut"][1] > 0
    assert truth["opened"][2] > 0


def test_masks_that_only_the_chooser_knows_break_the_bound() -> None:
    """What a coordinator won that kept from a site who had chosen it."""
    assert wins(6, 5, 1, 2, 2, mutual=False)["cut"][2] > cut(6, 5, 1, 2, 2)
    assert wins(6, 5, 1, 2, 2)["cut"][2] <= cut(6, 5, 1, 2, 2)


@pytest.mark.parametrize(
    ("n", "m", "c", "k", "t"),
    [(6, 5, 1, 2, 3), (6, 4, 1, 2, 3), (7, 5, 2, 2, 3), pytest.param(7, 6, 2, 3, 4, marks=MANY)],
)
def test_the_bound_on_second_attempts_holds_of_all_choices(n: int, m: int, c: int, k: int, t: int) -> None:
    chosen, honest, d = choices(n, c, k), n - c, n - m
    corrupt, need = sum(1 << u for u in range(honest, n)), (m - c) // 2 + 1
    second = np.zeros(len(chosen), dtype=bool)
    for picked in itertools.combinations(range(honest), d):
        openers = sum(1 << u for u in picked)
        second |= (ones(chosen & (corrupt | openers)) + 1 >= t).sum(axis=1) >= need
    assert Fraction(int(second.sum()), len(chosen)) <= again(n, m, c, k, t) + Decimal("1e-20")
