"""Text classification: how predictions are scored."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Labels = npt.NDArray[np.int64]


def accuracy(predicted: Labels, actual: Labels) -> float:
    """Share of records [n] whose class was predicted; NaN where there are none."""
    return float((predicted == actual).mean()) if len(actual) else float("nan")


def macro_f1(predicted: Labels, actual: Labels, classes: int) -> float:
    """Mean F1 over the classes that occur among predictions or records (as scikit-learn counts them)."""
    hits = np.bincount(actual[predicted == actual], minlength=classes)
    support = np.bincount(actual, minlength=classes) + np.bincount(predicted, minlength=classes)
    present = support > 0
    return float((2 * hits[present] / support[present]).mean()) if present.any() else float("nan")


def score(predicted: Labels, actual: Labels, classes: int, metrics: tuple[str, ...]) -> dict[str, float]:
    """The named metrics."""
    values = {
        "accuracy": lambda: accuracy(predicted, actual),
        "macro_f1": lambda: macro_f1(predicted, actual, classes),
    }
    return {metric: values[metric]() for metric in metrics}
