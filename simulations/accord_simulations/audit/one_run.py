"""A lower bound on ε from one run (Steinke, Nasr, Jagielski 2023, "Privacy Auditing with One (1) Training Run").

m canaries are included or left out by independent fair coins. Whoever sees what an (ε, δ)-DP mechanism releases,
however it looks, guesses some of the coins; each guess is then right with probability at most e^ε/(1 + e^ε), but for
what δ lets through. So many right guesses refute small ε: the bound is the largest ε that is refuted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from accord_shared.errors import PlanError

Scores = npt.NDArray[np.float64]
Coins = npt.NDArray[np.bool_]

_MOST_EPSILON = 64.0
_PRECISION = 1e-6


@dataclass(frozen=True)
class OneRun:
    """What the guesses say. `epsilon` is the lower bound at `confidence`; `correct` of `guesses` coins were guessed."""

    epsilon: float
    canaries: int
    guesses: int
    correct: int
    delta: float
    confidence: float


def p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Most probable that an (ε, δ)-DP mechanism lets so many of the guesses be right (Corollary 5.4).

    β + 2mδα with W ~ Binom(r, e^ε/(1 + e^ε)), β = P[W ≥ v] and α = max over i of P[v > W ≥ v - i] / i.

    Raises:
        PlanError: numbers that are none of such an experiment.
    """
    from scipy.stats import binom  # noqa: PLC0415

    if not (0 <= correct <= guesses <= canaries and epsilon >= 0.0 and 0.0 <= delta < 1.0):
        raise PlanError(f"{correct} right of {guesses} guesses on {canaries} canaries at ε {epsilon}, δ {delta}")
    right = 1.0 / (1.0 + math.exp(-epsilon))
    beta = float(binom.sf(correct - 1, guesses, right))
    if delta == 0.0 or correct == 0:
        return min(1.0, beta)
    just_below = np.cumsum(binom.pmf(np.arange(correct - 1, -1, -1), guesses, right))
    alpha = float(np.max(just_below / np.arange(1, correct + 1)))
    return min(1.0, beta + 2.0 * canaries * delta * alpha)


def lower_bound(canaries: int, guesses: int, correct: int, delta: float, confidence: float = 0.95) -> float:
    """The largest ε that `correct` of `guesses` refute at `confidence`, to 1e-6 and rounded down; 0 if none is."""
    error = 1.0 - confidence

    def refuted(epsilon: float) -> bool:
        return p_value(canaries, guesses, correct, epsilon, delta) <= error

    low, high = 0.0, _MOST_EPSILON
    if not refuted(low):
        return 0.0
    while high - low > _PRECISION:
        middle = (low + high) / 2.0
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def guesses_per_side(canaries: int, multiplier: float, delta: float, confidence: float = 0.95) -> int:
    """How many of the highest and of the lowest scores to guess: a rule that looks at no score.

    The number whose bound is best on scores coin - ½ + N(0, `multiplier`²), that is for orthogonal canaries at clip
    norm under the claimed noise of the whole run, with one standard deviation less luck than is expected.
    """
    from scipy.stats import norm  # noqa: PLC0415

    grid = np.linspace(-0.5 - 9.0 * multiplier, 0.5 + 9.0 * multiplier, 20_001)
    outside, inside = norm.sf((grid + 0.5) / multiplier), norm.sf((grid - 0.5) / multiplier)
    best, chosen = 0.0, max(1, canaries // 10)
    for count in np.unique(np.geomspace(min(10, canaries // 2), canaries // 2, 40).astype(int)).tolist():
        at = int(np.argmin(np.abs((outside + inside) / 2.0 - count / canaries)))
        right = float(inside[at] / (inside[at] + outside[at]))
        expected = 2 * count * right - math.sqrt(2 * count * right * (1.0 - right))
        bound = lower_bound(canaries, 2 * count, math.floor(expected), delta, confidence)
        if bound > best:
            best, chosen = bound, count
    return chosen


def audit(scores: Scores, members: Coins, per_side: int, delta: float, confidence: float = 0.95) -> OneRun:
    """Guess that the `per_side` highest scores [m] are members and the lowest are none; abstain on the rest.

    Raises:
        PlanError: not twice `per_side` canaries, or scores that are not numbers.
    """
    if 2 * per_side > len(scores) or len(scores) != len(members) or not np.isfinite(scores).all():
        raise PlanError(f"{2 * per_side} guesses on {len(scores)} scores of {len(members)} canaries")
    order = np.argsort(scores, kind="stable")
    correct = int(members[order[len(order) - per_side :]].sum() + (~members[order[:per_side]]).sum())
    epsilon = lower_bound(len(scores), 2 * per_side, correct, delta, confidence)
    return OneRun(epsilon, len(scores), 2 * per_side, correct, delta, confidence)
