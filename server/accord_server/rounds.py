"""The run: rounds of cohort, aggregate, server step, checkpoint. Pure of Flower, clock and torch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from accord_server.aggregation import Aggregate, Aggregation
from accord_server.checkpoint import Checkpoint, CheckpointFolder
from accord_server.cohort import choose_cohort
from accord_server.exchange import Exchange
from accord_server.optimizer import initial_state, step
from accord_shared import PROTOCOL_VERSION
from accord_shared.errors import RoundAborted
from accord_shared.messages import TrainRequest
from accord_shared.plan import Plan
from accord_shared.vectors import Vector, check_finite

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RoundReport:
    """Public facts of one finished round. `weights` [dimension] is the iterate after it."""

    round: int
    cohort: int
    survivors: tuple[str, ...]
    aborted_attempts: int
    trips: int
    """Of all attempts together."""
    upload_bytes: int
    download_bytes: int
    released: Mapping[str, float] = field(default_factory=dict)
    """Metrics of the iterate *before* the round, from the sites' noised counts."""

    def to_json(self) -> dict[str, object]:
        """Plain JSON values."""
        return asdict(self)


Observer = Callable[[RoundReport, Vector], None]
"""Called after each round's checkpoint with its report and the weights that the run would end with."""


class Coordinator:
    """Drives one plan from a starting point to its last round.

    The joint weights start at `initial` [dimension] or at `checkpoint`, which must be of the same plan.
    """

    def __init__(
        self,
        plan: Plan,
        run_id: str,
        initial: Vector,
        *,
        aggregation: Aggregation,
        checkpoints: CheckpointFolder | None = None,
        observer: Observer | None = None,
    ) -> None:
        check_finite(initial, "the initial weights")
        self._plan = plan
        self._hash = plan.hash
        self._aggregation = aggregation
        self._folder = checkpoints
        self._observer = observer
        self._forfeits = 0
        self._state = (checkpoints.load(self._hash) if checkpoints else None) or Checkpoint(
            run_id=run_id,
            plan_hash=self._hash,
            round=0,
            weights=initial.astype(np.float64),
            optimizer=initial_state(plan.server, len(initial)),
            averaged=np.zeros(len(initial)),
            averaged_count=0,
        )

    @property
    def run_id(self) -> str:
        """Id of the run; it survives restarts."""
        return self._state.run_id

    @property
    def finished_rounds(self) -> int:
        """Number of rounds done."""
        return self._state.round

    @property
    def history(self) -> tuple[dict[str, Any], ...]:
        """Public facts of the finished rounds, as `RoundReport.to_json` gives them."""
        return self._state.history

    @property
    def weights(self) -> Vector:
        """The model as of now [dimension]: the average of the last iterates once the plan averages."""
        if self._state.averaged_count:
            return (self._state.averaged / self._state.averaged_count).astype(np.float32)
        return self._state.weights.astype(np.float32)

    def run(self, exchange: Exchange) -> Vector:
        """All rounds that are left; returns the finished weights [dimension].

        Raises:
            RoundAborted: a round stayed below `cohort.minimum` in all its attempts.
            Interrupted: the run was asked to stop; finished rounds are kept.
            NonFinite: the joint weights ceased to be numbers.
        """
        while self._state.round < self._plan.run.rounds:
            report = self._round(exchange, self._state.round + 1)
            if report is None:
                break
            if self._observer is not None:
                self._observer(report, self.weights)
        return self.weights

    def _round(self, exchange: Exchange, number: int) -> RoundReport | None:
        """One round; None where too few sites have anything left to release: the run is at its end."""
        outcome = self._attempts(exchange, number)
        if outcome is None:
            return None
        aggregate, report = outcome
        weights, optimizer = self._state.weights, self._state.optimizer
        if aggregate.survivors:
            mean = aggregate.total[: len(weights)] / len(aggregate.survivors)
            with np.errstate(over="ignore", invalid="ignore"):  # the check below says it in a typed error
                change, optimizer = step(self._plan.server, self._state.optimizer, mean)
                weights = self._state.weights + change
        check_finite(weights, f"the joint model after round {number}")
        averages = number > self._plan.run.rounds * (1.0 - self._plan.server.average_last)
        self._state = replace(
            self._state,
            round=number,
            weights=weights,
            optimizer=optimizer,
            averaged=self._state.averaged + weights if averages else self._state.averaged,
            averaged_count=self._state.averaged_count + averages,
            history=(*self._state.history, report.to_json()),
        )
        if self._folder is not None:
            self._folder.save(self._state)
        return report

    def _attempts(self, exchange: Exchange, number: int) -> tuple[Aggregate, RoundReport] | None:
        """Try until enough sites finish; every attempt's bytes count.

        A round that was opened in vain is forfeited: it ends without survivors and the model stays, since sites
        that helped to open it take part in no other attempt of it.
        """
        uploaded = downloaded = trips = 0
        allowed = 1 + self._plan.run.max_extra_attempts
        first = 1 + (self._folder.attempts(number) if self._folder is not None else 0)
        for attempt in range(first, first + allowed):
            exchange.ready(self._plan.cohort.minimum)  # an attempt without enough sites would cost those that are there
            if self._folder is not None:
                self._folder.begin_attempt(number, attempt)
            cohort = choose_cohort(self._plan, exchange.present(), number, attempt)
            aggregate = self._aggregation.collect(self._request(number, attempt), cohort, exchange)
            uploaded += aggregate.upload_bytes
            downloaded += aggregate.download_bytes
            trips += aggregate.trips
            for site, reason in aggregate.failures.items():
                log.info("round %d attempt %d: %s: %s", number, attempt, site, reason)
            last_of_crashed = first > 1 and attempt == first + allowed - 1
            if last_of_crashed and not aggregate.survivors:  # what sites answered before the crash may bar others now
                aggregate = replace(aggregate, forfeited=True)
            if aggregate.forfeited or len(aggregate.survivors) >= self._plan.cohort.minimum:
                self._count_forfeits(aggregate, number)
                report = RoundReport(
                    round=number,
                    cohort=len(cohort),
                    survivors=aggregate.survivors,
                    aborted_attempts=attempt - first + aggregate.forfeited,
                    trips=trips,
                    upload_bytes=uploaded,
                    download_bytes=downloaded,
                    released=_released(aggregate.total[len(self._state.weights) :]),
                )
                return aggregate, report
            if len(set(exchange.sites()) - aggregate.exhausted) < self._plan.cohort.minimum:
                break
        # Make-up rounds are run as far as they go; under shared noise attempts in vain were releases too.
        if aggregate.exhausted and (number > self._plan.rounds_per_site or self._plan.shared_noise):
            log.info("round %d: %d sites have released all they may: the run ends", number, len(aggregate.exhausted))
            return None
        reasons = sorted(set(aggregate.failures.values()))[:2]
        raise RoundAborted(
            f"round {number}: {len(aggregate.survivors)} of {len(cohort)} sites finished in the last of "
            f"{attempt - first + 1} attempts, cohort.minimum is {self._plan.cohort.minimum} ({'; '.join(reasons)})"
        )

    def _request(self, number: int, attempt: int) -> TrainRequest:
        return TrainRequest(
            protocol=PROTOCOL_VERSION,
            run_id=self.run_id,
            plan_hash=self._hash,
            round=number,
            attempt=attempt,
            weights=self._state.weights.astype(np.float32),
        )

    def _count_forfeits(self, aggregate: Aggregate, number: int) -> None:
        """Give up where round after round is opened in vain.

        Raises:
            RoundAborted: more rounds in a row than a round has attempts.
        """
        self._forfeits = self._forfeits + 1 if aggregate.forfeited else 0
        if self._forfeits > 1 + self._plan.run.max_extra_attempts:
            reasons = "; ".join(sorted(set(aggregate.failures.values()))[:2])
            raise RoundAborted(f"round {number}: {self._forfeits} rounds in a row could not be opened ({reasons})")


def _released(counts: npt.NDArray[np.float64]) -> dict[str, float]:
    """Accuracy from the two summed counts (right, all) [2]; empty without them, or where noise left no sense."""
    if len(counts) != 2 or counts[1] <= 0:
        return {}
    return {"accuracy": float(np.clip(counts[0] / counts[1], 0.0, 1.0))}
