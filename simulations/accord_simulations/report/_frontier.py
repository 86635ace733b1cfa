"""The privacy-utility frontier of a sweep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from accord_simulations.report import _numbers as num
from accord_simulations.report._axes import canvas, empty_figure, legend, score_axis, words
from accord_simulations.report._models import DASHES, place, series_colour, series_name
from accord_simulations.report._theme import NARROW_IN, Palette
from accord_simulations.results import SweepPoint, SweepResult

MARKERS = "osD^vPX*"
FLAT = 0.005  # a reference that moves less than this over epsilon is drawn as a level line
Curve = list[tuple[float, float]]


def frontier(result: SweepResult, ink: Palette, width: float) -> Figure:
    """The metric over epsilon: one line per setting, bars of one standard deviation, references."""
    private = [item for item in result.points if epsilon_of(item) is not None and math.isfinite(item.mean)]
    if not private:
        return empty_figure(ink, width, "no point of this sweep has a privacy loss")
    figure, axes = canvas(ink, width, 4.4)
    ticks = sorted({x for item in private if (x := asked_of(item)) is not None})
    floor = _floor(private)
    lowest = _references(axes, ink, private, floor)
    _unprotected(axes, ink, result.points)
    _lines(axes, ink, private)
    axes.set_xscale("log")
    _epsilon_axis(axes, ticks, narrow=width <= NARROW_IN)
    if lowest < floor:
        axes.set_ylim(bottom=floor)
    score_axis(axes, result.metric)
    legend(axes, ink, 1 if width <= NARROW_IN else 2)
    return figure


def epsilon_of(point: SweepPoint) -> float | None:
    """The privacy loss of a point: what it spent, else what it was asked for; none without noise."""
    if point.settings.get("noise") == "none":
        return None
    value = point.epsilon if point.epsilon is not None else point.settings.get("epsilon")
    if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        return None
    return float(value)


def asked_of(point: SweepPoint) -> float | None:
    """The budget that a point belongs to: what it was asked for, else what it spent; none without noise."""
    spent, asked = epsilon_of(point), point.settings.get("epsilon")
    if spent is None or not isinstance(asked, int | float) or not math.isfinite(asked) or asked <= 0:
        return spent
    return float(asked)


def varying(points: Sequence[SweepPoint]) -> list[str]:
    """The settings other than epsilon that differ between points."""
    names = sorted({name for item in points for name in item.settings} - {"epsilon"})
    return [name for name in names if len({repr(item.settings.get(name)) for item in points}) > 1]


def setting(name: str, value: Any) -> str:
    """One setting in a legend or table: `10 participants`, `depth lora`."""
    if name in ("participants", "rounds") and isinstance(value, int):
        return num.plural(value, name[:-1])
    if name == "dropout" and isinstance(value, int | float):
        return f"{100 * value:g} % dropout"
    return f"{name.replace('_', ' ')} {num.DASH if value is None else value}"


def _lines(axes: Axes, ink: Palette, points: Sequence[SweepPoint]) -> None:
    """One line with error bars for each combination of the other settings."""
    names = varying(points)
    groups: dict[str, list[tuple[float, float, float]]] = {}
    for item in points:
        label = ", ".join(setting(name, item.settings.get(name)) for name in names) or "joint model"
        x = epsilon_of(item)
        if x is not None:
            groups.setdefault(label, []).append((x, item.mean, item.std if num.known(item.std) else 0.0))
    styles = ["-", (0, (5, 1.5)), (0, (1.5, 1.2))]
    for number, (label, rows) in enumerate(groups.items()):
        xs, ys, errors = zip(*sorted(rows), strict=True)
        axes.errorbar(
            xs,
            ys,
            yerr=errors,
            label=words(label, 48),
            color=ink.series[number % len(ink.series)],
            marker=MARKERS[number % len(MARKERS)],
            linestyle=styles[number // len(ink.series) % len(styles)],
            markersize=5.5,
            linewidth=1.9,
            elinewidth=1.2,
            capsize=3,
            zorder=4,
        )


def _floor(points: Sequence[SweepPoint]) -> float:
    """Where the axis may be cut, so that a poor reference does not flatten the frontier."""
    means = [item.mean for item in points]
    return min(means) - 0.8 * max(max(means) - min(means), 0.05 * abs(max(means)))


def _references(axes: Axes, ink: Palette, points: Sequence[SweepPoint], floor: float) -> float:
    """The mean of each comparison: level where it does not depend on epsilon, else a dashed curve.

    Returns:
        The lowest value; a line that goes below `floor` says in its label how far.
    """
    lowest = math.inf
    for name in sorted({name for item in points for name in item.compare}, key=place):
        curve = _mean_curve(points, name)
        if not curve:
            continue
        low, high = min(y for _, y in curve), max(y for _, y in curve)
        lowest = min(lowest, low)
        below = f" (down to {num.score(low, points[0].metric)})" if low < floor else ""
        style: dict[str, Any] = {
            "color": series_colour(name, ink),
            "linestyle": DASHES.get(name, (0, (1, 2))),
            "linewidth": 1.2,
            "label": words(series_name(name, private=True) + below, 48),
        }
        if high - low < FLAT:
            axes.axhline(fmean(y for _, y in curve), **style)
        else:
            axes.plot(*zip(*curve, strict=True), **style)
    return lowest


def _mean_curve(points: Sequence[SweepPoint], name: str) -> Curve:
    """A comparison's mean at each epsilon."""
    found: dict[float, list[float]] = {}
    for item in points:
        x, y = epsilon_of(item), item.compare.get(name)
        if x is not None and y is not None and math.isfinite(y):
            found.setdefault(x, []).append(y)
    return [(x, fmean(ys)) for x, ys in sorted(found.items())]


def _unprotected(axes: Axes, ink: Palette, points: Sequence[SweepPoint]) -> None:
    """Points without noise have no place on the axis: the best of them is a level line."""
    values = [item.mean for item in points if epsilon_of(item) is None and math.isfinite(item.mean)]
    if values:
        axes.axhline(max(values), color=ink.warn, linewidth=1.2, linestyle=(0, (1, 1.5)), label="not private")


def _epsilon_axis(axes: Axes, ticks: Sequence[float], *, narrow: bool) -> None:
    """A logarithmic axis with a tick at the measured values, where they are far enough apart."""
    low, high = ticks[0], ticks[-1]
    span = math.log(high / low) or 1.0
    gap = span / (7 if narrow else 12)
    kept = [low]
    for value in ticks[1:]:
        if math.log(value / kept[-1]) >= gap:
            kept.append(value)
    axes.set_xlim(low * math.exp(-0.06 * span), high * math.exp(0.06 * span))
    axes.xaxis.set_major_locator(FixedLocator(kept))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.set_xlabel("ε (log scale): more privacy to the left, more noise")
