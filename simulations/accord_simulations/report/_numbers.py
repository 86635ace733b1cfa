"""Numbers as people read them. A missing or non-finite value is always a dash, never a zero."""

from __future__ import annotations

import math

DASH = "–"
MINUS = "−"
JOIN = "\u00a0"  # between a number and its unit: no line break
PLAIN_METRICS = ("loss", "perplexity", "nll", "brier", "error", "mae", "mse", "rmse")


def known(value: float | None) -> bool:
    """Whether there is a finite number to show."""
    return value is not None and math.isfinite(value)


def is_fraction(metric: str) -> bool:
    """Whether a metric reads as a percentage (losses and errors do not)."""
    return not any(word in metric.lower() for word in PLAIN_METRICS)


def score(value: float | None, metric: str = "accuracy") -> str:
    """A metric: `91.0 %`, or a plain number for losses."""
    if value is None or not math.isfinite(value):
        return DASH
    text = f"{100 * value:.1f}{JOIN}%" if is_fraction(metric) else f"{value:.4g}"
    return text.replace("-", MINUS)


def difference(value: float | None, metric: str = "accuracy") -> str:
    """A signed gap between two scores: `+1.2 points`."""
    if value is None or not math.isfinite(value):
        return DASH
    text = f"{100 * value:+.1f}{JOIN}points" if is_fraction(metric) else f"{value:+.4g}"
    return text.replace("-", MINUS).replace(f"{MINUS}0.0{JOIN}", f"0.0{JOIN}").replace(f"+0.0{JOIN}", f"0.0{JOIN}")


def points(value: float, metric: str = "accuracy") -> str:
    """The size of a gap, unsigned: `1.2 points`."""
    return difference(abs(value), metric).lstrip("+")


def epsilon(value: float | None) -> str:
    """A privacy loss with three digits, rounded up: what is shown is never below the claim."""
    if value is None or math.isnan(value):
        return DASH
    if math.isinf(value):
        return "∞"
    if value <= 0:
        return f"{value:.2f}"
    scale = 10.0 ** _digits(value)
    shown = math.ceil(value * scale - 1e-6) / scale
    return f"{shown:,.{_digits(shown)}f}"


def _digits(value: float) -> int:
    """Decimals of a positive number with three significant digits."""
    return max(0, 2 - math.floor(math.log10(value) + 1e-12))


def budget(value: float | None) -> str:
    """A privacy target, exactly as it was set: `8`, `0.5`."""
    return DASH if value is None or math.isnan(value) else "∞" if math.isinf(value) else f"{value:g}"


def small(value: float | None) -> str:
    """A probability such as delta: `1e-5`."""
    if value is None or not math.isfinite(value):
        return DASH
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    if not value:
        return "0"
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}".replace("-", MINUS)


def size(value: float | None) -> str:
    """Bytes in decimal units: `53.2 kB`."""
    if value is None or not math.isfinite(value):
        return DASH
    amount, unit = float(value), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if amount < 999.5:
            break
        amount, unit = amount / 1000, larger
    digits = 0 if unit == "B" or amount >= 99.95 else 1
    return f"{amount:.{digits}f}{JOIN}{unit}"


def duration(value: float | None) -> str:
    """Seconds as `0.4 s`, `48 s`, `4 min 10 s` or `2 h 05 min`."""
    if value is None or not math.isfinite(value):
        return DASH
    if value < 9.95:
        return f"{value:.1f}{JOIN}s" if value >= 0.0995 or not value else f"{1000 * value:.2g}{JOIN}ms"
    whole = round(value)
    if whole < 60:
        return f"{whole}{JOIN}s"
    if whole < 3600:
        return f"{whole // 60}{JOIN}min{JOIN}{whole % 60:02d}{JOIN}s"
    return f"{whole // 3600}{JOIN}h{JOIN}{whole % 3600 // 60:02d}{JOIN}min"


def count(value: float | None) -> str:
    """A whole number with thousands separators."""
    return DASH if value is None or not math.isfinite(value) else f"{round(value):,}"


def plural(number: int, noun: str) -> str:
    """`1 round`, `12 rounds`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
