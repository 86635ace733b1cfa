"""From a scenario to what can run: population, plan, embeddings, participants' records on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from accord_client.data import Examples
from accord_client.facts import trainable_parameters
from accord_client.features import FeatureCache, default_folder
from accord_client.metrics import hold_back
from accord_client.models import digest, locate, verified
from accord_client.trainer import Runtime
from accord_client.workspace import Workspace
from accord_shared.dp.accounting import noise_multiplier
from accord_shared.errors import DataError, PlanError, SettingsError
from accord_shared.plan import Plan, first_problem
from accord_simulations.faults import TRIPS, FaultSpec
from accord_simulations.participants import WorkFolder
from accord_simulations.population import Population, PopulationSpec, build
from accord_simulations.scenario import Resolved, Resources, Scenario, foresee, resolve

Progress = Callable[[int], None]

_ROWS_IN_MEMORY = {"head": 4096, "lora": 64, "full": 32}


def runtime_of(resources: Resources, plan: Plan) -> Runtime:
    """The performance flags of the scenario, with a default micro-batch by depth."""
    return Runtime(
        device=resources.device,
        precision=resources.precision,
        rows_in_memory=resources.rows_in_memory or _ROWS_IN_MEMORY[plan.adapter.depth],
    )


def resolve_scenario(
    scenario: Scenario, changes: Mapping[str, Any], data: Path | None, cache: Path | None = None
) -> Resolved:
    """Build the population and the plan, and see that its model loads.

    Raises:
        DataError: the data set is missing, malformed, or has an empty participant.
        PlanError, ModelError, UnsupportedLayer: the plan contradicts itself, or its model is not there, is not sound or
            does not have what the plan names.
        SettingsError: there is no such device here.
    """
    scenario, early = foresee(scenario, changes)
    _check_device(scenario.resources.device)
    given = scenario.population.model_dump() | {"validation_fraction": early.evaluation.validation_fraction}
    try:
        spec = PopulationSpec.model_validate(given)
    except ValidationError as error:
        raise PlanError(f"evaluation.{first_problem(error)}") from None
    known = digest(locate(early.model.source))
    population = build(scenario.data, spec, path=data, seed=early.run.seed)
    for participant in population.participants:
        if not len(participant.train):
            raise DataError(f"participant {participant.name} has no records")
    resolved = resolve(scenario, population, changes, known)
    _check_model(resolved.plan, cache or default_folder() / "features")
    return resolved


def _check_model(plan: Plan, cache: Path) -> None:
    """Label names that are in the cache were embedded by this very model, so it is sound."""
    if plan.adapter.depth != "head":
        trainable_parameters(plan)
        return
    verified(plan.model)
    Workspace(plan, FeatureCache(cache), Runtime()).embeddings(plan.task.texts)


def _check_device(device: str) -> None:
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.startswith("cuda") and int(device.partition(":")[2] or 0) >= found:
        raise SettingsError(f"resources.device = {device!r}, but torch finds {found} GPUs here")


@dataclass(frozen=True)
class Prepared:
    """A resolved scenario with its records and embeddings in place."""

    resolved: Resolved
    workspace: Workspace
    work: WorkFolder

    @property
    def plan(self) -> Plan:
        """The plan that runs."""
        return self.resolved.plan

    @property
    def population(self) -> Population:
        """The participants."""
        return self.resolved.population

    @property
    def held_out(self) -> Examples:
        """The records that are scored: the validation split where the plan carves one, else the test split."""
        return self.population.validation or self.population.test

    def workspace_for(self, plan: Plan) -> Workspace:
        """A workspace of a comparison's plan over the same cached embeddings."""
        if plan.hash == self.plan.hash:
            return self.workspace
        return Workspace(plan, FeatureCache(self.work.cache), runtime_of(self.resolved.scenario.resources, plan))

    def work_for(self, name: str, plan: Plan, participants: int) -> WorkFolder:
        """A work folder for a comparison beside the federation's own; without faults."""
        return replace(
            self.work,
            root=self.work.root / "compare" / name,
            participants=participants,
            faults=FaultSpec(),
            noise_multiplier=noise_multiplier(plan),
            durable=False,
            vault=None,
            trips=1,
        )


def prepare(resolved: Resolved, folder: Path, cache: Path | None, on_embedded: Progress = lambda _: None) -> Prepared:
    """Lay out `folder` for the participants and embed every text once (depth `head`).

    Embeddings are kept in `cache` over runs, by unique text: they depend on neither partition nor seed.
    """
    plan, scenario = resolved.plan, resolved.scenario
    runtime = runtime_of(scenario.resources, plan)
    work = WorkFolder(
        root=folder,
        cache=folder / "features",
        participants=len(resolved.population.participants),
        seed=plan.run.seed,
        runtime=runtime,
        faults=scenario.faults,
        trips=TRIPS[plan.secure_aggregation.mode],
        noise_multiplier=noise_multiplier(plan),
    )
    workspace = Workspace(plan, FeatureCache(work.cache), runtime)
    for index, participant in enumerate(resolved.population.participants):
        work.put_records(index, participant.name, participant.train)
    _share_embeddings(resolved, workspace, cache or default_folder() / "features", on_embedded)
    return Prepared(resolved=resolved, workspace=workspace, work=work)


def _share_embeddings(resolved: Resolved, workspace: Workspace, cache: Path, on_embedded: Progress) -> None:
    population, labels = resolved.population, resolved.plan.task.texts
    groups: list[Examples] = [population.train, population.test]
    groups += [population.validation] if population.validation is not None else []
    if resolved.plan.adapter.depth != "head":
        groups = []
    unique = tuple(sorted({text for group in groups for text in group.texts} | set(labels)))
    runtime = replace(workspace.runtime, rows_in_memory=64)
    source = Workspace(resolved.plan, FeatureCache(cache), runtime)
    embeddings = source.embeddings(unique, on_embedded)
    place = {text: index for index, text in enumerate(unique)}

    def keep(texts: tuple[str, ...]) -> None:
        workspace.keep_embeddings(texts, np.ascontiguousarray(embeddings[[place[text] for text in texts]]))

    keep(labels)
    for group in groups:
        keep(group.texts)
    if groups:
        for participant in population.participants:
            keep(participant.train.texts)
            for part in hold_back(participant.train, resolved.plan.evaluation.released_fraction):
                keep(part.texts)
