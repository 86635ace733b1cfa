"""Accounting against numbers that others computed, and the rules that every accountant obeys."""

from __future__ import annotations

import itertools
import math
from decimal import Context, Decimal

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant

from accord_shared.dp.accounting import (
    MIN_SIGMA,
    calibrate,
    epsilon,
    gaussian_epsilon,
    noise_multiplier,
    plan_epsilon,
    round_event,
)
from accord_shared.dp.events import SampledGaussian, event_from_json, merge
from accord_shared.errors import PlanError, UnknownMechanism
from conftest import plan_of

DELTA = 1e-5
ACCOUNTANTS = ("pld", "prv", "rdp")


@pytest.mark.parametrize(("accountant", "known"), [("pld", 7.047), ("prv", 7.057), ("rdp", 7.899)])
def test_the_known_case(accountant: str, known: float) -> None:
    margin = 6e-3 if accountant == "rdp" else 6e-4  # the orders of Opacus, whose number this is, are finer
    assert epsilon([SampledGaussian(1.0, 0.1, 100)], DELTA, accountant) == pytest.approx(known, abs=margin)


def test_the_case_where_the_central_limit_is_too_kind() -> None:
    assert epsilon([SampledGaussian(0.6, 0.01, 1000)], DELTA, "pld") > 0
    one = epsilon([SampledGaussian(0.6, 0.1, 10)], DELTA, "pld")
    assert one == pytest.approx(epsilon([SampledGaussian(0.6, 0.1, 10)], DELTA, "prv"), rel=0.02)


@pytest.mark.parametrize("sigma", [0.3, 0.5, 1.0, 3.0, 10.0, 100.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-9])
def test_one_gaussian_agrees_with_google_s_pld(sigma: float, delta: float) -> None:
    tool = PLDAccountant(value_discretization_interval=1e-4)
    tool.compose(dp_accounting.GaussianDpEvent(sigma))
    reference = tool.get_epsilon(delta)
    exact = gaussian_epsilon(sigma, delta)
    assert exact <= reference + 1e-6  # theirs is pessimistic
    assert exact == pytest.approx(reference, rel=2e-3, abs=2e-4)


@pytest.mark.parametrize("sigma", [0.05, 0.7, 5.0])
def test_the_gaussian_curve_holds_at_its_own_epsilon(sigma: float) -> None:
    from scipy.stats import norm

    eps = gaussian_epsilon(sigma, DELTA)
    if eps < 600:
        spent = norm.cdf(0.5 / sigma - eps * sigma) - math.exp(eps) * norm.cdf(-0.5 / sigma - eps * sigma)
        assert spent <= DELTA * (1 + 1e-6)
        assert spent == pytest.approx(DELTA, rel=1e-3)


@pytest.mark.parametrize(
    ("sigma", "rate", "steps"), [(0.8, 0.05, 60), (1.5, 0.2, 40), (4.0, 0.5, 30), (1.0, 0.01, 300)]
)
def test_prv_pld_and_rdp_agree(sigma: float, rate: float, steps: int) -> None:
    events = [SampledGaussian(sigma, rate, steps)]
    pld, prv, rdp = (epsilon(events, DELTA, name) for name in ACCOUNTANTS)
    assert prv == pytest.approx(pld, rel=0.01, abs=0.012)
    assert pld < rdp < 1.4 * pld


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_epsilon_moves_as_it_must(accountant: str) -> None:
    def cost(sigma: float, rate: float, steps: int, delta: float = DELTA) -> float:
        return epsilon([SampledGaussian(sigma, rate, steps)], delta, accountant)

    base = cost(1.0, 0.1, 20)
    assert cost(1.0, 0.1, 40) > base
    assert cost(1.2, 0.1, 20) < base
    assert cost(1.0, 0.2, 20) > base
    assert cost(1.0, 1.0, 20) > cost(1.0, 0.9, 20)
    assert cost(1.0, 0.1, 20, 1e-7) > base


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_unsampled_gaussians_compose_to_one(accountant: str) -> None:
    many = epsilon([SampledGaussian(3.0, 1.0, 36)], DELTA, accountant)
    split = epsilon([SampledGaussian(3.0, 1.0, 20), SampledGaussian(3.0, 1.0, 16)], DELTA, accountant)
    mixed = epsilon([SampledGaussian(3.0, 1.0, 27), SampledGaussian(1.0, 1.0, 1)], DELTA, accountant)
    one = epsilon([SampledGaussian(0.5, 1.0, 1)], DELTA, accountant)
    assert many == pytest.approx(one, rel=1e-9)
    assert split == many
    assert mixed == pytest.approx(one, rel=1e-9)


def test_the_fast_way_is_dp_accounting_s_composition() -> None:
    tool = PLDAccountant()
    tool.compose(dp_accounting.GaussianDpEvent(5.0), 30)
    assert epsilon([SampledGaussian(5.0, 1.0, 30)], DELTA) == pytest.approx(tool.get_epsilon(DELTA), rel=2e-3)


def test_order_and_grouping_do_not_matter() -> None:
    one, two = SampledGaussian(1.0, 0.1, 3), SampledGaussian(2.0, 0.3, 5)
    whole = epsilon([SampledGaussian(1.0, 0.1, 6), two], DELTA)
    for order in itertools.permutations([one, two, one]):
        assert epsilon(order, DELTA) == pytest.approx(whole, rel=1e-9)
    assert merge([one, two, one]) == (SampledGaussian(1.0, 0.1, 6), two)
    assert epsilon([one, two], DELTA) > max(epsilon([one], DELTA), epsilon([two], DELTA))
    assert epsilon([], DELTA) == 0.0


@pytest.mark.parametrize(
    ("target", "rate", "steps", "accountant"),
    [
        (8.0, 1.0, 100, "pld"),
        (1.0, 1.0, 100, "pld"),
        (0.1, 1.0, 1, "pld"),
        (0.01, 1.0, 10, "pld"),
        (3.0, 0.1, 50, "pld"),
        (3.0, 0.1, 50, "rdp"),
        (3.0, 0.1, 20, "prv"),
        (1.0, 1.0, 40, "rdp"),
    ],
)
def test_calibration_never_exceeds_its_target_and_is_tight(
    target: float, rate: float, steps: int, accountant: str
) -> None:
    sigma = calibrate(target, DELTA, rate, steps, accountant)

    def spent(multiplier: Decimal) -> float:
        return epsilon([SampledGaussian(float(multiplier), rate, steps)], DELTA, accountant)

    written = Decimal(repr(sigma))
    assert len(written.as_tuple().digits) <= 4
    assert target * (1 - 2e-3) <= spent(written) <= target
    assert spent(Context(prec=4).next_minus(written)) > target  # the least: whoever searches otherwise finds it too


def test_a_plan_may_name_its_noise_if_its_epsilon_bears_it() -> None:
    """For parties whose accountants differ in a last digit: nobody searches, everybody checks."""
    found = noise_multiplier(plan_of())
    named = {"privacy.noise_multiplier": found}
    assert noise_multiplier(plan_of(named)) == found
    assert noise_multiplier(plan_of({"privacy.noise_multiplier": 2 * found})) == 2 * found
    less = float(Context(prec=4).next_minus(Decimal(repr(found))))
    with pytest.raises(PlanError, match="would spend more"):
        noise_multiplier(plan_of({"privacy.noise_multiplier": less}))
    with pytest.raises(PlanError, match="contradicts"):
        plan_of({"privacy.noise": "none", "privacy.epsilon": None, **named})


def test_a_target_out_of_reach_is_refused() -> None:
    with pytest.raises(PlanError, match="too small to train"):
        calibrate(1e-9, 1e-12, 1.0, 1000)
    with pytest.raises(PlanError, match="too small to train"):
        noise_multiplier(plan_of({"privacy.epsilon": 1e-9, "privacy.delta": 1e-12}))


def test_a_generous_target_still_has_noise() -> None:
    assert calibrate(1e6, DELTA, 1.0, 1) == MIN_SIGMA


@pytest.mark.parametrize(
    "parts",
    [
        (0.0, 0.5, 1),
        (-1.0, 0.5, 1),
        (math.nan, 0.5, 1),
        (math.inf, 1.0, 1),
        (1.0, 0.0, 1),
        (1.0, 1.1, 1),
        (1.0, math.nan, 1),
        (1.0, 0.5, 0),
        (1.0, 0.5, -3),
        (1.0, 0.5, 1.5),
    ],
)
def test_events_without_a_guarantee_are_refused(parts: tuple[float, float, int]) -> None:
    with pytest.raises(UnknownMechanism):
        SampledGaussian(*parts)


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"kind": "laplace", "noise_multiplier": 1.0, "sampling_rate": 1.0, "steps": 1},
        {"kind": "sampled_gaussian", "noise_multiplier": 1.0, "sampling_rate": 1.0},
        {"kind": "sampled_gaussian", "noise_multiplier": 1.0, "sampling_rate": 1.0, "steps": 1, "more": 1},
        {"kind": "sampled_gaussian", "noise_multiplier": "1", "sampling_rate": 1.0, "steps": 1},
    ],
)
def test_unknown_events_are_refused(value: dict[str, object]) -> None:
    with pytest.raises(UnknownMechanism):
        event_from_json(value)


def test_events_round_trip() -> None:
    event = SampledGaussian(1.25, 0.1, 7)
    assert event_from_json(event.to_json()) == event


def test_strangers_are_refused() -> None:
    with pytest.raises(UnknownMechanism):
        epsilon(["gaussian"], DELTA)  # type: ignore[list-item]
    with pytest.raises(UnknownMechanism):
        epsilon([SampledGaussian(1.0, 1.0, 1)], DELTA, "gdp")


def test_a_plan_spends_what_it_says_and_no_more() -> None:
    plan = plan_of({"local.steps_per_round": 3, "run.rounds": 5})
    event = round_event(plan, noise_multiplier(plan))
    assert event is not None
    assert event.steps == 3
    costs = [plan_epsilon(plan, rounds) or 0.0 for rounds in range(6)]
    assert costs[0] == 0.0
    assert costs == sorted(costs)
    assert 8.0 * (1 - 2e-3) <= costs[-1] <= 8.0


def test_rounds_of_one_site_set_the_noise() -> None:
    few = plan_of({"run.rounds": 100, "run.rounds_per_site": 4})
    assert noise_multiplier(few) == noise_multiplier(plan_of())
    assert noise_multiplier(few) < noise_multiplier(plan_of({"run.rounds": 100}))


def test_without_noise_there_is_no_epsilon_to_tell() -> None:
    plan = plan_of({"privacy.noise": "none", "privacy.epsilon": None})
    assert noise_multiplier(plan) == 0.0
    assert round_event(plan, 0.0) is None
    with pytest.raises(UnknownMechanism):  # a plan that promises noise and a site that has none
        round_event(plan_of(), 0.0)
    assert plan_epsilon(plan, 4) is None
