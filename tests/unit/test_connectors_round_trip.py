"""Whatever records hold: written to CSV, Parquet and SQLite they come back alike, or are counted, one by one."""

from __future__ import annotations

import contextlib
import csv
import io
import sqlite3
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from accord_client.connectors import Loaded, load, make_spec
from accord_client.connectors.quarantine import plain
from accord_client.data import number_units
from accord_shared.errors import DataError
from accord_shared.plan import Plan

PlanOf = Callable[..., Plan]
LABELS = ("lost card", "top up", 'a "quoted", label')
Record = tuple[str, str, str]

_CELLS = st.text(
    st.characters(codec="utf-8", exclude_characters="\0") | st.sampled_from('",;\n\r\t\ufeff= '), max_size=12
)
_KEYS = st.sampled_from(["C1", "C2", " C1", "Ü;\n", '"'])
_RECORDS = st.lists(st.tuples(_CELLS, st.sampled_from([*LABELS, "?", ""]), _KEYS), min_size=1, max_size=12)


@pytest.fixture(scope="module")
def plan() -> Plan:
    from conftest import plan_of

    return plan_of({"task.labels": list(LABELS), "task.unit": "column:who"})


def read(plan: Plan, folder: Path, **table: Any) -> Loaded | None:
    """None: no record is left."""
    columns = {"text": "text", "label": "label", "unit": "who", "most_rejected_fraction": 1.0}
    try:
        return load(make_spec({**columns, **table}), plan, folder / "q.csv", folder=folder)
    except DataError as error:
        if "rows fail" not in str(error):
            raise
        return None


def write_csv(records: list[Record], folder: Path, delimiter: str, end: str) -> None:
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerows([("text", "label", "who"), *records])
    (folder / "data.csv").write_bytes(out.getvalue().encode())


def write_parquet(records: list[Record], folder: Path) -> None:
    columns = zip(*records, strict=True)
    table = pa.table(dict(zip(("text", "label", "who"), map(list, columns), strict=True)))
    pq.write_table(table, folder / "data.parquet")


def write_sqlite(records: list[Record], folder: Path) -> None:
    with contextlib.closing(sqlite3.connect(folder / "data.db")) as database:
        database.execute("CREATE TABLE data (text TEXT, label TEXT, who TEXT)")
        database.executemany("INSERT INTO data VALUES (?, ?, ?)", records)
        database.commit()


def expected(records: list[Record]) -> list[Record]:
    kept = [(text.strip("\ufeff \t\r\n\v\f"), label, key.strip()) for text, label, key in records]
    return [(text, label, key) for text, label, key in kept if text.strip().strip("\ufeff") and label in LABELS]


def check(loaded: Loaded | None, records: list[Record]) -> None:
    kept = expected(records)
    if loaded is None:
        assert not kept
        return
    assert list(loaded.examples.texts) == [text for text, _, _ in kept]
    assert [LABELS[i] for i in loaded.examples.labels] == [label for _, label, _ in kept]
    assert loaded.examples.units.tolist() == number_units(key for _, _, key in kept).tolist()
    assert (loaded.rows, loaded.rejected) == (len(records), len(records) - len(kept))


@settings(max_examples=150, deadline=None)
@given(records=_RECORDS, delimiter=st.sampled_from(",;\t|"), end=st.sampled_from(["\n", "\r\n"]))
@example(records=[('"', "top up", "C1"), ("\ufeffa\r", "top up", '"')], delimiter=",", end="\r\n")
def test_csv(plan: Plan, records: list[Record], delimiter: str, end: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_csv(records, folder, delimiter, end)
        check(read(plan, folder, kind="csv", path="data.csv", delimiter=delimiter), records)


@settings(max_examples=80, deadline=None)
@given(records=_RECORDS)
def test_parquet_and_sqlite(plan: Plan, records: list[Record]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_parquet(records, folder)
        write_sqlite(records, folder)
        check(read(plan, folder, kind="parquet", path="data.parquet"), records)
        ordered = sorted(records, key=lambda record: tuple(cell.encode() for cell in record))
        check(read(plan, folder, kind="sql", url="sqlite:///data.db", query="SELECT * FROM data"), ordered)


@settings(max_examples=300, deadline=None)
@given(raw=st.binary(max_size=200) | st.text(st.sampled_from('ab",\n\r\0é'), max_size=60).map(str.encode))
def test_no_bytes_whatever_break_the_csv_reader_or_lose_a_row(plan: Plan, raw: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "data.csv").write_bytes(b"text,label,who\nfirst,top up,C1\n" + raw)
        try:
            loaded = read(plan, folder, kind="csv", path="data.csv")
        except DataError as error:
            if "never closed" not in str(error):
                raise
            return
        assert loaded is not None
        assert loaded.examples.texts[0] == "first"
        assert loaded.rows == len(loaded.examples) + loaded.rejected + loaded.counts.empty_lines
        if b'"' not in raw:
            lines = raw.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
            assert loaded.rows == 1 + lines.count(b"\n") + (not lines.endswith(b"\n") and lines != b"")


@settings(max_examples=200, deadline=None)
@given(raw=st.binary(max_size=100) | st.text(st.sampled_from('text,label,who"\n\r\0é'), max_size=60).map(str.encode))
def test_a_file_of_any_bytes_is_read_or_refused_in_one_line(plan: Plan, raw: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        for path, start in (("data.csv", b""), ("data.csv", b'text,label,"who"'), ("data.csv.gz", b""), ("p", b"PAR1")):
            (Path(name) / path).write_bytes(start + raw)
            try:
                read(plan, Path(name), kind="parquet" if path == "p" else "csv", path=path)
            except DataError as error:
                assert str(error).isprintable()  # noqa: PT017


@given(st.text() | st.binary() | st.integers() | st.floats() | st.none() | st.lists(st.integers()))
def test_any_cell_can_be_shown_on_one_line_that_is_no_formula(cell: object) -> None:
    shown = plain(cell)
    assert shown.isprintable()
    assert not shown.lstrip().startswith(("=", "+", "-", "@"))
