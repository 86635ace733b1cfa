"""The canary audit on whole runs: it accepts the right mechanism and catches broken ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from accord_shared.errors import Interrupted
from accord_shared.plan import Plan
from accord_simulations.audit import canaries as audit_module
from accord_simulations.audit.federation import Release
from accord_simulations.scenario import split_changes
from audits import (
    SMALL,
    double_sampling,
    drop_clipping,
    drop_noise,
    fix_noise,
    halve_noise,
    halve_sensitivity,
    pair_noise,
    predict_seeds,
    reuse_noise,
    run_audit,
    scale_noise,
)


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embeddings of all tests here."""
    return tmp_path_factory.mktemp("features")


@pytest.mark.parametrize("epsilon", [2.0, 8.0])
def test_the_right_mechanism_stands(
    epsilon: float, tmp_path: Path, features: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fix_noise(monkeypatch)
    found = run_audit(tmp_path, features, epsilon, SMALL)
    assert 0.3 * epsilon <= found.epsilon_lower_bound <= found.epsilon_spent <= found.epsilon_claimed == epsilon
    assert not found.refuted
    assert found.checks
    assert not found.failed
    assert found.epsilon_all_collude > found.epsilon_spent
    assert 0.55 < found.auc < 0.95
    assert 0.01 < found.tpr_at_1pct_fpr < 0.5
    assert (found.canaries, found.noise, found.secure_aggregation) == (20_000, "cohort", "malicious")


@pytest.mark.parametrize("break_it", [halve_noise, drop_noise, drop_clipping], ids=["noise/2", "no-noise", "no-clip"])
def test_broken_mechanisms_are_caught(
    break_it: Callable[[pytest.MonkeyPatch], None], tmp_path: Path, features: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fix_noise(monkeypatch)
    break_it(monkeypatch)
    found = run_audit(tmp_path, features, 2.0, SMALL)
    assert found.epsilon_lower_bound > found.epsilon_claimed == 2.0
    assert found.refuted


def test_under_site_noise_every_update_is_seen(tmp_path: Path, features: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fix_noise(monkeypatch)
    seen: list[Release] = []
    see = audit_module.Auditor.see
    monkeypatch.setattr(audit_module.Auditor, "see", lambda self, one: (seen.append(one), see(self, one))[1])
    found = run_audit(tmp_path, features, 2.0, {**SMALL, "privacy.noise": "site"})
    assert 0.3 * 2.0 <= found.epsilon_lower_bound <= 2.0
    assert (found.noise, found.secure_aggregation) == ("site", "off")
    assert [len(one.sums) for one in seen] == [4] * 8
    with monkeypatch.context() as broken:
        halve_noise(broken)
        (tmp_path / "again").mkdir()
        assert run_audit(tmp_path / "again", features, 2.0, {**SMALL, "privacy.noise": "site"}).refuted


def test_an_update_is_the_others_and_member_canaries_at_clip_norm_and_noise_and_nothing_else(
    tmp_path: Path, features: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the attacker takes away is what is there: without noise nothing is left but rounding."""
    fix_noise(monkeypatch)
    drop_noise(monkeypatch)
    left: list[float] = []
    make, without = audit_module.Auditor.__init__, audit_module.Auditor._without_others

    def noted(self: audit_module.Auditor, plan: Plan, canaries: audit_module.Canaries, others: object) -> None:
        make(self, plan, canaries, others)  # type: ignore[arg-type]
        self.coins = canaries.members - 0.5  # type: ignore[attr-defined]

    def checked(self: audit_module.Auditor, rest: Any, sites: tuple[str], weights: Any) -> Any:
        _, gradients = self._canaries.clipped(weights, 0.2)
        assert np.linalg.norm(gradients, axis=1).min() > 0.19
        own = self._others[sites[0]]
        known = own.total(own.clipped(weights, 0.2)[1])
        here = np.where(self._site == self._numbers[sites[0]], self.coins, 0.0)  # type: ignore[attr-defined]
        canaries = self._canaries.total(gradients * here[:, None])
        left.append(float(np.linalg.norm(rest - known - canaries) / np.linalg.norm(canaries)))
        return without(self, rest, sites, weights)

    monkeypatch.setattr(audit_module.Auditor, "__init__", noted)
    monkeypatch.setattr(audit_module.Auditor, "_without_others", checked)
    run_audit(tmp_path, features, 8.0, {**SMALL, "run.rounds": 2, "privacy.noise": "site"}, count=2000)
    assert len(left) == 2 * 4
    assert max(left) < 1e-3


def test_a_wish_to_stop_ends_it_at_the_next_round(tmp_path: Path, features: Path) -> None:
    done: list[int] = []
    scenario, changes = split_changes("bank-demo", {**SMALL, "privacy.noise": "cohort"})
    with pytest.raises(Interrupted):
        audit_module.audit_canaries(
            scenario,
            changes,
            tmp_path,
            count=400,
            cache=features,
            on_round=lambda number, _: done.append(number),
            stopping=lambda: len(done) == 2,
        )
    assert done == [1, 2]


SAMPLED = {**SMALL, "local.sampling_rate": 0.1, "privacy.accountant": "rdp"}


@pytest.mark.parametrize("noise", ["cohort", "site"])
def test_a_sampled_run_is_as_promised(
    noise: str, tmp_path: Path, features: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fix_noise(monkeypatch)
    found = run_audit(tmp_path, features, 8.0, {**SAMPLED, "privacy.noise": noise}, count=4000)
    assert "sampling rate" in {check.name for check in found.checks}
    assert not found.failed


@pytest.mark.parametrize(
    ("breaks", "noise", "test"),
    [
        pytest.param(double_sampling, "cohort", "sampling rate"),
        pytest.param(reuse_noise, "cohort", "noise of two releases"),
        pytest.param(pair_noise, "cohort", "noise of two coordinates", marks=pytest.mark.slow),
        pytest.param(predict_seeds, "cohort", "noise of two releases", marks=pytest.mark.slow),
        pytest.param(halve_sensitivity, "cohort", "variance", marks=pytest.mark.slow),
        pytest.param(scale_noise, "cohort", "variance", marks=pytest.mark.slow),
        pytest.param(double_sampling, "site", "sampling rate", marks=pytest.mark.slow),
        pytest.param(reuse_noise, "site", "noise of two releases", marks=pytest.mark.slow),
        pytest.param(pair_noise, "site", "noise of two coordinates", marks=pytest.mark.slow),
        pytest.param(predict_seeds, "site", "noise of two releases", marks=pytest.mark.slow),
        pytest.param(scale_noise, "site", "variance", marks=pytest.mark.slow),
    ],
)
def test_a_mechanism_that_is_not_the_accounted_one_is_told(
    breaks: Callable[[pytest.MonkeyPatch], None],
    noise: str,
    test: str,
    tmp_path: Path,
    features: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where canaries alone may not show it: a bound on ε from one run has room for most of these."""
    breaks(monkeypatch)
    monkeypatch.setattr("torch.set_num_threads", lambda _: None)
    changes = SAMPLED if breaks is double_sampling else SMALL
    found = run_audit(tmp_path, features, 8.0, {**changes, "privacy.noise": noise}, count=4000)
    assert test in found.failed
