"""The run in plain words: what the joint model reaches at its privacy budget, and what that costs."""

from __future__ import annotations

from typing import Any

from accord_simulations.report import _numbers as num
from accord_simulations.report._models import ceiling, final_scores, is_private, noise_mode
from accord_simulations.results import SimulationResult

GUARDS = {
    "site": "against everybody, even all other participants together",
    "cohort": "against the coordinator and the public",
    "participant": "against the coordinator and the public",
}


def plan_value(result: SimulationResult, table: str, key: str) -> Any:
    """A value of the plan, or None where the plan does not hold it."""
    section = result.plan.get(table)
    return section.get(key) if isinstance(section, dict) else None


def unit(result: SimulationResult) -> str:
    """What one unit of privacy is."""
    if noise_mode(result) == "participant":
        return "a whole participant"
    named = str(plan_value(result, "task", "unit") or "row")
    return "one record" if named == "row" else f"all records that share one {named.removeprefix('column:')}"


def guard(result: SimulationResult) -> str:
    """Against whom the stated epsilon holds."""
    text = GUARDS.get(noise_mode(result) or "", "against the coordinator and the public")
    colluders = plan_value(result, "cohort", "colluders")
    if noise_mode(result) in ("cohort", "participant") and isinstance(colluders, int) and colluders:
        text += f", together with up to {num.plural(colluders, 'colluding participant')}"
    return text


def story(result: SimulationResult) -> str:
    """The answer in one paragraph, from the numbers alone; a missing number drops its sentence."""
    parts = (_reach(result), _attainable(result), _alone(result), _prices(result), _cost(result))
    return " ".join(part for part in parts if part)


def _reach(result: SimulationResult) -> str:
    """Score, held-out records, rounds, and the privacy that it is worth."""
    value = result.metrics.get(result.metric)
    members = len(result.participants) or result.population.get("participants")
    who = f"{num.plural(members, 'participant')} together" if isinstance(members, int) else "The participants"
    if not num.known(value):
        return f"{who} trained for {num.plural(len(result.rounds), 'round')}; the joint model was not scored."
    tested = result.population.get("test_records")
    on = f" on {num.plural(tested, 'held-out record')}" if isinstance(tested, int) else " on held-out records"
    metric = result.metric.replace("_", " ")
    text = f"{who} reach {num.score(value, result.metric)} {metric}{on}"
    text += f" after {num.plural(len(result.rounds), 'round')}"
    if not is_private(result):
        return f"{text}, without any privacy guarantee."
    equals = f"{num.JOIN}={num.JOIN}"
    budget = f"ε{equals}{num.epsilon(result.epsilon)} at δ{equals}{num.small(result.delta)}"
    return f"{text}, with {budget} protecting {unit(result)} {guard(result)}."


def _attainable(result: SimulationResult) -> str:
    """The share of what any model could reach."""
    share = attainable_share(result)
    best = num.score(ceiling(result), result.metric)
    return (
        "" if share is None else f"That is {100 * share:.1f}{num.JOIN}% of the {best} that is attainable on this data."
    )


def attainable_share(result: SimulationResult) -> float | None:
    """Joint score over the ceiling, for metrics where more is better."""
    value, best = result.metrics.get(result.metric), ceiling(result)
    if value is None or best is None or not num.known(value) or not num.is_fraction(result.metric):
        return None
    return value / best


def gap(result: SimulationResult, name: str) -> float | None:
    """Joint score less that of a reference."""
    scores = final_scores(result)
    return scores["joint"] - scores[name] if "joint" in scores and name in scores else None


def _alone(result: SimulationResult) -> str:
    """What joining is worth."""
    lift, scores = gap(result, "alone"), final_scores(result)
    if lift is None:
        return ""
    same = " at the same ε" if is_private(result) else ""
    verdict = "so joining is worth" if lift > 0 else "so joining does not pay here:"
    reached = num.score(scores["alone"], result.metric)
    return (
        f"Training alone{same}, a participant reaches {reached} on average, "
        f"{verdict} {num.difference(lift, result.metric)}."
    )


def _prices(result: SimulationResult) -> str:
    """The price of not pooling the data, and the price of privacy."""
    clauses = []
    pooled, bare = gap(result, "central"), gap(result, "nonprivate")
    if pooled is not None:
        same = " and the same ε" if is_private(result) else ""
        clauses.append(f"{_against(pooled, result.metric)} one model trained on the pooled data{same}")
    if bare is not None and is_private(result):
        clauses.append(f"{_against(bare, result.metric)} the same federation without noise")
    return f"The joint model is {' and '.join(clauses)}." if clauses else ""


def _against(value: float, metric: str) -> str:
    """`1.2 points below`, `level with` or `0.4 points above`."""
    size = num.points(value, metric)
    if size == num.points(0.0, metric):
        return "level with"
    return f"{size} {'above' if value > 0 else 'below'}"


def _cost(result: SimulationResult) -> str:
    """Bytes, trips, time and memory."""
    up, down = result.upload_bytes_per_site_round, result.download_bytes_per_site_round
    text = (
        f"Each participant uploads {num.size(up)} and downloads {num.size(down)} a round "
        f"in {num.plural(result.trips_per_round, 'trip')} ({num.size(result.upload_bytes_per_site_run)} and "
        f"{num.size(result.download_bytes_per_site_run)} in {num.plural(result.trips_per_run, 'trip')} in all); "
        f"this simulation took {num.duration(result.seconds)}"
    )
    if result.peak_rss_bytes:
        text += f" and {num.size(result.peak_rss_bytes)} of memory"
    if result.aborted_attempts:
        text += f", with {num.plural(result.aborted_attempts, 'aborted attempt')}"
    return text + "."
