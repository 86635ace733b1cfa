"""The discrete Gaussian: exact tables, sums that are closed, privacy of a continuous one, samples that fit."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2, norm

from accord_shared.dp.discrete import (
    LEAST_VARIANCE,
    ROUNDING_VARIANCE,
    DiscreteGaussian,
    _centred_table,
    _levels,
    _rounding_table,
    _Table,
    _thresholds,
    round_to_integers,
    smoothing_error,
)
from accord_shared.dp.noise import SecureGenerator
from accord_shared.errors import PrivacyError

Floats = npt.NDArray[np.float64]
SEED = bytes(range(32))


def mass(centre: float, variance: float, reach: int) -> Floats:
    """P(k), k = -reach..reach, of D(centre, variance), from its definition."""
    k = np.arange(-reach, reach + 1)
    weights = np.exp(-((k - centre) ** 2) / (2 * variance))
    return weights / weights.sum()


# --- tables: the distribution that is sampled is computed, not estimated


@pytest.mark.parametrize(("centre", "variance"), [(0, 9), (Fraction(1, 256), 9), (Fraction(255, 256), 9), (0, 441)])
def test_thresholds_are_the_distribution_function_to_144_bits(centre: Fraction, variance: int) -> None:
    mpmath = pytest.importorskip("mpmath")
    mpmath.mp.prec = 300
    reach = math.ceil(13.6 * math.sqrt(variance)) + 2
    made = _thresholds(Fraction(centre), Fraction(variance), -reach, reach)
    c = mpmath.mpf(Fraction(centre).numerator) / Fraction(centre).denominator
    weights = [mpmath.exp(-((k - c) ** 2) / (2 * variance)) for k in range(-reach, reach + 1)]
    partial, total = mpmath.mpf(0), mpmath.fsum(weights)
    for threshold, weight in zip(made, weights, strict=False):
        partial += weight
        assert abs(threshold - partial / total * 2**144) < 1
    assert made == sorted(made)


def test_a_table_answers_every_uniform_number_as_its_thresholds_say() -> None:
    """All 16-bit cells, and of those that do not decide the numbers on either side of every threshold."""
    reach = 45
    thresholds = _thresholds(Fraction(0), Fraction(9), -reach, reach)
    table = _Table(-reach, [thresholds], 16)
    for threshold in thresholds[20:70]:
        for number in (threshold - 1, threshold, threshold + 1):
            cell, rest = number >> 128, number & (2**128 - 1)
            expected = sum(t <= number for t in thresholds) - reach
            assert table.outcomes[cell] in (expected, -(1 << 15))
            bits = np.array([[rest >> 64, rest & (2**64 - 1)]], dtype=np.uint64)
            assert table.decide(np.array([cell]), bits)[0] == expected
    decided = np.flatnonzero(table.outcomes != -(1 << 15))
    for cell in decided[:: len(decided) // 200].tolist():
        assert table.outcomes[cell] == sum(t <= cell << 128 for t in thresholds) - reach


def test_rounding_tables_answer_as_their_thresholds_say() -> None:
    table, reach = _rounding_table(), 42
    for f in (0, 1, 100, 255):
        thresholds = _thresholds(Fraction(f, 256), ROUNDING_VARIANCE, -reach, reach + 1)
        for threshold in thresholds[30:55]:
            cell, rest = threshold >> 134, (threshold & (2**134 - 1)) >> 6
            bits = np.array([[rest >> 64, rest & (2**64 - 1)]], dtype=np.uint64)
            found = int(table.decide(np.array([f * 1024 + cell]), bits)[0])
            assert found == sum(t >> 6 <= threshold >> 6 for t in thresholds) - reach


# --- theory, checked by exact sums


@pytest.mark.parametrize(("first", "second"), [(9, 9), (9, 400), (12.25, 30)])
@pytest.mark.parametrize("centre", [0.0, 0.37, 0.5])
def test_sums_are_discrete_gaussian(first: float, second: float, centre: float) -> None:
    reach = 400
    convolved = np.convolve(mass(centre, first, reach), mass(0.0, second, reach), mode="same")
    direct = mass(centre, first + second, reach)
    inside = np.abs(np.arange(-reach, reach + 1)) < 120
    apart = np.abs(np.log(convolved[inside]) - np.log(direct[inside]))
    assert apart.max() < smoothing_error(Fraction(first), Fraction(second)) + 1e-11


def test_sums_of_rough_noise_are_not() -> None:
    """Below a step the claim is false, and the bound says so: variance 0.16 twice."""
    convolved = np.convolve(mass(0.25, 0.16, 20), mass(0.0, 0.16, 20), mode="same")
    apart = np.abs(np.log(convolved[18:23]) - np.log(mass(0.25, 0.32, 20)[18:23])).max()
    assert 0.1 < apart < smoothing_error(Fraction("0.16"), Fraction("0.16"))


def gaussian_delta(epsilon: float, shift: float, sigma: float) -> float:
    """δ(ε) of a Gaussian (Balle and Wang 2018, Theorem 8)."""
    mu = shift / sigma
    return float(norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu))


@pytest.mark.parametrize("shift", [(2.5,), (1.0,), (1.5, 2.0), (0.25, 0.75)])
@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0, 3.0])
def test_privacy_is_that_of_a_continuous_gaussian_of_four_less_variance(
    shift: tuple[float, ...], epsilon: float
) -> None:
    """The hockey-stick divergence by summation, of centres between integers in one and two dimensions."""
    variance, reach, base = 34.0, 70, 0.3
    at = [mass(base, variance, reach) for _ in shift]
    moved = [mass(base + step, variance, reach) for step in shift]
    first = at[0] if len(shift) == 1 else np.outer(*at).ravel()
    second = moved[0] if len(shift) == 1 else np.outer(*moved).ravel()
    length = math.hypot(*shift)
    for one, other in ((first, second), (second, first)):
        delta = float(np.maximum(one - math.exp(epsilon) * other, 0.0).sum())
        assert delta <= gaussian_delta(epsilon, length, math.sqrt(variance - 4)) + 1e-12
        assert delta >= gaussian_delta(epsilon, length, math.sqrt(variance)) * 0.95 - 1e-12  # and not much less is lost


# --- samples


def fits(values: npt.NDArray[np.int64], centre: float, variance: float) -> bool:
    """Chi-square of the counts against D at the 1e-6 level; outcomes that are expected less than 20 times together."""
    reach = math.ceil(9 * math.sqrt(variance)) + 2
    expected = mass(centre, variance, reach) * len(values)
    counts = np.bincount(np.clip(values + reach, 0, 2 * reach), minlength=2 * reach + 1)
    width = max(1, int(math.sqrt(variance) // 8))
    edges = np.arange(0, 2 * reach + 1, width)
    observed, due = np.add.reduceat(counts, edges), np.add.reduceat(expected, edges)
    rare = due < 20
    pooled = np.append(due[~rare], due[rare].sum()), np.append(observed[~rare], observed[rare].sum())
    statistic = float(((pooled[1] - pooled[0]) ** 2 / pooled[0]).sum())
    return statistic < float(chi2.ppf(1 - 1e-6, len(pooled[0]) - 1))


@pytest.mark.parametrize("deviation", [3, 5.5, 100, 250, 300, 2_000, 40_000])
def test_samples_fit_and_tell_wrong_variances(deviation: float) -> None:
    variance = Fraction(deviation).limit_denominator() ** 2
    values = DiscreteGaussian(variance).sample(SEED, 300_000)
    assert fits(values, 0.0, float(variance))
    assert not fits(values, 0.0, float(variance) * 4 / 9)
    assert not fits(values, 0.0, float(variance) * 9 / 4)
    assert not fits(values, 0.0, float(variance) * 0.97)
    assert not fits(values, float(deviation) / 20, float(variance))


@pytest.mark.parametrize("centre", [0, 1, 77, 128, 255, 256 * 1000 + 3, -256 * 7 - 200])
def test_rounding_fits_its_centre(centre: int) -> None:
    words = np.zeros(200_000, dtype=np.uint32)
    round_to_integers(np.full(len(words), centre, dtype=np.int64), words, SecureGenerator(SEED))
    values = words.view(np.int32).astype(np.int64)
    whole = centre // 256
    assert fits(values - whole, centre / 256 - whole, 9.0)
    assert not fits(values - whole, centre / 256 - whole + 0.1, 9.0)


@given(st.integers(0, 2**32 - 1), st.sampled_from([9, 40, 70_000]), st.integers(0, 500))
@settings(max_examples=30, deadline=None)
def test_adding_and_taking_away_leave_nothing(start: int, variance: int, count: int) -> None:
    noise = DiscreteGaussian(Fraction(variance))
    for kind in (np.uint16, np.uint32, np.uint64):
        words = np.full(count, start, dtype=np.uint64).astype(kind)
        before = words.copy()
        noise.add(words, SEED)
        noise.add(words, SEED, negative=True)
        np.testing.assert_array_equal(words, before)


def test_widths_agree_and_chunks_do_not_show() -> None:
    noise = DiscreteGaussian(Fraction(10_000))
    long = noise.sample(SEED, 300_000)
    for kind, signed in ((np.uint16, np.int16), (np.uint32, np.int32)):
        words = np.zeros(300_000, dtype=kind)
        noise.add(words, SEED)
        np.testing.assert_array_equal(words.view(signed), long)
    assert np.std(long) == pytest.approx(100, rel=0.01)


def test_another_seed_or_part_is_another_sample() -> None:
    noise = DiscreteGaussian(Fraction(400))
    one, two = noise.sample(SEED, 50_000), noise.sample(bytes(32), 50_000)
    assert abs(np.corrcoef(one, two)[0, 1]) < 5 / math.sqrt(50_000)
    parts = [part for _, part in _levels(Fraction(10**8))]
    assert len(parts) == 2
    levels = sum(step**2 * part for step, part in _levels(Fraction(10**8)))
    assert levels == 10**8
    assert all(part >= LEAST_VARIANCE for part in parts)


def test_frozen_samples() -> None:
    """PROTOCOL.md, section 13: a second implementation expands this seed to these values."""
    assert DiscreteGaussian(Fraction(81)).sample(SEED, 8).tolist() == FROZEN["81"]
    assert DiscreteGaussian(Fraction(10**8)).sample(SEED, 8).tolist() == FROZEN["10^8"]
    assert _centred_table(Fraction(81)).undecided < 0.01


FROZEN: dict[str, list[int]] = {
    "81": [1, 5, -5, 8, 15, -2, -8, 0],
    "10^8": [5597, 544, -15091, -11995, 4965, 8128, 18356, 4041],
}


@pytest.mark.parametrize("variance", [Fraction(0), Fraction(8), Fraction(-9)])
def test_rough_noise_is_refused(variance: Fraction) -> None:
    with pytest.raises(PrivacyError):
        DiscreteGaussian(variance)


def test_a_seed_has_32_bytes() -> None:
    with pytest.raises(PrivacyError, match="seed of 16 bytes"):
        DiscreteGaussian(Fraction(9)).add(np.zeros(4, dtype=np.uint32), bytes(16))
