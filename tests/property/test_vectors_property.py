"""Layouts: named tensors to one vector and back, and nothing of another shape."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from accord_shared.errors import NonFinite, ProtocolError
from accord_shared.vectors import Layout, check_finite, check_length

shapes = st.lists(st.lists(st.integers(1, 5), max_size=3).map(tuple), min_size=1, max_size=6)


def layout_of(parts: list[tuple[int, ...]]) -> Layout:
    return Layout(tuple(f"tensor {index}" for index in range(len(parts))), tuple(parts))


@given(shapes, st.integers(0, 2**32))
def test_split_and_join_are_inverse(parts: list[tuple[int, ...]], seed: int) -> None:
    layout = layout_of(parts)
    vector = np.random.default_rng(seed).normal(size=layout.dimension).astype(np.float32)
    tensors = layout.split(vector)
    assert {name: tensor.shape for name, tensor in tensors.items()} == dict(zip(layout.names, parts, strict=True))
    assert layout.join(tensors).tobytes() == vector.tobytes()
    assert sum(layout.sizes) == layout.dimension


@given(shapes, st.integers(-3, 3).filter(bool))
def test_another_length_is_refused(parts: list[tuple[int, ...]], off: int) -> None:
    layout = layout_of(parts)
    wrong = np.zeros(max(0, layout.dimension + off), dtype=np.float32)
    for refuse in (lambda: layout.split(wrong), lambda: check_length(wrong, layout.dimension)):
        with pytest.raises(ProtocolError):
            refuse()
    with pytest.raises(ProtocolError):
        check_length(np.zeros((layout.dimension, 1), dtype=np.float32), layout.dimension)


@given(shapes)
def test_missing_and_misshapen_tensors_are_refused(parts: list[tuple[int, ...]]) -> None:
    layout = layout_of(parts)
    tensors = layout.split(np.zeros(layout.dimension, dtype=np.float32))
    first = layout.names[0]
    with pytest.raises(ProtocolError):
        layout.join({name: tensor for name, tensor in tensors.items() if name != first})
    with pytest.raises(ProtocolError):
        layout.join({**tensors, first: np.zeros((7, 7), dtype=np.float32)})


@given(shapes, shapes)
def test_digests_tell_layouts_apart(one: list[tuple[int, ...]], two: list[tuple[int, ...]]) -> None:
    assert (layout_of(one).digest == layout_of(two).digest) == (one == two)


@given(st.lists(st.floats(width=32), min_size=1))
def test_only_numbers_are_finite(values: list[float]) -> None:
    vector = np.array(values, dtype=np.float32)
    if np.isfinite(vector).all():
        check_finite(vector, "it")
    else:
        with pytest.raises(NonFinite, match="it holds"):
            check_finite(vector, "it")
