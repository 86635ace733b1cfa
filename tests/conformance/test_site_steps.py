"""Items 10 and 12: the odd cases of a round, and that every step that runs is a step that is paid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from accord_client import site as site_module
from accord_client.trainer import LocalUpdate, Runtime, train
from accord_shared.dp.accounting import epsilon, noise_multiplier
from accord_shared.dp.events import SampledGaussian
from accord_shared.dp.noise import SecureGenerator
from accord_shared.errors import NonFinite, PrivacyError, Withheld
from accord_shared.messages import Refusal
from conformance.lab import (
    CountingGenerator,
    Lab,
    ask,
    clipped_sum,
    dimension,
    joint_weights,
    lab_plan,
    request,
    trained,
)

KEY = bytes(range(32))
FAST = {"privacy.accountant": "rdp"}


@pytest.mark.parametrize("steps", [1, 3, 7])
@pytest.mark.parametrize("n", [1, 49, 93, 98, 99, 103, 105, 107])
def test_steps_that_run_are_steps_that_are_paid(n: int, steps: int, tmp_path: Path) -> None:
    """`int(1 / (1 / n)) != n` for some n: no step count comes from the rate."""
    changes = {"local.sampling_rate": 1 / n, "local.steps_per_round": steps, "local.expected_records": n}
    lab, plan = Lab(tmp_path), lab_plan({**FAST, **changes})
    generator = CountingGenerator(KEY)
    site = lab.joined(plan, generator=generator)
    for number in (1, 2, 4):
        trained(ask(site, plan, lab, number))
    spent = site.releases(plan)
    assert generator.noised == spent.steps == 3 * steps
    assert len(generator.sampled) == 3 * steps
    assert spent.events == (SampledGaussian(noise_multiplier(plan), 1 / n, 3 * steps),)
    assert epsilon(spent.events, plan.privacy.delta, "rdp") <= (plan.privacy.epsilon or 0)


def test_noise_is_drawn_once_a_step_however_many_micro_batches(tmp_path: Path) -> None:
    lab, plan = Lab(tmp_path), lab_plan({**FAST, "local.steps_per_round": 2})
    results = []
    for rows in (1, 5, 64):
        generator = CountingGenerator(KEY)
        workspace = lab.workspace(plan)
        results.append(
            train(
                workspace.model,
                workspace.batches(lab.examples),
                plan.local,
                joint_weights(plan, lab, 1),
                noise_multiplier=noise_multiplier(plan),
                generator=generator,
                runtime=Runtime(rows_in_memory=rows),
            ).update
        )
        assert generator.noised == 2
    np.testing.assert_allclose(results[0], results[2], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(results[1], results[2], rtol=1e-4, atol=1e-5)


def test_a_unit_s_rows_meet_in_one_micro_batch(tmp_path: Path) -> None:
    units = (0, 1, 2, 0, 1, 2, 0, 3, 0, 1, 0, 3)
    updates = []
    for rows in (1, 3, 64):
        lab = Lab(tmp_path / str(rows), units=units)
        plan = lab_plan({**FAST, "local.clip_norm": 0.05, "privacy.epsilon": 500.0})
        workspace = lab.workspace(plan)
        options: dict[str, Any] = {"noise_multiplier": 0.0, "generator": SecureGenerator(KEY)}
        weights = np.zeros(dimension(plan, lab), dtype=np.float32)
        runtime = Runtime(rows_in_memory=rows)
        batches = workspace.batches(lab.examples)
        updates.append(train(workspace.model, batches, plan.local, weights, runtime=runtime, **options).update)
    np.testing.assert_allclose(updates[0], updates[2], atol=1e-6)
    np.testing.assert_allclose(updates[1], updates[2], atol=1e-6)
    expected = -0.7 / 12 * clipped_sum(lab, plan).reshape(-1)
    np.testing.assert_allclose(updates[2], expected, atol=2e-4 * np.abs(expected).max())


def test_an_empty_sample_is_noised_and_paid_all_the_same(tmp_path: Path) -> None:
    lab, plan = Lab(tmp_path), lab_plan({**FAST, "local.sampling_rate": 1e-12, "local.steps_per_round": 3})
    generator = CountingGenerator(KEY)
    site = lab.joined(plan, generator=generator)
    update = trained(ask(site, plan, lab, 1)).update
    assert generator.sampled == [0, 0, 0]
    assert generator.noised == 3
    assert np.isfinite(update).all()
    assert (update != 0).mean() > 0.99
    assert site.releases(plan).steps == 3


def test_a_zero_update_is_zero_without_noise_and_all_noise_with(tmp_path: Path) -> None:
    lab = Lab(tmp_path, zero_gradients=True)
    plain = lab_plan({"privacy.noise": "none", "privacy.epsilon": None})
    unclipped = plain.revised({"local.clip_norm": None})
    for plan in (plain, unclipped):
        update = trained(ask(lab.joined(plan), plan, lab, 1)).update
        assert not np.abs(update).max() > 1e-7
    assert (trained(ask(lab.joined(lab_plan()), lab_plan(), lab, 1)).update != 0).mean() > 0.99


def test_noise_without_a_clip_norm_is_refused(tmp_path: Path) -> None:
    lab, plan = Lab(tmp_path), lab_plan({"privacy.noise": "none", "privacy.epsilon": None, "local.clip_norm": None})
    workspace = lab.workspace(plan)
    with pytest.raises(PrivacyError):
        train(
            workspace.model,
            workspace.batches(lab.examples),
            plan.local,
            joint_weights(plan, lab, 1),
            noise_multiplier=1.0,
            generator=SecureGenerator(KEY),
            runtime=Runtime(),
        )


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_are_refused_before_anything_runs(poison: float, tmp_path: Path) -> None:
    lab, plan = Lab(tmp_path), lab_plan()
    generator = CountingGenerator(KEY)
    site, weights = lab.joined(plan, generator=generator), joint_weights(plan, lab, 1)
    weights[3] = poison
    answer = site.handle(request(plan, 1, weights))
    assert isinstance(answer, Refusal)
    assert answer.kind == NonFinite.__name__
    assert (generator.noised, generator.sampled) == (0, [])
    assert site.releases(plan).rounds == 0


@pytest.mark.parametrize("length", [-1, 1])
def test_weights_of_another_length_are_refused(length: int, tmp_path: Path) -> None:
    lab, plan = Lab(tmp_path), lab_plan()
    weights = np.zeros(dimension(plan, lab) + length, dtype=np.float32)
    answer = lab.joined(plan).handle(request(plan, 1, weights))
    assert isinstance(answer, Refusal)
    assert answer.kind == "ProtocolError"


def test_a_record_whose_gradient_is_nan_adds_nothing_and_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab, plan = Lab(tmp_path), lab_plan()
    results: list[LocalUpdate] = []

    def keep(*arguments: Any, **options: Any) -> LocalUpdate:
        results.append(train(*arguments, **options))
        return results[-1]

    monkeypatch.setattr(site_module, "train", keep)
    clean = trained(ask(lab.joined(plan, generator=SecureGenerator(KEY)), plan, lab, 1)).update
    other = Lab(tmp_path / "other")
    site = other.joined(plan, generator=SecureGenerator(KEY))
    workspace = other.workspace(plan)
    broken = workspace.batches(other.examples)
    broken.features[5] = torch.nan  # type: ignore[attr-defined]
    site._batches[plan.hash] = (broken, None)
    poisoned = trained(ask(site, plan, other, 1)).update
    assert [result.rejected for result in results] == [0, 1]
    assert np.isfinite(poisoned).all()
    assert plan.local.clip_norm is not None
    moved = np.linalg.norm((poisoned - clean).astype(np.float64))  # equal noise: one unit's share apart
    assert 0 < moved <= plan.local.learning_rate * plan.local.clip_norm / plan.local.expected_records * 1.001


def test_noise_that_overflows_is_never_released_and_always_paid(tmp_path: Path) -> None:
    """Found: a free refusal told whether the noised sum was beyond a bound, as often as anybody asked."""
    lab = Lab(tmp_path)
    plan = lab_plan({"local.learning_rate": 1e38, "local.clip_norm": 1e4})
    site = lab.joined(plan)
    for attempt in (1, 2, 3):
        answer = ask(site, plan, lab, 1, attempt=attempt)
        assert isinstance(answer, Refusal)
        assert answer.kind == Withheld.__name__
        assert "NonFinite" in site.last_refusal
        assert site.releases(plan).rounds == 1
    for number in (2, 3, 4):
        ask(site, plan, lab, number)
    assert site.releases(plan).rounds == 4


def test_a_trainer_that_skips_a_step_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accord_client.dpsgd import ClippedOptimizer

    lab, plan = Lab(tmp_path), lab_plan({**FAST, "local.steps_per_round": 2})
    monkeypatch.setattr(ClippedOptimizer, "pre_step", lambda self, closure=None: False)
    site = lab.joined(plan)
    answer = ask(site, plan, lab, 1)
    assert isinstance(answer, Refusal)
    assert answer.kind == Withheld.__name__
    assert "PrivacyError" in site.last_refusal


@pytest.mark.parametrize("noise", ["cohort", "participant"])
def test_noise_that_this_site_cannot_add_is_refused(noise: str, tmp_path: Path) -> None:
    """Until secure aggregation is there, no site may send under a promise that nobody keeps."""
    from conformance.lab import join

    secure = {"secure_aggregation.mode": "malicious", "cohort.size": 3, "cohort.minimum": 3}
    lab, plan = Lab(tmp_path), lab_plan({"privacy.noise": noise, **secure})
    site = lab.site()
    answers = [join(site, plan), ask(site, plan, lab, 1)]
    assert isinstance(answers[1], Refusal)
