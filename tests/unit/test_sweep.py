"""Sweeps: which points there are, what is refused before any run, which reference is run once for several points."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from accord_client.data import Examples
from accord_shared.errors import PlanError
from accord_simulations import report, sweep
from accord_simulations.cli import _readable, summarize
from accord_simulations.compare import comparison_key, comparison_plan
from accord_simulations.population import Participant, Population
from accord_simulations.results import Comparison, RoundResult, SimulationResult, SweepResult
from accord_simulations.run import Options
from accord_simulations.scenario import COMPARISONS, Resolved, Scenario, resolve, split_changes
from accord_simulations.sweep import Axes

DIGEST = "sha256:" + "0" * 64


def population(participants: int) -> Population:
    """120 records, shared out evenly."""
    texts, labels = tuple(f"text {row}" for row in range(120)), np.arange(120, dtype=np.int64) % 2
    whole = Examples(texts, labels, np.arange(120, dtype=np.int64))
    parts = [whole.take(np.arange(start, 120, participants)) for start in range(participants)]
    order = np.concatenate([np.arange(start, 120, participants) for start in range(participants)])
    members = tuple(Participant(f"site-{number}", part, part) for number, part in enumerate(parts))
    return Population(("a", "b"), ("a", "b"), members, whole.take(order), whole, None, None, "made here")


def fake_resolve(scenario: Scenario, changes: Mapping[str, Any], data: Path | None) -> Resolved:
    assert data is None
    return resolve(scenario, population(scenario.population.participants), changes, DIGEST)


def made(scenario: Scenario, changes: Mapping[str, Any], compare: tuple[str, ...], score: float) -> SimulationResult:
    """A result that nobody computed."""
    resolved = fake_resolve(scenario, changes, None)
    private, size = resolved.plan.privacy.noise != "none", len(resolved.population.participants)
    epsilon = resolved.plan.privacy.epsilon
    rounds = tuple(
        RoundResult(number, {}, epsilon, size, size, 100 * size, 200 * size, {}, trips=3) for number in (1, 2)
    )
    return SimulationResult(
        scenario=scenario.scenario.name,
        text="",
        plan=resolved.plan.model_dump(mode="json"),
        plan_hash=resolved.plan.hash,
        population={"participants": size, "scored_on": "test", "ceiling": None},
        metric="accuracy",
        metrics={"accuracy": score},
        rounds=(replace(rounds[0], trips=5), rounds[1]),
        participants=(),
        comparisons=tuple(Comparison(name, {"accuracy": 0.5}, (), None, 1.0) for name in compare),
        epsilon=epsilon,
        epsilon_all_collude=2.0 * epsilon if private and epsilon else None,
        epsilon_target=epsilon,
        delta=1e-5,
        noise_multiplier=1.0,
        trips_per_round=3,
        upload_bytes_per_site_round=100,
        download_bytes_per_site_round=200,
        aborted_attempts=0,
        seconds=10.0,
        stage_s={"compare": 4.0 * len(compare)},
        peak_rss_bytes=0,
        seed=0,
    )


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[str, ...]]]:
    """What would have been run: noise mode and references of each simulation, none of which takes place."""
    found: list[tuple[str, tuple[str, ...]]] = []

    def simulate(scenario: Scenario, changes: Mapping[str, Any], options: Options, **_: Any) -> SimulationResult:
        found.append((changes.get("privacy.noise", "site"), options.compare))
        return made(scenario, changes, options.compare, 0.8 + 0.02 * (changes["run.seed"] % 2))

    monkeypatch.setattr(sweep, "simulate", simulate)
    monkeypatch.setattr(sweep, "resolve_scenario", fake_resolve)
    monkeypatch.setattr(report, "write_sweep", lambda result, out: out / "sweep.html")
    return found


def run(out: Path, compare: tuple[str, ...] = (), seeds: int = 1, sets: Any = None, **axes: str) -> SweepResult:
    parsed = Axes.parse({name: axes.get(name) for name in sweep._KEYS})
    return sweep.sweep("bank-demo", parsed, sets or {}, seeds=seeds, data=None, out=out, compare=compare)


def points(**axes: str) -> list[dict[str, Any]]:
    return Axes.parse(axes).points()


def test_without_privacy_there_is_one_point() -> None:
    found = points(epsilon="1,8,none", noise="site,none,cohort")
    none = {"epsilon": None, "noise": "none"}
    assert found.count(none) == 1
    assert [one for one in found if one != none] == [
        {"epsilon": epsilon, "noise": noise} for epsilon in (1.0, 8.0) for noise in ("site", "cohort")
    ]
    assert points(noise="none", epsilon="1,2", participants="3,4") == [
        {"noise": "none", "epsilon": None, "participants": size} for size in (3, 4)
    ]


@pytest.mark.parametrize("axes", [{}, {"epsilon": "much"}, {"participants": "none"}, {"colluders": "0.5"}])
def test_axes_that_cannot_be_read(axes: dict[str, str]) -> None:
    with pytest.raises(PlanError, match="--"):
        Axes.parse(axes)


@pytest.mark.parametrize(
    ("axes", "sets", "words"),
    [
        ({"noise": "cohort,participant"}, {"evaluation.released_fraction": 0.1}, "noise participant: .*released_frac"),
        ({"noise": "site,cohort"}, {"secure_aggregation.mode": "off"}, 'noise cohort: .*other than "off"'),
        ({"noise": "cohort"}, {"local.steps_per_round": 2}, "steps_per_round must be 1"),
        ({"noise": "site,magic"}, {}, "noise magic: "),
        ({"noise": "cohort"}, {"privacy.noise": "site"}, "--set privacy.noise contradicts --noise"),
        ({"dropout": "0,0.5"}, {}, "dropout 0.5: 5 of 10 participants are left in a round, which needs 6"),
        ({"colluders": "0,9"}, {"privacy.noise": "cohort"}, "colluders 9: "),
        ({"epsilon": "8,1e-9"}, {"privacy.delta": 1e-12}, "epsilon 1e-09: .*too small"),
    ],
)
def test_a_point_that_cannot_be_run_stops_all_before_any_is(
    asked: list[Any], tmp_path: Path, axes: dict[str, str], sets: dict[str, Any], words: str
) -> None:
    with pytest.raises(PlanError, match=words):
        run(tmp_path / "out", sets=sets, **axes)
    assert not asked
    assert not (tmp_path / "out").exists()


def test_a_reference_is_run_once_for_all_points_that_share_it(asked: list[Any], tmp_path: Path) -> None:
    result = run(tmp_path, COMPARISONS, epsilon="1,8", noise="site,cohort,none", dropout="0,0.3")
    assert len(asked) == 10
    assert [compare for _, compare in asked if compare] == [
        COMPARISONS,  # at ε = 1
        ("alone",),  # without privacy: pooled it is what central_nonprivate was
        ("alone", "central"),  # at ε = 8
    ]
    assert all(point.compare == dict.fromkeys(COMPARISONS, 0.5) for point in result.points)


def test_points_say_what_they_cost_and_both_epsilons(
    asked: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (point,) = run(tmp_path, ("alone",), seeds=2, noise="participant", epsilon="3").points
    assert len(asked) == 2
    assert json.loads((tmp_path / "points.json").read_text()) == [asdict(point)]
    assert point.settings == {"epsilon": 3.0, "noise": "participant", "participants": 10}
    assert (point.mean, point.seeds, point.seconds) == (pytest.approx(0.81), 2, 12.0)
    assert point.std == pytest.approx(0.02 / 2**0.5)
    assert (point.epsilon, point.epsilon_all_collude) == (3.0, 6.0)
    assert (point.rounds, point.trips_per_round, point.trips_per_run) == (2, 3, 8)
    assert (point.upload_bytes_per_site_round, point.upload_bytes_per_site_run) == (100, 200)
    told = capsys.readouterr().err
    assert told.count("warning: noise = “participant” hides a whole participant among 10.") == 1
    assert "accuracy 0.8100 ± 0.0141, ε 3, 6 if all others collude" in told


def key(name: str, changes: dict[str, Any], participants: int = 10) -> str:
    scenario, in_plan = split_changes("bank-demo", changes)
    return comparison_key(resolve(scenario, population(participants), in_plan, DIGEST), in_plan, name)


@pytest.mark.parametrize("name", COMPARISONS)
def test_references_do_not_depend_on_who_adds_noise_or_drops_out(name: str) -> None:
    known = key(name, {"privacy.noise": "site"})
    for noise in ("cohort", "participant"):
        assert key(name, {"privacy.noise": noise}) == known
    assert key(name, {"privacy.noise": "site", "faults.dropout": 0.3}) == known
    assert key(name, {"privacy.noise": "cohort", "cohort.colluders": 1}) == known
    assert key(name, {"run.seed": 1}) != known
    assert key(name, {"run.rounds": 7}) != known


def test_references_depend_on_epsilon_and_on_who_holds_the_records() -> None:
    for name in COMPARISONS:
        assert (key(name, {"privacy.epsilon": 1.0}) == key(name, {})) == ("nonprivate" in name)
        assert (key(name, {}, participants=5) == key(name, {})) == ("central" in name)
    assert len({key(name, {}) for name in COMPARISONS}) == len(COMPARISONS)


def test_references_of_a_plan_with_colluders_have_none() -> None:
    scenario, in_plan = split_changes("bank-demo", {"privacy.noise": "cohort", "cohort.colluders": 2})
    resolved = resolve(scenario, population(10), in_plan, DIGEST)
    assert comparison_plan(resolved, in_plan, "alone").cohort.colluders == 0


@pytest.mark.parametrize(("noise", "warned"), [("cohort", False), ("participant", True), ("none", False)])
def test_the_summary_counts_the_run_and_names_both_epsilons(noise: str, warned: bool) -> None:
    scenario, in_plan = split_changes("bank-demo", {"privacy.noise": noise})
    summary = summarize(made(scenario, in_plan, (), 0.8), Path("runs"))
    assert (summary["trips_per_run"], summary["upload_bytes_per_site_run"]) == (8, 200)
    assert bool(summary["warnings"]) == warned
    text = _readable(summary)
    assert "100 bytes per participant and round, 200 in the run" in text
    assert "3 a round, 8 in the run" in text
    assert ("ε = 16 if all others collude" in text) == (noise != "none")
