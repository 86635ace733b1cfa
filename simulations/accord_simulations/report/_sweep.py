"""What the template shows of a sweep."""

from __future__ import annotations

import math
from typing import Any

from accord_simulations.report import _numbers as num
from accord_simulations.report._frontier import asked_of, epsilon_of, setting, varying
from accord_simulations.report._models import place, series_name
from accord_simulations.results import SweepPoint, SweepResult


def view(result: SweepResult) -> dict[str, Any]:
    """The paragraph, the table and its columns."""
    names = varying(result.points)
    references = sorted({name for item in result.points for name in item.compare}, key=place)
    return {
        "story": story(result),
        "settings": [name.replace("_", " ") for name in names],
        "references": [series_name(name, private=True) for name in references],
        "constants": _constants(result, names),
        "rows": [_row(item, names, references) for item in result.points],
        "unprotected": sum(1 for item in result.points if epsilon_of(item) is None),
    }


def story(result: SweepResult) -> str:
    """The best point at the strictest and at the loosest budget."""
    metric = result.metric.replace("_", " ")
    scored = [item for item in result.points if math.isfinite(item.mean)]
    budgets = sorted({x for item in scored if (x := asked_of(item)) is not None})
    if not budgets:
        return "No point of this sweep has a privacy loss, so there is no frontier to draw."
    parts = [_best(scored, budget, result.metric) for budget in dict.fromkeys((budgets[0], budgets[-1]))]
    return f"The best setting reaches {' and '.join(parts)} ({metric}, mean over seeds)."


def _best(points: list[SweepPoint], budget: float, metric: str) -> str:
    """`82.9 % ± 0.4 at ε = 1`."""
    group = [item for item in points if asked_of(item) == budget]
    best = max(group, key=lambda item: item.mean if num.is_fraction(metric) else -item.mean)
    return f"{_mean(best)} at ε{num.JOIN}={num.JOIN}{num.budget(budget)}"


def _mean(point: SweepPoint) -> str:
    """A mean with its standard deviation over seeds, where there is more than one."""
    text = num.score(point.mean, point.metric)
    if point.seeds < 2 or not math.isfinite(point.std):
        return text
    spread = f"{100 * point.std:.1f}" if num.is_fraction(point.metric) else f"{point.std:.2g}"
    return f"{text} ± {spread}"


def _constants(result: SweepResult, names: list[str]) -> list[tuple[str, str]]:
    """Settings that are the same at every point."""
    first = result.points[0].settings if result.points else {}
    kept = [(name, value) for name, value in sorted(first.items()) if name not in (*names, "epsilon")]
    return [(name.replace("_", " "), num.DASH if value is None else str(value)) for name, value in kept]


def _row(point: SweepPoint, names: list[str], references: list[str]) -> dict[str, Any]:
    asked = point.settings.get("epsilon")
    return {
        "target": num.budget(asked) if isinstance(asked, int | float) else num.DASH,
        "epsilon": num.epsilon(epsilon_of(point)) if point.epsilon is not None else num.DASH,
        "private": epsilon_of(point) is not None,
        "settings": [_cell(name, point.settings.get(name)) for name in names],
        "mean": _mean(point),
        "seeds": point.seeds,
        "compare": [num.score(point.compare.get(name), point.metric) for name in references],
        "seconds": num.duration(point.seconds),
    }


def _cell(name: str, value: Any) -> str:
    """A setting in its column, without repeating the name."""
    return setting(name, value) if name == "dropout" else num.DASH if value is None else str(value)
