"""Shares and encodings that hypothesis makes: any t holders rebuild, t - 1 know nothing, sums are exact."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from accord_shared.dp.noise import SecureGenerator
from accord_shared.errors import PlanError, ProtocolError
from accord_shared.quantize import Encoding, add_packed, decode, encode, pack, packed_bytes, unpack
from accord_shared.secagg.shamir import PRIME, deal, from_bytes, rebuild, to_bytes

KEY = bytes(range(32))
points = st.lists(st.integers(0, 400), min_size=1, max_size=12, unique=True)
contents = st.integers(0, 4).flatmap(lambda count: st.binary(min_size=32 * count, max_size=32 * count))


def keystream(seed: int) -> Callable[[int], bytes]:
    generator = SecureGenerator(seed.to_bytes(32, "big"))
    return lambda count: generator.uint64((count + 7) // 8).tobytes()[:count]


def value_at(target: int, known: dict[int, int]) -> int:
    """The polynomial through the `known` points, at `target`: Lagrange, in big integers."""
    total = Fraction(0)
    for x, y in known.items():
        total += y * math.prod(Fraction(target - other, x - other) for other in known if other != x)
    return total.numerator * pow(total.denominator, -1, PRIME) % PRIME


@given(contents, points, st.data(), st.integers(0, 2**64))
def test_any_threshold_of_holders_rebuilds(secrets: bytes, holders: list[int], data: st.DataObject, seed: int) -> None:
    threshold = data.draw(st.integers(1, len(holders)))
    shares = deal(secrets, holders, threshold, keystream(seed))
    assert shares.shape == (len(holders), len(secrets) // 32, 9)
    order = data.draw(st.permutations(range(len(holders))))
    rows = order[: data.draw(st.integers(threshold, len(holders)))]
    sent = np.stack([from_bytes(to_bytes(shares[row]), len(secrets) // 32) for row in rows])
    assert rebuild(sent, [holders[row] for row in rows]).tobytes() == secrets


@given(st.binary(min_size=32, max_size=32), st.binary(min_size=32, max_size=32), points, st.integers(0, 2**64))
def test_one_holder_less_fits_every_secret(one: bytes, other: bytes, holders: list[int], seed: int) -> None:
    """The shares of t - 1 holders belong to exactly one sharing of any other secret, so they tell nothing."""
    shares = deal(one, holders, len(holders), keystream(seed)).tolist()
    digits = [int.from_bytes(other, "little") >> 30 * i & (2**30 - 1) for i in range(9)]
    last = holders[-1] + 1
    forged = []
    for i, digit in enumerate(digits):
        known = {0: digit} | {holder + 1: row[0][i] for holder, row in zip(holders[:-1], shares, strict=False)}
        forged.append(value_at(last, known))
    shares[-1] = [forged]
    assert rebuild(np.array(shares, dtype=np.uint32), holders).tobytes() == other


@given(contents.filter(lambda secrets: len(secrets) >= 64), points, st.data(), st.integers(0, 2**64))
def test_a_wrong_share_is_refused(secrets: bytes, holders: list[int], data: st.DataObject, seed: int) -> None:
    shares = deal(secrets, holders, len(holders), keystream(seed))
    row = data.draw(st.integers(0, len(holders) - 1))
    noise = np.frombuffer(keystream(seed + 1)(shares[row].nbytes), dtype=np.uint32) % PRIME
    shares[row] = (shares[row] + noise.reshape(shares[row].shape).astype(np.uint64)) % PRIME
    with pytest.raises(ProtocolError, match="do not belong together"):
        rebuild(shares, holders)


encodings = st.builds(
    Encoding, st.integers(12, 62), st.integers(1, 100), st.floats(1e-200, 1e200) | st.floats(1e-3, 1e3)
)


@given(st.integers(-5, 70), st.integers(-5, 10**6), st.floats())
def test_no_encoding_can_wrap(bits: int, sites: int, bound: float) -> None:
    try:
        encoding = Encoding(bits, sites, bound)
    except PlanError:
        return
    mantissa, exponent = encoding._parts
    exact = Fraction((1 << (bits - 1)) - 1 - sites) / (sites * Fraction(str(bound)))
    assert mantissa * Fraction(2) ** exponent <= exact < (mantissa + 1) * Fraction(2) ** exponent
    assert encoding.limit == sites * (math.floor(Fraction(str(bound)) * Fraction(encoding.scale)) + 1) < 1 << (bits - 1)
    assert Fraction(encoding.clamp) <= Fraction(str(bound)) * Fraction(encoding.scale) < encoding.reach


@given(encodings, st.lists(st.floats(-1.5, 1.5), min_size=1, max_size=9), st.data(), st.booleans())
def test_sums_are_exact_and_near(encoding: Encoding, parts: list[float], data: st.DataObject, single: bool) -> None:
    survivors = data.draw(st.integers(1, min(encoding.sites, 7)))
    with np.errstate(over="ignore", under="ignore"):
        vector = np.array(parts) * encoding.bound
        vector = vector.astype(np.float32) if single and np.isfinite(vector.astype(np.float32)).all() else vector
    generator = SecureGenerator(KEY)
    uploads = [encode(vector, encoding, generator) for _ in range(survivors)]
    total = np.zeros(len(parts), dtype=encoding.word)
    for words in uploads:
        add_packed(total, pack(words, encoding.bits), encoding.bits)
    half, modulus = 1 << (encoding.bits - 1), 1 << encoding.bits
    exact = [sum((int(word) + half) % modulus - half for word in column) for column in zip(*uploads, strict=True)]
    decoded = decode(total, encoding, survivors)
    assert decoded.tolist() == [value / encoding.scale for value in exact]
    wanted = survivors * np.clip(vector.astype(np.float64), -encoding.bound, encoding.bound)
    tolerance = survivors / encoding.scale + 1e-14 * survivors * encoding.bound
    assert np.abs(decoded - wanted).max() <= tolerance * (1 + 1e-12)


@given(st.integers(8, 62), st.integers(0, 70), st.integers(0, 2**32))
def test_planes_read_back_and_add_up(bits: int, size: int, seed: int) -> None:
    rng, word = np.random.default_rng(seed), Encoding(bits, 1, 1.0).word
    one, two = (rng.integers(0, 1 << bits, size, dtype=np.uint64).astype(word) for _ in range(2))
    data = pack(one, bits)
    assert len(data) == packed_bytes(bits, size)
    assert unpack(data.tobytes(), bits, size).tolist() == one.tolist()
    total = two.copy()
    add_packed(total, data, bits)
    sums = [(left + right) % (1 << bits) for left, right in zip(one.tolist(), two.tolist(), strict=True)]
    assert [value % (1 << bits) for value in total.tolist()] == sums


@given(st.integers(8, 62), st.integers(0, 20), st.data())
def test_any_bytes_have_one_reading_or_none(bits: int, size: int, data: st.DataObject) -> None:
    length = packed_bytes(bits, size)
    given_bytes = data.draw(st.binary(min_size=length, max_size=length))
    try:
        words = unpack(given_bytes, bits, size)
    except ProtocolError:
        assert bits % 8
        assert size % 8
        return
    assert pack(words, bits).tobytes() == given_bytes
