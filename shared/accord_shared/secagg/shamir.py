"""Secret sharing over GF(p), p = 2^31 - 1 (Shamir 1979): any t shares rebuild a secret, t - 1 tell nothing of it.

PROTOCOL.md, section 7: a secret is the little-endian integer of its 32 bytes in 9 digits of base 2^30, lowest first.
Each digit has its own polynomial, so many secrets are one matrix product: shares = Vandermonde · coefficients mod p.

Letters: n holders, t the threshold, S secrets. A share proves nothing: a holder who lies spoils the secret, and is
seen only by chance, when a digit falls out of range.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from accord_shared.errors import ProtocolError

SECRET_BYTES = 32
DIGITS = 9
SHARE_BYTES = 4 * DIGITS
PRIME = 2**31 - 1

Shares = npt.NDArray[np.uint32]
_Integers = npt.NDArray[np.int64]

_DIGIT_LIMITS = np.array([2**30] * (DIGITS - 1) + [2**16], dtype=np.uint64)
_WORD_SHIFTS = 2 * np.arange(8, dtype=np.uint64)
_DIGIT_SHIFTS = 32 - 2 * np.arange(DIGITS, dtype=np.uint64)
_BLOCK = 128
"""Terms that one product may sum: see `_product`."""
_SLAB = 1 << 14
"""Doubles of a product held at a time: they stay in cache."""


def deal(
    secrets: bytes | npt.NDArray[np.uint8],
    holders: Sequence[int],
    threshold: int,
    random: Callable[[int], bytes],
) -> Shares:
    """Shares [n, S, 9] of `secrets` [S, 32] for the `holders`, cohort indices: each holds the values at its index + 1.

    `random(count)` gives `count` cryptographic bytes; coefficients come from it by degree, then secret, then digit.

    Raises:
        ProtocolError: the secrets are not rows of 32 bytes, holders repeat or are no indices, or the threshold is
            outside 1..n.
    """
    digits = _digits(_rows(secrets))
    points = _points(holders)
    if not 1 <= threshold <= len(points):
        raise ProtocolError(f"a threshold of {threshold} does not fit {len(points)} holders")
    coefficients = np.empty((threshold, digits.size), dtype=np.uint32)
    coefficients[0] = digits.reshape(-1)
    coefficients[1:] = _uniform((threshold - 1) * digits.size, random).reshape(coefficients[1:].shape)
    return _product(_powers(points, threshold), coefficients).reshape(len(points), *digits.shape)


def rebuild(shares: Shares, holders: Sequence[int]) -> npt.NDArray[np.uint8]:
    """The secrets [S, 32] from `shares` [t or more, S, 9], row by row those of the `holders`; every row is used.

    Raises:
        ProtocolError: the shape is another, holders repeat, a value is not below p, or a rebuilt digit is out of range,
            so that some share is wrong. (Wrong shares pass with probability about 2^-23 a secret.)
    """
    points = _points(holders)
    if shares.ndim != 3 or shares.shape[0] != len(points) or shares.shape[2] != DIGITS:
        raise ProtocolError(f"shares of shape {shares.shape} came for {len(points)} holders")
    if (shares >= PRIME).any():
        raise ProtocolError("a share has a value outside the field")
    flat = _product(_weights_at_zero(points), shares.reshape(len(points), shares[0].size))
    digits = flat.reshape(shares[0].shape).astype(np.uint64)
    if (digits >= _DIGIT_LIMITS).any():
        raise ProtocolError("the shares do not belong together: a rebuilt digit is out of range")
    return _bytes_of_digits(digits)


def to_bytes(shares: Shares) -> bytes:
    """`shares` [..., 9] of one holder as little-endian u32, 36 bytes a secret."""
    return shares.astype("<u4", copy=False).tobytes()


def from_bytes(data: bytes, secrets: int | None = None) -> Shares:
    """One holder's shares [S, 9], 36 bytes each; `secrets` is S where it is known.

    Raises:
        ProtocolError: the length is another, or a value is not below p.
    """
    due = len(data) // SHARE_BYTES if secrets is None else secrets
    if len(data) != SHARE_BYTES * due:
        raise ProtocolError(f"{len(data)} bytes came where the shares of {due} secrets were due")
    shares = np.frombuffer(data, dtype="<u4").astype(np.uint32).reshape(due, DIGITS)
    if (shares >= PRIME).any():
        raise ProtocolError("a share has a value outside the field")
    return shares


def _rows(secrets: bytes | npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """`secrets` as [S, 32] bytes."""
    rows = np.frombuffer(secrets, dtype=np.uint8) if isinstance(secrets, bytes) else secrets
    if isinstance(secrets, bytes) and len(secrets) % SECRET_BYTES == 0:
        rows = rows.reshape(-1, SECRET_BYTES)
    if rows.ndim != 2 or rows.shape[1] != SECRET_BYTES or rows.dtype != np.uint8:
        raise ProtocolError(f"secrets of shape {rows.shape} are not rows of {SECRET_BYTES} bytes")
    return rows


def _points(holders: Sequence[int]) -> list[int]:
    """Where each holder's shares are evaluated: never 0, where the secret is."""
    points = [int(holder) + 1 for holder in holders]
    if not points or len(set(points)) != len(points):
        raise ProtocolError(f"{len(points)} holders, {len(set(points))} of them distinct")
    if not all(0 < point < PRIME for point in points):
        raise ProtocolError("a holder is not an index of the cohort")
    return points


def _digits(rows: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """Digits [S, 9] of base 2^30: digit i begins 2·i bits below word i of 32 bits."""
    words = np.zeros((len(rows), DIGITS + 1), dtype=np.uint64)
    words[:, 1:-1] = np.ascontiguousarray(rows).view("<u4")
    pairs = words[:, :-1] | (words[:, 1:] << np.uint64(32))
    digits: npt.NDArray[np.uint64] = (pairs >> _DIGIT_SHIFTS) & np.uint64(2**30 - 1)
    return digits


def _bytes_of_digits(digits: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint8]:
    """The bytes [S, 32] of digits [S, 9] in range: word i of 32 bits begins 2·i bits into digit i."""
    words = (digits[:, :-1] >> _WORD_SHIFTS) | (digits[:, 1:] << (np.uint64(30) - _WORD_SHIFTS))
    return (words & np.uint64(2**32 - 1)).astype("<u4").view(np.uint8)


def _uniform(count: int, random: Callable[[int], bytes]) -> Shares:
    """Uniform elements [count] of GF(p): 31-bit words, those that are p drawn again."""
    values = _words(count, random)
    while len(outside := np.flatnonzero(values == PRIME)):
        values[outside] = _words(len(outside), random)
    return values


def _words(count: int, random: Callable[[int], bytes]) -> Shares:
    """31-bit words [count]."""
    return np.frombuffer(random(4 * count), dtype="<u4") & np.uint32(PRIME)


def _powers(points: list[int], count: int) -> _Integers:
    """x^k mod p [points, count] for k < `count`: the columns double at every step."""
    base = np.array(points, dtype=np.int64)
    powers = np.ones((len(points), count), dtype=np.int64)
    done = 1
    while done < count:
        more = min(done, count - done)
        powers[:, done : done + more] = powers[:, :more] * base[:, None] % PRIME  # below 2^62
        base = base * base % PRIME
        done += more
    return powers


def _weights_at_zero(points: list[int]) -> _Integers:
    """Lagrange's weights [1, points]: f(0) = Σ weight_i · f(x_i), weight_i = Π_{j≠i} x_j / (x_j - x_i)."""
    nodes = np.array(points, dtype=np.int64)
    differences = (nodes[None, :] - nodes[:, None]) % PRIME
    np.fill_diagonal(differences, nodes)  # Π x_j / (x_i · Π_{j≠i} (x_j - x_i)): one division a weight
    below = np.ones(len(nodes), dtype=np.int64)
    above = 1
    for point, column in zip(points, differences.T, strict=True):
        below = below * column % PRIME
        above = above * point % PRIME
    return np.array([[above * pow(int(each), -1, PRIME) % PRIME for each in below]], dtype=np.int64)


def _product(left: _Integers, right: Shares) -> Shares:
    """`left` [m, k] · `right` [k, c] mod p, exactly, in double precision: BLAS has no integer product.

    `left` = 2^16·high + low with |low|, |high| ≤ 2^15 and `right` < 2^31: a sum of 128 terms is at most
    128 · 2^15 · 2^31 = 2^53, and all its partial sums are integers that doubles hold.
    """
    low = ((left + 2**15) & 0xFFFF) - 2**15
    parts = np.concatenate([(left - low) >> 16, low]).astype(np.float64)
    product = np.empty((len(left), right.shape[1]), dtype=np.uint32)
    width = max(8, _SLAB // len(parts))
    for start in range(0, right.shape[1], width):
        slab = slice(start, start + width)
        product[:, slab] = _slab(parts, right[:, slab].astype(np.float64))
    return product


def _slab(parts: npt.NDArray[np.float64], right: npt.NDArray[np.float64]) -> Shares:
    """(2^16 · upper half of `parts` + lower half) · `right` mod p, some columns of it."""
    total = np.zeros((2, len(parts) // 2, right.shape[1]), dtype=np.int64)
    for start in range(0, len(right), _BLOCK):
        block = parts[:, start : start + _BLOCK] @ right[start : start + _BLOCK]
        total += _fold(block.astype(np.int64)).reshape(total.shape)
    high, low = _fold(total)
    high <<= 16
    high += low
    return _residue(high)


def _fold(values: _Integers) -> _Integers:
    """The same residues nearer to [0, p]; overwrites `values`. 2^31 = 1 mod p, under a negative sign too.

    Magnitudes up to 2^54 come into -2^23..2^31+2^23, and those into [0, p].
    """
    folded = values >> 31
    values &= PRIME
    folded += values
    return folded


def _residue(values: _Integers) -> Shares:
    """Values of magnitude up to 2^54, mod p, in [0, p); overwrites `values`."""
    folded = _fold(_fold(values))
    folded[folded == PRIME] = 0
    return folded.astype(np.uint32)
