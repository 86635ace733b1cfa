"""`accord audit inversion`: records from gradients, against a bare update and against a private sum.

A linear head's update is Σ r xᵀ over the records of a batch: its row space is spanned by their features. The attack
takes the leading right singular vectors, as many as the batch has records: for one record that is the feature vector
itself, up to its sign. Of 1,000 candidates it names the one that lies closest to that space (for a batch this is
subspace matching; Schmidt 1986, "MUSIC"). It needs neither labels nor weights, and works wherever residuals are not
parallel: of a batch larger than the number of classes less one, a part of the space is all that an update shows.

On the private sum the attacker also knows all records of all other sites and takes them away. A second attack is
tried there, the best that is possible against one record in Gaussian noise: by likelihood, from each candidate's own
gradient.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from accord_client.data import Examples
from accord_client.workspace import Workspace
from accord_shared.dp.accounting import noise_multiplier
from accord_shared.errors import DataError
from accord_shared.plan import Plan
from accord_simulations.audit.federation import Attacked, Watch, gradient_sum, ignore
from accord_simulations.audit.gradients import Floats, Integers, Records
from accord_simulations.audit.prepared import known_records, prepare_audit
from accord_simulations.prepare import Prepared
from accord_simulations.scenario import Scenario

BATCH_SIZES = (1, 8)
CANDIDATES = 1000
TRIALS, BARE_TRIALS = 1000, 200
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Retrieval:
    """How often the attack named the right candidate."""

    hits: int
    trials: int

    @property
    def rate(self) -> float:
        """Share of the trials."""
        return self.hits / self.trials

    @property
    def interval(self) -> tuple[float, float]:
        """Two-sided confidence interval of the rate (Clopper and Pearson 1934)."""
        from scipy.stats import beta  # noqa: PLC0415

        tail, missed = (1.0 - CONFIDENCE) / 2.0, self.trials - self.hits
        low = float(beta.ppf(tail, self.hits, missed + 1)) if self.hits else 0.0
        return low, float(beta.isf(tail, self.hits + 1, missed)) if missed else 1.0


@dataclass(frozen=True)
class Attack:
    """What one kind of update gave away at one batch size."""

    inversion: Retrieval
    likelihood: Retrieval
    reconstruction: float
    """Mean share of a record's feature vector that lies in the reconstructed space: 1 is all of it."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "trials": self.inversion.trials,
            "retrieval": self.inversion.rate,
            "retrieval_interval": list(self.inversion.interval),
            "likelihood": self.likelihood.rate,
            "likelihood_interval": list(self.likelihood.interval),
            "reconstruction": self.reconstruction,
        }


@dataclass(frozen=True)
class InversionAudit:
    """What the attacks retrieved, by batch size."""

    scenario: str
    noise: str
    secure_aggregation: str
    participants: int
    seed: int
    delta: float
    candidates: int
    bare: Mapping[int, Attack]
    private: Mapping[int, Attack]
    ideal_one_sum: float
    """Calculated: how often the best attack on one record names it, from one sum."""
    ideal_whole_run: float
    """Calculated: from all sums of the run, each with the record in it."""
    seconds: float
    epsilon_claimed: float

    def to_json(self) -> dict[str, Any]:
        """All numbers as plain JSON values."""
        kept = {key: value for key, value in asdict(self).items() if key not in ("bare", "private")}
        return {
            **kept,
            "seconds": round(self.seconds, 2),
            "confidence": CONFIDENCE,
            "bare": {str(size): one.to_json() for size, one in self.bare.items()},
            "private": {str(size): one.to_json() for size, one in self.private.items()},
            "batch_sizes": list(self.private),
            "trials": {str(size): one.inversion.trials for size, one in self.private.items()},
            "retrieval_bare": {str(size): one.inversion.rate for size, one in self.bare.items()},
            "retrieval_private": {str(size): one.inversion.rate for size, one in self.private.items()},
        }


def audit_inversion(
    scenario: Scenario,
    changes: Mapping[str, Any],
    folder: Path,
    *,
    data: Path | None = None,
    cache: Path | None = None,
    trials: int = TRIALS,
    bare_trials: int = BARE_TRIALS,
    on_trial: Watch = ignore,
    stopping: Callable[[], bool] = lambda: False,
) -> InversionAudit:
    """Attack single rounds of the scenario in an empty `folder`.

    Raises:
        DataError: too few distinct records for the candidates.
        AccordError: as `audit_canaries`.
    """
    started = time.monotonic()
    changes = {**changes, "evaluation.released_fraction": 0.0}
    prepared = prepare_audit(scenario, changes, folder, data=data, cache=cache)
    plan = prepared.plan
    bare, private = (_Laboratory.make(prepared, one, stopping) for one in (bare_plan(plan), plan))
    sigma = prepared.work.noise_multiplier
    return InversionAudit(
        scenario=scenario.scenario.name,
        noise=plan.privacy.noise,
        secure_aggregation=plan.secure_aggregation.mode,
        participants=plan.cohort.size,
        seed=plan.run.seed,
        delta=plan.privacy.delta,
        candidates=CANDIDATES,
        bare={size: bare.attack(size, bare_trials) for size in BATCH_SIZES},
        private={size: private.attack(size, trials, on_trial) for size in BATCH_SIZES},
        ideal_one_sum=ideal_retrieval(1.0 / sigma, CANDIDATES),
        ideal_whole_run=ideal_retrieval(math.sqrt(plan.run.rounds) / sigma, CANDIDATES),
        seconds=time.monotonic() - started,
        epsilon_claimed=plan.privacy.epsilon or 0.0,
    )


def bare_plan(plan: Plan) -> Plan:
    """One site without clipping, noise and secure aggregation: what plain federated learning sends."""
    return plan.revised(
        {
            "privacy.noise": "none",
            "privacy.epsilon": None,
            "local.clip_norm": None,
            "local.sampling_rate": 1.0,
            "secure_aggregation.mode": "off",
            "cohort.size": 1,
            "cohort.minimum": 1,
            "cohort.colluders": 0,
        }
    )


def reconstruct(update: npt.NDArray[Any], batch: int) -> npt.NDArray[np.float64]:
    """An orthonormal basis [≤ batch, d] of the space that the batch's features span, from its update [L, d]."""
    basis: npt.NDArray[np.float64] = np.linalg.svd(update.astype(np.float64), full_matrices=False)[2][:batch]
    return basis


def ideal_retrieval(signal: float, candidates: int) -> float:
    """P[the right candidate's score N(`signal`, 1) is above those of all others, N(0, 1)]."""
    from scipy.stats import norm  # noqa: PLC0415

    grid = np.linspace(-10.0, 10.0 + signal, 20_001)
    density = norm.pdf(grid - signal) * norm.cdf(grid) ** (candidates - 1)
    return float(np.trapezoid(density, grid))


@dataclass(frozen=True)
class _Laboratory:
    """One plan's federation, made afresh for every round with other records, and the attacks on its sum.

    The `examples` are distinct, each a unit of its own; the first `CANDIDATES` - 1 are the decoys, which nobody holds.
    """

    plan: Plan
    prepared: Prepared
    workspace: Workspace
    examples: Examples
    embeddings: Floats
    sites: tuple[str, ...]
    stopping: Callable[[], bool]

    @staticmethod
    def make(prepared: Prepared, plan: Plan, stopping: Callable[[], bool]) -> _Laboratory:
        """Shuffle the population's distinct records."""
        train = prepared.population.train
        distinct = np.unique(np.asarray(train.texts), return_index=True)[1]
        sites = tuple(part.name for part in prepared.population.participants)[: plan.cohort.size]
        if len(distinct) < CANDIDATES + max(BATCH_SIZES) * len(sites):
            raise DataError(f"{len(distinct)} distinct records are too few for {CANDIDATES} candidates")
        rows = np.random.default_rng([plan.run.seed, 0x1F]).permutation(distinct)
        units = np.arange(len(rows), dtype=np.int64)
        examples = Examples(tuple(train.texts[row] for row in rows.tolist()), train.labels[rows], units)
        workspace = prepared.workspace_for(plan)
        embeddings = np.asarray(workspace.embeddings(train.texts))[rows]
        workspace.keep_embeddings(examples.texts, embeddings)
        return _Laboratory(plan, prepared, workspace, examples, embeddings, sites, stopping)

    @cached_property
    def _known(self) -> Records:
        return known_records(self.workspace, self.examples)

    @cached_property
    def _weights(self) -> Floats:
        """The public start [L, d]: what the sites are asked at."""
        return self.workspace.initial().reshape(len(self.plan.task.labels), -1)

    @cached_property
    def _residuals(self) -> Floats:
        """r [n, L] of every record as its site would send it."""
        if self.plan.local.clip_norm is None:
            return self._known.residuals(self._weights)
        return self._known.clipped(self._weights, self.plan.local.clip_norm)[1]

    def attack(self, batch: int, trials: int, on_trial: Watch = ignore) -> Attack:
        """At least `trials` questions, as many a round as the sites hold records."""
        dice = np.random.default_rng([self.plan.run.seed, batch])
        victims = np.arange(CANDIDATES - 1, len(self.examples))
        named: list[tuple[bool, bool]] = []
        shares: list[float] = []
        while len(named) < trials:
            batches = dice.choice(victims, (len(self.sites), batch), replace=False)
            for rest, own in self._round(batches):
                basis = reconstruct(rest, batch)
                named += [self._named(rest, basis, record) for record in own.tolist()]
                shares += np.linalg.norm(self._known.features[own] @ basis.T, axis=1).tolist()
            on_trial(len(named), trials)
        hits = np.asarray(named).sum(axis=0)
        return Attack(
            inversion=Retrieval(int(hits[0]), len(named)),
            likelihood=Retrieval(int(hits[1]), len(named)),
            reconstruction=float(np.mean(shares)),
        )

    def _round(self, batches: Integers) -> Iterator[tuple[Floats, Integers]]:
        """One round of sites that hold `batches` [n, b]; for each, what was released of it without all the others."""
        members = []
        for name, own in zip(self.sites, batches, strict=True):
            examples = self.examples.take(own)
            self.workspace.keep_embeddings(examples.texts, self.embeddings[own])
            members.append((name, examples))
        with tempfile.TemporaryDirectory(dir=self.prepared.work.root) as folder:
            work = replace(self.prepared.work, root=Path(folder), noise_multiplier=noise_multiplier(self.plan))
            attacked = Attacked.make(self.plan, self.workspace, work, members)
            release = attacked.first_round(self._weights.ravel(), self.stopping)
        held = dict(zip(self.sites, batches, strict=True))
        for sites, total in release.sums:
            gradients = gradient_sum(self.plan, total, self._weights.shape)
            for name in sites:
                others = [record for other in sites if other != name for record in held[other].tolist()]
                known = self._residuals[others].T @ self._known.features[others]
                yield gradients - self.plan.local.sampling_rate * known, held[name]

    def _named(self, rest: Floats, basis: npt.NDArray[np.float64], record: int) -> tuple[bool, bool]:
        """Whether `record` comes first among the candidates, by subspace and by likelihood."""
        candidates = np.append(np.arange(CANDIDATES - 1), record)
        features, residuals = self._known.features[candidates], self._residuals[candidates]
        closeness = np.linalg.norm(features @ basis.T, axis=1)
        own = np.einsum("ij,ij->i", residuals, residuals) * np.einsum("ij,ij->i", features, features)
        likelihood = np.einsum("ij,ij->i", features @ rest.T, residuals) - own / 2.0
        return tuple(bool(score[-1] > score[:-1].max()) for score in (closeness, likelihood))  # type: ignore[return-value]
