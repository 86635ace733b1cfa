"""What the templates show of a run: plain values, already formatted, no logic left to the page."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from accord_simulations.report import _numbers as num
from accord_simulations.report._models import final_scores, is_private, noise_mode, place, series_name
from accord_simulations.report._story import attainable_share, gap, plan_value
from accord_simulations.results import Comparison, ParticipantResult, SimulationResult, few_sites

MEANINGS = {
    "alone": "each participant trains by itself (mean over participants)",
    "central": "one trusted party pools all records and adds the noise once",
    "nonprivate": "this federation without noise",
    "central_nonprivate": "all records pooled, without noise",
}


@dataclass(frozen=True)
class Card:
    """One headline number."""

    label: str
    value: str
    note: str = ""
    tone: str = ""

    @property
    def number(self) -> str:
        """The value without its unit."""
        return self._parts[0]

    @property
    def unit(self) -> str:
        """The trailing unit, set smaller: ` %`, ` points`, ` kB`; empty for a time."""
        return self._parts[1]

    @property
    def _parts(self) -> tuple[str, str]:
        head, gap, tail = self.value.rpartition(num.JOIN)
        return (head, tail) if gap and num.JOIN not in head else (self.value, "")


@dataclass(frozen=True)
class Share:
    """One stage of the whole command, as a share of its wall time."""

    name: str
    seconds: str
    percent: float


def cards(result: SimulationResult) -> list[list[Card]]:
    """The headline numbers in two rows, scores first; those without a number are left out."""
    return [_score_cards(result), [*_privacy_cards(result), *_cost_cards(result)]]


def _score_cards(result: SimulationResult) -> list[Card]:
    metric, found = result.metric, final_scores(result)
    tested = result.population.get("test_records")
    note = f"joint model, {num.count(tested)} held-out records" if isinstance(tested, int) else "joint model"
    made = [Card(_title(metric), num.score(found.get("joint"), metric), note, "joint")]
    share = attainable_share(result)
    if share is not None:
        best = num.score(found.get("ceiling"), metric)
        made.append(Card("Share of the attainable", f"{100 * share:.1f}{num.JOIN}%", f"the best possible is {best}"))
    for name, label, sense in (
        ("alone", "Against training alone", "alone"),
        ("central", "Against pooled data", "pooled"),
        ("nonprivate", "Against no noise", "without noise"),
    ):
        value = gap(result, name)
        if value is not None and not (name == "nonprivate" and not is_private(result)):
            made.append(Card(label, num.difference(value, metric), f"{sense}: {num.score(found[name], metric)}"))
    return made


def _privacy_cards(result: SimulationResult) -> list[Card]:
    if not is_private(result):
        return [Card("Privacy loss ε", "none", "not private: no guarantee holds", "warn")]
    target = result.epsilon_target
    note = f"of {num.budget(target)} allowed, δ{num.JOIN}={num.JOIN}{num.small(result.delta)}"
    if target is None:
        note = f"no target, δ{num.JOIN}={num.JOIN}{num.small(result.delta)}"
    over = overspent(result)
    return [
        Card("Privacy loss ε", num.epsilon(result.epsilon), note, "warn" if over else ""),
        Card(
            "ε if all others collude",
            num.epsilon(result.epsilon_all_collude),
            "all other participants together",
        ),
    ]


def _cost_cards(result: SimulationResult) -> list[Card]:
    up = result.upload_bytes_per_site_round
    trips = num.plural(result.trips_per_round, "trip")
    return [
        Card("Upload per round", num.size(up), f"and participant, in {trips}"),
        Card(
            "Upload in the run",
            num.size(result.upload_bytes_per_site_run),
            f"and participant, in {num.plural(result.trips_per_run, 'trip')}",
        ),
        Card(
            "Wall time",
            num.duration(result.seconds),
            f"{num.plural(len(result.rounds), 'round')}, simulated here",
        ),
    ]


def _title(metric: str) -> str:
    """A metric as a heading: `Macro f1`."""
    text = metric.replace("_", " ")
    return text[:1].upper() + text[1:]


def overspent(result: SimulationResult) -> bool:
    """Whether the run spent more than its target (beyond the last digit of floating point)."""
    spent, target = result.epsilon, result.epsilon_target
    return spent is not None and target is not None and spent > target * (1 + 1e-6)


def warnings(result: SimulationResult) -> list[tuple[str, str]]:
    """What a reader must not overlook: a title and one sentence each."""
    found = []
    if noise_mode(result) == "none":
        text = (
            "It ran with noise = “none”: no noise was added, and no ε holds. "
            "The model may reveal records that it was trained on. Use it for comparison only."
        )
        found.append(("This run is NOT private", text))
    elif not is_private(result):
        text = "No privacy loss was accounted, so no guarantee can be stated. Treat the model as not private."
        found.append(("This run is NOT private", text))
    if overspent(result):
        spent, target = num.epsilon(result.epsilon), num.budget(result.epsilon_target)
        found.append(("The budget was exceeded", f"The run spent ε = {spent}; its target was {target}."))
    if plan_value(result, "secure_aggregation", "mode") == "off" and noise_mode(result) in (
        "cohort",
        "participant",
    ):
        text = (
            "The stated ε against the coordinator assumes that it sees sums only. Here secure aggregation "
            "was simulated as switched off; a deployment with this noise mode needs it."
        )
        found.append(("Secure aggregation was off", text))
    few = few_sites(noise_mode(result) or "", members(result) or 0)
    if few:
        found.append(("Few participants", few))
    return found


def members(result: SimulationResult) -> int | None:
    """How many participants there were, where it is known."""
    known = len(result.participants) or result.population.get("participants")
    return known if isinstance(known, int) else None


def facts(result: SimulationResult) -> list[tuple[str, str]]:
    """The line of settings below the title."""
    pairs: list[tuple[str, Any]] = [
        ("participants", members(result)),
        ("records", result.population.get("records")),
        ("partition", result.population.get("partition")),
        ("source", result.population.get("source")),
        ("rows", _rows(result)),
        ("unit of privacy", result.unit),
        ("depth", plan_value(result, "adapter", "depth")),
        ("noise", noise_mode(result)),
        ("secure aggregation", plan_value(result, "secure_aggregation", "mode")),
        ("rounds", len(result.rounds)),
        ("seed", str(result.seed)),
    ]
    return [
        (name, num.count(value) if isinstance(value, int) else str(value)) for name, value in pairs if value is not None
    ]


def _rows(result: SimulationResult) -> str | None:
    """What became of the rows of every file that was read."""
    return (
        "; ".join(
            f"{rows['source']}: {num.count(rows['rows'])} in, {num.count(rows['accepted'])} accepted, "
            f"{num.count(rows['left_out'])} left out, {num.count(rows['empty_lines'])} empty lines"
            for rows in result.population.get("rows", ())
        )
        or None
    )


def cost_rows(result: SimulationResult) -> list[tuple[str, str, str]]:
    """What one participant sends, receives and waits for: in a round and in the whole run."""
    up, down = result.upload_bytes_per_site_run, result.download_bytes_per_site_run
    return [
        ("trips to the coordinator", num.count(result.trips_per_round), num.count(result.trips_per_run)),
        ("upload", num.size(result.upload_bytes_per_site_round), num.size(up)),
        ("download", num.size(result.download_bytes_per_site_round), num.size(down)),
    ]


def privacy_rows(result: SimulationResult) -> list[tuple[str, str]]:
    """What was spent, and how it was counted."""
    if not is_private(result):
        return []
    return [
        ("ε spent / target", f"{num.epsilon(result.epsilon)} / {num.budget(result.epsilon_target)}"),
        ("δ", num.small(result.delta)),
        ("accountant", str(plan_value(result, "privacy", "accountant") or num.DASH)),
        ("noise multiplier", f"{result.noise_multiplier:.4g}"),
        ("aborted attempts", str(result.aborted_attempts)),
    ]


def metric_names(result: SimulationResult) -> list[str]:
    """All metrics of the joint model and the references, the main one first."""
    names = set(result.metrics).union(*(item.metrics for item in result.comparisons)) - {result.metric}
    return [result.metric, *sorted(names)]


def comparison_rows(result: SimulationResult) -> list[dict[str, Any]]:
    """The joint model and every reference, by all metrics."""
    names = metric_names(result)
    joint = {
        "name": "joint model",
        "meaning": "this run",
        "main": True,
        "scores": [num.score(result.metrics.get(name), name) for name in names],
        "gap": num.DASH,
        "epsilon": num.epsilon(result.epsilon),
        "seconds": num.duration(result.stage_s.get("rounds")),
    }
    ordered = sorted(result.comparisons, key=lambda item: place(item.name))
    return [joint, *(_comparison_row(result, item, names) for item in ordered)]


def _comparison_row(result: SimulationResult, item: Comparison, names: list[str]) -> dict[str, Any]:
    return {
        "name": series_name(item.name, is_private(result)),
        "meaning": MEANINGS.get(item.name, ""),
        "main": False,
        "scores": [num.score(item.metrics.get(name), name) for name in names],
        "gap": num.difference(gap(result, item.name), result.metric),
        "epsilon": num.epsilon(item.epsilon),
        "seconds": num.duration(item.seconds),
    }


def participant_rows(result: SimulationResult) -> list[dict[str, str]]:
    """Every participant in the order of the run."""
    return [_participant_row(item, result.metric) for item in result.participants]


def _participant_row(item: ParticipantResult, metric: str) -> dict[str, str]:
    return {
        "name": item.name,
        "records": num.count(item.records),
        "rounds": num.count(item.rounds_released),
        "epsilon": num.epsilon(item.epsilon),
        "collude": num.epsilon(item.epsilon_all_collude),
        "joint": num.score(item.metrics.get(metric), metric),
        "alone": num.score((item.alone or {}).get(metric), metric),
    }


def stage_shares(result: SimulationResult) -> list[Share]:
    """The wall time of the whole command by stage, longest first."""
    known = {name: value for name, value in result.stage_s.items() if math.isfinite(value) and value > 0}
    total = sum(known.values())
    ordered = sorted(known.items(), key=lambda item: (-item[1], item[0]))
    return [Share(name, num.duration(value), round(100 * value / total, 2)) for name, value in ordered]


def dropped(result: SimulationResult) -> int:
    """How many times a participant began a round and did not finish it."""
    return sum(max(0, item.cohort - item.survivors) for item in result.rounds)
