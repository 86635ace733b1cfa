"""`accord audit canaries`: plant canaries in a run, look at all it releases, bound ε from below.

The attacker is the strongest that the guarantee is against: it knows every record but the canaries' coins, sees the
weights of every round and what the view of the plan's noise mode releases, and knows each canary's gradient.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from accord_client.data import Examples
from accord_client.features import FeatureCache
from accord_client.metrics import hold_back
from accord_client.noise_checks import Check
from accord_client.workspace import Workspace
from accord_server.rounds import Coordinator
from accord_shared.dp.accounting import calibrate, epsilon
from accord_shared.plan import Plan
from accord_simulations.audit.federation import RUN_ID, Attacked, Recorder, Release, Watch, gradient_sum, ignore
from accord_simulations.audit.gradients import Floats, Records
from accord_simulations.audit.mechanism import Mechanism
from accord_simulations.audit.membership import auc, tpr_at_fpr
from accord_simulations.audit.one_run import Scores, audit, guesses_per_side
from accord_simulations.audit.planting import Canaries, embeddings_of, label_embeddings, with_spare_classes
from accord_simulations.audit.prepared import clip_norm_of, known_records, prepare_audit
from accord_simulations.prepare import Prepared
from accord_simulations.scenario import Scenario
from accord_simulations.scoring import Scorer

CANARIES = 20_000
CONFIDENCE = 0.95
FPR = 0.01


@dataclass(frozen=True)
class CanaryAudit:
    """What the audit found. `epsilon_claimed` is what the plan promises, `epsilon_spent` what the run was charged."""

    scenario: str
    noise: str
    secure_aggregation: str
    participants: int
    rounds: int
    seed: int
    canaries: int
    members: int
    spare_classes: int
    guesses: int
    correct: int
    confidence: float
    delta: float
    accuracy: float
    """Of the finished model on held-out records, canaries and all."""
    seconds: float
    epsilon_spent: float
    epsilon_all_collude: float
    epsilon_claimed: float
    epsilon_lower_bound: float
    auc: float
    tpr_at_1pct_fpr: float
    checks: tuple[Check, ...] = ()
    """Tests of the run's noise and sampling, and of a second run's first round."""

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the tests that a right mechanism fails once in a million runs."""
        return tuple(check.name for check in self.checks if not check.passed)

    @property
    def refuted(self) -> bool:
        """Whether the run leaked more than it claims, at the audit's confidence."""
        return self.epsilon_lower_bound > self.epsilon_claimed

    def to_json(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        own = asdict(self)
        checks = [
            {**check, "passed": found.passed} for check, found in zip(own.pop("checks"), self.checks, strict=True)
        ]
        first = {"refuted": self.refuted, "failed_checks": list(self.failed), "checks": checks}
        return {**first, **own, "seconds": round(self.seconds, 2)}


@dataclass(frozen=True)
class Outcome:
    """The result, with the scores [m] and coins [m] that it comes from."""

    result: CanaryAudit
    scores: Scores
    canaries: Canaries


def audit_canaries(
    scenario: Scenario,
    changes: Mapping[str, Any],
    folder: Path,
    *,
    data: Path | None = None,
    count: int = CANARIES,
    cache: Path | None = None,
    on_round: Watch = ignore,
    stopping: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Run the scenario with canaries in an empty `folder` and attack it.

    Raises:
        PlanError: nothing is claimed, or the audit has no attack on what is.
        AccordError: as `accord simulate`.
    """
    started = time.monotonic()
    prepared = prepare_audit(scenario, changes, folder, data=data, cache=cache)
    seed, width = prepared.plan.run.seed, prepared.workspace.frame.embeddings.shape[1]
    plan = with_spare_classes(prepared.plan, count, width)
    canaries = Canaries.draw(count, width, len(prepared.population.participants), seed)
    workspace = audited_workspace(prepared, plan)
    members = _plant(workspace, prepared.population.participants, canaries)
    others = {part.name: known_records(workspace, part.train) for part in prepared.population.participants}
    auditor = Auditor(plan, canaries, others)
    mechanism = Mechanism(plan, prepared.work.noise_multiplier, canaries, others)

    def see(release: Release) -> None:
        auditor.see(release)
        mechanism.see(release)

    attacked = Attacked.make(plan, workspace, prepared.work, members)
    coordinator = Coordinator(
        plan,
        RUN_ID,
        workspace.initial(),
        aggregation=Recorder(attacked.aggregation, see, stopping, attacked.unnoised),
        observer=lambda report, _: on_round(report.round, plan.run.rounds),
    )
    weights = coordinator.run(attacked.exchange)
    again = replace(prepared.work, root=prepared.work.root / "second run")
    mechanism.see(Attacked.make(plan, workspace, again, members).first_round(workspace.initial(), stopping))
    spent, collude = _spent(prepared, plan)
    claimed, delta = plan.privacy.epsilon or 0.0, plan.privacy.delta
    per_side = guesses_per_side(count, calibrate(claimed, delta, 1.0, 1), delta, CONFIDENCE)
    found = audit(auditor.scores, canaries.members, per_side, delta, CONFIDENCE)
    accuracy = Scorer(workspace, prepared.held_out).score(weights)[plan.evaluation.metrics[0]]
    result = CanaryAudit(
        scenario=scenario.scenario.name,
        noise=plan.privacy.noise,
        secure_aggregation=plan.secure_aggregation.mode,
        participants=len(members),
        rounds=plan.run.rounds,
        seed=seed,
        canaries=count,
        members=int(canaries.members.sum()),
        spare_classes=len(plan.task.labels) - len(prepared.plan.task.labels),
        guesses=found.guesses,
        correct=found.correct,
        confidence=CONFIDENCE,
        delta=delta,
        accuracy=accuracy,
        seconds=time.monotonic() - started,
        epsilon_spent=spent,
        epsilon_all_collude=collude,
        epsilon_claimed=claimed,
        epsilon_lower_bound=found.epsilon,
        auc=auc(auditor.scores, canaries.members),
        tpr_at_1pct_fpr=tpr_at_fpr(auditor.scores, canaries.members, FPR),
        checks=mechanism.checks(),
    )
    return Outcome(result, auditor.scores, canaries)


def audited_workspace(prepared: Prepared, plan: Plan) -> Workspace:
    """A workspace of the plan with spare classes, over the same embeddings."""
    workspace = Workspace(plan, FeatureCache(prepared.work.cache), prepared.workspace.runtime)
    if plan.task.labels != prepared.plan.task.labels:
        own = np.asarray(prepared.workspace.embeddings(prepared.plan.task.texts))
        embeddings = label_embeddings(own, len(plan.task.labels), plan.run.seed)
        workspace.keep_embeddings(plan.task.texts, embeddings)
    return workspace


def _plant(workspace: Workspace, participants: Sequence[Any], canaries: Canaries) -> list[tuple[str, Examples]]:
    """Every participant's records and member canaries, their embeddings where the product looks for them."""
    members = []
    embeddings = embeddings_of(canaries.features, workspace)
    for index, participant in enumerate(participants):
        planted, chosen = canaries.planted(index, participant.train)
        own = np.asarray(workspace.embeddings(participant.train.texts))
        rows = dict(zip(planted.texts, np.concatenate([own, embeddings[chosen]]), strict=True))
        for part in (planted, *hold_back(planted, workspace.plan.evaluation.released_fraction)):
            if len(part):
                workspace.keep_embeddings(part.texts, np.stack([rows[text] for text in part.texts]))
        members.append((participant.name, planted))
    return members


def _spent(prepared: Prepared, plan: Plan) -> tuple[float, float]:
    """ε that the run was charged, at the participant that spent most: against the coordinator, and against all."""
    privacy = plan.privacy
    spent = [
        [epsilon(events, privacy.delta, privacy.accountant, colluding=colluding) for colluding in (False, True)]
        for events in (
            prepared.work.store(index).releases(plan.hash).events for index in range(prepared.work.participants)
        )
    ]
    return max(own for own, _ in spent), max(collude for _, collude in spent)


class Auditor:
    """Adds up, round by round, the inner product of what is released with each canary's clipped gradient.

    Canaries are so near to orthogonal that solving for all of them together (least squares on their Gram matrix) would
    take a few per cent off the scores' spread, and is left out.

    Before it adds, it takes away what it knows: the other records' sum, and half of every canary. Two directions are
    left out of each sum altogether, those of the other records' gradients with and without clipping, so that scores do
    not drown where a mechanism fails to clip.
    """

    def __init__(self, plan: Plan, canaries: Canaries, others: Mapping[str, Records]) -> None:
        self._plan, self._others, self._site = plan, others, canaries.site
        self._numbers = {name: number for number, name in enumerate(others)}
        units = np.arange(len(canaries.labels), dtype=np.int64)
        self._canaries = Records(canaries.features, canaries.labels, units)
        self.scores: Scores = np.zeros(len(units))

    def see(self, release: Release) -> None:
        """Take one round into account."""
        weights = release.weights.reshape(-1, self._canaries.features.shape[1])
        clip_norm = clip_norm_of(self._plan)
        _, gradients = self._canaries.clipped(weights, clip_norm)
        for sites, total in release.sums:
            seen = np.isin(self._site, [self._numbers[name] for name in sites])
            rest = gradient_sum(self._plan, total, weights.shape)
            rest -= self._plan.local.sampling_rate / 2.0 * self._canaries.total(gradients * seen[:, None])
            rest = self._without_others(rest, sites, weights)
            self.scores += np.where(seen, self._canaries.project(gradients, rest), 0.0) / clip_norm**2

    def _without_others(self, rest: Floats, sites: Sequence[str], weights: Floats) -> Floats:
        known, plain = np.zeros_like(rest), np.zeros_like(rest)
        for name in sites:
            residuals, clipped = self._others[name].clipped(weights, clip_norm_of(self._plan))
            known += self._others[name].total(clipped)
            plain += self._others[name].total(residuals)
        rest = rest - self._plan.local.sampling_rate * known
        for direction in np.linalg.qr(np.stack([known.ravel(), plain.ravel()], axis=1).astype(np.float64))[0].T:
            rest = rest - (direction @ rest.ravel() * direction).reshape(rest.shape).astype(np.float32)
        return rest
