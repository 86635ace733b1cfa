"""Thresholds of the complete graph: the table of PROTOCOL.md, section 4, its refusals, and what they are for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accord_shared.errors import PlanError
from accord_shared.secagg.thresholds import COMPLETE_MAX, Mode, Thresholds, least_minimum, thresholds
from conftest import plan_of

MODES: tuple[Mode, ...] = ("malicious", "semi_honest")


@pytest.mark.parametrize(
    ("n", "minimum", "colluders", "mode", "sign", "share"),
    [
        (2, 2, 0, "malicious", 2, 2),
        (3, 3, 1, "malicious", 3, 3),
        (4, 4, 2, "semi_honest", 4, 4),
        (5, 4, 0, "malicious", 4, 3),
        (10, 7, 0, "malicious", 7, 6),
        (10, 7, 0, "semi_honest", 7, 7),
        (10, 7, 2, "malicious", 7, 6),
        (10, 8, 5, "malicious", 8, 8),
        (30, 20, 3, "malicious", 21, 16),
        (30, 21, 12, "semi_honest", 22, 22),
        (100, 70, 10, "malicious", 67, 51),
        (128, 90, 40, "malicious", 86, 79),
    ],
)
def test_table(n: int, minimum: int, colluders: int, mode: Mode, sign: int, share: int) -> None:
    if share > minimum:
        with pytest.raises(PlanError, match=f"need {share} answers"):
            thresholds(n, minimum, colluders, mode, own_noise=True)
    else:
        assert thresholds(n, minimum, colluders, mode, own_noise=True) == Thresholds(n, sign, share, None)


@pytest.mark.parametrize(
    ("n", "colluders"), [(n, c) for n in (2, 3, 4) for c in range(n) if n < max(c, 1) + 2], ids=str
)
@pytest.mark.parametrize("mode", MODES)
def test_no_sum_tells_colluders_or_a_site_a_single_update(n: int, colluders: int, mode: Mode) -> None:
    """n = 3 with c = 2 was accepted: the two subtract what they sent from the sum. Fine where each has full noise."""
    with pytest.raises(PlanError, match=r'needs privacy\.noise = "site".*learns a single update'):
        thresholds(n, n, colluders, mode)
    assert thresholds(n, n, colluders, mode, own_noise=True).share == n


@given(n=st.integers(2, COMPLETE_MAX), colluders=st.integers(0, COMPLETE_MAX), mode=st.sampled_from(MODES))
def test_every_accepted_sum_leaves_two(n: int, colluders: int, mode: Mode) -> None:
    try:
        least = least_minimum(n, colluders, mode)
    except PlanError:
        return
    assert least >= max(colluders, 1) + 2


def test_a_plan_whose_sum_tells_a_single_update_is_refused() -> None:
    cohort = {"cohort.size": 3, "cohort.minimum": 3, "cohort.colluders": 2}
    secure = {"secure_aggregation.mode": "malicious", **cohort}
    with pytest.raises(PlanError, match="learns a single update"):
        plan_of({"privacy.noise": "none", "privacy.epsilon": None, **secure})
    assert plan_of({"privacy.noise": "site", **secure}).cohort.colluders == 2


@pytest.mark.parametrize(
    ("n", "minimum", "colluders", "says"),
    [
        (9, 10, 0, "9 sites.*cohort.minimum = 10"),
        (1, 1, 0, "1 sites"),
        (10, 0, 0, "cohort.minimum = 0"),
        (10, 5, 0, "10 sites with 0 colluders need 6 answers, more than cohort.minimum = 5"),
        (4, 3, 0, "4 sites with 0 colluders need 4 answers, more than cohort.minimum = 3"),
        (10, 9, 8, "need 10 answers"),
        (10, 10, 10, "leaves none honest"),
        (10, 10, -1, "colluders = -1"),
        (5, 5, 4, "need 6 answers"),
    ],
)
def test_refusals_name_the_numbers(n: int, minimum: int, colluders: int, says: str) -> None:
    with pytest.raises(PlanError, match=says) as refusal:
        thresholds(n, minimum, colluders, "malicious")
    assert "\n" not in str(refusal.value)


@st.composite
def valid(draw: st.DrawFn) -> tuple[int, int, int, Mode]:
    """Numbers that pass: `test_least_minimum_is_least` shows that no others do."""
    mode = draw(st.sampled_from(MODES))
    n = draw(st.integers(2, COMPLETE_MAX))
    colluders = draw(st.integers(0, n - 2))
    return n, draw(st.integers(least_minimum(n, colluders, mode, own_noise=True), n)), colluders, mode


@given(valid())
def test_what_thresholds_are_for(numbers: tuple[int, int, int, Mode]) -> None:
    n, minimum, colluders, mode = numbers
    rule = thresholds(n, minimum, colluders, mode, own_noise=True)
    assert 2 * rule.sign > n + colluders
    assert rule.share > n + colluders - minimum
    assert rule.share > colluders
    assert rule.share <= minimum <= n
    assert rule.sign <= n
    assert rule.share >= colluders + 2 or n <= 4
    assert mode == "malicious" or 2 * rule.share > n + colluders


@given(n=st.integers(2, COMPLETE_MAX), colluders=st.integers(0, COMPLETE_MAX), mode=st.sampled_from(MODES))
def test_least_minimum_is_least(n: int, colluders: int, mode: Mode) -> None:
    try:
        least = least_minimum(n, colluders, mode)
    except PlanError:
        with pytest.raises(PlanError):
            thresholds(n, n, colluders, mode)
        return
    for minimum in range(least, n + 1):
        thresholds(n, minimum, colluders, mode)
    with pytest.raises(PlanError):
        thresholds(n, least - 1, colluders, mode)


def test_least_minimum_of_ten() -> None:
    assert [least_minimum(10, 0, mode) for mode in MODES] == [6, 7]
    assert least_minimum(4, 1, "malicious") == 4
    with pytest.raises(PlanError, match="need 11 answers"):
        least_minimum(10, 9, "malicious")
