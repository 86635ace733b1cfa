"""The plots of one run. Every function draws one figure from the result, a palette and a width."""

from __future__ import annotations

import math
from statistics import median

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from accord_simulations.report import _numbers as num
from accord_simulations.report._axes import (
    canvas,
    empty_figure,
    end_labels,
    legend,
    round_axis,
    score_axis,
    words,
)
from accord_simulations.report._models import (
    DASHES,
    ceiling,
    final_scores,
    is_private,
    place,
    series_colour,
    series_name,
)
from accord_simulations.report._theme import NARROW_IN, Palette
from accord_simulations.results import ParticipantResult, SimulationResult

MAX_ROWS = 30  # participants that still get a line and a name of their own


def accuracy_by_round(result: SimulationResult, ink: Palette, width: float) -> Figure:
    """The joint model round by round, the comparison curves, and the ceiling."""
    curve = [(item.round, item.metrics[result.metric]) for item in result.rounds if result.metric in item.metrics]
    curve = [(x, y) for x, y in curve if math.isfinite(y)]
    if not curve:
        return empty_figure(ink, width, "no round was scored")
    figure, axes = canvas(ink, width, 3.3)
    ends = [*_comparison_lines(axes, result, ink, (curve[0][0], curve[-1][0]))]
    axes.plot(
        *zip(*curve, strict=True),
        color=ink.joint,
        linewidth=2.2,
        label="joint model",
        zorder=4,
        marker="o" if len(curve) < 3 else "",
        markersize=4,
    )
    ends.append((curve[-1][1], ink.joint))
    best = ceiling(result)
    if best is not None:
        axes.axhline(best, color=ink.muted, linewidth=1.0, linestyle=(0, (1, 2)), label="attainable")
        ends.append((best, ink.muted))
    score_axis(axes, result.metric)
    round_axis(axes, curve[0][0], curve[-1][0])
    end_labels(axes, ends, result.metric)
    legend(axes, ink, 2 if width <= NARROW_IN else 3)
    return figure


def _comparison_lines(
    axes: Axes, result: SimulationResult, ink: Palette, span: tuple[int, int]
) -> list[tuple[float, str]]:
    """Each comparison as its curve, or as a level line where it has none; its last value and colour."""
    ends = []
    for item in sorted(result.comparisons, key=lambda item: place(item.name)):
        points = [(span[0] + step, y) for step, y in enumerate(item.curve) if math.isfinite(y)]
        final = item.metrics.get(result.metric)
        level = final if final is not None and math.isfinite(final) else None
        if len(points) < 2 and level is not None:
            points = [(span[0], level), (max(span[1], span[0] + 1), level)]
        if not points:
            continue
        colour = series_colour(item.name, ink)
        axes.plot(
            *zip(*points, strict=True),
            color=colour,
            linestyle=DASHES.get(item.name, (0, (3, 1, 1, 1))),
            linewidth=1.4,
            label=series_name(item.name, is_private(result)),
        )
        ends.append((points[-1][1], colour))
    return ends


def participants(result: SimulationResult, ink: Palette, width: float) -> Figure:
    """Per participant: the joint model on its own held-out records against a model trained alone."""
    if not any(_pair(item, result.metric) != (None, None) for item in result.participants):
        return empty_figure(ink, width, "no participant was scored")
    if len(result.participants) <= MAX_ROWS:
        return _dumbbells(result, ink, width)
    return _distributions(result, ink, width)


def _dumbbells(result: SimulationResult, ink: Palette, width: float) -> Figure:
    """One row and name per participant, best first."""
    rows = sorted(result.participants, key=lambda item: (_rank(item, result.metric), item.name))
    figure, axes = canvas(ink, width, 0.75 + 0.24 * len(rows), grid="x")
    for row, item in enumerate(rows):
        joint, alone = _pair(item, result.metric)
        if joint is not None and alone is not None:
            axes.plot([alone, joint], [row, row], color=ink.rule, linewidth=2.0, zorder=1)
        if alone is not None:
            axes.plot(
                [alone],
                [row],
                "D",
                color=ink.alone,
                markersize=4.5,
                zorder=3,
                label=None if axes.get_legend_handles_labels()[1].count("alone") else "alone",
            )
        if joint is not None:
            axes.plot(
                [joint],
                [row],
                "o",
                color=ink.joint,
                markersize=6,
                zorder=4,
                label=None if "joint model" in axes.get_legend_handles_labels()[1] else "joint model",
            )
    limit = 20 if width <= NARROW_IN else 34
    axes.set_yticks(range(len(rows)), [words(item.name, limit) for item in rows])
    for label in axes.get_yticklabels():
        label.set_color(ink.ink)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.margins(x=0.06)
    score_axis(axes, result.metric, axis="x")
    legend(axes, ink, 2)
    return figure


def _distributions(result: SimulationResult, ink: Palette, width: float) -> Figure:
    """How many participants reach which score: one histogram each for joint and alone."""
    pairs = [_pair(item, result.metric) for item in result.participants]
    groups = [
        ("joint model", [joint for joint, _ in pairs if joint is not None], ink.joint, (0, ())),
        ("alone", [alone for _, alone in pairs if alone is not None], ink.alone, DASHES["alone"]),
    ]
    values = [value for _, group, _, _ in groups for value in group]
    low, high = min(values), max(values)
    step = _bin_width(high - low)
    first = math.floor(low / step)
    edges = [row * step for row in range(first, math.floor(high / step) + 2)]
    figure, axes = canvas(ink, width, 2.9)
    for name, group, colour, dash in groups:
        if not group:
            continue
        heights = [0] * (len(edges) - 1)
        for value in group:
            heights[min(math.floor(value / step + 1e-9) - first, len(heights) - 1)] += 1
        middle = median(group)
        label = f"{name}: median {num.score(middle, result.metric)} ({num.plural(len(group), 'participant')})"
        used = [row for row, height in enumerate(heights) if height]
        shown, ends = heights[used[0] : used[-1] + 1], edges[used[0] : used[-1] + 2]
        axes.stairs(shown, ends, fill=True, color=colour, alpha=0.22)
        axes.stairs(shown, ends, color=colour, linewidth=1.4, label=label)
        axes.axvline(middle, color=colour, linewidth=1.2, linestyle=dash)
    axes.set_ylabel("participants")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    score_axis(axes, result.metric, axis="x")
    legend(axes, ink, 1)
    return figure


def epsilon(result: SimulationResult, ink: Palette, width: float) -> Figure:
    """The privacy loss spent after each round, its target, and where an attempt was repeated."""
    spent = [(item.round, item.epsilon) for item in result.rounds]
    curve = [(x, y) for x, y in spent if y is not None and math.isfinite(y)]
    if not is_private(result) or not curve:
        return empty_figure(ink, width, "no privacy loss was accounted: this run is not private")
    figure, axes = canvas(ink, width, 2.6)
    xs, ys = zip(*curve, strict=True)
    axes.fill_between(xs, ys, color=ink.joint, alpha=0.10, linewidth=0)
    axes.plot(xs, ys, color=ink.joint, linewidth=2.2, label="ε spent", marker="o" if len(xs) < 3 else "")
    ends = [(ys[-1], ink.joint)]
    if result.epsilon_target is not None and math.isfinite(result.epsilon_target):
        axes.axhline(result.epsilon_target, color=ink.warn, linewidth=1.2, linestyle=(0, (5, 2)), label="target")
        if abs(result.epsilon_target - ys[-1]) > 0.005 * result.epsilon_target:
            ends.append((result.epsilon_target, ink.warn))
    repeated = [(item.round, item.epsilon) for item in result.rounds if item.aborted_attempts and item.epsilon]
    if repeated:
        axes.plot(*zip(*repeated, strict=True), "v", color=ink.alone, markersize=5, label="repeated attempt")
    axes.set_ylim(0, None)
    axes.margins(y=0.12)
    axes.set_ylabel("ε")
    round_axis(axes, xs[0], xs[-1])
    end_labels(axes, ends, None)
    legend(axes, ink, 3)
    return figure


def comparisons(result: SimulationResult, ink: Palette, width: float) -> Figure:
    """The final score of the joint model beside every reference."""
    scores = final_scores(result)
    if not scores:
        return empty_figure(ink, width, "nothing was scored")
    figure, axes = canvas(ink, width, 0.6 + 0.34 * len(scores), grid="x")
    for row, (name, value) in enumerate(reversed(scores.items())):
        colour = series_colour(name, ink)
        bold = name == "joint"
        axes.plot([value], [row], "D" if name == "ceiling" else "o", color=colour, markersize=9 if bold else 6.5)
        axes.annotate(
            num.score(value, result.metric),
            (value, row),
            (8, 0),
            textcoords="offset points",
            va="center",
            color=ink.ink,
            weight="bold" if bold else "normal",
        )
    names = [series_name(name, is_private(result)) for name in reversed(scores)]
    axes.set_yticks(range(len(names)), [words(name) for name in names])
    for label in axes.get_yticklabels():
        label.set_color(ink.ink)
    axes.set_ylim(-0.6, len(names) - 0.4)
    low, high = min(scores.values()), max(scores.values())
    room = (high - low) or 0.1 * abs(high) or 0.1
    axes.set_xlim(low - 0.08 * room, high + (0.34 if width <= NARROW_IN else 0.16) * room)
    score_axis(axes, result.metric, axis="x")
    return figure


def survivors(result: SimulationResult, ink: Palette, width: float) -> Figure:
    """How many participants began and finished each round."""
    if not result.rounds:
        return empty_figure(ink, width, "no round was finished")
    figure, axes = canvas(ink, width, 2.2)
    xs = [item.round for item in result.rounds]
    edges = [xs[0] - 0.5, *[x + 0.5 for x in xs]]
    axes.stairs([item.cohort for item in result.rounds], edges, fill=True, color=ink.rule, label="cohort")
    finished = [item.survivors for item in result.rounds]
    axes.stairs(finished, edges, color=ink.joint, linewidth=1.8, baseline=None, label="survivors")
    axes.set_ylim(0, 1.08 * max(item.cohort for item in result.rounds) or 1)
    axes.set_ylabel("participants")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    round_axis(axes, xs[0], xs[-1])
    legend(axes, ink, 2)
    return figure


def _pair(item: ParticipantResult, metric: str) -> tuple[float | None, float | None]:
    """Joint and alone score of a participant; not finite is missing."""
    both = item.metrics.get(metric), (item.alone or {}).get(metric)
    joint, alone = (value if value is not None and math.isfinite(value) else None for value in both)
    return joint, alone


def _rank(item: ParticipantResult, metric: str) -> float:
    """Sort key of a row: the joint score, else the score alone."""
    joint, alone = _pair(item, metric)
    return joint if joint is not None else alone if alone is not None else -math.inf


def _bin_width(span: float) -> float:
    """A round bin width that gives about thirty bins at most."""
    rough = max(span, 1e-6) / 30
    power = 10.0 ** math.floor(math.log10(rough))
    return next(unit * power for unit in (1, 2, 2.5, 5, 10) if unit * power >= rough)
