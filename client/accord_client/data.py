"""Records at a site: what a data set is to the trainer, and how files become one."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Examples:
    """Labelled texts with their unit of privacy.

    `labels` [n] int64 indexes the plan's labels; `units` [n] int64 numbers the privacy units
    0..n_units-1 in order of first appearance (a row, or a customer whose rows are clipped together).
    """

    texts: tuple[str, ...]
    labels: npt.NDArray[np.int64]
    units: npt.NDArray[np.int64]
    columns: dict[str, npt.NDArray[np.str_]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.texts)
