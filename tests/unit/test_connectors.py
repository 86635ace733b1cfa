"""Files as data sets: every row is an example or a line of the quarantine; everything else is one clear line."""

from __future__ import annotations

import csv
import gzip
import os
import stat
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from accord_client.connectors import DataSpec, Loaded, check_plan, inspect, load, make_spec
from accord_client.connectors.quarantine import Quarantine, plain
from accord_shared.errors import DataError, MissingExtra, OutputError, SettingsError
from accord_shared.plan import Plan

PlanOf = Callable[..., Plan]
CSV: dict[str, Any] = {"kind": "csv", "path": "data.csv", "text": "text", "label": "label"}
LABELS = ["lost card", "top up"]


def spec_of(**changes: Any) -> DataSpec:
    return make_spec({**CSV, "most_rejected_fraction": 1.0, **changes})


class Site:
    """A folder with one data set and a plan that trains on it."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder = folder
        self.plan = plan
        self.quarantine = folder / "quarantine" / "data.csv"

    def write(self, content: str | bytes, name: str = "data.csv") -> None:
        raw = content.encode() if isinstance(content, str) else content
        (self.folder / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)

    def load(self, content: str | bytes | None = None, **changes: Any) -> Loaded:
        if content is not None:
            self.write(content, changes.get("path", "data.csv"))
        unit = f"column:{changes['unit']}" if "unit" in changes else "row"
        plan = self.plan.revised({"task.unit": unit})
        return load(spec_of(**changes), plan, self.quarantine, folder=self.folder)

    def failed(self) -> list[list[str]]:
        with self.quarantine.open(encoding="utf-8", newline="") as file:
            return list(csv.reader(file))[1:]


@pytest.fixture
def site(tmp_path: Path, plan_of: PlanOf) -> Site:
    return Site(tmp_path, plan_of({"task.labels": LABELS}))


# --- what is read


def test_rows_become_examples_in_order_and_nothing_is_quarantined(site: Site) -> None:
    loaded = site.load('\ufeffid,text,label\r\n1," two\nlines, quoted ",top up\r\n2,b,lost card\r\n')
    assert loaded.examples.texts == ("two\nlines, quoted", "b")
    assert loaded.examples.labels.tolist() == [1, 0]
    assert loaded.examples.units.tolist() == [0, 1]
    assert loaded.examples.labels.dtype == loaded.examples.units.dtype == np.int64
    assert (loaded.rows, loaded.rejected, loaded.quarantine, loaded.problems) == (2, 0, None, {})
    assert not site.quarantine.exists()


def test_cells_of_a_unit_column_number_the_units(site: Site) -> None:
    loaded = site.load("text,label,who\na,top up,C7\nb,top up,C2\nc,top up, C7 \n", unit="who")
    assert loaded.examples.units.tolist() == [0, 1, 0]
    assert loaded.examples.n_units == 2


def test_several_text_columns_are_joined_and_may_be_empty_one_by_one(site: Site) -> None:
    loaded = site.load(
        "subject,body,label\nA,b,top up\n,c,top up\nD,,top up\n,,top up\n", text=None, texts=["subject", "body"]
    )
    assert loaded.examples.texts == ("A\n\nb", "c", "D")
    assert site.failed() == [["5", "subject", "all columns of the text are empty", ""]]


def test_label_cells_go_through_the_map(site: Site) -> None:
    loaded = site.load("text,label\na,1\nb,top up\n", label_map={"1": "lost card"})
    assert loaded.examples.labels.tolist() == [0, 1]


def test_gzip_and_another_delimiter(site: Site) -> None:
    loaded = site.load("text;label\na,b;top up\n", path="data.csv.gz", delimiter=";")
    assert loaded.examples.texts == ("a,b",)


def test_gzip_of_several_members(site: Site) -> None:
    (site.folder / "data.csv.gz").write_bytes(gzip.compress(b"text,label\na,top up\n") + gzip.compress(b"b,top up\n"))
    assert site.load(path="data.csv.gz").examples.texts == ("a", "b")


def test_the_digest_tells_texts_labels_units_and_order_but_not_the_source(site: Site) -> None:
    one = site.load("text,label\na,top up\nb,top up\n").digest
    assert site.load("n,label,text\n1,top up, a\n2,top up,b").digest == one
    changed = ["b,top up\na,top up\n", "a,lost card\nb,top up\n", "a,top up\n", "ab,top up\n,top up\n"]
    others = {site.load(f"text,label\n{rows}").digest for rows in changed}
    assert len(others | {one}) == 5
    assert site.load("text,label,who\na,top up,x\nb,top up,x\n", unit="who").digest != one


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\r"])
def test_the_last_row_counts_with_or_without_an_end_of_line(site: Site, end: str) -> None:
    assert site.load(f"text,label\na,top up\nb,top up{end}").examples.texts == ("a", "b")


def test_rows_are_numbered_across_blocks(site: Site) -> None:
    rows = [f"{'x' * 90} {i},top up" for i in range(100_000)]
    rows[70_000], rows[99_999] = "one column", "a,?"
    loaded = site.load("text,label\n" + "\n".join(rows))
    assert (loaded.rows, loaded.rejected, len(loaded.examples)) == (100_000, 2, 99_998)
    assert [row[0] for row in site.failed()] == ["70002", "100001"]


# --- rows that fail


def test_every_row_that_fails_is_in_the_quarantine_with_its_number_and_reason(site: Site) -> None:
    long = "z" * 30
    loaded = site.load(
        b"text,label\na,top up\n  ,top up\nb,\nc,refund\nd\ne,top up,3\n\xff\xfe,top up\nn\x00ul,top up\n"
        + long.encode()
        + b",top up\n\n\xef\xbb\xbf,top up\nlast,lost card\n",
        most_characters=20,
    )
    assert loaded.examples.texts == ("a", "last")
    assert (loaded.rows, loaded.rejected, loaded.counts.empty_lines, loaded.counts.accepted) == (12, 9, 1, 2)
    assert sorted(site.failed(), key=lambda row: int(row[0])) == [
        ["3", "text", "empty", "  "],
        ["4", "label", "empty", ""],
        ["5", "label", "not one of the plan's labels", "refund"],
        ["6", "", "1 columns where the header has 2", "d"],
        ["7", "", "3 columns where the header has 2", "e,top up,3"],
        ["8", "text", "not UTF-8 text", "\\xff\\xfe"],
        ["9", "text", "has a NUL character", "n\\x00ul"],
        ["10", "text", "longer than 20 characters", long],
        ["12", "text", "empty", "\\ufeff"],
    ]
    assert sum(loaded.problems.values()) == 9
    assert loaded.problems["column 'text': empty"] == 2
    assert loaded.quarantine == site.quarantine
    assert stat.S_IMODE(site.quarantine.stat().st_mode) == 0o600
    assert stat.S_IMODE(site.quarantine.parent.stat().st_mode) == 0o700
    assert [path.name for path in site.quarantine.parent.iterdir()] == ["data.csv"]


def test_a_gigantic_field_is_one_row_of_the_quarantine(site: Site) -> None:
    loaded = site.load("text,label\na,top up\n" + "z" * 2**21 + ",top up\nb,lost card\n")
    assert loaded.examples.texts == ("a", "b")
    assert [row[:3] for row in site.failed()] == [["3", "text", "longer than 1000000 characters"]]
    assert site.quarantine.stat().st_size < 1000


RULES = [
    ("integer", ["7", "-3", "+0"], ["7.0", "x", "1_000", "٣"], "not of type integer"),
    ("float", ["7", "1e3", ".5"], ["nan", "inf", "1e999", "1,5"], "not of type float"),
    ("boolean", ["true", "False", "0"], ["yes", "2"], "not of type boolean"),
    ("date", ["2026-02-28"], ["2026-02-30", "28.2.2026"], "not of type date"),
    ("timestamp", ["2026-02-28T12:00:00+01:00"], ["noon"], "not of type timestamp"),
    ({"type": "integer", "min": 0, "max": 9}, ["0", "9"], ["-1"], "less than 0"),
    ({"type": "float", "max": 0.5}, ["0.5"], ["0.51"], "more than 0.5"),
    ({"max_length": 2}, ["ab"], ["abc"], "longer than 2 characters"),
    ({"allowed": ["DE", "FR"]}, ["DE"], ["de"], "not one of the allowed values"),
]


@pytest.mark.parametrize(("rule", "good", "bad", "problem"), RULES)
def test_the_declared_schema_holds_for_every_row(
    site: Site, rule: Any, good: list[str], bad: list[str], problem: str
) -> None:
    rows = "".join(f'a,top up,"{cell}"\n' for cell in (*good, *bad))
    loaded = site.load(f"text,label,extra\n{rows}", schema={"extra": rule})
    assert len(loaded.examples) == len(good)
    assert [row[1:] for row in site.failed()] == [["extra", problem, plain(cell)] for cell in bad]


def test_a_column_that_is_not_required_may_be_empty(site: Site) -> None:
    rule = {"type": "integer", "required": False}
    assert site.load("text,label,age\na,top up,\nb,top up,x\n", schema={"age": rule}).rejected == 1


def test_too_many_failing_rows_are_an_error_and_the_quarantine_stays(site: Site) -> None:
    rows = "text,label\n" + "a,top up\n" * 8 + "secret words,?\n" * 2
    assert site.load(rows, most_rejected_fraction=0.2).rejected == 2
    with pytest.raises(DataError) as caught:
        site.load(rows, most_rejected_fraction=0.19)
    assert "2 of 10 rows fail, most_rejected_fraction = 0.19" in str(caught.value)
    assert "first: row 10, column 'label': not one of the plan's labels" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert len(site.failed()) == 2


def test_an_old_quarantine_goes_once_all_rows_fit(site: Site) -> None:
    site.load("text,label\na,top up\nb,?\n")
    assert site.quarantine.exists()
    site.load("text,label\na,top up\n")
    assert not site.quarantine.exists()


@pytest.mark.parametrize("start", ["=", "+", "-", "@", " =", "\t=", "＝"])
def test_no_cell_of_the_quarantine_is_a_formula(start: str) -> None:
    assert plain(f"{start}cmd|' /C calc'!A0").startswith(("'", "\\t"))
    assert "\n" not in plain("a\nb")
    assert len(plain("x" * 10**6)) == 200


def test_a_quarantine_that_cannot_be_written_is_said(site: Site) -> None:
    (site.folder / "quarantine").write_text("in the way")
    with pytest.raises(OutputError, match="cannot write"):
        site.load("text,label\na,top up\nb,?\n")


def test_a_reading_that_breaks_off_leaves_the_old_quarantine(tmp_path: Path) -> None:
    path = tmp_path / "q.csv"
    path.write_text("old")

    def breaks_off(error: BaseException) -> None:
        with Quarantine(path) as quarantine:
            quarantine.add(2, "text", "empty", "")
            raise error

    for error in (OutputError("the disk is full"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            breaks_off(error)
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: object) -> tuple[int, str]:
        (tmp_path / "temporary").touch()
        return os.open("/dev/full", os.O_WRONLY), str(tmp_path / "temporary")

    monkeypatch.setattr("tempfile.mkstemp", full)
    quarantine = Quarantine(tmp_path / "q.csv")
    with pytest.raises(OutputError, match="No space left"), quarantine:
        quarantine.add(2, "text", "empty", "")
    assert list(tmp_path.iterdir()) == []


# --- files that are refused


BAD_FILES = [
    ("", "the file is empty"),
    ("\ufeff \n\n", "the file is empty"),
    ("text,label\n", "no records"),
    ("text,topic\na,top up\n", "no column 'label'; it has 'text', 'topic'"),
    ("text;label\na;top up\n", "no column 'text'; it has 'text;label' (delimiter = ';' would fit)"),
    ("text,label,label\na,top up,top up\n", "column 'label' appears twice"),
    ('text,label\na,top up\n"b,top up\nc,top up\n', "the quote that opens here is never closed"),
    ('label,text\ntop up,a\ntop up,"b\ntop up,c\n', "the quote that opens here is never closed"),
    ("text,label\na,top up\n".encode("utf-16"), "row 1: not UTF-8 text"),
    (b'text,label\n"' + b"z,top up\n" * 2**16, "line 2: the quote that opens here is never closed"),
    ("text,label\nb,?\n", "1 of 1 rows fail"),
]


@pytest.mark.parametrize(("content", "problem"), BAD_FILES, ids=[problem[:30] for _, problem in BAD_FILES])
def test_a_file_that_cannot_be_read_is_refused_in_one_line(site: Site, content: str | bytes, problem: str) -> None:
    with pytest.raises(DataError) as caught:
        site.load(content)
    assert problem in str(caught.value)
    assert str(site.folder / "data.csv") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_file_a_folder_and_damaged_gzip(site: Site) -> None:
    with pytest.raises(DataError, match="no such file"):
        site.load()
    (site.folder / "data.csv").mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        site.load()
    whole = gzip.compress(b"text,label\n" + b"a,top up\n" * 10_000)
    for damaged in (b"no gzip", whole[:-4], whole[:-8] + b"\0" * 8):
        (site.folder / "data.csv.gz").write_bytes(damaged)
        with pytest.raises(DataError, match="cannot be read"):
            site.load(path="data.csv.gz")


def test_limits_of_rows_and_bytes(site: Site) -> None:
    rows = "text,label\n" + "a,top up\n" * 3
    assert site.load(rows, most_rows=3, most_bytes=21).rows == 3
    with pytest.raises(DataError, match="more rows than most_rows = 2"):
        site.load(rows, most_rows=2)
    with pytest.raises(DataError, match="more bytes than most_bytes = 20"):
        site.load(rows, most_bytes=20)


def test_a_gzip_bomb_ends_at_the_limit(site: Site) -> None:
    site.write(b"text,label\n" + b"a,top up\n" * 3_000_000, "data.csv.gz")
    with pytest.raises(DataError, match="more rows than most_rows"):
        site.load(path="data.csv.gz", most_rows=50_000)


def test_the_plan_must_protect_the_declared_units(site: Site) -> None:
    check_plan(spec_of(), site.plan)
    for unit, task in ((None, "column:who"), ("who", "row"), ("who", "column:label")):
        with pytest.raises(DataError, match=r"the plan's task.unit is .*, the data set's is"):
            check_plan(spec_of(unit=unit), site.plan.revised({"task.unit": task}))


# --- a look without a plan


def test_inspect_reads_the_first_rows_and_writes_nothing(site: Site) -> None:
    site.write("text,label,age\na,anything,3\nb,x,old\n")
    report = inspect(spec_of(schema={"age": "integer"}), folder=site.folder)
    assert (report.rows, report.rejected) == (2, 1)
    assert report.problems == {"column 'age': not of type integer": 1}
    assert report.types == {"text": "text", "label": "text", "age": "text"}
    assert [path.name for path in site.folder.iterdir()] == ["data.csv"]
    with pytest.raises(DataError, match="no column 'shop'"):
        inspect(spec_of(schema={"shop": "string"}), folder=site.folder)
    site.write("text,label,age\n")
    with pytest.raises(DataError, match="no records"):
        inspect(spec_of(), folder=site.folder)


def test_inspect_stops_early(site: Site) -> None:
    site.write("text,label\n" + f"{'x' * 100},top up\n" * 200_000)
    assert 1000 <= inspect(spec_of(), folder=site.folder).rows < 100_000


def test_memory_is_bounded_by_blocks_not_by_the_file(site: Site) -> None:
    rows = 60_000
    site.write("text,label\n" + f"{'x' * 2000},top up\n" * rows)
    tracemalloc.start()
    try:
        assert inspect(spec_of(), folder=site.folder, rows=rows).rows == rows
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 40e6 < (site.folder / "data.csv").stat().st_size / 3


def test_without_pyarrow_the_extra_is_named(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match="client"):
        site.load(kind="parquet", path="data.parquet")


# --- parquet


def _parquet(site: Site, columns: dict[str, Any], **options: Any) -> None:
    pq.write_table(pa.table(columns), site.folder / "data.parquet", **options)


def _load_parquet(site: Site, **changes: Any) -> Loaded:
    return site.load(kind="parquet", path="data.parquet", **changes)


def test_parquet_reads_like_csv(site: Site) -> None:
    expected = site.load("text,label\na,top up\nb,lost card\n").digest
    _parquet(site, {"n": [1, 2], "label": pa.array(["top up", "lost card"]).dictionary_encode(), "text": ["a", "b"]})
    assert _load_parquet(site).digest == expected
    _parquet(site, {"text": pa.array(["a", "b"], pa.large_string()), "label": [7, 8]})
    assert _load_parquet(site, label_map={"7": "top up", "8": "lost card"}).digest == expected


def test_parquet_cells_that_fail_are_quarantined_by_record(site: Site) -> None:
    texts = pa.array([b"a", None, b"\xff", b"x\0"], pa.binary()).view(pa.string())
    _parquet(site, {"text": texts, "label": ["top up"] * 4})
    loaded = _load_parquet(site)
    assert loaded.examples.texts == ("a",)
    assert [row[:3] for row in site.failed()] == [
        ["2", "text", "empty"],
        ["3", "text", "not UTF-8 text"],
        ["4", "text", "has a NUL character"],
    ]


def test_parquet_text_must_be_text_and_units_are_no_nan(site: Site) -> None:
    _parquet(site, {"text": [1, 2], "label": ["top up"] * 2})
    with pytest.raises(DataError, match=r"2 of 2 rows fail.*not of type string"):
        _load_parquet(site)
    _parquet(site, {"text": ["a", "b"], "label": ["top up"] * 2, "who": [1.5, float("nan")]})
    loaded = _load_parquet(site, unit="who", schema={"who": "float"})
    assert loaded.problems == {"column 'who': empty": 1}


def test_nested_parquet_cells_are_no_text(site: Site) -> None:
    _parquet(site, {"text": [["a"], ["b"]], "label": ["top up"] * 2})
    with pytest.raises(DataError, match="not a plain value"):
        _load_parquet(site)


def test_bad_parquet_files(site: Site) -> None:
    with pytest.raises(DataError, match="no such file"):
        _load_parquet(site)
    (site.folder / "data.parquet").write_bytes(b"PAR1 not really PAR1")
    with pytest.raises(DataError, match="not a readable parquet file"):
        _load_parquet(site)
    _parquet(site, {"text": ["a"], "topic": ["top up"]})
    with pytest.raises(DataError, match="no column 'label'; it has 'text', 'topic'"):
        _load_parquet(site)
    pq.write_table(pa.table([["a"], ["b"], ["top up"]], names=["text", "text", "label"]), site.folder / "data.parquet")
    with pytest.raises(DataError, match="column 'text' appears twice"):
        _load_parquet(site)
    _parquet(site, {"text": ["a"] * 3, "label": ["top up"] * 3})
    with pytest.raises(DataError, match="3 rows, more than most_rows = 2"):
        _load_parquet(site, most_rows=2)


def test_a_damaged_page_of_parquet_is_one_line(site: Site) -> None:
    _parquet(site, {"text": [f"text {i}" for i in range(5000)], "label": ["top up"] * 5000}, compression="zstd")
    raw = bytearray((site.folder / "data.parquet").read_bytes())
    raw[200:400] = b"\xee" * 200
    (site.folder / "data.parquet").write_bytes(raw)
    with pytest.raises(DataError, match="not a readable parquet file") as caught:
        _load_parquet(site)
    assert "\n" not in str(caught.value)


# --- settings


BAD_SPECS: list[tuple[dict[str, Any], str]] = [
    ({"kind": "excel"}, "'excel'"),
    ({"text": None}, "give either text"),
    ({"texts": ["a", "b"]}, "give either text"),
    ({"label": "text"}, "text, label and unit must be different columns"),
    ({"unit": "label"}, "text, label and unit must be different columns"),
    ({"delimiter": ";;"}, "csv.delimiter = ';;'"),
    ({"spec": 1}, "unknown key: csv.spec"),
    ({"most_rows": "5"}, "csv.most_rows"),
    ({"schema": {"a": "int"}}, "csv.schema.a.type = 'int'"),
    ({"schema": {"text": "integer"}}, "schema: 'text' is read as text"),
    ({"schema": {"a": {"min": 1}}}, 'min and max belong to "integer" and "float"'),
    ({"schema": {"a": {"type": "integer", "min": 2, "max": 1}}}, "min = 2 is more than max = 1"),
    ({"kind": "hub", "path": "x"}, "hub.source"),
]


@pytest.mark.parametrize(("changes", "problem"), BAD_SPECS)
def test_a_malformed_table_is_refused_by_its_key(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(SettingsError) as caught:
        spec_of(**changes)
    assert problem in str(caught.value)


def test_a_table_survives_its_own_dump() -> None:
    spec = spec_of(schema={"age": {"type": "integer", "min": 0}}, label_map={"1": "top up"})
    assert make_spec(spec.model_dump()) == spec
