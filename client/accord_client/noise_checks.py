"""Tests of a run's randomness: noise of its releases, all that is known subtracted, and who was sampled.

Noise is an array [releases, d] of rounds, attempts, sites and runs, in any unit. A test's limit is the normal quantile
at `FALSE_ALARM`, shared among all that the test looks at (Bonferroni); normal approximations are off by less than a
factor of a hundred there from 10,000 values on, so a right mechanism fails a test in one of a million runs at most.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

FALSE_ALARM = 1e-8
"""Of one test, by the normal approximation."""
_PAIR_RELEASES = 8


@dataclass(frozen=True)
class Check:
    """One test: a `statistic` that is within ±`limit` where all is right."""

    name: str
    statistic: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the statistic is within its limit."""
        return bool(abs(self.statistic) <= self.limit)


def _limit(tests: int) -> float:
    return -NormalDist().inv_cdf(FALSE_ALARM / (2.0 * max(1, tests)))


def variance(noise: Array, sigma: float) -> Check:
    """Standard deviation `sigma` of all values: 400,000 tell 1.5 % of σ, n values √(400,000/n) times that."""
    values = np.asarray(noise, dtype=np.float64).ravel() / sigma
    return Check("variance", float((np.square(values).mean() - 1.0) * math.sqrt(len(values) / 2.0)), _limit(1))


def mean(noise: Array, sigma: float) -> Check:
    """Mean 0."""
    values = np.asarray(noise, dtype=np.float64).ravel() / sigma
    return Check("mean", float(values.mean() * math.sqrt(len(values))), _limit(1))


def across(noise: Array) -> Check:
    """No two releases have noise in common: correlations of all rows, and of their squares (signs may be changed)."""
    rows = _standardised(noise)
    worst = max((_worst_pair(part) for part in (rows, _standardised(np.square(rows)))), key=abs)
    return Check("noise of two releases", worst, _limit(len(rows) * (len(rows) - 1)))


def _worst_pair(rows: Floats) -> float:
    products = rows @ rows.T / math.sqrt(rows.shape[1])
    pairs = products[np.triu_indices(len(rows), 1)]
    return float(pairs[np.argmax(np.abs(pairs))]) if len(pairs) else 0.0


def within(noise: Array) -> Check:
    """No two coordinates of a release have noise in common, at any distance or mirrored, sign changed or not."""
    rows = _standardised(noise)
    worst = max((_worst_lag(part) for part in (rows, _standardised(np.square(rows)))), key=abs)
    return Check("noise of two coordinates", worst, _limit(4 * rows.shape[1]))


def _worst_lag(rows: Floats) -> float:
    """The most extreme z of all circular lags and all reflections, over all releases together."""
    releases, width = rows.shape
    lags, mirrors = np.zeros(width), np.zeros(width)
    for row in rows:
        spectrum = np.fft.rfft(row)
        lags += np.fft.irfft(np.abs(spectrum) ** 2, n=width)
        mirrors += np.fft.irfft(spectrum**2, n=width)
        np.subtract.at(mirrors, 2 * np.arange(width) % width, np.square(row))  # a coordinate with itself
    found = lags[1 : width // 2 + 1] / math.sqrt(releases * width)
    if width % 2 == 0:
        found[-1] /= math.sqrt(2.0)  # half way round every pair is met twice
    both = np.concatenate([found, mirrors / math.sqrt(2.0 * releases * width)])
    return float(both[np.argmax(np.abs(both))])


def periodic(noise: Array) -> Check:
    """No frequency stands out: the largest ordinate of all periodograms, exponential where noise is white."""
    rows = _standardised(noise)
    ordinates = np.abs(np.fft.rfft(rows, axis=1)[:, 1:-1]) ** 2 / rows.shape[1]
    return Check("a frequency", float(ordinates.max()), math.log(ordinates.size / FALSE_ALARM))


def pairs(noise: Array) -> Check:
    """No two coordinates follow each other through all releases, up to sign, wherever they are.

    The statistic is how many do, the limit what grids and chance explain. Looks at 8 releases; with fewer than 4
    nothing can be told.
    """
    from scipy.spatial import cKDTree
    from scipy.stats import poisson

    rows = np.atleast_2d(np.asarray(noise, dtype=np.float64))[:_PAIR_RELEASES]
    rows = rows / np.maximum(rows.std(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    releases, width = rows.shape
    if releases < _PAIR_RELEASES // 2:
        return Check("coordinates that go together", 0.0, 0.0)
    columns = (rows * np.where(rows[0] < 0, -1.0, 1.0)).T
    near = 2.0**-releases / math.gamma(releases / 2 + 1)  # P(|X - Y| < r) ≤ near · r^releases for normal X, Y
    radius = (FALSE_ALARM / (width**2 * near)) ** (1.0 / releases)
    by_chance = float(width**2 * np.prod([_share_near(row, radius) for row in columns.T]))
    distances, _ = cKDTree(columns).query(columns, k=2, distance_upper_bound=radius)
    limit = float(2.0 * poisson.isf(FALSE_ALARM, by_chance))
    return Check("coordinates that go together", float(np.isfinite(distances[:, 1]).sum()), limit)


def _share_near(values: Floats, radius: float) -> float:
    """The share of pairs of `values` within `radius` of each other."""
    ordered = np.sort(values)
    ends = np.searchsorted(ordered, ordered + radius, side="right") - np.arange(1, len(values) + 1)
    return float(2.0 * ends.sum() / (len(values) * (len(values) - 1)))


def _standardised(noise: Array) -> Floats:
    rows = np.atleast_2d(np.asarray(noise, dtype=np.float64))
    rows = rows - rows.mean(axis=1, keepdims=True)
    spread: Floats = rows / np.maximum(rows.std(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    return spread


def noise_checks(noise: Array, sigma: float) -> tuple[Check, ...]:
    """All tests of `noise` [releases, d] that is promised to be independent N(0, `sigma`²)."""
    return (
        variance(noise, sigma),
        mean(noise, sigma),
        across(noise),
        within(noise),
        periodic(noise),
        pairs(noise),
    )


def sampling_checks(included: Array, rate: float) -> tuple[Check, ...]:
    """Units [rounds, n] are sampled by independent coins of `rate`: all, by unit, by round, over rounds that follow."""
    coins = np.asarray(included, dtype=np.float64)
    rounds, units = coins.shape
    if rate in (0.0, 1.0):
        return (Check("sampling rate", float(np.abs(coins - rate).sum()), 0.0),)
    scaled = (coins - rate) / math.sqrt(rate * (1.0 - rate))
    found = [("sampling rate", float(scaled.sum()) / math.sqrt(scaled.size))]
    for name, axis, length in (("sampling rate by unit", 0, rounds), ("sampling rate by round", 1, units)):
        sums = scaled.sum(axis=axis)
        found.append((name, float((np.square(sums) / length - 1.0).sum()) / math.sqrt(2.0 * len(sums))))
    if rounds > 1:
        follow = float((scaled[1:] * scaled[:-1]).sum())
        found.append(("samples of two rounds", follow / math.sqrt((rounds - 1) * units)))
    return tuple(Check(name, value, _limit(1) * 1.5) for name, value in found)


def rate_check(excess: float, error: float) -> Check:
    """A measured sampling rate: its `excess` over the promised one, with its standard `error`."""
    return Check("sampling rate", excess / max(error, 1e-12), _limit(1))
