"""What an attacker computes for itself: clipped gradients of a linear head, written out again, without the product's.

For weights W [L, d] a record with features x [d] and label y has the gradient r xᵀ, r = softmax(W x) - e_y [L].
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
_NONE = np.finfo(np.float32).tiny


@dataclass(frozen=True)
class Records:
    """Known records: features [n, d] fp32, labels [n], privacy unit [n] of each."""

    features: Floats
    labels: Integers
    units: Integers

    def residuals(self, weights: Floats) -> Floats:
        """r [n, L] of each record at `weights` [L, d]."""
        scores = self.features @ weights.T
        scores -= scores.max(axis=1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=1, keepdims=True)
        scores[np.arange(len(scores)), self.labels] -= 1.0
        return scores

    def clipped(self, weights: Floats, clip_norm: float) -> tuple[Floats, Floats]:
        """r [n, L] before clipping, and scaled so that each unit's gradient has norm ≤ C."""
        residuals = self.residuals(weights)
        norms = np.sqrt(np.maximum(self._squared_norms(residuals), _NONE))
        return residuals, residuals * np.minimum(1.0, clip_norm / norms)[self.units, None]

    def _squared_norms(self, residuals: Floats) -> npt.NDArray[np.float64]:
        """‖Σ r xᵀ‖² [units] from the products of the rows that share a unit."""
        first, second, products = self._pairs
        terms = np.einsum("ij,ij->i", residuals[first], residuals[second]) * products
        return np.bincount(self.units[first], weights=terms).astype(np.float64)

    @cached_property
    def _single(self) -> bool:
        return len(np.unique(self.units)) == len(self.units)

    @cached_property
    def _pairs(self) -> tuple[Integers, Integers, npt.NDArray[np.float64]]:
        """Rows of all ordered pairs within a unit, and the products of their features."""
        every = np.arange(len(self.units), dtype=np.int64)
        if self._single:
            return every, every, np.einsum("ij,ij->i", self.features, self.features).astype(np.float64)
        groups = [np.flatnonzero(self.units == unit) for unit in np.unique(self.units)]
        first = np.concatenate([np.repeat(group, len(group)) for group in groups])
        second = np.concatenate([np.tile(group, len(group)) for group in groups])
        return first, second, np.einsum("ij,ij->i", self.features[first], self.features[second]).astype(np.float64)

    def total(self, residuals: Floats) -> Floats:
        """Σ r xᵀ [L, d]."""
        return residuals.T @ self.features

    def project(self, residuals: Floats, matrix: Floats) -> npt.NDArray[np.float64]:
        """The inner product [n] of each record's gradient with `matrix` [L, d]."""
        products: npt.NDArray[np.float64] = np.einsum("ij,ij->i", self.features @ matrix.T, residuals, dtype=np.float64)
        return products
