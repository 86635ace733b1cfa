"""What a simulation measured: the one object that the report, the JSON line and the sweep read.

Accuracies are fractions in [0, 1]; sizes are bytes; durations are seconds. `None` means "not
applicable or not measured", never zero.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

FEW_SITES = 100
"""Below so many participants `noise = "participant"` hides a whole participant among too few to learn much."""


def few_sites(noise: str, participants: int) -> str | None:
    """What to tell whoever protects whole participants among few; None where there is nothing to tell."""
    if noise != "participant" or participants >= FEW_SITES:
        return None
    return (
        f"noise = “participant” hides a whole participant among {participants}. Below {FEW_SITES} that takes so much "
        "noise that little is learned: use more participants, or protect single records with noise = “cohort”."
    )


@dataclass(frozen=True)
class RoundResult:
    """One finished round, seen from the harness.

    `metrics` are scored by the harness on held-out data: they are *not released by the protocol*.
    `stage_s` splits the wall time of the round (train, aggregate, score, other).
    """

    round: int
    metrics: dict[str, float]
    epsilon: float | None
    cohort: int
    survivors: int
    upload_bytes: int
    download_bytes: int
    stage_s: dict[str, float]
    aborted_attempts: int = 0
    trips: int = 1
    released: dict[str, float] = field(default_factory=dict)
    """Metrics that the protocol itself released, from noised counts; of the iterate before the round."""


@dataclass(frozen=True)
class ParticipantResult:
    """One simulated bank or retail chain at the end of the run."""

    name: str
    records: int
    rounds_released: int
    epsilon: float | None
    metrics: dict[str, float]
    """The joint model on this participant's own held-out records (empty where it has none)."""
    epsilon_all_collude: float | None = None
    """What it has spent if all other participants collude."""
    alone: dict[str, float] | None = None
    """A model that it trained alone at the same epsilon, on the whole test split."""


@dataclass(frozen=True)
class Comparison:
    """One reference run: `alone`, `nonprivate`, `central` or `central_nonprivate`."""

    name: str
    metrics: dict[str, float]
    curve: tuple[float, ...]
    """The main metric by round (for `alone`: of the mean participant)."""
    epsilon: float | None
    seconds: float
    members: tuple[dict[str, float], ...] = ()
    """For `alone`: each participant's own metrics, in the order of the participants."""


@dataclass(frozen=True)
class SimulationResult:
    """Everything that one `accord simulate` measured."""

    scenario: str
    text: str
    """One paragraph: what the scenario emulates."""
    plan: dict[str, Any]
    plan_hash: str
    population: dict[str, Any]
    """partition, source, rows (of each file that was read), participants, records, test_records, ceiling (float or
    None), faults."""
    metric: str
    metrics: dict[str, float]
    """The finished joint model on the test split."""
    rounds: tuple[RoundResult, ...]
    participants: tuple[ParticipantResult, ...]
    comparisons: tuple[Comparison, ...]
    epsilon: float | None
    epsilon_all_collude: float | None
    epsilon_target: float | None
    delta: float
    noise_multiplier: float
    trips_per_round: int
    upload_bytes_per_site_round: int
    download_bytes_per_site_round: int
    aborted_attempts: int
    seconds: float
    stage_s: dict[str, float]
    """Wall seconds of the whole command by stage (set-up, embed, rounds, compare, …)."""
    peak_rss_bytes: int
    seed: int
    versions: dict[str, str] = field(default_factory=dict)
    epsilon_unit_at_two_sites: float | None = None
    """Of a unit with records at two participants; None where no unit can have any (a row, a participant)."""

    @property
    def unit(self) -> str:
        """What ε protects: "row", "column:NAME" or "participant", by the plan that ran."""
        privacy, task = self.plan.get("privacy", {}), self.plan.get("task", {})
        return "participant" if privacy.get("noise") == "participant" else str(task.get("unit", "row"))

    @property
    def trips_per_run(self) -> int:
        """Trips of all rounds, with repeated attempts and joining."""
        return sum(item.trips for item in self.rounds)

    @property
    def upload_bytes_per_site_run(self) -> int:
        """What a participant uploads over the whole run, on average."""
        return sum(item.upload_bytes for item in self.rounds) // max(1, self._sites)

    @property
    def download_bytes_per_site_run(self) -> int:
        """What a participant downloads over the whole run, on average."""
        return sum(item.download_bytes for item in self.rounds) // max(1, self._sites)

    @property
    def _sites(self) -> int:
        return len(self.participants) or int(self.population.get("participants", 0))

    def to_json(self) -> dict[str, Any]:
        """All fields as plain JSON values, and what a run costs as a whole."""
        costs = ("unit", "trips_per_run", "upload_bytes_per_site_run", "download_bytes_per_site_run")
        return {**asdict(self), **{name: getattr(self, name) for name in costs}}


@dataclass(frozen=True)
class SweepPoint:
    """One setting of a sweep and its outcome, averaged over seeds (ε and trips: the most of any seed)."""

    settings: dict[str, Any]
    """The swept keys: epsilon, noise, participants, rounds, depth, dropout, colluders, partition.

    The first three are there also where they are not swept. A point without privacy has noise `none` and no epsilon.
    """
    metric: str
    mean: float
    std: float
    seeds: int
    epsilon: float | None
    seconds: float
    """Wall time of the runs, without their references."""
    compare: dict[str, float] = field(default_factory=dict)
    epsilon_all_collude: float | None = None
    rounds: int | None = None
    trips_per_round: int | None = None
    trips_per_run: int | None = None
    upload_bytes_per_site_round: int | None = None
    upload_bytes_per_site_run: int | None = None


@dataclass(frozen=True)
class SweepResult:
    """The privacy-utility frontier."""

    scenario: str
    points: tuple[SweepPoint, ...]
    metric: str
    seconds: float
    versions: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        return asdict(self)
