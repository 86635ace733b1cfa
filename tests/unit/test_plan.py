"""The plan: one canonical form, and no key, type or contradiction that slips through."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from accord_shared.canonical import canonical_bytes, canonical_hash, decimal_string
from accord_shared.errors import PlanError
from accord_shared.plan import Plan, label_text, make_plan, read_toml
from conftest import plan_of

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "plan.json").read_text())


@pytest.mark.parametrize("vector", VECTORS["plans"], ids=lambda vector: vector["name"])
def test_frozen_plans_keep_their_bytes_and_hash(vector: dict[str, Any]) -> None:
    plan = make_plan(vector["plan"])
    assert plan.canonical().decode() == vector["canonical"]
    assert plan.hash == vector["hash"]


@pytest.mark.parametrize("vector", VECTORS["canonical"], ids=lambda vector: vector["bytes"])
def test_frozen_canonical_bytes(vector: dict[str, Any]) -> None:
    assert canonical_bytes(vector["value"]).decode() == vector["bytes"]


@pytest.mark.parametrize("vector", VECTORS["refused"], ids=lambda vector: vector["name"])
def test_frozen_refusals(vector: dict[str, Any]) -> None:
    with pytest.raises(PlanError) as refused:
        plan_of(vector["changes"])
    line = str(refused.value)
    assert vector["says"] in line
    assert "\n" not in line
    assert len(line) < 400


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.0, "1"), (0.1, "0.1"), (1e-5, "0.00001"), (1e22, "1" + "0" * 22), (-0.0, "0"), (-2.5, "-2.5"), (120.0, "120")],
)
def test_decimals_have_one_form(value: float, text: str) -> None:
    assert decimal_string(value) == text
    assert float(text) == value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, b"bytes", object()])
def test_what_has_no_canonical_form_is_refused(value: object) -> None:
    with pytest.raises(PlanError):
        canonical_bytes({"key": value})


def test_key_order_and_layout_do_not_change_the_hash(tmp_path: Path) -> None:
    plan = plan_of()
    table = json.loads(plan.to_json())
    backwards = {
        key: dict(reversed(value.items())) if isinstance(value, dict) else value for key, value in table.items()
    }
    assert make_plan(dict(reversed(backwards.items()))).hash == plan.hash
    sparse = {"version": 1, "task": {"labels": ["a", "b"]}, "privacy": {"epsilon": 1}, "cohort": {"size": 3}}
    sparse |= {"run": {"name": "x", "rounds": 1}, "model": {"source": "path:m"}}
    sparse |= {"local": {"expected_records": 1, "clip_norm": 1}}
    full = make_plan(sparse)  # integers where decimals are due, defaults left out
    assert make_plan(json.loads(full.to_json())).hash == full.hash == canonical_hash(full.model_dump(exclude_none=True))
    assert full.privacy.epsilon == 1.0
    path = tmp_path / "plan.toml"
    path.write_text(full.to_toml())
    assert make_plan(read_toml(path)) == full


def test_every_single_key_changes_the_hash() -> None:
    plan = plan_of()
    changes: dict[str, Any] = {
        "run.name": "other",
        "run.seed": 1,
        "run.rounds": 5,
        "run.rounds_per_site": 2,
        "run.max_extra_attempts": 0,
        "model.source": "path:elsewhere",
        "model.digest": "sha256:" + "1" * 64,
        "model.layer": -2,
        "task.labels": ["lost card", "top up", "rate"],
        "task.unit": "column:customer",
        "adapter.init_scale": 2.0,
        "local.clip_norm": 0.31,
        "local.sampling_rate": 0.99,
        "local.expected_records": 17,
        "privacy.epsilon": 8.1,
        "privacy.delta": 2e-5,
        "privacy.accountant": "prv",
        "cohort.minimum": 1,
        "server.momentum": 0.8,
    }
    hashes = [plan.revised({key: value}).hash for key, value in changes.items()]
    assert len({plan.hash, *hashes}) == len(changes) + 1


def test_null_keys_are_absent_keys() -> None:
    table = json.loads(plan_of().to_json())
    table["run"]["rounds_per_site"] = None
    assert make_plan(table).hash == plan_of().hash


@pytest.mark.parametrize(
    "table",
    ["run", "model", "task", "adapter", "local", "server", "privacy", "cohort", "secure_aggregation", "evaluation"],
)
def test_unknown_keys_are_named(table: str) -> None:
    with pytest.raises(PlanError, match=f"unknown key: {table}.surprise"):
        plan_of({f"{table}.surprise": 1})


def test_unknown_tables_are_named() -> None:
    with pytest.raises(PlanError, match="unknown key: surprise"):
        plan_of({"surprise.key": 1})


@pytest.mark.parametrize(
    "key", ["run.name", "run.rounds", "model.source", "task.labels", "local.expected_records", "cohort.size"]
)
def test_missing_keys_are_named(key: str) -> None:
    with pytest.raises(PlanError, match=f"missing key: {key}"):
        plan_of({key: None})


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf"), -1.0, "1", True])
@pytest.mark.parametrize(
    "key",
    [
        "local.clip_norm",
        "local.sampling_rate",
        "local.learning_rate",
        "local.momentum",
        "privacy.epsilon",
        "privacy.delta",
        "server.learning_rate",
        "server.average_last",
        "evaluation.validation_fraction",
    ],
)
def test_numbers_that_are_no_numbers_are_refused(key: str, number: object) -> None:
    with pytest.raises(PlanError):
        plan_of({key: number})


@pytest.mark.parametrize("number", [0, -1, 1.5, "3", True, None, 10**30])
@pytest.mark.parametrize("key", ["run.rounds", "local.steps_per_round", "local.expected_records", "cohort.size"])
def test_counts_that_are_no_counts_are_refused(key: str, number: object) -> None:
    if number is None and key == "local.steps_per_round":
        return  # has a default
    with pytest.raises(PlanError):
        plan_of({key: number})


@pytest.mark.parametrize("clip_norm", [1e-30, 1e-12, 1e12, 1e300])
def test_clip_norms_that_fp32_cannot_keep_are_refused(clip_norm: float) -> None:
    with pytest.raises(PlanError, match="clip_norm"):
        plan_of({"local.clip_norm": clip_norm})


def test_plain_training_may_clip_or_not() -> None:
    plain = {"privacy.noise": "none", "privacy.epsilon": None}
    assert plan_of(plain).local.clip_norm == 0.3
    assert plan_of({**plain, "local.clip_norm": None}).local.clip_norm is None


def test_steps_are_those_of_one_site() -> None:
    plan = plan_of({"run.rounds": 10, "run.rounds_per_site": 3, "local.steps_per_round": 4})
    assert (plan.rounds_per_site, plan.steps) == (3, 12)
    assert plan_of({"local.steps_per_round": 4}).steps == 16


def test_plans_do_not_change() -> None:
    plan = plan_of()
    with pytest.raises(Exception, match="frozen"):
        plan.run.rounds = 9  # type: ignore[misc]
    changed = plan.revised({"run.rounds": 9})
    assert (plan.run.rounds, changed.run.rounds) == (4, 9)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '"plan"', '{"version": 2}', b"\xff\xfe", '{"run": 1}', "{}" * 2]
)
def test_json_that_is_no_plan_is_refused(text: str | bytes) -> None:
    with pytest.raises(PlanError):
        Plan.from_json(text)


def test_another_version_is_refused() -> None:
    with pytest.raises(PlanError, match="version"):
        make_plan({**json.loads(plan_of().to_json()), "version": 2})


@pytest.mark.parametrize("content", [b"run = [", b"\xff", None])
def test_toml_that_cannot_be_read_is_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PlanError, match=r"cannot read|is not TOML"):
        read_toml(path)


def test_toml_strings_are_not_numbers(tmp_path: Path) -> None:
    table = json.loads(plan_of().to_json())
    table["local"]["clip_norm"] = "0.3"
    path = tmp_path / "plan.toml"
    path.write_text(tomli_w.dumps(table))
    with pytest.raises(PlanError, match=r"local\.clip_norm"):
        make_plan(read_toml(path))


@pytest.mark.parametrize(
    ("label", "text"),
    [("reverted_card_payment?", "reverted card payment"), ("Top-Up", "top up"), ("?", "?"), ("lost card", "lost card")],
)
def test_labels_in_plain_words(label: str, text: str) -> None:
    assert label_text(label) == text
