"""The run: rounds of cohort, aggregate, server step, checkpoint. Pure of Flower, clock and torch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from accord_server.aggregation import Aggregate, Aggregation
from accord_server.checkpoint import Begun, Checkpoint, CheckpointFolder
from accord_server.cohort import choose_cohort
from accord_server.exchange import Exchange
from accord_server.optimizer import State, initial_state, step
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

IDLE_TRIES = 8
"""How often in a row a round is begun with too few sites that are ready, before it is given up."""


@dataclass(frozen=True)
class Hooks:
    """What whoever runs a `Coordinator` has to do with its rounds."""

    guard: Callable[[int, int], None] = lambda number, attempt: None
    """Before an attempt at a round asks any site; raises where the coordinator could not keep what comes of it."""
    keep: Callable[[Callable[[], None]], None] = lambda write: write()
    """Writes what must not be lost: again, for as long as it fails."""
    in_vain: Callable[[int, int], None] = lambda number, attempt: None
    """After each attempt that came to nothing: its round, and its number."""


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
        hooks: Hooks | None = None,
    ) -> None:
        check_finite(initial, "the initial weights")
        self._plan = plan
        self._hash = plan.hash
        self._aggregation = aggregation
        self._folder = checkpoints
        self._observer = observer or (lambda report, weights: None)
        self._hooks = hooks or Hooks()
        self._forfeits = 0
        self._begun = checkpoints.begun() if checkpoints else Begun()
        self.ended = ""
        """Why the run ended before its last round, if so."""
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
            OutputError: the coordinator's own disk or database fails; sites were not asked.
        """
        self._pass_lost_rounds()
        while self._state.round < self._plan.run.rounds:
            report = self._round(exchange, self._state.round + 1)
            if report is None:
                break
            self._observer(report, self.weights)
        return self.weights

    def _pass_lost_rounds(self) -> None:
        """Rounds that sites answered, and whose sums are gone with a checkpoint, are over: the model stays.

        A site answers no round again from other weights, and none before its last.
        """
        begun, at = self._begun, self._state.round
        lost = begun.round if begun.closed or begun.round > at + 1 else at
        for number in range(at + 1, min(lost, self._plan.run.rounds) + 1):
            log.warning("round %d was answered before and is lost: the model stays as it was", number)
            report = RoundReport(number, 0, (), aborted_attempts=1, trips=0, upload_bytes=0, download_bytes=0)
            self._finish_round(report, self._state.weights, self._state.optimizer)
            self._observer(report, self.weights)
            if number == self._plan.run.rounds:
                self.ended = "its last rounds were lost with a checkpoint"

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
        self._finish_round(report, weights, optimizer)
        return report

    def _finish_round(self, report: RoundReport, weights: npt.NDArray[np.float64], optimizer: State) -> None:
        averages = report.round > self._plan.run.rounds * (1.0 - self._plan.server.average_last)
        self._state = replace(
            self._state,
            round=report.round,
            weights=weights,
            optimizer=optimizer,
            averaged=self._state.averaged + weights if averages else self._state.averaged,
            averaged_count=self._state.averaged_count + averages,
            history=(*self._state.history, report.to_json()),
        )
        if self._folder is not None:
            self._hooks.keep(partial(self._folder.save, self._state))

    def _attempts(self, exchange: Exchange, number: int) -> tuple[Aggregate, RoundReport] | None:
        """Try until enough sites finish; every attempt's bytes count.

        A round that was opened in vain, or whose first attempt asked sites that do not come back, is forfeited: it
        ends without survivors and the model stays, since sites that answered it take part in no other attempt of it
        that asks others.
        """
        spent = _Spent(first=1 + (self._begun.attempt if self._begun.round == number else 0))
        allowed = 1 + self._plan.run.max_extra_attempts
        while spent.begun < allowed:
            exchange.rest(spent.first - 1 + spent.tries)  # whatever made the last attempt fail may still be there
            cohort = self._cohort(exchange, number, spent.attempt + spent.idle)
            if cohort is None:
                log.warning("round %d is given up: sites that its first attempt asked do not come back", number)
                return self._ended_attempts(spent, self._forfeited(), number, 0)
            asked, aggregate = len(cohort), self._attempt(exchange, number, spent.attempt, cohort)
            spent.count(aggregate)
            for site, reason in aggregate.failures.items():
                log.info("round %d attempt %d: %s: %s", number, spent.last, site, reason)
            last_of_crashed = spent.first > 1 and spent.begun == allowed
            if last_of_crashed and not aggregate.survivors:  # what sites answered before the crash may bar others now
                aggregate = replace(aggregate, forfeited=True)
            if aggregate.forfeited or len(aggregate.survivors) >= self._plan.cohort.minimum:
                return self._ended_attempts(spent, aggregate, number, asked)
            if len(set(exchange.sites()) - aggregate.exhausted) < self._plan.cohort.minimum or spent.idle > IDLE_TRIES:
                break
        # Make-up rounds are run as far as they go; under shared noise attempts in vain were releases too.
        if aggregate.exhausted and (number > self._plan.rounds_per_site or self._plan.shared_noise):
            self.ended = f"{len(aggregate.exhausted)} sites have released all that the plan grants them"
            log.info("round %d: %s: the run ends", number, self.ended)
            return None
        reasons = sorted(set(aggregate.failures.values()))[:2]
        raise RoundAborted(
            f"round {number}: {len(aggregate.survivors)} of {asked} sites finished in the last of "
            f"{spent.tries} attempts, cohort.minimum is {self._plan.cohort.minimum} ({'; '.join(reasons)})"
        )

    def _cohort(self, exchange: Exchange, number: int, draw: int) -> tuple[str, ...] | None:
        """Sites to ask, at least `cohort.minimum`; None where the round's first attempt bars too many for good.

        `draw` tells apart the choices of a round: where too few of one were ready, the next is another.
        """
        minimum, bound = self._plan.cohort.minimum, self._bound(number)
        while exchange.ready(minimum, bound):
            present = [site for site in exchange.present() if bound is None or site in bound]
            if len(present) >= minimum:
                return choose_cohort(self._plan, present, number, draw)
        return None

    def _bound(self, number: int) -> frozenset[str] | None:
        """Whom alone a further attempt of a round may ask."""
        begun = self._begun
        return frozenset(begun.cohort) if self._aggregation.bound and begun.round == number and begun.cohort else None

    def _attempt(self, exchange: Exchange, number: int, attempt: int, cohort: tuple[str, ...]) -> Aggregate:
        began = False

        def begin(members: tuple[str, ...]) -> None:
            nonlocal began
            self._begin(number, attempt, members)
            began = True

        survivors: tuple[str, ...] = ()
        try:
            aggregate = self._aggregation.collect(self._request(number, attempt), cohort, exchange, begin)
            survivors = aggregate.survivors if len(aggregate.survivors) >= self._plan.cohort.minimum else ()
            return aggregate
        finally:
            if began and not survivors:
                self._hooks.in_vain(number, attempt)

    def _begin(self, number: int, attempt: int, members: tuple[str, ...]) -> None:
        """Before any site is asked: whatever of the coordinator's own can fail."""
        self._hooks.guard(number, attempt)
        begun = Begun(number, attempt, members)
        if self._folder is not None:
            vectors = 2 + len(self._state.optimizer)
            self._folder.begin(begun, vectors * self._state.weights.nbytes + 1000 * (1 + len(self._state.history)))
        self._begun = begun

    def _forfeited(self) -> Aggregate:
        """The round ends, and nobody is asked."""
        failures = {"the round": "sites that its first attempt asked did not come back"}
        return Aggregate(np.zeros(len(self._state.weights)), (), failures, trips=0, forfeited=True)

    def _ended_attempts(
        self, spent: _Spent, aggregate: Aggregate, number: int, asked: int
    ) -> tuple[Aggregate, RoundReport]:
        self._count_forfeits(aggregate, number)
        report = RoundReport(
            round=number,
            cohort=asked,
            survivors=aggregate.survivors,
            aborted_attempts=spent.begun - (not aggregate.forfeited),
            trips=spent.trips,
            upload_bytes=spent.uploaded,
            download_bytes=spent.downloaded,
            released=_released(aggregate.total[len(self._state.weights) :]),
        )
        return aggregate, report

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


@dataclass
class _Spent:
    """What the attempts of a round came to."""

    first: int
    """Number of the first attempt of this process."""
    begun: int = 0
    """Attempts that asked sites for updates."""
    idle: int = 0
    """Those that found too few ready and asked none, since the last that did."""
    tries: int = 0
    uploaded: int = 0
    downloaded: int = 0
    trips: int = 0

    @property
    def attempt(self) -> int:
        """Number of the next one; one that asked nobody keeps its number."""
        return self.first + self.begun

    @property
    def last(self) -> int:
        """Number of the last one."""
        return self.attempt - 1 if self.idle == 0 else self.attempt

    def count(self, aggregate: Aggregate) -> None:
        self.tries += 1
        self.begun, self.idle = (self.begun + 1, 0) if aggregate.begun else (self.begun, self.idle + 1)
        self.uploaded += aggregate.upload_bytes
        self.downloaded += aggregate.download_bytes
        self.trips += aggregate.trips


def _released(counts: npt.NDArray[np.float64]) -> dict[str, float]:
    """Accuracy from the two summed counts (right, all) [2]; empty without them, or where noise left no sense."""
    if len(counts) != 2 or counts[1] <= 0:
        return {}
    return {"accuracy": float(np.clip(counts[0] / counts[1], 0.0, 1.0))}
