"""Framing: known bytes, and no two framings alike."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accord_shared.errors import ProtocolError
from accord_shared.frames import Part, frame, hash_frame, u64

PARTS = st.lists(st.binary(max_size=20), max_size=6)


def by_hand(label: bytes, *parts: bytes) -> bytes:
    """The specification, written a second time."""
    return b"".join(len(piece).to_bytes(8, "big") + piece for piece in (label, *parts))


def test_known_bytes() -> None:
    nested = by_hand(b"list", b"x", (1).to_bytes(8, "big"))
    expected = by_hand(b"accord/1/test", b"bc", "ä".encode(), (3).to_bytes(8, "big"), nested)
    assert frame("accord/1/test", b"bc", "ä", 3, ["x", 1]) == expected
    assert frame("a", b"bc").hex() == "000000000000000161" + "00000000000000026263"
    assert hash_frame("a", b"bc") == hashlib.sha256(frame("a", b"bc")).digest()


def test_a_list_is_one_part_and_an_empty_one_too() -> None:
    assert frame("a", []) == by_hand(b"a", by_hand(b"list"))
    assert frame("a", [b"x", b"y"]) == frame("a", (b"x", b"y")) != frame("a", b"x", b"y")
    assert frame("a", [[b"x"], [b"y"]]) != frame("a", [[b"x", b"y"]])
    assert frame("a", bytearray(b"x")) == frame("a", memoryview(b"x")) == frame("a", b"x")


@given(st.text(max_size=10), PARTS, st.text(max_size=10), PARTS)
def test_injective(label: str, parts: list[bytes], other: str, others: list[bytes]) -> None:
    assert (frame(label, *parts) == frame(other, *others)) == ((label, parts) == (other, others))


@given(PARTS, st.integers(0, 6), st.integers(0, 6))
def test_where_a_list_ends_is_in_the_bytes(parts: list[bytes], one: int, two: int) -> None:
    cuts = [(parts[:at], parts[at:]) for at in (one, two)]
    same = frame("a", cuts[0][0], *cuts[0][1]) == frame("a", cuts[1][0], *cuts[1][1])
    assert same == (cuts[0] == cuts[1])


@given(st.integers(0, 2**64 - 1))
def test_integers_are_eight_bytes(value: int) -> None:
    assert frame("a", value) == frame("a", u64(value))
    assert int.from_bytes(u64(value), "big") == value


@pytest.mark.parametrize("part", [-1, 2**64, "\ud800", 1.0, None, True, {"a"}, {"a": 1}, [1.5], [["x", -1]]])
def test_what_has_no_form_is_refused(part: Part) -> None:
    with pytest.raises(ProtocolError):
        frame("accord/1/test", part)


def test_the_ends_of_u64() -> None:
    assert u64(0) == bytes(8)
    assert u64(2**64 - 1) == b"\xff" * 8
