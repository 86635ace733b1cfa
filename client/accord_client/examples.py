"""Labelled records with their unit of privacy: what every connector ends in and training starts from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class RowCounts:
    """What became of a source's rows: `rows` = `accepted` + `left_out` + `empty_lines`.

    `left_out` are quarantined at a site, and in a simulation those that a scenario drops on purpose.
    """

    source: str
    accepted: int
    left_out: int = 0
    empty_lines: int = 0

    @property
    def rows(self) -> int:
        """All that came in."""
        return self.accepted + self.left_out + self.empty_lines

    def __str__(self) -> str:
        parts = f"{self.accepted:,} accepted, {self.left_out:,} left out, {self.empty_lines:,} empty lines"
        return f"{self.source}: {self.rows:,} rows in: {parts}"


@dataclass(frozen=True)
class Examples:
    """Labelled texts with their unit of privacy.

    `labels` [n] int64 indexes the plan's labels; `units` [n] int64 numbers the privacy units
    0..n_units-1 in order of first appearance (a row, or a customer whose rows are clipped together).
    `columns` holds further columns by name, [n] strings each; `counts` says what else their source held.
    """

    texts: tuple[str, ...]
    labels: npt.NDArray[np.int64]
    units: npt.NDArray[np.int64]
    columns: dict[str, npt.NDArray[np.str_]] = field(default_factory=dict)
    counts: RowCounts | None = None

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def n_units(self) -> int:
        """How many units of privacy the records belong to."""
        return int(self.units.max()) + 1 if len(self.units) else 0

    def label_counts(self, n_classes: int) -> npt.NDArray[np.int64]:
        """Records per class, [n_classes]."""
        return np.bincount(self.labels, minlength=n_classes).astype(np.int64)

    def take(self, indices: npt.ArrayLike) -> Examples:
        """The records at `indices` [m], in that order; units are numbered afresh from 0."""
        rows = np.asarray(indices, dtype=np.int64)
        return Examples(
            texts=tuple(self.texts[i] for i in rows.tolist()),
            labels=self.labels[rows],
            units=number_units(self.units[rows].tolist()),
            columns={name: values[rows] for name, values in self.columns.items()},
        )


def number_units(keys: Iterable[object]) -> npt.NDArray[np.int64]:
    """Numbers equal keys alike, 0, 1, … in order of first appearance: [n] int64."""
    seen: dict[object, int] = {}
    return np.array([seen.setdefault(key, len(seen)) for key in keys], dtype=np.int64)
