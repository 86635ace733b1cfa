"""Per-unit gradients in one backward pass: norms, clipping and the clipped sum.

A trainable layer is taped: its backward returns the gradient of its input only, and keeps what the
per-unit gradients need. No batch gradient is computed that would be thrown away, and there is no second
backward (book-keeping, Bu et al. 2023). Layer by layer the cheaper exact route is taken (mixed ghost
clipping, Bu et al. 2022, Section 4):

- instantiate the gradient of each unit, T·p·d multiplications, when p·d ≤ T·(p+d), which holds for LoRA
  pairs of any useful rank, and whenever a unit has several rows or a layer runs twice;
- else take the norm from the two Gram matrices, T²·(p+d), and form the clipped sum by one weighted
  product, the cost of an ordinary weight gradient.

Letters: B rows in the batch, U privacy units, T tokens, d inputs, p outputs, P trainable parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from accord_shared.errors import PrivacyError, UnsupportedLayer

CLIP_MARGIN = 1e-4
"""Relative allowance for fp32 rounding of a norm: clipped norms stay ≤ C when recomputed in fp64."""

CLIP_NORMS = (1e-6, 1e6)
"""Bounds of C: far outside, fp32 squares vanish or overflow and norms read 0 or infinity."""

_CROSS_SAMPLE = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


@dataclass(frozen=True)
class Clipped:
    """The sum of clipped unit gradients [P], fp64, their norms before clipping [U], units left out."""

    total: Tensor
    norms: Tensor
    rejected: int


@dataclass(frozen=True)
class _Units:
    """The privacy unit [B] of each row of the batch, numbered 0..count-1."""

    index: Tensor
    count: int
    rows_are_units: bool

    def gather(self, rows: Tensor) -> Tensor:
        """Sum per-row values [B, …] into per-unit values [U, …]."""
        if self.rows_are_units:
            return rows
        return rows.new_zeros((self.count, *rows.shape[1:])).index_add_(0, self.index, rows)


class _Record:
    """What one trainable tensor keeps between backward and clipping."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter
        self.per_unit: Tensor | None = None  # [U, size]
        self.factors: tuple[Tensor, Tensor] | None = None  # inputs [B, T, d], output gradients [B, T, p]

    def add(self, per_unit: Tensor) -> None:
        flat = per_unit.reshape(per_unit.shape[0], -1)
        self.per_unit = flat if self.per_unit is None else self.per_unit + flat

    def clear(self) -> None:
        self.per_unit = self.factors = None

    def squared_norms(self, units: _Units) -> Tensor:
        total = torch.zeros(units.count, device=self.parameter.device)
        if self.per_unit is not None:
            total += self.per_unit.square().sum(dim=1)
        if self.factors is not None:
            total += _gram_norms(*self.factors)
        return total

    def weighted_sum(self, coefficients: Tensor, keep: Tensor | None, total: Tensor) -> None:
        """Add Σ_u coefficient_u · gradient_u to `total` [size]; units outside `keep` do not enter at all.

        In the precision of `total` and `coefficients`.
        """
        if self.per_unit is not None:
            total.addmv_(_without(self.per_unit, keep).to(total.dtype).T, coefficients)
        elif self.factors is not None:
            inputs, grads = (_without(factor, keep).to(total.dtype) for factor in self.factors)
            weighted = grads * coefficients[:, None, None]
            total.view(self.parameter.shape).addmm_(weighted.flatten(0, 1).T, inputs.flatten(0, 1))


def _without(rows: Tensor, keep: Tensor | None) -> Tensor:
    """`rows` with the rejected ones zeroed, for 0 · NaN would be NaN; `keep` None: none was rejected."""
    if keep is None:
        return rows
    return torch.where(keep.reshape(-1, *[1] * (rows.dim() - 1)), rows, torch.zeros((), device=rows.device))


def _gram_norms(inputs: Tensor, grads: Tensor) -> Tensor:
    """‖Σ_t grads_t inputs_tᵀ‖² per row [B] = Σ_ts (inputs_t·inputs_s)(grads_t·grads_s), rounded up.

    Tokens may cancel (a record can be made so): then fp32 keeps nothing of the true norm, and what it may have
    lost is added. Inputs are brought to size 1 and their size to the gradients, for squares below 1e-45 would vanish.
    """
    sizes = inputs.abs().amax(dim=2, keepdim=True)
    sizes = torch.where((sizes > 0) & torch.isfinite(sizes), sizes, torch.ones_like(sizes))
    inputs, grads = inputs / sizes, grads * sizes
    if inputs.shape[1] == 1:
        return inputs.square().sum(dim=(1, 2)) * grads.square().sum(dim=(1, 2))
    gram = ((inputs @ inputs.mT) * (grads @ grads.mT)).sum(dim=(1, 2)).clamp(min=0.0)
    terms = (_lengths(inputs) * _lengths(grads)).sum(dim=1).square()  # ≥ Σ_ts |…|: what rounding scales with
    return gram + 2.0**-24 * (16 + math.sqrt(inputs.shape[2]) + math.sqrt(grads.shape[2])) * terms


def _lengths(rows: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=-1)
    return lengths


class GradientTape:
    """Tapes the trainable layers of `model` while `recording`, and clips what they recorded.

    Raises:
        UnsupportedLayer: a trainable tensor belongs to a layer without an exact per-sample gradient here,
            or a layer mixes the samples of a batch.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._records: dict[nn.Parameter, _Record] = {}
        self._layers: list[tuple[nn.Module, Callable[..., Tensor]]] = []
        self._units: _Units | None = None
        for name, module in model.named_modules():
            self._admit(name, module)
        self._order = [self._records[p] for p in model.parameters() if p.requires_grad]

    @property
    def dimension(self) -> int:
        """P, the number of trainable parameters."""
        return sum(record.parameter.numel() for record in self._order)

    def _admit(self, name: str, module: nn.Module) -> None:
        if isinstance(module, _CROSS_SAMPLE):
            raise UnsupportedLayer(f"{name} ({type(module).__name__}) mixes the samples of a batch")
        trainable = [p for p in module.parameters(recurse=False) if p.requires_grad]
        if not trainable:
            return
        forward = _FORWARDS.get(type(module))
        if forward is None:
            raise UnsupportedLayer(f"{name} ({type(module).__name__}) has no exact per-sample gradient here")
        if any(parameter in self._records for parameter in trainable):
            raise UnsupportedLayer(f"{name} shares a trainable tensor with another layer")
        self._records |= {parameter: _Record(parameter) for parameter in trainable}
        self._layers.append((module, forward))

    @contextmanager
    def recording(self, unit_index: Tensor, n_units: int, *, rows_are_units: bool | None = None) -> Iterator[None]:
        """Tape forward and backward of one batch whose rows belong to `unit_index` [B] of `n_units` units.

        Several batches of the same units may follow each other: their gradients are added up. `rows_are_units` decides
        the route; by default it is taken where it can be, which depends on the batch.
        """
        if rows_are_units is None:
            in_order = torch.arange(n_units, device=unit_index.device)
            rows_are_units = len(unit_index) == n_units and bool((unit_index == in_order).all())
        self._units = _Units(unit_index, n_units, rows_are_units)
        for record in self._order:
            record.clear()
            record.parameter.grad = None
        for module, forward in self._layers:
            module.forward = MethodType(_taped(forward, self), module)
        try:
            yield
        finally:
            for module, _ in self._layers:
                del module.forward

    def clip(self, clip_norm: float, total: Tensor | None = None) -> Clipped:
        """Scale every unit's gradient to norm ≤ `clip_norm` and sum, on top of `total` [P] (changed) where it is given.

        A unit whose gradient is not finite contributes nothing and is counted. Sums are fp64: there a unit moves the
        rounding of all others' sum by next to nothing.

        Raises:
            PrivacyError: no batch was recorded, `clip_norm` is outside `CLIP_NORMS`, or matrix products are set
                to a coarser precision than fp32.
            UnsupportedLayer: a trainable tensor was used past its layer.
        """
        units = self._units
        if units is None:
            raise PrivacyError("no batch was recorded")
        if not CLIP_NORMS[0] <= clip_norm <= CLIP_NORMS[1]:
            raise PrivacyError(f"clip norm {clip_norm:g} is outside {CLIP_NORMS[0]:g} to {CLIP_NORMS[1]:g}")
        if torch.get_float32_matmul_precision() != "highest":
            raise PrivacyError("norms need torch.set_float32_matmul_precision('highest')")
        if any(record.parameter.grad is not None for record in self._order):
            raise UnsupportedLayer("a trainable tensor was used past its layer: its gradient is the batch's")
        squares = torch.zeros(units.count, device=self._order[0].parameter.device)
        for record in self._order:
            squares += record.squared_norms(units)
        norms = squares.sqrt()
        finite = torch.isfinite(norms)
        coefficients = (clip_norm / (norms * (1.0 + CLIP_MARGIN))).clamp(max=1.0)
        coefficients = torch.where(finite, coefficients, torch.zeros_like(coefficients))
        rejected = int((~finite).sum())  # the step's one synchronisation with a GPU
        keep = finite if rejected else None
        if total is None:
            total = torch.zeros(self.dimension, device=squares.device, dtype=torch.float64)
        coefficients = coefficients.to(total.dtype)
        sizes = [record.parameter.numel() for record in self._order]
        for record, part in zip(self._order, torch.split(total, sizes), strict=True):
            record.weighted_sum(coefficients, keep, part)
            record.clear()
        self._units = None
        return Clipped(total=total, norms=norms, rejected=rejected)

    def recorded(self) -> list[Tensor]:
        """What is kept of the recorded batch, tensors [U, …], and the norms [U] that clipping would find."""
        units = self._units
        if units is None:
            raise PrivacyError("no batch was recorded")
        kept = [
            buffer
            for record in self._order
            for buffer in (record.per_unit, *(record.factors or ()))
            if buffer is not None
        ]
        return [*kept, torch.stack([record.squared_norms(units) for record in self._order], dim=1)]

    def per_unit_gradients(self) -> Tensor:
        """The unclipped gradients [U, P] of the recorded batch, for tests and audits: O(U·P) memory."""
        units = self._units
        if units is None:
            raise PrivacyError("no batch was recorded")
        parts = []
        for record in self._order:
            part = torch.zeros(units.count, record.parameter.numel(), device=record.parameter.device)
            if record.per_unit is not None:
                part += record.per_unit
            if record.factors is not None:
                inputs, grads = record.factors
                part += (grads.mT @ inputs).flatten(1)
            parts.append(part)
        return torch.cat(parts, dim=1)

    def rows(self, tensor: Tensor) -> Tensor:
        """`tensor` [B, …, n] as fp32 [B, T, n].

        Raises:
            PrivacyError: its first dimension is not the batch, so that tokens would pass for records.
        """
        if self._units is None or tensor.dim() < 2 or tensor.shape[0] != len(self._units.index):
            raise PrivacyError(f"a layer saw {tuple(tensor.shape)}: its first dimension is not the batch")
        return tensor.detach().float().reshape(tensor.shape[0], -1, tensor.shape[-1])

    def add_linear(self, layer: nn.Linear, inputs: Tensor, grads: Tensor) -> None:
        """Record y = x Wᵀ + b: `inputs` [B, T, d], `grads` [B, T, p]."""
        units = self._units
        if units is None:
            raise PrivacyError("no batch is being recorded")
        bias: nn.Parameter | None = layer.bias
        if bias is not None and bias.requires_grad:
            self._records[bias].add(units.gather(grads.sum(dim=1)))
        if not layer.weight.requires_grad:
            return
        weight: nn.Parameter = layer.weight  # type: ignore[assignment]
        record = self._records[weight]
        tokens, cost = inputs.shape[1], layer.in_features * layer.out_features
        again = record.factors is not None or record.per_unit is not None
        if units.rows_are_units and not again and cost > tokens * (layer.in_features + layer.out_features):
            record.factors = (inputs, grads)
            return
        if record.factors is not None:  # the layer runs a second time: cross terms need both in full
            first_inputs, first_grads = record.factors
            record.factors = None
            record.add(units.gather(first_grads.mT @ first_inputs))
        record.add(units.gather(grads.mT @ inputs))

    def add_scale(self, layer: nn.LayerNorm, normalized: Tensor, grads: Tensor) -> None:
        """Record y = x̂ γ + β: `normalized` and `grads` [B, T, d]."""
        units = self._units
        if units is None:
            raise PrivacyError("no batch is being recorded")
        if layer.weight.requires_grad:
            self._records[layer.weight].add(units.gather((grads * normalized).sum(dim=1)))
        if layer.bias is not None and layer.bias.requires_grad:
            self._records[layer.bias].add(units.gather(grads.sum(dim=1)))


class _TapedLinear(torch.autograd.Function):
    """`F.linear` whose backward hands (x, ∂y) to the tape in place of a batch gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: Any, tape: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.layer, ctx.tape = layer, tape
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        (grad,) = grads
        ctx.tape.add_linear(ctx.layer, ctx.tape.rows(x), ctx.tape.rows(grad))
        grad_x = (grad @ weight.to(grad.dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, None, None


class _TapedLayerNorm(torch.autograd.Function):
    """`F.layer_norm` over the last dimension whose backward hands (x̂, ∂y) to the tape."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, layer: Any, tape: Any) -> Tensor:
        y, mean, rstd = torch.native_layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.layer, ctx.tape = layer, tape
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, mean, rstd = ctx.saved_tensors
        (grad,) = grads
        normalized = (x - mean) * rstd
        ctx.tape.add_scale(ctx.layer, ctx.tape.rows(normalized), ctx.tape.rows(grad))
        grad_x = None
        if ctx.needs_input_grad[0]:
            scaled = grad * weight
            centred = scaled - scaled.mean(-1, keepdim=True)
            grad_x = rstd * (centred - normalized * (scaled * normalized).mean(-1, keepdim=True))
            grad_x = grad_x.to(x.dtype)
        return grad_x, None, None, None, None


def _linear(layer: nn.Linear, tape: GradientTape, x: Tensor) -> Tensor:
    output: Tensor = _TapedLinear.apply(x, layer.weight, layer.bias, layer, tape)  # type: ignore[no-untyped-call]
    return output


def _layer_norm(layer: nn.LayerNorm, tape: GradientTape, x: Tensor) -> Tensor:
    if len(layer.normalized_shape) != 1 or layer.weight is None or layer.bias is None:
        raise UnsupportedLayer("LayerNorm over several dimensions or without scale and shift")
    output: Tensor = _TapedLayerNorm.apply(x, layer.weight, layer.bias, layer, tape)  # type: ignore[no-untyped-call]
    return output


_FORWARDS: dict[type[nn.Module], Callable[..., Tensor]] = {nn.Linear: _linear, nn.LayerNorm: _layer_norm}


def _taped(forward: Callable[..., Tensor], tape: GradientTape) -> Callable[[nn.Module, Tensor], Tensor]:
    def taped(module: nn.Module, x: Tensor) -> Tensor:
        return forward(module, tape, x)

    return taped
