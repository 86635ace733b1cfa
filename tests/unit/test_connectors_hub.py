"""Data sets of the `datasets` library: a local folder for real, a hub's by what is asked of the library."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from accord_client.connectors import Loaded, inspect, load, make_spec
from accord_shared.errors import DataError, MissingExtra, SettingsError
from accord_shared.plan import Plan

PlanOf = Callable[..., Plan]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB: dict[str, Any] = {"kind": "hub", "source": "path:reviews", "text": "text", "label": "label"}


@pytest.fixture
def plan(plan_of: PlanOf) -> Plan:
    return plan_of({"task.labels": ["negative", "positive"]})


def read(plan: Plan, folder: Path, **changes: Any) -> Loaded:
    spec = make_spec({**HUB, "most_rejected_fraction": 1.0, **changes})
    return load(spec, plan, folder / "q.csv", folder=folder)


@pytest.fixture
def reviews(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of two splits, Parquet with class names, and a cache of the library of its own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["negative", "positive"])}
    )
    (tmp_path / "reviews").mkdir()
    for split, labels in (("train", [1, 0, -1, None]), ("test", [0, 0, 0, 0])):
        table = datasets.Dataset.from_dict({"text": ["a", "b", "c", "d"], "label": labels}, features=features)
        table.to_parquet(tmp_path / "reviews" / f"{split}.parquet")
    return tmp_path


def test_a_local_folder_is_read_by_split_and_class_names(plan: Plan, reviews: Path) -> None:
    loaded = read(plan, reviews)
    assert loaded.examples.texts == ("a", "b")
    assert loaded.examples.labels.tolist() == [1, 0]
    assert (loaded.rows, loaded.problems) == (4, {"column 'label': empty": 2})
    assert read(plan, reviews, split="test").examples.labels.tolist() == [0, 0, 0, 0]
    assert read(plan, reviews).digest == loaded.digest
    cached = [path for path in (reviews / "cache").rglob("*") if path.is_file() and path.stat().st_size]
    assert not cached  # no copy of private records outside the folder


def test_a_folder_of_csv_files(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "reviews").mkdir()
    (tmp_path / "reviews" / "train.csv").write_text("text,label,n\na,positive,1\nb,negative,2\n")
    assert read(plan, tmp_path, schema={"n": "integer"}).examples.labels.tolist() == [1, 0]
    report = inspect(make_spec(HUB), folder=tmp_path)
    assert (report.rows, list(report.types)) == (2, ["text", "label", "n"])


def test_many_records_are_numbered_on(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "reviews").mkdir()
    labels = ["positive"] * 5000
    labels[4998] = "?"
    table = pa.table({"text": [f"t{i}" for i in range(5000)], "label": labels})
    pq.write_table(table, tmp_path / "reviews" / "train.parquet")
    loaded = read(plan, tmp_path)
    assert (loaded.rows, loaded.rejected, loaded.examples.texts[-1]) == (5000, 1, "t4999")
    assert (tmp_path / "q.csv").read_text().splitlines()[1].startswith("4999,label,")


def test_what_cannot_be_loaded_is_one_line(plan: Plan, reviews: Path) -> None:
    for changes, problem in (
        ({"source": "path:nowhere"}, "no such folder"),
        ({"split": "dev"}, "cannot be loaded"),
        ({"label": "stars"}, "no column 'stars'; it has 'text', 'label'"),
    ):
        with pytest.raises(DataError, match=problem) as caught:
            read(plan, reviews, **changes)
        assert "\n" not in str(caught.value)


def test_a_script_in_the_folder_never_runs(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "reviews").mkdir()
    (tmp_path / "reviews" / "reviews.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(DataError, match="cannot be loaded"):
        read(plan, tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_damaged_file_is_one_line(plan: Plan, reviews: Path) -> None:
    (reviews / "reviews" / "train.parquet").write_bytes(b"PAR1 not really PAR1")
    with pytest.raises(DataError, match="cannot be"):
        read(plan, reviews)


@pytest.mark.parametrize(
    "source", ["hub:bank/messages", "hub:bank/messages@main", f"hub:messages@{COMMIT}", "bank/messages", "path:", ""]
)
def test_a_hub_name_without_a_commit_is_refused(source: str) -> None:
    with pytest.raises(SettingsError, match="source"):
        make_spec({**HUB, "source": source})


def test_the_hub_is_asked_for_exactly_the_commit(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def library(name: str, config: str | None, **options: Any) -> datasets.Dataset:
        asked.append((name, config, options))
        return datasets.Dataset.from_dict({"text": ["a"], "label": ["positive"]})

    monkeypatch.setattr(datasets, "load_dataset", library)
    loaded = read(plan, tmp_path, source=f"hub:bank/messages@{COMMIT}", config="en", split="test")
    assert loaded.examples.texts == ("a",)
    assert asked == [("bank/messages", "en", {"split": "test", "revision": COMMIT, "streaming": False})]


def test_no_network_is_one_line(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be loaded") as caught:
        read(plan, tmp_path, source=f"hub:bank/messages@{COMMIT}")
    assert "\n" not in str(caught.value)


def test_without_the_library_the_extra_is_named(plan: Plan, reviews: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match="simulation"):
        read(plan, reviews)
