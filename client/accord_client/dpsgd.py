"""The private step: Opacus' optimiser contract, fed by the gradient tape and a cryptographic generator.

`make_private` is not used: it derives the sampling rate and the divisor from the size of the private data,
which the update would then betray. Here both are constants of the plan.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accord_shared.dp.noise import SecureGenerator, snap
from accord_shared.errors import PrivacyError
from opacus.optimizers import DPOptimizer
from torch import Tensor
from torch.optim import Optimizer

from accord_client.gradients import Clipped


class NoisyOptimizer(DPOptimizer):  # type: ignore[misc]
    """Opacus' `DPOptimizer` over sums that the tape has clipped already.

    One step: add N(0, (σC)²) to the sum of clipped gradients, divide by the public `expected_batch`,
    let the wrapped optimiser step. The noise is drawn once for the flat vector, in fp64, and the noised sum
    is snapped to a public grid.
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
        if not (noise_multiplier > 0 and clip_norm > 0 and expected_batch > 0):
            raise PrivacyError(
                f"a private step needs noise, clip norm and divisor above 0, "
                f"not {noise_multiplier}, {clip_norm}, {expected_batch}"
            )
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

    def accumulate(self, clipped: Clipped) -> None:
        """Add one micro-batch of the step's Poisson sample."""
        self._sum = clipped.total if self._sum is None else self._sum + clipped.total

    def add_noise(self) -> None:
        """Noise the flat sum (an empty sample is noise alone) and hand out the parts."""
        parameters = self.params
        scale = self.noise_multiplier * self.max_grad_norm
        noise = torch.from_numpy(self.generator.gaussian(sum(p.numel() for p in parameters), scale))
        noised = noise if self._sum is None else self._sum.double().cpu() + noise
        noised = torch.from_numpy(snap(noised.numpy(), scale)).to(parameters[0].device, torch.float32)
        parts = noised.split([p.numel() for p in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter).clone()
        self._sum = None

    def pre_step(self, closure: Any = None) -> bool:
        """Noise, divide, count; always a full step."""
        del closure
        self.add_noise()
        self.scale_grad()
        self.step_hook(self)
        return True
