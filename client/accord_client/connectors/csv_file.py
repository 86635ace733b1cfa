"""CSV files, streamed by pyarrow: a row that is not well formed is reported, none is skipped in silence."""

from __future__ import annotations

import csv
import gzip
import io
import secrets
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

from accord_client.connectors.source import Batch, Source, one_line, require_columns
from accord_client.connectors.spec import CsvData
from accord_shared.errors import DataError, MissingExtra

_BOM = b"\xef\xbb\xbf"
_HEADER_BYTES = 2**20
_BLOCK_BYTES = 2**22
_MOST_SHOWN = 200
_BYTES = "latin-1"
"""What pyarrow takes the file for: one byte, one character. So one bad byte is one bad row, not the end of the file."""
_DELIMITERS = ",;\t|"


@contextmanager
def open_csv(spec: CsvData, folder: Path) -> Iterator[Source]:
    """Opens a CSV file. The header is row 1; every further line of cells, also a blank one, is a row.

    Raises:
        DataError: it is missing, empty, not CSV of the declared delimiter or not UTF-8, lacks a column or has it
            twice, ends within quotes, or has a row that is longer than the reader's block; also while it is read.
        MissingExtra: pyarrow is not installed.
    """
    path = folder / spec.path
    with _reading(path), _opened(path) as file:
        header = _header(path, file, spec.delimiter)
        hint = _other_delimiter(path, spec) if spec.label not in header else ""
        require_columns(str(path), header, spec.columns, hint)
    with _reading(path), _opened(path) as file:
        yield Source(str(path), dict.fromkeys(header, "text"), _batches(spec, path, file, len(header)))


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        if isinstance(error, FileNotFoundError):
            raise DataError(f"{path}: no such file") from None
        reason = (error.strerror if isinstance(error, OSError) else None) or one_line(error)
        raise DataError(f"{path}: cannot be read: {reason}") from None


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    with path.open("rb") as file:
        if path.suffix.lower() != ".gz":
            yield file
            return
        with gzip.GzipFile(fileobj=file) as unpacked:
            yield unpacked  # type: ignore[misc]  # it reads like a file


def _header(path: Path, file: BinaryIO, delimiter: str) -> list[str]:
    head = file.read(_HEADER_BYTES)
    if not head.removeprefix(_BOM).strip():
        raise DataError(f"{path}: the file is empty")
    lines = io.StringIO(head.decode("utf-8-sig", "surrogateescape"), newline="")
    try:
        header = next(csv.reader(lines, delimiter=delimiter))
        "".join(header).encode()
    except csv.Error as error:
        raise DataError(f"{path}, row 1: malformed csv ({one_line(error)})") from None
    except UnicodeEncodeError:
        raise DataError(f"{path}, row 1: not UTF-8 text") from None
    return header


def _other_delimiter(path: Path, spec: CsvData) -> str:
    """A delimiter by which the header would have the label's column, for the message."""
    for delimiter in _DELIMITERS:
        with _opened(path) as file:
            if spec.label in _header(path, file, delimiter):
                return f" (delimiter = {delimiter!r} would fit)"
    return ""


class _Ended(io.RawIOBase):
    """A file with one more row, of one secret word: if it does not come out as a row, the file ended in quotes."""

    def __init__(self, file: BinaryIO, columns: int, delimiter: str) -> None:
        self.word = secrets.token_hex(16)
        self._file = file
        self._last = delimiter.join([self.word] * columns).encode() + b"\n"
        self._newline = True
        if file.read(len(_BOM)) != _BOM:
            file.seek(0)

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1, /) -> bytes:
        data = self._file.read(-1 if size is None else size)
        if data:
            self._newline = data.endswith((b"\n", b"\r"))
            return data
        rest, self._last = self._last, b""
        return rest if self._newline or not rest else b"\n" + rest


class _Malformed:
    """Rows whose width is not the header's, as pyarrow reports them; it parses ahead of what it hands over."""

    def __init__(self) -> None:
        self._rows: dict[int, tuple[str, bytes]] = {}

    def __call__(self, row: Any) -> str:
        reason = f"{row.actual_columns} columns where the header has {row.expected_columns}"
        self._rows[row.number] = (reason, row.text[:_MOST_SHOWN].encode(_BYTES))
        return "skip"

    def take(self, number: int) -> tuple[int, str, bytes] | None:
        found = self._rows.pop(number, None)
        return None if found is None else (number, *found)


def _batches(spec: CsvData, path: Path, file: BinaryIO, columns: int) -> Iterator[Batch]:
    pa, pc = _pyarrow()
    ended, malformed = _Ended(file, columns, spec.delimiter), _Malformed()
    block = max(_BLOCK_BYTES, 4 * spec.most_characters)
    names = [name.encode().decode(_BYTES) for name in spec.columns]
    numbers = count(2)
    held: Batch | None = None
    try:
        reader = pc.open_csv(
            ended,
            read_options=pc.ReadOptions(use_threads=False, block_size=block, encoding=_BYTES),
            parse_options=pc.ParseOptions(
                delimiter=spec.delimiter,
                newlines_in_values=True,
                ignore_empty_lines=False,
                invalid_row_handler=malformed,
            ),
            convert_options=pc.ConvertOptions(
                column_types=dict.fromkeys(names, pa.large_string()),
                include_columns=names,
            ),
        )
        for batch in reader:
            if held is not None:
                yield held
            held = _numbered([_cells(column) for column in batch.columns], batch.num_rows, numbers, malformed)
    except pa.ArrowException as error:
        if "straddling" in str(error):
            problem = f"a row is longer than a block of {block} bytes: is a quote not closed?"
            raise DataError(f"{path}, after row {next(numbers) - 1}: {problem}") from None
        raise DataError(f"{path}: malformed csv ({one_line(error)})") from None
    yield _without_end(path, held, ended.word)


def _cells(column: Any) -> list[str | bytes]:
    """Cells as they are in the file: ASCII, or bytes that are yet to be decoded."""
    return [cell if cell.isascii() else cell.encode(_BYTES) for cell in column.to_pylist()]


def _numbered(cells: list[list[Any]], rows: int, numbers: count[int], malformed: _Malformed) -> Batch:
    given: list[int] = []
    bad: list[tuple[int, str, bytes]] = []
    while len(given) < rows:
        number = next(numbers)
        report = malformed.take(number)
        if report is None:
            given.append(number)
        else:
            bad.append(report)
    return Batch(given, cells, bad)


def _without_end(path: Path, last: Batch | None, word: str) -> Batch:
    if last is None or not last.numbers or any(column[-1] != word for column in last.cells):
        raise DataError(f"{path}: ends within quotes: one is not closed")
    return Batch(last.numbers[:-1], [column[:-1] for column in last.cells], last.malformed)


def _pyarrow() -> Sequence[Any]:
    try:
        import pyarrow as pa  # optional, so loaded where it is used
        import pyarrow.csv as pc
    except ImportError:
        raise MissingExtra('files need pyarrow: pip install "accord-federated[client]"') from None
    return pa, pc
