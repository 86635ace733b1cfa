"""Items 1 to 4: the gradient tape on every depth and target, and on models made to break it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from accord_client.conformance import (
    ModuleSubject,
    Violation,
    check_all,
    check_clipping,
    check_isolation,
    check_norms,
    check_sensitivity,
    exact_gradient,
    record,
)
from accord_client.gradients import GradientTape
from accord_shared.errors import PrivacyError, UnsupportedLayer
from accord_shared.plan import Plan
from conformance.plans import PlanSubject, save_tiny_bert
from conftest import plan_of

ALL_LINEAR = ["query", "key", "value", "dense"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "head": {"adapter.depth": "head"},
    "lora-qv": {"adapter.depth": "lora", "adapter.rank": 4},
    "lora-all": {"adapter.depth": "lora", "adapter.rank": 2, "adapter.targets": ALL_LINEAR},
    "lora-freeze-a": {"adapter.depth": "lora", "adapter.rank": 4, "adapter.freeze_a": True},
    "lora-last-2": {"adapter.depth": "lora", "adapter.rank": 4, "adapter.layers": "last:2"},
    "full": {"adapter.depth": "full"},
    "full-last-1": {"adapter.depth": "full", "adapter.layers": "last:1"},
}
MANY_ROWS = (0, 1, 0, 2, 1, 0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    return save_tiny_bert(tmp_path_factory.mktemp("tiny"), model_folder)


@pytest.fixture(scope="module")
def tiny_plan(tiny: Path) -> Callable[[str], Plan]:
    return lambda adapter: plan_of({"model.source": f"path:{tiny}", **ADAPTERS[adapter]})


@pytest.mark.parametrize("units", [None, MANY_ROWS], ids=["row-units", "many-rows"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_every_depth_conforms(
    adapter: str, units: tuple[int, ...] | None, tiny_plan: Callable[[str], Plan], cache: Path
) -> None:
    subject = PlanSubject(tiny_plan(adapter), cache, units)
    check_all(lambda: subject, scales=(1e-12, 1.0, 1e12))


@pytest.mark.parametrize("adapter", ["head", "lora-qv", "lora-all", "full-last-1"])
def test_norms_on_the_real_model(adapter: str, cache: Path) -> None:
    subject = PlanSubject(plan_of(ADAPTERS[adapter]), cache)
    check_norms(lambda: subject)
    check_sensitivity(lambda: subject)


def test_every_lora_target_is_reached(tiny_plan: Callable[[str], Plan], cache: Path) -> None:
    subject = PlanSubject(tiny_plan("lora-all"), cache)
    sizes = [p.numel() for p in subject.module.parameters() if p.requires_grad]
    parts = record(subject, [0, 1]).gradients.split(sizes, dim=1)
    assert len(parts) == 3 * 6 * 2 + 1  # layers x linear maps x (A, B), and the head
    assert all(float(part.norm()) > 0 for part in parts)


# --- models by hand -------------------------------------------------------------------------------------------------


class Sequence(nn.Module):
    """Scores [B, classes] of token features [B, T, d]; `wide` layers take the Gram route."""

    def __init__(self, width: int = 24, hidden: int = 40, *, twice: bool = False) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(width, hidden), nn.LayerNorm(hidden)
        self.middle, self.last = nn.Linear(hidden, hidden), nn.Linear(hidden, 3)
        self.twice = twice

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(torch.tanh(self.first(x)))
        for _ in range(1 + self.twice):
            hidden = torch.tanh(self.middle(hidden))
        return self.last(hidden.mean(dim=1))


def by_hand(module: nn.Module, units: tuple[int, ...] = (0, 1, 2, 3, 4), tokens: int = 6) -> ModuleSubject:
    torch.manual_seed(2)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    inputs = torch.randn(len(units), tokens, 24)
    labels = torch.arange(len(units)) % 3
    return ModuleSubject(module, inputs, labels, np.asarray(units, dtype=np.int64))


@pytest.mark.parametrize("tokens", [1, 6, 60], ids=["one-token", "gram", "instantiated"])
@pytest.mark.parametrize("units", [(0, 1, 2, 3, 4), (0, 1, 0, 2, 1)], ids=["row-units", "many-rows"])
def test_linear_and_norm_layers_conform(units: tuple[int, ...], tokens: int) -> None:
    check_all(lambda: by_hand(Sequence(), units, tokens))


def test_a_layer_that_runs_twice_conforms() -> None:
    check_all(lambda: by_hand(Sequence(twice=True)))


class BatchNormed(Sequence):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(super().forward(x))


class Shared(Sequence):
    def __init__(self) -> None:
        super().__init__()
        self.copy = nn.Linear(40, 40)
        self.copy.weight = self.middle.weight


class Custom(Sequence):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.gate * super().forward(x)


@pytest.mark.parametrize(
    "module",
    [
        BatchNormed(),
        Shared(),
        Custom(),
        nn.Sequential(nn.Embedding(5, 3)),
        nn.Sequential(nn.Conv1d(3, 3, 1)),
        nn.LSTM(4, 4),
        nn.Sequential(nn.MultiheadAttention(4, 2)),
        nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
    ],
    ids=["batch-norm", "shared", "custom", "embedding", "convolution", "lstm", "attention", "weight-norm"],
)
def test_layers_without_an_exact_gradient_are_refused(module: nn.Module) -> None:
    with pytest.raises(UnsupportedLayer):
        GradientTape(module)


class FlattensTokens(Sequence):
    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x.flatten(0, 1)))
        return self.last(hidden).reshape(len(x), -1, 3).mean(dim=1)


def test_tokens_never_pass_for_records() -> None:
    with pytest.raises(PrivacyError, match="first dimension"):
        record(by_hand(FlattensTokens()), [0, 1])


class SequenceFirst(Sequence):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(0, 1)).mean(dim=0, keepdim=True).expand(len(x), -1)


def test_records_in_another_dimension_are_caught() -> None:
    with pytest.raises(PrivacyError, match="first dimension"):
        record(by_hand(SequenceFirst()), [0, 1])


class UsesWeightsDirectly(Sequence):
    """Reads a trainable weight past its layer, so that no tape sees the gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(torch.tanh(self.first(x)).mean(dim=1), self.last.weight)


def test_a_weight_that_is_used_past_its_layer_is_refused() -> None:
    with pytest.raises(PrivacyError):
        record(by_hand(UsesWeightsDirectly()), [0, 1])


# --- the checks themselves tell wrong losses ------------------------------------------------------------------------


class MeanLoss(ModuleSubject):
    """As in Hugging Face models: the mean over the batch at hand."""

    def loss(self, rows: Any) -> Tensor:
        return super().loss(rows) / len(rows)


class InBatchNegatives(ModuleSubject):
    """Contrastive: every record is every other's negative."""

    def loss(self, rows: Any) -> Tensor:
        scores = self.module(self.inputs[torch.from_numpy(rows)])
        return nn.functional.cross_entropy(scores @ scores.T, torch.arange(len(rows)), reduction="sum")


@pytest.mark.parametrize("kind", [MeanLoss, InBatchNegatives])
def test_losses_that_mix_records_are_told(kind: type[ModuleSubject]) -> None:
    plain = by_hand(Sequence())
    subject = kind(plain.module, plain.inputs, plain.labels, plain.units)
    with pytest.raises(Violation, match="other units"):
        check_isolation(lambda: subject)


# --- clipping under attack ------------------------------------------------------------------------------------------


class Lone(nn.Module):
    """One wide layer over tokens, summed: its gradient is Σ_t g xᵀ_t, which tokens can make cancel."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(256, 256, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).sum(dim=1)


@pytest.mark.parametrize("size", [1e1, 1e3, 1e5])
def test_tokens_that_cancel_cannot_hide_a_gradient(size: float) -> None:
    torch.manual_seed(0)
    worst = 0.0
    for _ in range(20):
        token = torch.randn(256)
        rest = torch.randn(256) / 16 / size
        inputs = torch.stack([token, rest - token])[None]
        tape = GradientTape(model := Lone())
        with tape.recording(torch.zeros(1, dtype=torch.int64), 1):
            (model(inputs) @ torch.randn(256) * size).sum().backward()
        worst = max(worst, float(tape.clip(1.0).total.double().norm()))
    assert worst <= 1.0


def test_units_without_rows_do_not_make_rows_units() -> None:
    tape = GradientTape(model := nn.Linear(4, 3, bias=False))
    with tape.recording(torch.tensor([0, 0, 2]), 3):  # three rows, three numbers, but two units
        (100 * model(torch.ones(3, 4))).sum().backward()
    clipped = tape.clip(1.0)
    assert float(clipped.total.norm()) <= 2.0
    assert clipped.norms[1] == 0


def test_a_clip_norm_below_what_fp32_can_square_is_refused() -> None:
    tape = GradientTape(model := nn.Linear(4, 3, bias=False))
    with tape.recording(torch.tensor([0]), 1):
        (1e-24 * model(torch.ones(1, 4))).sum().backward()
    try:
        norm = float(tape.clip(1e-26).total.double().norm())
    except PrivacyError:
        return
    assert norm <= 1e-26


def test_a_record_whose_gradient_is_nan_adds_nothing_and_is_counted() -> None:
    subject = by_hand(Sequence())
    clean = record(subject, [0, 1, 3, 4]).clipped
    for poison in (float("nan"), float("inf"), 1e38):
        broken = by_hand(Sequence())
        broken.inputs[2] = poison
        broken.module.load_state_dict(subject.module.state_dict())
        poisoned = record(broken, [0, 1, 2, 3, 4]).clipped
        assert torch.isfinite(poisoned.total).all()
        if poison != 1e38:  # tanh swallows a large number; NaN is the record's own problem alone
            assert poisoned.rejected == 1
            torch.testing.assert_close(poisoned.total, clean.total, rtol=1e-4, atol=1e-6)


def test_a_nan_row_takes_its_whole_unit_along() -> None:
    subject = by_hand(Sequence(), (0, 1, 0, 2, 1))
    subject.inputs[0] = float("nan")
    clipped = record(subject, [0, 1, 2]).clipped
    assert clipped.rejected == 1
    assert torch.isfinite(clipped.total).all()
    assert torch.isnan(clipped.norms[0])


def test_clipping_needs_a_recorded_batch_and_spends_it() -> None:
    subject = by_hand(Sequence())
    tape = GradientTape(subject.module)
    with pytest.raises(PrivacyError):
        tape.clip(1.0)
    with tape.recording(torch.arange(5), 5):
        subject.loss(np.arange(5)).backward()
    tape.clip(1.0)
    with pytest.raises(PrivacyError):
        tape.clip(1.0)


def test_coarse_matrix_products_keep_clipped_norms() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")  # bf16 on processors that have it
        check_clipping(lambda: by_hand(Sequence()))
    except PrivacyError:
        pass  # refusing is as good
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_loop_reference_is_the_gradient() -> None:
    subject = by_hand(Sequence())
    exact = exact_gradient(subject, 0)
    step = 1e-6 * exact / exact.norm()
    before = float(subject.exact_loss(np.array([0])).detach())
    with torch.no_grad():
        torch.nn.utils.vector_to_parameters(
            torch.nn.utils.parameters_to_vector(subject.exact_module.parameters()) + step,
            subject.exact_module.parameters(),
        )
    after = float(subject.exact_loss(np.array([0])).detach())
    assert (after - before) / 1e-6 == pytest.approx(float(exact.norm()), rel=1e-3)
