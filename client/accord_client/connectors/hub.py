"""Data sets that the `datasets` library reads: a hub's at one commit, or a local folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accord_client.connectors.csv_file import check_folder
from accord_client.connectors.source import BATCH_ROWS, Batch, Source, one_line, require_columns
from accord_client.connectors.spec import HubData
from accord_shared.errors import DataError, MissingExtra


@contextmanager
def open_hub(spec: HubData, folder: Path) -> Iterator[Source]:
    """Opens one split. The first record is row 1.

    A local folder is streamed, so that the library keeps no copy of it; a hub's data set is cached as the library does.

    Raises:
        DataError: the hub or the library refuses, a column is missing, a CSV file breaks the rule of `csv_rows`; also
            while it is read.
        MissingExtra: the `datasets` library is not installed.
    """
    try:
        import datasets  # optional, so loaded where it is used
    except ImportError:
        raise MissingExtra('hub data needs datasets: pip install "accord-federated[simulation]"') from None
    name = f"{spec.source} [{spec.split}]"
    kind, _, place = spec.source.partition(":")
    local = kind == "path"
    if local and not (folder / place).is_dir():
        raise DataError(f"{folder / place}: no such folder")
    if local:
        check_folder(folder / place, spec.label)
    where, revision = (str(folder / place), None) if local else (place.partition("@")[0], place.partition("@")[2])
    try:
        split = datasets.load_dataset(where, spec.config, split=spec.split, revision=revision, streaming=local)
        features = _features(split)
        require_columns(name, list(features), spec.columns)
    except DataError:
        raise
    except Exception as error:  # the library lets errors of many kinds through: one line for the operator
        raise DataError(f"{name}: cannot be loaded: {one_line(error)}") from None
    types = {column: str(getattr(kind, "dtype", kind)) for column, kind in features.items()}
    yield Source(name, types, _batches(split, features, spec, name))


def _features(split: Any) -> dict[str, Any]:
    """Columns and their kinds; a stream of text files knows them after a look at its first records."""
    features: dict[str, Any] = split.features or split._resolve_features().features
    return features


def _batches(split: Any, features: dict[str, Any], spec: HubData, name: str) -> Iterator[Batch]:
    first = 1
    batches = split.iter(batch_size=BATCH_ROWS)
    while True:
        try:
            batch = next(batches, None)
        except Exception as error:  # as above
            raise DataError(f"{name}, after row {first - 1}: cannot be read: {one_line(error)}") from None
        if batch is None:
            return
        cells = [_named(batch[column], features[column]) for column in spec.columns]
        yield Batch(range(first, first + len(cells[0])), cells)
        first += len(cells[0])


def _named(cells: list[Any], feature: Any) -> list[Any]:
    """The names of a `ClassLabel`'s numbers; -1 stands for none."""
    to_name: Callable[[int], str] | None = getattr(feature, "int2str", None)
    if to_name is None:
        return cells
    return [None if cell is None or cell < 0 else to_name(cell) for cell in cells]
