"""Fixed shapes: what is computed for a record depends on that record alone, to the bit.

A kernel orders its additions by the shape of its input. A row that meets other rows in another batch, or that is padded
to another row's length, gets another last digit; in bf16 that digit is a per cent, it is alike for all rows of a batch,
and adding one unit would move the gradients of all others. So

- a row's width is its own: its tokens, rounded up to a few widths (`widths`);
- batches have one of a few numbers of rows, the rest being dummies;
- models leave out the mask of a batch without padding: rows that fill their width are never with others;
- kernels may still treat places differently. `RowCounts` tries them, with made-up rows at every place, and allows the
  numbers of rows whose results agree to the bit; where none do, rows run one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Indices = npt.NDArray[np.int64]

DUMMY = -1
"""Stands for a row that fills a batch; it has no weight."""
PROBES = (-2, -3)
"""Stand for two made-up rows by which kernels are tried."""

_STEPS_AN_OCTAVE = 4
_LEAST_STEP = 4


@dataclass(frozen=True)
class Shape:
    """What decides which kernels run for a unit: a property of the unit alone."""

    width: int = 0
    """Tokens that rows are padded to; 0 where rows are features."""
    full: bool = False
    """No row has padding."""
    several: bool = False
    """Units of several rows, whose gradients are added up before they are clipped."""

    @staticmethod
    def of(code: int) -> Shape:
        """The shape of a code."""
        return Shape(width=code // 4, full=bool(code & 2), several=bool(code & 1))


def codes(width: Indices, full: npt.NDArray[np.bool_], several: npt.NDArray[np.bool_] | bool = False) -> Indices:
    """Shapes [n] as integers."""
    code: Indices = width * 4 + full * 2 + np.asarray(several, dtype=np.int64)
    return code


def widths(lengths: Indices, most: int) -> Indices:
    """Widths [n] of rows of `lengths` [n] tokens: four to an octave, but 4 tokens apart at least; at most `most`."""
    octave = np.floor(np.log2(np.maximum(lengths, 1))).astype(np.int64)
    step = np.maximum((1 << octave) // _STEPS_AN_OCTAVE, _LEAST_STEP)
    width: Indices = np.maximum(lengths, np.minimum(-(-lengths // step) * step, most))
    return width


def batches(rows: Indices, counts: Sequence[int]) -> Iterator[Indices]:
    """`rows` in batches whose sizes are of `counts` (descending), filled up with dummies."""
    start = 0
    while start < len(rows):
        part = rows[start : start + counts[0]]
        size = min(count for count in counts if count >= len(part))
        yield np.pad(part, (0, size - len(part)), constant_values=DUMMY)
        start += len(part)


def row_batches(
    lengths: Indices | None, count: int, most: int, counts_of: Callable[[Shape], Sequence[int]]
) -> Iterator[tuple[Shape, Indices]]:
    """Batches of all `count` rows, one shape at a time."""
    own = np.zeros(count, dtype=np.int64) if lengths is None else widths(lengths, most)
    code = codes(own, own == (own if lengths is None else lengths))
    for one in np.unique(code).tolist():
        shape = Shape.of(one)
        yield from ((shape, part) for part in batches(np.flatnonzero(code == one), counts_of(shape)))


Run = Callable[[Indices], Sequence[Tensor]]
"""From rows (`PROBES` and `DUMMY`) to what is computed of them: tensors whose first dimension is the row."""


def agreeing(run: Run, most: int) -> tuple[int, ...]:
    """The numbers of rows, descending, at which `run` computes the same of a row, wherever and beside what it is.

    `most` and its halves are tried. Where places of `most` differ, rows are left to run one by one.
    """
    if most == 1:
        return (1,)
    even = np.arange(most) % 2 == 0
    first = np.where(even, *PROBES)
    seen = run(first)
    known = {probe: [tensor[place].clone() for tensor in seen] for place, probe in enumerate(PROBES)}
    swapped = np.where(even, np.where(np.arange(most) % 4 == 0, DUMMY, PROBES[1]), PROBES[0])
    if not (_agree(first, seen, known) and _agree(swapped, run(swapped), known)):
        return (1,)
    halves = [most >> shift for shift in range(1, most.bit_length())]
    return (most, *(count for count in halves if _agree(first[:count], run(first[:count]), known)))


def _agree(rows: Indices, seen: Sequence[Tensor], known: dict[int, list[Tensor]]) -> bool:
    for probe in PROBES:
        places = torch.from_numpy(np.flatnonzero(rows == probe))
        for tensor, expected in zip(seen, known[probe], strict=True):
            if not bool((tensor[places.to(tensor.device)] == expected).all()):
                return False
    return True


@dataclass
class RowCounts:
    """The numbers of rows that agree, by what runs and on which shape: tried once for a model in a process."""

    _known: dict[tuple[object, ...], tuple[int, ...]] = field(default_factory=dict)

    def of(self, kind: tuple[object, ...], shape: Shape, most: int, run: Run) -> tuple[int, ...]:
        """The counts for `shape`, up to `most` rows, of what `kind` names."""
        key = (*kind, shape, most, torch.get_num_threads())
        if key not in self._known:
            self._known[key] = agreeing(run, most)
        return self._known[key]


_COUNTS: WeakKeyDictionary[object, RowCounts] = WeakKeyDictionary()


def row_counts(model: object) -> RowCounts:
    """What is known of `model`'s kernels in this process."""
    return _COUNTS.setdefault(model, RowCounts())
