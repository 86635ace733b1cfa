"""A unit with records at two sites: the third ε, against computations that share nothing with the product's."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from accord_shared.dp.accounting import (
    epsilon,
    epsilon_at_two_sites,
    gaussian_epsilon,
    noise_multiplier,
    unit_epsilon_at_two_sites,
)
from accord_shared.dp.events import SampledGaussian, SharedGaussian
from accord_simulations.run import _Charges
from conformance.secure_lab import secure_lab_plan

DELTA = 1e-5


def shared(sigma: float, rate: float = 1.0, steps: int = 1) -> SharedGaussian:
    return SharedGaussian(sigma, sigma, rate, steps, 0.0)


@pytest.mark.parametrize(("one", "two"), [(1.0, 2.155), (3.0, 6.71), (8.0, 19.1)])
def test_twice_the_sensitivity(one: float, two: float) -> None:
    """Composition would say less: 1.46, 4.5, 12.6."""
    sigma = float(brentq(lambda s: gaussian_epsilon(s, DELTA) - one, 0.1, 50))
    found = epsilon_at_two_sites([shared(sigma)], DELTA)
    assert found == pytest.approx(two, rel=2e-3)
    assert found > epsilon([SampledGaussian(sigma, 1.0, 2)], DELTA)
    delta = norm.cdf(1 / sigma - found * sigma / 2) - math.exp(found) * norm.cdf(-1 / sigma - found * sigma / 2)
    assert delta == pytest.approx(DELTA, rel=1e-3)  # of a shift by 2 under N(0, σ²), by its closed form


def losses(sigma: float, rate: float, steps: int, *, add: bool) -> tuple[Any, Any]:
    """Loss and probability of `steps` steps on a fine grid of outcomes and of losses, by convolution."""
    x = np.linspace(-14 * sigma, 2 + 14 * sigma, 100_001)
    odds = np.array([(1 - rate) ** 2, 2 * rate * (1 - rate), rate**2])
    with_unit = sum(odd * norm.pdf(x, shift, sigma) for odd, shift in zip(odds, (0, 1, 2), strict=True))
    without = norm.pdf(x, 0, sigma)
    upper, lower = (with_unit, without) if add else (without, with_unit)
    mass, loss = upper * (x[1] - x[0]), np.log(upper / lower)
    grid = 1e-3
    index = np.round(loss / grid).astype(int)
    low = int(index.min())
    one = np.bincount(index - low, weights=mass)
    size = 1 << int(np.ceil(np.log2(steps * len(one))))
    whole = np.fft.irfft(np.fft.rfft(one, size) ** steps, size)[: steps * (len(one) - 1) + 1]
    return (np.arange(len(whole)) + steps * low) * grid, np.maximum(whole, 0.0)


@pytest.mark.parametrize(("sigma", "rate", "steps"), [(2.0, 0.2, 6), (4.0, 0.5, 8)])
def test_under_sampling_it_is_the_mixture_s(sigma: float, rate: float, steps: int) -> None:
    """Each site samples by a coin of its own: 0, 1 or 2 times the clip norm."""
    found = epsilon_at_two_sites([shared(sigma, rate, steps)], DELTA)
    deltas = []
    for add in (True, False):
        loss, mass = losses(sigma, rate, steps, add=add)
        above = loss > found
        deltas.append(float(np.sum(mass[above] * -np.expm1(found - loss[above]))))
    assert max(deltas) == pytest.approx(DELTA, rel=0.03)
    once = epsilon([SampledGaussian(sigma, rate, steps)], DELTA)
    assert once < found < epsilon_at_two_sites([shared(sigma, 1.0, steps)], DELTA)


def test_it_is_within_what_group_privacy_says() -> None:
    """(2ε, (1 + e^ε)·δ) holds of any mechanism, so the figure at that δ is below 2ε."""
    for sigma, rate, steps in ((3.0, 1.0, 1), (4.0, 0.3, 10)):
        one = epsilon([SampledGaussian(sigma, rate, steps)], DELTA)
        assert epsilon_at_two_sites([shared(sigma, rate, steps)], (1 + math.exp(one)) * DELTA) <= 2 * one


def test_noise_of_each_site_s_own_composes() -> None:
    events = [SampledGaussian(2.0, 1.0, 3)]
    assert epsilon_at_two_sites(events, DELTA) == pytest.approx(epsilon([SampledGaussian(2.0, 1.0, 6)], DELTA))


@pytest.mark.parametrize("noise", ["site", "cohort", "participant", "none"])
@pytest.mark.parametrize("unit", ["row", "column:customer"])
def test_it_is_told_where_a_unit_can_lie_at_two_sites(noise: str, unit: str) -> None:
    changes: dict[str, Any] = {"privacy.noise": noise, "task.unit": unit}
    plan = secure_lab_plan(**changes, **({"privacy.epsilon": None} if noise == "none" else {}))
    found = unit_epsilon_at_two_sites(plan)
    assert (found is not None) == (unit != "row" and noise in ("site", "cohort"))
    if found is not None:
        assert found > (plan.privacy.epsilon or 0)
        assert noise_multiplier(plan) > 0


class Ledgers:
    """Participants whose ledgers say what was charged."""

    def __init__(self, charged: dict[str, int]) -> None:
        self.charged, self.read = charged, 0
        people = [SimpleNamespace(name=name) for name in charged]
        self.prepared: Any = SimpleNamespace(
            work=self, plan=SimpleNamespace(hash="h"), population=SimpleNamespace(participants=people)
        )

    def store(self, index: int) -> Any:
        self.read += 1
        count = list(self.charged.values())[index]
        return SimpleNamespace(releases=lambda _: SimpleNamespace(rounds=count))


def test_the_curve_counts_charges_and_not_rounds_that_survived() -> None:
    """Three attempts in vain are three charges: 1.89 was spent where the curve said 1.51."""
    ledgers = Ledgers({"a": 0, "b": 0, "c": 0})
    charges = _Charges(ledgers.prepared)
    for number in (1, 2):
        charges.note(("a", "b", "c"), 1)
        ledgers.charged = dict.fromkeys("abc", number)
        assert charges.most() == number
    assert not ledgers.read
    charges.note(("a", "b"), 4)
    ledgers.charged = {"a": 6, "b": 6, "c": 5}
    assert charges.most() == 6
    charges.note(("a", "b"), 1)  # c's upload was lost after its charge
    ledgers.charged = {"a": 7, "b": 7, "c": 6}
    assert charges.most() == 7
    charges.note(("a",), 1)
    ledgers.charged = {"a": 8, "b": 7, "c": 6}
    assert charges.most() == 8
    charges.note((), 3)  # forfeited
    ledgers.charged = {"a": 8, "b": 10, "c": 6}
    assert charges.most() == 10
