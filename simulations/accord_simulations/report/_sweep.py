"""What the template shows of a sweep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from accord_simulations.report import _numbers as num
from accord_simulations.report._models import place, series_name
from accord_simulations.report._points import MAX_PANELS, asked_of, epsilon_of, modes, panels, setting, varying
from accord_simulations.report._privacy import AGAINST, HOW, PROTECTS
from accord_simulations.results import SweepPoint, SweepResult, few_sites

_SHORT = {"alone": "alone", "central": "pooled", "nonprivate": "no noise"}
"""Heads of columns: the plots above give the references' names in full."""


def view(result: SweepResult) -> dict[str, Any]:
    """The paragraph, the table and its columns."""
    names = varying(result.points)
    references = sorted({name for item in result.points for name in item.compare}, key=place)
    return {
        "story": story(result),
        "warnings": _warnings(result),
        "modes": _modes(result),
        "settings": [name.replace("_", " ") for name in names],
        "references": [_SHORT.get(name, series_name(name, private=True)) for name in references],
        "constants": _constants(result, names),
        "rows": [_row(item, names, references) for item in result.points],
        "left_out": {axis: _left_out(result, axis) for axis in ("epsilon", "participants", "dropout")},
    }


def story(result: SweepResult) -> str:
    """The best point at the strictest and at the loosest budget, of every noise mode."""
    metric = result.metric.replace("_", " ")
    scored = [item for item in result.points if math.isfinite(item.mean)]
    budgets = sorted({x for item in scored if (x := asked_of(item)) is not None})
    if not budgets:
        return "No point of this sweep has a privacy loss, so there is no frontier to draw."
    ends = list(dict.fromkeys((budgets[0], budgets[-1])))
    if len(modes(scored)) > 1:
        sentences = " ".join(_by_mode(scored, budget, result.metric) for budget in ends)
        return f"{sentences}{_unprotected(scored, result.metric)} ({metric}, best setting of each, mean over seeds.)"
    parts = [_best([item for item in scored if asked_of(item) == budget], result.metric) for budget in ends]
    shown = [f"{_mean(best)} at {setting('epsilon', budget)}" for best, budget in zip(parts, ends, strict=True)]
    return f"The best setting reaches {' and '.join(shown)} ({metric}, mean over seeds)."


def _by_mode(points: Sequence[SweepPoint], budget: float, metric: str) -> str:
    """`At ε = 1, noise shared by the cohort reaches 82.9 %, noise of each site 71.7 %.`"""
    group = [item for item in points if asked_of(item) == budget]
    best = {
        mode: _mean(_best([item for item in group if item.settings.get("noise") == mode], metric))
        for mode in modes(group)
    }
    reached = _listed([f"{mode} noise reaches {value}" for mode, value in best.items()])
    return f"At {setting('epsilon', budget)}, {reached}."


def _unprotected(points: Sequence[SweepPoint], metric: str) -> str:
    bare = [item for item in points if epsilon_of(item) is None]
    return f" Without any privacy it is {_mean(_best(bare, metric))}." if bare else ""


def _listed(parts: Sequence[str]) -> str:
    return " and ".join(part for part in (", ".join(parts[:-1]), *parts[-1:]) if part)


def _best(points: Sequence[SweepPoint], metric: str) -> SweepPoint:
    return max(points, key=lambda item: item.mean if num.is_fraction(metric) else -item.mean)


def _mean(point: SweepPoint) -> str:
    """A mean with its standard deviation over seeds, where there is more than one."""
    text = num.score(point.mean, point.metric)
    if point.seeds < 2 or not math.isfinite(point.std):
        return text
    spread = f"{100 * point.std:.1f}" if num.is_fraction(point.metric) else f"{point.std:.2g}"
    return f"{text} ± {spread}"


def _warnings(result: SweepResult) -> list[tuple[str, str]]:
    """What a reader must not overlook: a title and one sentence each."""
    found = []
    bare = sum(1 for item in result.points if epsilon_of(item) is None)
    if bare:
        text = (
            f"{bare} of {len(result.points)} points ran without noise: no ε holds for them. They are level lines or "
            "marked in plots and table, for comparison only."
        )
        found.append(("Some points are NOT private", text))
    hidden = [item.settings for item in result.points if item.settings.get("noise") == "participant"]
    few = few_sites("participant", min(int(one.get("participants") or 0) for one in hidden)) if hidden else None
    return [*found, ("Few participants", few)] if few else found


def _modes(result: SweepResult) -> list[tuple[str, str, str, str]]:
    """Each noise mode of the sweep: its name, who is protected, against whom, and how."""
    found = [mode for mode in modes(result.points) if mode in PROTECTS]
    return [(mode, PROTECTS[mode], AGAINST[mode], HOW[mode]) for mode in found]


def _left_out(result: SweepResult, axis: str) -> str:
    """A sentence where not every panel is drawn."""
    count = len(panels(result.points, axis))
    return f"The first {MAX_PANELS} of {count} combinations are drawn; the table has all." if count > MAX_PANELS else ""


def _constants(result: SweepResult, names: list[str]) -> list[tuple[str, str]]:
    """Settings that are the same at every point."""
    first = result.points[0].settings if result.points else {}
    kept = [(name, value) for name, value in sorted(first.items()) if name not in (*names, "epsilon")]
    return [(name.replace("_", " "), _cell(name, value)) for name, value in kept]


def _row(point: SweepPoint, names: list[str], references: list[str]) -> dict[str, Any]:
    asked = point.settings.get("epsilon")
    return {
        "target": num.budget(asked) if isinstance(asked, int | float) else num.DASH,
        "epsilon": num.epsilon(epsilon_of(point)) if point.epsilon is not None else num.DASH,
        "collude": num.epsilon(point.epsilon_all_collude),
        "private": epsilon_of(point) is not None,
        "settings": [_cell(name, point.settings.get(name)) for name in names],
        "mean": _mean(point),
        "seeds": point.seeds,
        "compare": [num.score(point.compare.get(name), point.metric) for name in references],
        "rounds": num.count(point.rounds),
        "trips": num.count(point.trips_per_run),
        "upload": num.size(point.upload_bytes_per_site_run),
        "seconds": num.duration(point.seconds),
    }


def _cell(name: str, value: Any) -> str:
    """A setting in its column, without repeating the name."""
    if name == "dropout" and isinstance(value, int | float):
        return f"{100 * value:g} %"
    return num.DASH if value is None else str(value)
