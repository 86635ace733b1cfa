"""What a connector hands over: batches of cells with the numbers of their rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from accord_shared.errors import DataError

BATCH_ROWS = 2048


@dataclass(frozen=True)
class Batch:
    """Rows as they come: `numbers` [n], and `cells`, a sequence of [n] for every column that is read.

    `malformed` are rows that have no cells: number, reason, how they look.
    """

    numbers: Sequence[int]
    cells: Sequence[Sequence[Any]]
    malformed: Sequence[tuple[int, str, bytes]] = ()


@dataclass(frozen=True)
class Source:
    """An open data set: its name in messages, its columns' types in its own words, and all its batches, once."""

    name: str
    types: dict[str, str]
    batches: Iterator[Batch]


def require_columns(name: str, found: Sequence[str], wanted: Sequence[str], hint: str = "") -> None:
    """Every wanted column is there, once.

    Raises:
        DataError: one is missing or doubled.
    """
    for column in wanted:
        if column not in found:
            raise DataError(f"{name}: no column {short(column)}; it has {short_list(found)}{hint}")
        if found.count(column) > 1:
            raise DataError(f"{name}: column {short(column)} appears twice")


def one_line(error: BaseException) -> str:
    """An error's message in one line of at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def short(value: str, limit: int = 40) -> str:
    """A name, quoted and cut."""
    return repr(value if len(value) <= limit else value[: limit - 1] + "…")


def short_list(values: Sequence[str], limit: int = 8) -> str:
    """The first few names."""
    shown = ", ".join(short(value) for value in values[:limit])
    return shown + (f", … ({len(values)} in all)" if len(values) > limit else "")
