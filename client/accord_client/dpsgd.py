"""The private step: Opacus' optimiser contract, fed by the gradient tape and a cryptographic generator.

`make_private` is not used: it derives the sampling rate and the divisor from the size of the private data,
which the update would then betray. Here both are constants of the plan.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from accord_shared.dp.noise import SecureGenerator, snap
from accord_shared.errors import PrivacyError

_CHUNK = 1 << 16
"""Values noised at a time: as many as the generator draws at once, so that they stay in cache."""


class ClippedOptimizer(DPOptimizer):  # type: ignore[misc]
    """Opacus' `DPOptimizer` over sums that the tape has clipped already, without noise and so without privacy.

    One step: divide the sum by the public `expected_batch`, let the wrapped optimiser step.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        noise_multiplier: float,
        clip_norm: float,
        expected_batch: float,
        generator: SecureGenerator,
        on_step: Callable[[], None],
    ) -> None:
        if not (clip_norm > 0 and expected_batch > 0):
            raise PrivacyError(f"clip norm {clip_norm} and divisor {expected_batch} must be above 0")
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=clip_norm,
            expected_batch_size=expected_batch,
            generator=generator,
        )
        self._sum: Tensor | None = None
        self.attach_step_hook(lambda _: on_step())

    @property
    def accumulated_iterations(self) -> int:
        """Micro-batches add up to one Poisson sample: the divisor is applied once."""
        return 1

    def accumulate(self, total: Tensor) -> None:
        """Add the clipped sum [P], fp64, of units of the step's Poisson sample."""
        self._sum = total if self._sum is None else self._sum + total

    def noised(self, total: Tensor) -> Tensor:
        """What is released of the clipped sum `total` [P], fp64."""
        return total

    def add_noise(self) -> None:
        """Hand out the parts of the released sum (of an empty sample too)."""
        parameters: list[nn.Parameter] = self.params
        sizes = [parameter.numel() for parameter in parameters]
        total = self._sum
        if total is None:
            total = torch.zeros(sum(sizes), dtype=torch.float64, device=parameters[0].device)
        for parameter, part in zip(parameters, torch.split(self.noised(total).float(), sizes), strict=True):
            parameter.grad = part.view_as(parameter)
        self._sum = None

    def pre_step(self, closure: Any = None) -> bool:
        """Noise, divide, count; always a full step."""
        del closure
        self.add_noise()
        self.scale_grad()
        self.step_hook(self)
        return True


class NoisyOptimizer(ClippedOptimizer):
    """The private step: N(0, (σC)²) on the sum of clipped gradients, drawn in fp64 and snapped to a public grid.

    Raises:
        PrivacyError: σ is not above 0.
    """

    def __init__(self, optimizer: Optimizer, *, noise_multiplier: float, **rest: Any) -> None:
        if not noise_multiplier > 0:
            raise PrivacyError(f"a private step needs a noise multiplier above 0, not {noise_multiplier}")
        super().__init__(optimizer, noise_multiplier=noise_multiplier, **rest)

    def noised(self, total: Tensor) -> Tensor:
        """`total` [P] with noise, once for the flat vector."""
        scale = self.noise_multiplier * self.max_grad_norm
        noised = total.cpu().numpy().copy()
        for start in range(0, len(noised), _CHUNK):
            part = noised[start : start + _CHUNK]
            part[:] = snap(self.generator.gaussian(len(part), scale) + part, scale)
        return torch.from_numpy(noised).to(total.device)
