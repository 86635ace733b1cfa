"""Does empirical noise have the promised σ? Accepts the right one, tells 2/3 and 3/2 of it apart."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from accord_client.conformance import STANDARD_ERRORS, check_sigma

require_sigma = check_sigma


def require_centred(values: npt.NDArray[Any], sigma: float) -> None:
    """The mean is zero to within standard errors."""
    assert abs(float(np.mean(values))) <= STANDARD_ERRORS * sigma / math.sqrt(len(values))


def correlation_is_zero(one: npt.NDArray[Any], two: npt.NDArray[Any]) -> bool:
    """Whether two samples [n] are uncorrelated to within standard errors."""
    return bool(abs(float(np.corrcoef(one, two)[0, 1])) <= STANDARD_ERRORS / math.sqrt(len(one)))
