"""Framing: what is hashed, signed or derived from, as one unambiguous byte string (PROTOCOL.md, section 2).

`frame(label, p1, ..., pm)` is len(label), label, len(p1), p1, ..., len(pm), pm with lengths as `u64`, so two different
labels or lists of parts never have the same bytes. A part's *type* is not in the bytes: a label fixes the types of
its parts and is used for one purpose only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from accord_shared.errors import ProtocolError

Part = bytes | bytearray | memoryview | str | int | Sequence["Part"]
"""Bytes; a text (as UTF-8); an integer in [0, 2^64) (as `u64`); a list of parts (as the `frame("list", ...)` of its
items)."""

_END = 2**64


def u64(value: int) -> bytes:
    """Eight bytes, big-endian.

    Raises:
        ProtocolError: the value is outside [0, 2^64).
    """
    if not 0 <= value < _END:
        raise ProtocolError("an integer of a frame is outside 0..2^64-1")
    return value.to_bytes(8, "big")


def _text(value: str) -> bytes:
    try:
        return value.encode("utf-8")
    except UnicodeEncodeError:
        raise ProtocolError("a text of a frame is not Unicode") from None


def _bytes(part: Part) -> bytes:
    if isinstance(part, bytes):
        return part
    if isinstance(part, bytearray | memoryview):
        return bytes(part)
    if isinstance(part, str):
        return _text(part)
    if isinstance(part, int) and not isinstance(part, bool):
        return u64(part)
    if isinstance(part, list | tuple):
        return frame("list", *part)
    raise ProtocolError(f"a frame has no form for {type(part).__name__}")


def frame(label: str, *parts: Part) -> bytes:
    """The bytes of a label (whole, such as `accord/1/context`) and its parts.

    Raises:
        ProtocolError: an integer outside [0, 2^64), a text with lone surrogates, or a part of another type.
    """
    pieces: list[bytes] = []
    for item in (_text(label), *map(_bytes, parts)):
        pieces += (len(item).to_bytes(8, "big"), item)
    return b"".join(pieces)


def hash_frame(label: str, *parts: Part) -> bytes:
    """SHA-256 of the frame: 32 bytes."""
    return hashlib.sha256(frame(label, *parts)).digest()
