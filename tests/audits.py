"""Small scenarios for the privacy audit, the same noise at every call, and mechanisms that are broken on purpose."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from accord_client import dpsgd, gradients
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
    monkeypatch.setattr(gradients.GradientTape, "clip", lambda self, _, **options: clip(self, 1e6, **options))
