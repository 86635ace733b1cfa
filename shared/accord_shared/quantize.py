"""Updates as integers modulo 2^b, so that they can be masked and added exactly (PROTOCOL.md, section 11).

Letters: d coordinates, b bits of the modulus, n sites, A the public bound on a coordinate, s the scale. What rounding
adds is unbiased and at most one step of 1/s a site; what exceeds A is clamped, which costs accuracy, never privacy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from accord_shared.dp.discrete import FRACTION_BITS, SEED_BYTES, round_to_integers
from accord_shared.dp.noise import SecureGenerator
from accord_shared.dp.sharing import NoiseShares
from accord_shared.errors import PlanError, ProtocolError
from accord_shared.exact import LN_2, exact, fifty_digits, rounded_up, written
from accord_shared.plan import Plan
from accord_shared.secagg.masking import Words, reduce_words, word_type
from accord_shared.vectors import Array, check_finite

Bytes = bytes | bytearray | memoryview | npt.NDArray[np.uint8]

DEFAULT_BITS = 24
"""Of the modulus, where neither the plan nor shared noise says."""
_CHUNK = 1 << 16
"""Coordinates worked on at a time, so that they stay in cache; a multiple of 8, for bit planes."""
_COIN_BITS = 16
_NARROW = 47
"""Most bits whose values, with 16 bits of fraction, fit into 63."""
_EXPONENTS = (-1000, 900)
"""Exponents of the scale that keep products with it away from the ends of the double range."""

_PLAIN_GRADIENT = 8
"""Bound on a coordinate of a mean gradient that nothing clips. A head on features of norm 1 has at most |p - y|·|x| ≤ 1
times sampled records / expected records; coordinates of other layers are far smaller."""
_SIGNAL_MARGIN = 2
"""A clipped mean has (sampled units / expected records) · C in one coordinate only if all units agree on it alone."""
_ROUNDING_MARGIN = Decimal("1.00390625")
"""1 + 2^-8: single-precision arithmetic of the local steps."""
_DIMENSION = 10**9
_TAIL_BITS = 40
_BETA_1, _BETA_2 = Decimal("0.9"), Decimal("0.999")
_BOUND_DIGITS = 3


@dataclass(frozen=True)
class Encoding:
    """How numbers of [-A, A] become integers whose sum over n sites fits into b bits: all of it public.

    Raises:
        PlanError: bits outside 8..62, no site, a bound that is not a finite number above 0, or no scale possible.
    """

    bits: int
    sites: int
    bound: float

    def __post_init__(self) -> None:
        if not 8 <= self.bits <= 62:
            raise PlanError(f"a modulus of {self.bits} bits is outside 8 to 62")
        if self.sites < 1:
            raise PlanError(f"{self.sites} sites have no sum")
        if not (self.bound > 0.0 and math.isfinite(self.bound)):
            raise PlanError(f"the bound {self.bound} is not a finite number above 0")
        if self._room < 1 or not _EXPONENTS[0] <= self._parts[1] <= _EXPONENTS[1]:
            raise PlanError(f"{self.bits} bits leave no scale for {self.sites} sites and the bound {self.bound:g}")
        if self.limit >= 1 << (self.bits - 1):
            raise PlanError(f"a sum of {self.sites} sites could wrap in {self.bits} bits")

    @property
    def _room(self) -> int:
        return (1 << (self.bits - 1)) - 1 - self.sites

    @cached_property
    def _parts(self) -> tuple[int, int]:
        """(m, e) of the scale m·2^e, 2^15 ≤ m < 2^16, in integer arithmetic: the same on every machine."""
        top, bottom = (self._room / (self.sites * exact(self.bound))).as_integer_ratio()
        exponent = top.bit_length() - bottom.bit_length() - 16
        mantissa = (top << max(0, -exponent)) // (bottom << max(0, exponent))
        if mantissa >= 1 << 16:
            return mantissa >> 1, exponent + 1
        return mantissa, exponent

    @property
    def scale(self) -> float:
        """s, steps per unit: (2^(b-1) - 1 - n)/(n·A) rounded down to an integer below 2^16 times a power of two."""
        return math.ldexp(*self._parts)

    @cached_property
    def _largest(self) -> Fraction:
        """A·s exactly."""
        mantissa, exponent = self._parts
        return exact(self.bound) * mantissa * Fraction(2) ** exponent

    @property
    def reach(self) -> int:
        """Largest magnitude of one encoded coordinate: A·s rounded up or, where it is an integer, one more."""
        return math.floor(self._largest) + 1

    @property
    def limit(self) -> int:
        """Largest magnitude of a sum of n encoded values, n·(⌊A·s⌋ + 1).

        It is below 2^(b-1): s ≤ (2^(b-1) - 1 - n)/(n·A) gives n·⌊A·s⌋ ≤ n·A·s ≤ 2^(b-1) - 1 - n.
        """
        return self.sites * self.reach

    @cached_property
    def clamp(self) -> float:
        """The largest double up to A·s: scaled values are clamped to it, so that no rounding exceeds `reach`."""
        nearest = float(self._largest)
        return nearest if Fraction(nearest) <= self._largest else math.nextafter(nearest, 0.0)

    @property
    def word(self) -> np.dtype[Any]:
        """The least unsigned word with room for b bits."""
        return word_type(self.bits)


def encode(vector: Array, encoding: Encoding | NoiseShares, generator: SecureGenerator) -> Words:
    """`vector` [d] (float32 or float64) clamped, scaled and rounded at random to integers mod 2^b [d].

    With an `Encoding` the expectation of a coordinate is s·x to within 2^-16, for |s·x| ≥ 2^37 to within the precision
    of a double. With `NoiseShares` the rounding is a discrete Gaussian about s·x, and the part of the site's noise that
    always stays is added: what is missing are the removable components, whose seeds are secrets of the protocol.

    Raises:
        NonFinite: `vector` holds NaN or infinity.
        ProtocolError: it is not one-dimensional, or not of the length that noise was divided for.
    """
    if vector.ndim != 1:
        raise ProtocolError(f"a vector of shape {vector.shape} cannot be encoded")
    if isinstance(encoding, NoiseShares):
        return _encode_noised(vector, encoding, generator)
    words = np.empty(len(vector), dtype=encoding.word)
    size = min(_CHUNK, len(vector))
    floats, integers = np.empty(size, dtype=np.float64), np.empty(size, dtype=np.int64)
    for start in range(0, len(vector), _CHUNK):
        part, out = vector[start : start + _CHUNK], words[start : start + _CHUNK]
        check_finite(part, "the vector to encode")
        coins = _coins(generator, len(part))
        values = integers[: len(part)]
        (_round_narrow if encoding.bits <= _NARROW else _round_wide)(part, encoding, coins, floats[: len(part)], values)
        np.copyto(out, values, casting="unsafe")  # keeps the low bits: mod 2^(word width)
        reduce_words(out, encoding.bits)
    return words


def _coins(generator: SecureGenerator, count: int) -> npt.NDArray[np.uint16]:
    return generator.uint64((count + 3) // 4).view(np.uint16)[:count]


def _encode_noised(vector: Array, shares: NoiseShares, generator: SecureGenerator) -> Words:
    """PROTOCOL.md, section 13: clamp, coin to the grid of 2^-8 steps, Gaussian rounding, base noise."""
    if len(vector) != shares.dimension:
        raise ProtocolError(f"{len(vector)} coordinates, noise is divided for {shares.dimension}")
    words = np.zeros(len(vector), dtype=word_type(shares.bits))
    size = min(_CHUNK, len(vector))
    floats, integers = np.empty(size, dtype=np.float64), np.empty(size, dtype=np.int64)
    fine = shares.scale * 2.0 ** (FRACTION_BITS + _COIN_BITS)
    for start in range(0, len(vector), _CHUNK):
        part, out = vector[start : start + _CHUNK], words[start : start + _CHUNK]
        check_finite(part, "the vector to encode")
        values = integers[: len(part)]
        _scaled(part, fine, shares.bound * fine, floats[: len(part)])
        np.copyto(values, floats[: len(part)], casting="unsafe")
        np.add(values, _coins(generator, len(part)), out=values)
        np.right_shift(values, _COIN_BITS, out=values)
        round_to_integers(values, out, generator)
    shares.base_noise.add(words, generator.uint64(SEED_BYTES // 8).tobytes())
    reduce_words(words, shares.bits)
    return words


def _scaled(part: Array, scale: float, clamp: float, out: npt.NDArray[np.float64]) -> None:
    """`scale` · `part` within ±`clamp`; exact for float32, since the scale has 16 bits."""
    with np.errstate(over="ignore"):  # infinity is clamped like any other number
        np.multiply(part, scale, out=out, dtype=np.float64)
    np.clip(out, -clamp, clamp, out=out)


def _round_narrow(
    part: Array,
    encoding: Encoding,
    coins: npt.NDArray[np.uint16],
    floats: npt.NDArray[np.float64],
    out: npt.NDArray[np.int64],
) -> None:
    """⌊s·x + coin/2^16⌋ in fixed point with 16 bits of fraction."""
    step = 2.0**_COIN_BITS
    _scaled(part, encoding.scale * step, encoding.clamp * step, floats)
    np.copyto(out, floats, casting="unsafe")  # towards zero: integers of s·x stay what they are
    np.add(out, coins, out=out)
    np.right_shift(out, _COIN_BITS, out=out)


def _round_wide(
    part: Array,
    encoding: Encoding,
    coins: npt.NDArray[np.uint16],
    floats: npt.NDArray[np.float64],
    out: npt.NDArray[np.int64],
) -> None:
    """The same where value and fraction do not fit into one integer: whole part and fraction apart."""
    _scaled(part, encoding.scale, encoding.clamp, floats)
    whole = np.floor(floats)
    np.copyto(out, (floats - whole) * 2.0**_COIN_BITS, casting="unsafe")
    np.add(out, coins, out=out)
    np.right_shift(out, _COIN_BITS, out=out)
    np.add(out, whole.astype(np.int64), out=out)


def decode(total: Words, encoding: Encoding | NoiseShares, survivors: int) -> npt.NDArray[np.float64]:
    """The sum [d] over `survivors` sites of what they encoded as `total` [d], mod 2^b.

    Raises:
        ProtocolError: `total` is not of the encoding's words, `survivors` outside 1..n, or a coordinate is beyond
            what so many honest sites can reach.
    """
    if total.ndim != 1 or total.dtype != word_type(encoding.bits):
        raise ProtocolError(f"a sum of shape {total.shape} and type {total.dtype} is not of this encoding")
    if not 1 <= survivors <= encoding.sites:
        raise ProtocolError(f"a sum over {survivors} of {encoding.sites} sites")
    limit, outside = survivors * encoding.reach, 0
    if isinstance(encoding, NoiseShares):
        limit += encoding.tail
    values = np.empty(len(total), dtype=np.float64)
    for start in range(0, len(total), _CHUNK):
        signed = _signed(total[start : start + _CHUNK], encoding.bits)
        if signed.max() > limit or signed.min() < -limit:
            outside += int(np.count_nonzero((signed > limit) | (signed < -limit)))
        np.divide(signed, encoding.scale, out=values[start : start + _CHUNK], dtype=np.float64)
    if outside:
        raise ProtocolError(f"{outside} of {len(total)} coordinates of the sum are out of range: a site did not encode")
    return values


def _signed(words: Words, bits: int) -> npt.NDArray[np.signedinteger[Any]]:
    """`words` mod 2^`bits` as integers of [-2^(bits-1), 2^(bits-1)), of the same width."""
    spare = 8 * words.itemsize - bits
    signed: npt.NDArray[np.signedinteger[Any]] = np.left_shift(words, spare).view(f"<i{words.itemsize}")
    signed >>= spare
    return signed


def _planes(bits: int) -> list[int]:
    """Width in bits of each plane, from the lowest bits up: 16-bit planes, an 8-bit plane, bit planes."""
    return [16] * (bits // 16) + [8] * (bits % 16 // 8) + [1] * (bits % 8)


def _plane_bytes(width: int, dimension: int) -> int:
    return -(-width * dimension // 8)


def packed_bytes(bits: int, dimension: int) -> int:
    """Bytes of `dimension` packed words."""
    return sum(_plane_bytes(width, dimension) for width in _planes(bits))


def _views(data: npt.NDArray[np.uint8], bits: int, dimension: int) -> list[tuple[int, npt.NDArray[Any]]]:
    """(width, plane) from the lowest bits up, planes as views of `data`: words [d], or bytes of 8 single bits."""
    views, start = [], 0
    for width in _planes(bits):
        end = start + _plane_bytes(width, dimension)
        views.append((width, data[start:end].view("<u2" if width == 16 else np.uint8)))
        start = end
    return views


def pack(words: Words, bits: int) -> npt.NDArray[np.uint8]:
    """The lowest `bits` of `words` [d] as planes, `packed_bytes(bits, d)` bytes."""
    data = np.empty(packed_bytes(bits, len(words)), dtype=np.uint8)
    planes = _views(data, bits, len(words))
    scratch = np.empty(min(_CHUNK, len(words)), dtype=words.dtype)
    for start in range(0, len(words), _CHUNK):
        part = words[start : start + _CHUNK]
        rest = scratch[: len(part)]
        shift = 0
        for width, plane in planes:
            _write(np.right_shift(part, shift, out=rest) if shift else part, width, plane, start)
            shift += width
    return data


def _write(values: Words, width: int, plane: npt.NDArray[Any], start: int) -> None:
    """The lowest `width` bits of `values` into `plane`, from coordinate `start` on."""
    if width > 1:
        np.copyto(plane[start : start + len(values)], values, casting="unsafe")  # keeps the low bits
        return
    bits = np.packbits((values & 1).astype(np.uint8))
    plane[start // 8 : start // 8 + len(bits)] = bits


def _read(width: int, plane: npt.NDArray[Any], start: int, count: int) -> npt.NDArray[Any]:
    """What `plane` holds of `count` coordinates from `start` on."""
    if width > 1:
        return plane[start : start + count]
    return np.unpackbits(plane[start // 8 : (start + count + 7) // 8], count=count)


def _checked(data: Bytes, bits: int, dimension: int) -> list[tuple[int, npt.NDArray[Any]]]:
    """The planes of `data`, lowest first.

    Raises:
        ProtocolError: the length is another, or padding is not zero: one vector has one packing.
    """
    flat = np.frombuffer(data, dtype=np.uint8)
    if len(flat) != packed_bytes(bits, dimension):
        raise ProtocolError(f"{len(flat)} bytes came where {packed_bytes(bits, dimension)} were due")
    planes = _views(flat, bits, dimension)
    padding = (1 << (-dimension % 8)) - 1
    if any(width == 1 and len(plane) and int(plane[-1]) & padding for width, plane in planes):
        raise ProtocolError("the padding of packed words is not zero")
    return planes


def unpack(data: Bytes, bits: int, dimension: int) -> Words:
    """The words [d] that `pack` made `data` of.

    Raises:
        ProtocolError: the length is another, or padding is not zero.
    """
    words = np.zeros(dimension, dtype=word_type(bits))
    add_packed(words, data, bits)
    return words


def add_packed(total: Words, data: Bytes, bits: int) -> None:
    """Add the packed words `data` to `total` [d] in place, mod 2^(word width).

    Raises:
        ProtocolError: the length is another, padding is not zero, or the words of `total` are too narrow; `total` is
            as it was.
    """
    if 8 * total.itemsize < bits:
        raise ProtocolError(f"words of {8 * total.itemsize} bits do not hold {bits}")
    planes = _checked(data, bits, len(total))[::-1]
    scratch = np.empty(min(_CHUNK, len(total)), dtype=total.dtype)
    for start in range(0, len(total), _CHUNK):
        part = total[start : start + _CHUNK]
        words = scratch[: len(part)]
        words[:] = _read(*planes[0], start, len(part))
        for width, plane in planes[1:]:
            np.left_shift(words, width, out=words)
            np.bitwise_or(words, _read(width, plane, start, len(part)), out=words)
        np.add(part, words, out=part)


def default_bound(plan: Plan, noise_multiplier: float) -> float:
    """A: a public bound on a coordinate of one site's update, σ = `noise_multiplier` being the noise it adds itself.

    It follows the local steps (`accord_client.trainer`) and should practically never clamp:

    - SGD with momentum μ: the gradient of step j enters with weight w_j = Σ_{i ≤ K-j} μ^i. Clipped gradients give up to
      2·C·Σ w_j; the noise is N(0, (lr·σ·C/(q·E))²·Σ w_j²), bounded but for a chance of 2^-40 over 10^9 coordinates, all
      sites and all rounds; q·E is the divisor of the trainer. Without C the constant `_PLAIN_GRADIENT` is in C's place.
    - Adam: Σ_j of the largest step there is, whatever gradients and noise are (`_adam_steps`).

    Computed with 50 decimal digits from the decimals of the plan, operation by operation as here, and rounded up to
    three digits: sites must agree on A to the byte (PROTOCOL.md, section 11).

    Raises:
        PlanError: `noise_multiplier` is negative, or the bound is not finite.
    """
    if not (noise_multiplier >= 0.0 and math.isfinite(noise_multiplier)):
        raise PlanError(f"noise multiplier {noise_multiplier} is not a finite number ≥ 0")
    local = plan.local
    with fifty_digits():
        unit = _adam_steps(local.steps_per_round) if local.optimizer == "adam" else _sgd_steps(plan, noise_multiplier)
        bound = rounded_up(written(local.learning_rate) * unit * _ROUNDING_MARGIN, _BOUND_DIGITS)
    if not math.isfinite(bound):
        raise PlanError("the plan's learning rate and clip norm leave no finite bound on an update")
    return bound


def _sgd_steps(plan: Plan, noise_multiplier: float) -> Decimal:
    """Bound on the sum of SGD's steps at learning rate 1."""
    local = plan.local
    total, squares = _momentum_weights(local.momentum, local.steps_per_round)
    if local.clip_norm is None:
        return _PLAIN_GRADIENT * total
    clip = written(local.clip_norm)
    deviation = written(noise_multiplier) * clip / (written(local.sampling_rate) * local.expected_records)
    return _SIGNAL_MARGIN * clip * total + _deviations(plan) * deviation * squares.sqrt()


@lru_cache(maxsize=64)
def _momentum_weights(momentum: float, steps: int) -> tuple[Decimal, Decimal]:
    """(Σ w_j, Σ w_j²) over the steps of a round, the last step's weight 1 first."""
    factor, weight, total, squares = written(momentum), Decimal(0), Decimal(0), Decimal(0)
    for _ in range(steps):
        weight = factor * weight + 1
        total += weight
        squares += weight * weight
    return total, squares


def _deviations(plan: Plan) -> Decimal:
    """z with 2·exp(-z²/2) · coordinates · sites · rounds ≤ 2^-40 (Chernoff); the logarithm is a count of bits."""
    values = _DIMENSION * plan.cohort.size * plan.run.rounds
    return (2 * LN_2 * (1 + _TAIL_BITS + values.bit_length())).sqrt()


@lru_cache(maxsize=64)
def _adam_steps(steps: int) -> Decimal:
    """Bound on the sum of Adam's steps at learning rate 1, with the β that torch has by default.

    Kingma and Ba (2015, section 2.1) bound a step by (1-β1)/√(1-β2) for a lone gradient. For any gradients Cauchy and
    Schwarz give |m_t| ≤ (1-β1)/√(1-β2) · √(Σ_{k<t} (β1²/β2)^k) · √v_t, times the corrections √(1-β2^t)/(1-β1^t): 1 at
    the first step, towards 7.27.
    """
    total, series, ratio = Decimal(0), Decimal(0), _BETA_1 * _BETA_1 / _BETA_2
    power_1, power_2 = Decimal(1), Decimal(1)
    for _ in range(steps):
        power_1 *= _BETA_1
        power_2 *= _BETA_2
        series = ratio * series + 1
        total += (1 - _BETA_1) / (1 - power_1) * ((1 - power_2) / (1 - _BETA_2) * series).sqrt()
    return total
