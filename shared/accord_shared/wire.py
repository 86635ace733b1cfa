"""The only codec between typed messages and Flower's `RecordDict`.

Scalars travel in one `ConfigRecord`, vectors in one `ArrayRecord` as raw little-endian float32.
Unknown, missing or mistyped fields are refused: a peer can put nothing else on the wire.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from accord_shared.errors import ProtocolError
from accord_shared.messages import Enquiry, Joined, Message, Refusal, TrainReply, TrainRequest
from accord_shared.vectors import Vector

_FIELDS, _VECTORS, _STYPE = "accord.fields", "accord.vectors", "accord.float32"
_KINDS: dict[str, type[Message]] = {
    kind.__name__: kind for kind in (Enquiry, Joined, TrainRequest, TrainReply, Refusal)
}
_SCALARS: dict[str, type] = {"int": int, "str": str}
_KIND = "message"  # no message has a field of this name
_LONGEST = {"plan_json": 4 << 20, "reason": 300}
_LONGEST_OTHER, _LARGEST = 128, 2**53


def _array(vector: Vector) -> Array:
    data = np.ascontiguousarray(vector, dtype="<f4")
    return Array(dtype="float32", shape=data.shape, stype=_STYPE, data=data.tobytes())


def _vector(array: Array) -> Vector:
    if array.dtype != "float32" or array.stype != _STYPE or len(array.shape) != 1:
        raise ProtocolError(f"array of {array.dtype} {array.shape} as {array.stype}: expected float32 [n]")
    if len(array.data) != 4 * array.shape[0]:
        raise ProtocolError(f"array of shape {array.shape} has {len(array.data)} bytes")
    return np.frombuffer(array.data, dtype="<f4").astype(np.float32, copy=False)


def encode(message: Message) -> RecordDict:
    """The Flower content of a message."""
    scalars: dict[str, Any] = {_KIND: type(message).__name__}
    arrays: dict[str, Array] = {}
    for field in fields(message):
        value = getattr(message, field.name)
        if isinstance(value, np.ndarray):
            arrays[field.name] = _array(value)
        else:
            scalars[field.name] = value
    content = RecordDict({_FIELDS: ConfigRecord(scalars)})
    if arrays:
        content[_VECTORS] = ArrayRecord(arrays)
    return content


def decode(content: RecordDict) -> Message:
    """The typed message in a Flower content.

    Raises:
        ProtocolError: unknown kind, or a field is missing, extra or of another type.
    """
    scalars = dict(content.config_records.get(_FIELDS, {}))
    arrays = dict(content.array_records.get(_VECTORS, {}))
    kind = _KINDS.get(str(scalars.pop(_KIND, "")))
    ours = len(content.config_records) + len(content.array_records)
    if kind is None or set(content) - {_FIELDS, _VECTORS} or ours != len(content):
        raise ProtocolError("not an Accord message")
    values: dict[str, Any] = {}
    for field in fields(kind):
        expected = _SCALARS.get(str(field.type))
        source: dict[str, Any] = arrays if expected is None else scalars
        if field.name not in source:
            raise ProtocolError(f"{kind.__name__}.{field.name} is missing")
        value = source.pop(field.name)
        values[field.name] = _vector(value) if expected is None else value
        if expected is not None and type(value) is not expected:
            raise ProtocolError(f"{kind.__name__}.{field.name} is not {expected.__name__}")
        if expected is not None and not _within_bounds(field.name, value):
            raise ProtocolError(f"{kind.__name__}.{field.name} is too large")
    if scalars or arrays or (_VECTORS in content) != any(isinstance(value, np.ndarray) for value in values.values()):
        raise ProtocolError(f"{kind.__name__} has unknown fields: {sorted([*scalars, *arrays])[:3]}")
    return kind(**values)


def _within_bounds(name: str, value: int | str) -> bool:
    if isinstance(value, str):
        return len(value) <= _LONGEST.get(name, _LONGEST_OTHER)
    return 0 <= value <= _LARGEST


def payload_bytes(message: Message) -> int:
    """Bytes of a message's fields as they travel, without Flower's own envelope."""
    total = 0
    for field in fields(message):
        value = getattr(message, field.name)
        total += value.nbytes if isinstance(value, np.ndarray) else len(str(value).encode())
    return total
