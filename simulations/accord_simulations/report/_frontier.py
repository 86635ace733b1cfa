"""The plots of a sweep: the score over ε (the privacy-utility frontier), over participants and over dropout."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from accord_simulations.report import _numbers as num
from accord_simulations.report._axes import empty_figure, legend, plain_axes, score_axis, words
from accord_simulations.report._models import DASHES, place, series_colour, series_name
from accord_simulations.report._points import MAX_PANELS, Line, Panel, asked_of, at, epsilon_of, panels
from accord_simulations.report._theme import NARROW_IN, Palette
from accord_simulations.results import SweepPoint, SweepResult

OVER = {"participants": "participants", "dropout": "participants lost in each round"}
"""Axes beside ε that are drawn where they vary, and their labels."""
MARKERS = "osD^vPX*"
FLAT = 0.005  # a reference that moves less than this is drawn as a level line
WIDE_RANGE = 8  # from this ratio of numbers of participants on their axis is logarithmic
Curve = list[tuple[float, float, float, float]]
"""(place, mean, least, most) of a reference over the lines of a panel."""


def frontier(result: SweepResult, ink: Palette, width: float) -> Figure:
    """The metric over epsilon: bars of one standard deviation, references, and what no noise reaches."""
    private = [item for item in result.points if epsilon_of(item) is not None and math.isfinite(item.mean)]
    if not private:
        return empty_figure(ink, width, "no point of this sweep has a privacy loss")
    ticks = sorted({x for item in private if (x := asked_of(item)) is not None})

    def finish(axes: Axes, *, narrow: bool) -> None:
        axes.set_xscale("log")
        _ticks(axes, ticks, narrow=narrow, log=True)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        axes.set_xlabel("ε (log scale): more privacy to the left, more noise")

    return _figure(result, "epsilon", ink, width, finish)


def over(axis: str, result: SweepResult, ink: Palette, width: float) -> Figure:
    """The metric over one of `OVER`, drawn like the frontier."""
    ticks = sorted({x for item in result.points if (x := at(item, axis)) is not None})
    if not any(panel.lines for panel in panels(result.points, axis)):
        return empty_figure(ink, width, "no point of this sweep was scored")

    def finish(axes: Axes, *, narrow: bool) -> None:
        log = axis == "participants" and ticks[-1] >= WIDE_RANGE * ticks[0]
        axes.set_xscale("log" if log else "linear")
        _ticks(axes, ticks, narrow=narrow, log=log)
        shown = (lambda value: f"{100 * value:g} %") if axis == "dropout" else num.count
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(value)))
        axes.set_xlabel(OVER[axis])

    return _figure(result, axis, ink, width, finish)


def _figure(result: SweepResult, axis: str, ink: Palette, width: float, finish: Callable[..., None]) -> Figure:
    """All panels with one score axis and one legend."""
    narrow, found = width <= NARROW_IN, panels(result.points, axis)[:MAX_PANELS]
    columns = 1 if narrow or len(found) == 1 else 2
    rows = math.ceil(len(found) / columns)
    figure = Figure(figsize=(width, 4.4 if len(found) == 1 else 0.7 + 2.9 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten().tolist()
    backdrop = _references(found, axis, ink)
    for axes, panel in zip(grid, found, strict=False):
        plain_axes(axes, ink)
        axes.set_title(words(panel.title, 44), color=ink.ink)
        _panel(axes, ink, panel, axis, backdrop)
        finish(axes, narrow=narrow or columns == 2)
        score_axis(axes, result.metric)
        axes.label_outer(remove_inner_ticks=False)
    for axes in grid[len(found) :]:
        axes.set_axis_off()
    if len(found) == 1:
        legend(grid[0], ink, 1 if narrow else 2)
    else:
        _shared_legend(figure, grid, ink, 2 if narrow else 4)
    return figure


def _shared_legend(figure: Figure, grid: Sequence[Axes], ink: Palette, columns: int) -> None:
    """Every label of any panel once, above them all."""
    known: dict[str, Any] = {}
    for axes in grid:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            known.setdefault(label, handle)
    figure.legend(
        list(known.values()),
        list(known),
        loc="outside upper left",
        ncols=columns,
        labelcolor=ink.ink,
        handlelength=1.6,
        columnspacing=1.1,
    )


def _panel(axes: Axes, ink: Palette, panel: Panel, axis: str, backdrop: Backdrop) -> None:
    """References behind, the lines of the sweep in front."""
    for name, style in backdrop.styles.items():
        _reference(axes, _mean_curve(panel.points, name, axis), style)
    if panel.unprotected:
        best = max(item.mean for item in panel.unprotected)
        axes.axhline(best, color=ink.warn, linewidth=1.2, linestyle=(0, (1, 1.5)), label="not private")
    for number, line in enumerate(panel.lines):
        _line(axes, line, axis, _style(line.mode, number, ink))
    if backdrop.cut:
        axes.set_ylim(bottom=backdrop.floor)


def _style(mode: str | None, number: int, ink: Palette) -> dict[str, Any]:
    """Colour, marker and dash of a line: its noise mode's in every plot, else by its number."""
    known = {
        "site": (ink.ink, "s"),
        "cohort": (ink.joint, "o"),
        "participant": (ink.stage3, "^"),
        "none": (ink.warn, "X"),
    }
    if mode in known:
        colour, marker = known[mode]
        return {"color": colour, "marker": marker, "linestyle": (0, (1, 1.5)) if mode == "none" else "-"}
    dashes = ["-", (0, (5, 1.5)), (0, (1.5, 1.2))]
    return {
        "color": ink.series[number % len(ink.series)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": dashes[number // len(ink.series) % len(dashes)],
    }


def _line(axes: Axes, line: Line, axis: str, style: dict[str, Any]) -> None:
    """One line with bars of one standard deviation."""
    places = [(x, item) for item in line.points if (x := at(item, axis)) is not None]
    axes.errorbar(
        [x for x, _ in places],
        [item.mean for _, item in places],
        yerr=[item.std if num.known(item.std) else 0.0 for _, item in places],
        label=words(line.label, 48),
        markersize=5.5,
        linewidth=1.9,
        elinewidth=1.2,
        capsize=3,
        zorder=4,
        **style,
    )


@dataclass(frozen=True)
class Backdrop:
    """How references are drawn, the same in all panels, and where the axis is `cut` so that none flattens the lines."""

    styles: dict[str, dict[str, Any]]
    floor: float
    cut: bool


def _references(found: Sequence[Panel], axis: str, ink: Palette) -> Backdrop:
    """A reference that goes below the floor says in its label how far."""
    points = [item for panel in found for item in panel.points]
    floor, lowest, styles = _floor(points), math.inf, {}
    for name in sorted({name for item in points for name in item.compare}, key=place):
        values = [low for panel in found for _, _, low, _ in _mean_curve(panel.points, name, axis)]
        if not values:
            continue
        lowest = min(lowest, *values)
        below = f" (down to {num.score(min(values), points[0].metric)})" if min(values) < floor else ""
        styles[name] = {
            "color": series_colour(name, ink),
            "linestyle": DASHES.get(name, (0, (1, 2))),
            "linewidth": 1.2,
            "label": words(series_name(name, private=True) + below, 48),
        }
    return Backdrop(styles, floor, lowest < floor)


def _floor(points: Sequence[SweepPoint]) -> float:
    """Where the axis may be cut, so that a poor reference does not flatten the frontier."""
    means = [item.mean for item in points]
    return min(means) - 0.8 * max(max(means) - min(means), 0.05 * abs(max(means)))


def _reference(axes: Axes, curve: Curve, style: dict[str, Any]) -> None:
    """Level where it does not depend on the axis, else a dashed curve; with its range where lines differ in it."""
    heights = [mean for _, mean, _, _ in curve]
    if heights and max(heights) - min(heights) < FLAT:
        axes.axhline(fmean(heights), **style)
    elif heights:
        axes.plot([x for x, _, _, _ in curve], heights, **style)
    if any(high - low > FLAT for _, _, low, high in curve):
        xs, _, lows, highs = zip(*curve, strict=True)
        axes.fill_between(xs, lows, highs, color=style["color"], alpha=0.12, linewidth=0)


def _mean_curve(points: Sequence[SweepPoint], name: str, axis: str) -> Curve:
    """A comparison's mean at each place of the axis: at the ε that was asked for, as it is the same for every mode."""
    found: dict[float, list[float]] = {}
    for item in points:
        if epsilon_of(item) is None:
            continue
        x, y = asked_of(item) if axis == "epsilon" else at(item, axis), item.compare.get(name)
        if x is not None and y is not None and math.isfinite(y):
            found.setdefault(x, []).append(y)
    return [(x, fmean(ys), min(ys), max(ys)) for x, ys in sorted(found.items())]


def _ticks(axes: Axes, ticks: Sequence[float], *, narrow: bool, log: bool) -> None:
    """Ticks at the measured values, where they are far enough apart."""
    scale: Callable[[float], float] = math.log if log else float
    low, high = scale(ticks[0]), scale(ticks[-1])
    span = high - low or (1.0 if log else 0.1 * abs(high) or 0.1)
    gap = span / (7 if narrow else 12)
    kept = [ticks[0]]
    for value in ticks[1:]:
        if scale(value) - scale(kept[-1]) >= gap:
            kept.append(value)
    ends = low - 0.06 * span, high + 0.06 * span
    axes.set_xlim(*(math.exp(end) if log else end for end in ends))
    axes.xaxis.set_major_locator(FixedLocator(kept))
    axes.xaxis.set_minor_locator(NullLocator())
