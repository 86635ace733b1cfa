"""Small scenarios for the privacy audit, the same noise at every call, and mechanisms that are broken on purpose."""

from __future__ import annotations

import hashlib
import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from accord_client import dpsgd, gradients, site
from accord_shared import quantize
from accord_shared.dp import discrete, sharing
from accord_shared.dp.noise import SecureGenerator
from accord_shared.secagg.member import Member
from accord_simulations.audit.canaries import CanaryAudit, audit_canaries
from accord_simulations.scenario import split_changes

SMALL: dict[str, Any] = {
    "population.participants": 4,
    "data.records_per_participant": 40,
    "data.test_records_per_participant": 20,
    "run.rounds": 8,
    "run.max_extra_attempts": 0,
}


def fix_noise(monkeypatch: pytest.MonkeyPatch, seed: int = 0) -> None:
    """All noise, of sites and of members, from one known key."""
    generator = SecureGenerator(bytes([seed]) * 32)

    def stream(count: int) -> bytes:
        return generator.uint64(-(-count // 8)).tobytes()[:count]

    monkeypatch.setattr(os, "urandom", stream)
    monkeypatch.setitem(Member.__init__.__kwdefaults__, "random", stream)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)


def run_audit(folder: Path, cache: Path, epsilon: float, changes: dict[str, Any], count: int = 20_000) -> CanaryAudit:
    """A canary audit of `bank-demo` with the changes."""
    options = {"privacy.epsilon": epsilon, "privacy.noise": "cohort", **changes}
    scenario, plan_changes = split_changes("bank-demo", options)
    return audit_canaries(scenario, plan_changes, folder, count=count, cache=cache).result


def halve_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the standard deviation that is accounted for, under any mode of noise."""
    noised = dpsgd.NoisyOptimizer.noised

    def halved(self: Any, total: Any) -> Any:
        before = self.noise_multiplier
        self.noise_multiplier = before / 2
        try:
            return noised(self, total)
        finally:
            self.noise_multiplier = before

    monkeypatch.setattr(dpsgd.NoisyOptimizer, "noised", halved)
    monkeypatch.setattr(
        sharing.NoiseShares,
        "share",
        lambda self, survivors: sharing._ceil(self.variance / 4 / (survivors - self.colluders)),
    )


def drop_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """No noise, and numbers of shared noise rounded to the nearest integer."""
    monkeypatch.setattr(dpsgd.NoisyOptimizer, "noised", lambda _, total: total)
    monkeypatch.setattr(discrete.DiscreteGaussian, "add", lambda *_, **__: None)

    def nearest(values: Any, out: Any, _: Any) -> None:
        out += np.rint(values / 2.0**discrete.FRACTION_BITS).astype(np.int64).astype(out.dtype)

    monkeypatch.setattr(quantize, "round_to_integers", nearest)


def drop_clipping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients as large as they are."""
    clip = gradients.GradientTape.clip
    monkeypatch.setattr(gradients.GradientTape, "clip", lambda self, _, total=None: clip(self, 1e6, total))


# --- randomness that is broken on purpose: what tests of a run must catch


def double_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the sampling rate that is accounted for."""
    bernoulli = SecureGenerator.bernoulli
    monkeypatch.setattr(SecureGenerator, "bernoulli", lambda self, rate, count: bernoulli(self, 2 * rate, count))


def reuse_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same noise in every round."""
    gaussian, add = SecureGenerator.gaussian, discrete.DiscreteGaussian.add
    fixed = bytes(range(32))
    monkeypatch.setattr(SecureGenerator, "gaussian", lambda _, *rest: gaussian(SecureGenerator(fixed), *rest))

    def again(self: Any, words: Any, _: bytes, **rest: Any) -> None:
        add(self, words, fixed, **rest)

    monkeypatch.setattr(discrete.DiscreteGaussian, "add", again)


def pair_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second coordinate has its neighbour's noise, its sign changed."""
    gaussian, add = SecureGenerator.gaussian, discrete.DiscreteGaussian.add

    def paired(self: SecureGenerator, count: int, scale: float = 1.0) -> Any:
        values = gaussian(self, count, scale)
        values[1::2] = -values[: 2 * (count // 2) : 2]
        return values

    def paired_words(self: Any, words: Any, seed: bytes, **rest: Any) -> None:
        noise = np.zeros_like(words)
        add(self, noise, seed, **rest)
        noise[1::2] = -noise[: 2 * (len(noise) // 2) : 2]
        words += noise

    monkeypatch.setattr(SecureGenerator, "gaussian", paired)
    monkeypatch.setattr(discrete.DiscreteGaussian, "add", paired_words)


def predict_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that follow from what everybody knows, at sites that start anew too."""

    class Predictable(SecureGenerator):
        def __init__(self, key: bytes | None = None) -> None:
            super().__init__(key or hashlib.sha256(b"run.seed = 0").digest())

    monkeypatch.setattr(site, "SecureGenerator", Predictable)


def halve_sensitivity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of Δ: half of the noise."""
    whole = sharing.sensitivity
    monkeypatch.setattr(sharing, "sensitivity", lambda *sizes: whole(*sizes) / 2)


def scale_noise(monkeypatch: pytest.MonkeyPatch, factor: float = 0.97) -> None:
    """Noise of `factor` σ."""
    gaussian, init = SecureGenerator.gaussian, discrete.DiscreteGaussian.__init__
    monkeypatch.setattr(
        SecureGenerator, "gaussian", lambda self, count, scale=1.0: gaussian(self, count, factor * scale)
    )

    def smaller(self: Any, variance: Any) -> None:
        init(self, variance * Fraction(factor) ** 2)

    monkeypatch.setattr(discrete.DiscreteGaussian, "__init__", smaller)
