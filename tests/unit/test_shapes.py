"""Fixed shapes: widths are a row's own, dummies fill batches, kernels that treat places differently are told."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from accord_client.shapes import DUMMY, PROBES, Indices, RowCounts, Shape, agreeing, batches, row_batches, widths


def test_a_width_is_the_row_s_own_and_little_more() -> None:
    lengths = np.arange(1, 513)
    width = widths(lengths, 512)
    assert (width >= lengths).all()
    assert (width - lengths <= np.maximum(3, lengths / 4)).all()
    assert len(np.unique(width)) <= 28
    assert (widths(lengths[:100], 100) <= 100).all()
    assert widths(np.array([77]), 512) == width[76]


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 16, 21])
def test_batches_hold_every_row_once_in_allowed_sizes(count: int) -> None:
    rows = np.arange(count)
    parts = list(batches(rows, (8, 4, 1)))
    assert {len(part) for part in parts} <= {8, 4, 1}
    together = np.concatenate([*parts, np.zeros(0, dtype=np.int64)])
    np.testing.assert_array_equal(together[together != DUMMY], rows)


def test_full_rows_are_never_with_padded_ones() -> None:
    lengths = np.array([8, 7, 8, 3, 8, 5])
    shapes = dict(row_batches(lengths, 6, 16, lambda _: (4,)))
    assert set(shapes[Shape(8, full=True)]) == {0, 2, 4, DUMMY}
    assert set(shapes[Shape(8)]) == {1, 5, DUMMY}
    assert set(shapes[Shape(4)]) == {3, DUMMY}


def values(rows: Indices) -> torch.Tensor:
    return torch.from_numpy(rows).double()[:, None] * torch.arange(1.0, 4.0)


def test_row_counts_that_agree_are_found() -> None:
    assert agreeing(lambda rows: [values(rows)], 8) == (8, 4, 2, 1)
    assert agreeing(lambda rows: [values(rows)], 1) == (1,)
    assert agreeing(lambda rows: [values(rows), values(rows) + (len(rows) < 4) * 1e-9], 8) == (8, 4)


@pytest.mark.parametrize(
    "leak",
    [
        lambda rows: np.arange(len(rows)) == len(rows) - 1,  # the last place
        lambda rows: np.arange(len(rows)) == 0,
        lambda rows: np.full(len(rows), (rows == DUMMY).any()),  # is anything missing?
        lambda rows: np.roll(rows, 1) == PROBES[1],  # the row before
    ],
)
def test_where_places_differ_rows_run_one_by_one(leak: object) -> None:
    def run(rows: Indices) -> list[torch.Tensor]:
        out = values(rows)
        out[torch.from_numpy(np.asarray(leak(rows))), 2] *= 1 + 1e-15  # type: ignore[operator]
        return [out]

    assert agreeing(run, 8) == (1,)


def test_kernels_are_tried_once_for_a_shape() -> None:
    calls: list[int] = []

    def run(rows: Indices) -> list[torch.Tensor]:
        calls.append(len(rows))
        return [values(rows)]

    counts = RowCounts()
    for _ in range(3):
        assert counts.of(("gradients", "cpu", "fp32"), Shape(8), 2, run) == (2, 1)
    assert calls == [2, 2, 1]
    counts.of(("gradients", "cpu", "bf16"), Shape(8), 2, run)
    assert len(calls) == 6
