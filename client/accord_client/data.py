"""Records of a simulation: files and hub data sets under the rules of a site's connectors, but nothing is let pass.

A row that does not fit is refused with its file and row number, where a site puts it into its quarantine. The messages
quote label cells (never texts), so they are for the simulation's own user.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from accord_client.connectors.cells import BLANK, Checked, check_column
from accord_client.connectors.csv_file import check_folder, open_csv
from accord_client.connectors.parquet_file import open_parquet
from accord_client.connectors.source import (
    SWALLOWED,
    Batch,
    Source,
    one_line,
    plain_name,
    require_columns,
    short,
    short_list,
)
from accord_client.connectors.spec import ColumnRule, CsvData, ParquetData
from accord_client.examples import Examples, RowCounts, number_units
from accord_shared.errors import DataError, MissingExtra
from accord_shared.plan import first_problem

__all__ = ["EmptyTexts", "Examples", "number_units", "read_examples", "read_hub"]

EmptyTexts = Literal["refuse", "drop"]
"""What a record without text means: an error (the default), or a row to leave out on purpose."""

_EXPECTED = "a .csv, .csv.gz or .parquet file"
_MOST_CHARACTERS = CsvData.model_fields["most_characters"].default


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
    delimiter: str = ",",
    max_cell_lines: int = 200,
) -> Examples:
    """Reads a labelled data set from a .csv, .csv.gz (UTF-8, BOM tolerated) or .parquet file.

    `text` and `label` name columns; `columns` are kept beside them, and so is the unit's column when
    `unit` is "column:NAME" rather than "row". A label cell goes through `label_map` (cells that it
    does not name stay as they are) and must then be one of `labels`; ids and labels count in Unicode's
    form NFC, without white space around them. `empty_texts="drop"` leaves records without text out;
    nothing else is ever left out but empty lines. `Examples.counts` tells of all of them.

    Raises:
        DataError: one line with the file, the row (1-based, the header is row 1; for parquet the
            1-based record) and what is wrong: no such file, a folder, another format, a missing or
            doubled column, quotes out of place, a row of the wrong width, bytes that are not UTF-8, an empty
            text, an unknown label, an empty unit id, no records at all.
    """
    schema = _Schema(text, label, tuple(labels), unit, tuple(columns), dict(label_map or {}), empty_texts)
    with _open(path, schema, delimiter=delimiter, max_cell_lines=max_cell_lines) as source:
        return _assemble(source, schema, "record" if path.suffix.lower() == ".parquet" else "row")


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
    return _assemble(_load_hub(name, split, revision, schema), schema, "record")


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
            raise DataError(f'unit of privacy must be "row" or "column:NAME", not {short(self.unit)}')
        if len(set(self.labels)) != len(self.labels) or not self.labels:
            raise DataError("labels must be a list of distinct names")
        if strays := sorted(set(self.label_map.values()) - set(self.labels)):
            raise DataError(f"label_map leads to {short(strays[0])}, which is not one of the labels")
        if self.text == self.label or self.unit_column in (self.text, self.label):
            raise DataError("text, label and unit must be different columns")

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
        """Columns that must exist, each once, in the order of a record's cells."""
        return tuple(dict.fromkeys((self.text, self.label, *filter(None, [self.unit_column]), *self.columns)))

    def table(self, path: Path, **more: Any) -> dict[str, Any]:
        """The `[data.NAME]` table of a site that reads the same cells."""
        rules = {column: ColumnRule(required=False) for column in self.columns}
        unit = {"unit": self.unit_column} if self.unit_column else {}
        return {"path": path.name, "text": self.text, "label": self.label, "schema": rules, **unit, **more}


def _assemble(source: Source, schema: _Schema, word: str) -> Examples:
    records = _Records(source.name, schema, word)
    for batch in source.batches:
        records.add(batch)
    return records.finish()


class _Records:
    """What was read so far of a source; the first row that does not fit ends it."""

    def __init__(self, source: str, schema: _Schema, word: str) -> None:
        self._source, self._schema, self._word = source, schema, word
        self._index = {plain_name(label): i for i, label in enumerate(schema.labels)}
        self._map = {plain_name(cell): label for cell, label in schema.label_map.items()}
        required = {schema.text: schema.empty_texts == "refuse", schema.unit_column: True}
        self._rules = {
            name: ColumnRule(type="string" if name == schema.text else "any", required=required.get(name, False))
            for name in schema.needed
        }
        self._texts: list[str] = []
        self._labels: list[int] = []
        self._kept: dict[str, list[str]] = {name: [] for name in schema.kept}
        self._left_out = self._empty_lines = 0

    def add(self, batch: Batch) -> None:
        """Keep a batch of rows."""
        self._empty_lines += batch.empty_lines
        schema = self._schema
        read = zip(self._rules.items(), batch.cells, strict=True) if batch.numbers else ()
        columns = {name: check_column(cells, rule, _MOST_CHARACTERS) for (name, rule), cells in read}
        bad = batch.malformed[0] if batch.malformed else None
        for i, number in enumerate(batch.numbers):
            if bad is not None and bad.number < number:
                break
            text = columns[schema.text].texts[i].strip(BLANK)
            if not text and i not in columns[schema.text].problems:
                self._left_out += 1
                continue
            for name, column in columns.items():
                if i in column.problems:
                    raise self._error(number, self._said(name, column.problems[i]))
            self._labels.append(self._label_of(batch, columns, i))
            self._texts.append(text)
            for name, kept in self._kept.items():
                cell = columns[name].texts[i]
                kept.append(plain_name(cell) if name == schema.unit_column else cell)
        if bad is not None:
            raise self._error(bad.number, bad.problem if bad.lines == 1 else f"{bad.problem} ({bad.lines} lines)")

    def _said(self, name: str, problem: str) -> str:
        part = {self._schema.text: "the text", self._schema.unit_column: "the unit of privacy"}.get(name, "a cell")
        is_ = "is " if problem.startswith(("empty", "not")) else ""
        return f"{part} (column {short(name)}) {is_}{problem}"

    def _label_of(self, batch: Batch, columns: Mapping[str, Checked], i: int) -> int:
        cell = columns[self._schema.label].texts[i]
        label = self._label(cell)
        if label is None:
            problem = f"label {short(cell)} is not one of {short_list(self._schema.labels)}"
            raise self._error(batch.numbers[i], problem)
        if i in batch.spans and any(self._label(hidden) is not None for hidden in batch.spans[i].hidden):
            raise self._error(batch.numbers[i], f"{SWALLOWED} ({batch.spans[i].lines} lines)")
        return label

    def _label(self, cell: str) -> int | None:
        name = plain_name(cell)
        return self._index.get(plain_name(self._map.get(name, name)))

    def finish(self) -> Examples:
        """All records."""
        if not self._texts:
            raise DataError(f"{self._source}: no records")
        columns = {name: np.array(values, dtype=np.str_) for name, values in self._kept.items()}
        units = _units(self._schema, columns, len(self._texts))
        counts = RowCounts(Path(self._source).name, len(self._texts), self._left_out, self._empty_lines)
        return Examples(tuple(self._texts), np.array(self._labels, dtype=np.int64), units, columns, counts)

    def _error(self, number: int, problem: str) -> DataError:
        return DataError(f"{self._source}, {self._word} {number}: {problem}")


def _units(schema: _Schema, columns: Mapping[str, npt.NDArray[np.str_]], n: int) -> npt.NDArray[np.int64]:
    if schema.unit_column is None:
        return np.arange(n, dtype=np.int64)
    return number_units(columns[schema.unit_column].tolist())


# --- files


def _open(path: Path, schema: _Schema, **syntax: Any) -> AbstractContextManager[Source]:
    if path.is_dir():
        raise DataError(f"{path}: is a folder; expected {_EXPECTED} with columns {short_list(schema.needed)}")
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected {_EXPECTED}")
    name = path.name.lower()
    try:
        if name.endswith((".csv", ".csv.gz")):
            return open_csv(CsvData(kind="csv", **schema.table(path, **syntax)), path.parent)
        if name.endswith(".parquet"):
            return open_parquet(ParquetData(kind="parquet", **schema.table(path)), path.parent)
    except ValidationError as error:
        raise DataError(f"{path}: {first_problem(error)}") from None
    raise DataError(f"{path}: unknown kind of file; expected {_EXPECTED}")


# --- the hub


def _load_hub(name: str, split: str, revision: str | None, schema: _Schema) -> Source:
    try:
        import datasets  # optional, so loaded where it is used
    except ImportError as error:
        raise MissingExtra('hub data needs datasets: pip install "accord-federated[simulation]"') from error
    where = f"{name} [{split}]"
    if Path(name).is_dir():
        check_folder(Path(name), schema.label)
    try:
        loaded = datasets.load_dataset(name, split=split, revision=revision)
    except Exception as error:  # the library lets errors of many kinds through: one line for the user
        raise DataError(f"{where}: cannot be loaded: {one_line(error)}") from error
    require_columns(where, loaded.column_names, schema.needed)
    cells: dict[str, list[Any]] = {column: list(loaded[column]) for column in schema.needed}
    names: Callable[[int], str] | None = getattr(loaded.features[schema.label], "int2str", None)
    if names is not None:
        cells[schema.label] = [c if c is None or c < 0 else names(c) for c in cells[schema.label]]
    columns = [cells[column] for column in schema.needed]
    return Source(where, {}, iter([Batch(range(1, len(loaded) + 1), columns)]))
