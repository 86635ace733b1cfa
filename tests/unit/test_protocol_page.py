"""The tables of PROTOCOL.md say what the code has: labels, keys of a plan, fields of messages, refusals."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

from accord_shared import wire
from accord_shared.canonical import decimal_string
from accord_shared.errors import REFUSALS, REFUSALS_IN_WORDS
from accord_shared.plan import Plan

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "shared" / "PROTOCOL.md").read_text(encoding="utf-8")
TYPES = {
    "int": "integer",
    "str": "text",
    "bytes": "bytes",
    "tuple[int, ...]": "list of integers",
    "tuple[str, ...]": "list of texts",
    "tuple[bytes, ...]": "list of bytes",
    "Octets": "octets",
}


def section(number: int) -> str:
    """From the heading of this number to the next."""
    found = re.search(rf"^##+ {number}\. .*?(?=^##+ \d|\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found.group()


def rows(text: str) -> list[list[str]]:
    """Cells of all rows of its tables."""
    lines = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("|---")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_every_label_of_the_code_is_on_the_page_and_no_other() -> None:
    code = [path for part in ("shared", "client", "server") for path in (ROOT / part).rglob("*.py")]
    used = {label for path in code for label in re.findall(r'"accord/1/([a-z/]+)"', path.read_text(encoding="utf-8"))}
    table = section(2).split("| label |")[1].split("\n\n")[0]
    assert used == set(re.findall(r"`([a-z/]+)`", "\n".join(row[0] for row in rows(table))))


def kind_of(annotation: Any) -> str:
    """How the page names a type of the plan's."""
    options = [option for option in get_args(annotation) if option is not type(None)]
    if get_origin(annotation) is Literal:
        return "integer" if options == [1] else "text"
    if annotation in (int, float, str, bool):
        return {int: "integer", float: "decimal", str: "text", bool: "boolean"}[annotation]
    if get_origin(annotation) is tuple:
        return "list of texts"
    return kind_of(options[0])


def test_the_table_of_a_plan_s_keys() -> None:
    told: dict[tuple[str, str], tuple[str, str]] = {}
    table = ""
    for name, key, kind, default, _ in rows(section(3).split("| table |")[1].split("\n\n")[0]):
        table = name.strip("`") or table
        told[(table if key != "`version`" else "", key.strip("`"))] = (kind, default.split(";")[0].replace("`", ""))
    plain = {decimal_string(value): value for value in (0.0, 1.0, 0.9, 0.99, 0.001, 1e-05)}
    found = {("", "version"): ("integer", "1")}
    for name, field in Plan.model_fields.items():
        for key, inner in getattr(field.annotation, "model_fields", {}).items():
            value = None if inner.is_required() else inner.default
            shown = "–" if inner.is_required() else "null" if value is None else str(value)
            if isinstance(value, float):
                shown = decimal_string(value)
                assert shown in plain
            if isinstance(value, tuple):
                shown = ", ".join(value)
            found[name, key] = (kind_of(inner.annotation), shown)
    found["cohort", "minimum"] = ("integer", "see below")
    assert told == found


@pytest.mark.parametrize("kind", list(wire._KINDS))
def test_the_table_of_messages(kind: str) -> None:
    """Names, order, types, and limits where they are not the usual ones."""
    (row,) = [row for row in rows(section(12)) if re.match(rf"`{kind}`( \(|$)", row[0]) and "`" in row[1]]
    told = re.findall(r"`([a-z_]+)` (integer|text|bytes|octets|float32|list of [a-z]+)(?: \(([0-9,]+( MiB)?))?", row[1])
    assert [name for name, *_ in told] == [field.name for field in fields(wire._KINDS[kind])]
    for (name, shown, limit, _), field in zip(told, fields(wire._KINDS[kind]), strict=True):
        assert shown == TYPES.get(str(field.type), "float32")
        number = int(limit.removesuffix(" MiB").replace(",", "")) if limit else wire._LONGEST_OTHER
        if "int" not in str(field.type) and str(field.type) not in wire._ARRAYS:
            assert number * (1 << 20 if "MiB" in limit else 1) == wire._LONGEST.get(name, wire._LONGEST_OTHER), name


def test_refusals_in_words() -> None:
    told = section(12).split("With a reason in words:")[1].split(";")[0]
    words = {name for name, kind in REFUSALS.items() if issubclass(kind, REFUSALS_IN_WORDS)}
    assert set(re.findall(r"`(\w+)`", told)) == words
