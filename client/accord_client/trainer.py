"""One site's part of a round: from the joint weights to the finished update."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from accord_client.dpsgd import ClippedOptimizer, NoisyOptimizer
from accord_client.gradients import CLIP_MARGIN, GradientTape
from accord_client.shapes import DUMMY, Indices, Shape, codes, row_batches, row_counts, widths
from accord_client.shapes import batches as batches_of
from accord_shared.dp.noise import SecureGenerator
from accord_shared.errors import PrivacyError
from accord_shared.plan import LocalSpec
from accord_shared.vectors import Layout, Vector, check_finite

_ROWS = {"features": 256, "cpu": 8, "accelerator": 64}
"""Most rows of a micro-batch: of features; of texts, where more are no faster and leave more dummies."""


@dataclass(frozen=True)
class Runtime:
    """Performance flags: they change speed and memory, never the mechanism."""

    device: str = "cpu"
    precision: str = "fp32"
    """`fp32`, or `bf16` for the forward and backward pass; norms, sums and noise stay fp32 or finer."""
    rows_in_memory: int = 64
    """Most rows of a micro-batch; a Poisson sample of any size is processed in as many as it takes."""

    def autocast(self) -> AbstractContextManager[object]:
        """The precision of the forward pass."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.split(":")[0], dtype=torch.bfloat16)

    def rows(self, *, features: bool) -> int:
        """Most rows of a micro-batch whose shape is fixed."""
        kind = "features" if features else "cpu" if self.device == "cpu" else "accelerator"
        return min(self.rows_in_memory, _ROWS[kind])

    @contextmanager
    def repeatable(self) -> Iterator[None]:
        """Kernels that add up in a fixed order, where an accelerator has the choice."""
        before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        if self.device == "cpu":
            yield
            return
        torch.use_deterministic_algorithms(True, warn_only=True)  # what has none shows when rows are compared
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "(?s).*determinis", UserWarning)
                yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


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
        """Number of tokens [n] of each row; None where rows are features."""

    @property
    def longest(self) -> int:
        """Most tokens that a row can have."""

    def inputs(self, rows: Indices, shape: Shape | None = None) -> Tensor | dict[str, Tensor]:
        """The model's input for the rows (or `DUMMY`, `PROBES`), on the model's device, padded to `shape`.

        Without a shape to the longest row at hand: for work that is not private.
        """


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
        tape, grouped = GradientTape(self.model.module), _UnitRows(self.batches)
        optimizer = self._clipped_optimizer(self.spec.clip_norm)
        for _ in range(self.spec.steps_per_round):
            total = self._sum(tape, grouped, self.spec.clip_norm)
            if total is not None:
                optimizer.accumulate(total)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return self.accounted, self.rejected

    def clipped_sum(self, clip_norm: float) -> Tensor | None:
        """The sum [P] of clipped gradients of one Poisson sample, fp64; None for an empty one."""
        return self._sum(GradientTape(self.model.module), _UnitRows(self.batches), clip_norm)

    def _sum(self, tape: GradientTape, grouped: _UnitRows, clip_norm: float) -> Tensor | None:
        """The clipped sum [P], fp64, of one Poisson sample, a micro-batch at a time."""
        chosen = np.flatnonzero(self.generator.bernoulli(self.spec.sampling_rate, grouped.n_units))
        total: Tensor | None = None
        with self.runtime.repeatable():
            for batch in grouped.micro_batches(chosen, lambda shape: self._counts(tape, shape)):
                self._record(tape, batch)
                clipped = tape.clip(clip_norm, total)
                total = clipped.total
                self.rejected += clipped.rejected
        return total

    def _record(self, tape: GradientTape, batch: MicroBatch) -> None:
        units = torch.from_numpy(batch.units).to(self.runtime.device)
        with tape.recording(units, batch.slots, rows_are_units=not batch.shape.several):
            for rows in batch.parts:
                self._loss(rows, batch.shape).backward()  # type: ignore[no-untyped-call]

    def _counts(self, tape: GradientTape, shape: Shape) -> Sequence[int]:
        """The numbers of rows at which gradients are a row's own."""

        def run(rows: Indices) -> Sequence[Tensor]:
            self._record(tape, MicroBatch(shape, (rows,), np.arange(len(rows)), len(rows)))
            return tape.recorded()

        kind = ("gradients", self.runtime.device, self.runtime.precision)
        most = self.runtime.rows(features=self.batches.lengths is None)
        return row_counts(self.model).of(kind, shape, most, run)

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

    def _loss(self, rows: Indices, shape: Shape | None = None) -> Tensor:
        """Cross-entropy summed over rows: each row's term depends on that row alone."""
        with self.runtime.autocast():
            logits = self.model.logits(self.batches.inputs(rows, shape))
        real = torch.from_numpy(rows != DUMMY)
        labels = torch.where(torch.from_numpy(rows >= 0), self.batches.labels[torch.from_numpy(np.maximum(rows, 0))], 0)
        losses = F.cross_entropy(logits.float(), labels.to(logits.device), reduction="none")
        return (losses * real.to(logits.device)).sum()


def _chunks(rows: Indices, size: int) -> Iterator[Indices]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


@dataclass(frozen=True)
class MicroBatch:
    """Rows of whole units: `parts` of [R] rows that run one after the other, and the place [R] of each row's unit.

    Of `slots` places. Several parts belong to one unit.
    """

    shape: Shape
    parts: tuple[Indices, ...]
    units: Indices
    slots: int


class _UnitRows:
    """Rows by unit, so that a unit's rows are clipped together, in micro-batches of units of one shape."""

    def __init__(self, batches: Batches) -> None:
        units = batches.units
        self.n_units = int(units.max()) + 1 if len(units) else 0
        self._rows = np.argsort(units, kind="stable")
        self._sizes = np.bincount(units, minlength=self.n_units)
        self._ends = np.cumsum(self._sizes)
        width, full = np.zeros(self.n_units, dtype=np.int64), np.ones(self.n_units, dtype=np.bool_)
        if batches.lengths is not None:
            np.maximum.at(width, units, batches.lengths)
            width = widths(width, batches.longest)
            np.logical_and.at(full, units, batches.lengths == width[units])
        self._codes = codes(width, full, self._sizes > 1)

    def micro_batches(self, chosen: Indices, counts_of: Callable[[Shape], Sequence[int]]) -> Iterator[MicroBatch]:
        """The `chosen` units, a shape at a time, in as many rows as `counts_of` the shape allows."""
        chosen = chosen[self._sizes[chosen] > 0]
        for code in np.unique(self._codes[chosen]).tolist():
            shape, units = Shape.of(code), chosen[self._codes[chosen] == code]
            counts = counts_of(shape)
            if shape.several:
                yield from self._several(shape, units.tolist(), counts)
                continue
            for rows in batches_of(self._rows[self._ends[units] - 1], counts):
                yield MicroBatch(shape, (rows,), np.arange(len(rows)), len(rows))

    def _several(self, shape: Shape, units: Sequence[int], counts: Sequence[int]) -> Iterator[MicroBatch]:
        """Whole units as they fit; one that does not fit at all in parts of its own."""
        most, size = counts[0], self._sizes
        together: list[int] = []
        for unit in units:
            if size[unit] > most:
                parts = tuple(batches_of(self._of(unit), (most,)))
                yield MicroBatch(shape, parts, np.zeros(most, dtype=np.int64), 1)
                continue
            if size[together].sum() + size[unit] > most:
                yield self._joined(shape, together, counts)
                together = []
            together.append(unit)
        if together:
            yield self._joined(shape, together, counts)

    def _joined(self, shape: Shape, units: Sequence[int], counts: Sequence[int]) -> MicroBatch:
        (rows,) = batches_of(np.concatenate([self._of(unit) for unit in units]), counts)
        places = np.zeros(len(rows), dtype=np.int64)  # dummies add zero to the first
        places[: self._sizes[units].sum()] = np.repeat(np.arange(len(units)), self._sizes[units])
        return MicroBatch(shape, (rows,), places, len(rows))

    def _of(self, unit: int) -> Indices:
        return self._rows[self._ends[unit] - self._sizes[unit] : self._ends[unit]]


def predict(model: TrainableModel, batches: Batches, runtime: Runtime) -> Indices:
    """The predicted class [n] of each record, whatever the others are."""

    def scores(rows: Indices, shape: Shape) -> Tensor:
        return model.logits(batches.inputs(rows, shape))

    def counts(shape: Shape) -> Sequence[int]:
        kind = ("scores", runtime.device, runtime.precision)
        return row_counts(model).of(kind, shape, most, lambda rows: [scores(rows, shape)])

    lengths, most = batches.lengths, runtime.rows(features=batches.lengths is None)
    predicted = np.zeros(len(batches.units), dtype=np.int64)
    with torch.inference_mode(), runtime.autocast(), runtime.repeatable():
        for shape, rows in row_batches(lengths, len(predicted), batches.longest, counts):
            predicted[rows[rows != DUMMY]] = scores(rows, shape).argmax(dim=1).cpu().numpy()[rows != DUMMY]
    return predicted
