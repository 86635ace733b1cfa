"""Synthetic populations with a known noise ceiling, for demonstrations without real data."""

from __future__ import annotations

from dataclasses import dataclass

from accord_client.examples import Examples, RowCounts


@dataclass(frozen=True)
class Generated:
    """A whole data set before it is shared out.

    `ceiling` is the accuracy on `test` that no rule on the text can exceed in expectation (None: not
    known); `source` says in a few words where the records come from.
    """

    labels: tuple[str, ...]
    label_texts: tuple[str, ...]
    train: Examples
    test: Examples
    ceiling: float | None
    source: str
    counts: tuple[RowCounts, ...] = ()
    """What became of the rows of every file that was read."""
