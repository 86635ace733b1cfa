"""Canonical bytes: RFC 8785 JSON with decimals as strings, so that both ends hash the same bytes."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from accord_shared.errors import PlanError


def decimal_string(value: float) -> str:
    """The shortest decimal that reads back as `value`, without exponent or trailing zeros.

    Raises:
        PlanError: the value is not finite.
    """
    if not math.isfinite(value):
        raise PlanError(f"not a finite number: {value}")
    text = format(Decimal(repr(value)).normalize(), "f")
    return "0" if text == "-0" else text


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return decimal_string(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [_plain(item) for item in value]
    raise PlanError(f"no canonical form for {type(value).__name__}")


def canonical_bytes(value: Any) -> bytes:
    """RFC 8785 bytes of JSON-like data; keys are ASCII, integers stay below 2^53.

    Raises:
        PlanError: the data holds something that has no canonical form.
    """
    return json.dumps(
        _plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def canonical_hash(value: Any) -> str:
    """SHA-256 of the canonical bytes, hexadecimal."""
    return hashlib.sha256(canonical_bytes(value)).hexdigest()
