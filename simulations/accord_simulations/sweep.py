"""The privacy-utility frontier: one scenario over a grid of noise modes, epsilon, participants, rounds, dropout, ….

Every point is resolved before anything is run, so that a mode that cannot run one is refused at once. A reference is
run once for all points that it is the same for.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from accord_shared.dp.accounting import noise_multiplier
from accord_shared.errors import DataError, PlanError
from accord_shared.files import write_atomic
from accord_shared.secagg.thresholds import COMPLETE_MAX, thresholds
from accord_simulations.compare import comparison_key
from accord_simulations.output import held, require_empty
from accord_simulations.prepare import resolve_scenario
from accord_simulations.resources import versions
from accord_simulations.results import Comparison, SimulationResult, SweepPoint, SweepResult, few_sites
from accord_simulations.run import Options, simulate
from accord_simulations.scenario import Resolved, Scenario, split_changes

_KEYS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "epsilon": ("privacy.epsilon", float),
    "noise": ("privacy.noise", str),
    "participants": ("population.participants", int),
    "rounds": ("run.rounds", int),
    "depth": ("adapter.depth", str),
    "dropout": ("faults.dropout", float),
    "colluders": ("cohort.colluders", int),
    "partition": ("population.partition", str),
}
_UNPROTECTED: dict[str, Any] = {"noise": "none", "epsilon": None}


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
        """Every combination once, by short name; without privacy there is no epsilon to combine with."""
        found: dict[tuple[Any, ...], dict[str, Any]] = {}
        for chosen in itertools.product(*self.values.values()):
            point = dict(zip(self.values, chosen, strict=True))
            if point.get("noise") == "none" or point.get("epsilon", 1.0) is None:
                point |= _UNPROTECTED
            found.setdefault(tuple(sorted(point.items())), point)
        return list(found.values())


def _parse(name: str, text: str) -> tuple[Any, ...]:
    kind = _KEYS[name][1]
    parts = [part.strip() for part in text.split(",")]
    try:
        return tuple(None if name == "epsilon" and part == "none" else kind(part) for part in parts)
    except ValueError:
        raise PlanError(f"--{name} {text}: expected comma-separated {kind.__name__} values") from None


def _changes(settings: Mapping[str, Any], seed: int) -> dict[str, Any]:
    return {**{_KEYS[name][0]: value for name, value in settings.items()}, "run.seed": seed}


@dataclass(frozen=True)
class _Run:
    """One run of a point, found to be possible."""

    scenario: Scenario
    changes: dict[str, Any]
    facts: dict[str, Any]
    """What the page says of a point beside the settings that are swept."""
    references: dict[str, str]
    """Keys of the comparisons that it asks for, by name."""


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
    """Run every point for every seed; leaves `sweep.html`, `sweep.json`, pictures and each run's folder in `out`.

    `points.json` there holds the finished points while others run.

    Raises:
        OutputError: `out` is not empty.
        PlanError: a point contradicts itself; nothing was run.
        BadInput, RoundAborted, Interrupted: as `simulate`.
    """
    from accord_simulations.report import write_sweep  # noqa: PLC0415

    require_empty(out)
    for name in axes.values:
        if _KEYS[name][0] in changes:
            raise PlanError(f"--set {_KEYS[name][0]} contradicts --{name}")
    started = time.monotonic()
    combinations = axes.points()
    runs = [[_checked(scenario, changes, one, seed, data, compare) for seed in range(seeds)] for one in combinations]
    _warn(runs)
    with held(out, lambda: require_empty(out), lambda: any(out.glob("point-*"))):
        results: list[SimulationResult] = []
        points: list[SweepPoint] = []
        known: dict[str, Comparison] = {}
        for number, (settings, tries) in enumerate(zip(combinations, runs, strict=True), start=1):
            results = []
            for seed, run in enumerate(tries):
                wanted = tuple(name for name, key in run.references.items() if key not in known)
                options = Options(out=out / f"point-{number:03d}-seed-{seed}", data=data, compare=wanted, report=False)
                results.append(simulate(run.scenario, run.changes, options, stopping=stopping))
                known |= {run.references[item.name]: item for item in results[-1].comparisons}
            points.append(_point({**tries[0].facts, **settings}, results, [run.references for run in tries], known))
            write_atomic(out / "points.json", json.dumps([asdict(point) for point in points], indent=2).encode())
            sys.stderr.write(f"{number}/{len(combinations)}: {one_line(points[-1])}\n")
        result = SweepResult(
            scenario=results[0].scenario,
            points=tuple(points),
            metric=points[0].metric,
            seconds=time.monotonic() - started,
            versions=versions(),
        )
        write_sweep(result, out)
    return result


def _checked(
    scenario: str,
    changes: Mapping[str, Any],
    settings: Mapping[str, Any],
    seed: int,
    data: Path | None,
    compare: tuple[str, ...],
) -> _Run:
    """A run whose plan, and whose references' plans, are in order.

    Raises:
        PlanError, DataError: it cannot be run; the message names the point.
    """
    try:
        table, plan_changes = split_changes(scenario, {**changes, **_changes(settings, seed)})
        resolved = resolve_scenario(table, plan_changes, data)
        _require_survivors(resolved)
        noise_multiplier(resolved.plan)
        references = {name: comparison_key(resolved, plan_changes, name) for name in compare}
    except (PlanError, DataError) as error:
        raise type(error)(f"{_words(settings)}: {error}") from None
    privacy = resolved.plan.privacy
    facts = {
        "epsilon": privacy.epsilon,
        "noise": privacy.noise,
        "participants": len(resolved.population.participants),
    }
    return _Run(table, plan_changes, facts, references)


def _require_survivors(resolved: Resolved) -> None:
    """Refuse losses in every round after which no round can end.

    Raises:
        PlanError: fewer participants stay than the secure sum, or the plan, needs.
    """
    plan, faults = resolved.plan, resolved.scenario.faults
    size, mode = plan.cohort.size, plan.secure_aggregation.mode
    left = size - round(faults.dropout * size)
    needed = plan.cohort.minimum
    if mode != "off" and faults.dropout_at == "any" and size <= COMPLETE_MAX:
        own = plan.privacy.noise == "site"
        needed = thresholds(size, plan.cohort.minimum, plan.cohort.colluders, mode, own_noise=own).share
    if left < needed:
        raise PlanError(f"{left} of {size} participants are left in a round, which needs {needed}: less faults.dropout")


def _warn(runs: Sequence[Sequence[_Run]]) -> None:
    """Say once for each number of participants that there are too few."""
    facts = [tries[0].facts for tries in runs]
    for text in dict.fromkeys(few_sites(one["noise"], one["participants"]) for one in facts):
        if text:
            sys.stderr.write(f"warning: {text}\n")


def _words(settings: Mapping[str, Any]) -> str:
    """A point in a message: `noise cohort, epsilon 1.0`."""
    return ", ".join(f"{name} {'none' if value is None else value}" for name, value in settings.items())


def one_line(point: SweepPoint) -> str:
    """A point, its score (with the standard deviation over seeds, if there are several) and both ε."""
    spread = f" ± {point.std:.4f}" if point.seeds > 1 else ""
    text = f"{_words(point.settings)}: {point.metric} {point.mean:.4f}{spread}"
    if point.epsilon is None or point.epsilon_all_collude is None:
        return text
    return f"{text}, ε {point.epsilon:.3g}, {point.epsilon_all_collude:.3g} if all others collude"


def _point(
    settings: Mapping[str, Any],
    results: Sequence[SimulationResult],
    references: Sequence[Mapping[str, str]],
    known: Mapping[str, Comparison],
) -> SweepPoint:
    metric, first = results[0].metric, results[0]
    values = [result.metrics[metric] for result in results]
    compared = {name: fmean(known[keys[name]].metrics[metric] for keys in references) for name in references[0]}
    return SweepPoint(
        settings=dict(settings),
        metric=metric,
        mean=fmean(values),
        std=stdev(values) if len(values) > 1 else 0.0,
        seeds=len(values),
        epsilon=_most([result.epsilon for result in results]),
        seconds=sum(result.seconds - result.stage_s.get("compare", 0.0) for result in results),
        compare=compared,
        epsilon_all_collude=_most([result.epsilon_all_collude for result in results]),
        rounds=max(len(result.rounds) for result in results),
        trips_per_round=first.trips_per_round,
        trips_per_run=max(result.trips_per_run for result in results),
        upload_bytes_per_site_round=round(fmean(result.upload_bytes_per_site_round for result in results)),
        upload_bytes_per_site_run=round(fmean(result.upload_bytes_per_site_run for result in results)),
    )


def _most(values: Sequence[float | None]) -> float | None:
    """The largest; None as soon as one is unknown."""
    known = [value for value in values if value is not None]
    return max(known) if len(known) == len(values) and known else None
