"""What a connector hands over: batches of cells with the numbers of their rows."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from accord_shared.errors import DataError

BATCH_ROWS = 2048
SWALLOWED = "a cell of several lines holds what looks like whole rows with their labels: is a quote out of place?"
_AROUND = "\ufeff" + "".join(character for character in map(chr, range(0x3001)) if character.isspace())


class Bad(NamedTuple):
    """Lines of a source that have no cells: number of the first, reason, how it looks, how many they are."""

    number: int
    problem: str
    look: bytes
    lines: int


class Span(NamedTuple):
    """A row that takes several lines, and the labels that rows swallowed by one of its cells would have."""

    lines: int
    hidden: frozenset[str]


@dataclass(frozen=True)
class Batch:
    """Rows as they come: `numbers` [n], and `cells`, a sequence of [n] for every column that is read.

    `malformed` and `empty_lines` are what else is there; `spans` tells by index of rows of several lines.
    """

    numbers: Sequence[int]
    cells: Sequence[Sequence[Any]]
    malformed: Sequence[Bad] = ()
    empty_lines: int = 0
    spans: Mapping[int, Span] = field(default_factory=dict)


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


def plain_name(cell: str) -> str:
    """An id or a label as it counts, in every source: Unicode's form NFC, without white space around it."""
    return cell if cell.isascii() and cell == cell.strip() else unicodedata.normalize("NFC", cell).strip(_AROUND)


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
