"""One strict rule of CSV at a site and in a simulation: no row is merged, changed or lost without its line named."""

from __future__ import annotations

import csv
import gzip
import io
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accord_client.connectors import Loaded, csv_rows, inspect, load, make_spec
from accord_client.data import Examples, read_examples
from accord_shared.errors import DataError
from accord_shared.plan import Plan

PlanOf = Callable[..., Plan]
LABELS = ("card", "loan")


class Reader:
    """Both readers of one file."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder, self.plan = folder, plan

    def write(self, content: str | bytes, name: str = "data.csv") -> Path:
        raw = content.encode() if isinstance(content, str) else content
        path = self.folder / name
        path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
        return path

    def site(self, name: str = "data.csv", **changes: Any) -> Loaded:
        unit = f"column:{changes['unit']}" if "unit" in changes else "row"
        spec = make_spec({"kind": "csv", "path": name, "text": "text", "label": "label", **changes})
        plan = self.plan.revised({"task.unit": unit})
        return load(spec, plan, self.folder / "quarantine.csv", folder=self.folder)

    def simulation(self, name: str = "data.csv", **changes: Any) -> Examples:
        return read_examples(self.folder / name, text="text", label="label", labels=LABELS, **changes)

    def check(self, **changes: Any) -> Any:
        spec = make_spec({"kind": "csv", "path": "data.csv", "text": "text", "label": "label", **changes})
        return inspect(spec, folder=self.folder, rows=None)


@pytest.fixture
def reader(tmp_path: Path, plan_of: PlanOf) -> Reader:
    return Reader(tmp_path, plan_of({"task.labels": list(LABELS)}))


def _rows(first: int, last: int) -> list[str]:
    return [f"question number {i},{LABELS[i % 2]}" for i in range(first, last)]


STRAY_ENDS = {
    "an opening quote": '"quoted, text",loan',
    "a quote that closes it": 'how are you",loan',
    "a cell that closes it": 'how are you,"loan"',
}


@pytest.mark.parametrize("end", STRAY_ENDS.values(), ids=STRAY_ENDS)
@pytest.mark.parametrize("limit", [200, 5000])
def test_a_stray_quote_swallows_no_rows_unseen(reader: Reader, end: str, limit: int) -> None:
    """Also where a quote far below makes the file well formed, with or without a limit of lines that would see it."""
    lines = ["text,label", *_rows(0, 10), '"my card was lost,card', *_rows(11, 990), end, *_rows(991, 1000)]
    reader.write("\n".join(lines))
    with pytest.raises(DataError, match=r"98\d of 1000 rows fail.*first: row 12"):
        reader.site(max_cell_lines=limit)
    report = reader.check(max_cell_lines=limit)
    assert report.too_many
    assert report.counts.rows == report.rows == 1000
    with pytest.raises(DataError, match="row 12"):
        reader.simulation()


def test_a_few_swallowed_rows_are_quarantined_and_counted_one_by_one(reader: Reader) -> None:
    lines = ["text,label", *_rows(0, 10), '"my card was lost,card', *_rows(11, 13), '"and mine",loan', *_rows(14, 200)]
    reader.write("\n".join(lines))
    loaded = reader.site()
    assert loaded.counts == loaded.examples.counts
    assert (loaded.rows, loaded.rejected, len(loaded.examples)) == (200, 4, 196)
    assert not {"question number 11", "and mine"} & set(loaded.examples.texts)
    assert (
        '12,,"line 15: a quote inside the cell that opens in line 12' in (reader.folder / "quarantine.csv").read_text()
    )


def test_a_quote_that_never_closes_is_refused_with_its_line(reader: Reader) -> None:
    reader.write("\n".join(["text,label", *_rows(0, 5), '"my card was lost,card', *_rows(6, 900)]))
    for read in (reader.site, reader.simulation, reader.check):
        with pytest.raises(DataError, match="line 7: the quote that opens here is never closed"):
            read()


BROKEN = [
    '"say \\"hi\\" now",card',
    'a 5" screen,card',
    ' "blank before",card',
    '"blank behind" ,card',
    '"two""",""card"',
    '"a"b,card',
    'a,card"',
    '"a,card"',
    '"a","card',
    "a",
    "a,card,card",
    "",
]


@pytest.mark.parametrize("line", BROKEN)
def test_what_breaks_the_rule_is_no_row_and_its_neighbours_are(reader: Reader, line: str) -> None:
    good = _rows(0, 300)
    reader.write("\r\n".join(["text,label", *good[:100], line, '"x ""quoted""","loan"', *good[100:], ""]))
    texts = [row.split(",")[0] for row in good[:100]]
    loaded = reader.site()
    assert loaded.rows == 302
    assert loaded.rejected + loaded.counts.empty_lines in (1, 2)  # the next row where a quote is left open
    assert list(loaded.examples.texts[:100]) == texts
    assert len(loaded.examples) + loaded.rejected + loaded.counts.empty_lines == 302
    assert set(loaded.examples.texts) <= {*(row.split(",")[0] for row in good), 'x "quoted"'}
    if line:
        with pytest.raises(DataError, match="row 102"):
            reader.simulation()


def test_texts_of_several_lines_are_read_and_their_number_of_lines_is_limited(reader: Reader) -> None:
    text = "Dear bank,\r\n\r\nmy card, which I need, is lost.\nYours,\rA. Customer"
    reader.write(f'text,label\r\n"{text}",card\r\n"b",loan\r\n')
    assert reader.site().examples.texts == reader.simulation().texts == (text, "b")
    with pytest.raises(DataError, match="line 2 spans more than max_cell_lines = 4 lines"):
        reader.site(max_cell_lines=4)
    assert reader.site(max_cell_lines=5).rejected == 0


def test_a_text_that_holds_whole_rows_is_taken_for_a_stray_quote(reader: Reader) -> None:
    reader.write("label,text\n" + "".join(f"card,text {i}\n" for i in range(99)) + 'loan,"mine\ncard,yours\nis lost"\n')
    loaded = reader.site()
    assert (loaded.rows, loaded.rejected) == (102, 3)
    assert "is a quote out of place? (3 lines)" in next(iter(loaded.problems))


def test_both_readers_agree_at_every_place_where_a_block_may_end(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CRLF, quoted or not, a doubled quote and a character of several bytes stay what they are."""
    rows = [("a\r\nb", "card"), ('say "hi"', "loan"), ("äöü €", "card"), ("c\rd\n", "loan")]
    out = io.StringIO(newline="")
    csv.writer(out).writerows([("text", "label"), *rows])
    path = reader.write("\ufeff" + out.getvalue())
    for size in range(1, path.stat().st_size + 2):
        monkeypatch.setattr(csv_rows, "_BLOCK_BYTES", size)
        assert reader.simulation().texts == reader.site().examples.texts == tuple(text.strip() for text, _ in rows)


_TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0") | st.sampled_from('",;\n\r\t '), max_size=30)


@settings(max_examples=200, deadline=None)
@given(
    texts=st.lists(_TEXTS, min_size=1, max_size=8),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
    delimiter=st.sampled_from([",", ";", "\t", "|", "-", "^"]),
    block=st.integers(1, 64),
)
def test_what_the_csv_module_writes_comes_back(texts: list[str], quoting: Any, delimiter: str, block: int) -> None:
    out = io.StringIO(newline="")
    csv.writer(out, quoting=quoting, delimiter=delimiter).writerows(
        [("text", "x", "label"), *[[t, t, "card"] for t in texts]]
    )
    csv_rows._BLOCK_BYTES, before = block, csv_rows._BLOCK_BYTES
    try:
        rows = csv_rows.CsvRows(io.BytesIO(out.getvalue().encode()), delimiter, 10**6)
        read = [[cell.decode() for cell in row.cells] for row in rows if isinstance(row, csv_rows.Row)]
    finally:
        csv_rows._BLOCK_BYTES = before
    assert read == [[text, text, "card"] for text in texts]


@settings(max_examples=300, deadline=None)
@given(raw=st.text(st.sampled_from('a",\n\r"'), max_size=40))
def test_every_line_is_in_a_row_a_report_or_empty(raw: str) -> None:
    try:
        rows = list(csv_rows.CsvRows(io.BytesIO(f"text,label\n{raw}".encode()), ",", 3))
    except csv_rows.Unreadable:
        return
    lines = sum(1 if row is None else row.lines for row in rows)
    assert lines == len(raw.encode().splitlines())


def test_a_cell_of_more_than_the_csv_modules_limit_is_read(reader: Reader) -> None:
    text = "x " * 70_000
    reader.write(f"text,label\n{text},card\nb,loan\n")
    assert reader.simulation().texts == reader.site().examples.texts == (text.strip(), "b")


def test_an_endless_line_is_refused(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_rows, "MOST_LINE_BYTES", 2**16)
    monkeypatch.setattr(csv_rows, "_BLOCK_BYTES", 2**12)
    reader.write("text,label\na,card\n" + "z" * 2**18)
    for read in (reader.site, reader.simulation):
        with pytest.raises(DataError, match="line 3: longer than 65536 bytes"):
            read()


IDS = ["C1", "C1 ", " C1", "C1\u00a0", "Jose\u0301", "José", "\ufeffC1"]


def test_ids_and_labels_count_alike_wherever_they_come_from(reader: Reader) -> None:
    labels = [" card", "loan ", "card", "Card name", "loan", "card\t", "loan"]
    rows = [
        (f"hello {i}", label if label != "Card name" else "card", who)
        for i, (label, who) in enumerate(zip(labels, IDS, strict=True))
    ]
    out = io.StringIO(newline="")
    csv.writer(out).writerows([("text", "label", "who"), *rows])
    reader.write(out.getvalue())
    pq.write_table(
        pa.table(dict(zip(("text", "label", "who"), map(list, zip(*rows, strict=True)), strict=True))),
        reader.folder / "data.parquet",
    )
    with closing(sqlite3.connect(reader.folder / "data.db")) as database:
        database.execute("CREATE TABLE data (text TEXT, label TEXT, who TEXT)")
        database.executemany("INSERT INTO data VALUES (?, ?, ?)", rows)
        database.commit()
    units = [0, 0, 0, 0, 1, 1, 0]
    simulated = [reader.simulation(name, unit="column:who") for name in ("data.csv", "data.parquet")]
    sites = [
        reader.site(unit="who").examples,
        reader.site("data.parquet", kind="parquet", unit="who").examples,
    ]
    spec = make_spec(
        {
            "kind": "sql",
            "url": "sqlite:///data.db",
            "query": "SELECT * FROM data",
            "text": "text",
            "label": "label",
            "unit": "who",
        }
    )
    sql = load(spec, reader.plan.revised({"task.unit": "column:who"}), reader.folder / "q.csv", folder=reader.folder)
    for examples in (*simulated, *sites, sql.examples):
        assert examples.units.tolist() == units
        assert examples.labels.tolist() == [0, 1, 0, 0, 1, 0, 1]


def test_labels_that_count_alike_are_refused(reader: Reader, plan_of: PlanOf) -> None:
    reader.write("text,label\na,card\n")
    reader.plan = plan_of({"task.labels": ["card", "card "]})
    with pytest.raises(DataError, match="white space or Unicode's forms alone"):
        reader.site()


KINDS = [
    ("", "the file is empty"),
    ("text,label\n", "no records"),
    ("text;label\na;card\n", r"delimiter = ';' would fit"),
    ("text\tlabel\na\tcard\n", r"delimiter = '\\t' would fit"),
    ("text,label,label\na,card,card\n", "column 'label' appears twice"),
    ("text,label\na,card\n".encode("utf-16"), "UTF-16"),
    ("text,label\na,card\n".encode("utf-16-le"), "UTF-16"),
    ("text,label\n银行卡,card\n".encode("gbk"), "row 2.*column 'text'.*not UTF-8 text"),
    ("text,label\na\0b,card\n", "row 2.*column 'text'.*NUL character"),
    ("text,label\na\n", "row 2.*1 columns where the header has 2"),
    ('"text,label\na,card\n', "line 1: the quote that opens here is never closed"),
    ('te"xt,label\na,card\n', "row 1: line 1: a quote inside a cell"),
]


@pytest.mark.parametrize("name", ["data.csv", "data.csv.gz"])
@pytest.mark.parametrize(("content", "problem"), KINDS, ids=[problem[:20] for _, problem in KINDS])
def test_what_is_no_readable_csv_is_named_by_both(
    reader: Reader, content: str | bytes, problem: str, name: str
) -> None:
    reader.write(content, name)
    for read in (reader.site, reader.simulation):
        with pytest.raises(DataError, match=problem) as caught:
            read(name)
        assert name in str(caught.value)
        assert str(caught.value).isprintable()


def test_a_simulation_may_name_a_delimiter(reader: Reader) -> None:
    reader.write("text;label\na,b;card\n")
    assert reader.simulation(delimiter=";").texts == ("a,b",)


def test_rows_in_are_rows_accepted_left_out_and_empty_lines(reader: Reader) -> None:
    reader.write("text,label\n\na,card\n,loan\n\n\nb,loan\n" + "\n".join(_rows(0, 50)))
    examples = reader.simulation(empty_texts="drop")
    counts = examples.counts
    assert counts is not None
    assert (counts.rows, counts.accepted, counts.left_out, counts.empty_lines) == (56, 52, 1, 3)
    assert str(counts) == "data.csv: 56 rows in: 52 accepted, 1 left out, 3 empty lines"
    assert (reader.site().counts.rows, reader.check().counts.rows) == (56, 56)


def test_many_failing_lines_are_too_many_even_if_they_are_few_rows(reader: Reader) -> None:
    """A row of forty lines that fails counts its lines, but a data set of long texts is no worse for it."""
    long = '"' + "\n".join("x" * 5 for _ in range(40)) + '"'
    reader.write("text,label\n" + "\n".join(_rows(0, 100)) + f"\n{long},other\n")
    with pytest.raises(DataError, match="1 of 101 rows fail"):
        reader.site()
    reader.write("text,label\n" + f"{long},card\n" * 100 + f"{long},other\n")
    assert reader.site().rejected == 1


SWALLOWING = 'text,label\na,card\n"b,card\nc,loan\nd",loan\n' + "e,card\n" * 9


@pytest.mark.parametrize(
    ("content", "problem"),
    [(SWALLOWING, "row 3: a cell of several lines"), ('text,label\n"a\\"b",card\n', "row 2: line 2")],
)
def test_a_folder_that_the_datasets_library_reads_keeps_the_rule(
    reader: Reader, content: str, problem: str, tmp_path: Path
) -> None:
    """Its reader has rules of its own: swallowed rows would be one."""
    pytest.importorskip("datasets", reason="the datasets library is not installed")
    from accord_client.data import read_hub

    (tmp_path / "set").mkdir()
    reader.write(content, "set/train.csv")
    spec = make_spec({"kind": "hub", "source": "path:set", "text": "text", "label": "label"})
    for read in (
        lambda: load(spec, reader.plan, tmp_path / "q.csv", folder=tmp_path),
        lambda: read_hub(str(tmp_path / "set"), "train", text="text", label="label", labels=LABELS),
    ):
        with pytest.raises(DataError, match=problem):
            read()


def test_a_simulation_may_name_the_lines_of_a_cell(reader: Reader) -> None:
    reader.write('text,label\n"' + "a\n" * 300 + '",card\nb,loan\n')
    with pytest.raises(DataError, match="max_cell_lines = 200"):
        reader.simulation()
    assert len(reader.simulation(max_cell_lines=301)) == 2
