"""Records at a site: what a data set is to the trainer, and how files become one.

Nothing is repaired in silence: a row that does not fit is refused with its file and row number. The
messages quote label cells (never texts), so they are for the site's own operator and logs.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from accord_shared.errors import DataError, MissingExtra

EmptyTexts = Literal["refuse", "drop"]
"""What a record without text means: an error (the default), or a row to leave out on purpose."""

_EXPECTED = "a .csv, .csv.gz or .parquet file"


@dataclass(frozen=True)
class Examples:
    """Labelled texts with their unit of privacy.

    `labels` [n] int64 indexes the plan's labels; `units` [n] int64 numbers the privacy units
    0..n_units-1 in order of first appearance (a row, or a customer whose rows are clipped together).
    `columns` holds further columns by name, [n] strings each.
    """

    texts: tuple[str, ...]
    labels: npt.NDArray[np.int64]
    units: npt.NDArray[np.int64]
    columns: dict[str, npt.NDArray[np.str_]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def n_units(self) -> int:
        """How many units of privacy the records belong to."""
        return int(self.units.max()) + 1 if len(self.units) else 0

    def label_counts(self, n_classes: int) -> npt.NDArray[np.int64]:
        """Records per class, [n_classes]."""
        return np.bincount(self.labels, minlength=n_classes).astype(np.int64)

    def take(self, indices: npt.ArrayLike) -> Examples:
        """The records at `indices` [m], in that order; units are numbered afresh from 0."""
        rows = np.asarray(indices, dtype=np.int64)
        return Examples(
            texts=tuple(self.texts[i] for i in rows.tolist()),
            labels=self.labels[rows],
            units=number_units(self.units[rows].tolist()),
            columns={name: values[rows] for name, values in self.columns.items()},
        )


def number_units(keys: Iterable[object]) -> npt.NDArray[np.int64]:
    """Numbers equal keys alike, 0, 1, … in order of first appearance: [n] int64."""
    seen: dict[object, int] = {}
    return np.array([seen.setdefault(key, len(seen)) for key in keys], dtype=np.int64)


def read_examples(
    path: Path,
    *,
    text: str,
    label: str,
    labels: Sequence[str],
    unit: str = "row",
    columns: Sequence[str] = (),
    label_map: Mapping[str, str] | None = None,
    empty_texts: EmptyTexts = "refuse",
) -> Examples:
    """Reads a labelled data set from a .csv, .csv.gz (UTF-8, BOM tolerated) or .parquet file.

    `text` and `label` name columns; `columns` are kept beside them, and so is the unit's column when
    `unit` is "column:NAME" rather than "row". A label cell goes through `label_map` (cells that it
    does not name stay as they are) and must then be one of `labels`. `empty_texts="drop"` leaves
    records without text out; nothing else is ever left out.

    Raises:
        DataError: one line with the file, the row (1-based, the header is row 1; for parquet the
            1-based record) and what is wrong: no such file, a folder, another format, a missing or
            doubled column, a row of the wrong width, bytes that are not UTF-8, an empty text, an
            unknown label, an empty unit id, no records at all.
    """
    schema = _Schema(text, label, tuple(labels), unit, tuple(columns), dict(label_map or {}), empty_texts)
    return _assemble(_open(path, schema), schema)


def read_hub(
    name: str,
    split: str,
    *,
    text: str,
    label: str,
    labels: Sequence[str],
    unit: str = "row",
    columns: Sequence[str] = (),
    label_map: Mapping[str, str] | None = None,
    empty_texts: EmptyTexts = "refuse",
    revision: str | None = None,
) -> Examples:
    """Reads one split of a Hugging Face data set: a hub name, or a local folder of csv/parquet files.

    Cells of a `ClassLabel` column count by their names; otherwise as `read_examples`, whose
    arguments and refusals these are.

    Raises:
        MissingExtra: the `datasets` library is not installed.
        DataError: the hub or the library refused, or a record does not fit.
    """
    schema = _Schema(text, label, tuple(labels), unit, tuple(columns), dict(label_map or {}), empty_texts)
    return _assemble(_load_hub(name, split, revision, schema), schema)


@dataclass(frozen=True)
class _Schema:
    """Which columns mean what, and which label cells are allowed."""

    text: str
    label: str
    labels: tuple[str, ...]
    unit: str
    columns: tuple[str, ...]
    label_map: dict[str, str]
    empty_texts: EmptyTexts

    def __post_init__(self) -> None:
        if self.unit != "row" and not self.unit_column:
            raise DataError(f'unit of privacy must be "row" or "column:NAME", not {_short(self.unit)}')
        if len(set(self.labels)) != len(self.labels) or not self.labels:
            raise DataError("labels must be a list of distinct names")
        if strays := sorted(set(self.label_map.values()) - set(self.labels)):
            raise DataError(f"label_map leads to {_short(strays[0])}, which is not one of the labels")

    @property
    def unit_column(self) -> str | None:
        """The column that names the unit of privacy, None for rows."""
        kind, _, column = self.unit.partition(":")
        return column or None if kind == "column" else None

    @property
    def kept(self) -> tuple[str, ...]:
        """Columns that the examples keep, the unit's among them."""
        return tuple(dict.fromkeys((*self.columns, *filter(None, [self.unit_column]))))

    @property
    def needed(self) -> tuple[str, ...]:
        """Columns that must exist, in the order of a record's cells."""
        return (self.text, self.label, *self.kept)


@dataclass(frozen=True)
class _Source:
    """Records as they come: `records` yields (number, cells in the order of `_Schema.needed`)."""

    name: str
    word: str
    records: Iterator[tuple[int, Sequence[str]]]

    def error(self, number: int, problem: str) -> DataError:
        return DataError(f"{self.name}, {self.word} {number}: {problem}")


def _assemble(source: _Source, schema: _Schema) -> Examples:
    index = {name: i for i, name in enumerate(schema.labels)}
    id_at = schema.kept.index(schema.unit_column) if schema.unit_column else None
    texts: list[str] = []
    labels: list[int] = []
    extras: list[Sequence[str]] = []
    for number, (raw_text, raw_label, *extra) in source.records:
        text = raw_text.strip("\ufeff \t\r\n\v\f")
        if not text and schema.empty_texts == "drop":
            continue
        if not text:
            raise source.error(number, f"the text (column {_short(schema.text)}) is empty")
        if id_at is not None and not extra[id_at]:  # rows without an id would share one unit by accident
            raise source.error(number, f"the unit of privacy (column {_short(schema.kept[id_at])}) is empty")
        labels.append(_label_index(source, number, raw_label, schema, index))
        texts.append(text)
        extras.append(extra)
    if not texts:
        raise DataError(f"{source.name}: no records")
    columns = {name: np.array([extra[i] for extra in extras], dtype=np.str_) for i, name in enumerate(schema.kept)}
    return Examples(tuple(texts), np.array(labels, dtype=np.int64), _units(schema, columns, len(texts)), columns)


def _label_index(source: _Source, number: int, cell: str, schema: _Schema, index: dict[str, int]) -> int:
    label = schema.label_map.get(cell, cell)
    if label not in index:
        raise source.error(number, f"label {_short(cell)} is not one of {_short_list(schema.labels)}")
    return index[label]


def _units(schema: _Schema, columns: Mapping[str, npt.NDArray[np.str_]], n: int) -> npt.NDArray[np.int64]:
    if schema.unit_column is None:
        return np.arange(n, dtype=np.int64)
    return number_units(columns[schema.unit_column].tolist())


def _open(path: Path, schema: _Schema) -> _Source:
    if path.is_dir():
        raise DataError(f"{path}: is a folder; expected {_EXPECTED} with columns {_short_list(schema.needed)}")
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected {_EXPECTED}")
    name = path.name.lower()
    if name.endswith((".csv", ".csv.gz")):
        return _open_csv(path, schema)
    if name.endswith(".parquet"):
        return _open_parquet(path, schema)
    raise DataError(f"{path}: unknown kind of file; expected {_EXPECTED}")


# --- csv


def _open_csv(path: Path, schema: _Schema) -> _Source:
    rows = _numbered_rows(path, _decoded(path))
    header = next(rows, (1, []))[1]
    at = _positions(str(path), header, schema)
    records = ((number, [row[i] for i in at]) for number, row in _same_width(path, rows, len(header)))
    return _Source(str(path), "row", records)


def _decoded(path: Path) -> str:
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix.lower() == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {_one_line(error)}") from error
    try:
        content = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, row {_row_of_bad_byte(raw)}: not UTF-8 text ({error.reason})") from error
    if not content.strip():
        raise DataError(f"{path}: the file is empty")
    return content.rstrip("\r\n")


def _row_of_bad_byte(raw: bytes) -> int:
    """The csv row (header = 1) that holds the first byte which is not UTF-8."""
    try:
        raw.decode("utf-8")  # not utf-8-sig, whose error positions count from after the BOM
    except UnicodeDecodeError as error:
        prefix = raw[: error.start].decode("utf-8") + "x"  # a cell in place of the bad byte
        return sum(1 for _ in csv.reader(io.StringIO(prefix, newline="")))
    return 1


def _numbered_rows(path: Path, content: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(content, newline=""), strict=True)
    number = 0
    try:
        for number, row in enumerate(reader, start=1):
            yield number, row
    except csv.Error as error:
        raise DataError(f"{path}, row {number + 1}: malformed csv ({_one_line(error)})") from error


def _same_width(path: Path, rows: Iterator[tuple[int, list[str]]], width: int) -> Iterator[tuple[int, list[str]]]:
    for number, row in rows:
        if len(row) != width:
            raise DataError(f"{path}, row {number}: {len(row)} columns where the header has {width}")
        yield number, row


def _positions(name: str, header: Sequence[str], schema: _Schema) -> list[int]:
    for column in schema.needed:
        if column not in header:
            raise DataError(f"{name}: no column {_short(column)}; it has {_short_list(header)}")
        if header.count(column) > 1:
            raise DataError(f"{name}: column {_short(column)} appears twice")
    return [header.index(column) for column in schema.needed]


# --- parquet and the hub


def _open_parquet(path: Path, schema: _Schema) -> _Source:
    try:
        import pyarrow as pa  # optional, so loaded where it is used
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingExtra('parquet files need pyarrow: pip install "accord-federated[client]"') from error
    try:
        names = pq.read_schema(path).names
        _positions(str(path), names, schema)
        table = pq.read_table(path, columns=list(dict.fromkeys(schema.needed)))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file: {_one_line(error)}") from error
    return _columnar(str(path), {name: table.column(name).to_pylist() for name in schema.needed}, schema)


def _load_hub(name: str, split: str, revision: str | None, schema: _Schema) -> _Source:
    try:
        import datasets  # optional, so loaded where it is used
    except ImportError as error:
        raise MissingExtra('hub data needs datasets: pip install "accord-federated[simulation]"') from error
    where = f"{name} [{split}]"
    try:
        loaded = datasets.load_dataset(name, split=split, revision=revision)
    except Exception as error:  # the library lets errors of many kinds through: one line for the user
        raise DataError(f"{where}: cannot be loaded: {_one_line(error)}") from error
    _positions(where, loaded.column_names, schema)
    cells: dict[str, list[Any]] = {column: list(loaded[column]) for column in schema.needed}
    names: Callable[[int], str] | None = getattr(loaded.features[schema.label], "int2str", None)
    if names is not None:
        cells[schema.label] = [c if c is None or c < 0 else names(c) for c in cells[schema.label]]
    return _columnar(where, cells, schema)


def _columnar(name: str, cells: dict[str, list[Any]], schema: _Schema) -> _Source:
    """Records of typed columns: a null is an empty cell, ints and bools are their `str()`."""
    for number, cell in enumerate(cells[schema.text], start=1):
        if cell is not None and not isinstance(cell, str):
            kind = type(cell).__name__
            raise DataError(f"{name}, record {number}: the text (column {_short(schema.text)}) is {kind}")
    rows = zip(*(cells[column] for column in schema.needed), strict=True)
    records = ((i, ["" if c is None else str(c) for c in row]) for i, row in enumerate(rows, start=1))
    return _Source(name, "record", records)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _short(value: str, limit: int = 40) -> str:
    return repr(value if len(value) <= limit else value[: limit - 1] + "…")


def _short_list(values: Sequence[str], limit: int = 6) -> str:
    shown = ", ".join(_short(value) for value in values[:limit])
    return shown + (f", … ({len(values)} in all)" if len(values) > limit else "")
