"""The models that a report compares: their names, colours, order and final scores."""

from __future__ import annotations

import math

from accord_simulations.report._theme import Palette
from accord_simulations.results import SimulationResult

ORDER = ("alone", "joint", "central", "nonprivate", "central_nonprivate", "ceiling")
DASHES = {
    "alone": (0, (1.2, 1.8)),
    "central": (0, (5, 2)),
    "nonprivate": (0, (5, 1.6, 1.2, 1.6)),
    "central_nonprivate": (0, (2.4, 1.6)),
}


def series_name(name: str, private: bool) -> str:
    """The reader's name of a model."""
    names = {
        "joint": "joint model",
        "alone": "alone, same ε" if private else "alone",
        "central": "pooled data, same ε" if private else "pooled data",
        "nonprivate": "joint, no noise",
        "central_nonprivate": "pooled, no noise",
        "ceiling": "attainable",
    }
    return names.get(name, name.replace("_", " "))


def series_colour(name: str, ink: Palette) -> str:
    """The colour of a model, the same in every plot."""
    colours = {
        "joint": ink.joint,
        "alone": ink.alone,
        "central": ink.central,
        "nonprivate": ink.nonprivate,
        "ceiling": ink.muted,
    }
    return colours.get(name, ink.reference)


def is_private(result: SimulationResult) -> bool:
    """Whether the run has a privacy loss to state: noise that was accounted."""
    return result.epsilon is not None and noise_mode(result) != "none"


def noise_mode(result: SimulationResult) -> str | None:
    """The plan's noise mode, where the plan names one."""
    privacy = result.plan.get("privacy")
    mode = privacy.get("noise") if isinstance(privacy, dict) else None
    return None if mode is None else str(mode)


def ceiling(result: SimulationResult) -> float | None:
    """The best score that any model can reach on this data, where it is known."""
    value = result.population.get("ceiling")
    if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        return None
    return float(value)


def final_scores(result: SimulationResult) -> dict[str, float]:
    """The main metric of every model that has one, worst to best by meaning."""
    found = {item.name: item.metrics.get(result.metric) for item in result.comparisons}
    found["joint"] = result.metrics.get(result.metric)
    found["ceiling"] = ceiling(result)
    known = {name: value for name, value in found.items() if value is not None and math.isfinite(value)}
    return dict(sorted(known.items(), key=lambda item: place(item[0])))


def place(name: str) -> tuple[int, str]:
    """Sort key of a model: worst to best by meaning, then by name."""
    return (ORDER.index(name) if name in ORDER else len(ORDER)), name
