"""What both audits start from: a scenario that claims something which they can attack."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from accord_client.data import Examples
from accord_client.features import FeatureBatches
from accord_client.metrics import hold_back
from accord_client.workspace import Workspace
from accord_shared.errors import PlanError
from accord_shared.plan import Plan
from accord_simulations.audit.gradients import Records
from accord_simulations.prepare import Prepared, prepare, resolve_scenario
from accord_simulations.scenario import Scenario


def prepare_audit(
    scenario: Scenario,
    changes: Mapping[str, Any],
    folder: Path,
    *,
    data: Path | None = None,
    cache: Path | None = None,
) -> Prepared:
    """The scenario's plan and records, where the audit has an attack on the plan.

    Under `site` noise every update may be seen by all: they are not summed securely.

    Raises:
        PlanError: it has none.
    """
    noise = changes.get("privacy.noise", scenario.plan.get("privacy", {}).get("noise", "site"))
    forced = {"secure_aggregation.mode": "off"} if noise == "site" else {}
    resolved = resolve_scenario(scenario, {**changes, **forced}, data, cache)
    plan = resolved.plan
    if plan.privacy.noise not in ("site", "cohort"):
        raise PlanError(f'privacy.noise = "{plan.privacy.noise}": the audit needs "cohort" or "site"')
    local = plan.local
    if plan.adapter.depth != "head" or (local.steps_per_round, local.optimizer, local.momentum) != (1, "sgd", 0.0):
        raise PlanError('the audit knows gradients of adapter.depth = "head" and one step of sgd a round alone')
    prepared = prepare(resolved, folder, cache)
    return replace(prepared, work=replace(prepared.work, durable=False, vault=None))


def known_records(workspace: Workspace, examples: Examples) -> Records:
    """A site's records that are trained on, as an attacker who knows them has them."""
    rest, _ = hold_back(examples, workspace.plan.evaluation.released_fraction)
    batches = workspace.batches(rest)
    if not isinstance(batches, FeatureBatches):
        raise PlanError("the audit knows gradients of a linear head alone")
    return Records(batches.features.numpy(), batches.labels.numpy(), batches.units)


def clip_norm_of(plan: Plan) -> float:
    """C.

    Raises:
        PlanError: the plan does not clip.
    """
    if plan.local.clip_norm is None:
        raise PlanError("without a clip norm there is nothing to audit")
    return plan.local.clip_norm
