"""Scenarios: a population, its faults and a plan in one TOML file, resolved to what will run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from accord_shared.canonical import canonical_hash
from accord_shared.dp.accounting import noise_multiplier
from accord_shared.errors import PlanError
from accord_shared.plan import Plan, apply_changes, first_problem, label_text, make_plan, read_toml
from accord_shared.secagg.thresholds import COMPLETE_MAX
from accord_simulations.faults import TRIPS, FaultSpec
from accord_simulations.population import DataSpec, Population, PopulationSpec, label_names

SPARSE_DROPOUT = 0.1
"""Up to here a sparse graph is asked to stand twice the expected losses; it is much cheaper the fewer they are."""

COMPARISONS = ("alone", "nonprivate", "central", "central_nonprivate")


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Title(_Table):
    """Name and one paragraph of what is emulated."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    text: str


class Tuned(_Table):
    """Plan keys found on a validation split, applied `when` the plan's depth, noise and epsilon match.

    Entries that name an epsilon compete: the one nearest in log ε among those that match otherwise is taken.
    `how` says which data and grid they come from.
    """

    when: dict[str, Any]
    set: dict[str, Any]
    how: str

    @field_validator("when")
    @classmethod
    def _positive_epsilon(cls, when: dict[str, Any]) -> dict[str, Any]:
        epsilon = when.get("epsilon", 1.0)
        if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not 0 < epsilon < math.inf:
            raise ValueError(f"tuned.when.epsilon = {epsilon!r} is not a positive number")
        return when


class Auto(_Table):
    """The server's learning rate from public constants: η = R·(1−β) / (C·T), R = min(`travel`·N/σ_eff, `longest`).

    R bounds how far T clipped steps of norm C can carry the weights under momentum β; noise makes long ways
    worthless, so it shrinks with the noise on the sum: σ_eff = σ√(n/T) when each of n sites adds all of its own,
    σ√(n/(n-c)/T) when they share it. N is the expected number of records of all sites. It replaces a grid per ε, n
    and T; with `noise = "none"` the plan's own rate stands.
    """

    travel: float = Field(gt=0)
    longest: float = Field(gt=0)

    def learning_rate(self, plan: Plan) -> float:
        """η for the plan, at 4 digits."""
        releases = plan.rounds_per_site * plan.local.steps_per_round
        sharers = plan.cohort.size / (plan.noise_sharers if plan.shared_noise else 1)
        effective = noise_multiplier(plan) * math.sqrt(sharers / releases)
        records = plan.local.expected_records * plan.cohort.size
        way = min(self.travel * records / effective, self.longest)
        momentum = plan.server.momentum if plan.server.optimizer == "fedavgm" else 0.0
        return float(f"{way * (1 - momentum) / ((plan.local.clip_norm or 1.0) * plan.run.rounds):.4g}")


class Resources(_Table):
    """Performance flags of the simulation; none of them changes what is computed."""

    cpus_per_participant: float = Field(default=1.0, gt=0, le=4096)
    gpus_per_participant: float = Field(default=0.0, ge=0, le=64)
    device: str = Field(default="cpu", pattern=r"^(cpu|cuda(:[0-9]{1,2})?)$")
    precision: str = Field(default="fp32", pattern="^(fp32|bf16)$")
    rows_in_memory: int | None = Field(default=None, ge=1, le=2**31)
    round_timeout_s: float = Field(default=3600.0, gt=0, le=10**7)


class Scenario(_Table):
    """A scenario file."""

    scenario: Title
    data: DataSpec
    population: PopulationSpec
    faults: FaultSpec = FaultSpec()
    resources: Resources = Resources()
    plan: dict[str, Any]
    auto: Auto | None = None
    tuned: tuple[Tuned, ...] = ()
    compare: dict[str, dict[str, Any]] = {}

    @property
    def digest(self) -> str:
        """SHA-256, hexadecimal, of all that a run depends on beside its plan and its records."""
        return canonical_hash(self.model_dump(mode="json", include={"data", "population", "faults", "compare"}))


def shipped() -> dict[str, Path]:
    """Scenario files that come with Accord, by name."""
    folder = Path(str(files("accord_simulations") / "scenarios"))
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def make_scenario(table: Mapping[str, Any]) -> Scenario:
    """Validate a nested table.

    Raises:
        PlanError: one line that names the key.
    """
    try:
        scenario = Scenario.model_validate(table)
    except ValidationError as error:
        raise PlanError(first_problem(error)) from None
    unknown = sorted(set(scenario.compare) - set(COMPARISONS))
    if unknown:
        raise PlanError(f"unknown key: compare.{unknown[0]} (known: {', '.join(COMPARISONS)})")
    return scenario


def read_scenario(name: str) -> dict[str, Any]:
    """The table of a shipped scenario, or of a file by its path.

    Raises:
        PlanError: neither is there.
    """
    known = shipped()
    path = known.get(name) or Path(name)
    if not path.exists():
        raise PlanError(f"no scenario {name!r}: shipped are {', '.join(known)}; or give the path of a .toml file")
    return read_toml(path)


def override(table: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A scenario table with dotted keys replaced; keys of the plan need no `plan.` in front.

    Raises:
        PlanError: a key names no table of a scenario or plan.
    """
    own = set(Scenario.model_fields)
    full: dict[str, Any] = {}
    for key, value in changes.items():
        top = key.split(".")[0]
        if top not in own and top not in Plan.model_fields:
            raise PlanError(f"unknown key: {key}")
        full[key if top in own else f"plan.{key}"] = value
    return apply_changes(dict(table), full)


def split_changes(name: str, changes: Mapping[str, Any]) -> tuple[Scenario, dict[str, Any]]:
    """The scenario with its own keys changed, and the changes that are the plan's.

    Raises:
        PlanError: the scenario is unknown, a key belongs to neither.
    """
    table = read_scenario(name)
    override(table, changes)
    in_plan = {key: value for key, value in changes.items() if key.split(".")[0] in Plan.model_fields}
    own = {key: value for key, value in changes.items() if key not in in_plan}
    return make_scenario(override(table, own)), in_plan


@dataclass(frozen=True)
class Resolved:
    """A scenario with every choice made: the population that exists and the plan that runs."""

    scenario: Scenario
    population: Population
    plan: Plan
    tuned: tuple[str, ...]
    """Where the tuned keys come from."""


@dataclass(frozen=True)
class Facts:
    """What a plan may leave to a simulated population: all of it is public there."""

    labels: tuple[str, ...]
    label_texts: tuple[str, ...]
    participants: int
    records: int
    """Training records of all participants."""
    unit: str

    @staticmethod
    def of(population: Population) -> Facts:
        """The facts of a population that exists."""
        return Facts(
            labels=population.labels,
            label_texts=population.label_texts,
            participants=len(population.participants),
            records=len(population.train),
            unit=population.unit,
        )


def resolve(
    scenario: Scenario,
    population: Population,
    changes: Mapping[str, Any],
    model_digest: str | None,
    tuned_for: str | None = None,
) -> Resolved:
    """Fill what a scenario may leave to the population, apply tuned keys, then the user's `changes`.

    Tuned keys are those of `tuned_for`, if there are any, or of the plan's noise mode. Labels, unit of privacy, mean
    records per participant and the cohort's size are public facts of a simulated population. The
    population that is returned has its classes numbered as the plan does.

    Raises:
        PlanError: the result contradicts itself or the population.
        DataError: records have a label that the plan does not.
    """
    facts = Facts.of(population)
    plan, matching = _planned(scenario, facts, changes, model_digest, tuned_for)
    fixed = {*changes, *(key for entry in matching for key in entry.set)}
    if scenario.auto is not None and plan.privacy.noise != "none" and "server.learning_rate" not in fixed:
        plan = plan.revised({"server.learning_rate": scenario.auto.learning_rate(plan)})
    return Resolved(
        scenario=scenario,
        population=population.labelled(plan.task.labels),
        plan=plan,
        tuned=tuple(entry.how for entry in matching),
    )


def foresee(scenario: Scenario, changes: Mapping[str, Any]) -> tuple[Scenario, Plan]:
    """The scenario with its unit of privacy decided, and its plan as far as it is known before the data is read.

    So no key is used that was not validated. The plan's `local.expected_records` is 1 where that is left to the data.

    Raises:
        PlanError: the plan contradicts itself or the data, whatever its records are.
    """
    _require_tables(apply_changes(scenario.plan, dict(changes)))
    scenario = _with_unit(scenario, changes)
    participants = scenario.population.participants
    labels, texts = label_names(scenario.data)
    facts = Facts(labels, texts, participants, records=participants, unit=scenario.data.unit)
    return scenario, _planned(scenario, facts, changes, None, None)[0]


def _require_tables(plan: Mapping[str, Any]) -> None:
    for name, value in plan.items():
        if name != "version" and name in Plan.model_fields and not isinstance(value, dict):
            raise PlanError(f"plan.{name} = {str(value)[:60]!r}: must be a table")


def _with_unit(scenario: Scenario, changes: Mapping[str, Any]) -> Scenario:
    """The scenario whose records are grouped by the plan's `task.unit` where that is given; else `data.unit` stands.

    Raises:
        PlanError: plan and data name different units, or such data has no such unit.
    """
    wanted = changes.get("task.unit", scenario.plan.get("task", {}).get("unit"))
    data = scenario.data
    if wanted is None or wanted == data.unit:
        return scenario
    if "unit" in data.model_fields_set:
        raise PlanError(f"task.unit = {str(wanted)[:60]!r} contradicts data.unit = {data.unit!r}")
    try:
        grouped = type(data).model_validate({**data.model_dump(exclude_unset=True), "unit": wanted})
    except ValidationError:
        said = f'data of kind "{data.kind}" has no such unit of privacy'
        raise PlanError(f"task.unit = {str(wanted)[:60]!r}: {said}") from None
    return scenario.model_copy(update={"data": grouped})


def _planned(
    scenario: Scenario, known: Facts, changes: Mapping[str, Any], model_digest: str | None, tuned_for: str | None
) -> tuple[Plan, list[Tuned]]:
    """The plan before `[auto]`, and which tuned keys are in it."""
    _require_tables(apply_changes(scenario.plan, dict(changes)))
    participants = known.participants
    dropping = math.ceil(scenario.faults.dropout * participants)
    facts: dict[str, Any] = {
        "run.name": scenario.scenario.name,
        "task.labels": list(known.labels),
        "task.label_texts": _label_texts(known, scenario.plan.get("task", {}), changes),
        "task.unit": known.unit,
        "local.expected_records": max(1, round(known.records / participants)),
        "cohort.size": participants,
    }
    mode = changes.get("secure_aggregation.mode") or scenario.plan.get("secure_aggregation", {}).get("mode")
    if mode == "off":
        facts["cohort.minimum"] = max(1, math.ceil(participants / 2) - dropping)
    elif participants > COMPLETE_MAX and scenario.faults.dropout < SPARSE_DROPOUT:
        facts["cohort.minimum"] = participants - max(2 * dropping, participants // 10)
    if model_digest is not None:
        facts["model.digest"] = model_digest
    given = _flat(scenario.plan)
    if "task.labels" in changes:  # texts follow their labels, also those of the scenario
        given = given - {"task.label_texts"}
    base = apply_changes(scenario.plan, {key: value for key, value in facts.items() if key not in given})
    wanted = apply_changes(base, dict(changes))
    if wanted.get("privacy", {}).get("noise") == "none" and "privacy.epsilon" not in changes:
        wanted = apply_changes(wanted, {"privacy.epsilon": None})
    matching = (tuned_for and _matching(scenario.tuned, wanted, tuned_for)) or _matching(scenario.tuned, wanted)
    for entry in matching:
        for key, value in entry.set.items():
            if key not in changes:
                wanted = apply_changes(wanted, {key: value})
    plan = make_plan(_with_makeup_rounds(wanted, scenario, changes))
    plan.check_roster(participants)  # all of them are on it
    if plan.task.unit != known.unit:
        raise PlanError(f"task.unit = {plan.task.unit!r}, but the records' unit of privacy is {known.unit!r}")
    if plan.cohort.size > participants:
        raise PlanError(f"cohort.size = {plan.cohort.size}, but population.participants = {participants}")
    return plan, matching


def _label_texts(known: Facts, task: Mapping[str, Any], changes: Mapping[str, Any]) -> list[str]:
    """By name: labels may be given in an order of their own, here or there."""
    texts = dict(zip(known.labels, known.label_texts, strict=True))
    own = _names(task.get("labels")) or list(known.labels)
    given = _names(task.get("label_texts"))
    if len(given) == len(own):
        texts |= dict(zip(own, given, strict=True))
    return [texts.get(label) or label_text(label) for label in _names(changes.get("task.labels")) or own]


def _names(value: Any) -> list[str]:
    """A list of names; what is none is left to the plan to refuse."""
    return list(value) if isinstance(value, list | tuple) and all(isinstance(name, str) for name in value) else []


def _with_makeup_rounds(table: dict[str, Any], scenario: Scenario, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Where participants are expected to drop out, enough rounds that each can still release the planned number.

    Of those that are lost at any trip alike only the ones lost at the first have released nothing.
    A site stops once it has released `run.rounds_per_site` rounds, so no site spends more. An explicit number
    of rounds stands as it is.
    """
    mode = table.get("secure_aggregation", {}).get("mode", "malicious")
    kept = 1.0 - scenario.faults.dropout / (TRIPS.get(mode, 1) if scenario.faults.dropout_at == "any" else 1)
    run = table.get("run", {})
    if kept == 1.0 or "run.rounds" in changes or "rounds_per_site" in run or not isinstance(run.get("rounds"), int):
        return table
    rounds = run["rounds"]
    return apply_changes(table, {"run.rounds": math.ceil(rounds / kept), "run.rounds_per_site": rounds})


def _flat(table: Mapping[str, Any]) -> set[str]:
    return {f"{name}.{key}" for name, value in table.items() if isinstance(value, dict) for key in value}


def _matching(entries: tuple[Tuned, ...], table: Mapping[str, Any], noise: str | None = None) -> list[Tuned]:
    privacy = table.get("privacy", {})
    facts = {
        "depth": table.get("adapter", {}).get("depth", "head"),
        "noise": noise or privacy.get("noise", "site"),
    }
    fitting = [
        entry
        for entry in entries
        if all(facts.get(key) == value for key, value in entry.when.items() if key != "epsilon")
    ]
    epsilon = privacy.get("epsilon")
    by_epsilon = [entry for entry in fitting if "epsilon" in entry.when]
    chosen = [entry for entry in fitting if "epsilon" not in entry.when]
    if by_epsilon and isinstance(epsilon, int | float) and 0 < epsilon < math.inf:
        chosen.append(min(by_epsilon, key=lambda entry: abs(math.log(entry.when["epsilon"] / epsilon))))
    return chosen
