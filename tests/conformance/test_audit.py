"""Items 14 and 15: canaries never above the claim, inversion of a bare update and not of the decoded sum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from accord_simulations.audit.inversion import InversionAudit, audit_inversion
from accord_simulations.scenario import split_changes
from audits import drop_noise, fix_noise, halve_noise, run_audit

QUICK: dict[str, Any] = {"data.records_per_participant": 125, "data.test_records_per_participant": 10}


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embeddings of all tests here."""
    return tmp_path_factory.mktemp("features")


def run_inversion(folder: Path, cache: Path, changes: dict[str, Any], trials: int, bare: int) -> InversionAudit:
    scenario, plan_changes = split_changes("bank-demo", {"privacy.noise": "cohort", **changes})
    return audit_inversion(scenario, plan_changes, folder, cache=cache, trials=trials, bare_trials=bare)


def test_inversion_succeeds_on_a_bare_update_and_fails_on_the_private_sum(
    tmp_path: Path, features: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fix_noise(monkeypatch)
    found = run_inversion(tmp_path, features, QUICK, trials=160, bare=40)
    assert found.candidates == 1000
    for size in (1, 8):
        assert found.bare[size].inversion.rate >= 0.9
        assert found.bare[size].reconstruction > 0.99
        assert found.private[size].inversion.rate <= 0.01
        assert found.private[size].likelihood.rate <= 0.02
        assert found.private[size].reconstruction < 0.3
    assert found.ideal_one_sum < 0.01


def test_it_is_the_noise_that_inversion_fails_on(
    tmp_path: Path, features: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fix_noise(monkeypatch)
    drop_noise(monkeypatch)
    found = run_inversion(tmp_path, features, QUICK, trials=20, bare=8)
    assert found.private[1].inversion.rate >= 0.9


@pytest.mark.slow
def test_inversion_of_the_shipped_scenario(tmp_path: Path, features: Path) -> None:
    found = run_inversion(tmp_path, features, {}, trials=1000, bare=200)
    for size in (1, 8):
        assert found.bare[size].inversion.interval[0] >= 0.9
        assert found.private[size].inversion.rate <= 0.01


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("epsilon", [2.0, 8.0])
def test_canaries_of_the_shipped_scenario_never_above_the_claim(epsilon: float, tmp_path: Path, features: Path) -> None:
    for seed in range(5):
        found = run_audit(tmp_path / str(seed), features, epsilon, {"run.seed": seed})
        assert 0.3 * epsilon <= found.epsilon_lower_bound <= found.epsilon_spent <= epsilon


@pytest.mark.slow
def test_half_the_noise_of_the_shipped_scenario_is_caught(
    tmp_path: Path, features: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    halve_noise(monkeypatch)
    assert run_audit(tmp_path, features, 2.0, {}).epsilon_lower_bound > 2.0
