"""Parquet files, streamed batch by batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accord_client.connectors.source import BATCH_ROWS, Batch, Source, one_line, require_columns
from accord_client.connectors.spec import ParquetData
from accord_shared.errors import DataError, MissingExtra


@contextmanager
def open_parquet(spec: ParquetData, folder: Path) -> Iterator[Source]:
    """Opens a Parquet file. The first record is row 1.

    Raises:
        DataError: it is missing or not Parquet, lacks a column or has it twice, has more rows than `most_rows`; also
            while it is read.
        MissingExtra: pyarrow is not installed.
    """
    try:
        import pyarrow as pa  # optional, so loaded where it is used
        import pyarrow.parquet as pq
    except ImportError:
        raise MissingExtra('files need pyarrow: pip install "accord-federated[client]"') from None
    path = folder / spec.path
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            require_columns(str(path), schema.names, spec.columns)
            if file.metadata.num_rows > spec.most_rows:
                raise DataError(f"{path}: {file.metadata.num_rows} rows, more than most_rows = {spec.most_rows}")
            types = {field.name: str(field.type) for field in schema}
            yield Source(str(path), types, _batches(file, spec, pa))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file: {one_line(error)}") from None


def _batches(file: Any, spec: ParquetData, pa: Any) -> Iterator[Batch]:
    first = 1
    for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=list(spec.columns), use_threads=False):
        cells = [_cells(batch.column(name), pa) for name in spec.columns]
        yield Batch(range(first, first + batch.num_rows), cells)
        first += batch.num_rows


def _cells(column: Any, pa: Any) -> list[Any]:
    """Strings as bytes: one that is not UTF-8 is one bad row, not the end of the file."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string(column.type):
        column = column.view(pa.binary())
    elif pa.types.is_large_string(column.type):
        column = column.view(pa.large_binary())
    cells: list[Any] = column.to_pylist()
    return cells
