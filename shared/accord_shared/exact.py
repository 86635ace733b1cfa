"""Numbers that two parties must agree on to the byte (PROTOCOL.md, section 2, "Numbers").

A number of a plan is the decimal that it is written as, not the double that holds it. What follows from it is exact
(`Fraction`), or computed with 50 decimal digits, each operation correctly rounded, and then rounded up to a few
digits: an implementation in another language, with other libraries, comes to the same.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from decimal import MAX_EMAX, MIN_EMIN, ROUND_CEILING, ROUND_HALF_EVEN, Context, Decimal, localcontext
from fractions import Fraction

LN_2 = Decimal("0.6931471805599454")
"""ln 2, rounded up at 16 digits."""
_DIGITS = 50


def written(value: float) -> Decimal:
    """The shortest decimal that reads back as the finite `value`."""
    return Decimal(repr(float(value)))


def exact(value: float) -> Fraction:
    """`written` as a fraction."""
    return Fraction(written(value))


def fifty_digits() -> AbstractContextManager[Context]:
    """A block in which decimals are computed with 50 digits, half to even."""
    return localcontext(Context(prec=_DIGITS, rounding=ROUND_HALF_EVEN, Emin=MIN_EMIN, Emax=MAX_EMAX))


def rounded_up(value: Decimal, digits: int) -> float:
    """The least number of so many significant decimal digits that is not below `value`; infinite if no double holds it.

    Up to 15 digits: the shortest decimal of the double that is returned is that number.
    """
    return float(Context(prec=digits, rounding=ROUND_CEILING, Emin=MIN_EMIN, Emax=MAX_EMAX).plus(value))


def nearest(value: Fraction) -> float:
    """The double nearest to `value`; infinite beyond the largest."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def ceil_root(value: Fraction) -> int:
    """The least integer t with t² ≥ `value` > 0."""
    return math.isqrt(math.ceil(value) - 1) + 1
