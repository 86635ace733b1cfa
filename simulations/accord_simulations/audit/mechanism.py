"""Is a run's mechanism the one that is accounted for? Tests of its noise and of its sampling, with all data known."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from accord_client.noise_checks import Check, noise_checks, rate_check
from accord_shared.dp.sharing import NoiseShares
from accord_shared.plan import Plan
from accord_simulations.audit.federation import Array, Release, gradient_sum
from accord_simulations.audit.gradients import Floats, Records
from accord_simulations.audit.one_run import Coins
from accord_simulations.audit.planting import Canaries
from accord_simulations.audit.prepared import clip_norm_of

_MOST_RELEASES = 64
_MOST_EXCESS = 0.01
"""How much more noise than is accounted for the integers of shared noise may cost, of σ."""

_RATE_ERROR = 1e-3
"""Of the rate, for arithmetic in single precision."""


class Mechanism:
    """Collects the noise of releases, in standard deviations, and how much of all records' sum is in it.

    Under `cohort` noise the sites' sums before noise are known to the harness. Under `site` noise they are computed,
    which needs that all records are in every sum (q = 1): else only sampling is tested.
    """

    def __init__(self, plan: Plan, noise_multiplier: float, canaries: Canaries, others: dict[str, Records]) -> None:
        self._plan, self._sigma, self._others = plan, noise_multiplier, others
        self._numbers = {name: number for number, name in enumerate(others)}
        self._members, self._site = canaries.members, canaries.site
        units = np.arange(len(canaries.labels), dtype=np.int64)
        self._canaries = Records(canaries.features, canaries.labels, units)
        self._noise: list[npt.NDArray[np.float32]] = []
        self._rates: list[tuple[float, float]] = []

    def see(self, release: Release) -> None:
        """Take one round's release into account."""
        weights = release.weights.reshape(-1, self._canaries.features.shape[1])
        _, gradients = self._canaries.clipped(weights, clip_norm_of(self._plan))
        for sites, total in release.sums:
            known = np.sum([release.unnoised[site] for site in sites], axis=0) if release.unnoised else None
            self._rates.append(self._rate(gradients, sites, total if known is None else known, weights, known is None))
            if len(self._noise) >= _MOST_RELEASES:
                continue
            if known is not None:
                self._noise.append(((total - known) / self._shared_sigma(len(total), len(sites))).astype(np.float32))
            elif self._plan.local.sampling_rate == 1.0:
                rest = gradient_sum(self._plan, total, weights.shape) - self._signal(gradients, sites, weights)
                self._noise.append(rest.ravel() / np.float32(self._sigma * clip_norm_of(self._plan)))

    def checks(self) -> tuple[Check, ...]:
        """All tests of what was seen."""
        excess, error = np.array(self._rates).T
        rate = rate_check(float(excess.mean()), math.hypot(float(np.linalg.norm(error)) / len(error), _RATE_ERROR))
        return (*(noise_checks(np.stack(self._noise), 1.0) if self._noise else ()), rate)

    def _shared_sigma(self, dimension: int, survivors: int) -> float:
        """Standard deviation of the sum's noise, in units of an update, from the plan's own numbers."""
        local, shares = self._plan.local, NoiseShares.of(self._plan, dimension, self._sigma)
        unit = clip_norm_of(self._plan) * local.learning_rate / local.expected_batch
        excess = min(max(float(shares.excess), 0.0), _MOST_EXCESS)
        return self._sigma * unit * (1.0 + excess) * math.sqrt(survivors / (survivors - self._plan.cohort.colluders))

    def _here(self, sites: tuple[str, ...]) -> Coins:
        """The canaries [m] that are records of `sites`."""
        return self._members & np.isin(self._site, [self._numbers[name] for name in sites])

    def _signal(self, gradients: Floats, sites: tuple[str, ...], weights: Floats) -> Floats:
        """The clipped sum [L, d] of all records of `sites`."""
        total = self._canaries.total(gradients * self._here(sites)[:, None])
        for name in sites:
            total = total + self._others[name].total(self._others[name].clipped(weights, clip_norm_of(self._plan))[1])
        return total

    def _rate(
        self, gradients: Floats, sites: tuple[str, ...], total: Array, weights: Floats, noised: bool
    ) -> tuple[float, float]:
        """(sampling rate beyond the plan's, its standard error): the sum along what it would be if all were in it."""
        rate, clip_norm = self._plan.local.sampling_rate, clip_norm_of(self._plan)
        whole = self._signal(gradients, sites, weights)
        along = [self._canaries.project(gradients, whole)[self._here(sites)]]
        for name in sites:
            records = self._others[name]
            products = records.project(records.clipped(weights, clip_norm)[1], whole)
            along.append(np.asarray(np.bincount(records.units, weights=products), dtype=np.float64))
        size = float(np.square(whole, dtype=np.float64).sum())
        found = float(np.vdot(gradient_sum(self._plan, total, weights.shape), whole)) / size
        coins = rate * (1.0 - rate) * float(np.square(np.concatenate(along)).sum())
        noise = (self._sigma * clip_norm) ** 2 * size if noised else 0.0
        return found - rate, math.sqrt(coins + noise) / size
