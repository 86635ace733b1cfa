"""The points of a sweep, sorted for drawing: which line of which panel each belongs to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from accord_simulations.report import _numbers as num
from accord_simulations.results import SweepPoint

MAX_PANELS = 6
MODES = ("site", "cohort", "participant")
"""Noise modes with a privacy loss, in the order of the page."""
_ORDER = ("noise", "participants", "rounds", "depth", "dropout", "colluders", "partition")


@dataclass(frozen=True)
class Line:
    """Points that one line joins. `mode` is their noise, where lines are told apart by it."""

    label: str
    points: tuple[SweepPoint, ...]
    mode: str | None


@dataclass(frozen=True)
class Panel:
    """Lines that share axes, and points without privacy that have no place on an axis of ε."""

    title: str
    lines: tuple[Line, ...]
    unprotected: tuple[SweepPoint, ...]

    @property
    def points(self) -> list[SweepPoint]:
        """All that are joined by lines."""
        return [item for line in self.lines for item in line.points]


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
    names = {name for item in points for name in item.settings} - {"epsilon"}
    rank = {name: place for place, name in enumerate(_ORDER)}
    ordered = sorted(names, key=lambda name: (rank.get(name, len(rank)), name))
    return [name for name in ordered if len({repr(item.settings.get(name)) for item in points}) > 1]


def setting(name: str, value: Any) -> str:
    """One setting in a legend or table: `10 participants`, `cohort noise`, `depth lora`."""
    if name == "noise" and value is not None:
        return "no noise" if value == "none" else f"{value} noise"
    if name == "epsilon" and isinstance(value, int | float):
        return f"ε{num.JOIN}={num.JOIN}{num.budget(value)}"
    if name in ("participants", "rounds", "colluders") and isinstance(value, int):
        return num.plural(value, name[:-1])
    if name == "dropout" and isinstance(value, int | float):
        return f"{100 * value:g} % dropout"
    return f"{name.replace('_', ' ')} {num.DASH if value is None else value}"


def modes(points: Sequence[SweepPoint]) -> list[str]:
    """The noise modes of points with a privacy loss."""
    private = [item for item in points if epsilon_of(item) is not None]
    found = {str(item.settings["noise"]) for item in private if "noise" in item.settings}
    return [*[mode for mode in MODES if mode in found], *sorted(found - set(MODES))]


def at(point: SweepPoint, axis: str) -> float | None:
    """Where a point is on an axis; None where it has no place."""
    value = epsilon_of(point) if axis == "epsilon" else point.settings.get(axis)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def panels(points: Sequence[SweepPoint], axis: str) -> list[Panel]:
    """Lines over `axis`. With several noise modes: a line for each, a panel for each combination of all other settings.

    With one mode all combinations share a panel. Points without privacy belong to the panels of every ε.
    """
    scored = [item for item in points if math.isfinite(item.mean)]
    private = [item for item in scored if epsilon_of(item) is not None]
    bare = [item for item in scored if epsilon_of(item) is None]
    others = [name for name in ("epsilon", *varying(scored)) if name not in (axis, "noise") and _differs(scored, name)]
    several = len(modes(private)) > 1
    split, inner = (others, ["noise"]) if several else ([], others)
    groups: dict[tuple[Any, ...], list[SweepPoint]] = {}
    for item in private or bare:
        groups.setdefault(tuple(_value(item, name) for name in split), []).append(item)
    found = []
    for key, group in groups.items():
        beside = [item for item in bare if _fits(item, split, key)] if private else []
        joined = group if axis == "epsilon" else [*group, *beside]
        found.append(
            Panel(
                title=", ".join(setting(name, value) for name, value in zip(split, key, strict=True)),
                lines=_lines(joined, inner, axis),
                unprotected=tuple(beside) if axis == "epsilon" else (),
            )
        )
    return found


def _differs(points: Sequence[SweepPoint], name: str) -> bool:
    """Whether a setting takes several values; points without privacy have no ε to count."""
    found = [_value(item, name) for item in points if name != "epsilon" or epsilon_of(item) is not None]
    return len({repr(value) for value in found}) > 1


def _value(point: SweepPoint, name: str) -> Any:
    return asked_of(point) if name == "epsilon" else point.settings.get(name)


def _fits(point: SweepPoint, names: Sequence[str], key: Sequence[Any]) -> bool:
    """Whether a point without privacy belongs to the panel of `key`, whose ε it does not have."""
    pairs = [(name, value) for name, value in zip(names, key, strict=True) if name != "epsilon"]
    return all(point.settings.get(name) == value for name, value in pairs)


def _lines(points: Sequence[SweepPoint], names: Sequence[str], axis: str) -> tuple[Line, ...]:
    """One line for each combination of `names`, in the order of the noise modes and then of the points."""
    groups: dict[str, list[SweepPoint]] = {}
    for item in points:
        if at(item, axis) is not None:
            groups.setdefault(_label(item, names), []).append(item)
    lines = [
        Line(label, tuple(sorted(group, key=lambda item: at(item, axis) or 0.0)), _mode(group[0], names))
        for label, group in groups.items()
    ]
    return tuple(sorted(lines, key=lambda line: MODES.index(line.mode) if line.mode in MODES else len(MODES)))


def _mode(point: SweepPoint, names: Sequence[str]) -> str | None:
    """The noise that a line is drawn by: also of the one without any, wherever it is."""
    if epsilon_of(point) is None:
        return "none"
    return str(point.settings.get("noise")) if "noise" in names else None


def _label(point: SweepPoint, names: Sequence[str]) -> str:
    if epsilon_of(point) is not None:
        return ", ".join(setting(name, _value(point, name)) for name in names) or "joint model"
    rest = [setting(name, point.settings.get(name)) for name in names if name not in ("epsilon", "noise")]
    return ", ".join(["not private", *rest])
