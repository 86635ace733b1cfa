"""Does empirical noise have the promised σ? Accepts the right one, tells 2/3 and 3/2 of it apart."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

STANDARD_ERRORS = 5.0
"""A right σ is refused once in two million tests."""


def variance_accepts(values: npt.NDArray[Any], sigma: float) -> bool:
    """Whether Σ(x/σ)² of zero-mean `values` [n] lies within the chi-square's standard errors, √(2/n)."""
    scaled = np.square(np.asarray(values, dtype=np.float64) / sigma).mean()
    return bool(abs(scaled - 1.0) <= STANDARD_ERRORS * math.sqrt(2.0 / len(values)))


def require_sigma(values: npt.NDArray[Any], sigma: float) -> None:
    """Accept `sigma`, and reject 2/3 and 3/2 of it (or the sample is too small to tell)."""
    found = float(np.sqrt(np.square(np.asarray(values, dtype=np.float64)).mean()))
    assert variance_accepts(values, sigma), f"noise of standard deviation {found:.5g}, promised {sigma:.5g}"
    assert not variance_accepts(values, sigma * 2 / 3)
    assert not variance_accepts(values, sigma * 3 / 2)


def require_centred(values: npt.NDArray[Any], sigma: float) -> None:
    """The mean is zero to within standard errors."""
    assert abs(float(np.mean(values))) <= STANDARD_ERRORS * sigma / math.sqrt(len(values))


def correlation_is_zero(one: npt.NDArray[Any], two: npt.NDArray[Any]) -> bool:
    """Whether two samples [n] are uncorrelated to within standard errors."""
    return bool(abs(float(np.corrcoef(one, two)[0, 1])) <= STANDARD_ERRORS / math.sqrt(len(one)))
