"""Metrics that leave a site: noised counts over units that it holds back, as extra coordinates of its update.

Held-back units are never trained on, so a unit is in one of the two sums only and the round costs it no more than
training costs the others (parallel composition, McSherry 2009): both take Poisson samples at the plan's rate, clip to C
and add noise σ·C.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import numpy.typing as npt

from accord_client.data import Examples
from accord_client.trainer import Batches, Runtime, TrainableModel, predict
from accord_shared.dp.noise import SecureGenerator, snap
from accord_shared.plan import LocalSpec

COUNTS = 2
"""Coordinates: right predictions, and all."""
_BUCKETS = 1 << 32


def hold_back(examples: Examples, fraction: float) -> tuple[Examples, Examples]:
    """(rest, held back): whole units, each chosen by a hash of its own records alone.

    So adding or removing a unit moves no other between the two.
    """
    if fraction == 0.0:
        return examples, examples.take([])
    digests = [hashlib.sha256(b"accord held back") for _ in range(examples.n_units)]
    for text, unit in zip(examples.texts, examples.units.tolist(), strict=True):
        digests[unit].update(hashlib.sha256(text.encode()).digest())
    limit = round(fraction * _BUCKETS)
    held = np.array([int.from_bytes(digest.digest()[:4], "big") < limit for digest in digests], dtype=np.bool_)
    rows = held[examples.units]
    return examples.take(np.flatnonzero(~rows)), examples.take(np.flatnonzero(rows))


def released_counts(
    model: TrainableModel,
    batches: Batches | None,
    spec: LocalSpec,
    *,
    noise_multiplier: float,
    generator: SecureGenerator,
    runtime: Runtime,
) -> npt.NDArray[np.float64]:
    """The two coordinates [2]: sums over a Poisson sample of held-back units, in the scale of an update.

    Under shared noise `noise_multiplier` is 0: they get their noise with the rest of the update.

    A unit adds (share of its records that are predicted right, 1) · C/√2: at most C in norm. `model` has the weights
    that are scored. The divisor is the training's, so that the update's bound holds for these coordinates too.
    """
    clip_norm = spec.clip_norm or 1.0
    total = np.zeros(COUNTS)
    if batches is not None and len(batches.units):
        total = _sums(model, batches, spec.sampling_rate, generator, runtime) * (clip_norm / math.sqrt(COUNTS))
    scale = noise_multiplier * clip_norm
    noised = snap(total + generator.gaussian(COUNTS, scale), scale)
    return noised * (spec.learning_rate / spec.expected_batch)


def _sums(
    model: TrainableModel, batches: Batches, rate: float, generator: SecureGenerator, runtime: Runtime
) -> npt.NDArray[np.float64]:
    rows = batches.units
    predicted = predict(model, batches, runtime)
    right = np.bincount(rows, weights=predicted == batches.labels.cpu().numpy()) / np.bincount(rows)
    sampled = generator.bernoulli(rate, len(right))
    return np.array([right[sampled].sum(), float(sampled.sum())])
