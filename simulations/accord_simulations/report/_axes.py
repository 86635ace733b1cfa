"""Quiet axes, legends and labels that all plots share."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from accord_simulations.report import _numbers as num
from accord_simulations.report._theme import Palette


def words(text: str, limit: int = 40) -> str:
    """User text for a plot: one line, bounded."""
    line = "".join(letter if letter.isprintable() else " " for letter in text)
    if len(line) <= limit:
        return line
    tail = limit // 4  # names often differ at their end
    return f"{line[: limit - tail - 1]}…{line[-tail:]}"


def plain_axes(axes: Axes, ink: Palette, *, grid: str = "y") -> None:
    """Quiet axes: no box, a light grid, muted ticks."""
    axes.set_facecolor("none")
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(ink.rule)
    axes.tick_params(colors=ink.muted, length=0, pad=4)
    axes.xaxis.label.set_color(ink.muted)
    axes.yaxis.label.set_color(ink.muted)
    axes.title.set_color(ink.ink)
    if grid == "y":
        axes.yaxis.grid(True, color=ink.rule, linewidth=0.6)
    else:
        axes.xaxis.grid(True, color=ink.rule, linewidth=0.6)


def legend(axes: Axes, ink: Palette, columns: int) -> None:
    """A frameless legend above the axes, where it can hide no data."""
    if axes.get_legend_handles_labels()[1]:
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(0.0, 1.01),
            ncols=columns,
            labelcolor=ink.ink,
            borderaxespad=0.0,
            handlelength=1.6,
            columnspacing=1.1,
        )


def empty_figure(ink: Palette, width: float, text: str) -> Figure:
    """What stands in a file for a plot that has nothing to show."""
    figure = Figure(figsize=(width, 1.0))
    figure.text(0.5, 0.5, text, color=ink.muted, ha="center", va="center")
    return figure


def canvas(ink: Palette, width: float, height: float, *, grid: str = "y") -> tuple[Figure, Axes]:
    """A figure with one set of quiet axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    plain_axes(axes, ink, grid=grid)
    return figure, axes


def score_axis(axes: Axes, metric: str, *, axis: str = "y") -> None:
    """Ticks of a metric, in per cent where it is a fraction."""
    chosen = axes.yaxis if axis == "y" else axes.xaxis
    chosen.set_label_text(words(metric.replace("_", " ")))
    chosen.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    if num.is_fraction(metric):
        low, high = chosen.get_view_interval()
        digits = 0 if high - low > 0.05 else 1 if high - low > 0.005 else 2
        chosen.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.{digits}f} %"))


def round_axis(axes: Axes, first: float, last: float) -> None:
    """Whole rounds from the first to the last."""
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
    pad = 0.5 if last - first < 2 else 0.01 * (last - first)
    axes.set_xlim(first - pad, last + pad)


def end_labels(axes: Axes, ends: Sequence[tuple[float, str]], metric: str | None) -> None:
    """The last value of each line at the right edge, moved apart where two would overlap."""
    low, high = axes.get_ylim()
    gap = 10.0 / (72 * axes.get_figure(root=True).get_figheight() * 0.78) * (high - low)  # type: ignore[union-attr]
    ordered = sorted(ends)
    for (value, colour), place in zip(ordered, spread([value for value, _ in ordered], gap), strict=True):
        text = num.epsilon(value) if metric is None else num.score(value, metric)
        axes.annotate(
            text,
            (1.0, place),
            (5, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            color=colour,
            va="center",
            annotation_clip=False,
        )


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Positions at least `gap` apart for ascending values, at the least squared distance from them.

    This is isotonic regression of `value - row * gap` by pooling adjacent violators.
    """
    pools: list[tuple[float, int]] = []  # mean and size
    for row, value in enumerate(values):
        mean, size = value - row * gap, 1
        while pools and pools[-1][0] > mean:
            before, count = pools.pop()
            mean, size = (before * count + mean * size) / (count + size), count + size
        pools.append((mean, size))
    flat = [mean for mean, size in pools for _ in range(size)]
    return [mean + row * gap for row, mean in enumerate(flat)]
