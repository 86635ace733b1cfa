"""The privacy-utility frontier: one scenario over a grid of epsilon, participants, rounds, depth and dropout."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from accord_shared.errors import OutputError, PlanError
from accord_shared.files import make_folder
from accord_simulations.resources import versions
from accord_simulations.results import SimulationResult, SweepPoint, SweepResult
from accord_simulations.run import Options, simulate
from accord_simulations.scenario import split_changes

_KEYS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "epsilon": ("privacy.epsilon", float),
    "participants": ("population.participants", int),
    "rounds": ("run.rounds", int),
    "depth": ("adapter.depth", str),
    "dropout": ("faults.dropout", float),
}


@dataclass(frozen=True)
class Axes:
    """What is varied: values by short name."""

    values: Mapping[str, tuple[Any, ...]]

    @staticmethod
    def parse(texts: Mapping[str, str | None]) -> Axes:
        """Read comma-separated lists; epsilon `none` means without privacy.

        Raises:
            PlanError: nothing is varied, or a value is not of its kind.
        """
        values = {name: _parse(name, text) for name, text in texts.items() if text}
        if not values:
            raise PlanError(f"nothing to sweep: give at least one of {', '.join('--' + name for name in _KEYS)}")
        return Axes(values)

    def points(self) -> list[dict[str, Any]]:
        """Every combination, by short name."""
        return [dict(zip(self.values, chosen, strict=True)) for chosen in itertools.product(*self.values.values())]


def _parse(name: str, text: str) -> tuple[Any, ...]:
    kind = _KEYS[name][1]
    try:
        return tuple(None if part.strip() == "none" else kind(part.strip()) for part in text.split(","))
    except ValueError:
        raise PlanError(f"--{name} {text}: expected comma-separated {kind.__name__} values") from None


def _changes(settings: Mapping[str, Any], seed: int) -> dict[str, Any]:
    changes = {_KEYS[name][0]: value for name, value in settings.items() if value is not None}
    if "epsilon" in settings and settings["epsilon"] is None:
        changes["privacy.noise"] = "none"
    return {**changes, "run.seed": seed}


def sweep(
    scenario: str,
    axes: Axes,
    changes: Mapping[str, Any],
    *,
    seeds: int,
    data: Path | None,
    out: Path,
    compare: tuple[str, ...] = (),
    stopping: Callable[[], bool] = lambda: False,
) -> SweepResult:
    """Run every point for every seed; leaves `sweep.html`, `sweep.json`, a picture and each run's folder in `out`.

    Raises:
        OutputError: `out` is not empty.
        BadInput, RoundAborted, Interrupted: as `simulate`.
    """
    from accord_simulations.report import write_sweep  # noqa: PLC0415

    if out.exists() and any(out.iterdir()):
        raise OutputError(f"{out} is not empty: choose another --out")
    make_folder(out)
    started = time.monotonic()
    points: list[SweepPoint] = []
    combinations = axes.points()
    for number, settings in enumerate(combinations, start=1):
        results = []
        for seed in range(seeds):
            table, plan_changes = split_changes(scenario, {**changes, **_changes(settings, seed)})
            options = Options(out=out / f"point-{number:03d}-seed-{seed}", data=data, compare=compare, report=False)
            results.append(simulate(table, plan_changes, options, stopping=stopping))
        points.append(_point(settings, results))
        point = points[-1]
        shown = ", ".join(f"{name} {value}" for name, value in settings.items())
        sys.stderr.write(f"{number}/{len(combinations)}: {shown}: {point.metric} {point.mean:.4f}\n")
    result = SweepResult(
        scenario=results[0].scenario,
        points=tuple(points),
        metric=points[0].metric,
        seconds=time.monotonic() - started,
        versions=versions(),
    )
    write_sweep(result, out)
    return result


def _point(settings: Mapping[str, Any], results: list[SimulationResult]) -> SweepPoint:
    metric = results[0].metric
    values = [result.metrics[metric] for result in results]
    names = [comparison.name for comparison in results[0].comparisons]
    references = {
        name: fmean(c.metrics[metric] for result in results for c in result.comparisons if c.name == name)
        for name in names
    }
    return SweepPoint(
        settings=dict(settings),
        metric=metric,
        mean=fmean(values),
        std=stdev(values) if len(values) > 1 else 0.0,
        seeds=len(values),
        epsilon=results[0].epsilon,
        seconds=sum(result.seconds for result in results),
        compare=references,
    )
