"""The samples of deploy/ are read by the classes that a deployment reads them with, and fit each other."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from accord_client.ledger.entries import Limits
from accord_client.models import digest, locate
from accord_client.policy import Policy
from accord_client.settings import SiteFolder, SiteSettings
from accord_server.settings import CoordinatorSettings
from accord_shared.cli import _facts
from accord_shared.errors import PolicyRefused, SettingsError
from accord_shared.plan import Plan, read_plan
from accord_shared.service.keyfile import CREDENTIAL

DEPLOY = Path(__file__).parents[2] / "deploy"
SAMPLES = DEPLOY / "samples"
SIGNER, OTHER = "a" * 64, "b" * 64


@pytest.fixture
def plan() -> Plan:
    return read_plan(SAMPLES / "plan.toml")


@pytest.fixture
def policy() -> Policy:
    return Policy.read(SAMPLES / "policy.toml")


def test_the_coordinator_listens_on_loopback_and_sites_dial_the_front() -> None:
    settings = CoordinatorSettings.read(SAMPLES)
    assert settings.listen.host == settings.listen.metrics_host == "127.0.0.1"
    front = dict(re.findall(r'"(\d+) TLSv1\.3" 127\.0\.0\.1:(\d+);', (DEPLOY / "front/nginx.conf").read_text()))
    listen, public = settings.listen, settings.public
    assert front == {
        str(public.fleet): str(listen.fleet),
        str(public.api): str(listen.api),
        str(public.enrolment): str(listen.enrolment),
    }


def test_the_front_waits_longer_than_a_trip() -> None:
    minutes = re.search(r"proxy_timeout (\d+)m;", (DEPLOY / "front/nginx.conf").read_text())
    assert minutes is not None
    assert int(minutes[1]) * 60 > CoordinatorSettings.read(SAMPLES).rounds.trip_timeout_s


def test_the_site_has_the_data_that_its_policy_names(policy: Policy) -> None:
    settings = SiteSettings.read(SiteFolder(SAMPLES))
    assert policy.dataset in settings.data
    assert set(policy.limits) == set(settings.data)


def test_the_policy_allows_the_plan_and_little_else(policy: Policy, plan: Plan) -> None:
    policy.check(plan, SIGNER, SIGNER)
    with pytest.raises(PolicyRefused, match="signer"):
        policy.check(plan, OTHER, SIGNER)
    for change in (
        {"privacy.epsilon": 9.0},
        {"cohort.minimum": 2, "cohort.size": 2, "privacy.noise": "site"},
        {"secure_aggregation.mode": "semi_honest"},
        {"run.rounds": 101},
        {"model.digest": "sha256:" + "0" * 64},
    ):
        with pytest.raises(PolicyRefused, match=next(iter(change))):
            policy.check(plan.revised(change), SIGNER, SIGNER)


def test_the_plan_trains_on_the_sites_units_with_the_model_of_the_image(plan: Plan) -> None:
    settings = SiteSettings.read(SiteFolder(SAMPLES))
    assert {f"column:{spec.unit}" for spec in settings.data.values()} == {plan.task.unit}
    assert plan.model.digest == digest(locate(plan.model.source))


def test_the_plan_costs_no_more_than_the_policy_gives(policy: Policy, plan: Plan) -> None:
    facts, limits = _facts(plan), policy.limits["messages"]
    assert isinstance(limits, Limits)
    assert facts["epsilon_total"] <= (limits.run_epsilon or 0)
    assert facts["epsilon_all_collude"] <= (limits.run_epsilon_all_collude or 0)


@pytest.mark.parametrize("name", ["coordinator.toml", "site.toml", "policy.toml"])
def test_a_misspelt_key_is_an_error(name: str, tmp_path: Path) -> None:
    for sample in SAMPLES.glob("*.toml"):
        shutil.copy(sample, tmp_path)
    path = tmp_path / name
    path.write_text("misspelt = 1\n" + path.read_text())
    with pytest.raises(SettingsError, match="misspelt"):
        {
            "coordinator.toml": CoordinatorSettings.read,
            "site.toml": lambda folder: SiteSettings.read(SiteFolder(folder)),
            "policy.toml": lambda folder: Policy.read(folder / "policy.toml"),
        }[name](tmp_path)


def test_the_credential_has_the_name_that_the_keys_are_opened_with() -> None:
    for path in ("systemd/accord-server.service", "systemd/accord-site.service"):
        assert f"\nLoadCredential={CREDENTIAL}:" in (DEPLOY / path).read_text()
    assert (DEPLOY / "compose.yaml").read_text().count(f"target: {CREDENTIAL}") == 4
    for path in ("coordinator.yaml", "site.yaml"):
        assert f"path: {CREDENTIAL}" in (DEPLOY / "helm/accord/templates" / path).read_text()
