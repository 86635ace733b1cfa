"""One simulation from scenario to report: set up, federate on Flower, compare, export, write."""

from __future__ import annotations

import json
import secrets
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from accord_client.export import export_model
from accord_client.features import default_folder
from accord_client.tasks.classification import score
from accord_server.aggregation import Aggregation, PlainAggregation
from accord_server.checkpoint import CheckpointFolder
from accord_server.rounds import Coordinator, RoundReport
from accord_server.secagg import SecureAggregation
from accord_shared.dp.accounting import epsilon, noise_multiplier, plan_epsilon, unit_epsilon_at_two_sites
from accord_shared.files import make_private, open_private, write_atomic
from accord_shared.plan import Plan
from accord_shared.vectors import Vector
from accord_simulations.compare import compare, comparison_plan
from accord_simulations.engine import Engine, Secured, check_start
from accord_simulations.output import OutputFolder, RunIdentity, claim
from accord_simulations.prepare import Prepared, prepare, resolve_scenario
from accord_simulations.progress import Progress
from accord_simulations.resources import PeakMemory, versions
from accord_simulations.results import Comparison, ParticipantResult, RoundResult, SimulationResult
from accord_simulations.scenario import Resolved, Scenario
from accord_simulations.scoring import Scorer
from accord_simulations.vault import SimulatedRoster, make_address

T = TypeVar("T")

EPSILON_POINTS = 10
"""Sampled mechanisms are accounted at this many rounds for the curve: each point costs a tenth of a second."""

SCORED_ROUNDS = 20
"""At depths where scoring the held-out data takes seconds, it is done this often (and at the end)."""


@dataclass(frozen=True)
class Options:
    """What the command line adds to a scenario."""

    out: Path
    data: Path | None = None
    resume: bool = False
    compare: tuple[str, ...] = ()
    ray_address: str | None = None
    cache: Path | None = None
    report: bool = True


def simulate(
    scenario: Scenario,
    changes: Mapping[str, Any],
    options: Options,
    *,
    progress: Progress | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> SimulationResult:
    """Run a scenario; leaves `report.html`, `report.json`, pictures and `model/` in `options.out`.

    Raises:
        BadInput: the scenario, data, model or output folder cannot be used; nothing was half-written.
        RoundAborted, Interrupted: finished rounds are kept, `resume` continues.
    """
    started = time.monotonic()
    check_start(scenario.resources, options.ray_address)
    cache = options.cache or default_folder() / "features"
    resolved = resolve_scenario(scenario, changes, options.data, cache)
    noise_multiplier(resolved.plan)  # an ε that cannot be had is refused before anything is written
    for name in options.compare:
        comparison_plan(resolved, changes, name)
    identity = RunIdentity(resolved.plan.hash, scenario.digest, resolved.population.digest)
    display = progress or Progress(metric="", epsilon_target=None, enabled=False)
    with claim(options.out, identity, resume=options.resume) as folder:
        for counts in resolved.population.counts:
            display.note(str(counts))
        with PeakMemory() as memory:
            run = _Simulation(resolved, changes, replace(options, cache=cache), folder, display, stopping)
            result = run.execute()
        result = replace(result, peak_rss_bytes=memory.bytes, seconds=time.monotonic() - started)
        if options.report:
            from accord_simulations.report import write_report  # noqa: PLC0415

            write_report(result, folder.path)
    return result


class _Simulation:
    """The state of one simulation while it runs."""

    def __init__(
        self,
        resolved: Resolved,
        changes: Mapping[str, Any],
        options: Options,
        folder: OutputFolder,
        progress: Progress,
        stopping: Callable[[], bool],
    ) -> None:
        self._resolved, self._plan, self._changes = resolved, resolved.plan, changes
        self._options, self._folder = options, folder
        self._progress, self._stopping = progress, stopping
        self._stage_s: dict[str, float] = {}
        self._rounds = _RoundLog(folder.work / "rounds.jsonl")

    def execute(self) -> SimulationResult:
        prepared = self._stage("embed", self._prepare)
        weights = self._stage("rounds", lambda: self._federate(prepared))
        comparisons = self._stage("compare", lambda: self._compare(prepared))
        return self._stage("export", lambda: self._finish(prepared, weights, comparisons))

    def _stage(self, name: str, work: Callable[[], T]) -> T:
        started = time.monotonic()
        try:
            return work()
        finally:
            self._stage_s[name] = time.monotonic() - started

    def _prepare(self) -> Prepared:
        texts = len(self._resolved.population.train) + len(self._resolved.population.test)
        self._progress.stage("embedding", total=texts)
        make_private(self._folder.work)
        prepared = prepare(self._resolved, self._folder.work, self._options.cache, self._progress.advance)
        if self._plan.adapter.depth == "head":
            torch.set_num_threads(1)  # a head's steps take a millisecond: threads that wait for a core cost tenfold
        return prepared

    def _federate(self, prepared: Prepared) -> Vector:
        plan = self._plan
        checkpoints = CheckpointFolder(self._folder.checkpoint)
        scorer = Scorer(prepared.workspace, prepared.held_out)
        watcher = _RoundWatcher(prepared, scorer, self._rounds, self._progress)
        prepared, secured, aggregation = _secure(prepared)
        coordinator = Coordinator(
            plan,
            secrets.token_hex(8),
            prepared.workspace.initial(),
            aggregation=aggregation,
            checkpoints=checkpoints,
            observer=watcher.observe,
        )
        watcher.restore(coordinator.finished_rounds, coordinator.history)
        self._progress.stage("federating", total=plan.run.rounds)
        if coordinator.finished_rounds == plan.run.rounds:
            return coordinator.weights
        engine = Engine(self._resolved.scenario.resources, self._options.ray_address, self._folder.path / "run.log")
        return engine.run(
            plan,
            coordinator,
            prepared.work,
            secured=secured,
            stopping=self._stopping,
            on_joined=lambda _: watcher.start(),
        )

    def _compare(self, prepared: Prepared) -> tuple[Comparison, ...]:
        done: list[Comparison] = []
        kept = self._folder.work / "comparisons.json"
        known = {c["name"]: c for c in json.loads(kept.read_text())} if kept.exists() else {}
        for name in self._options.compare:
            self._progress.stage(f"comparing: {name}")
            if name in known:
                done.append(
                    Comparison(
                        **{
                            **known[name],
                            "curve": tuple(known[name]["curve"]),
                            "members": tuple(known[name]["members"]),
                        }
                    )
                )
                continue
            done.append(compare(prepared, self._changes, name, self._stopping))
            write_atomic(kept, json.dumps([asdict(comparison) for comparison in done]).encode(), mode=0o600)
        return tuple(done)

    def _finish(self, prepared: Prepared, weights: Vector, comparisons: tuple[Comparison, ...]) -> SimulationResult:
        self._progress.stage("exporting")
        metrics = Scorer(prepared.workspace, prepared.held_out).score(weights)
        test = prepared.population.test
        predicted = Scorer(prepared.workspace, test).predictions(weights)
        by_text = dict(zip(test.texts, predicted.tolist(), strict=True))
        participants = _participants(prepared, by_text, comparisons)
        rounds = _with_busy(self._rounds.rounds, self._rounds.ends, prepared)
        spent = [participant.epsilon for participant in participants if participant.epsilon is not None]
        alone = [p.epsilon_all_collude for p in participants if p.epsilon_all_collude is not None]
        facts: dict[str, Any] = {
            "epsilon": max(spent) if spent else None,
            "epsilon_all_collude": max(alone) if alone else None,
            "epsilon_unit_at_two_sites": unit_epsilon_at_two_sites(
                self._plan, max((participant.rounds_released for participant in participants), default=0)
            ),
            "delta": self._plan.privacy.delta,
            "metrics": metrics,
        }
        export_model(prepared.workspace, weights, self._folder.model, facts)
        return self._result(prepared, metrics, rounds, participants, comparisons, facts)

    def _result(
        self,
        prepared: Prepared,
        metrics: dict[str, float],
        rounds: tuple[RoundResult, ...],
        participants: tuple[ParticipantResult, ...],
        comparisons: tuple[Comparison, ...],
        facts: Mapping[str, Any],
    ) -> SimulationResult:
        plan, scenario, population = self._plan, self._resolved.scenario, prepared.population
        last = rounds[-1]
        return SimulationResult(
            scenario=scenario.scenario.name,
            text=scenario.scenario.text,
            plan=json.loads(plan.to_json()),
            plan_hash=plan.hash,
            population={
                "source": population.source,
                "rows": [{**asdict(counts), "rows": counts.rows} for counts in population.counts],
                "partition": scenario.population.partition,
                "participants": len(population.participants),
                "records": len(population.train),
                "test_records": len(population.test),
                "scored_on": "test" if population.validation is None else "validation",
                "ceiling": population.ceiling,
                "faults": scenario.faults.model_dump(),
                "tuned": list(self._resolved.tuned),
            },
            metric=plan.evaluation.metrics[0],
            metrics=metrics,
            rounds=rounds,
            participants=participants,
            comparisons=comparisons,
            epsilon=facts["epsilon"],
            epsilon_all_collude=facts["epsilon_all_collude"],
            epsilon_unit_at_two_sites=facts["epsilon_unit_at_two_sites"],
            epsilon_target=plan.privacy.epsilon,
            delta=plan.privacy.delta,
            noise_multiplier=noise_multiplier(plan),
            trips_per_round=statistics.mode(item.trips for item in rounds),
            upload_bytes_per_site_round=last.upload_bytes // max(1, last.survivors),
            download_bytes_per_site_round=last.download_bytes // max(1, last.cohort * (1 + last.aborted_attempts)),
            aborted_attempts=sum(item.aborted_attempts for item in rounds),
            seconds=0.0,
            stage_s=dict(self._stage_s),
            peak_rss_bytes=0,
            seed=plan.run.seed,
            versions=versions(),
        )


class _RoundLog:
    """The rounds so far on disk, one JSON line each, so that a resumed run reports all of them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rounds: tuple[RoundResult, ...] = ()
        self.ends: tuple[tuple[float, float], ...] = ()
        """(start, end) of each round in seconds since the epoch."""

    def restore(self, finished: int, history: Sequence[Mapping[str, Any]]) -> None:
        """Read back the rounds that the checkpoint counts as finished; `history` is the coordinator's own.

        A round that was killed after its checkpoint and before its line here has no scores.
        """
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        entries = [json.loads(line) for line in lines if line.endswith("}")]
        by_round = {entry["result"]["round"]: entry for entry in entries if entry["result"]["round"] <= finished}
        for report in history:
            by_round.setdefault(report["round"], {"result": _unscored(report), "start": 0.0, "end": 0.0})
        ordered = [by_round[number] for number in sorted(by_round)]
        self.rounds = tuple(RoundResult(**entry["result"]) for entry in ordered)
        self.ends = tuple((entry["start"], entry["end"]) for entry in ordered)

    def add(self, result: RoundResult, start: float, end: float) -> None:
        """Append a finished round."""
        self.rounds = (*self.rounds, result)
        self.ends = (*self.ends, (start, end))
        with open_private(self._path, "a") as file:
            file.write(json.dumps({"result": asdict(result), "start": start, "end": end}) + "\n")


def _unscored(report: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `RoundResult` from a `RoundReport`, as plain JSON values."""
    same = ("round", "cohort", "upload_bytes", "download_bytes", "aborted_attempts", "trips", "released")
    stages = dict.fromkeys(("round", "score", "account"), 0.0)
    survivors = len(report["survivors"])
    return {
        **{key: report[key] for key in same},
        "survivors": survivors,
        "metrics": {},
        "epsilon": None,
        "stage_s": stages,
    }


def _secure(prepared: Prepared) -> tuple[Prepared, Secured | None, Aggregation]:
    """What sums the updates; under secure aggregation with a roster made on the fly and vaults for its secrets."""
    plan = prepared.plan
    if plan.secure_aggregation.mode == "off":
        return prepared, None, PlainAggregation(plan.extra_coordinates)
    names = tuple(participant.name for participant in prepared.population.participants)
    roster = SimulatedRoster.make(plan, names)
    dimension = prepared.workspace.model.layout.dimension
    work = replace(prepared.work, vault=make_address(prepared.work.root / "vault"))
    aggregation = SecureAggregation(plan, roster.signed.roster, dimension, work.noise_multiplier)
    return replace(prepared, work=work), Secured(roster, names), aggregation


class _Charges:
    """The most releases that any participant was charged, from their ledgers: attempts in vain and lost uploads too.

    A ledger is read only where what may have been added could make it the most.
    """

    def __init__(self, prepared: Prepared) -> None:
        work, names = prepared.work, [participant.name for participant in prepared.population.participants]
        self._plan_hash = prepared.plan.hash
        self._store_of = {name: partial(work.store, index) for index, name in enumerate(names)}
        self._known: Counter[str] = Counter()
        self._unsure: Counter[str] = Counter(dict.fromkeys(names, 0))

    def note(self, survivors: Sequence[str], attempts: int) -> None:
        """A round ended after so many attempts."""
        certain = frozenset(survivors) if attempts == 1 else frozenset()
        self._known.update(certain)
        self._unsure.update({name: attempts for name in self._store_of if name not in certain})

    def most(self) -> int:
        """Over all participants."""
        top = max(self._known.values(), default=0)
        for name in sorted(self._store_of, key=lambda name: -self._known[name] - self._unsure[name]):
            if self._known[name] + self._unsure[name] <= top:
                break
            if self._unsure[name]:
                self._known[name] = self._store_of[name]().releases(self._plan_hash).rounds
                self._unsure[name] = 0
            top = max(top, self._known[name])
        return top


class _RoundWatcher:
    """Scores a finished round, accounts for it, shows it."""

    def __init__(self, prepared: Prepared, scorer: Scorer, log: _RoundLog, progress: Progress) -> None:
        self._plan = prepared.plan
        self._scorer, self._log, self._progress = scorer, log, progress
        self._charges = _Charges(prepared)
        self._since = time.time()
        self._epsilon: float | None = None

    def restore(self, finished: int, history: Sequence[Mapping[str, Any]]) -> None:
        """Continue after `finished` rounds."""
        self._log.restore(finished, history)
        for round_report in history:
            self._charges.note((), 1 + round_report["aborted_attempts"])

    def start(self) -> None:
        """The sites have joined: rounds begin."""
        self._since = time.time()

    def observe(self, report: RoundReport, weights: Vector) -> None:
        """Called by the coordinator after each round."""
        trained = time.time()
        self._charges.note(report.survivors, 1 + report.aborted_attempts)
        metrics = self._scorer.score(weights) if self._is_scored(report.round) else {}
        scored = time.time()
        if self._is_accounted(report.round):
            last = report.round == self._plan.run.rounds
            self._epsilon = plan_epsilon(self._plan, self._charges.most(), coarse=not last)
        result = RoundResult(
            round=report.round,
            metrics=metrics,
            epsilon=self._epsilon,
            cohort=report.cohort,
            survivors=len(report.survivors),
            upload_bytes=report.upload_bytes,
            download_bytes=report.download_bytes,
            stage_s={"round": trained - self._since, "score": scored - trained, "account": time.time() - scored},
            aborted_attempts=report.aborted_attempts,
            trips=report.trips,
            released=dict(report.released),
        )
        self._log.add(result, self._since, trained)
        self._progress.round(result, self._plan.run.rounds)
        self._since = time.time()

    def _is_scored(self, number: int) -> bool:
        return self._plan.adapter.depth == "head" or _every(number, self._plan.run.rounds, SCORED_ROUNDS)

    def _is_accounted(self, number: int) -> bool:
        return self._plan.local.sampling_rate == 1.0 or _every(number, self._plan.run.rounds, EPSILON_POINTS)


def _every(number: int, rounds: int, points: int) -> bool:
    return number in (1, rounds) or number % max(1, rounds // points) == 0


def _participants(
    prepared: Prepared, by_text: Mapping[str, int], comparisons: tuple[Comparison, ...]
) -> tuple[ParticipantResult, ...]:
    plan: Plan = prepared.plan
    alone = next((comparison.members for comparison in comparisons if comparison.members), ())
    results = []
    for index, participant in enumerate(prepared.population.participants):
        releases = prepared.work.store(index).releases(plan.hash)
        own = participant.test
        predicted = np.asarray([by_text[text] for text in own.texts], dtype=np.int64)
        metrics = score(predicted, own.labels, len(plan.task.labels), plan.evaluation.metrics) if len(own) else {}
        spent = collude = None
        if plan.privacy.noise != "none":
            delta, accountant = plan.privacy.delta, plan.privacy.accountant
            spent = epsilon(releases.events, delta, accountant)
            collude = epsilon(releases.events, delta, accountant, colluding=True)
        results.append(
            ParticipantResult(
                name=participant.name,
                records=len(participant.train),
                rounds_released=releases.rounds,
                epsilon=spent,
                epsilon_all_collude=collude,
                metrics=metrics,
                alone=alone[index] if alone else None,
            )
        )
    return tuple(results)


def _with_busy(
    rounds: tuple[RoundResult, ...], spans: tuple[tuple[float, float], ...], prepared: Prepared
) -> tuple[RoundResult, ...]:
    """Split each round's wall time by the participants' own clocks: training (per parallel worker) and the rest."""
    busy = prepared.work.busy()
    result = []
    for item, (start, end) in zip(rounds, spans, strict=True):
        inside = [(max(begin, start), min(stop, end)) for _, begin, stop in busy if stop > start and begin < end]
        train = _union(inside)
        wall = item.stage_s["round"]
        rest = {name: seconds for name, seconds in item.stage_s.items() if name != "round"}
        stages = {"train": train, **rest, "other": max(0.0, wall - train)}
        result.append(replace(item, stage_s=stages))
    return tuple(result)


def _union(intervals: list[tuple[float, float]]) -> float:
    """Seconds during which at least one participant was at work."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
