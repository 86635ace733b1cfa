"""Named tensors as one flat vector: the only form in which weights and updates travel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt

from accord_shared.canonical import canonical_hash
from accord_shared.errors import NonFinite, ProtocolError

Vector = npt.NDArray[np.float32]
Array = npt.NDArray[np.float32] | npt.NDArray[np.float64]


@dataclass(frozen=True)
class Layout:
    """Names and shapes in their order in the vector."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of elements of each tensor."""
        return tuple(prod(shape) for shape in self.shapes)

    @property
    def dimension(self) -> int:
        """Length of the flat vector."""
        return sum(self.sizes)

    @property
    def digest(self) -> str:
        """SHA-256 over names and shapes: equal layouts agree on every coordinate."""
        return canonical_hash([[name, list(shape)] for name, shape in zip(self.names, self.shapes, strict=True)])

    def split(self, vector: Vector) -> dict[str, Vector]:
        """Views of `vector` [dimension] by name, each in its own shape.

        Raises:
            ProtocolError: the length is another.
        """
        check_length(vector, self.dimension)
        ends = np.cumsum(self.sizes)
        parts = np.split(vector, ends[:-1])
        return {name: part.reshape(shape) for name, part, shape in zip(self.names, parts, self.shapes, strict=True)}

    def join(self, tensors: Mapping[str, Array]) -> Vector:
        """One float32 vector [dimension] of the tensors in layout order.

        Raises:
            ProtocolError: a name is missing or a shape is another.
        """
        for name, shape in zip(self.names, self.shapes, strict=True):
            if name not in tensors or tuple(tensors[name].shape) != shape:
                raise ProtocolError(f"tensor {name} is missing or not of shape {shape}")
        return np.concatenate([tensors[name].reshape(-1) for name in self.names]).astype(np.float32)


def check_length(vector: Array, dimension: int) -> None:
    """Raise `ProtocolError` unless `vector` is one-dimensional of length `dimension`."""
    if vector.shape != (dimension,):
        raise ProtocolError(f"a vector of shape {vector.shape} came where {dimension} numbers were due")


def check_finite(vector: Array, what: str) -> None:
    """Raise `NonFinite` if `vector` holds NaN or infinity; `what` names it in the message."""
    if not np.isfinite(vector).all():
        raise NonFinite(f"{what} holds NaN or infinity")
