"""Items 6 and 7 over whole runs, and a second one with equal everything; the product broken in six ways."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from accord_client.conformance import Violation, check_noise, check_sampling, check_shared_noise
from accord_shared.dp.accounting import noise_multiplier
from accord_shared.dp.noise import SecureGenerator
from audits import (
    double_sampling,
    halve_sensitivity,
    pair_noise,
    predict_seeds,
    reuse_noise,
    scale_noise,
)
from conformance.lab import Lab, lab_plan, request, trained
from conformance.secure_lab import SecureLab, secure_lab_plan
from conftest import plan_of

WIDTH, ROUNDS = 4000, 4
Breaks = Callable[[pytest.MonkeyPatch], None]


def site_run(folder: Path) -> npt.NDArray[np.float64]:
    """Noise [sites · rounds, d] of two sites under `site` noise, in standard deviations."""
    plan, found = lab_plan(), []
    local = plan.local
    unit = local.learning_rate * (local.clip_norm or 0.0) / local.expected_batch
    for name in ("site-a", "site-b"):
        lab = Lab(folder / name, width=WIDTH, zero_gradients=True)
        site, zeros = lab.joined(plan, name=name), np.zeros(5 * WIDTH, dtype=np.float32)
        for number in range(1, ROUNDS + 1):
            update = trained(site.handle(request(plan, number, zeros))).update
            found.append(update / (unit * noise_multiplier(plan)))
    return np.stack(found)


def cohort_run(folder: Path) -> npt.NDArray[np.float64]:
    """Noise [rounds, d] of the decoded sums of three sites under `cohort` noise, in standard deviations."""
    plan = secure_lab_plan(3, **{"privacy.noise": "cohort", "cohort.minimum": 3, "run.max_extra_attempts": 0})
    lab = SecureLab(folder, plan, 3, width=WIDTH, zero_gradients=True)
    lab.exchange.join()
    local = plan.local
    unit = local.learning_rate * (local.clip_norm or 0.0) / local.expected_batch
    sums = []
    for number in range(1, ROUNDS + 1):
        aggregate = lab.collect(number)
        assert len(aggregate.survivors) == 3, aggregate.failures
        sums.append(aggregate.total / (unit * lab.sigma))
    return np.stack(sums)


def both_runs(run: Callable[[Path], npt.NDArray[np.float64]], folder: Path) -> npt.NDArray[np.float64]:
    return np.concatenate([run(folder / "one"), run(folder / "two")])


@pytest.mark.parametrize("run", [site_run, cohort_run])
def test_releases_of_two_runs_have_independent_noise_of_the_promised_size(run: Any, tmp_path: Path) -> None:
    check_noise(both_runs(run, tmp_path), 1.0)


@pytest.mark.parametrize("run", [site_run, cohort_run])
@pytest.mark.parametrize("breaks", [reuse_noise, pair_noise, predict_seeds, scale_noise])
def test_broken_randomness_is_caught(breaks: Breaks, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    breaks(monkeypatch)
    with pytest.raises(Violation):
        check_noise(both_runs(run, tmp_path), 1.0)


def test_half_the_sensitivity_is_caught_in_the_sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    halve_sensitivity(monkeypatch)
    with pytest.raises(Violation, match="variance"):
        check_noise(cohort_run(tmp_path), 1.0)


@pytest.mark.parametrize("breaks", [reuse_noise, pair_noise, halve_sensitivity, scale_noise])
def test_the_check_of_a_plan_catches_broken_shared_noise(breaks: Breaks, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = secure_lab_plan(10, **{"privacy.noise": "cohort", "cohort.minimum": 7, "run.max_extra_attempts": 2})
    breaks(monkeypatch)
    with pytest.raises(Violation):
        check_shared_noise(plan, 29_568, generator=SecureGenerator(bytes(32)))


def test_the_check_of_a_plan_catches_doubled_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    double_sampling(monkeypatch)
    with pytest.raises(Violation, match="sampling rate"):
        check_sampling(plan_of({"local.sampling_rate": 0.1}))
