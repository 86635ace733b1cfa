"""The only codec between typed messages and Flower's `RecordDict`.

Scalars and lists travel in one `ConfigRecord`; so do the bytes of vectors (little-endian float32 or, long byte
strings, uint8) up to `INLINE` together, since Flower makes calls of its own for each object in each direction. Longer
ones travel in one `ArrayRecord`, which Flower cuts into chunks. Unknown, missing or mistyped fields are refused: a
peer can put nothing else on the wire.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from accord_shared.errors import ProtocolError
from accord_shared.messages import Message

_FIELDS, _VECTORS = "accord.fields", "accord.vectors"
_KINDS: dict[str, type[Message]] = {kind.__name__: kind for kind in get_args(Message)}
_SCALARS: dict[str, type] = {"int": int, "str": str, "bytes": bytes}
_LISTS: dict[str, type] = {"tuple[int, ...]": int, "tuple[str, ...]": str, "tuple[bytes, ...]": bytes}
_ARRAYS = {"Vector": ("float32", "<f4", "accord.float32"), "Octets": ("uint8", "u1", "accord.uint8")}
_KIND = "message"  # no message has a field of this name
_KEYS = dict.fromkeys(("credential", "credentials", "introductions", "choices"), 1 << 15)  # bit maps over a roster
_BUNDLES = dict.fromkeys(("bundle", "bundles", "next_bundle"), 256)
_LONGEST = {
    "plan_json": 4 << 20,
    "reason": 300,
    "plan_signature": 1 << 14,
    "receipt": 1 << 16,
    "sealed": 1 << 20,
    "shares": 1 << 20,
    **_KEYS,
    **_BUNDLES,
}
INLINE = 4 << 20
"""Most bytes of a message's vectors that travel beside its scalars."""
_LONGEST_OTHER, _LONGEST_LIST, _LARGEST = 128, 100_000, 2**53


def _array(values: npt.NDArray[Any], kind: str) -> Array:
    name, form, stype = _ARRAYS[kind]
    data = np.ascontiguousarray(values, dtype=form)
    return Array(dtype=name, shape=data.shape, stype=stype, data=data.tobytes())


def _values(array: object, kind: str) -> npt.NDArray[Any]:
    name, form, stype = _ARRAYS[kind]
    if isinstance(array, bytes):
        if len(array) > INLINE or len(array) % np.dtype(form).itemsize:
            raise ProtocolError(f"{len(array)} bytes are no {name} [n] of a message's scalars")
        return np.frombuffer(array, dtype=form).astype(name, copy=False)
    if not isinstance(array, Array) or array.dtype != name or array.stype != stype or len(array.shape) != 1:
        raise ProtocolError(f"an array is not {name} [n]")
    if len(array.data) != np.dtype(form).itemsize * array.shape[0]:
        raise ProtocolError(f"array of shape {array.shape} has {len(array.data)} bytes")
    return np.frombuffer(array.data, dtype=form).astype(name, copy=False)


def encode(message: Message) -> RecordDict:
    """The Flower content of a message."""
    scalars: dict[str, Any] = {_KIND: type(message).__name__}
    arrays: dict[str, Array] = {}
    vectors = [value for field in fields(message) if isinstance(value := getattr(message, field.name), np.ndarray)]
    inline = sum(value.nbytes for value in vectors) <= INLINE
    for field in fields(message):
        value = getattr(message, field.name)
        if isinstance(value, np.ndarray):
            array = _array(value, str(field.type))
            if inline:
                scalars[field.name] = array.data
            else:
                arrays[field.name] = array
        else:
            scalars[field.name] = list(value) if isinstance(value, tuple) else value
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
    if (_VECTORS in content) != bool(arrays):
        raise ProtocolError("an empty record of vectors")
    for field in fields(kind):
        source: dict[str, Any] = arrays if str(field.type) in _ARRAYS and field.name in arrays else scalars
        if field.name not in source:
            raise ProtocolError(f"{kind.__name__}.{field.name} is missing")
        values[field.name] = _field(kind, field.name, str(field.type), source.pop(field.name))
    if scalars or arrays:
        raise ProtocolError(f"{kind.__name__} has unknown fields: {sorted([*scalars, *arrays])[:3]}")
    return kind(**values)


def _field(kind: type[Message], name: str, form: str, value: object) -> object:
    """The checked value of one field."""
    if form in _ARRAYS:
        return _values(value, form)
    if form in _LISTS:
        if not isinstance(value, list) or any(type(item) is not _LISTS[form] for item in value):
            raise ProtocolError(f"{kind.__name__}.{name} is not {form}")
        if len(value) > _LONGEST_LIST or not all(_within_bounds(name, item) for item in value):
            raise ProtocolError(f"{kind.__name__}.{name} is too large")
        return tuple(value)
    if type(value) is not _SCALARS[form]:
        raise ProtocolError(f"{kind.__name__}.{name} is not {form}")
    if not _within_bounds(name, value):
        raise ProtocolError(f"{kind.__name__}.{name} is too large")
    return value


def _within_bounds(name: str, value: object) -> bool:
    if isinstance(value, str | bytes):
        return len(value) <= _LONGEST.get(name, _LONGEST_OTHER)
    return isinstance(value, int) and 0 <= value <= _LARGEST


def payload_bytes(message: Message) -> int:
    """Bytes of a message's fields as they travel, without Flower's own envelope."""
    return sum(_size(getattr(message, field.name)) for field in fields(message))


def _size(value: object) -> int:
    if isinstance(value, np.ndarray):
        return value.nbytes
    if isinstance(value, tuple):
        return sum(map(_size, value))
    return len(value) if isinstance(value, bytes) else len(str(value).encode())
