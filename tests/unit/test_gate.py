"""Between the coordinator and the site: whose plan, the policy, the operator's word; at every message."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest

from accord_client.connectors import make_spec
from accord_client.gate import Gate
from accord_client.settings import SiteFolder
from accord_shared import PROTOCOL_VERSION
from accord_shared.errors import (
    ImpostorError,
    PlanError,
    PlanNotApproved,
    PolicyRefused,
    ProtocolError,
    SettingsError,
)
from accord_shared.identity import Identity
from accord_shared.messages import Enquiry, OpenRequest, TrainRequest
from accord_shared.plan import Plan, read_plan
from accord_shared.signatures import PlanSignature
from accord_simulations.deployment.material import site_policy

COORDINATOR = Identity.from_seeds(b"c" * 32, b"d" * 32)
STRANGER = Identity.from_seeds(b"x" * 32, b"y" * 32)
NOON = datetime(2026, 1, 1, 12, 0)
DATA = {"messages": make_spec({"kind": "csv", "path": "m.csv", "text": "text", "label": "label"})}
SAMPLE = Path(__file__).parents[2] / "deploy" / "samples" / "plan.toml"


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    path = tmp_path_factory.mktemp("plan") / "plan.toml"
    path.write_text(SAMPLE.read_text().replace('unit = "column:customer"', 'unit = "row"'))
    return read_plan(path)


@pytest.fixture
def folder(tmp_path: Path, plan: Plan) -> SiteFolder:
    made = SiteFolder(tmp_path / "site")
    made.make()
    made.policy.write_text(site_policy(plan))
    return made


@pytest.fixture
def gate(folder: SiteFolder) -> Gate:
    return Gate(folder, COORDINATOR.keys.fingerprint, DATA)


def enquiry(plan: Plan, signer: Identity = COORDINATOR) -> Enquiry:
    signature = PlanSignature.of(plan.hash, signer).to_json()
    return Enquiry(PROTOCOL_VERSION, "run", plan.to_json(), plan.hash, "", plan_signature=signature)


def training(plan: Plan) -> TrainRequest:
    return TrainRequest(PROTOCOL_VERSION, "run", plan.hash, 1, 1, np.zeros(1, np.float32))


def approved(gate: Gate, plan: Plan) -> None:
    with pytest.raises(PlanNotApproved):
        gate.check(enquiry(plan), NOON)
    gate.book.approve(plan.hash)
    gate.check(enquiry(plan), NOON)
    gate.check(training(plan), NOON)


def test_a_plan_passes_once_its_operator_approved_it(gate: Gate, plan: Plan) -> None:
    with pytest.raises(PlanNotApproved):
        gate.check(training(plan), NOON)  # never offered
    approved(gate, plan)


def test_an_approval_is_of_one_hash(gate: Gate, plan: Plan) -> None:
    approved(gate, plan)
    other = plan.model_copy(update={"run": plan.run.model_copy(update={"seed": 7})})
    with pytest.raises(PlanNotApproved):
        gate.check(enquiry(other), NOON)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda given: replace(given, plan_signature=""), ImpostorError),
        (lambda given: replace(given, plan_signature="{}"), PlanError),
        (lambda given: replace(given, plan_hash="0" * 64), ProtocolError),
        (lambda given: replace(given, plan_json="{}"), PlanError),
        (
            lambda given: replace(given, plan_signature=PlanSignature.of("0" * 64, COORDINATOR).to_json()),
            ImpostorError,
        ),
        (
            lambda given: replace(
                given,
                plan_signature=PlanSignature.of(given.plan_hash, STRANGER)
                .model_copy(update={"key": COORDINATOR.keys})
                .to_json(),
            ),
            ImpostorError,
        ),
    ],
    ids=["unsigned", "no signature", "another hash", "no plan", "signature of another plan", "forged"],
)
def test_a_forged_or_altered_plan_is_refused(
    gate: Gate, plan: Plan, change: Callable[[Enquiry], Enquiry], error: type[Exception]
) -> None:
    approved(gate, plan)
    with pytest.raises(error):
        gate.check(change(enquiry(plan)), NOON)


def test_another_s_plan_is_refused_although_it_is_well_signed(gate: Gate, plan: Plan) -> None:
    with pytest.raises(PolicyRefused, match="signer"):
        gate.check(enquiry(plan, STRANGER), NOON)


def test_a_stricter_policy_stops_a_plan_that_was_approved(gate: Gate, folder: SiteFolder, plan: Plan) -> None:
    approved(gate, plan)
    folder.policy.write_text(site_policy(plan, changes={"noise": "site"}))
    with pytest.raises(PolicyRefused, match=r"privacy\.noise"):
        gate.check(training(plan), NOON)
    with pytest.raises(PolicyRefused, match=r"privacy\.noise"):
        gate.check(enquiry(plan), NOON)


def test_a_policy_that_cannot_be_read_allows_nothing(gate: Gate, folder: SiteFolder, plan: Plan) -> None:
    approved(gate, plan)
    folder.policy.write_text("version = 1\nnoize = 1\n")
    with pytest.raises(SettingsError):
        gate.check(training(plan), NOON)
    folder.policy.unlink()
    with pytest.raises(SettingsError):
        gate.check(training(plan), NOON)


def test_outside_its_hours_nothing_begins(gate: Gate, folder: SiteFolder, plan: Plan) -> None:
    approved(gate, plan)
    folder.policy.write_text(site_policy(plan, changes={"hours": "20:00-06:00"}))
    with pytest.raises(PolicyRefused, match="hours"):
        gate.check(training(plan), NOON)
    gate.check(training(plan), NOON.replace(hour=23))
    gate.check(OpenRequest("run", 1, 1, (0, 1), (0,), (b"",), (b"",)), NOON)  # what was begun is finished


def test_a_plan_whose_unit_the_data_does_not_have_is_refused_when_it_is_offered(gate: Gate, plan: Plan) -> None:
    task = plan.task.model_copy(update={"unit": "column:customer"})
    with pytest.raises(PolicyRefused, match="unit"):
        gate.check(enquiry(plan.model_copy(update={"task": task})), NOON)


def test_an_operator_may_let_the_policy_approve(gate: Gate, folder: SiteFolder, plan: Plan) -> None:
    folder.policy.write_text(site_policy(plan, changes={"approval": "policy"}))
    gate.check(enquiry(plan), NOON)
    gate.check(training(plan), NOON)
