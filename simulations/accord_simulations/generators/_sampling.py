"""Sizes, class mixes and label noise that the synthetic populations share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from accord_shared.errors import PlanError

Integers = npt.NDArray[np.int64]


def check_noise(label_noise: float) -> None:
    """Refuses noise at which the recorded label no longer favours the clean one.

    Raises:
        PlanError: not 0 <= label_noise < 0.5.
    """
    if not 0 <= label_noise < 0.5:
        raise PlanError(f"label_noise = {label_noise}: must be at least 0 and below 0.5")


def sizes(participants: int, mean: int, spread: float, least: int, rng: np.random.Generator) -> Integers:
    """Record counts [participants], log-normal with this mean and `spread` = σ of the logarithm."""
    factors = np.exp(rng.normal(-(spread**2) / 2, spread, participants))
    rounded: Integers = np.rint(mean * factors).astype(np.int64)
    return np.maximum(least, rounded)


def classes(count: int, mix: npt.NDArray[np.float64], rng: np.random.Generator) -> Integers:
    """Clean classes [count] drawn from `mix` [n_classes]."""
    return rng.choice(len(mix), size=count, p=mix).astype(np.int64)


def confuse(clean: Integers, sister: Sequence[int], probability: float, rng: np.random.Generator) -> Integers:
    """Recorded labels [n]: with `probability`, and independently of the text, the class's sister.

    Given a text the best guess is its clean class, right with 1 - probability (< 0.5 keeps it the
    best): that is the noise ceiling of any classifier.
    """
    flips = rng.random(len(clean)) < probability
    recorded: Integers = np.where(flips, np.asarray(sister, dtype=np.int64)[clean], clean)
    return recorded
