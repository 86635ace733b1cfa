"""Every number of a plan and a scenario, put to every bad value: it is valid, or refused in one line that names it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel

from accord_client.connectors.spec import CsvData, make_spec
from accord_shared.errors import AccordError, PlanError, SettingsError
from accord_shared.plan import Plan, read_toml
from accord_simulations.cli import merge_changes
from accord_simulations.population import BankDemo, FilesData, RetailDemo
from accord_simulations.prepare import runtime_of
from accord_simulations.scenario import (
    Auto,
    Facts,
    Scenario,
    _planned,
    foresee,
    make_scenario,
    read_scenario,
    split_changes,
)

NOT_FINITE = (math.nan, math.inf, -math.inf)
ODD = (-1, -1e308, 0, 1e-320, 1e-9, 0.5, 1.5, 1e308, 2**31, 2**53, 2**64, 10**400, True, "x", "nan", [], {}, [math.nan])
BASE: dict[str, Any] = {"secure_aggregation.mode": "off", "population.participants": 4}


def _kinds(annotation: Any) -> set[Any]:
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return set()
    return set().union(*map(_kinds, get_args(annotation))) if get_args(annotation) else {annotation}


def numbers(model: type[BaseModel], prefix: str) -> Iterator[str]:
    """Dotted names of all fields of a model, and of its tables, that may hold a number."""
    for name, field in model.model_fields.items():
        kinds = _kinds(field.annotation)
        tables = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if kinds & {int, float}:
            yield f"{prefix}{name}"
        elif len(tables) == 1 and get_origin(field.annotation) is not tuple:
            yield from numbers(tables[0], f"{prefix}{name}.")


OF_PLANS = [key for key in numbers(Plan, "") if key != "version"]
OF_SCENARIOS = [
    *(key for key in numbers(Scenario, "") if not key.startswith(("data.", "plan.", "auto."))),
    *numbers(BankDemo, "data."),
    *numbers(Auto, "auto."),
]


def tried(scenario: str, key: str, value: Any) -> Plan | None:
    """The plan with a key set, as far as a command gets before it reads data; None where it is refused in one line."""
    planned: Plan | None
    refusal = ""
    try:
        chosen, changes = split_changes(scenario, {**BASE, key: value})
        decided, plan = foresee(chosen, changes)
        runtime_of(decided.resources, plan)
        facts = Facts(plan.task.labels, plan.task.texts, 4, 400, decided.data.unit)
        planned, _ = _planned(decided, facts, changes, None, None)
        if decided.auto is not None and key.startswith("auto."):
            planned = planned.revised({"server.learning_rate": decided.auto.learning_rate(planned)})
    except AccordError as error:
        planned, refusal = None, str(error)
    if planned is None:
        assert refusal.isprintable()
        assert len(refusal) < 400
        return None
    assert Plan.from_json(planned.to_json()) == planned
    return planned


def test_there_are_numbers_to_try() -> None:
    assert {"run.seed", "local.clip_norm", "privacy.epsilon", "cohort.size"} <= set(OF_PLANS)
    assert {"population.participants", "faults.dropout", "data.label_noise", "auto.travel"} <= set(OF_SCENARIOS)
    assert len(OF_PLANS) > 25


def test_toml_that_python_cannot_hold_is_refused(tmp_path: Path) -> None:
    for text in ("x = " + "9" * 5000, "x = " + "[" * 5000):
        (tmp_path / "x.toml").write_text(text)
        with pytest.raises(PlanError, match="is not TOML"):
            read_toml(tmp_path / "x.toml")
        with pytest.raises(PlanError, match="x"):
            make_scenario(read_scenario("bank-demo") | merge_changes({}, [text]))


@pytest.mark.parametrize("key", [*OF_PLANS, *OF_SCENARIOS])
def test_a_number_is_valid_or_refused_in_one_line(key: str) -> None:
    for value in NOT_FINITE:
        assert tried("bank-demo", key, value) is None, value
    for value in ODD:
        tried("bank-demo", key, value)


@pytest.mark.parametrize("kind", [FilesData, RetailDemo])
def test_numbers_of_other_kinds_of_data_are_finite(kind: type[BaseModel]) -> None:
    for key in numbers(kind, ""):
        for value in NOT_FINITE:
            fields = {"kind": kind.model_fields["kind"].annotation.__args__[0], key: value}  # type: ignore[union-attr]
            more = {"labels": ["a", "b"]} if kind is FilesData else {}
            table = {"scenario": {"name": "x", "text": ""}, "data": {**fields, **more}, "plan": {}}
            with pytest.raises(PlanError, match=key):
                make_scenario({**table, "population": {"participants": 2}})


@pytest.mark.parametrize("key", list(numbers(CsvData, "")))
def test_numbers_of_a_site_s_data_are_finite(key: str) -> None:
    for value in NOT_FINITE:
        with pytest.raises(SettingsError, match=key):
            make_spec({"kind": "csv", "path": "x", "text": "a", "label": "b", key: value})


@pytest.mark.parametrize("table", [name for name in Plan.model_fields if name != "version"])
@pytest.mark.parametrize("value", [5, "x", [], True])
def test_a_table_that_is_none_is_refused(table: str, value: Any) -> None:
    with pytest.raises(PlanError, match=table):
        foresee(*split_changes("bank-demo", {table: value}))


@pytest.mark.parametrize("metrics", [[], 5, "accuracy", ["nothing"], [None]])
def test_metrics_that_are_none_are_refused(metrics: Any) -> None:
    with pytest.raises(PlanError, match=r"evaluation\.metrics"):
        foresee(*split_changes("bank-demo", {"evaluation.metrics": metrics}))


@pytest.mark.parametrize("epsilon", [math.nan, math.inf, 0, -1.0, "1", True])
def test_a_tuned_epsilon_is_a_number(epsilon: Any) -> None:
    table = {
        "scenario": {"name": "x", "text": ""},
        "data": {"kind": "bank-demo"},
        "population": {"participants": 4},
        "plan": {},
        "tuned": [{"when": {"epsilon": epsilon}, "set": {}, "how": ""}],
    }
    with pytest.raises(PlanError, match="epsilon"):
        make_scenario(table)
