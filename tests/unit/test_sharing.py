"""Shares of noise: any number of survivors keeps the promise, integers never wrap, rounding moves no more than Δ."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accord_shared.dp.accounting import SLACK, epsilon, noise_multiplier, plan_epsilon, round_event
from accord_shared.dp.discrete import LEAST_VARIANCE, ROUNDING_VARIANCE
from accord_shared.dp.events import SampledGaussian, SharedGaussian
from accord_shared.dp.noise import SecureGenerator
from accord_shared.dp.sharing import NoiseShares, default_bound, sensitivity
from accord_shared.errors import NonFinite, PlanError, ProtocolError
from accord_shared.plan import Plan, apply_changes, make_plan
from accord_shared.quantize import _coins, decode, encode

D = 29_568


def cohort_plan(changes: dict[str, Any] | None = None) -> Plan:
    """Ten banks of a thousand records, ε = 1."""
    table: dict[str, Any] = {
        "run": {"name": "shares", "rounds": 10, "max_extra_attempts": 1},
        "model": {"source": "package:none"},
        "task": {"labels": ["a", "b"]},
        "local": {"expected_records": 1000, "clip_norm": 0.2},
        "privacy": {"noise": "cohort", "epsilon": 1.0},
        "cohort": {"size": 10},
    }
    return make_plan(apply_changes(table, changes or {}))


def shares_of(changes: dict[str, Any] | None = None, dimension: int = D) -> NoiseShares:
    plan = cohort_plan(changes)
    return NoiseShares.of(plan, dimension, noise_multiplier(plan))


def kept_variance(shares: NoiseShares, survivors: int) -> Fraction:
    """What each survivor's noise still has once the opened components are subtracted."""
    return ROUNDING_VARIANCE + shares.base + sum(shares.components[index] for index in shares.kept(survivors))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cohort.colluders": 1},
        {"cohort.minimum": 10},
        {"cohort.size": 30},
        {"cohort.size": 30, "cohort.colluders": 3},
        {"cohort.size": 100, "cohort.minimum": 70},
        {"cohort.size": 500, "cohort.minimum": 450},
        {"privacy.epsilon": 8.0},
        {"privacy.epsilon": 0.2},
        {"privacy.noise": "participant", "cohort.size": 500},
    ],
    ids=str,
)
def test_any_number_of_survivors_keeps_the_promise(changes: dict[str, Any]) -> None:
    shares = shares_of(changes)
    promised = (shares.multiplier * shares.delta_steps) ** 2 + 4
    drops, sharers = shares.sites - shares.minimum, shares.minimum - shares.colluders
    most = 1.001 if drops <= 9 else 1.01
    if shares.nested:  # a ninth of what all dropouts cost
        most = 1.001 + -(-drops // 9) / sharers
    for survivors in range(shares.minimum, shares.sites + 1):
        kept = kept_variance(shares, survivors)
        total = float(kept * (survivors - shares.colluders))
        assert total >= promised
        assert total <= promised * most, survivors  # and hardly more: accuracy is not given away
        assert sorted((*shares.kept(survivors), *shares.removed(survivors))) == list(range(len(shares.components)))
    assert not shares.removed(shares.minimum)
    assert len(shares.removed(shares.sites)) == len(shares.components)
    assert min(shares.base, *shares.components, Fraction(99)) >= LEAST_VARIANCE


@given(
    size=st.integers(5, 128),
    lost=st.integers(0, 60),
    colluders=st.integers(0, 4),
    log_epsilon=st.floats(-2, 3),
    dimension=st.integers(1, 10**7),
)
@settings(max_examples=60, deadline=None)
def test_every_plan_that_is_accepted_keeps_its_promise(
    size: int, lost: int, colluders: int, log_epsilon: float, dimension: int
) -> None:
    try:
        shares = shares_of(
            {
                "cohort.size": size,
                "cohort.minimum": max(1, size - lost),
                "cohort.colluders": colluders,
                "privacy.epsilon": math.exp(log_epsilon),
                "privacy.accountant": "rdp",
            },
            dimension,
        )
    except PlanError:
        return
    promised = (shares.multiplier * shares.delta_steps) ** 2 + 4
    for survivors in range(shares.minimum, shares.sites + 1):
        assert kept_variance(shares, survivors) * (survivors - shares.colluders) >= promised
    assert shares.sites * shares.reach + shares.tail < 1 << (shares.bits - 1)
    assert shares.excess <= 0.01
    assert shares.own_multiplier <= shares.multiplier


def test_ten_banks_need_two_bytes() -> None:
    shares = shares_of()
    assert (shares.bits, len(shares.components)) == (16, 3)
    assert shares.excess < 1 / 256
    assert shares_of({"secure_aggregation.bits": 24}).excess < 1 / 900


def test_a_modulus_that_is_too_narrow_is_refused() -> None:
    with pytest.raises(PlanError, match="too narrow"):
        shares_of({"secure_aggregation.bits": 8})
    with pytest.raises(PlanError, match=r"secure_aggregation\.bits = 13 (would cost|is too narrow)"):
        shares_of({"secure_aggregation.bits": 13})


def test_both_ends_compute_the_same_integers() -> None:
    """Frozen: what enters the context of an attempt."""
    plan = cohort_plan()
    assert NoiseShares.of(plan, D, 12.5).facts == FACTS
    assert NoiseShares.of(plan, D, 12.51).facts != FACTS


FACTS = (22, 16, 121094, 13471, 16838, 21650)


# --- sensitivity, after rounding


def centres(update: np.ndarray[Any, Any], shares: NoiseShares, coins: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The grid points that `encode` rounds to with these coins, by the specification."""
    scaled = np.clip(update, -shares.bound, shares.bound) * shares.scale * 2.0**24
    return (np.trunc(scaled).astype(np.int64) + coins) >> 16


def test_one_unit_moves_the_grid_by_no_more_than_delta_and_by_more_than_c() -> None:
    shares, generator = shares_of(), SecureGenerator(bytes(32))
    random = np.random.default_rng(4)
    moved = []
    for trial in range(40):
        kind = (0.0, 1.0, 30.0)[trial % 3]  # a unit that is spread, or on few coordinates
        unit = random.normal(size=D) * np.exp(kind * random.normal(size=D) / 10)
        unit *= shares.clip / np.linalg.norm(unit)
        others = random.normal(size=D) * shares.clip
        coins = _coins(generator, D).astype(np.int64)
        change = centres(others + unit, shares, coins) - centres(others, shares, coins)
        moved.append(float(np.linalg.norm(change)) / 256)
    assert max(moved) <= shares.delta_steps
    assert max(moved) > shares.steps  # so the clip norm alone would promise too much
    assert shares.delta_steps < shares.steps * 1.01


@pytest.mark.parametrize(("steps", "dimension"), [(1, 10), (7, D), (100, 10**6)])
def test_sensitivity_is_between_c_and_the_worst_case(steps: int, dimension: int) -> None:
    assert steps < sensitivity(steps, dimension) <= steps * 1.0001 + math.sqrt(dimension) / 250 + 1e-9


# --- integers


def test_encoded_sums_are_unbiased_and_carry_their_base_noise() -> None:
    shares = shares_of(dimension=50_000)
    update = np.linspace(-0.9, 0.9, 50_000) * shares.clip
    words = encode(update, shares, SecureGenerator(bytes(32)))
    assert words.dtype == np.uint16
    off = decode(words, shares, 1) - update
    sigma = math.sqrt(float(shares.base + ROUNDING_VARIANCE)) / shares.scale
    assert abs(off.mean()) < 5 * sigma / math.sqrt(len(off))
    assert off.std() == pytest.approx(sigma, rel=0.02)
    assert abs(np.corrcoef(off, update)[0, 1]) < 5 / math.sqrt(len(off))


def test_values_are_clamped_to_the_bound() -> None:
    shares = shares_of(dimension=1000)
    high = decode(encode(np.full(1000, 1e30), shares, SecureGenerator(bytes(32))), shares, 1)
    assert high.mean() == pytest.approx(shares.bound, rel=0.02)


def test_the_largest_sums_do_not_wrap() -> None:
    """All sites at their bound with noise at its promised end, in both directions."""
    shares = shares_of(dimension=3)
    for sign in (1, -1):
        extreme = sign * (shares.sites * shares.reach + shares.tail)
        words = np.full(3, extreme % (1 << shares.bits), dtype=np.uint16)
        np.testing.assert_allclose(decode(words, shares, shares.sites), extreme / shares.scale)


def test_sums_beyond_what_honest_sites_reach_are_refused() -> None:
    shares = shares_of(dimension=3)
    words = np.full(3, (1 << (shares.bits - 1)) - 1, dtype=np.uint16)
    with pytest.raises(ProtocolError, match="out of range"):
        decode(words, shares, 7)


def test_nan_and_other_lengths_are_refused() -> None:
    shares = shares_of(dimension=4)
    with pytest.raises(NonFinite):
        encode(np.array([0.0, math.nan, 0.0, 0.0]), shares, SecureGenerator())
    with pytest.raises(ProtocolError, match="divided for 4"):
        encode(np.zeros(5), shares, SecureGenerator())


def test_counts_of_held_back_units_fit_the_bound() -> None:
    plan = cohort_plan({"evaluation.released_fraction": 0.5, "local.expected_records": 100_000, "privacy.delta": 1e-6})
    counts = 0.5 * 100_000 * (plan.local.clip_norm or 0) / math.sqrt(2) / 100_000
    assert default_bound(plan) > counts


# --- what it costs


def test_the_reserve_is_paid_for() -> None:
    plan = cohort_plan({"run.max_extra_attempts": 5})
    assert plan.releases == 15
    sigma = noise_multiplier(plan)
    assert sigma > noise_multiplier(cohort_plan({"run.max_extra_attempts": 0}))
    assert plan_epsilon(plan, 15) == pytest.approx(1.0, rel=1e-3)
    assert (plan_epsilon(plan, 15) or 9.0) <= 1.0


def test_two_epsilons() -> None:
    shares = shares_of()
    event = round_event(cohort_plan(), shares.multiplier, shares.own_multiplier)
    assert isinstance(event, SharedGaussian)
    known = epsilon([event] * 11, 1e-5)
    collude = epsilon([event] * 11, 1e-5, colluding=True)
    assert known <= 1.0
    assert shares.own_multiplier == pytest.approx(shares.multiplier / math.sqrt(10), rel=0.01)
    assert collude == pytest.approx(epsilon([SampledGaussian(shares.own_multiplier, 1.0, 11)], 1e-5), rel=1e-6)
    assert collude > 3 * known


def skellam_epsilon(deviation: float, delta: float) -> float:
    """The Rényi bound of a Skellam of large variance and sensitivity 1 (Agarwal, Kairouz, Liu 2021): its leading term.

    Converted by Canonne, Kamath, Steinke 2020, Proposition 12. Its further terms only add.
    """
    orders = np.concatenate([np.arange(1.05, 64, 0.05), np.arange(64, 1024)])
    bound = orders / (2 * deviation**2) + np.log1p(-1 / orders) - (math.log(delta) + np.log(orders)) / (orders - 1)
    return float(bound.min())


@pytest.mark.parametrize(("target", "least", "most"), [(0.5, 1.08, 1.10), (1.0, 1.08, 1.09), (8.0, 1.055, 1.07)])
def test_skellam_noise_would_have_to_be_larger(target: float, least: float, most: float) -> None:
    """Why the noise is a discrete Gaussian: what README and PROTOCOL.md say of the alternative."""
    sigma = noise_multiplier(cohort_plan({"privacy.epsilon": target, "run.rounds": 1, "run.max_extra_attempts": 0}))
    assert skellam_epsilon(sigma * least, 1e-5) > target > skellam_epsilon(sigma * most, 1e-5)


def test_slack_is_taken_from_delta() -> None:
    event = SharedGaussian(1.0, 0.3, 1.0, 1, 1e-6)
    assert epsilon([event] * 5, 1e-5) == pytest.approx(epsilon([SampledGaussian(1.0, 1.0, 5)], 5e-6), rel=1e-9)
    assert epsilon([event] * 11, 1e-5) == math.inf
    assert SLACK * 100_000 < 1e-12


def test_samples_that_are_nearly_right_cost_more_of_delta_the_larger_epsilon_is() -> None:
    """t·(1 + e^ε) for a distance t: nothing at ε = 10, and no ε at all where e^ε·t reaches δ."""
    for sigma, exact in ((1.0, True), (0.25, True), (0.1, False)):
        plain = epsilon([SampledGaussian(sigma, 1.0, 1)], 1e-5)
        found = epsilon([SharedGaussian(sigma, sigma, 1.0, 1, 0.0)], 1e-5)
        assert (found == pytest.approx(plain, rel=1e-3)) is exact, (sigma, plain, found)
    assert found == math.inf


def test_participant_noise_is_never_sampled() -> None:
    plan = cohort_plan({"privacy.noise": "participant", "local.sampling_rate": 0.01, "cohort.size": 500})
    event = round_event(plan, 3.0)
    assert isinstance(event, SharedGaussian)
    assert event.sampling_rate == 1.0
    assert noise_multiplier(plan) == noise_multiplier(plan.revised({"local.sampling_rate": 1.0}))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"local.steps_per_round": 2}, "steps_per_round must be 1"),
        ({"local.optimizer": "adam"}, 'needs local.optimizer = "sgd"'),
        ({"local.momentum": 0.5}, "without momentum"),
        ({"secure_aggregation.mode": "off"}, "needs secure_aggregation"),
        ({"local.clip_norm": None}, "clip_norm is missing"),
        ({"privacy.noise": "participant", "evaluation.released_fraction": 0.1}, "released_fraction"),
        ({"cohort.size": 2}, 'needs privacy.noise = "site"'),
    ],
)
def test_plans_that_would_not_carry_the_guarantee_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(PlanError, match=says.replace("(", r"\(")):
        cohort_plan(changes)
