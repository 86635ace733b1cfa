"""From a declared data set to examples: checked row by row, counted, nothing repaired or dropped in silence."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from accord_client.connectors.cells import BLANK, Checked, check_column
from accord_client.connectors.csv_file import open_csv
from accord_client.connectors.hub import open_hub
from accord_client.connectors.parquet_file import open_parquet
from accord_client.connectors.quarantine import Quarantine
from accord_client.connectors.source import SWALLOWED, Batch, Source, Span, plain_name, short
from accord_client.connectors.spec import CsvData, DataSpec, ParquetData, SqlData
from accord_client.connectors.sql import open_sql
from accord_client.examples import Examples, RowCounts
from accord_shared.errors import DataError
from accord_shared.plan import Plan

_SEPARATOR = "\n\n"
_MOST_LABELS = 10_000


@dataclass(frozen=True)
class Loaded:
    """What training reads, and what of the data set failed. All of it is private to the site.

    Every row that came in is in `counts`: accepted, left out, or an empty line. `digest` (SHA-256, hexadecimal) is of
    what training sees: texts, labels' names and numbers of units, in order. It does not depend on where the records
    were. `quarantine` is None where nothing failed; `problems` counts its rows.
    """

    examples: Examples
    rows: int
    rejected: int
    digest: str
    quarantine: Path | None
    problems: dict[str, int]
    counts: RowCounts


@dataclass(frozen=True)
class Report:
    """A look at a data set's first rows: types as the source names them, and what fails whatever the plan."""

    source: str
    types: dict[str, str]
    rows: int
    rejected: int
    problems: dict[str, int]
    counts: RowCounts
    too_many: bool
    """Whether so many fail that a run would be refused."""


def check_plan(spec: DataSpec, plan: Plan) -> None:
    """The plan protects the units that the operator declared: no weaker and no other ones.

    Raises:
        DataError: the plan's `task.unit` is not the data set's.
    """
    declared = "row" if spec.unit is None else f"column:{spec.unit}"
    if plan.task.unit != declared:
        raise DataError(f"the plan's task.unit is {short(plan.task.unit)}, the data set's is {short(declared)}")


def load(spec: DataSpec, plan: Plan, quarantine: Path, *, folder: Path = Path()) -> Loaded:
    """Reads the data set for a plan. Rows that fail are counted and written to the file `quarantine`.

    Relative paths are relative to `folder`. Equal sources give equal examples, in the source's order (of a query: in
    the order of the columns that are read). Beyond the examples, memory is bounded by a batch.

    Raises:
        DataError: the source cannot be read, or more than `most_rejected_fraction` of its rows fail, or no row is
            left, or it is larger than its limits; one line that quotes no record.
        Unreachable: the database does not answer.
        SettingsError: a password is missing.
        MissingExtra: a library is not installed.
        OutputError: `quarantine` cannot be written.
    """
    check_plan(spec, plan)
    with Quarantine(quarantine) as failed, _open(spec, folder) as source:
        reading = _Reading(spec, source.name, plan.task.labels)
        for batch in source.batches:
            reading.add(batch, failed)
        examples = reading.finish(quarantine)
    return Loaded(
        examples=examples,
        rows=reading.rows,
        rejected=reading.rejected,
        digest=reading.digest.hexdigest(),
        quarantine=quarantine if failed.rows else None,
        problems=dict(reading.problems.most_common()),
        counts=reading.counts,
    )


def inspect(spec: DataSpec, *, folder: Path = Path(), rows: int | None = 1000) -> Report:
    """Looks at the first `rows` (rounded up to whole batches; None: all), without a plan; writes nothing.

    Raises:
        DataError, Unreachable, SettingsError, MissingExtra: as `load`, except that failing rows are only counted.
    """
    with _open(spec, folder) as source:
        reading = _Reading(spec, source.name, None)
        for batch in source.batches:
            reading.add(batch, None)
            if rows is not None and reading.rows >= rows:
                break
        reading.settle()
        if reading.rows == reading.empty_lines:
            raise DataError(f"{source.name}: no records")
        return Report(
            source=source.name,
            types=source.types,
            rows=reading.rows,
            rejected=reading.rejected,
            problems=dict(reading.problems.most_common()),
            counts=reading.counts,
            too_many=reading.too_many,
        )


def _open(spec: DataSpec, folder: Path) -> AbstractContextManager[Source]:
    if isinstance(spec, CsvData):
        return open_csv(spec, folder)
    if isinstance(spec, ParquetData):
        return open_parquet(spec, folder)
    if isinstance(spec, SqlData):
        return open_sql(spec, folder)
    return open_hub(spec, folder)


@dataclass
class _Reading:
    """What was read so far."""

    spec: DataSpec
    source: str
    labels: Sequence[str] | None
    """The plan's; None: labels are not looked at."""
    rows: int = 0
    """Accepted, rejected and empty ones."""
    rejected: int = 0
    """Rows, and lines that are no rows or may hide some."""
    empty_lines: int = 0
    problems: Counter[str] = field(default_factory=Counter)
    digest: Any = field(default_factory=hashlib.sha256)
    _size: int = 0
    _first: str = ""
    _texts: list[str] = field(default_factory=list)
    _labels: array[int] = field(default_factory=lambda: array("q"))
    _units: array[int] = field(default_factory=lambda: array("q"))
    _unit_numbers: dict[str, int] = field(default_factory=dict)
    _lines: int = 0
    _bad_lines: int = 0
    _seen: set[str] = field(default_factory=set)
    _doubts: list[tuple[int, Span]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._map = {plain_name(cell): label for cell, label in self.spec.label_map.items()}
        self._index = {plain_name(label): i for i, label in enumerate(self.labels or ())}
        if len(self._index) < len(self.labels or ()):
            raise DataError("the plan's labels differ in white space or Unicode's forms alone")

    def add(self, batch: Batch, failed: Quarantine | None) -> None:
        """Check a batch of rows, keep those that fit."""
        columns = self._checked(batch)
        self._within_limits(batch, columns)
        problems = dict(self._problems(columns, len(batch.numbers), batch.spans))
        for number, problem, look, lines in batch.malformed:
            self._reject(number, "", problem, look, failed, lines, lines)
        at = {name: i for i, name in enumerate(self.spec.columns)}
        for i, (column, problem) in problems.items():
            lines = batch.spans[i].lines if i in batch.spans else 1
            rows = lines if problem == SWALLOWED else 1
            self.rows += rows - 1
            self._reject(batch.numbers[i], column, problem, batch.cells[at[column]][i], failed, rows, lines)
        good = [i for i in range(len(batch.numbers)) if i not in problems]
        if self.labels is not None:
            self._keep(columns, good)
        elif columns:
            self._look_at(batch, columns, good)
        if self.rejected > self.spec.most_rejected_fraction * self.spec.most_rows:
            raise DataError(self._too_many(failed))

    def _look_at(self, batch: Batch, columns: Mapping[str, Checked], good: list[int]) -> None:
        """Without a plan the data's own labels are the measure of what a cell may have swallowed, once all are seen."""
        labels = columns[self.spec.label].texts
        if len(self._seen) < _MOST_LABELS:
            self._seen.update(plain_name(labels[i]) for i in good if i not in batch.spans)
        good_spans = batch.spans.keys() & set(good)
        self._doubts += [(batch.numbers[i], batch.spans[i]) for i in sorted(good_spans) if batch.spans[i].hidden]

    def settle(self) -> None:
        """Judge, without a plan, rows that may have swallowed others."""
        for number, span in self._doubts:
            if any(plain_name(label) in self._seen for label in span.hidden):
                self.rows += span.lines - 1
                self._reject(number, self.spec.label, SWALLOWED, "", None, span.lines, span.lines)
        self._doubts.clear()

    @property
    def counts(self) -> RowCounts:
        """What became of the rows so far."""
        accepted = self.rows - self.rejected - self.empty_lines
        return RowCounts(self.source, accepted, self.rejected, self.empty_lines)

    @property
    def too_many(self) -> bool:
        """Whether too many rows fail, or too many lines: one row that swallows a thousand others is no single row."""
        most = self.spec.most_rejected_fraction
        return self.rejected > most * (self.rows - self.empty_lines) or self._bad_lines > most * self._lines

    def finish(self, quarantine: Path) -> Examples:
        """The examples, if enough rows fit."""
        if self.rows == self.empty_lines:
            raise DataError(f"{self.source}: no records")
        if self.too_many or not self._texts:
            raise DataError(self._too_many(quarantine))
        units, labels = _vector(self._units), _vector(self._labels)
        return Examples(tuple(self._texts), labels, units, counts=self.counts)

    def _checked(self, batch: Batch) -> dict[str, Checked]:
        cells = zip(self.spec.columns, batch.cells, strict=True) if batch.numbers else ()
        most = self.spec.most_characters
        return {name: check_column(column, self.spec.rule(name), most) for name, column in cells}

    def _within_limits(self, batch: Batch, columns: Mapping[str, Checked]) -> None:
        lines = sum(bad.lines for bad in batch.malformed)
        self.rows += len(batch.numbers) + lines + batch.empty_lines
        self.empty_lines += batch.empty_lines
        self._lines += len(batch.numbers) + lines + sum(span.lines - 1 for span in batch.spans.values())
        self._size += sum(len(text.encode()) for column in columns.values() for text in column.texts)
        if self.rows > self.spec.most_rows:
            raise DataError(f"{self.source}: more rows than most_rows = {self.spec.most_rows}")
        if self._size > self.spec.most_bytes:
            raise DataError(f"{self.source}: more bytes than most_bytes = {self.spec.most_bytes}")

    def _problems(
        self, columns: Mapping[str, Checked], n: int, spans: Mapping[int, Span]
    ) -> Iterator[tuple[int, tuple[str, str]]]:
        """(index, (column, problem)) of every row that fails, once each, in order."""
        found: dict[int, tuple[str, str]] = {}
        for name, column in columns.items():
            for i, problem in column.problems.items():
                found.setdefault(i, (name, problem))
        if n and len(self.spec.text_columns) > 1:
            parts = [columns[name].texts for name in self.spec.text_columns]
            for i, cells in enumerate(zip(*parts, strict=True)):
                if not any(cells):
                    found.setdefault(i, (self.spec.text_columns[0], "all columns of the text are empty"))
        if n and self.labels is not None:
            for i, cell in enumerate(columns[self.spec.label].texts):
                if self._label(cell) is None:
                    found.setdefault(i, (self.spec.label, "not one of the plan's labels"))
            for i, span in spans.items():
                if any(self._label(cell) is not None for cell in span.hidden):
                    found[i] = self.spec.label, SWALLOWED
        yield from sorted(found.items())

    def _label(self, cell: str) -> int | None:
        """Index of a label cell's label in the plan."""
        name = plain_name(cell)
        return self._index.get(plain_name(self._map.get(name, name)))

    def _reject(
        self, number: int, column: str, problem: str, cell: object, failed: Quarantine | None, rows: int, lines: int
    ) -> None:
        problem = problem if rows == 1 else f"{problem} ({rows} lines)"
        reason = f"column {short(column)}: {problem}" if column else problem
        self._first = self._first or f"row {number}, {reason}"
        self.rejected += rows
        self._bad_lines += lines
        self.problems[reason] += 1
        if failed is not None:
            failed.add(number, column, problem, cell)

    def _keep(self, columns: Mapping[str, Checked], rows: Iterable[int]) -> None:
        if not columns:
            return
        spec = self.spec
        parts = [columns[name].texts for name in spec.text_columns]
        labels = columns[spec.label].texts
        units = None if spec.unit is None else columns[spec.unit].texts
        framed: list[str] = []
        for i in rows:
            text = _SEPARATOR.join(part for column in parts if (part := column[i].strip(BLANK)))
            index = self._label(labels[i])
            if index is None or self.labels is None:  # it was checked before
                continue
            label = self.labels[index]
            key = None if units is None else plain_name(units[i])
            unit = len(self._texts) if key is None else self._unit_numbers.setdefault(key, len(self._unit_numbers))
            self._texts.append(text)
            self._labels.append(index)
            self._units.append(unit)
            framed.append(f"{len(text)}:{text}{len(label)}:{label}{unit};")
        self.digest.update("".join(framed).encode())

    def _too_many(self, where: Quarantine | Path | None) -> str:
        path = where.path if isinstance(where, Quarantine) else where
        allowed = f"most_rejected_fraction = {self.spec.most_rejected_fraction:g}"
        return f"{self.source}: {self.rejected} of {self.rows} rows fail, {allowed} (first: {self._first}); see {path}"


def _vector(values: array[int]) -> npt.NDArray[np.int64]:
    return np.array(values, dtype=np.int64)
