"""What commands print: one JSON object, or lines for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]


def show(facts: dict[str, Any], lines: Sequence[str], as_json: bool) -> None:
    """Print the facts as one JSON object, or as lines."""
    typer.echo(json.dumps(facts) if as_json else "\n".join(lines))


def fields(facts: dict[str, Any]) -> list[str]:
    """Lines of names and values; what is empty is left out."""
    given = {key: value for key, value in facts.items() if value not in (None, "", [], {})}
    return [f"{key.replace('_', ' '):20} {_word(value)}" for key, value in given.items()]


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "; ".join(map(str, value)) if isinstance(value, list) else str(value)


def moment(microseconds: int) -> str | None:
    """Microseconds since the epoch as RFC 3339; None for 0, which is never."""
    if not microseconds:
        return None
    return datetime.fromtimestamp(microseconds / 1e6, UTC).isoformat(timespec="seconds")


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
