"""Reading labelled data: what is accepted, and one clear line for everything else."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from accord_client.data import Examples, number_units, read_examples, read_hub
from accord_shared.errors import DataError, MissingExtra

LABELS = ("negative", "positive")
MAP = {"0": "negative", "1": "positive"}


def _write(folder: Path, content: str | bytes, name: str = "reviews.csv") -> Path:
    path = folder / name
    raw = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    return path


def _read(path: Path, **options: object) -> Examples:
    return read_examples(path, text="text", label="y", labels=LABELS, label_map=MAP, **options)  # type: ignore[arg-type]


def test_a_csv_file_is_read_with_quotes_newlines_bom_and_label_map(tmp_path: Path) -> None:
    examples = _read(_write(tmp_path, '\ufefftext,y\r\n"good, really",1\r\n"two\nlines",negative\r\n\r\n'))
    assert examples.texts == ("good, really", "two\nlines")
    assert examples.labels.tolist() == [1, 0]
    assert examples.units.tolist() == [0, 1]
    assert examples.labels.dtype == examples.units.dtype == np.int64


def test_gzip_and_parquet_read_like_csv(tmp_path: Path) -> None:
    plain = _read(_write(tmp_path, "text,y\na,1\nb,0\n"))
    zipped = _read(_write(tmp_path, "text,y\na,1\nb,0\n", "r.csv.gz"))
    pq.write_table(pa.table({"text": ["a", "b"], "y": [1, 0]}), tmp_path / "r.parquet")
    columnar = _read(tmp_path / "r.parquet")
    for other in (zipped, columnar):
        assert other.texts == plain.texts
        assert other.labels.tolist() == plain.labels.tolist()


def test_parquet_booleans_count_by_their_names(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", "b"], "y": [True, False]}), tmp_path / "r.parquet")
    read = read_examples(tmp_path / "r.parquet", text="text", label="y", labels=("False", "True"))
    assert read.labels.tolist() == [1, 0]


def test_a_customer_column_makes_the_units_and_is_kept(tmp_path: Path) -> None:
    path = _write(tmp_path, "text,y,customer,shop\na,1,C7,x\nb,0,C2,x\nc,1,C7,y\n")
    examples = _read(path, unit="column:customer", columns=("shop",))
    assert examples.units.tolist() == [0, 1, 0]
    assert examples.n_units == 2
    assert {k: v.tolist() for k, v in examples.columns.items()} == {
        "shop": ["x", "x", "y"],
        "customer": ["C7", "C2", "C7"],
    }


BAD = [
    ("", "the file is empty"),
    (" \n", "the file is empty"),
    ("text,y\n", "no records"),
    ("text,label\na,1\n", "no column 'y'"),
    ("text,y,y\na,1,1\n", "column 'y' appears twice"),
    ("text,y\na,1\nb,7\n", "row 3: label '7' is not one of 'negative', 'positive'"),
    ("text,y\n" + "a," + "z" * 99 + "\n", "row 2: label 'zzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzz…'"),
    ("text,y\na,1\n  ,1\n", "row 3: the text (column 'text') is empty"),
    ("text,y\na,1\nb\n", "row 3: 1 columns where the header has 2"),
    ("text,y\na,1\nb,0,extra\n", "row 3: 3 columns where the header has 2"),
    ('text,y\na,1\n"b,0\n', "line 3: the quote that opens here is never closed"),
    (b'text,y\n"a\nb",1\nc\xff,1\n', "row 3: the text (column 'text') is not UTF-8 text"),
    (b"text,y\na,1\n\xe4,1\n", "row 3: the text (column 'text') is not UTF-8 text"),
]


@pytest.mark.parametrize(("content", "message"), BAD, ids=[message[:24] for _, message in BAD])
def test_bad_files_are_refused_with_file_and_row(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = _write(tmp_path, content)
    with pytest.raises(DataError) as refusal:
        _read(path)
    line = str(refusal.value)
    assert line.startswith(str(path))
    assert message in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("name", "message"),
    [("nowhere.csv", "no such file"), ("notes.txt", "unknown kind of file"), ("folder", "is a folder")],
)
def test_what_is_not_a_data_file_says_what_was_expected(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "notes.txt").write_text("text,y\na,1\n")
    with pytest.raises(DataError, match=message) as refusal:
        _read(tmp_path / name)
    assert ".csv, .csv.gz or .parquet" in str(refusal.value)


@pytest.mark.parametrize("name", ["r.csv.gz", "r.parquet"])
def test_damaged_files_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"text,y\na,1\n")
    with pytest.raises(DataError, match=name):
        _read(tmp_path / name)


def test_a_truncated_gzip_file_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path, "text,y\n" + "a,1\n" * 999, "r.csv.gz")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="cannot be read"):
        _read(path)


def test_parquet_refusals_count_records(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", None], "y": [1, 0]}), tmp_path / "null.parquet")
    with pytest.raises(DataError, match="record 2: the text"):
        _read(tmp_path / "null.parquet")
    pq.write_table(pa.table({"text": [1, 2], "y": [1, 0]}), tmp_path / "number.parquet")
    with pytest.raises(DataError, match=r"record 1: the text .* is not of type string"):
        _read(tmp_path / "number.parquet")
    pq.write_table(pa.table({"text": ["a"], "z": [1]}), tmp_path / "column.parquet")
    with pytest.raises(DataError, match="no column 'y'"):
        _read(tmp_path / "column.parquet")


def test_empty_texts_may_be_dropped_on_purpose(tmp_path: Path) -> None:
    assert _read(_write(tmp_path, "text,y\na,1\n,1\n"), empty_texts="drop").texts == ("a",)


@pytest.mark.parametrize("unit", ["customer", "column:", "rows", "columns:customer"])
def test_an_unknown_unit_is_refused(tmp_path: Path, unit: str) -> None:
    with pytest.raises(DataError, match="unit of privacy must be"):
        _read(_write(tmp_path, "text,y\na,1\n"), unit=unit)


def test_an_empty_customer_id_is_refused_with_its_row(tmp_path: Path) -> None:
    path = _write(tmp_path, "text,y,customer\na,1,C1\nb,1,\n")
    with pytest.raises(DataError, match=r"row 3: the unit of privacy .* is empty"):
        _read(path, unit="column:customer")


def test_a_label_map_must_lead_to_labels(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="label_map leads to 'neutral'"):
        read_examples(tmp_path / "x", text="t", label="y", labels=LABELS, label_map={"2": "neutral"})


def test_take_selects_in_order_and_renumbers_units() -> None:
    whole = Examples(
        ("a", "b", "c", "d"),
        np.array([0, 1, 2, 1]),
        np.array([0, 1, 0, 2]),
        {"shop": np.array(["x", "y", "z", "w"])},
    )
    part = whole.take([3, 2, 0])
    assert part.texts == ("d", "c", "a")
    assert part.labels.tolist() == [1, 2, 0]
    assert part.units.tolist() == [0, 1, 1]
    assert part.columns["shop"].tolist() == ["w", "z", "x"]
    assert whole.label_counts(4).tolist() == [1, 2, 1, 0]
    assert (len(whole.take([])), whole.take([]).n_units) == (0, 0)


def test_number_units_counts_by_first_appearance() -> None:
    assert number_units(["q", "a", "q", "b"]).tolist() == [0, 1, 0, 2]


def _offline_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    datasets = pytest.importorskip("datasets", reason="the datasets library is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    return datasets


def test_read_hub_reads_a_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _offline_datasets(tmp_path, monkeypatch)
    folder = tmp_path / "set"
    folder.mkdir()
    _write(folder, "text,y\na,1\nb,0\n", "train.csv")
    read = read_hub(str(folder), "train", text="text", label="y", labels=LABELS, label_map=MAP)
    assert (read.texts, read.labels.tolist()) == (("a", "b"), [1, 0])
    with pytest.raises(DataError, match="cannot be loaded"):
        read_hub(str(folder), "nosplit", text="text", label="y", labels=LABELS, label_map=MAP)
    with pytest.raises(DataError, match="no column 'z'"):
        read_hub(str(folder), "train", text="z", label="y", labels=LABELS, label_map=MAP)


def test_read_hub_knows_class_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = _offline_datasets(tmp_path, monkeypatch)
    kinds = datasets.Features(
        {"text": datasets.Value("string"), "y": datasets.ClassLabel(names=["negative", "positive"])}
    )
    folder = tmp_path / "set"
    folder.mkdir()
    table = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "y": [1, 0, 1]}, features=kinds)
    table.to_parquet(str(folder / "train.parquet"))
    read = read_hub(str(folder), "train", text="text", label="y", labels=("positive", "negative"))
    assert read.labels.tolist() == [0, 1, 0]


def test_read_hub_without_the_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match="pip install"):
        read_hub("ORG/NAME", "train", text="text", label="y", labels=LABELS)
