"""The privacy conformance suite, for any task: what per-unit gradients and shared noise must satisfy.

Bring a `Subject` (a model, a loss, records that belong to units) and a plan, call the checks in your own tests:

    def test_my_task() -> None:
        check_all(lambda: MySubject())
        check_shared_noise(my_plan, dimension=29_568)

A check raises `Violation` with what it measured. Tolerances are relative to the norm at hand, or in standard errors.
References are computed in fp64, unit by unit, by plain autograd: nothing is shared with what is checked. Statistical
checks must tell a wrong σ too: `check_sigma` fails where the sample could not reject 2/3 and 3/2 of what is promised.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from accord_client.data import Examples
from accord_client.features import FeatureBatches
from accord_client.gradients import Clipped, GradientTape
from accord_client.models import HeadModel, LabelFrame
from accord_client.noise_checks import noise_checks, sampling_checks
from accord_client.trainer import Runtime, clipped_gradient
from accord_client.workspace import Workspace
from accord_shared.dp.accounting import noise_multiplier
from accord_shared.dp.discrete import ROUNDING_VARIANCE
from accord_shared.dp.noise import SecureGenerator
from accord_shared.dp.sharing import ARITHMETIC_MARGIN, NoiseShares
from accord_shared.plan import AdapterSpec, Plan
from accord_shared.quantize import decode, encode
from accord_shared.vectors import Vector

Indices = npt.NDArray[np.int64]

ROUNDING = 2e-4
"""Relative difference that fp32 may make between two exact ways to one gradient."""

SCALES = (1e-30, 1e-12, 1e-4, 1.0, 1e4, 1e12, 1e17, 1e25)
"""What adversarial records multiply their loss by."""


STANDARD_ERRORS = 5.0
"""A right σ is refused once in two million checks."""

_SAMPLED, _SAMPLES = 20_000, 20
_KEY_BYTES = 32

_COMPLAINT = "my card was lost in the post two weeks ago and nobody answers the phone any more today"


class Violation(AssertionError):
    """A privacy property does not hold."""


class Subject(Protocol):
    """A model, a loss and records that belong to privacy units 0..n-1.

    `loss` is what training differentiates: summed over `rows` [B], each row's term its own. `exact_loss` is
    the same in fp64 on `exact_module`, an independent double-precision copy of `module`.
    """

    module: nn.Module
    exact_module: nn.Module
    units: Indices  # [n] the unit of each row

    def loss(self, rows: Indices) -> Tensor:
        """Summed loss of the rows as it is trained."""

    def exact_loss(self, rows: Indices) -> Tensor:
        """Summed loss of the rows on `exact_module`."""


Tape = Callable[[nn.Module], GradientTape]
Factory = Callable[[], Subject]


def require(holds: bool, finding: str) -> None:
    """Raise `Violation` unless `holds`."""
    if not holds:
        raise Violation(finding)


@dataclass(frozen=True)
class Recorded:
    """A taped batch: unclipped gradients [U, P], and what clipping made of them."""

    gradients: Tensor
    clipped: Clipped
    leading: tuple[int, ...]
    """First dimensions of all per-unit buffers."""
    rows: int


def rows_of(subject: Subject, units: Sequence[int]) -> tuple[Indices, Indices]:
    """(rows, place of each row's unit in `units`)."""
    chosen = [np.flatnonzero(subject.units == unit) for unit in units]
    places = np.repeat(np.arange(len(units)), [len(rows) for rows in chosen])
    return np.concatenate(chosen), places


def record(
    subject: Subject, units: Sequence[int], clip_norm: float = 1.0, scale: float = 1.0, tape: Tape = GradientTape
) -> Recorded:
    """Tape one batch of whole `units`."""
    rows, places = rows_of(subject, units)
    recorder = tape(subject.module)
    with recorder.recording(torch.from_numpy(places), len(units)):
        (subject.loss(rows) * scale).backward()  # type: ignore[no-untyped-call]
    gradients = recorder.per_unit_gradients()
    leading = tuple(
        int(buffer.shape[0])
        for kept in recorder._order
        for buffer in (kept.per_unit, *(kept.factors or ()))
        if buffer is not None
    )
    return Recorded(gradients, recorder.clip(clip_norm), leading, len(rows))


def exact_gradient(subject: Subject, unit: int, scale: float = 1.0) -> Tensor:
    """The gradient [P] of one unit alone, by autograd in fp64."""
    rows, _ = rows_of(subject, [unit])
    parameters = [p for p in subject.exact_module.parameters() if p.requires_grad]
    parts = torch.autograd.grad(subject.exact_loss(rows) * scale, parameters)
    return torch.cat([part.reshape(-1) for part in parts])


def n_units(subject: Subject) -> int:
    """Number of units."""
    return int(subject.units.max()) + 1


def check_isolation(factory: Factory, tape: Tape = GradientTape) -> None:
    """Item 1: who else is in the batch, and how many, never changes a unit's gradient."""
    subject = factory()
    everyone = list(range(n_units(subject)))
    alone = record(subject, [0], tape=tape).gradients[0]
    for others in (everyone[1:2], everyone[2:], everyone[1:], everyone[:0:-1]):
        beside = record(subject, [*others, 0], tape=tape).gradients[-1]
        change = float((beside - alone).norm() / alone.norm())
        require(change < ROUNDING, f"other units {others} change a unit's gradient by {change:.2g} of its norm")


def check_leading_dimension(factory: Factory, tape: Tape = GradientTape) -> None:
    """Item 2: every per-unit buffer has as many entries as units were sampled, not tokens or rows."""
    subject = factory()
    for count in range(1, n_units(subject) + 1):
        recorded = record(subject, list(range(count)), tape=tape)
        single = recorded.rows == count
        allowed = {count} if single else {count, recorded.rows}
        require(set(recorded.leading) <= allowed, f"{count} units were sampled, buffers have {set(recorded.leading)}")
        require(len(recorded.clipped.norms) == count, f"{count} units, {len(recorded.clipped.norms)} norms")


def check_norms(factory: Factory, tape: Tape = GradientTape) -> None:
    """Item 3: gradients and norms equal those of an fp64 loop over the units."""
    subject = factory()
    recorded = record(subject, list(range(n_units(subject))), tape=tape)
    for unit, (gradient, norm) in enumerate(zip(recorded.gradients, recorded.clipped.norms, strict=True)):
        exact = exact_gradient(subject, unit)
        wrong = float((gradient.double() - exact).norm() / exact.norm())
        off = abs(float(norm) / float(exact.norm()) - 1.0)
        require(wrong < 10 * ROUNDING, f"unit {unit}: gradient differs by {wrong:.2g} of its norm")
        require(off < ROUNDING, f"unit {unit}: norm {float(norm):.6g}, an fp64 loop says {float(exact.norm()):.6g}")


def check_clipping(factory: Factory, tape: Tape = GradientTape, scales: Sequence[float] = SCALES) -> None:
    """Item 4: what a unit adds has norm ≤ C in fp64, whatever its scale; small gradients pass unchanged."""
    subject = factory()
    exact = [exact_gradient(subject, unit) for unit in range(min(2, n_units(subject)))]
    for unit, reference in enumerate(exact):
        for scale in scales:
            for clip_norm in (1e-3, 10.0):
                clipped = record(subject, [unit], clip_norm, scale, tape).clipped
                added = clipped.total.double()
                norm = float(added.norm())
                require(norm <= clip_norm, f"scale {scale:g}: a unit adds {norm:.8g}, C is {clip_norm:g}")
                true = float(reference.norm()) * scale
                if 1e-15 < true < clip_norm * 0.999:
                    wrong = float((added - reference * scale).norm()) / true
                    require(wrong < 10 * ROUNDING, f"a gradient below C was changed by {wrong:.2g}")
                if clip_norm * 1.001 < true < 1e12:
                    require(norm > clip_norm * 0.999, f"a gradient of norm {true:g} was cut to {norm:g} < C")


def check_sensitivity(factory: Factory, clip_norm: float = 0.1, tape: Tape = GradientTape) -> None:
    """Item 8 before rounding: adding any unit to a batch moves the clipped sum by at most C."""
    subject = factory()
    everyone = list(range(n_units(subject)))
    whole = record(subject, everyone, clip_norm, tape=tape).clipped.total.double()
    for unit in everyone:
        others = [other for other in everyone if other != unit]
        without = record(subject, others, clip_norm, tape=tape).clipped.total.double()
        change = float((whole - without).norm())
        require(change <= clip_norm * (1 + 1e-5), f"unit {unit} moves the clipped sum by {change:.8g} > C")


def check_all(factory: Factory, tape: Tape = GradientTape, scales: Sequence[float] = SCALES) -> None:
    """All checks."""
    for check in (check_isolation, check_leading_dimension, check_norms):
        check(factory, tape=tape)
    check_clipping(factory, tape, scales)
    check_sensitivity(factory, tape=tape)


@dataclass(frozen=True)
class Change:
    """How far one unit more moves the clipped sum, and how far the others' part of it, in units of C."""

    moved: float
    others: float


def changes(workspace: Workspace, examples: Examples, removed: Sequence[int]) -> dict[int, Change]:
    """What each of the `removed` units does to the clipped sum of all, by the step that sites run under shared noise.

    Records are prepared anew for every neighbour, as its site would: embeddings and frozen prefixes included.
    """
    weights = workspace.initial()
    weights += 0.02 * np.random.default_rng(3).normal(size=len(weights)).astype(np.float32)  # LoRA starts at B = 0
    whole = _clipped_sum(workspace, examples, weights)
    found = {}
    for unit in removed:
        without = _clipped_sum(workspace, examples.take(np.flatnonzero(examples.units != unit)), weights)
        alone = _clipped_sum(workspace, examples.take(np.flatnonzero(examples.units == unit)), weights)
        difference = whole - without
        found[unit] = Change(float(np.linalg.norm(difference)), float(np.linalg.norm(difference - alone)))
    return found


def _clipped_sum(workspace: Workspace, examples: Examples, weights: Vector) -> npt.NDArray[np.float64]:
    """The clipped sum [P] of all units over C."""
    local = workspace.plan.local.model_copy(update={"sampling_rate": 1.0})
    generator = SecureGenerator()
    step = clipped_gradient(
        workspace.model, workspace.batches(examples), local, weights, generator=generator, runtime=workspace.runtime
    )
    return step * -(local.expected_batch / (local.learning_rate * (local.clip_norm or 1.0)))


def crowd(classes: int) -> tuple[Examples, tuple[int, ...]]:
    """Records among which a unit's neighbours change with it, if they can; and the units whose removal would show it.

    Copies change alike, so that changes add up. One unit sets the width, another fills a micro-batch or opens one;
    others shift all that follow, have several rows of several lengths, or are cut.
    """
    words = _COMPLAINT.split()
    units: list[list[str]] = [[" ".join(words[:3])] for _ in range(25)]
    units += [[" ".join(words[: 1 + index])] for index in range(len(words))]
    units += [[" ".join(words * 40)], [" ".join(words * 40)], [" ".join(words[:9])] * 3]
    units += [[" ".join(words[: 2 + index]) for index in range(13)], [" ".join(words[:9]), words[0]]]
    examples = Examples(
        texts=tuple(text for unit in units for text in unit),
        labels=np.array([min(1, number) % classes for number, unit in enumerate(units) for _ in unit], dtype=np.int64),
        units=np.array([number for number, unit in enumerate(units) for _ in unit], dtype=np.int64),
    )
    last = len(units) - 1
    return examples, (0, 24, 30, last - 4, last - 2, last - 1, last)


def check_neighbours(workspace: Workspace, examples: Examples | None = None, removed: Sequence[int] = ()) -> None:
    """Item 1 on whole samples: a unit moves the clipped sum by its own clipped gradient, at most C, and nothing else.

    Of `crowd`, or of `examples` and the units `removed` from them one at a time.
    """
    if examples is None:
        examples, removed = crowd(len(workspace.plan.task.labels))
    for unit, change in changes(workspace, examples, removed).items():
        require(change.others <= ARITHMETIC_MARGIN, f"unit {unit} moves the others' part by {change.others:.3g} C")
        require(change.moved <= 1.0 + ARITHMETIC_MARGIN, f"unit {unit} moves the clipped sum by {change.moved:.6g} C")


@dataclass
class ModuleSubject:
    """A subject of a plain module that maps `inputs` [n, …] to class scores [n, classes]."""

    module: nn.Module
    inputs: Tensor
    labels: Tensor
    units: Indices

    def __post_init__(self) -> None:
        import copy

        self.exact_module = copy.deepcopy(self.module).double()

    def loss(self, rows: Indices) -> Tensor:
        """Summed cross-entropy."""
        return self._loss(self.module, self.inputs, rows)

    def exact_loss(self, rows: Indices) -> Tensor:
        """Summed cross-entropy in fp64."""
        return self._loss(self.exact_module, self.inputs.double(), rows)

    def _loss(self, module: nn.Module, inputs: Tensor, rows: Indices) -> Tensor:
        index = torch.from_numpy(rows)
        scores: Any = module(inputs[index])
        return nn.functional.cross_entropy(scores, self.labels[index], reduction="sum")


# --- sampling

_SAMPLED_UNITS, _SAMPLED_ROUNDS = 384, 60


def check_sampling(plan: Plan, *, generator: SecureGenerator | None = None) -> None:
    """Each unit is in each step by a coin of its own at `local.sampling_rate`: 1.25 q is told from q at q = 0.1.

    Of the very step that sites run, on units with orthogonal gradients, so that each is seen in the sum.
    """
    units = np.arange(_SAMPLED_UNITS, dtype=np.int64)
    frame = LabelFrame(torch.eye(2, _SAMPLED_UNITS), AdapterSpec(depth="head", init="zeros", features="pooled"))
    model = HeadModel(frame, "cpu")
    records = FeatureBatches(torch.eye(_SAMPLED_UNITS), torch.zeros(_SAMPLED_UNITS, dtype=torch.int64), units)
    local = plan.local.model_copy(update={"clip_norm": plan.local.clip_norm or 1.0, "steps_per_round": 1})
    source = generator or SecureGenerator()
    weights = np.zeros(2 * _SAMPLED_UNITS, dtype=np.float32)
    sums = [
        clipped_gradient(model, records, local, weights, generator=source, runtime=Runtime())
        for _ in range(_SAMPLED_ROUNDS)
    ]
    for check in sampling_checks(np.abs(np.stack(sums)[:, :_SAMPLED_UNITS]) > 0, plan.local.sampling_rate):
        require(check.passed, f"{check.name}: {check.statistic:.3g}, at most {check.limit:.3g}")


def check_generator(make: Callable[[], SecureGenerator] = SecureGenerator) -> None:
    """Whatever is the same at two sites or in two runs, their generators differ: the key is the operating system's."""
    with mock.patch.object(os, "urandom", wraps=os.urandom) as asked:
        one, two = make(), make()
    require(asked.call_count >= 2, "generators ask the operating system for no key of their own")
    require(all(call.args[0] >= _KEY_BYTES for call in asked.call_args_list), "a key of less than 256 bits")
    noise = np.stack([one.gaussian(_SAMPLED), one.gaussian(_SAMPLED), two.gaussian(_SAMPLED), two.gaussian(_SAMPLED)])
    check_noise(noise, 1.0)


# --- noise


def check_noise(noise: npt.NDArray[Any], sigma: float) -> None:
    """Items 6 and 7 of a run: `noise` [releases, d], data subtracted, is independent and of `sigma`, to the per cent.

    Releases are rounds, attempts, sites and runs; put all in one array. 400,000 values tell 0.98 and 1.02 σ from σ.
    """
    for check in noise_checks(noise, sigma):
        require(check.passed, f"{check.name}: {check.statistic:.3g}, at most {check.limit:.3g}")


def least_sensitivity(shares: NoiseShares) -> float:
    """How far one unit of norm C moves a vector on the grid of 2^-8 steps, measured: Δ is no less.

    The grid is written out again: coins that no data touch, and a unit on one coordinate or spread over all.
    """
    dice, fine = np.random.default_rng(0), float(1 << (8 + 16))
    start = dice.uniform(-1.0, 1.0, shares.dimension) * float(shares.steps)
    coins = dice.integers(0, 1 << 16, shares.dimension)
    moved = []
    for unit in (np.eye(1, shares.dimension)[0], np.full(shares.dimension, shares.dimension**-0.5)):
        with_unit = start + float(shares.steps) * unit
        one, two = (((np.trunc(x * fine)).astype(np.int64) + coins) >> 16 for x in (start, with_unit))
        moved.append(float(np.linalg.norm((two - one).astype(np.float64))) / 256.0)
    return max(moved)


def variance_accepts(values: npt.NDArray[Any], sigma: float) -> bool:
    """Whether Σ(x/σ)² of zero-mean `values` [n] lies within the chi-square's standard errors, √(2/n)."""
    scaled = np.square(np.asarray(values, dtype=np.float64) / sigma).mean()
    return bool(abs(scaled - 1.0) <= STANDARD_ERRORS * math.sqrt(2.0 / len(values)))


def check_sigma(values: npt.NDArray[Any], sigma: float) -> None:
    """Item 7: noise-only `values` [n] fit `sigma`, and do not fit 2/3 or 3/2 of it."""
    found = float(np.sqrt(np.square(np.asarray(values, dtype=np.float64)).mean()))
    require(variance_accepts(values, sigma), f"noise of standard deviation {found:.5g}, promised {sigma:.5g}")
    for wrong in (sigma * 2 / 3, sigma * 3 / 2):
        require(not variance_accepts(values, wrong), f"{len(values)} values cannot tell {sigma:.5g} from {wrong:.5g}")


def check_shared_noise(plan: Plan, dimension: int, *, generator: SecureGenerator | None = None) -> None:
    """Items 6, 8 and 9 for a plan under shared noise, of vectors of `dimension` [d] (at most 20,000 are sampled).

    For every number of survivors: what they keep adds up to the promise, by arithmetic and by samples of the very code
    that sites run; two sites and two attempts share nothing; all sums fit the modulus.
    """
    shares = NoiseShares.of(plan, dimension, noise_multiplier(plan))
    source = generator or SecureGenerator()
    unit = (plan.local.clip_norm or 0.0) * (
        1.0 if plan.privacy.noise == "participant" else plan.local.learning_rate / plan.local.expected_batch
    )
    steps = float(shares.scale) * unit
    require(abs(steps / float(shares.steps) - 1.0) <= 1e-9, f"a clip norm is {steps:.6g} steps, not {shares.steps}")
    least = least_sensitivity(shares)
    require(float(shares.delta_steps) >= least, f"Δ is {float(shares.delta_steps):.6g} steps, a unit moves {least:.6g}")
    promised = (noise_multiplier(plan) * least) ** 2
    for survivors in range(shares.minimum, shares.sites + 1):
        kept = ROUNDING_VARIANCE + shares.base + sum(shares.components[index] for index in shares.kept(survivors))
        total = float(kept) * (survivors - shares.colluders)
        require(total >= promised, f"{survivors} survivors keep a variance of {total:.6g}, promised {promised:.6g}")
    require(shares.limit < 1 << (shares.bits - 1), f"sums up to {shares.limit} wrap in {shares.bits} bits")
    sample = NoiseShares.of(plan, min(dimension, _SAMPLED), shares.multiplier)
    drawn = [_noise_of(sample, source) for _ in range(_SAMPLES)]
    for survivors in (sample.minimum, sample.sites):
        kept_parts = [0, *(1 + index for index in sample.kept(survivors))]
        variance = sample.base + ROUNDING_VARIANCE + sum(sample.components[index] for index in sample.kept(survivors))
        check_noise(
            np.stack([np.sum([one[part] for part in kept_parts], axis=0) for one in drawn]), math.sqrt(variance)
        )


def _noise_of(shares: NoiseShares, source: SecureGenerator) -> list[npt.NDArray[np.float64]]:
    """Base (with rounding) and components of one site's zero update, in steps."""
    base = decode(encode(np.zeros(shares.dimension), shares, source), shares, shares.sites) * shares.scale
    seeds = [source.uint64(4).tobytes() for _ in shares.components]
    parts = zip(shares.component_noise, seeds, strict=True)
    return [base, *(noise.sample(seed, shares.dimension).astype(np.float64) for noise, seed in parts)]
