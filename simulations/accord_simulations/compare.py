"""Reference runs on the same records: alone, without privacy, centralised. The same rounds, in this process."""

from __future__ import annotations

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from accord_client.data import Examples
from accord_server.aggregation import PlainAggregation
from accord_server.exchange import LocalExchange
from accord_server.rounds import Coordinator, RoundReport
from accord_shared import PROTOCOL_VERSION
from accord_shared.dp.accounting import plan_epsilon
from accord_shared.errors import Interrupted, PlanError
from accord_shared.messages import Enquiry, Message
from accord_shared.plan import Plan
from accord_shared.vectors import Vector
from accord_simulations.faults import FaultSpec
from accord_simulations.participants import WorkFolder, make_site
from accord_simulations.prepare import Prepared
from accord_simulations.results import Comparison
from accord_simulations.scenario import COMPARISONS, Resolved, resolve
from accord_simulations.scoring import Scorer

Stopping = Callable[[], bool]


def parse_comparisons(text: str | None) -> tuple[str, ...]:
    """The comparisons of a comma-separated list or `all`.

    Raises:
        PlanError: an unknown name.
    """
    if not text:
        return ()
    names = COMPARISONS if text == "all" else tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in COMPARISONS:
            raise PlanError(f"--compare {name!r} is not one of {', '.join(COMPARISONS)}, all")
    return tuple(dict.fromkeys(names))


def comparison_plan(resolved: Resolved, changes: Mapping[str, Any], name: str) -> Plan:
    """The plan of a comparison: the federation's, with the scenario's `[compare.NAME]` and what the name means.

    Raises:
        PlanError: the result contradicts itself.
    """
    forced: dict[str, Any] = {"model.digest": resolved.plan.model.digest, "secure_aggregation.mode": "off"}
    forced |= {"evaluation.released_fraction": 0.0, "cohort.colluders": 0}
    if name in ("alone", "central", "central_nonprivate"):
        forced |= {"cohort.size": 1, "cohort.minimum": 1}
    if name in ("central", "central_nonprivate"):
        forced["local.expected_records"] = len(resolved.population.train)
    task = resolved.plan.task
    forced["task.labels"] = list(task.labels)  # as the records are numbered
    forced["task.label_texts"] = list(task.label_texts) if task.label_texts else None
    prompts = task.prompts
    forced["task.prompts"] = list(prompts) if prompts else None  # the same features for all
    private = name in ("alone", "central") and resolved.plan.privacy.noise != "none"
    tuned_for = "cohort" if private else None  # a sum there has as much noise as a cohort's
    if private and resolved.plan.shared_noise:
        forced["privacy.noise"] = "site"  # of one site: all of the noise, without anybody to share it
    if name in ("nonprivate", "central_nonprivate"):
        forced |= {"privacy.noise": "none", "privacy.epsilon": None}
    own = resolved.scenario.compare.get(name, {})
    faultless = resolved.scenario.model_copy(update={"faults": FaultSpec()})
    return resolve(faultless, resolved.population, {**own, **changes, **forced}, None, tuned_for).plan


def comparison_key(resolved: Resolved, changes: Mapping[str, Any], name: str) -> str:
    """Equal keys, equal comparisons: all that one depends on is its own plan, and who trains on which records.

    So who adds the noise, who drops out and, where the records are pooled, who holds them make no difference.

    Raises:
        PlanError: as `comparison_plan`.
    """
    population, plan = resolved.population, comparison_plan(resolved, changes, name)
    if name in ("central", "central_nonprivate"):
        sites, kind = [_units(population.train)], "pooled"
    else:
        sites, kind = [_units(member.train) for member in population.participants], "alone" * (name == "alone")
    scored = _units(population.validation or population.test)
    return hashlib.sha256(json.dumps([kind, plan.hash, sites, scored]).encode()).hexdigest()


def _units(examples: Examples) -> list[list[tuple[str, int]]]:
    """The records of each unit of privacy, in an order that says nothing."""
    units: dict[int, list[tuple[str, int]]] = defaultdict(list)
    for text, label, unit in zip(examples.texts, examples.labels.tolist(), examples.units.tolist(), strict=True):
        units[unit].append((text, label))
    return sorted(sorted(records) for records in units.values())


@dataclass(frozen=True)
class Federation:
    """A federation in this process: the same sites and rounds, without Flower in between."""

    plan: Plan
    work: WorkFolder
    members: Sequence[tuple[str, Examples]]
    stopping: Stopping

    def run(self, initial: Vector, observer: Callable[[RoundReport, Vector], None] | None = None) -> Vector:
        """All rounds; returns the finished weights [P].

        Raises:
            Interrupted: asked to stop.
        """
        handlers = {}
        for index, (name, examples) in enumerate(self.members):
            self.work.put_records(index, name, examples)
            handlers[name] = self._stoppable(make_site(self.work, index).handle)
        coordinator = Coordinator(self.plan, "local", initial, aggregation=PlainAggregation(), observer=observer)
        exchange = LocalExchange(handlers, Enquiry(PROTOCOL_VERSION, "local", self.plan.to_json(), self.plan.hash, ""))
        exchange.join()
        return coordinator.run(exchange)

    def _stoppable(self, handler: Callable[[Message], Message]) -> Callable[[Message], Message]:
        def handle(message: Message) -> Message:
            if self.stopping():
                raise Interrupted("asked to stop")
            return handler(message)

        return handle


def compare(prepared: Prepared, changes: Mapping[str, Any], name: str, stopping: Stopping) -> Comparison:
    """Run one comparison.

    Raises:
        Interrupted: asked to stop.
    """
    started = time.monotonic()
    plan = comparison_plan(prepared.resolved, changes, name)
    population = prepared.population
    scorer = Scorer(prepared.workspace_for(plan), prepared.held_out)
    everyone = [(participant.name, participant.train) for participant in population.participants]
    if name == "alone":
        groups = [[member] for member in everyone]
    elif name == "nonprivate":
        groups = [everyone]
    else:
        groups = [[("central", population.train)]]
    outcomes = []
    for index, members in enumerate(groups):
        work = prepared.work_for(f"{name}-{index:04d}", plan, len(members))
        outcomes.append(_run(Federation(plan, work, members, stopping), prepared, scorer))
    return Comparison(
        name=name,
        metrics={key: float(np.mean([metrics[key] for metrics, _ in outcomes])) for key in outcomes[0][0]},
        curve=tuple(float(value) for value in np.mean([curve for _, curve in outcomes], axis=0)),
        epsilon=plan_epsilon(plan, plan.run.rounds),
        seconds=time.monotonic() - started,
        members=tuple(metrics for metrics, _ in outcomes) if name == "alone" else (),
    )


def _run(federation: Federation, prepared: Prepared, scorer: Scorer) -> tuple[dict[str, float], list[float]]:
    """Final metrics, and the main metric by round where scoring is cheap (depth `head`)."""
    metric = federation.plan.evaluation.metrics[0]
    curve: list[float] = []

    def observe(_: RoundReport, weights: Vector) -> None:
        curve.append(scorer.score(weights)[metric])

    cheap = federation.plan.adapter.depth == "head"
    initial = prepared.workspace_for(federation.plan).initial()
    weights = federation.run(initial, observe if cheap else None)
    return scorer.score(weights), curve
