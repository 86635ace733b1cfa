"""What the rounds cost: seconds by stage and bytes by participant, one bar a round (or a few rounds)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from accord_simulations.report import _numbers as num
from accord_simulations.report._axes import empty_figure, legend, plain_axes, words
from accord_simulations.report._theme import NARROW_IN, Palette
from accord_simulations.results import RoundResult, SimulationResult

KNOWN_STAGES = ("train", "aggregate", "score", "other")
OTHER = "other"
MAX_BARS = 60  # rounds that still get a bar of their own


def costs(result: SimulationResult, ink: Palette, width: float) -> Figure:
    """Seconds of each round by stage, and the bytes that one participant moves in it."""
    if not result.rounds:
        return empty_figure(ink, width, "no round was finished")
    narrow = width <= NARROW_IN
    figure = Figure(figsize=(width, 5.0 if narrow else 2.9), layout="constrained")
    left, right = figure.subplots(2, 1) if narrow else figure.subplots(1, 2)
    groups = _bins(result.rounds)
    names = stage_names([item.stage_s for item in result.rounds], len(ink.stages))
    seconds = [(name, ink.stages[place], _stage(name, names)) for place, name in enumerate(names)]
    _stack(left, ink, groups, seconds)
    left.set_ylabel("seconds per round")
    traffic = [("upload", ink.joint, _upload), ("download", ink.stage2, _download)]
    _stack(right, ink, groups, traffic)
    right.set_ylabel("bytes per participant and round")
    right.yaxis.set_major_formatter(FuncFormatter(lambda value, _: num.size(value)))
    return figure


def stage_names(stages: Sequence[dict[str, float]], limit: int) -> list[str]:
    """The stages to tell apart, the usual ones first; the smallest beyond `limit` become `other`."""
    totals: dict[str, float] = {}
    for one in stages:
        for name, seconds in one.items():
            totals[name] = totals.get(name, 0.0) + seconds
    rank = {name: place for place, name in enumerate(KNOWN_STAGES)}
    kept = sorted(totals, key=lambda name: (-totals[name], name))
    if len(kept) > limit:
        kept = [*[name for name in kept if name != OTHER][: limit - 1], OTHER]
    return sorted(kept, key=lambda name: (name == OTHER, rank.get(name, len(rank)), name))


def _stage(name: str, names: Sequence[str]) -> Callable[[RoundResult], float]:
    """Seconds of one stage in a round; `other` also takes what has no name of its own."""

    def seconds(item: RoundResult) -> float:
        rest = sum(value for key, value in item.stage_s.items() if key not in names) if name == OTHER else 0.0
        return item.stage_s.get(name, 0.0) + rest

    return seconds


def _upload(item: RoundResult) -> float:
    return item.upload_bytes / max(item.cohort, 1)


def _download(item: RoundResult) -> float:
    return item.download_bytes / max(item.cohort, 1)


def _stack(
    axes: Axes,
    ink: Palette,
    groups: Sequence[Sequence[RoundResult]],
    parts: Sequence[tuple[str, str, Callable[[RoundResult], float]]],
) -> None:
    """Stacked bars of the mean over each group of rounds."""
    plain_axes(axes, ink)
    first, each = groups[0][0].round, len(groups[0])
    edges = [first - 0.5 + each * place for place in range(len(groups))]
    base = [0.0] * len(groups)
    for name, colour, value in parts:
        means = [sum(map(value, group)) / len(group) for group in groups]
        axes.bar(edges, means, 0.86 * each, bottom=base, align="edge", color=colour, linewidth=0, label=words(name))
        base = [low + mean for low, mean in zip(base, means, strict=True)]
    axes.set_xlabel("round" if each == 1 else f"round (mean of {each})")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    legend(axes, ink, 4)


def _bins(rounds: Sequence[RoundResult]) -> list[list[RoundResult]]:
    """At most `MAX_BARS` consecutive groups of rounds, all of one length but the last."""
    each = max(1, math.ceil(len(rounds) / MAX_BARS))
    return [list(rounds[start : start + each]) for start in range(0, len(rounds), each)]
