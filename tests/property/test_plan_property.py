"""Plans that hypothesis makes: one canonical form whatever they are written in."""

from __future__ import annotations

import json
import tomllib
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from accord_shared.canonical import canonical_bytes, decimal_string
from accord_shared.errors import PlanError
from accord_shared.plan import Plan, apply_changes, make_plan
from conftest import plan_of

text = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=20)
positive = st.floats(1e-6, 1e6, allow_nan=False)
changes = st.fixed_dictionaries(
    {},
    optional={
        "run.seed": st.integers(0, 2**53 - 1),
        "run.rounds": st.integers(4, 100_000),
        "run.rounds_per_site": st.one_of(st.none(), st.integers(1, 4)),
        "task.labels": st.lists(text, min_size=2, max_size=6, unique=True),
        "task.unit": text.filter(lambda name: "\n" not in name and "\r" not in name).map(lambda name: f"column:{name}"),
        "adapter.init_scale": positive,
        "local.learning_rate": positive,
        "local.clip_norm": positive,
        "local.sampling_rate": st.floats(1e-9, 1.0),
        "local.momentum": st.floats(0, 0.999),
        "local.steps_per_round": st.integers(1, 1000),
        "privacy.epsilon": positive,
        "privacy.delta": st.floats(1e-12, 1e-2),
        "server.optimizer": st.sampled_from(["fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad"]),
    },
)


@given(changes)
def test_every_plan_survives_json_and_toml(change: dict[str, Any]) -> None:
    plan = plan_of(change)
    again = [Plan.from_json(plan.to_json()), make_plan(tomllib.loads(plan.to_toml())), plan.revised({})]
    assert all(other == plan for other in again)
    assert {other.hash for other in again} == {plan.hash}
    assert {other.canonical() for other in again} == {plan.canonical()}
    assert json.loads(plan.canonical()).keys() == json.loads(plan.to_json()).keys()


@given(changes, changes)
def test_different_plans_have_different_hashes(one: dict[str, Any], two: dict[str, Any]) -> None:
    first, second = plan_of(one), plan_of(two)
    assert (first.hash == second.hash) == (first == second)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_decimals_read_back_to_the_bit(value: float) -> None:
    string = decimal_string(value)
    assert float(string) == value
    assert "e" not in string.lower()
    assert not (value == 0 and "-" in string)


scalars = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats() | st.text(max_size=8) | st.binary()
anything = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=6), inner), max_leaves=8
)
KEYS = [
    "version",
    "run",
    "run.rounds",
    "run.name",
    "model.source",
    "task.labels",
    "task.label_texts",
    "adapter",
    "adapter.depth",
    "adapter.targets",
    "local.clip_norm",
    "local.optimizer",
    "privacy.noise",
    "privacy.epsilon",
    "cohort.size",
    "evaluation.metrics",
    "surprise",
]


@given(st.sampled_from(KEYS), anything)
@settings(max_examples=200)
def test_nothing_but_a_plan_error_comes_of_nonsense(key: str, value: object) -> None:
    table = apply_changes(json.loads(plan_of().to_json()), {key: value})
    try:
        plan = make_plan(table)
    except PlanError as error:
        refusal = str(error)
    else:
        refusal = ""
        assert Plan.from_json(plan.to_json()) == plan
    assert len(refusal.splitlines()) <= 1


@given(st.dictionaries(st.text("abcxyz_", min_size=1), st.integers(-(2**53), 2**53) | st.booleans() | st.none()))
def test_canonical_bytes_do_not_know_key_order(value: dict[str, Any]) -> None:
    assert canonical_bytes(value) == canonical_bytes(dict(reversed(value.items())))
    assert json.loads(canonical_bytes(value)) == value
