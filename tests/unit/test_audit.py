"""The privacy audit's parts: the bound, the attacks' scores, the canaries, the pages, the command."""

from __future__ import annotations

import inspect
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from accord_client.data import Examples
from accord_client.features import FeatureCache
from accord_client.gradients import GradientTape
from accord_client.models import LabelFrame
from accord_client.noise_checks import Check
from accord_client.trainer import Runtime
from accord_client.workspace import Workspace
from accord_shared.dp.accounting import calibrate
from accord_shared.errors import PlanError
from accord_shared.plan import AdapterSpec, Plan
from accord_simulations import cli_audit
from accord_simulations.audit.canaries import CanaryAudit
from accord_simulations.audit.gradients import Records
from accord_simulations.audit.inversion import Attack, InversionAudit, Retrieval, ideal_retrieval, reconstruct
from accord_simulations.audit.membership import auc, tpr_at_fpr
from accord_simulations.audit.one_run import audit, guesses_per_side, lower_bound, p_value
from accord_simulations.audit.planting import Canaries, embeddings_of, label_embeddings, with_spare_classes
from accord_simulations.report import write_canaries, write_inversion

DELTA = 1e-5


# The bound


def test_the_papers_own_example() -> None:
    assert lower_bound(1000, 100, 75, 1e-4, 0.95) == pytest.approx(0.673, abs=5e-4)  # Steinke et al. 2023, Appendix D


@pytest.mark.parametrize("epsilon", [0.0, 0.7, 2.0])
@pytest.mark.parametrize("guesses", [1, 4, 7])
def test_without_delta_it_is_the_binomial_tail_term_by_term(epsilon: float, guesses: int) -> None:
    right = math.exp(epsilon) / (1 + math.exp(epsilon))
    for correct in range(guesses + 1):
        exact = sum(
            math.prod(right if hit else 1 - right for hit in outcome)
            for outcome in itertools.product([True, False], repeat=guesses)
            if sum(outcome) >= correct
        )
        assert p_value(9, guesses, correct, epsilon, 0.0) == pytest.approx(min(1.0, exact))


@pytest.mark.parametrize("delta", [0.01, 0.05, 0.3])
@pytest.mark.parametrize("canaries", [1, 5, 12])
def test_with_delta_it_covers_a_mechanism_that_names_and_shames(canaries: int, delta: float) -> None:
    """Each coin is told with chance δ: (0, δ)-DP exactly, and guessed right with chance δ + (1 - δ)/2."""
    right = delta + (1 - delta) / 2
    for correct in range(canaries + 1):
        exact = sum(
            math.comb(canaries, k) * right**k * (1 - right) ** (canaries - k) for k in range(correct, canaries + 1)
        )
        assert p_value(canaries, canaries, correct, 0.0, delta) >= exact - 1e-12


def test_with_delta_it_covers_a_mechanism_that_fails_as_a_whole() -> None:
    """With chance δ all coins are told, else none."""
    canaries, delta = 40, 0.02
    for correct in range(1, canaries + 1):
        coins = sum(math.comb(canaries, k) for k in range(correct, canaries + 1)) / 2**canaries
        assert p_value(canaries, canaries, correct, 0.0, delta) >= delta + (1 - delta) * coins - 1e-12


def test_it_is_monotone() -> None:
    bounds = [lower_bound(1000, 100, correct, DELTA) for correct in range(101)]
    assert bounds == sorted(bounds)
    assert bounds[55] == 0.0 < bounds[65] < bounds[100]
    assert lower_bound(1000, 100, 90, 1e-3) < lower_bound(1000, 100, 90, 1e-4) < lower_bound(1000, 100, 90, 0.0)
    assert lower_bound(9000, 100, 90, DELTA) < lower_bound(1000, 100, 90, DELTA)
    assert lower_bound(1000, 100, 90, DELTA, 0.99) < lower_bound(1000, 100, 90, DELTA, 0.9)
    assert lower_bound(1000, 200, 180, DELTA) > lower_bound(1000, 100, 90, DELTA)
    values = [p_value(500, 50, 45, epsilon / 4, DELTA) for epsilon in range(20)]
    assert values == sorted(values)


def test_the_bound_is_the_edge_of_what_is_refuted() -> None:
    bound = lower_bound(2000, 150, 130, DELTA)
    assert p_value(2000, 150, 130, bound, DELTA) <= 0.05 < p_value(2000, 150, 130, bound + 2e-6, DELTA)


@pytest.mark.parametrize(("guesses", "correct"), [(11, 3), (5, 6), (5, -1)])
def test_numbers_of_no_experiment_are_refused(guesses: int, correct: int) -> None:
    with pytest.raises(PlanError):
        p_value(10, guesses, correct, 1.0, DELTA)


def test_randomised_response_is_audited_at_the_stated_confidence() -> None:
    """The mechanism that the bound is tight for: too large in about 5 % of the runs, hardly ever by much."""
    dice, epsilon = np.random.default_rng(1), 1.0
    right = math.exp(epsilon) / (1 + math.exp(epsilon))
    bounds = np.array([lower_bound(400, 400, int(dice.binomial(400, right)), 0.0) for _ in range(1500)])
    above = float(np.mean(bounds > epsilon))
    assert 0.02 <= above <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 1500)
    assert np.median(bounds) > 0.75


@pytest.mark.parametrize(("epsilon", "least"), [(1.0, 0.3), (2.0, 0.4), (8.0, 0.4)])
def test_an_ideal_gaussian_mechanism_is_bounded_from_below_and_never_above_its_claim(
    epsilon: float, least: float
) -> None:
    dice, sigma, canaries = np.random.default_rng(2), calibrate(epsilon, DELTA, 1.0, 1), 20_000
    per_side = guesses_per_side(canaries, sigma, DELTA)
    bounds = []
    for _ in range(30):
        members = dice.integers(0, 2, canaries).astype(bool)
        scores = members + sigma * dice.normal(size=canaries)
        bounds.append(audit(scores, members, per_side, DELTA).epsilon)
    assert max(bounds) < epsilon
    assert min(bounds) > least * epsilon * 0.8
    assert np.mean(bounds) > least * epsilon


def test_half_the_noise_is_refuted_every_time() -> None:
    dice, sigma, canaries = np.random.default_rng(3), calibrate(2.0, DELTA, 1.0, 1), 20_000
    per_side = guesses_per_side(canaries, sigma, DELTA)
    for _ in range(20):
        members = dice.integers(0, 2, canaries).astype(bool)
        scores = members + sigma / 2 * dice.normal(size=canaries)
        assert audit(scores, members, per_side, DELTA).epsilon > 2.0


def test_guesses_are_the_outermost_scores() -> None:
    scores = np.array([5.0, -4.0, 0.1, -0.2, 3.0, -3.0])
    members = np.array([True, False, False, True, True, True])
    found = audit(scores, members, 2, 0.0)
    assert (found.canaries, found.guesses, found.correct) == (6, 4, 3)
    with pytest.raises(PlanError):
        audit(scores, members, 4, 0.0)
    with pytest.raises(PlanError):
        audit(np.array([np.nan, 1.0]), np.array([True, False]), 1, 0.0)


def test_a_useless_attack_bounds_nothing() -> None:
    dice = np.random.default_rng(4)
    found = audit(dice.normal(size=5000), dice.integers(0, 2, 5000).astype(bool), 100, DELTA)
    assert found.epsilon == 0.0


# Membership inference


def test_auc_and_tpr_of_perfect_useless_and_wrong_attacks() -> None:
    members = np.arange(1000) % 2 == 0
    assert auc(members.astype(float), members) == 1.0
    assert tpr_at_fpr(members.astype(float), members, 0.01) == 1.0
    assert auc(np.zeros(1000), members) == 0.5
    assert tpr_at_fpr(np.zeros(1000), members, 0.01) == 0.0
    assert auc(-members.astype(float), members) == 0.0
    scores = np.random.default_rng(5).normal(size=20_000)
    coins = np.random.default_rng(6).integers(0, 2, 20_000).astype(bool)
    assert auc(scores, coins) == pytest.approx(0.5, abs=0.015)
    assert tpr_at_fpr(scores, coins, 0.01) == pytest.approx(0.01, abs=0.004)
    assert (auc(scores, coins | True), tpr_at_fpr(scores, coins & False, 0.01)) == (0.5, 0.0)


def test_auc_and_tpr_of_gaussians_are_what_theory_says() -> None:
    dice = np.random.default_rng(7)
    members = dice.integers(0, 2, 40_000).astype(bool)
    scores = members + dice.normal(size=40_000)
    assert auc(scores, members) == pytest.approx(0.7602, abs=0.008)  # Φ(1/√2)
    assert tpr_at_fpr(scores, members, 0.01) == pytest.approx(0.0924, abs=0.02)  # Φ(1 - 2.326)


# Canaries


def test_canaries_of_a_label_are_orthonormal_and_those_of_others_nearly() -> None:
    canaries = Canaries.draw(150, 64, 3, seed=1)
    gram = canaries.features @ canaries.features.T
    same = canaries.labels[:, None] == canaries.labels[None, :]
    np.testing.assert_allclose(gram[same], np.eye(150)[same], atol=1e-5)
    assert abs(gram[~same]).max() < 0.6
    assert canaries.labels.tolist() == [0] * 64 + [1] * 64 + [2] * 22
    assert np.bincount(canaries.site).tolist() == [50, 50, 50]
    assert 40 < canaries.members.sum() < 110
    again = Canaries.draw(150, 64, 3, seed=1)
    assert (again.members == canaries.members).all()
    assert (Canaries.draw(150, 64, 3, seed=2).members != canaries.members).any()


def test_member_canaries_are_units_of_their_own_behind_the_sites_records() -> None:
    canaries = Canaries.draw(40, 16, 4, seed=0)
    own = Examples(("a", "b", "c"), np.array([0, 1, 0]), np.array([0, 1, 0]))
    planted, chosen = canaries.planted(2, own)
    assert planted.texts[:3] == own.texts
    assert len(planted) == 3 + len(chosen)
    assert all(canaries.members[chosen])
    assert set(canaries.site[chosen]) == {2}
    assert planted.units.tolist() == [0, 1, 0, *range(2, 2 + len(chosen))]


@pytest.mark.parametrize("features", ["label-centered", "pooled"])
def test_the_product_turns_a_canarys_embedding_into_its_features(
    features: str, plan_of: Callable[..., Plan], tmp_path: Path
) -> None:
    plan = plan_of({"adapter.features": features, "model.digest": "sha256:" + "0" * 64})
    own = np.random.default_rng(3).normal(size=(3, 32)).astype(np.float32) + 0.5
    audited = with_spare_classes(plan, 200, 32)
    assert len(audited.task.labels) == 3 + 4
    workspace = Workspace(audited, FeatureCache(tmp_path), Runtime())
    workspace.keep_embeddings(audited.task.texts, label_embeddings(own, 7, seed=0))
    canaries = Canaries.draw(200, 32, 1, seed=0)
    examples = Examples(tuple(map(str, range(200))), canaries.labels, np.arange(200))
    workspace.keep_embeddings(examples.texts, embeddings_of(canaries.features, workspace))
    batches: Any = workspace.batches(examples)
    np.testing.assert_allclose(batches.features.numpy(), canaries.features, atol=1e-5)


def test_spare_classes_leave_features_and_the_start_of_the_others_alone() -> None:
    own = np.random.default_rng(3).normal(size=(3, 32)).astype(np.float32) + 0.5
    spec = AdapterSpec()
    before = LabelFrame(torch.from_numpy(own), spec)
    after = LabelFrame(torch.from_numpy(label_embeddings(own, 9, seed=0)), spec)
    torch.testing.assert_close(after.center, before.center, atol=1e-6, rtol=0)
    torch.testing.assert_close(after.initial_head()[:3], before.initial_head(), atol=1e-5, rtol=0)


def test_a_plan_with_room_for_the_canaries_keeps_its_classes(plan_of: Callable[..., Plan]) -> None:
    plan = plan_of()
    assert with_spare_classes(plan, 96, 32) == plan


# What the attacker computes


@pytest.mark.parametrize("units", [range(9), [0, 0, 1, 2, 2, 2, 3, 1, 4]], ids=["rows", "several-rows"])
def test_the_attackers_clipped_gradients_are_the_products(units: Any) -> None:
    dice = np.random.default_rng(8)
    features = dice.normal(size=(9, 6)).astype(np.float32)
    records = Records(features, dice.integers(0, 4, 9), np.asarray(units, dtype=np.int64))
    weights = dice.normal(size=(4, 6)).astype(np.float32)
    layer = nn.Linear(6, 4, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weights))
    tape = GradientTape(layer)
    with tape.recording(torch.from_numpy(records.units), int(records.units.max()) + 1):
        scores = layer(torch.from_numpy(features))
        nn.functional.cross_entropy(scores, torch.from_numpy(records.labels), reduction="sum").backward()
    total = tape.clip(0.7).total.numpy().reshape(4, 6)
    plain, clipped = records.clipped(weights, 0.7)
    np.testing.assert_allclose(records.total(clipped), total, rtol=1e-3, atol=1e-4)
    matrix = dice.normal(size=(4, 6)).astype(np.float32)
    by_hand = [np.sum(np.outer(r, x) * matrix) for r, x in zip(plain, features, strict=True)]
    np.testing.assert_allclose(records.project(plain, matrix), by_hand, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_features_lie_in_the_space_that_is_reconstructed_from_their_update(batch: int) -> None:
    dice = np.random.default_rng(9)
    features = dice.normal(size=(batch, 40))
    update = dice.normal(size=(12, batch)) @ features
    basis = reconstruct(update, batch)
    np.testing.assert_allclose(features @ basis.T @ basis, features, atol=1e-9)


def test_ideal_retrieval_is_chance_without_signal_and_certain_with_much() -> None:
    assert ideal_retrieval(0.0, 1000) == pytest.approx(0.001, rel=1e-6)
    assert ideal_retrieval(0.5, 2) == pytest.approx(0.6382, abs=1e-4)  # Φ(0.5/√2)
    assert ideal_retrieval(12.0, 1000) == pytest.approx(1.0, abs=1e-6)


def test_intervals_of_rates_are_clopper_and_pearsons() -> None:
    assert Retrieval(0, 1000).interval == pytest.approx((0.0, 1 - 0.025 ** (1 / 1000)))
    assert Retrieval(1000, 1000).interval == pytest.approx((0.025 ** (1 / 1000), 1.0))
    low, high = Retrieval(3, 1000).interval
    assert (low, high) == pytest.approx((0.000619, 0.008741), abs=2e-6)


# Pages and command


def canary_result(bound: float) -> CanaryAudit:
    return CanaryAudit(
        scenario="bank-demo",
        noise="cohort",
        secure_aggregation="malicious",
        participants=10,
        rounds=100,
        seed=0,
        canaries=2000,
        members=1000,
        spare_classes=42,
        guesses=40,
        correct=38,
        confidence=0.95,
        delta=DELTA,
        accuracy=0.9,
        seconds=12.345,
        epsilon_spent=1.97,
        epsilon_all_collude=7.4,
        epsilon_claimed=2.0,
        epsilon_lower_bound=bound,
        auc=0.64,
        tpr_at_1pct_fpr=0.04,
    )


@pytest.mark.parametrize(("bound", "refuted"), [(1.9999, False), (2.41, True)])
def test_the_canary_page_says_whether_the_claim_stands(bound: float, refuted: bool, tmp_path: Path) -> None:
    result = canary_result(bound)
    dice = np.random.default_rng(0)
    page = write_canaries(result, dice.normal(size=2000), dice.integers(0, 2, 2000).astype(bool), tmp_path)
    text = page.read_text()
    assert ("The claim stands." in text, "That refutes the claim." in text) == (not refuted, refuted)
    assert ("Claim refuted" in text) == refuted
    assert "1.999" in text or refuted
    assert "http" not in text.split("</style>")[1]
    assert json.loads((tmp_path / "audit-canaries.json").read_text())["epsilon_lower_bound"] == bound
    assert (tmp_path / "audit-scores.png").stat().st_size > 5000
    assert list(result.to_json())[-4:] == ["epsilon_claimed", "epsilon_lower_bound", "auc", "tpr_at_1pct_fpr"]


def test_the_inversion_page_shows_both_updates(tmp_path: Path) -> None:
    bare, private = (Attack(Retrieval(hits, 1000), Retrieval(hits, 1000), 0.5) for hits in (995, 1))
    result = InversionAudit(
        scenario="bank-demo",
        noise="cohort",
        secure_aggregation="malicious",
        participants=10,
        seed=0,
        delta=DELTA,
        candidates=1000,
        bare={1: bare, 8: bare},
        private={1: private, 8: private},
        ideal_one_sum=0.0017,
        ideal_whole_run=0.06,
        seconds=1.0,
        epsilon_claimed=8.0,
    )
    text = write_inversion(result, tmp_path).read_text()
    assert "99.50" in text
    assert "0.10" in text
    values = json.loads((tmp_path / "audit-inversion.json").read_text())
    assert values["retrieval_bare"] == {"1": 0.995, "8": 0.995}
    assert values["retrieval_private"] == {"1": 0.001, "8": 0.001}
    assert (values["batch_sizes"], values["candidates"], values["trials"]) == ([1, 8], 1000, {"1": 1000, "8": 1000})


def test_no_option_weakens_the_privacy_of_a_run() -> None:
    common = {"scenario", "epsilon", "noise", "seed", "data", "sets", "out", "as_json"}
    assert set(inspect.signature(cli_audit.canaries).parameters) == common | {"count"}
    assert set(inspect.signature(cli_audit.inversion).parameters) == common | {"trials"}


@pytest.mark.parametrize("command", ["canaries", "inversion"])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--noise", "none"], "the audit needs"),
        (["--noise", "participant"], "the audit needs"),
        (["--set", "privacy.noise=site"], "contradicts"),
        (["--set", "local.momentum=0.5", "--noise", "site"], "one step of sgd"),
    ],
)
def test_what_claims_nothing_or_has_no_attack_is_refused(command: str, options: list[str], words: str) -> None:
    small = ["--set", "data.records_per_participant=20", "--set", "data.test_records_per_participant=10"]
    outcome = CliRunner().invoke(cli_audit.audit_app, [command, "bank-demo", *small, *options])
    assert isinstance(outcome.exception, PlanError)
    assert words in str(outcome.exception)


@pytest.mark.parametrize(("statistic", "said"), [(1.0, "all 1 passed"), (9.0, "failed: variance")])
def test_the_canary_page_says_what_tests_of_the_mechanism_found(statistic: float, said: str, tmp_path: Path) -> None:
    result = replace(canary_result(1.0), checks=(Check("variance", statistic, 5.7),))
    assert result.to_json()["failed_checks"] == (["variance"] if statistic > 5.7 else [])
    dice = np.random.default_rng(0)
    page = write_canaries(result, dice.normal(size=2000), dice.integers(0, 2, 2000).astype(bool), tmp_path)
    assert said in page.read_text()
