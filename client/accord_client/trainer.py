"""One site's part of a round: from the joint weights to the finished update."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from accord_client.dpsgd import ClippedOptimizer, NoisyOptimizer
from accord_client.gradients import CLIP_MARGIN, Clipped, GradientTape
from accord_shared.dp.noise import SecureGenerator
from accord_shared.errors import PrivacyError
from accord_shared.plan import LocalSpec
from accord_shared.vectors import Layout, Vector, check_finite

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Runtime:
    """Performance flags: they change speed and memory, never the mechanism."""

    device: str = "cpu"
    precision: str = "fp32"
    """`fp32`, or `bf16` for the forward and backward pass; norms, sums and noise stay fp32 or finer."""
    rows_in_memory: int = 64
    """Rows of a micro-batch; a Poisson sample of any size is processed in as many as it takes."""

    def autocast(self) -> AbstractContextManager[object]:
        """The precision of the forward pass."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.split(":")[0], dtype=torch.bfloat16)


class Batches(Protocol):
    """Prepared records of one site."""

    @property
    def labels(self) -> Tensor:
        """Class [n] int64 of each row."""

    @property
    def units(self) -> Indices:
        """Privacy unit [n] of each row, 0..n_units-1."""

    @property
    def lengths(self) -> Indices | None:
        """Length [n] of each row where it decides what a micro-batch costs, else None."""

    def inputs(self, rows: Indices) -> Tensor | dict[str, Tensor]:
        """The model's input for the rows, on the model's device."""


class TrainableModel(Protocol):
    """A model whose trainable tensors are one flat vector."""

    module: nn.Module
    layout: Layout

    def load(self, vector: Vector) -> None:
        """Set the trainable tensors from `vector` [P]."""

    def vector(self) -> Vector:
        """The trainable tensors as one vector [P]."""

    def logits(self, inputs: Tensor | dict[str, Tensor]) -> Tensor:
        """Class scores [B, classes]."""


@dataclass(frozen=True)
class LocalUpdate:
    """The change of the weights [P], the noisy steps that it took, units whose gradient was not finite."""

    update: Vector
    steps: int
    rejected: int


def train(
    model: TrainableModel,
    batches: Batches,
    spec: LocalSpec,
    weights: Vector,
    *,
    noise_multiplier: float,
    generator: SecureGenerator,
    runtime: Runtime,
) -> LocalUpdate:
    """Run `steps_per_round` local steps from `weights` [P].

    `noise_multiplier` 0 means plain training without any privacy, clipped per unit where the plan names C.

    Raises:
        PrivacyError: the steps that ran are not the steps that the plan accounts for.
        NonFinite: the joint weights hold NaN or infinity.

    The update is not checked: whether noise made it infinite is itself a release, and must be paid for first.
    """
    check_finite(weights, "the joint weights")
    model.load(weights)
    steps, rejected = _Steps(model, batches, spec, noise_multiplier, generator, runtime).run()
    if steps != spec.steps_per_round:
        raise PrivacyError(f"{steps} steps ran, the plan accounts for {spec.steps_per_round}")
    with np.errstate(over="ignore", invalid="ignore"):
        update = model.vector() - weights
    return LocalUpdate(update=update, steps=steps, rejected=rejected)


def clipped_gradient(
    model: TrainableModel,
    batches: Batches,
    spec: LocalSpec,
    weights: Vector,
    *,
    generator: SecureGenerator,
    runtime: Runtime,
) -> npt.NDArray[np.float64]:
    """The step of DP-FedSGD that awaits its noise: -η/(q·E) · Σ of clipped unit gradients at `weights` [P], in fp64.

    Of one Poisson sample. Nothing of it may leave before shared noise is on it.

    Raises:
        PrivacyError: the plan names no clip norm.
        NonFinite: the joint weights hold NaN or infinity.
    """
    if spec.clip_norm is None:
        raise PrivacyError("shared noise needs a clip norm")
    check_finite(weights, "the joint weights")
    model.load(weights)
    total = _Steps(model, batches, spec, 0.0, generator, runtime).clipped_sum(spec.clip_norm)
    if total is None:
        return np.zeros(len(weights))
    update: npt.NDArray[np.float64] = total.cpu().numpy() * -(spec.learning_rate / spec.expected_batch)
    return update


def clipped_update(
    model: TrainableModel,
    batches: Batches,
    spec: LocalSpec,
    weights: Vector,
    *,
    generator: SecureGenerator,
    runtime: Runtime,
) -> npt.NDArray[np.float64]:
    """A whole update [P] of plain local training, scaled to norm ≤ C in fp64: `participant` noise awaits it.

    An update that is not finite counts as none.

    Raises:
        PrivacyError: the plan names no clip norm.
        NonFinite: the joint weights hold NaN or infinity.
    """
    if spec.clip_norm is None:
        raise PrivacyError("shared noise needs a clip norm")
    plain = spec.model_copy(update={"clip_norm": None})
    trained = train(model, batches, plain, weights, noise_multiplier=0.0, generator=generator, runtime=runtime)
    update = trained.update.astype(np.float64)
    norm = float(np.linalg.norm(update))
    if not np.isfinite(norm):
        return np.zeros(len(weights))
    return update * min(1.0, spec.clip_norm / (norm * (1.0 + CLIP_MARGIN))) if norm > 0.0 else update


@dataclass
class _Steps:
    """The local steps of one round."""

    model: TrainableModel
    batches: Batches
    spec: LocalSpec
    noise_multiplier: float
    generator: SecureGenerator
    runtime: Runtime
    accounted: int = 0
    rejected: int = 0

    def run(self) -> tuple[int, int]:
        """(steps that were accounted, units left out because their gradient was not finite)."""
        if self.spec.clip_norm is None:
            if self.noise_multiplier > 0.0:
                raise PrivacyError("noise without a clip norm hides nothing")
            return self._plain(), 0
        tape = GradientTape(self.model.module)
        grouped = _UnitRows(self.batches.units, self.batches.lengths)
        optimizer = self._clipped_optimizer(self.spec.clip_norm)
        for _ in range(self.spec.steps_per_round):
            for clipped in self._clipped(tape, grouped, self.spec.clip_norm, exact=False):
                optimizer.accumulate(clipped)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return self.accounted, self.rejected

    def clipped_sum(self, clip_norm: float) -> Tensor | None:
        """The sum [P] of clipped gradients of one Poisson sample, fp64; None for an empty one."""
        grouped = _UnitRows(self.batches.units, self.batches.lengths)
        total: Tensor | None = None
        for clipped in self._clipped(GradientTape(self.model.module), grouped, clip_norm, exact=True):
            total = clipped.total if total is None else total + clipped.total
        return total

    def _clipped(self, tape: GradientTape, grouped: _UnitRows, clip_norm: float, *, exact: bool) -> Iterator[Clipped]:
        """The clipped sums of one Poisson sample, a micro-batch at a time."""
        chosen = np.flatnonzero(self.generator.bernoulli(self.spec.sampling_rate, grouped.n_units))
        for rows, unit_of_row, n_units in grouped.micro_batches(chosen, self.runtime.rows_in_memory):
            with tape.recording(torch.from_numpy(unit_of_row).to(self.runtime.device), n_units):
                self._loss(rows).backward()  # type: ignore[no-untyped-call]
            clipped = tape.clip(clip_norm, exact=exact)
            self.rejected += clipped.rejected
            yield clipped

    def _clipped_optimizer(self, clip_norm: float) -> ClippedOptimizer:
        kind = NoisyOptimizer if self.noise_multiplier > 0.0 else ClippedOptimizer
        return kind(
            self._optimizer(),
            noise_multiplier=self.noise_multiplier,
            clip_norm=clip_norm,
            expected_batch=self.spec.expected_batch,
            generator=self.generator,
            on_step=self._count,
        )

    def _count(self) -> None:
        self.accounted += 1

    def _plain(self) -> int:
        optimizer = self._optimizer()
        n_rows = len(self.batches.units)
        for _ in range(self.spec.steps_per_round):
            rows = np.flatnonzero(self.generator.bernoulli(self.spec.sampling_rate, n_rows))
            optimizer.zero_grad(set_to_none=True)
            for part in _chunks(rows, self.runtime.rows_in_memory):
                (self._loss(part) / self.spec.expected_batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return self.spec.steps_per_round

    def _optimizer(self) -> torch.optim.Optimizer:
        parameters = [p for p in self.model.module.parameters() if p.requires_grad]
        if self.spec.optimizer == "adam":
            return torch.optim.Adam(parameters, lr=self.spec.learning_rate)
        return torch.optim.SGD(parameters, lr=self.spec.learning_rate, momentum=self.spec.momentum)

    def _loss(self, rows: Indices) -> Tensor:
        """Cross-entropy summed over rows: each row's term depends on that row alone."""
        with self.runtime.autocast():
            logits = self.model.logits(self.batches.inputs(rows))
        labels = self.batches.labels[torch.from_numpy(rows)].to(logits.device)
        return F.cross_entropy(logits.float(), labels, reduction="sum")


def _chunks(rows: Indices, size: int) -> Iterator[Indices]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


class _UnitRows:
    """Rows by unit, so that a unit's rows always meet in one micro-batch and are clipped together."""

    def __init__(self, units: Indices, lengths: Indices | None) -> None:
        self.n_units = int(units.max()) + 1 if len(units) else 0
        self._rows = np.argsort(units, kind="stable")
        self._sizes = np.bincount(units, minlength=self.n_units)
        self._ends = np.cumsum(self._sizes)
        self._single = bool((self._sizes == 1).all())
        self._longest: Indices | None = None
        if lengths is not None:
            self._longest = np.zeros(self.n_units, dtype=np.int64)
            np.maximum.at(self._longest, units, lengths)

    def micro_batches(self, chosen: Indices, limit: int) -> Iterator[tuple[Indices, Indices, int]]:
        """(rows, unit of each row, number of units) of the `chosen` units, about `limit` rows at a time."""
        if self._longest is not None:  # the sum does not depend on the order; padding does: units of a length meet
            chosen = chosen[np.argsort(self._longest[chosen], kind="stable")]
        for units in self._split(chosen, limit):
            sizes = self._sizes[units]
            starts = self._ends[units] - sizes
            unit_of_row = np.repeat(np.arange(len(units)), sizes)
            offsets = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            yield self._rows[np.repeat(starts, sizes) + offsets], unit_of_row, len(units)

    def _split(self, chosen: Indices, limit: int) -> Iterator[Indices]:
        if self._single:
            yield from _chunks(chosen, limit)
            return
        cumulative = np.cumsum(self._sizes[chosen])
        cuts = np.flatnonzero(np.diff(cumulative // limit)) + 1
        yield from (part for part in np.split(chosen, cuts) if len(part))


def predict(
    model: TrainableModel,
    inputs: Callable[[Indices], Tensor | dict[str, Tensor]],
    count: int,
    runtime: Runtime,
    rows_in_memory: int = 512,
) -> Indices:
    """The predicted class [count] of each record."""
    parts = []
    with torch.inference_mode(), runtime.autocast():
        for rows in _chunks(np.arange(count), rows_in_memory):
            parts.append(model.logits(inputs(rows)).argmax(dim=1).cpu().numpy())
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
