"""Discrete Gaussians from a seed, exactly: the noise that sites add to integers modulo 2^b, and the rounding before it.

D(c, v) is the distribution on the integers with P(k) ∝ exp(-(k - c)²/(2v)) (Canonne, Kamath, Steinke 2020). Why it, and
not the Skellam: above a few steps it is closed under sums to within 2·exp(-2π²·v₁v₂/(v₁+v₂)) of every probability
(`smoothing_error`, from the Poisson summation formula; Micciancio and Regev 2007, Lemma 4.2), and to within the same it
is N(c, v - w) pushed through D(·, w), that is, post-processing of a *continuous* Gaussian. So whatever is proven of the
Gaussian mechanism (its exact ε, Poisson sampling, adaptive composition) holds of a sum of such noises over many sites,
and a centre between two integers costs nothing: `round_to_integers` makes rounding itself a part of the noise.

Sampling inverts the distribution function: 16 bits choose a cell of a table, whose outcome is certain for all but a few
cells; there 128 further bits decide. Thresholds are rounded to 2^-144 and the tails beyond 13.6 standard deviations are
left out: `TOTAL_VARIATION` bounds the distance of a sample from D. A variance above 256² is sampled in levels,
x = x_low + m·x_high with x_low smooth on the steps of m (Micciancio and Walter 2017).

Everything is integer arithmetic on keystream bytes, so two machines expand a seed to the same noise (PROTOCOL.md,
section 13).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, localcontext
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from accord_shared.dp.noise import SecureGenerator
from accord_shared.errors import PrivacyError
from accord_shared.secagg.masking import Words

SEED_BYTES = 32
FRACTION_BITS = 8
"""Centres are multiples of 2^-8."""
ROUNDING_VARIANCE = Fraction(9)
"""Variance of `round_to_integers`."""
LEAST_VARIANCE = Fraction(9)
"""Smallest variance whose sums and centres are smooth: three steps of standard deviation."""
TOTAL_VARIATION = 2.0**-120
"""Bound on the distance of one sample from its distribution: up to 2^18 thresholds off by 2^-145, tails of 2^-137."""

_REACH = Decimal("13.6")
_DIGITS = 90
_THRESHOLD_BITS = 144
_CELL_BITS, _ROUNDING_CELL_BITS = 16, 10
_DIRECT = Fraction(256**2)
_SCALE_OF_LEVEL = 100
_CHUNK = 1 << 17
_UNSURE = -(1 << 15)
"""No outcome: what the table of a level holds where a cell does not decide."""


def smoothing_error(first: Fraction, second: Fraction) -> float:
    """Most that log P of D(a, first) + D(b, second) differs from that of D(a + b, first + second), anywhere.

    Each of the three normalising sums is within a factor 1 ± 2·exp(-2π²w) of an integral, w its variance (the first
    two are larger than that of the inner sum, first·second/(first + second)).
    """
    inner = float(first * second / (first + second))
    return 8.0 * math.exp(-2.0 * math.pi**2 * inner)


class _Table:
    """Distribution functions over consecutive integers, for a lookup by the first bits of a uniform number.

    One row per centre. `thresholds[row][j]` is 2^144·P(outcome ≤ first + j).
    """

    def __init__(self, first: int, thresholds: Sequence[Sequence[int]], cell_bits: int) -> None:
        self.first = first
        low_bits = _THRESHOLD_BITS - cell_bits
        high = np.array([[t >> low_bits for t in row] for row in thresholds], dtype=np.int64)
        rest = [[t & ((1 << low_bits) - 1) for t in row] for row in thresholds]
        # What is left of a threshold is compared with 128 random bits: its topmost 128.
        rest = [[t >> (low_bits - 128) if low_bits >= 128 else t << (128 - low_bits) for t in row] for row in rest]
        self._rest_high = np.array([[t >> 64 for t in row] for row in rest], dtype=np.uint64)
        self._rest_low = np.array([[t & (2**64 - 1) for t in row] for row in rest], dtype=np.uint64)
        cells = np.arange(1 << cell_bits)
        self._below, self._above = (
            np.stack([np.searchsorted(row, cells, side) for row in high]) for side in ("left", "right")
        )
        outcomes = np.where(self._above == self._below, self._below + first, _UNSURE).astype(np.int16)
        self.outcomes = np.ascontiguousarray(outcomes).reshape(-1)
        """Outcome [rows · cells], or `_UNSURE`."""
        self._cells = cell_bits

    @property
    def undecided(self) -> float:
        """Probability that a cell does not decide."""
        return float(np.mean(self.outcomes == _UNSURE))

    def decide(self, places: npt.NDArray[np.int64], bits: npt.NDArray[np.uint64]) -> npt.NDArray[np.int16]:
        """Outcomes [n] of cells that do not decide: `places` [n] in `outcomes`, `bits` [n, 2] further random words."""
        row, cell = places >> self._cells, places & ((1 << self._cells) - 1)
        below, above = self._below[row, cell], self._above[row, cell]
        while len(open_ := np.flatnonzero(below < above)):  # bisection; nearly all cells hold one threshold
            middle = (below[open_] + above[open_]) >> 1
            high, low = self._rest_high[row[open_], middle], self._rest_low[row[open_], middle]
            reached = (high < bits[open_, 0]) | ((high == bits[open_, 0]) & (low <= bits[open_, 1]))
            below[open_] = np.where(reached, middle + 1, below[open_])
            above[open_] = np.where(reached, above[open_], middle)
        outcomes: npt.NDArray[np.int16] = (below + self.first).astype(np.int16)
        return outcomes


def _thresholds(centre: Fraction, variance: Fraction, first: int, last: int) -> list[int]:
    """2^144·P(outcome ≤ k), k = first..last-1, of D(`centre`, `variance`) on [first, last]."""
    with localcontext() as context:
        context.prec = _DIGITS
        two_v = 2 * _decimal(variance)
        weights = [(-((k - _decimal(centre)) ** 2) / two_v).exp() for k in (first, first + 1)]
        ratio, factor = weights[1] / weights[0], (-2 / two_v).exp()
        weights = weights[:1]
        for _ in range(first, last):  # w(k+1)/w(k) shrinks by the same factor at every step
            weights.append(weights[-1] * ratio)
            ratio *= factor
        total, sums, partial = sum(weights), [], Decimal(0)
        for weight in weights[:-1]:
            partial += weight
            sums.append(int((partial / total * 2**_THRESHOLD_BITS).to_integral_value()))
        return sums


def _decimal(value: Fraction) -> Decimal:
    return Decimal(value.numerator) / Decimal(value.denominator)


def _reach(variance: Fraction) -> int:
    return math.ceil(_REACH * _decimal(variance).sqrt()) + 1


@lru_cache(maxsize=64)
def _centred_table(variance: Fraction) -> _Table:
    reach = _reach(variance)
    return _Table(-reach, [_thresholds(Fraction(0), variance, -reach, reach)], _CELL_BITS)


@lru_cache(maxsize=1)
def _rounding_table() -> _Table:
    """One row per centre 0, 1/256, …, 255/256."""
    reach, steps = _reach(ROUNDING_VARIANCE), 1 << FRACTION_BITS
    rows = [_thresholds(Fraction(f, steps), ROUNDING_VARIANCE, -reach, reach + 1) for f in range(steps)]
    return _Table(-reach, rows, _ROUNDING_CELL_BITS)


def _levels(variance: Fraction) -> list[tuple[int, Fraction]]:
    """(step, variance) of the independent parts whose sum has `variance`; all but the last are smooth on the next step.

    x_low has 2.5 of the next step m as its standard deviation.
    """
    if variance <= _DIRECT:
        return [(1, variance)]
    step = math.isqrt(math.ceil(variance)) // _SCALE_OF_LEVEL + 1
    low = Fraction(25 * step * step, 4)
    return [*_levels(low), *((step * inner, part) for inner, part in _levels((variance - low) / step**2))]


class _Stream:
    """Keystream of a seed for one purpose: AES-256-CTR from the counter `level`·2^120 + `part`·2^112."""

    def __init__(self, seed: bytes, level: int, part: int) -> None:
        self._encryptor = Cipher(algorithms.AES256(seed), modes.CTR(bytes([level, part]) + bytes(14))).encryptor()

    def words(self, count: int, kind: str) -> npt.NDArray[Any]:
        """The next `count` little-endian words of numpy type `kind`."""
        return np.frombuffer(self._encryptor.update(bytes(count * np.dtype(kind).itemsize)), dtype=kind)


@dataclass(frozen=True)
class DiscreteGaussian:
    """D(0, `variance`).

    Raises:
        PrivacyError: the variance is below `LEAST_VARIANCE`, where sums are not smooth.
    """

    variance: Fraction

    def __post_init__(self) -> None:
        if self.variance < LEAST_VARIANCE:
            raise PrivacyError(f"discrete noise of variance {float(self.variance):.3g} is below {LEAST_VARIANCE}")

    def add(self, words: Words, seed: bytes, *, negative: bool = False) -> None:
        """Add the sample [d] of `seed` (32 bytes, used for nothing else) to unsigned `words` [d], mod 2^width."""
        if len(seed) != SEED_BYTES:
            raise PrivacyError(f"a seed of {len(seed)} bytes")
        for level, (step, variance) in enumerate(_levels(self.variance)):
            _add_level(words, seed, level, -step if negative else step, _centred_table(variance))

    def keystream_bytes(self, count: int) -> int:
        """Keystream that `count` values take, on average over seeds."""
        undecided = sum(_centred_table(variance).undecided for _, variance in _levels(self.variance))
        return round(count * (2 * len(_levels(self.variance)) + 16 * undecided))

    def sample(self, seed: bytes, count: int) -> npt.NDArray[np.int64]:
        """The sample [count] of `seed`."""
        words = np.zeros(count, dtype=np.uint64)
        self.add(words, seed)
        return words.view(np.int64)


def _add_level(words: Words, seed: bytes, level: int, step: int, table: _Table) -> None:
    cells, further = _Stream(seed, level, 0), _Stream(seed, level, 1)
    outcomes = np.empty(min(_CHUNK, len(words)), dtype=np.int16)
    for start in range(0, len(words), _CHUNK):
        part = words[start : start + _CHUNK]
        places = cells.words(len(part), "<u2")
        _look_up(table, places, outcomes[: len(part)], further)
        _add_signed(part, outcomes[: len(part)], step)


def _look_up(table: _Table, places: npt.NDArray[Any], out: npt.NDArray[np.int16], further: _Stream) -> None:
    """Outcomes of the table's `places` [n]; undecided ones take 16 bytes each of `further`, in order."""
    np.take(table.outcomes, places, out=out, mode="clip")
    unsure = np.flatnonzero(out == _UNSURE)
    if len(unsure):
        bits = further.words(2 * len(unsure), "<u8").reshape(-1, 2)
        out[unsure] = table.decide(places[unsure].astype(np.int64), bits)


def _add_signed(words: Words, values: npt.NDArray[np.int16], factor: int) -> None:
    """`words` + `factor` · `values`, modulo the words' width."""
    width = words.dtype.itemsize
    signed: npt.NDArray[Any] = values if width == 2 else values.astype(f"<i{width}")
    if factor == 1:
        np.add(words, signed.view(words.dtype), out=words)
    elif factor == -1:
        np.subtract(words, signed.view(words.dtype), out=words)
    else:
        np.add(words, signed.view(words.dtype) * words.dtype.type(factor % (1 << 8 * width)), out=words)


def round_to_integers(fixed: npt.NDArray[np.int64], words: Words, generator: SecureGenerator) -> None:
    """Add D(`fixed`/256, 9) [d] to unsigned `words` [d], modulo their width: rounding whose error is smooth noise.

    `fixed` [d] are centres in steps of 2^-8.
    """
    table = _rounding_table()
    outcomes = np.empty(min(_CHUNK, len(words)), dtype=np.int16)
    stream = _GeneratorStream(generator)
    for start in range(0, len(words), _CHUNK):
        part, centres = words[start : start + _CHUNK], fixed[start : start + _CHUNK]
        out = outcomes[: len(part)]
        coins = stream.words(len(part), "<u2") & np.uint16((1 << _ROUNDING_CELL_BITS) - 1)
        places = ((centres & ((1 << FRACTION_BITS) - 1)) << _ROUNDING_CELL_BITS) | coins
        _look_up(table, places, out, stream)
        np.add(part, (centres >> FRACTION_BITS).astype(part.dtype), out=part)
        _add_signed(part, out, 1)


class _GeneratorStream(_Stream):
    """The site's own generator in a stream's place."""

    def __init__(self, generator: SecureGenerator) -> None:
        self._generator = generator

    def words(self, count: int, kind: str) -> npt.NDArray[Any]:
        size = np.dtype(kind).itemsize
        return self._generator.uint64(-(-count * size // 8)).view(kind)[:count]
