"""The site's policy: silence allows nothing, and no key of a plan slips below what the operator asks for."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from accord_client.connectors import make_spec
from accord_client.ledger.entries import DataSet, Limits
from accord_client.policy import POLICY_TEMPLATE, Policy
from accord_client.store import SiteStore
from accord_shared.dp.accounting import round_event
from accord_shared.errors import LimitReached, PolicyRefused, SettingsError
from accord_shared.plan import Plan
from conftest import plan_of

ME, STRANGER = "a" * 64, "b" * 64
DIGEST, OTHER_DIGEST = f"sha256:{'1' * 64}", f"sha256:{'2' * 64}"
LIMITS = {"delta": 1e-5, "epsilon": 8.0, "epsilon_all_collude": 40.0, "run_epsilon": 2.0}
PLAN: dict[str, Any] = {
    "run.rounds": 20,
    "run.max_extra_attempts": 2,
    "model.digest": DIGEST,
    "privacy.noise": "cohort",
    "privacy.epsilon": 1.0,
    "cohort.size": 5,
    "cohort.minimum": 5,
    "cohort.colluders": 1,
    "secure_aggregation.mode": "malicious",
    "local.momentum": 0.0,
}
POLICY: dict[str, Any] = {
    "version": 1,
    "tasks": ["classification"],
    "models": [DIGEST],
    "dataset": "cases",
    "noise": "cohort",
    "secure_aggregation": "malicious",
    "minimum": 3,
    "colluders": 1,
    "most_rounds": 20,
    "most_extra_attempts": 2,
    "datasets": {"cases": LIMITS},
}


def policy(tmp_path: Path, **changes: Any) -> Policy:
    path = tmp_path / "policy.toml"
    path.write_text(tomli_w.dumps({key: value for key, value in (POLICY | changes).items() if value is not None}))
    return Policy.read(path)


def plan(**changes: Any) -> Plan:
    return plan_of(PLAN | {key.replace("__", "."): value for key, value in changes.items()})


def test_what_is_within_is_allowed(tmp_path: Path) -> None:
    policy(tmp_path).check(plan(), ME, ME)


def test_the_template_reads_and_allows_nothing(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text(POLICY_TEMPLATE)
    found = Policy.read(tmp_path / "policy.toml")
    assert (found.approval, found.noise, found.secure_aggregation, found.minimum) == (
        "operator",
        "cohort",
        "malicious",
        3,
    )
    with pytest.raises(PolicyRefused):
        found.check(plan(), ME, ME)
    refused = {one.key for one in found.findings(plan(), ME, ME) if not one.fits}
    assert refused == {"task.kind", "model.digest", "dataset"}


def test_the_template_s_comments_are_a_policy(tmp_path: Path) -> None:
    text = POLICY_TEMPLATE.replace("\n# dataset =", "\ndataset =").replace("\n# hours =", "\nhours =")
    head, _, tables = text.partition("\n# [datasets.cases]\n")
    (tmp_path / "policy.toml").write_text(f"{head}\n[datasets.cases]\n" + re.sub(r"(?m)^# ", "", tables))
    found = Policy.read(tmp_path / "policy.toml")
    (dataset,) = found.datasets()
    assert dataset.limits.run_epsilon_all_collude == 5.0
    assert found.hours == "20:00-06:00"


DOWNGRADES: dict[str, tuple[dict[str, Any], str]] = {
    "noise none": ({"privacy.noise": "none", "privacy.epsilon": None}, "privacy.noise"),
    "secure aggregation semi-honest": (
        {"secure_aggregation.mode": "semi_honest", "cohort.minimum": 5},
        "secure_aggregation.mode",
    ),
    "secure aggregation off": (
        {"secure_aggregation.mode": "off", "privacy.noise": "site"},
        "secure_aggregation.mode",
    ),
    "colluders": ({"cohort.colluders": 0}, "cohort.colluders"),
    "epsilon": ({"privacy.epsilon": 2.1}, "privacy.epsilon"),
    "delta": ({"privacy.delta": 1e-4}, "privacy.delta"),
    "rounds": ({"run.rounds": 21}, "run.rounds"),
    "attempts": ({"run.max_extra_attempts": 3}, "run.max_extra_attempts"),
    "model": ({"model.digest": OTHER_DIGEST}, "model.digest"),
    "model without digest": ({"model.digest": None}, "model.digest"),
}


@pytest.mark.parametrize("name", DOWNGRADES)
def test_each_downgrade_is_refused_by_its_key(name: str, tmp_path: Path) -> None:
    changes, key = DOWNGRADES[name]
    with pytest.raises(PolicyRefused) as refused:
        policy(tmp_path).check(plan(**changes), ME, ME)
    line = str(refused.value)
    assert line.startswith(f"{key}: this site's policy asks for ")
    assert ", not " in line
    only = [one.key for one in policy(tmp_path).findings(plan(**changes), ME, ME) if not one.fits]
    assert only == [key]


def test_the_minimum_is_kept(tmp_path: Path) -> None:
    with pytest.raises(PolicyRefused, match=r"cohort\.minimum: .* 6 at least, not 5"):
        policy(tmp_path, minimum=6).check(plan(), ME, ME)
    policy(tmp_path, minimum=5).check(plan(), ME, ME)


def test_other_signers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PolicyRefused, match="signer"):
        policy(tmp_path).check(plan(), STRANGER, ME)
    named = policy(tmp_path, signers=[STRANGER])
    named.check(plan(), STRANGER, ME)
    with pytest.raises(PolicyRefused, match="signer"):
        named.check(plan(), ME, ME)  # where signers are named the coordinator is none by itself


@pytest.mark.parametrize(
    ("least", "allowed"),
    [
        ("none", {"none", "cohort", "participant", "site"}),
        ("cohort", {"cohort", "participant", "site"}),
        ("participant", {"cohort", "participant", "site"}),
        ("site", {"site"}),
    ],
)
def test_noise_is_ordered(least: str, allowed: set[str], tmp_path: Path) -> None:
    found = policy(tmp_path, noise=least)
    for noise in ("none", "cohort", "participant", "site"):
        given = plan(**{"privacy.noise": noise, "privacy.epsilon": None if noise == "none" else 1.0})
        fits = {one.key: one.fits for one in found.findings(given, ME, ME)}["privacy.noise"]
        assert fits == (noise in allowed), noise


@pytest.mark.parametrize(
    ("least", "allowed"),
    [("off", {"off", "semi_honest", "malicious"}), ("semi_honest", {"semi_honest", "malicious"})],
)
def test_secure_aggregation_is_ordered(least: str, allowed: set[str], tmp_path: Path) -> None:
    found = policy(tmp_path, secure_aggregation=least)
    for mode in ("off", "semi_honest", "malicious"):
        given = plan(**{"secure_aggregation.mode": mode, "privacy.noise": "site"})
        if mode in allowed:
            found.check(given, ME, ME)
        else:
            with pytest.raises(PolicyRefused, match=r"secure_aggregation\.mode"):
                found.check(given, ME, ME)


def test_an_epsilon_over_the_data_set_s_whole_budget_is_refused(tmp_path: Path) -> None:
    limits = {"epsilon": 0.5, "epsilon_all_collude": 4.0}
    with pytest.raises(PolicyRefused, match=r"privacy\.epsilon: .* 0\.5 at most, not 1"):
        policy(tmp_path, datasets={"cases": limits}).check(plan(), ME, ME)


def test_both_epsilons_reach_the_ledger(tmp_path: Path) -> None:
    """What the policy cannot see of a plan, ε if all others collude, the ledger checks by the policy's limits."""
    found = policy(
        tmp_path, datasets={"cases": {**LIMITS, "run_epsilon_all_collude": 3.0, "derived_from": "all"}, "all": LIMITS}
    )
    one, other = found.datasets()
    assert one == DataSet(name="cases", derived_from="all", limits=Limits(**LIMITS, run_epsilon_all_collude=3.0))
    assert other == DataSet(name="all", limits=Limits(**LIMITS))
    store = SiteStore(tmp_path / "site", datasets=found.datasets())
    given = plan()
    weak = round_event(given, 30.0, 3.0)
    with pytest.raises(LimitReached, match="if all others collude"):
        store.check_plan(given.hash, weak, given.releases, dataset="cases")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"version": 2}, "version"),
        ({"signer": [ME]}, "unknown key: signer"),
        ({"signers": ["abc"]}, "signers"),
        ({"models": ["1" * 64]}, "models"),
        ({"tasks": ["generation"]}, "tasks"),
        ({"noise": "weak"}, "noise"),
        ({"noise": True}, "noise"),
        ({"secure_aggregation": "honest"}, "secure_aggregation"),
        ({"minimum": 0}, "minimum"),
        ({"minimum": "3"}, "minimum"),
        ({"colluders": -1}, "colluders"),
        ({"approval": "nobody"}, "approval"),
        ({"dataset": "loans"}, "has no table"),
        ({"datasets": {"../x": LIMITS}}, "datasets"),
        ({"datasets": {"cases": {**LIMITS, "epsilon": 0.0}}}, "datasets.cases.epsilon"),
        ({"datasets": {"cases": {**LIMITS, "epsilon": float("inf")}}}, "datasets.cases.epsilon"),
        ({"datasets": {"cases": {**LIMITS, "epsilon": float("nan")}}}, "datasets.cases.epsilon"),
        ({"datasets": {"cases": {**LIMITS, "run_epsilonn": 1.0}}}, "run_epsilonn"),
        ({"datasets": {"cases": {**LIMITS, "accountant": "none"}}}, "accountant"),
        ({"datasets": {"cases": {**LIMITS, "delta": 0.0}}}, "delta"),
        ({"datasets": {"cases": {**LIMITS, "derived_from": "loans"}}}, "derived_from"),
        ({"datasets": {"cases": {"epsilon": 1.0}}}, "datasets.cases.epsilon_all_collude"),
        ({"datasets": {"cases": {"epsilon_all_collude": 1.0}}}, "datasets.cases.epsilon "),
        ({"hours": "20-6"}, "hours"),
        ({"hours": "24:00-06:00"}, "hours"),
        ({"hours": "06:00-06:00"}, "allows no time"),
        ({"hours": "06:00-06:60"}, "hours"),
    ],
)
def test_a_policy_that_does_not_fit_is_refused(changes: dict[str, Any], word: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as refused:
        policy(tmp_path, **changes)
    line = str(refused.value)
    assert word in line
    assert "policy.toml" in line
    assert "\n" not in line


def test_without_privacy_no_limit_is_asked_for(tmp_path: Path) -> None:
    found = policy(tmp_path, noise="none", datasets={"cases": {}})
    found.check(plan(**{"privacy.noise": "none", "privacy.epsilon": None}), ME, ME)


def test_without_a_data_set_no_plan_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(PolicyRefused, match="dataset"):
        policy(tmp_path, dataset=None).check(plan(), ME, ME)


def test_a_policy_that_is_absent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot read"):
        Policy.read(tmp_path / "policy.toml")


@pytest.mark.parametrize(
    ("hours", "inside", "outside"),
    [
        ("20:00-06:00", ["20:00", "23:59", "00:00", "05:59"], ["06:00", "12:00", "19:59"]),
        ("08:30-17:00", ["08:30", "12:00", "16:59"], ["08:29", "17:00", "00:00"]),
        ("00:00-23:59", ["00:00", "23:58"], ["23:59"]),
        (None, ["00:00", "12:00"], []),
    ],
)
def test_hours(hours: str | None, inside: list[str], outside: list[str], tmp_path: Path) -> None:
    found = policy(tmp_path, hours=hours)
    for text in inside:
        found.check_hours(datetime.fromisoformat(f"2026-11-25T{text}"))
    for text in outside:
        with pytest.raises(PolicyRefused, match=f"hours: .*{hours}.*{text}"):
            found.check_hours(datetime.fromisoformat(f"2026-11-25T{text}"))


def test_the_declared_data_has_a_say_too(tmp_path: Path) -> None:
    found = policy(tmp_path)
    table = {"kind": "csv", "path": "cases.csv", "text": "text", "label": "label"}
    rows, customers = make_spec(table), make_spec({**table, "unit": "customer"})
    assert found.problem(plan(), ME, ME, {"cases": rows}) is None
    assert "task.unit" in (found.problem(plan(), ME, ME, {"cases": customers}) or "")  # a row protects less
    assert found.problem(plan(**{"task.unit": "column:customer"}), ME, ME, {"cases": customers}) is None
    assert "not among its data" in (found.problem(plan(), ME, ME, {"loans": rows}) or "")
    assert "signer" in (found.problem(plan(), STRANGER, ME, {"cases": rows}) or "")
