"""Labels are mapped by name, whatever order data and plan list them in; a run is resumed on the very same records."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch

import tiny_models
from accord_client.connectors import load, make_spec
from accord_client.examples import Examples
from accord_client.export import export_model
from accord_shared.errors import DataError, OutputError, PlanError
from accord_shared.plan import label_text
from accord_simulations.compare import Federation, comparison_plan
from accord_simulations.output import MARKER, RunIdentity, claim
from accord_simulations.population import Participant, Population
from accord_simulations.prepare import prepare, resolve_scenario
from accord_simulations.scenario import COMPARISONS, Resolved, make_scenario, resolve
from accord_simulations.scoring import Scorer
from command_line import Run, accord_command, refused
from conftest import plan_of

__all__ = ["accord_command"]

NAMES = ("card", "loan", "exchange")
ORDERS = (("card", "loan", "exchange"), ("exchange", "card", "loan"), ("loan", "card", "exchange"))
WORDS = {"card": "my card was lost", "loan": "loan repayment please", "exchange": "today is help with number"}


def rows(count: int, first: int = 0) -> list[tuple[str, str]]:
    return [(f"{WORDS[NAMES[i % 3]]} {i}", NAMES[i % 3]) for i in range(first, first + count)]


def write(path: Path, records: list[tuple[str, str]]) -> None:
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in records))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save("bert", tmp_path_factory.mktemp("model"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "train.csv", rows(48))
    write(folder / "test.csv", rows(12, 48))
    return folder


def scenario(model: Path, task: Mapping[str, Any] | None = None, labels: tuple[str, ...] = NAMES, **data: Any) -> Any:
    table: dict[str, Any] = {
        "scenario": {"name": "tiny", "text": "Tiny."},
        "data": {"kind": "files", "labels": list(labels), **data},
        "population": {"participants": 2},
        "plan": {
            "run": {"rounds": 12},
            "model": {"source": f"path:{model}"},
            "task": {"max_tokens": 16, **(task or {})},
            "adapter": {"depth": "head"},
            "local": {"learning_rate": 50.0},
            "privacy": {"noise": "none"},
            "cohort": {"minimum": 2},
            "secure_aggregation": {"mode": "off"},
        },
    }
    return make_scenario(table)


# --- from data to the exported model


def trained(resolved: Resolved, folder: Path) -> tuple[dict[str, float], Path]:
    """Train in this process; the metrics, and the exported model."""
    prepared = prepare(resolved, folder / "work", folder / "cache")
    members = [(one.name, one.train) for one in prepared.population.participants]
    weights = Federation(prepared.plan, prepared.work, members, lambda: False).run(prepared.workspace.initial())
    export_model(prepared.workspace, weights, folder / "model", {"epsilon": None})
    return Scorer(prepared.workspace, prepared.held_out).score(weights), folder / "model"


def answers(model: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of classes by the exported README alone."""
    (code,) = re.findall(r"```python\n(.*?)```", (model / "README.md").read_text(), re.DOTALL)
    shown: list[list[str]] = []
    monkeypatch.chdir(model)
    with torch.no_grad():
        exec(code.replace('["Where is my card?"]', repr(texts)), {"print": shown.append})  # noqa: S102
    return shown[0]


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("listed", "planned"), [*((NAMES, order) for order in ORDERS), (ORDERS[1], ORDERS[2])])
def test_the_exported_model_answers_by_name_in_whatever_order_labels_are_listed(
    listed: tuple[str, ...],
    planned: tuple[str, ...],
    model: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes = {"task.labels": list(planned)}
    resolved = resolve_scenario(scenario(model, labels=listed), changes, data, tmp_path / "cache")
    assert resolved.plan.task.labels == resolved.population.labels == planned
    assert resolved.plan.task.texts == tuple(label_text(label) for label in planned)
    metrics, exported = trained(resolved, tmp_path)
    assert metrics["accuracy"] == 1.0
    assert json.loads((exported / "accord.json").read_text())["labels"] == list(planned)
    unseen = rows(9, 60)
    assert answers(exported, [text for text, _ in unseen], monkeypatch) == [label for _, label in unseen]


# --- which number a name has


def population(labels: tuple[str, ...] = ("a", "b", "c"), numbers: tuple[int, ...] = (0, 1, 2, 1)) -> Population:
    count = len(numbers)
    examples = Examples(tuple(f"text {i}" for i in range(count)), np.array(numbers), np.arange(count))
    members = (Participant("x", examples.take([0, 1]), examples), Participant("y", examples.take([2, 3]), examples))
    return Population(labels, tuple(f"said {name}" for name in labels), members, examples, examples, examples, None, "")


def test_classes_are_renumbered_everywhere() -> None:
    made = population().labelled(("c", "new_one", "a", "b"))
    assert made.label_texts == ("said c", "new one", "said a", "said b")
    assert made.validation is not None
    for examples in (made.train, made.test, made.validation, made.participants[0].test):
        assert examples.labels.tolist() == [2, 3, 0, 3]
    assert [one.train.labels.tolist() for one in made.participants] == [[2, 3], [0, 3]]
    same = population()
    assert same.labelled(("a", "b", "c")) is same


def test_a_label_that_the_plan_lacks_is_refused_where_records_have_it() -> None:
    with pytest.raises(DataError, match=r"records have the label 'b', which is not one of task\.labels"):
        population().labelled(("a", "c"))
    spare = population(("a", "b", "c", "d"))
    assert spare.labelled(("c", "b", "a")).train.labels.tolist() == [2, 1, 0, 1]


TASKS: list[tuple[dict[str, Any], dict[str, Any], tuple[str, ...], tuple[str, ...]]] = [
    ({}, {}, ("a", "b", "c"), ("said a", "said b", "said c")),
    ({"labels": ["b", "c", "a"]}, {}, ("b", "c", "a"), ("said b", "said c", "said a")),
    ({}, {"task.labels": ["c", "a", "b"]}, ("c", "a", "b"), ("said c", "said a", "said b")),
    ({"labels": ["b", "c", "a"], "label_texts": ["B", "C", "A"]}, {}, ("b", "c", "a"), ("B", "C", "A")),
    (
        {"labels": ["b", "c", "a"], "label_texts": ["B", "C", "A"]},
        {"task.labels": ["a", "b", "c", "d_e"]},
        ("a", "b", "c", "d_e"),
        ("A", "B", "C", "d e"),
    ),
    ({"label_texts": ["A", "B", "C"]}, {"task.labels": ["c", "b", "a"]}, ("c", "b", "a"), ("C", "B", "A")),
    (
        {"labels": ["b", "c", "a"]},
        {"task.label_texts": ["x", "y", "z"]},
        ("b", "c", "a"),
        ("x", "y", "z"),
    ),
]


@pytest.mark.parametrize(("task", "changes", "labels", "texts"), TASKS)
def test_texts_of_labels_follow_their_names(
    task: dict[str, Any], changes: dict[str, Any], labels: tuple[str, ...], texts: tuple[str, ...]
) -> None:
    resolved = resolve(scenario(Path("m"), task), population(), changes, "sha256:" + "0" * 64)
    assert (resolved.plan.task.labels, resolved.plan.task.label_texts) == (labels, texts)
    named = [labels[number] for number in resolved.population.train.labels]
    assert named == ["a", "b", "c", "b"]
    for name in COMPARISONS:
        compared = comparison_plan(resolved, changes, name).task
        assert (compared.labels, compared.label_texts) == (labels, texts)


@pytest.mark.parametrize("wrong", ["abc", 7, [1, 2], ["a", "a"], ["a"], [["a"], ["b"]]])
def test_what_is_no_list_of_labels_is_refused(wrong: Any) -> None:
    with pytest.raises((PlanError, DataError)) as caught:
        resolve(scenario(Path("m")), population(), {"task.labels": wrong}, "sha256:" + "0" * 64)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("cells", "labels", "mapped", "named"),
    [
        (["1", "0", "1"], ("1", "0"), {}, ["1", "0", "1"]),
        (["1", "0", "1"], ("bad", "good"), {"0": "bad", "1": "good"}, ["good", "bad", "good"]),
        (["1", "0", "1"], ("good", "bad"), {"0": "bad", "1": "good"}, ["good", "bad", "good"]),
        (["good", "bad", "good"], ("good", "bad"), {}, ["good", "bad", "good"]),
        (["good", "bad", "good"], ("bad", "good"), {}, ["good", "bad", "good"]),
        (["1", "0", "1"], ("bad", "good"), {}, None),
        (["True", "False", "1"], ("False", "True"), {}, None),
    ],
)
def test_a_site_and_a_simulation_read_labels_by_name(
    cells: list[str], labels: tuple[str, ...], mapped: dict[str, str], named: list[str] | None, tmp_path: Path
) -> None:
    """Numbers stand for themselves or for what is declared, never for a place in a list."""
    from accord_client.data import read_examples

    path = tmp_path / "data.csv"
    write(path, [(f"text {place}", cell) for place, cell in enumerate(cells)])
    spec = make_spec({"kind": "csv", "path": str(path), "text": "text", "label": "label", "label_map": mapped})
    plan = plan_of({"task.labels": list(labels)})
    readers: list[Callable[[], Examples]] = [
        lambda: load(spec, plan, tmp_path / "quarantine.csv").examples,
        lambda: read_examples(path, text="text", label="label", labels=labels, label_map=mapped),
    ]
    for reader in readers:
        if named is None:
            with pytest.raises(DataError):
                reader()
        else:
            assert [labels[number] for number in reader().labels] == named


# --- resuming


def test_the_digest_sees_every_record_and_its_place() -> None:
    made = population()
    swapped = replace(made.participants[0], train=made.participants[0].train.take([1, 0]))
    other_unit = replace(made.test, units=np.array([0, 0, 1, 2]))
    changes: list[dict[str, Any]] = [
        {"labels": ("a", "b", "d")},
        {"participants": made.participants[::-1]},
        {"participants": (swapped, made.participants[1])},
        {"test": other_unit},
        {"test": replace(made.test, labels=np.array([0, 1, 2, 2]))},
        {"test": replace(made.test, texts=("text 0", "text 1", "text 2", "text 3 "))},
        {"test": made.test.take([0, 1, 2])},
        {"validation": None},
        {"validation": made.test.take([0, 1])},
    ]
    digests = [made.digest, *(replace(made, **change).digest for change in changes)]
    assert len(set(digests)) == len(digests)
    assert population().digest == made.digest


def test_the_digest_of_a_scenario_leaves_out_what_changes_nothing() -> None:
    made = scenario(Path("m"))
    faster = made.model_copy(update={"resources": made.resources.model_copy(update={"rows_in_memory": 3})})
    assert faster.digest == made.digest
    faulty = made.model_copy(update={"faults": made.faults.model_copy(update={"dropout": 0.1})})
    others = [faulty, scenario(Path("m"), text="words"), made.model_copy(update={"compare": {"alone": {"a.b": 1}}})]
    assert len({made.digest, *(other.digest for other in others)}) == 1 + len(others)


def test_a_run_is_resumed_on_the_same_data_alone(tmp_path: Path) -> None:
    known = RunIdentity("a" * 64, "b" * 64, "c" * 64)
    for resume in (False, True):
        with claim(tmp_path / "run", known, resume=resume):
            pass
    for change, words in (
        ({"data": "d" * 64}, "was begun with other data"),
        ({"scenario": "d" * 64}, "belongs to another scenario"),
        ({"plan_hash": "d" * 64}, "belongs to plan aaaaaaaaaaaa…, not to dddddddddddd…"),
    ):
        with pytest.raises(OutputError, match=words), claim(tmp_path / "run", replace(known, **change), resume=True):
            pass
    marker = tmp_path / "run" / MARKER
    marker.write_text(json.dumps({"plan_hash": "a" * 64}))
    with pytest.raises(OutputError, match="without a digest of its data"), claim(tmp_path / "run", known, resume=True):
        pass
    for damaged in ("", "[]", "{}", "null", '{"plan_hash": 1, "more": 2}'):
        marker.write_text(damaged)
        with pytest.raises(OutputError, match="is damaged"), claim(tmp_path / "run", known, resume=True):
            pass


def test_resuming_with_changed_data_is_refused_in_one_line(
    accord_command: Callable[..., Run], model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCORD_CACHE", str(tmp_path / "cache"))
    made = scenario(model)
    table = made.model_dump(exclude_unset=True, exclude={"tuned"})
    (tmp_path / "tiny.toml").write_text(tomli_w.dumps(json.loads(json.dumps(table))))
    resolved = resolve_scenario(made, {}, data)
    identity = RunIdentity(resolved.plan.hash, made.digest, resolved.population.digest)
    with claim(tmp_path / "run", identity, resume=False):
        pass
    (entry,) = entry_points(group="accord.commands", name="simulation")
    run = accord_command(entry, "simulate", "tiny.toml", "--data", str(data), "--out", "run", "--resume")
    train = (data / "train.csv").read_text()
    _, one, two, *_ = train.splitlines()
    changes = {
        "text": train.replace("lost", "gone", 1),
        "label": train.replace(f"{one}\n", f"{one.rpartition(',')[0]},loan\n"),
        "order": train.replace(f"{one}\n{two}\n", f"{two}\n{one}\n"),
        "more": f"{train}my card again,card\n",
    }
    for text in changes.values():
        assert text != train
        (data / "train.csv").write_text(text)
        refused(run(), "was begun with other data")
    (data / "train.csv").write_text(train)
    refused(run("--dropout", "0.1"), "belongs to another scenario")
    refused(run("--rounds", "13"), "belongs to plan")
