"""CSV files: streamed, and read by the strict rule of `csv_rows`."""

from __future__ import annotations

import contextlib
import gzip
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from accord_client.connectors.csv_rows import CsvRows, Malformed, Unreadable, hidden_labels
from accord_client.connectors.source import (
    BATCH_ROWS,
    SWALLOWED,
    Bad,
    Batch,
    Source,
    Span,
    one_line,
    plain_name,
    require_columns,
)
from accord_client.connectors.spec import CsvData
from accord_shared.errors import DataError

_BATCH_BYTES = 2**22
_DELIMITERS = ",;\t|"
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")


@contextmanager
def open_csv(spec: CsvData, folder: Path) -> Iterator[Source]:
    """Opens a CSV file. The header is row 1; every further row, empty line, and line that is no row counts as one.

    Raises:
        DataError: it is missing, empty, not CSV of the declared delimiter or not UTF-8, lacks a column or has it
            twice, or has an endless line; also while it is read.
    """
    path = folder / spec.path
    with _reading(path), _opened(path) as file:
        if _blank(path):
            raise DataError(f"{path}: the file is empty")
        rows = CsvRows(file, spec.delimiter, spec.max_cell_lines)
        header = _header(path, rows.header)
        hint = _other_delimiter(path, spec) if spec.label not in header else ""
        require_columns(str(path), header, spec.columns, hint)
        yield Source(str(path), dict.fromkeys(header, "text"), _batches(rows, spec, header))


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except Unreadable as problem:
        raise DataError(f"{path}, {problem}") from None
    except (OSError, EOFError, zlib.error) as error:
        if isinstance(error, FileNotFoundError):
            raise DataError(f"{path}: no such file") from None
        reason = (error.strerror if isinstance(error, OSError) else None) or one_line(error)
        raise DataError(f"{path}: cannot be read: {reason}") from None


def _blank(path: Path) -> bool:
    """Whether a file begins with nothing but white space; its first block tells."""
    with _opened(path) as file:
        return not file.read(2**16).removeprefix(b"\xef\xbb\xbf").strip()


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    with path.open("rb") as file:
        if path.suffix.lower() != ".gz":
            yield file
            return
        with gzip.GzipFile(fileobj=file) as unpacked:
            yield unpacked  # type: ignore[misc]  # it reads like a file


def _header(path: Path, raw: Sequence[bytes]) -> list[str]:
    try:
        header = [cell.decode() for cell in raw]
    except UnicodeDecodeError:
        hint = " (it looks like UTF-16)" if raw[0].startswith(_UTF_16) else ""
        raise DataError(f"{path}, row 1: not UTF-8 text{hint}: save the file as UTF-8") from None
    if any("\0" in cell for cell in header):
        raise DataError(f"{path}, row 1: has a NUL character: is it UTF-16? Save the file as UTF-8")
    return header


def _other_delimiter(path: Path, spec: CsvData) -> str:
    """A delimiter by which the header would have the label's column, for the message."""
    for delimiter in _DELIMITERS:
        with _opened(path) as file, contextlib.suppress(Unreadable):
            if spec.label.encode() in CsvRows(file, delimiter, 1).header:
                return f" (delimiter = {delimiter!r} would fit)"
    return ""


def check_folder(folder: Path, label: str) -> None:
    """The CSV files in a folder break no rule: before another reader, which has rules of its own, reads them.

    Files without a column `label` are not looked at.

    Raises:
        DataError: one does; the line names the file and the row.
    """
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name.lower().endswith((".csv", ".csv.gz")):
            with _reading(path), _opened(path) as file:
                _check(path, CsvRows(file, ",", CsvData.model_fields["max_cell_lines"].default), label.encode())


def _check(path: Path, rows: CsvRows, label: bytes) -> None:
    if label not in rows.header:
        return
    at, number = rows.header.index(label), 1
    seen: set[str] = set()
    doubts: list[tuple[int, set[str]]] = []
    for row in rows:
        number += 1
        if isinstance(row, Malformed):
            raise DataError(f"{path}, row {number}: {row.problem}")
        if row is not None and row.lines == 1:
            seen.add(plain_name(_text(row.cells[at])))
        elif row is not None:
            doubts.append((number, {plain_name(_text(cell)) for cell in hidden_labels(row, at, ",")}))
    for doubtful, labels in doubts:
        if labels & seen:
            raise DataError(f"{path}, row {doubtful}: {SWALLOWED}")


def _batches(rows: CsvRows, spec: CsvData, header: list[str]) -> Iterator[Batch]:
    at = [header.index(column) for column in spec.columns]
    label = header.index(spec.label)
    batch, number = _Building(at), 1
    for row in rows:
        number += 1
        if row is None:
            batch.empty_lines += 1
        elif isinstance(row, Malformed):
            batch.malformed.append(Bad(number, row.problem, row.look, row.lines))
            number += row.lines - 1
        else:
            if row.lines > 1:
                hidden = frozenset(_text(cell) for cell in hidden_labels(row, label, spec.delimiter))
                batch.spans[len(batch.numbers)] = Span(row.lines, hidden)
            batch.numbers.append(number)
            batch.rows.append(row.cells)
        if len(batch.rows) >= BATCH_ROWS or rows.bytes >= _BATCH_BYTES or len(batch.malformed) >= BATCH_ROWS:
            yield batch.done()
            batch, rows.bytes = _Building(at), 0
    yield batch.done()


class _Building:
    """A batch while it grows."""

    def __init__(self, at: list[int]) -> None:
        self._at = at
        self.numbers: list[int] = []
        self.rows: list[list[bytes]] = []
        self.malformed: list[Bad] = []
        self.empty_lines = 0
        self.spans: dict[int, Span] = {}

    def done(self) -> Batch:
        """The columns that are read of the rows so far."""
        columns = list(zip(*self.rows, strict=True))
        cells = [_decoded(columns[i]) if columns else () for i in self._at]
        return Batch(self.numbers, cells, self.malformed, self.empty_lines, self.spans)


def _decoded(column: Sequence[bytes]) -> Sequence[str | bytes]:
    """Cells as text, or as they are where one is not UTF-8: that one fails when it is looked at."""
    try:
        return [cell.decode() for cell in column]
    except UnicodeDecodeError:
        return column


def _text(cell: bytes) -> str:
    return cell.decode("utf-8", "replace")
