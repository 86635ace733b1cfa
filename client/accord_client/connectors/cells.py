"""From a source's cells to text, and whether they fit the declared rules.

What is wrong is said without the cell: a reason may be counted, shown and logged, records may not.
"""

from __future__ import annotations

import datetime
import decimal
import math
import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from accord_client.connectors.spec import ColumnRule, ColumnType

_INTEGER = re.compile(r"[+-]?[0-9]{1,40}")
_FLOAT = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_BOOLEANS = frozenset({"true", "false", "1", "0"})
BLANK = "\ufeff \t\r\n\v\f"
"""What texts are stripped of."""
_MOMENTS = (datetime.date, datetime.time)


class BadCell(Exception):
    """A cell that fails, in words that do not quote it. Never leaves this package."""


@dataclass(frozen=True)
class Checked:
    """A column's cells as text (empty where there is none) and what is wrong, by index."""

    texts: list[str]
    problems: dict[int, str]


def check_column(cells: Sequence[Any], rule: ColumnRule, most_characters: int) -> Checked:
    """Every cell [n] as text, or why it fails."""
    texts: list[str] = []
    problems: dict[int, str] = {}
    fits = _check_of(rule, most_characters)
    for i, cell in enumerate(cells):
        try:
            texts.append(fits(cell))
        except BadCell as problem:
            problems[i] = str(problem)
            texts.append("")
    return Checked(texts, problems)


def cell_text(cell: Any) -> str:
    """A cell in text: a null and NaN are empty, numbers and dates as Python and ISO 8601 write them.

    Raises:
        BadCell: it is not UTF-8, or no plain value.
    """
    if isinstance(cell, str):
        if not cell.isascii():
            _encodable(cell)
        return cell
    if isinstance(cell, bytes):
        try:
            return cell.decode()
        except UnicodeDecodeError:
            raise BadCell("not UTF-8 text") from None
    if cell is None or (isinstance(cell, float | decimal.Decimal) and math.isnan(cell)):
        return ""
    if isinstance(cell, _MOMENTS):  # a timestamp is a date, too
        return cell.isoformat()
    if isinstance(cell, float | int | decimal.Decimal | uuid.UUID):
        return str(cell)
    raise BadCell(f"not a plain value ({type(cell).__name__})")


def _encodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadCell("not UTF-8 text") from None


def _check_of(rule: ColumnRule, most_characters: int) -> Callable[[Any], str]:
    most = min(most_characters, rule.max_length or most_characters)
    typed = _TYPES[rule.type]
    allowed = None if rule.allowed is None else frozenset(rule.allowed)
    bounded = rule.min is not None or rule.max is not None

    def fits(cell: Any) -> str:
        text = cell_text(cell)
        if not text.strip().strip(BLANK):
            if rule.required:
                raise BadCell("empty")
            return ""
        if len(text) > most:
            raise BadCell(f"longer than {most} characters")
        if "\0" in text:
            raise BadCell("has a NUL character")
        if not typed(cell, text):
            raise BadCell(f"not of type {rule.type}")
        if bounded:
            _within(text, rule)
        if allowed is not None and text not in allowed:
            raise BadCell("not one of the allowed values")
        return text

    return fits


def _within(text: str, rule: ColumnRule) -> None:
    value = int(text) if rule.type == "integer" else float(text)
    if rule.min is not None and value < rule.min:
        raise BadCell(f"less than {rule.min}")
    if rule.max is not None and value > rule.max:
        raise BadCell(f"more than {rule.max}")


def _is_date(_: Any, text: str) -> bool:
    return _parses(datetime.date.fromisoformat, text)


def _is_timestamp(_: Any, text: str) -> bool:
    return _parses(datetime.datetime.fromisoformat, text)


def _parses(parse: Callable[[str], object], text: str) -> bool:
    try:
        parse(text)
    except ValueError:
        return False
    return True


def _is_float(_: Any, text: str) -> bool:
    return _FLOAT.fullmatch(text) is not None and math.isfinite(float(text))


_TYPES: dict[ColumnType, Callable[[Any, str], bool]] = {
    "any": lambda _, __: True,
    "string": lambda cell, _: isinstance(cell, str | bytes),
    "integer": lambda _, text: _INTEGER.fullmatch(text) is not None,
    "float": _is_float,
    "boolean": lambda _, text: text.lower() in _BOOLEANS,
    "date": _is_date,
    "timestamp": _is_timestamp,
}
